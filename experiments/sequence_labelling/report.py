"""Tables and figures of the experiment, from stored results alone.

`python -m experiments sequence_labelling --redraw FOLDER` redraws report.md and the
figures of a folder that holds results.jsonl and, if they were made, maps.json and
streaming.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core import report as tell
from experiments.core.plots import Panel, Series, Styles, heads, panels
from experiments.core.report import Column, Group, Part, Report, Row, Section
from experiments.sequence_labelling.ablation import draw_heads

MAPS, STREAMING = "maps.json", "streaming.json"

#: Accuracy on whole utterances, where the test part holds pieces of them.
WHOLE = "test_whole_accuracy"

# Labels of the test parts that committed records were scored on.
_TEST_LABELS = {"pos": 116_717, "pos_fine": 116_717, "phones": 62_633}

_TASKS = {
    "pos": "Tags of words, Brown corpus",
    "pos_fine": "Brown's own tags of words",
    "phones": "Phones of recorded speech",
}

_NAMES = {
    "cnn": "1-D CNN",
    "gru": "bidirectional GRU",
    "lstm": "bidirectional LSTM",
    "transformer": "Transformer",
}

# ------------------------------------------------------------------ rows, columns


def _truncated(config: Mapping[str, Any]) -> str:
    return "truncated to {left} before, {right} after".format(**config)


def model_name(row: Row) -> str:
    """What a row's model is, in words."""
    config = row.config
    if config["model"] == "window":
        window = config["window"]
        return f"fully connected, {f'window ±{window}' if window else 'each vector'}"
    name = _NAMES[config["model"]]
    return f"{name}, {_truncated(config)}" if config.get("left") is not None else name


def _title(row: Row) -> str:
    """What a row's self-attention is, in words."""
    config = row.config
    kind = config["attention"] if config["left"] is None else _truncated(config)
    return "{}, {num_heads} heads, {depth} layers, positions: {positions}".format(
        kind, **config
    )


def _models(rows: Iterable[Row]) -> list[Row]:
    """Those on the whole training part, with the most updates there are."""
    whole = [row for row in rows if row.config["n"] is None]
    most = max((row.config["updates"] for row in whole), default=0)
    return [row for row in whole if row.config["updates"] == most]


def _rest(group: Group, model: str) -> list[Row]:
    """The others of a model."""
    models = list(map(id, _models(group.every)))
    rest = [row for row in group.every if id(row) not in models]
    return [row for row in rest if row.config["model"] == model]


def _windows(group: Group) -> list[Row]:
    """All that is fully connected, those among the models too."""
    return [row for row in group.every if row.config["model"] == "window"]


def _plain(group: Group, row: Row) -> bool:
    """Whether a row's self-attention is that of the models, without truncation."""
    names = ("num_heads", "attention", "positions", "depth", "left")
    full = [
        r.config
        for r in _models(group.every)
        if r.config["model"] == "transformer" and r.config["left"] is None
    ]
    return bool(full) and all(row.config[name] == full[0][name] for name in names)


def _spoken(config: Mapping[str, Any]) -> bool:
    return config["task"].startswith("phones")


def _by_score(rows: Sequence[Row]) -> list[Row]:
    """By accuracy on whole utterances where all were scored on them, else on all."""
    metric = WHOLE if all(row.of(WHOLE) for row in rows) else "test_accuracy"
    return sorted(rows, key=lambda row: -row.mean(metric, 0.0))


def _columns(first: Column) -> Any:
    """Accuracies of a group, and what they cost."""

    def columns(group: Group) -> list[Column]:
        records = [row.records[0] for row in group.rows if row.records]
        names = sorted({name for r in records for name in r["metrics"]})
        spoken = bool(group.rows) and _spoken(group.config)
        crops = "crops of 2.56 s" if spoken else "accuracy"
        titles = {
            WHOLE: "whole utterances",
            f"{WHOLE}_speech": "whole utterances, speech",
            "test_accuracy": crops,
        }
        for name in names:
            if name.startswith("test_accuracy_"):
                title = name.removeprefix("test_accuracy_").replace("_", " ")
                titles[name] = f"{crops}, {title}" if spoken else title
        known = {n: t for n, t in titles.items() if n == "test_accuracy" or n in names}
        return [
            first,
            *(tell.score(title, name) for name, title in known.items()),
            *_COSTS,
        ]

    return columns


_COSTS: tuple[Column, ...] = (
    tell.score("accuracy on training data", "train_accuracy"),
    tell.PARAMETERS,
    (
        "without input tables",
        lambda row: tell.count(
            (row.first("params") or 0) - (row.first("input_params") or 0)
        ),
    ),
    tell.same("FLOPs a vector", "flops"),
    (
        "updates/s",
        lambda row: (
            f"{found.mean:.1f}" if (found := row.of("updates_per_s")) else tell.NONE
        ),
    ),
    tell.RATE,
    tell.DIVERGED,
)

# ------------------------------------------------------------------------- text


def _size(config: Mapping[str, Any]) -> str:
    return "all" if config["n"] is None else f"{config['n']:,}"


def _sized(title: str) -> Part:
    def said(group: Group) -> str:
        n, updates = _size(group.config), group.config["updates"]
        return f"{title}: {n} training sequences, {updates:,} updates"

    return said


def _intro(group: Group) -> list[str]:
    config, models = group.config, _models(group.rows)
    tuning = "The learning rate was given, not chosen."
    if rates := ", ".join(f"{rate:g}" for rate in group.rates()):
        tuning = (
            f"Each model's learning rate was chosen of {rates} on the validation part, "
            "with one seed and few updates."
        )
    text = [
        "Test accuracy, mean ± standard deviation over seeds; the test part was read "
        f"once a cell. {tuning} FLOPs are those of a sequence of "
        f"{32 if 'pos' in config['task'] else 256} vectors, for each of them. Accuracy "
        "on training data is that of 2,000 training sequences without dropout."
    ]
    if "phones" in config["task"]:
        text.append(
            "A vector of speech holds differences that reach 4 frames to either "
            "side: a model that labels each by itself has seen 105 ms. Models were "
            "trained on crops of 2.56 s, and scored on crops of the test utterances"
            + (
                "; whole utterances are longer than what training had."
                if any(row.of(WHOLE) for row in models)
                else "."
            )
        )
    return text + _beside_baselines(_by_score(models), group)


def _beside_baselines(rows: Sequence[Row], group: Group) -> list[str]:
    """Names the models that do not beat every baseline of the same table."""
    if (best := group.best("test_accuracy")) is None:
        return []
    floor, value = best[0].replace("_", " "), best[1]
    behind = [
        f"{model_name(row)} ({tell.mean(row.of('test_accuracy'))})"
        for row in rows
        if row.mean("test_accuracy", 2.0) <= value
    ]
    who = "No model beats" if len(behind) == len(rows) else "Not ahead of"
    said = f"**{who} the baseline {floor} ({tell.decimal(value)}): "
    return [f"{said}{', '.join(behind)}.**"] if behind else []


def _floors(group: Group) -> list[str]:
    lines = []
    for name, metrics in group.floors().items():
        said = ", ".join(
            f"{metric.removeprefix('test_').replace('_', ' ')} {tell.decimal(value)}"
            for metric, value in sorted(metrics.items())
        )
        lines.append(f"* {name.replace('_', ' ')}: {said}")
    return ["Without training, counts of the whole training part:", "\n".join(lines)]


def _remarks(group: Group) -> list[str]:
    """What rows of varied self-attention say beside one another, and what not."""
    text = []
    for none in group.rows:
        if none.config["positions"] != "none" or not none.records:
            continue
        same, found = {**none.config, "positions": None}, []
        for row in group.rows:
            if row.records and row is not none:
                if {**row.config, "positions": None} == same:
                    gap, said = tell.difference(row, none, "test_accuracy")
                    worse = ", **worse than none**" * (gap.clear and gap.mean < 0)
                    found.append(f"{row.config['positions']} {said}{worse}")
        if found:
            text.append(
                "Beside no positions (paired by seed, Student's interval of 95 %): "
                f"{'; '.join(found)}."
            )
    kinds = {(row.config["attention"], row.config["positions"]) for row in group.rows}
    if ("additive", "rope") in kinds:
        text.append(
            "Additive scores beside dot products are no fair comparison with RoPE: it "
            "turns queries and keys so that their dot product depends on the offset "
            "alone, and does so for dot products only."
        )
    by_score = {
        row.config["attention"]: row
        for row in group.rows
        if row.config["positions"] == "t5" and row.records
    }
    if {"additive", "dot_product"} <= set(by_score):
        one, two = by_score["additive"], by_score["dot_product"]
        apart, said = tell.difference(one, two, "test_accuracy")
        text.append(
            "Additive scores − dot products, both with T5's bias and each at the rate "
            f"that its own tuning chose: {said}{'' if apart.clear else ', not clear'}."
        )
    return text


# ---------------------------------------------------------------------- figures


_WINDOW, _ATTENTION = "window", "self-attention"


def _styles(group: Group) -> Styles:
    """Models have the colours after those of the figures about the window."""
    parts = [f"{_WINDOW}, {part}" for part in ("test", "training")]
    beside = [f"{_ATTENTION}, {part}" for part in ("test", "training")]
    return Styles([*parts, *sorted(map(model_name, group.every))], beside)


def _task(config: Mapping[str, Any]) -> str:
    return _TASKS.get(config["task"], config["task"])


def _floor(group: Group) -> tuple[float, str] | None:
    """The best baseline, and what it is."""
    best = group.best("test_accuracy")
    if best is None:
        return None
    name = best[0].replace("_", " ")
    return best[1], f"{name}, whole training part: {tell.decimal(best[1])}"


def _window(group: Group) -> list[str]:
    """Accuracy over the window, what is overfitted, and the parameters it takes."""
    config = group.config
    points = [(2 * row.config["window"] + 1, row) for row in group.rows]
    ends = [points[0][0], points[-1][0]]
    beside = [
        row
        for row in group.every
        if all(row.config[name] == config[name] for name in ("n", "updates"))
        and row.config["model"] == "transformer"
        and _plain(group, row)
    ]
    name = f"window_{config['n'] or 'all'}.png"

    def lines(part: str, metric: Any, said: str = "") -> list[Series]:
        found = [
            Series.of(
                f"{_WINDOW}{said}",
                [(x, row.of(metric)) for x, row in points],
                name=f"{_WINDOW}, {part}",
            )
        ]
        found += [
            Series.of(
                f"{_ATTENTION}{said}",
                [(end, row.of(metric)) for end in ends],
                name=f"{_ATTENTION}, {part}",
            )
            for row in beside
        ]
        return [line for line in found if line.x]

    behind = lambda r: r["metrics"]["params"] - r["metrics"]["input_params"]  # noqa: E731
    accuracy = [
        line
        for part, metric in (("test", "test_accuracy"), ("training", "train_accuracy"))
        for line in lines(part, metric, f", {part}")
    ]
    if not accuracy:
        return []
    common: dict[str, Any] = dict(xlabel="vectors that one label sees", doubling=True)
    panels(
        [
            Panel(
                f"{_task(config)}: {_size(config)} training sequences",
                ylabel="accuracy",
                series=accuracy,
                level=_floor(group),
                **common,
            ),
            Panel(
                "What a wider window takes",
                ylabel="parameters behind the input tables",
                series=lines("test", behind),
                log=True,
                **common,
            ),
        ],
        group.folder / name,
        _styles(group),
    )
    return [
        f"![a wider window]({name})",
        "Lines are means over seeds, with bands of one deviation.",
    ]


def _scaling(group: Group) -> list[str]:
    """Accuracy over the number of training sequences, for as many updates each."""
    models = {(model_name(r), r.config["depth"]) for r in _models(group.rows)}
    sweep = min(row.config["updates"] for row in group.rows)
    scaling: dict[str, dict[int, Row]] = {}
    for row in group.rows:
        size, name = row.first("n"), model_name(row)
        plain = row.config["model"] != "transformer" or _plain(group, row)
        if row.config["updates"] == sweep and size and plain:
            if (name, row.config["depth"]) in models:
                scaling.setdefault(name, {}).setdefault(size, row)
    if all(len(points) < 2 for points in scaling.values()):
        return []
    lines = [
        Series.of(name, [(n, points[n].of("test_accuracy")) for n in sorted(points)])
        for name, points in scaling.items()
        if len(points) > 1
    ]
    panels(
        [
            Panel(
                f"{_task(group.config)}: {sweep:,} updates for every N",
                "number of training sequences N",
                "test accuracy",
                lines,
                level=_floor(group),
                doubling=True,
            )
        ],
        group.folder / "scaling.png",
        _styles(group),
    )
    cells = {
        name: {n: tell.mean(row.of("test_accuracy")) for n, row in points.items()}
        for name, points in scaling.items()
    }
    return [
        f"## Training data: {sweep:,} updates for every N",
        "![scaling](scaling.png)",
        tell.pivot("model", cells, "N = {:,}"),
    ]


def _streaming(group: Group) -> list[str]:
    """What streaming.json of the folder says, if there is one."""
    found = group.measured(STREAMING)
    if found is None:
        return []

    def name(row: dict[str, Any]) -> str:
        kind = "full" if row["left"] is None else f"{row['left']} + {row['right']}"
        return f"{kind}, positions: {row['positions']}, {row['updates']} updates"

    def factors(row: dict[str, Any]) -> str:
        longest = max(s["seconds"] for s in row["stream"])
        some = [s["real_time_factor"] for s in row["stream"] if s["seconds"] == longest]
        return f"{', '.join(f'{x:.3f}' for x in some)} at {longest:g} s"

    def whole(row: dict[str, Any]) -> str:
        last = row["whole"][-1]
        memory = f"{last['temporary_bytes'] / 2**20:,.0f} MiB"
        return f"{last['real_time_factor']:.3f}, {memory} at {last['seconds']:g} s"

    def streamed(form: str) -> Any:
        return lambda row: form.format(**row) if "stream" in row else tell.NONE

    return [
        "## Speech as it comes",
        "Seed 0 of each, on {test_utterances} whole test utterances; sound taken as it "
        "comes is compared with the whole on {utterances_compared} of them; times on "
        "{cores} core. Real-time factor: seconds of work for a second of sound.".format(
            **found
        ),
        tell.tabulate(
            [
                ("self-attention", name),
                (
                    "accuracy, whole utterances",
                    lambda row: tell.decimal(row["whole_utterance_accuracy"]),
                ),
                ("late by", streamed("{look_ahead_ms} ms")),
                (
                    "largest difference in probability (logit)",
                    streamed("{probability_difference:.0e} ({logit_difference:.0e})"),
                ),
                ("remembered", streamed("{state_bytes:,} bytes")),
                (
                    "real-time factor by 1 and by 10 frames",
                    lambda row: factors(row) if "stream" in row else tell.NONE,
                ),
                ("the whole at once: real-time factor, temporary memory", whole),
            ],
            sorted(
                found["rows"],
                key=lambda r: (r["left"] is None, r["left"] or 0, r["right"] or 0),
            ),
        ),
    ]


# Whether it is speech -> what a row of a map is.
_ROWS = {
    False: "Each row is a word, with the tag that the model predicts in brackets, and "
    "where it looks.",
    True: "Each row is a time, named by the phone that begins there, and where it "
    "looks.",
}


def _ticks(names: Sequence[str], spoken: bool) -> list[str]:
    """Names of rows: predictions marked, and none on top of another."""
    if not spoken:
        return ["{} ({}?)".format(*name.rsplit("/", 1)) for name in names]
    found, last = [], -2
    for place, name in enumerate(names):
        shown = bool(name) and place - last > 1
        found.append(name if shown else "")
        last = place if shown else last
    return found


def draw_maps(group: Group) -> list[str]:
    """Draws the attention maps of the folder, if there are any, one a sequence."""
    found = group.measured(MAPS)
    if found is None:
        return []
    text, spoken = ["## Who attends to whom"], _spoken(found["cell"])
    for place, entry in enumerate(found["maps"], start=1):
        heads(
            [np.asarray(layer) for layer in entry["weights"]],
            group.folder / f"maps_{place}.png",
            title=f"{entry['title']}\n{_ROWS[spoken]}",
            size=2.6,
            ticks=_ticks(entry["ticks"], spoken),
            bar="weight that a row gives to a column",
        )
        text.append(f"![{entry['title']}](maps_{place}.png)")
    return text


_ITEMS = "(which depend on one another, so that it is rather larger)"

REPORT = Report(
    title="# Sequence labelling: {task}",
    text=(_intro,),
    sections=(
        Section(
            title="## Models on the whole training part",
            rows=lambda group: _by_score(_models(group.rows)),
            columns=_columns(("model", model_name)),
            notes=(
                lambda group: tell.sampling(
                    "test_accuracy",
                    lambda config: _TEST_LABELS.get(config["task"]),
                    f"test {'frames' if _spoken(group.config) else 'words'} {_ITEMS}",
                )(group),
                _floors,
            ),
        ),
        Section(
            title=_sized("## The window"),
            rows=_windows,
            by=("n", "updates"),
            least=3,
            order=lambda row: row.config["window"],
            columns=_columns(("window", lambda row: f"±{row.config['window']}")),
            notes=(_window,),
        ),
        Section(
            title=_sized("## Self-attention varied"),
            rows=lambda group: _rest(group, "transformer"),
            by=("n", "updates"),
            least=2,
            order=_title,
            columns=_columns(("self-attention", _title)),
            notes=(_remarks,),
        ),
    ),
    notes=(_scaling, draw_heads, _streaming, draw_maps),
)
