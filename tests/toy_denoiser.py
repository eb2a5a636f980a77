"""A toy masked-diffusion denoiser in closed form, behind the model's interface.

Integer hashing modulo 2^32 until a last division by 1024, so logits are exact in float32 and decodes can be compared token by
token with recorded ones. Two "layers" look at neighbouring tokens and states and at the first visible state; confidence grows with
the number of revealed neighbours, so order matters; EOS grows likely late in the sequence if `eos_slope` is positive.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import AttentionSpec, reference

VOCAB, MASK, EOS = 64, 63, 62


def mix(h):
    """The finaliser of murmur3 on uint32."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def combine(h, k):
    h, k = jnp.asarray(h, jnp.uint32), jnp.asarray(k).astype(jnp.uint32)
    return mix(h ^ (k + jnp.uint32(0x9E3779B9) + (h << 6) + (h >> 2)))


def _look(x_BT, visible_BTS, offset, outside):
    """x[b, i + offset] where that is on the canvas and visible from i, else `outside`; and where it was."""
    T = x_BT.shape[1]
    index_T = jnp.arange(T) + offset
    at_T = jnp.clip(index_T, 0, T - 1)
    seen_BT = visible_BTS[:, jnp.arange(T), at_T] & (index_T == at_T)
    return jnp.where(seen_BT, x_BT[:, at_T], jnp.asarray(outside, x_BT.dtype)), seen_BT


@dataclasses.dataclass(frozen=True)
class Toy:
    """Hashable, so that its methods can be static arguments of a jitted function."""

    seed: int
    eos_start: int = 0
    eos_slope: int = 0

    def apply(self, variables, tokens_BT, positions_BT, slots, spec, cache, store, wanted_BC=None):
        """Hidden states are the uint32 words (favourite token, its boost, hash), (B, T, 3), or those at `wanted`."""
        del variables, slots, store
        B, T = tokens_BT.shape
        token_BT, position_BT = tokens_BT.astype(jnp.uint32), positions_BT.astype(jnp.uint32)
        mask_BTS = reference.visible(spec)
        visible_BTS = jnp.ones((B, T, T), bool) if mask_BTS is None else jnp.broadcast_to(mask_BTS, (B, T, T))
        h_BT = combine(jnp.full((B, T), self.seed, jnp.uint32), position_BT + 101)
        for offset in range(-2, 3):
            h_BT = combine(h_BT, _look(token_BT, visible_BTS, offset, VOCAB)[0])
        c_BT = combine(jnp.full((B, T), self.seed ^ 0x5BD1E995, jnp.uint32), position_BT)
        c_BT = combine(c_BT, jnp.take_along_axis(h_BT, jnp.argmax(visible_BTS, axis=2), axis=1))
        revealed_BT = jnp.zeros((B, T), jnp.uint32)
        for offset in range(-3, 4):
            c_BT = combine(c_BT, _look(h_BT, visible_BTS, offset, 0xFFFFFFFF)[0])
            if offset:
                neighbour_BT, seen_BT = _look(token_BT, visible_BTS, offset, MASK)
                revealed_BT += (seen_BT & (neighbour_BT != MASK)).astype(jnp.uint32)
        favourite_BT = combine(c_BT, 1) % (VOCAB - 2)
        eos_chance_BT = jnp.clip(self.eos_slope * jnp.maximum(positions_BT - self.eos_start, 0), 0, 1023)
        favourite_BT = jnp.where((combine(c_BT, 2) & 1023) < eos_chance_BT.astype(jnp.uint32), EOS, favourite_BT)
        keep_BT = (token_BT != MASK) & ((combine(c_BT, 4) & 7) != 0)
        favourite_BT = jnp.where(keep_BT, token_BT, favourite_BT).astype(jnp.uint32)
        boost_BT = 1024 + 768 * revealed_BT + combine(c_BT, 3) % 6145
        hidden_BT3 = jnp.stack([favourite_BT, boost_BT, c_BT], axis=-1)
        return hidden_BT3 if wanted_BC is None else jnp.take_along_axis(hidden_BT3, wanted_BC[..., None], axis=1), cache, None

    def head(self, variables, hidden_BRD):
        del variables
        favourite_BR, boost_BR, c_BR = jnp.moveaxis(hidden_BRD, -1, 0)
        vocab_V = jnp.arange(VOCAB, dtype=jnp.uint32)
        logits_BRV = (combine(c_BR[..., None], 16 + vocab_V) & 2047).astype(jnp.int32)
        logits_BRV = jnp.where(vocab_V == MASK, -20 * 1024, logits_BRV)
        logits_BRV += jnp.where(vocab_V == favourite_BR[..., None], boost_BR[..., None], 0).astype(jnp.int32)
        return logits_BRV.astype(jnp.float32) / 1024

    def recorded_noise(self, key):
        """The random bits of the recorded runs: word n of forward `step`, counted row-major over (B, T) or (B, T, V).

        A row's name is the flat index b · T + (padding on its left), so that adding a position gives the flat index of a slot.
        """
        del key

        def bits(kind, row_B, step_B, position_BC, n):
            del kind
            index_BCN = (row_B[:, None] + position_BC)[..., None] * n + jnp.arange(n)
            step_B = combine(jnp.full(step_B.shape, self.seed ^ 0x27D4EB2F, jnp.uint32), step_B)
            return combine(jnp.broadcast_to(step_B[:, None, None], index_BCN.shape), index_BCN)

        return bits


def toy_of(case) -> Toy:
    return Toy(**{k: case["toy"][k] for k in ("seed", "eos_start", "eos_slope")})


@functools.partial(jax.jit, static_argnums=0)
def logits(toy: Toy, tokens_BT, positions_BT, valid_BT) -> jax.Array:
    """(B, T, V) of one forward of the whole canvas."""
    hidden, _, _ = toy.apply({}, tokens_BT, positions_BT, None, AttentionSpec(padding_k=~valid_BT), None, None)
    return toy.head({}, hidden)
