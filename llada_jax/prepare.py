"""Write a corpus once as tokenised rows: python -m llada_jax.prepare --input='notes/*.jsonl' --tokenizer=train --out=DIR

DIR then serves as a source (`data.sources=DIR`) for any number of hosts. It holds train-*.array_record and
heldout-*.array_record (data/pack.py says what a record is), the tokenizer, and card.json: counts, a hash of all rows, the
tokenizer's fingerprint, sources and versions. The text is held in memory while it is prepared; a corpus larger than that is
prepared in parts with one tokenizer, and the folders stand together in `data.sources`.
"""

import hashlib
import json
import os
import pathlib
import platform
import tempfile
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from absl import flags
from array_record.python import array_record_module
from etils import epath

from llada_jax import command_line
from llada_jax import config as config_lib
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.config import ConfigError
from llada_jax.data import pack, pipeline, sources, supervised

_PACKAGES = ("sentencepiece", "array_record", "numpy")
_DATA = config_lib.Data()
_SUPERVISED = ("pack", "chat_template", "answer_padding")
FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command line, defined when this runs as a program, so that `prepare` can be imported beside other entry points."""
    flags.DEFINE_string("input", None, "What to read, as in data.sources but without weights.", required=True)
    flags.DEFINE_string("tokenizer", None, "train, bytes, a .model file, or a folder with tokenizer.*", required=True)
    flags.DEFINE_string("out", None, "Folder to write; must be new or empty.", required=True)
    flags.DEFINE_integer("sequence_length", _DATA.sequence_length, "Tokens a row.")
    flags.DEFINE_integer("vocab_size", _DATA.vocab_size, "Tokens of a tokenizer trained here.")
    flags.DEFINE_float("holdout", _DATA.holdout, "Share of documents kept for evaluation.")
    flags.DEFINE_string("text_field", _DATA.text_field, "Field of a record that holds the text.")
    flags.DEFINE_bool("pack", _DATA.pack, "Concatenate texts and split, put answers whole into rows with room; off gives each its own row.")
    flags.DEFINE_string("chat_template", _DATA.chat_template, "Family whose template writes messages, prompts and responses.")
    flags.DEFINE_string("answer_padding", _DATA.answer_padding, "As in the training that will read it: row and batch need --nopack.")
    flags.DEFINE_integer("limit", _DATA.limit, "Documents read at most from each source; 0 = all.")
    flags.DEFINE_integer("shard_rows", 65_536, "Rows a file.")


def prepare(data: config_lib.Data, out: epath.PathLike, shard_rows: int = 65_536) -> dict[str, Any]:
    """Write the folder `out` and return its card. `data.tokenizer` "" trains one.

    Everything is written to a temporary folder beside `out` and renamed at the end. Raises ConfigError for an `out` that is
    not empty, for weights, for sources that are prepared already, and for what `sources.load` and `pipeline` refuse.
    """
    out = epath.Path(out)
    if shard_rows < 1:
        raise ConfigError(f"--shard_rows={shard_rows} must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder: choose another --out, or remove it")
    for name, weight in sources.parse(data.sources):
        if weight is not None or sources.prepared_folder(name) is not None:
            raise ConfigError(f"--input={data.sources}: {name} {'has a weight' if weight is not None else 'is prepared already'}; "
                              "sources are mixed where they are used, in data.sources")
    config = config_lib.from_config_dict({"data": vars(data), "model": {"max_length": max(data.sequence_length, 1)}})
    loaded = sources.load(data)
    tokenizer = pipeline.build_tokenizer(config, sources=loaded)
    temporary = out.parent / f"{out.name}.tmp-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        tokenizer.save(temporary)
        splits = {split: _write_split(loaded, split, tokenizer, data, temporary, shard_rows) for split in ("train", "heldout")}
        card = {
            "sources": data.sources, "sequence_length": data.sequence_length, "holdout": data.holdout,
            **{name: getattr(data, name) for name in _SUPERVISED},
            "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "splits": splits,
            "sha256": hashlib.sha256("".join(splits[split]["sha256"] for split in splits).encode()).hexdigest(),
            "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        }
        (temporary / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        if out.exists():
            out.rmdir()  # empty, as checked
        temporary.rename(out)
    except BaseException:
        temporary.rmtree(missing_ok=True)
        raise
    return card


def _write_split(loaded: Sequence[sources.Source], split: str, tokenizer: tokenizer_lib.Tokenizer, data: config_lib.Data,
                 folder: epath.Path, shard_rows: int) -> dict[str, Any]:
    records: list[bytes] = []
    counts = {"documents": 0, "rows": 0, "tokens": 0, "bytes": 0, "samples": 0}
    for source in loaded:
        documents = getattr(source, split)
        rows = pipeline.pack_documents(documents, tokenizer, data, source.name)
        records += pack.to_records(rows)
        counts["documents"] += len(documents)
        counts["tokens"] += int((rows["segment"] > 0).sum())
        counts["bytes"] += int(rows["bytes"].sum())
        counts["samples"] += supervised.count(rows)
    counts["rows"] = len(records)
    if split == "train" and not records:
        raise ConfigError(f"{data.sources} has no rows to train on")
    shards = [records[start:start + shard_rows] for start in range(0, len(records), shard_rows)]
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as local:  # the writer knows local files only
        for number, shard in enumerate(shards):
            name = f"{split}-{number:05d}-of-{len(shards):05d}.array_record"
            path = pathlib.Path(local) / name
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")  # one row a chunk: rows are read at random
            for record in shard:
                writer.write(record)
                digest.update(record)
            writer.close()
            epath.Path(path).copy(folder / name)
            path.unlink()
    return {**counts, "sha256": digest.hexdigest()}


def main() -> None:
    """Prepare what the flags name and print what was written. Raises ConfigError for what cannot be, files that cannot be written among it."""
    data = config_lib.Data(
        sources=FLAGS.input, sequence_length=FLAGS.sequence_length, tokenizer="" if FLAGS.tokenizer == "train" else FLAGS.tokenizer,
        vocab_size=FLAGS.vocab_size, holdout=FLAGS.holdout, text_field=FLAGS.text_field, limit=FLAGS.limit,
        **{name: getattr(FLAGS, name) for name in _SUPERVISED})
    try:
        card = prepare(data, FLAGS.out, FLAGS.shard_rows)
    except OSError as error:
        raise ConfigError(f"cannot write {FLAGS.out}: {error}") from None
    for split, counts in card["splits"].items():
        print(f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens in {counts['rows']:,} rows")
    print(f"wrote {FLAGS.out}; use it with --config.data.sources={FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
