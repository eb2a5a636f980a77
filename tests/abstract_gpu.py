"""A GPU to trace and lower for, where there is none."""

import contextlib
from collections.abc import Iterator

import jax
from jax._src.mesh import AbstractDevice  # not public, while `AbstractMesh(abstract_device=…)` is
from jax.sharding import AbstractMesh


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """Traces begun inside are for an H100."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield
