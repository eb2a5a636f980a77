"""Grouped matrix multiplication for GPUs in Pallas (Triton): two kernels that take the rows of a group a tile at a time.

Rows are sorted by group. A tile of rows starts where its group does, or a whole number of tiles later, so that it belongs to one
group alone: a GPU copies from any row on. Which rows a program has stands in a short list, computed in XLA and as long as its static
bound. Letters: R rows, K contracted, N columns, E groups.

Tile sizes are a heuristic of the shapes, not measured; tables override them (`dispatch.tiles`). Inside shard_map the kernels
need check_vma=False.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import dispatch
from pallas_kernels.numerics import dot


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
    `extras` are (R, N). `name` stands in the tables of tile sizes.
    """
    (R, K), E, dtype = rows[0].shape, weights[0].shape[0], rows[0].dtype
    N = weights[0].shape[1 if transposed else 2]
    fast = jnp.promote_types(dtype, weights[0].dtype).itemsize < 4  # else without tensor cores
    size = dispatch.tiles(name, f"K{K} N{N} E{E}", {
        "rows": _power(R // E, 128 if fast else 64), "inner": _power(K, 64 if fast else 32),
        "columns": _power(N, 256 >> len(weights) + len(extras) - 1 if fast else 64),  # what meets in a tile shares the registers
        "warps": 8, "stages": 3})
    tr, tk, tn = size["rows"], size["inner"], size["columns"]
    plan = row_tiles(sizes, R, tr)
    k_end, n_end = K if K % tk else None, N if N % tn else None

    def kernel(groups, starts, ends, *refs):
        row_refs, weight_refs, extra_refs, out_refs = _split(refs, len(rows), len(weights), len(extras), outputs)
        n, step = pl.program_id(0) * tn, pl.program_id(1)
        group, start, end = groups[step], starts[step], ends[step]
        of_extras = (start, tr, end), (n, tn, n_end)

        @pl.when((start < end) & (group < E))
        def _():
            def add(i, totals):
                k = i * tk
                tiles = [_load(ref, (start, tr, end), (k, tk, k_end)) for ref in row_refs]
                of_weight = ((n, tn, n_end), (k, tk, k_end)) if transposed else ((k, tk, k_end), (n, tn, n_end))
                return [total + dot(tiles[i % len(rows)], _load(ref, *of_weight, group), 1, 1 if transposed else 0)
                        for i, (ref, total) in enumerate(zip(weight_refs, totals, strict=True))]

            totals = lax.fori_loop(0, pl.cdiv(K, tk), add, [jnp.zeros((tr, tn), jnp.float32) for _ in weights])
            new = epilogue(*totals, *(_load(ref, *of_extras).astype(jnp.float32) for ref in extra_refs))
            for out, value in zip(out_refs, new, strict=True):
                _store(out, value.astype(dtype), *of_extras)

        @pl.when((start < end) & (group == E))
        def _():
            for out in out_refs:
                _store(out, jnp.zeros((tr, tn), dtype), *of_extras)

    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=[jax.ShapeDtypeStruct((R, N), dtype)] * outputs,
        grid=(pl.cdiv(N, tn), plan.groups.size),  # the columns of one tile of rows run side by side, as they read the same rows
        compiler_params=plt.CompilerParams(num_warps=size["warps"], num_stages=size["stages"]),
        interpret=dispatch.interpret(),
    )(*plan, *rows, *weights, *extras)


def weights_matmul(name: str, x_RK: jax.Array, y_RN: jax.Array, sizes: jax.Array, dtype: Any) -> jax.Array:
    """The sum over the rows of every group of x_rᵀ y_r, accumulated in float32; (E, K, N), zero for empty groups."""
    (R, K), N, E = x_RK.shape, y_RN.shape[1], sizes.shape[0]
    fast = jnp.promote_types(x_RK.dtype, y_RN.dtype).itemsize < 4
    size = dispatch.tiles(name, f"K{K} N{N} E{E}", {
        "rows": _power(R // E, 64 if fast else 32), "inner": _power(K, 128 if fast else 64), "columns": _power(N, 256 if fast else 64),
        "warps": 8, "stages": 3})
    tr, tk, tn = size["rows"], size["inner"], size["columns"]
    k_end, n_end = K if K % tk else None, N if N % tn else None
    ends = jnp.cumsum(sizes.astype(jnp.int32))

    def kernel(starts, ends, x, y, out):
        n, k, group = pl.program_id(0) * tn, pl.program_id(1) * tk, pl.program_id(2)
        start, end = starts[group], ends[group]

        def add(i, total):
            rows = start + i * tr, tr, end  # of both, as zero times NaN is not zero
            return total + dot(_load(x, rows, (k, tk, k_end)), _load(y, rows, (n, tn, n_end)), 0, 0)

        total = lax.fori_loop(0, pl.cdiv(end - start, tr), add, jnp.zeros((tk, tn), jnp.float32))
        _store(out, total.astype(dtype), (k, tk, k_end), (n, tn, n_end), group)

    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=jax.ShapeDtypeStruct((E, K, N), dtype),
        grid=(pl.cdiv(N, tn), pl.cdiv(K, tk), E),  # the tiles of one group run side by side, as they read the same rows
        compiler_params=plt.CompilerParams(num_warps=size["warps"], num_stages=size["stages"]),
        interpret=dispatch.interpret(),
    )(ends - sizes.astype(jnp.int32), ends, x_RK, y_RN)


def _load(ref, rows, columns, *group):
    """The tile `rows` x `columns` of a matrix, or of a group's, each (start, size, end): zero from the end on, None if no tile hangs over."""
    mask = _inside(rows, columns)
    return plt.load(_at(ref, rows, columns, group), mask=mask, other=None if mask is None else 0)


def _store(ref, value, rows, columns, *group):
    """Write the tile, but nothing from an end on."""
    plt.store(_at(ref, rows, columns, group), value, mask=_inside(rows, columns))


def _at(ref, rows, columns, group):
    return ref.at[(*group, pl.ds(*rows[:2]), pl.ds(*columns[:2]))]


def _inside(rows, columns):
    (row, R, row_end), (column, C, column_end) = rows, columns
    masks = []
    if row_end is not None:
        masks.append((row + jnp.arange(R) < row_end)[:, None])
    if column_end is not None:
        masks.append((column + jnp.arange(C) < column_end)[None, :])
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), (R, C)) if masks else None


def _power(size: int, most: int) -> int:
    """The power of two at or above `size`, at least 16 (the smallest matrix product) and at most `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def _split(items, *counts):
    """Consecutive parts of the given lengths."""
    items = iter(items)
    return [[next(items) for _ in range(count)] for count in counts]
