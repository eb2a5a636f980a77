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
