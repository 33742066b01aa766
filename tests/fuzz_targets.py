"""What `tests/fuzz.py` damages: sound checkpoints of every layout and images of every format, and cases made by hand."""

import functools
import io
import json
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from flax.traverse_util import flatten_dict
from PIL import Image

import vit_jax
from tests.data import test_captions, test_class_lists, test_detection, test_segmentation, test_shards, test_tables
from tests.fuzz import Files, Target
from tests.models import small
from vit_jax import checkpoint, convert, finite, models, tokenizer
from vit_jax.checkpoint import describe, fit, lora_file
from vit_jax.data import captions, class_lists, class_shards, detection, embedding_index, segmentation, shards, tables
from vit_jax.data.host import decode, text, view
from vit_jax.optimize import trainable
from vit_jax.tasks import prompts

SIDE = 8
NAMES = ("ape", "bear", "cat")
IMAGE = np.random.default_rng(0).integers(256, size=(9, 11, 3), dtype=np.uint8)


# Checkpoints.


def tiny(**overrides):
    """(a model of 8 x 8 pixels, its parameters, its description)."""
    fields = {"hidden_size": 16, "patches": {"size": (4, 4)}, "num_classes": len(NAMES)} | overrides
    encoder = {"num_layers": 2, "mlp_dim": 32, "num_heads": 2, "activation": "gelu"} | overrides.get("transformer", {})
    model = small.vit(**fields | {"transformer": encoder})
    params = small.random_params(model, small.random_images(SIDE, SIDE, batch=1))
    plain = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0} | encoder
    described = _described(
        "ViT",
        {"classifier": "token", "representation_size": None, "resnet": None} | fields | {"transformer": plain},
        class_names=NAMES if fields["num_classes"] else (),
    )
    return model, params, described


def _described(kind: str, fields: dict, **others) -> describe.Description:
    pixels = {"image_size": (SIDE, SIDE), "grid": (2, 2), "mean": (127.5,) * 3, "std": (127.5,) * 3}
    return describe.Description(model_type=kind, model=fields, **pixels, **{"class_names": (), **others})


def written(to: str, **overrides) -> Files:
    """A tiny model in one of the layouts of `checkpoint.write_checkpoint`."""
    _, params, description = tiny(**overrides)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.npz"
        checkpoint.save(params, path)
        describe.write(path, description)
        checkpoint.write_checkpoint(checkpoint.open_checkpoint(path), Path(folder) / "out", to)
        return {file.name: file.read_bytes() for file in (Path(folder) / "out").iterdir()}


def towers(to: str) -> Files:
    """A tiny CLIP, with the vocabulary's configuration beside it."""
    image = {"hidden_size": 16, "patches": {"size": (4, 4)}, "patch_bias": False, "head_bias": False}
    encoder = {"num_layers": 1, "mlp_dim": 32, "num_heads": 2, "norm_pre": True, "activation": "gelu", "norm_eps": 1e-5}
    text = {"width": 12, "num_layers": 1, "mlp_dim": 20, "num_heads": 2, "vocab_size": 30, "max_len": 16, "norm_eps": 1e-5}
    text |= {"activation": "gelu", "causal": True, "pool": "end", "head_bias": False}
    fields = {"image": image | {"transformer": encoder}, "text": text, "out_dim": (6, 6)}
    inputs = {"images": np.zeros((1, SIDE, SIDE, 3)), "tokens": np.zeros((1, 16), int)}
    init = functools.partial(models.build("TwoTowers", fields).init, **inputs)
    described = _described(
        "TwoTowers",
        fields,
        text={"tokenizer": "clip", "vocab": "tokenizer.json", "max_len": 16},
        task={"type": "contrast", "max_len": 16},
    )
    return _random(init, described, to)


def captioner() -> Files:
    """A tiny ViT with a GPT-2 of another width, as transformers saves them."""
    vit = {"hidden_size": 16, "patches": {"size": (4, 4)}, "num_classes": None, "classifier": "token"}
    vit |= {"transformer": {"num_layers": 1, "mlp_dim": 32, "num_heads": 2, "activation": "gelu"}}
    fields = {"vocabulary": 30, "width": 12, "num_heads": 2, "mlp_dim": 20, "num_layers": 1, "max_length": 16, "norm_eps": 1e-5}
    fields |= {"body": {"vit": vit}, "tied": True, "use_bias": True, "project_memory": True}
    init = functools.partial(
        models.build("Captioner", fields).init, images=np.zeros((1, SIDE, SIDE, 3)), tokens=np.zeros((1, 16), int)
    )
    described = _described(
        "Captioner",
        fields,
        text={"tokenizer": "gpt2", "vocab": "tokenizer.json", "max_len": 16},
        task={"type": "caption", "beams": 1, "length_penalty": 1.0},
    )
    return _random(init, described, "hf")


def _random(init: Callable, described: describe.Description, to: str) -> Files:
    """A model with random parameters in one of the layouts of `checkpoint.write_checkpoint`."""
    flat = flatten_dict(small.random_values(jax.eval_shape(init, jax.random.key(0))["params"]), sep="/")
    with tempfile.TemporaryDirectory() as folder:
        opened = checkpoint.Opened(Path(folder), "", flat, described)
        checkpoint.write_checkpoint(opened, Path(folder) / "out", to)
        return {file.name: file.read_bytes() for file in (Path(folder) / "out").iterdir()}


def torch_file(flat: Mapping[str, np.ndarray]) -> bytes:
    """The file that torch.save would write of float32 tensors, without torch."""

    def text(x: str) -> bytes:
        return b"X" + len(x).to_bytes(4, "little") + x.encode()

    def numbers(values) -> bytes:
        return b"(" + b"".join(b"J" + int(v).to_bytes(4, "little") for v in values) + b"t"

    data = b"\x80\x02}("
    for i, (name, x) in enumerate(flat.items()):
        storage = (
            b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(i)) + text("cpu") + numbers([x.size])[1:-1] + b"tQ"
        )
        strides = [s // x.itemsize for s in np.ascontiguousarray(x).strides]
        view = b"K\x00" + numbers(x.shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R"
        data += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tR"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model/data.pkl", data + b"u.")
        for i, x in enumerate(flat.values()):
            archive.writestr(f"model/data/{i}", x.astype(np.float32).tobytes())
    return out.getvalue()


def adapter() -> Files:
    """A LoRA run's adapter and its base; `@FOLDER@` stands for where they lie."""
    model, params, description = tiny()
    with tempfile.TemporaryDirectory() as folder:
        base, run = Path(folder) / "base.npz", Path(folder) / "adapter.npz"
        checkpoint.save(params, base)
        describe.write(base, description)
        origin = lora_file.base_of(base, checkpoint.open_checkpoint(base), params)
        chosen = {"targets": [".*/query/kernel"]}
        trained, frozen = trainable.add_lora(params, jax.random.key(0), rank=2, alpha=3, train=("head/.*",), **chosen)
        lora_file.save_adapter(run, trained, frozen, base=origin, alpha=3, description=description, **chosen)
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        return {name: x.replace(str(Path(folder).resolve()).encode(), b"@FOLDER@") for name, x in files.items()}


def opens(folder: Path, source: str = "", always: bool = False) -> str | None:
    """What inspect and (of some, for it takes long) predict and features do with a checkpoint."""
    for path in folder.glob("*.json"):
        if b"@FOLDER@" in (content := path.read_bytes()):
            path.write_bytes(content.replace(b"@FOLDER@", str(folder).encode()))
    opened = checkpoint.open_checkpoint(folder / source)
    d = opened.description
    if shown := [line for line in convert.summary(opened) if not line.isprintable()]:
        return f"inspect prints {shown[0]!r}"
    if bad := finite.non_finite(opened.flat):
        return f"opened with parameters that are not finite: {bad}"
    if not all(map(math.isfinite, (*d.mean, *d.std))):
        return f"opened with mean {d.mean} and std {d.std}"
    if not always and zlib.crc32(b"".join(x.tobytes() for x in opened.flat.values())) % 8:
        return None
    if not d.model.get("num_classes"):
        convert.compare(opened, opened)
        return None  # features that are not finite are counted where they are written
    p = vit_jax.load(folder / source).probabilities([IMAGE])
    return None if np.all((p >= 0) & (p <= 1)) and abs(p.sum() - 1) < 1e-4 else f"predicted {p}"


def _shards() -> Files:
    files = written("hf")
    flat = safetensors.numpy.load(files.pop("model.safetensors"))
    names = sorted(flat)
    parts = {f"model-{i}.safetensors": names[i::2] for i in range(2)}
    places = {name: part for part, inside in parts.items() for name in inside}
    index = {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": places}).encode()}
    return files | index | {part: safetensors.numpy.save({n: flat[n] for n in inside}) for part, inside in parts.items()}


def _torch() -> Files:
    files = written("timm")
    return {"config.json": files["config.json"], "model.pth": torch_file(safetensors.numpy.load(files["model.safetensors"]))}


def _layout(files: Callable[[], Files], source: str, kind: str) -> Callable[[], Target]:
    def make() -> Target:
        found = files()
        damaged = tuple(sorted(name for name in found if name.endswith(".json") == (kind == "json")))
        return Target(found, damaged, functools.partial(opens, source=source))

    return make


def _index() -> Target:
    rows = "name,ds,filename,final_val\na,i21k,B_16-i21k-a,0.5\nb,i21k,B_16-i21k-b,0.6\nc,i1k,S_16-x,0.7\n"

    def read(folder: Path) -> str | None:
        name = fit.augreg_filename("B_16", folder)
        return None if name.startswith("B_16-") else f"chose {name!r}"

    return Target({"index.csv": rows.encode()}, ("index.csv",), read)


# What is kept of photos, and lists of words.


def _photo_index() -> Target:
    z = np.eye(3, 5, dtype=np.float32)
    index = embedding_index.Index(("a.jpg", "b/c.png", "d.png"), np.ones((3, 2), int), np.zeros((3, 16), np.uint8), z)

    def read(folder: Path) -> str | None:
        found = embedding_index.load(folder / "index.npz", model="m").nearest(z[1], 2)
        return None if len(found) == 2 and all(np.isfinite(score) for _, score in found) else f"found {found}"

    with tempfile.TemporaryDirectory() as folder:
        embedding_index.save(index, Path(folder) / "index.npz", model="m")
        return Target({"index.npz": (Path(folder) / "index.npz").read_bytes()}, ("index.npz",), read)


def _labels() -> Target:
    def read(folder: Path) -> str | None:
        labels = prompts.read_labels(str(folder / "labels.txt"))
        return None if all(label.strip() for label in labels) else f"an empty label in {labels}"

    return Target({"labels.txt": "a cat\nein Dach\na dog\ncafé\n".encode()}, ("labels.txt",), read)


def _words(pieces: int) -> bytes:
    """A `tokenizer.json`."""
    vocab = {"<unk>": 0, "<eos>": 1} | {f"word{i}": i + 2 for i in range(pieces)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>")).to_str().encode()


VOCABULARIES: dict[str, tuple[type[text.Tokenizer], Callable[[], bytes]]] = {
    "tokenizer.json": (text.SentencepieceTokenizer, lambda: _words(9)),
    "spiece.model": (text.SentencepieceTokenizer, lambda: tokenizer.train(["a cat sat", "dogs ran"] * 9, vocab_size=30)),
    "vocab.txt": (text.BertTokenizer, lambda: "[PAD]\n[UNK]\n[CLS]\ncat\n##s\nö\n".encode()),
}


def _vocabulary(name: str) -> Target:
    kind, made = VOCABULARIES[name]

    def read(folder: Path) -> str | None:
        found = kind(folder / name, 8)
        tokens = found(["a cat", "dogs & Cats ü"])
        return None if 0 <= tokens.min() and tokens.max() < found.vocab_size else f"tokens {tokens} of {found.vocab_size}"

    return Target({name: made()}, (name,), read)


# Rows with images and labels.


def _table(kind: str) -> Target:
    def read(folder: Path) -> str | None:
        source = tables.open_folder(str(folder), "train")
        examples = [source[i] for i in range(len(source))] if source else []
        return None if all(example["label"] in range(source.num_classes) for example in examples) else "a label of no class"

    names = ("train.parquet",) if kind == "parquet" else ("data-00000-of-00001.arrow", "state.json")
    with tempfile.TemporaryDirectory() as folder:
        test_tables.write(Path(folder) / names[0], range(9))
        files = {names[0]: (Path(folder) / names[0]).read_bytes()}
        files |= {name: json.dumps({"_data_files": [{"filename": names[0]}]}).encode() for name in names[1:]}
        return Target(files, names, read)


# Annotations of boxes.


def _annotations(kind: str) -> Callable[[], Target]:
    def make() -> Target:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "data"
            root.mkdir()
            getattr(test_detection, kind)(root)
            files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return Target(files, tuple(sorted(name for name in files if not name.endswith(".jpg"))), read)

    def read(folder: Path) -> str | None:
        source = detection.open_folder(str(folder), "train")
        if source is None:
            return None
        boxes = [source[i]["boxes"] for i in range(len(source))]
        return None if all(np.isfinite(x).all() for x in boxes) else "boxes that are no numbers"

    return make


# Lists of classes.


def _class_list(name: str) -> Target:
    with tempfile.TemporaryDirectory() as folder:
        test_class_lists.write(Path(folder), dict(list(test_class_lists.LABELS.items())[:5]), name)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}

    def read(folder: Path) -> str | None:
        source = class_lists.open_folder(str(folder), "train")
        labels = [source[i]["label"] for i in range(len(source))] if source else []
        return None if all(0 <= label < source.num_classes for label in labels) else "a class that has no name"

    return Target(files, (name,), read)


# Masks.


def _masks(kind: str) -> Callable[[], Target]:
    def make() -> Target:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "data"
            root.mkdir()
            getattr(test_segmentation, kind)(root)
            files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return Target(files, tuple(sorted(name for name in files if not name.endswith(".jpg"))), read)

    def read(folder: Path) -> str | None:
        source = segmentation.open_folder(str(folder), "train")
        if source is None:
            return None
        allowed = {*range(source.num_classes), 255}
        found = {int(n) for i in range(len(source)) for n in np.unique(source[i]["segmentation"])}
        return None if found <= allowed else "classes that have no name"

    return make


# Sentences.


def _captions(kind: str) -> Callable[[], Target]:
    def make() -> Target:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "data"
            root.mkdir()
            if kind != "coco":
                test_captions.write_images(root)
            getattr(test_captions, kind)(root)
            files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return Target(files, tuple(sorted(name for name in files if not name.endswith(".jpg"))), _sentences)

    return make


def _tar_files() -> Target:
    members = {"a.jpg": b"an image", "a.txt": b"a red thing\nein rotes Ding", "b.png": b"b", "b.json": b'{"caption": "blue"}'}
    with tempfile.TemporaryDirectory() as folder:
        test_shards.write(Path(folder) / "train-0.tar", members)
        return Target({"train-0.tar": (Path(folder) / "train-0.tar").read_bytes()}, ("train-0.tar",), _sentences)


# Tar files with classes, and images alone in them; what is kept of tar files.

CLASSES = {"a.jpg": b"A", "a.cls": b"0", "b.png": b"B", "b.json": b'{"label": 1, "text": "blue"}', "c.jpg": b"C", "c.cls": b"2"}


def _class_files(read: Callable[[Path], str | None]) -> Target:
    with tempfile.TemporaryDirectory() as folder:
        test_shards.write(Path(folder) / "train-0.tar", CLASSES)
        test_shards.write(Path(folder) / "test-0.tar", CLASSES)
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    names = {"classes.txt": b"cat\ndog\n\xc3\xb6\n"} if read is _classes else {}
    return Target(files | names, (*files, *names), read)


def _classes(folder: Path) -> str | None:
    """What training reads of images with classes."""
    sources = [class_shards.open_folder(str(folder), split) for split in ("train", "test")]
    for source in filter(None, sources):
        source.fingerprint()
        examples = [source[i] for i in range(len(source))]
        if not all(name.strip() for name in source.class_names):
            return f"a class without a name in {source.class_names}"
        if not all(example["label"] in range(source.num_classes) for example in examples):
            return "a label of no class"
    return None


def _images_alone(folder: Path) -> str | None:
    sources = [class_shards.open_images(str(folder), split) for split in ("train", "test")]
    images = [source[i]["image"] for source in filter(None, sources) for i in range(len(source))]
    return None if all(isinstance(image, bytes) for image in images) else "an image of another kind than bytes"


def _shard_index() -> Target:
    """The indices that are kept beside tar files, whose times tell that they are of them."""

    def read(folder: Path) -> str | None:
        for shard in folder.glob("*.tar"):
            os.utime(shard, (1, 1))
        return _classes(folder) or _images_alone(folder) or _sentences(folder)

    with tempfile.TemporaryDirectory() as folder:
        pairs = {name: data for key in "abcd" for name, data in ((f"{key}.jpg", b"x"), (f"{key}.json", CLASSES["b.json"]))}
        pairs["a.json"] = b'{"cls": 3, "text": ["red", "rot"]}'
        for split in ("train", "test"):
            test_shards.write(Path(folder) / f"{split}-0.tar", pairs)
        assert read(Path(folder)) is None
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        return Target(files, tuple(sorted(name for name in files if name.endswith(".npz"))), read)


def _sentences(folder: Path) -> str | None:
    """What training reads of images with sentences."""
    source = captions.open_folder(str(folder), "train") or shards.open_folder(str(folder), "train")
    examples = [source[i] for i in range(len(source))] if source else []
    wrong = [text for example in examples for text in example["text"] if not (isinstance(text, str) and text.strip())]
    return f"a sentence without words: {wrong[0]!r}" if wrong else None


# Images.


def encoded(kind: str) -> bytes:
    """A sound image of 24 x 16 pixels."""
    y, x = np.mgrid[:16, :24]
    rgb = np.stack([x * 10, y * 15, (x * y) % 256], -1).astype(np.uint8)
    image, out = Image.fromarray(rgb), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {"exif": exif}
    match kind:
        case "jpeg":
            image.save(out, "JPEG", quality=90, **turned)
        case "progressive jpeg":
            image.save(out, "JPEG", progressive=True, subsampling=2)
        case "grey jpeg":
            image.convert("L").save(out, "JPEG")
        case "cmyk jpeg":
            image.convert("CMYK").save(out, "JPEG")
        case "png":
            image.save(out, "PNG", **turned)
        case "palette png":
            image.quantize(16).save(out, "PNG", transparency=0)
        case "16-bit png":
            Image.fromarray(rgb[..., 0].astype(np.uint16) << 8).save(out, "PNG")
        case "webp":
            image.save(out, "WEBP", quality=80, **turned)
        case "lossless webp":
            image.convert("RGBA").save(out, "WEBP", lossless=True)
        case "gif":
            image.quantize(16).save(out, "GIF", save_all=True, append_images=[image.rotate(180).quantize(16)])
        case "bmp":
            image.save(out, "BMP")
        case "palette bmp":
            image.quantize(16).save(out, "BMP")
        case "tiff":
            image.save(out, "TIFF", **turned)
        case "packed tiff":
            image.save(out, "TIFF", compression="tiff_lzw")
        case "deflated tiff":
            image.convert("RGBA").save(out, "TIFF", compression="tiff_adobe_deflate")
    return out.getvalue()


IMAGES = (
    *("jpeg", "progressive jpeg", "grey jpeg", "cmyk jpeg", "png", "palette png", "16-bit png", "webp", "lossless webp", "gif"),
    *("bmp", "palette bmp", "tiff", "packed tiff", "deflated tiff"),
)


def sees(folder: Path) -> str | None:
    """What training, prediction and the count of sizes do with an image."""
    data = (folder / "image").read_bytes()
    pixels = decode.decode(data, exif_rotated=True)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        return f"decoded to {pixels.dtype} {pixels.shape}"
    size = decode.header_size(data)
    if sorted(size) != sorted(pixels.shape[:2]):
        return f"the header says {size}, decoded were {pixels.shape}"
    crop = view.train_image(data, np.random.default_rng(0), exif_rotated=True, crop=8)
    return None if crop.shape == (8, 8, 3) else f"cropped to {crop.shape}"


def _image(kind: str) -> Callable[[], Target]:
    return lambda: Target({"image": encoded(kind)}, ("image",), sees)


DINOV2 = {"transformer": {"layer_scale": True}, "num_classes": None, "classifier": "cls_mean"}
LAYOUTS: dict[str, tuple[Callable[[], Files], str]] = {
    "npz": (lambda: written("npz"), ""),
    "hf": (lambda: written("hf"), ""),
    "timm": (lambda: written("timm"), ""),
    "torch": (_torch, "model.pth"),
    "dinov2": (lambda: written("dinov2", **DINOV2), ""),
    "hf dinov2": (lambda: written("hf", **DINOV2), ""),
    "clip": (lambda: towers("hf"), ""),
    "openclip": (lambda: towers("openclip"), ""),
    "captioner": (captioner, ""),
    "shards": (_shards, ""),
    "adapter": (adapter, "adapter.npz"),
}
BOXES = ("coco", "label_studio_coco", "yolo", "cvat_yolo", "label_studio_yolo", "voc", "voc_beside_the_images")
ANNOTATIONS = {kind: _annotations(kind) for kind in BOXES}
ANNOTATIONS |= {f"{kind} captions": _captions(kind) for kind in ("coco", "jsonl", "csv")} | {"tar files": _tar_files}
ANNOTATIONS |= {"tar files of classes": functools.partial(_class_files, _classes)}
ANNOTATIONS |= {"tar files of images": functools.partial(_class_files, _images_alone)}
ANNOTATIONS |= {name: functools.partial(_class_list, name) for name in ("labels.csv", "labels.jsonl")}
ANNOTATIONS |= {f"{kind} masks": _masks(kind) for kind in ("split", "ade20k")}
ANNOTATIONS |= {kind: functools.partial(_table, kind) for kind in ("parquet", "arrow")}
ANNOTATIONS |= {"photo index": _photo_index, "labels": _labels}
ANNOTATIONS |= {name: functools.partial(_vocabulary, name) for name in VOCABULARIES}
PARAMETERS = {name: _layout(*layout, "parameters") for name, layout in LAYOUTS.items()}
DESCRIPTIONS = {f"{name} json": _layout(*layout, "json") for name, layout in LAYOUTS.items()} | {"index.csv": _index}
REMADE = {"tar index": _shard_index}  # where it is damaged
CHECKPOINTS = PARAMETERS | DESCRIPTIONS | ANNOTATIONS | REMADE  # all that tells of models or data
TARGETS = CHECKPOINTS | {kind: _image(kind) for kind in IMAGES}
