"""Plain XLA specification of the router's choice."""

import jax
import jax.numpy as jnp
from jax import lax


def route(logits_ME: jax.Array, bias_E: jax.Array | None, spec) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """See `api.route`."""
    logits_ME = logits_ME.astype(jnp.float32)
    A = spec.experts_per_token
    score_ME = scores(logits_ME, spec.score)
    biased_ME = score_ME if bias_E is None else score_ME + lax.stop_gradient(bias_E.astype(jnp.float32))
    experts_MA = _top(_within_groups(biased_ME, spec.groups, spec.groups_kept), A)
    weights_MA = mixing(jnp.take_along_axis(biased_ME if spec.bias_in_weight else score_ME, experts_MA, axis=-1), spec)
    selected_MA = experts_MA if bias_E is None and spec.groups == 1 else _top(score_ME, A)
    return experts_MA, weights_MA, statistics(logits_ME, experts_MA, selected_MA, spec)


def scores(logits_ME, kind):
    """Of every expert, by itself or among all."""
    return jax.nn.softmax(logits_ME, axis=-1) if kind == "softmax" else jax.nn.sigmoid(logits_ME)


def mixing(chosen_MA, spec):
    """The mixing weights, of the scores of the experts that are chosen."""
    if spec.renormalize:
        chosen_MA = chosen_MA / (chosen_MA.sum(-1, keepdims=True) + 1e-20)
    return chosen_MA * spec.scale


def statistics(logits_ME, experts_MA, selected_MA, spec):
    """The fields of `api.Stats`; `selected_MA` are the best of the plain scores."""
    E, score_ME = logits_ME.shape[-1], scores(logits_ME, spec.score)
    probability_ME = score_ME if spec.score == "softmax" else score_ME / (score_ME.sum(-1, keepdims=True) + 1e-20)
    return probability_ME, _counts(selected_MA, E), _counts(experts_MA, E), jax.nn.logsumexp(logits_ME, axis=-1) ** 2


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
