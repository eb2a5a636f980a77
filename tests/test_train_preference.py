"""`train` with diffusion.objective=preference: what it begins with stays in its checkpoints, and a run that is stopped ends as if it was not."""

import json
import shutil

import jax
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning, tokenizer
from llada_jax.evaluation import footprint
from llada_jax.model import transformer
from llada_jax.training import checkpoint, optimizer, state
from tests import tiny_run
from tests.test_data_pairs import pairs, write

OBJECTIVE = ["diffusion.objective=preference", "diffusion.preference_draws=2", "diffusion.variable_length_rate=0.0", "data.pack=False",
             "data.answer_padding=block:4", "train.steps=8", "train.eval_batches=2", "optimizer.learning_rate=3e-3"]


def config_of(**groups):
    config = tiny_run.get_config()
    for group, values in groups.items():
        config[group].update(values)
    return config_lib.with_vocab_size(config_lib.from_config_dict(config), tokenizer.Bytes().vocab_size)


def state_of(config):
    model = transformer.build(config.model)
    return state.create(model, optimizer.make(config.optimizer, config.train.steps, model.shapes["params"]), config)


def restored(workdir, step, config=None):
    """The state in a checkpoint, of its own config unless told otherwise."""
    config = config or checkpoint.read_config(str(workdir), step)[1]
    one = partitioning.replicated(partitioning.make_mesh(devices=jax.devices()[:1]))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), jax.eval_shape(lambda: state_of(config)))
    saver = checkpoint.Checkpointer(str(workdir), 9, 0)
    try:
        return saver.restore(like, step)
    finally:
        saver.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("preference")
    write(path / "pairs.jsonl", pairs("a", 40))
    begin = config_of(train=dict(seed=5))
    tokenizer.Bytes().save(path)
    (path / "base").mkdir()
    tokenizer.Bytes().save(path / "base")
    saver = checkpoint.Checkpointer(str(path / "base"), 1, 0)
    saver.save(state_of(begin), begin)
    saver.wait()
    saver.close()
    return path


@pytest.fixture()
def arguments(folder):
    return lambda name, *more: tiny_run.arguments(str(folder / "pairs.jsonl"), folder / name, *(f"--config.{key}" for key in OBJECTIVE), *more)


@pytest.mark.slow
def test_a_run_keeps_what_it_began_with_and_resumes_to_the_same_weights(folder, arguments):
    begin = f"--init_from={folder / 'base'}"
    whole, tuned, without, odd = tiny_run.train_each([
        arguments("run", begin), arguments("tuned", begin, "--config.model.lora_rank=2", "--config.train.steps=2"), arguments("none"),
        arguments("odd", begin, "--config.train.batch_size=3")])
    assert whole.returncode == 0, whole.stderr
    assert "two a pair" in whole.stdout and "and moments, reference" in whole.stdout and "reward accuracy" in whole.stdout
    for done, words in ((without, "name them in --init_from"), (odd, "batch_size=3 counts rows, two a pair")):
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (folder / "none").exists()

    lines = tiny_run.lines(folder / "run")
    steps, held = [line for line in lines if "loss" in line], [line for line in lines if "heldout_reward_margin" in line]
    assert np.isclose(steps[0]["loss"], np.log(2), atol=1e-5) and steps[0]["reward_margin"] == 0 == held[0]["heldout_reward_margin"]
    assert len(steps) == 8 and len(held) == 2 and held[-1]["heldout_reward_margin"] > 0 and 0 < held[-1]["heldout_reward_accuracy"] <= 1
    assert held[0]["heldout_rows"] == 8 and held[-1]["heldout_bits_per_byte"] > 0 and (folder / "run/curves.png").exists()
    base = checkpoint.tree_hash(restored(folder / "base", 0).variables["params"])
    for step in (4, 8):
        kept = restored(folder / "run", step)
        assert checkpoint.tree_hash(kept.reference) == base != checkpoint.tree_hash(kept.variables["params"])

    shutil.copytree(folder / "run", folder / "stopped")
    shutil.rmtree(folder / "stopped/checkpoints/8")
    resumed, masked = tiny_run.train_each([arguments("stopped", begin), arguments("stopped", "--config.diffusion.objective=masked")])
    assert resumed.returncode == 0 and "resumed at step 4" in resumed.stdout, resumed.stderr
    assert (tiny_run.lines(folder / "stopped"), tiny_run.weights(resumed.stdout)) == (lines, tiny_run.weights(whole.stdout))
    assert checkpoint.tree_hash(restored(folder / "stopped", 8).reference) == base
    assert masked.returncode == 1 and "diffusion.objective: 'preference' → 'masked'" in masked.stderr

    # adapters are compared with their base
    assert tuned.returncode == 0 and ", reference" not in tuned.stdout, tuned.stderr
    first, second = (line for line in tiny_run.lines(folder / "tuned") if "loss" in line)
    assert np.isclose(first["loss"], np.log(2), atol=1e-5) and second["reward_margin"] != 0
    assert not (folder / "tuned/checkpoints/2/reference").exists() and (folder / "run/checkpoints/8/reference").exists()


def test_a_checkpoint_without_a_reference_says_so(folder):
    compared = config_of(data=dict(pack=False), diffusion=dict(objective="preference", variable_length_rate=0.0))
    with pytest.raises(checkpoint.CheckpointError, match=r"holds no reference, as diffusion\.objective was not preference; .* --init_from"):
        restored(folder / "base", 0, compared)


def test_the_estimate_of_memory_counts_the_reference():
    settings = dict(data=dict(pack=False), diffusion=dict(objective="preference", variable_length_rate=0.0), mesh=dict(data=1))
    whole, tuned, plain = (footprint.of_training(config_of(**groups)) for groups in (
        settings, settings | dict(model=dict(lora_rank=2)), dict(mesh=dict(data=1))))
    assert whole.reference == whole.weights == plain.weights > 0 == plain.reference == tuned.reference
    assert whole.total >= plain.total + whole.reference


@pytest.mark.slow
def test_its_folder_is_used_as_any_other(folder, arguments):
    """Sampling, evaluation and export leave the reference alone; another run merges its adapters before it begins."""
    done, tuned = tiny_run.train_each([
        arguments("used", f"--init_from={folder / 'base'}", "--config.train.steps=2"),
        arguments("adapters", f"--init_from={folder / 'base'}", "--config.train.steps=2", "--config.model.lora_rank=2")])
    assert done.returncode == tuned.returncode == 0, done.stderr + tuned.stderr
    run = f"--workdir={folder / 'used'}"
    [evaluated] = tiny_run.each("evaluate", [[run]])
    assert json.loads(evaluated.stdout.splitlines()[-1])["heldout"]["rows"] > 0, evaluated.stderr
    [sampled] = tiny_run.each("sample", [[run, "--prompt=a01", "--decoder.gen_length=4", "--decoder.block_length=4", "--html="]])
    assert sampled.returncode == 0, sampled.stderr
    [again] = tiny_run.train_each([arguments("again", f"--init_from={folder / 'adapters'}", "--config.train.steps=2", "--config.model.lora_rank=2")])
    assert again.returncode == 0 and "its adapters merged into its weights" in again.stdout, again.stderr
    first = next(line for line in tiny_run.lines(folder / "again") if "loss" in line)
    assert np.isclose(first["loss"], np.log(2), atol=1e-5) and first["reward_margin"] == 0
