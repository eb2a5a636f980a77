"""How fast this machine is with our code, alone or beside PyTorch in the same minutes.

    python -m llada_jax.bench forward --baseline=torch     logits of a batch
    python -m llada_jax.bench train   --baseline=torch     optimizer steps
    python -m llada_jax.bench sample  --baseline=torch     one prompt continued by low-confidence remasking

Both sides have the same weights and run in turn, their order changing, --pairs times; compilation and warm-up are not counted. A line a side
gives its median and least time; the last line is `ratio: R (min A, max B, N pairs)`, R the median of PyTorch's time over ours, so
above 1 we are faster. PyTorch is the stock Qwen3-MoE class of transformers, with its default experts (`--baseline=torch_eager`: its
plain loop over them), made bidirectional, without a key/value cache, on all cores (--threads). Both compute in float32. A product of two
2048 × 2048 matrices on all of our devices, timed in the same rounds, tells what the machine gave. FLOPs are those that the task
needs, the same for both sides, so GFLOP/s compare times alone.

- forward: like for like. Logits of all positions, on both sides; their largest difference is printed.
- train: our real step, train.steps_per_call of them in one call, against PyTorch's usual one. Ours counts router losses, metrics and
  the learning-rate schedule besides, theirs does not; ours computes logits at masked positions only (on average half of them, which
  is what FLOPs count), theirs at all. Neither reads data: tokens are random.
- sample: a prompt of 32 random tokens, 128 new ones, 64 forwards, blocks of 32, temperature 0, against LLaDA's published loop: logits of
  the whole row and a float64 softmax over them at each forward, where ours computes those of the block (which is what FLOPs count),
  in float32. Both compute the whole row anew at each forward, but for our last layer, where the block alone asks (FLOPs count it whole, on
  both sides). How many tokens agree is printed.

`sample --workdir=RUN --decoder=NAME --cache=NAME` decodes with the weights of a run instead, by that decoder and cache (`--decoder.field=value` edits
them), where PyTorch writes one token a forward, low confidence first.

- A run on a task with exact answers: one instance of it, so speed at the quality that `evaluate --tasks` finds for both.
- A run on text: what a held-out row begins with, 128 tokens or what the run's sequence length has room for. Eight such rows (--rows), of which the
  first is timed, are continued by both sides, and all these texts, with what really follows, are scored by the same model given the prompt: an
  upper bound in bits a byte, from the same masks for all. It tells whether a faster decoder writes what the model finds less likely, not whether
  that is good: what is dull and repeats itself is likely too, and real text less so than what the model writes. Eight prompts are few; ± says
  how few. PyTorch decodes each once for that, in as long as so many of its timed calls. Without --baseline ours and the real text are scored.

`--config=FILE` (by default the command's preset of configs/bench.py) and `--config.group.key=value` change what is measured. One CPU device a core,
unless the config's mesh or JAX_NUM_CPU_DEVICES says otherwise; `sample` splits its heads, hidden widths and vocabulary over them.

Tried without gain (two cores of an AMD EPYC virtual machine, 2026-11-26; the last one 2026-11-27):

- XLA flags: --xla_cpu_multi_thread_eigen=false, the scheduler optimised for concurrency, vectors of 512 bits, fusion emitters.
- lax.cond around the optimizer's update in place of a select.
- other tiles of the experts' matrix products: 128 to 512 rows for large groups, 32 to 128 for small ones.
- experts that gather their tokens tile by tile, gate and up as one product, no gradient of y kept: 2 to 15 % slower than gathering all rows first.
- the tokens of an MoE layer as two independent halves in one program: XLA:CPU runs their loops one after the other (16 % slower).
- attention's gradient by hand, keeping one array of weights (5 % faster alone), or head by head within the cache (30 % slower on one device).
- huge pages for malloc (GLIBC_TUNABLES, hugetlb=1).
- model.remat in place of keeping activations.
- training with the experts split over two devices (2 to 5 % slower than one device with both cores in each product).
- sampling with the head's rows split too: what it saves goes into gathering the six small results.
- XLA's flags for products by oneDNN, XNNPACK and YNNPACK: no difference, so they may not be in the build.

What made sampling faster, 1066 to 763 ms together: one row split over the cores, one collective for all that is gathered at once, the last layer
computed at the block's positions alone, unrolled layers whose weights XLA takes out of the loop, argmax as two reductions. Then a fifth more
(757 to 607 ms within the same minutes): what follows a forward computed on every device (14 collectives a forward in place of 31), the loop over few
experts unrolled, so that their weights are not copied, counts by small matrix products in place of cumulative sums, heads and widths split in
place of experts and positions.

What made training faster, 339 to 281 ms a step (2026-11-27): the rotary tables and the ids of the mask computed once in a step, where XLA:CPU
had fused them into all that reads them in unrolled layers, cosines by layer and head and the cut of a row by pair of positions
(`functional.computed_once`); a gradient of the rotation without padding; projections as products of two matrices, whose gradients copy nothing.

What takes the time: of a training step the experts' products run at 60 % of the GEMM, since they come in tiles of 16 to 256 rows; of a decode's
forward a third is the experts' products (tiles of 32 rows, of which the choices fill 77 %), a seventh other products, a tenth collectives and
waiting for the other device.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from llada_jax import command_line, partitioning
from llada_jax import config as config_lib
from llada_jax.config import ConfigError
from llada_jax.diffusion import likelihood
from llada_jax.evaluation import continuation, hardware, tasks, torch_baseline
from llada_jax.model import count, transformer
from llada_jax.sampling import canvas as canvas_lib
from llada_jax.sampling import engine, presets
from llada_jax.sampling import trace as trace_lib
from llada_jax.training import optimizer, pretrained, state, step
from llada_jax.training.metrics import Announce

DEFAULT = "configs/bench.py:task={}"  # the command
CONFIG = config_flags.DEFINE_config_file("config", None, f"Config file, with an optional preset. Default: {DEFAULT.format('COMMAND')}.")
BASELINE = flags.DEFINE_enum("baseline", "none", ["none", "torch", "torch_eager"], "What ours is compared with.")
PAIRS = flags.DEFINE_integer("pairs", 9, "Measurements of each side.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", None, "Threads of PyTorch; all cores by default. Ours uses all cores.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "File for every measurement, as json.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of train, for `sample`: on a task with exact answers, or on text.")
ROWS = flags.DEFINE_integer("rows", 8, "Held-out texts that a run on text continues to be scored; the first one is timed.", lower_bound=2)

PROMPT = 32  # tokens
DECODER = {"gen_length": 128, "block_length": 32, "steps": 64}
SCORED = likelihood.Estimator()
GEMM = 2048  # rows and columns
PAUSE = 0.05  # seconds before each measurement: threads of the other side that wait by spinning fall asleep


class Setting(NamedTuple):
    """What the tasks below start from."""

    chosen: presets.Flags  # what the command line says of decoder and cache
    trained: pretrained.Trained | None  # weights in place of random ones

    config: config_lib.Config
    mesh: jax.sharding.Mesh
    model: transformer.LanguageModel
    rng: np.random.Generator
    stock: Callable[[Any], Any] | None  # PyTorch's model with these variables, where there is a baseline

    @property
    def mask_id(self) -> int:
        return self.trained.tokenizer.mask_id if self.trained else self.config.model.vocab_size - 1

    @property
    def eos_id(self) -> int:
        return self.trained.tokenizer.eos_id if self.trained else 0

    def request(self) -> continuation.Request:
        """What a trained model was trained to continue; 32 random tokens for an untrained one."""
        if self.trained:
            return continuation.of_run(self.config, self.trained.tokenizer, self.chosen, ROWS.value)
        return continuation.request(self.tokens(1, PROMPT), self.chosen, DECODER)

    def tokens(self, *shape: int) -> np.ndarray:
        return self.rng.integers(0, self.mask_id, shape, np.int32)


class Task(NamedTuple):
    """Two ways to do the same, and what they do."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None
    compare: Callable[[Any, Any], dict[str, Any]]  # of their results: figures by name
    flops: float  # of a call
    tokens: int  # of a call: read, trained on, or new ones
    steps: int = 1  # of a call; times are a step's
    quality: Callable[[], dict[str, Any]] | None = None  # what the results are worth, where that takes more than one call of each


def forward(setting: Setting) -> Task:
    """Logits of every position of one batch."""
    config, model = setting.config, setting.model
    B, T = config.train.batch_size, config.data.sequence_length
    variables, tokens_BT = _variables(setting), setting.tokens(B, T)
    batch = partitioning.put_batch(setting.mesh, (tokens_BT, _positions(B, T)))
    logits = jax.jit(lambda variables, tokens, positions: model.head(variables, model.apply(variables, tokens, positions)[0]))
    theirs = torch_baseline.forward(setting.stock(variables), tokens_BT) if setting.stock else None

    def compare(ours_BTV, theirs_BTV):
        ours_BTV, theirs_BTV = np.asarray(ours_BTV), np.asarray(theirs_BTV)
        return {"largest logit": float(np.abs(theirs_BTV).max()), "largest difference": float(np.abs(ours_BTV - theirs_BTV).max())}
    return Task(lambda: logits(variables, *batch), theirs, compare, B * T * count.forward_flops(config.model, T), B * T)


def train(setting: Setting) -> Task:
    """`train.steps_per_call` optimizer steps."""
    config, model, mesh = setting.config, setting.model, setting.mesh
    K, B, T = config.train.steps_per_call, config.train.batch_size, config.data.sequence_length
    update = optimizer.make(config.optimizer, config.train.steps, model.shapes["params"])
    create = lambda: state.create(model, update, config)
    shardings = state.shardings(model, jax.eval_shape(create), mesh)
    run = jax.jit(create, out_shardings=shardings)()
    tokens_KBT, count_K = setting.tokens(K, B, T), jnp.int32(K)
    ones = np.ones((K, B, T), np.int32)
    batches = partitioning.put_batch(mesh, {
        "tokens": tokens_KBT, "segment": ones, "position": ones * np.arange(T, dtype=np.int32), "maskable": ones > 0,
        "index": np.tile(np.arange(B, dtype=np.int32), (K, 1))}, leading=1)
    call = step.make_call(step.make_step(model, update, config, setting.mask_id), shardings)
    theirs = torch_baseline.train(setting.stock(run.variables), config, tokens_KBT, setting.mask_id) if setting.stock else None

    def ours():
        nonlocal run
        run, metrics = call(run, batches, count_K)
        return run, metrics["loss"]

    def compare(ours, theirs):
        return {"loss of ours": float(ours[1][-1]), "loss of theirs, under other noise": theirs}
    return Task(ours, theirs, compare, K * B * T * count.train_flops(config), K * B * T, K)


def sample(setting: Setting) -> Task:
    """One prompt continued."""
    config, model, mesh, trained = setting.config, setting.model, setting.mesh, setting.trained
    request, variables = setting.request(), _variables(setting)
    decoder, one = request.decoder, request.one
    stock = setting.stock(variables) if setting.stock else None
    P = request.prompt_BP.shape[1]
    T = P + decoder.gen_length

    def place(prompt, b):
        canvas = canvas_lib.build([[prompt.tolist(), decoder.gen_length]], block_length=decoder.block_lengths, mask_id=setting.mask_id, pad_id=0,
                                  max_length=config.model.max_length)
        return canvas_lib.Canvas(*partitioning.put_batch(mesh, tuple(canvas))), partitioning.put_batch(mesh, np.array([b], np.int32))
    placed = [place(prompt, b) for b, prompt in enumerate(request.prompt_BP)]

    def ours(b=0):
        canvas, row_B = placed[b]
        return engine.generate(engine.Denoiser.of(model), variables, canvas, decoder, cache=request.cache, key=jax.random.key(0), row_B=row_B,
                               mask_id=setting.mask_id, eos_id=setting.eos_id, compiler_options=partitioning.compiler_options(variables))

    def theirs(b=0):
        return torch_baseline.sample(stock, request.prompt_BP[b], one, setting.mask_id)()

    def compare(ours, theirs):
        tokens_T, trace = np.asarray(ours[0])[0], ours[1]
        figures = {"new tokens": decoder.gen_length, "that agree": int((tokens_T == theirs)[P:].sum()), "our steps": int(trace.steps_B[0])}
        if trained and request.answer:
            right = [trained.tokenizer.decode(x[P:].tolist()) == request.answer for x in (tokens_T, theirs)]
            return figures | {"ours is right": right[0], "theirs is right": right[1]}
        if trained or (tokens_T == theirs).all():
            return figures
        rows = [canvas_BT[0] for canvas_BT in trace_lib.canvases(trace)]
        for i, (row_T, other) in enumerate(zip(rows, torch_baseline.decode(stock, request.prompt_BP[0], one, setting.mask_id), strict=True)):
            if (row_T != other.tokens_T.numpy()).any():
                token, slot = other.margins()
                return figures | {"first forward that differs": i, "its smallest lead of a token": token, "of a slot": slot}
        raise RuntimeError("the baseline gave two results for one prompt")

    def quality():
        found = [jax.device_get(ours(b)) for b in range(len(placed))]
        texts = {"ours": np.stack([tokens_BT[0, P:] for tokens_BT, _ in found])}
        more = {"ours": {"forwards": float(np.mean([sum(count_B[0] for count_B in trace.forwards.values()) for _, trace in found]))}}
        if stock:
            texts["torch"] = np.stack([theirs(b)[P:] for b in range(len(placed))])
            more["torch"] = {"forwards": float(steps), "agree": int((texts["torch"] == texts["ours"]).sum())}
        figures = continuation.bits(model, variables, mesh, trained.tokenizer, request.prompt_BP, texts | {"held-out text": request.text_BC}, SCORED)
        return {"prompts": len(placed), "prompt_tokens": P, "new_tokens": decoder.gen_length, "draws": SCORED.draws,
                "texts": {name: own | more.get(name, {}) for name, own in figures.items()}}
    steps = one.steps or one.gen_length
    flops = steps * T * count.forward_flops(config.model, T, one.block_length / T)
    return Task(ours, theirs if stock else None, compare, flops, decoder.gen_length, quality=quality if request.text_BC is not None else None)


def main(name: str, chosen: presets.Flags = presets.Flags()) -> None:
    """Measure the task `name` and print its lines. Raises ConfigError for settings or packages that stand in the way."""
    # ---- settings -----------------------------------------------------------------------------------------------------
    config, trained = config_lib.from_config_dict(CONFIG.value), None
    if name != "sample" and (WORKDIR.value or chosen.given):
        raise ConfigError(f"--{'workdir' if WORKDIR.value else chosen.given} goes with `bench sample`")
    if WORKDIR.value:
        trained = pretrained.open_weights(WORKDIR.value, None, None, "params", None)
        config = dataclasses.replace(trained.config, mesh=config.mesh)
        if config.diffusion.model_kind != "masked":
            raise ConfigError(f"{WORKDIR.value} was trained with diffusion.objective={config.diffusion.objective}; only masked-diffusion models "
                              "write here")
    if ROWS.present and (not trained or config.data.sources in tasks.TASKS):
        raise ConfigError("--rows goes with `bench sample --workdir=RUN` of a run trained on text")
    if not config.model.vocab_size:
        raise ConfigError("the config leaves model.vocab_size to the tokenizer; add for example --config.model.vocab_size=1024")
    if OUT.value:
        epath.Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        epath.Path(OUT.value).write_text("")  # fails now if it has to
    compared = BASELINE.value != "none"
    if compared:
        torch_baseline.check(config, train=name == "train")

    # ---- devices, model, both sides -----------------------------------------------------------------------------------
    partitioning.setup_devices(_divisible(config) if name == "sample" else config.train.batch_size // config.train.accumulate, mesh=config.mesh)
    command_line.use_compilation_cache()
    mesh = partitioning.make_mesh(config.mesh)
    if name != "sample":
        partitioning.check_batch(config.train.batch_size, config.train.accumulate, mesh)
    if compared and jax.default_backend() != "cpu":
        raise ConfigError(f"PyTorch runs on the CPU here and ours on {jax.devices()[0].device_kind}; set JAX_PLATFORMS=cpu, or leave out --baseline")
    print(f"{name}: {_describe(config, name)}\n{_machine()}", flush=True)
    stocks = []

    def stock(variables):
        stocks.append(torch_baseline.build(config.model, variables, THREADS.value or partitioning.cores(),
                                           "eager" if BASELINE.value == "torch_eager" else None))
        print(torch_baseline.describe(stocks[0]), flush=True)
        return stocks[0]

    setting = Setting(chosen, trained, config, mesh, transformer.build(config.model, config.kernels, mesh), np.random.default_rng(config.train.seed),
                      stock if compared else None)
    task = COMMANDS[name](setting)
    sides = {"ours": task.ours} | ({"torch": task.theirs} if task.theirs else {}) | {"GEMM": _gemm(mesh)}

    # ---- warm-up, comparison ------------------------------------------------------------------------------------------
    results = {}
    for side, call in sides.items():
        with Announce(f"{'compiling and ' if side != 'torch' else ''}warming up {side}"):
            for _ in range(2):
                results[side] = jax.block_until_ready(call())
    figures = task.compare(results["ours"], results["torch"]) if compared else {}
    if compared:
        print("results: " + ", ".join(f"{key} {value:.6g}" for key, value in figures.items()), flush=True)
    results.clear()
    quality = {}
    if task.quality:
        with Announce("continuing held-out texts, scoring them"):
            quality = task.quality()
        print(continuation.describe(quality), flush=True)

    # ---- measurement --------------------------------------------------------------------------------------------------
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    seconds = measure(sides, PAIRS.value)
    flops = {"ours": 0.0 if trained else task.flops, "torch": task.flops, "GEMM": 2.0 * GEMM**3}  # a decoder of fewer forwards needs fewer
    rate = {side: flops[side] / statistics.median(times) for side, times in seconds.items()}
    for side, times in seconds.items():
        steps = 1 if side == "GEMM" else task.steps
        per, tokens = " a step" if steps > 1 else "", "" if side == "GEMM" else f"{task.tokens / statistics.median(times):,.0f} tokens/s, "
        of_gemm = f"{rate[side] / 1e9:.1f} GFLOP/s, {rate[side] / rate['GEMM']:.0%} of the GEMM" if rate[side] else "of fewer forwards"
        print(f"{side:<6} median {1e3 * statistics.median(times) / steps:.1f} ms{per}, min {1e3 * min(times) / steps:.1f} ms, {tokens}{of_gemm}")
    print(f"load average before: {'unknown' if load is None else f'{load:.2f}'}")
    ratios = [theirs / ours for theirs, ours in zip(seconds.get("torch", []), seconds["ours"], strict=False)]
    if OUT.value:
        record = {"command": name, "baseline": BASELINE.value, "machine": _machine(), "load_before": load, "seconds": seconds, "flops": flops,
                  "steps_per_call": task.steps, "results": figures, "quality": quality, "ratios": ratios, "config": config_lib.flatten(config)}
        record |= {"torch": torch_baseline.describe(stocks[0])} if compared else {}
        epath.Path(OUT.value).write_text(json.dumps(record, indent=2) + "\n")
    if compared:
        print(f"ratio: {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f}, {len(ratios)} pairs)")


def measure(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call of each side; in every other round they take their turns backwards."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(rounds):
        for side in list(sides)[:: 1 if i % 2 == 0 else -1]:
            time.sleep(PAUSE)
            start = time.perf_counter()
            jax.block_until_ready(sides[side]())
            seconds[side].append(time.perf_counter() - start)
    return seconds


def _divisible(config: config_lib.Config) -> int:
    """What the devices that one row is decoded on have to divide."""
    model, sizes = config.model, {1}
    if config.mesh.tensor == -1:
        widths = (model.expert_size if model.moe_layers else 0, model.dense_size if model.dense_layers else 0)  # gcd(x, 0) = x
        sizes = {model.kv_heads, model.vocab_size, *widths}
    elif config.mesh.expert == -1:
        sizes = {model.num_experts}
    return math.gcd(*sizes)


def _variables(setting: Setting) -> Any:
    model = setting.model
    shardings = partitioning.shardings_of(setting.mesh, model.axes, model.shapes)
    if setting.trained:
        return setting.trained.load(model.shapes, shardings)
    return jax.jit(model.init, out_shardings=shardings)(jax.random.key(setting.config.train.seed))


def _positions(B: int, T: int) -> np.ndarray:
    return np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


def _gemm(mesh: jax.sharding.Mesh) -> Callable[[], jax.Array]:
    """A float32 matrix product, its rows split over the devices."""
    x = np.random.default_rng(0).standard_normal((GEMM, GEMM), np.float32)
    rows = jax.device_put(x, partitioning.sharding(mesh, "alone", None, shape=x.shape))
    whole = jax.device_put(x, partitioning.replicated(mesh))
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(rows, whole)


def _describe(config: config_lib.Config, name: str) -> str:
    size = count.parameters(config.model)
    task = (WORKDIR.value if WORKDIR.value else f"{PROMPT} + {DECODER['gen_length']} tokens, {DECODER['steps']} forwards" if name == "sample" else
            f"{config.train.batch_size} × {config.data.sequence_length} tokens" +
            (f", {config.train.steps_per_call} steps a call" if name == "train" else ""))
    return f"{task}; {size.total:,} parameters, {size.active:,} active a token, {config.model.compute_dtype}"


def _machine() -> str:
    """Processor, cores, devices and versions."""
    return (f"{hardware.processor()}, {partitioning.cores()} core(s), "
            f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), Python {platform.python_version()}, jax {jax.__version__}")


COMMANDS = {"forward": forward, "train": train, "sample": sample}


def run() -> None:
    """Take the command out of the command line, then parse the rest. A default of the flag itself would be read while importing."""
    if not any(word.partition("=")[0] in ("--config", "-config") for word in sys.argv):
        first = next((i for i, word in enumerate(sys.argv) if word.startswith("-")), len(sys.argv))
        sys.argv.insert(first, f"--config={DEFAULT.format(sys.argv[1] if sys.argv[1:2] and sys.argv[1] in COMMANDS else 'train')}")
    try:
        chosen, sys.argv[:] = presets.split_flags(sys.argv)
    except ConfigError as error:
        command_line.fail(error)
    command_line.run_commands({name: functools.partial(main, name, chosen) for name in COMMANDS})


if __name__ == "__main__":
    run()
