"""What needs no network: counts of words and neighbours, and of words by class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from experiments.data import sequence_tasks
from experiments.data.corpus import Corpus
from experiments.data.sequences import Part, SequenceData
from experiments.pretraining.cells import KNOWN, held_hidden, told
from experiments.tasks.labelling import scores, subset

SMOOTHING = (0.01, 0.1, 1.0)  # of naive Bayes; the validation part chooses

# ---------------------------------------------------------------- hidden words


class Counts:
    """How often the training part has words, beside which neighbours.

    A word that the vocabulary has not is a neighbour as any other, but no answer.

    Args:
      corpus: the text.
    """

    def __init__(self, corpus: Corpus):
        self.size = size = len(corpus.vocabulary)
        ids = corpus.table[corpus.train.tokens][..., 0].astype(np.int64)
        known = ids >= KNOWN
        single = np.bincount(ids[known], minlength=size) + 1.0
        single[:KNOWN] = 0.0
        self.single = single / single.sum()

        def beside(neighbour: np.ndarray, word: np.ndarray) -> sparse.csr_array:
            some = word >= KNOWN
            pair = (neighbour[some], word[some])
            found = sparse.coo_array((np.ones(some.sum()), pair), shape=(size, size))
            return found.tocsr()

        self.after = beside(ids[:, :-1].ravel(), ids[:, 1:].ravel())
        self.before = beside(ids[:, 1:].ravel(), ids[:, :-1].ravel())
        # Words by the pair of their neighbours, in order of that.
        pairs = (ids[:, :-2] * size + ids[:, 2:])[known[:, 1:-1]]
        order = np.argsort(pairs, kind="stable")
        self.pairs, self.between = pairs[order], ids[:, 1:-1][known[:, 1:-1]][order]

    def given(self, previous: int | None, following: int | None) -> np.ndarray:
        """Chances [V] of a word between two, of which one or both may be unknown.

        Witten and Bell's back-off: what stood between both neighbours, behind it what
        either alone says, P(w | l) P(w | r) / P(w), and behind each P(w).
        """
        left = self._beside(self.after, previous)
        right = self._beside(self.before, following)
        if previous is None or following is None:
            return right if previous is None else left
        chances, some = np.zeros(self.size), self.single > 0
        chances[some] = left[some] * right[some] / self.single[some]
        chances /= chances.sum()
        key = previous * self.size + following
        first, last = np.searchsorted(self.pairs, [key, key + 1])
        seen, often = np.unique(self.between[first:last], return_counts=True)
        chances *= max(len(seen), 1)
        chances[seen] += often
        return chances / chances.sum()

    def _beside(self, counts: sparse.csr_array, neighbour: int | None) -> np.ndarray:
        if neighbour is None:
            return self.single
        row = slice(counts.indptr[neighbour], counts.indptr[neighbour + 1])
        seen, often = counts.indices[row], counts.data[row]
        found = len(seen) * self.single
        found[seen] += often
        return found / found.sum() if len(seen) else self.single


def restored(
    corpus: Corpus, share: float, chances: Callable[[int | None, int | None], Any]
) -> dict[str, float]:
    """Loss, perplexity and accuracy of hidden words of the test part.

    They are those that networks restore, and a hidden neighbour is not seen either.

    Args:
      corpus: the text.
      share: of the words that is hidden.
      chances: gives those of each word from the numbers of the neighbours.
    """
    hidden = held_hidden(corpus, corpus.test, share)
    ids = corpus.table[corpus.test.tokens][..., 0]
    rows = np.zeros((len(ids), 3))
    for at, (window, where, asked) in enumerate(
        zip(ids, hidden.where, hidden.asked, strict=True)
    ):
        places = where[asked]
        seen: dict[int, int] = dict(enumerate(window.tolist()))
        for place in places.tolist():
            del seen[place]
        for place in places.tolist():
            found = chances(seen.get(place - 1), seen.get(place + 1))
            word = int(window[place])
            rows[at] += -np.log(found[word]), found.argmax() == word, 1
    return told("test", corpus, corpus.test, rows)


def unigram(corpus: Corpus, share: float) -> dict[str, float]:
    """Every hidden word has the chance that it has anywhere."""
    counts = Counts(corpus)
    return restored(corpus, share, lambda previous, following: counts.single)


def neighbours(corpus: Corpus, share: float) -> dict[str, float]:
    """Of a hidden word it knows the previous and the next one: `Counts.given`."""
    return restored(corpus, share, Counts(corpus).given)


def of_corpus(corpus: Corpus, share: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """What restores hidden words without a network, by name."""
    return {
        "unigram": functools.partial(unigram, corpus, share),
        "neighbours": functools.partial(neighbours, corpus, share),
    }


# ------------------------------------------------------------- words and texts


def _one(data: SequenceData, part: Part) -> Part:
    """One label a text, where that is what is asked."""
    return part.cut(1) if data.one_label else part


def _tested(data: SequenceData, predicted: list[np.ndarray]) -> dict[str, float]:
    found = scores(_one(data, data.test), predicted)
    return {f"test_{name}": value for name, value in found.items()}


def majority(data: SequenceData, n: int, seed: int) -> dict[str, Any]:
    """Every label is the most frequent one of the subset."""
    part = _one(data, data.train.take(subset(len(data.train), n, seed)))
    best = int(np.bincount(np.concatenate(list(part.labels))).argmax())
    test = _one(data, data.test).labels
    return _tested(data, [np.full_like(y, best) for y in test])


def most_frequent_tag(data: SequenceData, n: int, seed: int) -> dict[str, Any]:
    """Each word has its most frequent tag in the subset; unknown ones go by endings."""
    rows = subset(len(data.train), n, seed)
    return sequence_tasks.most_frequent(data, by_suffix=True, rows=rows)


def naive_bayes(data: SequenceData, n: int, seed: int) -> dict[str, Any]:
    """The likeliest class of a text whose ids were drawn one by one, each by itself.

    It is linear in how often a text has each id: word, endings, beginnings, shape.
    """
    part = data.train.take(subset(len(data.train), n, seed))
    assert not isinstance(data.inputs, int)
    tables = len(data.inputs)
    x, x_val, x_test = (
        _bag(p, data.inputs) for p in (part, data.validation, data.test)
    )
    y, y_val = (
        np.array([int(y[0]) for y in p.labels]) for p in (part, data.validation)
    )
    classes = len(data.class_names)
    share = np.bincount(y, minlength=classes)
    counts = np.stack([np.asarray(x[y == c].sum(axis=0)) for c in range(classes)])
    starts = np.cumsum((0, *data.inputs))

    def fit(smoothing: float) -> tuple[np.ndarray, np.ndarray]:
        weights = np.log(counts + smoothing)
        for a, b in zip(starts[:-1], starts[1:], strict=True):
            weights[:, a:b] -= np.logaddexp.reduce(weights[:, a:b], axis=1)[:, None]
        # A text has K ids a word, which tell the same K times.
        return weights.T / tables, np.log(share + smoothing)

    fits = [fit(smoothing) for smoothing in SMOOTHING]
    right = [(((x_val @ w) + b).argmax(axis=1) == y_val).mean() for w, b in fits]
    weights, prior = fits[int(np.argmax(right))]
    guess = (x_test @ weights + prior).argmax(axis=1)
    return _tested(data, [np.array([c]) for c in guess])


def _bag(part: Part, sizes: tuple[int, ...]) -> sparse.csr_array:
    """How often each text has each id of each table, [n, Σ sizes]."""
    starts = np.cumsum((0, *sizes[:-1]))
    rows = np.repeat(np.arange(len(part)), part.lengths * len(sizes))
    columns = (np.concatenate(list(part.inputs)) + starts).ravel()
    shape = (len(part), int(sum(sizes)))
    return sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=shape).tocsr()


def of_task(data: SequenceData) -> dict[str, Callable[..., dict[str, Any]]]:
    """What labels without a network, ``(data, n, seed)``, by name."""
    if data.one_label:
        return dict(majority=majority, naive_bayes=naive_bayes)
    return dict(majority=majority, most_frequent_tag_by_suffix=most_frequent_tag)
