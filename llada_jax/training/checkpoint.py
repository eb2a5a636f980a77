"""Checkpoints of a run folder (orbax): asynchronous, atomic, with the config and versions beside the weights.

A checkpoint is a folder of items: `variables` (weights), `ema`, `reference`, `training` (moments and counters) and `meta` (json:
layout version, step, config, versions). One of weights that were not trained here holds `variables` and `meta` alone. Weights are
read without touching the rest, and with about one array of host memory beside them (streaming.py). Paths may be gs://.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from llada_jax import config as config_lib
from llada_jax.training import optimizer as optimizer_lib
from llada_jax.training import streaming
from llada_jax.training.state import TrainState

LAYOUT_VERSION = 1  # of the parameter tree and of the items above; a change needs a converter and a stored old checkpoint in the tests
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
RESUME_MAY_CHANGE = ("mesh.", "kernels.", "train.")  # on resume; `train.` without what FIXED_TRAIN names
HASHED_AT_ONCE = 1 << 28  # bytes of an array that are gathered on every device to be hashed
COPIES = ("ema", "reference")  # of params, where the state has them: each an item
FIXED_TRAIN = ("train.batch_size", "train.accumulate", "train.seed")


class CheckpointError(config_lib.ConfigError):
    """A checkpoint that is missing, damaged or does not fit; the message says which and what to do."""


class Checkpointer:
    """Saves and restores the checkpoints of one run folder. `keep_every` = 0 keeps only the newest `keep_last`."""

    def __init__(self, workdir: str, keep_last: int, keep_every: int):
        _quiet()
        self.folder = _checkpoints(workdir)
        self._lock = _lock(self.folder)
        _sweep(self.folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every or None, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("variables", "ema", "reference", "training", "meta"))

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, config: config_lib.Config) -> None:
        """Start saving; returns once the state is copied off the device buffers that the next step may overwrite.

        Raises CheckpointError when this or the previous save failed; the last good checkpoint is untouched.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {
            "variables": ocp.args.StandardSave(state.variables),
            "training": ocp.args.StandardSave(_training(state)),
            "meta": ocp.args.JsonSave(_meta(step, config)),
        }
        items |= {name: ocp.args.StandardSave(tree) for name in COPIES if (tree := getattr(state, name)) is not None}
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def check(self) -> None:
        """Raise CheckpointError if the save under way has failed by now."""
        self._guard(lambda: None)

    def wait(self) -> None:
        """Block until the save under way is complete; raises CheckpointError when it failed."""
        self._guard(self._manager.wait_until_finished)

    def _guard(self, run: Callable[[], Any]) -> None:
        try:
            run()
            self._manager.check_for_errors()
        except Exception as error:  # orbax and tensorstore raise many types: all of them mean that nothing was saved
            good = self._manager.latest_step()
            raise CheckpointError(f"saving to {self.folder} failed ({_reason(error)}); the last good checkpoint is "
                                  f"{'none' if good is None else f'step {good}'}; make room and run the same command again") from error

    def restore(self, like: TrainState, step: int) -> TrainState:
        """The state of `step`, with the shapes, dtypes and shardings of the abstract state `like`."""
        items = {"variables": ocp.args.StandardRestore(like.variables), "training": ocp.args.StandardRestore(_training(like))}
        items |= {name: ocp.args.StandardRestore(tree) for name in COPIES if (tree := getattr(like, name)) is not None}
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            wanted = {"variables": like.variables, "training": _training(like), "ema": like.ema, "reference": like.reference}
            raise _misfit(self.folder, step, wanted) or _damaged(self.folder, step, self._manager.all_steps(), error) from error
        return TrainState(variables=found["variables"], **{name: found.get(name) for name in COPIES}, **found["training"])

    def close(self) -> None:
        """Wait for the save under way; raises CheckpointError when it failed."""
        self._guard(self._manager.close)


def _lock(folder: epath.Path) -> Any:
    """Keep other processes from training in a local run folder; the lock goes with this process, however it ends."""
    if jax.process_index() or "://" in str(folder):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder.parent / ".lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise CheckpointError(f"another process is training in {folder.parent}; wait for it, stop it, or use another --workdir") from error
    return file


def _sweep(folder: epath.Path) -> None:
    """Remove what saves that were cut off have left; orbax itself would keep those that are nearly done."""
    if jax.process_index() == 0 and folder.exists():
        for left_over in folder.glob("*.orbax-checkpoint-tmp*"):
            left_over.rmtree()


def _meta(step: int, config: config_lib.Config) -> dict[str, Any]:
    return {"layout_version": LAYOUT_VERSION, "step": step, "config": json.loads(config_lib.to_json(config)), "versions": versions()}


def _training(state: TrainState) -> dict[str, Any]:
    return {key: getattr(state, key) for key in ("step", "opt_state", "skipped", "skipped_in_a_row")}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers and layout."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _checkpoints(workdir: str) -> epath.Path:
    """The folder of a run's checkpoints; absolute, because orbax refuses relative paths."""
    return epath.Path(workdir if "://" in str(workdir) else os.path.abspath(workdir)) / "checkpoints"


def steps_of(workdir: str) -> list[int]:
    """Complete checkpoints of a run folder, ascending; a half-written one does not count."""
    if str(workdir).startswith("gs://"):
        _check_gs()
    folder = _checkpoints(workdir)
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(int(path.name) for path in found if ocp.utils.is_checkpoint_finalized(path))


def locate(workdir: str | None, path: str | None, step: int | None) -> tuple[str, int | None]:
    """(run folder, step or None) of what a user named: a run folder, or as `path` a run folder or one checkpoint, RUN/checkpoints/STEP.

    Raises ConfigError unless exactly one is given, and where the path and `step` name different steps.
    """
    if bool(workdir) == bool(path):
        raise config_lib.ConfigError("give one of --workdir=RUN and --checkpoint=DIR")
    folder = epath.Path(workdir or path)
    if path and folder.name.isdecimal() and folder.parent.name == "checkpoints":
        if step not in (None, int(folder.name)):
            raise config_lib.ConfigError(f"--checkpoint names step {folder.name}, --step={step} another")
        return str(folder.parent.parent), int(folder.name)
    return str(folder), step


def read_meta(workdir: str, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """(step, meta) of a checkpoint, the newest by default. Raises CheckpointError when there is none or it is damaged."""
    steps = steps_of(workdir)
    if not steps:
        raise CheckpointError(f"no checkpoint in {workdir}/checkpoints; "
                              f"train first: python -m llada_jax.train --config=… --workdir={workdir}")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise CheckpointError(f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    try:
        meta = json.loads((_checkpoints(workdir) / str(step) / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(_checkpoints(workdir), step, steps, error) from error
    if meta.get("layout_version") != LAYOUT_VERSION:
        raise CheckpointError(f"checkpoint {step} of {workdir} has layout version {meta.get('layout_version')}, this code reads {LAYOUT_VERSION}")
    return step, meta


def read_config(workdir: str, step: int | None = None) -> tuple[int, config_lib.Config]:
    """(step, config) that a checkpoint was trained with."""
    step, meta = read_meta(workdir, step)
    return step, config_lib.from_config_dict(meta["config"])


def save_variables(workdir: str, config: config_lib.Config, shapes: Any, leaf: Callable[[str], np.ndarray], step: int = 0) -> None:
    """Write a checkpoint of weights alone, holding one array at a time.

    `shapes` is the model's tree of ShapeDtypeStruct; `leaf(path)` gives the array of one path ("params/stack_0/gate") and is called
    again only when the last array is written and freed. Raises CheckpointError when the step is there already, another process uses
    the folder, an array has another shape or dtype, or it cannot be written, and what `leaf` raises as ConfigError; no part of the
    checkpoint stays then.
    """
    _quiet()
    folder = _checkpoints(workdir)
    if step in steps_of(workdir):
        raise CheckpointError(f"{workdir} holds a checkpoint of step {step} already; write to another folder")
    lock = _lock(folder)
    try:
        _sweep(folder)
        streaming.write(folder / str(step), shapes, leaf, _meta(step, config))
    except config_lib.ConfigError:
        raise
    except Exception as error:  # orbax and tensorstore raise many types
        raise CheckpointError(f"writing checkpoint {step} to {folder} failed ({_reason(error)}); nothing of it was kept; "
                              "make room and run the same command again") from error
    finally:
        _sweep(folder)
        if lock:
            lock.close()


class Leaves(Mapping[str, np.ndarray]):
    """The weights of one checkpoint as {path: array}, read from it each time one is asked for; `shapes` lists them without reading.

    A loop over `items()` holds two arrays for a moment, unless it deletes its own before the next turn.
    """

    def __init__(self, workdir: str, step: int, weights: str):
        self._folder, self._workdir, self._step = _checkpoints(workdir) / str(step), workdir, step
        if weights == "ema" and not (self._folder / "ema").exists():
            raise CheckpointError(f"checkpoint {step} of {workdir} holds no average: "
                                  "train with --config.optimizer.ema_decay=0.999, or use --weights=params")
        self._ema = weights == "ema"
        self.shapes = self._guard(lambda: streaming.shapes_of(self._folder / "variables"))

    def __getitem__(self, path: str) -> np.ndarray:
        return self.read({path: self.shapes[path]})[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        """Some of them with the dtypes and shardings of `like`: on the devices, or on the host where it names no sharding."""
        averaged = {path for path in like if self._ema and path.startswith("params/")}
        found = self._guard(lambda: streaming.read(self._folder / "variables", {path: like[path] for path in like if path not in averaged}))
        averages = {path.removeprefix("params/"): like[path] for path in averaged}
        return found | {f"params/{path}": x for path, x in self._guard(lambda: streaming.read(self._folder / "ema", averages)).items()}

    def _guard(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return run()
        except Exception as error:  # orbax and tensorstore raise many types
            raise _damaged(self._folder.parent, self._step, steps_of(self._workdir), error) from error


def read_leaves(workdir: str, step: int, weights: str = "params") -> Leaves:
    """The weights of one checkpoint on the host, one array at a time; `weights` is params or ema.

    Raises CheckpointError when the run kept no average or, here or on reading, the checkpoint is damaged.
    """
    _quiet()
    return Leaves(workdir, step, weights)


def load_variables(workdir: str, step: int, shapes: Any, shardings: Any, weights: str = "params") -> Any:
    """Model variables of one checkpoint, nothing else: `weights` is params or ema.

    `shapes` and `shardings` are the model's trees. Raises CheckpointError when the run kept no average, the checkpoint is
    damaged, or its tensors are not the model's.
    """
    leaves = read_leaves(workdir, step, weights)
    like = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)
    misfit = _misfit(_checkpoints(workdir), step, {"variables": like})
    if misfit:
        raise misfit
    found = leaves.read(_by_path(like))
    return jax.tree_util.tree_map_with_path(lambda path, _: found[optimizer_lib.path_of(path)], shapes)


def load_matching(workdir: str, step: int, variables: Any, leaves: Any = None) -> tuple[Any, list[str], list[str]]:
    """Replace the variables that a checkpoint (or `leaves` made of it, as by combine.py) also has: (variables, missing paths, extra paths).

    A tensor of the same path with another shape counts as missing and as extra. Raises CheckpointError when none fits.
    """
    leaves = read_leaves(workdir, step) if leaves is None else leaves
    ours = _by_path(variables)
    fits = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for path, leaf in ours.items()
            if path in leaves.shapes and leaves.shapes[path].shape == leaf.shape}
    if not fits:
        raise CheckpointError(f"none of the {len(leaves)} tensors of {workdir} step {step} fits this model")
    taken = ours | leaves.read(fits)
    variables = jax.tree_util.tree_map_with_path(lambda path, _: taken[optimizer_lib.path_of(path)], variables)
    return variables, sorted(set(ours) - set(fits)), sorted(set(leaves) - set(fits))


def _by_path(tree: Any) -> dict[str, Any]:
    return {optimizer_lib.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def differences(saved: config_lib.Config, now: config_lib.Config) -> tuple[list[str], list[str]]:
    """Settings that differ, as `key: old → new`: (those a resumed run may change, those it may not)."""
    old, new = config_lib.flatten(saved), config_lib.flatten(now)
    allowed, forbidden = [], []
    for key in new:
        if old.get(key) != new[key]:
            free = key.startswith(RESUME_MAY_CHANGE) and key not in FIXED_TRAIN
            (allowed if free else forbidden).append(f"{key}: {old.get(key)!r} → {new[key]!r}")
    return allowed, forbidden


def tree_hash(tree: Any) -> str:
    """SHA-256 over paths, dtypes, shapes and bytes of all leaves. All processes must call it: arrays that are split over them come in pieces."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{optimizer_lib.path_of(path)} {leaf.dtype} {leaf.shape}".encode())
        for piece in _pieces(leaf):
            digest.update(piece.tobytes())
    return digest.hexdigest()


def _pieces(leaf: Any) -> Iterator[np.ndarray]:
    """An array on this host, in order: whole, or where other processes hold some of it in pieces that leave room on the devices."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        yield np.asarray(leaf)
        return
    at_once = max(1, HASHED_AT_ONCE * leaf.shape[0] // max(leaf.nbytes, 1))
    for start in range(0, leaf.shape[0], at_once):
        yield multihost_utils.process_allgather(leaf[start:start + at_once], tiled=True)


def _check_gs() -> None:
    try:
        import gcsfs  # noqa: F401, behind epath
        from google.cloud import storage  # noqa: F401, orbax asks it for the bucket's layout
    except ImportError as error:
        raise CheckpointError(f"gs:// paths need a package that is not here ({error}); run: pip install gcsfs google-cloud-storage") from error


def _quiet() -> None:
    """Hide what orbax narrates, and what is left behind of its other reads and writes when one fails: its errors reach the user as exceptions."""
    logging.getLogger("absl").addFilter(_not_orbax)
    logging.getLogger("asyncio").addFilter(_not_unretrieved)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    sys.unraisablehook = _not_left_behind


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _not_unretrieved(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("never retrieved" in message and "orbax" in message)


def _not_left_behind(unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    if "Event loop is closed" not in str(unraisable.exc_value) and not (code and "orbax" in code.co_filename):
        sys.__unraisablehook__(unraisable)


def _misfit(folder: epath.Path, step: int, wanted: dict[str, Any]) -> CheckpointError | None:
    """What to say when a sound checkpoint holds other tensors than `wanted`; None when they agree or cannot be listed."""
    way_out = "undo the settings that differ, or start a new run with --init_from"
    with ocp.StandardCheckpointer() as reader:
        for item, tree in wanted.items():
            place = folder / str(step) / item
            if tree is None:
                continue
            if item == "ema" and not place.exists():
                return CheckpointError(f"checkpoint {step} in {folder} holds no average, as optimizer.ema_decay was 0; {way_out}")
            if item == "reference" and not place.exists():
                return CheckpointError(f"checkpoint {step} in {folder} holds no reference, as diffusion.objective was not preference; {way_out}")
            if item == "training" and not place.exists():
                return CheckpointError(f"checkpoint {step} in {folder} holds weights alone; start a new run with --init_from={folder.parent}@{step}")
            try:
                saved = reader.metadata(place).item_metadata.tree
            except Exception:  # cannot be listed: damaged, which is what the caller says then
                continue
            # moments are listed without their names: their tuples come back as other containers
            listed = lambda tree, item=item: {(optimizer_lib.path_of(path) if item != "training" else "", tuple(leaf.shape))
                                              for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
            theirs, ours = sorted(listed(saved) - listed(tree)), sorted(listed(tree) - listed(saved))
            if theirs or ours:
                named = lambda found: ", ".join(f"{name} {list(shape)}".strip() for name, shape in found[:2]) or "nothing"
                return CheckpointError(f"checkpoint {step} in {folder} does not fit: its {item} item holds {named(theirs)}, this config wants "
                                       f"{named(ours)}; {way_out}")
    return None


def _damaged(folder: epath.Path, step: int, steps: Any, error: Exception) -> CheckpointError:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return CheckpointError(f"checkpoint {step} in {folder} does not fit into memory ({_reason(error)}); split it over more devices")
    others = [s for s in steps if s != step]
    way_out = f"remove {folder / str(step)} to go on from step {max(others)}" if others else "there is no other; start in a new folder"
    return CheckpointError(f"checkpoint {step} in {folder} cannot be read ({_reason(error)}); {way_out}")


def _reason(error: BaseException) -> str:
    """The operating system's reason where the message holds one, else its first line."""
    text = str(error).strip()
    reason = re.search(r"([^: ][^:]+: [^:]+) \[os_error_code=", text)
    return reason[1] if reason else text.splitlines()[0][:200] if text else type(error).__name__
