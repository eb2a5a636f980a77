"""Answers to prompts: what is maskable, how each rule pads, which turn is drawn, what is too long, and that draws depend on (seed, index)."""

import json

import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import prepare, tokenizer
from llada_jax.config import ConfigError, Data
from llada_jax.data import pipeline, supervised
from llada_jax.data.sources import Document
from llada_jax.interop import chat
from tests import tiny_run

BYTES = tokenizer.Bytes()
EOS = BYTES.eos_id
CHAT = tokenizer.HuggingFace(tokenizer.bytes_json(300, {token: 260 + i for i, token in enumerate(
    ["<|mask|>", "<|endoftext|>", "<|role_end|>", "<role>", "</role>"])}), 260, 261)  # fmt: skip
TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}, {"role": "user", "content": "f"},
        {"role": "assistant", "content": "g"}, {"role": "user", "content": "unanswered"}]


def pair(prompt, answer):
    return Document("a:1", answer, prompt + answer, prompt)


def rows(documents, length, packed=False, tokens=BYTES, index=None, seed=0, **data):
    """Rows as a batch sees them."""
    data = Data(sequence_length=length, **data)
    stored = supervised.rows_of(documents, tokens, data, "a", packed)
    return supervised.finish(stored, range(len(stored["tokens"])) if index is None else index, seed, data, tokens.eos_id)


def shown(found, row, tokens=BYTES):
    """(text that is given, text to learn) of each segment; an end of text shows as ., other control tokens as |."""
    text = ["." if i == tokens.eos_id else tokens.decode([i]) or "|" for i in found["tokens"][row]]
    maskable, segment = found["maskable"][row], found["segment"][row]
    assert not maskable[segment == 0].any() and (found["tokens"][row][segment == 0] == tokens.eos_id).all()
    parts = []
    for number in np.unique(segment[segment > 0]):
        inside = segment == number
        assert found["position"][row][inside].tolist() == list(range(inside.sum()))
        parts.append(tuple("".join(t for t, take in zip(text, inside & which, strict=True) if take) for which in (~maskable, maskable)))
    return parts


PAIRS = [pair("2+2=", "4"), pair("ab", "cdef"), pair("", "xyz")]


@pytest.mark.parametrize(("padding", "answers"), [
    ("row", ["4.......", "cdef......", "xyz........."]),
    ("batch", ["4..", "cdef.", "xyz...."]),
    ("block:4", ["4...", "cdef..", "xyz."]),
    ("none", ["4.", "cdef.", "xyz."]),
])  # fmt: skip
def test_every_rule_pads_with_end_of_text_and_prompts_are_given(padding, answers):
    found = rows(PAIRS, 12, answer_padding=padding)
    assert [shown(found, row) for row in range(3)] == [[(d.prompt, answer)] for d, answer in zip(PAIRS, answers, strict=True)]
    assert found["bytes"].sum() == sum(len(d.prompt) + len(d.text) for d in PAIRS) and found.keys() == {
        "tokens", "segment", "position", "maskable", "bytes"}


def test_packed_answers_are_padded_to_their_own_blocks():
    documents = [pair("ab", "c"), pair("defghi", "jkl"), pair("mn", "opqr"), pair("s", "t")]
    found = rows(documents, 16, packed=True, answer_padding="block:4")
    assert [shown(found, row) for row in range(2)] == [[("ab", "c."), ("defghi", "jkl...")], [("mn", "opqr.."), ("s", "t..")]]
    assert found["segment"].tolist() == [[1] * 4 + [2] * 12, [1] * 8 + [2] * 4 + [0] * 4]
    plain = rows(documents, 16, packed=True, answer_padding="align:4")  # the rest of a block is seen by nobody
    assert shown(plain, 0) == [("ab", "c."), ("defghi", "jkl.")] and plain["segment"][0].tolist() == [1] * 4 + [2] * 10 + [0] * 2
    tight = rows(documents, 16, packed=True, answer_padding="none")
    assert shown(tight, 0) == [("ab", "c."), ("defghi", "jkl.")] and shown(tight, 1) == [("mn", "opqr."), ("s", "t.")]
    for padding in "row", "batch":
        with pytest.raises(ConfigError, match="one a row: set data"):
            rows(documents, 16, packed=True, answer_padding=padding)


def test_texts_keep_their_form_beside_answers():
    found = rows([Document("a", "text", "a"), pair("p", "q"), Document("b", "longer", "b")], 6)
    assert [shown(found, row) for row in range(3)] == [[("", "text.")], [("p", "q....")], [("", "longer")]]


def test_long_answers_are_cut_and_long_prompts_left_out_and_both_counted(caplog):
    documents = [pair("ab", "c"), pair("ab", "cd"), pair("ab", "cde"), pair("abc", "de"), pair("abcd", "e")]
    with caplog.at_level("WARNING", logger="absl"):
        found = rows(documents, 4, answer_padding="none")
    assert [shown(found, row) for row in range(4)] == [[("ab", "c.")], [("ab", "cd")], [("ab", "cd")], [("abc", "d")]] and len(found["tokens"]) == 4
    assert "of 5 documents 2 were cut to data.sequence_length=4 tokens and 1 left out" in caplog.text


SYSTEM = "detailed thinking off"
FIRST = f"|SYSTEM|{SYSTEM}||HUMAN|ab||ASSISTANT|"
SECOND = f"{FIRST}cde||HUMAN|f||ASSISTANT|"


def talk_rows(turns, count=1, **data):
    documents = [Document("a:1", "", "", messages=tuple(TALK))]
    settings = dict(turns=turns, chat_template="llada_moe", answer_padding="none") | data
    stored = supervised.rows_of(documents * count, CHAT, Data(sequence_length=80, **settings), "a", packed=False)
    return lambda index, seed=0: supervised.finish({k: v[[0] * len(index)] for k, v in stored.items()}, index, seed, Data(
        sequence_length=80, **settings), CHAT.eos_id)


def test_the_template_writes_prompts_and_a_turn_is_learned():
    last = talk_rows("last")([0])
    assert shown(last, 0, CHAT) == [(SECOND, "g|")]
    given = last["tokens"][0][(last["segment"][0] > 0) & ~last["maskable"][0]]
    assert given.tolist() == chat.render("llada_moe", TALK[:3], CHAT)
    both = talk_rows("all")([0])
    assert shown(both, 0, CHAT) == [(FIRST + "|HUMAN|f||ASSISTANT|", "cde|g|")]
    one = rows([pair("ab", "cde")], 80, tokens=CHAT, chat_template="llada_moe", answer_padding="block:20")
    assert shown(one, 0, CHAT) == [(FIRST, "cde|" + "." * (60 - len(FIRST) - 4))]


def test_a_drawn_turn_depends_on_seed_and_sample_alone_and_hides_what_follows():
    draw = talk_rows("sampled")
    found = draw(range(400))
    drawn = [shown(found, row, CHAT)[0] for row in range(400)]
    assert set(drawn) == {(FIRST, "cde|"), (SECOND, "g|")}
    first = np.array([given == FIRST for given, _ in drawn])
    assert abs(first.mean() - 0.5) < 4 * 0.5 / 20 and abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.25
    some = draw([7, 350, 2])
    assert [shown(some, row, CHAT)[0] for row in range(3)] == [drawn[7], drawn[350], drawn[2]]
    assert [shown(draw(range(400), 1), row, CHAT)[0] for row in range(400)] != drawn
    padded = talk_rows("sampled", answer_padding="row")(range(8))
    assert (padded["segment"] == 1).all()
    assert (~padded["maskable"]).sum(1).tolist() == [len(chat.render("llada_moe", TALK[:1 if f else 3], CHAT)) for f in first[:8]]


def test_a_conversation_ends_with_the_last_answer_that_begins_in_the_row():
    sample = supervised.sample_of(Document("a:1", "", "", messages=tuple(TALK)), CHAT, "llada_moe")
    first, second = sample.turns.index(2), sample.turns.index(3)
    assert len(supervised.fit(sample, 1000)[0].tokens) == second + 2 < len(sample.tokens)  # what nobody answered goes
    for limit, end, shortened in ((second + 2, second + 2, False), (second + 1, second + 1, True), (second, first + 4, True), (first, 0, True)):
        found, cut = supervised.fit(sample, limit)
        assert cut == shortened and (found is None if not end else found[:2] == (sample.tokens[:end], sample.turns[:end]))


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def config_of(**data):
    return config_lib.from_config_dict({"data": {"tokenizer": "bytes", "holdout": 0.0, "sequence_length": 24} | data})


def test_batches_and_shards_of_packed_answers(tmp_path):
    """Efficiency is said; pairs and texts of one file stand in rows of their own; prepared shards give the same batches."""
    records = [{"prompt": "p" * (i % 7), "response": f"{i:03}" * (1 + i % 3)} for i in range(60)] + [{"text": f"text {i}, " * 9} for i in range(5)]
    source = write(tmp_path / "a.jsonl", records)
    config = config_of(sources=source, answer_padding="block:4")
    direct = pipeline.build(config, BYTES, "train")
    assert ", 60 samples with answers, " in direct.describe() and "% filled" in direct.describe()
    used = sum(len(r["prompt"]) + len(r["response"]) + 1 for r in records[:60]) + sum(len(r["text"]) + 1 for r in records[60:])
    assert f"{used / (direct.num_rows * 24):.1%} filled" in direct.describe()
    out = tmp_path / "out"
    prepare.prepare(config.data, out)
    shards = pipeline.build(config_of(sources=str(out), answer_padding="block:4", tokenizer=""), BYTES, "train")
    assert shards.describe() == direct.describe()
    a, b = direct.batch(3, 2, 8), shards.batch(3, 2, 8)
    assert all((a[key] == b[key]).all() and a[key].dtype == b[key].dtype for key in a)
    every = direct.rows(range(direct.num_rows))
    text = (every["maskable"] == (every["segment"] > 0)).all(1) & (every["segment"] > 0).any(1)
    given = (every["segment"] > 0) & ~every["maskable"]
    assert given.any() and (every["tokens"][given] == ord("p")).all() and text.sum() >= 5
    answers = BYTES.decode(every["tokens"][every["maskable"] & ~text[:, None]])
    assert sorted(answers[i:i + 3] for i in range(0, len(answers), 3)) == sorted(f"{i:03}" for i in range(60) for _ in range(1 + i % 3))
    for wrong, reason in ((dict(answer_padding="row"), "several answers a row"), (dict(answer_padding="block:8"), "do not begin blocks of 8")):
        with pytest.raises(ConfigError, match=reason):
            pipeline.build(config_of(sources=str(out), tokenizer="", **wrong), BYTES, "train")


def test_any_number_of_processes_pads_to_the_longest_answer_of_the_batch(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r" * (1 + i % 17)} for i in range(40)])
    dataset = pipeline.build(config_of(sources=source, pack=False, answer_padding="batch"), BYTES, "train")
    whole = dataset.batch(0, 3, 8)
    ends = (whole["segment"] > 0).sum(1)
    longest = 2 + max((row < 256).sum() for row in whole["tokens"]) - 1
    assert set(ends.tolist()) == {longest} and (whole["maskable"].sum(1) == longest - 1).all()
    parts = [dataset.batch(0, 3, 8, process, 4) for process in range(4)]
    assert all((np.concatenate([part[key] for part in parts]) == whole[key]).all() for key in whole)
    assert len({int((dataset.batch(0, step, 8)["segment"] > 0).sum(1)[0]) for step in range(6)}) > 1


@pytest.mark.parametrize(("data", "reason"), [
    (dict(chat_template=""), r"a\.jsonl:1 holds messages: set data.chat_template"),
    (dict(chat_template="llada_moe"), r"a\.jsonl:1: .*kind bytes.*data.chat_template=llada_moe"),
    (dict(chat_template="llama"), "did you mean 'llada'"),
])  # fmt: skip
def test_messages_need_a_template_and_its_tokenizer(tmp_path, data, reason):
    source = write(tmp_path / "a.jsonl", [{"messages": TALK[:2]}])
    with pytest.raises(ConfigError, match=reason):
        pipeline.build(config_of(sources=source, pack=False, **data), BYTES, "train")


@pytest.mark.parametrize(("data", "reason"), [
    (dict(answer_padding="block:7"), "sequence_length=24 is not a whole number of blocks of 7 .* use 28"),
    (dict(answer_padding="block"), "row, batch, block:N"), (dict(answer_padding="align:0"), "row, batch, block:N"),
    (dict(turns="first"), "sampled, last, all"),
])  # fmt: skip
def test_settings_that_cannot_work(data, reason):
    with pytest.raises(ConfigError, match=reason):
        config_of(**data)


@pytest.mark.slow
def test_a_run_begins_from_another_and_learns_packed_answers(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": f"{i}>", "response": str(i)[::-1]} for i in range(200)])
    short = "--config.train.steps=4", "--config.train.eval_every=4", "--config.train.checkpoint_every=4"
    arguments = lambda name, *more: tiny_run.arguments(source, tmp_path / name, *short, *more)
    answers = "--config.data.answer_padding=block:8", "--config.diffusion.complementary=True", "--config.diffusion.weighting=uniform", \
        "--config.diffusion.normalization=masked", "--config.diffusion.confidence_coefficient=0.5"
    base = tiny_run.train(*arguments("base", "--config.data.pack=False"))
    assert base.returncode == 0, base.stderr
    tuned = tiny_run.train(*arguments("tuned", *answers, f"--init_from={tmp_path}/base"))
    assert tuned.returncode == 0, tuned.stderr
    assert "missing (kept at their initial values): none" in tuned.stdout and "samples with answers, " in tuned.stdout
    lines = [line for line in tiny_run.lines(tmp_path / "tuned") if "loss" in line]
    assert len(lines) == 4 and all(line["confidence"] >= 0 and line["total"] > line["loss"] for line in lines)
