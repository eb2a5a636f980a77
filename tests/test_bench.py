"""`python -m llada_jax.bench` from end to end at tiny sizes: what it prints and writes, agreement with PyTorch. No time is judged."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny_run

TINY = [f"--config.{setting}" for setting in (
    "mesh.data=-1", "mesh.expert=1", "mesh.tensor=1",
    "model.vocab_size=96", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_experts=4", "model.experts_per_token=2",
    "model.expert_size=16", "data.sequence_length=16", "train.batch_size=2", "train.steps_per_call=2")]  # fmt: skip
COMMANDS = "forward", "train", "sample"
NUMBER = r"\d+(?:\.\d+)?"
SIDE = rf"median {NUMBER} ms(?: a step)?, min {NUMBER} ms, (?:[\d,]+ tokens/s, )?{NUMBER} GFLOP/s, {NUMBER}% of the GEMM"
PARITY = "for the comparison: pip install torch==2.13.0, alone and first; then pip install -c requirements.txt -e '.[parity]'"
with_torch = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")), reason=PARITY)


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "llada_jax.bench", *arguments], capture_output=True, text=True,
                          env=tiny_run.environment() | environment)


def run(command: str, out, *arguments: str, **environment: str) -> tuple[list[str], dict]:
    """Lines of the output, and the record."""
    done = bench(command, *TINY, f"--out={out}", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), json.loads(out.read_text())


def check(lines: list[str], record: dict, sides: list[str], pairs: int) -> None:
    """Every side has its line, and its times in the record."""
    assert [line.split()[0] for line in lines if re.fullmatch(rf"\w+ +{SIDE}", line)] == sides
    assert list(record["seconds"]) == sides and all(len(times) == pairs and min(times) > 0 for times in record["seconds"].values())
    assert record["config"]["model.hidden_size"] == 32 and record["flops"]["ours"] > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_ours_alone(command, tmp_path):
    lines, record = run(command, tmp_path / "out" / "times.json", "--pairs=1", "--baseline=none")
    check(lines, record, ["ours", "GEMM"], 1)
    assert record["command"] == command and record["ratios"] == [] and "ratio" not in lines[-1]


@with_torch
@pytest.mark.parametrize("command, baseline", [("forward", "torch"), ("train", "torch"), ("sample", "torch"), ("forward", "torch_eager")])
def test_beside_torch(command, baseline, tmp_path):
    """On two devices: two rows, or the experts and positions of one."""
    split = ["--config.mesh.data=1", "--config.mesh.expert=-1"] if command == "sample" else []
    lines, record = run(command, tmp_path / "times.json", "--pairs=2", f"--baseline={baseline}", "--threads=1", *split, JAX_NUM_CPU_DEVICES="2")
    check(lines, record, ["ours", "torch", "GEMM"], 2)
    median, low, high = map(float, re.fullmatch(rf"ratio: ({NUMBER}) \(min ({NUMBER}), max ({NUMBER}), 2 pairs\)", lines[-1]).groups())
    assert low <= median <= high and len(record["ratios"]) == 2
    assert ("experts eager" if baseline == "torch_eager" else "experts grouped_mm") in record["torch"] and "1 thread" in record["torch"]
    results = record["results"]
    if command == "forward":
        assert results["largest difference"] < 2e-5 and results["largest logit"] > 1
    elif command == "sample":
        assert results == {"new tokens": 128, "that agree": 128, "our steps": 64}
    else:
        assert all(1 < loss < 20 for loss in results.values()) and len(results) == 2


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A run on short texts, untrained."""
    from llada_jax import config as config_lib
    from llada_jax import tokenizer
    from llada_jax.model import transformer
    from llada_jax.training import checkpoint, optimizer, state

    folder, settings, tokens = tmp_path_factory.mktemp("run"), tiny_run.get_config(), tokenizer.Bytes()
    settings.data.sources = tiny_run.write_texts(folder / "texts")
    config = config_lib.with_vocab_size(config_lib.from_config_dict(settings), tokens.vocab_size)
    tokens.save(folder)
    saver, model = checkpoint.Checkpointer(str(folder), 1, 0), transformer.build(config.model)
    saver.save(state.create(model, optimizer.make(config.optimizer, 1, model.shapes["params"]), config), config)
    saver.wait()
    saver.close()
    return folder


def scored(lines: list[str], record: dict, prompts: int) -> dict:
    """The figures of each text of a run on text, as recorded; all of them are printed."""
    quality, printed = record["quality"], "\n".join(lines)
    assert (quality["prompts"], quality["prompt_tokens"], quality["new_tokens"], quality["draws"]) == (prompts, 16, 16, 128)
    assert f"{prompts} held-out prompts of 16 tokens, 16 new ones" in printed and "bound from 128 draws a text" in printed
    for name, own in quality["texts"].items():
        assert 0 < own["draws_se"] < own["bits_per_byte"] < 12 and own["bits_per_byte_se"] > 0
        [line] = [line for line in lines if line.startswith(f"  {name} ")]
        assert f"{own['bits_per_byte']:.4f} ± {own['bits_per_byte_se']:.4f} (of it ± {own['draws_se']:.4f} from the draws)" in line
    return quality["texts"]


def test_a_run_on_text_is_scored_by_its_own_model(text_run, tmp_path):
    arguments = [f"--workdir={text_run}", "--decoder=low_confidence", "--decoder.steps=4", "--cache=dual", "--rows=4", "--pairs=1"]
    lines, record = run("sample", tmp_path / "a.json", *arguments)
    texts = scored(lines, record, 4)
    assert list(texts) == ["ours", "held-out text"] and texts["ours"]["forwards"] == 4 and "agree" not in texts["ours"]
    assert any(line.startswith("ours ") and "of fewer forwards" in line for line in lines) and "ratio" not in lines[-1]


def test_prompts_are_of_one_heldout_document_each(text_run):
    from llada_jax.data import sources
    from llada_jax.evaluation import continuation
    from llada_jax.sampling import presets
    from llada_jax.training import pretrained

    run = pretrained.open_weights(str(text_run), None)
    [source] = sources.load(run.config.data)
    for settings, P in ({}, 16), ({"gen_length": "24", "block_length": "8"}, 8):
        found = continuation.of_run(run.config, run.tokenizer, presets.Flags("threshold", settings, "dual"), 5)
        assert found.prompt_BP.shape == (5, P) and found.text_BC.shape == (5, found.decoder.gen_length) == (5, 32 - P) and found.answer is None
        assert (found.one.gen_length, found.one.steps, found.one.block_length) == (32 - P, 0, found.decoder.block_length)
        for tokens in np.concatenate([found.prompt_BP, found.text_BC], axis=1):
            assert any(run.tokenizer.decode(tokens) in document.text for document in source.heldout) and run.tokenizer.eos_id not in tokens
    few, room = tiny_run.each("bench", [["sample", f"--workdir={text_run}", *more] for more in (["--rows=1"], ["--decoder.gen_length=32"])])
    refused(few, "--rows=1")
    refused(room, "decoder.gen_length=32 leaves no room", "data.sequence_length=32", "at most 31")


@with_torch
def test_a_run_on_text_beside_torch(text_run, tmp_path):
    """One token a forward on both sides gives the same texts, so the same bits; draws in fewer forwards are other texts, and less likely ones."""
    found = {}
    for steps, temperature in (16, 0), (2, 2):
        arguments = [f"--workdir={text_run}", f"--decoder.steps={steps}", f"--decoder.temperature={temperature}", "--baseline=torch", "--threads=1",
                     "--rows=3", "--pairs=1"]
        lines, record = run("sample", tmp_path / f"{steps}.json", *arguments)
        found[steps] = scored(lines, record, 3)
        assert record["results"]["our steps"] == found[steps]["ours"]["forwards"] == steps and found[steps]["torch"]["forwards"] == 16
        assert record["results"]["new tokens"] == 16 and lines[-1].startswith("ratio: ")
    same, other = found[16], found[2]
    assert same["torch"]["agree"] == 48 and same["torch"]["difference"] == same["torch"]["difference_se"] == 0
    assert same["torch"]["bits_per_byte"] == same["ours"]["bits_per_byte"] == other["torch"]["bits_per_byte"]
    assert other["torch"]["agree"] < 48 and other["torch"]["difference"] < 0 < other["torch"]["difference_se"]
    assert same["held-out text"]["bits_per_byte"] == other["held-out text"]["bits_per_byte"]


def test_bits_of_texts_whose_likelihood_is_known():
    """Of a model whose tokens are independent and equally likely, but one; bytes are those of the tokenizer, and masks and prompts decide nothing."""
    import jax
    import jax.numpy as jnp

    from llada_jax import config as config_lib
    from llada_jax import partitioning, tokenizer
    from llada_jax.diffusion.likelihood import Estimator
    from llada_jax.evaluation import continuation
    from llada_jax.model import transformer

    tokens, V = tokenizer.Bytes(), 260  # two more than the tokenizer has
    logits_V = jnp.zeros(V).at[ord("a")].set(3.0)
    cost_V = np.asarray(-jax.nn.log_softmax(logits_V)) / np.log(2)
    model = transformer.build(config_lib.Model(vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, num_experts=2, experts_per_token=1,
                                               expert_size=8, max_length=64))
    model = model._replace(cross_entropy=lambda variables, hidden, targets, needed: jnp.where(needed, jnp.asarray(cost_V)[targets] * np.log(2), 0))
    texts = {"ours": [[97, 97, 97, 98], [98, 98, 99, tokens.eos_id], [97, 98, 98, V - 1]], "other": [[98] * 4, [99] * 4, [97] * 4],
             "nothing": [[tokens.eos_id] * 4] * 3}
    texts = {name: np.array(rows, np.int32) for name, rows in texts.items()}
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    # with as many draws a group as there are tokens every number of masks comes once; which tokens they hide still differs between draws
    found = continuation.bits(model, model.init(jax.random.key(0)), mesh, tokens, np.full((3, 5), 7, np.int32), texts, Estimator(draws=512, group=4))
    bits = {name: cost_V[rows].sum(-1) for name, rows in texts.items()}
    size = {"ours": np.array([4, 3, 3]), "other": np.array([4, 4, 4])}
    for name, bytes_B in size.items():
        own, mean = found[name], bits[name].sum() / bytes_B.sum()
        assert abs(own["bits_per_byte"] - mean) < 4 * own["draws_se"] + 1e-6 and own["draws_se"] < 0.1
        share_B = (bits[name] - mean * bytes_B) / bytes_B.sum()
        assert np.isclose(own["bits_per_byte_se"], np.sqrt(1.5 * (share_B**2).sum()), atol=4 * own["draws_se"] + 1e-6)
    assert found["ours"]["difference"] == 0
    assert np.isclose(found["other"]["difference"], found["other"]["bits_per_byte"] - found["ours"]["bits_per_byte"])
    assert set(found["nothing"].values()) == {None}


@with_torch
def test_the_training_step_is_the_same_task(tmp_path):
    """Without noise in what is masked, both sides begin with one loss and end with weights that went the same way."""
    import dataclasses

    import jax
    import numpy as np
    import torch

    from llada_jax import config as config_lib
    from llada_jax.evaluation import torch_baseline
    from llada_jax.interop import hf_weights
    from llada_jax.model import transformer
    from llada_jax.training import optimizer, state, step

    V, K, B, T = 64, 3, 2, 16
    model = config_lib.Model(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, num_experts=4, experts_per_token=2, expert_size=16,
                             init_std=0.3)
    config = config_lib.Config(model, config_lib.Diffusion(min_noise=1 - 1e-7, variable_length_rate=0.0, balance_coefficient=0.0, z_coefficient=0.0),
                               optimizer=config_lib.Optimizer(schedule="constant", warmup_steps=0, learning_rate=1e-3, weight_decay=0.0))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=B, steps_per_call=K))
    ours = transformer.build(model)
    update = optimizer.make(config.optimizer, 10, ours.shapes["params"])
    run = state.create(ours, update, config)
    tokens_KBT = np.random.default_rng(0).integers(0, V - 1, (K, B, T), np.int32)
    stock = torch_baseline.build(model, run.variables, torch.get_num_threads())
    theirs = torch_baseline.train(stock, config, tokens_KBT, V - 1)
    before = hf_weights.to_theirs("qwen3_moe", run.variables)
    ones = np.ones((B, T), np.int32)
    one = jax.jit(step.make_step(ours, update, config, V - 1))
    for tokens_BT in tokens_KBT:
        run, metrics = one(run, {"tokens": tokens_BT, "segment": ones, "position": ones * np.arange(T, dtype=np.int32), "maskable": ones > 0,
                                 "index": np.arange(B, dtype=np.int32)})
    np.testing.assert_allclose(theirs(), metrics["loss"], rtol=1e-4)
    after, name = hf_weights.to_theirs("qwen3_moe", run.variables), "model.layers.0.self_attn.v_proj.weight"
    np.testing.assert_allclose(stock.state_dict()[name].numpy(), after[name], atol=1e-4)
    assert np.abs(after[name] - before[name]).max() > 1e-3


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stdout + done.stderr
    assert all(word in done.stderr for word in words), done.stderr


CASES = {  # arguments: words of the line
    "": ["name a command", "llada_jax.bench {forward,train,sample}"],
    "trian": ["unknown command 'trian'", "did you mean 'train'"],
    "forward --pairs=0": ["--pairs=0", "not a positive integer"],
    "forward --threads=0": ["--threads=0", "not a positive integer"],
    "forward --baseline=tensorflow": ["tensorflow", "torch"],
    "forward --config.model.hiden_size=3": ["hiden_size", "hidden_size"],
    "forward --config.model.vocab_size=0": ["leaves model.vocab_size to the tokenizer"],
    "sample --config.model.max_length=100 --config.data.sequence_length=100": ["160", "max_length=100"],
    "forward --out=.": ["directory"],
    "sample --rows=3": ["--rows goes with `bench sample --workdir=RUN`"],
}
TORCH_CASES = {
    "forward --config.model.compute_dtype=bfloat16": ["model.compute_dtype='bfloat16'", "'float32'"],
    "train --config.optimizer.name=muon": ["optimizer.name='muon'", "'adamw'"],
    "sample --config.model.shared_expert_size=8": ["Qwen3Moe", "model.shared_expert_size=8"],
}


def test_bad_input_is_one_line():
    arguments = [words[:1] + TINY * (len(words) > 1) + words[1:] for words in map(str.split, CASES)]
    for case, done in zip(CASES, tiny_run.each("bench", arguments), strict=True):
        refused(done, *CASES[case])


@with_torch
def test_what_the_stock_class_is_not():
    for case, done in zip(TORCH_CASES, tiny_run.each("bench", [[*case.split(), "--baseline=torch"] for case in TORCH_CASES]), strict=True):
        refused(done, *TORCH_CASES[case])


def test_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    done = bench("forward", "--baseline=torch", PYTHONPATH=str(tmp_path))
    refused(done, "No module named torch", "pip install -c requirements.txt -e '.[parity]'")
