"""Folders of safetensors files, read and written tensor by tensor through memory maps: nothing is copied, nothing is held in memory.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name → dtype, shape, offsets), then the tensors without holes.
A folder holds `model.safetensors`, or several files and `model.safetensors.index.json`, whose `weight_map` says which file holds a name.
"""

import json
import math
import mmap
import os
import pathlib
import re
import reprlib
import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from llada_jax.config import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {name: np.dtype(kind) for name, kind in {
    "BOOL": bool, "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}.items()}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the library's limit
FROM_TORCH = {"format": "pt"}  # the metadata without which transformers refuses a file
Spec = tuple[np.dtype, tuple[int, ...]]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_POINTER = b"version https://git-lfs"
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHORT = reprlib.Repr()  # what a damaged file holds may be long, and may hold line breaks
_SHORT.maxstring = _SHORT.maxother = 200


class Tensor(NamedTuple):
    """Where a tensor lies; `start` is its first byte, counted from the start of the file."""

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class Reader:
    """The tensors of a folder on this machine. Opening reads and checks every header, and no weights.

    `tensors` name → Tensor, by file and then by place in it; `order` the files, by name; `metadata` file → its `__metadata__`.
    Raises ConfigError, one line with file and tensor, for a folder without weights and for whatever does not fit together.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        index = index_only(self.folder) if os.path.lexists(self.folder / INDEX) else None
        self.order = _listed(self.folder) if index is None else sorted(set(index.values()))
        absent = [file for file in self.order if not os.path.isfile(self.folder / file)]
        if absent:
            raise ConfigError(f"{self.folder / absent[0]} is not there; of {len(self.order)} files {len(absent)} are missing: download them")
        for file in self.order:
            self._open(file, index)
        for name, file in (index or {}).items():
            if name not in self.tensors:
                raise ConfigError(f"{self.folder / file}: tensor {_SHORT.repr(name)} is not in this file, where {INDEX} has it; download both again")

    def array(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapped file; its bytes are read when they are used."""
        tensor = self.tensors[name]
        return np.ndarray(tensor.shape, tensor.dtype, self._maps[tensor.file], tensor.start)

    def release(self, name: str) -> None:
        """Give back the memory that reading a tensor's file took: the system would do so only when others need it."""
        if hasattr(mmap.mmap, "madvise"):
            self._maps[self.tensors[name].file].madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the files. Arrays stay valid: a file's map ends with its last array."""
        self._maps.clear()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, file: str, index: Mapping[str, str] | None) -> None:
        path = self.folder / file
        try:
            with open(path, "rb") as opened:
                self.metadata[file], tensors = _read_header(path, opened)
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            with safetensors.safe_open(path, "np"):  # a second opinion, by the format's own library; it reads the header alone
                pass
        except safetensors.SafetensorError as error:
            raise _damaged(path, " ".join(str(error).split())) from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
        for name, tensor in tensors.items():
            if index is not None and index.get(name) != file:
                has = f"has it in {index[name]}" if name in index else "does not know it"
                raise ConfigError(f"{path} holds tensor {_SHORT.repr(name)}, but {INDEX} {has}; download both again")
            if name in self.tensors:
                raise ConfigError(f"{path} holds tensor {_SHORT.repr(name)}, which {self.tensors[name].file} holds too; "
                                  f"remove one of the files, or add the {INDEX} that chooses")
            self.tensors[name] = tensor


def index_only(folder: str | os.PathLike) -> dict[str, str]:
    """Name → file of the folder's index, without any of its files. Raises ConfigError for an index that is missing or damaged."""
    path = pathlib.Path(folder) / INDEX
    try:
        with open(path, "rb") as opened:
            content = opened.read(MAX_HEADER + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    _refuse_pointer(path, content)
    if len(content) > MAX_HEADER:
        raise _damaged(path, f"it is longer than {MAX_HEADER} bytes")
    weight_map = _object(path, content, "the file").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "it holds no weight_map from names to files")
    for name, file in weight_map.items():
        if not _is_plain(file):
            raise ConfigError(f"{path} has tensor {_SHORT.repr(name)} in {_SHORT.repr(file)}; a file is a name.safetensors within the folder, "
                              "and no other kind is read")
    return weight_map


class Writer:
    """A new folder of safetensors files, complete or not there at all.

    `with Writer(folder, {name: (dtype, shape)}) as writer:` makes the files in full in a temporary folder beside `folder`. There `writer.array(name)`
    is filled, and other files are put into `writer.folder`. At the end all is renamed into place; after an exception nothing is left.
    Tensors lie in the order given, in the files that `shard_of` names, else in files of at most `max_shard_bytes` (a larger tensor has its own).
    Raises ConfigError, one line, for a folder that is not empty, a disk too small, and names or dtypes that the format does not have.
    """

    def __init__(self, folder: str | os.PathLike, tensors: Mapping[str, tuple[Any, Iterable[int]]], shard_of: Mapping[str, str] | None = None,
                 max_shard_bytes: int = 5 * 10**9, metadata: Mapping[str, str] = FROM_TORCH):
        self._target = pathlib.Path(folder).resolve()
        if self._target.exists() and (not self._target.is_dir() or any(self._target.iterdir())):
            raise ConfigError(f"{folder} is not an empty folder: choose another, or remove it")
        specs = {name: _spec(name, *spec) for name, spec in tensors.items()}
        shards = _shards(specs, shard_of, max_shard_bytes)
        headers = {file: _header(file, {name: specs[name] for name in names}, metadata) for file, names in shards.items()}
        self._total = sum(_num_bytes(*spec) for spec in specs.values())
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            needed, free = self._total + sum(len(header) for header, _ in headers.values()), shutil.disk_usage(self._target.parent).free
            if needed > free:
                raise ConfigError(f"{folder} needs {needed} bytes, its disk has {free} free; make room, or choose another disk")
            self._temporary = tempfile.TemporaryDirectory(dir=self._target.parent, prefix=f"{self._target.name}.tmp-")
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error.strerror})") from None
        # A folder within it, as the outer one is private to this user.
        self.folder = pathlib.Path(self._temporary.name) / self._target.name
        self._tensors: dict[str, Tensor] = {}
        self._maps: dict[str, mmap.mmap] = {}
        try:
            self.folder.mkdir()
            for file, (header, placed) in headers.items():
                self._tensors |= placed
                self._maps[file] = _create(self.folder / file, header, sum(_num_bytes(*specs[name]) for name in placed))
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                raise ConfigError(f"{folder} cannot be written ({error.strerror}); it needs {needed} bytes") from None
            raise

    def array(self, name: str) -> np.ndarray:
        """The tensor as a writable view of the mapped file, zeros at first."""
        tensor = self._tensors[name]
        return np.ndarray(tensor.shape, tensor.dtype, self._maps[tensor.file], tensor.start)

    def commit(self) -> None:
        """Flush, write the index and rename the folder into place; the end of `with` does it."""
        try:
            for mapped in self._maps.values():
                mapped.flush()
            if list(self._maps) != [SINGLE]:
                index = {"metadata": {"total_size": self._total}, "weight_map": {name: tensor.file for name, tensor in self._tensors.items()}}
                (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")  # as Hugging Face writes it
            self.folder.rename(self._target)
        except OSError as error:
            raise ConfigError(f"{self._target} cannot be written ({error.strerror}); did something else write there meanwhile?") from None
        finally:
            self.abort()

    def abort(self) -> None:
        """Let go of the files and remove the temporary folder."""
        self._maps.clear()
        self._temporary.cleanup()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()


def _listed(folder: pathlib.Path) -> list[str]:
    """The files of a folder without an index. Where names count (`…-00001-of-00003.safetensors`), all of them, there or not."""
    try:
        there = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{folder} is not a folder on this machine that can be read ({error.strerror})") from None
    files = [name for name in there if name.endswith(".safetensors")]
    if SINGLE in files:
        return [SINGLE]
    pickled = [name for name in there if name.endswith(_PICKLE)]
    if not files and pickled:
        raise ConfigError(f"{folder} holds pickle ({_SHORT.repr(pickled[0])}), which can run code and is not read; look for its safetensors version")
    if not files:
        raise ConfigError(f"{folder} holds no .safetensors file")
    for file in files:
        if not _is_plain(file):
            raise ConfigError(f"{folder} holds {_SHORT.repr(file)}, a name that cannot be printed; rename it")
    numbered = re.fullmatch(r"(.*-)\d{5}-of-(\d{5})\.safetensors", files[0])
    if numbered is None:
        return files
    prefix, count = numbered.groups()
    return sorted({*files, *(f"{prefix}{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1))})


def _read_header(path: pathlib.Path, opened: BinaryIO) -> tuple[dict[str, str], dict[str, Tensor]]:
    """`__metadata__` and the tensors in the order of their bytes, all checked against the file's size."""
    size = os.fstat(opened.fileno()).st_size
    start = opened.read(len(_POINTER))
    _refuse_pointer(path, start)
    if size < 8:
        raise _damaged(path, f"it has {size} bytes, less than the 8 that a header starts with")
    length = struct.unpack("<Q", start[:8])[0]
    if length > min(MAX_HEADER, size - 8):
        raise _damaged(path, f"its header should have {length} bytes, but the file has {size} and a header at most {MAX_HEADER}")
    opened.seek(8)
    header = _object(path, opened.read(length), "its header")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"its {_METADATA} is {_SHORT.repr(metadata)}, not text by name")
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    tensors, at, end = {}, 0, size - 8 - length
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        where = f"tensor {_SHORT.repr(name)} has the bytes {begin} to {stop}"
        if begin != at:
            raise _damaged(path, f"{where}, but the tensor before it ends at {at}: they {'overlap' if begin < at else 'leave a hole'}")
        if stop > end:
            raise _damaged(path, f"{where}, but only {end} follow the header")
        tensors[name] = Tensor(path.name, dtype, shape, 8 + length + begin)
        at = stop
    if at != end:
        last = f"its last tensor {_SHORT.repr(next(reversed(tensors)))} ends at byte" if tensors else "it has no tensors, which end at byte"
        raise _damaged(path, f"{last} {at}, but {end} follow the header")
    return metadata, tensors


def _entry(path: pathlib.Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one tensor of a header."""
    tensor = f"tensor {_SHORT.repr(name)} has"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{tensor} {_SHORT.repr(entry)}, not dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ConfigError(f"{path}: {tensor} dtype {_SHORT.repr(kind)}, which is not read; use a version in one of {', '.join(DTYPES)}")
    if not _is_counts(shape) or len(shape) > 64:  # numpy's limit
        raise _damaged(path, f"{tensor} shape {_SHORT.repr(shape)}, not at most 64 whole numbers from 0")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{tensor} data_offsets {_SHORT.repr(offsets)}, not two rising whole numbers")
    dtype, (begin, end) = DTYPES[kind], offsets
    if max(math.prod(max(d, 1) for d in shape) * dtype.itemsize, end) >= 2**63:  # also where a dimension is zero: numpy and the library refuse it
        raise _damaged(path, f"{tensor} shape {_SHORT.repr(shape)} and data_offsets {_SHORT.repr(offsets)}, beyond 64 bits")
    if end - begin != _num_bytes(dtype, shape):
        raise _damaged(path, f"{tensor} {kind} and shape {shape}, which is {_num_bytes(dtype, shape)} bytes, but data_offsets {offsets}, "
                             f"which is {end - begin}")
    return dtype, tuple(shape), begin, end


def _object(path: pathlib.Path, content: bytes, what: str) -> dict[str, Any]:
    """JSON that is an object and says nothing twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise ValueError(f"{_SHORT.repr(name)} is there twice")
            fields[name] = value
        return fields

    try:
        value = json.loads(content.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise _damaged(path, f"{what} is nested too deeply") from None
    except ValueError as error:
        raise _damaged(path, f"{what} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise _damaged(path, f"{what} is {_SHORT.repr(value)}, not a JSON object")
    return value


def _spec(name: str, dtype: Any, shape: Iterable[int]) -> Spec:
    dtype = np.dtype(dtype)
    if dtype not in _NAMES or name == _METADATA:
        raise ConfigError(f"tensor {name!r} of dtype {dtype} cannot be written; dtypes are {', '.join(DTYPES)}, and {_METADATA} is no name")
    return dtype, tuple(int(d) for d in shape)


def _shards(specs: Mapping[str, Spec], shard_of: Mapping[str, str] | None, max_bytes: int) -> dict[str, list[str]]:
    """file → names, in the order given; numbered files are filled one after the other."""
    if shard_of is not None:
        unlike = shard_of.keys() ^ specs.keys()
        if unlike:
            raise ConfigError(f"shard_of names other tensors than are written: {len(unlike)} differ, such as {min(unlike)!r}")
        shards: dict[str, list[str]] = {}
        for name in specs:
            if not _is_plain(shard_of[name]):
                raise ConfigError(f"shard_of has tensor {name!r} in {shard_of[name]!r}; use a name.safetensors without a folder")
            shards.setdefault(shard_of[name], []).append(name)
        return dict(sorted(shards.items())) or {SINGLE: []}
    groups, filled = [[]], 0
    for name, spec in specs.items():
        if groups[-1] and filled + _num_bytes(*spec) > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += _num_bytes(*spec)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _header(file: str, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Tensor]]:
    """The bytes before the tensors, padded with blanks to 8 as the library does, and where each tensor lies."""
    fields: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    begins, at = {}, 0
    for name, (dtype, shape) in specs.items():
        begins[name], at = at, at + _num_bytes(dtype, shape)
        fields[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begins[name], at]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: Tensor(file, *specs[name], len(header) + begin) for name, begin in begins.items()}


def _create(path: pathlib.Path, header: bytes, num_bytes: int) -> mmap.mmap:
    """A file of the header and `num_bytes` zeros, mapped for writing."""
    with open(path, "xb+") as opened:
        opened.write(header)
        opened.truncate(len(header) + num_bytes)
        if hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process as it touches the map
            os.posix_fallocate(opened.fileno(), 0, len(header) + num_bytes)
        opened.flush()
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_WRITE)


def _num_bytes(dtype: np.dtype, shape: Iterable[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _is_plain(file: Any) -> bool:
    """A safetensors file within the folder, whose name fits into a line; symlinks are as good as files."""
    return isinstance(file, str) and file.endswith(".safetensors") and file.isprintable() and not set(file) & set("/\\")


def _refuse_pointer(path: pathlib.Path, content: bytes) -> None:
    if content.startswith(_POINTER):
        raise ConfigError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder")


def _damaged(path: pathlib.Path, problem: str) -> ConfigError:
    return ConfigError(f"{path}: {problem}; the file is damaged, download it again")
