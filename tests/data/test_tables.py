"""Parquet and Arrow files as the datasets library writes them: an image's bytes, a label, and the classes in the metadata."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import ipc, parquet

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
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=4)
        return
    with ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=4)


def save(folder: Path, *parts: range, **fields) -> None:
    """Writes what `Dataset.save_to_disk` does, one file a part, and a file that `map` has left beside them."""
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, values in zip(names, parts, strict=True):
        write(folder / name, values, **fields)
    write(folder / "cache-0123.arrow", range(50, 90))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}))


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


def test_what_save_to_disk_writes_is_read(tmp_path):
    save(tmp_path / "train", range(10), range(10, 17))
    save(tmp_path / "test", range(20, 23))
    save(tmp_path / "more", range(3))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test", "more"]}')
    train, test, more = (sources.get_source(str(tmp_path), split, needs=("label",)) for split in ("train", "val", "more"))
    assert (len(train), len(test), len(more), train.class_names) == (17, 3, 3, tuple(CLASSES))
    for i in (16, 3, 11, 0, 9, 10):
        assert train[i] == {"image": png(i), "label": i % 3}
    assert test[2] == {"image": png(22), "label": 1}
    assert train.where(15) == f"{tmp_path}/train/data-00001-of-00002.arrow: row 1 of group 1"
    alone = [sources.get_source(f"{kind}{tmp_path}/train", "train") for kind in ("", "unlabelled:")]
    assert [len(source) for source in alone] == [17, 15] and alone[0][3] == train[3]


def test_the_cache_of_datasets_is_read(tmp_path):
    for name, values in {"a-train-00000-of-00002": range(7), "a-train-00001-of-00002": range(7, 9), "a-test": range(3)}.items():
        write(tmp_path / f"{name}.arrow", values)
    write(tmp_path / "cache-train.x.arrow", range(50, 90))
    (tmp_path / "dataset_info.json").write_text("{}")
    train, test = (sources.get_source(str(tmp_path), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (9, 3) and train[8] == {"image": png(8), "label": 2}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{}]}', "by a list of indices: save dataset.flat"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "does not name the dataset's .arrow files"),
        ('{"_data_files": [{"filename": "b.arrow"}]}', "b.arrow cannot be read: No such file"),
        ("{", "state.json is no JSON"),
    ],
)
def test_what_is_no_saved_dataset_is_refused(tmp_path, state, message):
    write(tmp_path / "a.arrow", range(3))
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match=message):
        sources.get_source(str(tmp_path), "train")


def test_a_damaged_arrow_file_is_refused(tmp_path):
    save(tmp_path, range(9))
    file = tmp_path / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    offsets = np.cumsum([0, *(len(png(i)) for i in range(4))], dtype=np.int32)
    file.write_bytes(whole.replace(offsets.tobytes(), (1000 * offsets).tobytes(), 1))
    with pytest.raises(UserError, match="is no Arrow stream, or is damaged"):
        sources.get_source(str(tmp_path), "train")[1]
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is no Arrow stream, or is damaged"):
        sources.get_source(str(tmp_path), "train")


def test_images_alone_need_no_label(tmp_path):
    write(tmp_path / "train.parquet", range(20), features={"img": {"_type": "Image"}})
    train, test = (sources.get_source(f"unlabelled:{tmp_path}", split) for split in ("train", "test"))
    assert (len(train), len(test), set(train.features)) == (18, 2, {"image"}) and train.fingerprint() != test.fingerprint()
    assert sorted(example["image"] for source in (train, test) for example in source) == sorted(map(png, range(20)))
    assert sources.get_source(f"unlabelled:{tmp_path}", "train[3:]")[0] == train[3]
    write(tmp_path / "test.parquet", range(3))
    assert [len(sources.get_source(f"unlabelled:{tmp_path}", split)) for split in ("train", "test")] == [20, 3]


def test_few_groups_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_jax.data.tables.KEPT", 1)
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
