"""Tasks that are scored exactly: a canvas with gaps is decoded and compared with the one right answer."""

import time
from typing import Any

import jax
import numpy as np

from llada_jax import partitioning
from llada_jax.data import sudoku as sudoku_lib
from llada_jax.model.transformer import LanguageModel
from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling import engine, select
from llada_jax.tokenizer import Tokenizer

SEED = 7  # of the puzzles that are drawn
FORWARDS = (10, 5, 4, 2, 1)


def sudoku(model: LanguageModel, variables: Any, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, count: int = 2000, givens: int = 6,
           forwards: tuple[int, ...] = FORWARDS) -> list[dict[str, Any]]:
    """Share of held-out 4×4 puzzles with one solution that are solved exactly, by the number of forwards.

    The blanks are the gaps of one canvas and form one block, written by low-confidence remasking: forward i of S writes
    m // S + (i < m % S) of m blanks. One line a number of forwards: `exact` (share), `solved`, `puzzles`, `forwards`,
    `tokens_per_forward`, and `seconds` without compilation.
    """
    puzzles, solutions = sudoku_lib.puzzles(count, givens, SEED)
    answers = np.array([tokenizer.encode("".join(map(str, grid))) for grid in solutions.tolist()], np.int32)
    blank = puzzles == 0
    requests = [[1 if gap else [token] for gap, token in zip(*row, strict=True)] for row in zip(blank.tolist(), answers.tolist(), strict=True)]
    blanks = puzzles.shape[1] - givens
    canvas = canvas_lib.build(requests, block_length=blanks, mask_id=tokenizer.mask_id, pad_id=tokenizer.pad_id, max_length=puzzles.shape[1])
    canvas = canvas_lib.pad_rows(canvas, partitioning.batch_shards(mesh))
    names = np.arange(len(canvas.tokens_BT), dtype=np.int32)
    full = canvas_lib.Canvas(*partitioning.put_batch(mesh, tuple(canvas)))
    written = full._replace(writable_BT=full.writable_BT & False)  # nothing to write: compiles, and costs no forward
    results = []
    for number in forwards:
        decoder = select.LowConfidence(blanks, blanks, number)

        def decode(canvas, decoder=decoder):
            return jax.block_until_ready(engine.generate(
                model.apply, model.head, variables, canvas, decoder, key=jax.random.key(0), row_B=partitioning.put_batch(mesh, names),
                mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id))
        decode(written)
        started = time.perf_counter()
        tokens_BT, trace = decode(full)
        seconds = time.perf_counter() - started
        solved = int((np.asarray(tokens_BT)[:count] == answers).all(axis=1).sum())
        spent = int(np.asarray(trace.forwards["full"])[:count].sum())
        results.append({"forwards": spent / count, "exact": solved / count, "solved": solved, "puzzles": count, "givens": givens,
                        "tokens_per_forward": int(blank.sum()) / spent, "seconds": round(seconds, 3)})
    return results


def describe_sudoku(results: list[dict[str, Any]]) -> str:
    """A table for people."""
    first = results[0]
    lines = [f"{first['puzzles']:,} held-out 4×4 sudokus with {first['givens']} givens and one solution",
             f"{'forwards':>10}{'tokens/forward':>16}{'exact':>10}{'seconds':>10}"]
    lines += [f"{r['forwards']:>10g}{r['tokens_per_forward']:>16.2f}{r['exact']:>10.2%}{r['seconds']:>10.2f}" for r in results]
    return "\n".join(lines)
