"""Compile the training or the sampling step for hardware that is not here: does it fit, what does it launch and send, how fast can it be?

    python -m llada_jax.compile --config=configs/llada_moe.py:variant=7b_a1b --topology=v5p-128 --config.train.batch_size=256
    python -m llada_jax.compile --config=… --topology=v5e:16x16 --num_slices=2 --config.mesh.data=2 --config.mesh.fsdp=-1 --json=report.json
    python -m llada_jax.compile --config=… --topology=v5e:2x2 --mode=sample --decoder.block_length=32
    python -m llada_jax.compile --config=… --topology=h100:8
    python -m llada_jax.compile --config=… --topology=v5e-256 --search

A topology has the cloud's name (v5p-128: TensorCores, two a chip; v5e-256, v6e-256: chips) or its shape (v5p:4x4x4). TPUs need libtpu, GPUs the
CUDA plugin, as packages; no device is needed. The mesh and the batch are those of the config; `--mode=sample` decodes train.batch_size rows of
data.sequence_length slots. Exit status 0 when the step fits, 3 when it does not. What decides is the peak, the most that there is at once: with
libtpu 0.0.42.1 a step whose buffers add up to 17.1 GiB, 13.9 of them at once, compiles for a v5e, where libtpu refuses more than 15.75.

`--search` ranks every mesh (and as many micro-batches as it needs) that closed forms say fits by its bound on the time of a step, compiles the
best three and prints the flags of the best that fits.
"""

import dataclasses
import datetime
import json
import time
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from llada_jax import command_line, partitioning
from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.evaluation import ahead_of_time, compiled_program, footprint, hardware, roofline
from llada_jax.evaluation.hardware import GIB
from llada_jax.model import count
from llada_jax.sampling import presets
from llada_jax.sampling.cache import Cache, NoCache
from llada_jax.sampling.decoder import Decoder

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with an optional preset: configs/x.py:name=value,…")
TOPOLOGY = flags.DEFINE_string("topology", None, "v5p-128, v5p:4x4x4, v5e-256, v6e:16x16, h100:8, …")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of that topology, joined by the data-centre network.", lower_bound=1)
MODE = flags.DEFINE_enum("mode", "train", ["train", "sample"], "Which step to compile.")
JSON = flags.DEFINE_string("json", None, "File for the whole report.")
TEXT = flags.DEFINE_string("text", None, "File for the compiled program's text.")
SEARCH = flags.DEFINE_bool("search", False, "Search mesh and micro-batches; compile the best and print the best that fits.")

DOES_NOT_FIT = 3  # exit status
COMPILED_CANDIDATES = 3  # of a search
MIB = 2**20


def main(chosen: presets.Flags = presets.Flags()) -> int | None:
    """Compile and report as the flags say; the exit status."""
    if CONFIG.value is None or TOPOLOGY.value is None:
        raise ConfigError("--config and --topology are needed; for example --config=configs/llada_moe.py:variant=7b_a1b --topology=v5p-128")
    config = config_lib.from_config_dict(CONFIG.value)
    config = config_lib.with_vocab_size(config, config.model.vocab_size or config.data.vocab_size)
    decoder, cache = None, NoCache()
    if MODE.value == "sample":
        T = config.data.sequence_length
        block = min(32, T)
        _, decoder, cache = chosen.build(defaults={"block_length": block, "gen_length": block})
    elif chosen.given:
        raise ConfigError(f"--{chosen.given} edits sampling; it needs --mode=sample")
    topology = hardware.parse(TOPOLOGY.value, NUM_SLICES.value)
    jax.config.update("jax_platforms", "cpu")  # a device that is here may be at work
    devices = ahead_of_time.devices(topology)
    print(f"{topology} · {devices[0].device_kind} · {count.parameters(config.model).total:,} parameters", flush=True)
    if SEARCH.value:
        if decoder:
            raise ConfigError("--search looks for meshes of the training step; leave out --mode=sample")
        return _search(config, topology, devices)
    config = dataclasses.replace(config, mesh=partitioning.resolved(config.mesh, len(devices)))
    report, text = examine(config, topology, devices, decoder, cache)
    if TEXT.value and text:
        command_line.write_file(TEXT.value, text)
    if JSON.value:
        command_line.write_file(JSON.value, json.dumps(report, indent=2) + "\n")
    print(render(report))
    return None if report["fits"] else DOES_NOT_FIT


def examine(config: config_lib.Config, topology: hardware.Topology, devices: list[jax.Device], decoder: Decoder | None = None,
            cache: Cache = NoCache()) -> tuple[dict[str, Any], str]:
    """(report, text of the compiled program, "" when the compiler ran out of memory). `decoder` None: the training step."""
    B, T = config.train.batch_size, config.data.sequence_length
    started = time.perf_counter()
    traced = ahead_of_time.sampling_step(config, decoder, cache, devices) if decoder else ahead_of_time.training_step(config, devices)
    held = {name: footprint.local_bytes(tree) for name, tree in traced.arguments.items()}
    report: dict[str, Any] = {
        "mode": "sample" if decoder else "train", "topology": topology.layout, "cloud_name": topology.cloud, "slices": topology.slices,
        "chips": topology.size, "mesh": dict(traced.mesh.shape), "parameters": count.parameters(config.model)._asdict(),
        "rows": B, "length": T, "micro_batches": config.train.accumulate, "date": datetime.date.today().isoformat(),
        "versions": ahead_of_time.versions(devices), "config": dataclasses.asdict(config)}
    if decoder:
        report |= {"decoder": {"name": decoder.name, **dataclasses.asdict(decoder)}, "cache": {"name": cache.name, **dataclasses.asdict(cache)}}
    memory: dict[str, Any] = {"limit": topology.chip.usable * GIB * topology.size / len(devices), **held}
    if not decoder:
        memory["estimate"] = footprint.of_training(config)._asdict()
    report["memory"] = memory
    try:
        compiled = ahead_of_time.compile_lowered(traced)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ConfigError(f"the compiler refuses this step: {str(error).splitlines()[0]}") from error
        report |= {"seconds": time.perf_counter() - started, "fits": False, "compiler": str(error).splitlines()[0]}
        if not decoder:
            used, limit = footprint.asked(str(error))
            report["advice"] = footprint.out_of_memory_advice(config, limit or memory["limit"], used).splitlines()[-1]
        return report, ""
    found = compiled.memory_analysis()
    memory |= {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes, "output": found.output_size_in_bytes,
               "aliased": found.alias_size_in_bytes, "peak": found.peak_memory_in_bytes}
    text = compiled.as_text()
    program = compiled_program.read(text, len(devices))
    places = hardware.positions(topology, devices)
    usual = compiled_program.usual(program.collectives)
    bound = roofline.sampling(config, decoder.block_length, topology, usual, places) if decoder else \
        roofline.compiled(config, topology, usual, places)
    report |= {"seconds": time.perf_counter() - started, "fits": memory["peak"] <= memory["limit"], "kernels": program.kernels,
               "collectives": collectives(program.collectives, usual, topology, places, report["mesh"]), "open_loops": program.open_loops,
               "model_flops": bound.model_flops,
               "bound": {"compute": bound.compute, "hbm": bound.memory, "transfers": bound.transfers, "synchronous_transfers": bound.exposed,
                         **{name: {"seconds": t, "mfu": bound.mfu(t)} for name, t in
                            (("overlapped", bound.overlapped), ("as_compiled", bound.as_compiled), ("serial", bound.serial))}}}
    if not report["fits"] and not decoder:
        report["advice"] = footprint.out_of_memory_advice(config, memory["limit"], memory["peak"]).splitlines()[-1]
    return report, text


def collectives(found: tuple[compiled_program.Collective, ...], usual: list[compiled_program.Collective], topology: hardware.Topology,
                places: list[hardware.Position], mesh: dict[str, int]) -> list[dict[str, Any]]:
    """The table: collectives of one kind, mesh axes, timing and branch together, with the largest operand; the usual way first, by bytes."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for c in found:
        axes = compiled_program.axes_of(c.groups, mesh)
        branch = "/".join(f"{name}={label}" for name, label in c.branches)
        key = (c.kind, axes, c.asynchronous, branch)
        row = rows.setdefault(key, {"kind": c.kind, "axes": list(axes), "asynchronous": c.asynchronous, "branch": branch, "usual": c in usual,
                                    "count": 0, "bytes": 0, "seconds": 0.0, "largest": "", "largest_bytes": -1})
        row["count"] += c.count
        row["bytes"] += c.bytes_per_step
        row["seconds"] += roofline.seconds(c, topology, places)
        if c.size > row["largest_bytes"]:
            row["largest"], row["largest_bytes"] = max(c.operand.split(" "), key=compiled_program.size_of), c.size
    return sorted(rows.values(), key=lambda row: (not row["usual"], -row["bytes"]))


def render(report: dict[str, Any]) -> str:
    """The report as lines."""
    memory, unit = report["memory"], "step" if report["mode"] == "train" else "forward"
    tokens = report["rows"] * report["length"]
    versions = " · ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"mesh {' '.join(f'{axis}={size}' for axis, size in report['mesh'].items())} · {report['rows']} rows of {report['length']} tokens, "
             f"{tokens:,} a {unit}" + (f" in {report['micro_batches']} micro-batches" if report["micro_batches"] > 1 else ""),
             f"compiled in {report['seconds']:.0f} s · {report['date']} · {versions}", "", "memory a device, GiB"]
    beside = {"beside": memory["peak"] - memory["arguments"]} if "peak" in memory else {}
    named = {"weights": "weights", "moments": "optimizer moments", "average": "average of the weights", "reference": "reference", "batch": "batch",
             "arguments": "all of these, the arguments; the output takes their place",
             "beside": "at most beside them at once: gradients, activations, gathered weights, …"}
    lines += [f"  {size / GIB:8.2f}  {words}" for key, words in named.items() if (size := (memory | beside).get(key))]
    limit = f"of {memory['limit'] / GIB:.2f} for a program: {'fits' if report['fits'] else 'DOES NOT FIT'}"
    lines.append(f"  {memory['peak'] / GIB:8.2f}  peak, the two together, {limit}" if beside else f"  peak {limit}; {report['compiler']}")
    if beside:
        lines.append(f"  ({memory['temporaries'] / GIB:.2f} GiB is the size of all temporary buffers, those that are not there at the same time too)")
    if "estimate" in memory:
        lines.append(f"  {footprint.describe(footprint.Footprint(**memory['estimate']))}")
    if "advice" in report:
        lines.append(f"  {report['advice']}")
    if "bound" not in report:
        return "\n".join(lines)
    lines += ["", f"kernels, launches a {unit}: " + (", ".join(f"{name} {n}" for name, n in report["kernels"].items()) or "none"), "",
              f"collectives of a {unit}, by a device's operands",
              f"  {'kind':<18}{'mesh axes':<22}{'times':>6}{'MiB':>12}{'ms at least':>13}  {'':<13}largest"]
    for row in report["collectives"]:
        way = "asynchronous" if row["asynchronous"] else "synchronous"
        aside = "" if not row["branch"] else f"  [{row['branch']}{'' if row['usual'] else ', not counted below'}]"
        lines.append(f"  {row['kind']:<18}{'·'.join(row['axes']) or '(one device)':<22}{row['count']:>6}{row['bytes'] / MIB:>12,.1f}"
                     f"{1e3 * row['seconds']:>13,.2f}  {way:<13}{row['largest']}{aside}")
    bound = report["bound"]
    lines += ["", f"model FLOPs a {unit}: {report['model_flops']:.4g}",
              f"bound on a {unit}: compute {_time(bound['compute'])}, HBM {_time(bound['hbm'])}, transfers {_time(bound['transfers'])}, "
              f"of these synchronous {_time(bound['synchronous_transfers'])}"]
    ways = {"overlapped": "all overlapped", "as_compiled": "synchronous transfers apart, as compiled", "serial": "all transfers apart"}
    for name, words in ways.items():
        lines.append(f"  {_time(bound[name]['seconds']):>10}, MFU {bound[name]['mfu']:.3f}, {words}")
    return "\n".join(lines)


def _search(config: config_lib.Config, topology: hardware.Topology, devices: list[jax.Device]) -> int | None:
    """Print the ranking, compile the best few, print the flags of the best that fits."""
    found = roofline.search(config, topology, hardware.positions(topology, devices), len(devices))
    print(f"{len(found)} meshes fit by the estimate; the first {min(10, len(found))} by the bound on a step\n"
          f"  {'data':>5}{'fsdp':>6}{'expert':>7}{'tensor':>7}{'micro-batches':>15}{'GiB a device':>14}{'bound':>12}{'MFU':>7}")
    for c in found[:10]:
        print("  {:>5}{:>6}{:>7}{:>7}".format(*dataclasses.astuple(c.config.mesh)) + f"{c.config.train.accumulate:>15}{c.bytes / GIB:>14.2f}"
              f"{_time(c.bound.as_compiled):>12}{c.bound.mfu(c.bound.as_compiled):>7.3f}", flush=True)
    reports = []
    for c in found[:COMPILED_CANDIDATES]:
        report, _ = examine(c.config, topology, devices)
        reports.append(report | {"flags": c.flags})
        peak = f"peak {report['memory']['peak'] / GIB:.2f} GiB" if "peak" in report["memory"] else report["compiler"]
        bound = f"bound {_time(report['bound']['as_compiled']['seconds'])}, " if "bound" in report else ""
        print(f"compiled {c.flags}: {bound}{peak}, {'fits' if report['fits'] else 'does not fit'}", flush=True)
    if JSON.value:
        command_line.write_file(JSON.value, json.dumps({"compiled": reports}, indent=2) + "\n")
    fitting = [report for report in reports if report["fits"]]
    if not fitting:
        print(f"none of the {len(reports)} best by the estimate fits when it is compiled; take more chips or a smaller batch")
        return DOES_NOT_FIT
    best = min(fitting, key=lambda report: report["bound"]["as_compiled"]["seconds"])
    print(f"\nbest that fits: {best['flags']}\n{render(best)}")
    return None


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def run() -> None:
    """The command line."""
    command_line.run_with_decoder(main)


if __name__ == "__main__":
    run()
