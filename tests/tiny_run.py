"""A run of seconds: as a file, a config of a 10,000-parameter model for `--config`; as a module, the commands that train it."""

import json
import os
import pathlib
import random
import subprocess
import sys

import jax

from configs import common

STEPS = 24


def get_config(arg=None):
    common.parse_arg(arg)
    config = common.default_config()
    config.model.hidden_size = 16
    config.model.num_layers = 1
    config.model.num_heads = 2
    config.model.num_experts = 2
    config.model.experts_per_token = 1
    config.model.expert_size = 8
    config.model.max_length = 64
    config.model.init_std = 0.2
    config.data.sequence_length = 32
    config.data.tokenizer = "bytes"
    config.data.holdout = 0.25
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 2
    config.train.steps = STEPS
    config.train.batch_size = 4
    config.train.steps_per_call = 2
    config.train.log_every = 1
    config.train.checkpoint_every = 4
    config.train.eval_every = 8
    config.train.eval_batches = 1
    return config


def write_texts(folder: pathlib.Path) -> str:
    """Eight short texts; returns the glob for data.sources."""
    folder.mkdir()
    for i in range(8):
        draw = random.Random(i)
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(["alpha", "beta", "x = 1", "def f(x):\n    return x"]) for _ in range(200)))
    return str(folder / "*.txt")


def arguments(texts: str, workdir, *more: str) -> list[str]:
    return [f"--config={__file__}", f"--config.data.sources={texts}", f"--workdir={workdir}", *more]


def environment() -> dict[str, str]:
    """One CPU device, whatever the tests themselves run on, and their compilation cache."""
    left = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return left | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}


def start(*args: str, **named) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "llada_jax.train", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment(), **named)


def train(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "llada_jax.train", *args], capture_output=True, text=True, env=environment())


def lines(workdir) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in found]


def weights(output: str) -> str:
    """The hash in a run's closing lines."""
    return output.split("weights sha256 ")[1].split()[0]


FORKS = """
import importlib, json, os, sys, tempfile
from llada_jax import command_line
name, cases = json.load(sys.stdin)
module = importlib.import_module(f"llada_jax.{name}")
run = getattr(module, "run", lambda: command_line.run(module.main))
for case in cases:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.argv[:] = [name, *case]
            run()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [file.seek(0) or file.read().decode() for file in (out, err)]
    print(json.dumps([status, *texts]), flush=True)
"""


def each(module: str, cases: list[list[str]]) -> list[subprocess.CompletedProcess]:
    """`python -m llada_jax.MODULE` of every argument list, in forks of one process that has imported it: quicker."""
    done = subprocess.run([sys.executable, "-c", FORKS], input=json.dumps([module, cases]), capture_output=True, text=True, env=environment())
    assert done.stdout.count("\n") == len(cases), done.stderr
    return [subprocess.CompletedProcess(case, *json.loads(line)) for case, line in zip(cases, done.stdout.splitlines(), strict=True)]


def train_each(cases: list[list[str]]) -> list[subprocess.CompletedProcess]:
    """`train` of every argument list."""
    return each("train", cases)
