"""A recipe small enough to train within a second: 1 block of width 16 on a hundred 8-pixel digits."""

import json
from pathlib import Path

import ml_collections
import numpy as np

from configs import pretrain


def config(**overrides) -> ml_collections.ConfigDict:
    """An epoch is 100 examples, 6.25 batches; `pp_train="train"` stands for `config.pp.train`."""
    c = pretrain.get_config("micro4,digits")
    c.model.hidden_size = 16
    c.model.transformer.update({"num_layers": 1, "mlp_dim": 16, "num_heads": 2, "dropout_rate": 0.1})
    c.pp.update({"train": "train[:100]", "test": "test[:37]", "crop": 8})
    c.report = False  # a quarter of a second each
    c.update({"batch": 16, "batch_eval": 8, "total_steps": 20, "warmup_steps": 2, "progress_every": 1, "eval_every": 10})
    for name, value in overrides.items():
        target, field = (c.pp, name.removeprefix("pp_")) if name.startswith("pp_") else (c, name)
        target[field] = value
    return c


def metrics(workdir: Path, name: str) -> dict[int, float]:
    """The values of one scalar in `metrics.jsonl`, by step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """The parameters that a run left behind, flat."""
    return dict(np.load(workdir / "model.npz"))
