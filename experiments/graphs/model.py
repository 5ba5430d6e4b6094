"""Graph networks as attention on edges: for one large graph, and for many small ones.

A graph network whose nodes weigh their neighbours is self-attention that sees the
edges alone. For one large graph that is `graph_attention` over a list of edges,
`GraphEncoder`; for many small graphs, padded to one size, it is a Transformer
`Encoder` under a mask, or with a bias per kind of pair, `GraphRegressor`.

Letters: N nodes, E edges, B graphs, T nodes of the largest of them, D width, F size of
an input vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.attention import _checks
from attn_jax.attention.graph import (
    Score,
    check_nodes,
    gat_init,
    gatv2_init,
    graph_attention,
)
from attn_jax.models.labeller import IdInput, VectorInput
from attn_jax.nn.encoder import Encoder, MlpBlock
from attn_jax.nn.positional import Positions, _Biased

__all__ = [
    "Edges",
    "EdgeAttention",
    "GraphBlock",
    "GraphEncoder",
    "GraphLabeller",
    "GraphRegressor",
    "PairBias",
]

DType = jax.typing.DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edges:
    """The edges of one graph, or of many side by side.

    Attributes:
      senders: int [E], the node that is read.
      receivers: int [E], the node that reads. A node that is to see itself needs an
        edge for it.
      kinds: int [E], for layers that tell kinds of edges apart, or None.
      mask: bool [E], True = a real edge, or None for all.
    """

    senders: jax.Array
    receivers: jax.Array
    kinds: jax.Array | None = None
    mask: jax.Array | None = None


class EdgeAttention(nnx.Module):
    """Multi-head attention of every node to the nodes that its edges come from.

    The linear maps are those of the papers: one for "gat", where query, key and value
    are the same, two for "gatv2", where the value is the key, and three for
    "dot_product". The heads lie side by side and go through one more linear map.

    Args:
      dim: width D of nodes, in and out.
      num_heads: number of heads.
      head_dim: size H of a head; None for D / num_heads.
      score: how an edge is scored, see `graph_attention`.
      num_kinds: kinds of edges. Each head adds a learned number per kind to the scores
        (zero at first); 0 for none.
      dtype: dtype of the computation; parameters stay float32.
      rngs: source of initialisation randomness.

    Raises:
      ValueError: if the heads do not divide the width, or for an unknown score.

    References: Veličković et al., 2017, arXiv:1710.10903 (GAT); Brody et al., 2021,
    arXiv:2105.14491 (GATv2); Ying et al., 2021, arXiv:2106.05234 (bias per kind).

    >>> layer = EdgeAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((3, 8)), Edges(jnp.array([0, 1]), jnp.array([1, 2]))).shape
    (3, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        score: Score = "gatv2",
        num_kinds: int = 0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(
                f"dim must be a multiple of num_heads, got dim={dim} and "
                f"num_heads={num_heads}."
            )
        if score not in get_args(Score):
            raise ValueError(
                f"score must be one of {', '.join(get_args(Score))}, got {score!r}."
            )
        size = dim // num_heads if head_dim is None else head_dim
        self.num_heads = num_heads
        self.head_dim = size
        self.score = score
        self.num_kinds = num_kinds
        self.maps = {"gat": 1, "gatv2": 2, "dot_product": 3}[score]
        inner = num_heads * size
        self.project = nnx.Linear(dim, self.maps * inner, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(inner, dim, dtype=dtype, rngs=rngs)
        make: Any = {"gat": gat_init, "gatv2": gatv2_init}.get(score)
        if make is not None:
            keys = jax.random.split(rngs.params(), num_heads)
            drawn = jax.vmap(lambda rng: make(rng, size))(keys)
            self.of_heads = nnx.Dict({k: nnx.Param(v) for k, v in drawn.items()})
        if num_kinds:
            self.of_kinds = nnx.Param(jnp.zeros((num_heads, num_kinds)))

    def __call__(self, x: jax.Array, edges: Edges) -> jax.Array:
        """Maps nodes [N, D] to [N, D]; without edges to a node, to the same for all."""
        if self.num_kinds and edges.kinds is None:
            raise ValueError(
                f"edges.kinds must be given: the layer was made for {self.num_kinds} "
                "kinds of edges, got None."
            )
        heads = self.project(x)
        heads = heads.reshape(x.shape[0], self.maps, self.num_heads, self.head_dim)
        # "gat" has one map, "gatv2" two; the last one serves for what is missing.
        query, key, value = (
            heads[:, min(i, self.maps - 1)].swapaxes(0, 1) for i in range(3)
        )
        params = bias = None
        if self.score != "dot_product":
            params = {k: v[...] for k, v in self.of_heads.items()}
        if self.num_kinds:
            assert edges.kinds is not None
            kinds = _checks.check_ids("edges.kinds", edges.kinds, self.num_kinds)
            bias = (
                self.of_kinds[...]
                .at[:, kinds]
                .get(mode="fill", wrap_negative_indices=False)
            )

        # One head after another: XLA:CPU gathers rows of one table twice as fast as
        # those of several at once.
        mixed = [
            graph_attention(
                query[h],
                key[h],
                value[h],
                edges.senders,
                edges.receivers,
                None if bias is None else bias[h],
                edges.mask,
                params=jax.tree.map(lambda leaf, h=h: leaf[h], params),
                score=self.score,
            )
            for h in range(self.num_heads)
        ]
        return self.out(jnp.concatenate(mixed, axis=1))


class GraphBlock(nnx.Module):
    """Pre-norm block: ``x ← x + attend(norm(x))``, then ``x ← x + mlp(norm(x))``.

    Args:
      dim: width D of the nodes.
      num_heads, head_dim, score, num_kinds: see `EdgeAttention`; a ``score`` of None
        is for no edges at all, so that every node is by itself.
      mlp_dim: hidden width of the fully connected layers; 0 for none.
      dropout_rate: of both residual branches and hidden units while training.
      dtype: dtype of the computation; parameters stay float32.
      rngs: source of initialisation randomness.

    Raises:
      ValueError: as `EdgeAttention`, or for a block that does nothing.

    >>> block = GraphBlock(8, num_heads=2, mlp_dim=16, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((3, 8)), Edges(jnp.array([0, 1]), jnp.array([1, 2]))).shape
    (3, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_dim: int,
        head_dim: int | None = None,
        score: Score | None = "gatv2",
        num_kinds: int = 0,
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        if score is None and not mlp_dim:
            raise ValueError(
                "score and mlp_dim must not both be left out: the block would do "
                f"nothing, got score={score!r} and mlp_dim={mlp_dim}."
            )
        self.attends, self.mixes = score is not None, mlp_dim > 0
        if score is not None:
            self.attention_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
            self.attention = EdgeAttention(
                dim,
                num_heads=num_heads,
                head_dim=head_dim,
                score=score,
                num_kinds=num_kinds,
                dtype=dtype,
                rngs=rngs,
            )
        if mlp_dim:
            self.mlp_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
            self.mlp = MlpBlock(
                dim, mlp_dim, dropout_rate=dropout_rate, dtype=dtype, rngs=rngs
            )
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        edges: Edges,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps nodes [N, D] to [N, D]."""
        if self.attends:
            h = self.attention(self.attention_norm(x), edges)
            x = x + self.dropout(h, deterministic=deterministic, rngs=rngs)
        if self.mixes:
            h = self.mlp(self.mlp_norm(x), deterministic=deterministic, rngs=rngs)
            x = x + self.dropout(h, deterministic=deterministic, rngs=rngs)
        return x


class GraphEncoder(nnx.Module):
    """``depth`` blocks and a layer normalisation: a Transformer that sees edges alone.

    The blocks run as a loop that keeps what lies between them and computes the rest
    anew in the backward pass, so that the edges of one block are in memory at a time.

    Args:
      depth: number of blocks L: a node sees what is L edges away.
      dim, num_heads, head_dim, mlp_dim, score, num_kinds, dropout_rate, dtype, rngs:
        see `GraphBlock`.

    Raises:
      ValueError: as `GraphBlock`.

    Reference: Veličković et al., 2017, arXiv:1710.10903; Chen et al., 2016,
    arXiv:1604.06174 (computing anew).

    >>> encoder = GraphEncoder(2, 8, num_heads=2, mlp_dim=16, rngs=nnx.Rngs(0))
    >>> encoder(jnp.ones((3, 8)), Edges(jnp.array([0, 1]), jnp.array([1, 2]))).shape
    (3, 8)
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        *,
        num_heads: int,
        mlp_dim: int,
        head_dim: int | None = None,
        score: Score | None = "gatv2",
        num_kinds: int = 0,
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}.")
        self.blocks = nnx.List(
            [
                GraphBlock(
                    dim,
                    num_heads=num_heads,
                    mlp_dim=mlp_dim,
                    head_dim=head_dim,
                    score=score,
                    num_kinds=num_kinds,
                    dropout_rate=dropout_rate,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(depth)
            ]
        )
        self.norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.num_kinds = 0 if score is None else num_kinds

    def __call__(
        self,
        x: jax.Array,
        edges: Edges,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps nodes [N, D] to [N, D]."""
        graphdef, _ = nnx.split(self.blocks[0])
        states = [nnx.to_pure_dict(nnx.split(block)[1]) for block in self.blocks]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        keys = None
        if not deterministic and rngs is not None:
            keys = jax.random.split(rngs.dropout(), len(self.blocks))

        # Edges as an argument: a closed-over array would be looked at while tracing.
        @jax.checkpoint
        def run(x: jax.Array, state: Any, key: Any, edges: Edges) -> jax.Array:
            block = nnx.merge(graphdef, _as_state(self.blocks[0], state))
            streams = None if key is None else nnx.Rngs(dropout=key)
            return block(x, edges, deterministic=deterministic, rngs=streams)

        def step(x: jax.Array, given: tuple[Any, Any]) -> tuple[jax.Array, None]:
            return run(x, *given, edges), None

        for name in ("senders", "receivers"):
            check_nodes(f"edges.{name}", getattr(edges, name), x.shape[0])
        if self.num_kinds and edges.kinds is not None:
            _checks.check_ids("edges.kinds", edges.kinds, self.num_kinds)
        x = _checks.varying(x, stacked, edges)
        x, _ = jax.lax.scan(step, x, (stacked, keys))
        return self.norm(x)


def _as_state(module: nnx.Module, leaves: Any) -> Any:
    """The state of a module with other leaves in the same order."""
    treedef = jax.tree.structure(nnx.split(module)[1])
    return jax.tree.unflatten(treedef, jax.tree.leaves(leaves))


class GraphLabeller(nnx.Module):
    """Labels of nodes: an input layer, a `GraphEncoder`, and a linear layer on top.

    With ``reads_labels`` the network also reads the labels that are known, as one more
    vector that is added to a node's input. It then learns by hiding some of them:
    otherwise it would copy.

    Args:
      inputs: size F of a node's vector, or the number of rows of each table, for nodes
        that are ids [N, K] (one-hot vectors side by side, see `IdInput`).
      num_classes: number of labels.
      dim, depth, num_heads, head_dim, mlp_dim, score, num_kinds, dropout_rate, dtype,
        rngs: see `GraphEncoder`.
      reads_labels: whether known labels are read.

    Raises:
      ValueError: as `GraphEncoder`.

    Reference: Shi et al., 2020, arXiv:2009.03509 (UniMP, masked label prediction).

    >>> model = GraphLabeller(5, 3, dim=8, depth=1, num_heads=2, mlp_dim=8,
    ...                       rngs=nnx.Rngs(0))
    >>> model(jnp.ones((4, 5)), Edges(jnp.array([0, 1]), jnp.array([1, 2]))).shape
    (4, 3)
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        num_classes: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        head_dim: int | None = None,
        score: Score | None = "gatv2",
        num_kinds: int = 0,
        reads_labels: bool = False,
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_classes = num_classes
        self.reads_labels = reads_labels
        make: Any = VectorInput if isinstance(inputs, int | np.integer) else IdInput
        self.input = make(inputs, dim, dtype=dtype, rngs=rngs)
        if reads_labels:
            # As large as what the input layer makes of vectors of unit variance.
            self.given = nnx.Embed(
                num_classes,
                dim,
                embedding_init=nnx.initializers.normal(1.0),
                dtype=dtype,
                rngs=rngs,
            )
        self.encoder = GraphEncoder(
            depth,
            dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            head_dim=head_dim,
            score=score,
            num_kinds=num_kinds,
            dropout_rate=dropout_rate,
            dtype=dtype,
            rngs=rngs,
        )
        self.head = nnx.Linear(dim, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        nodes: jax.Array,
        edges: Edges,
        known: jax.Array | None = None,
        wanted: jax.Array | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Scores the labels of nodes.

        Args:
          nodes: float [N, F] or int [N, K].
          edges: of the graph.
          known: int [N], the label of each node, −1 where it is hidden; for
            ``reads_labels``.
          wanted: int [M], the nodes to label; None for all N.
          deterministic: whether dropout is off.
          rngs: stream `dropout`, where it is on.

        Returns:
          Logits [N, classes], or [M, classes].

        Raises:
          ValueError: for a known id, kind, label or node that does not exist. Where
            they are traced, edges of such nodes do not count, and all else gives NaN.
          TypeError: if one of them is no integer.
        """
        if (known is not None) != self.reads_labels:
            raise ValueError(
                f"known must be {'given' if self.reads_labels else 'left out'}: the "
                f"model was made with reads_labels={self.reads_labels}, got "
                f"{'None' if known is None else 'labels'}."
            )
        x = self.input(nodes[None])[0]
        if known is not None:
            known = _checks.as_int32("known", known)
            shown = jnp.where(known == -1, 0, known)
            why = ", or be −1 where it is hidden"
            shown = _checks.check_ids("known", shown, self.num_classes, why=why)
            rows = _checks.rows_at(self.given.embedding[...], shown).astype(x.dtype)
            x = x + jnp.where((known != -1)[:, None], rows, jnp.zeros((), rows.dtype))
        x = self.encoder(x, edges, deterministic=deterministic, rngs=rngs)
        if wanted is None:
            return self.head(x)
        rows = _checks.check_ids("wanted", wanted, x.shape[0])
        return self.head(_checks.rows_at(x, rows))


# --- Many small graphs -------------------------------------------------------------


class PairBias(_Biased):
    """A learned number per kind of pair of nodes, added to the scores, in every block.

    bias[h, t, s] = Σ_k table_k[h, pairs[t, s, k]], with tables of each block's own,
    zero at first. With the length of the shortest path as the kind of a pair it is the
    spatial encoding of Graphormer.

    An `Encoder` made with it is called with ``tables=bias.of_pairs(pairs)``.

    Args:
      sizes: number of kinds of each of the K ids of a pair.
      dim, num_heads, depth, rngs: of the encoder.

    Reference: Ying et al., 2021, arXiv:2106.05234, section 3.1.2.

    >>> bias = PairBias((5, 9), dim=8, num_heads=2, depth=1, rngs=nnx.Rngs(0))
    >>> bias.table.shape
    (1, 14, 2)
    """

    name = "pair_bias"

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        dim: int,
        num_heads: int,
        depth: int,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            dim=dim, num_heads=num_heads, depth=depth, max_length=None, rngs=rngs
        )
        self.sizes = tuple(sizes)
        self.table = nnx.Param(jnp.zeros((depth, sum(self.sizes), num_heads)))

    def tables(self, length: int) -> Any:
        raise ValueError(
            "`tables` must be made by `bias.of_pairs(pairs)`, since a length tells "
            "nothing of pairs, but is None."
        )

    def of_pairs(self, pairs: jax.Array) -> Any:
        """The `tables` of a batch, of the ids [B, T, T, K] of its pairs of nodes."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        pairs = _checks.check_ids("pairs", pairs, self.sizes)
        rows = pairs + jnp.asarray(starts, jnp.int32)[None, None, None]
        # One-hot and a product, whose backward pass is a product too: a scatter of all
        # pairs into so few rows is slower everywhere.
        hot = jax.nn.one_hot(rows, sum(self.sizes)).sum(axis=-2)
        return hot, (pairs < 0).any(axis=-1)

    def operands(
        self,
        tables: Any,
        block_index: int,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
    ) -> dict[str, Any]:
        hot, unknown = tables
        bias = jnp.einsum("btsk,kh->bhts", hot, self.table[...][block_index])
        bias = jnp.where(unknown[:, None], jnp.asarray(jnp.nan, bias.dtype), bias)
        return {"query": query, "key": key, "value": value, "bias": bias}


class GraphRegressor(nnx.Module):
    """One number for a whole graph, such as a molecule, by a Transformer on its nodes.

    Nodes are the sum of rows of tables, one a trait (one-hot vectors side by side and
    a linear map). They see their neighbours and themselves alone, ``sees="edges"``, or
    all of the graph, ``sees="all"``; a learned bias per kind of pair may tell bonds and
    distances. The nodes that come out are averaged and added up, and two layers make
    the number of both.

    Args:
      inputs: number of rows of each table.
      dim, depth, num_heads, mlp_dim, dropout_rate, dtype, rngs: see `Encoder`.
      sees: "edges" or "all".
      pair_sizes: number of kinds of each of the K ids of a pair of nodes, for
        `PairBias`; empty for no bias.

    Raises:
      ValueError: for another ``sees``, or as `Encoder`.

    References: Veličković et al., 2017, arXiv:1710.10903; Ying et al., 2021,
    arXiv:2106.05234 (Graphormer).

    >>> model = GraphRegressor((5, 3), dim=8, depth=1, num_heads=2, mlp_dim=8,
    ...                        sees="all", rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 4, 2), jnp.int32), jnp.ones((2, 4), bool)).shape
    (2,)
    """

    def __init__(
        self,
        inputs: Sequence[int],
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        sees: Literal["edges", "all"] = "all",
        pair_sizes: Sequence[int] = (),
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        if sees not in ("edges", "all"):
            raise ValueError(f"sees must be 'edges' or 'all', got {sees!r}.")
        self.sees = sees
        self.input = IdInput(inputs, dim, dtype=dtype, rngs=rngs)
        bias: Positions | None = None
        if pair_sizes:
            bias = PairBias(
                pair_sizes, dim=dim, num_heads=num_heads, depth=depth, rngs=rngs
            )
        self.encoder = Encoder(
            depth,
            dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            positions=bias,
            dropout_rate=dropout_rate,
            dtype=dtype,
            rngs=rngs,
        )
        self.hidden = nnx.Linear(2 * dim, dim, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(dim, 1, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(
        self,
        nodes: jax.Array,
        key_mask: jax.Array,
        adjacency: jax.Array | None = None,
        pairs: jax.Array | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps graphs to numbers.

        Args:
          nodes: int [B, T, K'], one id a table.
          key_mask: bool [B, T], True = a real node.
          adjacency: bool [B, T, T], True = an edge, for ``sees="edges"``; loops are
            added.
          pairs: int [B, T, T, K], for a bias.
          deterministic: whether dropout is off.
          rngs: stream `dropout`, where it is on.

        Returns:
          [B].
        """
        biased = self.encoder.positions is not None
        for name, given, wanted in (
            ("adjacency", adjacency is not None, self.sees == "edges"),
            ("pairs", pairs is not None, biased),
        ):
            if given != wanted:
                raise ValueError(
                    f"{name} must be {'given' if wanted else 'left out'}: the model "
                    f"was made with sees={self.sees!r} and "
                    f"{'a' if biased else 'no'} bias of pairs."
                )
        mask = key_mask[:, None, None, :]
        if adjacency is not None:
            loops = jnp.eye(adjacency.shape[-1], dtype=bool)[None]
            mask = mask & (adjacency | loops)[:, None]
        tables = None
        if pairs is not None:
            assert isinstance(self.encoder.positions, PairBias)
            tables = self.encoder.positions.of_pairs(pairs)
        x = self.encoder(
            self.input(jnp.where(key_mask[:, :, None], nodes, 0)),
            mask,
            tables=tables,
            deterministic=deterministic,
            rngs=rngs,
        )
        total = jnp.where(key_mask[:, :, None], x, jnp.zeros((), x.dtype)).sum(axis=1)
        count = jnp.maximum(key_mask.sum(axis=1), 1)[:, None].astype(x.dtype)
        # A sum of T nodes grows like T: this keeps it near 1 for those of some 16.
        both = jnp.concatenate([total / count, total / 16.0], axis=-1)
        both = self.dropout(both, deterministic=deterministic, rngs=rngs)
        return self.head(jax.nn.gelu(self.hidden(both)))[:, 0]
