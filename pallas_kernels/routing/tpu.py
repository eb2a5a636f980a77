"""Mosaic TPU kernel of the router's choice: experts, mixing weights, and every pair's rank inside its expert, in one launch.

Tokens lie along the lanes and experts along the sublanes, so that a maximum over experts is a few elementwise operations and every
output row is dense. Letters: E experts, M tokens, A choices, t the tokens of one tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

LANES = 128
SEMANTICS = ("arbitrary",)  # tiles run in order: each continues the counts of those before it


def choose(logits_ME: jax.Array, bias_E: jax.Array | None, spec) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Experts, mixing weights, the A best of the plain scores, and ranks, each (M, A), and the pairs of each expert, (E,).

    The rank of a pair is the number of earlier tokens that use its expert. Weights are float32, all else int32. Rules as in `reference.route`.
    """
    M, E = logits_ME.shape
    A = spec.experts_per_token
    tile = min(pl.cdiv(M, LANES) * LANES, dispatch.tiles("route", f"E{E} A{A}", {"tokens": 256})["tokens"])
    plain = bias_E is None and spec.groups == 1  # then the best of the plain scores are the experts themselves
    bias_E1 = jnp.zeros((E, 1), jnp.float32) if bias_E is None else bias_E.astype(jnp.float32)[:, None]
    varying = jax.typeof(logits_ME).manual_axis_type.varying - jax.typeof(bias_E1).manual_axis_type.varying
    bias_E1 = jax.lax.pcast(bias_E1, tuple(varying), to="varying")
    array = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(logits_ME).manual_axis_type)  # for shard_map
    pairs = [array((A, M), dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32, jnp.int32)[:3 if plain else 4]]
    tokens = pl.BlockSpec((A, tile), lambda i: (0, i))
    whole = pl.BlockSpec((E, 1), lambda i: (0, 0))
    count_E1, experts_AM, weights_AM, rank_AM, *selected_AM = pl.pallas_call(
        functools.partial(_kernel, spec=spec, num_tokens=M),
        grid=(pl.cdiv(M, tile),),
        in_specs=[pl.BlockSpec((E, tile), lambda i: (0, i)), whole],
        out_specs=[whole] + [tokens] * len(pairs),
        out_shape=[array((E, 1), jnp.int32)] + pairs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
        interpret=dispatch.interpret(),
        name="route",
    )(logits_ME.astype(jnp.float32).T, bias_E1)
    selected_AM = selected_AM[0] if selected_AM else experts_AM
    return experts_AM.T, weights_AM.T, selected_AM.T, rank_AM.T, count_E1[:, 0]


def _kernel(logits_ref, bias_ref, count_ref, experts_ref, weights_ref, rank_ref, *selected_ref, spec, num_tokens):
    @pl.when(pl.program_id(0) == 0)
    def _():
        count_ref[...] = jnp.zeros_like(count_ref)

    E, t = logits_ref.shape
    expert_Et = jax.lax.broadcasted_iota(jnp.int32, (E, t), 0)
    score_Et = _scores(logits_ref[...], spec.score)
    biased_Et = score_Et + bias_ref[...]
    experts = _top(_within_groups(_sortable(biased_Et), expert_Et, spec), expert_Et, spec.experts_per_token)
    chosen = [expert_Et == expert_1t for expert_1t in experts]

    weights = [jnp.where(mask_Et, biased_Et if spec.bias_in_weight else score_Et, 0).sum(0, keepdims=True) for mask_Et in chosen]
    total_1t = sum(weights) + 1e-20 if spec.renormalize else 1.0

    in_range_1t = pl.program_id(0) * t + jax.lax.broadcasted_iota(jnp.int32, (1, t), 1) < num_tokens  # the last tile may hang over
    load_Et = jnp.where(functools.reduce(jnp.logical_or, chosen) & in_range_1t, 1.0, 0.0)
    earlier_Et = jnp.dot(load_Et.astype(jnp.bfloat16), _before(t), preferred_element_type=jnp.float32)  # exact: sums of 0 and 1
    earlier_Et = earlier_Et.astype(jnp.int32) + count_ref[...]
    count_ref[...] += load_Et.sum(1, keepdims=True).astype(jnp.int32)

    for a, (expert_1t, mask_Et, weight_1t) in enumerate(zip(experts, chosen, weights, strict=True)):
        experts_ref[a:a + 1, :] = expert_1t
        weights_ref[a:a + 1, :] = weight_1t / total_1t * spec.scale
        rank_ref[a:a + 1, :] = jnp.where(mask_Et, earlier_Et, 0).sum(0, keepdims=True)
    if selected_ref:
        for a, expert_1t in enumerate(_top(_sortable(score_Et), expert_Et, spec.experts_per_token)):
            selected_ref[0][a:a + 1, :] = expert_1t


def _scores(logits_Et, kind):
    if kind != "softmax":
        return jax.nn.sigmoid(logits_Et)
    exp_Et = jnp.exp(logits_Et - logits_Et.max(0, keepdims=True))
    return exp_Et / exp_Et.sum(0, keepdims=True)


def _sortable(score_Et):
    """NaN counts as largest."""
    return jnp.where(jnp.isnan(score_Et), jnp.inf, score_Et)


def _top(key_Et, index_Et, k):
    """k rounds of maximum and its first index, each (1, t); what was taken is out by a mask, as -inf may be a key."""
    free_Et = jnp.full(key_Et.shape, True)
    taken = []
    for _ in range(k):
        best_1t = jnp.where(free_Et, key_Et, -jnp.inf).max(0, keepdims=True)
        taken.append(jnp.where(free_Et & (key_Et == best_1t), index_Et, 2**30).min(0, keepdims=True))
        free_Et &= index_Et != taken[-1]
    return taken


def _within_groups(key_Et, expert_Et, spec):
    """The keys with -inf outside the groups that are kept. A group's first expert stands for it in the choice of groups."""
    if spec.groups == spec.groups_kept:
        return key_Et
    E = len(key_Et)
    size = E // spec.groups
    by_group_Et = jnp.full(key_Et.shape, -jnp.inf)
    for first in range(0, E, size):
        best = [jnp.where(expert_Et == best_1t, key_Et, 0).sum(0, keepdims=True)
                for best_1t in _top(key_Et[first:first + size], expert_Et[first:first + size], min(2, size))]
        by_group_Et = jnp.where(expert_Et == first, _sortable(sum(best)), by_group_Et)
    kept_Et = jnp.full(key_Et.shape, False)
    for first_1t in _top(by_group_Et, expert_Et, spec.groups_kept):
        kept_Et |= (expert_Et >= first_1t) & (expert_Et < first_1t + size)
    return jnp.where(kept_Et, key_Et, -jnp.inf)


def _before(t):
    """Ones strictly above the diagonal: x @ it sums what stands to the left, along the lanes."""
    return (jax.lax.broadcasted_iota(jnp.int32, (t, t), 0) < jax.lax.broadcasted_iota(jnp.int32, (t, t), 1)).astype(jnp.bfloat16)
