"""Settings of every test: eight CPU devices, and one compilation cache for all workers and runs."""

import os

# Before anything imports jax. A name given from outside wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()


def pytest_configure(config):
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and config.cache is not None:
        # A reader that meets a half-written entry warns and compiles, so workers can share the folder.
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
