"""DETR-R50 beside transformers' on torch, on one CPU: seconds for an image, and for a training step, and their ratios.

    python benchmarks/detr.py [--height=800] [--width=1066] [--batch=1] [--repeats=5] [--train]

Both run in this process in turn, with random parameters in float32; times are the best of `repeats`, by the clock and, for
machines that others use too, of computing. A step is forward, matching, the loss of all six layers, backward and AdamW, for
all but the first convolution, `layer1` and the norms of the ResNet, with dropout of 0.1 in attention too, as in DETR. A ratio
above 1 means that we are faster.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from configs import detr_r50
from vit_jax.models import get_model
from vit_jax.optimize import trainable
from vit_jax.tasks import matching

OBJECTS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="time a training step, too")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    images = rng.normal(size=(args.batch, args.height, args.width, 3)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.4, (args.batch, OBJECTS, 4)).astype(np.float32)
    labels = rng.integers(1, 90, (args.batch, OBJECTS))
    print(f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} threads, {args.batch} x {args.height} x {args.width}")
    ours, theirs = our_functions(images, boxes, labels), their_functions(images, boxes, labels)
    for name in ("inference", "training step") if args.train else ("inference",):
        pairs = zip(best(ours[name], args.repeats), best(theirs[name], args.repeats), strict=True)
        for what, (mine, their) in zip(("by the clock", "of computing"), pairs, strict=True):
            print(f"{name:14} {what}: ours {mine:7.2f} s   transformers {their:7.2f} s   ratio {their / mine:5.2f}")


def our_functions(images: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], object]]:
    """Functions without arguments that wait for their results."""
    model = get_model("DETR-R50")
    quickly = {"xla_backend_optimization_level": 0}
    params = jax.jit(model.init, compiler_options=quickly)(jax.random.key(0), images[:, :64, :64])["params"]
    trained, frozen = trainable.split(params, freeze=detr_r50.get_config().freeze)
    optimizer = optax.adamw(1e-4)
    state = [trained, optimizer.init(trained)]
    targets = matching.Targets(jnp.asarray(boxes), jnp.asarray(labels), jnp.ones(labels.shape, bool))
    counts = {"num_boxes": labels.size, "num_candidates": len(images) * 100}

    def loss(trained, frozen, images, key):
        params = trainable.merge(trained, frozen)
        outputs = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        return sum(matching.set_loss(outputs["logits"], outputs["boxes"], targets, **counts))

    @jax.jit
    def update(trained, moments, frozen, images, key):
        updates, moments = optimizer.update(jax.grad(loss)(trained, frozen, images, key), moments, trained)
        return optax.apply_updates(trained, updates), moments

    def step() -> None:
        state[:] = jax.block_until_ready(update(*state, frozen, images, jax.random.key(0)))

    def last(params, images):
        outputs = model.apply({"params": params}, images)
        return outputs["logits"][-1], outputs["boxes"][-1]

    infer = jax.jit(last)
    return {"inference": lambda: jax.block_until_ready(infer(params, images)), "training step": step}


def their_functions(images: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], object]]:
    """The same of transformers, which by itself trains nothing of the ResNet, looking for `stage.1` in `stages.1`."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    resnet = ResNetConfig(out_features=["stage4"])
    given = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": resnet}
    model = DetrForObjectDetection(DetrConfig(**given, num_labels=91, auxiliary_loss=True, attention_dropout=0.1))
    for name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_(any(f"stages.{stage}." in name for stage in (1, 2, 3)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    targets = [{"class_labels": torch.from_numpy(c), "boxes": torch.from_numpy(b)} for c, b in zip(labels, boxes, strict=True)]

    def infer() -> None:
        model.eval()
        with torch.inference_mode():
            model(pixel_values=pixels)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=targets).loss.backward()
        optimizer.step()

    return {"inference": infer, "training step": step}


def best(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of the fastest call, after one that may compile: by the clock, and of computing on all threads."""
    function()
    clock, computing = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        function()
        clock.append(time.perf_counter() - start[0])
        computing.append(time.process_time() - start[1])
    return min(clock), min(computing)


if __name__ == "__main__":
    main()
