"""What a ViT looks at: weights against NumPy and transformers, rollout and relevance against NumPy and torch's autograd."""

import jax
import numpy as np
import pytest

from tests.checkpoint import peers
from tests.models import small
from vit_jax import checkpoint, models
from vit_jax.errors import UserError
from vit_jax.models import attention_maps
from vit_jax.models.captioner import Captioner
from vit_jax.models.two_towers import TwoTowers

VARIANTS = {
    "token": small.vit(),
    "gap": small.vit(classifier="gap"),
    "map": small.vit(classifier="map"),
    "dinov2": small.vit(classifier="cls_mean", num_registers=3, transformer={"layer_scale": True, "activation": "gelu"}),
    "distilled": small.vit(classifier="distilled", num_registers=1),
    "hybrid": small.hybrid(),
    "sigmoid": small.vit(transformer=small.ATTENTIONS["sigmoid"]),
    "window": small.vit(num_registers=1, transformer={"attention": "window", "window_size": 2, "global_blocks": (1,)}),
    "q/k norm, scan, remat": small.vit(transformer={"qk_norm": True, "scan": True, "remat": "full"}),
}
SIZE = (29, 20)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """(model, parameters, images, the attention to them)."""
    model, images = VARIANTS[request.param], small.random_images(*SIZE)
    params = small.random_params(model, images)
    return model, params, images, run(attention_maps.attention, model, params, images)


def run(function, model, params, images, **kwargs):
    """The results of a function of a model, compiled without optimisation, which would take longer than it saves."""
    fast = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(lambda p, x: function(model, p, x, **kwargs), compiler_options=fast)
    with jax.default_matmul_precision("highest"):
        return jax.device_get(compiled(params, images))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def explicit(params, x, queries=None, *, kind="softmax", seen=True):
    """(b, k, n, m) from the inputs of an attention, in NumPy and float64; `seen` says which tokens see which."""
    x = {"query": np.float64(x if queries is None else queries), "key": np.float64(x)}
    q, k = (np.einsum("bnd,dkh->bknh", x[n], params[n]["kernel"]) + params[n]["bias"][:, None] for n in x)
    if "query_ln" in params:
        q, k = (normed(x) * params[n]["scale"] + params[n]["bias"] for n, x in (("query_ln", q), ("key_ln", k)))
    logits = np.where(seen, q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]), -np.inf)
    return 1 / (1 + k.shape[2] * np.exp(-logits)) if kind == "sigmoid" else softmax(logits)


def normed(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def seen_in_windows(grid, size, num_prefix):
    """Which tokens see which: those in front all, and are seen by all."""
    window = [-1] * num_prefix + [(y // size, x // size) for y in range(grid[0]) for x in range(grid[1])]
    return np.array([[-1 in (a, b) or a == b for b in window] for a in window])


def test_weights_are_an_explicit_softmax_or_sigmoid(variant):
    """Of the tokens that every block's first LayerNorm gives to its attention."""
    model, params, images, found = variant
    kind = model.transformer.get("attention", "softmax")
    seen = seen_in_windows(found.grid, 2, 2) if kind == "window" else True
    model = model.clone(transformer={**model.transformer, "scan": False, "remat": "none"})
    logits, state = run(with_intermediates, model, params, images)
    inside = state["intermediates"]["Transformer"]
    for i, weights in enumerate(found.weights):
        (x,) = inside[f"encoderblock_{i}"]["LayerNorm_0"]["__call__"]
        seen = True if i in model.transformer.get("global_blocks", ()) else seen
        block = params["Transformer"][f"encoderblock_{i}"]
        expected = explicit(block["MultiHeadDotProductAttention_1"], x, kind=kind, seen=seen)
        np.testing.assert_allclose(weights, expected, atol=1e-6, rtol=0)
    if model.classifier == "map":
        head, (tokens,) = params["MAPHead_0"], inside["encoder_norm"]["__call__"]
        probe = np.tile(head["probe"], (len(tokens), 1, 1))
        expected = explicit(head["MultiHeadDotProductAttention_0"], tokens, probe)[:, :, 0]
        np.testing.assert_allclose(found.pooling, expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(found.logits, logits, atol=1e-5, rtol=0)
    assert found.weights.std() > 0.01, "every token looks the same everywhere"


def with_intermediates(model, params, images):
    return model.apply({"params": params}, images, capture_intermediates=True, mutable=["intermediates"])


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2WithRegistersForImageClassification"])
def test_weights_are_those_of_transformers(name, tmp_path):
    peers.hf(name, tmp_path)
    import torch
    import transformers

    theirs = getattr(transformers, name).from_pretrained(tmp_path, attn_implementation="eager").eval()
    opened = checkpoint.open_checkpoint(tmp_path)
    images = small.random_images(24, 40) if name.startswith("ViT") else small.random_images(32, 32)
    model = models.build(opened.description.model_type, opened.description.model)
    found = run(attention_maps.attention, model, opened.params, images)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    outputs = theirs(x, output_attentions=True)
    assert len(outputs.attentions) == len(found.weights) == 2
    for ours, weights in zip(found.weights, outputs.attentions, strict=True):
        weights.retain_grad()
        np.testing.assert_allclose(ours, weights.detach(), atol=1e-5, rtol=0)
    if name.startswith("ViT"):
        chosen = outputs.logits.argmax(-1, keepdim=True)
        outputs.logits.gather(1, chosen).sum().backward()
        expected = relevance_by_hand(outputs.attentions)[:, 0]
        np.testing.assert_allclose(run(attention_maps.relevance, model, opened.params, images)[0], expected, atol=1e-5, rtol=0)


def relevance_by_hand(attentions):
    """The matrix R of Chefer et al. (b, n, n), after `backward`, in torch."""
    import torch

    r = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype)[None]
    for a in attentions:
        r = r + torch.bmm((a.grad * a).clamp(min=0).mean(1).detach(), r.expand(len(a), -1, -1))
    return r


def by_hand(classifier, found, fuse):
    """What the head reads: which rows of the tokens, with what weight."""
    b, n, patches = len(found.logits), found.weights.shape[-1], int(np.prod(found.grid))
    reads = np.zeros((b, n))
    if classifier == "map":
        reads = getattr(found.pooling, fuse)(1)
        return reads / reads.sum(1, keepdims=True)
    rows = {"gap": range(n - patches, n), "distilled": (0, 1)}.get(classifier, (0,))
    reads[:, list(rows)] = 1 / len(rows)
    return reads


@pytest.mark.parametrize(("fuse", "discard"), [("mean", 0.0), ("max", 0.9), ("min", 0.5)])
def test_rollout_is_its_formula(variant, fuse, discard):
    model, _, _, found = variant
    weights = np.float64(getattr(found.weights, fuse)(2))
    product = np.eye(weights.shape[-1])
    for a in weights:
        flat = a.reshape(len(a), -1)
        np.put_along_axis(flat, flat.argsort(1)[:, : int(discard * flat.shape[1])], 0, 1)
        a = 0.5 * a + 0.5 * np.eye(a.shape[-1])
        product = a / a.sum(-1, keepdims=True) @ product
    reads = by_hand(model.classifier, found, fuse)
    np.testing.assert_allclose(attention_maps.reading(model.classifier, found, fuse=fuse), reads, atol=1e-6, rtol=0)
    ours = attention_maps.rollout(found.weights, np.float32(reads), fuse=fuse, discard=discard)
    np.testing.assert_allclose(ours, np.einsum("bn,bnm->bm", reads, product), atol=1e-6, rtol=0)


def test_heads_are_shown_over_the_patches_alone(variant):
    """Without class and distillation tokens and registers; a MAP head is one more layer."""
    model, _, _, found = variant
    reads, (h, w) = by_hand(model.classifier, found, "mean"), found.grid
    heads = np.einsum("bn,lbknm->lbkm", reads, found.weights)
    heads = heads if found.pooling is None else np.concatenate([heads, found.pooling[None]])
    shown = attention_maps.heads(model.classifier, found)
    np.testing.assert_allclose(shown, heads[..., -h * w :].reshape(*heads.shape[:3], h, w), atol=1e-6, rtol=0)


def test_all_maps_come_at_once():
    model, images = VARIANTS["dinov2"], small.random_images(*SIZE)
    params = small.random_params(model, images)
    maps, (tokens, found) = run(all_at_once, model, params, images)
    h, w = found.grid
    reads = np.float32(by_hand(model.classifier, found, "max"))
    rollout = attention_maps.rollout(found.weights, reads, fuse="max", discard=0.5)
    heads = np.moveaxis(attention_maps.heads(model.classifier, found), 0, 1)
    expected = {"heads": heads, "mean": heads[:, -1].max(1), "logits": found.logits, "target": found.logits.argmax(1)}
    expected |= {"rollout": rollout[:, -h * w :].reshape(2, h, w), "relevance": tokens[:, -h * w :].reshape(2, h, w)}
    assert maps.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(maps[name], x, atol=1e-6, rtol=0)


def all_at_once(model, params, images):
    return attention_maps.maps(model, params, images, fuse="max", discard=0.5), attention_maps.relevance(model, params, images)


@pytest.mark.parametrize("classifier", ["gap", "map"])
def test_relevance_is_its_formula_by_torchs_autograd(classifier):
    peers.torch_peer()
    model, images = small.vit(classifier=classifier), small.random_images(24, 40)
    params = small.random_params(model, images)
    logits, attentions = in_torch(params, images, classifier)
    target = np.array([3, 5])
    logits[[0, 1], target].sum().backward()
    if classifier == "map":
        *attentions, pooling = attentions
        rows = (pooling.grad * pooling).clamp(min=0).mean(1).detach()
    else:
        n = attentions[0].shape[-1]
        rows = np.full((1, 1, n), 1 / n)
    expected = np.asarray(rows) @ relevance_by_hand(attentions).numpy()
    ours, found = run(attention_maps.relevance, model, params, images, target=target)
    np.testing.assert_allclose(found.logits, logits.detach(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours, expected[:, 0], atol=1e-5, rtol=0)
    assert ours.std() > 3e-4, "every token is as relevant as the others"


def in_torch(params, images, classifier):
    """(logits, the weights of every attention, which keep their gradients), in torch and float64."""
    import torch
    from torch.nn import functional as F

    p = jax.tree.map(lambda x: torch.from_numpy(np.float64(x)), params)
    kept = []

    def norm(p, x):
        return F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-6)

    def attend(p, x, y):
        q, k, v = (
            torch.einsum("bnd,dkh->bknh", z, p[n]["kernel"]) + p[n]["bias"][:, None]
            for n, z in (("query", x), ("key", y), ("value", y))
        )
        kept.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        kept[-1].requires_grad_(True).retain_grad()
        return torch.einsum("bknh,khd->bnd", kept[-1] @ v, p["out"]["kernel"]) + p["out"]["bias"]

    def mlp(p, x):
        x = F.gelu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], approximate="tanh")
        return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]

    b, height, width, c = images.shape
    x = torch.from_numpy(np.float64(images)).reshape(b, height // 8, 8, width // 8, 8, c).transpose(2, 3)
    x = x.reshape(b, -1, 64 * c) @ p["embedding"]["kernel"].reshape(64 * c, -1) + p["embedding"]["bias"]
    x = x + p["Transformer"]["posembed_input"]["pos_embedding"]
    for i in range(2):
        block = p["Transformer"][f"encoderblock_{i}"]
        y = norm(block["LayerNorm_0"], x)
        x = x + attend(block["MultiHeadDotProductAttention_1"], y, y)
        x = x + mlp(block["MlpBlock_3"], norm(block["LayerNorm_2"], x))
    x = norm(p["Transformer"]["encoder_norm"], x)
    if classifier == "map":
        head = p["MAPHead_0"]
        x = attend(head["MultiHeadDotProductAttention_0"], head["probe"].expand(b, -1, -1), x)
        x = x + mlp(head["MlpBlock_0"], norm(head["LayerNorm_0"], x))
    x = x[:, 0] if classifier == "map" else x.mean(1)
    return x @ p["head"]["kernel"] + p["head"]["bias"], kept


def test_what_has_no_such_attention_is_refused_in_words():
    with pytest.raises(UserError, match="a Mixer has no attention to look at"):
        attention_maps.image_tower(small.mixer(), {})
    detector = models.get_model("YOLOS-Ti", num_classes=3)
    with pytest.raises(UserError, match="Yolos is not one of the models whose attention is shown"):
        attention_maps.image_tower(detector, {})
    with pytest.raises(UserError, match="drawn by predict: vit-jax predict --draw=DIR"):
        attention_maps.image_tower(Captioner(body={"vit": {}}, vocabulary=5), {})
    model, images = small.vit(num_classes=None), small.random_images(*SIZE)
    with pytest.raises(UserError, match="no head, and so no classes to explain"):
        attention_maps.relevance(model, {}, images)
    for how, message in (({"fuse": "median"}, "unknown way to fuse heads"), ({"discard": 1.0}, "discard=1.0 must be")):
        with pytest.raises(UserError, match=message):
            attention_maps.rollout(np.ones((1, 2, 4, 3, 3)), np.ones((2, 3)), **how)


def test_the_image_tower_of_two_is_looked_into():
    fields = {"patches": {"size": (8, 8)}, "hidden_size": 32, "classifier": "map", "transformer": small.ENCODER}
    params = {"img": {"head": 1}, "txt": {}}
    tower, inside = attention_maps.image_tower(TwoTowers(image=fields, text={}), params)
    assert tower == small.vit(classifier="map", num_classes=None, model_name=None) and inside == {"head": 1}
