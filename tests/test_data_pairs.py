"""Pairs of a chosen and a rejected answer, from files and puzzles to batches in which they stand together."""

import json
import re

import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.data import pipeline, sources, supervised
from llada_jax.tokenizer import Bytes

BYTES = Bytes()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(letter, count):
    """Answers of two lengths; what is chosen is written in capitals."""
    return [{"prompt": f"{letter}{i:02}", "chosen": letter.upper() * (1 + i % 3), "rejected": letter * (2 - i % 2)} for i in range(count)]


def config_of(spec, objective="preference", **data):
    return config_lib.from_config_dict({
        "data": {"sources": spec, "sequence_length": 8, "tokenizer": "bytes", "holdout": 0.0, "pack": False, "answer_padding": "none"} | data,
        "diffusion": {"objective": objective, "variable_length_rate": 0.0}})


def texts(rows):
    """Learned text of each row, `.` for end-of-text, after its prompt."""
    as_text = lambda ids: "".join(chr(i) if i < 256 else "." for i in ids)
    return [(as_text(t[(s > 0) & ~m]), as_text(t[m])) for t, s, m in zip(rows["tokens"], rows["segment"], rows["maskable"], strict=True)]


def is_pair(chosen, rejected):
    return chosen[0] == rejected[0] and chosen[1].isupper() and rejected[1].islower()


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return write(folder / "a.jsonl", pairs("a", 9)), write(folder / "b.jsonl", pairs("b", 5))


def test_pairs_stand_together_under_shuffling_mixing_and_processes(two_sources):
    a, b = two_sources
    data = pipeline.build(config_of(f"{a}:0.75,{b}:0.25"), BYTES, "train")
    assert data.num_rows == 28 and data.describe().startswith("28 rows of 8 tokens, two a pair, 28 samples")
    batches = [data.batch(3, step, 6) for step in range(12)]
    drawn = [pair for batch in batches for pair in texts(batch)]
    assert all(is_pair(*drawn[i:i + 2]) for i in range(0, len(drawn), 2))
    prompts = [prompt for prompt, _ in drawn[::2]]
    assert sum(prompt[0] == "b" for prompt in prompts) == 9  # a quarter
    own = [prompt for prompt in prompts if prompt[0] == "a"]
    assert len(set(own[:9])) == 9 == len(set(own[9:18])) and own[:9] != own[9:18] != sorted(own[9:18])  # each once an epoch
    assert batches[2]["index"].tolist() == list(range(12, 18))
    for processes in (2, 3, 6):  # a pair may stand on two of them
        parts = [data.batch(3, 4, 6, process, processes) for process in range(processes)]
        assert all((np.concatenate([part[key] for part in parts]) == batches[4][key]).all() for key in batches[4])
    [stacked] = data.batches(3, [range(4, 6)], 6)
    assert all((stacked[key][i] == batches[4 + i][key]).all() for i in range(2) for key in stacked)


def test_padding_of_the_longest_is_that_of_both(two_sources):
    batch = pipeline.build(config_of(two_sources[0], answer_padding="batch"), BYTES, "train").batch(0, 0, 18)
    found = texts(batch)
    assert {len(prompt + answer) for prompt, answer in found} == {7}
    assert sorted(answer for _, answer in found) == sorted(["A...", "AA..", "AAA.", "aa..", "a..."] * 3 + ["aa..", "a...", "aa.."])


def test_both_answers_of_all_pairs_of_a_prompt_are_held_out(tmp_path):
    records = [record | {"rejected": record["rejected"] + end} for record in pairs("a", 20) for end in "xy"]
    spec = write(tmp_path / "a.jsonl", records)
    config = config_of(spec, holdout=0.3)
    train, heldout, both = (pipeline.build(config, BYTES, split) for split in ("train", "heldout", "heldout_pairs"))
    chosen, compared = texts(heldout.rows(range(heldout.num_rows))), texts(both.rows(range(both.num_rows)))
    assert chosen == compared[::2] and both.num_rows == 2 * heldout.num_rows > 0 and train.num_rows + both.num_rows == 80
    assert all(is_pair(*compared[i:i + 2]) for i in range(0, len(compared), 2))
    prompts = lambda found: {prompt for prompt, _ in found}
    assert not prompts(chosen) & prompts(texts(train.rows(range(train.num_rows))))
    assert [prompt for prompt, _ in chosen] != sorted(prompt for prompt, _ in chosen)
    other = pipeline.build(config_of(spec, "masked", holdout=0.3), BYTES, "train")  # takes the chosen answers alone
    assert all(answer.isupper() for _, answer in texts(other.rows(range(other.num_rows))))


def test_a_pair_is_left_out_whole(tmp_path, caplog):
    spec = write(tmp_path / "a.jsonl", [*pairs("a", 3), {"prompt": "p", "chosen": "X", "rejected": "x" * 7}, {"prompt": "q", "chosen": "Y",
                                                                                                         "rejected": "y" * 6}])
    with caplog.at_level("WARNING", logger="absl"):
        data = pipeline.build(config_of(spec), BYTES, "train")
    assert data.num_rows == 8 and "of 5 pairs 1 were left out" in caplog.text


def test_prompts_may_be_messages(tmp_path, monkeypatch):
    said = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    spec = write(tmp_path / "a.jsonl", [{"prompt": said, "chosen": "A", "rejected": "b"}, {"prompt": "1", "chosen": "C", "rejected": "d"}])
    [source] = sources.load(config_of(spec).data)
    talk, plain = source.train
    assert [m["content"] for m in talk.messages] == ["1", "2", "3", "A"] and [m["content"] for m in talk.worse.messages] == ["1", "2", "3", "b"]
    assert (talk.text, talk.rejected, talk.worse.text, talk.worse.rejected) == ("A", "b", "b", None) and not plain.messages
    with pytest.raises(ConfigError, match=r"set data\.chat_template"):
        pipeline.build(config_of(spec), BYTES, "train")

    def conversation(template, messages, tokenizer):  # each message one letter, an answer two
        ids, answers = [], []
        for i, message in enumerate(messages):
            ids += tokenizer.encode(message["content"] + "|" * (message["role"] == "assistant"))
            answers += [(i + 1) // 2 * (message["role"] == "assistant")] * (len(ids) - len(answers))
        return ids, answers
    monkeypatch.setattr(supervised.chat, "conversation", conversation)
    rows = pipeline.build(config_of(spec, chat_template="llada_moe"), BYTES, "train").rows(range(4))
    assert texts(rows) == [("12|3", "A|"), ("12|3", "b|"), ("1", "C|"), ("1", "d|")]  # earlier answers are given


BAD = {
    '{"prompt": "a", "chosen": "b"}': "2 is no pair.*two different texts; fields: prompt, chosen",
    '{"prompt": "a", "chosen": "b", "rejected": "b"}': "2 is no pair", '{"prompt": "a", "chosen": "", "rejected": "b"}': "2 is no pair",
    '{"prompt": 3, "chosen": "a", "rejected": "b"}': "2 is no pair: prompt must be a text or messages",
    '{"chosen": "a", "rejected": "b"}': "2 is no pair",
    '{"prompt": [{"role": "assistant", "content": "q"}], "chosen": "a", "rejected": "b"}': "2: message 0 is of the assistant",
    '{"prompt": [], "chosen": "a", "rejected": "b"}': "2: message 0 is of the assistant", "no": "2: not JSON",
    '{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}': "2: holds a lone surrogate",
    '{"prompt": "a", "response": "b"}': "2 has no rejected answer: .* lines of prompt, chosen and rejected",
    '{"text": "b"}': "2 has no rejected answer",
}


@pytest.mark.parametrize("line", BAD)
def test_lines_that_are_no_pairs(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(json.dumps(pairs("a", 1)[0]) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=f"a.jsonl:{BAD[line]}") as error:
        pipeline.build(config_of(str(tmp_path / "a.jsonl")), BYTES, "train")
    assert "\n" not in str(error.value)


def test_other_sources_have_no_pairs(tmp_path):
    with pytest.raises(ConfigError, match=r"countdown\[0\] has no rejected answer"):
        pipeline.build(config_of("countdown", limit=9, sequence_length=23, tokenizer=""), BYTES, "train")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/card.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds prepared rows, no pairs"):
        pipeline.build(config_of(str(tmp_path / "shards")), BYTES, "train")


def test_wrong_lookups_name_another_pair_of_the_prompt():
    [source] = sources.load(config_lib.Data(sources="lookup", limit=300))
    assert sources.load(config_lib.Data(sources="lookup", limit=300)) == [source] and source.heldout
    for document in source.train + source.heldout:
        right, wrong, known = (re.findall("..", text) for text in (document.text, document.rejected, document.prompt.split("?")[0]))
        [at] = [i for i, (x, y) in enumerate(zip(right, wrong, strict=True)) if x != y]
        assert wrong[at] in known
