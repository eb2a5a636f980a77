"""Experts that choose tokens: against loops, and that a row's result is its own."""

import dataclasses

import jax
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.model import moe, transformer
from llada_jax.training import metrics, optimizer, state
from llada_jax.training import step as step_lib
from pallas_kernels.attention import AttentionSpec

B, T, D, E, A, V, MASK = 4, 12, 8, 4, 2, 16, 15
CONFIG = config_lib.Model(vocab_size=V, hidden_size=D, num_layers=2, num_heads=2, num_experts=E, experts_per_token=A, expert_size=4, max_length=T,
                          init_std=0.4, router_choice="expert")
VALID = np.arange(T) < np.array([[T], [7], [1], [0]])
run = jax.jit(moe.moe, static_argnums=(4, 5, 6))


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 5)
    normal = lambda i, *shape: 0.5 * jax.random.normal(keys[i], shape)
    return normal(4, B, T, D), {"router": normal(0, D, E), "gate": normal(1, E, D, 4), "up": normal(2, E, D, 4), "down": normal(3, E, 4, D)}


def by_loops(x, params, valid, score):
    """Row by row, expert by expert: its best ⌈n A / E⌉ of the n real tokens, weighed by their scores."""
    x, params = np.asarray(x, np.float64), {name: np.asarray(p, np.float64) for name, p in params.items()}
    out, load = np.zeros(x.shape), np.zeros((B, T, E))
    for b in range(B):
        logits, n = x[b] @ params["router"], int(valid[b].sum())
        scores = 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for e in range(E):
            for t in sorted(np.flatnonzero(valid[b]), key=lambda t, e=e, scores=scores: -scores[t, e])[:int(np.ceil(n * A / E))]:
                gate = x[b, t] @ params["gate"][e]
                out[b, t] += scores[t, e] * 1.5 * ((gate / (1 + np.exp(-gate)) * (x[b, t] @ params["up"][e])) @ params["down"][e])
                load[b, t, e] += 1
    return out, load


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equals_loops(inputs, score):
    x, params = inputs
    config = dataclasses.replace(CONFIG, router_score=score, router_scale=1.5)
    y, stats, chosen = run(x, params, None, VALID, config, config_lib.Kernels(), None)
    want, load = by_loops(x, params, VALID, score)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_array_equal(stats.load_BE, load.sum(1))
    assert (np.asarray(stats.load_BE) == [[6], [4], [1], [0]]).all()  # even, and padding is never chosen
    assert (y[~VALID] == 0).all() and (chosen["tokens"] <= T).all() and len(np.unique(load.sum(-1)[0])) > 1


def test_a_row_depends_on_itself_alone(inputs):
    """Not on its neighbours, bit for bit, nor on the padding behind it."""
    x, params = inputs
    whole, _, _ = run(x, params, None, VALID, CONFIG, config_lib.Kernels(), None)
    others, _, _ = run(x.at[np.array([0, 2, 3])].set(9.0), params, None, VALID, CONFIG, config_lib.Kernels(), None)
    np.testing.assert_array_equal(others[1], whole[1])
    alone, _, _ = run(x[1:2, :7], params, None, VALID[1:2, :7], CONFIG, config_lib.Kernels(), None)
    np.testing.assert_allclose(alone[0], whole[1, :7], atol=1e-5)
    later, _, _ = run(x.at[1, 6].set(9.0), params, None, VALID, CONFIG, config_lib.Kernels(), None)
    assert np.any(later[1, :6] != whole[1, :6])  # but on later tokens of its own


def config_of(**mesh):
    config = config_lib.Config(
        model=CONFIG, data=config_lib.Data(sequence_length=T), diffusion=config_lib.Diffusion(balance_coefficient=0.0, variable_length_rate=0.0),
        optimizer=config_lib.Optimizer(learning_rate=1e-2, warmup_steps=0, schedule="constant", eps=1e-3), train=config_lib.Train(batch_size=B),
        mesh=config_lib.Mesh(**mesh))
    config_lib.validate(config)
    return config


def test_it_learns_with_an_even_load_and_the_same_on_a_mesh():
    rows = np.random.default_rng(0).integers(0, 4, (B, T)).astype(np.int32)
    batch = {"tokens": rows, "segment": np.ones((B, T), np.int32), "position": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
             "maskable": np.ones((B, T), bool), "index": np.arange(B, dtype=np.uint32)}
    after = []
    for config, steps in ((config_of(data=1), 30), (config_of(data=1, fsdp=2, tensor=2), 1)):
        mesh = partitioning.make_mesh(config.mesh, jax.devices()[:config.mesh.fsdp * config.mesh.tensor])
        model = transformer.build(config.model, config.kernels, mesh)
        update = optimizer.make(config.optimizer, 100, model.shapes["params"])
        shardings = state.shardings(model, jax.eval_shape(lambda m=model, u=update, c=config: state.create(m, u, c)), mesh)
        taken = jax.jit(lambda m=model, u=update, c=config: state.create(m, u, c), out_shardings=shardings)()
        take, lines = jax.jit(step_lib.make_step(model, update, config, MASK), out_shardings=(shardings, None)), []
        for i in range(steps):
            taken, values = take(taken, partitioning.put_batch(mesh, batch))
            after += [jax.device_get(taken.variables["params"])] if i == 0 else []
            lines.append(metrics.summarize(jax.device_get(values)))
        assert all(line["load_by_layer"] == [1.0, 1.0] for line in lines)
        assert steps == 1 or np.mean([line["loss"] for line in lines[-5:]]) < 0.6 * np.mean([line["loss"] for line in lines[:3]])
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_where_it_cannot_run_it_says_so():
    wrong = lambda **groups: config_lib.validate(dataclasses.replace(
        config_of(), **{name: dataclasses.replace(getattr(config_of(), name), **values) for name, values in groups.items()}))
    for groups, words in ((dict(diffusion=dict(objective="autoregressive")), "diffusion.objective=masked"),
                          (dict(diffusion=dict(balance_coefficient=0.01)), "balance_coefficient=0"),
                          (dict(model=dict(router_bias=True)), "router_bias=False")):
        with pytest.raises(config_lib.ConfigError, match=words):
            wrong(**groups)
    with pytest.raises(config_lib.ConfigError, match=r"set mesh\.expert=1, not 2"):
        transformer.build(CONFIG, mesh=partitioning.make_mesh(config_lib.Mesh(data=1, expert=2), jax.devices()[:2]))
    model = transformer.build(CONFIG)
    tokens, positions = np.zeros((1, T), np.int32), np.arange(T)[None]
    apply = lambda *more: jax.eval_shape(lambda variables: model.apply(variables, tokens, positions, *more), model.shapes)
    for more in ((positions, AttentionSpec(), model.init_cache(1, T)), (None, AttentionSpec.own(block=positions))):
        with pytest.raises(config_lib.ConfigError, match="decode with --cache=none and a decoder that is not block-causal"):
            apply(*more)


@pytest.mark.parametrize("scan", [True, False])
def test_what_a_decoder_asks_for_is_what_a_whole_forward_gives(scan):
    """All tokens of the row are compared in the last layer too, though only some positions are wanted."""
    model = transformer.build(dataclasses.replace(CONFIG, scan_layers=scan))
    variables = jax.jit(model.init)(jax.random.key(0))
    tokens, positions = np.random.default_rng(0).integers(0, V, (2, T)), np.tile(np.arange(T), (2, 1))
    wanted = np.array([[3, 5], [0, T - 1]])
    whole, some = jax.jit(lambda v: (model.apply(v, tokens, positions)[0], model.apply(v, tokens, positions, wanted_BC=wanted)[0]))(variables)
    np.testing.assert_allclose(some, np.take_along_axis(np.asarray(whole), wanted[:, :, None], axis=1), atol=1e-6)
