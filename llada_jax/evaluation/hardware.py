"""Chips and how they are wired: peaks, memory, links, the names of slices, and the least time that a collective takes on them."""

import dataclasses
import math
import pathlib
import platform
import re
from collections.abc import Sequence
from typing import NamedTuple

from llada_jax.config import ConfigError, nearest

GIB = 2**30
GPUS_A_HOST = 8  # joined by NVLink


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. TPU figures: jax-ml/scaling-book (tpus.md; 25 GB/s a host of 4 or 8 chips between slices); GPU
    figures: NVIDIA data sheets, with a network adapter a GPU (200 or 400 Gb/s)."""

    kind: str  # JAX's device_kind begins with it
    peak: float  # FLOP/s, dense, bf16
    hbm: float  # GiB
    hbm_rate: float  # bytes/s
    link_rate: float  # bytes/s of one link (ICI, NVLink), one way
    network_rate: float  # bytes/s a chip between slices or hosts
    dimensions: int = 1  # of the torus; 1: a switch
    cores: int = 1  # TensorCores a chip that the cloud's names count
    aliases: tuple[str, ...] = ()
    left: float = 0.0  # GiB that libtpu leaves to a program, as its own messages say (0.0.42.1); 0: not known

    @property
    def usable(self) -> float:
        """GiB that a program may take."""
        return self.left or self.hbm

    @property
    def tpu(self) -> bool:
        return self.dimensions > 1


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32, 1.2e12, 45e9, 6.25e9, 3, cores=2),
    "v5e": Chip("TPU v5 lite", 197e12, 16, 0.81e12, 45e9, 3.125e9, 2, aliases=("v5litepod",), left=15.75),
    "v5p": Chip("TPU v5", 459e12, 95, 2.8e12, 90e9, 6.25e9, 3, cores=2),
    "v6e": Chip("TPU v6 lite", 918e12, 32, 1.6e12, 90e9, 3.125e9, 2),
    "a100": Chip("NVIDIA A100", 312e12, 80, 2.04e12, 300e9, 25e9),
    "h100": Chip("NVIDIA H100", 989e12, 80, 3.35e12, 450e9, 50e9),
    "h200": Chip("NVIDIA H200", 989e12, 141e9 / GIB, 4.8e12, 450e9, 50e9),
}
SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
LONGEST_2D = SHAPES_2D[-1][-1]  # alone long enough to close into a ring


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device that is here; None for a CPU and for what the table lacks."""
    fitting = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(fitting, key=lambda chip: len(chip.kind), default=None)


def processor() -> str:
    """Name of this machine's processor."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of equal shape. `v5p-128`, `v5p:4x4x4`: both names of 64 chips; `h100:8`: eight GPUs."""

    name: str  # key of CHIPS
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def size(self) -> int:
        """Chips in all."""
        return math.prod(self.shape) * self.slices

    @property
    def layout(self) -> str:
        """The name by shape, of one slice."""
        return f"{self.name}:{'x'.join(map(str, self.shape))}"

    @property
    def cloud(self) -> str:
        """The cloud's name of one slice; "" where it has none for this shape."""
        number = math.prod(self.shape)
        return f"{self.name}-{number * self.chip.cores}" if self.chip.tpu and self.shape == _shape(self.chip, number) else ""

    def wraps(self, dimension: int) -> bool:
        """Whether the last chip of a dimension is linked to the first (3-D: whole cubes of 4; 2-D: the full 16)."""
        if self.chip.dimensions == 3:
            return all(n % 4 == 0 for n in self.shape)
        return self.chip.dimensions == 2 and self.shape[dimension] == LONGEST_2D

    def __str__(self) -> str:
        names = [name for name in (self.cloud, self.layout) if name]
        count = f"{self.size} {'chip' if self.chip.tpu else 'GPU'}{'s' * (self.size > 1)}"
        return " = ".join([*(f"{self.slices} × {name}" if self.slices > 1 else name for name in names), count])


def parse(text: str, slices: int = 1) -> Topology:
    """A topology by the cloud's name (`v5p-128`, `v5litepod-256`) or by shape (`v5p:4x4x4`, `h100:8`).

    The cloud's v4 and v5p names count TensorCores, two a chip; the others count chips. Raises ConfigError for what does not exist.
    """
    if slices < 1:
        raise ConfigError(f"--num_slices={slices} must be at least 1")
    found = re.fullmatch(r"([a-z]+\d*[a-z]*)(?:-(\d+)|:(\d+(?:x\d+)*))", text.lower())
    names = {alias: name for name, chip in CHIPS.items() for alias in (name, *chip.aliases)}
    if not found or found[1] not in names:
        examples = {"v5p-128": 0, "v5p:4x4x4": 0, "v5e-256": 0, "v5e:16x16": 0, "v6e-256": 0, "h100:8": 0} if not found else names
        raise ConfigError(f"--topology={text!r} is not CHIP-NUMBER or CHIP:SHAPE{nearest(found[1] if found else text, examples)}")
    name = names[found[1]]
    chip = CHIPS[name]
    if found[2]:
        number = int(found[2])
        shape = _shape(chip, number // chip.cores) if number and number % chip.cores == 0 else None
        if shape is None:
            raise ConfigError(f"--topology={text!r}: there is no such slice{_closest(name, number // chip.cores)}")
        return Topology(name, shape, slices)
    shape = tuple(map(int, found[3].split("x")))
    if len(shape) != chip.dimensions or not all(shape):
        raise ConfigError(f"--topology={text!r}: shapes of {name} have {chip.dimensions} dimension(s){_closest(name, math.prod(shape))}")
    if chip.dimensions == 2 and shape not in SHAPES_2D:
        raise ConfigError(f"--topology={text!r}: there is no such slice{_closest(name, math.prod(shape))}")
    if not chip.tpu and shape[0] > GPUS_A_HOST and shape[0] % GPUS_A_HOST:
        raise ConfigError(f"--topology={text!r}: more than {GPUS_A_HOST} GPUs come in whole hosts{_closest(name, shape[0])}")
    return Topology(name, shape, slices)


def _shape(chip: Chip, number: int) -> tuple[int, ...] | None:
    """The cloud's shape of so many chips: a power of two, as even as it goes."""
    if not chip.tpu:
        return (number,) if number <= GPUS_A_HOST or number % GPUS_A_HOST == 0 else None
    if chip.dimensions == 2:
        return next((shape for shape in SHAPES_2D if math.prod(shape) == number), None)
    power = number.bit_length() - 1
    if number != 2**power or not 2 <= power <= 12:
        return None
    if power == 2:
        return (2, 2, 1)
    return tuple(sorted(2 ** ((power + i) // 3) for i in range(3)))


def _closest(name: str, number: int) -> str:
    chip = CHIPS[name]
    counts = [n for n in (2**i for i in range(13)) if _shape(chip, n)]
    near = min(counts, key=lambda n: abs(math.log(n / max(number, 1))))
    topology = Topology(name, _shape(chip, near))
    return f"; the nearest is {topology.cloud or topology.layout}" + (f" = {topology.layout}" if topology.cloud else "")


class Position(NamedTuple):
    """Where a device is: its slice or host, and its place there (coordinates in the torus; the GPU's number)."""

    island: int
    coordinates: tuple[int, ...]


def seconds(kind: str, size: float, group: Sequence[Position], topology: Topology) -> float:
    """The least time of one collective over a group of devices, `size` being a device's operand in bytes.

    Every link of the dimensions that the group spans is used both ways; longer ways and links shared with other groups are not counted, so
    it is a bound. all-gather, reduce-scatter and all-reduce pass a device's links n, 1 and 2 times the operand (scaling-book, sharding.md);
    all-to-all is bound by the cut through the middle of its longest dimension, a permutation by one link. Of what goes between islands
    (slices, hosts) a device sends its own part, reduced before and gathered after within the island.
    """
    n, islands = len(group), len({position.island for position in group})
    inside, chip = n // islands, topology.chip
    spans = []  # (chips along a dimension, links of a chip in it)
    for d in range(len(topology.shape)):
        along = len({position.coordinates[d] for position in group})
        if along > 1:
            spans.append((along, 2 if along == topology.shape[d] > 2 and topology.wraps(d) else 1))
    if kind == "collective-permute":
        return size / (chip.link_rate if islands == 1 else chip.network_rate)
    if kind in ("all-to-all", "ragged-all-to-all"):
        if chip.tpu:
            near = max((size * inside / n * along / 4 / (links * chip.link_rate) for along, links in spans), default=0.0)
        else:
            near = size * (inside - 1) / n / chip.link_rate
        return max(near, size * (n - inside) / n / chip.network_rate)
    whole = size * {"all-gather": n, "reduce-scatter": 1, "all-reduce": 2}[kind]
    near = whole * (inside - 1) / inside / (chip.link_rate * sum(links for _, links in spans)) if spans else 0.0
    return near + whole / inside * (islands - 1) / islands / chip.network_rate


def positions(topology: Topology, devices: Sequence[object] | None = None) -> list[Position]:
    """Where each device is, in their order; without devices (GPUs, which carry no coordinates) by number."""
    if topology.chip.tpu and devices is not None:
        return [Position(getattr(device, "slice_index", None) or 0, tuple(device.coords)) for device in devices]
    return [Position(i // GPUS_A_HOST, (i % GPUS_A_HOST,)) for i in range(topology.size)]
