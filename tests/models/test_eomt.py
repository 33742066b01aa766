"""EoMT against transformers': masks, classes and classes by pixel; files in and out."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.models import transformer_peer
from vit_jax import models, predictor
from vit_jax.checkpoint.export import write_checkpoint
from vit_jax.checkpoint.opening import open_checkpoint
from vit_jax.errors import UserError
from vit_jax.tasks.segment import labels_at

SIDE, CLASSES = 32, 5


pytestmark = pytest.mark.usefixtures("full_precision")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(an EomtForUniversalSegmentation that is trained to its end, the folder where it is saved)."""
    folder = tmp_path_factory.mktemp("eomt")
    model = transformer_peer.eomt(folder, side=SIDE, classes=CLASSES, num_upscale_blocks=2)
    return model, folder


@pytest.mark.usefixtures("optimised")
def test_masks_and_classes_are_those_of_transformers_and_files_come_back(saved, tmp_path):
    model, folder = saved
    opened = open_checkpoint(folder)
    images = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(pixel_values=torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = models.build("EoMT", opened.description.model)
    masks, classes = jax.jit(lambda p, x: ours.apply({"params": p}, x, method="objects"))(opened.params, images)
    expected = theirs.masks_queries_logits.permute(0, 2, 3, 1).numpy()  # sums of products that cancel: as parts of the largest
    np.testing.assert_allclose(masks / np.abs(expected).max(), expected / np.abs(expected).max(), atol=1e-5)
    np.testing.assert_allclose(classes, theirs.class_queries_logits, atol=1e-5)

    # What follows, and what predict gives
    scores = torch.einsum(
        "bqc,bqhw->bhwc", theirs.class_queries_logits.softmax(-1)[..., :-1], theirs.masks_queries_logits.sigmoid()
    )
    np.testing.assert_allclose(jax.jit(ours.apply)({"params": opened.params}, images), scores, atol=1e-5)
    photo = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    outputs = predictor.load(folder)([photo])
    pixels = (photo.astype(np.float32) - opened.description.mean) / np.float32(opened.description.std)
    expected = jax.jit(ours.apply)({"params": opened.params}, pixels[None].astype(np.float32))
    np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)
    assert labels_at(outputs["logits"][0], (50, 40)).max() < CLASSES

    write_checkpoint(opened, tmp_path, "hf")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    for name in before.keys() - {"criterion.empty_weight"}:  # of the loss alone
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        same = again(pixel_values=torch.from_numpy(images).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(same.masks_queries_logits, theirs.masks_queries_logits)


def test_one_in_the_midst_of_training_is_refused(saved, tmp_path):
    model, _ = saved
    model.attn_mask_probs.fill_(1)
    model.save_pretrained(tmp_path)
    model.attn_mask_probs.zero_()
    with pytest.raises(UserError, match="attn_mask_probs are above 0"):
        open_checkpoint(tmp_path)


def test_a_position_of_the_class_token_is_written_as_a_part_of_it(saved, tmp_path):
    opened = open_checkpoint(saved[1])
    positions = opened.flat["backbone/Transformer/posembed_input/pos_embedding"].copy()
    positions[0, 0] = np.arange(positions.shape[-1])
    moved = dataclasses.replace(opened, flat=opened.flat | {"backbone/Transformer/posembed_input/pos_embedding": positions})
    write_checkpoint(moved, tmp_path, "hf")
    again = open_checkpoint(tmp_path).flat
    np.testing.assert_array_equal(again["backbone/cls"], opened.flat["backbone/cls"] + positions[:, :1])
    assert not again["backbone/Transformer/posembed_input/pos_embedding"][0, 0].any()
