"""Named shapes that the kernels are timed at: `CASES[operation][name]()` makes a Case.

tiny       runs anywhere, the interpreter included
training   LLaDA-MoE-7B: rows of 4096 positions, 64 experts of which 8, width 2048, experts of 1024, vocabulary 157,184; bfloat16
full       the same attention, all positions seeing each other, which libraries do without a mask
blocks     the same attention over [x_t ; x_0], 8192 positions in blocks of 32
decode     32 rows against a long cache, all experts, and the whole vocabulary: memory-bound
greedy     the same at temperature 0, without noise
skew       every row to one expert, as masked tokens of one noise level look alike
Letters as in the operations: B batch, T and S positions, N and K heads, H head size, M tokens, E experts, A experts a token, D width,
F expert width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.attention import AttentionSpec, attention, reference
from pallas_kernels.grouped_matmul import grouped_swiglu
from pallas_kernels.linear_confidence import linear_confidence
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.routing import RouterSpec, combine_rows, gather_rows, plan, route_and_plan


class Case(NamedTuple):
    """One operation at one shape. `run(*arrays, implementation=…)` is it; FLOPs and bytes are those of the forward pass, each array moved once."""

    run: Callable[..., Any]
    arrays: tuple[Any, ...]
    differentiable: int  # how many of the arrays, from the first, have gradients; 0: the operation has none
    flops: float
    bytes: float
    libraries: dict[str, Callable[..., Any]]  # others' kernels of the same function, called with the same arrays


def _normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def _size(*arrays: Any) -> float:
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays)))


def attention_case(B: int, T: int, S: int, N: int, K: int, H: int, dtype: Any = jnp.bfloat16, block: int = 0, full: bool = False) -> Case:
    """Two segments a row, or none if `full`; with `block`, T = S positions are a noisy and a clean half of a row in blocks of that size instead."""
    q, k, v = _normal(0, (B, T, N, H), dtype), _normal(1, (B, S, K, H), dtype), _normal(2, (B, S, K, H), dtype)
    if block:
        position = np.broadcast_to(np.arange(T), (B, T))
        spec = AttentionSpec.own(block=jnp.asarray(position % (T // 2) // block), half=jnp.asarray(position // (T // 2)))
    elif full:
        spec = AttentionSpec()
    else:
        segment = lambda length: jnp.asarray(np.broadcast_to(np.arange(length) * 2 // S, (B, length)))
        spec = AttentionSpec(segment_q=segment(T) if T == S else jnp.ones((B, T), jnp.int32), segment_k=segment(S))
    pairs = float(B * T * S) if full else float(reference.visible(spec).sum()) if T * S * B <= 2**28 else B * T * S / 2
    libraries = {} if block else {"jax.nn": functools.partial(_library_attention, backend=None)}
    if not block and dispatch.platform() == "gpu":
        libraries["cuDNN"] = functools.partial(_library_attention, backend="cudnn")
    if not block and dispatch.platform() == "tpu":
        libraries["jax's flash_attention"] = _flash_attention
    run = lambda q, k, v, spec, implementation=None: attention(q, k, v, spec, implementation=implementation)
    return Case(run, (q, k, v, spec), 3, 4 * pairs * N * H, _size(q, k, v, q), libraries)


def _library_attention(q, k, v, spec, backend):
    mask = reference.visible(spec)
    return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None], implementation=backend)


def _flash_attention(q, k, v, spec):
    from jax.experimental.pallas.ops.tpu import flash_attention as library
    heads_first = lambda x: x.swapaxes(1, 2)
    segments = library.SegmentIds(spec.segment_q, spec.segment_k)
    return heads_first(library.flash_attention(*map(heads_first, (q, k, v)), segment_ids=segments, sm_scale=q.shape[-1] ** -0.5))


def routing_case(M: int, E: int, A: int, D: int, dtype: Any = jnp.bfloat16, skew: bool = False) -> Case:
    """From router logits to sorted rows and back: choice, plan, both moves."""
    logits, x = _normal(0, (M, E), jnp.float32), _normal(1, (M, D), dtype)
    logits = jnp.broadcast_to(logits[:1], logits.shape) if skew else logits

    def run(logits, x, implementation=None):
        _, weights, _, order = route_and_plan(logits, None, RouterSpec(A), implementation=implementation)
        rows = jax.lax.optimization_barrier(gather_rows(x, order))  # else XLA gathers while it combines, and no rows are written
        return combine_rows(rows, weights, order)

    return Case(run, (logits, x), 2, 0.0, _size(logits) + (2 + 2 * A) * _size(x), {})


def grouped_matmul_case(M: int, E: int, A: int, D: int, F: int, dtype: Any = jnp.bfloat16, skew: bool = False) -> Case:
    """SwiGLU of M·A sorted rows: experts drawn evenly, or one expert for all rows."""
    choices = np.zeros((M * A, 1)) if skew else np.random.default_rng(0).integers(0, E, (M * A, 1))
    sizes = plan(jnp.asarray(choices, jnp.int32), E).group_sizes_E
    x = _normal(0, (M * A, D), dtype)
    gate, up, down = (_normal(i, shape, dtype, shape[1] ** -0.5) for i, shape in enumerate(((E, D, F), (E, D, F), (E, F, D)), 1))
    used = 1 if skew else min(E, M * A)
    run = lambda *arrays, implementation=None: grouped_swiglu(*arrays, implementation=implementation)
    libraries = {"lax.ragged_dot": functools.partial(_swiglu_of, jax.lax.ragged_dot)}
    if dispatch.platform() == "tpu":
        from jax.experimental.pallas.ops.tpu.megablox import gmm
        libraries["jax's megablox"] = functools.partial(_swiglu_of, functools.partial(gmm, preferred_element_type=dtype))
    if library := _tokamax():
        libraries["tokamax.ragged_dot"] = functools.partial(_swiglu_of, library.ragged_dot)
    return Case(run, (x, gate, up, down, sizes), 4, 6.0 * M * A * D * F, 2 * _size(x) + _size(gate, up, down) * used / E, libraries)


def _swiglu_of(ragged_dot, x, gate, up, down, sizes):
    return ragged_dot(jax.nn.silu(ragged_dot(x, gate, sizes)) * ragged_dot(x, up, sizes), down, sizes)


def _tokamax():
    """The library where it is installed, else None."""
    try:
        import tokamax
    except ImportError:
        return None
    return tokamax


def cross_entropy_case(M: int, D: int, V: int, dtype: Any = jnp.bfloat16) -> Case:
    """Half of the rows are needed."""
    x, w = _normal(0, (M, D), dtype), _normal(1, (D, V), dtype, D**-0.5)
    targets, needed = jax.random.randint(jax.random.key(2), (M,), 0, V), jnp.arange(M) % 2 == 0
    run = lambda *arrays, implementation=None: linear_cross_entropy(*arrays, implementation=implementation)
    libraries = {}
    if library := _tokamax():  # sums over all of its rows: the needed ones alone
        libraries["tokamax"] = lambda x, w, targets, _: library.linear_softmax_cross_entropy_loss(x[::2], targets[::2], w)
    return Case(run, (x, w, targets, needed), 2, M * D * float(V), _size(x, w), libraries)


def confidence_case(M: int, D: int, V: int, dtype: Any = jnp.bfloat16, temperature: float = 1.0) -> Case:
    """With noise from keys where the temperature is not 0, token 0 suppressed."""
    x, w, keys = _normal(0, (M, D), dtype), _normal(1, (D, V), dtype, D**-0.5), jax.random.bits(jax.random.key(2), (M, 2))
    run = lambda x, w, keys, implementation=None: linear_confidence(x, w, temperature=temperature, keys_M2=keys if temperature else None,
                                                                    suppressed=(0,), implementation=implementation)
    return Case(run, (x, w, keys), 0, 2.0 * M * D * V, _size(x, w), {})


def _of(case: Callable[..., Case], *sizes: int, **options: Any) -> Callable[[], Case]:
    return functools.partial(case, *sizes, **options)


F32 = {"dtype": jnp.float32}
CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "attention": {
        "tiny": _of(attention_case, 1, 256, 256, 4, 4, 64, **F32), "training": _of(attention_case, 1, 4096, 4096, 16, 16, 128),
        "full": _of(attention_case, 1, 4096, 4096, 16, 16, 128, full=True),
        "blocks": _of(attention_case, 1, 8192, 8192, 16, 16, 128, block=32), "decode": _of(attention_case, 1, 32, 4096, 16, 16, 128)},
    "routing": {
        "tiny": _of(routing_case, 1024, 16, 4, 256, **F32), "training": _of(routing_case, 8192, 64, 8, 2048),
        "decode": _of(routing_case, 32, 64, 8, 2048), "skew": _of(routing_case, 8192, 64, 8, 2048, skew=True)},
    "grouped_matmul": {
        "tiny": _of(grouped_matmul_case, 1024, 16, 4, 256, 128, **F32), "training": _of(grouped_matmul_case, 8192, 64, 8, 2048, 1024),
        "decode": _of(grouped_matmul_case, 32, 64, 8, 2048, 1024), "skew": _of(grouped_matmul_case, 8192, 64, 8, 2048, 1024, skew=True)},
    "linear_cross_entropy": {
        "tiny": _of(cross_entropy_case, 1024, 256, 4096, **F32), "training": _of(cross_entropy_case, 4096, 2048, 157_184)},
    "linear_confidence": {
        "tiny": _of(confidence_case, 32, 256, 4096, **F32), "decode": _of(confidence_case, 32, 2048, 157_184),
        "greedy": _of(confidence_case, 32, 2048, 157_184, temperature=0.0)},
}
