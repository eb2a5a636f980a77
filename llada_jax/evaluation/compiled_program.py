"""What a compiled program does, read from its text (optimized HLO): kernels launched and collectives, with loops counted out.

A scan's body stands in the text once: what is inside is multiplied by the loop's trip count, where that is a constant, and else by one (the
loop over a call's training steps, a decoder's loop), so that the counts are those of one step. Branches of a conditional are kept apart.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")
KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2", "mosaic_gpu")
BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
        "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0}  # fmt: skip


class Instruction(NamedTuple):
    """One line: `%name = result opcode(%operands), attributes`."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    literal: str  # what stands between the parentheses


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program. `size`: bytes of a device's operands, once; `count`: times a step.

    `groups` of device numbers (positions in the mesh, flattened), pairs (source, target) for a permutation. `branches`: the conditionals that
    it is in, from the outside, each as (its name, branch). `asynchronous`: other work may run between its start and its end.
    """

    kind: str
    name: str
    size: int
    count: int
    asynchronous: bool
    groups: tuple[tuple[int, ...], ...]
    branches: tuple[tuple[str, str], ...]
    operand: str  # its dtype and dimensions
    source: str  # op_name: where in the traced function it comes from

    @property
    def bytes_per_step(self) -> int:
        return self.size * self.count


class Program(NamedTuple):
    """`kernels`: launches a step by name, conditionals' branches included. `open_loops`: loops whose trip count is not a constant."""

    kernels: dict[str, int]
    collectives: tuple[Collective, ...]
    open_loops: tuple[str, ...]


def read(text: str, devices: int) -> Program:
    """Read the text of a program compiled for so many devices."""
    computations, entry = parse(text)
    kernels: dict[str, int] = {}
    collectives: list[Collective] = []
    open_loops: list[str] = []
    chains: set[tuple[str, ...]] = set()

    def visit(name: str, count: int, asynchronous: bool, branches: tuple[tuple[str, str], ...]) -> None:
        body = computations[name]
        by_name = {instruction.name: instruction for instruction in body}
        scatters = any(i.opcode == "dynamic-slice" for i in body) and not any(i.opcode in ("while", "conditional", "call") for i in body)
        for i in body:
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                key = _chain(i, kind)
                if key in chains:  # the same collective goes on beside the next computation
                    continue
                chains.update([key] if key else [])
                operands = [by_name[operand].result for operand in i.operands]
                if kind == "ragged-all-to-all":
                    operands = operands[:1]  # the rest: the output and where each piece begins
                if kind == "all-reduce" and scatters and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # fused: each device keeps its part alone
                aside = (asynchronous or i.opcode.endswith("-start") or bool(key)) and '"is_sync":true' not in i.attributes
                collectives.append(Collective(kind, i.name, sum(map(size_of, operands)), count, aside, _groups(i, devices), branches,
                                              _plain(operands), _named(i, "op_name")))
            elif i.opcode == "send" and (transfer := _named(i, "_xla_megascale_transfer_type")):  # between slices; recv names it again
                operands = [by_name[i.operands[0]].result]
                collectives.append(Collective(transfer.lower().replace("_", "-"), i.name, size_of(operands[0]), count, True,
                                              _across_slices(i, devices), branches, _plain(operands), _named(i, "op_name")))
            elif i.opcode == "custom-call" and _named(i, "custom_call_target") in KERNEL_TARGETS:
                inner = re.search(r'\bname = "(\w+)"', i.attributes)  # Triton's; the instruction is called pallas_call
                kernel = inner[1] if inner else re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", i.name)
                kernels[kernel] = kernels.get(kernel, 0) + count
            elif i.opcode == "while":
                trips = _trips(i, by_name, computations)
                if trips is None:
                    open_loops.append(i.name)
                visit(_called(i, "body"), count * (1 if trips is None else trips), asynchronous, branches)
            elif i.opcode == "conditional":
                for branch, called in _branches(i):
                    visit(called, count, asynchronous, (*branches, (i.name, branch)))
            elif i.opcode in ("fusion", "call", "async-start", "call-start"):
                visit(_called(i, "calls") or _called(i, "to_apply"), count, asynchronous or i.opcode.endswith("-start"), branches)

    visit(entry, 1, False, ())
    return Program(kernels, tuple(collectives), tuple(open_loops))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(instructions of each computation by its name, name of the entry). Raises ValueError for a text without an entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if line[:1] in ("%", "E") and (head := re.match(r"(ENTRY )?%?([\w.-]+) \(", line)):
            body = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("  ") and (found := re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)):
            body.append(_instruction(line[found.end() :], found[2], bool(found[1])))
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    return computations, entry


def size_of(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple: `(f32[8,4]{1,0}, bf16[3])`."""
    bits = 0
    for dtype, dims in re.findall(r"\b(\w+)\[([\d,<=]*)\]", shape):
        width = BITS.get(dtype, 8 if dtype.startswith("f8") else None)
        if width is None:
            raise ValueError(f"unknown element type in {shape}")
        bits += width * math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n)
    return -(-bits // 8)


def axes_of(groups: Sequence[Sequence[int]], mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes of a mesh (sizes by name, in order) along which the members of a group differ; () when every group is a device alone."""
    members = np.array(np.unravel_index(np.concatenate([np.asarray(group) for group in groups]), list(mesh.values())))
    ends = np.cumsum([len(group) for group in groups])[:-1]
    differ = [any(len(set(part.tolist())) > 1 for part in np.split(axis, ends)) for axis in members]
    return tuple(name for name, differs in zip(mesh, differ, strict=True) if differs)


def usual(collectives: Sequence[Collective]) -> list[Collective]:
    """Those of a step that goes the usual way: of every conditional, the branch with an all-to-all, which is how tokens reach experts unless
    some device has too little room for them; else that whose collectives carry least."""
    totals: dict[tuple[str, str], int] = {}
    for c in collectives:
        for branch in c.branches:
            totals[branch] = totals.get(branch, 0) + c.bytes_per_step
    exchanging = {branch for c in collectives if c.kind.endswith("all-to-all") for branch in c.branches}
    found: dict[str, list[tuple[bool, int, str]]] = {}
    for (name, branch), total in totals.items():
        found.setdefault(name, []).append(((name, branch) not in exchanging, total, branch))
    # a branch without collectives carries least of all, but does not show here: a conditional of one entry is not taken
    taken = {(name, min(branches)[2]) for name, branches in found.items() if len(branches) > 1}
    return [c for c in collectives if all(branch in taken for branch in c.branches)]


def _instruction(rest: str, name: str, root: bool) -> Instruction:
    result, rest = (rest[: (end := _closing(rest, 0) + 1)], rest[end:].lstrip()) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inner = rest[len(opcode) + 1 : end]
    return Instruction(name, result, opcode, tuple(re.findall(r"%([\w.-]+)", inner)), rest[end + 1 :], root, inner)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"a parenthesis is not closed in {text[:80]!r}")


def _called(i: Instruction, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.-]+)", i.attributes)
    return found[1] if found else ""


def _named(i: Instruction, key: str) -> str:
    found = re.search(rf'\b{key}="([^"]*)"', i.attributes)
    return found[1] if found else ""


def _plain(shapes: Sequence[str]) -> str:
    """Element types and dimensions, without layouts."""
    return " ".join(re.sub(r"\{.*?\}|/\*.*?\*/", "", shape) for shape in shapes)


def _chain(i: Instruction, kind: str) -> tuple[str, ...]:
    """Of a collective that a TPU runs in pieces inside several fusions (`async_collective_fusion`): what the pieces share, else ()."""
    chain, channel = _named(i, "chain_id"), re.search(r"\bchannel_id=(\d+)", i.attributes)
    return (kind, chain, channel[1] if channel else "") if chain else ()


def _branches(i: Instruction) -> Iterator[tuple[str, str]]:
    """(label, computation). `lax.cond` makes its false branch number 0."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
    if not listed:
        yield from (("true", _called(i, "true_computation")), ("false", _called(i, "false_computation")))
        return
    names = re.findall(r"%?([\w.-]+)", listed[1])
    yield from zip(("false", "true") if len(names) == 2 else map(str, range(len(names))), names, strict=True)


def _trips(i: Instruction, by_name: dict[str, Instruction], computations: dict[str, list[Instruction]]) -> int | None:
    """Trip count of a while loop: as XLA notes it, else from its condition `counter < constant`; None when it is no constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.attributes)
    if known:
        return int(known[1])
    condition = {c.name: c for c in computations[_called(i, "condition")]}
    root = next(c for c in condition.values() if c.root)
    if root.opcode == "fusion":  # of the comparison alone
        inner = {c.name: c for c in computations[_called(root, "calls")]}
        compare = next(c for c in inner.values() if c.root)
        if compare.opcode != "compare" or any(inner[name].opcode not in ("parameter", "constant") for name in compare.operands):
            return None
        arguments = [condition[root.operands[int(inner[name].literal)]] if inner[name].opcode == "parameter" else inner[name]
                     for name in compare.operands]
    else:
        compare, arguments = root, [condition.get(name) for name in root.operands]
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes or None in arguments:
        return None
    start = _carried(i, by_name)
    first, end = (_constant(argument, start) for argument in arguments)
    return None if first is None or end is None else max(end - first, 0)


def _carried(i: Instruction, by_name: dict[str, Instruction]) -> list[Instruction | None]:
    """What a loop begins with, element by element."""
    def through_copies(name: str) -> Instruction | None:
        found = by_name.get(name)
        return through_copies(found.operands[0]) if found is not None and found.opcode == "copy" else found

    given = by_name.get(i.operands[0])
    return [through_copies(name) for name in given.operands] if given and given.opcode == "tuple" else []


def _constant(argument: Instruction, start: list[Instruction | None]) -> int | None:
    """The whole number that an instruction of a loop's condition has in the first round."""
    if argument.opcode == "get-tuple-element":
        at = int(re.findall(r"\bindex=(\d+)", argument.attributes)[0])
        argument = start[at] if at < len(start) else None
    if argument is None or argument.opcode != "constant" or not re.fullmatch(r"-?\d+", argument.literal):
        return None
    return int(argument.literal)


def _groups(i: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of device numbers of a collective; (source, target) pairs of a permutation."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", i.attributes)
    if pairs:
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", i.attributes)
    if listed:
        found = tuple(tuple(int(n) for n in group.split(",") if n) for group in re.findall(r"\{([\d,]*)\}", listed[1]))
        return tuple(group for group in found if group) or (tuple(range(devices)),)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.attributes)
    if iota:
        numbers = _numbers(iota[2])
        grid = np.arange(math.prod(numbers)).reshape(numbers)
        grid = grid.transpose(_numbers(iota[3])) if iota[3] else grid
        return tuple(map(tuple, grid.reshape(_numbers(iota[1])).tolist()))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? *\{([^}]*)\}", i.attributes)
    if mesh:
        return _mesh_groups(mesh[1], mesh[2], mesh[3], mesh[4])
    return (tuple(range(devices)),)


def _across_slices(i: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of a transfer between slices: the devices of one place in each of the slices that `{1,2}x{0:3}` names; the program is one slice's."""
    named = _named(i, "_xla_megascale_target").partition("x")[0]
    slices = max(len(re.findall(r"\d+", named)), 1)
    each = devices // slices
    return tuple(tuple(range(place, devices, each)) for place in range(each))


def _mesh_groups(sizes: str, order: str | None, transposed: str | None, axes: str) -> tuple[tuple[int, ...], ...]:
    """Groups along axes of a mesh: `'a'=2,'b'=4` and `'b'`, or a part of an axis, `'b':(2)2` (2 from its second factor of 2)."""
    mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    grid = np.arange(math.prod(mesh.values()))
    if order:
        grid = grid.reshape(_numbers(order))
        grid = grid.transpose(_numbers(transposed)) if transposed else grid
    wanted = [(name, int(before or 1), int(size) if size else mesh[name]) for name, before, size in
              re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)]
    factors, own = [], []  # of the grid's dimensions, and those of them that are inside a group
    for name, size in mesh.items():
        parts = [(before, part) for other, before, part in wanted if other == name]
        at = 1
        for before, part in sorted(parts):
            factors += [before // at] if before > at else []
            own.append(len(factors))
            factors.append(part)
            at = before * part
        factors += [size // at] if size > at else []
    rest = [d for d in range(len(factors)) if d not in own]
    grid = grid.reshape(factors or [1]).transpose([*rest, *own] if factors else [0])
    return tuple(map(tuple, grid.reshape(-1, math.prod(factors[d] for d in own)).tolist()))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
