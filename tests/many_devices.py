"""Ten steps in every way to use devices, for tests that start processes with devices of their own.

python -m tests.many_devices FOLDER/NAME… runs `KINDS[NAME]` on all devices of this process and, where the variables of
`vit_jax.run.cluster` are set, of the others; every process writes what it found to FOLDER/NAME_PROCESS.npz. Where FOLDER/NAME
holds a checkpoint, the run goes on from it to `MORE` steps. FOLDER/loop is the workdir of the whole loop, `loop_config`, and
FOLDER/signal the folder of `stop_and_go_on`, with whose code the processes end.
"""

import contextlib
import itertools
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np

from tests import compiling, tiny
from vit_jax import train
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.run import cluster, experiment
from vit_jax.run import start as starting
from vit_jax.run.signals import GracefulExit
from vit_jax.settings import Settings
from vit_jax.train import train_and_evaluate

REPOSITORY = Path(__file__).parent.parent
STEPS, MORE = 10, 15
KINDS = {
    "pmap": {},
    "fsdp": {"parallel": "mesh", "mesh": {"data": 1, "fsdp": -1}, "remat": "full", "accum_steps": 2},
    "zero": {"parallel": "mesh", "mesh": {"data": 2, "fsdp": -1, "rules": "zero"}, "remat": "dots"},
    "tensor": {"parallel": "mesh", "mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "scan": True, "accum_steps": 2},
}


def config(parallelism: str) -> ml_collections.ConfigDict:
    """AdamW with flips and an average of the parameters; without dropout, whose keys pmap has per device."""
    c = tiny.config(total_steps=STEPS, pp_flip=True, ema_decay=0.5, warmup_steps=2)
    c.model.transformer.update({"dropout_rate": 0.0, "num_layers": 2})
    c.update(KINDS[parallelism])
    return c


def loop_config() -> ml_collections.ConfigDict:
    """Three SGD steps of two micro-batches, with flips and without dropout."""
    c = tiny.config(accum_steps=2, total_steps=3, pp_flip=True, optimizer="sgd", weight_decay=0.0, warmup_steps=1)
    c.model.transformer.dropout_rate = 0.0
    return c


def stop_and_go_on(folder: Path) -> int:
    """Trains in `undisturbed` and in `stopped`, where the last process gets a SIGTERM after 2 steps and the run goes on later.

    Returns the exit code of the run that was stopped.
    """
    c = config("tensor")
    c.eval_every = STEPS // 2
    train_and_evaluate(c, folder / "undisturbed")
    train_batches = train._train_batches

    def interrupted(*args, **kwargs) -> Iterator[dict]:
        for i, batch in enumerate(train_batches(*args, **kwargs)):
            if i == 2 and jax.process_index() == jax.process_count() - 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    train._train_batches = interrupted
    try:
        train_and_evaluate(c, folder / "stopped")
    except SystemExit as stop:
        code = stop.code
    assert not (folder / "stopped" / "model.npz").exists()
    train._train_batches = train_batches
    train_and_evaluate(c, folder / "stopped")
    return code


def run(
    parallelism: str,
    *,
    workdir: Path,
    steps: int = STEPS,
    go_on: bool = False,
    observe: Callable[[dict], None] = lambda batch: None,
) -> dict[str, np.ndarray]:
    """Losses and state of the steps up to `steps`; a checkpoint of the last one is written to `workdir`.

    Args:
      go_on: from the checkpoint in `workdir`.
      observe: is shown every batch of this process before it is sent to the devices.
    """
    e = experiment.build(Settings.from_config(config(parallelism)))
    checkpointer = Checkpointer(workdir / "checkpoints", keep=2)
    state = starting.restore_or_load(e, checkpointer) if go_on else starting.new_state(e)
    done = int(e.parallelism.read(state.step))
    update, losses = experiment.make_update(e), []
    send = e.parallelism.send
    e.parallelism.send = lambda batch: (observe(batch), send(batch))[1]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    for batch in itertools.islice(train._train_batches(e, done, GracefulExit()), steps - done):
        state, metrics = update(state, batch)
        losses.append(e.parallelism.read(metrics)["loss"])
        if len(losses) == 2:
            compiled.clear()
    assert not [name for name in compiled if "compile" in name], (
        f"{parallelism}: compiled again after the second step: {compiled}"
    )
    checkpointer.save(steps, e.parallelism.snapshot(state))
    checkpointer.close()
    specs = {f"spec {jax.tree_util.keystr(path)}": str(x.sharding.spec) for path, x in _leaves(state.params)}
    sizes = {f"{name}_bytes": _bytes_on_first_device(tree) for name, tree in vars(state).items()}
    host = e.parallelism.read({"params": state.params, "ema": state.ema})
    arrays = {jax.tree_util.keystr(path): x for path, x in _leaves(host)}
    return {"losses": np.array(losses)} | specs | sizes | arrays


def start(module: str, *arguments: str, devices: int, environment: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """`python -m MODULE` with virtual devices."""
    env = compiling.with_devices(devices) | (environment or {})
    return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=REPOSITORY, env=env, **options)


@contextlib.contextmanager
def two(module: str, *arguments: str, devices: int, **options) -> Iterator[list[subprocess.Popen]]:
    """Two processes with so many devices each that train one model; they are killed at the end of the block."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        values = {"coordinator": f"localhost:{s.getsockname()[1]}", "num_processes": "2"}
    children = []
    for i in range(2):
        variables = {cluster.VARIABLES[name]: value for name, value in (values | {"process_id": str(i)}).items()}
        children.append(start(module, *arguments, devices=devices, environment=variables, **options))
    try:
        yield children
    finally:
        for child in children:
            child.kill()


def _leaves(tree) -> list[tuple]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _bytes_on_first_device(tree) -> int:
    return sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(tree))


def main() -> None:
    workdirs = [Path(argument) for argument in sys.argv[1:]]
    begun = [workdir for workdir in workdirs if workdir.exists()]  # before any process writes
    cluster.join()
    for workdir in workdirs:
        if workdir.name == "loop":
            train_and_evaluate(loop_config(), workdir)
            continue
        if workdir.name == "signal":
            with compiling.each_step_once():
                sys.exit(stop_and_go_on(workdir))
        batches: list[dict] = []
        go_on = workdir in begun
        found = run(workdir.name, workdir=workdir, steps=MORE if go_on else STEPS, go_on=go_on, observe=batches.append)
        seeds = np.stack([batch["seed"] for batch in batches[:STEPS]])
        np.savez(workdir.with_name(f"{workdir.name}_{jax.process_index()}.npz"), **found, seeds=seeds)


if __name__ == "__main__":
    main()
