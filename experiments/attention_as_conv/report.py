"""Tables and figures of the experiment, from stored results alone.

`python -m experiments.attention_as_conv.report FOLDER` redraws report.md and the
figures of a folder that holds results.jsonl.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attn_jax._program import program
from experiments.attention_as_conv.run import flops_of
from experiments.core.plots import PALETTE, Series, curve, save_figure
from experiments.core.stats import Summary, summarize
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

# Mean distance of a place drawn evenly in the plane to the nearest whole place.
CHANCE = 0.3826

# Weight of one token from which a head is said to look at one token.
ONE_TOKEN = 0.5


def _name(config: Mapping[str, Any]) -> str:
    name = NAMES[config["model"]]
    return f"{name}, started as a convolution" if _convolution(config) else name


def _convolution(config: Mapping[str, Any]) -> bool:
    return config.get("start") == "convolution"


# ------------------------------------------------------------ where heads look


def peak_weight(centres: np.ndarray, precisions: np.ndarray) -> np.ndarray:
    """Weight of the token that a head attends to most, far from any border.

    Args:
      centres: [..., 2], in tokens.
      precisions: [..., 2, 2], inverse covariances.

    Returns:
      [...], in (0, 1].

    >>> float(peak_weight(np.zeros(2), 100.0 * np.eye(2)))
    1.0
    """
    reach = 15
    side = np.arange(-reach, reach + 1.0)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    offset = grid - (centres - np.round(centres))[..., None, :]
    score = -0.5 * np.einsum("...pi,...ij,...pj->...p", offset, precisions, offset)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return (weight / weight.sum(-1, keepdims=True)).max(-1)


def grid_measures(centres: Any, precisions: Any) -> dict[str, np.ndarray]:
    """How near the heads of each layer are to being a convolution's.

    Args:
      centres: [layers, heads, 2], in tokens.
      precisions: [layers, heads, 2, 2], inverse covariances, in tokens⁻².

    Returns:
      By name, one number a layer: "distance" of centres to the nearest whole offset,
      mean; "distinct" such offsets; "in_3x3" and "in_5x5", the share of heads whose
      offset is there; "peak", the mean weight of the most attended token; "one_token",
      the share of heads with half of their weight or more on one.

    >>> found = grid_measures([[[0.0, 1.0], [0.0, 2.5]]], [[[[9.0, 0], [0, 9.0]]] * 2])
    >>> found["distance"].tolist(), found["distinct"].tolist()
    ([0.25], [2])
    """
    places = np.asarray(centres, float)
    near = np.round(places)
    peak = peak_weight(places, np.asarray(precisions, float))
    largest = np.abs(near).max(-1)
    return {
        "distance": np.linalg.norm(places - near, axis=-1).mean(-1),
        "distinct": np.asarray([len(np.unique(layer, axis=0)) for layer in near]),
        "in_3x3": (largest <= 1).mean(-1),
        "in_5x5": (largest <= 2).mean(-1),
        "peak": peak.mean(-1),
        "one_token": (peak >= ONE_TOKEN).mean(-1),
    }


def _before_after(row: Row) -> list[dict[str, tuple[Summary, Summary]]]:
    """For each layer, each measure before and after training, over the seeds."""
    ends = []
    for record in row.records:
        curves = record["curves"]
        first, last = (
            grid_measures(curves["centres"][at], curves["precisions"][at])
            for at in (0, -1)
        )
        moved = np.linalg.norm(
            np.subtract(curves["centres"][-1], curves["centres"][0]), axis=-1
        ).mean(-1)
        first["moved"], last["moved"] = np.zeros_like(moved), moved
        ends.append((first, last))
    layers = len(ends[0][0]["distance"])
    return [
        {
            name: tuple(  # type: ignore[misc]
                summarize([float(end[at][name][layer]) for end in ends])
                for at in (0, 1)
            )
            for name in ends[0][0]
        }
        for layer in range(layers)
    ]


def _change(pair: tuple[Summary, Summary], digits: int = 2) -> str:
    before, after = (number(summary, digits).split(" (")[0] for summary in pair)
    return f"{before} → {after}"


def _places(rows: Sequence[Row]) -> list[str]:
    """The table of where heads look, and what it says."""
    text = [
        "## Do heads move to a pixel grid?",
        "",
        "Each number before → after training, mean ± deviation over seeds. Distance: "
        "from a head's centre to the nearest whole offset between tokens, mean over "
        f"heads; for centres anywhere it would be {CHANCE:.2f}, for a convolution 0. "
        "Distinct: different nearest offsets among the heads of a layer. One token: "
        "share of heads that give half of their weight or more to one token, as every "
        "head of a convolution does. Moved: mean way of a centre, in tokens.",
        "",
    ]
    lines = [
        "| model | N | layer | distance | distinct | in 3 × 3 | in 5 × 5 | "
        "largest weight | one token | moved |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        for layer, found in enumerate(_before_after(row), start=1):
            cells = [
                _name(row.config),
                f"{row.config['n']:,}",
                str(layer),
                *(
                    _change(found[name], 1 if name == "distinct" else 2)
                    for name in (
                        "distance distinct in_3x3 in_5x5 peak one_token".split()
                    )
                ),
                number(found["moved"][1], 2).split(" (")[0],
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return [*text, *lines, "", *verdict(rows), ""]


def verdict(rows: Sequence[Row]) -> list[str]:
    """The answer for heads that start anywhere, by a rule that is told.

    Yes: in every layer nearly all heads (.8 or more) look at one token, and the centres
    are nearer to whole offsets than half of what chance gives. Partly: in some layer.
    """
    found = []
    for row in rows:
        if _convolution(row.config):
            continue
        layers = _before_after(row)
        on_grid = [
            layer["one_token"][1].mean >= 0.8 and layer["distance"][1].mean < CHANCE / 2
            for layer in layers
        ]
        answer = "yes" if all(on_grid) else "partly" if any(on_grid) else "no"
        distance = [_change(layer["distance"]) for layer in layers]
        share = [_change(layer["one_token"]) for layer in layers]
        near = [_change(layer["in_3x3"]) for layer in layers]
        found.append(
            f"- {_name(row.config)}, N = {row.config['n']:,}: **{answer}** "
            f"({sum(on_grid)} of {len(layers)} layers). By layer, distance to the "
            f"nearest whole offset {'; '.join(distance)}; heads that look at one token "
            f"{'; '.join(share)}; within 3 × 3 {'; '.join(near)}."
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
        "",
        *found,
    ]


# ------------------------------------------------------------------- figures


def _figure(
    rows: int, columns: int, title: str, size: float = 1.7
) -> tuple[Any, np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(size * columns + 0.6, size * rows + 0.7), dpi=100, layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _ellipse(axes: Any, centre: np.ndarray, precision: np.ndarray, color: str) -> None:
    """The line of one standard deviation; one wider than the panel is left out."""
    from matplotlib.patches import Ellipse

    values, vectors = np.linalg.eigh(precision)
    if values[0] < 1e-2:
        return
    widths = 2 / np.sqrt(values)
    angle = float(np.degrees(np.arctan2(vectors[0, 0], vectors[1, 0])))
    # Columns run to the right, rows downwards: (x, y) = (column, row).
    axes.add_patch(
        Ellipse(
            (centre[1], centre[0]),
            widths[0],
            widths[1],
            angle=angle,
            facecolor=color,
            edgecolor=color,
            alpha=0.25,
            linewidth=0.8,
        )
    )


def _panel(axes: Any, centres: np.ndarray, precisions: np.ndarray, reach: int) -> None:
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
    for head, (centre, precision) in enumerate(zip(centres, precisions, strict=True)):
        color = PALETTE[head % len(PALETTE)]  # 9 heads have one each
        _ellipse(axes, centre, precision, color)
        axes.plot(centre[1], centre[0], marker="o", color=color, markersize=3.5)


def draw_training(record: Record, path: pathlib.Path, panels: int = 7) -> pathlib.Path:
    """Draws where the heads of each layer look, at several moments of training."""
    curves = record["curves"]
    steps = curves["observed_at"]
    shown = np.unique(np.linspace(0, len(steps) - 1, panels).round().astype(int))
    centres, precisions = (
        np.asarray(curves[name], float) for name in ("centres", "precisions")
    )
    layers = centres.shape[1]
    figure, axes = _figure(
        layers,
        len(shown),
        f"{_name(record['config'])}",
    )
    reach = _reach(centres)
    for column, at in enumerate(shown):
        axes[0, column].set_title(f"{steps[at]:,} updates", fontsize=8)
        for layer in range(layers):
            _panel(
                axes[layer, column], centres[at, layer], precisions[at, layer], reach
            )
    for layer in range(layers):
        axes[layer, 0].set_ylabel(f"layer {layer + 1}", fontsize=8)
    return save_figure(figure, path)


def _reach(centres: np.ndarray) -> int:
    """Offsets that a panel shows: those of all centres, but at least 3, at most 9."""
    return int(np.clip(np.ceil(np.abs(centres).max()), 3, 9))


def draw_final(rows: Sequence[Row], path: pathlib.Path) -> pathlib.Path:
    """Draws where the heads of each layer look in the end, every model a line."""
    found = [
        (row.config, np.asarray(row.records[0]["curves"]["centres"][-1], float), row)
        for row in rows
    ]
    layers = max(centres.shape[0] for _, centres, _ in found)
    figure, axes = _figure(
        len(found), layers, "Centres of heads after training", size=2.2
    )
    for line, (config, centres, row) in enumerate(found):
        precisions = np.asarray(row.records[0]["curves"]["precisions"][-1], float)
        for layer in range(layers):
            panel = axes[line, layer]
            _panel(panel, centres[layer], precisions[layer], _reach(centres))
            panel.set_title(f"layer {layer + 1}", fontsize=8)
        label = "convolution" if _convolution(config) else "random"
        axes[line, 0].set_ylabel(f"{config['model']}\n{label} start", fontsize=8)
    return save_figure(figure, path)


def draw_maps(record: Record, path: pathlib.Path) -> pathlib.Path:
    """Draws what every head of every layer attends to from the middle token."""
    maps = np.asarray(record["metrics"]["maps"], float)
    layers, heads, rows, columns = maps.shape
    title = f"{_name(record['config'])}: attention of the middle token"
    if record["config"]["model"] == "relative_content":
        title += ", mean over test images"
    figure, axes = _figure(layers, heads, title, size=1.2)
    for layer in range(layers):
        for head in range(heads):
            panel = axes[layer, head]
            panel.imshow(maps[layer, head], cmap="magma", vmin=0)
            panel.plot(columns // 2, rows // 2, "s", color="#56B4E9", markersize=2)
            panel.set_xticks([])
            panel.set_yticks([])
            if layer == 0:
                panel.set_title(f"head {head + 1}", fontsize=7)
        axes[layer, 0].set_ylabel(f"layer {layer + 1}", fontsize=7)
    return save_figure(figure, path)


# --------------------------------------------------------------------- tables


def _baselines(records: Sequence[Record]) -> dict[tuple[str, int], Summary]:
    """Accuracy of each baseline at each N: at the number of images that it saw."""
    found: dict[tuple[str, int], list[float]] = {}
    for record in records:
        if record["config"].get("phase") == "baseline":
            metrics = record["metrics"]
            if metrics.get("n_used", metrics["n"]) == metrics["n"]:
                key = metrics["baseline"], metrics["n"]
                found.setdefault(key, []).append(metrics["test_accuracy"])
    return {key: summarize(values) for key, values in found.items()}


def _encodings(
    rows: Sequence[Row], baselines: Mapping[tuple[str, int], Summary]
) -> list[str]:
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("model", lambda row: _name(row.config)),
        ("test accuracy", lambda row: number(row.of("test_accuracy"), 3)),
        ("training accuracy", lambda row: number(row.of("train_accuracy"), 3)),
        ("parameters", lambda row: f"{row.first('params') or 0:,}"),
        (
            "forward MFLOPs an image",
            lambda row: f"{(_flops(row) or 0) / 1e6:.1f}",
        ),
        ("learning rate", lambda row: f"{row.config['learning_rate']:g}"),
        ("diverged", lambda row: str(row.diverged)),
    ]
    lines = table(rows, columns)
    n = rows[0].config["n"]
    for (model, size), summary in sorted(baselines.items()):
        if size == n:
            lines.append(
                f"| {NAMES[model]} | {number(summary, 3)} |"
                + " – |" * (len(columns) - 2)
            )
    return lines


def _flops(row: Row) -> float | None:
    """FLOPs of one image as they are counted now, else as they were stored."""
    known = shape_of(row.config["task"])
    return row.first("flops") if known is None else flops_of(row.config, *known)


def _none_ahead(
    rows: Sequence[Row], baselines: Mapping[tuple[str, int], Summary]
) -> list[str]:
    """Says first whether no network, or none with attention, beats every baseline."""
    n = rows[0].config["n"]
    floors = {name: s for (name, size), s in baselines.items() if size == n}
    means = {
        _name(row.config): s.mean
        for row in rows
        if (s := row.of("test_accuracy")) is not None
    }
    if not floors or not means:
        return []
    floor = max(floors, key=lambda name: floors[name].mean)
    best = max(means, key=lambda name: means[name])
    if means[best] > floors[floor].mean:
        return []
    value = f"{means[best]:.3f}".lstrip("0")
    return [
        f"**No network beats {NAMES[floor]} ({number(floors[floor], 3)}) at N = {n:,}; "
        f"the best, {best}, has {value}.**",
        "",
    ]


def _tried(records: Sequence[Record]) -> list[str]:
    """Which learning rates the validation part chose from."""
    tried: dict[str, set[float]] = {}
    for record in records:
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
        f"{said}. Where the largest was chosen, a still larger one might be better.",
        "",
    ]


def _starts(
    rows: Sequence[Row],
    baselines: Mapping[tuple[str, int], Summary],
    folder: pathlib.Path,
) -> list[str]:
    """Table and figure of accuracy over N: started as a convolution, and not."""
    kinds = {
        "attention, random start": ("quadratic", "random"),
        "attention, convolution at the start": ("quadratic", "convolution"),
        "ResNet": ("resnet", None),
    }
    by = {
        (row.config["model"], row.config.get("start"), row.config["n"]): row
        for row in rows
    }
    sizes = sorted({n for model, start, n in by if start == "convolution"})
    names = sorted({model for model, _ in baselines})
    lines = [
        "| N | "
        + " | ".join([*kinds, *(NAMES[name] for name in names)])
        + " | convolution − random start | random start − ResNet |",
        "|" + "---|" * (len(kinds) + len(names) + 3),
    ]
    for n in sizes:
        cells = [f"{n:,}"]
        for model, start in kinds.values():
            row = by.get((model, start, n))
            cells.append("–" if row is None else number(row.of("test_accuracy"), 3))
        cells += [number(baselines.get((name, n)), 3) for name in names]
        convolution, random, resnet = (
            by.get((model, start, n))
            for model, start in (
                ("quadratic", "convolution"),
                ("quadratic", "random"),
                ("resnet", None),
            )
        )
        for one, two in ((convolution, random), (random, resnet)):
            if one and two and one.records and two.records:
                cells.append(difference(one, two, "test_accuracy", 3)[1])
            else:
                cells.append("–")
        lines.append("| " + " | ".join(cells) + " |")
    series = []
    for label, (model, start) in kinds.items():
        points = [
            (n, summary)
            for n in sizes
            if (row := by.get((model, start, n))) is not None
            and (summary := row.of("test_accuracy")) is not None
        ]
        if points:
            series.append(_series(label, points))
    for name in names:
        if name != "majority":
            points = [(n, baselines[name, n]) for n in sizes if (name, n) in baselines]
            if points:
                series.append(_series(NAMES[name], points, baseline=True))
    config = next(row.config for row in rows if _convolution(row.config))
    side = math.isqrt(config["num_heads"])
    seen = 1 + config["depth"] * (side - 1)
    text = [
        "## Started as a convolution, or anywhere",
        "",
        "Quadratic encoding. All heads of every layer start on the places of a "
        f"{side} × {side} kernel, as sharp as the theorem's, with a He-normal kernel: "
        "at first such a layer is the convolution with its border repeated, and the "
        f"{config['depth']} of them see {seen} × {seen} tokens. Or heads start "
        "anywhere, with the same value maps. Equal updates at every N; learning rates "
        "from the largest N. In brackets Student's interval of 95 % over seeds.",
        "",
        *lines,
        "",
    ]
    if series:
        curve(
            series,
            folder / "starts.png",
            title="Attention started as a convolution, and anywhere",
            note="Mean and standard deviation over seeds.",
        )
        text += ["![accuracy over N](starts.png)", ""]
    return text


def _series(
    label: str, points: Sequence[tuple[int, Summary]], baseline: bool = False
) -> Series:
    return Series(
        label,
        [n for n, _ in points],
        [summary.mean for _, summary in points],
        [summary.std for _, summary in points],
        [summary.count for _, summary in points],
        baseline=baseline,
    )


def write_report(records: Sequence[Record], folder: pathlib.Path) -> str:
    """Writes report.md and the figures; returns the text for the terminal."""
    rows = rows_of(records)
    if not rows:
        raise ValueError("records: there is no finished cell to report.")
    order = list(NAMES)
    rows.sort(
        key=lambda row: (
            order.index(row.config["model"]),
            _convolution(row.config),
            -row.config["n"],
        )
    )
    baselines = _baselines(records)
    config = rows[0].config
    largest = max(row.config["n"] for row in rows)
    main = [
        row
        for row in rows
        if row.config["n"] == largest and not _convolution(row.config)
    ]
    fewer = [row.config for row in main if row.config["updates"] != config["updates"]]
    done = [row for row in rows if row.records]
    centred = [row for row in done if "centres" in row.records[0]["curves"]]
    text = [
        "# Self-attention that places its heads, and convolution",
        "",
        *_none_ahead(main, baselines),
        f"{config['task']}, N = {largest:,} training images to draw from, "
        f"{config['updates']:,} updates of {config['batch_size']} images "
        f"({config['updates'] * config['batch_size'] / largest:.2f} passes), mean ± "
        "standard deviation over seeds. Attention: "
        f"tokens of {config['patch']} × {config['patch']} pixels, {config['depth']} "
        f"layers, width {config['dim']}, {config['num_heads']} heads of full width; "
        "centres start from N(0, 2²). The ResNet is matched "
        "in parameters, not in FLOPs, as in the paper. Isotropic and learned encodings "
        "without content are applied to rows, then columns, and so cost less than the "
        "generalised one."
        + "".join(f" {_name(c)} had {c['updates']:,} updates only." for c in fewer),
        "",
        *_encodings(main, baselines),
        "",
        *sampling_note(
            main,
            lambda row: _name(row.config),
            "test_accuracy",
            test_size(config["task"]),
            "test images",
            3,
        ),
        *_tried(records),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    if centred:
        text += [
            *_places(centred),
            "In the figures a cell is a token, grey is the query, a dot the centre of "
            "a head (seed 0), and shaded what lies within one deviation of it, where "
            "that is not wider than 10 tokens.",
            "",
        ]
        for row in centred:
            if row.config["n"] != largest:
                continue
            start = "_convolution" if _convolution(row.config) else ""
            name = f"training_{row.config['model']}{start}.png"
            draw_training(row.records[0], folder / name)
            text += [f"![{_name(row.config)} during training]({name})", ""]
        last = [row for row in centred if row.config["n"] == largest]
        if last:
            draw_final(last, folder / "centres.png")
            text += ["![centres after training](centres.png)", ""]
    for row in main:
        config = row.config
        mapped = [r for r in row.records if "maps" in r["metrics"]]
        if mapped and config["model"].startswith("relative"):
            name = f"maps_{config['model']}.png"
            draw_maps(mapped[0], folder / name)
            share = mapped[0]["metrics"].get("content_share")
            if share is not None:
                text += [
                    "With content, an image's own map differs from the mean over "
                    f"images in {share:.2f} of its weight, on average over heads "
                    "and layers (0: the same for every image; 1: nothing in common).",
                    "",
                ]
            text += [f"![{_name(config)}]({name})", ""]
    if any(_convolution(row.config) for row in rows):
        text += _starts(rows, baselines, folder)
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")
    return "\n".join([*text, f"Report and figures: {folder}/report.md"])


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Redraws the report of a folder; returns the exit status."""
    return redraw(__doc__, write_report, argv)


if __name__ == "__main__":
    sys.exit(main())
