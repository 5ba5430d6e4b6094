"""What lies some places away: data, cells, plans, and what the report says of them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments.core import run
from experiments.core.store import ResultsStore
from experiments.data import sequence_tasks, sequences
from experiments.offsets import experiment
from experiments.offsets.cells import Known, Signs
from experiments.offsets.report import REPORT, most


def test_labels_are_the_symbols_and_the_signs_of_their_places():
    data = sequence_tasks.load_task("back:5")
    x, y = data.test.inputs[3][:, 0], data.test.labels[3]
    known = data.test.groups["known"][3]
    assert (y[known] == x[:-5]).all() and (y[~known] == len(data.class_names) - 1).all()
    data = sequence_tasks.load_task("relations:3")
    x, y, known = (
        part[1]
        for part in (data.test.inputs, data.test.labels, data.test.groups["known"])
    )
    assert known.tolist() == [False] * 2 + [True] * 29 + [False]
    for t in np.flatnonzero(known):
        signs = [x[t - o, j] > 0 for j, o in enumerate(sequence_tasks.RELATIONS[:3])]
        assert y[t] == signs[0] + 2 * signs[1] + 4 * signs[2]
    assert (y[~known] == 256).all()
    for name in ("back:0", "back:128", "relations:9", "back:x"):
        with pytest.raises(ValueError, match=r"must be .*, got"):
            sequence_tasks.load_task(name)


@pytest.mark.parametrize("kind", ["back", "relations"])
def test_what_is_not_known_is_not_learnt(kind):
    name = f"{kind}:2"
    data = sequence_tasks.load_task(name)
    task = (Signs if kind == "relations" else Known)(data)
    config = experiment.PRESETS["smoke" if kind == "back" else "smoke_relations"]
    (cell, *_) = (s.grid[0] for s in experiment.studies_of(config))
    cell = dataclasses.replace(cell, task=name)
    program = task.program(cell)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32),
        task.initial_params(cell),
    )
    batch = sequences.padded(data.test, [0, 1], 2, data.max_length)
    none = len(data.class_names) - 1

    @jax.jit
    def loss(labels):
        return program.loss(params, batch._replace(labels=labels), jax.random.key(0), 0)

    whole, metrics = loss(batch.labels)
    part = np.where(np.arange(data.max_length) < 9, none, batch.labels)
    predicted, each = map(np.asarray, program.more["predict"](params, batch))
    rest = part != none
    assert loss(part)[0] == pytest.approx(each[rest].mean(), rel=1e-4)
    assert loss(part)[0] != whole and (each[batch.labels == none] == 0).all()
    known = batch.labels != none
    right = (predicted == batch.labels)[known].mean()
    assert metrics["accuracy"] == pytest.approx(right, abs=1e-6)


def test_as_many_mixtures_as_numbers_tell_them_all():
    assert most(4, 4) == most(1, 8) == 1.0
    assert most(2, 1) == pytest.approx(0.75**2)  # a sum of two: each sign right in 3/4
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200_000, 4, 4))  # of vector i number j; j counts of i = j
    right = (np.sign(x.sum(axis=1)) == np.sign(np.einsum("nii->ni", x))).all(axis=1)
    assert right.mean() == pytest.approx(most(4, 1), abs=4e-3)
    assert most(8, 1) < most(8, 2) < most(8, 4) < most(8, 8)


def test_rates_are_taken_over_from_the_largest():
    studies = {s.name: s for s in experiment.studies_of(experiment.PRESETS["k_back"])}
    tuned = [name for name, s in studies.items() if s.tuned_by is None]
    assert tuned == ["back:64 self-attention", "back:64 window=64"]
    assert len(studies) == 6 + 6 * 7 / 2  # no window holds more than it must
    for small in ("back:8 window=4", "back:2 self-attention"):
        assert len(studies[small].grid) == len(studies[small].tuned_by.grid)
    studies = experiment.studies_of(experiment.PRESETS["relations"])
    assert [s.name for s in studies if s.tuned_by is None] == [
        f"relations:8 h={h}" for h in (1, 2, 4, 8)
    ]


@pytest.mark.parametrize("preset", experiment.EXPERIMENT.smallest)
def test_a_run_draws_what_it_found(preset, tmp_path):
    options = (
        f"--preset {preset} --learning-rates 0.01 --engine inline --out {tmp_path}"
    )
    assert run.run(experiment.EXPERIMENT, options.split()) == 0
    records = ResultsStore(tmp_path).records()
    assert all("test_accuracy_known" in r["metrics"] for r in records)
    written = (tmp_path / "report.md").read_text("utf-8")
    name = "relations" if preset.endswith("relations") else "k_back"
    assert f"({name}.png)" in written
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    assert written == (REPORT.write(records, tmp_path), written)[1]
