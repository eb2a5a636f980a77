# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ablations
#
# One question a file under `configs/ablations/`, five seeds a variant, differences by seed with Student's 95 % interval. Every number comes from the
# lines of results beside the file, one a run; the commands that made them:
#
# ```
# python -m llada_jax.train --config=configs/ablations/NAME.py --sweep --workdir=runs/NAME
# python -m llada_jax.plot runs/NAME
# ```
#
# To read your own results, let `FOLDER` name the folder of `NAME.jsonl` files. Models of about a million parameters and a million tokens:
# an interval is about these, not about large ones.

# %%
"""Differences by seed from the lines of results beside `configs/ablations/*.py`; bounds in bits a byte."""
import pathlib
import sys

ROOT = next(folder for folder in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (folder / "llada_jax").is_dir())
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import numpy as np

from llada_jax.evaluation import paired
from llada_jax.training import metrics, presets

FOLDER = ROOT / "configs" / "ablations"
results = {path.stem: metrics.read_jsonl(path) for path in sorted(FOLDER.glob("*.jsonl")) if path.stem != "scaling"}  # laws are no differences
for name, lines in results.items():
    question = presets.module_of(str(FOLDER / f"{name}.py")).__doc__.splitlines()[0]
    hours = sum(line["wall_seconds"] for line in lines) / 3600
    print(f"{name:<12} {len(lines):>3} runs {hours:>6.2f} h   {question}")
everything = [line for lines in results.values() for line in lines]
total = sum(line["wall_seconds"] for line in everything) / 3600
machines = "; ".join(sorted({line["machine"] for line in everything}))
print(f"\n{len(everything)} runs and {total:.1f} machine-hours in all, on {machines}")

# %% [markdown]
# ## Differences
#
# Each variant less the first one of its file. An interval that holds 0 shows no difference at this scale, whatever its middle says.

# %%
differences = {}
for name, lines in results.items():
    rows = paired.comparison(lines)
    print(f"\n{name}, less {rows[0]['variant']}")
    for row in rows:
        if row["difference"] is None:
            print(f"  {row['variant']:<16}{row['metric']:<30}{row['mean'].mean:>9.4f}   (the first, {row['mean'].count} seeds)")
        else:
            found = row["difference"]
            said = "no difference shows" if found.low <= 0 <= found.high else ""
            print(f"  {row['variant']:<16}{row['metric']:<30}{row['mean'].mean:>9.4f}   {found}  {said}")
            differences[name, row["variant"], row["metric"]] = found


# %%
def caption(lines):
    """Seeds, tokens, machine and date of results."""
    tokens = lines[0]["tokens"] / 1e6
    return f"{len({line['seed'] for line in lines})} seeds, {tokens:.2f} M tokens a run, {lines[0]['machine']}, {lines[-1]['date']}"


names = [name for name in results if any(key[0] == name and key[2].startswith("bits") for key in differences)]
fig, axes = plt.subplots(-(-len(names) // 2), 2, figsize=(11, 2.6 * -(-len(names) // 2)), layout="constrained", squeeze=False)
for axis, name in zip(axes.flat, names, strict=False):
    own = {(variant, metric): found for (of, variant, metric), found in differences.items() if of == name and metric.startswith("bits")}
    labels = [f"{variant}{metric.removeprefix('bits a byte')}" for variant, metric in own]
    for i, found in enumerate(own.values()):
        axis.errorbar([found.mean], [i], xerr=[[found.mean - found.low], [found.high - found.mean]], fmt="o", ms=4, capsize=3, color="tab:blue")
    axis.axvline(0, color="gray", lw=0.8, ls=":")
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_title(f"{name}: bits a byte more than {results[name][0]['variant']}", fontsize=9)
for axis in list(axes.flat)[len(names):]:
    axis.axis("off")
plt.show()
for name in names:
    print(f"{name}: {caption(results[name])}")

# %% [markdown]
# ## Load of the experts by noise level
#
# The busiest expert's share over the mean share (1 is even), from few masks on the left to all on the right: means over the last lines of each run,
# then over seeds. What is not masked comes from a text, what is masked looks alike, so the router's work changes with the level.

# %%
fig, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for variant in dict.fromkeys(line["variant"] for line in results["moe"]):
    loads = np.array([line["load_by_level"] for line in results["moe"] if line["variant"] == variant and line["load_by_level"]], float)
    if len(loads):
        centres = (np.arange(loads.shape[1]) + 0.5) / loads.shape[1]
        label = {"moe": "balance loss", "bias": "expert bias", "unbalanced": "neither"}.get(variant)
        axis.plot(centres, loads.mean(0), marker="o", ms=3, label=label)
        axis.fill_between(centres, loads.min(0), loads.max(0), alpha=0.15)
axis.set(xlabel="share of masks", ylabel="busiest expert / mean", ylim=(1, None))
axis.legend()
plt.show()
print(f"Figure: {caption(results['moe'])}; bands go from the lowest seed to the highest")

# %% [markdown]
# ## What the papers claim, and what these runs say
#
# *agrees* and *disagrees*: the whole interval lies on one side of 0. *not settled*: it holds 0.


# %%
def row(claim, name, variant, metric="bits a byte", sign=1):
    """A claim that `variant` has a higher (sign 1) or lower (-1) metric than the first variant of `name`."""
    found = differences.get((name, variant, metric))
    if found is None:
        return claim, "", "not measured"
    side = "not settled" if found.low <= 0 <= found.high else "agrees" if np.sign(found.mean) == sign else "disagrees"
    return claim, f"{found} ({found.count} seeds)", side


claims = [
    row("experts beat a dense model of equal active FLOPs (LLaDA-MoE)", "moe", "dense"),
    row("without a balance loss the load is less even", "moe", "unbalanced", "busiest expert / mean"),
    row("balancing by the bias is better than by a loss (DeepSeek-V3)", "moe", "bias", sign=-1),
    row("twice the experts are better at equal active FLOPs", "router", "16-experts", sign=-1),
    row("half of them are worse", "router", "4-experts"),
    row("finer experts are better (DeepSeekMoE)", "router", "four-narrow", sign=-1),
    row("a shared expert is better (DeepSeekMoE, LLaDA2.0)", "router", "shared", sign=-1),
    row("renormalised weights are better (LLaDA2.0)", "router", "renormalised", sign=-1),
    row("stratified noise levels are better than independent ones", "noise", "independent"),
    row("the weight 1/t is better than equal weights, by the bound (Quokka)", "noise", "uniform"),
    row("smaller blocks have the lower bound, each in its own blocks (BD3-LM): 4 in 4", "blocks", "4", "bits a byte in blocks of 4", sign=-1),
    row("conversion beats training from scratch at equal steps (LLaDA2.0)", "conversion", "wsd", "bits a byte in blocks of 32", sign=-1),
    row("masked overtakes autoregressive on repeated data (2511.03276)", "repeats", "autoregressive", "lowest bits a byte"),
    row("masked is at its best after more epochs (2507.15857)", "repeats", "autoregressive", "epoch of the lowest", sign=-1),
    row("averaged checkpoints beat the last one (LLaDA2.0)", "averaging", "mean", sign=-1),
    ("scores on tasks of 7B parameters after 20T tokens (LLaDA-MoE)", "", "not measurable here"),
]
print("\n".join(f"{claim:<82}{measured:<46}{said}" for claim, measured, said in claims))
