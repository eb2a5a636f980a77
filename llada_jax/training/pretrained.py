"""Weights to use: a run folder of train or convert, one checkpoint of it, or a published folder as it was downloaded."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from llada_jax import config as config_lib
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.config import ConfigError
from llada_jax.diffusion import blocks
from llada_jax.interop import hf_config, hf_weights, shards
from llada_jax.model import lora, transformer
from llada_jax.training import checkpoint, combine, streaming

GIB = 2**30
BLOCKS = {"llada2_moe": 32}  # tokens of a block, by family; no config.json names them (arXiv 2512.15745)
PUBLISHED = "published"  # subfolder of an imported run folder: the published files that are no weights
HUB_NAME = re.compile(r"(?!runs/)\w[\w.-]*/[\w.-]+")
RECORD = "record.json"  # in it: family, layout, and every tensor's name, dtype and file


class Trained(NamedTuple):
    """Where weights come from, and how to get them."""

    folder: str
    step: int  # 0 for published weights
    describe: str
    config: config_lib.Config
    tokenizer: tokenizer_lib.Tokenizer
    family: str | None  # published family (its attention), None for a run of train
    template: str | None  # family of its chat template: its own, or what a run was tuned with
    load: Callable[[Any, Any], Any]  # (shapes, shardings) -> variables

    @property
    def block_size(self) -> int:
        """Tokens of a block that the model is made for, those at the end of its training; 0 where it has no blocks."""
        return blocks.Schedule.of(self.config).final(self.config.train.steps) or BLOCKS.get(self.family or "", 0)


def open_weights(workdir: str | None, path: str | None, step: int | None = None, weights: str = "params", mask_id: int | None = None) -> Trained:
    """What `--workdir` or `--checkpoint` names, adapters merged into the weights. No weight is read yet.

    Raises ConfigError for neither or both, for a Hub name that is no folder (with the command that downloads it), and for whatever
    does not fit together.
    """
    if workdir and not path and is_published(workdir):
        raise ConfigError(f"{workdir} is a published folder; give it as --checkpoint={workdir}")
    if path and not workdir and is_published(path):
        published = open_published(path, mask_id)
        if weights != "params" or step:
            raise ConfigError(f"{path} is a published folder: it has no --step and no --weights={weights}")
        return Trained(path, 0, f"{path} ({published.family})", published.config, published.tokenizer(), published.family,
                       published.family, published.load)
    if path or HUB_NAME.fullmatch(workdir or ""):
        check_exists(path or workdir)
    folder, step = checkpoint.locate(workdir, path, step)
    check_finished(folder)
    step, config = checkpoint.read_config(folder, step)
    family = read_record(folder).get("family")
    load = lambda shapes, shardings: combine.load_variables(folder, step, config.model, shapes, shardings, weights)
    describe = f"step {step} of {folder} · weights: {weights}" + " with their adapters" * (config.model.lora_rank > 0)
    return Trained(folder, step, describe, dataclasses.replace(config, model=lora.without(config.model)), tokenizer_lib.load(folder), family,
                   family or config.data.chat_template or None, load)


def check_finished(folder: str) -> None:
    """Raise ConfigError for what an import that was cut short leaves behind."""
    if (epath.Path(folder) / PUBLISHED).exists() and not checkpoint.steps_of(folder):
        raise ConfigError(f"{folder} is an import that did not finish; remove it and run convert import again")


def read_record(folder: str) -> dict[str, Any]:
    """What an import noted of the published folder, {} for a run of train; raises ConfigError where it is damaged."""
    path = epath.Path(folder) / PUBLISHED / RECORD
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); import the published folder again") from None


class Opened(NamedTuple):
    """A published folder whose headers were read and fit its config."""

    folder: str
    family: str
    layout: str
    published: hf_config.Published
    config: config_lib.Config
    shapes: Any
    entries: list[hf_weights.Entry]
    reader: shards.Reader

    def tokenizer(self) -> tokenizer_lib.Tokenizer:
        """Its tokenizer.json, or the tokenizer of ours that an export of a run of train holds.

        An autoregressive model gets the last row of its embedding as the mask, which published ones leave unused.
        """
        mask_id, size = self.published.mask_id, self.config.model.vocab_size
        if not (epath.Path(self.folder) / "tokenizer.json").exists() and list(epath.Path(self.folder).glob("tokenizer.*")):
            own = tokenizer_lib.load(self.folder)
            if (own.eos_id, own.mask_id) != (self.published.eos_id, own.mask_id if mask_id is None else mask_id) or own.vocab_size > size:
                raise ConfigError(f"{self.folder}: its tokenizer has {own.vocab_size} ids, mask {own.mask_id} and eos {own.eos_id}, its config.json "
                                  f"{size}, mask {mask_id} and eos {self.published.eos_id}: they are of different checkpoints")
            return own
        return tokenizer_lib.from_published(self.folder, size - 1 if mask_id is None else mask_id, self.published.eos_id, size)

    def source(self, allow_nonfinite: bool = False) -> hf_weights.Source:
        """Our leaves, one at a time."""
        return hf_weights.Source(self.reader, self.entries, self.shapes, allow_nonfinite)

    def load(self, shapes: Any, shardings: Any) -> Any:
        """Variables on the devices; the host holds one leaf at a time beside them."""
        source = hf_weights.Source(self.reader, self.entries, shapes)
        def place(path, leaf, sharding):
            return jax.device_put(source(hf_weights.path_of(path)), sharding).block_until_ready()
        return jax.tree_util.tree_map_with_path(place, shapes, shardings)


def is_published(path: str) -> bool:
    """Whether a folder holds published weights or a published config.json (with `architectures`), not ours."""
    if list(epath.Path(path).glob("*.safetensors")):
        return True  # whatever its config.json says: reading it will tell
    try:
        fields = json.loads((epath.Path(path) / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "architectures" in fields


def open_published(folder: str, mask_id: int | None = None) -> Opened:
    """Read config and headers of a published folder; raises ConfigError unless every tensor is the table's."""
    check_exists(folder)
    if not is_published(folder) and (epath.Path(folder) / "checkpoints").exists():
        raise ConfigError(f"{folder} is a run folder, not a published one; its weights are used by --checkpoint={folder}")
    published = hf_config.read(folder, mask_id)
    reader = shards.Reader(folder)
    layout = hf_weights.layout_of(published.family, reader.tensors)
    entries = hf_weights.table(published.family, transformer.build(published.model).shapes, layout)
    hf_weights.check(entries, reader)
    config = config_for(published, hf_weights.param_dtype(entries, reader))
    return Opened(folder, published.family, layout, published, config, transformer.build(config.model).shapes, entries, reader)


def config_for(published: hf_config.Published, dtype: str = "float32") -> config_lib.Config:
    """A whole config around a published model; computes in the dtype in which the weights are stored."""
    model = dataclasses.replace(published.model, param_dtype=dtype, compute_dtype=dtype)
    config = config_lib.Config(model, config_lib.Diffusion(objective=published.objective),
                               config_lib.Data(sequence_length=min(1024, model.max_length)), train=config_lib.Train(batch_size=8, steps_per_call=1))
    config_lib.validate(config)
    return config


def check_exists(folder: str) -> None:
    """Raise ConfigError for a folder that is not there; for a name of the Hub it holds the command that downloads it."""
    if epath.Path(folder).exists():
        return
    if HUB_NAME.fullmatch(folder):
        raise ConfigError(f"{folder} is no folder; if it is a repository of the Hugging Face Hub, download it first: pip install -c requirements.txt "
                          f"-e '.[hub]' && hf download {folder} --exclude '*.bin' --local-dir {folder}")
    raise ConfigError(f"{folder} does not exist")


def check_memory(shapes: Any, shardings: Any) -> str:
    """Say how many bytes the weights need, by device and on this host, against what is free.

    Raises ConfigError when they do not fit; the host needs room for one leaf beside what lies on CPU devices.
    """
    leaves = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True))
    size = lambda shape, dtype: int(jax.numpy.dtype(dtype).itemsize) * math.prod(shape)
    largest = max(size(x.shape, x.dtype) for x, _ in leaves)
    each = sum(size(sharding.shard_shape(x.shape), x.dtype) for x, sharding in leaves)
    devices = jax.local_devices()
    on_host = devices[0].platform == "cpu"
    host, free = largest + each * len(devices) * on_host, streaming.free_memory()
    text = f"weights need {each / GIB:.2f} GiB on each of {len(devices)} device(s)"
    stats = None if on_host else devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        room = stats["bytes_limit"] - stats["bytes_in_use"]
        text += f" ({room / GIB:.2f} GiB free)"
        if each > room:
            raise ConfigError(f"{text}: --fsdp=N splits them over N devices")
    text += f", {host / GIB:.2f} GiB of host memory ({free / GIB:.2f} GiB free)"
    if host > free:
        raise ConfigError(f"{text}: close other programs or use a machine with more memory")
    return text
