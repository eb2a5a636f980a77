"""Rows to batches. The whole state is (seed, step): any batch can be asked for, on any number of hosts, in any order.

Every source is shuffled anew each epoch and the sources are mixed by index with their weights, so row r of step s is one
lookup. Held-out rows stand in one fixed, shuffled order, so that the first of them are a fair sample of all.
"""

import functools
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from etils import epath

from llada_jax import tokenizer as tokenizer_lib
from llada_jax.config import Config, ConfigError, Data
from llada_jax.data import pack, supervised
from llada_jax.data import sources as sources_lib
from llada_jax.data.puzzles import PUZZLES
from llada_jax.tokenizer import Tokenizer

# Below this many rows grain's index shuffle walks a cycle of 2^16 for each of them (80 µs a row at 224 rows): order them at once.
_SMALL = 1 << 16
_KEYS = ("tokens", "segment", "position", "maskable")


def build_tokenizer(config: Config, workdir: epath.PathLike = "", sources: Sequence[sources_lib.Source] | None = None,
                    origin: epath.PathLike = "") -> Tokenizer:
    """The tokenizer kept in `workdir` if there is one; else `data.tokenizer`, that of prepared shards, a puzzle's own, that of `origin` (the run
    folder that weights are from), or one trained here.

    It is trained on the train split; of several processes one does it, and the others read it from `workdir`. `sources`
    (`sources.load(config.data)`) saves reading them again. Raises ConfigError where prepared shards were written with another one.
    """
    data = config.data
    names = [name for name, _ in sources_lib.parse(data.sources)]
    folders = [folder for folder in map(sources_lib.prepared_folder, names) if folder is not None]
    if workdir and any(epath.Path(workdir).glob("tokenizer.*")):
        result = tokenizer_lib.load(workdir)
    elif data.tokenizer:
        result = tokenizer_lib.load(data.tokenizer)
    elif folders:
        result = tokenizer_lib.load(folders[0])
    elif len(names) == 1 and names[0] in PUZZLES:
        result = tokenizer_lib.Characters(PUZZLES[names[0]].alphabet)
    elif origin and any(epath.Path(origin).glob("tokenizer.*")):
        result = tokenizer_lib.load(origin)
    else:
        documents = [document for source in sources or sources_lib.load(data) for document in source.train]
        result = tokenizer_lib.train((text for d in documents for text in (d.prompt, d.text) if text), data.vocab_size)
    for folder in folders:
        _check_card(folder, result, data)
    return result


def build(config: Config, tokenizer: Tokenizer, split: str, sources: Sequence[sources_lib.Source] | None = None) -> "Dataset":
    """Rows of one split: `train`, `heldout`, or `heldout_pairs`.

    Under diffusion.objective=preference `train` and `heldout_pairs` hold pairs, of which `heldout` has the chosen answers alone, in the same order.
    Text is tokenised and packed here and held in memory; prepared shards are read by index when asked for. Raises
    ConfigError for a source without rows to train on (no held-out rows are no error), for shards of another tokenizer or
    length, and where rows cannot be built.
    """
    data = config.data
    sources = sources_lib.load(data) if sources is None else sources
    parts, weights = [], []
    paired = split == "heldout_pairs" or (split == "train" and config.diffusion.objective == "preference")
    make = supervised.pairs_of if paired else pack_documents
    for source in sources:
        if source.prepared and paired:
            raise ConfigError(f"{source.prepared} holds prepared rows, no pairs: diffusion.objective=preference reads jsonl files, or lookup")
        part = _Shards(source.prepared, split, tokenizer, data) if source.prepared else _Memory(make(
            source.train if split == "train" else source.heldout, tokenizer, data, source.name))
        if len(part):
            parts.append(part)
            weights.append(source.weight or float(len(part)))
        elif split == "train":
            raise ConfigError(f"the source {source.name} has no rows to train on")
    return Dataset(parts, tuple(weights), split == "train", data, tokenizer.eos_id,
                   2 if paired or config.diffusion.complementary else 1, 2 if paired else 1)


def pack_documents(documents: Sequence[sources_lib.Document], tokenizer: Tokenizer, data: Data, name: str) -> pack.Rows:
    """Tokenise and pack documents as `data` says; what had to be cut is logged once. Raises ConfigError for what `data` cannot pack."""
    length, fixed = data.sequence_length, PUZZLES[name].length if name in PUZZLES else 0
    if fixed and (length != fixed or not isinstance(tokenizer, tokenizer_lib.Characters)):
        raise ConfigError(f"{name} rows are {fixed} tokens of its own alphabet, not data.sequence_length={length}; "
                          f"set it to {fixed}, use no other source")
    if fixed or not data.pack:
        return supervised.rows_of(documents, tokenizer, data, name, packed=False)
    texts = [tokenizer.encode(document.text) for document in documents if not document.answers]
    rows = pack.concat_and_split(texts, length, tokenizer.eos_id, tokenizer.piece_bytes)
    if len(texts) == len(documents):
        return rows
    answers = supervised.rows_of([document for document in documents if document.answers], tokenizer, data, name, packed=True)
    rows = pack.with_turns(rows)
    return {key: np.concatenate([rows[key], answers[key]]) for key in answers}


class Dataset:
    """Rows of one split. `num_rows` rows; everything about a batch follows from (seed, step, batch size)."""

    def __init__(self, parts: list[Any], weights: tuple[float, ...], shuffled: bool, data: Data, eos_id: int, taken: int = 1, own: int = 1):
        self._taken, self._own = taken, own  # rows of a training batch that hold one sample, one after the other; rows that are its own, of `rows`
        self._parts, self._weights, self._shuffled, self._data = parts, weights, shuffled, data
        self._sizes = tuple(len(part) for part in parts)
        self._starts = np.cumsum((0, *self._sizes))
        self.num_rows, self.sequence_length, self.eos_id = sum(self._sizes), data.sequence_length, eos_id
        # RandomState: its streams are frozen for ever, unlike those of Generator
        self._order = None if shuffled else _rows_of(np.random.RandomState(0).permutation(self.num_rows // own), own)

    def describe(self) -> str:
        """Rows, and for answers how many there are and how full of whole samples the rows stand, before any padding."""
        text = f"{self.num_rows:,} rows of {self.sequence_length} tokens" + ", two a pair" * (self._own > 1)
        samples, tokens = (sum(getattr(part, name) for part in self._parts) for name in ("samples", "tokens"))
        return f"{text}, {samples:,} samples with answers, {tokens / (self.num_rows * self.sequence_length):.1%} filled" if samples else text

    def epochs(self, drawn: int) -> float:
        """How often so many rows of training batches have seen everything there is, on average over sources of other weights."""
        return drawn / self._taken / (self.num_rows / self._own)

    def rows(self, indices: Any) -> pack.Rows:
        """Rows by index in 0..num_rows-1: tokens, segment, position, maskable, bytes (see pack.py), each (len(indices), T)."""
        indices = np.asarray(indices, np.int64).reshape(-1)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.num_rows:
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {self.num_rows}")
        return self._finish(self._gather(indices if self._order is None else self._order[indices]), indices, 0)

    def stream(self, max_rows: int = 0) -> np.ndarray:
        """int32 ids of documents one after the other, end-of-text after each: those of rows 0..max_rows-1 (0: all rows).

        Whatever the order of `rows`, the ids follow the text, so all rows give whole documents.
        """
        chosen = np.arange(self.num_rows) if self._order is None else self._order
        rows = self._gather(np.sort(chosen[:max_rows or None]))
        return rows["tokens"][rows["segment"] > 0]

    def batch(self, seed: int, step: int, batch_size: int, process_index: int = 0, process_count: int = 1) -> dict[str, np.ndarray]:
        """This process's rows of the global batch of one step: tokens, segment, position (int32), maskable (bool), (B, T).

        `index` (uint32, (B,)) is step · batch_size + row, the global sample index that noise is keyed by, modulo 2^32. Held-out
        batches run once through all rows, carry `bytes` too, ignore the seed, and end in rows of padding (segment 0).
        With data.answer_padding=batch each process reads the whole batch, whose longest answer decides.
        Raises ConfigError if the batch does not divide among the processes, IndexError after the last held-out batch.
        """
        if batch_size % process_count:
            raise ConfigError(f"train.batch_size={batch_size} is not divisible by {process_count} processes; "
                              f"use {-(-batch_size // process_count) * process_count}")
        share = batch_size // process_count
        first = step * batch_size + process_index * share
        samples = range(first, first + share)
        if self._shuffled:
            draw = _draws(seed, tuple(size // self._own for size in self._sizes), self._weights)
            together = range(step * batch_size, (step + 1) * batch_size) if self._data.answer_rule[0] == "batch" else samples
            draws = [i // self._taken for i in together]
            drawn = np.array([draw[i] for i in draws], np.int64)
            rows = self._finish(self._gather(drawn * self._own + np.array(together) % self._own), draws, seed)
            mine = slice(first - together[0], first - together[0] + share)
            rows = {key: rows[key][mine] for key in _KEYS}
        else:
            if not 0 <= step < -(-self.num_rows // batch_size):
                raise IndexError(f"held-out batch {step} of {-(-self.num_rows // batch_size)}")
            inside = [i for i in samples if i < self.num_rows]
            rows, rest = self.rows(inside), pack.padding_rows(share - len(inside), self.sequence_length, self.eos_id)
            rows = {key: np.concatenate([rows[key], rest[key]]) for key in rows}
        return {**rows, "index": (np.array(samples, np.uint64) & 0xFFFFFFFF).astype(np.uint32)}

    def batches(self, seed: int, calls: Sequence[range], batch_size: int, process_index: int = 0,
                process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """Batches of the steps of each call, prepared ahead, stacked in front: arrays (K, B, T), `index` (K, B).

        K is the length of the longest call; a shorter one repeats its last batch, so that all have one shape. With
        data.num_workers above 0 they are made by that many processes, otherwise by a thread of this one.
        """
        if not calls:
            return
        longest, workers = max(map(len, calls)), self._data.num_workers
        make = functools.partial(_stacked, self, seed, batch_size, process_index, process_count, longest)
        ahead = grain.MapDataset.source(calls).map(make).to_iter_dataset(
            grain.ReadOptions(num_threads=0 if workers else 1, prefetch_buffer_size=0 if workers else self._data.prefetch))
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers read their flags; a notebook has parsed none, so the defaults hold
            ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=self._data.prefetch))
        iterator = iter(ahead)
        try:
            yield from iterator
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    def _finish(self, rows: pack.Rows, index_B: Sequence[int], seed: int) -> pack.Rows:
        """What a batch learns of its rows; text stays as it is."""
        return supervised.finish(rows, index_B, seed, self._data, self.eos_id) if "turn" in rows else rows

    def _gather(self, indices: np.ndarray) -> pack.Rows:
        if len(self._parts) < 2:
            return self._parts[0].rows(indices) if self._parts else pack.padding_rows(0, self.sequence_length, self.eos_id)
        which = np.searchsorted(self._starts, indices, side="right") - 1
        taken = {part: self._parts[part].rows(indices[which == part] - self._starts[part]) for part in range(len(self._parts))}
        if any("turn" in rows for rows in taken.values()):
            taken = {part: pack.with_turns(rows) for part, rows in taken.items()}
        rows = {key: np.empty((len(indices), self.sequence_length), array.dtype) for key, array in taken[0].items()}
        for part, found in taken.items():
            for key, array in found.items():
                rows[key][which == part] = array
        return rows


class _Memory:
    """Rows held as arrays."""

    def __init__(self, rows: pack.Rows):
        self._rows = rows
        self.samples, self.tokens = supervised.count(rows), int((rows["segment"] > 0).sum())

    def __len__(self) -> int:
        return len(self._rows["tokens"])

    def rows(self, indices: np.ndarray) -> pack.Rows:
        return {key: array[indices] for key, array in self._rows.items()}


class _Shards:
    """Rows of prepared ArrayRecord files, read by index."""

    def __init__(self, folder: epath.Path, split: str, tokenizer: Tokenizer, data: Data):
        card = _check_card(folder, tokenizer, data)
        paths = sorted(folder.glob(f"{split}-*.array_record"))
        if "://" in str(folder):  # the reader opens local files only
            self._copies = tempfile.TemporaryDirectory()
            paths = [path.copy(epath.Path(self._copies.name) / path.name) for path in paths]
        self._length = data.sequence_length
        self._records = grain.sources.ArrayRecordDataSource([str(path) for path in paths]) if paths else []
        expected = card["splits"][split]["rows"]
        self.samples, self.tokens = (card["splits"][split].get(name, 0) for name in ("samples", "tokens"))
        if len(self._records) != expected:
            raise ConfigError(f"{folder} holds {len(self._records)} {split} rows, its card.json says {expected}; prepare it again")

    def __len__(self) -> int:
        return len(self._records)

    def rows(self, indices: np.ndarray) -> pack.Rows:
        return pack.from_records(self._records.__getitems__(indices.tolist()) if len(indices) else [], self._length)


class _Epochs:
    """Endless row numbers, every row once an epoch, each epoch in its own order."""

    def __init__(self, size: int, seed: int):
        self._size, self._seed = size, seed

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(int(index), self._size)
        return int(epoch_order(self._size, self._seed, epoch)[place])


@functools.lru_cache(maxsize=16)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0..size-1 in the order in which this epoch takes them, (size,) int64."""
    # raw Philox words, because numpy keeps them, not its permutations, equal between versions
    return np.random.Philox(key=[seed, epoch]).random_raw(size).argsort(kind="stable")


@functools.lru_cache(maxsize=16)
def _draws(seed: int, sizes: tuple[int, ...], weights: tuple[float, ...]) -> grain.MapDataset:
    """Sample index → row, over all sources."""
    mixed, start = [], 0
    for part, size in enumerate(sizes):
        own = int(np.random.SeedSequence([seed % 2**64, part]).generate_state(1)[0])
        order = grain.MapDataset.source(_Epochs(size, own)) if size < _SMALL else grain.MapDataset.range(size).shuffle(seed=own).repeat()
        mixed.append(order.map(functools.partial(_add, start)))
        start += size
    return mixed[0] if len(mixed) == 1 else grain.MapDataset.mix(mixed, weights=weights)


def _rows_of(samples: np.ndarray, own: int) -> np.ndarray:
    """Rows of samples that have so many each."""
    return (samples[:, None] * own + np.arange(own)).reshape(-1)


def _add(start: int, row: int) -> int:
    return start + row


def _stacked(dataset: Dataset, seed: int, batch_size: int, process_index: int, process_count: int, longest: int,
             steps: range) -> dict[str, np.ndarray]:
    batches = [dataset.batch(seed, step, batch_size, process_index, process_count) for step in steps]
    batches += batches[-1:] * (longest - len(batches))
    return {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}


def _check_card(folder: epath.Path, tokenizer: Tokenizer, data: Data) -> dict[str, Any]:
    card = sources_lib.read_card(folder)
    if card["tokenizer"] != tokenizer.fingerprint:
        raise ConfigError(f"{folder} was written with the tokenizer {card['tokenizer']}, this run has {tokenizer.fingerprint}; "
                          "leave data.tokenizer empty, or prepare it again")
    if card["sequence_length"] != data.sequence_length:
        raise ConfigError(f"{folder} holds rows of {card['sequence_length']} tokens, not data.sequence_length={data.sequence_length}")
    rule, block = data.answer_rule
    packed = card.get("pack") and any(split.get("samples") for split in card["splits"].values())
    if packed and rule in ("row", "batch"):
        raise ConfigError(f"{folder} holds several answers a row, which data.answer_padding={data.answer_padding} cannot pad; use "
                          f"{card['answer_padding']}, or prepare it with --nopack")
    if packed and Data(answer_padding=card["answer_padding"]).answer_rule[1] % block:
        raise ConfigError(f"{folder} was packed for data.answer_padding={card['answer_padding']}; its answers do not begin blocks of {block} tokens")
    return card
