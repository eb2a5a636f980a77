"""Plain XLA specification of the linear cross-entropy operation."""

import jax
import jax.numpy as jnp


def loss_and_logsumexp(x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `api.loss_and_logsumexp`."""
    nll_M, logsumexp_M = of_logits(jnp.matmul(x_MD, w_DV, preferred_element_type=jnp.float32), targets_M)
    return jnp.where(needed_M, nll_M, 0.0), jnp.where(needed_M, logsumexp_M, 0.0)


def of_logits(logits_MV: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[target] and log-sum-exp, (M,); a target outside the vocabulary has the logit 0."""
    picked_M = logits_MV.at[jnp.arange(len(targets_M)), targets_M].get(mode="fill", fill_value=0.0, wrap_negative_indices=False)
    logsumexp_M = jax.nn.logsumexp(logits_MV, axis=-1)
    return logsumexp_M - picked_M, logsumexp_M


def loss_and_entropy(x_MD: jax.Array, w_DV: jax.Array, targets_M: jax.Array, needed_M: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.loss_and_entropy`."""
    nll_M, _, entropy_M, right_M = entropy_of_logits(jnp.matmul(x_MD, w_DV, preferred_element_type=jnp.float32), targets_M)
    return jnp.where(needed_M, nll_M, 0.0), jnp.where(needed_M, entropy_M, 0.0), (right_M > 0) & needed_M


def entropy_of_logits(logits_MV: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """-log softmax(logits)[target], log-sum-exp, entropy, and 1.0 where the target has the largest logit (the first of equal ones), (M,)."""
    nll_M, logsumexp_M = of_logits(logits_MV, targets_M)
    logprobs_MV = logits_MV - logsumexp_M[:, None]
    entropy_M = -(jnp.exp(logprobs_MV) * logprobs_MV).sum(-1)
    return nll_M, logsumexp_M, entropy_M, (jnp.argmax(logits_MV, axis=-1) == targets_M).astype(jnp.float32)
