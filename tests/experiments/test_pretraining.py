"""Pre-training: hidden words, what goes on from them, counts beside, and the report."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from experiments.core import optim
from experiments.core.loop import load_params, params_file
from experiments.core.report import rows_of
from experiments.core.run import begin, run
from experiments.core.store import ResultsStore
from experiments.data import byte_text, text
from experiments.data.corpus import toy_corpus
from experiments.data.fetch import seal
from experiments.data.sequence_tasks import classifying
from experiments.data.sequences import IGNORED
from experiments.pretraining import baselines, cells, experiment, probing
from experiments.pretraining.report import REPORT

SMOKE = experiment.PRESETS["smoke"]
SHARE = 0.15


@pytest.fixture(scope="module")
def corpus():
    return toy_corpus(16)


@pytest.fixture(scope="module")
def tags(corpus):
    return experiment.load_task("pos", corpus)


@functools.cache
def study(**changes):
    return experiment.pretraining(dataclasses.replace(SMOKE, **changes), "dot_product")


def cell_of(**changes):
    return dataclasses.replace(study().final(0)[0], **changes)


@functools.cache
def stepper(program):
    return jax.jit(optim.make_step(program.loss))


def steps(task, cell, count, state=None, begin=0):
    """The state and losses after some updates."""
    program, batches = task.program(cell), task.batches(cell)
    if state is None:
        state = optim.init_state(program.initial_params(cell.seed), task.hyper(cell))
    losses = []
    for index in range(begin, begin + count):
        state, metrics = stepper(program)(state, batches[index], jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return state, losses


# ------------------------------------------------------------------ hidden words


def test_hidden_words_are_learnt_and_an_update_is_a_function_of_its_number(
    corpus, tags
):
    task = cells.MaskedTask(corpus, tags)
    cell = cell_of(updates=60, learning_rate=2e-2, batch_size=32)
    state, losses = steps(task, cell, 60)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3
    middle, first = steps(task, cell, 5)
    _, again = steps(task, cell, 2, middle, begin=5)
    assert first + again == losses[:7]
    part = corpus.validation
    hidden = cells.held_hidden(corpus, part, SHARE)
    rows = task.predict(cell, state.params, part, hidden)
    assert rows.shape == (len(part.tokens), 3)
    assert rows[:, 2].tolist() == hidden.asked.sum(axis=1).tolist()
    found = cells.told("val", corpus, part, rows)
    by_source = [found[f"val_loss_{s}"] for s in corpus.sources]
    assert min(by_source) <= found["val_loss"] <= max(by_source)
    assert found["val_perplexity"] == pytest.approx(np.exp(found["val_loss"]))


def test_only_known_words_are_hidden_and_all_of_them_behind_the_mask(corpus, tags):
    task = cells.MaskedTask(corpus, tags)
    cell = cell_of()
    program = task.program(cell)
    params = program.initial_params(0)
    ids = corpus.ids(corpus.test.tokens[:8]).copy()
    hidden = cells.held_hidden(corpus, corpus.test, SHARE)
    some = cells.Hidden(*(x[:8] for x in hidden))
    restore = jax.jit(program.more["restore"])
    before = restore(params, (ids, some))
    for row, where in enumerate(some.where):
        ids[row, where[some.asked[row]]] = 3  # what is hidden changes nothing
    np.testing.assert_array_equal(restore(params, (ids, some)), before)
    rows = np.arange(len(hidden.where))[:, None]
    known = corpus.table[corpus.test.tokens][rows, hidden.where, 0] >= cells.KNOWN
    assert known[hidden.asked].all()


def test_next_sentence_is_told_of_windows_of_which_half_are_of_two(corpus, tags):
    ids = jnp.asarray(corpus.ids(corpus.train.tokens[:40]))
    found, follows = cells.swapped(jax.random.key(1), ids)
    half = ids.shape[1] // 2
    np.testing.assert_array_equal(found[:, :half], ids[:, :half])
    own = np.asarray(found[:, half:] == ids[:, half:]).all(axis=(1, 2))
    np.testing.assert_array_equal(own, np.asarray(follows) == 1)
    before = jnp.roll(ids[:, half:], 1, axis=0)
    np.testing.assert_array_equal(found[~own, half:], before[~own])
    assert 8 <= follows.sum() <= 32
    task = cells.MaskedTask(corpus, tags)
    cell = cell_of(next_sentence=True)
    batch = task.batches(cell)[0]
    shape = jax.eval_shape(
        task.program(cell).loss,
        task.program(cell).initial_params(0),
        jax.ShapeDtypeStruct(batch.shape, batch.dtype),
        jax.random.key(0),
        task.hyper(cell),
    )
    assert {"accuracy", "follows_accuracy"} <= set(shape[1])


# ---------------------------------------------------------------------- baselines


def test_neighbours_are_counted_as_by_hand(corpus):
    counts = baselines.Counts(corpus)
    ids = corpus.table[corpus.train.tokens][..., 0]
    left, word, right = (int(x) for x in ids[0, 3:6])
    size = len(corpus.vocabulary)
    single = np.bincount(ids.ravel(), minlength=size)[:size] + 1.0
    single[:2] = 0
    single /= single.sum()

    def backed(seen, behind):
        often = np.bincount(seen, minlength=size)
        kinds = (often > 0).sum()
        return (often + kinds * behind) / (len(seen) + kinds)

    after = backed(ids[:, 1:][ids[:, :-1] == left], single)
    before = backed(ids[:, :-1][ids[:, 1:] == right], single)
    both = np.divide(after * before, single, where=single > 0, out=np.zeros(size))
    between = (ids[:, :-2] == left) & (ids[:, 2:] == right)
    expected = backed(ids[:, 1:-1][between], both / both.sum())
    np.testing.assert_allclose(counts.given(left, None), after, atol=1e-12)
    np.testing.assert_allclose(counts.given(None, right), before, atol=1e-12)
    np.testing.assert_allclose(counts.given(left, right), expected, atol=1e-12)
    np.testing.assert_allclose(counts.given(None, None), single, atol=1e-12)
    assert expected[word] > single[word]


def test_neighbours_are_ahead_of_how_frequent_a_word_is(corpus):
    one, two = (f() for f in baselines.of_corpus(corpus, SHARE).values())
    assert two["test_loss"] < one["test_loss"] - 0.3
    assert two["test_accuracy"] > one["test_accuracy"]
    assert set(one) == set(two) and "test_loss_first" in one


def test_texts_are_told_apart_without_a_network():
    documents = byte_text.toy_documents(400)
    data = classifying("toy", documents, text.Vocabulary([("a",)]), (8,))
    count = len(data.train)
    guess, bayes = (
        baselines.of_task(data)[n](data, count, 0) for n in ("majority", "naive_bayes")
    )
    assert bayes["test_accuracy"] > 0.95  # three alphabets
    shares = np.bincount([y[0] for y in data.test.labels]) / len(data.test)
    assert guess["test_accuracy"] in shares.tolist()


def test_tags_have_the_baseline_of_the_subset(corpus, tags):
    few, many = (
        baselines.most_frequent_tag(tags, n, 0)["test_accuracy"]
        for n in (5, len(tags.train))
    )
    assert baselines.majority(tags, 5, 0)["test_accuracy"] < few < many


# ------------------------------------------------------------------------- probes


def test_a_probe_reads_what_the_encoder_makes_of_words(corpus, tags, monkeypatch):
    shape = cells.Shape.of(cell_of())
    tower = cells.build_model(shape, corpus, 0).tower
    ids = jnp.asarray(corpus.ids(corpus.test.tokens[:2]))
    real = jnp.arange(16)[None] < jnp.asarray([[16], [9]])

    @nnx.jit
    def both(tower):
        layers = probing.layers_of(tower, ids, real)
        return layers, tower.body.encoder.norm(layers[-1])

    layers, last = both(tower)
    assert layers.shape == (SMOKE.depth + 1, 2, 16, SMOKE.dim)
    whole = nnx.jit(lambda t: t.features(ids, real, pool=False))(tower)
    np.testing.assert_allclose(
        np.where(real[..., None], last, 0),
        np.where(real[..., None], whole, 0),
        atol=1e-5,
    )
    monkeypatch.setattr(probing, "SENTENCES", (60, 20, 20))
    task = cells.MaskedTask(corpus, tags)
    program = task.program(cell_of())
    params = program.initial_params(0)
    found = probing.probe(program.more["layers"], params, tags)
    assert len(found) == SMOKE.depth + 1 and min(found) > 0.4


def test_ridge_chooses_its_penalty_on_validation():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((30, 3))

    def part(count):
        x = rng.standard_normal((count, 30)).astype(np.float32)
        return x, (x @ weights).argmax(axis=1)

    assert probing.ridge([part(2_000), part(300), part(300)], 3) > 0.85


# -------------------------------------------------------------------- fine-tuning


def test_encoders_of_other_shapes_are_told():
    params = dict(input=np.zeros(3), body=np.zeros(2), head=np.zeros(1))
    known = dict(tower=dict(input=np.ones(3), body=np.ones(2), head=np.ones(9)))
    found = cells.with_encoder(params, known)
    assert [found[n].tolist() for n in ("input", "head")] == [[1, 1, 1], [0]]
    with pytest.raises(ValueError, match="shapes of the encoder that was pre-trained"):
        cells.with_encoder(params | dict(body=np.zeros(1)), known)


def test_one_label_a_text_is_learnt_and_scored_once_a_text(corpus, tags):
    data = experiment.load_task("spam", corpus)
    scratch = experiment.studies_of(SMOKE, "spam", data.name, 64, [study()])[0]
    cell = dataclasses.replace(scratch.final(0)[0], n=None, learning_rate=2e-2)
    task = cells.TuneTask(data, cells.MaskedTask(corpus, tags))
    state, losses = steps(task, dataclasses.replace(cell, updates=40), 40)
    assert losses[-1] < losses[0] - 0.5
    found, loss = task.predict(cell, state.params, data.test)
    assert [len(x) for x in found] == [1] * len(data.test)
    score = task.score(cell, state.params)
    right = [int(x[0] == y[0]) for x, y in zip(found, data.test.labels, strict=True)]
    assert score["test_accuracy"] == pytest.approx(np.mean(right))
    assert score["test_loss"] == loss


def test_a_run_pretrains_then_fine_tunes_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())
    monkeypatch.setattr(probing, "SENTENCES", (40, 20, 20))
    options = "--preset smoke --tasks pos --engine inline --out"
    assert run(experiment.EXPERIMENT, [*options.split(), str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text("utf-8")
    for said in (
        "## Hidden words",
        "previous and next word, with back-off",
        "## Tags of words",
        "| softmax, pre-trained |",
        "of too few seeds to say",
        "## Which layer knows tags?",
        "## What does it fill in?",
    ):
        assert said in report, said
    assert (tmp_path / "pos.png").exists() and (tmp_path / "probe.png").exists()
    store = ResultsStore(tmp_path)
    before, tuned = experiment.plans(dataclasses.replace(SMOKE, tasks=("pos",)))
    (known,) = before.studies[0].final(0)
    metrics = store.get(known.config())["metrics"]
    assert len(metrics["probe"]) == len(metrics["probe_untrained"]) == SMOKE.depth + 1
    assert len(metrics["examples"][0][3]) == 5 and "____" in metrics["examples"][0][0]
    like = before.task.program(known).initial_params(0)
    kept = load_params(store, known, like)
    scratch, later = (s.final(0)[0] for s in tuned.studies)
    assert scratch.pretrained is None and later.pretrained is not None
    first = tuned.task.first_params(later, store)
    for name in ("input", "body"):
        for one, two in zip(
            jax.tree.leaves(first[name]),
            jax.tree.leaves(kept["tower"][name]),
            strict=True,
        ):
            np.testing.assert_array_equal(one, two)
    anew = tuned.task.first_params(scratch, store)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, anew, tuned.task.initial_params(scratch))
    )
    metrics = store.get(later.config())["metrics"]
    arrays = map(np.ascontiguousarray, jax.tree.leaves(kept))
    assert metrics["encoder_sha256"] == seal(*arrays)
    # Without what it begins with, a cell says so.
    params_file(store, known).unlink()
    with pytest.raises(FileNotFoundError, match="were not kept"):
        tuned.task.first_params(later, store)
    # Where nothing is left to begin with it, its record stands; else it runs again.
    begin(store, [before, tuned])
    assert store.get(known.config()) is not None
    (tmp_path / "results.jsonl").unlink()
    store.retry(later.config(), anyway=True)
    assert not tuned.studies[1].waits(store.get)
    begin(store, [before, tuned])
    assert store.get(known.config()) is None and tuned.studies[1].waits(store.get)


def test_who_was_pretrained_knows_words_that_training_has_not(corpus, tags):
    task = cells.TuneTask(tags, cells.MaskedTask(corpus, tags), [study()])
    scratch, later = (
        s.final(0)[0]
        for s in experiment.studies_of(SMOKE, "pos", "toy_pos", 99, [study()])
    )
    assert task._knows_less(scratch) and not task._knows_less(later)


# ------------------------------------------------------------------------ planning


def test_fine_tuning_waits_for_pretraining_and_names_it():
    before = study()
    rows = experiment.studies_of(SMOKE, "pos", "toy_pos", 99, [before])
    assert [s.after for s in rows] == [None, before]
    assert rows[1].grid[0].pretrained == cells.digest_of(before)
    assert cells.digest_of(before) != cells.digest_of(study(pretrain_updates=5))
    assert experiment.sizes_of(experiment.Config(), "pos", 45_997) == [
        45_997,
        10_000,
        1_000,
        300,
        100,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=3), "num_heads must be a divisor of dim=8"),
        (dict(length=4), "length must be at least 8"),
        (dict(pretrain_rates=(2e-3, 1e-3)), "pretrain_rates must be ascending"),
        (dict(attentions=("linear", "linear")), "each once"),
        (dict(attentions=("linear",), attention="linear"), "none of dot_product and"),
        (dict(masked=1.0), "above 0 and below 1"),
    ],
)
def test_bad_settings_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changes)


# ------------------------------------------------------------------------- report


def test_the_report_says_whether_pretraining_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())
    config = dataclasses.replace(SMOKE, seeds=3, tag_ns=(20, 40))
    rows = experiment.studies_of(config, "pos", "toy_pos", 99, [study()])
    records = []
    for row in rows:
        for cell in row.final(0):
            better = 0.2 * (cell.pretrained is not None) * (cell.n == 20)
            accuracy = 0.5 + better + 0.01 * cell.seed * (1 + (cell.n == 40))
            records.append(_record(cell.config(), test_accuracy=accuracy))
    for n in (20, 40):
        config = dict(task="toy_pos", model="majority", n=n, seed=0, phase="baseline")
        records.append(_record(config, test_accuracy=0.3))
    assert len(rows_of(records)) == 4
    for begun, verdict in (
        (1, "with this encoder it helps."),
        (2, "with these encoders it helps."),
        (3, "it helps."),
    ):
        for record in records:
            if record["config"].get("pretrained"):
                encoder = str(record["config"]["seed"] % begun)
                record["metrics"]["encoder_sha256"] = encoder
        REPORT.write(records, tmp_path)
        said = (tmp_path / "report.md").read_text("utf-8")
        assert f"at N = 20 (softmax)? +.200 [+.200, +.200]: {verdict}" in said
        assert ("so they are not independent" in said) == (begun < 3)
    assert "| difference | N = 20 | N = 40 |" in said
    assert "| most frequent label | .300 (1 seed) | .300 (1 seed) |" in said


def _record(config, **metrics):
    return dict(config=config, status="done", metrics=metrics, curves={}, hash="")


def test_batches_are_windows_of_training(corpus, tags):
    batch = cells.MaskedTask(corpus, tags).batches(cell_of())[3]
    assert batch.shape == (SMOKE.batch_size, 16, 9) and batch.min() >= 0
    assert (batch != IGNORED).all()
    windows = corpus.ids(corpus.train.tokens)
    of = {x.tobytes(): s for x, s in zip(windows, corpus.train.source, strict=True)}
    sources = [of[row.tobytes()] for row in batch]
    assert sources == sorted(sources) and set(sources) == {0, 1}
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        cell_of(next_sentence=True, batch_size=1)
