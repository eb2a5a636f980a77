"""Grouped matrix multiplication by nested loops, experts outside and row tiles inside.

XLA's CPU back end turns `ragged_dot` into a dense product over all experts. Here each expert's weights are sliced once
and the inner loop has a dynamic trip count, so work follows the rows that exist. All arithmetic is float32: XLA's bf16
matmuls are slower than its f32 ones on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LARGE_TILE = 256  # rows; few, so that adding up weight gradients costs little beside the matmuls
UNROLLED = 16  # experts whose loop is unrolled where each has fewer rows than UNROLLED_ROWS in the mean: a decode then copies no weights
UNROLLED_ROWS = 128
SMALL_TILES = ((64, 128), (32, 32), (16, 0))  # rows that do not fill a large tile: the first whose second number is not above the mean group size


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`."""
    return _matmul(*_same_varying(x_RD, w_EDF, group_sizes_E))


def grouped_swiglu(x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_swiglu`."""
    return _swiglu(*_same_varying(x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E))


@jax.custom_vjp
def _matmul(x_RD, w_EDF, group_sizes_E):
    return _matmul_forward(x_RD, w_EDF, group_sizes_E)[0]


def _matmul_forward(x_RD, w_EDF, group_sizes_E):
    def tile(weights, rows):
        return (rows[0] @ weights[0],), ()

    (y_RF,), _ = _sweep(tile, group_sizes_E, (w_EDF,), (x_RD,), widths=(w_EDF.shape[2],))
    return y_RF, (x_RD, w_EDF, group_sizes_E)


def _matmul_backward(saved, dy_RF):
    x_RD, w_EDF, group_sizes_E = saved

    def tile(weights, rows):
        (w_DF,), (x_RD, dy_RF) = weights, rows
        return (_nt(dy_RF, w_DF),), (_tn(x_RD, dy_RF),)

    (dx_RD,), (dw_EDF,) = _sweep(tile, group_sizes_E, (w_EDF,), (x_RD, dy_RF), widths=x_RD.shape[1:], sums=(w_EDF,))
    return dx_RD, dw_EDF, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def _swiglu(x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E):
    def tile(weights, rows):
        (gate_DF, up_DF, down_FD), (x_RD,) = weights, rows
        return ((jax.nn.silu(x_RD @ gate_DF) * (x_RD @ up_DF)) @ down_FD,), ()

    (y_RD,), _ = _sweep(tile, group_sizes_E, (gate_EDF, up_EDF, down_EFD), (x_RD,), widths=x_RD.shape[1:])
    return y_RD


def _swiglu_forward(x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E):
    def tile(weights, rows):
        (gate_DF, up_DF, down_FD), (x_RD,) = weights, rows
        gate_RF, up_RF = x_RD @ gate_DF, x_RD @ up_DF
        return ((jax.nn.silu(gate_RF) * up_RF) @ down_FD, gate_RF, up_RF), ()

    F, D = down_EFD.shape[1:]
    (y_RD, gate_RF, up_RF), _ = _sweep(tile, group_sizes_E, (gate_EDF, up_EDF, down_EFD), (x_RD,), widths=(D, F, F))
    return y_RD, (x_RD, gate_RF, up_RF, gate_EDF, up_EDF, down_EFD, group_sizes_E)


def _swiglu_backward(saved, dy_RD):
    x_RD, gate_RF, up_RF, *weights, group_sizes_E = saved

    def tile(weights, rows):
        (gate_DF, up_DF, down_FD), (x_RD, gate_RF, up_RF, dy_RD) = weights, rows
        sigmoid_RF = jax.nn.sigmoid(gate_RF)
        silu_RF = gate_RF * sigmoid_RF
        dh_RF = _nt(dy_RD, down_FD)
        dgate_RF = dh_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
        dup_RF = dh_RF * silu_RF
        dx_RD = _nt(dgate_RF, gate_DF) + _nt(dup_RF, up_DF)
        return (dx_RD,), (_tn(x_RD, dgate_RF), _tn(x_RD, dup_RF), _tn(silu_RF * up_RF, dy_RD))

    (dx_RD,), sums = _sweep(tile, group_sizes_E, weights, (x_RD, gate_RF, up_RF, dy_RD), widths=x_RD.shape[1:], sums=weights)
    return dx_RD, *sums, None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _nt(a_RF, b_DF):
    """a bᵀ, without a transposed copy."""
    return lax.dot_general(a_RF, b_DF, (((1,), (1,)), ((), ())))


def _tn(a_RD, b_RF):
    """aᵀ b, without a transposed copy."""
    return lax.dot_general(a_RD, b_RF, (((0,), (0,)), ((), ())))


def _sweep(tile: Callable[..., Any], group_sizes_E: jax.Array, weights, rows, widths=(), sums=()):
    """Visit the rows of every expert in tiles: each row exactly once, and no row beyond the last group.

    `tile(weights of the expert, tiles of rows) -> (row results, contributions to per-expert sums)` works in float32.
    Returns arrays (R, width) in the dtype of rows[0], zero where no row was visited, and arrays like `sums`.

    A group takes as many large tiles as it fills, then small ones. The last small tile may overhang: its foreign
    rows enter as zeros and are not written. At the end of the array it is shifted back to fit.
    """
    R, E = rows[0].shape[0], group_sizes_E.shape[0]
    zero = (group_sizes_E[0] * 0).astype(jnp.float32)  # a constant to XLA; under shard_map it varies as the groups do
    zeros = lambda shape, dtype=jnp.float32: jnp.broadcast_to(zero.astype(dtype), shape)
    ends_E = jnp.where(jnp.tril(jnp.ones((E, E), bool)), group_sizes_E, 0).sum(-1)  # XLA:CPU makes a loop of windows of a cumulative sum
    # float32 weights alone: of others, XLA would hold the converted copies of all experts at once
    unrolled = E <= UNROLLED and R < UNROLLED_ROWS * E and not sums and weights[0].dtype == jnp.float32
    # slices at fixed places do not depend on a loop around this, such as a decode's, so XLA takes them out of it
    at = lax.index_in_dim if unrolled else lax.dynamic_index_in_dim
    at = functools.partial(at, keepdims=False)
    small = min(next(size for size, least in SMALL_TILES if least <= R // E), R)

    def expert(e, carry):
        out, totals = carry
        own = [at(w, e) for w in weights]
        own = [w.astype(jnp.float32) for w in (lax.optimization_barrier(own) if unrolled else own)]
        end = ends_E[e]

        def whole(start, carry):
            out, total = carry
            new, part = tile(own, [lax.dynamic_slice_in_dim(a, start, LARGE_TILE).astype(jnp.float32) for a in rows])
            out = [lax.dynamic_update_slice_in_dim(a, n.astype(a.dtype), start, 0) for a, n in zip(out, new, strict=True)]
            return out, [t + p for t, p in zip(total, part, strict=True)]

        def overhanging(start, carry):
            out, total = carry
            first = jnp.minimum(start, R - small)
            index = first + lax.broadcasted_iota(jnp.int32, (small, 1), 0)
            mine = (start <= index) & (index < end)
            new, part = tile(own, [jnp.where(mine, lax.dynamic_slice_in_dim(a, first, small).astype(jnp.float32), 0) for a in rows])
            new = [jnp.where(mine, n.astype(a.dtype), lax.dynamic_slice_in_dim(a, first, small)) for a, n in zip(out, new, strict=True)]
            out = [lax.dynamic_update_slice_in_dim(a, n, first, 0) for a, n in zip(out, new, strict=True)]
            return out, [t + p for t, p in zip(total, part, strict=True)]

        start = end - group_sizes_E[e]
        carry = out, [zeros(t.shape[1:]) for t in totals]
        if R >= 2 * LARGE_TILE and not unrolled:
            count = (end - start) // LARGE_TILE
            carry = lax.fori_loop(0, count, lambda i, carry, start=start: whole(start + i * LARGE_TILE, carry), carry)
            start = start + count * LARGE_TILE
        count = (end - start + small - 1) // small
        out, total = lax.fori_loop(0, count, lambda i, carry: overhanging(start + i * small, carry), carry)
        return out, [lax.dynamic_update_index_in_dim(t, new.astype(t.dtype), e, 0) for t, new in zip(totals, total, strict=True)]

    out = [zeros((R, width), rows[0].dtype) for width in widths]
    carry = out, [zeros(s.shape, s.dtype) for s in sums]
    if not unrolled:
        return lax.fori_loop(0, E, expert, carry)
    for e in range(E):
        carry = expert(e, carry)
    return carry


def _same_varying(*arrays):
    """Inside a checked shard_map, mark replicated weights as varying: the transpose of that sums their gradients."""
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    axes = frozenset().union(*varying)
    return [lax.pcast(a, tuple(axes - own), to="varying") for a, own in zip(arrays, varying, strict=True)]
