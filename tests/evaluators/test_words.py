"""Zero-shot accuracy and retrieval: against plain NumPy, several captions an image, on one and several devices."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs import common
from tests import many_devices, towers
from vit_jax.errors import UserError
from vit_jax.evaluators import make, retrieval
from vit_jax.predictor import load
from vit_jax.run import experiment as experiments
from vit_jax.settings import Settings

CLASSES = ("red_cat", "blue_dog", "dog")
SENTENCES = ["a red cat", "the blue dog", "dog", "a photo", "small cat of the dog"]


def make_folders(folder):
    """Seven captioned images with one to three sentences each, some of them shared, and ten in folders of classes."""
    rng = np.random.default_rng(0)
    for i in range(7):
        (folder / "pairs").mkdir(exist_ok=True, parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "pairs" / f"{i}.png")
        texts = [SENTENCES[j % 5] for j in range(i, i + 1 + i % 3)]
        (folder / "pairs" / f"{i}.txt").write_text("\n".join(texts))
    for i in range(10):
        place = folder / "classes" / "test" / CLASSES[i % 3] / f"{i}.png"
        place.parent.mkdir(exist_ok=True, parents=True)
        (folder / "classes" / "train" / CLASSES[i % 3]).mkdir(exist_ok=True, parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(place)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "classes" / "train" / CLASSES[i % 3] / "0.png")
    return towers.write(folder / "model")


def config(folder, **overrides):
    c = common.get_config()
    c.model_type, c.model = "TwoTowers", towers.FIELDS
    c.task = {"type": "contrast", "tokenizer": "bert", "vocab": str(folder / "model" / "words.txt"), "max_len": towers.MAX_LEN}
    c.pp.update({"train": "train", "test": "train", "crop": 8})
    c.update({"dataset": str(folder / "pairs"), "trainer": "evaluate", "batch": 8, "batch_eval": 3, "pretrained_dir": ""})
    c.update(overrides)
    return c


OPTIONS = {
    "retrieval": {"k": (1, 2, 3)},
    "zeroshot": {"split": "test", "templates": "a {}"},
    "named": {"type": "zeroshot", "split": "test", "labels": "a cat,blue,the"},
}


def measured(folder, parallelism="pmap"):
    """All metrics, by the evaluators."""
    experiment = experiments.build(Settings.from_config(config(folder, parallel=parallelism)))
    params, found = experiment.parallelism.place(load(folder / "model").params), {}
    for name, options in OPTIONS.items():
        more = {} if name == "retrieval" else {"dataset": str(folder / "classes")}
        found |= make(name, options | more, experiment)(params)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def expected(folder):
    """The definitions, in loops over embeddings that are computed in one piece."""
    params = make_folders(folder)
    read = lambda path: np.asarray(Image.open(path), np.float32) / 127.5 - 1  # noqa: E731
    embed = lambda texts: towers.embeddings(params, tokens=towers.tokens(texts)).astype(np.float64)  # noqa: E731
    images = np.stack([read(folder / "pairs" / f"{i}.png") for i in range(7)])
    zimg = towers.embeddings(params, images=images).astype(np.float64)
    captions = [(folder / "pairs" / f"{i}.txt").read_text().split("\n") for i in range(7)]
    texts = sorted({text for own in captions for text in own})
    score = dict(zip(texts, (embed(texts) @ zimg.T), strict=True))
    found = {}
    for k in (1, 2, 3):
        hits = [any(t in captions[i] for t in sorted(texts, key=lambda t: -score[t][i])[:k]) for i in range(7)]  # noqa: B023
        found[f"image_to_text_{k}"] = np.mean(hits)
        hits = [any(t in captions[j] for j in np.argsort(-score[t])[:k]) for own in captions for t in own]
        found[f"text_to_image_{k}"] = np.mean(hits)
    files = [(i, path) for i, name in enumerate(sorted(CLASSES)) for path in (folder / "classes" / "test" / name).iterdir()]
    zimg = towers.embeddings(params, images=np.stack([read(path) for _, path in files])).astype(np.float64)
    truth = np.array([i for i, _ in files])
    for name, labels in (("zeroshot", ["a blue dog", "a dog", "a red cat"]), ("named/zeroshot", ["a cat", "blue", "the"])):
        found[name] = np.mean((zimg @ embed(labels).T).argmax(1) == truth)
    return found


@pytest.mark.parametrize("parallelism", ["pmap", "mesh"])
def test_metrics_are_exactly_those_of_numpy(parallelism, folder, expected):
    found = measured(folder, parallelism)
    assert {name: round(x, 12) for name, x in found.items()} == {name: round(x, 12) for name, x in expected.items()}
    assert 0 < found["text_to_image_1"] < 1 and 0 < found["zeroshot"] < 1


def test_four_devices_measure_the_same(folder, expected):
    out = folder / "four.npz"
    child = many_devices.start("tests.evaluators.test_words", str(folder), str(out), devices=4)
    assert child.wait(timeout=120) == 0
    assert {name: round(float(x), 12) for name, x in np.load(out).items()} == {n: round(x, 12) for n, x in expected.items()}


def test_ties_count_as_wrong_and_what_is_shared_is_right_for_all():
    same = np.ones((4, 2), np.float32)
    pairs = np.array([(i, i) for i in range(4)])
    assert set(retrieval.recalls(same, same, pairs, (1, 3)).values()) == {0.0}
    one_text = np.array([(i, 0) for i in range(4)] + [(3, 1)])
    found = retrieval.recalls(same, np.float32([[1, 1], [0, 1]]), one_text, (1, 2, 4))
    assert found == {"image_to_text_1": 1.0, "text_to_image_1": 0.8, "text_to_image_2": 0.8}


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    zimg, ztxt = rng.normal(size=(2, 50, 4)).astype(np.float32)
    pairs = np.stack([rng.integers(0, 50, 120), rng.integers(0, 50, 120)], axis=1)
    pairs = np.concatenate([pairs, np.stack([np.arange(50)] * 2, axis=1)])
    whole = retrieval.recalls(zimg, ztxt, pairs)
    monkeypatch.setattr(retrieval, "_CELLS", 170)
    assert retrieval.recalls(zimg, ztxt, pairs) == whole and len(whole) == 6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zeroshot", {}, "has no class, by which this evaluator scores"),
        ("zeroshot", {"dataset": "classes", "split": "test", "labels": "a,b"}, "labels=a,b are 2, and .* one of 3 classes"),
        ("zeroshot", {"dataset": "classes", "split": "test", "templates": "imagnet"}, "did you mean imagenet"),
        ("retrieval", {"dataset": "classes", "split": "test"}, "has no sentences"),
        ("retrieval", {"k": (0,)}, "all must be positive"),
    ],
)
def test_what_is_refused(name, options, message, folder, expected):
    experiment = experiments.build(Settings.from_config(config(folder)))
    options = options | ({"dataset": str(folder / "classes")} if "dataset" in options else {})
    with pytest.raises(UserError, match=message):
        make(name, options, experiment)


def test_a_task_without_texts_is_refused(folder, expected):
    c = config(folder)
    c.task.vocab = ""
    with pytest.raises(UserError, match="config.evaluators.retrieval: this task reads no texts"):
        make("retrieval", {}, experiments.build(Settings.from_config(c)))


if __name__ == "__main__":
    import sys
    from pathlib import Path

    assert jax.device_count() == 4
    np.savez(sys.argv[2], **measured(Path(sys.argv[1])))
