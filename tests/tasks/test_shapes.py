"""Classification of photos that keep their shapes: what a batch holds, what is refused, and that filling changes nothing."""

import jax
import numpy as np
import pytest

from tests import tiny
from vit_jax import models, tasks
from vit_jax.data import features
from vit_jax.errors import UserError
from vit_jax.settings import Settings
from vit_jax.tasks import Setup
from vit_jax.tasks.task import Context

PHOTOS = [
    np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(((8, 30), (20, 9), (12, 12)))
]
OFFERED = {"image": features.Image(), "label": features.Label(tuple("0123456789"))}


def task(**pp):
    c = tiny.config()
    c.augment.randaug = ()
    c.model.transformer.dropout_rate = 0.0
    c.pp.update({"max_patches": 11} | pp)
    return tasks.make(Setup(Settings.from_config(c), OFFERED, None))


def batch_of(made, photos, **how):
    examples = [made.train_example({"image": x, "label": 3}, rng=np.random.default_rng(0), exif_rotated=False) for x in photos]
    return {name: np.stack([x[name] for x in examples]) for name in examples[0]} | {
        "seed": np.arange(len(photos), dtype=np.uint32)
    }


def test_filling_changes_neither_loss_nor_prediction():
    """Rows of 11 patches and of 20, which the same photos fill less."""
    made = task(flip=False, area=(1.0, 1.0))
    params = made.init(jax.random.key(0))
    batch = batch_of(made, PHOTOS)
    assert batch["image"].shape == (3, 11, 48) and batch["image"].dtype == np.uint8 and len(set(map(tuple, batch["grid"]))) == 3
    longer = batch | {"image": np.pad(batch["image"], ((0, 0), (0, 9), (0, 0)), constant_values=77)}
    context = Context(np.int32(0), {}, None, {}, {}, None)
    for run in (lambda p, b: made.loss(p, context, b, jax.random.key(1)).value, lambda p, b: made.predict(p, b)["logits"]):
        compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})  # which takes longer than it runs
        y, expected = (compiled(params, x) for x in (longer, batch))
        np.testing.assert_allclose(y, expected, atol=1e-5)
    pictures, captions = made.preview(batch, jax.random.key(0))
    assert pictures.shape == (3, 8, 8, 3) and pictures.dtype == np.uint8 and captions == ["3"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pp.eval_resize": 20}, "does not go with config.pp.eval_resize=20"),
        ({"augment.mixup": 0.2}, "does not go with config.augment.mixup=0.2"),
        ({"pp.crop_method": "simple"}, "unknown crop_method of images that keep their shapes 'simple'"),
        ({"task": {"type": "self_distill"}}, "is for the tasks classify and contrast, not self_distill"),
    ],
)
def test_what_does_not_go_with_shapes_of_their_own_is_refused_in_words(changes, message):
    c = tiny.config(pp_max_patches=11)
    for path, value in changes.items():
        target, _, field = path.rpartition(".")
        (c[target] if target else c)[field] = value
    with pytest.raises(UserError, match=message):
        tasks.make(Setup(Settings.from_config(c), OFFERED, None))


def test_it_is_for_a_vit():
    c = tiny.config(pp_max_patches=11)
    c.model_type, c.model = "Mixer", models.named("Mixer-B_16")[1]
    with pytest.raises(UserError, match="is for a ViT, which a Mixer with these fields is not"):
        tasks.make(Setup(Settings.from_config(c), OFFERED, None))
