"""The sentences of digits say which digit it is, follow from its number, and are worded anew where they are to be tested."""

import re
from collections import Counter

from vit_jax.data.digit_sentences import NAMES, VOCAB, WORDINGS
from vit_jax.data.host import text
from vit_jax.data.sources import get_source


def words(sentence):
    return set(re.findall(r"\w+|[^\w\s{}]", sentence.lower()))


def test_sentences_name_the_digit_and_follow_from_its_number():
    for split, count, sentences in (("train", 1437, 4), ("test", 360, 10)):
        source, digits = get_source("digit_sentences", split), get_source("digits", split)
        assert len(source) == count
        for i in range(0, count, 7):
            example = source[i]
            assert example["label"] == digits[i]["label"] and len(set(example["text"])) == sentences
            for language, names in NAMES.items():
                wordings = [wording.format(names[example["label"]]) for wording in WORDINGS[split][language]]
                assert sum(sentence in wordings for sentence in example["text"]) >= sentences // 2
    part, whole = get_source("digit_sentences", "train[1000:]"), get_source("digit_sentences", "train")
    assert part[5]["text"] == whole[1005]["text"] and part.where(5) == whole.where(1005)
    assert part.fingerprint() != whole.fingerprint() == get_source("digit_sentences", "train").fingerprint()


def test_every_wording_for_testing_has_words_that_training_lacks():
    trained = {word for wordings in WORDINGS["train"].values() for wording in wordings for word in words(wording)}
    trained |= {name for names in NAMES.values() for name in names}
    for wordings in WORDINGS["test"].values():
        assert all(words(wording) - trained for wording in wordings)


def test_the_vocabulary_has_the_names_and_what_several_wordings_for_training_share():
    tokenizer = text.make("bert", VOCAB, 12)
    names = {i for names in NAMES.values() for tokens in tokenizer(names) for i in tokens[1:2]}
    assert len(names) == 20 and not names & {0, 1, 2, 3}
    counts = Counter(w for wordings in WORDINGS["train"].values() for wording in wordings for w in words(wording))
    lines = VOCAB.read_text().splitlines()
    assert lines[:4] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] and len(lines) == len(set(lines))
    assert set(lines[24:]) == {word for word, n in counts.items() if n > 1}
