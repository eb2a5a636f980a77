"""Preference optimisation on bounds: the loss by hand, what lowers its variance, and that the reference stays as it is."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.diffusion import corrupt as corrupt_lib
from llada_jax.model import transformer
from llada_jax.training import checkpoint, metrics, optimizer, preference, state
from llada_jax.training import step as step_lib
from llada_jax.training.preference import Preference

V, MASK, T, PROMPT, BETA = 12, 11, 24, 4, 0.5
MODEL = config_lib.Model(vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, dense_layers=(0,), dense_size=32, max_length=T, init_std=0.3)
MOE = dataclasses.replace(MODEL, dense_layers=(), num_experts=4, experts_per_token=2, expert_size=8)


def config_of(model=MODEL, accumulate=1, rows=8, rate=1e-2, **diffusion):
    config = config_lib.Config(
        model=model, data=config_lib.Data(sequence_length=T, pack=False), diffusion=config_lib.Diffusion(variable_length_rate=0.0, **diffusion),
        optimizer=config_lib.Optimizer(learning_rate=rate, warmup_steps=0, schedule="constant", weight_decay=0.0),
        train=config_lib.Train(batch_size=rows, accumulate=accumulate))
    config_lib.validate(config)
    return config


def rows_of(seed, count):
    """Counting rows, a, a + b, a + 2 b, … modulo 10, whose prompt gives a and b. Some answers are shorter."""
    a, b = np.random.default_rng(seed).integers(0, 10, (2, count, 1))
    tokens = ((a + b * np.arange(T)) % 10).astype(np.int32)
    real = np.arange(T) < np.where(np.arange(count) % 4 < 2, T, T - 5)[:, None]
    return {"tokens": tokens, "segment": real.astype(np.int32), "position": np.tile(np.arange(T, dtype=np.int32), (count, 1)),
            "maskable": real & (np.arange(T) >= PROMPT), "index": np.arange(count, dtype=np.uint32) + seed * count}


def pairs_of(seed, count=4):
    """Answers of tokens below 5 in rows 2i, of others, after the same prompt, in rows 2i + 1."""
    rows = rows_of(seed, 2 * count)
    tokens = rows["tokens"].copy()
    tokens[1::2, :PROMPT] = tokens[::2, :PROMPT]
    tokens[:, PROMPT:] = tokens[:, PROMPT:] % 5 + 5 * (np.arange(2 * count) % 2)[:, None]
    return {**rows, "tokens": tokens}


@functools.cache
def trained():
    """(model, weights of 150 steps of pre-training, the same after 25 steps at a tenth of the rate)."""
    model, run, kept = transformer.build(MODEL), None, []
    for first, count, rate in ((0, 150, 1e-2), (150, 25, 1e-3)):
        config = config_of(rows=32, rate=rate)
        update = optimizer.make(config.optimizer, 200, model.shapes["params"])
        run = run or jax.jit(functools.partial(state.create, model, update, config))()
        call = step_lib.make_call(step_lib.make_step(model, update, config, MASK))
        run, _ = call(run, jax.tree.map(lambda *x: np.stack(x), *(rows_of(first + i, 32) for i in range(count))), jnp.int32(count))
        kept.append(jax.tree.map(jnp.copy, run.variables))
    return model, *kept


# ---- the estimator (arXiv 2505.19223 §3) ------------------------------------------------------------------------------

COPIES = 400  # estimates of each of four sequences


@functools.cache
def estimated(settings):
    """(bound of the policy, bound of the reference), each (4 sequences, COPIES estimates)."""
    model, reference, policy = trained()
    rows = rows_of(5, 4)
    batch = {key: np.repeat(x, COPIES, axis=0) for key, x in rows.items()} | {"index": np.arange(4 * COPIES, dtype=np.uint32)}
    found = jax.jit(lambda p, r, batch: preference.draws(model, p, r, batch, (7, 3), MASK, settings))(policy, reference, batch)
    return tuple(np.asarray(x, np.float64).mean(0).reshape(4, COPIES) for x in (found.nats_B, found.reference_B))


def variance(x):
    return x.var(axis=1, ddof=1).mean()


def test_levels_of_their_own_lower_the_variance_and_the_same_masks_lower_it_most():
    """As VRPO proves: 8 levels with a mask each are better than 1 level with 8 masks, and all have one mean."""
    plans = {(1, 1): Preference(times=1, stratified=False), (1, 8): Preference(times=1, masks=8, stratified=False),
             (2, 4): Preference(times=2, masks=4, stratified=False), (8, 1): Preference(stratified=False), "stratified": Preference()}
    bounds = {name: estimated(settings)[0] for name, settings in plans.items()}
    order = [variance(bounds[name]) for name in ((1, 1), (1, 8), (2, 4), (8, 1), "stratified")]
    assert all(a > 1.1 * b for a, b in itertools.pairwise(order)), order
    for found in bounds.values():
        error = np.sqrt((found.var(1) + bounds["stratified"].var(1)) / COPIES)
        assert (np.abs(found.mean(1) - bounds["stratified"].mean(1)) < 3.5 * error).all()  # of 16 comparisons
    gains = {shared: np.subtract(*estimated(Preference(stratified=False, shared=shared))) for shared in (True, False)}
    assert variance(gains[False]) > 5 * variance(gains[True]), {shared: variance(gain) for shared, gain in gains.items()}
    error = np.sqrt((gains[True].var(1) + gains[False].var(1)) / COPIES)
    assert (np.abs(gains[True].mean(1) - gains[False].mean(1)) < 3 * error).all()


# ---- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [Preference(beta=BETA, times=3), Preference(beta=BETA, times=2, masks=2, stratified=False)], ids=str)
def test_the_loss_by_hand(settings):
    """Every mask built again, every log-likelihood from whole logits in numpy."""
    model, reference, policy = trained()
    batch, step = pairs_of(3), 9
    sums = jax.jit(lambda p, r: preference.batch_loss(model, config_of(), MASK, settings, p, r, batch, step, 4)[1])(policy, reference)
    logits = jax.jit(lambda v, noisy: model.head(v, model.apply(v, noisy, batch["position"], None, step_lib.attention_spec(batch))[0]))
    gain, number, count_B = np.zeros(8), settings.times * settings.masks, batch["maskable"].sum(-1)
    for draw in range(number):
        level = draw // settings.masks
        u = np.asarray(corrupt_lib.sample_uniforms((0, step, 0 if settings.stratified else level), batch["index"], corrupt_lib.TIME, 1))[:, 0]
        k = 1 + (np.floor(u * count_B) + (np.floor(level * count_B / settings.times + 0.5) if settings.stratified else 0)) % count_B
        position = np.asarray(corrupt_lib.sample_uniforms((0, step, draw), batch["index"], corrupt_lib.POSITION, T))
        rank = np.argsort(np.argsort(np.where(batch["maskable"], position, 2.0), axis=1), axis=1)
        masked = batch["maskable"] & (rank < k[:, None])
        for sign, variables in ((1, policy), (-1, reference)):
            scores = np.asarray(logits(variables, np.where(masked, MASK, batch["tokens"])), np.float64)
            logp = np.take_along_axis(scores, batch["tokens"][..., None], 2)[..., 0] - np.log(np.exp(scores).sum(-1))
            gain += sign * count_B / k * np.where(masked, logp, 0).sum(1) / number
    margin = BETA * (gain[::2] - gain[1::2])
    np.testing.assert_allclose(sums["loss"], np.log1p(np.exp(-margin)).mean(), rtol=1e-5)
    np.testing.assert_allclose(sums["reward_margin"], margin.mean(), rtol=1e-4, atol=1e-5)
    assert sums["reward_accuracy"] == (margin > 0).mean()


SETTINGS = dict(objective="preference", preference_beta=BETA, preference_draws=4)


def prepared(config, sizes=(1, 1, 1, 1)):
    """(step, state whose reference are its own weights, mesh)."""
    mesh = partitioning.make_mesh(config_lib.Mesh(*sizes), jax.devices()[:int(np.prod(sizes))])
    model = transformer.build(config.model, config.kernels, mesh)
    update = optimizer.make(config.optimizer, 100, model.shapes["params"])
    make = functools.partial(state.create, model, update, config)
    shardings = state.shardings(model, jax.eval_shape(make), mesh)
    step = step_lib.make_step(model, update, config, MASK)
    return jax.jit(step, out_shardings=(shardings, None)), jax.jit(make, out_shardings=shardings)(), mesh


def test_it_learns_what_is_preferred_and_the_reference_stays(tmp_path):
    take, run, _ = prepared(config_of(MOE, rate=3e-3, **SETTINGS))
    start, lines = run, []
    for i in range(40):
        run, values = take(run, pairs_of(i))
        lines.append(metrics.summarize(jax.device_get(values)))
    assert np.isclose(lines[0]["loss"], np.log(2), atol=1e-5) and lines[0]["reward_margin"] == 0  # policy and reference are one
    assert np.mean([line["loss"] for line in lines[-10:]]) < 0.5 and np.mean([line["reward_accuracy"] for line in lines[-10:]]) > 0.8
    assert len(lines[0]["load_by_layer"]) == 1 and int(run.skipped) == 0
    assert checkpoint.tree_hash(run.reference) == checkpoint.tree_hash(start.variables["params"]) != checkpoint.tree_hash(run.variables["params"])

    # it is in the checkpoint, beside the weights, and the run goes on as it would have
    saver = checkpoint.Checkpointer(str(tmp_path / "run"), 1, 0)
    saver.save(run, config_of(MOE, **SETTINGS))
    saver.wait()
    again = saver.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run), 40)
    saver.close()
    assert checkpoint.tree_hash(take(again, pairs_of(99))[0]) == checkpoint.tree_hash(take(run, pairs_of(99))[0])
    assert set(checkpoint.read_leaves(str(tmp_path / "run"), 40).shapes) == {
        "params/" + optimizer.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(run.reference)}  # what is sampled with


def test_four_devices_and_micro_batches_take_the_same_step():
    """With a row a device, so that pairs stand on two. And a base with adapters is its own reference: the first step is that of whole weights, but
    for what is trained."""
    tuned = dataclasses.replace(MODEL, lora_rank=2)
    after = []
    for config, sizes in ((config_of(tuned, **SETTINGS), (1, 1, 1, 1)), (config_of(tuned, accumulate=2, **SETTINGS), (1, 4, 1, 1))):
        take, run, mesh = prepared(config, sizes)
        assert run.reference is None
        for i in range(2):
            run, values = take(run, partitioning.put_batch(mesh, pairs_of(i)))
        after.append(jax.device_get((run.variables, values)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *after)
    assert after[0][1]["reward_margin"] != 0  # the second step's, against weights that the first has not moved


def test_no_gradient_reaches_the_reference():
    model, reference, policy = trained()
    loss = lambda p, r: preference.batch_loss(model, config_of(), MASK, Preference(times=2), p, r, pairs_of(0), 0, 4)[0]
    of_policy, of_reference = jax.jit(jax.grad(loss, argnums=(0, 1)))(policy, reference)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(of_reference)) and any(np.any(g) for g in jax.tree.leaves(of_policy))
    with pytest.raises(config_lib.ConfigError, match="give the state a reference, or the model adapters"):
        preference.reference_of(policy)
    with pytest.raises(config_lib.ConfigError, match="8 rows are not pairs in 3 micro-batches; use 6 rows or a multiple"):
        preference.gradients(Preference(), model, config_lib.Config(train=config_lib.Train(accumulate=3)), MASK, policy, pairs_of(0), 0)
    with pytest.raises(config_lib.ConfigError, match=r"beta=0\.0 must be positive"):
        Preference(beta=0.0)
