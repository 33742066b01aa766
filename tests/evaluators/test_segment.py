"""Mean IoU of a confusion matrix, against a version in NumPy that goes image by image."""

import jax
import numpy as np
import pytest

from tests.tasks import test_contract
from vit_jax.errors import UserError
from vit_jax.evaluators import segment
from vit_jax.models.segment import at_pixels
from vit_jax.run import experiment as experiments
from vit_jax.settings import Settings

NAMES = ("sky", "road", "car", "nobody", "tree")


def by_hand(truths, founds):
    """(mIoU, accuracy, IoU by class) of maps of any sizes, class by class."""
    truth, found = (np.concatenate([x.ravel() for x in maps]) for maps in (truths, founds))
    found, truth = found[truth != 255], truth[truth != 255]
    iou = {}
    for number, name in enumerate(NAMES):
        together = ((truth == number) | (found == number)).sum()
        if together:
            iou[name] = ((truth == number) & (found == number)).sum() / together
    return np.mean(list(iou.values())), (truth == found).mean(), iou


def test_scores_are_those_by_hand_and_padding_counts_nothing():
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 4, 255], (5, 7, 9)).astype(np.uint8)
    found = np.where(rng.random(truth.shape) < 0.6, truth % 5, rng.choice([0, 1, 4], truth.shape))
    valid = np.array([True, True, False, True, True])
    sums = sum(np.asarray(segment.confusion(truth[i], found[i], valid[i], 5)) for i in (slice(0, 3), slice(3, 5)))
    assert sums.sum() == (truth[valid] != 255).sum()
    miou, accuracy, iou = by_hand(truth[valid], found[valid])
    assert "nobody" not in iou and 0 < miou < 1
    expected = {"mIoU": miou, "pixel_accuracy": accuracy} | {f"IoU/{name}": x for name, x in iou.items()}
    assert segment.scores(sums, NAMES) == expected
    twins = segment.scores(sums, ("a", "b", "a", "c", "d"))
    assert twins["mIoU"] == miou and {"IoU/a (0)", "IoU/a (2)", "IoU/b"} < twins.keys()
    with pytest.raises(UserError, match="no pixel"):
        segment.scores(np.zeros((5, 5)), NAMES)


@pytest.mark.parametrize("overrides", [{}, {"parallel": "mesh", "batch_eval": 3}])
def test_a_split_is_scored_as_by_hand(tmp_path, overrides):
    config = test_contract.segment(tmp_path)
    config.update(overrides)
    e = experiments.build(Settings.from_config(config))
    params = jax.device_get(e.init_params())
    params["conv_seg"]["kernel"] = np.random.default_rng(0).normal(size=params["conv_seg"]["kernel"].shape).astype(np.float32)
    metrics, _ = segment.make_score(e, e.test_source)(e.parallelism.place(params))
    images = np.stack([scene["image"] for scene in e.test_source]).astype(np.float32)
    logits = jax.jit(e.task.predict)(params, {"image": images})["logits"]
    found = np.asarray(at_pixels(logits, (64, 64))).argmax(axis=-1)
    truth = np.stack([scene["segmentation"] for scene in e.test_source])
    confused = np.bincount((truth.astype(int) * 11 + found).ravel(), minlength=121).reshape(11, 11)
    assert metrics == segment.scores(confused, e.test_source.class_names)
    assert metrics["mIoU"] == pytest.approx(np.mean([x for name, x in metrics.items() if name.startswith("IoU/")]))
