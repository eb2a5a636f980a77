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
# # A tour of llada_jax
#
# A masked-diffusion language model with mixture-of-experts, from its settings to a text that it writes: the same functions
# that `python -m llada_jax.train` and `python -m llada_jax.sample` call, one at a time. It needs the packages of
# `requirements.txt` and the `notebooks` extra, downloads nothing, and takes about three minutes on two CPU cores.
# With `LLADA_NB_SCALE=tiny` everything is small and takes seconds; the tests run it so.

# %% [markdown]
# ## Versions and devices

# %%
import os
import pathlib
import platform
import sys

ROOT = next(folder for folder in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (folder / "llada_jax").is_dir())
sys.path.insert(0, str(ROOT))
TINY = os.environ.get("LLADA_NB_SCALE") == "tiny"

import flax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import flags
from IPython.display import HTML, display

from llada_jax import partitioning

partitioning.setup_devices(batch_size=8 if TINY else 48)  # one CPU device a core; must come before JAX starts
print(f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}")
print(f"{jax.device_count()} × {jax.devices()[0].device_kind}; absl flags parsed: {flags.FLAGS.is_parsed()}, and none are needed")

# %% [markdown]
# ## A config
#
# A file under `configs/` returns all settings, you edit them, and `from_config_dict` checks and freezes them. An unknown key
# or settings that cannot work together raise `ConfigError` with a way out. These are the settings that differ from the defaults.

# %%
from configs import pystdlib
from llada_jax import config as config_lib

settings = pystdlib.get_config()
settings.train.steps = 360  # fewer than the demo's
if TINY:
    settings.model.update(hidden_size=32, num_layers=1, num_heads=2, num_experts=4, expert_size=32)
    settings.data.update(limit=12, vocab_size=512, holdout=0.25, sequence_length=64)
    settings.train.update(steps=8, steps_per_call=4, batch_size=8)
    settings.optimizer.update(name="adamw", warmup_steps=2)
config = config_lib.from_config_dict(settings)

defaults = config_lib.flatten(config_lib.Config())
for key, value in config_lib.flatten(config).items():
    if value != defaults[key]:
        print(f"{key:<32}{value}")

# %% [markdown]
# ## Text to batches
#
# The source is the standard library of the Python that runs this. A SentencePiece tokenizer is trained on it; documents are
# packed into rows, and tokens attend only within their own document. A batch follows from (seed, step) alone.

# %%
from llada_jax.data import pipeline
from llada_jax.data import sources as sources_lib

sources = sources_lib.load(config.data)
tokenizer = pipeline.build_tokenizer(config, sources=sources)
config = config_lib.with_vocab_size(config, tokenizer.vocab_size)
data = pipeline.build(config, tokenizer, "train", sources)
held_out = pipeline.build(config, tokenizer, "heldout", sources)
print(f"train: {data.describe()}; held out: {held_out.describe()}; vocabulary {tokenizer.vocab_size}")

batch = data.batch(seed=0, step=0, batch_size=config.train.batch_size)
print({key: f"{array.dtype}{list(array.shape)}" for key, array in batch.items()})
print([tokenizer.decode([token]) for token in tokenizer.encode("def add(a, b):\n    return a + b\n")])

# %% [markdown]
# ## The model as functions
#
# `transformer.build` gives functions of a plain parameter tree: `init`, `apply` (hidden states), `head` (logits),
# `cross_entropy`. Layers of one kind are stacked along a leading dimension and scanned.

# %%
from llada_jax.model import count, transformer
from llada_jax.training import optimizer, state

mesh = partitioning.make_mesh(config.mesh)
model = transformer.build(config.model, config.kernels, mesh)
update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
like = jax.eval_shape(lambda: state.create(model, update, config))
shardings = state.shardings(model, like, mesh)
run = jax.jit(lambda: state.create(model, update, config), out_shardings=shardings)()

for path, leaf in jax.tree_util.tree_leaves_with_path(run.variables):
    print(f"{optimizer.path_of(path):<32}{list(leaf.shape)}")
size = count.parameters(config.model)
print(f"{size.total:,} parameters, of which a token passes through {size.active:,}")
assert size.total == sum(leaf.size for leaf in jax.tree.leaves(run.variables))

# %% [markdown]
# ## Corruption
#
# Training masks each token with probability t, the noise level. Every position has one uniform number that depends on (seed,
# step, sample, position) alone, so the masks of a smaller t are among those of a larger one.

# %%
from llada_jax.diffusion import corrupt as corrupt_lib

line = "for name, value in sorted(table.items()): print(name, value)"
tokens = jnp.array([tokenizer.encode(line)])
pieces = [tokenizer.decode([token]) for token in tokens[0].tolist()]
for t in (0.0, 0.25, 0.5, 0.75, 1.0):
    noisy, masked, p = corrupt_lib.corrupt((0, 0, 0), jnp.array([3]), tokens, jnp.ones_like(tokens, bool), jnp.zeros_like(tokens),
                                           corrupt_lib.Noise(tokenizer.mask_id), jnp.array([[t]]))
    print(f"t = {t:.2f}  {''.join('▒' * len(piece) if hidden else piece for piece, hidden in zip(pieces, masked[0].tolist(), strict=True))}")

# %% [markdown]
# ## The loss
#
# The model predicts the masked tokens. Each costs −log p(token), weighted by 1/t: averaged over t and masks this is an upper
# bound on −log p(text) (arXiv 2502.09992, eq. 3). Divided by the bytes of the original text it can be compared with any other
# method, whatever the tokenizer. `heldout.make` measures it on text that is never trained on.

# %%
from llada_jax.diffusion import loss as loss_lib
from llada_jax.evaluation import heldout
from llada_jax.training import step as step_lib


@jax.jit
def loss_on(variables, batch):
    """Nats a token of one batch under fixed noise: an estimate of the bound, a scalar."""
    key, index = (config.train.seed, 0, 0), batch["index"]
    times = corrupt_lib.times(key, index, 1, len(index), "stratified")  # evenly spread over the batch
    noisy, masked, p = corrupt_lib.corrupt(key, index, batch["tokens"], batch["maskable"], jnp.zeros_like(batch["tokens"]),
                                           corrupt_lib.Noise(tokenizer.mask_id, min_noise=1e-3), times)
    terms, _ = loss_lib.elbo_terms(model.apply, model.cross_entropy, variables, batch["tokens"], noisy, masked, p, batch["position"],
                                   step_lib.attention_spec(batch), lambda p: 1 / p)
    return terms.weighted_BT.sum() / batch["maskable"].sum()


loss = loss_on(run.variables, partitioning.put_batch(mesh, batch))
print(f"untrained: {loss:.2f} nats a token; a uniform guess costs log {tokenizer.vocab_size} = {np.log(tokenizer.vocab_size):.2f}")

rows = held_out.rows(np.arange(min(4 * config.train.batch_size, held_out.num_rows)))
evaluate = heldout.make(model, config, mesh, tokenizer.mask_id)
before = evaluate(run.variables, rows)
print(f"held out, before: {heldout.describe(before)}")

# %% [markdown]
# ## Training
#
# One jitted call runs several steps in a loop on the device, without the host. The state is donated: each call's result takes
# the place of its argument.

# %%
import time

from llada_jax.training import metrics

train = config.train
call = step_lib.make_call(step_lib.make_step(model, update, config, tokenizer.mask_id), shardings)
plan = [range(first, first + train.steps_per_call) for first in range(0, train.steps, train.steps_per_call)]
history, started = [], time.perf_counter()
for steps, batches in zip(plan, data.batches(train.seed, plan, train.batch_size), strict=True):
    run, values = call(run, partitioning.put_batch(mesh, batches, leading=1), jnp.int32(len(steps)))
    values = jax.tree.map(np.asarray, values)
    history += [metrics.summarize(jax.tree.map(lambda x, i=i: x[i], values)) for i in range(len(steps))]
    if steps.start % (4 * train.steps_per_call) == 0:
        print(f"step {steps.stop:>4}  loss {history[-1]['loss']:.3f}  {time.perf_counter() - started:.0f} s")

after = evaluate(run.variables, rows)
print(f"held out, after: {heldout.describe(after)}")
assert after["bits_per_byte"] < before["bits_per_byte"]

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
axes[0].plot(np.arange(1, len(history) + 1), [entry["loss"] for entry in history], color="#0f6b57", lw=1)
axes[0].set(title="training loss: noisy, as the weight 1/t is", xlabel="step", ylabel="nats a token")
levels = np.linspace(0, 1, len(after["loss_by_level"]) + 1)
for figures, color, name in ((before, "#bbbbb5", "before"), (after, "#0f6b57", "after")):
    axes[1].stairs([np.nan if x is None else x for x in figures["loss_by_level"]], levels, color=color, lw=2, baseline=None, label=name)
axes[1].set(title="held out, by noise level", xlabel="share of tokens masked", ylabel="nats a masked token", ylim=(0, None))
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Writing
#
# A request is a list of given tokens and gaps. The decoder fills the gaps block by block: at every step the model proposes a
# token for each open slot, and some are written: any (`random`), or the surest (`low_confidence`, LLaDA's rule). All of it is one
# jitted loop. Here each forward writes one token; `steps` sets fewer forwards, which then write several each. After so short a
# training the text has the look of Python and no more, and the surest token of a weak model is a dull one; the demo trains longer.

# %%
from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling import engine, presets, viewer


def write(text, decoder):
    """Decode one request; the trace and its row for the viewer."""
    request = canvas_lib.parse(text, tokenizer, decoder.gen_length)
    canvas = canvas_lib.build([request], block_length=decoder.block_length, mask_id=tokenizer.mask_id, pad_id=tokenizer.pad_id,
                              max_length=config.model.max_length)
    canvas = canvas_lib.pad_rows(canvas, partitioning.batch_shards(mesh))
    names = np.arange(len(canvas.tokens_BT), dtype=np.int32)
    _, trace = engine.generate(engine.Denoiser.of(model), run.variables, canvas_lib.Canvas(*partitioning.put_batch(mesh, tuple(canvas))),
                               decoder, key=jax.random.key(0), row_B=partitioning.put_batch(mesh, names),
                               mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id)
    trace = jax.device_get(trace)
    return trace, viewer.rows(trace, canvas, tokenizer.decode, [text], {tokenizer.eos_id: "∎"})[0]


length = 16 if TINY else 64
for name in ("random", "low_confidence"):
    decoder = presets.build(name, {"gen_length": length, "block_length": length // 2, "temperature": 0.8})
    trace, row = write("def read(path):\n", decoder)
    print(f"── {name}: {sum(step >= 0 for step in row.step)} tokens in {row.forwards} forwards\n{''.join(row.text)}\n")

# %% [markdown]
# ## In which order?
#
# The trace says for each token which forward wrote it and how sure the model was: enough to rebuild every state in between.
# This is the second of the two.

# %%
written = np.array(row.step) >= 0
fig, axis = plt.subplots(figsize=(10, 2.6), layout="constrained")
dots = axis.scatter(np.flatnonzero(written), np.array(row.step)[written] + 1, c=[p for p, new in zip(row.prob, written, strict=True) if new],
                    vmin=0, vmax=1, cmap="viridis", s=18)
axis.set(title="block by block, within a block the surest first", xlabel="token", ylabel="forward")
fig.colorbar(dots, label="probability")
plt.show()

# %%
import base64


def draw(row):
    """Show every state of a decode's row (see viewer.picture) as one picture."""
    svg = base64.b64encode(viewer.picture(row, columns=60).encode()).decode()
    display(HTML(f'<img alt="decode" src="data:image/svg+xml;base64,{svg}">'))


draw(row)

# %% [markdown]
# ## Filling gaps
#
# Tokens are written in any order, so a gap may stand anywhere, and more than one may be open at once.

# %%
decoder = presets.build("random", {"gen_length": length, "block_length": length // 2, "temperature": 0.5})
trace, row = write("def area(width, height):\n<|mask:12|>\n    return <|mask:6|>\n", decoder)
print("".join(row.text))
draw(row)

# %% [markdown]
# ## A published layout
#
# The same model definition loads checkpoints in LLaDA-MoE's layout. This one is tiny, with random weights; beside it lie the
# numbers that the PyTorch reference gave.

# %%
from llada_jax.interop import hf_config, hf_weights

folder = ROOT / "tests" / "data" / "checkpoints" / "llada_moe"
published = hf_config.read(str(folder))
theirs = transformer.build(published.model)
variables = jax.tree.map(jnp.asarray, hf_weights.load(str(folder), published.family, theirs.shapes))
golden = np.load(folder / "golden.npz")
noised = jnp.asarray(golden["input/noised"])
positions = jnp.broadcast_to(jnp.arange(noised.shape[1]), noised.shape)
with jax.default_matmul_precision("highest"):
    hidden, _, _ = jax.jit(theirs.apply)(variables, noised, positions)
    logits = np.asarray(theirs.head(variables, hidden))
difference = np.abs(logits - golden["full/logits"]).max()
print(f"{count.parameters(published.model).total:,} parameters; logits up to {np.abs(logits).max():.2f}; largest difference {difference:.1e}")
assert difference < 2e-5

# %% [markdown]
# ## On from here
#
# `README.md` has the commands that do all this with checkpoints, curves and a page that replays a decode, and a map of the code.

# %%
assert not flags.FLAGS.is_parsed()
