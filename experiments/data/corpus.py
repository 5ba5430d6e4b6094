"""Text without labels to pre-train on: a dictionary, and what of Brown is for training.

:func:`load_corpus` gives the entries of GCIDE, the Collaborative International
Dictionary of English (Debian's package ``dict-gcide``, GPL), and the training documents
of the Brown corpus, in windows of equal length.

A token is a word, as the nine ids that `experiments.data.text.Vocabulary` makes of it:
its number, endings, beginnings and shape. These are the inputs that tagging has in all
experiments here, so the encoder that was pre-trained is the one that is fine-tuned; and
a word of no vocabulary, be it of another language, is still something, which pieces of
words would be for. Words are hidden whole, as they are no pieces.

Nothing of what is held out is in it: Brown's other documents are left out, and so is
every entry or sentence with a run of `RUN` words that a validation or test part of a
fine-tuning task has (:func:`held_out`). A dictionary says the same in several entries,
so what of the training part shares such a run with the corpus's own validation and test
parts is left out as well.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gzip
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from experiments.data import byte_text, text
from experiments.data.fetch import DataError, DataSet, Files, obtain_file, seal
from experiments.data.splits import check_int, in_three, random_bits

GCIDE = Files(
    title="The Collaborative International Dictionary of English",
    name="gcide",
    folder="gcide",
    sha256={
        "gcide.dict.dz": (
            "3e6b2cdcbc1b3664c2f1466e3c8e44012e815c4c67fa83fa61f39777cd6e8517"
        )
    },
    other_folders=("dictd", "usr/share/dictd", "."),
    installed="/usr/share/dictd",
    package="dict-gcide=0.48.5+nmu2",
    package_sha256="7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
)

RUN = 13  # words in a row that pre-training and what is held out may not share
WORDS = 16_384  # of the vocabulary, at most
LEAST = 5  # how often it has each of them
BUCKETS = 1_024  # of endings and beginnings, as in tagging
BLOCK = 50  # neighbouring entries, which have to do with one another, share a part
SHARES = (0.96, 0.02, 0.02)

Words = tuple[str, ...]
_Thing = TypeVar("_Thing")


class Piece(NamedTuple):
    """An entry or a sentence.

    Attributes:
      words: as written.
      group: pieces of one group go into one part.
    """

    words: Words
    group: int


class Windows(NamedTuple):
    """Windows of equal length T, one after another, n of them.

    Attributes:
      tokens: int32 [n, T], rows of the corpus's table.
      source: int32 [n], index into the corpus's sources.
    """

    tokens: np.ndarray
    source: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus(DataSet):
    """Running text in three parts.

    Attributes:
      vocabulary: of the training part.
      table: int32 [types, K], the ids of each type: a word as written, by whether it
        begins a sentence.
      types: the words of the types.
      sources: names.
      train, validation, test: the parts.
      left_out: how many pieces were left out, as they have a run of what is held out.
      repeated: how many more of the training part were, as they have a run of the
        corpus's own validation or test part.
    """

    vocabulary: text.Vocabulary
    table: np.ndarray
    types: tuple[str, ...]
    sources: tuple[str, ...]
    train: Windows
    validation: Windows
    test: Windows
    left_out: int
    repeated: int

    @property
    def length(self) -> int:
        """T, words of a window."""
        return self.train.tokens.shape[1]

    @property
    def inputs(self) -> tuple[int, ...]:
        """Rows of the tables of ids, with one more word, the mask."""
        first, *others = self.vocabulary.feature_sizes
        return (first + 1, *others)

    @property
    def mask(self) -> np.ndarray:
        """The ids of the mask, int32 [K]: a word of its own, and nothing besides."""
        found = np.zeros(self.table.shape[1], np.int32)
        found[0] = len(self.vocabulary)
        return found

    @functools.cached_property
    def words(self) -> np.ndarray:
        """The ids of every word of the vocabulary in lower case, int32 [V − 2, K]."""
        # Behind another word: the first begins a sentence.
        return self.vocabulary.token_features(("a", *self.vocabulary.words))[1:]

    def ids(self, windows: np.ndarray) -> np.ndarray:
        """Ids int32 [..., T, K] of windows [..., T]."""
        return self.table[windows]

    def contents(self) -> str:
        """How many words of which sources, in which parts."""
        parts = (self.train, self.validation, self.test)
        counts = " + ".join(f"{part.tokens.size:,}" for part in parts)
        return (
            f"{counts} words of {' and '.join(self.sources)} in windows of "
            f"{self.length}, a vocabulary of {len(self.vocabulary) - 2:,}, "
            f"{self.left_out:,} pieces left out for a run of {RUN} words that is held "
            f"out, and {self.repeated:,} of training for one of its own held-out parts"
        )


# --- Sources -----------------------------------------------------------------------


def load_gcide(cache_dir: str | os.PathLike[str] | None = None) -> Dictionary:
    """Load the entries of the dictionary, in the order of the file.

    `cache_dir` and DataError are those of :func:`experiments.data.fetch.obtain`.

    Source: the GNU Collaborative International Dictionary of English 0.48, from
    Webster's Revised Unabridged Dictionary, 1913, and WordNet; GPL.
    """
    path, source = obtain_file(GCIDE, cache_dir)
    try:
        content = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file ({error})") from error
    found = entries(content)
    return Dictionary("gcide", source, seal(*found), tuple(found))


@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary(DataSet):
    """The texts of a dictionary's entries."""

    texts: tuple[str, ...]

    def contents(self) -> str:
        """How many entries and characters."""
        return f"{len(self.texts):,} entries, {sum(map(len, self.texts)):,} characters"


def entries(content: str) -> list[str]:
    r"""Texts of a dictionary's entries, without what only printing needs.

    An entry begins at the margin, with its word and how it is said; what stands before
    the first is left out, and so are pronunciations, where an entry is from, and braces
    of references.

    >>> entries("About\n\nFeel \\Feel\\, n.\n   {Feeling}. [R.]\n   [1913 Webster]\n")
    ['Feel , n. Feeling. [R.]']
    """
    found = re.split(r"\n(?=\S[^\n\\]*\\)", content)[1:]
    texts = []
    for entry in found:
        entry = re.sub(r"\\[^\\]{0,200}\\", "", entry)
        entry = re.sub(r"\[[^\]]*(Webster|WordNet|PJC|Century)[^\]]*\]", "", entry)
        entry = re.sub(r"\[(ae|oe|AE|OE)\]", r"\1", entry)
        texts.append(" ".join(re.sub(r"[{}]", "", entry).split()))
    return [entry for entry in texts if entry]


def _sentences(words: Words) -> list[Words]:
    """Cut behind every full stop, question and exclamation mark."""
    ends = [i + 1 for i, word in enumerate(words) if word in (".", "?", "!")]
    edges = [0, *ends, len(words)]
    return [words[a:b] for a, b in itertools.pairwise(edges) if b > a]


def brown_pieces(corpus: text.Text) -> tuple[list[Piece], list[Words]]:
    """Sentences of the training documents of tagging, and those that are held out."""
    train, *others = text.split_by_document(corpus, seed=0)
    pieces = [Piece(corpus.words[i], int(corpus.document[i])) for i in train]
    return pieces, [corpus.words[i] for part in others for i in part]


def held_out(documents: byte_text.Documents) -> list[Words]:
    """Words of the texts that are not for training."""
    parts = byte_text.parts_of(documents)[1:]
    return [
        text.words_of(documents.texts[i].decode("utf-8", "replace"))
        for part in parts
        for i in part.tolist()
    ]


# --- What may not be shared --------------------------------------------------------


class Runs:
    """The runs of words, in any case, that some texts have.

    Args:
      texts: each a sequence of words.
      length: words of a run.

    >>> runs = Runs([("a", "b", "c", "d")], 3)
    >>> runs.shared([("x", "B", "C", "D"), ("a", "b", "d"), ("a",)]).tolist()
    [True, False, False]
    """

    def __init__(self, texts: Sequence[Sequence[str]], length: int = RUN):
        check_int("length", length, 1)
        self.length = length
        self._found = np.unique(self._runs(texts)[0])

    def _runs(self, texts: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of 64 bits of all runs, and the text that each is of."""
        sizes = [len(words) for words in texts]
        words = map(_number, itertools.chain.from_iterable(texts))
        numbers = np.fromiter(words, np.uint64, sum(sizes))
        owner = np.repeat(np.arange(len(texts)), sizes)
        count = max(0, len(numbers) - self.length + 1)
        found = np.zeros(count, np.uint64)
        for start in range(self.length):  # modulo 2^64
            found = found * np.uint64(0x9E3779B97F4A7C15)
            found += numbers[start : start + count]
        within = owner[:count] == owner[self.length - 1 :]
        return found[within], owner[:count][within]

    def shared(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """Which of some texts have one of them, bool [n]."""
        runs, owner = self._runs(texts)
        found = np.zeros(len(texts), bool)
        found[owner[np.isin(runs, self._found)]] = True
        return found


@functools.lru_cache(maxsize=1 << 20)
def _number(word: str) -> int:
    """A number of a word in lower case."""
    return zlib.crc32(word.lower().encode())


# --- The corpus --------------------------------------------------------------------


def build(
    name: str,
    source: str,
    sources: dict[str, Sequence[Piece]],
    held: Sequence[Sequence[str]],
    *,
    length: int,
    run: int = RUN,
    shares: tuple[float, float, float] = SHARES,
    minimum_count: int = LEAST,
    buckets: int = BUCKETS,
) -> Corpus:
    """Cuts pieces into windows of three parts.

    Args:
      name: of the corpus.
      source: where it comes from.
      sources: pieces, in their order, by the name of where they are from.
      held: texts that are held out: a piece that shares a run with them is left out.
      length: T; a window holds pieces of one source and part, one after another.
      run: words of such a run.
      shares: of the groups of each source, in training, validation and test; then a
        piece of training that shares a run with the other two is left out.
      minimum_count: how often the training part has every word of the vocabulary.
      buckets: of the vocabulary's hash tables.

    Raises:
      ValueError: ``length`` is below 2, or there is too little for a part.

    >>> toy_corpus(8).table.shape[1]
    9
    """
    check_int("length", length, 2)
    runs = Runs(held, run)
    kept: dict[str, list[Piece]] = {}
    for name_of, pieces in sources.items():
        shared = runs.shared([piece.words for piece in pieces])
        kept[name_of] = _without(pieces, shared)
    left_out = sum(map(len, sources.values())) - sum(map(len, kept.values()))
    parts: list[list[list[Words]]] = [[], [], []]  # part -> source -> pieces
    for at, pieces in enumerate(kept.values()):
        _, members = np.unique([p.group for p in pieces], return_inverse=True)
        keys = random_bits(at, 40).random_raw(int(members.max()) + 1)
        for part, rows in zip(parts, in_three(keys, shares, members), strict=True):
            part.append([pieces[i].words for i in rows.tolist()])
    own = Runs([words for part in parts[1:] for some in part for words in some], run)
    found = [_without(some, own.shared(some)) for some in parts[0]]
    repeated = sum(map(len, parts[0])) - sum(map(len, found))
    parts[0] = found
    vocabulary = text.Vocabulary(
        itertools.chain.from_iterable(parts[0]),
        minimum_count=minimum_count,
        buckets=buckets,
        most=WORDS,
    )
    numbers: collections.defaultdict[tuple[str, bool], int] = collections.defaultdict()
    numbers.default_factory = numbers.__len__
    windows = [
        _windows([_tokens(pieces, numbers) for pieces in part], length)
        for part in parts
    ]
    words, begins = zip(*numbers, strict=True)
    # Behind another word; of those that begin a sentence, the shape tells it.
    table = vocabulary.token_features(("a", *words))[1:]
    shape = vocabulary.token_features(("a", "a"))
    table += np.array(begins)[:, None] * (shape[0] - shape[1])
    digest = seal(table, *(x for part in windows for x in part), *vocabulary.words)
    return Corpus(
        name=name,
        source=source,
        sha256=digest,
        vocabulary=vocabulary,
        table=table,
        types=words,
        sources=tuple(sources),
        train=windows[0],
        validation=windows[1],
        test=windows[2],
        left_out=left_out,
        repeated=repeated,
    )


def _without(things: Sequence[_Thing], bad: np.ndarray) -> list[_Thing]:
    return [x for x, is_bad in zip(things, bad.tolist(), strict=True) if not is_bad]


def _tokens(
    pieces: Iterable[Words], numbers: dict[tuple[str, bool], int]
) -> np.ndarray:
    """Types of the words of pieces, one after another; new ones get a number."""
    found: list[int] = []
    for words in pieces:
        for sentence in _sentences(words):
            found.append(numbers[sentence[0], True])
            found += [numbers[word, False] for word in sentence[1:]]
    return np.array(found, np.int32)


def _windows(streams: Sequence[np.ndarray], length: int) -> Windows:
    """What each stream holds of whole windows."""
    cut = [x[: len(x) // length * length].reshape(-1, length) for x in streams]
    found = np.concatenate(cut)
    if not len(found):
        raise ValueError(
            f"length must leave a window in each part, got {length} with streams of "
            f"{[len(x) for x in streams]} words."
        )
    source = np.repeat(np.arange(len(cut)), [len(x) for x in cut])
    return Windows(found, source.astype(np.int32))


@functools.cache
def load_corpus(length: int) -> Corpus:
    """GCIDE and Brown's training documents, less what fine-tuning holds out.

    Args:
      length: T, words of a window.

    Raises:
      DataError: see :func:`experiments.data.fetch.obtain`.
    """
    dictionary, brown = load_gcide(), text.load_brown()
    pieces, held = brown_pieces(brown)
    loads: tuple[Callable[[], byte_text.Documents], ...] = (
        byte_text.load_spam,
        byte_text.load_paragraphs,
    )
    for load in loads:
        held += held_out(load())
    texts = enumerate(map(text.words_of, dictionary.texts))
    found = [Piece(words, i // BLOCK) for i, words in texts]
    return build(
        "gcide_brown",
        f"{dictionary.source}; {brown.source}",
        {"gcide": found, "brown": pieces},
        held,
        length=length,
    )


@functools.cache
def toy_corpus(length: int = 16) -> Corpus:
    """SYNTHETIC sentences, for tests and smoke runs only: half of them one source."""
    pieces = [
        brown_pieces(text.toy_text(400, seed=seed))[0]
        for seed in (1, 0)  # 0 is what the toy tagging task has
    ]
    return build(
        "toy_corpus (SYNTHETIC)",
        "generated: no data, for tests only",
        {"first": pieces[0], "second": pieces[1]},
        (),
        length=length,
        shares=(0.6, 0.2, 0.2),
        minimum_count=1,
        buckets=64,
    )
