"""Linear confidence for GPUs in Pallas (Triton): a kernel over (row tile, share of the vocabulary) that never stores logits.

With few rows the time is that of reading the weights: one row tile, and many programs that read some columns each. The shares
are joined by a second kernel, eight numbers a row and share; the arithmetic is the reference's. Noise is counted in the kernel from each
row's key, so nothing of size M x V is read either.

Tile sizes for up to 32 rows in bfloat16 and the number of programs are within 1 % of the fastest of 34 choices, with noise and without, that
were timed on an H200 (width 2048, vocabulary 157,184, 2026-11-26); others are a heuristic. Tables override them (`dispatch.tiles`). The noise
takes a fifth of the time.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import blocks, dispatch
from pallas_kernels.linear_confidence.reference import NO_TOKEN, Partial, join, of_logits, pair, threefry

PROGRAMS = 1024  # to aim at: several for each of 132 multiprocessors, so that an uneven end costs little
READERS = 264  # of one row tile: two for each of 132 multiprocessors, which read for the whole of the time
NOTHING = Partial(-jnp.inf, NO_TOKEN, -jnp.inf, -jnp.inf, NO_TOKEN, -jnp.inf, 0.0, 0.0)  # the statistics of no entries


def partial(x_MD: jax.Array, w_DV: jax.Array, first: jax.Array | int, temperature: float, keys_M2: jax.Array | None,
            bits: object, suppressed: tuple[int, ...]) -> Partial:
    """See `api.linear_confidence_partial`; arrays (M,). Raises ValueError for noise that is given as bits."""
    if temperature > 0 and bits is not None:
        raise ValueError("linear_confidence: the implementation 'gpu' makes its noise of keys; give keys, or take 'reference' for bits")
    (M, D), V = x_MD.shape, w_DV.shape[1]
    noise = [] if temperature == 0 or keys_M2 is None else [keys_M2]
    size = dispatch.tiles("linear_confidence", f"D{D} V{V}{' noise' if noise else ''}", _heuristic(x_MD, w_DV))
    rows, columns, depth = blocks.side(M, size["rows"]), blocks.side(V, size["columns"]), size["depth"]
    all_tiles, row_tiles = pl.cdiv(V, columns), pl.cdiv(M, rows)
    share = pl.cdiv(all_tiles, min(READERS if row_tiles == 1 else pl.cdiv(PROGRAMS, row_tiles), all_tiles))  # tiles of a program
    types = Partial(*(jnp.int32 if "token" in name else jnp.float32 for name in Partial._fields))

    def kernel(first, x, w, *refs):
        i, s, outs = pl.program_id(0), pl.program_id(1), refs[len(noise):]
        row = i * rows, rows
        words = [blocks.load(keys, row, (word, 1)) for keys in refs[:len(noise)] for word in range(2)]

        def add(v, parts):
            column = v * columns
            logits = blocks.product(jnp.zeros((rows, columns), jnp.float32), lambda k: blocks.load(x, row, (k, depth)),
                                    lambda k: blocks.load(w, (k, depth), (column, columns)), depth, pl.cdiv(D, depth))
            here = blocks.span(column, columns)[None]
            ids = first[0] + here
            logits = logits if V % columns == 0 else jnp.where(here < V, logits, -jnp.inf)
            return pair(parts, of_logits(logits, ids, temperature, threefry(*words, ids) if words else None, suppressed))

        nothing = Partial(*(jnp.full((rows, 1), value, dtype) for value, dtype in zip(NOTHING, types, strict=True)))
        parts = lax.fori_loop(s * share, jnp.minimum((s + 1) * share, all_tiles), add, nothing)
        for out, part in zip(outs, parts, strict=True):
            blocks.store(out, part, s, row, (0, 1))

    shares = pl.cdiv(all_tiles, share)
    parts = pl.pallas_call(
        kernel,
        name="linear_confidence",
        out_shape=[jax.ShapeDtypeStruct((shares, M, 1), dtype) for dtype in types],
        grid=(row_tiles, shares),
        compiler_params=plgpu.CompilerParams(num_warps=size["warps"], num_stages=size["stages"]),
        interpret=dispatch.interpret(),
    )(jnp.asarray(first, jnp.int32).reshape(1), x_MD, w_DV, *noise)
    return Partial(*joined(parts, types))


def joined(parts: Sequence[jax.Array], types: Partial) -> list[jax.Array]:
    """The statistics (M,) of all shares (shares, M, 1): a program a row, one launch in place of six reductions that wait for each other."""
    shares, M, _ = parts[0].shape

    def kernel(*refs):
        ins, outs = refs[:len(parts)], refs[len(parts):]
        share, here = (0, pl.next_power_of_2(shares)), ((pl.program_id(0), 1), (0, 1))
        there = (blocks.span(*share) < shares)[:, None, None]
        mine = Partial(*(jnp.where(there, blocks.load(part, share, *here), nothing) for part, nothing in zip(ins, NOTHING, strict=True)))
        for out, part in zip(outs, join(mine, 0), strict=True):
            blocks.store(out, part, (0, 1), *here)

    joined_1M1 = pl.pallas_call(
        kernel,
        name="linear_confidence_join",
        out_shape=[jax.ShapeDtypeStruct((1, M, 1), dtype) for dtype in types],
        grid=(M,),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=dispatch.interpret(),
    )(*parts)
    return [part[0, :, 0] for part in joined_1M1]


def _heuristic(x_MD, w_DV):
    """Rows, columns and depth of a product's tile, warps and pipeline stages. float32, without tensor cores, takes small ones."""
    if jnp.promote_types(x_MD.dtype, w_DV.dtype) == jnp.float32:
        return {"rows": 32, "columns": 64, "depth": 16, "warps": 4, "stages": 3}
    if x_MD.shape[0] <= 32:
        return {"rows": 32, "columns": 128, "depth": 64, "warps": 4, "stages": 4}
    return {"rows": 128, "columns": 128, "depth": 64, "warps": 8, "stages": 3}
