"""The decoding loop against recorded decodes, against a plain Python sampler, and against itself in other company."""

import json
import pathlib

import jax
import numpy as np
import pytest

from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling import engine, score, select, trace
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
    return canvas_lib.build(requests, block_length=decoder.block_length, mask_id=MASK, pad_id=EOS, max_length=64, length=length)


def generate(canvas, decoder, row_B, **options):
    return engine.generate(TOY.apply, TOY.head, {}, canvas, decoder, key=jax.random.key(3), row_B=np.asarray(row_B),
                           mask_id=MASK, eos_id=EOS, **options)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_recorded_decodes_are_reproduced_with_the_same_forwards(path):
    case = json.loads(path.read_text())
    got = replay.canvases(case)
    assert replay.problem(case, got) is None
    assert len(got) == case["nfe_effective"]  # none of our forwards is spent on nothing


def test_toy_has_the_published_logits():
    tokens = np.full((1, 12), MASK, np.int32)
    tokens[0, :4] = [5, 9, 2, 33]
    logits = np.asarray(toy_denoiser.logits(Toy(seed=7), tokens, np.arange(12)[None], np.ones((1, 12), bool)))
    assert logits.sum(dtype=np.float64) == 569.990234375
    assert logits[0].argmax(-1).tolist() == [41, 9, 2, 33, 26, 41, 53, 29, 57, 19, 59, 27]


@pytest.mark.parametrize("decoder", [select.LowConfidence(24, 8, 12), select.LowConfidence(24, 8, 15, 0.8), select.Random(24, 12, 8, 0.8)],
                         ids=["low_confidence", "temperature", "random"])
@pytest.mark.parametrize("stop_at_eos", [False, True])
def test_while_loop_equals_a_plain_python_sampler(decoder, stop_at_eos):
    canvas, rows = build(REQUESTS, decoder), [4, 8, 15, 16, 23]
    tokens_BT, record = generate(canvas, decoder, rows, stop_at_eos=stop_at_eos)
    want_tokens_BT, want_step_BT, want_forwards_B, _ = plain_sampler.decode(
        lambda tokens_BT: toy_denoiser.logits(TOY, tokens_BT, canvas.positions_BT, canvas.valid_BT), canvas, decoder, jax.random.key(3), rows,
        mask_id=MASK, eos_id=EOS, stop_at_eos=stop_at_eos)
    np.testing.assert_array_equal(tokens_BT, want_tokens_BT)
    np.testing.assert_array_equal(record.reveal_step_BT, want_step_BT)
    np.testing.assert_array_equal(record.forwards["full"], want_forwards_B)
    assert int(record.calls["full"]) == max(want_forwards_B)


def test_early_stop_saves_forwards_and_changes_nothing_before_the_end():
    decoder = select.LowConfidence(24, 8, 24)
    canvas = build(REQUESTS, decoder)
    (whole_BT, whole), (stopped_BT, stopped) = (generate(canvas, decoder, range(5), stop_at_eos=stop) for stop in (False, True))
    saved = np.asarray(whole.forwards["full"]) - np.asarray(stopped.forwards["full"])
    assert saved.min() >= 0 and saved.max() > 4
    for b in range(5):
        row, until = np.asarray(stopped_BT[b]), np.asarray(whole_BT[b])
        end = np.flatnonzero((row == EOS) & canvas.writable_BT[b])
        cut = end[0] if len(end) and saved[b] else len(row)
        assert (row[:cut] == until[:cut]).all()


@pytest.mark.parametrize("decoder", [select.LowConfidence(24, 8, 12), select.Random(24, 8, 12, 0.9)], ids=["low_confidence", "random"])
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
    draw = jax.jit(lambda step_B: score.propose(np.broadcast_to(logits_V, (B, C, V)), mask_id=3, temperature=1.0, noise=noise, row_B=np.arange(B),
                                                step_B=step_B, position_BC=np.broadcast_to(np.arange(C), (B, C))))
    first, second = draw(np.zeros(B, np.int32)), draw(np.ones(B, np.int32))
    share_V = np.bincount(np.asarray(first.token_BC).ravel(), minlength=V) / (B * C)
    probs_V = np.exp(logits_V[:3]) / np.exp(logits_V[:3]).sum()
    np.testing.assert_allclose(share_V, [*probs_V, 0], atol=4 * 0.5 / np.sqrt(B * C))
    assert (first.token_BC != second.token_BC).any() and (first.token_BC[0] != first.token_BC[1]).any()
    np.testing.assert_allclose(first.prob_BC, probs_V[np.asarray(first.token_BC)], rtol=1e-5)
    others = np.where(np.asarray(first.token_BC) == 2, probs_V[0], probs_V[2])
    np.testing.assert_allclose(first.runner_up_BC, others, rtol=1e-5)
    np.testing.assert_allclose(first.entropy_BC, -(probs_V * np.log(probs_V)).sum(), rtol=1e-5)


def test_gumbel_keeps_both_tails():
    bits = np.array([0, 1, 1 << 31, 2**32 - 2, 2**32 - 1], np.uint32)
    u = (bits.astype(np.float64) + 0.5) / 2**32
    np.testing.assert_allclose(score.gumbel(bits), -np.log(-np.log(u)), rtol=2e-6, atol=2e-6)


def test_ties_go_to_the_first_slot_and_broken_scores_still_fill():
    score_BC = np.array([[0.5, 0.5, 0.9, 0.5], [np.nan, np.nan, np.nan, 0.1]], np.float32)
    open_BC = np.array([[True, True, False, True], [True, False, True, True]])
    assert select.top(score_BC, open_BC, np.array([2, 2])).tolist() == [[True, True, False, False], [True, False, False, True]]


def test_trace_rebuilds_every_canvas():
    decoder = select.LowConfidence(24, 8, 12)
    canvas = build(REQUESTS, decoder)
    rules = engine.Rules(TOY.apply, TOY.head, decoder, MASK, EOS, stop_at_eos=True)
    key, names = jax.random.key(3), np.arange(len(REQUESTS))
    step = jax.jit(lambda carry: engine.step(rules, {}, canvas, key, names, carry))
    carry, seen = engine.start(rules, canvas), []
    while engine.running(carry):
        carry = step(carry)
        seen.append(np.asarray(carry.tokens_BT))
    tokens_BT, record = generate(canvas, decoder, names, stop_at_eos=True)
    np.testing.assert_array_equal(trace.canvases(record), seen)
    np.testing.assert_array_equal(tokens_BT, seen[-1])
    written = np.asarray(record.reveal_step_BT) >= 0
    np.testing.assert_array_equal(written, canvas.writable_BT)
    assert np.isfinite(np.asarray(record.reveal_logprob_BT)[written]).mean() > 0.5
    assert np.isnan(np.asarray(record.reveal_score_BT)[~written]).all()
