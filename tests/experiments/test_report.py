"""Declared reports: rows, tables, and what they say beside them."""

from __future__ import annotations

import math
import pathlib

import pytest

from experiments import __main__ as program
from experiments.core import report
from experiments.core.store import ResultsStore
from experiments.positions import report as positions
from experiments.sequence_labelling import report as labelling


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
    assert capsys.readouterr().out.endswith("experiments/positions/results/report.md\n")
    assert (tmp_path / "out" / "lengths_order.png").is_file()


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


def encodings(**shortest):
    metric = "test_accuracy_length_1_9"
    spread = (-0.0001, 0.0, 0.0001)
    return [
        row([mean + x for x in spread], metric, positions=name)
        for name, mean in shortest.items()
    ]


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_the_order_is_learnt_from_midway_between_none_and_the_best(scale):
    group = encodings(none=0.9 - scale / 2, shaw=0.9, floater=0.9 - 0.45 * scale)
    needed = positions.threshold(group, "test_accuracy_length_1_9")
    assert needed == pytest.approx(0.9 - scale / 4)


def test_nothing_is_learnt_where_none_is_clearly_behind():
    metric = "test_accuracy_length_1_9"
    assert positions.threshold(encodings(none=0.9, shaw=0.9), metric) == math.inf
    assert positions.threshold(encodings(shaw=0.9), metric) == 0.0


def test_what_was_not_learnt_or_cannot_be_told_is_no_induction(tmp_path):
    records = []
    for name, short in (
        ("none", 0.9),
        ("shaw", 0.92),
        ("floater", 0.901),
        ("alibi", 1),
    ):
        for seed in range(3):
            found = dict(m_test_accuracy_length_1_9=short + 1e-4 * seed)
            found |= dict(m_test_accuracy_length_10_20=short - 0.1)
            records.append(
                record(
                    seed,
                    task="words",
                    positions=name,
                    learning_rate=1e-3,
                    train_length=9,
                    updates=5,
                    **found,
                )
            )
    # ALiBi is the best here, which tells nothing of what the others learnt.
    written = positions.REPORT.write(records, tmp_path)
    cells = {
        line.split("|")[1].strip(): line.split("|")[4].strip()
        for line in written.splitlines()
        if line.startswith("| ")
    }
    assert cells["none"] == "–" and cells["alibi"] == "void"
    assert cells["shaw"].startswith("−.1") and cells["floater"] == "not learnt"


LABELLER = dict(
    model="transformer",
    window=None,
    left=None,
    right=None,
    n=None,
    updates=9,
    num_heads=4,
    depth=2,
    attention="dot_product",
    positions="rope",
    learning_rate=1e-3,
)


def labellers(task, variants, metric="test_accuracy", **more):
    return [
        record(
            s,
            task=task,
            **(LABELLER | change),
            **{f"m_{metric}": mean + 1e-4 * s},
            **more,
        )
        for change, mean in variants
        for s in range(3)
    ]


def test_models_behind_a_baseline_are_said_first(tmp_path):
    variants = [({}, 0.9), (dict(model="window", window=0), 0.8)]
    records = labellers("pos", variants)
    floor = dict(
        task="pos", model="most_frequent", phase="baseline", m_test_accuracy=0.85
    )
    written = labelling.REPORT.write([*records, record(0, **floor)], tmp_path)
    said = "**Not ahead of the baseline most frequent (.8500): fully connected, each"
    assert said in written and written.index(said) < written.index("## Models")
    floor["m_test_accuracy"] = 0.95
    written = labelling.REPORT.write([*records, record(0, **floor)], tmp_path)
    assert "**No model beats the baseline most frequent (.9500):" in written


def test_encodings_worse_than_none_and_unfair_scores_are_told(tmp_path):
    whole = labellers("pos", [({}, 0.9)])
    varied = [
        (dict(positions="none"), 0.5),
        (dict(positions="sinusoidal"), 0.4),
        (dict(positions="rope"), 0.6),
        (dict(attention="additive"), 0.55),
    ]
    varied = [(change | dict(n=100, updates=3), mean) for change, mean in varied]
    labelling.REPORT.write([*whole, *labellers("pos", varied)], tmp_path)
    written = (tmp_path / "report.md").read_text()
    assert "sinusoidal −.1000 [−.1000, −.1000], **worse than none**" in written
    assert "rope +.1000 [+.1000, +.1000]; sinu" in written
    assert "no fair comparison here: RoPE" in written
    labelling.REPORT.write([*whole, *labellers("pos", varied[:3])], tmp_path)
    assert "fair" not in (tmp_path / "report.md").read_text()


def test_whole_utterances_stand_beside_their_crops(tmp_path):
    variants = [({}, 0.9), (dict(model="gru"), 0.8)]
    cut = labelling.REPORT.write(labellers("phones", variants), tmp_path)
    assert "| model | crops of 2.56 s |" in cut and "whole utterances" not in cut
    both = [
        *labellers("phones", variants[:1], m_test_whole_accuracy=0.5),
        *labellers("phones", variants[1:], m_test_whole_accuracy=0.7),
    ]
    written = labelling.REPORT.write(both, tmp_path)
    assert "| model | whole utterances | crops of 2.56 s |" in written
    assert written.index("| bidirectional GRU | .7000") < written.index("| Transformer")
