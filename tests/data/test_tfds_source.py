"""TfdsSource on a small dataset prepared in both formats, always without TensorFlow."""

import io
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import vit_jax.data.tfds_source as tfds_source
from tests.data.toy_tfds import NAMES, SIZES, build, png, to_tfrecord
from vit_jax.data.features import Boxes, Image, Label, Labels, Segmentation
from vit_jax.data.sources import get_source
from vit_jax.data.tfds_source import TfdsSource
from vit_jax.errors import UserError

FORMATS = ("array_record", "tfrecord")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Path]:
    """{format: data_dir} holding `flowers` (an example has more than image and label), `real` (with several labels) and, in
    one, `texts`."""
    import tensorflow_datasets as tfds

    roots = {file_format: tmp_path_factory.mktemp(file_format) for file_format in FORMATS}
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=NAMES),
        "segmentation_mask": tfds.features.Image(shape=(None, None, 3)),
        "file_name": tfds.features.Text(),
    }
    folder = build(
        roots["array_record"], "flowers", features,
        lambda split, i: {"image": io.BytesIO(png(split, i)), "label": i % 3,
                          "segmentation_mask": io.BytesIO(png(split, i + 99)), "file_name": f"{split}-{i}"},
    )  # fmt: skip
    to_tfrecord(folder, roots["tfrecord"] / "flowers" / "1.2.0")
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "original_label": tfds.features.ClassLabel(names=NAMES),
        "real_label": tfds.features.Sequence(tfds.features.ClassLabel(names=NAMES)),
    }
    folder = build(
        roots["array_record"], "real", features,
        lambda split, i: {"image": io.BytesIO(png(split, i)), "original_label": i % 3, "real_label": several(i)},
    )  # fmt: skip
    to_tfrecord(folder, roots["tfrecord"] / "real" / "1.2.0")
    parts = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=NAMES), "is_crowd": np.bool_}
    features = {"image": tfds.features.Image(shape=(None, None, 3)), "objects": tfds.features.Sequence(parts)}
    folder = build(
        roots["array_record"], "scenes", features,
        lambda split, i: {"image": io.BytesIO(png(split, i)), "objects": objects(i)},
    )  # fmt: skip
    to_tfrecord(folder, roots["tfrecord"] / "scenes" / "1.2.0")
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=NAMES),
        "segmentation_mask": tfds.features.Image(shape=(None, None, 1), use_colormap=True),
    }
    folder = build(
        roots["array_record"], "oxford_iiit_pet", features,
        lambda split, i: {"image": io.BytesIO(png(split, i)), "label": i % 3, "segmentation_mask": grey(mask(i))},
    )  # fmt: skip
    to_tfrecord(folder, roots["tfrecord"] / "oxford_iiit_pet" / "1.2.0")
    build(roots["array_record"], "texts", {"text": tfds.features.Text()}, lambda split, i: {"text": f"{split} {i}"})
    return roots


def mask(i: int) -> np.ndarray:
    """The numbers 0 to 3, of the size of `png`."""
    return np.random.default_rng(i).integers(0, 4, (4 + i % 3, 5), np.uint8)


def grey(numbers: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    PIL.Image.fromarray(numbers).save(file, "PNG")
    return io.BytesIO(file.getvalue())


def several(i: int) -> tuple[int, ...]:
    return ((), (i % 2,), (2, 0))[i % 3]


def objects(i: int) -> list[dict]:
    import tensorflow_datasets as tfds

    one = {"bbox": tfds.features.BBox(ymin=0.25, xmin=0.2, ymax=0.5, xmax=1.0), "label": i % 3, "is_crowd": i % 2 == 1}
    return [one] * (i % 3)


@pytest.fixture(params=FORMATS)
def data_dir(request, prepared) -> str:
    return str(prepared[request.param])


@pytest.fixture
def tfrecord_copy(prepared, tmp_path) -> Path:
    shutil.copytree(prepared["tfrecord"], tmp_path / "copy")
    return tmp_path / "copy"


def contents(source: TfdsSource) -> list[tuple[bytes, int]]:
    return [(example["image"], example["label"]) for example in (source[i] for i in range(len(source)))]


def test_objects_become_boxes_in_pixels(data_dir):
    source = TfdsSource("scenes", "train", data_dir=data_dir)
    assert source.features == {"image": Image(), "boxes": Boxes(NAMES)} and source.class_names == NAMES
    found = sorted(((len(e["boxes"]), e["boxes"].tolist(), e["box_crowd"].tolist()) for e in source), key=lambda x: x[0])
    assert [n for n, _, _ in found] == sorted(i % 3 for i in range(SIZES["train"]))
    sizes = {(4 + i % 3, i % 2 == 1) for i in range(SIZES["train"]) if i % 3 == 1}  # heights of the images with one object
    boxes = {(box[0][1] * 4, crowd[0]) for n, box, crowd in found if n == 1}
    assert boxes == {(float(height), crowd) for height, crowd in sizes}
    assert all(box[0] == 1.0 and box[2] == 5.0 for _, of_image, _ in found for box in of_image)  # 5 pixels wide


def test_masks_have_classes_known_of_the_dataset_or_beside_it(data_dir, tmp_path):
    source = get_source("oxford_iiit_pet", "test", needs=("image", "segmentation"), tfds_data_dir=data_dir)
    assert source.features == {"image": Image(), "segmentation": Segmentation(("pet", "background", "border"))}
    found = {example["image"]: example["segmentation"] for example in (source[i] for i in range(len(source)))}
    for i in range(SIZES["test"]):  # they count from 1, and 0 is ignored
        np.testing.assert_array_equal(found[png("test", i)], mask(i) - np.uint8(1))
    assert set(TfdsSource("oxford_iiit_pet", "test", data_dir=data_dir)[0]) == {"image", "label"}
    shutil.copytree(f"{data_dir}/oxford_iiit_pet", tmp_path / "mine")
    folder = tmp_path / "mine" / "1.2.0"
    for info in folder.glob("dataset_info.json"):
        info.write_text(info.read_text().replace("oxford_iiit_pet", "mine"))
    for shard in folder.glob("oxford_iiit_pet*"):
        shard.rename(folder / shard.name.replace("oxford_iiit_pet", "mine"))
    with pytest.raises(UserError, match="mine/1.2.0 has no classes.txt: write one"):
        TfdsSource("mine", "test", needs=("segmentation",), data_dir=str(tmp_path))
    (folder / "classes.txt").write_text("a\nb\n")
    with pytest.raises(
        UserError, match=r"mine test, example 0 has \d+ pixels of class [23] in its mask segmentation_mask, and"
    ):
        TfdsSource("mine", "test", needs=("segmentation",), data_dir=str(tmp_path))[0]
    with pytest.raises(
        UserError, match="flowers/1.2.0 has the features .*segmentation needs `image` and `segmentation_mask`, an"
    ):
        TfdsSource("flowers", "test", needs=("segmentation",), data_dir=data_dir)


@pytest.mark.parametrize("split", SIZES)
def test_every_example_once_and_as_written(data_dir, split):
    source = TfdsSource("flowers", split, data_dir=data_dir)
    assert len(source) == SIZES[split]
    assert sorted(contents(source)) == sorted((png(split, i), i % 3) for i in range(SIZES[split]))
    assert source.class_names == NAMES and source.num_classes == 3 and not source.exif_rotated
    assert source.features == {"image": Image(), "label": Label(NAMES)}
    assert source.where(7) == f"flowers {split}, example 7"
    assert set(source[0]) == {"image", "label"} and type(source[0]["label"]) is int
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]
    assert "tensorflow" not in sys.modules


def test_an_image_may_have_several_labels_or_none(data_dir):
    source = TfdsSource("real", "train", data_dir=data_dir)
    found = [(example["image"], example["labels"]) for example in (source[i] for i in range(len(source)))]
    assert sorted(found) == sorted((png("train", i), several(i)) for i in range(37))
    assert source.class_names == NAMES and set(source[0]) == {"image", "labels"}
    assert source.features == {"image": Image(), "labels": Labels(NAMES)}
    assert all(type(label) is int for _, labels in found for label in labels)


@pytest.mark.parametrize(
    ("name", "label"), [("imagenet_v2", "label"), ("imagenet2012_real", "real_label"), ("voc/2007", "labels")]
)
def test_the_label_of_published_datasets(name, label, tmp_path):
    import tensorflow_datasets as tfds

    features, found = tfds_source._image_and_answers(tfds.builder(name, data_dir=tmp_path).info)
    assert found == label and set(features) == {"image", label} | ({"objects"} if name.startswith("voc") else set())


def test_formats_agree(prepared):
    for split in ("train", "test", "train[:98%]", "train[-9:]+test[3:7]"):
        a, b = (contents(TfdsSource("flowers", split, data_dir=str(root))) for root in prepared.values())
        assert a == b


@pytest.mark.parametrize(
    "parts",
    [("train[:98%]", "train[98%:]"), ("train[:10%]", "train[10%:90%]", "train[90%:]"),
     ("train[:5]", "train[5:-3]", "train[-3:]"), ("train[:1shard]", "train[1shard:]")],
)  # fmt: skip
def test_sub_splits_tile_the_split(prepared, data_dir, parts):
    import tensorflow_datasets as tfds

    splits = tfds.builder_from_directory(str(Path(data_dir) / "flowers" / "1.2.0")).info.splits
    whole, tiles = contents(TfdsSource("flowers", "train", data_dir=data_dir)), []
    for part in parts:
        tile = contents(TfdsSource("flowers", part, data_dir=data_dir))
        assert len(tile) == splits[part].num_examples
        tiles += tile
    assert tiles == whole
    assert len(set(whole)) == len(whole)


def test_a_fingerprint_tells_dataset_split_and_parts(data_dir):
    def fingerprint(split):
        return TfdsSource("flowers", split, data_dir=data_dir).fingerprint()

    whole = fingerprint("train")
    assert whole["dataset"] == "flowers/1.2.0" and whole["split"] == "train" and whole["count"] == SIZES["train"]
    assert whole == fingerprint("train") and all(type(value) in (str, int) for value in whole.values())
    assert len({tuple(fingerprint(split).items()) for split in ("train", "test", "train[:50%]", "train[50%:]")}) == 4
    # Which parts of which files is told by more than the name of the split.
    assert fingerprint("train[:5]")["records"] != fingerprint("train[5:10]")["records"]


def test_sum_of_splits(data_dir):
    train, test, both = (TfdsSource("flowers", s, data_dir=data_dir) for s in ("train", "test", "train+test"))
    assert contents(both) == contents(train) + contents(test)


def test_threads_agree_with_sequential(data_dir):
    source = TfdsSource("flowers", "train", data_dir=data_dir)
    expected = contents(source)
    order = np.random.default_rng(0).integers(0, len(source), 2000)  # NumPy indices, as Grain may give
    with ThreadPoolExecutor(8) as pool:
        examples = list(pool.map(source.__getitem__, order))
    assert [(e["image"], e["label"]) for e in examples] == [expected[i] for i in order]


def test_names_and_folders(prepared, tmp_path, monkeypatch):
    folder = prepared["tfrecord"] / "flowers" / "1.2.0"
    for where in ("1.2.0", "1.10.0", "small/1.2.0", "incomplete.9.0.0"):
        shutil.copytree(folder, tmp_path / "flowers" / where)
    names = ("flowers", "flowers:1.2.0", "flowers:1.2.*", "flowers/small", "flowers/small:1.2.0", "flowers:3.*.*")
    found = [tfds_source._find_prepared(name, tmp_path) for name in names]
    relative = [path and str(path.relative_to(tmp_path / "flowers")) for path in found]
    assert relative == ["1.10.0", "1.2.0", "1.2.0", "small/1.2.0", "small/1.2.0", None]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(TfdsSource("flowers/small", "test")) == 11
    with pytest.raises(UserError, match=r"found only flowers/1.10.0, flowers/1.2.0, flowers/small/1.2.0"):
        TfdsSource("flowers:3.0.0", "test")
    with pytest.raises(UserError, match="no tfds name"):
        TfdsSource("flowers/a/b", "test")


def test_default_config(prepared, tmp_path):
    folder, base = prepared["tfrecord"] / "flowers" / "1.2.0", tmp_path / "flowers"
    shutil.copytree(folder, base / "small" / "1.2.0")
    assert tfds_source._find_prepared("flowers", tmp_path) == base / "small" / "1.2.0"
    shutil.copytree(folder, base / "large" / "1.2.0")
    with pytest.raises(UserError, match="flowers/large or flowers/small"):
        TfdsSource("flowers", "train", data_dir=str(tmp_path))
    (base / ".config").mkdir()
    (base / ".config" / "metadata.json").write_text('{"default_config_name": "large"}')
    assert tfds_source._find_prepared("flowers", tmp_path) == base / "large" / "1.2.0"


def test_unknown_split_lists_the_splits(data_dir):
    for split in ("validation", "train[:101%]", "train[5", "train[0:9999]", "all[:3]"):
        with pytest.raises(UserError, match=r"cannot read split .*train \(37\), test \(11\)|test \(11\), train \(37\)"):
            TfdsSource("flowers", split, data_dir=data_dir)
    for split in ("train[:0%]", "train[9:8]", "train[:5]+test[4:4]"):
        with pytest.raises(UserError, match="selects no example"):
            TfdsSource("flowers", split, data_dir=data_dir)


def test_unknown_dataset_gives_near_names(tmp_path):
    with pytest.raises(UserError, match="does not know how to prepare 'cifra10': did you mean cifar10"):
        TfdsSource("cifra10", "train", data_dir=str(tmp_path))


def test_remote_folder_is_refused():
    with pytest.raises(UserError, match="gs://bucket/datasets; it must be a local one"):
        TfdsSource("cifar10", "train", data_dir="gs://bucket/datasets")


def test_not_prepared_says_how(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        TfdsSource("imagenet2012", "train", data_dir=str(tmp_path))
    for text in (str(tmp_path), "pip install tensorflow importlib_resources", f"tfds build imagenet2012 --data_dir={tmp_path}",
                 "tfds_manual_dir"):  # fmt: skip
        assert text in str(error.value)


def test_features_without_image(prepared):
    with pytest.raises(UserError, match="features text: Text"):
        TfdsSource("texts", "train", data_dir=str(prepared["array_record"]))


@pytest.mark.parametrize("keep", [0, 5, 100, "one record", -1, -20])
def test_truncated_tfrecord_names_the_file(tfrecord_copy, keep):
    path = sorted((tfrecord_copy / "flowers" / "1.2.0").glob("*train*tfrecord*"))[1]
    data = path.read_bytes()
    path.write_bytes(data[: 16 + int.from_bytes(data[:8], "little") if keep == "one record" else keep])
    complaint = "promises 13" if keep in (0, "one record") else "truncated or damaged"
    with pytest.raises(UserError, match=rf"{path.name} .*{complaint}"):
        TfdsSource("flowers", "train", data_dir=str(tfrecord_copy))


def test_damaged_tfrecord_names_the_file(tfrecord_copy):
    path = sorted((tfrecord_copy / "flowers" / "1.2.0").glob("*train*tfrecord*"))[1]
    data = bytearray(path.read_bytes())
    source = TfdsSource("flowers", "train", data_dir=str(tfrecord_copy))
    path.write_bytes(data[:100])  # behind the source's back
    with pytest.raises(UserError, match=path.name):
        contents(source)
    data[12:20] = b"\xff" * 8  # inside the first example
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"example 12: .*{path.name} is damaged"):
        contents(source)
    data[0:8] = b"\xff" * 8  # its length
    path.write_bytes(data)
    with pytest.raises(UserError, match=path.name):
        TfdsSource("flowers", "train", data_dir=str(tfrecord_copy))
    os.remove(path)
    with pytest.raises(UserError, match=f"1 of 3 record files .*{path.name}"):
        TfdsSource("flowers", "train", data_dir=str(tfrecord_copy))


def test_damaged_array_record_names_the_file(prepared, tmp_path):
    shutil.copytree(prepared["array_record"], tmp_path / "copy")
    path = sorted((tmp_path / "copy" / "flowers" / "1.2.0").glob("*train*array_record*"))[1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=path.name):
        contents(TfdsSource("flowers", "train", data_dir=str(tmp_path / "copy")))


def test_other_formats_are_refused(tfrecord_copy):
    path = tfrecord_copy / "flowers" / "1.2.0" / "dataset_info.json"
    path.write_text(path.read_text().replace('"tfrecord"', '"parquet"'))
    with pytest.raises(UserError, match="stored as parquet; only array_record and tfrecord"):
        TfdsSource("flowers", "train", data_dir=str(tfrecord_copy))
