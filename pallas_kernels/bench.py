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
import concurrent.futures
import datetime
import itertools
import json
import math
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

SHORTEST, MOST_CALLS = 0.01, 100  # seconds of a measurement; calls in one


def peaks(device: Any) -> tuple[float, float | None]:
    """FLOP/s and bytes/s of a device: from PEAKS; on others a timed float32 matmul, and no figure for memory."""
    for name, figures in sorted(PEAKS.items(), key=lambda item: -len(item[0])):
        if device.device_kind.startswith(name):
            return figures
    return matmul_rate(2048, jnp.float32), None


def matmul_rate(n: int, dtype: Any) -> float:
    """FLOP/s of a product of two matrices of n x n, of random numbers: those of zeros are faster on GPUs."""
    arrays = tuple(jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    return 2 * n**3 / min(rounds({"matmul": (jax.jit(jnp.matmul), arrays)}, 5)["matmul"])


def rounds(programs: dict[str, tuple[Callable[..., Any], tuple]], number: int) -> dict[str, list[float]]:
    """Seconds of a call of each program in each round, all of them once a round.

    What takes less than SHORTEST is called several times in a row and waited for once, so that an accelerator does not wait for its host.
    """
    calls = {}
    for name, (program, arrays) in programs.items():
        jax.block_until_ready(program(*arrays))  # warms up
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        calls[name] = math.ceil(min(SHORTEST / (time.perf_counter() - start), MOST_CALLS))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(number):
        for name, (program, arrays) in programs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                out = program(*arrays)
            jax.block_until_ready(out)
            seconds[name].append((time.perf_counter() - start) / calls[name])
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
    """Programs by contender, and why others have none: what a library cannot do is said, not hidden. They compile side by side."""
    programs, failed = {}, {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = {name: pool.submit(lambda function=function: jax.jit(direction(case, function)).lower(*case.arrays).compile())
                for name, function in contenders(case).items()}
    for name, job in jobs.items():
        try:
            programs[name] = job.result()
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
    """The fastest tile sizes that were found, {operation: {shape: sizes}}, for forward and backward pass together.

    From the defaults on, sweep by sweep, the best change of one or two sizes of a kernel is kept, as long as it gains 3 %: by one for the
    stages, else by a factor of two. The programs of a sweep compile side by side.
    """
    case = CASES[operation][shape]()
    direction = backward if case.differentiable else forward
    asked: dict[tuple[str, str], dict[str, int]] = {}
    Sizes = dict[tuple[str, str], dict[str, int]]

    def compile_with(sizes: Sizes) -> Any:
        with dispatch.tiles_from(sizes, asked):  # a new function each time: jax keeps what it traced of one
            return jax.jit(lambda *arrays: direction(case, case.run)(*arrays)).lower(*case.arrays).compile()

    def timed(trials: list[Sizes]) -> list[tuple[float, Sizes]]:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            programs, results = [pool.submit(compile_with, sizes) for sizes in trials], []
        for program, sizes in zip(programs, trials, strict=True):
            try:
                results.append((min(rounds({"ours": (program.result(), case.arrays)}, number)["ours"]), sizes))
            except Exception as error:  # too large for the chip's memory, or no multiple of what it needs
                if not sizes:
                    raise
                print(f"    {sizes}: {str(error).splitlines()[0][:100]}")
        return results

    (best, chosen), = timed([{}])
    improving = True
    while improving:
        trials = []
        for key, default in asked.items():
            sizes = default | chosen.get(key, {})
            changes = [{name: size} for name in sizes for size in _neighbours(name, sizes[name])]
            changes += [a | b for a, b in itertools.combinations(changes, 2) if a.keys() != b.keys()]
            trials += [chosen | {key: sizes | change} for change in changes]
        least, sizes = min(timed(trials), key=lambda result: result[0], default=(best, chosen))
        improving = least < 0.97 * best
        if improving:
            best, chosen = least, sizes
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (name, at), sizes in chosen.items():
        found.setdefault(name, {})[at] = sizes
    return found


def _neighbours(name: str, size: int) -> list[int]:
    """What a size is changed to."""
    return [new for new in ((size - 1, size + 1) if name == "stages" else (size // 2, size * 2)) if new > 0]


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
    if device.platform != "cpu":
        machine["matmul_flops_per_s"] = matmul_rate(8192, jnp.bfloat16)
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
