"""Tokenizers against TensorFlow Text (results that it gave once) and transformers, on strings that break others."""

import gzip
import io
import json
import string
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from vit_jax import preprocess, tokenizer
from vit_jax.data.host import byte_pairs, text
from vit_jax.errors import UserError

LETTERS = string.ascii_lowercase + string.digits + "жéßσ猫犬한ᄒ"
WORDS = ["photo", "cat", "dog", "##ing", "don", "stop", "straße", "strasse", "naive", "fine", "12", "##34"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCAB = [*SPECIAL, *string.punctuation, *"，。“”…–€☃", *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS]
# What tensorflow_text 2.21.1's BertTokenizer(lower_case=True) makes of these with VOCAB.
TENSORFLOW = {
    "": "",
    "  ": "",
    "A photo of cats": "a photo o ##f cat ##s",
    "naïve Déjà e\u0301": "naive d ##e ##j ##a e",
    "猫の犬photo猫": "猫 [UNK] 犬 photo 猫",
    "한": "[UNK]",
    "🐱cat👩\u200d👩\u200d👧 ❤\ufe0f ☃": "[UNK] [UNK] ☃",
    "a\tb\nc\r\x00d\x01e\x7ff\x85g": "a b c d e f g",
    "so\u00adft z\u200bw \ufeffb": "s ##o ##f ##t z ##w b",
    "ﬁne ½ Ⅷ ＡＢ\u3000Ｃ，。": "fine [UNK] v ##i ##i ##i a ##b c , 。",
    "straße GROSS ΣΣ İ": "strasse g ##r ##o ##s ##s σ ##σ i",
    "don't stop-me! [CLS] ##s $5 €3 +=<>^`|~": "don ' t stop - m ##e ! [ c ##l ##s ] # # s $ 5 € ##3 + = < > ^ ` | ~",
    "a" * 100: "a" + " ##a" * 99,
    "a" * 101: "[UNK]",
    "ж" * 50: "ж" + " ##ж" * 49,
    "ж" * 51: "[UNK]",
    "x" * 10_000: "[UNK]",
    "w\u2003s\u00a0n\u2028l": "w s [UNK]",
    "“q” … –": "“ q ” . . . –",
    "1234 3.14": "12 ##34 3 . 1 ##4",
    "𝒜𝓁 \u212a \u017f": "a ##l k s",
    "photocatdog photoing": "photo ##c ##a ##t ##d ##o ##g photo ##ing",
}
NOT_AS_IN_TRANSFORMERS = "ﬁne", "straße", "a\tb", "ж", "so\u00adft", "🐱", "𝒜", "“", "w\u2003", "한", "don't"
SENTENCES = ["a photo of a cat", "a dog and a cat in the snow", "déjà vu", "the red bicycle", "犬と猫", "snow, snow & snow!"]
HARD = [
    "",
    " ",
    "A photo,of a CAT!",
    "déjà  vu",
    "犬と猫 🐱",
    "cat " * 2500,
    "\x01 tab\tline\n",
    "ＡＢ",
    "snow" * 40,
    "<unk> </s> <s>",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n")
    return path


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, vocab_size=38, minloglevel=2, pad_id=3
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def clip_vocabulary(tmp_path_factory) -> Path:
    """`vocab.json` with `merges.txt`: all bytes, and a few merges."""
    merges = [("c", "a"), ("ca", "t</w>"), ("p", "h"), ("o", "t"), ("ph", "ot"), ("phot", "o</w>"), ("a", "t</w>")]
    letters = byte_pairs.byte_letters()
    words = [*letters, *(f"{c}</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    return folder / "vocab.json"


def test_a_vocabulary_tells_all_its_files(vocabulary, clip_vocabulary):
    assert text.make("bert", vocabulary, 8).files == (vocabulary,)
    assert text.make("clip", clip_vocabulary, 8).files == (clip_vocabulary, clip_vocabulary.with_name("merges.txt"))


def test_wordpiece_is_tensorflows(vocabulary):
    tokenizer = preprocess.get_tokenizer("bert")(vocab_path=vocabulary, max_len=128)
    for (given, expected), row in zip(TENSORFLOW.items(), tokenizer(list(TENSORFLOW)), strict=True):
        ids = [VOCAB.index(token) for token in ["[CLS]", *expected.split()]]
        assert row.tolist() == ids + [0] * (128 - len(ids)), given[:20]


def test_wordpiece_is_transformers_where_that_is_tensorflows(vocabulary):
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    peer = legacy.BertTokenizerLegacy(str(vocabulary))
    same = [t for t in TENSORFLOW if not t.startswith(NOT_AS_IN_TRANSFORMERS)] + ["dog, cat-photo (naïve)!", "cat " * 200]
    assert len(same) > 10
    tokenizer = text.BertTokenizer(vocabulary, 40)
    for given, row in zip(same, tokenizer([t.encode() for t in same]), strict=True):
        ids = [2, *peer.encode(given, add_special_tokens=False)][:40]
        assert row.tolist() == ids + [0] * (40 - len(ids)), given


def test_a_vocabulary_without_unknown_gets_a_row_more(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[CLS]\nsome\ntest\nwords")
    tokenizer = preprocess.get_tokenizer("bert")(vocab_path=path, max_len=3)
    assert tokenizer(["some", "test", "words", "xxx"]).tolist() == [[1, 2, 0], [1, 3, 0], [1, 4, 0], [1, 5, 0]]
    assert (tokenizer.start_token, tokenizer.vocab_size) == (1, 6)


def test_sentencepiece_ends_in_a_sticky_end(sentencepiece_model):

    peer = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = preprocess.get_tokenizer("sentencepiece")(vocab_path=sentencepiece_model, max_len=16)
    assert tokenizer.stop_token == 2 and tokenizer.vocab_size == 38
    for given, row in zip(HARD, tokenizer(HARD), strict=True):
        ids = peer.encode(given, add_eos=True)[:15]
        assert row.tolist() == ids + [2] * (16 - len(ids)), given[:20]


@pytest.mark.parametrize("given", HARD[:-1])  # transformers finds special tokens in texts
def test_siglip_is_transformers(sentencepiece_model, given):
    transformers = pytest.importorskip("transformers")
    special = {name: "</s>" for name in ("eos_token", "pad_token")}
    peer = transformers.SiglipTokenizer(str(sentencepiece_model), **special, model_max_length=12)
    ids = peer([given], padding="max_length", truncation=True, max_length=12)["input_ids"]
    options = {"lower": True, "strip_punctuation": True}
    assert text.SentencepieceTokenizer(sentencepiece_model, 12, **options)([given]).tolist() == ids


@pytest.mark.parametrize("given", [*HARD[:-1], "photo's of cats' 12 they'll", "<|endoftext|> cat", "e\u0301"])
def test_clip_is_transformers(clip_vocabulary, given, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab, merges = json.loads(clip_vocabulary.read_text()), clip_vocabulary.with_name("merges.txt").read_text()
    peer = transformers.CLIPTokenizer(vocab, [tuple(line.split()) for line in merges.split("\n")[1:-1]])
    peer.save_pretrained(tmp_path)
    ids = peer([given], padding="max_length", truncation=True, max_length=24)["input_ids"]
    for path in (clip_vocabulary, tmp_path / "tokenizer.json"):
        assert text.ClipTokenizer(path, 24)([given]).tolist() == ids


def test_openais_vocabulary_file(clip_vocabulary, tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt"
    path.write_text(clip_vocabulary.with_name("merges.txt").read_text())
    texts = ["a photo of a cat", "12 cats!"]
    expected = text.ClipTokenizer(clip_vocabulary, 9)(texts)
    np.testing.assert_array_equal(text.ClipTokenizer(path, 9)(texts), expected)
    padded = text.ClipTokenizer(path, 9, pad_token=0)(["cat"])[0]
    assert padded.tolist() == [*expected[1:, 0], 512 + 1, 512 + 8, 0, 0, 0, 0, 0, 0]


def test_siglip2_reads_tokenizer_json(tmp_path):
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "cat": 3, "dog": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.enable_padding(pad_token="<pad>", length=64)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = text.SentencepieceTokenizer(tmp_path / "tokenizer.json", 5, lower=True, pad_token=0)
    assert tokenizer(["CAT dog", "dog " * 9, ""]).tolist() == [[3, 4, 1, 0, 0], [4, 4, 4, 4, 1], [1, 0, 0, 0, 0]]


def test_a_vocabulary_with_holes_or_without_its_unknown_word(tmp_path):
    for words, unknown in (({"<eos>": 1, "cat": 9, "<unk>": 2}, "<unk>"), ({"<eos>": 1, "cat": 9}, "[UNK]")):
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=unknown))
        model.save(str(tmp_path / "tokenizer.json"))
        tokenizer = text.SentencepieceTokenizer(tmp_path / "tokenizer.json", 3)
        assert tokenizer.vocab_size == 10 and tokenizer(["cat"]).tolist() == [[9, 1, 1]]
    with pytest.raises(UserError, match="tokenizer.json makes no tokens of 'dog': WordLevel error"):
        tokenizer(["dog"])


def test_cutting_is_said_once(vocabulary, caplog):
    tokenizer = text.BertTokenizer(vocabulary, 4)
    for _ in range(2):
        assert (tokenizer(["cat " * 9, "cat cat cat"]) == [2] + [VOCAB.index("cat")] * 3).all()
    assert [r.getMessage() for r in caplog.records if "cut" in r.getMessage()] == [
        "text     1 of 2 texts are longer than the 4 tokens that the model reads: their ends are cut (said once)"
    ]


def test_errors(tmp_path, vocabulary):
    with pytest.raises(UserError, match="unknown tokenizer 'brt': did you mean bert"):
        preprocess.get_tokenizer("brt")
    with pytest.raises(UserError, match="no vocabulary at"):
        text.BertTokenizer(tmp_path / "none.txt", 8)
    with pytest.raises(UserError, match="no vocabulary for SentencepieceTokenizer"):
        text.SentencepieceTokenizer(vocabulary, 8)
    (tmp_path / "words.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"which has a line \[CLS\]"):
        text.BertTokenizer(tmp_path / "words.txt", 8)
    with pytest.raises(UserError, match="max_len=1 leaves no room"):
        text.BertTokenizer(vocabulary, 1)
    with pytest.raises(UserError, match="unknown option of the bert tokenizer 'lowr'"):
        text.make("bert", vocabulary, 8, lowr=True)
    tokenizer = text.BertTokenizer(vocabulary, 8)
    for wrong, message in (("cat", "a list of texts"), ([b"\xff"], "no UTF-8"), ([3], "must be a string, not int")):
        with pytest.raises(UserError, match=message):
            tokenizer(wrong)
    assert tokenizer(["\ud800cat"]).shape == (1, 8)


def test_a_file_that_unpacks_to_more_than_a_vocabulary_is_refused(tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(bytes(1 << 25)))
    with pytest.raises(UserError, match="holds more than 16,777,216 bytes"):
        text.ClipTokenizer(path, 8)


def test_a_vocabulary_is_made_of_long_sentences_too():
    model = tokenizer.train(["a cat"] * 9 + ["zebra " * 1000], vocab_size=20, kind="word")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert {processor.id_to_piece(i) for i in range(3, processor.vocab_size())} == {"▁a", "▁cat", "▁zebra"}
