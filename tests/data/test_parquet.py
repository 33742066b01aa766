"""Parquet files as the datasets library writes them: an image's bytes, a label, and the classes in the metadata."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from vit_jax.data import sources
from vit_jax.errors import UserError

CLASSES = ["cat", "dog", "ö"]
FEATURES = {
    "img": {"_type": "Image"},
    "fine": {"names": CLASSES, "_type": "ClassLabel"},
    "id": {"dtype": "int64", "_type": "Value"},
}


BAD_NAMES = pa.StructArray.from_arrays([pa.array([b"x"] * 3), pa.array([b"\x80.png"] * 3).view("string")], ["bytes", "path"])


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def write(
    path: Path, values: range, *, features: dict | None = FEATURES, labels: list | None = None, images: list | None = None
) -> None:
    images = images or [{"bytes": png(v), "path": f"{v}.png"} for v in values]
    columns = {"img": images, "fine": labels or [v % 3 for v in values], "id": list(values)}
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=4)


def test_rows_are_read_in_any_order_from_several_files(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", range(10))
    write(tmp_path / "data" / "train-00001-of-00002.parquet", range(10, 17))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", range(20, 23))
    train, test = (sources.get_source(str(tmp_path), split, needs=("image", "label")) for split in ("train", "validation"))
    assert (len(train), len(test), train.class_names) == (17, 3, tuple(CLASSES))
    for i in (16, 3, 11, 0, 9, 10):
        assert train[i] == {"image": png(i), "label": i % 3}
    assert test[2] == {"image": png(22), "label": 1}
    assert train.where(11) == f"{tmp_path}/data/train-00001-of-00002.parquet: row 1 of group 0"
    part = sources.get_source(str(tmp_path), "train[5:8]")
    assert len(part) == 3 and part[1] == train[6] and part.fingerprint() != train.fingerprint()


def test_images_alone_need_no_label(tmp_path):
    write(tmp_path / "train.parquet", range(20), features={"img": {"_type": "Image"}})
    train, test = (sources.get_source(f"unlabelled:{tmp_path}", split) for split in ("train", "test"))
    assert (len(train), len(test), set(train.features)) == (18, 2, {"image"}) and train.fingerprint() != test.fingerprint()
    assert sorted(example["image"] for source in (train, test) for example in source) == sorted(map(png, range(20)))
    assert sources.get_source(f"unlabelled:{tmp_path}", "train[3:]")[0] == train[3]
    write(tmp_path / "test.parquet", range(3))
    assert [len(sources.get_source(f"unlabelled:{tmp_path}", split)) for split in ("train", "test")] == [20, 3]


def test_few_groups_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_jax.data.parquet.KEPT", 1)
    write(tmp_path / "train.parquet", range(12))
    source = sources.get_source(str(tmp_path), "train")
    assert [source[i]["label"] for i in (11, 0, 5, 1)] == [2, 0, 2, 1] and len(source._kept) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": None}, "does not say what its columns are"),
        ({"features": {"img": {"_type": "Image"}}}, "needs one column of kind Image and one of kind ClassLabel; it has img"),
        ({"features": FEATURES | {"fine": {"names": ["a"], "_type": "ClassLabel"}}}, "has no names of two classes or more"),
        ({"labels": [0, None, 0]}, "row 1 of group 0 has label None, allowed are 0 to 2"),
        ({"labels": ["0", "1", "2"]}, "row 1 of group 0 has label 1, allowed are 0 to 2"),
        ({"labels": [0, 3, 0]}, "row 1 of group 0 has label 3, allowed are 0 to 2"),
        ({"images": BAD_NAMES}, "row 1 of group 0 is damaged: 'utf-8' codec"),
        ({"images": [{"bytes": None, "path": "a.png"}] * 3}, "row 1 of group 0 has no bytes of an image"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, fields, message):
    write(tmp_path / "train.parquet", range(3), **fields)
    with pytest.raises(UserError, match=message):
        sources.get_source(str(tmp_path), "train")[1]


def test_other_files_are_refused(tmp_path):
    write(tmp_path / "train-0.parquet", range(3))
    with pytest.raises(UserError, match="has files for train, not for 'test': name parts"):
        sources.get_source(str(tmp_path), "test")
    write(tmp_path / "train-1.parquet", range(3), features=FEATURES | {"fine": {"names": CLASSES[::-1], "_type": "ClassLabel"}})
    with pytest.raises(UserError, match="train-1.parquet has other columns or classes than"):
        sources.get_source(str(tmp_path), "train")
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="is no Parquet file"):
        sources.get_source(str(tmp_path), "train")
