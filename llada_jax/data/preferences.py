"""Pairs of a better and a worse answer to one prompt: from jsonl to batches. The whole state is (seed, step), as in pipeline.py."""

import functools
import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from llada_jax.config import ConfigError
from llada_jax.data import pack
from llada_jax.tokenizer import Tokenizer

FIELDS = ("prompt", "chosen", "rejected")


def read(path: str) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of every line `{"prompt": …, "chosen": …, "rejected": …}` of a jsonl file.

    Raises ConfigError, naming the line, for one that is not that, for an empty answer and for two equal ones.
    """
    pairs = []
    for number, line in enumerate(epath.Path(path).read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            pair = tuple(fields[name] for name in FIELDS)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number} is no pair ({error}); a line is {{\"prompt\": …, \"chosen\": …, \"rejected\": …}}") from None
        if not all(isinstance(text, str) for text in pair) or not pair[1] or not pair[2] or pair[1] == pair[2]:
            raise ConfigError(f"{path}:{number}: chosen and rejected must be two different texts")
        pairs.append(pair)
    if not pairs:
        raise ConfigError(f"{path} holds no pair")
    return pairs


def rows(pairs: Sequence[tuple[str, str, str]], tokenizer: Tokenizer, length: int) -> tuple[pack.Rows, int]:
    """Rows of shape (pairs, 2, length), chosen first, and how many pairs were left out as one of theirs is longer.

    A row is the prompt, the answer and one end-of-text id, these two maskable; padding after it is segment 0, unseen and in no loss.
    """
    encoded = [(tokenizer.encode(prompt), [[*tokenizer.encode(text), tokenizer.eos_id] for text in answers]) for prompt, *answers in pairs]
    kept = [(prompt, answers) for prompt, answers in encoded if len(prompt) + max(map(len, answers)) <= length]
    tokens_P2T = np.full((len(kept), 2, length), tokenizer.eos_id, np.int32)
    segment_P2T, maskable_P2T = np.zeros(tokens_P2T.shape, np.int32), np.zeros(tokens_P2T.shape, bool)
    for i, (prompt, answers) in enumerate(kept):
        for j, answer in enumerate(answers):
            end = len(prompt) + len(answer)
            tokens_P2T[i, j, :end] = [*prompt, *answer]
            segment_P2T[i, j, :end], maskable_P2T[i, j, len(prompt):end] = 1, True
    position_P2T = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_P2T.shape)
    return {"tokens": tokens_P2T, "segment": segment_P2T, "position": position_P2T, "maskable": maskable_P2T}, len(pairs) - len(kept)


def batch(pairs: pack.Rows, seed: int, step: int, count: int) -> dict[str, np.ndarray]:
    """`count` pairs of `rows` for one step, each epoch in its own order: (2 · count, T), rows 2i and 2i + 1 the chosen and the rejected of a pair.

    `index` (uint32) is the global sample index of each row, that noise is keyed by.
    """
    total = len(pairs["tokens"])
    samples = range(step * count, (step + 1) * count)
    chosen = np.array([_order(total, seed, i // total)[i % total] for i in samples], np.int64)
    taken = {key: array[chosen].reshape(2 * count, *array.shape[2:]) for key, array in pairs.items()}
    return {**taken, "index": (np.arange(2 * samples.start, 2 * samples.stop, dtype=np.uint64) & 0xFFFFFFFF).astype(np.uint32)}


@functools.lru_cache(maxsize=16)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Philox(key=[seed, epoch]).random_raw(size).argsort(kind="stable")  # as in pipeline.py
