"""Fitting a checkpoint to a new head, grid and pooling: which numbers survive, which are new, and what is refused."""

import csv

import chex
import jax
import numpy as np
import pytest
import scipy.ndimage
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.models import small
from vit_jax import checkpoint
from vit_jax.checkpoint import describe
from vit_jax.errors import UserError

PATCH = 8
POSITIONS = "Transformer/posembed_input/pos_embedding"


def params_of(model, grid=(4, 4)):
    return small.random_params(model, small.random_images(PATCH * grid[0], PATCH * grid[1], batch=1))


def fresh(model, grid=(4, 4)):
    """Parameters of a model that is not trained yet, all of them different from `params_of`."""
    return jax.tree.map(lambda x: x + 100, params_of(model, grid))


def saved(folder, model, grid=(4, 4), *, described=False):
    path = folder / "file.npz"
    checkpoint.save(params_of(model, grid), path)
    if described:
        rest = {"model_type": "ViT", "model": {}, "image_size": None, "mean": (9, 9, 9), "std": (9, 9, 9), "class_names": ()}
        describe.write(path, describe.Description(**rest, grid=grid))
    return path


def adapted(path, model, grid=(4, 4), *, init=None, **kwargs):
    fields = {"representation_size": getattr(model, "representation_size", None)}
    init = fresh(model, grid) if init is None else init
    return checkpoint.load_pretrained(pretrained_path=path, init_params=init, model_config=fields, grid=grid, **kwargs)


def refusal(path, model, grid=(4, 4), **kwargs):
    """The lines of the error that adapting `path` to the model is."""
    with pytest.raises(UserError) as error:
        adapted(path, model, grid, **kwargs)
    assert str(path) in str(error.value)
    return str(error.value).splitlines()


def assert_equal_but(ours, theirs, *changed):
    """Bit for bit the same parameters, except those whose names start with one of `changed`."""
    ours, theirs = (
        {n: x for n, x in flatten_dict(tree, sep="/").items() if not n.startswith(changed)} for tree in (ours, theirs)
    )
    chex.assert_trees_all_equal(ours, theirs, strict=True)


def zoomed(posemb, old, new, first):
    """The grid of `posemb` resized by SciPy, its first `first` embeddings kept."""
    grid = posemb[0, first:].reshape(*old, -1)
    grid = scipy.ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    assert grid.shape[:2] == new
    return np.concatenate([posemb[:, :first], grid.reshape(1, -1, grid.shape[-1])], axis=1)


def positions(grid, first, seed=0):
    return np.random.default_rng(seed).normal(size=(1, first + grid[0] * grid[1], 5)).astype(np.float32)


# interpolate_posembed


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("old", "new"), [(14, 24), (24, 14), (7, 12), (16, 7), (2, 5), (5, 2), (2, 3), (1, 3), (3, 1), (9, 10)]
)
def test_square_grids_are_interpolated_as_scipy_does(old, new, first):
    posemb = positions((old, old), first)
    ours = checkpoint.interpolate_posembed(posemb, first + new * new, bool(first))
    np.testing.assert_allclose(ours, zoomed(posemb, (old, old), (new, new), first), atol=1e-6, rtol=0)
    np.testing.assert_array_equal(ours[:, :first], posemb[:, :first])
    assert ours.dtype == np.float32


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("old", "new"), [((3, 5), (6, 4)), ((4, 4), (2, 9)), ((2, 8), (4, 4)), ((7, 1), (3, 3)), ((5, 3), (3, 5))]
)
def test_other_grids_are_interpolated_as_scipy_does(old, new, first):
    posemb = positions(old, first)
    ours = checkpoint.interpolate_posembed(posemb, first + new[0] * new[1], bool(first), old_grid=old, grid=new)
    np.testing.assert_allclose(ours, zoomed(posemb, old, new, first), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", [(14, 14), (3, 5)])
def test_the_same_grid_changes_no_bit(grid):
    posemb = positions(grid, 1)
    same = checkpoint.interpolate_posembed(posemb, posemb.shape[1], True, old_grid=grid, grid=grid)
    np.testing.assert_array_equal(same, posemb)


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        (26, {}, "15 position embeddings are no square: give the grid"),
        (11, {"old_grid": (3, 5)}, "10 position embeddings are no square: give the grid"),
        (26, {"old_grid": (4, 4)}, "15 position embeddings for a grid of 4x4 cannot become 25 for 5x5"),
        (26, {"old_grid": (3, 5), "grid": (2, 2)}, "15 position embeddings for a grid of 3x5 cannot become 25 for 2x2"),
    ],
)
def test_grids_that_do_not_match_the_tokens_are_refused(tokens, grids, message):
    with pytest.raises(UserError, match=message):
        checkpoint.interpolate_posembed(positions((3, 5), 1), tokens, True, **grids)


# load_pretrained: the head


@pytest.mark.parametrize("kind", small.MODELS)
def test_a_new_task_gets_a_new_head_and_keeps_every_other_bit(tmp_path, kind):
    path = saved(tmp_path, small.MODELS[kind]())
    model = small.MODELS[kind](num_classes=3)
    init = fresh(model)
    params = adapted(path, model, init=init)
    assert params["head"]["kernel"].shape == (32, 3)
    chex.assert_trees_all_equal(params["head"], init["head"], strict=True)
    assert_equal_but(params, checkpoint.load(path), "head")


def test_the_new_head_of_an_initialised_model_is_zero(tmp_path):
    shallow = {"transformer": {"num_layers": 1}}
    model = small.vit(num_classes=3, **shallow)
    init = jax.jit(model.init)(jax.random.key(0), small.random_images(32, 32))["params"]
    head = adapted(saved(tmp_path, small.vit(**shallow)), model, init=init)["head"]
    chex.assert_trees_all_equal(head, {"kernel": np.zeros((32, 3), np.float32), "bias": np.zeros(3, np.float32)})


def test_keep_head_keeps_everything_and_refuses_another_size(tmp_path):
    path = saved(tmp_path, small.vit())
    assert_equal_but(adapted(path, small.vit(), keep_head=True), checkpoint.load(path))
    assert refusal(path, small.vit(num_classes=3), keep_head=True)[1:5] == [
        "  - head/bias (3,)",
        "  + head/bias (7,)",
        "  - head/kernel (32, 3)",
        "  + head/kernel (32, 7)",
    ]


def test_a_headless_model_drops_the_head(tmp_path):
    path = saved(tmp_path, small.vit())
    params = adapted(path, small.vit(num_classes=None))
    assert "head" not in params
    assert_equal_but(params, checkpoint.load(path), "head")


# load_pretrained: the representation layer


def test_pre_logits_is_dropped_kept_or_missed(tmp_path):
    with_layer, without = small.vit(representation_size=20), small.vit()
    path = saved(tmp_path, with_layer)
    dropped = adapted(path, without)
    assert "pre_logits" not in dropped and dropped["head"]["kernel"].shape == (32, 7)
    assert_equal_but(dropped, checkpoint.load(path), "head", "pre_logits")
    assert_equal_but(adapted(path, with_layer), checkpoint.load(path), "head")
    lines = refusal(saved(tmp_path, without), with_layer)
    assert lines[1:3] == ["  - pre_logits/bias (20,)", "  - pre_logits/kernel (32, 20)"]


# load_pretrained: positions and class token


def test_token_to_gap_drops_the_class_token_and_its_position(tmp_path):
    path = saved(tmp_path, small.vit())
    file = flatten_dict(checkpoint.load(path), sep="/")
    params = flatten_dict(adapted(path, small.vit(classifier="gap")), sep="/")
    assert "cls" not in params
    np.testing.assert_array_equal(params[POSITIONS], file[POSITIONS][:, 1:])


def test_gap_to_token_starts_the_class_token_and_its_position_anew(tmp_path):
    path = saved(tmp_path, small.vit(classifier="gap"))
    init = flatten_dict(fresh(small.vit()), sep="/")
    file = flatten_dict(checkpoint.load(path), sep="/")
    params = flatten_dict(adapted(path, small.vit()), sep="/")
    np.testing.assert_array_equal(params["cls"], init["cls"])
    np.testing.assert_array_equal(params[POSITIONS][:, :1], init[POSITIONS][:, :1])
    np.testing.assert_array_equal(params[POSITIONS][:, 1:], file[POSITIONS])


@pytest.mark.parametrize(
    ("old", "described", "new"),
    [
        ((4, 4), False, (6, 6)),
        ((4, 4), False, (3, 5)),
        ((4, 4), False, (2, 8)),  # as many patches, but elsewhere: a file that says nothing is square
        ((4, 4), True, (2, 8)),
        ((2, 8), True, (4, 4)),
        ((3, 5), True, (6, 4)),
        ((3, 5), True, (3, 5)),
        ((3, 5), False, (3, 5)),  # no square: so it can only be the model's own grid
    ],
)
@pytest.mark.parametrize(("before", "after"), [("token", "token"), ("token", "gap"), ("gap", "token"), ("gap", "gap")])
def test_positions_move_to_the_grid_of_the_model(tmp_path, old, described, new, before, after):
    path = saved(tmp_path, small.vit(classifier=before), old, described=described)
    model = small.vit(classifier=after)
    file = flatten_dict(checkpoint.load(path), sep="/")[POSITIONS]
    params = flatten_dict(adapted(path, model, new), sep="/")
    patches = zoomed(file[:, int(before == "token") :], old, new, first=0)
    assert params[POSITIONS].shape[1] == patches.shape[1] + (after == "token")
    np.testing.assert_allclose(params[POSITIONS][:, int(after == "token") :], patches, atol=1e-6, rtol=0)
    if before == after == "token":
        np.testing.assert_array_equal(params[POSITIONS][:, 0], file[:, 0])


def test_an_unknown_grid_is_refused(tmp_path):
    path = saved(tmp_path, small.vit(), (3, 5))
    lines = refusal(path, small.vit(), (6, 6))
    assert "15 position embeddings are no square" in lines[0] and "model.json" in lines[0]


# load_pretrained: what does not fit


def test_a_mixer_belongs_to_its_resolution(tmp_path):
    lines = refusal(saved(tmp_path, small.mixer()), small.mixer(), (6, 6))
    assert lines[1:-1] == [
        "  - MixerBlock_*/token_mixing/Dense_0/kernel (36, 24) in 2 blocks",
        "  + MixerBlock_*/token_mixing/Dense_0/kernel (16, 24) in 2 blocks",
        "  - MixerBlock_*/token_mixing/Dense_1/bias (36,) in 2 blocks",
        "  + MixerBlock_*/token_mixing/Dense_1/bias (16,) in 2 blocks",
        "  - MixerBlock_*/token_mixing/Dense_1/kernel (24, 36) in 2 blocks",
        "  + MixerBlock_*/token_mixing/Dense_1/kernel (24, 16) in 2 blocks",
    ]


def test_another_width_lists_both_shapes_of_every_parameter(tmp_path):
    path = saved(tmp_path, small.vit())
    lines = refusal(path, small.vit(hidden_size=64), (6, 6))
    assert lines[0] == f"{path} does not fit the model (- the model wants, + the file has):"
    assert lines[-1] == "The file holds 22,055 parameters, patches of 8x8, width 32, 2 blocks, 7 classes."
    for pair in (
        ["  - cls (1, 1, 64)", "  + cls (1, 1, 32)"],
        [f"  - {POSITIONS} (1, 37, 64)", f"  + {POSITIONS} (1, 17, 32)"],
        [
            "  - Transformer/encoderblock_*/MultiHeadDotProductAttention_1/query/kernel (64, 4, 16) in 2 blocks",
            "  + Transformer/encoderblock_*/MultiHeadDotProductAttention_1/query/kernel (32, 4, 8) in 2 blocks",
        ],
    ):
        at = lines.index(pair[0])
        assert lines[at : at + 2] == pair
    # 15 of the 16 parameters of a block depend on the width, in both blocks alike, and 6 outside; the head is new.
    assert len(lines) == 2 + 2 * (15 + 6)


@pytest.mark.parametrize(("in_file", "in_model", "sign"), [(2, 4, "-"), (4, 2, "+")])
def test_another_depth_lists_the_blocks_that_are_too_few_or_too_many(tmp_path, in_file, in_model, sign):
    path = saved(tmp_path, small.vit(transformer={"num_layers": in_file}))
    lines = refusal(path, small.vit(transformer={"num_layers": in_model}))
    assert f"  {sign} Transformer/encoderblock_*/MlpBlock_3/Dense_0/kernel (32, 48) in 2 blocks" in lines
    assert len(lines) == 2 + 16 and all(line.startswith(f"  {sign} Transformer/encoderblock_*") for line in lines[1:-1])


def test_single_missing_and_surplus_parameters_are_listed_by_name(tmp_path):
    flat = flatten_dict(params_of(small.vit()), sep="/")
    del flat["Transformer/encoderblock_1/LayerNorm_2/scale"]
    checkpoint.save(unflatten_dict(flat | {"adapter/kernel": np.ones((2, 3))}, sep="/"), tmp_path / "file.npz")
    assert refusal(tmp_path / "file.npz", small.vit())[1:-1] == [
        "  - Transformer/encoderblock_1/LayerNorm_2/scale (32,)",
        "  + adapter/kernel (2, 3)",
    ]


# The adapted model at work


def test_a_model_that_changes_nothing_answers_the_same(tmp_path):
    model, images = small.vit(), small.random_images(32, 32)
    params = adapted(saved(tmp_path, model), model, keep_head=True)
    np.testing.assert_array_equal(small.apply(model, params, images), small.apply(model, params_of(model), images))


def test_a_model_adapted_in_every_way_runs(tmp_path):
    path = saved(tmp_path, small.vit(representation_size=20))
    model = small.vit(classifier="gap", num_classes=3)
    logits = small.apply(model, adapted(path, model, (3, 5)), small.random_images(24, 40))
    assert logits.shape == (2, 3) and np.isfinite(logits).all()


# augreg_filename


def index(folder, *rows):
    with open(folder / "index.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["name", "ds", "final_val", "filename", "adapt_filename"])
        writer.writerows(["", ds, final_val, filename, f"{filename}--cifar100"] for ds, final_val, filename in rows)
    return folder


def test_augreg_chooses_the_best_upstream_checkpoint_of_the_architecture(tmp_path):
    index(
        tmp_path,
        ("i21k", "0.41", "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.1"),
        ("i21k", "0.43", "Ti_16-i21k-300ep-lr_0.001-aug_light1-wd_0.1"),
        ("i21k", "9e-2", "Ti_16-i21k-30ep-lr_0.001-aug_none-wd_0.1"),  # the best if it were text
        ("i1k", "0.77", "Ti_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1"),  # on another, easier dataset
        ("i21k", "0.99", "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03"),
        ("i21k", "0.98", "Ti_16_384-i21k-300ep-lr_0.001-aug_none-wd_0.03"),
        ("i21k", "0.97", "B_16-i21k-300ep-lr_0.001-aug_none-wd_0.03"),
    )
    assert checkpoint.augreg_filename("Ti_16", tmp_path) == "Ti_16-i21k-300ep-lr_0.001-aug_light1-wd_0.1"
    assert checkpoint.augreg_filename("R_Ti_16", tmp_path) == "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03"
    content = (tmp_path / "index.csv").read_bytes()
    (tmp_path / "index.csv").write_bytes(b"\xef\xbb\xbf" + content)  # a byte order mark, as spreadsheets write it
    assert checkpoint.augreg_filename("Ti_16", tmp_path) == "Ti_16-i21k-300ep-lr_0.001-aug_light1-wd_0.1"


@pytest.mark.parametrize("row", [b"\xff", b"i21k,B_16-a,x", b"i21k", b"i21k,B_16-a,nan", b"i21k,../B_16-a,1"])
def test_what_is_no_index_of_augreg_is_refused(tmp_path, row):
    (tmp_path / "index.csv").write_bytes(b"ds,filename,final_val\n" + row)
    with pytest.raises(UserError, match="index.csv is not AugReg's index, with columns ds, filename and final_val"):
        checkpoint.augreg_filename("B_16", tmp_path)


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_augreg_takes_a_file_name_as_it_is(tmp_path, suffix):
    name = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"
    assert checkpoint.augreg_filename(name + suffix, tmp_path / "nowhere") == name


def test_augreg_without_an_index_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match="curl -O https://storage.googleapis.com/vit_models/augreg/index.csv") as error:
        checkpoint.augreg_filename("Ti_16", tmp_path)
    assert str(tmp_path / "index.csv") in str(error.value)


def test_augreg_offers_near_names_for_an_unknown_one(tmp_path):
    index(tmp_path, ("i21k", "0.4", "Ti_16-i21k-300ep"), ("i21k", "0.4", "L_16-i21k-300ep"), ("i1k", "0.4", "Ti_8-i1k"))
    with pytest.raises(UserError, match="'Ti16': did you mean Ti_16") as error:
        checkpoint.augreg_filename("Ti16", tmp_path)
    assert str(tmp_path / "index.csv") in str(error.value) and "Ti_8" not in str(error.value)
