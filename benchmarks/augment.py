"""What augmentation on the device costs: images/s of each operation, and its share of a ViT-S/16 training step.

    python benchmarks/augment.py [--batch=64] [--size=224] [--repeats=10]

Each operation is compiled by itself, so that it reads and writes its images once more than inside a training step. The
step is forward, backward and AdamW, in bfloat16 on a GPU or TPU and in float32 on a CPU. Times are the best of `repeats`.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import models
from vit_jax.data.device import augment, mix

CLASSES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    images = jax.device_put(rng.integers(256, size=(args.batch, args.size, args.size, 3), dtype=np.uint8))
    seeds = jax.device_put(rng.integers(2**32, size=args.batch, dtype=np.uint32))
    labels = jax.device_put(rng.integers(CLASSES, size=args.batch, dtype=np.int32))
    normal, targets = augment.normalize(images), mix.smooth(labels, CLASSES)

    step, state = training_step(args.size)
    step_time = best(step, (state, normal, targets), args.repeats)
    device = jax.devices()[0]
    print(f"{device.device_kind}, {args.batch} images of {args.size} x {args.size}")
    print(f"{'':24} {'images/s':>10} {'ms a batch':>11} {'share of a step':>16}")
    report("ViT-S/16 training step", args.batch, step_time, step_time)
    for name, (function, inputs) in operations(images, seeds, normal, targets).items():
        report(name, args.batch, best(jax.jit(function), inputs, args.repeats), step_time)


def operations(images, seeds, normal, targets) -> dict[str, tuple[Callable, tuple]]:
    """Name → (function, what it takes)."""
    on_bytes = {
        "flip": {"flip": True},
        "color jitter 0.3": {"color_jitter": 0.3},
        "3-Augment": {"three_augment": True},
        "3-Augment + jitter": {"three_augment": True, "color_jitter": 0.3},
        "RandAugment (2, 10)": {"randaug": (2, 10)},
    }
    on_floats = {
        "random erasing": (functools.partial(augment.random_erasing, probability=0.25), (normal, seeds)),
        "Mixup": (mix.make_mix(mixup=0.8, cutmix=0.0), (normal, targets, jax.random.key(0))),
        "Mixup or CutMix": (mix.make_mix(mixup=0.8, cutmix=1.0), (normal, targets, jax.random.key(0))),
    }
    bytes_first = {
        name: (augment.make_augment(**{"flip": False, **options}), (images, seeds)) for name, options in on_bytes.items()
    }
    return bytes_first | on_floats


def training_step(size: int) -> tuple[Callable, tuple]:
    """(step, state): (state, normalised images, targets) → state."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = models.get_model("ViT-S_16", num_classes=CLASSES, dtype=dtype)
    optimizer = optax.adamw(1e-3)

    def init(key: jax.Array):
        params = model.init(key, jnp.zeros((1, size, size, 3)))["params"]
        return params, optimizer.init(params)

    def loss(params, images, targets):
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
        return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()

    @jax.jit
    def step(state, images, targets):
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params, images, targets), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step, jax.jit(init)(jax.random.key(0))


def best(function: Callable, inputs: tuple, repeats: int) -> float:
    """Seconds of the fastest call, after one that compiles."""
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - start)
    return min(times)


def report(name: str, batch: int, seconds: float, step_seconds: float) -> None:
    print(f"{name:24} {batch / seconds:10,.0f} {seconds * 1e3:11,.2f} {seconds / step_seconds:16.1%}", flush=True)


if __name__ == "__main__":
    main()
