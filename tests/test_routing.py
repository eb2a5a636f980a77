"""Routing: the choice, its ties and bad rows, the plan as a permutation, the moves and their gradients, several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import routing
from pallas_kernels.grouped_matmul import grouped_swiglu
from pallas_kernels.routing import RouterSpec

M, E, A, D, F = 48, 8, 3, 12, 8


def logits(seed=0, shape=(M, E)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


def moe_layer(x_MD, router_DE, gate_EDF, up_EDF, down_EFD, experts_per_token: int, implementation: str):
    """One mixture-of-experts layer body: route and plan, gather, experts, combine; (M, D)."""
    _, weights_MA, _, plan = routing.route_and_plan(x_MD @ router_DE, None, RouterSpec(experts_per_token))
    rows_RD = grouped_swiglu(routing.gather_rows(x_MD, plan), gate_EDF, up_EDF, down_EFD, plan.group_sizes_E, implementation=implementation)
    return routing.combine_rows(rows_RD, weights_MA, plan)


def softmax(z):
    p = np.exp(np.float64(z) - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def lowest_index_top(score, k):
    return np.argsort(-score, axis=-1, kind="stable")[:, :k]


def test_weights_are_the_raw_probabilities_of_the_best_experts():
    z = logits()
    experts, weights, stats = routing.route(z, None, RouterSpec(A))
    p = softmax(z)
    np.testing.assert_array_equal(experts, lowest_index_top(p, A))
    np.testing.assert_allclose(weights, np.take_along_axis(p, np.asarray(experts), 1), rtol=1e-5)
    assert np.all(np.asarray(weights).sum(-1) < 0.999)  # a softmax over the chosen experts alone would sum to 1
    np.testing.assert_allclose(stats.probability_ME, p, rtol=1e-5)
    np.testing.assert_allclose(stats.z_M, np.log(np.exp(np.float64(z)).sum(-1)) ** 2, rtol=1e-5)
    np.testing.assert_array_equal(np.argwhere(stats.load_ME)[:, 1].reshape(M, A), np.sort(experts, 1))
    np.testing.assert_array_equal(stats.selected_ME, stats.load_ME)


def test_renormalised_weights_sum_to_one_and_keep_their_ratios():
    z = logits()
    _, weights, _ = routing.route(z, None, RouterSpec(A, renormalize=True))
    _, raw, _ = routing.route(z, None, RouterSpec(A))
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights, raw / raw.sum(-1, keepdims=True), rtol=1e-6)


def test_expert_bias_changes_choice_and_weight_but_not_the_selection_of_the_balance_loss():
    z, bias = logits(), np.linspace(-0.3, 0.3, E).astype(np.float32)
    experts, weights, stats = routing.route(z, bias, RouterSpec(A))
    p = softmax(z)
    np.testing.assert_array_equal(experts, lowest_index_top(p + bias, A))
    np.testing.assert_allclose(weights, np.take_along_axis(p + bias, np.asarray(experts), 1), rtol=1e-5, atol=1e-7)
    unbiased = routing.route(z, None, RouterSpec(A))[2]
    np.testing.assert_array_equal(stats.selected_ME, unbiased.selected_ME)
    np.testing.assert_array_equal(stats.probability_ME, unbiased.probability_ME)
    assert np.any(np.asarray(stats.load_ME) != np.asarray(stats.selected_ME))
    gradient = jax.grad(lambda b: routing.route(z, b, RouterSpec(A))[1].sum())(bias)
    assert not np.asarray(gradient).any()


GROUPED = RouterSpec(A, renormalize=True, score="sigmoid", bias_in_weight=False, groups=4, groups_kept=2, scale=2.5)  # LLaDA2's rule


def grouped_by_hand(z, bias, spec):
    """LLaDA2's rule for one token at a time, in float64."""
    experts, weights = [], []
    for row in np.float64(z):
        score = 1 / (1 + np.exp(-row))
        biased = score + bias
        size = len(row) // spec.groups
        by_group = [np.sort(biased[g * size:(g + 1) * size])[-2:].sum() for g in range(spec.groups)]
        kept = np.argsort(by_group)[::-1][:spec.groups_kept]
        allowed = [e for e in range(len(row)) if e // size in kept]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:spec.experts_per_token]
        experts.append(chosen)
        weights.append(spec.scale * score[chosen] / score[chosen].sum())
    return np.array(experts), np.array(weights)


def test_sigmoid_router_with_groups_and_a_bias_that_only_selects():
    z, bias = logits(), np.linspace(-0.3, 0.3, E).astype(np.float32)
    experts, weights, stats = routing.route(z, bias, GROUPED)
    want_experts, want_weights = grouped_by_hand(z, bias, GROUPED)
    np.testing.assert_array_equal(experts, want_experts)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 2.5, rtol=1e-6)
    sigmoid = 1 / (1 + np.exp(-np.float64(z)))
    np.testing.assert_allclose(stats.probability_ME, sigmoid / sigmoid.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(np.argwhere(stats.selected_ME)[:, 1].reshape(M, A), np.sort(lowest_index_top(sigmoid, A), 1))


@pytest.mark.parametrize("change", [dict(score="softmax"), dict(bias_in_weight=True), dict(groups=1, groups_kept=1), dict(groups_kept=3),
                                    dict(renormalize=False), dict(scale=1.0)], ids=str)
def test_every_part_of_the_rule_matters(change):
    z, bias = logits(), np.linspace(-0.3, 0.3, E).astype(np.float32)
    want, got = routing.route(z, bias, GROUPED), routing.route(z, bias, GROUPED._replace(**change))
    assert np.any(np.asarray(want[0]) != np.asarray(got[0])) or np.max(np.abs(want[1] - got[1])) > 1e-3


def test_groups_that_cannot_hold_the_experts_are_refused():
    for spec in (RouterSpec(A, groups=4), RouterSpec(A, groups=3, groups_kept=3)):
        with pytest.raises(ValueError, match="groups"):
            routing.route(logits(), None, spec)


def test_equal_logits_choose_the_lowest_index():
    z = np.zeros((4, E), np.float32)
    z[1, [2, 5, 6]] = 1
    z[2, 7] = 1
    z[3, ::2] = 1
    experts, _, _ = routing.route(z, None, RouterSpec(A))
    np.testing.assert_array_equal(experts, [[0, 1, 2], [2, 5, 6], [7, 0, 1], [0, 2, 4]])


def test_bad_rows_give_valid_distinct_experts_and_leave_other_rows_alone():
    z = logits()
    want = routing.route(z, None, RouterSpec(A))
    bad = z.copy()
    bad[3], bad[5, 2], bad[7, 1], bad[9] = np.nan, np.nan, np.inf, -np.inf
    experts, weights, _ = routing.route(bad, None, RouterSpec(A))
    assert np.all((np.asarray(experts) >= 0) & (np.asarray(experts) < E))
    assert all(len(set(row)) == A for row in np.asarray(experts).tolist())
    good = np.setdiff1d(np.arange(M), [3, 5, 7, 9])
    np.testing.assert_array_equal(experts[good], want[0][good])
    np.testing.assert_array_equal(weights[good], want[1][good])
    plan = routing.plan(experts, E)
    np.testing.assert_array_equal(np.sort(np.asarray(plan.row_MA).ravel()), np.arange(M * A))


def test_router_gradients_equal_finite_differences():
    z = logits(shape=(6, E))
    sign = np.random.default_rng(1).normal(size=(6, A + E + 1))

    def value(z):
        _, weights, stats = routing.route(z, None, RouterSpec(A, renormalize=True))
        return jnp.sum(jnp.concatenate([weights, stats.probability_ME, stats.z_M[:, None]], 1) * sign)

    def exact(z):  # the choice held fixed
        p = softmax(z)
        w = np.take_along_axis(p, lowest_index_top(softmax(logits(shape=(6, E))), A), 1)
        return np.sum(np.concatenate([w / w.sum(-1, keepdims=True), p, np.log(np.exp(z).sum(-1, keepdims=True)) ** 2], 1) * sign)

    got = np.asarray(jax.grad(value)(z))
    z, step = np.float64(z), 1e-6
    for i, j in np.ndindex(z.shape):
        shift = np.zeros_like(z)
        shift[i, j] = step
        assert abs((exact(z + shift) - exact(z - shift)) / (2 * step) - got[i, j]) < 2e-5 * max(1, np.abs(got).max())


@pytest.mark.parametrize("case", ["random", "one expert", "twice in a token", "out of range"])
def test_plan_is_a_stable_sort(case):
    rng = np.random.default_rng(0)
    experts = rng.integers(0, E, (M, A)).astype(np.int32)
    if case == "one expert":
        experts[:] = 5
    if case == "twice in a token":
        experts[:, 2] = experts[:, 0]
    if case == "out of range":
        experts[::5, 1], experts[::7, 0], experts[1] = E, -1, E + 3
    plan = routing.plan(jnp.asarray(experts), E)
    sort_key = np.where((experts >= 0) & (experts < E), experts, E).ravel()
    order = np.argsort(sort_key, kind="stable")
    np.testing.assert_array_equal(plan.token_R, order // A)
    np.testing.assert_array_equal(np.asarray(plan.row_MA).ravel()[order], np.arange(M * A))
    np.testing.assert_array_equal(plan.group_sizes_E, np.bincount(sort_key, minlength=E + 1)[:E])


def test_combine_undoes_gather():
    x = logits(3, (M, D))
    experts, weights, _ = routing.route(logits(), None, RouterSpec(A, renormalize=True))
    plan = routing.plan(experts, E)
    rows = routing.gather_rows(x, plan)
    np.testing.assert_array_equal(rows, x[np.asarray(plan.token_R)])
    np.testing.assert_allclose(routing.combine_rows(rows, weights, plan), x, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_moves_equal_plain_autodiff():
    x, weights = logits(3, (M, D)), np.random.default_rng(4).normal(size=(M, A)).astype(np.float32)
    scale = np.random.default_rng(5).normal(size=(M * A, D)).astype(np.float32)
    plan = routing.plan(routing.route(logits(), None, RouterSpec(A))[0], E)

    def ours(x, weights):
        return jnp.sum(jnp.sin(routing.combine_rows(jnp.tanh(routing.gather_rows(x, plan)) * scale, weights, plan)))

    def plain(x, weights):
        rows = jnp.tanh(x[plan.token_R]) * scale
        return jnp.sum(jnp.sin(jnp.einsum("MAD,MA->MD", rows[plan.row_MA], weights)))

    for got, want in zip(jax.grad(ours, (0, 1))(x, weights), jax.grad(plain, (0, 1))(x, weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_combine_adds_up_bf16_rows_in_float32():
    rows = jnp.concatenate([jnp.full((1, 2), 256, jnp.bfloat16), jnp.full((8, 2), 0.5, jnp.bfloat16)])  # bf16 sums stay at 256
    plan = routing.plan(jnp.arange(9)[None], 9)
    out = routing.combine_rows(rows, jnp.ones((1, 9), jnp.float32), plan)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 260)


def layer_arrays():
    rng = np.random.default_rng(6)
    shapes = ((64, D), (D, E), (E, D, F), (E, D, F), (E, F, D))
    return [rng.normal(size=shape).astype(np.float32) * (1 if i == 0 else shape[-2] ** -0.5) for i, shape in enumerate(shapes)]


def dense_layer(x, router, gate, up, down):
    """Every expert for every token, mixed by the chosen probabilities."""
    p = jax.nn.softmax(x @ router)
    chosen = p >= jnp.sort(p, -1)[:, -A, None]
    h = jax.nn.silu(jnp.einsum("MD,EDF->MEF", x, gate)) * jnp.einsum("MD,EDF->MEF", x, up)
    return jnp.einsum("MEF,EFD,ME->MD", h, down, jnp.where(chosen, p, 0))


def gradients(layer, arrays):
    return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(layer(*a))), tuple(range(5))))(*arrays)


def assert_gradients_close(got, want):
    for a, b in zip(got, want, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_whole_layer_equals_all_experts_for_all_tokens(implementation):
    arrays = layer_arrays()
    layer = lambda *a: moe_layer(*a, A, implementation)
    np.testing.assert_allclose(jax.jit(layer)(*arrays), dense_layer(*arrays), rtol=1e-4, atol=1e-5)
    assert_gradients_close(gradients(layer, arrays), gradients(dense_layer, arrays))


@pytest.mark.parametrize("check_vma", [False, True])
def test_eight_devices_routing_their_own_tokens_equal_one(check_vma):
    arrays = layer_arrays()
    layer = lambda *a: moe_layer(*a, A, "cpu")
    rows, whole = PartitionSpec("tokens"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()[:8]), ("tokens",))
    split = jax.shard_map(layer, mesh=mesh, in_specs=(rows, whole, whole, whole, whole), out_specs=rows, check_vma=check_vma)
    assert_gradients_close(gradients(split, arrays), gradients(layer, arrays))


def test_order_of_tokens_does_not_matter():
    x, *weights = layer_arrays()
    order = np.random.default_rng(7).permutation(len(x))
    layer = jax.jit(lambda *a: moe_layer(*a, A, "cpu"))
    np.testing.assert_allclose(layer(x[order], *weights), layer(x, *weights)[order], rtol=1e-5, atol=1e-6)


def test_more_choices_than_experts_raises():
    with pytest.raises(ValueError, match="9 experts a token out of 8"):
        routing.route(logits(), None, RouterSpec(9))
