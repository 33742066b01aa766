"""Scale on paper: predictions, not measurements, of the steps of large ViTs on many chips: python -m benchmarks.scaling_table

The plan of 8 chips in an fsdp mesh, with the same number of images on every chip, tells those of n: a chip computes the same,
the state and the gradients are divided by n, and a ring of n sends (n−1)/n of the data.
"""

import argparse
import dataclasses

from benchmarks import side_by_side
from configs import pretrain
from vit_jax.tools import plan, roofline

SIZES = {  # the recipe, and what it changes
    "B/16": ("b16", {}),
    "L/16": ("l16", {}),
    "H/14": ("h14", {}),
    "g/14": ("g14", {}),
    "G/14": ("g14", {"hidden_size": 1664, "transformer.num_layers": 48, "transformer.mlp_dim": 8192}),  # arXiv 2106.04560
    "e/14": ("e14", {}),
}
CHIPS, PLANNED = (8, 64, 512, 4096), 8
IMAGES = 32  # a chip
BATCH = 4096  # the usual one of ViTs


def planned(size: str) -> plan.Plan:
    recipe, changes = SIZES[size]
    config = pretrain.get_config(f"{recipe},imagenet2012")
    for name, value in changes.items():
        config.model.update_from_flattened_dict({name: value})
    config.update({"batch": IMAGES * PLANNED, "accum_steps": 1, "dtype": "bfloat16", "optim_dtype": "bfloat16"})
    config.update({"parallel": "mesh", "scan": True, "remat": "full", "mesh": {"data": 1, "fsdp": -1}})
    return plan.make_plan(config)


def on(p: plan.Plan, chips: int) -> plan.Plan:
    """The plan of `PLANNED` chips, for as many images on each of others."""
    share, ring = PLANNED / chips, (chips - 1) / chips * PLANNED / (PLANNED - 1)
    return dataclasses.replace(
        p,
        devices=chips,
        state={name: round(x * share) for name, x in p.state.items()},
        gradients=round(p.gradients * share),
        temporaries=p.temporaries - p.gradients + round(p.gradients * share),
        model_flops=p.model_flops / share,
        sent={kind: x * ring for kind, x in p.sent.items()},
    )


def rows(size: str, accelerator: roofline.Accelerator, p: plan.Plan, first: roofline.Prediction) -> list[list[str]]:
    """Of each number of chips: time, images, memory, traffic, efficiency, and how that is with a batch of `BATCH` in all."""
    found = []
    for chips in CHIPS:
        q = on(p, chips)
        sent = sum(q.sent.values())
        exchange = roofline.exchange_seconds(sent, chips, accelerator)
        least = max(q.model_flops / chips / accelerator.bfloat16 / roofline.REACHED[1], first.instructions)
        computed = least * BATCH / chips / IMAGES
        figures = [f"{1e3 * least:.0f}", f"{1e3 * exchange:.0f}", f"{IMAGES * chips / (least + exchange):,.0f}"]
        figures += [f"{q.needed / plan.GB:.1f}", f"{sent / plan.GB:.1f}"]
        shares = [f"{least / (least + exchange):.0%} to {least / max(least, exchange):.0%}"]
        shares += [f"{computed / (computed + exchange):.0%} to {computed / max(computed, exchange):.0%}"]
        found.append([size, f"{p.parameters / 1e6:,.0f} M", f"{chips:,}", *figures, *shares])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--accelerators", nargs="+", default=["H100", "v5p"])
    args = parser.parse_args()
    plan.use_devices(PLANNED)
    accelerators = [roofline.find(name) for name in args.accelerators]
    lines = {accelerator.name: [] for accelerator in accelerators}
    for size in args.sizes:
        p = planned(size)
        for accelerator in accelerators:
            lines[accelerator.name] += rows(size, accelerator, p, plan.predict(p, accelerator))
            print("\n".join(map(str, lines[accelerator.name][-len(CHIPS) :])), flush=True)
    header = ["model", "parameters", "chips", "compute, ms", "exchange, ms", "images/s", "GB a chip", "GB sent", "efficiency"]
    header += [f"at batch {BATCH:,} in all"]
    tables = [f"## {name}\n\n{side_by_side.table(header, found)}" for name, found in lines.items()]
    title = "Predictions for large ViTs, not measurements"
    side_by_side.save("scaling_on_paper", title, tables, {}, side_by_side.environment())


if __name__ == "__main__":
    main()
