"""Tables and figures of the experiment, from stored results alone.

`python -m experiments graphs --redraw FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl and, if it was measured, timing.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from experiments.core import report as tell
from experiments.core.plots import (
    Board,
    Panel,
    Series,
    Standing,
    Styles,
    panels,
    standings,
)
from experiments.core.report import Column, Group, Part, Report, Row, Section
from experiments.core.stats import gap, summarize

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


# Models in words.
_NAMES = {
    "gat": "GAT",
    "gat, 8 heads": "GAT, 8 heads",
    "gatv2": "GATv2",
    "dot product": "dot products",
    "gatv2, labels not read": "GATv2, labels not read",
    "gatv2, kinds of edges": "GATv2, kinds of edges",
    "gatv2, kinds, propagated labels": "GATv2, kinds, propagated labels",
    "edges": "attention on bonds",
    "all pairs, bias of bonds and paths": "all pairs, bias of bonds and paths",
}


def _name(row: Row) -> str:
    model = str(row.config["model"])
    if model == "no edges":
        return (
            "no edges, own text alone"
            if row.config["task"] == "wordnet"
            else "without bonds"
        )
    return _NAMES.get(model, model)


_MODEL: Column = ("network", _name)


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


def _ahead(group: Group) -> list[str]:
    """Is the best network ahead of each floor, or not? A sentence each."""
    best = group.rows[0]
    value, metric = best.mean("test_accuracy"), "test_accuracy_{n}"
    name, lines = metric.format(**group.config), []
    for floor, metrics in _floors(group).items():
        other = metrics.get(name)
        if other is not None and value is not None and floor != "majority":
            verb = "is ahead of" if value > other else "does not beat"
            lines.append(
                f"* The best network, {_name(best)} ({tell.decimal(value)}) {verb} "
                f"{_BASELINES[floor]} ({tell.decimal(other)})."
            )
    return ["\n".join(lines)] if lines else []


def _apart(group: Group) -> list[str]:
    """Pairs of networks whose only difference is how edges are scored."""
    rows = {row.config["model"]: row for row in group.rows if row.records}
    pairs = (("gatv2", "gat"), ("dot product", "gat"), ("dot product", "gatv2"))
    lines = []
    for one, two in pairs:
        if one in rows and two in rows:
            found, text = tell.difference(rows[one], rows[two], "test_accuracy")
            clear = "" if found.clear else ", which is no clear difference"
            lines.append(f"* {_name(rows[one])} − {_name(rows[two])}: {text}{clear}.")
    return ["\n".join(lines)] if lines else []


def _accuracies(group: Group) -> str:
    """The figure of WordNet: a board for each number of labels."""
    boards = []
    for some in group.by("n"):
        n = some.config["n"]
        known = [
            Standing(_BASELINES[name], metrics[f"test_accuracy_{n}"], baseline=True)
            for name, metrics in _floors(some).items()
            if f"test_accuracy_{n}" in metrics
        ]
        low = [s for s in known if s.label == _BASELINES["majority"]]
        networks = [
            Standing.of(_name(row), row.scores("test_accuracy"))
            for row in some.rows
            if row.records
        ]
        shown = [*networks, *(s for s in known if s not in low)]
        title = f"{n:,} labels given"
        boards.append(Board(title, "test accuracy", shown, beyond=low))
    note = "Networks: mean and Student's interval of 95 % over seeds. Grey: no network."
    styles = Styles(sorted(map(_name, group.every)))
    standings(boards, group.folder / "wordnet.png", styles, note)
    return "![test accuracy](wordnet.png)"


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


def _floor_table(group: Group) -> str:
    """The baselines, and what they chose."""
    n = group.config["n"]
    return tell.table(
        ["without a network", "test accuracy", "chosen"],
        [
            [
                _BASELINES[name],
                tell.decimal(metrics.get(f"test_accuracy_{n}")),
                metrics.get(f"chosen_{n}") or tell.NONE,
            ]
            for name, metrics in _floors(group).items()
        ],
    )


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
                _MODEL,
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
                _MODEL,
                tell.score("test accuracy", "test_accuracy"),
                *_RECIPE,
            ),
            notes=(
                tell.sampling(
                    "test_accuracy",
                    lambda config: _TEST_NODES if config["n"] == _NODES else None,
                    "test nodes",
                ),
                _floor_table,
                _ahead,
                _apart,
            ),
        ),
    ),
    notes=(_accuracies,),
)

# ----------------------------------------------------------------- molecules

# Title of a task, its unit, and digits of errors.
_TITLES = {
    "melting_point": ("Molecules: melting points", ", K", 2),
    "logp": ("Molecules: logP (octanol and water)", "", 3),
}


def _digits(group: Group) -> int:
    return _TITLES[group.config["task"]][2]


def _floor_scores(group: Group, metric: str) -> dict[str, dict[int, float]]:
    """Baseline -> split -> metric."""
    found: dict[str, dict[int, float]] = {}
    for name, metrics in group.floors(task=group.config["task"]).items():
        if metric in metrics:
            some = found.setdefault(metrics.get("baseline", name), {})
            some[metrics.get("split", 0)] = metrics[metric]
    return {name: found[name] for name in _BASELINES if name in found}


def _error_columns(group: Group) -> list[Column]:
    _, unit, digits = _TITLES[group.config["task"]]
    return [
        _MODEL,
        tell.score(f"test RMSE{unit}", "test_rmse", digits),
        tell.score(f"test MAE{unit}", "test_mae", digits),
        tell.score("R²", "test_r2", 3),
        tell.score(f"training RMSE{unit}", "train_rmse", digits),
        *_RECIPE,
    ]


def _error_floors(group: Group) -> list[list[str]]:
    """Rows of what needs no network."""
    found = []
    for name in _floor_scores(group, "test_rmse"):
        row = [_BASELINES[name]]
        for metric, digits in (
            ("test_rmse", _digits(group)),
            ("test_mae", _digits(group)),
            ("test_r2", 3),
        ):
            values = _floor_scores(group, metric)[name].values()
            over = summarize([*values])
            one = over.count == 1
            row.append(
                tell.decimal(over.mean, digits) if one else tell.mean(over, digits)
            )
        found.append(row)
    return found


def _against(group: Group) -> list[str]:
    """Each network against each floor, and against the next, split by split."""
    digits = _digits(group)
    rows = [row for row in group.rows if row.records]
    pairs = [
        (f"{title} − {_BASELINES[name].split(', ')[0]}", metric, scores)
        for title, metric in (("RMSE", "test_rmse"), ("MAE", "test_mae"))
        for name, scores in _floor_scores(group, metric).items()
        if name != "mean"
    ]

    def shown(metric: str, scores: dict[int, float]) -> Callable[[Row], str]:
        def show(row: Row) -> str:
            apart = gap(row.scores(metric), scores)
            text = tell.decimal(apart.mean, digits, sign=True)
            text = f"{text} {tell.interval(apart, digits)}".strip()
            return f"**{text}**" if apart.clear else text

        return show

    said = []
    if rows and pairs:
        said = [
            "Differences, less than zero where the network is ahead; bold where the "
            "interval leaves zero out:",
            tell.tabulate(
                [_MODEL, *((title, shown(m, scores)) for title, m, scores in pairs)],
                rows,
            ),
        ]
    lines = []
    for one, two in zip(rows, rows[1:], strict=False):
        apart, text = tell.difference(one, two, "test_rmse", digits)
        clear = "" if apart.clear else ", which is no clear difference"
        lines.append(f"* RMSE, {_name(one)} − {_name(two)}: {text}{clear}.")
    return [*said, "\n".join(lines)] if lines else said


def _errors(group: Group) -> list[str]:
    """The figure of a task: errors, and how far from the best floor, by split."""
    task = group.config["task"]
    title, unit, _ = _TITLES[task]
    floors = _floor_scores(group, "test_rmse")
    networks = {_name(r): r.scores("test_rmse") for r in group.rows if r.records}
    known = [
        Standing.of(_BASELINES[name], scores, baseline=True)
        for name, scores in floors.items()
    ]
    far = [s for s in known if s.label == _BASELINES["mean"]]
    shown = [Standing.of(name, scores) for name, scores in networks.items()]
    shown += [s for s in known if s not in far]
    boards = [Board(title, f"test RMSE{unit}", shown, less=True, beyond=far)]
    others = {name: scores for name, scores in floors.items() if name != "mean"}
    if others:
        best = min(others, key=lambda name: summarize([*others[name].values()]).mean)
        apart = []
        for name, scores in networks.items():
            found = gap(scores, others[best])
            apart.append(Standing(name, found.mean, found.low, found.high))
        label = f"test RMSE − that of {_BASELINES[best]}{unit}"
        boards.append(Board("Split by split", label, apart, less=True, zero=True))
    note = "Means and Student's intervals of 95 % over splits. Grey: no network."
    styles = Styles(sorted(map(_name, group.every)))
    standings(boards, group.folder / f"{task}.png", styles, note)
    return [f"![test error]({task}.png)"]


def _molecules(task: str) -> Section:
    return Section(
        title=f"## {_TITLES[task][0]}",
        rows=tell.where(task=task),
        order=lambda row: row.mean("test_rmse", -1.0),
        text=(
            lambda group: (
                "One number a molecule: atoms are one-hot nodes. “Attention on "
                "bonds”: an atom attends to itself and to what it has a bond with. "
                "“All pairs”: to all atoms, with a learned number per kind of bond and "
                "length of path added to the scores (Graphormer, arXiv:2106.05234). "
                "“Without bonds”: to all, and no bond is told. "
                f"{tell.count(group.rows[0].first('n'))} molecules to train on, a "
                "tenth to test. "
                + (
                    "Each seed has a split of its own, drawn at random, equal "
                    "molecules together, and floors are measured on the same splits: "
                    "deviations and intervals are over splits, and differences are "
                    "taken split by split. "
                    if group.config.get("own_split")
                    else "One split for all rows and seeds. "
                )
                + "The learning rate was given, not chosen; floors choose theirs on "
                "validation molecules. Student's intervals of 95 % in brackets."
            ),
        ),
        columns=_error_columns,
        floors=_error_floors,
        notes=(_against, _errors),
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
    text=("Mean ± standard deviation over seeds; the test part was read once a cell.",),
    sections=(_DICTIONARY, _WORDNET, *map(_molecules, _TITLES)),
    notes=(_timing,),
)
