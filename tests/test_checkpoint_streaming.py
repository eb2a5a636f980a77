"""Weights that are written and read one array at a time: the same bytes, the memory they take, what a failure leaves."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.training import checkpoint, streaming
from tests import tiny_run
from tests.test_checkpoint import CONFIG, STORED, load, on_one_device, save, state_of

LIKE = jax.ShapeDtypeStruct
SHAPES = {
    "params": {"embedding": LIKE((16, 8), jnp.bfloat16), "final_norm": LIKE((8,), jnp.float32),
               "stack_0": {"gate": LIKE((8, 2, 1 << 12, 1), jnp.bfloat16), "router": LIKE((3, 8, 2), jnp.float32)}},
    "router_bias": {"bias": LIKE((3, 2), jnp.float32)},
}
PATHS = ["params/embedding", "params/final_norm", "params/stack_0/gate", "params/stack_0/router", "router_bias/bias"]


def every_bit_pattern(path):
    """bfloat16: all of them, so every NaN and subnormal; float32: drawn, with NaN payloads and subnormals in front."""
    x = SHAPES
    for key in path.split("/"):
        x = x[key]
    if x.dtype == jnp.bfloat16:
        return np.resize(np.arange(1 << 16, dtype=np.uint16), x.shape).view(x.dtype)
    bits = np.random.default_rng(0).integers(1 << 32, size=x.shape, dtype=np.uint32)
    bits.flat[:5] = 0x7FC01234, 0xFF800001, 1, 0x807FFFFF, 0x80000000
    return bits.view(np.float32)


def bits(x):
    return np.asarray(x).tobytes()


def mesh_of(count, **axes):
    return partitioning.make_mesh(config_lib.Mesh(**{"data": 1, **axes}), jax.devices()[:count])


def load_on(workdir, sharding):
    return checkpoint.load_variables(str(workdir), 0, SHAPES, jax.tree.map(sharding, SHAPES))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir, asked = tmp_path_factory.mktemp("written") / "run", []
    checkpoint.save_variables(str(workdir), CONFIG, SHAPES, lambda path: asked.append(path) or every_bit_pattern(path))
    assert sorted(asked) == PATHS
    return workdir


def test_every_bit_comes_back(written):
    assert checkpoint.steps_of(str(written)) == [0] and checkpoint.read_config(str(written)) == (0, CONFIG)
    loaded = checkpoint._by_path(load_on(written, lambda x: partitioning.replicated(mesh_of(1))))
    leaves = checkpoint.read_leaves(str(written), 0)
    assert sorted(leaves) == sorted(loaded) == PATHS and leaves.shapes == checkpoint._by_path(SHAPES)
    for path, array in leaves.items():
        assert type(array) is np.ndarray and array.dtype == loaded[path].dtype == leaves.shapes[path].dtype
        assert bits(array) == bits(loaded[path]) == bits(every_bit_pattern(path)), path


@pytest.mark.parametrize("axes", [dict(fsdp=2, expert=2, tensor=2), dict(expert=2, fsdp=4), dict(data=8)])
def test_each_device_gets_its_part(written, axes):
    mesh = mesh_of(8, **axes)
    names = {4: ("", "experts", "embed", "mlp"), 3: ("", "embed", ""), 2: ("vocab", "embed"), 1: ("",)}
    loaded = load_on(written, lambda x: partitioning.sharding(mesh, *names[len(x.shape)], shape=x.shape))
    for path, x in checkpoint._by_path(loaded).items():
        expected = every_bit_pattern(path)
        for shard in x.addressable_shards:
            assert bits(shard.data) == bits(expected[shard.index]), path
    gate = loaded["params"]["stack_0"]["gate"]
    assert gate.addressable_shards[0].data.size * axes.get("expert", 1) * axes.get("fsdp", 1) == gate.size


def test_a_narrower_dtype_is_rounded_on_the_way(written):
    here = partitioning.replicated(mesh_of(1))
    found = checkpoint.read_leaves(str(written), 0).read({"params/stack_0/router": LIKE((3, 8, 2), jnp.bfloat16, sharding=here)})
    wide = every_bit_pattern("params/stack_0/router")
    numbers = ~np.isnan(wide)
    assert bits(np.asarray(found["params/stack_0/router"])[numbers]) == bits(wide[numbers].astype(jnp.bfloat16))


def test_leaves_of_a_run(tmp_path):
    save(tmp_path / "run", [7])
    for workdir, step in (tmp_path / "run", 7), (STORED, 5):
        for weights in "params", "ema":
            expected = checkpoint._by_path(load(workdir, step, weights))
            leaves = checkpoint.read_leaves(str(workdir), step, weights)
            assert sorted(leaves) == sorted(expected)
            assert all(bits(array) == bits(expected[path]) for path, array in leaves.items())
    with pytest.raises(KeyError):
        leaves["params/none"]


def test_a_model_that_does_not_fit_is_refused(written):
    more = {**SHAPES, "params": {**SHAPES["params"], "head": LIKE((8, 16), jnp.bfloat16)}}
    less = {"params": SHAPES["params"]}
    for shapes, holds, wants in (more, "nothing", r"params/head \[8, 16\]"), (less, r"router_bias/bias \[3, 2\]", "nothing"):
        with pytest.raises(checkpoint.CheckpointError, match=f"its variables item holds {holds}, this config wants {wants}"):
            checkpoint.load_variables(str(written), 0, shapes, jax.tree.map(lambda x: partitioning.replicated(mesh_of(1)), shapes))


def test_weights_alone_are_not_resumed(tmp_path):
    variables = state_of().variables
    leaves = checkpoint._by_path(variables)
    checkpoint.save_variables(str(tmp_path), CONFIG, jax.eval_shape(lambda: variables), lambda path: np.asarray(leaves[path]))
    run = checkpoint.Checkpointer(str(tmp_path), 2, 0)
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint 0 in .* holds weights alone; start a new run with --init_from=.*@0"):
        run.restore(on_one_device(state_of()), 0)
    run.close()
    found, missing, extra = checkpoint.load_matching(str(tmp_path), 0, state_of(start=9).variables)
    assert checkpoint.tree_hash(found) == checkpoint.tree_hash(variables) and not missing and not extra


def test_a_chunk_holds_one_layer():
    split = lambda *shape: streaming._split_axes(LIKE(shape, jnp.bfloat16))
    assert split(16, 64, 2048, 1024) == (0,) and split(157184, 2048) == split(16, 2048, 16, 128) == split(8) == split() == ()


class Interrupted(BaseException):
    pass


def refuses(error):
    def leaf(path):
        if path == PATHS[2]:
            raise error
        return every_bit_pattern(path)
    return leaf


@pytest.mark.parametrize("leaf, error, words", [
    (refuses(config_lib.ConfigError("shard 3 is cut off")), config_lib.ConfigError, "^shard 3 is cut off$"),
    (refuses(OSError(28, "No space left on device")), checkpoint.CheckpointError, r"writing checkpoint 0 to .*No space left.*run the same command"),
    (refuses(Interrupted()), Interrupted, None),
    (lambda path: every_bit_pattern(path)[:2], checkpoint.CheckpointError, r"params/embedding is bfloat16\[2, 8\], it should be bfloat16\[16, 8\]"),
    (lambda path: every_bit_pattern(path).astype(np.float16), checkpoint.CheckpointError, "params/embedding is float16"),
])
def test_a_failure_leaves_nothing_and_the_next_try_works(tmp_path, leaf, error, words):
    with pytest.raises(error, match=words) as raised:
        checkpoint.save_variables(str(tmp_path), CONFIG, SHAPES, leaf)
    assert "\n" not in str(raised.value)
    assert checkpoint.steps_of(str(tmp_path)) == []
    assert error is Interrupted or not list((tmp_path / "checkpoints").iterdir())
    checkpoint.save_variables(str(tmp_path), CONFIG, SHAPES, every_bit_pattern)
    assert bits(checkpoint.read_leaves(str(tmp_path), 0)[PATHS[2]]) == bits(every_bit_pattern(PATHS[2]))
    with pytest.raises(checkpoint.CheckpointError, match="holds a checkpoint of step 0 already; write to another folder"):
        checkpoint.save_variables(str(tmp_path), CONFIG, SHAPES, every_bit_pattern)


PROGRAM = """
import os, resource, signal, sys
sys.path.insert(0, os.getcwd())
from tests.test_checkpoint_streaming import *
workdir, what = sys.argv[1:]
def leaf(path):
    if path == PATHS[2]:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    return every_bit_pattern(path)
try:
    checkpoint.save_variables(workdir, CONFIG, SHAPES, leaf)
except checkpoint.CheckpointError as error:
    sys.exit(str(error))
"""


def run(program, *arguments):
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, env=tiny_run.environment())


def test_a_full_disk_and_a_kill(tmp_path):
    full = run(PROGRAM, tmp_path, "full")
    assert full.returncode == 1 and full.stderr.count("\n") == 1 and "File too large" in full.stderr, full.stderr
    assert not list((tmp_path / "checkpoints").iterdir())
    killed = run(PROGRAM, tmp_path, "kill")
    assert killed.returncode == -9 and checkpoint.steps_of(str(tmp_path)) == []
    assert list((tmp_path / "checkpoints").iterdir()), "the kill came in the middle"
    held = checkpoint.Checkpointer(str(tmp_path), 1, 0)  # also what a training run would do there
    other = run(PROGRAM, tmp_path, "full")
    assert other.returncode == 1 and "another process is training in" in other.stderr
    held.close()
    checkpoint.save_variables(str(tmp_path), CONFIG, SHAPES, every_bit_pattern)
    assert checkpoint.steps_of(str(tmp_path)) == [0]


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_chunk_is_named(tmp_path, damage):
    checkpoint.save_variables(str(tmp_path), CONFIG, SHAPES, every_bit_pattern)
    chunk, = (path for path in (tmp_path / "checkpoints/0/variables/params.embedding").iterdir() if not path.name.startswith("."))
    chunk.unlink() if damage == "missing" else chunk.write_bytes(chunk.read_bytes()[:20])
    for read in lambda: checkpoint.read_leaves(str(tmp_path), 0)[PATHS[0]], lambda: load_on(tmp_path, lambda x: partitioning.replicated(mesh_of(1))):
        with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint 0 in .* cannot be read") as error:
            read()
        assert "\n" not in str(error.value)


def test_too_little_memory_is_not_called_damage(written, monkeypatch):
    def read(folder, like):
        raise MemoryError("Unable to allocate 4.00 GiB")
    monkeypatch.setattr(streaming, "read", read)
    with pytest.raises(checkpoint.CheckpointError, match=r"does not fit into memory \(Unable to allocate 4.00 GiB\)"):
        checkpoint.read_leaves(str(written), 0)[PATHS[0]]


MEMORY = """
import json, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from llada_jax import config as config_lib, partitioning
from llada_jax.training import checkpoint
SIZE, COUNT = 1 << 25, 20
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
def leaves_taken(run):
    start, peak, over = anonymous(), [0], threading.Event()
    def watch():
        while not over.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    result = run()
    over.set(), thread.join()
    return (peak[0] - start) / SIZE, result
shapes = {"params": {f"leaf_{i}": jax.ShapeDtypeStruct((4, 1 << 22), jnp.bfloat16) for i in range(COUNT)}}
numbers = np.random.default_rng(0).integers(1 << 16, size=(4, 1 << 22), dtype=np.uint16)
def leaf(path):
    return (numbers ^ np.uint16(int(path.split("_")[1]))).view(jnp.bfloat16)
mesh = partitioning.make_mesh(config_lib.Mesh(data=1))
shardings = jax.tree.map(lambda x: partitioning.replicated(mesh), shapes)
def read():
    for path, array in checkpoint.read_leaves(sys.argv[1], 0).items():
        assert array.tobytes() == leaf(path).tobytes()
written, _ = leaves_taken(lambda: checkpoint.save_variables(sys.argv[1], config_lib.Config(), shapes, leaf))
read, _ = leaves_taken(read)
loaded, _ = leaves_taken(lambda: checkpoint.load_variables(sys.argv[1], 0, shapes, shardings))
print(json.dumps([written, read, loaded - COUNT]))
"""


def test_the_memory_is_that_of_a_few_leaves(tmp_path):
    done = run(MEMORY, tmp_path)
    assert done.returncode == 0, done.stderr
    written, read, beside_the_weights = json.loads(done.stdout)
    assert 1 < written < 6 and 1 < read < 6 and beside_the_weights < 6, done.stdout


def test_free_memory_heeds_the_control_groups(tmp_path):
    own = tmp_path / "own"
    here = lambda: streaming.free_memory(str(tmp_path), str(own))
    host = here()
    assert host > 1 << 20

    def group(folder: pathlib.Path, limit: str, names: tuple[str, str, str]):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names[:2], "memory.stat"), (limit, "3000", f"anon 1\n{names[2]} 500\n"), strict=True):
            (folder / name).write_text(text)
    second, first = ("memory.max", "memory.current", "inactive_file"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    own.write_text("0::/a/b\n")
    group(tmp_path / "a/b", "max", second)
    assert here() > host / 2
    group(tmp_path / "a", "10000", second)
    assert here() == 10000 - 3000 + 500
    own.write_text("4:cpu,memory:/c\n")
    group(tmp_path / "memory/c", "2000", first)
    assert here() == 0
