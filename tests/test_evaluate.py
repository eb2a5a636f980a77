"""The command `python -m llada_jax.evaluate`, the held-out figures and the sudoku table."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning, tokenizer
from llada_jax.data import sudoku
from llada_jax.evaluation import heldout, tasks
from llada_jax.model import functional, transformer
from llada_jax.training import checkpoint, optimizer, state

BYTES = tokenizer.Bytes()
MODEL = config_lib.Model(vocab_size=BYTES.vocab_size, hidden_size=16, num_layers=1, num_heads=2, num_experts=2, experts_per_token=1,
                         expert_size=8, max_length=96, init_std=0.2)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "texts").mkdir()
    for i in range(8):
        (folder / "texts" / f"{i}.txt").write_text(f"{i}" + "abc" * 50)
    config = config_lib.Config(model=MODEL, train=config_lib.Train(batch_size=4, eval_draws=2), data=config_lib.Data(
        sources=str(folder / "texts" / "*.txt"), sequence_length=32, tokenizer="bytes", holdout=0.5))
    BYTES.save(folder)
    model = transformer.build(config.model)
    saver = checkpoint.Checkpointer(str(folder), 1, 0)
    saver.save(state.create(model, optimizer.make(config.optimizer, 1, model.shapes["params"]), config), config)
    saver.wait()
    saver.close()
    return folder


def evaluate(*arguments):
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return subprocess.run([sys.executable, "-m", "llada_jax.evaluate", *map(str, arguments)], capture_output=True, text=True, env=environment)


def test_every_printed_figure_stands_in_the_last_line(run_folder):
    done = evaluate(f"--workdir={run_folder}", "--max_rows=6")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    found, text = json.loads(last), "\n".join(lines)
    assert lines[0].startswith(f"step 0 of {run_folder} · weights: params")
    figures = found["heldout"]
    assert (found["step"], found["weights"], figures["rows"], figures["draws"]) == (0, "params", 6, 2)
    assert 6 < figures["bits_per_byte"] < 12 and 0 < figures["bits_per_byte_se"] < 1  # an untrained model spends about 8 bits
    assert set(found["baselines"]) == {"unigram", "bigram", "gzip"}
    for value in (figures["bits_per_byte"], figures["bits_per_byte_se"], *found["baselines"].values(), *filter(None, figures["loss_by_level"])):
        assert f"{value:.4f}" in text
    again = evaluate(f"--checkpoint={os.path.relpath(run_folder)}/checkpoints/0", "--max_rows=6")  # a relative path is as good
    assert json.loads(again.stdout.splitlines()[-1])["heldout"] == figures


@pytest.mark.parametrize("arguments, words", [
    (["--workdir=runs/nowhere"], ["no checkpoint in runs/nowhere/checkpoints", "llada_jax.train"]),
    ([], ["one of --workdir=RUN and --checkpoint=DIR"]),
    (["--workdir={run}", "--step=7"], ["no checkpoint of step 7", "it has 0"]),
    (["--checkpoint={run}/checkpoints/0", "--step=7"], ["step 0", "--step=7"]),
    (["--workdir={run}", "--weights=ema"], ["holds no average"]),
    (["--workdir={run}", "--draws=0"], ["--draws", "0"]),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_status_1(run_folder, arguments, words):
    done = evaluate(*(argument.format(run=run_folder) for argument in arguments))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("objective", ["masked", "autoregressive"])
def test_heldout_figures_follow_from_rows_alone(objective):
    """Neither the batch size nor the rows that fill up the last batch change them; bits, tokens and bytes are in proportion."""
    rng = np.random.RandomState(0)
    B, T = 5, 12
    rows = {"tokens": rng.randint(0, 256, (B, T)).astype(np.int32), "segment": np.ones((B, T), np.int32), "maskable": np.ones((B, T), bool),
            "position": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), "bytes": np.full((B, T), 2, np.int32)}
    rows["maskable"][0, :4] = False
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    model = transformer.build(MODEL)
    variables, found = model.init(jax.random.key(0)), []
    for batch_size in (2, 4):
        config = config_lib.Config(model=MODEL, diffusion=config_lib.Diffusion(objective=objective), train=config_lib.Train(batch_size=batch_size))
        found.append(heldout.make(model, config, mesh, BYTES.mask_id)(variables, rows, 3))
    a, b = found
    assert (a["tokens"], a["bytes"], a["rows"]) == (B * T - 4, 2 * (B * T - 4), B) and a["draws"] == (3 if objective == "masked" else 1)
    for key in ("bits_per_byte", "bits_per_byte_se", "nats_per_token"):
        assert np.isclose(a[key], b[key], rtol=1e-5), key
    assert np.isclose(a["bits_per_byte"] * a["bytes"] * np.log(2), a["nats_per_token"] * a["tokens"])
    assert len(a["loss_by_level"]) == (8 if objective == "masked" else 0)


def test_sudoku_table_counts_whole_grids():
    """With exact marginals every puzzle is solved in any number of forwards; one wrong cell makes a grid wrong."""
    characters = tokenizer.Characters(sudoku.ALPHABET)
    grids = jnp.asarray(np.array([characters.encode("".join(map(str, grid))) for grid in sudoku.grids().tolist()]))
    mesh = partitioning.make_mesh(devices=jax.devices()[:2])

    def marginals(tokens_BT):
        fits_BG = ((tokens_BT[:, None] == grids) | (tokens_BT[:, None] == characters.mask_id)).all(-1)
        return jnp.einsum("BG,GTV->BTV", fits_BG / fits_BG.sum(-1, keepdims=True), jax.nn.one_hot(grids, characters.vocab_size))

    def apply(variables, tokens_BT, *rest):
        return functional.at_positions(marginals(tokens_BT), rest[-1]), None, None

    head = lambda variables, hidden: jnp.log(hidden + 1e-9)
    model = transformer.build(MODEL)._replace(apply=apply, head=head)
    results = tasks.sudoku(model, {}, mesh, characters, count=37, forwards=(10, 4, 1))
    assert [(r["forwards"], r["exact"], r["tokens_per_forward"], r["puzzles"]) for r in results] == [(10, 1, 1, 37), (4, 1, 2.5, 37), (1, 1, 10, 37)]

    def wrong(variables, tokens_BT, *rest):  # the last cell of the first grids
        hidden = marginals(tokens_BT)
        last = jnp.zeros_like(hidden[0, 0]).at[characters.encode("1")[0]].set(1.0)
        return functional.at_positions(hidden.at[:, -1].set(last), rest[-1]), None, None
    puzzles, solutions = sudoku.puzzles(37, 6, tasks.SEED)
    right = (solutions[:, -1] == 1) | (puzzles[:, -1] != 0)
    [result] = tasks.sudoku(model._replace(apply=wrong), {}, mesh, characters, count=37, forwards=(1,))
    assert 0 < result["solved"] == right.sum() < 37 and result["exact"] == right.sum() / 37
    table = tasks.describe_sudoku(results + [result])
    assert "37 held-out" in table and table.count("100.00%") == 3 and f"{result['exact']:.2%}" in table


@pytest.mark.slow
def test_sudoku_is_learned(tmp_path):
    """About half of the config's training solves held-out grids one token at a time, and fewer of them in one forward."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}

    def run(*command):
        return subprocess.run([sys.executable, "-m", *command, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True, env=environment)
    trained = run("llada_jax.train", "--config=configs/sudoku.py", "--config.train.steps=700")
    assert trained.returncode == 0, trained.stderr
    found = json.loads(run("llada_jax.evaluate").stdout.splitlines()[-1])
    exact = {round(line["forwards"]): line["exact"] for line in found["sudoku"]}
    assert list(exact) == [10, 5, 4, 2, 1] and found["sudoku"][0]["puzzles"] == 2000
    assert exact[10] >= 0.98 and exact[1] < exact[2] < exact[10], exact
