"""Images a second of ours and of every peer, alternating on one machine.

    python -m benchmarks.throughput [--models=ViT-Ti_16,ViT-S_16,ViT-B_16] [--modes=infer,train] [--batch=8] [--size=224]
        [--dtype=float32] [--peers=ours,reference,timm,transformers] [--rounds=5] [--seconds=3] [--name=throughput]

Peers that are not installed are left out. A peer takes options behind colons, such as timm:compile:autocast, see
`benchmarks.peers`, which says what is computed. Prints a table and writes it to benchmarks/results/NAME.md, the data to
NAME.json. A turn begins with two repetitions that do not count: memory that a waiting process has given back, or that the
system has taken, is slow when it is first touched again. "of peak" is what the model's own FLOPs (products alone, 2 a
multiplication, training thrice the forward pass) are of the machine's best rate for large matrix products, measured in
the same run.
"""

import argparse
from typing import Any

from benchmarks import peers, side_by_side
from benchmarks.side_by_side import Measured
from vit_jax.models import zoo

PEAK_SIDE = {"float32": 4096, "bfloat16": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ViT-Ti_16,ViT-S_16,ViT-B_16")
    parser.add_argument("--modes", default="infer,train")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=PEAK_SIDE)
    parser.add_argument("--peers", default="ours,reference,timm,transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of a turn")
    parser.add_argument("--name", default="throughput", help="of the files in benchmarks/results")
    args = parser.parse_args()
    how = {"rounds": args.rounds, "seconds": args.seconds}
    work = {"batch": args.batch, "size": args.size, "dtype": args.dtype}
    products = side_by_side.alternate("benchmarks.peers", {"peak": _peak(args.dtype)}, **how)[0]["peak"]
    peak = max(products.facts["flops"] / min(products.seconds), *products.facts["rates"].values())
    rows, data = [], []
    for model in args.models.split(","):
        for mode in args.modes.split(","):
            jobs = {peer: {**work, "model": model, "mode": mode, **peers.job(peer)} for peer in args.peers.split(",")}
            found, failed = side_by_side.alternate("benchmarks.peers", jobs, **how, warm_up=2)
            flops = args.batch * model_flops(model, args.size) * (3 if mode == "train" else 1)
            for peer, measured in found.items():
                rows.append(_row(model, mode, peer, measured, found.get("ours"), args.batch, flops / peak))
                row = {"model": model, "mode": mode, "peer": peer, "seconds": measured.seconds, "facts": measured.facts}
                data.append(row | {"images_per_second": args.batch / measured.median})
            for peer, why in failed.items():
                rows.append([model, mode, peer, f"failed: {why}"[:100], *[""] * 5])
                data.append({"model": model, "mode": mode, "peer": peer, "failed": why})
    head = ["model", "", "peer", "images/s", "±", "ours / peer", "of peak", "peak memory, GB", "GELU"]
    title = f"Throughput, batch {args.batch}, {args.size} px, {args.dtype}"
    note = f"Large matrix products reach {peak / 1e9:,.0f} GFLOP/s. ± is half the distance of the outer quartiles of the turns."
    facts = side_by_side.environment()
    side_by_side.save(args.name, title, [side_by_side.table(head, rows), note], {"peak_flops": peak, "rows": data}, facts)


def model_flops(name: str, size: int) -> int:
    """Of one image through a plain ViT: two for every multiplication of its matrix products."""
    fields = zoo.VIT[name]
    d, (p, q), t = fields["hidden_size"], fields["patches"]["size"], fields["transformer"]
    patches = (size // p) * (size // q)
    n = patches + 1
    block = 4 * n * d * d + 2 * n * n * d + 2 * n * d * t["mlp_dim"]
    return 2 * (patches * p * q * 3 * d + t["num_layers"] * block + d * 1000)


def _peak(dtype: str) -> dict[str, Any]:
    return {"peer": "peak", "batch": PEAK_SIDE[dtype], "dtype": dtype}


def _row(
    model: str, mode: str, peer: str, measured: Measured, ours: Measured | None, batch: int, ideal_seconds: float
) -> list[str]:
    memory = measured.facts["peak_rss"]
    return [
        *(model, mode, peer, f"{batch / measured.median:.2f}", f"{measured.spread:.1%}"),
        f"{measured.median / ours.median:.2f}" if ours else "",
        f"{ideal_seconds / measured.median:.0%}",
        f"{memory / 1e9:.2f}" if memory else "",
        measured.facts["gelu"],
    ]


if __name__ == "__main__":
    main()
