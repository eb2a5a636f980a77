"""Tasks with exact answers: what is drawn and held out, how it is scored, and `evaluate --tasks` on an untrained model."""

import json
import re

import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import tokenizer
from llada_jax.config import ConfigError
from llada_jax.data import pipeline, puzzles, sources
from llada_jax.evaluation import scoring, tasks
from llada_jax.model import transformer
from llada_jax.sampling import cache, decoders, presets
from llada_jax.training import checkpoint, optimizer, state
from tests import tiny_run

DRAWN = ("recall", "addition", "countdown")
PARTS = {  # what a row is made of, and must not stand on both sides
    "recall": lambda prompt: {frozenset(re.findall("..", prompt.split("?")[0]))},
    "addition": lambda prompt: {frozenset(pair) for pair in zip(*(part.split(",") for part in prompt[:-1].split("+")), strict=True)},
    "countdown": lambda prompt: {prompt.split("=")[0]},
}


@pytest.mark.parametrize("name", DRAWN)
def test_rows_are_right_and_share_nothing_with_those_held_out(name):
    [source] = sources.load(config_lib.Data(sources=name, limit=1000))
    puzzle, task = puzzles.PUZZLES[name], tasks.TASKS[name]
    instances = task.instances(200, tasks.SEED)
    assert task.instances(3, tasks.SEED) == instances[:3] != task.instances(3, 8)
    for item in [*instances, *(tasks.Item([d.prompt, len(d.text)], d.text) for d in source.train + source.heldout)]:
        prompt, gap = item.pieces
        assert len(prompt) + gap == puzzle.length and gap == len(item.answer) and set(prompt + item.answer) <= set(puzzle.alphabet)
        assert task.exact(item, item.answer) and not task.exact(item, item.answer[:-1]) and not task.exact(item, "")
    train, heldout = (set().union(*(PARTS[name](d.prompt) for d in documents)) for documents in (source.train, source.heldout))
    drawn = set().union(*(PARTS[name](item.pieces[0]) for item in instances))
    assert len(source.heldout) == 16 and len(train) > 100 and not train & (heldout | drawn)

    config = config_lib.from_config_dict({"data": {"sources": name, "sequence_length": puzzle.length, "limit": 100}})
    data = pipeline.build(config, pipeline.build_tokenizer(config), "train")
    rows = data.rows(range(5))
    assert (rows["segment"] == 1).all() and (rows["maskable"].sum(1) == len(source.train[0].text)).all() and rows["maskable"][:, -1].all()
    with pytest.raises(ConfigError, match=f"{name} rows are {puzzle.length} tokens"):
        pipeline.build(config, tokenizer.Bytes(), "train")


def test_lookups_have_many_lengths_and_their_answers_must_end():
    [source] = sources.load(config_lib.Data(sources="lookup", limit=1000))
    items = tasks.TASKS["lookup"].instances(200, 1)
    assert {item.length for item in items} == {17} and {len(item.answer) for item in items} == set(range(2, 17, 2))
    assert {item.pieces[0].index("?") for item in items} == {8, 10, 12, 14, 16}
    tables = lambda prompts: {frozenset(re.findall("..", prompt.split("?")[0])) for prompt in prompts}
    assert not tables(d.prompt for d in source.train) & tables([*(d.prompt for d in source.heldout), *(item.pieces[0] for item in items)])
    config = config_lib.from_config_dict({"data": {"sources": "lookup", "sequence_length": 64, "limit": 100, "answer_padding": "block:8"}})
    data = pipeline.build(config, pipeline.build_tokenizer(config), "train")
    rows = data.rows(range(data.num_rows))
    assert data.num_rows < 80 and (rows["segment"].max(1) > 1).any() and (rows["position"][:, ::8] % 8 == 0)[rows["segment"][:, ::8] > 0].all()


def test_answers_follow_from_prompts():
    """By other means than those that drew them."""
    for item in [item for name in ("recall", "lookup") for item in tasks.TASKS[name].instances(50, 1)]:
        table, asked = re.fullmatch(r"((?:[A-L][a-z0-9])+)\?((?:[A-L]\.)+)=", item.pieces[0]).groups()
        values = dict(re.findall("(.)(.)", table))
        assert len(values) == len(table) // 2 and item.answer == "".join(key + values[key] for key in asked[::2])
    for item in tasks.TASKS["addition"].instances(50, 1):
        a, b = (part.split(",") for part in item.pieces[0][:-1].split("+"))
        assert [int(x) + int(y) for x, y in zip(a, b, strict=True)] == [int(z) for z in item.answer.split(",")]
    for item in tasks.TASKS["countdown"].instances(50, 1):
        plain = item.answer.replace("(0", "(").lstrip("0")
        for operator in "+-*/":
            plain = plain.replace(f"{operator}0", operator)
        assert eval(plain) == int(item.pieces[0][-4:-1])


@pytest.mark.parametrize("text, right", [
    ("(12-7)*3", True), ("3*(12-7)", True), ("03*(012-7)", True), ("12*3-7*3", False), ("(12-7)*4", False), ("15", False), ("12+3", False),
    ("(12-7)*3+", False), ("((12-7)*3", False), ("(12-7)3", False), ("12-7*3", False), ("3/0*12-7", False), ("", False), ("(" * 5000, False),
    ("-(7-12)*3", False), ("(12-7)*3 ", False), ("(12-٧)*3", False), ("7**12*3", False)])
def test_any_correct_expression_counts_and_nothing_else(text, right):
    assert puzzles.solves("03,07,12=015:", text) == right


def test_division_is_exact():
    assert puzzles.solves("03,08,09=024:", "8/3*9") and puzzles.value("1/3+1/6") == puzzles.Fraction(1, 2)


def test_several_decoders_share_settings_and_have_their_own():
    flags = presets.Flags("low_confidence, random:steps=9:block_length=5,threshold:cache=dual:cache.warmup=2",
                          {"temperature": "0.5", "threshold": "0.8"}, None, {"refresh_every": "3"})
    assert scoring.decoders(flags, "random", 12) == {
        "low_confidence": (decoders.LowConfidence(12, 12, temperature=0.5), cache.NoCache()),
        "random:steps=9:block_length=5": (decoders.Random(15, 5, 9, temperature=0.5), cache.NoCache()),
        "threshold:cache=dual:cache.warmup=2": (decoders.Threshold(12, 12, threshold=0.8, temperature=0.5), cache.Dual(warmup=2, refresh_every=3))}
    assert [*scoring.decoders(presets.Flags(), "random", 12)] == ["random"]
    for names, settings, words in (("low_confidence", {"threshold": "0.8"}, "none of low_confidence has a setting 'threshold'"),
                                   ("low_confidence:threshold=1", {}, "low_confidence has no setting 'threshold'"), (" ,", {}, "--decoder is empty"),
                                   ("random:9", {}, "random:field=value"), ("low,random", {}, "unknown decoder 'low'")):
        with pytest.raises(ConfigError, match=words):
            scoring.decoders(presets.Flags(names, settings), "random", 12)


def test_differences_are_paired():
    line = lambda exact, forwards: {"exact": exact, "forwards": {"full": forwards, "guidance": forwards}, "tokens": 8, "seconds": 0.5}
    found = scoring.summary({"a": [line(True, 4), line(True, 4), line(False, 4)], "b": [line(True, 1), line(False, 2), line(False, 3)]})
    assert found["a"]["exact"] == 2 / 3 and found["a"]["difference"] == found["a"]["difference_se"] == 0
    assert np.isclose(found["b"]["difference"], -1 / 3) and np.isclose(found["b"]["difference_se"], 1 / 3)  # of 0, -1, 0
    assert np.isclose(found["b"]["exact_se"], 1 / 3)  # of 1, 0, 0
    assert (found["b"]["forwards"], found["b"]["tokens_per_forward"], found["b"]["tokens_per_second"]) == (4, 2, 16)
    assert "66.67% ± 33.33%" in scoring.describe({"recall": found}) and "-33.33% ± 33.33%" in scoring.describe({"recall": found})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    characters = tokenizer.Characters(puzzles.PUZZLES["countdown"].alphabet)
    model = config_lib.Model(vocab_size=characters.vocab_size, hidden_size=16, num_layers=1, num_heads=2, num_experts=2, experts_per_token=1,
                             expert_size=8, max_length=40, init_std=0.2)
    config = config_lib.Config(model, data=config_lib.Data("countdown", 23), train=config_lib.Train(batch_size=4))
    characters.save(folder)
    saver = checkpoint.Checkpointer(str(folder), 1, 0)
    saver.save(state.create(transformer.build(model), optimizer.make(config.optimizer, 1, transformer.build(model).shapes["params"]), config), config)
    saver.wait()
    saver.close()
    return folder


def test_evaluate_goes_on_where_it_stopped(run_folder, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    ask = [f"--workdir={run_folder}", "--tasks=countdown", "--limit=9", "--decoder=low_confidence,random:steps=2", "--decoder.temperature=1"]
    first, exists = tiny_run.each("evaluate", [[*ask, f"--out={out}"]] * 2)
    assert first.returncode == 0, first.stderr
    *text, last = first.stdout.splitlines()
    found, lines = json.loads(last)["tasks"]["countdown"], [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["task"], line["decoder"], line["id"]) for line in lines] == [
        ("countdown", label, i) for label in ("low_confidence", "random:steps=2") for i in range(9)]
    prompts = tasks.TASKS["countdown"].instances(9, tasks.SEED)
    assert all(line["exact"] == tasks.TASKS["countdown"].exact(prompts[line["id"]], line["text"]) for line in lines)
    assert {line["forwards"]["full"] for line in lines if line["decoder"] != "low_confidence"} <= {1, 2}
    assert found["random:steps=2"]["items"] == 9 and found["random:steps=2"]["forwards"] <= 2 < found["low_confidence"]["forwards"]
    assert any(line.startswith("random:steps=2") and f"{found['random:steps=2']['tokens_per_forward']:.2f}" in line for line in text)

    half = out.read_text()[: -len(json.dumps(lines[-1])) // 2]
    out.write_text(half)
    (tmp_path / "other.jsonl").write_text("notes")
    spared = tmp_path / "spared.jsonl"
    resumed, seed, none, needs, other, letters, unknown, without, changed = tiny_run.each("evaluate", [
        [*ask, f"--out={out}", "--resume"], [*ask, f"--out={out}", "--resume", "--seed=3"], [*ask, "--resume"], [*ask[:1], f"--out={out}"],
        [*ask, f"--out={tmp_path / 'other.jsonl'}", "--resume"], [*ask, "--tasks=recall"], [*ask, "--tasks=countdow"],
        [*ask, "--decoder=random:steps=2", f"--out={spared}", "--suppress=(,),eos"], [*ask, f"--out={spared}", "--suppress=(", "--resume"]])
    assert resumed.returncode == 0 and "random:steps=2: 1 of 9 items" in resumed.stdout, (resumed.stdout, resumed.stderr)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in lines]
    for done, words in ((exists, ["exists", "--resume"]), (seed, ["other settings", "seed=7, now 3"]), (none, ["--resume needs --out"]),
                        (needs, ["--out needs --tasks"]), (other, ["line 1 is no result"]), (letters, ["the task recall", "knows only the letters"]),
                        (unknown, ["no task 'countdow'", "did you mean 'countdown'"]),
                        (changed, ["other settings", "suppress=["])):
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert (tmp_path / "other.jsonl").read_text() == "notes"
    assert without.returncode == 0, without.stderr
    kept, never = [json.loads(line) for line in spared.read_text().splitlines()], json.loads(without.stdout.splitlines()[-1])["suppress"]
    assert len(kept) == 9 and not any(set(line["text"]) & set("()") or line["settings"]["suppress"] != never for line in kept)
    assert any(set(line["text"]) & set("()") for line in lines) and len(never) == 3 and "never written: " in without.stdout


def test_lines_of_decoders_with_other_caches_are_gone_on_with(tmp_path):
    """A cache belongs to its decoder: another decoder's lines say nothing against it, its own do."""
    settings = lambda cache, seed=0: {"seed": seed, "decoder": {"steps": 4}, "cache": {"name": cache}}
    lines = scoring.Lines(str(tmp_path / "lines.jsonl"), resume=False)
    lines.add([dict(zip(scoring.FIELDS, ("sudoku", 0, "fast_dllm", True, "1", {}, 1, 0.1, settings("dual")), strict=True))])
    lines.check("sudoku", "low_confidence", settings("none"))
    lines.check("sudoku", "fast_dllm", settings("dual"))
    for other in (("fast_dllm", settings("none")), ("low_confidence", settings("none", seed=1))):
        with pytest.raises(ConfigError, match="with other settings"):
            lines.check("sudoku", *other)
