"""Graphs of nodes: WordNet's file, baselines, and the three tasks."""

from __future__ import annotations

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import optim
from experiments.core.cell import Runtime
from experiments.core.loop import Program, Trainer
from experiments.core.observe import Progress
from experiments.core.signals import StopSignal
from experiments.core.store import ResultsStore
from experiments.data import graphs, molecules
from experiments.data.fetch import DataError
from experiments.graphs import dictionary, nodes, regression
from experiments.graphs.cells import DictionaryCell, MoleculeCell
from experiments.graphs.dictionary import DictionaryTask
from experiments.graphs.experiment import (
    MOLECULES,
    PRESETS,
    WORDNET,
    dictionary_plan,
    node_cell,
)

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


# --- Tasks -------------------------------------------------------------------------


def trained(task, cell, folder):
    """Metrics and curves of a cell."""
    store, runtime = ResultsStore(folder), Runtime(log_every=10)
    trainer = Trainer(task, store, runtime, Progress(1, live=False), StopSignal())
    assert trainer.run([cell])
    record = store.get(cell.config())
    return record["metrics"], record["curves"]


LOOKUP = DictionaryCell(
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


def test_gatv2_answers_the_dictionary_and_gat_does_not(tmp_path):
    scores = {
        score: trained(
            DictionaryTask(),
            dataclasses.replace(LOOKUP, score=score, model=score),
            tmp_path,
        )[0]
        for score in ("gatv2", "gat")
    }
    assert scores["gatv2"]["train_accuracy"] == scores["gatv2"]["test_accuracy"] == 1
    assert scores["gatv2"]["train_whole_graphs"] == 1
    assert scores["gat"]["train_accuracy"] < 0.9


def test_all_graphs_are_scored_also_those_that_fill_no_batch(monkeypatch):
    cell = dataclasses.replace(LOOKUP, graphs=20)
    graphs = dictionary.lookup_graphs(cell.keys, 20, "test")
    seen = []

    def hits(params, values):
        assert len(values) == cell.batch_size == 16
        seen.extend(map(tuple, values.tolist()))
        return (values == graphs[-1]).sum(axis=1)

    monkeypatch.setattr(dictionary.devices, "call", lambda of, *inputs: of(*inputs))
    task = DictionaryTask()
    task.program = lambda cell: Program(None, None, {"hits": hits})
    metrics = task.score(cell, None)
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
    assert (np.sort(first, axis=1) == np.arange(5)).all()
    assert len(np.unique(first, axis=0)) > 9
    assert (first != dictionary.lookup_graphs(5, 30, "test")).any()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        found = nodes.Nodes(graphs.toy_graph(90, seed=0), test=30, validation=15)
        found.inputs(40, 4)  # makes the features while the cache is ours
        yield found


def cell_of_nodes(of, model="gatv2, kinds of edges", **changes):
    tiny = dataclasses.replace(
        PRESETS["cpu"],
        node_updates=20,
        node_dim=8,
        node_head_dim=4,
        node_depth=2,
        node_features=4,
    )
    cell = node_cell(tiny, of.graph, model, 40)
    settings = dict(phase="final", learning_rate=2e-2, shown=0.5)
    return dataclasses.replace(cell, **(settings | changes))


def test_nodes_are_learned_and_scored_on_their_own_part(words, tmp_path):
    task, cell = nodes.NodeTask(words), cell_of_nodes(words, propagated=5)
    metrics, curves = trained(task, cell, tmp_path)
    assert curves["loss"][-1] < curves["loss"][0] and metrics["params"] > 0
    assert metrics["test_accuracy"] > 0.5  # of three classes
    assert "val_accuracy" not in metrics
    tune = dataclasses.replace(cell, phase="tune", updates=1)
    metrics, _ = trained(task, tune, tmp_path)
    assert "val_accuracy" in metrics and "test_accuracy" not in metrics
    assert cell.config()["propagated"] == 5
    assert "propagated" not in cell_of_nodes(words).config()  # nothing that is not done
    with pytest.raises(ValueError, match="this graph is"):
        task.batches(cell_of_nodes(words, data="another"))


def test_labels_of_other_parts_are_neither_read_nor_learned(words):
    """Validation and test labels change nothing in an update."""
    program = nodes.program_of(cell_of_nodes(words), words.graph)
    inputs = words.inputs(40, 4)._replace(show=np.arange(40) < 20)
    other = np.array(inputs.labels)
    outside = np.setdiff1d(np.arange(90), words.pool[:40])
    other[outside] = (other[outside] + 1) % 3  # labels that nobody may use
    slopes = jax.jit(jax.value_and_grad(program.loss, has_aux=True))
    params, rng = program.initial_params(0), jax.random.key(0)
    found = [
        slopes(params, inputs._replace(labels=labels), rng, None)
        for labels in (inputs.labels, other)
    ]
    assert found[0][0][0] > 0
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_baselines_of_nodes(words):
    measures = nodes.baselines(words, (10, 40))
    found = {name: measure() for name, measure in measures.items()}
    assert set(found) == {"majority", "text", "label_propagation"}
    for metrics in found.values():
        assert {"test_accuracy_10", "test_accuracy_40", "val_accuracy_40"} <= set(
            metrics
        )
    assert found["label_propagation"]["test_accuracy_40"] > 0.5
    assert "steps" in found["label_propagation"]["chosen_40"]


@pytest.fixture(scope="module")
def parts():
    return regression.Parts(molecules.toy_molecules())


def cell_of_molecules(of, model="all pairs, bias of bonds and paths"):
    return MoleculeCell(
        task="logp",
        model=model,
        seed=0,
        updates=30,
        dim=8,
        depth=1,
        num_heads=2,
        mlp_dim=8,
        learning_rate=2e-2,
        phase="final",
        data=of.data.sha256,
        batch_atoms=256,
        **MOLECULES[model],
    )


def test_molecules_are_learned_and_scored(parts, tmp_path):
    task, cell = regression.MoleculeTask(parts), cell_of_molecules(parts)
    metrics, _ = trained(task, cell, tmp_path)
    baselines = {name: of() for name, of in regression.baselines(parts, 5).items()}
    assert set(baselines) == {"mean", "ridge", "forest"}
    assert 0 < metrics["test_rmse"] < baselines["mean"]["test_rmse"]
    assert min(found["test_rmse"] for found in baselines.values()) > 0
    assert metrics["n"] == len(parts.train) + len(parts.validation)
    with pytest.raises(ValueError, match="these molecules are"):
        task.batches(dataclasses.replace(cell, data="another"))


def test_seeds_with_splits_of_their_own_hold_other_molecules_out(parts):
    """The cell and the floors of a seed have one split; that of seed 0 is the first."""
    task = regression.MoleculeTask(parts)
    shared = dataclasses.replace(cell_of_molecules(parts), seed=3)
    own = dataclasses.replace(shared, own_split=True)
    assert "own_split" not in shared.config() and own.config()["own_split"] is True
    batches = [task.batches(cell) for cell in (shared, own)]
    tested = [set(batch.task.test) for batch in batches]
    assert tested[0] == set(parts.test) != tested[1] == set(parts.at(3).test)
    assert not tested[1] & set(batches[1].indices)
    params = task.initial_params(own)
    held_out = parts.at(3).test
    again = task.predict(own, params, held_out) - parts.data.targets[held_out]
    rmse = task.score(own, params)["test_rmse"]
    assert rmse == pytest.approx(float(np.sqrt(np.mean(again**2))))
    floors = regression.baselines(parts, 5, 2)
    assert set(floors) == {
        f"{name} split={k}" for name in ("mean", "ridge", "forest") for k in (0, 1)
    }
    one, two = (floors[f"mean split={k}"]() for k in (0, 1))
    assert one["test_rmse"] != two["test_rmse"] and two["split"] == 1


def test_an_epoch_holds_every_molecule_once(parts):
    def epochs():
        return regression.Epochs(parts, parts.train, 256, 0, "tune")

    batches = epochs()
    mean, deviation = parts.scale("tune")
    every = [batches[k] for k in range(batches.size)]
    found = np.concatenate([batch.target[batch.weight > 0] for batch in every])
    expected = np.sort(parts.data.targets[parts.train])
    np.testing.assert_allclose(np.sort(found * deviation + mean), expected, rtol=1e-5)
    one, second = batches[0], batches[batches.size]
    np.testing.assert_array_equal(one.atoms, epochs()[0].atoms)
    assert second.target.shape == one.target.shape
    assert not np.array_equal(second.target, one.target)


def test_rows_that_fill_a_batch_up_change_no_gradient(parts):
    program = regression.MoleculeTask(parts).program(cell_of_molecules(parts, "edges"))
    slopes = jax.jit(jax.value_and_grad(program.loss, has_aux=True))
    params, rng = program.initial_params(0), jax.random.key(0)
    found = [
        slopes(params, parts.batch(parts.train[:3], rows, "tune"), rng, None)
        for rows in (8, 16)
    ]
    assert found[0][0][0] > 0
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(same, *found)


def test_steps_lower_for_accelerators(words, parts):
    """Nothing in them is of the CPU alone."""
    for task, cell in (
        (DictionaryTask(), LOOKUP),
        (nodes.NodeTask(words), cell_of_nodes(words)),
        (regression.MoleculeTask(parts), cell_of_molecules(parts)),
    ):
        program = task.program(cell)
        state = optim.init_state(program.initial_params(0), task.hyper(cell))
        step = jax.jit(optim.make_step(program.loss), donate_argnums=0)
        exported = jax.export.export(step, platforms=("cuda", "tpu"))(
            state, task.batches(cell)[0], jax.random.key(0)
        )
        assert set(exported.platforms) == {"cuda", "tpu"}


def test_every_preset_and_model_has_cells(words):
    for config in PRESETS.values():
        plan = dictionary_plan(config)
        assert plan.total() >= len(config.keys) * len(config.lookup_models)
    for model in WORDNET:
        assert node_cell(PRESETS["cpu"], words.graph, model, 5).model == model
