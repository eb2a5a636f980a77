"""Experts that are split over devices: tokens go to all devices of the expert axis, and each adds what its own experts make of them.

Nothing is dropped, however the tokens choose: x is gathered over the axis, the outputs are summed and scattered back, both in the activations'
dtype. A token travels once to every device and its output once back, whichever of its experts live there. Weights and products are split,
the rows that are moved are not: every device has room for all pairs of all tokens of the axis.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from llada_jax import partitioning
from pallas_kernels import routing


def gathered(experts: Callable[[jax.Array, jax.Array], jax.Array], number: int, x_MD: jax.Array, experts_MA: jax.Array, weights_MA: jax.Array,
             axis: str, split: bool) -> jax.Array:
    """Weighted sum of the chosen experts' outputs for this device's M tokens (`split`), or for tokens that every device of `axis` has; (M, D).

    Inside shard_map. `experts(rows_RD, group_sizes_E)` applies the `number` experts that live here, those from index(axis) · number on, to rows
    sorted by expert; rows beyond the last group are ignored.
    """
    if split:
        x_MD, weights_MA, named_MA = partitioning.all_gather(axis, x_MD, weights_MA, experts_MA.astype(jnp.float32))  # small integers are exact
        experts_MA = named_MA.astype(jnp.int32)
    own_MA = experts_MA - lax.axis_index(axis) * number
    order = routing.plan(own_MA, number)  # pairs of other devices' experts come last
    rows_RD = experts(routing.gather_rows(x_MD, order), order.group_sizes_E)
    out_MD = routing.combine_rows(rows_RD, jnp.where((own_MA >= 0) & (own_MA < number), weights_MA, 0), order)
    return lax.psum_scatter(out_MD, axis, scatter_dimension=0, tiled=True) if split else lax.psum(out_MD, axis)
