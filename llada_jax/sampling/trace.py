"""What happened during a decode: enough to rebuild every canvas in between."""

from typing import NamedTuple

import jax
import numpy as np

GIVEN = -1  # reveal step of slots that were never written


class Trace(NamedTuple):
    """One decode, its canvas's tail included. Steps count a row's own forwards from 0; every row starts at once, so step s is the same
    forward for all rows. A step under guidance costs a row two forwards, one `full` and one `guidance`, in one call of the model."""

    initial_BT: jax.Array  # int32 tokens before the first forward
    final_BT: jax.Array  # int32 tokens after the last one
    reveal_step_BT: jax.Array  # int32, the forward that wrote the slot; GIVEN where none did
    reveal_score_BT: jax.Array  # float32, the decoder's score of the slot then; NaN where nothing was scored (given, or filled at an EOS)
    reveal_logprob_BT: jax.Array  # float32, log probability of the token then; NaN likewise
    forwards: dict[str, jax.Array]  # kind of forward -> (B,) forwards that the row took part in before it was done
    calls: dict[str, jax.Array]  # kind of forward -> () model calls of the whole batch


def canvases(trace: Trace) -> list[np.ndarray]:
    """The (B, T) canvas after each model call. A token once written stays, so the step of its reveal says all."""
    step_BT, initial_BT, final_BT = (np.asarray(x) for x in (trace.reveal_step_BT, trace.initial_BT, trace.final_BT))
    calls = sum(int(n) for n in trace.calls.values())
    return [np.where((step_BT >= 0) & (step_BT <= step), final_BT, initial_BT) for step in range(calls)]
