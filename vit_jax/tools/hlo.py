"""Reads programs: what the devices send to each other, and which kernels are called by name."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
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
    lines = _by_computation(text)
    for name, times in _times(lines).items():
        for line in lines[name]:
            if match := _COLLECTIVE.search(line):
                if math.isnan(times):
                    raise ValueError(f"a loop of unknown length holds {line.strip()}")
                found.append(_collective(match, line, devices, int(times)))
    return found


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
    size = sum(_bytes(*array) for array in _ARRAY.findall(shape))
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


def _by_computation(text: str) -> dict[str, list[str]]:
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


def _times(lines: dict[str, list[str]]) -> dict[str, float]:
    """How often the program runs each computation; not a number where the compiler does not know."""
    times: dict[str, float] = {}

    def visit(name: str, factor: float) -> None:
        times[name] = times.get(name, 0) + factor
        for line in lines.get(name, ()):
            called = _CALLED.findall(line)
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


def _bytes(dtype: str, shape: str) -> float:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits / 8
