"""What the experiment runs: its settings, and the named presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

DICTIONARY: Mapping[str, dict[str, Any]] = {
    "gat": dict(score="gat", num_heads=1),
    "gat, 8 heads": dict(score="gat", num_heads=8),
    "gatv2": dict(score="gatv2", num_heads=1),
    "dot product": dict(score="dot_product", num_heads=1),
}
"""Models of the task "dictionary", by the name of their row."""

WORDNET: Mapping[str, dict[str, Any]] = {
    "no edges": dict(score=None, kinds=False, reads_labels=False),
    "gatv2, labels not read": dict(score="gatv2", kinds=False, reads_labels=False),
    "gat": dict(score="gat", kinds=False, reads_labels=True),
    "gatv2": dict(score="gatv2", kinds=False, reads_labels=True),
    "dot product": dict(score="dot_product", kinds=False, reads_labels=True),
    "gatv2, kinds of edges": dict(score="gatv2", kinds=True, reads_labels=True),
    "gatv2, kinds, propagated labels": dict(
        score="gatv2", kinds=True, reads_labels=True, propagated=100
    ),
}
"""Models of the task "wordnet"."""

MOLECULES: Mapping[str, dict[str, Any]] = {
    "edges": dict(sees="edges", pairs="none"),
    "all pairs, bias of bonds and paths": dict(sees="all", pairs="both"),
    "no edges": dict(sees="all", pairs="none"),
}
"""Models of the tasks "melting_point" and "logp"."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Attention on edges: a theorem, a graph of words, and molecules.

    The preset cpu takes about an hour on one core: `python -m experiments.graphs
    --preset cpu`. Expected there: GATv2 answers all of DictionaryLookup and GAT does
    not; on WordNet, attention that also reads propagated labels is ahead of label
    propagation along all edges.
    """

    task: Literal["all", "dictionary", "wordnet", "melting_point", "logp"] = "all"
    """What is run."""
    seeds: int = 3
    """Seeds of each model: initial parameters, order and dropout."""
    keys: tuple[int, ...] = (10, 20)
    """DictionaryLookup: numbers k of keys and queries."""
    lookup_models: tuple[str, ...] = tuple(DICTIONARY)
    """Its models."""
    lookup_graphs: int = 2_000
    """Its training graphs."""
    lookup_updates: int = 600
    """Optimiser steps; a third of it to choose the learning rate."""
    lookup_rates: tuple[float, ...] = (3e-3, 1e-2)
    """Learning rates tried."""
    lookup_dim: int = 64
    """Width."""
    node_models: tuple[str, ...] = ("no edges", "gatv2", "gatv2, kinds of edges")
    """WordNet: models."""
    nodes: int | None = None
    """Nodes of the graph, the first of the file; None = all."""
    node_ns: tuple[int, ...] = (20_000,)
    """Numbers of training nodes; the first has all models."""
    node_few: tuple[str, ...] = ("gatv2, kinds, propagated labels",)
    """Models that the other numbers of training nodes have."""
    node_test: int = 8_000
    """Nodes held out for the test; half as many for validation."""
    node_updates: int = 100
    """Optimiser steps, each on the whole graph."""
    node_rate: float = 3e-2
    """Learning rate."""
    node_dim: int = 32
    """Width."""
    node_heads: int = 2
    """Heads."""
    node_head_dim: int = 8
    """Size of a head."""
    node_depth: int = 4
    """Layers: so many edges away a node sees."""
    node_features: int = 128
    """Size of the vector of a node's text."""
    molecule_models: tuple[str, ...] = tuple(MOLECULES)
    """Molecules: models."""
    molecules: int | None = None
    """Molecules of a task, the first of the table; None = all."""
    trees: int = 100
    """Trees of the random forests."""
    epochs: int = 6
    """Melting points: passes over the training molecules."""
    logp_epochs: int = 8
    """logP: passes over the training molecules."""
    molecule_rate: float = 2e-3
    """Learning rate."""
    molecule_dim: int = 64
    """Width."""
    molecule_heads: int = 4
    """Heads."""
    molecule_depth: int = 4
    """Layers."""
    batch_atoms: int = 768
    """Atoms an update, with padding."""
    molecule_dropout: float = 0.0
    """Dropout; it makes an update on CPU half as long again."""

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("seeds", self.seeds >= 1, "at least 1"),
            ("keys", min(self.keys, default=0) >= 2, "numbers >= 2"),
            ("lookup_rates", bool(self.lookup_rates), "at least one number"),
            ("node_ns", min(self.node_ns, default=0) >= 1, "numbers >= 1"),
            *(
                (name, getattr(self, name) >= 1, "at least 1")
                for name in (
                    "lookup_updates node_updates epochs logp_epochs lookup_graphs "
                    "node_test trees"
                ).split()
            ),
            *(
                (
                    name,
                    set(getattr(self, name)) <= set(known),
                    "some of " + "; ".join(known),
                )
                for name, known in (
                    ("lookup_models", DICTIONARY),
                    ("node_models", WORDNET),
                    ("node_few", WORDNET),
                    ("molecule_models", MOLECULES),
                )
            ),
        ):
            if not ok:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}."
                )


QUICK = Experiment(
    seeds=1,
    keys=(4,),
    lookup_models=("gat", "gatv2"),
    lookup_graphs=200,
    lookup_updates=60,
    lookup_rates=(1e-2,),
    lookup_dim=32,
    node_models=("no edges", "gatv2, kinds, propagated labels"),
    nodes=12_000,
    node_ns=(1_000,),
    node_test=1_000,
    node_updates=10,
    node_dim=16,
    node_depth=2,
    node_features=16,
    molecule_models=("all pairs, bias of bonds and paths",),
    molecules=200,
    trees=5,
    epochs=2,
    logp_epochs=2,
    molecule_dim=16,
    molecule_heads=2,
    molecule_depth=1,
)

CPU = Experiment()

ACCELERATOR = Experiment(
    keys=(10, 20, 50),
    lookup_dim=128,
    lookup_graphs=20_000,
    lookup_updates=10_000,
    node_updates=1_000,
    node_rate=5e-3,
    node_dim=128,
    node_heads=8,
    node_head_dim=16,
    node_depth=6,
    node_features=256,
    epochs=200,
    logp_epochs=300,
    molecule_rate=5e-4,
    molecule_dim=256,
    molecule_heads=8,
    molecule_depth=8,
    batch_atoms=2_048,
    molecule_dropout=0.1,
)

PRESETS: Mapping[str, Experiment] = {
    "quick": QUICK,
    "cpu": CPU,
    "accelerator": ACCELERATOR,
}
