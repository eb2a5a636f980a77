"""Runs side by side: curves with bands over seeds, and what a sweep found, with intervals.

    python -m llada_jax.plot runs/first runs/second --out=runs/both.png
    python -m llada_jax.plot runs/moe
    python -m llada_jax.plot configs/ablations/conversion.jsonl --against=direct

A run folder gives curves of the loss and of the held-out bound; runs whose settings differ in the seed alone are one line, with their mean and
the span between the lowest and the highest. A sweep's folder, or its results.jsonl, gives a table: means over seeds, and differences to the first
variant (or `--against`) over the seeds that both have, with Student's 95 % interval; an interval that holds 0 shows no difference. Where tasks were
answered, it tells how many times as many tokens a forward a variant writes at equal rates of exact answers. The last line is json.
"""

import json
import os
import sys
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from llada_jax import command_line
from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.evaluation import paired
from llada_jax.training import curves, metrics

OUT = flags.DEFINE_string("out", None, "Picture (png). Default: plot.png in the first folder; none for a lone results file.")
AGAINST = flags.DEFINE_string("against", "", "Variant that the others are compared with; the first by default.")


def main(paths: list[str]) -> None:
    """Print tables, draw the picture. Raises ConfigError for what is neither a run nor results."""
    if not paths:
        raise ConfigError("name run folders, or the folder of a sweep: python -m llada_jax.plot runs/first runs/second")
    tables = [path for path in paths if path.endswith(".jsonl") or (epath.Path(path) / "results.jsonl").exists()]
    if tables and len(paths) > 1:
        raise ConfigError(f"{tables[0]} holds the results of a sweep, which go alone; the folders of its runs may stand side by side")
    if OUT.value and not OUT.value.endswith(".png"):
        raise ConfigError(f"--out={OUT.value}: the picture is a png; name it so")
    out = OUT.value or ("" if paths[0].endswith(".jsonl") else f"{paths[0]}/plot.png")
    print(json.dumps(_results(paths[0], out) if tables else _runs(paths, out)))


def _results(path: str, out: str) -> dict[str, Any]:
    """Table and picture of a sweep."""
    lines = _lines(path if path.endswith(".jsonl") else f"{path}/results.jsonl")
    rows, gains = paired.comparison(lines, AGAINST.value), _gains(lines)
    variants = list(dict.fromkeys(line["variant"] for line in lines))
    against, width = AGAINST.value or variants[0], max(map(len, variants)) + 2
    for metric in dict.fromkeys(row["metric"] for row in rows):
        print(f"{metric}: means over seeds; differences to {against} by seed, with 95 % intervals\n"
              f"  {'variant':<{width}}{'mean':>10}{'seeds':>8}   difference")
        for row in (row for row in rows if row["metric"] == metric):
            print(f"  {row['variant']:<{width}}{row['mean'].mean:>10.4f}{row['mean'].count:>8}   {row['difference'] or ''}")
    for gain in gains:
        ratio = gain["ratio"]
        print(f"{gain['task']}: at equal exact rates {gain['variant']} writes {ratio.mean:.3f} ({ratio.low:.3f}, {ratio.high:.3f}) times as many "
              f"tokens a forward as {against}, {ratio.count} seeds")
    cost = sum(line["wall_seconds"] for line in lines)
    print(f"{len(lines)} runs, {metrics.duration(cost)} in all, {'; '.join(sorted({line['machine'] for line in lines}))}")
    if out:
        _draw_results(rows, paired.frontiers(lines), against, out)
    plain = lambda row: {key: {name: metrics.clean(x) for name, x in value._asdict().items()} if isinstance(value, paired.Interval) else
                         {seed: metrics.clean(x) for seed, x in value.items()} if isinstance(value, dict) else value
                         for key, value in row.items()}
    return {"rows": list(map(plain, rows)), "gains": list(map(plain, gains)), "seconds": cost, "picture": out or None}


def _lines(path: str) -> list[dict[str, Any]]:
    """Of a sweep's results. Raises ConfigError where it is something else, or holds a run twice."""
    if not epath.Path(path).exists():
        raise ConfigError(f"there is no {path}")
    lines, names, seen = metrics.read_jsonl(path), set(), {}
    for line in lines:
        if missing := [key for key in ("name", "variant", "seed", "wall_seconds", "machine") if key not in line]:
            raise ConfigError(f"{path} holds no results of a sweep: a line has no {missing[0]}")
        if line["name"] in names:
            raise ConfigError(f"{path} holds {line['name']} twice; take one of the lines out")
        names.add(line["name"])
        same = seen.setdefault(json.dumps([line["variant"], line.get("settings", line["seed"])], sort_keys=True), line["name"])
        if same != line["name"]:
            raise ConfigError(f"{path}: {same} and {line['name']} have the same settings: one run made twice; take one of the lines out")
    if not lines:
        raise ConfigError(f"{path} holds no results yet")
    return lines


def _gains(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every other variant, by task: tokens a forward over those of the variant compared with, at equal exact rates."""
    found = []
    for task, by_variant in paired.frontiers(lines).items():
        base = by_variant.get(AGAINST.value or lines[0]["variant"], {})
        for variant, own in by_variant.items():
            logs = []
            for seed in sorted(own.keys() & base.keys()) if own is not base else ():
                try:
                    logs.append(np.log(paired.gain_at_equal_rate(own[seed], base[seed])))
                except ConfigError as error:
                    print(f"{task}: {variant}-{seed} is left out: {error}")
            if logs:
                logs = paired.t_interval(logs)
                found.append({"task": task, "variant": variant, "ratio": paired.Interval(*map(float, np.exp(logs[:3])), logs.count)})
    return found


def _draw_results(rows: list[dict[str, Any]], by_task: dict[str, Any], against: str, out: str) -> None:
    """Each seed's value, mean with its interval; differences with theirs; tokens a forward over the exact rate."""
    names = list(dict.fromkeys(row["metric"] for row in rows))
    figure, axes = curves.figure(max(len(names) + len(by_task), 1), 2 if rows else 1)
    for column, metric in enumerate(names):
        own = [row for row in rows if row["metric"] == metric]
        for i, row in enumerate(own):
            axes[0, column].plot([i] * len(row["values"]), list(row["values"].values()), ".", color=curves.PALE)
            for axis, interval in ((axes[0, column], row["mean"]), (axes[1, column], row["difference"])):
                if interval and np.isfinite(interval.low):
                    axis.errorbar([i], [interval.mean], yerr=[[interval.mean - interval.low], [interval.high - interval.mean]], fmt="o", ms=4,
                                  capsize=3, color=curves.BLUE)
        axes[1, column].axhline(0, color="gray", lw=0.8, ls=":")
        for axis, title in ((axes[0, column], metric), (axes[1, column], f"difference to {against}")):
            axis.set_xticks(range(len(own)), [row["variant"] for row in own], rotation=20)
            curves.label(axis, title, "")
    for column, (task, by_variant) in enumerate(by_task.items(), len(names)):
        for (variant, by_seed), color in zip(by_variant.items(), curves.colors(len(by_variant)), strict=True):
            for i, points in enumerate(by_seed.values()):
                rates, speeds = zip(*sorted(points), strict=True)
                axes[0, column].plot(rates, speeds, color=color, marker=".", lw=0.8, label=None if i else variant)
        curves.label(axes[0, column], task, "exact", "tokens a forward")
        axes[0, column].legend(fontsize=7, frameon=False)
    curves.save(figure, out)


def _runs(paths: list[str], out: str) -> dict[str, Any]:
    """Curves of run folders."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        config = epath.Path(path) / "config.json"
        if not config.exists():
            raise ConfigError(f"{path} is neither a run folder (it has no config.json) nor the folder of a sweep (no results.jsonl)")
        settings = config_lib.flatten(config_lib.from_config_dict(json.loads(config.read_text()))) | {"train.seed": None}
        groups.setdefault(json.dumps(settings), []).append(path)
    figure, axes = curves.figure(2, 1)
    found = []
    for folders, color in zip(groups.values(), curves.colors(len(groups)), strict=True):
        lines = [metrics.read_jsonl(epath.Path(folder) / "metrics.jsonl") for folder in folders]
        name = os.path.basename(folders[0].rstrip("/")) + (f" and {len(folders) - 1} more seed(s)" if len(folders) > 1 else "")
        for axis, key in zip(axes[0], ("loss", "heldout_bits_per_byte"), strict=True):
            curves.band(axis, lines, key, color, name, smooth=key == "loss")
        held = [[line["heldout_bits_per_byte"] for line in run if line.get("heldout_bits_per_byte")] for run in lines]
        last = [own[-1] for own in held if own]
        found.append({"runs": folders, "heldout_bits_per_byte": last})
        print(f"{name}: " + (f"{np.mean(last):.4f} bits a byte held out, {min(last):.4f} to {max(last):.4f}" if last else "nothing held out"))
    for axis, title, unit in zip(axes[0], ("training loss", "held out"), ("nats a token", "bits a byte"), strict=True):
        curves.label(axis, title, "step", unit)
        axis.legend(fontsize=7, frameon=False)
    curves.save(figure, out)
    return {"groups": found, "picture": out}


def run() -> None:
    """The command line: paths stand between the flags."""
    paths = [word for word in sys.argv[1:] if not word.startswith("-")]
    sys.argv[1:] = [word for word in sys.argv[1:] if word.startswith("-")]
    command_line.run(lambda: main(paths))


if __name__ == "__main__":
    run()
