"""Public function of the linear cross-entropy operation."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy import chunked, reference, vjp

IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy, "chunked": chunked.linear_cross_entropy, "tpu": vjp.linear_cross_entropy}
PREFERRED = {"cpu": "chunked", "gpu": "chunked", "tpu": "tpu"}


def linear_cross_entropy(x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array | None = None, *,
                         implementation: str | None = None) -> jax.Array:
    """-log softmax(x w)[target] in nats, (M,), float32; exactly 0, with no gradient, in rows that are not needed.

    `reference` holds all logits; `chunked` packs the needed rows first and never holds more than one chunk of logits,
    so that half-masked batches pay for half of the vocabulary matmul. `tpu` packs them too, and runs Pallas kernels
    that never store logits.
    """
    if needed_M is None:
        needed_M = jnp.ones(targets_M.shape, bool)
    return dispatch.choose("linear_cross_entropy", IMPLEMENTATIONS, implementation, PREFERRED)(x_MD, w_DV, targets_M, needed_M)
