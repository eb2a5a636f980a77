"""4×4 sudoku: every solution grid, a split that shares none of them, and puzzles with one solution.

A grid is 16 digits in reading order; each row, column and 2×2 box holds 1, 2, 3, 4. There are 288 of them.
"""

import functools
import hashlib
import itertools

import numpy as np

from llada_jax.config import ConfigError

ALPHABET = "1234"
HELDOUT = 64  # solution grids kept for evaluation; the other 224 are for training


@functools.cache
def grids() -> np.ndarray:
    """int32 (288, 16): all solution grids in lexicographic order."""
    lines = itertools.permutations((1, 2, 3, 4))
    halves = [a + b for a, b in itertools.product(lines, repeat=2) if len({*a[:2], *b[:2]}) == 4 == len({*a[2:], *b[2:]})]
    found = [top + low for top, low in itertools.product(halves, repeat=2) if all(len({*top[i::4], *low[i::4]}) == 4 for i in range(4))]
    return np.array(found, np.int32)


@functools.cache
def split_grids(split: str) -> np.ndarray:
    """int32 (224 or 64, 16): the grids of `train` or `heldout`, chosen by a hash of their digits."""
    ordered = np.array(sorted(grids().tolist(), key=lambda grid: hashlib.sha256(bytes(grid)).digest()), np.int32)
    return {"heldout": ordered[:HELDOUT], "train": ordered[HELDOUT:]}[split]


def puzzles(count: int, givens: int, seed: int, split: str = "heldout") -> tuple[np.ndarray, np.ndarray]:
    """Draw puzzles whose only solution is a grid of the split.

    Returns (puzzles, solutions), int32 (count, 16) each, 0 for a blank; independent draws, a function of the arguments alone.
    Raises ConfigError for a number of givens that cannot have a unique solution.
    """
    if not 4 <= givens <= 16:
        raise ConfigError(f"a 4×4 sudoku with {givens} givens has no unique solution; use 4 to 16")
    pool, everything = split_grids(split), grids()
    random = np.random.RandomState(seed)  # its streams are frozen for ever, unlike those of Generator
    drawn, have = [], 0
    while have < count:
        solutions = pool[random.randint(len(pool), size=1024)]
        shown = random.random_sample(solutions.shape).argsort(axis=1) < givens
        candidates = np.where(shown, solutions, 0)
        agree = ((candidates[:, None] == everything) | (candidates[:, None] == 0)).all(axis=2)
        unique = agree.sum(axis=1) == 1
        drawn.append((candidates[unique], solutions[unique]))
        have += int(unique.sum())
    puzzle, solution = (np.concatenate(parts)[:count].astype(np.int32) for parts in zip(*drawn, strict=True))
    return puzzle, solution
