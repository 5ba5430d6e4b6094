"""Verses: whole chapters in a part, tokens of training alone, scores of text."""

from __future__ import annotations

import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from experiments.core import optim
from experiments.core.store import config_hash
from experiments.data import byte_pairs, byte_text, verses
from experiments.data.fetch import DataError, seal
from experiments.seq2seq import cells, experiment, translation
from experiments.seq2seq.report import REPORT
from experiments.seq2seq.tasks import TASKS, floors

# ------------------------------------------------------------------------ data


def _documents(count=40, chapters=20, changed=""):
    texts = [f"verse {i} of {i % chapters} kings".encode() for i in range(count)]
    said = [
        f"verso {i} de {i % chapters} reyes{changed}".encode() for i in range(count)
    ]
    pages = np.arange(count, dtype=np.int32) % chapters
    return byte_text.Documents(
        "made up", "here", seal(*texts, *said), tuple(texts),
        np.zeros(count, np.int32), pages, ("verse",), tuple(said),
    )  # fmt: skip


def test_a_chapter_is_in_one_part_only_and_every_verse_in_one():
    documents = _documents()
    parts = verses.by_chapter(documents)
    assert sorted(np.concatenate(parts)) == list(range(40))
    chapters = [set(documents.pages[part]) for part in parts]
    assert [len(x) for x in chapters] == [16, 2, 2]
    for one, two in itertools.combinations(chapters, 2):
        assert not one & two
    data = verses.in_parts(documents, 60)
    for part, there in zip(
        (data.train, data.validation, data.test), chapters, strict=True
    ):
        assert {int(text.split()[3]) for text in part.texts} == there
    again = verses.by_chapter(_documents(changed="!"))
    assert all(map(np.array_equal, parts, again))


def test_byte_pairs_are_of_the_training_part_alone_and_in_the_digest():
    data = verses.in_parts(_documents(), 60)
    alone = byte_pairs.train([*data.train.texts, *data.train.answers], 60)
    assert data.pieces.pieces == alone.pieces
    same = verses.in_parts(_documents(), 60)
    assert same.sha256 == data.sha256
    assert verses.in_parts(_documents(), 59).sha256 != data.sha256
    assert verses.in_parts(_documents(), 60, seed=1).sha256 != data.sha256
    assert data.describe().startswith("verses: 32 train + 4 validation + 4 test verses")


def test_what_is_encoded_is_said_again():
    data = verses.toy_verses()
    for part in (data.train, data.test):
        for answer, (target,) in zip(part.answers, part.targets, strict=True):
            assert data.said(target) == answer
    source, target = data.test.sources[0], data.test.targets[0][0]
    one, two = data.symbols(source, target)
    assert "".join(one).replace("▁", " ").strip() == data.test.texts[0]
    assert len(two) == len(target)
    assert pickle.loads(pickle.dumps(data)).said(target) == data.test.answers[0]


@pytest.mark.slow
def test_the_verses_of_the_two_bibles_share_no_chapter():
    try:
        documents = byte_text.load_verses()
    except DataError as error:
        pytest.skip(f"the verses cannot be had: {str(error).splitlines()[0]}")
    data = verses.in_parts(documents, 300)
    sizes = [len(part) for part in (data.train, data.validation, data.test)]
    assert sum(sizes) == len(documents.texts) == 30_990
    assert 24_000 < sizes[0] < 26_000
    rows = verses.by_chapter(documents)
    chapters = [set(documents.pages[part]) for part in rows]
    assert sum(map(len, chapters)) == len(set.union(*chapters)) == 1_189
    for part in (data.train, data.test):
        assert data.said(part.targets[0][0]) == part.answers[0]


# ---------------------------------------------------------------------- scores


def test_scores_are_of_the_corpus_and_say_how():
    right = ["El rey viejo ve el mar rojo.", "La casa es grande y nueva."]
    same = translation.quality(right, right)
    assert same["bleu"] == pytest.approx(100) and same["chrf"] == pytest.approx(100)
    assert "tok:13a" in same["bleu_signature"] and "nc:6" in same["chrf_signature"]
    none = translation.quality(["", ""], right)
    assert none["bleu"] == 0 and none["chrf"] == pytest.approx(0, abs=1e-6)
    half = translation.quality([right[0], "otra cosa"], right)
    assert 0 < half["bleu"] < 100
    with pytest.raises(ValueError, match="written must be one text for each"):
        translation.quality(right, right[:1])


def test_floors_are_the_source_and_the_nearest_training_verse(monkeypatch):
    data = verses.toy_verses()
    found = {k: f() for k, f in floors("toy_verses", data, None).items()}
    assert list(found) == ["copy", "nearest"]
    assert found["copy"]["test_chrf"] < found["nearest"]["test_chrf"] < 100
    assert found["copy"]["test_bleu"] < found["nearest"]["test_bleu"] < 100
    asked = []
    with monkeypatch.context() as patch:
        near = lambda texts, known: asked.append((texts, known)) or [0] * len(texts)  # noqa: E731
        patch.setattr(translation, "most_similar", near)
        translation.nearest(data, 5)
    # Sources alone are compared: answers of the test part are not seen.
    assert asked == [(data.test.some(5).texts, data.train.texts)]
    known = ["the king saw the sea", "a lamp", "the sea saw the king"]
    assert translation.most_similar(["the sea saw a king"], known) == [2]


# ----------------------------------------------------------------------- cells


def test_both_languages_have_one_table_and_a_row_may_have_fewer_pairs():
    data = verses.toy_verses()
    config = dataclasses.replace(experiment.PRESETS["smoke_verses"], key_dim=None)
    (study, few) = experiment.studies_of(config)
    assert few.final(0)[0].pairs == 20 and few.updates == 2
    cell = study.final(0)[0]
    task = cells.PairTask(data)
    shape = task.shape(cell)
    assert shape.shared and shape.num_source == shape.num_target == 100
    params = task.program(cell).initial_params(0)
    assert "embed" not in params  # one table for both languages
    state = optim.init_state(params, task.hyper(cell))
    assert len(state.mean) > 0
    some = data.test.take([0, 5])
    written = [y[0].tolist() for y in some.targets]
    found = TASKS["toy_verses"].measure(data, some, written)
    assert found["bleu"] == pytest.approx(100)


def test_a_score_of_a_cell_is_of_text(monkeypatch):
    data = verses.toy_verses()
    task = cells.PairTask(data)
    cell = experiment.studies_of(experiment.PRESETS["smoke_verses"])[0].final(0)[0]
    right = {
        t: y[0].tolist()
        for t, y in zip(data.test.texts, data.test.targets, strict=True)
    }

    def write(self, cell, params, sources, beams):
        return [right[t] if beams > 1 else right[t][:-1] for t in sources.texts]

    monkeypatch.setattr(cells.PairTask, "write", write)
    monkeypatch.setattr(cells.PairTask, "_alignments", lambda *a: dict(alignments=[]))
    found = task._written(cell, {}, data.test.some(6))
    assert found["test_bleu"] == pytest.approx(100)
    assert found["test_bleu_greedy"] < 100
    assert found["test_bleu_longer"] == pytest.approx(100)
    assert found["test_bleu_signature"].startswith("nrefs:1")
    assert found["written"] == 6 and 0 < found["written_longer"] < 6
    assert all(one == other for _, one, other in found["examples"])
    assert all(a == b for _, a, b, _ in found["lengths"])


# ---------------------------------------------------------------------- report


def test_the_report_of_verses_tells_more_is_better(tmp_path):
    config = dataclasses.replace(
        experiment.PRESETS["verses"], ns=(1_000,), seeds=2, learning_rates=(1e-3,)
    )
    records = []

    def add(config, **metrics):
        records.append(
            dict(hash=config_hash(config), config=config, status="done",
                 metrics=metrics, curves={"step": []}, provenance={})
        )  # fmt: skip

    for name, bleu in (("copy", 1.0), ("nearest", 12.0)):
        made = dict(task="verses", model=name, phase="baseline", seed=0)
        add(made, test_bleu=bleu, test_chrf=2 * bleu)
    for study in experiment.studies_of(config):
        for cell in study.final(0):
            bleu = 20.0 if cell.model == "transformer" else 10.0
            bleu -= 15.0 * (cell.pairs is not None)
            add(
                cell.config(),
                test_bleu=bleu + cell.seed,
                test_bleu_signature="nrefs:1|tok:13a",
                test_chrf=40.0,
                n=cell.pairs or 24_000,
                params=1,
                flops=1,
                written=10,
                train_loss=1.0,
                test_loss=2.0,
                lengths=[[30, 30, 27, 4]],
                examples=[["In the beginning", "En | el", "En el principio"]],
            )
    REPORT.write(records, tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert text.startswith("# Verses, English to Spanish")
    assert "| Transformer | 20.50 ± .71 (2 seeds) |" in text
    assert "Behind what needs no network: LSTM with attention." in text
    assert "| translation of the most similar training verse | 12.00 | 24.00 |" in text
    assert "sacreBLEU's signatures: BLEU: `nrefs:1|tok:13a`." in text
    assert "BLEU of Transformer − LSTM with attention: +10.00" in text
    assert "| 1,000 | 2,041 | 5.50" in text and "| 24,000 | 10,000 | 20.50" in text
    assert "| In the beginning | En el principio | En \\| el |" in text
    assert "| Transformer | .000 | 1.000 | .900 |" in text
    assert (tmp_path / "pairs.png").stat().st_size > 5_000
