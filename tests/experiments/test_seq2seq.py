"""Spelling to phones: words split as words, edits as edits, a model that learns."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pickle
import types

import jax
import numpy as np
import pytest

from experiments.core import optim
from experiments.core.report import rows_of
from experiments.core.store import config_hash
from experiments.data import pronunciations
from experiments.data.pairs import END, START
from experiments.data.pronunciations import in_parts, read_dictionary
from experiments.seq2seq import baselines, cells, experiment, figures
from experiments.seq2seq.errors import nearest, rates
from experiments.seq2seq.report import REPORT
from experiments.seq2seq.rows import base_of, changes_of

# ------------------------------------------------------------------------ data

TEXT = """'bout B AW1 T
read R EH1 D # past
read(2) R IY1 D
reader R IY1 D ER0
reads R IY1 D Z
reads(2) R IY2 D Z
silent # nothing is said
"""


def test_a_word_has_its_pronunciations_without_stress_each_once():
    words = read_dictionary(TEXT)
    assert words["read"] == [("R", "EH", "D"), ("R", "IY", "D")]
    assert words["reads"] == [("R", "IY", "D", "Z")]
    assert "silent" not in words and words["'bout"] == [("B", "AW", "T")]


def test_parts_share_no_word_and_every_pronunciation_is_of_one():
    words = {f"w{i}": [(f"P{i % 3}",), ("Q", "P0")] for i in range(30)}
    data = in_parts(words, "here", validation=4, test=6)
    parts = [set(part.texts) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [20, 4, 6]
    assert set.union(*parts) == set(words)
    for one, two in itertools.combinations(parts, 2):
        assert not one & two
    assert len(data.train.labelled()) == 40
    again = in_parts(dict(reversed(words.items())), "there", validation=4, test=6)
    assert again.sha256 == data.sha256 and again.test.texts == data.test.texts
    assert in_parts(words, "", validation=4, test=6, seed=1).sha256 != data.sha256
    with pytest.raises(ValueError, match="validation and test must leave some of 30"):
        in_parts(words, "", validation=10, test=20)


def test_pairs_say_what_stands_before_and_what_comes():
    data = pronunciations.toy_words()
    part = data.train.labelled()
    flat = [
        (word, phones)
        for word, several in zip(data.train.sources, data.train.targets, strict=True)
        for phones in several
    ]
    for (spelling, phones), x, y in zip(flat, part.inputs, part.labels, strict=True):
        assert x[x[:, 0] > 0, 0].tolist() == spelling.tolist()
        assert y[y >= 0].tolist() == [*phones, END]
        assert x[: len(phones) + 1, 1].tolist() == [START, *phones]
    short = data.train.labelled(4)
    assert 0 < len(short) < len(part) and short.lengths.max() == 4


# ----------------------------------------------------------------------- edits


def _edits(one, two):
    """By the recursion that defines them."""

    @functools.cache
    def d(i, j):
        if not i or not j:
            return i + j
        replaced = d(i - 1, j - 1) + (one[i - 1] != two[j - 1])
        return min(replaced, d(i - 1, j) + 1, d(i, j - 1) + 1)

    return d(len(one), len(two))


def test_edits_are_those_of_the_definition_to_the_nearest_reference():
    random = np.random.Generator(np.random.PCG64(0))
    for _ in range(50):
        draw = [tuple(random.integers(0, 3, random.integers(1, 7))) for _ in range(3)]
        written, *references = (tuple(map(int, x)) for x in draw)
        edits, length = nearest(written, references)
        each = [(_edits(written, r), len(r)) for r in references]
        assert edits == min(e for e, _ in each)
        assert length == max(n for e, n in each if e == edits)
    assert rates([[1]], [[[1], [2, 3]]]) == {"per": 0.0, "wer": 0.0}
    with pytest.raises(ValueError, match="written must be one sequence for each"):
        rates([[1]], [])


# ------------------------------------------------------------------- baselines


def test_letters_are_aligned_to_all_phones_in_order():
    data = pronunciations.toy_words()
    pairs = [
        (x.tolist(), y[0].tolist())
        for x, y in zip(data.train.sources, data.train.targets, strict=True)
    ]
    table = baselines.learn_table(pairs)
    for letters, phones in pairs:
        chunks = baselines.align(letters, phones, table)
        assert len(chunks) == len(letters)
        assert [p for chunk in chunks for p in chunk] == phones
    assert baselines.align([1], [2, 3, 4], table) is None
    # Context tells what a letter by itself cannot: "c" before "e", an "e" at the end.
    alone, around = baselines.letters(data, None), baselines.context(data, None)
    assert around["test_per"] < alone["test_per"] / 2 and alone["test_wer"] < 1


# ----------------------------------------------------------------------- cells


def _config(**changes):
    config = experiment.PRESETS["smoke"]
    return dataclasses.replace(config, varied=(), train_length=8, **changes)


def _cell(model="transformer", **changes):
    study = experiment.study_of(_config(), model, model, (), changes)
    return dataclasses.replace(study.final(0)[0], written=None)


def test_a_transformer_learns_to_say_words_it_has_not_seen():
    data = pronunciations.toy_words(600)
    task = cells.PairTask(data)
    cell = _cell(dim=32, mlp_dim=64, tokens=512, dropout_rate=0.0)
    cell = dataclasses.replace(cell, updates=200, learning_rate=1e-2)
    program, batches = task.program(cell), task.batches(cell)
    state = optim.init_state(program.initial_params(0), task.hyper(cell))
    step = jax.jit(optim.make_step(program.loss))
    for index in range(cell.updates):
        state, _ = step(state, batches[index], jax.random.key(0))
    params = state.params
    found = task.score(cell, params)
    assert found["test_wer"] <= 0.2 and found["test_per"] <= 0.1
    assert found["written"] == len(data.test)
    assert sum(count for *_, count in found["lengths"]) == len(data.test)
    one = found["alignments"][0]
    shape = np.shape(one["weights"])
    assert shape == (1, len(one["target"]), len(one["source"]))
    np.testing.assert_allclose(np.sum(one["weights"], axis=-1), 1.0, atol=0.01)
    tuned = task.score(dataclasses.replace(cell, phase="tune"), params)
    assert "val_loss" in tuned and "test_per" not in tuned


def test_words_that_are_scored_are_from_all_of_them():
    part = pronunciations.toy_words().test
    some = part.some(4)
    assert some.texts == tuple(part.texts[i] for i in (0, 6, 12, 19))
    assert part.some(None) is part and part.some(99) is part


def test_fewer_pairs_are_some_of_more_and_others_for_another_seed():
    task = pickle.loads(pickle.dumps(cells.PairTask(pronunciations.toy_words())))
    cell = _cell()
    few, more, other, whole = (
        {x.tobytes() for x in task._training(dataclasses.replace(cell, **k)).inputs}
        for k in (dict(pairs=9), dict(pairs=30), dict(pairs=9, seed=1), {})
    )
    assert len(few) == 9 and few < more < whole and few != other
    assert task.costs(dataclasses.replace(cell, pairs=9))["n"] == 9
    with pytest.raises(ValueError, match="pairs must be at most the .* got 1,000"):
        task._training(dataclasses.replace(cell, pairs=1_000))


def test_a_recipe_is_what_a_cell_says():
    task = cells.PairTask(pronunciations.toy_words())
    assert task.hyper(_cell()).more == {}
    found = task.hyper(_cell(schedule="noam", averaged=2)).more
    assert {name: float(x) for name, x in found.items()} == dict(noam=1, averaged=2)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("lstm", ("lstm", "lstm", "summary")),
        ("linear", ("linear", "linear", "linear")),
        ("truncated", ("truncated", "dot_product", "dot_product")),
        ("linformer", ("linformer", "dot_product", "linformer")),
    ],
)
def test_a_variant_takes_every_part_that_it_can(model, parts):
    found = cells.parts_of(model)
    assert tuple(getattr(part, "name", part) for part in found) == parts
    if model not in cells.MODELS:
        task = cells.PairTask(pronunciations.toy_words())
        task.rehearse([_cell(model)])


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="num_heads must be a divisor of dim=8"):
        _config(num_heads=3)
    with pytest.raises(ValueError, match="positions must be left out for model 'lstm'"):
        _cell("lstm", positions="rope")
    with pytest.raises(ValueError, match="key_dim must be left out for model 'lstm'"):
        _cell("lstm", key_dim=4)
    with pytest.raises(ValueError, match="averaged must be at most updates=2"):
        _cell(averaged=5, updates=2)
    for name, value in (("varied", ("heads",)), ("ns", (9,))):
        with pytest.raises(ValueError, match=f"{name} must be left out without"):
            experiment.Config(models=("lstm",), **{name: value})


def test_one_thing_is_varied_at_a_time():
    for name, rows in experiment.TABLE_3.items():
        keys = {"dim", "mlp_dim"} if name == "width" else set(rows[0])
        assert all(set(changes) == keys for changes in rows), name
        assert len(keys) == 1 or name == "width"


# ---------------------------------------------------------------------- report


def test_figures_of_several_tasks_in_a_folder_have_files_of_their_own():
    rows = [types.SimpleNamespace(config=dict(task=x)) for x in ("cmudict", "verses")]
    one, two = (
        types.SimpleNamespace(config=rows[0].config, every=some)
        for some in (rows[:1], rows)
    )
    assert figures.file_of(one, "pairs") == "pairs.png"
    assert figures.file_of(two, "pairs") == "cmudict_pairs.png"


def _record(cell, **metrics):
    config = cell.config() if hasattr(cell, "config") else cell
    return dict(
        hash=config_hash(config),
        config=config,
        status="done",
        metrics=metrics,
        curves={"step": []},
        provenance={},
    )


def test_the_report_says_who_is_ahead_and_who_is_behind_the_floor(tmp_path):
    config = experiment.Config(varied=("heads", "keys", "norm"), ns=(6_000,))
    means = dict(transformer=0.06, lstm_attention=0.065, lstm=0.12)
    records = [
        _record(dict(task="cmudict", model=name, phase="baseline", seed=0),
                test_per=per, test_wer=4 * per)
        for name, per in (("letters", 0.43), ("context", 0.09))
    ]  # fmt: skip
    for study in experiment.studies_of(config):
        cell = study.grid[0]
        worse = 0.0 if study.name in means else 0.01
        records.append(_record(cell, val_loss=1.0))
        for final in study.final(0):
            per = means[cell.model] + worse + 0.0001 * final.seed
            metrics = dict(
                test_per=per, test_wer=4 * per, test_per_greedy=4 * per, params=9,
                flops=8, written=3, test_per_longer=2 * per, train_loss=0.1,
                test_loss=0.2, n=final.pairs or 99_999,
                lengths=[[4, 3, 3, 2], [18, 5, 4, 1]],
            )  # fmt: skip
            if final.seed == 0:
                picture = dict(
                    source=["a", "b"], target=["A", "end"], weights=[[[1, 0], [0, 1]]]
                )
                metrics |= dict(
                    examples=[["word", "W ER D", "W ER D"]], alignments=[picture]
                )
            records.append(_record(final, **metrics))
    REPORT.write(records, tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert text.startswith("# Spelling to phones")
    assert "PER of Transformer − LSTM, one vector of the source: −6.00" in text
    assert "Behind what needs no network: LSTM, one vector of the source." in text
    assert "| each letter in the widest context seen | 9.00 | 36.00 |" in text
    assert "| Transformer | 6.01 ± .01 |" in text
    assert "| nothing | 6.01 ± .01 | – |" in text
    assert "| heads 8 | 7.01 ± .01 | +1.00" in text and "| norm post |" in text
    assert "| key size 8 | 7.01 ± .01 |" in text
    # Two of three answers are as long; the longer one has four of its five phones.
    assert "| Transformer | .667 | 1.000 | 1.000 | .800 |" in text
    assert "| 6,000 | 6,000 | 7.01 ± .01 |" in text and "| 99,999 | 12,000 |" in text
    for name in "scores lengths length_histograms alignments_transformer pairs".split():
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    rows = rows_of(records)
    group = type("Group", (), dict(rows=rows))
    assert changes_of(rows[0], base_of(group)) == ""
