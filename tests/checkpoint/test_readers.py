"""Every format is read as its own library wrote it, without torch and within memory; what could do harm is refused by name."""

import collections
import json
import pickle
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from tests.checkpoint.hostile import Payload, assert_refused
from vit_jax.checkpoint import readers
from vit_jax.errors import UserError

FORMATS = [".npz", ".safetensors", ".pth", ".pt", ".bin", ".ckpt"]


def arrays():
    rng = np.random.default_rng(0)
    return {
        "blocks.0.weight": rng.normal(size=(5, 3)).astype(np.float32),
        "blocks.0.bias": rng.normal(size=5).astype(np.float16),
        "step": np.array(7, np.int64),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
    }


def tensors():
    return {name: torch.from_numpy(x) for name, x in arrays().items()}


def write(path, flat=None):
    """Writes arrays as the users of the format would: with NumPy, safetensors or torch."""
    flat = arrays() if flat is None else flat
    if path.suffix == ".npz":
        np.savez(path, **flat)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(flat, path)
    else:
        torch.save({name: torch.from_numpy(x) for name, x in flat.items()}, path)
    return path


def assert_same(got, wanted):
    assert sorted(got) == sorted(wanted)
    for name, x in wanted.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def refused(path, *parts):
    """Reading `path` is an error that names it and says all of `parts`."""
    assert_refused(readers.read, path, *parts)


def torch_file(path, data, **entries):
    """A .pth by hand: the pickle `data` and further entries."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in ({"data.pkl": data} | entries).items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_each_library_writes_is_read_bit_for_bit(tmp_path, suffix):
    assert_same(readers.read(write(tmp_path / f"x{suffix}")), arrays())
    assert_same(readers.read(str(tmp_path / f"x{suffix}")), arrays())


def test_npz_of_every_making_is_read(tmp_path):
    flat = arrays() | {"fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "big": np.arange(3, dtype=">f4")}
    np.savez_compressed(tmp_path / "x.npz", **flat)
    assert_same(readers.read(tmp_path / "x.npz"), flat)


def test_bfloat16_is_kept_in_every_format(tmp_path):
    exact = torch.tensor([[1.5, -3.140625], [2.0**-130, 3e38]], dtype=torch.bfloat16)
    wanted = {"x": exact.float().numpy().astype(ml_dtypes.bfloat16)}
    torch.save({"x": exact}, tmp_path / "x.pth")
    safetensors.torch.save_file({"x": exact}, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **wanted)  # NumPy calls it |V2, and so does every such file in the wild
    for suffix in (".pth", ".safetensors", ".npz"):
        assert_same(readers.read(tmp_path / f"x{suffix}"), wanted)


def test_every_type_of_torch_is_read(tmp_path):
    types = [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    wanted = {str(t): torch.tensor([3, 1, 2]).to(t) for t in types} | {"bool": torch.tensor([True, False])}
    torch.save(wanted, tmp_path / "x.pth")
    assert_same(readers.read(tmp_path / "x.pth"), {name: x.numpy() for name, x in wanted.items()})


def test_views_of_torch_are_read_as_they_look(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        "transposed": base.permute(2, 0, 1),
        "strided": base[::2, 1:, ::3],
        "offset": base[2, 3, 1:],
        "scalar": base[1, 1, 1],
        "expanded": torch.tensor([4.0]).expand(2, 3),
        "parameter": torch.nn.Parameter(base.mT[1:].clone()),
    }
    torch.save(views, tmp_path / "x.pth")
    got = readers.read(tmp_path / "x.pth")
    assert_same(got, {name: x.detach().numpy() for name, x in views.items()})


def test_tensors_that_share_memory_still_do(tmp_path):
    base = torch.arange(20000.0)
    torch.save({"a": base, "b": base[10:], "c": base.clone()}, tmp_path / "x.pth")
    got = readers.read(tmp_path / "x.pth")
    assert np.shares_memory(got["a"], got["b"]) and not np.shares_memory(got["a"], got["c"])
    np.testing.assert_array_equal(got["b"], base[10:].numpy())


@pytest.mark.parametrize("place", ["model", "state_dict", "teacher"])
def test_a_state_dict_is_found_beside_other_things(tmp_path, place):
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    for others in ({}, {"epoch": 3, "optimizer": {"state": {0: torch.ones(3)}}, "name": "x"}):
        torch.save({place: state} | others, tmp_path / "x.pth")
        assert_same(readers.read(tmp_path / "x.pth"), {name: x.numpy() for name, x in state.items()})


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"model": tensors(), "teacher": tensors(), "epoch": 3}, "'model': tensors, 'teacher': tensors, 'epoch': int"),
        ({"student": tensors()}, "'student': tensors"),
        ({"cls": torch.ones(1), "epoch": 3}, "'cls': Tensor, 'epoch': int"),
        ({"model": {"cls": torch.ones(1), 5: torch.ones(1)}}, "'model': dict"),
        ([torch.ones(1)], "list"),
        ({}, "dict"),
    ],
    ids=["two", "elsewhere", "mixed", "number as name", "list", "empty"],
)
def test_anything_but_one_state_dict_is_listed_and_refused(tmp_path, tree, said):
    torch.save(tree, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", f"holds {said}; wanted", "under 'model', 'state_dict', 'teacher'", "torch.save")


def test_shards_are_read_through_their_index(tmp_path):
    flat = arrays()
    names = sorted(flat)
    for suffix, index in ((".safetensors", "model.safetensors.index.json"), (".bin", "pytorch_model.bin.index.json")):
        folder = tmp_path / suffix
        folder.mkdir()
        shards = {f"x-0000{i}-of-00002{suffix}": names[i::2] for i in (0, 1)}
        for shard, inside in shards.items():
            write(folder / shard, {name: flat[name] for name in inside})
        places = {name: shard for shard, inside in shards.items() for name in inside}
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
        assert_same(readers.read(folder / index), flat)
        if suffix == ".safetensors":
            assert_same(readers.read(folder), flat)


@pytest.mark.parametrize(
    ("weight_map", "parts"),
    [
        ({"step": "a.safetensors", "x": "b.safetensors"}, ["1 of 2 shards are missing", "b.safetensors"]),
        ({"step": "a.safetensors", "x": "a.safetensors"}, ["a.safetensors holds x, and it does not"]),
        ({"step": "../a.safetensors"}, ["'../a.safetensors'", "beside it"]),
        ({"step": "/etc/passwd"}, ["'/etc/passwd'", "beside it"]),
        ({"step": "model.safetensors.index.json"}, ["'model.safetensors.index.json'", "beside it"]),
        ({"step": 3}, ["'3'", "beside it"]),
        (None, ["truncated or damaged"]),
        ({}, ["holds no parameters"]),
    ],
)
def test_a_wrong_index_of_shards_is_refused(tmp_path, weight_map, parts):
    write(tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(index, *parts)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model.safetensors", "model.npz", "other.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.npz", "other.safetensors", "a.npz"], "model.npz"),
        (["other.safetensors", "a.npz", "b.npz", "x.pth"], "other.safetensors"),
        (["a.npz", "x.pth", "y.pth"], "a.npz"),
        (["x.pth", "y.bin"], "x.pth"),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin"),
        (["y.bin"], "y.bin"),
    ],
)
def test_the_file_in_a_folder_is_chosen(tmp_path, files, chosen):
    for i, name in enumerate(files):
        write(tmp_path / name, {"x": np.full(2, i)})
    assert_same(readers.read(tmp_path), {"x": np.full(2, files.index(chosen))})


def test_a_folder_without_a_choice_is_refused(tmp_path):
    refused(tmp_path, "holds no parameter file", "model.safetensors", "*.npz")
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "model.npz")
    refused(tmp_path, "holds no parameter file", f"did you mean {tmp_path / 'run'}?")
    for name in ("b.npz", "a.npz"):
        write(tmp_path / name)
    refused(tmp_path, "holds 2 parameter files", "name one of a.npz, b.npz")


def test_what_is_not_there_or_no_parameter_file_is_refused(tmp_path):
    write(tmp_path / "near.safetensors")
    (tmp_path / "notes.txt").touch()
    refused(tmp_path / "far.pth", "no such checkpoint", "the folder holds near.safetensors")
    refused(tmp_path / "far.txt", "no such checkpoint", "the folder holds near.safetensors")
    refused(tmp_path / "nowhere" / "x.npz", f"the folder {tmp_path / 'nowhere'} does not exist")
    refused(tmp_path / "notes.txt", "is no parameter file", ".npz, .safetensors, .pth")
    write(tmp_path / "x.npz").rename(tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "with 0 data.pkl, no torch file", "is the suffix right?")


@pytest.mark.parametrize(("protocol", "asked"), [(2, "__builtin__.getattr"), (4, "pathlib.Path")])
def test_a_pickle_that_calls_anything_else_is_refused_before_it_can(tmp_path, protocol, asked):
    victim = tmp_path / "victim"
    data = pickle.dumps({"model": Payload(victim)}, protocol=protocol)
    refused(torch_file(tmp_path / "evil.pth", data), f"asks for {asked}", "only tensors are let in", "If you trust its source")
    assert not victim.exists()
    pickle.loads(data)
    assert victim.exists(), "the payload is harmless: this test proves nothing"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("os", "system"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch.storage", "_load_from_bytes"),
        ("argparse", "Namespace"),
    ],
)
def test_every_other_name_is_refused(tmp_path, module, name):
    def text(x):
        return b"\x8c" + bytes([len(x)]) + x.encode()

    data = b"\x80\x04" + text(module) + text(name) + b"\x93."
    refused(torch_file(tmp_path / "evil.pth", data), f"asks for {module}.{name} ")


def test_what_a_pickle_does_to_our_objects_does_not_outlive_the_file(tmp_path):
    # BUILD with a slot state: setattr on whatever torch._utils._rebuild_tensor_v2 gave
    data = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__(K\x01tstb."
    refused(torch_file(tmp_path / "evil.pth", data), "wanted: a dict of tensors")
    assert_same(readers.read(write(tmp_path / "good.pth")), arrays())


def test_a_pickle_cannot_claim_memory(tmp_path):
    """By an entry 2^24 of its table, for which the unpickler in C takes 256 MB, or by bytes that are not there."""
    for data in (b"\x80\x02}r\x00\x00\x00\x01.", b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b"."):
        tracemalloc.start()
        refused(torch_file(tmp_path / "evil.pth", data))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 24


GLOBAL = b"ctorch._utils\n_rebuild_tensor_v2\n"
GREEDY = {
    "a key whose hash takes for ever": (b"}K\x01" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", "a tuple as key"),
    "a key too deep to hash": (b"})" + b"\x85" * 300_000 + b"K\x01s.", "a tuple as key"),
    "keys that are slow to compare": (b"}X" + (5000).to_bytes(4, "little") + b"k" * 5000 + b"Ns.", "a str as key"),
    "a huge number as key": (b"}L0x" + b"f" * 100_000 + b"L\nNs.", "a int as key"),
    "huge numbers as sizes": (GLOBAL + b"(K\x01K\x00(" + (b"L0x" + b"f" * 5000 + b"L\n") * 20 + b"t(t\x89NtR.", "a tensor of"),
    "a call of many arguments": (GLOBAL + b"(" + b"N" * 100_000 + b"tR.", "a call that no tensor needs"),
    "a copy of a list": (b"ccollections\nOrderedDict\n]\x85R.", "a call that no tensor needs"),
    "many marks": (b"(" * 200_000 + b".", "truncated or damaged"),
    "many lists": (b"]" * 200_000 + b".", "list; wanted: a dict of tensors"),
    "many lists in a list": (b"](" + b"]" * 200_000 + b"e.", "list; wanted: a dict of tensors"),
    "a list in itself": (b"]q\x00h\x00a.", "list; wanted: a dict of tensors"),
    "a deep list": (b"]q\x00" + b"h\x00]q\x00a" * 1000 + b".", "list; wanted: a dict of tensors"),
    "a deep tuple": (b")" + b"\x85" * 300_000 + b".", "tuple; wanted: a dict of tensors"),
    "a set": (b"\x8f(K\x01\x90.", r"operation b'\x8f'"),
    "a number of many digits": (b"\x8b\xff\xff\xff\x7f\x01.", r"operation b'\x8b'"),
    "more than two megabytes": (b"N" * (2 << 20) + b".", "2,097,153 bytes of pickle beside its tensors"),
}


@pytest.mark.parametrize("case", GREEDY)
def test_a_small_pickle_cannot_take_the_machine(tmp_path, case):
    pickled, said = GREEDY[case]
    start = time.process_time()
    refused(torch_file(tmp_path / "x.pth", b"\x80\x02" + pickled), said)
    assert time.process_time() - start < 5


def test_attributes_of_a_state_dict_are_passed_over(tmp_path):
    state = collections.OrderedDict(tensors())
    state._metadata = {"": {"version": 1}}
    torch.save(state, tmp_path / "x.pth")
    assert_same(readers.read(tmp_path / "x.pth"), arrays())


def test_torch_files_of_other_forms_are_refused(tmp_path):
    torch.save(tensors(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pth", "is no zip archive", "since 1.6")
    data = pickle.dumps(Payload(tmp_path / "victim"))
    (tmp_path / "plain.pth").write_bytes(data)
    refused(tmp_path / "plain.pth", "plain pickle")
    assert not (tmp_path / "victim").exists()
    torch_file(tmp_path / "big.pth", pickle.dumps({}), byteorder=b"big")
    refused(tmp_path / "big.pth", "big-endian")
    torch.save({"x": torch.ones(3, dtype=torch.complex64)}, tmp_path / "complex.pth")
    refused(tmp_path / "complex.pth", "torch.ComplexFloatStorage")


def described(size, stride, offset=0, numel=4, key="0"):
    """The pickle of one float tensor that claims this view of a storage."""

    def lines(values):
        return b"(" + b"".join(b"L%dL\n" % v for v in values) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + key.encode() + b"X\x03\x00\x00\x00cpu"
    return (
        b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n("
        + storage + b"L%dL\ntQL%dL\n" % (numel, offset) + lines(size) + lines(stride) + b"\x89N" + b"tRs."
    )  # fmt: skip


def test_a_tensor_described_by_hand_is_read(tmp_path):
    path = torch_file(tmp_path / "x.pth", described((2, 2), (1, 2)), **{"data/0": np.arange(4, dtype=np.float32).tobytes()})
    assert_same(readers.read(path), {"x": np.array([[0, 2], [1, 3]], np.float32)})


@pytest.mark.parametrize(
    "claim",
    [
        dict(size=(5,), stride=(1,)),
        dict(size=(4,), stride=(1,), offset=1),
        dict(size=(2,), stride=(1,), offset=-1),
        dict(size=(2,), stride=(-1,), offset=1),
        dict(size=(-2,), stride=(1,)),
        dict(size=(2, 2), stride=(3, 2)),
        dict(size=(2,), stride=(1,), numel=8),
        dict(size=(2,), stride=(1, 1)),
        dict(size=(1,) * 70, stride=(1,) * 70),
        dict(size=(2,), stride=(1,), key="9"),
    ],
    ids=str,
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, claim):
    refused(torch_file(tmp_path / "x.pth", described(**claim), **{"data/0": bytes(16)}), "damaged", "Fetch or write it again")


def test_a_tensor_far_larger_than_its_file_is_refused(tmp_path):
    torch.save({"x": torch.zeros(1).expand(40_000, 40_000)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "would unpack to 6,400,000,000", "archive bomb")
    torch_file(tmp_path / "y.pth", described((10**18, 10**18), (0, 0)), **{"data/0": bytes(16)})
    refused(tmp_path / "y.pth", "archive bomb")


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_an_archive_that_claims_gigabytes_is_refused_unread(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}")
    content = bytearray(path.read_bytes())
    size = content.index(b"PK\x01\x02") + 24
    content[size : size + 4] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    refused(path, f"{len(content):,} bytes", "would unpack to 3,22", "archive bomb")


def test_an_archive_that_holds_far_more_than_its_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BOMB", (20, 1 << 20))
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(1 << 19))
    refused(tmp_path / "bomb.npz", "would unpack to 4,194,", "archive bomb")
    np.savez(tmp_path / "plain.npz", x=np.zeros(1 << 19))
    assert readers.read(tmp_path / "plain.npz")["x"].size == 1 << 19


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".safetensors"])
def test_a_list_of_contents_that_is_too_long_is_refused(tmp_path, monkeypatch, suffix):
    path = write(tmp_path / f"x{suffix}")
    monkeypatch.setattr(readers, "_HEADER", 100)
    refused(path, "bytes, allowed are 100: that is no parameter file")


def test_a_header_that_cannot_be_parsed_is_refused(tmp_path):
    for text in ("(" * 5000, "-" * 9000 + "1", "{" * 300 + "}" * 300):
        header = text.encode() + b"\n"
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("good.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(12))
        refused(tmp_path / "x.npz", "truncated or damaged")


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(10000000000000000000000, 5)", "(-3,)", "(3, 2)", "()"])
def test_an_array_whose_shape_is_not_that_of_its_bytes_is_refused(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("good.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(12))
    refused(tmp_path / "x.npz", "good claims the shape", "has 12 bytes", "Fetch or write it again")


def test_safetensors_whose_shape_is_not_that_of_its_bytes_is_refused(tmp_path):
    for shape in ([10**12], [2], [2**40, 2**40]):
        header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 12]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
        refused(tmp_path / "x.safetensors", "truncated or damaged")
    (tmp_path / "x.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    refused(tmp_path / "x.safetensors", "truncated or damaged")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../x", "..\\x"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, suffix, name):
    refused(write(tmp_path / f"x{suffix}", {name: np.ones(2)}), repr(name), "'..'")


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    path = write(tmp_path / "x.npz", {"a": np.ones(2), "b": np.ones(2)})
    path.write_bytes(path.read_bytes().replace(b"b.npy", b"a.npy"))
    refused(path, "'a.npy' 2 times")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_refused(tmp_path, suffix, value, dtype):
    x = np.ones(50, np.float32)
    x[[3, 48]] = value
    path = tmp_path / f"x{suffix}"
    if dtype == ml_dtypes.bfloat16 and suffix != ".npz":
        tree = {"good": torch.ones(2), "bad": torch.from_numpy(x).bfloat16()}
        (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(tree, path)
    else:
        write(path, {"good": np.ones(2), "bad": x.astype(dtype)})
    refused(path, "2 of the 50 values of bad are not finite")


def test_all_parameters_that_are_not_finite_are_counted(tmp_path):
    bad = {f"b{i}\x1b[2J": np.array([np.nan, 1.0]) for i in range(6)}
    said = (
        r"1 of the 2 values of b0\x1b[2J are not finite, nor are all of 5 more parameters (b1\x1b[2J, b2\x1b[2J, b3\x1b[2J, …)"
    )
    refused(write(tmp_path / "x.npz", {"good": np.ones(2)} | bad), said)


def test_numbers_that_are_infinite_as_float32_are_refused(tmp_path):
    largest = float(np.finfo(np.float32).max)
    np.testing.assert_array_equal(readers.read(write(tmp_path / "x.npz", {"x": np.array([largest])}))["x"], [largest])
    refused(write(tmp_path / "x.npz", {"x": np.array([0, -1e39])}), "1 of the 2 values of x are not finite")


def test_a_parameter_that_holds_others_is_refused(tmp_path):
    refused(write(tmp_path / "x.npz", {"a/b/c": np.ones(1), "a/b": np.ones(1)}), "a/b is a parameter and holds others")


@pytest.mark.parametrize(
    "x",
    [np.ones(2, np.longdouble), np.array(["text"]), np.ones(2, np.complex64), np.zeros(2, "f4,i4"), np.zeros(2, "M8[s]")],
    ids=str,
)
def test_arrays_of_other_things_are_refused(tmp_path, x):
    refused(write(tmp_path / "x.npz", {"odd": x}), "odd is of type", "floats, integers or booleans")


def test_types_that_numpy_lacks_are_refused_by_name(tmp_path):
    safetensors.torch.save_file({"odd": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "odd is of type F8_E4M3", "BF16")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [6, 0.25, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused(tmp_path, suffix, kept):
    path = write(tmp_path / f"x{suffix}", {"x": np.arange(1000.0)})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(path, "truncated or damaged", f"{path.stat().st_size:,} bytes", "Fetch or write it again")


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_one_changed_bit_among_the_numbers_is_noticed(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", {"x": np.arange(1000.0)})
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(500.0, 510.0).tobytes())] ^= 1
    path.write_bytes(content)
    refused(path, "damaged", "CRC")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
def test_an_empty_file_or_dict_is_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.touch()
    refused(path)
    if suffix != ".pth":
        refused(write(path, {}), "holds no parameters")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
def test_random_damage_raises_nothing_but_user_errors(tmp_path, suffix, seed):
    path = write(tmp_path / f"x{suffix}")
    content, rng = path.read_bytes(), np.random.default_rng(seed)
    for _ in range(100):
        damaged = bytearray(content)
        for place in rng.integers(len(content), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            readers.read(path)
        except UserError:
            pass


MEASURE = """
import re, sys
from vit_jax.checkpoint import readers

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

held = []  # memory given back would be used again, and not be counted
for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from what is held now
    before = peak()
    held.append(readers.read(path))
    print((peak() - before) / sum(x.nbytes for x in held[-1].values()))
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_reading_takes_little_more_memory_than_the_file_and_no_torch(tmp_path):
    paths = [write(tmp_path / f"x{s}", {"x": np.ones(8_000_000, np.float32)}) for s in (".npz", ".safetensors", ".pth")]
    run = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    ratios = [float(line) for line in run.stdout.split()]
    assert len(ratios) == 3 and all(0.9 < ratio < 1.3 for ratio in ratios), ratios
