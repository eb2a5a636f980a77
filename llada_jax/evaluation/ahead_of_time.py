"""The training and the sampling step as their entry points compile them, for devices that are not here: TPUs through libtpu, GPUs through
the CUDA plugin. No array is made."""

import contextlib
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from importlib import metadata, util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.config import ConfigError
from llada_jax.evaluation import hardware
from llada_jax.model import transformer
from llada_jax.sampling import engine
from llada_jax.sampling.cache import Cache
from llada_jax.sampling.canvas import Canvas
from llada_jax.sampling.decoder import Decoder
from llada_jax.training import optimizer, state, step

CUDA = "jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12"
GPU_LIMITS = {  # what XLA asks of a GPU (cudaDeviceProp): A100 (GA100 white paper, CUDA programming guide 8.0), H100 and H200 (GH100, 9.0)
    "a100": dict(shared_memory_per_core=167936, core_count=108, fpus_per_core=64, l2_cache_size=41943040, clock_rate_ghz=1.41,
                 shared_memory_per_block_optin=166912, capability=(8, 0), name="NVIDIA A100-SXM4-80GB"),
    "h100": dict(shared_memory_per_core=233472, core_count=132, fpus_per_core=128, l2_cache_size=52428800, clock_rate_ghz=1.98,
                 shared_memory_per_block_optin=232448, capability=(9, 0), name="NVIDIA H100 80GB HBM3"),
    "h200": dict(shared_memory_per_core=233472, core_count=132, fpus_per_core=128, l2_cache_size=62914560, clock_rate_ghz=1.98,
                 shared_memory_per_block_optin=232448, capability=(9, 0), name="NVIDIA H200"),
}  # fmt: skip


class Traced(NamedTuple):
    """A step, lowered for its devices, and what it is called with: descriptions of arrays with their shardings, by class."""

    lowered: jax.stages.Lowered
    arguments: dict[str, Any]
    mesh: jax.sharding.Mesh


def devices(topology: hardware.Topology) -> list[jax.Device]:
    """Descriptions of the devices of a topology. Raises ConfigError where the compiler for them is not installed, or knows no such slice."""
    if not topology.chip.tpu:
        return _gpus(topology)
    _find_libtpu()
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as JAX runs it
    if math.prod(topology.shape) < 4:
        options["chips_per_host_bounds"] = [1] * 3
    try:
        return list(topologies.get_topology_desc(topology_name=topology.layout, platform="tpu", **options).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
            raise ConfigError("libtpu, which compiles for TPUs, is not installed; run: pip install -c requirements.txt -e '.[tpu]', or name its "
                              "libtpu.so in TPU_LIBRARY_PATH") from error
        raise ConfigError(f"libtpu knows no {topology.layout}: {str(error).splitlines()[0]}") from error


def _find_libtpu() -> None:
    """Point to libtpu where launch/setup.sh puts it, away from Python's path; as a compiler it asks no server which machine this is, and
    may be loaded by several processes. What the environment says stays."""
    own = pathlib.Path(sys.prefix, "libtpu", "libtpu", "libtpu.so")
    if own.exists():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(own))
    quiet = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}  # else it looks for them, aloud
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true", **quiet}.items():
        os.environ.setdefault(name, value)


def _gpus(topology: hardware.Topology) -> list[jax.Device]:
    if util.find_spec("jax_plugins") is None or util.find_spec("jax_plugins.xla_cuda12") is None:
        raise ConfigError(f"the compiler for GPUs is not installed; run: pip install {CUDA}")
    limits, gib = GPU_LIMITS[topology.name], topology.chip.hbm
    fields = {key: value for key, value in limits.items() if key not in ("capability", "name")}
    fields |= dict(threads_per_block_limit=1024, threads_per_warp=32, shared_memory_per_block=49152, threads_per_core_limit=2048,
                   block_dim_limit_x=2**31 - 1, block_dim_limit_y=65535, block_dim_limit_z=65535, registers_per_core_limit=65536,
                   registers_per_block_limit=65536, memory_bandwidth=int(topology.chip.hbm_rate), device_memory_size=int(gib * hardware.GIB))
    major, minor = limits["capability"]
    described = " ".join(f"{key}: {value}" for key, value in fields.items())
    target = (f"gpu_device_info {{ {described} cuda_compute_capability {{ major: {major} minor: {minor} }} }} platform_name: \"CUDA\" "
              f"dnn_version_info {{ major: 9 minor: 8 }} device_description_str: \"{limits['name']}\"")
    inside = min(topology.shape[0], hardware.GPUS_A_HOST)
    grid = f"{topology.slices}x{topology.shape[0] // inside}x{inside}"
    return list(topologies.get_topology_desc(topology_name=topology.name, platform="cuda", topology=grid, target_config=target).devices)


def training_step(config: config_lib.Config, devices: list[jax.Device]) -> Traced:
    """The call that `llada_jax.train` compiles: `steps_per_call` steps with their batches."""
    mesh = partitioning.make_mesh(config.mesh, devices)
    partitioning.check_batch(config.train.batch_size, config.train.accumulate, mesh)
    model = transformer.build(config.model, config.kernels, mesh)
    update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
    like = jax.eval_shape(lambda: state.create(model, update, config))
    shardings = state.shardings(model, like, mesh)
    run = jax.tree.map(_place, like, shardings)
    K, B, T = config.train.steps_per_call, config.train.batch_size, config.data.sequence_length
    types = {"tokens": jnp.int32, "segment": jnp.int32, "position": jnp.int32, "maskable": jnp.bool_}
    batches = {key: jax.ShapeDtypeStruct((K, B, T), dtype) for key, dtype in types.items()} | {"index": jax.ShapeDtypeStruct((K, B), jnp.int32)}
    batches = jax.tree.map(lambda x: _place(x, partitioning.sharding(mesh, None, "batch", shape=x.shape)), batches)
    call = step.make_call(step.make_step(model, update, config, mask_id=config.model.vocab_size - 1), shardings)
    count, seed = (jax.ShapeDtypeStruct((), dtype, sharding=partitioning.replicated(mesh)) for dtype in (jnp.int32, jnp.uint32))
    with _for(devices):
        lowered = call.trace(run, batches, count, seed).lower(lowering_platforms=(_platform(devices),))
    classes = {"weights": run.variables, "moments": run.opt_state, "average": run.ema, "reference": run.reference, "batch": batches}
    return Traced(lowered, classes, mesh)


def sampling_step(config: config_lib.Config, decoder: Decoder, cache: Cache, devices: list[jax.Device]) -> Traced:
    """The decoder's loop as `llada_jax.sample` compiles it, for `train.batch_size` rows of `data.sequence_length` slots."""
    mesh = partitioning.make_mesh(config.mesh, devices)
    if config.train.batch_size >= partitioning.batch_shards(mesh):  # of fewer rows the positions are split
        partitioning.check_batch(config.train.batch_size, 1, mesh)
    model = transformer.build(config.model, config.kernels, mesh)
    weights = jax.tree.map(_place, model.shapes, partitioning.shardings_of(mesh, model.axes, model.shapes))
    B, T, V = config.train.batch_size, config.data.sequence_length, config.model.vocab_size
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype, sharding=partitioning.sharding(mesh, "batch", shape=(B,)))
    canvas = Canvas(tokens_BT=rows(jnp.int32, T), writable_BT=rows(jnp.bool_, T), valid_BT=rows(jnp.bool_, T),
                    positions_BT=rows(jnp.int32, T), block_BT=rows(jnp.int32, T))
    rules = engine.Rules(engine.Denoiser.of(model), decoder, cache, mask_id=V - 1, eos_id=V - 2, stop_at_eos=True, suppressed=(V - 1,), suffix=T)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with _for(devices):
        traced = engine.compiled(**partitioning.compiler_options(model.shapes)).trace(
            rules, weights, canvas, _place(key, partitioning.replicated(mesh)), rows(jnp.int32), rows(jnp.int32))
        lowered = traced.lower(lowering_platforms=(_platform(devices),))
    return Traced(lowered, {"weights": weights, "batch": canvas}, mesh)


def compile_lowered(traced: Traced) -> jax.stages.Compiled:
    """Compile; on GPUs without tuning, which would need one. A CUDA compiler that is installed as a package is found by its place."""
    if next(iter(traced.mesh.devices.flat)).platform == "tpu":
        return traced.lowered.compile()
    options: dict[str, Any] = {"xla_gpu_autotune_level": 0}
    packages = util.find_spec("nvidia")
    for place in (packages.submodule_search_locations or ()) if packages else ():
        if (folder := pathlib.Path(place) / "cuda_nvcc").exists():
            options["xla_gpu_cuda_data_dir"] = str(folder)
    return traced.lowered.compile(compiler_options=options)


def versions(devices: list[jax.Device]) -> dict[str, str]:
    """Of jax and of the compiler for these devices."""
    package = "libtpu" if devices[0].platform == "tpu" else "jax-cuda12-plugin"
    folders = [*sys.path, str(pathlib.Path(os.environ.get("TPU_LIBRARY_PATH", "")).parent.parent)]
    found = next(iter(metadata.distributions(name=package, path=folders)), None)
    return {"jax": jax.__version__, package: found.version if found else " ".join(devices[0].client.platform_version.split())}


def _place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _platform(devices: list[jax.Device]) -> str:
    return "tpu" if devices[0].platform == "tpu" else "cuda"


@contextlib.contextmanager
def _for(devices: list[jax.Device]) -> Iterator[None]:
    """Traces begun inside choose their kernels for these devices, outside of `shard_map` too."""
    with jax.default_device(devices[0]):
        yield
