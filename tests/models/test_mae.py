"""The masked autoencoder against transformers' `ViTMAEForPreTraining`, and its files in both layouts, to the bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.models import small
from vit_jax import checkpoint, models, predictor
from vit_jax.data.device import augment
from vit_jax.errors import UserError
from vit_jax.models import mae
from vit_jax.tasks import reconstruct

transformers = pytest.importorskip("transformers")
SIDE, PATCH = 20, 4


@pytest.fixture(scope="module", params=[True, False], ids=["normalized", "pixels"])
def peer(request):
    config = transformers.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=SIDE, patch_size=PATCH,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=20,
        mask_ratio=0.6, norm_pix_loss=request.param, layer_norm_eps=1e-6,
    )  # fmt: skip
    model, generator = transformers.ViTMAEForPreTraining(config).eval(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def opened(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    peer.save_pretrained(folder)
    return checkpoint.open_checkpoint(folder)


@pytest.mark.usefixtures("optimised")
def test_loss_and_gradients_are_transformers(peer, opened):
    rng = np.random.default_rng(0)
    images, noise = rng.normal(size=(3, SIDE, SIDE, 3)).astype(np.float32), rng.random((3, 25)).astype(np.float32)
    out = peer(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)), noise=torch.tensor(noise))
    peer.zero_grad()
    out.loss.backward()
    description = opened.description
    model = models.build(description.model_type, description.model)
    assert description.model_type == "MAE"
    count = int(25 * (1 - description.task["hidden"]))

    def loss(params):
        seen, hidden = reconstruct.shuffled(noise, count)
        pixels = model.apply({"params": params}, images, seen, method="reconstruct")
        target = mae.patchify(images, (PATCH, PATCH))
        return reconstruct.reconstruction_loss(pixels, target, hidden, normalized=description.task["normalized"]), pixels

    (value, pixels), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, opened.params))
    np.testing.assert_allclose(value, out.loss.item(), rtol=1e-5)
    np.testing.assert_allclose(pixels, out.logits.detach(), atol=1e-5)
    flat = {"/".join(key.key for key in path): x for path, x in jax.tree_util.tree_leaves_with_path(gradients)}
    decoder, encoder = peer.decoder, peer.vit
    pairs = {
        "decoder/mask_token": decoder.mask_token.grad,
        "decoder/predict/kernel": decoder.decoder_pred.weight.grad.T,
        "decoder/embed/kernel": decoder.decoder_embed.weight.grad.T,
        "decoder/Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel": decoder.decoder_layers[1].mlp.fc1.weight.grad.T,
        "embedding/kernel": encoder.embeddings.patch_embeddings.projection.weight.grad.permute(2, 3, 1, 0),
        "cls": encoder.embeddings.cls_token.grad,
        "Transformer/encoderblock_0/MlpBlock_3/Dense_1/kernel": encoder.layers[0].mlp.fc2.weight.grad.T,
        "Transformer/encoder_norm/scale": encoder.layernorm.weight.grad,
    }
    for name, gradient in pairs.items():
        np.testing.assert_allclose(flat[name], gradient, atol=1e-5, err_msg=name)


def test_fresh_positions_are_transformers():
    """Theirs are of y, then of x; MAE's files, as a comment there says, have them the other way round."""
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    theirs = build_2d_sinusoidal_position_embedding(3, 5, 24, cls_token=True).numpy()
    np.testing.assert_allclose(mae.fixed_positions((3, 5), 24)[0], np.roll(theirs, 12, axis=1), atol=1e-6)


def test_hugging_faces_files_come_back_in_the_same_bits(peer, opened, tmp_path):
    checkpoint.write_checkpoint(opened, tmp_path, "hf")
    written, given = load_file(tmp_path / "model.safetensors"), load_file(opened.path / "model.safetensors")
    given = {name.replace("decoder_encoder.layer.", "decoder_layers."): x for name, x in given.items()}
    assert written.keys() == given.keys()
    for name, x in given.items():
        np.testing.assert_array_equal(written[name], x, err_msg=name)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = json.loads((opened.path / "config.json").read_text())
    for name in ("model_type", "architectures", "norm_pix_loss", "mask_ratio", "image_size", "patch_size", "layer_norm_eps"):
        assert config[name] == expected[name], name
    again = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(again.named_parameters(), peer.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_official_files_come_back_in_the_same_bits(opened, tmp_path):
    """Official files are of torch, in timm's names; without a config.json a decoder has 16 heads."""
    checkpoint.write_checkpoint(opened, tmp_path / "a", "timm")
    arrays = load_file(tmp_path / "a" / "model.safetensors")
    blocks = {name.split(".")[0] for name in arrays}
    assert {"blocks", "decoder_blocks", "decoder_embed", "decoder_pred", "decoder_pos_embed", "mask_token"} <= blocks
    again = checkpoint.open_checkpoint(tmp_path / "a")
    assert again.flat.keys() == opened.flat.keys()
    for name, x in opened.flat.items():
        np.testing.assert_array_equal(again.flat[name], x, err_msg=name)
    assert dict(again.description.model["decoder"]) == dict(opened.description.model["decoder"])
    assert again.description.task == opened.description.task
    torch.save({"model": {name: torch.tensor(x) for name, x in arrays.items()}}, tmp_path / "mae_full.pth")
    with pytest.raises(UserError, match="no config.json beside it tells how many heads"):
        checkpoint.open_checkpoint(tmp_path / "mae_full.pth")


def test_our_file_has_features_and_draws(opened, tmp_path):
    checkpoint.write_checkpoint(opened, tmp_path / "model.npz", "npz")
    loaded = predictor.load(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (30, 33, 3), np.uint8)
    outputs = loaded([picture])
    hidden = outputs["hidden"][0].repeat(PATCH, axis=0).repeat(PATCH, axis=1)
    assert outputs["hidden"].sum() == 25 - int(25 * (1 - 0.6))
    np.testing.assert_allclose(outputs["reconstruction"][0][~hidden], outputs["image"][0][~hidden], atol=1e-3)
    assert np.abs(outputs["reconstruction"][0][hidden] - outputs["image"][0][hidden]).mean() > 1
    shown = loaded.task.show({name: x[0] for name, x in outputs.items()}, (30, 33))
    assert "hidden, drawn to" in shown.text[0] and shown.draw(None).size == (3 * 140 + 2 * 4, 140)
    plain = models.build("ViT", {k: v for k, v in loaded.description.model.items() if k != "decoder"})
    seen = augment.normalize(outputs["image"], loaded.description.mean, loaded.description.std)
    expected = small.apply(plain, {k: v for k, v in opened.params.items() if k != "decoder"}, seen, method="features")
    np.testing.assert_allclose(predictor.load(tmp_path, head=False).features([picture])["cls"], expected["cls"], atol=1e-4)
