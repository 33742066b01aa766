"""Classification of photos that keep their shapes: what a batch holds, what is refused, and that filling changes nothing."""

import jax
import numpy as np
import pytest

from tests import tiny
from vit_jax import models, tasks
from vit_jax.data import features
from vit_jax.errors import UserError
from vit_jax.settings import Settings
from vit_jax.tasks import Setup, rows
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
    params = jax.jit(made.init)(jax.random.key(0))
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


def test_images_that_share_rows_learn_what_each_alone_does():
    """5, 8, 4 and 1 patches in two rows of 11, against a row each: the loss, accuracy, and gradients of the sum of losses."""
    made = task(flip=False, area=(1.0, 1.0), enlarge=False, pack=2)
    params = jax.jit(made.init)(jax.random.key(0))
    alone = batch_of(made, [PHOTOS[i][:h, :w] for i, h, w in ((0, 4, 20), (1, 16, 6), (2, 5, 8), (2, 4, 4))])
    alone["label"] = np.arange(4, dtype=np.int32)
    packed = made.collate(alone)
    assert packed["image"].shape == (2, 11, 48) and packed["grid"].shape == (2, 4, 2) and packed["label"].shape == (2, 4)
    assert sorted(map(tuple, packed["grid"].reshape(-1, 2))) == sorted([*map(tuple, alone["grid"]), *[(0, 0)] * 4])

    def run(params, batch):
        context = Context(np.int32(0), {}, None, {}, made.totals(batch), None)
        loss = made.loss(params, context, batch, jax.random.key(1))
        return loss.value, loss.metrics

    compiled = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options={"xla_backend_optimization_level": 0})
    with jax.default_matmul_precision("highest"):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *(compiled(params, x) for x in (packed, alone)))


def test_the_largest_images_are_made_smaller_where_a_batch_is_too_many_patches():
    """8 images of 1 to 8 patches of one colour, 36 together, in 2 rows of 10."""
    image = np.zeros((8, 10, 3), np.uint8)
    for i in range(8):
        image[i, : i + 1] = 10 * i
    batch = {"image": image, "grid": np.array([(1, i + 1) for i in range(8)], np.int32), "label": np.arange(8, dtype=np.int32)}
    found = rows.collate(batch, pack=4, patch=(1, 1), interpolation="bilinear", antialias=False)
    assert found["image"].shape == (2, 10, 3) and found["label"].shape == (2, 8)
    seen = {}
    for pixels, grids, labels in zip(found["image"], found["grid"], found["label"], strict=True):
        counts = grids.prod(axis=1)
        of_patches = np.repeat(labels, counts)
        np.testing.assert_array_equal(pixels[: len(of_patches), 0], 10 * of_patches)
        assert not pixels[len(of_patches) :].any()
        seen |= {int(label): int(count) for label, count in zip(labels, counts, strict=True) if count}
    assert seen == {i: min(i + 1, 2) for i in range(8)}  # of 3 and less they were 21


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pp.pack": 2}, "config.pp.pack=2 is from 1 to config.pp.max_patches=11, and for images that leave room in a row"),
        ({"pp.pack": 2, "pp.enlarge": False, "task": {"type": "contrast"}}, "is for the task classify, not contrast"),
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
