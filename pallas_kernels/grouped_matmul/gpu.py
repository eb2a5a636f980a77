"""Grouped matrix multiplication for GPUs in Pallas (Triton): two kernels that take the rows of a group a tile at a time.

Rows are sorted by group. A tile of rows starts where its group does, or a whole number of tiles later, so that it belongs to one
group alone: a GPU copies from any row on. Which rows a program has stands in a short list, computed in XLA and as long as its static
bound. Letters: R rows, K contracted, N columns, E groups.

Tile sizes in bfloat16 are the fastest of 5 to 37 for each kernel that were timed on an H200 (65,536 rows, 64 groups, 2048 x 1024, 2026-11-26);
tables override them (`dispatch.tiles`). Inside shard_map the kernels need check_vma=False.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import blocks, dispatch
from pallas_kernels.numerics import dot, split


class RowTiles(NamedTuple):
    """Rows [start, end) of a group; the rows beyond all groups are group E, and what is left of the list has no rows. All (tiles,) int32."""

    groups: jax.Array
    starts: jax.Array
    ends: jax.Array


def row_tiles(sizes: jax.Array, rows: int, tile: int) -> RowTiles:
    """The rows of groups of `sizes` (E,), in order, at most `tile` at a time."""
    E = sizes.shape[0]
    sizes = sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, rows - sizes.sum())
    ends, tiles = jnp.cumsum(sizes), pl.cdiv(sizes, tile)
    until, step = jnp.cumsum(tiles), jnp.arange(rows // tile + E + 1)
    groups = jnp.minimum(jnp.searchsorted(until, step, side="right", method="compare_all"), E)
    starts = (ends - sizes)[groups] + (step - (until - tiles)[groups]) * tile
    return RowTiles(*(array.astype(jnp.int32) for array in (groups, starts, jnp.minimum(starts + tile, ends[groups]))))


def rows_matmul(name: str, rows: Sequence[jax.Array], weights: Sequence[jax.Array], sizes: jax.Array, *, transposed: bool = False,
                extras: Sequence[jax.Array] = (), epilogue: Callable[..., Sequence[jax.Array]] = lambda *products: products,
                outputs: int = 1) -> list[jax.Array]:
    """epilogue(*products, *extras) in float32, a tile at a time; `outputs` arrays (R, N) in the rows' dtype, zero beyond the groups.

    A product is rows (R, K) x weights (E, K, N), or (E, N, K) if `transposed`; one array of rows serves all weights.
    `extras` are (R, N); XLA applies the epilogue to them and the rounded products then: a kernel that reads them at the end of a tile keeps
    its tensor cores waiting (0.89 ms at the best of 45 tile sizes against 0.66 ms, as above). `name` stands in the tables of tile sizes.
    """
    (R, K), E, dtype = rows[0].shape, weights[0].shape[0], rows[0].dtype
    if extras:
        products = rows_matmul(name, rows, weights, sizes, transposed=transposed, outputs=len(weights))
        return [new.astype(dtype) for new in epilogue(*(array.astype(jnp.float32) for array in (*products, *extras)))]
    N = weights[0].shape[1 if transposed else 2]
    fast = jnp.promote_types(dtype, weights[0].dtype).itemsize < 4  # else without tensor cores
    size = dispatch.tiles(name, f"K{K} N{N} E{E}", {
        "rows": blocks.side(R // E, 128 if fast else 64), "inner": blocks.side(K, 64 if fast else 32),
        "columns": blocks.side(N, 256 >> len(weights) - 1 if fast else 64),  # what meets in a tile shares the registers
        "warps": 8, "stages": 3})
    tr, tk, tn = size["rows"], size["inner"], size["columns"]
    plan = row_tiles(sizes, R, tr)

    def kernel(groups, starts, ends, *refs):
        row_refs, weight_refs, out_refs = split(refs, len(rows), len(weights), outputs)
        columns, step = (pl.program_id(0) * tn, tn), pl.program_id(1)
        group, start, end = groups[step], starts[step], ends[step]
        own_rows = start, tr, end

        @pl.when((start < end) & (group < E))
        def _():
            def add(k, totals):
                depth = k * tk, tk
                tiles = [blocks.load(ref, own_rows, depth) for ref in row_refs]
                of_weight = (columns, depth) if transposed else (depth, columns)
                return [total + dot(tiles[i % len(rows)], blocks.load(ref, group, *of_weight), 1, 1 if transposed else 0)
                        for i, (ref, total) in enumerate(zip(weight_refs, totals, strict=True))]

            totals = lax.fori_loop(0, pl.cdiv(K, tk), add, [jnp.zeros((tr, tn), jnp.float32) for _ in weights])
            for out, value in zip(out_refs, epilogue(*totals), strict=True):
                blocks.store(out, value, own_rows, columns)

        @pl.when((start < end) & (group == E))
        def _():
            for out in out_refs:
                blocks.store(out, jnp.zeros((tr, tn), dtype), own_rows, columns)

    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=[jax.ShapeDtypeStruct((R, N), dtype)] * outputs,
        grid=(pl.cdiv(N, tn), plan.groups.size),  # the columns of one tile of rows run side by side, as they read the same rows
        compiler_params=plgpu.CompilerParams(num_warps=size["warps"], num_stages=size["stages"]),
        interpret=dispatch.interpret(),
    )(*plan, *rows, *weights)


def weights_matmul(name: str, x_RK: jax.Array, y_RN: jax.Array, sizes: jax.Array, dtype: Any) -> jax.Array:
    """The sum over the rows of every group of x_rᵀ y_r, accumulated in float32; (E, K, N), zero for empty groups."""
    (R, K), N, E = x_RK.shape, y_RN.shape[1], sizes.shape[0]
    fast = jnp.promote_types(x_RK.dtype, y_RN.dtype).itemsize < 4
    size = dispatch.tiles(name, f"K{K} N{N} E{E}", {
        "rows": blocks.side(R // E, 64 if fast else 32), "inner": blocks.side(K, 128 if fast else 64),
        "columns": blocks.side(N, 256 if fast else 64), "warps": 8, "stages": 3})
    tr, tk, tn = size["rows"], size["inner"], size["columns"]
    ends = jnp.cumsum(sizes.astype(jnp.int32))

    def kernel(starts, ends, x, y, out):
        columns, inner, group = (pl.program_id(0) * tn, tn), (pl.program_id(1) * tk, tk), pl.program_id(2)
        start, end = starts[group], ends[group]

        def add(i, total):
            rows = start + i * tr, tr, end  # of both, as zero times NaN is not zero
            return total + dot(blocks.load(x, rows, inner), blocks.load(y, rows, columns), 0, 0)

        total = lax.fori_loop(0, pl.cdiv(end - start, tr), add, jnp.zeros((tk, tn), jnp.float32))
        blocks.store(out, total, group, inner, columns)

    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=jax.ShapeDtypeStruct((E, K, N), dtype),
        grid=(pl.cdiv(N, tn), pl.cdiv(K, tk), E),  # the tiles of one group run side by side, as they read the same rows
        compiler_params=plgpu.CompilerParams(num_warps=size["warps"], num_stages=size["stages"]),
        interpret=dispatch.interpret(),
    )(ends - sizes.astype(jnp.int32), ends, x_RK, y_RN)
