"""Masking schedules: the mask probability p(t) over time, and the exact ELBO weight as a function of p.

The negative ELBO of a masked-diffusion model is the integral over t in [0, 1] of p'(t)/p(t) · E[Σ_masked CE], with p the
mask probability at t (arXiv 2406.04329 eq. 8, 2406.03736; p = 1 - alpha). Written in p, all schedules give the same
integral of dp/p: the schedule only chooses where draws fall. A loss therefore needs p alone.
"""

import jax
import jax.numpy as jnp

HALF_PI = jnp.pi / 2


def mask_probability(t: jax.Array, schedule: str, power: float = 2.0, min_noise: float = 0.0, max_noise: float = 1.0) -> jax.Array:
    """p(t), moved to (max_noise - min_noise) p + min_noise (LLaDA, arXiv 2502.09992: p = (1 - eps) t + eps; LLaDA2.0's band, arXiv 2512.15745).

    linear: t;  cosine: cos(π/2 (1 - t));  polynomial: t^power. Raises ValueError for another name.
    """
    if schedule == "linear":
        p = t
    elif schedule == "cosine":
        p = jnp.cos(HALF_PI * (1 - t))
    elif schedule == "polynomial":
        p = t**power
    else:
        raise ValueError(f"unknown schedule {schedule!r}")
    return (max_noise - min_noise) * p + min_noise


def elbo_weight(p: jax.Array, schedule: str, power: float = 2.0, min_noise: float = 0.0, max_noise: float = 1.0) -> jax.Array:
    """Weight of -log p(token) at a masked position whose mask probability `mask_probability` gave: q'(t) / p, with q the plain schedule.

    linear: 1/p;  cosine: π/2 sqrt(1 - q²) / p;  polynomial: power · q^(1 - 1/power) / p. Without `min_noise`, q = p and this
    is the exact p'(t) / p(t). In a band the integral over t is that of dp/p over [min_noise, max_noise], divided by its width, on every
    schedule (as in LLaDA's code on the linear one).
    """
    q = jnp.clip((p - min_noise) / (max_noise - min_noise), 0.0, 1.0)
    if schedule == "linear":
        return 1 / p
    if schedule == "cosine":
        return HALF_PI * jnp.sqrt(jnp.maximum(1 - q * q, 0.0)) / p
    if schedule == "polynomial":
        return power * q ** (1 - 1 / power) / p
    raise ValueError(f"unknown schedule {schedule!r}")
