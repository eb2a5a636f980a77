"""The command `python -m llada_jax.sample` on a run folder with an untrained model."""

import json
import subprocess
import sys

import jax
import pytest

from llada_jax import config as config_lib
from llada_jax import tokenizer
from llada_jax.config import ConfigError
from llada_jax.evaluation import decode
from llada_jax.model import transformer
from llada_jax.sampling import presets
from llada_jax.training import checkpoint, optimizer, state
from tests import tiny_run

BYTES = tokenizer.Bytes()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "texts").mkdir()
    for i in range(8):
        (folder / "texts" / f"{i}.txt").write_text(f"{i}" + "abc" * 50)
    config = config_lib.Config(
        model=config_lib.Model(vocab_size=BYTES.vocab_size, hidden_size=16, num_layers=1, num_heads=2, num_experts=2, experts_per_token=1,
                               expert_size=8, max_length=96, init_std=0.2),
        data=config_lib.Data(sources=str(folder / "texts" / "*.txt"), sequence_length=32, tokenizer="bytes", holdout=0.5))
    BYTES.save(folder)
    model = transformer.build(config.model)
    saver = checkpoint.Checkpointer(str(folder), 1, 0)
    saver.save(state.create(model, optimizer.make(config.optimizer, 1, model.shapes["params"]), config), config)
    saver.wait()
    saver.close()
    return folder


def sample(*arguments, devices=1):
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return subprocess.run([sys.executable, "-m", "llada_jax.sample", *map(str, arguments)], capture_output=True, text=True, env=environment)


def test_a_file_of_prompts_gives_a_line_each_whatever_the_batch_and_devices(run_folder, tmp_path):
    prompts = [{"id": "a", "prompt": "import os"}, {"prompt": "x<|mask:5|>y<|mask:3|>"}, {"id": 7, "prompt": ""}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    found = []
    for batch_size, devices in (8, 2), (1, 1):
        out = tmp_path / f"out{batch_size}.jsonl"
        decoder = "--decoder=random", "--decoder.gen_length=8", "--decoder.block_length=4", "--decoder.steps=4", "--decoder.temperature=1"
        done = sample(f"--workdir={run_folder}", f"--prompts={tmp_path / 'in.jsonl'}", f"--out={out}", f"--batch_size={batch_size}", *decoder,
                      devices=devices)
        assert done.returncode == 0, done.stderr
        found.append([json.loads(line) for line in out.read_text().splitlines()])
        assert not list(tmp_path.glob("*.partial"))
    a, gaps, empty = found[0]
    assert [line["id"] for line in found[0]] == ["a", 1, 7]
    assert a["tokens"][:9] == BYTES.encode("import os") and len(a["tokens"]) == 17 and a["text"].startswith("import os")
    assert gaps["tokens"][0] == ord("x") and gaps["tokens"][6] == ord("y") and len(gaps["tokens"]) == 10 and len(gaps["written"]) == 2
    assert gaps["text"] == f"x{gaps['written'][0]}y{gaps['written'][1]}"
    assert a["forwards"] == empty["forwards"] == {"full": 4} and BYTES.mask_id not in a["tokens"] + gaps["tokens"] + empty["tokens"]
    # rows keep their noise in another batch; the page of the last run stands in the run folder
    assert [line["tokens"] for line in found[1]] == [line["tokens"] for line in found[0]]
    assert "<!doctype html>" in (run_folder / "samples" / "prompt_0.html").read_text()


def test_without_a_prompt_it_continues_heldout_text(run_folder, tmp_path):
    done = sample(f"--workdir={run_folder}", "--num_samples=2", f"--html={tmp_path / 'page.html'}", f"--picture={tmp_path / 'picture.svg'}")
    assert done.returncode == 0, done.stderr
    assert "weights: params" in done.stdout and done.stdout.count("⟦") == 2 and "abcabcabc" in done.stdout
    assert (tmp_path / "page.html").exists() and (tmp_path / "picture.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("arguments, words", [
    (["--prompt=a<|mask|>"], ["<|mask:N|>"]),
    (["--prompt=abc", "--decoder.gen_length=96"], ["3 given tokens", "96", "max_length=96"]),
    (["--weights=ema"], ["holds no average"]),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_status_1(run_folder, arguments, words):
    done = sample(f"--workdir={run_folder}", *arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_prompt_files_that_are_no_text(run_folder, tmp_path):
    (tmp_path / "surrogate.jsonl").write_text('{"prompt": "a\\ud800b"}\n')
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe{")
    for name, reason in (("surrogate", "line 1"), ("binary", "not UTF-8")):
        done = sample(f"--workdir={run_folder}", f"--prompts={tmp_path / name}.jsonl")
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and reason in done.stderr


def test_out_that_is_a_folder_leaves_nothing(run_folder, tmp_path):
    (tmp_path / "out").mkdir()
    done = sample(f"--workdir={run_folder}", "--prompt=x", f"--out={tmp_path / 'out'}", "--num_samples=1")
    assert done.returncode == 1 and "is a folder" in done.stderr and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_streamed_results_are_those_of_batches_and_two_decoders_stand_side_by_side(run_folder, tmp_path):
    common = [f"--workdir={run_folder}", "--decoder=threshold", "--decoder.threshold=0.2", "--decoder.gen_length=8", "--decoder.block_length=4",
              "--cache=dual", *(f"--prompt={text}" for text in ("import os", "x = ", "def f"))]
    lines = []
    for more in (["--batch_size=3", "--compare=random:steps=4", f"--html={tmp_path / 'page.html'}"], ["--batch_size=2", "--stream=1", "--html="]):
        out = tmp_path / f"{len(lines)}.jsonl"
        done = sample(*common, *more, f"--out={out}")
        assert done.returncode == 0, done.stderr
        lines.append(sorted((json.loads(line) for line in out.read_text().splitlines()), key=lambda line: line["id"]))
    assert "░" in done.stdout and "… 2: def f" in done.stdout
    for whole, streamed in zip(*lines, strict=True):
        assert whole["tokens"] == streamed["tokens"] and whole["forwards"] == streamed["forwards"] and whole["step"] == streamed["step"]
        assert whole["forwards"]["full"] == 2 and whole["forwards"]["window"] == whole["steps"] - 2 and not whole["wasted"] and not whole["failed"]
    page = (tmp_path / "page.html").read_text()
    assert 'id="rows" class="two"' in page and page.count("random:steps=4") == 3
    refused = sample(*common, "--compare=random,margin")
    assert refused.returncode == 1 and refused.stderr.startswith("error: --compare=random,margin names 2 decoders")
    refused = sample(*common, "--compare=random", "--stream=1")
    assert refused.returncode == 1 and "leave out --stream" in refused.stderr


def test_suppressed_tokens_are_never_written(run_folder, tmp_path):
    """All but three of them, in batches and streamed, at a temperature that draws from what is left; what is given may hold them."""
    prompts = [{"prompt": "import os"}, {"prompt": "x<|mask:5|>y<|mask:3|>"}, {"prompt": ""}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    left = {ord(letter) for letter in "pqr"}
    others = ",".join(["eos", *(str(i) if i % 2 or not chr(i).isalpha() or i > 127 else chr(i) for i in range(256) if i not in left)])
    ask = [f"--workdir={run_folder}", f"--prompts={tmp_path / 'in.jsonl'}", "--decoder=threshold", "--decoder.gen_length=8",
           "--decoder.block_length=4", "--decoder.temperature=1.5", "--html="]
    batch, stream, everything, unknown, empty, beyond = tiny_run.each("sample", [
        [*ask, f"--suppress={others}", f"--out={tmp_path / 'batch'}", f"--html={tmp_path / 'page'}"],
        [*ask, f"--suppress={others}", f"--out={tmp_path / 'stream'}", "--stream=2", "--batch_size=2"],
        [*ask, f"--suppress={others},p,113,r"], [*ask, "--suppress=eos,eot"], [*ask, "--suppress=eos,"], [*ask, "--suppress=258"]])
    read = lambda name: sorted((json.loads(line) for line in (tmp_path / name).read_text().splitlines()), key=lambda line: line["id"])
    written = lambda name: [token for line in read(name) for token, step in zip(line["tokens"], line["step"], strict=True) if step >= 0]
    assert batch.returncode == stream.returncode == 0, (batch.stderr, stream.stderr)
    assert len(written("batch")) == 24 and set(written("batch")) == left
    assert [line["tokens"] for line in read("stream")] == [line["tokens"] for line in read("batch")]
    assert read("batch")[0]["tokens"][:9] == BYTES.encode("import os")
    assert "never written: 0 '\\x00', 1 '\\x01'" in batch.stdout and "and 246 more" in batch.stdout
    assert "never written: 0" in (tmp_path / "page").read_text()
    for done, words in ((everything, ["names all 257 tokens", "nothing is left"]), (unknown, ["'eot' is no token", "eos, ids from 0 to 257"]),
                        (empty, ["'' is no token"]), (beyond, ["'258' is no token"])):
        assert done.returncode == 1 and done.stderr.startswith("error: --suppress") and done.stderr.count("\n") == 1, done.stderr
        assert all(word in done.stderr for word in words), done.stderr


def test_a_spelling_stands_for_every_token_that_has_it():
    trained = tokenizer.train(["def f(a):\n    return a, 1\n" * 40], 307)
    ids = lambda named: decode.suppressed_ids(named, trained, None, 307)
    blank, word = ids(" "), ids("return")
    assert len(blank) == 2 and [trained.decode([i]) for i in blank] == [" ", " "]  # the piece and the byte
    assert trained.decode(word) == "return" * len(word) and len(word) == 1 and ids(f"{word[0]},eos,{trained.mask_id}") == ids("eos,return")
    assert trained.eos_id in ids("eos") and ids("") == ()
    with pytest.raises(ConfigError, match="'def f' is no token"):
        ids("eos,def f")


def test_decoders_are_listed_and_what_one_would_ignore_is_refused(run_folder):
    done = sample("--list_decoders=all")
    assert done.returncode == 0 and all(f"\n{name} " in f"\n{done.stdout}" for name in presets.PRESETS)
    refused = sample(f"--workdir={run_folder}", "--decoder=threshold", "--decoder.steps=4")
    assert refused.returncode == 1 and "threshold has no setting 'steps', so it would be ignored" in refused.stderr
