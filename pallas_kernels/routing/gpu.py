"""Triton GPU kernels of the router's choice, in two launches without atomics and without a sort.

The first chooses for a tile of tokens and counts the pairs of each expert in that tile; the counts of the tiles before it, a small sum
in XLA, then give the second every pair's rank inside its expert. Letters: E experts, M tokens, A choices, t the tokens of one tile.

Tile sizes are a heuristic, not measured; tables override them (`dispatch.tiles`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import dispatch
from pallas_kernels.routing import choice


def choose(logits_ME: jax.Array, bias_E: jax.Array | None, spec) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Experts, mixing weights, the A best of the plain scores, and ranks, each (M, A), and the pairs of each expert, (E,).

    The rank of a pair is the number of earlier tokens that use its expert. Weights are float32, all else int32. Rules as in `reference.route`.
    """
    M, E = logits_ME.shape
    A, rows = spec.experts_per_token, pl.next_power_of_2(E)
    size = dispatch.tiles("route", f"E{E} A{A}", {"tokens": min(64, max(8, 2048 // rows)), "warps": 4})
    tile, warps = min(size["tokens"], pl.next_power_of_2(M)), size["warps"]
    plain = bias_E is None and spec.groups == 1  # then the best of the plain scores are the experts themselves
    bias_E = jnp.zeros(E, jnp.float32) if bias_E is None else bias_E.astype(jnp.float32)
    varying = jax.typeof(logits_ME).manual_axis_type.varying - jax.typeof(bias_E).manual_axis_type.varying
    bias_E = jax.lax.pcast(bias_E, tuple(varying), to="varying")
    array = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(logits_ME).manual_axis_type)  # for shard_map
    call = functools.partial(pl.pallas_call, grid=(pl.cdiv(M, tile),), interpret=dispatch.interpret(),
                             compiler_params=plt.CompilerParams(num_warps=warps))
    pairs = [array((M, A), dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32)[:2 if plain else 3]]
    count_IE, experts_MA, weights_MA, *selected_MA = call(
        functools.partial(_choose_kernel, spec=spec, rows=rows, tile=tile),
        out_shape=[array((pl.cdiv(M, tile), E), jnp.int32)] + pairs,
        name="route",
    )(logits_ME.astype(jnp.float32), bias_E)
    upto_IE = jnp.cumsum(count_IE, axis=0)
    rank_MA = call(
        functools.partial(_rank_kernel, rows=rows, tile=tile),
        out_shape=array((M, A), jnp.int32),
        name="route_rank",
    )(experts_MA, upto_IE - count_IE)
    return experts_MA, weights_MA, selected_MA[0] if selected_MA else experts_MA, rank_MA, upto_IE[-1]


def _choose_kernel(logits_ref, bias_ref, count_ref, experts_ref, weights_ref, *selected_ref, spec, rows, tile):
    M, E = logits_ref.shape
    expert_E, tokens, in_range_t = jnp.arange(rows), *_tokens(tile, M)
    mask_tE = in_range_t[:, None] & (expert_E < E)[None, :]
    logits_Et = plt.load(logits_ref.at[tokens, pl.ds(0, rows)], mask=mask_tE, other=-jnp.inf).T  # as a view: nothing moves
    bias_E1 = plt.load(bias_ref.at[pl.ds(0, rows)], mask=expert_E < E, other=0)[:, None]
    experts, weights, score_Et = choice.choose(logits_Et, bias_E1, E, spec, _part)
    expert_Et = jax.lax.broadcasted_iota(jnp.int32, (rows, tile), 0)

    count_E = (_load(experts, expert_Et) * in_range_t.astype(jnp.int32)[None, :]).sum(1)
    plt.store(count_ref.at[pl.program_id(0), pl.ds(0, rows)], count_E, mask=expert_E < E)
    _store(experts_ref, experts, tokens, in_range_t)
    _store(weights_ref, weights, tokens, in_range_t)
    if selected_ref:
        _store(selected_ref[0], choice.top(choice.sortable(score_Et), expert_Et, len(experts), expert_Et < E), tokens, in_range_t)


def _rank_kernel(experts_ref, before_ref, rank_ref, *, rows, tile):
    (M, A), E = experts_ref.shape, before_ref.shape[1]
    tokens, in_range_t = _tokens(tile, M)
    experts = [plt.load(experts_ref.at[tokens, pl.ds(a, 1)], mask=in_range_t[:, None], other=rows).T for a in range(A)]
    before_E = plt.load(before_ref.at[pl.program_id(0), pl.ds(0, rows)], mask=jnp.arange(rows) < E, other=0)
    expert_Et = jax.lax.broadcasted_iota(jnp.int32, (rows, tile), 0)
    earlier_Et = _earlier(_load(experts, expert_Et)) + before_E[:, None]
    ranks = [jnp.where(expert_Et == expert_1t, earlier_Et, 0).sum(0, keepdims=True) for expert_1t in experts]
    _store(rank_ref, ranks, tokens, in_range_t)


def _tokens(tile, num_tokens):
    """The slice of this program's tokens, and which of them exist: the last tile may hang over."""
    first = pl.program_id(0) * tile
    return pl.ds(first, tile), first + jnp.arange(tile) < num_tokens


def _part(key_Et, expert_Et, first, size):
    """A group of experts as a mask, as Triton has no slices."""
    return key_Et, expert_Et, (expert_Et >= first) & (expert_Et < first + size)


def _load(experts, expert_Et):
    """1 where a token uses the expert, which it does once at most."""
    return sum((expert_Et == expert_1t).astype(jnp.int32) for expert_1t in experts)


def _earlier(load_Et):
    """How many tokens to the left use the expert."""
    return jnp.cumsum(load_Et, axis=1) - load_Et


def _store(ref, columns, tokens, in_range_t):
    """Rows (1, t) as the columns of the tokens' part of (M, A)."""
    for a, column_1t in enumerate(columns):
        plt.store(ref.at[tokens, pl.ds(a, 1)], column_1t.T, mask=in_range_t[:, None])
