"""English verses and their Spanish translations as byte pairs of one vocabulary.

The verses of `experiments.data.byte_text`: the World English Bible, and Reina-Valera of
1909, whose Spanish is archaic. Whole chapters are put into a part, so that no verse of
the test part has its neighbours in training; what is told twice, as in the gospels, may
be in two parts, and how much that helps is what the nearest neighbour shows.
Byte pairs are those of the training part alone, of both languages together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from experiments.data import byte_pairs, byte_text
from experiments.data.byte_pairs import BytePairs
from experiments.data.fetch import seal
from experiments.data.pairs import PairData, Pairs
from experiments.data.splits import Three, in_three, random_bits


@dataclasses.dataclass(frozen=True, eq=False)
class Verses(PairData):
    """Verses and their translations; the parts share no chapter.

    Attributes:
      pieces: of both languages.
    """

    pieces: BytePairs

    shared = True

    @property
    def num_source(self) -> int:
        return len(self.pieces)

    @property
    def num_target(self) -> int:
        return len(self.pieces)

    def said(self, target: Sequence[int] | np.ndarray) -> str:
        """A translation as it is read."""
        return self.pieces.decode(target)

    def symbols(
        self, source: np.ndarray, target: Sequence[int]
    ) -> tuple[list[str], list[str]]:
        known = self.pieces.pieces
        one, two = ([known[i] for i in side] for side in (source, target))
        return one, two

    def contents(self) -> str:
        """How many verses in each part, and byte pairs."""
        return f"{self.counts('verses')}, {len(self.pieces):,} byte pairs"


def by_chapter(documents: byte_text.Documents, seed: int = 0) -> Three:
    """Indices of the verses of three parts, each of whole chapters."""
    count = int(documents.pages.max()) + 1
    keys = random_bits(seed, 33).random_raw(count)
    return in_three(keys, members=documents.pages)


def in_parts(
    documents: byte_text.Documents, size: int, *, seed: int = 0, name: str = "verses"
) -> Verses:
    """Verses as numbers, split by chapter: always the same to the same part.

    Args:
      documents: with translations; a page is a chapter.
      size: of the vocabulary, see `experiments.data.byte_pairs.train`.
      seed: of the split.
      name: of the data.

    Raises:
      ValueError: the training part has fewer byte pairs.
    """
    rows = by_chapter(documents, seed)
    sides = [
        [text.decode("utf-8") for text in side]
        for side in (documents.texts, documents.translations)
    ]
    pieces = byte_pairs.train((side[i] for side in sides for i in rows[0]), size)
    sources, targets = (pieces.encode(side) for side in sides)
    every = Pairs(
        tuple(sides[0]), tuple(sides[1]), tuple(sources), tuple((y,) for y in targets)
    )
    digest = seal(
        documents.sha256,
        *rows,
        "\n".join(pieces.pieces),
        *(np.concatenate(side) for side in (sources, targets)),
    )
    train, validation, test = (every.take(part) for part in rows)
    return Verses(name, documents.source, digest, train, validation, test, pieces)


_documents = functools.cache(byte_text.load_verses)


@functools.cache
def bible(size: int = 4_000) -> Verses:
    """All verses, in so many byte pairs; see `byte_text.load_verses`."""
    return in_parts(_documents(), size)


@functools.cache
def toy_verses(size: int = 100, count: int = 120, seed: int = 0) -> Verses:
    """Made-up verses of two made-up grammars, for tests; they are no data.

    >>> data = toy_verses()
    >>> data.describe().partition(",")[0]
    'toy_verses (SYNTHETIC): 96 train + 12 validation + 12 test verses'
    """
    random = np.random.Generator(np.random.PCG64([seed, 35]))
    things = dict(sea="mar", tree="árbol", king="rey", bird="pájaro", day="día")
    kinds = dict(old="viejo", red="rojo", great="grande", new="nuevo")
    acts = dict(sees="ve", makes="hace", loves="ama")
    texts, translations = [], []
    for _ in range(count):
        a, b = random.choice(list(things), 2).tolist()
        k, m = random.choice(list(kinds), 2).tolist()
        act = str(random.choice(list(acts)))
        texts.append(f"The {k} {a} {act} the {m} {b}.".encode())
        said = f"El {things[a]} {kinds[k]} {acts[act]} el {things[b]} {kinds[m]}."
        translations.append(said.encode())
    documents = byte_text.Documents(
        "toy_verses",
        f"drawn, seed {seed}",
        seal(*texts, *translations),
        tuple(texts),
        np.zeros(count, np.int32),
        np.arange(count, dtype=np.int32) // 4,
        ("verse",),
        tuple(translations),
    )
    return in_parts(documents, size, seed=seed, name="toy_verses (SYNTHETIC)")
