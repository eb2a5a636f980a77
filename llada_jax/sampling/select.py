"""Which open slots are written at this step: pure functions of static shapes, in which no row reads another.

`score_BC` orders slots, larger first; `open_BC` marks those that still hold the mask token; the first slot wins ties. Each returns
(B, C) bool. A score that is not a number comes last among the open slots, so that a loop over them still ends.
"""

from typing import Any

import jax
import jax.numpy as jnp

LOWEST = jnp.finfo(jnp.float32).min


def share(total: Any, parts: Any, index: Any) -> Any:
    """How much of `total` falls to part `index` of `parts` as even ones as possible, the larger ones first."""
    return total // parts + (index < total % parts)


def rounded_share(left: Any, steps_left: Any) -> Any:
    """left / steps_left to the nearest integer, halves to the even one: dllm's quota of a linear schedule."""
    twice = 2 * left + steps_left
    up = twice // (2 * steps_left)
    return up - ((twice % (2 * steps_left) == 0) & (up % 2 == 1))


def rank(score_BC: jax.Array, open_BC: jax.Array) -> jax.Array:
    """Place of each open slot, the best one 0; closed slots come after all open ones. (B, C) int32."""
    key_BC = jnp.where(open_BC, -jnp.nan_to_num(score_BC, nan=LOWEST), jnp.inf)
    return jnp.argsort(jnp.argsort(key_BC, axis=-1, stable=True), axis=-1).astype(jnp.int32)


def top(score_BC: jax.Array, open_BC: jax.Array, count_B: jax.Array) -> jax.Array:
    """The `count` best open slots of each row."""
    return (rank(score_BC, open_BC) < count_B[:, None]) & open_BC


def best(score_BC: jax.Array, open_BC: jax.Array) -> jax.Array:
    """The best open slot of each row."""
    return (rank(score_BC, open_BC) == 0) & open_BC


def sorted_scores(score_BC: jax.Array, open_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(rank, scores by rank): closed slots last, whatever their scores."""
    rank_BC = rank(score_BC, open_BC)
    order_BC = jnp.argsort(rank_BC, axis=-1)
    return rank_BC, jnp.take_along_axis(jnp.where(open_BC, score_BC, LOWEST), order_BC, axis=-1)


def threshold(score_BC: jax.Array, open_BC: jax.Array, least: Any, slack: float = 0.0) -> jax.Array:
    """Every slot of at least `least`, and the best one (Fast-dLLM, arXiv 2505.22618); with `slack` also all within it of the best (dInfer)."""
    sure_BC = score_BC >= least
    if slack:
        sure_BC |= score_BC >= jnp.max(jnp.where(open_BC, score_BC, LOWEST), axis=-1, keepdims=True) - slack
    return (sure_BC & open_BC) | best(score_BC, open_BC)


def factor(prob_BC: jax.Array, open_BC: jax.Array, scale: Any) -> jax.Array:
    """The longest run of the surest slots whose r-th has a probability of at least 1 - scale / (r + 1), and the surest (Fast-dLLM)."""
    rank_BC, sorted_BC = sorted_scores(prob_BC, open_BC)
    r_C = jnp.arange(1, prob_BC.shape[-1] + 1)
    enough_BC = (r_C == 1) | (sorted_BC >= 1 - scale / (r_C + 1))
    count_B = jnp.cumprod(enough_BC.astype(jnp.int32), axis=-1).sum(-1)
    return (rank_BC < count_B[:, None]) & open_BC


def hierarchical(prob_BC: jax.Array, open_BC: jax.Array, position_BC: jax.Array, high: Any, low: Any) -> jax.Array:
    """Slots above `high`, the best one of each run of neighbouring open slots where it is above `low`, and the best of all (dInfer)."""
    C = prob_BC.shape[-1]
    before_BC = jnp.pad(open_BC[:, :-1], ((0, 0), (1, 0))) & (jnp.diff(position_BC, axis=-1, prepend=position_BC[:, :1] - 2) == 1)
    run_BC = jnp.where(open_BC, jnp.cumsum(open_BC & ~before_BC, axis=-1) - 1, C)
    shown_BC = jnp.where(open_BC, jnp.nan_to_num(prob_BC, nan=LOWEST), LOWEST)
    highest_BR = jax.vmap(lambda run_C, shown_C: jnp.full(C + 1, LOWEST, shown_C.dtype).at[run_C].max(shown_C))(run_BC, shown_BC)
    first_BC = shown_BC == jnp.take_along_axis(highest_BR, run_BC, axis=-1)
    return (open_BC & ((prob_BC > high) | (first_BC & (prob_BC > low)))) | best(prob_BC, open_BC)


def surest(entropy_BC: jax.Array, open_BC: jax.Array, limit: Any, most: int = 0) -> jax.Array:
    """Slots whose entropy is below `limit`, the `most` lowest if there are more, and at least the lowest (MED, arXiv 2510.19990)."""
    count_B = jnp.maximum((open_BC & (entropy_BC < limit)).sum(-1), 1)
    return top(-entropy_BC, open_BC, jnp.minimum(count_B, most) if most else count_B)


def contiguous(entropy_BC: jax.Array, open_BC: jax.Array, limit: Any, most: int = 0) -> jax.Array:
    """Open slots from the first one on while their entropies are below `limit`, at most `most`, at least one."""
    sure_BC = jnp.cumprod((~open_BC | (entropy_BC < limit)).astype(jnp.int32), axis=-1) > 0
    count_B = jnp.maximum((open_BC & sure_BC).sum(-1), 1)
    return first(open_BC, jnp.minimum(count_B, most) if most else count_B)


def first(open_BC: jax.Array, count_B: Any) -> jax.Array:
    """The first `count` open slots."""
    return open_BC & (jnp.cumsum(open_BC, axis=-1) <= jnp.broadcast_to(count_B, open_BC.shape[:1])[:, None])


def entropy_bounded(entropy_BC: jax.Array, open_BC: jax.Array, limit: Any) -> jax.Array:
    """The most slots, lowest entropy first, whose entropies but the largest add up to at most `limit` (EB-Sampler, arXiv 2505.24857)."""
    rank_BC, sorted_BC = sorted_scores(-entropy_BC, open_BC)
    total_BC = jnp.cumsum(jnp.where(sorted_BC > LOWEST, -sorted_BC, 0.0), axis=-1)
    count_B = 1 + (total_BC[:, :-1] <= limit).sum(-1)  # the sum over the slots before it decides on each
    return (rank_BC < count_B[:, None]) & open_BC


def edits(token_BC: jax.Array, prob_BC: jax.Array, canvas_BC: jax.Array, written_BC: jax.Array, least: Any) -> jax.Array:
    """Written slots for which another token is proposed with a probability above `least` (LLaDA2.1)."""
    return written_BC & (token_BC != canvas_BC) & (prob_BC > least)
