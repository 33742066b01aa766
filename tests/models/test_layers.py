"""What the models promise besides their numbers: features, dtype, dropout, initial values, symmetries."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict

from tests.models import small
from vit_jax.errors import UserError
from vit_jax.models import attention, cores, linear
from vit_jax.models.layers import Encoder

HEIGHT, WIDTH = 40, 24
CLASSIFIERS = ("token", "gap", "unpooled", "token_unpooled")
every_model = pytest.mark.parametrize("kind", small.MODELS)


def build(kind, **fields):
    model, images = small.MODELS[kind](**fields), small.random_images(HEIGHT, WIDTH)
    return model, small.random_params(model, images), images


def encoder_norm(params, x):
    norm = params["Transformer"]["encoder_norm"]
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]


# features


@pytest.mark.parametrize(("kind", "classifier"), [*(("vit", name) for name in CLASSIFIERS), ("hybrid", "token")])
def test_features_are_the_tokens_that_the_head_reads(kind, classifier):
    model, params, images = build(kind, classifier=classifier)
    found = small.apply(model, params, images, method="features")
    chex.assert_shape([found["patches"], found["map"], found["registers"]], [(2, 15, 32), (2, 5, 3, 32), (2, 0, 32)])
    np.testing.assert_array_equal(found["map"].reshape(2, 15, 32), found["patches"])

    tokens = found["patches"]
    if classifier.startswith("token"):
        tokens = np.concatenate([found["cls"][:, None], tokens], axis=1)
    else:
        assert found["cls"] is None
    assert len(found["layers"]) == 2
    chex.assert_equal_shape([*found["layers"], tokens])
    chex.assert_trees_all_close(encoder_norm(params, found["layers"][-1]), tokens, atol=1e-5)

    read = {"token": found["cls"], "gap": tokens.mean(1)}.get(classifier, tokens)
    logits = small.apply(model, params, images)
    chex.assert_trees_all_close(read @ params["head"]["kernel"] + params["head"]["bias"], logits, atol=1e-5)
    chex.assert_shape(logits, {"unpooled": (2, 15, 7), "token_unpooled": (2, 16, 7)}.get(classifier, (2, 7)))


def test_features_of_a_mixer_are_the_tokens_whose_mean_the_head_reads():
    model, params, images = build("mixer")
    found = small.apply(model, params, images, method="features")
    chex.assert_shape([found["patches"], found["map"], found["registers"]], [(2, 15, 32), (2, 5, 3, 32), (2, 0, 32)])
    np.testing.assert_array_equal(found["map"].reshape(2, 15, 32), found["patches"])
    assert found["cls"] is None and [x.shape for x in found["layers"]] == [(2, 15, 32)] * 2
    logits = found["patches"].mean(1) @ params["head"]["kernel"] + params["head"]["bias"]
    chex.assert_trees_all_close(logits, small.apply(model, params, images), atol=1e-5)


@every_model
def test_without_classes_there_is_no_head_and_the_result_is_its_input(kind):
    model, params, images = build(kind)
    logits = small.apply(model, params, images)
    head = params.pop("head")
    for num_classes in (None, 0):
        headless = small.MODELS[kind](num_classes=num_classes)
        chex.assert_trees_all_equal_structs(small.shapes(headless, images), params)
    x = small.apply(headless, params, images)
    chex.assert_trees_all_close(x @ head["kernel"] + head["bias"], logits, atol=1e-5)


@pytest.mark.parametrize(("registers", "head_layers"), [(0, 1), (2, 2)])
def test_a_distilled_model_has_two_heads_whose_mean_are_its_logits(registers, head_layers):
    """Each reads its token of the last `head_layers` blocks."""
    model, params, images = build("vit", classifier="distilled", num_registers=registers, head_layers=head_layers)
    cls, dist = small.apply(model, params, images, method="head_logits")
    layers = small.apply(model, params, images, method="features")["layers"][-head_layers:]
    tokens = np.concatenate([encoder_norm(params, layer) for layer in layers], axis=-1)
    for logits, place, head in ((cls, 0, "head"), (dist, 1, "head_dist")):
        chex.assert_trees_all_close(logits, tokens[:, place] @ params[head]["kernel"] + params[head]["bias"], atol=1e-5)
    chex.assert_trees_all_close(small.apply(model, params, images), (cls + dist) / 2, atol=1e-6)
    for other in (small.vit(), small.vit(classifier="distilled", num_classes=None)):
        with pytest.raises(UserError, match="no two heads: use 'distilled'"):
            other.apply({"params": params}, images, method="head_logits")
    for wrong, at_most in (({"head_layers": 3}, "1 to 2"), ({"head_layers": 2, "classifier": "map"}, "1 unless")):
        with pytest.raises(UserError, match=at_most):
            small.vit(**wrong).init(jax.random.key(0), images)


# dtype


@every_model
@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_reaches_every_product_and_every_layer(kind, train):
    dropout = {} if kind == "mixer" else {"transformer": {"dropout_rate": 0.1, "attention_dropout_rate": 0.1}}
    model, params, images = build(kind, dtype="bfloat16", **dropout)

    def forward(params, images, key):
        kwargs = {"train": train, "rngs": {"dropout": key}, "capture_intermediates": True, "mutable": ["intermediates"]}
        return model.apply({"params": params}, images, **kwargs)

    def gradients(params, images, key):
        return jax.grad(lambda params: forward(params, images, key)[0].astype(jnp.float32).sum())(params)

    for function in (forward, gradients):
        lowered = jax.jit(function).lower(params, images, jax.random.key(0)).as_text()
        products = re.findall(r"stablehlo\.(?:dot_general|convolution).*: \((.*)\) ->", lowered)
        assert len(products) > 8 and len(products) == len(re.findall(r"= stablehlo\.(?:dot_general|convolution)", lowered))
        for operands in products:
            assert all(operand.endswith("xbf16>") for operand in operands.split(", ")), operands

    logits, state = jax.eval_shape(forward, params, images, jax.random.key(0))
    assert logits.dtype == jnp.bfloat16
    outputs = small.flat(state["intermediates"])
    assert len(outputs) > 8
    for name, output in outputs.items():
        softmax = "Attention_1/Dropout" in name
        assert output.dtype == (jnp.float32 if softmax else jnp.bfloat16), name


@every_model
def test_parameters_are_float32_whatever_the_dtype(kind):
    params = small.shapes(small.MODELS[kind](dtype="bfloat16"), small.random_images(HEIGHT, WIDTH))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


@every_model
def test_bfloat16_logits_are_near_those_of_float32(kind):
    model, params, images = build(kind)
    exact = small.apply(model, params, images)
    rough = small.apply(small.MODELS[kind](dtype="bfloat16"), params, images).astype(np.float32)
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 0 < error < 1e-2  # bfloat16 rounds to 4e-3


# dropout

SOFTMAX = FrozenDict()
RATES = ("dropout_rate", "attention_dropout_rate")


def train_and_infer(kind=SOFTMAX, **rates):
    """Logits in training as a function of the seed, and in inference, which no rate changes, of a `kind` of attention."""
    model, params, images = build("vit", transformer={**rates, **kind})

    def train(seed):
        return small.apply(model, params, images, train=True, rngs={"dropout": jax.random.key(seed)})

    return train, small.apply(small.vit(transformer=dict(kind)), params, images)


@pytest.mark.parametrize("rate", RATES)
def test_dropout_is_a_function_of_its_key(rate):
    train, inference = train_and_infer(**{rate: 0.5})
    np.testing.assert_array_equal(train(0), train(0))
    assert np.abs(train(0) - train(1)).max() > 0.01
    assert np.abs(train(0) - inference).max() > 0.01


@pytest.mark.parametrize(("rate", "kind"), [(RATES[0], {}), *((RATES[1], k) for k in ({}, *small.ATTENTIONS.values()))])
def test_dropout_of_almost_nothing_equals_inference(rate, kind):
    """At 1e-9 every number is kept, but attention takes the path that can drop: both paths compute the same."""
    train, inference = train_and_infer(kind, **{rate: 1e-9})
    chex.assert_trees_all_close(train(0), inference, atol=1e-6)


@every_model
def test_no_key_is_needed_for_inference_nor_for_training_without_dropout(kind):
    model, params, images = build(kind)
    logits = small.apply(model, params, images)
    np.testing.assert_array_equal(small.apply(model, params, images, train=True), logits)
    if kind == "vit":
        dropping = small.vit(transformer={"dropout_rate": 0.5, "attention_dropout_rate": 0.5})
        np.testing.assert_array_equal(small.apply(dropping, params, images), logits)


@pytest.mark.parametrize("add_position_embedding", [True, False])
def test_first_dropout_belongs_to_the_position_embedding(add_position_embedding):
    encoder = Encoder(0, 4, 1, dropout_rate=0.5, add_position_embedding=add_position_embedding)
    x = np.random.default_rng(0).normal(size=(1, 6, 8)).astype(np.float32)
    params = small.random_params(encoder, x)
    (kept, _), (dropped, _) = (
        small.apply(encoder, params, x, train=train, rngs={"dropout": jax.random.key(0)}) for train in (False, True)
    )
    assert np.array_equal(kept, dropped) != add_position_embedding


# initial values


def test_layer_scale_starts_with_its_value():
    params = small.shapes(small.vit(), small.random_images(8, 8))
    assert "ls1" not in params["Transformer"]["encoderblock_0"]
    model = small.vit(transformer={"layer_scale": True, "layer_scale_init": 1e-4})
    params = small.initial_params(model, small.random_images(8, 8))
    for leaf in leaves(params, "encoderblock_./ls./gamma"):
        np.testing.assert_array_equal(leaf, np.full(32, 1e-4, np.float32))


@pytest.fixture(scope="module")
def initial():
    fields = {"hidden_size": 64, "patches": {"size": (2, 2)}, "representation_size": 96, "head_bias_init": -10.0}
    model = small.hybrid(**fields, transformer={"mlp_dim": 160})
    return small.initial_params(model, small.random_images(64, 64))


def leaves(params, pattern):
    found = [leaf for name, leaf in params.items() if re.search(pattern, name)]
    assert found, pattern
    return found


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        ("^cls$", 0),
        ("^head/kernel", 0),
        ("^head/bias", -10),
        ("(embedding|pre_logits)/bias", 0),
        ("Attention_1/.*/bias", 0),
        ("(LayerNorm_.|encoder_norm|gn[^/]*)/bias", 0),
        ("(LayerNorm_.|encoder_norm|gn_root|gn1|gn2|gn_proj)/scale", 1),
        ("gn3/scale", 0),
    ],
)
def test_constant_initial_values(initial, pattern, value):
    for leaf in leaves(initial, pattern):
        assert (leaf == value).all()


@pytest.mark.parametrize(
    ("pattern", "std", "tolerance"),
    [
        ("pos_embedding", 0.02, 0.1),
        ("Dense_./bias", 1e-6, 0.15),
        ("^embedding/kernel", (2 * 2 * 256) ** -0.5, 0.02),
        ("pre_logits/kernel", 64**-0.5, 0.04),
        ("conv_root/kernel", (7 * 7 * 3) ** -0.5, 0.04),
        ("block1/unit1/conv2/kernel", (3 * 3 * 64) ** -0.5, 0.02),
    ],
)
def test_random_initial_values_have_their_standard_deviation(initial, pattern, std, tolerance):
    x = np.concatenate([leaf.ravel() for leaf in leaves(initial, pattern)])
    assert x.std() == pytest.approx(std, rel=tolerance) and abs(x.mean()) < 4 * std / np.sqrt(x.size)


@pytest.mark.parametrize(("pattern", "fan_sum"), [("Attention_1/.*/kernel", 64 + 64), ("Dense_./kernel", 64 + 160)])
def test_xavier_uniform_kernels_fill_their_bounds(initial, pattern, fan_sum):
    """Attention kernels count as flat matrices from width to width, whatever their head axes."""
    bound = np.sqrt(6 / fan_sum)
    for kernel in leaves(initial, pattern):
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.03)


def test_mixer_starts_with_a_zero_head_and_xavier_uniform_mlps():
    model = small.mixer(channels_mlp_dim=160)
    params = small.initial_params(model, small.random_images(64, 64))
    assert not params["head/kernel"].any() and not params["head/bias"].any()
    assert params["stem/kernel"].std() == pytest.approx((8 * 8 * 3) ** -0.5, rel=0.03)
    for mixing, fan_sum in (("token_mixing", 64 + 24), ("channel_mixing", 32 + 160)):
        for kernel in leaves(params, f"{mixing}/Dense_./kernel"):
            assert 0.98 < np.abs(kernel).max() / np.sqrt(6 / fan_sum) <= 1


# symmetries


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_order_of_patches_does_not_matter_if_their_positions_move_along(classifier):
    model, params, images = build("vit", classifier=classifier)
    order = np.random.default_rng(2).permutation(15)
    patches = images.reshape(2, 5, 8, 3, 8, 3).swapaxes(2, 3).reshape(2, 15, 8, 8, 3)[:, order]
    shuffled = patches.reshape(2, 5, 3, 8, 8, 3).swapaxes(2, 3).reshape(images.shape)
    logits = small.apply(model, params, images)
    assert np.abs(small.apply(model, params, shuffled) - logits).max() > 0.01

    positions = params["Transformer"]["posembed_input"]["pos_embedding"]
    first = positions.shape[1] - 15
    params["Transformer"]["posembed_input"]["pos_embedding"] = np.concatenate(
        [positions[:, :first], positions[:, first:][:, order]], axis=1
    )
    chex.assert_trees_all_close(small.apply(model, params, shuffled), logits, atol=1e-6)


@every_model
def test_an_image_is_blind_to_the_rest_of_its_batch(kind):
    model, params, images = build(kind)
    logits = small.apply(model, params, images)
    spoilt = np.stack([images[0], np.full_like(images[1], np.nan)])
    chex.assert_trees_all_close(small.apply(model, params, spoilt)[0], logits[0], atol=1e-6)
    chex.assert_trees_all_close(small.apply(model, params, images[1:]), logits[1:], atol=2e-6)


@pytest.mark.parametrize("size", [1, 100])
def test_attention_is_that_of_jax(size: int):
    """Values and gradients, with unequal numbers of queries and keys; logits are exact, some overflow without care."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.integers(-3, 4, (2, n, 3, 4)), jnp.float32) for n in (7, 11))
    v, g = (jnp.asarray(rng.standard_normal((2, n, 3, 4)), jnp.float32) for n in (11, 7))
    here, there = (jax.vjp(f, size * q, k, v) for f in (attention.attend, jax.nn.dot_product_attention))
    np.testing.assert_allclose(here[0], there[0], atol=1e-6)
    for found, expected in zip(here[1](g), there[1](g), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6 * size)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_of_attention_under_dropout(count: int, monkeypatch):
    """Against autodiff of the formula."""
    monkeypatch.setattr(cores, "cores", lambda: count)
    monkeypatch.setattr(attention, "_WORTH_SHARING", 0)
    q, k, v, g = jax.random.normal(jax.random.key(0), (4, 3, 7, 3, 4))
    mask = jax.random.bernoulli(jax.random.key(1), 0.8, (3, 3, 7, 7)) / 0.8

    def formula(q, k, v, mask):
        weights = nn.softmax(jnp.einsum("bnkh,bmkh->bknm", q, k) / 2)
        return jnp.einsum("bknm,bmkh->bnkh", weights * mask, v)

    def with_gradients(function, *args):
        y, vjp = jax.vjp(function, *args)
        return y, vjp(g)[:3]

    run = jax.jit(with_gradients, static_argnums=0)
    chex.assert_trees_all_close(run(attention.attend, q, k, v, mask), run(formula, q, k, v, mask), atol=2e-6)


def test_one_product_gives_the_queries_keys_and_values_of_three():
    """Other devices than CPUs compute them so."""
    x = jax.random.normal(jax.random.key(0), (2, 7, 12))

    class Maps(nn.Module):
        stacked: bool

        @nn.compact
        def __call__(self, x):
            maps = [linear.Linear((3, 4), bias_init=nn.initializers.normal(), name=n) for n in ("query", "key", "value")]
            return attention.project(x, maps) if self.stacked else tuple(f(x) for f in maps)

    params = Maps(False).init(jax.random.key(1), x)
    chex.assert_trees_all_equal(Maps(True).init(jax.random.key(1), x), params)
    results = [jax.vjp(Maps(stacked).apply, params, x) for stacked in (False, True)]
    (three, three_vjp), (one, one_vjp) = results
    chex.assert_trees_all_close((one, one_vjp(three)), (three, three_vjp(three)), atol=5e-6)


def test_attention_is_left_to_xla_where_cudnn_refuses_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with caplog.at_level("INFO", "vit_jax"):
        assert not attention.cudnn_takes.__wrapped__("bfloat16", 64)
    assert "attention by XLA: cuDNN refused heads of 64 in bfloat16" in caplog.text
    assert not attention.cudnn_takes.__wrapped__("float32", 64)
