"""Measures how many images a second a model classifies, on random weights and images.

python -m vit_jax.inference_time --workdir=runs/speed --config.model_name=ViT-B_32
python -m vit_jax.inference_time --workdir=runs/speed --config.model_name=ViT-S_16 --config.batch=64 --config.dtype=bfloat16
"""

import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vit_jax import models
from vit_jax.data.device import augment
from vit_jax.errors import UserError
from vit_jax.files import COMPILED_PROGRAMS
from vit_jax.models import token_merging
from vit_jax.optimize import parallel
from vit_jax.run import workdir as workdirs
from vit_jax.run.writer import Writer, logging_to
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
    tome: int = 0  # tokens that each block merges
    compilation_cache: str | None = COMPILED_PROGRAMS


def inference_time(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, float]:
    """Classifies random images `initial_steps` + `steps` times, and reports the images a second of the latter.

    Writes `img_sec_core` (median over steps, by device) and its spread. Returns them.
    """
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    check_names(InferenceSettings, fields, "config")
    settings = InferenceSettings(**fields)
    devices = jax.device_count()
    if settings.batch < 1 or settings.batch % devices or settings.steps < 1:
        raise UserError(
            f"batch={settings.batch} must be a multiple of the {devices} device(s), and steps={settings.steps} at least 1"
        )
    model = models.get_model(settings.model_name, num_classes=settings.num_classes, dtype=settings.dtype)
    token_merging.check(model, settings.tome)
    directory = workdirs.make(workdir)
    with logging_to(directory):
        images = np.random.default_rng(0).integers(
            0, 256, (settings.batch, settings.image_size, settings.image_size, 3), np.uint8
        )
        parallelism = parallel.Pmap()
        params = parallelism.create(lambda: model.init(jax.random.key(0), augment.normalize(images[:1]))["params"])
        merging = token_merging.merging(settings.tome)
        classify = parallelism.eval_examples(merging(lambda p, x: model.apply({"params": p}, augment.normalize(x["image"]))))
        batch = parallelism.send({"image": images})
        seconds = []
        for _ in range(settings.initial_steps + settings.steps):
            started = time.perf_counter()
            jax.block_until_ready(classify(params, batch))
            seconds.append(time.perf_counter() - started)
        rates = settings.batch / np.array(seconds[settings.initial_steps :]) / devices
        low, median, high = np.quantile(rates, [0.1, 0.5, 0.9])
        metrics = {"img_sec_core": median, "img_sec_core_p10": low, "img_sec_core_p90": high}
        writer = Writer(directory)
        writer.scalars(settings.steps, metrics)
        writer.close()
        kind = jax.devices()[0].device_kind
        log.info(
            "%s%s, batch %d at %d px, %s on %d x %s",
            settings.model_name,
            f" with tome={settings.tome}" if settings.tome else "",
            settings.batch,
            settings.image_size,
            settings.dtype,
            devices,
            kind,
        )
        log.info("%.1f images/s a device (median of %d steps; 10 %% to 90 %%: %.1f to %.1f)", median, settings.steps, low, high)
        return metrics


def cli() -> None:
    """The console command: training's, with this recipe."""
    from vit_jax import main

    main.cli(__doc__, "--config=inference_time")


if __name__ == "__main__":
    cli()
