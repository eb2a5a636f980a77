"""Public functions of the linear cross-entropy operation: the loss of M rows under a head of D x V, without the M x V logits.

`reference` holds all logits. The others pack the needed rows to the front of a buffer of M rows and loop as far as they go, so
work follows the number of needed rows and no budget of them can overflow; the buffer is small beside the head (4096 rows of 2048
are 16 MB in bfloat16, a head of 157,184 is 644 MB), which is why it has no smaller, static size. `chunked` holds a chunk of
logits at a time, in XLA. `tpu` and `gpu` are Pallas kernels: the first never stores logits, the second stores the gradients of a
few columns of them at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy import chunked, gpu, reference, tpu, vjp

IMPLEMENTATIONS = {"reference": reference.loss_and_logsumexp, "chunked": chunked.loss_and_logsumexp,
                   "tpu": functools.partial(vjp.loss_and_logsumexp, tpu), "gpu": functools.partial(vjp.loss_and_logsumexp, gpu)}
PREFERRED = {"cpu": "chunked", "gpu": "gpu", "tpu": "tpu"}
WITH_ENTROPY = {"reference": reference.loss_and_entropy, "chunked": chunked.loss_and_entropy}


def linear_cross_entropy(x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array | None = None, *,
                         implementation: str | None = None) -> jax.Array:
    """-log softmax(x w)[target] in nats, (M,), float32; exactly 0, with no gradient, in rows that are not needed.

    A needed row whose target is outside the vocabulary has NaN.
    """
    nll_M, _ = loss_and_logsumexp(x_MD, w_DV, targets_M, needed_M, implementation=implementation)
    return _marked(nll_M, w_DV, targets_M, needed_M)


def loss_and_logsumexp(x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array | None = None, *,
                       implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
    """-log softmax(x w)[target] and log-sum-exp of x w, (M,) float32, both differentiable and 0 in rows that are not needed.

    A z-loss (PaLM, arXiv 2204.02311) adds coefficient · logsumexp². A target outside [0, V) counts as a logit of 0, so that
    devices that hold a part of the vocabulary each can join theirs by `merge`.
    """
    if needed_M is None:
        needed_M = jnp.ones(targets_M.shape, bool)
    return dispatch.choose("linear_cross_entropy", IMPLEMENTATIONS, implementation, PREFERRED)(x_MD, w_DV, targets_M, needed_M)


def loss_and_entropy(x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array | None = None, *,
                     implementation: str | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-log softmax(x w)[target] and the entropy of softmax(x w), nats, (M,) float32, and whether the target is the most probable entry, (M,) bool.

    The first two are differentiable, and all are 0 in rows that are not needed; the first is NaN as in `linear_cross_entropy`. `chunked`, the
    choice on every platform, holds a chunk of logits and of their gradients at a time (8 MiB each, or 64 rows) beside the head's float32 gradient.
    """
    if needed_M is None:
        needed_M = jnp.ones(targets_M.shape, bool)
    name = "chunked" if implementation in (None, "auto") else implementation
    nll_M, entropy_M, right_M = dispatch.choose("linear_cross_entropy with entropy", WITH_ENTROPY, name)(x_MD, w_DV, targets_M, needed_M)
    return _marked(nll_M, w_DV, targets_M, needed_M), entropy_M, right_M


def merge(nll_M: jax.Array, logsumexp_M: jax.Array, axis: str | tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """The same of the whole vocabulary, inside shard_map over parts of it along a mesh axis; exchanges three numbers a row.

    Each part is `loss_and_logsumexp(x, part, targets - first, needed)` of the same rows, with the part's `first` id.
    """
    top_M = lax.pmax(lax.stop_gradient(logsumexp_M), axis)
    whole_M = top_M + jnp.log(lax.psum(jnp.exp(logsumexp_M - top_M), axis))
    return whole_M - lax.psum(logsumexp_M - nll_M, axis), whole_M


def _marked(nll_M: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array | None) -> jax.Array:
    outside_M = (targets_M < 0) | (targets_M >= w_DV.shape[1])
    return jnp.where(outside_M if needed_M is None else outside_M & needed_M, jnp.nan, nll_M)
