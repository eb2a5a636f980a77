"""Likelihoods of models of block diffusion, against every mask written out."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.diffusion import blocks, likelihood
from llada_jax.diffusion import loss as loss_lib
from llada_jax.evaluation import heldout
from llada_jax.model import transformer
from pallas_kernels.attention import AttentionSpec
from tests.test_block_diffusion import MASK, MODEL, B, T, packing

ROW = np.array([3, 0, 7, 2, 2, 9], np.int32)


@pytest.fixture(scope="module")
def enumerated():
    """(model, variables, function): all masks of the targets of one row of six tokens (M, 6), and -log p of its masked tokens in blocks of
    `size` (M, 6), 0 for no blocks."""
    own = transformer.build(MODEL)
    variables, n = jax.jit(own.init)(jax.random.key(3)), len(ROW)

    @jax.jit
    def nll(v, masked, size):
        clean, position = (jnp.broadcast_to(jnp.asarray(x), masked.shape) for x in (ROW, np.arange(n)))
        noisy = jnp.where(masked, MASK, clean)
        return loss_lib.elbo_terms(own.apply, own.cross_entropy, v, clean, noisy, masked, jnp.ones(clean.shape), position, AttentionSpec(),
                                   jnp.ones_like, block_BT=blocks.ids(position, size, "row"))[0].nll_BT

    def every(targets, size):
        masks = np.array(list(itertools.product([False, True], repeat=n)))
        masks = masks[~masks[:, ~np.asarray(targets)].any(1)]
        padded = np.concatenate([masks, np.zeros((2**n - len(masks), n), bool)])  # one shape
        return masks, np.asarray(nll(variables, padded, size or n), np.float64)[:len(masks)]
    return own, variables, every


def bound_of(masks, nll, units):
    """Σ over units and their masks of Σ -log p / (k C(L, k)), k of the unit's L targets masked; the others' masks do not matter."""
    total = 0.0
    for unit in set(units[masks.any(0)]):
        inside = (units == unit) & masks.any(0)
        only = masks[:, inside].any(1) & ~masks[:, ~inside].any(1)
        k, L = masks[only].sum(1), int(inside.sum())
        total += sum(row.sum() / (n * math.comb(L, n)) for row, n in zip(nll[only], k, strict=True))
    return total


def test_the_held_out_bound_is_that_of_its_blocks(enumerated):
    """Against every mask of every block; exact with blocks of one token; the whole row as one block is the plain bound; one program."""
    model, variables, every = enumerated
    n, rows = len(ROW), 256
    batch = {"tokens": jnp.broadcast_to(jnp.asarray(ROW), (rows, n)), "maskable": jnp.ones((rows, n), bool), "index": jnp.arange(rows),
             "position": jnp.broadcast_to(jnp.arange(n), (rows, n)), "segment": jnp.ones((rows, n), jnp.int32)}
    run = jax.jit(lambda v, size, draw, draws: likelihood.bound(model.apply, model.cross_entropy, v, batch, AttentionSpec(), MASK, 0, draw, draws, (
        blocks.ids(batch["position"], size, "row") if size is not None else None)))
    for size in (4, 2):
        masks, nll = every(np.ones(n, bool), size)
        want = bound_of(masks, nll, np.arange(n) // size)
        found = [run(variables, jnp.int32(size), jnp.int32(draw), jnp.int32(2)) for draw in range(2)]
        nats = np.mean([np.asarray(f.nats_B, np.float64) for f in found], axis=0)
        error = nats.std(ddof=1) / math.sqrt(rows)
        assert 0 < error < 0.05 * want and abs(nats.mean() - want) < 4 * error, (size, nats.mean(), want, error)
        k = np.concatenate([np.asarray(f.p_BU)[:, :-(-n // size)] for f in found]) * np.minimum(size, n - np.arange(0, n, size))
        assert all(np.ptp(np.bincount(np.round(column).astype(int))[1:]) <= 0.1 * rows for column in k.T), "each number of masks as often"
        assert not np.asarray(found[0].p_BU)[:, -(-n // size):].any()
    alone = run(variables, jnp.int32(1), jnp.int32(0), jnp.int32(1))
    masks, nll = every(np.ones(n, bool), 1)
    np.testing.assert_allclose(alone.nats_B, nll[masks.all(1)].sum(), rtol=1e-5)
    whole = run(variables, jnp.int32(n), jnp.int32(0), jnp.int32(1))
    assert run._cache_size() == 1
    plain = run(variables, None, jnp.int32(0), jnp.int32(1))
    np.testing.assert_allclose(whole.nats_B, plain.nats_B, rtol=1e-4)
    np.testing.assert_allclose(whole.nll_BU[:, :1], plain.nll_BU, rtol=1e-4)


def test_held_out_figures_by_size_of_block(enumerated):
    """The run's own size unless told otherwise; rows longer than a block, and documents, cut the units that levels are counted in."""
    model, variables, _ = enumerated
    rng = np.random.default_rng(0)
    segment, position = packing(rng, 3, T, padded=False)
    rows = {"tokens": rng.integers(0, MASK, (3, T)).astype(np.int32), "segment": segment, "position": position,
            "maskable": np.ones((3, T), bool), "bytes": np.full((3, T), 2, np.int32)}
    config = config_lib.Config(model=MODEL, diffusion=config_lib.Diffusion(block_schedule="0:3,4:5,1"), data=config_lib.Data(sequence_length=T),
                               train=config_lib.Train(batch_size=2, steps=6))
    evaluate = heldout.make(model, config, partitioning.make_mesh(devices=jax.devices()[:1]), MASK)
    own, four, one, none = (evaluate(variables, rows, 2, size) for size in (None, 4, 1, 0))
    assert own == four and [f["block_size"] for f in (own, one, none)] == [4, 1, 0]
    assert one["loss_by_level"][:-1] == [None] * 7, "of one token all are masked"
    assert np.isclose(one["loss_by_level"][-1], one["nats_per_token"], rtol=1e-5)
    assert "in blocks of 4" in heldout.describe(four) and "blocks" not in heldout.describe(none)
    assert len({f["bits_per_byte"] for f in (four, one, none)}) == 3


def test_likelihood_of_an_answer_in_blocks(enumerated):
    """Against every mask of an answer that begins within a block, and what greedy decoding writes block by block."""
    model, variables, every = enumerated
    denoiser, size, prompt = likelihood.Denoiser(model.apply, model.cross_entropy, model.head), 4, 2
    masks, nll = every(np.arange(len(ROW)) >= prompt, size)
    want = bound_of(masks, nll, np.arange(len(ROW)) // size)
    batch = likelihood.pack([(ROW[:prompt].tolist(), ROW[prompt:].tolist())] * B, range(B), B, T, MASK, 0)
    estimator = likelihood.Estimator(draws=64)
    estimate = jax.jit(lambda v, index: likelihood.conditional(denoiser, v, {**batch, "index": index}, MASK, 0, estimator, size).nats_B)
    nats = np.concatenate([np.asarray(estimate(variables, B * i + np.arange(B, dtype=np.int32)), np.float64) for i in range(4)])
    error = nats.std(ddof=1) / math.sqrt(len(nats))
    assert 0 < error < 0.05 * want and abs(nats.mean() - want) < 4 * error, (nats.mean(), want, error)

    tokens, position = np.array(batch["tokens"]), batch["position"]
    write = jax.jit(lambda v, tokens: jax.nn.log_softmax(model.head(v, model.apply(v, tokens, position, None, AttentionSpec.own(
        block=position // size, padding=~batch["valid"]))[0])))
    written = np.where(batch["answer"], MASK, tokens)
    for start, stop in ((2, 4), (4, 6)):
        for _ in range(start, stop):
            logprobs = np.array(write(variables, written))[0]
            logprobs[[i for i in range(T) if not (start <= i < stop and written[0, i] == MASK)]] = -np.inf
            i = logprobs.max(-1).argmax()
            written[:, i] = logprobs[i].argmax()
    candidates = np.array(written)
    candidates[1:5, 2:6][np.eye(4, dtype=bool)] = (candidates[1:5, 2:6][np.eye(4, dtype=bool)] + 1) % MASK
    greedy = jax.jit(lambda v, tokens: likelihood.is_greedy(denoiser, v, {**batch, "tokens": tokens}, MASK, 0.0, size))
    assert np.asarray(greedy(variables, candidates)).tolist() == [True, *[False] * 4, *[True] * (B - 5)]
