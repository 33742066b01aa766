"""The tokenizer that belongs to a checkpoint: found, and the right one."""

import dataclasses
import io
from functools import partial

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers

from tests.models import small
from vit_jax import checkpoint, models
from vit_jax.checkpoint import describe, token_files
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.texts import open_tokenizer
from vit_jax.data.host import byte_pairs
from vit_jax.errors import UserError

BERT = {"config": {"hidden_size": 64, "mlp_dim": 40, "num_layers": 1, "num_heads": 1}, "vocab_size": 30, "max_len": 20}
IMAGE = {"hidden_size": 32, "patches": {"size": (8, 8)}, "transformer": small.ENCODER}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat"]


def write_towers(path, **fields):
    model = models.build("TwoTowers", {"image": IMAGE, "out_dim": (None, 32), **fields})
    inputs = {"images": np.zeros((1, 16, 16, 3)), "tokens": np.zeros((1, 16), int)}
    checkpoint.save(small.random_values(jax.eval_shape(partial(model.init, **inputs), jax.random.key(0))["params"]), path)
    return path


def test_a_published_lit_and_a_workdir(tmp_path):
    """LiT's vocabulary is called like its file; a run leaves its own beside model.npz."""
    path = write_towers(tmp_path / "mine.npz", text=BERT, text_model="bert")
    with pytest.raises(UserError, match="put it beside it, as .*mine.txt"):
        open_tokenizer(checkpoint.open_checkpoint(path))
    (tmp_path / "mine.txt").write_text("\n".join(WORDS))
    opened = checkpoint.open_checkpoint(path)
    tokens = open_tokenizer(opened)(["A cat", "a dog"])
    assert tokens.dtype == np.int32 and tokens.tolist() == [[2, 4, 5] + [0] * 13, [2, 4, 1] + [0] * 13]

    folder = tmp_path / "run"
    checkpoint.save(opened.params, folder / "model.npz")
    told = {"tokenizer": "bert", "vocab": "words.txt", "max_len": 4}
    describe.write(folder / "model.npz", dataclasses.replace(opened.description, text=told))
    (folder / "words.txt").write_text("\n".join([*WORDS, "dog"]))
    for source in (folder, folder / "model.npz"):
        assert open_tokenizer(checkpoint.open_checkpoint(source))(["a dog"]).tolist() == [[2, 4, 6, 0]]


def test_lit_as_users_of_the_reference_call_it(tmp_path, monkeypatch):
    model = models.get_model("LiT-B16B", image=IMAGE, text=BERT, out_dim=(None, 32))
    assert model.vocab_path == "gs://vit_models/lit/LiT-B16B.txt"
    monkeypatch.chdir(tmp_path)
    write_towers(tmp_path / "LiT-B16B.npz", text=BERT, text_model="bert")
    (tmp_path / "LiT-B16B.txt").write_text("\n".join(WORDS))
    variables, pictures = model.load_variables(), np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3)).astype(np.uint8)
    tokens = model.get_tokenizer()(["a cat", "cat"])
    assert tokens.tolist() == open_tokenizer(checkpoint.open_checkpoint("LiT-B16B.npz"))(["a cat", "cat"]).tolist()
    images = model.get_image_preprocessing(crop=False)(pictures)
    assert images.shape == (2, 224, 224, 3)
    example = model.get_pp()({"image": pictures[0], "text": "a cat"})
    np.testing.assert_array_equal(example["image"], images[0])
    np.testing.assert_array_equal(example["tokens"], tokens[0])
    assert model.get_pp(crop=True)({"image": pictures[0]})["image"].std() > 0
    images = images[:, :16, :16]
    apply = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
    zimg, ztxt, out = apply(variables, images=images, tokens=tokens)
    assert zimg.shape == ztxt.shape == (2, 32) and out["t"].shape == (1,)
    again, _, _ = apply({"params": checkpoint.load("LiT-B16B.npz")}, images=images, tokens=tokens)
    np.testing.assert_array_equal(zimg, again)
    with pytest.raises(UserError, match="mine is not published; those that are: LiT-B16B"):
        model.clone(model_name="mine").load_variables()


SENTENCES = ["a photo of a cat", "a dog and a cat in the snow", "déjà vu", "snow, snow & snow!", "the red bicycle"]
HARD = ["", "A photo,of a CAT!", "déjà  vu", "犬 🐱", "snow " * 40, " tab\tline\n", "it's 12 o'clock", "İSTANBUL ﬁ"]


def siglip(folder):
    model = io.BytesIO()
    data = {"sentence_iterator": iter(SENTENCES * 4), "model_writer": model}
    sentencepiece.SentencePieceTrainer.train(**data, vocab_size=34, minloglevel=2, pad_id=3)
    (folder / "trained.model").write_bytes(model.getvalue())
    return transformers().SiglipTokenizer(str(folder / "trained.model"))


def siglip2(folder):
    """Gemma's form: pieces of bytes where a letter is not known, the end behind every text."""
    letters = sorted({letter for text in SENTENCES for letter in text.replace(" ", "▁")})
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "ca", "cat", "sn"]
    vocab = {word: i for i, word in enumerate(words)}
    peer = transformers().Siglip2Tokenizer(vocab, [("c", "a"), ("ca", "t"), ("s", "n")], padding_side="right")
    end = tokenizers.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    peer.backend_tokenizer.post_processor = end
    return peer


def clip(folder, **options):
    merges = [("c", "a"), ("ca", "t</w>"), ("p", "h"), ("o", "t"), ("ph", "ot"), ("phot", "o</w>")]
    letters = byte_pairs.byte_letters()
    words = [*letters, *(f"{c}</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return transformers().CLIPTokenizer({word: i for i, word in enumerate(words)}, merges, **options)


def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("kind", "make"),
    [("clip", clip), ("clip", partial(clip, pad_token="!")), ("siglip", siglip), ("siglip2", siglip2), ("siglip", siglip2)],
    ids=["CLIP", "CLIP padded by another token", "SigLIP", "SigLIP 2", "SigLIP 2 as SiglipModel"],
)
def test_the_files_beside_a_model_of_transformers(tmp_path, kind, make):
    folder = tmp_path / "hf"
    folder.mkdir()
    peer = make(tmp_path)
    peer.save_pretrained(folder)
    expected = peer(HARD, padding="max_length", truncation=True, max_length=12)["input_ids"]
    opened = opened_in(folder, token_files.describe(kind, folder, {"vocab_size": len(peer), "max_len": 12}))
    assert open_tokenizer(opened)(HARD).tolist() == expected
    # they go along with a converted model
    token_files.write(opened, tmp_path / "again", kind)
    again = token_files.describe(kind, tmp_path / "again", {"vocab_size": len(peer), "max_len": 12})
    assert again == opened.description.text
    assert open_tokenizer(opened_in(tmp_path / "again", again))(HARD).tolist() == expected


def opened_in(folder, described) -> Opened:
    pixels = {"mean": (0,) * 3, "std": (1,) * 3, "image_size": None, "grid": None, "class_names": ()}
    return Opened(folder, "", {}, describe.Description(model_type="TwoTowers", model={"text": {}}, text=described, **pixels))


def test_errors(tmp_path):
    path = write_towers(tmp_path / "mine.npz", text=BERT, text_model="bert")
    opened = checkpoint.open_checkpoint(path)
    (tmp_path / "long.txt").write_text("\n".join([*WORDS, *(f"word{i}" for i in range(30))]))
    with pytest.raises(UserError, match="has 36 tokens, the text tower knows 30"):
        open_tokenizer(opened, vocab=tmp_path / "long.txt")
    for changes, message in (({"text": {}}, "does not tell how texts"), ({"model_type": "ViT"}, "is a ViT, which reads no")):
        changed = dataclasses.replace(opened, description=dataclasses.replace(opened.description, **changes))
        with pytest.raises(UserError, match=message):
            open_tokenizer(changed)
    siglip(tmp_path)
    padded = {"tokenizer": "sentencepiece", "vocab": "trained.model", "max_len": 8, "pad_token": 34}
    described = opened_in(tmp_path, padded).description
    with pytest.raises(UserError, match="pad_token=34: the text tower knows 34 tokens, from 0 on"):
        open_tokenizer(Opened(tmp_path, "", {}, dataclasses.replace(described, model={"text": {"vocab_size": 34}})))
