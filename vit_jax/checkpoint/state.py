"""Training state on disk, through Orbax: written in the background, committed whole, the newest kept."""

import logging
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from vit_jax.errors import UserError

T = TypeVar("T")
log = logging.getLogger("vit_jax")


class Checkpointer:
    """The checkpoints of one run, in `directory`, one folder a step."""

    def __init__(self, directory: Path, *, keep: int = 1):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return self._manager.latest_step()

    def restore(self, template: T) -> T:
        """The newest state, of the structure, shapes and dtypes of `template` (arrays or ShapeDtypeStructs)."""
        step = self._manager.latest_step()
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # not the devices that wrote it, which may be gone
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), template)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(template))
        except Exception as e:  # Orbax raises many kinds; whichever it is, the user must learn which folder it was
            folder = self._manager.directory / str(step)
            raise UserError(
                f"the checkpoint {folder} cannot be read: {_first_line(e)}\n"
                "If it is damaged, move that folder away to go on from the one before it, or start in another workdir."
            ) from e

    def save(self, step: int, state: Any) -> None:
        """Starts writing `state`; returns once it is copied from the devices. A step that is there already is kept."""
        if step != self._manager.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
