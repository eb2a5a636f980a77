"""Prompts for a trained model to continue: of its task, or from its held-out text, where what a continuation costs under the model is measured."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.data import pipeline
from llada_jax.diffusion import likelihood
from llada_jax.evaluation import answers, heldout, tasks
from llada_jax.model.transformer import LanguageModel
from llada_jax.sampling import presets
from llada_jax.sampling.cache import Cache
from llada_jax.sampling.decoder import Decoder
from llada_jax.tokenizer import Tokenizer

PROMPT = 128  # tokens of a prompt from held-out text at most
SEARCHED = 100  # held-out rows looked through for each prompt that is wanted


class Request(NamedTuple):
    """What to write after prompts of one length, and by which decoders."""

    prompt_BP: np.ndarray  # int32
    decoder: Decoder
    cache: Cache
    one: Decoder  # low confidence for the same, one token a forward unless the lengths have steps
    answer: str | None = None  # the right one, of a task
    text_BC: np.ndarray | None = None  # int32, what follows in the held-out text


def request(prompt_BP: np.ndarray, chosen: presets.Flags, lengths: Mapping[str, int]) -> Request:
    """What `chosen` writes after these prompts. Raises ConfigError for a decoder or cache that cannot be."""
    _, decoder, cache = chosen.build(defaults=lengths)
    return Request(prompt_BP, decoder, cache, presets.build("low_confidence", {**lengths, "gen_length": decoder.gen_length}))


def of_run(config: config_lib.Config, tokenizer: Tokenizer, chosen: presets.Flags, count: int) -> Request:
    """An instance of the task that the run was trained on, its answer one block; or, of a run on text, what `count` held-out rows begin with.

    These are the first rows that begin with P + C tokens of one document, P the 128 tokens, or fewer, that a row has room for beside the C
    tokens to write. Raises ConfigError where that is none, for fewer than two such rows, and for a task whose gaps have text behind them.
    """
    T, nothing = config.data.sequence_length, np.zeros((1, 0), np.int32)
    if config.data.sources in tasks.TASKS:
        [item] = tasks.TASKS[config.data.sources].instances(1, config.train.seed)
        if any(isinstance(piece, str) for piece in item.pieces[1:]):
            raise ConfigError(f"answers of {config.data.sources} stand between given letters, and only what follows a prompt is written here; "
                              "evaluate --tasks counts the forwards that each decoder takes for it")
        made = request(nothing, chosen, dict.fromkeys(("gen_length", "block_length"), len(item.answer)))
        return made._replace(prompt_BP=np.array([tokenizer.encode(str(item.pieces[0]))], np.int32), answer=item.answer)
    made = request(nothing, chosen, chosen.lengths(T))
    C = made.decoder.gen_length
    if (P := min(PROMPT, T - C)) < 1:
        raise ConfigError(f"decoder.gen_length={C} leaves no room for a prompt in rows of data.sequence_length={T} tokens; use at most {T - 1}")
    data = pipeline.build(config, tokenizer, "heldout")
    rows = data.rows(np.arange(min(data.num_rows, SEARCHED * count)))
    segment_BT = rows["segment"][:, :P + C]
    tokens_BT = rows["tokens"][((segment_BT == segment_BT[:, :1]) & (segment_BT > 0)).all(-1)][:count]
    if len(tokens_BT) < 2:
        raise ConfigError(f"of {len(segment_BT)} held-out rows {len(tokens_BT)} begin with {P} + {C} tokens of one document, where two are needed; "
                          "lower decoder.gen_length, or hold out more (data.holdout)")
    return made._replace(prompt_BP=tokens_BT[:, :P], text_BC=tokens_BT[:, P:P + C])


def bits(model: LanguageModel, variables: Any, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, prompt_BP: np.ndarray,
         texts: Mapping[str, np.ndarray], estimator: likelihood.Estimator) -> dict[str, dict[str, Any]]:
    """What each of `texts`, {name: (B, C) tokens after the prompts}, costs under the model given its prompt, by name.

    bits_per_byte: upper bound; the bits of all B texts, ends of text included, over their bytes. bits_per_byte_se: its standard error over
    prompts; draws_se: how much of that comes from the draws. difference, difference_se: to the first text, prompt by prompt. The masks
    that are drawn for a prompt are the same for every text. None where there is no byte. Raises ConfigError for a mask in a text, and
    where the model's output is not finite.
    """
    B, first = len(prompt_BP), next(iter(texts))
    score = answers.make(model, variables, mesh, tokenizer.mask_id, tokenizer.pad_id, estimator, seed=heldout.SEED, batch_size=B, check_greedy=False)
    pairs = [(prompt.tolist(), text.tolist()) for text_BC in texts.values() for prompt, text in zip(prompt_BP, text_BC, strict=True)]
    found = dict(score(pairs, [*range(B)] * len(texts)))
    figures, influence = {}, {}
    for k, (name, text_BC) in enumerate(texts.items()):
        own = [found[i] for i in range(k * B, (k + 1) * B)]
        last = tokenizer.vocab_size - 1  # a model may have more tokens than its tokenizer
        bytes_B = np.where(text_BC > last, 0, tokenizer.piece_bytes(np.minimum(text_BC, last))).sum(-1)
        figures[name] = dict.fromkeys(("bits_per_byte", "bits_per_byte_se", "draws_se", "difference", "difference_se"))
        if not bytes_B.any():
            continue
        mean, influence[name] = heldout.ratio(np.array([-answer.logprob for answer in own]) / np.log(2), bytes_B)
        draws = np.linalg.norm([answer.error for answer in own]) / np.log(2) / bytes_B.sum()
        figures[name] |= {"bits_per_byte": mean, "bits_per_byte_se": float(np.linalg.norm(influence[name])), "draws_se": float(draws)}
        if first in influence:
            error = float(np.linalg.norm(influence[name] - influence[first]))
            figures[name] |= {"difference": mean - figures[first]["bits_per_byte"], "difference_se": error}
    return figures


def describe(quality: Mapping[str, Any]) -> str:
    """Lines for people of {"prompts", "prompt_tokens", "new_tokens", "draws", "texts": figures of `bits` by name, some with "forwards"}."""
    lines = [f"bits a byte under the model, given the prompt (bound from {quality['draws']} draws a text, the same masks for all; "
             f"{quality['prompts']} held-out prompts of {quality['prompt_tokens']} tokens, {quality['new_tokens']} new ones; "
             "± one standard error over prompts):"]
    for k, (name, own) in enumerate(quality["texts"].items()):
        value = "no byte was written"
        if own["bits_per_byte"] is not None:
            value = f"{own['bits_per_byte']:.4f} ± {own['bits_per_byte_se']:.4f} (of it ± {own['draws_se']:.4f} from the draws)"
        if k and own["difference"] is not None:
            value += f", {own['difference']:+.4f} ± {own['difference_se']:.4f} to {next(iter(quality['texts']))}"
        forwards = f", {own['forwards']:.1f} forwards a prompt" if "forwards" in own else ""
        agree = f", {own['agree']} of {quality['prompts'] * quality['new_tokens']} tokens agree" if "agree" in own else ""
        lines.append(f"  {name:<14} {value}{forwards}{agree}")
    return "\n".join(lines)
