"""Milliseconds from an image on the host to its logits on the host, one at a time, of ours and of every peer.

    python -m benchmarks.latency [--models=ViT-Ti_16,ViT-S_16,ViT-B_16] [--size=224] [--dtype=float32]
        [--peers=ours,reference,timm,transformers] [--rounds=5] [--images=10] [--name=latency]

The image is uint8; every peer normalises it as is its way, see `benchmarks.peers`. All peers of a model are processes on one
machine that take turns of so many images, after two that do not count. Prints a table and writes it to
benchmarks/results/NAME.md, the data to NAME.json.
"""

import argparse
import statistics

from benchmarks import peers, side_by_side


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
        jobs = {peer: work | peers.job(peer) for peer in args.peers.split(",")}
        how = {"rounds": args.rounds, "samples": args.images, "warm_up": 2}
        found, failed = side_by_side.alternate("benchmarks.peers", jobs, **how)
        for peer, measured in found.items():
            high = statistics.quantiles(measured.seconds, n=20)[-1]
            ratio = f"{measured.median / found['ours'].median:.2f}" if "ours" in found else ""
            rows.append([model, peer, f"{1000 * measured.median:.1f}", f"{1000 * high:.1f}", ratio])
            data.append({"model": model, "peer": peer, "seconds": measured.seconds, "facts": measured.facts})
        for peer, why in failed.items():
            rows.append([model, peer, f"failed: {why}"[:100], "", ""])
            data.append({"model": model, "peer": peer, "failed": why})
    title = f"Latency, {args.size} px, {args.dtype}: milliseconds from a uint8 image on the host to logits on the host"
    note = f"{args.rounds * args.images} images each."
    header = ["model", "peer", "median", "95 %", "peer / ours"]
    side_by_side.save(args.name, title, [side_by_side.table(header, rows), note], {"rows": data}, side_by_side.environment())


if __name__ == "__main__":
    main()
