"""Tables and figures of the experiment, from stored results alone.

`python -m experiments.graphs.report FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl and, if it was measured, timing.json.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from attn_jax._program import program
from experiments.core.plots import Styles, panel_legend, save_figure
from experiments.core.stats import Summary
from experiments.core.store import Record
from experiments.core.tables import Row, redraw, rows_of, sampling_note, table

TIMING = "timing.json"

_UNITS = {"melting_point": "K", "logp": ""}
_TITLES = {
    "melting_point": "Molecules: melting points",
    "logp": "Molecules: logP (octanol and water)",
}
_BASELINES = {
    "majority": "most frequent class",
    "text": "logistic regression, own text alone",
    "label_propagation": "label propagation, all edges",
    "label_propagation_is_a": "label propagation, edges of the kind is-a alone",
    "mean": "mean",
    "ridge": "ridge, Morgan counts",
    "forest": "random forest, Morgan counts",
}

# Training and test nodes of the committed records of WordNet.
_NODES, _TEST_NODES = 20_000, 8_000

Column = tuple[str, Callable[[Row], str]]


def _count(value: Any) -> str:
    return "–" if value is None else f"{value:,}"


def _figures(value: float | None, digits: int) -> str:
    """A number with so many digits, and none before the point where that is a 0."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _spread(summary: Summary | None, digits: int) -> str:
    """A mean ± deviation.

    >>> from experiments.core.stats import summarize
    >>> _spread(summarize([50.0, 50.5, 51.0]), 1)
    '50.5 ± .5'
    """
    if summary is None or summary.std is None:
        return "–" if summary is None else f"{_figures(summary.mean, digits)} (1 seed)"
    return f"{_figures(summary.mean, digits)} ± {_figures(summary.std, digits)}"


def _shows(metric: str, digits: int = 4) -> Callable[[Row], str]:
    return lambda row: _spread(row.of(metric), digits)


def _recipe() -> list[Column]:
    return [
        ("parameters", lambda row: _count(row.first("params"))),
        ("updates", lambda row: _count(row.config["updates"])),
        ("learning rate", lambda row: f"{row.config['learning_rate']:g}"),
        ("seeds", lambda row: str(len(row.records))),
        ("diverged", lambda row: str(row.diverged)),
    ]


def _metrics(records: Iterable[Record], task: str) -> dict[str, Mapping[str, Any]]:
    """Baselines of a task, by name, in the order that they are known in."""
    found = {
        record["config"]["model"]: record["metrics"]
        for record in records
        if record["config"].get("phase") == "baseline"
        and record["config"]["task"] == task
    }
    return {name: found[name] for name in _BASELINES if name in found}


def _axes(columns: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6 * columns, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _curves(
    groups: Mapping[str, Sequence[Row]],
    metric: str,
    ylabel: str,
    path: pathlib.Path,
    styles: Styles,
    top: float | None = None,
) -> None:
    """A training curve for every model, the mean over its seeds; one panel a group."""
    figure, panels = _axes(len(groups))
    for axes, (title, rows) in zip(panels, groups.items(), strict=True):
        for row in rows:
            curves = [r["curves"] for r in row.records if metric in r["curves"]]
            if not curves:
                continue
            mean = np.mean([curve[metric] for curve in curves], axis=0)
            name = row.config["model"]
            style = styles[name]
            axes.plot(
                curves[0]["step"],
                mean,
                label=name,
                color=style.color,
                linestyle=style.line,
                linewidth=1.5,
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("updates", fontsize=9)
        axes.set_ylabel(ylabel, fontsize=9)
        if top is not None:
            axes.set_ylim(0, top)
        panel_legend(axes)
        axes.grid(color="#e3e3e3", linewidth=0.7)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    save_figure(figure, path)


def _dictionary(rows: Sequence[Row], folder: pathlib.Path, styles: Styles) -> list[str]:
    sizes = sorted({row.config["keys"] for row in rows})
    text = [
        "## DictionaryLookup",
        "",
        "A complete bipartite graph of k keys and k queries; each query has to say the "
        "value of the key of its own number. One layer of attention, no hidden layer. "
        "The claim of Brody et al. (arXiv:2105.14491) is about the training set: "
        "GAT, which ranks all keys alike for every query, cannot fit it, and GATv2 "
        "answers all of it. The learning rate is the one of best accuracy on "
        "validation graphs. Accuracy is over queries.",
        "",
        *_heads(rows),
    ]
    for keys in sizes:
        some = [row for row in rows if row.config["keys"] == keys]
        some.sort(key=lambda row: _mean_of(row, "train_accuracy"))
        graphs = some[0].config["graphs"]
        text += [
            f"### k = {keys}: {graphs:,} training graphs, guessing {1 / keys:.3g}",
            "",
            *table(
                some,
                [
                    ("attention", lambda row: row.config["model"]),
                    ("training accuracy", _shows("train_accuracy")),
                    ("training graphs without error", _shows("train_whole_graphs")),
                    ("test accuracy", _shows("test_accuracy")),
                    *_recipe(),
                ],
            ),
            "",
        ]
    groups = {
        f"k = {keys}": [row for row in rows if row.config["keys"] == keys]
        for keys in sizes
    }
    path = folder / "dictionary.png"
    _curves(groups, "accuracy", "training accuracy", path, styles, top=1.05)
    return [*text, "![training accuracy](dictionary.png)", ""]


def _heads(rows: Sequence[Row]) -> list[str]:
    """How far more heads take GAT, which the claim is silent of."""
    said = [
        f"{_spread(row.of('train_accuracy'), 4)} at k = {row.config['keys']} "
        f"({row.config['num_heads']} heads)"
        for row in sorted(rows, key=lambda row: row.config["keys"])
        if row.config["score"] == "gat" and row.config["num_heads"] > 1 and row.records
    ]
    if not said:
        return []
    return [
        "Each head of GAT ranks the keys in an order of its own, so that several heads "
        f"answer more than one does: {'; '.join(said)} of the training set.",
        "",
    ]


def _mean_of(row: Row, metric: str) -> float:
    found = row.of(metric)
    return -1.0 if found is None else found.mean


def _verdict(name: str, value: float, floor: str, other: float, less: bool) -> str:
    """One sentence: is it ahead of the floor, or not."""
    ahead = value < other if less else value > other
    relation = "is ahead of" if ahead else "does not beat"
    digits = 2 if less else 4
    first, second = _figures(value, digits), _figures(other, digits)
    return f"* {name} ({first}) {relation} {floor} ({second})."


def _none_ahead(
    rows: Sequence[Row], floors: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Says first at which sizes no network beats every baseline."""
    text = []
    for n in sorted({row.config["n"] for row in rows}, reverse=True):
        best = max(_mean_of(r, "test_accuracy") for r in rows if r.config["n"] == n)
        found = {
            name: metrics[f"test_accuracy_{n}"]
            for name, metrics in floors.items()
            if metrics.get(f"test_accuracy_{n}") is not None
        }
        top = max(found, key=lambda name: found[name], default=None)
        if top is not None and best <= found[top]:
            text += [
                f"**With {n:,} training nodes no network ({_figures(best, 4)} at best) "
                f"beats {_BASELINES[top]} ({_figures(found[top], 4)}).**",
                "",
            ]
    return text


def _wordnet(
    rows: Sequence[Row],
    records: Sequence[Record],
    folder: pathlib.Path,
    styles: Styles,
) -> list[str]:
    floors = _metrics(records, "wordnet")
    sizes = sorted({row.config["n"] for row in rows}, reverse=True)
    config = rows[0].config
    text = [
        "## WordNet: classes of nodes",
        "",
        *_none_ahead(rows, floors),
        "Test accuracy on nodes whose label nobody was given; the whole graph is in "
        f"every update. {config['depth']} layers of attention, so that a node sees "
        f"what is {config['depth']} edges away. Networks that read labels learn by "
        "masked label prediction (UniMP, arXiv:2009.03509): at every update "
        f"{_shown(rows):.0%} of the training labels are inputs and the others are to "
        "be said; for the test all are inputs. “Kinds of edges”: each head adds a "
        "learned number per kind of pointer (is-a, part, domain …) to the scores. "
        "“Propagated labels”: the network also reads what label propagation along all "
        "edges makes of the labels that are inputs. "
        "Classes nearly follow the pointers, so label propagation is the floor; along "
        "is-a alone it is a floor for those who know which kinds to trust. The "
        "learning rate was given, not chosen; what the baselines chose, they chose on "
        "validation nodes. Deviations are over seeds; all see the same split.",
        "",
    ]
    for n in sizes:
        some = [row for row in rows if row.config["n"] == n]
        some.sort(key=lambda row: -_mean_of(row, "test_accuracy"))
        text += [
            f"### {n:,} training nodes",
            "",
            *table(
                some,
                [
                    ("network", lambda row: row.config["model"]),
                    ("test accuracy", _shows("test_accuracy")),
                    *_recipe(),
                ],
            ),
            "",
            *sampling_note(
                some,
                lambda row: str(row.config["model"]),
                "test_accuracy",
                _TEST_NODES if n == _NODES else None,
                "test nodes",
            ),
            "| without a network | test accuracy | chosen |",
            "|---|---|---|",
        ]
        for name, metrics in floors.items():
            value = metrics.get(f"test_accuracy_{n}")
            chosen = metrics.get(f"chosen_{n}") or "–"
            text.append(f"| {_BASELINES[name]} | {_figures(value, 4)} | {chosen} |")
        text.append("")
        best = some[0]
        value = _mean_of(best, "test_accuracy")
        for name in ("text", "label_propagation", "label_propagation_is_a"):
            other = floors.get(name, {}).get(f"test_accuracy_{n}")
            if other is not None and value >= 0:
                text.append(
                    _verdict(
                        f"The best network, {best.config['model']}",
                        value,
                        _BASELINES[name],
                        other,
                        less=False,
                    )
                )
        text.append("")
    groups = {
        f"{n:,} training nodes": [row for row in rows if row.config["n"] == n]
        for n in sizes
    }
    _curves(groups, "loss", "training loss", folder / "wordnet.png", styles)
    return [*text, "![training loss](wordnet.png)", ""]


def _shown(rows: Sequence[Row]) -> float:
    return max(row.config["shown"] for row in rows)


def _ensemble(row: Row, right: Sequence[float] | None, digits: int) -> str:
    """Error of the mean of all seeds' predictions."""
    found = [r["metrics"].get("test_predictions") for r in row.records]
    if right is None or len(found) < 2 or any(f is None for f in found):
        return "–"
    mean = np.mean(found, axis=0)
    return _figures(float(np.sqrt(np.mean((mean - np.asarray(right)) ** 2))), digits)


def _by_mae(
    rows: Sequence[Row], floors: Mapping[str, Mapping[str, Any]], digits: int
) -> list[str]:
    """Networks that a baseline is ahead of by mean absolute error."""
    found = {k: m["test_mae"] for k, m in floors.items() if "test_mae" in m}
    top = min(found, key=lambda name: found[name], default=None)
    behind = [
        f"{row.config['model']} ({_figures(mae.mean, digits)})"
        for row in rows
        if top is not None and (mae := row.of("test_mae")) and mae.mean >= found[top]
    ]
    if top is None or not behind:
        return []
    return [
        f"* By MAE {_BASELINES[top]} ({_figures(found[top], digits)}) is ahead of "
        f"{', '.join(behind)}."
    ]


def _molecules(
    task: str,
    rows: Sequence[Row],
    records: Sequence[Record],
    folder: pathlib.Path,
    styles: Styles,
) -> list[str]:
    floors = _metrics(records, task)
    right = floors.get("mean", {}).get("test_targets")
    unit = f", {_UNITS[task]}" if _UNITS[task] else ""
    digits = 2 if task == "melting_point" else 3
    some = sorted(rows, key=lambda row: _mean_of(row, "test_rmse"))
    text = [
        f"## {_TITLES[task]}",
        "",
        "One number a molecule: atoms are one-hot nodes. “Edges”: an atom attends to "
        "itself and to what it has a bond with. “All pairs”: to all atoms, with a "
        "learned number per kind of bond and length of path added to the scores "
        "(Graphormer, arXiv:2106.05234). “No edges”: to all, and no bond is told. "
        f"{_count(some[0].first('n'))} molecules to train on, a tenth to test, the "
        "same for all rows and seeds, and the floors are of this split too. The "
        "learning rate was given, not chosen.",
        "",
        *table(
            some,
            [
                ("attention", lambda row: row.config["model"]),
                (f"test RMSE{unit}", _shows("test_rmse", digits)),
                (f"test MAE{unit}", _shows("test_mae", digits)),
                ("R²", _shows("test_r2", 3)),
                (
                    f"RMSE of the seeds' mean{unit}",
                    lambda row: _ensemble(row, right, digits),
                ),
                (f"training RMSE{unit}", _shows("train_rmse", digits)),
                *_recipe(),
            ],
        ),
        "",
        f"| without a network | test RMSE{unit} | test MAE{unit} | R² | chosen |",
        "|---|---|---|---|---|",
    ]
    for name, metrics in floors.items():
        text.append(
            f"| {_BASELINES[name]} | {_figures(metrics['test_rmse'], digits)} | "
            f"{_figures(metrics['test_mae'], digits)} | "
            f"{_figures(metrics['test_r2'], 3)} | {metrics.get('chosen') or '–'} |"
        )
    text.append("")
    best = some[0]
    value = _mean_of(best, "test_rmse")
    for name in ("ridge", "forest"):
        if name in floors and value >= 0:
            text.append(
                _verdict(
                    f"The best network, {best.config['model']}",
                    value,
                    _BASELINES[name],
                    floors[name]["test_rmse"],
                    less=True,
                )
            )
    text += _by_mae(some, floors, digits)
    path = f"{task}.png"
    _curves({_TITLES[task]: some}, "loss", "training loss", folder / path, styles)
    return [*text, "", f"![training loss]({path})", ""]


def _timing(folder: pathlib.Path) -> list[str]:
    """What timing.json of the folder says, if there is one."""
    file = folder / TIMING
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "## Time and memory",
        "",
        f"Each row a process of its own on {found['cores']} CPU core. Program: what "
        "the compiled update allocates beside its inputs. Peak: the largest resident "
        "size "
        "of the process, data and compilation included. A mask of all pairs of the "
        f"{found['nodes']:,} nodes would alone take "
        f"{found['nodes'] ** 2 / 2**30:,.1f} GiB.",
        "",
        "| update | edges with loops | seconds | program, MiB | peak, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['name']} | {row['edges']:,} | {row['seconds']:.2f} | "
            f"{row['program_bytes'] / 2**20:,.0f} | {row['peak_bytes'] / 2**20:,.0f} |"
        )
    return [*lines, ""]


def write_report(records: Sequence[Record], folder: pathlib.Path) -> str:
    """Writes report.md and the figures; returns the text."""
    rows = rows_of(records)
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row.config["task"], []).append(row)
    if not by_task:
        raise ValueError("records: there is no finished cell to report.")
    folder.mkdir(parents=True, exist_ok=True)
    styles = Styles(sorted(row.config["model"] for row in rows))
    text = [
        "# Graph neural networks are attention on edges",
        "",
        "Mean ± standard deviation over seeds; the test part was read once a cell.",
        "",
    ]
    if "dictionary" in by_task:
        text += _dictionary(by_task["dictionary"], folder, styles)
    if "wordnet" in by_task:
        text += _wordnet(by_task["wordnet"], records, folder, styles)
    for task in ("melting_point", "logp"):
        if task in by_task:
            text += _molecules(task, by_task[task], records, folder, styles)
    text += _timing(folder)
    found = "\n".join(text).rstrip() + "\n"
    (folder / "report.md").write_text(found, encoding="utf-8")
    return found


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Redraws the report of a folder; returns the exit status."""
    return redraw(__doc__, write_report, argv)


if __name__ == "__main__":
    sys.exit(main())
