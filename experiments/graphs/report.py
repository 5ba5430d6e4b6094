"""Tables and figures of the experiment, from stored results alone.

`python -m experiments graphs --redraw FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl and, if it was measured, timing.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core import report as tell
from experiments.core.plots import Panel, Series, Styles, panels
from experiments.core.report import Column, Group, Part, Report, Row, Section

TIMING = "timing.json"

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

_RECIPE: tuple[Column, ...] = (
    tell.PARAMETERS,
    tell.setting("updates", "updates", ","),
    tell.RATE,
    ("seeds", lambda row: str(len(row.records))),
    tell.DIVERGED,
)


def _name(row: Row) -> str:
    return str(row.config["model"])


def _floors(group: Group) -> dict[str, Mapping[str, Any]]:
    """Baselines of the task, by name, in the order that they are known in."""
    found = group.floors(task=group.config["task"])
    return {name: found[name] for name in _BASELINES if name in found}


def _curves(file: str, metric: str, by: str, title: str, **more: Any) -> Part:
    """A training curve for every model, over its seeds; one panel a group."""

    def draw(group: Group) -> str:
        label = f"training {metric}"
        found = []
        for some in group.by(by):
            lines = [
                line
                for row in some.rows
                for line in Series.training(_name(row), row.records, metric)
            ]
            name = title.format(**some.config)
            found.append(Panel(name, "updates", label, lines, markersize=2.5, **more))
        styles = Styles(sorted(map(_name, group.every)))
        panels(found, group.folder / file, styles)
        return f"![{label}]({file})"

    return draw


def _heads(group: Group) -> list[str]:
    """How far more heads take GAT, which the claim is silent of."""
    said = [
        f"{tell.mean(row.of('train_accuracy'))} at k = {row.config['keys']} "
        f"({row.config['num_heads']} heads)"
        for row in group.rows
        if row.config["score"] == "gat" and row.config["num_heads"] > 1 and row.records
    ]
    if not said:
        return []
    return [
        "Each head of GAT ranks the keys in an order of its own, so that several heads "
        f"answer more than one does: {'; '.join(said)} of the training set."
    ]


def _beside(metric: str, names: Sequence[str], *, less: bool = False) -> Part:
    """Is the best network ahead of these floors, or not? A sentence each."""

    def said(group: Group) -> list[str]:
        best, digits = group.rows[0], 2 if less else 4
        name = metric.format(**group.config)
        value = best.mean(metric.split("_{")[0])
        lines = []
        for floor in names:
            other = _floors(group).get(floor, {}).get(name)
            if other is not None and value is not None:
                ahead = value < other if less else value > other
                lines.append(
                    f"* The best network, {_name(best)} "
                    f"({tell.decimal(value, digits)}) "
                    f"{'is ahead of' if ahead else 'does not beat'} "
                    f"{_BASELINES[floor]} ({tell.decimal(other, digits)})."
                )
        if less:
            lines += _by_mae(group)
        return ["\n".join(lines)] if lines else []

    return said


def _by_mae(group: Group) -> list[str]:
    """Networks that a baseline is ahead of by mean absolute error."""
    digits = _digits(group)
    best = group.best("test_mae", less=True, task=group.config["task"])
    if best is None:
        return []
    behind = [
        f"{_name(row)} ({tell.decimal(mae, digits)})"
        for row in group.rows
        if (mae := row.mean("test_mae", -1.0)) >= best[1]
    ]
    said = f"* By MAE {_BASELINES[best[0]]} ({tell.decimal(best[1], digits)}) is ahead "
    return [f"{said}of {', '.join(behind)}."] if behind else []


def _none_ahead(group: Group) -> list[str]:
    """Says first at which sizes no network beats every baseline."""
    text = []
    for some in group.by("n"):
        n, mean = some.config["n"], max(r.mean("test_accuracy", -1) for r in some.rows)
        best = group.best(f"test_accuracy_{n}", task=group.config["task"])
        if best is not None and mean <= best[1]:
            text.append(
                f"**With {n:,} training nodes no network ({tell.decimal(mean)} at "
                f"best) beats {_BASELINES[best[0]]} ({tell.decimal(best[1])}).**"
            )
    return text


def _floor_table(
    columns: Callable[[Group], Sequence[tuple[str, str, int]]], chosen: str
) -> Part:
    """The baselines: columns are (title, metric, digits), and what was chosen."""

    def said(group: Group) -> str:
        found, names = columns(group), chosen.format(**group.config)
        return tell.table(
            ["without a network", *(title for title, _, _ in found), "chosen"],
            [
                [
                    _BASELINES[name],
                    *(tell.decimal(metrics.get(m), digits) for _, m, digits in found),
                    metrics.get(names) or tell.NONE,
                ]
                for name, metrics in _floors(group).items()
            ],
        )

    return said


_DICTIONARY = Section(
    title="## DictionaryLookup",
    rows=tell.where(task="dictionary"),
    order=lambda row: (row.config["keys"], row.mean("train_accuracy", -1.0)),
    text=(
        "A complete bipartite graph of k keys and k queries; each query has to say the "
        "value of the key of its own number. One layer of attention, no hidden layer. "
        "The claim of Brody et al. (arXiv:2105.14491) is about the training set: "
        "GAT, which ranks all keys alike for every query, cannot fit it, and GATv2 "
        "answers all of it. The learning rate is the one of best accuracy on "
        "validation graphs. Accuracy is over queries.",
        _heads,
    ),
    sections=(
        Section(
            title=lambda group: (
                "### k = {keys}: {graphs:,} training graphs, guessing ".format(
                    **group.config
                )
                + f"{1 / group.config['keys']:.3g}"
            ),
            by=("keys",),
            columns=(
                tell.setting("attention", "model"),
                tell.score("training accuracy", "train_accuracy"),
                tell.score("training graphs without error", "train_whole_graphs"),
                tell.score("test accuracy", "test_accuracy"),
                *_RECIPE,
            ),
        ),
    ),
    notes=(
        _curves("dictionary.png", "accuracy", "keys", "k = {keys}", ylim=(0, 1.05)),
    ),
)

_WORDNET = Section(
    title="## WordNet: classes of nodes",
    rows=tell.where(task="wordnet"),
    order=lambda row: (-row.config["n"], -row.mean("test_accuracy", -1.0)),
    text=(
        _none_ahead,
        lambda group: (
            "Test accuracy on nodes whose label nobody was given; the whole graph is "
            "in every update. {depth} layers of attention, so that a node sees what is "
            "{depth} edges away. Networks that read labels learn by masked label "
            "prediction (UniMP, arXiv:2009.03509): at every update {most:.0%} of the "
            "training labels are inputs and the others are to be said; for the test "
            "all are inputs. “Kinds of edges”: each head adds a learned number per "
            "kind of pointer (is-a, part, domain …) to the scores. “Propagated "
            "labels”: the network also reads what label propagation along all edges "
            "makes of the labels that are inputs. Classes nearly follow the pointers, "
            "so label propagation is the floor; along is-a alone it is a floor for "
            "those who know which kinds to trust. The learning rate was given, not "
            "chosen; what the baselines chose, they chose on validation nodes. "
            "Deviations are over seeds; all see the same split."
        ).format(most=max(r.config["shown"] for r in group.rows), **group.config),
    ),
    sections=(
        Section(
            title="### {n:,} training nodes",
            by=("n",),
            columns=(
                tell.setting("network", "model"),
                tell.score("test accuracy", "test_accuracy"),
                *_RECIPE,
            ),
            notes=(
                tell.sampling(
                    "test_accuracy",
                    lambda config: _TEST_NODES if config["n"] == _NODES else None,
                    "test nodes",
                ),
                _floor_table(
                    lambda group: [
                        ("test accuracy", f"test_accuracy_{group.config['n']}", 4)
                    ],
                    "chosen_{n}",
                ),
                _beside(
                    "test_accuracy_{n}",
                    ("text", "label_propagation", "label_propagation_is_a"),
                ),
            ),
        ),
    ),
    notes=(_curves("wordnet.png", "loss", "n", "{n:,} training nodes"),),
)

# ----------------------------------------------------------------- molecules

# Title of a task, its unit, and digits of errors.
_TITLES = {
    "melting_point": ("Molecules: melting points", ", K", 2),
    "logp": ("Molecules: logP (octanol and water)", "", 3),
}


def _digits(group: Group) -> int:
    return _TITLES[group.config["task"]][2]


def _error_columns(group: Group) -> list[Column]:
    _, unit, digits = _TITLES[group.config["task"]]
    right = _floors(group).get("mean", {}).get("test_targets")

    def ensemble(row: Row) -> str:
        """Error of the mean of all seeds' predictions."""
        found = [r["metrics"].get("test_predictions") for r in row.records]
        if right is None or len(found) < 2 or any(f is None for f in found):
            return tell.NONE
        apart = np.mean(found, axis=0) - np.asarray(right)
        return tell.decimal(float(np.sqrt(np.mean(apart**2))), digits)

    return [
        tell.setting("attention", "model"),
        tell.score(f"test RMSE{unit}", "test_rmse", digits),
        tell.score(f"test MAE{unit}", "test_mae", digits),
        tell.score("R²", "test_r2", 3),
        (f"RMSE of the seeds' mean{unit}", ensemble),
        tell.score(f"training RMSE{unit}", "train_rmse", digits),
        *_RECIPE,
    ]


def _molecules(task: str) -> Section:
    _, unit, digits = _TITLES[task]
    return Section(
        title=f"## {_TITLES[task][0]}",
        rows=tell.where(task=task),
        order=lambda row: row.mean("test_rmse", -1.0),
        text=(
            lambda group: (
                "One number a molecule: atoms are one-hot nodes. “Edges”: an atom "
                "attends to itself and to what it has a bond with. “All pairs”: to all "
                "atoms, with a learned number per kind of bond and length of path "
                "added to the scores (Graphormer, arXiv:2106.05234). “No edges”: to "
                "all, and no bond is told. "
                f"{tell.count(group.rows[0].first('n'))} molecules to train on, a "
                "tenth to test, the same for all rows and seeds, and the floors are of "
                "this split too. The learning rate was given, not chosen."
            ),
        ),
        columns=_error_columns,
        notes=(
            _floor_table(
                lambda group: [
                    (f"test RMSE{unit}", "test_rmse", digits),
                    (f"test MAE{unit}", "test_mae", digits),
                    ("R²", "test_r2", 3),
                ],
                "chosen",
            ),
            _beside("test_rmse", ("ridge", "forest"), less=True),
            _curves(f"{task}.png", "loss", "task", _TITLES[task][0]),
        ),
    )


def _timing(group: Group) -> list[str]:
    """What timing.json of the folder says, if there is one."""
    found = group.measured(TIMING)
    if found is None:
        return []
    return [
        "## Time and memory",
        f"Each row a process of its own on {found['cores']} CPU core. Program: what "
        "the compiled update allocates beside its inputs. Peak: the largest resident "
        "size of the process, data and compilation included. A mask of all pairs of "
        f"the {found['nodes']:,} nodes would alone take "
        f"{found['nodes'] ** 2 / 2**30:,.1f} GiB.",
        tell.tabulate(
            [
                ("update", lambda row: row["name"]),
                ("edges with loops", lambda row: tell.count(row["edges"])),
                ("seconds", lambda row: f"{row['seconds']:.2f}"),
                ("program, MiB", lambda row: tell.count(row["program_bytes"] / 2**20)),
                ("peak, MiB", lambda row: tell.count(row["peak_bytes"] / 2**20)),
            ],
            found["rows"],
        ),
    ]


REPORT = Report(
    title="# Graph neural networks are attention on edges",
    text=(
        "Mean ± standard deviation over seeds, in figures a band of one deviation; the "
        "test part was read once a cell.",
    ),
    sections=(_DICTIONARY, _WORDNET, *map(_molecules, _TITLES)),
    notes=(_timing,),
)
