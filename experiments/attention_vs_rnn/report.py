"""Tables and figures of the experiment, from stored results alone.

`python -m experiments attention_vs_rnn --redraw FOLDER` redraws report.md and the
figures of a folder that holds results.jsonl and, if they were measured,
generating.json, timing.json and parallel.json.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from experiments.attention_vs_rnn.names import NAMES, model, styles, with_heads
from experiments.attention_vs_rnn.speed import in_parallel, timed
from experiments.core import report as tell
from experiments.core.plots import Panel, Series, panels, save_figure, subplots
from experiments.core.report import Column, Group, Part, Report, Section
from experiments.data.images import unpack

# arXiv:2006.16236, table 1: bits a dimension.
PAPER_BITS = {"softmax": 0.621, "linear": 0.644}

# Pictures of models with fewer updates cannot be told from noise, and are not shown.
LEARNT = 5_000

_MODEL: Column = ("model", model)
_WITH_HEADS: Column = ("model", with_heads)
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
        found: list[Panel] = []
        first: dict[str, str] = {}
        for row in group.rows:  # the first of a model has its colour
            first.setdefault(model(row), group.name(row))
        for name, label, floor in names:
            lines = [
                dataclasses.replace(line, name=model(row))
                if first[model(row)] == line.label
                else line
                for row in group.rows
                for line in Series.training(group.name(row), row.records, name)
            ]
            level = floor, "uniform guess"
            found.append(Panel(label, "updates", label, lines, level, markersize=2.5))
        panels(found, group.folder / file, styles(group))
        return f"![training curves]({file})"

    return draw


def _bits(group: Group) -> list[str]:
    """Test bits of every seed and their mean, beside what anyone could count."""
    rows = [row for row in group.rows if row.records]
    floors = {
        name: metrics["test_bits"]
        for name, metrics in group.floors(task=group.config["task"]).items()
        if name != "uniform"
    }
    if not rows:
        return []
    figure, ((axes,),) = subplots((7.6, 0.42 * len(rows) + 1.3), dpi=120)
    looks = styles(group)
    for place, row in enumerate(rows):
        color, found = looks[model(row)].color, list(row.scores("test_bits").values())
        axes.plot(found, [place] * len(found), "|", color=color, markersize=13)
        axes.plot(np.mean(found), place, "D", color=color, markersize=6)
    known = sorted(floors.items(), key=lambda floor: floor[1])
    for line, (name, value) in zip(("--", ":", "-."), known, strict=False):
        label = f"{name}, {value:.2f}"
        axes.axvline(value, color="#777777", linewidth=1, linestyle=line, label=label)
    axes.set_yticks(range(len(rows)), map(model, rows), fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(
        f"bits a pixel of {group.config['test_size']:,} test images (less is better)",
        fontsize=9,
    )
    title = f"images pixel by pixel after {group.config['updates']:,} updates"
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if floors:
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8
        )
    save_figure(figure, group.folder / "images.png")
    return [
        "![bits a pixel](images.png)",
        "A stroke a seed, and the mean; the grey lines are distributions that anyone "
        "could count.",
    ]


def _pictures(name: str, caption: str) -> Part:
    """Samples or completions of the first seed, a line of images a model."""

    def draw(group: Group) -> list[str]:
        config, shown, truth = group.config, {}, None
        if config["updates"] < LEARNT:
            return []
        for row in group.rows:
            metrics = row.records[0]["metrics"] if row.records else {}
            if metrics.get(name):
                shown[model(row)] = unpack(metrics[name], (-1, config["length"]))
            if name == "completions" and metrics.get("completed"):
                truth = unpack(metrics["completed"], (-1, config["length"]))
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


# ------------------------------------------------------------------- report


def _not_better(group: Group) -> list[str]:
    """Names the models that are no better than a baseline."""
    text = []
    for name, floor in group.floors(task="copy").items():
        behind = [
            with_heads(row)
            for row in group.rows
            if row.mean("test_accuracy", 2.0) <= floor["test_accuracy"]
        ]
        if behind:
            text.append(f"**Not better than a {name}: {', '.join(behind)}.**")
    return text


def _apart(group: Group) -> list[str]:
    """Accuracies less that of linear attention, with intervals."""
    linear = [r for r in group.rows if r.config["model"] == "linear" and r.records]
    if not linear:
        return []
    found = [
        f"{with_heads(row)} {tell.difference(row, linear[0], 'test_accuracy', 3)[1]}"
        for row in group.rows
        if row is not linear[0] and row.records
    ]
    return [
        f"Accuracy less that of {with_heads(linear[0])}, with Student's interval of "
        f"95 % over seeds: {'; '.join(found)}."
    ]


def _tuned(group: Group) -> list[str]:
    """Which learning rates were tried, and where the best lies at an end of them."""
    tried = sorted(
        {
            r["config"]["learning_rate"]
            for r in group.records
            if r["config"]["phase"] == "tune" and r["config"]["task"] == "copy"
        }
    )
    if not tried:
        return ["All models have one learning rate, which was not tuned."]
    trial = next(r["config"] for r in group.records if r["config"]["phase"] == "tune")
    text = (
        "Learning rates were chosen on validation sequences, of "
        f"{', '.join(f'{rate:g}' for rate in tried)}, by a run of "
        f"{trial['updates']:,} updates each."
    )
    ends = [
        with_heads(row)
        for row in group.rows
        if row.config["learning_rate"] in (tried[0], tried[-1])
    ]
    return [
        text + (f" **At an end of these: {', '.join(ends)}.**" if ends else ""),
    ]


_COPY = Section(
    title="## Copying a word",
    rows=tell.where(task="copy"),
    text=(
        lambda group: (
            'Sequences "0 w 0 w" of {length} symbols, w of {short} to {long} symbols '
            "out of 10; the second w counts. {depth} layers of width {dim}, "
            "{updates:,} updates of {batch_size} sequences, AdamW (the paper: 128 "
            "symbols, 4 layers of width 256 with heads of 32, 64 sequences, RAdam, a "
            "learning rate that falls after 3,000 updates). "
            "Mean ± standard deviation over seeds, on sequences that nobody trained "
            "on. Whole: sequences without any error."
        ).format(
            short=group.config["length"] // 4,
            long=(group.config["length"] - 2) // 2 - 1,
            **group.config,
        ),
    ),
    columns=(
        _WITH_HEADS,
        tell.score("loss", "test_loss", 3),
        tell.score("accuracy", "test_accuracy", 3),
        tell.score("whole", "test_whole", 3),
        tell.RATE,
        *_COSTS,
        tell.DIVERGED,
    ),
    floors=lambda group: [
        [name, *(tell.decimal(m[f"test_{x}"], 3) for x in ("loss", "accuracy")), "0"]
        for name, m in group.floors(task="copy").items()
    ],
    notes=(
        _not_better,
        _apart,
        _tuned,
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
                f"{PAPER_BITS[row.config['model']]:.3f}"
                if row.config["model"] in PAPER_BITS
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
        _bits,
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
    order=lambda row: (
        (*_ORDER, row.config["model"]).index(row.config["model"]),
        row.config.get("num_heads"),
    ),
    text=(
        "Transformers are RNNs (Katharopoulos et al., 2020, arXiv:2006.16236), here: "
        "decoders that differ in what mixes tokens over time. Trained in parallel, "
        "generated token by token with a state.",
    ),
    sections=(_COPY, _IMAGES),
    notes=(timed, in_parallel),
)
