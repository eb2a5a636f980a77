"""Bad input to `python -m llada_jax.train`: one `error: …` line, exit status 1, nothing left behind."""

import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning
from tests import tiny_run

CASES = {  # arguments: words of the line
    "--config.model.hiden_size=3": ["hiden_size", "hidden_size"],
    "--config.trian.steps=3": ["trian", "train"],
    "--config=configs/llada_moe.py:varant=x": ["varant", "variant"],
    "--config=configs/llada_moe.py:variant=x": ["100m_a20m"],
    "--config=configs/missing.py": ["configs/missing.py", "--list_configs"],
    "--config.train.steps=abc": ["train.steps", "abc"],
    "--config.train.steps=0": ["train.steps=0", "at least 1"],
    "--config.optimizer.learning_rate=abc": ["learning_rate", "abc"],
    "--config.model.dense_layers=abc": ["model.dense_layers", "whole numbers"],
    "--config.optimizer.name=sgd": ["optimizer.name='sgd'", "adamw", "muon"],
    "--config.kernels.attention=other": ["kernels.attention", "reference"],
    "--config.kernels.attention=tpu": ["kernels.attention=tpu", "does not run on cpu", "reference"],
    "--config.optimizer.trainable=zzz": ["optimizer.trainable", "embedding"],
    "--config.train.batch_size=5 --config.train.accumulate=2": ["5", "2", "use 6"],
    "--config.mesh.data=3 --config.mesh.fsdp=-1": ["data=3", "there are 1", "ask for 3 CPU devices in JAX_NUM_CPU_DEVICES"],
    "--config.data.sequence_length=65": ["65", "model.max_length=64"],
    "--config.data.sources={tmp}/none/*.txt": ["none/*.txt"],
    "--config.data.sources={tmp}/empty.txt": ["empty.txt"],
    "--config.data.tokenizer={tmp}/none.model": ["none.model"],
    "--config.model.vocab_size=10": ["vocab_size=10", "258"],
    "--config.train.wandb=project": ["wandb", "pip install"],
    "--profile_steps=nonsense": ["nonsense", "20:25"],
    "--profile_steps=900:1000": ["900:1000", "0 to 24"],
    "--heartbeat_seconds=0": ["--heartbeat_seconds=0", "positive"],
    "--stall_seconds=-5": ["--stall_seconds=-5", ">= 1"],
    "--nonsense=3": ["nonsense"],
    "extra": ["extra"],
    "--init_from={tmp}/texts": ["no checkpoint", "texts"],
    "--init_from={tmp}/texts@3": ["no checkpoint", "texts"],
    "--workdir={tmp}/empty.txt": ["empty.txt is a file"],
    "--workdir={tmp}/empty.txt/below": ["empty.txt is a file"],
    "--workdir=gs://bucket/run": ["gs://", "pip install"],
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    texts = tiny_run.write_texts(folder / "texts")
    (folder / "empty.txt").touch()
    cases = [tiny_run.arguments(texts, folder / "run", *case.format(tmp=folder).split()) for case in CASES]
    before = set(folder.rglob("*"))
    done = dict(zip(CASES, tiny_run.train_each(cases), strict=True))
    assert set(folder.rglob("*")) == before, "something was left behind"
    return done


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_status_1(outcomes, case):
    done = outcomes[case]
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in CASES[case]), done.stderr


def test_a_config_is_required():
    done = tiny_run.train()
    assert done.returncode == 1 and done.stderr.startswith("error: --config is missing") and done.stderr.count("\n") == 1


def test_what_only_prints(tmp_path):
    texts = tiny_run.write_texts(tmp_path / "texts")
    settings, configs, dry = tiny_run.train_each([
        tiny_run.arguments(texts, tmp_path / "run", flag, "--config.train.seed=7") for flag in ("--print_config", "--list_configs", "--dry_run")])
    assert settings.returncode == configs.returncode == dry.returncode == 0
    assert "--config.train.seed=7" in settings.stdout.splitlines() and "--config.model.hidden_size=16" in settings.stdout.splitlines()
    assert "7,356,880,896" in configs.stdout and "pystdlib.py" in configs.stdout and "sudoku.py" in configs.stdout
    assert "10,144 parameters" in dry.stdout and "params/embedding  float32[258, 16]" in dry.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--help", "--helpfull"])
def test_help(flag):
    done = tiny_run.train(flag)
    assert done.returncode == 0 and done.stderr == "" and "--profile_steps" in done.stdout and "python -m llada_jax.train" in done.stdout


def test_an_indivisible_batch_names_the_next_that_fits():
    mesh = partitioning.make_mesh(config_lib.Mesh(data=4, fsdp=2))
    with pytest.raises(config_lib.ConfigError, match="global batch 30 is not divisible by data·fsdp·expert = 8; use 32"):
        partitioning.check_batch(30, 1, mesh)
