"""Compile the training step of the 7B model for a TPU slice that is not there, a row a device; a program, as libtpu wants its own process.

    python -m tests.compiled_step TOPOLOGY OUT [--layers=N] [--KERNEL=IMPLEMENTATION …]

writes what XLA made of it, as text, to OUT and prints one line of json: seconds, and bytes a device of arguments, temporaries and the peak.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from configs import llada_moe
from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.model import transformer
from llada_jax.training import optimizer, state, step
from pallas_kernels.grouped_matmul import api as grouped_matmul


def settings(layers: int, batch_size: int, kernels: dict[str, str]) -> config_lib.Config:
    """The preset's own settings, but for what is named here."""
    config = llada_moe.get_config("variant=7b_a1b")
    config.model.num_layers, config.train.batch_size = layers, batch_size
    config.kernels.update(kernels)
    return config_lib.from_config_dict(config)


def lowered(config: config_lib.Config, devices: list[jax.Device]) -> jax.stages.Lowered:
    """The call that `llada_jax.train` compiles, of descriptions of arrays on descriptions of devices."""
    mesh = partitioning.make_mesh(config.mesh, devices)
    partitioning.check_batch(config.train.batch_size, config.train.accumulate, mesh)
    model = transformer.build(config.model, config.kernels, mesh)
    update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
    like = jax.eval_shape(lambda: state.create(model, update, config))
    shardings = state.shardings(model, like, mesh)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    K, B, T = config.train.steps_per_call, config.train.batch_size, config.data.sequence_length
    types = {"tokens": jnp.int32, "segment": jnp.int32, "position": jnp.int32, "maskable": bool}
    batches = {key: jax.ShapeDtypeStruct((K, B, T), dtype) for key, dtype in types.items()} | {"index": jax.ShapeDtypeStruct((K, B), jnp.int32)}
    batches = jax.tree.map(lambda x: place(x, partitioning.sharding(mesh, None, "batch")), batches)
    call = step.make_call(step.make_step(model, update, config, mask_id=config.model.vocab_size - 1), shardings)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioning.replicated(mesh))
    return call.trace(jax.tree.map(place, like, shardings), batches, count).lower(lowering_platforms=("tpu",))


def dense_swiglu(x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """What a mixture must not do: right, but E times the work and the memory."""
    ends_E = jnp.cumsum(group_sizes_E)[:, None, None]
    row_R1 = jnp.arange(len(x_RD))[:, None]
    own_ER1 = (row_R1 < ends_E) & (row_R1 >= ends_E - group_sizes_E[:, None, None])
    h_ERF = jax.nn.silu(jnp.einsum("RD,EDF->ERF", x_RD, gate_EDF)) * jnp.einsum("RD,EDF->ERF", x_RD, up_EDF)
    return jnp.einsum("ERF,EFD->RD", jnp.where(own_ER1, h_ERF, 0), down_EFD)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("topology")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dense_experts", action="store_true", help="for the test of the test: every expert computes every row")
    for field in dataclasses.fields(config_lib.Kernels):
        parser.add_argument(f"--{field.name}", default="auto")
    arguments = parser.parse_args()
    if arguments.dense_experts:
        grouped_matmul.SWIGLUS["tpu"] = dense_swiglu
    devices = list(topologies.get_topology_desc(topology_name=arguments.topology, platform="tpu").devices)
    kernels = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(config_lib.Kernels)}
    started = time.perf_counter()
    compiled = lowered(settings(arguments.layers, len(devices), kernels), devices).compile()
    arguments.out.write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    print(json.dumps({"seconds": time.perf_counter() - started, "arguments": memory.argument_size_in_bytes,
                      "temporaries": memory.temp_size_in_bytes, "peak": memory.peak_memory_in_bytes}))


if __name__ == "__main__":
    main()
