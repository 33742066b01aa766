"""Every recipe loads with every argument it promises, holds the published values, and describes a model that exists."""

import importlib
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import (
    augreg,
    augreg_pretrain,
    common,
    deit3,
    dinov2,
    distill,
    gsam,
    inference_time,
    lora_finetune,
    mixer_base16_cifar10,
    mixer_i1k,
    models,
    pretrain,
    sam,
    small_data,
    transfer,
    vit,
    vit_i1k,
    vit_i21k,
    vit_s16_i1k,
)
from tests import command_line
from vit_jax import models as architectures
from vit_jax.errors import UserError
from vit_jax.inference_time import InferenceSettings
from vit_jax.settings import Settings, check_names

MODEL_NAMES = {  # as `configs/vit.py` takes them, and in full
    "testing": "testing",
    "testing_unpooled": "testing-unpooled",
    "ti16": "ViT-Ti_16",
    "s16": "ViT-S_16",
    "b16": "ViT-B_16",
    "l16": "ViT-L_16",
    "h14": "ViT-H_14",
    "s16_gap_norep": "ViT-S_16-gap-norep",
    "b16_gap_norep": "ViT-B_16-gap-norep",
    "b8": "ViT-B_8",
    "s32": "ViT-S_32",
    "b32": "ViT-B_32",
    "l32": "ViT-L_32",
    "s32_gap_norep": "ViT-S_32-gap-norep",
    "b32_gap_norep": "ViT-B_32-gap-norep",
    "r_ti16": "R+ViT-Ti_16",
    "r50_b16": "R50+ViT-B_16",
    "r26_b32": "R26+ViT-B_32",
    "r26_s32": "R26+ViT-S_32",
    "r50_l32": "R50+ViT-L_32",
}
MIXERS = {"Mixer-B_16", "Mixer-B_32", "Mixer-L_16"}
AUGREG = {
    "Ti_16": "ViT-Ti_16",
    "S_32": "ViT-S_32",
    "S_16": "ViT-S_16",
    "B_32": "ViT-B_32",
    "B_16": "ViT-B_16",
    "L_16": "ViT-L_16",
    "R_Ti_16": "R+ViT-Ti_16",
    "R26_S_32": "R26+ViT-S_32",
    "R50_L_32": "R50+ViT-L_32",
}
RECIPES = sorted(path for path in Path(common.__file__).parent.glob("*.py") if path.stem not in ("common", "models"))


def check(config):
    """The settings of a recipe, once its fields are known to fit together and its model to exist."""
    if not config.dataset:
        config.dataset = "digits"
    settings = Settings.from_config(config)
    architectures.build(settings.model_type, {**settings.model, "num_classes": 10})
    return settings


def commands(path):
    """The command lines in a recipe's docstring, as lists of arguments."""
    doc = importlib.import_module(f"configs.{path.stem}").__doc__.replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^ *python -m vit_jax\.main (.*)$", doc, re.MULTILINE)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_command_in_a_recipes_docstring_is_for_it_and_parses(path):
    assert commands(path)
    for args in commands(path):
        assert any(arg.startswith("--workdir=") for arg in args)
        assert any(arg.startswith(f"--config=configs/{path.name}") for arg in args)
        config = command_line.parse(*[arg.replace("configs/", f"{path.parent}/") for arg in args])
        for arg in args:
            if override := re.fullmatch(r"--config\.(\w+)=(.*)", arg):
                assert str(config[override[1]]) == override[2]


def test_every_published_name_has_a_model():
    assert len(MODEL_NAMES) + len(MIXERS) == 23
    assert {*MODEL_NAMES.values(), *MIXERS} <= set(models.MODEL_CONFIGS)
    for name, config in models.MODEL_CONFIGS.items():
        assert config.model_name == name


def test_augreg_names_stand_for_vits_and_hybrids():
    for name, full in AUGREG.items():
        assert models.AUGREG_CONFIGS[name].model_name == full


# configs/vit.py


@pytest.mark.parametrize(("short", "full"), MODEL_NAMES.items())
def test_vit_takes_every_model_by_its_short_and_its_full_name(short, full):
    settings = check(vit.get_config(f"{short},cifar100"))
    assert settings.model["model_name"] == full
    assert settings.base_lr == 0.03
    assert settings == check(vit.get_config(f"{full},cifar100"))


@pytest.mark.parametrize("arg", ["b16,cifar10", "b16", "ViT-B_16,cifar10"])
def test_b16_on_cifar10_has_a_rate_of_its_own(arg):
    assert vit.get_config(arg).base_lr == 0.01


def test_vit_without_argument_is_b16_on_cifar10():
    assert vit.get_config() == vit.get_config("b16,cifar10")


@pytest.mark.parametrize(
    ("dataset", "steps", "train", "test", "crop"),
    [
        ("cifar10", 10_000, "train[:98%]", "test", 384),
        ("cifar100", 10_000, "train[:98%]", "test", 384),
        ("imagenet2012", 20_000, "train[:99%]", "validation", 384),
        ("digits", 500, "train", "test", 16),
        ("oxford_iiit_pet", 500, "train", "test", 224),
        ("my/photos, of 2024", 500, "train", "test", 224),
    ],
)
def test_a_dataset_brings_its_preset(dataset, steps, train, test, crop):
    settings = check(vit.get_config(f"s16,{dataset}"))
    assert (settings.dataset, settings.total_steps) == (dataset, steps)
    assert (settings.pp.train, settings.pp.test, settings.pp.crop) == (train, test, crop)
    assert settings.warmup_steps <= settings.total_steps / 5


def test_digits_are_never_mirrored():
    for dataset in ("digits", "digits_0to4"):
        assert not vit.get_config(f"testing,{dataset}").pp.flip
    assert vit.get_config("testing,cifar10").pp.flip


def test_an_unknown_model_is_refused_with_the_near_ones():
    with pytest.raises(UserError, match="unknown model 'b17': did you mean b16"):
        vit.get_config("b17,cifar10")


# The other recipes


@pytest.mark.parametrize("suffix", ["", "-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"])
@pytest.mark.parametrize(("name", "full"), AUGREG.items())
def test_augreg_takes_every_architecture_and_file_name(name, full, suffix):
    settings = check(augreg.get_config(name + suffix))
    assert settings.model_or_filename == name + suffix
    assert settings.model["model_name"] == full
    assert settings.model["transformer"]["dropout_rate"] == 0
    assert (settings.base_lr, settings.total_steps, settings.warmup_steps) == (0.03, 500, 100)
    assert (settings.pp.resize, settings.pp.crop) == (448, 384)
    assert settings.pretrained_dir == "gs://vit_models/augreg"


def test_augreg_changes_its_own_copy_of_the_model():
    augreg.get_config("R50_L_32")
    assert models.AUGREG_CONFIGS["R50_L_32"].transformer.dropout_rate == 0.1
    assert models.MODEL_CONFIGS["R50+ViT-L_32"].transformer.dropout_rate == 0.1


def test_augreg_refuses_an_unknown_architecture():
    with pytest.raises(UserError, match="unknown AugReg model 'R_Ti_61': did you mean R_Ti_16"):
        augreg.get_config("R_Ti_61-i21k-300ep")


@pytest.mark.parametrize(
    "arg", ["vits14", "vitb14", "vitl16_short", "vitg14", "micro4,digits", "micro4,cifar10", "photos,FOLDER"]
)
def test_dinov2_has_a_teacher_and_whole_patches(arg):
    config = dinov2.get_config(arg)
    assert config.ema_decay_end == 1.0 and config.pp.crop % 2 == 0
    if not arg.startswith("photos"):  # its model is that of the checkpoint
        settings = check(config)
        patch = settings.model["patches"]["size"][0]
        assert settings.task["local_size"] % patch == 0 == settings.pp.crop % patch


def test_dinov2_without_classes_is_not_scored_by_them():
    assert dinov2.get_config("micro4,digits").evaluators and not dinov2.get_config("micro4,unlabelled:photos").evaluators


def test_dinov2s_giant_has_the_published_number_of_parameters():
    settings = check(dinov2.get_config("vitg14"))
    model = architectures.build("ViT", {**settings.model, "num_classes": None})
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 518, 518, 3), np.float32))
    assert round(sum(x.size for x in jax.tree.leaves(shapes)) / 1e6, 1) == 1136.5
    assert (settings.base_lr, settings.total_steps) == (2e-4 * 3**0.5, 625_000)


def test_the_mixer_recipe():
    settings = check(mixer_base16_cifar10.get_config())
    assert (settings.model_type, settings.model["model_name"]) == ("Mixer", "Mixer-B_16")
    assert (settings.dataset, settings.total_steps, settings.base_lr) == ("cifar10", 10_000, 0.03)
    assert (settings.pp.train, settings.pp.test, settings.pp.crop) == ("train[:98%]", "test", 224)


@pytest.mark.parametrize("dataset", ["digits", "digits_0to4", "cifar10", "imagenet2012", "photos"])
@pytest.mark.parametrize("model", ["micro4", "ti16", "r26_s32", "Mixer-B_32"])
def test_pretraining_starts_from_nothing_with_adamw(model, dataset):
    settings = check(pretrain.get_config(f"{model},{dataset}"))
    assert not settings.pretrained_dir and not settings.pretrained and not settings.model_or_filename
    assert (settings.optimizer, settings.optim_dtype, settings.decay_type) == ("adamw", "float32", "cosine")
    assert settings.weight_decay > 0
    assert 0 < settings.warmup_steps < settings.total_steps
    assert settings.model_type == ("Mixer" if "Mixer" in model else "ViT")


# From nothing on ImageNet


@pytest.mark.parametrize(
    ("recipe", "arg", "steps", "decay"),  # decay: what a step at the full rate takes off a kernel, as published
    [
        (vit_s16_i1k, "90", 111_476, 1e-4),
        (vit_s16_i1k, "300", 371_588, 1e-4),
        (vit_i1k, "b16", 92_897, 1e-4),
        (vit_i21k, "b16", 1_036_078, 1e-4),
        (mixer_i1k, "300", 92_897, 1e-4),
        (mixer_i1k, "60", 18_579, 1e-4),
        (augreg_pretrain, "B_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0", 92_897, 1e-4),
        (augreg_pretrain, "R26_S_32-i21k-30ep-lr_0.001-aug_light1-wd_0.03-do_0.1-sd_0.1", 103_607, 3e-5),
        (sam, "b16", 92_897, 9e-4),
        (gsam, "b32", 92_897, 9e-4),
        (deit3, "s,400", 250_227, 8e-5),
        (deit3, "b,800", 500_455, 1.5e-4),
        (deit3, "h,ft224", 50_045, 1e-6),
        (distill, "function_matching,s16,oxford_iiit_pet", 19_406, 3e-4),
        (distill, "deit,s16", 375_341, 5e-5),
    ],
)
def test_epochs_and_weight_decay_are_the_published_ones(recipe, arg, steps, decay):
    config = recipe.get_config(arg)
    config.distill.teacher = "teacher.npz" if recipe is distill else None
    settings = check(config)
    assert settings.total_steps == steps
    assert settings.base_lr * settings.weight_decay == pytest.approx(decay)
    assert settings.warmup_steps < settings.total_steps
    assert settings.pp.eval_resize and not settings.pretrained_dir and not settings.pretrained


@pytest.mark.parametrize("model", ["Ti_16", "S_32", "S_16", "B_32", "B_16", "L_16", "R_Ti_16", "R26_S_32", "R50_L_32"])
@pytest.mark.parametrize("regularisation", ["0.0", "0.1"])
def test_augreg_pretrain_reads_the_names_of_its_checkpoints(model, regularisation):
    settings = check(
        augreg_pretrain.get_config(f"{model}-i21k-300ep-lr_0.001-aug_strong2-wd_0.03-do_{regularisation}-sd_{regularisation}")
    )
    transformer = settings.model["transformer"]
    assert transformer["dropout_rate"] == transformer["stochastic_depth"] == float(regularisation)
    assert (settings.augment.mixup, settings.augment.randaug) == (0.8, (2, 20))
    assert (settings.loss, settings.model["head_bias_init"], settings.batch) == ("sigmoid", -10, 4096)


@pytest.mark.parametrize("name", ["B_16", "B_16-i1k-300ep", "B_16-jft-7ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"])
def test_augreg_pretrain_refuses_other_names(name):
    with pytest.raises(UserError, match="no name of an AugReg model, such as B_16"):
        augreg_pretrain.get_config(name)


@pytest.mark.parametrize("recipe", [vit_i1k, vit_i21k], ids=["i1k", "i21k"])
def test_every_size_has_its_augmentation(recipe):
    for model, name in recipe.AUGMENTATION.items():
        settings = check(recipe.get_config(model))
        assert (settings.augment.mixup, settings.augment.randaug) == augreg_pretrain.AUGMENTATIONS[name]
        assert settings.model["transformer"]["dropout_rate"] == 0


@pytest.mark.parametrize("phase", deit3.DEPTH)
def test_deit3_has_every_size(phase):
    for size, rate in deit3.DEPTH[phase].items():
        settings = check(deit3.get_config(f"{size},{phase}"))
        transformer = settings.model["transformer"]
        assert (transformer["stochastic_depth"], transformer["stochastic_depth_uniform"]) == (rate, True)
        assert (transformer["activation"], transformer["layer_scale_init"], transformer["layer_scale"]) == ("gelu", 1e-4, True)
        assert settings.pp.crop % settings.model["patches"]["size"][0] == 0
        assert settings.optimizer == ("adamw" if phase.startswith("ft") else "lamb")


@pytest.mark.parametrize("arg", ["b", "b,300", "x,800", "s,ft224", "h,ft384"])
def test_deit3_refuses_what_was_not_published(arg):
    with pytest.raises(UserError, match="DeiT III"):
        deit3.get_config(arg)


@pytest.mark.parametrize(
    ("recipe", "arg", "what"),
    [
        (vit_s16_i1k, "ninety", "a number, not 'ninety'"),
        (vit_i1k, "b17", "did you mean b16"),
        (vit_i1k, "b16,medium3", "did you mean medium"),
        (gsam, "l16", "unknown model 'l16'"),
        (distill, "hard,b16", "unknown kind of distillation 'hard'"),
        (distill, "deit,b16,cifar10", "unknown dataset for DeiT"),
        (distill, "function_matching,b16,cifar10", "unknown dataset for function matching"),
        (transfer, "cifar11", "did you mean cifar10"),
        (transfer, "cifar10,B_61", "unknown AugReg model 'B_61'"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(recipe, arg, what):
    with pytest.raises(UserError, match=what):
        recipe.get_config(arg)


# Fine-tuning and small data


@pytest.mark.parametrize(
    ("dataset", "lr", "steps", "resize"),
    [
        ("cifar10", 0.003, 10_000, 448),
        ("cifar100", 0.01, 10_000, 448),
        ("imagenet2012", 0.03, 20_000, None),
        ("oxford_iiit_pet", 0.003, 500, None),
        ("oxford_flowers102", 0.003, 500, None),
    ],
)
def test_transfer_has_what_big_vision_found_best(dataset, lr, steps, resize):
    settings = check(transfer.get_config(dataset))
    assert (settings.base_lr, settings.total_steps, settings.pp.resize) == (lr, steps, resize)
    assert (settings.pp.crop, settings.pp.eval_resize, settings.batch) == (384, 448, 512)
    assert (settings.model_or_filename, settings.optimizer, settings.weight_decay) == ("B_32", "sgd", 0)


@pytest.mark.parametrize(
    ("arg", "size", "flip"), [("micro4,digits", 16, False), ("ti16,cifar10", 32, True), ("s16,my/icons", 32, True)]
)
def test_small_data_has_small_patches_and_never_enlarges(arg, size, flip):
    settings = check(small_data.get_config(arg))
    assert (settings.pp.crop, settings.pp.flip, settings.model["patches"]["size"]) == (size, flip, (4, 4))
    assert settings.pp.crop_method == ("simple" if flip else "random_resized")
    assert not settings.pretrained_dir and settings.accum_steps == 1


def test_lora_finetune_leaves_everything_else_to_the_recipe_for_fine_tuning():
    ours, usual = lora_finetune.get_config("b16,cifar10").to_dict(), vit.get_config("b16,cifar10").to_dict()
    assert ours["lora"]["rank"] == 8
    changed = {name for name in ours if ours[name] != usual[name]}
    assert changed == {"lora", "optimizer", "optim_dtype", "base_lr"}


def test_inference_time_recipe_has_every_field_of_its_trainer():
    config = inference_time.get_config().to_dict()
    check_names(InferenceSettings, config, "config")
    assert set(config) == set(InferenceSettings.__dataclass_fields__)
    assert (config["trainer"], config["steps"], config["initial_steps"]) == ("inference_time", 30, 10)
