"""`python -m llada_jax.compile` without a compiler for accelerators: names of slices, times of collectives, estimates, refusals, advice."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import llada2, llada_moe
from llada_jax import compile as compile_command
from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.config import ConfigError, Mesh
from llada_jax.evaluation import footprint, hardware, roofline
from llada_jax.evaluation.hardware import GIB, Position
from llada_jax.model import count
from tests import named_meshes, tiny_run

# ---- names of slices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cloud, layout, chips", [
    ("v5p-128", "v5p:4x4x4", 64), ("v5p-8", "v5p:2x2x1", 4), ("v5p-32", "v5p:2x2x4", 16), ("v5p-2048", "v5p:8x8x16", 1024),
    ("v4-64", "v4:2x4x4", 32), ("v5e-256", "v5e:16x16", 256), ("v5e-8", "v5e:2x4", 8), ("v6e-256", "v6e:16x16", 256), ("v6e-32", "v6e:4x8", 32),
])  # fmt: skip
def test_both_names_of_a_slice(cloud, layout, chips):
    by_name, by_shape = hardware.parse(cloud), hardware.parse(layout)
    assert by_name == by_shape and by_name.size == chips
    assert str(by_name) == f"{cloud} = {layout} = {chips} chips"


def test_other_names():
    assert hardware.parse("v5litepod-256") == hardware.parse("v5e:16x16")
    assert hardware.parse("v5p:4x4x12").cloud == "" and hardware.parse("v5p:4x4x12").size == 192, "a slice that the cloud has no power of two for"
    two = hardware.parse("v5e-256", 2)
    assert two.size == 512 and str(two) == "2 × v5e-256 = 2 × v5e:16x16 = 512 chips"
    assert hardware.parse("h100:8").size == 8 and str(hardware.parse("h100:8")) == "h100:8 = 8 GPUs"


@pytest.mark.parametrize("text, words", [
    ("v5p-127", "v5p-128 = v5p:4x4x4"), ("v5q-128", "did you mean 'v5p'"), ("v5p", "did you mean 'v5p-128'"), ("v5e:3x5", "v5e-16 = v5e:4x4"),
    ("v5p:2x2", "3 dimension"), ("v6e-200", "v6e-256 = v6e:16x16"), ("h100:12", "h100:16"), ("v5e-0", "v5e-1"), ("", "known"),
])  # fmt: skip
def test_an_unknown_slice_names_the_nearest(text, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        hardware.parse(text)


def test_one_table_of_chips():
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v4": "v4", "NVIDIA H100 80GB HBM3": "h100",
             "NVIDIA H200": "h200"}  # fmt: skip
    assert {kind: hardware.chip_of(kind) for kind in kinds} == {kind: hardware.CHIPS[name] for kind, name in kinds.items()}
    assert hardware.chip_of("cpu") is None


# ---- times of collectives -----------------------------------------------------------------------------------------------


def grid(*shape, island=0):
    return [Position(island, index) for index in np.ndindex(*shape)]


def test_collectives_on_a_torus():
    pod, cube, small = hardware.parse("v5e-256"), hardware.parse("v5p-128"), hardware.parse("v5e:4x4")
    link, S = pod.chip.link_rate, 1e6
    ring = [Position(0, (i, 0)) for i in range(16)]
    line = ring[:8]
    assert hardware.seconds("all-gather", S, ring, pod) == pytest.approx(15 * S / (2 * link)), "a ring: both ways round"
    assert hardware.seconds("all-gather", S, line, pod) == pytest.approx(7 * S / link), "a line: its ends have one neighbour"
    assert hardware.seconds("reduce-scatter", S, ring, pod) == pytest.approx(15 / 16 * S / (2 * link))
    assert hardware.seconds("all-reduce", S, ring, pod) == 2 * hardware.seconds("reduce-scatter", S, ring, pod)
    assert hardware.seconds("all-gather", S, grid(16, 16), pod) == pytest.approx(255 * S / (4 * link)), "two dimensions, four links"
    assert hardware.seconds("all-gather", S, grid(4, 4, 4), cube) == pytest.approx(63 * S / (6 * cube.chip.link_rate))
    # half of the ring's devices send half of their operand through each of the two cuts, one way
    assert hardware.seconds("all-to-all", S, ring, pod) == pytest.approx(8 * S / 2 / (2 * link))
    assert hardware.seconds("all-to-all", S, [Position(0, (i, 0)) for i in range(2)], small) == pytest.approx(S / 2 / link)
    assert hardware.seconds("all-to-all", S, grid(4, 4), small) == pytest.approx(8 * S / 2 / (4 * link)), "four links cross the middle"
    assert hardware.seconds("collective-permute", S, ring[:2], pod) == pytest.approx(S / link)
    assert hardware.seconds("all-reduce", S, ring[:1], pod) == 0


def test_collectives_between_slices_and_on_gpus():
    two, S = hardware.parse("v5e:4x4", 2), 1e6
    pair = [Position(0, (1, 2)), Position(1, (1, 2))]
    assert hardware.seconds("all-reduce", S, pair, two) == pytest.approx(2 * S / 2 / two.chip.network_rate)
    both = grid(4, 4) + grid(4, 4, island=1)
    near = 2 * S * 15 / 16 / (2 * two.chip.link_rate)
    assert hardware.seconds("all-reduce", S, both, two) == pytest.approx(near + 2 * S / 16 / 2 / two.chip.network_rate), "reduced inside first"
    eight = hardware.parse("h100:8")
    places = hardware.positions(eight)
    assert hardware.seconds("all-gather", S, places, eight) == pytest.approx(7 * S / eight.chip.link_rate)
    assert hardware.seconds("all-to-all", S, places, eight) == pytest.approx(7 / 8 * S / eight.chip.link_rate)


# ---- estimates ----------------------------------------------------------------------------------------------------------


def seven_b(batch=256, mesh=Mesh(1, 8, 8, 1), layers=16, **model):
    settings = llada_moe.get_config("variant=7b_a1b")
    settings.model.update(model | {"num_layers": layers})
    settings.train.batch_size = batch
    return dataclasses.replace(config_lib.from_config_dict(settings), mesh=mesh)


PEAKS = json.loads((pathlib.Path(__file__).parent / "data/peaks.json").read_text())


@pytest.mark.parametrize("row", PEAKS["steps"], ids=lambda row: " ".join([row["config"].split(":")[1], *map(str, row["edits"].values())]))
def test_the_estimate_of_memory_is_near_what_the_compiler_reported(row):
    """`memory.peak` of `python -m llada_jax.compile --json` for these steps; the footprint's docstring says within 7 %."""
    file, _, arg = row["config"].partition(":")
    config = {"llada_moe.py": llada_moe, "llada2.py": llada2}[file].get_config(arg)
    config.update_from_flattened_dict(row["edits"])
    assert footprint.of_training(config_lib.from_config_dict(config)).total / GIB == pytest.approx(row["peak"], rel=0.07)


def test_the_peaks_of_all_named_tpu_meshes_are_recorded():
    recorded = {row["config"] for row in PEAKS["steps"] if not row["edits"]}
    assert recorded >= {config for config, _ in named_meshes.TRAINED.values()}


def test_the_state_in_the_estimate_is_exact():
    found = footprint.of_training(seven_b())
    size = count.parameters(seven_b().model)
    assert found.weights == pytest.approx(4 * size.total / 8 - 4 * size.experts / 8 * 7 / 8, rel=1e-3), "fsdp = 8, experts over 64"
    assert found.moments == pytest.approx(2 * found.weights, rel=1e-3)
    layers = found.weights - 2 * 4 * seven_b().model.vocab_size * 2048 / 8
    assert found.gradients == found.copies == pytest.approx(layers / 2, rel=1e-3), "in bfloat16, while the layers are under way"


def test_the_bound_of_the_7b_model():
    """At 100 % of the peak: 10 GFLOP a token by hand, 27.6 µs of a v5p's time with full recomputation."""
    config, topology = seven_b(), hardware.parse("v5p-128")
    found = roofline.expected(config, topology, grid(4, 4, 4))
    tokens = 256 * 4096
    assert found.model_flops / tokens == pytest.approx(9.03e9, rel=0.02)
    assert found.compute / tokens * 64 == pytest.approx(27.6e-6 * 0.92, rel=0.03), "half of the head"
    assert found.mfu(found.compute) == pytest.approx(0.78, abs=0.02)
    assert found.overlapped <= found.as_compiled <= found.serial and found.transfers > found.exposed > 0
    lazy = roofline.expected(dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none")), topology, grid(4, 4, 4))
    assert lazy.compute == pytest.approx(found.model_flops / found.peak) and lazy.compute < found.compute


def test_the_search_ranks_meshes_that_fit():
    config, topology = seven_b(batch=64), hardware.parse("v5e:4x4")
    found = roofline.search(config, topology, grid(4, 4), 16)
    bounds = [c.bound.as_compiled for c in found]
    assert bounds == sorted(bounds) and len({dataclasses.astuple(c.config.mesh) for c in found}) == len(found) > 1
    for c in found:
        mesh, train = c.config.mesh, c.config.train
        assert math.prod(dataclasses.astuple(mesh)) == 16 and c.bytes <= 15.75 * GIB and 64 % mesh.expert == 16 % mesh.tensor == 0
        assert train.batch_size % (mesh.data * mesh.fsdp * mesh.expert * train.accumulate) == 0
        more = dataclasses.replace(c.config, train=dataclasses.replace(train, accumulate=train.accumulate // 2 or 1))
        assert train.accumulate == 1 or footprint.of_training(more).total > 15.75 * GIB, "no more micro-batches than memory asks for"
    with pytest.raises(ConfigError, match=r"no mesh of 4 devices fits \(the least is"):
        roofline.search(seven_b(batch=64), hardware.parse("v5e:2x2"), grid(2, 2), 4)
    with pytest.raises(ConfigError, match=r"train\.batch_size=3 does not split"):
        roofline.search(seven_b(batch=3, num_heads=8, num_kv_heads=1), hardware.parse("v5e:4x4"), grid(4, 4), 16)


# ---- out of memory ------------------------------------------------------------------------------------------------------


def flags(text):
    return dict(flag.removeprefix("--config.").split("=") for flag in text.split() if flag.startswith("--config."))


def test_two_changes_that_would_fit():
    config = dataclasses.replace(seven_b(batch=64, mesh=Mesh(2, 4, 1, 1), layers=4, remat="none"))
    limit = 15.75 * GIB
    assert footprint.of_training(config).total > limit
    text = footprint.out_of_memory_advice(config, limit)
    first, last = text.splitlines()[1], text.splitlines()[-1]
    assert "weights" in first and "activations" in first and f"together {footprint.of_training(config).total / GIB:.2f}" in first
    changes = last.split(": ", 1)[1].split(", or ")
    assert len(changes) == 2 and changes[0] != changes[1]
    for change in changes:
        values = flags(change)
        model = dataclasses.replace(config.model, remat=values.pop("model.remat", config.model.remat))
        train = dataclasses.replace(config.train, accumulate=int(values.pop("train.accumulate", 1)))
        mesh = dataclasses.replace(config.mesh, **{key.removeprefix("mesh."): int(value) for key, value in values.items()})
        total = footprint.of_training(dataclasses.replace(config, model=model, train=train, mesh=mesh)).total
        assert total <= limit and f"({total / GIB:.2f} GiB)" in change


def test_what_the_compiler_asked_for_scales_the_estimate():
    config = seven_b(batch=64, mesh=Mesh(1, 8, 1, 1), layers=4, remat="none")
    now = footprint.of_training(config).total
    scaled = footprint.out_of_memory_advice(config, 1.5 * now, used=2 * now)
    assert f"out of memory: {2 * now / GIB:.2f} GiB wanted, {1.5 * now / GIB:.2f} GiB a device" in scaled
    assert footprint.asked("RESOURCE_EXHAUSTED: … Ran out of memory in memory space hbm. Used 22.50G of 15.75G hbm.") == (22.5 * GIB, 15.75 * GIB)
    other = "the total memory required for HLO temporaries (22.50G) exceeds available HBM (15.75G)."
    assert footprint.asked(other) == (22.5 * GIB, 15.75 * GIB)
    assert footprint.asked("RESOURCE_EXHAUSTED: something else") == (0, 0)
    hopeless = footprint.out_of_memory_advice(seven_b(batch=8, mesh=Mesh(1, 8, 1, 1)), 4 * GIB)
    assert "no change of accumulation, remat, mesh, batch or length fits" in hopeless and "times as many devices" in hopeless


def test_other_errors_pass_unchanged():
    mesh = partitioning.make_mesh(Mesh(data=1), jax.devices()[:1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), footprint.explained(seven_b(), mesh):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


FAKE = """
import sys, jax
from llada_jax import command_line, train
from llada_jax.training import state, step
class Call:
    def lower(self, *_):
        return self
    def compile(self):
        if WHERE == "compile":
            self()
        return self
    def __call__(self, *_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.50G of 15.75G hbm.")
WHERE = sys.argv.pop(1)
step.make_call = lambda *_: Call()
jit = jax.jit
def making_fails(f, **how):
    return Call() if WHERE == "state" and getattr(f, "func", None) is state.create else jit(f, **how)
jax.jit = making_fails
command_line.run(train.main)
"""


@pytest.mark.parametrize("where", ["state", "compile", "first call"])
def test_training_that_is_out_of_memory_says_what_would_fit(where, tmp_path):
    texts = tiny_run.write_texts(tmp_path / "texts")
    done = subprocess.run([sys.executable, "-c", FAKE, where, *tiny_run.arguments(texts, tmp_path / "run", "--config.train.eval_every=0")],
                          capture_output=True, text=True, env=tiny_run.environment())
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "out of memory: 22.50 GiB wanted, 15.75 GiB a device" in done.stdout and "GiB a device, estimated: weights" in done.stdout
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: out of memory; estimated to fit in 15.75 GiB") and error.count("--config.") == 2, error


# ---- the printed report -------------------------------------------------------------------------------------------------


def test_the_printed_memory_adds_up_to_the_peak():
    """Temporary buffers, more than the peak in all, are no part of the sum."""
    sizes = {"weights": 1.0, "moments": 2.0, "average": 0.0, "batch": 0.25, "arguments": 3.25, "temporaries": 30.0, "output": 3.0, "peak": 10.0}
    report = {"mode": "train", "mesh": {"fsdp": 4}, "rows": 8, "length": 16, "micro_batches": 1, "versions": {"jax": "0"}, "date": "today",
              "seconds": 1.0, "fits": True, "memory": {"limit": 15.75 * GIB} | {key: size * GIB for key, size in sizes.items()}}
    lines = compile_command.render(report).splitlines()
    rows = [(float(line.split()[0]), line) for line in lines[lines.index("memory a device, GiB") + 1:] if line.split()[0][0].isdigit()]
    *classes, (arguments, _), (beside, _), (peak, last) = rows
    assert sum(size for size, _ in classes) == arguments == 3.25 and arguments + beside == peak == 10.0
    assert last.endswith("of 15.75 for a program: fits") and "(30.00 GiB" in lines[-1]
    lost = {key: report["memory"][key] for key in ("limit", "weights", "moments", "batch")}
    text = compile_command.render(report | {"fits": False, "memory": lost, "compiler": "RESOURCE_EXHAUSTED: …"})
    assert text.endswith("peak of 15.75 for a program: DOES NOT FIT; RESOURCE_EXHAUSTED: …")


# ---- refusals of the entry point ----------------------------------------------------------------------------------------

BIG = "--config=configs/llada_moe.py:variant=7b_a1b"
CASES = {  # arguments: words of the line
    f"{BIG}": ["--config and --topology are needed"],
    f"{BIG} --topology=v5p-127": ["v5p-127", "v5p-128"],
    f"{BIG} --topology=v5e:2x2 --mode=train --decoder.steps=3": ["--mode=sample"],
    f"{BIG} --topology=v5e:2x2 --mode=draw": ["mode", "train", "sample"],
    f"{BIG} --topology=h100:8": ["pip install", "jax-cuda12-plugin"],
    f"{BIG} --topology=v5e:2x2 --config.mesh.fsdp=3": ["needs 3 devices, there are 4"],
    f"{BIG} --topology=v5e:2x2 --config.train.batch_size=6": ["global batch 6", "use 8"],
    f"{BIG} --topology=v5e:2x2 --config.mesh.expert=4 --config.kernels.expert_dispatch=ragged": ["expert_dispatch=ragged", "on v5e", "capacity"],
    f"{BIG} --topology=v5e:1x1 --num_slices=3 --config.mesh.expert=3 --config.train.batch_size=6": ["num_experts=64", "mesh.expert=3", "1, 2, 4"],
}  # fmt: skip


def test_bad_input():
    installed = {"v5e:2x2": "TPU_LIBRARY_PATH" in os.environ, "h100": importlib.util.find_spec("jax_cuda12_plugin") is not None}
    needs_libtpu = [case for case in CASES if ":2x2 --config" in case or "1x1" in case]
    cases = [case for case in CASES if not (case in needs_libtpu and not installed["v5e:2x2"]) and not ("h100" in case and installed["h100"])]
    for case, done in zip(cases, tiny_run.each("compile", [case.split() for case in cases]), strict=True):
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: "), (case, done.stderr)
        assert all(word in done.stderr.splitlines()[-1] for word in CASES[case]), (case, done.stderr)


@pytest.mark.libtpu
def test_a_step_that_does_not_fit_exits_with_3(tmp_path):
    """A small model, and a batch that no v5e holds."""
    out = tmp_path / "report.json"
    [done] = tiny_run.each("compile", [[
        f"--config={tiny_run.__file__}", "--topology=v5e:2x2", "--config.train.batch_size=8", "--config.model.max_length=32768",
        "--config.data.sequence_length=32768", "--config.model.hidden_size=1024", "--config.model.num_layers=8", "--config.model.scan_layers=True",
        "--config.model.dense_layers=(0,1,2,3,4,5,6,7)", "--config.model.dense_size=8192", f"--json={out}"]])
    report = json.loads(out.read_text())
    assert done.returncode == 3 and "DOES NOT FIT" in done.stdout and not report["fits"], (done.stdout, done.stderr[-2000:])
    assert "--config.model.remat" in report["advice"] and "15.75 GiB" in report["advice"]
