"""Spelling to phones without a network: letters, each in its context, say phones.

Each letter of a training word is given none, one or two phones, in order, by the
likeliest alignment, which is found by turns with how likely a letter says what (hard
expectation maximisation). "letters" then says what each letter says most often;
"context" what it says most often between the letters around it, by the widest context
that was seen in training: a joint-sequence model in its simplest form.

References: Black, Lenzo and Pagel, 1998, issues in building general letter to sound
rules; Bisani and Ney, 2008, joint-sequence models for grapheme-to-phoneme conversion.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.data.pronunciations import Pronunciations
from experiments.seq2seq.errors import rates

Chunk = tuple[int, ...]
Table = Mapping[tuple[int, Chunk], float]

# Letters to the left and to the right of what is to be said, the widest first.
CONTEXTS = ((4, 4), (3, 3), (2, 3), (2, 2), (1, 2), (1, 1), (0, 1), (0, 0))
MOST = 2  # phones that a letter says
ROUNDS = 3  # of alignment
ALIGN_ON = 20_000  # words that all rounds but the last read
_UNSEEN = -12.0  # log-probability of what a letter has not said so far


def align(
    letters: Sequence[int], phones: Sequence[int], table: Table
) -> list[Chunk] | None:
    """What each letter says, so that all together say the phones.

    Args:
      letters, phones: of one word.
      table: log-probability of phones by letter.

    Returns:
      Phones of each letter; None where there are more than the letters can say.

    >>> align([5, 6], [7], {(5, ()): -1.0, (6, (7,)): -1.0})
    [(), (7,)]
    """
    count = len(phones)
    best = [[-math.inf] * (count + 1) for _ in range(len(letters) + 1)]
    how = [[0] * (count + 1) for _ in range(len(letters) + 1)]
    best[0][0] = 0.0
    for i, letter in enumerate(letters):
        for j, score in enumerate(best[i]):
            if score == -math.inf:
                continue
            for size in range(min(MOST, count - j) + 1):
                chunk = tuple(phones[j : j + size])
                total = score + table.get((letter, chunk), _UNSEEN)
                if total > best[i + 1][j + size]:
                    best[i + 1][j + size], how[i + 1][j + size] = total, size
    if best[-1][count] == -math.inf:
        return None
    found: list[Chunk] = []
    for i in range(len(letters), 0, -1):
        size = how[i][count]
        found.append(tuple(phones[count - size : count]))
        count -= size
    return found[::-1]


def learn_table(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Table:
    """Log-probabilities of what letters say, from words that are not aligned."""
    counts: collections.Counter[tuple[int, Chunk]] = collections.Counter()
    for letters, phones in pairs:  # first as if letters were evenly spread
        share = len(phones) / len(letters)
        for i, letter in enumerate(letters):
            chunk = tuple(phones[round(i * share) : round((i + 1) * share)][:MOST])
            counts[letter, chunk] += 1
    table = _normalised(counts)
    for _ in range(ROUNDS):
        counts = collections.Counter()
        for letters, phones in pairs:
            found = align(letters, phones, table)
            counts.update(zip(letters, found or [], strict=False))
        table = _normalised(counts)
    return table


def _normalised(counts: Mapping[tuple[int, Chunk], int]) -> dict[Any, float]:
    totals: collections.Counter[int] = collections.Counter()
    for (letter, _), count in counts.items():
        totals[letter] += count
    return {key: math.log(count / totals[key[0]]) for key, count in counts.items()}


def _seen(letters: Sequence[int], contexts: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """Of each letter its contexts, the widest first."""
    widest = max(max(pair) for pair in contexts)
    padded = [0] * widest + list(letters) + [0] * widest
    for i in range(widest, widest + len(letters)):
        yield [
            (left, right, *padded[i - left : i + right + 1]) for left, right in contexts
        ]


class Rules:
    """What letters say in their context.

    Args:
      pairs: (letters, phones) of training words.
      contexts: letters to either side, the widest first; (0, 0) is the last.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        contexts: Sequence[tuple[int, int]] = CONTEXTS,
    ):
        self.contexts = contexts
        stride = max(1, len(pairs) // ALIGN_ON)
        table = learn_table(pairs[::stride])
        counts: dict[Any, collections.Counter[Chunk]] = {}
        for letters, phones in pairs:
            for chunk, keys in zip(
                align(letters, phones, table) or [],
                _seen(letters, contexts),
                strict=False,
            ):
                for key in keys:
                    counts.setdefault(key, collections.Counter())[chunk] += 1
        self.said = {key: found.most_common(1)[0][0] for key, found in counts.items()}

    def say(self, letters: Sequence[int]) -> list[int]:
        """Phones of a spelling; a letter that was never seen says nothing."""
        found: list[int] = []
        for keys in _seen(letters, self.contexts):
            found += next((self.said[key] for key in keys if key in self.said), ())
        return found


def measure(
    data: Pronunciations, contexts: Sequence[tuple[int, int]], words: int | None
) -> dict[str, Any]:
    """Error rates of `Rules` on the test part, or on some of its words."""
    pairs = [
        (spelling.tolist(), phones.tolist())
        for spelling, several in zip(
            data.train.sources, data.train.targets, strict=True
        )
        for phones in several
    ]
    rules = Rules(pairs, contexts)
    test = data.test.some(words)
    written = [rules.say(spelling.tolist()) for spelling in test.sources]
    references = [[p.tolist() for p in several] for several in test.targets]
    found = rates(written, references)
    return dict(test_per=found["per"], test_wer=found["wer"], rules=len(rules.said))


def letters(data: Pronunciations, words: int | None) -> dict[str, Any]:
    """Each letter says what it says most often."""
    return measure(data, ((0, 0),), words)


def context(data: Pronunciations, words: int | None) -> dict[str, Any]:
    """Each letter says what it says most often between the letters around it."""
    return measure(data, CONTEXTS, words)
