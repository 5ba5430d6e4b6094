"""What is told of heads that imitate a convolution."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.attention_as_conv import places
from experiments.attention_as_conv.grid import CHANCE
from experiments.core import report as tell
from experiments.core.plots import Panel, Series, Styles, panels, save_figure, subplots
from experiments.core.report import Group, Row, Section
from experiments.core.stats import Gap, Summary, gap, summarize

# Share of the places from which on, as an interval, heads are said to find them.
FOUND = 0.9

# Moments of the pictures, as shares of training, and frames of the animation.
_MOMENTS = (0.0, 0.1, 0.3, 1.0)
_FRAMES = 16


def _rows(group: Group) -> list[Row]:
    return [row for row in group.rows if "kernel" in row.config]


def _order(row: Row) -> tuple[int, int, float]:
    config = row.config
    return config["kernel"], config["num_heads"], config["weight_decay"]


def _kernel(row: Row) -> str:
    return "{kernel} × {kernel}".format(**row.config)


def _kind(row: Row) -> str:
    """What a row has in common with those of other kernels."""
    config = row.config
    times = config["num_heads"] // config["kernel"] ** 2
    heads = "a head for each place" if times == 1 else f"{times} heads for each place"
    decay = config["weight_decay"]
    return f"{heads}, " + (f"decay {decay:g}" if decay else "no decay")


def _interval(row: Row, metric: str) -> Gap | None:
    """Mean and Student's interval of a metric."""
    scores = row.scores(metric)
    return gap(scores, dict.fromkeys(scores, 0.0)) if scores else None


def _with_interval(row: Row, metric: str, digits: int) -> str:
    found = _interval(row, metric)
    if found is None:
        return tell.NONE
    ends = f" {tell.interval(found, digits)}".replace("+", "")
    return f"{tell.decimal(found.mean, digits)}{ends}".strip()


def _floor(group: Group, row: Row, name: str) -> Summary | None:
    """The error of what needs no training, over the seeds of a row."""
    config = row.config
    found = [
        record["metrics"]["test_loss"]
        for record in group.records
        if record["config"]["task"] == config["task"]
        and record["metrics"].get("baseline") == name
        and record["metrics"]["heads"] == config["num_heads"]
    ]
    return summarize(found) if found else None


def _intro(group: Group) -> str:
    config = group.config
    theorem = max(
        (
            record["metrics"]["test_loss"]
            for record in group.records
            if record["metrics"].get("baseline") == "theorem"
        ),
        default=0.0,
    )
    return (
        "Here it is known what heads should find. One layer of attention by quadratic "
        "encoding learns to do what a fixed random convolution does to white noise "
        "({side} × {side} tokens, {channels} channels, fresh at each of {updates:,} "
        "updates of {batch_size} pictures, border repeated); kernel and start are "
        "drawn anew for each seed, centres from N(0, 2²). The layer can be the "
        "convolution: with the heads of the theorem its error is below "
        f"{max(theorem, 1e-12):.0e}. "
        "Errors are shares of what predicting the mean would leave (1). “Heads where "
        "they start”: centres and widths as they are before training, value maps the "
        "best there are for them (least squares). Places found: share of the places "
        "of the kernel that are the nearest whole offset of a head with half of its "
        "weight or more on one token. Distance: mean over heads from a centre to the "
        f"nearest whole offset, {CHANCE:.2f} by chance. "
        "The learning rate is the one of least error on fresh noise. Decay is of the "
        "value maps; it makes heads dear that overlap and cancel one another. That "
        "there is decay, how much, and twice the heads, was chosen in trial runs that "
        "are not stored, where without it heads fitted and did not land. In brackets "
        "Student's interval of 95 % over seeds."
    ).format(**config)


def _verdict(group: Group) -> list[str]:
    """Are the places found? By a rule that is told."""
    lines = []
    for row in group.rows:
        found = _interval(row, "offsets")
        if found is None:
            continue
        answer = "not shown"
        if found.low is not None and found.low >= FOUND:
            answer = "shown"
        elif found.mean >= 0.5:
            answer = "in part"
        whole = sum(value == 1 for value in row.scores("offsets").values())
        lines.append(
            f"* {_kernel(row)}, {_kind(row)}: **{answer}**, "
            f"{_with_interval(row, 'offsets', 2)} of the places found, all of them in "
            f"{whole} of {len(row.records)} seeds; error "
            f"{_with_interval(row, 'test_loss', 4)}."
        )
    if not lines:
        return []
    return [
        f"The rule: “shown” where the whole interval lies above {FOUND:g}; “in part” "
        "where half of the places or more are found in the mean.",
        "\n".join(lines),
    ]


def _at_the_edge(group: Group) -> list[str]:
    """Rows whose rate is the least or the largest of those tried."""
    tasks = {row.config["task"] for row in group.rows}
    tuned = (r["config"] for r in group.records if r["config"].get("phase") == "tune")
    rates = sorted({c["learning_rate"] for c in tuned if c["task"] in tasks})
    if not rates:
        return []
    ends = (rates[0], rates[-1])
    rows = [row for row in group.rows if row.config["learning_rate"] in ends]
    said = f"Learning rates tried, on seed 0: {', '.join(f'{x:g}' for x in rates)}."
    if rows:
        names = "; ".join(f"{_kernel(row)}, {_kind(row)}" for row in rows)
        said += f" At an end of them, so that one beyond may be better: {names}."
    return [said]


# ------------------------------------------------------------------- figures


def _styles(group: Group) -> Styles:
    return Styles(dict.fromkeys(map(_kind, group.rows)))


def _curve(row: Row, name: str, scale: float = 1.0) -> list[Series]:
    """The mean over seeds of what was observed, with a band of one deviation."""
    curves = [r["curves"] for r in row.records if name in r["curves"]]
    if not curves:
        return []
    x = curves[0]["observed_at"]
    points = np.asarray([c[name] for c in curves], float).T * scale
    found = [(at, summarize(list(p))) for at, p in zip(x, points, strict=True)]
    return [Series.of(_kind(row), found)]


def _landing(group: Group) -> str:
    """Places found against updates, a panel a kernel."""
    boards = []
    for some in group.by("kernel"):
        kernel = some.config["kernel"]
        lines = [s for r in some.rows for s in _curve(r, "found", 1 / kernel**2)]
        title = f"A convolution of {kernel} × {kernel}"
        label = "share of its places that heads found"
        boards.append(
            Panel(title, "updates", label, lines, ylim=(-0.02, 1.05), markersize=0)
        )
    panels(boards, group.folder / "teacher_places.png", _styles(group))
    return "![places found against updates](teacher_places.png)"


def _moment(record: Any, share: float) -> tuple[int, places.Places]:
    """Updates, and where heads look, after a share of training."""
    curves = record["curves"]
    at = round(share * (len(curves["observed_at"]) - 1))
    spreads = np.asarray(curves["spreads"][at], float)
    precisions = spreads[:, None, None] ** 2 * np.eye(2)
    return curves["observed_at"][at], (np.asarray(curves["centres"][at]), precisions)


def _followed(group: Group) -> list[tuple[Row, Any]]:
    """Rows of which a seed was followed, and its record."""
    return [
        (row, record)
        for row in group.rows
        for record in row.records[:1]
        if "centres" in record["curves"]
    ]


def _strip(group: Group) -> list[str]:
    """Where heads look at some moments, a line a row of the table."""
    found = _followed(group)
    if not found:
        return []
    every = [[_moment(record, share) for share in _MOMENTS] for _, record in found]
    reach = 5
    size = 1.75 * len(_MOMENTS) + 1.6, 1.75 * len(found) + 1.0
    title = "Heads that learn to be a convolution (seed 0)"
    figure, axes = subplots(size, len(found), len(_MOMENTS), title=title)
    lines = [[where for _, where in moments] for moments in every]
    kernels = [row.config["kernel"] for row, _ in found]
    places.grid(figure, axes, lines, reach, kernels)
    for line, (row, _), moments in zip(axes, found, every, strict=True):
        for at, (updates, _) in zip(line, moments, strict=True):
            at.set_title(f"{updates:,} updates", fontsize=7)
        kind = _kind(row).replace(", ", "\n")
        line[0].set_ylabel(f"{_kernel(row)}\n{kind}\nrows down", fontsize=7)
    save_figure(figure, group.folder / "teacher.png")
    return ["![where heads look while they learn](teacher.png)"]


def _film(group: Group) -> list[str]:
    """The same in motion, of the rows of the smallest kernel."""
    from PIL import Image

    least = min(row.config["kernel"] for row in group.rows)
    found = [x for x in _followed(group) if x[0].config["kernel"] == least]
    if not found:
        return []
    images = [Image.fromarray(frame) for frame in _frames(found)]
    # One palette for all, so that no colour flickers.
    few = np.concatenate([np.asarray(image) for image in images[::5]])
    octree, none = Image.Quantize.FASTOCTREE, Image.Dither.NONE
    palette = Image.fromarray(few).quantize(128, octree)
    images = [image.quantize(palette=palette, dither=none) for image in images]
    path = group.folder / "teacher.gif"
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=[200] * (_FRAMES - 1) + [2_500],
        loop=0,
    )
    path.write_bytes(buffer.getvalue())
    return [f"![the same in motion]({path.name})"]


def _frames(found: Sequence[tuple[Row, Any]]) -> Iterator[np.ndarray]:
    """Pictures [height, width, 3] of some moments, early ones closer to each other."""
    size = 2.1 * len(found), 2.75
    figure, axes = subplots(size, columns=len(found), dpi=80)
    canvas = FigureCanvasAgg(figure)
    for i in range(_FRAMES):
        for at, (row, record) in zip(axes[0], found, strict=True):
            updates, where = _moment(record, (i / (_FRAMES - 1)) ** 2)
            at.clear()
            places.panel(at, where, 4, kernel=row.config["kernel"])
            at.set_title(_kind(row).replace(", ", "\n"), fontsize=8)
            at.set_xlabel(f"{updates:,} updates", fontsize=8)
        canvas.draw()
        figure.set_layout_engine("none")  # the axes stay where they are
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()


TEACHER = Section(
    title="## Taught by a convolution: do heads find its places?",
    rows=_rows,
    order=_order,
    text=(_intro,),
    columns=lambda group: [
        ("kernel", _kernel),
        tell.setting("heads", "num_heads"),
        tell.setting("decay", "weight_decay", "g"),
        ("test error", lambda row: tell.mean(row.of("test_loss"))),
        (
            "with heads where they start",
            lambda row: tell.mean(_floor(group, row, "frozen"), 3),
        ),
        ("places found", lambda row: _with_interval(row, "offsets", 2)),
        tell.score("heads on one token", "one_token", 2),
        tell.score("distance", "distance", 2),
        tell.RATE,
        ("seeds", lambda row: str(len(row.records))),
        tell.DIVERGED,
    ],
    notes=(_at_the_edge, _verdict, _landing, _strip, _film),
)
