"""The published file format: what is written, what is accepted, and what is refused without harm."""

import errno
import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.checkpoint.hostile import Payload, assert_refused
from tests.models import small
from vit_jax import checkpoint
from vit_jax.errors import UserError
from vit_jax.files import write_atomically

# Written by hand from the published files.
BLOCK = [
    *("LayerNorm_0/bias", "LayerNorm_0/scale", "LayerNorm_2/bias", "LayerNorm_2/scale"),
    *("MlpBlock_3/Dense_0/bias", "MlpBlock_3/Dense_0/kernel", "MlpBlock_3/Dense_1/bias", "MlpBlock_3/Dense_1/kernel"),
    *("MultiHeadDotProductAttention_1/key/bias", "MultiHeadDotProductAttention_1/key/kernel"),
    *("MultiHeadDotProductAttention_1/out/bias", "MultiHeadDotProductAttention_1/out/kernel"),
    *("MultiHeadDotProductAttention_1/query/bias", "MultiHeadDotProductAttention_1/query/kernel"),
    *("MultiHeadDotProductAttention_1/value/bias", "MultiHeadDotProductAttention_1/value/kernel"),
]
VIT = [
    *(f"Transformer/encoderblock_{i}/{name}" for i in (0, 1) for name in BLOCK),
    *("Transformer/encoder_norm/bias", "Transformer/encoder_norm/scale", "Transformer/posembed_input/pos_embedding"),
    *("cls", "embedding/bias", "embedding/kernel", "head/bias", "head/kernel"),
]
UNIT = [
    *("conv1/kernel", "conv2/kernel", "conv3/kernel", "conv_proj/kernel", "gn1/bias", "gn1/scale", "gn2/bias", "gn2/scale"),
    *("gn3/bias", "gn3/scale", "gn_proj/bias", "gn_proj/scale"),
]
MIXER_BLOCK = [
    *("LayerNorm_0/bias", "LayerNorm_0/scale", "LayerNorm_1/bias", "LayerNorm_1/scale"),
    *(f"{mixing}_mixing/Dense_{i}/{leaf}" for mixing in ("token", "channel") for i in (0, 1) for leaf in ("bias", "kernel")),
]
PUBLISHED = {
    "vit": VIT,
    "hybrid": [*VIT, "conv_root/kernel", "gn_root/bias", "gn_root/scale", *(f"block1/unit1/{name}" for name in UNIT)],
    "mixer": [
        *(f"MixerBlock_{i}/{name}" for i in (0, 1) for name in MIXER_BLOCK),
        *("head/bias", "head/kernel", "stem/bias", "stem/kernel", "pre_head_layer_norm/bias", "pre_head_layer_norm/scale"),
    ],
}
NEW_NAMES = {
    "LayerNorm_2": "LayerNorm_1",
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "MlpBlock_3": "MlpBlock_0",
}


def params_of(kind):
    return small.random_params(small.MODELS[kind](), small.random_images(32, 32, batch=1))


def saved(path, params=None):
    checkpoint.save({"cls": np.arange(1000.0), "head": {"bias": np.ones(3)}} if params is None else params, path)
    return path


def refused(path, *parts):
    """Loading `path` is an error that names it and says all of `parts`."""
    assert_refused(checkpoint.load, path, *parts)


@pytest.mark.parametrize("kind", small.MODELS)
def test_save_load_save_is_bit_identical_and_keeps_the_published_names(tmp_path, kind):
    params = params_of(kind)
    first = saved(tmp_path / "first.npz", params)
    loaded = checkpoint.load(first)
    second = saved(tmp_path / "second.npz", loaded)
    chex.assert_trees_all_equal(loaded, params, strict=True)
    assert first.read_bytes() == second.read_bytes()
    with np.load(first) as archive:
        assert sorted(archive.files) == sorted(PUBLISHED[kind])


def test_the_order_of_the_parameters_does_not_matter(tmp_path):
    params = params_of("vit")
    backwards = dict(reversed(params.items()))
    assert list(backwards) != list(params)
    assert saved(tmp_path / "a.npz", params).read_bytes() == saved(tmp_path / "b.npz", backwards).read_bytes()


def new_names(flat):
    return {re.sub("|".join(NEW_NAMES), lambda m: NEW_NAMES[m[0]], name): x for name, x in flat.items()}


def with_prefix(flat):
    state = {"opt/state/step": np.array(9), "opt/state/param_states/cls/momentum": np.ones((1, 1, 32)), "epoch": np.array(1)}
    return {f"opt/target/{name}": x for name, x in flat.items()} | state


def wide_group_norm(flat):
    return {name: x.reshape(1, 1, 1, -1) if "gn" in name else x for name, x in flat.items()}


@pytest.mark.parametrize(
    "changes", [[new_names], [with_prefix], [wide_group_norm], [new_names, wide_group_norm, with_prefix]],
    ids=lambda changes: "+".join(change.__name__ for change in changes),
)  # fmt: skip
def test_variants_in_the_wild_give_the_published_tree(tmp_path, changes):
    params = params_of("hybrid")
    flat = flatten_dict(params, sep="/")
    for change in changes:
        changed = change(flat)
        assert {n: x.shape for n, x in changed.items()} != {n: x.shape for n, x in flat.items()}
        flat = changed
    np.savez(tmp_path / "variant.npz", **flat)
    chex.assert_trees_all_equal(checkpoint.load(tmp_path / "variant.npz"), params, strict=True)


def test_two_names_of_one_parameter_are_refused(tmp_path):
    block = "Transformer/encoderblock_0"
    np.savez(tmp_path / "x.npz", **{f"{block}/LayerNorm_{i}/scale": np.full(2, i) for i in (1, 2)})
    refused(tmp_path / "x.npz", f"{block}/LayerNorm_1/scale and {block}/LayerNorm_2/scale are two names of one parameter")


def test_bfloat16_is_widened_and_other_types_are_kept(tmp_path):
    exact = np.array([1.5, 3.140625, -(2.0**-130)], np.float32)  # all of them bfloat16 numbers
    loaded = checkpoint.load(saved(tmp_path / "x.npz", {"a": jnp.asarray(exact, jnp.bfloat16), "b": exact.astype(np.float16)}))
    assert loaded["a"].dtype == np.float32 and loaded["b"].dtype == np.float16
    np.testing.assert_array_equal(loaded["a"], exact)


def test_pickled_object_arrays_are_refused_unopened(tmp_path):
    np.savez(tmp_path / "evil.npz", cls=np.array([Payload(tmp_path / "victim")], dtype=object))
    refused(tmp_path / "evil.npz", "pickled objects", "must be an .npz of plain arrays")
    assert not (tmp_path / "victim").exists()


def test_a_plain_pickle_is_refused_unopened(tmp_path):
    (tmp_path / "evil.npz").write_bytes(pickle.dumps(Payload(tmp_path / "victim")))
    refused(tmp_path / "evil.npz", "pickled objects", "must be an .npz of plain arrays")
    assert not (tmp_path / "victim").exists()
    pickle.loads((tmp_path / "evil.npz").read_bytes())
    assert (tmp_path / "victim").exists(), "the payload is harmless: this test proves nothing"


@pytest.mark.parametrize("kept", [4, 100, 0.25, 0.5, 0.9, -100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = saved(tmp_path / "cut.npz")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(path, "truncated or damaged", f"{path.stat().st_size:,} bytes", "Fetch or write it again")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.npz").touch()
    refused(tmp_path / "empty.npz", "truncated or damaged (0 bytes", "Fetch or write it again")


def test_one_changed_bit_among_the_numbers_is_noticed(tmp_path):
    path = saved(tmp_path / "rotten.npz")
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    refused(path, "damaged", "CRC", "Fetch or write it again")


@pytest.mark.parametrize(("offset", "value"), [(6, 99), (8, 1), (8, 32), (10, 99), (20, 0), (42, 255)])
def test_a_damaged_zip_directory_is_refused(tmp_path, offset, value):
    """Version, flags (encrypted, patch), compression, size, place: `zipfile` has an exception of its own for each."""
    path = saved(tmp_path / "rotten.npz")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = value
    path.write_bytes(content)
    refused(path, "damaged", "Fetch or write it again")


def test_what_is_no_npz_is_refused(tmp_path):
    saved(tmp_path / "near.npz")
    refused(tmp_path, "is a folder", "name the .npz", "near.npz")
    refused(tmp_path / "far.npz", "no such checkpoint", "the folder holds near.npz")
    refused(tmp_path / "nowhere" / "far.npz", "no such checkpoint", f"the folder {tmp_path / 'nowhere'} does not exist")
    np.save(tmp_path / "single.npy", np.ones(3))
    refused(tmp_path / "single.npy", "is a single array", ".npz with one array a parameter")
    with zipfile.ZipFile(tmp_path / "torch.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    refused(tmp_path / "torch.pt", "'archive/data.pkl', which is no array", "must be an .npz")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(np, "load", load)
    refused(saved(tmp_path / "secret.npz"), "cannot be read", "Permission denied")


@pytest.mark.parametrize("as_type", [str, Path])  # a Path writes gs:/ for gs://
@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("gs://vit_models/sam/ViT-B_16.npz", "https://storage.googleapis.com/vit_models/sam/ViT-B_16.npz"),
        ("https://example.org/a.npz", "https://example.org/a.npz"),
    ],
)
def test_a_remote_path_says_how_to_download_it(url, public, as_type):
    with pytest.raises(UserError, match=re.escape(f"curl -O {public}\n")) as error:
        checkpoint.load(as_type(url))
    assert str(error.value).startswith(f"{url} is not a local file")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure):
    path = saved(tmp_path / "model.npz")
    before = path.read_bytes()

    def savez(file, **arrays):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(type(failure)):
        checkpoint.save({"cls": np.zeros(5)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.npz"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "new folder" / "x.bin"
    write_atomically(path, lambda f: f.write(b"old"))

    def write(file: io.BufferedWriter):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, write)
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["x.bin"]
