"""Generated sources with exact answers: `sudoku`, `recall`, `lookup`, `addition`, `countdown`. Except in `lookup`, prompt and answer of a
source have one length each.

  recall     `GgBn…?B.G.B.…=BnGgBn…`: pairs of a key and its value, then keys, any of them many times; the answer lists them with their values.
             Held out by a hash of the pairs: no table of a held-out row stands in training.
  lookup     the same with 4 to 8 pairs and 1 to 8 keys asked, so that answers have many lengths: what fine-tuning teaches to end. Each has
             a wrong answer too, which preference optimisation takes as the rejected one
  addition   `0412,…+0977,…=1389,…`: the problems of a row, in columns. Held out by a hash of a problem's two numbers: no
             problem of a held-out row stands in training.
  countdown  `03,07,12=024:(12-07)…`: reach the target with each number once. Held out by a hash of the numbers: no three
             of a held-out row stand together in training, whatever the target.
  sudoku     4×4 grids without a prompt, held out by grid (sudoku.py)

An eighth of what is hashed is held out. Draws come from numpy's RandomState, whose streams are frozen for ever.
"""

import functools
import hashlib
import itertools
import re
import string
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from llada_jax.data import sudoku

ROWS = 32_768  # training rows of a source that is drawn
EVERY = 64  # a held-out row follows so many of them
PAIRS, QUESTIONS = 8, 64  # of a recall row
FEWEST_PAIRS, LOOKUPS = 4, 8  # of a lookup; at most so many questions
KEYS, VALUES = string.ascii_uppercase[:12], string.ascii_lowercase + string.digits  # the values of key i: letters i, i + 12 and i + 24
DIGITS, PROBLEMS = 4, 16  # of an addition row
NUMBERS, LARGEST, TARGETS = 3, 30, 999  # of a countdown row: how many, the largest of them, and the largest target

STEPS: dict[str, Callable[[int, int], int | None]] = {  # whole numbers only
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a // b if b and a % b == 0 else None}

Draw = Callable[[np.random.RandomState, str], tuple[str, str]]  # (random, split) -> (prompt, answer)


class Puzzle(NamedTuple):
    """A generated source: its letters, tokens a row (0: of many lengths), and its rows in a fixed order."""

    alphabet: str
    length: int
    rows: Callable[[], Iterator[tuple[str, str | None, str, str | None]]]  # (split, prompt or None, answer, a wrong answer or None)


def split_of(text: str) -> str:
    """`train` or `heldout`, by a hash."""
    return "heldout" if hashlib.sha256(text.encode()).digest()[0] < 32 else "train"


def recall(random: np.random.RandomState, split: str, pairs: int = PAIRS, questions: int = QUESTIONS) -> tuple[str, str]:
    """Distinct keys, one of three letters of its own as the value of each, any of the keys as questions.

    A key whose values are its own is found by one look at the prompt. Where any letter may be a value of any key, models of this size
    did not get beyond guessing among the prompt's values in six runs of up to 1500 steps.
    """
    while True:
        chosen, options = random.permutation(len(KEYS))[:pairs], random.randint(len(VALUES) // len(KEYS), size=pairs)
        keys = [KEYS[i] for i in chosen]
        table = {KEYS[i]: VALUES[i + len(KEYS) * option] for i, option in zip(chosen, options, strict=True)}
        if split_of("".join(key + table[key] for key in sorted(table))) == split:
            break
    asked = [keys[i] for i in random.randint(pairs, size=questions)]
    pairs_of = lambda some: "".join(key + table[key] for key in some)
    return f"{pairs_of(keys)}?{''.join(f'{key}.' for key in asked)}=", pairs_of(asked)


def lookup(random: np.random.RandomState, split: str) -> tuple[str, str]:
    """A recall of fewer pairs and far fewer questions, each number drawn."""
    return recall(random, split, int(random.randint(FEWEST_PAIRS, PAIRS + 1)), int(random.randint(LOOKUPS)) + 1)


def wrong_lookup(random: np.random.RandomState, prompt: str, answer: str) -> str:
    """A plausible wrong answer to a lookup: another pair of the prompt in place of one that was asked for, as in most of a model's own mistakes.

    Where two thirds of them ended early or went on, which tuned models seldom do, optimisation brought no right answers at any of four settings.
    """
    pairs, known = ([text[i:i + 2] for i in range(0, len(text), 2)] for text in (answer, prompt.split("?")[0]))
    at = random.randint(len(pairs))
    others = [pair for pair in known if pair != pairs[at]]
    return "".join([*pairs[:at], others[random.randint(len(others))], *pairs[at + 1:]])


def addition(random: np.random.RandomState, split: str, digits: int = DIGITS, problems: int = PROBLEMS) -> tuple[str, str]:
    """Sums of two numbers of up to `digits` digits, all written with one more; the sums stand in the order of the problems."""
    rows: list[tuple[int, int]] = []
    while len(rows) < problems:
        a, b = (int(x) for x in random.randint(10**digits, size=2))
        if split_of(f"{min(a, b)}+{max(a, b)}") == split:
            rows.append((a, b))
    column = lambda numbers: ",".join(f"{number:0{digits + 1}}" for number in numbers)
    return f"{column(a for a, _ in rows)}+{column(b for _, b in rows)}=", column(a + b for a, b in rows)


def countdown(random: np.random.RandomState, split: str) -> tuple[str, str]:
    """Numbers in ascending order, a target that whole steps reach, and the first expression that does in the order of `reached`."""
    while True:
        numbers = tuple(sorted(int(x) + 1 for x in random.randint(LARGEST, size=NUMBERS)))
        found = reached(numbers) if split_of(repr(numbers)) == split else {}
        if found:
            target = sorted(found)[random.randint(len(found))]
            return f"{','.join(f'{n:02}' for n in numbers)}={target:03}:", found[target]


@functools.cache
def reached(numbers: tuple[int, ...]) -> dict[int, str]:
    """{target: expression} of three numbers: `(a∘b)∘c` or `a∘(b∘c)`, every step a whole number, targets from 1 to 999."""
    found: dict[int, str] = {}
    for a, b, c in itertools.permutations(numbers):
        for first, second in itertools.product(STEPS, repeat=2):
            left, right = STEPS[first](a, b), STEPS[first](b, c)
            for total, text in ((None if left is None else STEPS[second](left, c), f"({a:02}{first}{b:02}){second}{c:02}"),
                                (None if right is None else STEPS[second](a, right), f"{a:02}{second}({b:02}{first}{c:02})")):
                if total is not None and 1 <= total <= TARGETS:
                    found.setdefault(total, text)
    return found


def solves(prompt: str, text: str) -> bool:
    """Whether an expression has the target of a countdown prompt as its exact value and holds each of its numbers once."""
    numbers, target = prompt.rstrip(":").split("=")
    used = sorted(int(n) for n in re.findall(r"\d+", text))
    return used == sorted(int(n) for n in numbers.split(",")) and value(text) == int(target)


def value(text: str) -> Fraction | None:
    """The exact value of an expression of whole numbers, + - * / and parentheses; None for what is none, or divides by 0."""
    tokens = re.findall(r"[0-9]+|.", text, re.S)[::-1]
    try:
        total = _sum(tokens) if len(tokens) <= 100 else None  # so that nesting stays shallow
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return None if tokens else total


def _sum(tokens: list[str]) -> Fraction:
    """Take a sum off the end of the reversed tokens."""
    total = _product(tokens)
    while tokens and tokens[-1] in ("+", "-"):
        total = total + _product(tokens) if tokens.pop() == "+" else total - _product(tokens)
    return total


def _product(tokens: list[str]) -> Fraction:
    total = _number(tokens)
    while tokens and tokens[-1] in ("*", "/"):
        total = total * _number(tokens) if tokens.pop() == "*" else total / _number(tokens)
    return total


def _number(tokens: list[str]) -> Fraction:
    token = tokens.pop()
    if token.isdecimal() and token.isascii():
        return Fraction(int(token))
    total = _sum(tokens) if token == "(" else Fraction(0)
    if token != "(" or tokens.pop() != ")":
        raise ValueError(token)
    return total


def _drawn(draw: Draw, wrong: Callable[[np.random.RandomState, str, str], str] | None = None) -> Callable[[], Iterator[Any]]:
    """Rows of a source that is drawn, of each split from a seed of its own; the wrong answers have a third, so that they change no draw."""
    def rows():
        streams = {split: np.random.RandomState(seed) for seed, split in enumerate(("train", "heldout"))}
        mistakes = np.random.RandomState(2)
        for i in range(ROWS):
            for split in ("train", "heldout") if i % EVERY == 0 else ("train",):
                prompt, answer = draw(streams[split], split)
                yield split, prompt, answer, wrong(mistakes, prompt, answer) if wrong else None
    return rows


def _grids() -> Iterator[tuple[str, str | None, str, str | None]]:
    heldout = {tuple(grid) for grid in sudoku.split_grids("heldout").tolist()}
    for grid in sudoku.grids().tolist():
        yield "heldout" if tuple(grid) in heldout else "train", None, "".join(map(str, grid)), None


PUZZLES = {
    "sudoku": Puzzle(sudoku.ALPHABET, 16, _grids),
    "recall": Puzzle(f".?={KEYS}{VALUES}", 2 * PAIRS + 4 * QUESTIONS + 2, _drawn(recall)),
    "lookup": Puzzle(f".?={KEYS}{VALUES}", 0, _drawn(lookup, wrong_lookup)),
    "addition": Puzzle(f"+=,{string.digits}", 3 * PROBLEMS * (DIGITS + 2) - 1, _drawn(addition)),
    "countdown": Puzzle(f"+-*/()=:,{string.digits}", 4 + 2 * NUMBERS + NUMBERS + 10, _drawn(countdown)),
}
