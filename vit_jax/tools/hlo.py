"""Reads programs: the products that devices compute, what they send to each other, and which kernels have names."""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_FUNCTION = re.compile(r"func\.func \w+ @([\w.$]+)\(.*?\n(.*?)\n  }", re.DOTALL)
_CALL = re.compile(r"\bcall @([\w.$]+)\(")
_TENSOR = re.compile(r"tensor<([\dx]*[a-z]\w*)>")
_CUSTOM_CALL = re.compile(r"custom_call @([\w$.]+)")
DIVIDED = "CustomSPMDPartitioning"
"""What a kernel that tells XLA how to divide it among devices is called in a program that is not divided yet."""


class Collective(NamedTuple):
    """An exchange among groups of devices.

    Attributes:
      kind: one of `KINDS`.
      group: how many devices n exchange with each other.
      times: how often it runs in the program: in a loop, once a turn.
      sent: bytes that a device sends each time, with what is exchanged as a ring does it. For arrays of S bytes, put
        together: all-reduce 2(n−1)/n·S, all-gather, reduce-scatter and all-to-all (n−1)/n·S, collective-permute S.
    """

    kind: str
    group: int
    times: int
    sent: float


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program, `jax.jit(…).lower(…).compile().as_text()`.

    An asynchronous one counts where it starts. All branches of a condition count. Raises ValueError for a collective in a
    loop whose length the compiler does not know.
    """
    devices = math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])))
    found = []
    lines = computations(text)
    for name, times in run_counts(lines).items():
        for line in lines[name]:
            if match := _COLLECTIVE.search(line):
                if math.isnan(times):
                    raise ValueError(f"a loop of unknown length holds {line.strip()}")
                found.append(_collective(match, line, devices, int(times)))
    return found


class Work(NamedTuple):
    """What instructions take on a device: FLOPs of products and bytes moved, each time; how often the program runs such."""

    flops: float
    bytes: float
    times: float


def products(text: str) -> list[Work]:
    """Of a lowered program, before XLA optimises it, if all else is fused into its products.

    A matrix product or convolution reads its operands and writes its result once. So does a kernel that is called by name,
    whose FLOPs are not known here: they are 0. A loop counts once.
    """
    functions = dict(_FUNCTION.findall(text))
    done: Counter[tuple[float, float]] = Counter()

    def visit(name: str) -> None:
        for line in functions[name].splitlines():
            if match := _CALL.search(line):
                visit(match[1])
            elif "stablehlo.dot_general" in line or "stablehlo.convolution" in line or " @__" in line:
                done[_lowered(line)] += 1

    visit("main")
    return [Work(*figures, times) for figures, times in done.items()]


def _lowered(line: str) -> tuple[float, float]:
    """(FLOPs, bytes)."""
    operands, _, results = line.rpartition(" : ")[2].partition(" -> ")
    (arrays, outputs) = ([_tensor(x) for x in _TENSOR.findall(part)] for part in (operands, results))
    moved = sum(math.prod(dims) * bits / 8 for dims, bits in arrays + outputs)
    flops, dims = 0.0, outputs[0][0]
    if "stablehlo.dot_general" in line:
        contracted = re.search(r"contracting_dims = \[([\d, ]*)\]", line)[1]
        flops = 2.0 * math.prod(dims) * math.prod(arrays[0][0][int(i)] for i in contracted.split(",") if i)
    elif "stablehlo.convolution" in line:
        outputs_axis = re.search(r"\]x\[([^\]]*)\]->", line)[1].split(", ").index("o")
        flops = 2.0 * math.prod(dims) * math.prod(arrays[1][0]) / arrays[1][0][outputs_axis]
    return flops, moved


def _tensor(shape: str) -> tuple[list[int], int]:
    """(sizes, bits of an element) of 8x197x64xbf16."""
    *dims, dtype = shape.split("x")
    return [int(n) for n in dims], int(re.search(r"\d+", dtype)[0])


def custom_calls(text: str) -> tuple[str, ...]:
    """The kernels, sorted, that a program calls by name: `jax.jit(…).lower(…).as_text()`."""
    return tuple(sorted(set(_CUSTOM_CALL.findall(text))))


def sent_bytes(found: list[Collective], kind: str | None = None) -> float:
    """What a device sends in one run of the program: in all, or by collectives of one kind."""
    return sum(c.times * c.sent for c in found if kind in (None, c.kind))


def _collective(match: re.Match, line: str, devices: int, times: int) -> Collective:
    shape, kind, start = match.groups()
    if start and kind != "all-reduce":  # (operands, results, …)
        shape = _elements(shape)[1]
    size = sum(array_bytes(*array) for array in ARRAY.findall(shape))
    if kind == "collective-permute":
        return Collective(kind, 2, times, size)
    n = _group_size(line, devices)
    factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}.get(kind, (n - 1) / n)  # of the result's bytes
    return Collective(kind, n, times, factor * size)


def _group_size(line: str, devices: int) -> int:
    """Of `replica_groups={{0,1},{2,3}}`, `=[2,4]<=[8]` (2 groups of 4), or `=mesh['a'=2,'b'=4] {'b'}` (4)."""
    groups = line.partition("replica_groups=")[2]
    if match := re.match(r"\{\{([\d,]+)\}", groups):
        return match[1].count(",") + 1
    if match := re.match(r"\[\d+,(\d+)\]", groups):
        return int(match[1])
    if match := re.match(r"mesh\[(.*?)\].*?\{(.*?)\}", groups):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])  # 'a' or a part of it, 'a':(1)2
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation; those of the program's own under ""."""
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line.startswith(" ") and (match := _COMPUTATION.match(line)):
            current = lines[match[2]] = []
            if match[1]:
                lines[""] = current
        elif line.startswith(" ") and lines:
            current.append(line)
    return lines


def run_counts(lines: dict[str, list[str]]) -> dict[str, float]:
    """How often the program runs each computation; not a number where the compiler does not know."""
    times: dict[str, float] = {}

    def visit(name: str, factor: float) -> None:
        times[name] = times.get(name, 0) + factor
        for line in lines.get(name, ()):
            called = CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"[\w.\-]+", branches)
            if called:
                trips = 1.0
                if " while(" in line:
                    match = _TRIPS.search(line)
                    trips = int(match[1]) if match else math.nan
                for other in called:
                    visit(other, factor * trips)

    visit("", 1)
    return {name: n for name, n in times.items() if name in lines}


def _elements(shape: str) -> list[str]:
    """What stands between the outer parentheses of a tuple's shape, in parts."""
    parts, depth = [""], 0
    for c in shape[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def array_bytes(dtype: str, shape: str) -> float:
    """Of an array as `ARRAY` finds it."""
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits / 8
