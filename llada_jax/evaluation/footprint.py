"""Memory of a training step on one device in closed form, by class, and what to change when it does not fit."""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from llada_jax import config as config_lib
from llada_jax import partitioning
from llada_jax.diffusion import blocks
from llada_jax.evaluation import hardware
from llada_jax.evaluation.hardware import GIB
from llada_jax.model import expert_parallel, transformer
from llada_jax.training import optimizer, state
from llada_jax.training.metrics import say


class Footprint(NamedTuple):
    """Bytes of one device at the moment of a step that needs most. State and batch are exact, from shapes and shardings; the rest is an estimate
    of what XLA makes of it: within 7 % of libtpu's peaks for the 27 steps of tests/data/peaks.json, to most of which it was fitted (models of 93 M,
    7 B and 16 B on 4 to 512 chips, all remats; jax 0.10.2, libtpu 0.0.42.1, November 2026). Nothing else, a GPU or preference optimisation
    least of all, has been compared."""

    weights: float
    moments: float
    average: float
    reference: float
    batch: float
    gradients: float  # of the layers in the compute dtype; float32 sums of all with micro-batches, and in the update
    copies: float  # this device's share of the layers' weights in the compute dtype
    activations: float  # kept from the forward for the backward pass
    working: float  # one whole layer and all that its backward pass computes beside the vocabulary's matrix; that matrix and its gradient

    @property
    def total(self) -> float:
        return sum(self)


def local_bytes(tree: Any) -> int:
    """Bytes of one device's share of arrays that are described with their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def tokens_at_once(config: config_lib.Config) -> float:
    """Tokens of one micro-batch on one device (the mesh without -1), twice for block diffusion, where the model sees them noisy and clean."""
    mesh, length = config.mesh, config.data.sequence_length * (1 + blocks.Schedule.of(config).clean_half())
    return config.train.batch_size * length / (config.train.accumulate * mesh.data * mesh.fsdp * mesh.expert)


def of_training(config: config_lib.Config) -> Footprint:
    """The estimate for a config whose mesh has no -1 and whose vocabulary is known: of the layers' backward pass, of the vocabulary head's, and of
    the update, the one that needs most."""
    model, mesh, c = config.model, config.mesh, jnp.dtype(config.model.compute_dtype).itemsize
    like, language_model = _state(config.model, config.optimizer, config.diffusion, config.train.steps)
    grid = partitioning.described_mesh(mesh)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    held = jax.tree.map(place, like, state.shardings(language_model, like, grid))
    local = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
    sizes = lambda tree: (local(tree), local([tree[name] for name, _, _ in transformer.stacks(model)]))
    params, layers = sizes(held.variables["params"])
    free, free_layers = sizes(optimizer.chosen(optimizer.trainable(config.optimizer, held.variables["params"]), held.variables["params"]))
    head = c * model.vocab_size * model.hidden_size / mesh.tensor
    batch = config.train.steps_per_call * config.train.batch_size * (3 * 4 + 1) * config.data.sequence_length / (mesh.data * mesh.fsdp * mesh.expert)
    trees = held.variables, held.opt_state, held.ema, held.reference
    before = Footprint(*map(local_bytes, trees), batch, gradients=0.0, copies=0.0, activations=kept(config), working=0.0)
    copies = lambda number: float(c * number if c < 4 else 0)
    several = config.train.accumulate > 1 or config.diffusion.objective == "preference"  # draws are a loop too
    moments = (
        # XLA puts the gradient of the head, for which its matrix is needed, after the layers' backward pass, unless that is a loop's body
        before._replace(gradients=4.0 * free if several else float(c * free_layers), copies=copies(layers),
                        working=_layer(config) + head * (not several)),
        before._replace(gradients=4.0 * free * several, copies=copies(params), working=2 * head),
        before._replace(gradients=4.0 * free, activations=0.0))
    return max(moments, key=lambda footprint: footprint.total)


def kept(config: config_lib.Config) -> float:
    """Bytes that a device keeps from the forward for the backward pass of a micro-batch."""
    model, mesh, c = config.model, config.mesh, jnp.dtype(config.model.compute_dtype).itemsize
    M, total = tokens_at_once(config), 0.0
    for _, kind, length in transformer.stacks(model):
        values, rows = _per_token(model, kind, mesh), _rows(config, kind)
        layer = M * {"full": model.hidden_size, "dots": values.dots, "none": values.everything}[model.remat]
        total += c * length * (layer + (rows.kept if model.remat == "none" else rows.sent))
    return total


def _layer(config: config_lib.Config) -> float:
    """Bytes of one whole layer and of what its backward pass has at once; of the kind that needs most."""
    model, mesh, c = config.model, config.mesh, jnp.dtype(config.model.compute_dtype).itemsize
    M, most = tokens_at_once(config), 0.0
    for kind in {kind for _, kind, _ in transformer.stacks(model)}:
        rows = _rows(config, kind)
        weights = sum(math.prod(p.shape) / (mesh.expert if p.axes[0] == "experts" else 1)
                      for p in transformer.layer_parameters(model, kind).values()) / mesh.tensor
        again = 0.0 if model.remat == "none" else rows.kept
        most = max(most, c * (weights * (1 + rows.summed) + M * _per_token(model, kind, mesh).everything + again + rows.backward))
    return most


def received(model: config_lib.Model, mesh: config_lib.Mesh, tokens: float) -> float:
    """Rows that travel to a device of the expert axis in one transfer, from all of its devices: their slots, be they filled or not."""
    return mesh.expert * expert_parallel.slots(math.ceil(tokens), model.num_experts, model.experts_per_token, model.num_experts // mesh.expert)


class _PerToken(NamedTuple):
    """Numbers of values a token of one layer without its experts: of all intermediates, and of those that are kept with remat=dots."""

    everything: float
    dots: float


def _per_token(model: config_lib.Model, kind: str, mesh: config_lib.Mesh) -> _PerToken:
    D, N, K, H, t = model.hidden_size, model.num_heads, model.kv_heads, model.head_size, mesh.tensor
    qkv = (N + 2 * K) * H / t  # projected, normed, rotated, and the norms' factors
    dense = (model.dense_size if kind == "dense" else model.shared_expert_size) / t  # gate, up and what their product is made of
    return _PerToken(4 * D + 4 * qkv + N * H / t + 6 * dense, 2 * D + qkv + 2 * dense)


class _Rows(NamedTuple):
    """Numbers of values that a device holds of the rows of its experts, in one layer."""

    sent: float = 0.0  # that came from other devices, kept whatever remat says
    kept: float = 0.0  # that the backward pass needs
    backward: float = 0.0  # that it has beside these at its worst
    summed: bool = False  # gradients of the weights are summed up part by part, beside the weights


def _rows(config: config_lib.Config, kind: str) -> _Rows:
    """Experts take rows of D values, make two and their product of F, and give D. The lossless branch counts even if it is never taken: it computes
    all choices of the tokens under way again, in room that is there beside what the usual branch has kept. That one's backward pass gathers a
    row for every choice that a received token might have, and sums them in float32."""
    model, mesh = config.model, config.mesh
    if kind != "moe":
        return _Rows()
    M, P, A = math.ceil(tokens_at_once(config)), mesh.expert, model.experts_per_token
    D, F, number = model.hidden_size, model.expert_size / mesh.tensor, model.num_experts // mesh.expert
    if P == 1:
        return _Rows(kept=M * A * (2 * D + 3 * F), backward=M * A * (2 * D + 3 * F))
    parts = expert_parallel.gathered_parts(M, P)
    under_way = M * P / parts
    if parts == 1:
        lossless = _Rows(kept=under_way * A * (2 * D + 3 * F), backward=under_way * A * (2 * D + 3 * F))
    else:
        lossless = _Rows(backward=under_way * (A * (2 * D + 6 * F) + D), summed=True)
    if not expert_parallel.exchanges(config.kernels.expert_dispatch, M, model.num_experts, A, number):
        return lossless
    sent = D * received(model, mesh, M)
    usual = expert_parallel.ROOM * M * A * (2 * D + 2 * F)
    return _Rows(sent, usual, max(lossless.kept + lossless.backward, sent * (A + 3)), lossless.summed)


@functools.lru_cache(maxsize=8)
def _state(model: config_lib.Model, rule: config_lib.Optimizer, diffusion: config_lib.Diffusion,
           steps: int) -> tuple[state.TrainState, transformer.LanguageModel]:
    built = transformer.build(model)
    update = optimizer.make(rule, steps, built.shapes["params"])
    return jax.eval_shape(lambda: state.create(built, update, config_lib.Config(model=model, diffusion=diffusion, optimizer=rule))), built


# ---- out of memory ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(config: config_lib.Config, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """`reraise` what making the state, or a training step, inside ends with."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reraise(error, config, mesh)


def reraise(error: jax.errors.JaxRuntimeError, config: config_lib.Config, mesh: jax.sharding.Mesh) -> NoReturn:
    """Raise what a training step ended with; where memory ran out, print the estimate by class first and raise ConfigError with the changes
    that would fit."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    device = mesh.devices.flat[0]
    chip, statistics = hardware.chip_of(device.device_kind), device.memory_stats() or {}
    used, limit = asked(str(error))
    limit = limit or statistics.get("bytes_limit") or (chip.usable * GIB if chip else 0)
    config = dataclasses.replace(config, mesh=config_lib.Mesh(*(mesh.shape[axis] for axis in partitioning.AXES)))
    lines = out_of_memory_advice(config, limit, used).splitlines()
    say("\n".join(lines[:-1]))
    raise config_lib.ConfigError(lines[-1]) from error


def out_of_memory_advice(config: config_lib.Config, limit: float, used: float = 0.0) -> str:
    """The estimate by class, then in the last line two changes that would fit in `limit` bytes a device, or, where the device does not say
    how much it has (0), that halve the estimate.

    `used`: bytes that the compiler wanted, if it said so. As the step did not fit, an estimate below the limit is too low: all
    estimates are scaled by as much as the present one falls short.
    """
    now = of_training(config)
    scale = max(1.0, used / now.total, 1.01 * limit / now.total)
    wanted, room = scale * now.total, limit or scale * now.total / 2
    there = f"{limit / GIB:.2f} GiB a device" if limit else "more than there is"
    lines = [f"out of memory: {wanted / GIB:.2f} GiB wanted, {there}", describe(now, scale)]
    changed = [(words, of_training(other).total * scale) for words, other in _changes(config)]
    found = [f"{words} ({total / GIB:.2f} GiB)" for words, total in changed if total <= room][:2]
    if found:
        goal = f"to fit in {limit / GIB:.2f} GiB a device" if limit else "to need at most half of that"
        lines.append(f"out of memory; estimated {goal}: {', or '.join(found)}")
    else:
        least = min([wanted, *(total for _, total in changed)])
        more = f" of {limit / GIB:.2f} GiB a device: take at least {math.ceil(least / limit)} times as many" if limit else ": take more"
        lines.append(f"out of memory: no change of accumulation, remat, mesh, batch or length {'fits' if limit else 'halves it'}; the least is "
                     f"{least / GIB:.2f} GiB{more} devices and put them on mesh.fsdp")
    return "\n".join(lines)


def describe(footprint: Footprint, scale: float = 1.0) -> str:
    """One line: every class with its GiB."""
    parts = [f"{name} {size * scale / GIB:.2f}" for name, size in footprint._asdict().items() if size]
    return f"GiB a device, estimated: {', '.join(parts)}; together {footprint.total * scale / GIB:.2f}"


def asked(message: str) -> tuple[float, float]:
    """(bytes wanted, bytes that there are) as libtpu says it, `Used 22.3G of 15.75G hbm` or `required for HLO temporaries (22.3G) exceeds
    available HBM (15.75G)`; zeros where a message does not say."""
    found = re.search(r"sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", message) or \
        re.search(r"\(([\d.]+)([KMGT])\) exceeds available \w+ \(([\d.]+)([KMGT])\)", message)
    size = lambda number, unit: float(number) * 1024.0 ** ("KMGT".index(unit) + 1)
    return (size(found[1], found[2]), size(found[3], found[4])) if found else (0.0, 0.0)


def _changes(config: config_lib.Config) -> Iterator[tuple[str, config_lib.Config]]:
    """Settings that need less memory, as flags and as a config: one change first, then combinations, and at last what trains on less at once."""
    train, mesh = config.train, config.mesh
    shards, order = mesh.data * mesh.fsdp * mesh.expert, ("none", "dots", "full")
    parts = [n for n in (train.accumulate * 2**i for i in range(1, 11)) if train.batch_size % (n * shards) == 0]
    meshes = [dataclasses.replace(mesh, data=mesh.data // n, fsdp=mesh.fsdp * n) for n in (2**i for i in range(1, 11)) if mesh.data % n == 0]
    kinds = (
        [(f"--config.train.accumulate={n}", {"train": dataclasses.replace(train, accumulate=n)}) for n in parts],
        [(f"--config.model.remat={name}", {"model": dataclasses.replace(config.model, remat=name)})
         for name in order[order.index(config.model.remat) + 1 :]],
        [(f"--config.mesh.data={m.data} --config.mesh.fsdp={m.fsdp}", {"mesh": m}) for m in meshes])
    for one in itertools.chain.from_iterable(itertools.zip_longest(*kinds)):  # one of each kind before more of the same
        if one:
            yield one[0], dataclasses.replace(config, **one[1])
    merged = lambda changes: dataclasses.replace(config, **{key: value for _, change in changes for key, value in change.items()})
    unchanged: tuple[str, dict[str, Any]] = ("", {})
    for together in itertools.product(*([unchanged, *kind] for kind in kinds)):
        if sum(bool(words) for words, _ in together) > 1:
            yield " ".join(words for words, _ in together if words), merged(together)
    most = [kind[-1] for kind in kinds if kind]
    for rows in (train.batch_size // 2**i for i in range(1, 11)):
        if rows and rows % shards == 0:
            smaller = dataclasses.replace(train, batch_size=rows, accumulate=rows // shards)
            words = f"--config.train.batch_size={rows}" + f" --config.train.accumulate={smaller.accumulate}" * (smaller.accumulate > 1)
            rest = [change for change in most if "train" not in change[1]]
            yield " ".join([*(words for words, _ in rest), words]), merged([*rest, ("", {"train": smaller})])
    for length in (config.data.sequence_length // 2**i for i in range(1, 7)):
        shorter = (f"--config.data.sequence_length={length}", {"data": dataclasses.replace(config.data, sequence_length=max(length, 1))})
        yield " ".join(words for words, _ in [*most, shorter]), merged([*most, shorter])
