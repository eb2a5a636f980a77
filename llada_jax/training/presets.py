"""The table behind `train --list_configs`."""

import importlib.util
import pathlib
import types

from llada_jax import config as config_lib
from llada_jax.model import count
from llada_jax.training import metrics

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
UTILIZATION = 0.35  # share of the device's peak that the time estimate assumes


def name_of(path: str) -> str:
    """'pystdlib' for 'configs/pystdlib.py'."""
    return pathlib.Path(path).stem


def module_of(path: str | pathlib.Path) -> types.ModuleType:
    """A config file as a module."""
    spec = importlib.util.spec_from_file_location(f"configs.{pathlib.Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise config_lib.ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_presets() -> list[tuple[str, config_lib.Config]]:
    """Every file under configs/ with every preset that it names in PRESETS, as ('pystdlib.py', config) or ('llada_moe.py:variant=…', config)."""
    found = []
    for path in sorted(FOLDER.rglob("*.py")):
        module = module_of(path)
        if hasattr(module, "get_config"):
            for preset in getattr(module, "PRESETS", [None]):
                name = str(path.relative_to(FOLDER)) + (f":{preset}" if preset else "")
                found.append((name, config_lib.from_config_dict(module.get_config(preset))))
    return found


def print_table() -> None:
    """Print each preset's parameters, state memory, tokens and the time its FLOPs take on this machine (an estimate)."""
    peak, source = metrics.device_peak()
    print(f"{'config':<36}{'parameters':>16}{'active':>16}{'state':>12}{'tokens':>18}{'time here':>16}")
    for name, config in all_presets():
        config = config_lib.with_vocab_size(config, config.model.vocab_size or config.data.vocab_size)
        size, tokens = count.parameters(config.model), config.train.steps * config.train.batch_size * config.data.sequence_length
        seconds = count.train_flops(config) * tokens / (peak * UTILIZATION)
        state = f"{count.state_bytes(config) / 2**30:.2f} GiB"
        print(f"{name:<36}{size.total:>16,}{size.active:>16,}{state:>12}{tokens:>18,}{metrics.duration(seconds):>16}")
    print("state: weights, gradients, moments, average and reference, without activations; "
          f"time: FLOPs at {UTILIZATION:.0%} of this machine's peak ({source}), an estimate")
