"""What enters the hash of a record: all that changes a number, data by its digest."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib

import numpy as np
import pytest

from experiments.attention_as_conv import experiment as conv
from experiments.attention_vs_rnn import experiment as rnn
from experiments.core import identity, store
from experiments.data import graphs, molecules, sequence_tasks
from experiments.data import images as data
from experiments.data.sequences import Part, SequenceData
from experiments.data_scaling import experiment as scaling
from experiments.data_scaling.tasks import task_name
from experiments.graphs import experiment as graph
from experiments.graphs import regression
from experiments.positions import experiment as positions
from experiments.sequence_labelling import experiment as labelling

ROOT = pathlib.Path(__file__).parents[2] / "experiments"
RESULTS = sorted(ROOT.glob("*/results/**/results.jsonl"))


def committed(folder):
    return store.read_jsonl(ROOT / folder / "results.jsonl")


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_a_committed_record_has_the_hash_of_its_config(path):
    records = store.read_jsonl(path)
    assert records
    for record in records:
        assert store.config_hash(record["config"]) == record["hash"]


# ---------------------------------------- what the present code plans, without data


def images(name="fashion_mnist", count=60_000, side=28, **changes):
    pixels = np.broadcast_to(np.uint8(0), (count, side, side, 1))
    labels = (np.arange(count) % 10).astype(np.int32)
    known = identity.COMMITTED.get(name, {})
    settings = dict(
        name=name,
        source="a stub",
        train_images=pixels,
        train_labels=labels,
        test_images=pixels[:1000],
        test_labels=labels[:1000],
        class_names=tuple(map(str, range(10))),
        sha256=known.get("data_sha256", "0" * 64),
    )
    return data.Dataset(**(settings | changes))


def sequences(name, monkeypatch):
    """A stub; its content is taken to be what committed records had."""
    one = np.zeros((2, 9), np.int32), np.zeros(2, np.int32)
    part = Part([one[0]] * 5_000, [one[1]] * 5_000)
    monkeypatch.setattr(sequence_tasks, "load_task", lambda task: made(task))
    monkeypatch.setattr(identity, "of_sequences", lambda data: ())

    def made(task):
        return SequenceData(
            task, "a stub", "0" * 64, (2,) * 9, ("a", "b"), part, part, part, (16,)
        )


def stub_graphs(monkeypatch):
    words = dataclasses.replace(
        graphs.toy_graph(9, seed=0),
        labels=np.zeros(33_000, np.int32),
        kind_names=("@", "@i", "~", "~i"),
        sha256=identity.COMMITTED["wordnet"]["data_sha256"],
    )
    monkeypatch.setattr(graphs, "load_wordnet", lambda: words)
    toys = molecules.toy_molecules()
    monkeypatch.setattr(
        molecules,
        "load_molecules",
        lambda name, limit: dataclasses.replace(
            toys, name=name, sha256=identity.COMMITTED[name]["data_sha256"]
        ),
    )
    # As many updates as with the real ones, and their digests.
    lengths = {}
    for record in committed("graphs/results"):
        task, updates = record["config"]["task"], record["config"].get("updates")
        lengths[task] = updates or lengths.get(task)
    epochs = dict(melting_point="epochs", logp="logp_epochs")

    class Epochs:
        def __init__(self, task, *rest):
            passes = getattr(graph.PRESETS["cpu"], epochs[task.data.name])
            self.size = lengths[task.data.name] // passes

    monkeypatch.setattr(regression, "Epochs", Epochs)
    differs = identity.differs

    def as_committed(task, **made_of):
        for name in ("graphs", "split"):
            if name in made_of:
                made_of[name] = identity.COMMITTED[task][name]
        return differs(task, **made_of)

    monkeypatch.setattr(identity, "differs", as_committed)


def planned(plans):
    """Hashes of all records that there may be, whatever tuning chooses."""
    return {store.config_hash(made) for plan in plans for made in plan.possible()}


def missing(folder, hashes):
    return [r["config"] for r in committed(folder) if r["hash"] not in hashes]


@pytest.mark.parametrize("preset", ["pos", "pos_fine", "phones"])
def test_labelling_plans_the_cells_that_are_committed(preset, monkeypatch):
    sequences(preset, monkeypatch)
    plans = labelling.plans(labelling.PRESETS[preset])
    lost = missing(f"sequence_labelling/results/{preset}", planned(plans))
    # Additive scores with RoPE: to be run again with T5's bias.
    assert {c["positions"] for c in lost if c["attention"] == "additive"} <= {"rope"}
    assert all(c["attention"] == "additive" for c in lost)


def test_positions_plans_the_cells_that_are_committed(monkeypatch):
    sequences("pos", monkeypatch)
    plans = positions.plans(positions.PRESETS["cpu"])
    assert not missing("positions/results", planned(plans))


def test_image_experiments_plan_the_cells_that_are_committed(monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, **_: images())
    monkeypatch.setattr(rnn, "load", lambda name: images())
    some = ("cpu", "teacher", "long")
    plans = [plan for name in some for plan in conv.plans(conv.PRESETS[name])]
    assert not missing("attention_as_conv/results", planned(plans))
    plans = rnn.plans(rnn.PRESETS["cpu"])
    assert not missing("attention_vs_rnn/results", planned(plans))
    plans = scaling.plans(scaling.PRESETS["cpu"])
    preset = scaling.PRESETS["scenes"]
    name = task_name("scenes", preset.scenes)
    # Their records name their content.
    (content,) = {
        config["differs"]["data_sha256"]
        for r in committed("data_scaling/results")
        if (config := r["config"])["task"] == name
    }
    pool = images(name, preset.scenes.pool, side=30, sha256=content)
    monkeypatch.setattr(scaling, "load_task", lambda *_, **__: pool)
    leaking = dataclasses.replace(preset, models=("resnet:mu_item",))
    first = dataclasses.replace(leaking, tune_updates=1_500)  # as it was tuned
    for config in (preset, leaking, first):
        plans += scaling.plans(config)
    assert not missing("data_scaling/results", planned(plans) | of_sequences())


def of_sequences():
    """Hashes of the records of speech and text that data scaling may have."""
    records = [r["config"] for r in committed("data_scaling/results")]
    found = []
    for name, task in (("phones", "phones_64"), ("pos", "pos")):
        preset = scaling.PRESETS[name]
        made_of = next((c.get("differs", {}) for c in records if c["task"] == task), {})
        differs = tuple(sorted(made_of.items()))
        largest = dataclasses.replace(preset, ns=preset.ns[-1:])
        longer = dataclasses.replace(largest, updates=3_200)
        nearer = dataclasses.replace(largest, models=("attention:3", "attention:15"))
        for config in (preset, longer, nearer):
            studies = scaling.sequences.studies_of(config, task, differs)
            found += [cell.config() for study in studies for cell in study.possible()]
        for n, seed, model in itertools.product(
            preset.ns, range(preset.seeds), scaling.sequences.floors_of(task)
        ):
            made = dict(task=task, model=model, n=n, seed=seed, phase="baseline")
            found.append(identity.with_differs(made, differs))
    return set(map(store.config_hash, found))


def test_graphs_plans_the_cells_that_are_committed(monkeypatch):
    stub_graphs(monkeypatch)
    cpu = graph.PRESETS["cpu"]
    one = dataclasses.replace(cpu, own_splits=False, molecule_seeds=3, trees=100)
    found = planned(graph.plans(cpu)) | planned(graph.plans(one))
    lost = missing("graphs/results", found)
    # Scored on 480 of their 500 graphs: to be run again.
    assert all(c["task"] == "dictionary" and "held_out" not in c for c in lost)


def test_the_table_holds_what_the_data_are():
    order = sequence_tasks.load_task("order")
    assert identity.of_sequences(order) == ()
    # A changed tokenisation is noticed, also one that keeps source and shapes.
    first, *rest = order.train.inputs
    other = dataclasses.replace(order.train, inputs=[(first + 1) % 8, *rest])
    changed = dataclasses.replace(order, train=other)
    assert dict(identity.of_sequences(changed)).keys() == {"data_sha256"}


# -------------------------------------------------------------- what is another cell


def test_sound_that_differs_by_rounding_is_the_same_and_other_sound_is_not(monkeypatch):
    toy = sequence_tasks.load_task("toy_phones")

    def scaled(factor):
        inputs = [x * np.float32(factor) for x in toy.train.inputs]
        part = dataclasses.replace(toy.train, inputs=inputs)
        return dict(identity.of_sequences(dataclasses.replace(toy, train=part)))

    had = scaled(1.0)
    monkeypatch.setitem(
        identity.COMMITTED,  # type: ignore[arg-type]
        "toy_phones",
        had | dict(data_sketch=_exact_sketch(toy)),
    )
    assert scaled(1.0) == scaled(1 + 1e-6) == {}
    assert scaled(1.1).keys() == {"data_sketch"}


def _exact_sketch(toy):
    parts = (toy.train, toy.validation, toy.test)
    return identity.sketch([x for part in parts for x in part.inputs])


def of_baseline(plan, name):
    (config,) = (b.config for b in plan.baselines if b.config["model"] == name)
    return store.config_hash(config)


def test_a_baseline_of_other_data_or_sizes_has_a_record_of_its_own(monkeypatch):
    stub_graphs(monkeypatch)
    monkeypatch.setattr(rnn, "load", lambda name: images())

    def plan(experiment, **changes):
        (found,) = experiment.plans(
            dataclasses.replace(experiment.PRESETS["cpu"], **changes)
        )
        return found

    for experiment, task, changes, name in (
        (graph, "logp", dict(trees=7), "forest split=4"),
        (graph, "wordnet", dict(node_ns=(50,)), "text"),
        (graph, "wordnet", dict(node_test=70), "majority"),
        (rnn, "images", dict(image_test=9), "uniform"),
    ):
        one, two = plan(experiment, task=task), plan(experiment, task=task, **changes)
        assert of_baseline(one, name) != of_baseline(two, name), changes
    one, two = (plan(graph, task="logp", trees=n) for n in (100, 7))
    assert of_baseline(one, "ridge split=1") == of_baseline(two, "ridge split=1")
    one, two = (plan(graph, task="wordnet", node_test=n) for n in (8_000, 6_000))
    assert planned([one]).isdisjoint(planned([two]))


def test_images_of_one_name_are_told_apart_by_their_content(monkeypatch):
    found = []
    for sha256 in ("1" * 64, "2" * 64):
        for name in ("npz:toy.npz", "fashion_mnist", "digits"):
            dataset = images(name, 200, sha256=sha256)
            monkeypatch.setattr(data, "load", lambda *_, d=dataset, **__: d)
            found.append(planned(conv.plans(conv.PRESETS["quick"])))
    assert len(set.union(*found)) == sum(map(len, found))


# ------------------------------------------------------------------------- reports


def record(seed, made, **differs):
    config = dict(task="t", model="m", phase="final", seed=seed)
    if differs:
        config["differs"] = differs
    return dict(config=config, provenance=dict(created_utc=made))


def test_a_report_mixes_no_records_of_two_kinds():
    old = [record(seed, "2026-01-01") for seed in range(3)]
    new = [record(0, "2026-02-01", data_sha256="x")]
    kept, left = identity.of_one_kind(old + new, [new[0]["config"]])
    assert (kept, left) == (new, 3)
    kept, left = identity.of_one_kind(old + new, [old[0]["config"]])
    assert (kept, left) == (old, 1)
    # Of a task that this run has not, the newest.
    assert identity.of_one_kind(new + old, []) == (new, 3)
