"""What is committed of the experiments: reports and figures follow from results."""

from __future__ import annotations

import json
import pathlib
import re
import statistics

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.core import report, run
from experiments.core.store import read_jsonl
from experiments.data.images import unpack
from experiments.positions.figures import WORDS

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = {f: run.find(name) for name in run.names() for f in run.find(name).committed}
QUOTED = re.compile(r"\.\d{3,4} ± \.\d{3,4}")
NAMES = {folder: f"{found.name}-{folder.name}" for folder, found in FOLDERS.items()}


# --- what the figures have to show, from the records alone -------------------------


def read(folder):
    """Finished records of seeds that count, baselines too."""
    records = read_jsonl(folder / "results.jsonl")
    return [r for r in records if r["config"]["phase"] != "tune"]


def means(records, key, value):
    """Key -> mean of a value over the records that have it; None keys are left out."""
    found = {}
    for record in records:
        if record["status"] == "done" and (name := key(record)) is not None:
            if (number := value(record)) is not None:
                found.setdefault(name, []).append(number)
    return {name: statistics.fmean(numbers) for name, numbers in found.items()}


def metric(name):
    return lambda record: record["metrics"].get(name)


def lines(axes):
    """Label -> y of a panel's lines."""
    found = [line for line in axes.get_lines() if line.get_label()[0] != "_"]
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in found}


def all_in(panel, values, digits=9):
    """Every y of the panel's lines is one of the values."""
    known = np.sort(np.asarray(list(values), float))
    for label, y in lines(panel).items():
        for number in y:
            assert np.abs(known - number).min() < 10.0**-digits, (label, number)


def curves(record, name):
    """The mean curves of all settings."""
    groups = report.grouped(record, report.settings_of).values()
    kept = [[r["curves"][name] for r in g if name in r["curves"]] for g in groups]
    return [number for some in kept if some for number in np.mean(some, axis=0)]


def check_crossing(figure, records):
    """Accuracy of speech, its gaps, and gaps of text and images."""
    spoken = [r for r in records if r["config"]["task"].startswith("phones")]
    images = [r for r in records if r not in spoken]

    def of(record):
        """The network and N: seeds differ in nothing else."""
        config = {k: v for k, v in record["config"].items() if k != "seed"}
        return json.dumps(config, sort_keys=True), record["config"]["n"]

    for panels, some, score in (
        (figure.axes[:2], spoken, "test_windows_accuracy"),
        (figure.axes[2:], images, "test_accuracy"),
    ):
        found = means(some, of, metric(score))
        gaps = [
            a - b
            for (_, n), a in found.items()
            for (_, m), b in found.items()
            if n == m
        ]
        for axes in panels:
            all_in(axes, found.values() if axes is figure.axes[0] else gaps)
    assert len(lines(figure.axes[0])) >= 9 and len(lines(figure.axes[1])) == 5


def check_data_scaling(name, figure, records, folder):
    if name == "crossing":
        return check_crossing(figure, records)
    (axes,) = figure.axes
    task = name.partition("_")[2]
    some = [r for r in records if r["config"]["task"] == task]
    model = lambda r: (r["config"]["model"], r["config"].get("size"), r["config"]["n"])  # noqa: E731
    accuracy = means(some, model, metric("test_accuracy"))
    if name.startswith("curve"):
        return all_in(axes, accuracy.values())
    return all_in(
        axes,
        [
            value - other
            for (_, _, n), value in accuracy.items()
            for (model, _, m), other in accuracy.items()
            if n == m and model in ("resnet", "cnn", "window", "gru")
        ],
    )


def check_positions(name, figure, records, folder):
    final = [r for r in records if r["config"]["phase"] == "final"]
    if name == "parameters":
        drawn = lines(figure.axes[0])
        for record in final:
            at_64 = record["metrics"]["position_params"]
            label = WORDS[record["config"]["positions"]]
            if at_64 and label != WORDS["learned"]:
                assert set(drawn[label]) == {at_64}
        return None
    task = name.removeprefix("lengths_")
    some = [r for r in final if r["config"]["task"].split("_by")[0] == task]
    encoding = lambda r: WORDS[r["config"]["positions"]]  # noqa: E731
    bins = [m for m in some[0]["metrics"] if m.startswith("test_accuracy_length")]
    bins.sort(key=lambda name: int(name.split("_")[-1]))
    found = [means(some, encoding, metric(name)) for name in bins]
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert {axes.get_title() for axes in panels} == {*found[0]} - {WORDS["none"]}
    for axes in panels:
        drawn = lines(axes)
        for label, y in {WORDS["none"]: drawn["no positions"], **drawn}.items():
            if label in found[0]:
                np.testing.assert_allclose(y, [by[label] for by in found])
    return None


def check_sequence_labelling(name, figure, records, folder):
    if name.startswith("maps"):
        entry = json.loads((folder / "maps.json").read_text())["maps"][
            int(name[5:]) - 1
        ]
        shown = [image.get_array() for axes in figure.axes for image in axes.images]
        heads = [head for layer in entry["weights"] for head in layer]
        return np.testing.assert_array_equal(np.asarray(shown), heads)
    if name == "heads":
        seeds = json.loads((folder / "heads.json").read_text())["seeds"]
        looks = [axes.images[0].get_array() for axes in figure.axes[: 2 * len(seeds)]]
        for look, entry in zip(looks[::2], seeds, strict=True):
            known = sorted(row for layer in entry["offsets"] for row in layer)
            assert sorted(map(list, look)) == known
        return None
    final = [r for r in records if r["config"]["phase"] == "final"]
    floors = [
        r["metrics"]["test_accuracy"]
        for r in records
        if r["config"]["phase"] == "baseline"
    ]
    read = lambda m: [m["test_accuracy"], m["train_accuracy"]]  # noqa: E731
    groups = list(report.grouped(final, report.settings_of).values())
    known = [np.mean([read(r["metrics"]) for r in group], axis=0) for group in groups]
    all_in(figure.axes[0], [*np.concatenate(known), *floors])
    if name.startswith("window"):
        counts = [group[0]["metrics"] for group in groups]
        all_in(figure.axes[1], [m["params"] - m["input_params"] for m in counts])


def check_offsets(name, figure, records, folder):
    final = [r for r in records if r["config"]["phase"] == "final"]
    groups = list(report.grouped(final, report.settings_of).values())
    known = [np.mean([r["metrics"]["test_accuracy_known"] for r in g]) for g in groups]
    if name == "k_back":
        accuracy, parameters = figure.axes
        shown = lines(accuracy)
        guess = next(y[0] for label, y in shown.items() if "always" in label)
        all_in(accuracy, [*known, guess])
        counts = [g[0]["metrics"] for g in groups]
        return all_in(parameters, [m["params"] - m["input_params"] for m in counts])
    shown = figure.axes[0].images[0].get_array().ravel()
    np.testing.assert_allclose(np.sort(shown), np.sort(known))


def check_attention_as_conv(name, figure, records, folder):
    final = [r for r in records if r["config"]["phase"] == "final"]
    first = [r for r in final if r["config"]["seed"] == 0]
    if name == "starts":
        model = lambda r: (  # noqa: E731
            r["metrics"].get("baseline", r["config"]["model"]),
            r["config"].get("start"),
            r["metrics"].get("n", r["config"].get("n")),
        )
        short = [r for r in records if r["config"].get("updates", 0) < 20_000]
        accuracy = means(short, model, metric("test_accuracy"))
        return all_in(figure.axes[0], accuracy.values())
    if name.startswith("maps"):
        shown = [image.get_array() for axes in figure.axes for image in axes.images]
        (maps,) = (
            r["metrics"]["maps"]
            for r in first
            if r["config"]["model"] == name.removeprefix("maps_")
        )
        heads = [head for layer in maps for head in layer]
        return np.testing.assert_allclose(np.asarray(shown), heads)
    if name == "teacher_places":
        some = [r for r in final if "kernel" in r["config"]]
        shares = [
            x / side**2
            for side in {r["config"]["kernel"] for r in some}
            for x in curves([r for r in some if r["config"]["kernel"] == side], "found")
        ]
        for axes in figure.axes:
            all_in(axes, shares)
        return None
    if name == "long":
        shares, distances = figure.axes
        for y in lines(shares).values():  # of 9 heads in each of 3 seeds
            np.testing.assert_allclose(27 * y, np.round(27 * y), atol=1e-9)
        some = [r for r in final if r["config"].get("start")]
        updates = max(r["config"]["updates"] for r in some)
        longest = [r for r in some if r["config"]["updates"] == updates]
        some = [r["curves"]["centres"] for r in longest]
        apart = np.asarray(some) - np.round(some)
        found = np.linalg.norm(apart, axis=-1).mean(-1).mean(0)
        drawn = lines(distances)
        for layer in range(found.shape[1]):
            np.testing.assert_allclose(drawn[f"layer {layer + 1}"], found[:, layer])
        return None
    centres = [
        centre
        for r in first
        for moment in r["curves"].get("centres", ())
        for centre in np.reshape(moment, (-1, 2))
    ]
    known = {tuple(np.round(centre, 6)) for centre in centres}
    heads = {r["config"].get("num_heads") for r in first}
    for axes in figure.axes:
        _, *dots = axes.get_lines()  # the query is the first
        assert len(dots) in heads
        for dot in dots:
            ((x,), (y,)) = dot.get_data()
            assert (round(y, 6), round(x, 6)) in known


def check_attention_vs_rnn(name, figure, records, folder):
    panels = figure.axes
    if name == "copy":
        some = [r for r in records if r["config"]["task"] == "copy"]
        for axes, curve in zip(panels, ("loss", "accuracy"), strict=True):
            guess = lines(axes)["uniform guess"][0]
            all_in(axes, [*curves(some, curve), guess])
    elif name == "images":
        bits = means(records, lambda r: r["config"]["model"], metric("test_bits"))
        seeds = [r["metrics"].get("test_bits") for r in records]
        known = [x for x in [*seeds, *bits.values(), 0.0, 1.0] if x is not None]
        for line in panels[0].get_lines():
            for x in np.asarray(line.get_xdata(), float):
                assert np.abs(np.asarray(known) - x).min() < 1e-9
    elif name in ("chains", "devices"):
        found = json.loads((folder / "parallel.json").read_text())
        read = dict(chains="operations", devices="seconds")[name]
        known = [row[read] for row in found[name]]
        for axes in panels:
            all_in(axes, known if name == "chains" else [1e3 * min(x) for x in known])
    else:
        timing = {}
        for file in ("timing.json", "generating.json"):  # which has the newer of both
            if (folder / file).is_file():
                timing |= json.loads((folder / file).read_text())
        if name == "lead":
            tokens = (timing.get("growth") or timing)["tokens"]["seconds"]
            known = [1e3 * t for seconds in tokens.values() for t in seconds]
            return all_in(panels[1], known)
        if name == "tokens":
            for y, seconds in zip(
                lines(panels[0]).values(),
                timing["tokens"]["seconds"].values(),
                strict=True,
            ):
                np.testing.assert_allclose(y, 1e3 * np.asarray(seconds))
        for axes, field, unit in zip(
            panels, ("seconds", "temp_bytes"), (1, 2.0**-20), strict=False
        ):
            if name != "tokens":
                all_in(axes, [unit * r[field] for r in timing[name] if r.get(field)])


def check_graphs(name, figure, records, folder):
    some = [r for r in records if r["config"]["task"] == name]
    if name == "dictionary":
        for axes in figure.axes:
            all_in(axes, curves(some, "accuracy"))
        return
    score = "test_accuracy" if name == "wordnet" else "test_rmse"
    model = lambda r: (  # noqa: E731
        r["metrics"].get("baseline", r["config"]["model"]),
        r["config"].get("n"),
    )
    known = list(means(some, model, metric(score)).values())
    for r in some:  # floors of several numbers of labels
        known += [v for k, v in r["metrics"].items() if k.startswith(f"{score}_")]
    known = np.array(known + [a - b for a in known for b in known])
    for axes in figure.axes:
        shown = [line for line in axes.get_lines() if line.get_label()[0] != "_"]
        assert len(shown) >= 3
        for line in shown:
            (x,) = line.get_xdata()
            assert np.abs(known - x).min() < 1e-9, line.get_label()


def check_long_range(name, figure, records, folder):
    if name == "pathfinder":  # examples, drawn anew
        return
    final = [r for r in records if r["config"]["phase"] == "final"]
    floors = [r["metrics"]["test_accuracy"] for r in records if r not in final]
    row = lambda r: report.settings_of(r)  # noqa: E731
    if name == "recall":
        names = {m for r in final for m in r["metrics"] if "_pairs_" in m}
        known = [x for m in names for x in means(final, row, metric(m)).values()]
        for axes in figure.axes:
            all_in(axes, [*known, *floors])
        return
    read = "span" if name == "spans" else "test_accuracy"
    known = np.array([*means(final, row, metric(read)).values()])
    for line in figure.axes[0].get_lines():
        if name == "spans":
            (x,) = line.get_xdata()
            assert np.abs(known - x).min() < 1e-9, line.get_label()
        else:
            (y,) = line.get_ydata()
            assert known.min() <= y <= known.max()


def of_model(record):
    return record["config"]["model"]


def pictured(images, figure):
    """Each of these pictures is one that the figure shows."""
    shown = [np.asarray(i.get_array(), float) for a in figure.axes for i in a.images]
    for image in images:
        image = np.asarray(image, float)
        assert any(x.shape == image.shape and np.allclose(x, image) for x in shown)


def check_seq2seq(name, figure, records, folder):
    final = [r for r in records if r["config"]["phase"] == "final"]
    first = {of_model(r): r for r in final if r["config"]["seed"] == 0}
    if name == "scores":
        for axes, score in zip(figure.axes, ("test_per", "test_wer"), strict=True):
            found = means(records, of_model, metric(score))
            known = 100 * np.array(list(found.values()))
            for line in axes.get_lines():
                if line.get_label()[0] != "_":
                    (x,) = line.get_xdata()
                    assert np.abs(known - x).min() < 1e-9, line.get_label()
        return
    if name.startswith("alignments"):
        shown = first[name.removeprefix("alignments_")]["metrics"]["alignments"]
        pictured((np.mean(one["weights"], axis=0) for one in shown), figure)
        return
    lengths = {
        model: np.concatenate([r["metrics"]["lengths"] for r in some])
        for model, some in report.grouped(final, of_model).items()
    }
    if name == "length_histograms":
        drawn = sorted(a.collections[0].get_array().sum() for a in figure.axes)
        assert drawn == sorted(rows[:, 3].sum() for rows in lengths.values())
        return
    known = [*range(100)]  # the diagonal
    for rows in lengths.values():
        for right in np.unique(rows[:, 1]):
            some = rows[rows[:, 1] == right]
            known.append(np.average(some[:, 2], weights=some[:, 3]))
    all_in(figure.axes[0], known)


def check_detection(name, figure, records, folder):
    final = [r for r in records if r["config"]["phase"] == "final"]
    first = {of_model(r): r["metrics"] for r in final if r["config"]["seed"] == 0}
    side = int(final[0]["config"]["task"].split("-")[1].removesuffix("px"))
    if name == "curves":
        all_in(figure.axes[0], curves(final, "val_ap50"))
    elif name == "scenes":
        for metrics in first.values():
            shown = (unpack(one["image"], (side, side)) for one in metrics["shown"])
            pictured(shown, figure)
            sure = sum(e[0] > 0.5 for one in metrics["shown"] for e in one["found"])
            assert sum(len(a.texts) for a in figure.axes) >= sure
    elif name == "queries":
        points = sum(len(c.get_offsets()) for a in figure.axes for c in a.collections)
        assert points == len(first["detr"]["queries"])
    else:
        size = first["detr"]["map_size"]
        weights = [np.reshape(w, size) for _, w in first["detr"]["place_looks"]]
        pictured(weights, figure)


def check_gan(name, figure, records, folder):
    final = [r for r in records if r["config"]["model"] == "gan"]
    first = [r["metrics"] for r in final if r["config"]["seed"] == 0]
    if name == "curves":
        for axes, curve in zip(
            figure.axes,
            ("val_fid", "generator_gamma", "discriminator_gamma"),
            strict=True,
        ):
            sized = [r | {"curves": {curve: np.abs(r["curves"][curve])}} for r in final]
            all_in(axes, curves(sized, curve))
        return
    side = first[0]["image_shape"][0]
    if name == "looks":
        (seen,) = (m for m in first if "looks" in m)
        pictured(unpack(seen["looked"], (-1, side, side)), figure)
        places = int(np.sqrt(len(seen["looks"][0][0])))
        looks = np.reshape(seen["looks"], (-1, places, places))
        pictured(looks, figure)
        return
    key = {"samples": "shown", "between": "between"}[name]
    for metrics in first:
        grid = unpack(metrics[key], (-1, len(metrics["classes"]), side, side))
        pictured([np.concatenate([np.hstack(row) for row in grid])], figure)


# --- the tests ---------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES.get)
def test_a_report_and_its_figures_are_what_the_results_give(
    folder, tmp_path, monkeypatch
):
    drawn = {}

    def keep(figure, path, **_):
        pathlib.Path(path).touch()
        drawn[path.name[1:].split(".png")[0]] = figure

    monkeypatch.setattr(Figure, "savefig", keep)  # pixels take most of the time
    experiment = FOLDERS[folder]
    report.redraw(experiment.report, folder, tmp_path)
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert written == (folder / "report.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([^)]+)\.png\)", written))
    assert set(drawn) == named == {path.stem for path in folder.glob("*.png")}
    records = read(folder)
    for figure in drawn:
        globals()[f"check_{experiment.name}"](figure, drawn[figure], records, folder)
        axes = drawn[figure].axes
        assert any(a.get_lines() or a.images or a.collections for a in axes), figure


def test_every_value_that_is_quoted_stands_in_a_report():
    reports = "".join((f / "report.md").read_text(encoding="utf-8") for f in FOLDERS)
    text = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    lines = [
        line
        for line in text.splitlines()
        if "python -m experiments." in line and "data_scaling" not in line
    ]
    quotes = [quote for line in lines for quote in QUOTED.findall(line)]
    assert len(quotes) >= 8
    for quote in quotes:
        assert quote in reports, quote
