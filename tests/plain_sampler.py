"""LLaDA's sampler in plain Python and numpy, one row and one token at a time: the specification of the jitted loop."""

import jax
import numpy as np

from llada_jax.sampling import score, select


def decode(logits_of, canvas, decoder, key, row_B, *, mask_id, eos_id, stop_at_eos=False):
    """(tokens_BT, reveal_step_BT, forwards_B, margin_B): `margin` is the smallest lead by which a token or a slot was ever chosen.

    `logits_of(tokens_BT)` gives float32 (B, T, V) of one forward; finished rows idle.
    """
    noise = jax.jit(score.counter_noise(key), static_argnums=(0, 4))
    rows = [_row(b, canvas, decoder, noise, int(row), mask_id, eos_id, stop_at_eos) for b, row in enumerate(row_B)]
    tokens_BT = np.stack([next(row) for row in rows])
    results = {}
    while len(results) < len(rows):
        logits_BTV = np.array(logits_of(tokens_BT))
        for b, row in enumerate(rows):
            if b not in results:
                try:
                    tokens_BT[b] = row.send(logits_BTV[b])
                except StopIteration as end:
                    results[b] = end.value
                    tokens_BT[b] = end.value[0]
    return tuple(np.array([results[b][i] for b in range(len(rows))]) for i in range(4))


def _row(b, canvas, decoder, noise, row, mask_id, eos_id, stop_at_eos):
    """A coroutine: yields the row's tokens, is sent their logits, returns (tokens, reveal steps, forwards, margin)."""
    tokens, writable = canvas.tokens_BT[b].copy(), canvas.writable_BT[b]
    slots = np.flatnonzero(writable).tolist()
    steps = (decoder.steps or decoder.gen_length) // (decoder.gen_length // decoder.block_length)
    reveal, forwards, margin = np.full(len(tokens), -1), 0, np.inf
    for start in range(0, len(slots), decoder.block_length):
        block = slots[start : start + decoder.block_length]
        for i in range(steps):
            count = len(block) // steps + (i < len(block) % steps)
            if not count:
                break
            logits = yield tokens
            logits[:, mask_id] = -np.inf
            place = np.array([row]), np.array([forwards]), canvas.positions_BT[b][None, block]
            choice, lead, rank = {}, {}, {}
            gumbel = np.asarray(score.gumbel(noise(score.TOKEN, *place, logits.shape[-1])[0])) if decoder.temperature else None
            order = np.asarray(score.uniform(noise(score.RANK, *place, 1)))[0, :, 0]
            for j, slot in enumerate(block):
                noisy = logits[slot] if gumbel is None else logits[slot] + np.float32(decoder.temperature) * gumbel[j]
                choice[slot] = int(noisy.argmax())
                lead[slot] = -np.subtract(*np.partition(noisy, -2)[-2:])
                exact = logits[slot].astype(np.float64)
                prob = np.exp(exact[choice[slot]] - np.log(np.exp(exact).sum()))
                rank[slot] = order[j] if isinstance(decoder, select.Random) else prob
            masked = sorted((slot for slot in block if tokens[slot] == mask_id), key=lambda slot: -rank[slot])
            for slot in masked[:count]:
                tokens[slot], reveal[slot] = choice[slot], forwards
                margin = min(margin, lead[slot], *(rank[slot] - rank[other] for other in masked[count:]))
            forwards += 1
            if stop_at_eos and any(t == eos_id and writable[at:].all() and mask_id not in tokens[:at] for at, t in enumerate(tokens)):
                for slot in slots:
                    if tokens[slot] == mask_id:
                        tokens[slot], reveal[slot] = eos_id, forwards - 1
                return tokens, reveal, forwards, margin
    if not forwards:
        yield tokens
    return tokens, reveal, forwards, margin
