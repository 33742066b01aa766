"""Small tfds datasets prepared on disk in both formats, without TensorFlow."""

import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("rose", "daisy", "tulip")
SIZES = {"train": 37, "test": 11}


def png(split: str, i: int) -> bytes:
    rng = np.random.default_rng([i, len(split)])
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (4 + i % 3, 5, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tfrecord(data: bytes) -> bytes:
    def masked(part: bytes) -> bytes:
        crc = crc32c(part)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def build(root: Path, name: str, features: dict, example) -> Path:
    """Prepare a dataset by tfds itself as ArrayRecord in 3 files; its class is not registered, as if it had no code."""
    import tensorflow_datasets as tfds

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "toy"  # tfds looks into the package of any other, for which it needs importlib_resources
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split, size) for split, size in SIZES.items()}

        def _generate_examples(self, split, size):
            for i in range(size):
                yield i, example(split, i)

    Toy.name = name
    builder = Toy(data_dir=str(root), file_format="array_record")
    config = tfds.download.DownloadConfig(num_shards=3, compute_stats=tfds.download.ComputeStatsMode.SKIP)
    builder.download_and_prepare(download_config=config)
    return Path(builder.data_path)


def to_tfrecord(folder: Path, target: Path) -> None:
    """The same examples in the same shards, as TFRecord files."""
    from array_record.python.array_record_module import ArrayRecordReader

    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*array_record*"))
    for shard in folder.glob("*array_record*"):
        reader = ArrayRecordReader(str(shard))
        records = [reader.read([i])[0] for i in range(reader.num_records())]
        (target / shard.name.replace("array_record", "tfrecord")).write_bytes(b"".join(map(tfrecord, records)))
    info = json.loads((target / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (target / "dataset_info.json").write_text(json.dumps(info))
