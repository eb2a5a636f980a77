"""The attention block: projections, per-head norm, rotary embedding, optional key/value cache."""

from typing import Any

import jax
import jax.numpy as jnp

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.model import functional
from pallas_kernels.attention import AttentionSpec, attention

Cache = tuple[jax.Array, jax.Array]  # keys and values, each (B, S, K, H), by canvas slot


def attend(x_BTD: jax.Array, params: dict[str, Any], rotary: tuple[jax.Array, jax.Array], spec: AttentionSpec, config: config_lib.Model,
           cache: Cache | None, slots_BT: jax.Array | None, store_BT: jax.Array | None, implementation: str,
           mesh: jax.sharding.Mesh | None, asking: tuple[jax.Array, jax.Array] | None = None) -> tuple[jax.Array, Cache | None]:
    """One attention block on normed input; returns the output (B, T, D) and the cache. Every device has its own queries and heads.

    `asking` are the inputs (B, C, D) of those positions (B, C) that ask, where these are not all: the output is theirs. With a cache the T
    positions are a window of the canvas: their keys and values stand at `slots` for this forward, and stay there where `store` is true (None:
    everywhere).
    """
    asking_BCD, asking_rotary = x_BTD, rotary
    if asking is not None:
        asking_BCD, wanted_BC = asking
        asking_rotary = tuple(functional.at_positions(angles, wanted_BC) for angles in rotary)
        spec = AttentionSpec(*(functional.at_positions(ids, wanted_BC) if name.endswith("_q") and ids is not None else ids
                               for name, ids in zip(spec._fields, spec, strict=True)))
    q_BTNH = functional.heads(asking_BCD, params["query"])
    k_BTKH = functional.heads(x_BTD, params["key"])
    v_BTKH = functional.heads(x_BTD, params["value"])
    if config.qkv_bias:
        q_BTNH, k_BTKH, v_BTKH = q_BTNH + params["query_bias"], k_BTKH + params["key_bias"], v_BTKH + params["value_bias"]
    if config.qk_norm:
        q_BTNH = functional.rms_norm(q_BTNH, params["query_norm"], config.norm_eps)
        k_BTKH = functional.rms_norm(k_BTKH, params["key_norm"], config.norm_eps)
    if config.clip_qkv:
        q_BTNH, k_BTKH, v_BTKH = (jnp.clip(x, -config.clip_qkv, config.clip_qkv) for x in (q_BTNH, k_BTKH, v_BTKH))
    q_BTNH, k_BTKH = functional.rotate(q_BTNH, *asking_rotary), functional.rotate(k_BTKH, *rotary)
    k_BSKH, v_BSKH = k_BTKH, v_BTKH
    if cache is not None:
        rows = jnp.arange(x_BTD.shape[0])[:, None]
        k_BSKH, v_BSKH = (old.at[rows, slots_BT].set(new) for old, new in zip(cache, (k_BTKH, v_BTKH), strict=True))
        if store_BT is None:
            cache = (k_BSKH, v_BSKH)
        else:
            keep = store_BT[:, :, None, None]
            cache = tuple(old.at[rows, slots_BT].set(jnp.where(keep, new, old[rows, slots_BT]))
                          for old, new in zip(cache, (k_BTKH, v_BTKH), strict=True))
    S = k_BSKH.shape[1]

    def local(q_BTNH, k_BSKH, v_BSKH, spec):
        if k_BSKH.shape[1] < S:  # of too few rows every device has a part of the positions
            k_BSKH, v_BSKH = partitioning.all_gather(partitioning.BATCH_AXES, k_BSKH, v_BSKH, axis=1)
        return attention(q_BTNH, k_BSKH, v_BSKH, spec, implementation=implementation)

    split, whole = ("batch", "positions", "heads"), ("batch", None, "heads")
    keys = split if cache is None else whole
    structure = AttentionSpec(*(split[:2] if field.endswith("_q") else whole[:2] for field in AttentionSpec._fields))
    out_BTNH = partitioning.over_shards(local, mesh, (split, keys, keys, structure), split)(q_BTNH, k_BSKH, v_BSKH, spec)
    return jnp.tensordot(out_BTNH, params["output"], 2), cache  # einsum would sum over H first, and turn the weight for it
