"""Records of the data-scaling experiment sorted: a section a task, a line a model."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from attn_jax import models
from attn_jax.tools.cost import model_cost
from experiments.core import stats
from experiments.core.cell import attention_digest
from experiments.core.report import NONE, Row, grouped, settings_of, span
from experiments.core.store import Record
from experiments.data import scenes
from experiments.data.sequence_tasks import CROP
from experiments.data_scaling.tasks import SCENES_NAME, shape_of
from experiments.tasks.labelling import field_of

MODELS = {
    "vit": "ViT",
    "resnet": "ResNet",
    "hybrid": "Hybrid",
    "mlp": "MLP",
    "transformer": "self-attention",
    "cnn": "CNN",
    "window": "window",
    "gru": "GRU",
    "lstm": "LSTM",
    "most_frequent_tag_by_suffix": "most frequent tag",
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
    "phones": "Speech, phones of frames",
    "pos": "Text, tags of words",
    "pos_fine": "Text, Brown's own tags",
    "toy_phones": "Toy speech, tones for tests",
    "toy_pos": "Toy text, for tests",
}
_SENTENCES = ("pos", "pos_fine", "toy_pos")
_SPEECH = re.compile(r"(?:toy_)?phones(?:_(\d+))?")
ACCURACY, WHOLE = "test_accuracy", "test_windows_accuracy"

#: Records that differ in one of these are different experiments: a section each.
_SECTION_KEYS = (
    "task dataset scene_task grid item cells item_classes protocol preset".split()
)
ATTENTION = ("vit", "hybrid", "transformer")
_PLAIN_ATTENTION = (None, "", "none", "dot_product", "softmax")
EQUAL = 1.1  # updates within this ratio count as equal: whole passes are rounded


def examples_of(task: str) -> str:
    """What N counts.

    >>> examples_of("phones_64"), examples_of("pos"), examples_of("fashion_mnist")
    ('crops of 0.64 s', 'sentences', 'images')
    """
    if found := _SPEECH.fullmatch(task):
        return f"crops of {int(found[1] or CROP) / 100:g} s"
    return "sentences" if task in _SENTENCES else "images"


def is_sequences(task: str) -> bool:
    """Whether every vector of an example has a label."""
    return examples_of(task) != "images"


@dataclasses.dataclass(eq=False)
class Line:
    """One model (with its size and attention), or one baseline."""

    model: str
    size: str | None
    attention: str | None
    points: dict[int, Row]  # N -> seeds; also where all were lost
    other: dict[int, list[Row]]  # N -> what was finished under other settings
    tune: list[Record]
    version: str = ""  # of the variant's file, where there are several
    field: str = ""  # receptive field, where it tells two CNNs apart
    metric_name: str = ACCURACY  # what it is judged by

    @property
    def name(self) -> str:
        """What its style belongs to: the label, but for what a task adds to it."""
        name = MODELS.get(self.model, self.model)
        if self.size:
            name += ("-" if self.reach is None else " ") + self.size
        if self.attention not in _PLAIN_ATTENTION:
            version = f" {self.version}" * bool(self.version)
            name += f" [{os.path.basename(str(self.attention))}{version}]"
        return name

    @property
    def reach(self) -> int | None:
        """How many vectors of a sequence it sees on either side, where that is told."""
        told = str(self.size or "")
        return int(told[1:]) if told.startswith("±") else None

    @property
    def label(self) -> str:
        """Name in tables and legends."""
        if not self.field:
            return self.name
        norms = " and group norms" * self.passes_on
        return f"{self.name} (field {self.field} px{norms})"

    @property
    def passes_on(self) -> bool:
        """Whether group norms tell a CNN of what lies outside of its field."""
        made = models.SIZES.get(self.model, {}).get(self.size or "", {})
        return self.model == "resnet" and made.get("norm", "group") == "group"

    @functools.cached_property
    def means(self) -> dict[int, stats.Summary]:
        """N -> the test accuracy of those with a finished seed, ascending."""
        found = {n: row.of(self.metric_name) for n, row in self.points.items()}
        return {n: summary for n, summary in found.items() if summary is not None}

    @property
    def scores(self) -> dict[int, dict[int, float]]:
        """N -> seed -> test accuracy."""
        return {n: self.points[n].scores(self.metric_name) for n in self.means}

    @property
    def finals(self) -> list[Record]:
        """All finished records."""
        return [r for n in self.means for r in self.points[n].records]

    def metric(self, name: str, *, tune: bool = False) -> list[Any]:
        """All stored values of a metric, of tuning cells too if asked."""
        records = self.finals + self.tune * tune
        values = (r["metrics"].get(name) for r in records)
        return [value for value in values if value is not None]

    def capped(self, n: int) -> int | None:
        """How many images a capped baseline was fitted to, else None."""
        found = (r["metrics"].get("n_used") for r in self.points[n].records)
        used = min((u for u in found if u is not None), default=n)
        return int(used) if used < n else None


@dataclasses.dataclass(eq=False)
class Section:
    """One task under one protocol."""

    keys: dict[str, Any]  # what tells it from others
    networks: list[Line]  # with colours
    baselines: list[Line]  # in grey
    apart: str = ""  # from another of the same task, in words
    suffix: str = ""  # of the names of its figures

    @property
    def task(self) -> str:
        """Name of the task as in the configs."""
        return str(self.keys.get("task", "task"))

    @property
    def lines(self) -> list[Line]:
        """Networks, then baselines."""
        return [*self.networks, *self.baselines]

    @property
    def title(self) -> str:
        """Name of the task for people, and what sets it apart where needed."""
        name = TASKS.get(re.sub(r"_\d+$", "", self.task), self.task)
        if self.scene:
            name = "{}: {rule}, {grid} × {grid} cells of {item} pixels".format(
                TASKS["scenes"], **self.scene
            )
            pool = re.search(r"-pool(\d+)", self.task)
            name += f", of {int(pool[1]):,} scenes" if pool else ""
        return f"{name} ({self.apart})" if self.apart else name

    @property
    def sizes(self) -> list[int]:
        """All N with a result."""
        return sorted({n for line in self.lines for n in line.means})

    @property
    def configs(self) -> list[dict[str, Any]]:
        """A config for each network at each N."""
        return [line.points[n].config for line in self.networks for n in line.means]

    @property
    def examples(self) -> str:
        """What N counts."""
        return examples_of(self.task)

    @property
    def item(self) -> str:
        """What FLOPs are told for."""
        return "label" if is_sequences(self.task) else "image"

    @functools.cached_property
    def pairs(self) -> list[tuple[Line, Line]]:
        """Each network with attention beside every CNN, the nearest in FLOPs first.

        Of sequences: self-attention beside what sees a field, the smallest first, and
        beside recurrent networks; truncated, beside the CNN of the same field.
        """
        known = [x for x in self.networks if x.means]
        cnns = [x for x in known if x.model == "resnet"]
        if is_sequences(self.task):
            whole = [x for x in known if x.model in ATTENTION and x.reach is None]
            rivals = [x for x in known if x.model not in ATTENTION]
            rivals.sort(key=lambda x: (x.reach is None, x.reach or 0))
            same = [
                (line, cnn)
                for line in known
                for cnn in rivals
                if (line.model, cnn.model) == ("transformer", "cnn")
                and line.reach == cnn.reach
            ]
            return [(line, rival) for line in whole for rival in rivals] + same

        def order(line: Line, cnn: Line) -> tuple[float, bool, str]:
            apart = quotient(line, cnn) or 1.0
            return abs(math.log(apart)), cnn.size != line.size, cnn.label

        return [
            (line, cnn)
            for line in self.networks
            if line.model in ATTENTION and line.means
            for cnn in sorted(cnns, key=lambda cnn: order(line, cnn))
        ]

    @functools.cached_property
    def updates(self) -> dict[int, list[int]]:
        """N -> numbers of optimiser updates that its cells got, ascending."""
        found = {
            n: {u for x in self.networks if n in x.means for u in _steps(x, n)}
            for n in self.sizes
        }
        return {n: sorted(counts) for n, counts in found.items() if counts}

    @property
    def uneven(self) -> bool:
        """Whether cells got different numbers of updates, over N or at one N."""
        counts = [u for found in self.updates.values() for u in found]
        return bool(counts) and max(counts) > EQUAL * min(counts)

    @functools.cached_property
    def scene(self) -> dict[str, Any]:
        """What the task's name says of composed scenes; nothing for other tasks."""
        found = SCENES_NAME.match(self.task)
        if not found or found["rule"] not in scenes.TASKS:
            return {}
        return {k: v if k == "rule" else int(v) for k, v in found.groupdict().items()}

    @property
    def chance(self) -> float | None:
        """Highest accuracy on scenes without relating the centre to the rim."""
        if not (s := self.scene):
            return None
        return scenes.chance_level(
            s["rule"], cells=s["cells"], item_classes=s["classes"]
        )

    @property
    def span(self) -> int | None:
        """Pixels that a relation spans on scenes."""
        names = ("grid", "item", "cells")
        found = {name: self.scene[name] for name in names if self.scene}
        return scenes.span(**found) if found else None


def make_sections(records: Sequence[Record]) -> list[Section]:
    """Sort records into sections and lines; the main task comes first."""
    named = (_named(_recounted(record)) for record in records)
    phases = grouped(named, lambda r: r["config"].get("phase"))
    keys: list[dict[str, Any]] = []
    for record in phases.get("final", []) or phases.get("baseline", []):
        if (key := _keys(record)) not in keys:
            keys.append(key)
    keys.sort(key=_order)
    sections, names = [], []
    for i, key in enumerate(keys):

        def agrees(record: Record, key: dict[str, Any] = key) -> bool:
            """Whether it belongs here, as far as its config says."""
            return all(key.get(k, value) == value for k, value in _keys(record).items())

        mine = [r for r in phases.get("final", []) if _keys(r) == key]
        tune, grey = (
            list(filter(agrees, phases.get(phase, [])))
            for phase in ("tune", "baseline")
        )
        twins = [k for k in keys if k != key and k.get("task") == key.get("task")]
        differ = [k for k in key if any(twin.get(k) != key[k] for twin in twins)]
        found = Section(key, _lines(mine, tune), _lines(grey, []))
        done = [r["metrics"] for r in (*mine, *grey) if r["status"] == "done"]
        if done and all(WHOLE in metrics for metrics in done):
            for line in found.lines:
                line.metric_name = WHOLE
        found.apart = ", ".join(f"{k} {key[k]}" for k in differ if k != "task")
        # The first section's figures have no suffix, the others' their task.
        found.suffix = f"_{_slug(found.task)}" * bool(i)
        if found.suffix in names:
            found.suffix += "_" + _slug(str(key.get("protocol") or key.get("preset")))
        while found.suffix in names:
            found.suffix += f"_{i + 1}"
        names.append(found.suffix)
        sections.append(found)
    return sections


def _order(key: Mapping[str, Any]) -> tuple[Any, ...]:
    """Speech first, then Fashion-MNIST."""
    task = str(key.get("task") or "")
    main = bool(_SPEECH.fullmatch(task)), task == "fashion_mnist"
    return *(not x for x in main), task, str(sorted(key.items()))


def _named(record: Record) -> Record:
    """Of a model of sequences, what it sees on either side stands for its size."""
    config = record["config"]
    speaks = is_sequences(str(config.get("task")))
    if not speaks or config.get("phase") == "baseline":
        return record
    reach, attention = field_of(config), config.get("attention")
    told: dict[str, Any] = {"size": None if reach is None else f"±{reach}"}
    if attention == "truncated":
        told["attention"] = None
    return record | {"config": config | told}


def _keys(record: Record) -> dict[str, Any]:
    config = record["config"]
    return {key: config[key] for key in _SECTION_KEYS if key in config}


def _slug(text: str) -> str:
    return re.sub(r"[^\w-]", "_", os.path.basename(text))


def _lines(records: Sequence[Record], tune: Sequence[Record]) -> list[Line]:
    names = ("model", "size", "attention", "attention_sha256")
    identity = lambda r: tuple(r["config"].get(name) for name in names)  # noqa: E731
    members, tuned = grouped(records, identity), grouped(tune, identity)
    lines = []
    for key, found in members.items():
        points, other = {}, {}
        for n, some in sorted(grouped(found, lambda r: int(r["config"]["n"])).items()):
            points[n], other[n] = _point(some)
        model, size, attention, digest = key
        line = Line(model, size, attention, points, other, tuned.get(key, []))
        if any(two[:3] == key[:3] and two != key for two in members):
            line.version = str(digest)[:6]
        lines.append(line)
    cnns = [line for line in lines if line.model == "resnet" and line.means]
    for line in cnns if len(cnns) > 1 else ():
        line.field = span(line.metric("receptive_field"), str).replace(NONE, "")
    order = list(MODELS)
    return sorted(
        lines,
        key=lambda line: (
            (*order, line.model).index(line.model),
            line.attention not in _PLAIN_ATTENTION,
            math.inf if line.reach is None else line.reach,
            line.label,
        ),
    )


def _point(records: Sequence[Record]) -> tuple[Row, list[Row]]:
    """The seeds of one setting, and those of others.

    It is the setting with most seeds, then the latest; the choice never looks at a
    score.
    """
    scored = [
        r
        for r in records
        if r["status"] == "done" and isinstance(r["metrics"].get(ACCURACY), int | float)
    ]
    lost = tuple(r for r in records if r not in scored)
    kinds = grouped(scored, settings_of)
    if not kinds:
        return Row(records[0]["config"], (), lost), []
    chosen = max(kinds, key=lambda k: (len(kinds[k]), max(map(created, kinds[k])), k))
    rows = {}
    for kind, found in kinds.items():
        seeds = sorted(found, key=lambda r: r["config"].get("seed", 0))
        rows[kind] = Row(seeds[0]["config"], tuple(seeds), lost * (kind == chosen))
    row = rows.pop(chosen)
    return row, list(rows.values())


def created(record: Record) -> str:
    """When, as text that sorts."""
    return str(record["provenance"].get("created_utc", ""))


def updates_of(record: Record) -> list[int]:
    """How many updates were made, where that is known."""
    made = record["metrics"].get("updates", record["config"].get("updates"))
    return [] if made is None else [int(made)]


def _steps(line: Line, n: int) -> list[int]:
    return [u for record in line.points[n].records for u in updates_of(record)]


@functools.lru_cache(maxsize=64)
def _flops(
    task: str, model: str, size: str, attention: str | None, digest: str, patch: Any
) -> int | None:
    shape = shape_of(task)
    try:
        if shape is None or attention_digest(attention) != digest:
            return None
        module = nnx.eval_shape(
            lambda: models.build(
                model,
                size,
                image_shape=shape[0],
                num_classes=shape[1],
                attention=attention,
                overrides={} if patch is None else {"patch": patch},
                rngs=nnx.Rngs(0),
            )
        )
        return model_cost(module, shape[0]).flops
    except (OSError, ValueError):  # a model or variant that is no more
        return None


def forward_flops(config: Mapping[str, Any]) -> int | None:
    """FLOPs of one image in the model of a config, without its data.

    None where they cannot be counted: the images are of a file of one's own, or the
    file of an attention variant is not what it was.
    """
    names = ("model", "size", "attention", "attention_sha256", "patch")
    return _flops(str(config.get("task")), *(config.get(name) for name in names))


def _recounted(record: Record) -> Record:
    """The record with FLOPs as they are counted now, by one counter for all."""
    known = "flops" in record["metrics"]
    flops = forward_flops(record["config"]) if known else None
    if flops is None:
        return record
    return record | {"metrics": record["metrics"] | {"flops": flops}}


def quotient(first: Line, second: Line, name: str = "flops") -> float | None:
    """A metric of the first line over that of the second, where both have it."""
    one, two = first.metric(name), second.metric(name)
    return one[0] / two[0] if one and two else None
