"""The rule by which an operation chooses its implementation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def choose(operation: str, implementations: Mapping[str, Callable[..., Any]], name: str,
           preferred: Mapping[str, str] | None = None) -> Callable[..., Any]:
    """The implementation called `name`; "auto" takes `preferred[platform]` where there is one, else "reference".

    A name that does not exist raises ValueError: a kernel that was asked for is never replaced silently.
    """
    if name == "auto":
        name = (preferred or {}).get(platform(), "reference")
    if name not in implementations:
        raise ValueError(f"{operation} has no implementation '{name}'; it has {', '.join(implementations)}")
    return implementations[name]


def platform() -> str:
    """The platform that a trace is for: cpu, gpu or tpu. `jax.default_device` overrides the process default."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
