"""Plain XLA specification of the router's choice."""

import jax
import jax.numpy as jnp
from jax import lax


def route(logits_ME: jax.Array, bias_E: jax.Array | None, spec) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """See `api.route`."""
    logits_ME = logits_ME.astype(jnp.float32)
    E, A = logits_ME.shape[-1], spec.experts_per_token
    score_ME = jax.nn.softmax(logits_ME, axis=-1) if spec.score == "softmax" else jax.nn.sigmoid(logits_ME)
    biased_ME = score_ME if bias_E is None else score_ME + lax.stop_gradient(bias_E.astype(jnp.float32))
    experts_MA = _top(_within_groups(biased_ME, spec.groups, spec.groups_kept), A)
    weights_MA = jnp.take_along_axis(biased_ME if spec.bias_in_weight else score_ME, experts_MA, axis=-1)
    if spec.renormalize:
        weights_MA = weights_MA / (weights_MA.sum(-1, keepdims=True) + 1e-20)
    weights_MA = weights_MA * spec.scale
    load_ME = _counts(experts_MA, E)
    selected_ME = load_ME if bias_E is None and spec.groups == 1 else _counts(_top(score_ME, A), E)
    probability_ME = score_ME if spec.score == "softmax" else score_ME / (score_ME.sum(-1, keepdims=True) + 1e-20)
    z_M = jax.nn.logsumexp(logits_ME, axis=-1) ** 2
    return experts_MA, weights_MA, (probability_ME, selected_ME, load_ME, z_M)


def _within_groups(score_ME, groups, kept):
    """The scores with -inf for experts outside the `kept` groups that have the largest sum of their two best."""
    if groups == kept:
        return score_ME
    M, E = score_ME.shape
    size = E // groups
    best_MG = lax.top_k(lax.stop_gradient(score_ME).reshape(M, groups, size), min(2, size))[0].sum(-1)
    kept_MG = _counts(_top(best_MG, kept), groups) > 0
    return jnp.where(jnp.repeat(kept_MG, size, axis=1), score_ME, -jnp.inf)


def _top(score_ME, k):
    """Indices of the k largest, equal ones by lowest index; NaN counts as largest."""
    return lax.top_k(lax.stop_gradient(score_ME), k)[1]


def _counts(experts_MA, num_experts):
    return jax.nn.one_hot(experts_MA, num_experts, dtype=jnp.float32).sum(1)
