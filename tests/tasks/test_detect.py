"""What happens to images and boxes before a detector and after it."""

import numpy as np
import pytest
from PIL import Image

from configs import detect_vit
from vit_jax import models
from vit_jax.checkpoint import Description
from vit_jax.data.features import Boxes, ExampleError
from vit_jax.settings import Settings
from vit_jax.tasks import detect
from vit_jax.tasks.detect import Sizes
from vit_jax.tasks.setup import Setup


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


def test_a_detector_computes_its_vit_with_the_numerics_of_the_vits_own_checkpoint():
    config = detect_vit.get_config("b16,digit_scenes")
    fields = models.named("ViT-B_16")[1]
    fields = {**fields, "transformer": fields["transformer"] | {"activation": "gelu", "norm_eps": 1e-12}}
    origin = Description(
        model_type="ViT",
        model=fields,
        image_size=(224, 224),
        grid=(14, 14),
        mean=(127.5,) * 3,
        std=(127.5,) * 3,
        class_names=(),
    )
    setup = Setup(Settings.from_config(config), {"boxes": Boxes(("a", "b"))}, origin)
    built = setup.build_model(num_classes=2)
    transformer = built.fields["body"]["vit"]["transformer"]
    assert (transformer["activation"], transformer["norm_eps"]) == ("gelu", 1e-12)
    assert "transformer" not in built.fields
