"""Noise: what is masked how often, and what it depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.diffusion import corrupt as corrupt_lib

MASK = 99


def draw(noise=corrupt_lib.Noise(MASK), *, B=8, T=16, step=5, seed=1, index=None, t=None, maskable=None, unit=None, number=0, batch_size=None):
    index = jnp.arange(B) if index is None else index
    key = (seed, step, number)
    unit = jnp.zeros((B, T), jnp.int32) if unit is None else unit
    t = corrupt_lib.times(key, index, T, batch_size or B, noise.time_sampling) if t is None else t
    tokens = jnp.broadcast_to(jnp.arange(T), (B, T))
    maskable = jnp.ones((B, T), bool) if maskable is None else maskable
    return corrupt_lib.corrupt(key, index, tokens, maskable, unit, noise, t)


def test_masks_have_the_stated_probability_and_are_independent():
    B, T, p = 4096, 6, 0.3
    noisy, masked, probability = draw(B=B, T=T, t=jnp.full((B, 1), p))
    masked = np.asarray(masked, np.float64)
    assert np.allclose(probability, p)
    assert abs(masked.mean() - p) < 4 * np.sqrt(p * (1 - p) / (B * T))
    assert (np.abs(masked.mean(0) - p) < 4.5 * np.sqrt(p * (1 - p) / B)).all()  # at every position
    correlation = np.corrcoef(masked.T)[np.triu_indices(T, 1)]
    assert (np.abs(correlation) < 4.5 / np.sqrt(B)).all()  # between positions
    assert np.abs(np.corrcoef(masked[:-1, 0], masked[1:, 0])[0, 1]) < 4.5 / np.sqrt(B)  # between samples
    assert (np.asarray(noisy) == np.where(masked > 0, MASK, np.arange(T))).all()


def test_exact_count_masks_exactly_its_share_and_every_set_alike():
    B, T = 6000, 5
    noise = corrupt_lib.Noise(MASK, corruption="exact_count")
    _, masked, p = draw(noise, B=B, T=T, batch_size=B)
    count = np.asarray(masked).sum(1)
    assert np.allclose(count / T, np.asarray(p)[:, 0]) and (np.asarray(p) == np.asarray(p)[:, :1]).all()
    assert np.abs(np.bincount(count, minlength=T + 1)[1:] - B / T).max() <= 1  # stratified: k is uniform in 1..T
    pairs = np.asarray(masked)[count == 2] @ (1 << np.arange(T))
    found = np.bincount(pairs, minlength=1 << T)
    found = found[found > 0]
    assert len(found) == 10 and np.abs(found - found.sum() / 10).max() < 5 * np.sqrt(found.sum() / 10)


def test_exact_count_is_taken_within_each_unit_over_maskable_positions():
    B, T = 200, 9
    unit = jnp.broadcast_to(jnp.array([0, 0, 0, 0, 1, 1, 1, 1, 1]), (B, T))
    maskable = jnp.broadcast_to(jnp.array([1, 1, 1, 0, 0, 1, 1, 1, 1], bool), (B, T))
    _, masked, p = draw(corrupt_lib.Noise(MASK, corruption="exact_count", time_sampling="independent"), B=B, T=T, unit=unit, maskable=maskable)
    masked, p = np.asarray(masked), np.asarray(p)
    assert not masked[:, 3:5].any()
    for part, length in ((slice(0, 3), 3), (slice(5, 9), 4)):
        assert np.allclose(masked[:, part].sum(1) / length, p[:, part].T)
    assert len({tuple(row) for row in np.round(p[:, (0, 5)], 3).tolist()}) == 12  # the units draw their own k


def test_the_complementary_mask_is_the_rest():
    for corruption in ("bernoulli", "exact_count"):
        maskable = jnp.broadcast_to(jnp.arange(16) > 2, (8, 16))
        _, masked, p = draw(corrupt_lib.Noise(MASK, corruption=corruption), maskable=maskable)
        _, rest, q = draw(corrupt_lib.Noise(MASK, corruption=corruption, complementary=True), maskable=maskable)
        assert ((masked ^ rest) == maskable).all() and not (masked & rest).any()
        assert np.allclose(np.asarray(p + q)[np.asarray(maskable)], 1)


def test_noise_is_a_function_of_seed_step_sample_and_position():
    for corruption in ("bernoulli", "exact_count"):
        noise = corrupt_lib.Noise(MASK, corruption=corruption, time_sampling="independent")
        _, whole, p = draw(noise)
        order = jnp.array([6, 1, 3])
        _, some, q = draw(noise, B=3, index=order, batch_size=8)  # other rows of the batch, another order
        assert (np.asarray(some) == np.asarray(whole)[order]).all() and (np.asarray(p)[order] == np.asarray(q)).all()
        for other in (dict(seed=2), dict(step=6), dict(number=1), dict(index=jnp.arange(8) + 8)):
            assert (np.asarray(draw(noise, **other)[1]) != np.asarray(whole)).any(), other


def test_kept_positions_keep_their_noise_under_padding_and_cut():
    t = jnp.full((8, 1), 0.5)
    _, short, _ = draw(T=10, t=t)
    _, long, _ = draw(T=16, t=t)
    _, cut, _ = draw(T=16, t=t, maskable=jnp.broadcast_to(jnp.arange(16) < 10, (8, 16)))
    assert (np.asarray(long)[:, :10] == np.asarray(short)).all()
    assert (np.asarray(cut)[:, :10] == np.asarray(short)).all() and not np.asarray(cut)[:, 10:].any()
    assert np.asarray(short).any()


def test_stratified_times_cover_the_unit_interval_evenly_and_independent_ones_do_not():
    B = 64
    index = jnp.arange(B) + 3 * B
    even = np.sort(np.asarray(corrupt_lib.times((0, 3, 0), index, 2, B, "stratified")), axis=0)
    assert np.allclose(np.diff(even, axis=0), 1 / B, atol=1e-6) and even.min() >= 0 and even.max() < 1
    loose = np.sort(np.asarray(corrupt_lib.times((0, 3, 0), index, 2, B, "independent")), axis=0)
    assert np.diff(loose, axis=0).max() > 2 / B and loose.min() >= 0 and loose.max() < 1


@pytest.mark.parametrize("sampling", ["stratified", "independent"])
def test_times_of_a_sample_are_uniform_over_steps(sampling):
    steps = jnp.arange(4000)
    times = np.asarray(jax.vmap(lambda step: corrupt_lib.times((7, step, 0), jnp.array([5]), 1, 8, sampling)[0, 0])(steps))
    deviation = np.abs(np.sort(times) - (np.arange(4000) + 0.5) / 4000).max()
    assert deviation < 1.8 / np.sqrt(4000)  # Kolmogorov-Smirnov, 0.3 %
    assert np.abs(np.corrcoef(times[:-1], times[1:])[0, 1]) < 4.5 / np.sqrt(4000)


def test_cut_lengths_are_rare_and_uniform():
    lengths = np.asarray(jax.vmap(lambda step: corrupt_lib.cut_length((0, step, 0), 32, 0.25, 8))(jnp.arange(8000)))
    cut = lengths[lengths < 32]
    assert abs((len(cut) + len(cut) / 24) / 8000 - 0.25) < 0.025  # a cut to the whole length is not seen
    assert cut.min() == 8 and cut.max() == 31 and np.bincount(cut, minlength=32)[8:].min() > 40
    assert (np.asarray(jax.vmap(lambda step: corrupt_lib.cut_length((0, step, 0), 32, 0.0, 8))(jnp.arange(100))) == 32).all()
    assert int(corrupt_lib.cut_length((0, 0, 0), 4, 1.0, 8)) == 4  # rows shorter than the shortest stay whole
