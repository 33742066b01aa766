"""Milliseconds from an image on the host to its logits on the host, one at a time, of ours and of every peer.

    python -m benchmarks.latency [--models=ViT-Ti_16,ViT-S_16,ViT-B_16] [--size=224] [--dtype=float32]
        [--peers=ours,reference,timm,transformers] [--rounds=5] [--images=10] [--name=latency]

The image is uint8; every peer normalises it as is its way, see `benchmarks.peers`. All peers of a model are processes on one
machine that take turns of so many images, after two that do not count. Prints a table and writes it to
benchmarks/results/NAME.md, the data to NAME.json.
"""

import argparse
import statistics

from benchmarks import side_by_side
from benchmarks.side_by_side import Failed, Worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ViT-Ti_16,ViT-S_16,ViT-B_16")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--peers", default="ours,reference,timm,transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=10, help="of a turn")
    parser.add_argument("--name", default="latency", help="of the files in benchmarks/results")
    args = parser.parse_args()
    rows, data = [], []
    for model in args.models.split(","):
        work = {"mode": "latency", "model": model, "batch": 1, "size": args.size, "dtype": args.dtype}
        found = measure(work, args.peers.split(","), args.rounds, args.images)
        for peer, seconds in found.items():
            data.append({"model": model, "peer": peer, "seconds": seconds})
            if isinstance(seconds, str):
                rows.append([model, peer, f"failed: {seconds}"[:100], "", ""])
                continue
            low, high, ours = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1], found.get("ours")
            ratio = f"{low / statistics.median(ours):.2f}" if isinstance(ours, list) else ""
            rows.append([model, peer, f"{1000 * low:.1f}", f"{1000 * high:.1f}", ratio])
    title = f"Latency, {args.size} px, {args.dtype}: milliseconds from a uint8 image on the host to logits on the host"
    note = f"{args.rounds * args.images} images each."
    header = ["model", "peer", "median", "95 %", "peer / ours"]
    side_by_side.save(args.name, title, [side_by_side.table(header, rows), note], {"rows": data}, side_by_side.environment())


def measure(work: dict[str, object], peers: list[str], rounds: int, images: int) -> dict[str, list[float] | str]:
    """By peer the seconds of every image, or why it failed."""
    workers, found = {}, {}
    for peer in peers:
        name, *options = peer.split(":")
        try:
            workers[peer] = Worker("benchmarks.peers", {**work, "peer": name, "options": options})
            workers[peer].seconds(2)
            found[peer] = []
        except Failed as e:
            found[peer] = str(e)
            workers.pop(peer, None)
    for i in range(rounds):
        for peer in list(workers)[:: 1 if i % 2 else -1]:
            workers[peer].seconds(2)
            found[peer] += [workers[peer].seconds(1) for _ in range(images)]
    for worker in workers.values():
        worker.close()
    return found


if __name__ == "__main__":
    main()
