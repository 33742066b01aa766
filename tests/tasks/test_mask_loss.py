"""EoMT's training against transformers': the stages, the matching, the losses and their gradients, of the same points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models import transformer_peer
from vit_jax import models, options
from vit_jax.checkpoint.opening import open_checkpoint
from vit_jax.errors import UserError
from vit_jax.tasks import mask_classification, mask_loss
from vit_jax.tasks.task import Context

SIDE, CLASSES, QUERIES, POINTS = 32, 5, 7, 48
MATCHING = mask_loss.Matching(points=POINTS)

pytestmark = pytest.mark.usefixtures("full_precision")


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """(an EomtForUniversalSegmentation in the midst of training, the same parameters here and our model)."""
    folder = tmp_path_factory.mktemp("eomt")
    fields = {"num_upscale_blocks": 1, "num_queries": QUERIES, "train_num_points": POINTS}
    model = transformer_peer.eomt(folder, side=SIDE, classes=CLASSES, **fields)
    model.criterion.empty_weight.copy_(torch.tensor([1.0] * CLASSES + [MATCHING.no_object]))
    opened = open_checkpoint(folder)
    return model.train(), opened.params, models.build("EoMT", opened.description.model)


def scene(rng):
    """(segmentation of two images, one of which shows all classes and the other two, with pixels of none)."""
    pixels = rng.integers(0, CLASSES, (2, 8, 8))
    pixels[1] = np.where(pixels[1] < 3, 1, 4)
    pixels[rng.random(pixels.shape) < 0.2] = 255
    return np.kron(pixels, np.ones((1, 4, 4))).astype(np.uint8)


def same(ours, theirs, *, atol, name=""):
    """Sums of products that cancel: compared as parts of the largest."""
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours / np.abs(theirs).max(), theirs / np.abs(theirs).max(), atol=atol, err_msg=name)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_and_its_gradients_are_those_of_transformers(peer, seed, monkeypatch):
    model, params, ours = peer
    rng = np.random.default_rng(seed)
    images, pixels = rng.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32), scene(rng)
    masked = np.float32([1.0, 0.4])
    drawn = rng.random((2, 2, QUERIES)).astype(np.float32)
    points = tuple(map(np.asarray, mask_loss.draw_points(jnp.uint32([seed, 7]), 3, POINTS)))
    targets = mask_loss.targets_of(jnp.asarray(pixels), classes=CLASSES, places=QUERIES)
    totals = {"num_masks": targets.valid.sum(), "num_candidates": 2 * QUERIES}

    @jax.jit
    def loss(params):
        masks, classes = ours.apply({"params": params}, images, drawn > masked[:, None, None], method="stages", train=True)
        parts = mask_loss.mask_loss(masks, classes, targets, points, **totals, matching=MATCHING)
        return sum(parts), (masks, classes)

    (value, (masks, classes)), gradient = jax.value_and_grad(loss, has_aux=True)(params)

    # What transformers draws: whose sight is not masked, and for every stage the points of both images, then of every mask.
    each = [int(n) for n in targets.valid.sum(axis=1)]
    draws = [drawn[1]]
    for stage in range(3):
        draws += [points[0][stage, i][None] for i in range(2)]
        per_mask = np.repeat(points[1][stage], each, axis=0)
        draws += [per_mask[:, : 3 * POINTS], per_mask[:, 3 * POINTS :]]
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.tensor(draws.pop(0)))
    model.attn_mask_probs.copy_(torch.from_numpy(masked))
    present = [sorted(set(np.unique(x)) - {255}) for x in pixels]
    labels = [torch.tensor([int(k) for k in found]) for found in present]
    true = [torch.tensor(x == np.array(found)[:, None, None]).float() for x, found in zip(pixels, present, strict=True)]
    model.zero_grad()
    theirs = model(torch.from_numpy(images).permute(0, 3, 1, 2), mask_labels=true, class_labels=labels)
    assert not draws
    theirs.loss.backward()
    model.attn_mask_probs.zero_()

    same(masks[-1], theirs.masks_queries_logits.permute(0, 2, 3, 1), atol=1e-5)
    same(classes[-1], theirs.class_queries_logits, atol=1e-5)
    np.testing.assert_allclose(value, theirs.loss.item(), rtol=1e-5)
    of_theirs = {
        ("query",): model.query.weight.grad,
        ("class_predictor", "kernel"): model.class_predictor.weight.grad.T,
        ("mask_head_0", "kernel"): model.mask_head.fc1.weight.grad.T,
        ("doubling_0", "norm", "scale"): model.upscale_block.block[0].layernorm2d.weight.grad,
        ("backbone", "Transformer", "encoder_norm", "scale"): model.layernorm.weight.grad,
        ("backbone", "register_tokens"): model.embeddings.register_tokens.grad,
    }
    for names, expected in of_theirs.items():
        mine = gradient
        for name in names:
            mine = mine[name]
        same(mine, expected, atol=2e-5, name="/".join(names))


def test_the_losses_of_the_parts_of_a_batch_are_that_of_the_batch(peer):
    """Images that show other numbers of classes, on one device or on two, in micro-batches or not."""
    _, params, ours = peer
    batch = {"image": np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)}
    batch |= {"segmentation": scene(np.random.default_rng(1)), "seed": np.uint32([3, 4])}
    totals = mask_classification.make_totals(ours)
    how = {"total_steps": 10, "matching": MATCHING}
    loss = mask_classification.make_loss(ours, lambda image, seed: image, [127.5] * 3, [127.5] * 3, **how)

    @jax.jit
    def run(batch, totals):
        return loss(params, Context(4, {}, None, {}, totals, None), batch, jax.random.key(0))

    halves = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(2)]
    counts = [totals(half) for half in halves]
    assert counts[0]["masks"] != counts[1]["masks"]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *counts)
    whole, parts = run(batch, totals(batch)), [run(half, mean) for half in halves]
    np.testing.assert_allclose(sum(part.value for part in parts) / 2, whole.value, rtol=1e-5)


def test_the_largest_classes_take_the_places():
    pixels = np.full((2, 6, 6), 255, np.uint8)
    pixels[0, :2], pixels[0, 2:5], pixels[0, 5, 0] = 3, 1, 4
    found = jax.jit(lambda x: mask_loss.targets_of(x, classes=CLASSES, places=2))(pixels)
    assert found.labels[0].tolist() == [1, 3] and found.valid.tolist() == [[True, True], [False, False]]


def test_sight_is_masked_less_and_less_one_block_after_the_other():
    """The steps of the published recipes: of ADE20K's 39,120 with four blocks, of COCO's 88,692 with three."""
    starts, total = [6_520, 13_040, 19_560, 26_080], 39_120
    for step in (0, 6_520, 9_780, 20_000, 32_000, 39_119):
        expected = [(1 - min(max((step - start) / 6_520, 0), 1)) ** 0.9 for start in starts]
        np.testing.assert_allclose(mask_classification.annealed(jnp.float32(step / total), 4), expected, atol=1e-5)
    of_coco = mask_classification.annealed(jnp.float32(36_955 / 88_692), 3)
    np.testing.assert_allclose(of_coco, [0, 1, 1], atol=1e-4)
    seeing = mask_classification.draw_seeing_all(jnp.arange(2_000, dtype=jnp.uint32), jnp.float32([1.0, 0.25, 0.0]), 3)
    np.testing.assert_allclose(seeing.mean(axis=(1, 2)), [0, 0.75, 1], atol=0.02)


@pytest.mark.parametrize(
    ("fields", "message"), [({"point": 9}, "points"), ({"points": 2}, "4 or more"), ({"dice": -1.0}, "0 or more")]
)
def test_numbers_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        mask_loss.Matching(**options.checked(mask_loss.Matching, fields, "config.task.matching"))
