"""Checkpoints of a run folder (orbax): asynchronous, atomic, with the config and versions beside the weights.

A checkpoint is a folder of four items: `variables` (weights), `ema`, `training` (moments and counters) and `meta` (json:
layout version, step, config, versions). Weights are read without touching the rest. Paths may be gs://.
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
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llada_jax import config as config_lib
from llada_jax.training import optimizer as optimizer_lib
from llada_jax.training.state import TrainState

LAYOUT_VERSION = 1  # of the parameter tree and of the items above; a change needs a converter and a stored old checkpoint in the tests
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
RESUME_MAY_CHANGE = ("mesh.", "kernels.", "train.")  # on resume; `train.` without what FIXED_TRAIN names
FIXED_TRAIN = ("train.batch_size", "train.accumulate", "train.seed")


class CheckpointError(config_lib.ConfigError):
    """A checkpoint that is missing, damaged or does not fit; the message says which and what to do."""


class Checkpointer:
    """Saves and restores the checkpoints of one run folder. `keep_every` = 0 keeps only the newest `keep_last`."""

    def __init__(self, workdir: str, keep_last: int, keep_every: int):
        _quiet()
        self.folder = _checkpoints(workdir)
        self._lock = _lock(self.folder)
        if jax.process_index() == 0 and self.folder.exists():
            for left_over in self.folder.glob("*.orbax-checkpoint-tmp*"):  # orbax itself would keep those that are nearly done
                left_over.rmtree()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every or None, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("variables", "ema", "training", "meta"))

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, config: config_lib.Config) -> None:
        """Start saving; returns once the state is copied off the device buffers that the next step may overwrite.

        Raises CheckpointError when this or the previous save failed; the last good checkpoint is untouched.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        meta = {"layout_version": LAYOUT_VERSION, "step": step, "config": json.loads(config_lib.to_json(config)), "versions": versions()}
        items = {
            "variables": ocp.args.StandardSave(state.variables),
            "training": ocp.args.StandardSave(_training(state)),
            "meta": ocp.args.JsonSave(meta),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
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
        if like.ema is not None:
            items["ema"] = ocp.args.StandardRestore(like.ema)
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            wanted = {"variables": like.variables, "training": _training(like), "ema": like.ema}
            raise _misfit(self.folder, step, wanted) or _damaged(self.folder, step, self._manager.all_steps(), error) from error
        return TrainState(variables=found["variables"], ema=found.get("ema"), **found["training"])

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


def load_variables(workdir: str, step: int, shapes: Any, shardings: Any, weights: str = "params") -> Any:
    """Model variables of one checkpoint, nothing else: `weights` is params or ema.

    `shapes` and `shardings` are the model's trees. Raises CheckpointError when the run kept no average, the checkpoint is
    damaged, or its tensors are not the model's.
    """
    _quiet()
    folder = _checkpoints(workdir) / str(step)
    if weights == "ema" and not (folder / "ema").exists():
        raise CheckpointError(f"checkpoint {step} of {workdir} holds no average: "
                              "train with --config.optimizer.ema_decay=0.999, or use --weights=params")
    like = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)
    with ocp.StandardCheckpointer() as reader:
        try:
            variables = reader.restore(folder / "variables", like)
            if weights == "ema":
                variables = {**variables, "params": reader.restore(folder / "ema", like["params"])}
        except Exception as error:
            raise _misfit(folder.parent, step, {"variables": like}) or _damaged(folder.parent, step, steps_of(workdir), error) from error
    return variables


def load_matching(workdir: str, step: int, variables: Any) -> tuple[Any, list[str], list[str]]:
    """Replace the variables that a checkpoint also has: (variables, missing paths, extra paths).

    A tensor of the same path with another shape counts as missing and as extra. Raises CheckpointError when none fits.
    """
    _quiet()
    folder = _checkpoints(workdir) / str(step) / "variables"
    with ocp.StandardCheckpointer() as reader:
        try:
            saved = reader.metadata(folder).item_metadata
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), saved.tree)
            found = reader.restore(folder, like)
        except Exception as error:
            raise _damaged(folder.parent.parent, step, steps_of(workdir), error) from error
    theirs = {optimizer_lib.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    ours = {optimizer_lib.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    fits = {path for path in ours if path in theirs and theirs[path].shape == ours[path].shape}
    if not fits:
        raise CheckpointError(f"none of the {len(theirs)} tensors of {workdir} step {step} fits this model")
    def pick(path, leaf):
        name = optimizer_lib.path_of(path)
        return jax.device_put(np.asarray(theirs[name], leaf.dtype), leaf.sharding) if name in fits else leaf
    return jax.tree_util.tree_map_with_path(pick, variables), sorted(set(ours) - fits), sorted(set(theirs) - fits)


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
    """SHA-256 over paths, dtypes, shapes and bytes of all leaves (single host)."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{optimizer_lib.path_of(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


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
    others = [s for s in steps if s != step]
    way_out = f"remove {folder / str(step)} to go on from step {max(others)}" if others else "there is no other; start in a new folder"
    return CheckpointError(f"checkpoint {step} in {folder} cannot be read ({_reason(error)}); {way_out}")


def _reason(error: BaseException) -> str:
    """The operating system's reason where the message holds one, else its first line."""
    text = str(error).strip()
    reason = re.search(r"([^: ][^:]+: [^:]+) \[os_error_code=", text)
    return reason[1] if reason else text.splitlines()[0][:200] if text else type(error).__name__
