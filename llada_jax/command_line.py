"""What the entry points share: flag parsing and errors as one clear line."""

import os
import re
import sys
import warnings
from collections.abc import Callable

import jax
from absl import app, flags
from etils import epath

from llada_jax import config as config_lib
from llada_jax.sampling import presets

ALL = "all"


class Number(flags.ArgumentParser):
    """Of a flag that stands alone (ALL) or as --name=N."""

    def parse(self, argument: str) -> str | None:
        if argument != "true" and not str(argument).isdecimal():
            raise ValueError(f"{argument!r} is not a number from 0 on")
        return ALL if argument == "true" else argument


def run(main: Callable[[], int | None]) -> None:
    """Parse absl flags, run `main` and exit. What a user can mend becomes `error: …` on stderr and exit status 1.

    That is ConfigError, and OSError for what only shows while running: a full disk, a folder that may not be written.
    """
    app.define_help_flags()
    try:
        rest = flags.FLAGS(sys.argv)
        if len(rest) > 1:
            raise config_lib.ConfigError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    except SystemExit:  # --help and its kin were printed; absl would call that a failure
        sys.exit(0)
    except (flags.Error, config_lib.ConfigError, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        fail(error)
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # who read what is printed, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (config_lib.ConfigError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(status or 0)


def run_commands(commands: dict[str, Callable[[], int | None]]) -> None:
    """Take a command out of the command line, as in `python -m llada_jax.convert import --flag=…`, then `run` it."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    if name is not None and name not in commands:
        fail(config_lib.ConfigError(f"unknown command '{name}'{config_lib.nearest(name, commands)}"))

    def no_command():
        program = os.path.splitext(os.path.basename(sys.argv[0]))[0]
        raise config_lib.ConfigError(f"name a command: python -m llada_jax.{program} {{{','.join(commands)}}} (--help explains)")
    run(commands[name] if name else no_command)


def run_with_decoder(main: Callable[[presets.Flags], int | None]) -> None:
    """Take `--decoder=NAME`, `--decoder.field=value` and the same of `--cache` out of the command line for `main(flags)`, then `run` it."""
    try:
        chosen, sys.argv[:] = presets.split_flags(sys.argv)
    except config_lib.ConfigError as error:
        fail(error)
    run(lambda: main(chosen))


def write_file(path: str, text: str) -> None:
    """Write a file that a flag names, local or gs://, and make its folder."""
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def fail(error: BaseException) -> None:
    """Print `error: …` on one line and exit with status 1."""
    print(f"error: {_plain(error) or type(error).__name__}", file=sys.stderr, flush=True)
    sys.exit(1)


def _plain(error: BaseException) -> str:
    """The message on one line. ml_collections quotes keys twice and puts a config file's whole traceback into its message."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].removeprefix(f"{config_lib.ConfigError.__module__}.ConfigError: ")
    text = " ".join(text.replace("Configuration is not available because of an earlier failure to load:", "").split())
    missing = re.search(r"Failed loading config file .*No such file or directory: ('.+')", text)
    if missing:
        return f"no config file {missing[1]}; --list_configs lists those that there are"
    unknown = re.match(r"\W*(\w+)\W+Did you mean \"(\w+)\"", text.replace("\\n", " "))
    return f"unknown config key '{unknown[1]}'; did you mean '{unknown[2]}'?" if unknown else text


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in $LLADA_CACHE or ~/.cache/llada_jax; JAX_COMPILATION_CACHE_DIR wins."""
    if not jax.config.jax_compilation_cache_dir:
        folder = os.environ.get("LLADA_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "llada_jax")
        jax.config.update("jax_compilation_cache_dir", folder)
    # on a full disk the run itself will say so
    warnings.filterwarnings("ignore", message="Error writing persistent compilation cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
