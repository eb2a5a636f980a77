"""Balancing without a loss: the expert bias moves towards an even load, and nothing else moves it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.model import moe, transformer
from llada_jax.training import checkpoint, optimizer, state
from llada_jax.training import step as step_lib
from pallas_kernels import routing

B, T, V, MASK, E, A, RATE = 8, 32, 32, 31, 8, 2, 0.01
MODEL = config_lib.Model(vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, num_experts=E, experts_per_token=A, expert_size=8, max_length=T,
                         init_std=0.2, router_score="sigmoid", router_renormalize=True, router_bias=True, router_bias_in_weight=False)


def config_of(**train):
    config = config_lib.Config(
        model=MODEL, data=config_lib.Data(sequence_length=T), train=config_lib.Train(**{"batch_size": B, **train}),
        diffusion=config_lib.Diffusion(balance_coefficient=0.0, z_coefficient=0.0, variable_length_rate=0.0),
        optimizer=config_lib.Optimizer(learning_rate=1e-3, warmup_steps=0, schedule="constant", router_bias_rate=RATE))
    config_lib.validate(config)
    return config


@functools.cache
def program(config, devices=1):
    """(fresh state, step, mesh) on so many devices of the data axis."""
    mesh = partitioning.make_mesh(config_lib.Mesh(data=devices), jax.devices()[:devices])
    model = transformer.build(config.model, config.kernels, mesh)
    update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
    shardings = state.shardings(model, jax.eval_shape(lambda: state.create(model, update, config)), mesh)
    run = jax.jit(lambda: state.create(model, update, config), out_shardings=shardings)()
    return run, jax.jit(step_lib.make_step(model, update, config, MASK), out_shardings=(shardings, None)), mesh


def batch_of(i):
    """Rows in which few tokens are frequent; the last quarter of every row is padding, of one more token."""
    share = 1 / np.arange(1, MASK) ** 1.5
    tokens = np.random.default_rng(i).choice(MASK - 1, (B, T), p=share / share.sum()).astype(np.int32)
    real = np.broadcast_to(np.arange(T) < T * 3 // 4, (B, T))
    position = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return {"tokens": np.where(real, tokens, MASK - 1), "segment": real.astype(np.int32), "position": position, "maskable": real.copy(),
            "index": np.arange(B, dtype=np.uint32) + B * i}


def bias_of(run):
    return np.asarray(run.variables["router_bias"]["bias"])


def ratio(load):
    return load.max(-1) / load.mean(-1)


def test_skewed_scores_are_balanced():
    """Tokens that all prefer the first experts: the busiest one's load over the mean falls from 3.2 to below 1.2."""
    spec = routing.RouterSpec(A, score="sigmoid", bias_in_weight=False)
    preferred_E = jnp.linspace(2, -2, E)

    def step(bias_E, key):
        _, _, stats = routing.route(jax.random.normal(key, (2048, E)) + preferred_E, bias_E, spec)
        load_E = stats.load_ME.sum(0)
        return moe.balanced_bias(bias_E[None], load_E[None], RATE / 2)[0], load_E

    bias_E, load_NE = jax.jit(lambda keys: jax.lax.scan(step, jnp.zeros(E), keys))(jax.random.split(jax.random.key(0), 300))
    assert ratio(load_NE[0]) > 3 and ratio(load_NE[-50:]).max() < 1.2, (ratio(load_NE[0]), ratio(load_NE[-50:]))
    assert np.all(np.diff(bias_E) > 0) and abs(bias_E.mean()) < 1e-6


def test_one_step_by_hand():
    bias, load = np.float32([[0.1, -0.1, 0.0], [0.3, -0.3, 0.0]]), np.float32([[9, 0, 3], [0, 0, 0]])
    after = moe.balanced_bias(bias, load, 0.5)
    np.testing.assert_allclose(after[0], np.subtract([-0.4, 0.4, 0.5], 0.5 / 3), atol=1e-6)
    np.testing.assert_array_equal(after[1], bias[1])  # nothing was counted


def test_training_balances_and_the_bias_obeys_the_load_alone(tmp_path):
    """On skewed text the busiest expert of the worse layer falls from over 3 times the mean to below 2; so few tokens, half of them masked alike, do
    not get to 1.2."""
    run, take, _ = program(config_of())
    ratios = []
    for i in range(100):
        before = bias_of(run)
        run, values = take(run, batch_of(i))
        load = np.asarray(values["load_SLE"]).sum(0)
        assert (load.sum(-1) == A * B * T * 3 // 4).all()  # without the padding
        want = before + np.float32(RATE) * np.sign(load.mean(-1, keepdims=True) - load)
        np.testing.assert_allclose(bias_of(run), want - want.mean(-1, keepdims=True), atol=1e-6)
        ratios.append(ratio(load))
    start, end = ratios[0], np.mean(ratios[-30:], 0)
    assert start.max() > 3 and (end < 2).all() and (end < start).all(), (start, end)

    # a step that is skipped leaves it alone
    poisoned = {**run.variables["params"], "final_norm": run.variables["params"]["final_norm"].at[0].set(jnp.nan)}
    after, _ = take(run._replace(variables={**run.variables, "params": poisoned}), batch_of(0))
    assert int(after.skipped) == 1 and (bias_of(after) == bias_of(run)).all()

    # a checkpoint keeps it, and the run goes on as it would have
    saver = checkpoint.Checkpointer(str(tmp_path / "run"), 1, 0)
    saver.save(run, config_of())
    saver.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run)
    again = saver.restore(like, int(run.step))
    saver.close()
    assert (bias_of(again) == bias_of(run)).all() and np.any(bias_of(run))
    assert checkpoint.tree_hash(take(again, batch_of(7))[0].variables) == checkpoint.tree_hash(take(run, batch_of(7))[0].variables)


def test_the_load_of_the_whole_batch_counts():
    """Two devices with two micro-batches give the bias that one device and one batch give."""
    (run, take, _), (other, other_take, mesh) = program(config_of()), program(config_of(accumulate=2), devices=2)
    for i in range(3):
        run, _ = take(run, batch_of(i))
        other, _ = other_take(other, partitioning.put_batch(mesh, batch_of(i)))
        np.testing.assert_array_equal(bias_of(run), bias_of(other))
    assert np.any(bias_of(run))


def test_no_gradient_reaches_the_bias():
    model = transformer.build(MODEL)
    params = jax.tree.map(lambda x: x[0], jax.jit(model.init)(jax.random.key(0))["params"]["stack_0"])
    x, valid = jax.random.normal(jax.random.key(1), (B, T, MODEL.hidden_size)), jnp.ones((B, T), bool)
    loss = lambda params, bias: jnp.square(moe.moe(x, params, bias, valid, MODEL, config_lib.Kernels(), None)[0]).sum()
    of_params, of_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, 0.1 * jax.random.normal(jax.random.key(2), (E,)))
    assert (np.asarray(of_bias) == 0).all() and all(np.any(of_params[name]) for name in ("router", "gate", "down"))
    moments = jax.eval_shape(lambda: state.create(model, optimizer.make(config_of().optimizer, 10, model.shapes["params"]), config_of())).opt_state
    assert "bias" not in {optimizer.path_of(path).rsplit("/", 1)[-1] for path, _ in jax.tree_util.tree_leaves_with_path(moments)}


@pytest.mark.parametrize("change", [dict(router_bias=False), dict(router_bias_in_weight=True), dict(dense_layers=(0, 1), dense_size=8)], ids=str)
def test_a_bias_that_cannot_balance_is_refused(change):
    with pytest.raises(config_lib.ConfigError, match=r"=0\.01 moves an expert bias that only selects; it needs experts, model\.router"):
        config_lib.validate(dataclasses.replace(config_of(), model=dataclasses.replace(MODEL, **change)))
