"""Likelihoods of answers after prompts: against every mask written out, and against themselves in other company."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.config import ConfigError
from llada_jax.diffusion import corrupt, likelihood
from llada_jax.diffusion.likelihood import Denoiser, Estimator
from llada_jax.model import transformer
from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling import decoders
from pallas_kernels.attention import AttentionSpec
from tests import plain_sampler, toy_denoiser
from tests.test_diffusion_loss import MODEL, all_masks

TOY = toy_denoiser.Toy(seed=1391, eos_start=12, eos_slope=24)
MASK, PAD = toy_denoiser.MASK, toy_denoiser.EOS
PROMPT, ANSWER = [5, 9, 2], [33, 4, 5]
STRATIFIED, ALONE = Estimator(draws=16), Estimator(draws=16, group=1)


def _cross_entropy(variables, hidden_BTD, targets_BT, needed_BT):
    logprobs_BTV = jax.nn.log_softmax(TOY.head(variables, hidden_BTD))
    return jnp.where(needed_BT, -jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)[..., 0], 0.0)


DENOISER = Denoiser(TOY.apply, _cross_entropy, TOY.head)
_conditional = jax.jit(likelihood.conditional, static_argnums=(0, 3, 5))
_is_greedy = jax.jit(likelihood.is_greedy, static_argnums=(0, 3, 4))


def estimate(batch, estimator, seed=0, denoiser=DENOISER):
    return _conditional(denoiser, {}, batch, MASK, seed, estimator)


def pack(requests, names, rows=None, length=8):
    return likelihood.pack(requests, names, rows or len(requests), length, MASK, PAD)


def same(rows=512):
    """One request under `rows` names."""
    return pack([(PROMPT, ANSWER)] * rows, range(rows))


@pytest.fixture(scope="module")
def logits():
    """(masks of the answer, logits (masks, answer, V) after the prompt, and after a prompt of masks)."""
    masks, n = all_masks(len(ANSWER)), len(PROMPT)
    tokens = np.concatenate([np.broadcast_to(PROMPT, (len(masks), n)), np.where(masks, MASK, ANSWER)], axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    run = lambda tokens: np.asarray(toy_denoiser.logits(TOY, tokens, positions, positions >= 0), np.float64)[:, n:]
    return masks, run(tokens), run(np.where(positions < n, MASK, tokens))


def expected(masks, logits):
    """Σ over masks of Σ -log p at masked tokens / (k C(n, k)): the mean of (n / k) Σ over k uniform in 1..n and sets of that size."""
    n = masks.shape[1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = np.where(masks, -logprobs[:, np.arange(n), ANSWER], 0)
    return sum(row.sum() / (k * math.comb(n, k)) for row, k in zip(nll, masks.sum(1), strict=True) if k)


@pytest.mark.parametrize("estimator", [STRATIFIED, ALONE, Estimator(draws=64, group=8, guidance=1.5), Estimator("time", 64)],
                         ids=["exact_count", "unstratified", "guidance", "time"])
def test_estimates_agree_with_enumeration(logits, estimator):
    masks, with_prompt, without = logits
    want = expected(masks, without + (estimator.guidance + 1) * (with_prompt - without))
    found = estimate(same(), estimator)
    nats = np.asarray(found.nats_B, np.float64)
    error = nats.std(ddof=1) / math.sqrt(len(nats))
    assert 0 < error < 0.02 * want and abs(nats.mean() - want) < 3.5 * error
    assert found.forwards == estimator.draws
    if estimator.group < estimator.draws and estimator.noise == "exact_count":  # the error that a row gives of itself is the spread of rows
        assert 0.8 < math.sqrt(np.square(np.asarray(found.error_B, np.float64)).mean()) / nats.std(ddof=1) < 1.25
    elif estimator.group == estimator.draws:
        assert np.isnan(found.error_B).all()  # one group says nothing about it


def test_guidance_matters_and_0_is_off(logits):
    masks, with_prompt, without = logits
    assert abs(expected(masks, 2.5 * with_prompt - 1.5 * without) - expected(masks, with_prompt)) > 1  # a fault would show above
    headless = DENOISER._replace(head=None)  # without guidance nothing asks for logits
    weak = Estimator(draws=16, guidance=1e-30)
    np.testing.assert_allclose(estimate(same(), STRATIFIED, denoiser=headless).nats_B, estimate(same(), weak).nats_B, rtol=1e-5)


def _share_masked(variables, hidden_BT, targets_BT, needed_BT):
    return needed_BT * (needed_BT.sum(-1, keepdims=True) / 7)


def test_stratification_lowers_the_variance():
    """Where tokens cost more the more are masked; the stand-in charges the share that is masked, so the estimate is the mean of k = 1..7."""
    stand_in = Denoiser(lambda variables, tokens_BT, *_: (tokens_BT, None, None), _share_masked, None)
    found = [np.asarray(estimate(pack([(PROMPT, [1] * 7)] * 256, range(256), length=10), Estimator(draws=16, group=R), denoiser=stand_in).nats_B)
             for R in (16, 4, 1)]
    variance = [nats_B.var() for nats_B in found]
    assert variance[0] < 0.6 * variance[1] < 0.36 * variance[2], variance
    np.testing.assert_allclose([nats_B.mean() for nats_B in found], 4.0, atol=4 * math.sqrt(variance[2] / 256))


def test_times_of_a_group_stand_evenly():
    index_B, length_B = jnp.arange(64), jnp.full(64, 9)
    t_RB = np.stack([likelihood.levels(Estimator("time", 32), 5, jnp.int32(r), index_B, length_B) for r in range(32)])
    for group_RB in (t_RB[:16], t_RB[16:]):
        ordered = np.sort(group_RB, axis=0)
        np.testing.assert_allclose(np.diff(ordered, axis=0), 1 / 16, atol=1e-6)
        assert ordered.min() >= 0 and ordered.max() < 1
    assert len(np.unique(np.round(t_RB[[0, 16]].ravel(), 6))) > 120  # rows and groups begin anywhere


@pytest.mark.parametrize("length", [1, 2, 5, 8, 16, 24, 100])
def test_counts_run_round_robin_from_a_random_start(monkeypatch, length):
    """As torch.linspace(k, k + (b - 1) n / b, b) rounded, modulo n, in LLaDA's code; halves go up, so that each count is equally likely."""
    R, starts = 16, np.arange(length)
    monkeypatch.setattr(corrupt, "sample_uniforms", lambda key, index_B, stream, n: jnp.asarray((index_B + 0.5) / length)[:, None])
    t_RB = np.stack([likelihood.levels(Estimator(draws=R), 0, jnp.int32(r), starts, jnp.full(length, length)) for r in range(R)])
    count_RB = np.floor(t_RB * length).astype(int) + 1  # as `corrupt` counts
    assert (np.sort(count_RB, axis=1) == starts + 1).all()  # over starts, each draw masks every number once
    points = starts + 1 + np.arange(R)[:, None] * length / R
    np.testing.assert_array_equal(count_RB, (np.floor(points + 0.5).astype(int) - 1) % length + 1)
    halves = points % 1 == 0.5
    np.testing.assert_array_equal(count_RB[~halves], ((np.round(points).astype(int) - 1) % length + 1)[~halves])
    assert np.ptp([np.bincount(count_RB[:, b], minlength=length + 1)[1:] for b in range(length)]) <= 1  # and a row's draws cover all evenly


def test_an_answer_of_one_token_is_exact_and_costs_one_forward():
    """With the model itself: -log p of the token at the one mask; and the fused cross-entropy stands where the logits do."""
    model = transformer.build(dataclasses.replace(MODEL, max_length=16))
    variables = jax.jit(model.init)(jax.random.key(3))
    requests = [([2, 0], [1]), ([1], [3]), ([], [0]), ([3, 1, 0, 2], [2])]
    tokens_BT, n = np.full((4, 8), 3), [2, 1, 0, 4]
    for b, (prompt, _) in enumerate(requests):
        tokens_BT[b, : n[b] + 1] = [*prompt, 4]
    position_BT = np.broadcast_to(np.arange(8), (4, 8))
    hidden_BTD, _, _ = model.apply(variables, tokens_BT, position_BT, None, AttentionSpec(padding_k=position_BT > np.array(n)[:, None]), None, None)
    want = -np.asarray(jax.nn.log_softmax(model.head(variables, hidden_BTD)))[range(4), n, [1, 3, 0, 2]]
    denoiser = Denoiser(model.apply, model.cross_entropy, model.head)
    for estimator in (Estimator(draws=16), Estimator("time", 16)):
        alone, mixed = (_conditional(denoiser, variables, likelihood.pack(more, range(5), 5, 8, 4, 3), 4, 0, estimator)
                        for more in (requests, [*requests, ([2], [0, 1, 1])]))
        assert alone.forwards == 1 and mixed.forwards == 16
        for found in (alone, mixed):
            np.testing.assert_allclose(found.nats_B[:4], want, rtol=1e-5)
            assert (np.asarray(found.error_B[:4]) == 0).all()


REQUESTS = [([5, 9, 2, 33], [7, 8, 9, 10, 11]), ([7], [41, 7, 3]), ([], [20, 11]), ([50, 51, 52], [53]), ([1, 2], [3, 4, 5, 6])]
NAMES = [4, 8, 15, 16, 23]


@pytest.mark.parametrize("estimator", [STRATIFIED, Estimator("time", 16, 8), Estimator(draws=16, group=4, guidance=0.5)],
                         ids=["exact_count", "time", "guidance"])
def test_neighbours_places_and_padding_change_nothing(estimator):
    def run(chosen, rows, length, seed=0):
        return np.asarray(estimate(pack([REQUESTS[i] for i in chosen], [NAMES[i] for i in chosen], rows, length), estimator, seed).nats_B)
    first = run(range(5), 5, 9)
    long = 300 if estimator.guidance else 16  # more positions than one piece of logits holds
    np.testing.assert_allclose(run([4, 2, 0, 1, 3], 8, long)[:5], first[[4, 2, 0, 1, 3]], rtol=1e-6)
    assert (np.abs(run(range(5), 5, 9, seed=1) - first)[[0, 1, 4]] > 1e-3).all()  # another seed is another estimate


def test_one_compile_a_shape():
    """Whatever stands in a batch: answers of one token alone, others, fewer requests."""
    traced = []

    def apply(variables, tokens_BT, *_):
        traced.append(tokens_BT.shape)
        return tokens_BT, None, None

    stand_in = Denoiser(apply, _one_nat, None)
    for chosen in ([3], range(5), [0, 4]):
        estimate(pack([REQUESTS[i] for i in chosen], [NAMES[i] for i in chosen], 5, 10), STRATIFIED, seed=len(chosen), denoiser=stand_in)
    assert len(traced) == 1


def _one_nat(variables, hidden_BT, targets_BT, needed_BT):
    wrong_B = ((hidden_BT != targets_BT) & ~needed_BT).any(-1) | ((hidden_BT != MASK) & needed_BT).any(-1)
    return jnp.where(needed_BT, 1.0, 0.0) + 1000.0 * wrong_B[:, None]


def test_the_answer_alone_is_masked_and_counted():
    """A stand-in costs 1 nat a masked token, and a thousand where anything else was touched: the estimate is the answer's length."""
    stand_in = Denoiser(lambda variables, tokens_BT, *_: (tokens_BT, None, None), _one_nat, None)
    found = estimate(pack(REQUESTS, NAMES, 7, 12), STRATIFIED, denoiser=stand_in)
    np.testing.assert_allclose(found.nats_B, [5, 3, 2, 1, 4, 4, 4], rtol=1e-6)


@pytest.mark.parametrize("guidance", [0.0, 0.8])
def test_greedy_answers_are_those_of_the_plain_sampler(guidance):
    """Decoded a token a forward, most confident first; another token anywhere is not greedy."""
    n, prompts = 6, [[5, 9, 2, 33], [7], [20, 11, 12], []]
    decoder = decoders.LowConfidence(n, n, guidance=guidance)
    canvas = canvas_lib.build([[*([prompt] if prompt else []), n] for prompt in prompts], block_length=n, mask_id=MASK,
                              pad_id=PAD, max_length=64)
    tokens_BT, _, forwards_B, _ = plain_sampler.decode(
        lambda tokens_BT: toy_denoiser.logits(TOY, tokens_BT, canvas.positions_BT, canvas.valid_BT), canvas, decoder, jax.random.key(0), range(4),
        mask_id=MASK, eos_id=PAD)
    assert (np.asarray(forwards_B) == n).all()
    written = [(prompt, row[-n:].tolist()) for prompt, row in zip(prompts, tokens_BT, strict=True)]
    other = [(prompt, [*answer[:i], (answer[i] + 1) % 60, *answer[i + 1 :]]) for prompt, answer in written for i in range(n)]
    moved = [(written[1][0], written[0][1]), (written[0][0], written[1][1])]  # another prompt's answer
    requests = [*written, *other, *moved]
    found = _is_greedy(DENOISER, {}, pack(requests, range(len(requests)), len(requests) + 1, 12), MASK, guidance)
    assert found.tolist() == [True] * 4 + [False] * (len(other) + 3)


@pytest.mark.parametrize("request_, words", [
    (([1, 2], []), ["request 0", "empty answer", "2 prompt tokens"]),
    (([1, 2, 0, 1], [1, 2, 3, 0, 1]), ["4 prompt and 5 answer tokens are 9, longer than 8", "shorten the prompt"]),
    (([], [1] * 9), ["longer than 8", "shorten the answer"]),
    (([MASK], [1]), ["mask token (id 63)"]),
    (([1], [1, MASK]), ["mask token (id 63)"]),
])  # fmt: skip
def test_what_has_no_likelihood_is_refused(request_, words):
    with pytest.raises(ConfigError) as error:
        pack([request_], [0])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("settings, words", [
    ({"noise": "count"}, ["likelihood.noise='count'", "exact_count or time"]),
    ({"draws": 20}, ["likelihood.draws=20", "likelihood.group=16", "draws=32", "group=20"]),
    ({"draws": 0}, ["likelihood.draws=0", "draws=16"]),
    ({"group": 0}, ["likelihood.group=0", "group=128"]),
    ({"guidance": -1.0}, ["likelihood.guidance=-1.0"]),
    ({"guidance": math.nan}, ["likelihood.guidance=nan"]),
])  # fmt: skip
def test_estimators_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        Estimator(**settings)
    assert all(word in str(error.value) for word in words), error.value
