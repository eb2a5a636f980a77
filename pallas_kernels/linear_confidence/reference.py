"""Linear confidence in XLA: a loop over vocabulary tiles, and the arithmetic that every implementation shares.

All statistics are reductions that can be continued (online softmax, arXiv 1805.02867), so one function, `combine`, joins
the entries of a tile, the tiles of a vocabulary and the shards of devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TILE = 8192  # vocabulary entries at a time
NO_TOKEN = jnp.iinfo(jnp.int32).max


class Confidence(NamedTuple):
    """What a head says about each of M rows. A row with a NaN has token 0 and NaN elsewhere."""

    token_M: jax.Array  # int32
    logprob_M: jax.Array  # float32, nats; log-probability of `token` without noise
    runner_up_M: jax.Array  # float32; largest probability among the other tokens
    entropy_M: jax.Array  # float32, nats
    logsumexp_M: jax.Array  # float32


class Partial(NamedTuple):
    """What is kept of the logits x, and of the noisy ones z, of a part of the vocabulary. float32 but for the two tokens."""

    best: jax.Array  # max z
    token: jax.Array  # its id, int32
    chosen: jax.Array  # its x
    top: jax.Array  # max x
    top_token: jax.Array  # its id, int32
    second: jax.Array  # the largest x of another id
    total: jax.Array  # sum of exp(x - top)
    moment: jax.Array  # sum of (x - top) exp(x - top)


def partial(x_MD: jax.Array, w_DV: jax.Array, first: jax.Array | int, temperature: float, keys_M2: jax.Array | None,
            bits: jax.Array | Callable[[jax.Array], jax.Array] | None, suppressed: tuple[int, ...]) -> Partial:
    """See `api.linear_confidence_partial`; arrays (M,)."""
    V = w_DV.shape[1]
    width = min(TILE, V)

    def noise(column_N):
        if keys_M2 is not None:
            return counter_bits(keys_M2, first + column_N[None])
        return bits(first + column_N) if callable(bits) else jnp.take(bits, column_N, axis=1)

    def tile(i):
        start = jnp.minimum(i * width, V - width)  # the last tile overlaps the one before
        column_N = start + jnp.arange(width)
        logits_MN = jnp.matmul(x_MD, lax.dynamic_slice_in_dim(w_DV, start, width, 1), preferred_element_type=jnp.float32)
        logits_MN = jnp.where(column_N >= i * width, logits_MN, -jnp.inf)
        return of_logits(logits_MN, first + column_N[None], temperature, noise(column_N) if temperature > 0 else None, suppressed)

    parts = lax.fori_loop(1, -(-V // width), lambda i, parts: pair(parts, tile(i)), tile(0))
    return Partial(*(part[:, 0] for part in parts))


def of_logits(logits_MN: jax.Array, id_1N: jax.Array, temperature: float, bits_MN: jax.Array | None, suppressed: tuple[int, ...]) -> Partial:
    """The statistics of a tile of float32 logits; arrays (M, 1). Entries of -inf are left out."""
    for token in suppressed:
        logits_MN = jnp.where(id_1N == token, -jnp.inf, logits_MN)
    noisy_MN = logits_MN + temperature * gumbel(bits_MN) if bits_MN is not None else logits_MN
    id_MN = jnp.broadcast_to(id_1N, logits_MN.shape)
    ones = jnp.ones_like(logits_MN)
    return join(Partial(noisy_MN, id_MN, logits_MN, logits_MN, id_MN, -jnp.inf * ones, ones, 0 * ones), -1)


def join(parts: Partial, axis: int) -> Partial:
    """The statistics of all parts along an axis of the arrays, which stays with size 1."""
    return combine([parts], *(functools.partial(reduce, axis=axis, keepdims=True) for reduce in (jnp.max, jnp.min, jnp.sum)))


def pair(left: Partial, right: Partial) -> Partial:
    """The statistics of two parts together."""
    return combine([left, right], jnp.maximum, jnp.minimum, jnp.add)


def merge(parts: Partial, axis: str | tuple[str, ...]) -> Confidence:
    """The result over the shards along a mesh axis, the same on each; exchanges a few numbers a row, no logits."""
    return finish(combine([parts], *(lambda a, reduce=reduce: reduce(a, axis) for reduce in (lax.pmax, lax.pmin, lax.psum))))


def combine(parts: Sequence[Partial], maximum: Callable[..., jax.Array], least: Callable[..., jax.Array],
            add: Callable[..., jax.Array]) -> Partial:
    """Parts joined by three reductions, which take an array of each part: maximum, minimum and sum. The lowest id wins ties."""
    most = lambda *arrays: ordered(maximum(*map(ordered, arrays)))
    best, top = most(*(p.best for p in parts)), most(*(p.top for p in parts))
    token = least(*(jnp.where(p.best == best, p.token, NO_TOKEN) for p in parts))
    top_token = least(*(jnp.where(p.top == top, p.top_token, NO_TOKEN) for p in parts))
    chosen = most(*(jnp.where(p.token == token, p.chosen, -jnp.inf) for p in parts))
    second = most(*(jnp.where(p.top_token == top_token, p.second, p.top) for p in parts))
    shifts = [jnp.where(p.top == -jnp.inf, 0.0, p.top - top) for p in parts]
    weights = [jnp.where(p.top == -jnp.inf, 0.0, jnp.exp(shift)) for p, shift in zip(parts, shifts, strict=True)]
    total = add(*(weight * p.total for p, weight in zip(parts, weights, strict=True)))
    moment = add(*(weight * (p.moment + shift * p.total) for p, weight, shift in zip(parts, weights, shifts, strict=True)))
    return Partial(best, token, chosen, top, top_token, second, total, moment)


def ordered(a: jax.Array) -> jax.Array:
    """float32 as int32 in the same order with NaN above all, or back: XLA's reductions on CPUs and the maxima of GPUs drop NaN."""
    bits = lax.bitcast_convert_type(jnp.where(a == a, a, jnp.nan), jnp.int32) if a.dtype == jnp.float32 else a
    flipped = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # magnitudes of negative numbers rise as these fall
    return flipped if a.dtype == jnp.float32 else lax.bitcast_convert_type(flipped, jnp.float32)


def finish(parts: Partial) -> Confidence:
    """The result, when `parts` covers the whole vocabulary."""
    log_total = jnp.log(parts.total)
    logsumexp = parts.top + log_total
    runner_up = jnp.where(parts.token == parts.top_token, parts.second, parts.top)
    token = jnp.where(parts.token == NO_TOKEN, 0, parts.token)
    return Confidence(token, parts.chosen - logsumexp, jnp.exp(runner_up - logsumexp), log_total - parts.moment / parts.total, logsumexp)


def gumbel(bits: jax.Array) -> jax.Array:
    """-ln(-ln u) of u = (bits + 1/2) / 2^32, float32; near u = 1 from 1 - u, which is small and exact (arXiv 2409.02908)."""
    signed = lax.bitcast_convert_type(bits, jnp.int32)
    high = signed < 0
    small = (jnp.where(high, ~signed, signed).astype(jnp.float32) + 0.5) * 2.0**-32  # u, or 1 - u in the upper half
    return -jnp.log(jnp.where(high, -jnp.log1p(-small), -jnp.log(small)))


def counter_bits(keys_M2: jax.Array, id_1N: jax.Array) -> jax.Array:
    """(M, N) uint32: the first word of Threefry-2x32-20 (Random123, Salmon et al. 2011) of the counter (id, 0) under each row's key."""
    return threefry(keys_M2[:, :1], keys_M2[:, 1:2], id_1N)


def threefry(first_M1: jax.Array, second_M1: jax.Array, id_1N: jax.Array) -> jax.Array:
    """`counter_bits` of the two words of each key."""
    schedule = first_M1, second_M1, first_M1 ^ second_M1 ^ jnp.uint32(0x1BD11BDA)
    a = id_1N.astype(jnp.uint32) + schedule[0]
    b = jnp.broadcast_to(schedule[1], a.shape)
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            a = a + b
            b = ((b << jnp.uint32(rotation)) | (b >> jnp.uint32(32 - rotation))) ^ a
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return a
