"""SigLIP beside transformers' on torch, on one CPU: seconds of a forward pass and of a training step, and their ratios.

    python -m benchmarks.image_text [--size=b16] [--batch=8] [--repeats=5] [--train]

Both towers of a `SiglipModel`, B/16 at 224 px with texts of 64 tokens, or with --size=small two towers of 6 blocks of width
384, in float32 and with the same parameters, of which the scores are compared first. A step is forward, the sigmoid loss of all
pairs, backward and AdamW. Both run in this process in turn; times are the best of `repeats`, by the clock and, for machines
that others use too, of computing. A ratio above 1 means that we are faster.
"""

import argparse
import tempfile
from collections.abc import Callable

import jax
import numpy as np
import optax
import torch

from benchmarks.detr import best
from vit_jax import checkpoint, models
from vit_jax.models.two_towers import scores
from vit_jax.tasks import pairs

SIZES = {
    "b16": {},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
}
"""What is not as in SigLIP B/16, of each tower."""


class OneDevice:
    """What a contrastive loss asks of the devices, of which there is one."""

    def all_examples(self, tree: object) -> object:
        return tree

    def device_index(self) -> int:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="b16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="time a training step, too")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        measure(args, folder)


def measure(args: argparse.Namespace, folder: str) -> None:
    """Prints times of both; the folder is for the model."""
    model = their_model(SIZES[args.size], folder)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(args.batch, 224, 224, 3)).astype(np.float32)
    tokens = rng.integers(0, 32_000, (args.batch, 64)).astype(np.int32)
    ours, theirs = our_functions(folder, images, tokens), their_functions(model, images, tokens)
    print(f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} threads, {args.batch} images and texts")
    print(f"scores differ by {np.abs(ours['forward']() - theirs['forward']()).max():.1e}")
    for name in ("forward", "training step") if args.train else ("forward",):
        times = zip(best(ours[name], args.repeats), best(theirs[name], args.repeats), strict=True)
        for what, (mine, their) in zip(("by the clock", "of computing"), times, strict=True):
            print(f"{name:14} {what}: ours {mine:7.2f} s   transformers {their:7.2f} s   ratio {their / mine:5.2f}")


def their_model(sizes: dict[str, int], folder: str) -> torch.nn.Module:
    """A `SiglipModel` with drawn parameters, which is saved in the folder."""
    from transformers import SiglipConfig, SiglipModel

    vision = sizes | {"image_size": 224, "patch_size": 16}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=dict(sizes), vision_config=vision))
    model.save_pretrained(folder)
    return model


def our_functions(folder: str, images: np.ndarray, tokens: np.ndarray) -> dict[str, Callable[[], object]]:
    """Functions without arguments that wait for their results."""
    opened = checkpoint.open_checkpoint(folder)
    model = models.build(opened.description.model_type, opened.description.model)
    params = jax.tree.map(jax.numpy.asarray, opened.params)
    optimizer = optax.adamw(1e-5)
    state = [params, optimizer.init(params)]

    def forward(params, images, tokens):
        return scores(*model.apply({"params": params}, images=images, tokens=tokens))

    def loss(params, images, tokens):
        zimg, ztxt, out = model.apply({"params": params}, images=images, tokens=tokens, train=True)
        return pairs.sigmoid_loss((zimg, ztxt), out, OneDevice()).value

    @jax.jit
    def update(params, moments, images, tokens):
        updates, moments = optimizer.update(jax.grad(loss)(params, images, tokens), moments, params)
        return optax.apply_updates(params, updates), moments

    def step() -> None:
        state[:] = jax.block_until_ready(update(*state, images, tokens))

    infer = jax.jit(forward)
    return {"forward": lambda: np.asarray(infer(params, images, tokens)), "training step": step}


def their_functions(model: torch.nn.Module, images: np.ndarray, tokens: np.ndarray) -> dict[str, Callable[[], object]]:
    """The same of transformers, whose loss is the same sum."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    inputs = {
        "pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        "input_ids": torch.from_numpy(tokens).long(),
    }

    def forward() -> np.ndarray:
        model.eval()
        with torch.inference_mode():
            return model(**inputs).logits_per_image.numpy()

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()

    return {"forward": forward, "training step": step}


if __name__ == "__main__":
    main()
