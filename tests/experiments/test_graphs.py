"""Graphs of nodes: WordNet's file, baselines, the runners, report, command line."""

from __future__ import annotations

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import train, trial
from experiments.core.cell import Runtime
from experiments.core.loop import StopSignal
from experiments.core.observe import Progress
from experiments.core.store import ResultsStore
from experiments.data import graphs, molecules
from experiments.data.fetch import DataError
from experiments.graphs import __main__ as main
from experiments.graphs import (
    dictionary,
    nodes,
    presets,
    regression,
    run,
)
from experiments.graphs.cells import DictionaryCell, MoleculeCell, NodeCell

NOUNS = """\
  1 This is the licence.
00000001 03 n 01 entity 0 002 ~ 00000002 n 0000 ~ 00000003 n 0000 | that which is
00000002 05 n 02 cat 0 puss 1 002 @ 00000001 n 0000 + 00000009 v 0101 | an animal; "a"
00000003 06 n 01 cup 0 003 @ 00000001 n 0000 #p 00000002 n 0000 @ 00000001 n 0000 | for
00000004 06 n 01 lone 0 000 | without any
"""


# --- WordNet -----------------------------------------------------------------------


def test_the_file_is_read_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "data.noun").write_text(NOUNS)
    digest = hashlib.sha256(NOUNS.encode()).hexdigest()
    spec = dataclasses.replace(graphs.WORDNET, sha256={"data.noun": digest})
    monkeypatch.setattr(graphs, "WORDNET", spec)
    monkeypatch.setenv("ATTN_DATA", str(tmp_path))
    got = graphs.load_wordnet()
    assert got.num_nodes == 4 and got.source == str(tmp_path)
    assert [got.class_names[i] for i in got.labels] == [
        "Tops",
        "animal",
        "artifact",
        "artifact",
    ]
    assert got.texts[1] == 'an animal; "a"'
    triples = {
        (int(r), int(s), got.kind_names[k])
        for r, s, k in zip(got.receivers, got.senders, got.kinds, strict=True)
    }
    # The pointer from 2 to 1 is listed at one end alone, and turned round at the other.
    assert triples == {
        (0, 1, "~"),
        (0, 2, "~"),
        (1, 0, "@"),
        (2, 0, "@"),
        (2, 1, "#p"),
        (1, 2, "%p"),
    }
    assert list(got.receivers) == sorted(got.receivers)
    line = got.describe()
    assert "4 nodes, 3 edges, 26 classes, 0% of the edges" in line and "\n" not in line
    senders, receivers, kinds = graphs.attention_edges(got)
    assert len(senders) == 6 + 4 and list(receivers) == sorted(receivers)
    loops = senders == receivers
    assert loops.sum() == 4 and (kinds[loops] == len(got.kind_names)).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("00000001 03 n 01 entity 0 002 ~ 00000002 n 0000 | x", "is not a line of"),
        ("00000001 03 n 01 entity 0 000", "is not a line of"),
        ("00000001 44 n 01 entity 0 000 | a verb's class", "out of range"),
        ("00000001 03 n 01 entity 0 001 ~ 00000002 n 0000 | x", "an offset that is"),
        ("00000001 03 n 01 entity 0 001 ? 00000001 n 0000 | x", "a kind or an"),
    ],
)
def test_other_files_are_refused(line, message):
    with pytest.raises(DataError, match=message):
        graphs.parse_nouns(line, "here")


def test_parts_of_nodes_share_nothing_and_are_nested():
    train_part, validation, test = graphs.split_nodes(100, test=20, validation=10)
    together = np.concatenate([train_part, validation, test])
    assert sorted(together) == list(range(100))
    again = graphs.split_nodes(100, test=20, validation=10)[0]
    assert (train_part == again).all() and (np.diff(train_part) < 0).any()
    with pytest.raises(ValueError, match="leave some of the 5 nodes"):
        graphs.split_nodes(5, test=3, validation=2)


def test_label_propagation_is_harmonic():
    """A path of five, both ends known: linear in between. A node alone: the prior."""
    senders = np.array([0, 1, 1, 2, 2, 3, 3, 4])
    receivers = np.array([1, 0, 2, 1, 3, 2, 4, 3])
    labels = np.array([0, -1, -1, -1, 1, -1])
    known = np.array([0, 4])
    found = graphs.label_propagation(senders, receivers, labels, known, 2, steps=300)
    np.testing.assert_allclose(found[:5, 1], [0, 0.25, 0.5, 0.75, 1], atol=1e-6)
    np.testing.assert_allclose(found[5], [0.5, 0.5])
    np.testing.assert_allclose(found.sum(axis=1), 1)
    with pytest.raises(ValueError, match="known must name at least one"):
        graphs.label_propagation(senders, receivers, labels, known[:0], 2)


def test_features_are_kept_in_the_cache(tmp_path, monkeypatch):
    graph = graphs.toy_graph(40, seed=0)
    found = graphs.text_features(graph, 3, tmp_path)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(0), 1, atol=1e-3)
    (path,) = (tmp_path / "text-features").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "tf_idf", None)  # it would be called
        np.testing.assert_array_equal(graphs.text_features(graph, 3, tmp_path), found)
    path.write_bytes(b"half a file")
    again = graphs.text_features(graph, 3, tmp_path)
    np.testing.assert_allclose(np.abs(again), np.abs(found), atol=1e-4)
    first = graphs.first_nodes(graph, 10)
    assert first.num_nodes == 10 and first.senders.max() < 10
    assert first.sha256 != graph.sha256


# --- Runners -----------------------------------------------------------------------


def runner(make, folder):
    runtime = Runtime(log_every=10, checkpoint_seconds=1e9)
    store = ResultsStore(folder)
    return make(store, runtime, Progress(1, live=False), StopSignal())


def lookup_cell(**changes):
    settings = dict(
        task="dictionary",
        model="gatv2",
        seed=0,
        updates=300,
        dim=16,
        depth=1,
        num_heads=1,
        mlp_dim=0,
        learning_rate=3e-2,
        phase="final",
        score="gatv2",
        keys=3,
        graphs=64,
        batch_size=16,
        held_out=20,
    )
    return DictionaryCell(**(settings | changes))


def test_gatv2_answers_the_dictionary_and_gat_does_not(tmp_path):
    found = runner(dictionary.DictionaryRunner, tmp_path)
    scores = {}
    for score in ("gatv2", "gat"):
        cell = lookup_cell(score=score, model=score)
        assert found.run(cell)
        scores[score] = found.store.get(cell.config())["metrics"]
    assert scores["gatv2"]["train_accuracy"] == scores["gatv2"]["test_accuracy"] == 1
    assert scores["gatv2"]["train_whole_graphs"] == 1
    assert scores["gat"]["train_accuracy"] < 0.9


def test_all_graphs_are_scored_also_those_that_fill_no_batch(tmp_path, monkeypatch):
    found = runner(dictionary.DictionaryRunner, tmp_path)
    cell = lookup_cell(held_out=20, graphs=20)
    graphs = dictionary.lookup_graphs(cell.keys, 20, "test")
    seen = []

    def hits(params, values):
        assert len(values) == cell.batch_size == 16
        seen.extend(map(tuple, values.tolist()))
        return (values == graphs[-1]).sum(axis=1)

    monkeypatch.setattr(dictionary, "programs", lambda cell: (None, hits))
    metrics = found.result(cell, None)
    assert set(map(tuple, graphs.tolist())) <= set(seen)
    assert metrics["test_accuracy"] == pytest.approx((graphs == graphs[-1]).mean())


def test_a_graph_of_the_dictionary_by_hand():
    vectors, edges = dictionary.nodes_and_edges(jnp.array([[1, 0], [0, 1]], jnp.int32))
    assert vectors.tolist() == [
        [0, 1],
        [1, 0],
        [0, 2],
        [1, 2],
        [0, 0],
        [1, 1],
        [0, 2],
        [1, 2],
    ]
    pairs = set(zip(edges.senders.tolist(), edges.receivers.tolist(), strict=True))
    assert pairs == {
        (s + 4 * g, r + 4 * g) for g in (0, 1) for s in (0, 1) for r in (2, 3)
    }
    first = dictionary.lookup_graphs(5, 30, "train")
    assert (np.sort(first, axis=1) == np.arange(5)).all() and len(
        np.unique(first, axis=0)
    ) > 9
    assert (first != dictionary.lookup_graphs(5, 30, "test")).any()


@pytest.fixture(scope="module")
def node_task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        task = nodes.Task(graphs.toy_graph(90, seed=0), test=30, validation=15)
        task.inputs(40, 4)  # makes the features while the cache is ours
        yield task


def node_cell(of, **changes):
    settings = dict(
        task="wordnet",
        model="gatv2",
        seed=0,
        updates=20,
        dim=8,
        depth=2,
        num_heads=2,
        head_dim=4,
        mlp_dim=8,
        learning_rate=2e-2,
        phase="final",
        n=40,
        data=of.graph.sha256,
        score="gatv2",
        kinds=True,
        reads_labels=True,
        shown=0.5,
        features=4,
    )
    return NodeCell(**(settings | changes))


def test_nodes_are_learned_and_scored_on_their_own_part(node_task, tmp_path):
    found = runner(lambda *common: nodes.NodeRunner(node_task, *common), tmp_path)
    cell = node_cell(node_task, propagated=5)
    assert found.run(cell)
    record = found.store.get(cell.config())
    loss = record["curves"]["loss"]
    assert loss[-1] < loss[0] and record["metrics"]["params"] > 0
    assert record["metrics"]["test_accuracy"] > 0.5  # of three classes
    assert "val_accuracy" not in record["metrics"]
    tune = node_cell(node_task, phase="tune", updates=1, propagated=5)
    found.run(tune)
    metrics = found.store.get(tune.config())["metrics"]
    assert "val_accuracy" in metrics and "test_accuracy" not in metrics
    assert cell.config()["propagated"] == 5
    assert "propagated" not in node_cell(node_task).config()  # nothing that is not done
    with pytest.raises(ValueError, match="this graph is"):
        found.start(node_cell(node_task, data="another"))


def test_labels_of_other_parts_are_neither_read_nor_learned(node_task):
    """Validation and test labels change nothing in an update."""
    cell = node_cell(node_task)
    inputs = node_task.inputs(40, 4)
    show = np.zeros(40, bool)
    show[:20] = True
    step = nodes.programs(cell, node_task.graph).step
    params = train.split_model(nodes.build(cell, node_task.graph, 0))[1]
    frozen = dataclasses.replace(cell, learning_rate=1e-30, weight_decay=0.0)
    other = np.array(inputs.labels)
    outside = np.setdiff1d(np.arange(90), node_task.pool[:40])
    other[outside] = (other[outside] + 1) % 3  # labels that nobody may use
    losses = []
    for labels in (inputs.labels, other):
        state = train.init_state(jax.tree.map(jnp.copy, params), trial.hyper_of(frozen))
        given = inputs._replace(labels=labels, show=show)
        losses.append(float(step(state, given, jax.random.key(0))[1]["loss"]))
    assert losses[0] == losses[1] > 0


def test_baselines_of_nodes(node_task):
    found = {
        name: measure()
        for name, measure in nodes.baselines(node_task, (10, 40)).items()
    }
    assert set(found) == {"majority", "text", "label_propagation"}
    for metrics in found.values():
        assert {"test_accuracy_10", "test_accuracy_40", "val_accuracy_40"} <= set(
            metrics
        )
    assert found["label_propagation"]["test_accuracy_40"] > 0.5
    assert "steps" in found["label_propagation"]["chosen_40"]


@pytest.fixture(scope="module")
def molecule_task():
    return regression.Task(molecules.toy_molecules())


def molecule_cell(of, **changes):
    settings = dict(
        task="logp",
        model="all pairs",
        seed=0,
        updates=30,
        dim=8,
        depth=1,
        num_heads=2,
        mlp_dim=8,
        learning_rate=2e-2,
        phase="final",
        data=of.data.sha256,
        sees="all",
        pairs="both",
        batch_atoms=256,
    )
    return MoleculeCell(**(settings | changes))


def test_molecules_are_learned_and_scored(molecule_task, tmp_path):
    make = lambda *common: regression.MoleculeRunner(molecule_task, *common)  # noqa: E731
    found = runner(make, tmp_path)
    cell = molecule_cell(molecule_task)
    assert found.run(cell)
    metrics = found.store.get(cell.config())["metrics"]
    right = molecule_task.data.targets[molecule_task.test]
    guess = np.full(len(right), molecule_task.scale("final")[0])
    floor = regression.errors(guess, right, "test")["test_rmse"]
    assert metrics["test_rmse"] < floor
    again = np.asarray(metrics["test_predictions"])
    rmse = float(np.sqrt(np.mean((again - right) ** 2)))
    assert rmse == pytest.approx(metrics["test_rmse"], abs=2e-3)
    assert metrics["n"] == len(molecule_task.train) + len(molecule_task.validation)
    for name in ("mean", "ridge", "forest"):
        baseline = regression.baselines(molecule_task, 5)[name]()
        assert baseline["test_rmse"] > 0


def test_an_epoch_holds_every_molecule_once(molecule_task):
    indices = molecule_task.train
    batches = regression.Epochs(molecule_task, indices, 256, 0, "tune")
    mean, deviation = molecule_task.scale("tune")
    targets = [
        batches[k].target[batches[k].weight > 0] * deviation + mean
        for k in range(batches.size)
    ]
    expected = molecule_task.data.targets[indices]
    np.testing.assert_allclose(
        np.sort(np.concatenate(targets)), np.sort(expected), rtol=1e-5
    )
    one, two = batches[0], regression.Epochs(molecule_task, indices, 256, 0, "tune")[0]
    np.testing.assert_array_equal(one.atoms, two.atoms)
    second = batches[batches.size]
    assert second.target.shape == one.target.shape
    assert not np.array_equal(second.target, one.target)


def test_rows_that_fill_a_batch_up_change_no_gradient(molecule_task):
    cell = molecule_cell(molecule_task, sees="edges", pairs="none")
    indices = molecule_task.train[:3]
    step = regression.programs(cell).step
    losses = []
    for rows in (8, 16):
        params = train.split_model(regression.build(cell, 0))[1]
        state = train.init_state(params, trial.hyper_of(cell))
        batch = molecule_task.batch(indices, rows, "tune")
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append((float(metrics["loss"]), jax.tree.leaves(state.params)))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    for one, two in zip(losses[0][1], losses[1][1], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_steps_lower_for_accelerators(node_task, molecule_task):
    """Nothing in them is of the CPU alone."""
    node, molecule = node_cell(node_task), molecule_cell(molecule_task)
    lookup = lookup_cell()
    for step, params, cell, batch in (
        (
            nodes.programs(node, node_task.graph).step,
            train.split_model(nodes.build(node, node_task.graph, 0))[1],
            node,
            node_task.inputs(40, 4),
        ),
        (
            regression.programs(molecule).step,
            train.split_model(regression.build(molecule, 0))[1],
            molecule,
            molecule_task.batch(molecule_task.train[:3], 8, "tune"),
        ),
        (
            dictionary.programs(lookup)[0],
            train.split_model(dictionary.build(lookup, 0))[1],
            lookup,
            dictionary.lookup_graphs(3, 16, "train"),
        ),
    ):
        state = train.init_state(params, trial.hyper_of(cell))
        exported = jax.export.export(
            step, platforms=("cuda", "tpu"), disabled_checks=()
        )(state, batch, jax.random.key(0))
        assert set(exported.platforms) == {"cuda", "tpu"}


# --- Report and command line -------------------------------------------------------


def test_settings_that_make_no_sense_are_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main.parse(["--preset", "quick", "--seeds", "0"])
    assert ended.value.code == 2
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="node_models must be some of no edges; gat"):
        presets.Experiment(node_models=("gcn",))
    parsed = main.parse(["--preset", "cpu", "--task", "dictionary"])
    assert parsed.experiment.task == "dictionary" and parsed.experiment.seeds == 3


def test_plans_of_every_preset():
    for experiment in presets.PRESETS.values():
        plan = run.dictionary_plan(experiment)
        assert plan.total() >= len(experiment.keys) * len(experiment.lookup_models)
    graph = graphs.toy_graph(9, seed=0)
    for model in presets.WORDNET:
        assert run.node_cell(presets.CPU, graph, model, 5).model == model
