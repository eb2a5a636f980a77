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
# # Scaling laws
#
# How large a model is best for a given compute? How much more compute does masked diffusion need than its autoregressive twin, and what do
# experts save? What happens when the data run out? Every number below comes from lines of results that lie in this repository, one a run:
#
# ```
# python -m llada_jax.train --config=configs/ablations/scaling.py --sweep --workdir=runs/scaling
# python -m llada_jax.train --config=configs/ablations/repeats.py --sweep --workdir=runs/repeats
# ```
#
# To read a pod's results, let `SCALING` and `REPEATS` name its `results.jsonl`; a variant is called KIND-FLOPS-WIDTH. Models of up to 0.7 M active
# parameters, with one learning rate for all sizes, say nothing certain about large ones: this shows how the laws are measured, and what they are
# here.

# %%
"""Scaling laws from the lines of results of `configs/ablations/scaling.py` and `repeats.py`; losses in bits a byte, compute in FLOPs."""
import os
import pathlib
import sys

ROOT = next(folder for folder in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (folder / "llada_jax").is_dir())
sys.path.insert(0, str(ROOT))
DRAWS = 100 if os.environ.get("LLADA_NB_SCALE") == "tiny" else 2000  # of a bootstrap

import matplotlib.pyplot as plt
import numpy as np

from llada_jax.config import ConfigError
from llada_jax.evaluation import paired, scaling
from llada_jax.training import metrics

SCALING = ROOT / "configs" / "ablations" / "scaling.jsonl"
REPEATS = ROOT / "configs" / "ablations" / "repeats.jsonl"


def caption(lines):
    """Seeds, tokens, cost and machine of results."""
    seeds, tokens, seconds = ({f(line) for line in lines} for f in (lambda x: x["seed"], lambda x: x["tokens"], lambda x: x["machine"]))
    hours, epochs = sum(line["wall_seconds"] for line in lines) / 3600, max(line["epochs"] for line in lines)
    dates = sorted({line["date"] for line in lines})
    return (f"{len(lines)} runs, {len(seeds)} seed(s), {min(tokens) / 1e6:.2f} to {max(tokens) / 1e6:.2f} M tokens a run (at most {epochs:.1f} "
            f"epochs), {hours:.1f} h on {'; '.join(seconds)}, {dates[0]} to {dates[-1]}")


lines = metrics.read_jsonl(SCALING)
print(caption(lines))

# %% [markdown]
# ## How cost is counted
#
# Compute is the FLOPs of training: 2 a multiply-add, backward twice the forward, over the parameters that a token passes through, attention over
# the whole row, and the rows of the vocabulary head that the loss reads: all of them when autoregressive, half of them on average when masked.
# Size is the number of active parameters without the two embeddings, as SMDM counts it (arXiv 2410.18514). Loss is held-out bits a byte of text:
# exact where autoregressive, an upper bound where masked, so a comparison of the two favours the autoregressive model.

# %%
kinds = {}
for line in lines:
    kind, budget = line["variant"].split("-")[:2]
    embeddings = 2 * line["settings"]["data.vocab_size"] * line["settings"]["model.hidden_size"]
    row = (float(budget), line["active"] - embeddings, line["tokens"], line["heldout"]["bits_per_byte"])
    kinds.setdefault(kind, []).append(row)
kinds = {kind: np.array(rows).T for kind, rows in kinds.items()}  # budget, size, tokens, loss
print(f"{'kind':<16}{'FLOPs':>9}{'size':>10}{'tokens':>12}{'bits a byte':>13}")
for kind, rows in kinds.items():
    for budget, size, tokens, loss in sorted(map(tuple, rows.T)):
        print(f"{kind:<16}{budget:>9.1e}{size:>10,.0f}{tokens:>12,.0f}{loss:>13.4f}")

# %% [markdown]
# ## Equal compute
#
# One parabola a budget over the logarithm of size; a triangle marks its lowest point, a hollow one a point beyond the sizes that were measured, which
# is extrapolated.

# %%
best, settled = {}, {}
for kind, rows in kinds.items():
    best[kind] = scaling.optimum(*rows)
    settled[kind] = scaling.fitted(best[kind], *rows[:2])

fig, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.6), sharey=True, layout="constrained", squeeze=False)
for axis, (kind, (budgets, sizes, _, losses)) in zip(axes[0], kinds.items(), strict=True):
    for budget, curve, color in zip(np.unique(budgets), best[kind].by_size, plt.cm.viridis(np.linspace(0, 0.8, 9)[::4]), strict=False):
        own = budgets == budget
        axis.plot(sizes[own], losses[own], "o", ms=4, color=color, label=f"{budget:.1e} FLOPs")
        over = np.geomspace(min(sizes[own].min(), curve.size), max(sizes[own].max(), curve.size), 100)
        axis.plot(over, curve(over), color=color, lw=1)
        axis.plot([curve.size], [curve.loss], "v", ms=7, color=color, markerfacecolor=color if curve.inside else "none")
    axis.set(xscale="log", xlabel="active parameters without embeddings", title=kind)
axes[0, 0].set_ylabel("held out, bits a byte")
axes[0, 0].legend()
plt.show()
print("Figure: " + caption(lines))

# %% [markdown]
# ## The best size, the tokens, the loss, and how they grow
#
# Exponents over compute with 95 % intervals from a bootstrap of the residuals of the parabolas; what a bootstrap cannot settle is printed as such.

# %%
def shown(estimate, names, losses, fitted, parameters):
    """{name: (value, low, high)} of a fit, printed."""
    values = estimate(losses)
    try:
        ends = scaling.interval(estimate, losses, fitted, parameters, draws=DRAWS)
    except ConfigError as error:
        print(f"  {error}")
        ends = np.full((len(values), 2), (-np.inf, np.inf))
    for name, value, (low, high) in zip(names, values, ends, strict=True):
        print(f"  {name:<42}{value:>12.4g}   ({low:.4g}, {high:.4g})")
    return {name: (value, *end) for name, value, end in zip(names, values, ends, strict=True)}


exponents = {}
for kind, (budgets, sizes, tokens, losses) in kinds.items():
    print(kind)
    different = np.unique(budgets)
    for budget, size, data in zip(different, best[kind].by_size, best[kind].by_tokens, strict=True):
        beyond = "" if size.inside else " (extrapolated)"
        print(f"  {budget:.1e} FLOPs: {size.size:,.0f} parameters{beyond}, {data.size:,.0f} tokens, {size.loss:.4f} bits a byte")

    def laws(y, budgets=budgets, sizes=sizes, tokens=tokens):
        found = scaling.optimum(budgets, sizes, tokens, y)
        return found.size.exponent, found.tokens.exponent, found.loss.exponent

    names = ("exponent of the best size", "exponent of its tokens", "exponent of its loss")
    exponents[kind] = shown(laws, names, losses, settled[kind], 3 * len(different))

# %% [markdown]
# ## Compute for an equal loss
#
# How many times the compute of one kind another needs for the loss that it reaches at its largest budget, by the laws of their best losses. Where
# that loss lies outside what the other one reached, its law is extrapolated, and the line says so.

# %%
ratios, inside = {}, {}
pairs = {"masked over autoregressive": ("masked", "autoregressive"), "dense over masked, with experts": ("dense", "masked")}
for name, (ours, theirs) in pairs.items():
    level = float(best[ours].by_size[-1].loss)
    both = np.concatenate([kinds[ours][3], kinds[theirs][3]])
    cut = len(kinds[ours][3])

    def times(y, ours=ours, theirs=theirs, level=level, cut=cut):
        laws = [scaling.optimum(*kinds[kind][:3], part).loss for kind, part in ((ours, y[:cut]), (theirs, y[cut:]))]
        return [laws[0].inverse(level) / laws[1].inverse(level)]

    reached = [curve.loss for curve in best[theirs].by_size]
    inside[name] = min(reached) <= level <= max(reached)
    extrapolated = "" if inside[name] else f" ({theirs} reached {min(reached):.4f} to {max(reached):.4f}: extrapolated)"
    print(f"{name}, at {level:.4f} bits a byte{extrapolated}")
    fitted, parameters = np.concatenate([settled[ours], settled[theirs]]), 3 * (len(best[ours].by_size) + len(best[theirs].by_size))
    ratios[name] = shown(times, ("times the compute",), both, fitted, parameters)["times the compute"]

fig, axis = plt.subplots(figsize=(6, 4), layout="constrained")
for kind, (budgets, *_) in kinds.items():
    different = np.unique(budgets)
    [points] = axis.plot(different, [curve.loss for curve in best[kind].by_size], "o", label=kind)
    over = np.geomspace(different[0] / 3, different[-1] * 3, 50)
    axis.plot(over, best[kind].loss(over), color=points.get_color(), lw=1)
axis.set(xscale="log", yscale="log", xlabel="FLOPs of training", ylabel="best held out, bits a byte")
axis.yaxis.set_major_formatter("{x:.1f}")
axis.yaxis.set_minor_formatter("{x:.1f}")
axis.legend()
plt.show()
print("Figure: " + caption(lines))

# %% [markdown]
# ## A loss of size and data
#
# All runs of a kind together: `E + A / N^a + B / D^b` (Hoffmann et al., arXiv 2203.15556). Five numbers from few small runs: they describe these
# runs, and no interval is given.

# %%
for kind, (_, sizes, tokens, losses) in kinds.items():
    law = scaling.loss_law(sizes, tokens, losses)
    off = np.abs(law(sizes, tokens) / losses - 1).max()
    print(f"{kind:<16} E {law.floor:.3f}  A {law.size_factor:.3g}  a {law.size_exponent:.3f}  B {law.data_factor:.3g}  b {law.data_exponent:.3f}"
          f"   largest error {off:.1%}")

# %% [markdown]
# ## Data that run out
#
# A corpus of a few files, read again and again at a constant learning rate. The best loss, after how many epochs, and how much it has risen after
# three times as many.

# %%
repeated = metrics.read_jsonl(REPEATS)
metric_names = ("lowest bits a byte", "epoch of the lowest", "rise after three times as many epochs")
for name in metric_names:
    values = {}
    for line in repeated:
        values.setdefault(line["variant"], {})[line["seed"]] = paired.metrics_of(line).get(name)
    for kind, own in values.items():
        known = [value for value in own.values() if value is not None]
        found = f"{paired.t_interval(known)}  ({len(known)} of {len(own)} seeds)" if known else "beyond the end of the runs"
        print(f"{name:<40}{kind:<16}{found}")


def by_seed(kind, name):
    """A figure of each run of a kind, by seed."""
    found = {line["seed"]: paired.metrics_of(line)[name] for line in repeated if line["variant"] == kind}
    return np.array([found[seed] for seed in sorted(found)])


gap = paired.t_interval(by_seed("masked", "lowest bits a byte") - by_seed("autoregressive", "lowest bits a byte"))
later = paired.t_interval(np.log(by_seed("masked", "epoch of the lowest") / by_seed("autoregressive", "epoch of the lowest")))
crossed = "no crossover" if gap.low > 0 else "a crossover" if gap.high < 0 else "not settled"
print(f"lowest loss, masked less autoregressive, by seed: {gap} bits a byte: {crossed}")
print(f"epoch of the lowest, masked over autoregressive, by seed: {np.exp(later.mean):.1f} times ({np.exp(later.low):.1f}, {np.exp(later.high):.1f})")

fig, axis = plt.subplots(figsize=(6, 4), layout="constrained")
for kind, color in (("masked", "tab:blue"), ("autoregressive", "tab:orange")):
    for i, line in enumerate(line for line in repeated if line["variant"] == kind):
        steps, losses = np.array(line["curve"]).T
        axis.plot((steps * line["epochs"] / line["steps"])[1:], losses[1:], color=color, lw=0.8, label=None if i else kind)
axis.set(xscale="log", xlabel="epochs", ylabel="held out, bits a byte")
axis.legend()
plt.show()
print("Figure: " + caption(repeated))

# %% [markdown]
# ## What the papers claim, and what these runs say
#
# *agrees*: the interval lies on the claim's side. *disagrees*: on the other. *not settled*: it holds both. *not told
# apart*: two intervals meet, which wide ones do easily. Scales differ by many orders of magnitude.

# %%
def verdict(low, high, claim):
    """Of an interval against a claim that a number lies above `claim`."""
    return "agrees" if low > claim else "disagrees" if high < claim else "not settled"


ratio, saving = ratios["masked over autoregressive"], ratios["dense over masked, with experts"]
beyond = ["" if inside[name] else ", extrapolated" for name in pairs]
spans = [exponents[kind]["exponent of the best size"][1:] for kind in ("masked", "autoregressive")]
overlap = spans[0][0] <= spans[1][1] and spans[1][0] <= spans[0][1]
tested = {
    "masked needs more compute for equal loss (SMDM: 16 times, 6e18 to 1e20 FLOPs)": (
        f"{ratio[0]:.3g} ({ratio[1]:.3g}, {ratio[2]:.3g}) times{beyond[0]}", verdict(*ratio[1:], 1)),
    "the exponents of the best size are alike (SMDM)": (
        " and ".join(f"({low:.2f}, {high:.2f})" for low, high in spans), "not told apart" if overlap else "disagrees"),
    "experts reach a dense model's loss with less compute (LLaDA-MoE)": (
        f"dense {saving[0]:.3g} ({saving[1]:.3g}, {saving[2]:.3g}) times{beyond[1]}", verdict(*saving[1:], 1)),
    "masked is at its best after more epochs (2507.15857, 2511.03276)": (
        f"{np.exp(later.mean):.1f} ({np.exp(later.low):.1f}, {np.exp(later.high):.1f}) times", verdict(later.low, later.high, 0)),
    "masked overtakes autoregressive on repeated data (2511.03276, 1B parameters)": (
        f"{gap.mean:+.3f} ({gap.low:+.3f}, {gap.high:+.3f}) bits a byte", verdict(-gap.high, -gap.low, 0)),
    "masked wants 2 to 5 times the tokens of an autoregressive model (Quokka)": ("ten times the compute would be too little", "not measurable here"),
}
print("\n".join(f"{claim:<82}{measured:<44}{said}" for claim, (measured, said) in tested.items()))
