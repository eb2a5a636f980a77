"""Weights that are larger than the free memory, to and from a checkpoint folder (orbax) one array at a time.

A leaf is named by its path (`optimizer.path_of`). `write` makes a whole checkpoint without ever holding two leaves; `read`
places weights on devices with about one leaf of host memory beside them.
"""

import gc
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
from etils import epath

from llada_jax.training import optimizer as optimizer_lib

# Bytes of a chunk before compression. Of buffers up to 32 MiB glibc keeps for later what was freed: half a leaf, measured.
SMALLEST_CHUNK, LARGEST_CHUNK = 32 << 20, 64 << 20


class _Failed:
    """A write that has failed; orbax asks for its result when its other writes are over, so that the folder can be removed."""

    def __init__(self, error: Exception):
        self._error = error

    def result(self, timeout: float | None = None) -> None:
        raise self._error


class _OneAtATime(ocp.type_handlers.NumpyHandler):
    """Writes what `leaf` gives for each path; the next one is asked for when the last is on the disk and freed."""

    def __init__(self, leaf: Callable[[str], np.ndarray]):
        super().__init__(deepcopy_host_arrays=False)  # nothing else changes the array meanwhile
        self._leaf = leaf

    async def serialize(self, values, infos, args=None):
        try:
            for wanted, info, arg in zip(values, infos, args, strict=True):
                path = optimizer_lib.path_of(info.keypath)
                array = self._leaf(path)
                if array.shape != wanted.shape or array.dtype != wanted.dtype:
                    raise ValueError(f"{path} is {array.dtype}{list(array.shape)}, it should be {wanted.dtype}{list(wanted.shape)}")
                for written in await super().serialize([array], [info], [arg]):
                    written.result()
                del array, written  # the future holds the array too
        except Exception as error:
            return [_Failed(error)]
        return []


def write(folder: epath.Path, shapes: Any, leaf: Callable[[str], np.ndarray], meta: Any) -> None:
    """Write a checkpoint of the items `variables` (shapes: a tree of ShapeDtypeStruct) and `meta`; atomic, as orbax renames at the end.

    Every chunk is a file of its own: orbax's OCDBT database would gather up to 2 GiB of them in memory.
    """
    registry = ocp.type_handlers.create_type_handler_registry((jax.ShapeDtypeStruct, _OneAtATime(leaf)))
    handlers = {"variables": ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry), "meta": ocp.JsonCheckpointHandler()}
    chunks = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=LARGEST_CHUNK, shard_axes=_split_axes(x)), shapes)
    items = ocp.args.Composite(variables=ocp.args.PyTreeSave(shapes, save_args=chunks), meta=ocp.args.JsonSave(meta))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
        writer.save(folder, args=items, force=True)


def _split_axes(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The leading axes to cut into single indices, such as layers: a chunk holds no part of two, so that a mesh need not read them all."""
    sizes = [math.prod(x.shape[axis + 1:]) * x.dtype.itemsize for axis in range(len(x.shape))]
    return tuple(axis for axis, size in enumerate(sizes) if size >= SMALLEST_CHUNK)


def shapes_of(folder: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """What an item of a checkpoint holds: {path: shape and dtype}."""
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
    return {optimizer_lib.path_of(path): jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def read(folder: epath.Path, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Some leaves of an item: jax.Array with the dtype and sharding of `like`, np.ndarray where it names no sharding."""
    found = {}
    with ocp.PyTreeCheckpointer() as reader:
        for paths in _groups(like):
            tree: dict[str, Any] = {}
            for path in paths:
                *parents, name = path.split("/")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[name] = like[path]
            restore = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True)
            for path, x in jax.tree_util.tree_leaves_with_path(reader.restore(folder, args=restore)):
                found[optimizer_lib.path_of(path)] = jax.block_until_ready(x)
            if isinstance(x, jax.Array):
                gc.collect()  # orbax leaves the host's copy in a reference cycle
            del x
    return found


def _groups(like: dict[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Paths that are read at once: together no larger than the largest leaf, or than one chunk."""
    sizes = {path: math.prod(x.shape) * x.dtype.itemsize for path, x in like.items()}
    most = max([LARGEST_CHUNK, *sizes.values()])
    group, size = [], 0
    for path in sizes:
        if group and size + sizes[path] > most:
            yield group
            group, size = [], 0
        group.append(path)
        size += sizes[path]
    if group:
        yield group


def free_memory(groups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Bytes that this process can still take: what the host has to spare, or less where a control group sets a limit."""
    free = [psutil.virtual_memory().available]
    for folder, limit, used, cache in _limits(pathlib.Path(groups), pathlib.Path(own)):
        try:
            most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free.append(max(most - taken + int(stat.get(cache, 0)), 0))  # cached files go when memory is wanted
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return min(free)


def _limits(groups: pathlib.Path, own: pathlib.Path) -> Iterable[tuple[pathlib.Path, str, str, str]]:
    """(folder, names of its limit, its use and its cached files) of this process's control groups up to the root, versions 1 and 2."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.strip("/")
        while folder != root:
            yield folder, *names
            folder = folder.parent
        yield root, *names
