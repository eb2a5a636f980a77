"""Devices, meshes and shardings: the only place that builds a mesh or names a mesh axis.

Arrays carry logical axis names ("batch", "embed", "heads", …); `RULES` says along which mesh axes each is split: those that no earlier
dimension took. A dimension that these do not divide stays whole, and leaves them to a later one. A mesh of one device is the unsharded case.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llada_jax import config as config_lib
from pallas_kernels import dispatch

Names = tuple[str | None, ...]  # logical names of an array's dimensions
AXES = ("data", "fsdp", "expert", "tensor")
# XLA:CPU fuses reductions into YNNPACK calls that made the gradient of attention 4 to 6 times slower (jax 0.10.2, two cores, one device each)
NO_YNN = "--xla_cpu_experimental_ynn_fusion_type="
PIECE = 2**26  # bytes; of larger arrays XLA:TPU makes an all-reduce where a reduce-scatter is asked for (libtpu 0.0.42)
FSDP_AXIS, EXPERT_AXIS, TENSOR_AXIS = "fsdp", "expert", "tensor"
BATCH_AXES = ("data", FSDP_AXIS, EXPERT_AXIS)  # the global batch is split over all three
RULES = {
    "batch": BATCH_AXES,
    "positions": BATCH_AXES,  # of rows too few to be split
    "alone": AXES,  # positions, where each is computed by itself
    "embed": (FSDP_AXIS,),
    "experts": (EXPERT_AXIS,),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def setup_devices(batch_size: int | None = None, most: int | None = None, mesh: config_lib.Mesh = config_lib.Mesh(),
                  processes: int = 1) -> None:
    """Make one CPU device a core, or as many as a `mesh` without -1 asks for; call it before anything starts the JAX backend.

    The count is the largest divisor of `batch_size` not above the cores, nor above `most`. It is left alone when XLA_FLAGS or
    JAX_NUM_CPU_DEVICES names one, since the option would silently override them. Each of several `processes` makes its share; raises
    ConfigError where they do not divide the mesh. Also turns off XLA:CPU's YNNPACK fusions, unless XLA_FLAGS says what it wants of
    them. Without effect on GPU and TPU.
    """
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if "ynn_fusion" not in xla_flags:
        os.environ["XLA_FLAGS"] = f"{xla_flags} {NO_YNN}".strip()
    if _named_count() is not None:
        return
    limit = max(1, min(cores(), most or cores()))
    count = limit if batch_size is None else max(n for n in range(1, limit + 1) if batch_size % (n * processes) == 0 or n == 1)
    sizes = dataclasses.astuple(mesh)
    if -1 not in sizes:
        count, rest = divmod(math.prod(sizes), processes)
        if rest:
            raise config_lib.ConfigError(f"a mesh of {math.prod(sizes)} devices is not divisible by {processes} processes; set one mesh axis to -1")
    jax.config.update("jax_num_cpu_devices", count)


def _named_count() -> str | None:
    """The variable that names the number of CPU devices, if one does."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return "XLA_FLAGS=--xla_force_host_platform_device_count"
    return "JAX_NUM_CPU_DEVICES" if "JAX_NUM_CPU_DEVICES" in os.environ else None


def compiler_options(weights: Any) -> dict[str, str]:
    """Options for programs that run a whole model with these weights (arrays or shapes).

    XLA:CPU computes in float32 and would hoist float32 copies of all stacked bf16 weights out of the loop over layers: 30 GB
    for LLaDA-MoE-7B. Without that pass they are converted where they are used.
    """
    narrow = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(weights))
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if narrow and dispatch.platform() == "cpu" else {}


def resolved(config: config_lib.Mesh, devices: int, cpus: bool = False) -> config_lib.Mesh:
    """The mesh with an axis of -1 set to what is left of so many devices (`cpus`: of this machine, which can be made more). Raises ConfigError
    when the product is not their number."""
    sizes = dataclasses.asdict(config)
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: max(devices // known, 1) if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise config_lib.ConfigError(f"mesh {' · '.join(f'{axis}={size}' for axis, size in sizes.items())} needs {math.prod(sizes.values())} "
                                     f"devices, there are {devices}; {_way_out(dataclasses.asdict(config), devices, cpus)}")
    return config_lib.Mesh(**sizes)


def _way_out(sizes: dict[str, int], devices: int, cpus: bool) -> str:
    """What to do where these sizes, as they were given, do not make so many devices."""
    free = next((axis for axis, size in sizes.items() if size == -1), None)
    known = math.prod(size for size in sizes.values() if size != -1)
    others = {axis: known // size for axis, size in sizes.items() if size > 1}  # what the rest needs when this axis is set free
    fitting = next((axis for axis, rest in others.items() if free is None and devices % rest == 0), None)
    words = f"set mesh.{fitting} to -1" if fitting else f"choose sizes that divide {devices}"
    if not cpus:
        return words
    if (named := _named_count()) is not None:
        return f"{words}, or ask for {known} CPU devices in {named}"
    return f"{words}, or, as CPU devices can be made: --config.mesh.{free}=1 makes {known}" if free else words


def make_mesh(config: config_lib.Mesh = config_lib.Mesh(), devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of `data · fsdp · expert · tensor` devices; see `resolved`."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(resolved(config, len(devices), devices[0].platform == "cpu"))
    grid = np.array(devices).reshape([sizes[axis] for axis in AXES])
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def described_mesh(config: config_lib.Mesh) -> jax.sharding.AbstractMesh:
    """The same without devices, for shardings alone; no axis may be -1."""
    sizes = dataclasses.asdict(config)
    return jax.sharding.AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of parts that the global batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_share(mesh: jax.sharding.Mesh, process: int | None = None) -> tuple[int, int]:
    """(part, parts): which part of the global batch this process provides, of how many. Processes whose devices hold the same rows,
    as where the tensor axis crosses them, provide the same part.

    Raises ConfigError where the rows of two processes overlap without being the same.
    """
    held: dict[int, set[int]] = {}
    axes = tuple(mesh.shape[axis] for axis in BATCH_AXES)
    for place, device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(int(np.ravel_multi_index(place[:len(axes)], axes)))
    parts = sorted({tuple(sorted(shards)) for shards in held.values()})
    if len({len(shards) for shards in parts}) > 1 or sum(map(len, parts)) != batch_shards(mesh):
        each = mesh.size // len(held)
        raise config_lib.ConfigError(f"data·fsdp·expert = {batch_shards(mesh)} parts of the batch do not fall evenly on {len(held)} processes of "
                                     f"{each} devices; choose a mesh.tensor that divides {each} or is a multiple of it")
    return parts.index(tuple(sorted(held[jax.process_index() if process is None else process]))), len(parts)


def on_any_process(flag: bool) -> jax.Array:
    """Whether `flag` is set on any process: a scalar, the same on all, that need not be fetched at once. All processes ask it at the same place."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    flags = np.full(jax.local_device_count(), flag, np.int32)
    return _greatest(replicated(mesh))(jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("all")), flags))


@functools.cache
def _greatest(out: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=out)


def check_batch(batch_size: int, accumulate: int, mesh: jax.sharding.Mesh) -> None:
    """Raise ConfigError unless every micro-batch splits evenly over the mesh."""
    unit = batch_shards(mesh) * accumulate
    if batch_size % unit:
        names = "data·fsdp·expert" + ("·accumulate" if accumulate > 1 else "")
        raise config_lib.ConfigError(f"global batch {batch_size} is not divisible by {names} = {unit}; use {-(-batch_size // unit) * unit}")


def sharding(mesh: jax.sharding.Mesh, *names: str | None, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """Sharding of an array whose dimensions carry these logical names (None or an unknown name: not split)."""
    parts: list[Any] = []
    taken: set[str] = set()
    for i, name in enumerate(names):
        axes = tuple(axis for axis in RULES.get(name or "", ()) if mesh.shape[axis] > 1 and axis not in taken)
        size = math.prod(mesh.shape[axis] for axis in axes)
        divides = shape is None or shape[i] % size == 0
        parts.append((axes if len(axes) > 1 else axes[0]) if axes and divides else None)
        taken |= set(axes) if divides else set()
    return NamedSharding(mesh, PartitionSpec(*parts))


def shardings_of(mesh: jax.sharding.Mesh, names: Any, shapes: Any) -> Any:
    """Shardings of a tree of arrays (or shapes), given the tree of their logical axis names (tuples or PartitionSpecs)."""
    return jax.tree.map(lambda axes, x: sharding(mesh, *axes, shape=x.shape), names, shapes, is_leaf=_is_names)


def split_over_copies(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding with its first whole dimension that divides split over the data axis too: each copy of the model keeps
    and updates its own share of the moments (ZeRO stage 1, arXiv 1910.02054)."""
    copies = sharding.mesh.shape["data"]
    parts = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    for i, size in enumerate(shape):
        if copies > 1 and parts[i] is None and size % copies == 0:
            parts[i] = "data"
            break
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, mesh: jax.sharding.Mesh | None, *names: str | None) -> jax.Array:
    """Pin an intermediate to the sharding of its logical names; the identity without a mesh or on one device."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, *names, shape=x.shape))


class Weight(NamedTuple):
    """Names of a weight that enters `over_shards` as it is stored: `function` gets its own part of the `kept` dimensions and all of the others.

    These are gathered at the start of every shard's program, so that their gradient is scattered as it is summed; that of a weight which
    enters whole is summed whole, on every device.
    """

    names: Names
    kept: Names = ()


def over_shards(function: Callable[..., Any], mesh: jax.sharding.Mesh | None, in_names: tuple[Any, ...], out_names: Any) -> Callable[..., Any]:
    """Run `function` on every shard by itself (shard_map), so that its loops and kernels see local arrays only.

    `in_names` holds the logical names of each argument's leading dimensions, a `Weight`, or a NamedTuple of such names; `out_names` those of
    all results, or a list, of each. Dimensions without a name are whole. A name is split where it divides that dimension of every argument
    that carries it, and else nowhere. What is whole on several devices is computed on each of them, and gradients of whole arguments are summed.
    """
    if mesh is None or mesh.size == 1:
        return function

    stored = tuple(entry.names if isinstance(entry, Weight) else entry for entry in in_names)

    def run(*args: Any) -> Any:
        sizes: dict[str | None, set[int]] = {}

        def note(names: Names, part: Any) -> None:
            for leaf in jax.tree.leaves(part):
                for name, size in zip(names, leaf.shape, strict=False):
                    sizes.setdefault(name, set()).add(size)

        jax.tree.map(note, stored, args, is_leaf=_is_names)
        common = {name: math.gcd(*found) for name, found in sizes.items()}  # what divides it divides all
        spec = lambda names: sharding(mesh, *names, shape=tuple(common.get(name, 1) for name in names)).spec
        in_specs = tuple(jax.tree.map(spec, entry, is_leaf=_is_names) for entry in stored)
        out_specs = tuple(map(spec, out_names)) if isinstance(out_names, list) else spec(out_names)

        def local(*args: Any) -> Any:
            return function(*(_gathered(x, entry, axes) if isinstance(entry, Weight) else x
                              for x, entry, axes in zip(args, in_names, in_specs, strict=True)))

        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    return run


def _gathered(x: jax.Array, weight: Weight, axes: PartitionSpec) -> jax.Array:
    for i, (name, split) in enumerate(zip(weight.names, axes, strict=True)):
        if split is not None and name not in weight.kept:
            x = _gather(x, split, i)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, axes: str | tuple[str, ...], dim: int) -> jax.Array:
    """All parts of a dimension. The gradient is scattered as it is summed, in its own dtype, piece by piece."""
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True)


def _scatter(axes: str | tuple[str, ...], dim: int, _: None, dx: jax.Array) -> tuple[jax.Array]:
    other = max((i for i in range(dx.ndim) if i != dim), key=lambda i: dx.shape[i])
    size = dx.shape[other]
    pieces = next((n for n in range(1, size) if size % n == 0 and dx.nbytes <= n * PIECE), size)
    scatter = lambda part: jax.lax.psum_scatter(part, axes, scatter_dimension=dim, tiled=True)
    return (jnp.concatenate([scatter(part) for part in jnp.split(dx, pieces, other)], other),)


_gather.defvjp(lambda x, axes, dim: (_gather(x, axes, dim), None), _scatter)


def together(move: Callable[[jax.Array], jax.Array], *arrays: jax.Array) -> list[jax.Array]:
    """Apply a collective to arrays that are equal but for their last dimension; those of one dtype travel as one, side by side.

    A collective costs a fixed time, on CPUs about 0.1 ms.
    """
    moved: list[Any] = [None] * len(arrays)
    for dtype in {a.dtype: None for a in arrays}:
        members = [i for i, a in enumerate(arrays) if a.dtype == dtype]
        ends = np.cumsum([arrays[i].shape[-1] for i in members])
        joined = move(jnp.concatenate([arrays[i] for i in members], -1))
        for i, part in zip(members, jnp.split(joined, ends[:-1].tolist(), -1), strict=True):
            moved[i] = part
    return moved


def all_gather(axes: str | tuple[str, ...], *arrays: jax.Array, axis: int = 0) -> list[jax.Array]:
    """Inside `over_shards`: the parts of every device of these mesh axes, put together along a dimension."""
    return together(lambda a: jax.lax.all_gather(a, axes, axis=axis, tiled=True), *arrays)


def _is_names(x: Any) -> bool:
    """A tuple of logical names or a PartitionSpec, not a NamedTuple of them."""
    return isinstance(x, PartitionSpec) or (isinstance(x, tuple) and not hasattr(x, "_fields") and not any(isinstance(name, tuple) for name in x))


def put_batch(mesh: jax.sharding.Mesh, batch: Any, leading: int = 0, parts: int = 1) -> Any:
    """Host arrays, whose dimension number `leading` is one of `parts` of the batch (`batch_share`), to global device arrays.

    A batch that the devices do not divide is put on each of them whole.
    """
    def put(x: np.ndarray) -> jax.Array:
        shape = (*x.shape[:leading], x.shape[leading] * parts, *x.shape[leading + 1:])
        return jax.make_array_from_process_local_data(sharding(mesh, *(None,) * leading, "batch", shape=shape), x, shape)
    return jax.tree.map(put, batch)
