"""Interleaved timings of operations: `python -m pallas_kernels.bench [--devices=N] [--rounds=N] [--reference] grouped_matmul routing`.

Every contender of a case runs once in each round, so that other work on the machine slows all of them alike. Printed:
median and minimum in ms, GFLOP/s of the minimum, and the median of (first contender / this one), above 1 = faster than
the first. `--devices` makes that many CPU devices and gives each the case's tokens (shard_map over tokens).
"""

import argparse
import ctypes
import os
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import grouped_matmul, routing

# name: experts E, experts a token A, width D, expert width F, tokens a device M
MOE_CASES = {
    "64 experts, top 8": (64, 8, 512, 256, 1024),
    "small text model": (16, 4, 160, 128, 4096),
    "8 experts, top 2": (8, 2, 256, 256, 4096),
}


def moe_layer(x_MD, router_DE, gate_EDF, up_EDF, down_EFD, experts_per_token: int, implementation: str):
    """One mixture-of-experts layer body: route, plan, gather, experts, combine; (M, D)."""
    experts_MA, weights_MA, _ = routing.route(x_MD @ router_DE, None, routing.RouterSpec(experts_per_token))
    plan = routing.plan(experts_MA, router_DE.shape[1])
    rows_RD = routing.gather_rows(x_MD, plan)
    rows_RD = grouped_matmul.grouped_swiglu(rows_RD, gate_EDF, up_EDF, down_EFD, plan.group_sizes_E, implementation=implementation)
    return routing.combine_rows(rows_RD, weights_MA, plan)


def dense_layer(x_MD, gate_DF, up_DF, down_FD):
    """A dense SwiGLU whose width is that of the active experts."""
    return (jax.nn.silu(x_MD @ gate_DF) * (x_MD @ up_DF)) @ down_FD


def grouped_matmul_cases(devices: int, reference: bool):
    """(title, contenders) of the whole layer, forward and with gradients, beside a dense layer of equal active width."""
    for title, (E, A, D, F, M) in MOE_CASES.items():
        x_MD, weights = _moe_arrays(E, D, F, M * devices)
        dense = [w[:A] for w in weights[1:]]
        dense = [*(w.transpose(1, 0, 2).reshape(D, A * F) for w in dense[:2]), dense[2].reshape(A * F, D)]
        layers = {"dense": (dense_layer, dense)}
        for name in ("cpu", "reference") if reference else ("cpu",):
            layers[name] = lambda *arrays, name=name, A=A: moe_layer(*arrays, A, name), weights
        flops = 6 * M * devices * A * D * F
        yield f"{title} (E{E} A{A} D{D} F{F} M{M}), forward", {
            name: (_over_tokens(layer, devices, len(arrays)), (x_MD, *arrays), flops) for name, (layer, arrays) in layers.items()}
        yield f"{title}, forward and gradients", {
            name: (_gradients(_over_tokens(layer, devices, len(arrays))), (x_MD, *arrays), 3 * flops)
            for name, (layer, arrays) in layers.items()}


def routing_cases(devices: int, reference: bool):
    """(title, contenders) of everything but the experts: router, plan and the two moves of rows."""
    del reference

    def moves(x_MD, router_DE, experts_per_token):
        experts_MA, weights_MA, _ = routing.route(x_MD @ router_DE, None, routing.RouterSpec(experts_per_token))
        plan = routing.plan(experts_MA, router_DE.shape[1])
        return routing.combine_rows(routing.gather_rows(x_MD, plan), weights_MA, plan)

    def route(x_MD, router_DE, experts_per_token):
        return routing.route(x_MD @ router_DE, None, routing.RouterSpec(experts_per_token))[1]

    def plan(x_MD, router_DE, experts_per_token):
        experts_MA = routing.route(x_MD @ router_DE, None, routing.RouterSpec(experts_per_token))[0]
        return routing.plan(experts_MA, router_DE.shape[1]).token_R

    for title, (E, A, D, F, M) in MOE_CASES.items():
        x_MD, (router_DE, *_) = _moe_arrays(E, D, F, M * devices)
        bound = {f.__name__: _over_tokens(lambda x, r, f=f, A=A: f(x, r, A), devices, 1) for f in (moves, route, plan)}
        bound["moves and gradients"] = _gradients(bound["moves"])
        yield f"{title}, routing", {name: (f, (x_MD, router_DE), 0) for name, f in bound.items()}


OPERATIONS = {"grouped_matmul": grouped_matmul_cases, "routing": routing_cases}


def _moe_arrays(E, D, F, M) -> tuple[jax.Array, list[jax.Array]]:
    shapes = ((M, D), (D, E), (E, D, F), (E, D, F), (E, F, D))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x_MD, *weights = (jax.random.normal(key, shape) * (1 if i == 0 else shape[-2] ** -0.5)
                      for i, (key, shape) in enumerate(zip(keys, shapes, strict=True)))
    return x_MD, weights


def _over_tokens(layer, devices: int, num_weights: int):
    if devices == 1:
        return layer
    mesh = Mesh(jax.devices()[:devices], ("tokens",))
    rows = PartitionSpec("tokens")
    return jax.shard_map(layer, mesh=mesh, in_specs=(rows, *(PartitionSpec(),) * num_weights), out_specs=rows, check_vma=False)


def _gradients(layer):
    return lambda *arrays: jax.grad(lambda *a: jnp.sum(layer(*a) ** 2), argnums=tuple(range(len(arrays))))(*arrays)


def measure(contenders: dict[str, tuple[Any, tuple, float]], rounds: int) -> None:
    """Print a line a contender: {name: (function, arguments, FLOPs)}."""
    compiled = {}
    for name, (function, arrays, _) in contenders.items():
        program = jax.jit(function).lower(*arrays).compile()
        compiled[name] = program, jax.device_put(arrays, program.input_shardings[0])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, (function, arrays) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    first = seconds[next(iter(seconds))]
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, taken, strict=True))
        flops = contenders[name][2]
        rate = f"{flops / min(taken) / 1e9:7.1f} GFLOP/s" if flops else " " * 15
        print(f"  {name:20} {statistics.median(taken) * 1e3:9.2f} ms (min {min(taken) * 1e3:9.2f}) {rate}  ratio {ratio:.2f}", flush=True)


def keep_memory() -> None:
    """Let malloc (glibc) keep freed memory. It maps large buffers afresh in every call otherwise, and then page faults take
    as long as the matmuls; a training loop pays them once, because it runs many steps in one call.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)


def main() -> None:
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="+", choices=OPERATIONS)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--reference", action="store_true", help="time the slow reference too")
    options = parser.parse_args()
    if options.devices > 1:
        jax.config.update("jax_num_cpu_devices", options.devices)
    device = jax.devices()[0]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {jax.device_count()} {device.device_kind} device(s), "
          f"jax {jax.__version__}, load {os.getloadavg()[0]:.1f}")
    for operation in options.operations:
        for title, contenders in OPERATIONS[operation](options.devices, options.reference):
            print(title)
            measure(contenders, options.rounds)


if __name__ == "__main__":
    main()
