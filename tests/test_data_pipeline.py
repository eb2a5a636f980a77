"""Batches are a function of (seed, step): any order, any number of hosts, processes or calls."""

import collections
import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.config import ConfigError
from llada_jax.data import baselines, pipeline, sources

ROOT = pathlib.Path(__file__).resolve().parent.parent


def make_config(**data):
    return config_lib.from_config_dict({"data": {"sequence_length": 8, "tokenizer": "bytes", "holdout": 0.0} | data})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two text sources; every row of 8 bytes, end-of-text included, is another word and begins with its file's letter."""
    path = tmp_path_factory.mktemp("corpus")
    for name, count in (("a", 51), ("b", 22)):
        (path / f"{name}.txt").write_text("".join(f"{name}{i:07}" for i in range(count))[:-1])
    return path


@pytest.fixture(scope="module")
def config(folder):
    return make_config(sources=f"{folder}/a.txt:0.75,{folder}/b.txt:0.25")


@pytest.fixture(scope="module")
def dataset(config):
    return pipeline.build(config, tokenizer_lib.Bytes(), "train")


def words(batch):
    return ["".join(chr(t) if t < 256 else "." for t in row) for row in batch["tokens"].reshape(-1, 8)]


def test_every_row_once_an_epoch(folder):
    dataset = pipeline.build(make_config(sources=f"{folder}/a.txt"), tokenizer_lib.Bytes(), "train")
    assert dataset.num_rows == 51
    drawn = [words(dataset.batch(3, step, 1))[0] for step in range(153)]
    epochs = [drawn[i:i + 51] for i in (0, 51, 102)]
    assert all(len(set(epoch)) == 51 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_large_sources_are_shuffled_each_epoch(monkeypatch, folder):
    monkeypatch.setattr(pipeline, "_SMALL", 0)
    pipeline._draws.cache_clear()
    test_every_row_once_an_epoch(folder)
    pipeline._draws.cache_clear()


def test_any_number_of_hosts_sees_the_same_batch(dataset):
    whole = dataset.batch(7, 5, 12)
    for hosts in (2, 3, 12):
        parts = [dataset.batch(7, 5, 12, host, hosts) for host in range(hosts)]
        for key in whole:
            assert (np.concatenate([part[key] for part in parts]) == whole[key]).all(), key
    assert whole["index"].tolist() == list(range(60, 72)) and whole["index"].dtype == np.uint32
    with pytest.raises(ConfigError, match="use 15"):
        dataset.batch(7, 5, 12, 0, 5)


def test_samples_do_not_depend_on_the_batch_size(dataset):
    assert words(dataset.batch(7, 1, 12)) == words(dataset.batch(7, 3, 4)) + words(dataset.batch(7, 4, 4)) + words(dataset.batch(7, 5, 4))


def test_seeds_give_other_orders(dataset):
    assert words(dataset.batch(0, 0, 16)) != words(dataset.batch(1, 0, 16))
    assert words(dataset.batch(0, 0, 16)) == words(dataset.batch(0, 0, 16))


def test_weights_hold_in_every_stretch(dataset):
    from_b = np.array([word.startswith("b") for word in words(dataset.batch(0, 0, 400))])
    assert from_b.sum() == 100
    assert all(abs(from_b[i:i + 40].sum() - 10) <= 1 for i in range(0, 400, 40))


def test_without_weights_rows_decide(folder):
    dataset = pipeline.build(make_config(sources=f"{folder}/a.txt,{folder}/b.txt"), tokenizer_lib.Bytes(), "train")
    drawn = collections.Counter(word.startswith("b") for word in words(dataset.batch(0, 0, 730)))
    assert drawn[True] == pytest.approx(730 * 22 / 73, abs=15)


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetched_calls_equal_batches(dataset, config, workers):
    dataset = pipeline.build(dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=workers)), tokenizer_lib.Bytes(), "train")
    plan = [range(4, 7), range(7, 9), range(9, 10)]
    calls = list(dataset.batches(3, plan, 6, process_index=1, process_count=2))
    for steps, call in zip(plan, calls, strict=True):
        assert len(call["tokens"]) == 3  # one shape: a short call repeats its last batch
        for i in range(3):
            expected = dataset.batch(3, steps[min(i, len(steps) - 1)], 6, 1, 2)
            assert call.keys() == expected.keys()
            assert all((call[key][i] == array).all() and call[key].dtype == array.dtype for key, array in expected.items())
    assert list(dataset.batches(3, [], 6)) == []


def test_workers_without_parsed_flags(folder):
    program = f"""
from absl import flags
from llada_jax import config, tokenizer
from llada_jax.data import pipeline
made = config.from_config_dict({{"data": dict(sources="{folder}/a.txt", sequence_length=8, tokenizer="bytes", holdout=0.0, num_workers=1)}})
assert not flags.FLAGS.is_parsed()
for call in pipeline.build(made, tokenizer.Bytes(), "train").batches(0, [range(1), range(1, 2)], 4):
    print(call["index"].tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["[[0, 1, 2, 3]]", "[[4, 5, 6, 7]]"], result.stderr


def test_held_out_rows_come_once_in_a_fixed_shuffled_order(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i:07}\n" for i in range(100)))
    config = make_config(sources=f"{tmp_path}/a.txt", holdout=0.25)
    heldout = pipeline.build(config, tokenizer_lib.Bytes(), "heldout")
    assert heldout.num_rows == 26
    batches = [heldout.batch(seed, step, 10) for seed, step in ((0, 0), (5, 1), (9, 2))]
    kept = np.concatenate([batch["segment"] for batch in batches]).any(axis=1)
    assert kept.tolist() == [True] * 26 + [False] * 4
    assert sum(batch["bytes"].sum() for batch in batches) == 25 * 8
    found = [word for batch in batches for word in words(batch)][:26]
    assert sorted(found) == sorted([f"{i:07}\n" for i in range(75, 100)] + ["." * 8]) and found != sorted(found)
    assert found == words(heldout.rows(range(26)))
    assert not batches[2]["maskable"][6:].any()
    assert tokenizer_lib.Bytes().decode(heldout.stream()) == "".join(f"{i:07}\n" for i in range(75, 100))
    some = heldout.rows(range(9))
    assert sorted(heldout.stream(9)) == sorted(some["tokens"][some["segment"] > 0])
    with pytest.raises(IndexError):
        heldout.batch(0, 3, 10)
    assert pipeline.build(make_config(sources=f"{tmp_path}/a.txt"), tokenizer_lib.Bytes(), "heldout").num_rows == 0


def test_sudoku_rows_are_grids():
    config = make_config(sources="sudoku", sequence_length=16, tokenizer="")
    tokenizer = pipeline.build_tokenizer(config)
    train, heldout = (pipeline.build(config, tokenizer, split) for split in ("train", "heldout"))
    assert (train.num_rows, heldout.num_rows) == (224, 64)
    batch = train.batch(0, 0, 224)
    assert batch["maskable"].all() and (np.sort(batch["tokens"].reshape(-1, 4, 4), -1) == [1, 2, 3, 4]).all()
    for other in (make_config(sources="sudoku"), make_config(sources="sudoku,pystdlib", sequence_length=16)):
        with pytest.raises(ConfigError, match="sudoku rows are 16 tokens"):
            pipeline.build(other, tokenizer_lib.Bytes(), "train")


def test_prompts_and_responses(tmp_path, caplog):
    records = [{"prompt": f"{i}+{i}=", "response": f"{2 * i}"} for i in range(9)] + [{"prompt": "a long prompt", "response": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = make_config(sources=f"{tmp_path}/a.jsonl", pack=False)
    with caplog.at_level("WARNING", logger="absl"):
        dataset = pipeline.build(config, tokenizer_lib.Bytes(), "train")
    assert dataset.num_rows == 9 and "1 left out" in caplog.text
    batch = dataset.batch(0, 0, 9)
    assert not batch["maskable"][:, :4].any() and batch["maskable"][:, 4:].all() and batch["segment"].all()
    with pytest.raises(ConfigError, match="pack=False"):
        pipeline.build(make_config(sources=f"{tmp_path}/a.jsonl"), tokenizer_lib.Bytes(), "train")


def test_tokenizer_of_a_run(tmp_path, folder):
    config = make_config(sources=f"{folder}/a.txt", tokenizer="", vocab_size=290)
    trained = pipeline.build_tokenizer(config)
    trained.save(tmp_path)
    kept = pipeline.build_tokenizer(make_config(sources="pystdlib", tokenizer=""), tmp_path)
    assert kept.fingerprint == trained.fingerprint and trained.vocab_size == 290


def test_tokenizer_is_trained_without_held_out_text(tmp_path):
    (tmp_path / "a.txt").write_text("wombat " * 200 + "\n" + "quokka " * 50)
    config = make_config(sources=f"{tmp_path}/a.txt", tokenizer="", vocab_size=285, holdout=0.15)
    assert [d.text.strip()[:6] for d in sources.load(config.data)[0].heldout] == ["quokka"]
    tokenizer = pipeline.build_tokenizer(config)
    assert len(tokenizer.encode("wombat")) < 4 and len(tokenizer.encode("quokka")) == 6


def test_baselines_against_closed_forms():
    tokenizer = tokenizer_lib.Bytes()
    stream = lambda *texts: np.concatenate([[*tokenizer.encode(text), tokenizer.eos_id] for text in texts])
    found = baselines.measure(stream("ab" * 500), stream("ab" * 50), tokenizer)
    # 501 a's … in 1001 ids and one more for each of 258: a and b cost log2(1259 / 501) bits, end-of-text log2(1259 / 2)
    assert found["unigram"] == pytest.approx((100 * np.log2(1259 / 501) + np.log2(1259 / 2)) / 100)
    assert found["bigram"] < 0.25 and found["gzip"] < 3
    shuffled = "".join(np.random.RandomState(0).choice(list("abcd"), 4000))
    noise = baselines.measure(stream(shuffled[:3000]), stream(shuffled[3000:]), tokenizer)
    assert all(2 <= bits < 3.2 for bits in noise.values()), noise  # nobody beats the entropy
