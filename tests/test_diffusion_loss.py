"""The objective on a model small enough to enumerate: every mask, every order."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax.diffusion import corrupt as corrupt_lib
from llada_jax.diffusion import likelihood
from llada_jax.diffusion import loss as loss_lib
from llada_jax.diffusion import schedule as schedule_lib
from llada_jax.model import transformer
from pallas_kernels.attention import AttentionSpec

L, V, MASK = 4, 5, 4
SCHEDULES = ("linear", "cosine", "polynomial")
MODEL = config_lib.Model(vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, num_experts=4, experts_per_token=2, expert_size=8,
                         max_length=L, init_std=0.6)


@pytest.fixture(scope="module")
def model():
    return transformer.build(MODEL)


@pytest.fixture(scope="module")
def variables(model):
    return jax.jit(model.init)(jax.random.key(3))


def terms_of(model, variables, tokens_BT, masked_BT, p_BT, weight):
    noisy_BT = jnp.where(masked_BT, MASK, tokens_BT)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return loss_lib.elbo_terms(model.apply, model.cross_entropy, variables, tokens_BT, noisy_BT, masked_BT, p_BT, positions_BT, AttentionSpec(),
                               weight)[0]


def all_masks(length):
    return np.array(list(itertools.product([False, True], repeat=length)))


@pytest.fixture(scope="module")
def enumerated(model, variables):
    """For one row: all masks (2^L, L), -log p(token | visible) at masked positions, and the closed-form bound."""
    tokens_T = np.array([2, 0, 3, 0])
    masks = all_masks(L)
    tokens_BT = jnp.broadcast_to(tokens_T, masks.shape)
    run = jax.jit(lambda v: terms_of(model, v, tokens_BT, jnp.asarray(masks), jnp.ones(masks.shape), jnp.ones_like).nll_BT)
    ce = np.asarray(run(variables), np.float64)
    sizes = masks.sum(1)
    bound = sum(ce[s].sum() / (k * math.comb(L, k)) for s, k in enumerate(sizes) if k)
    return tokens_T, masks, ce, bound


def quadrature(nodes=64):
    x, w = np.polynomial.legendre.leggauss(nodes)
    return (x + 1) / 2, w / 2


@pytest.mark.parametrize("min_noise, max_noise", [(0.0, 1.0), (0.1, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bernoulli_loss_is_unbiased(enumerated, schedule, min_noise, max_noise):
    """∫ dt Σ_S p(t)^k (1 - p(t))^(L - k) weight(p(t)) Σ CE(S) = Σ_S Σ CE(S) / (k C(L, k)), as ∫ p^(k-1) (1-p)^(L-k) dp = 1 / (k C(L, k)).

    A band cuts the integral over p off on both sides and scales the rest, alike on every schedule.
    """
    _, masks, ce, bound = enumerated
    k, total = masks.sum(1), ce.sum(1)
    chance = lambda p: p[:, None] ** k * (1 - p[:, None]) ** (L - k)
    t, w = quadrature()
    band = min_noise, max_noise
    p = np.asarray(schedule_lib.mask_probability(jnp.asarray(t, jnp.float32), schedule, 3.0, *band), np.float64)
    weight = np.asarray(loss_lib.weight_function("elbo", schedule, 3.0, *band)(jnp.asarray(p, jnp.float32)), np.float64)
    q = min_noise + (max_noise - min_noise) * t
    expected = (w[:, None] * chance(q) / q[:, None] * total).sum()  # ∫ dp / p over the band, divided by its width
    assert min_noise - 1e-6 <= p.min() and p.max() <= max_noise + 1e-6
    assert np.isclose((w[:, None] * chance(p) * weight[:, None] * total).sum(), expected, rtol=1e-4)
    assert min_noise or np.isclose(expected, bound, rtol=1e-6)


def test_count_weighted_loss_is_unbiased(enumerated):
    """k uniform in 1..L, a uniform set of that size, weight L/k."""
    _, masks, ce, bound = enumerated
    weight = loss_lib.weight_function("count", "linear", 2.0)
    expected = 0.0
    for k in range(1, L + 1):
        of_size = ce[masks.sum(1) == k].sum(1)
        expected += of_size.mean() * float(weight(jnp.float32(k / L))) / L
    assert np.allclose(expected, bound, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_elbo_weight_is_the_log_derivative_of_the_mask_probability(schedule):
    t = jnp.linspace(0.05, 0.95, 19)
    probability = lambda t: schedule_lib.mask_probability(t, schedule, 2.5)
    derivative = jax.vmap(jax.grad(probability))(t) / probability(t)
    np.testing.assert_allclose(schedule_lib.elbo_weight(probability(t), schedule, 2.5), derivative, rtol=2e-4)
    assert np.isfinite(schedule_lib.elbo_weight(jnp.array([1e-3, 1.0]), schedule, 2.5, 1e-3)).all()


def test_schedules_run_from_nothing_to_everything_above_the_smallest_noise():
    for schedule in SCHEDULES:
        p = schedule_lib.mask_probability(jnp.linspace(0, 1, 101), schedule, 2.0, 0.01)
        assert np.isclose(p[0], 0.01, atol=1e-6) and np.isclose(p[-1], 1.0, atol=1e-6) and (np.diff(p) > 0).all()
    with pytest.raises(ValueError, match="unknown schedule"):
        schedule_lib.mask_probability(t=jnp.zeros(1), schedule="quadratic")


def test_bound_is_above_the_exact_likelihood(enumerated):
    """The any-order sampler draws an order uniformly and then token by token: -log of its probability is below the bound (Jensen)."""
    _, masks, ce, bound = enumerated
    row = {tuple(mask): i for i, mask in enumerate(masks.tolist())}
    probabilities, logs = [], []
    for order in itertools.permutations(range(L)):
        hidden, nats = [True] * L, 0.0
        for position in order:
            nats += ce[row[tuple(hidden)], position]
            hidden[position] = False
        probabilities.append(math.exp(-nats))
        logs.append(nats)
    exact = -math.log(np.mean(probabilities))
    assert np.isclose(np.mean(logs), bound, rtol=1e-6)  # the bound is the mean over orders
    assert bound > exact + 1e-3  # and this model is not the same in every order


def test_monte_carlo_bound_agrees_with_enumeration(model, variables, enumerated):
    tokens_T, _, _, bound = enumerated
    B = 512
    batch = {"tokens": jnp.broadcast_to(jnp.asarray(tokens_T), (B, L)), "maskable": jnp.ones((B, L), bool), "index": jnp.arange(B),
             "position": jnp.broadcast_to(jnp.arange(L), (B, L))}
    run = jax.jit(lambda v, draw: likelihood.bound(model.apply, model.cross_entropy, v, batch, AttentionSpec(), MASK, 0, draw, 2))
    estimates = [run(variables, jnp.int32(draw)) for draw in range(2)]
    nats = np.mean([np.asarray(e.nats_B, np.float64) for e in estimates], axis=0)
    error = nats.std(ddof=1) / math.sqrt(B)
    assert 0 < error < 0.1 * bound and abs(nats.mean() - bound) < 3.5 * error
    # every number of masked tokens is drawn equally often, also within the draws of a row
    k = np.concatenate([np.asarray(e.p_BU)[:, 0] for e in estimates]) * L
    assert np.ptp(np.bincount(np.round(k).astype(int), minlength=L + 1)[1:]) <= 8
    again = likelihood.bound(model.apply, model.cross_entropy, variables, batch, AttentionSpec(), MASK, 0, 1, 2)
    np.testing.assert_allclose(again.nats_B, estimates[1].nats_B, rtol=1e-5)


def test_terms_stand_at_masked_positions_only(model, variables):
    tokens = jnp.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    masked = jnp.array([[True, False, True, False], [False] * 4])
    terms = terms_of(model, variables, tokens, masked, jnp.where(masked, 0.25, jnp.nan), lambda p: 1 / p)
    assert (np.asarray(terms.predicted_BT) == np.asarray(masked)).all()
    assert ((np.asarray(terms.nll_BT) > 0) == np.asarray(masked)).all()
    np.testing.assert_allclose(terms.weighted_BT, 4 * np.asarray(terms.nll_BT), rtol=1e-6)  # and no NaN from p of visible tokens


def test_autoregressive_terms_are_the_chain_rule(model, variables):
    """Σ exp(-nats) over all continuations of the first token is 1, segment by segment."""
    rows = np.array(list(itertools.product([1], range(V), range(V), [2], range(V), range(V))))
    segment = jnp.broadcast_to(jnp.array([1, 1, 1, 2, 2, 2]), rows.shape)
    positions = jnp.broadcast_to(jnp.array([0, 1, 2, 0, 1, 2]), rows.shape)
    run = jax.jit(lambda v, tokens: loss_lib.next_token_terms(model.apply, model.cross_entropy, v, tokens, jnp.ones(rows.shape, bool), positions,
                                                              AttentionSpec.own(segment=segment))[0])
    terms = run(variables, jnp.asarray(rows))
    assert np.isclose(np.exp(-np.asarray(terms.nll_BT, np.float64).sum(1)).sum(), 1, rtol=1e-4)
    assert (np.asarray(terms.predicted_BT) == [0, 1, 1, 0, 1, 1]).all()
    first, second = (np.asarray(terms.nll_BT)[:, part].sum(1).reshape(V * V, V * V) for part in (slice(0, 3), slice(3, 6)))
    assert np.ptp(first, axis=1).max() == 0 and np.ptp(second, axis=0).max() == 0  # neither segment reads the other


NORMALIZED = {  # by hand for rows of segments with 2 and 1, 1, and 0 target tokens, Σ of terms 3 and 4, 5, and 0
    "token": (3 + 4 + 5) / 4,
    "masked": (3 + 4 + 5) / 4,
    "sequence": (3 / 2 + 4 / 1 + 5 / 1) / 3,
    "batch": (3 + 4 + 5) / 2,
}


@pytest.mark.parametrize("normalization, expected", NORMALIZED.items())
def test_normalisation(normalization, expected):
    target = jnp.array([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    segment = jnp.array([[1, 1, 2, 2], [1, 1, 1, 0], [1, 1, 2, 0]])
    terms = jnp.array([[1.0, 2, 0, 4], [0, 0, 5, 0], [0, 0, 0, 0]])
    assert np.isclose(jnp.sum(loss_lib.term_weights(target, segment, normalization) * terms), expected)


def test_unknown_normalisation():
    with pytest.raises(ValueError, match="unknown normalization 'mean'"):
        loss_lib.term_weights(jnp.ones((1, 1), bool), jnp.ones((1, 1), int), "mean")


def test_supervised_form_leaves_the_prompt_clean(model, variables):
    """Prompt positions are never masked; padding that counts as answer is masked and scored."""
    B = 64
    tokens = jnp.broadcast_to(jnp.array([0, 1, 2, 3]), (B, L))
    answer = jnp.broadcast_to(jnp.array([False, True, True, True]), (B, L))
    noise = corrupt_lib.Noise(MASK, min_noise=0.5)
    t = corrupt_lib.times((0, 0, 0), jnp.arange(B), 1, B, "stratified")
    noisy, masked, p = corrupt_lib.corrupt((0, 0, 0), jnp.arange(B), tokens, answer, jnp.zeros_like(tokens), noise, t)
    assert (noisy[:, 0] == 0).all() and not masked[:, 0].any() and masked[:, 1:].any(0).all()
    terms = terms_of(model, variables, tokens, masked, p, lambda p: 1 / p)
    by_hand = np.mean([np.sum(np.asarray(terms.nll_BT)[b] / np.asarray(p)[b]) / 3 for b in range(B)])
    assert np.isclose(jnp.sum(loss_lib.term_weights(answer, jnp.ones_like(tokens), "sequence") * terms.weighted_BT), by_hand, rtol=1e-5)
