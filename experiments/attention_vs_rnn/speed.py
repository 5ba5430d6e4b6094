"""What timing.json and parallel.json say: sections of the report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.attention_vs_rnn.names import LEAD, NAMES, SCALING_NAMES, styles
from experiments.core import report as tell
from experiments.core.plots import Panel, Series, panels
from experiments.core.report import Group

TIMING, GENERATING, PARALLEL = "timing.json", "generating.json", "parallel.json"

# arXiv:2006.16236, tables 1 and 2: MNIST, images a second. Its
# code joins each token to the cache, which copies the whole of it.
PAPER_SPEED = {"softmax, uncached": 0.45, "softmax, copied": 7.56, "linear": 142.8}

# Seconds whose median is so many times the least are of a machine that did much else.
AGREE = 1.5

_WITH_CACHE = NAMES | {"softmax": "softmax attention, cache written in place"}


# ------------------------------------------------------------------- timing


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def timed(group: Group) -> list[str]:
    """What generating.json and timing.json of the folder say, as far as they are there.

    Earlier, timing.json held both.
    """
    timing = group.measured(TIMING)
    generating = group.measured(GENERATING) or timing
    found: list[str] = []
    if generating is not None and "images" in generating:
        for tell_of in (_speed, _growth, _tokens):
            found += tell_of(generating, group)
    if timing is not None:
        for tell_of in (_scaling, _train_steps):
            found += tell_of(timing, group)
    return found


def _speed(timing: Mapping[str, Any], group: Group) -> list[str]:
    """The table of images a second, with the ratios of the paper."""
    sizes, images = timing["sizes"], list(timing["images"])
    uncached = next(row for row in images if "uncached" in row["model"])
    order = ["softmax, uncached", "softmax, copied", "softmax", "linear", "lstm"]
    linear = {r["batch"]: r["images_per_s"] for r in images if r["model"] == "linear"}
    for row in timing.get("copied", ()):
        whole = _whole(row["positions"], row["seconds"], sizes["length"])
        speed = dict(images_per_s=row["batch"] / whole, seconds=[])
        images.append(dict(model="softmax, copied", batch=row["batch"], **speed))

    def paper(row: dict[str, Any]) -> tuple[str, str]:
        speed = PAPER_SPEED.get(row["model"])
        if speed is None:
            return tell.NONE, tell.NONE
        return f"{speed:g}", f"{PAPER_SPEED['linear'] / speed:.3g}×"

    def ratio(row: dict[str, Any]) -> str:
        return f"{_short(linear[row['batch']] / row['images_per_s'])}×"

    calls = tell.span(len(r["seconds"]) for r in images if len(r["seconds"]) > 1)
    return [
        "## Images a second",
        f"The paper's model of MNIST: {sizes['depth']} layers, {sizes['num_heads']} "
        f"heads of {sizes['dim'] // sizes['num_heads']}, {sizes['length']} pixels, "
        f"{sizes['components']} logistics, untrained weights (no time depends on "
        f"them), on {_cores(timing)}. With a state all pixels were drawn, "
        f"and the median of {calls} runs counts. Uncached, the pass over all earlier "
        f"pixels was timed at {' and '.join(map(str, uncached['lengths']))} pixels and "
        "the time of the others interpolated. The ratio is linear attention over the "
        "row; the paper's are of a GPU. **The paper's code joins each new token to the "
        "cache, which copies the whole of it: its 18.9 is against that.** The row of a "
        "copied cache, from the time of its first and last token, is what to compare.",
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


def _cores(found: Mapping[str, Any]) -> str:
    """How many there were, and what was counted where it is not time on the wall."""
    cores = f"{found['cores']} CPU core{'s' * (found['cores'] > 1)}"
    own = found.get("clock") == "processor"
    return f"{cores} (seconds of its own, whatever ran beside)" if own else cores


def _whole(positions: list[int], seconds: list[float], length: int) -> float:
    """Seconds of so many tokens, of which some were timed."""
    return float(np.interp(np.arange(length), positions, seconds).sum())


def _growth(timing: Mapping[str, Any], group: Group) -> list[str]:
    """The lead of linear attention over softmax attention with a cache, over N."""
    known = timing.get("growth") or dict(
        images=timing["images"], tokens=timing["tokens"]
    )
    tokens, length = known["tokens"], timing["sizes"]["length"]
    batch = tokens.get("batch", 1)
    images = [row for row in known["images"] if row["batch"] == batch]
    where, taken = tokens["positions"], tokens["seconds"]
    lengths = [place + 1 for place in where[1:]]
    by_token = {
        n: _whole(where, taken["softmax"], n) / _whole(where, taken["linear"], n)
        for n in lengths
    }
    speeds = {
        (row["model"], row.get("length", length)): row["images_per_s"] for row in images
    }
    drawn = {
        n: speeds["linear", n] / speeds["softmax", n]
        for n in lengths
        if ("softmax", n) in speeds
    }
    shown = dict(zip(LEAD, (drawn, by_token), strict=True))
    ahead = Panel(
        "lead of linear attention over a cache written in place",
        "pixels N of an image",
        "images a second, linear / softmax",
        [
            Series(label, list(found), list(found.values()))
            for label, found in shown.items()
        ],
        level=(1.0, "equally fast"),
        ylim=(0, None),
        doubling=True,
    )
    one = Panel(
        f"time of one token, images at once: {batch}",
        "position in the sequence",
        "ms a token",
        [
            Series(_WITH_CACHE[m], where, [1e3 * t for t in taken[m]], name=NAMES[m])
            for m in taken
        ],
        ylim=(0, None),
    )
    panels([ahead, one], group.folder / "lead.png", styles(group))
    rise, begin = np.polyfit(where, taken["softmax"], 1)
    flat = float(np.mean(taken["linear"]))
    paper = PAPER_SPEED["linear"] / PAPER_SPEED["softmax, copied"]
    reached = 2 * (paper * flat - begin) / rise
    at = {n: (begin + rise * n / 2) / flat for n in (784, 3_072)}
    line = ", ".join(f"{lead:.3g} at N = {n:,}" for n, lead in at.items())
    cells = {
        name: {n: f"{value:.3g}×" for n, value in found.items()}
        for name, found in shown.items()
    }
    return [
        "### The lead grows with the length",
        "A step with a cache reads all earlier tokens, one of linear attention a state "
        "of one size, so the ratio is no number but a line over N. The same model, "
        f"images at once: {batch}.",
        tell.pivot("linear is faster by", cells, "N = {:,}"),
        "![the lead over the length](lead.png)",
        f"A token takes {1e3 * flat:.3g} ms with linear attention, "
        f"{1e3 * begin:.3g} ms and {1e6 * rise:.3g} ms more for each 1,000 earlier "
        f"tokens with the cache; by this line the lead is {line} and the paper's "
        f"{paper:.3g} at N = {tell.count(round(reached, -2))}.",
    ]


def _tokens(timing: Mapping[str, Any], group: Group) -> list[str]:
    """The time of a token by its position."""
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
    panels([panel], group.folder / "tokens.png", styles(group))
    growth = [f"{line.label} {line.y[-1] / line.y[0]:.2f}×" for line in lines]
    return [
        "## Time of a token by its position",
        f"A step with a state, median. Last over first position: {', '.join(growth)}.",
        "![time of a token](tokens.png)",
    ]


def _scaling(timing: Mapping[str, Any], group: Group) -> list[str]:
    """Time and memory of attention on long sequences."""
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
    panels(found, group.folder / "scaling.png", styles(group))

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
    """The time of a train step over the length."""
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
    panels([panel], group.folder / "train_steps.png", styles(group))
    return [
        "## One train step",
        f"{sizes['depth']} layers of width {sizes['dim']}, {rows[0]['batch']} "
        f"sequences, on {_cores(timing)}: loss, gradients and AdamW. Attention sees "
        "all tokens at once, the LSTM one after the other. A few cores have enough to "
        "do either way: seconds show the work of a step, not what of it must wait.",
        "![train steps](train_steps.png)",
        tell.pivot("seconds", cells, "T = {:,}"),
    ]


# ----------------------------------------------------------------- parallel


def in_parallel(group: Group) -> list[str]:
    """What parallel.json of the folder says, if there is one."""
    found = group.measured(PARALLEL)
    if found is None:
        return []
    return [*_chains(found, group), *_devices(found, group)]


def _chains(found: Mapping[str, Any], group: Group) -> list[str]:
    rows, sizes = found["chains"], found["sizes"]
    chunks = f"{NAMES['linear']}, chunks of {found['chunk']}"
    names, figure, text = NAMES | {"linear": chunks}, [], []
    for program, name in (("forward", "forward pass"), ("train step", "train step")):
        chains: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            if row["program"] == program:
                chains.setdefault(names[row["model"]], {})[row["length"]] = row
        lines = [
            Series(
                model,
                list(by),
                [row["operations"] for row in by.values()],
                name=NAMES[next(iter(by.values()))["model"]],
            )
            for model, by in chains.items()
        ]
        title = f"longest chain of dependent operations, {name}"
        figure.append(
            Panel(title, "length T", "operations", lines, log=True, doubling=True)
        )
        cells = {
            model: {n: f"{row['operations']:,}" for n, row in by.items()}
            for model, by in chains.items()
        }
        text.append(tell.pivot(f"chain, {name}", cells, "T = {:,}"))
        if program == "train step":
            text += _chain_words(chains)
    panels(figure, group.folder / "chains.png", styles(group))
    return [
        '## "Attention is parallel, the RNN is not": what must wait',
        f"{sizes['depth']} layers of width {sizes['dim']}. Each operation of the chain "
        "needs the one before, so that no number of processors makes it shorter; it is "
        "counted from the program as written, an operation on whole arrays as one. "
        "Linear attention hands a sum from each chunk of tokens to the next. Softmax "
        "attention is the plain one: blockwise attention has loops as well, of blocks "
        "that do not need each other, to save memory.",
        "![chains](chains.png)",
        *text,
    ]


def _chain_words(chains: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """Sums as trees, and the loops of the compiled program."""
    trees, loops = [], []
    for model, by in chains.items():
        low, high = min(by), max(by)
        trees.append(f"{model} {by[low]['rounds']:,} to {by[high]['rounds']:,}")
        turns = {n: r["loop_turns"] for n, r in by.items() if "loop_turns" in r}
        some = ", ".join(f"{turn:,} (T = {n:,})" for n, turn in turns.items())
        loops.append(f"{model} {some}")
    return [
        "Where a sum of n numbers takes the log₂ n rounds of a tree, those within "
        f"products too, the chain of a train step is, from T = {low:,} to {high:,}: "
        f"{'; '.join(trees)}.",
        "In the program that XLA compiles of it, loops turn so often, one turn after "
        f"the other: {'; '.join(loops)}.",
    ]


def _share(row: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    if not row["device_flops"] or not whole["device_flops"]:
        return tell.NONE
    return f"{row['device_flops'] / whole['device_flops']:.2f}"


def _devices(found: Mapping[str, Any], group: Group) -> list[str]:
    """Steps split over devices; seconds only where calls of one program agree."""
    rows = found["devices"]
    apart = max(statistics.median(r["seconds"]) / min(r["seconds"]) for r in rows)
    figure: list[Panel] = []
    cells: dict[str, dict[int, str]] = {}
    for split, of in tell.grouped(rows, lambda row: row["split"]).items():
        lines = []
        for model, some in tell.grouped(of, lambda row: row["model"]).items():
            counts = [row["devices"] for row in some]
            least = [1e3 * min(row["seconds"]) for row in some]
            lines.append(Series(NAMES[model], counts, least))
            cells[f"{NAMES[model]}, {split} split"] = {
                row["devices"]: f"{_share(row, some[0])} of the FLOPs, "
                f"{row['loop_turns']:,} turns"
                + (f", {ms:.3g} ms" if apart < AGREE else "")
                for row, ms in zip(some, least, strict=True)
            }
        batch, length = of[0]["batch"], of[0]["length"]
        sequences = f"{batch} sequence{'s' * (batch > 1)} of {length:,}"
        title = f"train step, {sequences}: {split} split"
        figure.append(
            Panel(title, "devices", "ms", lines, ylim=(0, None), doubling=True)
        )
    calls, cores = len(rows[0]["seconds"]), _cores(found)
    if apart < AGREE:
        panels(figure, group.folder / "devices.png", styles(group))
        seconds = [
            "![devices](devices.png)",
            f"Milliseconds are the least of {calls} calls, in turns. They cannot say "
            f"how much faster more processors are: the devices are threads of {cores}, "
            f"so that no time can fall below 1/{found['cores']} of that of one device, "
            "and eight add the cost of eight.",
        ]
    else:
        seconds = [
            f"Seconds are not told: of {calls} calls, in turns, the median was up to "
            f"{apart:.2g} times the least, as other programs took the cores. Nor could "
            "they say, on a quiet machine, how much faster more processors are: the "
            f"devices are threads of {cores}.",
        ]
    return [
        f"### A step split over devices that share {cores}",
        "A device's FLOPs as a share of those of one alone (by XLA, which counts the "
        "body of a loop once), and how often loops turn on each device, one turn after "
        "the other.",
        tell.pivot("devices", cells, "{}"),
        "A batch is split for the LSTM as well as for attention: devices need nothing "
        "of each other but gradients. Of one sequence, attention gives each device its "
        "share of the tokens; the LSTM does so with the products before and after, but "
        "its loops turn as often on eight devices as on one, on all of them alike.",
        *seconds,
    ]
