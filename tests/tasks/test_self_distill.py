"""DINOv2's losses against torch, written from the paper's formulas; what is hidden, by statistics; the teacher, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.models import small
from tests.tasks import test_contract
from vit_jax import models
from vit_jax.checkpoint import resize
from vit_jax.data import loader
from vit_jax.data.device import colors
from vit_jax.data.host.block_mask import draw_blocks
from vit_jax.errors import UserError
from vit_jax.models.dino_head import DinoHead
from vit_jax.optimize import parallel
from vit_jax.run import experiment as experiments
from vit_jax.run import start
from vit_jax.settings import Settings
from vit_jax.tasks import backbone, centring, collapse, self_distill
from vit_jax.tasks.dino import dino_loss
from vit_jax.tasks.ibot import ibot_loss
from vit_jax.tasks.koleo import koleo_loss
from vit_jax.tasks.task import Context, TrainingFailed

B, N, M, K, D = 5, 3, 4, 7, 6
ONE = parallel.Mesh()  # one program sees the whole batch


def drawn(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def probabilities(*shape, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)


def assert_equal_with_gradients(ours, theirs, *arrays):
    """Of JAX's and torch's functions of the same arrays: values, and gradients with respect to all of them."""
    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=tuple(range(len(arrays)))))(*arrays)
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    expected = theirs(*tensors)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    for found, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(found, np.zeros(found.shape) if tensor.grad is None else tensor.grad, atol=1e-6)


@pytest.mark.parametrize("n", [0, N])
def test_dinos_loss_is_torchs(n):
    teacher = probabilities(B, 2, K)

    def theirs(of_global, of_local):
        taught = torch.tensor(teacher)
        total = torch.zeros(())
        for i in range(n):
            for t in range(2):
                total = total + F.cross_entropy(of_local[:, i] / 0.1, taught[:, t])
        for s in range(2):  # each learns from the other
            total = total + F.cross_entropy(of_global[:, s] / 0.1, taught[:, 1 - s])
        return total / (2 * n + 2)

    ours = lambda of_global, of_local: dino_loss(of_global, of_local, teacher)  # noqa: E731
    assert_equal_with_gradients(ours, theirs, drawn(B, 2, K, seed=1), drawn(B, n, K, seed=2))


def test_ibots_loss_is_torchs():
    teacher, counts = probabilities(B, M, K), [4, 1, 2, 3, 0]
    weight = np.zeros((B, M), np.float32)
    for i, count in enumerate(counts):
        weight[i, :count] = 1 / max(1, count)

    def theirs(student):
        per_view = [F.cross_entropy(student[i, :n] / 0.1, torch.tensor(teacher[i, :n])) for i, n in enumerate(counts) if n]
        return sum(per_view) / (2 * B)

    assert_equal_with_gradients(lambda x: ibot_loss(x, teacher, weight), theirs, drawn(B, M, K))


def test_koleo_is_torchs():
    def theirs(x):
        x = F.normalize(x, eps=1e-8)
        with torch.no_grad():
            dots = x @ x.T
            dots.fill_diagonal_(-1)
            nearest = dots.argmax(dim=1)
        return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()

    assert_equal_with_gradients(lambda x: koleo_loss(x, ONE), theirs, drawn(B, D))


def test_sinkhorn_is_torchs_and_spreads_the_rows_over_the_prototypes():
    scores, weight = np.clip(drawn(12, K, scale=0.3), -1, 1), np.ones(12, np.float32)
    weight[[3, 11]] = 0

    def theirs(x, temperature):
        q = torch.exp(x / temperature).T
        k, b = q.shape
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(dim=1, keepdim=True) / k
            q = q / q.sum(dim=0, keepdim=True) / b
        return (q * b).T

    found = np.asarray(centring.sinkhorn(scores, weight, 0.05, ONE))
    expected = theirs(torch.tensor(scores[weight > 0], dtype=torch.float64), 0.05)
    np.testing.assert_allclose(found[weight > 0], expected, atol=1e-6)
    assert not found[weight == 0].any()
    np.testing.assert_allclose(centring.sinkhorn(scores, weight, 0.2, ONE, iterations=100).sum(axis=0), 10 / K, rtol=1e-4)


def test_a_centre_follows_the_mean_of_the_rows_that_count():
    scores, centre, weight = drawn(9, K), drawn(K, seed=1), np.float32(np.arange(9) < 6)
    np.testing.assert_allclose(
        centring.centred(scores, centre, 0.07), torch.softmax(torch.tensor((scores - centre) / np.float32(0.07)), 1), atol=1e-6
    )
    moved = centring.moved(centre, scores, weight, ONE)
    np.testing.assert_allclose(moved, 0.9 * centre + 0.1 * scores[:6].mean(axis=0), atol=1e-6)


def test_every_device_sees_the_rows_of_all(monkeypatch):
    """A device of two, by hand: sums and neighbours are those of both."""
    scores, x = np.clip(drawn(8, K), -1, 1), drawn(8, D)
    whole, halves = jax.jit(lambda s: centring.sinkhorn(s, np.ones(8), 0.1, ONE))(scores), scores.reshape(2, 4, K)
    devices = dataclasses.make_dataclass("Two", ["sum", "all_examples", "device_index"])(
        lambda t: jax.lax.psum(t, "d"), lambda t: jax.lax.all_gather(t, "d", tiled=True), lambda: jax.lax.axis_index("d")
    )
    parts = jax.jit(jax.vmap(lambda s: centring.sinkhorn(s, jnp.ones(4), 0.1, devices), axis_name="d"))(halves)
    np.testing.assert_allclose(parts.reshape(8, K), whole, atol=1e-6)
    parts = jax.jit(jax.vmap(lambda y: koleo_loss(y, devices), axis_name="d"))(x.reshape(2, 4, D))
    np.testing.assert_allclose(np.mean(parts), jax.jit(lambda y: koleo_loss(y, ONE))(x), rtol=1e-6)


def test_the_head_is_torchs():
    head, x = DinoHead(K, hidden=11, bottleneck=5), drawn(B, D)
    params = jax.eval_shape(head.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: np.random.default_rng(p.size).normal(size=p.shape).astype(np.float32), params)
    y = torch.tensor(x)
    for i in range(3):
        y = F.gelu(y) if i else y
        y = F.linear(y, torch.tensor(params[f"Dense_{i}"]["kernel"].T), torch.tensor(params[f"Dense_{i}"]["bias"]))
    last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, K, bias=False))
    last.parametrizations.weight.original0.data = torch.tensor(params["last_layer"]["scale"][:, None])
    last.parametrizations.weight.original1.data = torch.tensor(params["last_layer"]["kernel"].T)
    expected = last(F.normalize(y, dim=-1)).detach()
    np.testing.assert_allclose(jax.jit(head.apply)({"params": params}, x), expected, atol=1e-5)


# Views and what is hidden of them


def test_blocks_have_the_sizes_and_shapes_that_are_asked_for():
    rng = np.random.default_rng(0)
    shares, first_sizes, aspects = [], [], []
    for _ in range(400):
        wanted = int(256 * rng.uniform(0.1, 0.5))
        hidden = draw_blocks((16, 16), wanted, rng)
        assert hidden.sum() <= wanted
        shares.append(hidden.sum() / wanted)
        one = draw_blocks((40, 40), 4, rng)  # a block as small as allowed
        rows, columns = one.any(axis=1).sum(), one.any(axis=0).sum()
        first_sizes.append(one.sum())
        aspects.append(rows / columns)
    assert np.mean(shares) > 0.97  # nearly all that is wanted: blocks go on until little room is left
    assert max(first_sizes) == 4 and min(first_sizes) >= 3
    assert 0.25 <= min(aspects) < 0.5 and 2 < max(aspects) <= 4
    assert abs(np.log(aspects).mean()) < 0.1
    assert not draw_blocks((5, 7), 0, rng).any()


def test_places_that_are_left_over_do_not_count():
    hidden = np.array([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], bool)
    places, weight = self_distill.hidden_places(hidden, 4)
    np.testing.assert_array_equal(places[0, :3], [1, 3, 4])
    np.testing.assert_allclose(weight, [[1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 0]])


def test_hue_turns_as_colorsys_does():
    import colorsys

    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    image[0, 0] = 77  # grey has no hue
    for shift in (-0.1, 0.0, 0.05, 0.4):
        expected = np.zeros(image.shape)
        for place in np.ndindex(image.shape[:2]):
            h, s, v = colorsys.rgb_to_hsv(*(image[place] / 255))
            expected[place] = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
        found = np.asarray(colors.shift_hue(image, shift), float)
        assert np.abs(found - 255 * expected).max() < 0.51


def test_views_are_recoloured_as_often_as_is_said_and_each_by_itself():
    images = np.random.default_rng(0).integers(0, 256, (200, 2, 4, 4, 3), np.uint8)
    how = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.0, "blur_prob": 0.0, "grey_prob": 0.0, "solarize_prob": 0.0}
    seeds = np.arange(200, dtype=np.uint32)
    for name, share in (("jitter_prob", 0.8), ("grey_prob", 0.2), ("solarize_prob", 0.5), ("blur_prob", 0.5)):
        recolor = jax.jit(colors.make_recolor(**how | {name: share}), static_argnums=2)
        changed = (np.asarray(recolor(images, seeds, 0)) != images).any(axis=(2, 3, 4))
        share *= 0.9 if name == "blur_prob" else 1  # below 0.28 pixels a Gaussian changes no 8-bit number
        assert abs(changed.mean() - share) < 0.1, name
        assert (changed[:, 0] != changed[:, 1]).any(), name


# The task


def experiment(folder, **overrides):
    return experiments.build(Settings.from_config(test_contract.config("self_distill", folder, **overrides)))


def test_the_teacher_moves_by_hand_and_the_last_layer_waits(tmp_path):
    built = experiment(tmp_path, ema_decay=0.8, ema_decay_end=1.0)
    batch = next(loader.train_batches(built.train_source, built.task.train_example, batch_size=16, seed=0))
    before = start.new_state(built)
    first = built.parallelism.read(before.params)
    update = experiments.make_update(built)
    state, metrics = update(before, built.parallelism.send(batch))
    params, teacher = built.parallelism.read(state.params), built.parallelism.read(state.ema)
    jax.tree.map(lambda t, a, b: np.testing.assert_allclose(t, 0.8 * a + 0.2 * b, atol=1e-6), teacher, first, params)
    for head in ("dino", "ibot"):
        np.testing.assert_array_equal(params[head]["last_layer"]["kernel"], first[head]["last_layer"]["kernel"])
        assert np.abs(params[head]["Dense_0"]["kernel"] - first[head]["Dense_0"]["kernel"]).max() > 0
    assert np.abs(params["mask_token"]).max() > 0
    again = built.parallelism.read(update(state, built.parallelism.send(batch))[0].params)  # frozen for one step
    assert np.abs(again["dino"]["last_layer"]["kernel"] - params["dino"]["last_layer"]["kernel"]).max() > 0
    assert 0 < built.parallelism.read(metrics)["feature_spread"] < 1


def test_positions_are_resampled_as_in_the_checkpoints_of_dinov2():
    fields = {**models.named("ViT-Micro_4")[1], "num_classes": None}
    model = models.build("ViT", fields)
    params = jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 24, 24, 3), np.float32))["params"],
    )
    table = params["Transformer"]["posembed_input"]["pos_embedding"]
    found = backbone.at_grid(params, (6, 6), (3, 4), "bicubic_offset")["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(found[:, 0], table[:, 0])
    expected = resize.resize(table[0, 1:].reshape(6, 6, -1), (3, 4), "bicubic_offset").reshape(12, -1)
    np.testing.assert_allclose(found[0, 1:], expected, atol=1e-5)


def test_hidden_patches_are_not_seen():
    model = models.build("ViT", {**models.named("ViT-Micro_4")[1], "num_classes": None})
    images = drawn(2, 16, 16, 3)
    params = {"params": small.random_params(model, images)}
    hidden = np.zeros((2, 4, 4), bool)
    hidden[:, 1, 2] = True
    changed = images.copy()
    changed[:, 4:8, 8:12] += 1
    run = jax.jit(lambda x, token: model.apply(params, x, method="features", hidden=(hidden, token))["map"])
    token = drawn(1, 64)
    np.testing.assert_array_equal(run(images, token), run(changed, token))
    assert np.abs(run(images, token) - run(images, -token))[:, 1, 2].max() > 0.1


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ({"local_size": 10}, {}, "config.task.local_size=10 is no multiple of the patch of 4x4 pixels"),
        ({}, {"pp": {"crop": 18}}, "config.pp.crop=18 is no multiple"),
        ({}, {"ema_decay": None}, "config.ema_decay=0.992"),
        ({}, {"pp": {"train": "train[:9]"}}, "train..9. of digits has 9 examples, and config.batch=16"),
        ({"centring": "center"}, {}, "did you mean centre"),
        ({}, {"model": {"classifier": "gap"}}, "a class token"),
        ({"masked": (0.5, 0.1)}, {}, "two shares"),
    ],
)
def test_what_cannot_be_trained_is_refused(task, overrides, message, tmp_path):
    config = test_contract.config("self_distill", tmp_path)
    config.update(overrides)
    config.task.update(task)
    with pytest.raises(UserError, match=message):
        experiments.build(Settings.from_config(config))


def test_a_photo_that_is_too_small_is_named(tmp_path):
    config = test_contract.config("self_distill", tmp_path)
    config.task.local_size = 12
    built = experiments.build(Settings.from_config(config))
    with pytest.raises(UserError, match=r"digits train\[:100\], example 0: an image of 8x8 is too small for a crop of 12"):
        loader.load(built.train_source, 0, lambda x, **how: built.task.train_example(x, rng=np.random.default_rng(0), **how))


def test_a_collapse_stops_the_run_with_words():
    """Whether to one prototype or to all of them alike; a teacher that is sure of each image may be as sure."""
    context, features = Context(0, {}, None, {}, {}, ONE), drawn(8, 2, D)
    one, alike = np.eye(K)[np.zeros((8, 2), int)], np.full((8, 2, K), 1 / K)
    sure = np.eye(K)[np.arange(16).reshape(8, 2) % K]
    found = [collapse.spread(jnp.asarray(taught), features, context) for taught in (one, alike, sure)]
    np.testing.assert_allclose([x["teacher_entropy"] for x in found], [0, 1, 0], atol=1e-5)
    np.testing.assert_allclose([x["teacher_information"] for x in found[:2]], 0, atol=1e-5)
    check = collapse.make_check(beginning=2)
    check(1, found[0])
    check(3, found[2])
    for collapsed in found[:2]:
        with pytest.raises(TrainingFailed, match="step 3: the teacher has collapsed"):
            check(3, collapsed)


def test_a_teacher_becomes_the_backbone_of_the_next_run(tmp_path):
    """With its positions on another grid, and the token of hidden patches."""
    from vit_jax.train import train_and_evaluate

    config = test_contract.config("self_distill", tmp_path, total_steps=2, eval_every=2)
    config.evaluators = {"knn": {"k": (10,)}}
    left = train_and_evaluate(config, tmp_path / "first")
    assert 0 <= tiny.metrics(tmp_path / "first", "knn_10")[2] <= 1
    assert set(left) == {"Transformer", "embedding", "cls", "extras"} and left["extras"]["mask_token"].any()
    config.update({"pretrained": str(tmp_path / "first"), "pp": {"crop": 20}})
    settings = Settings.from_config(config)
    built = experiments.build(settings, origin=start.find_origin(settings))
    params = built.task.load({"": start.checkpoint.open_checkpoint(tmp_path / "first")}, built.init_params())
    np.testing.assert_array_equal(params["mask_token"], left["extras"]["mask_token"])
    np.testing.assert_array_equal(params["backbone"]["cls"], left["cls"])
    assert params["backbone"]["Transformer"]["posembed_input"]["pos_embedding"].shape[1] == 26
