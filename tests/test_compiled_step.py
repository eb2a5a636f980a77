"""The training step of LLaDA-MoE-7B, compiled for TPUs that are not here: which kernels it launches, and which arrays it never stores."""

import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import pytest

from configs import llada_moe
from llada_jax.evaluation import compiled_program, hardware
from pallas_kernels.linear_cross_entropy import chunked

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = llada_moe.get_config("variant=7b_a1b").model
T = M = 4096  # positions of a row and tokens of a device: one row
V, D, F, E, A = MODEL.vocab_size, MODEL.hidden_size, MODEL.expert_size, MODEL.num_experts, MODEL.experts_per_token


class Compiled(NamedTuple):
    """A compiled step: its report, and the dimensions of every array that gets memory."""

    report: dict[str, Any]
    arrays: set[tuple[int, ...]]

    @property
    def kernels(self) -> set[str]:
        return set(self.report["kernels"])


def stored(text: str) -> set[tuple[int, ...]]:
    """Dimensions of the results of all instructions outside of fusions: what is inside of one has no memory.

    Arrays of s8 are left out: nothing here is int8, they are bytes of another array, which is found by its own instruction.
    """
    computations, _ = compiled_program.parse(text)
    fused = {re.search(r"\bcalls=%?([\w.-]+)", i.attributes)[1] for body in computations.values() for i in body if i.opcode == "fusion"}
    results = [i.result for name, body in computations.items() if name not in fused for i in body]
    return {tuple(int(n) for n in dims.split(",")) for result in results for dims in re.findall(r"\b(?!s8\b)\w+\[([\d,]+)\]", result)}


@functools.cache
def compiled(folder: pathlib.Path, topology: str, rows: int, *options: str) -> Compiled:
    """One compile of the 7B model's step, a row a device, serves every assertion on it; `options`: flags, or a fault to plant."""
    out = folder / re.sub(r"\W+", "-", " ".join([topology, *options]))
    plain = [option for option in options if option.startswith("--")]
    program = ["tests.compiled_step", *(option for option in options if option not in plain)] if len(plain) < len(options) else ["llada_jax.compile"]
    done = subprocess.run(
        [sys.executable, "-m", *program, "--config=configs/llada_moe.py:variant=7b_a1b", f"--topology={topology}", "--config.model.num_layers=2",
         f"--config.train.batch_size={rows}", f"--text={out}.txt", f"--json={out}.json", *plain],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") > 20 and f"of {hardware.parse(topology).chip.usable:.2f} for a program: fits" in done.stdout
    return Compiled(json.loads(pathlib.Path(f"{out}.json").read_text()), stored(pathlib.Path(f"{out}.txt").read_text()))


# ---- what is never stored ---------------------------------------------------------------------------------------------


def of_vocabulary(dims):
    """Whether the vocabulary is one of the dimensions, or lies in one that joins several: V alone has the prime factor 307."""
    return math.prod(dims) % V == 0


def score_arrays(arrays):
    """Positions by positions, whatever else: attention scores or a mask."""
    return {dims for dims in arrays if not of_vocabulary(dims) and sum(n >= T for n in dims) > 1 and math.prod(dims) >= T * T}


def logit_arrays(arrays, devices):
    """The vocabulary, or a share of it, by rows, be they only as many as a chunk has: by anything but the width of the model or a device's share
    of that."""
    rows = lambda dims: {math.prod(dims) // V, *(math.prod(dims) // n for n in dims if n % 307 == 0)}
    return {dims for dims in arrays if of_vocabulary(dims) and rows(dims).isdisjoint({D, D // devices, *range(chunked.MIN_ROWS)})}


def dense_arrays(arrays):
    """As large as all tokens by all experts by their width, and neither weights nor of the kinds above."""
    weights = lambda dims: len(dims) >= 3 and dims[-3] == E and min(dims[-2:]) <= min(D, F) and max(dims[-2:]) <= max(D, F)
    large = {dims for dims in arrays if not of_vocabulary(dims) and math.prod(dims) >= E * M * min(D, F) and not weights(dims)}
    return large - score_arrays(arrays)


# ---- with the kernels -------------------------------------------------------------------------------------------------

KERNELS = {  # by operation
    "attention": {"attention", "attention_dq", "attention_dkv"},
    "routing": {"route"},
    "grouped_matmul": {f"grouped_swiglu_{part}" for part in ("up", "down", "dhidden", "drows", "dweights")},
    "linear_cross_entropy": {f"linear_cross_entropy{part}" for part in ("", "_drows", "_dweights")},
}
ALL_KERNELS = set().union(*KERNELS.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("steps")


def check(step: Compiled, devices: int) -> None:
    assert step.kernels == ALL_KERNELS
    assert score_arrays(step.arrays) == logit_arrays(step.arrays, devices) == dense_arrays(step.arrays) == set()
    rows = {(M * A, D), (M * A, F)}  # dispatched rows: these alone, of what was looked for, are there
    assert rows <= step.arrays


def check_report(report: dict[str, Any]) -> None:
    """What the entry point says of two layers on four devices, fsdp = 4, against counts by hand."""
    layers, shards, params = 2, 4, 2 * V * D + D + 2 * (4 * D * D + 2 * D + 2 * D // 16 + D * E + 3 * E * D * F)
    memory = report["memory"]
    assert report["fits"] and report["chips"] == 4 and report["parameters"]["total"] == params
    assert memory["weights"] == pytest.approx(4 * params / shards, rel=1e-3), "the norms alone are whole on each device"
    assert memory["moments"] == pytest.approx(2 * memory["weights"], rel=1e-3)
    assert memory["arguments"] == pytest.approx(memory["weights"] + memory["moments"] + memory["batch"], rel=0.01)
    assert memory["aliased"] > 0.99 * (memory["weights"] + memory["moments"]), "the state is updated in place"
    assert sum(memory["estimate"].values()) == pytest.approx(memory["peak"], rel=0.1)
    assert report["kernels"]["attention"] == report["kernels"]["grouped_swiglu_up"] == 2 * layers, "forward, and again for the backward pass"
    assert report["kernels"]["grouped_swiglu_dweights"] == 3 * layers and report["kernels"]["linear_cross_entropy"] == 1
    assert len(report["open_loops"]) == 1, "the loop over a call's steps"
    assert all(row["axes"] in (["fsdp"], []) and row["seconds"] >= 0 and not row["branch"] for row in report["collectives"])
    sent = {kind: sum(row["bytes"] for row in report["collectives"] if row["kind"] == kind) for kind in ("all-gather", "reduce-scatter")}
    experts, attention = 3 * E * D * F * 2, 4 * D * D * 2  # bytes of a layer, bf16
    whole = layers * (experts + attention) + 2 * V * D
    assert 0.99 < sent["reduce-scatter"] / whole < 1.05, "the gradients of each layer and of the head, once; for v6e some are padded"
    gathered = (2 * layers * (experts + 1.5 * attention) + 2 * V * D) / shards  # twice each layer, thrice attention, once the head
    assert sent["all-gather"] == pytest.approx(gathered, rel=0.02)
    tokens, bound = report["rows"] * report["length"], report["bound"]
    flops = 3 * tokens * 2 * (params - 2 * V * D + V * D / 2 - layers * 3 * E * D * F * (1 - A / E) + 2 * layers * T * D)
    assert report["model_flops"] == pytest.approx(flops, rel=1e-3)
    assert bound["overlapped"]["seconds"] <= bound["as_compiled"]["seconds"] <= bound["serial"]["seconds"]
    peak = 4 * hardware.parse(report["topology"]).chip.peak
    assert bound["serial"]["mfu"] == pytest.approx(flops / bound["serial"]["seconds"] / peak, rel=1e-3)
    assert set(report["versions"]) == {"jax", "libtpu"} and re.fullmatch(r"[\d.]+", report["versions"]["libtpu"])


@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_two_layers_run_on_the_kernels(topology, folder):
    """Two layers at full width, a row of 4096 tokens a device; nothing names a kernel."""
    step = compiled(folder, topology, 4)
    check(step, devices=4)
    check_report(step.report)


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("topology, devices, memory", [("v5e:4x8", 32, 16), ("v5p:2x2x4", 16, 95), ("v6e:4x4", 16, 32)])
def test_the_whole_model_runs_on_the_kernels_and_fits(topology, devices, memory, folder):
    """All 16 layers, on a slice whose devices (`memory` GiB each) hold the state and a row of 4096 tokens each."""
    step = compiled(folder, topology, devices, "--config.model.num_layers=16")
    check(step, devices)
    assert step.report["memory"]["peak"] < memory * 2**30


# ---- without one of them: each assertion can fail ---------------------------------------------------------------------

CONTROLS = {  # XLA's own grouped matmul is not dense on TPUs either: for that kind one is planted, where memory holds it
    "attention": ("v5e:2x2", "--config.kernels.attention=reference"), "routing": ("v5e:2x2", "--config.kernels.routing=reference"),
    "grouped_matmul": ("v5p:2x2x1", "dense_experts"), "linear_cross_entropy": ("v5e:2x2", "--config.kernels.linear_cross_entropy=reference"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("operation", CONTROLS)
def test_a_step_without_a_kernel_is_noticed(operation, folder):
    topology, option = CONTROLS[operation]
    step = compiled(folder, topology, 4, option)
    assert step.kernels == ALL_KERNELS - KERNELS[operation]
    found = {"attention": score_arrays(step.arrays), "linear_cross_entropy": logit_arrays(step.arrays, devices=4),
             "grouped_matmul": dense_arrays(step.arrays)}
    assert {name for name, arrays in found.items() if arrays} == {operation} & set(found)
