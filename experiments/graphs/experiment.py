"""Graph neural networks are attention on edges: a theorem, words, and molecules.

`python -m experiments.graphs --preset cpu` runs all tasks, `--task dictionary`,
`wordnet`, `melting_point` or `logp` one of them: DictionaryLookup, which attention of
GAT's kind cannot solve (Brody et al., 2021, arXiv:2105.14491); the nodes of WordNet's
noun graph, all of it at every update; and molecules, with attention on bonds, on all
pairs of atoms with a bias, and without any bonds. `python -m experiments.graphs.timing`
measures time and memory of an update.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from experiments.core import identity
from experiments.core.cell import (
    Above,
    Count,
    Counts,
    Limit,
    Rates,
    Settings,
    Share,
    some_of,
)
from experiments.core.plan import Plan, Study, baselines_of
from experiments.core.run import Experiment
from experiments.data import graphs, molecules
from experiments.graphs import nodes, regression
from experiments.graphs.cells import DictionaryCell, MoleculeCell, NodeCell
from experiments.graphs.dictionary import HELD_OUT, DictionaryTask
from experiments.graphs.report import REPORT

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


Names = tuple[str, ...]
_KEYS = Limit(lambda x: bool(x) and min(x) >= 2, "at least one number, all >= 2")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Attention on edges: a theorem, a graph of words, and molecules.

    The preset cpu takes about an hour on one core: `python -m experiments.graphs
    --preset cpu`. Expected there: GATv2 answers all of DictionaryLookup and GAT does
    not; on WordNet, attention that also reads propagated labels is ahead of label
    propagation along all edges.
    """

    task: Literal["all", "dictionary", "wordnet", "melting_point", "logp"] = "all"
    """What is run."""
    seeds: Count = 3
    """Seeds of each model: initial parameters, order and dropout."""
    keys: Annotated[tuple[int, ...], _KEYS] = (10, 20)
    """DictionaryLookup: numbers k of keys and queries."""
    lookup_models: Annotated[Names, some_of(DICTIONARY, least=0)] = tuple(DICTIONARY)
    """Its models."""
    lookup_graphs: Count = 2_000
    """Its training graphs."""
    lookup_updates: Count = 600
    """Optimiser steps; a third of it to choose the learning rate."""
    lookup_rates: Rates = (3e-3, 1e-2)
    """Learning rates tried."""
    lookup_dim: Count = 64
    """Width."""
    node_models: Annotated[Names, some_of(WORDNET, least=0)] = (
        "no edges",
        "gatv2",
        "gatv2, kinds of edges",
    )
    """WordNet: models."""
    nodes: int | None = None
    """Nodes of the graph, the first of the file; None = all."""
    node_ns: Counts = (20_000, 2_600)
    """Numbers of training nodes; the first has all models."""
    node_few: Annotated[Names, some_of(WORDNET, least=0)] = (
        "no edges",
        "gat",
        "gatv2",
        "dot product",
    )
    """Models that the other numbers of training nodes have."""
    node_test: Count = 8_000
    """Nodes held out for the test; half as many for validation."""
    node_updates: Count = 100
    """Optimiser steps, each on the whole graph."""
    node_rate: Above = 3e-2
    """Learning rate."""
    node_dim: Count = 32
    """Width."""
    node_heads: Count = 2
    """Heads."""
    node_head_dim: Count = 8
    """Size of a head."""
    node_depth: Count = 4
    """Layers: so many edges away a node sees."""
    node_features: Count = 128
    """Size of the vector of a node's text."""
    molecule_models: Annotated[Names, some_of(MOLECULES, least=0)] = tuple(MOLECULES)
    """Molecules: models."""
    molecules: int | None = None
    """Molecules of a task, the first of the table; None = all."""
    molecule_seeds: Count = 5
    """Seeds of each model of molecules."""
    own_splits: bool = True
    """Whether a seed also draws which molecules are held out."""
    trees: Count = 50
    """Trees of the random forests."""
    epochs: Count = 6
    """Melting points: passes over the training molecules."""
    logp_epochs: Count = 8
    """logP: passes over the training molecules."""
    molecule_rate: Above = 2e-3
    """Learning rate."""
    molecule_dim: Count = 64
    """Width."""
    molecule_heads: Count = 4
    """Heads."""
    molecule_depth: Count = 4
    """Layers."""
    batch_atoms: Count = 768
    """Atoms an update, with padding."""
    molecule_dropout: Share = 0.0
    """Dropout; it makes an update on CPU half as long again."""


PRESETS: Mapping[str, Config] = {
    "quick": Config(
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
        molecule_seeds=1,
        trees=5,
        epochs=2,
        logp_epochs=2,
        molecule_dim=16,
        molecule_heads=2,
        molecule_depth=1,
    ),
    "cpu": Config(),
    "accelerator": Config(
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
    ),
}


def dictionary_plan(config: Config) -> Plan:
    """DictionaryLookup: the learning rate is chosen for every model and k."""
    studies = {}
    for keys in config.keys:
        for model in config.lookup_models:
            cell = DictionaryCell(
                task="dictionary",
                model=model,
                seed=0,
                updates=max(1, config.lookup_updates // 3),
                dim=config.lookup_dim,
                depth=1,
                mlp_dim=0,
                keys=keys,
                graphs=config.lookup_graphs,
                batch_size=32,
                held_out=HELD_OUT,
                learning_rate=config.lookup_rates[0],
                weight_decay=0.0,
                **DICTIONARY[model],
            )
            grid = tuple(
                dataclasses.replace(cell, learning_rate=rate)
                for rate in config.lookup_rates
            )
            name = f"{model} k={keys}"
            studies[name] = Study(name, grid, config.lookup_updates, config.seeds)
    sizes = ", ".join(map(str, config.keys))
    described = (
        f"dictionary: {config.lookup_graphs:,} training graphs for each of k = "
        f"{sizes}, generated"
    )
    return Plan(DictionaryTask(), described, list(studies.values()))


def wordnet_task(config: Config) -> nodes.Nodes:
    """WordNet, or the first of its nodes, with its parts."""
    graph = graphs.load_wordnet()
    if config.nodes is not None:
        graph = graphs.first_nodes(graph, config.nodes)
    held_out = config.node_test, max(1, config.node_test // 2)
    return nodes.Nodes(graph, test=held_out[0], validation=held_out[1])


def node_cell(
    config: Config,
    graph: graphs.NodeGraph,
    model: str,
    n: int,
    differs: identity.Differs = (),
) -> NodeCell:
    """The cell of a model with n training nodes."""
    traits: dict[str, Any] = WORDNET[model]
    return NodeCell(
        task="wordnet",
        model=model,
        seed=0,
        updates=config.node_updates,
        dim=config.node_dim,
        depth=config.node_depth,
        num_heads=config.node_heads,
        head_dim=config.node_head_dim,
        mlp_dim=config.node_dim,
        n=n,
        data=graph.sha256,
        shown=0.7 if traits["reads_labels"] else 0.0,
        features=config.node_features,
        learning_rate=config.node_rate,
        differs=differs,
        **traits,
    )


def wordnet_plan(config: Config) -> Plan:
    """The nodes of WordNet; one learning rate, which the preset gives."""
    task = wordnet_task(config)
    if max(config.node_ns) > len(task.pool):
        raise ValueError(
            f"node_ns must be at most {len(task.pool):,}, the nodes that are not held "
            f"out, got {max(config.node_ns):,}."
        )
    parts = dict(test=len(task.test), validation=len(task.validation))
    differs = identity.differs("wordnet", text_features=graphs.TEXT_FEATURES, **parts)
    studies = {}
    for n in config.node_ns:
        first = n == config.node_ns[0]
        for model in config.node_models if first else config.node_few:
            cell = node_cell(config, task.graph, model, n, differs)
            name = f"{model} n={n}"
            studies[name] = Study(name, (cell,), config.node_updates, config.seeds)
    floors = nodes.baselines(task, config.node_ns)
    made_of = identity.differs(
        "wordnet",
        data_sha256=task.graph.sha256,
        node_ns=list(config.node_ns),
        **parts,
    )
    return Plan(
        nodes.NodeTask(task),
        task.graph.describe(),
        list(studies.values()),
        baselines_of("wordnet", floors, made_of),
    )


def molecule_plan(config: Config, name: molecules.Task) -> Plan:
    """The molecules of one table; one learning rate, which the preset gives."""
    data = molecules.load_molecules(name, limit=config.molecules)
    task = regression.Parts(data)
    epochs = config.epochs if name == "melting_point" else config.logp_epochs
    parts = dict(split=identity.digest(task.train, task.validation, task.test))
    differs = identity.differs(
        name,
        graphs=identity.digest([(graph.atoms, graph.pairs) for graph in data.graphs]),
        **parts,
    )
    studies = {}
    for model in config.molecule_models:
        cell = MoleculeCell(
            task=name,
            model=model,
            seed=0,
            updates=1,
            dim=config.molecule_dim,
            depth=config.molecule_depth,
            num_heads=config.molecule_heads,
            mlp_dim=2 * config.molecule_dim,
            dropout_rate=config.molecule_dropout,
            data=data.sha256,
            batch_atoms=config.batch_atoms,
            own_split=config.own_splits,
            learning_rate=config.molecule_rate,
            weight_decay=0.05,
            differs=differs,
            **MOLECULES[model],
        )
        indices = task.part("final")[0]
        batches = regression.Epochs(task, indices, config.batch_atoms, 0, "final")
        studies[model] = Study(
            model,
            (cell,),
            epochs * batches.size,
            config.molecule_seeds,
            metric="val_rmse",
            minimise=True,
        )
    splits = config.molecule_seeds if config.own_splits else None
    floors = regression.baselines(task, config.trees, splits)
    made_of = {}
    for floor in floors:
        trees = {"trees": config.trees} if floor.startswith("forest") else {}
        made_of[floor] = identity.differs(
            name, data_sha256=data.sha256, **trees, **parts
        )
    return Plan(
        regression.MoleculeTask(task),
        data.describe(),
        list(studies.values()),
        baselines_of(name, floors, made_of),
    )


def plans(config: Config) -> list[Plan]:
    """Loads the data of the tasks and plans their cells.

    Raises:
      DataError, ValueError: the data cannot be had; a bad value.
    """
    makers: dict[str, Callable[[Config], Plan]] = {
        "dictionary": dictionary_plan,
        "wordnet": wordnet_plan,
        "melting_point": functools.partial(molecule_plan, name="melting_point"),
        "logp": functools.partial(molecule_plan, name="logp"),
    }
    wanted = list(makers) if config.task == "all" else [config.task]
    return [makers[name](config) for name in wanted]


EXPERIMENT = Experiment(
    name="graphs",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "quick": "a minute",
        "cpu": "an hour, one core",
        "accelerator": "the papers' sizes, on GPU or TPU",
    },
    plans=plans,
    report=REPORT,
)
