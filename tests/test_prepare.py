"""Prepared shards hold the same rows as the sources, with their own card, or are not written at all."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import prepare as prepare_lib
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.config import ConfigError, Data
from llada_jax.data import pipeline

ROOT = pathlib.Path(__file__).resolve().parent.parent
LENGTH = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (path / f"{i}.txt").write_text(f"text number {i}, " * (i + 1))
    return path


@pytest.fixture(scope="module")
def prepared(corpus):
    out = corpus / "out"
    data = Data(sources=f"{corpus}/*.txt", tokenizer="bytes", sequence_length=LENGTH, holdout=0.2)
    return out, prepare_lib.prepare(data, out, shard_rows=100)


def make_config(**data):
    return config_lib.from_config_dict({"data": {"sequence_length": LENGTH, "holdout": 0.2} | data})


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("workers", [0, 1])
def test_shards_give_the_batches_of_the_sources(corpus, prepared, split, workers):
    out, card = prepared
    direct = make_config(sources=f"{corpus}/*.txt", tokenizer="bytes")
    shards = make_config(sources=str(out), num_workers=workers)
    tokenizer = pipeline.build_tokenizer(shards)
    a, b = pipeline.build(direct, tokenizer, split), pipeline.build(shards, tokenizer, split)
    assert a.num_rows == b.num_rows == card["splits"][split]["rows"]
    every = np.arange(a.num_rows)[::-1]
    assert all((a.rows(every)[key] == b.rows(every)[key]).all() for key in ("tokens", "segment", "position", "maskable", "bytes"))
    [x], [y] = (list(dataset.batches(5, [range(1)], 8)) for dataset in (a, b))
    assert all((x[key] == y[key]).all() for key in x)


def test_card_counts_the_corpus(corpus, prepared):
    out, card = prepared
    assert json.loads((out / "card.json").read_text()) == card
    train, heldout = card["splits"]["train"], card["splits"]["heldout"]
    size = sum(path.stat().st_size for path in corpus.glob("*.txt"))
    assert train["documents"] + heldout["documents"] == 30 and heldout["documents"] > 0
    assert train["bytes"] + heldout["bytes"] == size and train["tokens"] + heldout["tokens"] == size + 30
    assert len(list(out.glob("train-*"))) == -(-train["rows"] // 100) > 1
    assert card["tokenizer"] == tokenizer_lib.load(out).fingerprint


def test_the_hash_follows_the_content(corpus, prepared, tmp_path):
    settings = {"tokenizer": "bytes", "sequence_length": LENGTH, "holdout": 0.2}
    again = prepare_lib.prepare(Data(sources=f"{corpus}/*.txt", **settings), tmp_path / "same", shard_rows=7)
    less = prepare_lib.prepare(Data(sources=f"{corpus}/1*.txt", **settings), tmp_path / "less")
    assert again["sha256"] == prepared[1]["sha256"] != less["sha256"]


def test_what_does_not_fit_is_refused(corpus, prepared, tmp_path):
    out, _ = prepared
    with pytest.raises(ConfigError, match="was written with the tokenizer"):
        pipeline.build(make_config(sources=str(out)), tokenizer_lib.Characters("abc"), "train")
    with pytest.raises(ConfigError, match="holds rows of 16 tokens"):
        pipeline.build_tokenizer(make_config(sources=str(out), sequence_length=32))
    with pytest.raises(ConfigError, match="not an empty folder"):
        prepare_lib.prepare(Data(sources=f"{corpus}/*.txt"), out)
    with pytest.raises(ConfigError, match="prepared already"):
        prepare_lib.prepare(Data(sources=str(out)), tmp_path / "x")
    with pytest.raises(ConfigError, match="has a weight"):
        prepare_lib.prepare(Data(sources=f"{corpus}/*.txt:1"), tmp_path / "x")


def test_damage_is_seen(prepared, tmp_path):
    out, _ = prepared
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = make_config(sources=f"{tmp_path}/train-*.array_record")
    tokenizer = pipeline.build_tokenizer(config)
    sorted(tmp_path.glob("train-*"))[0].unlink()
    with pytest.raises(ConfigError, match=r"its card\.json says"):
        pipeline.build(config, tokenizer, "train")
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"card\.json is damaged"):
        pipeline.build(config, tokenizer, "train")


def test_nothing_is_left_after_an_error(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_lib.pack, "to_records", full)
    with pytest.raises(OSError, match="No space"):
        prepare_lib.prepare(Data(sources=f"{corpus}/*.txt", tokenizer="bytes"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command(corpus, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "llada_jax.prepare", *arguments], cwd=ROOT, capture_output=True, text=True)

    out = tmp_path / "out"
    done = run(f"--input={corpus}/*.txt", "--tokenizer=train", "--vocab_size=300", f"--out={out}", f"--sequence_length={LENGTH}")
    assert done.returncode == 0 and done.stdout.startswith("train: "), done.stderr
    assert {"card.json", "tokenizer.model"} < {path.name for path in out.iterdir()}
    for arguments, reason in (([f"--input={corpus}/*.none", "--tokenizer=bytes", f"--out={tmp_path}/b"], "no file matches"),
                              ([f"--input={corpus}/*.txt", "--tokenizer=bytes", f"--out={out}"], "not an empty folder"),
                              (["--tokenizer=bytes"], "--input")):
        failed = run(*arguments)
        assert failed.returncode == 1 and failed.stdout == ""
        assert failed.stderr.startswith("error: ") and reason in failed.stderr and failed.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
