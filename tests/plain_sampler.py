"""The samplers of LLaDA and LLaDA2.0 in plain Python and numpy, one row and one token at a time: the specification of the jitted loop."""

import jax
import numpy as np

from llada_jax.sampling import decoders, score


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
        if decoder.guidance:
            un_BTV = np.array(logits_of(np.where(canvas.valid_BT & ~canvas.writable_BT, mask_id, tokens_BT)))
            logits_BTV = un_BTV + np.float32(decoder.guidance + 1) * (logits_BTV - un_BTV)
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
                rank[slot] = order[j] if isinstance(decoder, decoders.Random) else prob
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


def decode_blocks(logits_of, request, decoder, *, mask_id, eos_id, stop_at_eos=False):
    """LLaDA2.0's generate for one request, greedy: (tokens, reveal steps, forwards, margin), the tail of the last block included.

    `logits_of(tokens_T)` gives float32 (T, V) of a block-causal forward; it is shown no block before its turn.
    """
    C, steps = decoder.block_length, min(decoder.steps or decoder.block_length, decoder.gen_length)
    tokens = [t for piece in request for t in ([mask_id] * piece if isinstance(piece, int) else piece)]
    ending = max((i + 1 for i, t in enumerate(tokens) if t != mask_id), default=0)  # from here on everything is generated
    if mask_id in tokens[len(tokens) // C * C :]:
        tokens += [mask_id] * (-len(tokens) % C)
    reveal, forwards, margin = [-1] * len(tokens), 0, np.inf
    for end in range(C, len(tokens) + C, C):
        for step in range(steps):
            masked = [i for i in range(end - C, min(end, len(tokens))) if tokens[i] == mask_id]
            if not masked:
                break
            logits = np.array(logits_of(np.array(tokens[:end])), np.float64)
            logits[:, mask_id] = -np.inf
            choice = {i: int(logits[i].argmax()) for i in masked}
            prob = {i: float(np.exp(logits[i, choice[i]] - np.log(np.exp(logits[i]).sum()))) for i in masked}
            quota = C // steps + (step < C % steps)
            best = sorted(masked, key=lambda i: -prob[i])
            sure = [i for i in masked if prob[i] > decoder.threshold]
            written = sure if len(sure) >= quota else best[:quota]
            for i in written:
                tokens[i], reveal[i] = choice[i], forwards
            leads = [-np.subtract(*np.partition(logits[i], -2)[-2:]) for i in written]
            gaps = [abs(prob[i] - decoder.threshold) for i in masked] + [prob[best[quota - 1]] - prob[i] for i in best[quota:]]
            margin = min([margin, *leads, *gaps])
            forwards += 1
        if stop_at_eos and eos_id in tokens[ending:end]:
            reveal = [forwards - 1 if t == mask_id else step for t, step in zip(tokens, reveal, strict=True)]
            tokens = [eos_id if t == mask_id else t for t in tokens]
            break
    return np.array(tokens), np.array(reveal), forwards, margin
