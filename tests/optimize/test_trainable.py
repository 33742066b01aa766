"""Freezing and LoRA: what is trained, what stays bit for bit, and that A·B is the change of the layer's own linear map."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tests.models import small
from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models import attention, linear
from vit_jax.optimize import trainable

IMAGES = small.random_images(16, 16)
ATTENTION = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
MLP = "Transformer/encoderblock_1/MlpBlock_3"
# (inputs, outputs) as matrices, by hand from the models' documented kernels
SIDES = {
    "vit": {
        f"{ATTENTION}/query": ((32,), (4, 8)),
        f"{ATTENTION}/key": ((32,), (4, 8)),
        f"{ATTENTION}/value": ((32,), (4, 8)),
        f"{ATTENTION}/out": ((4, 8), (32,)),
        f"{MLP}/Dense_0": ((32,), (48,)),
        f"{MLP}/Dense_1": ((48,), (32,)),
        "embedding": ((8, 8, 3), (32,)),
        "head": ((32,), (7,)),
    },
    "hybrid": {"conv_root": ((7, 7, 3), (64,)), "block1/unit1/conv2": ((3, 3, 64), (64,))},
    "mixer": {"MixerBlock_1/token_mixing/Dense_0": ((4,), (24,)), "stem": ((8, 8, 3), (32,))},
}


def drawn(tree, seed=3):
    """The tree with normal numbers in place of its own."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def base():
    return small.random_params(small.vit(), IMAGES)


@pytest.mark.parametrize(
    ("train", "freeze", "expected"),
    [
        (["head/.*"], [], lambda name: name in ("head/kernel", "head/bias")),
        ([".*"], ["embedding/.*", ".*/encoderblock_0/.*"], lambda name: "embedding/" not in name and "block_0/" not in name),
        ([".*/kernel"], ["head/.*"], lambda name: name.endswith("/kernel") and not name.startswith("head")),
        (["cls", "head/bias"], [], lambda name: name in ("cls", "head/bias")),
    ],
)
def test_patterns_match_whole_names_and_freezing_wins(base, train, freeze, expected):
    shapes = jax.eval_shape(lambda: base)
    trained, frozen = trainable.split(base, train=train, freeze=freeze)
    names = {name for name in small.flat(base) if expected(name)}
    assert set(small.flat(trained)) == names
    assert set(small.flat(frozen)) == set(small.flat(base)) - names
    assert trainable.join(trained, frozen) == base
    assert trainable.join(*trainable.split(shapes, train=train, freeze=freeze)) == shapes


def test_nothing_frozen_is_the_tree_itself(base):
    trained, frozen = trainable.split(base)
    assert (trained, frozen) == (base, {})
    assert trainable.join(base, None) is base and trainable.join(base, {}) is base


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"train": ["hed/kernel"]}, "head/kernel"),
        ({"freeze": ["Transformer/encoderblock_7/LayerNorm_0/scale"]}, r"Transformer/encoderblock_\.\*/LayerNorm_0/scale"),
        ({"train": ["head/(kernel"]}, "regular expression"),
        ({"train": ["head/.*"], "freeze": ["head.*"]}, "nothing is left to train"),
        ({"train": []}, "nothing is left to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(base, patterns, message):
    with pytest.raises(UserError, match=message):
        trainable.split(base, **patterns)


@pytest.mark.parametrize("kind", SIDES)
def test_a_and_b_are_the_sides_of_each_kernels_linear_map(kind):
    model = small.MODELS[kind]()
    params = small.shapes(model, small.random_images(32 if kind == "hybrid" else 16, 32 if kind == "hybrid" else 16))
    targets = [f"{name}/kernel" for name in SIDES[kind]]
    add = functools.partial(trainable.add_lora, rank=3, alpha=6, targets=targets, train=[".*/bias"])
    trained, frozen = jax.eval_shape(add, params, jax.random.key(0))
    lora = small.flat(trained.pop("lora"))
    expected = {f"{name}/a": (*inputs, 3) for name, (inputs, _) in SIDES[kind].items()}
    expected |= {f"{name}/b": (3, *outputs) for name, (_, outputs) in SIDES[kind].items()}
    assert {name: x.shape for name, x in lora.items()} == expected
    assert set(small.flat(trained)) == {name for name in small.flat(params) if name.endswith("/bias")}
    assert set(small.flat(frozen)) - {"lora/scale"} == set(small.flat(params)) - set(small.flat(trained))


def test_the_model_starts_as_it_was_and_a_is_uniform_as_in_torchs_linear(base):
    trained, frozen = trainable.add_lora(base, jax.random.key(0), rank=8, alpha=16, targets=[".*/Dense_.*/kernel"])
    joined = jax.jit(trainable.join)(trained, frozen)
    assert all(map(np.array_equal, jax.tree.leaves(joined), jax.tree.leaves(base)))
    lora = small.flat(trained["lora"])
    for layer, inputs in (("Dense_0", 32), ("Dense_1", 48)):
        a = np.concatenate([np.ravel(x) for name, x in lora.items() if name.endswith(f"{layer}/a")])
        assert len(np.unique(a)) == a.size  # each kernel draws its own
        np.testing.assert_allclose([a.min(), a.max()], [-(inputs**-0.5), inputs**-0.5], rtol=0.03)
        np.testing.assert_allclose(a.var(), 1 / (3 * inputs), rtol=0.1)


def unmerged(model, params, lora, factor, images):
    """Logits where each changed layer adds factor · (x·A)·B to its own output."""

    def change(path, x):
        a, b = lora[f"{path}/a"], lora[f"{path}/b"]
        return factor * jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1)

    def add(layer, args, kwargs, context):
        y = layer(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.method_name != "__call__" or f"{path}/a" not in lora:
            return y
        x = args[0]
        if getattr(context.module, "activation", None):
            x = linear.activate(x, context.module.activation)
        if path == "embedding":
            x = x.reshape(len(x), x.shape[1] // 8, 8, x.shape[2] // 8, 8, 3).swapaxes(2, 3)
        return y + change(path, x)

    def project(x, maps):
        """Queries, keys and values are one product of three layers, which are not called by themselves."""
        outputs, paths = attention_project(x, maps), ["/".join(f.path) for f in maps]
        return tuple(y + change(path, x) if f"{path}/a" in lora else y for y, path in zip(outputs, paths, strict=True))

    attention_project = attention.project
    patch = mock.patch.object(attention, "project", project)
    with nn.intercept_methods(add), patch, jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(model.apply)({"params": params}, images))


def test_merged_and_unmerged_logits_agree(base):
    model = small.vit()
    trained, frozen = trainable.add_lora(
        base, jax.random.key(1), rank=4, alpha=2.5, targets=[".*kernel"], train=[".*/bias", "cls"]
    )
    trained["lora"] = jax.tree.map(lambda x: 0.3 * x, drawn(trained["lora"]))
    expected = unmerged(model, base, small.flat(trained["lora"]), 2.5 / 4, IMAGES)
    merged, joined = trainable.merge(trained, frozen), jax.jit(trainable.join)(trained, frozen)
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in jax.tree.leaves(merged))
    for params in (merged, joined):
        logits = small.apply(model, params, IMAGES)
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    assert np.abs(expected - small.apply(model, base, IMAGES)).max() > 0.1


@pytest.mark.parametrize(
    "divide",
    [
        lambda base: trainable.split(base, freeze=["embedding/.*", ".*/encoderblock_0/.*"]),
        lambda base: trainable.add_lora(base, jax.random.key(0), rank=2, alpha=4),
    ],
    ids=["split", "LoRA"],
)
def test_frozen_parameters_stay_bit_for_bit_and_have_no_optimiser_state(base, divide):
    model = small.vit()
    trained, frozen = divide(jax.tree.map(jnp.asarray, base))
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    state = optimizer.init(trained)
    count = sum(x.size for x in jax.tree.leaves(trained))
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * count

    def loss(trained):
        return model.apply({"params": trainable.join(trained, frozen)}, IMAGES)[:, 0].mean()

    @jax.jit
    def step(trained, state):
        updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    before = small.flat(trained)
    for _ in range(3):
        trained, state = step(trained, state)
    after, original = small.flat(trainable.merge(trained, frozen)), small.flat(base)
    targets = {name for name in original if name.endswith(("query/kernel", "value/kernel"))} if "lora" in trained else set()
    for name, x in small.flat(frozen).items():
        if name not in targets | {"lora/scale"}:
            assert after[name].tobytes() == np.asarray(x).tobytes() == original[name].tobytes()
    own = small.flat(trained)
    assert all(np.any(own[name] != before[name]) for name in own)
    assert all(np.any(after[name] != original[name]) for name in targets)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": [".*/qery/kernel"]}, r"did you mean \.\*/query/kernel"),
        ({"targets": [".*/query/.*"]}, "query/bias: let the pattern end with /kernel"),
        ({"targets": [".*/LayerNorm_0/scale"]}, "LayerNorm_0/scale: let the pattern"),
        ({"targets": []}, "no targets"),
        ({"targets": ["head/kernel"]}, "head/kernel cannot both"),
        ({"train": ["hed/kernel"]}, "did you mean head/kernel"),
        ({"rank": 33}, "at most 32"),
        ({"rank": 8, "targets": ["head/kernel"], "train": ["head/bias"]}, "at most 7"),
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
    ],
)
def test_lora_that_cannot_be_meant_is_refused(base, fields, message):
    with pytest.raises(UserError, match=message):
        trainable.add_lora(base, jax.random.key(0), **{"rank": 2, "alpha": 4} | fields)


def test_counts_of_a_vit_b16():
    model = models.get_model("ViT-B_16", num_classes=10)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    total, head = 85_798_656 + 7_690, 7_690
    lora = jax.eval_shape(functools.partial(trainable.add_lora, rank=8, alpha=16), params, jax.random.key(0))
    first, second = trainable.describe(*lora).splitlines()
    share = (294_912 + head) / total  # 24 kernels of 768 x 768: 24 · 2 · 768 · 8
    assert f"{294_912 + head:,} parameters are trained, {share:.2%} of the model's {total:,}" in first
    assert "LoRA of rank 8 on 24 kernels has 294,912" in first
    assert second == "Adam's two moments in float32 take 2.4 MB instead of 686.5 MB"
    frozen_backbone = trainable.describe(*trainable.split(params, train=["head/.*"]))
    assert frozen_backbone.startswith(f"7,690 parameters are trained, 0.01% of the model's {total:,}\n")
    assert trainable.describe(params).startswith(f"{total:,} parameters are trained, 100.00% of")
