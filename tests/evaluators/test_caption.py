"""Scores of sentences against pycocoevalcap's, and attention in boxes against pixels counted by hand."""

import jax
import numpy as np
import pytest

from tests.tasks import test_contract
from vit_jax.errors import UserError
from vit_jax.evaluators import caption, grounding, sentence_scores
from vit_jax.run import experiment as experiments
from vit_jax.settings import Settings

WRITTEN = ("a dog runs on the beach", "two men are playing football", "a cat", "people eat at a long table in a kitchen")
REFERENCES = (
    ("a brown dog is running on the beach", "a dog runs along the sea"),
    ("two men playing football on a field", "men are playing a game"),
    ("a cat sleeps on a sofa", "a sleeping cat"),
    ("several people sit at a table and eat", "people eat in a kitchen"),
)


def test_scores_are_those_of_pycocoevalcap():
    """Numbers of its version 1.2, for these words. By hand it was compared on 200 random sets: the same to 1e-15."""
    found = sentence_scores.scores([x.split() for x in WRITTEN], [[t.split() for t in truths] for truths in REFERENCES])
    expected = {
        "BLEU_1": 0.9090909090082645,
        "BLEU_2": 0.810287391262908,
        "BLEU_3": 0.5724488745250647,
        "BLEU_4": 6.426201779917675e-05,
        "ROUGE_L": 0.7299804863406678,
        "CIDEr": 2.6649518048220795,
    }
    assert found == pytest.approx(expected, rel=1e-12)
    same = [[truth.split()] for truth, _ in REFERENCES]
    assert sentence_scores.scores([truths[0] for truths in same], same) == pytest.approx(
        dict.fromkeys(expected, 1.0) | {"CIDEr": 10.0}
    )
    nothing = sentence_scores.scores([[], []], [[["a", "cat"]], [["two", "dogs"]]])
    assert max(nothing.values()) < 1e-6


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("A man isn't riding the dog's 2-wheeled bike, at 10:30...", "a man is n't riding the dog 's 2-wheeled bike at 10:30"),
        ("Can't you cannot; they're 'here' & there", "ca n't you can not they 're here & there"),
        ("the women’s T-shirts at 5 o'clock -- 1,000 people's", "the women 's t-shirts at 5 o'clock 1,000 people 's"),
        ("a naïve café\n", "a naïve café"),
    ],
)
def test_words_are_those_of_the_tokenizer_in_java(sentence, words):
    """As stanford-corenlp 3.4.1 takes these sentences apart, whose punctuation pycocoevalcap leaves out."""
    assert sentence_scores.words_of(sentence) == words.split()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """(experiment on 7 images, parameters of a model that writes several words), shared by what is scored."""
    e = experiments.build(Settings.from_config(test_contract.caption(tmp_path_factory.mktemp("caption"))))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.5, x.shape).astype(np.float32), jax.device_get(e.init_params()))
    return e, params


def test_every_image_is_scored_once_by_its_own_sentences(experiment):
    e, params = experiment
    metrics, _ = caption.make_score(e, e.test_source)(e.parallelism.place(params))
    images = np.stack([example["image"] for example in e.test_source]).astype(np.float32)
    outputs = jax.device_get(jax.jit(e.task.predict)(params, {"image": images}))
    written = e.task.write(outputs)
    assert len({one.text for one in written}) > 1
    words = [one.text.split() for one in written]
    truths = [[text.split() for text in e.test_source.texts(i)] for i in range(7)]
    assert metrics == {"exact_match": 0.0} | sentence_scores.scores(words, truths)
    np.testing.assert_allclose(outputs["attention"].sum(axis=(2, 3)), 1, atol=1e-5)


def test_attention_in_a_box_is_what_pixels_say(experiment):
    rng = np.random.default_rng(0)
    attention = rng.random((3, 4))
    pixels = np.kron(attention, np.ones((20, 10))) / attention.sum() / 200
    assert grounding.share(attention, np.array([7 / 40, 13 / 60, 31 / 40, 44 / 60])) == pytest.approx(pixels[13:44, 7:31].sum())
    assert grounding.share(attention, np.array([0, 0, 1, 1])) == pytest.approx(1)
    # A model that names nothing in the pictures looks at nothing that it names.
    e, params = experiment
    found = grounding.make_evaluator(e)(e.parallelism.place(params))
    assert set(found) == {"attention_in_box", "box_area"} and all(0 <= x < 1 for x in found.values())


def test_what_has_no_sentences_or_boxes_is_named(experiment):
    e, _ = experiment
    with pytest.raises(UserError, match="no sentences"):
        caption.make_evaluator(e, dataset="digits")
    with pytest.raises(UserError, match="no boxes"):
        grounding.make_evaluator(e, dataset="digit_sentences")
