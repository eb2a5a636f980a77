"""Tasks that are scored exactly: what is given and how long the gaps are, and whether what was written is right.

Every task draws from the held-out side of a generated source (data/puzzles.py), so nothing of it stood in that source's training rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llada_jax.data import puzzles
from llada_jax.data import sudoku as sudoku_lib
from llada_jax.evaluation import decode
from llada_jax.model.transformer import LanguageModel
from llada_jax.sampling.canvas import Piece
from llada_jax.sampling.decoders import LowConfidence
from llada_jax.tokenizer import Tokenizer

SEED = 7  # of the instances that are drawn
FORWARDS = (10, 5, 4, 2, 1)
GIVENS = 6  # of a sudoku


class Item(NamedTuple):
    """One instance."""

    pieces: list[str | int]  # given text, and gaps of so many letters
    answer: str  # what is right in the gaps, one after the other; of several right answers, one

    @property
    def length(self) -> int:
        """Tokens of all gaps."""
        return sum(piece for piece in self.pieces if isinstance(piece, int))


@dataclasses.dataclass(frozen=True)
class Task:
    """`instances(count, seed)` draws held-out items, the first of which do not depend on `count`; `exact(item, text)` judges the text of
    all gaps, one after the other."""

    instances: Callable[[int, int], list[Item]]
    exact: Callable[[Item, str], bool] = lambda item, text: text == item.answer

    def requests(self, items: Sequence[Item], tokenizer: Tokenizer) -> list[list[Piece]]:
        """The items as pieces of a canvas. Raises ConfigError for a tokenizer without the letters; a gap has a token for each letter."""
        return [[piece if isinstance(piece, int) else tokenizer.encode(piece) for piece in item.pieces] for item in items]


def _drawn(draw: puzzles.Draw) -> Callable[[int, int], list[Item]]:
    def instances(count: int, seed: int) -> list[Item]:
        random = np.random.RandomState(seed)
        pairs = [draw(random, "heldout") for _ in range(count)]
        return [Item([prompt, len(answer)], answer) for prompt, answer in pairs]
    return instances


def _lookups(count: int, seed: int) -> list[Item]:
    """Gaps of one length, in which the model has to end its answer."""
    room = 2 * puzzles.LOOKUPS + 1
    return [Item([item.pieces[0], room], item.answer) for item in _drawn(puzzles.lookup)(count, seed)]


def _sudokus(count: int, seed: int, givens: int = GIVENS) -> list[Item]:
    """Every blank is a gap."""
    pairs = zip(*(x.tolist() for x in sudoku_lib.puzzles(count, givens, seed)), strict=True)
    return [Item([str(digit) if digit else 1 for digit in puzzle], "".join(str(s) for s, digit in zip(solution, puzzle, strict=True) if not digit))
            for puzzle, solution in pairs]


TASKS = {
    "sudoku": Task(_sudokus),
    "recall": Task(_drawn(puzzles.recall)),
    "lookup": Task(_lookups),
    "addition": Task(_drawn(puzzles.addition)),
    "countdown": Task(_drawn(puzzles.countdown), lambda item, text: puzzles.solves(str(item.pieces[0]), text)),
}


def text_of(batch: decode.Batch, b: int, tokenizer: Tokenizer) -> str:
    """What stands in the gaps of row b, up to an end of text in the last one."""
    return "".join(tokenizer.decode(tokens) for gap, tokens in batch.spans(b, {tokenizer.eos_id}) if gap)


def sudoku(model: LanguageModel, variables: Any, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, count: int = 2000, givens: int = GIVENS,
           forwards: tuple[int, ...] = FORWARDS) -> list[dict[str, Any]]:
    """Share of held-out 4×4 puzzles with one solution that are solved exactly, by the number of forwards.

    The blanks are the gaps of one canvas and form one block, written by low-confidence remasking: forward i of S writes
    m // S + (i < m % S) of m blanks. One line a number of forwards: `exact` (share), `solved`, `puzzles`, `forwards`,
    `tokens_per_forward`, and `seconds` without compilation.
    """
    task, items = TASKS["sudoku"], _sudokus(count, SEED, givens)
    requests = task.requests(items, tokenizer)
    blanks, results = len(items[0].answer), []
    for number in forwards:
        decoder = LowConfidence(blanks, blanks, steps=number)
        [batch] = decode.batches(model, variables, mesh, tokenizer, decoder, requests, max_length=len(requests[0]), batch_size=count,
                                 stop_at_eos=False, warm_up=True)
        solved = sum(task.exact(item, text_of(batch, b, tokenizer)) for b, item in enumerate(items))
        spent = sum(sum(batch.forwards(b).values()) for b in range(count))
        results.append({"forwards": spent / count, "exact": solved / count, "solved": solved, "puzzles": count, "givens": givens,
                        "tokens_per_forward": count * blanks / spent, "seconds": round(batch.seconds, 3)})
    return results


def describe_sudoku(results: list[dict[str, Any]]) -> str:
    """A table for people."""
    first = results[0]
    lines = [f"{first['puzzles']:,} held-out 4×4 sudokus with {first['givens']} givens and one solution",
             f"{'forwards':>10}{'tokens/forward':>16}{'exact':>10}{'seconds':>10}"]
    lines += [f"{r['forwards']:>10g}{r['tokens_per_forward']:>16.2f}{r['exact']:>10.2%}{r['seconds']:>10.2f}" for r in results]
    return "\n".join(lines)
