"""Tables and figures of the data-scaling experiment, from stored results alone.

    python -m experiments.data_scaling.report FOLDER

reads the records in FOLDER (or a results.jsonl) and writes results.jsonl,
report.md, curve.png and gap.png; further tasks get curve_<task>.png and
gap_<task>.png. Nothing is trained, and the same records give the same files.

Whatever weakens a number stands beside it: seeds are counted, means of fewer
than three are marked, networks that lose to a baseline are named first, runs that
diverged are listed, and nothing is said of N beyond those measured.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from attn_jax import models
from attn_jax._program import program
from experiments.core import plots, stats
from experiments.core.cell import attention_digest
from experiments.core.store import Record, ResultsStore, export_jsonl, read_jsonl
from experiments.data import scenes
from experiments.data_scaling.tasks import SCENES_NAME, shape_of, test_size

MODELS = {
    "vit": "ViT",
    "resnet": "ResNet",
    "hybrid": "Hybrid",
    "mlp": "MLP",
    "logistic_regression": "logistic regression",
    "rbf_svm": "RBF-SVM",
    "majority": "majority class",
}
TASKS = {
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "digits": "digits",
    "scenes": "Composed scenes",
}
PROTOCOLS = {
    "updates": "an equal number of optimiser updates for every N",
    "epochs": "epochs grow as N shrinks (epochs × 1/f)",
}
MAIN_TASK = "fashion_mnist"

#: Records that differ in one of these are different experiments: a section each.
_SECTION_KEYS = (
    "task",
    "dataset",
    "scene_task",
    "grid",
    "item",
    "cells",
    "item_classes",
    "protocol",
    "preset",
)
_ATTENTION = ("vit", "hybrid")
_PLAIN_ATTENTION = (None, "", "none", "dot_product", "softmax")
_MISFIT = 0.02  # a law that misses a mean by more describes the data badly
_MATCHED = 1.25  # FLOPs within this ratio count as matched
_EQUAL = 1.1  # updates within this ratio count as equal: whole passes are rounded
_MOST_GAPS = 6  # lines that a gap figure can hold
_WITHOUT_CENTRE = "reading the rim without the centre"


@dataclasses.dataclass
class Point:
    """All that is stored for one line at one N."""

    n: int
    records: dict[int, Record]  # seed -> finished record
    lost: list[Record]  # diverged or failed
    other: list[Record]  # finished under other settings, not in the tables

    @property
    def scores(self) -> dict[int, float]:
        """Seed -> test accuracy."""
        return {
            seed: record["metrics"]["test_accuracy"]
            for seed, record in sorted(self.records.items())
        }

    @property
    def summary(self) -> stats.Summary:
        """Mean, spread and number of the scores."""
        return stats.summarize(list(self.scores.values()))

    @property
    def config(self) -> dict[str, Any]:
        """Settings, the same for all seeds but for the seed."""
        return next(iter(self.records.values()))["config"]

    @property
    def capped(self) -> int | None:
        """How many images a capped baseline was fitted to, else None."""
        used = [r["metrics"].get("n_used") for r in self.records.values()]
        smallest = min((u for u in used if u is not None), default=self.n)
        return int(smallest) if smallest < self.n else None


@dataclasses.dataclass
class Line:
    """One model (with its size and attention), or one baseline."""

    model: str
    size: str | None
    attention: str | None
    baseline: bool
    points: dict[int, Point]
    tune: list[Record]
    version: str = ""  # of the variant's file, where there are several
    field: str = ""  # receptive field, where it tells two CNNs apart

    @property
    def name(self) -> str:
        """What its style belongs to: the label, but for what a task adds to it."""
        name = MODELS.get(self.model, self.model)
        if self.size:
            name += f"-{self.size}"
        if self.attention not in _PLAIN_ATTENTION:
            version = f" {self.version}" if self.version else ""
            name += f" [{os.path.basename(str(self.attention))}{version}]"
        return name

    @property
    def label(self) -> str:
        """Name in tables and legends."""
        return self.name + (f" (field {self.field} px)" if self.field else "")

    @property
    def scored(self) -> dict[int, Point]:
        """N -> points with at least one finished seed, ascending."""
        return {n: p for n, p in sorted(self.points.items()) if p.records}

    @property
    def scores(self) -> dict[int, dict[int, float]]:
        """N -> seed -> test accuracy."""
        return {n: point.scores for n, point in self.scored.items()}

    def metric(self, name: str, *, tune: bool = False) -> list[Any]:
        """Return all stored values of a metric, of tuning cells too if asked."""
        records = [r for p in self.scored.values() for r in p.records.values()]
        values = (r["metrics"].get(name) for r in records + self.tune * tune)
        return [value for value in values if value is not None]


@dataclasses.dataclass
class Section:
    """One task under one protocol."""

    keys: dict[str, Any]
    networks: list[Line]
    baselines: list[Line]
    apart: str = ""

    @property
    def task(self) -> str:
        """Name of the task as in the configs."""
        return str(self.keys.get("task", "task"))

    @property
    def title(self) -> str:
        """Name of the task for people, and what sets it apart where needed."""
        name = TASKS.get(self.task, self.task)
        if self.scene:
            name = "{}: {rule}, {grid} × {grid} cells of {item} pixels".format(
                TASKS["scenes"], **self.scene.groupdict()
            )
        return f"{name} ({self.apart})" if self.apart else name

    @property
    def sizes(self) -> list[int]:
        """All N with a result."""
        lines = (*self.networks, *self.baselines)
        return sorted({n for line in lines for n in line.scored})

    @property
    def pairs(self) -> list[tuple[Line, Line]]:
        """Each network with attention beside every CNN, the nearest in FLOPs first."""
        cnns = [x for x in self.networks if x.model == "resnet" and x.scored]
        return [
            (line, cnn)
            for line in self.networks
            if line.model in _ATTENTION and line.scored
            for cnn in sorted(cnns, key=lambda cnn: _distance(line, cnn))
        ]

    @property
    def updates(self) -> dict[int, set[int]]:
        """N -> numbers of optimiser updates that its cells got."""
        found: dict[int, set[int]] = collections.defaultdict(set)
        for line in self.networks:
            for n, point in line.scored.items():
                for record in point.records.values():
                    found[n].update(_steps(record))
        return {n: counts for n, counts in sorted(found.items()) if counts}

    @property
    def uneven(self) -> bool:
        """Whether cells got different numbers of updates, over N or at one N."""
        counts = {u for found in self.updates.values() for u in found}
        return bool(counts) and max(counts) > _EQUAL * min(counts)

    @property
    def scene(self) -> re.Match[str] | None:
        """What the task's name says of composed scenes; None for other tasks."""
        found = SCENES_NAME.match(self.task)
        return found if found and found["rule"] in scenes.TASKS else None

    @property
    def chance(self) -> float | None:
        """Highest accuracy on scenes without relating the centre to the rim."""
        if not self.scene:
            return None
        cells, classes = int(self.scene["cells"]), int(self.scene["classes"])
        return scenes.chance_level(
            self.scene["rule"], cells=cells, item_classes=classes
        )

    @property
    def span(self) -> int | None:
        """Pixels that a relation spans on scenes."""
        if not self.scene:
            return None
        grid, item, cells = (int(self.scene[k]) for k in ("grid", "item", "cells"))
        return scenes.span(grid=grid, item=item, cells=cells)


def load(source: str | os.PathLike[str] | Sequence[Record]) -> list[Record]:
    """Read records from a results folder, a JSON-lines file, or pass them on.

    In a folder, records that only its results.jsonl holds (a checkout in which the
    single files were not kept) count too.

    Raises:
        FileNotFoundError: There is no such folder or file.
    """
    if not isinstance(source, str | os.PathLike):
        return list(source)
    path = pathlib.Path(source)
    if path.is_file():
        return read_jsonl(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no results folder or .jsonl file at {path}")
    records = ResultsStore(path).records()
    kept = path / "results.jsonl"
    if kept.is_file():
        known = {record["hash"] for record in records}
        records += [r for r in read_jsonl(kept) if r["hash"] not in known]
    return records


def write_report(
    source: str | os.PathLike[str] | Sequence[Record],
    out_dir: str | os.PathLike[str] | None = None,
    *,
    main_task: str = MAIN_TASK,
) -> dict[str, pathlib.Path]:
    """Write results.jsonl, report.md and the figures.

    Args:
        source: Results folder, JSON-lines file, or the records themselves.
        out_dir: Where to write; by default the folder itself.
        main_task: The task whose figures are named plainly, where it is there.

    Returns:
        File name -> path of each file written.

    Raises:
        ValueError: There are no records, or no folder to write to.
    """
    records = load(source)
    if out_dir is None:
        if not isinstance(source, str | os.PathLike):
            raise ValueError("out_dir: needed where records are passed themselves")
        path = pathlib.Path(source)
        out_dir = path if path.is_dir() else path.parent
    if not records:
        raise ValueError(
            "there are no results to report; run `python -m experiments.data_scaling`"
        )
    out = pathlib.Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    files = {"results.jsonl": out / "results.jsonl"}
    export_jsonl(records, files["results.jsonl"])

    sections = make_sections(records, main_task=main_task)
    text = [
        "# Accuracy as the training set grows",
        "",
        "Written by `python -m experiments.data_scaling.report` from `results.jsonl`; "
        "do not edit.",
        "",
        "Numbers are accuracies on the fixed test set: mean ± standard deviation over "
        "seeds (number of seeds). A seed draws the training subset, the initial "
        "weights and the order of the images.",
        "",
    ]
    names = _file_names(sections)
    styles = _styles(sections)
    for section, name in zip(sections, names, strict=True):
        figures = _draw(section, out, name, styles)
        files |= figures
        text += _section(section, figures)
    if not sections:
        text += ["No cell of the final phase has been started: nothing to compare.", ""]
    text += _provenance(records)
    files["report.md"] = out / "report.md"
    _write(files["report.md"], "\n".join(text).rstrip() + "\n")
    return files


def summary_table(records: Sequence[Record], *, main_task: str = MAIN_TASK) -> str:
    """Return the accuracy tables alone, as aligned text for a terminal."""
    parts = []
    for section in make_sections(records, main_task=main_task):
        parts += [
            f"{section.title}: test accuracy",
            "",
            *_accuracy_table(section, bold=False),
            "",
        ]
        parts += [line for line in _losers(section) if line.startswith("- ")]
    return "\n".join(parts).rstrip().replace("**", "") + "\n"


def make_sections(
    records: Sequence[Record], *, main_task: str = MAIN_TASK
) -> list[Section]:
    """Sort records into sections and lines; the main task comes first."""
    records = [_recounted(r) for r in records]
    finals = [r for r in records if r["config"].get("phase") == "final"]
    baselines = [r for r in records if r["config"].get("phase") == "baseline"]
    tune = [r for r in records if r["config"].get("phase") == "tune"]
    keys = _unique(_section_keys(r) for r in finals) or _unique(
        _section_keys(r) for r in baselines
    )
    sections = []
    for key in keys:
        mine = [r for r in finals if _section_keys(r) == key]
        networks = _lines(mine, [r for r in tune if _agrees(r, key)], baseline=False)
        grey = _lines([r for r in baselines if _agrees(r, key)], [], baseline=True)
        twins = [k for k in keys if k != key and k.get("task") == key.get("task")]
        apart = ", ".join(
            f"{name} {value}"
            for name, value in key.items()
            if name != "task" and any(twin.get(name) != value for twin in twins)
        )
        sections.append(Section(key, networks, grey, apart))
    return sorted(
        sections,
        key=lambda s: (
            s.task != main_task,
            s.task,
            str(sorted(s.keys.items(), key=str)),
        ),
    )


def forward_flops(config: Mapping[str, Any]) -> int | None:
    """Count the FLOPs of one image in the model of a config, without its data.

    None where they cannot be counted: the images are of a file of one's own, or the
    file of an attention variant is not what it was.
    """
    shape = shape_of(str(config.get("task")))
    names = ("model", "size", "attention", "attention_sha256", "patch")
    return shape and _forward_flops(*shape, *(config.get(name) for name in names))


@functools.lru_cache(maxsize=64)
def _forward_flops(
    image_shape: tuple[int, int, int],
    num_classes: int,
    model: str,
    size: str,
    attention: str | None,
    digest: str | None,
    patch: int | None,
) -> int | None:
    def make() -> nnx.Module:
        return models.build(
            model,
            size,
            image_shape=image_shape,
            num_classes=num_classes,
            attention=attention,
            overrides={} if patch is None else {"patch": patch},
            rngs=nnx.Rngs(0),
        )

    try:
        if attention_digest(attention) != digest:
            return None
        return models.cost(nnx.eval_shape(make), image_shape).flops
    except (OSError, ValueError):  # a model or variant that is no more
        return None


def _recounted(record: Record) -> Record:
    """The record with FLOPs as they are counted now, by one counter for all."""
    if "flops" not in record["metrics"]:
        return record
    flops = forward_flops(record["config"])
    if flops is None:
        return record
    return record | {"metrics": record["metrics"] | {"flops": flops}}


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: redraw tables and figures from a results folder."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data_scaling.report",
        description="Write report.md, results.jsonl and the figures from stored "
        "results alone; nothing is trained.",
    )
    parser.add_argument("source", help="results folder, or a results.jsonl")
    parser.add_argument("--out", help="folder to write to (default: the source's)")
    parser.add_argument(
        "--main-task", default=MAIN_TASK, help="task with the plain figure names"
    )
    options = parser.parse_args(argv)
    try:
        files = write_report(options.source, options.out, main_task=options.main_task)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary_table(load(options.source), main_task=options.main_task))
    for path in files.values():
        print(f"wrote {path}")
    return 0


# --- sorting records ---------------------------------------------------------------


def _section_keys(record: Record) -> dict[str, Any]:
    config = record["config"]
    return {key: config[key] for key in _SECTION_KEYS if key in config}


def _agrees(record: Record, keys: Mapping[str, Any]) -> bool:
    """Whether a record belongs to a section, as far as its config says."""
    return all(
        keys.get(key, value) == value for key, value in _section_keys(record).items()
    )


def _lines(
    records: Sequence[Record], tune: Sequence[Record], *, baseline: bool
) -> list[Line]:
    grouped: dict[tuple[Any, ...], list[Record]] = collections.defaultdict(list)
    for record in records:
        grouped[_identity(record)].append(record)
    lines = []
    for (model, size, attention, digest), members in grouped.items():
        edited = any(
            other[:3] == (model, size, attention) and other[3] != digest
            for other in grouped
        )
        by_n: dict[int, list[Record]] = collections.defaultdict(list)
        for record in members:
            by_n[int(record["config"]["n"])].append(record)
        lines.append(
            Line(
                model=model,
                size=size,
                attention=attention,
                baseline=baseline,
                points={n: _point(n, found) for n, found in sorted(by_n.items())},
                tune=[
                    r for r in tune if _identity(r) == (model, size, attention, digest)
                ],
                version=str(digest)[:6] if edited else "",
            )
        )
    cnns = [x for x in lines if x.model == "resnet" and x.scored]
    for line in cnns if len(cnns) > 1 else ():
        line.field = _span(line.metric("receptive_field"), str).replace("–", "")
    order = list(MODELS)
    return sorted(
        lines,
        key=lambda x: (
            order.index(x.model) if x.model in order else len(order),
            x.attention not in _PLAIN_ATTENTION,
            x.label,
        ),
    )


def _identity(record: Record) -> tuple[Any, ...]:
    config = record["config"]
    names = ("model", "size", "attention", "attention_sha256")
    return tuple(config.get(name) for name in names)


def _point(n: int, records: Sequence[Record]) -> Point:
    """Gather the seeds of one setting; the choice never looks at a score."""
    settings: dict[str, list[Record]] = collections.defaultdict(list)
    lost = []
    for record in records:
        if _scored(record):
            rest = {k: v for k, v in record["config"].items() if k != "seed"}
            settings[repr(sorted(rest.items()))].append(record)
        else:
            lost.append(record)
    if not settings:
        return Point(n, {}, lost, [])

    def rank(name: str) -> tuple[int, str, str]:
        found = settings[name]
        return len(found), max(_created(r) for r in found), name

    chosen = max(settings, key=rank)
    return Point(
        n,
        {int(r["config"].get("seed", 0)): r for r in settings[chosen]},
        lost,
        [r for name, found in settings.items() if name != chosen for r in found],
    )


def _scored(record: Record) -> bool:
    score = record["metrics"].get("test_accuracy")
    return record["status"] == "done" and isinstance(score, int | float)


def _created(record: Record) -> str:
    return str(record["provenance"].get("created_utc", ""))


def _distance(line: Line, cnn: Line) -> tuple[float, bool, str]:
    one, two = line.metric("flops"), cnn.metric("flops")
    apart = abs(math.log(one[0] / two[0])) if one and two else 0.0
    return apart, cnn.size != line.size, cnn.label


def _unique(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _file_names(sections: Sequence[Section]) -> list[str]:
    """Give the first section no suffix, the others their task, made unique."""
    names: list[str] = []
    for i, section in enumerate(sections):
        name = "" if i == 0 else "_" + _slug(section.task)
        if name in names:
            extra = section.keys.get("protocol") or section.keys.get("preset") or i + 1
            name += "_" + _slug(str(extra))
        while name in names:
            name += f"_{i + 1}"
        names.append(name)
    return names


def _slug(text: str) -> str:
    base = os.path.basename(text)
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in base)


# --- the parts of a section --------------------------------------------------------


def _section(section: Section, figures: Mapping[str, pathlib.Path]) -> list[str]:
    text = [f"## {section.title}", "", *_none_ahead(section)]
    text += _protocol(section)
    text += ["### Test accuracy", ""]
    text += [*_accuracy_table(section), "", *_legend(section), ""]
    if section.chance is not None:
        text += [
            f"{_WITHOUT_CENTRE.capitalize()} gives at most {_number(section.chance)}: "
            "a network that does not exceed it has not shown that it relates the two.",
            "",
        ]
    for name in figures:
        text += [f"![{name.removesuffix('.png')}]({name})", ""]
    text += _losers(section)
    text += _gaps(section)
    text += _laws(section)
    text += _sizes(section)
    text += _hyper_parameters(section)
    text += _training_accuracy(section)
    text += _lost(section)
    return text


def _protocol(section: Section) -> list[str]:
    keys = section.keys
    points = [p for line in section.networks for p in line.scored.values()]
    text = _uneven_updates(section)
    if "protocol" in keys:
        name = str(keys["protocol"])
        meaning = None if section.uneven else PROTOCOLS.get(name)
        text.append(f"- Protocol `{name}`" + (f": {meaning}." if meaning else "."))
    updates = section.updates
    batches = {
        int(p.config["batch_size"]) for p in points if p.config.get("batch_size")
    }
    if updates:
        if not section.uneven:  # else they stand above
            text.append(f"- Optimiser updates: {_updates_said(updates)}.")
        if len(batches) == 1:
            batch = batches.pop()
            said = ", ".join(
                f"{_short(max(found) * batch / n)} at N = {n:,}"
                for n, found in updates.items()
            )
            text.append(f"- Batch {batch}; that makes epochs of {said}.")
    lines = (*section.networks, *section.baselines)
    hashes = sorted({str(h) for line in lines for h in line.metric("data_sha256")})
    if hashes:
        said = ", ".join(h[:16] for h in hashes)
        warning = " **Warning: not all cells saw the same data.**"
        text.append(f"- Data: sha256 {said}." + warning * (len(hashes) > 1))
    for line in section.networks:
        for name in ("params", "flops"):
            values = line.metric(name, tune=True)
            if len(set(values)) > 1:
                said = _span(values, lambda v: f"{v:,.0f}")
                text.append(
                    f"- **Warning: `{name}` differs between cells of {line.label}** "
                    f"({said}): the definition of the model changed, so that they are "
                    "not one line."
                )
    seeds = sorted({s for p in points for s in p.records})
    if seeds:
        text.append(f"- Seeds: {', '.join(map(str, seeds))}.")
    if any(line.tune for line in section.networks):
        text.append(
            "- Hyper-parameters were chosen on a validation split cut from the "
            "training subset; the test set was read once per final cell."
        )
        given = [x.label for x in section.networks if _untuned(x)]
        if given:
            text.append(f"- Not tuned, one given setting: {', '.join(given)}.")
        leaks = sum(
            any(
                name.startswith("test_") and value is not None
                for name, value in record["metrics"].items()
            )
            for line in section.networks
            for record in line.tune
        )
        if leaks:
            text.append(f"- **Warning: {leaks} tuning cells hold test scores.**")
    elif points:
        text.append("- No tuning cells are stored: hyper-parameters were given.")
    shared = _shared([p.config for p in points])
    if shared:
        text.append(f"- The same in all final cells: {_assignments(shared)}.")
    return [*text, ""] if text else []


def _updates_said(updates: Mapping[int, set[int]]) -> str:
    if len(set().union(*updates.values())) == 1:
        return f"{min(next(iter(updates.values()))):,} at every N"
    return "; ".join(
        f"{' or '.join(f'{u:,}' for u in sorted(found))} at N = {n:,}"
        for n, found in updates.items()
    )


def _uneven_updates(section: Section) -> list[str]:
    """Say at the top where the number of updates is not the same for every cell."""
    if not section.uneven:
        return []
    updates = section.updates
    text = [f"- **Updates are not equal**: {_updates_said(updates)}."]
    ends = {n: (min(found), max(found)) for n, found in updates.items()}
    sizes = list(ends)
    steps = [
        (one, two)
        for one, two in zip(sizes, sizes[1:], strict=False)
        if ends[two][1] > _EQUAL * ends[one][0] or ends[one][1] > _EQUAL * ends[two][0]
    ]
    if steps:
        said = ", ".join(f"{one:,} to {two:,}" for one, two in steps)
        grows = all(ends[two][0] >= ends[one][1] for one, two in steps)
        text[0] += (
            " (A cap on the passes over small sets gives that.) Data and updates grow "
            "together"
            if grows
            else " Data and updates change together"
        )
        text[0] += (
            f" from N = {said}: what is gained there, and with it the power law, "
            "mixes the effect of more data with that of longer training."
        )
    within = [n for n, (low, high) in ends.items() if high > _EQUAL * low]
    if within:
        text.append(
            f"- **Warning: at N = {', '.join(f'{n:,}' for n in within)} not all "
            "networks got the same updates**, so that the gap there mixes in the "
            "length of training."
        )
    return text


def _uneven_caveat(section: Section) -> list[str]:
    if not section.uneven:
        return []
    return [
        "Updates differ between the N (see the top): the laws below are of data and "
        "length of training together, not of data alone.",
        "",
    ]


def _shared(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not configs:
        return {}
    hidden = {"seed", "n", "model", "size", "phase", "updates", "protocol", "task"}
    hidden |= {"attention", "attention_sha256"}
    return {
        key: value
        for key, value in sorted(configs[0].items())
        if key not in hidden
        and value is not None
        and all(key in c and c[key] == value for c in configs)
    }


def _accuracy_table(section: Section, *, bold: bool = True) -> list[str]:
    lines = [x for x in (*section.networks, *section.baselines) if x.points]
    rows = []
    for n in section.sizes or sorted({n for x in lines for n in x.points}):
        best = max(
            (x.scored[n].summary.mean for x in section.networks if n in x.scored),
            default=None,
        )
        row = [f"{n:,}"]
        for line in lines:
            point = line.points.get(n)
            if point is None:
                row.append("–")
                continue
            if not point.records:
                row.append(_outcomes(point.lost))
                continue
            entry = _mean(point.summary)
            if bold and not line.baseline and point.summary.mean == best:
                entry = f"**{entry}**"
            row.append(entry + _marks(section, line, point))
        rows.append(row)
    return _table(["N", *(x.label for x in lines)], rows)


def _marks(section: Section, line: Line, point: Point) -> str:
    marks = "" if point.summary.enough else " †"
    if point.capped:
        marks += " ‡"
    if point.lost:
        marks += " §"
    if not line.baseline and _lost_to(section, point):
        marks += " ▼"
    if _few_test_images(section, line, point):
        marks += " ◦"
    return marks


def _few_test_images(section: Section, line: Line, point: Point) -> float | None:
    """The sampling error of the test set, where seeds differ by less than that."""
    size, spread = test_size(section.task), point.summary.std
    if size is None or spread is None or line.model == "majority":
        return None
    error = stats.sampling_error(point.summary.mean, size)
    return error if spread < error else None


def _legend(section: Section) -> list[str]:
    points = [
        (line, p)
        for line in (*section.networks, *section.baselines)
        for p in line.scored.values()
    ]
    notes = {
        "†": "fewer than 3 seeds: not a result to rely on.",
        "‡": "fitted to a class-balanced part of the N images only: "
        + ", ".join(sorted({f"{x.label} {p.capped:,}" for x, p in points if p.capped}))
        + ".",
        "§": "not all seeds finished (see below); the mean is of those that did, "
        "which flatters it.",
        "▼": "does not beat every baseline at that N.",
    }
    errors = [e for x, p in points if (e := _few_test_images(section, x, p))]
    if errors:
        notes["◦"] = (
            "seeds differ by less than the sampling error of the "
            f"{test_size(section.task):,} test images, √(p(1 − p)/m) = "
            f"{_span(errors, _number)}."
        )
    used = "".join(_marks(section, x, p) for x, p in points)
    text = [f"{mark} {note}  " for mark, note in notes.items() if mark in used]
    if any(not x.baseline for x, _ in points):
        text.append("Bold: the best network at that N, by its mean alone.")
    if "–" in "".join(_accuracy_table(section)):
        text.append("–: no result stored.")
    return text


def _lost_to(section: Section, point: Point) -> list[tuple[str, stats.Summary]]:
    """Return the baselines at this N that the point's mean does not exceed."""
    rivals = [
        (line.label, line.scored[point.n].summary)
        for line in section.baselines
        if point.n in line.scored
    ]
    if section.chance is not None:
        rivals.append((_WITHOUT_CENTRE, stats.Summary(1, section.chance, None)))
    return [x for x in rivals if point.summary.mean <= x[1].mean]


def _none_ahead(section: Section) -> list[str]:
    """Say first at which N no network beats every baseline."""
    worse = []
    for n in section.sizes:
        points = [x.scored[n] for x in section.networks if n in x.scored]
        if points and all(_lost_to(section, point) for point in points):
            worse.append(f"{n:,}")
    if not worse:
        return []
    return [f"**At N = {' and '.join(worse)} no network beats every baseline.**", ""]


def _losers(section: Section) -> list[str]:
    text = ["### Beside the baselines", ""]
    compared, missing = False, []
    for line in section.networks:
        for point in line.scored.values():
            rivals = [x for x in section.baselines if point.n in x.scored]
            compared |= bool(rivals) or section.chance is not None
            if not rivals and point.n not in missing:
                missing.append(point.n)
            lost = _lost_to(section, point)
            if not lost:
                continue
            names = " and ".join(
                f"{name} ({_number(rival.mean)})" for name, rival in lost
            )
            close = all(_within_spread(point.summary, rival) for _, rival in lost)
            text.append(
                f"- {line.label} at N = {point.n:,} "
                f"({_number(point.summary.mean)}) **loses to** {names}"
                + (", by less than the spread of the seeds." if close else ".")
            )
    if compared and len(text) == 2:
        text.append("Every network beats every baseline at every N that has both.")
    if missing:
        sizes = ", ".join(f"{n:,}" for n in sorted(missing))
        claim = (
            "nothing is claimed there."
            if section.chance is None
            else f"only {_WITHOUT_CENTRE} is compared there."
        )
        text.append(f"- No baseline is stored at N = {sizes}: {claim}")
    return [*text, ""] if len(text) > 2 else []


def _within_spread(one: stats.Summary, two: stats.Summary) -> bool:
    return abs(one.mean - two.mean) < math.hypot(one.std or 0.0, two.std or 0.0)


def _gaps(section: Section) -> list[str]:
    text: list[str] = []
    for first, second in section.pairs:
        rows = []
        paired = True
        for n, gap in _gap_points(first, second):
            paired &= gap.paired
            seeds = (
                str(gap.seeds[0])
                if gap.seeds[0] == gap.seeds[1]
                else f"{gap.seeds[0]} and {gap.seeds[1]}"
            )
            rows.append(
                [
                    f"{n:,}",
                    _signed(gap.mean),
                    _interval(gap.low, gap.high, _signed),
                    seeds,
                    _reading(gap, first, second),
                ]
            )
        if not rows:
            continue
        header = [
            "N",
            f"{first.label} − {second.label}",
            "95 % interval",
            "seeds",
            "reading",
        ]
        text += [f"### Gap: {first.label} − {second.label}", ""]
        ratio = _flops_ratio(first, second)
        if ratio is not None and not _matched(ratio):
            text += [f"FLOPs are **not matched**: × {ratio:.2f}.", ""]
        text += [f"{said}", ""] if (said := _reach(section, second)) else []
        text += [*_table(header, rows), ""]
        text += [
            "Student's intervals over seeds ("
            + ("paired by seed" if paired else "paired where the seeds are the same")
            + "), on one fixed test set.",
            "",
        ]
    if not text and section.networks:
        text = ["No N has both a network with attention and a CNN: no gap.", ""]
    return text


def _reach(section: Section, cnn: Line) -> str:
    """Set the receptive field of a CNN beside what a relation of scenes spans."""
    fields = cnn.metric("receptive_field")
    if section.span is None or not fields:
        return ""
    verdict = (
        "which covers it."
        if min(fields) >= section.span
        else "which is narrower: no unit of it sees both items whole."
    )
    return (
        f"A relation spans {section.span} pixels; the receptive field of {cnn.label} "
        f"is {_span(fields, str)} pixels, {verdict}"
    )


def _flops_ratio(first: Line, second: Line) -> float | None:
    one, two = first.metric("flops"), second.metric("flops")
    return one[0] / two[0] if one and two else None


def _matched(ratio: float) -> bool:
    return max(ratio, 1 / ratio) <= _MATCHED


def _gap_points(first: Line, second: Line) -> list[tuple[int, stats.Gap]]:
    common = sorted(set(first.scored) & set(second.scored))
    return [
        (n, stats.gap(first.scored[n].scores, second.scored[n].scores)) for n in common
    ]


def _reading(gap: stats.Gap, first: Line, second: Line) -> str:
    leader = first.label if gap.mean > 0 else second.label
    if not gap.enough:
        return "too few seeds to say"
    return f"{leader} ahead" if gap.clear else "no difference shown"


def _laws(section: Section) -> list[str]:
    rows, remarks = [], []
    for line in section.networks:
        if not line.scored:
            continue
        try:
            law = stats.fit_power_law(line.scores)
        except stats.FitError as error:
            remarks.append(f"- {line.label}: not fitted, {error}.")
            continue
        notes = _law_notes(law)
        rows.append(
            [
                line.label,
                _number(law.a),
                f"{law.b:.3g}",
                f"{law.c:.3g}",
                f"{law.n_min:,} to {law.n_max:,} ({law.sizes})",
                _number(law.worst),
                "; ".join(notes) or "–",
            ]
        )
    if not rows and not remarks:
        return []
    text = ["### Saturating power law, and where the curves cross", ""]
    text += _uneven_caveat(section)
    if rows:
        header = ["model", "a", "b", "c", "N (sizes)", "largest miss", "remark"]
        text += ["acc(N) = a − b·N^(−c), least squares on the means:", ""]
        text += [*_table(header, rows), ""]
    text += [*remarks, ""] if remarks else []
    for first, second in section.pairs:
        text += [f"- {crossing_statement(first, second)}"]
    return [*text, ""]


def _law_notes(law: stats.PowerLaw) -> list[str]:
    notes = []
    if law.worst > _MISFIT:
        notes.append("the law describes these points badly")
    if law.at_bound:
        notes.append(f"{', '.join(law.at_bound)} held by its bound")
    return notes


def crossing_statement(first: Line, second: Line) -> str:
    """Say in words between which measured N one model overtakes the other."""
    name = f"**{first.label} and {second.label}.**"
    common = sorted(set(first.scored) & set(second.scored))
    if not common:
        return f"{name} They share no N."
    ahead = [
        n
        for n in common
        if first.scored[n].summary.mean > second.scored[n].summary.mean
    ]
    if not ahead:
        return (
            f"{name} {first.label} is behind at every N measured, {common[0]:,} to "
            f"{common[-1]:,}; nothing is said of larger N."
        )
    if len(ahead) == len(common):
        return (
            f"{name} {first.label} is ahead at every N measured, {common[0]:,} to "
            f"{common[-1]:,}."
        )
    found = stats.overtaking(first.scores, second.scores)
    if found is None:
        return (
            f"{name} {first.label} is ahead at N = "
            f"{', '.join(f'{n:,}' for n in ahead)} and behind at the largest, "
            f"{common[-1]:,}."
        )
    return (
        f"{name} The mean of {first.label} gets ahead, and stays ahead, between N = "
        f"{found.after:,} and {found.until:,}. {_certainty(first, second, found)}"
    )


def _certainty(first: Line, second: Line, found: stats.Overtaking) -> str:
    """Say between which N the overtaking clearly lies, given the seeds behind it."""
    scores = (*first.scores.values(), *second.scores.values())
    if min(map(len, scores)) < stats.MIN_SEEDS:
        return "Fewer than 3 seeds at some N: too few to say how sure that is."
    behind = (
        f"clearly behind at {found.behind:,}"
        if found.behind is not None
        else "at no N clearly behind"
    )
    ahead = (
        f"clearly ahead from {found.ahead:,} on"
        if found.ahead is not None
        else "not clearly ahead at the largest N"
    )
    return f"By the differences between seeds (Student, 95 %) it is {behind}, {ahead}."


def _sizes(section: Section) -> list[str]:
    known = [x for x in section.networks if x.metric("params") or x.metric("flops")]
    if not known:
        return []
    fields = [x.metric("receptive_field") for x in known]
    rows = []
    for line, field in zip(known, fields, strict=True):
        row = [
            line.label,
            _span(line.metric("params"), lambda v: f"{v:,.0f}"),
            _span(line.metric("flops"), lambda v: f"{v / 1e6:,.3g}"),
        ]
        if any(fields):
            sees_all = not field and line.model in (*_ATTENTION, "mlp")
            row.append("whole image" if sees_all else _span(field, str))
            if section.span is not None:
                row.append(str(section.span))
        row.append(_span(line.metric("images_per_s"), lambda v: f"{v:,.0f}"))
        times = [
            record["wall_time_s"] / 60
            for point in line.scored.values()
            for record in point.records.values()
        ]
        row.append(_span(times, lambda v: f"{v:.1f}"))
        rows.append(row)
    header = ["model", "parameters", "forward MFLOP / image"]
    if any(fields):
        header.append("receptive field (pixels)")
        header += ["relation spans (pixels)"] * (section.span is not None)
    header += ["training images / s", "minutes / final cell"]
    text = ["### Sizes", "", *_table(header, rows), ""]
    unmatched = _unmatched(section.pairs)
    if unmatched:
        text += [
            f"FLOPs are **not matched** (ratio outside {_MATCHED}) for "
            f"{', '.join(unmatched)}: such a gap is one of compute too.",
            "",
        ]
    for first, second in section.pairs:
        ratios = {
            name: first.metric(name)[0] / second.metric(name)[0]
            for name in ("flops", "params")
            if first.metric(name) and second.metric(name)
        }
        if "flops" not in ratios:
            continue
        verdict = "matched" if _matched(ratios["flops"]) else "**not matched**"
        text.append(
            f"- {first.label} / {second.label}: forward FLOPs × {ratios['flops']:.2f} "
            f"({verdict}; within × {_MATCHED} counts)"
            + (f", parameters × {ratios['params']:.2f}." if "params" in ratios else ".")
        )
    text.append(
        "- FLOPs are those of one image's forward pass as "
        "`attn_jax.tools.cost.count_flops` counts them now, whatever a record holds. "
        "Images per second and minutes are what the machines at hand gave, other work "
        "included."
    )
    return [*text, ""]


def _unmatched(pairs: Sequence[tuple[Line, Line]]) -> list[str]:
    found = []
    for first, second in pairs:
        ratio = _flops_ratio(first, second)
        if ratio is not None and not _matched(ratio):
            found.append(f"{first.label} / {second.label} (× {ratio:.2f})")
    return found


def _hyper_parameters(section: Section) -> list[str]:
    names: list[str] = []
    for line in section.networks:
        for point in line.scored.values():
            for name in _tuned(line, point.n):
                if name not in names:
                    names.append(name)
    for name in ("weight_decay", "learning_rate"):
        points = [p for x in section.networks for p in x.scored.values()]
        if name not in names and any(name in p.config for p in points):
            names.insert(0, name)
    if not names:
        return []
    rows, flags = [], []
    for line in section.networks:
        for n, point in line.scored.items():
            grid = _tuned(line, n)
            cells = [r for r in line.tune if r["config"].get("n") == n]
            chosen = {name: point.config.get(name) for name in grid}
            best, value = _validation(cells, grid, chosen)
            edges = _edges(grid, chosen)
            row = [line.label, f"{n:,}"]
            for name in names:
                mark = " ⚑" if name in edges else ""
                row.append(_value(point.config.get(name)) + mark)
            row += [_number(value) if value is not None else "–"]
            for counts in (map(_validation_images, cells), map(_steps, cells)):
                row.append(_span([k for found in counts for k in found], _thousands))
            row += ["not tuned" if _untuned(line) else str(len(cells))]
            rows.append(row)
            if best is not None and best != chosen:
                flags.append(
                    f"- {line.label} at N = {n:,}: validation prefers "
                    f"{_assignments(best)}, but the final cells used "
                    f"{_assignments(chosen)}."
                )
    text = ["### Hyper-parameters chosen", ""]
    header = ["model", "N", *(f"`{n}`" for n in names)]
    header += ["val. accuracy", "val. images", "tuning updates", "cells tried"]
    text += [*_table(header, rows), ""]
    if any("⚑" in cell for row in rows for cell in row):
        text += [
            "⚑ at the edge of the grid: a better value may lie beyond it, so this "
            "model may be undertuned at that N. (Of two values, each is at the edge.)",
            "",
        ]
    if any(row[-1] == "0" for row in rows):
        text += ["0 cells tried: the values were carried over or given.", ""]
    text += _short_tuning(section)
    return text + ([*flags, ""] if flags else [])


def _short_tuning(section: Section) -> list[str]:
    """Warn where the tuning cells were shorter than the final ones."""
    tuning = [k for x in section.networks for r in x.tune for k in _steps(r)]
    finals = [u for found in section.updates.values() for u in found]
    if not tuning or not finals or min(tuning) >= max(finals):
        return []
    return [
        f"Tuning cells made {_span(tuning, _thousands)} updates, final cells "
        f"{_span(finals, _thousands)}: choices after few updates favour high learning "
        "rates.",
        "",
    ]


def _untuned(line: Line) -> bool:
    """Whether a line has one setting for all N, and no tuning cell."""
    hidden = ("seed", "n", "updates")
    settings = _unique(
        {k: v for k, v in p.config.items() if k not in hidden}
        for p in line.scored.values()
    )
    return not line.tune and len(settings) == 1


def _validation_images(record: Record) -> list[int]:
    """Return how many images the validation split of a tuning cell is cut to."""
    config = record["config"]
    share, most = config.get("validation_fraction"), config.get("validation_maximum")
    if share is None or config.get("n") is None:
        return []
    wanted = max(1, round(share * config["n"]))
    return [wanted if most is None else min(wanted, most)]


def _steps(record: Record) -> list[int]:
    count = record["metrics"].get("updates", record["config"].get("updates"))
    return [] if count is None else [int(count)]


def _thousands(value: float) -> str:
    return f"{value:,.0f}"


def _tuned(line: Line, n: int) -> dict[str, list[Any]]:
    """Return what the tuning cells at N varied: name -> values, sorted."""
    hidden = {"seed", "phase", "n", "updates"}
    cells = [r["config"] for r in line.tune if r["config"].get("n") == n]
    found = {}
    for name in sorted({key for config in cells for key in config} - hidden):
        values: list[Any] = []
        for config in cells:
            if name in config and config[name] not in values:
                values.append(config[name])
        if len(values) > 1:
            found[name] = sorted(values, key=lambda v: (str(type(v)), v))
    return found


def _validation(
    cells: Sequence[Record], grid: Mapping[str, Any], chosen: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, float | None]:
    """Return the settings with the best mean, and the mean of the chosen ones."""
    scores: dict[str, list[float]] = collections.defaultdict(list)
    settings = {}
    for record in cells:
        value = record["metrics"].get("val_accuracy")
        if record["status"] != "done" or value is None:
            continue
        setting = {name: record["config"].get(name) for name in grid}
        scores[repr(setting)].append(value)
        settings[repr(setting)] = setting
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    if not means:
        return None, None
    mine = means.get(repr(dict(chosen)))
    top = max(means.values())
    if mine is not None and mine >= top - 1e-12:  # a tie is no disagreement
        return dict(chosen), mine
    return settings[max(means, key=lambda name: means[name])], mine


def _edges(grid: Mapping[str, list[Any]], chosen: Mapping[str, Any]) -> list[str]:
    found = []
    for name, values in grid.items():
        numbers = all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in values
        )
        if numbers and chosen[name] in (values[0], values[-1]):
            # Nothing lies beyond "off": zero at the lower end is no edge.
            if not (chosen[name] == 0 and values[0] == 0):
                found.append(name)
    return found


def _training_accuracy(section: Section) -> list[str]:
    lines = [x for x in section.networks if x.metric("train_accuracy")]
    if not lines:
        return []
    rows = []
    for n in section.sizes:
        row = [f"{n:,}"]
        for line in lines:
            point = line.scored.get(n)
            records = point.records.values() if point else ()
            values = [r["metrics"].get("train_accuracy") for r in records]
            kept = [v for v in values if v is not None]
            row.append(_mean(stats.summarize(kept)) if kept else "–")
        rows.append(row)
    header = ["N", *(x.label for x in lines)]
    return ["### Training accuracy", "", *_table(header, rows), ""]


def _lost(section: Section) -> list[str]:
    text: list[str] = []
    for line in (*section.networks, *section.baselines):
        for n, point in sorted(line.points.items()):
            for record in point.lost:
                config = record["config"]
                text.append(
                    f"- {line.label}, N = {n:,}, seed {config.get('seed')}: "
                    f"**{_outcome(record)}** ({_settings(config)})."
                )
            if point.other:
                text.append(
                    f"- {line.label}, N = {n:,}: {len(point.other)} finished cells "
                    "with other settings are stored too; the table takes the setting "
                    "with most seeds, then the latest, without a look at the scores."
                )
        tuning = [r for r in line.tune if r["status"] != "done"]
        for record in tuning:
            config = record["config"]
            text.append(
                f"- {line.label}, N = {config.get('n'):,}, tuning: "
                f"**{_outcome(record)}** ({_settings(config)})."
            )
    return ["### Cells that are not in the table", "", *text, ""] if text else []


def _outcome(record: Record) -> str:
    if record["status"] == "done":
        return "finished without a test accuracy"
    metrics = record["metrics"]
    reason = metrics.get("reason") or metrics.get("error")
    if metrics.get("diverged_at") is not None:
        reason = f"loss not finite by update {metrics['diverged_at']:,}"
    return record["status"] + (f": {reason}" if reason else "")


def _outcomes(records: Sequence[Record]) -> str:
    counts = collections.Counter(
        r["status"] if r["status"] != "done" else "no score" for r in records
    )
    return ", ".join(f"{k} ({v})" for k, v in sorted(counts.items()))


def _settings(config: Mapping[str, Any]) -> str:
    shown = {
        key: config[key]
        for key in ("learning_rate", "weight_decay", "updates")
        if config.get(key) is not None
    }
    return _assignments(shown) or "no settings stored"


def _provenance(records: Sequence[Record]) -> list[str]:
    def count(name: str, default: str = "unknown") -> str:
        found = collections.Counter(
            str(r["provenance"].get(name) or default) for r in records
        )
        return ", ".join(f"{value} ({k} cells)" for value, k in sorted(found.items()))

    phases = collections.Counter(
        (str(r["config"].get("phase")), r["status"]) for r in records
    )
    hours = sum(r["wall_time_s"] for r in records) / 3600
    times = sorted(filter(None, map(_created, records)))
    dirty = sum(bool(r["provenance"].get("git_dirty")) for r in records)
    versions = collections.Counter(
        ", ".join(f"{k} {v}" for k, v in sorted(r["provenance"]["versions"].items()))
        for r in records
        if r["provenance"].get("versions")
    )
    said = ", ".join(f"{k} {p} {s}" for (p, s), k in sorted(phases.items()))
    text = [
        "## Where the numbers come from",
        "",
        f"- Cells: {said}; {hours:.2f} hours in sum.",
        f"- Commit: {count('git_commit')}."
        + (f" The code had uncommitted changes in {dirty} cells." if dirty else ""),
        f"- Device: {count('device')}; Python {count('python')}.",
        *(f"- Versions ({k} cells): {v}." for v, k in sorted(versions.items())),
    ]
    if times:
        text.append(f"- Made between {times[0]} and {times[-1]}.")
    return [*text, ""]


# --- figures -----------------------------------------------------------------------


def _styles(sections: Sequence[Section]) -> plots.Styles:
    """One style a name, in all figures: networks first, then their differences."""
    names = [x.name for section in sections for x in section.networks]
    names += [_difference(*pair) for section in sections for pair in section.pairs]
    greys = [x.name for section in sections for x in section.baselines]
    return plots.Styles(names, greys)


def _difference(first: Line, second: Line) -> str:
    return f"{first.name} − {second.name}"


def _draw(
    section: Section, out: pathlib.Path, name: str, styles: plots.Styles
) -> dict[str, pathlib.Path]:
    files = {}
    networks = [x for x in section.networks if x.scored]
    greys = [
        x for x in section.baselines if any(not p.capped for p in x.scored.values())
    ]
    if not networks and not greys:
        return {}
    counts = [p.summary.count for x in networks for p in x.scored.values()]
    note = _seeds_note(counts) if counts else ""
    note += "Bars: ± 1 standard deviation." if counts and max(counts) > 1 else ""
    if counts and min(counts) < stats.MIN_SEEDS:
        note += " Hollow: fewer than 3 seeds."
    shown, off = _visible(networks, greys)
    for line in off:
        means = [p.summary.mean for p in line.scored.values()]
        note += f" Below the axis: {line.label}, {_span(means, _number)}."
    note += _updates_note(section)
    files[f"curve{name}.png"] = plots.curve(
        [_series(x) for x in (*networks, *shown)],
        out / f"curve{name}.png",
        title=f"{section.title}: accuracy as the training set grows",
        chance=section.chance,
        chance_label="without the centre",
        note=note.strip(),
        styles=styles,
    )
    pairs = section.pairs
    if len(pairs) > _MOST_GAPS:  # the nearest CNN of each alone: it comes first
        pairs = list({first.label: (first, cnn) for first, cnn in pairs[::-1]}.values())
        pairs = pairs[::-1]
    gaps = [g for g in (_gap_series(*pair) for pair in pairs) if g]
    if gaps:
        counts = [k for g in gaps for k in g.seeds]
        note = "Bars: Student's 95 % interval over seeds."
        if any(len(g.fit_n) for g in gaps):
            note += " Thin line: difference of the fitted power laws."
        if min(counts) < stats.MIN_SEEDS:
            note += " Hollow: fewer than 3 seeds."
        note += _updates_note(section)
        if len(pairs) < len(section.pairs):
            note += " The CNN nearest in FLOPs alone; more in the report."
        if unmatched := _unmatched(pairs):
            note += f" FLOPs not matched: {', '.join(unmatched)}."
        files[f"gap{name}.png"] = plots.gap(
            gaps,
            out / f"gap{name}.png",
            title=f"{section.title}: attention against the CNN",
            above="attention ahead",
            below="CNN ahead",
            note=note,
            styles=styles,
        )
    return files


def _updates_note(section: Section) -> str:
    if not section.uneven:
        return ""
    counts = [u for found in section.updates.values() for u in found]
    return f" Updates differ between the N: {_span(counts, _thousands)}."


def _seeds_note(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    if low == high:
        return f"{low} seed{'s' * (low != 1)}. "
    return f"{low} to {high} seeds. "


def _visible(
    networks: Sequence[Line], baselines: Sequence[Line]
) -> tuple[list[Line], list[Line]]:
    """Leave a baseline out of the figure that would squeeze all others together."""

    def means(lines: Sequence[Line]) -> list[float]:
        return [p.summary.mean for x in lines for p in x.scored.values()]

    shown: list[Line] = []
    off: list[Line] = []
    for line in baselines:
        rest = means([x for x in (*networks, *baselines) if x is not line])
        apart = bool(rest) and min(rest) - max(means([line])) > max(rest) - min(rest)
        (off if apart and line.model == "majority" else shown).append(line)
    return shown, off


def _series(line: Line) -> plots.Series:
    points = [p for p in line.scored.values() if not p.capped]
    return plots.Series(
        label=line.label,
        n=[p.n for p in points],
        mean=[p.summary.mean for p in points],
        std=[p.summary.std for p in points],
        seeds=[p.summary.count for p in points],
        baseline=line.baseline,
        name=line.name,
    )


def _gap_series(first: Line, second: Line) -> plots.GapSeries | None:
    points = _gap_points(first, second)
    if not points:
        return None
    fit_n: list[float] = []
    fit_gap: list[float] = []
    try:
        laws = stats.fit_power_law(first.scores), stats.fit_power_law(second.scores)
        if max(law.worst for law in laws) <= _MISFIT:
            grid = np.geomspace(points[0][0], points[-1][0], 120)
            fit_n = grid.tolist()
            fit_gap = (laws[0](grid) - laws[1](grid)).tolist()
    except stats.FitError:
        pass
    wrap = "\n" if len(first.label + second.label) > 30 else " "
    return plots.GapSeries(
        label=f"{first.label} −{wrap}{second.label}",
        n=[n for n, _ in points],
        gap=[g.mean for _, g in points],
        low=[g.low for _, g in points],
        high=[g.high for _, g in points],
        seeds=[min(g.seeds) for _, g in points],
        fit_n=fit_n,
        fit_gap=fit_gap,
        name=_difference(first, second),
    )


# --- text --------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a Markdown table whose columns also line up as plain text."""
    cells = [[str(c).replace("|", "\\|") for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (c.ljust(w) for c, w in zip(row, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return [line(cells[0]), rule, *(line(row) for row in cells[1:])]


def _mean(summary: stats.Summary) -> str:
    spread = f" ± {_number(summary.std)}" if summary.std is not None else ""
    return f"{_number(summary.mean)}{spread} ({summary.count})"


def _number(value: float) -> str:
    """Write .812, 1.000, −.031."""
    text = f"{abs(value):.3f}"
    if text.startswith("0."):
        text = text[1:]
    return ("−" if value < 0 and float(f"{value:.3f}") else "") + text


def _signed(value: float) -> str:
    text = _number(value)
    return text if text.startswith("−") else f"+{text}"


def _interval(
    low: float | None, high: float | None, show: Callable[[float], str]
) -> str:
    if low is None or high is None:
        return "– (one seed)"
    return f"[{show(low)}, {show(high)}]"


def _span(values: Sequence[float], show: Callable[[float], str]) -> str:
    if not values:
        return "–"
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={_value(value)}`" for key, value in values.items())


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
