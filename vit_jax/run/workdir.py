"""The folder of a run: whose it is, and what of it others can use."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.checkpoint import classes, state
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.results import RESULTS
from vit_jax.errors import UserError
from vit_jax.files import write_json
from vit_jax.optimize import parallel
from vit_jax.run import notes
from vit_jax.settings import Settings

log = logging.getLogger("vit_jax")

# These may differ when a run is continued: they do not touch what is learnt.
_FREE = {
    *("trainer", "evaluator", "pretrained", "pretrained_dir", "tfds_data_dir", "tfds_manual_dir", "prefetch", "batch_eval"),
    *("progress_every", "eval_every", "checkpoint_every", "keep", "keep_best", "end_with_best", "evaluators", "report"),
    *("parallel", "mesh", "remat", "compilation_cache", "nonfinite", "nonfinite_limit", "bad_images", "changed_data"),
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
    """Makes `workdir` and writes the run's `config.json` and notes.

    UserError if it holds results of a run with another config, or of which nothing tells.
    """
    config = json.loads(json.dumps(dataclasses.asdict(settings)))
    known = _notes(workdir)
    if has_results(workdir):
        _check_config(workdir, config, known.get("config"))
    if not parallel.is_main():
        return
    path = workdir / "config.json"
    try:
        write_json(path, config)
        path = workdir / notes.FILE
        begun = {"config": config, "class_names": list(class_names), "origin": origin and origin.to_json()}
        notes.write(workdir, known | begun)
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror}): move it away, or make the folder writable") from e


def _check_config(workdir: Path, config: dict[str, Any], noted: dict[str, Any] | None) -> None:
    """Raises UserError if what the run in `workdir` was told, by its `config.json` and its notes, differs from `config`."""
    path = workdir / "config.json"
    defaults, new = _flatten(json.loads(json.dumps(dataclasses.asdict(Settings())))), _flatten(config)
    olds = [] if noted is None else [defaults | _flatten(noted)]
    if path.exists():
        try:
            olds.append(defaults | _flatten(json.loads(path.read_text())))
        except (OSError, ValueError, AttributeError, RecursionError) as e:
            raise UserError(f"{path} is no config of a run ({e}): move it away, and repeat the command") from e
    if not olds:
        raise UserError(
            f"{workdir} holds results of a run of which neither config.json nor {notes.FILE} tells: bring one of them back, "
            "or give the new run a --workdir of its own"
        )
    for old in olds:
        if keys := [k for k in sorted(old | new) if k.split(".")[0] not in _FREE and _meant(k, old) != _meant(k, new)]:
            sides = ("-", old), ("+", new)
            lines = [f"  {sign} {k} = {side[k]!r}" for k in keys for sign, side in sides if k in side]
            raise UserError(
                f"{workdir} belongs to a run with another config (- before, + now):\n"
                + "\n".join(lines)
                + "\nGive the new run a --workdir of its own, or repeat the old config to continue."
                + _train_longer(workdir, old, new)
            )


def _meant(key: str, config: dict[str, Any]) -> Any:
    """What of a value counts: of the folder of a cache only whether there is one."""
    return bool(config.get(key)) if key == "cache_dir" else config.get(key)


def _train_longer(workdir: Path, old: dict[str, Any], new: dict[str, Any]) -> str:
    """What to add where more steps are asked for: the rate of the old run followed its own number of steps."""
    before, now = old.get("total_steps"), new.get("total_steps")
    if not isinstance(before, int) or not isinstance(now, int) or now <= before:
        return ""
    return (
        f"\nTo train longer, begin anew in another --workdir, since the learning rate followed the {before} steps; or go on"
        f" there from this model, with a new head and a schedule of its own: --config.pretrained={workdir} "
        f"--config.total_steps={now - before}."
    )


def origin(workdir: Path) -> Description | None:
    """What the run that `workdir` holds started from, as `claim` noted it, so that it goes on without that file."""
    content = _notes(workdir).get("origin")
    return content and Description.from_json(content, workdir / "start.json")


def is_known(workdir: Path) -> bool:
    """Whether the run that `workdir` holds has told what it began with."""
    return bool(_notes(workdir))


def check_frozen(workdir: Path, fingerprints: dict[str, str]) -> None:
    """Notes what the run does not train and no checkpoint holds; UserError if it was something else when the run began."""
    if not fingerprints:
        return
    known = notes.read(workdir)
    frozen = known.get("frozen", {})
    if any(frozen.get(name, fingerprint) != fingerprint for name, fingerprint in fingerprints.items()):
        raise UserError(
            f"the run in {workdir} began with other frozen parameters than those that --config.pretrained or "
            "--config.distill.teacher hold now: bring the old files back, or give the new run a --workdir of its own"
        )
    if parallel.is_main() and not fingerprints.items() <= frozen.items():
        notes.write(workdir, known | {"frozen": frozen | fingerprints})


def check_data(workdir: Path, data: Mapping[str, Mapping[str, str | int]], *, accept: bool) -> None:
    """Notes what the data is; UserError, or a warning if `accept`, if it was something else when the run began.

    Args:
      data: by split, what tells it from other data: counts and checksums, by name. Batches depend on them.
    """
    known = notes.read(workdir)
    old, new = _flatten(known.get("data", data)), _flatten(data)
    if changed := [name for name in sorted(old | new) if old.get(name) != new.get(name)]:
        lines = [f"  {name}: {_change(old.get(name), new.get(name))}" for name in changed]
        what = f"the data is not that with which the run in {workdir} began:\n" + "\n".join(lines)
        if not accept:
            raise UserError(
                f"{what}\nFrom here on its batches would be others than those of an undisturbed run. Bring the old data back, "
                "give the new run a --workdir of its own, or add --config.changed_data=accept to go on all the same."
            )
        log.warning("%s", what)
    if parallel.is_main():
        notes.write(workdir, known | {"data": data})


def _change(old: str | int | None, new: str | int | None) -> str:
    """In words; of checksums, which say nothing to people, only that they differ."""
    return f"{old} before, {new} now" if isinstance(old, int) and isinstance(new, int) else "changed"


def check_classes(workdir: Path, class_names: Sequence[str]) -> None:
    """Raises UserError if the run that `workdir` holds learnt other classes, or the same ones in another order."""
    known = _notes(workdir).get("class_names", list(class_names))
    classes.check_same(known, class_names, where=f"the run in {workdir}")


def _notes(workdir: Path) -> dict[str, Any]:
    """What is known of the run that `workdir` holds; nothing of one that never came to a result."""
    return notes.read(workdir) if has_results(workdir) else {}


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
