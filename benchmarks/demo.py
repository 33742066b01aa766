"""Measures by how much the demo exceeds what it promises: seeds and instruction sets, as rounding differs among processors.

python benchmarks/demo.py --seeds=10 --isa=SSE4_2,AVX,AVX2

Prints a JSON line for each: accuracy after fine-tuning on all labels, and with few labels, pretrained and from nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from absl import flags
from absl.testing import flagsaver

from vit_jax.tools import demo


def measure(seed: int, root: str) -> dict[str, float]:
    """Accuracy by run, in this process: the runs are those of the demo."""
    from vit_jax import main, overrides, train  # noqa: F401  the flags of what it imports are to stay

    demo.write_images(Path(root, "images"))
    scores = {}
    for name in ("pretrain", "finetune", "few", "few_scratch"):
        argv = ["vit-jax", *demo.arguments(name, root, seed)]
        saved = flagsaver.save_flag_values()
        flags.FLAGS.unparse_flags()
        with mock.patch.object(sys, "argv", argv):
            overrides.parse(argv)
            main.main()
        flagsaver.restore_flag_values(saved)
        scores[name] = round(100 * demo.accuracy(name, root), 2)
    return scores


def cli() -> None:
    """One process for each instruction set, since XLA reads its flags once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--isa", default="SSE4_2,AVX,AVX2", help="of XLA's --xla_cpu_max_isa, with commas")
    parser.add_argument("--out", default="-", help="a file to append to")
    args = parser.parse_args()
    sets = args.isa.split(",")
    if len(sets) > 1:
        for isa in sets:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--isa={isa}"], check=True)
        return
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={args.isa}".strip()
    for seed in range(args.first, args.first + args.seeds):
        with tempfile.TemporaryDirectory() as root:
            line = json.dumps({"isa": args.isa, "seed": seed} | measure(seed, root))
        print(line, flush=True, file=sys.stdout if args.out == "-" else open(args.out, "a"))


if __name__ == "__main__":
    cli()
