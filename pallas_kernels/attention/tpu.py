"""Mosaic TPU kernels of the attention operation: forward, gradient of the queries, gradient of the keys and values.

The grid walks over a list of the (query tile, key tile) pairs that the structure allows, made before the kernel from the smallest
and largest ids of each tile; its length is a dynamic grid bound, so a forbidden tile costs neither compute nor a DMA. In a pair
that is allowed in part the mask is computed from the id vectors of its two tiles; a pair allowed wholly has none.

Scores stand transposed, (keys, queries): maxima and sums then run over sublanes, and what belongs to a query is a row vector.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.attention import structure
from pallas_kernels.attention.structure import FORBIDDEN, UNSEEN
from pallas_kernels.numerics import LOG2_E, dot

LANES = 128
FIRST, LAST, VISIT, MASK = 1, 2, 4, 8  # flags of a list entry
FLAG_BITS = 4
LONGEST_LIST = 1 << 17  # entries; 512 KiB of the 1 MiB of scalar memory


class Plan(NamedTuple):
    """What is static: tile sizes in positions, head size and score scale."""

    tile_q: int
    tile_k: int
    H: int
    scale: float


def plan(q_BTNH: jax.Array, k_BSKH: jax.Array, scale: float, tiles: Mapping[str, int] | None = None) -> Plan:
    """Tiles in multiples of 128, unless given or measured the largest up to 512 that pad by at most an eighth; H rounded up to 128."""
    (T, H), S = q_BTNH.shape[1::2], k_BSKH.shape[1]

    def fitting(length):
        return next((tile for tile in (512, 256) if -length % tile <= length // 8), LANES)

    chosen = dispatch.tiles("attention", f"T{T} S{S} H{H}", {"q": fitting(T), "k": fitting(S)}) | dict(tiles or {})
    return Plan(chosen["q"], chosen["k"], H + -H % LANES, scale)


def worklist(some_BOI: jax.Array, whole_BOI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entries (B·O·I,) int32 in the order of (batch row, outer tile, inner tile), and how many count.

    An entry holds flags and the three indices. An outer tile without any pair has one entry that visits nothing: its outputs are
    to be zeroed. Raises ValueError where the list is longer than scalar memory holds.
    """
    shape = some_BOI.shape
    bits_O, bits_I = _bits(shape)
    if some_BOI.size > LONGEST_LIST:  # up to there the indices take at most 20 of an entry's 31 bits
        raise ValueError(f"attention: {' x '.join(map(str, shape))} pairs of tiles are more than {LONGEST_LIST}; take larger tiles or fewer rows")
    b, o, i = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    listed = some_BOI | (~some_BOI.any(-1, keepdims=True) & (i == 0))
    first = i == jnp.argmax(listed, -1, keepdims=True)
    last = i == shape[2] - 1 - jnp.argmax(listed[..., ::-1], -1, keepdims=True)
    flags = FIRST * first + LAST * last + VISIT * some_BOI + MASK * ~whole_BOI
    entries = flags | i << FLAG_BITS | o << FLAG_BITS + bits_I | b << FLAG_BITS + bits_I + bits_O
    (where,) = jnp.nonzero(listed.reshape(-1), size=listed.size, fill_value=0)
    return entries.reshape(-1)[where], listed.sum(dtype=jnp.int32)


def _bits(shape_BOI):
    return tuple(max(n - 1, 1).bit_length() for n in shape_BOI[1:])


def _indices(entry, shape_BOI):
    """(batch row, outer tile, inner tile) of an entry."""
    bits_O, bits_I = _bits(shape_BOI)
    index = entry >> FLAG_BITS
    return index >> bits_O + bits_I, index >> bits_I & (1 << bits_O) - 1, index & (1 << bits_I) - 1


def _scores(q, k, ids_q, ids_k, plan, masked):
    """(keys, queries) scores in base 2, float32."""
    scores_KQ = dot(k, q, 1, 1) * (plan.scale * LOG2_E)
    if not masked:
        return scores_KQ
    columns = ids_k.T
    allowed = structure.allowed([ids_q[row:row + 1] for row in range(3)], [columns[:, row:row + 1] for row in range(3)])
    return jnp.where(allowed, scores_KQ, FORBIDDEN)


def _visit(entry, step):
    """Runs step(masked) for a pair of tiles, compiled once with and once without a mask."""
    for masked in (True, False):
        pl.when((entry & (VISIT | MASK)) == VISIT + MASK * masked)(functools.partial(step, masked))


def _forward_kernel(work, q_ref, k_ref, v_ref, ids_q_ref, ids_k_ref, o_ref, lse_ref, max_ref, sum_ref, acc_ref, *, plan):
    entry = work[pl.program_id(1)]

    @pl.when(entry & FIRST != 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, UNSEEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(masked):
        v = v_ref[0]
        scores_KQ = _scores(q_ref[0], k_ref[0], ids_q_ref[0], ids_k_ref[0], plan, masked)
        old = max_ref[...]
        new = jnp.maximum(old, scores_KQ.max(0, keepdims=True))
        weights_KQ, shrink = jnp.exp2(scores_KQ - new), jnp.exp2(old - new)
        max_ref[...] = new
        sum_ref[...] = shrink * sum_ref[...] + weights_KQ.sum(0, keepdims=True)
        acc_ref[...] = shrink * acc_ref[...] + dot(v, weights_KQ.astype(v.dtype), 0, 0)

    _visit(entry, step)

    @pl.when(entry & LAST != 0)
    def _():
        total = jnp.where(sum_ref[...] == 0, 1, sum_ref[...])  # a query that sees no key: zeros
        o_ref[0] = (acc_ref[...] / total).T.astype(o_ref.dtype)
        lse_ref[0, 0] = max_ref[...] + jnp.log2(total)


def _gradient(masked, plan, q, k, v, do, lse, delta, ids_q, ids_k):
    """(keys, queries) softmax weights and the gradient of the scores without their scale, float32."""
    weights_KQ = jnp.exp2(_scores(q, k, ids_q, ids_k, plan, masked) - lse)
    return weights_KQ, weights_KQ * (dot(v, do, 1, 1) - delta)


def _dq_kernel(work, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ids_q_ref, ids_k_ref, dq_ref, acc_ref, *, plan):
    entry = work[pl.program_id(1)]

    @pl.when(entry & FIRST != 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(masked):
        k = k_ref[0]
        _, ds_KQ = _gradient(masked, plan, q_ref[0], k, v_ref[0], do_ref[0], lse_ref[0, 0], delta_ref[0, 0], ids_q_ref[0], ids_k_ref[0])
        acc_ref[...] += dot(k, ds_KQ.astype(k.dtype), 0, 0)

    _visit(entry, step)

    @pl.when(entry & LAST != 0)
    def _():
        dq_ref[0] = (acc_ref[...] * plan.scale).T.astype(dq_ref.dtype)


def _dkv_kernel(work, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ids_q_ref, ids_k_ref, dk_ref, dv_ref, acc_k_ref, acc_v_ref, *, plan):
    """The query heads of a key/value head follow each other, innermost, into one sum."""
    entry, g, last_g = work[pl.program_id(1)], pl.program_id(2), pl.num_programs(2) - 1

    @pl.when((entry & FIRST != 0) & (g == 0))
    def _():
        acc_k_ref[...] = jnp.zeros_like(acc_k_ref)
        acc_v_ref[...] = jnp.zeros_like(acc_v_ref)

    def step(masked):
        q, do = q_ref[0], do_ref[0]
        weights_KQ, ds_KQ = _gradient(masked, plan, q, k_ref[0], v_ref[0], do, lse_ref[0, 0], delta_ref[0, 0], ids_q_ref[0], ids_k_ref[0])
        acc_v_ref[...] += dot(weights_KQ.astype(do.dtype), do, 1, 0)
        acc_k_ref[...] += dot(ds_KQ.astype(q.dtype), q, 1, 0)

    _visit(entry, step)

    @pl.when((entry & LAST != 0) & (g == last_g))
    def _():
        dk_ref[0] = (acc_k_ref[...] * plan.scale).astype(dk_ref.dtype)
        dv_ref[0] = acc_v_ref[...].astype(dv_ref.dtype)


def _call(kernel, name, plan, arrays, layouts, outputs, scratch, ids_q, ids_k, G, keys_outside=False):
    """One pallas_call over the list. `layouts` names what each of `arrays` and `outputs` is tiled by: "q", "k" or "row" (per query).

    The list goes through the key tiles of each query tile and the grid is (query heads, entries); with `keys_outside` through the
    query tiles of each key tile, and the grid is (key/value heads, entries, G).
    """
    pairs = structure.tile_map(ids_q, ids_k, plan.tile_q, plan.tile_k)
    some, whole = (jnp.swapaxes(x, 1, 2) for x in pairs) if keys_outside else pairs
    work, count = worklist(some, whole)
    K = arrays[1].shape[-1] // plan.H
    grid = (K, count, G) if keys_outside else (K * G, count)

    def at(*position):
        """Batch row, query tile, key tile, query head and key/value head of a grid position."""
        head, step, *g, work = position
        b, o, i = _indices(work[step], some.shape)
        if keys_outside:
            return b, i, o, head * G + g[0], head
        return b, o, i, head, head // G

    def block(layout):
        tile, pick = {
            "q": ((1, plan.tile_q, plan.H), lambda b, q, k, n, kv: (b, q, n)),
            "k": ((1, plan.tile_k, plan.H), lambda b, q, k, n, kv: (b, k, kv)),
            "row": ((1, 1, 1, plan.tile_q), lambda b, q, k, n, kv: (b, n, 0, q)),
            "ids_q": ((1, 3, plan.tile_q), lambda b, q, k, n, kv: (b, 0, q)),
            "ids_k": ((1, 3, plan.tile_k), lambda b, q, k, n, kv: (b, 0, k)),
        }[layout]
        return pl.BlockSpec(tile, lambda *position: pick(*at(*position)))

    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid,
            in_specs=[block(layout) for layout in (*layouts[0], "ids_q", "ids_k")],
            out_specs=[block(layout) for layout in layouts[1]],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", *("arbitrary",) * (len(grid) - 1))),
        interpret=dispatch.interpret(),
        name=name,
    )(work, *arrays, ids_q, ids_k)


def forward(q_BTX: jax.Array, k_BSX: jax.Array, v_BSX: jax.Array, ids_q: jax.Array, ids_k: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Output like q and the base-2 log-sum-exp (B, N, 1, T). X is heads · H, H a multiple of 128; T and S are multiples of the tiles."""
    B, T, X = q_BTX.shape
    N, G = X // plan.H, X // k_BSX.shape[-1]
    outputs = [jax.ShapeDtypeStruct(q_BTX.shape, q_BTX.dtype), jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)]
    scratch = [(1, plan.tile_q), (1, plan.tile_q), (plan.H, plan.tile_q)]
    o, lse = _call(_forward_kernel, "attention", plan, (q_BTX, k_BSX, v_BSX), (("q", "k", "k"), ("q", "row")), outputs, scratch, ids_q, ids_k, G)
    return o, lse


def backward(q_BTX, k_BSX, v_BSX, do_BTX, lse, delta, ids_q, ids_k, plan: Plan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v; the weights are made again from the log-sum-exp. delta (B, N, 1, T) is Σ_H do · o."""
    G = q_BTX.shape[-1] // k_BSX.shape[-1]
    arrays, layouts = (q_BTX, k_BSX, v_BSX, do_BTX, lse, delta), ("q", "k", "k", "q", "row", "row")
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BTX, k_BSX, v_BSX)]
    (dq,) = _call(_dq_kernel, "attention_dq", plan, arrays, (layouts, ("q",)), outputs[:1], [(plan.H, plan.tile_q)], ids_q, ids_k, G)
    dk, dv = _call(_dkv_kernel, "attention_dkv", plan, arrays, (layouts, ("k", "k")), outputs[1:], [(plan.tile_k, plan.H)] * 2, ids_q, ids_k, G,
                   keys_outside=True)
    return dq, dk, dv
