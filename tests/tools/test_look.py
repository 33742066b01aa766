"""What is seen inside a model, as pictures: where heat lies on a photo, similarities, filters, colours of features."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.models import small
from vit_jax import pictures
from vit_jax.checkpoint import describe
from vit_jax.errors import UserError
from vit_jax.predictor import Predictor
from vit_jax.tools import look

SIZE = (24, 40)
FIELDS = {"hidden_size": 32, "patches": {"size": (8, 8)}, "num_classes": 7, "transformer": small.ENCODER}


def loaded(params=None, **changes):
    """A predictor without a task: what these pictures need of one."""
    description = describe.Description(
        **{
            "model_type": "ViT",
            "model": FIELDS,
            "image_size": SIZE,
            "grid": (3, 5),
            "mean": (127.5,) * 3,
            "std": (127.5,) * 3,
            "class_names": tuple("abcdefg"),
        }
        | changes
    )
    return Predictor(None, params or {}, description)


def test_heat_lies_where_its_patch_lies():
    """Of two parts of a photo, and where the last columns are in no patch, or the patches hang over the edge."""
    image, heat = Image.new("RGB", (50, 30), "black"), np.zeros((3, 5))
    heat[2, 1] = 1
    for share, centre in (((1, 1), (25, 15)), ((0.8, 0.5), (20, 7.5)), ((1.5, 1.25), (37.5, 18.75))):
        bright = np.float64(pictures.heat_over(image, heat, share=share)).sum(axis=2)
        y, x = np.unravel_index(bright.argmax(), bright.shape)
        assert abs(y - min(29, centre[0])) <= 2 and abs(x - centre[1]) <= 2, (share, y, x)
    flat = np.asarray(pictures.heat_over(image, np.full((3, 5), 0.3)))
    assert (flat == flat[0, 0]).all()


def test_the_photo_is_shown_as_far_as_the_model_sees_it_and_undistorted():
    """With a centre crop the middle, of the same aspect as the crop; without one all of it, however it is squeezed."""
    photo = np.zeros((60, 200, 3), np.uint8)
    photo[:, 46:154] = 255
    whole = look.seen(photo, loaded())
    assert whole.size == (look.COLUMN, round(look.COLUMN * 60 / 200))
    middle = look.seen(photo, loaded(preprocessing={"resize_to": 24}))
    assert middle.size == (look.COLUMN, round(look.COLUMN * 24 / 40)) and np.asarray(middle).min() == 255


@pytest.mark.parametrize(
    ("fields", "size", "grid", "expected"),
    [
        ({}, SIZE, (3, 5), (1, 1)),
        ({}, (30, 40), (3, 5), (0.8, 1)),  # six rows of pixels fill no patch
        ({"resnet": {"num_layers": (1, 1)}, "patches": {"size": (1, 1)}}, (45, 40), (6, 5), (48 / 45, 1)),  # padded to 48
    ],
)
def test_the_patches_stand_for_this_share_of_what_is_seen(fields, size, grid, expected):
    assert look.share(loaded(model=FIELDS | fields, image_size=size), grid) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1)])
@pytest.mark.parametrize("heads", [1, 4, 12])
def test_a_sheet_holds_every_head(shape, heads):
    rng = np.random.default_rng(0)
    found = {name: rng.random(shape) for name in ("mean", "rollout", "relevance")}
    found |= {"heads": rng.random((2, heads, *shape)), "logits": np.eye(7)[3], "target": 3}
    photo = rng.integers(0, 256, (30, 50, 3), np.uint8)
    model = loaded()
    assert look.class_text(model, found) == f"d ({np.e / (np.e + 6):.0%})"
    sheet, layers = (f(model, photo, found, "photo.png") for f in (look.attention_sheet, look.layers_sheet))
    assert sheet.width == 4 * (look.COLUMN + pictures.GAP) + pictures.GAP
    assert layers.height > sheet.height / 2 and layers.width > heads * 100
    del found["relevance"], found["target"], found["logits"]
    assert look.attention_sheet(model, photo, found, "photo.png").width < sheet.width


def test_positions_are_compared_by_their_cosine():
    model, images = small.vit(num_registers=2), small.random_images(*SIZE)
    params = small.random_params(model, images)
    found = look.position_similarity(loaded(params))
    table = params["Transformer"]["posembed_input"]["pos_embedding"][0, 1:]  # without the class token's
    for i, j in ((0, 0), (2, 4), (7, 13)):
        a, b = table[i], table[j]
        cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        assert found[i // 5, i % 5, j // 5, j % 5] == pytest.approx(cosine, abs=1e-6)
    assert look.position_picture(found).width > 500
    fixed = look.position_similarity(loaded({}, model=FIELDS | {"position_embedding": "sincos2d"}))
    assert fixed[1, 1, 1, 1] == pytest.approx(1) and fixed[0, 0, 0, 1] > fixed[0, 0, 0, 4]
    for changes in ({"model": FIELDS | {"position_embedding": "none"}}, {"model_type": "Mixer"}):
        with pytest.raises(UserError, match="has no position embeddings"):
            look.position_similarity(loaded({}, **changes))


def test_filters_are_the_first_principal_components_of_the_kernel():
    """Filters that are mixtures of two patterns, with more of the first: found in this order, but for the signs."""
    rng = np.random.default_rng(0)
    patterns = np.linalg.qr(rng.normal(size=(8 * 8 * 3, 2)))[0].T
    kernel = np.einsum("nd,np->pd", rng.normal(size=(2, 32)) * [[5], [1]], patterns) + rng.normal(size=(192, 1))
    for name in ("embedding", "stem"):
        found = look.filters(loaded({name: {"kernel": kernel.reshape(8, 8, 3, 32)}}), count=2)
        assert found.shape == (2, 8, 8, 3) and found.min() == 0 and found.max() == 1
        for component, pattern in zip(found, patterns, strict=True):
            assert abs(np.corrcoef(component.ravel(), pattern)[0, 1]) > 0.98
    assert look.filters_picture(found).width > 128
    for params in ({}, {"embedding": {"kernel": np.ones((1, 1, 64, 32))}}):
        with pytest.raises(UserError, match="no patches from RGB images"):
            look.filters(loaded(params))


def test_colours_of_features_part_the_object_from_its_ground():
    """Two objects with four kinds of parts, which three components tell apart, in two images; then the signs are turned."""
    rng = np.random.default_rng(0)
    d, kinds = 16, np.zeros((2, 8, 9), int)
    kinds[:, 2:6, 2:4], kinds[:, 2:6, 4:6], kinds[0, 2:4, 6], kinds[1, 2:4, 6] = 1, 2, 3, 4
    centres = rng.normal(size=(5, d)) + 6 * (np.arange(5) > 0)[:, None]
    patches = centres[kinds] + 0.05 * rng.normal(size=(*kinds.shape, d))
    for sign in (1, -1):
        foreground, colours = look.feature_colours(sign * patches)
        np.testing.assert_array_equal(foreground, kinds > 0)
        assert colours.min() == 0 and colours.max() == 1 and not colours[kinds == 0].any()
        means = np.stack([colours[kinds == kind].mean(0) for kind in (1, 2, 3, 4)])
        assert max(colours[kinds == kind].std(0).max() for kind in (1, 2, 3, 4)) < 0.1 < np.ptp(means, axis=0).min()
        np.testing.assert_allclose(colours[0, 2:6, 2:6], colours[1, 2:6, 2:6], atol=0.3)


def test_colours_do_not_need_much():
    for shape in ((1, 1, 1, 4), (1, 3, 3, 2)):
        foreground, colours = look.feature_colours(np.random.default_rng(0).normal(size=shape))
        assert np.isfinite(colours).all() and foreground.shape == shape[:3]
    foreground, colours = look.feature_colours(np.ones((2, 3, 3, 4)))
    assert not foreground.any() and not colours.any()
    picture = look.feature_picture(np.zeros((30, 50, 3), np.uint8), colours[0], loaded())
    assert picture.width > 2 * look.COLUMN


def test_a_description_of_two_towers_is_that_of_its_image_tower():
    model = dataclasses.replace(loaded().description, model_type="TwoTowers", model={"image": FIELDS})
    assert look.share(Predictor(None, {}, model), (3, 5)) == (1, 1)
