"""Sequence labelling: a set of vectors in, one label a vector out.

`python -m experiments.sequence_labelling --preset pos` tags the Brown corpus,
`--preset phones` labels the frames of recorded speech: by a fully connected network
for each vector, over a window, by a convolution, a recurrent network, and
self-attention.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from experiments.core import identity
from experiments.core.cell import (
    Count,
    Limit,
    Rates,
    Rule,
    Settings,
    Share,
    at_least,
    attention_digest,
    one_of,
)
from experiments.core.plan import Plan, Study, baselines_of
from experiments.core.run import Experiment
from experiments.data import sequence_tasks
from experiments.data.sequence_tasks import TASKS
from experiments.sequence_labelling.report import REPORT
from experiments.tasks.labelling import LabelCell, LabelTask

BODIES = ("window", "cnn", "gru", "lstm", "transformer")

Naturals = Annotated[tuple[int, ...], at_least(0)]
Positives = Annotated[tuple[int, ...], at_least(1)]


def traits_of(name: str) -> dict[str, Any]:
    """What the name of a model says of its cells.

    Raises:
      ValueError: there is no such model.

    >>> traits_of("window:5"), traits_of("gru")
    ({'model': 'window', 'window': 5}, {'model': 'gru'})
    >>> traits_of("transformer:32+4")["left"]
    32
    """
    body, _, size = name.partition(":")
    if body in BODIES and not size and body != "window":
        return {"model": body}
    if body == "window" and re.fullmatch(r"\d+", size):
        return {"model": body, "window": int(size)}
    if body == "transformer" and (sides := re.fullmatch(r"(\d+)\+(\d+)", size)):
        left, right = map(int, sides.groups())
        truncated = {"attention": "truncated", "left": left, "right": right}
        return {"model": body} | truncated
    raise ValueError(
        "models must be window:W, cnn, gru, lstm, transformer or transformer:L+R, got "
        f"{name!r}."
    )


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Accuracy of labels by models that see one vector, a window, or everything."""

    task: Annotated[str, one_of(TASKS)] = "pos"
    """pos, pos_fine (Brown), phones (recorded Russian), or toy_pos, toy_phones."""
    models: Annotated[
        tuple[str, ...],
        Limit(lambda x: 1 <= len(x) == len(set(x)), "at least one, names once each"),
    ] = ("window:0", "window:5", "cnn", "gru", "lstm", "transformer")
    """Compared on the whole training part: "window:W" (fully connected over W vectors
    on either side; 0 = each by itself), cnn, gru, lstm, transformer, and
    "transformer:L+R" (self-attention truncated to L vectors before and R after)."""
    windows: Naturals = ()
    """Windows whose accuracy, parameters and overfitting are drawn as a curve."""
    whole_windows: Naturals = ()
    """Windows trained as the models are, on the whole training part, for such a curve
    as well."""
    heads: Positives = ()
    """Numbers of heads compared."""
    depths: Positives = ()
    """Numbers of layers of the transformer compared."""
    scores: tuple[str, ...] = ()
    """Attention variants compared, such as dot_product and additive: all with the
    positions of SCORE-ENCODING, each at its own rate."""
    score_encoding: str = "t5"
    """Position encoding of those, which all of them must be able to take."""
    score_rates: Rates = (1e-3, 3e-3, 1e-2, 3e-2)
    """Peaks of the schedule, chosen for each score on the validation part with
    SWEEP-UPDATES."""
    positions: tuple[str, ...] = ()
    """Position encodings compared, such as sinusoidal and none."""
    position_updates: Positives = ()
    """Optimiser steps that they are compared after besides SWEEP-UPDATES."""
    contexts: Annotated[
        tuple[tuple[int, int], ...],
        Limit(lambda x: min(sum(x, ()), default=0) >= 0, "pairs of numbers >= 0"),
    ] = ()
    """(left, right) windows of truncated self-attention, in vectors a layer."""
    ns: Positives = ()
    """Numbers of training sequences that every model is trained on besides, and all of
    them, with SWEEP-UPDATES each."""
    seeds: Count = 3
    """Seeds of each: initial parameters, order, and which sequences a smaller N has."""
    updates: Count = 2_000
    """Optimiser steps on the whole training part."""
    sweep_n: Annotated[int | None, at_least(1)] = None
    """Training sequences of what is compared or drawn besides the models."""
    sweep_updates: Count = 500
    """Optimiser steps of those, and of smaller N."""
    tune_updates: Count = 250
    """Optimiser steps of a tuning cell."""
    learning_rates: Rates = (1e-3, 3e-3)
    """Peaks of the schedule, chosen for each model on the validation part."""
    tokens: Count = 2_048
    """Labels a batch, with padding."""
    dim: Count = 96
    """Width of every model."""
    depth: Count = 2
    """Layers of every model."""
    num_heads: Count = 4
    """Heads of the transformer."""
    attention: str = "dot_product"
    """Attention variant of the transformer: a name or path/file.py:function."""
    encoding: str = "rope"
    """Position encoding of the transformer."""
    kernel: Count = 5
    """Width of the convolutions."""
    id_dropout: Share = 0.1
    """How often training hides which word it is, and leaves endings and shape."""
    dropout_rate: Share = 0.0
    """Dropout of every model."""

    def rules(self) -> Iterator[Rule]:
        for model in self.models:
            traits_of(model)
        for heads in (*self.heads, self.num_heads):
            yield "dim", self.dim % heads == 0, f"a multiple of {heads} heads"


_SMOKE = Config(
    task="toy_pos",
    models=("window:1", "cnn", "gru", "transformer"),
    learning_rates=(3e-3,),
    seeds=1,
    updates=4,
    sweep_updates=2,
    tokens=256,
    dim=16,
    depth=1,
    num_heads=2,
)

_POS = Config(
    models=("transformer", "gru", "window:2", "window:0"),
    windows=(0, 1, 2, 4, 16, 63),
    whole_windows=(1, 4, 16),
    heads=(1, 2, 4, 8),
    scores=("dot_product", "additive"),
    positions=("rope", "sinusoidal", "none"),
    position_updates=(600,),
    ns=(500, 5_000),
    updates=900,
    sweep_n=5_000,
    sweep_updates=200,
    tune_updates=150,
)

PRESETS: Mapping[str, Config] = {
    "smoke": _SMOKE,
    "smoke_phones": dataclasses.replace(
        _SMOKE,
        task="toy_phones",
        models=("window:1", "transformer", "transformer:4+2"),
        contexts=((4, 2),),
        tokens=1024,
    ),
    "quick": Config(
        models=("window:0", "window:2", "gru", "transformer"),
        updates=150,
        learning_rates=(3e-3,),
        dim=64,
    ),
    "pos": _POS,
    "pos_fine": dataclasses.replace(
        _POS,
        task="pos_fine",
        models=("transformer", "gru", "window:2"),
        windows=(),
        whole_windows=(),
        heads=(),
        scores=(),
        positions=(),
        position_updates=(),
        ns=(),
        updates=600,
        learning_rates=(3e-3,),
    ),
    # The transformers of `pos` alone, for `sequence_labelling.heads`.
    "heads": dataclasses.replace(
        _POS,
        models=("transformer",),
        windows=(),
        whole_windows=(),
        heads=(),
        scores=(),
        positions=(),
        position_updates=(),
        ns=(),
        learning_rates=(3e-3,),
    ),
    "phones": Config(
        task="phones",
        models=(
            "transformer",
            "window:5",
            "gru",
            "cnn",
            "window:0",
            "transformer:32+32",
        ),
        contexts=((8, 0), (8, 4), (32, 4), (64, 64)),
        positions=("rope", "none"),
        updates=800,
        sweep_updates=300,
        tune_updates=100,
        depth=3,
        id_dropout=0.0,
    ),
}


def base_cell(config: Config, task: str, model: str, **traits: Any) -> LabelCell:
    """The cell of a model with the settings; ``traits`` go before them."""
    named = traits_of(model)
    common: dict[str, Any] = dict(
        task=task,
        seed=0,
        phase="tune",
        updates=config.tune_updates,
        tokens=config.tokens,
        dim=config.dim,
        depth=config.depth,
        mlp_dim=2 * config.dim,
        id_dropout=config.id_dropout,
        dropout_rate=config.dropout_rate,
    )
    if named["model"] == "cnn":
        common["kernel"] = config.kernel
    if named["model"] == "transformer":
        common |= dict(
            attention=config.attention,
            num_heads=config.num_heads,
            positions=config.encoding,
        )
    merged = common | named | traits
    return LabelCell(
        attention_sha256=attention_digest(merged.get("attention")), **merged
    )


def plan_studies(
    config: Config, task: str, differs: identity.Differs = ()
) -> dict[str, Study]:
    """All studies by name, in the order of their importance.

    The models first; what is varied about one of them, and a smaller N, takes over the
    learning rate that was chosen for it on the whole training part.
    """

    def grid(model: str, **traits: Any) -> tuple[LabelCell, ...]:
        return tuple(
            base_cell(
                config, task, model, differs=differs, learning_rate=rate, **traits
            )
            for rate in config.learning_rates
        )

    studies = {
        model: Study(model, grid(model), config.updates, config.seeds)
        for model in config.models
    }

    def vary(name: str, model: str, like: str, **traits: Any) -> None:
        if like not in studies:
            raise ValueError(
                f"models: {name!r} is a variation of {like!r}, which is not among "
                f"models={config.models!r}."
            )
        cells = grid(model, **({"n": config.sweep_n} | traits))
        studies[name] = Study(
            name, cells, config.sweep_updates, config.seeds, studies[like]
        )

    windows = [name for name in config.models if name.startswith("window:")]
    # Windows have the rate of the widest of those that were tuned.
    widest = max(windows, key=lambda name: traits_of(name)["window"], default=None)
    for window in config.windows:
        vary(f"sweep window={window}", f"window:{window}", widest or "window:W")
    transformer = "transformer"
    for left, right in config.contexts:
        sides = traits_of(f"transformer:{left}+{right}")
        vary(f"context {left}+{right}", transformer, transformer, **_less_model(sides))
    if config.contexts:
        vary("context full", transformer, transformer)
    for score in config.scores:
        cells = tuple(
            base_cell(
                config,
                task,
                transformer,
                differs=differs,
                n=config.sweep_n,
                attention=score,
                positions=config.score_encoding,
                updates=config.sweep_updates,
                learning_rate=rate,
            )
            for rate in config.score_rates
        )
        name = f"score={score}"
        studies[name] = Study(name, cells, config.sweep_updates, config.seeds)
    for name, field, values in (
        ("heads", "num_heads", config.heads),
        ("positions", "positions", config.positions),
        ("depth", "depth", config.depths),
    ):
        for value in values:
            vary(f"{name}={value}", transformer, transformer, **{field: value})
    for updates in config.position_updates:
        for value in config.positions:
            name = f"positions={value} updates={updates}"
            vary(name, transformer, transformer, positions=value)
            studies[name] = dataclasses.replace(studies[name], updates=updates)
    for n in (*config.ns, None) if config.ns else ():
        for model in config.models:
            vary(f"n={n or 'all'} {model}", model, model, n=n)
    for window in config.whole_windows:
        name = f"whole window={window}"
        vary(name, f"window:{window}", widest or "window:W", n=None)
        studies[name] = dataclasses.replace(studies[name], updates=config.updates)
    return studies


def _less_model(traits: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in traits.items() if name != "model"}


def is_looked_at(cell: LabelCell) -> bool:
    """Whether a cell's parameters are kept: for attention maps, and for heads.py."""
    return cell.model == "transformer" and (cell.seed == 0 or cell.n is None)


def plans(config: Config) -> list[Plan]:
    """Loads the task and plans its cells.

    Raises:
      DataError, ValueError: the data cannot be had; a bad value.
    """
    data = sequence_tasks.load_task(config.task)
    for n in (*config.ns, config.sweep_n):
        if n is not None and n > len(data.train):
            raise ValueError(
                f"ns, sweep_n: {n} is larger than the training part of {data.name}, "
                f"which has {len(data.train)} sequences."
            )
    differs = identity.of_sequences(data)
    floors: dict[str, Callable[[], dict[str, Any]]] = {
        "majority": functools.partial(sequence_tasks.majority, data)
    }
    if "pos" in data.name:
        floors = sequence_tasks.tagging_baselines(data)
    return [
        Plan(
            LabelTask(data, is_looked_at),
            data.describe(),
            list(plan_studies(config, data.name, differs).values()),
            baselines_of(data.name, floors, differs),
        )
    ]


EXPERIMENT = Experiment(
    name="sequence_labelling",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "smoke": "seconds, synthetic",
        "smoke_phones": "seconds, synthetic",
        "quick": "minutes",
        "pos": "an hour, two cores",
        "pos_fine": "half an hour; Brown's own tags",
        "heads": "five minutes, one core; the transformers of pos alone",
        "phones": "an hour and a half, two cores",
    },
    plans=plans,
    report=REPORT,
)
