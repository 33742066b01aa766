"""LiT's models: names, counts, the call convention, and both text towers against transformers."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.checkpoint.peers import randomise, torch_peer
from tests.models import small
from vit_jax.errors import UserError
from vit_jax.models import ARCHITECTURES, build, get_model
from vit_jax.models.bert import BertModel
from vit_jax.models.text import TextTransformer
from vit_jax.models.two_towers import TwoTowers, at_most, scores
from vit_jax.optimize import towers

COUNTS = {
    "LiT-B16B": 195_871_489,
    "LiT-B16B_2": 195_280_897,
    "LiT-L16L": 638_443_521,
    "LiT-L16S": 331_140_353,
    "LiT-L16Ti": 311_913_089,
}
IMAGE = {"hidden_size": 32, "patches": {"size": (8, 8)}, "transformer": small.ENCODER}
TEXT = {"width": 24, "num_layers": 2, "mlp_dim": 40, "num_heads": 3, "vocab_size": 30}
BERT = {"hidden_size": 24, "mlp_dim": 40, "num_layers": 2, "num_heads": 3}
TOKENS = np.array([[2, 7, 9, 4, 0, 0, 0], [2, 5, 0, 0, 0, 0, 0], [2, 3, 8, 6, 5, 1, 4]])


def jitted(model, params, *args, **kwargs):
    """`model.apply`, compiled: without, every little operation would be."""
    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(model.apply)({"params": params}, *args, **kwargs))


def random_params(model, *args, **kwargs):
    return small.random_values(jax.eval_shape(model.init, jax.random.key(0), *args, **kwargs)["params"])


def two_towers(**fields) -> TwoTowers:
    return TwoTowers(**{"image": IMAGE, "text": TEXT, "out_dim": (None, 32)} | fields)


def test_a_temperature_stops_at_its_limit_and_comes_back_from_it():
    limit = math.log(100.0)
    model = two_towers(temperature_max=100.0)
    for t, dy, gradient in ((limit + 1, 1, 1), (limit + 1, -1, 0), (limit - 1, -1, -1)):
        x = jnp.array([t])
        np.testing.assert_allclose(model.apply({"params": {"t": x}})[2]["t"], min(math.exp(t), 100.0), rtol=1e-5)
        np.testing.assert_array_equal(jax.vjp(lambda x: at_most(x, limit), x)[1](jnp.array([float(dy)]))[0], [gradient])


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    model = get_model(name)
    inputs = {"images": jnp.zeros((1, 224, 224, 3)), "tokens": jnp.zeros((1, 16), int)}
    params = jax.eval_shape(lambda key: model.init(key, **inputs), jax.random.key(0))["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == COUNTS[name]


def test_names():
    """As in the published files, whose attention kernels are (d, d) in BERT and (d, heads, d / heads) elsewhere."""
    shapes = {}
    for text in ({"text": TEXT}, {"text_model": "bert", "text": {"config": BERT, "vocab_size": 30}}):
        model = two_towers(**text, bias_init=-10.0)
        params = jax.eval_shape(
            lambda key, model=model: model.init(key, images=jnp.zeros((1, 16, 16, 3)), tokens=TOKENS), jax.random.key(0)
        )
        shapes |= {name: x.shape for name, x in flatten_dict(params["params"], sep="/").items()}
    attention = "txt/Encoder_0/encoderblock_1/MultiHeadDotProductAttention_1"
    bert, layer = "txt/BertEncoder_0", "txt/BertEncoder_0/encoder_block/layer_sequence/layers_1"
    expected = {
        "t": (1,),
        "b": (1,),
        "img/cls": (1, 1, 32),
        "img/Transformer/posembed_input/pos_embedding": (1, 5, 32),
        "txt/Embed_0/embedding": (30, 24),
        "txt/pos_embedding": (1, 7, 24),
        f"{attention}/query/kernel": (24, 3, 8),
        f"{attention}/out/kernel": (3, 8, 24),
        "txt/Encoder_0/encoderblock_0/MlpBlock_3/Dense_1/kernel": (40, 24),
        "txt/Encoder_0/encoder_norm/scale": (24,),
        "txt/head/kernel": (24, 32),
        f"{bert}/embedder/embedders_token_ids/embedding": (30, 24),
        f"{bert}/embedder/embedders_position_ids/embedding": (512, 24),
        f"{bert}/embedder/embedders_segment_ids/embedding": (2, 24),
        f"{bert}/layer_norm/scale": (24,),
        f"{layer}/attention_block/attention_layer/value/kernel": (24, 24),
        f"{layer}/attention_block/dense_layer/bias": (24,),
        f"{layer}/attention_block/layer_norm/bias": (24,),
        f"{layer}/mlp_block/mlp/dense_layer/kernel": (24, 40),
        f"{layer}/mlp_block/dense_layer/kernel": (40, 24),
        f"{layer}/mlp_block/layer_norm/scale": (24,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert not [name for name in shapes if name.startswith("img/head") or "posembed_input" in name and "txt" in name]


def test_the_layers_of_both_towers():
    """Layer decay and freezing tell an image tower from a text tower, and number the blocks of each."""
    for text in ({"text": TEXT}, {"text_model": "bert", "text": {"config": BERT, "vocab_size": 30}}):
        fields = {"image": IMAGE, **text, "out_dim": (None, 32)}
        num_layers = ARCHITECTURES["TwoTowers"].num_layers(fields)
        assert num_layers == {"img": 2, "txt": 2}
        params = jax.eval_shape(
            lambda key, fields=fields: build("TwoTowers", fields).init(key, images=jnp.zeros((1, 16, 16, 3)), tokens=TOKENS),
            jax.random.key(0),
        )["params"]
        behind = towers.layers_behind(list(flatten_dict(params, sep="/")), num_layers)
        assert {prefix: max(n for name, n in behind.items() if name.startswith(prefix)) for prefix in ("img/", "txt/")} == {
            "img/": 3,
            "txt/": 3,
        }
        assert behind["t"] == behind["txt/head/kernel"] == 0
        assert behind["img/Transformer/encoderblock_1/LayerNorm_0/scale"] == 1


def test_either_tower_alone_and_their_scores():
    model, images = two_towers(bias_init=-3.0), small.random_images(16, 16, batch=3)
    params = random_params(model, images=images, tokens=TOKENS)
    zimg, ztxt, out = jitted(model, params, images=images, tokens=TOKENS)
    assert zimg.shape == ztxt.shape == (3, 32)
    for z in (zimg, ztxt):
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(out["t"], np.exp(params["t"]), rtol=1e-6)
    np.testing.assert_allclose(scores(zimg, ztxt, out), out["t"] * zimg @ ztxt.T + params["b"], atol=1e-5)
    only = {name: params[name] for name in ("img", "t", "b")}
    alone, nothing, _ = jitted(model, only, images=images)
    assert nothing is None
    np.testing.assert_allclose(alone, zimg, atol=1e-6)
    cls = jax.jit(partial(model.apply, method="features"))({"params": only}, images)["cls"]
    np.testing.assert_allclose(cls / np.linalg.norm(cls, axis=1, keepdims=True), zimg, atol=1e-5)
    only = {name: params[name] for name in ("txt", "t", "b")}
    nothing, alone, _ = jitted(model, only, tokens=TOKENS)
    assert nothing is None
    np.testing.assert_allclose(alone, ztxt, atol=1e-6)


def test_fresh_scores():
    model = two_towers(temperature_init=10.0, bias_init=-10.0, text=TEXT | {"num_layers": 0})
    params = jax.jit(model.init)(jax.random.key(0), tokens=TOKENS)["params"]
    np.testing.assert_allclose([params["t"], params["b"]], [[math.log(10)], [-10]], rtol=1e-6)


@pytest.mark.usefixtures("optimised")
def test_bert_is_transformers():
    torch_peer("transformers")
    import torch
    import transformers

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 30}
    config = transformers.BertConfig(**sizes, hidden_act="gelu_new", max_position_embeddings=9)
    peer = randomise(transformers.BertModel(config, add_pooling_layer=False))
    theirs = {name: x.detach().numpy() for name, x in peer.state_dict().items()}
    model = BertModel(config=BERT, vocab_size=30, max_len=9)
    wanted = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    ours = {name: theirs[_in_transformers(name)] for name in flatten_dict(wanted, sep="/")}
    params = {name: x.T if name.endswith("kernel") else x for name, x in ours.items()}
    z = jitted(model, unflatten_dict(params, sep="/"), TOKENS)
    with torch.inference_mode():
        tokens = torch.from_numpy(TOKENS)
        expected = peer(tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0].numpy()
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(z, expected, atol=1e-5, rtol=0)


def _in_transformers(name: str) -> str:
    for ours, theirs in (
        ("BertEncoder_0/embedder/embedders_token_ids/embedding", "embeddings.word_embeddings.weight"),
        ("BertEncoder_0/embedder/embedders_position_ids/embedding", "embeddings.position_embeddings.weight"),
        ("BertEncoder_0/embedder/embedders_segment_ids/embedding", "embeddings.token_type_embeddings.weight"),
        ("BertEncoder_0/layer_norm", "embeddings.LayerNorm"),
        ("BertEncoder_0/encoder_block/layer_sequence/layers_", "encoder.layer."),
        ("attention_block/attention_layer", "attention.self"),
        ("attention_block/dense_layer", "attention.output.dense"),
        ("attention_block/layer_norm", "attention.output.LayerNorm"),
        ("mlp_block/mlp/dense_layer", "intermediate.dense"),
        ("mlp_block/dense_layer", "output.dense"),
        ("mlp_block/layer_norm", "output.LayerNorm"),
        ("/kernel", ".weight"),
        ("/scale", ".weight"),
        ("/", "."),
    ):
        name = name.replace(ours, theirs)
    return name


def test_whose_token_speaks_for_a_text():
    """Without positions a text is a set of tokens: whichever is asked for says what the last one would say in its place."""
    last, end = (TextTransformer(num_classes=None, **TEXT, pool=pool) for pool in ("last", "end"))
    params = random_params(last, TOKENS)
    params["pos_embedding"] = np.zeros_like(params["pos_embedding"])
    ends = TOKENS.argmax(axis=1)
    moved = np.stack([np.append(np.delete(row, n), row[n]) for row, n in zip(TOKENS, ends, strict=True)])
    z = jitted(last, params, moved)
    assert z.shape == (3, 24)
    np.testing.assert_allclose(jitted(end, params, TOKENS), z, atol=1e-5)
    assert np.abs(jitted(last, params, TOKENS) - z).max() > 0.1
    by_id = TextTransformer(num_classes=None, **TEXT, pool="end", end_token=9)
    np.testing.assert_allclose(jitted(by_id, params, TOKENS)[0], z[0], atol=1e-5)


def test_a_causal_tower_reads_to_the_end_of_a_text_alone():
    fields = TEXT | {"causal": True, "pool": "end", "end_token": 4, "activation": "quick_gelu"}
    model = TextTransformer(num_classes=None, **fields)
    params = random_params(model, TOKENS)
    z = jitted(model, params, TOKENS)
    behind, before = TOKENS.copy(), TOKENS.copy()
    behind[0, 4:], before[0, 0] = 8, 8
    np.testing.assert_array_equal(jitted(model, params, behind), z)
    assert np.abs(jitted(model, params, before)[0] - z[0]).max() > 0.1
    looped = TextTransformer(num_classes=None, **fields, scan=True, remat="full")
    np.testing.assert_allclose(jitted(looped, params, TOKENS), z, atol=1e-5)


def test_errors():
    model = two_towers(out_dim=(None, 16))
    inputs = {"images": jnp.zeros((1, 16, 16, 3)), "tokens": TOKENS[:1]}
    with pytest.raises(UserError, match="images become 32 numbers, texts 16"):
        jax.eval_shape(lambda key: model.init(key, **inputs), jax.random.key(0))
    text = TextTransformer(num_classes=8, **TEXT, max_len=5)
    with pytest.raises(UserError, match="a text of 7 tokens is too long for this model, which reads 5"):
        jax.eval_shape(text.init, jax.random.key(0), TOKENS)
    bert = BertModel(config="bas")
    with pytest.raises(UserError, match="unknown config of BERT 'bas': did you mean base"):
        jax.eval_shape(bert.init, jax.random.key(0), TOKENS)
    wrong = two_towers(text_model="berd")
    with pytest.raises(UserError, match="unknown text_model 'berd': did you mean bert"):
        jax.eval_shape(lambda key: wrong.init(key, **inputs), jax.random.key(0))
    for fields, message in (
        ({"image": IMAGE | {"pach": 1}}, "unknown field of model 'pach'"),
        ({"text": TEXT | {"widht": 1}}, "unknown field of model.text 'widht': did you mean width"),
        ({"image": IMAGE | {"classifier": "tokn"}}, "unknown classifier 'tokn'"),
        ({"text_model": "berd"}, "unknown text_model 'berd'"),
    ):
        with pytest.raises(UserError, match=message):
            build("TwoTowers", {"image": IMAGE, "text": TEXT} | fields)


@pytest.mark.parametrize("text", [{"text": TEXT}, {"text_model": "bert", "text": {"config": BERT, "vocab_size": 30}}])
def test_remat_and_scan_reach_both_towers_and_change_no_number(text):
    fields = {"image": IMAGE, **text, "out_dim": (None, 32)}
    images = np.random.default_rng(0).normal(size=(len(TOKENS), 16, 16, 3)).astype(np.float32)
    params = random_params(build("TwoTowers", fields), images=images, tokens=TOKENS)

    def gradient(**memory):
        model = build("TwoTowers", {**fields, **memory})

        def loss(params):
            zimg, ztxt, _ = model.apply({"params": params}, images=images, tokens=TOKENS, train=True)
            return ((zimg @ ztxt.T) ** 2).sum()

        quick = {"xla_backend_optimization_level": 0}
        return str(jax.make_jaxpr(loss)(params)), jax.jit(jax.grad(loss), compiler_options=quick)(params)

    program, plain = gradient()
    assert program.count("remat") == 0
    for memory in ({"remat": "full"}, {"remat": "full", "scan": True})[: 1 if "text_model" in text else 2]:
        program, found = gradient(**memory)
        assert program.count("scan[") == (2 if "scan" in memory else 0)
        assert program.count("remat") >= (2 if "scan" in memory else 4)
        chex.assert_trees_all_close(found, plain, atol=2e-6)
    if "text_model" in text:
        with pytest.raises(UserError, match="config.scan=True is not for a text tower of BERT"):
            build("TwoTowers", {**fields, "scan": True})
