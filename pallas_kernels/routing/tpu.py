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
from pallas_kernels.routing import choice

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
    experts, weights, score_Et = choice.choose(logits_ref[...], bias_ref[...], E, spec, _part)
    chosen = [expert_Et == expert_1t for expert_1t in experts]

    in_range_1t = pl.program_id(0) * t + jax.lax.broadcasted_iota(jnp.int32, (1, t), 1) < num_tokens  # the last tile may hang over
    load_Et = jnp.where(functools.reduce(jnp.logical_or, chosen) & in_range_1t, 1.0, 0.0)
    earlier_Et = jnp.dot(load_Et.astype(jnp.bfloat16), _before(t), preferred_element_type=jnp.float32)  # exact: sums of 0 and 1
    earlier_Et = earlier_Et.astype(jnp.int32) + count_ref[...]
    count_ref[...] += load_Et.sum(1, keepdims=True).astype(jnp.int32)

    for a, (expert_1t, mask_Et, weight_1t) in enumerate(zip(experts, chosen, weights, strict=True)):
        experts_ref[a:a + 1, :] = expert_1t
        weights_ref[a:a + 1, :] = weight_1t
        rank_ref[a:a + 1, :] = jnp.where(mask_Et, earlier_Et, 0).sum(0, keepdims=True)
    if selected_ref:
        for a, expert_1t in enumerate(choice.top(choice.sortable(score_Et), expert_Et, len(experts), True)):
            selected_ref[0][a:a + 1, :] = expert_1t


def _part(key_Et, expert_Et, first, size):
    """A group of experts as a slice."""
    return key_Et[first:first + size], expert_Et[first:first + size], True


def _before(t):
    """Ones strictly above the diagonal: x @ it sums what stands to the left, along the lanes."""
    return (jax.lax.broadcasted_iota(jnp.int32, (t, t), 0) < jax.lax.broadcasted_iota(jnp.int32, (t, t), 1)).astype(jnp.bfloat16)
