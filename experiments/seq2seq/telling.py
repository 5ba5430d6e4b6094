"""How words and verses are told: what is scored, and what things are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from experiments.core import report as tell
from experiments.core.report import Column, Group, Row
from experiments.core.stats import Summary


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of what is written.

    Attributes:
      name: in text and figures.
      metric: in records, behind "test_".
      unit: of the number in tables.
      scale: what a record's number is multiplied by.
    """

    name: str
    metric: str
    unit: str = ""
    scale: float = 1.0

    @property
    def key(self) -> str:
        """In records, by beams."""
        return f"test_{self.metric}"

    def of(self, row: Row, suffix: str = "") -> Summary | None:
        """Mean and deviation, as it is told."""
        found = self.key + suffix

        def read(record: tell.Record) -> float | None:
            value = record["metrics"].get(found)
            return None if value is None else self.scale * value

        return row.of(read)

    def by_seed(self, row: Row) -> dict[int, float]:
        """As it is told."""
        return {s: self.scale * x for s, x in row.scores(self.key).items()}

    def column(self, what: str = "", suffix: str = "") -> Column:
        """Of a table."""
        title = f"{self.name}{what}{self.unit}"
        return title, lambda row: tell.mean(self.of(row, suffix), 2)


@dataclasses.dataclass(frozen=True)
class Telling:
    """What is said of one kind of pairs.

    Attributes:
      title: of the report.
      scores: of what is written; rows are compared by the first.
      less: whether less is better.
      items: the sources.
      source, target: their symbols.
      near: how lengths are near: by a symbol, or a tenth where that is more.
      points: what differences of the first score are counted in.
      explained: what the scores are.
      floors: what needs no network, in words.
      undrawn: those of it that figures leave out.
      reference: what others have published.
      shown: examples.
    """

    title: str
    scores: tuple[Score, ...]
    less: bool
    items: str
    source: str
    target: str
    near: str
    points: str
    explained: str
    floors: Mapping[str, str]
    reference: str
    shown: int
    undrawn: tuple[str, ...] = ()


_WORDS = Telling(
    title="# Spelling to phones",
    scores=(Score("PER", "per", ", %", 100.0), Score("WER", "wer", ", %", 100.0)),
    less=True,
    items="words",
    source="letters",
    target="phones",
    near="within one phone",
    points="points of a percent",
    explained=(
        "PER: edits to the nearest pronunciation over its length; WER: share of words "
        "that are none of theirs."
    ),
    floors=dict(
        letters="each letter by itself",
        context="each letter in the widest context seen",
    ),
    undrawn=("letters",),
    reference=(
        "Published, of another and older split of the dictionary, so not of these "
        "words: PER 5.45 %, WER 23.55 % (bidirectional LSTM encoder-decoder; as told "
        "by later papers)."
    ),
    shown=20,
)
_VERSES = Telling(
    title="# Verses, English to Spanish",
    scores=(Score("BLEU", "bleu"), Score("chrF", "chrf")),
    less=False,
    items="verses",
    source="byte pairs",
    target="byte pairs",
    near="within a tenth",
    points="points of BLEU",
    explained=(
        "BLEU and chrF of the whole corpus, of detokenised text, each with one "
        "reference. The Spanish is of 1909, and no chapter is in two parts."
    ),
    floors=dict(
        copy="the source itself",
        nearest="translation of the most similar training verse",
    ),
    reference=(
        "No published number is of this split. It is little data of an archaic style: "
        "BLEU of news translation is no measure for it."
    ),
    shown=8,
)
TELLINGS: Mapping[str, Telling] = dict(
    cmudict=_WORDS, toy_words=_WORDS, verses=_VERSES, toy_verses=_VERSES
)


def telling_of(group: Group) -> Telling:
    """What is said of the pairs of a group."""
    return TELLINGS[group.config["task"]]
