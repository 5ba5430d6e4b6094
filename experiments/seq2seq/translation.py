"""Translations: how near they are to the right ones, and two that need no network.

Scores are of detokenised text and of the whole corpus, by sacreBLEU, whose signature
says all that they depend on.

References: Papineni et al., 2002; Popović, 2015, chrF; Post, 2018, arXiv:1804.08771.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.data.pairs import PairData

_AT_ONCE = 256  # test sources that are compared with all of training


def quality(written: Sequence[str], right: Sequence[str]) -> dict[str, Any]:
    """BLEU and chrF of a corpus, 0 to 100, and how they were computed.

    Args:
      written: texts.
      right: the reference of each.

    Raises:
      ValueError: there are none, or not as many of the one as of the other.

    >>> found = quality(["El rey ve el mar rojo."], ["El rey ve el mar rojo."])
    >>> round(found["bleu"]), round(found["chrf"]), found["bleu_signature"][:20]
    (100, 100, 'nrefs:1|case:mixed|e')
    """
    from sacrebleu.metrics import BLEU, CHRF

    if not written or len(written) != len(right):
        raise ValueError(
            "written must be one text for each that is right, at least one, got "
            f"{len(written)} for {len(right)}."
        )
    found: dict[str, Any] = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found[name] = float(metric.corpus_score(list(written), [list(right)]).score)
        found[f"{name}_signature"] = str(metric.get_signature())
    return found


def _of_test(data: PairData, texts: Sequence[str], right: Sequence[str]) -> Any:
    return {f"test_{name}": x for name, x in quality(texts, right).items()}


def copy(data: PairData, count: int | None) -> dict[str, Any]:
    """The source itself: names and numbers are right in any language."""
    test = data.test.some(count)
    return _of_test(data, test.texts, test.answers)


def nearest(data: PairData, count: int | None) -> dict[str, Any]:
    """What the training source that is most like a source was translated to."""
    test = data.test.some(count)
    found = most_similar(test.texts, data.train.texts)
    return _of_test(data, [data.train.answers[i] for i in found], test.answers)


def most_similar(texts: Sequence[str], known: Sequence[str]) -> list[int]:
    """Of each text the index of the known one with the nearest words.

    By the cosine of TF-IDF of words and pairs of words, fitted to what is known; the
    first of those that are as near.

    >>> most_similar(["the red sea"], ["a king", "a red sea", "the tree"])
    [1]
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    features = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+")
    against = features.fit_transform(known).T
    found: list[int] = []
    for begin in range(0, len(texts), _AT_ONCE):
        scores = features.transform(texts[begin : begin + _AT_ONCE]) @ against
        found += np.asarray(scores.argmax(axis=1)).ravel().tolist()
    return found
