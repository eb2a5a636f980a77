"""Documents of token ids to rows of fixed length, in numpy alone.

Rows are a dict of arrays of shape (B, T):
  tokens    int32, ids; padding is end-of-text
  segment   int32, 1, 2, … for the documents of a row, 0 for padding: attention stays within a segment
  position  int32, restarts at 0 where a segment starts within the row
  maskable  bool, what may be corrupted and stands in the loss
  bytes     int32, bytes of original text that a token stands for, 0 for control tokens
  turn      int32, where there are answers: 0 given (a prompt) or padding, 1 text, 1 + k the k-th answer of its segment. Which of them
            a batch learns, and what is padded after it, is settled when it is drawn (supervised.py)
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rows = dict[str, np.ndarray]
PieceBytes = Callable[[Any], np.ndarray]  # `Tokenizer.piece_bytes`
_STORED = ("tokens", "segment", "bytes", "turn")  # positions follow from segments, what is maskable from turns


def concat_and_split(documents: Sequence[Sequence[int]], sequence_length: int, eos_id: int, piece_bytes: PieceBytes) -> Rows:
    """Join documents, an end-of-text id after each, and cut into rows; only the last row may hold padding.

    A document cut by a row's end goes on in the next row as a new segment. Empty documents leave nothing behind.
    """
    documents = [np.asarray(d, np.int32) for d in documents if len(d)]
    length = sum(len(d) + 1 for d in documents)
    num_rows = -(-length // sequence_length)
    tokens_M = np.full(num_rows * sequence_length, eos_id, np.int32)
    document_M = np.zeros(num_rows * sequence_length, np.int64)
    start = 0
    for number, document in enumerate(documents, 1):
        end = start + len(document) + 1
        tokens_M[start:end - 1] = document
        document_M[start:end] = number
        start = end
    tokens_BT = tokens_M.reshape(num_rows, sequence_length)
    document_BT = document_M.reshape(num_rows, sequence_length)
    segment_BT = np.where(document_BT > 0, document_BT - document_BT[:, :1] + 1, 0).astype(np.int32)
    return _rows(tokens_BT, segment_BT, segment_BT > 0, piece_bytes)


def place(samples: Sequence[tuple[Sequence[int], Sequence[int]]], row_N: Sequence[int], sequence_length: int, eos_id: int,
          piece_bytes: PieceBytes, block_length: int = 1) -> Rows:
    """Whole samples (tokens, turns), each a segment behind those that stand in its row already, from the next start of a block on.

    The rest is padding. Raises ValueError for a row that overflows.
    """
    shape = (max(row_N, default=-1) + 1, sequence_length)
    tokens_BT, segment_BT, turn_BT = np.full(shape, eos_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    used_B, count_B = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int32)
    for (tokens, turns), row in zip(samples, row_N, strict=True):
        start, end = used_B[row], used_B[row] + len(tokens)
        if end > sequence_length:
            raise ValueError(f"{end} tokens in a row of {sequence_length}")
        count_B[row] += 1
        tokens_BT[row, start:end], turn_BT[row, start:end], segment_BT[row, start:end] = tokens, turns, count_B[row]
        used_B[row] = -(-end // block_length) * block_length
    return {**_rows(tokens_BT, segment_BT, turn_BT > 0, piece_bytes), "turn": turn_BT}


def first_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """The row of each item: the first one that has room for it, items taken in their order.

    A tree over rows holds the largest room below each node, so that an item takes log2(items) looks. Raises ValueError for an
    item longer than a row.
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"an item of {max(lengths)} tokens does not fit in rows of {capacity}")
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    rows = []
    for length in lengths:
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        rows.append(node - leaves)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def positions(segment_BT: np.ndarray) -> np.ndarray:
    """int32 (B, T): distance from the start of the segment within the row."""
    index_BT = np.broadcast_to(np.arange(segment_BT.shape[1], dtype=np.int32), segment_BT.shape)
    starts_BT = np.diff(segment_BT, axis=1, prepend=-1) != 0
    return index_BT - np.maximum.accumulate(np.where(starts_BT, index_BT, 0), axis=1)


def padding_rows(count: int, sequence_length: int, eos_id: int) -> Rows:
    """Rows that hold nothing: they complete a batch of fixed shape and count in no loss."""
    shape = (count, sequence_length)
    return _rows(np.full(shape, eos_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros_like)


def with_turns(rows: Rows) -> Rows:
    """The same rows with `turn`, where they had none: text."""
    return rows if "turn" in rows else {**rows, "turn": rows["maskable"].astype(np.int32)}


def to_records(rows: Rows) -> list[bytes]:
    """One record a row: tokens, segment, bytes and turn, little-endian int32 of length T each."""
    rows = with_turns(rows)
    return [record.tobytes() for record in np.stack([rows[key].astype("<i4") for key in _STORED], axis=1)]


def from_records(records: Sequence[bytes], sequence_length: int) -> Rows:
    """The rows that `to_records` wrote."""
    stored = np.frombuffer(b"".join(records), "<i4").reshape(len(records), len(_STORED), sequence_length)
    rows = {key: stored[:, i] for i, key in enumerate(_STORED)}
    return {**rows, "position": positions(rows["segment"]), "maskable": rows["turn"] > 0}


def _rows(tokens_BT: np.ndarray, segment_BT: np.ndarray, maskable_BT: np.ndarray, piece_bytes: PieceBytes) -> Rows:
    bytes_BT = np.where(segment_BT > 0, piece_bytes(tokens_BT), 0).astype(np.int32)
    return {"tokens": tokens_BT, "segment": segment_BT, "position": positions(segment_BT), "maskable": maskable_BT, "bytes": bytes_BT}
