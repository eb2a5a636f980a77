"""The rule by which an operation chooses its implementation, and the tile sizes it runs with."""

import contextlib
import contextvars
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

TABLES = pathlib.Path(__file__).parent / "tables"
BACKENDS = ("cpu", "gpu", "tpu")  # implementations that carry a platform's name run on that platform alone
_tiles: contextvars.ContextVar[tuple[Mapping[tuple[str, str], dict[str, int]], dict]] = contextvars.ContextVar("tiles", default=({}, {}))
_interpreter: contextvars.ContextVar[Any] = contextvars.ContextVar("interpreter", default=False)


def choose(operation: str, implementations: Mapping[str, Callable[..., Any]], name: str | None,
           preferred: Mapping[str, str] | None = None) -> Callable[..., Any]:
    """The implementation called `name`; None or "auto" takes `preferred[platform]` where there is one, else "reference".

    A name that does not exist, or belongs to another platform than the trace is for, raises ValueError: a kernel that was asked
    for is never replaced silently. Inside `interpreted` the kernels of every platform run anywhere.
    """
    if name in (None, "auto"):
        name = (preferred or {}).get(platform(), "reference")
    if name not in implementations:
        raise ValueError(f"{operation} has no implementation '{name}'; it has {', '.join(implementations)}")
    if name in BACKENDS and name not in ("cpu", platform()) and not interpret():
        raise ValueError(f"{operation}: the implementation '{name}' does not run on {platform()}; leave the choice open, or take 'reference'")
    return implementations[name]


def device() -> tuple[str, str]:
    """(platform, device kind) that a trace is for: of the context's mesh, else of `jax.default_device`, else of the process.

    Nothing needs to be there: `jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=…))` names a device to compile for.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.platform, described.device_kind
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        default = jax.devices(default)[0]
    return default.platform, default.device_kind


def platform() -> str:
    """The platform that a trace is for: cpu, gpu or tpu."""
    return device()[0]


@contextlib.contextmanager
def interpreted(**parameters: Any) -> Iterator[None]:
    """Traces begun inside run the TPU and GPU kernels in Pallas's interpreter, for tests on a CPU.

    Without parameters that is the fast interpreter; `pltpu.InterpretParams(**parameters)` simulates a TPU's memories and DMAs, for example
    detect_races=True. A function that was jitted outside keeps what it was traced with.
    """
    from jax.experimental.pallas import tpu as pltpu  # here, as it takes a moment to import
    token = _interpreter.set(pltpu.InterpretParams(**parameters) if parameters else True)
    try:
        yield
    finally:
        _interpreter.reset(token)


def interpret() -> Any:
    """What a kernel gives to `pallas_call(interpret=…)`."""
    return _interpreter.get()


def tiles(operation: str, shape: str, default: dict[str, int]) -> dict[str, int]:
    """Tile sizes of an operation at a shape ("D2048 F1024 E64"): measured ones from tables/<device kind>.json, else `default`, which is logged."""
    given, asked = _tiles.get()
    asked[operation, shape] = default
    found = given.get((operation, shape)) or _table(table_path(device()[1])).get(operation, {}).get(shape)
    if not found:
        logging.getLogger(__name__).debug("%s at %s: no measured tile sizes for %s, taking %s", operation, shape, device()[1], default)
    return default | (found or {})


@contextlib.contextmanager
def tiles_from(given: Mapping[tuple[str, str], dict[str, int]], asked: dict[tuple[str, str], dict[str, int]]) -> Iterator[None]:
    """Traces begun inside take their tile sizes from `given` first, by (operation, shape), and note in `asked` what they asked for."""
    token = _tiles.set((given, asked))
    try:
        yield
    finally:
        _tiles.reset(token)


def table_path(device_kind: str) -> pathlib.Path:
    """The file of a device's measured tile sizes."""
    return TABLES / f"{device_kind.lower().replace(' ', '_')}.json"


@functools.cache
def _table(path: pathlib.Path) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(path.read_text()) if path.exists() else {}


def forget_tables() -> None:
    """Read tables from their files again."""
    _table.cache_clear()
