"""Every recipe takes one step of its own, shrunk to a model of 1 block of width 16 and to small images.

Every model starts with a head of zeros: its first loss is known, and so is how far a first step of Adam moves the head.
Through zeros no gradient passes, so that in fine-tuning the first step must change the head and no other bit of what the
checkpoint file held, whose grid of positions is another one. Those of `detect` and `segment:linear` are in
tasks/test_contract.py.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from PIL import Image

from configs import (
    augreg,
    augreg_pretrain,
    caption,
    clip,
    common,
    deit3,
    detect_vit,
    detr_r50,
    dinov2,
    distill,
    gsam,
    inference_time,
    lit,
    lora_finetune,
    mae,
    mixer_base16_cifar10,
    mixer_i1k,
    photos,
    pretrain,
    sam,
    segment,
    siglip,
    small_data,
    transfer,
    vit,
    vit_i1k,
    vit_i21k,
    vit_s16_i1k,
)
from tests import command_line, tiny
from tests.data import toy_tfds
from vit_jax import checkpoint, models, tokenizer
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.optimize import trainable
from vit_jax.run import experiment, start
from vit_jax.settings import Settings
from vit_jax.tools import plan
from vit_jax.train import train_and_evaluate

CONFIGS = Path(common.__file__).parent
ENCODER = {"num_layers": 1, "mlp_dim": 16, "num_heads": 2}
MIXER = {"hidden_dim": 16, "num_blocks": 1, "tokens_mlp_dim": 16, "channels_mlp_dim": 16}
HEAD, HEAD_BIAS = "img/head/kernel", "img/head/bias"
STEM = "R_Ti_16-i21k-300ep-lr_0.001-aug_{}-wd_0.03-do_0.0-sd_0.0"
SMALL = {"batch": 8, "batch_eval": 8, "total_steps": 1, "warmup_steps": 0, "prefetch": 1, "report": False}
DATA = {"train": "train[:8]", "test": "test[:5]"}


def test_every_recipe_is_here():
    recipes = {path.stem for path in CONFIGS.glob("*.py")} - {"common", "models"}
    assert all(any(name in test for test in globals() if test.startswith("test_")) for name in recipes), recipes


def in_little_steps(config: ConfigDict, **pp):
    """On a few examples; micro-batches where the recipe has them."""
    config.update(SMALL | {"accum_steps": min(config.accum_steps, 2), "pp": DATA | pp})


def small(config: ConfigDict, *, dataset: str = "digits", **model) -> ConfigDict:
    """The recipe with a small model and little data, as overrides on the command line would make it."""
    config.dataset = dataset
    in_little_steps(config, crop=32)
    if "transformer" in config.model:  # no Mixer, and not left to the checkpoint
        config.model.hidden_size = 16
        config.model.transformer.update(ENCODER)
    config.model.update(model)
    return config


def published(config: ConfigDict, path: Path, *, side: int, classes: int = 7) -> dict[str, np.ndarray]:
    """Writes random parameters of the recipe's model at `side` px; returns them by name."""
    model = models.build(config.model_type, {**config.model.to_dict(), "num_classes": classes})
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, side, side, 3), np.float32))["params"]
    rng = np.random.default_rng(0)
    checkpoint.save(jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes), path)
    return dict(np.load(path))


def without_randaug(config: ConfigDict) -> ConfigDict:
    """It takes seconds to compile: `vit_s16_i1k` has it here, which is enough."""
    config.augment.randaug = ()
    return config


def first_step_from_nothing(config: ConfigDict, workdir: Path, *, loss: float):
    """Takes the step and checks the loss of a head of zeros, and a rate of the head that Adam's first step makes visible."""
    train_and_evaluate(config, workdir)
    assert tiny.metrics(workdir, "train_loss")[1] == pytest.approx(loss, abs=1e-4)
    arrays = tiny.arrays(workdir)
    assert np.abs(arrays["head/kernel"]).max() == pytest.approx(config.base_lr, rel=1e-2)
    assert all(np.isfinite(x).all() for x in arrays.values())
    assert 0 <= tiny.metrics(workdir, "accuracy_test")[1] <= 1


def assert_only_the_head_changed(workdir: Path, before: dict[str, np.ndarray], classes: int):
    after = tiny.arrays(workdir)
    assert after.keys() == before.keys()
    assert after["head/kernel"].shape[-1] == classes and after["head/kernel"].any()
    for name in before.keys() - {"head/kernel", "head/bias", "Transformer/posembed_input/pos_embedding"}:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert all(np.isfinite(x).all() for x in after.values())
    assert tiny.metrics(workdir, "train_loss")[1] == pytest.approx(np.log(classes), abs=1e-5)
    assert 0 <= tiny.metrics(workdir, "accuracy_test")[1] <= 1


@pytest.mark.parametrize("head", [head for head in segment.HEADS if head != "linear"])
def test_segment_takes_a_step(tmp_path, head):
    config = segment.get_config(head)
    in_little_steps(config)
    config.model.body.vit.update({"hidden_size": 16, "patches": {"size": (16, 16)}})
    del config.model.body.vit.resnet
    config.model.body.vit.transformer.update(ENCODER)
    if head == "segmenter":
        config.model.update({"width": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16})
    if head == "eomt":
        config.model.num_blocks = 1
    train_and_evaluate(config, tmp_path)
    assert np.isfinite(tiny.metrics(tmp_path, "train_loss")[1])
    assert 0 <= tiny.metrics(tmp_path, "mIoU_test")[1] <= 1


def test_caption_takes_a_step_on_digits(tmp_path):
    config = caption.get_config("show_attend_tell,digits")
    in_little_steps(config)
    config.model.body.vit.update({"hidden_size": 16, "patches": {"size": (16, 16)}})
    del config.model.body.vit.resnet
    config.model.body.vit.transformer.update(ENCODER)
    config.model.update({"width": 16, "embedding_dim": 16, "attention_dim": 16})
    config.evaluators = {}
    train_and_evaluate(config, tmp_path)
    assert np.isfinite(tiny.metrics(tmp_path, "train_loss")[1])
    assert 0 <= tiny.metrics(tmp_path, "CIDEr_test")[1] <= 10


@pytest.mark.parametrize("decoder", caption.DECODERS)
def test_captioners_of_the_papers_read_a_vocabulary_that_was_made_of_the_captions(tmp_path, decoder):
    for i, text in enumerate(("A red dog.", "two cats", "a dog and two cats", "a red cat")):
        Image.fromarray(np.full((20, 20, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text)
    assert tokenizer.main([str(tmp_path), str(tmp_path / "words.model"), "--vocab_size=30"]) == 0
    config = caption.get_config(f"{decoder},{tmp_path}")
    config.task.vocab = str(tmp_path / "words.model")
    config.update({"trainer": "train", "pretrained": "", "pp": {"train": "train[:3]", "test": "train[3:]"}})
    e = experiment.build(Settings.from_config(config))
    example = e.task.train_example(e.train_source[0], rng=np.random.default_rng(0), exif_rotated=False)
    assert e.task.preview({name: x[None] for name, x in example.items()}, jax.random.key(0))[1] == ["a red dog."]
    shapes = flatten_dict(jax.eval_shape(e.init_params), sep="/")
    assert shapes["output/kernel"].shape[1] == config.model.vocabulary
    assert ("text_decoder/layer_5/mlp/Dense_0/kernel" in shapes) == (decoder == "cappa")
    assert not any("text_decoder" in name and name.endswith("bias") for name in shapes)


def test_detr_r50_freezes_norms_and_stem():
    config = detr_r50.get_config("dc5")
    model = models.build(config.model_type, {**config.model.to_dict(), "num_classes": 91})
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))["params"]
    names = flatten_dict(shapes, sep="/")
    _, frozen = trainable.split(shapes, freeze=config.freeze)
    expected = {name for name in names if "/bn" in name or name.startswith(("backbone/conv1/", "backbone/layer1_"))}
    assert flatten_dict(frozen, sep="/").keys() == expected


def test_detect_vit_trains_a_decoder_on_a_frozen_vit(tmp_path):
    config = detect_vit.get_config("micro4,digit_scenes")
    in_little_steps(config, crop=32)
    vit_fields = config.model.body.vit
    vit_fields.hidden_size = 16
    vit_fields.transformer.update(ENCODER)
    config.model.update({"width": 16, "num_heads": 2, "mlp_dim": 16, "num_decoder_layers": 1})
    body = ConfigDict({"model_type": "ViT", "model": vit_fields})
    before = published(body, tmp_path / "vit.npz", side=32)
    config.pretrained = str(tmp_path / "vit.npz")
    train_and_evaluate(config, tmp_path / "run")
    after = tiny.arrays(tmp_path / "run")
    for name in before.keys() - {"head/kernel", "head/bias"}:
        np.testing.assert_array_equal(after[f"backbone/{name}"], before[name], err_msg=name)
    assert after["class_embed/kernel"].shape[-1] == 11 and np.isfinite(tiny.metrics(tmp_path / "run", "train_loss")[1])


def test_detect_vit_has_for_scenes_the_vit_that_segment_trains_for_their_masks():
    boxes, masks = detect_vit.get_config("scenes"), segment.get_config()
    assert boxes.model.body.vit == masks.model.body.vit and boxes.pp.crop == masks.pp.crop
    model = models.build(boxes.model_type, {**boxes.model.to_dict(), "num_classes": 10})
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))["params"]
    trained, frozen = trainable.split(shapes, freeze=boxes.freeze)
    assert frozen.keys() == {"backbone"} and "backbone" not in trained


def test_dinov2_trains_a_vit_without_labels(tmp_path):
    config = small(dinov2.get_config("vitl16_short"), patches={"size": (8, 8)})
    config.evaluators = {}
    config.dtype = "float32"
    config.task.update({"local_size": 16, "local_crops": 1, "prototypes": 16, "hidden": 16, "bottleneck": 8})
    config.task.update({"jitter_prob": 0.0, "blur": (0.0,) * 3})  # they take seconds to compile
    with pytest.raises(UserError, match="an image of 8x8 is too small for a crop of 16"):
        train_and_evaluate(config, tmp_path / "digits")
    config.dataset = "digit_canvas"
    train_and_evaluate(config, tmp_path / "canvas")
    assert np.isfinite(tiny.metrics(tmp_path / "canvas", "train_loss")[1])
    assert "head/kernel" not in tiny.arrays(tmp_path / "canvas")


def test_mae_learns_to_draw_and_fine_tuning_starts_from_its_encoder(tmp_path):
    config = small(mae.get_config("b16,imagenet2012"), patches={"size": (8, 8)})
    config.model.decoder.update({"width": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16})
    config.dtype = "float32"
    train_and_evaluate(config, tmp_path / "mae")
    assert 0.5 < tiny.metrics(tmp_path / "mae", "train_loss")[1] < 4  # of patches with variance 1
    tuned = small(vit.get_config("b16,cifar10"), patches={"size": (8, 8)})
    tuned.pretrained = str(tmp_path / "mae")
    settings = Settings.from_config(tuned)
    e = experiment.build(settings, origin=start.find_origin(settings))
    params = start._pretrained_params(e, start.pretrained_paths(settings), keep_head=False)
    before, after = tiny.arrays(tmp_path / "mae"), flatten_dict(params, sep="/")
    assert set(after) == {name for name in before if not name.startswith("decoder/")} | {"head/kernel", "head/bias"}
    for name in before.keys() & after.keys():
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


# Images and words


def test_lit_trains_a_text_tower_for_a_frozen_vit(tmp_path):
    config = lit.get_config()
    in_little_steps(config, crop=32)
    assert set(config.evaluators) == {"zeroshot", "zeroshot_de", "retrieval"}
    config.evaluators = {"zeroshot": config.evaluators.zeroshot}
    config.model.image.update({"hidden_size": 16})
    config.model.image.transformer.update(ENCODER)
    config.model.text.update({"width": 16, **ENCODER})
    config.model.out_dim = (None, 16)
    before = published(ConfigDict({"model_type": "ViT", "model": config.model.image}), tmp_path / "vit.npz", side=32)
    config.pretrained["img"] = str(tmp_path / "vit.npz")
    train_and_evaluate(config, tmp_path / "run")
    after = tiny.arrays(tmp_path / "run")
    assert {name for name in after if name.startswith("img/")} == {f"img/{name}" for name in before} - {HEAD, HEAD_BIAS}
    for name in before.keys() - {"head/kernel", "head/bias"}:
        np.testing.assert_array_equal(after[f"img/{name}"], before[name], err_msg=name)
    assert np.isfinite(tiny.metrics(tmp_path / "run", "train_loss")[1])
    assert 0 <= tiny.metrics(tmp_path / "run", "zeroshot")[1] <= 1
    assert (tmp_path / "run" / "digit_words.txt").exists()


@pytest.mark.parametrize(
    ("recipe", "arg", "count"),
    [
        (lit, "b16b", 195_871_489),
        (lit, "l16ti", 311_913_089),
        (siglip, "b16", 203_155_970),  # as google/siglip-base-patch16-224 has
        (clip, "b32", 151_277_313),  # as OpenAI's
    ],
)
def test_lit_siglip_and_clip_have_the_published_sizes(recipe, arg, count, tmp_path):
    config = recipe.get_config(arg)
    (tmp_path / "words.txt").write_text("[PAD]\n[UNK]\n[CLS]\n")
    config.task = {**config.task, "tokenizer": "bert", "vocab": str(tmp_path / "words.txt"), "tokenizer_options": {}}
    config.pretrained["img"] = ""
    experiment = plan.build(Settings.from_config(config), num_classes=0)
    state = start.abstract_state(experiment)
    trained, frozen = (flatten_dict(x, sep="/") for x in (state.params, state.frozen.get("model", {})))
    assert sum(x.size for x in (trained | frozen).values()) == count
    heads = {name for name in trained if name.startswith("img/")}
    assert heads == {"b16b": {HEAD, HEAD_BIAS}, "l16ti": set()}.get(arg, heads) and bool(frozen) == (recipe is lit)


# From nothing, on the ten digits


SOFTMAX = np.log(10)  # every class is as likely, whatever the targets
SIGMOID = 10 * np.log(2)
DENYING = 10 + 10 * np.log1p(np.exp(-10))  # a bias of -10: 9 classes cost log(1 + e^-10) each, the true one 10 more


def test_vit_s16_i1k(tmp_path: Path):
    config = small(vit_s16_i1k.get_config(), representation_size=16)
    first_step_from_nothing(config, tmp_path, loss=SOFTMAX)
    assert tiny.metrics(tmp_path, "minival/accuracy")[1] >= 0
    assert not any("pos_embedding" in name for name in tiny.arrays(tmp_path))


def test_augreg_pretrain(tmp_path: Path):
    config = augreg_pretrain.get_config("Ti_16-i21k-30ep-lr_0.001-aug_strong2-wd_0.03-do_0.1-sd_0.1")
    config = without_randaug(small(config))
    config.evaluators.minival.split = "test[:3]"
    first_step_from_nothing(config, tmp_path, loss=DENYING)


def test_vit_i1k(tmp_path: Path):
    first_step_from_nothing(small(vit_i1k.get_config("s32,none"), representation_size=16), tmp_path, loss=SOFTMAX)


def test_vit_i21k(tmp_path: Path):
    config = small(vit_i21k.get_config("ti16"))
    config.evaluators = {}
    first_step_from_nothing(config, tmp_path, loss=DENYING)


def test_mixer_i1k(tmp_path: Path):
    config = without_randaug(small(mixer_i1k.get_config(), **MIXER))
    config.evaluators = {}
    first_step_from_nothing(config, tmp_path, loss=SIGMOID)


@pytest.mark.parametrize("recipe", [sam, gsam], ids=["sam", "gsam"])
def test_sam_and_gsam(recipe, tmp_path: Path):
    config = small(recipe.get_config("b32"))
    config.evaluators = {}
    first_step_from_nothing(config, tmp_path, loss=DENYING)


def test_small_data(tmp_path: Path):
    first_step_from_nothing(small(small_data.get_config("ti16,cifar10")), tmp_path, loss=SOFTMAX)


def test_deit3(tmp_path: Path):
    config = small(deit3.get_config("b,400"))
    train_and_evaluate(config, tmp_path)
    assert tiny.metrics(tmp_path, "train_loss")[1] == pytest.approx(SIGMOID, abs=1e-4)
    arrays = tiny.arrays(tmp_path)
    # LAMB's step for a matrix of zeros has the length of the rate
    assert np.linalg.norm(arrays["head/kernel"]) == pytest.approx(config.base_lr, rel=1e-3)
    gamma = arrays["Transformer/encoderblock_0/ls1/gamma"]
    np.testing.assert_allclose(gamma, 1e-4, rtol=1e-4)


@pytest.mark.parametrize("arg", ["function_matching,s16,oxford_flowers102", "deit,ti16"])
def test_distill(arg: str, tmp_path: Path):
    config = without_randaug(small(distill.get_config(arg)))
    config.evaluators = {}
    published(small(vit.get_config("ti16")), tmp_path / "teacher.npz", side=32, classes=10)
    config.distill.teacher = str(tmp_path / "teacher.npz")
    train_and_evaluate(config, tmp_path / "run")
    arrays = tiny.arrays(tmp_path / "run")
    heads = ["head/kernel", "head_dist/kernel"] if arg.startswith("deit") else ["head/kernel"]
    for head in heads:
        assert np.abs(arrays[head]).max() == pytest.approx(config.base_lr, rel=1e-2)
    if arg.startswith("deit"):  # the labels and the teacher's answers cost as much, and weigh the same
        assert tiny.metrics(tmp_path / "run", "train_loss")[1] == pytest.approx(SOFTMAX, abs=1e-4)


# From a published file


@pytest.mark.parametrize(
    ("name", "model"),
    [("b16", {}), ("s16_gap_norep", {}), ("r50_b16", {"resnet": {"num_layers": (1,)}, "patches": {"size": (2, 2)}})],
    ids=["token", "gap", "hybrid"],
)
def test_vit(name: str, model: dict, tmp_path: Path):
    config = small(vit.get_config(f"{name},cifar10"), **model)
    config.pretrained_dir = str(tmp_path)
    before = published(config, tmp_path / f"{config.model.model_name}.npz", side=48)
    train_and_evaluate(config, tmp_path / "run")
    assert_only_the_head_changed(tmp_path / "run", before, classes=10)


def test_augreg(tmp_path: Path):
    config = small(augreg.get_config("R_Ti_16"))
    config.update({"pretrained_dir": str(tmp_path), "pp": {"resize": 36}})
    rows = [f"{STEM.format(aug)},i21k,{accuracy}" for aug, accuracy in (("none", 0.3), ("light1", 0.5), ("strong1", 0.4))]
    (tmp_path / "index.csv").write_text("\n".join(["filename,ds,final_val", *rows]) + "\n")
    before = published(config, tmp_path / f"{STEM.format('light1')}.npz", side=64)
    train_and_evaluate(config, tmp_path / "run")
    assert_only_the_head_changed(tmp_path / "run", before, classes=10)


def test_transfer(tmp_path: Path):
    config = small(transfer.get_config(f"cifar100,{STEM.format('light1')}"))
    config.pretrained_dir, config.evaluators = str(tmp_path), {}
    before = published(config, tmp_path / f"{STEM.format('light1')}.npz", side=64)
    train_and_evaluate(config, tmp_path / "run")
    assert_only_the_head_changed(tmp_path / "run", before, classes=10)


def test_deit3_at_a_higher_resolution(tmp_path: Path):
    config = without_randaug(small(deit3.get_config("s,ft384")))
    config.pretrained = str(tmp_path / "weights.npz")
    before = published(config, tmp_path / "weights.npz", side=48)
    train_and_evaluate(config, tmp_path / "run")
    after = tiny.arrays(tmp_path / "run")
    assert np.abs(after["head/kernel"]).max() == pytest.approx(1e-5, rel=1e-2)
    gamma = "Transformer/encoderblock_0/ls1/gamma"
    np.testing.assert_array_equal(after[gamma], before[gamma])


def test_lora_finetune(tmp_path: Path):
    config = small(lora_finetune.get_config("ti16,cifar10"))
    config.pretrained = str(tmp_path / "weights.npz")
    before = published(config, tmp_path / "weights.npz", side=48)
    train_and_evaluate(config, tmp_path / "run")
    with np.load(tmp_path / "run" / "adapter.npz") as adapter:
        assert sum(x.size for x in adapter.values()) < sum(x.size for x in before.values()) / 2
    after = checkpoint.open_checkpoint(tmp_path / "run").flat
    assert np.abs(after["head/kernel"]).max() == pytest.approx(config.base_lr, rel=1e-2)
    for name in before.keys() - {"head/kernel", "head/bias", "Transformer/posembed_input/pos_embedding"}:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_mixer_base16_cifar10(tmp_path: Path):
    config = small(mixer_base16_cifar10.get_config(), **MIXER)
    config.pretrained_dir = str(tmp_path)
    before = published(config, tmp_path / "Mixer-B_16.npz", side=32)
    train_and_evaluate(config, tmp_path / "run")
    assert_only_the_head_changed(tmp_path / "run", before, classes=10)


def test_pretrain_and_then_evaluate(tmp_path: Path):
    config = small(pretrain.get_config("ti16,cifar10"))
    params = train_and_evaluate(config, tmp_path / "run")
    assert params["head"]["kernel"].any()
    config.update({"trainer": "evaluate", "pretrained": str(tmp_path / "run")})
    metrics = evaluate(config, tmp_path / "score")
    assert metrics["accuracy_test"] == tiny.metrics(tmp_path / "run", "accuracy_test")[1]
    assert not (tmp_path / "score" / "model.npz").exists()


def test_photos(tmp_path: Path):
    rng = np.random.default_rng(0)
    for name in ("cat/1.jpg", "cat/2.JPG", "cat/3.jpeg", "dog/1.jpg", "dog/2.jpg", "owl/1.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "photos" / name)
    folder = str(tmp_path / "photos")
    config = small(photos.get_config(folder), dataset=folder)
    config.pp.update({"train": "train", "test": "test"})
    config.pretrained = str(tmp_path / "weights.npz")
    before = published(small(vit.get_config("ti16")), tmp_path / "weights.npz", side=48)
    train_and_evaluate(config, tmp_path / "run")
    assert_only_the_head_changed(tmp_path / "run", before, classes=3)


def test_inference_time(tmp_path: Path):
    args = ("model_name=testing", "steps=2", "initial_steps=1", "batch=8", "num_classes=3", "image_size=32")
    recipe = f"--config={CONFIGS / inference_time.__name__.rpartition('.')[2]}.py"
    assert command_line.run(f"--workdir={tmp_path}", recipe, *[f"--config.{arg}" for arg in args]) == 0
    assert tiny.metrics(tmp_path, "img_sec_core")[2] > 0


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_dataset_of_tfds_from_the_command_line(file_format: str, tmp_path: Path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=toy_tfds.NAMES),
    }
    folder = toy_tfds.build(
        tmp_path / "array_record", "oxford_flowers", features,
        lambda split, i: {"image": toy_tfds.png(split, i), "label": i % 3},
    )  # fmt: skip
    if file_format == "tfrecord":
        toy_tfds.to_tfrecord(folder, tmp_path / file_format / "oxford_flowers" / folder.name)
    code = command_line.run(
        *(f"--workdir={tmp_path / 'run'}", f"--config={CONFIGS / 'vit.py'}:testing,oxford_flowers"),
        *("--config.pretrained_dir=", f"--config.tfds_data_dir={tmp_path / file_format}"),
        *("--config.batch=8", "--config.accum_steps=1", "--config.total_steps=1", "--config.warmup_steps=0"),
        *("--config.pp.crop=32", "--config.pp.train=train[:98%]"),
    )
    assert code == 0
    assert tiny.arrays(tmp_path / "run")["head/kernel"].shape[-1] == 3
    assert tiny.metrics(tmp_path / "run", "train_loss")[1] == pytest.approx(np.log(3), abs=1e-5)
