"""What every instruction of a compiled program takes: FLOPs, and bytes that are read and written."""

import math
import re
from collections import Counter
from typing import NamedTuple

from vit_jax.tools.hlo import ARRAY, CALLED, KINDS, Work, array_bytes, computations, run_counts

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_FREE = "parameter constant get-tuple-element tuple bitcast while call conditional after-all partition-id replica-id".split()
_SLICES = ("slice", "dynamic-slice", "gather")


def work(text: str) -> list[Work]:
    """Of every instruction of a compiled program, but for collectives.

    A fusion is one instruction: it reads its operands and writes its results. Of an array that is only sliced, or updated in
    place, the slice counts. All branches of a condition count; a loop whose length the compiler does not know counts once.
    """
    lines = computations(text)
    program = {name: {x.name: x for x in map(_instruction, body) if x} for name, body in lines.items()}
    inside = set()  # of fusions and reductions
    for x in (x for body in program.values() for x in body.values()):
        if x.op not in ("while", "call", "conditional"):
            inside.update(CALLED.findall(x.rest))
    done: Counter[tuple[float, float]] = Counter()
    for name, times in run_counts(lines).items():
        if name not in inside:
            for x in program[name].values():
                if x.op not in _FREE and not x.op.startswith(KINDS):
                    figures = _flops(x, program[name], program), _bytes_moved(x, program[name], program)
                    done[figures] += 1 if math.isnan(times) else int(times)
    return [Work(*figures, times) for figures, times in done.items()]


class _Instruction(NamedTuple):
    root: bool
    name: str
    shape: str
    op: str
    arguments: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def size(self) -> float:
        return sum(array_bytes(*array) for array in ARRAY.findall(self.shape))

    @property
    def dims(self) -> list[int]:
        return [int(n) for n in ARRAY.search(self.shape)[2].split(",") if n]


Computation = dict[str, _Instruction]


def _instruction(line: str) -> _Instruction | None:
    match = _INSTRUCTION.match(line)
    return _Instruction(bool(match[1]), *match.groups()[1:]) if match else None


def _flops(x: _Instruction, around: Computation, program: dict[str, Computation]) -> float:
    """2 by multiplication of a matrix product or convolution, those inside of a fusion included."""
    if x.op == "fusion":
        bodies = [program[name] for name in CALLED.findall(x.rest)]
        return sum(_flops(y, body, program) for body in bodies for y in body.values())
    if x.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.rest)[1]
        dims = around[x.operands[0]].dims
        return 2.0 * math.prod(x.dims) * math.prod(dims[int(i)] for i in contracted.split(",") if i)
    if x.op == "convolution":
        kernel, outputs = around[x.operands[1]].dims, re.search(r"dim_labels=\w+_(\w+)->", x.rest)[1].index("o")
        return 2.0 * math.prod(x.dims) * math.prod(kernel) / kernel[outputs]
    return 0.0


def _bytes_moved(x: _Instruction, around: Computation, program: dict[str, Computation]) -> float:
    if x.op in _SLICES:
        return 2 * x.size
    if x.op == "dynamic-update-slice":
        return 2 * around[x.operands[1]].size
    if x.op != "fusion":
        return x.size + sum(around[name].size for name in x.operands)
    body = program[CALLED.search(x.rest)[1]]
    read = sum(_size_read(y, body) for y in body.values() if y.op == "parameter")
    updates = [body[y.operands[1]].size for y in body.values() if y.root and y.op == "dynamic-update-slice"]
    return read + (updates[0] if updates else x.size)


def _size_read(parameter: _Instruction, body: Computation) -> float:
    """Of an operand of a fusion: nothing where it is only updated in place, of one that is only sliced the slices."""
    size = 0.0
    for user in (x for x in body.values() if parameter.name in x.operands):
        if user.op in _SLICES and user.operands[0] == parameter.name:
            size += user.size
        elif not (user.op == "dynamic-update-slice" and user.operands[0] == parameter.name):
            return parameter.size
    return size
