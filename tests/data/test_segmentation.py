"""Folders of images and masks in all layouts; what is wrong with one is an error that names the file."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import loader, segmentation
from vit_jax.data.sources import get_source
from vit_jax.errors import UserError
from vit_jax.tasks import segment

NAMES = ("sky", "road", "tree")
SIZES = {"a": (20, 30), "b": (16, 16), "c": (9, 40)}


def mask_of(name):
    """Classes 0 to 2 and 255."""
    return np.random.default_rng(ord(name)).choice([0, 1, 2, 255], SIZES[name]).astype(np.uint8)


def write(images, masks, names=SIZES, mode="L", add=0):
    """JPEGs, and PNGs in a mode of Pillow; `add` is added to the classes."""
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for name in names:
        Image.fromarray(np.full((*SIZES[name], 3), 99, np.uint8)).save(images / f"{name}.jpg")
        labels = mask_of(name)
        image = Image.fromarray(np.where(labels == 255, 255 if not add else 0, labels + add).astype(np.uint8), "L")
        if mode == "P":
            image.putpalette(list(range(256)) * 3)
        image.save(masks / f"{name}.png")


def plain(root):
    write(root / "images", root / "masks")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")


def split(root):
    write(root / "images" / "train", root / "masks" / "train", mode="P")
    write(root / "images" / "val", root / "masks" / "val", names="b")
    (root / "classes.json").write_text(json.dumps({"names": NAMES, "colors": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}))


def ade20k(root):
    """0 stands for what is ignored."""
    write(root / "images" / "training", root / "annotations" / "training", add=1)
    write(root / "images" / "validation", root / "annotations" / "validation", names="b", add=1)
    rows = [f"{i}\t0.1\t10\t10\t0\t{name}" for i, name in enumerate(NAMES, 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]))


def voc(root):
    write(root / "JPEGImages", root / "SegmentationClass", mode="P")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\nc\n")
    (lists / "val.txt").write_text("b\n")
    (root / "classes.txt").write_text("\n".join(NAMES))


def folders_in_splits(root):
    """With names of masks that many tools write."""
    for split, names in (("train", SIZES), ("valid", "b")):
        write(root / split / "images", root / split / "masks", names=names)
        for mask in (root / split / "masks").iterdir():
            mask.rename(mask.with_stem(f"{mask.stem}_mask"))
    (root / "classes.txt").write_text("\n".join(NAMES))


def values(root):
    """Classes 0, 1, 2 written as 0, 255, 7; what is ignored cannot be written, and counts as 1."""
    plain(root)
    for name in SIZES:
        Image.fromarray(np.array([0, 255, 7], np.uint8)[np.minimum(mask_of(name), 1 + (mask_of(name) == 2))]).save(
            root / "masks" / f"{name}.png"
        )
    (root / "classes.txt").unlink()
    (root / "classes.json").write_text(json.dumps({"names": NAMES, "values": [0, 255, 7]}))


def colours(root):
    """Of RGB; black is ignored."""
    plain(root)
    table = np.zeros((256, 3), np.uint8)
    table[:3] = [[200, 2, 3], [4, 5, 6], [0, 0, 9]]
    for name in SIZES:
        Image.fromarray(table[mask_of(name)]).save(root / "masks" / f"{name}.png")
    (root / "classes.txt").unlink()
    (root / "classes.json").write_text(json.dumps({"names": NAMES, "colors": table[:3].tolist()}))


@pytest.mark.parametrize("layout", [folders_in_splits, values, colours])
def test_masks_as_others_write_them_mean_the_same(tmp_path, layout):
    layout(tmp_path)
    source = get_source(str(tmp_path), "train")
    assert source.class_names == NAMES and len(source) == 3
    for i, name in enumerate(SIZES):
        mask = mask_of(name)
        np.testing.assert_array_equal(source[i]["segmentation"], np.where(mask == 255, 1, mask) if layout is values else mask)


def test_a_pixel_that_stands_for_no_class_is_named(tmp_path):
    tmp_path = tmp_path / "{0}{"
    values(tmp_path)
    Image.fromarray(np.full(SIZES["a"], 9, np.uint8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match=r"images/a.jpg has pixels of 9 in its mask .*masks/a.png, which stands for no class"):
        get_source(str(tmp_path), "train")[0]


def test_a_colour_that_stands_for_no_class_is_named(tmp_path):
    colours(tmp_path)
    Image.fromarray(np.full((*SIZES["a"], 3), (4, 5, 7), np.uint8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match=r"images/a.jpg has pixels of the colour \(4, 5, 7\) in its mask .*masks/a.png"):
        get_source(str(tmp_path), "train")[0]


def test_masks_of_0_and_255_are_not_taken_for_background_alone(tmp_path):
    plain(tmp_path)
    (tmp_path / "classes.txt").write_text("background\ncell\n")
    for name in SIZES:
        Image.fromarray(np.where(mask_of(name) == 1, 255, 0).astype(np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    with pytest.raises(
        UserError, match=r'0 and 255 only, .*classes.json: {"names": \["background", "cell"\], "values": \[0, 25'
    ):
        get_source(str(tmp_path), "train")
    (tmp_path / "classes.json").write_text('{"names": ["background", "cell"], "values": [0, 255]}')
    np.testing.assert_array_equal(get_source(str(tmp_path), "train")[1]["segmentation"], mask_of("b") == 1)


@pytest.mark.parametrize("layout", [plain, split, ade20k, voc])
def test_the_layouts_give_the_same(tmp_path, layout):
    layout(tmp_path)
    source = get_source(str(tmp_path), "train")
    assert source.class_names == NAMES and len(source) == 3
    for i, name in enumerate(SIZES):
        example = source[i]
        assert example["image"].startswith(b"\xff\xd8") and source.where(i).endswith(f"{name}.jpg")
        np.testing.assert_array_equal(example["segmentation"], mask_of(name))
    assert source.features["segmentation"].colors == (((1, 2, 3), (4, 5, 6), (7, 8, 9)) if layout is split else ())
    assert len(get_source(str(tmp_path), "train[1:]")) == 2
    if layout is plain:
        with pytest.raises(UserError, match="no folder for 'test': make images/test and masks/test, or name parts"):
            get_source(str(tmp_path), "test")
    else:
        np.testing.assert_array_equal(get_source(str(tmp_path), "test")[0]["segmentation"], mask_of("b"))


def test_voc_has_classes_of_its_own_and_may_have_boxes_too(tmp_path):
    voc(tmp_path)
    (tmp_path / "classes.txt").unlink()
    assert get_source(str(tmp_path), "train").class_names == segmentation.VOC and len(segmentation.VOC) == 21
    (tmp_path / "Annotations").mkdir()
    assert len(get_source(str(tmp_path), "val", needs=("segmentation",))) == 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [True, False])
def test_a_mask_of_few_bits_holds_the_same_numbers(tmp_path, bits, palette):
    plain(tmp_path)
    labels = mask_of("a") % min(3, 2**bits)
    image = Image.fromarray(labels, "L")
    if palette:
        image.putpalette(list(range(256)) * 3)
        image.save(tmp_path / "masks" / "a.png", bits=bits)
    else:
        (tmp_path / "masks" / "a.png").write_bytes(grey_png(labels, bits))
    np.testing.assert_array_equal(get_source(str(tmp_path), "train")[0]["segmentation"], labels)


def grey_png(labels, bits):
    """A grey PNG of so many bits a pixel, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    h, w = labels.shape
    rows = (np.unpackbits(labels[..., None], axis=-1)[..., 8 - bits :]).reshape(h, w * bits)
    raw = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", w, h, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_other_folders_are_left_to_others(tmp_path):
    assert segmentation.open_folder(str(tmp_path), "train") is None
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    assert segmentation.open_folder(str(tmp_path), "train") is None


def test_a_mask_that_does_not_belong_is_named(tmp_path):
    plain(tmp_path)
    source = get_source(str(tmp_path), "train")
    example = segment.make_eval_example(segment.Seen((8, 8)), segment_settings(), (0.0, 0.0, 0.0))
    Image.fromarray(np.zeros((20, 31), np.uint8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match=r"images/a.jpg: the class map is 20 x 31 \(h x w\), .* 20 x 30"):
        loader.load(source, 0, example)
    Image.fromarray(np.full((20, 30), 7, np.uint8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(
        UserError, match=r"images/a.jpg has 600 pixels of class 7 in .*masks/a.png, and only classes 0 to 2 have a name"
    ):
        source[0]
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match="masks/a.png: is a PNG of mode RGB: a mask is a PNG of 8 bits"):
        source[0]
    (tmp_path / "masks" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="masks/a.png: the image cannot be decoded"):
        source[0]
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(UserError, match="images/a.jpg has no mask: add .*masks/a.png"):
        get_source(str(tmp_path), "train")
    os.mkfifo(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match="images/a.jpg has no mask"):
        get_source(str(tmp_path), "train")


def segment_settings():
    from tests import tiny
    from vit_jax.settings import Settings

    return Settings.from_config(tiny.config())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classes.txt", b"", "names 0 classes, allowed are 1 to 255"),
        ("classes.txt", b"\xff", "is no text in UTF-8"),
        ("classes.json", b"[1]", "is no table of classes such as"),
        ("classes.json", b'{"names": ["a", ""]}', "is no table of classes"),
        ("classes.json", b'{"names": ["a"], "colors": [[1, 2, 300]]}', "is no table of classes"),
        ("classes.json", b'{"names": ["a", "b"], "values": [0, 0]}', "is no table of classes"),
        ("classes.json", b'{"names": ["a", "b"], "values": [0, 1.0]}', "is no table of classes"),
        ("classes.json", b"[" * 100_000, "is no table of classes"),
        ("classes.json", b"\xff", "is no text in UTF-8"),
        (None, b"", "has no classes.txt: write one, a name a line"),
    ],
)
def test_a_table_without_sense_is_named(tmp_path, file, content, message):
    plain(tmp_path)
    (tmp_path / "classes.txt").unlink()
    if file:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        get_source(str(tmp_path), "train")
    assert (file or "") in str(error.value)


def test_digit_masks_fit_the_scenes():
    scenes, masks = (get_source(name, "test[:30]") for name in ("digit_scenes", "digit_masks"))
    assert masks.class_names == ("background", *"0123456789") and set(masks[0]) == {"image", "segmentation"}
    for i in range(30):
        scene, mask = scenes[i], masks[i]
        np.testing.assert_array_equal(scene["image"], mask["image"])
        outside = mask["segmentation"].copy()
        for (left, top, right, bottom), label in zip(scene["boxes"].astype(int), scene["box_labels"], strict=True):
            part = mask["segmentation"][top:bottom, left:right]
            assert set(np.unique(part)) <= {0, label + 1}
            assert all(edge.any() for edge in (part[0], part[-1], part[:, 0], part[:, -1]))  # the box is tight
            outside[top:bottom, left:right] = 0
        assert not outside.any()
