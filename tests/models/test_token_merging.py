"""Token merging against the paper's method, written here in plain NumPy and float64, one token at a time."""

import jax
import numpy as np
import pytest

from tests.models import numpy_peer, small
from vit_jax.errors import UserError
from vit_jax.models import get_model, token_merging
from vit_jax.models.two_towers import TwoTowers

SIZE = (29, 40)  # 3 x 5 patches, or 4 x 5 of a hybrid's map
DISTILLED = {"classifier": "distilled", "num_registers": 2}


def merged(x, sizes, keys, protected, r):
    """(tokens, sizes, members): `members` are the places of the tokens that each has come from."""
    n = len(x)
    r = min(r, (n - protected) // 2)
    first = [i for i in range(0, n, 2) if i >= protected]
    second = [i for i in range(1, n, 2) if i >= protected]

    def cosine(i, j):
        return keys[i] @ keys[j] / np.linalg.norm(keys[i]) / np.linalg.norm(keys[j])

    partner = {i: max(second, key=lambda j: cosine(i, j)) for i in first} if r else {}
    joins = sorted(partner, key=lambda i: -cosine(i, partner[i]))[:r]
    groups = [[i] for i in range(protected)] + [[i] for i in first if i not in joins]
    groups += [[j, *(i for i in joins if partner[i] == j)] for j in second]
    total = [sum(sizes[i] for i in group) for group in groups]
    tokens = [sum(sizes[i] * x[i] for i in group) / s for group, s in zip(groups, total, strict=True)]
    return np.array(tokens), np.array(total), groups


def attend(params, x, sizes, queries=None):
    """(what attention adds, the mean of its keys over heads) of one image's tokens."""
    y, means = params["out"]["bias"], 0
    for k in range(params["query"]["kernel"].shape[1]):
        inputs = {"query": x if queries is None else queries, "key": x, "value": x}
        q, key, value = (inputs[n] @ params[n]["kernel"][:, k] + params[n]["bias"][k] for n in inputs)
        weights = sizes * np.exp(q @ key.T / np.sqrt(key.shape[1]))
        y = y + weights / weights.sum(-1, keepdims=True) @ value @ params["out"]["kernel"][k]
        means = means + key
    return y, means


def forward(params, images, classifier, r):
    """Logits, and of the first image the members of every token behind the last block."""
    x = numpy_peer.resnet(params, images) if "conv_root" in params else np.float64(images)
    x = numpy_peer.patches(params["embedding"], x, "VALID")
    x = np.concatenate([*(np.tile(params[n], (len(x), 1, 1)) for n in ("cls", "dist") if n in params), x], axis=1)
    x = x + params["Transformer"]["posembed_input"]["pos_embedding"]
    prefix = sum(n in params for n in ("cls", "dist"))
    if "register_tokens" in params:
        registers = np.tile(params["register_tokens"], (len(x), 1, 1))
        x, prefix = np.concatenate([x[:, :prefix], registers, x[:, prefix:]], axis=1), prefix + registers.shape[1]
    found = [one_image(params, tokens, prefix, classifier, r) for tokens in x]
    return np.stack([logits for logits, _ in found]), found[0][1]


def one_image(params, x, prefix, classifier, r):
    sizes, members = np.ones(len(x)), [[i] for i in range(len(x))]
    for i in range(numpy_peer.count(params["Transformer"], "encoderblock_")):
        block = params["Transformer"][f"encoderblock_{i}"]
        y, keys = attend(block["MultiHeadDotProductAttention_1"], numpy_peer.layer_norm(block["LayerNorm_0"], x), sizes)
        x, sizes, groups = merged(x + y, sizes, keys, prefix, r)
        members = [sum((members[i] for i in group), []) for group in groups]
        x = x + numpy_peer.mlp(block["MlpBlock_3"], numpy_peer.layer_norm(block["LayerNorm_2"], x))
    x = numpy_peer.layer_norm(params["Transformer"]["encoder_norm"], x)
    if classifier == "distilled":
        return (numpy_peer.dense(params["head"], x[0]) + numpy_peer.dense(params["head_dist"], x[1])) / 2, members
    if classifier == "gap":
        x = np.average(x[prefix:], axis=0, weights=sizes[prefix:])
    elif classifier == "map":
        head = params["MAPHead_0"]
        y, _ = attend(head["MultiHeadDotProductAttention_0"], x, sizes, queries=params["MAPHead_0"]["probe"][0])
        x = (y + numpy_peer.mlp(head["MlpBlock_0"], numpy_peer.layer_norm(head["LayerNorm_0"], y)))[0]
    else:
        x = x[0]
    return numpy_peer.dense(params["head"], x), members


FAST = {"xla_backend_optimization_level": 0}  # to compile takes longer than to run


@pytest.mark.parametrize("n, protected, r", [(2, 1, 1), (7, 0, 2), (7, 1, 3), (8, 1, 9), (7, 2, 1), (8, 5, 3), (1, 1, 4)])
def test_a_merge_is_the_papers(n, protected, r):
    rng = np.random.default_rng(n)
    x, keys = rng.normal(size=(2, n + protected, 6))
    sizes = rng.integers(1, 5, n + protected).astype(float)
    merge = jax.jit(token_merging.merge, static_argnums=(3, 4), compiler_options=FAST)
    found, total, place = merge(x.astype("f"), sizes.astype("f"), keys.astype("f"), protected, r)
    tokens, expected_sizes, groups = merged(x, sizes, keys, protected, r)
    assert len(tokens) == n + protected - min(r, n // 2)
    np.testing.assert_allclose(found, tokens, atol=1e-6)
    np.testing.assert_array_equal(total, expected_sizes)
    assert [sorted(np.flatnonzero(place == i)) for i in range(len(groups))] == [sorted(group) for group in groups]


MODELS = {
    "token": (small.vit(), 3),
    "token, all": (small.vit(), 99),
    "map": (small.vit(classifier="map"), 2),
    "distilled": (small.vit(**DISTILLED), 2),
    "hybrid": (small.hybrid(), 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_as_the_paper_says(name):
    (model, r), images = MODELS[name], small.random_images(*SIZE)
    params = small.random_params(model, images)
    expected, members = forward(params, images, model.classifier, r)

    def compute(params, images):  # the logits, and the patches by place behind the last block
        features = model.apply({"params": params}, images, method="features")
        return model.apply({"params": params}, images), features["layers"][-1], features["map"].shape

    with token_merging.merging(r), jax.default_matmul_precision("highest"):
        logits, last, (_, h, w, _) = jax.jit(compute, compiler_options=FAST)(params, images)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    tokens = np.asarray(last)[0]
    for group in members:  # patches that are one token
        np.testing.assert_array_equal(tokens[group], tokens[group[:1]].repeat(len(group), axis=0))
    assert len(np.unique(tokens, axis=0)) == len(members) < len(tokens)
    assert h * w in (15, 20)


def test_nothing_changes_without_it():
    """Neither with r = 0, nor before or behind the context."""
    model, images = small.vit(), small.random_images(*SIZE)
    params = small.random_params(model, images)

    def program():
        return jax.jit(model.apply).lower({"params": params}, images).as_text()

    before = program()
    with token_merging.merging(0):
        assert program() == before
    with token_merging.merging(2):
        assert program() != before
    assert program() == before
    with pytest.raises(ZeroDivisionError), token_merging.merging(2):
        raise ZeroDivisionError
    assert program() == before


def test_texts_keep_their_tokens():
    image = {"patches": {"size": (8, 8)}, "hidden_size": 32, "transformer": small.ENCODER, "classifier": "token"}
    text = {"width": 32, "num_layers": 1, "mlp_dim": 48, "num_heads": 4, "vocab_size": 11}
    model = TwoTowers(image=image, text=text, text_model="text_transformer", out_dim=(None, 32))
    images, tokens = small.random_images(24, 24), np.arange(10).reshape(2, 5)
    init = jax.eval_shape(lambda: model.init(jax.random.key(0), images=images, tokens=tokens))["params"]
    params = small.random_values(init)

    def run(r):
        with token_merging.merging(r):
            embed = jax.jit(lambda p: model.apply({"params": p}, images=images, tokens=tokens)[:2], compiler_options=FAST)
            return embed(params)

    (zimg, ztxt), (merged_zimg, merged_ztxt) = run(0), run(2)
    np.testing.assert_array_equal(ztxt, merged_ztxt)
    assert np.abs(zimg - merged_zimg).max() > 1e-3


@pytest.mark.parametrize(
    "model, r, message",
    [
        (small.vit(), -1, "tome=-1 must be how many tokens"),
        (small.vit(), 1.5, "tome=1.5 must be"),
        (small.mixer(), 4, "tome=4 does not go with a MlpMixer"),
        (get_model("YOLOS-Ti"), 4, "tome=4 does not go with a"),
        (small.vit(transformer={"rope_theta": 100.0}), 4, "rotary positions"),
        (small.vit(transformer={"attention": "window"}), 4, "in windows"),
    ],
)
def test_what_cannot_merge_is_refused(model, r, message):
    with pytest.raises(UserError, match=message):
        token_merging.check(model, r)
    token_merging.check(model, 0)
