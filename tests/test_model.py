"""The transformer: equal computations are equal, and outputs depend on what they may see and on nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax.model import attention, functional, transformer
from pallas_kernels.attention import AttentionSpec

B, T, V = 2, 8, 11
CONFIG = config_lib.Model(  # every switch at once: moe, dense, moe, moe; grouped heads, bias, shared expert, partial rotary
    vocab_size=V, hidden_size=24, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, experts_per_token=2, expert_size=12,
    dense_layers=(1,), dense_size=16, shared_expert_size=8, router_bias=True, rotary_fraction=0.5, clip_qkv=2.0, max_length=T, init_std=0.3)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, V)


@pytest.fixture(scope="module")
def model():
    return transformer.build(CONFIG)


@pytest.fixture(scope="module")
def variables(model):
    made = jax.jit(model.init)(jax.random.key(0))
    bias = made["router_bias"]["bias"]
    return {**made, "router_bias": {"bias": 0.05 * jax.random.normal(jax.random.key(2), bias.shape)}}


@pytest.fixture(scope="module")
def apply(model):
    """hidden of tokens or embeddings."""
    run = jax.jit(lambda v, x, positions, spec: model.apply(v, x, positions, None, spec, None, None)[0])
    return lambda v, x, positions=POSITIONS, spec=AttentionSpec(): run(v, x, positions, spec)


@pytest.fixture(scope="module")
def gradient_of():
    def run(config, variables):
        model = transformer.build(config)

        def loss(params):
            hidden, _, stats = model.apply({**variables, "params": params}, TOKENS, POSITIONS)
            nll = model.cross_entropy({**variables, "params": params}, hidden, TOKENS, jnp.ones((B, T), bool))
            return nll.mean() + 0.1 * stats.z_B.mean(), hidden
        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return run


@pytest.fixture(scope="module")
def plain(gradient_of, variables):
    return gradient_of(CONFIG, variables)


@pytest.mark.parametrize("change", [dict(scan_layers=False), dict(remat="dots"), dict(remat="full"), dict(remat="full", scan_layers=False)], ids=str)
def test_unrolled_and_rematerialised_layers_compute_the_same(change, gradient_of, plain, variables):
    gradient, hidden = gradient_of(dataclasses.replace(CONFIG, **change), variables)
    np.testing.assert_allclose(hidden, plain[1], atol=1e-6, rtol=1e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(plain[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6, err_msg=str(path))


def test_every_parameter_has_a_gradient(plain):
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain[0]):
        per_layer = np.abs(np.asarray(leaf)).reshape(leaf.shape[0], -1).max(1) if "stack" in str(path[0]) else np.abs(leaf).max()
        assert (np.asarray(per_layer) > 0).all(), path


SEGMENT = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 3, 3]])
STRUCTURES = {
    "everything": (AttentionSpec(), np.ones((B, T, T), bool)),
    "segments": (AttentionSpec.own(segment=SEGMENT), np.asarray(SEGMENT[:, :, None] == SEGMENT[:, None])),
    "padding": (AttentionSpec(padding_k=SEGMENT == 0), np.broadcast_to(np.asarray(SEGMENT != 0)[:, None], (B, T, T)) | np.eye(T, dtype=bool)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_depend_on_every_visible_input_and_on_nothing_else(name, model, variables, apply):
    """The Jacobian of each position's output with respect to each position's embedding."""
    spec, visible = STRUCTURES[name]
    embeddings = variables["params"]["embedding"][TOKENS]
    direction = jax.random.normal(jax.random.key(3), (CONFIG.hidden_size,))
    jacobian = jax.jit(jax.jacrev(lambda x: apply(variables, x, POSITIONS, spec) @ direction))(embeddings)  # (B, T, B, T, D)
    size = np.abs(np.asarray(jacobian)).max(-1)
    for b in range(B):
        assert (size[b, :, 1 - b] == 0).all()
        assert ((size[b, :, b] > 1e-7) == visible[b]).all() and (size[b, :, b][~visible[b]] == 0).all()


def test_segments_and_padding_leak_not_a_bit(variables, apply):
    spec = AttentionSpec.own(segment=SEGMENT, padding=SEGMENT == 0)
    before = apply(variables, TOKENS, POSITIONS, spec)
    for b, segment in ((0, 1), (0, 2), (0, 0), (1, 3)):
        other = np.zeros((B, T), bool)
        other[b] = np.asarray(SEGMENT)[b] == segment
        after = apply(variables, jnp.where(other, (TOKENS + 3) % V, TOKENS), POSITIONS, spec)
        assert (np.asarray(after)[~other] == np.asarray(before)[~other]).all()
        assert (np.asarray(after)[other] != np.asarray(before)[other]).any()


def test_only_relative_positions_matter(variables, apply):
    before = apply(variables, TOKENS)
    np.testing.assert_allclose(apply(variables, TOKENS, POSITIONS + 5), before, atol=2e-5)
    assert np.abs(apply(variables, TOKENS, POSITIONS.at[0, 3].set(7)) - before)[0].max() > 1e-3
    assert np.abs(apply(variables, TOKENS, 2 * POSITIONS) - before).max() > 1e-3


def test_partial_rotary_turns_pairs_and_leaves_the_rest():
    x = jax.random.normal(jax.random.key(0), (B, T, 3, 10))
    turned = np.asarray(functional.rotate(x, *functional.rotary_angles(POSITIONS, 6, 100.0)))
    assert (turned[..., 6:] == np.asarray(x)[..., 6:]).all() and (turned[:, 0] == np.asarray(x)[:, 0]).all()
    for pair in range(3):  # (i, i + 3) is a complex number that is multiplied by exp(i position θ^(-2 pair / 6))
        angle = np.arange(T) * 100.0 ** (-2 * pair / 6)
        want = (np.asarray(x)[..., pair] + 1j * np.asarray(x)[..., pair + 3]) * np.exp(1j * angle)[None, :, None]
        np.testing.assert_allclose(turned[..., pair] + 1j * turned[..., pair + 3], want, atol=1e-5)


def test_embeddings_may_stand_for_tokens(variables, apply):
    assert (apply(variables, variables["params"]["embedding"][TOKENS]) == apply(variables, TOKENS)).all()


def test_head_and_cross_entropy_agree(model, variables, apply):
    hidden, needed = apply(variables, TOKENS), TOKENS > 4
    want = -jax.nn.log_softmax(model.head(variables, hidden))[jnp.arange(B)[:, None], jnp.arange(T), TOKENS]
    np.testing.assert_allclose(model.cross_entropy(variables, hidden, TOKENS, needed), jnp.where(needed, want, 0), atol=2e-6)


def test_tied_embeddings_share_one_matrix():
    model = transformer.build(dataclasses.replace(CONFIG, num_layers=1, dense_layers=(), router_bias=False, tie_embeddings=True))
    variables = model.init(jax.random.key(0))
    assert "head" not in variables["params"]
    hidden = jax.random.normal(jax.random.key(1), (B, T, CONFIG.hidden_size))
    np.testing.assert_allclose(model.head(variables, hidden), hidden @ variables["params"]["embedding"].T, atol=1e-5)


def test_initial_weights_follow_the_stated_deviation():
    for init_std in (0.02, 0.0):
        config = dataclasses.replace(CONFIG, hidden_size=64, expert_size=64, dense_size=96, shared_expert_size=32, vocab_size=256, init_std=init_std)
        params = jax.jit(transformer.build(config).init)(jax.random.key(0))["params"]
        for name, kind, length in transformer.stacks(config):
            for key, parameter in transformer.layer_parameters(config, kind).items():
                leaf = np.asarray(params[name][key])
                assert leaf.shape == (length, *parameter.shape)
                if key.endswith("norm"):
                    assert (leaf == 1).all()
                else:
                    assert np.isclose(leaf.std(), init_std or parameter.fan_in**-0.5, rtol=0.15), (name, key)
        assert np.isclose(np.std(params["embedding"]), init_std or 64**-0.5, rtol=0.1)


def test_bfloat16_computes_low_and_keeps_float32_masters(model, variables, apply):
    low = transformer.build(dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(low.shapes)} == {jnp.dtype(jnp.float32)}
    hidden, _, stats = jax.jit(lambda v: low.apply(v, TOKENS, POSITIONS))(variables)
    assert hidden.dtype == jnp.bfloat16 and low.head(variables, hidden).dtype == jnp.float32
    assert {leaf.dtype for leaf in stats} == {jnp.dtype(jnp.float32)}
    distance = np.linalg.norm(np.asarray(hidden, np.float32) - apply(variables, TOKENS)) / np.linalg.norm(apply(variables, TOKENS))
    assert distance < 0.1


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("shift", [False, True])
def test_wanted_positions_get_what_the_whole_forward_gives_them(scan, shift, variables):
    """In any order, twice, under a structure; the last layer's router counts them alone, where layers are unrolled."""
    built = transformer.build(dataclasses.replace(CONFIG, scan_layers=scan, shift_predictions=shift))
    wanted, spec = jnp.array([[5, 2, 2], [0, 7, 4]]), AttentionSpec.own(segment=SEGMENT, block=POSITIONS // 2, padding=SEGMENT == 0)
    run = jax.jit(lambda wanted: built.apply(variables, TOKENS, POSITIONS, None, spec, None, None, wanted))
    (got, _, stats), (whole, _, all_stats) = run(wanted), run(None)
    assert got.shape == (B, 3, CONFIG.hidden_size)
    np.testing.assert_allclose(got, jnp.take_along_axis(whole, wanted[..., None], axis=1), atol=1e-5)
    assert scan or stats.tokens_B[-1].max() <= 3 < stats.tokens_B[0].min()
    np.testing.assert_allclose(stats.load_BE[:-1], all_stats.load_BE[:-1])


def test_wanted_positions_leave_the_cache_whole(variables):
    built = transformer.build(dataclasses.replace(CONFIG, scan_layers=False))
    run = jax.jit(lambda wanted: built.apply(variables, TOKENS, POSITIONS, POSITIONS, AttentionSpec(), built.init_cache(B, T), None, wanted)[:2])
    (got, cache), (whole, all_cache) = run(jnp.array([[3], [6]])), run(None)
    np.testing.assert_allclose(got[:, 0], whole[jnp.arange(B), jnp.array([3, 6])], atol=1e-5)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(all_cache), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# ---- cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(model):
    """(hidden, cache) of a window of the canvas."""
    run = jax.jit(lambda v, tokens, positions, slots, spec, cache, store: model.apply(v, tokens, positions, slots, spec, cache, store)[:2])

    def apply(variables, slots, cache, store=None, tokens=TOKENS, spec=AttentionSpec()):
        take = lambda x: jnp.take_along_axis(x, slots, axis=1)
        if spec.segment_k is not None:
            spec = spec._replace(segment_q=take(spec.segment_k))
        return run(variables, take(tokens), take(POSITIONS), slots, spec, cache, store)
    return apply


def test_a_full_window_with_a_cache_equals_the_forward_without(model, variables, apply, cached):
    hidden, _ = cached(variables, POSITIONS, model.init_cache(B, T))
    np.testing.assert_allclose(hidden, apply(variables, TOKENS), atol=1e-6)


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(segment_k=SEGMENT, padding_k=SEGMENT == 0)], ids=["everything", "segments"])
def test_a_window_on_a_filled_cache_equals_the_whole_forward(spec, model, variables, apply, cached):
    """Windows differ between rows and are in any order."""
    _, cache = cached(variables, POSITIONS, model.init_cache(B, T), spec=spec)
    window = jnp.array([[5, 2, 3], [0, 7, 4]])
    hidden, after = cached(variables, window, cache, spec=spec)
    whole = apply(variables, TOKENS, POSITIONS, spec._replace(segment_q=spec.segment_k))
    np.testing.assert_allclose(hidden, jnp.take_along_axis(whole, window[..., None], axis=1), atol=1e-5)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_store_mask_keeps_slots_as_they_were(model, variables, cached):
    _, cache = cached(variables, POSITIONS, model.init_cache(B, T))
    window = jnp.array([[1, 2, 3], [4, 5, 6]])
    store = jnp.array([[True, False, True], [False, False, True]])
    changed = (TOKENS + 1) % V
    seen, after = cached(variables, window, cache, store, tokens=changed)
    everywhere, stored = cached(variables, window, cache, tokens=changed)
    assert (seen == everywhere).all()  # this forward sees its own keys, stored or not
    written = np.zeros((B, T), bool)
    written[[0, 0, 1], [1, 3, 6]] = True
    for old, new, all_stored in zip(*map(jax.tree.leaves, (cache, after, stored)), strict=True):
        old, new, all_stored = (np.asarray(x) for x in (old, new, all_stored))
        assert (new[:, ~written] == old[:, ~written]).all() and (new[:, written] == all_stored[:, written]).all()
        assert (new[:, written] != old[:, written]).any()


def test_shifted_predictions_take_the_state_before(model, variables, apply):
    shifted = transformer.build(dataclasses.replace(CONFIG, shift_predictions=True))
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2], [0, 0, 0, 1, 2, 3, 4, 5]])  # two segments; left padding
    hidden = apply(variables, TOKENS, positions)
    moved = shifted.apply(variables, TOKENS, positions)[0]
    for b, t in np.ndindex(B, T):
        source = t if positions[b, t] == 0 else t - 1
        np.testing.assert_allclose(moved[b, t], hidden[b, source], atol=1e-6)
    with pytest.raises(config_lib.ConfigError, match="shift_predictions"):
        shifted.apply(variables, TOKENS, POSITIONS, POSITIONS, AttentionSpec(), shifted.init_cache(B, T), None, POSITIONS[:, :1])


def test_projection_biases_begin_at_zero_and_are_added_to_the_projections():
    """Against a projection that is wider by one input, which is always 1."""
    config = dataclasses.replace(CONFIG, qkv_bias=True)
    D, N, K, H = config.hidden_size, config.num_heads, config.kv_heads, config.head_size
    keys = iter(jax.random.split(jax.random.key(4), 8))
    draw = lambda *shape: 0.3 * jax.random.normal(next(keys), shape)
    biased = {"query": draw(D, N, H), "key": draw(D, K, H), "value": draw(D, K, H), "query_bias": draw(N, H), "key_bias": draw(K, H),
              "value_bias": draw(K, H), "output": draw(N, H, D), "query_norm": jnp.ones(H), "key_norm": jnp.ones(H)}
    wider = biased | {name: jnp.concatenate([biased[name], biased[f"{name}_bias"][None]]) for name in ("query", "key", "value")}
    x, rotary = draw(B, T, D), functional.rotary_angles(POSITIONS, 4, config.rope_theta)
    run = lambda x, params, config: attention.attend(x, params, rotary, AttentionSpec(), config, None, None, None, "auto", None)[0]
    got = run(x, biased, config)
    want = run(jnp.concatenate([x, jnp.ones((B, T, 1))], -1), wider, dataclasses.replace(config, qkv_bias=False))
    np.testing.assert_allclose(got, want, atol=1e-5)
    made = transformer.build(config).init(jax.random.key(0))["params"]["stack_0"]
    assert all(not np.asarray(made[f"{name}_bias"]).any() for name in ("query", "key", "value"))


def test_stored_bf16_weights_compute_as_their_float32_copies(model, variables, apply):
    narrow = transformer.build(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow.init(jax.random.key(0))["params"])} == {"bfloat16", "float32"}  # the router
    rounded = jax.tree.map(lambda x, like: x.astype(like.dtype), variables, narrow.shapes)
    got = narrow.apply(rounded, TOKENS, POSITIONS)[0]
    want = apply(jax.tree.map(lambda x: x.astype(jnp.float32), rounded), TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("columns", [5, 8192, 10_000])
def test_the_head_in_parts_equals_the_whole(columns, monkeypatch):
    monkeypatch.setattr(functional, "HEAD_COLUMNS", min(columns, 4096))
    hidden, weight = jax.random.normal(jax.random.key(0), (2, 3, 16)), jax.random.normal(jax.random.key(1), (16, columns)).astype(jnp.bfloat16)
    want = jnp.einsum("btd,dv->btv", hidden.astype(jnp.bfloat16), weight, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(functional.vocabulary_logits(hidden.astype(jnp.bfloat16), weight), want, rtol=1e-5, atol=1e-4)
