"""Learning rates at key steps, and which parameters an update touches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax.model import transformer
from llada_jax.training import optimizer, state
from llada_jax.training import step as step_lib

MODEL = config_lib.Model(vocab_size=7, hidden_size=8, num_layers=3, num_heads=2, num_experts=2, experts_per_token=1, expert_size=6,
                         dense_layers=(1,), dense_size=10, shared_expert_size=4)
BASE = config_lib.Optimizer(learning_rate=1.0, warmup_steps=10, decay_fraction=0.2, final_fraction=0.1)


@pytest.mark.parametrize("schedule, steps, values", [
    ("wsd", 100, {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0, 79: 1.0, 89: 0.55, 99: 0.1}),
    ("cosine", 110, {0: 0.1, 9: 1.0, 59: 0.55, 109: 0.1}),
    ("constant", 100, {0: 0.1, 9: 1.0, 99: 1.0}),
    ("wsd", 8, {0: 1 / 8, 7: 1.0}),  # a run shorter than its warm-up only warms up
])  # fmt: skip
def test_learning_rate_at_key_steps(schedule, steps, values):
    rate = optimizer.learning_rate(dataclasses.replace(BASE, schedule=schedule), steps)
    for step, value in values.items():
        assert np.isclose(rate(step), value, atol=1e-6), step


@pytest.fixture(scope="module")
def params():
    made = jax.jit(transformer.build(MODEL).init)(jax.random.key(0))["params"]
    return jax.tree.map(lambda leaf: leaf + 0.5, made)


def updates_of(params, gradients, **settings):
    rule = optimizer.make(dataclasses.replace(BASE, warmup_steps=0, schedule="constant", clip_norm=0.0, **settings), 10, params)
    updates, _ = jax.jit(lambda g, p: rule.update(g, rule.init(p), p))(gradients, params)
    return {optimizer.path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_touches_matrices_only(name, params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    weights = {optimizer.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, update in updates_of(params, zeros, name=name, weight_decay=0.1).items():
        decay = 0.0 if path.endswith("norm") else 0.1
        np.testing.assert_allclose(update, -decay * np.asarray(weights[path]), rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_trainable_parameters_move(name, params):
    ones = jax.tree.map(jnp.ones_like, params)
    updates = updates_of(params, ones, name=name, weight_decay=0.1, trainable=r"router|stack_2/.*norm")
    for path, update in updates.items():
        free = "router" in path or (path.startswith("stack_2") and path.endswith("norm"))
        assert (update != 0).all() if free else (update == 0).all(), path
    assert sum((update != 0).any() for update in updates.values()) == 2 + 4


def test_a_pattern_without_a_match_names_paths(params):
    with pytest.raises(config_lib.ConfigError, match=r"'lora' matches no parameter; paths are embedding, final_norm"):
        optimizer.make(dataclasses.replace(BASE, trainable="lora"), 10, params)


def test_muon_takes_the_matrices_of_layers_and_one_learning_rate_fits_all(params):
    """Muon's updates are orthogonal matrices of root mean square 0.2, Adam's first ones are signs."""
    gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    updates = updates_of(params, gradients, name="muon", weight_decay=0.0)
    by_muon = {"query", "key", "value", "output", "gate", "up", "down", "shared_gate", "shared_up", "shared_down"}
    for path, update in updates.items():
        name = path.rsplit("/", 1)[-1]
        signs = np.allclose(np.abs(update), 1, atol=1e-3)
        assert signs == (name not in by_muon), path
    def matrices(path):
        update = updates[path]
        name = path.rsplit("/", 1)[-1]
        if name in ("query", "key", "value"):
            return update.reshape(update.shape[0], MODEL.hidden_size, -1)
        if name == "output":
            return update.reshape(update.shape[0], -1, MODEL.hidden_size)
        return update.reshape(-1, *update.shape[-2:])  # of every layer, and of every expert
    for path in updates:
        if path.rsplit("/", 1)[-1] in by_muon:
            for matrix in matrices(path):
                values = np.linalg.svd(matrix, compute_uv=False)
                assert values.max() < 1.9 * values.min(), path  # five Newton-Schulz steps bring all singular values near one value
                assert np.isclose(np.sqrt(np.mean(matrix**2)), optimizer.MUON_RMS, rtol=0.3), path


def test_clipping_bounds_the_global_norm(params):
    gradients = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3.0), params)
    norm = float(optimizer.global_norm(gradients))
    assert np.isclose(norm, 3 * np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(params))), rtol=1e-6)
    rule = optimizer.make(dataclasses.replace(BASE, clip_norm=0.5), 10, params)
    seen = rule.init(params)
    _, seen = jax.jit(lambda g, p: rule.update(g, rule.init(p), p))(gradients, params)
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(seen) if "mu" in [getattr(key, "name", None) for key in path]]
    assert np.isclose(optimizer.global_norm(moments), 0.5 * (1 - BASE.b1), rtol=1e-4)  # Adam's first moment is (1 - b1) times what it was given


def test_a_step_without_finite_gradients_changes_counters_alone():
    config = config_lib.Config(model=MODEL, optimizer=dataclasses.replace(BASE, ema_decay=0.5), train=config_lib.Train(batch_size=2))
    model = transformer.build(MODEL)
    update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
    rows = jnp.broadcast_to(jnp.arange(6), (2, 6))
    batch = {"tokens": rows, "segment": jnp.ones((2, 6), jnp.int32), "position": rows, "maskable": jnp.ones((2, 6), bool), "index": jnp.arange(2)}
    run = jax.jit(lambda: state.create(model, update, config))()
    step = jax.jit(step_lib.make_step(model, update, config, 6))
    good, _ = step(run, batch)
    assert int(good.skipped) == 0 and all((a != b).any() for a, b in zip(jax.tree.leaves(good.ema), jax.tree.leaves(run.ema), strict=True))
    good = good._replace(ema=run.ema)  # an average that lags behind
    broken = good._replace(variables={"params": {**good.variables["params"], "head": jnp.full_like(good.variables["params"]["head"], jnp.inf)}})
    after, metrics = step(broken, batch)
    assert not np.isfinite(metrics["grad_norm"]) and (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)
    for a, b in zip(*(jax.tree.leaves((s.variables, s.opt_state, s.ema)) for s in (after, broken)), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()
    assert int(step(after._replace(variables=good.variables), batch)[0].skipped_in_a_row) == 0
