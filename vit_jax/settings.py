"""Every field of a training recipe, with its default. `configs/common.py` makes recipes of them; `train.py` reads them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError, unknown

TRAINERS = ("train", "evaluate", "inference_time")
EVALUATORS = ("classify", "knn")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """`config.pp`."""

    train: str = "train"  # split to train on, e.g. train[:98%]
    test: str = "test"  # split to evaluate on
    crop: int = 224  # size of the images that the model sees
    crop_width: int | None = None  # their width, where it is not the height, which is then `crop`
    resize: int | None = None  # train on random crops of images resized to this size, instead of Inception crops
    area: tuple[float, float] = (0.05, 1.0)  # share of the image that an Inception crop covers
    flip: bool = True  # mirror at random: off where left and right differ, as in digits


@dataclasses.dataclass(frozen=True)
class Settings:
    """`config`: the names and defaults are the reference's where it has them."""

    trainer: str = "train"  # or evaluate
    evaluator: str = "classify"  # or knn: how trainer="evaluate" scores
    seed: int = 0
    # model
    model_type: str = "ViT"
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # empty: the architecture of `pretrained`
    dtype: str = "float32"  # what the model computes in; parameters are always float32
    # where to start from: `pretrained` if set, else a file in `pretrained_dir` if set, else from nothing
    pretrained: str | None = None  # a file or folder of any family, a workdir, gs://…, https://…, hf://OWNER/NAME
    pretrained_dir: str | None = "."  # folder of published files: {model_name}.npz, or what model_or_filename says
    model_or_filename: str | None = None  # AugReg: an architecture such as Ti_16, or the name of a file
    # data
    dataset: str | None = None  # digits, a folder of images, or a name that tensorflow-datasets knows
    tfds_data_dir: str | None = None
    tfds_manual_dir: str | None = None
    pp: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    bad_images: str = "error"  # or "skip": training goes on with another image, and says so
    shuffle_buffer: int = 50_000  # every epoch is a full permutation, which needs no buffer; 0 keeps the files' order
    prefetch: int = 2  # batches sent to the devices ahead of time
    batch: int = 512  # over all devices and micro-batches
    batch_eval: int = 512
    # optimisation
    total_steps: int | None = None
    accum_steps: int = 8  # micro-batches that a batch is cut into, to save memory
    optimizer: str = "sgd"  # or adamw
    optim_dtype: str = "bfloat16"  # of the momentum
    base_lr: float = 0.03
    decay_type: str = "cosine"  # or linear
    warmup_steps: int = 500
    weight_decay: float = 0.0
    grad_norm_clip: float | None = 1.0
    # how often, in steps
    progress_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 1_000
    keep: int = 1  # how many checkpoints stay

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Reads a ConfigDict or dict. An unknown field, or a value that makes no sense, is a UserError."""
        fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        check_names(cls, fields, "config")
        pp = dict(fields.get("pp") or {})
        check_names(Preprocessing, pp, "config.pp")
        settings = cls(**fields | {"pp": Preprocessing(**pp)})
        settings._check_values()
        return settings

    def _check_values(self) -> None:
        choices = {
            "trainer": TRAINERS,
            "evaluator": EVALUATORS,
            "bad_images": ("error", "skip"),
            "dtype": DTYPES,
            "optim_dtype": DTYPES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise unknown(f"config.{name}", getattr(self, name), allowed)
        if not self.model and not self.pretrained:
            raise UserError(
                "config.model is empty: take it from configs.models.MODEL_CONFIGS, use configs/vit.py:b16, "
                "or name a --config.pretrained that tells its architecture"
            )
        if not self.dataset:
            raise UserError("config.dataset is not set: --config.dataset=digits, a folder of photos, or a tfds name")
        if self.trainer == "train" and (self.total_steps or 0) < 1:
            raise UserError(f"config.total_steps={self.total_steps}: say how many steps to train")
        at_least = {"seed": 0, "shuffle_buffer": 0, "warmup_steps": 0, "weight_decay": 0, "base_lr": 0}
        at_least |= dict.fromkeys(("prefetch", "batch_eval", "progress_every", "eval_every", "checkpoint_every", "keep"), 1)
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"config.{name}={getattr(self, name)} must be at least {least}")
        if self.pp.crop < 1 or (self.pp.crop_width is not None and self.pp.crop_width < 1):
            raise UserError(f"config.pp.crop={self.pp.crop} must be the size of an image, such as 224")
        if self.evaluator != "classify" and self.trainer != "evaluate":
            raise UserError(f"config.evaluator={self.evaluator} needs --config.trainer=evaluate")
        if self.grad_norm_clip is not None and self.grad_norm_clip < 0:
            raise UserError(f"config.grad_norm_clip={self.grad_norm_clip} must be positive, or 0 for none")
        if len(self.pp.area) != 2 or not 0 < self.pp.area[0] <= self.pp.area[1] <= 1:
            raise UserError(f"config.pp.area={self.pp.area} must be two shares of the image, such as (0.05, 1.0)")


def check_names(cls: type, fields: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a name that is no field of the dataclass `cls`."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise unknown(f"field of {where}", name, known)
