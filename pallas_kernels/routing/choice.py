"""The router's choice on one tile, as the kernels of both back ends make it.

Experts lie along the rows and tokens along the columns. Letters: E experts, t the tokens of a tile.
"""

import jax
import jax.numpy as jnp


def choose(logits_Et, bias_E1, num_experts: int, spec, part):
    """The experts of every token, best first, and their mixing weights, each a list of rows (1, t), and the scores. Rules as in `reference.route`.

    There may be rows beyond `num_experts`, with logits of -inf. `part(key_Et, expert_Et, first, size)` is a group of experts: their keys
    and indices, and which of these rows they are (True for all).
    """
    expert_Et = jax.lax.broadcasted_iota(jnp.int32, logits_Et.shape, 0)
    score_Et = _scores(logits_Et, spec.score)
    biased_Et = score_Et + bias_E1
    experts = top(_within_groups(sortable(biased_Et), expert_Et, num_experts, spec, part), expert_Et, spec.experts_per_token, expert_Et < num_experts)
    weight_Et = biased_Et if spec.bias_in_weight else score_Et
    weights = [_at(weight_Et, expert_Et, expert_1t) for expert_1t in experts]
    total_1t = sum(weights) + 1e-20 if spec.renormalize else 1.0
    return experts, [weight_1t / total_1t * spec.scale for weight_1t in weights], score_Et


def sortable(score_Et):
    """NaN counts as largest."""
    return jnp.where(jnp.isnan(score_Et), jnp.inf, score_Et)


def top(key_Et, index_Et, k, free_Et):
    """k rounds of maximum and its first index, each (1, t), among those that are free; a mask takes what was taken out, as -inf may be a key."""
    taken = []
    for _ in range(k):
        best_1t = jnp.where(free_Et, key_Et, -jnp.inf).max(0, keepdims=True)
        taken.append(jnp.where(free_Et & (key_Et == best_1t), index_Et, 2**30).min(0, keepdims=True))
        free_Et &= index_Et != taken[-1]
    return taken


def _scores(logits_Et, kind):
    if kind != "softmax":
        return jax.nn.sigmoid(logits_Et)
    exp_Et = jnp.exp(logits_Et - logits_Et.max(0, keepdims=True))
    return exp_Et / exp_Et.sum(0, keepdims=True)


def _at(value_Et, index_Et, index_1t):
    """The value of every token at an index."""
    return jnp.where(index_Et == index_1t, value_Et, 0).sum(0, keepdims=True)


def _within_groups(key_Et, expert_Et, num_experts, spec, part):
    """The keys with -inf outside the groups that are kept. A group's first expert stands for it in the choice of groups."""
    if spec.groups == spec.groups_kept:
        return key_Et
    size = num_experts // spec.groups
    by_group_Et = jnp.full(key_Et.shape, -jnp.inf)
    first_Et = kept_Et = jnp.full(key_Et.shape, False)
    for first in range(0, num_experts, size):
        key, expert, own = part(key_Et, expert_Et, first, size)
        best = [_at(key, expert, best_1t) for best_1t in top(key, expert, min(2, size), own)]
        first_Et |= expert_Et == first
        by_group_Et = jnp.where(expert_Et == first, sortable(sum(best)), by_group_Et)
    for first_1t in top(by_group_Et, expert_Et, spec.groups_kept, first_Et):
        kept_Et |= (expert_Et >= first_1t) & (expert_Et < first_1t + size)
    return jnp.where(kept_Et, key_Et, -jnp.inf)
