"""Several processes, on one or many machines, that train one model: how a process finds the others."""

import importlib.util
import os
from pathlib import Path

import jax

from vit_jax.errors import UserError

VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects to the other processes; alone, does nothing. To be called before anything else asks for the devices.

    What to connect to is taken from the arguments, else from the environment (`VARIABLES`), else from Slurm (a step of
    several tasks: one task a GPU), Open MPI or Cloud TPU, by JAX's own detection.

    Args:
      coordinator: HOST:PORT of process 0.

    Raises:
      UserError: if only a part of it is known, or the others cannot be reached.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    for name, variable in VARIABLES.items():
        if given[name] is None:
            given[name] = os.environ.get(variable)
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if not _in_cluster():
            return
        arguments = {}
    elif missing:
        flags = ", ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
        raise UserError(f"several processes need all of {', '.join(f'--{name}' for name in given)}: {flags} missing")
    else:
        arguments = _checked(**given)
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"the other processes cannot be reached ({arguments or 'as the cluster says'}): {e}") from e


def joined() -> bool:
    """Whether this process trains together with others."""
    return jax.distributed.is_initialized()


def _checked(coordinator: str, num_processes: int | str, process_id: int | str) -> dict[str, str | int]:
    try:
        count, number = int(num_processes), int(process_id)
    except ValueError:
        count = number = 0
    if not 0 <= number < count:
        raise UserError(f"process_id={process_id} must be a number from 0 to num_processes − 1, num_processes={num_processes}")
    if not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"coordinator={coordinator} must be HOST:PORT of process 0, such as node1:1234")
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": number}


def _in_cluster() -> bool:
    """Whether a launcher started this process as one of several, or it runs on a Cloud TPU, where that costs nothing."""
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    open_mpi = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    tpu = importlib.util.find_spec("libtpu") and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists())
    return bool(slurm or open_mpi or tpu)
