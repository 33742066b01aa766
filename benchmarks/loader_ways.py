"""Ways from JPEGs in memory to batches of random crops, and training on them: the workers of `benchmarks.loader`.

Every way cuts an Inception crop out of a JPEG and resizes it to 224 pixels. TensorFlow's worker runs in an interpreter
of its own: it imports nothing of ours, and its batches stay on the host where that has no JAX.
"""

import itertools
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import side_by_side

SIZE = 224
EPOCH = 50_000


class Photos:
    """A few examples that stand for a dataset of `count`."""

    num_classes, exif_rotated = 1000, True

    def __init__(self, images: list[bytes | np.ndarray], count: int = EPOCH):
        from vit_jax.data import features

        self.images, self.count = images, count
        self.features = {"image": features.Image(), "label": features.Label(tuple(map(str, range(self.num_classes))))}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index % len(self.images)], "label": index % 1000}

    def where(self, index: int) -> str:
        return f"photo {index}"

    def path(self, index: int) -> None:
        return None

    def fingerprint(self) -> dict[str, int]:
        return {"count": self.count}


class Mapped(Photos):
    """The same with the images of `memory.OnDisk`, in a folder."""

    def __init__(self, images: list[bytes], folder: str):
        from vit_jax.data import memory

        super().__init__(memory.kept(Photos(images, len(images)), cache_gb=0, cache_dir=folder))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"image": self.images[index % len(self.images)]["image"]}


def ours(job: dict[str, Any]) -> Iterator[dict]:
    """`loader.train_batches`, uint8, sent to the device ahead of time."""
    from vit_jax.data import loader
    from vit_jax.data.host.decode import decode
    from vit_jax.data.host.view import train_image
    from vit_jax.optimize import parallel
    from vit_jax.tasks import classify

    images = _jpegs(job)
    if job.get("kept"):
        images = [decode(image, exif_rotated=True) for image in images]

    def transform(image: bytes | np.ndarray, **how) -> dict[str, np.ndarray]:
        return {"image": train_image(image, crop=SIZE, scaled_decoding=job.get("scaled", True), **how)}

    photos = Mapped(images, job["folder"]) if job.get("folder") else Photos(images)
    example = classify.make_train_example(transform, photos.num_classes)
    return parallel.Pmap().prefetch(loader.train_batches(photos, example, batch_size=job["batch"], seed=0), 2)


def pil(job: dict[str, Any]) -> Iterator[dict]:
    """Pillow on two threads: decode, crop, bilinear resize (antialiased: Pillow knows no other), sent ahead of time."""
    import io

    from PIL import Image

    from vit_jax.data.host.crop import inception_box
    from vit_jax.optimize import parallel

    jpegs, rng, executor = _jpegs(job), np.random.default_rng(0), ThreadPoolExecutor(2)

    def load(number: int, seed: int) -> np.ndarray:
        image = Image.open(io.BytesIO(jpegs[number % len(jpegs)])).convert("RGB")
        top, left, h, w = inception_box((image.height, image.width), np.random.default_rng(seed))
        return np.asarray(image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))

    def batches() -> Iterator[dict]:
        loading = deque()
        for start in itertools.count(0, job["batch"]):
            numbers = range(start, start + job["batch"])
            loading.append(executor.map(load, numbers, rng.integers(2**32, size=job["batch"])))
            if len(loading) > 2:
                yield {"image": np.stack(list(loading.popleft()))}

    return parallel.Pmap().prefetch(batches(), 2)


def tf_data(job: dict[str, Any]) -> Iterator[dict]:
    """The reference's pipeline: float32 in [-1, 1], flipped at random, sent ahead of time as flax's prefetch_to_device does."""
    import tensorflow as tf

    def load(jpeg):
        image = tf.io.decode_jpeg(jpeg, channels=3)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros([0, 0, 4], tf.float32),
            area_range=(0.05, 1.0),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.image.resize(tf.slice(image, begin, size), (SIZE, SIZE))
        image = tf.image.random_flip_left_right(image)
        return (image - 127.5) / 127.5

    data = tf.data.Dataset.from_tensor_slices(_jpegs(job)).repeat().map(load, num_parallel_calls=tf.data.AUTOTUNE)
    batches = data.batch(job["batch"], drop_remainder=True).prefetch(2).as_numpy_iterator()
    try:
        import jax
    except ImportError:
        return ({"image": batch} for batch in batches)
    sent = ({"image": jax.device_put(batch[None])} for batch in batches)

    def ahead() -> Iterator[dict]:
        queue = deque(itertools.islice(sent, 2))
        while True:
            yield queue.popleft()
            queue.append(next(sent))

    return ahead()


def train(job: dict[str, Any]) -> Callable[[int], float]:
    """Steps of a model, on batches of the loader or on one batch that is on the device already."""
    import jax

    from configs import common, models
    from vit_jax.run import experiment, start
    from vit_jax.settings import Settings

    config = common.get_config()
    models.use(config, job["model"])
    config.update({"dataset": "photos", "batch": job["batch"], "accum_steps": 1, "total_steps": 1000, "pretrained_dir": ""})
    s = Settings.from_config(config)
    e = experiment.build(s, get_source=lambda *_, **__: Photos([]))
    state, update, batches = start.new_state(e), experiment.make_update(e), ours(job)
    if job["data"] == "device":
        batch = jax.block_until_ready(next(batches))
        batches.close()
        batches = itertools.repeat(batch)

    def repeat(n: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(n):
            state, metrics = update(state, next(batches))
            jax.block_until_ready(metrics)
        return (time.perf_counter() - started) / n

    return repeat


def _jpegs(job: dict[str, Any]) -> list[bytes]:
    return pickle.loads(Path(job["photos"]).read_bytes())


def _steadily(batches: Iterator[Any], batch_size: int, clock: Callable[[], float]) -> Callable[[int], float]:
    """n → seconds of a batch, after as many as were loaded ahead during the pause."""

    def repeat(n: int) -> float:
        for _ in range(3 + -(-64 // batch_size)):
            next(batches)
        started = clock()
        for _ in range(n):
            batch = next(batches)
        if hasattr(batch["image"], "block_until_ready"):
            batch["image"].block_until_ready()
        return (clock() - started) / n

    return repeat


def build(job: dict[str, Any]) -> tuple[Callable[[int], float], dict[str, Any]]:
    if job["way"] == "train":
        return train(job), {}
    ways = {"ours": ours, "pil": pil, "tf.data": tf_data}
    batches = ways[job["way"]](job)
    clock = time.process_time if job.get("cpu") else time.perf_counter
    return _steadily(batches, job["batch"], clock), {"on_device": hasattr(next(batches)["image"], "block_until_ready")}


if __name__ == "__main__":
    side_by_side.serve(build)
