"""The structure of an AttentionSpec as the kernels of every back end read it: ids in one normal form, and the map of tiles."""

import jax
import jax.numpy as jnp
import numpy as np

LOW, HIGH = np.iinfo(np.int32).min, np.iinfo(np.int32).max  # no ids of a caller
UNSEEN = -1e30  # running maximum before the first key
FORBIDDEN = -2e38  # so far below UNSEEN that exp2 of the difference is 0, also in a row that has seen no key yet


def ids(spec, B: int, T: int, S: int, pad_T: int, pad_S: int) -> tuple[jax.Array, jax.Array]:
    """The structure in one normal form: (B, 3, T + pad_T) and (B, 3, S + pad_S) int32 rows segment, limit, match.

    A query sees a key iff the segments are equal and either the key's limit is at most the query's or the matches are equal.
    """
    zero_q, zero_k = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    segment_q, segment_k = (zero_q, zero_k) if spec.segment_q is None else (spec.segment_q, spec.segment_k)
    limit_q, limit_k = (zero_q, zero_k) if spec.block_q is None else (spec.block_q, spec.block_k)
    match_q, match_k = jnp.full_like(zero_q, LOW), jnp.full_like(zero_k, HIGH)  # never equal
    if spec.block_q is not None and spec.half_q is not None:
        clean_q, clean_k = spec.half_q == 1, spec.half_k == 1
        match_q, match_k = jnp.where(clean_q, LOW, limit_q), jnp.where(clean_k, HIGH, limit_k)
        limit_q, limit_k = jnp.where(clean_q, limit_q, limit_q - 1), jnp.where(clean_k, limit_k, HIGH)
    if spec.padding_k is not None:
        limit_k, match_k = jnp.where(spec.padding_k, HIGH, limit_k), jnp.where(spec.padding_k, HIGH, match_k)

    def rows(segment, limit, match, extra, unseen):  # appended positions are padding of the last one's segment
        tail = ((0, 0), (0, extra))
        parts = (jnp.pad(segment, tail, "edge"), jnp.pad(limit, tail, constant_values=unseen), jnp.pad(match, tail, constant_values=unseen))
        return jnp.stack(parts, 1).astype(jnp.int32)

    return rows(segment_q, limit_q, match_q, pad_T, LOW), rows(segment_k, limit_k, match_k, pad_S, HIGH)


def tile_map(ids_q: jax.Array, ids_k: jax.Array, tile_q: int, tile_k: int) -> tuple[jax.Array, jax.Array]:
    """Per pair of tiles (B, query tiles, key tiles): may it hold an allowed pair of positions; are all of them allowed."""

    def ranges(ids, tile, absent):
        x = ids.reshape(*ids.shape[:2], -1, tile)
        present = (x != absent) | (jnp.arange(3)[:, None, None] < 2)  # a match that is none stretches no range
        return jnp.where(present, x, HIGH).min(-1), jnp.where(present, x, LOW).max(-1)

    low_q, high_q = (jnp.moveaxis(x, 1, 0)[:, :, :, None] for x in ranges(ids_q, tile_q, LOW))
    low_k, high_k = (jnp.moveaxis(x, 1, 0)[:, :, None, :] for x in ranges(ids_k, tile_k, HIGH))
    (segment, _, match), (_, limit, _) = (low_q <= high_k) & (low_k <= high_q), low_k <= high_q
    one_segment = (low_q[0] == high_q[0]) & (low_k[0] == high_k[0])
    return segment & (limit | match), segment & one_segment & (high_k[1] <= low_q[1])


def allowed(ids_q, ids_k) -> jax.Array:
    """The mask of a pair of tiles from their segments, limits and matches, (query side, key side), in shapes that broadcast to the scores'."""
    (segment_q, limit_q, match_q), (segment_k, limit_k, match_k) = ids_q, ids_k
    return (segment_k == segment_q) & ((limit_k <= limit_q) | (match_k == match_q))
