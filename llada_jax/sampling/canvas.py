"""The canvas a request is written on: prompts of different lengths in one batch, and gaps at any position.

A request is a list of pieces: a list of token ids is given text, an int N is a gap of N tokens to write. Everything
here runs on the host in numpy; `Canvas` holds what the engine needs.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from llada_jax.config import ConfigError

GAP = re.compile(r"<\|mask(?::([^|]*))?\|>")

Piece = Sequence[int] | int


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def encode(self, text: str) -> list[int]: ...


class Canvas(NamedTuple):
    """A batch of requests, padded on the left to one length T, so that every row ends at the same slot.

    A row of whole blocks may end in a tail: slots behind the request that complete its last block. They are written and seen like
    the gaps, and dropped afterwards, so they are neither writable nor valid: they have a block, and that alone marks them.
    """

    tokens_BT: np.ndarray  # int32; the mask id where something is to be written, the pad id in padding
    writable_BT: np.ndarray  # bool; the gaps
    valid_BT: np.ndarray  # bool; the request
    positions_BT: np.ndarray  # int32; counted from each row's first slot that is no padding, and 0 in padding
    block_BT: np.ndarray  # int32; blocks of the gaps and the tail, numbered from 0 in the order they are written; -1 elsewhere

    @property
    def seen(self) -> np.ndarray:
        """Everything but padding, which nobody sees; (B, T) bool."""
        return self.valid_BT | (self.block_BT >= 0)


def parse(text: str, encoder: Encoder, gen_length: int) -> list[Piece]:
    """Pieces of a text in which `<|mask:N|>` is a gap of N tokens; a text without gaps is a prompt, followed by `gen_length`.

    Raises ConfigError for a mask that is not such a gap.
    """
    pieces: list[Piece] = []
    end = 0
    for match in GAP.finditer(text):
        length = match.group(1) or ""
        if not length.isdecimal() or int(length) < 1:
            raise ConfigError(f"{match.group()!r} in the prompt: a gap of N tokens is written <|mask:N|>, for example <|mask:24|>")
        pieces += [encoder.encode(text[end : match.start()]), int(length)]
        end = match.end()
    pieces.append(encoder.encode(text[end:]))
    return pieces if end else pieces + [gen_length]


def build(requests: Sequence[Sequence[Piece]], *, block_length: int | Sequence[int], mask_id: int, pad_id: int, max_length: int, length: int = 0,
          aligned: bool = False) -> Canvas:
    """Lay requests out on one canvas of T = max(longest row, `length`) slots.

    Blocks of `block_length` count the writable slots of a row in order, so with a prompt and one gap they start at the prompt's
    end (LLaDA, arXiv 2502.09992, semi-autoregressive remasking); of several lengths the last one stands for all that follow. `aligned`
    blocks count the row's positions instead, so the first one may begin with given text, and a last one that is written gets a tail to
    make it whole (LLaDA2.0). Raises ConfigError for a
    request longer than `max_length`, a mask id among given tokens, or nothing to write.
    """
    lengths = [block_length] if isinstance(block_length, int) else [*block_length]
    ends = np.cumsum(lengths[:-1])  # of the first blocks, in writable slots; then all are as long as the last one
    rows = [_row(request, index, mask_id, max_length, lengths[-1] if aligned else 1) for index, request in enumerate(requests)]
    B, T = len(rows), max([length, *(len(tokens) for tokens, _, _ in rows)])
    tokens_BT, positions_BT, block_BT = np.full((B, T), pad_id, np.int32), np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    writable_BT, valid_BT = np.zeros((B, T), bool), np.zeros((B, T), bool)
    for b, (tokens, writable, tail) in enumerate(rows):
        start, end = T - len(tokens), T - tail
        tokens_BT[b, start:], positions_BT[b, start:] = tokens, np.arange(len(tokens))
        writable_BT[b, start:end], valid_BT[b, start:end] = writable[: end - start], True
        order = np.arange(len(tokens))[writable] if aligned else np.arange(writable.sum())
        number = np.searchsorted(ends, order, side="right") + np.maximum(order - sum(lengths[:-1]), 0) // lengths[-1]
        block_BT[b, start:][writable] = np.unique(number, return_inverse=True)[1]
    return Canvas(tokens_BT, writable_BT, valid_BT, positions_BT, block_BT)


def pad_rows(canvas: Canvas, multiple: int) -> Canvas:
    """Repeat the last row, with nothing to write, until the batch is divisible by `multiple` (devices); such rows cost no forward."""
    extra = -len(canvas.tokens_BT) % multiple
    padded = Canvas(*(np.concatenate([x, np.repeat(x[-1:], extra, axis=0)]) for x in canvas))
    if extra:
        padded.writable_BT[-extra:], padded.block_BT[-extra:] = False, -1
    return padded


def _row(request: Sequence[Piece], index: int, mask_id: int, max_length: int, whole: int) -> tuple[np.ndarray, np.ndarray, int]:
    """One request as (tokens, writable, tail): the last `tail` slots complete a block of `whole` that is written."""
    given = sum(len(piece) for piece in request if not isinstance(piece, int))
    gap = sum(piece for piece in request if isinstance(piece, int))
    if gap < 1:
        raise ConfigError(f"request {index} has nothing to write: add a gap <|mask:N|> or a generation length")
    if given + gap > max_length:
        room = f"write at most {max_length - given} tokens or " if given < max_length else ""
        raise ConfigError(f"request {index}: {given} given tokens and {gap} to write are {given + gap}, longer than the model's "
                          f"max_length={max_length}; {room}shorten the prompt")
    tokens = np.full(given + gap, mask_id, np.int32)
    writable = np.ones(given + gap, bool)
    at = 0
    for piece in request:
        if isinstance(piece, int):
            at += piece
            continue
        if mask_id in piece:
            raise ConfigError(f"request {index} holds the mask token (id {mask_id}) as given text; write a gap as <|mask:N|>")
        tokens[at : at + len(piece)], writable[at : at + len(piece)] = piece, False
        at += len(piece)
    tail = -at % whole if writable[at - at % whole :].any() else 0
    if at + tail > max_length:
        raise ConfigError(f"request {index}: {at} tokens in whole blocks of {whole} are {at + tail}, longer than the model's "
                          f"max_length={max_length}; shorten it by {at % whole} tokens")
    return np.append(tokens, np.full(tail, mask_id, np.int32)), np.append(writable, np.ones(tail, bool)), tail
