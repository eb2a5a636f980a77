"""Block diffusion (BD3-LM, arXiv 2503.09573; LLaDA2.0, arXiv 2512.15745): noisy blocks that see themselves and the clean text before them.

One pass over [noisy ; clean], 2 T positions, gives the terms of all blocks. Which block a position is in is an array, so blocks of another size
are another input, not another program. Without blocks every position is in block 0, and the clean half would be seen by nobody: it is left out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import config as config_lib
from llada_jax import shapes
from pallas_kernels.attention import AttentionSpec


class Schedule(NamedTuple):
    """Tokens of a block by training step, from `diffusion.block_schedule`: `sizes[i]` from step `starts[i]` on; `length` is the whole row."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, config: config_lib.Config) -> "Schedule":
        stages = config_lib.block_stages(config.diffusion.block_schedule)
        starts = np.minimum(np.cumsum([0, *(steps for _, steps in stages[:-1])]), 2**31 - 1)
        length = config.data.sequence_length
        return cls(tuple(size if 0 < size < length else length for size, _ in stages), tuple(starts.tolist()), length)

    def size(self, step: jax.Array | int) -> jax.Array:
        """Tokens of a block at this step, int32; `step` may be traced."""
        return jnp.asarray(self.sizes)[jnp.searchsorted(jnp.asarray(self.starts), step, side="right") - 1]

    def clean_half(self, step: int | None = None) -> bool:
        """Whether this step, or for None any one, needs the clean half of the input."""
        sizes = self.sizes if step is None else self.sizes[np.searchsorted(self.starts, step, side="right") - 1:][:1]
        return any(size < self.length for size in sizes)

    def switches(self) -> tuple[int, ...]:
        """Steps at which the clean half comes or goes: the program is another one from there on."""
        return tuple(step for step in self.starts[1:] if self.clean_half(step) != self.clean_half(step - 1))

    def final(self, steps: int) -> int:
        """Tokens of a block at the last of so many steps, those that the model is made for; 0 for the whole row.

        Without an array: sample and evaluate ask before they choose the number of devices, which the first array settles.
        """
        size = self.sizes[np.searchsorted(self.starts, steps - 1, side="right") - 1]
        return size if size < self.length else 0


def ids(position_BT: jax.Array, size: jax.Array | int, origin: str) -> jax.Array:
    """Block of each position, ⌊i / size⌋, (B, T) int32; i counts from the start of the row, or of the segment (`origin`).

    Counted along the row, a block may straddle two documents. As attention stays within a segment it is then two blocks.
    """
    index_BT = position_BT if origin == "segment" else jnp.broadcast_to(jnp.arange(position_BT.shape[1], dtype=jnp.int32), position_BT.shape)
    return index_BT // size


def units(block_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
    """Number of the block within the row, (B, T) int32, from 0; one that straddles two segments is two."""
    changes = lambda x_BT: x_BT[:, 1:] != x_BT[:, :-1]
    return jnp.pad(jnp.cumsum(changes(block_BT) | changes(segment_BT), axis=1), ((0, 0), (1, 0))).astype(jnp.int32)


def doubled(noisy_BT: jax.Array, clean_BT: jax.Array, position_BT: jax.Array, spec: AttentionSpec,
            block_BT: jax.Array) -> tuple[jax.Array, jax.Array, AttentionSpec]:
    """Tokens [noisy ; clean], positions and structure of 2 T positions (LLaDA2.0 §3; `AttentionSpec` says who sees whom).

    `spec` limits attention within a half, by segment and padding; these limits hold across the halves too.
    """
    shapes.check("BT BT BT BT", noisy_BT, clean_BT, position_BT, block_BT)
    twice = lambda x_BT: None if x_BT is None else jnp.concatenate([x_BT, x_BT], axis=1)
    half_BW = jnp.broadcast_to(jnp.arange(2 * noisy_BT.shape[1], dtype=jnp.int32) // noisy_BT.shape[1], twice(block_BT).shape)
    structure = AttentionSpec.own(block=twice(block_BT), half=half_BW)
    spec = AttentionSpec(*(twice(old) if new is None else new for old, new in zip(spec, structure, strict=True)))
    return jnp.concatenate([noisy_BT, clean_BT], axis=1), twice(position_BT), spec
