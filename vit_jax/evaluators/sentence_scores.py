"""How like sentences are to those that people wrote: BLEU, ROUGE-L and CIDEr, number for number as pycocoevalcap 1.2 has them.

Its tokenizer is a Java program. Here `words_of` does what that does to common English sentences: lower case, punctuation left
out, "isn't" taken apart to "is n't", "dog's" to "dog 's", "cannot" to "can not". It differs in abbreviations, which keep their
last dot there, in brackets, which are words there, and in "gonna".
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

Words = Sequence[str]
N = 4
"""The longest run of words that is counted."""
_TINY, _SMALL = 1e-15, 1e-9  # against division by 0
_BETA = 1.2
_SIGMA = 6.0
_CLITIC = r"n't\b|'(?:s|re|ve|ll|d|m)\b"
_PARTS = re.compile(rf"(?<=\w)({_CLITIC})|(?<=\bcan)(not\b)")
_WORD = re.compile(rf"{_CLITIC}|\w+(?:[-.,:/']\w+)*|[&$%#*]")


def words_of(sentence: str) -> list[str]:
    """The words of a sentence, as they are compared."""
    return _WORD.findall(_PARTS.sub(r" \1\2", sentence.lower().replace("’", "'")))


def scores(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """`BLEU_1` … `BLEU_4`, `ROUGE_L` and `CIDEr` of a sentence for each image; each image has one or more references."""
    named = {f"BLEU_{n + 1}": score for n, score in enumerate(bleu(written, references))}
    return named | {"ROUGE_L": rouge_l(written, references), "CIDEr": cider(written, references)}


def bleu(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """The geometric mean of the precisions of runs of 1 … n words, of all images together, for n up to 4.

    A run counts as often as one reference has it. Too short sentences are punished, compared with the reference that is
    closest in length (https://aclanthology.org/P02-1040).
    """
    correct, guessed, length, wanted = np.zeros(N), np.zeros(N), 0, 0
    for sentence, truths in zip(written, references, strict=True):
        most: Counter = Counter()
        for truth in truths:
            most |= _runs(truth)
        for run, count in _runs(sentence).items():
            correct[len(run) - 1] += min(count, most[run])
        guessed += [max(0, len(sentence) - n) for n in range(N)]
        length += len(sentence)
        wanted += min((abs(len(truth) - len(sentence)), len(truth)) for truth in truths)[1]
    ratio = (length + _TINY) / (wanted + _SMALL)
    precision = np.cumprod((correct + _TINY) / (guessed + _SMALL))
    short = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(p ** (1 / (n + 1))) * short for n, p in enumerate(precision)]


def rouge_l(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """The F-score, with β = 1.2, of the longest common subsequence: its best precision and recall over the references."""
    found = []
    for sentence, truths in zip(written, references, strict=True):
        common = [_common(sentence, truth) for truth in truths]
        precision = max(common) / max(1, len(sentence))
        recall = max(n / max(1, len(truth)) for n, truth in zip(common, truths, strict=True))
        both = precision and recall
        found.append((1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision) if both else 0.0)
    return float(np.mean(found))


def cider(written: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """CIDEr-D: ten times the cosine of the tf-idf weights of runs of 1 … 4 words, the mean over n, references and images.

    A run weighs log(images / images with it in a reference). Counts are clipped to the reference's, and another number of
    pairs of words is punished by a Gaussian, σ = 6 (https://arxiv.org/abs/1411.5726).
    """
    with_it = Counter(run for truths in references for run in {run for truth in truths for run in _runs(truth)})
    of_all = math.log(len(references))

    def weights(words: Words) -> list[dict[Words, float]]:
        vectors: list[dict[Words, float]] = [{} for _ in range(N)]
        for run, count in _runs(words).items():
            vectors[len(run) - 1][run] = count * (of_all - math.log(max(1, with_it[run])))
        return vectors

    means = []
    for sentence, truths in zip(written, references, strict=True):
        ours, total = weights(sentence), 0.0
        for truth in truths:
            apart = max(0, len(sentence) - 1) - max(0, len(truth) - 1)
            likeness = [_cosine(x, y) for x, y in zip(ours, weights(truth), strict=True)]
            total += float(np.mean(likeness)) * math.exp(-(apart**2) / (2 * _SIGMA**2))
        means.append(10 * total / len(truths))
    return float(np.mean(means))


def _runs(words: Words) -> Counter:
    """How often there is each run of 1 to `N` words."""
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


def _common(a: Words, b: Words) -> int:
    """The length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for x in a:
        before = best[:]
        for j, y in enumerate(b):
            best[j + 1] = before[j] + 1 if x == y else max(before[j + 1], best[j])
    return best[-1]


def _cosine(x: dict[Words, float], y: dict[Words, float]) -> float:
    dot = sum(min(value, y.get(run, 0.0)) * y.get(run, 0.0) for run, value in x.items())
    lengths = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
    return dot / lengths if lengths else dot
