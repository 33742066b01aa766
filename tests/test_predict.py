"""The command that names images: its output, its numbers, and how it finds out about a model."""

import json
import os
import sys

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.models import small
from vit_jax import checkpoint, models, predict
from vit_jax.checkpoint import describe
from vit_jax.errors import UserError

AUGREG_FILE = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz"
FIELDS = {
    "hidden_size": 32,
    "patches": {"size": [4, 8]},
    "num_classes": 5,
    "transformer": {"num_layers": 1, "mlp_dim": 48, "num_heads": 4},
}
NAMES = ["ape", "bear", "cat", "dög", "eel"]
SIZE = (16, 24)
DESCRIPTION = {
    "model_type": "ViT",
    "model": FIELDS,
    "image_size": SIZE,
    "grid": (4, 3),
    "mean": [110.0, 120.0, 130.0],
    "std": [50.0, 60.0, 70.0],
    "class_names": NAMES,
}


def write_model(path, **changes):
    """A model with random parameters at `path`, and its description; returns the parameters."""
    params = small.random_params(models.build("ViT", FIELDS), small.random_images(*SIZE))
    checkpoint.save(params, path)
    describe.write(path, describe.Description(**DESCRIPTION | changes))
    return params


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "model.npz")
    return folder


def pixels(height, width, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images, and {path: what the model must see of it}, resized by hand."""
    h, w = SIZE
    exact, double, triple, grey = pixels(h, w, 3), pixels(2 * h, 2 * w, 4), pixels(3 * h, 3 * w, 3), pixels(h, 2 * w)
    plain = np.full((50, 31, 3), 77, np.uint8)
    folder = tmp_path_factory.mktemp("photos")
    seen = {
        "a.png": (exact, exact),
        # Half the size is the mean of 2x2 pixels, a third the middle one of 3x3; there is no antialiasing.
        "b/deep/RGBA.PNG": (double, double[..., :3].reshape(h, 2, w, 2, 3).mean((1, 3))),
        "b/triple.Bmp": (triple, triple[1::3, 1::3]),
        "c grey.png": (grey, grey.reshape(h, w, 2, 1).mean(2).repeat(3, axis=2)),
        "d.JPG": (plain, np.full((h, w, 3), 77)),
    }
    for name, (image, _) in seen.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder, {str(folder / name): np.float32(small_image) for name, (_, small_image) in seen.items()}


def run(capsys, *arguments, expected=0):
    """The lines that predict prints, and what it says on stderr."""
    assert predict.main([str(argument) for argument in arguments]) == expected
    out, err = capsys.readouterr()
    return out.splitlines(), err


def run_json(capsys, *arguments, expected=0):
    """{image: predictions}"""
    lines, _ = run(capsys, *arguments, "--json", expected=expected)
    found = [json.loads(line) for line in lines]
    assert [list(entry) for entry in found] == [["image", "predictions"]] * len(lines)
    assert len({entry["image"] for entry in found}) == len(lines)
    return {entry["image"]: entry["predictions"] for entry in found}


def by_class(predictions):
    return np.array([p["probability"] for p in sorted(predictions, key=lambda p: p["index"])])


# The command


def test_probabilities_are_those_of_the_model_on_normalised_images(capsys, workdir, photos):
    folder, seen = photos
    found = run_json(capsys, f"--model={workdir}", "--top=1000", folder)
    assert list(found) == sorted(seen)
    images = (np.stack([seen[path] for path in found]) - DESCRIPTION["mean"]) / DESCRIPTION["std"]
    logits = small.apply(models.build("ViT", FIELDS), checkpoint.load(workdir / "model.npz"), images.astype(np.float32))
    expected = np.asarray(jax.nn.softmax(logits))
    assert expected.std(0).min() > 0.001, "the images look all the same to this model"
    np.testing.assert_allclose([by_class(p) for p in found.values()], expected, atol=1e-6, rtol=0)


def test_json_has_the_promised_form(capsys, workdir, photos):
    for predictions in run_json(capsys, f"--model={workdir}", "--top=1000", photos[0]).values():
        assert sorted(p["index"] for p in predictions) == [0, 1, 2, 3, 4]
        for p in predictions:
            assert list(p) == ["label", "index", "probability"] and p["label"] == NAMES[p["index"]]
        probabilities = [p["probability"] for p in predictions]
        assert probabilities == sorted(probabilities, reverse=True)
        assert abs(sum(probabilities) - 1) < 1e-5


def test_the_table_shows_the_same_as_json(capsys, workdir, photos):
    folder, seen = photos
    arguments = (f"--model={workdir / 'model.npz'}", "--top=2", folder)
    lines, err = run(capsys, *arguments)
    width = max(map(len, seen))
    expected = [
        f"{'' if rank else path:{width}}  {100 * p['probability']:6.2f}%  {p['label']}"
        for path, predictions in run_json(capsys, *arguments).items()
        for rank, p in enumerate(predictions)
    ]
    assert lines == expected and len(lines) == 2 * len(seen) and err == ""


def test_any_name_is_printable_in_the_table_and_comes_back_from_json(capsys, tmp_path):
    names = [os.fsdecode(b"bad \xff"), "two\nlines", "bell\x07\x9b", "dög", "e"]
    write_model(tmp_path / "model.npz", class_names=names)
    path = os.fsdecode(os.fsencode(tmp_path) + b"/photo \xfe\n.png")
    Image.fromarray(pixels(20, 20, 3)).save(path)
    os.mkfifo(tmp_path / "pipe.jpg")  # which stops nothing
    arguments = (f"--model={tmp_path}", "--top=5", path, tmp_path / "pipe.jpg")
    lines, err = run(capsys, *arguments, expected=1)
    assert all(line.isprintable() for line in [*lines, *err.splitlines()]) and len(lines) == 5
    assert lines[0].startswith(f"{tmp_path}/photo \\udcfe\\n.png  ") and "pipe.jpg: this is a named pipe" in err
    ((found, predictions),) = run_json(capsys, *arguments, expected=1).items()
    assert found == path and {p["label"] for p in predictions} == set(names)


@pytest.mark.parametrize("batch", [1, 4])
def test_batches_and_their_padding_change_nothing(capsys, workdir, photos, batch):
    whole, parts = (run_json(capsys, f"--model={workdir}", "--top=9", f"--batch={size}", photos[0]) for size in (5, batch))
    assert list(whole) == list(parts)
    for path in whole:
        np.testing.assert_allclose(by_class(parts[path]), by_class(whole[path]), atol=1e-6, rtol=0)


def test_tokens_are_merged_where_that_is_asked_for(capsys, tmp_path, photos):
    """12 patches become 9, by the command and in Python; where the model looks is shown of all."""
    (folder, seen), fields, workdir = photos, FIELDS | {"classifier": "gap"}, tmp_path
    checkpoint.save(small.random_params(models.build("ViT", fields), small.random_images(*SIZE)), workdir / "model.npz")
    describe.write(workdir / "model.npz", describe.Description(**DESCRIPTION | {"model": fields}))
    found = run_json(capsys, f"--model={workdir}", "--top=1000", "--tome=3", folder)
    images = ((np.stack([seen[path] for path in found]) - DESCRIPTION["mean"]) / DESCRIPTION["std"]).astype(np.float32)
    model = vit_jax.load(workdir, tome=3)
    expected = np.asarray(jax.nn.softmax(jax.jit(model.logits)(images)))
    np.testing.assert_allclose([by_class(p) for p in found.values()], expected, atol=1e-6, rtol=0)
    plain = run_json(capsys, f"--model={workdir}", "--top=1000", folder)
    assert np.abs(expected - [by_class(p) for p in plain.values()]).max() > 1e-3
    assert model.attention(list(seen)).shape == (len(seen), 4, 3)
    with pytest.raises(UserError, match="tome=-1 must be how many tokens each block merges"):
        vit_jax.load(workdir, tome=-1)


def test_a_photo_is_turned_upright(capsys, tmp_path, workdir):
    upright = pixels(*SIZE, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    Image.fromarray(upright).save(tmp_path / "a.png")
    Image.fromarray(np.rot90(upright)).save(tmp_path / "b.png", exif=exif)
    plain, turned = run_json(capsys, f"--model={workdir}", tmp_path).values()
    assert plain == turned


def test_an_image_given_twice_is_answered_twice(capsys, workdir, photos):
    image = photos[0] / "a.png"
    lines, _ = run(capsys, f"--model={workdir}", "--top=1", image, image, photos[0] / "d.JPG")
    assert len(lines) == 3 and lines[0] == lines[1] != lines[2]


def test_broken_images_are_named_and_the_others_predicted(capsys, tmp_path, workdir, photos):
    good = [photos[0] / "a.png", photos[0] / "d.JPG"]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(good[1].read_bytes()[:-50])
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    bad = [tmp_path / name for name in ("text.png", "cut.jpg", "pipe.jpg", "endless.png")]
    arguments = [f"--model={workdir}", "--batch=2", "--json", good[0], *bad, good[1]]
    lines, err = run(capsys, *arguments, expected=1)
    assert [json.loads(line)["image"] for line in lines] == [str(path) for path in good]
    *errors, last = err.splitlines()
    assert all(error.startswith(f"error: {path}: ") for path, error in zip(bad, errors, strict=True))
    assert last == "4 of 6 images could not be read"


def test_what_does_not_exist_is_an_error(capsys, tmp_path, workdir):
    for missing in (tmp_path / "a.png", tmp_path / "no" / "folder"):
        with pytest.raises(UserError, match=f"no such image or folder: {missing}"):
            predict.main([f"--model={workdir}", str(missing)])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"{tmp_path} holds no images .*jpg"):
        predict.main([f"--model={workdir}", str(tmp_path)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bad", ["--top=0", "--batch=0"])
def test_numbers_below_one_are_refused(workdir, photos, bad):
    with pytest.raises(UserError, match=bad):
        predict.main([f"--model={workdir}", bad, str(photos[0])])


def test_on_the_command_line_an_error_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["predict", f"--model={tmp_path}", "nowhere.png"])
    with pytest.raises(SystemExit) as stop:
        predict.cli()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no such image or folder: nowhere.png\n"


# A model and its description


def test_a_model_without_parameters_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no parameter file"):
        vit_jax.load(tmp_path)
    with pytest.raises(UserError, match=f"no such checkpoint: {tmp_path / 'far.npz'}"):
        vit_jax.load(tmp_path / "far.npz")


def test_class_names_must_match_the_head(tmp_path):
    write_model(tmp_path / "model.npz", class_names=NAMES[:4])
    with pytest.raises(UserError, match=f"{tmp_path / 'model.json'} names 4 classes, .*{tmp_path / 'model.npz'} has 5"):
        vit_jax.load(tmp_path)


def test_a_description_of_another_model_is_refused(tmp_path):
    write_model(tmp_path / "model.npz", model=FIELDS | {"hidden_size": 64}, class_names=NAMES)
    with pytest.raises(UserError, match=r"(?s)does not fit the model.*- cls \(1, 1, 64\)\n  \+ cls \(1, 1, 32\)"):
        vit_jax.load(tmp_path)


def test_a_file_without_head_cannot_classify(tmp_path):
    params = write_model(tmp_path / "model.npz")
    checkpoint.save({name: x for name, x in params.items() if name != "head"}, tmp_path / "model.npz")
    with pytest.raises(UserError, match=r"(?s)does not fit the model.*- head/bias \(5,\)"):
        vit_jax.load(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError, match=f"{tmp_path} has no head"):
        vit_jax.load(tmp_path)


# Published files, which have no description


def tiny_16(num_classes, grid=2, **fields):
    """Random parameters with the names and shapes of ViT-Ti_16."""
    side = 16 * grid
    return small.random_params(models.get_model("ViT-Ti_16", num_classes=num_classes, **fields), np.zeros((1, side, side, 3)))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """ViT-Ti_16.npz at 32 px, which takes every image for a golden retriever."""
    path = tmp_path_factory.mktemp("published") / "ViT-Ti_16.npz"
    params = tiny_16(1000)
    params["head"]["bias"][207] = 100
    checkpoint.save(params, path)
    return path


def test_a_published_file_answers_with_imagenet_names(capsys, published, photos):
    predictions = run_json(capsys, f"--model={published}", "--top=1", photos[0] / "a.png")[str(photos[0] / "a.png")]
    assert [(p["label"], p["index"]) for p in predictions] == [("golden retriever", 207)]
    assert predictions[0]["probability"] > 0.99


def test_imagenet_has_its_usual_names():
    names = describe.imagenet_class_names()
    assert len(names) == 1000 and all(names)
    some = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 954: "banana", 999: "toilet"}
    assert all(some[i] in names[i] for i in some)


@pytest.mark.parametrize("name", [AUGREG_FILE, "renamed.npz", "ViT-B_16.npz"])
@pytest.mark.parametrize("model_name", [None, "ViT-Ti_16"])
def test_the_model_follows_from_names_and_shapes_whatever_the_file_is_called(tmp_path, published, name, model_name):
    (tmp_path / name).hardlink_to(published)
    classifier = vit_jax.load(tmp_path / name, model_name=model_name)
    model = classifier.predictor.task.model.module
    assert model.clone(model_name="ViT-Ti_16") == models.get_model("ViT-Ti_16", num_classes=1000)
    assert classifier.predictor.image_size == (32, 32)
    assert classifier.predictor.description.mean == classifier.predictor.description.std == (127.5, 127.5, 127.5)
    chex.assert_trees_all_equal(classifier.predictor.params, checkpoint.load(published))


def test_other_classes_are_numbered_and_a_representation_layer_is_kept(tmp_path):
    checkpoint.save(tiny_16(21, grid=3, representation_size=24), tmp_path / "ViT-Ti_16.npz")
    classifier = vit_jax.load(tmp_path / "ViT-Ti_16.npz")
    assert classifier.predictor.task.model.module.representation_size == 24
    assert classifier.predictor.image_size == (48, 48)
    assert classifier.class_names[17] == "class 17" and len(classifier.class_names) == 21


def test_a_file_of_another_model_is_refused_with_a_list(published):
    with pytest.raises(UserError, match=r"(?s)does not fit the model.*- cls \(1, 1, 384\)\n  \+ cls \(1, 1, 192\)"):
        vit_jax.load(published, model_name="ViT-S_16")


def test_what_cannot_be_read_from_a_file_is_said(tmp_path, published):
    with pytest.raises(UserError, match="unknown model 'Ti_16': did you mean .*ViT-Ti_16"):
        vit_jax.load(published, model_name="Ti_16")
    model = models.get_model("ViT-Ti_16", num_classes=3)
    checkpoint.save(small.random_params(model, np.zeros((1, 32, 48, 3))), tmp_path / "wide.npz")
    with pytest.raises(UserError, match="wide.npz has position embeddings that are no square, and no model.json"):
        vit_jax.load(tmp_path / "wide.npz")


def test_scores_of_every_token_classify_no_image(tmp_path):
    write_model(tmp_path / "model.npz", model=FIELDS | {"classifier": "token_unpooled"})
    with pytest.raises(UserError, match="scores every token .token_unpooled."):
        vit_jax.load(tmp_path)


def test_a_classifier_has_no_boxes_to_draw_and_no_threshold(workdir, photos):
    with pytest.raises(UserError, match="option threshold means nothing to the task of this model: it has top"):
        predict.main([f"--model={workdir}", "--threshold=0.5", str(photos[0])])
    with pytest.raises(UserError, match="--draw: the task of this model has nothing to draw"):
        predict.main([f"--model={workdir}", "--draw=out", str(photos[0])])


def test_a_head_of_sigmoids_gives_each_class_a_probability_for_itself(tmp_path, workdir, photos):
    write_model(tmp_path / "model.npz", head="sigmoid")
    images = [pixels(*SIZE, 3)]
    odds = vit_jax.load(workdir).probabilities(images)
    each = vit_jax.load(tmp_path).probabilities(images)
    logits = np.log(each / (1 - each))
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), odds, atol=1e-5, rtol=0)
    assert abs(each.sum() - 1) > 1e-2


def test_mean_std_and_interpolation_can_be_set(tmp_path, workdir):
    write_model(tmp_path / "model.npz", mean=[1.0, 2.0, 3.0], std=[90.0, 91.0, 92.0])
    image = [pixels(*SIZE, 3)]
    told = vit_jax.load(workdir, mean=(1, 2, 3), std=(90, 91, 92), interpolation="bicubic")
    np.testing.assert_array_equal(told.probabilities(image), vit_jax.load(tmp_path).probabilities(image))
    assert told.predictor.description.preprocessing == {"interpolation": "bicubic", "antialias": True}
    for bad in ("--mean=1,2", "--std=0,0,0", "--mean=a,b,c"):
        with pytest.raises(UserError, match=bad.split("=")[0].strip("-")):
            predict.main([f"--model={workdir}", bad, str(workdir / "model.npz")])


def test_errors_of_a_labelled_folder_become_a_page(workdir, tmp_path, capsys):
    names = ["1.png", "sub/2.png"]
    for i, name in enumerate(f"{kind}/{name}" for kind in ("DÖG", "ape", "eel") for name in names):
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(*SIZE, 3, seed=i)).save(tmp_path / "new" / name)
    options = ("--model", str(workdir), "--errors", str(tmp_path / "out"), "--json")
    lines, said = run(capsys, *options, str(tmp_path / "new"))
    answers = [json.loads(line) for line in lines]
    right = sum(x["predictions"][0]["label"] == x["image"].split("/")[-2 - ("sub" in x["image"])].lower() for x in answers)
    content = (tmp_path / "out" / "report.html").read_text()
    assert f"accuracy: {right} of 6 images" in content and content.count("<figure><a href=") == 6 and "report.html" in said
    assert content.count('href="../new/') == 6 and "sections" not in content and 'id="recipe"' not in content
    run(capsys, *options, str(tmp_path / "new" / "ape"), str(tmp_path / "new" / "eel" / "1.png"))
    assert "of 3 images" in (tmp_path / "out" / "report.html").read_text()

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: report.html cannot be written there"):
        predict.main([*options, "--errors", str(tmp_path / "file"), str(tmp_path / "new")])
    (tmp_path / "new" / "DÖG").rename(tmp_path / "new" / "dingo")
    with pytest.raises(UserError, match=r"2 of 6 images are in no folder .*\(ape, bear, cat, dög, eel\).*dingo/1.png"):
        predict.main([*options, str(tmp_path / "new")])
