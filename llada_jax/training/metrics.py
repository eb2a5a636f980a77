"""Where numbers go: writers behind one two-method seam, the progress line, and the device's peak."""

import json
import math
import time
import zlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llada_jax import config as config_lib
from llada_jax.evaluation import hardware


class Writer(Protocol):
    """One sink of metrics."""

    def write(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """`metrics.jsonl`: one object a line, each with `step`. `start` drops what stands beyond the step resumed from."""

    def __init__(self, workdir: str, start: int):
        self.path = epath.Path(workdir) / "metrics.jsonl"
        kept = [line for line in read_jsonl(self.path) if line["step"] <= start] if start else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.path, text)
        self._local = None if "://" in str(self.path) else open(self.path, "a", encoding="utf-8")  # object stores cannot append
        self._text = text

    def write(self, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"step": step, **values}) + "\n"
        if self._local:
            self._local.write(line)
            self._local.flush()
        else:
            self._text += line
            self.path.write_text(self._text)

    def close(self) -> None:
        if self._local:
            self._local.close()


class TensorBoardWriter:
    """TensorBoard events in `tensorboard/` (tensorboardX; no TensorFlow). Lists become one scalar an entry."""

    def __init__(self, workdir: str, start: int):
        import tensorboardX
        self._writer = tensorboardX.SummaryWriter(str(epath.Path(workdir) / "tensorboard"), purge_step=start + 1, filename_suffix=f".{start}")

    def write(self, step: int, values: dict[str, Any]) -> None:
        for key, value in _scalars(values).items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases; needs `pip install wandb`. A resumed run goes on in the same wandb run."""

    def __init__(self, project: str, workdir: str):
        import wandb
        name, place = epath.Path(workdir).name, str(epath.Path(workdir).resolve())
        self._run = wandb.init(project=project, name=name, dir=workdir, id=f"{name}-{zlib.crc32(place.encode()):08x}", resume="allow")

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(_scalars(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, list):
            flat |= _scalars({f"{key}/{i}": entry for i, entry in enumerate(value)})
        elif isinstance(value, (int, float)):
            flat[key] = value
    return flat


def read_jsonl(path: Any) -> list[dict[str, Any]]:
    """The lines of a metrics or results file; a last line that a kill cut short is dropped. [] when there is no file.

    Raises ConfigError for any other line that is no json object.
    """
    path, lines = epath.Path(path), []
    written = path.read_text().splitlines() if path.exists() else []
    for i, text in enumerate(written, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
            if i == len(written):
                break
        if not isinstance(line, dict):
            raise config_lib.ConfigError(f"{path}: line {i} of {len(written)} is no json object ({text[:40]!r}); mend it or take it out")
        lines.append(line)
    return lines


def write_whole(path: epath.Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one."""
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def clean(value: Any) -> Any:
    """Plain numbers and nested lists, six significant digits; None for what json cannot hold."""
    if value is None:
        return None
    if isinstance(value, list) or np.ndim(value):
        return [clean(entry) for entry in value]
    array = np.asarray(value)
    if array.dtype.kind in "iub":
        return int(array)
    number = float(array)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def summarize(metrics: dict[str, np.ndarray]) -> dict[str, Any]:
    """One step's raw sums as the fields of a metrics line.

    loss_by_level: nats a masked token by noise level (null where no token fell). load_by_layer and load_by_level: the
    busiest expert's share of the tokens over the mean share (1 = balanced), (L,) and (levels, L). overflow: share of tokens and layers
    for which split experts had too little room on some device (they take another way; none is dropped).
    """
    plain = ("loss", "total", "confidence", "balance", "z", "overflow", "grad_norm", "learning_rate", "skipped", "reward_margin", "reward_accuracy")
    line = {key: clean(metrics[key]) for key in plain if key in metrics}
    with np.errstate(invalid="ignore", divide="ignore"):
        line["loss_by_level"] = clean(metrics["nll_S"] / metrics["predicted_S"])
        if "load_SLE" in metrics:
            ratio = lambda load: load.max(-1) / load.mean(-1)
            line["load_by_layer"] = clean(ratio(metrics["load_SLE"].sum(0)))
            line["load_by_level"] = clean(ratio(metrics["load_SLE"]))
    return line


def device_peak() -> tuple[float, str]:
    """Peak FLOP/s of all devices together, and where the figure is from: a table, or on CPUs a GEMM that all processes time at once."""
    chip = hardware.chip_of(jax.devices()[0].device_kind)
    if chip:
        return chip.peak * jax.device_count(), "bf16 peak"
    n = 1024
    x = jnp.ones((n, n), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) * jax.process_count(), "f32 GEMM measured"


def say(text: str) -> None:
    """A line for the person who watches; the output of processes other than 0 goes to their logs (distributed.py)."""
    print(text, flush=True)


class Announce:
    """`with Announce("compiling the step"):` prints `compiling the step …` at once, and the seconds when it is done."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        print(f"{self.what} … ", end="", flush=True)

    def __exit__(self, *failure: Any) -> None:
        print("failed" if failure[0] else f"{time.perf_counter() - self._start:.0f} s", flush=True)


def duration(seconds: float) -> str:
    """90 → '1:30', 7300 → '2:01:40', 400000 → '4.6 days'."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:,.1f} days"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Profile:
    """A jax.profiler trace of process 0 in <workdir>/profile around the calls that hold the steps wanted[0] + 1 to wanted[1]."""

    def __init__(self, wanted: tuple[int, int] | None, workdir: str):
        wanted = None if jax.process_index() else wanted
        self._wanted, self._folder, self._on = wanted, str(epath.Path(workdir) / "profile"), False

    def before(self, begin: int, running: Any) -> None:
        """Called before the call that starts after `begin` steps; `running` is what the device still computes."""
        inside = self._wanted is not None and self._wanted[0] <= begin < self._wanted[1]
        if inside and not self._on:
            jax.block_until_ready(running)
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif not inside:
            self.stop(running)

    def stop(self, running: Any) -> None:
        """Write the trace, if one is on, once the device is done with `running`."""
        if self._on:
            jax.block_until_ready(running)
            jax.profiler.stop_trace()
            self._on = False
            say(f"profile written to {self._folder}")


def check_writers(wandb: str) -> None:
    """Raise ConfigError for a writer whose package is not installed."""
    if wandb:
        try:
            import wandb as _  # noqa: F401
        except ImportError as error:
            raise config_lib.ConfigError(f"train.wandb={wandb!r} needs a package that is not here ({error}); run: pip install wandb") from error


class Writers:
    """All writers that the config asks for, on process 0; `start` is the step resumed from."""

    def __init__(self, workdir: str, start: int, tensorboard: bool, wandb: str):
        self._sinks: list[Writer] = []
        if jax.process_index() == 0:
            self._sinks.append(JsonlWriter(workdir, start))
            self._sinks += [TensorBoardWriter(workdir, start)] if tensorboard else []
            self._sinks += [WandbWriter(wandb, workdir)] if wandb else []

    def write(self, step: int, values: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
