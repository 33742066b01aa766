"""The matcher against scipy's, the set loss and its gradient against transformers', and what must not depend on the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from vit_jax.tasks import matching
from vit_jax.tasks.matching import Targets


def random_set(rng, layers, counts, q, places, classes):
    """Logits and boxes of `layers` layers, and targets of as many objects an image as `counts` says."""
    b = len(counts)
    logits = rng.normal(size=(layers, b, q, classes + 1)).astype(np.float32) * 2
    boxes = rng.uniform(0.05, 0.6, (layers, b, q, 4)).astype(np.float32)
    valid = np.arange(places) < np.array(counts)[:, None]
    true = rng.uniform(0.1, 0.5, (b, places, 4)).astype(np.float32) * valid[..., None]
    return logits, boxes, Targets(true, rng.integers(0, classes, (b, places)) * valid, valid)


@pytest.mark.parametrize("cases, q, places", [(960, 20, 15), (40, 100, 100)])
def test_the_matcher_is_scipys(cases, q, places):
    rng = np.random.default_rng(q)
    counts = np.concatenate([[0, places], rng.integers(0, places + 1, cases - 2)])
    cost = rng.normal(size=(cases, q, places)).astype(np.float32)
    valid = np.stack([rng.permutation(np.arange(places) < n) for n in counts])
    chosen = np.asarray(jax.jit(matching.match)(cost, valid))
    assert ((chosen >= 0) == valid).all()
    for case in range(cases):
        mine, objects = chosen[case, valid[case]], np.flatnonzero(valid[case])
        assert len(set(mine)) == len(mine)
        rows, columns = linear_sum_assignment(cost[case][:, objects].astype(np.float64))
        best = cost[case][rows, objects[columns]].sum(dtype=np.float64)
        np.testing.assert_allclose(cost[case][mine, objects].sum(dtype=np.float64), best, rtol=1e-5, atol=1e-5)


def test_diverged_predictions_are_matched_too():
    cost = jnp.full((1, 5, 3), jnp.nan).at[0, 2, 1].set(jnp.inf)
    chosen = jax.jit(matching.match)(cost, jnp.array([[True, True, False]]))
    assert len(set(np.asarray(chosen[0, :2]))) == 2 and chosen[0, 2] == -1


def test_the_loss_and_its_gradient_are_transformers():
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    rng = np.random.default_rng(0)
    counts = [3, 0, 9, 1]
    logits, boxes, targets = random_set(rng, 3, counts, 11, 10, 6)
    criterion = ImageLoss(HungarianMatcher(1, 5, 2), 6, 0.1, ["labels", "boxes"])
    theirs = [
        {"class_labels": torch.from_numpy(targets.labels[i, :n]), "boxes": torch.from_numpy(targets.boxes[i, :n])}
        for i, n in enumerate(counts)
    ]
    inputs = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(boxes).requires_grad_()
    parts = [criterion({"logits": x, "pred_boxes": y}, theirs) for x, y in zip(*inputs, strict=True)]
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    sums = [weight * sum(part[name] for part in parts) for name, weight in weights.items()]
    sum(sums).backward()

    def loss(logits, boxes):
        ours = matching.set_loss(logits, boxes, targets, num_boxes=sum(counts), num_candidates=len(counts) * 11)
        return sum(ours), ours

    gradients, ours = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(logits, boxes)
    np.testing.assert_allclose(ours, [float(x) for x in sums], rtol=1e-5)
    for mine, their in zip(gradients, inputs, strict=True):
        np.testing.assert_allclose(mine, their.grad.numpy(), atol=1e-6)


def test_the_losses_of_parts_sum_to_that_of_the_whole():
    """Parts with 0, few and many boxes: what several devices and micro-batches see."""
    logits, boxes, targets = random_set(np.random.default_rng(1), 2, [0, 0, 2, 1, 7, 6], 11, 8, 6)
    whole = {"num_boxes": 16.0, "num_candidates": 66.0}
    loss = jax.jit(matching.set_loss)
    everything = loss(logits, boxes, targets, **whole)
    parts = [slice(i, i + 2) for i in (0, 2, 4)]
    some = [loss(logits[:, s], boxes[:, s], jax.tree.map(lambda x, s=s: x[s], targets), **whole) for s in parts]
    np.testing.assert_allclose(np.sum(some, axis=0), everything, rtol=1e-5)
    # Places without an object do not count, whatever stands there.
    rubbish = targets._replace(boxes=np.where(targets.valid[..., None], targets.boxes, 0.7))
    np.testing.assert_allclose(loss(logits, boxes, rubbish, **whole), everything, rtol=1e-6)
    nothing = targets._replace(valid=np.zeros_like(targets.valid))
    l1, giou = loss(logits, boxes, nothing, num_boxes=0.0, num_candidates=66.0)[1:]
    assert l1 == giou == 0


def test_boxes_and_their_overlap_are_transformers():
    from transformers.image_transforms import center_to_corners_format
    from transformers.loss.loss_for_object_detection import generalized_box_iou

    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0, 1, (30, 4)).astype(np.float32) for _ in range(2))
    corners = [center_to_corners_format(torch.from_numpy(x)) for x in (a, b)]
    ours = matching.giou(matching.to_corners(a)[:, None], matching.to_corners(b)[None])
    np.testing.assert_allclose(ours, generalized_box_iou(*corners), atol=1e-6)


def test_the_best_boxes_are_in_pixels_of_each_image():
    logits = np.log(np.array([[[0.1, 0.6, 0.3], [0.2, 0.1, 0.7]]], np.float32)).repeat(2, axis=0)
    boxes = np.array([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.2, 0.2, 0.4]]], np.float32).repeat(2, axis=0)
    ours = matching.best_boxes(jnp.asarray(logits), jnp.asarray(boxes), jnp.array([[50, 100], [200, 10]]))
    np.testing.assert_allclose(ours["scores"], [[0.6, 0.2]] * 2, rtol=1e-5)  # without the last class, which is no object
    assert ours["labels"].tolist() == [[1, 0]] * 2
    np.testing.assert_allclose(ours["boxes"][0], [[40, 15, 60, 35], [0, 0, 20, 20]], atol=1e-4)
    np.testing.assert_allclose(ours["boxes"][1], [[4, 60, 6, 140], [0, 0, 2, 80]], atol=1e-4)
