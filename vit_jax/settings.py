"""Every field of a training recipe, with its default. `configs/common.py` makes recipes of them; `train.py` reads them."""

import dataclasses
import operator
import typing
from collections.abc import Mapping
from typing import Any

from vit_jax.data.host import resize, view
from vit_jax.errors import UserError, unknown
from vit_jax.fields import unknown_field
from vit_jax.files import COMPILED_PROGRAMS
from vit_jax.models import zoo

TRAINERS = ("train", "evaluate", "inference_time")
DTYPES = ("float32", "bfloat16", "float16")
PARALLEL = ("pmap", "mesh")
MESH_RULES = ("fsdp", "zero")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """`config.pp`: which images, and what happens to them on the host."""

    train: str = "train"  # split to train on, e.g. train[:98%]
    test: str = "test"  # split to evaluate on
    crop: int = 224  # size of the images that the model sees
    crop_width: int | None = None  # their width, where it is not the height, which is then `crop`
    max_patches: int = 0  # images keep their shapes, each as large as so many patches let it be; 0: all become crop
    enlarge: bool = True  # with max_patches; False: an image that has fewer patches keeps its size
    pack: int = 0  # with enlarge=False: as many images, on average, share a row of max_patches in training, see tasks/rows.py
    crop_method: str = "inception"  # how training images are cut out; or random_resized (torchvision's), simple (DeiT III's)
    area: tuple[float, float] = (0.05, 1.0)  # share of the image that such a crop covers, but for simple
    resize: int | None = None  # train on random crops of images resized to this size, whatever crop_method
    eval_resize: int | None = None  # shorter side before a centre crop; None: the whole image is resized to crop
    interpolation: str = "bilinear"  # or bicubic, which needs antialias
    antialias: bool = False  # as Pillow, torchvision and timm do; False: as TensorFlow does
    floor_cut: bool = False  # half a pixel at a centre crop is rounded down, as transformers does; False: to even
    scaled_decoding: bool = True  # in training, a JPEG at 1/2, 1/4 or 1/8 if a crop needs no more; False: as TensorFlow does
    mean: tuple[float, ...] = ()  # by channel of the 0..255 pixels; empty: as the checkpoint says, from nothing 127.5
    std: tuple[float, ...] = ()  # the same for the standard deviation; ImageNet's are (58.395, 57.12, 57.375)
    flip: bool = True  # mirror at random: off where left and right differ, as in digits


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """`config.augment`: what happens to training images on the devices, besides flips. All off by default."""

    color_jitter: float = 0.0  # brightness, contrast and saturation, each by a factor in 1 ± this
    randaug: tuple[int, ...] = ()  # (layers, magnitude of 10), e.g. (2, 10); some shifts are of 100 px: for large images
    three_augment: bool = False  # DeiT III: grey, solarized or blurred
    erasing: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of the Beta distribution
    cutmix: float = 0.0
    mix_prob: float = 1.0  # of a batch being mixed at all
    switch_prob: float = 0.5  # of CutMix where both are on


@dataclasses.dataclass(frozen=True)
class Mesh:
    """`config.mesh`, for parallel="mesh": how many devices each axis has; -1 once, for those that are left."""

    data: int = -1  # copies of the state, each with a share of the batch
    fsdp: int = 1  # a share of the batch and of the state each
    tensor: int = 1  # a share of the heads and hidden units each
    rules: str = "fsdp"  # or zero (gradients and optimiser only), see optimize/sharding.py
    more_rules: tuple[Any, ...] = ()  # (pattern, axes) that come before those


@dataclasses.dataclass(frozen=True)
class Lora:
    """`config.lora`: small matrices beside frozen kernels are trained instead of a whole model (arXiv 2106.09685)."""

    rank: int = 0  # 0: off
    alpha: float = 8.0  # the change of a kernel is alpha / rank · A·B
    targets: tuple[str, ...] = (".*/(query|value)/kernel",)  # expressions for the names of the kernels
    train: tuple[str, ...] = ("head/.*",)  # and of parameters that are trained themselves


@dataclasses.dataclass(frozen=True)
class HeadFit:
    """`config.head_fit`: before step 1 the head becomes the logistic regression on features, see fit_head.py."""

    views: int = 0  # of every image: as evaluated, mirrored, then as many cut out as in training; 0: off
    layers: int = 1  # the last blocks of a ViT that its head reads, where it pools tokens without parameters; or all there are
    l2: tuple[float, ...] = tuple(10.0 ** (i / 2) for i in range(-8, 3))  # of ‖W‖²/2; of several one is chosen


@dataclasses.dataclass(frozen=True)
class Distillation:
    """`config.distill`: learning from a teacher, see tasks/distill.py."""

    teacher: str | None = None  # anything that `config.pretrained` may name, with a head for the same classes
    kind: str = "soft"  # or hard, function_matching
    temperature: float = 1.0
    alpha: float = 0.5  # the teacher's share of the loss


@dataclasses.dataclass(frozen=True)
class Settings:
    """`config`: the names and defaults are the reference's where it has them."""

    trainer: str = "train"  # or evaluate
    evaluator: str = "classify"  # what trainer="evaluate" runs: that and all `evaluators`, or one of them, such as knn
    tome: int = 0  # of trainer="evaluate": tokens that each block of a ViT merges with others, see models/token_merging.py
    seed: int = 0
    # model
    model_type: str = "ViT"
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # empty: the architecture of `pretrained`
    dtype: str = "float32"  # what the model computes in; parameters are always float32
    # where to start from: `pretrained` if set, else a file in `pretrained_dir` if set, else from nothing
    pretrained: str | Mapping[str, str] | None = None  # a file or folder of any family, a workdir, gs://…, https://…,
    # hf://OWNER/NAME; or one for each tower, {"img": …, "txt": …}, where "" is from nothing
    pretrained_dir: str | None = "."  # folder of published files: {model_name}.npz, or what model_or_filename says
    model_or_filename: str | None = None  # AugReg: an architecture such as Ti_16, or the name of a file
    # devices and memory
    parallel: str = "pmap"  # or mesh
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    remat: str = "none"  # or dots, full: what of a block is computed again rather than kept
    scan: bool = False  # compile one block and loop over it
    compilation_cache: str | None = COMPILED_PROGRAMS  # folder of compiled programs, which later runs take from there; "": none
    # data
    dataset: str | None = None  # digits, a folder of images, or a name that tensorflow-datasets knows
    tfds_data_dir: str | None = None
    tfds_manual_dir: str | None = None
    pp: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    augment: Augmentation = dataclasses.field(default_factory=Augmentation)
    cache_gb: float = 1.0  # training images are decoded once and kept in memory if all of them take no more; 0: never
    cache_dir: str = ""  # a folder for them, decoded, in a file that is mapped into memory, where they take more; "": none
    cache_side: int = 0  # with cache_dir: images are kept with a shorter side of at most this, such as 256; 0: in full
    changed_data: str = "error"  # when a run is continued with other data than it began with; or "accept"
    bad_images: str = "error"  # or "skip": training goes on with another image, and says so
    shuffle_buffer: int = 50_000  # every epoch is a full permutation, which needs no buffer; 0 keeps the files' order
    prefetch: int = 2  # batches sent to the devices ahead of time
    batch: int = 512  # over all devices and micro-batches
    batch_eval: int = 512
    # what is learnt
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {"type": "classify", …}, see tasks/
    loss: str = "softmax"  # or sigmoid
    label_smoothing: float = 0.0
    distill: Distillation = dataclasses.field(default_factory=Distillation)
    head_fit: HeadFit = dataclasses.field(default_factory=HeadFit)
    # what is trained: expressions for whole names of parameters, such as "head/.*"
    train_only: tuple[str, ...] = ()  # everything, if empty
    freeze: tuple[str, ...] = ()
    lora: Lora = dataclasses.field(default_factory=Lora)
    # optimisation
    total_steps: int | None = None
    accum_steps: int = 8  # micro-batches that a batch is cut into, to save memory
    optimizer: str = "sgd"  # or another of optim.OPTIMIZERS
    optimizer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its own, such as {"b2": 0.95}
    optim_dtype: str = "bfloat16"  # of the momentum
    base_lr: float = 0.03
    decay_type: str = "cosine"  # or linear, step, rsqrt, constant
    warmup_steps: int = 500
    linear_end: float = 1e-5  # the rate that linear ends with
    decay_steps: tuple[int, ...] = ()  # of step: after each of them a tenth of the rate
    cooldown_steps: int = 0  # of rsqrt and constant: a line to 0 at the end
    timescale: float = 10_000.0  # of rsqrt
    weight_decay: float = 0.0
    weight_decay_end: float | None = None  # with this the decay goes to it by a half cosine over all steps
    lr_factors: tuple[Any, ...] = ()  # (expression for names, factor) pairs; the first that matches counts
    layer_decay: float | None = None  # such as 0.75: earlier blocks learn more slowly
    sharpness: str | None = None  # sam or gsam
    sharpness_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {"rho": 0.05}, see sharpness.py
    grad_norm_clip: float | None = 1.0
    ema_decay: float | None = None  # of a running average of the parameters, evaluated and saved beside
    ema_decay_end: float | None = None  # with this the decay rises to it by a half cosine over all steps
    nonfinite: str = "stop"  # at a loss or gradient that is not finite; or skip the step
    nonfinite_limit: int = 10  # skipped steps in a row at which training stops after all
    # how often, in steps
    progress_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 1_000
    keep: int = 1  # how many checkpoints stay
    keep_best: str | None = None  # a metric such as accuracy_test: its best checkpoint stays too, and is model_best.npz
    end_with_best: bool = False  # the run's result is that best one, not what the last step made of it
    evaluators: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {name: {"every": steps, …}}, see evaluators/
    report: bool = True  # report.html at the end: curves, mistakes, calibration, the recipe, see docs/report.md

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Reads a ConfigDict or dict. An unknown field, or a value that makes no sense, is a UserError."""
        return _read(cls, config, "config").checked()

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the images that the model sees."""
        return self.pp.crop, self.pp.crop_width or self.pp.crop

    @property
    def tfds_folders(self) -> dict[str, str | None]:
        """Keywords of `data.sources.get_source`."""
        return {"tfds_data_dir": self.tfds_data_dir, "tfds_manual_dir": self.tfds_manual_dir}

    @property
    def caching(self) -> dict[str, Any]:
        """Keywords of `data.memory.kept`."""
        return {"cache_gb": self.cache_gb, "cache_dir": self.cache_dir, "cache_side": self.cache_side}

    @property
    def sources(self) -> dict[str, str]:
        """What `pretrained` names, by tower; that of a whole model is called ""."""
        named = self.pretrained if isinstance(self.pretrained, Mapping) else {"": self.pretrained}
        return {tower: source for tower, source in named.items() if source}

    def checked(self) -> "Settings":
        """The settings; UserError for a value that makes no sense."""
        self._check_choices()
        self._check_numbers()
        return self

    def _check_choices(self) -> None:
        choices = {
            "trainer": TRAINERS,
            "bad_images": ("error", "skip"),
            "changed_data": ("error", "accept"),
            "dtype": DTYPES,
            "optim_dtype": DTYPES,
            "parallel": PARALLEL,
            "mesh.rules": MESH_RULES,
            "remat": ("none", "dots", "full"),
            "loss": ("softmax", "sigmoid"),
            "nonfinite": ("stop", "skip"),
            "pp.crop_method": view.CROP_METHODS,
            "pp.interpolation": resize.INTERPOLATIONS,
        }
        for name, allowed in choices.items():
            if (value := operator.attrgetter(name)(self)) not in allowed:
                raise unknown(f"config.{name}", value, allowed)
        for tower, source in self.sources.items():
            if not isinstance(source, str):
                field = f"config.pretrained.{tower}".rstrip(".")
                raise UserError(f"{field}={source!r} must be the name of a file or folder, such as ./{source}")
        if not self.model and "" not in self.sources:
            raise UserError(_without_model(self.dataset or "FOLDER"))
        if not self.dataset:
            raise UserError("config.dataset is not set: --config.dataset=digits, a folder of photos, or a tfds name")
        least = 0 if self.head_fit.views else 1
        if self.trainer == "train" and (self.total_steps is None or self.total_steps < least):
            raise UserError(f"config.total_steps={self.total_steps}: say how many steps to train, {least} or more")
        if self.head_fit.views and not (self.sources or self.pretrained_dir):
            raise UserError("config.head_fit is for the features of a trained model: name it by --config.pretrained")
        if self.lora.rank and (self.freeze or self.train_only):
            raise UserError("config.lora freezes all but config.lora.train: leave config.freeze and config.train_only empty")
        if self.lora.rank and not (self.sources or self.pretrained_dir):
            raise UserError("config.lora changes a trained model: name it by --config.pretrained")
        if self.lora.rank and self.sources and "" not in self.sources:
            raise UserError("config.lora changes a whole model: config.pretrained must name one file, not one for each tower")
        if self.mesh != Mesh() and self.parallel != "mesh":
            raise UserError("config.mesh is set, but config.parallel is pmap: add --config.parallel=mesh")
        if self.sharpness_options and not self.sharpness:
            raise UserError("config.sharpness_options are set without --config.sharpness=sam or gsam")
        if self.lora != Lora() and not self.lora.rank:
            raise UserError("config.lora is set without a rank: add --config.lora.rank=8")
        if self.distill != Distillation() and not self.distill.teacher:
            raise UserError("config.distill needs a teacher: --config.distill.teacher names a trained classifier")
        if self.distill.teacher and self.loss != "softmax":
            raise UserError(f"config.loss={self.loss} and config.distill exclude each other: a teacher is matched by softmax")
        if self.end_with_best and not self.keep_best:
            raise UserError("config.end_with_best needs the metric to be best in: add --config.keep_best=accuracy_test")
        if self.cache_side and not self.cache_dir:
            raise UserError(f"config.cache_side={self.cache_side} needs a folder: --config.cache_dir=DIR")
        if self.evaluator != "classify" and self.trainer != "evaluate":
            raise UserError(f"config.evaluator={self.evaluator} needs --config.trainer=evaluate")
        if self.tome and (self.trainer != "evaluate" or self.scan or self.remat != "none"):
            raise UserError(
                f"config.tome={self.tome} is for trained models: it needs --config.trainer=evaluate, --config.scan=False "
                "and --config.remat=none"
            )

    def _check_numbers(self) -> None:
        at_least = {"seed": 0, "shuffle_buffer": 0, "warmup_steps": 0, "weight_decay": 0, "base_lr": 0, "cooldown_steps": 0}
        at_least |= {"nonfinite_limit": 1, "head_fit.views": 0, "head_fit.layers": 1}
        at_least |= dict.fromkeys(("prefetch", "batch_eval", "progress_every", "eval_every", "checkpoint_every", "keep"), 1)
        at_least |= dict.fromkeys(("augment.color_jitter", "augment.mixup", "augment.cutmix", "cache_gb", "cache_side"), 0)
        for name, least in at_least.items():
            if not (value := operator.attrgetter(name)(self)) >= least:  # NaN is not
                raise UserError(f"config.{name}={value} must be at least {least}")
        for name in ("label_smoothing", "augment.erasing", "augment.mix_prob", "augment.switch_prob"):
            if not 0 <= (value := operator.attrgetter(name)(self)) <= 1:
                raise UserError(f"config.{name}={value} must be between 0 and 1")
        if not self.head_fit.l2 or not all(isinstance(l2, int | float) and 0 < l2 < 1e6 for l2 in self.head_fit.l2):
            raise UserError(f"config.head_fit.l2={self.head_fit.l2} must be one or more positive numbers, such as (0.001, 0.1)")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"config.ema_decay={self.ema_decay} must be from 0 to below 1, such as 0.9999")
        if self.ema_decay_end is not None and (self.ema_decay is None or not 0 <= self.ema_decay_end <= 1):
            raise UserError(
                f"config.ema_decay_end={self.ema_decay_end} must be from 0 to 1, and needs config.ema_decay to begin with"
            )
        if self.weight_decay_end is not None and not self.weight_decay_end >= 0:
            raise UserError(f"config.weight_decay_end={self.weight_decay_end} must be at least 0")
        if self.pp.crop < 1 or (self.pp.crop_width is not None and self.pp.crop_width < 1):
            raise UserError(f"config.pp.crop={self.pp.crop} must be the size of an image, such as 224")
        if not self.pp.enlarge and not self.pp.max_patches:
            raise UserError("config.pp.enlarge=False is for images that keep their shapes: add --config.pp.max_patches=256")
        if self.pp.pack and (self.pp.enlarge or not 0 < self.pp.pack <= self.pp.max_patches):
            raise UserError(
                f"config.pp.pack={self.pp.pack} is from 1 to config.pp.max_patches={self.pp.max_patches}, and for images that "
                "leave room in a row: add --config.pp.enlarge=False"
            )
        if self.pp.interpolation != "bilinear" and not self.pp.antialias:
            raise UserError(f"config.pp.interpolation={self.pp.interpolation} needs --config.pp.antialias=True")
        if self.pp.eval_resize is not None and self.pp.eval_resize < min(self.pp.crop, self.pp.crop_width or self.pp.crop):
            raise UserError(f"config.pp.eval_resize={self.pp.eval_resize} is smaller than config.pp.crop={self.pp.crop}")
        for name in ("mean", "std"):
            numbers, least = getattr(self.pp, name), 1e-3 if name == "std" else -1e6
            if len(numbers) not in (0, 3) or not all(isinstance(x, int | float) and least <= x <= 1e6 for x in numbers):
                raise UserError(f"config.pp.{name}={numbers} must be three numbers, such as (123.675, 116.28, 103.53)")
        if self.grad_norm_clip is not None and self.grad_norm_clip < 0:
            raise UserError(f"config.grad_norm_clip={self.grad_norm_clip} must be positive, or 0 for none")
        if len(self.pp.area) != 2 or not 0 < self.pp.area[0] <= self.pp.area[1] <= 1:
            raise UserError(f"config.pp.area={self.pp.area} must be two shares of the image, such as (0.05, 1.0)")


def _without_model(dataset: str) -> str:
    models = (("ViT-Ti_16", "for a laptop"), ("ViT-S_16", "for a small GPU"), ("ViT-B_16", "for a GPU"))
    return (
        "config.model is empty. To start from a trained model, which tells its architecture, add one of these or any other:\n"
        + "".join("  --config.pretrained={}   ({} MiB, {})\n".format(*zoo.PUBLISHED[name], use) for name, use in models)
        + f"To train a small model from nothing: --config=small_data:micro4,{dataset}\n"
        f"To take an architecture by its name: --config=vit:b16,{dataset}, or one of configs.models.MODEL_CONFIGS"
    )


def nested(cls: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses themselves."""
    return {name: kind for name, kind in typing.get_type_hints(cls).items() if dataclasses.is_dataclass(kind)}


def check_names(cls: type, fields: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a name that is no field of the dataclass `cls`."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise unknown_field(where, name, known)


def _read(cls: type, config: Mapping[str, Any], where: str) -> Any:
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    check_names(cls, fields, where)
    for name, kind in nested(cls).items():
        fields[name] = _read(kind, fields.get(name) or {}, f"{where}.{name}")
    return cls(**fields)
