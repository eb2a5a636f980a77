"""Programs that compile for a TPU that is not here, each in a process of its own, as libtpu wants it."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PREAMBLE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
device = topologies.get_topology_desc(topology_name=sys.argv[1], platform="tpu").devices[0]
def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))
def compiled(f, *arrays):
    with jax.default_device(device):
        return jax.jit(f).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
def launches(program):
    return program.as_text().count('custom_call_target="tpu_custom_call"')
def temporary(program):
    return program.memory_analysis().temp_size_in_bytes
"""


def run(program: str, topology: str) -> list[str]:
    """The lines that `program` prints. It finds `struct`, `compiled`, `launches` and `temporary` (bytes) for a device of this topology."""
    done = subprocess.run([sys.executable, "-c", PREAMBLE + program, topology], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
