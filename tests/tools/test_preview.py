"""The picture of a recipe: what is where, how it is labelled, and what the command says."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageFont

from tests import tiny
from tests.command_line import arguments
from vit_jax import overrides
from vit_jax.data import features, sources
from vit_jax.data.digits import DigitsSource
from vit_jax.errors import UserError
from vit_jax.settings import Settings
from vit_jax.tasks import classify
from vit_jax.tools import preview

SIDE = 128  # an 8-pixel digit, enlarged


def cells(picture: Image.Image) -> np.ndarray:
    """The pictures (rows, columns, 8, 8, 3) in the grid, one pixel for each that was enlarged."""
    pixels = np.asarray(picture)
    height, width = SIDE + preview.LINE + preview.GAP, SIDE + preview.GAP
    rows, columns = pixels.shape[0] // height, pixels.shape[1] // width
    pixels = pixels[preview.GAP :, preview.GAP :].reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    return pixels[:, :, 8:SIDE:16, 8:SIDE:16]


def recipe(**augment) -> Settings:
    config = tiny.config(pp_area=(1.0, 1.0), label_smoothing=0.1)
    config.augment.update(augment)
    return Settings.from_config(config)


def test_originals_stand_first_and_unchanged_images_beside_them():
    drawn = cells(preview.preview(recipe(), rows=3, columns=4))
    assert drawn.shape == (3, 4, 8, 8, 3)
    assert len(np.unique(drawn[:, 0], axis=0)) == 3
    np.testing.assert_array_equal(drawn, drawn[:, :1].repeat(4, axis=1))  # crops of the whole image


def test_classes_of_any_name_are_drawn(monkeypatch):
    names = ("bad \udcff", "two\nlines", "bell\x07", "dög", *"456789")
    digits = DigitsSource("digits", "train")
    digits.features = {"image": features.Image(), "label": features.Label(names)}
    monkeypatch.setattr(sources, "get_source", lambda *args, **kwargs: digits)
    assert preview.preview(recipe(), rows=8, columns=1).height == 8 * (SIDE + preview.LINE + preview.GAP) + preview.GAP


def test_bad_images_are_passed_over_if_so_asked(tmp_path):
    files = [tmp_path / split / "ab"[i % 2] / f"{i}.png" for split in ("train", "test") for i in range(8)]
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(file)

    def first(rows, **more):
        config = tiny.config(dataset=str(tmp_path), pp_train="train", pp_test="test", pp_area=(1.0, 1.0), **more)
        return cells(preview.preview(Settings.from_config(config), rows=rows, columns=1))

    for file in files[:5]:
        file.write_bytes(b"no image")
    assert set(first(3, bad_images="skip")[..., 0].ravel()) == {50, 60, 70}
    with pytest.raises(UserError, match="not a known image"):
        first(8)
    for file in files:
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="not a known image"):
        first(3, bad_images="skip")


def test_every_draw_is_another_and_the_seed_repeats_it():
    settings = recipe(erasing=1.0)
    drawn = cells(preview.preview(settings, rows=3, columns=5))
    assert len(np.unique(drawn[0], axis=0)) == 5
    colored = np.ptp(drawn, axis=-1).any((2, 3))  # noise has colours, digits have none
    assert not colored[:, 0].any() and colored[:, 1:].all()
    np.testing.assert_array_equal(cells(preview.preview(settings, rows=3, columns=5)), drawn)


def test_mixed_with_the_reverse_of_its_column():
    plain, mixed = (cells(preview.preview(recipe(color_jitter=0.3, mixup=x), rows=4, columns=4)).astype(int) for x in (0, 1.0))
    assert (np.abs(mixed - plain)[:, 1:].max((2, 3, 4)) > 5).any()
    # λ x + (1 − λ) y and λ y + (1 − λ) x come to x + y.
    np.testing.assert_allclose(mixed + mixed[::-1], plain + plain[::-1], rtol=0, atol=1)


def test_captions_name_the_largest_targets():
    names = ["ape", "bear", "cat"]
    assert classify.caption(np.array([0.0, 1.0, 0.0]), names, 0) == "bear 1.00"
    assert classify.caption(np.array([0.3, 0.7, 0.0]), names, 0) == "bear 0.70, ape 0.30"
    assert classify.caption(np.array([0.04, 0.92, 0.04]), names, 0.04) == "bear 0.92"
    assert classify.caption(np.array([0.3, 0.4, 0.3]), names, 0.1) == "bear 0.40, ape 0.30"


def test_long_names_are_cut_to_the_picture():
    font = ImageFont.load_default(size=13)
    assert preview.fitted("bear 1.00", font, 128) == "bear 1.00"
    cut = preview.fitted("great white shark 0.70, tiger shark 0.30", font, 128)
    assert cut.startswith("great white") and cut.endswith("..") and font.getlength(cut) <= 128


def test_large_images_are_reduced_and_keep_their_shape():
    images = np.zeros((2, 300, 600, 3), np.uint8)
    picture = preview.draw([(images, ["a", "b"])])
    assert picture.size == (preview.GAP * 2 + 448, preview.GAP + 2 * (224 + preview.LINE + preview.GAP))


def run(*args: str) -> None:
    with arguments(*args):
        overrides.parse(sys.argv)
        preview.main()


def test_the_command_writes_a_picture_and_names_what_is_wrong(tmp_path, capsys):
    config = ("--config=configs/pretrain.py:micro4,digits", "--config.pp.crop=8", "--rows=2", "--columns=2")
    out = tmp_path / "grid.png"
    run(*config, f"--out={out}", "--config.augment.mixup=0.5")
    assert Image.open(out).size == (6 + 2 * 134, 6 + 2 * 152)
    assert str(out) in capsys.readouterr().out
    for args, message in (
        (config, "--out is missing"),
        ((f"--out={out}",), "--config is missing"),
        ((*config, "--out=grid.txt"), "ends in .png"),
        ((*config, f"--out={tmp_path}/none/grid.png"), "cannot be written: No such file"),
        ((*config, f"--out={out}", "grid"), "unexpected arguments grid"),
        ((*config, f"--out={out}", "--config.augment.mixpu=0.5"), "did you mean mixup"),
    ):
        with pytest.raises(UserError, match=message):
            run(*args)
