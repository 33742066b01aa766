"""The adapter of a LoRA run: what is in its file, that base and adapter make the trained model, and what is refused."""

import json

import jax
import numpy as np
import pytest

from tests.models import small
from vit_jax import checkpoint
from vit_jax.checkpoint import describe, lora_file
from vit_jax.errors import UserError
from vit_jax.optimize import trainable

QUERY = "Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/query"
POSITIONS = "Transformer/posembed_input/pos_embedding"
TARGETS = [".*/query/kernel"]
FIELDS = {"model_type": "ViT", "model": {}, "mean": [127.5] * 3, "std": [127.5] * 3}


def write_base(path, model):
    params = small.random_params(model, small.random_images(16, 16))
    checkpoint.save(params, path)
    described = FIELDS | {"image_size": [16, 16], "grid": [2, 2], "class_names": list("abcdefg")}
    describe.write(path, describe.Description(**described))


def train(folder, train=("head/.*",), targets=TARGETS):
    """A base of 7 classes, 2x2 patches and `pre_logits`, an adapter for 3 classes at 3x3 without; what both merge to."""
    write_base(folder / "base.npz", small.vit(representation_size=12))
    opened = checkpoint.open_checkpoint(folder / "base.npz")
    model = small.vit(num_classes=3)
    fresh = small.random_params(model, small.random_images(24, 24))
    params = checkpoint.load_pretrained(pretrained_path=opened, init_params=fresh, model_config={}, grid=(3, 3))
    base = lora_file.base_of(folder / "base.npz", opened, params)
    trained, frozen = trainable.add_lora(params, jax.random.key(0), rank=2, alpha=3, targets=targets, train=train)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: np.asarray(x + rng.normal(size=x.shape), np.float32), trained)
    description = FIELDS | {"image_size": [24, 24], "grid": [3, 3], "class_names": list("xyz"), "step": 10}
    description = describe.Description(**description)
    save = {"base": base, "alpha": 3, "targets": targets, "description": description}
    lora_file.save_adapter(folder / "run" / "adapter.npz", trained, frozen, **save)
    return trainable.merge(trained, frozen), description


def opened(folder):
    found = checkpoint.open_checkpoint(folder / "run" / "adapter.npz")
    return found.flat, found.description


def facts(folder, **changes):
    """Rewrites entries of "adapter" in the JSON; None removes one."""
    path = folder / "run" / "adapter.json"
    content = json.loads(path.read_text())
    content["adapter"] = {k: v for k, v in (content["adapter"] | changes).items() if v is not None}
    path.write_text(json.dumps(content))


def refused(folder, *parts):
    with pytest.raises(UserError) as error:
        opened(folder)
    for part in (str(folder), *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("own", "targets"),
    [(["head/.*"], TARGETS), (["head/bias"], TARGETS), (["head/bias"], ["head/kernel"])],
    ids=["trained head", "frozen new head", "changed new head"],
)
def test_base_and_adapter_give_the_trained_model_bit_for_bit(tmp_path, own, targets):
    expected, description = train(tmp_path, own, targets)
    flat, found = opened(tmp_path)
    expected = small.flat(expected)
    assert set(flat) == set(expected) and not any(name.startswith("pre_logits") for name in flat)
    for name, x in expected.items():
        assert flat[name].dtype == np.float32 and flat[name].tobytes() == np.asarray(x).tobytes(), name
    assert found == description


def test_only_what_the_base_does_not_hold_is_stored_under_published_names(tmp_path):
    train(tmp_path)
    stored = dict(np.load(tmp_path / "run" / "adapter.npz"))
    lora = {f"lora/{QUERY.format(i)}/{part}" for i in (0, 1) for part in "ab"}
    assert set(stored) == lora | {"head/kernel", "head/bias", POSITIONS}
    assert stored[f"lora/{QUERY.format(0)}/a"].shape == (32, 2)
    assert lora_file.is_adapter(stored) and not lora_file.is_adapter(dict(np.load(tmp_path / "base.npz")))
    told = lora_file.read_adapter(tmp_path / "run" / "adapter.npz", stored)
    np.testing.assert_array_equal(told.stored["head/kernel"], stored["head/kernel"])
    assert told.base == str((tmp_path / "base.npz").resolve()) and told.targets == TARGETS
    assert (told.rank, told.alpha) == (2, 3)


def test_a_base_that_is_gone_is_named_and_may_move(tmp_path):
    expected, _ = train(tmp_path)
    (tmp_path / "base.npz").rename(tmp_path / "moved.npz")
    refused(tmp_path, "base.npz", "cannot be opened", '"base"', "adapter.json")
    facts(tmp_path, base=str(tmp_path / "moved.npz"))
    flat, _ = opened(tmp_path)
    np.testing.assert_array_equal(flat["head/kernel"], expected["head"]["kernel"])


def test_a_base_that_has_changed_is_refused(tmp_path):
    train(tmp_path)
    base = dict(np.load(tmp_path / "base.npz"))
    base["cls"] = np.nextafter(base["cls"], np.float32(9))
    checkpoint.save(base, tmp_path / "base.npz")
    refused(tmp_path, "other parameters")


def test_an_adapter_is_no_base(tmp_path):
    write_base(tmp_path / "base.npz", small.vit())
    base = checkpoint.open_checkpoint(tmp_path / "base.npz")
    merged = checkpoint.Opened(tmp_path / "adapter.npz", lora_file.FAMILY, base.flat, base.description)
    with pytest.raises(UserError, match="vit_jax.convert .*adapter.npz MERGED.npz --to=npz"):
        lora_file.base_of(tmp_path, merged, base.params)


def test_a_remote_base_keeps_its_address(tmp_path):
    write_base(tmp_path / "base.npz", small.vit())
    base = checkpoint.open_checkpoint(tmp_path / "base.npz")
    found = lora_file.base_of("https://example.com/vit/base.npz", base, base.params)
    assert found.source == "https://example.com/vit/base.npz" and found.changed == found.without == ()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"fingerprint": None}, "fingerprint"),
        ({"rank": "2"}, "rank"),
        ({"without": 3}, "without"),
        ({"rank": 3}, "no change of rank 3"),
        ({"rank": 0}, "rank=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path, changes, part):
    train(tmp_path)
    facts(tmp_path, **changes)
    refused(tmp_path, part)


def test_without_its_description_an_adapter_is_refused(tmp_path):
    train(tmp_path)
    (tmp_path / "run" / "adapter.json").unlink()
    refused(tmp_path, "adapter.json", "bring both files")


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        (f"lora/{QUERY.format(0)}/a", (31, 2), "(31, 2) · (2, 4, 8) is no change of rank 2"),
        (f"lora/{QUERY.format(0)}/b", (2, 8, 4), "(32, 2) · (2, 8, 4) is no change of rank 2"),
        (f"lora/{QUERY.format(7)}/a", (32, 2), f"lora/{QUERY.format(7)}/b"),
        (f"lora/{QUERY.format(0)}/c", (32, 2), f"lora/{QUERY.format(0)}/c"),
        ("lora/scale", (), "an A and a B belong to every kernel"),
    ],
)
def test_matrices_that_fit_no_kernel_are_refused(tmp_path, name, shape, part):
    train(tmp_path)
    path = tmp_path / "run" / "adapter.npz"
    checkpoint.save(dict(np.load(path)) | {name: np.zeros(shape, np.float32)}, path)
    refused(tmp_path, part)


def test_fingerprints_tell_names_shapes_types_and_bits_apart():
    x = np.arange(6, dtype=np.float32)
    variants = [
        {"a": x},
        {"b": x},
        {"a": x.reshape(2, 3)},
        {"a": x.astype(np.float64)},
        {"a": -x},
        {"a": x, "b": x},
        {"a": x[:, None]},
    ]
    assert len({lora_file.fingerprint(flat) for flat in variants}) == len(variants)
    assert lora_file.fingerprint({"a": x, "b": 2 * x}) == lora_file.fingerprint({"b": 2 * x, "a": x})
    assert lora_file.fingerprint({"a": x.reshape(2, 3).T}) == lora_file.fingerprint({"a": x.reshape(2, 3).T.copy()})


def test_a_base_that_is_an_address_is_not_fetched_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    train(tmp_path)
    facts(tmp_path, base="http://127.0.0.1:9/base.npz")
    refused(
        tmp_path, "is not in the cache, and is not fetched unasked", "python -m vit_jax.inspect http://127.0.0.1:9/base.npz"
    )
