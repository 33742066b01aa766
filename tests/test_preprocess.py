"""The reference's preprocessing of images, and of examples with both."""

import hashlib

import numpy as np
import pytest

from vit_jax import preprocess
from vit_jax.errors import UserError

# Of the uint8 pixels that TensorFlow 2.21 makes of `_image()` at 24 x 24.
TENSORFLOW = {False: "f338fae1316f5884", True: "2c24937529df61df"}


def _image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)


@pytest.mark.parametrize("crop", TENSORFLOW)
def test_images_are_tensorflows_bit_for_bit(crop):
    (image,) = preprocess.PreprocessImages(size=24, crop=crop)([_image()])
    assert image.shape == (24, 24, 3) and image.dtype == np.float32
    pixels = np.round((image + 1) * 127.5).astype(np.uint8)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == TENSORFLOW[crop]
    np.testing.assert_allclose(image, pixels / 127.5 - 1, atol=1e-6)


def test_a_crop_loses_the_borders():
    tall, wide = (np.full(shape, 255, np.uint8) for shape in ((16, 10, 3), (10, 16, 3)))
    tall[[0, 1, -2, -1]] = 0
    wide[:, [0, 1, -2, -1]] = 0
    assert preprocess.PreprocessImages(size=4)([tall, wide]).mean() < 1
    assert (preprocess.PreprocessImages(size=4, crop=True)([tall, wide]) == 1).all()


def test_an_example_keeps_what_is_not_prepared(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[CLS]\ntest")
    pp = preprocess.get_pp(tokenizer_name="bert", vocab_path=path, max_len=3, size=4)
    example = pp({"image": _image(), "text": "test", "label": 3})
    assert example["image"].shape == (4, 4, 3) and example["tokens"].tolist() == [1, 2, 0]
    assert (example["text"], example["label"]) == ("test", 3)
    assert pp({"label": 3}) == {"label": 3}
    with pytest.raises(UserError, match="must be uint8"):
        pp({"image": _image().astype(np.float32)})
