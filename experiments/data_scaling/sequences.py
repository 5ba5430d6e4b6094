"""Data scaling where every vector of a sequence has a label: speech, and text.

A convolution sees a field of so many vectors on either side, self-attention everything;
truncated self-attention has the field of a convolution and the other mechanism. Fields
grow at equal parameters and FLOPs: by dilation, and by how far an attention layer sees.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import threadpoolctl

from experiments.core import identity
from experiments.core.cell import (
    Count,
    Rates,
    Rule,
    Settings,
    Share,
    at_least,
    attention_digest,
)
from experiments.core.plan import Baseline, Plan, Study, beside
from experiments.data import sequence_tasks
from experiments.data.sequences import Part, SequenceData, crops
from experiments.tasks.labelling import LabelCell, LabelTask, scores, subset

TASKS = ("phones", "pos", "pos_fine", "toy_phones", "toy_pos")

# Vectors on either side -> dilations of four convolutions of width 5. None leaves a
# gap: each begins where those before it end.
DILATIONS = {
    2: (1, 0, 0, 0),
    6: (1, 1, 1, 0),
    30: (1, 2, 4, 8),
    64: (1, 4, 9, 18),
    256: (1, 4, 21, 102),
}
KERNEL = 5
NEAR = 4e-3  # the rate around which those are that are tried first

# Most frames that logistic regression is fitted to, its penalties, and iterations.
FRAMES, PENALTIES, ITERATIONS = 20_000, (0.01, 0.1, 1.0), 100


@dataclasses.dataclass(frozen=True)
class Labels(Settings):
    """How sequences are labelled, for tasks of sequences."""

    crop: Annotated[int | None, at_least(1)] = None
    """Frames of a crop of speech, 10 ms each; by default 256."""
    tokens: Count = 2_048
    """Labels a batch, with padding."""
    dim: Count = 64
    """Width of every model."""
    depth: Count = 3
    """Layers of self-attention and of recurrent networks."""
    num_heads: Count = 2
    """Heads of self-attention."""
    encoding: str = "rope"
    """Position encoding of self-attention."""
    learning_rates: Rates = (
        *(5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1),
    )
    """Peaks of the schedule, ascending. Three around 4e-3 are tried for every N, and
    further ones while the best lies at an end."""
    id_dropout: Share = 0.1
    """How often training hides which word it is, where there are words."""
    dropout_rate: Share = 0.0
    """Dropout of every model."""

    def rules(self) -> Iterator[Rule]:
        yield "dim", self.dim % self.num_heads == 0, f"a multiple of {self.num_heads}"
        rates = self.learning_rates
        yield "learning_rates", tuple(sorted(rates)) == rates, "ascending"


def traits_of(name: str, labels: Labels) -> dict[str, Any] | None:
    """What the name of a model says of its cells; None where it names no model.

    "cnn:R" and "attention:R" see R vectors on either side, "attention" everything;
    "gru" and "lstm" too; "window:W" is fully connected.

    >>> traits_of("cnn:6", Labels())["dilations"]
    (1, 1, 1, 0)
    >>> traits_of("attention:6", Labels())["left"], traits_of("cnn:5", Labels())
    (2, None)
    """
    body, _, size = name.partition(":")
    field = int(size) if re.fullmatch(r"\d+", size) else None
    if body in ("gru", "lstm") and not size:
        return dict(model=body, depth=labels.depth)
    if body == "window" and field is not None:
        return dict(model=body, window=field, depth=labels.depth)
    if body == "cnn" and field in DILATIONS:
        return dict(
            model=body,
            kernel=KERNEL,
            dilations=DILATIONS[field],
            depth=len(DILATIONS[field]),
            mlp_dim=3 * labels.dim,
        )
    if body == "attention" and (not size or (field and field % labels.depth == 0)):
        found = dict(
            model="transformer",
            attention="dot_product",
            num_heads=labels.num_heads,
            positions=labels.encoding,
            depth=labels.depth,
            mlp_dim=5 * labels.dim,  # matches parameters and FLOPs of CNNs
        )
        side = (field or 0) // labels.depth
        if side:
            found |= dict(attention="truncated", left=side, right=side)
        return found
    return None


WORDS = (
    f"cnn:R with R among {', '.join(map(str, DILATIONS))}, attention, attention:R with "
    "R a multiple of the depth, gru, lstm or window:W"
)
"""The names of models that a task of sequences takes."""


def studies_of(config: Any, task: str, differs: identity.Differs = ()) -> list[Study]:
    """A study for each (model, N) of the experiment's settings, the largest N first."""
    labels, studies = config.labels, []
    rates = labels.learning_rates
    near = min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / NEAR)))
    first = beside(len(rates), near)
    for n in sorted(config.ns, reverse=True):
        for name in config.models:
            traits = traits_of(name, labels)
            assert traits is not None, name  # settings are checked
            if config.attention is not None and name == "attention":
                traits["attention"] = config.attention
            made = dict(
                task=task,
                n=n,
                seed=0,
                phase="tune",
                updates=min(config.updates, config.tune_updates),
                tokens=labels.tokens,
                dim=labels.dim,
                mlp_dim=2 * labels.dim,
                id_dropout=labels.id_dropout if "pos" in task else 0.0,
                dropout_rate=labels.dropout_rate,
                dtype=config.dtype,
                warmup=config.warmup,
                clip_norm=config.clip_norm,
                attention_sha256=attention_digest(traits.get("attention")),
                differs=differs,
            )
            cells = tuple(
                LabelCell(**(made | traits), learning_rate=rate)
                for rate in labels.learning_rates
            )
            studies.append(
                Study(f"{name} n={n}", cells, config.updates, config.seeds, first=first)
            )
    return studies


# ------------------------------------------------------------- crops and scoring


def recut(data: SequenceData, length: int) -> SequenceData:
    """Speech in crops of another length, under a name of its own.

    Raises:
      ValueError: the task is not speech, or has shorter crops.
    """
    if data.whole_test is None or length > data.max_length:
        raise ValueError(
            "labels.crop must be left out but for speech, and at most "
            f"{data.max_length}, got {length} for {data.name}."
        )
    train, validation, test = (
        crops(part, length) for part in (data.train, data.validation, data.test)
    )
    return dataclasses.replace(
        data,
        name=f"{data.name}_{length}",
        train=train,
        validation=validation,
        test=test,
        lengths=(length,),
    )


def windows(length: int, size: int) -> list[tuple[int, int, int]]:
    """Overlapping windows over a sequence: (start, first, last label taken from it).

    Half of a window overlaps the next; each vector is labelled in the window where it
    is most central.

    >>> windows(10, 4)
    [(0, 0, 3), (2, 3, 5), (4, 5, 7), (6, 7, 10)]
    >>> windows(3, 4)
    [(0, 0, 3)]
    """
    starts = [*range(0, max(1, length - size), max(1, size // 2)), length - size]
    starts = [0] if length <= size else sorted(set(starts))
    middles = [(one + two + size) // 2 for one, two in itertools.pairwise(starts)]
    ends = [*middles, length]
    return list(zip(starts, [0, *middles], ends, strict=True))


class SpeechTask(LabelTask):
    """Labels whole utterances too, through windows as long as the training crops.

    So no model meets lengths that training had not, and every frame has context on
    either side where there is some.
    """

    def score(self, cell: LabelCell, params: Any) -> dict[str, Any]:
        result = super().score(cell, params)
        whole = self.data.whole_test
        if whole is None or cell.phase == "tune":
            return result
        size = self.data.max_length
        cuts = [windows(len(labels), size) for labels in whole.labels]
        pieces = [
            (i, slice(start, start + size))
            for i, found in enumerate(cuts)
            for start, _, _ in found
        ]
        part = Part(
            [whole.inputs[i][at] for i, at in pieces],
            [whole.labels[i][at] for i, at in pieces],
            {},
        )
        rows = iter(self.predict(cell, params, part)[0])
        predicted = [
            np.concatenate([next(rows)[a - start : b - start] for start, a, b in found])
            for found in cuts
        ]
        said = scores(whole, predicted)
        return result | {f"test_windows_{k}": v for k, v in said.items()}


# -------------------------------------------------------------------- baselines


def _tested(
    data: SequenceData, predict: Callable[[Part], list[np.ndarray]]
) -> dict[str, Any]:
    """Accuracy on the test part, of pieces and of whole sequences."""
    found: dict[str, Any] = {}
    for prefix, part in (("test", data.test), ("test_whole", data.whole_test)):
        if part is not None:
            said = scores(part, predict(part))
            found |= {f"{prefix}_{name}": value for name, value in said.items()}
            if prefix == "test_whole":  # what labels each vector by itself
                found |= {f"test_windows_{k}": value for k, value in said.items()}
    return found


def majority(data: SequenceData, n: int, seed: int) -> dict[str, Any]:
    """Every label is the most frequent one of the subset."""
    part = data.train.take(subset(len(data.train), n, seed))
    best = int(np.bincount(np.concatenate(list(part.labels))).argmax())
    return _tested(data, lambda test: [np.full_like(y, best) for y in test.labels])


def logistic_regression(data: SequenceData, n: int, seed: int) -> dict[str, Any]:
    """Labels every vector by itself, linearly; validation data choose the penalty.

    It is fitted to at most `FRAMES` vectors of the subset, drawn evenly; "n_used" says
    how many sequences these would fill.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    part = data.train.take(subset(len(data.train), n, seed))
    x, y = (np.concatenate(list(rows)) for rows in (part.inputs, part.labels))
    share = min(1.0, FRAMES / len(y))
    if share < 1:
        random = np.random.Generator(np.random.PCG64([seed, 3]))
        rows = random.permutation(len(y))[:FRAMES]
        x, y = x[rows], y[rows]
    validation = [np.concatenate(list(data.validation.inputs))[::10]]
    validation.append(np.concatenate(list(data.validation.labels))[::10])
    fits = []
    with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for penalty in PENALTIES:
            model = LogisticRegression(C=penalty, max_iter=ITERATIONS, tol=1e-3)
            fits.append((model.fit(x, y), float(model.score(*validation))))
    best = max(range(len(fits)), key=lambda i: fits[i][1])
    chosen, value = fits[best]
    found = _tested(data, lambda test: [chosen.predict(rows) for rows in test.inputs])
    return found | dict(
        C=PENALTIES[best],
        C_at_edge=best in (0, len(PENALTIES) - 1),
        val_accuracy=value,
        n=n,
        n_used=round(n * share),
    )


def most_frequent_tag(data: SequenceData, n: int, seed: int) -> dict[str, Any]:
    """Each word has its most frequent tag in the subset; unknown ones go by endings."""
    rows = subset(len(data.train), n, seed)
    return sequence_tasks.most_frequent(data, by_suffix=True, rows=rows)


def floors_of(task: str) -> dict[str, Callable[..., dict[str, Any]]]:
    """The trivial baselines of a task of sequences, by name."""
    if "phones" in task:
        return dict(majority=majority, logistic_regression=logistic_regression)
    return dict(majority=majority, most_frequent_tag_by_suffix=most_frequent_tag)


def plans(config: Any) -> list[Plan]:
    """Loads the sequences and plans the cells of the experiment's settings.

    Raises:
      DataError, ValueError: the data cannot be had; a bad value.
    """
    data = sequence_tasks.load_task(config.task)
    if config.labels.crop is not None:
        data = recut(data, config.labels.crop)
    have = len(data.train)
    for n in config.ns:
        if n > have:
            raise ValueError(
                f"ns: N={n} is larger than the training part of {data.name}, which has "
                f"{have} sequences: use --ns with numbers up to {have}."
            )
    differs = identity.of_sequences(data)
    floors = []
    for n in sorted(config.ns, reverse=True):
        for name, measure in floors_of(data.name).items():
            for seed in range(config.seeds):
                made = dict(
                    task=data.name, model=name, n=n, seed=seed, phase="baseline"
                )
                floors.append(
                    Baseline(
                        identity.with_differs(made, differs),
                        functools.partial(measure, data, n, seed),
                        f"{data.name} {name} n={n} seed={seed}",
                    )
                )
    studies = studies_of(config, data.name, differs)
    return [Plan(SpeechTask(data), data.describe(), studies, floors)]
