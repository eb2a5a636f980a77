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
# # Decoders side by side
#
# How many forwards does a right answer need? Every decoder solves the same held-out 4×4 sudokus, ten blanks each, and the picture shows
# the share that is exactly right against the forwards that it took. It trains a model of half a million parameters first, which takes about two
# minutes on two CPU cores, unless `runs/sudoku` is there. With `LLADA_NB_SCALE=tiny` everything is small and means nothing; the tests run it so.

# %%
import os
import pathlib
import subprocess
import sys

ROOT = next(folder for folder in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (folder / "llada_jax").is_dir())
sys.path.insert(0, str(ROOT))
TINY = os.environ.get("LLADA_NB_SCALE") == "tiny"

import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display

RUN = pathlib.Path(tempfile.mkdtemp()) / "sudoku" if TINY else ROOT / "runs" / "sudoku"
small = ["--config.train.steps=4", "--config.train.steps_per_call=2", "--config.train.batch_size=8", "--config.train.eval_every=0",
         "--config.model.hidden_size=16", "--config.model.num_layers=1", "--config.model.num_heads=2"]
done = subprocess.run([sys.executable, "-m", "llada_jax.train", "--config=configs/sudoku.py", f"--workdir={RUN}", *(small if TINY else [])],
                      cwd=ROOT, capture_output=True, text=True)  # a run that is there already ends at once
print(done.stdout.splitlines()[-1] if done.returncode == 0 else done.stderr)

# %% [markdown]
# ## The model and the puzzles
#
# `open_weights` takes a run folder or a published checkpoint; a task knows its held-out instances and what is right.

# %%
from llada_jax import partitioning
from llada_jax.evaluation import decode, scoring
from llada_jax.model import transformer
from llada_jax.sampling import presets
from llada_jax.training import pretrained

PUZZLES = 8 if TINY else 1000
trained = pretrained.open_weights(str(RUN), None, None, "params", None)
partitioning.setup_devices(batch_size=PUZZLES)
mesh = partitioning.make_mesh()
model = transformer.build(trained.config.model, trained.config.kernels, mesh)
variables = trained.load(model.shapes, partitioning.shardings_of(mesh, model.axes, model.shapes))
task = scoring.Asked.of("sudoku", PUZZLES, 7, trained.tokenizer)
print(f"{PUZZLES} puzzles on {jax.device_count()} device(s); the first: {task.items[0].pieces}, right: {task.items[0].answer}")


def solve(flags):
    """{label: figures} of every decoder that `flags` names, and the last batch of each."""
    lines, batches = {}, {}
    for label, (decoder, cache) in scoring.decoders(flags, "low_confidence", len(task.items[0].answer)).items():
        lines[label] = []
        for batch in decode.batches(model, variables, mesh, trained.tokenizer, decoder, task.requests, cache=cache,
                                    max_length=trained.config.model.max_length, batch_size=PUZZLES, warm_up=True):
            lines[label] += task.lines(batch, label, trained.tokenizer, {})
        batches[label] = batch
    return scoring.summary(lines), batches


# %% [markdown]
# ## The frontier
#
# Each family is one rule at several settings: a fixed number of forwards, a threshold on the probability, one on the entropy, Fast-dLLM's factor.
# The last two orders show why confidence matters: the same number of forwards in random order, or from left to right, solves less.

# %%
families = {
    "fixed number": ["low_confidence"] + [f"low_confidence:steps={n}" for n in ((5,) if TINY else (7, 5, 4, 3, 2, 1))],
    "threshold": [f"threshold:threshold={p}" for p in ((0.9,) if TINY else (0.99, 0.95, 0.9, 0.8, 0.6))],
    "entropy (MED)": [f"med:entropy={h}" for h in ((0.2,) if TINY else (0.02, 0.05, 0.1, 0.2, 0.5))],
    "factor": [f"factor:factor={f}" for f in ((1.0,) if TINY else (0.1, 0.25, 0.5, 1.0, 2.0))],
    "random order": [f"random:steps={n}" for n in ((5,) if TINY else (10, 5, 2))],
    "left to right": [f"left_to_right:steps={n}" for n in ((5,) if TINY else (10, 5, 2))],
}
found, batches = solve(presets.Flags(",".join(label for labels in families.values() for label in labels)))
print(scoring.describe({"sudoku": found}))

# %%
fig, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
for name, labels in families.items():
    figures = sorted((found[label] for label in labels), key=lambda f: f["forwards"])
    axis.errorbar([f["forwards"] for f in figures], [100 * f["exact"] for f in figures], yerr=[100 * f["exact_se"] for f in figures], marker="o",
                  capsize=2, label=name)
axis.set(xlabel="forwards for ten blanks, mean", ylabel="solved exactly, %", title=f"{PUZZLES} held-out 4×4 sudokus; bars: one standard error")
axis.legend()
plt.show()

# %% [markdown]
# ## What a row of the trace says
#
# The step that wrote each blank, and how sure the model was: first those that follow from the givens alone.

# %%
label = families["threshold"][0]
trace, canvas = batches[label].trace, batches[label].canvas
grid = lambda x_T: np.asarray(x_T)[canvas.valid_BT[0]][:16].reshape(4, 4)
step = grid(trace.reveal_step_BT[0])
cell = lambda s, p: f"<td style='border:1px solid gray;padding:.4em'>{'given' if s < 0 else f'step {s}, p {np.exp(p):.2f}'}</td>"
rows = zip(step, grid(trace.reveal_logprob_BT[0]), strict=True)
cells = "".join(f"<tr>{''.join(map(cell, row, logs))}</tr>" for row, logs in rows)
display(HTML(f"<table>{cells}</table>"))
print(f"{label}: {int(trace.steps_B[0])} steps, of these {int(trace.wasted_B[0])} wrote nothing; {int(trace.tokens_B[0])} slots computed")
