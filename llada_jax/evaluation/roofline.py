"""The least time of a step: FLOPs at the chip's peak, bytes at its memory's rate, collectives at its links' rate.

`compiled` takes the collectives from a compiled program, `expected` from closed forms, which rank meshes before anything is compiled.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from llada_jax import config as config_lib
from llada_jax.diffusion import blocks
from llada_jax.evaluation import footprint, hardware
from llada_jax.evaluation.compiled_program import Collective
from llada_jax.evaluation.hardware import Position, Topology
from llada_jax.model import count, transformer


class Roofline(NamedTuple):
    """Seconds a step, each at least; `exposed` is the part of `transfers` that is synchronous, beside which nothing else runs."""

    compute: float
    memory: float
    transfers: float
    exposed: float
    model_flops: float  # of the whole step, without recomputation
    peak: float  # FLOP/s of all chips

    @property
    def overlapped(self) -> float:
        """Everything beside everything else."""
        return max(self.compute, self.memory, self.transfers)

    @property
    def as_compiled(self) -> float:
        """Asynchronous collectives beside the work, synchronous ones after it."""
        return max(self.compute, self.memory, self.transfers - self.exposed) + self.exposed

    @property
    def serial(self) -> float:
        """All collectives after the work."""
        return max(self.compute, self.memory) + self.transfers

    def mfu(self, seconds: float) -> float:
        """Share of the peak that the model's FLOPs are when a step takes so long."""
        return self.model_flops / (seconds * self.peak)


def compiled(config: config_lib.Config, topology: Topology, collectives: Sequence[Collective], places: Sequence[Position]) -> Roofline:
    """The bound of a compiled training step; `collectives` of the way that it usually goes, `places` of its devices in the mesh's order."""
    return _training(config, topology, *_spent(topology, collectives, places))


def sampling(config: config_lib.Config, block_length: int, topology: Topology, collectives: Sequence[Collective],
             places: Sequence[Position]) -> Roofline:
    """The bound of one forward of a compiled decoder, with the head on a block's positions: every chip reads all weights that it computes with."""
    model, mesh, T = config.model, config.mesh, config.data.sequence_length
    flops = count.forward_flops(model, T, head_share=block_length / T) * config.train.batch_size * T
    peak = topology.chip.peak * topology.size
    read = jnp.dtype(model.compute_dtype).itemsize * (_layers(model, mesh) + model.vocab_size * model.hidden_size / mesh.tensor)
    return Roofline(flops / peak, read / topology.chip.hbm_rate, *_spent(topology, collectives, places), flops, peak)


def seconds(collective: Collective, topology: Topology, places: Sequence[Position]) -> float:
    """The least time that a collective takes in a step; all its groups work at once."""
    return collective.count * max(hardware.seconds(collective.kind, collective.size, [places[i] for i in group], topology)
                                  for group in collective.groups)


def _spent(topology: Topology, collectives: Sequence[Collective], places: Sequence[Position]) -> tuple[float, float]:
    """(seconds of all collectives, of the synchronous ones)."""
    times = [(seconds(c, topology, places), c.asynchronous) for c in collectives]
    return sum(t for t, _ in times), sum(t for t, asynchronous in times if not asynchronous)


def _layers(model: config_lib.Model, mesh: config_lib.Mesh) -> float:
    """Parameters of all layers that one device computes with: its experts and its tensor-parallel share, gathered over the rest."""
    return sum(length * sum(math.prod(p.shape) / (mesh.expert if p.axes[0] == "experts" else 1) / mesh.tensor
                            for p in transformer.layer_parameters(model, kind).values()) for _, kind, length in transformer.stacks(model))


def expected(config: config_lib.Config, topology: Topology, places: Sequence[Position]) -> Roofline:
    """The bound of a training step from closed forms, for a config whose mesh has no -1; gathers and scatters of weights beside the work."""
    sizes = dataclasses.astuple(config.mesh)
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    total = exposed = 0.0
    for kind, size, number, axes, asynchronous in _expected(config):
        index = tuple(slice(None) if axis in axes else 0 for axis in range(len(sizes)))
        spent = number * hardware.seconds(kind, size, [places[i] for i in grid[index].reshape(-1).tolist()], topology)
        total, exposed = total + spent, exposed + (0.0 if asynchronous else spent)
    return _training(config, topology, total, exposed)


def _training(config: config_lib.Config, topology: Topology, transfers: float, exposed: float) -> Roofline:
    model, chip = config.model, topology.chip
    T, tokens = config.data.sequence_length, config.train.batch_size * config.data.sequence_length
    flops, peak = count.train_flops(config) * tokens, chip.peak * topology.size
    size, clean = count.parameters(model), blocks.Schedule.of(config).clean_half()
    again = {"none": 0.0,  # what the backward pass computes a second time, a token
             "full": count.forward_flops(model, T, head_share=0.0) + count.forward_flops(model, 0, head_share=0.0) * clean,
             "dots": 4.0 * model.num_layers * T * model.num_heads * model.head_size * 0.5
             + (2.0 * size.experts * model.experts_per_token / model.num_experts * (1 + clean) if model.moe_layers else 0.0)}[model.remat]
    return Roofline((flops + again * tokens) / peak, _memory_traffic(config) / chip.hbm_rate, transfers, exposed, flops, peak)


def _memory_traffic(config: config_lib.Config) -> float:
    """Bytes of HBM a device and step, at least: the update reads and writes state and gradients once; each micro-batch reads every whole
    layer in each of its passes and writes its gradient; what is kept for the backward pass, and the experts' rows, go out and come back."""
    held, model, mesh = footprint.of_training(config), config.model, config.mesh
    c, M = jnp.dtype(model.compute_dtype).itemsize, footprint.tokens_at_once(config)
    update = 2 * (2 * held.weights + held.moments + held.average)  # gradients are as large as the weights
    layers = _layers(model, mesh)
    passes = 3 + (model.remat != "none")  # forward, again, backward, and the gradient that is written
    rows = len(model.moe_layers) * M * model.experts_per_token * (2 * model.hidden_size + 3 * model.expert_size / mesh.tensor) * passes
    return update + config.train.accumulate * (c * (layers * passes + 3 * model.vocab_size * model.hidden_size + rows) + 2 * footprint.kept(config))


def _expected(config: config_lib.Config) -> list[tuple[str, float, int, tuple[int, ...], bool]]:
    """Collectives of a step as (kind, bytes of a device's operand, times, mesh axes by number, asynchronous).

    Sharded weights are gathered for the forward pass and again for the backward pass, their gradients scattered, in the compute dtype;
    copies of the model reduce gradients in float32; a token goes once to each device that holds one of its experts, and its output
    back, forward and backward; tensor-parallel layers reduce their activations twice a pass.
    """
    model, mesh, parts = config.model, config.mesh, config.train.accumulate
    c, M = jnp.dtype(model.compute_dtype).itemsize, footprint.tokens_at_once(config)
    data, fsdp, expert, tensor = range(4)
    found: list[tuple[str, float, int, tuple[int, ...], bool]] = []
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    local = (_layers(model, mesh) + embeddings / mesh.tensor) / mesh.fsdp
    found.append(("all-gather", c * local, 2 * parts, (fsdp,), True))
    found.append(("reduce-scatter", c * local * mesh.fsdp, parts, (fsdp,), True))
    found.append(("all-reduce", 4 * local, 1, (data,), True))
    if mesh.expert > 1 and model.moe_layers:
        rows = footprint.received(model, mesh, M)
        found.append(("all-to-all", rows * model.hidden_size * c, 4 * parts * len(model.moe_layers), (expert,), False))
    if mesh.tensor > 1:
        found.append(("all-reduce", M * model.hidden_size * c, parts * model.num_layers * (6 if model.remat == "full" else 4), (tensor,), False))
    return found


# ---- search -------------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A mesh and a number of micro-batches, with what closed forms say of them."""

    config: config_lib.Config
    bytes: float
    bound: Roofline

    @property
    def flags(self) -> str:
        mesh = " ".join(f"--config.mesh.{name}={size}" for name, size in dataclasses.asdict(self.config.mesh).items())
        return f"{mesh} --config.train.accumulate={self.config.train.accumulate}"


def search(config: config_lib.Config, topology: Topology, places: Sequence[Position], devices: int) -> list[Candidate]:
    """Every mesh of so many devices that divides experts, heads, widths, vocabulary and batch, with every power of two of micro-batches,
    whose estimate fits; by the bound with exposed collectives, then by memory. Raises ConfigError when there is none."""
    model, found, least = config.model, [], math.inf
    for mesh in meshes(model, devices):
        shards = mesh.data * mesh.fsdp * mesh.expert
        for parts in (2**i for i in range(20)):
            if config.train.batch_size % (shards * parts):
                break
            changed = dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, accumulate=parts))
            needed = footprint.of_training(changed).total
            least = min(least, needed)
            if needed <= topology.chip.usable * hardware.GIB:
                found.append(Candidate(changed, needed, expected(changed, topology, places)))
                break  # more micro-batches only gather the weights more often
    if not found:
        what = f"the least is {least / hardware.GIB:.1f} GiB a chip" if least < math.inf else \
            f"train.batch_size={config.train.batch_size} does not split over them"
        raise config_lib.ConfigError(f"no mesh of {devices} devices fits ({what}); take more chips, another batch or model.remat=full")
    return sorted(found, key=lambda c: (c.bound.as_compiled, c.bytes))


def meshes(model: config_lib.Model, devices: int) -> list[config_lib.Mesh]:
    """Factorisations of the devices into mesh axes that divide what they split."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    widths = [model.num_heads, model.kv_heads, model.vocab_size, *([model.expert_size] if model.moe_layers else []),
              *([model.dense_size] if model.dense_layers else [])]
    found = []
    for tensor in (n for n in divisors if all(width % n == 0 for width in widths)):
        for expert in (n for n in divisors if devices // tensor % n == 0 and (n == 1 or (model.moe_layers and model.num_experts % n == 0))):
            rest = devices // tensor // expert
            found += [config_lib.Mesh(data=rest // fsdp, fsdp=fsdp, expert=expert, tensor=tensor) for fsdp in divisors
                      if rest % fsdp == 0 and model.hidden_size % fsdp == 0]
    return found
