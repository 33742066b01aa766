"""Datasets prepared by tensorflow-datasets (tfds), read at random and without TensorFlow."""

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data import segmentation
from vit_jax.data.features import Boxes, Image, Label, Labels, Segmentation, Source, digest
from vit_jax.data.host.decode import ImageError, header_size
from vit_jax.errors import UserError, did_you_mean, near, printable

_NAME = re.compile(r"(\w+)(?:/([\w+\-.]+))?(?::((?:\d+|\*)(?:\.(?:\d+|\*)){2}))?")  # dataset/config:version
MASKS = {"oxford_iiit_pet": segmentation.Classes(("pet", "background", "border"), reduce_zero_label=True)}
"""What the numbers in the masks of datasets mean, by their names in tfds."""
_MASK = "segmentation_mask"
_RESTORE = "Restore that file, or delete the folder and prepare the dataset again."


class TfdsSource(Source):
    """The images, labels, boxes or masks of one split of a prepared tfds dataset, in the order of its record files.

    `name` is `dataset`, `dataset/config` or either with `:version` (the newest prepared version otherwise). `split` is
    anything tfds knows: `train`, `train[:98%]`, `train[10%:-500]`, `train+validation`. Found by its files alone, in
    `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets, so that neither the code that once built the dataset
    nor its dependencies are needed; the files carry features.json since tfds 4.0.

    ArrayRecord goes through tfds' own data source. TFRecord, which tfds reads only through TensorFlow, goes through
    `TfRecords`. Of an example only `image` (left encoded), its label or labels, and its `objects` (of coco and voc) are
    parsed; if a task `needs` `segmentation`, `image` and `segmentation_mask` alone. The classes of masks are those of
    `MASKS`, or of classes.txt or classes.json in the dataset's folder, see `segmentation.open_folder`. Several threads may
    read at once. A dataset that is not prepared is prepared here if TensorFlow is installed (`manual_dir` holds archives
    that must be fetched by hand). What the user can mend is a `UserError`.
    """

    exif_rotated = False  # TensorFlow's decoder ignores the EXIF orientation, and so must whoever compares with it

    def __init__(
        self,
        name: str,
        split: str,
        *,
        needs: Collection[str] = (),
        data_dir: str | None = None,
        manual_dir: str | None = None,
    ):
        import tensorflow_datasets as tfds

        place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        if "://" in place:
            raise UserError(f"the tfds data folder is {place}; it must be a local one. Copy or mount the dataset.")
        root = Path(place).expanduser()
        folder = _find_prepared(name, root) or _prepare(name, root, manual_dir)
        try:
            builder = tfds.builder_from_directory(str(folder))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"{folder} is not a readable tfds dataset: {error}. Prepare it again.") from error

        self._name, self._split, self._full_name = name, split, builder.info.full_name
        self.features = {"image": Image()}
        if "segmentation" in needs:
            self._tfds_features, self._label = _image_and_mask(builder.info), ""
            self._classes = segmentation.class_table(folder, MASKS.get(builder.info.name))
            self.features["segmentation"] = Segmentation(self._classes.names, self._classes.colors)
        else:
            self._tfds_features, self._label = _image_and_answers(builder.info)
        self._decoders = {name: tfds.decode.SkipDecoding() for name in ("image", _MASK) if name in self._tfds_features}
        if self._label:
            feature = self._tfds_features[self._label]
            several = isinstance(feature, tfds.features.Sequence)
            self.features["labels" if several else "label"] = (
                Labels(tuple(feature.feature.names)) if several else Label(tuple(feature.names))
            )
        if "objects" in self._tfds_features:
            self.features["boxes"] = Boxes(tuple(self._tfds_features["objects"].feature["label"].names))
        file_format = _choose_format(builder)
        instructions = _file_instructions(builder.info, split)
        self._files = [os.fspath(i.filename) for i in instructions]
        self._parts = [(os.path.basename(i.filename), i.skip, i.take) for i in instructions]
        self._ends = np.cumsum([i.take for i in instructions])  # how many examples lie in this file or before it
        if missing := [path for path in self._files if not os.path.exists(path)]:
            raise UserError(
                f"{len(missing)} of {len(self._files)} record files of {name} {split} are missing, first "
                f"{missing[0]}. {_RESTORE}"
            )
        if file_format == tfds.core.FileFormat.TFRECORD:
            self._records: Any = TfRecords(instructions)
        else:
            self._records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image`, the bytes as stored (PNG or JPEG), with `label`, `labels` or boxes. Negative indices are an IndexError.

        Where an image may have several labels or none, as in `imagenet2012_real`, `labels` is a tuple of them.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.where(index)}: there are {len(self)} examples")
        try:
            record = self._records[int(index)]
            example = self._tfds_features.deserialize_example_np(record, decoders=self._decoders)
            found: dict[str, Any] = {"image": bytes(example["image"])}
            if "segmentation" in self.features:
                named = {"image": self.where(index), "mask": _MASK}
                return found | {"segmentation": segmentation.class_indices(bytes(example[_MASK]), self._classes, **named)}
            if "label" in self.features:
                found["label"] = int(example[self._label])
            elif "labels" in self.features:
                found["labels"] = tuple(int(x) for x in example[self._label])
            return found | (_boxes(found["image"], example["objects"]) if "boxes" in self.features else {})
        except UserError:
            raise
        except Exception as error:  # array_record and protobuf raise a different class for every kind of damage
            path = self._files[int(np.searchsorted(self._ends, index, side="right"))]
            raise UserError(f"{self.where(index)}: {path} is damaged ({error!r}). {_RESTORE}") from error

    def where(self, index: int) -> str:
        """How an error names an example: `cifar10 train[:98%], example 17`."""
        return f"{self._name} {self._split}, example {index}"

    def fingerprint(self) -> dict[str, str | int]:
        """The dataset with config and version, the split, and which parts of which record files it is."""
        about = {"dataset": self._full_name, "split": self._split, "records": digest(self._parts)}
        return super().fingerprint() | about


class TfRecords:
    """Random access to the raw records that tfds' file instructions (filename, skip, take) select.

    A TFRecord file is a sequence of: length (uint64), its CRC (uint32), data, its CRC (uint32), little-endian. The
    lengths are walked once here, in several threads as most of that time is waiting for the disk; a file that ends
    inside a record, or holds another number of records than dataset_info.json says, is a `UserError` that names it.
    The CRCs (CRC-32C, slow in Python) are not checked. A read opens its file anew: no state between threads, and no
    1,024 descriptors for the 1,024 files of ImageNet.
    """

    def __init__(self, instructions: Sequence[Any]):
        self._paths = [os.fspath(i.filename) for i in instructions]
        with ThreadPoolExecutor(16) as pool:
            spans = list(pool.map(_selected_spans, instructions))
        self._spans = np.concatenate(spans)
        self._file = np.repeat(np.arange(len(spans)), [len(s) for s in spans])

    def __getitem__(self, index: int) -> bytes:
        path = self._paths[self._file[index]]
        offset, length = (int(n) for n in self._spans[index])
        with open(path, "rb", buffering=0) as file:
            record = os.pread(file.fileno(), length, offset)
        if len(record) != length:
            raise UserError(f"{path} has become shorter since it was opened: it ends inside a record at byte {offset}")
        return record


def _selected_spans(instruction: Any) -> np.ndarray:
    """Where the selected records of one TFRecord file lie: int64 (take, 2) of offset and length of the data."""
    path, expected = os.fspath(instruction.filename), instruction.examples_in_shard
    spans, at = [], 0
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while at < size and len(spans) <= expected:
            header = os.pread(file.fileno(), 8, at)
            length = int.from_bytes(header, "little")
            if len(header) < 8 or at + 12 + length + 4 > size:
                raise UserError(
                    f"{path} is truncated or damaged: its {size} bytes end inside record {len(spans)} of "
                    f"{expected}, which starts at byte {at}. {_RESTORE}"
                )
            spans.append((at + 12, length))
            at += 12 + length + 4
    if len(spans) != expected:
        count = f"{len(spans)} records" if len(spans) < expected else "more records"
        raise UserError(f"{path} holds {count} where dataset_info.json promises {expected}. {_RESTORE}")
    return np.array(spans[instruction.skip : instruction.skip + instruction.take], np.int64)


def _prepared_folders(base: str, root: Path) -> dict[tuple[str, str], Path]:
    """{(config or "", version): folder} of every prepared variant of a dataset; a folder with features.json is one."""
    found = {}
    for pattern in ("*/features.json", "*/*/features.json"):
        for path in (root / base).glob(pattern):
            *config, version = path.parent.relative_to(root / base).parts
            if re.fullmatch(r"\d+\.\d+\.\d+", version):  # an interrupted preparation is called incomplete.…
                found["".join(config), version] = path.parent
    return found


def _find_prepared(name: str, root: Path) -> Path | None:
    """The folder of `name` under `root`: the newest version that matches; None if there is none.

    Without a config: files that have none, else the default config that tfds noted beside them, else the only one.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{name!r} is no tfds name; use DATASET, DATASET/CONFIG, DATASET:1.2.3 or DATASET/CONFIG:1.2.3")
    base, config, version = match.groups()
    wanted = (version or "*.*.*").replace(".", r"\.").replace("*", r"\d+")
    folders = {key: path for key, path in _prepared_folders(base, root).items() if re.fullmatch(wanted, key[1])}
    configs = sorted({config for config, _ in folders})
    if config is None and configs and "" not in configs:
        with contextlib.suppress(OSError, ValueError):
            config = json.loads((root / base / ".config" / "metadata.json").read_text()).get("default_config_name")
        if config not in configs:
            if len(configs) > 1:
                raise UserError(
                    f"{name!r} is prepared under {root} with several configs: say which by using "
                    f"{' or '.join(f'{base}/{c}' for c in configs)} as the dataset."
                )
            config = configs[0]
    matching = [key for key in folders if key[0] == (config or "")]
    newest = max(matching, key=lambda key: [int(n) for n in key[1].split(".")], default=None)
    return folders[newest] if newest else None


def _not_prepared(name: str, root: Path) -> str:
    """What was looked for and where, and what of that dataset is there instead."""
    base = name.split("/")[0].split(":")[0]
    others = sorted("/".join(filter(None, (base, *key))) for key in _prepared_folders(base, root))
    there = f"found only {', '.join(others)}" if others else f"there is no {base}/[CONFIG/]VERSION/features.json"
    return f"the tfds dataset {name!r} is not prepared under {root} ({there})"


def _prepare(name: str, root: Path, manual_dir: str | None) -> Path:
    """Download and prepare `name` under `root` with TensorFlow, or say how to come by it; its folder."""
    import tensorflow_datasets as tfds

    base = name.split("/")[0].split(":")[0]
    if base not in (known := tfds.list_builders(with_community_datasets=False)):
        part = [other for other in known if len(base) > 2 and base.lower() in other]  # flowers: oxford_flowers102
        folders = near(name, [path.name for path in Path().iterdir() if path.is_dir()], cutoff=0.75, most=2)
        meant = dict.fromkeys([f"the folder {printable(x)}" for x in folders] + [*near(base, known, cutoff=0.75), *part][:3])
        hint = did_you_mean(list(meant)) or "tfds.list_builders() lists the names it knows."
        raise UserError(
            f"{name} is no folder here; {_not_prepared(name, root)}, and tfds does not know how to prepare {base!r}: {hint}"
        )
    by_hand = "A dataset whose archives must be fetched by hand, such as imagenet2012, needs config.tfds_manual_dir"
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{_not_prepared(name, root)}. If it lies elsewhere, set config.tfds_data_dir or $TFDS_DATA_DIR.\n"
            f"Preparing it needs TensorFlow, once; reading it does not:\n  pip install tensorflow importlib_resources\n"
            f"  tfds build {name} --data_dir={root}\n{by_hand} (for `tfds build`: --manual_dir=DIR)."
        )
    try:
        builder = tfds.builder(name, data_dir=str(root))
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
        return Path(builder.data_path)
    except Exception as error:  # downloads, checksums, archives by hand, missing packages: each fails in its own way
        message = f"{_not_prepared(name, root)}, and preparing it failed: {error}"
        raise UserError(f"{message}\n{by_hand}, which was {manual_dir!r}.") from error


def _choose_format(builder: Any) -> Any:
    """Make `builder` read ArrayRecord if it has it, else TFRecord, and return which; its file names depend on it."""
    import tensorflow_datasets as tfds

    formats = builder.info.available_file_formats()
    for file_format in (tfds.core.FileFormat.ARRAY_RECORD, tfds.core.FileFormat.TFRECORD):
        if file_format in formats:
            builder.info.set_file_format(file_format, override=True, override_if_initialized=True)
            return file_format
    stored = ", ".join(sorted(f.value for f in formats))
    raise UserError(
        f"{builder.data_path} is stored as {stored}; only array_record and tfrecord can be read. Prepare "
        "it again in another folder, with `tfds build --file_format=array_record --data_dir=DIR`."
    )


def _image_and_answers(info: Any) -> tuple[Any, str]:
    """A FeaturesDict of image, label and objects alone, so that nothing else is ever decoded; and the label's name, or "".

    The label is `label`, a ClassLabel; else a Sequence of ClassLabels: the supervised one, or `labels`, or the first one.
    `objects` is a Sequence of dicts with `bbox` and `label`.
    """
    import tensorflow_datasets as tfds

    features = info.features
    held = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {"(all)": features}

    def has_classes(feature: Any) -> bool:
        return isinstance(feature, tfds.features.ClassLabel) and bool(feature.num_classes)

    candidates = ["label"] if has_classes(held.get("label")) else []
    if not candidates:
        several = [name for name, f in held.items() if isinstance(f, tfds.features.Sequence) and has_classes(f.feature)]
        supervised = info.supervised_keys[1] if info.supervised_keys else None
        candidates = [name for name in (supervised, "labels") if name in several] or several
    parts = getattr(held.get("objects"), "feature", None)
    with_boxes = (
        isinstance(parts, tfds.features.FeaturesDict) and "bbox" in parts and "label" in parts and has_classes(parts["label"])
    )
    if not isinstance(held.get("image"), tfds.features.Image) or not (candidates or with_boxes):
        listing = ", ".join(f"{key}: {type(feature).__name__}" for key, feature in held.items())
        raise UserError(
            f"{info.full_name} cannot be used: it has the features {listing}, where `image: Image` and `label: ClassLabel` "
            "with its classes, or a Sequence of these, or `objects` with `bbox` and `label` are needed. Choose another dataset."
        )
    kept = ["image", *candidates[:1], *(["objects"] if with_boxes else [])]
    return tfds.features.FeaturesDict({key: held[key] for key in kept}), candidates[0] if candidates else ""


def _image_and_mask(info: Any) -> Any:
    """A FeaturesDict of the image and its mask alone. UserError for a dataset without a mask of one channel."""
    import tensorflow_datasets as tfds

    features = info.features
    held = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {"(all)": features}
    image, mask = held.get("image"), held.get(_MASK)
    if not all(isinstance(x, tfds.features.Image) for x in (image, mask)) or mask.shape[-1] != 1:
        listing = ", ".join(f"{key}: {type(feature).__name__}" for key, feature in held.items())
        raise UserError(
            f"{info.full_name} has the features {listing}: segmentation needs `image` and `{_MASK}`, an image of one channel"
        )
    return tfds.features.FeaturesDict({"image": image, _MASK: mask})


def _boxes(image: bytes, objects: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Objects, whose boxes are top, left, bottom, right as parts of the image, as `features.Boxes` has them.

    COCO's crowds and VOC's difficult objects are both what an evaluation ignores.
    """
    try:
        height, width = header_size(image)
    except ImageError:  # the loader's to report: it knows what to do about it
        height = width = 1
    boxes = np.asarray(objects["bbox"], np.float32).reshape(-1, 4)
    return {
        "boxes": boxes[:, [1, 0, 3, 2]] * np.array([width, height, width, height], np.float32),
        "box_labels": np.asarray(objects["label"], np.int32),
        "box_crowd": np.asarray(objects.get("is_crowd", objects.get("is_difficult", np.zeros(len(boxes)))), bool),
    }


def _file_instructions(info: Any, split: str) -> list[Any]:
    """tfds' (filename, skip, take, examples_in_shard) of each record file of `split`; never empty."""
    import tensorflow_datasets as tfds

    available = ", ".join(f"{s.name} ({s.num_examples})" for s in info.splits.values())
    allowed = f"{info.full_name} has the splits {available}; parts such as train[:98%] and sums such as A+B work too."
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits)
        instructions = list(info.splits[split].file_instructions)
    except Exception as error:  # tfds raises ValueError, KeyError, AssertionError and more, with a page of context
        raise UserError(f"cannot read split {split!r}: {str(error).strip().splitlines()[-1]} {allowed}") from error
    for part in parts:
        start, stop = part.from_ or 0, info.splits[part.splitname].num_examples if part.to is None else part.to
        if start >= stop:
            raise UserError(f"split {split!r} selects no example: {part.splitname}[{start}:{stop}] is empty. {allowed}")
    return instructions
