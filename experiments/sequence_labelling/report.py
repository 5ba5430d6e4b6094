"""Tables and figures of the experiment, from stored results alone.

`python -m experiments.sequence_labelling.report FOLDER` redraws report.md and the
figures of a folder that holds results.jsonl.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from attn_jax._program import program
from experiments.core.plots import Series, Styles, curve
from experiments.core.stats import summarize
from experiments.core.store import Record
from experiments.core.tables import (
    Row,
    difference,
    number,
    redraw,
    rows_of,
    sampling_note,
    table,
)

# Names of the figures about the window; models have the colours after theirs.
_WINDOW = ("window, test", "window, training", "window")
_BESIDE = ("self-attention, test", "self-attention, training")


#: Accuracy on whole utterances, where the test part holds pieces of them.
WHOLE = "test_whole_accuracy"


def model_name(row: Row) -> str:
    """What a row's model is, in words."""
    config = row.config
    if config["model"] == "window":
        if config["window"] == 0:
            return "fully connected, each vector"
        return f"fully connected, window ±{config['window']}"
    names = {"cnn": "1-D CNN", "gru": "bidirectional GRU"}
    names |= {"lstm": "bidirectional LSTM", "transformer": "Transformer"}
    name = names[config["model"]]
    if config.get("left") is not None:
        name += f", truncated to {config['left']} before, {config['right']} after"
    return name


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


# Labels of the test parts that committed records were scored on.
_TEST_LABELS = {"pos": 116_717, "pos_fine": 116_717, "phones": 62_633}


def _shows(metric: str) -> Callable[[Row], str]:
    return lambda row: number(row.of(metric))


def _accuracies(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    names = sorted(
        {
            name.removeprefix("test_accuracy_")
            for row in rows
            for name in (row.records[0]["metrics"] if row.records else {})
            if name.startswith("test_accuracy_")
        }
    )
    columns: list[tuple[str, Callable[[Row], str]]] = []
    spoken = rows[0].config["task"].startswith("phones") if rows else False
    if any(row.of(WHOLE) for row in rows):
        columns.append(("whole utterances", _shows(WHOLE)))
        if any(row.of(f"{WHOLE}_speech") for row in rows):
            columns.append(("whole utterances, speech", _shows(f"{WHOLE}_speech")))
    crops = "crops of 2.56 s" if spoken else "accuracy"
    columns.append((crops, _shows("test_accuracy")))
    for name in names:
        title = name.replace("_", " ")
        title = f"{crops}, {title}" if spoken else title
        columns.append((title, _shows(f"test_accuracy_{name}")))
    return columns


def _main_score(rows: Sequence[Row]) -> str:
    """Whole utterances where all rows were scored on them, else what all have."""
    return WHOLE if rows and all(row.of(WHOLE) for row in rows) else "test_accuracy"


def _beside_baselines(rows: Sequence[Row], records: Sequence[Record]) -> list[str]:
    """Names the models that do not beat every baseline of the same table."""
    floors = {
        record["config"]["model"].replace("_", " "): record["metrics"]["test_accuracy"]
        for record in records
        if record["config"].get("phase") == "baseline"
        and record["metrics"].get("test_accuracy") is not None
    }
    if not floors:
        return []
    floor = max(floors, key=lambda name: floors[name])
    scores = {model_name(row): row.of("test_accuracy") for row in rows}
    behind = [
        f"{name} ({number(found)})"
        for name, found in scores.items()
        if found is not None and found.mean <= floors[floor]
    ]
    if not behind:
        return []
    who = "No model beats" if len(behind) == len(rows) else "Not ahead of"
    value = f"{floors[floor]:.4f}".lstrip("0")
    return [f"**{who} the baseline {floor} ({value}): {', '.join(behind)}.**", ""]


def _remarks(group: Sequence[Row]) -> list[str]:
    """What rows of varied self-attention say beside one another, and what not."""
    text = []
    blind = [r for r in group if r.config["positions"] == "none" and r.records]
    for none in blind:
        same = {**none.config, "positions": None}
        found = []
        for row in group:
            if row.records and row is not none:
                if {**row.config, "positions": None} == same:
                    gap, said = difference(row, none, "test_accuracy")
                    worse = gap.clear and gap.mean < 0
                    name = row.config["positions"]
                    found.append(f"{name} {said}" + ", **worse than none**" * worse)
        if found:
            text.append(
                "Beside no positions (paired by seed, Student's interval of 95 %): "
                f"{'; '.join(found)}."
            )
    if any(
        r.config["attention"] == "additive" and r.config["positions"] == "rope"
        for r in group
    ):
        text.append(
            "Additive scores beside dot products are no fair comparison here: RoPE "
            "turns queries and keys so that their dot product depends on the offset "
            "alone, and it does so for dot products only."
        )
    return [line for part in text for line in (part, "")]


def _costs() -> list[tuple[str, Callable[[Row], str]]]:
    return [
        ("accuracy on training data", lambda row: number(row.of("train_accuracy"))),
        ("parameters", lambda row: _count(row.first("params"))),
        (
            "without input tables",
            lambda row: _count(
                (row.first("params") or 0) - (row.first("input_params") or 0)
            ),
        ),
        ("FLOPs a vector", lambda row: _count(row.first("flops"))),
        (
            "updates/s",
            lambda row: (
                f"{found.mean:.1f}" if (found := row.of("updates_per_s")) else "–"
            ),
        ),
        (
            "learning rate",
            lambda row: f"{row.config['learning_rate']:g}",
        ),
        ("diverged", lambda row: str(row.diverged)),
    ]


def _baseline_lines(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in records:
        if record["config"].get("phase") != "baseline":
            continue
        found = ", ".join(
            f"{name.removeprefix('test_').replace('_', ' ')} "
            + f"{value:.4f}".replace("0.", ".", 1)
            for name, value in sorted(record["metrics"].items())
        )
        lines.append(f"* {record['config']['model'].replace('_', ' ')}: {found}")
    return lines


def _is_default(config: dict[str, Any], base: dict[str, Any]) -> bool:
    names = ("num_heads", "attention", "positions", "depth", "left")
    return all(config[name] == base[name] for name in names)


def _title(config: dict[str, Any]) -> str:
    parts = [config["attention"]]
    if config["left"] is not None:
        parts[0] = f"truncated to {config['left']} before, {config['right']} after"
    parts.append(f"{config['num_heads']} heads")
    parts.append(f"{config['depth']} layers")
    parts.append(f"positions: {config['positions']}")
    return ", ".join(parts)


def _drawn(
    lines: dict[str, list[tuple[int, Row]]], metric: str = "test_accuracy"
) -> list[Series]:
    found = []
    for label, points in lines.items():
        scored = [(n, row.of(metric)) for n, row in sorted(points, key=lambda p: p[0])]
        shown = [(n, s) for n, s in scored if s is not None]
        if shown:
            found.append(
                Series(
                    label,
                    [n for n, _ in shown],
                    [s.mean for _, s in shown],
                    [s.std for _, s in shown],
                    [s.count for _, s in shown],
                )
            )
    return found


def _tuning(records: Sequence[Record]) -> str:
    """How the learning rates came about."""
    rates = sorted(
        {
            record["config"]["learning_rate"]
            for record in records
            if record["config"].get("phase") == "tune"
        }
    )
    if not rates:
        return "The learning rate was given, not chosen."
    tried = ", ".join(f"{rate:g}" for rate in rates)
    return (
        f"Each model's learning rate was chosen of {tried} on the validation "
        "part, with one seed and few updates."
    )


def _window_costs(
    points: Sequence[tuple[int, Row]], task: str, folder: pathlib.Path, styles: Styles
) -> list[str]:
    """Two more curves over the window: overfitting, and parameters."""
    measures: dict[str, tuple[str, Callable[[Any], float]]] = {
        "gap": (
            "accuracy on training data − test",
            lambda m: m["train_accuracy"] - m["test_accuracy"],
        ),
        "parameters": (
            "parameters without input tables",
            lambda m: m["params"] - m["input_params"],
        ),
    }
    for name, (ylabel, show) in measures.items():
        found = [
            (n, summarize([float(show(r["metrics"])) for r in row.records]))
            for n, row in points
            if row.records
        ]
        if not found:
            return []
        line = Series(
            "window",
            [n for n, _ in found],
            [s.mean for _, s in found],
            [s.std for _, s in found],
            [s.count for _, s in found],
        )
        curve(
            [line],
            folder / f"window_{name}.png",
            title=f"{task}: {ylabel}",
            ylabel=ylabel,
            xlabel="vectors that one label sees (log scale)",
            styles=styles,
        )
    return ["![gap](window_gap.png)", "", "![parameters](window_parameters.png)", ""]


def _streaming(folder: pathlib.Path) -> list[str]:
    """What streaming.json of the folder says, if there is one."""
    file = folder / "streaming.json"
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "## Speech as it comes",
        "",
        f"Seed 0 of each, on {found['test_utterances']} whole test utterances; sound "
        f"taken as it comes is compared with the whole on "
        f"{found['utterances_compared']} of them; times on {found['cores']} core. "
        "Real-time factor: seconds of work for a second of sound.",
        "",
        "| self-attention | accuracy, whole utterances | late by | largest difference "
        "in probability (logit) | remembered | real-time factor by 1 and by 10 frames "
        "| the whole at once: real-time factor, temporary memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(
        found["rows"],
        key=lambda r: (r["left"] is None, r["left"] or 0, r["right"] or 0),
    ):
        name = "full" if row["left"] is None else f"{row['left']} + {row['right']}"
        name += f", positions: {row['positions']}, {row['updates']} updates"
        accuracy = f"{row['whole_utterance_accuracy']:.4f}".replace("0.", ".", 1)
        last = row["whole"][-1]
        cells = [name, accuracy, "–", "–", "–", "–"]
        if "stream" in row:
            longest = max(s["seconds"] for s in row["stream"])
            factors = [
                f"{s['real_time_factor']:.3f}"
                for s in row["stream"]
                if s["seconds"] == longest
            ]
            cells[2:] = [
                f"{row['look_ahead_ms']} ms",
                f"{row['probability_difference']:.0e} ({row['logit_difference']:.0e})",
                f"{row['state_bytes']:,} bytes",
                f"{', '.join(factors)} at {longest:g} s",
            ]
        cells.append(
            f"{last['real_time_factor']:.3f}, {last['temporary_bytes'] / 2**20:,.0f} "
            f"MiB at {last['seconds']:g} s"
        )
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _maps(folder: pathlib.Path) -> list[str]:
    """The attention maps of the folder, if there are any."""
    file = folder / "maps.json"
    if not file.is_file():
        return []
    maps = json.loads(file.read_text(encoding="utf-8"))["maps"]
    lines = ["## Who attends to whom", ""]
    for place, entry in enumerate(maps, start=1):
        lines += [f"![{entry['title']}](maps_{place}.png)", ""]
    return lines


def write_report(records: Sequence[Record], folder: pathlib.Path) -> str:
    """Writes report.md and the figures; returns the text for the terminal."""
    rows = rows_of(records)
    if not rows:
        raise ValueError("records: there is no finished cell to report.")
    task = rows[0].config["task"]
    whole = [row for row in rows if row.config["n"] is None]
    most = max((row.config["updates"] for row in whole), default=0)
    models = [row for row in whole if row.config["updates"] == most]
    transformers = [r for r in models if r.config["model"] == "transformer"]
    score = _main_score(models)
    models.sort(key=lambda row: -(s.mean if (s := row.of(score)) else 0.0))
    items = "frames" if "phones" in task else "words"
    text = [f"# Sequence labelling: {task}", ""]
    text += [
        "Test accuracy, mean ± standard deviation over seeds; the test part was read "
        f"once a cell. {_tuning(records)} FLOPs are those of a sequence of "
        f"{32 if 'pos' in task else 256} vectors, for each of them. Accuracy on "
        "training data is that of 2,000 training sequences without dropout.",
        "",
        *(
            [
                "A vector of speech holds differences that reach 4 frames to either "
                "side: a model that labels each by itself has seen 105 ms. Models were "
                "trained on crops of 2.56 s, and scored on crops of the test utterances"
                + (
                    "; whole utterances are longer than what training had."
                    if any(row.of(WHOLE) for row in models)
                    else "."
                ),
                "",
            ]
            if "phones" in task
            else []
        ),
        *_beside_baselines(models, records),
        "## Models on the whole training part",
        "",
        *table(models, [("model", model_name), *_accuracies(models), *_costs()]),
        "",
        *sampling_note(
            models,
            model_name,
            "test_accuracy",
            _TEST_LABELS.get(task),
            f"test {items} (which depend on one another, so that it is rather larger)",
        ),
        "Without training, counts of the whole training part:",
        "",
        *_baseline_lines(records),
        "",
    ]
    summary = list(text)
    styles = Styles([*_WINDOW, *sorted(map(model_name, rows))], _BESIDE)
    chosen = {id(row) for row in models}
    rest = [row for row in rows if id(row) not in chosen]

    full = [row for row in transformers if row.config["left"] is None]
    base = full[0].config if full else None
    windows = [row for row in rest if row.config["model"] == "window"]
    counts: dict[tuple[Any, Any], list[Row]] = {}
    for row in windows:
        counts.setdefault((row.config["n"], row.config["updates"]), []).append(row)
    for (n, updates), group in counts.items():
        if len(group) < 3:
            continue
        group.sort(key=lambda row: row.config["window"])
        n = "all" if n is None else f"{n:,}"
        text += [
            f"## The window: {n} training sequences, {updates:,} updates",
            "",
            *table(
                group,
                [
                    ("window", lambda row: f"±{row.config['window']}"),
                    *_accuracies(group),
                    *_costs(),
                ],
            ),
            "",
        ]
        points = [(2 * row.config["window"] + 1, row) for row in group]
        same = [
            row
            for row in rest
            if row.config["model"] == "transformer"
            and (row.config["n"], row.config["updates"])
            == (group[0].config["n"], updates)
            and base
            and _is_default(row.config, base)
        ]
        drawn = [
            *_drawn({"window, test": points}),
            *_drawn({"window, training": points}, "train_accuracy"),
        ]
        for row in same:
            for label, metric in (
                ("self-attention, test", "test_accuracy"),
                ("self-attention, training", "train_accuracy"),
            ):
                if (found := row.of(metric)) is not None:
                    ends = [points[0][0], points[-1][0]]
                    drawn.append(
                        Series(
                            label,
                            ends,
                            [found.mean] * 2,
                            [None] * 2,
                            [found.count] * 2,
                            baseline=True,
                        )
                    )
        if drawn:
            curve(
                drawn,
                folder / "window.png",
                title=f"{task}: a wider window, {n} training sequences",
                ylabel="accuracy",
                xlabel="vectors that one label sees (log scale)",
                note="A fully connected network over the window; mean over seeds.",
                styles=styles,
            )
            text += ["![window](window.png)", ""]
            text += _window_costs(points, task, folder, styles)

    varied = [row for row in rest if row.config["model"] == "transformer"]
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in varied:
        groups.setdefault((row.config["n"], row.config["updates"]), []).append(row)
    for (n, updates), group in groups.items():
        if len(group) < 2:
            continue
        group.sort(key=lambda row: _title(row.config))
        n = "all" if n is None else f"{n:,}"
        text += [
            f"## Self-attention varied: {n} training sequences, {updates:,} updates",
            "",
            *table(
                group,
                [
                    ("self-attention", lambda row: _title(row.config)),
                    *_accuracies(group),
                    *_costs(),
                ],
            ),
            "",
            *_remarks(group),
        ]

    scaling: dict[str, list[tuple[int, Row]]] = {}
    wanted = {(model_name(row), row.config["depth"]) for row in models}
    sweep = min(row.config["updates"] for row in rows)
    for row in rows:
        size = row.first("n")
        if row.config["updates"] != sweep:
            continue  # as many updates for every N
        plain = row.config["model"] != "transformer" or (
            base is not None and _is_default(row.config, base)
        )
        if size and plain and (model_name(row), row.config["depth"]) in wanted:
            scaling.setdefault(model_name(row), []).append((size, row))
    if any(len(points) > 1 for points in scaling.values()):
        lines = _drawn({k: v for k, v in scaling.items() if len(v) > 1})
        curve(
            lines,
            folder / "scaling.png",
            title=f"{task}: accuracy and the number of training sequences",
            xlabel="number of training sequences N (log scale)",
            note=f"{sweep:,} updates for every N; mean and deviation over seeds.",
            styles=styles,
        )
        text += [f"## Training data: {sweep:,} updates for every N", ""]
        text += ["![scaling](scaling.png)", ""]
        sizes = sorted({n for points in scaling.values() for n, _ in points})
        text += [
            "| model | " + " | ".join(f"N = {n:,}" for n in sizes) + " |",
            "|" + "---|" * (len(sizes) + 1),
        ]
        for name, points in scaling.items():
            cells = [
                next(
                    (number(r.of("test_accuracy")) for n, r in points if n == size), "–"
                )
                for size in sizes
            ]
            text.append(f"| {name} | " + " | ".join(cells) + " |")
        text.append("")

    text += _streaming(folder) + _maps(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")
    return "\n".join([*summary, f"Report and figures: {folder}/report.md"])


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Redraws the report of a folder; returns the exit status."""
    return redraw(__doc__, write_report, argv)


if __name__ == "__main__":
    sys.exit(main())
