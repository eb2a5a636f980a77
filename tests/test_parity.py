"""The parity harness: every recorded number is met, and a planted bug is noticed."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.interop import hf_config, hf_weights
from llada_jax.model import transformer
from pallas_kernels import dispatch
from tests import parity

FOLDER = pathlib.Path(__file__).parent / "data" / "checkpoints"
CASES = {"llada": 28, "llada2_moe": 66, "llada_moe": 88, "llada_moe_ext": 65}


def check(name, kernels="auto"):
    statuses = {case: (status, detail) for status, case, detail in parity.check_folder(FOLDER / name, parity.all_kernels(kernels))}
    assert {case: found for case, found in statuses.items() if found[0] == "FAIL"} == {}
    assert {found[0] for found in statuses.values()} == {"PASS"}
    assert len(statuses) == CASES[name]


@pytest.mark.parametrize("name", CASES)
def test_every_case_passes(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["tpu", "gpu"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_passes_with_interpreted_kernels(name, kernels):
    with jax.default_matmul_precision("highest"), dispatch.interpreted():
        check(name, kernels)


def first_activations(change=lambda model: model, **settings):
    """The first case, full/logits, of a model with a planted bug."""
    folder = FOLDER / "llada_moe"
    config = dataclasses.replace(hf_config.read(str(folder)).model, **settings)
    model = transformer.build(config)
    variables = jax.tree.map(jnp.asarray, hf_weights.load(str(folder), "llada_moe", model.shapes))
    status, name, _ = next(parity._activations("llada_moe", dict(np.load(folder / "golden.npz")), change(model), variables))
    assert name == "llada_moe/full/logits"
    return status


def causal(model):
    def apply(variables, tokens, positions, slots, spec, cache, store):
        return model.apply(variables, tokens, positions, slots, spec._replace(block_q=positions, block_k=positions), cache, store)
    return model._replace(apply=apply)


@pytest.mark.parametrize("bug", [
    dict(router_renormalize=True), dict(norm_eps=1e-6), dict(rope_theta=10_000.0), dict(change=causal), {},
], ids=["renormalised top-k", "norm epsilon", "rotary base", "causal mask", "none"])  # fmt: skip
def test_planted_bugs_are_noticed(bug):
    assert first_activations(**bug) == ("FAIL" if bug else "PASS")


def test_the_command_counts_and_exits(capsys, monkeypatch, tmp_path):
    cases = [("PASS", "a", "max abs difference 0.0e+00"), ("SKIP", "b", "not supported"), ("FAIL", "c", "shape () instead of (1,)")]
    monkeypatch.setattr(parity, "check_folder", lambda folder, kernels: iter(cases))
    (tmp_path / "fixture").mkdir()
    assert parity.main(str(tmp_path)) == 1 and "holds no fixture" in capsys.readouterr().err
    (tmp_path / "fixture" / "golden.npz").touch()
    assert parity.main(str(tmp_path)) == 1
    assert capsys.readouterr().out.splitlines() == ["PASS a: max abs difference 0.0e+00", "SKIP b: not supported",
                                                    "FAIL c: shape () instead of (1,)", "1 passed, 1 failed, 1 skipped"]
    cases.pop()
    assert parity.main(str(tmp_path)) == 0
