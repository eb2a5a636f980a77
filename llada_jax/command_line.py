"""What the entry points share: flag parsing and errors as one clear line."""

import os
import sys
from collections.abc import Callable

import jax
from absl import flags

from llada_jax import config as config_lib


def run(main: Callable[[], int | None]) -> None:
    """Parse absl flags, run `main` and exit. What a user can mend becomes `error: …` on stderr and exit status 1."""
    try:
        rest = flags.FLAGS(sys.argv)
        if len(rest) > 1:
            raise config_lib.ConfigError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    except (flags.Error, config_lib.ConfigError, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        fail(error)
    try:
        status = main()
    except config_lib.ConfigError as error:
        fail(error)
    sys.exit(status or 0)


def fail(error: BaseException) -> None:
    """Print `error: …` on one line and exit with status 1."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    print(f"error: {text or type(error).__name__}", file=sys.stderr, flush=True)
    sys.exit(1)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in $LLADA_CACHE or ~/.cache/llada_jax; JAX_COMPILATION_CACHE_DIR wins."""
    if not jax.config.jax_compilation_cache_dir:
        folder = os.environ.get("LLADA_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "llada_jax")
        jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
