"""Plain XLA specification of the router's choice."""

import jax
import jax.numpy as jnp
from jax import lax


def route(logits_ME: jax.Array, bias_E: jax.Array | None, spec) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """See `api.route`."""
    logits_ME = logits_ME.astype(jnp.float32)
    probability_ME = jax.nn.softmax(logits_ME, axis=-1)
    score_ME = probability_ME if bias_E is None else probability_ME + lax.stop_gradient(bias_E.astype(jnp.float32))
    experts_MA = _top(score_ME, spec.experts_per_token)
    weights_MA = jnp.take_along_axis(score_ME, experts_MA, axis=-1)
    if spec.renormalize:
        weights_MA = weights_MA / weights_MA.sum(-1, keepdims=True)
    load_ME = _counts(experts_MA, logits_ME.shape[-1])
    selected_ME = load_ME if bias_E is None else _counts(_top(probability_ME, spec.experts_per_token), logits_ME.shape[-1])
    z_M = jax.nn.logsumexp(logits_ME, axis=-1) ** 2
    return experts_MA, weights_MA, (probability_ME, selected_ME, load_ME, z_M)


def _top(score_ME, k):
    """Indices of the k largest, equal ones by lowest index; NaN counts as largest."""
    return lax.top_k(lax.stop_gradient(score_ME), k)[1]


def _counts(experts_MA, num_experts):
    return jax.nn.one_hot(experts_MA, num_experts, dtype=jnp.float32).sum(1)
