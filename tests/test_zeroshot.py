"""Any words as classes: against NumPy, softmax and sigmoid, from the command line, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests import towers
from tests.checkpoint import test_image_text, test_texts
from tests.checkpoint.peers import randomise, torch_peer
from tests.test_predict import write_model
from vit_jax import predict, predictor, zeroshot
from vit_jax.errors import UserError
from vit_jax.tasks import prompts

LABELS = ["red cat", "blue dog", "dog"]
TEMPLATES = ["a {}", "a photo of the {}", "{}"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{head: (workdir, parameters)}"""
    folder = tmp_path_factory.mktemp("towers")
    return {head: (folder / head, towers.write(folder / head, head=head)) for head in ("softmax", "sigmoid")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of five photos, and what the model sees of them."""
    folder = tmp_path_factory.mktemp("photos")
    pictures = np.random.default_rng(1).integers(0, 256, (5, *towers.SIZE, 3), np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder, pictures.astype(np.float32) / 127.5 - 1


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def expected(params, images, head, templates):
    """Probabilities, in float64."""
    sentences = [[template.replace("{}", label) for template in templates] for label in LABELS]
    ztxt = np.stack([unit(unit(towers.embeddings(params, tokens=towers.tokens(row))).mean(0)) for row in sentences])
    logits = np.exp(params["t"]) * (towers.embeddings(params, images=images) @ ztxt.T).astype(np.float64)
    if head == "sigmoid":
        return 1 / (1 + np.exp(-(logits + params["b"])))
    exp = np.exp(logits)
    return exp / exp.sum(1, keepdims=True)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_probabilities_are_those_of_numpy(head, models, photos):
    workdir, params = models[head]
    folder, images = photos
    model = vit_jax.load(workdir, batch_size=2)
    together = model.embed_images(sorted(folder.iterdir())) @ model.embed_texts(LABELS).T
    assert together.shape == (5, 3) and abs(together).max() < 1
    for templates in ["{}"], TEMPLATES:
        classifier = model.with_labels(LABELS, templates=templates)
        found = classifier.probabilities(sorted(folder.iterdir()))
        assert classifier.class_names == tuple(LABELS) and found.std(axis=0).min() > 1e-3
        np.testing.assert_allclose(found, expected(params, images, head, templates), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("kind", "length"), [("CLIP", 9), ("Siglip", 12)])
def test_a_folder_of_transformers_is_scored_as_there(kind, length, tmp_path):
    """Model, tokenizer and image processor, each saved by its own class."""
    torch_peer("transformers")
    import torch
    import transformers

    tokenizer = (test_texts.clip if kind == "CLIP" else test_texts.siglip)(tmp_path)
    image, words = (test_image_text.CASES[f"{kind}Model"][name] for name in ("vision_config", "text_config"))
    fields = {"vision_config": image, "text_config": words | {"vocab_size": len(tokenizer), "max_position_embeddings": length}}
    if kind == "CLIP":
        fields["text_config"]["eos_token_id"] = tokenizer.eos_token_id
    cls = getattr(transformers, f"{kind}Model")
    model = randomise(cls(cls.config_class(**fields)))
    size = {"height": image["image_size"], "width": image["image_size"]}
    options = {"size": size, "crop_size": size, "do_convert_rgb": True}
    processor = getattr(transformers, f"{kind}ImageProcessor")(**options)
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 21, 21, 3), np.uint8))
    labels = ["a cat", "a photo of the snow", "a dog"]
    inputs = tokenizer(labels, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]
    pixels = processor([Image.fromarray(x) for x in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(input_ids=inputs, pixel_values=pixels).logits_per_image
    probabilities = (logits.softmax(dim=-1) if kind == "CLIP" else logits.sigmoid()).numpy()
    found = vit_jax.load(tmp_path).with_labels(labels).probabilities(pictures)
    assert probabilities.std(axis=1).min() > 1e-4
    np.testing.assert_allclose(found, probabilities, rtol=1e-5, atol=1e-6)


def test_predict_and_zeroshot_are_the_same_command(models, photos, capsys, tmp_path):
    (workdir, params), (folder, images) = models["softmax"], photos
    (tmp_path / "names.txt").write_text("\ufeffred cat\r\nblue dog\r\ndog\r\n\r\n")
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    common = [f"--model={workdir}", f"--templates={tmp_path / 'templates.txt'}", "--json", str(folder)]
    assert zeroshot.main(["--labels=red cat, blue dog,dog", *common]) == 0
    lines = capsys.readouterr().out
    assert predict.main([f"--labels={tmp_path / 'names.txt'}", "--top=1", *common]) == 0
    best = [json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines()]
    assert best == [json.loads(line)["predictions"][:1] for line in lines.splitlines()]
    rows = [json.loads(line)["predictions"] for line in lines.splitlines()]
    by_index = np.array([[p["probability"] for p in sorted(row, key=lambda p: p["index"])] for row in rows])
    np.testing.assert_allclose(by_index, expected(params, images, "softmax", TEMPLATES), atol=2e-6, rtol=0)


def test_texts_are_embedded_in_parts_and_cutting_is_said_once_with_a_count(models, caplog):
    loaded, texts = predictor.load(models["softmax"][0]), [f"{'a ' * (i % 5)}{towers.WORDS[5 + i % 9]}" for i in range(70)]
    texts += ["dog " * 99, "a photo of the red cat"]
    whole = towers.embeddings(models["softmax"][1], tokens=towers.tokens(texts))
    np.testing.assert_allclose(loaded.embed_texts(texts), whole, atol=1e-6)
    loaded.embed_texts(["dog " * 99] * 64)
    assert [r.getMessage() for r in caplog.records if "cut" in r.getMessage()] == [
        "text     2 of 72 texts are longer than the 6 tokens that the model reads: their ends are cut (said once)"
    ]
    with pytest.raises(UserError, match="text 2 of 2 is empty"):
        loaded.embed_texts(["dog", " "])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("a,A", "--labels: given more than once: a:"),
        ("a,,b", "label 2 is empty"),
        ("", "there are no labels"),
        (" , ", "there are no labels"),
        ("a", "'a' is the only label, and of a softmax"),
        ("none.txt", "--labels=none.txt: no such file"),
        ("empty.txt", "empty.txt: there are no labels"),
        ("latin.txt", "latin.txt is no text in UTF-8"),
    ],
)
def test_labels_that_are_refused(labels, message, models, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=message):
        zeroshot.main([f"--model={models['softmax'][0]}", f"--labels={labels}", str(photos[0])])


def test_templates_and_models_that_are_refused(models, photos, tmp_path):
    workdir, folder = models["softmax"][0], photos[0]
    run = lambda *arguments, model=workdir: predict.main([f"--model={model}", *arguments, str(folder)])  # noqa: E731
    (tmp_path / "words.txt").write_text("a {}\nb")
    for templates, message in (
        ("imagnet", "unknown templates 'imagnet': did you mean imagenet"),
        (tmp_path / "words.txt", r"template 2, 'b', has no \{\}"),
        ("a/b", "--templates=a/b: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            run("--labels=a,b", f"--templates={templates}")
    with pytest.raises(UserError, match="--templates=cifar needs --labels"):
        run("--templates=cifar")
    with pytest.raises(UserError, match="no vocabulary|none.txt"):
        run("--labels=a,b", f"--vocab={tmp_path / 'none.txt'}")
    write_model(tmp_path / "model.npz")
    with pytest.raises(UserError, match="is a ViT, which reads no texts"):
        run("--labels=a,b", model=tmp_path)


def test_names_of_datasets_become_words():
    assert [len(prompts.read_labels(name)) for name in ("imagenet", "cifar10", "cifar100")] == [1000, 10, 100]
    for name in prompts.LABELS:
        prompts.check_labels(prompts.read_labels(name))
    for templates in prompts.TEMPLATES.values():
        prompts.check_templates(templates)
    assert prompts.readable(["tench, Tinca tinca", "palm_tree"]) == ("tench", "palm tree")
    assert prompts.readable([f"n{i:08d}" for i in range(1000)])[:2] == ("tench", "goldfish")
    assert prompts.read_templates("a photo of {}") == ("a photo of {}",)
