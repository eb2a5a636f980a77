"""The decoding loop against recorded decodes, against a plain Python sampler, and against itself in other company."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.sampling import block_decoders, cache, decoders, engine, score, select, trace
from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling.decoder import Moment
from pallas_kernels.attention import AttentionSpec
from tests import plain_sampler, replay, toy_denoiser
from tests.toy_denoiser import EOS, MASK, Toy

GOLDEN = sorted((pathlib.Path(__file__).parent / "data" / "decoding").glob("*.json"))
TOY = Toy(seed=1391, eos_start=12, eos_slope=24)
REQUESTS = [
    [[5, 9, 2, 33], 24],
    [[7], 8, [41, 7], 3, [20, 11, 12], 2],
    [9],
    [[50, 51, 52, 53, 54, 55, 56, 57, 58, 59], 16],
    [5, [13, 14]],
]


def build(requests, decoder, length=0):
    return canvas_lib.build(requests, block_length=decoder.block_length, aligned=decoder.aligned, mask_id=MASK, pad_id=EOS, max_length=64,
                            length=length)


def generate(canvas, decoder, row_B, **options):
    return engine.generate(engine.Denoiser.of(TOY), {}, canvas, decoder, key=jax.random.key(3), row_B=np.asarray(row_B),
                           mask_id=MASK, eos_id=EOS, **options)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_recorded_decodes_are_reproduced_with_the_same_forwards(path):
    case = json.loads(path.read_text())
    got = replay.canvases(case)
    assert replay.problem(case, got) is None
    # none of our forwards is spent on nothing, unless it is to see that nothing is left to edit
    assert len(got) == case["nfe_effective"] or (case["noop_forwards"] and "edit" in str(case["settings"]))


def test_toy_has_the_published_logits():
    tokens = np.full((1, 12), MASK, np.int32)
    tokens[0, :4] = [5, 9, 2, 33]
    logits = np.asarray(toy_denoiser.logits(Toy(seed=7), tokens, np.arange(12)[None], np.ones((1, 12), bool)))
    assert logits.sum(dtype=np.float64) == 569.990234375
    assert logits[0].argmax(-1).tolist() == [41, 9, 2, 33, 26, 41, 53, 29, 57, 19, 59, 27]


@pytest.mark.parametrize("decoder", [
    decoders.LowConfidence(24, 8, 12), decoders.LowConfidence(24, 8, 15, temperature=0.8), decoders.Random(24, 12, 8, temperature=0.8),
    decoders.LowConfidence(24, 8, 12, temperature=0.8, guidance=0.5)], ids=["low_confidence", "temperature", "random", "guidance"])
@pytest.mark.parametrize("stop_at_eos", [False, True])
def test_while_loop_equals_a_plain_python_sampler(decoder, stop_at_eos):
    canvas, rows = build(REQUESTS, decoder), [4, 8, 15, 16, 23]
    tokens_BT, record = generate(canvas, decoder, rows, stop_at_eos=stop_at_eos)
    want_tokens_BT, want_step_BT, want_forwards_B, _ = plain_sampler.decode(
        lambda tokens_BT: toy_denoiser.logits(TOY, tokens_BT, canvas.positions_BT, canvas.valid_BT), canvas, decoder, jax.random.key(3), rows,
        mask_id=MASK, eos_id=EOS, stop_at_eos=stop_at_eos)
    np.testing.assert_array_equal(tokens_BT, want_tokens_BT)
    np.testing.assert_array_equal(record.reveal_step_BT, want_step_BT)
    assert list(record.forwards) == (["full", "guidance"] if decoder.guidance else ["full"])
    for forwards_B in record.forwards.values():
        np.testing.assert_array_equal(forwards_B, want_forwards_B)
    assert int(record.calls["full"]) == max(want_forwards_B)


def test_guidance_moves_what_has_given_text_and_nothing_else():
    plain, none, strong = (decoders.LowConfidence(24, 8, 12, guidance=guidance) for guidance in (0.0, 1e-30, 2.0))
    canvas = build(REQUESTS, plain)
    unguided, vanishing, guided = (generate(canvas, decoder, range(5))[1] for decoder in (plain, none, strong))
    # at a scale so small that guidance + 1 = 1, the doubled program gives un + (cond - un), which the toy's numbers make exact
    for got, want in zip(vanishing[:5], unguided[:5], strict=True):
        np.testing.assert_array_equal(got, want)
    moved_B = (np.asarray(guided.reveal_logprob_BT) != unguided.reveal_logprob_BT).any(-1, where=canvas.writable_BT)
    assert moved_B.tolist() == [any(isinstance(piece, list) for piece in request) for request in REQUESTS]


@pytest.mark.parametrize("decoder", [block_decoders.BlockThreshold(24, 8, threshold=0.8), block_decoders.BlockThreshold(24, 12, 5, threshold=0.6)],
                         ids=["a_token_at_least", "several_at_least"])
@pytest.mark.parametrize("stop_at_eos", [False, True])
def test_block_causal_canvas_equals_a_prefix_that_grows(decoder, stop_at_eos):
    canvas = build(REQUESTS, decoder)
    tokens_BT, record = generate(canvas, decoder, range(5), stop_at_eos=stop_at_eos)
    stopped = 0
    for b, request in enumerate(REQUESTS):
        tokens, step, forwards, _ = plain_sampler.decode_blocks(functools.partial(prefix_logits, TOY, decoder.block_length), request, decoder,
                                                                mask_id=MASK, eos_id=EOS, stop_at_eos=stop_at_eos)
        kept = canvas.seen[b]
        assert kept.sum() == len(tokens)
        np.testing.assert_array_equal(tokens_BT[b][kept], tokens)
        np.testing.assert_array_equal(record.reveal_step_BT[b][kept], step)
        assert record.forwards["full"][b] == forwards
        stopped += np.isnan(record.reveal_score_BT[b][canvas.writable_BT[b]]).any()
    assert stopped == 2 * stop_at_eos  # the rest have no EOS before their last block


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefix_logits(toy, block_length, tokens_T):
    position_BT = jnp.arange(len(tokens_T))[None]
    hidden, _, _ = toy.apply({}, tokens_T[None], position_BT, None, AttentionSpec.own(block=position_BT // block_length), None, None)
    return toy.head({}, hidden)[0]


@pytest.mark.parametrize("step, prob, written", [
    (0, [0.9, 0.7, 0.6, 0.9, 0.8], [0, 1, 1, 1, 1]),  # four open slots exceed 0.5, and forward 0 of 2 asks for three of five
    (0, [0.9, 0.4, 0.6, 0.3, 0.1], [0, 1, 1, 1, 0]),  # one does, for slot 0 is not open: the best three
    (1, [0.9, 0.4, 0.6, 0.8, 0.1], [0, 0, 1, 1, 0]),  # forward 1 asks for two, and two exceed it
    (1, [0.9, 0.2, 0.6, 0.5, 0.5], [0, 0, 1, 1, 0]),  # one does, for 0.5 does not: the best two, the first of equals
])
def test_block_threshold_writes_what_is_sure_and_no_fewer_than_its_schedule(step, prob, written):
    prob_BC = jnp.array([prob], jnp.float32)
    proposal = score.Proposal(None, None, prob_BC, None, None, None)
    decoder = block_decoders.BlockThreshold(16, 5, 2, threshold=0.5)
    moment = Moment(None, jnp.array([step]), None, None, None, None, MASK, EOS)
    write_BC, _ = decoder.select((), proposal, None, jnp.array([[False, True, True, True, True]]), moment)
    assert write_BC.astype(int).tolist() == [written]


@pytest.mark.parametrize("decoder", [decoders.LowConfidence(24, 8, 12), decoders.Random(24, 8, 12, temperature=0.9, guidance=0.5),
                                     block_decoders.BlockThreshold(24, 8, 6, 0.8, temperature=0.9)],
                         ids=["low_confidence", "random_guided", "llada2"])
def test_a_row_is_the_same_whatever_its_neighbours_slot_and_padding(decoder):
    names = np.arange(len(REQUESTS)) + 100
    whole_BT, whole = generate(build(REQUESTS, decoder, 40), decoder, names)
    for order, length in ([3, 1, 4, 0, 2], 40), ([2, 2, 2, 1, 0], 40), ([0], 47):
        tokens_BT, record = generate(build([REQUESTS[i] for i in order], decoder, length), decoder, names[order])
        for b, i in enumerate(order):
            for got, want in zip([tokens_BT, *record[2:5], record.forwards["full"]], [whole_BT, *whole[2:5], whole.forwards["full"]], strict=True):
                got, want = np.asarray(got)[b], np.asarray(want)[i]
                if got.ndim:
                    keep = len(REQUESTS[i]) and int(build([REQUESTS[i]], decoder).tokens_BT.shape[1])
                    got, want = got[-keep:], want[-keep:]
                np.testing.assert_array_equal(got, want)


def test_temperature_draws_differ_between_rows_steps_and_seeds_and_follow_the_softmax():
    noise = score.counter_noise(jax.random.key(0))
    B, C, V = 64, 64, 4
    logits_V = np.array([1.0, 0.0, 2.0, 9.0], np.float32)  # the last is the mask token
    draw = jax.jit(lambda step_B: score.propose(
        np.broadcast_to(logits_V, (B, C, V)), suppressed=[3], sampling=score.Sampling(1.0), noise=noise, row_B=np.arange(B), step_B=step_B,
        position_BC=np.broadcast_to(np.arange(C), (B, C))))
    first, second = draw(np.zeros(B, np.int32)), draw(np.ones(B, np.int32))
    share_V = np.bincount(np.asarray(first.token_BC).ravel(), minlength=V) / (B * C)
    probs_V = np.exp(logits_V[:3]) / np.exp(logits_V[:3]).sum()
    np.testing.assert_allclose(share_V, [*probs_V, 0], atol=4 * 0.5 / np.sqrt(B * C))
    assert (first.token_BC != second.token_BC).any() and (first.token_BC[0] != first.token_BC[1]).any()
    np.testing.assert_allclose(first.prob_BC, probs_V[np.asarray(first.token_BC)], rtol=1e-5)
    others = np.where(np.asarray(first.token_BC) == 2, probs_V[0], probs_V[2])
    np.testing.assert_allclose(first.runner_up_BC, others, rtol=1e-5)
    np.testing.assert_allclose(first.entropy_BC, -(probs_V * np.log(probs_V)).sum(), rtol=1e-5)


@pytest.mark.parametrize("V", [8, 1000])
def test_a_logit_that_is_not_a_number_is_proposed_and_shows(V):
    """Also where maxima are vectorised, which may drop NaN; one such logit is enough."""
    draw = jax.jit(lambda logits_BCV: score.propose(
        logits_BCV, suppressed=[V - 1], sampling=score.Sampling(), noise=score.counter_noise(jax.random.key(0)), row_B=np.arange(4),
        step_B=np.zeros(4, np.int32), position_BC=np.zeros((4, 16), np.int32)))
    for logits_V in (np.full(V, np.nan, np.float32), np.where(np.arange(V) == 3, np.nan, 0).astype(np.float32)):
        proposal = draw(np.broadcast_to(logits_V, (4, 16, V)))
        assert np.isnan(proposal.prob_BC).all() and np.isnan(proposal.logprob_BC).all()



def test_gumbel_keeps_both_tails():
    bits = np.array([0, 1, 1 << 31, 2**32 - 2, 2**32 - 1], np.uint32)
    u = (bits.astype(np.float64) + 0.5) / 2**32
    np.testing.assert_allclose(score.gumbel(bits), -np.log(-np.log(u)), rtol=2e-6, atol=2e-6)


def test_the_first_of_the_largest_is_argmax():
    rows = np.array([[1, 3, 3, 2], [-np.inf] * 4, [0, np.inf, np.nan, np.inf], [1, np.nan, 5, np.nan], [-1, -2, -1, -3]], np.float32)
    want = np.argmax(np.where(np.isnan(rows), np.inf, rows), -1)
    assert score.first_largest(jnp.asarray(rows[None])).tolist() == [want.tolist()] == [[1, 0, 1, 1, 0]]


def test_ties_go_to_the_first_slot_and_broken_scores_still_fill():
    score_BC = np.array([[0.5, 0.5, 0.9, 0.5], [np.nan, np.nan, np.nan, 0.1]], np.float32)
    open_BC = np.array([[True, True, False, True], [True, False, True, True]])
    assert select.top(score_BC, open_BC, np.array([2, 2])).tolist() == [[True, True, False, False], [True, False, False, True]]


@pytest.mark.parametrize("decoder", [decoders.LowConfidence(24, 8, 12), block_decoders.BlockThreshold(24, 8, threshold=0.8)],
                         ids=["low_confidence", "llada2"])
def test_trace_rebuilds_every_canvas(decoder):
    canvas = build(REQUESTS, decoder)
    rules = engine.Rules(engine.Denoiser.of(TOY), decoder, cache.NoCache(), MASK, EOS, stop_at_eos=True, suppressed=(MASK,))
    key, names = jax.random.key(3), np.arange(len(REQUESTS))
    step = jax.jit(lambda carry: engine.step(rules, {}, canvas, key, names, jnp.zeros_like(names), carry))
    carry, seen = engine.start(rules, {}, canvas), []
    while engine.running(carry):
        carry = step(carry)
        seen.append(np.asarray(carry.tokens_BT))
    tokens_BT, record = generate(canvas, decoder, names, stop_at_eos=True)
    np.testing.assert_array_equal(trace.canvases(record), seen)
    np.testing.assert_array_equal(tokens_BT, seen[-1])
    written = np.asarray(record.reveal_step_BT) >= 0
    np.testing.assert_array_equal(written, canvas.block_BT >= 0)
    assert np.isfinite(np.asarray(record.reveal_logprob_BT)[written]).mean() > 0.5
    assert np.isnan(np.asarray(record.reveal_score_BT)[~written]).all()
