"""Declared reports: rows, tables, and what they say beside them."""

from __future__ import annotations

import pathlib

import pytest

from experiments import __main__ as program
from experiments.core import report
from experiments.core.store import ResultsStore


def record(seed, phase="final", **fields):
    metrics = {k[2:]: v for k, v in fields.items() if k.startswith("m_")}
    config = {k: v for k, v in fields.items() if not k.startswith("m_")}
    config |= {"seed": seed, "phase": phase}
    return dict(config=config, metrics=metrics, status="done", curves={})


def row(values, metric="test_accuracy", **config):
    records = [record(s, **config, **{f"m_{metric}": v}) for s, v in enumerate(values)]
    (found,) = report.rows_of(records)
    return found


def test_a_difference_is_paired_by_seed():
    one, two = row([0.5, 0.7, 0.9], model="a"), row([0.49, 0.69, 0.89], model="b")
    found, text = report.difference(one, two, "test_accuracy", 3)
    assert found.clear and text == "+.010 [+.010, +.010]"
    assert report.difference(two, one, "test_accuracy", 2)[1].startswith("−.01 [−.01")


def stored(folder, seeds):
    store = ResultsStore(folder)
    for seed in seeds:
        config = dict(phase="final", seed=seed, model="a")
        metrics = dict(test_accuracy=0.5 + 0.1 * seed)
        store.put(config, status="done", metrics=metrics, wall_time_s=1)
    return store


TOY = report.Report(
    title="# Toy",
    sections=(
        report.Section(
            title="## Model {model}",
            by=("model",),
            columns=(
                report.setting("model", "model"),
                report.score("accuracy", "test_accuracy", 2),
            ),
            floors=lambda group: [[name] for name in group.floors()],
            notes=("Measured.", lambda group: [str(group.measured("more.json"))]),
        ),
    ),
)


def test_a_report_is_redrawn_from_what_a_folder_holds(tmp_path):
    stored(tmp_path / "1", [0, 1, 2]).export_jsonl(tmp_path / "results.jsonl")
    stored(tmp_path, [0, 3])  # of another run, and one of the same
    (tmp_path / "more.json").write_text("7")
    assert len(report.load(tmp_path)) == 4
    out = tmp_path / "out"
    said = report.redraw(TOY, tmp_path, out)
    written = (out / "report.md").read_text()
    assert said == f"{written}\nReport and figures: {out}/report.md"
    rows = ["| model | accuracy |", "|---|---|", "| a | .65 ± .13 |"]
    parts = ["# Toy", "## Model a", "\n".join(rows), "Measured.", "7"]
    assert written == "\n\n".join(parts) + "\n"
    assert not (tmp_path / "report.md").exists()


def test_nothing_to_report_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cells and no results.jsonl"):
        report.redraw(TOY, tmp_path)
    with pytest.raises(ValueError, match="no finished cell to report"):
        TOY.write([], tmp_path)


def test_committed_folders_are_found_and_others_are_refused(tmp_path, capsys):
    assert program.main(["positions", "--redraw", str(tmp_path)]) == 2
    assert "no results.jsonl" in capsys.readouterr().err
    assert program.main(["unknown", "--redraw"]) == 2
    assert "experiment must be one of" in capsys.readouterr().err
    out = ["--redraw", "--out", str(tmp_path / "out")]
    assert program.main(["positions", *out]) == 0
    assert "experiments/positions/results/report.md\n" in capsys.readouterr().out
    assert (tmp_path / "out/positions/results/lengths_order.png").is_file()


def test_what_the_test_set_cannot_tell_is_named():
    rows = [row([0.8, 0.801, 0.802], model="near"), row([0.7, 0.8, 0.9], model="far")]
    columns = [report.setting("model", "model")]
    group = report.Group(rows, (), pathlib.Path(), rows, columns)

    def noted(size):
        return report.sampling("test_accuracy", lambda _: size, "items", 3)(group)

    said = noted(10_000)
    assert said[0].endswith("of the 10,000 items, √(p(1 − p)/m) = .004, in: near.")
    for size in (None, 10**9):
        assert noted(size) == []
