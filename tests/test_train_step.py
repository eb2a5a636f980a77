"""One training step: what a non-finite gradient may touch, and that every choice of the config runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax.model import transformer
from llada_jax.training import checkpoint, metrics, optimizer, state, step
from tests import tiny_run

VOCAB, MASK, B, T = 32, 31, 4, 16


def config_of(**groups):
    config = config_lib.from_config_dict(tiny_run.get_config())
    groups = {"model": {"vocab_size": VOCAB}, **groups}
    groups["model"] = {"vocab_size": VOCAB, **groups["model"]}
    result = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()})
    config_lib.validate(result)
    return result


def batch_of(seed, B=B, T=T):
    """Rows of two segments, the second with restarted positions."""
    segment = np.repeat([[1, 2]], T // 2, axis=1).repeat(B, 0).astype(np.int32)
    position = np.tile(np.arange(T // 2, dtype=np.int32), (B, 2))
    tokens = np.random.default_rng(seed).integers(0, MASK, (B, T)).astype(np.int32)
    return {"tokens": tokens, "segment": segment, "position": position, "maskable": np.ones((B, T), bool), "index": np.arange(B, dtype=np.uint32)}


def build(config):
    model = transformer.build(config.model, config.kernels)
    update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
    return state.create(model, update, config), jax.jit(step.make_step(model, update, config, MASK))


def test_the_average_follows_the_weights_and_a_non_finite_step_changes_the_counters_alone():
    run, take = build(config_of(optimizer={"ema_decay": 0.75, "name": "muon"}))
    average = run.ema
    for seed in range(3):
        run, good = take(run, batch_of(seed))
        assert int(good["skipped"]) == 0 and np.isfinite(good["loss"])
        average = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, average, run.variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), run.ema, average)
    poisoned = run.variables["params"]["embedding"].at[3, 0].set(jnp.nan)
    healthy = run.variables["params"]["embedding"]
    run = run._replace(variables={**run.variables, "params": {**run.variables["params"], "embedding": poisoned}})
    for skipped in 1, 2:
        after, values = take(run, batch_of(skipped))
        for name in ("variables", "opt_state", "ema"):
            assert checkpoint.tree_hash(getattr(after, name)) == checkpoint.tree_hash(getattr(run, name)), name
        assert int(after.step) == int(run.step) + 1
        assert int(after.skipped) == int(after.skipped_in_a_row) == int(values["skipped"]) == skipped
        assert metrics.summarize(jax.tree.map(np.asarray, values))["loss"] is None
        run = after
    run = run._replace(variables={**run.variables, "params": {**run.variables["params"], "embedding": healthy}})
    after, values = take(run, batch_of(5))
    assert int(after.skipped) == 2 and int(after.skipped_in_a_row) == 0 and np.isfinite(values["loss"])
    assert checkpoint.tree_hash(after.variables) != checkpoint.tree_hash(run.variables)


def test_one_program_serves_all_seeds():
    """A traced seed gives the weights and the noise of a program that was made for it."""
    config = config_of(diffusion={"variable_length_rate": 1.0})
    model = transformer.build(config.model, config.kernels)
    update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
    create, take = (jax.jit(f) for f in (lambda seed: state.create(model, update, config, seed), step.make_step(model, update, config, MASK)))
    losses = []
    for seed in 0, 2**31 - 1:
        own = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        run, alone = create(jnp.uint32(seed)), build(own)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), run, alone[0])
        ours, theirs = take(run, batch_of(0), jnp.uint32(seed))[1], alone[1](alone[0], batch_of(0))[1]
        assert np.array_equal(ours["predicted_S"], theirs["predicted_S"])
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        losses.append(float(ours["loss"]))
    assert losses[0] != losses[1] and take._cache_size() == create._cache_size() == 1


def test_what_is_not_trainable_stays():
    run, take = build(config_of(optimizer={"name": "muon", "trainable": "norm|query"}))
    after, _ = take(run, batch_of(0))
    old, new = run.variables["params"], after.variables["params"]
    for (path, before), now in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True):
        path = optimizer.path_of(path)
        assert np.array_equal(before, now) == ("norm" not in path and "query" not in path), path


@pytest.mark.parametrize("groups", [
    dict(model=dict(compute_dtype="bfloat16", remat="full", num_layers=2), train=dict(accumulate=2),
         diffusion=dict(corruption="exact_count", weighting="count", noise_unit="segment", normalization="sequence")),
    dict(model=dict(scan_layers=False, remat="dots", num_layers=2, dense_layers=(0, 1), dense_size=16),
         diffusion=dict(objective="autoregressive"), optimizer=dict(name="muon", schedule="cosine")),
    dict(model=dict(num_layers=2, dense_layers=(0,), dense_size=16, shared_expert_size=8, router_bias=True, router_renormalize=True,
                    num_kv_heads=1, tie_embeddings=True), train=dict(accumulate=4),
         diffusion=dict(schedule="cosine", time_sampling="independent", weighting="uniform", normalization="batch", balance_form="per_layer")),
], ids=["bf16-remat-exact_count-segment-accumulate", "autoregressive-unrolled-dense-muon", "mixed-layers-shared-cosine"])  # fmt: skip
def test_choices_learn_a_batch_by_heart(groups):
    run, take = build(config_of(**groups))
    batch, losses = batch_of(0), []
    batch["tokens"] %= 4
    for _ in range(40):
        run, values = take(run, batch)
        line = metrics.summarize(jax.tree.map(np.asarray, values))
        losses.append(line["loss"])
    assert int(run.skipped) == 0 and None not in losses
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:4]), losses
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(run)), "masters and moments stay float32"


def test_a_call_takes_as_many_steps_as_it_is_told():
    config = config_of()
    run, take = build(config)
    call = step.make_call(take)
    batches = jax.tree.map(lambda *x: np.stack(x), *map(batch_of, range(3)))
    alone = one_by_one = run
    for seed in range(3):
        alone, _ = take(alone, batch_of(seed))  # another program, so equal within rounding
        one_by_one, _ = call(jax.tree.map(jnp.copy, one_by_one), jax.tree.map(lambda x, seed=seed: np.roll(x, -seed, axis=0), batches), jnp.int32(1))
    for count in 1, 3:
        after, values = call(jax.tree.map(jnp.copy, run), batches, jnp.int32(count))  # the state is donated
        if count == 3:
            assert checkpoint.tree_hash(after) == checkpoint.tree_hash(one_by_one)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.variables, alone.variables)
        assert np.all(np.asarray(values["loss"])[:count] > 0) and not np.any(np.asarray(values["loss"])[count:])
    assert call._cache_size() == 1
