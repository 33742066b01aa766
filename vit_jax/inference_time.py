"""Measures inference speed: `config.trainer = "inference_time"`, see configs/inference_time.py."""

import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vit_jax import models, parallel, runtime
from vit_jax import workdir as workdirs
from vit_jax.data import augment
from vit_jax.errors import UserError
from vit_jax.metrics import Writer, logging_to
from vit_jax.settings import check_names

log = logging.getLogger("vit_jax")


@dataclasses.dataclass(frozen=True)
class InferenceSettings:
    """The fields of configs/inference_time.py."""

    model_name: str
    trainer: str = "inference_time"
    dtype: str = "float32"
    steps: int = 30
    initial_steps: int = 10
    batch: int = 8
    num_classes: int = 1000
    image_size: int = 224
    compilation_cache: str | None = runtime.CACHE


def inference_time(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, float]:
    """Classifies random images `initial_steps` + `steps` times, and reports the images a second of the latter.

    Writes `img_sec_core` (median over steps, by device) and its spread. Returns them.
    """
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    check_names(InferenceSettings, fields, "config")
    s = InferenceSettings(**fields)
    devices = jax.device_count()
    if s.batch < 1 or s.batch % devices or s.steps < 1:
        raise UserError(f"batch={s.batch} must be a multiple of the {devices} device(s), and steps={s.steps} at least 1")
    model = models.get_model(s.model_name, num_classes=s.num_classes, dtype=s.dtype)
    directory = workdirs.make(workdir)
    with logging_to(directory):
        images = np.random.default_rng(0).integers(0, 256, (s.batch, s.image_size, s.image_size, 3), np.uint8)
        way = parallel.Pmap()
        params = way.create(lambda: model.init(jax.random.key(0), augment.normalize(images[:1]))["params"])
        classify = way.apply(lambda p, x: model.apply({"params": p}, augment.normalize(x["image"])))
        batch = way.send({"image": images})
        seconds = []
        for _ in range(s.initial_steps + s.steps):
            started = time.perf_counter()
            jax.block_until_ready(classify(params, batch))
            seconds.append(time.perf_counter() - started)
        rates = s.batch / np.array(seconds[s.initial_steps :]) / devices
        low, median, high = np.quantile(rates, [0.1, 0.5, 0.9])
        metrics = {"img_sec_core": median, "img_sec_core_p10": low, "img_sec_core_p90": high}
        writer = Writer(directory)
        writer.scalars(s.steps, metrics)
        writer.close()
        kind = jax.devices()[0].device_kind
        log.info("%s, batch %d at %d px, %s on %d x %s", s.model_name, s.batch, s.image_size, s.dtype, devices, kind)
        log.info("%.1f images/s a device (median of %d steps; 10 %% to 90 %%: %.1f to %.1f)", median, s.steps, low, high)
        return metrics
