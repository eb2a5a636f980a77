"""Scaling laws: known parameters are found again from made-up losses, and intervals hold the truth as often as they say."""

import numpy as np
import pytest

from llada_jax.config import ConfigError
from llada_jax.evaluation import scaling

TRUE = scaling.Loss(1.7, 400.0, 0.34, 410.0, 0.28)
SIZES = np.geomspace(1e5, 3e6, 6)


def test_a_parabola_is_found_again():
    true = scaling.IsoFlop(7e5, 3.1, 0.05, True)
    found = scaling.isoflop(SIZES, true(SIZES))
    np.testing.assert_allclose(found[:3], true[:3], rtol=1e-6)
    assert found.inside and not scaling.isoflop(SIZES[-3:], true(SIZES[-3:])).inside
    with pytest.raises(ConfigError, match="no lowest point"):
        scaling.isoflop(SIZES, -true(SIZES))
    with pytest.raises(ConfigError, match="three sizes"):
        scaling.isoflop([1e5, 1e5, 1e6], [3.0, 3.0, 2.9])


def test_a_power_law_is_found_again():
    budgets = np.geomspace(1e13, 1e16, 4)
    found = scaling.power_law(budgets, 0.02 * budgets**0.51)
    np.testing.assert_allclose(found, (0.02, 0.51), rtol=1e-9)
    np.testing.assert_allclose(found(1e14), 0.02 * 1e14**0.51)


def test_intervals_of_the_best_size_hold_it():
    """200 made-up budgets of six sizes with three seeds each: the interval of 95 % holds the true optimum in at least 90 %."""
    true, sizes = scaling.IsoFlop(7e5, 3.1, 0.05, True), np.repeat(SIZES, 3)
    held = []
    for i in range(200):
        losses = true(sizes) + np.random.default_rng(i).normal(0, 0.01, len(sizes))
        fitted = scaling.isoflop(sizes, losses)(sizes)
        [(low, high)] = scaling.interval(lambda y: [scaling.isoflop(sizes, y).size], losses, fitted, parameters=3, draws=200, seed=i)
        held.append(low <= true.size <= high)
    assert np.mean(held) >= 0.9


@pytest.mark.slow
def test_intervals_of_the_laws_hold_them():
    """200 made-up grids of three budgets and four sizes: exponents of the best size and of the best loss, and a ratio of compute at equal loss."""
    budgets, steps = np.repeat([1e13, 3e13, 9e13], 4), np.tile([0.5, 0.8, 1.5, 3.0], 3)
    truth = scaling.PowerLaw(0.01, 0.5), scaling.PowerLaw(12.0, -0.04)
    sizes = steps * truth[0](budgets)
    losses = truth[1](budgets) + 0.1 * np.log(steps) ** 2
    held = []

    def laws(y):
        found = scaling.optimum(budgets, sizes, budgets / 6 / sizes, y)
        return found.size.exponent, found.loss.exponent, found.loss.inverse(3.5) / 1e13
    np.testing.assert_allclose(laws(losses), (0.5, -0.04, truth[1].inverse(3.5) / 1e13), rtol=1e-6)
    for i in range(200):
        y = losses + np.random.default_rng(i).normal(0, 0.005, len(losses))
        fitted = scaling.fitted(scaling.optimum(budgets, sizes, budgets / 6 / sizes, y), budgets, sizes)
        ends = scaling.interval(laws, y, fitted, parameters=9, draws=300, seed=i)
        held.append((ends[:, 0] <= laws(losses)) & (laws(losses) <= ends[:, 1]))
    assert (np.mean(held, 0) >= 0.9).all(), np.mean(held, 0)


def grid(noise):
    size, tokens = (x.reshape(-1) for x in np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6)))
    return size, tokens, TRUE(size, tokens) * np.exp(np.random.default_rng(0).normal(0, noise, len(size)))


def test_a_loss_of_size_and_data_is_found_again():
    size, tokens, losses = grid(0.0)
    found = scaling.loss_law(size, tokens, losses)
    np.testing.assert_allclose(found, TRUE, rtol=0.02)
    with pytest.raises(ConfigError, match="5 parameters"):
        scaling.loss_law(size[:4], tokens[:4], losses[:4])


def test_noise_and_an_outlier_move_it_little():
    size, tokens, losses = grid(0.001)
    losses[7] *= 1.3
    found = scaling.loss_law(size, tokens, losses)
    chosen = lambda law: (law.floor, law.size_exponent, law.data_exponent)
    np.testing.assert_allclose(chosen(found), chosen(TRUE), rtol=0.1)


def test_the_worth_of_repeats_is_found_again():
    true = TRUE._replace(repeats=15.0)
    size, tokens, epochs = (x.reshape(-1) for x in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e8, 1e10, 4), [1, 4, 16, 64]))
    found = scaling.loss_law(size, tokens, true(size, tokens, epochs), epochs)
    np.testing.assert_allclose(found, true, rtol=0.05)
    assert true(1e8, 1e9, 2) < true(1e8, 1e9, 1) and true(1e8, 1e9, 1e4) == pytest.approx(float(TRUE(1e8, 16e9)))


def test_what_cannot_be_settled_is_refused():
    with pytest.raises(ConfigError, match="do not settle"):
        hill = -scaling.IsoFlop(7e5, 3.1, 0.05, True)(SIZES)
        scaling.interval(lambda y: [scaling.isoflop(SIZES, y).size], hill + 0.001 * np.arange(6), hill, 3, draws=50)
    with pytest.raises(ConfigError, match="3 measurements of a fit of 3 numbers"):
        scaling.interval(lambda y: [y.mean()], [3.0, 2.9, 3.0], [3.0, 2.9, 3.0], 3)
    with pytest.raises(ConfigError, match="no lowest point"):
        scaling.isoflop([1e5, 2e5, 4e5], [3.0, 3.0, 3.0])
    with pytest.raises(ConfigError, match="3 sizes, 2 losses"):
        scaling.isoflop([1e5, 2e5, 4e5], [3.0, 3.0])
    with pytest.raises(ConfigError, match="losses number 1 is nan"):
        scaling.isoflop([1e5, 2e5, 4e5], [3.0, float("nan"), 3.1])
    with pytest.raises(ConfigError, match=r"sizes number 0 is 0\.0"):
        scaling.loss_law([0, 1, 2, 3, 4, 5], [1] * 6, [1] * 6)
