"""The cells of the three tasks: all that can change a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from experiments.core.cell import Amount, Cell, Count

Score = Literal["dot_product", "gat", "gatv2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphCell(Cell):
    """What the cells of all three tasks have.

    Attributes:
      task: "dictionary", "wordnet", "melting_point" or "logp".
      dim, depth, num_heads, mlp_dim: width, layers, heads, hidden width (0 = none).
      dropout_rate: of the model.
    """

    dim: Count
    depth: Count
    num_heads: Count
    mlp_dim: int
    phase: Literal["tune", "final"] = "tune"
    dropout_rate: float = 0.0
    weight_decay: Amount = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class DictionaryCell(GraphCell):
    """A cell of DictionaryLookup.

    Attributes:
      score: how edges are scored.
      keys: k, number of keys and of queries.
      graphs: number of training graphs.
      batch_size: graphs an update.
      held_out: number of graphs that are scored.
    """

    score: Score
    keys: int
    graphs: int
    batch_size: int
    held_out: int

    def traits(self) -> Iterator[str]:
        yield f"k={self.keys}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeCell(GraphCell):
    """A cell of the classification of nodes.

    Attributes:
      n: number of training nodes.
      data: which graph: hash of its content.
      score: how edges are scored; None for no edges.
      kinds: whether attention tells kinds of edges apart.
      reads_labels: whether known labels are read.
      shown: share of the training labels that is read, in place of being learned, at
        each update.
      propagated: steps of label propagation whose result the network reads besides; 0
        for none.
      features: size of a node's vector.
      head_dim: size of a head.
    """

    n: int
    data: str
    score: Score | None
    kinds: bool
    reads_labels: bool
    shown: float
    propagated: int = 0
    features: int
    head_dim: int

    def config(self) -> dict[str, Any]:
        """The cell as a plain dictionary; without what it does not do."""
        found = super().config()
        if not self.propagated:
            del found["propagated"]
        return found

    def traits(self) -> Iterator[str]:
        yield f"n={self.n}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoleculeCell(GraphCell):
    """A cell of the molecules.

    Attributes:
      data: which molecules: hash of their content.
      sees: "edges" for attention on bonds alone, "all" for all pairs of atoms.
      pairs: what a learned bias tells of a pair of atoms: the bond, the length of the
        path, "both", or "none" for no bias.
      batch_atoms: atoms an update, with padding.
      own_split: whether a seed also draws which molecules are held out; else all have
        the first split.
    """

    data: str
    sees: Literal["edges", "all"]
    pairs: Literal["none", "bond", "path", "both"]
    batch_atoms: int
    own_split: bool = False

    @property
    def split(self) -> int:
        """Number of the split."""
        return self.seed if self.own_split else 0

    def config(self) -> dict[str, Any]:
        """The cell as a plain dictionary; without what it does not do."""
        found = super().config()
        if not self.own_split:
            del found["own_split"]
        return found
