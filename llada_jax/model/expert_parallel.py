"""Experts that are split over devices: how tokens reach them and their outputs come back. Nothing is dropped, however the tokens choose.

A token travels once to every device that holds an expert of its, however many those are, and one weighted sum comes back, in the activations' dtype.

`gathered`: every token to every device and a reduce-scatter back; no bound on what one expert may get.
`exchanged`: an all-to-all of equal parts (capacity), or of as many rows as there are (ragged), with room for somewhat more than even routing
sends. Where that is too little on any device, all take `gathered` for this layer. Masked tokens look alike at high noise, so this does happen:
it is counted.

Top-8 of 64 experts on 8 devices have 5.43 of these in the mean: 19.5 KB a token leave a device of LLaDA-MoE-7B in bf16, 28.7 KB by `gathered`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llada_jax import partitioning
from pallas_kernels import routing

Experts = Callable[[jax.Array, jax.Array], jax.Array]  # (rows_RD sorted by expert, group sizes of the experts here) -> (R, D)
SAVED = ("routed", "dispatched")  # what the backward pass must find as it was: names for remat policies
SLACK = 1.12  # slots for a device over the tokens that even routing sends it
ROOM = 1.5  # rows of a device's experts over their mean number
FEW = 1024  # tokens of all devices together: below that the number of collectives counts, not their size


def touched(num_experts: int, experts_per_token: int, number: int) -> float:
    """Probability that a token needs a device with `number` of the experts, all choices being equally likely."""
    return 1 - math.comb(num_experts - number, experts_per_token) / math.comb(num_experts, experts_per_token)


def slots(tokens: int, num_experts: int, experts_per_token: int, number: int) -> int:
    """Rows that a device may send to one other; the last one stays empty, so that what is not sent has a row of zeros."""
    wanted = math.ceil(SLACK * touched(num_experts, experts_per_token, number) * tokens)
    return _whole_tiles(min(wanted, tokens) + 1)


def exchanges(dispatch: str, tokens: int, num_experts: int, experts_per_token: int, number: int) -> bool:
    """Whether a device's tokens go by `exchanged`, as kernels.expert_dispatch says."""
    if dispatch != "auto":
        return dispatch != "gathered"
    return num_experts // number * tokens > FEW and slots(tokens, num_experts, experts_per_token, number) < tokens


def gathered_parts(tokens: int, devices: int) -> int:
    """Into how many parts `gathered` cuts a device's tokens; all devices' tokens of one part are under way at once."""
    return 1 if devices * tokens <= FEW else max(n for n in range(1, max(devices // 2, 1) + 1) if tokens % n == 0)


def mixture(experts: Experts, number: int, num_experts: int, x_MD: jax.Array, experts_MA: jax.Array, weights_MA: jax.Array, axis: str,
            dispatch: str) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the chosen experts' outputs for this device's M tokens (M, D), and whether the lossless branch was needed (scalar bool).

    Inside shard_map. `number` of the experts live here, those from index(axis) · number on. `dispatch` is auto, gathered, capacity or ragged;
    auto takes equal parts where they are smaller than all tokens, and there are more than a few of these.
    """
    if not exchanges(dispatch, len(x_MD), num_experts, experts_MA.shape[1], number):
        return gathered(experts, number, x_MD, experts_MA, weights_MA, axis), jnp.bool(False)
    return exchanged(experts, number, num_experts, x_MD, experts_MA, weights_MA, axis, dispatch == "ragged")


def summed(experts: Experts, number: int, x_MD: jax.Array, experts_MA: jax.Array, weights_MA: jax.Array, axis: str) -> jax.Array:
    """As `mixture`, for tokens that every device of `axis` has."""
    return lax.psum(_own_part(experts, number, x_MD, experts_MA, weights_MA, axis), axis)


def gathered(experts: Experts, number: int, x_MD: jax.Array, experts_MA: jax.Array, weights_MA: jax.Array, axis: str) -> jax.Array:
    """Every device gets all tokens of the axis, and each adds what its own experts make of them; the sums are scattered back.

    Many tokens go part by part, since every device must have room for all choices of the tokens under way.
    """
    M, devices = len(x_MD), lax.axis_size(axis)

    def part(x_MD, experts_MA, weights_MA):
        numbers_MA = experts_MA.astype(jnp.float32)  # small integers are exact
        x_MD, weights_MA, numbers_MA = partitioning.all_gather(axis, x_MD, weights_MA, numbers_MA)
        out_MD = _own_part(experts, number, x_MD, numbers_MA.astype(jnp.int32), weights_MA, axis)
        return lax.psum_scatter(out_MD, axis, scatter_dimension=0, tiled=True)

    parts = gathered_parts(M, devices)
    if parts == 1:
        return part(x_MD, experts_MA, weights_MA)
    split = [a.reshape(parts, M // parts, -1) for a in (x_MD, experts_MA, weights_MA)]
    return lax.map(lambda xs: jax.checkpoint(part)(*xs), split).reshape(x_MD.shape)


def _own_part(experts, number, x_MD, experts_MA, weights_MA, axis):
    """What the experts of this device add to these tokens."""
    own_MA = experts_MA - lax.axis_index(axis) * number
    own_MA = jnp.where((own_MA >= 0) & (own_MA < number), own_MA, number)
    return _apply(experts, number, x_MD, own_MA, weights_MA, own_MA.size)


def _apply(experts, number, x_MD, own_MA, weights_MA, rows):
    """Weighted sum over the choices below `number`; fewer than `rows` of them where `rows` is less than all."""
    order = routing.plan(own_MA, number)  # choices of other devices' experts come last
    order = routing.Plan(order.pair_R[:rows], jnp.minimum(order.row_MA, rows - 1), order.group_sizes_E)
    rows_RD = experts(routing.gather_rows(x_MD, order), order.group_sizes_E)
    return routing.combine_rows(rows_RD, jnp.where(own_MA < number, weights_MA, 0), order)


def exchanged(experts: Experts, number: int, num_experts: int, x_MD: jax.Array, experts_MA: jax.Array, weights_MA: jax.Array, axis: str,
              ragged: bool) -> tuple[jax.Array, jax.Array]:
    """See `mixture`. The branch is the same on all devices of the mesh, as it holds collectives."""
    (M, A), P = experts_MA.shape, num_experts // number
    C = slots(M, num_experts, A, number)
    S = P * C  # rows of the buffers that travel
    R = min(_whole_tiles(math.ceil(ROOM * M * A)), S * A)  # rows that the experts here compute
    experts_MA = checkpoint_name(experts_MA, "routed")
    to_MAP = (experts_MA // number)[:, :, None] == jnp.arange(P)
    sent_MP = to_MAP.any(1)
    counts = lax.all_gather(jnp.stack([sent_MP.sum(0), to_MAP.sum((0, 1))]), axis)  # (source, tokens or choices, destination)
    tokens_PP, choices_PP = counts[:, 0], counts[:, 1]
    filled = jnp.maximum(tokens_PP.sum(0).max(), tokens_PP.sum(1).max()) >= S if ragged else tokens_PP.max() >= C
    over = filled | (choices_PP.sum(0).max() >= R)
    over = checkpoint_name(lax.pmax(over.astype(jnp.int32), partitioning.BATCH_AXES), "dispatched") > 0

    def exchange(x_MD, weights_MA):
        there, back, start_P, spare_P = _ragged(tokens_PP, axis, S) if ragged else _equal_parts(P, C, axis)
        row_MP = jnp.where(sent_MP, start_P + jnp.cumsum(sent_MP, 0) - 1, spare_P)
        target = jnp.where(sent_MP, row_MP, S + jnp.arange(M * P).reshape(M, P)).reshape(-1)
        pair_S = jnp.full(S, -1).at[target].set(jnp.arange(M * P), mode="drop", unique_indices=True)
        out = routing.Plan(jnp.maximum(pair_S, 0), row_MP, tokens_PP[0])
        named_SA = jnp.take(experts_MA, out.token_R, axis=0) - (out.pair_R % P * number)[:, None]
        named_SA = jnp.where((named_SA >= 0) & (named_SA < number) & (pair_S >= 0)[:, None], named_SA + 1, 0)  # 0: no choice
        send = routing.gather_rows(x_MD, out), routing.gather_rows(weights_MA, out), named_SA.astype(jnp.float32)
        x_SD, weights_SA, named_SA = (checkpoint_name(a, "dispatched") for a in partitioning.together(there, *send))
        named_SA = named_SA.astype(jnp.int32) - 1
        y_SD = _apply(experts, number, x_SD, jnp.where(named_SA < 0, number, named_SA), weights_SA, R)
        return routing.combine_rows(back(y_SD), None, out)

    lossless = lambda x_MD, weights_MA: gathered(experts, number, x_MD, experts_MA, weights_MA, axis)
    return lax.cond(over, lossless, exchange, x_MD, weights_MA), over


def _equal_parts(P: int, C: int, axis: str) -> tuple[Any, ...]:
    """(there, back, first row for each destination, its spare row) of an all-to-all of C rows for each."""
    move = lambda a: lax.all_to_all(a, axis, 0, 0, tiled=True)
    start_P = jnp.arange(P) * C
    return move, move, start_P, start_P + C - 1


def _ragged(tokens_PP: jax.Array, axis: str, S: int) -> tuple[Any, ...]:
    """The same of as many rows as there are, close together; `tokens_PP` holds the number from each source to each destination."""
    own = lax.axis_index(axis)
    before = lambda a, dim: jnp.cumsum(a, dim) - a
    at_source, at_target = before(tokens_PP, 1), before(tokens_PP, 0)  # where each part begins in its source's and its destination's buffer
    sent, got = (tokens_PP[own], at_source[own], at_target[own]), (tokens_PP[:, own], at_target[:, own], at_source[:, own])

    def move(a, parts, others):
        sizes, begin, begin_there = parts
        return lax.ragged_all_to_all(a, jnp.zeros_like(a), begin, sizes, begin_there, others[0], axis_name=axis)

    there, back = functools.partial(move, parts=sent, others=got), functools.partial(move, parts=got, others=sent)
    return there, back, at_source[own], S - 1


def _whole_tiles(rows: int) -> int:
    """Rounded up to what a tile of a 16-bit array holds on a TPU."""
    return -(-rows // 16) * 16
