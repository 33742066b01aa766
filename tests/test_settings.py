"""Settings: the reference's fields and defaults, and no other; values that make no sense are refused."""

import dataclasses

import pytest

from configs import common, models
from vit_jax.errors import UserError
from vit_jax.settings import Settings

REFERENCE = {  # config fields of google-research/vision_transformer, with their defaults
    "pretrained_dir": ".",
    "dataset": None,
    "tfds_data_dir": None,
    "tfds_manual_dir": None,
    "total_steps": None,
    "grad_norm_clip": 1.0,
    "optim_dtype": "bfloat16",
    "accum_steps": 8,
    "batch": 512,
    "batch_eval": 512,
    "shuffle_buffer": 50_000,
    "eval_every": 100,
    "progress_every": 10,
    "checkpoint_every": 1_000,
    "prefetch": 2,
    "base_lr": 0.03,
    "decay_type": "cosine",
    "warmup_steps": 500,
    "model_or_filename": None,
    "trainer": "train",
    "model_type": "ViT",
}


def complete(**overrides):
    """A config that lacks nothing, with some fields replaced."""
    config = common.get_config()
    models.use(config, "testing")
    config.dataset, config.total_steps = "digits", 10
    return config.to_dict() | overrides


def with_pp(**fields):
    return complete(pp=complete()["pp"] | fields)


def test_the_references_fields_have_its_defaults():
    config = common.get_config().to_dict()
    assert {name: config.get(name, "missing") for name in REFERENCE} == REFERENCE
    assert {"train", "test", "crop", "resize"} <= set(config["pp"])


def test_recipes_start_from_the_defaults_of_settings():
    assert common.get_config().to_dict() == dataclasses.asdict(Settings())


def test_a_config_arrives_unchanged():
    config = complete(base_lr=0.5, pp=complete()["pp"] | {"crop": 16})
    assert dataclasses.asdict(Settings.from_config(config)) == config


@pytest.mark.parametrize(
    ("field", "value", "wrong"),
    [
        ("total_steps", 7, "seven"),
        ("dataset", "digits", 3),
        ("model_or_filename", "Ti_16", 16),
        ("tfds_data_dir", "data", 1),
    ],
)
def test_a_field_without_default_takes_its_type_only(field, value, wrong):
    config = common.get_config()
    with pytest.raises(TypeError):
        config[field] = wrong
    config[field] = value
    assert config.to_dict()[field] == value


@pytest.mark.parametrize("wrong", [1.5, {"img": 1.5}])
def test_pretrained_names_files(wrong):
    for right in ("model.npz", {"img": "model.npz", "txt": ""}):
        assert Settings.from_config(complete(pretrained=right)).pretrained == right
    with pytest.raises(UserError, match=r"config.pretrained(.img)?=1.5 must be the name of a file or folder, such as ./1.5"):
        Settings.from_config(complete(pretrained=wrong))


def test_the_resize_field_takes_an_integer_only():
    config = common.get_config()
    with pytest.raises(TypeError):
        config.pp.resize = "large"
    config.pp.resize = 448
    assert config.pp.resize == 448


def test_two_configs_share_nothing():
    common.get_config().pp.crop = 1
    first = common.with_dataset(common.get_config(), "cifar10")
    first.pp.crop = 1
    assert common.get_config().pp.crop == 224
    assert common.with_dataset(common.get_config(), "cifar10").pp.crop == 384


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (complete(base_lrr=1), "unknown field of config 'base_lrr': did you mean base_lr"),
        (with_pp(cropp=1), "unknown field of config.pp 'cropp': did you mean crop"),
        (complete(trainer="trian"), "unknown config.trainer 'trian': did you mean train"),
        (complete(cache_gb=-1), "config.cache_gb=-1 must be at least 0"),
        (complete(cache_side=256), "config.cache_side=256 needs a folder: --config.cache_dir=DIR"),
        (complete(bad_images="ignore"), "unknown config.bad_images 'ignore': use one of error, skip"),
        (complete(dtype="float8"), "unknown config.dtype 'float8': did you mean float"),
        (complete(optim_dtype="int32"), "unknown config.optim_dtype 'int32'"),
        (complete(model={}), "config.model is empty"),
        (complete(dataset=None), "config.dataset is not set"),
        (complete(total_steps=None), "config.total_steps=None: say how many"),
        (complete(total_steps=-5), "config.total_steps=-5: say how many"),
        (complete(seed=-1), "config.seed=-1 must be at least 0"),
        (complete(eval_every=0), "config.eval_every=0 must be at least 1"),
        (complete(progress_every=0), "config.progress_every=0 must be at least 1"),
        (complete(checkpoint_every=0), "config.checkpoint_every=0 must be at least 1"),
        (complete(prefetch=0), "config.prefetch=0 must be at least 1"),
        (complete(batch_eval=0), "config.batch_eval=0 must be at least 1"),
        (complete(base_lr=-0.1), "config.base_lr=-0.1 must be at least 0"),
        (complete(warmup_steps=-1), "config.warmup_steps=-1 must be at least 0"),
        (complete(weight_decay=-0.1), "config.weight_decay=-0.1 must be at least 0"),
        (complete(grad_norm_clip=-1.0), "config.grad_norm_clip=-1.0 must be positive, or 0 for none"),
        (with_pp(area=(0.5,)), r"config.pp.area=\(0.5,\) must be two shares"),
        (with_pp(area=(0.5, 1.5)), r"config.pp.area=\(0.5, 1.5\) must be two shares"),
        (with_pp(area=(0.8, 0.5)), r"config.pp.area=\(0.8, 0.5\) must be two shares"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_sense_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        Settings.from_config(config)


@pytest.mark.parametrize("config", [complete(grad_norm_clip=None), complete(trainer="evaluate", total_steps=None)])
def test_what_may_be_left_out_may_be_left_out(config):
    Settings.from_config(config)
