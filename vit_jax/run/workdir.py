"""The folder of a run: whose it is, and what of it others can use."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_jax.checkpoint import classes, lora_file, state
from vit_jax.checkpoint.describe import Description
from vit_jax.errors import UserError
from vit_jax.files import write_atomically
from vit_jax.optimize import parallel
from vit_jax.settings import Settings

RESULTS = "model.npz", lora_file.FILE

# These may differ when a run is continued: they do not touch what is learnt.
_FREE = {
    *("trainer", "evaluator", "pretrained", "pretrained_dir", "tfds_data_dir", "tfds_manual_dir", "prefetch", "batch_eval"),
    *("progress_every", "eval_every", "checkpoint_every", "keep", "keep_best", "evaluators"),
    *("parallel", "mesh", "remat", "compilation_cache", "nonfinite", "nonfinite_limit", "bad_images"),
}


def make(workdir: str | os.PathLike) -> Path:
    """The folder, made if it is not there. UserError if it cannot be."""
    path = Path(workdir).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir={workdir} cannot be made a folder: {e}") from e
    if not os.access(path, os.W_OK):
        raise UserError(f"--workdir={workdir} cannot be written to")
    return path


def claim(workdir: Path, settings: Settings, class_names: Sequence[str], origin: Description | None = None) -> None:
    """Makes `workdir` and writes the run's `config.json`; UserError if it holds results of a run with another config."""
    path = workdir / "config.json"
    config = json.loads(json.dumps(dataclasses.asdict(settings)))
    if path.exists():
        try:
            defaults = _flatten(json.loads(json.dumps(dataclasses.asdict(Settings()))))
            old, new = defaults | _flatten(json.loads(path.read_text())), _flatten(config)
        except (ValueError, AttributeError) as e:
            raise UserError(f"{path} is no config of a run ({e}): move it away to claim the folder anew") from e
        keys = [k for k in sorted(old | new) if k.split(".")[0] not in _FREE and old.get(k) != new.get(k)]
        if keys and has_results(workdir):
            sides = ("-", old), ("+", new)
            lines = [f"  {sign} {k} = {side[k]!r}" for k in keys for sign, side in sides if k in side]
            raise UserError(
                f"{workdir} belongs to a run with another config (- before, + now):\n"
                + "\n".join(lines)
                + "\nGive the new run a --workdir of its own, or repeat the old config to continue."
            )
    if not parallel.is_main():
        return
    write_atomically(path, lambda f: f.write((json.dumps(config, indent=2) + "\n").encode()))
    known = {"class_names": list(class_names), "origin": origin and origin.to_json()}
    _write_notes(workdir, _notes(workdir) | known)


def origin(workdir: Path) -> Description | None:
    """What the run that `workdir` holds started from, as `claim` noted it, so that it goes on without that file."""
    content = _notes(workdir).get("origin")
    return content and Description.from_json(content, workdir / "start.json")


def check_frozen(workdir: Path, fingerprints: dict[str, str]) -> None:
    """Notes what the run does not train and no checkpoint holds; UserError if it was something else when the run began."""
    if not fingerprints:
        return
    notes = _read_notes(workdir)
    known = notes.get("frozen", {})
    if any(known.get(name, fingerprint) != fingerprint for name, fingerprint in fingerprints.items()):
        raise UserError(
            f"the run in {workdir} began with other frozen parameters than those that --config.pretrained or "
            "--config.distill.teacher hold now: bring the old files back, or give the new run a --workdir of its own"
        )
    if parallel.is_main():
        _write_notes(workdir, notes | {"frozen": known | fingerprints})


def check_classes(workdir: Path, class_names: Sequence[str]) -> None:
    """Raises UserError if the run that `workdir` holds learnt other classes, or the same ones in another order."""
    known = _notes(workdir).get("class_names", list(class_names))
    classes.check_same(known, class_names, where=f"the run in {workdir}")


def _notes(workdir: Path) -> dict[str, Any]:
    """What is known of the run that `workdir` holds; nothing of one that never came to a result."""
    return _read_notes(workdir) if has_results(workdir) else {}


def _read_notes(workdir: Path) -> dict[str, Any]:
    path = workdir / "start.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_notes(workdir: Path, notes: dict[str, Any]) -> None:
    text = json.dumps(notes, indent=2, ensure_ascii=False) + "\n"
    write_atomically(workdir / "start.json", lambda f: f.write(text.encode()))


def find_npz(source: str | os.PathLike) -> str | os.PathLike:
    """What the run of a workdir left behind; any other source as it is. UserError for the workdir of a run that goes on."""
    folder = Path(source).expanduser()
    for name in RESULTS:
        if (folder / name).is_file():
            return folder / name
    if (folder / "train.log").is_file():
        raise UserError(f"{source} holds no {RESULTS[0]}: the run there has not finished; continue it, or name a file")
    return source


def has_model(workdir: Path) -> bool:
    """Whether a run has come to its end there."""
    return any((workdir / name).exists() for name in RESULTS)


def has_results(workdir: Path) -> bool:
    """Whether a run has left anything there that can be gone on from or used."""
    return has_model(workdir) or bool(state.steps_in(workdir / "checkpoints"))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
