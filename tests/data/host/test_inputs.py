"""What a user hands over as images: whatever is clear is taken, the rest is refused in words."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_jax.data.host.inputs import read_images
from vit_jax.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def png(pixels=PIXELS):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    return path


@pytest.mark.parametrize("one", [PIXELS, Image.fromarray(PIXELS), png(), jnp.asarray(PIXELS), PIXELS.astype(np.int64)])
def test_one_image_or_a_list_of_them(one, path):
    np.testing.assert_array_equal(read_images(one), [PIXELS])
    np.testing.assert_array_equal(read_images([one, path, str(path)]), [PIXELS] * 3)


def test_grey_alpha_and_an_array_of_images():
    grey, alpha = PIXELS[..., 0], np.dstack([PIXELS, np.full((5, 7), 9, np.uint8)])
    for image in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(read_images(image), [np.repeat(grey[..., None], 3, axis=2)])
    np.testing.assert_array_equal(read_images([alpha, Image.fromarray(alpha)]), [PIXELS] * 2)
    np.testing.assert_array_equal(read_images(np.stack([PIXELS, PIXELS[::-1]])), [PIXELS, PIXELS[::-1]])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "the list is empty"),
        (PIXELS / 255, "image 0: an array of float64 does not tell whether white is 1 or 255"),
        (PIXELS.astype(np.int64) - 9, "image 0: an array of int64"),
        ([PIXELS, 3], "image 1: a int is no image"),
        (3, "a int is no image"),
        ([PIXELS[0, 0]], "image 0: an array of uint8 .3,. is no image"),
        (b"junk", "image 0: the image cannot be decoded"),
        ("far.png", "image 0: .*far.png"),
    ],
)
def test_what_is_unclear_is_refused(images, message):
    with pytest.raises(UserError, match=message):
        read_images(images)


def test_a_pil_image_is_what_its_file_is(tmp_path):
    deep, palette, turned = (
        Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800),
        Image.fromarray(PIXELS),
        Image.Exif(),
    )
    turned[0x0112] = 6
    images = {"deep": (deep, {}), "palette": (palette.quantize(8), {"transparency": 3}), "turned": (palette, {"exif": turned})}
    for name, (image, options) in images.items():
        path = tmp_path / f"{name}.png"
        image.save(path, **options)
        with Image.open(path) as opened:
            before = dict(opened.info)
            np.testing.assert_array_equal(read_images(opened), read_images(path), err_msg=name)
            assert before.keys() <= opened.info.keys()
    assert read_images(deep)[0].max() == 34 * 1800 >> 8
    for mode in ("F", "I"):
        with pytest.raises(UserError, match="image 0: 32 bits a pixel"):
            read_images(Image.fromarray(PIXELS[..., 0]).convert(mode))
