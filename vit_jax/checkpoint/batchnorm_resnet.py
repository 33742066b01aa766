"""ResNets with BatchNorm of torchvision, timm and transformers, to start the backbone of a detector from.

Only bottlenecks, with the stride in the 3x3 convolution (v1.5, as all three have it). Their heads are left out.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vit_jax.checkpoint import rules
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.family import IMAGENET, count_blocks
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat, Rule, rule
from vit_jax.errors import UserError

_BATCH_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_HEADS = re.compile(r"(fc|classifier(\.1)?)\.(weight|bias)|.*\.num_batches_tracked")

log = logging.getLogger("vit_jax")


def _conv_and_norm(ours: tuple[str, str], theirs: tuple[str, str]) -> list[Rule]:
    """A convolution without bias, and the frozen BatchNorm after it."""
    (our_conv, our_norm), (conv, norm) = ours, theirs
    kernel = rule(f"backbone/{our_conv}/kernel", f"{conv}.weight", rules.CONVOLUTION)
    return [kernel, *(rule(f"backbone/{our_norm}/{name}", f"{norm}.{their}") for name, their in _BATCH_NORM.items())]


def torchvision(prefix: str = "") -> list[Rule]:
    """The names of torchvision and timm; ours begin with `backbone/`, as in a detector."""
    table = _conv_and_norm(("conv1", "bn1"), (f"{prefix}conv1", f"{prefix}bn1"))
    for stage in range(1, 5):
        ours, theirs = f"layer{stage}_{{i}}", f"{prefix}layer{stage}.{{i}}"
        for k in (1, 2, 3):
            table += _conv_and_norm((f"{ours}/conv{k}", f"{ours}/bn{k}"), (f"{theirs}.conv{k}", f"{theirs}.bn{k}"))
        shortcut = f"{theirs}.downsample.0", f"{theirs}.downsample.1"
        table += _conv_and_norm((f"{ours}/conv_proj", f"{ours}/bn_proj"), shortcut)
    return table


def transformers(prefix: str) -> list[Rule]:
    """The same for transformers' own names."""

    def names(at: str) -> tuple[str, str]:
        return f"{at}.convolution", f"{at}.normalization"

    table = _conv_and_norm(("conv1", "bn1"), names(f"{prefix}embedder.embedder"))
    for stage in range(4):
        ours, theirs = f"layer{stage + 1}_{{i}}", f"{prefix}encoder.stages.{stage}.layers.{{i}}"
        for k in range(3):
            table += _conv_and_norm((f"{ours}/conv{k + 1}", f"{ours}/bn{k + 1}"), names(f"{theirs}.layer.{k}"))
        table += _conv_and_norm((f"{ours}/conv_proj", f"{ours}/bn_proj"), names(f"{theirs}.shortcut"))
    return table


def open_resnet(path: Path, theirs: Flat) -> Opened | None:
    """The ResNet in a file's arrays, without its head; None for other models. Raises UserError for one without bottlenecks."""
    layout = _layout(theirs)
    if layout is None:
        return None
    family, table, conv1, stages = layout
    kept = {name: x for name, x in theirs.items() if not _HEADS.fullmatch(name)}
    if not any(name.startswith(stages[0]) and re.search(r"\.0\.(bn3|layer\.2)\.", name) for name in kept):
        raise UserError(
            f"{path} is a ResNet of two convolutions a block, such as ResNet-18: use one of bottlenecks, ResNet-50 or up"
        )
    units = tuple(count_blocks(kept, stage) for stage in stages)
    ours = rules.read(table, kept, blocks=max(units), heads=1, where=str(path))
    if left := [name for name in theirs if name not in kept and "num_batches" not in name]:
        log.info("opened   %s: its head is left (%s)", path, ", ".join(left))
    description = Description(
        model_name=path.stem,
        model_type="BatchNormResNet",
        model={"num_layers": list(units), "width": kept[conv1].shape[0]},
        image_size=(224, 224),
        grid=(7, 7),
        mean=IMAGENET[0],
        std=IMAGENET[1],
        class_names=(),
        task={"type": "detect"},
    )
    return Opened(path, family, {name.removeprefix("backbone/"): x for name, x in ours.items()}, description)


def _layout(theirs: Mapping[str, np.ndarray]) -> tuple[str, list[Rule], str, list[str]] | None:
    """(family, table, name of the first kernel, what the names of each stage's blocks begin with), None for other models."""
    if "conv1.weight" in theirs and "layer1.0.bn1.running_mean" in theirs:
        return "ResNet of torchvision or timm", torchvision(), "conv1.weight", [f"layer{i}." for i in (1, 2, 3, 4)]
    for prefix in ("resnet.", ""):
        if (conv1 := f"{prefix}embedder.embedder.convolution.weight") in theirs:
            stages = [f"{prefix}encoder.stages.{i}.layers." for i in range(4)]
            return "Hugging Face ResNet", transformers(prefix), conv1, stages
    return None
