"""Tables and figures of the experiment, from stored results alone.

`python -m experiments attention_as_conv --redraw FOLDER` redraws report.md and the
figures of a folder that holds results.jsonl.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from experiments.attention_as_conv import places
from experiments.attention_as_conv.cells import flops_of
from experiments.attention_as_conv.grid import CHANCE, grid_measures
from experiments.attention_as_conv.teacher_report import TEACHER
from experiments.core import report as tell
from experiments.core.plots import (
    Panel,
    Series,
    Styles,
    heads,
    panels,
    save_figure,
    subplots,
)
from experiments.core.report import Group, Report, Row, Section
from experiments.core.stats import Summary, gap, summarize
from experiments.core.store import Record
from experiments.data_scaling.tasks import shape_of, test_size

NAMES = {
    "quadratic": "attention, quadratic (isotropic)",
    "gaussian": "attention, generalised Gaussian",
    "relative": "attention, learned relative, without content",
    "relative_content": "attention, learned relative, with content",
    "resnet": "ResNet",
    "majority": "majority class",
    "logistic_regression": "logistic regression",
    "rbf_svm": "RBF-SVM",
}


def _convolution(row: Row) -> bool:
    return row.config.get("start") == "convolution"


def _name(row: Row) -> str:
    started = ", started as a convolution" if _convolution(row) else ""
    return NAMES[row.config["model"]] + started


def _order(row: Row) -> tuple[int, bool, int]:
    config = row.config
    return list(NAMES).index(config["model"]), _convolution(row), -config["n"]


def _of_images(group: Group) -> list[Row]:
    return [row for row in group.every if "n" in row.config]


def _is_long(row: Row, rows: Iterable[Row]) -> bool:
    """Whether there is the same with fewer updates."""
    names = ("model", "start", "n")
    same = [r for r in rows if all(r.config[k] == row.config[k] for k in names)]
    return row.config["updates"] > min(r.config["updates"] for r in same)


def _short(group: Group) -> list[Row]:
    rows = _of_images(group)
    return [row for row in rows if not _is_long(row, rows)]


def _largest(group: Group) -> int:
    return max(row.config["n"] for row in _of_images(group))


def _main(group: Group) -> list[Row]:
    """Of the largest N, started anywhere."""
    rows = [row for row in group.rows if row.config["n"] == _largest(group)]
    return [row for row in rows if not _convolution(row)]


def _centred(group: Group) -> list[Row]:
    """Of which it is known where their heads look."""
    return [r for r in group.rows if r.records and "centres" in r.records[0]["curves"]]


def _places(record: Record, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [layers, heads, 2] and precisions [layers, heads, 2, 2] at a moment."""
    curves = record["curves"]
    return np.asarray(curves["centres"][at]), np.asarray(curves["precisions"][at])


def _layers(record: Record, at: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same by layer."""
    return list(zip(*_places(record, at), strict=True))


# ------------------------------------------------------------ where heads look

Change = tuple[Summary, Summary]


def _before_after(row: Row) -> list[dict[str, Change]]:
    """For each layer, each measure before and after training, over the seeds."""
    ends = []
    for record in row.records:
        places = [_places(record, at) for at in (0, -1)]
        first, last = (grid_measures(*place) for place in places)
        moved = np.linalg.norm(places[1][0] - places[0][0], axis=-1).mean(-1)
        ends.append((first | dict(moved=0 * moved), last | dict(moved=moved)))
    return [
        {
            name: tuple(
                summarize([float(e[at][name][i]) for e in ends]) for at in (0, 1)
            )  # type: ignore[misc]
            for name in ends[0][0]
        }
        for i in range(len(ends[0][0]["distance"]))
    ]


def _change(pair: Iterable[Summary], digits: int = 2) -> str:
    return " → ".join(tell.mean(summary, digits).split(" (")[0] for summary in pair)


def _grid(group: Group) -> str:
    """The table of where heads look."""

    def measure(title: str, name: str, digits: int = 2) -> tuple[str, Callable]:
        return title, lambda item: _change(item[2][name], digits)

    return tell.tabulate(
        [
            ("model", lambda item: _name(item[0])),
            ("N", lambda item: f"{item[0].config['n']:,}"),
            ("layer", lambda item: str(item[1])),
            measure("distance", "distance"),
            measure("distinct", "distinct", 1),
            measure("in 3 × 3", "in_3x3"),
            measure("in 5 × 5", "in_5x5"),
            measure("largest weight", "peak"),
            measure("one token", "one_token"),
            ("moved", lambda item: _change(item[2]["moved"][1:])),
        ],
        [(r, i, x) for r in group.rows for i, x in enumerate(_before_after(r), 1)],
    )


def verdict(rows: Sequence[Row]) -> list[str]:
    """Do heads come to the grid, or stay on it, by a rule that is told.

    Yes: in every layer nearly all heads (.8 or more) look at one token, and the centres
    are nearer to whole offsets than half of what chance gives. Partly: in some layer.
    """
    found = []
    for row in rows:
        layers = _before_after(row)
        on_grid = [
            layer["one_token"][1].mean >= 0.8 and layer["distance"][1].mean < CHANCE / 2
            for layer in layers
        ]
        answer = "yes" if all(on_grid) else "partly" if any(on_grid) else "no"
        if _convolution(row):
            answer = {"yes": "keeps its grid", "no": "leaves its grid"}.get(
                answer, "keeps its grid in part"
            )
        distance, share, near = (
            "; ".join(_change(layer[name]) for layer in layers)
            for name in ("distance", "one_token", "in_3x3")
        )
        found.append(
            f"- {_name(row)}, N = {row.config['n']:,}: **{answer}** "
            f"({sum(on_grid)} of {len(layers)} layers). By layer, distance to the "
            f"nearest whole offset {distance}; heads that look at one token "
            f"{share}; within 3 × 3 {near}."
        )
    if not found:
        return []
    return [
        'The rule: "yes", or that it keeps its grid, where in every layer at least .8 '
        "of the heads look at one token and the "
        f"mean distance is below {CHANCE / 2:.2f}, half of chance; "
        '"partly" where in some layer. Distinct offsets alone say little: nine centres '
        "drawn from N(0, 2²) mostly have nine of them before any training. The paper "
        "says that heads come to attend to pixel-grid patterns as a CNN does, of 300 "
        "epochs of CIFAR-10 with 6 layers of width 400; this is "
        f"{rows[0].config['updates']:,} updates of a small model.",
        "\n".join(found),
    ]


# ------------------------------------------------------------------- figures


def _draw_training(row: Row, path: Any, panels: int = 7) -> None:
    """Draws where the heads of each layer look, at several moments of training."""
    record = row.records[0]
    steps, centres = record["curves"]["observed_at"], record["curves"]["centres"]
    shown = np.unique(np.linspace(0, len(steps) - 1, panels).round().astype(int))
    layers, reach = len(centres[0]), places.reach_of(centres)
    size = 1.75 * len(shown) + 0.9, 1.75 * layers + 1.2
    figure, axes = subplots(size, layers, len(shown), title=_name(row) + " (seed 0)")
    moments = [_layers(record, at) for at in shown]
    lines = [[moment[layer] for moment in moments] for layer in range(layers)]
    places.grid(figure, axes, lines, reach)
    for at, step in zip(axes[0], shown, strict=True):
        at.set_title(f"{steps[step]:,} updates", fontsize=8)
    for layer, at in enumerate(axes[:, 0], 1):
        at.set_ylabel(f"layer {layer}\nrows down", fontsize=8)
    save_figure(figure, path)


def _draw_final(rows: Sequence[Row], path: Any) -> None:
    """Draws where the heads of each layer look in the end, every model a line."""
    lines = [_layers(row.records[0], -1) for row in rows]
    layers = max(map(len, lines))
    reach = max(places.reach_of(c) for line in lines for c, _ in line)
    size = 2.3 * layers + 1.2, 2.3 * len(rows) + 1.2
    title = "Where heads look after training (seed 0), all on one scale"
    figure, axes = subplots(size, len(rows), layers, title=title)
    places.grid(figure, axes, lines, reach)
    for at, row in zip(axes[:, 0], rows, strict=True):
        start = "started as a convolution" if _convolution(row) else "started anywhere"
        model = NAMES[row.config["model"]].removeprefix("attention, ")
        at.set_ylabel(f"{model}\n{start}\nrows down", fontsize=8)
    for layer, at in enumerate(axes[0], 1):
        at.set_title(f"layer {layer}", fontsize=8)
    save_figure(figure, path)


def _training(group: Group) -> list[str]:
    """Figures of the largest N: while they train, and in the end."""
    rows, text = [r for r in group.rows if r.config["n"] == _largest(group)], []
    for row in rows:
        start = "_convolution" * _convolution(row)
        name = f"training_{row.config['model']}{start}.png"
        _draw_training(row, group.folder / name)
        text.append(f"![{_name(row)} during training]({name})")
    if rows:
        _draw_final(rows, group.folder / "centres.png")
        text.append("![centres after training](centres.png)")
    return text


def _maps(group: Group) -> list[str]:
    """What every head of learned encodings attends to from the middle token."""
    text = []
    for row in group.rows:
        model = row.config["model"]
        mapped = [r["metrics"] for r in row.records if "maps" in r["metrics"]]
        if not mapped or not model.startswith("relative"):
            continue
        title = f"{_name(row)}: attention of the middle token"
        if model == "relative_content":
            title += ", mean over test images"
        path = group.folder / f"maps_{model}.png"
        maps = np.asarray(mapped[0]["maps"], float)
        heads(list(maps), path, title=title, size=1.2, middle=True)
        if (share := mapped[0].get("content_share")) is not None:
            text.append(
                "With content, an image's own map differs from the mean over "
                f"images in {share:.2f} of its weight, on average over heads "
                "and layers (0: the same for every image; 1: nothing in common)."
            )
        text.append(f"![{_name(row)}]({path.name})")
    return text


# --------------------------------------------------------------------- tables


def baselines(records: Sequence[Record]) -> dict[int, dict[str, Summary]]:
    """N -> baseline -> accuracy: at the number of images that it saw."""
    found: dict[int, dict[str, list[float]]] = {}
    for record in records:
        metrics = record["metrics"]
        if record["config"].get("phase") == "baseline" and "n" in metrics:
            if metrics.get("n_used", metrics["n"]) == metrics["n"]:
                some = found.setdefault(metrics["n"], {})
                some.setdefault(metrics["baseline"], []).append(
                    metrics["test_accuracy"]
                )
    return {
        n: {name: summarize(values) for name, values in sorted(some.items())}
        for n, some in found.items()
    }


def _floors(group: Group) -> dict[str, Summary]:
    return baselines(group.records).get(group.config["n"], {})


def _mflops(row: Row) -> str:
    """FLOPs of one image as they are counted now, else as they were stored."""
    known = shape_of(row.config["task"])
    flops = row.first("flops") if known is None else flops_of(row.config, *known)
    return f"{(flops or 0) / 1e6:.1f}"


def _none_ahead(group: Group) -> list[str]:
    """Says first whether no network, or none with attention, beats every baseline."""
    floors = _floors(group)
    rows = [row for row in group.rows if row.of("test_accuracy")]
    if not floors or not rows:
        return []
    floor = max(floors, key=lambda name: floors[name].mean)
    best = max(rows, key=lambda row: row.mean("test_accuracy"))
    value = best.mean("test_accuracy")
    if value > floors[floor].mean:
        return []
    return [
        f"**No network beats {NAMES[floor]} ({tell.mean(floors[floor], 3)}) at N = "
        f"{group.config['n']:,}; the best, {_name(best)}, has "
        f"{tell.decimal(value, 3)}.**"
    ]


def _intro(group: Group) -> str:
    config = group.config
    fewer = [r for r in group.rows if r.config["updates"] != config["updates"]]
    return (
        "{task}, N = {n:,} training images to draw from, {updates:,} updates of "
        "{batch_size} images ({passes:.2f} passes), mean ± standard deviation over "
        "seeds. Attention: tokens of {patch} × {patch} pixels, {depth} layers, width "
        "{dim}, {num_heads} heads of full width; centres start from N(0, 2²). The "
        "ResNet is matched in parameters, not in FLOPs, as in the paper. Isotropic and "
        "learned encodings without content are applied to rows, then columns, and so "
        "cost less than the generalised one."
    ).format(
        passes=config["updates"] * config["batch_size"] / config["n"], **config
    ) + "".join(f" {_name(r)} had {r.config['updates']:,} updates only." for r in fewer)


def _tried(group: Group) -> list[str]:
    """Which learning rates the validation part chose from."""
    by_model: dict[str, set[float]] = {}
    for record in group.records:
        config = record["config"]
        if config.get("phase") == "tune" and "n" in config:
            by_model.setdefault(config["model"], set()).add(config["learning_rate"])
    attention = [rates for model, rates in by_model.items() if model != "resnet"]
    alike = all(rates == attention[0] for rates in attention)
    tried = {
        "attention" if alike and model != "resnet" else NAMES[model]: rates
        for model, rates in by_model.items()
    }
    if not tried:
        return []
    said = "; ".join(
        f"{family} {', '.join(f'{rate:g}' for rate in sorted(rates))}"
        for family, rates in sorted(tried.items())
    )
    return [
        "Learning rates tried on the validation part, in short runs of seed 0: "
        f"{said}. Where the largest was chosen, a still larger one might be better."
    ]


# --------------------------------------------------------------------- starts

_RANDOM, _CONVOLUTION, _RESNET = (
    ("quadratic", "random"),
    ("quadratic", "convolution"),
    ("resnet", None),
)
_KINDS = {
    "attention, random start": _RANDOM,
    "attention, convolution at the start": _CONVOLUTION,
    "ResNet": _RESNET,
}


def _starts_text(group: Group) -> str:
    config = next(row.config for row in group.rows if _convolution(row))
    side = math.isqrt(config["num_heads"])
    seen = 1 + config["depth"] * (side - 1)
    return (
        "Quadratic encoding. All heads of every layer start on the places of a "
        f"{side} × {side} kernel, as sharp as the theorem's, with a He-normal kernel: "
        "at first such a layer is the convolution with its border repeated, and the "
        f"{config['depth']} of them see {seen} × {seen} tokens. Or heads start "
        "anywhere, with the same value maps. Equal updates at every N; learning rates "
        "from the largest N. In brackets Student's interval of 95 % over seeds."
    )


def _starts(group: Group) -> list[str]:
    """Table and figure of accuracy over N: started as a convolution, and not."""
    by = {
        (r.config["model"], r.config.get("start"), r.config["n"]): r for r in group.rows
    }
    sizes = sorted({row.config["n"] for row in group.rows if _convolution(row)})
    floors = baselines(group.records)
    names = sorted({name for some in floors.values() for name in some})

    def of(kind: tuple[str, str | None], n: int) -> Summary | None:
        row = by.get((*kind, n))
        return None if row is None else row.of("test_accuracy")

    def apart(one: tuple[str, str | None], two: tuple[str, str | None]) -> Any:
        def show(n: int) -> str:
            first, second = by.get((*one, n)), by.get((*two, n))
            if not (first and second and first.records and second.records):
                return tell.NONE
            return tell.difference(first, second, "test_accuracy", 3)[1]

        return show

    lines = {label: [(n, of(kind, n)) for n in sizes] for label, kind in _KINDS.items()}
    grey = {
        NAMES[name]: [(n, floors.get(n, {}).get(name)) for n in sizes]
        for name in names
        if name != "majority"
    }
    series = [Series.of(label, points) for label, points in lines.items()]
    series += [Series.of(name, points, baseline=True) for name, points in grey.items()]
    text = [
        tell.tabulate(
            [
                ("N", lambda n: f"{n:,}"),
                *(
                    (label, lambda n, kind=kind: tell.mean(of(kind, n), 3))
                    for label, kind in _KINDS.items()
                ),
                *(
                    (NAMES[x], lambda n, x=x: tell.mean(floors.get(n, {}).get(x), 3))
                    for x in names
                ),
                ("convolution − random start", apart(_CONVOLUTION, _RANDOM)),
                ("random start − ResNet", apart(_RANDOM, _RESNET)),
            ],
            sizes,
        )
    ]
    series = [line for line in series if line.x]
    if series and len(sizes) > 1:  # of one N the table says it all
        styles = Styles(lines, [line.label for line in series if line.baseline])
        board = Panel(
            "Started as a convolution, and anywhere",
            "training images N, log scale (bands: one deviation)",
            "test accuracy",
            series,
            doubling=True,
        )
        panels([board], group.folder / "starts.png", styles)
        text.append("![accuracy over N](starts.png)")
    return text


# ----------------------------------------------------------------------- long


def _long_rows(group: Group) -> list[Row]:
    rows = _of_images(group)
    return [row for row in rows if _is_long(row, rows)]


def _while_training(row: Row, measure: str) -> list[Series]:
    """A measure of `grid_measures` against updates, a line a layer, over seeds."""
    steps = row.records[0]["curves"]["observed_at"]
    values = np.asarray(
        [
            [grid_measures(*_places(record, at))[measure] for at in range(len(steps))]
            for record in row.records
        ]
    )  # [seeds, moments, layers]
    return [
        Series.of(
            f"layer {layer + 1}",
            [(s, summarize(list(values[:, i, layer]))) for i, s in enumerate(steps)],
        )
        for layer in range(values.shape[-1])
    ]


def _is_round(number: float) -> bool:
    """Whether a number is one, two or five times a power of ten."""
    return str(int(number)).rstrip("0") in ("1", "2", "5")


def _longer(group: Group) -> list[str]:
    """Share of heads that look at one token, and distance to the grid, by layer."""
    row = group.rows[0]
    shares, distances = (
        _while_training(row, measure) for measure in ("one_token", "distance")
    )
    label = "share of heads that look at one token"
    far = "distance to the nearest whole offset, tokens"
    boards = [
        Panel("Heads on one token", "updates", label, shares, ylim=(-0.02, 1.02)),
        Panel(
            "Distance to the pixel grid",
            "updates",
            far,
            distances,
            level=(CHANCE, "chance"),
            ylim=(0.0, None),
        ),
    ]
    boards = [dataclasses.replace(board, markersize=0) for board in boards]
    styles = Styles([line.label for line in shares])
    panels(boards, group.folder / "long.png", styles)
    moments = [m for m in shares[0].x if m == 0 or (m >= 500 and _is_round(m))]
    table = tell.table(
        ["heads on one token", *(f"{m:,}" for m in moments)],
        [
            [line.label, *(tell.decimal(line.y[line.x.index(m)], 2) for m in moments)]
            for line in shares
        ],
    )
    return [table, "![heads on one token against updates](long.png)"]


def _against_short(group: Group) -> list[str]:
    """What more updates did to accuracy and to the heads of each layer."""
    row, lines = group.rows[0], []
    names = ("model", "start", "n")
    short = next(
        r
        for r in _short(group)
        if all(r.config[name] == row.config[name] for name in names)
    )
    _, text = tell.difference(row, short, "test_accuracy", 3)
    lines.append(
        f"* Test accuracy {tell.mean(row.of('test_accuracy'), 3)}, "
        f"{text} of that after {short.config['updates']:,} updates."
    )
    for layer in range(len(_layers(row.records[0], -1))):
        now, then = (
            {
                record["config"]["seed"]: float(
                    grid_measures(*_places(record, -1))["one_token"][layer]
                )
                for record in some.records
            }
            for some in (row, short)
        )
        found = gap(now, then)
        lines.append(
            f"* Layer {layer + 1}: share of heads on one token "
            f"{tell.decimal(found.mean, 2, sign=True)} {tell.interval(found, 2)} of "
            "that of the shorter run."
        )
    return ["\n".join(lines)]


_IMAGES = Section(
    title=lambda group: [],
    rows=_short,
    order=_order,
    sections=(
        Section(
            title=_none_ahead,
            rows=_main,
            text=(_intro,),
            columns=(
                ("model", _name),
                tell.score("test accuracy", "test_accuracy", 3),
                tell.score("training accuracy", "train_accuracy", 3),
                tell.PARAMETERS,
                ("forward MFLOPs an image", _mflops),
                tell.RATE,
                tell.DIVERGED,
            ),
            floors=lambda group: [
                [NAMES[name], tell.mean(floor, 3)]
                for name, floor in _floors(group).items()
            ],
            notes=(
                tell.sampling(
                    "test_accuracy", lambda c: test_size(c["task"]), "test images", 3
                ),
                _tried,
            ),
        ),
        Section(
            title="## Do heads move to a pixel grid?",
            rows=_centred,
            text=(
                "Each number before → after training, mean ± deviation over seeds. "
                "Distance: from a head's centre to the nearest whole offset between "
                "tokens, mean over heads; for centres anywhere it would be "
                f"{CHANCE:.2f}, for a convolution 0. Distinct: different nearest "
                "offsets among the heads of a layer. One token: share of heads that "
                "give half of their weight or more to one token, as every head of a "
                "convolution does. "
                "Moved: mean way of a centre, in tokens.",
                _grid,
            ),
            notes=(
                lambda group: verdict(group.rows),
                "In the figures a cell is a token, each head has a colour, and shaded "
                "is what lies within one deviation of its centre, where that is not "
                "wider than 10 tokens.",
                _training,
            ),
        ),
        Section(title=_maps, rows=_main),
        Section(
            title="## Started as a convolution, or anywhere",
            rows=lambda group: group.rows if any(map(_convolution, group.rows)) else [],
            text=(_starts_text,),
            notes=(_starts,),
        ),
    ),
)

_LONG = Section(
    title="## Do more updates bring heads to the grid?",
    rows=_long_rows,
    text=(
        "The quadratic encoding from a random start at N = {n:,}, {updates:,} updates "
        "of {batch_size} images in place of the fewer above, learning rate "
        "{learning_rate:g}, the best of more on validation images in short runs. The "
        "paper's 300 epochs of CIFAR-10 are 15 million images; these are far fewer. "
        "Bands are one deviation over seeds, brackets Student's interval of 95 %.",
    ),
    notes=(_longer, _against_short, lambda group: verdict(group.rows)),
)

REPORT = Report(
    title="# Self-attention that places its heads, and convolution",
    sections=(TEACHER, _IMAGES, _LONG),
)
