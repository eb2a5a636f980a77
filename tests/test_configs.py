"""Every file under configs/, with every preset that it names: it builds, its step traces, its command line works."""

import functools
import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from llada_jax import config as config_lib
from llada_jax.model import count, transformer
from llada_jax.training import optimizer, presets, state, step

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRESETS = {name: config_lib.with_vocab_size(config, config.data.vocab_size if config.data.sources != "sudoku" else 6)
           if not config.model.vocab_size else config for name, config in presets.all_presets()}


def test_every_file_is_listed():
    files = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.py")} - {"common.py"}
    assert {name.partition(":")[0] for name in PRESETS} == files


@pytest.mark.parametrize("name", PRESETS)
def test_the_training_step_traces(name):
    """Shapes alone: nothing is allocated, so the largest model passes too."""
    config = PRESETS[name]
    model = transformer.build(config.model, config.kernels)
    update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
    run = jax.eval_shape(lambda: state.create(model, update, config))
    B, T = config.train.batch_size, config.data.sequence_length
    shape = lambda *dims, dtype=jnp.int32: jax.ShapeDtypeStruct(dims, dtype)
    batch = {key: shape(B, T) for key in ("tokens", "segment", "position")}
    batch |= {"maskable": shape(B, T, dtype=bool), "index": shape(B, dtype=jnp.uint32)}
    after, metrics = jax.eval_shape(step.make_step(model, update, config, config.model.vocab_size - 1), run, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), run)
    assert metrics["loss"].shape == ()
    if config.model.moe_layers:
        assert metrics["load_SLE"].shape[1:] == (len(config.model.moe_layers), config.model.num_experts)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_in_closed_form_equal_the_shapes(name):
    model = PRESETS[name].model
    shapes = transformer.build(model).shapes["params"]
    size = count.parameters(model)
    assert size.total == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    experts = sum(leaf.size for path, leaf in leaves if leaf.ndim == 4 and path[-1].key in ("gate", "up", "down"))
    assert size.experts == experts and size.active == size.total - experts * (model.num_experts - model.experts_per_token) // model.num_experts


COMMANDS = [(path.relative_to(ROOT).as_posix(), line.strip()) for path in sorted((ROOT / "configs").rglob("*.py"))
            for line in re.findall(r"^    python -m .*$", path.read_text(), re.M)]
PARSE = """
import importlib, json, os, sys, tempfile
from absl import flags
from llada_jax import config
from llada_jax.sampling import presets
name, *cases = json.load(sys.stdin)
importlib.import_module(name)
for case in cases:
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if not child:
            os.dup2(file.fileno(), 2)
            sys.argv[:] = [name, *case]
            flags.FLAGS(presets.split_flags(sys.argv)[1] if name in ("llada_jax.sample", "llada_jax.evaluate") else sys.argv)
            if "config" in flags.FLAGS and flags.FLAGS.config is not None:
                config.from_config_dict(flags.FLAGS.config)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, file.seek(0) or file.read().decode()]))
"""


@functools.cache
def parsed(module: str) -> dict[str, tuple[int, str]]:
    """{command: (status, what it said)} of every command of a module, in forks of one process."""
    lines = [line for _, line in COMMANDS if shlex.split(line)[2] == module]
    done = subprocess.run([sys.executable, "-c", PARSE], input=json.dumps([module, *(shlex.split(line)[3:] for line in lines)]), cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.count("\n") == len(lines), done.stderr
    return dict(zip(lines, map(json.loads, done.stdout.splitlines()), strict=True))


def test_every_config_says_what_runs_it():
    run = {file for file, line in COMMANDS if re.search(rf"llada_jax\.(train|bench train) --config={re.escape(file)}\b", line)}
    assert run == {f"configs/{name.partition(':')[0]}" for name in PRESETS}


@pytest.mark.parametrize("file, line", COMMANDS, ids=[line[10:70] for _, line in COMMANDS])
def test_the_command_of_the_docstring_parses(file, line):
    status, said = parsed(shlex.split(line)[2])[line]
    assert status == 0, said
