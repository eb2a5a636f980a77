"""curves.png of every kind of run; what each panel shows."""

import json

import numpy as np
import pytest

from llada_jax.training import curves

LEVELS = 8


def training(step, **changes):
    levels = [None] * 2 + [2.0 / step] * (LEVELS - 2)
    return {"step": step, "loss": 3 / step, "grad_norm": 1.0, "skipped": 0, "loss_by_level": levels, "load_by_layer": [1.5, 1.2],
            "load_by_level": [[None, None]] * 2 + [[1.5, 1.2]] * (LEVELS - 2), **changes}


def held_out(step, levels=True):
    return {"step": step, "heldout_bits_per_byte": 5 / (step + 1), "heldout_bits_per_byte_se": 0.1,
            "heldout_loss_by_level": [None] + [1.0] * (LEVELS - 1) if levels else []}


RUNS = {
    "normal": [held_out(0), *map(training, range(1, 30)), held_out(30)],
    "skipped": [training(1), training(2, loss=None, grad_norm=None, skipped=1, load_by_layer=[None, None],
                                      load_by_level=[[None, None]] * LEVELS, loss_by_level=[None] * LEVELS), training(3, skipped=1)],
    "autoregressive": [held_out(0, False), *(training(i, loss_by_level=[1.0] + [None] * 7, load_by_level=[[1.5, 1.2]] + [[None, None]] * 7)
                                             for i in range(1, 9)), held_out(9, False)],
    "dense": [{key: value for key, value in training(i).items() if not key.startswith("load")} for i in range(1, 5)],
    "evaluation alone": [held_out(0)],
    "one step": [training(1)],
    "nothing finite": [training(i, loss=None, grad_norm=None, skipped=i) for i in range(1, 4)],
    "many layers": [training(i, load_by_layer=[1.0] * 16, load_by_level=[[1.0] * 16] * LEVELS) for i in range(1, 4)],
}  # fmt: skip
TEXTS = {
    "normal": ["held-out bound ± standard error", "gradient norm · no steps skipped", "expert layer 1", "balanced", "step 30"],
    "skipped": ["gradient norm · 1 step skipped", "skipped steps so far", "training loss by noise level", "no held-out evaluation"],
    "autoregressive": ["held-out likelihood ± standard error", "no noise levels"],
    "dense": ["no expert layers"],
    "evaluation alone": ["no training step yet"],
}


@pytest.mark.parametrize("kind", RUNS)
def test_every_kind_of_run_is_drawn(kind, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **named: figures.append(self) or save(self, *args, **named))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in RUNS[kind]) + '{"step": 99, "lo')
    curves.draw(str(tmp_path))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "curves.tmp.png").exists()
    shown = " ".join(text.get_text() for text in figures[0].findobj(lambda artist: hasattr(artist, "get_text") and artist.get_visible()))
    assert all(text in shown for text in TEXTS.get(kind, [])), shown
    assert all(axis.get_title() and axis.get_xlabel() and axis.get_ylabel() for axis in figures[0].axes[:6])


def test_nothing_is_drawn_of_nothing(tmp_path):
    curves.draw(str(tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    curves.draw(str(tmp_path))
    assert not (tmp_path / "curves.png").exists()


def test_smoothing_keeps_constants_and_skips_gaps():
    np.testing.assert_allclose(curves._smooth(np.full(300, 2.0)), 2.0)
    noisy = np.where(np.arange(300) == 150, np.nan, 2.0)
    np.testing.assert_allclose(curves._smooth(noisy), 2.0)
