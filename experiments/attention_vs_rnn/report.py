"""Tables and figures of the experiment, from stored results alone.

`python -m experiments.attention_vs_rnn.report FOLDER` redraws report.md and the figures
of a folder that holds results.jsonl and, if it was measured, timing.json.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attn_jax._program import program
from experiments.attention_vs_rnn.presets import MODELS
from experiments.attention_vs_rnn.tasks import unpack
from experiments.core.plots import Styles, panel_legend, save_figure
from experiments.core.store import Record
from experiments.core.tables import Row, number, redraw, rows_of, table

TIMING = "timing.json"

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
_WITH_CACHE = {"softmax": "softmax attention, key-value cache"}
# In all figures; attention with a cache is softmax attention.
_STYLES = Styles(dict.fromkeys((*NAMES.values(), *SCALING_NAMES.values())))


# ------------------------------------------------------------------ figures


def _axes(rows: int = 1, columns: int = 2, height: float = 3.4) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * columns, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _style(name: str) -> dict[str, Any]:
    style = _STYLES[name]
    return dict(
        color=style.color,
        linestyle=style.line,
        marker=style.marker,
        markersize=4,
        linewidth=1.5,
    )


def _tidy(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _powers_of_two(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45)
    axes.minorticks_off()


def _curves(
    rows: Sequence[Row],
    names: Sequence[tuple[str, str, float]],
    path: pathlib.Path,
) -> None:
    """Training curves: the mean over the seeds, and a band of one deviation."""
    figure, grid = _axes(columns=len(names))
    for column, (name, label, floor) in enumerate(names):
        axes = grid[0][column]
        for row in rows:
            curves = [r["curves"] for r in row.records if name in r["curves"]]
            if not curves:
                continue
            values = np.array([curve[name] for curve in curves], float)
            steps, mean = curves[0]["step"], values.mean(axis=0)
            model = NAMES[row.config["model"]]
            style = _style(model) | dict(markersize=2.5)
            axes.plot(steps, mean, label=model, **style)
            if len(values) > 1:
                spread = values.std(axis=0, ddof=1)
                axes.fill_between(
                    steps,
                    mean - spread,
                    mean + spread,
                    color=style["color"],
                    alpha=0.15,
                    linewidth=0,
                )
        axes.axhline(
            floor, color="#777777", linewidth=0.9, linestyle=":", label="uniform guess"
        )
        panel_legend(axes)
        _tidy(axes, label, "updates", label)
    save_figure(figure, path)


def _pictures(rows: Sequence[Row], folder: pathlib.Path) -> list[str]:
    """Samples and completions of the first seed; the figures that there are."""
    drawn: dict[str, dict[str, np.ndarray]] = {"samples": {}, "completions": {}}
    truth = None
    for row in rows:
        config, metrics = row.config, row.records[0]["metrics"] if row.records else {}
        for name, found in drawn.items():
            if metrics.get(name):
                images = unpack(metrics[name], config["length"])
                found[NAMES[config["model"]]] = images
        if metrics.get("completed"):
            truth = unpack(metrics["completed"], config["length"])
    lines = []
    height = rows[0].config["height"]
    for name, found in drawn.items():
        if not found:
            continue
        shown = dict(found)
        if name == "completions" and truth is not None:
            shown = {"test images": truth, **found}
        most = max(len(images) for images in shown.values())
        figure, grid = _axes(len(shown), 1, 0.85 * len(shown) + 0.2)
        figure.set_figwidth(max(3.0, 0.62 * most + 1.4))
        for axes, (label, images) in zip(grid[:, 0], shown.items(), strict=True):
            pictures = images.reshape(len(images), height, -1)
            axes.imshow(
                np.concatenate(list(pictures), axis=1), cmap="gray", vmin=0, vmax=255
            )
            if name == "completions" and label != "test images":
                axes.axhline(height // 2 - 0.5, color="#D55E00", linewidth=0.6)
            axes.set_title(label, fontsize=8, loc="left", pad=2)
            axes.axis("off")
        save_figure(figure, folder / f"{name}.png")
        lines.append(name)
    return lines


# ------------------------------------------------------------------- timing


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _speed(timing: Mapping[str, Any]) -> list[str]:
    """The table of images a second, with the ratios of the paper."""
    sizes = timing["sizes"]
    text = [
        "## Images a second",
        "",
        f"The paper's model of MNIST: {sizes['depth']} layers, {sizes['num_heads']} "
        f"heads of {sizes['dim'] // sizes['num_heads']}, {sizes['length']} pixels, "
        f"{sizes['components']} logistics, untrained weights (no time depends on "
        f"them), on {timing['cores']} CPU cores. With a state all pixels were drawn, "
        "and the median of the runs counts. Uncached, the pass over all earlier "
        "pixels was timed at "
        + " and ".join(f"{n}" for n in _uncached(timing)["lengths"])
        + " pixels and the time of the others interpolated. The ratio is linear "
        "attention over the row; the paper's are of a GPU.",
        "",
        "| generation | batch | images/s | linear is faster by | paper: images/s | "
        "paper: linear is faster by |",
        "|---|---|---|---|---|---|",
    ]
    order = ["softmax, uncached", "softmax", "linear", "lstm"]
    found = {(row["model"], row["batch"]): row for row in timing["images"]}
    for batch in sorted({row["batch"] for row in timing["images"]}):
        for model in order:
            row = found.get((model, batch))
            if row is None:
                continue
            ratio = found["linear", batch]["images_per_s"] / row["images_per_s"]
            told = PAPER.get(model)
            paper = ["–", "–"]
            if told is not None:
                paper = [f"{told[1]:g}", f"{PAPER['linear'][1] / told[1]:.3g}×"]
            name = _WITH_CACHE.get(model, NAMES[model])
            text.append(
                f"| {name} | {batch} | {row['images_per_s']:.3g} | {_short(ratio)}× | "
                f"{paper[0]} | {paper[1]} |"
            )
    return [*text, ""]


def _uncached(timing: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in timing["images"] if "uncached" in row["model"])


def _timing_figures(timing: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
    tokens = timing["tokens"]
    figure, grid = _axes(columns=1)
    axes = grid[0][0]
    growth = []
    for model, seconds in tokens["seconds"].items():
        name = _WITH_CACHE.get(model, NAMES[model])
        milliseconds = 1e3 * np.asarray(seconds)
        axes.plot(tokens["positions"], milliseconds, label=name, **_style(NAMES[model]))
        growth.append(f"{name} {milliseconds[-1] / milliseconds[0]:.2f}×")
    axes.set_ylim(bottom=0)
    panel_legend(axes)
    _tidy(
        axes,
        f"time of one token, {tokens['batch']} images at once",
        "position in the sequence",
        "ms a token",
    )
    save_figure(figure, folder / "tokens.png")
    text = [
        "## Time of a token by its position",
        "",
        "A step with a state, median. Last over first position: "
        + ", ".join(growth)
        + ".",
        "",
        "![time of a token](tokens.png)",
        "",
        *_scaling(timing, folder),
        *_train_steps(timing, folder),
    ]
    return text


def _scaling(timing: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
    rows = timing["scaling"]
    figure, grid = _axes()
    lengths = sorted({row["length"] for row in rows})
    for column, (field, unit, label) in enumerate(
        (("seconds", 1.0, "seconds"), ("temp_bytes", 2.0**-20, "MiB"))
    ):
        axes = grid[0][column]
        for name, shown in SCALING_NAMES.items():
            points = [
                (row["length"], unit * row[field])
                for row in rows
                if row["name"] == name and row.get(field)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=shown, **_style(shown))
        axes.set_yscale("log")
        panel_legend(axes)
        _powers_of_two(axes, lengths)
        title = ("time", "temporary memory of the program")[column]
        _tidy(axes, title, "length N", label)
    save_figure(figure, folder / "scaling.png")
    text = [
        "## Long sequences: attention forward and backward",
        "",
        "One example, causal, 8 heads of 32, float32; memory as XLA plans it. What "
        "needs more than 8 GiB or 20 s was not run, and no longer one either.",
        "",
        "![scaling](scaling.png)",
        "",
        "| attention | " + " | ".join(f"N = {n:,}" for n in lengths) + " |",
        "|" + "---|" * (len(lengths) + 1),
    ]
    for name, shown in SCALING_NAMES.items():
        cells = {row["length"]: row for row in rows if row["name"] == name}
        line = [shown]
        for length in lengths:
            row = cells.get(length)
            if row is None:
                line.append("–")
            elif "skipped" in row:
                line.append(row["skipped"])
            else:
                memory = (row["temp_bytes"] or 0) / 2**20
                line.append(f"{row['seconds']:.3g} s, {memory:,.0f} MiB")
        text.append("| " + " | ".join(line) + " |")
    return [*text, ""]


def _train_steps(timing: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
    rows, sizes = timing["train_steps"], timing["train_sizes"]
    lengths = sorted({row["length"] for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, grid = _axes(columns=1)
    axes = grid[0][0]
    seconds = {(row["model"], row["length"]): row["seconds"] for row in rows}
    for model in models:
        values = [seconds[model, length] for length in lengths]
        axes.plot(lengths, values, label=NAMES[model], **_style(NAMES[model]))
    axes.set_yscale("log")
    _powers_of_two(axes, lengths)
    panel_legend(axes)
    title = f"one train step, {rows[0]['batch']} sequences"
    _tidy(axes, title, "length T", "seconds")
    save_figure(figure, folder / "train_steps.png")
    text = [
        "## Parallel training: one train step",
        "",
        f"{sizes['depth']} layers of width {sizes['dim']}, {rows[0]['batch']} "
        "sequences: loss, gradients and AdamW. Attention sees all tokens at once, the "
        "LSTM one after the other.",
        "",
        "![train steps](train_steps.png)",
        "",
        "| seconds | " + " | ".join(f"T = {n:,}" for n in lengths) + " |",
        "|" + "---|" * (len(lengths) + 1),
    ]
    for model in models:
        values = [f"{seconds[model, length]:.3g}" for length in lengths]
        text.append("| " + " | ".join([NAMES[model], *values]) + " |")
    return [*text, ""]


# ------------------------------------------------------------------- report


def _baselines(records: Sequence[Record], task: str) -> list[Record]:
    return [
        record
        for record in records
        if record["config"].get("phase") == "baseline"
        and record["config"]["task"] == task
    ]


def _millions(row: Row) -> str:
    return f"{row.first('flops') / 1e6:.2f}" if row.records else "–"


def _parameters(row: Row) -> str:
    return f"{row.first('params'):,}" if row.records else "–"


def _copy(
    rows: Sequence[Row], records: Sequence[Record], folder: pathlib.Path
) -> list[str]:
    config = rows[0].config
    length = config["length"]
    _curves(
        rows,
        (
            ("loss", "loss, nats a symbol", float(np.log(10))),
            ("accuracy", "accuracy of the second word", 0.1),
        ),
        folder / "copy.png",
    )
    text = [
        "## Copying a word",
        "",
        f'Sequences "0 w 0 w" of {length} symbols, w of {length // 4} to '
        f"{(length - 2) // 2 - 1} symbols out of 10; the second w counts. "
        f"{config['depth']} layers of width {config['dim']}, {config['updates']:,} "
        f"updates of {config['batch_size']} sequences, AdamW (the paper: 4 layers of "
        "width 256, RAdam, a learning rate that falls after 3,000 updates). Mean ± "
        "standard deviation over seeds, on sequences that nobody trained on. Whole: "
        "sequences without any error.",
        "",
        *table(
            rows,
            [
                ("model", lambda row: NAMES[row.config["model"]]),
                ("loss", lambda row: number(row.of("test_loss"), 3)),
                ("accuracy", lambda row: number(row.of("test_accuracy"), 3)),
                ("whole", lambda row: number(row.of("test_whole"), 3)),
                ("parameters", _parameters),
                ("MFLOP a token", _millions),
                ("diverged", lambda row: str(row.diverged)),
            ],
        ),
    ]
    after: list[str] = []
    for record in _baselines(records, "copy"):
        found = record["metrics"]
        text.append(
            f"| {record['config']['model']} | {found['test_loss']:.3f} | "
            f"{found['test_accuracy']:.3f} | 0 | 0 | 0 | – |"
        )
        behind = [
            NAMES[row.config["model"]]
            for row in rows
            if (s := row.of("test_accuracy")) and s.mean <= found["test_accuracy"]
        ]
        if behind:
            after.append(
                f"**Not better than a {record['config']['model']}: "
                f"{', '.join(behind)}.**"
            )
    return [
        *text,
        "",
        *(line for said in after for line in (said, "")),
        "![training curves](copy.png)",
        "",
        "Mean over seeds of the training loss, each sequence seen once; the band is "
        "one standard deviation, the dotted line a uniform guess.",
        "",
    ]


def _images(
    rows: Sequence[Row], records: Sequence[Record], folder: pathlib.Path, task: str
) -> list[str]:
    config = rows[0].config
    _curves(rows, (("loss", "bits a pixel", 8.0),), folder / "images.png")
    text = [
        "## Images, pixel by pixel",
        "",
        f"{task}: {config['length']} pixels one after the other, a mixture of "
        f"{config['components']} logistics each. {config['depth']} layers of width "
        f"{config['dim']}, {config['updates']:,} updates of {config['batch_size']} "
        f"images, AdamW. Bits a pixel, mean ± standard deviation over seeds, of the "
        f"first {config['test_size']:,} test images and of training images that were "
        "held out. Nothing is chosen by either; all models have one learning rate. "
        "The paper's numbers are of MNIST, whose pixels are easier, after 250 epochs.",
        "",
        "| model | test bits | held-out bits | parameters | MFLOP a token | paper, "
        "MNIST | diverged |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper = PAPER.get(row.config["model"])
        cells = [
            NAMES[row.config["model"]],
            number(row.of("test_bits"), 3),
            number(row.of("val_bits"), 3),
            _parameters(row),
            _millions(row),
            "–" if paper is None else f"{paper[0]:.3f}",
            str(row.diverged),
        ]
        text.append("| " + " | ".join(cells) + " |")
    for record in _baselines(records, task):
        found = record["metrics"]
        text.append(
            f"| {record['config']['model']} | {found['test_bits']:.3f} | "
            f"{found['val_bits']:.3f} | – | – | – | – |"
        )
    text += ["", "![training curves](images.png)", ""]
    captions = {
        "samples": "Samples of the first seed.",
        "completions": "Test images whose upper half was given; the first seed drew "
        "what is below the line.",
    }
    for name in _pictures(rows, folder):
        text += [captions[name], "", f"![{name}]({name}.png)", ""]
    return text


def write_report(records: Sequence[Record], folder: pathlib.Path) -> str:
    """Writes report.md and the figures; returns the text for the terminal."""
    rows = rows_of(records)
    if not rows:
        raise ValueError("records: there is no finished cell to report.")
    rows.sort(key=lambda row: list(MODELS).index(row.config["model"]))
    folder.mkdir(parents=True, exist_ok=True)
    text = [
        "# Attention against recurrent networks",
        "",
        "Transformers are RNNs (Katharopoulos et al., 2020, arXiv:2006.16236), here: "
        "decoders that differ in what mixes tokens over time. Trained in parallel, "
        "generated token by token with a state.",
        "",
    ]
    for task in sorted({row.config["task"] for row in rows}):
        group = [row for row in rows if row.config["task"] == task]
        if task == "copy":
            text += _copy(group, records, folder)
        else:
            text += _images(group, records, folder, task)
    file = folder / TIMING
    if file.is_file():
        timing = json.loads(file.read_text(encoding="utf-8"))
        text += [*_speed(timing), *_timing_figures(timing, folder)]
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")
    return "\n".join([*text, f"Report and figures: {folder}/report.md"])


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Redraws the report of a folder; returns the exit status."""
    return redraw(__doc__, write_report, argv)


if __name__ == "__main__":
    sys.exit(main())
