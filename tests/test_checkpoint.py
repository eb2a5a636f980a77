"""Checkpoints: the stored one of layout version 1, what is kept, damage, a full disk, parts of one, gs://.

`python -m tests.test_checkpoint` wrote tests/data/checkpoint_v1; it stays as it is for ever. A new layout version gets a new folder.
"""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.model import transformer
from llada_jax.training import checkpoint, optimizer, state
from tests import tiny_run

STORED = pathlib.Path(__file__).parent / "data/checkpoint_v1"
MODEL = config_lib.Model(vocab_size=16, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=2, experts_per_token=1, expert_size=4,
                         dense_layers=(0,), dense_size=4, shared_expert_size=4, router_bias=True, max_length=32)
CONFIG = config_lib.Config(model=MODEL, data=config_lib.Data(sequence_length=16), optimizer=config_lib.Optimizer(ema_decay=0.5))


def fill(tree, start):
    """Numbers that depend on the leaf's place alone."""
    leaves, structure = jax.tree.flatten(tree)
    numbers = lambda i, x: jnp.asarray((np.arange(x.size).reshape(x.shape) % 97 + start + i) / 64, x.dtype)
    return jax.tree.unflatten(structure, [numbers(i, x) for i, x in enumerate(leaves)])


def state_of(config=CONFIG, step=0, start=0):
    model = transformer.build(config.model)
    like = jax.eval_shape(lambda: state.create(model, optimizer.make(config.optimizer, config.train.steps, model.shapes["params"]), config))
    return fill(like, start)._replace(step=jnp.int32(step))


def on_one_device(tree):
    mesh = partitioning.make_mesh(config_lib.Mesh(data=1), jax.devices()[:1])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=partitioning.replicated(mesh)), tree)


def save(workdir, steps, config=CONFIG, keep_last=2, keep_every=0):
    checkpoints = checkpoint.Checkpointer(str(workdir), keep_last, keep_every)
    for step in steps:
        checkpoints.save(state_of(config, step, start=step), config)
    checkpoints.wait()
    checkpoints.close()


def restore(workdir, step, config=CONFIG):
    checkpoints = checkpoint.Checkpointer(str(workdir), 2, 0)
    try:
        return checkpoints.restore(on_one_device(state_of(config)), step)
    finally:
        checkpoints.close()


def load(workdir, step, weights="params"):
    like = on_one_device(state_of().variables)
    return checkpoint.load_variables(str(workdir), step, like, jax.tree.map(lambda x: x.sharding, like), weights)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with checkpoints 3 and 7; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    save(folder, [3, 7])
    return folder


@pytest.fixture()
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def test_the_stored_checkpoint_is_read_for_ever(tmp_path):
    folder = shutil.copytree(STORED, tmp_path / "run")  # opening one cleans up in its folder
    assert checkpoint.steps_of(str(folder)) == [5]
    step, config = checkpoint.read_config(str(folder))
    assert step == 5 and config.model == MODEL and config.optimizer.ema_decay == 0.5
    found = restore(folder, 5)
    assert checkpoint.tree_hash(found.variables) == HASHES["variables"] and checkpoint.tree_hash(found.ema) == HASHES["ema"]
    assert checkpoint.tree_hash(load(folder, 5)) == HASHES["variables"]
    assert checkpoint.tree_hash(load(folder, 5, "ema")["params"]) == HASHES["ema"]
    assert int(found.step) == 5 and checkpoint.tree_hash(found) == checkpoint.tree_hash(state_of(step=5, start=5))


def test_the_whole_state_comes_back(saved):
    for step in 3, 7:
        assert checkpoint.tree_hash(restore(saved, step)) == checkpoint.tree_hash(state_of(step=step, start=step))


def test_what_is_kept(tmp_path):
    save(tmp_path / "run", range(1, 8), keep_last=2, keep_every=3)
    assert checkpoint.steps_of(str(tmp_path / "run")) == [3, 6, 7]


def test_left_over_temporary_folders_do_not_count_and_go(copy):
    left_over = shutil.copytree(copy / "checkpoints/7", copy / "checkpoints/9.orbax-checkpoint-tmp")
    assert checkpoint.steps_of(str(copy)) == [3, 7]
    checkpoint.Checkpointer(str(copy), 2, 0).close()
    assert not left_over.exists() and checkpoint.steps_of(str(copy)) == [3, 7]


def test_weights_alone(saved):
    expected = state_of(step=7, start=7)
    assert checkpoint.tree_hash(load(saved, 7)) == checkpoint.tree_hash(expected.variables)
    average = load(saved, 7, "ema")
    assert checkpoint.tree_hash(average["params"]) == checkpoint.tree_hash(expected.ema)
    assert checkpoint.tree_hash(average["router_bias"]) == checkpoint.tree_hash(expected.variables["router_bias"])


def test_matching_tensors_are_taken_and_the_others_named(saved):
    other = config_lib.Config(model=config_lib.Model(**{**vars(MODEL), "shared_expert_size": 8, "tie_embeddings": True}))
    initial = state_of(other, start=50).variables
    found, missing, extra = checkpoint.load_matching(str(saved), 7, initial)
    assert {path.split("/")[-1] for path in missing} == {"shared_gate", "shared_up", "shared_down"}
    assert {path.split("/")[-1] for path in extra} == {"shared_gate", "shared_up", "shared_down", "head"}
    theirs = {optimizer.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state_of(step=7, start=7).variables)}
    for (path, leaf), before in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(initial), strict=True):
        path = optimizer.path_of(path)
        np.testing.assert_array_equal(leaf, before if path in missing else theirs[path])


def missing_item(folder):
    shutil.rmtree(folder / "checkpoints/7/variables")


def truncated_file(folder):
    for path in (folder / "checkpoints/7/variables/d").iterdir():
        path.write_bytes(path.read_bytes()[:40])


def no_weights(folder):
    shutil.rmtree(folder / "checkpoints/7/variables/d")


@pytest.mark.parametrize("damage", [missing_item, truncated_file, no_weights])
def test_damage_is_named_with_the_way_out(copy, damage):
    damage(copy)
    for read in restore, load:
        with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint 7 in .* cannot be read .*; remove .*7 to go on from step 3") as error:
            read(copy, 7)
        assert "\n" not in str(error.value)
    assert checkpoint.tree_hash(restore(copy, 3)) == checkpoint.tree_hash(state_of(step=3, start=3))


def test_damaged_or_foreign_meta(copy):
    path = copy / "checkpoints/7/meta/metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "layout_version": 99}))
    with pytest.raises(checkpoint.CheckpointError, match="layout version 99, this code reads 1"):
        checkpoint.read_meta(str(copy))
    path.write_text(json.dumps(meta)[:30])
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint 7 in .* cannot be read"):
        checkpoint.read_meta(str(copy))
    path.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot be read .*remove"):
        checkpoint.read_meta(str(copy))


def test_what_is_missing_is_named(saved, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint in .*none"):
        checkpoint.read_meta(str(tmp_path / "none"))
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of step 4; it has 3, 7"):
        checkpoint.read_meta(str(saved), 4)
    save(tmp_path / "plain", [1], config_lib.Config(model=MODEL))
    with pytest.raises(checkpoint.CheckpointError, match="holds no average"):
        load(tmp_path / "plain", 1, "ema")


def test_a_model_that_does_not_fit_is_refused(saved):
    wider = config_lib.Config(model=config_lib.Model(**{**vars(MODEL), "expert_size": 6}), optimizer=CONFIG.optimizer)
    with pytest.raises(checkpoint.CheckpointError, match=r"does not fit: its variables item holds params/.*--init_from"):
        restore(saved, 7, wider)
    with pytest.raises(checkpoint.CheckpointError, match=r"does not fit: its training item holds"):
        restore(saved, 7, config_lib.Config(model=MODEL, optimizer=config_lib.Optimizer(name="muon", ema_decay=0.5)))


def test_versions_stand_beside_the_weights(saved):
    _, meta = checkpoint.read_meta(str(saved))
    assert meta["step"] == 7 and meta["layout_version"] == checkpoint.LAYOUT_VERSION
    assert meta["versions"]["jax"] == jax.__version__ and "orbax-checkpoint" in meta["versions"]


FULL_DISK = """
import resource, signal, sys
from llada_jax import command_line, train
from llada_jax.training import checkpoint
save, limit = checkpoint.Checkpointer.save, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
def save_with_little_room(self, state, config):
    if int(state.step) == 16:
        self.wait()
        limit()
    save(self, state, config)
checkpoint.Checkpointer.save = save_with_little_room
command_line.run(train.main)
"""


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    arguments = tiny_run.arguments(tiny_run.write_texts(tmp_path / "texts"), tmp_path / "run", "--config.train.eval_every=0")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, env=tiny_run.environment())
    assert done.returncode == 1 and done.stderr.startswith("error: saving to ") and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr and "the last good checkpoint is step 12" in done.stderr
    assert checkpoint.steps_of(str(tmp_path / "run")) == [8, 12]
    again, apart = tiny_run.train_each([arguments, [*arguments, f"--workdir={tmp_path / 'apart'}"]])
    assert "resumed at step 12" in again.stdout, again.stderr
    assert tiny_run.weights(again.stdout) == tiny_run.weights(apart.stdout)
    assert tiny_run.lines(tmp_path / "run") == tiny_run.lines(tmp_path / "apart")


IN_A_BUCKET = """
import sys
from tests import gs_stand_in
gs_stand_in.install(sys.argv.pop(1))
from llada_jax import command_line, train
command_line.run(train.main)
"""


def test_a_run_in_a_bucket(tmp_path):
    arguments = tiny_run.arguments(tiny_run.write_texts(tmp_path / "texts"), "gs://bucket/run")
    command = [sys.executable, "-c", IN_A_BUCKET, str(tmp_path / "buckets"), *arguments]
    run = tmp_path / "buckets/bucket/run"
    lines = []
    for words in "finished 24 steps", "resumed at step 20":
        done = subprocess.run(command, capture_output=True, text=True, env=tiny_run.environment())
        assert done.returncode == 0 and words in done.stdout, done.stderr
        lines.append(tiny_run.lines(run))
        # where no folder can be renamed, a kill in the middle of a save leaves one of the final name without its mark
        (run / "checkpoints/24/commit_success.txt").unlink()
    assert lines[0] == lines[1]
    assert (run / "curves.png").stat().st_size > 1000 and (run / "tokenizer.bytes.json").exists() and (run / "config.json").exists()
    assert not pathlib.Path("gs:").exists()


def test_a_damaged_checkpoint_and_a_new_start_from_a_good_one(tmp_path):
    arguments = lambda workdir, *more: tiny_run.arguments(str(tmp_path / "texts/*.txt"), tmp_path / workdir, *more)
    tiny_run.write_texts(tmp_path / "texts")
    source = tmp_path / "first"
    first, anew, none = tiny_run.train_each([
        arguments("first"), arguments("anew", f"--init_from={source}@24"), arguments("none", f"--init_from={source}@5")])
    assert first.returncode == anew.returncode == 0, first.stderr + anew.stderr
    assert "step 24: 15 tensors; missing (kept at their initial values): none; extra (ignored): none" in anew.stdout
    heldout = [[line for line in tiny_run.lines(tmp_path / workdir) if "heldout_bits_per_byte" in line] for workdir in ("first", "anew")]
    assert [line["step"] for line in heldout[1]] == [0, 8, 16, 24]
    assert heldout[1][0] == {**heldout[0][-1], "step": 0}, "the new run starts with the weights that the first ended with"
    assert none.returncode == 1 and "no checkpoint of step 5; it has 20, 24" in none.stderr and not (tmp_path / "none").exists()
    for path in (source / "checkpoints/24/training/d").iterdir():
        path.write_bytes(b"")
    for path in (source / "checkpoints/20/variables/d").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    shutil.rmtree(tmp_path / "anew/checkpoints/24/meta")
    damaged, weights, no_meta = tiny_run.train_each([arguments("first"), arguments("none", f"--init_from={source}@20"), arguments("anew")])
    for done in damaged, weights, no_meta:
        assert done.returncode == 1 and done.stderr.startswith("error: checkpoint 2") and done.stderr.count("\n") == 1, done.stderr
        assert "cannot be read" in done.stderr and "remove" in done.stderr
    assert not (tmp_path / "none").exists()
    shutil.rmtree(source / "checkpoints/24")
    assert "checkpoint 20 in" in tiny_run.train(*arguments("first")).stderr


HASHES = {
    "variables": "36594297ef85122e01839f79a5ad8fcdb15ccc35218289498b8272494fc7ae2f",
    "ema": "4e3f73c204efb25b92ab83390f8c87bcf521461574c1be3d5dabc892fc3c0d4d",
}

if __name__ == "__main__":
    save(STORED, [5])
    print({name: checkpoint.tree_hash(getattr(state_of(step=5, start=5), name)) for name in HASHES})


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    holder = checkpoint.Checkpointer(str(tmp_path / "run"), 1, 0)
    arguments = tiny_run.arguments(tiny_run.write_texts(tmp_path / "texts"), tmp_path / "run")
    done = subprocess.run([sys.executable, "-m", "llada_jax.train", *arguments], capture_output=True, text=True, env=tiny_run.environment())
    assert done.returncode == 1 and done.stderr.startswith("error: another process is training in ") and done.stderr.count("\n") == 1
    holder.close()
