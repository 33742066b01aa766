"""A head and a dataset meet by name: every column goes to its class, and what does not match is said."""

import logging

import numpy as np
import pytest

from tests.models import small
from vit_jax import checkpoint
from vit_jax.checkpoint import classes
from vit_jax.errors import UserError

DIGITS = [str(i) for i in range(10)]
WORDNET = ["n01440764", "n01443537", "n01484850"]


@pytest.mark.parametrize(
    ("head", "dataset", "expected", "level", "said"),
    [
        (["cat", "dog"], ["cat", "dog"], (0, 1), None, ""),
        (["dog", "cat"], ["cat", "dog"], (1, 0), logging.INFO, "another order"),
        (["Great  white_shark", "TENCH"], ["tench", "great-white shark"], (1, 0), logging.INFO, "another order"),
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], ["goldfish", "tinca tinca"], (1, 0), logging.INFO, "order"),
        (["LABEL_0", "LABEL_1"], ["cat", "dog"], (0, 1), logging.WARNING, "their order is trusted"),
        (["class 0", "class 1"], ["cat", "dog"], (0, 1), logging.WARNING, "their order is trusted"),
        (["tench", "goldfish", "shark"], WORDNET, (0, 1, 2), logging.WARNING, "their order is trusted"),
        (["Vo\u0308gel", "Hunde"], ["hunde", "V\u00f6gel"], (1, 0), logging.INFO, "another order"),  # as macOS writes it
        (list(reversed(DIGITS)), DIGITS, tuple(reversed(range(10))), logging.INFO, "another order"),
    ],
)
def test_each_class_finds_its_column(caplog, head, dataset, expected, level, said):
    with caplog.at_level(logging.INFO, "vit_jax"):
        assert classes.match_classes(head, dataset, where="x.npz") == expected
    assert [r.levelno for r in caplog.records] == ([] if level is None else [level])
    assert said in caplog.text


@pytest.mark.parametrize(
    ("head", "dataset", "complaint"),
    [
        (
            ["cat", "dog"],
            ["cow", "dog"],
            "x knows the classes cat, dog, the .* cow, dog: 1 .* 1 only there .cat., 1 only here .cow.",
        ),
        (["cat", "dog"], ["cow", "eel"], "0 are the same by name, 2 only there .cat, dog., 2 only here .cow, eel."),
        (["LABEL_0", "LABEL_1"], ["cat", "dog", "eel"], "0 are the same by name"),
        (["cat", "dog", "eel", "fox"], ["fox", "cat"], "2 are the same by name, 2 only there .dog, eel.;"),
        (["LABEL_1", "LABEL_0"], ["cat", "dog"], "0 are the same by name"),  # ids, but not in their order
        (["crane", "crane", "dog"], ["crane", "dog"], "only there .crane, crane., 1 only here .crane"),  # which of the two?
        (["cat", "dog"], ["Cat", "cat"], "one class for several of the dataset's, such as Cat"),
        (["a\nb"], ["c"], r"a\\nb"),
    ],
)
def test_what_does_not_match_is_an_error_with_names(head, dataset, complaint):
    with pytest.raises(UserError, match=complaint):
        classes.match_classes(head, dataset, where="x")


def test_the_same_classes_in_another_order_are_not_the_same():
    classes.check_same(DIGITS, DIGITS, where="x")
    with pytest.raises(UserError, match="x knows the classes dog, cat, the dataset has cat, dog: .* in the same order"):
        classes.check_same(["dog", "cat"], ["cat", "dog"], where="x")


@pytest.mark.parametrize("classifier", ["token", "distilled"])
def test_the_columns_of_a_kept_head_follow_the_dataset(tmp_path, classifier):
    """Logits of the model are those of the file, in another order."""
    images, columns = small.random_images(16, 24), (5, 0, 3, 6, 1, 4, 2)
    model = small.vit(classifier=classifier)
    params = small.random_params(model, images)
    checkpoint.save(params, tmp_path / "a.npz")
    how = {"init_params": params, "model_config": {}, "grid": (2, 3), "keep_head": True, "columns": columns}
    kept = checkpoint.load_pretrained(pretrained_path=tmp_path / "a.npz", **how)
    expected = np.asarray(small.apply(model, params, images))[:, list(columns)]
    np.testing.assert_allclose(small.apply(model, kept, images), expected, atol=1e-6, rtol=0)
