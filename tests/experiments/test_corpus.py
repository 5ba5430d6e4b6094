"""Text to pre-train on: what is in it, and that nothing held out is."""

from __future__ import annotations

import dataclasses
import gzip

import numpy as np
import pytest

from experiments.data import byte_text, corpus, text
from experiments.data.corpus import Piece, Runs, build, toy_corpus
from experiments.data.fetch import DataError
from experiments.data.sequence_tasks import classifying, tagging

FILE = r"""00-database-info
   about

Feel \Feel\, n. [See {Fere}, n.]
   1. A sensation; antenn[ae]. [Obs.]
      [1913 Webster]

   {To feel of}, to examine. See
   {Feel}.
      [WordNet 1.5 +PJC]

Feelingly \Feel"ing*ly\,
adv.
   In a feeling manner.
   [1913 Webster]
"""


def test_entries_are_text_alone(tmp_path, monkeypatch):
    path = tmp_path / "gcide.dict.dz"
    path.write_bytes(gzip.compress(FILE.encode()))
    monkeypatch.setattr(corpus, "obtain_file", lambda *_: (path, "here"))
    assert corpus.load_gcide().texts == (
        "Feel , n. [See Fere, n.] 1. A sensation; antennae. [Obs.] To feel of, to "
        "examine. See Feel.",
        "Feelingly , adv. In a feeling manner.",
    )
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="no whole gzip file"):
        corpus.load_gcide()


def test_a_run_is_shared_in_any_case_and_place_but_not_in_part():
    held = Runs([tuple("abcdefgh"), ("x",) * 4], 5)
    texts = [tuple("qqBCDEFqq"), tuple("abcdqefgh"), (), tuple("abcd"), tuple("efgh")]
    texts += [("x",) * 9]  # of four there is no run of five
    assert held.shared(texts).tolist() == [True] + [False] * 5


def pieces(count, seed=0):
    """Sentences of random words, each a group of its own."""
    rng = np.random.default_rng(seed)
    return [
        Piece((*(f"w{i}" for i in rng.integers(0, 30, 8)), "."), at)
        for at in range(count)
    ]


def made(found, held=(), **more):
    return build(
        "name",
        "here",
        found,
        held,
        length=4,
        run=5,
        minimum_count=1,
        shares=(0.5, 0.25, 0.25),
        **more,
    )


def said(data, part):
    return [[data.types[t] for t in row] for row in part.tokens]


def test_windows_are_of_one_source_and_parts_share_no_group():
    one, two = pieces(20), [Piece(("Own", *p.words), p.group) for p in pieces(20, 1)]
    data = made({"one": one, "two": two})
    parts = [data.train, data.validation, data.test]
    assert [len(x.tokens) for x in parts] == [22 + 25, 11 + 12, 11 + 12]
    whole = [{tuple(p.words) for p in found} for found in (one, two)]
    assert not whole[0] & whole[1]
    for part in parts:
        rows = said(data, part)
        assert {"Own" in row for row in rows} == {True, False}
        assert all(part.source[i] == 1 for i, row in enumerate(rows) if "Own" in row)
    texts = [" ".join(w for row in said(data, part) for w in row) for part in parts]
    for piece in one[:20]:
        assert sum(" ".join(piece.words[1:5]) in x for x in texts) <= 1


def test_ids_are_those_of_tagging():
    data = toy_corpus(16)
    window = data.train.tokens[:1]
    words = [data.types[t] for t in window[0]]
    start = words.index(".") + 1
    end = start + words[start:].index(".") + 1
    np.testing.assert_array_equal(
        data.ids(window)[0, start:end],
        data.vocabulary.token_features(words[start:end]),
    )
    assert data.inputs[1:] == data.vocabulary.feature_sizes[1:]
    assert data.mask[0] == data.inputs[0] - 1 == len(data.vocabulary)
    assert data.words[:, 0].tolist() == list(range(2, len(data.vocabulary)))
    again = data.vocabulary.token_features(("a", data.vocabulary.words[3]))[1]
    np.testing.assert_array_equal(data.words[3], again)


def test_the_vocabulary_is_of_training_alone():
    found = [Piece((f"own{p.group}", *p.words), p.group) for p in pieces(20)]
    data = made({"one": found})
    parts = (data.train, data.validation, data.test)
    own, *held = (
        {w for row in said(data, part) for w in row if w.startswith("own")}
        for part in parts
    )
    known = set(data.vocabulary.words)
    assert len(own) == 10 and own <= known
    assert [len(words) for words in held] == [5, 5]
    assert not known & set.union(*held)


def test_what_of_training_is_held_out_elsewhere_is_left_out():
    once = pieces(20)
    found = once + [Piece(("So", *p.words), p.group + 20) for p in once]
    data = made({"one": found})
    assert 5 <= data.repeated < 20 and data.left_out == 0
    train, *held = (
        " ".join(w for row in said(data, part) for w in row)
        for part in (data.train, data.validation, data.test)
    )
    runs = [" ".join(p.words[:5]) for p in once]
    assert any(run in train for run in runs)
    assert any(run in text for run in runs for text in held)
    assert not any(run in train and run in text for run in runs for text in held)
    assert made({"one": once}).repeated == 0


def test_what_shares_a_run_with_what_is_held_out_is_left_out():
    found = pieces(20)
    held = [("new", *found[3].words[1:6], "other")]
    data = made({"one": found}, held)
    assert data.left_out == 1 and data.sha256 != made({"one": found}).sha256
    for part in (data.train, data.validation, data.test):
        for source in set(part.source.tolist()):
            stream = [w for row in said(data, part) for w in row]
            assert source == 0 and not Runs(held, 5).shared([stream]).any()


def stand_in(monkeypatch):
    """Small texts for all that the corpus and fine-tuning load."""
    brown = text.toy_text(400, seed=0)
    names = tuple(f"d{i}" for i in range(200))
    brown = dataclasses.replace(
        brown,
        document=np.arange(400) // 2,
        documents=names,
        genres=("a",) * 200,
    )
    documents = {}
    for name, seed in (("load_spam", 1), ("load_paragraphs", 2)):
        rng = np.random.default_rng(seed)
        texts = [" ".join(f"v{i}" for i in rng.integers(0, 99, 20)) for _ in range(60)]
        documents[name] = byte_text._documents(
            name, "here", [(x.encode(), i % 2, i) for i, x in enumerate(texts)], "ab"
        )
        monkeypatch.setattr(byte_text, name, lambda found=documents[name]: found)
    quoted = byte_text.parts_of(documents["load_spam"])[2][0]
    texts = [f"an entry of the word number {i} and {i}" for i in range(3_000)]
    texts[5] += " " + documents["load_spam"].texts[quoted].decode()
    dictionary = corpus.Dictionary("gcide", "here", "0", tuple(texts))
    monkeypatch.setattr(text, "load_brown", lambda: brown)
    monkeypatch.setattr(corpus, "load_gcide", lambda: dictionary)
    return brown, documents


def check_all(data, brown, documents):
    """Asserts that no run of `RUN` words that fine-tuning holds out is trained on."""
    lengths = (16, 32, 64, 128)
    tasks = [
        tagging("pos", brown, fine=False, vocabulary=data.vocabulary, lengths=lengths)
    ]
    tasks += [classifying(n, d, data.vocabulary, lengths) for n, d in documents.items()]
    # By ids alone, which are what models read: words of the same ids have one number.
    number = {row.tobytes(): i for i, row in enumerate(data.table)}
    held = [
        [str(number.get(row.tobytes(), -1)) for row in ids]
        for task in tasks
        for part in (task.validation, task.test)
        for ids in part.inputs
    ]
    own = np.array([number[row.tobytes()] for row in data.table])
    stream = list(map(str, own[data.train.tokens].ravel().tolist()))
    assert sum(len(ids) >= corpus.RUN for ids in held) > 10
    assert not Runs(held, corpus.RUN).shared([stream]).any()
    some = next(ids for ids in held if len(ids) >= corpus.RUN)
    assert Runs(held, corpus.RUN).shared([some]).all()


def test_no_text_that_is_held_out_is_in_the_corpus(monkeypatch):
    brown, documents = stand_in(monkeypatch)
    data = corpus.load_corpus.__wrapped__(16)
    assert data.left_out >= 1 and data.sources == ("gcide", "brown")
    assert "left out for a run of 13 words that is held out, and" in data.contents()
    check_all(data, brown, documents)


@pytest.mark.slow
def test_no_text_that_is_held_out_is_in_the_corpus_as_it_is():
    try:
        data = corpus.load_corpus(128)
        documents = {
            "spam": byte_text.load_spam(),
            "language": byte_text.load_paragraphs(),
        }
        brown = text.load_brown()
    except DataError as error:
        pytest.skip(str(error))
    check_all(data, brown, documents)


def test_classifying_reads_first_words_and_has_one_label():
    documents = byte_text.toy_documents(40)
    data = classifying("toy", documents, text.Vocabulary([("a",)]), (4, 8))
    texts = {x.decode() for x in documents.texts}
    assert data.one_label and texts
    parts = byte_text.parts_of(documents)
    for part, rows in zip((data.train, data.validation, data.test), parts, strict=True):
        assert [int(y[0]) for y in part.labels] == documents.labels[rows].tolist()
        assert all((y == y[0]).all() for y in part.labels)
    cut = dataclasses.replace(documents, texts=(b"a b c d e f g h i j",) * 40)
    found = classifying("toy", cut, text.Vocabulary([("a",)]), (4, 8), (5, 2, 2))
    assert len(found.train) == 5 and found.train.lengths.tolist() == [8] * 5


def test_too_little_text_is_told():
    with pytest.raises(ValueError, match="leave a window in each part"):
        build(
            "name", "here", {"one": pieces(4)}, (), length=400, shares=(0.5, 0.25, 0.25)
        )
