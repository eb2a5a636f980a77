"""The losses of fine-tuning on a real, tiny model: averages over answers and masked tokens, complementary masks, the confidence loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.config import ConfigError
from llada_jax.data import pipeline
from llada_jax.model import transformer
from llada_jax.tokenizer import Bytes
from llada_jax.training import step as step_lib
from tests import tiny_run

VOCAB, MASK, B, T = 32, 31, 4, 16
SEGMENT = np.array([[1] * 6 + [2] * 8 + [0] * 2, [1] * 16, [1] * 4 + [2] * 4 + [3] * 8, [1] * 9 + [0] * 7], np.int32)
PROMPTS = ((2, 3), (5,), (1, 2, 4), (6,))  # given tokens of each segment


def config_of(**groups):
    config = config_lib.from_config_dict(tiny_run.get_config())
    diffusion = dict(balance_coefficient=0.0, z_coefficient=0.0, variable_length_rate=0.0, noise_unit="segment") | groups.pop("diffusion", {})
    groups = {"model": {"vocab_size": VOCAB}, "diffusion": diffusion, **groups}
    result = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()})
    config_lib.validate(result)
    return result


def batch_of(pairs=False):
    position, maskable = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    for row, prompts in enumerate(PROMPTS):
        for number, prompt in enumerate(prompts, 1):
            at = np.flatnonzero(SEGMENT[row] == number)
            position[row, at], maskable[row, at] = np.arange(len(at)), np.arange(len(at)) >= prompt
    tokens = np.random.default_rng(0).integers(0, MASK, (B, T)).astype(np.int32)
    batch = {"tokens": tokens, "segment": SEGMENT, "position": position, "maskable": maskable}
    if pairs:
        batch = {key: np.repeat(x[:B // 2], 2, axis=0) for key, x in batch.items()}
    return {**batch, "index": np.arange(B, 2 * B, dtype=np.uint32)}


@pytest.fixture(scope="module")
def model():
    return transformer.build(config_of().model)


@pytest.fixture(scope="module")
def variables(model):
    return jax.jit(model.init)(jax.random.key(1))


def outcome(model, variables, config, batch, step=3):
    grads, sums = jax.jit(lambda v, b: step_lib.gradients(model, config, MASK, v, b, step))(variables, batch)
    return jax.tree.map(np.asarray, grads), {key: np.asarray(x) for key, x in sums.items()}


def by_hand(model, variables, config, batch, step=3):
    """(masked, p, logits of the noisy batch), from another path than the loss."""
    noise = step_lib.corrupted(config, MASK, batch, step)
    hidden, _, _ = model.apply(variables, noise["noisy"], batch["position"], None, step_lib.attention_spec(batch))
    return np.asarray(noise["masked"]), np.asarray(noise["p"]), model.head(variables, hidden)


def losses(logits, tokens):
    return -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits), np.float64), tokens[..., None], -1)[..., 0]


def test_normalisation_is_over_answers_or_masked_tokens_and_micro_batches_add_up(model, variables):
    batch, whole = batch_of(), {}
    for normalization, weighting in (("sequence", "elbo"), ("masked", "uniform")):
        config = config_of(diffusion=dict(normalization=normalization, weighting=weighting, min_noise=0.3, max_noise=0.8))
        masked, p, logits = by_hand(model, variables, config, batch)
        nll = losses(logits, batch["tokens"])
        assert (p >= 0.3).all() and (p <= 0.8).all() and not (masked & ~batch["maskable"]).any()
        answers = []  # a plain loop over answers
        for row, prompts in enumerate(PROMPTS):
            for number in range(1, len(prompts) + 1):
                inside = (SEGMENT[row] == number) & batch["maskable"][row]
                assert len(set(p[row, inside].tolist())) == 1, "one noise level an answer"
                answers.append(sum(nll[row, i] / p[row, i] for i in np.flatnonzero(inside & masked[row])) / inside.sum())
        expected = np.mean(answers) if normalization == "sequence" else nll[masked].mean()
        grads, sums = outcome(model, variables, config, batch)
        np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
        assert len(answers) == 7
        whole[normalization] = grads, sums["loss"], config
    grads, loss, config = whole["masked"]
    halves, sums = outcome(model, variables, dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=2)), batch)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), halves, grads)


PAIRED = dict(complementary=True, weighting="uniform", normalization="masked", min_noise=0.3, max_noise=0.8)


def test_a_pair_supervises_every_answer_token_exactly_once():
    batch = batch_of(pairs=True)
    for extra in {}, dict(corruption="exact_count"), dict(time_sampling="independent", noise_unit="sequence"):
        config = config_of(diffusion=PAIRED | extra)
        for step in range(5):
            noise = step_lib.corrupted(config, MASK, batch, step)
            masked, p = np.asarray(noise["masked"]), np.asarray(noise["p"])
            assert (masked[::2].astype(int) + masked[1::2] == batch["maskable"][::2]).all()
            assert (np.asarray(noise["noisy"]) == np.where(masked, MASK, batch["tokens"])).all()
            inside = batch["maskable"][::2]
            np.testing.assert_allclose((p[::2] + p[1::2])[inside], 1, rtol=1e-6)
            assert p[1::2][inside].min() > 0.19 - (len(extra) == 1) and p[::2][inside].min() > 0.29
    other = step_lib.corrupted(config, MASK, {**batch, "index": batch["index"] + B}, 4)
    assert (np.asarray(other["masked"]) != masked).any()


def test_packed_answers_in_blocks_are_those_of_rows_of_their_own(model, variables):
    """LLaDA2.0's fine-tuning: pairs of masks, [noisy ; clean], three samples in a row whose lengths are whole blocks."""
    config = config_of(diffusion=PAIRED | dict(block_schedule="4"))
    batch = {key: x[[2, 2]] for key, x in batch_of().items()} | {"index": np.array([4, 5], np.uint32)}
    noise = {key: np.asarray(x) for key, x in step_lib.corrupted(config, MASK, batch, 3).items() if key != "index"}
    assert (noise["masked"].sum(0) == batch["maskable"][0]).all()
    parts, alone = ((0, 4), (4, 8), (8, 16)), []
    for start, end in parts:
        moved = {key: np.zeros_like(x) for key, x in noise.items()}
        for key in moved:
            moved[key][:, :end - start] = noise[key][:, start:end]
        moved["segment"] = np.minimum(moved["segment"], 1)
        alone.append(moved | {"block": noise["block"]})
    rows = {key: np.concatenate([noise[key], *(part[key] for part in alone)]) for key in noise} | {"index": np.arange(8, dtype=np.uint32)}
    nll = np.asarray(jax.jit(lambda v, rows: step_lib.masked_terms(model, config, MASK, v, rows, 3, True)[0].nll_BT)(variables, rows))
    for number, (start, end) in enumerate(parts, 1):
        inside = noise["masked"][:, start:end]
        assert inside.any()
        np.testing.assert_allclose(nll[:2, start:end][inside], nll[2 * number:2 * number + 2, :end - start][inside], rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_pair_varies_less_than_that_of_two_independent_masks(model, variables):
    """200 draws of the noise of one batch; both estimates have the same mean."""
    batch = batch_of(pairs=True)

    def spread(config):
        one = lambda step: step_lib.gradients(model, config, MASK, variables, batch, step)[0]
        flat = jax.jit(lambda steps: jax.lax.map(lambda s: jnp.concatenate([g.ravel() for g in jax.tree.leaves(one(s))]), steps))
        found = np.asarray(flat(jnp.arange(200)), np.float64)
        return found.mean(0), found.var(0).sum()

    # token: all answer tokens of the batch divide, so that the estimate is linear in the masks and both have the same mean
    settings = PAIRED | dict(min_noise=0.4, max_noise=0.6, normalization="token")
    mean, paired = spread(config_of(diffusion=settings))
    other_mean, independent = spread(config_of(diffusion=settings | dict(complementary=False)))
    assert paired < 0.8 * independent, (paired, independent)
    assert np.linalg.norm(mean - other_mean) < 5 * np.sqrt((paired + independent) / 200)


def test_data_of_pairs_stand_in_neighbouring_rows_with_one_drawn_turn(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "p{i}", "response": "{i}"}}\n' for i in range(30)))
    config = config_lib.from_config_dict({
        "data": dict(sources=str(tmp_path / "a.jsonl"), sequence_length=8, tokenizer="bytes", holdout=0.0, pack=False),
        "diffusion": dict(complementary=True, weighting="uniform")})
    single = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, complementary=False))
    paired, plain = (pipeline.build(c, Bytes(), "train") for c in (config, single))
    batch, half = paired.batch(5, 3, 8), plain.batch(5, 3, 4)
    for key in "tokens", "segment", "position", "maskable":
        assert (batch[key][::2] == half[key]).all() and (batch[key][1::2] == half[key]).all(), key
    assert batch["index"].tolist() == list(range(24, 32))
    parts = [paired.batch(5, 3, 8, process, 8) for process in range(8)]  # a pair may stand on two processes
    assert all((np.concatenate([part[key] for part in parts]) == batch[key]).all() for key in batch)


def test_confidence_loss_is_the_entropy_of_right_tokens_and_nothing_passes_the_selector(model, variables):
    batch, settings = batch_of(), dict(weighting="uniform", normalization="masked", min_noise=0.5, max_noise=0.9)
    config = config_of(diffusion=settings | dict(confidence_coefficient=2.0))
    rest = {key: value for key, value in variables.items() if key != "params"}
    noise = step_lib.corrupted(config, MASK, batch, 3)
    masked = np.asarray(noise["masked"])
    _, _, logits = by_hand(model, variables, config, batch)
    # half of the masked tokens become what the model believes, so that some are right
    believed = np.where(masked & (np.arange(T) % 2 == 0), np.asarray(jnp.argmax(logits, -1)), batch["tokens"]).astype(np.int32)
    batch = {**batch, "tokens": believed}

    def plain(params):
        hidden, _, _ = model.apply({"params": params, **rest}, noise["noisy"], batch["position"], None, step_lib.attention_spec(batch))
        logprobs = jax.nn.log_softmax(model.head({"params": params, **rest}, hidden))
        right = jax.lax.stop_gradient(noise["masked"] & (jnp.argmax(logprobs, -1) == believed))
        entropy = -(jnp.exp(logprobs) * logprobs).sum(-1)
        nll = -jnp.take_along_axis(logprobs, believed[..., None], -1)[..., 0]
        confidence = jnp.sum(entropy * right) / right.sum()
        return jnp.sum(nll * noise["masked"]) / noise["masked"].sum() + 2.0 * confidence, (confidence, right)

    (total, (confidence, right)), expected = jax.jit(jax.value_and_grad(plain, has_aux=True))(variables["params"])
    assert 5 < int(right.sum()) < masked.sum()
    grads, sums = outcome(model, variables, config, batch)
    np.testing.assert_allclose(sums["confidence"], confidence, rtol=1e-5)
    np.testing.assert_allclose(sums["total"], total, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, jax.tree.map(np.asarray, expected))

    def never(*_):
        raise AssertionError("the entropy is computed")
    off = config_of(diffusion=settings)
    trace = lambda config, model: str(jax.make_jaxpr(lambda v, b: step_lib.gradients(model, config, MASK, v, b, 3))(variables, batch))
    trace(off, model._replace(cross_entropy_and_entropy=never))
    with pytest.raises(AssertionError, match="the entropy is computed"):
        trace(config, model._replace(cross_entropy_and_entropy=never))
    assert "confidence" not in outcome(model, variables, off, batch)[1]


def test_a_mesh_takes_the_same_step(model, variables):
    """Pairs, averages over answers and the confidence loss with rows and the head's vocabulary split."""
    config = config_of(diffusion=PAIRED | dict(normalization="sequence", confidence_coefficient=1.0))
    batch = batch_of(pairs=True)
    grads, sums = outcome(model, variables, config, batch)
    mesh = partitioning.make_mesh(config_lib.Mesh(data=2, tensor=2), jax.devices()[:4])
    split = transformer.build(config.model, config.kernels, mesh)
    placed = jax.device_put(variables, partitioning.shardings_of(mesh, split.axes, split.shapes))
    others, found = outcome(split, placed, config, partitioning.put_batch(mesh, batch))
    for key in "loss", "confidence", "total":
        np.testing.assert_allclose(found[key], sums[key], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), others, grads)


@pytest.mark.parametrize(("groups", "reason"), [
    (dict(diffusion=PAIRED, train=dict(batch_size=5)), "batch_size=5 is odd.*use 6"),
    (dict(diffusion=dict(complementary=True)), "set diffusion.max_noise below 1"),
    (dict(diffusion=PAIRED | dict(weighting="elbo", schedule="cosine")), "schedule=linear"),
    (dict(diffusion=dict(complementary=True, objective="autoregressive")), "has none of"),
    (dict(diffusion=dict(min_noise=0.8, max_noise=0.3)), "the first below the second"),
    (dict(diffusion=dict(confidence_coefficient=-1.0)), "at least 0"),
    (dict(diffusion=dict(confidence_coefficient=1.0, objective="autoregressive")), "set it to 0"),
    (dict(diffusion=dict(confidence_coefficient=1.0), kernels=dict(linear_cross_entropy="gpu")), "use auto or reference or chunked"),
])  # fmt: skip
def test_settings_that_cannot_work(groups, reason):
    with pytest.raises(ConfigError, match=reason):
        config_of(**groups)
