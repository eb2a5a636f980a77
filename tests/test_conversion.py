"""From autoregressive weights to masked diffusion: annealed attention, noise on the embeddings of masks, Dream's shift and weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.diffusion import blocks, conversion, corrupt
from llada_jax.diffusion import loss as loss_lib
from llada_jax.model import transformer
from llada_jax.training import step
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.attention.reference import visible
from tests import test_block_diffusion, test_train_step

V, MASK, B, T, KEY = 12, 11, 6, 12, (5, 3, 0)
MODEL = dataclasses.replace(test_block_diffusion.MODEL, max_length=T)


@pytest.fixture(scope="module")
def model():
    return transformer.build(MODEL)


@pytest.fixture(scope="module")
def variables(model):
    return jax.jit(model.init)(jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    """Packed rows, some with padding."""
    rng = np.random.default_rng(4)
    segment, position = test_block_diffusion.packing(rng, B, T)
    return {"tokens": rng.integers(0, MASK, (B, T)).astype(np.int32), "segment": segment, "position": position, "maskable": segment > 0,
            "index": np.arange(B, dtype=np.uint32)}


def opened(batch, share, key=KEY, rows=slice(None)):
    return conversion.annealed(step.attention_spec(batch), key, jnp.asarray(batch["index"][rows]), share)


def test_annealed_attention_begins_as_the_autoregressive_one(model, variables, batch):
    """To the bit, against what the autoregressive objective gives its model."""
    given = []
    stub = lambda variables, tokens, positions, slots, spec, *_: (given.append(spec), (tokens, None, None))[1]
    loss_lib.next_token_terms(stub, lambda v, hidden, targets, needed: jnp.zeros(targets.shape), {}, batch["tokens"], batch["maskable"],
                              batch["position"], step.attention_spec(batch))
    logits = jax.jit(lambda v, spec: model.head(v, model.apply(v, batch["tokens"], batch["position"], None, spec)[0]))
    want, first, later, last = (np.asarray(logits(variables, spec)) for spec in (*given, *(opened(batch, jnp.float32(x)) for x in (0, 0.5, 1))))
    assert np.array_equal(first, want) and not np.array_equal(later, want)
    full = np.asarray(logits(variables, step.attention_spec(batch)._replace(block_q=batch["segment"], block_k=batch["segment"])))
    assert np.array_equal(last, full), "and ends as that of masked diffusion"


def test_annealed_attention_opens_the_given_share_of_the_future(batch):
    causal, document = np.tri(T, dtype=bool), np.asarray(visible(step.attention_spec(batch)))
    before = np.zeros_like(document)
    for share in (0.0, 0.3, 0.7, 1.0):
        seen = np.asarray(visible(opened(batch, share)))
        assert not (seen & ~document).any() and (seen & causal)[document & causal].all() and seen[before].all(), "of one draw, more and more"
        before = seen
    assert np.array_equal(seen, document)
    rows = {**batch, "segment": np.ones((400, T), np.int32), "index": np.arange(400, dtype=np.uint32)}
    future = np.asarray(visible(opened(rows, 0.3)))[:, ~causal].mean(0)
    assert abs(future.mean() - 0.3) < 0.01 and np.abs(future - 0.3).max() < 0.1  # each pair, as in DiffuLLaMA
    other = np.asarray(visible(opened(rows, 0.3, (5, 4, 0))))
    assert 0.1 < (other != np.asarray(visible(opened(rows, 0.3))))[:, ~causal].mean() < 0.6  # another draw a step


@pytest.mark.parametrize("p", [0.1, 0.3])
def test_context_weights_by_hand(p):
    rng = np.random.default_rng(7)
    segment, position = test_block_diffusion.packing(rng, 12, T)
    masked = rng.random((12, T)) < 0.5
    block = np.asarray(blocks.ids(jnp.asarray(position), np.repeat([1, 3, 5, T], 3)[:, None], "row"))
    want = np.zeros((12, T))
    for b in range(12):
        for n in range(T):
            for i in range(T):
                known = block[b, i] < block[b, n] or (block[b, i] == block[b, n] and not masked[b, i])
                if i != n and segment[b, i] == segment[b, n] and known:
                    want[b, n] += 0.5 * p * (1 - p) ** (abs(n - i) - 1)
    weights = jax.jit(conversion.context_weights)
    np.testing.assert_allclose(weights(masked, segment, block, p), want, atol=1e-6)
    alone, zero = np.ones((1, T), bool), np.zeros((1, T), np.int32)
    alone[0, 4] = False
    distance = np.abs(np.arange(T) - 4)
    by_distance = np.where(distance > 0, 0.5 * p * (1 - p) ** (distance - 1.0), 0)
    np.testing.assert_allclose(weights(alone, zero, zero, p)[0], by_distance, atol=1e-7)
    wide = np.zeros((1, 400), np.int32)
    assert np.isclose(weights(wide > 0, wide, wide, p)[0, 200], 1, atol=1e-6)


def test_noise_on_the_embeddings_of_masks():
    """At masks alone; of the asked spread; the same in a longer row, in other company and beside a clean half; none at std 0."""
    rng = np.random.default_rng(0)
    D, rows, table = 32, 40, jnp.asarray(rng.normal(0, 0.7, (V, 32)), jnp.float32)
    tokens = np.where(rng.random((rows, T)) < 0.5, MASK, 1).astype(np.int32)
    embed = lambda variables, tokens: jnp.ones((*tokens.shape, D))

    @jax.jit
    def noise(tokens, index, std):
        apply = conversion.with_mask_noise(lambda variables, x, *_: x - 1, embed, table, KEY, index, min(tokens.shape[1], T), MASK, std)
        return apply({}, tokens, None)
    index = np.arange(rows, dtype=np.uint32)
    found = np.asarray(noise(tokens, index, 2.0))
    assert ((found != 0).all(-1) == (tokens == MASK)).all() and ((found != 0).any(-1) == (tokens == MASK)).all()
    rms = float(jnp.sqrt(jnp.mean(jnp.square(table))))
    assert np.isclose(found[tokens == MASK].std(), 2 * rms, rtol=0.03) and abs(found[tokens == MASK].mean()) < 0.05
    assert np.abs(np.corrcoef(found[:, 3], found[:, 4], rowvar=False)[:rows - 8, -8:]).mean() < 0.3
    np.testing.assert_allclose(noise(tokens[7:9], index[7:9], 2.0), found[7:9], atol=1e-6)
    doubled = np.asarray(noise(np.concatenate([tokens, np.ones_like(tokens)], axis=1), index, 2.0))
    np.testing.assert_allclose(doubled[:, :T], found, atol=1e-6)
    assert not doubled[:, T:].any() and not np.asarray(noise(tokens, index, 0.0)).any()


def config_of(**diffusion):
    groups = dict(data=dict(sequence_length=T), train=dict(batch_size=B))
    return test_train_step.config_of(model=dataclasses.asdict(MODEL), diffusion=diffusion, **groups)


def terms_at(model, config, variables, batch, at):
    return step.masked_terms(model, config, MASK, variables, step.corrupted(config, MASK, batch, at), at, clean_half=False)[0]


def test_through_the_training_step(model, variables, batch):
    """Weights and noise of the objective: context times 1/p; noise that is gone after its steps; the mask's row, decayed to zero, gets no exploding
    gradient."""
    plain = config_of()
    eased = config_of(weighting="cart_elbo", cart_p=0.2, mask_noise_std=1.0, mask_noise_steps=4)
    terms = jax.jit(lambda v, at: [terms_at(model, config, v, batch, at) for config in (plain, eased)])
    want, found = terms(variables, jnp.int32(4))
    assert np.array_equal(want.nll_BT, found.nll_BT) and float(found.predicted_BT.sum()) > 5
    masked, zero = np.asarray(want.predicted_BT) > 0, np.zeros((B, T), np.int32)
    context = conversion.context_weights(masked, batch["segment"], zero, 0.2)
    np.testing.assert_allclose(found.weighted_BT, np.asarray(context) * want.weighted_BT, rtol=1e-5)
    changes = []
    for at in (0, 3):
        want, found = terms(variables, jnp.int32(at))
        changes.append(np.abs(want.nll_BT - found.nll_BT)[np.asarray(want.predicted_BT) > 0].mean())
    assert changes[0] > 2 * changes[1] > 0

    def loss(params, at, config):
        return terms_at(model, config, {**variables, "params": params}, batch, at).nll_BT.sum()
    decayed = {**variables["params"], "embedding": variables["params"]["embedding"].at[MASK].set(0.0)}
    both = jax.jit(lambda params: [jax.grad(loss)(params, jnp.int32(0), config)["embedding"][MASK] for config in (plain, eased)])
    without, with_noise = (float(jnp.linalg.norm(g)) for g in both(decayed))
    assert without > 10 * with_noise > 0, (without, with_noise)


def test_shifted_predictions_stay_within_their_document(batch):
    """A packed row costs what its documents cost alone; the first token of each is predicted by its own state, as in Dream's code."""
    shifted, own = (transformer.build(dataclasses.replace(MODEL, shift_predictions=shift)) for shift in (True, False))
    variables = jax.jit(own.init)(jax.random.key(2))
    masked = corrupt.sample_uniforms(KEY, batch["index"], corrupt.POSITION, T) < 0.6
    run = lambda model: jax.jit(lambda v, tokens, masked, position, segment: loss_lib.elbo_terms(
        model.apply, model.cross_entropy, v, tokens, jnp.where(masked, MASK, tokens), masked, jnp.ones(tokens.shape), position,
        AttentionSpec.own(segment=segment, padding=segment == 0), jnp.ones_like)[0].nll_BT)
    cost, packed = run(shifted), np.asarray(batch["segment"])
    masked = np.asarray(masked) & (packed > 0)
    nll = np.asarray(cost(variables, batch["tokens"], masked, batch["position"], packed))
    for document in range(1, packed.max() + 1):
        inside = packed == document
        length = inside.sum(1)
        gather = np.minimum(np.argmax(inside, axis=1)[:, None] + np.arange(T), T - 1)
        alone = np.where(np.arange(T) < length[:, None], 1, 0).astype(np.int32)
        take = lambda x, gather=gather: np.take_along_axis(np.asarray(x), gather, axis=1)
        position = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        separately = np.asarray(cost(variables, take(batch["tokens"]), take(masked) & (alone > 0), position, alone))
        np.testing.assert_allclose(take(nll)[alone > 0], separately[alone > 0], atol=1e-4)
    first = (batch["position"] == 0) & masked
    unshifted = np.asarray(run(own)(variables, batch["tokens"], masked, batch["position"], packed))
    assert first.any() and np.allclose(nll[first], unshifted[first], atol=1e-5) and not np.allclose(nll[masked & ~first], unshifted[masked & ~first])
