"""Block diffusion: who sees whom, what one pass over [noisy ; clean] gives, and blocks that change their size while a run goes on."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.llada2 import get_config
from llada_jax import config as config_lib
from llada_jax.diffusion import blocks
from llada_jax.diffusion import corrupt as corrupt_lib
from llada_jax.diffusion import loss as loss_lib
from llada_jax.model import transformer
from llada_jax.training import checkpoint, optimizer, step
from llada_jax.training import state as state_lib
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.attention.reference import visible
from tests import test_train_step, tiny_run

V, MASK, T = 12, 11, 12
MODEL = config_lib.Model(vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, num_experts=4, experts_per_token=2, expert_size=8,
                         max_length=T, init_std=0.6)
SIZES = np.array([1, 2, 3, 4, 5, 7, 11, 12])  # a row of the batch each; most do not divide the row
B = len(SIZES)


def packing(rng, rows, length, padded=True):
    """Random documents of a row, the last perhaps padding (segment 0), and positions from each document's start."""
    segment = 1 + np.cumsum(rng.random((rows, length)) < 0.25, axis=1)
    segment -= segment[:, :1] - 1
    segment[padded & (segment == segment[:, -1:]) & (segment > 1) & (rng.random((rows, 1)) < 0.5)] = 0
    starts = np.diff(segment, axis=1, prepend=-1) != 0
    index = np.broadcast_to(np.arange(length), segment.shape)
    return segment.astype(np.int32), (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32)


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shifted"])
def model(request):
    """Positions predict themselves, or their successors (Dream)."""
    return transformer.build(dataclasses.replace(MODEL, shift_predictions=request.param))


@pytest.fixture(scope="module")
def variables(model):
    return jax.jit(model.init)(jax.random.key(3))


@pytest.fixture(scope="module")
def halves(model):
    """Hidden states of the noisy half, (B, T, D), from (variables, noisy, clean, positions, segments, blocks)."""
    def run(variables, noisy_BT, clean_BT, position_BT, segment_BT, block_BT):
        spec = AttentionSpec.own(segment=segment_BT, padding=segment_BT == 0)
        tokens, position, spec = blocks.doubled(noisy_BT, clean_BT, position_BT, spec, block_BT)
        return model.apply(variables, tokens, position, None, spec)[0][:, :T]
    return jax.jit(run)


@pytest.fixture(scope="module")
def block_causal(model):
    """Hidden states (B, T, D) of one row of tokens whose blocks see themselves and earlier ones: how such a model is decoded."""
    def run(variables, tokens_BT, position_BT, segment_BT, block_BT):
        return model.apply(variables, tokens_BT, position_BT, None, AttentionSpec.own(segment_BT, block_BT, padding=segment_BT == 0))[0]
    return jax.jit(run)


@pytest.fixture(scope="module", params=["row", "segment"])
def rows(request):
    """(noisy, clean, positions, segments, blocks) of rows that differ in packing and in the size of their blocks."""
    rng = np.random.default_rng(1)
    segment, position = packing(rng, B, T)
    clean = rng.integers(0, MASK, (B, T)).astype(np.int32)
    noisy = np.where(rng.random((B, T)) < 0.6, MASK, clean).astype(np.int32)
    return noisy, clean, position, segment, np.asarray(blocks.ids(jnp.asarray(position), SIZES[:, None], request.param), np.int32)


@pytest.mark.parametrize("origin", ["row", "segment"])
def test_who_sees_whom_is_what_the_report_says(origin):
    """All lengths to 16 and all sizes of blocks, documents anywhere: same document, no padding, and of blocks own, earlier clean, or none."""
    @jax.jit
    def masks(position, segment, size):
        zero = jnp.zeros_like(position)
        spec = AttentionSpec.own(segment=segment, padding=segment == 0)
        tokens, positions, spec = blocks.doubled(zero, zero + 1, position, spec, blocks.ids(position, size, origin))
        return visible(spec), tokens, positions
    rng = np.random.default_rng(0)
    for length in range(1, 17):
        sizes = np.repeat(np.arange(1, length + 2), 3)
        segment, position = packing(rng, len(sizes), length)
        found, tokens, positions = masks(position, segment, sizes[:, None])
        assert (np.asarray(tokens) == np.repeat([0, 1], length)).all() and (np.asarray(positions) == np.tile(position, 2)).all()
        for row, (size, seen) in enumerate(zip(sizes, np.asarray(found), strict=True)):
            counted = np.arange(length) if origin == "row" else position[row]
            own, other = (counted // size)[:, None], (counted // size)[None]
            document = (segment[row][:, None] == segment[row]) & (segment[row] != 0)
            want = np.block([[(own == other) & document, (own > other) & document], [np.zeros_like(document), (own >= other) & document]])
            assert np.array_equal(seen, want), (length, size, segment[row])


def test_a_noisy_block_reads_itself_and_the_clean_text_before_it(variables, halves, rows):
    """Bit for bit, experts included: no clean token of its own or a later block, no other noisy block, no other document changes its states."""
    noisy, clean, _, segment, block = rows
    states = np.asarray(halves(variables, *rows))
    own = blocks.units(jnp.asarray(block), jnp.asarray(segment))  # numbered along the row, split where documents meet
    own, changed_before = np.asarray(own), 0
    for k in range(own.max() + 1):
        mine = own == k
        document = np.where(mine, segment, -1).max(1, keepdims=True)
        later = (own >= k) | (segment != document)
        other_clean = np.where(later, (clean + 1) % MASK, clean)
        other_noisy = np.where(mine, noisy, (noisy + 3) % V)
        after = np.asarray(halves(variables, other_noisy, other_clean, *rows[2:]))
        assert np.array_equal(after[mine], states[mine])
        before = np.asarray(halves(variables, noisy, np.where(later, clean, (clean + 1) % MASK), *rows[2:]))
        reads = (own < k) & (segment == document) & (segment > 0)
        differs = (before != states).any(-1) & mine & (segment > 0)
        assert not (differs & ~reads.any(1, keepdims=True)).any()
        changed_before += differs.sum()
    assert changed_before > B  # and the clean text before it does


def test_one_pass_is_as_good_as_block_by_block(variables, halves, block_causal, rows):
    """Each block from its own forward on [clean earlier blocks, noisy block], as a decoder makes them; a shifted state is that of the clean one."""
    noisy, clean, position, segment, block = rows
    states = np.asarray(halves(variables, *rows))
    number, separately = np.asarray(blocks.units(jnp.asarray(block), jnp.asarray(segment))), np.zeros_like(states)
    for k in range(number.max() + 1):
        tokens = np.where(number < k, clean, np.where(number == k, noisy, 0))
        separately = np.where((number == k)[..., None], block_causal(variables, tokens, position, segment, block), separately)
    np.testing.assert_allclose(states[segment > 0], separately[segment > 0], atol=1e-4)


def terms_of(model, variables, rows, masked, block):
    noisy, clean, position, segment, _ = rows
    return loss_lib.elbo_terms(model.apply, model.cross_entropy, variables, clean, noisy, masked, jnp.ones(clean.shape), position,
                               AttentionSpec.own(segment=segment, padding=segment == 0), jnp.ones_like, block_BT=block)[0]


def test_blocks_of_one_token_are_the_autoregressive_loss(model, variables, block_causal):
    """Masked throughout, token i costs -log p(x_i | x_<i, mask at i): T forwards of one row, each as long as its prefix. Shifted predictions never
    read the mask: they cost what the same weights give as an autoregressive model."""
    rng = np.random.default_rng(2)
    clean = np.broadcast_to(rng.integers(0, MASK, T), (B, T)).astype(np.int32)
    position, segment = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), np.ones((B, T), np.int32)
    masked = np.ones((B, T), bool)
    rows = (np.full((B, T), MASK, np.int32), clean, position, segment, None)
    run = jax.jit(lambda v, *rows: terms_of(model, v, (*rows, None), masked, blocks.ids(position, 1, "row")).nll_BT)
    nll = np.asarray(run(variables, *rows[:4]))[0]
    by_hand = []
    for start in range(0, T, B):  # B prefixes a call; what follows a prefix is invisible to it
        prefix = np.minimum(np.arange(start, start + B), T - 1)[:, None]
        tokens = np.where(position < prefix, clean, np.where(position == prefix, MASK, 5)).astype(np.int32)
        hidden = block_causal(variables, tokens, position, segment, position)
        logprobs = np.asarray(jax.nn.log_softmax(model.head(variables, hidden)))
        by_hand += [-logprobs[b, i, clean[0, i]] for b, [i] in enumerate(prefix)]
    np.testing.assert_allclose(nll, by_hand[:T], atol=1e-4)
    own = model if not model.config.shift_predictions else transformer.build(MODEL)
    autoregressive = jax.jit(lambda v: loss_lib.next_token_terms(own.apply, own.cross_entropy, v, clean, masked, position, AttentionSpec())[0].nll_BT)
    next_token = np.asarray(autoregressive(variables))[0]
    assert np.allclose(nll[1:], next_token[1:], atol=1e-4) == model.config.shift_predictions


def config_of(**diffusion):
    """Of a training step on rows of `test_train_step`, without what is summed over both halves."""
    groups = dict(data=dict(sequence_length=test_train_step.T), train=dict(batch_size=test_train_step.B, steps=6))
    return test_train_step.config_of(diffusion=dict(balance_coefficient=0.0, z_coefficient=0.0, variable_length_rate=0.0) | diffusion, **groups)


def test_a_block_as_long_as_the_row_is_plain_masked_diffusion():
    """Loss and gradient of both programs, the second with a clean half that no noisy position sees."""
    config = config_of()
    model, batch = transformer.build(config.model, config.kernels), test_train_step.batch_of(0)
    variables = jax.jit(model.init)(jax.random.key(0))
    both = jax.jit(lambda v: [step.gradients(model, config, test_train_step.MASK, v, batch, jnp.int32(2), half) for half in (False, True)])
    (gradient, sums), (with_half, with_sums) = both(variables)
    assert np.isclose(sums["loss"], with_sums["loss"], rtol=1e-5) and float(sums["loss"]) > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max()) + 1e-7), gradient, with_half)
    np.testing.assert_allclose(sums["nll_S"], with_sums["nll_S"], rtol=1e-4, atol=1e-4)
    assert np.allclose(np.asarray(with_sums["load_SLE"]).sum(), 2 * np.asarray(sums["load_SLE"]).sum())  # the clean tokens are routed as well


def test_a_new_size_compiles_nothing_and_resumes_from_the_step_alone():
    """Six steps over four sizes in one call are the same steps in two, of one program; each has the loss of blocks of its size."""
    config = config_of(block_schedule="1:2,4:2,3:1,16", noise_unit="block")
    model = transformer.build(config.model, config.kernels)
    update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
    run = jax.jit(lambda: state_lib.create(model, update, config))()
    call = step.make_call(step.make_step(model, update, config, test_train_step.MASK))
    stacked = jax.tree.map(lambda *x: np.stack(x), *map(test_train_step.batch_of, range(6)))
    copy = lambda: jax.tree.map(jnp.copy, run)  # a call donates its state
    whole, values = call(copy(), stacked, jnp.int32(6))
    first, _ = call(copy(), stacked, jnp.int32(3))
    resumed, rest = call(first, jax.tree.map(lambda x: np.concatenate([x[3:], x[3:]]), stacked), jnp.int32(3))
    assert call._cache_size() == 1
    assert checkpoint.tree_hash(resumed) == checkpoint.tree_hash(whole)
    assert np.array_equal(np.asarray(values["loss"])[3:], np.asarray(rest["loss"])[:3])

    @jax.jit
    def loss_at(variables, batch, at, size):
        block_BT = blocks.ids(batch["position"], size, "row")
        unit_BT = blocks.units(block_BT, batch["segment"])
        key, noise = (config.train.seed, at, step.DRAW), corrupt_lib.Noise.of(config.diffusion, test_train_step.MASK)
        t_BU = corrupt_lib.times(key, batch["index"], test_train_step.T, test_train_step.B, "stratified")
        noisy, masked, p = corrupt_lib.corrupt(key, batch["index"], batch["tokens"], batch["maskable"], unit_BT, noise, t_BU)
        return loss_lib.elbo_terms(model.apply, model.cross_entropy, variables, batch["tokens"], noisy, masked, p, batch["position"],
                                   step.attention_spec(batch), lambda p: 1 / p, block_BT=block_BT)[0].weighted_BT.mean()
    state, losses = copy(), []
    for i, size in enumerate((1, 1, 4, 4, 3, 16)):
        losses.append(float(loss_at(state.variables, test_train_step.batch_of(i), jnp.int32(i), jnp.int32(size))))
        state, _ = call(state, jax.tree.map(lambda x, i=i: np.stack([x[i]] * 6), stacked), jnp.int32(1))
    np.testing.assert_allclose(values["loss"], losses, rtol=1e-5)
    assert call._cache_size() == 1 and loss_at._cache_size() == 1


def test_schedule():
    of = lambda text: blocks.Schedule.of(config_of(block_schedule=text))  # rows of 16 tokens
    wsd = of("1:3,4:3,0:5,8:2,4")
    assert [int(wsd.size(i)) for i in range(15)] == [1] * 3 + [4] * 3 + [16] * 5 + [8] * 2 + [4] * 2
    assert np.array_equal(jax.jit(jax.vmap(wsd.size))(jnp.arange(15)), [int(wsd.size(i)) for i in range(15)])
    assert [wsd.clean_half(i) for i in range(15)] == [True] * 6 + [False] * 5 + [True] * 4
    assert wsd.switches() == (6, 11) and wsd.clean_half() and (wsd.final(100), wsd.final(9), wsd.final(12)) == (4, 0, 8)
    for text in ("", "0", "16", "99", "0:4,16"):
        assert not of(text).clean_half() and of(text).switches() == () and of(text).final(6) == 0
    llada2 = config_lib.from_config_dict(get_config("blocks=wsd"))
    assert blocks.Schedule.of(llada2).switches() == (4000, 84_000) and blocks.Schedule.of(llada2).final(llada2.train.steps) == 32
    calls = step.calls(0, config_lib.Train(steps=15, steps_per_call=4, eval_every=0), wsd.switches())
    assert [steps.start for steps in calls] == [0, 4, 6, 10, 11] and calls[-1].stop == 15
    assert all(len({wsd.clean_half(i) for i in steps}) == 1 for steps in calls), "no call needs both programs"


def test_the_last_size_is_known_without_an_array(monkeypatch):
    """An array would start the backend, after which sample and evaluate could no longer choose the number of devices."""
    wsd = blocks.Schedule.of(config_of(block_schedule="1:3,0:5,4"))
    monkeypatch.setattr(blocks, "jnp", None)
    assert [wsd.final(steps) for steps in (3, 8, 9)] == [1, 0, 4]


def test_noise_of_blocks():
    """One level a block, another one in the next; a block that straddles two documents is two."""
    segment = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]])
    position = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]])
    by_row, by_segment = (blocks.ids(position, 3, origin) for origin in ("row", "segment"))
    assert by_row.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]] and by_segment.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0]]
    assert blocks.units(by_row, segment).tolist() == [[0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 5, 5]]
    assert blocks.units(by_segment, segment).tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]]


@pytest.mark.slow
def test_a_run_whose_blocks_grow_and_shrink_goes_on_where_it_was_cut(tmp_path):
    """Through `train`, with and without the clean half; the second run begins amid the whole rows, as if it had been killed there."""
    tiny_run.write_texts(tmp_path / "texts")
    arguments = lambda name, *more: tiny_run.arguments(
        str(tmp_path / "texts/*.txt"), tmp_path / name, "--config.diffusion.block_schedule=2:5,8:3,0:6,4", "--config.diffusion.noise_unit=block",
        "--config.train.steps=20", "--config.train.keep_every=4", *more)
    whole, other = tiny_run.train_each([arguments("whole"), arguments("other", "--config.train.steps_per_call=7")])
    assert whole.returncode == other.returncode == 0, whole.stderr + other.stderr
    for words in ("compiling the training step … ", "compiling the training step with the clean half … "):
        assert whole.stdout.count(words) == 1
    expected = tiny_run.lines(tmp_path / "whole"), tiny_run.weights(whole.stdout)
    assert (tiny_run.lines(tmp_path / "other"), tiny_run.weights(other.stdout)) == expected
    for at in (16, 20):
        shutil.rmtree(tmp_path / "other/checkpoints" / str(at))
    [again] = tiny_run.train_each([arguments("other")])
    assert "resumed at step 12" in again.stdout, again.stderr
    assert (tiny_run.lines(tmp_path / "other"), tiny_run.weights(again.stdout)) == expected

    measured, refused = tiny_run.each("evaluate", [[f"--workdir={tmp_path / 'whole'}", f"--block_size={size}"] for size in ("8,4,0", "many")])
    figures = json.loads(measured.stdout.splitlines()[-1])["heldout_by_block_size"]
    assert [line["block_size"] for line in figures] == [8, 4, 0] and all(f"{line['bits_per_byte']:.4f}" in measured.stdout for line in figures)
    assert len({line["bits_per_byte"] for line in figures}) == 3 and "in blocks of 8" in measured.stdout
    assert refused.returncode == 1 and "--block_size=many" in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    [written] = tiny_run.each("sample", [[f"--workdir={tmp_path / 'whole'}", "--html=", "--prompt=x = ", "--decoder.gen_length=8"]])
    assert "BlockThreshold(" in written.stdout and "block_length=4" in written.stdout and written.returncode == 0, written.stderr
