"""Graphs whose nodes are classified: WordNet's nouns, features of text, baselines.

:func:`load_wordnet` gives 82,115 nodes (sets of synonyms), each with a gloss, the text
that explains it, and one of 26 classes, the file that its lexicographers kept it in:
animal, artifact, person and so on. Edges are WordNet's pointers between nouns: 115,319
pairs of nodes, each with a kind (is a, has part, is of domain ...) that reads the other
way from the other end. The classes nearly follow the pointers: whatever learns here has
to be compared with :func:`label_propagation`.

The file comes from the Debian package ``wordnet-base`` (WordNet licence).

:func:`toy_graph` makes a graph for tests. It is no data.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from experiments.data.fetch import (
    DataError,
    DataSet,
    Files,
    default_cache_dir,
    obtain_file,
    seal,
)
from experiments.data.splits import Three, check_int, random_bits

WORDNET = Files(
    title="The nouns of WordNet 3.0",
    name="wordnet",
    folder="wordnet",
    sha256={
        "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
    },
    other_folders=(".",),
    installed="/usr/share/wordnet",
    package="wordnet-base=1:3.0-37",
    package_sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
)

# Lexicographer files of nouns, by number less 3.
CLASSES = (
    "Tops act animal artifact attribute body cognition communication event feeling "
    "food group location motive object person phenomenon plant possession process "
    "quantity relation shape state substance time"
).split()

# Kinds of pointers between nouns; of each pair, one reads from either end.
_INVERSE = {"@": "~", "@i": "~i", "#m": "%m", "#p": "%p", "#s": "%s"}
_INVERSE |= {";c": "-c", ";r": "-r", ";u": "-u", "+": "+", "!": "!"}
_INVERSE |= {there: here for here, there in _INVERSE.items()}
KINDS = tuple(sorted(_INVERSE))


@dataclasses.dataclass(frozen=True, eq=False)
class NodeGraph(DataSet):
    """A graph in memory, with a text and a class for every node.

    Attributes:
      senders, receivers: int32 [E], for each edge the node that is read and the node
        that reads; sorted by receiver and sender, each pair once, both ways.
      kinds: int32 [E], index into ``kind_names``.
      kind_names: one name a kind of edge.
      labels: int32 [nodes].
      class_names: one name a class.
      texts: one text a node.
    """

    senders: np.ndarray
    receivers: np.ndarray
    kinds: np.ndarray
    kind_names: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def num_nodes(self) -> int:
        """Number of nodes N."""
        return len(self.labels)

    def homophily(self) -> float:
        """Share of the edges whose two nodes have one class."""
        return float(np.mean(self.labels[self.senders] == self.labels[self.receivers]))

    def contents(self) -> str:
        """How many nodes, edges and classes."""
        return (
            f"{self.num_nodes:,} nodes, {len(self.senders) // 2:,} edges, "
            f"{len(self.class_names)} classes, {self.homophily():.0%} of the edges "
            "within a class"
        )


def load_wordnet(cache_dir: str | os.PathLike[str] | None = None) -> NodeGraph:
    """Load the nouns of WordNet, nodes in the order of the file.

    Of several pointers between two nodes, the first counts; a pointer that one end
    alone has is added at the other. `cache_dir` and DataError are those of
    :func:`experiments.data.fetch.obtain`.

    Source: C. Fellbaum (ed.), WordNet: An Electronic Lexical Database, 1998.
    """
    path, source = obtain_file(WORDNET, cache_dir)
    return parse_nouns(path.read_text(encoding="utf-8"), source)


def parse_nouns(text: str, source: str) -> NodeGraph:
    """Read the text of a ``data.noun`` file; `source` says where it came from.

    Raises:
      DataError: a line is not in WordNet's format, or points to a line that is none.

    Format: man page wndb(5WN). A line is ``offset file n words (word id)* pointers
    (kind offset pos ends)* | gloss``, the number of words in base 16; lines that begin
    with a blank are the licence.
    """
    lines = [line for line in text.splitlines() if line and line[0] != " "]
    offsets: list[str] = []
    labels: list[int] = []
    texts: list[str] = []
    pointers: list[tuple[int, str, str]] = []
    for i, line in enumerate(lines):
        head, bar, gloss = line.partition(" | ")
        fields = head.split()
        try:
            place = 4 + 2 * int(fields[3], 16)
            count = int(fields[place])
            quads = fields[place + 1 : place + 1 + 4 * count]
            label = int(fields[1]) - 3
            if not (bar and len(quads) == 4 * count and 0 <= label < len(CLASSES)):
                raise ValueError("fields are missing or a number is out of range")
        except (IndexError, ValueError) as error:
            raise DataError(
                f"{source}: {line[:60]!r} is not a line of WordNet's nouns ({error})"
            ) from error
        offsets.append(fields[0])
        labels.append(label)
        texts.append(gloss.strip())
        for kind, there, part in zip(quads[::4], quads[1::4], quads[2::4], strict=True):
            if part == "n":
                pointers.append((i, kind, there))
    number = {offset: i for i, offset in enumerate(offsets)}
    kind_number = {kind: k for k, kind in enumerate(KINDS)}
    try:
        listed = [(i, number[there], kind_number[kind]) for i, kind, there in pointers]
        mirrored = [(j, i, kind_number[_INVERSE[KINDS[k]]]) for i, j, k in listed]
    except KeyError as error:
        raise DataError(
            f"{source}: a pointer has a kind or an offset that is none: {error}"
        ) from error
    return _graph("wordnet", source, listed + mirrored, KINDS, labels, CLASSES, texts)


def _graph(
    name: str,
    source: str,
    edges: ArrayLike,
    kind_names: Sequence[str],
    labels: ArrayLike,
    class_names: Sequence[str],
    texts: Sequence[str],
) -> NodeGraph:
    """A graph of (receiver, sender, kind); of equal pairs, the first counts."""
    rows = np.asarray(edges, np.int64).reshape(-1, 3)
    classes = np.array(labels, np.int32)
    codes = rows[:, 0] * max(1, len(classes)) + rows[:, 1]
    _, first = np.unique(codes, return_index=True)
    receivers, senders, kinds = rows[first].T.astype(np.int32)
    arrays = [np.ascontiguousarray(x) for x in (receivers, senders, kinds, classes)]
    for array in arrays:
        array.flags.writeable = False
    receivers, senders, kinds, classes = arrays
    names = "\n".join((*kind_names, *class_names, *texts))
    return NodeGraph(
        name=name,
        source=source,
        sha256=seal(*(array.tobytes() for array in arrays), names),
        senders=senders,
        receivers=receivers,
        kinds=kinds,
        kind_names=tuple(kind_names),
        labels=classes,
        class_names=tuple(class_names),
        texts=tuple(texts),
    )


def toy_graph(num_nodes: int, seed: int) -> NodeGraph:
    """A graph of three groups, for tests, with two kinds of edges.

    Edges and words mostly stay within a group.

    >>> toy_graph(30, seed=0).num_nodes
    30
    """
    check_int("num_nodes", num_nodes, 3)
    rng = np.random.default_rng([seed, 31])
    labels = np.arange(num_nodes) % 3
    edges = []
    for i in range(num_nodes):
        for _ in range(2):
            same = rng.random() < 0.8
            choice = np.flatnonzero((labels == labels[i]) == same)
            j = int(rng.choice(choice))
            edges += [(i, j, int(same)), (j, i, int(same))] if i != j else []
    words = rng.integers(0, 9, (num_nodes, 4)) + 3 * labels[:, None]
    texts = [" ".join(2 * chr(ord("a") + w) for w in row) for row in words]
    source = f"generated with seed {seed}: no data, for tests only"
    return _graph(
        "toy_graph", source, edges, ("odd", "even"), labels.tolist(), "abc", texts
    )


def first_nodes(graph: NodeGraph, count: int) -> NodeGraph:
    """The first `count` nodes of a graph, or all, and the edges between them.

    >>> first_nodes(toy_graph(9, seed=0), 5).num_nodes
    5
    """
    kept = (graph.senders < count) & (graph.receivers < count)
    edges = np.stack([graph.receivers, graph.senders, graph.kinds], axis=1)[kept]
    return _graph(
        graph.name,
        graph.source,
        edges,
        graph.kind_names,
        graph.labels[:count],
        graph.class_names,
        graph.texts[:count],
    )


# --- For models --------------------------------------------------------------------


def attention_edges(graph: NodeGraph) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The edges that attention runs on: those of the graph, and a loop at every node.

    Returns:
      Senders, receivers and kinds, each int32 [E + N], sorted by receiver; a loop is
      of the kind ``len(graph.kind_names)``.

    >>> graph = toy_graph(9, seed=0)
    >>> senders, receivers, kinds = attention_edges(graph)
    >>> int((senders == receivers).sum()), int(kinds.max())
    (9, 2)
    """
    nodes = np.arange(graph.num_nodes, dtype=np.int32)
    loops = np.full_like(nodes, len(graph.kind_names))
    senders = np.concatenate([graph.senders, nodes])
    receivers = np.concatenate([graph.receivers, nodes])
    kinds = np.concatenate([graph.kinds, loops])
    order = np.lexsort((senders, receivers))
    return senders[order], receivers[order], kinds[order]


def split_nodes(num_nodes: int, *, test: int, validation: int, seed: int = 0) -> Three:
    """Split the nodes in three; the first n for training are the part of size n.

    Returns:
      ``(train, validation, test)``, each int64 indices, the first in random order.

    Raises:
      ValueError: no node is left for training.

    >>> train, val, test = split_nodes(10, test=3, validation=2)
    >>> len(train), len(val), len(test)
    (5, 2, 3)
    """
    if min(test, validation) < 1 or test + validation >= num_nodes:
        raise ValueError(
            f"test and validation must be at least 1 and leave some of the {num_nodes} "
            f"nodes for training, got {test} and {validation}"
        )
    order = np.argsort(random_bits(seed, 7).random_raw(num_nodes), kind="stable")
    rest = order[test + validation :]
    return rest, np.sort(order[test : test + validation]), np.sort(order[:test])


# Raise it where `text_features` makes other vectors of the same texts.
TEXT_FEATURES = 1


def text_features(
    graph: NodeGraph, dims: int, cache_dir: str | os.PathLike[str] | None = None
) -> np.ndarray:
    """Vectors of the nodes' texts: singular vectors of TF-IDF, without any label.

    They are made once for a graph and kept in the cache.

    Returns:
      float32 [N, dims], each column of mean 0 and deviation 1.

    >>> text_features(toy_graph(30, seed=0), 4, cache_dir=None).shape
    (30, 4)
    """
    cache = pathlib.Path(cache_dir) if cache_dir is not None else default_cache_dir()
    made_of = f"{graph.name}-{dims}-{graph.sha256[:16]}-v{TEXT_FEATURES}"
    path = cache / "text-features" / f"{made_of}.npy"
    if path.is_file():
        try:
            kept = np.load(path, allow_pickle=False)
            if kept.shape == (graph.num_nodes, dims) and np.isfinite(kept).all():
                return kept
        except (OSError, ValueError):
            pass  # made anew below
    from sklearn.decomposition import TruncatedSVD

    found = TruncatedSVD(dims, random_state=0).fit_transform(tf_idf(graph))
    found = ((found - found.mean(0)) / (found.std(0) + 1e-9)).astype(np.float32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
            np.save(stream, found)
        os.replace(stream.name, path)
    except OSError:
        pass  # a cache that cannot be written costs time alone
    return found


def tf_idf(graph: NodeGraph) -> object:
    """Sparse matrix [N, words] of the texts; words of one node alone are left out."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        sublinear_tf=True, min_df=2, token_pattern="[a-z]+", dtype=np.float32
    ).fit_transform(graph.texts)


# --- Baselines ---------------------------------------------------------------------


def label_propagation(
    senders: np.ndarray,
    receivers: np.ndarray,
    labels: np.ndarray,
    known: np.ndarray,
    num_classes: int,
    *,
    steps: int = 50,
) -> np.ndarray:
    """Classes of all nodes as a harmonic function of the known ones.

    F ← D⁻¹ A F, with the rows of known nodes set back to their one-hot label after
    every step, from F = the classes' shares among the known.

    Args:
      senders, receivers: [E] edges without loops.
      labels: int [N]; those of ``known`` alone are read.
      known: [n] indices of the nodes whose label is given.
      num_classes: number of classes C.
      steps: how often to average.

    Returns:
      float64 [N, C], rows of sum 1.

    Raises:
      ValueError: no label is known.

    Reference: X. Zhu, Z. Ghahramani and J. Lafferty, Semi-supervised learning using
    Gaussian fields and harmonic functions, ICML 2003.

    >>> chain = np.array([0, 1, 1, 2]), np.array([1, 0, 2, 1])
    >>> F = label_propagation(*chain, np.array([0, 9, 1]), np.array([0, 2]), 2)
    >>> F.tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    from scipy import sparse

    if len(known) == 0:
        raise ValueError("known must name at least one node, got none")
    count = len(labels)
    degree = np.bincount(receivers, minlength=count)
    weights = 1.0 / degree[receivers]
    average = sparse.csr_matrix((weights, (receivers, senders)), shape=(count, count))
    given = np.eye(num_classes)[labels[known]]
    prior = given.mean(0)
    found = np.tile(prior, (count, 1))
    alone = degree == 0
    for _ in range(steps):
        found[known] = given
        found = average @ found
        found[alone] = prior
    found[known] = given
    return found
