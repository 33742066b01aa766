"""Digits to try images and words on: the bundled digits, each with sentences in English and in German that say which it is.

The digits are real and the sentences are ours. Those of the test split are worded as no sentence for training is, each
with words that training never shows: only the word for the number is the same.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.digits import DigitsSource
from vit_jax.data.features import Image, Label, Source, Text, digest
from vit_jax.data.splits import split_range

NAMES = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "de": ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
}
WORDINGS = {
    "train": {
        "en": (
            *("a photo of a {}", "a photo of the digit {}", "the number {}", "{}", "a handwritten {}", "someone wrote a {}"),
            *("this is a {}", "a {} on white paper", "here you see the number {}", "the digit {} in black ink"),
            *("a small picture of a {}", "{}, written with a pen", "a child drew the number {}", "it says {}"),
            *("a blurry scan of a {}", "{} in somebody's handwriting", "can you read this {}?", "an old {} from a form"),
            *("what a nice {}!", "on the second page there is a {}"),
        ),
        "de": (
            *("ein Foto einer {}", "ein Foto der Ziffer {}", "die Zahl {}", "{}", "eine handgeschriebene {}"),
            *("jemand schrieb eine {}", "das ist eine {}", "eine {} auf weißem Papier", "hier sieht man die Zahl {}"),
            *("die Ziffer {} in schwarzer Tinte", "ein kleines Bild einer {}", "{}, mit einem Stift geschrieben"),
            *("ein Kind malte die Zahl {}", "da steht {}", "ein unscharfer Scan einer {}", "{} in fremder Handschrift"),
            *("kannst du diese {} lesen?", "eine alte {} aus einem Formular", "wie schön, eine {}!"),
            "auf der zweiten Seite gibt es eine {}",
        ),
    },
    "test": {
        "en": (
            *("the postman deciphered a {} on that envelope", "my teacher chalked {} onto our blackboard"),
            *("a sloppy scrawl meaning {}", "look, {} again", "a drawing of the number {}"),
        ),
        "de": (
            *("der Briefträger entziffert eine {} am Umschlag", "unsere Lehrerin kritzelt {} an die Tafel"),
            *("ein Gekrakel, vermutlich {}", "schon wieder eine {}", "gemeint ist wohl die {}"),
        ),
    },
}
"""By split and language; {} is the number's name."""
VOCAB = Path(__file__).with_name("digit_words.txt")
"""WordPiece: the numbers' names, and the words and marks of more than one wording for training. All others are unknown words,
which a tower learns to overlook because training has many of them.
"""
SENTENCES = {"train": 2, "test": 5}
"""Of each image in each language: two of the wordings, or all of those for testing."""


class DigitSentencesSource(Source):
    """The 1,437 digits for training and 360 for testing (see DigitsSource), with `text`: `SENTENCES` in each language.

    An image's sentences depend on its number and split alone. `label` is the digit; its classes are called by their English
    names.
    """

    exif_rotated = False

    def __init__(self, split: str):
        self._digits = DigitsSource("digits", split)
        name, self._part = split_range(split, {name: len(DigitsSource("digits", name)) for name in WORDINGS})
        self._name, self._wordings = name, WORDINGS[name]
        self.features = {"image": Image(), "label": Label(NAMES["en"]), "text": Text(VOCAB)}

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._digits[index]
        rng = np.random.default_rng([self._part[index], list(WORDINGS).index(self._name)])
        sentences = [
            wording.format(NAMES[language][example["label"]])
            for language, wordings in self._wordings.items()
            for wording in rng.choice(wordings, SENTENCES[self._name], replace=False)
        ]
        return example | {"text": tuple(rng.permutation(sentences).tolist())}

    def where(self, index: int) -> str:
        return f"digit_sentences {self._name}, example {self._part[index]}"

    def fingerprint(self) -> dict[str, str | int]:
        texts = (sentence for i in range(len(self)) for sentence in self[i]["text"])
        return self._digits.fingerprint() | super().fingerprint() | {"texts": digest(texts)}
