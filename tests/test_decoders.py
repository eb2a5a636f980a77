"""Every decoder with every cache: rows of one batch do not see each other, and settings that change nothing change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.model import transformer
from llada_jax.sampling import block_decoders, cache, decoders, engine, presets, progress, score, select, stream, trace
from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling.decoder import Mixed, Moment
from pallas_kernels.attention import AttentionSpec
from tests.toy_denoiser import EOS, MASK, VOCAB, Toy

TOY = engine.Denoiser.of(Toy(seed=1391, eos_start=20, eos_slope=12))
SHORT = {"gen_length": 16, "block_length": 8}
ALL = {name: presets.build(name, {}, SHORT) for name in presets.PRESETS}
ALL |= {"guided": decoders.LowConfidence(16, 8, 8, guidance=0.7), "hot": decoders.Random(16, 8, 8, temperature=0.8, top_k=9, top_p=0.9),
        "budget": decoders.Threshold(16, 8, forwards=5, threshold=1.0), "penalty": block_decoders.Editing(16, 8, 0.6, 0.4, penalty=0.5)}
CACHES = {"none": cache.NoCache(), "prefix": cache.Prefix(), "dual": cache.Dual(refresh_every=3), "stale": cache.Dual(refresh_after=4),
          "vicinity": cache.Vicinity(warmup=2, before=3, after_block=5),
          "block_causal": cache.BlockCausal(), "separate": cache.BlockCausal(fused=False)}
PROMPTS = [[5, 9, 2, 33, 11, 7], [7], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59], [41, 7, 20]]


@functools.cache
def mixed(kept, soft=False):
    """All decoders that go with a cache, as one; `soft` ones need embeddings, which the toy has not."""
    fitting = [decoder for decoder in ALL.values() if decoder.block_causal >= CACHES[kept].block_causal and soft >= decoder.smooths]
    return Mixed(decoders=tuple(fitting))


def rows(kept, choices, length, soft=False):
    """A canvas with one row for each choice of decoder, laid out as that decoder wants it."""
    made = []
    for choice in choices:
        decoder = mixed(kept, soft).decoders[choice]
        made.append(canvas_lib.build([[PROMPTS[choice % len(PROMPTS)], decoder.gen_length]], block_length=decoder.block_lengths,
                                     aligned=decoder.aligned, mask_id=MASK, pad_id=EOS, max_length=64, length=length))
    return canvas_lib.Canvas(*(np.concatenate(x) for x in zip(*made, strict=True)))


def generate(denoiser, variables, kept, choices, length, keeper=None):
    soft = denoiser.embed is not None
    _, record = engine.generate(denoiser, variables, rows(kept, choices, length, soft), mixed(kept, soft), cache=keeper or CACHES[kept],
                                key=jax.random.key(3), row_B=np.array(choices, np.int32) + 100, choice_B=np.array(choices, np.int32),
                                mask_id=MASK, eos_id=EOS, stop_at_eos=True)
    return jax.device_get(record)


def row(record, b, length):
    """Everything that the trace says of a row, without its padding."""
    T, edits = record.final_BT.shape[1], record.edits
    of = lambda x: x[b][-length:] if x.ndim == 2 and x.shape[1] == T else x[b]
    from_the_end = edits._replace(slot_BK=np.where(edits.step_BK >= 0, edits.slot_BK - T, -1))
    return jax.tree.map(of, record._replace(calls={}, edits=from_the_end))


def same(got, want, scores=0.0):
    """Bit by bit, but scores and log-probabilities within `scores`."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        k = min(a.size, b.size) if "edits" in str(path) else None  # the log has room by the canvas's length
        np.testing.assert_allclose(np.ravel(a)[:k], np.ravel(b)[:k], rtol=0, atol=scores if a.dtype == np.float32 else 0, err_msg=str(path))


@pytest.mark.parametrize("kept", [pytest.param(kept, marks=[pytest.mark.slow] if kept in ("stale", "prefix", "separate") else []) for kept in CACHES])
def test_a_row_is_the_same_in_other_company_slots_and_shapes(kept):
    """The toy's logits are exact, so that tokens, steps and counts are equal bit by bit across shapes too; the softmax rounds by shape."""
    everyone = list(range(len(mixed(kept).decoders)))
    whole = generate(TOY, {}, kept, everyone, 32)
    assert (whole.final_BT != MASK).all() and not whole.failed_B.any() and (whole.edits.count_B <= whole.edits.step_BK.shape[1]).all()
    shuffled = np.random.default_rng(0).permutation(everyone).tolist()
    others = generate(TOY, {}, kept, shuffled, 32)
    for b, choice in enumerate(shuffled):
        same(row(others, b, 32), row(whole, choice, 32))
    for start in range(0, len(everyone), 3):
        few = [choice % len(everyone) for choice in range(start, start + 3)]
        record = generate(TOY, {}, kept, few, 41)
        for b, choice in enumerate(few):
            same(row(record, b, 32), row(whole, choice, 32), scores=1e-5)
    for b in everyone:  # the counts of the views are those of the row alone
        assert sum(int(n[b]) for kind, n in whole.forwards.items() if kind not in ("guidance", "commit")) <= whole.steps_B[b] + 1


MODEL = config_lib.Model(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=8, experts_per_token=2,
                         expert_size=16, max_length=64, compute_dtype="float32")


@functools.cache
def model():
    built = transformer.build(MODEL)
    variables = built.init(jax.random.key(0))
    sharp = jax.tree.map(lambda x: 4 * x, variables["params"]["head"])  # so that some probabilities are high
    return engine.Denoiser.of(built), {**variables, "params": {**variables["params"], "head": sharp}}


@pytest.mark.parametrize("kept", ["none", "block_causal", *(pytest.param(kept, marks=pytest.mark.slow) for kept in (
    "vicinity", "prefix", "dual", "separate"))])
def test_a_row_of_a_real_model_is_the_same_in_other_company(kept):
    everyone = list(range(len(mixed(kept, True).decoders)))
    whole = generate(*model(), kept, everyone, 32)
    assert (whole.final_BT != MASK).all()
    shuffled = np.random.default_rng(1).permutation(everyone).tolist()
    others = generate(*model(), kept, shuffled, 32)
    for b, choice in enumerate(shuffled):
        same(row(others, b, 32), row(whole, choice, 32))
    # in another shape numbers differ by rounding, so a decision that hangs by less may fall the other way
    few = [choice % len(everyone) for choice in range(0, 3 * len(everyone) // 2, 3)]
    record = generate(*model(), kept, few, 41)
    differ = []
    for b, choice in enumerate(few):
        got, want = row(record, b, 32), row(whole, choice, 32)
        if (got.final_BT != want.final_BT).any() or (got.reveal_step_BT != want.reveal_step_BT).any():
            differ.append(choice)
        else:
            np.testing.assert_allclose(got.reveal_logprob_BT, want.reveal_logprob_BT, atol=1e-4)
    print(f"{kept}: {len(differ)} of {len(few)} rows differ in another shape: {differ}")
    assert len(differ) <= 0.01 * len(few)


def test_a_cache_that_is_always_refreshed_is_none():
    everyone = list(range(len(mixed("dual").decoders)))
    want, got = generate(TOY, {}, "none", everyone, 32), generate(TOY, {}, "dual", everyone, 32, cache.Dual(warmup=1000))
    same(got._replace(calls={}, forwards={}), want._replace(calls={}, forwards={}))
    np.testing.assert_array_equal(got.forwards["full"], want.forwards["full"])
    assert not got.forwards["window"].any()


def test_block_causal_caches_are_exact_and_a_fused_commit_saves_its_forward():
    everyone = list(range(len(mixed("block_causal").decoders)))
    everywhere = engine.generate(TOY, {}, rows("block_causal", everyone, 32), mixed("block_causal"), key=jax.random.key(3), stop_at_eos=True,
                                 row_B=np.array(everyone) + 100, choice_B=np.array(everyone), mask_id=MASK, eos_id=EOS)[1]
    fused, separate = (generate(TOY, {}, kept, everyone, 32) for kept in ("block_causal", "separate"))
    for got in fused, separate:
        same(got._replace(calls={}, forwards={}, tokens_B=got.steps_B), everywhere._replace(calls={}, forwards={}, tokens_B=everywhere.steps_B))
    total = lambda record: sum(record.forwards.values()) - record.forwards.get("guidance", 0)
    np.testing.assert_array_equal(total(fused), everywhere.steps_B)
    np.testing.assert_array_equal(total(separate), everywhere.steps_B + separate.forwards["commit"])
    np.testing.assert_array_equal(fused.forwards["commit"], separate.forwards["commit"])
    assert fused.forwards["commit"].max() > 0 and (fused.tokens_B < np.asarray(everywhere.tokens_B)).all()


def test_given_blocks_between_gaps_are_committed_too():
    """The block before the given one was computed against masks: a window of two blocks does not reach it."""
    draw = lambda length: np.random.default_rng(length).integers(0, 60, length).tolist()
    requests = [[draw(4 + i)[i:], 4, draw(30 + i)[-(4 * given):], 4] for i in range(8) for given in (1, 2)]
    canvas = canvas_lib.build(requests, block_length=4, mask_id=MASK, pad_id=EOS, max_length=512, aligned=True)
    decoder = block_decoders.BlockThreshold(gen_length=8, block_length=4, steps=4, threshold=0.8)
    everywhere, *cached = (engine.generate(TOY, {}, canvas, decoder, key=jax.random.key(0), row_B=jnp.arange(len(requests)), mask_id=MASK, eos_id=EOS,
                                           cache=kept) for kept in (cache.NoCache(), cache.BlockCausal(), cache.BlockCausal(fused=False)))
    for got, seen in cached:
        np.testing.assert_array_equal(got, everywhere[0])
        assert (seen.forwards["full"] == 2).all() and (seen.forwards["commit"] == 0).all()


def test_a_real_model_with_a_block_causal_cache_agrees_with_one_without():
    everyone = list(range(len(mixed("block_causal").decoders)))
    got = generate(*model(), "block_causal", everyone, 32)
    want = generate(*model(), "block_causal", everyone, 32, cache.NoCache())
    np.testing.assert_array_equal(got.final_BT, want.final_BT)
    np.testing.assert_allclose(got.reveal_logprob_BT, want.reveal_logprob_BT, atol=1e-4)


def test_one_call_without_callbacks_and_no_compile_for_another_prompt():
    kept, choices = "none", [0, 1, 2]
    generate(TOY, {}, kept, choices, 41)
    before = engine.compiled()._cache_size()
    canvas = rows(kept, choices, 41)
    other = canvas._replace(tokens_BT=np.where(canvas.valid_BT & ~canvas.writable_BT, 3, canvas.tokens_BT))
    args = {"key": jax.random.key(4), "row_B": np.array(choices, np.int32), "choice_B": np.array(choices, np.int32), "mask_id": MASK, "eos_id": EOS}
    engine.generate(TOY, {}, other, mixed(kept), stop_at_eos=True, **args)
    assert engine.compiled()._cache_size() == before
    jaxpr = jax.make_jaxpr(lambda canvas: engine.generate(TOY, {}, canvas, mixed(kept), **args))(canvas_lib.Canvas(*map(jnp.asarray, canvas)))
    names = set(primitives(jaxpr.jaxpr))
    assert "while" in names and not [name for name in names if "callback" in name or name in ("outside_call", "infeed", "outfeed")]


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_a_row_whose_logits_are_not_numbers_stops_and_the_others_go_on():
    def broken(variables, tokens_BW, *rest):
        hidden, kv, stats = TOY.apply(variables, tokens_BW, *rest)
        return jnp.where((tokens_BW[:, -1:] == 13)[..., None], jnp.nan, hidden), kv, stats

    decoder = decoders.LowConfidence(8, 8)
    canvas = canvas_lib.build([[[5, 6], 8, [1]], [[5, 6], 8, [13]]], block_length=8, mask_id=MASK, pad_id=EOS, max_length=64)
    run = lambda apply, canvas: engine.generate(TOY._replace(apply=apply), {}, canvas, decoder, key=jax.random.key(0), row_B=np.arange(2),
                                                mask_id=MASK, eos_id=EOS)[1]
    record, sound = run(broken, canvas), run(TOY.apply, canvas)
    assert record.failed_B.tolist() == [False, True] and record.steps_B.tolist() == [8, 1]
    np.testing.assert_array_equal(record.final_BT[0], sound.final_BT[0])
    np.testing.assert_array_equal(record.final_BT[1], canvas.tokens_BT[1])


def test_a_row_ends_when_its_answer_is_clear():
    """The last gap is written at once, the reasoning before it stays as it is; where no row is sure, nothing changes."""
    canvas = canvas_lib.build([[[5, 6], 12, [7], 3], [[9], 12, [7], 3, [4]]], block_length=15, mask_id=MASK, pad_id=EOS, max_length=64)
    run = lambda limit: jax.device_get(engine.generate(TOY, {}, canvas, decoders.LowConfidence(15, 15, answer_entropy=limit), key=jax.random.key(0),
                                                       row_B=np.arange(2), mask_id=MASK, eos_id=EOS)[1])
    never, tight, loose = run(0.0), run(1e-6), run(6.0)
    same(tight._replace(calls={}), never._replace(calls={}))
    last = np.asarray(progress.last_gap(jnp.asarray(canvas.writable_BT)))
    assert last.sum(1).tolist() == [3, 3] and last[0, -3:].all() and last[1, -4:-1].all()
    assert (loose.steps_B < never.steps_B).all() and (loose.final_BT[last] != MASK).all() and (loose.final_BT == MASK).any(1).all()
    for b in range(2):  # up to the end the course is the same
        before = (loose.reveal_step_BT[b] >= 0) & (loose.reveal_step_BT[b] < loose.steps_B[b] - 1)
        np.testing.assert_array_equal(loose.final_BT[b][before], never.final_BT[b][before])


def test_an_answer_in_two_blocks_is_clear_as_a_whole():
    """Its first slot alone ends no row; once that is written, the rest may."""
    canvas = canvas_lib.build([[[5, 6], 12, [7], 3], [[9], 16]], block_length=13, mask_id=MASK, pad_id=EOS, max_length=64)
    record = jax.device_get(engine.generate(TOY, {}, canvas, decoders.LowConfidence(26, 13, answer_entropy=1e3), key=jax.random.key(0),
                                            row_B=np.arange(2), mask_id=MASK, eos_id=EOS)[1])
    assert (record.final_BT[canvas.writable_BT] != MASK).all() and record.steps_B.tolist() == [14, 14]


def test_smoothing_adds_what_was_proposed_and_nothing_where_its_share_is_none():
    denoiser, variables = model()
    canvas = canvas_lib.build([[[5, 6, 7], 8], [[9], 8]], block_length=8, mask_id=MASK, pad_id=EOS, max_length=64)
    more = {"key": jax.random.key(0), "row_B": np.arange(2), "mask_id": MASK, "eos_id": EOS}
    run = lambda decoder: jax.device_get(engine.generate(denoiser, variables, canvas, decoder, **more)[1])
    plain = run(decoders.Threshold(8, 8, threshold=1.0))
    none, every, some = (run(decoders.Smoothed(8, 8, threshold=1.0, slack=0.0, soft=soft, growth=0.0, most=soft, tokens=tokens))
                         for soft, tokens in ((0.0, 0), (0.5, 0), (0.5, VOCAB)))
    np.testing.assert_array_equal(none.final_BT, plain.final_BT)
    np.testing.assert_allclose(none.reveal_logprob_BT, plain.reveal_logprob_BT, atol=1e-5)
    np.testing.assert_array_equal(some.final_BT, every.final_BT)  # of all tokens, one by one
    np.testing.assert_allclose(some.reveal_logprob_BT, every.reveal_logprob_BT, atol=1e-4)
    # the second forward by hand
    T, first = canvas.tokens_BT.shape[1], every.reveal_step_BT == 0
    spec = AttentionSpec.own(padding=~canvas.seen)
    after = np.where(first, every.final_BT, canvas.tokens_BT)
    slots = np.broadcast_to(np.arange(T), after.shape)
    hidden, _, _ = denoiser.apply(variables, jnp.asarray(canvas.tokens_BT), canvas.positions_BT, None, spec, None, None, slots)
    prob = jax.nn.softmax(denoiser.head(variables, hidden), axis=-1)
    table = denoiser.embed(variables, jnp.arange(VOCAB)[None])[0]
    soft = jnp.where((after == MASK)[..., None], 0.5 * prob @ table, 0)
    hidden, _, _ = denoiser.apply(variables, denoiser.embed(variables, jnp.asarray(after)) + soft, canvas.positions_BT, None, spec, None, None, slots)
    logprob = jax.nn.log_softmax(denoiser.head(variables, hidden).at[..., MASK].set(-jnp.inf), axis=-1)
    want = np.take_along_axis(np.asarray(logprob), every.final_BT[..., None], axis=-1)[..., 0]
    second = every.reveal_step_BT == 1
    assert second.sum() == 2 and np.abs(every.reveal_logprob_BT[second] - plain.reveal_logprob_BT[plain.reveal_step_BT == 1]).max() > 1e-3
    np.testing.assert_allclose(every.reveal_logprob_BT[second], want[second], atol=1e-4)


def test_a_cache_that_keeps_blocks_needs_a_block_causal_decoder():
    with pytest.raises(ConfigError, match=r"block_causal keeps finished blocks.*low_confidence"):
        engine.generate(TOY, {}, rows("none", [0], 32), decoders.LowConfidence(16, 8), cache=cache.BlockCausal(), key=jax.random.key(0),
                        row_B=np.zeros(1, int), mask_id=MASK, eos_id=EOS)


def test_a_budget_of_forwards_is_kept_and_edits_can_be_rebuilt():
    names = [name for name, decoder in ALL.items() if not decoder.smooths]
    record = generate(TOY, {}, "none", list(range(len(names))), 32)
    assert record.steps_B[names.index("budget")] == 5
    editing = names.index("llada21_joint")
    assert record.edits.count_B[editing] > 0 and record.edits.count_B[names.index("low_confidence")] == 0
    history = trace.canvases(record)
    for b in range(len(names)):
        np.testing.assert_array_equal(history[-1][b], record.final_BT[b])
    changed = [int((new[editing] != old[editing]).sum()) for old, new in zip([record.initial_BT, *history[:-1]], history, strict=True)]
    assert sum(changed) == record.edits.count_B[editing] + (record.reveal_step_BT[editing] >= 0).sum()


# ---- the rules against their formulas ------------------------------------------------------------------------------------

def drawn(rng, C=9):
    """(score, open) of a row with ties, and at least one open slot."""
    open_C = rng.random(C) < 0.7
    open_C[rng.integers(C)] = True
    return np.round(rng.random(C), 1).astype(np.float32), open_C


def by_rank(score_C, open_C):
    return sorted(np.flatnonzero(open_C), key=lambda i: (-score_C[i], i))


def plain_rules(score_C, open_C):
    order = by_rank(score_C, open_C)
    runs, i = [], 0
    while i < len(open_C):
        j = i
        while j < len(open_C) and open_C[j]:
            j += 1
        runs += [range(i, j)] if j > i else []
        i = j + 1
    best = [max(score_C[k] for k in run) for run in runs]
    entropy = {i: 1 - score_C[i] for i in order}
    low = [i for i in order if entropy[i] < 0.5]
    start = list(np.flatnonzero(open_C))
    lead = next((n for n, i in enumerate(start) if entropy[i] >= 0.5), len(start))
    run_of = {k: b for run, b in zip(runs, best, strict=True) for k in run}
    return {
        "threshold": {i for i in order if score_C[i] >= np.float32(0.8)} | {order[0]},
        "slack": {i for i in order if score_C[i] >= np.float32(min(0.8, score_C[order[0]] - 1e-5))},
        "factor": set(order[: max(next((r for r in range(1, len(order) + 1) if r > 1 and score_C[order[r - 1]] < np.float32(1 - 1 / (r + 1))),
                                       len(order) + 1) - 1, 1)]),
        "hierarchical": {i for i in order if score_C[i] > np.float32(0.8)} | {order[0]} |
                        {i for i in order if score_C[i] == run_of[i] and score_C[i] > np.float32(0.4)},
        "surest": set((low or order[:1])[:3]),
        "contiguous": set(start[: max(min(lead, 3), 1)]),
        "bounded": set(order[: max(n for n in range(1, len(order) + 1) if n == 1 or sum(entropy[i] for i in order[: n - 1]) <= 0.95)]),
        "first": set(start[:2]),
    }


def test_rules_equal_their_formulas():
    rng = np.random.default_rng(0)
    score_BC, open_BC = (np.stack(x) for x in zip(*(drawn(rng) for _ in range(200)), strict=True))
    position_BC = np.broadcast_to(np.arange(score_BC.shape[1]), score_BC.shape)

    @jax.jit
    def ours(score_BC, open_BC):
        entropy_BC = 1 - score_BC
        return {"threshold": select.threshold(score_BC, open_BC, 0.8), "slack": select.threshold(score_BC, open_BC, 0.8, 1e-5),
                "factor": select.factor(score_BC, open_BC, 1.0), "hierarchical": select.hierarchical(score_BC, open_BC, position_BC, 0.8, 0.4),
                "surest": select.surest(entropy_BC, open_BC, 0.5, 3), "contiguous": select.contiguous(entropy_BC, open_BC, 0.5, 3),
                "bounded": select.entropy_bounded(entropy_BC, open_BC, 0.95), "first": select.first(open_BC, 2)}
    got = ours(score_BC, open_BC)
    for b in range(len(score_BC)):
        for name, want in plain_rules(score_BC[b], open_BC[b]).items():
            assert set(np.flatnonzero(got[name][b])) == want, (name, score_BC[b], open_BC[b])


def test_quotas_add_up_and_round_halves_to_even():
    for m in range(1, 40):
        for steps in range(1, 20):
            assert sum(int(select.share(m, steps, i)) for i in range(steps)) == m
            left = m
            for i in range(steps):
                q = int(select.rounded_share(np.int32(left), np.int32(steps - i)))
                assert q == round(left / (steps - i))
                left -= q
            assert left == 0


def test_an_early_end_of_text_counts_less_at_first():
    proposal = score.Proposal(jnp.array([[EOS, 3]]), None, jnp.array([[0.8, 0.5]], jnp.float32), None, None, None)
    at = lambda k: Moment(jnp.array([k]), None, None, None, None, None, MASK, EOS)
    eoser, ascending = decoders.EosRejection(16, 16, 16, gamma=0.4), decoders.Ascending(16, gamma=0.01)
    for k in range(16):  # gamma + (1 - gamma) k / (S - 1)
        np.testing.assert_allclose(eoser.score(proposal, at(k)), [[0.8 * (0.4 + 0.6 * k / 15), 0.5]], rtol=1e-6)
    for k in range(ascending.steps):  # gamma + (1 - gamma) 2^(k+1) / 2^S
        np.testing.assert_allclose(ascending.score(proposal, at(k)), [[0.8 * (0.01 + 0.99 * 2.0**(k + 1 - 4)), 0.5]], rtol=1e-6)


def test_ascending_blocks():
    assert decoders.Ascending(32, blocks=3).block_lengths == (7, 8, 17) and decoders.Ascending(32).block_lengths == (32,)
    assert decoders.Ascending(256).steps == 8


def test_cut_tails_keep_the_likeliest_tokens():
    logits_V = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))
    cut = lambda top_k, top_p, temperature=0.0: np.isfinite(score.cut_tail(jnp.asarray(logits_V)[None, None], jnp.full((1, 1, 1), temperature), top_k,
                                                                           top_p))[0, 0].tolist()
    assert cut(2, 1.0) == [False, True, False, True, False] and cut(0, 1.0) == [True] * 5
    assert cut(0, 0.5) == [False, True, False, True, False] and cut(0, 0.3) == [False, True, False, False, False]
    assert cut(0, 0.5, 0.25) == [False, True, False, False, False]  # colder, the first has more than half


@pytest.mark.parametrize("decoder, kept", [(ALL["threshold"], cache.Vicinity(warmup=1, before=3, after_block=5)),
                                           (ALL["llada21_joint"], cache.BlockCausal())], ids=["threshold", "llada21_joint"])
def test_requests_that_flow_through_three_rows_get_what_they_get_alone(decoder, kept):
    requests = [[PROMPTS[i % 4], decoder.gen_length] for i in range(7)]
    canvas = canvas_lib.build(requests, block_length=decoder.block_lengths, aligned=decoder.aligned, mask_id=MASK, pad_id=EOS, max_length=64)
    rules = engine.rules_of(TOY, canvas, decoder, mask_id=MASK, eos_id=EOS, cache=kept, stop_at_eos=True)
    whole = engine.generate(TOY, {}, canvas, decoder, cache=kept, key=jax.random.key(3), row_B=np.arange(7), mask_id=MASK, eos_id=EOS,
                            stop_at_eos=True)[1]
    before = [program._cache_size() for program in stream.programs()]
    seen, done = [], {}
    for event in stream.serve(rules, {}, canvas, key=jax.random.key(3), slots=3, chunk=2):
        seen.append(event.request)
        if event.trace is not None:
            done[event.request] = event.trace
    assert sorted(done) == list(range(7)) and len(seen) > 14 and seen.index(6) > seen.index(0)
    assert [program._cache_size() - old for program, old in zip(stream.programs(), before, strict=True)] == [1, 1, 1]
    for b, record in done.items():
        alone = jax.tree.map(lambda x, b=b: np.asarray(x)[b : b + 1] if np.ndim(x) else x, whole)
        same(record._replace(calls={}), alone._replace(calls={}), scores=1e-5)
