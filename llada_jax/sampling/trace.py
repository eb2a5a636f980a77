"""What happened during a decode: enough to rebuild every canvas in between."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GIVEN = -1  # reveal step of slots that were never written


class Edits(NamedTuple):
    """Tokens that were written over others, the first K of each row, in order; unused entries have step -1."""

    step_BK: jax.Array  # int32, the row's forward
    slot_BK: jax.Array  # int32
    old_BK: jax.Array  # int32
    new_BK: jax.Array  # int32
    count_B: jax.Array  # int32; above K, the rest is not in the log

    def overflow(self) -> np.ndarray:
        """(B,) edits of each row that the log has no place for."""
        return np.maximum(np.asarray(self.count_B) - self.step_BK.shape[1], 0)


def logged(edits: Edits, edit_BC: jax.Array, *entries_BC: jax.Array) -> Edits:
    """The log with (step, slot, old, new) of each edit; what has no place is counted alone."""
    place_BC = jnp.where(edit_BC, edits.count_B[:, None] + jnp.cumsum(edit_BC, axis=-1) - 1, edits.step_BK.shape[1])
    put = jax.vmap(lambda old_K, place_C, new_C: old_K.at[place_C].set(new_C, mode="drop"))
    return Edits(*(put(old, place_BC, new) for old, new in zip(edits[:4], entries_BC, strict=True)), edits.count_B + edit_BC.sum(-1))


class Trace(NamedTuple):
    """One decode, its canvas's tail included. Steps count a row's own forwards that wrote, or could have, from 0: with rows that start
    at once, step s is the same forward for all."""

    initial_BT: jax.Array  # int32 tokens before the first forward
    final_BT: jax.Array  # int32 tokens after the last one
    reveal_step_BT: jax.Array  # int32, the forward that wrote the slot first; GIVEN where none did
    reveal_score_BT: jax.Array  # float32, the decoder's score of the slot then; NaN where nothing was scored (given, or filled at an EOS)
    reveal_logprob_BT: jax.Array  # float32, log probability of the token where it was drawn; NaN likewise
    edits: Edits
    forwards: dict[str, jax.Array]  # kind of forward -> (B,) forwards that the row took part in before it was done
    calls: dict[str, jax.Array]  # kind of forward -> () model calls of the whole batch
    steps_B: jax.Array  # int32, the row's steps
    wasted_B: jax.Array  # int32, steps that changed nothing
    tokens_B: jax.Array  # int32, token-forwards: slots that the row's forwards computed, without padding
    failed_B: jax.Array  # bool, rows that ended because their logits were not numbers


def canvases(trace: Trace) -> list[np.ndarray]:
    """The (B, T) canvas after each step of the rows, all starting at once. Raises ValueError where the log of edits is not whole."""
    if np.any(missing_B := trace.edits.overflow()):
        raise ValueError(f"{int(missing_B.max())} edits of a row are not in the log, which holds {trace.edits.step_BK.shape[1]} a row")
    reveal_BT, initial_BT, tokens_BT = (np.asarray(x) for x in (trace.reveal_step_BT, trace.initial_BT, trace.final_BT))
    made, tokens_BT = [], tokens_BT.copy()
    log = sorted(((int(step), b, k) for (b, k), step in np.ndenumerate(np.asarray(trace.edits.step_BK)) if step >= 0), reverse=True)
    slot_BK, old_BK = np.asarray(trace.edits.slot_BK), np.asarray(trace.edits.old_BK)
    for step in reversed(range(int(np.max(trace.steps_B, initial=0)))):
        while log and log[0][0] > step:  # walk back in time: undo what was written later
            _, b, k = log.pop(0)
            tokens_BT[b, slot_BK[b, k]] = old_BK[b, k]
        made.append(np.where((reveal_BT >= 0) & (reveal_BT <= step), tokens_BT, initial_BT))
    return made[::-1]
