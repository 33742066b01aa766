"""The command that draws where a model looks, and the same from Python: which pictures, of which images, in which words."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from tests.models import small
from tests.test_predict import DESCRIPTION, FIELDS, NAMES, SIZE, write_model
from vit_jax import attention, checkpoint, models, predictor
from vit_jax.api import Model
from vit_jax.checkpoint import describe
from vit_jax.errors import UserError
from vit_jax.tasks import prompts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and photos: one lies on its side until its EXIF tag is read, one is no image."""
    folder = tmp_path_factory.mktemp("looks")
    write_model(folder / "model.npz")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a quarter to the right
    (folder / "photos").mkdir()
    photo.save(folder / "photos" / "a.jpg")
    photo.save(folder / "photos" / "b.jpg", exif=exif)
    (folder / "photos" / "c.png").write_bytes(b"no picture")
    return folder


def run(*arguments, expected=0):
    assert attention.main([str(argument) for argument in arguments]) == expected


def test_a_folder_of_photos_becomes_a_folder_of_sheets(place, tmp_path, capsys):
    out = tmp_path / "new" / "looks"
    model = f"--model={place / 'model.npz'}"
    more = "--layers", f"--position={tmp_path / 'p.png'}", f"--filters={tmp_path / 'f.png'}", "--class=bear", "--discard=0.5"
    run(model, f"--out={out}", place / "photos", *more, expected=1)
    said, err = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == ["0_a.png", "0_a_layers.png", "1_b.png", "1_b_layers.png"]
    assert f"error: {place / 'photos' / 'c.png'}: " in err and "1 of 3 images could not be read" in err
    written = [*out.iterdir(), tmp_path / "p.png", tmp_path / "f.png"]
    for path in written:
        with Image.open(path) as picture:
            picture.load()
            assert f"wrote {path}, {picture.width} x {picture.height} pixels" in said
    with Image.open(out / "0_a.png") as flat, Image.open(out / "1_b.png") as upright:
        assert upright.width == flat.width and upright.height > 3 * flat.height


def test_maps_from_python_are_those_of_the_images(place):
    model = predictor.load(place / "model.npz", batch_size=2)
    images = np.random.default_rng(1).integers(0, 256, (3, *SIZE, 3), np.uint8)
    found = model.attention_maps(images)
    assert {name: x.shape for name, x in found.items()} == {
        "relevance": (3, 4, 3),
        "rollout": (3, 4, 3),
        "heads": (3, 1, 4, 4, 3),
        "mean": (3, 4, 3),
        "target": (3,),
        "logits": (3, 5),
    }
    np.testing.assert_allclose(found["logits"], model(images)["logits"], atol=1e-5)
    for method in predictor.ATTENTION:
        np.testing.assert_allclose(model.attention(images, method=method), found[method], atol=1e-6)
    np.testing.assert_array_equal(model.attention_maps(images, names=("target",), target=3)["target"], [3, 3, 3])
    again = Model(model).attention(images[0], "relevance", target=NAMES[found["target"][0]])
    np.testing.assert_allclose(again, found["relevance"][:1], atol=1e-6)
    of_others = model.attention(images, method="relevance", target=(found["target"][0] + 1) % 5)
    assert np.abs(of_others[0] - found["relevance"][0]).max() > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to draw: name images and --out=DIR"),
        (["a.jpg"], "images and --out=DIR go together"),
        (["--out=here", "--position=p.png"], "images and --out=DIR go together"),
        (["--position=p.jpg"], "--position=p.jpg must end with .png"),
        (["a.jpg", "--out=here.png"], "--out=here.png must be a folder, to which a picture of each image is written"),
        (["a.jpg", "--out=here", "--discard=1"], "--discard=1.0 must be from 0 to below 1"),
        (["photos", "--out=here", "--class=bare"], "unknown class 'bare': did you mean bear?"),
        (["photos", "--out=here", "--class=5"], "class 5: there are 5 classes, numbered from 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message, place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=message):
        run("--model=model.npz", *arguments)


def test_models_without_a_head_show_what_they_have_and_others_say_why_not(place, tmp_path):
    fields = FIELDS | {"num_classes": None, "num_registers": 2}
    checkpoint.save(small.random_params(models.build("ViT", fields), small.random_images(*SIZE)), tmp_path / "model.npz")
    headless = DESCRIPTION | {"model": fields, "class_names": []}
    describe.write(tmp_path / "model.npz", describe.Description(**headless))
    run(f"--model={tmp_path}", f"--out={tmp_path / 'out'}", place / "photos" / "a.jpg")
    with pytest.raises(UserError, match="has no head, and so no classes to explain"):
        run(f"--model={tmp_path}", f"--out={tmp_path / 'out'}", place / "photos" / "a.jpg", "--class=bear")
    model = predictor.load(tmp_path, head=None)
    for options, message in (
        ({"method": "relevance"}, "no head, and so no classes"),
        ({"method": "rolout"}, "unknown method 'rolout': did you mean rollout?"),
        ({"target": 0}, "has no head"),
    ):
        with pytest.raises(UserError, match=message):
            model.attention([np.zeros((*SIZE, 3), np.uint8)], **options)
    assert predictor.load(place / "model.npz", head=None).description.class_names == tuple(NAMES)


def test_a_mixer_is_refused_in_words_but_for_its_filters(place, tmp_path):
    mixer = small.mixer(patches={"size": (8, 8)})
    fields = {name: getattr(mixer, name) for name in mixer.__dataclass_fields__ if name not in ("parent", "name", "dtype")}
    checkpoint.save(small.random_params(mixer, small.random_images(16, 24)), tmp_path / "mixer.npz")
    description = DESCRIPTION | {"model_type": "Mixer", "model": fields, "grid": (2, 3), "class_names": list("abcdefg")}
    describe.write(tmp_path / "mixer.npz", describe.Description(**description))
    model = f"--model={tmp_path / 'mixer.npz'}"
    run(model, f"--filters={tmp_path / 'filters.png'}")
    with pytest.raises(UserError, match="a Mixer has no attention to look at"):
        run(model, f"--out={tmp_path / 'out'}", place / "photos" / "a.jpg")
    with pytest.raises(UserError, match=r"\(Mixer\) has no position embeddings"):
        run(model, f"--position={tmp_path / 'position.png'}")


def test_relevance_is_for_a_label_where_labels_are_the_classes(tmp_path):
    """Of an image tower with a MAP head; the scores are those that predict shows."""
    image = {"hidden_size": 32, "patches": {"size": (8, 8)}, "classifier": "map", "transformer": small.ENCODER}
    text = {"width": 24, "num_layers": 1, "mlp_dim": 40, "num_heads": 3, "vocab_size": 30}
    towers = models.build("TwoTowers", {"image": image, "text": text, "out_dim": (None, 32), "bias_init": -10.0})
    inputs = {"images": small.random_images(16, 16, batch=1), "tokens": np.zeros((1, 16), int)}
    shapes = jax.eval_shape(lambda key: towers.init(key, **inputs), jax.random.key(0))["params"]
    np.savez(tmp_path / "towers.npz", **small.flat(small.random_values(shapes)))
    plain = predictor.load(tmp_path / "towers.npz", head=None, batch_size=2)
    photos = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    with pytest.raises(UserError, match="has no head, and so no classes to explain"):
        plain.attention(photos, method="relevance")
    ztxt = np.linalg.qr(np.random.default_rng(2).normal(size=(32, 3)))[0].T.astype(np.float32)
    labels = ("a cat", "a dog", "a car")
    task = prompts.make_classifier(plain.task, ztxt, labels, head="sigmoid")
    described = dataclasses.replace(plain.description, class_names=labels)
    labelled = dataclasses.replace(plain, task=task, description=described)
    found = [labelled.attention_maps(photos, target=label) for label in labels]
    for i, of_label in enumerate(found):
        np.testing.assert_allclose(of_label["logits"], labelled(photos)["logits"], atol=1e-5)
        assert of_label["target"].tolist() == [i, i] and of_label["heads"].shape == (2, 3, 4, 2, 2)
    assert np.abs(found[0]["relevance"] - found[1]["relevance"]).max() > 1e-5
