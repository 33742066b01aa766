"""transformers' VisionEncoderDecoderModel of a ViT and GPT-2: logits, beams and bits, in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

from tests.models import transformer_peer
from vit_jax import checkpoint, convert, predictor
from vit_jax.data.host.byte_pairs import byte_letters
from vit_jax.errors import UserError
from vit_jax.models import build

pytestmark = pytest.mark.usefixtures("full_precision")
END, LENGTH = 256, 9


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """(its folder, the model): random parameters, heads of other numbers, and a vocabulary of the single bytes."""
    folder = tmp_path_factory.mktemp("peer")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    image = ViTConfig(**sizes, image_size=12, patch_size=4, layer_norm_eps=1e-12)
    text = GPT2Config(vocab_size=END + 1, n_positions=16, n_embd=24, n_layer=2, n_head=3, n_inner=28)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
    model = transformer_peer.randomise(VisionEncoderDecoderModel(config=config))
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, END)
        setattr(model.config, name, END)
    model.generation_config.max_length, model.generation_config.num_beams = LENGTH, 3
    model.save_pretrained(folder)
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(byte_letters())}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters.add_special_tokens(["<|endoftext|>"])
    letters.save(str(folder / "tokenizer.json"))
    return folder, model.eval()


def inputs():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 12, 12, 3)).astype(np.float32), rng.integers(0, END, (3, 7))


def test_logits_are_theirs(peer):
    folder, model = peer
    opened = checkpoint.open_checkpoint(folder)
    images, tokens = inputs()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        expected = model(pixel_values=pixels, decoder_input_ids=torch.from_numpy(tokens)).logits.numpy()
    captioner = build(opened.description.model_type, opened.description.model)
    found = jax.jit(captioner.apply)({"params": opened.params}, images, jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_beams_are_theirs_token_for_token(peer):
    folder, model = peer
    loaded = predictor.load(folder)
    pictures = np.random.default_rng(1).integers(0, 256, (4, 12, 12, 3), np.uint8)
    outputs = loaded(list(pictures))
    images = (pictures / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        theirs = model.generate(pixel_values=torch.from_numpy(images.copy()), max_length=LENGTH, num_beams=3).numpy()[:, 1:]
    assert theirs.shape[1] <= outputs["tokens"].shape[1] == LENGTH - 1
    np.testing.assert_array_equal(outputs["tokens"][:, : theirs.shape[1]], theirs)
    assert (outputs["tokens"][:, theirs.shape[1] :] == END).all()
    written = loaded.task.write(outputs)[0]
    row = outputs["tokens"][0][: outputs["lengths"][0]]
    assert written.text == bytes(_bytes()[int(i)] for i in row if i != END).decode(errors="replace").strip()


def _bytes():
    letters = byte_letters()
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return dict(enumerate([*order, *(b for b in range(256) if b not in order)])) | {len(letters): 32}


def test_files_come_back_bit_for_bit(peer, tmp_path, capsys):
    folder, model = peer
    assert convert.main([str(folder), str(tmp_path / "out"), "--to=hf"]) == 0
    assert "both models agree to 0.0e+00" in capsys.readouterr().out
    again = VisionEncoderDecoderModel.from_pretrained(tmp_path / "out")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    settings = again.generation_config
    assert (settings.num_beams, settings.max_length, settings.decoder_start_token_id) == (3, LENGTH, END)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert convert.main([str(folder), str(tmp_path / "ours"), "--to=npz"]) == 0
    assert convert.main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to=hf"]) == 0
    names = ("model.safetensors", "config.json", "generation_config.json")
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "back" / name).read_bytes() for name in names)


def test_a_vit_and_a_gpt2_of_different_widths_are_joined_by_a_map(tmp_path):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    image = ViTConfig(**sizes, image_size=12, patch_size=4)
    text = GPT2Config(vocab_size=END + 1, n_positions=16, n_embd=20, n_layer=1, n_head=2, n_inner=28)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
    model = transformer_peer.randomise(VisionEncoderDecoderModel(config=config)).eval()
    model.save_pretrained(tmp_path / "theirs")
    opened = checkpoint.open_checkpoint(tmp_path / "theirs")
    images, tokens = inputs()
    with torch.inference_mode():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        expected = model(pixel_values=pixels, decoder_input_ids=torch.from_numpy(tokens)).logits.numpy()
    captioner = build(opened.description.model_type, opened.description.model)
    found = jax.jit(captioner.apply)({"params": opened.params}, images, jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    checkpoint.write_checkpoint(opened, tmp_path / "out", "hf")
    before, after = model.state_dict(), VisionEncoderDecoderModel.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    opened.description.model.update({"project_memory": False})
    with pytest.raises(UserError, match="another width than the ViT with project_memory=False"):
        checkpoint.write_checkpoint(opened, tmp_path / "plain", "hf")


def test_what_gpt2_has_no_place_for_is_named(peer, tmp_path):
    folder, _ = peer
    opened = checkpoint.open_checkpoint(folder)
    opened.description.model.update({"use_bias": False})
    with pytest.raises(UserError, match="no place for use_bias=False"):
        checkpoint.write_checkpoint(opened, tmp_path / "out", "hf")
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["activation_function"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="activation_function"):
        checkpoint.open_checkpoint(tmp_path)
    config["decoder"]["activation_function"] = "gelu_new"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"num_beams": "many"}')
    with pytest.raises(UserError, match=r"num_beams is \"many\"; it must be a whole number from 1"):
        checkpoint.open_checkpoint(tmp_path)
