"""What `vit-jax serve` answers a second, and how long a client waits, with batches and without; then it is sent nonsense.

    python -m benchmarks.serve [--models=tiny,ViT-Ti_16] [--clients=1,8,32] [--seconds=3] [--rounds=3] [--malformed=500]

Every client sends one photo (JPEG, as large as the model sees it), waits for the answer, and sends the next. The server with
batches of 8 and the one with batches of 1 are processes on one machine that take turns; the clients are a third one beside
them. Before, the model is timed alone: what batches can gain at most. Prints a table and writes it to
benchmarks/results/NAME.md, the data to NAME.json. Exit code 1 if malformed requests were answered by an error of the server,
or left memory or open files behind.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks import side_by_side
from tests.serve import malformed, models
from vit_jax import models as zoo
from vit_jax import predictor
from vit_jax.checkpoint import Opened, write_checkpoint
from vit_jax.run import runtime

WAYS = {"batches": ("--batch=8",), "one by one": ("--batch=1", "--wait=0")}
GARBAGE = [
    b"",
    b"",
    b"\x16\x03\x01\x02\x00\x01",
    b"GET\r\n\r\n",
    b"POST /v1/predict HTTP/9.9\r\n\r\n",
    b"\r\n" * 1000,
    b"A" * 70_000,
]
PASSES = 8
LEAK = 30 << 20, 3
"""Bytes and open files that 500 malformed requests may leave to the process: decoders and threads keep some for the next."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,ViT-Ti_16")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=3, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--malformed", type=int, default=500, help="malformed requests")
    parser.add_argument("--name", default="serve_cpu", help="of the files in benchmarks/results")
    args = parser.parse_args()
    runtime.set_up()
    rows, data, notes, fine = [], [], [], True
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            size = write_model(name, Path(folder))
            found = gain(Path(folder), size)
            notes.append(f"{name}: {PASSES} passes of one image take {found:.2f} times as long as one of all.")
            print(notes[-1], flush=True)
            servers = {way: stack.enter_context(server(Path(folder), options)) for way, options in WAYS.items()}
            for clients in map(int, args.clients.split(",")):
                times, lasted = measure(servers, photo_request(size), clients, args.seconds, args.rounds)
                rate = {way: len(found) / lasted[way] for way, found in times.items()}
                for way, found in times.items():
                    points = [1e3 * x for x in quantiles(found)]
                    ratio = f"{rate[way] / rate['one by one']:.2f}"
                    rows.append([name, clients, way, f"{rate[way]:.0f}", *(f"{x:.1f}" for x in points), ratio])
                    data.append({"model": name, "clients": clients, "way": way, "rate": rate[way], "ms": points})
                    print(*rows[-1], sep="\t", flush=True)
            if args.malformed and name == args.models.split(",")[0]:
                note, fine = send_nonsense(servers["batches"], args.malformed)
                notes.append(note)
    header = ["model", "clients", "computed", "images/s", "p50, ms", "p95, ms", "p99, ms", "times one by one"]
    title = "Serving over HTTP, one photo a request"
    side_by_side.save(args.name, title, [side_by_side.table(header, rows), *notes], {"rows": data}, side_by_side.environment())
    return 0 if fine else 1


def write_model(name: str, folder: Path) -> tuple[int, int]:
    """Writes a model with random parameters and returns the (h, w) of its images."""
    made = models.classifier()
    if name != "tiny":
        kind, fields = zoo.named(name, num_classes=len(models.CLASSES))
        made = models.predictor(model_type=kind, model=fields, image_size=(224, 224), grid=None)
    flat = {name: np.asarray(x) for name, x in flatten_dict(made.params, sep="/").items()}
    write_checkpoint(Opened(folder, "ours", flat, made.description), folder, "npz")
    return made.image_size


def gain(folder: Path, size: tuple[int, int], rounds: int = 9) -> float:
    """How many times as long `PASSES` passes of one image take as one pass of all of them."""
    loaded = predictor.load(folder)
    examples = [loaded.example(np.zeros((*size, 3), np.uint8))] * PASSES
    seconds = {1: [], PASSES: []}
    for _ in range(rounds + 1):
        for batch, times in seconds.items():
            start = time.perf_counter()
            for i in range(0, PASSES, batch):
                loaded.predict_examples(examples[i : i + batch], batch)
            times.append(time.perf_counter() - start)
    one, all_of_them = (statistics.median(times[1:]) for times in seconds.values())
    return one / all_of_them


@contextlib.contextmanager
def server(folder: Path, options: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """(its process, its port)."""
    command = [sys.executable, "-m", "vit_jax.serve", f"--model={folder}", "--port=0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()[0]
        try:
            yield process.pid, int(address.rpartition(":")[2])
        finally:
            process.send_signal(signal.SIGTERM)


def photo_request(size: tuple[int, int]) -> bytes:
    body = malformed.multipart(('name="image"; filename="a.jpg"', models.photo(0, "JPEG", size)))
    return raw(malformed.FORM, body)


def raw(headers: dict[str, str | bytes], body: bytes) -> bytes:
    """A POST for predictions as it is sent."""
    sent = {"content-length": str(len(body)), "host": "localhost"} | headers
    lines = [f"{name}: ".encode() + (x if isinstance(x, bytes) else x.encode("latin-1")) for name, x in sent.items()]
    return b"\r\n".join([b"POST /v1/predict HTTP/1.1", *lines, b"", body])


def measure(
    servers: dict[str, tuple[int, int]], request: bytes, clients: int, seconds: float, rounds: int
) -> tuple[dict[str, list[float]], Counter[str]]:
    """By way, of so many turns of each: the seconds from each request to its answer, and how long the turns lasted in all."""
    times, lasted = {way: [] for way in servers}, Counter()
    for i in range(rounds):
        for way in list(servers)[:: 1 if i % 2 else -1]:
            asyncio.run(load(servers[way][1], request, clients, 0.3))
            start = time.perf_counter()
            times[way] += asyncio.run(load(servers[way][1], request, clients, seconds))
            lasted[way] += time.perf_counter() - start
    return times, lasted


async def load(port: int, request: bytes, clients: int, seconds: float) -> list[float]:
    """The times of all that was answered."""
    times, end = [], time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (start := time.perf_counter()) < end:
            writer.write(request)
            status, _ = await answer(reader)
            assert status == 200, status
            times.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return times


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """(status, body)."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return int(head.split()[1]), await (reader.readexactly(lengths[0]) if lengths else reader.read())


def quantiles(times: list[float]) -> list[float]:
    """50, 95 and 99 %."""
    points = statistics.quantiles(times, n=100, method="inclusive")
    return [points[i - 1] for i in (50, 95, 99)]


def send_nonsense(running: tuple[int, int], count: int) -> tuple[str, bool]:
    """(what came of it in words, whether that is right)."""
    pid, port = running
    asyncio.run(nonsense(port, count, 0))  # what decoders and threads keep, they have by now
    before = memory(pid)
    statuses = asyncio.run(nonsense(port, count, count))
    more = [after - first for after, first in zip(memory(pid), before, strict=True)]
    asyncio.run(load(port, photo_request((16, 24)), 1, 0.1))  # it still answers
    found = ", ".join(f"{n} {status}" for status, n in sorted(statuses.items(), key=str))
    right = not any(str(status).startswith("5") for status in statuses) and more[0] < LEAK[0] and more[1] <= LEAK[1]
    return (
        f"{count} malformed requests, after {count} others: {found}; {more[0] / 2**20:+.1f} MB, {more[1]:+d} open files.",
        right,
    )


async def nonsense(port: int, count: int, first: int) -> Counter[int | str]:
    """Statuses of the answers; "closed" where the connection ended without one."""
    statuses = Counter()
    for number in range(first, first + count):
        rng = random.Random(number)
        sent = raw(*malformed.request(number))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            if number % 5 == 0:  # no HTTP, or the beginning of a request alone
                writer.write(rng.choice(GARBAGE) or sent[: rng.randrange(len(sent))])
                writer.write_eof()
            else:
                writer.write(sent)
            statuses[(await asyncio.wait_for(answer(reader), 20))[0]] += 1
        except (OSError, asyncio.IncompleteReadError):
            statuses["closed"] += 1
        writer.close()
    return statuses


def memory(pid: int) -> tuple[int, int]:
    """Bytes and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


if __name__ == "__main__":
    sys.exit(main())
