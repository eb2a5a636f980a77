"""Settings of every test: eight CPU devices, one compilation cache for all workers and runs, and the compiler for TPUs.

On a machine with a GPU its kernels can be tested as they run there, not in the interpreter (planted faults leave the arrays' memory):

    JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest python -m pytest --accelerator \
        -k "gpu and not (planted or wrong or devices or shard_map)" tests/test_{attention,grouped,linear,routing}*.py
"""

import contextlib
import gc
import importlib.util
import os
import pathlib
import platform
import sys

import pytest

# Before anything imports jax. A name given from outside wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs of tests run for milliseconds and took most of the time to compile: without LLVM's optimiser and with the older emitters, a training step
# compiles in a fifth of the time. What tests start as processes of their own compiles as it does for users.
XLA_FLAGS = {"xla_force_host_platform_device_count": "8", "xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": "false"}
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{name}={value}" for name, value in XLA_FLAGS.items() if name not in given)]).strip()
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu is used as a compiler: it asks no server which machine this is
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"  # in several processes at once
LIBTPU = pathlib.Path(sys.prefix, "libtpu", "libtpu", "libtpu.so")  # where launch/setup.sh puts it, away from Python's path
if LIBTPU.exists():
    os.environ.setdefault("TPU_LIBRARY_PATH", str(LIBTPU))


def pytest_runtest_setup(item):
    """A proof that was skipped is none: with CI set, what is marked libtpu fails without it, wherever it can be installed."""
    if item.get_closest_marker("libtpu") and "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        installable = (platform.system(), platform.machine()) == ("Linux", "x86_64")
        refuse = pytest.fail if os.environ.get("CI") and installable else pytest.skip
        refuse("libtpu, which compiles for TPUs, is not installed; bash launch/test.sh does it")


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Every program that XLA compiles maps memory, and Linux ends a process of more than 65,530 mappings: those of earlier files are let go."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 12_000:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_addoption(parser):
    parser.addoption("--accelerator", action="store_true", help="compile the kernels for this machine's accelerator instead of interpreting them")


def pytest_configure(config):
    import jax

    if config.getoption("--accelerator"):
        from pallas_kernels import dispatch

        dispatch.interpreted = contextlib.nullcontext
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and config.cache is not None:
        # A reader that meets a half-written entry warns and compiles, so workers can share the folder.
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
