"""Logits and the stages before them against independent implementations, in float32 to 1e-5."""

import importlib.util

import numpy as np
import pytest

from tests.models import numpy_peer, small
from vit_jax.models.layers import AddPositionEmbs
from vit_jax.models.resnet import ResidualUnit, ResNet

pytestmark = pytest.mark.usefixtures("all_optimised")
ODD_AND_EVEN = (45, 40)  # strides of 2 need as much padding at both ends of 45, but more at the end of 40


def assert_close(ours, theirs):
    theirs = np.asarray(theirs)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert 0.2 < theirs.std() < 5, "1e-5 means something for numbers of order 1 only"
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def adds_positions(module, _):
    return isinstance(module, AddPositionEmbs)


@pytest.fixture(scope="module")
def torch_peer(request):
    """The module of torch peers, where torch and the library that the test needs beside it are installed."""
    for name in ("torch", request.param):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    return importlib.import_module("tests.models.torch_peer")


needs_transformers = pytest.mark.parametrize("torch_peer", ["transformers"], indirect=True)
needs_timm = pytest.mark.parametrize("torch_peer", ["timm"], indirect=True)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"classifier": "gap"},
        {"classifier": "unpooled"},
        {"classifier": "token_unpooled"},
        {"representation_size": 20},
        {"classifier": "gap", "representation_size": 20},
        {"patches": {"size": (8, 4)}},
        {"num_classes": None},
        {"position_embedding": "none"},
    ],
    ids=str,
)
def test_vit_equals_numpy(fields):
    """On images whose last pixels fill no patch; the images of the other peers are whole patches."""
    model, images = small.vit(**fields), small.random_images(45, 31)
    params = small.random_params(model, images)
    assert_close(small.apply(model, params, images), numpy_peer.vit(params, images, model.classifier))


@pytest.mark.parametrize("units", [(2, 1), ()], ids=["stages", "stem only"])
def test_hybrid_equals_numpy(units):
    model = small.hybrid(resnet={"num_layers": units}, patches={"size": (1, 1)})
    images = small.random_images(*ODD_AND_EVEN)
    params = small.random_params(model, images)
    assert_close(small.apply(model, params, images), numpy_peer.vit(params, images))


def test_resnet_equals_numpy_stem_and_unit_by_unit():
    images = small.random_images(*ODD_AND_EVEN)
    params = small.random_params(small.hybrid(resnet={"num_layers": (2, 1)}), images)
    x = numpy_peer.resnet_stem(params, images)
    assert_close(small.apply(ResNet(num_layers=()), params, images), x)
    for block, unit, width, stride in ((1, 1, 64, 1), (1, 2, 64, 1), (2, 1, 128, 2)):
        unit_params = params[f"block{block}"][f"unit{unit}"]
        ours = small.apply(ResidualUnit(width, stride), unit_params, np.float32(x))
        x = numpy_peer.residual_unit(unit_params, x, stride)
        assert_close(ours, x)


@pytest.mark.parametrize("size", [(40, 24), (45, 29)], ids=["whole patches", "zeros around the image"])
def test_mixer_equals_numpy(size):
    model, images = small.mixer(), small.random_images(*size)
    params = small.random_params(model, images)
    assert_close(small.apply(model, params, images), numpy_peer.mixer(params, images))


@pytest.mark.parametrize("kind", small.MODELS)
def test_epsilons_equal_numpy_where_they_matter(kind):
    """Norms that divide by about 1e-3 and kernels of about 1e-4 show an epsilon that numbers of order 1 would hide."""
    model, images = small.MODELS[kind](), 1e-3 * small.random_images(40, 40)
    params = small.random_params(model, images, faint=1e-3)
    peer = numpy_peer.mixer if kind == "mixer" else numpy_peer.vit
    assert_close(small.apply(model, params, images), peer(params, images))


@needs_transformers
def test_vit_equals_transformers_stage_by_stage(torch_peer):
    model, images = small.vit(), small.random_images(40, 24)
    params = small.random_params(model, images)
    theirs = torch_peer.run(torch_peer.hf_vit(params, (40, 24)), images, output_hidden_states=True)

    logits, state = small.apply(model, params, images, capture_intermediates=adds_positions, mutable=["intermediates"])
    (embedded,) = state["intermediates"]["Transformer"]["posembed_input"]["__call__"]
    layers = small.apply(model, params, images, method="features")["layers"]
    for ours, hidden in zip((embedded, *layers), theirs.hidden_states, strict=True):
        assert_close(ours, hidden)
    assert_close(logits, theirs.logits)


@needs_timm
@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_vit_equals_timm(torch_peer, classifier):
    model, images = small.vit(classifier=classifier), small.random_images(24, 40)
    params = small.random_params(model, images)
    assert_close(small.apply(model, params, images), torch_peer.run(torch_peer.timm_vit(params, (24, 40)), images))


@needs_timm
def test_mixer_equals_timm(torch_peer):
    model, images = small.mixer(), small.random_images(24, 40)
    params = small.random_params(model, images)
    assert_close(small.apply(model, params, images), torch_peer.run(torch_peer.timm_mixer(params, (24, 40)), images))
