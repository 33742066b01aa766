"""Every named architecture against the published table, parameter names and shapes, and what get_model refuses."""

from functools import partial

import jax
import pytest

from tests.models import small
from vit_jax.models import ARCHITECTURES, build, get_model, zoo
from vit_jax.models.classifier_head import ClassifierHead
from vit_jax.models.layers import Encoder

VIT = {  # name: parameters at 224 px and 1,000 classes, heads (which leave no trace in the count), dropout
    "testing": (21_390, 2, 0.1),
    "testing-unpooled": (21_370, 2, 0.1),
    "ViT-Ti_16": (5_717_416, 3, 0.0),
    "ViT-S_16": (22_050_664, 6, 0.0),
    "ViT-B_16": (86_567_656, 12, 0.0),
    "ViT-L_16": (304_326_632, 16, 0.1),
    "ViT-H_14": (632_045_800, 16, 0.1),
    "ViT-B_8": (86_576_872, 12, 0.0),
    "ViT-S_32": (22_878_952, 6, 0.0),
    "ViT-B_32": (88_224_232, 12, 0.0),
    "ViT-L_32": (306_535_400, 16, 0.0),
    "ViT-S_16-gap-norep": (22_049_896, 6, 0.0),
    "ViT-B_16-gap-norep": (86_566_120, 12, 0.0),
    "ViT-S_32-gap-norep": (22_878_184, 6, 0.0),
    "ViT-B_32-gap-norep": (88_222_696, 12, 0.0),
    "R+ViT-Ti_16": (6_337_704, 3, 0.0),
    "R50+ViT-B_16": (98_659_112, 12, 0.1),
    "R26+ViT-B_32": (101_383_976, 12, 0.0),
    "R26+ViT-S_32": (36_431_912, 6, 0.0),
    "R50+ViT-L_32": (328_994_856, 16, 0.1),
}
MIXER = {"Mixer-B_16": 59_880_472, "Mixer-B_32": 60_293_428, "Mixer-L_16": 208_196_168}


def image_of(*size):
    return jax.ShapeDtypeStruct((1, *size, 3), "float32")


def count(model, size=224):
    return sum(leaf.size for leaf in jax.tree.leaves(small.shapes(model, image_of(size, size))))


def names_and_shapes(model, *size):
    return {name: leaf.shape for name, leaf in small.flat(small.shapes(model, image_of(*size))).items()}


@pytest.mark.parametrize("name", VIT)
def test_vit_has_the_published_count_heads_and_dropout(name):
    model = get_model(name)
    rates = model.transformer["dropout_rate"], model.transformer["attention_dropout_rate"]
    assert (count(model), model.transformer["num_heads"], rates) == (*VIT[name][:2], (VIT[name][2], 0.0))


@pytest.mark.parametrize("name", MIXER)
def test_mixer_has_the_published_count(name):
    assert count(get_model(name)) == MIXER[name]


def test_the_table_holds_every_published_name():
    assert {*VIT, *MIXER} <= {*zoo.VIT, *zoo.MIXER} and len({*VIT, *MIXER}) == 23
    assert {zoo.augreg_to_model_name(name) for name in zoo.AUGREG} <= {*VIT}


def test_position_embeddings_grow_with_the_image():
    assert count(get_model("ViT-B_16"), size=384) == 86_859_496


def test_encoder_drops_a_tenth_unless_told_otherwise():
    encoder = Encoder(num_layers=1, mlp_dim=4, num_heads=1)
    assert (encoder.dropout_rate, encoder.attention_dropout_rate) == (0.1, 0.1)


def dense(name, inputs, outputs):
    return {f"{name}/kernel": (*inputs, *outputs), f"{name}/bias": outputs}


def norm(name, width):
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def vit_layout(tokens, patch, *, d=32, mlp=48, heads=4, layers=2, classes=7):
    layout = {"cls": (1, 1, d), "Transformer/posembed_input/pos_embedding": (1, tokens, d)}
    layout |= dense("embedding", patch, (d,)) | norm("Transformer/encoder_norm", d) | dense("head", (d,), (classes,))
    for i in range(layers):
        block = f"Transformer/encoderblock_{i}"
        for part in ("query", "key", "value"):
            layout |= dense(f"{block}/MultiHeadDotProductAttention_1/{part}", (d,), (heads, d // heads))
        layout |= dense(f"{block}/MultiHeadDotProductAttention_1/out", (heads, d // heads), (d,))
        layout |= dense(f"{block}/MlpBlock_3/Dense_0", (d,), (mlp,))
        layout |= dense(f"{block}/MlpBlock_3/Dense_1", (mlp,), (d,))
        layout |= norm(f"{block}/LayerNorm_0", d) | norm(f"{block}/LayerNorm_2", d)
    return layout


def test_vit_layout_is_the_published_one():
    layout = vit_layout(16, (8, 8, 3))
    assert names_and_shapes(small.vit(), 40, 24) == layout
    with_representation = layout | dense("pre_logits", (32,), (20,)) | dense("head", (20,), (7,))
    assert names_and_shapes(small.vit(representation_size=20), 40, 24) == with_representation
    gap = {**layout, "Transformer/posembed_input/pos_embedding": (1, 15, 32)}
    del gap["cls"]
    assert names_and_shapes(small.vit(classifier="gap"), 40, 24) == gap


def test_hybrid_layout_is_the_published_one():
    model = small.hybrid(resnet={"num_layers": (2, 1)}, patches={"size": (1, 1)})
    layout = vit_layout(1 + 5 * 3, (1, 1, 512))
    layout |= {"conv_root/kernel": (7, 7, 3, 64)} | norm("gn_root", 64)
    for unit, inputs, width in (("block1/unit1", 64, 64), ("block1/unit2", 256, 64), ("block2/unit1", 256, 128)):
        kernels = {"1": (1, 1, inputs, width), "2": (3, 3, width, width), "3": (1, 1, width, 4 * width)}
        if inputs != 4 * width:
            kernels["_proj"] = (1, 1, inputs, 4 * width)
        for suffix, kernel in kernels.items():
            layout |= {f"{unit}/conv{suffix}/kernel": kernel} | norm(f"{unit}/gn{suffix}", kernel[-1])
    assert names_and_shapes(model, 40, 24) == layout


def test_mixer_layout_is_the_published_one():
    layout = dense("stem", (8, 8, 3), (32,)) | norm("pre_head_layer_norm", 32) | dense("head", (32,), (7,))
    for i in range(2):
        for mixing, width, mlp in (("token_mixing", 15, 24), ("channel_mixing", 32, 48)):
            block = f"MixerBlock_{i}/{mixing}"
            layout |= dense(f"{block}/Dense_0", (width,), (mlp,)) | dense(f"{block}/Dense_1", (mlp,), (width,))
        layout |= norm(f"MixerBlock_{i}/LayerNorm_0", 32) | norm(f"MixerBlock_{i}/LayerNorm_1", 32)
    assert names_and_shapes(small.mixer(), 40, 24) == layout


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_a_hybrid_has_the_widths_of_the_reference_for_any_factor(factor):
    """int(64 * factor) channels after the stem, and the map's grid."""
    model = small.hybrid(resnet={"num_layers": (1, 2), "width_factor": factor}, patches={"size": (1, 1)})
    shapes, width = names_and_shapes(model, 40, 24), int(64 * factor)
    assert shapes["conv_root/kernel"] == (7, 7, 3, width)
    assert shapes["block1/unit1/conv_proj/kernel"] == (1, 1, width, 4 * width)
    assert shapes["block2/unit2/conv2/kernel"] == (3, 3, 2 * width, 2 * width)
    assert shapes["embedding/kernel"] == (1, 1, 8 * width, 32)


@pytest.mark.parametrize("kind", small.MODELS)
@pytest.mark.parametrize("size", [(64, 64), (79, 41)])
def test_an_architecture_knows_the_grid_and_the_place_of_every_parameter(kind, size):
    model = small.MODELS[kind]()
    architecture = ARCHITECTURES["Mixer" if kind == "mixer" else "ViT"]
    fields = {name: getattr(model, name) for name in architecture.cls.__dataclass_fields__}
    outputs, variables = jax.eval_shape(partial(model.init_with_output, method="features"), jax.random.key(0), image_of(*size))
    assert architecture.grid(fields, size) == outputs["map"].shape[1:3]
    assert (architecture.cut(fields) is None) == (kind != "vit")
    assert architecture.num_layers(fields) == 2
    names = list(small.flat(variables["params"])) + list(names_and_shapes(model, *size))
    assert {architecture.layer_of(name, 2) for name in names} == {0, 1, 2, 3}


def test_override_replaces_a_field_and_merges_nested_ones():
    model = get_model("R50+ViT-B_16", num_classes=10, transformer={"dropout_rate": 0.3}, resnet={"width_factor": 2})
    assert model.num_classes == 10 and model.hidden_size == 768
    assert model.transformer == zoo.VIT["R50+ViT-B_16"]["transformer"] | {"dropout_rate": 0.3}
    assert dict(model.resnet) == {"num_layers": (3, 4, 9), "width_factor": 2}
    assert get_model("R50+ViT-B_16").transformer["dropout_rate"] == 0.1, "the table itself must not change"
    assert get_model("ViT-B_16", resnet={"num_layers": (1,)}).resnet == {"num_layers": (1,)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_model("ViT-B16"), "unknown model 'ViT-B16'.*ViT-B_16"),
        (lambda: get_model("mixer-b_16"), "unknown model.*Mixer-B_16"),
        (lambda: get_model("ResNet"), "unknown model 'ResNet'"),
        (lambda: get_model("ViT-B_16", hiden_size=3), "unknown field of model 'hiden_size'.*hidden_size"),
        (lambda: build("ViT", zoo.VIT["testing"] | {"name": "x"}), "unknown field of model 'name'"),
        (lambda: get_model("ViT-B_16", transformer={"dropout": 1}), "model.transformer 'dropout'.*dropout_rate"),
        (lambda: get_model("R26+ViT-S_32", resnet={"width": 2}), "unknown field of model.resnet 'width'.*width_factor"),
        (lambda: get_model("Mixer-B_16", classifier="gap"), "unknown field of model 'classifier'"),
        (lambda: get_model("ViT-B_16", classifier="tokens"), "unknown classifier 'tokens'.*token"),
        (lambda: get_model("ViT-B_16", transformer={"remat": "dot"}), "unknown remat 'dot'.*dots"),
        (lambda: get_model("Mixer-B_16", remat="all"), "unknown remat 'all'.*full"),
        (lambda: get_model("ViT-B_16", transformer={"stochastic_depth_mode": "sub"}), "stochastic_depth_mode.*subset"),
        (lambda: count(small.vit(transformer={"stochastic_depth": 1.0})), "stochastic_depth=1.0 must be"),
        (lambda: count(small.mixer(stochastic_depth=-0.1)), "stochastic_depth=-0.1 must be"),
        (
            lambda: count(small.vit(transformer={"stochastic_depth": 0.1, "stochastic_depth_mode": "subset", "scan": True})),
            "turn scan off, or use 'mask'",
        ),
        (lambda: build("Vit", {}), "unknown model_type 'Vit'.*ViT"),
        (lambda: build("Mixer", {"num_blocks": 2}), "lacks patches, hidden_dim, tokens_mlp_dim, channels_mlp_dim"),
        (lambda: get_model("ViT-B_16", resnet={"width_factor": 2}), "model.resnet lacks num_layers"),
        (
            lambda: count(small.hybrid(resnet={"num_layers": (1,), "width_factor": 0.4})),
            "width_factor=0.4 makes 25 channels, which must be a multiple of 32",
        ),
        (lambda: ClassifierHead(7, classifier="max").init(jax.random.key(0), image_of(4)), "unknown classifier 'max'"),
        (lambda: count(small.vit(transformer={"num_heads": 5})), "32 cannot be shared out to 5 heads"),
        (lambda: count(small.vit(), size=7), "7x7 holds no patch of 8x8"),
    ],
)
def test_a_mistake_is_named_with_what_was_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
