"""Tables and figures of the experiment, from stored results alone.

`python -m experiments attention_vs_rnn --redraw FOLDER` redraws report.md and the
figures of a folder that holds results.jsonl and, if it was measured, timing.json.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.attention_vs_rnn.data import unpack
from experiments.core import report as tell
from experiments.core.plots import Panel, Series, Styles, panels, save_figure, subplots
from experiments.core.report import Column, Group, Part, Report, Row, Section

TIMING, PARALLEL = "timing.json", "parallel.json"

# arXiv:2006.16236, tables 1 and 2: MNIST, bits a dimension and images a second.
PAPER = {
    "softmax, uncached": (0.621, 0.45),
    "softmax": (0.621, 7.56),
    "linear": (0.644, 142.8),
}

NAMES = {
    "softmax": "softmax attention",
    "linear": "linear attention",
    "reformer": "Reformer",
    "lstm": "LSTM",
    "softmax, uncached": "softmax attention, uncached",
}
SCALING_NAMES = {
    "dot_product": "softmax attention",
    "blockwise": "softmax attention, blockwise",
    "linear": "linear attention",
    "reformer": "Reformer",
}
_WITH_CACHE = NAMES | {"softmax": "softmax attention, key-value cache"}


def _model(row: Row) -> str:
    """What a row's model is called; one's own by its file and what was in it."""
    model, digest = row.config["model"], row.config.get("attention_sha256")
    name = NAMES.get(model, pathlib.PurePath(model).name)
    return f"{name} {digest[:6]}" if digest else name


def _styles(group: Group) -> Styles:
    """Of all figures; attention with a cache is softmax attention."""
    every = map(_model, group.every)
    return Styles([*NAMES.values(), *SCALING_NAMES.values(), *every])


_MODEL: Column = ("model", _model)
_COSTS: tuple[Column, ...] = (
    tell.PARAMETERS,
    (
        "MFLOP a token",
        lambda row: f"{row.first('flops') / 1e6:.2f}" if row.records else tell.NONE,
    ),
)

# ------------------------------------------------------------------ figures


def _curves(file: str, *names: tuple[str, str, float]) -> Part:
    """Training curves: the mean over the seeds, and a band of one deviation.

    Args:
      file: of the figure.
      names: (curve, what it is, what a uniform guess has), a panel each.
    """

    def draw(group: Group) -> str:
        found = []
        for name, label, floor in names:
            lines = [
                line
                for row in group.rows
                for line in Series.training(_model(row), row.records, name)
            ]
            level = floor, "uniform guess"
            found.append(Panel(label, "updates", label, lines, level, markersize=2.5))
        panels(found, group.folder / file, _styles(group))
        return f"![training curves]({file})"

    return draw


def _pictures(name: str, caption: str) -> Part:
    """Samples or completions of the first seed, a line of images a model."""

    def draw(group: Group) -> list[str]:
        config, shown, truth = group.config, {}, None
        for row in group.rows:
            metrics = row.records[0]["metrics"] if row.records else {}
            if metrics.get(name):
                shown[_model(row)] = unpack(metrics[name], config["length"])
            if name == "completions" and metrics.get("completed"):
                truth = unpack(metrics["completed"], config["length"])
        if not shown:
            return []
        if truth is not None:
            shown = {"test images": truth, **shown}
        most = max(map(len, shown.values()))
        size = max(3.0, 0.62 * most + 1.4), 0.85 * len(shown) + 0.2
        figure, grid = subplots(size, len(shown), dpi=120)
        for axes, (label, images) in zip(grid[:, 0], shown.items(), strict=True):
            pictures = images.reshape(len(images), config["height"], -1)
            line = np.concatenate(list(pictures), axis=1)
            axes.imshow(line, cmap="gray", vmin=0, vmax=255)
            if truth is not None and label != "test images":
                middle = config["height"] // 2 - 0.5
                axes.axhline(middle, color="#D55E00", linewidth=0.6)
            axes.set_title(label, fontsize=8, loc="left", pad=2)
            axes.axis("off")
        save_figure(figure, group.folder / f"{name}.png")
        return [caption, f"![{name}]({name}.png)"]

    return draw


# ------------------------------------------------------------------- timing


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _timing(group: Group) -> list[str]:
    """What timing.json of the folder says, if there is one."""
    found = group.measured(TIMING)
    if found is None:
        return []
    parts = (_speed(found), _tokens(found, group), _scaling(found, group))
    return [said for part in parts for said in part] + _train_steps(found, group)


def _speed(timing: Mapping[str, Any]) -> list[str]:
    """The table of images a second, with the ratios of the paper."""
    sizes, images = timing["sizes"], timing["images"]
    uncached = next(row for row in images if "uncached" in row["model"])
    order = ["softmax, uncached", "softmax", "linear", "lstm"]
    linear = {r["batch"]: r["images_per_s"] for r in images if r["model"] == "linear"}
    told = {
        name: (f"{speed:g}", f"{PAPER['linear'][1] / speed:.3g}×")
        for name, (_, speed) in PAPER.items()
    }
    paper = lambda row: told.get(row["model"], (tell.NONE, tell.NONE))  # noqa: E731

    def ratio(row: dict[str, Any]) -> str:
        return f"{_short(linear[row['batch']] / row['images_per_s'])}×"

    return [
        "## Images a second",
        f"The paper's model of MNIST: {sizes['depth']} layers, {sizes['num_heads']} "
        f"heads of {sizes['dim'] // sizes['num_heads']}, {sizes['length']} pixels, "
        f"{sizes['components']} logistics, untrained weights (no time depends on "
        f"them), on {timing['cores']} CPU cores. With a state all pixels were drawn, "
        "and the median of the runs counts. Uncached, the pass over all earlier "
        f"pixels was timed at {' and '.join(map(str, uncached['lengths']))} pixels and "
        "the time of the others interpolated. The ratio is linear attention over the "
        "row; the paper's are of a GPU.",
        tell.tabulate(
            [
                ("generation", lambda row: _WITH_CACHE[row["model"]]),
                ("batch", lambda row: str(row["batch"])),
                ("images/s", lambda row: f"{row['images_per_s']:.3g}"),
                ("linear is faster by", ratio),
                ("paper: images/s", lambda row: paper(row)[0]),
                ("paper: linear is faster by", lambda row: paper(row)[1]),
            ],
            sorted(images, key=lambda r: (r["batch"], order.index(r["model"]))),
        ),
    ]


def _tokens(timing: Mapping[str, Any], group: Group) -> list[str]:
    found = timing["tokens"]
    lines = [
        Series(
            _WITH_CACHE[model],
            found["positions"],
            [1e3 * t for t in seconds],
            name=NAMES[model],
        )
        for model, seconds in found["seconds"].items()
    ]
    title = f"time of one token, {found['batch']} images at once"
    panel = Panel(
        title, "position in the sequence", "ms a token", lines, ylim=(0, None)
    )
    panels([panel], group.folder / "tokens.png", _styles(group))
    growth = [f"{line.label} {line.y[-1] / line.y[0]:.2f}×" for line in lines]
    return [
        "## Time of a token by its position",
        f"A step with a state, median. Last over first position: {', '.join(growth)}.",
        "![time of a token](tokens.png)",
    ]


def _scaling(timing: Mapping[str, Any], group: Group) -> list[str]:
    rows = {(row["name"], row["length"]): row for row in timing["scaling"]}
    lengths = sorted({length for _, length in rows})
    found = []
    for title, field, unit, label in (
        ("time", "seconds", 1.0, "seconds"),
        ("temporary memory of the program", "temp_bytes", 2.0**-20, "MiB"),
    ):
        lines = []
        for name, shown in SCALING_NAMES.items():
            points = [
                (length, unit * rows[name, length][field])
                for length in lengths
                if rows.get((name, length), {}).get(field)
            ]
            if points:
                x, y = zip(*points, strict=True)
                lines.append(Series(shown, x, y))
        found.append(Panel(title, "length N", label, lines, log=True, doubling=True))
    panels(found, group.folder / "scaling.png", _styles(group))

    def cell(row: dict[str, Any]) -> str:
        if "skipped" in row:
            return row["skipped"]
        return f"{row['seconds']:.3g} s, {(row['temp_bytes'] or 0) / 2**20:,.0f} MiB"

    cells: dict[str, dict[int, str]] = {name: {} for name in SCALING_NAMES.values()}
    for (name, length), row in rows.items():
        cells[SCALING_NAMES[name]][length] = cell(row)
    return [
        "## Long sequences: attention forward and backward",
        "One example, causal, 8 heads of 32, float32; memory as XLA plans it. What "
        "needs more than 8 GiB or 20 s was not run, and no longer one either.",
        "![scaling](scaling.png)",
        tell.pivot("attention", cells, "N = {:,}"),
    ]


def _train_steps(timing: Mapping[str, Any], group: Group) -> list[str]:
    rows, sizes = timing["train_steps"], timing["train_sizes"]
    seconds: dict[str, dict[int, float]] = {}
    for row in rows:
        seconds.setdefault(NAMES[row["model"]], {})[row["length"]] = row["seconds"]
    title = f"one train step, {rows[0]['batch']} sequences"
    lines = [
        Series(k, list(found), list(found.values())) for k, found in seconds.items()
    ]
    cells = {k: {n: f"{x:.3g}" for n, x in v.items()} for k, v in seconds.items()}
    panel = Panel(title, "length T", "seconds", lines, log=True, doubling=True)
    panels([panel], group.folder / "train_steps.png", _styles(group))
    return [
        "## Parallel training: one train step",
        f"{sizes['depth']} layers of width {sizes['dim']}, {rows[0]['batch']} "
        "sequences: loss, gradients and AdamW. Attention sees all tokens at once, the "
        "LSTM one after the other.",
        "![train steps](train_steps.png)",
        tell.pivot("seconds", cells, "T = {:,}"),
    ]


# ------------------------------------------------------------------- report


def _not_better(group: Group) -> list[str]:
    """Names the models that are no better than a baseline."""
    text = []
    for name, floor in group.floors(task="copy").items():
        behind = [
            _model(row)
            for row in group.rows
            if row.mean("test_accuracy", 2.0) <= floor["test_accuracy"]
        ]
        if behind:
            text.append(f"**Not better than a {name}: {', '.join(behind)}.**")
    return text


_COPY = Section(
    title="## Copying a word",
    rows=tell.where(task="copy"),
    text=(
        lambda group: (
            'Sequences "0 w 0 w" of {length} symbols, w of {short} to {long} symbols '
            "out of 10; the second w counts. {depth} layers of width {dim}, "
            "{updates:,} updates of {batch_size} sequences, AdamW (the paper: 4 layers "
            "of width 256, RAdam, a learning rate that falls after 3,000 updates). "
            "Mean ± standard deviation over seeds, on sequences that nobody trained "
            "on. Whole: sequences without any error."
        ).format(
            short=group.config["length"] // 4,
            long=(group.config["length"] - 2) // 2 - 1,
            **group.config,
        ),
    ),
    columns=(
        _MODEL,
        tell.score("loss", "test_loss", 3),
        tell.score("accuracy", "test_accuracy", 3),
        tell.score("whole", "test_whole", 3),
        *_COSTS,
        tell.DIVERGED,
    ),
    floors=lambda group: [
        [name, *(tell.decimal(m[f"test_{x}"], 3) for x in ("loss", "accuracy")), *"000"]
        for name, m in group.floors(task="copy").items()
    ],
    notes=(
        _not_better,
        _curves(
            "copy.png",
            ("loss", "loss, nats a symbol", math.log(10)),
            ("accuracy", "accuracy of the second word", 0.1),
        ),
        "Mean over seeds of the training loss, each sequence seen once; the band is "
        "one standard deviation, the dotted line a uniform guess.",
    ),
)

_IMAGES = Section(
    title="## Images, pixel by pixel",
    rows=lambda group: [r for r in group.rows if r.config["task"] != "copy"],
    by=("task",),
    text=(
        "{task}: {length} pixels one after the other, a mixture of {components} "
        "logistics each. {depth} layers of width {dim}, {updates:,} updates of "
        "{batch_size} images, AdamW. Bits a pixel, mean ± standard deviation over "
        "seeds, of the first {test_size:,} test images and of training images that "
        "were held out. Nothing is chosen by either; all models have one learning "
        "rate. The paper's numbers are of MNIST, whose pixels are easier, after 250 "
        "epochs.",
    ),
    columns=(
        _MODEL,
        tell.score("test bits", "test_bits", 3),
        tell.score("held-out bits", "val_bits", 3),
        *_COSTS,
        (
            "paper, MNIST",
            lambda row: (
                f"{PAPER[row.config['model']][0]:.3f}"
                if row.config["model"] in PAPER
                else tell.NONE
            ),
        ),
        tell.DIVERGED,
    ),
    floors=lambda group: [
        [name, *(tell.decimal(m[f"{part}_bits"], 3) for part in ("test", "val"))]
        for name, m in group.floors(task=group.config["task"]).items()
    ],
    notes=(
        _curves("images.png", ("loss", "bits a pixel", 8.0)),
        _pictures("samples", "Samples of the first seed."),
        _pictures(
            "completions",
            "Test images whose upper half was given; the first seed drew what is below "
            "the line.",
        ),
    ),
)

_ORDER = list(NAMES)

REPORT = Report(
    title="# Attention against recurrent networks",
    order=lambda row: (*_ORDER, row.config["model"]).index(row.config["model"]),
    text=(
        "Transformers are RNNs (Katharopoulos et al., 2020, arXiv:2006.16236), here: "
        "decoders that differ in what mixes tokens over time. Trained in parallel, "
        "generated token by token with a state.",
    ),
    sections=(_COPY, _IMAGES),
    notes=(_timing,),
)
