"""Requests decoded batch by batch: the one place where sample.py and the tasks call the engine."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llada_jax import partitioning
from llada_jax.config import ConfigError
from llada_jax.interop import chat
from llada_jax.model.transformer import LanguageModel
from llada_jax.sampling import cache as cache_lib
from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling import engine
from llada_jax.sampling import stream as stream_lib
from llada_jax.sampling.canvas import Canvas, Piece
from llada_jax.sampling.trace import Trace
from llada_jax.tokenizer import HuggingFace, Tokenizer

NOT_FINITE = "the model's output is not finite; try an earlier --step or compute in float32"


class Batch(NamedTuple):
    """Some of the requests, decoded; rows behind them only fill up the batch."""

    rows: list[int]  # indices of the requests
    canvas: Canvas
    trace: Trace  # on the host
    seconds: float  # from the call to the trace on the host

    def spans(self, b: int, ends: set[int]) -> list[tuple[bool, list[int]]]:
        """Row b as runs of (written here, tokens), without what follows one of `ends` in the last one."""
        tokens, gap = (x[b][self.canvas.valid_BT[b]] for x in (self.trace.final_BT, self.canvas.writable_BT))
        edges = [0, *(np.flatnonzero(gap[1:] != gap[:-1]) + 1).tolist(), len(gap)]
        spans = [(bool(gap[start]), tokens[start:end].tolist()) for start, end in itertools.pairwise(edges)]
        if spans[-1][0]:
            spans[-1] = True, list(itertools.takewhile(lambda token: token not in ends, spans[-1][1]))
        return spans

    def forwards(self, b: int) -> dict[str, int]:
        """Forwards of row b by kind."""
        return {kind: int(count_B[b]) for kind, count_B in self.trace.forwards.items()}

    def written(self, b: int) -> int:
        """Tokens that forwards wrote in row b; what an early end of text fills in is none."""
        return int((~np.isnan(self.trace.reveal_score_BT[b]) & self.canvas.writable_BT[b]).sum())


def suppressed_ids(named: str, tokenizer: Tokenizer, family: str | None, vocab_size: int) -> tuple[int, ...]:
    """Ids of the tokens that `named` holds, apart by commas: `eos`, `eot` (the end of a turn in the family's chat template), ids of the model's
    vocabulary, or a token's own spelling, blanks included, which stands for every token that is spelled so.

    Raises ConfigError for any other, and where no token is left to write.
    """
    found, turns = set(), family in chat.TEMPLATES
    for part in named.split(",") if named else ():
        text = part.encode(errors="surrogateescape")  # a token may be one byte of a letter
        if part == "eos" or (part == "eot" and turns):
            ids = [tokenizer.eos_id if part == "eos" else chat.end_ids(family, tokenizer)[0]]
        elif part.isdecimal():
            ids = [int(part)] * (int(part) < vocab_size)
        else:
            special = tokenizer.special_id(part) if isinstance(tokenizer, HuggingFace) else None
            ids = [i for i, piece in enumerate(tokenizer.pieces) if (text and piece == text) or i == special]
        if not ids:
            raise ConfigError(f"--suppress={named}: {part!r} is no token; known are eos,{' eot,' * turns} ids from 0 to {vocab_size - 1} (lines of "
                              "sample --out hold some), and the spelling of a single token")
        found.update(ids)
    if found and not {*range(tokenizer.vocab_size)} - found - {tokenizer.mask_id}:
        raise ConfigError(f"--suppress names all {tokenizer.vocab_size - 1} tokens beside the mask: nothing is left to write")
    return tuple(sorted(found - {tokenizer.mask_id}))


def describe_suppressed(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The end of a line for people; empty without ids."""
    shown = [f"{i} {tokenizer.decode([i])!r}" if i != tokenizer.eos_id else f"{i} (eos)" for i in ids[:8]]
    return " · never written: " + ", ".join(shown + [f"and {len(ids) - 8} more"] * (len(ids) > 8)) if ids else ""


def batches(model: LanguageModel, variables: Any, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, decoder: Any,
            requests: Sequence[Sequence[Piece]], *, max_length: int, batch_size: int, cache: cache_lib.Cache = cache_lib.NoCache(),
            rows: Sequence[int] | None = None, seed: int = 0, suppressed: tuple[int, ...] = (),
            stop_at_eos: bool = True, warm_up: bool = False) -> Iterator[Batch]:
    """Decode the requests, or those with the indices `rows`, `batch_size` at a time.

    All batches have one shape: as long as the longest of all requests, padded to the devices. A request's noise goes by its index, so
    that its result does not depend on which others are decoded. `suppressed` ids are never written. `warm_up` compiles before the first call
    is timed. A row for which the model's output is not finite ends there (`trace.failed_B`). Raises ConfigError for a request that does not
    fit (canvas.build), and where no output of a batch is finite.
    """
    whole = canvas_lib.build(requests, block_length=decoder.block_lengths, mask_id=tokenizer.mask_id, pad_id=tokenizer.pad_id, max_length=max_length,
                             aligned=decoder.aligned)
    rows = range(len(requests)) if rows is None else rows
    size = min(batch_size, len(requests))
    size += -size % partitioning.batch_shards(mesh)
    generate = _engine(model, variables, mesh, tokenizer, decoder, cache, seed, suppressed, stop_at_eos, engine.suffix_of(whole, cache))

    for start in range(0, len(rows), size):
        part = list(rows[start : start + size])
        canvas = canvas_lib.pad_rows(Canvas(*(x[part] for x in whole)), size)
        if warm_up and start == 0:  # nothing to write: compiles, and costs no forward
            generate(canvas._replace(writable_BT=canvas.writable_BT & False, block_BT=np.full_like(canvas.block_BT, -1)), part)
        started = time.perf_counter()
        trace = generate(canvas, part)
        seconds = time.perf_counter() - started
        if trace.failed_B[: len(part)].all():
            raise ConfigError(NOT_FINITE)
        yield Batch(part, canvas, trace, seconds)


def stream(model: LanguageModel, variables: Any, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, decoder: Any, requests: Sequence[Sequence[Piece]], *,
           max_length: int, slots: int, chunk: int, cache: cache_lib.Cache = cache_lib.NoCache(), seed: int = 0,
           suppressed: tuple[int, ...] = (), stop_at_eos: bool = True,
           look: Callable[[int, list[int]], None] = lambda request, tokens: None) -> Iterator[Batch]:
    """The same one by one as they are done, `slots` at a time; a request that is done leaves its place to the next.

    `look(request, tokens)` sees each request's row every `chunk` steps.
    """
    canvas = canvas_lib.build(requests, block_length=decoder.block_lengths, mask_id=tokenizer.mask_id, pad_id=tokenizer.pad_id, max_length=max_length,
                              aligned=decoder.aligned)
    slots = min(slots, len(requests))
    slots += -slots % partitioning.batch_shards(mesh)
    canvas = canvas_lib.pad_rows(canvas, slots) if len(requests) < slots else canvas
    rules = engine.rules_of(engine.Denoiser.of(model), canvas, decoder, mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id, cache=cache,
                            stop_at_eos=stop_at_eos, suppressed=suppressed)
    started = time.perf_counter()
    for event in stream_lib.serve(rules, variables, canvas, key=jax.random.key(seed), slots=slots, chunk=chunk,
                                  put=lambda x: partitioning.put_batch(mesh, x), compiler_options=partitioning.compiler_options(variables)):
        if event.request >= len(requests):
            continue
        row = Canvas(*(x[event.request : event.request + 1] for x in canvas))
        look(event.request, event.tokens_T[row.valid_BT[0]].tolist())
        if event.trace is not None:
            yield Batch([event.request], row, event.trace, time.perf_counter() - started)


def writer(model: LanguageModel, variables: Any, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, decoder: Any, *, max_length: int, batch_size: int,
           cache: cache_lib.Cache = cache_lib.NoCache(), seed: int = 0,
           suppressed: tuple[int, ...] = ()) -> Callable[[list[tuple[list[int], int]], list[int], int], list[list[int]]]:
    """write([(prompt ids, tokens to write)], names, length) -> the ids written after each of at most `batch_size` prompts.

    The int32 `names` stand for the rows in the noise. Calls of one `length` that write equally many tokens share a compiled shape, which
    has at least `length` slots. Raises ConfigError for a request that does not fit (canvas.build), and where a row's output is not finite.
    """
    size = batch_size + -batch_size % partitioning.batch_shards(mesh)
    generate = _engine(model, variables, mesh, tokenizer, decoder, cache, seed, suppressed, stop_at_eos=True)

    def write(prompts, names, length):
        canvas = canvas_lib.build([[prompt, new] for prompt, new in prompts], block_length=decoder.block_lengths, mask_id=tokenizer.mask_id,
                                  pad_id=tokenizer.pad_id, max_length=max_length, length=length, aligned=decoder.aligned)
        trace = generate(canvas := canvas_lib.pad_rows(canvas, size), names)
        if trace.failed_B.any():
            raise ConfigError(NOT_FINITE)
        return [trace.final_BT[b][canvas.writable_BT[b]].tolist() for b in range(len(prompts))]

    return write


def _engine(model: LanguageModel, variables: Any, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, decoder: Any, cache: cache_lib.Cache, seed: int,
            suppressed: tuple[int, ...], stop_at_eos: bool, suffix: int = 0) -> Callable[[Canvas, Sequence[int]], Trace]:
    """generate(canvas, names) -> its trace, on the host. `names` stand for the rows in the noise, the last one also for those that fill up."""
    denoiser, options = engine.Denoiser.of(model), partitioning.compiler_options(variables)

    def generate(canvas, names):
        names_B = np.array([*names, *[names[-1]] * (len(canvas.tokens_BT) - len(names))], np.int32)
        on_device = Canvas(*partitioning.put_batch(mesh, tuple(canvas)))
        _, trace = engine.generate(denoiser, variables, on_device, decoder, cache=cache, key=jax.random.key(seed),
                                   row_B=partitioning.put_batch(mesh, names_B), mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id,
                                   stop_at_eos=stop_at_eos, suppressed=suppressed, suffix=suffix, compiler_options=options)
        return jax.device_get(trace)

    return generate
