"""Tables and figures of the experiment, from stored results alone.

`python -m experiments attention_as_conv --redraw FOLDER` redraws report.md and the
figures of a folder that holds results.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Ellipse

from experiments.attention_as_conv.cells import flops_of
from experiments.attention_as_conv.grid import CHANCE, grid_measures
from experiments.attention_as_conv.teacher_report import TEACHER
from experiments.core import report as tell
from experiments.core.plots import PALETTE, Series, curve, heads, save_figure, subplots
from experiments.core.report import Group, Report, Row, Section
from experiments.core.stats import Summary, summarize
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
    """The answer for heads that start anywhere, by a rule that is told.

    Yes: in every layer nearly all heads (.8 or more) look at one token, and the centres
    are nearer to whole offsets than half of what chance gives. Partly: in some layer.
    """
    found = []
    for row in rows:
        if _convolution(row):
            continue
        layers = _before_after(row)
        on_grid = [
            layer["one_token"][1].mean >= 0.8 and layer["distance"][1].mean < CHANCE / 2
            for layer in layers
        ]
        answer = "yes" if all(on_grid) else "partly" if any(on_grid) else "no"
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
        'The rule: "yes" where in every layer at least .8 of the heads look at one '
        f"token and the mean distance is below {CHANCE / 2:.2f}, half of chance; "
        '"partly" where in some layer. Distinct offsets alone say little: nine centres '
        "drawn from N(0, 2²) mostly have nine of them before any training. The paper "
        "says that heads come to attend to pixel-grid patterns as a CNN does, of 300 "
        "epochs of CIFAR-10 with 6 layers of width 400; this is "
        f"{rows[0].config['updates']:,} updates of a small model.",
        "\n".join(found),
    ]


# ------------------------------------------------------------------- figures


def _panel(axes: Any, place: tuple[np.ndarray, np.ndarray], reach: int) -> None:
    """Where the heads of a layer look; rows run downwards."""
    axes.set_xlim(-reach - 0.5, reach + 0.5)
    axes.set_ylim(reach + 0.5, -reach - 0.5)
    axes.set_aspect("equal")
    edges = np.arange(-reach - 0.5, reach + 1)
    lines = dict(color="#dddddd", linewidth=0.5, zorder=0)
    axes.hlines(edges, edges[0], edges[-1], **lines)
    axes.vlines(edges, edges[0], edges[-1], **lines)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.plot(0, 0, marker="s", color="#bbbbbb", markersize=5, zorder=1)
    for head, (centre, precision) in enumerate(zip(*place, strict=True)):
        color = PALETTE[head % len(PALETTE)]  # 9 heads have one each
        values, vectors = np.linalg.eigh(precision)
        if values[0] >= 1e-2:  # of one deviation; one wider than the panel is left out
            angle = float(np.degrees(np.arctan2(vectors[0, 0], vectors[1, 0])))
            width, height = 2 / np.sqrt(values)
            look: Any = dict(facecolor=color, edgecolor=color, alpha=0.25)
            look |= dict(angle=angle, linewidth=0.8)
            axes.add_patch(Ellipse(tuple(centre[::-1]), width, height, **look))
        axes.plot(centre[1], centre[0], marker="o", color=color, markersize=3.5)


def _reach(centres: Any) -> int:
    """Offsets that a panel shows: those of all centres, but at least 3, at most 9."""
    return int(np.clip(np.ceil(np.abs(centres).max()), 3, 9))


def _draw_training(row: Row, path: Any, panels: int = 7) -> None:
    """Draws where the heads of each layer look, at several moments of training."""
    record = row.records[0]
    steps, centres = record["curves"]["observed_at"], record["curves"]["centres"]
    shown = np.unique(np.linspace(0, len(steps) - 1, panels).round().astype(int))
    layers, reach = len(centres[0]), _reach(np.asarray(centres))
    size = 1.7 * len(shown) + 0.6, 1.7 * layers + 0.7
    figure, grid = subplots(size, layers, len(shown), title=_name(row))
    for column, at in enumerate(shown):
        grid[0, column].set_title(f"{steps[at]:,} updates", fontsize=8)
        for axes, place in zip(grid[:, column], _layers(record, at), strict=True):
            _panel(axes, place, reach)
    for layer, axes in enumerate(grid[:, 0], 1):
        axes.set_ylabel(f"layer {layer}", fontsize=8)
    save_figure(figure, path)


def _draw_final(rows: Sequence[Row], path: Any) -> None:
    """Draws where the heads of each layer look in the end, every model a line."""
    found = [_layers(row.records[0], -1) for row in rows]
    layers = max(map(len, found))
    size = 2.2 * layers + 0.6, 2.2 * len(rows) + 0.7
    title = "Centres of heads after training"
    figure, grid = subplots(size, len(rows), layers, title=title)
    for line, row, places in zip(grid, rows, found, strict=True):
        reach = _reach(np.stack([centres for centres, _ in places]))
        for layer, place in enumerate(places):
            _panel(line[layer], place, reach)
            line[layer].set_title(f"layer {layer + 1}", fontsize=8)
        start = "convolution" if _convolution(row) else "random"
        line[0].set_ylabel(f"{row.config['model']}\n{start} start", fontsize=8)
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
    tried: dict[str, set[float]] = {}
    for record in group.records:
        config = record["config"]
        if config.get("phase") == "tune":
            family = "ResNet" if config["model"] == "resnet" else "attention"
            tried.setdefault(family, set()).add(config["learning_rate"])
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
    if series := [line for line in series if line.x]:
        curve(
            series,
            group.folder / "starts.png",
            title="Attention started as a convolution, and anywhere",
            note="Mean and standard deviation over seeds.",
        )
        text.append("![accuracy over N](starts.png)")
    return text


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
                "In the figures a cell is a token, grey is the query, a dot the centre "
                "of a head (seed 0), and shaded what lies within one deviation of it, "
                "where that is not wider than 10 tokens.",
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

REPORT = Report(
    title="# Self-attention that places its heads, and convolution",
    sections=(TEACHER, _IMAGES),
)
