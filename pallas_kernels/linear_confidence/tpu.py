"""Linear confidence for TPUs in Pallas (Mosaic): one kernel over (row tile, vocabulary tile) that never stores logits.

The statistics of the tiles so far lie in the output blocks, which stay in VMEM while the vocabulary passes by; the arithmetic
is the reference's. Noise is counted in the kernel from each row's key, so nothing of size M x V is read either.

Tile sizes are a heuristic of the shapes, not measured; tables override them (`dispatch.tiles`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.linear_confidence.reference import Partial, counter_bits, of_logits, pair
from pallas_kernels.numerics import dot

VMEM_LIMIT = 60 * 2**20  # bytes; the default scoped limit is 16 MiB, the smallest VMEM of v5 and later 64 MiB
SEMANTICS = ("parallel", "arbitrary")  # vocabulary tiles accumulate


def partial(x_MD: jax.Array, w_DV: jax.Array, first: jax.Array | int, temperature: float, keys_M2: jax.Array | None,
            bits: object, suppressed: tuple[int, ...]) -> Partial:
    """See `api.linear_confidence_partial`; arrays (M,). Raises ValueError for noise that is given as bits."""
    if temperature > 0 and bits is not None:
        raise ValueError("linear_confidence: the implementation 'tpu' makes its noise of keys; give keys, or take 'reference' for bits")
    (M, D), V = x_MD.shape, w_DV.shape[1]
    size = dispatch.tiles("linear_confidence", f"D{D} V{V}", {"rows": 256, "columns": 512})
    rows, columns = min(size["rows"], pl.cdiv(M, 16) * 16), min(size["columns"], V)
    noise = [] if temperature == 0 or keys_M2 is None else [keys_M2]

    def kernel(first, x, w, *refs):
        v, keys, outs = pl.program_id(1), refs[:len(noise)], refs[len(noise):]
        column = v * columns + lax.broadcasted_iota(jnp.int32, (1, columns), 1)
        logits = jnp.where(column < V, dot(x[...], w[...]), -jnp.inf)
        ids = first[0] + column
        tile = of_logits(logits, ids, temperature, counter_bits(keys[0][...], ids) if keys else None, suppressed)

        @pl.when(v == 0)
        def _():
            for out, new in zip(outs, tile, strict=True):
                out[...] = new

        @pl.when(v > 0)
        def _():
            for out, new in zip(outs, pair(Partial(*(out[...] for out in outs)), tile), strict=True):
                out[...] = new

    of_row = lambda width: pl.BlockSpec((rows, width), lambda i, v, first: (i, 0))
    types = Partial(*(jnp.int32 if "token" in name else jnp.float32 for name in Partial._fields))
    parts = pl.pallas_call(
        kernel,
        name="linear_confidence",
        out_shape=[jax.ShapeDtypeStruct((M, 1), dtype) for dtype in types],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(M, rows), pl.cdiv(V, columns)),
            in_specs=[of_row(D), pl.BlockSpec((D, columns), lambda i, v, first: (0, v)), *(of_row(2) for _ in noise)],
            out_specs=[of_row(1)] * len(types),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(flops=2 * M * D * V, transcendentals=M * V, bytes_accessed=x_MD.nbytes + w_DV.nbytes * pl.cdiv(M, rows)),
        interpret=dispatch.interpret(),
    )(jnp.asarray(first, jnp.int32).reshape(1), x_MD, w_DV, *noise)
    return Partial(*(part[:, 0] for part in parts))
