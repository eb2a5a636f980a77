"""`curves.png`: what a run's metrics.jsonl shows, on one page."""

from typing import Any

import jax
import numpy as np
from etils import epath

from llada_jax.training import metrics

SMOOTHING = 0.9  # share of the past in the smoothed loss, a logged line


def draw(workdir: str) -> None:
    """Write <workdir>/curves.png: smoothed loss, held-out bound, loss by noise level, expert load by layer and by noise level,
    gradient norm and skipped steps. Process 0 only; without a metrics line there is nothing to draw."""
    if jax.process_index():
        return
    lines = metrics.read_jsonl(epath.Path(workdir) / "metrics.jsonl")
    train, held = [line for line in lines if "loss" in line], [line for line in lines if "heldout_bits_per_byte" in line]
    if not lines:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    _loss(axes[0, 0], train)
    _held_out(axes[0, 1], held)
    _by_level(axes[0, 2], train, held)
    _load(axes[1, 0], train, "load_by_layer", "expert load by layer", "layer")
    _load_by_level(axes[1, 1], train)
    _gradient(axes[1, 2], train)
    figure.suptitle(str(workdir), fontsize=9, color="gray")
    temporary = epath.Path(workdir) / "curves.tmp.png"
    with temporary.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    temporary.replace(epath.Path(workdir) / "curves.png")


def _series(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return (np.array([p[0] for p in points]), np.array([p[1] for p in points], float)) if points else (np.zeros(0), np.zeros(0))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential average with the start's bias removed."""
    out, average, weight = np.zeros_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        average, weight = SMOOTHING * average + (1 - SMOOTHING) * value, SMOOTHING * weight + (1 - SMOOTHING)
        out[i] = average / weight
    return out


def _title(axis: Any, title: str, x: str = "step", y: str = "") -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _loss(axis: Any, train: list[dict[str, Any]]) -> None:
    steps, loss = _series(train, "loss")
    axis.plot(steps, loss, color="#9ecae1", lw=0.7)
    axis.plot(steps, _smooth(loss), color="#08519c", lw=1.6)
    if len(loss) > 4:
        axis.set_ylim(np.percentile(loss, 0.5) * 0.95, np.percentile(loss, 98) * 1.05)
    _title(axis, "training loss (smoothed)", y="nats a token")


def _held_out(axis: Any, held: list[dict[str, Any]]) -> None:
    steps, bits = _series(held, "heldout_bits_per_byte")
    errors = _series(held, "heldout_bits_per_byte_se")[1]
    axis.errorbar(steps, bits, yerr=errors, color="#08519c", marker="o", ms=3, lw=1.4, capsize=2)
    if len(bits):
        axis.annotate(f"{bits[-1]:.3f}", (steps[-1], bits[-1]), textcoords="offset points", xytext=(-4, 8), fontsize=8, ha="right")
    _title(axis, "held-out bound ± standard error", y="bits a byte")


def _by_level(axis: Any, train: list[dict[str, Any]], held: list[dict[str, Any]]) -> None:
    from matplotlib import colormaps
    rows = [(line["step"], line["heldout_loss_by_level"]) for line in held if line.get("heldout_loss_by_level")]
    for i, (step, levels) in enumerate(rows):
        x = (np.arange(len(levels)) + 0.5) / len(levels)
        axis.plot(x, [np.nan if v is None else v for v in levels], color=colormaps["viridis"](i / max(len(rows) - 1, 1)), lw=1.3,
                  label=f"step {step}" if i in (0, len(rows) - 1) else None)
    if rows:
        axis.legend(fontsize=7, frameon=False)
    _title(axis, "held-out loss by noise level", "share of tokens masked", "nats a masked token")


def _load(axis: Any, train: list[dict[str, Any]], key: str, title: str, name: str) -> None:
    from matplotlib import colormaps
    lines = [line for line in train if line.get(key)]
    if lines:
        steps, table = np.array([line["step"] for line in lines]), np.array([line[key] for line in lines], float)
        for i in range(table.shape[1]):
            axis.plot(steps, _smooth(table[:, i]), color=colormaps["viridis"](i / max(table.shape[1] - 1, 1)), lw=1.2, label=f"{name} {i}")
        if table.shape[1] <= 8:
            axis.legend(fontsize=7, frameon=False)
        axis.axhline(1, color="gray", lw=0.6, ls=":")
    _title(axis, title, y="busiest expert / mean")


def _load_by_level(axis: Any, train: list[dict[str, Any]]) -> None:
    tables = [line["load_by_level"] for line in train if line.get("load_by_level")][-50:]
    if tables:
        array = np.array(tables, float)
        seen = np.isfinite(array)
        mean = np.where(seen.any(0), np.nansum(np.where(seen, array, 0), 0) / np.maximum(seen.sum(0), 1), np.nan)
        image = axis.imshow(mean.T, aspect="auto", origin="lower", extent=(0, 1, -0.5, mean.shape[1] - 0.5), cmap="magma")
        axis.figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    _title(axis, "expert load by noise level (last lines)", "share of tokens masked", "layer")
    axis.grid(False)


def _gradient(axis: Any, train: list[dict[str, Any]]) -> None:
    axis.plot(*_series(train, "grad_norm"), color="#08519c", lw=0.9)
    axis.set_yscale("log")
    _title(axis, "gradient norm; skipped steps (red)", y="norm before clipping")
    steps, skipped = _series(train, "skipped")
    if len(skipped) and skipped.max() > 0:
        other = axis.twinx()
        other.plot(steps, skipped, color="#cb181d", lw=1.2)
        other.tick_params(labelsize=8, colors="#cb181d")
