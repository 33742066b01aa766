"""Nearest neighbours: against loops and scikit-learn, ties, small sets, and digits by hand."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from tests.evaluators import small
from vit_jax.errors import UserError
from vit_jax.evaluators import knn


def random_set(n, m, *, d=16, classes=7, seed=0):
    """Clusters that overlap, of vectors of different lengths: (train, train_labels, test, test_labels)."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, d))
    labels = rng.integers(classes, size=n + m)
    x = (centers[labels] + 2 * rng.normal(size=(n + m, d))) * rng.uniform(0.1, 10, size=(n + m, 1))
    x = x.astype(np.float32)
    return x[:n], labels[:n], x[n:], labels[n:]


def loops(train, labels, test, num_classes, k, temperature):
    """The definition, one example and one neighbour at a time, in float64."""
    found = []
    for question in test.astype(np.float64):
        similarities = [float(question @ x / np.linalg.norm(question) / np.linalg.norm(x)) for x in train.astype(np.float64)]
        votes = [0.0] * num_classes
        for i in sorted(range(len(train)), key=lambda i: -similarities[i])[:k]:
            votes[labels[i]] += np.exp(similarities[i] / temperature)
        found.append(votes.index(max(votes)))
    return found


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_predictions_are_those_of_plain_loops(temperature):
    train, labels, test, truth = random_set(150, 60)
    predicted = knn.knn(train, labels, test, 7, (1, 10, 20, 100), temperature)
    assert list(predicted) == [1, 10, 20, 100]
    for k, found in predicted.items():
        assert found.shape == (60,) and found.tolist() == loops(train, labels, test, 7, k, temperature)
    assert 0.3 < np.mean(predicted[10] == truth) < 1, "the set is too easy or too hard to tell anything"


def test_predictions_are_those_of_scikit_learn():
    train, labels, test, _ = random_set(400, 150, seed=1)
    predicted = knn.knn(train, labels, test, 7)
    assert list(predicted) == [10, 20, 100, 200]
    for k, found in predicted.items():
        peer = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine")
        np.testing.assert_array_equal(found, peer.fit(train, labels).predict(test))


def test_chunks_change_nothing(monkeypatch):
    train, labels, test, _ = random_set(60, 37)
    whole = knn.knn(train, labels, test, 7, (3, 20))
    for cells in (1, 140 * 5):  # 1 and 5 questions at a time
        monkeypatch.setattr(knn, "_CELLS", cells)
        for k, found in knn.knn(train, labels, test, 7, (3, 20)).items():
            np.testing.assert_array_equal(found, whole[k])


def test_the_length_of_a_vector_does_not_matter():
    train, labels, test, _ = random_set(100, 30)
    scales = np.random.default_rng(2).uniform(1e-3, 1e3, size=(130, 1)).astype(np.float32)
    whole, scaled = knn.knn(train, labels, test, 7), knn.knn(train * scales[:100], labels, test * scales[100:], 7)
    for k in whole:
        np.testing.assert_array_equal(whole[k], scaled[k])


def test_of_equal_votes_the_lower_class_wins_and_of_equal_neighbours_the_earlier():
    train = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    labels = np.array([2, 1, 3, 0])
    predicted = knn.knn(train, labels, np.array([[1, 0], [0, 2], [1, 1]], np.float32), 4, (1, 2, 3, 4))
    assert predicted[1].tolist() == [2, 3, 2]  # the earlier of two equal neighbours
    assert predicted[2].tolist() == [1, 0, 1]  # the lower of two equal classes
    assert predicted[4].tolist() == [1, 0, 0]


def test_near_neighbours_outvote_many_far_ones():
    angle = np.deg2rad([1, 60, 60, 60])
    train = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    test = np.array([[1, 0]], np.float32)
    assert knn.knn(train, np.array([0, 1, 1, 1]), test, 2, (4,))[4].tolist() == [0]  # 3 exp((.5 − 1) / .07) < 1
    assert knn.knn(train, np.array([0, 1, 1, 1]), test, 2, (4,), temperature=1.0)[4].tolist() == [1]
    assert knn.knn(train, np.array([0, 1, 1, 1]), test, 2, (4,), temperature=1e-4)[4].tolist() == [0]  # no overflow


def test_small_sets_leave_out_the_k_that_they_cannot_fill():
    train, labels, test, _ = random_set(20, 3)
    assert list(knn.knn(train, labels, test, 7)) == [10, 20]
    assert knn.knn(train[:5], labels[:5], test, 7) == {}
    assert {k: x.shape for k, x in knn.knn(train, labels, test[:0], 7).items()} == {10: (0,), 20: (0,)}
    zeros = knn.knn(np.zeros_like(train), labels, np.zeros_like(test), 7, (1,))
    assert zeros[1].tolist() == [labels[0]] * 3  # no direction: all are as near
    for wrong in ({"ks": (0, 10)}, {"ks": ()}, {"temperature": 0.0}):
        with pytest.raises(UserError, match="all must be positive"):
            knn.knn(train, labels, test, 7, **wrong)


def test_a_perfect_set_is_classified_perfectly():
    labels = np.arange(1200) % 6
    train = np.eye(6, 12, dtype=np.float32)[labels] + 0.05 * np.random.default_rng(0).normal(size=(1200, 12)).astype(np.float32)
    for found in knn.knn(train[600:], labels[600:], train[:600], 6, (10, 20, 100)).values():
        np.testing.assert_array_equal(found, labels[:600])


def test_digits_are_scored_as_by_hand(tmp_path):
    e, params = small.experiment(tmp_path)
    evaluator = knn.make_evaluator(e, k=(1, 10, 200), temperature=0.5)
    (train, labels), (test, truth) = small.features(e, params, e.train_source), small.features(e, params, e.test_source)
    predicted = knn.knn(train, labels, test, 10, (1, 10), 0.5)
    metrics = evaluator(e.parallelism.place(params))
    assert metrics == {f"knn_{k}": np.mean(found == truth) for k, found in predicted.items()}  # 100 images fill no k of 200
    assert 0.2 < metrics["knn_1"] < 1
    swapped = knn.make_evaluator(e, train="test[:37]", test="train[:100]", k=(1,))(e.parallelism.place(params))
    assert swapped == {"knn_1": np.mean(knn.knn(test, truth, train, 10, (1,))[1] == labels)} != {"knn_1": metrics["knn_1"]}


def test_what_cannot_be_scored_is_refused(tmp_path):
    e, _ = small.experiment(tmp_path, pp_train="train[:9]")
    with pytest.raises(UserError, match=r"^train\[:9\] of digits has 9 images: kNN needs 10 or more"):
        knn.make_evaluator(e)
    with pytest.raises(UserError, match="all must be positive"):
        knn.make_evaluator(e, k=(0,))
