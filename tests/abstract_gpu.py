"""A GPU to lower for that is not there."""

import jax
from jax._src.mesh import AbstractDevice
from jax.sharding import AbstractMesh


def h100():
    """Context manager: traces begun inside are for an H100."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
