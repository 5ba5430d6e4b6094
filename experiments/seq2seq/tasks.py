"""What differs between words and verses; all else of the experiment is one for both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.data import pronunciations, verses
from experiments.data.pairs import PairData, Pairs
from experiments.seq2seq import baselines, translation
from experiments.seq2seq.errors import rates

Written = Sequence[Sequence[int]]
Floor = Callable[[Any, int | None], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of pairs.

    Attributes:
      load: size of the vocabulary -> the data.
      has_vocabulary: whether that size is read.
      measure: ``(data, sources, what is written) -> metrics``, numbers and texts.
      floors: what needs no network, by name: ``(data, sources that are written, None =
        all) -> metrics``.
      drawn: how many alignments are drawn, of sources of at least and at most so many
        symbols.
    """

    load: Callable[[int], PairData]
    has_vocabulary: bool
    measure: Callable[[PairData, Pairs, Written], dict[str, Any]]
    floors: Mapping[str, Floor]
    drawn: tuple[int, int, int]


def errors(data: PairData, sources: Pairs, written: Written) -> dict[str, Any]:
    """Phone and word error rates."""
    return rates(
        written, [[y.tolist() for y in several] for several in sources.targets]
    )


def quality(data: PairData, sources: Pairs, written: Written) -> dict[str, Any]:
    """BLEU and chrF of what is written, as text."""
    return translation.quality([data.said(ids) for ids in written], sources.answers)


_WORDS = Kind(
    load=lambda size: pronunciations.cmudict(),
    has_vocabulary=False,
    measure=errors,
    floors=dict(letters=baselines.letters, context=baselines.context),
    drawn=(10, 5, 9),
)
_VERSES = Kind(
    load=verses.bible,
    has_vocabulary=True,
    measure=quality,
    floors=dict(copy=translation.copy, nearest=translation.nearest),
    drawn=(2, 8, 14),
)

TASKS: Mapping[str, Kind] = {
    "cmudict": _WORDS,
    "toy_words": dataclasses.replace(
        _WORDS, load=lambda size: pronunciations.toy_words()
    ),
    "verses": _VERSES,
    "toy_verses": dataclasses.replace(_VERSES, load=verses.toy_verses),
}


def floors(
    task: str, data: PairData, count: int | None
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What needs no network, by name, ready to be measured."""
    found = TASKS[task].floors
    return {name: functools.partial(f, data, count) for name, f in found.items()}
