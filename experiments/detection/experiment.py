"""What is where: a Transformer that gives a set of boxes, beside a convolutional one.

`python -m experiments.detection --preset quick` trains DETR and a map of centres of
about as many FLOPs on scenes of Fashion-MNIST items, composed here;
`--preset cpu` for long enough, for several numbers of scenes N, and without what the
paper's tables take away. `--attention NAME` or `--attention my.py:fn` adds a row in
which that variant is the encoder's; `--task coco:DIR` takes pictures in COCO's format.

References: Carion et al., 2020, arXiv:2005.12872; Zhou et al., 2019, arXiv:1904.07850.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from experiments.core import identity
from experiments.core.cell import (
    Amount,
    Count,
    Counts,
    Limit,
    Natural,
    Rates,
    Rule,
    Settings,
    Share,
    at_least,
    attention_digest,
    some_of,
)
from experiments.core.plan import Plan, Study, baselines_of, beside
from experiments.core.run import Experiment
from experiments.data.detection import SIZES, Detection, load_detection
from experiments.detection.cells import (
    CentersCell,
    DetectCell,
    DetectTask,
    DetrCell,
    mean_boxes,
)
from experiments.detection.report import REPORT

MODELS = ("detr", "centers")
WITHOUT: Mapping[str, dict[str, Any]] = {
    "encoder": dict(depth=0),
    "positions": dict(positions=False),
    "auxiliary": dict(auxiliary=False),
}
"""What a row may be without, as in the paper's section 4.2."""

_NAMES = Limit(lambda x: len(set(x)) == len(x), "names of variants, each once")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What is run."""

    task: str = "scenes"
    """scenes, of Fashion-MNIST items; toy_scenes, of scikit-learn's digits; or
    coco:DIR, pictures in COCO's format."""
    models: Annotated[tuple[str, ...], some_of(MODELS)] = MODELS
    """detr, and centers: convolutions alone."""
    attention: str | None = None
    """One more row: this variant in the encoder, by name or path/file.py:function."""
    attentions: Annotated[tuple[str, ...], _NAMES] = ()
    """More such rows, at the largest N."""
    same_cross: bool = False
    """Whether in those rows queries read the places by the same variant."""
    without: Annotated[tuple[str, ...], some_of(WITHOUT, least=0)] = ()
    """Rows of DETR without its encoder, positions or auxiliary losses."""
    ns: Counts = (4_000,)
    """Numbers of training scenes."""
    held: Count = 1_000
    """Validation scenes, and as many test scenes."""
    side: Count = 96
    """Pixels a side."""
    most: Count = 6
    """The most items of a scene."""
    sizes: Annotated[tuple[int, ...], at_least(4)] = SIZES
    """Pixels a side of items."""
    overlap: bool = False
    """Whether items may overlap."""
    widths: Annotated[tuple[int, ...], at_least(1)] = (16, 32, 64)
    """Channels of the backbone's stages."""
    dim: Count = 64
    """Width of the Transformer."""
    depth: Natural = 3
    """Blocks of its encoder."""
    decoder_depth: Count = 3
    """Blocks of its decoder."""
    mlp_dim: Count = 128
    """Hidden width of its feed-forward networks."""
    num_heads: Count = 4
    """Its heads."""
    num_queries: Count = 20
    """Its queries; as many centres are told."""
    dropout_rate: Share = 0.0
    """Its dropout."""
    blocks: Natural = 3
    """Residual blocks that stand for the Transformer in "centers"."""
    seeds: Count = 3
    """Seeds of each row: initial parameters, order of the scenes."""
    updates: Count = 10_000
    """Optimiser steps of a final cell."""
    tune_updates: Count = 1_500
    """Optimiser steps of a tuning cell."""
    learning_rates: Rates = (5e-4, 1e-3, 2e-3, 4e-3)
    """Peaks of the schedule, ascending; for each row the validation part chooses, at
    the largest N. Those in the middle are tried first, and further ones while the best
    lies at an end."""
    weight_decay: Amount = 0.05
    """Decoupled weight decay of matrices."""
    batch_size: Count = 16
    """Scenes a step."""

    def rules(self) -> Iterator[Rule]:
        rates = self.learning_rates
        yield "learning_rates", tuple(sorted(set(rates))) == rates, "ascending"
        whole = self.dim % self.num_heads == 0 and self.dim % 4 == 0
        yield "dim", whole, f"a multiple of 4 and of num_heads={self.num_heads}"
        enough = self.num_queries >= self.most
        yield "num_queries", enough, f"at least most={self.most}"
        needs = not (self.without or self.attention or self.attentions)
        yield "without", needs or "detr" in self.models, "given with model detr alone"


PRESETS: Mapping[str, Config] = {
    "smoke": Config(
        task="toy_scenes",
        without=("encoder",),
        ns=(8,),
        held=4,
        side=32,
        most=2,
        sizes=(8, 12),
        widths=(4, 8),
        dim=8,
        depth=1,
        decoder_depth=2,
        mlp_dim=8,
        num_heads=2,
        num_queries=4,
        blocks=1,
        seeds=1,
        updates=3,
        learning_rates=(1e-3,),
        batch_size=8,
    ),
    "quick": Config(
        held=300,
        side=64,
        most=4,
        sizes=(16, 20, 24),
        depth=2,
        decoder_depth=2,
        blocks=2,
        seeds=1,
        updates=1_500,
        learning_rates=(2e-3,),
    ),
    "cpu": Config(
        ns=(1_000, 4_000, 16_000),
        without=tuple(WITHOUT),
        attentions=("linear", "nystromformer", "axial"),
    ),
    "accelerator": Config(
        ns=(4_000, 16_000, 64_000, 256_000),
        without=tuple(WITHOUT),
        attentions=("linear", "nystromformer", "axial", "performer", "linformer"),
        widths=(32, 64, 128),
        dim=128,
        mlp_dim=512,
        num_heads=8,
        depth=6,
        decoder_depth=6,
        blocks=6,
        updates=100_000,
        tune_updates=5_000,
        learning_rates=(1e-4, 2e-4, 5e-4, 1e-3),
        batch_size=64,
        dropout_rate=0.1,
    ),
}


def cell_of(
    config: Config, task: str, model: str, n: int, differs: identity.Differs, **own: Any
) -> DetectCell:
    """The cell of a row, before a learning rate is chosen."""
    shared: dict[str, Any] = dict(
        task=task,
        model=model,
        seed=0,
        phase="tune",
        updates=config.tune_updates,
        weight_decay=config.weight_decay,
        n=n,
        batch_size=config.batch_size,
        widths=config.widths,
        differs=differs,
    )
    if model == "centers":
        return CentersCell(blocks=config.blocks, told=config.num_queries, **shared)
    names = "dim depth decoder_depth mlp_dim num_heads num_queries dropout_rate".split()
    shared |= {name: getattr(config, name) for name in names} | own
    return DetrCell(**shared)


def studies_of(
    config: Config, task: str, differs: identity.Differs = ()
) -> list[Study]:
    """All rows; smaller N take the rate of the largest over."""
    most = max(config.ns)
    rows: list[tuple[str, str, dict[str, Any]]] = [(m, m, {}) for m in config.models]
    rows += [(f"detr without {name}", "detr", WITHOUT[name]) for name in config.without]
    for name in (*config.attentions, *filter(None, [config.attention])):
        own = dict(attention=name, attention_sha256=attention_digest(name))
        own |= dict(cross="same") if config.same_cross else {}
        rows.append((f"detr of {name}", "detr", own))
    rates = config.learning_rates
    found: dict[str, Study] = {}
    for name, model, own in rows:
        for n in sorted(config.ns, reverse=True):
            if n < most and (name not in MODELS):
                continue
            cell = cell_of(config, task, model, n, differs, **own)
            found[f"{name} n={n}"] = Study(
                f"{name} n={n}",
                tuple(dataclasses.replace(cell, learning_rate=r) for r in rates),
                config.updates,
                config.seeds,
                None if n == most else found[f"{name} n={most}"],
                "val_ap",
                first=beside(len(rates)),
            )
    return list(found.values())


def load(config: Config) -> Detection:
    """The pictures of a task."""
    return load_detection(
        config.task,
        pool=max(config.ns),
        held=config.held,
        side=config.side,
        most=config.most,
        sizes=config.sizes,
        overlap=config.overlap,
    )


def plans(config: Config) -> list[Plan]:
    """Loads the pictures, and plans all cells.

    Raises:
      DataError: the pictures cannot be had.
      ValueError: there are fewer than the largest N.
    """
    data = load(config)
    if max(config.ns) > len(data.train):
        raise ValueError(
            f"ns must be at most {len(data.train):,}, the training pictures that "
            f"{config.task} has, got {max(config.ns):,}."
        )
    differs = identity.differs(data.name, data_sha256=data.sha256)
    floors = {"mean_boxes": functools.partial(mean_boxes, data)}
    return [
        Plan(
            DetectTask(data),
            data.describe(),
            studies_of(config, data.name, differs),
            baselines_of(data.name, floors, differs),
        )
    ]


EXPERIMENT = Experiment(
    name="detection",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "smoke": "half a minute",
        "quick": "five minutes, two cores",
        "cpu": "a night, two cores",
        "accelerator": "hours, an accelerator",
    },
    plans=plans,
    report=REPORT,
)
