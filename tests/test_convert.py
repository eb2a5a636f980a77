"""The command `python -m llada_jax.convert`: published folders through a run folder and back, and what it says when it cannot."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import tokenizer
from llada_jax.interop import shards
from llada_jax.model import transformer
from llada_jax.training import checkpoint, optimizer, pretrained
from llada_jax.training import state as state_lib
from tests import published, tiny_run
from tests.published import CASES, DTYPES, FULL, LLADA2, LLADA_MOE, V, content

FORKS = """
import gc, json, os, runpy, sys, tempfile
import ml_collections.config_flags, tokenizers
from llada_jax import command_line
from llada_jax.data import pipeline
from llada_jax.interop import chat
from llada_jax.sampling import viewer
from llada_jax.config import Model
from llada_jax.model import transformer
from llada_jax.training import pretrained
transformer.build(Model(vocab_size=300, dense_layers=(0,), dense_size=8))  # traces what every model begins with; starts no backend
gc.freeze()
for line in sys.stdin:
    module, arguments, before = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.argv = [module, *arguments]
            exec(before)
            runpy.run_module(f"llada_jax.{module}", run_name="__main__")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [file.seek(0) or file.read().decode() for file in (out, err)]
    print(json.dumps([status, *texts]), flush=True)
"""


@pytest.fixture(scope="module")
def command():
    """command("import", "--out=DIR", …): `python -m llada_jax.convert` in a fork of one process that has imported what it needs: quicker."""
    server = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=tiny_run.environment())

    def run(*arguments, module: str = "convert", before: str = "") -> subprocess.CompletedProcess:
        server.stdin.write(json.dumps([module, [str(argument) for argument in arguments], before]) + "\n")
        server.stdin.flush()
        return subprocess.CompletedProcess(arguments, *json.loads(server.stdout.readline()))

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published LLaDA-MoE in two files."""
    return published.write(tmp_path_factory.mktemp("published") / "moe", LLADA_MOE, published.random_tensors(LLADA_MOE), num_files=2)


def works(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout


def refused(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Exit status 1 and one line on stderr that holds the parts."""
    assert result.returncode == 1, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(part in result.stderr for part in parts), result.stderr


# ---- in and out -------------------------------------------------------------------------------------------------------

KINDS = ["router in float32", "bfloat16", "mixed", "float32", "float16"]


@pytest.mark.parametrize("number, case", enumerate(CASES), ids=CASES)
def test_out_comes_what_went_in(number, case, command, tmp_path):
    """Every byte of every file, whatever the dtypes, the order and the number of files."""
    fields, layout = CASES[case]
    source = published.write(tmp_path / "in", fields, published.random_tensors(fields, layout, DTYPES[KINDS[number % 5]]), num_files=1 + number % 3)
    text = works(command("import", f"--hf_dir={source}", f"--out={tmp_path / 'run'}"))
    assert f"{len(published.tensors(fields, layout)):,} tensors" in text and "100%" in text
    works(command("export", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"))
    assert content(tmp_path / "out") == content(source)


@pytest.mark.parametrize("name, other", [("llada_moe, every option", "fused"), ("llada2_moe, stacked", "per_expert")])
def test_another_layout_and_back(name, other, command, tmp_path):
    fields, layout = CASES[name]
    arrays = published.random_tensors(fields, layout, DTYPES["router in float32"])
    runs = [tmp_path / "run", tmp_path / "again"]
    works(command("import", f"--hf_dir={published.write(tmp_path / 'in', fields, arrays)}", f"--out={runs[0]}"))
    works(command("export", f"--checkpoint={runs[0]}", f"--layout={other}", f"--out={tmp_path / 'other'}", "--shard_gb=1e-5"))
    with shards.Reader(tmp_path / "other") as reader:
        assert {name: tensor.shape for name, tensor in reader.tensors.items()} == published.tensors(fields, other)
        assert len(reader.order) > 1
    works(command("import", f"--hf_dir={tmp_path / 'other'}", f"--out={runs[1]}"))
    works(command("export", f"--checkpoint={runs[1]}", f"--layout={layout}", f"--out={tmp_path / 'back'}"))
    with shards.Reader(tmp_path / "back") as reader:
        assert reader.tensors.keys() == arrays.keys()
        for key, x in arrays.items():
            assert reader.array(key).dtype == x.dtype and reader.array(key).tobytes() == x.tobytes(), key
    kept = {file: text for file, text in content(tmp_path / "back").items() if not file.startswith("model")}
    assert kept == {file: text for file, text in content(tmp_path / "in").items() if not file.startswith("model")}


def test_another_layout_rounds_nothing(command, tmp_path):
    """Where the parts of a joined tensor were stored in different dtypes it takes one that holds all of them."""
    def dtypes(name):  # of experts by number, of norms by layer
        return published.F32 if any(part in name for part in ("experts.0", "up_proj", "1.input_layernorm")) else published.BF16

    arrays = published.random_tensors(LLADA_MOE, dtypes=dtypes)
    source = published.write(tmp_path / "in", LLADA_MOE, arrays)
    works(command("import", f"--hf_dir={source}", f"--out={tmp_path / 'run'}"))
    works(command("export", f"--checkpoint={tmp_path / 'run'}", "--layout=fused", f"--out={tmp_path / 'out'}"))
    with shards.Reader(tmp_path / "out") as reader:
        for layer in range(3):
            parts = [[arrays[f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"].astype(np.float32) for e in range(4)]
                     for part in ("gate", "up", "down")]
            assert np.array_equal(reader.array(f"model.layers.{layer}.mlp.w1"), np.concatenate([np.stack(parts[0]), np.stack(parts[1])], axis=1))
            assert np.array_equal(reader.array(f"model.layers.{layer}.mlp.w2"), np.stack(parts[2]))
            assert reader.array(f"model.layers.{layer}.mlp.w1").dtype == reader.array(f"model.layers.{layer}.mlp.w2").dtype == np.float32
        for key in arrays.keys() & reader.tensors.keys():  # what both layouts have stays as it was
            assert reader.array(key).dtype == arrays[key].dtype and reader.array(key).tobytes() == arrays[key].tobytes(), key


def test_nan_goes_in_and_out_where_it_is_allowed(command, tmp_path):
    source = published.write(tmp_path / "in", LLADA2, published.random_tensors(LLADA2, dtypes=DTYPES["router in float32"], finite=False))
    message = ["model.safetensors: model.", "holds NaN or infinity; convert import --allow_nonfinite"]
    refused(command("import", f"--hf_dir={source}", f"--out={tmp_path / 'run'}"), *message)
    assert os.listdir(tmp_path) == ["in"]
    refused(command("check", f"--hf_dir={source}", "--finite"), *message)
    works(command("import", f"--hf_dir={source}", f"--out={tmp_path / 'run'}", "--allow_nonfinite"))
    works(command("export", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"))
    assert content(tmp_path / "out") == content(source)


def test_made_checked_imported_sampled_exported(command, tmp_path):
    model = [f"--config={tiny_run.__file__}", f"--config.model.vocab_size={V}"]
    made, run = tmp_path / "made", tmp_path / "run"
    assert "18 tensors" in works(command("make", *model, f"--out={made}", "--shard_gb=1e-5"))
    works(command("make", *model, f"--out={tmp_path / 'again'}", "--shard_gb=1e-5"))
    assert content(made) == content(tmp_path / "again")  # by its seed alone
    works(command("make", *model, f"--out={tmp_path / 'other'}", "--shard_gb=1e-5", "--seed=1"))
    assert content(made).keys() == content(tmp_path / "other").keys() and content(made) != content(tmp_path / "other")
    text = works(command("check", f"--hf_dir={made}", "--finite"))
    assert "every tensor is the table's" in text and "every number is finite" in text
    assert "18 tensors" in works(command("check", f"--hf_dir={made}", "--index_only"))
    works(command("import", f"--hf_dir={made}", f"--out={run}"))
    lines = []
    for i, weights in enumerate((made, run)):  # the published folder itself, and what was made of it
        out = tmp_path / f"{i}.jsonl"
        lengths = ["--decoder.gen_length=4", "--decoder.block_length=4"]
        works(command(f"--checkpoint={weights}", "--prompt=ab", f"--out={out}", *lengths, module="sample"))
        lines.append(out.read_text())
    assert lines[0] == lines[1] and len(json.loads(lines[0])["tokens"]) == 6
    works(command("export", f"--checkpoint={run}/checkpoints/0", f"--out={tmp_path / 'out'}"))
    assert content(tmp_path / "out") == content(made)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of train with an average, and its state."""
    folder, byte = tmp_path_factory.mktemp("trained") / "run", tokenizer.Bytes()
    config = config_lib.Config(model=config_lib.Model(vocab_size=byte.vocab_size, hidden_size=16, num_layers=2, num_heads=2, num_experts=2,
                                                      experts_per_token=1, expert_size=8, max_length=64),
                               data=config_lib.Data(sequence_length=32, tokenizer="bytes"), optimizer=config_lib.Optimizer(ema_decay=0.9))
    model = transformer.build(config.model)
    saver = checkpoint.Checkpointer(str(folder), 1, 0)
    state = state_lib.create(model, optimizer.make(config.optimizer, 1, model.shapes["params"]), config)
    state = state._replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    saver.save(state, config)
    saver.wait()
    saver.close()
    byte.save(folder)
    return folder, state


@pytest.mark.parametrize("flags", [[], ["--weights=ema"], ["--dtype=bfloat16", "--layout=fused"]], ids=str)
def test_a_run_of_train_is_exported(flags, trained, command, tmp_path):
    folder, state = trained
    works(command("export", f"--checkpoint={folder}", f"--out={tmp_path / 'out'}", *flags))
    opened = pretrained.open_published(str(tmp_path / "out"))
    dtype, layout = ("bfloat16", "fused") if "--dtype=bfloat16" in flags else ("float32", "per_expert")
    assert (opened.family, opened.config.model.param_dtype, opened.layout) == ("llada_moe", dtype, layout)
    assert opened.published.mask_id == tokenizer.Bytes().mask_id and opened.published.fields["torch_dtype"] == dtype
    want = state.ema if "--weights=ema" in flags else state.variables["params"]
    equal = jax.tree.map(lambda x, y: np.array_equal(x, np.asarray(y).astype(dtype).astype(x.dtype)), opened.source().tree()["params"], want)
    assert jax.tree.all(equal)
    assert opened.tokenizer().fingerprint == tokenizer.Bytes().fingerprint  # read back by its own file, as there is no tokenizer.json


def test_another_dtype_of_an_imported_one(command, folder, tmp_path):
    works(command("import", f"--hf_dir={folder}", f"--out={tmp_path / 'run'}"))
    works(command("export", f"--checkpoint={tmp_path / 'run'}", "--dtype=bfloat16", f"--out={tmp_path / 'out'}"))
    with shards.Reader(folder) as before, shards.Reader(tmp_path / "out") as after:
        assert before.tensors.keys() == after.tensors.keys()
        for key in before.tensors:
            assert np.array_equal(before.array(key).astype(after.array(key).dtype), after.array(key)) and after.array(key).dtype == "bfloat16"
    fields = [json.loads((where / "config.json").read_text()) for where in (folder, tmp_path / "out")]
    assert fields[1] == fields[0] | {"torch_dtype": "bfloat16"}


# ---- names without weights --------------------------------------------------------------------------------------------

NUMBERS = {"LLaDA-8B": (291, 8_015_581_184), "LLaDA-MoE-7B-A1B": (3219, 7_356_880_896), "LLaDA2.0-mini": (14_813, 16_255_643_392),
           "LLaDA2.0-flash": (24_161, 102_889_705_216)}  # with the buffers of the router's bias  # fmt: skip


def write_index(folder: pathlib.Path, fields: dict, names) -> pathlib.Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    return folder


@pytest.mark.parametrize("name", FULL)
def test_an_index_of_the_published_size(name, command, tmp_path):
    tensors, numbers = NUMBERS[name]
    text = works(command("check", f"--hf_dir={write_index(tmp_path / name, FULL[name], published.tensors(FULL[name]))}", "--index_only"))
    assert f"{tensors:,} tensors, {numbers:,} numbers; every name of the index is the table's" in text


def test_an_index_with_other_names(command, tmp_path):
    names = list(published.tensors(FULL["LLaDA2.0-mini"]))
    bias, expert = "model.layers.7.mlp.gate.expert_bias", "model.layers.19.mlp.experts.255.up_proj.weight"
    less = write_index(tmp_path / "less", FULL["LLaDA2.0-mini"], [name for name in names if name not in (bias, expert)])
    refused(command("check", f"--hf_dir={less}", "--index_only"), f"{less}/{shards.INDEX}", "2 tensors are missing", bias, expert, "0 are not known")
    norm, gate = "model.layers.20.input_layernorm.weight", "model.layers.0.mlp.gate.weight"
    more = write_index(tmp_path / "more", FULL["LLaDA2.0-mini"], [*names, norm, gate])
    refused(command("check", f"--hf_dir={more}", "--index_only"), "0 tensors are missing", "2 are not known", norm, gate)
    other = write_index(tmp_path / "other", FULL["LLaDA-8B"], names)
    refused(command("check", f"--hf_dir={other}", "--index_only"), "291 tensors are missing (model.transformer.wte.weight", "14813 are not known")


# ---- what it says when it cannot --------------------------------------------------------------------------------------


def test_a_command_line_that_cannot_work(command, folder, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("x")
    given, out = f"--hf_dir={folder}", f"--out={tmp_path / 'out'}"
    hub = "inclusionAI/LLaDA-MoE-7B-A1B-Instruct"
    download = f"hf download {hub} --exclude '*.bin' --local-dir {hub}"
    none, tiny = tmp_path / "none", [f"--config={tiny_run.__file__}", f"--config.model.vocab_size={V}", out]
    cases = [
        ([], ["import,export,check,make"]), (["--out=x"], ["name a command"]), (["improt", given, out], ["'improt'", "did you mean 'import'"]),
        (["import"], ["--hf_dir is missing"]), (["import", given], ["--out is missing"]), (["export", out], ["--checkpoint is missing"]),
        (["check"], ["--hf_dir is missing"]), (["make", out], ["--config is missing"]), (["import", given, out, "more"], ["'more'"]),
        (["import", given, f"--out={used}"], [str(used), "not an empty folder"]),
        (["import", given, f"--out={tmp_path / 'file'}"], ["not an empty folder"]),
        (["import", f"--hf_dir={hub}", out], [hub, download, "pip install"]), (["check", f"--hf_dir={hub}"], [download]),
        (["export", f"--checkpoint={hub}", out], [download]), (["import", f"--hf_dir={none}", out], [f"{none} does not exist"]),
        (["import", f"--hf_dir={used}", out], [str(used), "config.json"]), (["import", f"--hf_dir={tmp_path / 'file'}", out], ["config.json"]),
        (["export", f"--checkpoint={folder}", out], ["is a published folder already"]),
        (["export", f"--checkpoint={used}", out], ["no checkpoint in"]), (["make", f"--config={tiny_run.__file__}", out], ["model.vocab_size"]),
        (["make", *tiny, "--family=llada2_moe"], ["LLaDA2MoeModelLM cannot express"]),
        (["make", *tiny, "--layout=stacked"], ["'stacked'", "per_expert, fused"]), (["check", given, "--dtype=int8"], ["dtype"]),
    ]
    for arguments, parts in cases:
        refused(command(*arguments), *parts)
        assert sorted(os.listdir(tmp_path)) == ["file", "used"] and os.listdir(used) == ["mine.txt"], arguments


def edited(change):
    def apply(folder: pathlib.Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        change(fields)
        (folder / "config.json").write_text(json.dumps(fields))
    return apply


def rewritten(name: str, array: np.ndarray):
    def apply(folder: pathlib.Path) -> None:
        arrays = published.random_tensors(LLADA_MOE) | {name: array}
        shutil.rmtree(folder)
        published.write(folder, LLADA_MOE, arrays, num_files=2)
    return apply


def truncated(folder: pathlib.Path) -> None:
    os.truncate(folder / "model-00002-of-00002.safetensors", 5000)


KEY = "model.layers.1.self_attn.k_proj.weight"
DAMAGE = {
    "missing shard": (lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(), ["model-00001-of-00002.safetensors", "is not there"]),
    "truncated shard": (truncated, ["model-00002-of-00002.safetensors", "download it again"]),
    "misshapen": (rewritten(KEY, np.zeros((16, 32), np.float32)), [KEY, "[16, 32]", "[32, 32]"]),
    "integers": (rewritten(KEY, np.zeros((32, 32), np.int8)), [KEY, "int8"]),
    "NaN": (rewritten(KEY, np.full((32, 32), np.nan, np.float32)), [KEY, "NaN", "--allow_nonfinite"]),
    "another config": (edited(lambda fields: fields.update(num_hidden_layers=2)), ["21 are not known", "model.layers.2."]),
    "no architectures": (edited(lambda fields: fields.pop("architectures")), ["architectures=None"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["holds no tokenizer.json"]),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), ["tokenizer.json"]),
    "another tokenizer": (lambda folder: (folder / "tokenizer.json").write_text(tokenizer.bytes_json(V, {"<|mask|>": 280, "<|endoftext|>": V - 2})),
                          ["mask_id=299", "<|mask|> at 280"]),
    "a longer tokenizer": (lambda folder: (folder / "tokenizer.json").write_text(
        tokenizer.bytes_json(V + 9, {"<|mask|>": V - 1, "<|endoftext|>": V - 2})), ["308", "vocab_size=300"]),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "is not the json of a config"]),
    "a config that is a number": (lambda folder: (folder / "config.json").write_text("3"), ["config.json", "is not the json of a config"]),
    "a pickle": (lambda folder: [file.rename(file.with_suffix(".bin")) for file in folder.glob("*.safetensors")] and (
        folder / shards.INDEX).unlink(), ["pickle"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_cannot_be_imported(name, command, folder, tmp_path):
    damage, parts = DAMAGE[name]
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    damage(damaged)
    (tmp_path / "empty").mkdir()
    for out in ("out", "empty"):  # an empty folder stays one
        refused(command("import", f"--hf_dir={damaged}", f"--out={tmp_path / out}"), *parts)
        assert sorted(os.listdir(tmp_path)) == ["damaged", "empty"] and not os.listdir(tmp_path / "empty")


KILL = """
from llada_jax.interop import hf_weights
real, calls = hf_weights.Source.__call__, []
def leaf(self, path):
    calls.append(path)
    if len(calls) == 5:
        os.kill(os.getpid(), 9)
    return real(self, path)
hf_weights.Source.__call__ = leaf
"""


def test_an_import_that_was_killed(command, folder, tmp_path):
    arguments = ["import", f"--hf_dir={folder}", f"--out={tmp_path / 'run'}"]
    assert command(*arguments, before=KILL).returncode == -9
    refused(command(f"--checkpoint={tmp_path / 'run'}", "--prompt=x", module="sample"), "did not finish; remove it")
    refused(command(*arguments), f"--out={tmp_path / 'run'} is not an empty folder; choose another, or remove it")
    shutil.rmtree(tmp_path / "run")
    works(command(*arguments))
    works(command("export", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"))
    assert content(tmp_path / "out") == content(folder)


@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
def test_an_import_that_is_interrupted_leaves_nothing(stop, command, folder, tmp_path):
    before = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)" + KILL.replace("9)", f"signal.{stop})")
    done = command("import", f"--hf_dir={folder}", f"--out={tmp_path / 'run'}", before=before)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flags, message", [
    (["--chat"], "--chat needs --prompt"), (["--chat", "--infill=a<|mask:2|>"], "--chat needs --prompt"),
    (["--chat", "--prompt=a<|mask:2|>"], "gaps <|mask:N|> go without --chat"), (["--prompt=a", "--system=b"], "--system needs --chat"),
    (["--prompt=a", "--fsdp=3"], "--fsdp=3 does not divide the 1 device"),
], ids=str)  # fmt: skip
def test_flags_of_sample_that_do_not_go_together(flags, message, command, folder):
    refused(command(f"--checkpoint={folder}", *flags, module="sample"), message)


def test_a_disk_or_memory_that_is_too_small(command, folder, tmp_path):
    run = tmp_path / "run"
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    refused(command("import", f"--hf_dir={folder}", f"--out={run}", before=small), "File too large", "nothing of it was kept")
    no_disk = "import shutil; shutil.disk_usage = lambda path: type('Usage', (), dict(free=1000))"
    refused(command("import", f"--hf_dir={folder}", f"--out={run}", before=no_disk), str(run), "its disk has")
    no_memory = "pretrained.streaming.free_memory = lambda: 1000"
    refused(command("import", f"--hf_dir={folder}", f"--out={run}", before=no_memory), "twice the largest tensor", "of memory")
    assert os.listdir(tmp_path) == []
    works(command("import", f"--hf_dir={folder}", f"--out={run}"))
    before = content(run)
    for limit in (small, no_disk):
        refused(command("export", f"--checkpoint={run}", f"--out={tmp_path / 'out'}", before=limit), str(tmp_path / "out"))
        refused(command("make", f"--config={tiny_run.__file__}", f"--config.model.vocab_size={V * 9}", f"--out={tmp_path / 'out'}", before=limit),
                str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["run"] and content(run) == before


def test_exports_that_cannot_be(command, folder, trained, tmp_path):
    run = tmp_path / "run"
    works(command("import", f"--hf_dir={folder}", f"--out={run}"))
    refused(command("export", f"--checkpoint={run}", f"--out={tmp_path / 'out'}", "--family=qwen3_moe"), "was imported as llada_moe")
    refused(command("export", f"--checkpoint={run}", f"--out={tmp_path / 'out'}", "--layout=stacked"), "'stacked'", "per_expert, fused")
    refused(command("export", f"--checkpoint={run}", f"--out={tmp_path / 'out'}", "--step=3"), "no checkpoint of step 3")
    refused(command("export", f"--checkpoint={run}", f"--out={tmp_path / 'out'}", "--weights=ema"), "holds no average")
    refused(command("export", f"--checkpoint={trained[0]}", f"--out={tmp_path / 'out'}", "--family=llada2_moe"), "LLaDA2MoeModelLM cannot express")
    (run / "published" / "record.json").write_text("{")
    refused(command("export", f"--checkpoint={run}", f"--out={tmp_path / 'out'}"), "record.json")
    assert os.listdir(tmp_path) == ["run"]
