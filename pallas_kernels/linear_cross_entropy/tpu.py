"""Linear cross-entropy for TPUs in Pallas (Mosaic): three kernels over (row tile, vocabulary tile) that never store logits.

Forward: online log-sum-exp over the vocabulary tiles (arXiv 1805.02867), the target's logit picked in passing. Backward: logits
are computed again from the saved log-sum-exp, once for the rows' gradient and once for the weights', each accumulated in
float32. `count` rows are needed and come first; grid steps beyond their last tile compute and copy nothing, and give zeros.
Letters: R packed rows, a multiple of the row tile; D width; V vocabulary.

Tile sizes are a heuristic of the shapes, not measured; tables override them (`dispatch.tiles`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.numerics import dot

VMEM_LIMIT = 60 * 2**20  # bytes; the default scoped limit is 16 MiB, the smallest VMEM of v5 and later 64 MiB
SEMANTICS = ("parallel", "arbitrary")  # the outer grid axis makes the outputs, the inner one accumulates


def tiles(x_MD: jax.Array, w_DV: jax.Array) -> dict[str, int]:
    """Rows and vocabulary entries of a tile; few rows make one tile, a multiple of 16 (two bfloat16 sublanes)."""
    rows, (D, V) = x_MD.shape[0], w_DV.shape
    size = dispatch.tiles("linear_cross_entropy", f"D{D} V{V}", {"rows": 512, "columns": 512})
    return {"rows": min(size["rows"], max(pl.cdiv(rows, 16), 1) * 16), "columns": min(size["columns"], V)}


def forward(x_RD: jax.Array, w_DV: jax.Array, target_R: jax.Array, count: jax.Array, tile: dict[str, int]) -> tuple[jax.Array, jax.Array]:
    """-log softmax(x w)[target] and log-sum-exp of the first `count` rows, (R,) float32; rows of later tiles are 0."""
    def kernel(busy, x, w, target, nll, logsumexp, top, total, picked):
        i, v = pl.program_id(0), pl.program_id(1)

        @pl.when(v == 0)
        def _():
            nll[...], logsumexp[...] = jnp.zeros_like(nll), jnp.zeros_like(logsumexp)
            top[...], total[...], picked[...] = jnp.full_like(top, -jnp.inf), jnp.zeros_like(total), jnp.zeros_like(picked)

        @pl.when(i < busy[0])
        def _():
            logits, hit = _logits(x[...], w[...]), _ids(v, w.shape[1]) == target[...]
            logits = jnp.where(_ids(v, w.shape[1]) < w_DV.shape[1], logits, -jnp.inf)
            new_top = jnp.maximum(top[...], jnp.max(logits, axis=1, keepdims=True))
            total[...] = total[...] * jnp.exp(top[...] - new_top) + jnp.sum(jnp.exp(logits - new_top), axis=1, keepdims=True)
            picked[...] += jnp.sum(jnp.where(hit, logits, 0.0), axis=1, keepdims=True)
            top[...] = new_top

        @pl.when((i < busy[0]) & (v == pl.num_programs(1) - 1))
        def _():
            logsumexp[...] = top[...] + jnp.log(total[...])
            nll[...] = logsumexp[...] - picked[...]

    rows, columns = tile["rows"], tile["columns"]
    R, (D, V) = x_RD.shape[0], w_DV.shape
    a_row = pl.BlockSpec((rows, 1), lambda i, v, busy: (i, 0))
    out = jax.ShapeDtypeStruct((R, 1), jnp.float32)
    nll, logsumexp = _call(
        kernel, "linear_cross_entropy", (out, out), (R // rows, pl.cdiv(V, columns)),
        [pl.BlockSpec((rows, D), lambda i, v, busy: (_last(i, busy), 0)),
         pl.BlockSpec((D, columns), lambda i, v, busy: (0, jnp.where(i < busy[0], v, pl.cdiv(V, columns) - 1))), a_row],
        (a_row, a_row), [pltpu.VMEM((rows, 1), jnp.float32)] * 3, 2 * R * D * V,
    )(_busy(count, rows), x_RD, w_DV, target_R[:, None])
    return nll[:, 0], logsumexp[:, 0]


def gradients(x_RD: jax.Array, w_DV: jax.Array, target_R: jax.Array, count: jax.Array, tile: dict[str, int],
              logsumexp_R: jax.Array, soft_R: jax.Array, hard_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the rows and of the weights, in their dtypes, when logits have soft softmax(x w) - hard onehot(target)."""
    arguments = x_RD, w_DV, target_R, count, tile, logsumexp_R, soft_R, hard_R
    return rows_gradient(*arguments), weights_gradient(*arguments)


def rows_gradient(x_RD: jax.Array, w_DV: jax.Array, target_R: jax.Array, count: jax.Array, tile: dict[str, int],
                  logsumexp_R: jax.Array, soft_R: jax.Array, hard_R: jax.Array) -> jax.Array:
    """(soft softmax(x w) - hard onehot(target)) wᵀ of each row, (R, D) in the rows' dtype; 0 in tiles beyond `count`."""
    def kernel(busy, x, w, target, logsumexp, soft, hard, dx, total):
        i, v = pl.program_id(0), pl.program_id(1)

        @pl.when(v == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(i < busy[0])
        def _():
            ids, weights = _ids(v, w.shape[1]), w[...]
            d = _logits_gradient(_logits(x[...], weights), ids, target, logsumexp, soft, hard)
            if w_DV.shape[1] % w.shape[1]:  # what lies beyond the vocabulary is undefined, and zero times NaN is not zero
                valid = ids < w_DV.shape[1]
                d, weights = jnp.where(valid, d, 0.0), jnp.where(valid, weights, jnp.zeros_like(weights))
            total[...] += dot(d.astype(x.dtype), weights, 1, 1)

        @pl.when(v == pl.num_programs(1) - 1)
        def _():
            dx[...] = total[...].astype(dx.dtype)

    rows, columns = tile["rows"], tile["columns"]
    (R, D), V = x_RD.shape, w_DV.shape[1]
    a_row = pl.BlockSpec((rows, 1), lambda i, v, busy: (_last(i, busy), 0))
    return _call(
        kernel, "linear_cross_entropy_drows", jax.ShapeDtypeStruct((R, D), x_RD.dtype), (R // rows, pl.cdiv(V, columns)),
        [pl.BlockSpec((rows, D), lambda i, v, busy: (_last(i, busy), 0)),
         pl.BlockSpec((D, columns), lambda i, v, busy: (0, jnp.where(i < busy[0], v, pl.cdiv(V, columns) - 1))), *[a_row] * 4],
        pl.BlockSpec((rows, D), lambda i, v, busy: (i, 0)), [pltpu.VMEM((rows, D), jnp.float32)], 4 * R * D * V,
    )(_busy(count, rows), x_RD, w_DV, *(a[:, None] for a in (target_R, logsumexp_R, soft_R, hard_R)))


def weights_gradient(x_RD: jax.Array, w_DV: jax.Array, target_R: jax.Array, count: jax.Array, tile: dict[str, int],
                     logsumexp_R: jax.Array, soft_R: jax.Array, hard_R: jax.Array) -> jax.Array:
    """The sum over the tiles of needed rows of xᵀ (soft softmax(x w) - hard onehot(target)), (D, V) in the weights' dtype."""
    def kernel(busy, x, w, target, logsumexp, soft, hard, dw, total):
        v, i = pl.program_id(0), pl.program_id(1)

        @pl.when(i == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(i < busy[0])
        def _():
            d = _logits_gradient(_logits(x[...], w[...]), _ids(v, w.shape[1]), target, logsumexp, soft, hard)
            total[...] += dot(x[...], d.astype(x.dtype), 0, 0)

        @pl.when(i == pl.num_programs(1) - 1)
        def _():
            dw[...] = total[...].astype(dw.dtype)

    rows, columns = tile["rows"], tile["columns"]
    R, (D, V) = x_RD.shape[0], w_DV.shape
    a_row = pl.BlockSpec((rows, 1), lambda v, i, busy: (_last(i, busy), 0))
    a_column = pl.BlockSpec((D, columns), lambda v, i, busy: (0, v))
    return _call(
        kernel, "linear_cross_entropy_dweights", jax.ShapeDtypeStruct((D, V), w_DV.dtype), (pl.cdiv(V, columns), R // rows),
        [pl.BlockSpec((rows, D), lambda v, i, busy: (_last(i, busy), 0)), a_column, *[a_row] * 4],
        a_column, [pltpu.VMEM((D, columns), jnp.float32)], 4 * R * D * V,
    )(_busy(count, rows), x_RD, w_DV, *(a[:, None] for a in (target_R, logsumexp_R, soft_R, hard_R)))


def _call(kernel, name, out_shape, grid, in_specs, out_specs, scratch_shapes, flops):
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs,
                                               scratch_shapes=scratch_shapes),
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=0),
        interpret=dispatch.interpret(),
    )


def _busy(count, rows):
    """(1,) int32: tiles that hold needed rows."""
    return ((count + rows - 1) // rows).astype(jnp.int32).reshape(1)


def _last(i, busy):
    """The row tile to read at step i: it stands still beyond the last needed one, so that nothing is copied."""
    return jnp.clip(i, 0, jnp.maximum(busy[0] - 1, 0))


def _ids(v, columns):
    """(1, columns) int32: the vocabulary entries of tile v."""
    return v * columns + lax.broadcasted_iota(jnp.int32, (1, columns), 1)


def _logits(x, w):
    return dot(x, w, 1, 0)


def _logits_gradient(logits, ids, target, logsumexp, soft, hard):
    """float32 gradient of a tile of logits."""
    return soft[...] * jnp.exp(logits - logsumexp[...]) - jnp.where(ids == target[...], hard[...], 0.0)
