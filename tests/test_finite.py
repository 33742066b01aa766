"""An output that holds NaN or infinity is no answer, and is said to be none."""

import numpy as np
import pytest

from vit_jax import finite
from vit_jax.errors import UserError


def test_rows_that_are_not_finite_are_found_and_counted():
    x = np.zeros((5, 2, 3), np.float32)
    x[1, 1, 2], x[4, 0, 0] = np.nan, -np.inf
    y = np.zeros(5, np.float16)
    y[2] = np.inf
    outputs = {"map": x, "logits": y, "index": np.arange(5)}
    np.testing.assert_array_equal(finite.finite_rows(outputs), [True, False, False, True, False])
    finite.check_outputs({"index": np.arange(2), "logits": y[:2]}, "model.npz")
    with pytest.raises(UserError, match=r"model.npz gives NaN or infinity for 3 of 5 examples, which is no answer"):
        finite.check_outputs(outputs, "model.npz")
