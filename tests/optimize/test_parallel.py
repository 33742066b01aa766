"""Every way to share out the work gives the losses of one device: on 8 virtual devices, and in 2 processes of 4."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kill
from tests import many_devices, tiny
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.optimize import parallel
from vit_jax.run import cluster
from vit_jax.train import train_and_evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def one_device(folder: Path) -> dict[str, np.ndarray]:
    return many_devices.run("pmap", workdir=folder / "one")


@pytest.fixture(scope="module")
def eight_devices(folder: Path, one_device) -> Path:
    """Every way on 8 devices from nothing; then, in the same process, one goes on from the checkpoint of one device."""
    shutil.copytree(folder / "one", folder / "grown" / "tensor")
    workdirs = [*(folder / "eight" / name for name in (*many_devices.KINDS, "loop")), folder / "grown" / "tensor"]
    child = many_devices.start("tests.many_devices", *map(str, workdirs), devices=8)
    assert child.wait(timeout=400) == 0
    return folder / "eight"


@pytest.fixture(scope="module")
def two_processes(folder: Path, one_device) -> Path:
    workdirs = [str(folder / "two" / name) for name in ("pmap", "signal")]
    with many_devices.two("tests.many_devices", *workdirs, devices=4) as children:
        assert [child.wait(timeout=400) for child in children] == [143, 143]
    return folder / "two"


@pytest.fixture(scope="module")
def one_more(folder: Path, one_device) -> dict[str, np.ndarray]:
    """One device goes on."""
    shutil.copytree(folder / "one", folder / "one_more")
    return many_devices.run("pmap", workdir=folder / "one_more", steps=many_devices.MORE, go_on=True)


@pytest.mark.parametrize("parallelism", many_devices.KINDS)
def test_eight_devices_give_the_losses_of_one(parallelism: str, one_device, eight_devices: Path):
    _assert_same(np.load(eight_devices / f"{parallelism}_0.npz"), one_device)


def test_two_processes_give_the_losses_of_one_and_read_disjoint_examples(one_device, two_processes: Path, eight_devices):
    found = [np.load(two_processes / f"pmap_{i}.npz") for i in range(2)]
    for each in found:
        _assert_same(each, one_device)
    whole = np.load(eight_devices / "pmap_0.npz")["seeds"]
    first, second = (each["seeds"] for each in found)
    assert first.shape == second.shape == (many_devices.STEPS, whole.shape[1] // 2)
    for step in range(many_devices.STEPS):  # a seed is an example of its own
        assert sorted([*first[step], *second[step]]) == sorted(whole[step]) and len(set(whole[step])) == whole.shape[1]


def test_sharded_state_takes_its_share_of_a_devices_memory(eight_devices: Path):
    found = {parallelism: np.load(eight_devices / f"{parallelism}_0.npz") for parallelism in many_devices.KINDS}
    whole = {name: int(found["pmap"][f"{name}_bytes"]) for name in ("params", "opt_state", "ema")}
    # More than an eighth, or a quarter: vectors stay whole, and so do matrices of sides that the axes do not divide.
    fsdp, zero, tensor = (
        {name: int(found[parallelism][f"{name}_bytes"]) for name in whole} for parallelism in ("fsdp", "zero", "tensor")
    )
    assert all(fsdp[name] < 0.4 * whole[name] for name in whole), fsdp
    assert all(tensor[name] < 0.4 * whole[name] for name in whole), tensor
    assert (zero["params"], zero["ema"]) == (whole["params"], whole["ema"]) and zero["opt_state"] < 0.4 * whole["opt_state"]


@pytest.mark.parametrize(("written", "read"), [("pmap", "fsdp"), ("fsdp", "pmap")])
def test_a_checkpoint_of_eight_devices_goes_on_in_another_way_on_one(
    written: str, read: str, one_more, eight_devices: Path, folder: Path
):
    workdir = folder / f"{written}_{read}"
    shutil.copytree(eight_devices / written, workdir)
    onwards = many_devices.run(read, workdir=workdir, steps=many_devices.MORE, go_on=True)
    assert len(onwards["losses"]) == many_devices.MORE - many_devices.STEPS
    _assert_same(onwards, one_more)


def test_a_checkpoint_of_one_device_goes_on_on_eight(one_more, eight_devices: Path, folder: Path):
    _assert_same(np.load(folder / "grown" / "tensor_0.npz"), one_more)


def test_a_mesh_over_two_processes_learns_what_one_device_does(one_device, two_processes: Path):
    workdir = two_processes / "signal" / "undisturbed"
    found = {}
    for kind, file in (("params", "model.npz"), ("ema", "model_ema.npz")):
        for name, x in np.load(workdir / file).items():
            found[f"['{kind}']" + "".join(f"['{part}']" for part in name.split("/"))] = x
    _assert_same(found | {"losses": list(tiny.metrics(workdir, "train_loss").values())}, one_device)


def test_a_signal_to_one_of_two_processes_stops_both_and_the_same_command_goes_on_to_the_same_bits(two_processes: Path):
    """Both ended with the code of a SIGTERM, as the fixture says."""
    stopped, undisturbed = two_processes / "signal" / "stopped", two_processes / "signal" / "undisturbed"
    assert re.search("stopped by signal 15 after step [2-9]: the same command continues", (stopped / "train.log").read_text())
    assert kill.differences(stopped, undisturbed) == []


def test_eight_devices_learn_and_count_what_one_does(eight_devices: Path, tmp_path: Path):
    """Without dropout, whose keys are per device. 37 test images on 8 devices: a remainder on every batch."""
    train_and_evaluate(many_devices.loop_config(), tmp_path)
    workdir = eight_devices / "loop"
    assert "devices  8 x" in (workdir / "train.log").read_text()
    one, eight = tiny.arrays(tmp_path), tiny.arrays(workdir)
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], atol=1e-6, err_msg=name)
    accuracy = tiny.metrics(workdir, "accuracy_test")[3]
    assert accuracy == tiny.metrics(tmp_path, "accuracy_test")[3]
    assert abs(accuracy * 37 - round(accuracy * 37)) < 1e-9
    assert evaluate(many_devices.loop_config(), workdir)["accuracy_test"] == accuracy  # a checkpoint of 8 devices on 1


@pytest.mark.parametrize(
    ("parallelism", "name", "spec"),
    [
        ("tensor", "['MultiHeadDotProductAttention_1']['query']['kernel']", "('fsdp', 'tensor')"),  # (d, heads, d / heads)
        ("tensor", "['MultiHeadDotProductAttention_1']['out']['kernel']", "('tensor', None, 'fsdp')"),
        ("tensor", "['MlpBlock_3']['Dense_0']['bias']", "('tensor',)"),
        ("tensor", "['LayerNorm_0']['scale']", "()"),
        ("fsdp", "['MlpBlock_3']['Dense_0']['kernel']", "('fsdp',)"),
        ("zero", "['MlpBlock_3']['Dense_0']['kernel']", "()"),
    ],
)
def test_the_table_of_rules_says_what_is_sharded(parallelism: str, name: str, spec: str, eight_devices: Path):
    found = np.load(eight_devices / f"{parallelism}_0.npz")
    assert str(found[f"spec ['Transformer']['encoderblock_1']{name}"]).endswith(spec)


def test_a_rule_names_axes_of_the_mesh():
    with pytest.raises(UserError, match="unknown axis .*'fdsp': did you mean fsdp"):
        parallel.Mesh(rules=(("", "fdsp"),))


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": -1, "tensor": 2}])
def test_a_mesh_that_the_devices_do_not_make_up_is_refused(sizes: dict[str, int]):
    with pytest.raises(UserError, match=r"config.mesh=\{.*\} does not make up 1 device"):
        parallel.Mesh(**sizes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "node1:1234"}, "--num_processes .or JAX_NUM_PROCESSES., --process_id"),
        ({"coordinator": "node1:1234", "num_processes": 2, "process_id": 2}, "from 0 to num_processes"),
        ({"coordinator": "node1", "num_processes": 2, "process_id": 1}, "HOST:PORT"),
    ],
)
def test_a_cluster_that_is_not_fully_known_is_refused(given: dict, message: str):
    with pytest.raises(UserError, match=message):
        cluster.join(**given)


def _assert_same(found, expected) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], atol=1e-5)
    for name in expected:
        if name.startswith("[") and "['key']['bias']" not in name:  # whose gradient is 0 but for rounding, which Adam magnifies
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)
