"""Images that keep their shapes: SigLIP 2's own processor, views for training, and what is cut comes together again."""

import numpy as np
import pytest
from PIL import Image

from tests.checkpoint import peers
from vit_jax.data.host import patches

RNG = np.random.default_rng(0)
SIZES = [(53, 71), (7, 300), (1, 1), (640, 480), (333, 334), (64, 64), (5, 2000), (17, 16)]


@pytest.mark.parametrize(("patch", "most"), [(16, 256), (7, 13), (4, 100)])
def test_patches_are_those_of_siglip_2(patch, most):
    peers.torch_peer("transformers")
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    images = [RNG.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    processor = Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=most)
    expected = processor([Image.fromarray(x) for x in images], return_tensors="np")
    how = {"patch": (patch, patch), "max_patches": most, "interpolation": "bilinear", "antialias": True}
    for i, image in enumerate(images):
        found = patches.eval_patches(image, exif_rotated=False, **how)
        np.testing.assert_array_equal(found.grid, expected["spatial_shapes"][i])
        count = found.grid.prod()
        assert 0 < count <= most and expected["pixel_attention_mask"][i].sum() == count
        np.testing.assert_allclose(found.pixels[:count] / 127.5 - 1, expected["pixel_values"][i][:count], atol=1e-6)
        assert not found.pixels[count:].any()


def test_what_is_cut_comes_together_again():
    image = RNG.integers(0, 256, (12, 20, 3), np.uint8)
    found = patches.cut(image, (4, 10), 8)
    assert found.pixels.shape == (8, 120) and tuple(found.grid) == (3, 2)
    np.testing.assert_array_equal(patches.joined(found, (4, 10)), image)


@pytest.mark.parametrize("method", patches.DRAWN)
def test_training_sees_windows_of_about_the_shape_of_the_image(method):
    """A picture whose red is the row and green the column: its slopes tell how it was stretched."""
    rows, columns = np.mgrid[:120, :200]
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    how = {"patch": (8, 8), "max_patches": 64, "crop_method": method, "area": (0.2, 1.0), "exif_rotated": False}
    mirrored, grids = [], set()
    for seed in range(20):
        found = patches.train_patches(image, np.random.default_rng(seed), flip=True, **how)
        again = patches.train_patches(image, np.random.default_rng(seed), flip=True, **how)
        np.testing.assert_array_equal(found.pixels, again.pixels)
        seen = patches.joined(found, (8, 8)).astype(float)
        down, right = np.diff(seen[..., 0], axis=0).mean(), np.diff(seen[..., 1], axis=1).mean()
        assert found.pixels.dtype == np.uint8 and 0.7 < abs(right) / down < 1.4
        mirrored.append(right < 0)
        grids.add(tuple(found.grid))
    shapes = [w / h for h, w in grids]
    assert 3 < sum(mirrored) < 17 and len(grids) > 2 and 1 <= min(shapes) < 1.6 < max(shapes) < 2.6
