"""Grouped matrix multiplication for TPUs in Pallas (Mosaic): two kernels that walk over (group, row tile) visits.

Rows are sorted by group, so a tile of rows belongs to one group or to a few neighbours. The list of visits is computed in XLA
and prefetched into scalar memory, where it steers the copies; its length is the static upper bound, and steps beyond its end
copy and compute nothing. The scheme is that of MegaBlocks (arXiv 2211.15841). Letters: R rows, K contracted, N columns, E groups.

Tile sizes are a heuristic of the shapes, not measured; tables override them (`dispatch.tiles`). Inside shard_map the kernels
need check_vma=False.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.numerics import dot, split

VMEM_LIMIT = 60 * 2**20  # bytes; the default scoped limit is 16 MiB, the smallest VMEM of v5 and later 64 MiB


class Visits(NamedTuple):
    """(group, row tile) pairs in the order of the rows; entries beyond the last pair repeat it. All int32."""

    starts: jax.Array  # (groups + 1,) first row of each group, and the end of the last
    groups: jax.Array  # (steps,)
    tiles: jax.Array  # (steps,)
    count: jax.Array  # (1,) steps that compute


def visits(sizes: jax.Array, rows: int, tile: int, *, rest: bool) -> Visits:
    """The visits to groups of `sizes` (E,).

    With `rest`, the rows beyond the groups make one more group, E, which is visited but not counted, and empty groups are left
    out; otherwise empty groups have one visit and the rows beyond have none.
    """
    E, tiles = sizes.shape[0], pl.cdiv(rows, tile)
    sizes = sizes.astype(jnp.int32)
    if rest:
        sizes = jnp.append(sizes, rows - sizes.sum())
    ends = jnp.cumsum(sizes)
    first = jnp.minimum((ends - sizes) // tile, tiles - 1)
    steps = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, 0 if rest else 1)
    until = jnp.cumsum(steps)
    step = jnp.minimum(jnp.arange(tiles + sizes.shape[0] - 1), until[-1] - 1)
    groups = jnp.searchsorted(until, step, side="right", method="compare_all")
    plan = Visits(jnp.append(0, ends), groups, (first - until + steps)[groups] + step, until[E - 1:E])
    return Visits(*(array.astype(jnp.int32) for array in plan))


def rows_matmul(name: str, rows: Sequence[jax.Array], weights: Sequence[jax.Array], sizes: jax.Array, *, transposed: bool = False,
                extras: Sequence[jax.Array] = (), epilogue: Callable[..., Sequence[jax.Array]] = lambda *products: products,
                outputs: int = 1) -> list[jax.Array]:
    """epilogue(*products, *extras) in float32, a tile at a time; `outputs` arrays (R, N) in the rows' dtype, zero beyond the groups.

    A product is rows (R, K) x weights (E, K, N), or (E, N, K) if `transposed`; one array of rows serves all weights.
    `extras` are (R, N). `name` stands in profiles and in the tables of tile sizes.
    """
    (R, K), E, dtype = rows[0].shape, weights[0].shape[0], rows[0].dtype
    N = weights[0].shape[1 if transposed else 2]
    width = weights[0].dtype.itemsize
    size = dispatch.tiles(name, f"K{K} N{N} E{E}", {
        "rows": _row_tile(R, E), "inner": _divisor(K, 4096 // width),  # all of K if possible: a group's weights stay while its rows pass by
        "columns": _share(N, min(2048 // width, pl.cdiv(N, 2)))})  # two, as some chips have two cores
    tr, tk, tn = size["rows"], size["inner"], size["columns"]
    if K % tk:
        raise ValueError(f"{name}: inner tile {tk} does not divide {K}")
    plan = visits(sizes, R, tr, rest=True)
    inner = K // tk

    def kernel(starts, groups, tiles, count, *refs):
        row_refs, weight_refs, extra_refs, out_refs, sums = split(refs, len(rows), len(weights), len(extras), outputs, len(weights))
        step, k = pl.program_id(1), pl.program_id(2)
        mine = _mine(starts, groups[step], tiles[step], tr)

        @pl.when(step < count[0])
        def _():
            for i, (weight, total) in enumerate(zip(weight_refs, sums, strict=True)):
                product = dot(row_refs[i % len(rows)][...], weight[...], 1, 1 if transposed else 0)
                total[...] = jnp.where(k == 0, 0, total[...]) + product if inner > 1 else product

        @pl.when((step < count[0]) & (k == inner - 1))
        def _():
            new = epilogue(*(ref[...].astype(jnp.float32) for ref in (*sums, *extra_refs)))
            for out, value in zip(out_refs, new, strict=True):
                out[...] = jnp.where(mine, value, out[...].astype(jnp.float32)).astype(dtype)

        @pl.when(groups[step] == E)
        def _():
            for out in out_refs:
                out[...] = jnp.where(mine, 0, out[...].astype(jnp.float32)).astype(dtype)

    def of_inputs(index):
        """The index map of an input: it stands still where nothing is computed, so that nothing is copied."""
        def index_map(n, step, k, _starts, groups, tiles, count):
            busy = jnp.clip(step, 0, jnp.maximum(count[0] - 1, 0))
            return index(jnp.minimum(groups[busy], E - 1), tiles[busy], n, jnp.where(step < count[0], k, inner - 1))
        return index_map

    row = pl.BlockSpec((tr, tk), of_inputs(lambda group, tile, n, k: (tile, k)))
    weight = pl.BlockSpec((None, tn, tk) if transposed else (None, tk, tn),
                          of_inputs(lambda group, tile, n, k: (group, n, k) if transposed else (group, k, n)))
    extra = pl.BlockSpec((tr, tn), of_inputs(lambda group, tile, n, k: (tile, n)))
    out = pl.BlockSpec((tr, tn), lambda n, step, k, starts, groups, tiles, count: (tiles[step], n))
    shapes = [jax.ShapeDtypeStruct((R, N), dtype)] * outputs
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(pl.cdiv(N, tn), plan.groups.size, inner),
            in_specs=[row] * len(rows) + [weight] * len(weights) + [extra] * len(extras),
            out_specs=[out] * outputs,
            scratch_shapes=[pltpu.VMEM((tr, tn), jnp.float32)] * len(weights),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=_cost(2 * R * K * N * len(weights), (*rows, *weights, *extras, *shapes)),
        interpret=dispatch.interpret(),
    )(*plan, *rows, *weights, *extras)


def weights_matmul(name: str, x_RK: jax.Array, y_RN: jax.Array, sizes: jax.Array, dtype: Any) -> jax.Array:
    """The sum over the rows of every group of x_rᵀ y_r, accumulated in float32; (E, K, N), zero for empty groups."""
    (R, K), N, E = x_RK.shape, y_RN.shape[1], sizes.shape[0]
    size = dispatch.tiles(name, f"K{K} N{N} E{E}", {"rows": _row_tile(R, E), "inner": _share(K, 1024), "columns": _share(N, 1024)})
    tr, tk, tn = size["rows"], size["inner"], size["columns"]
    plan = visits(sizes, R, tr, rest=False)

    def kernel(starts, groups, tiles, count, x, y, out, total):
        step = pl.program_id(2)
        group, busy = groups[step], step < count[0]
        start, end, begin = starts[group], starts[group + 1], tiles[step] * tr
        whole = (start <= begin) & (begin + tr <= end)

        @pl.when((step == 0) | (group != groups[jnp.maximum(step - 1, 0)]))
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(busy & whole)
        def _():
            total[...] += dot(x[...], y[...], 0, 0)

        @pl.when(busy & ~whole & (start < end))
        def _():  # both are masked, as zero times NaN is not zero
            mine = _mine(starts, group, tiles[step], tr)
            mask = lambda rows: jnp.where(mine, rows[...].astype(jnp.float32), 0).astype(rows.dtype)
            total[...] += dot(mask(x), mask(y), 0, 0)

        @pl.when((step == count[0] - 1) | busy & (group != groups[jnp.minimum(step + 1, plan.groups.size - 1)]))
        def _():
            out[...] = total[...].astype(dtype)

    shape = jax.ShapeDtypeStruct((E, K, N), dtype)
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(pl.cdiv(K, tk), pl.cdiv(N, tn), plan.groups.size),
            in_specs=[pl.BlockSpec((tr, tk), lambda k, n, step, starts, groups, tiles, count: (tiles[step], k)),
                      pl.BlockSpec((tr, tn), lambda k, n, step, starts, groups, tiles, count: (tiles[step], n))],
            out_specs=pl.BlockSpec((None, tk, tn), lambda k, n, step, starts, groups, tiles, count: (groups[step], k, n)),
            scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=_cost(2 * R * K * N, (x_RK, y_RN, shape)),
        interpret=dispatch.interpret(),
    )(*plan, x_RK, y_RN)


def _mine(starts, group, tile, size):
    """(size, 1) bool: which rows of a tile belong to the group."""
    row = tile * size + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return (starts[group] <= row) & (row < starts[group + 1])


def _row_tile(rows: int, groups: int) -> int:
    """About a quarter of the mean group, as each group may visit one tile more than it fills; all rows if they are few."""
    quarter = max(rows // groups // 4, 1)
    return min(rows, 512, max(128, 1 << (quarter - 1).bit_length()))


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is a multiple of 128 (lanes) and at most `most`; all of `size` where there is none."""
    return next((tile for tile in range(most // 128 * 128, 0, -128) if size % tile == 0), size)


def _share(size: int, most: int) -> int:
    """`size` in equal parts of about `most`, rounded up to a multiple of 128 (lanes): the last tile may overhang."""
    return min(size, pl.cdiv(pl.cdiv(size, pl.cdiv(size, most)), 128) * 128)


def _cost(flops: int, arrays: Sequence[Any]) -> pl.CostEstimate:
    """What the kernel computes, and that it moves each array once."""
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays))
