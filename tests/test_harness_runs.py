"""Whole runs of lm-evaluation-harness through the adapter, and the command line that starts them. They need the extra [eval]."""

import importlib.util
import json
import pathlib

import pytest

from llada_jax.config import ConfigError
from llada_jax.evaluation import harness
from llada_jax.model import transformer
from llada_jax.training import checkpoint, optimizer, state
from tests import tiny_run
from tests.test_harness import BYTES, CONFIG, StandIn, items_of, scorer

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = "tests/data/harness"
with_library = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=f"whole runs need the extra [eval]: {harness.INSTALL}")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Task files name their data relative to the repository; the library's caches stay in the test's folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def value(scores, task, metric):
    [line] = [line for line in scores if (line["task"], line["metric"]) == (task, metric)]
    return line["value"]


@with_library
def test_whole_run_is_scored_resumed_and_recorded(offline, tmp_path):
    out = tmp_path / "out"
    first = StandIn(knows=("France", "Italy", "Spain"))
    scores = harness.run(first.model, ["capitals_choice"], limit=2, out=str(out), folder=FOLDER, bootstrap_iters=10)
    assert value(scores, "capitals_choice", "acc") == 1.0 and len(first.asked) == 6
    second = StandIn(knows=("France", "Italy", "Spain"))
    scores = harness.run(second.model, ["capitals_choice", "capitals_write", "capitals_text"], out=str(out), folder=FOLDER, bootstrap_iters=10)
    # of the two countries that it does not know, it takes the shortest city: Rome or Oslo, and Lima, which is right
    assert value(scores, "capitals_choice", "acc") == pytest.approx(4 / 5) and value(scores, "capitals_write", "exact_match") == pytest.approx(3 / 5)
    assert value(scores, "capitals_text", "bits_per_byte") > 0
    assert len(second.asked) == 9 + 5 + 5 and not set(first.asked) & set(second.asked)
    assert json.loads((out / "scores.json").read_text()) == scores and len(items_of(out / "items.jsonl")) == 1 + 15 + 5 + 5
    for line in scores:
        assert line["items"] == 5 and line["num_fewshot"] == 0 and line["version"] == 1.0
        settings = line["settings"]
        assert settings["decoder"] == {"name": "low_confidence"} and settings["seed"] == 0 and settings["versions"].keys() >= {"lm_eval", "jax"}
        assert settings["limit"] is None and settings["prompts_cut"] == 0 and settings["task"]["task"] == line["task"]
    assert "capitals_write" in harness.describe(scores) and "exact_match (first_word)" in harness.describe(scores)
    other = StandIn(settings={"seed": 1, "decoder": {"name": "low_confidence"}})
    with pytest.raises(ConfigError, match="seed=0, now it is 1"):
        harness.run(other.model, ["capitals_choice"], out=str(out), folder=FOLDER)
    with pytest.raises(ConfigError, match="num_fewshot=None, now it is 1"):
        harness.run(second.model, ["capitals_choice"], num_fewshot=1, out=str(out), folder=FOLDER)


@with_library
def test_run_with_few_shots_a_template_and_a_model(offline):
    shots = StandIn()
    scores = harness.run(shots.model, ["capitals_choice"], num_fewshot=2, limit=3, folder=FOLDER, bootstrap_iters=10)
    assert {line["num_fewshot"] for line in scores} == {2}
    seen = []
    chat = StandIn(template="plain", render=lambda messages: seen.append(messages) or BYTES.encode(messages[-1]["content"]))
    scores = harness.run(chat.model, ["capitals_write"], chat=True, system="Be brief.", folder=FOLDER, bootstrap_iters=10)
    assert value(scores, "capitals_write", "exact_match") == 1.0 and scores[0]["settings"]["template"] == "plain"
    assert [message["role"] for message in seen[0]] == ["system", "user"] and seen[0][0]["content"] == "Be brief."
    real = StandIn(score=scorer(4), max_length=64)
    scores = harness.run(real.model, ["capitals_choice"], folder=FOLDER, bootstrap_iters=10)
    assert 0 <= value(scores, "capitals_choice", "acc") <= 1


@with_library
@pytest.mark.parametrize("arguments, words", [
    ({"tasks": ["capitals_chioce"]}, ["no task 'capitals_chioce'", "capitals_choice"]),
    ({"tasks": ["capitals_choice"], "chat": True}, ["chat template"]),
    ({"tasks": ["capitals_choice"], "system": "x"}, ["needs chat"]),
    ({"tasks": ["capitals_choice"], "folder": "tests/nowhere"}, ["tests/nowhere is no folder"]),
])  # fmt: skip
def test_runs_that_cannot_work(offline, arguments, words):
    with pytest.raises(ConfigError) as error:
        harness.run(StandIn().model, **{"folder": FOLDER} | arguments)
    assert all(word in str(error.value) for word in words), error.value


@with_library
def test_code_is_executed_only_where_that_is_allowed(offline, tmp_path):
    text = (ROOT / FOLDER / "capitals_write.yaml").read_text().replace("task: capitals_write", "task: capitals_code")
    (tmp_path / "code.yaml").write_text(text + "unsafe_code: true\n")
    run = lambda **named: harness.run(StandIn().model, ["capitals_code"], folder=str(tmp_path), bootstrap_iters=10, **named)
    with pytest.raises(ConfigError, match=r"capitals_code.*unsafe.*allow it with unsafe_code"):
        run()
    assert value(run(unsafe_code=True), "capitals_code", "exact_match") == 1.0


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the extra [eval] is installed")
def test_without_the_library_one_line_says_how_to_get_it():
    with pytest.raises(ConfigError, match=r"need the extra \[eval\].*pip install -c requirements.txt -e '.\[eval\]'"):
        harness.run(StandIn().model, ["gsm8k"])


# ---- the command line -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """An untrained model."""
    folder = tmp_path_factory.mktemp("run")
    BYTES.save(folder)
    model = transformer.build(CONFIG.model)
    saver = checkpoint.Checkpointer(str(folder), 1, 0)
    saver.save(state.create(model, optimizer.make(CONFIG.optimizer, 1, model.shapes["params"]), CONFIG), CONFIG)
    saver.wait()
    saver.close()
    return folder


def refused(done, *words):
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@with_library
def test_evaluate_runs_tasks_of_the_library(offline, run_folder, tmp_path):
    out, names = tmp_path / "out", "capitals_choice,capitals_write,capitals_text"
    ask = [f"--workdir={run_folder}", f"--task_folder={FOLDER}", f"--tasks={names}"]
    first, exists, resumed, seed, several, length, apart, chat, file, nowhere = tiny_run.each("evaluate", [
        [*ask, f"--out={out}", "--draws=8", "--decoder=random:steps=64", "--limit=2"],
        [*ask, f"--out={out}"],
        [*ask, f"--out={out}", "--draws=8", "--decoder=random:steps=64", "--resume"],
        [*ask, f"--out={out}", "--draws=8", "--decoder=random:steps=64", "--resume", "--seed=3"],
        [*ask, "--decoder=random,margin"],
        [*ask, "--decoder.gen_length=8"],
        [*ask, f"--tasks=recall,{names}"],
        [*ask, "--chat"],
        [*ask, f"--out={FOLDER}/capitals.jsonl"],
        [*ask, "--resume"],
    ])
    assert first.returncode == 0, first.stderr
    *text, last = first.stdout.splitlines()
    found = json.loads(last)
    scores = {(line["task"], line["metric"]): line for line in found["scores"]}
    assert set(scores) == {("capitals_choice", "acc"), ("capitals_choice", "acc_norm"), ("capitals_write", "exact_match"),
                           ("capitals_text", "bits_per_byte")}
    assert 4 < scores["capitals_text", "bits_per_byte"]["value"] < 16  # an untrained model spends about 8 bits
    for line in found["scores"]:
        assert line["items"] == 2 and any(row.startswith(line["task"]) and f"{line['value']:.4f}" in row for row in text)
    settings = found["settings"]
    assert {key: settings["decoder"][key] for key in ("name", "steps", "block_length", "gen_length")} == {
        "name": "random", "steps": 64, "block_length": 32, "gen_length": 256}
    assert settings["likelihood"] == {"noise": "exact_count", "draws": 8, "group": 8, "guidance": 0.0, "block_size": 0}
    assert settings["cache"] == {"name": "none"}
    assert (settings["checkpoint"], settings["step"], settings["weights"], settings["seed"]) == (str(run_folder), 0, "params", 7)
    assert settings["suppress"] == []

    assert resumed.returncode == 0, resumed.stderr
    after = items_of(out / "items.jsonl")
    assert len(after) == 1 + 15 + 5 + 5 and len({line["key"] for line in after[1:]}) == 25
    assert [line["document"] for line in after[1 : 1 + 6 + 2 + 2]].count(2) == 0  # those of the first run stand first
    assert {line["items"] for line in json.loads(resumed.stdout.splitlines()[-1])["scores"]} == {5}
    assert all(line["tokens"] <= 16 for line in after if line.get("kind") == "generate_until")

    refused(exists, "holds answers", "--resume")
    refused(seed, "seed=7, now it is 3")
    refused(several, "random, margin", "by one")
    refused(length, "--max_new_tokens=N")
    refused(apart, "recall", "capitals_write", "two calls")
    refused(chat, "--chat needs", str(run_folder))
    refused(file, "name a folder")
    refused(nowhere, "--resume needs --out")


def test_flags_that_do_not_go_with_what_is_asked(run_folder):
    ask, library = f"--workdir={run_folder}", importlib.util.find_spec("lm_eval")
    own, without, folder, missing = tiny_run.each("evaluate", [
        [ask, "--tasks=recall", "--num_fewshot=0"],
        [ask, "--max_new_tokens=8"],
        [ask, "--tasks=gsm8k", f"--task_folder={run_folder}/nowhere"],
        [ask, "--tasks=recal,gsm8k"],
    ])
    refused(own, "--num_fewshot is for tasks of lm-evaluation-harness")
    refused(without, "--max_new_tokens needs --tasks")
    refused(folder, "nowhere is no folder")
    refused(missing, "no task 'recal'; did you mean 'recall'", *([] if library else ["need the extra [eval]", harness.INSTALL]))


@with_library
def test_evaluate_puts_tasks_into_a_published_models_template(offline, tmp_path):
    """LLaDA2: its own decoder and likelihoods in its blocks, its template."""
    folder = tmp_path / "published"
    model = {"vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "num_experts": 8,
             "experts_per_token": 2, "expert_size": 8, "dense_size": 16, "shared_expert_size": 8}
    [made] = tiny_run.each("convert", [["make", "--config=configs/llada2.py:variant=mini", f"--out={folder}",
                                        *(f"--config.model.{key}={value}" for key, value in model.items())]])
    assert made.returncode == 0, made.stderr
    [done] = tiny_run.each("evaluate", [[f"--checkpoint={folder}", f"--task_folder={FOLDER}", "--tasks=capitals_write", "--chat", "--limit=2",
                                         "--max_new_tokens=8", f"--out={tmp_path / 'out'}"]])
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout.splitlines()[-1])["settings"]
    assert settings["likelihood"]["block_size"] == 32
    assert (settings["decoder"]["name"], settings["decoder"]["block_length"], settings["cache"]["name"]) == ("llada2", 32, "block_causal")
    assert settings["template"] == "llada2_moe" and settings["max_new_tokens"] == 8
    plain = len("The capital of France is")
    assert all(line["prompt_tokens"] > plain and line["tokens"] <= 8 for line in items_of(tmp_path / "out" / "items.jsonl")[1:])
