"""A batch for tests of meshes, and the noisy tokens that a training step makes of it."""

import jax.numpy as jnp
import numpy as np

from llada_jax.diffusion import corrupt
from llada_jax.training import step as step_lib


def rows(B, T, mask, first=0):
    """Rows with two segments, padding at the end of some, and prompts that are not maskable; `first` is the number of the first sample."""
    rng, place = np.random.RandomState(0), np.arange(T)
    segment = np.where(place < 4, 1, 2) * (place < rng.randint(T // 2, T + 1, (B, 1)))
    return {"tokens": rng.randint(0, mask, (B, T)).astype(np.int32), "segment": segment.astype(np.int32),
            "position": np.broadcast_to(np.where(place < 4, place, place - 4), (B, T)).astype(np.int32),
            "maskable": (segment > 0) & (place > 1), "index": np.arange(first, first + B, dtype=np.uint32)}


def noisy(config, batch, step, mask):
    """What the model sees of the batch at this step."""
    key, (B, T) = (config.train.seed, step, step_lib.DRAW), batch["tokens"].shape
    t = corrupt.times(key, batch["index"], 1, B, config.diffusion.time_sampling)
    noise = corrupt.Noise.of(config.diffusion, mask)
    return corrupt.corrupt(key, batch["index"], batch["tokens"], jnp.asarray(batch["maskable"]), jnp.zeros((B, T), jnp.int32), noise, t)[0]
