"""Published checkpoints in and out, tensor by tensor, and the mean of several of a run.

    python -m llada_jax.convert check  --hf_dir=LLaDA-MoE-7B-A1B-Instruct                     headers against the family's table
    python -m llada_jax.convert import --hf_dir=LLaDA-MoE-7B-A1B-Instruct --out=runs/moe      a run folder of ours
    python -m llada_jax.convert export --checkpoint=runs/moe --out=exported                   and back, bit for bit
    python -m llada_jax.convert make   --config=configs/llada_moe.py:variant=7b_a1b --out=DIR random weights in the published layout
    python -m llada_jax.convert average --workdir=runs/first --top=4 --out=runs/mean              of the best held-out bounds
    python -m llada_jax.convert merge --checkpoint=runs/tuned --out=runs/merged                   low-rank adapters into their weights
    python -m llada_jax.convert adapters --checkpoint=runs/tuned --out=adapters                   what a run with adapters has trained, alone
    python -m llada_jax.convert merge --checkpoint=runs/moe --adapters=adapters --out=runs/merged and back onto its base

A published folder is config.json, *.safetensors with or without an index, and tokenizer.json. Pickles are not read and nothing
in a folder is executed. `import` holds one of our (stacked) tensors at a time, `export` too. A run of train is exported in the
first family that can express it, or in --family.

`average` writes the arithmetic mean of checkpoints of one run (LLaDA2.0, arXiv 2512.15745 §4; WSM) as weights that sample, evaluate, export and
--init_from take: of the --top with the best held-out bound in metrics.jsonl, or of --steps. It also averages the expert bias. A run with
low-rank adapters is exported, and averaged, with them in its weights; so do sample and evaluate take it, with no `merge` before.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import pathlib
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import traverse_util
from ml_collections import config_flags

from llada_jax import command_line, partitioning
from llada_jax import config as config_lib
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.config import ConfigError
from llada_jax.interop import chat, hf_config, hf_weights, shards
from llada_jax.model import lora, transformer
from llada_jax.training import checkpoint, combine, optimizer, pretrained, streaming

HF_DIR = flags.DEFINE_string("hf_dir", None, "import, check: the published folder, as it was downloaded.")
OUT = flags.DEFINE_string("out", None, "The folder to write; it must not exist, or be empty.")
WORKDIR = flags.DEFINE_string("workdir", None, "average: a run folder of train.")
TOP = flags.DEFINE_integer("top", None, "average: so many checkpoints, those with the best held-out bound.", lower_bound=1)
STEPS = flags.DEFINE_list("steps", [], "average: the steps of these checkpoints.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "export, merge, adapters: a run folder, or one checkpoint, RUN/checkpoints/STEP.")
ADAPTERS = flags.DEFINE_string("adapters", None, "merge: a folder that `adapters` wrote, for the base that --checkpoint names.")
STEP = flags.DEFINE_integer("step", None, "export, merge, adapters: training step of the checkpoint; the newest by default.")
WEIGHTS = flags.DEFINE_enum("weights", "params", ["params", "ema"], "export, average, merge, adapters: the trained weights, or their moving average.")
FAMILY = flags.DEFINE_enum("family", None, sorted(hf_config.FAMILIES), "export, make: the published family; by default the first that can.")
LAYOUT = flags.DEFINE_string("layout", None, "export, make: of the experts: per_expert, fused (LLaDA-MoE), stacked (LLaDA2).")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                          "export, make: of the tensors. Default: as they were imported, else float32; make: bfloat16.")
SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "export, make: 10^9 bytes of one file at most.", lower_bound=1e-6)
MASK_ID = flags.DEFINE_integer("mask_id", None, "The mask token's id, where config.json has none and the family's own does not fit.")
ALLOW_NONFINITE = flags.DEFINE_bool("allow_nonfinite", False, "import: take NaN and infinity as they are.")
INDEX_ONLY = flags.DEFINE_bool("index_only", False, "check: names alone, by config.json and model.safetensors.index.json; no shard is needed.")
FINITE = flags.DEFINE_bool("finite", False, "check: read all weights, for NaN and infinity.")
SEED = flags.DEFINE_integer("seed", 0, "make: of the random weights.", lower_bound=0)
CHUNK = 1 << 22  # random numbers made at once
CONFIG = config_flags.DEFINE_config_file("config", None, "make: config file with the model, with an optional preset.")

GIB = pretrained.GIB
KEPT = (".json", ".txt", ".jinja", ".md", ".model", ".py")  # published files that go in and out unread, beside the weights


def import_() -> None:
    """Published folder to run folder."""
    hf_dir, out = _needed(HF_DIR), _new_folder()
    opened = pretrained.open_published(hf_dir, MASK_ID.value)
    tokenizer, source = opened.tokenizer(), opened.source(ALLOW_NONFINITE.value)
    sizes = {hf_weights.path_of(path): x.size * x.dtype.itemsize for path, x in jax.tree_util.tree_leaves_with_path(opened.shapes)}
    total, largest, done, started = sum(sizes.values()), max(sizes.values()), 0, time.perf_counter()
    print(_describe(opened))
    on_disk = shutil.disk_usage(next(folder for folder in (out, *out.parents) if folder.exists())).free
    free = streaming.free_memory()
    print(f"to write {total / GIB:.2f} GiB ({on_disk / GIB:.1f} free); "
          f"largest tensor {largest / GIB:.2f} GiB ({free / GIB:.1f} of memory free)", flush=True)
    if total > on_disk:
        raise ConfigError(f"{out} takes up to {total:,} bytes, its disk has {on_disk:,} free; make room, or choose another disk")
    if 2 * largest > free:
        raise ConfigError(f"writing takes twice the largest tensor, {2 * largest:,} bytes of memory, {free:,} are free; close other programs")

    def leaf(path: str) -> np.ndarray:
        nonlocal done
        done += sizes[path]
        print(f"  {done / total:4.0%}  {path}", flush=True)
        return source(path)

    with _whole(out):
        _keep(opened, out / pretrained.PUBLISHED)
        _write_run(out, opened.config, tokenizer, opened.shapes, leaf)
    print(f"imported in {time.perf_counter() - started:.0f} s into {out}\n"
          f"next: python -m llada_jax.sample --checkpoint={shlex.quote(str(out))} --prompt='…'")


def average() -> None:
    """Run folder with the mean of several checkpoints of another, at the step of the last of them."""
    folder, out = _needed(WORKDIR), _new_folder()
    if (TOP.value is None) == (not STEPS.value):
        raise ConfigError("give one of --top=K and --steps=A,B,…")
    if not all(step.isdecimal() for step in STEPS.value):
        raise ConfigError(f"--steps={','.join(STEPS.value)} holds something other than steps")
    chosen = combine.best(folder, TOP.value) if TOP.value else combine.named(folder, [int(step) for step in STEPS.value])
    configs = [checkpoint.read_config(folder, step)[1] for step in chosen.steps]
    if any(config.model != configs[0].model for config in configs):
        raise ConfigError(f"the checkpoints {', '.join(map(str, chosen.steps))} of {folder} are of different models; name others by --steps")
    if chosen.gone:
        print(f"note: better bounds were measured at the steps {', '.join(map(str, chosen.gone))}, whose checkpoints are gone; {combine.WAY_OUT}")
    mean = combine.Mean([combine.plain(checkpoint.read_leaves(folder, step, WEIGHTS.value), configs[0].model) for step in chosen.steps])
    last = _plain(configs[chosen.steps.index(max(chosen.steps))])
    with _whole(out):
        _write_run(out, last, tokenizer_lib.load(folder), transformer.build(last.model).shapes, mean.__getitem__, max(chosen.steps))
        record = {"run": folder, "weights": WEIGHTS.value, "steps": chosen.steps, "heldout_bits_per_byte": chosen.bounds}
        (out / "average.json").write_text(json.dumps(record) + "\n")
    each = [f"{step}" + (f" ({bound:.4f} bits a byte)" if bound is not None else "") for step, bound in zip(*chosen[:2], strict=True)]
    print(f"the mean of {len(each)} checkpoints of {folder}, steps {', '.join(each)}, is in {out}\n"
          f"next: python -m llada_jax.evaluate --checkpoint={shlex.quote(str(out))}")


def export() -> None:
    """Run folder to published folder: an imported one as it came, one of train in the first family that can express it, adapters merged."""
    out = _new_folder()
    folder, step, config, leaves = _run_folder(_needed(CHECKPOINT), STEP.value)
    leaves, config = combine.plain(leaves, config.model), _plain(config)
    shapes = transformer.build(config.model).shapes
    combine.check_whole(leaves, shapes, folder)
    kept, record = pathlib.Path(folder) / pretrained.PUBLISHED, pretrained.read_record(folder)
    family = FAMILY.value or record.get("family") or hf_config.family_of(config.model, config.diffusion.model_kind)
    if family != record.get("family", family):
        raise ConfigError(f"{folder} was imported as {record['family']}; leave out --family={family}")
    layout = LAYOUT.value or record.get("layout", "per_expert")
    entries = hf_weights.table(family, shapes, layout)
    default, files, came = np.dtype(DTYPE.value or "float32"), None, {}
    stored: dict[str, set[np.dtype]] = {path: set() for path in leaves}  # the dtypes in which its parts came
    if record and DTYPE.value is None:
        came = {name: np.dtype(kind) for name, kind, _ in record["tensors"]}
        for entry in hf_weights.table(family, leaves.shapes, record["layout"]):
            for piece in entry.pieces:
                stored[piece.ours].add(came[entry.name])
        if layout == record["layout"]:  # order and files as they came
            files, order = {name: file for name, _, file in record["tensors"]}, {name: i for i, name in enumerate(came)}
            entries.sort(key=lambda entry: order[entry.name])

    def dtype_of(entry: hf_weights.Entry) -> np.dtype:
        """As it came; where parts that came in several dtypes are joined, the one that holds them all."""
        kinds = {came[entry.name]} if entry.name in came else set().union(*(stored[piece.ours] for piece in entry.pieces))
        return kinds.pop() if len(kinds) == 1 else default

    specs = {entry.name: (dtype_of(entry), entry.shape) for entry in entries}
    by_leaf = {path: [entry for entry in entries if any(piece.ours == path for piece in entry.pieces)] for path in leaves}
    with shards.Writer(out, specs, files, int(SHARD_GB.value * 1e9), record.get("metadata", shards.FROM_TORCH)) as writer:
        for path in leaves:
            ours = {path: leaves[path]}
            for entry in by_leaf[path]:
                hf_weights.put(entry, ours, writer.array(entry.name))
            del ours  # before the next is read
        if record:
            for file in kept.iterdir():
                if file.name != pretrained.RECORD:
                    shutil.copy(file, writer.folder / file.name)
            if DTYPE.value:
                fields = json.loads((kept / "config.json").read_text())
                fields |= {"dtype" if "dtype" in fields else "torch_dtype": str(default)}
                (writer.folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        else:
            tokenizer = tokenizer_lib.load(folder)
            mask = tokenizer.mask_id if config.diffusion.model_kind == "masked" else None
            fields = hf_config.write(family, config.model, mask, tokenizer.eos_id) | {"torch_dtype": str(default)}
            (writer.folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
            if tokenizer.kind == "huggingface":
                (writer.folder / "tokenizer.json").write_text(tokenizer.text)
            else:
                tokenizer.save(writer.folder)
    print(f"exported step {step} of {folder} as {family} ({layout}), {len(specs):,} tensors, into {out}")


def merge() -> None:
    """Run folder with the adapters of another in its weights, or with those of a folder of `adapters` in the weights of their base."""
    out = _new_folder()
    folder, step, config, leaves = _run_folder(_needed(CHECKPOINT), STEP.value)
    tuned, sources = config, [leaves]
    if ADAPTERS.value:
        if config.model.lora_rank:
            raise ConfigError(f"{folder} has adapters of its own; merge them first, without --adapters")
        _, _, tuned, trained = _run_folder(ADAPTERS.value, None)
        sources = [trained, leaves]
    if not tuned.model.lora_rank:
        raise ConfigError(f"{ADAPTERS.value or folder} has no adapters (model.lora_rank=0)" + ("" if ADAPTERS.value else "; name some by --adapters"))
    model, shapes = _plain(config), transformer.build(lora.without(config.model)).shapes
    merged = combine.Merged(tuned.model, *sources)
    combine.check_whole(merged, shapes, folder)
    with _whole(out):
        if ADAPTERS.value and (pathlib.Path(folder) / pretrained.PUBLISHED).exists():
            shutil.copytree(pathlib.Path(folder) / pretrained.PUBLISHED, out / pretrained.PUBLISHED)
        _write_run(out, model, tokenizer_lib.load(folder), shapes, merged.__getitem__, step)
    print(f"step {step} of {folder} with {f'the adapters of {ADAPTERS.value}' if ADAPTERS.value else 'its adapters'} in its weights is in {out}")


def adapters() -> None:
    """Folder with what a run with adapters has trained: these, and what optimizer.trainable names or balancing moves."""
    out = _new_folder()
    folder, step, config, leaves = _run_folder(_needed(CHECKPOINT), STEP.value)
    if not config.model.lora_rank:
        raise ConfigError(f"{folder} has no adapters (model.lora_rank=0)")
    shapes = transformer.build(config.model).shapes
    free = {"params": optimizer.trainable(config.optimizer, shapes["params"])}
    if "router_bias" in shapes:
        free["router_bias"] = jax.tree.map(lambda _: config.optimizer.router_bias_rate > 0, shapes["router_bias"])
    flat = {optimizer.path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(optimizer.chosen(free, shapes))}
    missing = [path for path in leaves.shapes if path.endswith((lora.A, lora.B)) and path not in flat]
    if missing:
        raise ConfigError(f"optimizer.trainable={config.optimizer.trainable!r} left {missing[0]} as it began; convert merge keeps all of the run")
    with _whole(out):
        _write_run(out, config, tokenizer_lib.load(folder), traverse_util.unflatten_dict(flat, sep="/"), leaves.__getitem__, step)
    print(f"{len(flat)} tensors of step {step} of {folder}, {sum(x.size * x.dtype.itemsize for x in flat.values()):,} bytes, are in {out}")


def check() -> None:
    """Whether a published folder is what its family's table says, by its headers or by its index."""
    hf_dir = _needed(HF_DIR)
    pretrained.check_exists(hf_dir)
    if INDEX_ONLY.value:
        if not (pathlib.Path(hf_dir) / shards.INDEX).exists():
            raise ConfigError(f"{hf_dir} holds no {shards.INDEX}; leave out --index_only to check its files")
        published, index = hf_config.read(hf_dir, MASK_ID.value), shards.index_only(hf_dir)
        entries = hf_weights.table(published.family, transformer.build(published.model).shapes, hf_weights.layout_of(published.family, index))
        hf_weights.check_names(entries, index, f"{hf_dir}/{shards.INDEX}")
        numbers = sum(math.prod(entry.shape) for entry in entries)
        print(f"{hf_dir}: {published.family}, {len(entries):,} tensors, {numbers:,} numbers; every name of the index is the table's")
        return
    opened = pretrained.open_published(hf_dir, MASK_ID.value)
    print(_describe(opened))
    try:
        opened.tokenizer()
    except ConfigError as error:
        print(f"tokenizer: {error}")
        if "holds no tokenizer.json" not in str(error):
            raise
    if FINITE.value:
        source = opened.source()
        for path, _ in jax.tree_util.tree_leaves_with_path(opened.shapes):
            source(hf_weights.path_of(path))
        print("every number is finite")


def make() -> None:
    """Random weights in a published layout: matrices 0.02 N, norm scales 1 + 0.1 N, biases 0.02 N; a tokenizer of bytes and control tokens."""
    out = _new_folder()
    if CONFIG.value is None:
        raise ConfigError("--config is missing; for example --config=configs/llada_moe.py:variant=7b_a1b")
    config = config_lib.from_config_dict(CONFIG.value)
    if not config.model.vocab_size:
        raise ConfigError("the config leaves model.vocab_size to the tokenizer; add for example --config.model.vocab_size=1024")
    family = FAMILY.value or hf_config.family_of(config.model, config.diffusion.model_kind)
    V, known = config.model.vocab_size, chat.IDS.get(family)
    if V < 300:
        raise ConfigError(f"model.vocab_size={V} has no room for 256 bytes and the control tokens; use 300 or more")
    mask, eos = (known.mask, known.eos) if known and max(known.mask, known.eos) < V else (V - 1, V - 2)
    dtype = np.dtype(DTYPE.value or "bfloat16")
    masked = config.diffusion.model_kind == "masked"
    fields = hf_config.write(family, config.model, mask if masked else None, eos) | {"torch_dtype": str(dtype)}
    entries = hf_weights.table(family, transformer.build(config.model).shapes, LAYOUT.value or "per_expert")
    specs = {entry.name: (dtype, entry.shape) for entry in entries}
    started = time.perf_counter()

    def fill(i: int) -> None:
        rng, rows = np.random.Generator(np.random.SFC64([SEED.value, i])), writer.array(entries[i].name).reshape(-1)
        scale, mean = (0.1, 1.0) if entries[i].pieces[0].ours.endswith("norm") else (0.02, 0.0)
        for start in range(0, rows.size, CHUNK):
            part = rows[start : start + CHUNK]
            part[:] = scale * rng.standard_normal(part.size, np.float32) + mean

    with shards.Writer(out, specs, None, int(SHARD_GB.value * 1e9)) as writer, concurrent.futures.ThreadPoolExecutor(partitioning.cores()) as pool:
        for _ in pool.map(fill, range(len(entries))):
            pass
        (writer.folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        special = {"<|mask|>": mask, "<|endoftext|>": eos} | {token: 256 + i for i, token in enumerate(chat.markers(family))}
        (writer.folder / "tokenizer.json").write_text(tokenizer_lib.bytes_json(V, special))
    size = sum(math.prod(shape) for _, shape in specs.values())
    print(f"made {out}: {family}, {len(specs):,} tensors, {size:,} numbers, {dtype}, in {time.perf_counter() - started:.0f} s")


def _run_folder(name: str, step: int | None) -> tuple[str, int, config_lib.Config, checkpoint.Leaves]:
    """(folder, step, config, leaves) of a run folder or checkpoint."""
    pretrained.check_exists(name)
    if pretrained.is_published(name):
        raise ConfigError(f"{name} is a published folder already; --checkpoint names a run folder")
    folder, step = checkpoint.locate(None, name, step)
    pretrained.check_finished(folder)
    step, config = checkpoint.read_config(folder, step)
    return folder, step, config, checkpoint.read_leaves(folder, step, WEIGHTS.value)


def _plain(config: config_lib.Config) -> config_lib.Config:
    return dataclasses.replace(config, model=lora.without(config.model))


def _needed(flag: flags.FlagHolder) -> str:
    if not flag.value:
        raise ConfigError(f"--{flag.name} is missing; see python -m llada_jax.convert --help")
    return flag.value


def _new_folder() -> pathlib.Path:
    out = pathlib.Path(_needed(OUT))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out} is not an empty folder; choose another, or remove it")
    return out


@contextlib.contextmanager
def _whole(out: pathlib.Path) -> Iterator[None]:
    """A folder that is written as a whole or not at all."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        _empty(out)
        if made:
            out.rmdir()
        raise


def _write_run(out: pathlib.Path, config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer, shapes: Any, leaf: Callable[[str], np.ndarray],
               step: int = 0) -> None:
    """A run folder of weights alone."""
    tokenizer.save(out)
    (out / "config.json").write_text(config_lib.to_json(config))
    checkpoint.save_variables(str(out), config, shapes, leaf, step)


def _empty(folder: pathlib.Path) -> None:
    """Remove what is in a folder; writers that an interrupt left running may add to it for a moment."""
    for _ in range(50):
        for left in folder.iterdir():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            return
        time.sleep(0.2)


def _describe(opened: pretrained.Opened) -> str:
    stored = sorted({tensor.dtype.name for tensor in opened.reader.tensors.values()})
    numbers = sum(math.prod(entry.shape) for entry in opened.entries)
    return (f"{opened.folder}: {opened.family}, {len(opened.entries):,} tensors ({', '.join(stored)}; experts {opened.layout}) in "
            f"{len(opened.reader.order)} file(s), {numbers:,} numbers; every tensor is the table's")


def _keep(opened: pretrained.Opened, folder: pathlib.Path) -> None:
    """Set aside what `export` needs to write everything as it came."""
    folder.mkdir()
    for file in sorted(pathlib.Path(opened.folder).iterdir()):
        if file.is_file() and file.suffix in KEPT and file.name != shards.INDEX:
            shutil.copyfile(file, folder / file.name)
    reader = opened.reader
    record = {"family": opened.family, "layout": opened.layout, "metadata": reader.metadata[reader.order[0]],
              "tensors": [[name, tensor.dtype.name, tensor.file] for name, tensor in reader.tensors.items()]}
    (folder / pretrained.RECORD).write_text(json.dumps(record) + "\n")


COMMANDS = {"import": import_, "export": export, "check": check, "make": make, "average": average, "merge": merge, "adapters": adapters}


def run() -> None:
    """SIGTERM cleans up as an interrupt does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command_line.run_commands(COMMANDS)


if __name__ == "__main__":
    run()
