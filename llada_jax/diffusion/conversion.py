"""From autoregressive weights to masked diffusion: what eases the first steps, and the loss weights of Dream.

The shift (a state predicts the next token) is `model.shift_predictions`; blocks that grow from one token are `diffusion.block_schedule`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llada_jax import shapes
from llada_jax.diffusion import corrupt as corrupt_lib
from pallas_kernels.attention import AttentionSpec


def annealed(spec: AttentionSpec, key: tuple[jax.Array | int, ...], index_B: jax.Array, share: jax.Array) -> AttentionSpec:
    """Causal attention, to which this share of the later positions is opened (attention mask annealing, DiffuLLaMA, arXiv 2410.17891).

    DiffuLLaMA draws each pair of query and later key by itself. Here a key is open to all earlier queries, or to none: a query sees the same share
    of its future, but those that see a key are drawn together. This is a structure of ids, which every kernel has (an open key's block comes
    before all others), where pairs would need a mask of T × T for each row. Share 0 gives the ids of the autoregressive objective, 1 opens all.
    """
    B, T = spec.segment_q.shape
    order_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    open_BT = corrupt_lib.sample_uniforms(key, index_B, corrupt_lib.ATTENTION, T) < share
    return spec._replace(block_q=order_BT, block_k=jnp.where(open_BT, -1, order_BT))


def with_mask_noise(apply_fn: Callable[..., Any], embed_fn: Callable[..., Any], table_VD: jax.Array, key: tuple[jax.Array | int, ...],
                    index_B: jax.Array, length: int, mask_id: int, std: jax.Array) -> Callable[..., Any]:
    """`apply_fn` that adds Gaussian noise to the embedding of masks among the first `length` positions (LLaDA2.0, arXiv 2512.15745).

    Autoregressive training never used the mask's row of the table, which decayed towards zero, where RMSNorm makes gradients explode. `std` is
    in units of the table's root mean square; at 0 the noise is not drawn.
    """
    def apply(variables, tokens_BT, *rest):
        def noisy(x_BTD):
            scale = std * jnp.sqrt(jnp.mean(jnp.square(jax.lax.stop_gradient(table_VD).astype(jnp.float32))))
            noise_BTD = scale * corrupt_lib.sample_normals(key, index_B, corrupt_lib.EMBEDDING, (length, x_BTD.shape[-1]))
            return x_BTD.at[:, :length].add(jnp.where((tokens_BT[:, :length] == mask_id)[..., None], noise_BTD, 0.0).astype(x_BTD.dtype))
        return apply_fn(variables, jax.lax.cond(std > 0, noisy, lambda x_BTD: x_BTD, embed_fn(variables, tokens_BT)), *rest)
    return apply


def context_weights(masked_BT: jax.Array, segment_BT: jax.Array, block_BT: jax.Array, p: float) -> jax.Array:
    """CART (Dream, arXiv 2508.15487): Σ over visible unmasked i of ½ p (1 - p)^(|n - i| - 1) at each position n, (B, T) float32.

    A mask weighs the more, the closer known text is; in the midst of it 1, less what is beyond the document's ends. Visible are its own block and
    the clean blocks of its document before it.
    """
    shapes.check("BT BT BT", masked_BT, segment_BT, block_BT)
    begins = lambda x_BT: jnp.pad(x_BT[:, 1:] != x_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    ends = lambda x_BT: jnp.pad(x_BT[:, 1:] != x_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)

    def sums(value_BT, restart_BT, reverse=False):  # Σ (1 - p)^(|n - i| - 1) value_i over the i before n (or after it) since the last restart
        before_BT = jnp.pad(value_BT[:, 1:], ((0, 0), (0, 1))) if reverse else jnp.pad(value_BT[:, :-1], ((0, 0), (1, 0)))
        steps = jnp.where(restart_BT, 0.0, 1 - p), jnp.where(restart_BT, 0.0, before_BT)
        join = lambda first, then: (first[0] * then[0], then[0] * first[1] + then[1])
        return jax.lax.associative_scan(join, steps, reverse=reverse, axis=1)[1]

    own_BT, known_BT, all_BT = begins(block_BT) | begins(segment_BT), (~masked_BT).astype(jnp.float32), jnp.ones(masked_BT.shape, jnp.float32)
    earlier_BT = sums(all_BT, begins(segment_BT)) - sums(all_BT, own_BT)  # clean blocks
    return 0.5 * p * (earlier_BT + sums(known_BT, own_BT) + sums(known_BT, ends(block_BT) | ends(segment_BT), reverse=True))
