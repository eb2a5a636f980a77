"""Low-rank adapters: a model that begins as its base, of which they alone are trained, and that is its merged weights."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning, tokenizer
from llada_jax.model import count, lora, transformer
from llada_jax.training import checkpoint, combine, optimizer, pretrained, state
from llada_jax.training import step as step_lib
from tests import tiny_run

BYTE = tokenizer.Bytes()
V, MASK, B, T, RANK = BYTE.vocab_size, BYTE.mask_id, 4, 16, 2
BASE = config_lib.Model(vocab_size=V, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, num_experts=4, experts_per_token=2, expert_size=8,
                        dense_layers=(0,), dense_size=12, shared_expert_size=8, max_length=T, init_std=0.2)
MODEL = dataclasses.replace(BASE, lora_rank=RANK, lora_alpha=3.0)
TARGETS = {"query", "key", "value", "output", "gate", "up", "down", "shared_gate", "shared_up", "shared_down"}


def config_of(model=MODEL, **groups):
    config = config_lib.Config(
        model=model, data=config_lib.Data(sequence_length=T, tokenizer="bytes"), diffusion=config_lib.Diffusion(variable_length_rate=0.0),
        optimizer=config_lib.Optimizer(learning_rate=1e-2, warmup_steps=0, schedule="constant", eps=1e-3), train=config_lib.Train(batch_size=B))
    config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()})
    config_lib.validate(config)
    return config


def batch_of(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 8, (B, T)).astype(np.int32)
    return {"tokens": tokens, "segment": np.ones((B, T), np.int32), "position": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
            "maskable": np.ones((B, T), bool), "index": np.arange(B, dtype=np.uint32) + B * seed}


@functools.cache
def program(config, sizes=(1, 1, 1, 1)):
    """(model, fresh state, its shardings, step, mesh) on a mesh of these sizes."""
    mesh = partitioning.make_mesh(config_lib.Mesh(*sizes), jax.devices()[:int(np.prod(sizes))])
    model = transformer.build(config.model, config.kernels, mesh)
    update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
    make = lambda: state.create(model, update, config)
    shardings = state.shardings(model, jax.eval_shape(make), mesh)
    return model, jax.jit(make, out_shardings=shardings)(), shardings, jax.jit(step_lib.make_step(model, update, config, MASK),
                                                                            out_shardings=(shardings, None)), mesh


def by_path(tree):
    return {optimizer.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def trained():
    """State after eight steps on the first device."""
    _, run, _, take, _ = program(config_of())
    for i in range(8):
        run, _ = take(run, batch_of(i))
    return run


@functools.cache
def forward(model_config):
    model = transformer.build(model_config)
    return jax.jit(lambda variables, tokens: model.head(variables, model.apply(variables, tokens, jnp.broadcast_to(jnp.arange(T), (B, T)))[0]))


def test_it_begins_as_its_base_bit_for_bit():
    """The same weights from the same seed, and the same logits; adapters beside every matrix of the layers but the router."""
    base = by_path(jax.jit(transformer.build(BASE).init)(jax.random.key(0)))
    model = transformer.build(MODEL)
    variables = jax.jit(model.init)(jax.random.key(0))
    ours = by_path(variables)
    added = {path for path in ours if re.search(lora.PATTERN, path)}
    assert {path.rsplit("/", 1)[1][:-len(lora.A)] for path in added} == TARGETS and set(ours) - added == set(base)
    for path, leaf in base.items():
        np.testing.assert_array_equal(ours[path], leaf)
    for path in added:
        assert np.any(ours[path]) == path.endswith(lora.A)
    tokens = batch_of()["tokens"]
    plain = {"params": {name: {key: x for key, x in part.items() if f"params/{name}/{key}" not in added} if isinstance(part, dict) else part
                        for name, part in variables["params"].items()}}
    np.testing.assert_array_equal(forward(MODEL)(variables, tokens), forward(BASE)(plain, tokens))
    assert ours["params/stack_1/gate_lora_a"].shape == (2, 4, 16, RANK) and ours["params/stack_1/gate_lora_b"].shape == (2, 4, RANK, 8)
    assert ours["params/stack_1/output_lora_a"].shape == (2, 4, 4, RANK) and ours["params/stack_1/query_lora_b"].shape == (2, RANK, 4, 4)
    axes = model.axes["params"]["stack_1"]
    assert tuple(axes["gate_lora_a"]) == (None, "experts", "embed", None) and tuple(axes["gate_lora_b"]) == (None, "experts", None, "mlp")
    size, of_base = count.parameters(MODEL), count.parameters(BASE)
    assert (size.total, size.active) == (of_base.total + size.adapters, of_base.active)
    assert size.total == sum(x.size for x in ours.values()) and size.adapters == sum(ours[path].size for path in added)


def test_the_adapters_alone_change_and_have_moments():
    _, start, _, _, _ = program(config_of())
    run = trained()
    assert int(run.skipped) == 0
    before, after = by_path(start.variables), by_path(run.variables)
    for path in before:
        assert np.array_equal(before[path], after[path]) != bool(re.search(lora.PATTERN, path)), path
    moments = {path: leaf for path, leaf in by_path(run.opt_state).items() if leaf.ndim}
    assert moments and all(re.search(lora.PATTERN, path) for path in moments)
    size = count.parameters(MODEL)
    assert sum(leaf.size for leaf in moments.values()) == 2 * size.adapters
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run)) + 4 * size.adapters  # and the gradients
    assert abs(count.state_bytes(config_of()) / held - 1) < 0.01


def test_frozen_weights_have_no_backward_pass_and_no_norm():
    """The gradient of what optimizer.trainable names is what it is in full training, and that of the rest is zero."""
    small = dataclasses.replace(BASE, num_layers=1)
    config = config_of(small, optimizer={"trainable": "query$"})
    model = transformer.build(small)
    variables = jax.jit(model.init)(jax.random.key(0))
    grads, _ = jax.jit(lambda v: step_lib.gradients(model, config, MASK, v, batch_of(), jnp.int32(0)))(variables)
    whole, _ = jax.jit(lambda v: step_lib.gradients(model, config_of(small), MASK, v, batch_of(), jnp.int32(0)))(variables)
    for path, leaf in by_path(grads).items():
        np.testing.assert_allclose(leaf, by_path(whole)[path] if path.endswith("query") else 0, rtol=1e-4, atol=1e-7)


def test_merged_weights_give_the_same_logits():
    run, tokens = trained(), batch_of()["tokens"]
    start = forward(MODEL)(program(config_of())[1].variables, tokens)
    apart = forward(MODEL)(run.variables, tokens)
    assert np.abs(apart - start).max() > 0.1
    params = {name: dict(part) if isinstance(part, dict) else part for name, part in run.variables["params"].items()}
    for name, kind, length in transformer.stacks(BASE):  # in numpy
        for key, p in transformer.layer_parameters(BASE, kind).items():
            if key in TARGETS:
                a, b = (np.asarray(params[name].pop(key + end), np.float64) for end in (lora.A, lora.B))
                lead = 1 + (p.axes[0] == "experts")
                delta = a.reshape(*a.shape[:lead], -1, RANK) @ b.reshape(*b.shape[:lead], RANK, -1)
                params[name][key] = np.float32(params[name][key] + 1.5 * delta.reshape(length, *p.shape))
    np.testing.assert_allclose(forward(BASE)({"params": params}, tokens), apart, atol=1e-5)


def test_a_step_is_the_same_on_a_mesh():
    """Adapters are split as their weights are: experts, hidden widths and what comes from all of them."""
    sizes = (1, 2, 2, 2)
    _, _, shardings, take, mesh = program(config_of(), sizes)
    run, _ = program(config_of())[3](trained(), batch_of(9))
    placed = jax.tree.map(lambda x, sharding: jax.device_put(np.asarray(x), sharding), trained(), shardings)
    assert any(not leaf.sharding.is_fully_replicated for path, leaf in by_path(placed.variables).items() if re.search(lora.PATTERN, path))
    other, _ = take(placed, partitioning.put_batch(mesh, batch_of(9)))
    for (path, a), b in zip(by_path(run.variables).items(), jax.tree.leaves(other.variables), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=path)


# ---- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders of the trained state, and of its base alone."""
    where = tmp_path_factory.mktemp("runs")
    base = {"params": {name: {key: x for key, x in part.items() if not re.search(lora.PATTERN, key)} if isinstance(part, dict) else part
                       for name, part in trained().variables["params"].items()}}
    for name, run, config in (("tuned", trained(), config_of()), ("base", trained()._replace(variables=base), config_of(BASE))):
        saver = checkpoint.Checkpointer(str(where / name), 1, 0)
        saver.save(run, config)
        saver.close()
        BYTE.save(where / name)
    return where


def logits_of(path):
    """What the weights that a user names give, on two devices."""
    weights = pretrained.open_weights(str(path), None) if (path / "checkpoints").exists() else pretrained.open_weights(None, str(path))
    mesh = partitioning.make_mesh(config_lib.Mesh(data=1, fsdp=2), jax.devices()[:2])
    model = transformer.build(weights.config.model)
    variables = weights.load(model.shapes, partitioning.shardings_of(mesh, model.axes, model.shapes))
    assert not weights.config.model.lora_rank and not any(re.search(lora.PATTERN, path) for path in by_path(variables))
    return forward(BASE)(jax.device_get(variables), batch_of()["tokens"])


def test_it_resumes(folders):
    saver = checkpoint.Checkpointer(str(folders / "tuned"), 1, 0)
    again = saver.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trained()), 8)
    saver.close()
    take = program(config_of())[3]
    assert checkpoint.tree_hash(take(again, batch_of(8))[0]) == checkpoint.tree_hash(take(trained(), batch_of(8))[0])


def test_merged_exported_taken_apart_and_put_together(folders, tmp_path):
    tuned, base, parts = folders / "tuned", folders / "base", tmp_path / "adapters"
    done = tiny_run.each("convert", [
        ["merge", f"--checkpoint={tuned}", f"--out={tmp_path / 'merged'}"],
        ["export", f"--checkpoint={tuned}", f"--out={tmp_path / 'out'}"],
        ["adapters", f"--checkpoint={tuned}", f"--out={parts}"],
        ["merge", f"--checkpoint={base}", f"--adapters={parts}", f"--out={tmp_path / 'again'}"],
        ["average", f"--workdir={tuned}", "--steps=8", f"--out={tmp_path / 'mean'}"],
        ["merge", f"--checkpoint={base}", f"--out={tmp_path / 'no'}"],
        ["merge", f"--checkpoint={tuned}", f"--adapters={parts}", f"--out={tmp_path / 'no'}"],
        ["merge", f"--checkpoint={parts}", f"--out={tmp_path / 'no'}"],
        ["export", f"--checkpoint={parts}", f"--out={tmp_path / 'no'}"],
        ["adapters", f"--checkpoint={base}", f"--out={tmp_path / 'no'}"],
    ])
    assert all(result.returncode == 0 and not result.stderr for result in done[:5]), [result.stderr for result in done]
    want = forward(MODEL)(trained().variables, batch_of()["tokens"])
    for place in (tuned, tmp_path / "merged", tmp_path / "out", tmp_path / "again", tmp_path / "mean"):
        np.testing.assert_allclose(logits_of(place), want, atol=1e-5, err_msg=str(place))
    size = lambda folder: sum(x.size for x in jax.tree.leaves(checkpoint.read_leaves(str(folder), 8).shapes))
    assert size(parts) == count.parameters(MODEL).adapters and size(base) == count.parameters(BASE).total
    assert f"{4 * count.parameters(MODEL).adapters:,} bytes" in done[2].stdout
    apart = "holds adapters without their base"
    for result, words in zip(done[5:], ("has no adapters", "has adapters of its own", apart, apart, "has no adapters"), strict=True):
        assert result.returncode == 1 and result.stderr.count("\n") == 1 and words in result.stderr, result.stderr
    with pytest.raises(config_lib.ConfigError, match=r"holds adapters without their base .*convert merge --checkpoint=BASE --adapters="):
        logits_of(parts)


def test_a_run_can_start_from_a_base_and_from_adapters(folders):
    """--init_from: a base gets adapters, adapters go on, and where the new run has none, or others, they are in its weights."""
    fresh = lambda config: jax.jit(transformer.build(config).init)(jax.random.key(5))
    tuned = checkpoint.read_leaves(str(folders / "tuned"), 8)
    with_adapters, missing, _ = checkpoint.load_matching(str(folders / "base"), 8, fresh(MODEL))
    assert all(re.search(lora.PATTERN, path) for path in missing) and len(missing) == 2 * 17
    np.testing.assert_array_equal(forward(MODEL)(with_adapters, batch_of()["tokens"]), logits_of(folders / "base"))
    for config, leaves in ((MODEL, tuned), (BASE, combine.plain(tuned, MODEL))):
        variables, missing, extra = checkpoint.load_matching(str(folders / "tuned"), 8, fresh(config), leaves)
        assert not missing and not extra
        np.testing.assert_allclose(forward(config)(variables, batch_of()["tokens"]), logits_of(folders / "tuned"), atol=1e-5)


# ---- what it says when it cannot --------------------------------------------------------------------------------------


def test_settings_that_cannot_work():
    with pytest.raises(config_lib.ConfigError, match=r"model\.lora_targets='quer' names no matrix of a layer in full; these are query, key"):
        transformer.build(dataclasses.replace(MODEL, lora_targets="quer"))
    narrow = transformer.build(dataclasses.replace(MODEL, param_dtype="bfloat16")).shapes["params"]
    assert narrow["stack_1"]["query"].dtype == jnp.bfloat16 and narrow["stack_1"]["query_lora_a"].dtype == jnp.float32
    optimizer.make(config_of().optimizer, 10, narrow)
    with pytest.raises(config_lib.ConfigError, match=r"trains stack_0/query, which is not float32; set model\.param_dtype=float32"):
        optimizer.make(config_of(optimizer={"trainable": "lora|query"}).optimizer, 10, narrow)
    for group, key, value in (("model", "lora_rank", -1), ("model", "lora_targets", "(")):
        with pytest.raises(config_lib.ConfigError, match=f"{group}.{key}"):
            config_lib.from_config_dict({group: {key: value}})
