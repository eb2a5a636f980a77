"""Requests, decoder flags and the replay page."""

import json
import re

import numpy as np
import pytest

from llada_jax import tokenizer
from llada_jax.config import ConfigError
from llada_jax.sampling import block_decoders, cache, canvas, decoders, presets, trace, viewer

BYTES = tokenizer.Bytes()
BUILD = {"block_length": 4, "mask_id": BYTES.mask_id, "pad_id": BYTES.pad_id, "max_length": 20}


def test_parse_finds_gaps_and_appends_one_to_a_plain_prompt():
    assert canvas.parse("a<|mask:12|>b", BYTES, 5) == [[97], 12, [98]]
    assert canvas.parse("ab", BYTES, 5) == [[97, 98], 5]
    assert canvas.parse("", BYTES, 5) == [[], 5]


@pytest.mark.parametrize("text", ["a<|mask|>", "<|mask:|>", "<|mask:0|>", "<|mask:x|>b"])
def test_a_mask_that_is_no_gap_is_an_error(text):
    with pytest.raises(ConfigError, match=r"<\|mask:N\|>"):
        canvas.parse(text, BYTES, 5)


def test_rows_end_together_and_blocks_count_writable_slots():
    made = canvas.build([[[1, 2, 3], 6], [2, [9], 3]], **BUILD)
    mask, pad = BYTES.mask_id, BYTES.pad_id
    assert made.tokens_BT.tolist() == [[1, 2, 3] + [mask] * 6, [pad] * 3 + [mask, mask, 9, mask, mask, mask]]
    assert made.positions_BT.tolist() == [list(range(9)), [0, 0, 0, 0, 1, 2, 3, 4, 5]]
    assert made.valid_BT[1].tolist() == [False] * 3 + [True] * 6
    assert made.block_BT.tolist() == [[-1] * 3 + [0] * 4 + [1] * 2, [-1] * 3 + [0, 0, -1, 0, 0, 1]]


def test_aligned_blocks_count_from_the_start_of_the_row_and_end_in_a_tail():
    made = canvas.build([[[1, 2, 3], 6], [2, [9], 5, [8, 8]], [[1], 1, [2, 2], 4], [2, [9, 9, 9]]], aligned=True, **BUILD)
    mask, pad = BYTES.mask_id, BYTES.pad_id
    assert made.tokens_BT.tolist() == [
        [1, 2, 3] + [mask] * 9,
        [pad] * 2 + [mask, mask, 9, mask, mask, mask, mask, mask, 8, 8],
        [pad] * 4 + [1, mask, 2, 2] + [mask] * 4,
        [pad] * 7 + [mask, mask, 9, 9, 9]]
    assert made.positions_BT[1].tolist() == [0, 0, *range(10)]
    assert made.block_BT.tolist() == [
        [-1] * 3 + [0] + [1] * 4 + [2] * 4,
        [-1, -1, 0, 0, -1, 0, 1, 1, 1, 1, -1, -1],  # the last block holds given text alone: nothing to complete
        [-1] * 5 + [0, -1, -1] + [1] * 4,
        [-1] * 7 + [0, 0, -1, -1, -1]]
    assert made.writable_BT.sum(-1).tolist() == [6, 7, 5, 2] and made.valid_BT.sum(-1).tolist() == [9, 10, 8, 5]
    assert made.seen.sum(-1).tolist() == [12, 10, 8, 5]


def test_blocks_without_a_gap_are_skipped():
    made = canvas.build([[[1] * 3, 2, [1] * 9, 2]], aligned=True, **BUILD)
    assert made.block_BT[0].tolist() == [-1] * 3 + [0, 1] + [-1] * 9 + [2, 2]


def test_a_tail_counts_towards_the_longest_canvas():
    with pytest.raises(ConfigError, match=r"request 0: 17 tokens in whole blocks of 8 are 24, .* max_length=20; shorten it by 1"):
        canvas.build([[[1] * 3, 14]], aligned=True, **{**BUILD, "block_length": 8})


def test_padding_rows_have_nothing_to_write():
    padded = canvas.pad_rows(canvas.build([[3]] * 3, **BUILD), 4)
    assert padded.tokens_BT.shape == (4, 3) and not padded.writable_BT[3].any() and (padded.block_BT[3] == -1).all()
    assert padded.writable_BT[:3].all() and padded.valid_BT[3].all()
    padded = canvas.pad_rows(canvas.build([[3]], aligned=True, **BUILD), 2)
    assert padded.tokens_BT.shape == (2, 4) and padded.block_BT.tolist() == [[0] * 4, [-1] * 4]


@pytest.mark.parametrize("request_, words", [
    ([[1] * 15, 6], ["15", "6", "21", "max_length=20", "at most 5"]),
    ([[1] * 25, 6], ["25", "31", "max_length=20", "shorten"]),
    ([[1, BYTES.mask_id, 2], 4], ["mask token", str(BYTES.mask_id)]),
    ([[1, 2]], ["nothing to write"]),
])
def test_impossible_requests_are_errors_with_numbers(request_, words):
    with pytest.raises(ConfigError) as error:
        canvas.build([request_], **BUILD)
    assert all(word in str(error.value) for word in words), error.value


def test_decoder_flags():
    argv = ["sample", "--decoder=random", "--decoder.steps", "64", "--prompt=x", "--decoder.temperature=0.5", "--cache=dual", "--cache.warmup=2"]
    chosen, rest = presets.split_flags(argv)
    assert rest == ["sample", "--prompt=x"]
    assert chosen.build() == ("random", decoders.Random(steps=64, temperature=0.5), cache.Dual(warmup=2))
    assert presets.build("llada2", {"threshold": "0.8", "block_length": "16"}) == block_decoders.BlockThreshold(block_length=16, threshold=0.8)
    assert presets.build("low_confidence", {"guidance": "1.5"}).guidance == 1.5
    assert presets.build("dinfer_threshold", {"eos_at_block": "false"}).eos_at_block is False
    assert presets.split_flags(["sample", "--", "--decoder=random"]) == (presets.Flags(), ["sample", "--", "--decoder=random"])


def test_every_preset_can_be_built_and_edited():
    for name, preset in presets.PRESETS.items():
        decoder, kept = presets.build(name, {}), presets.build_cache(None, {}, name)
        assert kept.name == preset.cache and (not kept.block_causal or decoder.block_causal)
        shorter = presets.build(name, {}, {"gen_length": 16, "block_length": 8})
        assert shorter.gen_length == 16 and shorter.block_length <= 16
        assert name in presets.describe([name]) and preset.summary in presets.describe([name])
    assert set(presets.RECOMMENDED) < set(presets.PRESETS)


@pytest.mark.parametrize("call, words", [
    (lambda: presets.build("low_confidense", {}), ["low_confidense", "'low_confidence'"]),
    (lambda: presets.build("random", {"step": "3"}), ["random", "'step'", "--decoder.steps"]),
    (lambda: presets.build("random", {"steps": "many"}), ["--decoder.steps='many'", "int"]),
    (lambda: presets.build("random", {"gen_length": 100}), ["100", "block_length=32", "gen_length=128"]),
    (lambda: presets.build("random", {"steps": 30}), ["steps=30", "4 blocks", "--decoder.steps=32"]),
    (lambda: presets.build("random", {"steps": -1}), ["steps=-1", "--decoder.steps=4"]),
    (lambda: presets.build("random", {"guidance": "-1"}), ["guidance=-1", "at least 0"]),
    (lambda: presets.build("llada2", {"threshold": 95}), ["threshold=95", "from 0 to 1"]),
    (lambda: presets.build("threshold", {"steps": 8}), ["threshold", "'steps'", "ignored", "forwards"]),
    (lambda: presets.build("factor", {"threshold": 0.9}), ["factor", "'threshold'", "ignored"]),
    (lambda: presets.build("ass", {"block_length": 8}), ["block_length=8", "decoder.blocks"]),
    (lambda: presets.build("low_confidence", {"top_p": 1.5}), ["top_p=1.5", "at most 1"]),
    (lambda: presets.build("med", {"most": -1}), ["most=-1", "at least 0"]),
    (lambda: presets.build_cache("dul", {}, "threshold"), ["dul", "'dual'"]),
    (lambda: presets.build_cache("dual", {"before": 3}, "threshold"), ["dual", "'before'", "ignored"]),
    (lambda: presets.build_cache("vicinity", {"before": -3}, "threshold"), ["before=-3", "at least 0"]),
    (lambda: presets.split_flags(["sample", "--refresh_every=9"]), ["--refresh_every", "--cache.refresh_every"]),
    (lambda: presets.split_flags(["sample", "--threshold=0.9"]), ["--threshold", "--decoder.threshold"]),
    (lambda: presets.split_flags(["sample", "--config.steps=3"]), ["--config.steps", "--decoder.steps"]),
    (lambda: presets.split_flags(["sample", "--gen_length=3"]), ["--gen_length", "--decoder.gen_length"]),
    (lambda: presets.split_flags(["sample", "--decoder"]), ["--decoder needs a value"]),
])
def test_wrong_decoder_settings_name_the_right_one(call, words):
    with pytest.raises(ConfigError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


HOSTILE = "é</script><b>x</b>\n\t<!--&amp; \u2028"


def hostile_rows():
    ids = BYTES.encode(HOSTILE) + [BYTES.eos_id]
    n, extra = len(ids), 3  # three slots of padding on the left
    made = canvas.build([[[1] * 2, n - 2]], length=n + extra, **{**BUILD, "max_length": 99})
    final = np.array([[BYTES.pad_id] * extra + ids], np.int32)
    step = np.where(made.writable_BT, np.arange(n + extra)[None] - extra - 2, -1)
    logprob = np.where(made.writable_BT & (final != BYTES.eos_id), -0.25, np.nan)
    edits, count = trace.Edits(*[np.zeros((1, 0), int)] * 4, np.zeros(1, int)), np.array([n - 2])
    record = trace.Trace(made.tokens_BT, final, step, logprob, logprob, edits, {"full": count}, {"full": count[0]}, count, 0 * count, count,
                         count < 0)
    return viewer.rows(record, made, BYTES.decode, ["<b>label</b>"], {BYTES.eos_id: "∎"})


def test_pieces_spell_the_text_and_keep_split_characters_whole():
    text = "naïve – 😀\n"
    made = viewer.pieces(BYTES.encode(text) + [BYTES.eos_id], BYTES.decode, {BYTES.eos_id: "∎"})
    assert "".join(made) == text + "∎" and "\ufffd" not in "".join(made)
    assert made[2:4] == ["", "ï"]
    assert "".join(viewer.pieces([0xE2, 0x41, 0xE2], BYTES.decode)) == "\ufffdA\ufffd"


def test_page_holds_text_as_data_and_refers_to_nothing_outside():
    rows = hostile_rows()
    assert "".join(rows[0].text) == HOSTILE + "∎" and rows[0].prob[-1] is None and rows[0].step[:2] == [-1, -1]
    page = viewer.page(rows, "<i>title</i>", "a & b")
    assert "<b>x" not in page and "<b>label" not in page and "<i>title" not in page and "a &amp; b" in page
    assert page.count("</script>") == 2  # the data and the code
    assert not re.search(r"https?:|//\w+\.\w|\burl\(|@import|<link|src=", page)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(data) == [row._asdict() for row in rows]


def test_picture_is_well_formed_and_draws_each_moment():
    import xml.etree.ElementTree

    drawing = viewer.picture(hostile_rows()[0], snapshots=3)
    root = xml.etree.ElementTree.fromstring(drawing)
    notes = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "note"]
    n = hostile_rows()[0].forwards
    assert notes == [f"forward {k} of {n} · {k} of {n} tokens" for k in (0, round(n / 2), n)]
    assert "<b>" not in drawing and not re.search(r"https?:(?!//www.w3.org/2000/svg)|url\(", drawing)
