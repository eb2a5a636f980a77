"""The mixture of experts against numpy: which experts, which weights, what the statistics and losses count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax.model import moe

B, T, D, E, A, F = 2, 6, 8, 5, 2, 4
CONFIG = config_lib.Model(hidden_size=D, num_heads=1, num_experts=E, experts_per_token=A, expert_size=F)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape)
    params = {"router": normal(0, D, E), "gate": normal(1, E, D, F), "up": normal(2, E, D, F), "down": normal(3, E, F, D)}
    return normal(4, B, T, D), params, 0.3 * normal(5, E)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def by_loops(x, params, bias, renormalize):
    """LLaDA-MoE's rule: top-k of softmax + bias; the mixing weight keeps the bias; no renormalisation unless asked."""
    x, params = np.asarray(x, np.float64), {key: np.asarray(p, np.float64) for key, p in params.items()}
    out, chosen = np.zeros(x.shape), {}
    for b, t in np.ndindex(B, T):
        scores = softmax(x[b, t] @ params["router"]) + (0 if bias is None else np.asarray(bias))
        best = np.argsort(-scores)[:A]
        weights = scores[best] / (scores[best].sum() if renormalize else 1)
        for e, weight in zip(best, weights, strict=True):
            gate = x[b, t] @ params["gate"][e]
            out[b, t] += weight * ((gate / (1 + np.exp(-gate)) * (x[b, t] @ params["up"][e])) @ params["down"][e])
        chosen[b, t] = set(best.tolist())
    return out, chosen


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_loops(inputs, with_bias, renormalize):
    x, params, bias = inputs
    bias = bias if with_bias else None
    config = dataclasses.replace(CONFIG, router_renormalize=renormalize, router_bias=with_bias)
    y, _, chosen = moe.moe(x, params, bias, jnp.ones((B, T), bool), config, config_lib.Kernels(), None)
    want, experts = by_loops(x, params, bias, renormalize)
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert all(set(np.asarray(chosen["experts"])[b, t].tolist()) == experts[b, t] for b, t in np.ndindex(B, T))


def test_the_bias_changes_choices(inputs):
    x, params, bias = inputs
    assert by_loops(x, params, None, False)[1] != by_loops(x, params, bias, False)[1]


def test_statistics_count_real_tokens_only(inputs):
    x, params, bias = inputs
    valid = jnp.arange(T)[None] < jnp.array([[T], [2]])
    _, stats, chosen = moe.moe(x, params, bias, valid, CONFIG, config_lib.Kernels(), None)
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"], np.float64)
    keep = np.asarray(valid)[..., None]
    one_hot = lambda experts: np.eye(E)[experts].sum(-2)
    np.testing.assert_allclose(stats.probability_BE, (softmax(logits) * keep).sum(1), atol=1e-5)
    np.testing.assert_allclose(stats.selected_BE, (one_hot(np.argsort(-logits, -1)[..., :A]) * keep).sum(1))  # of the plain probabilities
    np.testing.assert_allclose(stats.load_BE, (one_hot(np.asarray(chosen["experts"])) * keep).sum(1))  # of what ran
    np.testing.assert_allclose(stats.z_B, (np.log(np.exp(logits).sum(-1)) ** 2 * keep[..., 0]).sum(1), rtol=1e-5)
    assert stats.tokens_B.tolist() == [T, 2] and (np.asarray(stats.selected_BE) != np.asarray(stats.load_BE)).any()


def random_stats(layers=3):
    rng = np.random.RandomState(0)
    tokens = np.array([6.0, 2.0])
    probability = rng.dirichlet(np.ones(E), (layers, B)) * tokens[:, None]
    selected = rng.dirichlet(np.ones(E), (layers, B)) * A * tokens[:, None]
    z = rng.rand(layers, B)
    per_layer = np.tile(tokens, (layers, 1))
    return moe.RouterStats(*(jnp.asarray(a, jnp.float32) for a in (probability, selected, selected, z, per_layer, 0 * per_layer)))


def test_balance_loss_has_two_forms():
    stats = random_stats()
    f, P = (np.asarray(a, np.float64) for a in (stats.selected_BE, stats.probability_BE))
    assert np.isclose(moe.balance_loss(stats, "all_layers"), E * np.sum(f.sum((0, 1)) / 24 * P.sum((0, 1)) / 24), rtol=1e-6)
    assert np.isclose(moe.balance_loss(stats, "per_layer"), np.mean([E * np.sum(f[i].sum(0) / 8 * P[i].sum(0) / 8) for i in range(3)]), rtol=1e-6)
    assert np.isclose(moe.z_sum(stats), np.asarray(stats.z_B).sum() / 3, rtol=1e-6)


def test_balanced_routing_gives_the_number_of_experts_a_token():
    even = jnp.full((1, B, E), T / E)
    stats = moe.RouterStats(even, A * even, A * even, jnp.zeros((1, B)), jnp.full((1, B), float(T)), jnp.zeros((1, B)))
    for form in ("all_layers", "per_layer"):
        assert np.isclose(moe.balance_loss(stats, form), A)


def test_balance_gradient_flows_through_probabilities_alone():
    stats = random_stats()
    gradient = jax.grad(lambda s: moe.balance_loss(s, "all_layers"))(stats)
    assert not np.asarray(gradient.selected_BE).any() and np.asarray(gradient.probability_BE).all()
