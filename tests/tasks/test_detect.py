"""What happens to images and boxes before a detector and after it."""

from pathlib import Path

import chex
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from configs import detect_vit
from tests.models import small
from vit_jax import models
from vit_jax.checkpoint import Description, Opened
from vit_jax.data.features import Boxes, ExampleError
from vit_jax.settings import Settings
from vit_jax.tasks import detect
from vit_jax.tasks.detect import Sizes
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Model


def scene(height, width, box, crowd=None):
    """A dark image with a bright rectangle, and its box; `crowd` is another box."""
    image = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 255
    boxes = np.array([box] + ([crowd] if crowd else []), np.float32)
    n = len(boxes)
    return {"image": image, "boxes": boxes, "box_labels": np.full(n, 3), "box_crowd": np.arange(n) > 0}


@pytest.mark.parametrize("size", [(300, 200), (170, 410)])
def test_boxes_stay_on_what_they_surround(size):
    sizes = Sizes((128, 160), (96, 112, 128), crop=0.5, crop_short=(100, 120), crop_sides=(80, 110), flip=True)
    train_example = detect.make_train_example(sizes, max_boxes=4)
    box = (size[1] // 4, size[0] // 5, size[1] // 2, size[0] // 2)
    extents, mirrored = set(), 0
    for seed in range(40):
        example = train_example(scene(*size, box), rng=np.random.default_rng(seed), exif_rotated=False)
        height, width = example["extent"]
        assert example["image"].shape == (128, 160, 3) and not example["image"][height:].any()
        assert not example["image"][:, width:].any() and height <= 128 and width <= 160
        bright = np.argwhere(example["image"][..., 0] > 127)
        assert example["box_valid"].sum() == (len(bright) > 0) and (example["box_labels"][0] == 3) == (len(bright) > 0)
        extents.add((int(height), int(width)))
        if len(bright):
            x, y, w, h = example["boxes"][0] * [width, height, width, height]
            top, left = bright.min(axis=0)
            bottom, right = bright.max(axis=0) + 1
            np.testing.assert_allclose([x - w / 2, y - h / 2, x + w / 2, y + h / 2], [left, top, right, bottom], atol=1.01)
            mirrored += x > width / 2
    assert len(extents) > 5 and 5 < mirrored < 35


def test_crowds_are_left_out_and_too_many_objects_are_an_error():
    example = scene(50, 50, (1, 2, 20, 30), crowd=(5, 5, 40, 40))
    one = detect.make_train_example(Sizes((50, 50)), max_boxes=1)(example, rng=np.random.default_rng(0), exif_rotated=False)
    np.testing.assert_allclose(one["boxes"][0], [0.21, 0.32, 0.38, 0.56], atol=1e-6)
    example["box_crowd"][:] = False
    with pytest.raises(ExampleError, match="has 2 objects, config.task.max_boxes allows 1"):
        detect.make_train_example(Sizes((50, 50)), max_boxes=1)(example, rng=np.random.default_rng(0), exif_rotated=False)


def test_evaluation_sees_the_whole_image_and_results_are_in_its_pixels():
    size, box = (300, 200), (50, 60, 100, 150)
    example = detect.make_eval_example(Sizes((128, 160), (112,)))(scene(*size, box), exif_rotated=False)
    height, width = example["extent"]
    assert (height, width) == (128, 85)
    bright = np.argwhere(example["image"][..., 0] > 127)
    (top, left), (bottom, right) = bright.min(axis=0), bright.max(axis=0) + 1
    parts = np.array([left / width, top / height, right / width, bottom / height], np.float32)
    outputs = {"boxes": np.stack([parts, parts]), "scores": np.array([0.4, 0.9]), "labels": np.array([0, 1])}
    shown = detect.make_show(("cat", "dog"))(outputs, size, threshold=0.5)
    (found,) = shown.json["objects"]
    assert found["label"] == "dog" and found["score"] == pytest.approx(0.9)
    np.testing.assert_allclose(found["box"], box, atol=2)
    assert "dog" in shown.text[0] and len(detect.make_show(("cat", "dog"))(outputs, size, threshold=0.3).text) == 2
    drawn = np.asarray(shown.draw(Image.new("RGB", size[::-1])))
    assert drawn[100, 48:53].any() and not drawn[100, 70:80].any()  # the left side, and nothing inside


@pytest.mark.parametrize("kind", ["ViT", "LinearSegmenter"])
def test_a_detector_computes_its_vit_with_the_numerics_of_the_vits_own_checkpoint(kind):
    config = detect_vit.get_config("b16,digit_scenes")
    fields = models.named("ViT-B_16")[1]
    fields = {**fields, "transformer": fields["transformer"] | {"activation": "gelu", "norm_eps": 1e-12}}
    origin = description(kind, fields if kind == "ViT" else {"body": {"vit": fields}}, 14)
    setup = Setup(Settings.from_config(config), {"boxes": Boxes(("a", "b"))}, origin)
    built = setup.build_model(num_classes=2)
    transformer = built.fields["body"]["vit"]["transformer"]
    assert (transformer["activation"], transformer["norm_eps"]) == ("gelu", 1e-12)
    assert "transformer" not in built.fields


def description(kind, fields, side):
    sizes = {"image_size": (16 * side,) * 2, "grid": (side,) * 2, "mean": (127.5,) * 3, "std": (127.5,) * 3}
    return Description(model_type=kind, model=fields, class_names=(), **sizes)


@pytest.mark.parametrize("kind", ["LinearSegmenter", "TokenDetector"])
def test_a_decoder_stands_on_the_vit_of_a_segmenter_or_of_another_detector(kind):
    fields = {"body": {"vit": {"hidden_size": 16, "patches": {"size": (16, 16)}, "transformer": small.ENCODER}}}
    trained = small.random_params(models.build(kind, fields | {"num_classes": 3}), np.zeros((1, 48, 48, 3), np.float32))
    opened = Opened(Path("masks"), "", flatten_dict(trained, sep="/"), description(kind, fields, 3))
    decoder = {"num_encoder_layers": 0, "num_decoder_layers": 1, "width": 16, "num_heads": 2, "mlp_dim": 16}
    model = Model("DETR", fields | decoder, models.build("DETR", fields | decoder))
    fresh = small.random_params(model.module, np.zeros((1, 32, 48, 3), np.float32))
    found = detect.make_load(model, (32, 48))({"": opened}, fresh)
    same, positions = (tree["Transformer"].pop("posembed_input") for tree in (trained["backbone"], found["backbone"]))
    assert same["pos_embedding"].shape == (1, 10, 16) and positions["pos_embedding"].shape == (1, 7, 16)
    chex.assert_trees_all_equal(found, fresh | {"backbone": trained["backbone"]})
