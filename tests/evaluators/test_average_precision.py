"""Average precision where it is known beforehand."""

import math

import numpy as np
import pytest

from vit_jax.evaluators.average_precision import NAMES, Found, Truth, average_precision


def truth(boxes, labels, crowds=None):
    return Truth(np.array(boxes, float).reshape(-1, 4), np.array(labels), np.array(crowds or [False] * len(labels)))


def found(boxes, labels, scores):
    return Found(np.array(boxes, float).reshape(-1, 4), np.array(labels), np.array(scores))


TRUTHS = [truth([[0, 0, 40, 100], [60, 10, 80, 30]], [0, 1]), truth([], []), truth([[5, 5, 25, 45]], [0])]


def test_all_found_is_1_and_nothing_found_is_0():
    all_found = [found(t.boxes, t.labels, [0.9] * len(t.labels)) for t in TRUTHS]
    result = average_precision(TRUTHS, all_found, 3)
    assert tuple(result) == NAMES
    np.testing.assert_allclose([result[name] for name in ("AP", "AP_medium", "AR_100")], 1)
    assert math.isnan(result["AP_large"])  # there is none
    nothing = [found([], [], []) for _ in TRUTHS]
    assert average_precision(TRUTHS, nothing, 3)["AP50"] == 0


def test_it_counts_the_thresholds_that_the_overlap_reaches():
    # Moved by a part of its width, the box of 40 overlaps by 0.77: thresholds .5 to .75 are reached, 6 of 10.
    shifted = [found([[40 * 0.13, 0, 40 * 1.13, 100]], [0], [0.5])]
    result = average_precision([truth([[0, 0, 40, 100]], [0])], shifted, 1)
    assert result["AP"] == pytest.approx(0.6) and result["AP75"] == pytest.approx(1)


def test_wrong_boxes_cost_what_their_scores_say_and_crowds_nothing():
    box, wrong = [0, 0, 40, 100], [200, 200, 240, 300]
    for score, expected in ((0.1, 1.0), (0.9, 0.5)):
        result = average_precision([truth([box], [0])], [found([box, wrong], [0, 0], [0.5, score])], 1)
        assert result["AP50"] == pytest.approx(expected)
    crowd = truth([box, [190, 190, 400, 400]], [0, 0], [False, True])
    assert average_precision([crowd], [found([box, wrong], [0, 0], [0.5, 0.9])], 1)["AP50"] == pytest.approx(1)
    other_class = [found([box], [1], [0.5])]
    assert average_precision([truth([box], [0])], other_class, 2)["AP50"] == 0
