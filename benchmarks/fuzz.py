"""Damaged files by the thousand: every reader answers or refuses in words, within 5 seconds and a budget of memory.

    python -m benchmarks.fuzz [--cases=20000] [--images=10000] [--by_hand] [--seed=0] [--target=NAME] [--case=N]

Mutated checkpoints of every layout with their JSON, annotations of boxes, images, then cases by hand: see tests/fuzz.py.
Prints what was wrong, and a table of verdicts, also where Ctrl-C ends it. Exit code 1 if anything but answers and refusals
was seen.
"""

import argparse
import collections
import contextlib
import sys
import time

from tests import fuzz, fuzz_by_hand, fuzz_targets


def main() -> int:
    parser = argparse.ArgumentParser(description="Damages files and sees that every reader answers or refuses in words.")
    parser.add_argument("--cases", type=int, default=20_000, help="mutated checkpoints, spread over all layouts")
    parser.add_argument("--images", type=int, default=10_000, help="mutated images, spread over all formats")
    parser.add_argument("--by_hand", action=argparse.BooleanOptionalAction, default=True, help="the cases made by hand")
    parser.add_argument("--only", default="", help="of the cases made by hand those with this in their name")
    parser.add_argument("--seed", type=int, default=0, help="where the numbers of the cases start")
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--case", help="only this case, by number, or by name of one made by hand")
    args = parser.parse_args()
    if args.case:
        plan = [(args.target or "", int(args.case) if args.case.removeprefix("-").isdecimal() else args.case)]
    else:
        groups = (fuzz_targets.CHECKPOINTS, args.cases), (fuzz_targets.IMAGES, args.images)
        chosen = [([t for t in group if args.target in (None, t)], count) for group, count in groups]
        plan = [(t, args.seed + i) for group, n in chosen for i in range(n // max(1, len(group))) for t in group]
        groups = fuzz_by_hand.GROUPS if args.by_hand else ()
        plan += [(f"by hand: {group}", name) for group in groups for name in fuzz_by_hand.cases(group) if args.only in name]
    counts, slowest, largest, start = collections.defaultdict(collections.Counter), (0.0,), (0.0,), time.time()
    with contextlib.suppress(KeyboardInterrupt), fuzz.Worker() as worker:
        for done, (target, case) in enumerate(plan, 1):
            verdict = worker.run(target, case)
            counts[target][verdict.kind] += 1
            slowest, largest = max(slowest, (verdict.seconds, target, case)), max(largest, (verdict.megabytes, target, case))
            if verdict.kind not in ("answer", "refusal") or args.case:
                print(
                    f"{target} {case}: {verdict.kind}, {verdict.seconds} s, {verdict.megabytes} MB: {verdict.text}", flush=True
                )
            if done % 1000 == 0:
                print(f"{done:,} of {len(plan):,} cases in {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    for target, kinds in counts.items():
        print(f"{target:20} {sum(kinds.values()):6,}  " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common()))
    print(f"slowest {slowest}, largest {largest}")
    return int(any(kind not in ("answer", "refusal") for kinds in counts.values() for kind in kinds))


if __name__ == "__main__":
    sys.exit(main())
