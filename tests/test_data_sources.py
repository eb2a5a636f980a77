"""Sources: what is read, in which order, and how it is split."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llada_jax.config import ConfigError, Data
from llada_jax.data import sources, sudoku

ROOT = pathlib.Path(__file__).resolve().parent.parent


def load(spec, **settings):
    return sources.load(Data(sources=str(spec), **settings))


def texts(documents):
    return [document.text for document in documents]


@pytest.mark.parametrize(("spec", "expected"), [
    ("pystdlib", [("pystdlib", None)]),
    ("pystdlib:0.7, notes/*.jsonl:0.3", [("pystdlib", 0.7), ("notes/*.jsonl", 0.3)]),
    ("gs://bucket/a.txt,tfds/name:train", [("gs://bucket/a.txt", None), ("tfds/name:train", None)]),
    ("tfds/name/1.0.0:test[:10%]:2,a:b.txt:1e-1", [("tfds/name/1.0.0:test[:10%]", 2.0), ("a:b.txt", 0.1)]),
])  # fmt: skip
def test_parse(spec, expected):
    assert sources.parse(spec) == expected


@pytest.mark.parametrize(("spec", "reason"), [("", "empty"), ("a.txt:0.5,b.txt", "b.txt has none"), ("a.txt:0", "positive"), ("a:nan", "positive")])
def test_parse_refuses(spec, reason):
    with pytest.raises(ConfigError, match=reason):
        sources.parse(spec)


def test_standard_library():
    [source] = load("pystdlib", holdout=0.1)
    names = [document.name for document in source.train + source.heldout]
    assert {"os.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "turtledemo", "ensurepip", "__pycache__"}
    assert [d.name for d in source.train] == sorted(d.name for d in source.train)
    assert len(set(texts(source.train + source.heldout))) == len(names)
    assert 0.05 < len(source.heldout) / len(names) < 0.15
    modules, packages = ([d.name for d in part.train + part.heldout] for part in load("pystdlib/*.py:0.7,pystdlib/*/**/*.py:0.3"))
    assert sorted(modules + packages) == sorted(names) and not any("/" in name for name in modules) and all("/" in name for name in packages)


def test_split_depends_on_the_name_alone(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}")
    [before] = load(tmp_path / "*.txt", holdout=0.3)
    (tmp_path / "00.txt").write_text("another text")
    (tmp_path / "99.txt").write_text("one more")
    moved = tmp_path.with_name("elsewhere")
    tmp_path.rename(moved)
    [after] = load(moved / "*.txt", holdout=0.3)
    heldout = {document.key for document in before.heldout}
    assert 4 < len(heldout) < 22
    assert heldout == {document.key for document in after.heldout} - {"99.txt"}


@pytest.mark.parametrize("holdout", [1e-9, 1 - 1e-9])
def test_neither_side_is_empty(tmp_path, holdout):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    [source] = load(tmp_path / "*.txt", holdout=holdout)
    assert sorted([len(source.train), len(source.heldout)]) == [1, 4]


def test_a_single_document_is_split_inside(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    [source] = load(tmp_path / "a.txt", holdout=0.1)
    assert texts(source.train)[0] + texts(source.heldout)[0] == text
    assert 80 <= texts(source.train)[0].count("\n") <= 90 and texts(source.train)[0].endswith("\n")
    [source] = load(tmp_path / "a.txt", holdout=0.0)
    assert texts(source.train) == [text] and not source.heldout


def test_repeats_are_dropped_over_all_sources(tmp_path):
    (tmp_path / "a.txt").write_text("same\n")
    (tmp_path / "b.txt").write_text("same\n")
    (tmp_path / "c.jsonl").write_text('{"text": "same\\n"}\n{"text": "other"}\n{"text": "  "}\n')
    first, second = load(f"{tmp_path}/*.txt,{tmp_path}/c.jsonl", holdout=0.0)
    assert [document.name for document in first.train] == [f"{tmp_path}/a.txt"] and texts(second.train) == ["other"]


def test_line_ends_and_unicode_stay(tmp_path):
    text = "a\r\nb\rc\n\ufeff\u2028é"
    (tmp_path / "a.md").write_bytes(text.encode())
    [source] = load(tmp_path / "a.md", holdout=0.0)
    assert texts(source.train) == [text]


def test_globs_are_ordered_and_recursive(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    [source] = load(tmp_path / "**/*.txt", holdout=0.0)
    assert [document.key for document in source.train] == ["a/1.txt", "b/2.txt", "c.txt"]
    assert len(load(tmp_path / "**/*.txt", holdout=0.0, limit=2)[0].train) == 2


def test_records(tmp_path):
    records = [{"body": "plain"}, {"prompt": "2+2", "response": "4"}, {"body": "both", "prompt": "p", "response": "r"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    [source] = load(tmp_path / "a.jsonl", text_field="body", holdout=0.0)
    assert [(d.prompt, d.text) for d in source.train] == [(None, "plain"), ("2+2", "4"), (None, "both")]
    assert source.train[1].name == f"{tmp_path}/a.jsonl:3"


def test_conversations(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    records = [{"messages": talk}, {"messages": talk, "source": "again"}, {"messages": [{"role": "system", "content": "s"}, *talk], "prompt": "p"},
               {"text": "plain", "messages": talk}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    [source] = load(tmp_path / "a.jsonl", holdout=0.0)
    assert [len(d.messages) for d in source.train] == [2, 3, 0] and [d.answers for d in source.train] == [True, True, False]
    assert list(source.train[0].messages) == talk and source.train[0].prompt is None
    (tmp_path / "one.jsonl").write_text(json.dumps(records[0]))
    with pytest.raises(ConfigError, match="cannot be split"):
        load(tmp_path / "one.jsonl", holdout=0.5)


def messages(*turns):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


@pytest.mark.parametrize(("line", "reason"), [
    (messages(("user", "x")), "no message is of the role assistant"), (messages(("assistant", "x")), "message 0 is of the assistant, but does not"),
    (messages(("user", "x"), ("assistant", " ")), "message 1 of the assistant is empty"), (messages(("robot", "x")), "role 'robot'"),
    (messages(("user", "x"), ("system", "y")), "system, which only the first"), ('{"messages": ["x"]}', "message 0 is not an object"),
    (messages(("user", "\ud800"), ("assistant", "x")), "surrogate"), ('{"messages": "x"}', "must be a list"), ('{"messages": []}', "assistant"),
    (messages(("user", ["x"])), "no content that is text"),
    ("{", "not JSON"), ("[1]", "expected an object"), ('{"body": "x"}', "fields: body"), ('{"text": 3}', "no text in the field 'text'"),
    ('{"prompt": "x"}', "fields: prompt"), ('{"text": "\\ud800"}', "surrogate"),
])  # fmt: skip
def test_bad_records_are_named(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=rf"a\.jsonl:2: .*{reason}"):
        load(tmp_path / "a.jsonl")


def test_refusals(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for spec, reason in ((tmp_path / "*.none", "no file matches"), (tmp_path / "no" / "a.txt", "no file matches"), (tmp_path, r"\*\.txt"),
                         (tmp_path / "empty.txt", "empty.txt holds no text"), (tmp_path / "latin.txt", "latin.txt is not UTF-8"),
                         (tmp_path / "train-0.array_record", "card.json")):
        with pytest.raises(ConfigError, match=reason):
            load(spec)


def test_tfds_without_tensorflow(tmp_path):
    program = """
import sys
from llada_jax.config import ConfigError, Data
from llada_jax.data import sources
from tests.tiny_text import TinyText
TinyText(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
[source] = sources.load(Data(sources="tfds/tiny_text", holdout=0.0))
assert sorted(d.text for d in source.train) == ["one text", "three", "two\\ntexts"], source
[source] = sources.load(Data(sources="tfds/tiny_text:test", holdout=0.0))
assert [d.text for d in source.train] == ["four"], source
for spec, field, reason in (("tfds/none", "text", "none"), ("tfds/tiny_text:none", "text", "none"), ("tfds/tiny_text", "size", "size")):
    try:
        sources.load(Data(sources=spec, text_field=field))
        raise AssertionError(spec)
    except ConfigError as error:
        assert reason in str(error), error
assert "tensorflow" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=os.environ | {"TFDS_DATA_DIR": str(tmp_path)},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def valid(grid):
    square = np.asarray(grid).reshape(4, 4)
    boxes = square.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
    return all(sorted(unit) == [1, 2, 3, 4] for unit in (*square.tolist(), *square.T.tolist(), *boxes.tolist()))


def test_sudoku_grids_are_split_without_overlap():
    train, heldout = (set(map(tuple, sudoku.split_grids(split).tolist())) for split in ("train", "heldout"))
    assert (len(train), len(heldout), len(train | heldout)) == (224, 64, 288)
    assert all(map(valid, train | heldout))
    [source] = load("sudoku")
    assert {tuple(map(int, text)) for text in texts(source.train)} == train
    assert {tuple(map(int, text)) for text in texts(source.heldout)} == heldout


def test_sudoku_puzzles_have_one_solution():
    puzzles, solutions = sudoku.puzzles(300, 6, seed=1)
    assert puzzles.shape == solutions.shape == (300, 16) and ((puzzles > 0).sum(1) == 6).all()
    heldout = set(map(tuple, sudoku.split_grids("heldout").tolist()))
    for puzzle, solution in zip(puzzles, solutions, strict=True):
        fitting = [grid for grid in sudoku.grids() if (grid[puzzle > 0] == puzzle[puzzle > 0]).all()]
        assert [tuple(grid) for grid in fitting] == [tuple(solution)] and tuple(solution) in heldout
    again, _ = sudoku.puzzles(300, 6, seed=1)
    other, _ = sudoku.puzzles(300, 6, seed=2)
    assert (again == puzzles).all() and (other != puzzles).any()
    with pytest.raises(ConfigError, match="3 givens"):
        sudoku.puzzles(1, 3, seed=0)
