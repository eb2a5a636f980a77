"""The training step of LLaDA-MoE-7B, compiled for TPUs that are not here: which kernels it launches, and which arrays it never stores."""

import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from pallas_kernels.linear_cross_entropy import chunked
from tests import compiled_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = compiled_step.settings(2, 4, {}).model
T = M = 4096  # positions of a row and tokens of a device: one row
V, D, F, E, A = MODEL.vocab_size, MODEL.hidden_size, MODEL.expert_size, MODEL.num_experts, MODEL.experts_per_token


class Compiled(NamedTuple):
    """A compiled step: its launches by kernel, the dimensions of every array that gets memory, and bytes a device."""

    kernels: set[str]
    arrays: set[tuple[int, ...]]
    memory: dict[str, float]


def parse(text: str) -> tuple[set[str], set[tuple[int, ...]]]:
    """Kernels launched and dimensions of the results of all instructions outside of fusions: what is inside of one has no memory.

    Arrays of s8 are left out: nothing here is int8, they are bytes of another array, which is found by its own instruction.
    """
    fused = set(re.findall(r"\bfusion\(.*?\bcalls=%([\w.-]+)", text))
    kernels, arrays = set(), set()
    for computation in re.split(r"\n(?=\S)", text):
        if (head := re.match(r"(?:ENTRY )?%([\w.-]+) \(", computation)) and head[1] not in fused:
            for name, result, rest in re.findall(r"^ +(?:ROOT )?%([\w.-]+) = (.*?)( [\w-]+\(.*)$", computation, re.M):
                arrays |= {tuple(int(n) for n in dims.split(",")) for dims in re.findall(r"\b(?!s8\b)\w+\[([\d,]+)\]", result)}
                if 'custom_call_target="tpu_custom_call"' in rest:
                    kernels.add(re.sub(r"\.\d+$", "", name))
    return kernels, arrays


@functools.cache
def compiled(folder: pathlib.Path, topology: str, *options: str) -> Compiled:
    """One compile of tests/compiled_step.py serves every assertion on it."""
    out = folder / f"{'-'.join([topology, *options]).replace(':', '-')}.txt"
    done = subprocess.run([sys.executable, "-m", "tests.compiled_step", topology, str(out), *options], cwd=ROOT,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Compiled(*parse(out.read_text()), json.loads(done.stdout.splitlines()[-1]))


# ---- what is never stored ---------------------------------------------------------------------------------------------


def of_vocabulary(dims):
    """Whether the vocabulary is one of the dimensions, or lies in one that joins several: V alone has the prime factor 307."""
    return math.prod(dims) % V == 0


def score_arrays(arrays):
    """Positions by positions, whatever else: attention scores or a mask."""
    return {dims for dims in arrays if not of_vocabulary(dims) and sum(n >= T for n in dims) > 1 and math.prod(dims) >= T * T}


def logit_arrays(arrays, devices):
    """The vocabulary by rows, be they only as many as a chunk has: by anything but the width of the model or a device's share of it."""
    return {dims for dims in arrays if of_vocabulary(dims) and math.prod(dims) // V not in (D, D // devices, *range(chunked.MIN_ROWS))}


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


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_two_layers_run_on_the_kernels(topology, folder):
    """Two layers at full width, a row of 4096 tokens a device; nothing names a kernel."""
    check(compiled(folder, topology), devices=4)


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("topology, devices, memory", [("v5e:4x8", 32, 16), ("v5p:2x2x4", 16, 95), ("v6e:4x4", 16, 32)])
def test_the_whole_model_runs_on_the_kernels_and_fits(topology, devices, memory, folder):
    """All 16 layers, on a slice whose devices (`memory` GiB each) hold the state and a row of 4096 tokens each."""
    step = compiled(folder, topology, "--layers=16")
    check(step, devices)
    assert step.memory["peak"] < memory * 2**30


# ---- without one of them: each assertion can fail ---------------------------------------------------------------------

CONTROLS = {  # XLA's own grouped matmul is not dense on TPUs either: for that kind one is planted, where memory holds it
    "attention": ("v5e:2x2", "--attention=reference"), "routing": ("v5e:2x2", "--routing=reference"),
    "grouped_matmul": ("v5p:2x2x1", "--dense_experts"), "linear_cross_entropy": ("v5e:2x2", "--linear_cross_entropy=reference"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("operation", CONTROLS)
def test_a_step_without_a_kernel_is_noticed(operation, folder):
    step = compiled(folder, *CONTROLS[operation])
    assert step.kernels == ALL_KERNELS - KERNELS[operation]
    found = {"attention": score_arrays(step.arrays), "linear_cross_entropy": logit_arrays(step.arrays, devices=4),
             "grouped_matmul": dense_arrays(step.arrays)}
    assert {name for name, arrays in found.items() if arrays} == {operation} & set(found)
