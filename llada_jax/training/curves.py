"""`curves.png`: what a run's metrics.jsonl shows, on one page."""

import functools
from typing import Any

import jax
import numpy as np
from etils import epath

from llada_jax.training import metrics

BLUE, PALE, RED = "#08519c", "#9ecae1", "#cb181d"
LAST = 50  # logged lines that a picture of the present averages over


def draw(workdir: str) -> None:
    """Write <workdir>/curves.png: smoothed loss, held-out bound, loss by noise level, expert load by layer, gradient norm with skipped
    steps, expert load by layer and noise level. Process 0 only; without a metrics line there is nothing to draw."""
    if jax.process_index():
        return
    lines = metrics.read_jsonl(epath.Path(workdir) / "metrics.jsonl")
    train, held = [line for line in lines if "loss" in line], [line for line in lines if "heldout_bits_per_byte" in line]
    if not lines:
        return
    page, axes = figure(3, 2)
    _loss(axes[0, 0], train)
    _held_out(axes[0, 1], held)
    _by_level(axes[0, 2], train, held)
    _load(axes[1, 0], train)
    _gradient(axes[1, 1], train)
    _load_by_level(axes[1, 2], train)
    page.suptitle(f"{workdir} · step {lines[-1]['step']:,}", fontsize=10, color="gray")
    save(page, epath.Path(workdir) / "curves.png")


def figure(columns: int, rows: int) -> tuple[Any, Any]:
    """An empty page and its axes (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(13 / 3 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(page)
    return page, page.subplots(rows, columns, squeeze=False)


def save(page: Any, path: epath.PathLike) -> None:
    """Write a page as png, so that a kill leaves the old one or the new one."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.stem}.tmp.png"
    with temporary.open("wb") as file:
        page.savefig(file, format="png", dpi=110)
    temporary.replace(path)


def band(axis: Any, runs: list[list[dict[str, Any]]], key: str, color: Any, name: str, smooth: bool = False) -> None:
    """Mean of a metric over runs at the steps that all of them have, and the span between the lowest and the highest."""
    series = [_series(lines, key) for lines in runs]
    steps = functools.reduce(np.intersect1d, [own for own, _ in series])
    if not len(steps):
        return
    table = np.stack([values[np.isin(own, steps)] for own, values in series])
    table = np.stack([_smooth(values) for values in table]) if smooth else table
    axis.plot(steps, table.mean(0), color=color, lw=1.4, label=name, marker="" if smooth else ".")
    axis.fill_between(steps, table.min(0), table.max(0), color=color, alpha=0.2, lw=0)


def _series(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return (np.array([p[0] for p in points]), np.array([p[1] for p in points], float)) if points else (np.zeros(0), np.zeros(0))


def _table(rows: list[Any]) -> np.ndarray:
    """Nested lists with null to one float array with nan."""
    return np.array(rows, float)


def _mean(rows: list[Any]) -> np.ndarray:
    """Mean over rows of what is not null; nan where all are."""
    table = _table(rows)
    seen = np.isfinite(table)
    return np.where(seen.any(0), np.where(seen, table, 0).sum(0) / np.maximum(seen.sum(0), 1), np.nan)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential average over a twentieth of the values, at most ten, with the start's bias removed; nan changes nothing."""
    keep = 1 - 1 / np.clip(len(values) / 20, 1, 10)
    out, average, weight = np.full_like(values, np.nan), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        out[i] = average / weight if weight else np.nan
    return out


def colors(count: int) -> list[Any]:
    """So many that can be told apart, also in print."""
    from matplotlib import colormaps
    return [colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]


def label(axis: Any, title: str, x: str = "step", y: str = "") -> None:
    """Title and names of the axes."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8, which="both")
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _legend(axis: Any) -> None:
    axis.legend(fontsize=7, frameon=False)


def _nothing(axis: Any, why: str) -> None:
    axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", va="center", fontsize=9, color="gray")


def _loss(axis: Any, train: list[dict[str, Any]]) -> None:
    steps, loss = _series(train, "loss")
    if len(loss):
        smooth = _smooth(loss)
        axis.plot(steps, loss, color=PALE, lw=0.7, label="one step")
        axis.plot(steps, smooth, color=BLUE, lw=1.6, label=f"smoothed: {smooth[-1]:.3f}")
        axis.set_ylim(min(np.percentile(loss, 0.5), smooth.min()) * 0.95, max(np.percentile(loss, 98), smooth.max()) * 1.05)
        _legend(axis)
    else:
        _nothing(axis, "no training step yet")
    label(axis, "training loss", y="nats a pair" if train and "reward_margin" in train[-1] else "nats a token")


def _held_out(axis: Any, held: list[dict[str, Any]]) -> None:
    steps, bits = _series(held, "heldout_bits_per_byte")
    if len(bits):
        errors = [line.get("heldout_bits_per_byte_se") or 0 for line in held if line["heldout_bits_per_byte"] is not None]
        axis.errorbar(steps, bits, yerr=errors, color=BLUE, marker="o", ms=3, lw=1.4, capsize=2)
        axis.annotate(f"{bits[-1]:.3f}", (steps[-1], bits[-1] + errors[-1]), textcoords="offset points", xytext=(0, 5), fontsize=9, ha="right")
    else:
        _nothing(axis, "no held-out evaluation")
    exact = held and not any(line.get("heldout_loss_by_level") for line in held)
    label(axis, f"held-out {'likelihood' if exact else 'bound'} ± standard error", y="bits a byte")


def _by_level(axis: Any, train: list[dict[str, Any]], held: list[dict[str, Any]]) -> None:
    """Of each evaluation; of the last training lines where there is none."""
    rows = [(f"step {line['step']:,}", line["heldout_loss_by_level"]) for line in held if line.get("heldout_loss_by_level")]
    what, recent = "held-out loss", [line["loss_by_level"] for line in train[-LAST:] if line.get("loss_by_level")]
    if not rows and not held and recent:
        what, rows = "training loss", [("last lines", _mean(recent))]
    for i, ((name, levels), color) in enumerate(zip(rows, colors(len(rows)), strict=True)):
        levels = _table(levels)
        seen = np.isfinite(levels)  # levels on which no row fell are bridged
        axis.plot(((np.arange(len(levels)) + 0.5) / len(levels))[seen], levels[seen], color=color, lw=1.3, marker=".", ms=4,
                  label=name if i in (0, len(rows) - 1) else None)
    if rows:
        axis.set_xlim(0, 1)
        _legend(axis)
    else:
        _nothing(axis, "no noise levels")
    label(axis, f"{what} by noise level", "share of tokens masked", "nats a masked token")


def _load(axis: Any, train: list[dict[str, Any]]) -> None:
    lines = [line for line in train if line.get("load_by_layer")]
    if lines:
        steps, table = np.array([line["step"] for line in lines]), _table([line["load_by_layer"] for line in lines])
        layers = table.shape[1]
        for i, color in enumerate(colors(layers)):
            axis.plot(steps, _smooth(table[:, i]), color=color, lw=1.2, label=f"expert layer {i}" if layers <= 8 or i in (0, layers - 1) else None)
        axis.axhline(1, color="gray", lw=0.8, ls=":", label="balanced")
        _legend(axis)
    else:
        _nothing(axis, "no expert layers")
    label(axis, "expert load by layer", y="busiest expert / mean")


def _gradient(axis: Any, train: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
    steps, norm = _series(train, "grad_norm")
    axis.plot(steps, norm, color=BLUE, lw=0.9)
    if len(norm) and norm.min() > 0:
        axis.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter(plain)
    steps, skipped = _series(train, "skipped")
    count = int(skipped[-1]) if len(skipped) else 0
    label(axis, f"gradient norm · {count or 'no'} step{'' if count == 1 else 's'} skipped", y="norm before clipping")
    if count:
        other = axis.twinx()
        other.plot(steps, skipped, color=RED, lw=1.4, drawstyle="steps-post")
        other.set_ylim(0, count * 1.05)
        other.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        other.set_ylabel("skipped steps so far", fontsize=8, color=RED)
        other.tick_params(labelsize=8, colors=RED)
        other.spines["top"].set_visible(False)


def _load_by_level(axis: Any, train: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator
    tables = [line["load_by_level"] for line in train if line.get("load_by_level")][-LAST:]
    mean = _mean(tables) if tables else np.zeros((0, 0))
    if np.isfinite(mean).any(-1).sum() > 1:
        image = axis.imshow(mean.T, aspect="auto", origin="lower", extent=(0, 1, -0.5, mean.shape[1] - 0.5), cmap="viridis",
                            vmin=1, vmax=max(float(np.nanmax(mean)), 1.1))
        bar = axis.figure.colorbar(image, ax=axis)
        bar.ax.tick_params(labelsize=8)
        bar.set_label("busiest expert / mean", fontsize=8)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        _nothing(axis, "no noise levels" if tables else "no expert layers")
    last = f" (last {len(tables)} lines)" if tables else ""
    label(axis, f"expert load by noise level{last}", "share of tokens masked", "expert layer")
    axis.grid(False)
