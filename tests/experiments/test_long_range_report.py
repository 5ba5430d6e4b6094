"""What the arena's report says and draws, of records that are made up."""

from __future__ import annotations

import json

import pytest

from experiments.core.store import ResultsStore, config_hash
from experiments.long_range import experiment, figures, speed
from experiments.long_range.report import REPORT

MEANS = {  # task -> model -> accuracies of three seeds
    "listops_500": {
        "softmax": (0.40, 0.41, 0.42),
        "linear": (0.30, 0.31, 0.32),
        "luna": (0.40, 0.42, 0.41),
        "gru": (0.17, 0.18, 0.20),
    },
    "pathfinder32_hard": {
        "softmax": (0.50, 0.51, 0.49),
        "linear": (0.52, 0.48, 0.50),
        "luna": (0.50, 0.49, 0.52),
    },
}
FLOORS = {"listops_500": (0.175, 0.18), "pathfinder32_hard": (0.50, 0.51)}


def record(config, **metrics):
    return dict(
        hash=config_hash(config),
        config=config,
        status="done",
        metrics=metrics,
        curves={"step": []},
        provenance={},
    )


@pytest.fixture(scope="module")
def records():
    config = experiment.Config(self_pretrain=100, learning_rates=(1e-3, 3e-3))
    found = []
    for task, models in MEANS.items():
        majority, linear = FLOORS[task]
        for name, value in (("majority", majority), ("linear", linear)):
            floor = dict(task=task, model=name, phase="baseline", seed=0)
            found.append(record(floor, test_accuracy=value))
        for model, values in models.items():
            scratch = experiment.study_of(config, task, model, 64, 512)
            found.append(record(scratch.grid[0].config(), val_loss=1.0))
            pretrained = experiment.study_of(
                config, task, model, 64, 512, scratch=scratch
            )
            for study, more in ((scratch, 0.0), (pretrained, 0.05)):
                for cell, value in zip(study.final(0), values, strict=True):
                    metrics = dict(test_accuracy=value + more, params=9)
                    if model == "softmax":
                        metrics |= dict(span=100 * value, spans=[[1.0, 2.0]])
                    found.append(record(cell.config(), **metrics))
    return found


@pytest.fixture(scope="module")
def written(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arena")
    models = {name: dict(seconds=0.1, bytes=2**20) for name in ("softmax", "linear")}
    measured = dict(length=1024, batch_size=4, models=models)
    (folder / figures.SPEED).write_text(json.dumps(measured))
    REPORT.write(records, folder)
    return folder, (folder / "report.md").read_text("utf-8")


def test_words_say_who_is_near_softmax_who_loses_and_where_nothing_learns(written):
    _, text = written
    assert "Within the interval of softmax everywhere: luna (2 of 2 told)" in text
    assert "* linear loses on listops_500 (width 64) −.100." in text
    assert "pathfinder32_hard: no model is clearly above majority, .500" not in text
    assert "listops_500: not clearly above majority: gru" in text


def test_tables_have_floors_and_numbers_of_others(written):
    _, text = written
    assert "| majority | .175 |" in text and "| logistic regression | .180 |" in text
    row = next(x for x in text.splitlines() if x.startswith("| linear | .310"))
    assert "16.1 %" in row and "−.100 [" in row
    assert "* LRA: Tay et al." in text and "of the official data" in text


def test_pretraining_stands_beside_scratch(written):
    _, text = written
    assert "| listops_500 | linear | .310 ± .010 | .360 ± .010 | +.050 [" in text
    assert "linear − softmax −.100 from scratch, −.100" in text


def test_figures_are_drawn_of_what_was_stored(written):
    folder, text = written
    for name in ("spans", "speed", "pathfinder"):
        assert f"({name}.png)" in text
        assert (folder / f"{name}.png").stat().st_size > 4_000


def test_speed_is_measured_of_the_models_of_a_folder(records, tmp_path):
    store = ResultsStore(tmp_path)
    for one in (r for r in records if r["config"]["model"] == "softmax"):
        kept = {name: one[name] for name in ("status", "metrics", "curves")}
        store.put(one["config"], wall_time_s=1.0, **kept)
    assert speed.main([str(tmp_path), "--length", "16", "--repeats", "1"]) == 0
    found = json.loads((tmp_path / figures.SPEED).read_text())
    (measured,) = found["models"].values()
    assert measured["seconds"] > 0 and measured["bytes"] > 0 and "provenance" in found


def test_random_data_of_a_length_are_one_part():
    data = speed.random_data(8, 3)
    assert data.length == 8 and len(data.test.labels) == 3
