"""Captioning: what is read and what counts, the loss against one written plainly, words of a sentence, and errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from tests.tasks import test_contract
from vit_jax import predict
from vit_jax.data.digit_pairs import VOCAB
from vit_jax.data.host import text
from vit_jax.data.sources import get_source
from vit_jax.errors import UserError
from vit_jax.run import experiment as experiments
from vit_jax.settings import Settings
from vit_jax.tasks import caption
from vit_jax.tasks.task import Context
from vit_jax.train import train_and_evaluate

WORDS = text.make("bert", VOCAB, 8)


class Ending(text.BertTokenizer):
    """As SentencePiece: nothing in front, a stop token behind."""

    start_token, stop_token = None, 3


def experiment(tmp_path, **task):
    config = test_contract.caption(tmp_path)
    config.task.update(task)
    return experiments.build(Settings.from_config(config))


def test_pairs_of_digits_say_what_is_where():
    source, part = get_source("digit_pairs", "train"), get_source("digit_pairs", "train[5:]")
    assert len(source) == 20_000 and part[1]["text"] == source[6]["text"] and part.where(1) == source.where(6)
    names, relations = source.features["boxes"].names, set()
    for i in range(40):
        example = source[i]
        (sentence,), (left, top, right, bottom) = example["text"], example["boxes"].T
        article, first, *relation, second_article, second = sentence.split()
        assert [first, second] == [names[label] for label in example["box_labels"]]
        assert article == ("an" if first == "eight" else "a") and second_article == ("an" if second == "eight" else "a")
        relations.add(" ".join(relation))
        assert right[0] < left[1] if "left of" in sentence else bottom[0] < top[1]
        assert (left >= 0).all() and (top >= 0).all() and (right <= 32).all() and (bottom <= 32).all()
        gray = example["image"].mean(axis=-1)
        assert gray.shape == (32, 32) and np.median(gray) < gray.mean()  # bright on dark
        assert 1 not in WORDS([sentence])  # no unknown word
    assert relations == {"left of", "above"}


def test_the_decoder_reads_one_place_behind_what_it_writes_and_one_stop_counts():
    tokens = jnp.array([[2, 5, 6, 0, 0], [2, 7, 8, 9, 10]])
    read, targets, counts = caption.shifted(tokens, WORDS)
    np.testing.assert_array_equal(read, [[2, 5, 6, 0], [2, 7, 8, 9]])
    np.testing.assert_array_equal(targets, [[5, 6, 0, 0], [7, 8, 9, 10]])
    np.testing.assert_array_equal(counts, [[1, 1, 1, 0], [1, 1, 1, 1]])
    read, targets, counts = caption.shifted(jnp.array([[5, 3, 3]]), Ending(VOCAB, 3))
    np.testing.assert_array_equal(read, [[0, 5, 3]])
    np.testing.assert_array_equal(targets, [[5, 3, 3]])
    np.testing.assert_array_equal(counts, [[1, 1, 0]])


def test_the_loss_is_the_smoothed_cross_entropy_of_all_words_of_the_batch(tmp_path):
    config = test_contract.caption(tmp_path)
    config.label_smoothing = 0.1
    config.task.update({"doubly_stochastic": 0.0, "parallel": 0.0})
    e = experiments.build(Settings.from_config(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), jax.device_get(e.init_params()))
    examples = [e.task.train_example(e.train_source[i], rng=rng, exif_rotated=False) for i in range(5)]
    batch = {name: np.stack([x[name] for x in examples]) for name in examples[0]} | {"seed": np.arange(5, dtype=np.uint32)}
    totals = e.task.totals(batch)
    context = Context(step=0, frozen={}, ema=None, carry={}, totals=totals, devices=None)
    loss = jax.jit(lambda params: e.task.loss(params, context, batch, jax.random.key(0)))(params)
    images, tokens = batch["image"].astype(np.float32) / 127.5 - 1, batch["tokens"].astype(np.int32)
    logits = jax.jit(e.task.model.module.apply)({"params": params}, images, tokens[:, :-1])
    smooth = optax.smooth_labels(jax.nn.one_hot(tokens[:, 1:], logits.shape[-1]), 0.1)
    each = optax.softmax_cross_entropy(logits, smooth)
    lengths = [int((row[1:] != 0).sum()) + 1 for row in tokens]
    assert totals["tokens"] == sum(lengths)
    expected = sum(float(row[:n].sum()) for row, n in zip(each, lengths, strict=True)) / sum(lengths)
    np.testing.assert_allclose(loss.value, expected, rtol=1e-5)


def test_words_know_the_places_of_their_tokens():
    class Pieces(text.BertTokenizer):
        def decode(self, tokens):
            return "".join((" foot", "ball", " is", " fun", "!")[i] for i in tokens).strip()

    assert caption.by_word([0, 1, 2, 3, 4], Pieces(VOCAB, 8)) == [("football", [0, 1]), ("is", [2]), ("fun!", [3, 4])]
    assert caption.by_word([], WORDS) == []
    assert [word for word, _ in caption.by_word(WORDS(["a three left of"])[0][1:5], WORDS)] == ["a", "three", "left", "of"]


def test_what_cannot_be_is_said_before_anything_runs(tmp_path):
    for options, message in (
        ({"vocab": "no.txt"}, "no.txt"),
        ({"tokenizer": ""}, "tokenizer and max_len are not set"),
        ({"max_len": 99}, "more than the 8 places"),
        ({"parallel": 1.5}, "from 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            experiment(tmp_path, **options)
    config = test_contract.caption(tmp_path)
    config.model.vocabulary = 10
    with pytest.raises(UserError, match=r"config\.model\.vocabulary=19"):
        experiments.build(Settings.from_config(config))
    config.model.mask_token = False
    with pytest.raises(UserError, match="mask_token=True"):
        experiments.build(Settings.from_config(config))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a captioner that was trained for a step."""
    folder = tmp_path_factory.mktemp("caption")
    config = test_contract.config("caption", folder, total_steps=1, eval_every=1)
    config.task.update({"parallel": 0.0, "doubly_stochastic": 0.0, "beams": 1})
    train_and_evaluate(config, folder / "run")
    return folder / "run"


def test_predict_prints_a_sentence_and_draws_where_each_word_came_from(trained, tmp_path, capsys):
    assert (trained / VOCAB.name).read_text() == VOCAB.read_text()
    Image.fromarray(get_source("digit_pairs", "test")[0]["image"]).save(tmp_path / "pair.png")
    assert predict.main([f"--model={trained}", "--json", f"--draw={tmp_path / 'drawn'}", str(tmp_path / "pair.png")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"image", "caption", "score"} and isinstance(said["caption"], str)
    drawn = Image.open(tmp_path / "drawn" / "0_pair.png")
    assert drawn.width > 2 * 150 or not said["caption"].split()
    (trained / VOCAB.name).rename(tmp_path / "away.txt")
    with pytest.raises(UserError, match="needs the vocabulary"):
        predict.main([f"--model={trained}", str(tmp_path / "pair.png")])
    assert predict.main([f"--model={trained}", f"--vocab={tmp_path / 'away.txt'}", str(tmp_path / "pair.png")]) == 0
    (tmp_path / "away.txt").rename(trained / VOCAB.name)


def test_a_captioner_starts_from_a_captioner_or_from_a_vit(trained, tmp_path):
    from vit_jax.checkpoint import open_checkpoint
    from vit_jax.checkpoint.segmenters import backbone_of

    e = experiment(tmp_path)
    fresh = jax.device_get(e.init_params())
    opened = open_checkpoint(trained)
    whole = e.task.load({"": opened}, fresh)
    np.testing.assert_array_equal(whole["embedding"], opened.flat["embedding"])
    np.testing.assert_array_equal(whole["backbone"]["embedding"]["kernel"], opened.flat["backbone/embedding/kernel"])
    vit = e.task.load({"": backbone_of(opened)}, fresh)
    np.testing.assert_array_equal(vit["backbone"]["embedding"]["kernel"], opened.flat["backbone/embedding/kernel"])
    np.testing.assert_array_equal(vit["embedding"], fresh["embedding"])
