"""What `--workdir` and `--checkpoint` may name, and whether it fits into the memory."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning, tokenizer
from llada_jax.config import ConfigError
from llada_jax.interop import hf_config
from llada_jax.model import transformer
from llada_jax.training import checkpoint, pretrained
from tests import published
from tests.published import DTYPES, LLADA2, LLADA_MOE, QWEN2, V

FIXTURES = pathlib.Path(__file__).parent / "data" / "checkpoints"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published folder as it was downloaded."""
    arrays = published.random_tensors(LLADA2, dtypes=DTYPES["router in float32"])
    return str(published.write(tmp_path_factory.mktemp("published") / "mini", LLADA2, arrays, num_files=2))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run folder with the same weights at two steps, as an import leaves it."""
    opened, out = pretrained.open_published(folder), tmp_path_factory.mktemp("run") / "mini"
    for step in (0, 5):
        checkpoint.save_variables(str(out), opened.config, opened.shapes, opened.source(), step)
    opened.tokenizer().save(out)
    (out / "config.json").write_text(config_lib.to_json(opened.config))
    (out / pretrained.PUBLISHED).mkdir()
    shutil.copy(pathlib.Path(folder) / "config.json", out / pretrained.PUBLISHED)
    (out / pretrained.PUBLISHED / pretrained.RECORD).write_text(json.dumps({"family": opened.family}))
    return str(out)


def weights_of(trained: pretrained.Trained, **axes: int):
    mesh = partitioning.make_mesh(config_lib.Mesh(**({"data": 1} | axes)), jax.devices()[: int(np.prod(list(axes.values()) or [1]))])
    model = transformer.build(trained.config.model, mesh=mesh)
    shardings = partitioning.shardings_of(mesh, model.axes, model.shapes)
    found = trained.load(model.shapes, shardings)
    assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding == sharding, found, shardings))
    return checkpoint.tree_hash(found)


def test_every_way_to_name_weights_gives_the_same(folder, run):
    """A published folder, a run folder by two flags, and one checkpoint of it, on one device and on eight."""
    ways = [(pretrained.open_weights(None, folder), 0, folder), (pretrained.open_weights(run, None), 5, run),
            (pretrained.open_weights(None, run), 5, run), (pretrained.open_weights(None, run, 0), 0, run),
            (pretrained.open_weights(None, f"{run}/checkpoints/0"), 0, run), (pretrained.open_weights(None, f"{run}/checkpoints/5", 5), 5, run)]
    want = checkpoint.tree_hash(pretrained.open_published(folder).source().tree())
    for trained, step, where in ways:
        assert (trained.step, trained.folder, trained.family) == (step, where, "llada2_moe")
        assert (trained.tokenizer.mask_id, trained.tokenizer.eos_id) == (V - 1, V - 2)
        assert trained.config.model == ways[0][0].config.model and trained.config.model.param_dtype == "bfloat16"
        assert weights_of(trained) == want
    for axes in (dict(data=8), dict(fsdp=2, expert=2, tensor=2), dict(expert=8)):
        assert weights_of(ways[0][0], **axes) == weights_of(ways[1][0], **axes) == want


def test_a_run_of_train_has_no_family_but_may_have_a_template(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run", ignore=lambda *_: [pretrained.PUBLISHED])
    found = pretrained.open_weights(str(tmp_path / "run"), None)
    assert found.family is None and found.template is None
    tuned = dataclasses.replace(found.config, data=dataclasses.replace(found.config.data, chat_template="llada"))
    monkeypatch.setattr(checkpoint, "read_config", lambda *_: (5, tuned))
    found = pretrained.open_weights(str(tmp_path / "run"), None)
    assert found.family is None and found.template == "llada"


def refused(action, *parts):
    with pytest.raises(ConfigError) as error:
        action()
    line = str(error.value)
    assert line.isprintable() and all(part in line for part in parts), line


def test_what_does_not_fit_together(folder, run, tmp_path):
    open_weights = pretrained.open_weights
    for pair in [(None, None), (run, run), (folder, run), ("", "")]:
        refused(lambda pair=pair: open_weights(*pair), "--workdir=RUN and --checkpoint=DIR")
    refused(lambda: open_weights(run, folder), "--workdir=RUN and --checkpoint=DIR")
    refused(lambda: open_weights(folder, None), folder, "published folder", "--checkpoint")
    refused(lambda: open_weights(None, folder, 3), folder, "--step")
    refused(lambda: open_weights(None, folder, None, "ema"), folder, "--weights=ema")
    refused(lambda: open_weights(None, f"{run}/checkpoints/5", 0), "step 5", "--step=0")
    refused(lambda: open_weights(None, f"{run}/checkpoints/3"), "checkpoints/3 does not exist")
    refused(lambda: open_weights(run, None, 4), "no checkpoint of step 4", "0, 5")
    refused(lambda: weights_of(open_weights(run, None, None, "ema")), "holds no average")
    refused(lambda: open_weights(str(tmp_path), None), "no checkpoint in")
    refused(lambda: open_weights(str(tmp_path / "none"), None), f"no checkpoint in {tmp_path / 'none'}")
    for name in ("GSAI-ML/LLaDA-8B-Instruct", "inclusionAI/LLaDA2.0-mini"):
        for pair in [(None, name), (name, None)]:
            refused(lambda pair=pair: open_weights(*pair), f"hf download {pair[0] or pair[1]} --exclude", f"--local-dir {pair[0] or pair[1]}")
    refused(lambda: open_weights("runs/first", None), "no checkpoint in runs/first", "train first")
    refused(lambda: open_weights(None, "runs/first"), "runs/first does not exist")


def test_a_damaged_record_is_named(run, tmp_path):
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    (damaged / pretrained.PUBLISHED / pretrained.RECORD).write_text("{")
    refused(lambda: pretrained.open_weights(str(damaged), None), "record.json is damaged")


@pytest.mark.parametrize("text", ["3", "null", "[]", '["architectures"]', '"architectures"', "{", "\x00", "{}"])
def test_a_config_of_something_else(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    refused(lambda: pretrained.open_weights(None, str(tmp_path)), "no checkpoint in")
    (tmp_path / "model.safetensors").touch()
    problem = "architectures=None" if text == "{}" else "is not the json of a config"
    refused(lambda: pretrained.open_weights(None, str(tmp_path)), "config.json", problem)


def test_the_masks_id(tmp_path):
    """A config.json without one, as LLaDA2's are: the family's own, or the one given where that does not fit."""
    name = str(FIXTURES / "llada2_moe")
    refused(lambda: pretrained.open_published(name), "mask_token_id=156895 is not an id of the 192 tokens; give --mask_id")
    refused(lambda: pretrained.open_published(name, 192), "mask_token_id=192", "give --mask_id")
    opened = pretrained.open_published(name, 191)
    assert (opened.published.mask_id, opened.published.eos_id, len(opened.entries)) == (191, 188, 130)
    refused(opened.tokenizer, "holds no tokenizer.json")
    assert pretrained.open_published(str(FIXTURES / "llada"), 5).published.mask_id == 191  # what the file says comes first


def test_an_autoregressive_model_masks_with_its_last_row(tmp_path):
    opened = pretrained.open_published(str(published.write(tmp_path / "qwen", QWEN2, published.random_tensors(QWEN2))))
    assert (opened.config.diffusion.objective, opened.published.mask_id) == ("autoregressive", None)
    assert (opened.tokenizer().mask_id, opened.tokenizer().eos_id) == (V - 1, V - 2)


def test_a_config_around_a_model():
    found = hf_config.parse(LLADA_MOE)
    config = pretrained.config_for(found, "bfloat16")
    assert (config.model.param_dtype, config.model.compute_dtype, config.data.sequence_length) == ("bfloat16", "bfloat16", 64)
    assert config_lib.from_config_dict(config_lib.to_config_dict(config)) == config  # a whole one


def test_memory_is_counted_before_it_is_taken(monkeypatch):
    config = config_lib.Model(vocab_size=1024, hidden_size=1024, num_layers=1, dense_layers=(0,), dense_size=1024, num_heads=8, qk_norm=False)
    model = transformer.build(config)
    sizes = [leaf.size * 4 for leaf in jax.tree.leaves(model.shapes)]
    for devices, axes in ((1, {}), (8, {"data": 8}), (8, {"data": 1, "fsdp": 8})):
        mesh = partitioning.make_mesh(config_lib.Mesh(**axes), jax.devices()[:devices])
        monkeypatch.setattr(jax, "local_devices", lambda devices=devices: jax.devices()[:devices])
        shardings = partitioning.shardings_of(mesh, model.axes, model.shapes)
        # the norms' 3 x 1024 numbers lie whole on every device
        each = sum(sizes) if axes != {"data": 1, "fsdp": 8} else (sum(sizes) - 3 * 4096) // 8 + 3 * 4096
        needed = max(sizes) + devices * each
        monkeypatch.setattr(pretrained.streaming, "free_memory", lambda needed=needed: needed)
        assert f"{each / 2**30:.2f} GiB on each of {devices} device(s)" in pretrained.check_memory(model.shapes, shardings)
        monkeypatch.setattr(pretrained.streaming, "free_memory", lambda needed=needed: needed - 1)
        refused(lambda shardings=shardings: pretrained.check_memory(model.shapes, shardings), f"on each of {devices} device(s)",
                f"{needed / 2**30:.2f} GiB of host memory", "use a machine with more memory")


def test_memory_of_an_accelerator(monkeypatch):
    class Device:
        platform, limit = "gpu", 0

        def memory_stats(self):
            return {"bytes_limit": self.limit + 100, "bytes_in_use": 100}

    model = transformer.build(config_lib.Model(vocab_size=512, hidden_size=512, num_layers=1, num_experts=2, experts_per_token=1, expert_size=8))
    shardings = partitioning.shardings_of(partitioning.make_mesh(config_lib.Mesh(), jax.devices()[:1]), model.axes, model.shapes)
    sizes = [leaf.size * 4 for leaf in jax.tree.leaves(model.shapes)]
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(pretrained.streaming, "free_memory", lambda: max(sizes))  # the host holds one leaf
    monkeypatch.setattr(Device, "limit", sum(sizes))
    assert "1 device(s)" in pretrained.check_memory(model.shapes, shardings)
    monkeypatch.setattr(Device, "limit", sum(sizes) - 1)
    refused(lambda: pretrained.check_memory(model.shapes, shardings), "GiB free)", "--fsdp=N splits them")
    monkeypatch.setattr(Device, "memory_stats", lambda self: None)  # what some back ends say
    assert "1 device(s)" in pretrained.check_memory(model.shapes, shardings)
    monkeypatch.setattr(pretrained.streaming, "free_memory", lambda: max(sizes) - 1)
    refused(lambda: pretrained.check_memory(model.shapes, shardings), "of host memory")


def test_the_tokenizer_of_a_run_is_the_published_one(folder, run):
    one, other = pretrained.open_weights(None, folder).tokenizer, pretrained.open_weights(run, None).tokenizer
    assert one.encode("a = 1 ∎") == other.encode("a = 1 ∎") and isinstance(other, tokenizer.HuggingFace)
