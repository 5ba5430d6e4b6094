"""What a report tells of heads.json: where each head looks, what fails without it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core import report as tell
from experiments.core.plots import save_figure, subplots
from experiments.core.report import Group
from experiments.core.stats import summarize

HEADS = "heads.json"

# A tag of fewer test words is not shown.
FEWEST = 200


@dataclasses.dataclass(frozen=True)
class Head:
    """One head of one seed.

    Attributes:
      seed, layer, number: which, layers and heads from 1.
      offsets: share of its weight by offset, [2R + 1].
      lost: accuracy lost without it, in all and by tag, [classes].
    """

    seed: int
    layer: int
    number: int
    offsets: np.ndarray
    lost_in_all: float
    lost: np.ndarray

    @property
    def main(self) -> int:
        """The offset with most of its weight."""
        return int(self.offsets.argmax()) - len(self.offsets) // 2

    @property
    def name(self) -> str:
        """Which it is, in words."""
        return f"layer {self.layer}, head {self.number}"


def heads_of(entry: Mapping[str, Any]) -> list[Head]:
    """The heads of a seed, by layer and by the offset that they look at most."""
    whole = entry["whole"]
    found = [
        Head(
            seed=entry["seed"],
            layer=layer + 1,
            number=number + 1,
            offsets=np.asarray(entry["offsets"][layer][number]),
            lost_in_all=whole["accuracy"] - without["accuracy"],
            lost=np.asarray(whole["by_tag"]) - np.asarray(without["by_tag"]),
        )
        for layer, some in enumerate(entry["without"])
        for number, without in enumerate(some)
    ]
    return sorted(found, key=lambda head: (head.layer, head.main))


def apart(heads: Sequence[Head]) -> float:
    """How much of its weight one head has elsewhere than another of its layer, mean.

    Half the sum of absolute differences of shares by offset: 0 if they look at the same
    offsets, 1 if at none in common.
    """
    found = [
        0.5 * np.abs(one.offsets - two.offsets).sum()
        for one, two in itertools.combinations(heads, 2)
        if one.layer == two.layer
    ]
    return float(np.mean(found))


def draw_heads(group: Group) -> list[str]:
    """Draws heads.json of the folder, if there is one, and tells of it."""
    found = group.measured(HEADS)
    if found is None:
        return []
    seeds = [heads_of(entry) for entry in found["seeds"]]
    counts = np.asarray(found["seeds"][0]["counts"])
    shown = [i for i, count in enumerate(counts) if count >= FEWEST]
    tags = [found["tags"][i] for i in shown]
    _draw(group, found, seeds, shown, tags)
    layers = max(head.layer for head in seeds[0])
    mains = [
        [len({h.main for h in heads if h.layer == layer}) for heads in seeds]
        for layer in range(1, layers + 1)
    ]
    of_layer = sum(head.layer == 1 for head in seeds[0])
    hurt = [len({int(h.lost[shown].argmax()) for h in heads}) for heads in seeds]
    words = ", ".join(
        f"in layer {layer + 1} {tell.span(some)}" for layer, some in enumerate(mains)
    )
    share = tell.mean(summarize([apart(heads) for heads in seeds]), 2)
    losses = [head.lost_in_all for heads in seeds for head in heads]
    rows = [head for heads in seeds for head in heads]

    def worst(head: Head) -> str:
        at = int(head.lost[shown].argmax())
        return f"{tags[at]} −{tell.decimal(head.lost[shown][at])}"

    return [
        "## What each head is for",
        "Each head in turn is taken away (its output is zero) from the trained "
        "Transformers of {updates:,} updates, and the whole test part is tagged "
        "without it; where it looks is its mean weight by offset, of sentences of "
        "{length} words. Heads of different seeds have nothing to do with one another; "
        "within a layer they are sorted by the offset that they look at most.".format(
            updates=found["cell"]["updates"], length=found["length"]
        ),
        "![what each head is for](heads.png)",
        f"Offsets that one of the {of_layer} heads of a layer looks at most, over "
        f"{len(seeds)} seeds: {words} different ones. Two heads of a layer have "
        f"{share} of their weight at different offsets (0: the same, 1: none in "
        "common). "
        f"Without a head accuracy falls by {tell.span(losses, tell.decimal)}; the tags "
        f"that suffer most are {tell.span(hurt)} different ones for the "
        f"{len(seeds[0])} heads of a seed.",
        tell.tabulate(
            [
                ("seed", lambda head: str(head.seed)),
                ("head", lambda head: head.name),
                (
                    "looks most at (share of its weight)",
                    lambda head: (
                        f"{_signed(head.main)} ({tell.decimal(head.offsets.max(), 2)})"
                    ),
                ),
                (
                    "accuracy without it",
                    lambda head: tell.decimal(-head.lost_in_all, sign=True),
                ),
                ("most lost", worst),
            ],
            rows,
        ),
    ]


def _signed(offset: int) -> str:
    return "itself" if not offset else f"{'+' if offset > 0 else '−'}{abs(offset)}"


def _draw(
    group: Group,
    found: Mapping[str, Any],
    seeds: Sequence[Sequence[Head]],
    shown: Sequence[int],
    tags: Sequence[str],
) -> None:
    """A row a seed: where its heads look, and what is lost without each."""
    reach = found["reach"]
    size = (11.5, 2.9 * len(seeds) + 0.6)
    figure, grid = subplots(size, rows=len(seeds), columns=2, dpi=110)
    drawn: list[Any] = [None, None]
    for row, heads in zip(grid, seeds, strict=True):
        looks = np.stack([head.offsets for head in heads])
        lost = 100 * np.stack([head.lost[shown] for head in heads])
        most = 100 * max(float(h.lost[shown].max()) for some in seeds for h in some)
        drawn[0] = row[0].imshow(looks, cmap="magma", vmin=0, vmax=1, aspect="auto")
        drawn[1] = row[1].imshow(lost, cmap="magma", vmin=0, vmax=most, aspect="auto")
        for axes in row:
            axes.set_yticks(range(len(heads)), [head.name for head in heads])
            axes.axhline(
                sum(head.layer == 1 for head in heads) - 0.5, color="white", lw=1
            )
            axes.tick_params(labelsize=7)
        where = range(-reach, reach + 1, 2)
        row[0].set_xticks([reach + at for at in where], [f"{at:+d}" for at in where])
        row[1].set_xticks(range(len(tags)), tags, rotation=60)
        row[0].set_title(
            f"seed {heads[0].seed}: where it looks", fontsize=9, loc="left"
        )
        row[1].set_title("what is lost without it", fontsize=9, loc="left")
    grid[-1][0].set_xlabel("offset in words, + = after", fontsize=8)
    grid[-1][1].set_xlabel("tag", fontsize=8)
    for column, name in enumerate(
        ("share of a head's weight", "test accuracy lost, percentage points")
    ):
        bar = figure.colorbar(drawn[column], ax=list(grid[:, column]), shrink=0.7)
        bar.set_label(name, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    save_figure(figure, group.folder / "heads.png")
