"""Theorems on attention that execute: `python -m attn_jax theorems`.

Each statement is computed on numbers. A result says in which setting, how far the two
sides are apart at most, and how far they may be. What is said not to hold has a result
too: its two sides must differ by at least so much.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax import attention, masks
from attn_jax.attention import dot_product
from attn_jax.tools.cost import count_flops

__all__ = ["THEOREMS", "Result", "Theorem", "run", "table"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One setting in which a statement was computed.

    Attributes:
      theorem: its name in `THEOREMS`.
      claim: what is compared, in this setting.
      measured: the largest difference, or another figure that `claim` names.
      bound: what it must not exceed, or must reach.
      relation: "<=" if `measured` must not exceed `bound`, ">=" if it must reach it.
    """

    theorem: str
    claim: str
    measured: float
    bound: float
    relation: Literal["<=", ">="] = "<="

    @property
    def holds(self) -> bool:
        """Whether the figure is on the right side of its bound."""
        if self.relation == "<=":
            return self.measured <= self.bound
        return self.measured >= self.bound

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self) | {"holds": self.holds}


Settings = Iterator[tuple[str, float, float] | tuple[str, float, float, str]]


@dataclasses.dataclass(frozen=True)
class Theorem:
    """A statement and how to compute it.

    Attributes:
      statement: in a sentence or two.
      source: where it is from.
      settings: yields (claim, measured, bound), and ">=" where it must be reached.
    """

    statement: str
    source: str
    settings: Callable[[], Settings]


def _draw(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    rng = np.random.default_rng((seed, *shape))
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


def _inputs(length: int, head_dim: int = 16, seed: int = 0, scale: float = 1.0) -> Any:
    """Query, key and value of one sequence."""
    return tuple(
        _draw(length, head_dim, seed=seed + i, scale=scale if i < 2 else 1.0)
        for i in range(3)
    )


def _away(got: Any, want: Any) -> float:
    """Largest absolute difference of two arrays; infinite if not all are finite."""
    difference = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


# ------------------------------------------------------------------- convolution


def _convolution() -> Settings:
    image = _draw(9, 8, 3)
    cases: tuple[tuple[int, int, Literal["SAME", "VALID"], bool], ...] = (
        (3, 3, "SAME", False),
        (5, 5, "SAME", True),
        (2, 4, "SAME", True),
        (3, 2, "VALID", True),
    )
    for height, width, padding, with_bias in cases:
        kernel = _draw(height, width, 3, 4, seed=height)
        bias = _draw(4, seed=5) if with_bias else None
        want = jax.lax.conv_general_dilated(
            image[None],
            kernel,
            (1, 1),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )[0]
        want = want if bias is None else want + bias[None, None, :]
        errors = []
        for alpha in (1.0, 2.0, 4.0, 8.0, 32.0):
            params = attention.convolution_as_attention(kernel, bias, alpha=alpha)
            got = attention.attention_convolution(params, image, padding)
            errors.append(_away(got, want))
        what = (
            f"kernel {height}x{width}, {padding}, bias: {'yes' if with_bias else 'no'}"
        )
        yield f"{what}: all pixels, alpha = 32", errors[-1], 2e-5
        if padding == "SAME":
            edge = np.ones(want.shape[:2], bool)
            edge[height:-height, width:-width] = False
            away = _away(np.asarray(got)[edge], np.asarray(want)[edge])
            yield f"{what}: border pixels alone, zeros outside", away, 2e-5
        ratios = [b / a for a, b in zip(errors[:3], errors[1:4], strict=True)]
        yield f"{what}: error at 2 alpha over that at 1, 2, 4", max(ratios), 0.75


# ----------------------------------------------------------------------- the RNN


def _linear_rnn() -> Settings:
    query, key, value = _inputs(300)
    padding = jnp.arange(300) % 7 != 3
    for name, key_mask in (("", None), (", with padding in between", padding)):
        parallel = attention.linear_parallel(
            query, key, value, key_mask=key_mask, is_causal=True
        )
        for size in (1, 64, 300):
            chunked = attention.linear(
                query, key, value, key_mask=key_mask, is_causal=True, chunk_size=size
            )
            yield (
                f"parallel = chunks of {size}, T = 300{name}",
                _away(chunked, parallel),
                1e-5,
            )
        recurrent = attention.linear_recurrent(query, key, value, key_mask=key_mask)
        yield f"parallel = recurrent, T = 300{name}", _away(recurrent, parallel), 1e-5

    def slopes(fn: Callable[..., jax.Array]) -> Any:
        loss = jax.grad(lambda q, k, v: (fn(q, k, v) ** 2).sum(), (0, 1, 2))
        return jax.jit(loss)(query, key, value)

    first = slopes(functools.partial(attention.linear_parallel, is_causal=True))
    for name, fn in (
        ("chunked", functools.partial(attention.linear, is_causal=True)),
        ("recurrent", attention.linear_recurrent),
    ):
        worst = max(map(_away, slopes(fn), first))
        yield f"gradients of the parallel and the {name} form", worst, 1e-3
    costs = []
    for length in (256, 4096):
        q, k, v = _inputs(length)
        costs.append(count_flops(attention.linear_recurrent, q, k, v).total / length)
    yield (
        "FLOPs a step at T = 4,096 over T = 256, less 1",
        abs(costs[1] / costs[0] - 1),
        0.02,
    )
    state = attention.linear_init_state(16, 16, jnp.float32)
    before = sum(leaf.size for leaf in jax.tree.leaves(state))
    for t in range(5):
        state, _ = attention.linear_step(state, query[t], key[t], value[t])
    after = sum(leaf.size for leaf in jax.tree.leaves(state))
    yield "numbers in the state that a step adds", float(after - before), 0.0


# ------------------------------------------------------------------------- graphs


def _graph() -> Settings:
    length, head_dim = 24, 16
    query, key, value = _inputs(length, head_dim)
    rng = np.random.default_rng(3)
    adjacency = rng.random((length, length)) < 0.2
    adjacency[5] = False  # a node without neighbours
    receivers, senders = (jnp.asarray(x, jnp.int32) for x in np.nonzero(adjacency))
    everyone = np.indices((length, length)).reshape(2, -1)
    dense_forms: dict[str, tuple[Callable[..., jax.Array], Any]] = {
        "dot_product": (dot_product, None),
        "gat": (attention.gat, attention.gat_init(jax.random.key(0), head_dim)),
        "gatv2": (attention.gatv2, attention.gatv2_init(jax.random.key(1), head_dim)),
    }
    for score, (dense, params) in dense_forms.items():
        extra = {} if params is None else {"params": params}
        given: Any = dict(extra, score=score)
        want = dense(query, key, value, mask=jnp.asarray(adjacency), **extra)
        got = attention.graph_attention(query, key, value, senders, receivers, **given)
        yield (
            f"edge list = dense mask, {score} scores, 24 nodes",
            _away(got, want),
            1e-5,
        )
        complete = attention.graph_attention(
            query,
            key,
            value,
            jnp.asarray(everyone[1], jnp.int32),
            jnp.asarray(everyone[0], jnp.int32),
            **given,
        )
        plain = dense(query, key, value, **extra)
        yield (
            f"complete graph = attention without a mask, {score} scores",
            _away(complete, plain),
            1e-5,
        )
    # Rankings: the weights are read off with the identity as values.
    identity = jnp.eye(length, dtype=jnp.float32)
    worst = 0.0
    for seed in range(8):
        q, k, _ = _inputs(length, head_dim, seed=10 * seed)
        params = attention.gat_init(jax.random.key(seed), head_dim)
        weights = np.asarray(attention.gat(q, k, identity, params=params), np.float64)
        # The order of keys by query 0; along it no other query's weights may fall.
        order = np.argsort(weights[0])
        steps = np.diff(weights[:, order], axis=1)
        worst = max(worst, float(np.maximum(-steps, 0.0).max()))
    yield "GAT: a fall of weights along the ranking of query 0, 8 draws", worst, 1e-6
    # GATv2 on one dimension: |q + k| is smallest where key = -query.
    points = jnp.linspace(-1.0, 1.0, 5)[:, None]
    pair = jnp.concatenate([points, -points], axis=1)
    params = {"score": jnp.asarray([-50.0, -50.0])}
    found = attention.gatv2(pair, -pair, jnp.eye(5, dtype=jnp.float32), params=params)
    best = np.asarray(found).argmax(axis=1)
    yield (
        "GATv2: different best keys for 5 queries (the dictionary look-up)",
        float(len(set(best.tolist()))),
        5.0,
        ">=",
    )


# ---------------------------------------------------------------------- truncated


def _truncated() -> Settings:
    query, key, value = _inputs(97)
    masked = jax.jit(dot_product)
    for left, right in ((0, 0), (5, 3), (20, 0), (96, 96)):
        banded = functools.partial(attention.truncated, left=left, right=right)
        got = jax.jit(banded)(query, key, value)
        want = masked(query, key, value, mask=masks.window(97, left, right))
        yield (
            f"truncated = band mask, left {left}, right {right}",
            _away(got, want),
            1e-5,
        )
    for layers, left, right in ((1, 4, 2), (3, 4, 2), (4, 3, 1)):
        x = _draw(41, 8, scale=0.3)  # so that no weight is lost in rounding

        def stack(
            x: jax.Array, layers: int = layers, left: int = left, right: int = right
        ) -> jax.Array:
            for _ in range(layers):
                x = x + attention.truncated(x, x, x, left=left, right=right)
            return x[20]

        grads = jax.jit(jax.jacrev(stack))(x)  # [8, 41, 8]
        seen = np.flatnonzero(np.abs(np.asarray(grads)).sum(axis=(0, 2)))
        told = f"{layers} layers of ({left}, {right}): frames seen"
        ahead, behind = int(seen.max()) - 20, 20 - int(seen.min())
        yield f"{told} ahead, less {layers}x{right}", abs(ahead - layers * right), 0.0
        yield f"{told} behind, less {layers}x{left}", abs(behind - layers * left), 0.0


# ---------------------------------------------------------------------- positions


def _positions() -> Settings:
    from attn_jax import positions

    length, dim = 32, 16
    x = _draw(length, dim)
    order = np.random.default_rng(1).permutation(length)

    def broken(attend: Callable[[jax.Array], jax.Array]) -> float:
        """How far permuting the tokens is from permuting the outputs."""
        attend = jax.jit(attend)
        return _away(attend(x[order]), attend(x)[order])

    def plain(x: jax.Array, **given: Any) -> jax.Array:
        return dot_product(x, x, x, **given)

    yield "no positions: attention of permuted tokens, T = 32", broken(plain), 1e-5

    def rotated(x: jax.Array) -> jax.Array:
        at = jnp.arange(length)
        turned = positions.rotary(x, at)
        return dot_product(turned, turned, x)

    shaw_params = attention.shaw_init(jax.random.key(0), dim)
    shaw_params = jax.tree.map(
        lambda leaf: leaf + 0.5 * _draw(*leaf.shape), shaw_params
    )
    xl_params = attention.transformer_xl_init(jax.random.key(1), dim)
    t5_table = _draw(32, seed=4)
    encodings: dict[str, Callable[[jax.Array], jax.Array]] = {
        "sinusoidal": lambda x: plain(x + positions.sinusoidal_1d(length, dim)),
        "learned": lambda x: plain(
            x + positions.learned_init(jax.random.key(2), length, dim, stddev=1.0)
        ),
        "sinusoidal in two dimensions": lambda x: plain(
            x + positions.sinusoidal_2d(4, length // 4, dim)
        ),
        "quadratic in two dimensions": lambda x: plain(
            x,
            bias=positions.quadratic_2d(4, length // 4, jnp.asarray([1.0, -1.0]), 0.5),
        ),
        "Gaussian in two dimensions": lambda x: plain(
            x,
            bias=positions.gaussian_2d(
                4,
                length // 4,
                jnp.asarray([0.0, 1.0]),
                jnp.asarray([[1.0, 0.3], [0.3, 0.5]]),
            ),
        ),
        "RoPE": rotated,
        "ALiBi": lambda x: plain(x, bias=positions.alibi(length, slope=0.5)),
        "T5 buckets": lambda x: plain(x, bias=positions.t5_bias(t5_table, length)),
        "Shaw": lambda x: attention.shaw(x, x, x, params=shaw_params),
        "Transformer-XL": lambda x: attention.transformer_xl(x, x, x, params=xl_params),
    }
    for name, attend in encodings.items():
        yield f"{name}: attention of permuted tokens", broken(attend), 1e-2, ">="
    q, k = _draw(length, dim, seed=8), _draw(length, dim, seed=9)

    def scores(shift: int) -> jax.Array:
        at = jnp.arange(length) + shift
        return positions.rotary(q, at) @ positions.rotary(k, at).T

    for shift in (1, 17, 500):
        away = _away(scores(shift), scores(0))
        yield f"RoPE: scores with all positions {shift} later", away, 2e-3
    want = plain(x)
    zero = {
        "ALiBi, slope 0": plain(x, bias=positions.alibi(length, slope=0.0)),
        "T5, table 0": plain(x, bias=positions.t5_bias(jnp.zeros(32), length)),
        "Shaw, tables 0": attention.shaw(
            x, x, x, params=jax.tree.map(jnp.zeros_like, shaw_params)
        ),
        "Transformer-XL, parameters 0": attention.transformer_xl(
            x, x, x, params=jax.tree.map(jnp.zeros_like, xl_params)
        ),
    }
    for name, got in zero.items():
        yield f"{name} = plain attention", _away(got, want), 1e-5
    table = np.asarray(positions.sinusoidal_1d(64, dim), np.float64)
    angles = 10_000.0 ** (-np.arange(0, dim, 2) / dim)
    for shift in (1, 5, 30):
        turned = np.empty_like(table[:-shift])
        cos, sin = np.cos(shift * angles), np.sin(shift * angles)
        turned[:, 0::2] = cos * table[:-shift, 0::2] + sin * table[:-shift, 1::2]
        turned[:, 1::2] = cos * table[:-shift, 1::2] - sin * table[:-shift, 0::2]
        away = _away(turned, table[shift:])
        yield f"sinusoids {shift} later = a rotation of each pair", away, 2e-5


# ------------------------------------------------------------------------- limits


def _limit_forms(length: int, head_dim: int) -> Iterator[tuple[str, str, Any]]:
    """Claims, the name of a variant, and what it is given in its limit."""
    rng = jax.random.key(0)

    def made(name: str, **options: Any) -> Any:
        return getattr(attention, f"{name}_init")(rng, head_dim, **options)

    def zeros(name: str) -> Any:
        return jax.tree.map(jnp.zeros_like, made(name))

    near = "window or block >= T"
    yield near, "truncated", dict(left=length, right=length)
    yield near, "block_local", dict(block_size=length)
    yield near, "longformer", dict(window=length)
    yield near, "sparse_strided", dict(stride=length)
    yield near, "sparse_fixed", dict(block_size=length)
    yield near, "axial", dict(width=length)
    yield "radius >= T, labels 0", "etc", dict(params=zeros("etc"), radius=length)
    yield "one block", "bigbird", dict(rng=rng, block_size=length)
    pooled = made("linformer", max_length=length, rank=length, scheme="pool")
    yield "rank T (pooling over one key each)", "linformer", dict(params=pooled)
    pooled = made("memory_compressed", compression=1, scheme="pool")
    yield "windows of one key", "memory_compressed", dict(params=pooled)
    landmarks = dict(num_landmarks=length, pinv_iterations=30)
    none = zeros("nystromformer")
    yield "T landmarks", "nystromformer", dict(params=none, **landmarks)
    # Two buckets, and so many rounds that every pair shares one in some of them.
    rounds = dict(num_buckets=2, chunk_size=length, num_rounds=96)
    yield "96 rounds of 2 buckets", "reformer", dict(rng=rng, **rounds)
    each = dict(rng=rng, num_clusters=length)
    yield "a cluster for each query", "clustered", each
    exact = dict(rng=rng, num_clusters=3, top_k=length)
    yield "all keys exact", "improved_clustered", exact
    for name in ("clusterformer", "routing"):
        centre = made(name, num_clusters=1)
        yield "one cluster and chunk", name, dict(params=centre, chunk_size=length)
    block = dict(block_size=length)
    params = made("sinkhorn", max_length=length, **block)
    yield "one block", "sinkhorn", dict(params=params, **block)


def _limits() -> Settings:
    inputs = _inputs(48, 16)
    for claim, name, given in _limit_forms(48, 16):
        fn: Callable[..., jax.Array] = getattr(attention, name)
        limit = getattr(attention, f"{name}_exact", dot_product)
        arrays = {k: x for k, x in given.items() if k in ("params", "rng")}
        options = {k: x for k, x in given.items() if k not in arrays}
        causal = "is_causal" in inspect.signature(fn).parameters
        for is_causal in (False, True) if causal else (False,):
            how = {"is_causal": is_causal} if causal else {}
            got = jax.jit(functools.partial(fn, **options, **how))(*inputs, **arrays)
            told = f"{name}, {claim}{', causal' if is_causal else ''}"
            bound = 2e-3 if name == "nystromformer" else 1e-5
            yield told, _away(got, limit(*inputs, is_causal=is_causal)), bound


def _rate(
    attend: Callable[..., jax.Array],
    exact: jax.Array,
    counts: Sequence[int],
    draws: int,
) -> tuple[float, float]:
    """Exponent of the error in the number of features, and the last error."""
    errors = []
    for count in counts:
        each = jax.jit(jax.vmap(functools.partial(attend, num_features=count)))(
            jax.random.split(jax.random.key(count), draws)
        )
        square = np.mean((np.asarray(each) - np.asarray(exact)[None]) ** 2)
        errors.append(float(np.sqrt(square)))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    return float(slope), errors[-1]


def _features() -> Settings:
    query, key, value = _inputs(24, 8, scale=0.35)
    counts = (64, 256, 1024, 4096)
    exact = dot_product(query, key, value)
    forms: dict[str, tuple[Callable[..., jax.Array], jax.Array]] = {
        "performer, orthogonal": (attention.performer, exact),
        "performer, independent": (
            functools.partial(attention.performer, orthogonal=False),
            exact,
        ),
        "performer, causal": (
            functools.partial(attention.performer, is_causal=True),
            dot_product(query, key, value, is_causal=True),
        ),
        "rfa": (
            attention.rfa,
            attention.rfa_exact(query, key, value),
        ),
    }
    for name, (fn, want) in forms.items():

        def attend(rng: jax.Array, *, num_features: int, fn: Any = fn) -> jax.Array:
            return fn(query, key, value, rng=rng, num_features=num_features)

        slope, error = _rate(attend, want, counts, 32)
        told = f"{name}: error ~ features^{slope:.2f}, {error:.4f} at 4,096"
        yield f"{told}; distance of the exponent from -1/2", abs(slope + 0.5), 0.12


def _patterns() -> Settings:
    length = 50
    query, key, value = _inputs(length)
    bias = _draw(length, length, seed=6)
    masked = jax.jit(dot_product)
    t, s = np.indices((length, length))
    forms: dict[str, tuple[Callable[..., jax.Array], np.ndarray]] = {
        "truncated (7, 4)": (
            functools.partial(attention.truncated, left=7, right=4),
            (s >= t - 7) & (s <= t + 4),
        ),
        "block_local, blocks of 8 and the one before": (
            functools.partial(attention.block_local, block_size=8, look_back=1),
            (t // 8 == s // 8) | (t // 8 == s // 8 + 1),
        ),
        "block_local, blocks of 8 and the two after": (
            functools.partial(attention.block_local, block_size=8, look_ahead=2),
            (s // 8 >= t // 8) & (s // 8 <= t // 8 + 2),
        ),
        "sparse_strided 6": (
            functools.partial(attention.sparse_strided, stride=6),
            (abs(t - s) <= 6) | ((t - s) % 6 == 0),
        ),
        "sparse_fixed 8, 2": (
            functools.partial(attention.sparse_fixed, block_size=8, num_summary=2),
            (t // 8 == s // 8) | (s % 8 >= 6),
        ),
        "longformer 3, dilation 2, 2 global": (
            functools.partial(attention.longformer, window=3, dilation=2, num_global=2),
            ((abs(t - s) <= 6) & ((t - s) % 2 == 0)) | (t < 2) | (s < 2),
        ),
    }
    for name, (fn, seen) in forms.items():
        for is_causal in (False, True):
            pairs = seen & (s <= t) if is_causal else seen
            attend = jax.jit(functools.partial(fn, is_causal=is_causal))
            got = attend(query, key, value, bias)
            want = masked(query, key, value, bias, mask=jnp.asarray(pairs))
            how = ", causal" if is_causal else ""
            yield f"{name}{how} = dot_product under its mask", _away(got, want), 1e-5
    grid = (t // 8 == s // 8) | (t % 8 == s % 8)
    for is_causal in (False, True):
        pairs = grid & (s <= t) if is_causal else grid
        attend = jax.jit(
            functools.partial(attention.axial, width=8, is_causal=is_causal)
        )
        got = attend(query, key, value)
        want = masked(query, key, value, mask=jnp.asarray(pairs))
        how = ", causal" if is_causal else ""
        yield f"axial, a grid 8 wide{how} = its mask", _away(got, want), 1e-5
    # Where the pattern is drawn or learned, it is read off: who has a gradient to whom.
    labels = jax.tree.map(jnp.zeros_like, attention.etc_init(jax.random.key(0), 16))
    read_off: dict[str, Callable[..., jax.Array]] = {
        "bigbird, blocks of 4": functools.partial(
            attention.bigbird, rng=jax.random.key(4), block_size=4, num_random_blocks=2
        ),
        "etc, radius 3, 4 global, labels 0": functools.partial(
            attention.etc, params=labels, radius=3, num_global=4
        ),
    }
    for name, fn in read_off.items():
        attend = jax.jit(fn)
        jacobian = jax.jacrev(lambda v, at=attend: at(query, key, v)[:, 0])(value)
        sees = np.abs(np.asarray(jacobian)[:, :, 0]) > 0
        got = attend(query, key, value, bias)
        want = masked(query, key, value, bias, mask=jnp.asarray(sees))
        share = f"{sees.mean():.0%} of all pairs"
        yield f"{name} = the mask read off it, {share}", _away(got, want), 1e-5


THEOREMS: dict[str, Theorem] = {
    "convolution": Theorem(
        "Any convolution is multi-head attention with a quadratic relative encoding: "
        "one head a kernel position, hard attention as alpha grows. With SAME padding, "
        "a ring of zero tokens outside of the image stands for its zeros.",
        "Cordonnier et al., 2020, arXiv:1911.03584, theorem 1",
        _convolution,
    ),
    "linear_rnn": Theorem(
        "Causal linear attention is a recurrent network: its parallel, chunked and "
        "recurrent forms are equal, and a step costs the same at every position.",
        "Katharopoulos et al., 2020, arXiv:2006.16236, sections 3.3 and 3.4",
        _linear_rnn,
    ),
    "graph": Theorem(
        "Graph attention is masked attention: an edge list equals the dense mask, and "
        "on the complete graph it is plain attention. GAT ranks keys alike for all "
        "queries; GATv2 does not.",
        "Velickovic et al., 2018, arXiv:1710.10903; Brody et al., 2022, "
        "arXiv:2105.14491, theorems 1 and 2",
        _graph,
    ),
    "truncated": Theorem(
        "Truncated attention is attention under a band mask, and L layers with a "
        "look-ahead of R see exactly L x R frames ahead.",
        "Yeh et al., 2019, arXiv:1910.12977, section 3.2",
        _truncated,
    ),
    "positions": Theorem(
        "Without positions self-attention is equivariant to permutations, and with "
        "each encoding it is not. RoPE scores depend on i - j alone; ALiBi, T5, Shaw "
        "and Transformer-XL become plain attention at zero; a shift of sinusoids is a "
        "rotation.",
        "arXiv:1706.03762, section 3.5; 2104.09864; 2108.12409; 1910.10683; "
        "1803.02155; 1901.02860",
        _positions,
    ),
    "limits": Theorem(
        "Every variant that approximates exact attention reaches it in its limit "
        "(random features: see `features`).",
        "the paper of each variant; see `python -m attn_jax list`",
        _limits,
    ),
    "features": Theorem(
        "Random features converge to exact attention as the root of their number.",
        "Choromanski et al., 2021, arXiv:2009.14794, theorem 2; Peng et al., 2021, "
        "arXiv:2103.02143",
        _features,
    ),
    "patterns": Theorem(
        "Every sparse pattern equals dense attention under its own mask.",
        "the paper of each variant; see `python -m attn_jax list`",
        _patterns,
    ),
}
"""The statements by name."""


def run(names: Sequence[str] | None = None) -> list[Result]:
    """Computes theorems.

    Args:
      names: of `THEOREMS`; None takes all.

    Returns:
      A result for each setting.

    Raises:
      ValueError: if there is no such theorem.

    >>> all(result.holds for result in run(["truncated"]))
    True
    """
    for name in names or ():
        if name not in THEOREMS:
            raise ValueError(f"no theorem {name!r}; there are: {', '.join(THEOREMS)}.")
    results = []
    for name in names or THEOREMS:
        for setting in THEOREMS[name].settings():
            claim, measured, bound, *relation = setting
            told: Any = relation[0] if relation else "<="
            results.append(Result(name, claim, float(measured), bound, told))
    return results


def table(results: Sequence[Result], *, width: int = 100) -> str:
    """Statement, source and settings as text.

    Args:
      results: from `run`.
      width: of a line.

    Returns:
      Lines.
    """
    lines: list[str] = []
    for number, name in enumerate(dict.fromkeys(r.theorem for r in results), start=1):
        theorem = THEOREMS[name]
        lines += textwrap.wrap(f"{number}. {name}: {theorem.statement}", width)
        lines += textwrap.wrap(f"   Source: {theorem.source}", width)
        for result in (r for r in results if r.theorem == name):
            mark = "holds" if result.holds else "FAILS"
            figures = f"{result.measured:.1e} {result.relation} {result.bound:.0e}"
            lines += textwrap.wrap(
                f"{mark}  {figures}  {result.claim}",
                width,
                initial_indent="   ",
                subsequent_indent=" " * 31,
            )
        lines.append("")
    wrong = sum(not result.holds for result in results)
    said = f"{wrong} do not hold" if wrong else "all hold"
    lines.append(f"{len(results)} settings: {said}")
    return "\n".join(lines)
