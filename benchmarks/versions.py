"""Images a second of this checkout and of another one, alternating on one machine: did a change cost speed?

    git worktree add ../before COMMIT
    python -m benchmarks.versions ../before [--models=ViT-Ti_16,ViT-S_16] [--modes=infer,train] [--batch=8] [--rounds=7]
        [--seconds=3]

A row's ratio is images a second now over images a second there; below 1 it has become slower.
"""

import argparse
from pathlib import Path

from benchmarks import peers, side_by_side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the folder of the other checkout")
    parser.add_argument("--models", default="ViT-Ti_16,ViT-S_16")
    parser.add_argument("--modes", default="infer,train")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3, help="of a turn")
    args = parser.parse_args()
    rows, data = [], []
    for model in args.models.split(","):
        for mode in args.modes.split(","):
            job = {"model": model, "mode": mode, "batch": args.batch, "size": args.size, **peers.job("ours")}
            job |= {"dtype": "float32"}
            jobs = {"now": job, "before": job | {"checkout": str(args.checkout.resolve())}}
            found, failed = side_by_side.alternate(
                "benchmarks.peers", jobs, rounds=args.rounds, seconds=args.seconds, warm_up=2
            )
            if failed:
                raise SystemExit(f"{model} {mode}: {failed}")
            now, before = (found[name] for name in ("now", "before"))
            speeds = [f"{args.batch / x.median:.2f}" for x in (now, before)]
            rows.append([model, mode, *speeds, f"{before.median / now.median:.3f}", f"{now.spread:.1%}"])
            data.append({"model": model, "mode": mode, "now": now.seconds, "before": before.seconds})
    head = ["model", "", "now, images/s", "before, images/s", "now / before", "±"]
    title = f"This checkout beside another one, batch {args.batch}, {args.size} px, float32"
    side_by_side.save("versions", title, [side_by_side.table(head, rows)], {"rows": data}, side_by_side.environment())


if __name__ == "__main__":
    main()
