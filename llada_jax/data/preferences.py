"""Pairs of a better and a worse answer to one prompt: from jsonl to batches. The whole state is (seed, step), as in pipeline.py."""

import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from llada_jax.config import ConfigError
from llada_jax.data import pack, pipeline, supervised
from llada_jax.data.sources import Document
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


def rows(pairs: Sequence[tuple[str, str, str]], tokenizer: Tokenizer, length: int, template: str = "") -> tuple[pack.Rows, int]:
    """Rows of shape (pairs, 2, length), chosen first, and how many pairs were left out as one of theirs is longer.

    A row is the prompt, the answer and the id that ends it, as `supervised.sample_of` writes them, the answer and its end maskable; padding after
    it is segment 0, unseen and in no loss.
    """
    made = [[supervised.sample_of(Document(f"pair {i}", text, "", prompt), tokenizer, template) for text in answers]
            for i, (prompt, *answers) in enumerate(pairs)]
    kept = [sample[:2] for samples in made if max(len(sample.tokens) for sample in samples) <= length for sample in samples]
    placed = pack.place(kept, range(len(kept)), length, tokenizer.eos_id, tokenizer.piece_bytes)
    placed["maskable"] = placed["turn"] > supervised.TEXT
    found = {key: placed[key].reshape(-1, 2, length) for key in ("tokens", "segment", "position", "maskable")}
    return found, len(pairs) - len(kept) // 2


def batch(pairs: pack.Rows, seed: int, step: int, count: int) -> dict[str, np.ndarray]:
    """`count` pairs of `rows` for one step, each epoch in its own order: (2 · count, T), rows 2i and 2i + 1 the chosen and the rejected of a pair.

    `index` (uint32) is the global sample index of each row, that noise is keyed by.
    """
    total = len(pairs["tokens"])
    samples = range(step * count, (step + 1) * count)
    chosen = np.array([pipeline.epoch_order(total, seed, i // total)[i % total] for i in samples], np.int64)
    taken = {key: array[chosen].reshape(2 * count, *array.shape[2:]) for key, array in pairs.items()}
    return {**taken, "index": (np.arange(2 * samples.start, 2 * samples.stop, dtype=np.uint64) & 0xFFFFFFFF).astype(np.uint32)}
