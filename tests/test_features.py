"""The command that writes features: its numbers against the model's own, both kinds and formats, sizes, broken images."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from tests.models import small
from vit_jax import checkpoint, features, models
from vit_jax.checkpoint import describe
from vit_jax.checkpoint.resize import resize
from vit_jax.data.host.resize import resize as resized
from vit_jax.errors import UserError
from vit_jax.tools import look

SIZE = (16, 24)
PATCH = (4, 8)
GRID = (4, 3)
MEAN, STD = (110.0, 120.0, 130.0), (50.0, 60.0, 70.0)
TRANSFORMER = {"num_layers": 1, "mlp_dim": 48, "num_heads": 4, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
DINOV2 = {
    "classifier": "cls_mean",
    "num_registers": 2,
    "num_classes": None,
    "transformer": TRANSFORMER | {"activation": "gelu", "layer_scale": True},
}
VARIANTS = {
    "token": {"representation_size": 12},
    "gap": {"classifier": "gap"},
    "distilled": {"classifier": "distilled"},
    "map": {"classifier": "map"},
    "fc_norm": {"classifier": "gap", "fc_norm": True, "num_registers": 1},
    "dinov2": DINOV2,
}
PIXELS = np.random.default_rng(0).integers(0, 256, (5, *SIZE, 3), np.uint8)


def write_model(folder, variant="token", resize="bicubic_antialias"):
    """A random model in `folder`, as .npz and .json; returns (model, params)."""
    fields = {"hidden_size": 32, "patches": {"size": PATCH}, "num_classes": 5, "transformer": TRANSFORMER} | VARIANTS[variant]
    model = models.build("ViT", fields)
    params = small.random_params(model, small.random_images(*SIZE))
    description = {"model_type": "ViT", "model": fields, "image_size": SIZE, "grid": GRID, "mean": MEAN, "std": STD}
    checkpoint.save(params, folder / "model.npz")
    description |= {"resize": resize, "class_names": list("abcde")}
    describe.write(folder / "model.npz", describe.Description(**description))
    return model, params


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of five images that need no resizing."""
    folder = tmp_path_factory.mktemp("photos")
    for name, image in zip("abcde", PIXELS, strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def run(*arguments, expected=0):
    assert features.main([str(argument) for argument in arguments]) == expected


def read(path):
    """names and arrays, of either format."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as f:
            arrays = dict(f)
        return list(arrays.pop("names")), arrays
    with safe_open(path, framework="np") as f:
        return json.loads(f.metadata()["names"]), {name: f.get_tensor(name) for name in f.keys()}


def by_hand(model, params, images):
    """cls and patches of uint8 images."""
    images = ((images - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    found = small.apply(model, params, images, method="features")
    return found["patches"].mean(1) if found["cls"] is None else found["cls"], found["map"]


def assert_same(actual, expected):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_those_of_the_model_on_normalised_images(variant, photos, tmp_path, capsys):
    model, params = write_model(tmp_path, variant)
    out = tmp_path / "f.npz"
    run(f"--model={tmp_path}", f"--out={out}", "--kind=both", photos)
    names, arrays = read(out)
    cls, patches = by_hand(model, params, PIXELS)
    assert names == [str(photos / f"{name}.png") for name in "abcde"]
    assert arrays["cls"].shape == (5, 32) and arrays["patches"].shape == (5, *GRID, 32)
    assert_same(arrays["cls"], cls)
    assert_same(arrays["patches"], patches)
    said, err = capsys.readouterr()
    assert ("the mean of the patches" in said) == (variant in ("gap", "map", "fc_norm")) and err == ""


def test_dinov2_features_are_the_official_ones(photos, tmp_path):
    """Every token is normalised after the last block: [cls, registers, patches]; the classifier reads [cls | mean]."""
    model, params = write_model(tmp_path, "dinov2")
    run(f"--model={tmp_path}", f"--out={tmp_path / 'f.npz'}", "--kind=both", photos)
    _, arrays = read(tmp_path / "f.npz")
    images = ((PIXELS - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    last = small.apply(model, params, images, method="features")["layers"][-1]
    norm = params["Transformer"]["encoder_norm"]
    normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    tokens = normed * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(arrays["cls"], tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(arrays["patches"].reshape(5, 12, 32), tokens[:, 3:], atol=1e-5)
    feature = np.concatenate([arrays["cls"], arrays["patches"].mean((1, 2))], axis=1)
    np.testing.assert_allclose(feature, small.apply(model, params, images), atol=1e-5)


@pytest.mark.parametrize("kind", ["cls", "patches"])
def test_a_kind_is_a_part_of_both_in_both_formats(kind, photos, tmp_path):
    write_model(tmp_path)
    for name, kind_ in (("both.npz", "both"), ("f.npz", kind), ("f.safetensors", kind)):
        run(f"--model={tmp_path / 'model.npz'}", f"--out={tmp_path / name}", f"--kind={kind_}", photos)
    _, whole = read(tmp_path / "both.npz")
    for name in ("f.npz", "f.safetensors"):
        names, arrays = read(tmp_path / name)
        assert list(arrays) == [kind] and len(names) == 5
        assert_same(arrays[kind], whole[kind])
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")], "temporary files are left"


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_batches_and_their_padding_change_nothing(batch, photos, tmp_path):
    model, params = write_model(tmp_path)
    run(f"--model={tmp_path}", f"--out={tmp_path / 'f.npz'}", f"--batch={batch}", photos)
    assert_same(read(tmp_path / "f.npz")[1]["cls"], by_hand(model, params, PIXELS)[0])


@pytest.mark.parametrize(("variant", "rule"), [("dinov2", "bicubic_offset"), ("token", "bilinear"), ("gap", "bicubic")])
def test_another_size_resamples_the_positions_by_the_familys_rule(variant, rule, photos, tmp_path):
    model, params = write_model(tmp_path, variant, rule)
    run(f"--model={tmp_path}", f"--out={tmp_path / 'f.npz'}", "--kind=both", "--size=20,40", photos)
    _, arrays = read(tmp_path / "f.npz")
    table = params["Transformer"]["posembed_input"]["pos_embedding"]
    first = table.shape[1] - 12
    grown = resize(table[0, first:].reshape(*GRID, 32), (5, 5), rule).reshape(1, 25, 32)
    grown = np.concatenate([table[:, :first], grown], axis=1).astype(np.float32)
    params = params | {"Transformer": params["Transformer"] | {"posembed_input": {"pos_embedding": grown}}}
    images = np.stack([resized(image, (20, 40)) for image in PIXELS])
    cls, patches = by_hand(model, params, images)
    assert patches.shape == (5, 5, 5, 32)
    assert_same(arrays["cls"], cls)
    assert_same(arrays["patches"], patches)


def test_a_grid_with_as_many_patches_but_another_form_is_resampled_too(photos, tmp_path):
    model, params = write_model(tmp_path)
    run(f"--model={tmp_path}", f"--out={tmp_path / 'f.npz'}", "--size=12,32", photos)  # 3x4 in place of 4x3
    images = np.stack([resized(image, (12, 32)) for image in PIXELS])
    assert np.abs(read(tmp_path / "f.npz")[1]["cls"] - by_hand(model, params, images)[0]).max() > 1e-3


def test_a_mixer_has_one_size_only(photos, tmp_path):
    model = small.mixer()
    fields = {name: getattr(model, name) for name in model.__dataclass_fields__ if name not in ("parent", "name", "dtype")}
    params = small.random_params(model, small.random_images(*SIZE))
    checkpoint.save(params, tmp_path / "mixer.npz")
    description = {"model_type": "Mixer", "model": fields, "image_size": SIZE, "grid": (2, 3), "mean": MEAN, "std": STD}
    description |= {"class_names": list("abcdefg")}
    describe.write(tmp_path / "mixer.npz", describe.Description(**description))
    arguments = f"--model={tmp_path / 'mixer.npz'}", f"--out={tmp_path / 'f.npz'}", "--kind=both", photos
    run(*arguments)
    cls, patches = by_hand(model, params, PIXELS)
    _, arrays = read(tmp_path / "f.npz")
    assert_same(arrays["cls"], cls)
    assert_same(arrays["patches"], patches)
    with pytest.raises(UserError, match="does not fit the model"):
        run(*arguments, "--size=32")


def test_pictures_of_components_are_written_alone_or_beside_the_numbers(photos, tmp_path, capsys):
    model, params = write_model(tmp_path)
    run(f"--model={tmp_path}", f"--pca={tmp_path / 'alone'}", photos)
    run(f"--model={tmp_path}", f"--pca={tmp_path / 'beside'}", f"--out={tmp_path / 'f.npz'}", photos)
    said, _ = capsys.readouterr()
    assert "wrote 5 pictures to" in said and "of the patches are foreground" in said and said.count("f.npz: cls 5x32") == 1
    _, arrays = read(tmp_path / "f.npz")
    assert list(arrays) == ["cls"]
    names = [f"{i}_{name}.png" for i, name in enumerate("abcde")]
    foreground, colours = look.feature_colours(by_hand(model, params, PIXELS)[1])
    for folder in ("alone", "beside"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
        for name, expected in zip(names, colours, strict=True):
            with Image.open(tmp_path / folder / name) as picture:
                pixels = np.asarray(picture)[-round(2 * look.COLUMN * SIZE[0] / SIZE[1]) - 6 : -6, -2 * look.COLUMN - 6 : -6]
            h, w, _ = pixels.shape
            patches = pixels[h // 8 :: h // 4, w // 6 :: w // 3][:4, :3] / 255
            np.testing.assert_allclose(patches, expected, atol=0.01)
    assert 0 < foreground.mean() < 1


def test_broken_images_are_named_and_left_out(photos, tmp_path, capsys):
    model, params = write_model(tmp_path)
    broken = tmp_path / "broken.png"
    broken.write_bytes((photos / "a.png").read_bytes()[:200])
    os.mkfifo(tmp_path / "pipe.png")
    images = photos / "b.png", broken, photos / "d.png", tmp_path / "pipe.png"
    run(f"--model={tmp_path}", f"--out={tmp_path / 'f.npz'}", "--batch=2", *images, expected=1)
    names, arrays = read(tmp_path / "f.npz")
    assert names == [str(images[0]), str(images[2])]
    assert_same(arrays["cls"], by_hand(model, params, PIXELS[[1, 3]])[0])
    err = capsys.readouterr().err
    assert f"error: {broken}: " in err and "2 of 4 images could not be read and are left out" in err
    run(f"--model={tmp_path}", f"--out={tmp_path / 'none.npz'}", broken, expected=1)
    assert not (tmp_path / "none.npz").exists()


def test_rows_that_are_not_finite_are_counted_and_named(photos, tmp_path, capsys):
    """White pixels alone are too much for this model: half of float32's largest number each, summed over a patch."""
    _, params = write_model(tmp_path)
    params["embedding"]["kernel"] = np.full_like(params["embedding"]["kernel"], 1e36)
    checkpoint.save(params, tmp_path / "model.npz")
    for name, value in (("white", 255), ("grey", 120)):
        Image.fromarray(np.full((*SIZE, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    images = tmp_path / "grey.png", tmp_path / "white.png"
    run(f"--model={tmp_path}", f"--out={tmp_path / 'f.npz'}", "--mean=120,120,120", "--std=1,1,1", *images, expected=1)
    assert f"1 of 2 images have features that are not finite: {images[1]}\n" in capsys.readouterr().err
    names, arrays = read(tmp_path / "f.npz")
    assert names == [str(path) for path in images] and np.isfinite(arrays["cls"]).all(axis=1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=f.h5"], "--out=f.h5 must end with .npz or .safetensors"),
        (["--out=f"], "must end with"),
        ([], "nothing is to be written: give --out=FILE for numbers, or --pca=DIR for pictures"),
        (["--out=f.npz", "--size=20x40"], "--size=20x40 must be a side in pixels"),
        (["--out=f.npz", "--size=0"], "--size=0 must be"),
        (["--out=f.npz", "--size=1,2,3"], "--size=1,2,3 must be"),
        (["--out=f.npz", "--batch=0"], "--batch=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run("--model=nowhere", *arguments, "nothing.png")
    (tmp_path / "g.npz").mkdir()
    with pytest.raises(UserError, match="--out=g.npz is a folder"):
        run("--model=nowhere", "--out=g.npz", "nothing.png")


def test_sizes_that_cannot_be_are_refused(photos, tmp_path):
    write_model(tmp_path)
    with pytest.raises(UserError, match="images of 18x24 px are no whole number of patches of 4x8 px: use --size=16,24"):
        run(f"--model={tmp_path}", f"--out={tmp_path / 'f.npz'}", "--size=18,24", photos)
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError, match="give --size=H,W"):
        run(f"--model={tmp_path / 'model.npz'}", f"--out={tmp_path / 'f.npz'}", photos)
    run(f"--model={tmp_path / 'model.npz'}", f"--out={tmp_path / 'f.npz'}", "--size=16,24", photos)
    assert read(tmp_path / "f.npz")[1]["cls"].shape == (5, 32)
