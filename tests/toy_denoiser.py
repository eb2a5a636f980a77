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
    shift: bool = False  # a position's logits are those of the one before it (Dream)

    def init_cache(self, B, T):
        """Per slot the token, the first layer's state, the position of the last forward that kept the slot."""
        return tuple(jnp.zeros((B, T), dtype) for dtype in (jnp.uint32, jnp.uint32, jnp.int32))

    def apply(self, variables, tokens_BW, positions_BW, slots_BW, spec, cache, store_BW, wanted_BC=None):
        """Hidden states are the logits, (B, W, V), or those at `wanted`. With a cache the W positions are a window of the canvas."""
        del variables
        B, W = tokens_BW.shape
        mask_BWS = reference.visible(spec)
        if cache is None:
            token_BT, position_BT, recomputed_BT = tokens_BW.astype(jnp.uint32), positions_BW, jnp.ones((B, W), bool)
            visible_BTS = jnp.ones((B, W, W), bool) if mask_BWS is None else jnp.broadcast_to(mask_BWS, (B, W, W))
            slots_BW, old_BT = jnp.broadcast_to(jnp.arange(W), (B, W)), jnp.zeros((B, W), jnp.uint32)
        else:
            old_token_BT, old_BT, old_position_BT = cache
            T = old_BT.shape[1]
            put = jax.vmap(lambda old, slots_W, new: old.at[slots_W].set(new, mode="drop"))
            token_BT, position_BT = put(old_token_BT, slots_BW, tokens_BW.astype(jnp.uint32)), put(old_position_BT, slots_BW, positions_BW)
            recomputed_BT = put(jnp.zeros((B, T), bool), slots_BW, jnp.ones((B, W), bool))
            visible_BWS = jnp.ones((B, W, T), bool) if mask_BWS is None else jnp.broadcast_to(mask_BWS, (B, W, T))
            visible_BTS = put(jnp.zeros((B, T, T), bool), slots_BW, visible_BWS)
        h_BT = jnp.where(recomputed_BT, self._states(token_BT, position_BT, visible_BTS), old_BT)
        logits_BTV = self._readout(token_BT, h_BT, position_BT, visible_BTS)
        if self.shift:
            logits_BTV = jnp.where((position_BT == 0)[..., None], logits_BTV, jnp.roll(logits_BTV, 1, axis=1))
        logits_BWV = jnp.take_along_axis(logits_BTV, jnp.minimum(slots_BW, logits_BTV.shape[1] - 1)[..., None], axis=1)
        if cache is not None:
            kept_BT = put(jnp.zeros((B, T), bool), slots_BW, store_BW)
            cache = tuple(jnp.where(kept_BT, new, old) for new, old in zip((token_BT, h_BT, position_BT), cache, strict=True))
        return logits_BWV if wanted_BC is None else jnp.take_along_axis(logits_BWV, wanted_BC[..., None], axis=1), cache, None

    def _states(self, token_BT, position_BT, visible_BTS):
        h_BT = combine(jnp.full(token_BT.shape, self.seed, jnp.uint32), position_BT.astype(jnp.uint32) + 101)
        for offset in range(-2, 3):
            h_BT = combine(h_BT, _look(token_BT, visible_BTS, offset, VOCAB)[0])
        return h_BT

    def _readout(self, token_BT, h_BT, position_BT, visible_BTS):
        c_BT = combine(jnp.full(token_BT.shape, self.seed ^ 0x5BD1E995, jnp.uint32), position_BT)
        c_BT = combine(c_BT, jnp.take_along_axis(h_BT, jnp.argmax(visible_BTS, axis=2), axis=1))
        revealed_BT = jnp.zeros(token_BT.shape, jnp.uint32)
        for offset in range(-3, 4):
            c_BT = combine(c_BT, _look(h_BT, visible_BTS, offset, 0xFFFFFFFF)[0])
            if offset:
                neighbour_BT, seen_BT = _look(token_BT, visible_BTS, offset, MASK)
                revealed_BT += (seen_BT & (neighbour_BT != MASK)).astype(jnp.uint32)
        favourite_BT = combine(c_BT, 1) % (VOCAB - 2)
        eos_chance_BT = jnp.clip(self.eos_slope * jnp.maximum(position_BT - self.eos_start, 0), 0, 1023)
        favourite_BT = jnp.where((combine(c_BT, 2) & 1023) < eos_chance_BT.astype(jnp.uint32), EOS, favourite_BT)
        keep_BT = (token_BT != MASK) & ((combine(c_BT, 4) & 7) != 0)
        favourite_BT = jnp.where(keep_BT, token_BT, favourite_BT).astype(jnp.uint32)
        boost_BT = 1024 + 768 * revealed_BT + combine(c_BT, 3) % 6145
        vocab_V = jnp.arange(VOCAB, dtype=jnp.uint32)
        logits_BTV = (combine(c_BT[..., None], 16 + vocab_V) & 2047).astype(jnp.int32)
        logits_BTV = jnp.where(vocab_V == MASK, -20 * 1024, logits_BTV)
        logits_BTV += jnp.where(vocab_V == favourite_BT[..., None], boost_BT[..., None], 0).astype(jnp.int32)
        return logits_BTV.astype(jnp.float32) / 1024

    def head(self, variables, hidden_BRV):
        del variables
        return hidden_BRV

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
    return Toy(**{k: case["toy"][k] for k in ("seed", "eos_start", "eos_slope")}, shift=case["settings"].get("right_shift_logits", False))


@functools.partial(jax.jit, static_argnums=0)
def logits(toy: Toy, tokens_BT, positions_BT, valid_BT) -> jax.Array:
    """(B, T, V) of one forward of the whole canvas."""
    hidden, _, _ = toy.apply({}, tokens_BT, positions_BT, None, AttentionSpec(padding_k=~valid_BT), None, None)
    return toy.head({}, hidden)
