"""Checkpoints of the training state: whole or not at all, kept as asked, and never restored damaged."""

import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests import compiling
from vit_jax.checkpoint import checksums
from vit_jax.checkpoint.state import Checkpointer, WriteError, steps_in
from vit_jax.errors import UserError
from vit_jax.optimize.step import State

REPOSITORY = Path(__file__).parent.parent.parent
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))


def state(step: int, optimizer: optax.GradientTransformation = OPTIMIZER, width: int = 40) -> State:
    """A state whose every number tells the step: float32, bfloat16, integers, empty and absent parts."""
    numbers = jax.random.normal(jax.random.key(step), (50, width))
    params = {"head": {"kernel": numbers, "bias": numbers[0]}, "cls": numbers[None, :1]}
    opt_state = optimizer.update(params, optimizer.init(params), params)[1]
    return State(step=jnp.int32(step), params=params, opt_state=opt_state, ema=None)


def template(**kwargs) -> State:
    return jax.eval_shape(lambda: state(0, **kwargs))


def written(directory: Path, *steps: int, **kwargs) -> Path:
    checkpointer = Checkpointer(directory, keep=len(steps), **kwargs)
    for step in steps:
        checkpointer.save(step, state(step))
    checkpointer.close()
    return directory


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    with caplog.at_level(logging.WARNING, "vit_jax"):
        yield lambda: "\n".join(r.getMessage() for r in caplog.records if r.name == "vit_jax")


def test_the_newest_state_comes_back_bit_for_bit_and_the_old_ones_go(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.latest_step() is None
    for step in (3, 5, 10):
        checkpointer.save(step, state(step), {"accuracy_test": 0.5})
    checkpointer.save(10, state(11))  # is there already
    checkpointer.close()
    again = Checkpointer(tmp_path, keep=2)
    restored = again.restore(template())
    assert again.latest_step() == 10 and folders(tmp_path) == ["10", "5"]
    chex.assert_trees_all_equal(restored, state(10), strict=True)
    assert jax.tree.structure(restored) == jax.tree.structure(state(10))


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("accuracy_test", [0.1, 0.7, 0.7, float("nan"), 0.3], [2, 4, 5]),
        ("loss_test", [0.9, 0.7, 0.2, 0.8, 0.4], [3, 4, 5]),
        ("ece_test", [0.1, None, 0.2, None, 0.4], [1, 4, 5]),
        ("accuracy_test", [None] * 5, [4, 5]),
    ],
)
def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path, metric: str, values: list, kept: list[int]):
    for step, value in enumerate(values, 1):  # started anew each time: what is best must survive that
        checkpointer = Checkpointer(tmp_path, keep=2, best=metric, lower_is_better="accuracy" not in metric)
        good = [v for v in values[: step - 1] if v is not None and v == v]
        best = (max if "accuracy" in metric else min)(good, default=None)
        assert checkpointer.best_value() == best
        metrics = {} if value is None else {metric: value}
        better = value is not None and (best is None or (value > best if "accuracy" in metric else value < best))
        assert checkpointer.improves(metrics) == better
        checkpointer.save(step, state(step), metrics)
        assert checkpointer.improves(metrics) is False  # known before it is on the disk
        checkpointer.close()
    assert folders(tmp_path) == [str(step) for step in kept]


def test_save_returns_at_once_and_the_next_one_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpointer = Checkpointer(tmp_path, keep=2)
    may_write = threading.Event()
    write = checkpointer._handler.save
    monkeypatch.setattr(checkpointer._handler, "save", lambda *args, **kw: may_write.wait(30) and write(*args, **kw))
    checkpointer.save(1, state(1))
    assert checkpointer.stall_seconds < 0.5
    checkpointer.check()
    while not (tmp_path / "1.tmp").exists():
        time.sleep(0.001)
    assert checkpointer.latest_step() is None and folders(tmp_path) == ["1.tmp"]
    threading.Timer(0.2, may_write.set).start()
    checkpointer.save(2, state(2))
    assert checkpointer.stall_seconds > 0.1 and checkpointer.latest_step() == 1
    checkpointer.close()
    assert folders(tmp_path) == ["1", "2"]


def test_whatever_happens_to_a_file_is_found_and_the_one_before_used(tmp_path: Path, warnings: Callable[[], str]):
    """Every file of a checkpoint cut off, changed in one bit at several places, emptied, or gone."""
    directory = written(tmp_path, 1, 2)
    files = [path.relative_to(directory / "2") for path in (directory / "2").rglob("*") if path.is_file()]
    assert len(files) > 5
    rng = np.random.default_rng(0)
    for file in files:
        whole = (directory / "2" / file).read_bytes()
        flipped = [bytearray(whole) for _ in range(3)]
        for copy in flipped:
            copy[rng.integers(len(copy))] ^= 1 << rng.integers(8)
        for content in (whole[:-1], whole[: len(whole) // 2], b"", None, *map(bytes, flipped)):
            (directory / "2" / file).write_bytes(content) if content is not None else (directory / "2" / file).unlink()
            checkpointer = Checkpointer(directory, keep=2)
            restored = checkpointer.restore(template())
            chex.assert_trees_all_equal(restored, state(checkpointer.latest_step()), strict=True)
            if folders(directory) == ["1", "2.damaged"]:
                assert checkpointer.latest_step() == 1
                assert f"{directory / '2'} is damaged ({'' if file.name == 'checkpoint.json' else file}" in warnings()
                (directory / "2.damaged").rename(directory / "2")
            else:  # spaces and the like in checkpoint.json
                assert file.name == "checkpoint.json" and content in flipped
            (directory / "2" / file).write_bytes(whole)


def test_a_damaged_checkpoint_is_neither_counted_nor_read_nor_lost_again(tmp_path: Path):
    directory = written(tmp_path, 1, 2, 3)
    for step in (2, 3):
        (directory / str(step) / "checkpoint.json").unlink()
    (directory / "3.damaged").mkdir()
    checkpointer = Checkpointer(directory, keep=2)
    assert checkpointer.latest_step() == 3
    checkpointer.restore(template())
    assert checkpointer.latest_step() == 1
    checkpointer.save(3, state(3))
    checkpointer.close()
    assert folders(directory) == ["1", "2.damaged", "3", "3.damaged", "3.damaged.damaged"]
    chex.assert_trees_all_equal(Checkpointer(directory).restore(template()), state(3), strict=True)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"arrays": None}, "arrays"),
        ({"metrics": {"accuracy_test": "high"}}, "metrics"),
        ({"files": {"state": 3}}, "files"),
        ({"files": {"state": [1, "x"]}}, "sizes"),
        (None, "arrays"),
    ],
)
def test_an_index_that_is_intact_and_tells_something_else_is_damage(tmp_path: Path, changes: dict | None, what: str):
    """Its own checksum is right, as after a change by a program."""
    index = written(tmp_path, 1, 2) / "2" / "checkpoint.json"
    content = checksums.read_json(index)
    checksums.write_json(index, [content] if changes is None else content | changes)
    checkpointer = Checkpointer(tmp_path, keep=2, best="accuracy_test", lower_is_better=False)
    chex.assert_trees_all_equal(checkpointer.restore(template()), state(1), strict=True)
    assert folders(tmp_path) == ["1", "2.damaged"]


def test_only_numbers_as_they_are_written_name_checkpoints(tmp_path: Path):
    for name in ("²", "٣", "03", "1_000", "-1", "4 ", "5.damaged"):
        (tmp_path / name).mkdir()
    assert steps_in(written(tmp_path, 10, 9)) == [9, 10]
    assert Checkpointer(tmp_path, keep=2).latest_step() == 10
    assert steps_in(tmp_path / "missing") == []


def test_a_reader_changes_nothing_and_goes_on_with_what_the_writer_has_now(tmp_path: Path, warnings: Callable[[], str]):
    reader = Checkpointer(written(tmp_path, 1), read_only=True)
    written(tmp_path, 2)
    (tmp_path / "3.tmp").mkdir()
    assert folders(tmp_path) == ["2", "3.tmp"]
    chex.assert_trees_all_equal(reader.restore(template()), state(2), strict=True)
    (tmp_path / "2" / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        Checkpointer(tmp_path, read_only=True).restore(template())
    assert not warnings()
    shutil.move(written(tmp_path / "other", 1) / "1", tmp_path)
    chex.assert_trees_all_equal(Checkpointer(tmp_path, read_only=True).restore(template()), state(1), strict=True)
    assert "2 is damaged" in warnings()
    assert folders(tmp_path) == ["1", "2", "3.tmp", "other"]
    assert Checkpointer(tmp_path / "none", read_only=True).latest_step() is None
    assert not (tmp_path / "none").exists()


def test_without_a_readable_checkpoint_all_are_named_and_nothing_is_touched(tmp_path: Path):
    directory = written(tmp_path, 1, 2)
    shutil.rmtree(directory / "1" / "state" / "d")
    (directory / "2" / "checkpoint.json").write_text("{")
    with pytest.raises(
        UserError,
        match=r"(?s)no checkpoint can be read:\n  .*/2: checkpoint.json has changed .*\n  .*/1: state/d/\w+ is missing\nMove",
    ):
        Checkpointer(directory).restore(template())
    assert folders(directory) == ["1", "2"]


def test_another_state_than_the_configs_is_no_damage(tmp_path: Path, warnings: Callable[[], str]):
    directory = written(tmp_path, 1, 2)
    for other, message in [
        (template(width=41), r"\n  - params/cls float32\[1, 1, 40\]\n  \+ params/cls float32\[1, 1, 41\]"),
        (template(optimizer=optax.sgd(1e-3)), r"- there, \+ now\):\n  - opt_state/1/0/count int32\[\]"),
        (template(optimizer=optax.adamw(1e-3)), r"\n  \+ opt_state/0/count int32\[\].*… and 4 more\nRepeat"),
        (template().replace(ema=template().params["head"]), r"now\):\n  \+ ema/bias float32.*\n  \+ ema/kernel .*\nRepeat"),
    ]:
        with pytest.raises(UserError, match=f"(?s)the checkpoint {directory / '2'} holds another state .*{message}"):
            Checkpointer(directory).restore(other)
    assert folders(directory) == ["1", "2"] and not warnings()


def test_what_was_left_half_written_is_named_and_left_in_place(tmp_path: Path, warnings: Callable[[], str]):
    directory = written(tmp_path, 1)
    shutil.copytree(directory / "1" / "state", directory / "2.tmp" / "state")
    shutil.copytree(directory / "1", directory / "0.deleted")
    checkpointer = Checkpointer(directory)
    assert warnings() == f"{directory / '2.tmp'}: left from a write that did not finish, not used"
    chex.assert_trees_all_equal(checkpointer.restore(template()), state(1), strict=True)
    assert "2.tmp" in folders(directory)
    checkpointer.save(2, state(2))
    checkpointer.close()
    assert folders(directory) == ["2"]


@pytest.mark.parametrize("when", ["save", "check", "close"])
def test_a_failed_write_is_told_soon_and_leaves_the_one_before(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch):
    checkpointer = Checkpointer(tmp_path, keep=1, best="accuracy_test", lower_is_better=False)
    checkpointer.save(1, state(1), {"accuracy_test": 0.5})
    checkpointer._wait()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointer._handler, "save", full)
    checkpointer.save(2, state(2), {"accuracy_test": 0.9})
    checkpointer._writing[1].exception(30)
    message = r"step 2 could not be written to .*No space left.*The checkpoint of step 1 is intact; free space"
    with pytest.raises(WriteError, match=message):
        {"save": lambda: checkpointer.save(3, state(3)), "check": checkpointer.check, "close": checkpointer.close}[when]()
    checkpointer.close()  # told once
    assert folders(tmp_path) == ["1"] and checkpointer.best_value() == 0.5
    chex.assert_trees_all_equal(Checkpointer(tmp_path).restore(template()), state(1), strict=True)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/checkpoints, for checkpoints, cannot be made a folder: Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints")


# Two processes of two devices each write; this one of one device reads, and two that find one file damaged.

HOST = {"step": np.int32(7), "a": np.arange(64 * 32, dtype=np.float32).reshape(64, 32), "v": np.arange(32.0, dtype=np.float16)}


def sharded(spec: PartitionSpec) -> dict[str, NamedSharding]:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))
    return {name: NamedSharding(mesh, spec if name == "a" else PartitionSpec()) for name in HOST}


def one_of_two(directory: str, port: str, number: str, what: str) -> None:
    """What a process does: save steps 1 and 2 while the devices are busy, and fail at 3; or restore and compare."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(number))
    if what == "restore":
        restore_elsewhere(directory)
        return
    where = sharded(PartitionSpec("data", "fsdp"))
    state = {k: jax.make_array_from_callback(x.shape, where[k], lambda i, x=x: x[i]) for k, x in HOST.items()}
    total = jax.jit(lambda x: x + x.sum() * 0, out_shardings=where["a"])
    checkpointer = Checkpointer(Path(directory), keep=2)
    for step in (1, 2):
        checkpointer.save(step, state)
        busy = state["a"]
        for _ in range(20):
            busy = total(busy)
        busy.block_until_ready()
    checkpointer.check()
    checkpointer._wait()
    if number == "1":
        checkpointer._handler = None
    checkpointer.save(3, state)
    with pytest.raises(WriteError, match="NoneType" if number == "1" else "process 1 could not write its part"):
        checkpointer.close()


def restore_elsewhere(directory: str) -> None:
    where = sharded(PartitionSpec(None, ("fsdp", "data")))
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[k]) for k, x in HOST.items()}
    checkpointer = Checkpointer(Path(directory), keep=2)
    restored = checkpointer.restore(shapes)
    for name, x in HOST.items():
        assert restored[name].sharding == where[name]
        for shard in restored[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, x[shard.index])
    print("restored", checkpointer.latest_step())


def two(directory: Path, what: str) -> list[str]:
    """Runs two processes and returns the last line that each printed."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    script = "import sys; from tests.checkpoint import test_state; test_state.one_of_two(*sys.argv[1:])"
    commands = [[sys.executable, "-c", script, str(directory), port, str(i), what] for i in range(2)]
    options = {"cwd": REPOSITORY, "env": compiling.with_devices(2), "text": True}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) for command in commands]
    outputs = [process.communicate(timeout=90) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return [out.splitlines()[-1] if out else "" for out, _ in outputs]


def test_two_processes_write_and_read_their_shards_and_agree_on_what_is_damaged(tmp_path: Path):
    two(tmp_path, "save")
    assert folders(tmp_path) == ["1", "2"]
    (shards,) = (tmp_path / "2" / "state").glob("ocdbt.process_1")
    alone = Checkpointer(tmp_path, keep=2).restore({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in HOST.items()})
    chex.assert_trees_all_equal(alone, HOST, strict=False)
    files = {p: p.stat().st_size for p in shards.rglob("*") if p.is_file()}
    assert 64 * 32 * 4 / 2 <= sum(files.values()) < 64 * 32 * 4  # each process wrote its half
    largest = max(files, key=files.get)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert two(tmp_path, "restore") == ["restored 1"] * 2
    assert folders(tmp_path) == ["1", "2.damaged"]
