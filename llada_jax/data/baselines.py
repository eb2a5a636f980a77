"""What simple methods need on the same held-out files, in bits per byte of original text.

All three see exactly the documents that the model is scored on. The n-grams are counted on the training documents over the
model's own tokens, and pay for the end-of-text token of each document, as the model does.
"""

import gzip

import numpy as np

from llada_jax.tokenizer import Tokenizer

_BACKOFF = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def measure(train_M: np.ndarray, heldout_M: np.ndarray, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per held-out byte of `unigram`, `bigram` and `gzip`.

    `train_M`, `heldout_M`: ids of documents one after the other, end-of-text after each (`Dataset.stream()`).
      unigram  p(b) = (count(b) + 1) / (all + V)
      bigram   p(b|a) = (count(ab) + k p(b)) / (count(a) + k): the unigram is its prior, k is the best of seven for the last
               tenth of the training tokens, counted on the rest; a document begins after end-of-text
      gzip     all held-out files in one stream at level 9: kinder to gzip than file by file, where it starts from nothing
    """
    num_bytes = int(tokenizer.piece_bytes(heldout_M).sum())
    cut = max(1, len(train_M) * 9 // 10)
    prior_V = _unigram(train_M[:cut], tokenizer.vocab_size)
    best = min(_BACKOFF, key=lambda k: _bigram_bits(train_M[:cut], train_M[cut:], prior_V, k, tokenizer.eos_id))
    prior_V = _unigram(train_M, tokenizer.vocab_size)
    return {
        "unigram": float(-np.log2(prior_V[heldout_M]).sum() / num_bytes),
        "bigram": _bigram_bits(train_M, heldout_M, prior_V, best, tokenizer.eos_id) / num_bytes,
        "gzip": 8 * len(gzip.compress(tokenizer.decode(heldout_M).encode(), 9)) / num_bytes,
    }


def comparable(rows: dict[str, np.ndarray]) -> bool:
    """Whether a model is scored on every token of these held-out rows, as the methods here are; not so where prompts are given."""
    return bool((rows["maskable"] == (rows["segment"] > 0)).all())


def _unigram(ids_M: np.ndarray, vocab_size: int) -> np.ndarray:
    counts_V = np.bincount(ids_M, minlength=vocab_size) + 1.0
    return counts_V / counts_V.sum()


def _bigram_bits(train_M: np.ndarray, test_M: np.ndarray, prior_V: np.ndarray, k: float, eos_id: int) -> float:
    size = len(prior_V)
    pairs, counts = np.unique(_before(train_M, eos_id) * size + train_M, return_counts=True)
    before_M = _before(test_M, eos_id)
    codes = before_M * size + test_M
    places = np.minimum(np.searchsorted(pairs, codes), len(pairs) - 1)
    both_M = np.where(pairs[places] == codes, counts[places], 0)
    context_V = np.bincount(_before(train_M, eos_id), minlength=size)
    return float(-np.log2((both_M + k * prior_V[test_M]) / (context_V[before_M] + k)).sum())


def _before(ids_M: np.ndarray, eos_id: int) -> np.ndarray:
    return np.concatenate([[eos_id], ids_M[:-1]]).astype(np.int64)
