"""Interleaved timings of the kernels: `python -m pallas_kernels.bench [operation …] [--shapes=tiny,…] [--out=FILE.json] [--tune]`.

Every contender of a case runs once in each round, so that other work on the machine slows all of them alike: the implementation
that the platform prefers ("ours"), the reference, and the libraries' kernels that import. A line gives the median and the minimum
in ms, what was achieved at the minimum, its share of the roofline (the larger of FLOPs / peak and bytes / bandwidth, over the time), and the
median of contender / ours, above 1 where ours is faster. Backward passes count 2.5 times the FLOPs in attention, twice elsewhere; what is computed
again counts nowhere. Memory is the compiled program's temporaries.

On a CPU the shapes are `tiny` unless others are named, and the peak is that of a float32 matmul timed here. `--tune` tries other tile sizes at
each shape and keeps the fastest in tables/<device>.json, from which `dispatch.tiles` reads them. `--markdown=FILE.json` prints a table.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.shapes import CASES, Case

PEAKS = {  # device kind: FLOP/s in bfloat16, bytes/s of memory (v5e, v5p, v6e: jax-ml.github.io/scaling-book; H100, H200: data sheets, dense)
    "TPU v5 lite": (197e12, 0.81e12), "TPU v5": (459e12, 2.8e12), "TPU v6 lite": (920e12, 1.6e12),
    "NVIDIA H100": (989e12, 3.35e12), "NVIDIA H200": (989e12, 4.8e12),
}


def peaks(device: Any) -> tuple[float, float | None]:
    """FLOP/s and bytes/s of a device: from PEAKS; on others a timed float32 matmul, and no figure for memory."""
    for name, figures in sorted(PEAKS.items(), key=lambda item: -len(item[0])):
        if device.device_kind.startswith(name):
            return figures
    n = 2048
    multiply = jax.jit(jnp.matmul).lower(*[jax.ShapeDtypeStruct((n, n), jnp.float32)] * 2).compile()
    seconds = rounds({"matmul": (multiply, (jnp.ones((n, n)), jnp.ones((n, n))))}, 5)["matmul"]
    return 2 * n**3 / min(seconds), None


def rounds(programs: dict[str, tuple[Callable[..., Any], tuple]], number: int) -> dict[str, list[float]]:
    """Seconds of each program in each round, all of them once a round; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(number + 1):
        for name, (program, arrays) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def forward(_: Case, function: Callable[..., Any]) -> Callable[..., Any]:
    """The arrays to the operation's result."""
    return function


def backward(case: Case, function: Callable[..., Any]) -> Callable[..., Any]:
    """The arrays to the gradients, forward pass included."""
    def total(*arrays):
        return jnp.sum(jnp.sin(function(*arrays).astype(jnp.float32)))
    return jax.grad(total, tuple(range(case.differentiable)))


def contenders(case: Case) -> dict[str, Callable[..., Any]]:
    """Ours first."""
    return {"ours": case.run, "reference": lambda *arrays: case.run(*arrays, implementation="reference"), **case.libraries}


def compiled(case: Case, direction: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Programs by contender, and why others have none: what a library cannot do is said, not hidden."""
    programs, failed = {}, {}
    for name, function in contenders(case).items():
        try:
            programs[name] = jax.jit(direction(case, function)).lower(*case.arrays).compile()
        except Exception as error:
            if name == "ours":
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return programs, failed


def measure(operation: str, shape: str, number: int, peak: tuple[float, float | None]) -> list[dict[str, Any]]:
    """A record for each contender and direction."""
    case, records = CASES[operation][shape](), []
    for direction, factor in ((forward, 1.0), (backward, 3.5 if operation == "attention" else 3.0)):
        if direction is backward and not case.differentiable:
            continue
        programs, failed = compiled(case, direction)
        seconds = rounds({name: (program, case.arrays) for name, program in programs.items()}, number)
        flops, moved = case.flops * factor, case.bytes * (1 if direction is forward else 2)
        bound = max(flops / peak[0], moved / peak[1] if peak[1] else 0.0)
        for name, taken in seconds.items():
            records.append({
                "operation": operation, "shape": shape, "direction": direction.__name__, "contender": name,
                "median_ms": statistics.median(taken) * 1e3, "min_ms": min(taken) * 1e3, "rounds": number,
                "flops_per_s": flops / min(taken), "bytes_per_s": moved / min(taken), "roofline_share": bound / min(taken) if bound else None,
                "temporary_bytes": programs[name].memory_analysis().temp_size_in_bytes,
                "ratio": statistics.median(a / b for a, b in zip(taken, seconds["ours"], strict=True))})
        records += [{"operation": operation, "shape": shape, "direction": direction.__name__, "contender": name, "failed": why}
                    for name, why in failed.items()]
    return records


def line(record: dict[str, Any]) -> str:
    """A record of `measure` as a line: ms, FLOP/s or bytes/s, share of the roofline, MiB of temporaries, contender over ours."""
    start = f"  {record['direction']:9}{record['contender']:20}"
    if "failed" in record:
        return f"{start}  not measured: {record['failed']}"
    rate = f"{record['flops_per_s'] / 1e9:9.1f} GFLOP/s" if record["flops_per_s"] else f"{record['bytes_per_s'] / 1e9:9.2f} GB/s   "
    share = f"{record['roofline_share']:6.1%} of the roofline" if record["roofline_share"] else " " * 22
    return (f"{start}{record['median_ms']:9.3f} ms (min {record['min_ms']:9.3f}) {rate} {share} {record['temporary_bytes'] / 2**20:9.1f} MiB  "
            f"ratio {record['ratio']:.2f}")


def markdown(records: list[dict[str, Any]]) -> str:
    """Rows of a table: ours at every shape, against the reference and the best library."""
    rows = ["| operation | shape | pass | ms | share of roofline | × reference | × best library |", "|---|---|---|---|---|---|---|"]
    for ours in (record for record in records if record["contender"] == "ours"):
        same = lambda r, ours=ours: all(r[key] == ours[key] for key in ("operation", "shape", "direction"))
        rivals = {r["contender"]: r["ratio"] for r in records if "ratio" in r and same(r)}
        libraries = {name: ratio for name, ratio in rivals.items() if name not in ("ours", "reference")}
        best = min(libraries, key=libraries.get, default=None)
        share = f"{ours['roofline_share']:.0%}" if ours["roofline_share"] else ""
        against = (f"{rivals['reference']:.2f}" if "reference" in rivals else "", f"{libraries[best]:.2f} ({best})" if best else "")
        rows.append("| " + " | ".join((ours["operation"], ours["shape"], ours["direction"], f"{ours['median_ms']:.3g}", share, *against)) + " |")
    return "\n".join(rows)


def tune(operation: str, shape: str, number: int) -> dict[str, dict[str, dict[str, int]]]:
    """The fastest tile sizes that were found, {operation: {shape: sizes}}, changing one size at a time by a factor of two; forward and backward."""
    case, found = CASES[operation][shape](), {}
    direction = backward if case.differentiable else forward
    asked: dict[tuple[str, str], dict[str, int]] = {}

    def seconds_with(sizes: dict[tuple[str, str], dict[str, int]]) -> float:
        with dispatch.tiles_from(sizes, asked):
            program = jax.jit(direction(case, case.run)).lower(*case.arrays).compile()
        return min(rounds({"ours": (program, case.arrays)}, number)["ours"])

    best = seconds_with({})
    chosen: dict[tuple[str, str], dict[str, int]] = {}
    for key, default in dict(asked).items():
        for name in default:
            for factor in (2.0, 0.5):
                sizes = {**default, **chosen.get(key, {})}
                trial = {**chosen, key: {**sizes, name: max(int(sizes[name] * factor), 1)}}
                try:
                    taken = seconds_with(trial)
                except Exception as error:  # too large for the chip's memory, or no multiple of what it needs
                    print(f"    {key[0]} {key[1]} {trial[key]}: {str(error).splitlines()[0][:100]}")
                    continue
                if taken < 0.97 * best:
                    best, chosen = taken, trial
    for (name, at), sizes in chosen.items():
        found.setdefault(name, {})[at] = sizes
    return found


def write_table(found: dict[str, dict[str, dict[str, int]]], device_kind: str) -> pathlib.Path:
    """Merge tile sizes into the device's table."""
    path = dispatch.table_path(device_kind)
    table = json.loads(path.read_text()) if path.exists() else {}
    for operation, shapes in found.items():
        table[operation] = table.get(operation, {}) | shapes
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    dispatch.forget_tables()
    return path


def main() -> None:
    """Time what the command line names; the module's docstring explains. Bad arguments exit with status 2 and one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--shapes", default="", help="comma-separated names; all on an accelerator, tiny on a CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="write the records as json")
    parser.add_argument("--tune", action="store_true", help="try other tile sizes and keep the fastest in the device's table")
    parser.add_argument("--markdown", metavar="FILE.json", help="print the records of a file as a table, and stop")
    options = parser.parse_args()
    if options.markdown:
        return print(markdown(json.loads(pathlib.Path(options.markdown).read_text())["records"]))
    unknown = [name for name in options.operations if name not in CASES]
    if unknown or options.rounds < 1:
        parser.error(f"unknown operation {unknown[0]!r}; there are {', '.join(CASES)}" if unknown else f"--rounds={options.rounds} is not at least 1")
    device = jax.devices()[0]
    wanted = options.shapes.split(",") if options.shapes else ["tiny"] if device.platform == "cpu" else []
    known = {shape for shapes in CASES.values() for shape in shapes}
    if set(wanted) - known:
        parser.error(f"unknown shape {sorted(set(wanted) - known)[0]!r}; there are {', '.join(sorted(known))}")
    if options.tune and device.platform == "cpu":
        parser.error("--tune needs an accelerator: the kernels of a CPU have no tile sizes in tables")

    peak = peaks(device)
    machine = {"device": device.device_kind, "cores": os.cpu_count(), "processor": platform.processor() or platform.machine(), "jax": jax.__version__,
               "load": os.getloadavg()[0], "date": datetime.date.today().isoformat(), "peak_flops_per_s": peak[0], "peak_bytes_per_s": peak[1]}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    records = []
    for operation in options.operations or CASES:
        for shape in (shape for shape in CASES[operation] if not wanted or shape in wanted):
            print(f"{operation}, {shape}", flush=True)
            if options.tune:
                print(f"  tile sizes: {write_table(tune(operation, shape, 3), device.device_kind)}", flush=True)
            records += (new := measure(operation, shape, options.rounds, peak))
            print(*map(line, new), sep="\n", flush=True)
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
