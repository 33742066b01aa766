"""A batch that the cores of a CPU share gives what it gives as a whole, in the order of its examples."""

import threading

import jax
import numpy as np
import pytest

from tests.serve import models
from vit_jax.models import cores
from vit_jax.optimize import parallel

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("count", "size", "expected"), [(1, 8, 1), (2, 8, 2), (6, 8, 4), (16, 6, 3), (4, 1, 1), (4, 7, 1)])
def test_a_batch_is_cut_into_equal_parts_of_which_no_core_has_two(count: int, size: int, expected: int, monkeypatch):
    monkeypatch.setattr(cores, "cores", lambda: count)
    assert cores.parts(size) == expected
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert cores.parts(size) == 1


def test_parts_are_computed_at_the_same_time():
    together = threading.Barrier(cores.MOST, timeout=60)

    def meet(part: dict[str, np.ndarray]) -> list[int]:
        together.wait()
        return part["x"].ravel().tolist()

    batch = {"x": np.arange(8).reshape(1, 8)}
    assert cores.by_parts(meet, batch, 4, axis=1) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("n", [1, 5, 8, 11])
def test_a_predictor_answers_the_same_by_parts(n: int, monkeypatch):
    predictor, sizes = models.classifier(), []
    photos = list(RNG.integers(0, 256, (n, 9, 12, 3), np.uint8))
    monkeypatch.setattr(cores, "cores", lambda: 1)
    whole = predictor(photos)["logits"]
    by_parts = cores.by_parts

    def counted(function, batch, n, **options):
        sizes.append((n, len(batch["image"])))
        return by_parts(function, batch, n, **options)

    monkeypatch.setattr(cores, "by_parts", counted)
    monkeypatch.setattr(cores, "cores", lambda: 4)
    np.testing.assert_allclose(predictor(photos)["logits"], whole, atol=1e-6)
    assert sizes == {1: [(1, 2)], 5: [(3, 6)], 8: [(4, 8)], 11: [(4, 8), (2, 4)]}[n]  # padding alone is not computed


def test_evaluators_sum_and_list_the_same_by_parts(monkeypatch):
    devices = parallel.Pmap()
    x, w = RNG.standard_normal((8, 3)).astype(np.float32), devices.place(RNG.standard_normal(3).astype(np.float32))
    batch = devices.send({"x": x, "valid": np.array([True] * 7 + [False])})
    rows = devices.eval_examples(lambda w, batch: {"y": batch["x"] @ w})
    sums = devices.eval_sums(lambda w, batch: {"y": (batch["x"] @ w * batch["valid"]).sum(), "seen": batch["valid"].sum()})

    def found(count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        monkeypatch.setattr(cores, "cores", lambda: count)
        return devices.gather(rows(w, batch))["y"], devices.read(sums(w, batch))

    (y, total), (y_by_parts, total_by_parts) = found(1), found(4)
    np.testing.assert_allclose(y_by_parts, y, atol=1e-6)
    np.testing.assert_allclose(total_by_parts["y"], total["y"], atol=1e-5)
    assert total_by_parts["seen"] == total["seen"] == 7
