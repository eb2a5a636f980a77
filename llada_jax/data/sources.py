"""`data.sources`: a string that names where documents come from.

`pystdlib:0.7,notes/*.jsonl:0.3` — sources separated by commas, each with an optional weight, the share of rows drawn from
it. Weights stand on all sources or on none; without them a source weighs as much as it has rows. A source is one of
  pystdlib            the standard library of the running Python, one document a file, split by file
  pystdlib/GLOB       those of its files: pystdlib/*.py are its modules, pystdlib/*/**/*.py its packages
  sudoku              4×4 solution grids, split by grid (data/sudoku.py)
  recall, lookup, addition, countdown    prompts with one exact answer, drawn, split by what they are made of (data/puzzles.py)
  tfds/NAME[:SPLIT]   a prepared tensorflow-datasets data set in ArrayRecord files (no TensorFlow), split `train` by default
  DIR                 a folder written by `python -m llada_jax.prepare`: tokenised rows with their own held-out share
  path or glob        .jsonl records (`data.text_field`, or `messages` with role and content, or `prompt` and `response`, or a pair: `prompt`, text
                      or messages, `chosen` and `rejected`); anything else is a UTF-8 text file

Preference optimisation wants pairs; what else is done with them takes the chosen answer alone.

Documents come in a fixed order, each text once over all sources. The held-out share is chosen by a hash of a file's name
(relative to the folder before the first wildcard) or of a record's content, a pair's prompt alone, so it is the same on every machine. At least
one of several documents is held out and one is not; a corpus of a single document is split inside, at the end of a line.
"""

import dataclasses
import glob
import hashlib
import json
import math
import pathlib
import sysconfig
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from llada_jax.config import ConfigError, Data
from llada_jax.data.puzzles import PUZZLES
from llada_jax.interop import chat

# Parts of the standard library that are no library: tests, an IDE, demos, installers, what was added to it, build records.
_NOT_LIBRARY = {"test", "tests", "idlelib", "turtledemo", "ensurepip", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
_BUILD_RECORDS = ("_sysconfigdata", "config-")


@dataclasses.dataclass(frozen=True)
class Document:
    """A named text; with a prompt it is the answer to it, with messages their contents. `key` decides whether it is held out. A pair is the better
    answer and has the text of the worse one besides."""

    name: str
    text: str
    key: str
    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    rejected: str | None = None

    @property
    def worse(self) -> "Document":
        """The rejected answer of a pair, as a document."""
        messages = (*self.messages[:-1], {"role": "assistant", "content": self.rejected}) if self.messages else ()
        return dataclasses.replace(self, text=self.rejected, messages=messages, rejected=None)

    @property
    def answers(self) -> bool:
        """Whether a part of it is given and the rest an answer."""
        return self.prompt is not None or bool(self.messages)


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents of one entry of `data.sources`, or the folder of prepared shards that holds its rows."""

    name: str
    weight: float | None
    train: list[Document] = dataclasses.field(repr=False)
    heldout: list[Document] = dataclasses.field(repr=False)
    prepared: epath.Path | None = None


def parse(spec: str) -> list[tuple[str, float | None]]:
    """Names and weights of a `data.sources` string; raises ConfigError for weights on only some, or not positive."""
    parsed = []
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, colon, tail = part.rpartition(":")
        try:
            parsed.append((name, float(tail)) if colon else (part, None))
        except ValueError:
            parsed.append((part, None))  # the colon belongs to the name: gs://…, tfds/NAME:SPLIT
    if not parsed:
        raise ConfigError("data.sources is empty; use for example pystdlib, or notes/*.txt")
    bare = [name for name, weight in parsed if weight is None]
    if bare and len(bare) < len(parsed):
        raise ConfigError(f"data.sources={spec!r} gives weights to some sources only; {', '.join(bare)} has none")
    for name, weight in parsed:
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"data.sources: the weight {weight} of {name} must be positive")
    return parsed


def load(data: Data) -> list[Source]:
    """Read every source of `data.sources`: documents in order, without repeats, split into train and heldout.

    Raises ConfigError for a source without documents, a glob without matches, or a file that cannot be read.
    """
    seen: set[bytes] = set()
    loaded = []
    for name, weight in parse(data.sources):
        folder = prepared_folder(name)
        if folder is not None:
            loaded.append(Source(name, weight, [], [], folder))
            continue
        documents = []
        for document in _documents(name, data):
            digest = hashlib.sha256(f"{document.prompt}\0{document.text}\0{document.rejected}".encode()).digest()
            if document.text.strip() and digest not in seen:
                seen.add(digest)
                documents.append(document)
                if len(documents) == data.limit:
                    break
        if not documents:
            raise ConfigError(f"the source {name} holds no text")
        if name in PUZZLES:
            parts = [d for d in documents if d.key == "train"], [d for d in documents if d.key == "heldout"]
        else:
            parts = _split(documents, data.holdout)
        loaded.append(Source(name, weight, *parts))
    return loaded


def prepared_folder(name: str) -> epath.Path | None:
    """The folder of prepared shards that a source names (by itself or by a glob of its shards), or None."""
    path = epath.Path(name).parent if name.endswith(".array_record") else epath.Path(name)
    if "*" not in str(path) and (path / "card.json").exists():
        return path
    if name.endswith(".array_record"):
        raise ConfigError(f"{path} holds no card.json: shards are written by `python -m llada_jax.prepare --out={path}`")
    return None


def read_card(folder: epath.Path) -> dict[str, Any]:
    """The card of a prepared folder; raises ConfigError if it is damaged."""
    try:
        card = json.loads((folder / "card.json").read_text())
        return {**card, "splits": {split: dict(card["splits"][split]) for split in ("train", "heldout")},
                "tokenizer": str(card["tokenizer"]), "sequence_length": int(card["sequence_length"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}/card.json is damaged ({type(error).__name__}: {error}); prepare the folder again") from None


def _documents(name: str, data: Data) -> Iterator[Document]:
    if name == "pystdlib" or name.startswith("pystdlib/"):
        return _standard_library(name.removeprefix("pystdlib").strip("/") or "**/*.py")
    if name in PUZZLES:
        return (Document(f"{name}[{i}]", text, split, prompt, rejected=wrong) for i, (split, prompt, text, wrong) in enumerate(PUZZLES[name].rows()))
    if name.startswith("tfds/"):
        return _tfds(name, data.text_field)
    return _files(name, data.text_field)


def _split(documents: list[Document], holdout: float) -> tuple[list[Document], list[Document]]:
    if not holdout:
        return documents, []
    if len(documents) == 1:
        return _split_inside(documents[0], holdout)
    rank = {id(d): int.from_bytes(hashlib.sha256(d.key.encode()).digest()[:8], "big") / 2**64 for d in documents}
    ordered = sorted(rank.values())
    bound = min(max(holdout, math.nextafter(ordered[0], 1)), ordered[-1])
    return [d for d in documents if rank[id(d)] >= bound], [d for d in documents if rank[id(d)] < bound]


def _split_inside(document: Document, holdout: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    cut = text.rfind("\n", 0, max(1, round(len(text) * (1 - holdout)))) + 1
    if not cut or document.answers:
        raise ConfigError(f"{document.name} is a single document that cannot be split; add documents or set data.holdout=0")
    return ([dataclasses.replace(document, text=text[:cut])], [dataclasses.replace(document, text=text[cut:])])


def _standard_library(pattern: str = "**/*.py") -> Iterator[Document]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for name in sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if path.suffix == ".py"):
        folders = name.split("/")[:-1]
        if not _NOT_LIBRARY.intersection(folders) and not name.startswith(_BUILD_RECORDS):
            try:
                text = (root / name).read_bytes().decode()
            except UnicodeDecodeError:
                continue  # a few files of some versions exist to show another encoding
            yield Document(name, text, name)


def _files(pattern: str, text_field: str) -> Iterator[Document]:
    parts = epath.Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root = epath.Path(*parts[:fixed]) if fixed else epath.Path(".")
    if fixed == len(parts) - 1 and not glob.has_magic(parts[-1]):
        paths = [epath.Path(pattern)]
    else:
        tree = root if "://" in pattern else pathlib.Path(root)  # etils has no `**`, which would list a whole bucket
        paths = [epath.Path(path) for path in sorted(tree.glob("/".join(parts[fixed:])))] if root.exists() else []
    paths = [path for path in paths if path.is_file()]
    if not paths:
        hint = f"; for the files of a folder use {pattern}/*.txt" if epath.Path(pattern).is_dir() else ""
        raise ConfigError(f"data.sources: no file matches {pattern}{hint}")
    for path in paths:
        try:
            text = path.read_bytes().decode()  # bytes, so that line ends stay as they are
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
        if path.suffix == ".jsonl":
            yield from _records(str(path), text, text_field)
        else:
            yield Document(str(path), text, path.relative_to(root).as_posix())


def _records(path: str, text: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not JSON ({error.msg})") from None
        except RecursionError:
            raise ConfigError(f"{where}: nested too deeply") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{where}: expected an object with the field {field!r} (data.text_field), with messages, with prompt and response, or "
                              "with prompt, chosen and rejected")
        chatted = field not in record and "messages" in record
        if field not in record and not chatted and {"chosen", "rejected"} & record.keys():
            yield _pair(where, record)
            continue
        paired = field not in record and not chatted and {"prompt", "response"} <= record.keys()
        messages = record["messages"] if chatted else ()
        if chatted:
            try:
                chat.check_conversation(messages)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
            values = ["\n".join(f"{message['role']}: {message['content']}" for message in messages)]
        else:
            values = [record["prompt"], record["response"]] if paired else [record.get(field)]
        if not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{where}: no text in the field {field!r} (data.text_field); fields: {', '.join(record) or 'none'}")
        yield Document(where, values[-1], _digest(where, *values), values[0] if paired else None, tuple(messages))


def _pair(where: str, record: dict[str, Any]) -> Document:
    """A line with a better and a worse answer to one prompt."""
    prompt, *answers = (record.get(name) for name in ("prompt", "chosen", "rejected"))
    if not all(isinstance(text, str) and text.strip() for text in answers) or answers[0] == answers[1] or not isinstance(prompt, str | list):
        raise ConfigError(f"{where} is no pair: prompt must be a text or messages, chosen and rejected two different texts; "
                          f"fields: {', '.join(record)}")
    messages = ()
    if isinstance(prompt, list):
        messages = (*prompt, {"role": "assistant", "content": answers[0]})
        try:
            chat.check_conversation(messages)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error} (chosen is the last message)") from None
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    _digest(where, *answers)
    return Document(where, answers[0], _digest(where, prompt), prompt, messages, answers[1])


def _digest(where: str, *values: str) -> str:
    try:
        return hashlib.sha256("\0".join(values).encode()).hexdigest()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: holds a lone surrogate (\\ud800 to \\udfff), which is no text") from None


def _tfds(name: str, field: str) -> Iterator[Document]:
    import tensorflow_datasets as tfds  # slow to import and needed here alone

    data_set, _, split = name.removeprefix("tfds/").partition(":")
    try:
        records = tfds.data_source(data_set, split=split or "train")
    except Exception as error:  # the library raises many kinds; each means that this name cannot be read
        raise ConfigError(f"{name}: {str(error).strip().splitlines()[0]} (it must be prepared with file_format='array_record')") from None
    for i in range(len(records)):
        record = records[i]
        if not isinstance(record.get(field), (str, bytes)):
            raise ConfigError(f"{name} record {i}: no text in the field {field!r} (data.text_field); fields: {', '.join(record)}")
        text = record[field].decode() if isinstance(record[field], bytes) else record[field]
        yield Document(f"{name}[{i}]", text, hashlib.sha256(text.encode()).hexdigest())
