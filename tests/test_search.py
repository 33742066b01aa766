"""The command that finds photos: its order against NumPy, sentence and image, the index beside the photos, the sheet."""

import functools
import json
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from tests import towers
from tests.test_predict import write_model
from vit_jax import predictor, search
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(workdir, parameters)"""
    workdir = tmp_path_factory.mktemp("model")
    return workdir, towers.write(workdir)


@pytest.fixture(scope="module", autouse=True)
def each_model_is_loaded_once():
    with mock.patch.object(predictor, "load", functools.cache(predictor.load)):
        yield


@pytest.fixture
def photos(tmp_path):
    """A folder of ten photos, one of them below it, and what the model sees of them by name."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    pictures = np.random.default_rng(2).integers(0, 256, (10, *towers.SIZE, 3), np.uint8)
    names = [f"deep/{i}.png" if i == 3 else f"{i}.png" for i in range(10)]
    for name, picture in zip(names, pictures, strict=True):
        Image.fromarray(picture).save(folder / name)
    return folder, dict(zip(names, pictures.astype(np.float32) / 127.5 - 1, strict=True))


def run(capsys, model, *arguments):
    """(rows as JSON, what is said on stderr)"""
    assert search.main([f"--model={model[0]}", *map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def check(rows, folder, seen, params, z):
    scores = {str(folder / name): towers.embeddings(params, images=image[None])[0] @ z for name, image in seen.items()}
    assert [row["image"] for row in rows] == sorted(scores, key=lambda path: -scores[path])[: len(rows)]
    np.testing.assert_allclose([row["score"] for row in rows], [scores[row["image"]] for row in rows], atol=1e-6)


def test_a_sentence_and_an_image_find_photos(model, photos, capsys):
    folder, seen = photos
    rows, err = run(capsys, model, folder, "a", "red", "cat", "--top=4")
    check(rows, folder, seen, model[1], towers.embeddings(model[1], tokens=towers.tokens(["a red cat"]))[0])
    assert len(rows) == 4 and "index: 10 photos are new, 0 are gone, 10 in all" in err
    rows, err = run(capsys, model, folder, folder / "deep" / "3.png", "--top=100")
    check(rows, folder, seen, model[1], towers.embeddings(model[1], images=seen["deep/3.png"][None])[0])
    assert len(rows) == 10 and rows[0]["image"].endswith("deep/3.png") and err == ""


def test_each_model_has_an_index_of_its_own_that_follows_the_photos(model, photos, capsys, tmp_path):
    folder, _ = photos
    other = tmp_path / "other", towers.write(tmp_path / "other", seed=1)
    first, _ = run(capsys, model, folder, "dog")
    second, err = run(capsys, other, folder, "dog")
    assert first != second and "10 photos are new" in err and len(list(folder.glob(".vit_jax_index_*.npz"))) == 2
    assert run(capsys, model, folder, "dog") == (first, "")
    (folder / "deep" / "3.png").rename(folder / "3.png")
    (folder / "bad.jpg").write_bytes(b"no image")
    rows, err = run(capsys, model, folder, "dog")
    scores = [[row["score"] for row in found] for found in (rows, first)]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-7)  # NumPy's product rounds a row by its place, which has changed
    assert f"error: {folder / 'bad.jpg'}: the image cannot be decoded" in err
    assert "1 of 11 photos cannot be read and are left out" in err and "0 photos are new, 1 are gone, 10 in all" in err
    index = next(
        path for path in folder.glob(".vit_jax_index_*") if search.model_key(predictor.load(model[0]))[:8] in path.name
    )
    index.write_bytes(b"damaged")
    again, err = run(capsys, model, folder, "dog")
    assert again == rows and "it is made anew" in err
    key = search.model_key(predictor.load(model[0], mean=(0.0, 0.0, 0.0)))
    assert key != search.model_key(predictor.load(model[0]))


def test_an_index_that_cannot_be_written_stops_no_search(model, photos, capsys):
    folder, _ = photos
    (folder / f".vit_jax_index_{search.model_key(predictor.load(model[0]))[:8]}.npz").mkdir()
    rows, err = run(capsys, model, folder, "dog")
    assert len(rows) == 10 and "cannot be written, so that the next search computes all again" in err


def test_the_sheet_shows_what_is_found(model, photos, capsys, tmp_path):
    folder, _ = photos
    rows, _ = run(capsys, model, folder, "dog", "--top=7", f"--out={tmp_path / 'sheet.png'}")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    best = np.asarray(Image.open(rows[0]["image"]))
    corners = best[:: towers.SIZE[0] - 1, :: towers.SIZE[1] - 1].reshape(4, 3)
    found = [tuple(x) for x in sheet.reshape(-1, 3)]
    assert sheet.shape[1] > 5 * search.SIDE and sheet.shape[0] > 2 * search.SIDE
    assert all(tuple(corner) in found for corner in corners)


def test_what_is_refused(model, photos, capsys, tmp_path):
    folder = photos[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for path in (tmp_path / "broken" / "a.jpg", tmp_path / "b.jpg"):
        path.write_bytes(b"no image")
    for arguments, message in (
        ([tmp_path / "none", "dog"], "is no folder: name the folder of the photos first"),
        ([tmp_path / "empty", "dog"], "holds no images"),
        ([tmp_path / "broken", "dog"], "holds no photo that can be read"),
        ([folder, " "], "is empty: give words"),
        ([folder, "none.JPG"], "no such image: none.JPG"),
        ([folder, tmp_path / "b.jpg"], "b.jpg: the image cannot be decoded"),
        ([folder, "dog", "--top=0"], "--top=0 and --batch=8 must be at least 1"),
        ([folder, "dog", "--out=sheet.gif"], "--out=sheet.gif must end with .png"),
    ):
        with pytest.raises(UserError, match=message):
            search.main([f"--model={model[0]}", *map(str, arguments)])
    write_model(tmp_path / "model.npz")
    for query, message in (("dog", "is a ViT, which reads no texts"), (folder / "1.png", "is a ViT: take a model of images")):
        with pytest.raises(UserError, match=message):
            search.main([f"--model={tmp_path}", str(folder), str(query)])
