"""Likelihoods of answers after prompts, for lists of any size: batches of few shapes, one compile each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llada_jax import partitioning
from llada_jax.config import ConfigError
from llada_jax.diffusion import likelihood
from llada_jax.model.transformer import LanguageModel

SHORTEST = 32  # positions of the smallest shape


class Answer(NamedTuple):
    """What is known of one answer."""

    logprob: float  # estimate of a lower bound on log p(answer | prompt), nats; exact for one token
    error: float  # its standard error; NaN with one group of draws
    greedy: bool | None  # whether greedy decoding writes this answer; None where that was not asked


Request = tuple[Sequence[int], Sequence[int]]  # token ids of prompt and answer
Score = Callable[[Sequence[Request], Sequence[int]], Iterator[tuple[int, Answer]]]


def make(model: LanguageModel, variables: Any, mesh: jax.sharding.Mesh, mask_id: int, pad_id: int, estimator: likelihood.Estimator, *,
         seed: int = 0, batch_size: int = 32, check_greedy: bool = True, block_size: int = 0) -> Score:
    """score(requests, names) yields (number of the request, Answer), batch by batch, not in order.

    `names` are int32 sample indices: with `seed` they settle a request's masks, so that neither its neighbours nor its place matter.
    `block_size` is that of a model of block diffusion, 0 for others.
    Raises ConfigError for requests without a likelihood (before anything runs), and for a model whose output is not finite.
    """
    options = partitioning.compiler_options(model.shapes) or None
    size = batch_size + -batch_size % partitioning.batch_shards(mesh)
    denoiser = likelihood.Denoiser(model.apply, model.cross_entropy, model.head)
    estimate = jax.jit(lambda v, batch: likelihood.conditional(denoiser, v, batch, mask_id, seed, estimator, block_size), compiler_options=options)
    greedy = jax.jit(lambda v, batch: likelihood.is_greedy(denoiser, v, batch, mask_id, estimator.guidance, block_size), compiler_options=options)

    def score(requests, names):
        for i, (prompt, answer) in enumerate(requests):
            likelihood.check(prompt, answer, model.config.max_length, mask_id, f"request {i}")
        single = lambda i: len(requests[i][1]) == 1  # one forward is enough for a batch of these
        lengths = [len(prompt) + len(answer) for prompt, answer in requests]
        for chosen, length in batches(lengths, size, model.config.max_length, single):
            packed = likelihood.pack([requests[i] for i in chosen], [names[i] for i in chosen], size, length, mask_id, pad_id)
            batch = partitioning.put_batch(mesh, packed)
            found = jax.device_get(estimate(variables, batch))
            right_B = np.asarray(greedy(variables, batch)) if check_greedy else None
            if not np.isfinite(found.nats_B).all():
                raise ConfigError("the model's output is not finite; try an earlier --step or compute in float32")
            for b, i in enumerate(chosen):
                yield i, Answer(-float(found.nats_B[b]), float(found.error_B[b]), None if right_B is None else bool(right_B[b]))

    return score


def batches(lengths: Sequence[int], size: int, max_length: int, group: Callable[[int], Any] = lambda i: None) -> Iterator[tuple[list[int], int]]:
    """Items in batches of at most `size`, longest first within each group, with the length that every row of the batch is padded to."""
    groups: dict[Any, list[int]] = {}
    for i in range(len(lengths)):
        groups.setdefault(group(i), []).append(i)
    for members in groups.values():
        members = sorted(members, key=lambda i: -lengths[i])
        for start in range(0, len(members), size):
            yield (chosen := members[start : start + size]), bucket(lengths[chosen[0]], max_length)


def bucket(length: int, max_length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, … that is not below `length`, at most `max_length`: two shapes an octave."""
    wanted = max(length, SHORTEST)
    octave = (wanted - 1).bit_length()
    return min(next(n for n in (3 << octave - 2, 1 << octave) if n >= wanted), max_length)
