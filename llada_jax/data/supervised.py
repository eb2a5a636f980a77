"""Supervised fine-tuning: answers to prompts as tokens, and what a batch makes of them when it is drawn.

A sample is a prompt with its answer, or a conversation, which the chat template writes. Each answer is followed by the id that ends it: the
end of a turn, or end-of-text without a template. The rest is settled for each draw (`finish`), from (seed, sample index) alone:
  turns     which answers of a conversation are learned. LLaDA-MoE (arXiv 2509.24389) draws one: all before it is its prompt, what follows it is
            not there. With `all` of them, an answer sees later turns in a model that sees to both sides, which decoding never shows it;
            only where attention goes by blocks, and turns do not share one, is that right.
  padding   end-of-text behind the last answer, maskable and in the loss: to the end of the row (LLaDA, arXiv 2502.09992 §2.3), of the
            longest sample in the global batch (LLaDA's batches of free shape), or of a block (LLaDA2.0, arXiv 2512.15745; whether its loss
            has them is not published). Under `align` and `none` there are none, and nobody sees the rest of a block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from llada_jax.config import ConfigError, Data
from llada_jax.data import pack
from llada_jax.data.sources import Document
from llada_jax.interop import chat
from llada_jax.tokenizer import Tokenizer

GIVEN, TEXT = 0, 1  # values of `turn`; the k-th answer is TEXT + k


class Sample(NamedTuple):
    """Token ids and their turns; `optional` ids at the end may be lost to a full row without a word."""

    tokens: Sequence[int]
    turns: Sequence[int]
    optional: int


def rows_of(documents: Sequence[Document], tokenizer: Tokenizer, data: Data, name: str, packed: bool) -> pack.Rows:
    """Rows of whole documents, several in one (first fit) if `packed`; what is cut or left out is logged.

    Raises ConfigError for messages without a template, and for settings under which packed answers cannot be padded.
    """
    rule, block = data.answer_rule
    if packed and rule in ("row", "batch"):
        raise ConfigError(f"{name} holds prompts and answers, and data.answer_padding={data.answer_padding} pads one a row: set data.pack=False "
                          "(in prepare: --nopack), or data.answer_padding to block:N, align:N or none, to put several in a row")
    kept, cut = [], 0
    for document in documents:
        sample, shortened = fit(sample_of(document, tokenizer, data.chat_template), data.sequence_length)
        cut += shortened and sample is not None
        if sample is not None:
            kept.append(sample)
    if cut or len(kept) < len(documents):
        logging.warning("%s: of %d documents %d were cut to data.sequence_length=%d tokens and %d left out, their prompt fills the row",
                        name, len(documents), cut, data.sequence_length, len(documents) - len(kept))
    rows = pack.first_fit([-(-len(s.tokens) // block) * block for s in kept], data.sequence_length) if packed else range(len(kept))
    return pack.place([s[:2] for s in kept], rows, data.sequence_length, tokenizer.eos_id, tokenizer.piece_bytes, block)


def pairs_of(documents: Sequence[Document], tokenizer: Tokenizer, data: Data, name: str) -> pack.Rows:
    """Rows of pairs, chosen in rows 2i and rejected in 2i + 1, of which the last answer alone is learned; how many were left out, as one of theirs is
    longer than a row, is logged. Raises ConfigError for a document that is no pair."""
    single = next((document for document in documents if document.rejected is None), None)
    if single:
        raise ConfigError(f"{single.name} has no rejected answer: diffusion.objective=preference needs lines of prompt, chosen and rejected, or the "
                          "source lookup")
    kept = []
    for document in documents:
        pair = [sample_of(answer, tokenizer, data.chat_template) for answer in (document, document.worse)]
        if max(len(sample.tokens) for sample in pair) <= data.sequence_length:
            kept += [(sample.tokens, [TEXT + 1 if turn == max(sample.turns) else GIVEN for turn in sample.turns]) for sample in pair]
    if len(kept) < 2 * len(documents):
        logging.warning("%s: of %d pairs %d were left out, an answer ends beyond data.sequence_length=%d", name, len(documents),
                        len(documents) - len(kept) // 2, data.sequence_length)
    return pack.place(kept, range(len(kept)), data.sequence_length, tokenizer.eos_id, tokenizer.piece_bytes)


def sample_of(document: Document, tokenizer: Tokenizer, template: str) -> Sample:
    """A document as tokens. Without a template, end-of-text follows the text, or the answer. Raises ConfigError for messages without one."""
    if not document.answers:
        tokens = [*tokenizer.encode(document.text), tokenizer.eos_id]
        return Sample(tokens, [TEXT] * len(tokens), 1)
    if template:
        messages = document.messages or ({"role": "user", "content": document.prompt}, {"role": "assistant", "content": document.text})
        try:
            tokens, answers = chat.conversation(template, messages, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{document.name}: {error} (data.chat_template={template})") from None
        return Sample(tokens, [answer and TEXT + answer for answer in answers], 0)
    if document.messages:
        raise ConfigError(f"{document.name} holds messages: set data.chat_template to one of {', '.join(chat.TEMPLATES)}, and data.tokenizer "
                          "to the tokenizer that has its markers")
    prompt, answer = tokenizer.encode(document.prompt or ""), tokenizer.encode(document.text)
    return Sample([*prompt, *answer, tokenizer.eos_id], [GIVEN] * len(prompt) + [TEXT + 1] * (len(answer) + 1), 1)


def fit(sample: Sample, limit: int) -> tuple[Sample | None, bool]:
    """(the first `limit` tokens, up to their last answer, or None if none begins in them; whether more than the optional end was lost)."""
    turns = np.asarray(sample.turns)
    length = int(np.flatnonzero(turns)[-1]) + 1
    end = int(np.max(np.flatnonzero(turns[:limit]), initial=-1)) + 1
    return (Sample(sample.tokens[:end], sample.turns[:end], 0) if end else None), length - sample.optional > limit


def finish(rows: pack.Rows, index_B: Sequence[int], seed: int, data: Data, eos_id: int) -> pack.Rows:
    """Rows without `turn`: the learned answers are maskable, padding behind them is, and what follows a drawn answer is padding of no segment.

    `index_B` names each row's sample for the draw of its turns. "batch" pads to the longest of these rows.
    """
    turn_BT, segment_BT = rows["turn"], rows["segment"]
    rest = {key: array for key, array in rows.items() if key != "turn"}
    if not (turn_BT > TEXT).any():
        return rest
    B, T = segment_BT.shape
    place_T, row_B1 = np.arange(T), np.arange(B)[:, None]
    of_segment = lambda values_BS: np.take_along_axis(values_BS, cover_BT, axis=1)

    def largest(values_BT: np.ndarray) -> np.ndarray:
        found_BS = np.zeros((B, segment_BT.max() + 1), np.int64)
        np.maximum.at(found_BS, (row_B1, segment_BT), values_BT)
        return found_BS

    cover_BT = np.maximum.accumulate(segment_BT, axis=1)  # the segment that a position belongs to or follows
    answers_BS = np.maximum(largest(turn_BT) - TEXT, 0)
    chosen_BS = answers_BS
    if data.turns == "sampled" and (answers_BS > 1).any():
        u_BS = np.stack([np.random.Philox(key=[seed, int(index)], counter=[0, 0, 0, 1]).random_raw(answers_BS.shape[1]) for index in index_B])
        chosen_BS = np.minimum(1 + (u_BS / 2**64 * answers_BS).astype(np.int64), answers_BS)
    learned_BT = turn_BT == TEXT + of_segment(chosen_BS) if data.turns != "all" else turn_BT > GIVEN  # TEXT + 0 in text

    end_BS = largest(np.where(learned_BT & (turn_BT > GIVEN), place_T + 1, 0))
    rule, block = data.answer_rule
    if rule in ("row", "batch"):
        limit_BS = np.full_like(end_BS, T if rule == "row" else end_BS.max())
    else:
        limit_BS = -(-end_BS // block) * block if rule == "block" else end_BS
    limit_BS = np.where(answers_BS > 0, limit_BS, end_BS)
    kept_BT = (segment_BT > 0) & (place_T < of_segment(end_BS))
    padding_BT = (cover_BT > 0) & (place_T >= of_segment(end_BS)) & (place_T < of_segment(limit_BS))
    segment_BT = np.where(kept_BT | padding_BT, cover_BT, 0)
    return rest | {
        "tokens": np.where(kept_BT, rows["tokens"], eos_id).astype(np.int32), "segment": segment_BT.astype(np.int32),
        "position": pack.positions(segment_BT), "maskable": kept_BT & learned_BT | padding_BT, "bytes": np.where(kept_BT, rows["bytes"], 0)}


def count(rows: pack.Rows) -> int:
    """Samples with answers."""
    if "turn" not in rows:
        return 0
    segment_BT = rows["segment"].astype(np.int64)
    sample_BT = np.arange(len(segment_BT))[:, None] * (segment_BT.max(initial=0) + 1) + segment_BT
    return len(np.unique(sample_BT[rows["turn"] > TEXT]))
