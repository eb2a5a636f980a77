"""Linear cross-entropy for GPUs in Pallas (Triton): a forward kernel that never stores logits, and gradients by chunks of columns.

Forward: a program takes a row tile and a share of the vocabulary, and runs an online log-sum-exp over it (arXiv 1805.02867),
the target's logit picked in passing; the shares are joined in XLA, so that few rows fill a device as well as many. Backward: no
program can hold a tile of the rows' or the weights' gradient, (tile, D) in float32, so a chunk of the vocabulary at a time the
logits are computed again, their gradients are stored in the rows' dtype (R x chunk, 1/50 of float32 logits), and two products
read them: one adds to the rows' gradient, one writes the weights'. `count` rows are needed and come first; programs beyond their
last tile end at once. Letters: R packed rows, a multiple of the row tile; D width; V vocabulary; C columns of a chunk; S shares.

Tile sizes and counts of programs are the fastest of 17 and of 7 that were timed on an H200 (4096 rows, width 2048, 2026-11-26); tables override them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import blocks, dispatch
from pallas_kernels.numerics import LOG2_E

PROGRAMS = 256  # that the forward pass aims at: two for each of 132 multiprocessors; six others, 192 to 1024, took 2 to 59 % longer
CHUNKS = 26  # of the vocabulary in the backward pass: 24 tiles of 256 columns at 157,184, which fill 132 multiprocessors evenly at D 2048


def tiles(x_MD: jax.Array, w_DV: jax.Array) -> dict[str, int]:
    """Rows, columns and depth of a product's tile, warps and pipeline stages. float32, without tensor cores, takes small ones."""
    (M, D), V = x_MD.shape, w_DV.shape[1]
    if jnp.promote_types(x_MD.dtype, w_DV.dtype) == jnp.float32:
        size = {"rows": 64, "columns": 64, "depth": 16, "warps": 4, "stages": 2}
    else:
        size = {"rows": 128, "columns": 256, "depth": 64, "warps": 8, "stages": 3}
    size = dispatch.tiles("linear_cross_entropy", f"D{D} V{V}", size)
    return size | {"rows": blocks.side(M, size["rows"]), "columns": blocks.side(V, size["columns"])}


def forward(x_RD: jax.Array, w_DV: jax.Array, target_R: jax.Array, count: jax.Array, tile: dict[str, int]) -> tuple[jax.Array, jax.Array]:
    """-log softmax(x w)[target] and log-sum-exp of the first `count` rows, (R,) float32; rows of later tiles are 0."""
    rows, columns = tile["rows"], tile["columns"]
    R, V = x_RD.shape[0], w_DV.shape[1]
    all_tiles = pl.cdiv(V, columns)
    share = pl.cdiv(all_tiles, min(pl.cdiv(PROGRAMS, R // rows), all_tiles))  # tiles of a program

    def kernel(busy, x, w, targets, tops, totals, picks):
        i, s = pl.program_id(0), pl.program_id(1)

        @pl.when(i < busy[0])
        def _():
            target = blocks.load(targets, (i * rows, rows))

            def add(v, carry):
                top, total, picked = carry
                logits, ids = _logits(x, w, i * rows, v * columns, tile), _ids(v * columns, columns)
                picked += jnp.sum(jnp.where(ids[None] == target[:, None], logits, 0.0), axis=1)
                logits = logits if V % columns == 0 else jnp.where((ids < V)[None], logits, -jnp.inf)
                new_top = jnp.maximum(top, jnp.max(logits, axis=1))
                total = total * _exp(top - new_top) + jnp.sum(_exp(logits - new_top[:, None]), axis=1)
                return new_top, total, picked
            zeros = jnp.zeros((rows,), jnp.float32)
            last = jnp.minimum((s + 1) * share, all_tiles)
            for out, value in zip((tops, totals, picks), lax.fori_loop(s * share, last, add, (zeros - jnp.inf, zeros, zeros)), strict=True):
                blocks.store(out, value, s, (i * rows, rows))

    out = jax.ShapeDtypeStruct((pl.cdiv(all_tiles, share), R), jnp.float32)
    busy = _busy(count, rows)
    top_SR, total_SR, picked_SR = _call(kernel, "linear_cross_entropy", [out] * 3, (R // rows, out.shape[0]), tile)(busy, x_RD, w_DV, target_R)
    top_R = jnp.max(top_SR, axis=0)
    logsumexp_R = top_R + jnp.log(jnp.sum(total_SR * jnp.exp(top_SR - top_R), axis=0))
    computed_R = jnp.arange(R) < busy * rows  # the rest was never written
    return jnp.where(computed_R, logsumexp_R - jnp.sum(picked_SR, axis=0), 0.0), jnp.where(computed_R, logsumexp_R, 0.0)


def gradients(x_RD: jax.Array, w_DV: jax.Array, target_R: jax.Array, count: jax.Array, tile: dict[str, int],
              logsumexp_R: jax.Array, soft_R: jax.Array, hard_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the rows and of the weights, in their dtypes, when logits have soft softmax(x w) - hard onehot(target)."""
    columns = tile["columns"]
    C = pl.cdiv(pl.cdiv(w_DV.shape[1], columns), CHUNKS) * columns
    busy = _busy(count, tile["rows"])

    def add(c, sums):
        dx_RD, dw_DV = sums
        chunk = jnp.reshape(c, 1)
        d_RC = logits_gradient(x_RD, w_DV, target_R, busy, chunk, C, tile, logsumexp_R, soft_R, hard_R)
        return add_rows_gradient(d_RC, w_DV, busy, chunk, tile, dx_RD), write_weights_gradient(x_RD, d_RC, busy, chunk, tile, dw_DV)

    begin = jnp.zeros(x_RD.shape, jnp.float32), jnp.zeros(w_DV.shape, w_DV.dtype)
    dx_RD, dw_DV = lax.fori_loop(0, pl.cdiv(w_DV.shape[1], C), add, begin)
    return dx_RD.astype(x_RD.dtype), dw_DV


def logits_gradient(x_RD: jax.Array, w_DV: jax.Array, target_R: jax.Array, busy: jax.Array, chunk: jax.Array, C: int, tile: dict[str, int],
                    logsumexp_R: jax.Array, soft_R: jax.Array, hard_R: jax.Array) -> jax.Array:
    """(R, C) in the rows' dtype: of the columns of this chunk. Undefined in tiles beyond the needed rows or the vocabulary."""
    rows, columns = tile["rows"], tile["columns"]
    V = w_DV.shape[1]

    def kernel(busy, chunk, x, w, targets, logsumexps, softs, hards, out):
        i, v = pl.program_id(0), pl.program_id(1)
        row, column = i * rows, chunk[0] * C + v * columns

        @pl.when((i < busy[0]) & (column < V))
        def _():
            target, logsumexp, soft, hard = (blocks.load(ref, (row, rows))[:, None] for ref in (targets, logsumexps, softs, hards))
            ids = _ids(column, columns)[None]
            d = soft * _exp(_logits(x, w, row, column, tile) - logsumexp) - jnp.where(ids == target, hard, 0.0)
            blocks.store(out, d if V % columns == 0 else jnp.where(ids < V, d, 0.0), (row, rows), (v * columns, columns))

    out = jax.ShapeDtypeStruct((x_RD.shape[0], C), x_RD.dtype)
    grid = x_RD.shape[0] // rows, C // columns
    return _call(kernel, "linear_cross_entropy_dlogits", out, grid, tile)(busy, chunk, x_RD, w_DV, target_R, logsumexp_R, soft_R, hard_R)


def add_rows_gradient(d_RC: jax.Array, w_DV: jax.Array, busy: jax.Array, chunk: jax.Array, tile: dict[str, int], dx_RD: jax.Array) -> jax.Array:
    """dx + d wᵀ over the columns of this chunk, in the tiles of needed rows, in place, float32."""
    (R, C), (D, V) = d_RC.shape, w_DV.shape
    rows, wide = tile["rows"], blocks.side(D, tile["columns"])
    deep = min(tile["depth"], tile["columns"])

    def kernel(busy, chunk, d, w, _, out):
        i, j = pl.program_id(0), pl.program_id(1)
        here = (i * rows, rows), (j * wide, wide)

        @pl.when(i < busy[0])
        def _():
            first = chunk[0] * C
            total = blocks.product(blocks.load(out, *here), lambda k: blocks.load(d, here[0], (k, deep)),
                                   lambda k: blocks.load(w, here[1], (first + k, deep)), deep, pl.cdiv(jnp.minimum(V - first, C), deep), 1, 1)
            blocks.store(out, total, *here)

    grid = R // rows, pl.cdiv(D, wide)
    return _call(kernel, "linear_cross_entropy_drows", _like(dx_RD), grid, tile, {4: 0})(busy, chunk, d_RC, w_DV, dx_RD)


def write_weights_gradient(x_RD: jax.Array, d_RC: jax.Array, busy: jax.Array, chunk: jax.Array, tile: dict[str, int], dw_DV: jax.Array) -> jax.Array:
    """xᵀ d over the tiles of needed rows, written in place into this chunk's columns of dw."""
    C, (D, V) = d_RC.shape[1], dw_DV.shape
    rows, columns, high = tile["rows"], tile["columns"], blocks.side(D, tile["rows"])
    deep = min(tile["depth"], rows)

    def kernel(busy, chunk, x, d, _, out):
        j, v = pl.program_id(0), pl.program_id(1)
        column = chunk[0] * C + v * columns

        @pl.when(column < V)
        def _():
            total = blocks.product(jnp.zeros((high, columns), jnp.float32), lambda k: blocks.load(x, (k, deep), (j * high, high)),
                                   lambda k: blocks.load(d, (k, deep), (v * columns, columns)), deep, busy[0] * (rows // deep), 0, 0)
            blocks.store(out, total, (j * high, high), (column, columns))

    grid = pl.cdiv(D, high), C // columns
    return _call(kernel, "linear_cross_entropy_dweights", _like(dw_DV), grid, tile, {4: 0})(busy, chunk, x_RD, d_RC, dw_DV)


def _call(kernel, name, out_shape, grid, tile, aliases=None):
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=out_shape,
        grid=grid,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=tile["warps"], num_stages=tile["stages"]),
        interpret=dispatch.interpret(),
    )


def _like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _busy(count, rows):
    """(1,) int32: tiles that hold needed rows."""
    return ((count + rows - 1) // rows).astype(jnp.int32).reshape(1)


def _ids(column, columns):
    """(columns,) int32: the vocabulary entries of a tile."""
    return blocks.span(column, columns)


def _logits(x, w, row, column, tile):
    """A tile of x w, float32."""
    rows, columns, depth = tile["rows"], tile["columns"], tile["depth"]
    return blocks.product(jnp.zeros((rows, columns), jnp.float32), lambda k: blocks.load(x, (row, rows), (k, depth)),
                          lambda k: blocks.load(w, (k, depth), (column, columns)), depth, pl.cdiv(x.shape[1], depth))


def _exp(a):
    return jnp.exp2(a * LOG2_E)
