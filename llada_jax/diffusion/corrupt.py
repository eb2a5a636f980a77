"""Corruption: which tokens become masks. Noise depends on (seed, step, draw, sample index, position) and nothing else.

Every position of a sample has its own uniform number, drawn by a counter from keys folded in that order. Uniform draws
are prefix-stable, so a shorter or padded row sees the same numbers, on any mesh, under any accumulation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada_jax import config as config_lib
from llada_jax import shapes
from llada_jax.diffusion import schedule as schedule_lib

TIME, POSITION, ATTENTION, EMBEDDING = range(4)  # streams of one sample


class Noise(NamedTuple):
    """What a corruption needs to know."""

    mask_id: int
    schedule: str = "linear"
    power: float = 2.0
    min_noise: float = 0.0
    max_noise: float = 1.0
    time_sampling: str = "stratified"  # stratified | independent
    corruption: str = "bernoulli"  # bernoulli | exact_count
    complementary: bool | jax.Array = False  # mask exactly the maskable positions that the same key would leave; may be (B, 1), a row each

    @classmethod
    def of(cls, config: config_lib.Diffusion, mask_id: int) -> "Noise":
        return cls(mask_id, config.schedule, config.schedule_power, config.min_noise, config.max_noise, config.time_sampling, config.corruption)


def sample_uniforms(key: tuple[jax.Array | int, ...], index_B: jax.Array, stream: int, length: int) -> jax.Array:
    """Uniforms in [0, 1) of shape (B, length) for samples `index_B`; key = (seed, step, draw)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (length,)))(_sample_keys(key, index_B, stream))


def sample_normals(key: tuple[jax.Array | int, ...], index_B: jax.Array, stream: int, shape: tuple[int, int]) -> jax.Array:
    """Standard normals (B, length, width) in the same way; of one width, a longer row begins with the numbers of a shorter one."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(_sample_keys(key, index_B, stream))


def _sample_keys(key: tuple[jax.Array | int, ...], index_B: jax.Array, stream: int) -> jax.Array:
    seed, step, draw = key
    base = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, index), draw), stream))(index_B)


def times(key: tuple[jax.Array | int, ...], index_B: jax.Array, units: int, batch_size: int, sampling: str) -> jax.Array:
    """Times in [0, 1) of shape (B, units).

    stratified: (u + i / batch_size) mod 1 with one u a step and unit, i the sample's index in the global batch, so that
    each step covers [0, 1) evenly; independent: one draw a sample and unit.
    """
    if sampling == "independent":
        return sample_uniforms(key, index_B, TIME, units)
    seed, step, draw = key
    base = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), draw)
    shared = jax.random.uniform(jax.random.fold_in(base, TIME), (units,))
    return (shared + ((index_B % batch_size) / batch_size)[:, None]) % 1.0


def corrupt(key: tuple[jax.Array | int, ...], index_B: jax.Array, tokens_BT: jax.Array, maskable_BT: jax.Array, unit_BT: jax.Array,
            noise: Noise, t_BU: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mask tokens: (noisy_BT int32, masked_BT bool, p_BT float32).

    key = (seed, step, draw); positions with equal `unit` share the time t_BU[:, unit]. `p` is each position's mask
    probability (bernoulli) or, for exact_count, the share k/L of the unit's L maskable positions that is masked, k uniform
    in 1..L on the linear schedule. Losses use p alone. Only maskable positions change.
    """
    shapes.check("B BT BT BT BU", index_B, tokens_BT, maskable_BT, unit_BT, t_BU)
    t_BT = jnp.take_along_axis(t_BU, unit_BT, axis=1)
    p_BT = schedule_lib.mask_probability(t_BT, noise.schedule, noise.power, noise.min_noise, noise.max_noise)
    u_BT = sample_uniforms(key, index_B, POSITION, tokens_BT.shape[1])
    if noise.corruption == "exact_count":
        rank_BT, length_BT = _rank_in_unit(u_BT, unit_BT, maskable_BT)
        count_BT = jnp.clip(jnp.floor(p_BT * length_BT) + 1, 1, jnp.maximum(length_BT, 1))
        p_BT = count_BT / jnp.maximum(length_BT, 1)
        masked_BT = maskable_BT & (rank_BT < count_BT)
    else:
        masked_BT = maskable_BT & (u_BT < p_BT)
    if noise.complementary is not False:
        masked_BT = maskable_BT & (masked_BT ^ noise.complementary)
        p_BT = jnp.where(noise.complementary, 1 - p_BT, p_BT)
    return jnp.where(masked_BT, noise.mask_id, tokens_BT), masked_BT, p_BT.astype(jnp.float32)


def _rank_in_unit(u_BT: jax.Array, unit_BT: jax.Array, maskable_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rank of each maskable position's uniform within its unit (ties by position), and the unit's number of maskable positions."""
    def one(u_T, unit_T, maskable_T):
        T = u_T.shape[0]
        unit_T = jnp.where(maskable_T, unit_T, T)  # the rest forms a last group
        count_U = jnp.zeros((T + 1,), jnp.int32).at[unit_T].add(1)
        start_U = jnp.cumsum(count_U) - count_U
        place_T = jnp.zeros((T,), jnp.int32).at[jnp.lexsort((u_T, unit_T))].set(jnp.arange(T, dtype=jnp.int32))
        return place_T - start_U[unit_T], jnp.where(maskable_T, count_U[unit_T], 0)
    return jax.vmap(one)(u_BT, unit_BT, maskable_BT)


def cut_length(key: tuple[jax.Array | int, ...], length: int, rate: float, shortest: int) -> jax.Array:
    """Length that a step's rows are cut to: `length`, or with probability `rate` uniform in shortest..length (int32).

    The tail becomes padding inside the static shape, so nothing recompiles and kept positions keep their noise
    (arXiv 2509.24389: 1 % of steps, shortest 8).
    """
    seed, step, draw = key
    base = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), draw)
    cut, u = jax.random.uniform(jax.random.fold_in(base, 2), (2,))
    shortest = min(shortest, length)
    return jnp.where(cut < rate, shortest + jnp.floor(u * (length - shortest + 1)).astype(jnp.int32), length)
