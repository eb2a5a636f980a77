"""The decoding loop around the real model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax.model import transformer
from llada_jax.sampling import block_decoders, decoders, engine
from llada_jax.sampling import canvas as canvas_lib
from pallas_kernels.attention import AttentionSpec
from tests import plain_sampler

VOCAB, MASK, EOS = 50, 49, 48
# no row of masks alone: without context all its slots are exactly alike, and rounding would break the ties
REQUESTS = [[[5, 9, 2, 33], 16], [[7], 8, [41, 7], 3, [20, 11, 12], 2], [9, [13]], [[1, 2, 3, 4, 5, 6, 7, 8], 12]]
NAMES = np.array([3, 5, 7, 11], np.int32)


@pytest.fixture(scope="module")
def model():
    settings = config_lib.Model(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=2, num_experts=4, experts_per_token=2, expert_size=16,
                                max_length=64, init_std=0.2)
    built = transformer.build(settings)
    return built, built.init(jax.random.key(1))


def generate(model, requests, decoder, names, length=24):
    built, variables = model
    canvas = canvas_lib.build(requests, block_length=decoder.block_length, aligned=decoder.aligned, mask_id=MASK, pad_id=EOS, max_length=64,
                               length=length)
    _, trace = engine.generate(engine.Denoiser.of(built), variables, canvas, decoder, key=jax.random.key(0), row_B=names, mask_id=MASK, eos_id=EOS)
    return canvas, jax.device_get(trace)


def plain(model, canvas, decoder):
    built, variables = model
    spec = AttentionSpec(padding_k=~canvas.valid_BT)
    logits_of = jax.jit(lambda tokens_BT: built.head(variables, built.apply(variables, tokens_BT, canvas.positions_BT, None, spec)[0]))
    return plain_sampler.decode(logits_of, canvas, decoder, jax.random.key(0), NAMES, mask_id=MASK, eos_id=EOS)


@pytest.mark.parametrize("decoder", [decoders.LowConfidence(16, 8, 8), decoders.Random(16, 8, 10, temperature=0.7),
                                     decoders.LowConfidence(16, 8, 8, guidance=0.5)],
                         ids=["low_confidence", "random", "guidance"])
def test_while_loop_equals_a_plain_python_sampler_token_by_token(model, decoder):
    canvas, trace = generate(model, REQUESTS, decoder, NAMES)
    tokens_BT, step_BT, forwards_B, _ = plain(model, canvas, decoder)
    np.testing.assert_array_equal(trace.final_BT, tokens_BT)
    np.testing.assert_array_equal(trace.reveal_step_BT, step_BT)
    np.testing.assert_array_equal(trace.forwards["full"], forwards_B)
    assert len(np.unique(tokens_BT[canvas.writable_BT])) > 10  # the model has something to say


def test_block_causal_canvas_equals_a_prefix_that_grows(model):
    decoder = block_decoders.BlockThreshold(16, 8, 4, threshold=0.1)
    requests = [REQUESTS[i] for i in (0, 1, 3)]  # the other one begins with a block of masks alone
    built, variables = model
    canvas, trace = generate(model, requests, decoder, NAMES[:3])

    @jax.jit
    def logits_of(tokens_T):
        position_BT = jnp.arange(len(tokens_T))[None]
        return built.head(variables, built.apply(variables, tokens_T[None], position_BT, None, AttentionSpec.own(block=position_BT // 8))[0])[0]

    for b, request in enumerate(requests):
        tokens, step, forwards, margin = plain_sampler.decode_blocks(logits_of, request, decoder, mask_id=MASK, eos_id=EOS)
        assert margin > 1e-4
        np.testing.assert_array_equal(trace.final_BT[b][canvas.seen[b]], tokens)
        np.testing.assert_array_equal(trace.reveal_step_BT[b][canvas.seen[b]], step)
        assert trace.forwards["full"][b] == forwards
    written = [np.unique(step[step >= 0], return_counts=True)[1] for step in trace.reveal_step_BT]
    assert {2, 3} <= set(np.concatenate(written).tolist())  # the schedule's two, and more where more were sure


def test_a_row_is_bit_identical_whatever_its_neighbours_and_slot(model):
    decoder = decoders.LowConfidence(16, 8, 8, temperature=0.7)
    _, whole = generate(model, REQUESTS, decoder, NAMES)
    for order in [3, 2, 1, 0], [1, 1, 0, 1], [2, 0, 3, 3]:
        _, other = generate(model, [REQUESTS[i] for i in order], decoder, NAMES[order])
        for got, want in zip(other[1:5], whole[1:5], strict=True):
            np.testing.assert_array_equal(got, want[order])


def test_another_shape_gives_the_same_scores_up_to_rounding_and_the_same_tokens_where_no_choice_is_that_close(model):
    decoder = decoders.LowConfidence(16, 8, 16)
    canvas, whole = generate(model, REQUESTS, decoder, NAMES)
    assert plain(model, canvas, decoder)[3].min() > 1e-4
    for b, request in enumerate(REQUESTS):
        alone_canvas, alone = generate(model, [request], decoder, NAMES[b : b + 1], length=31)
        ours, theirs = canvas.valid_BT[b], alone_canvas.valid_BT[0]
        np.testing.assert_array_equal(whole.final_BT[b][ours], alone.final_BT[0][theirs])
        np.testing.assert_array_equal(whole.reveal_step_BT[b][ours], alone.reveal_step_BT[0][theirs])
        np.testing.assert_allclose(whole.reveal_score_BT[b][ours], alone.reveal_score_BT[0][theirs], rtol=0, atol=1e-4)


@pytest.mark.parametrize("decoder", [decoders.Threshold(16, 8, threshold=0.3), decoders.Random(16, 8, 8, temperature=1.0)],
                         ids=["greedy", "temperature"])
def test_proposals_without_logits_are_those_of_logits(decoder):
    """By `linear_confidence` in a loop over the vocabulary, as the kernels do it: the same tokens, from the same noise."""
    config = config_lib.Model(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, num_experts=4, experts_per_token=2, expert_size=16,
                              max_length=64, compute_dtype="float32")
    logits, confidence = (transformer.build(config, config_lib.Kernels(linear_confidence=name)) for name in ("auto", "reference"))
    variables = logits.init(jax.random.key(1))
    canvas = canvas_lib.build([[[5, 6, 7], 16], [[9], 16]], block_length=8, mask_id=299, pad_id=0, max_length=64)
    more = {"key": jax.random.key(0), "row_B": np.arange(2), "mask_id": 299, "eos_id": 1}
    found = [engine.generate(engine.Denoiser.of(built), variables, canvas, decoder, **more)[1] for built in (logits, confidence)]
    np.testing.assert_array_equal(found[0].final_BT, found[1].final_BT)
    np.testing.assert_array_equal(found[0].reveal_step_BT, found[1].reveal_step_BT)
    np.testing.assert_allclose(found[0].reveal_logprob_BT, found[1].reveal_logprob_BT, atol=1e-5)
