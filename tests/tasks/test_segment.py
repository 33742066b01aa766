"""What happens to images and masks before a segmenter and after it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from tests import tiny
from tests.tasks import test_contract
from vit_jax import predict
from vit_jax.checkpoint import Description
from vit_jax.checkpoint.opened import Opened
from vit_jax.data.features import Segmentation
from vit_jax.errors import UserError
from vit_jax.run import experiment as experiments
from vit_jax.settings import Settings
from vit_jax.tasks import segment
from vit_jax.tasks.setup import Setup
from vit_jax.train import train_and_evaluate


def scene(height, width):
    """Two classes, one of which is bright, and a strip that is ignored."""
    labels = np.zeros((height, width), np.uint8)
    labels[height // 4 : height // 2, width // 3 : width - 5] = 1
    labels[-6:] = 255
    return {"image": np.repeat(np.where(labels == 1, 255, 0).astype(np.uint8)[..., None], 3, axis=2), "segmentation": labels}


def settings(**pp):
    return Settings.from_config(tiny.config(**{f"pp_{name}": value for name, value in pp.items()}))


@pytest.mark.parametrize("size", [(90, 61), (50, 120)])
@pytest.mark.parametrize("method", ["inception", "random_resized", "simple"])
def test_a_mask_moves_with_its_image(size, method):
    example = segment.make_train_example(settings(crop=32, crop_width=40, crop_method=method, area=(0.2, 1.0), flip=True))
    shares = []
    for seed in range(20):
        seen = example(scene(*size), rng=np.random.default_rng(seed), exif_rotated=False)
        image, labels = seen["image"], seen["segmentation"]
        assert image.shape == (32, 40, 3) and labels.shape == (32, 40) and labels.dtype == np.uint8
        known = labels != 255
        # They differ where interpolation mixes both classes, at the edges, and by at most half a pixel.
        assert ((image[..., 0] > 127) == (labels == 1))[known].mean() > 0.97
        shares.append((labels == 1).mean())
    assert np.std(shares) > 0.01


def test_evaluation_sees_the_whole_image_or_fills_a_canvas():
    mean = (10.0, 20.0, 30.0)
    whole = segment.make_eval_example(segment.Seen((32, 40)), settings(), mean)(scene(90, 61), exif_rotated=False)
    assert whole["image"].shape == (32, 40, 3) and set(np.unique(whole["segmentation"])) == {0, 1, 255}
    seen = segment.Seen((32, 32), (64, 96), 20)
    fitted = segment.make_eval_example(seen, settings(), mean)(scene(90, 61), exif_rotated=False)
    assert fitted["image"].shape == (64, 96, 3) and fitted["segmentation"].shape == (64, 96)
    width = round(61 * 64 / 90)
    assert (fitted["segmentation"][:, width:] == 255).all() and (fitted["segmentation"][:50, :width] != 255).all()
    np.testing.assert_array_equal(fitted["image"][:, width:], np.tile(np.float32(mean), (64, 96 - width, 1)))


def test_windows_cover_a_canvas_and_their_scores_are_averaged():
    seen = segment.Seen((8, 10), (18, 23), 6)
    images = np.random.default_rng(0).normal(size=(2, 18, 23, 3)).astype(np.float32)

    def scores(x):  # which differ from window to window
        return jnp.stack([x.mean(axis=(1, 2, 3), keepdims=True)[..., 0] + x[..., 0], x[..., 1]], axis=-1)

    total, counts = np.zeros((2, 18, 23, 2)), np.zeros((18, 23, 1))
    for top in (0, 6, 10):
        for left in (0, 6, 12, 13):
            part = np.s_[:, top : top + 8, left : left + 10]
            total[part] += scores(images[part])
            counts[part[1:]] += 1
    assert counts.min() >= 1
    np.testing.assert_allclose(jax.jit(lambda x: segment.slide(scores, x, seen))(images), total / counts, atol=1e-5)
    assert segment.Seen((8, 8), (8, 8), 5).corners().tolist() == [[0, 0]]


def test_a_prediction_is_at_the_pixels_of_the_image():
    names, colors = ("sky", "road", "car"), segment.palette(3)
    logits = np.full((4, 6, 3), -1.0, np.float32)
    logits[:, :3, 0] = logits[:2, 3:, 1] = logits[2:, 3:, 2] = 1
    shown = segment.make_show(names, colors, segment.Seen((8, 12)))({"logits": logits}, (40, 90))
    areas = {area["label"]: area["pixels"] for area in shown.json["areas"]}
    assert sum(areas.values()) == 40 * 90 and areas["sky"] == pytest.approx(1800, abs=80)
    assert areas["road"] == pytest.approx(900, abs=40) and shown.text[0].split()[1] == "sky"
    indexed = shown.maps["classes"]
    assert indexed.mode == "P" and np.asarray(indexed)[5, 80] == 1 and np.asarray(indexed)[35, 80] == 2
    assert np.asarray(indexed.convert("RGB"))[5, 80].tolist() == [128, 0, 0]
    drawn = np.asarray(shown.draw(Image.new("RGB", (90, 40), (100, 100, 100))))
    assert drawn[5, 80].tolist() == [114, 50, 50] and drawn[5, 5].tolist() == [100, 100, 100]
    # Of a canvas only what the image covers counts.
    shown = segment.make_show(names, colors, segment.Seen((4, 4), (4, 6), 2))({"logits": logits}, (40, 30))
    assert [area["label"] for area in shown.json["areas"]] == ["sky"]


def test_the_palette_is_that_of_pascal_voc():
    published = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128)]
    assert list(segment.palette(21)[:8]) == published and segment.palette(21)[20] == (0, 64, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "digit_scenes"}, "segmentation needs a mask for each image"),
        ({"augment": {"cutmix": 1.0}}, "config.augment.cutmix moves or mixes pixels"),
        ({"task": {"type": "segment", "canvas": (32, 128)}}, "must be .height, width., and hold a window of .64, 64."),
        ({"task": {"type": "segment", "colors": ((1, 2, 3),)}}, "has 1 colours, there are 11 classes"),
        ({"pp": {"eval_resize": 80}}, "images are segmented whole"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, message):
    config = test_contract.segment(tmp_path)
    config.update(changes)
    with pytest.raises(UserError, match=message):
        experiments.build(Settings.from_config(config))


def test_a_vit_becomes_a_backbone_and_classes_are_matched_by_name(tmp_path):
    e = experiments.build(Settings.from_config(test_contract.segment(tmp_path)))
    fresh = jax.device_get(e.init_params())
    body = e.task.model.fields["body"]["vit"]
    common = {"image_size": (64, 64), "grid": (8, 8), "mean": (127.5,) * 3, "std": (127.5,) * 3}
    flat = {name: x + 1 for name, x in flatten_dict(fresh["backbone"], sep="/").items()}
    given = Opened(
        tmp_path, "ours", flat, Description(model_type="ViT", model={**body, "num_classes": None}, class_names=(), **common)
    )
    loaded = e.task.load({"": given}, fresh)
    assert all(np.array_equal(x, flat[name]) for name, x in flatten_dict(loaded["backbone"], sep="/").items())
    assert all(np.array_equal(x, fresh["conv_seg"][name]) for name, x in loaded["conv_seg"].items())

    # It computes with the numerics of its own checkpoint, and tells the size that its positions are for.
    numerics = {"activation": "gelu", "norm_eps": 1e-12}
    origin = dataclasses.replace(given.description, model=body | {"transformer": body["transformer"] | numerics})
    built = Setup(e.settings, {"segmentation": Segmentation(("a", "b"))}, origin).build_model(num_classes=2)
    assert built.fields["body"]["vit"]["transformer"].items() >= numerics.items() and "transformer" not in built.fields
    # Where a recipe names no ViT, it is the checkpoint's.
    features = {"segmentation": Segmentation(("a", "b"))}
    unnamed = dataclasses.replace(e.settings, model={**e.settings.model, "body": {"vit": {}}})
    of_file = Setup(unnamed, features, origin).build_model(num_classes=2).fields["body"]["vit"]
    assert of_file.items() >= {**origin.model, "num_classes": None, "representation_size": None}.items()
    with pytest.raises(UserError, match="config.model.body.vit is empty: --config.pretrained=FILE"):
        Setup(unnamed, features, None).build_model(num_classes=2)
    detector = dataclasses.replace(origin, model_type="TokenDetector", model={"body": {"vit": of_file}, "num_classes": 3})
    assert Setup(unnamed, features, detector).build_model(num_classes=2).fields["body"]["vit"].items() >= of_file.items()
    with pytest.raises(UserError, match="a LinearSegmenter stands on a ViT, and config.pretrained names a Mixer"):
        mixer = dataclasses.replace(origin, model_type="Mixer", model={})
        Setup(unnamed, features, mixer).build_model(num_classes=2)

    described = Description(model_type=built.type, model=built.fields, class_names=(), **common | {"grid": (4, 4)})
    assert described.native_size == tuple(4 * p for p in body["patches"]["size"])

    # A segmenter with its classes in another order keeps its head, but for other data.
    names = e.train_source.class_names
    described = Description(model_type="LinearSegmenter", model=dict(e.task.model.fields), class_names=names[::-1], **common)
    flat = {name: x + np.arange(x.shape[-1], dtype=np.float32) for name, x in flatten_dict(fresh, sep="/").items()}
    given = dataclasses.replace(given, flat=flat, description=described)
    kept = e.task.load({"": given}, fresh, classes=names)
    np.testing.assert_array_equal(kept["conv_seg"]["bias"], flat["conv_seg/bias"][..., ::-1])
    np.testing.assert_array_equal(e.task.load({"": given}, fresh)["conv_seg"]["bias"], fresh["conv_seg"]["bias"])
    np.testing.assert_array_equal(kept["bn"]["scale"], flat["bn/scale"])


def test_predict_writes_overlays_and_masks(tmp_path, capsys):
    config = test_contract.segment(tmp_path)
    config.update({"total_steps": 1, "warmup_steps": 0, "eval_every": 1, "task": {"type": "segment", "canvas": (64, 80)}})
    train_and_evaluate(config, tmp_path / "run")
    assert 0 <= tiny.metrics(tmp_path / "run", "IoU/background_test")[1] <= 1
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(photo)
    assert predict.main([f"--model={tmp_path / 'run'}", f"--draw={tmp_path / 'drawn'}", "--json", str(photo)]) == 0
    assert '"areas": [{"label": "' in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["0_photo.png", "0_photo_classes.png"]
    with Image.open(tmp_path / "drawn" / "0_photo_classes.png") as indexed:
        assert indexed.mode == "P" and indexed.size == (70, 50)
