"""Held-out likelihood of a run: bits per byte with a standard error, and loss by noise level. Of preference optimisation, rewards too."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.diffusion import blocks, likelihood
from llada_jax.diffusion.likelihood import Bound
from llada_jax.model.transformer import LanguageModel
from llada_jax.training import preference
from pallas_kernels.attention import AttentionSpec

SEED = 1_000_003  # of evaluation noise: the same masks at every evaluation and in every run


def make(model: LanguageModel, config: config_lib.Config, mesh: jax.sharding.Mesh, mask_id: int) -> Callable[..., dict[str, Any]]:
    """evaluate(variables, rows, draws, block_size) -> figures; `rows` holds numpy arrays with all held-out rows (and `bytes`),
    the same on every process. The bound is that of block diffusion with blocks of so many tokens, counted as `diffusion.block_origin` says;
    0 is plain masked diffusion, None the size at the end of the run. All sizes but 0 share one program.

    bits_per_byte: upper bound (diffusion) or exact value (autoregressive) on the bits that an original byte costs, with its
    standard error over rows (ratio estimator; rows count as independent). nats_per_token: the same a token.
    loss_by_level: mean nats a masked token of rows (of blocks) in eight bins of the noise level, null where none fell.
    """
    batch_size = config.train.batch_size
    masked = config.diffusion.model_kind == "masked"

    def one(variables, batch, draw, draws, block_size):
        spec = AttentionSpec.own(segment=batch["segment"], padding=batch["segment"] == 0)
        if masked:
            block_BT = None if block_size is None else blocks.ids(batch["position"], block_size, config.diffusion.block_origin)
            return likelihood.bound(model.apply, model.cross_entropy, variables, batch, spec, mask_id, SEED, draw, draws, block_BT)
        return likelihood.exact(model.apply, model.cross_entropy, variables, batch, spec)

    one = jax.jit(one, compiler_options=partitioning.compiler_options(model.shapes) or None)

    def evaluate(variables: Any, rows: dict[str, np.ndarray], draws: int = 1, block_size: int | None = None) -> dict[str, Any]:
        count, draws = len(rows["tokens"]), draws if masked else 1
        block_size = blocks.Schedule.of(config).final(config.train.steps) if block_size is None else block_size
        block_size = block_size if block_size < rows["tokens"].shape[1] and masked else 0
        size = jnp.int32(block_size) if block_size else None
        results = []
        for start in range(0, count, batch_size):
            batch = {key: _pad(rows[key][start:start + batch_size], batch_size) for key in ("tokens", "segment", "position", "maskable")}
            batch["index"] = np.arange(start, start + batch_size, dtype=np.int32)
            on_device = partitioning.put_batch(mesh, batch)
            bounds = [one(variables, on_device, jnp.int32(draw), jnp.int32(draws), size) for draw in range(draws)]
            results.append((min(batch_size, count - start), Bound(*map(jnp.stack, zip(*bounds, strict=True)))))
        nats_DB, p_DBU, nll_DBU = (np.concatenate([_fetch(getattr(found, name))[:, :n] for n, found in results], axis=1) for name in Bound._fields)
        tokens_B = rows["maskable"].sum(-1).astype(np.float64)
        bytes_B = (rows["bytes"] * rows["maskable"]).sum(-1).astype(np.float64)
        bits, influence_B = ratio(nats_DB.mean(0) / np.log(2), bytes_B)
        level = np.where(p_DBU > 0, np.clip((p_DBU * likelihood.LEVELS).astype(int), 0, likelihood.LEVELS - 1), -1)
        by_level = [float(nll_DBU[level == i].mean()) if (level == i).any() else None for i in range(likelihood.LEVELS)]
        return {"bits_per_byte": bits, "bits_per_byte_se": float(np.linalg.norm(influence_B)),
                "nats_per_token": float(nats_DB.mean(0).sum() / tokens_B.sum()), "loss_by_level": by_level if masked else [], "rows": count,
                "tokens": int(tokens_B.sum()), "bytes": int(bytes_B.sum()), "draws": draws, "block_size": block_size}

    return evaluate


def make_rewards(model: LanguageModel, config: config_lib.Config, mesh: jax.sharding.Mesh, mask_id: int) -> Callable[..., dict[str, float]]:
    """rewards(variables, reference or None, rows) -> figures of held-out pairs, rows 2i and 2i + 1, under the same masks at every evaluation.

    reward_margin: mean reward of the chosen answer over the rejected one; reward_accuracy: share of pairs in which it is above 0.
    """
    settings, batch_size = preference.Preference.of(config.diffusion), config.train.batch_size

    def one(given, batch):
        policy = {key: value for key, value in given.items() if key != "reference"}
        found = preference.draws(model, policy, preference.reference_of(given), batch, (SEED, 0), mask_id, settings)
        return preference.margins(found, settings.beta)

    one = jax.jit(one, compiler_options=partitioning.compiler_options(model.shapes) or None)

    def rewards(variables: Any, reference: Any, rows: dict[str, np.ndarray]) -> dict[str, float]:
        given, margins = variables if reference is None else {**variables, "reference": reference}, []
        for start in range(0, len(rows["tokens"]), batch_size):
            batch = {key: _pad(rows[key][start:start + batch_size], batch_size) for key in ("tokens", "segment", "position", "maskable")}
            batch["index"] = np.arange(start, start + batch_size, dtype=np.int32)
            margins.append(_fetch(one(given, partitioning.put_batch(mesh, batch))))
        margin_P = np.concatenate(margins)[:len(rows["tokens"]) // 2]
        return {"reward_margin": float(margin_P.mean()), "reward_accuracy": float((margin_P > 0).mean())}

    return rewards


def describe(figures: dict[str, Any]) -> str:
    """One line for people."""
    rewards = f", reward accuracy {figures['reward_accuracy']:.1%}, margin {figures['reward_margin']:.3f}" if "reward_margin" in figures else ""
    kind = "bound" + f" in blocks of {figures['block_size']}" * (figures["block_size"] > 0) if figures["loss_by_level"] else "exact"
    return (f"{figures['bits_per_byte']:.4f} ± {figures['bits_per_byte_se']:.4f} bits a byte ({kind}), {figures['nats_per_token']:.4f} nats a token, "
            f"{figures['rows']} rows, {figures['bytes']:,} bytes, {figures['draws']} draw(s){rewards}")


def _fetch(x: jax.Array) -> np.ndarray:
    """A global array on this host, float64."""
    whole = multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else x
    return np.asarray(whole, np.float64)


def ratio(numerator_B: np.ndarray, denominator_B: np.ndarray) -> tuple[float, np.ndarray]:
    """Σ numerator / Σ denominator, and the share of each row in its error: the norm of all is its standard error (delta method over rows)."""
    mean, n = numerator_B.sum() / denominator_B.sum(), len(numerator_B)
    return float(mean), np.sqrt(n / max(n - 1, 1)) * (numerator_B - mean * denominator_B) / denominator_B.sum()


def _pad(x: np.ndarray, count: int) -> np.ndarray:
    """Repeat the last row up to `count` rows, so that every batch has one compiled shape."""
    return np.concatenate([x, np.repeat(x[-1:], count - len(x), axis=0)]) if len(x) < count else x
