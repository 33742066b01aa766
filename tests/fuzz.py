"""Damages files as chance, broken disks and strangers do, and sees that every reader answers or refuses, within a budget.

A case is a target (what is read) and a number, from which alone all of its bytes follow. A worker process runs cases and
measures each: 5 seconds of computing, and memory of 3 times its files plus 500 MB. What is wrong with one is its verdict:
"traceback" (any exception but UserError), "nan" (an answer that is not finite), "slow", "memory", "crash"; "answer" and
"refusal" are right. `benchmarks/fuzz.py` runs many, `tests/test_fuzz.py` a few.
"""

import copy
import io
import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SECONDS, LONGEST, FACTOR, SPARE = 5, 60, 3, 500 << 20  # of computing, until it is given up, times the files, bytes
COMPILING = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
Files = dict[str, bytes]


class Target(NamedTuple):
    """Sound files by name, those of them that are damaged, and what reads their folder: it returns None or what is wrong."""

    files: Files
    damaged: tuple[str, ...]
    read: Callable[[Path], str | None]


class Verdict(NamedTuple):
    kind: str
    text: str
    seconds: float
    megabytes: float


# Damage to bytes.

NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes: flipped bits, cuts, chunks put in, repeated or taken out, numbers that are no length."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 16, 64, 1000))
        chunk = data[at : at + size]
        match rng.randrange(8):
            case 0 | 1:
                bits = bytearray(data)
                for _ in range(rng.choice((1, 1, 2, 8)) if bits else 0):
                    bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
                data = bytes(bits)
            case 2:
                data = data[:at]
            case 3:
                data = data[:at] + rng.randbytes(size) + data[at:]
            case 4:
                data = data[: at + size] + chunk * rng.choice((1, 2, 50)) + data[at + size :]
            case 5:
                data = data[:at] + data[at + size :]
            case 6:
                data = data[:at] + rng.randbytes(len(chunk)) + data[at + size :]
            case 7:
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                number = rng.choice(NUMBERS) % (1 << 8 * width)
                data = data[:at] + number.to_bytes(width, order) + data[at + width :]
    return data


# Damage to JSON: any value becomes another, goes, or comes under another name.

VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        64,
        0.5,
        -0.0,
        10**6,
        10**9,
        10**30,
        -(10**18),
        1e308,
        1e-320,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "0", "224", "nan", "../x", "a" * 5000, "a\x1b[2J\nb", "\ud800", "é", "float32", "softmax", "bicubic"),
    *(
        [],
        [0],
        [1, 2],
        [-1, -1],
        [10**9] * 2,
        ["x"],
        [None],
        [[]],
        [0.5] * 3,
        [0.0] * 3,
        [float("nan")] * 3,
        list(range(1000)),
        {},
    ),
    *({"x": 1}, {"type": "x"}, {"": None}, {"size": [0, 0]}, {"height": 3}, [[[[[[[[1]]]]]]]], {"a": {"b": {"c": {}}}}),
]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) of a JSON tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()):
        yield tree, key
        yield from places(value)


def damage_tree(tree: Any, rng: random.Random) -> Any:
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2))):
        if not (found := list(places(tree))) or rng.random() < 0.02:
            return copy.deepcopy(rng.choice(VALUES))
        container, key = rng.choice(found)
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(("", "x", key + "x", key.upper(), "../" + key))] = container.pop(key)
            case 2 if isinstance(container[key], (int, float)):
                container[key] = container[key] * rng.choice((2, 10, -1, 0.5, 1000, 10**6)) + rng.choice((0, 1, -1))
            case 3:
                other, name = rng.choice(found)
                container[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name : name + 1])
            case _:
                container[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def damage_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage(data, rng)
    return json.dumps(damage_tree(json.loads(data), rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


# Damage inside a container, so that sums and lengths are right and only what is inside is wrong.


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = damage_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damage_numbers(data: bytes, rng: random.Random) -> bytes:
    """Numbers that are none, or far too large, at a few places of float32."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 3, 100))):
        value = struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, -1e30, 1e-40)))
        at = rng.randrange(len(out) // 4) * 4 if len(out) >= 4 else 0
        out[at : at + 4] = value
    return bytes(out)


def damage_npy(data: bytes, rng: random.Random) -> bytes:
    length = 10 + int.from_bytes(data[8:10], "little")
    header, values = data[10:length].decode("latin1"), data[length:]
    if rng.random() < 0.3:
        return data[:length] + damage_numbers(values, rng)
    swaps = {
        "descr": "'<f8' '<f2' '<i4' '|b1' '|u1' '|V4' '|O' '<c8' '<f16' '<U1' [('a','<f4')] 'M8[s]' 3".split(" "),
        "shape": "() (0,) (-1,) (4,) (1,2,3) (10**9,) (1000000000000,) (0,99999999999) 'x' None (True,)".split(" "),
        "fortran_order": "True 0 None 'x'".split(" "),
    }
    entry = rng.choice(list(swaps))
    start = header.find(f"'{entry}': ") + len(entry) + 4
    stop = header.find(")," if entry == "shape" else ",", start) + (entry == "shape")
    header = (header[:start] + rng.choice(swaps[entry]) + header[stop:]).rstrip()
    header = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + "\n"
    if rng.random() < 0.3:
        values = values[: rng.randrange(len(values) + 1)] if rng.random() < 0.5 else values * 2
    return data[:8] + len(header).to_bytes(2, "little") + header.encode("latin1") + values


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    i = rng.randrange(len(entries))
    name, content = entries[i]
    pickles = [k for k, (other, _) in enumerate(entries) if other.endswith("data.pkl")]
    match rng.randrange(7):
        case 0:
            del entries[i]
        case 1:
            entries[i] = rng.choice((name + "x", name[:-4], "../" + name, "a\x1b\n" + name, name.replace("_", "-"))), content
        case 2:
            entries.append((rng.choice((name, "x", name.replace("0", "1"), f"{name[:-4]}/x.npy")), content))
        case _ if pickles:
            i = pickles[0] if rng.random() < 0.7 else i
            entries[i] = entries[i][0], damage(entries[i][1], rng)
        case _ if content.startswith(b"\x93NUMPY"):
            entries[i] = name, damage_npy(content, rng) if rng.random() < 0.8 else damage(content, rng)
        case _:
            entries[i] = name, damage(content, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in entries:
            with archive.open(zipfile.ZipInfo(name), "w") as f:
                f.write(content)
    return out.getvalue()


WHOLE = (b"", b"{}", b"[]", b"null", b"PK\x03\x04", bytes(100), b"[" * 100_000, b"\xff\xfe", b'{"a":' * 50_000)
INSIDE = {".json": damage_json, ".safetensors": damage_safetensors, ".npz": damage_zip, ".pth": damage_zip, ".bin": damage_zip}


def damaged(target: Target, number: int) -> Files:
    """The files of a case; of number -1 the sound ones."""
    rng = random.Random(number)
    files = dict(target.files)
    if number < 0:
        return files
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(target.damaged)
        if name not in files:
            continue
        if rng.random() < 0.02:
            files[name] = rng.choice(
                (b"", b"{}", b"[]", b"null", b"PK\x03\x04", rng.randbytes(100), b"[" * 100_000, b"\xff\xfe")
            )
        elif rng.random() < 0.01 and len(files) > 1:
            del files[name]
        elif (inside := INSIDE.get(Path(name).suffix)) and rng.random() < 0.8:
            try:
                files[name] = inside(files[name], rng)
            except Exception:  # it is too damaged already
                files[name] = damage(files[name], rng)
        else:
            files[name] = damage(files[name], rng)
    return files


# The worker.


def memory(what: str) -> int:
    """Bytes that /proc/self/status tells."""
    for line in open("/proc/self/status"):
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    return 0


def judge(files: Files, read: Callable[[Path], str | None]) -> Verdict:
    """Writes the files to a folder and reads it."""
    from vit_jax.errors import UserError

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = memory("VmRSS"), time.process_time()
        try:
            wrong = read(Path(folder))
            kind, text = ("nan", wrong) if wrong else ("answer", "")
        except UserError as e:
            text = str(e)
            kind = "refusal" if all(c.isprintable() or c == "\n" for c in text) else "escape"
        except BaseException as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            ours = [f for f in traceback.extract_tb(e.__traceback__) if "vit_jax" in f.filename]
            kind = "traceback"
            text = f"{type(e).__name__}: {e} at {where.filename}:{where.lineno}" + (
                f" from {ours[-1].filename}:{ours[-1].lineno}" if ours else ""
            )
        seconds, grown = time.process_time() - start, memory("VmHWM") - before
    text = text.replace(folder, "FOLDER")
    if seconds > SECONDS:
        kind, text = "slow", f"{kind}: {text}"
    elif grown > FACTOR * sum(map(len, files.values())) + SPARE:
        kind, text = "memory", f"{kind}: {text}"
    return Verdict(kind, text[:2000], round(seconds, 2), round(grown / 1e6))


def work() -> None:
    """Answers lines `[target, number or name of a case by hand]` by lines of verdicts, until its input ends."""
    import logging
    import warnings

    from tests import fuzz_by_hand, fuzz_targets

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    out, sys.stdout = sys.stdout, io.StringIO()
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (6 << 30),) * 2)
    targets: dict[str, Target] = {}
    for line in sys.stdin:
        name, number = json.loads(line)
        if isinstance(number, str):
            files, read = fuzz_by_hand.cases(number.partition(":")[0])[number]()
        else:
            if name not in targets:
                targets[name] = fuzz_targets.TARGETS[name]()
            files, read = damaged(targets[name], number), targets[name].read
        print(json.dumps(judge(files, read)), file=out, flush=True)


class Worker:
    """A process that runs cases; another one takes its place when it dies or hangs."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def _stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def run(self, target: str, case: int | str) -> Verdict:
        """The verdict on one case."""
        if self._process is None:
            command = [sys.executable, "-c", "from tests import fuzz; fuzz.work()"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            environment = os.environ | COMPILING
            self._process = subprocess.Popen(command, cwd=Path.cwd(), env=environment, text=True, **pipes)
            self._is_fresh = True
        limit = 300 if self._is_fresh else LONGEST  # the first one imports and builds the sound files
        self._is_fresh = False
        try:
            print(json.dumps([target, case]), file=self._process.stdin, flush=True)
            answered = self._answers(limit)
            line = self._process.stdout.readline() if answered else ""
        except BrokenPipeError:
            answered, line = True, ""
        if line:
            return Verdict(*json.loads(line))
        self._stop()
        return Verdict("crash", "the process died", 0, 0) if answered else Verdict("slow", "no answer", LONGEST, 0)

    def _answers(self, limit: float) -> bool:
        """Whether an answer comes within so many seconds of computing, or ten times as many by the clock.

        On a busy machine a process may get hardly any of the time that passes.
        """
        computed, started = self._computed(), time.monotonic()
        while not select.select([self._process.stdout], [], [], 1)[0]:
            if self._computed() - computed > limit or time.monotonic() - started > 10 * limit:
                return False
        return True

    def _computed(self) -> float:
        """Seconds that the worker has computed; 0 of one that is gone."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
