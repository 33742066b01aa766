"""Images of different sizes in one batch: each comes out as by itself, values and gradients."""

from functools import partial

import jax
import numpy as np
import pytest

from tests.models import small
from vit_jax import checkpoint
from vit_jax.errors import UserError
from vit_jax.models import packed
from vit_jax.models.packed import Pack

SIZES = [(24, 40), (8, 8), (24, 40), (24, 40)]  # 15 patches of 8x8 and a single one
FAST = {"compiler_options": {"xla_backend_optimization_level": 0}}  # it runs once
MODELS = {
    "token, registers": small.vit(num_registers=2, transformer={"num_layers": 1}),
    "gap, sigmoid": small.vit(classifier="gap", fc_norm=True, transformer={"attention": "sigmoid", "num_layers": 1}),
    "map": small.vit(classifier="map", transformer={"num_layers": 1}),
    "cls_mean of two blocks": small.vit(classifier="cls_mean", head_layers=2),
}


def resampling(grid, first):
    """The matrix that makes position embeddings of a 4x4 grid those of another, as checkpoints are adapted."""
    how = {"old_grid": (4, 4), "grid": grid, "rule": "bilinear_antialias"}
    n = 16 + first
    return checkpoint.interpolate_posembed(np.eye(n, dtype=np.float32)[None], first + grid[0] * grid[1], bool(first), **how)[0]


@pytest.mark.parametrize("kind", MODELS)
def test_every_image_is_as_if_it_were_alone(kind):
    """Four images in rows of 17 patches: three rows, of which one holds two images."""
    model, rng = MODELS[kind], np.random.default_rng(0)
    images = [rng.normal(size=(*size, 3)).astype(np.float32) for size in SIZES]
    params = small.random_params(model, small.random_images(32, 32))
    batch, places = packed.pack(images, (8, 8), 17)
    assert batch.patches.shape == (3, 17, 192) and places.tolist() == [0, 1, 2, 4]
    rows, numbers = np.divmod(places, 2)
    dy = rng.normal(size=(len(images), 7)).astype(np.float32)

    @partial(jax.jit, **FAST)
    def of_pack(params, patches):
        y, vjp = jax.vjp(lambda p, x: model.apply({"params": p}, Pack(x, batch.grids))[places], params, patches)
        return y, *vjp(dy)

    @partial(jax.jit, **FAST)
    def alone(params, image, dy):
        y, vjp = jax.vjp(lambda p, x: model.apply({"params": p}, x[None])[0], params, image)
        return y, *vjp(dy)

    with jax.default_matmul_precision("highest"):
        found, dparams, dpatches = jax.device_get(of_pack(params, batch.patches))
        expected, dtable = jax.tree.map(np.zeros_like, params), 0
        for i, image in enumerate(images):
            grid = image.shape[0] // 8, image.shape[1] // 8
            table = params["Transformer"]["posembed_input"]["pos_embedding"]
            matrix = resampling(grid, table.shape[1] - 16)
            own = jax.tree.map(np.asarray, params)
            own["Transformer"]["posembed_input"]["pos_embedding"] = (matrix @ table[0])[None]
            y, gradient, dimage = jax.device_get(alone(own, image, dy[i]))
            np.testing.assert_allclose(found[i], y, atol=1e-5)
            dtable += matrix.T @ gradient["Transformer"]["posembed_input"].pop("pos_embedding")[0]
            gradient["Transformer"]["posembed_input"]["pos_embedding"] = np.zeros_like(table)
            expected = jax.tree.map(np.add, expected, gradient)
            first = sum(n * m for n, m in batch.grids[rows[i], : numbers[i]])
            own_patches = dpatches[rows[i], first : first + grid[0] * grid[1]]
            np.testing.assert_allclose(own_patches, packed.patchify(dimage[None], (8, 8))[0], atol=1e-5)
    expected["Transformer"]["posembed_input"]["pos_embedding"] = dtable[None]
    for name, x in small.flat(expected).items():
        np.testing.assert_allclose(small.flat(dparams)[name], x, atol=3e-5, err_msg=name)


def test_an_image_of_the_usual_size_is_what_it_always_was():
    model, images = small.vit(), small.random_images(32, 32)
    params = small.random_params(model, images)
    batch = Pack(packed.patchify(images, (8, 8)), np.full((2, 1, 2), 4))
    found = small.apply(model, params, batch)
    np.testing.assert_allclose(found, small.apply(model, params, images), atol=1e-5)


WRONG = {
    "rotary positions": ({"transformer": {"rope_theta": 100.0}}, "of one size: set rope_theta=None"),
    "windows": ({"transformer": {"attention": "window", "window_size": 2}}, "of one size: use 'softmax' or 'sigmoid'"),
    "unpooled": ({"classifier": "unpooled"}, "do not go with classifier='unpooled'"),
    "fixed positions": ({"position_embedding": "sincos2d"}, "need a ViT without a ResNet"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_for_images_of_one_size_is_refused_in_words(kind):
    fields, message = WRONG[kind]
    model, images = small.vit(**fields), small.random_images(32, 32)
    params = small.random_params(model, images)
    batch, _ = packed.pack(list(images), (8, 8), 16)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.apply, {"params": params}, batch)


def test_rows_have_room_for_every_image():
    with pytest.raises(UserError, match=r"image 1 of \(40, 24\) has 15 patches of \(8, 8\): a row takes from 1 to 14"):
        packed.pack([np.zeros((8, 8, 3)), np.zeros((40, 24, 3))], (8, 8), 14)
    model, images = small.vit(), small.random_images(24, 32)
    params = small.random_params(model, images)
    with pytest.raises(UserError, match="12 position embeddings are no square"):
        jax.eval_shape(model.apply, {"params": params}, packed.pack(list(images), (8, 8), 12)[0])
