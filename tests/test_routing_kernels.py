"""The TPU and GPU kernels of the router's choice, in Pallas's interpreter: equal to the plain rule and the plain plan, bit for bit where integers."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import dispatch, routing
from pallas_kernels.routing import RouterSpec, choice, gpu, tpu
from tests import ahead_of_time
from tests.abstract_gpu import h100

BACKENDS = ("tpu", "gpu")
LLADA2 = RouterSpec(8, renormalize=True, score="sigmoid", bias_in_weight=False, groups=8, groups_kept=4, scale=2.5)
CASES = {  # tokens, experts, bias, rule; the default tile is 256 tokens on a TPU, 8 to 64 on a GPU
    "LLaDA-MoE, the last tile hangs over": (600, 64, False, RouterSpec(8)),
    "bias in the weight": (300, 24, True, RouterSpec(3, renormalize=True)),
    "LLaDA2": (257, 256, True, LLADA2),
    "groups without a bias": (200, 12, False, RouterSpec(2, groups=6, groups_kept=2)),
    "groups of one": (9, 8, True, RouterSpec(3, groups=8, groups_kept=3)),
    "every expert": (256, 4, True, RouterSpec(4, score="sigmoid", renormalize=True, scale=0.5)),
    "one token, one choice": (1, 7, False, RouterSpec(1)),
}


def arrays(M, E, has_bias, seed=0):
    """A third of the rows has whole logits, thus many ties; others prefer the first expert, or are all equal."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(M, E)).astype(np.float32) * 2
    z[1::3] = np.round(z[1::3])
    z[2::9, 0] = 9
    z[5::30] = 0
    return z, rng.choice(np.float32([-0.25, 0, 0.25, 0.5]), E) if has_bias else None


def run(z, bias, spec, implementation, seed=1):
    """The outputs, and the gradient of a random sum of weights, probabilities and z, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    M, E = z.shape
    sign_MA, sign_ME, sign_M = (rng.normal(size=shape).astype(np.float32) for shape in ((M, spec.experts_per_token), (M, E), (M,)))

    def value(z, bias):
        out = routing.route_and_plan(z, bias, spec, implementation=implementation)
        _, weights, stats, _ = out
        return (weights * sign_MA).sum() + (stats.probability_ME * sign_ME).sum() + (stats.z_M * sign_M).sum(), out

    gradient, out = jax.jit(jax.grad(value, 0 if bias is None else (0, 1), has_aux=True))(z, bias)
    return jax.tree.map(np.asarray, (out, gradient))


def interpreted(z, bias, spec, implementation, **parameters):
    with dispatch.interpreted(**parameters):
        return run(z, bias, spec, implementation)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.dtype == jnp.int32:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_choice_plan_statistics_and_gradients_equal_the_reference(case, implementation):
    M, E, has_bias, spec = CASES[case]
    z, bias = arrays(M, E, has_bias)
    assert_same(interpreted(z, bias, spec, implementation), run(z, bias, spec, "reference"))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_bad_rows_give_valid_distinct_experts_and_leave_other_rows_alone(implementation):
    M, E, A = 40, 12, 3
    spec = LLADA2._replace(experts_per_token=A, groups=4, groups_kept=2)
    z, bias = arrays(M, E, True)
    z[3], z[5, 2], z[7, 1], z[9], z[39, :5] = np.nan, np.nan, np.inf, -np.inf, np.nan
    good = np.setdiff1d(np.arange(M), [3, 5, 7, 9, 39])
    for rule in (spec, spec._replace(score="softmax", groups=1, groups_kept=1)):
        (experts, weights, stats, plan), (gradient, _) = interpreted(z, bias, rule, implementation)
        assert np.all((experts >= 0) & (experts < E)) and all(len(set(row)) == A for row in experts.tolist())
        assert_same(plan, jax.jit(lambda experts: routing.plan(experts, E))(experts))
        (want, want_weights, *_), (want_gradient, _) = run(z, bias, rule, "reference")
        assert_same((experts[good], weights[good], gradient[good]), (want[good], want_weights[good], want_gradient[good]))
        assert np.all(stats.load_ME.sum(1) == A) and np.all(stats.selected_ME.sum(1) == A)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_all_tokens_may_choose_one_expert(implementation):
    z = np.full((520, 16), -1, np.float32)
    z[:, 11] = 1
    (experts, _, _, plan), _ = interpreted(z, None, RouterSpec(1), implementation)
    np.testing.assert_array_equal(experts, 11)
    np.testing.assert_array_equal(plan.token_R, np.arange(520))
    np.testing.assert_array_equal(plan.group_sizes_E, 520 * (np.arange(16) == 11))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_the_default_is_route_then_plan(implementation):
    z, bias = arrays(40, 8, True)
    spec = RouterSpec(3)

    @jax.jit
    def one_after_the_other(z):
        experts, weights, stats = routing.route(z, bias, spec)
        return experts, weights, stats, routing.plan(experts, 8)

    want = one_after_the_other(z)
    assert_same(jax.jit(lambda z: routing.route_and_plan(z, bias, spec))(z), want)
    with dispatch.interpreted():
        assert_same(jax.jit(lambda z: routing.route(z, bias, spec, implementation=implementation))(z), want[:3])
    with pytest.raises(ValueError, match="9 experts a token out of 8"):
        routing.route_and_plan(z, bias, RouterSpec(9))


def itself_too(t):
    return jnp.triu(jnp.ones((t, t), jnp.bfloat16))


def last_among_equals(key, index, k, free, real=choice.top):
    return [key.shape[0] - 1 - i for i in real(key[::-1], index, k, jnp.broadcast_to(free, key.shape)[::-1])]


def overhang_counted(*refs, num_tokens, real=tpu._kernel, **settings):
    real(*refs, num_tokens=num_tokens + 1, **settings)


def overhang_exists(tile, num_tokens, real=gpu._tokens):
    return real(tile, num_tokens + 1)


FAULTS = [("tpu", tpu, "_before", itself_too), ("tpu", choice, "top", last_among_equals), ("tpu", tpu, "_kernel", overhang_counted),
          ("gpu", gpu, "_earlier", lambda load: jnp.cumsum(load, axis=1)), ("gpu", choice, "top", last_among_equals),
          ("gpu", gpu, "_tokens", overhang_exists)]


@pytest.mark.parametrize("implementation, module, name, fault", FAULTS, ids=[f"{fault[0]} {fault[2]}" for fault in FAULTS])
def test_a_planted_fault_is_seen(monkeypatch, implementation, module, name, fault):
    M, E, has_bias, spec = CASES["bias in the weight"]
    z, bias = arrays(M, E, has_bias)
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_same(interpreted(z, bias, spec, implementation), run(z, bias, spec, "reference"))


def test_tiles_in_order_race_with_nothing_and_tiles_side_by_side_do(monkeypatch, capfd):
    z, bias = arrays(600, 16, True)
    spec = RouterSpec(3)
    want = run(z, bias, spec, "reference")
    simulate = lambda: interpreted(z, bias, spec, "tpu", detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2, random_seed=1)
    assert_same(simulate(), want)
    assert "RACE" not in capfd.readouterr().out
    monkeypatch.setattr(tpu, "SEMANTICS", ("parallel",))
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_same(simulate(), want)
    assert "RACE DETECTED" in capfd.readouterr().out


@pytest.mark.parametrize("check_vma, implementation", [(False, "tpu"), (True, "tpu"), (False, "gpu")])  # masked loads interpreted fail the check
def test_devices_that_route_their_own_tokens_equal_the_reference_there(check_vma, implementation):
    z, bias = arrays(64, 16, True)
    spec = RouterSpec(3, renormalize=True)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tokens",))
    rows, whole = PartitionSpec("tokens"), PartitionSpec()

    def split(implementation):
        def local(z, bias):
            def value(z):
                out = routing.route_and_plan(z, bias, spec, implementation=implementation)
                return out[1][:, 0].sum(), out
            return jax.grad(value, has_aux=True)(z)

        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, whole), out_specs=rows, check_vma=check_vma))(z, bias)

    with dispatch.interpreted():
        got = split(implementation)
    assert_same(got, split("reference"))


AHEAD_OF_TIME = """
from pallas_kernels import routing
M, E, spec = {
    "v5e:2x2": (4096, 64, routing.RouterSpec(8)),
    "v5p:2x2x1": (4000, 256, routing.RouterSpec(8, True, "sigmoid", False, 8, 4, 2.5)),
    "v6e:2x2": (200, 12, routing.RouterSpec(2, groups=6, groups_kept=3))}[sys.argv[1]]
def value(logits, bias):
    _, weights, stats, plan = routing.route_and_plan(logits, None if E == 64 else bias, spec, implementation="tpu")
    loss = (weights ** 2).sum() + stats.z_M.sum() + (stats.probability_ME.mean(0) * stats.selected_ME.mean(0)).sum()
    return loss, (plan, stats.load_ME.sum(0))
program = compiled(jax.value_and_grad(value, has_aux=True), struct((M, E), jnp.float32), struct((E,), jnp.float32))
print(launches(program), program.as_text().count(" sort("))
"""


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpus_as_one_launch_without_a_sort(topology):
    assert ahead_of_time.run(AHEAD_OF_TIME, topology) == ["1 0"]


def test_under_vmap_and_remat_it_is_the_same():
    z, bias = arrays(96, 16, True)
    spec = RouterSpec(3, renormalize=True)

    def value(z, implementation):
        layer = jax.checkpoint(lambda z: routing.route_and_plan(z, bias, spec, implementation=implementation))
        _, weights, stats, plan = layer(z)
        return (weights[:, 0] * stats.z_M).sum(), plan

    def run(implementation):
        return jax.jit(jax.vmap(jax.grad(lambda z: value(z, implementation), has_aux=True)))(z.reshape(2, 48, 16))

    with dispatch.interpreted():
        got = run("gpu")
    assert_same(got, run("reference"))


def layer(logits, x, bias):
    """A layer without experts, in value and gradients: the choice and the moves of rows."""
    def value(logits, x):
        _, weights, stats, plan = routing.route_and_plan(logits, bias, RouterSpec(8))
        return jnp.sin(routing.combine_rows(jnp.tanh(routing.gather_rows(x, plan)), weights, plan)).sum() + stats.z_M.sum()
    return jax.value_and_grad(value, (0, 1))(logits, x)


@pytest.mark.parametrize("experts", [64, 256])
def test_lowers_for_a_gpu_as_two_launches_that_gather(experts):
    """Of the scatters one is left, the plan's, which permutes integers; none adds."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in
              (((8192, experts), jnp.float32), ((8192, 2048), jnp.bfloat16), ((experts,), jnp.float32))]
    with h100():
        traced = jax.jit(layer).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    primitives = str(traced.jaxpr)
    assert text.count("xla.gpu.triton") == 2 and "stablehlo.sort" not in text
    assert primitives.count("scatter[") == text.count('"stablehlo.scatter"') == 1 and "scatter-add" not in primitives
