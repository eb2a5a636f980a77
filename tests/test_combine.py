"""The mean of checkpoints: which ones, the numbers, and that every command takes it."""

import json

import jax
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning, tokenizer
from llada_jax.config import ConfigError
from llada_jax.model import transformer
from llada_jax.training import checkpoint, combine, optimizer, pretrained
from llada_jax.training import state as state_lib
from tests import tiny_run

BYTE = tokenizer.Bytes()
CONFIG = config_lib.Config(
    model=config_lib.Model(vocab_size=BYTE.vocab_size, hidden_size=16, num_layers=2, num_heads=2, num_experts=2, experts_per_token=1, expert_size=8,
                           max_length=64, router_bias=True),
    data=config_lib.Data(sequence_length=32, tokenizer="bytes"), optimizer=config_lib.Optimizer(ema_decay=0.9))
BOUNDS = {2: 5.0, 4: 3.0, 6: 3.5, 8: 2.5, 10: 2.0, 12: 4.0}  # held-out bits a byte by step; no checkpoint of 10
KEPT = (2, 4, 6, 8, 12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, {step: variables}) of five checkpoints with different weights, experts' biases and averages."""
    folder, model = tmp_path_factory.mktemp("runs") / "run", transformer.build(CONFIG.model)
    like = jax.eval_shape(lambda: state_lib.create(model, optimizer.make(CONFIG.optimizer, 1, model.shapes["params"]), CONFIG))
    first = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    saver, kept = checkpoint.Checkpointer(str(folder), len(KEPT), 0), {}
    for step in KEPT:
        draw = np.random.default_rng(step)
        numbers = lambda x, draw=draw: draw.standard_normal(x.shape).astype(np.float32)
        variables, ema = jax.tree.map(numbers, first.variables), jax.tree.map(numbers, first.ema)
        saver.save(first._replace(step=np.int32(step), variables=variables, ema=ema), CONFIG)
        kept[step] = variables, ema
    saver.close()
    BYTE.save(folder)
    lines = [{"step": 3, "loss": 1.0}, {"step": 8, "heldout_bits_per_byte": 9.0}, {"step": 4, "heldout_bits_per_byte": None}]
    lines += [{"step": step, "heldout_bits_per_byte": bound} for step, bound in BOUNDS.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "held')
    return folder, kept


def mean(trees):
    return jax.tree.map(lambda *x: np.mean(np.float64(x), axis=0), *trees)


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-7 * np.abs(b).max() + 2e-7), got, want)


def test_the_best_are_averaged_and_every_command_takes_the_mean(run, tmp_path):
    folder, kept = run
    by_top, by_steps, ema, out = (tmp_path / name for name in ("top", "steps", "ema", "out"))
    done = tiny_run.each("convert", [
        ["average", f"--workdir={folder}", "--top=3", f"--out={by_top}"],
        ["average", f"--workdir={folder}", "--steps=2,12", f"--out={by_steps}"],
        ["average", f"--workdir={folder}", "--steps=4,8", "--weights=ema", f"--out={ema}"],
        ["export", f"--checkpoint={by_top}", f"--out={out}"],
    ])
    assert all(result.returncode == 0 and not result.stderr for result in done), done
    assert "better bounds were measured at the steps 10, whose checkpoints are gone; train.keep_every=N keeps" in done[0].stdout
    assert "steps 8 (2.5000 bits a byte), 4 (3.0000 bits a byte), 6 (3.5000 bits a byte), is in" in done[0].stdout and "gone" not in done[1].stdout
    record = json.loads((by_top / "average.json").read_text())
    assert record == {"run": str(folder), "weights": "params", "steps": [8, 4, 6], "heldout_bits_per_byte": [2.5, 3.0, 3.5]}
    for place, step, steps, part in ((by_top, 8, (8, 4, 6), 0), (by_steps, 12, (2, 12), 0), (ema, 8, (4, 8), 1)):
        trained = pretrained.open_weights(str(place), None)
        model = transformer.build(trained.config.model)
        variables = trained.load(model.shapes, partitioning.shardings_of(partitioning.make_mesh(), model.axes, model.shapes))
        assert trained.step == step and trained.config == CONFIG and trained.tokenizer.fingerprint == BYTE.fingerprint
        want = mean([kept[step][0] for step in steps])
        assert np.any(want["router_bias"]["bias"])  # averaged too
        assert_close(variables, want if not part else {"params": mean([kept[step][1] for step in steps]), "router_bias": want["router_bias"]})
    start = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), transformer.build(CONFIG.model).shapes)
    taken, missing, extra = checkpoint.load_matching(str(by_top), 8, start)  # --init_from
    assert not missing and not extra
    assert_close(taken, mean([kept[step][0] for step in (8, 4, 6)]))
    exported = pretrained.open_published(str(out)).source().tree()
    assert_close(exported, jax.tree.map(np.asarray, taken))


def test_what_cannot_be_averaged(run, tmp_path):
    folder, _ = run
    other, out = tmp_path / "other", f"--out={tmp_path / 'out'}"
    other.mkdir()
    (other / "checkpoints").symlink_to(folder / "checkpoints")
    cases = [
        ([f"--workdir={folder}", "--top=6"], ["has 5 of 6 checkpoints", "2, 4, 6, 8, 10, 12", "exist of 2, 4, 6, 8, 12", "train.keep_every=N keeps"]),
        ([f"--workdir={other}", "--top=2"], ["metrics.jsonl holds no held-out bound", "--steps=A,B"]),
        ([f"--workdir={folder}", "--steps=2,10"], ["no checkpoint of 10", "has 2, 4, 6, 8, 12", "train.keep_every"]),
        ([f"--workdir={folder}", "--steps=2,2"], ["each may stand there once"]), ([f"--workdir={folder}", "--steps=2,b"], ["--steps=2,b"]),
        ([f"--workdir={folder}"], ["one of --top=K and --steps"]), ([f"--workdir={folder}", "--top=2", "--steps=2"], ["one of --top=K"]),
        (["--top=2"], ["--workdir is missing"]), ([f"--workdir={tmp_path / 'none'}", "--steps=2"], ["no checkpoint of 2", "has none"]),
        ([f"--workdir={other}", "--steps=2,4"], ["tokenizer"]),
    ]
    results = tiny_run.each("convert", [["average", *arguments, out] for arguments, _ in cases])
    for (_, parts), done in zip(cases, results, strict=True):
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
        assert all(part in done.stderr for part in parts), done.stderr
        assert not (tmp_path / "out").exists()
    assert combine.best(str(folder), 1) == combine.Chosen([8], [2.5], [10])
    with pytest.raises(ConfigError, match="no checkpoint of 10"):
        combine.named(str(folder), [10])
