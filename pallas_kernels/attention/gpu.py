"""Triton GPU kernels of the attention operation: forward, gradient of the queries, gradient of the keys and values.

A program owns one tile of queries (of keys, for their gradient) of one head and walks over the tiles of the other side that the structure
lets it meet, so that a forbidden tile is neither read nor computed: first a list, whose mask is computed from the ids, then one run of
neighbours that are allowed wholly, which have no mask, and whose addresses need no list. Both are made before the kernel and lie in global
memory. Programs with much to do start first, so that short ones fill the end.

A few queries against many keys are too few programs to fill a device: their lists are then split among several programs, whose
outputs are joined by their log-sum-exp (flash-decoding).

Tiles, warps and stages in bfloat16 are the fastest of 8 or 9 that were timed for each kernel on an H200, in the forward pass within 1 % of it (4096
positions, heads of 128, all keys seen, 2026-11-26), after a first choice among 67. In the forward pass two programs share a multiprocessor: one
multiplies while the other takes exponentials. With runs in place of a list the best tiles of the gradients' kernels are others, 12 and 8 % faster.
Rescaling the sums only where a score exceeds their scale by far is 4 % faster forward, but then a row's last bits depend on other rows of its tile.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import dispatch
from pallas_kernels.attention import structure
from pallas_kernels.attention.structure import UNSEEN
from pallas_kernels.numerics import LOG2_E, dot

SMALLEST = 16  # side of the smallest tile that the tensor cores multiply
LARGEST_HEAD = 256
HEADER = 4  # numbers in front of a list
PROGRAMS = 256  # that fill a device: two for each of the multiprocessors of an H100
SHORTEST_SPLIT = 4  # tiles in a split list


class Tile(NamedTuple):
    """Of a kernel: what a program owns on its side, the step of its walk over the other side, warps, stages of the pipeline."""

    own: int
    step: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """What is static: what the numbers of positions are padded to multiples of, the kernels' tiles, head size, score scale."""

    tile_q: int
    tile_k: int
    forward: Tile
    dq: Tile
    dkv: Tile
    H: int
    scale: float


def plan(q_BTNH: jax.Array, k_BSKH: jax.Array, scale: float, tiles: Mapping[str, int] | None = None) -> Plan:
    """Tiles and head size are powers of two. Raises ValueError for a head that the registers do not hold.

    Float32 is multiplied without tensor cores, which takes more registers: smaller tiles.
    """
    (T, H), S, exact = q_BTNH.shape[1::2], k_BSKH.shape[1], q_BTNH.dtype == jnp.float32
    if H > LARGEST_HEAD:
        raise ValueError(f"attention: the GPU kernels hold heads of up to {LARGEST_HEAD}, not {H}; take 'reference'")

    def fitting(length, largest):
        if length <= largest:
            return max(pl.next_power_of_2(length), SMALLEST)
        return largest if -length % largest <= length // 8 else largest // 2

    def tile(name, mine, other, own, step, warps, stages):
        own, step, warps = (32, 32, 8) if exact else (64, 32, 8) if H > 128 else (own, step, warps)
        default = Tile(fitting(mine, own), fitting(other, step), warps, stages)
        return Tile(**dispatch.tiles(name, f"T{T} S{S} H{H}", default._asdict()) | dict(tiles or {}))

    forward = tile("attention", T, S, 128, 64, 4, 2)
    dq, dkv = tile("attention_dq", T, S, 128, 64, 8, 3), tile("attention_dkv", S, T, 128, 64, 8, 3)
    tile_q, tile_k = max(forward.own, dq.own, dkv.step), max(forward.step, dq.step, dkv.own)
    return Plan(tile_q, tile_k, forward, dq, dkv, max(pl.next_power_of_2(H), SMALLEST), scale)


def worklists(some_BOI: jax.Array, whole_BOI: jax.Array) -> jax.Array:
    """(B, O, 4 + I) int32, a row a program, the longest walk first: the tile it owns, the lengths of list and run, the run's first tile, the list.

    The run is the longest of whole tiles; the list holds all others that may be met, in order, then what is not to be.
    """
    index = jnp.arange(some_BOI.shape[-1], dtype=jnp.int32)
    upto = index - lax.cummax(jnp.where(whole_BOI, -1, index), axis=2)  # whole tiles in a row that end here
    last, run = jnp.argmax(upto, -1, keepdims=True).astype(jnp.int32), upto.max(-1, keepdims=True)
    first = last - run + 1
    listed = some_BOI & ((index < first) | (index > last))
    listing = listed.sum(-1, keepdims=True, dtype=jnp.int32)
    owner = jnp.argsort(-(listing + run)[..., 0], axis=-1).astype(jnp.int32)[..., None]
    rows = jnp.concatenate([listing, run, first, jnp.argsort(~listed, axis=-1).astype(jnp.int32)], -1)
    return jnp.concatenate([owner, jnp.take_along_axis(rows, owner, 1)], -1)


def _walk(work_ref, step, carry, split=0, splits=1):
    """carry = step(masked, tile, carry) over the program's list and run, or over one of `splits` parts of both together."""
    listing, run, first = work_ref[1], work_ref[2], work_ref[3]
    begin, end = (lax.div((listing + run) * part, splits) for part in (split, split + 1))
    carry = lax.fori_loop(begin, jnp.minimum(end, listing), lambda i, carry: step(True, work_ref[HEADER + i], carry), carry)
    shift = first - listing
    return lax.fori_loop(jnp.maximum(begin, listing) + shift, end + shift, lambda tile, carry: step(False, tile, carry), carry)


def _scores(q, k, ids_q, ids_k, plan, masked, keys_first=False):
    """What times `_factor` gives scores in base 2, float32: (queries, keys), or (keys, queries) with `keys_first`; -inf where forbidden.

    Ids are three loaders, read where there is a mask.
    """
    scores = dot(k, q, 1, 1) if keys_first else dot(q, k, 1, 1)
    scores = scores if plan.scale > 0 else scores * plan.scale
    if not masked:
        return scores
    row, column = (lambda x: x[None, :]), (lambda x: x[:, None])
    of_q, of_k = (row, column) if keys_first else (column, row)
    return jnp.where(structure.allowed([of_q(x) for x in ids_q()], [of_k(x) for x in ids_k()]), scores, -jnp.inf)


def _factor(plan):
    """Positive, so that the largest score stays the largest; multiplied while subtracting, which is one instruction."""
    return LOG2_E * (plan.scale if plan.scale > 0 else 1)


def _ids(ref, positions):
    return lambda: [ref[row, positions] for row in range(3)]


def _forward_kernel(work_ref, q_ref, k_ref, v_ref, ids_q_ref, ids_k_ref, o_ref, lse_ref, *, plan):
    own, step = plan.forward[:2]
    rows, factor = pl.ds(work_ref[0] * own, own), _factor(plan)
    q = q_ref[rows, :]

    def visit(masked, tile, carry):
        acc, old, total = carry
        keys = pl.ds(tile * step, step)
        scores_QK = _scores(q, k_ref[keys, :], _ids(ids_q_ref, rows), _ids(ids_k_ref, keys), plan, masked)
        new = jnp.maximum(old, scores_QK.max(1) * factor)
        weights_QK, shrink = jnp.exp2(scores_QK * factor - new[:, None]), jnp.exp2(old - new)
        v = v_ref[keys, :]
        return acc * shrink[:, None] + dot(weights_QK.astype(v.dtype), v), new, total * shrink + weights_QK.sum(1)

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(own, UNSEEN, jnp.float32), jnp.zeros(own, jnp.float32)
    acc, largest, total = _walk(work_ref, visit, nothing, pl.program_id(3), pl.num_programs(3))
    total = jnp.where(total == 0, 1, total)  # a query that sees no key: zeros
    o_ref[rows, :] = (acc / total[:, None]).astype(o_ref.dtype)
    lse_ref[0, 0, rows] = largest + jnp.log2(total)


def _dq_kernel(work_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ids_q_ref, ids_k_ref, dq_ref, *, plan):
    own, step = plan.dq[:2]
    rows, factor = pl.ds(work_ref[0] * own, own), _factor(plan)
    q, do, lse, delta = q_ref[rows, :], do_ref[rows, :], lse_ref[0, 0, rows], delta_ref[0, 0, rows]

    def visit(masked, tile, dq):
        keys = pl.ds(tile * step, step)
        k = k_ref[keys, :]
        weights_QK = jnp.exp2(_scores(q, k, _ids(ids_q_ref, rows), _ids(ids_k_ref, keys), plan, masked) * factor - lse[:, None])
        ds_QK = weights_QK * (dot(do, v_ref[keys, :], 1, 1) - delta[:, None])
        return dq + dot(ds_QK.astype(k.dtype), k)

    dq = _walk(work_ref, visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[rows, :] = (dq * plan.scale).astype(dq_ref.dtype)


def _dkv_kernel(work_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ids_q_ref, ids_k_ref, dk_ref, dv_ref, *, plan):
    """The query heads of a key/value head follow each other into one sum."""
    own, step = plan.dkv[:2]
    keys, factor = pl.ds(work_ref[0] * own, own), _factor(plan)
    k, v = k_ref[keys, :], v_ref[keys, :]

    def head(g, carry):
        columns = pl.ds(g * plan.H, plan.H)

        def visit(masked, tile, carry):
            dk, dv = carry
            rows = pl.ds(tile * step, step)
            q, do = q_ref[rows, columns], do_ref[rows, columns]
            scores_KQ = _scores(q, k, _ids(ids_q_ref, rows), _ids(ids_k_ref, keys), plan, masked, keys_first=True)
            weights_KQ = jnp.exp2(scores_KQ * factor - lse_ref[g, 0, rows][None, :])
            dv = dv + dot(weights_KQ.astype(do.dtype), do)
            ds_KQ = weights_KQ * (dot(v, do, 1, 1) - delta_ref[g, 0, rows][None, :])
            return dk + dot(ds_KQ.astype(q.dtype), q), dv

        return _walk(work_ref, visit, carry)

    dk, dv = lax.fori_loop(0, lse_ref.shape[0], head, (jnp.zeros(k.shape, jnp.float32),) * 2)
    dk_ref[keys, :] = (dk * plan.scale).astype(dk_ref.dtype)
    dv_ref[keys, :] = dv.astype(dv_ref.dtype)


def _call(kernel, plan, tile, work, arrays, layouts, outputs, ids_q, ids_k, g=1, splits=1):
    """One pallas_call over (rows of `work`, heads, batch rows, splits); a leading axis of splits joins the outputs.

    `layouts` names what each of `arrays` and `outputs` holds per head: "q", "k" or "row" (per query). A program has `g` query heads.
    """
    B, O, width = work.shape
    T, S, N = ids_q.shape[-1], ids_k.shape[-1], arrays[0].shape[-1] // plan.H
    G = N * plan.H // arrays[1].shape[-1]
    blocks = {
        "q": ((None, T, g * plan.H), lambda n, b: (b, 0, n)),
        "k": ((None, S, plan.H), lambda n, b: (b, 0, n * g // G)),
        "row": ((None, g, 1, T), lambda n, b: (b, n, 0, 0)),
        "ids_q": ((None, 3, T), lambda n, b: (b, 0, 0)),
        "ids_k": ((None, 3, S), lambda n, b: (b, 0, 0)),
    }

    def read(layout):
        shape, pick = blocks[layout]
        return pl.BlockSpec(shape, lambda o, n, b, s: pick(n, b))

    def written(layout):
        shape, pick = blocks[layout]
        return pl.BlockSpec((None, *shape), lambda o, n, b, s: (s, *pick(n, b)))

    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=(O, N // g, B, splits),
        in_specs=[pl.BlockSpec((None, None, width), lambda o, n, b, s: (b, o, 0)), *map(read, (*layouts[0], "ids_q", "ids_k"))],
        out_specs=[*map(written, layouts[1])],
        out_shape=[jax.ShapeDtypeStruct((splits, *x.shape), x.dtype) for x in outputs],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=dispatch.interpret(),
    )(work, *arrays, ids_q, ids_k)


def _work(ids_q, ids_k, tile_q, tile_k, keys_outside=False):
    pairs = structure.tile_map(ids_q, ids_k, tile_q, tile_k)
    return worklists(*(jnp.swapaxes(x, 1, 2) for x in pairs) if keys_outside else pairs)


def forward(q_BTX: jax.Array, k_BSX: jax.Array, v_BSX: jax.Array, ids_q: jax.Array, ids_k: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Output like q and the base-2 log-sum-exp (B, N, 1, T). X is heads · plan.H; T and S are multiples of the tiles."""
    B, T, X = q_BTX.shape
    N, (own, step) = X // plan.H, plan.forward[:2]
    splits = max(1, min(PROGRAMS // (B * N * T // own), k_BSX.shape[1] // (step * SHORTEST_SPLIT)))
    outputs = [jax.ShapeDtypeStruct((B, T, X), q_BTX.dtype if splits == 1 else jnp.float32), jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)]
    work = _work(ids_q, ids_k, own, step)
    arrays, layouts = (q_BTX, k_BSX, v_BSX), (("q", "k", "k"), ("q", "row"))
    o_sBTX, lse_sBN1T = _call(_forward_kernel, plan, plan.forward, work, arrays, layouts, outputs, ids_q, ids_k, splits=splits)
    if splits == 1:
        return o_sBTX[0], lse_sBN1T[0]
    largest = lse_sBN1T.max(0)
    weights_sBN1T = jnp.exp2(lse_sBN1T - largest)
    total = weights_sBN1T.sum(0)
    shares_sBTN1 = (weights_sBN1T / total).transpose(0, 1, 4, 2, 3)
    o_BTNH = (shares_sBTN1 * o_sBTX.reshape(splits, B, T, N, plan.H)).sum(0)
    return o_BTNH.astype(q_BTX.dtype).reshape(B, T, X), largest + jnp.log2(total)


def backward(q_BTX, k_BSX, v_BSX, do_BTX, lse, delta, ids_q, ids_k, plan: Plan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v; the weights are made again from the log-sum-exp. delta (B, N, 1, T) is Σ_H do · o."""
    arrays, layouts = (q_BTX, k_BSX, v_BSX, do_BTX, lse, delta), ("q", "k", "k", "q", "row", "row")
    work = _work(ids_q, ids_k, *plan.dq[:2])
    (dq,) = _call(_dq_kernel, plan, plan.dq, work, arrays, (layouts, ("q",)), [q_BTX], ids_q, ids_k)
    work = _work(ids_q, ids_k, plan.dkv.step, plan.dkv.own, keys_outside=True)
    g = q_BTX.shape[-1] // k_BSX.shape[-1]
    dk, dv = _call(_dkv_kernel, plan, plan.dkv, work, arrays, (layouts, ("k", "k")), [k_BSX, v_BSX], ids_q, ids_k, g)
    return dq[0], dk[0], dv[0]
