"""What a compiled program moves, read from its optimised HLO, with every loop's body as often as it runs."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

_SHAPE = re.compile(r"\b(pred|bf16|token|[suf]\d+\w*|c64|c128)\[([\d,]*)\](?:\{[^}]*?(S\([1-9]\d*\))?\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# What passes values on or only names them, and the ends of what began elsewhere.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id iota "
    "optimization-barrier opt-barrier async-start async-update async-done".split()
)


# What reads a part of its first operand, and what writes a part of it.
_SLICES, _UPDATES = ("dynamic-slice", "slice", "gather"), ("dynamic-update-slice", "scatter")


class Array(NamedTuple):
    """The shape of a value: its bytes, and whether it is in main memory rather than on the chip itself."""

    size: int
    in_memory: bool


class Instruction(NamedTuple):
    """One line of HLO.

    Attributes:
        name, opcode: as printed.
        result: the arrays of its result.
        operands: names of its operands.
        text: the whole line.
    """

    name: str
    opcode: str
    result: list[Array]
    operands: list[str]
    text: str

    @property
    def called(self) -> list[str]:
        """Names of the computations it refers to."""
        return [name for group in _CALLED.findall(self.text) for name in re.findall(r"[\w.-]+", group)]


class Traffic(NamedTuple):
    """What one device moves while a program runs once.

    Attributes:
        memory: bytes read from and written to main memory: operands and results of all that runs, but what is kept on
            the chip, and of a slice or an update in place only the part.
        sent: bytes sent to other devices by each kind of collective, over rings.
        collectives: how many of each kind run.
        unknown_loops: loops of which the program does not say how often they run.
    """

    memory: float
    sent: dict[str, float]
    collectives: dict[str, int]
    unknown_loops: int


def traffic(hlo: str, *, unknown_trips: int = 1) -> Traffic:
    """Reads the text of an optimised module, as of `jax.stages.Compiled.as_text`.

    Args:
        hlo: the text.
        unknown_trips: how often loops run of which the text does not say it.

    Raises:
        ValueError: the text is no module.
    """
    entry, computations = _parse(hlo)
    fused = {name for instructions in computations.values() for i in instructions if _fuses(i) for name in i.called}
    memory, unknown = 0.0, 0
    beside: set[tuple[str, str, float]] = set()  # a TPU's collective that goes on beside fusions stands in each of them
    sent: defaultdict[str, float] = defaultdict(float)
    runs: Counter[str] = Counter()
    for name, times, is_unknown in _executed(entry, computations, unknown_trips):
        unknown += is_unknown
        by_name = {instruction.name: instruction for instruction in computations[name]}
        for instruction in by_name.values():
            if name not in fused:
                memory += times * _memory(instruction, by_name, computations)
            kind, volume = _collective(instruction, name, by_name)
            channel = _CHANNEL.search(instruction.text)
            part = (kind, channel[1], volume) if channel and name in fused else None
            if not kind or part in beside:
                continue
            if part is not None:
                beside.add(part)
            runs[kind] += times
            sent[kind] += times * volume
    return Traffic(memory, dict(sent), dict(runs), unknown)


def _parse(hlo: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The name of the entry computation, and all computations by name."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(found[1], found[2]))
    if not entry:
        raise ValueError("the text has no entry computation: expected an HLO module")
    return entry, computations


def _instruction(name: str, text: str) -> Instruction:
    end = _end_of_type(text)
    opcode, _, rest = text[end:].strip().partition("(")
    operands = re.findall(r"%([\w.-]+)", rest[: _closing(rest)])
    return Instruction(name, opcode, _arrays(text[:end]), operands, text)


def _end_of_type(text: str) -> int:
    return _closing(text[1:]) + 2 if text.startswith("(") else text.index(" ")


def _closing(text: str) -> int:
    """Where the parenthesis that was opened before `text` closes."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i
    return len(text)


def _arrays(text: str) -> list[Array]:
    found = []
    for dtype, dimensions, on_chip in _SHAPE.findall(text):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or ["0"])[0])
        found.append(Array(math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8, not on_chip))
    return found


def _executed(
    entry: str, computations: dict[str, list[Instruction]], unknown_trips: int
) -> Iterator[tuple[str, int, int]]:
    """Every call of a computation, down from the entry: its name, how often, and how many loops in it are unknown."""
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        unknown = 0
        for instruction in computations[name]:
            trips = 1
            if instruction.opcode == "while":
                known = _trips(instruction, computations)
                trips, unknown = unknown_trips if known is None else known, unknown + (known is None)
            pending += [(each, times * trips) for each in instruction.called if each in computations]
        yield name, times, unknown


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """How often a loop runs: as the compiler notes it, or by its condition, i < constant, with i from 0 as in JAX."""
    if noted := _TRIPS.search(loop.text):
        return int(noted[1])
    condition = next(name for name in loop.called if f"condition=%{name}" in loop.text)
    by_name = {instruction.name: instruction for instruction in computations[condition]}
    for instruction in by_name.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.text:
            limit = by_name[instruction.operands[1]].text
            if found := re.search(r" constant\((\d+)\)", limit):
                return int(found[1])
    return None


def _fuses(instruction: Instruction) -> bool:
    return instruction.opcode == "fusion" or ("to_apply=" in instruction.text and instruction.opcode != "call")


def _collective(instruction: Instruction, computation: str, by_name: dict[str, Instruction]) -> tuple[str, float]:
    """The kind of a collective and the bytes one device sends for it; "" for anything else."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return "", 0.0
    given = sum(array.size for name in instruction.operands if name in by_name for array in by_name[name].result)
    if kind == "collective-permute":
        return kind, float(given)
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # how the TPU compiler writes it
    members = _group_size(instruction.text)
    copies = {"all-gather": members, "all-reduce": 2}.get(kind, 1)
    return kind, given * copies * (members - 1) / members


def _group_size(text: str) -> int:
    """Devices that a collective joins: [groups, size], the axes of a mesh, or every group by its members."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(part.split("=") for part in found[1].split(","))
        return math.prod(int(sizes[axis]) for axis in found[2].split(","))
    if found := re.search(r"replica_groups=\{(?:\{([\d,]+)\}|\})", text):
        return len((found[1] or "0").split(","))
    raise ValueError(f"the groups of a collective are in a form that is not known here: {text}")


def _memory(
    instruction: Instruction, by_name: dict[str, Instruction], computations: dict[str, list[Instruction]]
) -> float:
    """Bytes of main memory that one run of an instruction reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    written = sum(array.size for array in instruction.result if array.in_memory)
    read = [
        sum(array.size for array in by_name[name].result if array.in_memory) if name in by_name else 0
        for name in instruction.operands
    ]
    if opcode in ("copy-start", "slice-start"):
        ends = instruction.result[:2]  # of which one is the copy or the slice, and the other what it is taken from
        return min(array.size for array in ends) * sum(array.in_memory for array in ends)
    if opcode.endswith("-start"):
        return sum(read) + max((array.size for array in instruction.result if array.in_memory), default=0)
    if opcode in _SLICES:
        return 2 * written
    if opcode in _UPDATES:
        return 2 * read[instruction.operands.index(_update(instruction))]
    if opcode == "fusion":
        return _fusion(computations[instruction.called[0]], read, written, computations)
    return sum(read) + written


def _fusion(
    inside: list[Instruction], read: list[int], written: int, computations: dict[str, list[Instruction]]
) -> float:
    """As `_memory`, with operands that are only sliced as large as their slices, and updates as large as they are.

    A gather is a slice in this, and a scatter an update.
    """
    by_name = {instruction.name: instruction for instruction in inside}
    total, results = float(written), written
    for instruction in inside:
        if instruction.opcode == "parameter":
            total += _read_inside(instruction, inside, read[_number(instruction)], computations)
        if instruction.opcode in _UPDATES:
            whole = sum(array.size for array in instruction.result)
            if whole <= results:  # it is one of the results, or there is another as large
                results -= whole
                total += sum(array.size for array in by_name[_update(instruction)].result) - whole
    return total


def _read_inside(
    parameter: Instruction, inside: list[Instruction], size: int, computations: dict[str, list[Instruction]]
) -> int:
    """Bytes that a fusion, with those inside of it, reads of a parameter of that size."""
    total = 0
    for user, operand in _uses(parameter.name, inside):
        if user.opcode == "fusion":
            nested = computations[user.called[0]]
            taken = next(each for each in nested if each.opcode == "parameter" and _number(each) == operand)
            if not any(_uses(taken.name, nested)):  # it is passed on as it is
                return size
            total += _read_inside(taken, nested, size, computations)
        elif operand == 0 and user.opcode in _SLICES:
            total += sum(array.size for array in user.result)
        elif operand != 0 or user.opcode not in _UPDATES:
            return size
    return min(size, total)


def _number(parameter: Instruction) -> int:
    """Which parameter of its computation it is."""
    return int(parameter.text.partition("parameter(")[2].partition(")")[0])


def _update(instruction: Instruction) -> str:
    """What one of `_UPDATES` writes."""
    return instruction.operands[-1 if instruction.opcode == "scatter" else 1]


def _uses(name: str, inside: list[Instruction]) -> Iterator[tuple[Instruction, int]]:
    """The instructions that take a value, under this name or as seen through a bitcast, and as which operand."""
    for user in inside:
        if name in user.operands:
            if user.opcode == "bitcast":
                yield from _uses(user.name, inside)
            else:
                yield user, user.operands.index(name)
