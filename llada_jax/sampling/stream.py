"""Continuous batching: requests flow through the rows of one compiled loop, a bounded number of steps at a time.

A row that is done takes the next request without a new compile; the others do not notice. The loop is made of `engine.step`, so a request
gets what `engine.generate` would give it in the same shape.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.sampling import engine
from llada_jax.sampling.canvas import Canvas
from llada_jax.sampling.engine import Carry, Rules
from llada_jax.sampling.trace import Trace


class Event(NamedTuple):
    """What is seen of a request between two chunks of steps."""

    request: int
    tokens_T: np.ndarray  # its canvas now
    trace: Trace | None  # the trace of its row, (1, ...) arrays, once it is done


def serve(rules: Rules, variables: Any, canvas: Canvas, *, key: jax.Array, slots: int, chunk: int, put: Callable[[Any], Any] = lambda x: x,
          compiler_options: dict[str, str] | None = None) -> Iterator[Event]:
    """Decode the rows of `canvas` (numpy), `slots` at a time, `chunk` steps between looks; an event of every row after each.

    Rows are named for the noise by their index in `canvas`. One transfer to the host a chunk. `put` places a batch on the devices. One
    compile for a shape, whatever flows through it. `rules` are `engine.rules_of` the whole canvas.
    """
    start, refill, advance = programs(**(compiler_options or {}))
    waiting = collections.deque(range(len(canvas.tokens_BT)))
    held: list[int | None] = [waiting.popleft() for _ in range(min(slots, len(waiting)))]

    def batch():
        rows = [request or 0 for request in held]  # what stands in a slot that is held by none does not matter
        return put((Canvas(*(x[rows] for x in canvas)), np.array(rows, np.int32)))

    now, names_B = batch()
    carry = start(rules, variables, now)
    while any(request is not None for request in held):
        carry, done_B, record = advance(rules, variables, now, key, names_B, carry, jnp.int32(chunk))
        done_B, record = jax.device_get((done_B, record))
        fresh_B = np.zeros(len(held), bool)
        for b, request in enumerate(held):
            if request is None:
                continue
            row = jax.tree.map(lambda x, b=b: x[b : b + 1] if np.ndim(x) else x, record)
            yield Event(request, row.final_BT[0], row if done_B[b] else None)
            if done_B[b]:
                held[b] = waiting.popleft() if waiting else None
                fresh_B[b] = held[b] is not None
        if fresh_B.any():
            now, names_B = batch()
            carry = refill(rules, variables, now, carry, put(fresh_B))


@functools.cache
def programs(**options: str) -> tuple[Callable[..., Any], ...]:
    """(start, refill, advance) jitted with these compiler options of XLA."""
    jit = lambda function, *donated: jax.jit(function, static_argnums=0, donate_argnums=donated, compiler_options=options or None)
    return jit(engine.start), jit(_refill, 3), jit(_advance, 5)


def _refill(rules: Rules, variables: Any, canvas: Canvas, carry: Carry, fresh_B: jax.Array) -> Carry:
    """Fresh rows begin anew. What the model's cache holds of the request before is never read: a row's first forward fills it."""
    new = engine.start(rules, variables, canvas)
    mine = lambda new, old: engine.of(fresh_B, new, old)
    return carry._replace(**{name: jax.tree.map(mine, getattr(new, name), getattr(carry, name))
                             for name in Carry._fields if name not in ("kv", "calls")})


def _advance(rules: Rules, variables: Any, canvas: Canvas, key: jax.Array, row_B: jax.Array, carry: Carry,
             chunk: jax.Array) -> tuple[Carry, jax.Array, Trace]:
    """At most `chunk` steps; the state, which rows are done, and the trace so far."""
    def more(state):
        return engine.running(state[0]) & (state[1] < chunk)

    def step(state):
        return engine.step(rules, variables, canvas, key, row_B, jnp.zeros_like(row_B), state[0]), state[1] + 1
    carry, _ = jax.lax.while_loop(more, step, (carry, jnp.int32(0)))
    return carry, carry.done_B, engine.trace_of(canvas, carry)
