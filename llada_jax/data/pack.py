"""Documents of token ids to rows of fixed length, in numpy alone.

Rows are a dict of arrays of shape (B, T):
  tokens    int32, ids; padding is end-of-text
  segment   int32, 1, 2, … for the documents of a row, 0 for padding: attention stays within a segment
  position  int32, restarts at 0 where a segment starts within the row
  maskable  bool, what may be corrupted and stands in the loss
  bytes     int32, bytes of original text that a token stands for, 0 for control tokens
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rows = dict[str, np.ndarray]
PieceBytes = Callable[[Any], np.ndarray]  # `Tokenizer.piece_bytes`
_STORED = ("tokens", "segment", "bytes", "maskable")  # positions follow from segments


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


def pad_rows(documents: Sequence[Sequence[int]], sequence_length: int, eos_id: int, piece_bytes: PieceBytes,
             prompts: Sequence[Sequence[int] | None] | None = None) -> tuple[Rows, int, int]:
    """Each document in its own row. Returns (rows, documents cut to the row, pairs left out because the prompt fills it).

    A plain document is followed by one end-of-text id; the padding after it is segment 0. A document with a prompt is the
    answer to it (LLaDA's supervised form, arXiv 2502.09992 §2.3): the prompt is never maskable, and the padding counts as
    answer, so it is visible, maskable and in the loss. A document that is exactly as long as the row has no end-of-text id.
    """
    count = len(documents)
    tokens_BT = np.full((count, sequence_length), eos_id, np.int32)
    start_B, end_B, cut = np.zeros(count, np.int64), np.zeros(count, np.int64), 0
    for row, (document, prompt) in enumerate(zip(documents, prompts or [None] * count, strict=True)):
        whole = np.asarray([*(prompt or ()), *document], np.int32)
        tokens_BT[row, :len(whole)] = whole[:sequence_length]
        start_B[row] = len(prompt or ())
        end_B[row] = len(whole) + 1 if prompt is None else sequence_length
        cut += start_B[row] < sequence_length < len(whole)
    kept_B = start_B < sequence_length
    index_T = np.arange(sequence_length)
    inside_BT = index_T < end_B[kept_B, None]
    maskable_BT = inside_BT & (index_T >= start_B[kept_B, None])
    return _rows(tokens_BT[kept_B], inside_BT.astype(np.int32), maskable_BT, piece_bytes), int(cut), int((~kept_B).sum())


def positions(segment_BT: np.ndarray) -> np.ndarray:
    """int32 (B, T): distance from the start of the segment within the row."""
    index_BT = np.broadcast_to(np.arange(segment_BT.shape[1], dtype=np.int32), segment_BT.shape)
    starts_BT = np.diff(segment_BT, axis=1, prepend=-1) != 0
    return index_BT - np.maximum.accumulate(np.where(starts_BT, index_BT, 0), axis=1)


def padding_rows(count: int, sequence_length: int, eos_id: int) -> Rows:
    """Rows that hold nothing: they complete a batch of fixed shape and count in no loss."""
    shape = (count, sequence_length)
    return _rows(np.full(shape, eos_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros_like)


def to_records(rows: Rows) -> list[bytes]:
    """One record a row: tokens, segment, bytes and maskable, little-endian int32 of length T each."""
    return [record.tobytes() for record in np.stack([rows[key].astype("<i4") for key in _STORED], axis=1)]


def from_records(records: Sequence[bytes], sequence_length: int) -> Rows:
    """The rows that `to_records` wrote."""
    stored = np.frombuffer(b"".join(records), "<i4").reshape(len(records), len(_STORED), sequence_length)
    rows = {key: stored[:, i] for i, key in enumerate(_STORED)}
    return {**rows, "position": positions(rows["segment"]), "maskable": rows["maskable"].astype(bool)}


def _rows(tokens_BT: np.ndarray, segment_BT: np.ndarray, maskable_BT: np.ndarray, piece_bytes: PieceBytes) -> Rows:
    bytes_BT = np.where(segment_BT > 0, piece_bytes(tokens_BT), 0).astype(np.int32)
    return {"tokens": tokens_BT, "segment": segment_BT, "position": positions(segment_BT), "maskable": maskable_BT, "bytes": bytes_BT}
