"""The three layouts give the same boxes; what is wrong with an annotation is an error that names it."""

import json
import os

import numpy as np
import pytest
from PIL import ExifTags, Image

from vit_jax.data import detection
from vit_jax.data.sources import get_source
from vit_jax.errors import UserError

# By image: (h, w) and (left, top, right, bottom, class) of its objects; the last is a crowd.
PICTURES = {
    "a": ((40, 60), [(3, 5, 23, 30, "cat"), (10, 0, 60, 40, "dog")]),
    "b": ((50, 30), []),
    "c": ((32, 32), [(1, 2, 9, 8, "cat")]),
}
NAMES = ["cat", "dog"]


def write_images(folder):
    folder.mkdir(parents=True)
    for name, ((h, w), _) in PICTURES.items():
        Image.fromarray(np.full((h, w, 3), 99, np.uint8)).save(folder / f"{name}.jpg")


def coco(root):
    write_images(root / "train2017")
    images = [
        {"id": 7 + i, "file_name": f"{name}.jpg", "height": h, "width": w}
        for i, (name, ((h, w), _)) in enumerate(PICTURES.items())
    ]
    boxes = [(7 + i, box) for i, (_, boxes) in enumerate(PICTURES.values()) for box in boxes]
    annotations = [
        {
            "id": k,
            "image_id": i,
            "category_id": {"cat": 3, "dog": 90}[name],
            "bbox": [x, y, r - x, b - y],
            "iscrowd": int(k == 2),
        }
        for k, (i, (x, y, r, b, name)) in enumerate(boxes)
    ]
    categories = [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}]
    return _json(root, {"images": images, "annotations": annotations, "categories": categories})


def _json(root, content):
    file = root / "annotations" / "instances_train2017.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def yolo(root):
    write_images(root / "images" / "train")
    (root / "labels" / "train").mkdir(parents=True)
    for name, ((h, w), boxes) in PICTURES.items():
        lines = [f"{NAMES.index(c)} {(x + r) / 2 / w} {(y + b) / 2 / h} {(r - x) / w} {(b - y) / h}" for x, y, r, b, c in boxes]
        if lines:
            (root / "labels" / "train" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nnames:\n  0: cat\n  1: dog\n")
    return root / "labels" / "train" / "a.txt"


def voc(root):
    write_images(root / "JPEGImages")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\n")
    for name, ((h, w), boxes) in PICTURES.items():
        objects = "".join(
            f"<object><name>{c}</name><difficult>{int(name == 'c')}</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{r}</xmax><ymax>{b}</ymax></bndbox></object>"
            for x, y, r, b, c in boxes
        )
        xml = f"<annotation><size><width>{w}</width><height>{h}</height></size>{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(xml)
    return root / "Annotations" / "a.xml"


def cvat_coco(root):
    coco(root)
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images" / "default")
    (root / "annotations" / "instances_train2017.json").rename(root / "annotations" / "instances_default.json")


def label_studio_coco(root):
    content = json.loads(coco(root).read_text())
    for image in content["images"]:
        image["file_name"] = f"images/{image['file_name']}"
    (root / "train2017").rename(root / "images")
    (root / "result.json").write_text(json.dumps(content))
    (root / "annotations" / "instances_train2017.json").unlink()


def fiftyone_coco(root):
    file = coco(root)
    (root / "train2017").rename(root / "data")
    file.rename(root / "labels.json")


def roboflow_coco(root):
    file = coco(root)
    (root / "train2017").rename(root / "train")
    file.rename(root / "train" / "_annotations.coco.json")


def cvat_yolo(root):
    yolo(root)
    (root / "train.txt").write_text("".join(f"data/images/train/{name}.jpg\n" for name in PICTURES))
    (root / "data.yaml").rename(root / "dataset.yaml")
    (root / "dataset.yaml").write_text("path: ./\ntrain: [train.txt]\nnames: [cat, dog]\n")


def label_studio_yolo(root):
    yolo(root)
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("cat\ndog\n")


def polygons_of_yolo(root):
    """The corners of each box, one of them twice."""
    for file in yolo(root).parent.iterdir():
        lines = []
        for label, x, y, w, h in (map(float, line.split()) for line in file.read_text().splitlines()):
            lines.append(f"{label:.0f} {x} {y - h / 2} {x - w / 2} {y} {x} {y + h / 2} {x + w / 2} {y} {x} {y}\n")
        file.write_text("".join(lines))


def poses_of_yolo(root):
    """Three points with what is seen of them behind each box, which is as many numbers as a polygon may have."""
    for file in yolo(root).parent.iterdir():
        file.write_text("".join(f"{line} .1 .2 2 .3 .4 1 .5 0\n" for line in file.read_text().splitlines()))
    with (root / "data.yaml").open("a") as file:
        file.write("kpt_shape: [3, 3]\n")


def voc_without_lists(root):
    voc(root)
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    (root / "Annotations").rename(root / "annotations")
    (root / "JPEGImages").rename(root / "images")


def voc_beside_the_images(root):
    voc(root)
    (root / "JPEGImages").rename(root / "train")
    for file in (root / "Annotations").iterdir():
        file.rename(root / "train" / file.name)


COCOS = [coco, cvat_coco, label_studio_coco, fiftyone_coco, roboflow_coco]
YOLOS = [yolo, cvat_yolo, label_studio_yolo, polygons_of_yolo, poses_of_yolo]
VOCS = [voc, voc_without_lists, voc_beside_the_images]


@pytest.mark.parametrize("write", [*COCOS, *YOLOS, *VOCS])
def test_the_layouts_give_the_same(tmp_path, write):
    write(tmp_path)
    if write is cvat_coco:
        with pytest.raises(UserError, match=r"boxes for default, not for 'train': .*pp.train='default\[:90%\]'"):
            detection.open_folder(str(tmp_path), "train")
        assert len(detection.open_folder(str(tmp_path), "default[1:]")) == 2
        (tmp_path / "images" / "default").rename(tmp_path / "images" / "train")
        (tmp_path / "annotations" / "instances_default.json").rename(tmp_path / "annotations" / "instances_train.json")
    source = detection.open_folder(str(tmp_path), "train")
    assert source.class_names == ("cat", "dog") and len(source) == 3
    for i, (size, boxes) in enumerate(PICTURES.values()):
        example = source[i]
        assert source.size(i) == size
        np.testing.assert_allclose(example["boxes"], np.array([box[:4] for box in boxes]).reshape(-1, 4), atol=1e-4)
        assert [NAMES[label] for label in example["box_labels"]] == [box[4] for box in boxes]
        assert source.where(i).endswith(".jpg") and example["image"].startswith(b"\xff\xd8")
        crowd = i == 2 and write not in YOLOS
        assert example["box_crowd"].tolist() == [crowd] * len(boxes)
    assert len(detection.open_folder(str(tmp_path), "train[1:]")) == 2
    with pytest.raises(UserError, match="split"):
        detection.open_folder(str(tmp_path), "test")


def test_other_folders_are_left_to_others(tmp_path):
    assert detection.open_folder(str(tmp_path), "train") is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bbox": [5, 5, 0, 3]}, r"annotation 0 \(a.jpg\): the box .* has no area"),
        ({"bbox": [5, float("nan"), 4, 3]}, r"annotation 0 \(a.jpg\): the box .* not finite"),
        ({"bbox": [61, 5, 4, 3]}, r"annotation 0 \(a.jpg\): the box .* outside of its image, which is 60 pixels wide"),
        ({"image_id": 99}, "annotation 0 is of image 99, which the file does not list"),
        ({"category_id": 4}, "annotation 0 is of category 4, which has no name"),
    ],
)
def test_a_wrong_annotation_of_coco_is_named(tmp_path, change, message):
    file = coco(tmp_path)
    content = json.loads(file.read_text())
    content["annotations"][0] |= change
    _json(tmp_path, content)
    with pytest.raises(UserError, match=f"instances_train2017.json: {message}"):
        detection.open_folder(str(tmp_path), "train")


@pytest.mark.parametrize("write", [coco, voc])
@pytest.mark.parametrize(("change", "said"), [("smaller", "a.jpg is 30 x 20 pixels"), ("turned", "40 x 60 .* its EXIF tag")])
def test_boxes_of_an_image_of_another_size_are_not_taken_for_its_own(tmp_path, write, change, said):
    """As after resizing the images alone, or where who drew the boxes did not heed EXIF."""
    write(tmp_path)
    assert PICTURES["a"][0] == (40, 60)
    path = next(tmp_path.glob("*/a.jpg"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(path)
    image.save(path, exif=exif) if change == "turned" else image.resize((30, 20)).save(path)
    source = detection.open_folder(str(tmp_path), "train")
    with pytest.raises(UserError, match=f"{said}.* annotated for 60 x 40"):
        source[0]


def test_corners_in_the_place_of_a_size_are_told(tmp_path, caplog):
    file = coco(tmp_path)
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [30, 20, 58, 39]
    _json(tmp_path, content)
    detection.open_folder(str(tmp_path), "train")
    assert "1 of 3 boxes reach far beyond their image" in caplog.text and "to (88, 59) of 60 x 40" in caplog.text


def test_a_missing_image_is_named(tmp_path):
    coco(tmp_path)
    (tmp_path / "train2017" / "b.jpg").unlink()
    with pytest.raises(UserError, match="train2017/b.jpg does not exist"):
        detection.open_folder(str(tmp_path), "train")


@pytest.mark.parametrize(
    "line, message",
    [
        ("2 .5 .5 .1 .1", "class 2 has no name, data.yaml names 2"),
        ("0 30 20 5 5", "numbers above 1"),
        ("0 .5 .5 0 .1", "has no area"),
        ("0 .1 .1 .9 .1 .9", "is not 'class center_x"),
        ("0 .1 .1 .9 .1 .9 .9 .8", "is not 'class center_x"),
    ],
)
def test_a_wrong_line_of_yolo_is_named(tmp_path, line, message):
    yolo(tmp_path).write_text(f"1 .5 .5 .1 .1\n{line}\n")
    with pytest.raises(UserError, match=f"a.txt, line 2: .*{message}"):
        detection.open_folder(str(tmp_path), "train")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("<xmax>23</xmax>", "<xmax>two</xmax>", "no number"),
        ("<xmax>23</xmax>", "", "no <bndbox/xmax>"),
        ("</size>", "", "no valid XML"),
    ],
)
def test_a_wrong_object_of_voc_is_named(tmp_path, old, new, message):
    file = voc(tmp_path)
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"a.xml.*{message}"):
        detection.open_folder(str(tmp_path), "train")


def test_scenes_depend_on_their_number_and_hold_what_they_say():
    train, test = (get_source("digit_scenes", split) for split in ("train", "test[100:]"))
    assert len(test) == 400 and train.class_names == tuple("0123456789")
    again = get_source("digit_scenes", "train[5:]")
    assert all(np.array_equal(train[6][name], again[1][name]) for name in train[6])
    for i in range(20):
        scene = test[i]
        left, top, right, bottom = scene["boxes"].T
        assert 1 <= len(left) == len(scene["box_labels"]) <= 5
        assert (left >= 0).all() and (right <= 64).all() and (right - left > 3).all() and (bottom - top > 8).all()
        assert scene["image"].shape == (64, 64, 3)
    # Ink is brighter than what is around it, and reaches all four sides of its box.
    brightest = scene["image"].min(axis=-1)[int(top[0]) : int(bottom[0]), int(left[0]) : int(right[0])]
    assert brightest.max() > 130


@pytest.mark.parametrize(
    ("write", "name", "content", "message"),
    [
        (coco, "annotations/instances_train2017.json", b"\xff", "is no text in UTF-8"),
        (coco, "annotations/instances_train2017.json", b"[" * 100_000, "is no COCO file"),
        (yolo, "data.yaml", b"names: [[x]]\ntrain: images/train\n", "must have a name"),
        (yolo, "data.yaml", b"names: {0: a, 2: b}\ntrain: images/train\n", "numbered from 0 to 1"),
        (yolo, "labels/train/a.txt", b"9\x1b[2J 0 0 0 0", "x1b"),
        (voc, "Annotations/a.xml", b"<a>\xff</a>", "is no valid XML"),
        (voc, "Annotations/a.xml", None, "cannot be read: .*a named pipe"),
        (yolo, "labels/train/a.txt", None, "cannot be read: .*a named pipe"),
    ],
)
def test_a_damaged_file_of_annotations_is_named(tmp_path, write, name, content, message):
    write(tmp_path)
    (tmp_path / name).unlink()
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        get_source(str(tmp_path), "train")
    assert name in str(error.value) and str(error.value).isprintable()
