"""A fully-attentional image classifier whose heads are placed by what they look at.

Each head of each layer attends by position: at an offset that it learns (quadratic and
Gaussian encodings), or by learned tables of offsets, with or without the content. Such
a layer can be started as the convolution that the theorem makes of it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.attention.convolution import convolution_as_attention
from attn_jax.attention.softmax import dot_product_weights
from attn_jax.exact import Implementation, dot_product_attention
from attn_jax.models.vit import patchify
from attn_jax.nn.encoder import MlpBlock, check_images
from attn_jax.positions import gaussian_2d, quadratic_2d, relative_2d

Encoding = Literal["quadratic", "gaussian", "relative", "relative_content"]
Start = Literal["random", "convolution"]

# Deviation of the entries of learned tables at the start.
_TABLE_STD = 0.5


class PositionalAttention(nnx.Module):
    """Self-attention over a grid of tokens, by positions, as a convolution is.

    O = b + Σ_h softmax(S_h) X W_h, with S_h by the encoding:

    | encoding | scores of head h for the offset δ of the key from the query |
    |---|---|
    | "quadratic" | −½ s² ‖δ − Δ‖², learned centre Δ and spread s |
    | "gaussian" | −½ (δ − Δ)ᵀ A Aᵀ (δ − Δ), learned centre Δ and A [2, 2] |
    | "relative" | r[δ₁] + c[δ₂], learned tables of row and column offsets |
    | "relative_content" | the same + q·k / √H, queries and keys of the tokens |

    W_h [D, D] is the product of the head's value and output maps, learned as one, as in
    the official code. Without content the weights are the same for every image: they
    are computed once, and each head is one product of [T, T] and [T, B · D].

    At a border softmax shares the weight among the tokens that there are; no ring of
    zeros stands around them. A sharp head that looks over the border copies the nearest
    token, so that ``start="convolution"`` is the convolution with its border pixels
    repeated (`numpy.pad` with ``mode="edge"``).

    Parameters of positions are kept as flat vectors, which weight decay of matrices
    leaves alone: it would pull centres towards the query. They are in tokens, so Adam
    moves a centre by a learning rate an update at most.

    Args:
      grid: rows and columns of the tokens, h · w = T.
      dim: width D of the tokens.
      num_heads: number of heads N; k · k for a kernel of side k.
      encoding: see above.
      start: "random": centres from N(0, 2²), spreads 1 + N(0, 0.01²) (A about the unit
        matrix), table entries from N(0, 0.5²). "convolution": heads are those of
        `convolution_as_attention` for a kernel of side √N; for the first two encodings.
      alpha: sharpness α = ½ s² of ``start="convolution"``; a neighbour of the centre
        has e^−α of its weight.
      key_dim: size H of queries and keys, of "relative_content".
      implementation: of attention by content, see `dot_product_attention`.
      dtype: dtype of the computation; parameters stay float32.
      rngs: source of initialisation randomness. W is drawn first, He-normal as the
        kernel of a convolution, alike for all encodings and starts.

    Raises:
      ValueError: for an unknown encoding or start, a start that the encoding has not,
        or a size that is not positive.

    Reference: Cordonnier et al., On the Relationship between Self-Attention and
    Convolutional Layers, arXiv:1911.03584.

    >>> layer = PositionalAttention((3, 4), 8, start="convolution", rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 12, 8))).shape
    (2, 12, 8)
    >>> layer.centres()[:3].tolist()
    [[-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0]]
    """

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        *,
        num_heads: int = 9,
        encoding: Encoding = "quadratic",
        start: Start = "random",
        alpha: float = 12.0,
        key_dim: int = 16,
        implementation: Implementation | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        for name, value, known in (
            ("encoding", encoding, get_args(Encoding)),
            ("start", start, get_args(Start)),
        ):
            if value not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {value!r}."
                )
        for name, size in (
            ("grid", min(grid)),
            ("dim", dim),
            ("num_heads", num_heads),
            ("key_dim", key_dim),
        ):
            if not size > 0:
                raise ValueError(f"{name} must be positive, got {size!r}.")
        self.grid = grid
        self.dim = dim
        self.num_heads = num_heads
        self.encoding = encoding
        self.implementation = implementation
        self.dtype = dtype
        self.content = encoding == "relative_content"
        self.has_centres = encoding in ("quadratic", "gaussian")
        self.separable = encoding in ("quadratic", "relative")

        shape = (num_heads, dim, dim)
        kernel = nnx.initializers.he_normal()(rngs.params(), shape, jnp.float32)
        self.value = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(dim))
        if self.has_centres:
            centres, spreads = self._first_places(start, alpha, rngs)
            self.centre = nnx.Param(centres.reshape(-1))
            self.spread = nnx.Param(spreads.reshape(-1))
        else:
            if start != "random":
                raise ValueError(
                    f"start must be 'random' for encoding {encoding!r}, got {start!r}: "
                    "'quadratic' and 'gaussian' have centres to place."
                )
            tables = [
                _TABLE_STD * jax.random.normal(rngs.params(), (num_heads * offsets,))
                for offsets in (2 * grid[0] - 1, 2 * grid[1] - 1)
            ]
            self.row_table, self.column_table = map(nnx.Param, tables)
        if self.content:
            size = num_heads * key_dim
            self.query = nnx.Linear(dim, size, dtype=dtype, rngs=rngs)
            self.key = nnx.Linear(dim, size, dtype=dtype, rngs=rngs)

    def _first_places(
        self, start: Start, alpha: float, rngs: nnx.Rngs
    ) -> tuple[jax.Array, jax.Array]:
        """Centres [N, 2], and spreads [N] or [N, 2, 2]."""
        heads = self.num_heads
        if start == "convolution":
            side = math.isqrt(heads)
            if side * side != heads:
                raise ValueError(
                    "num_heads must be a square for start='convolution', one head for "
                    f"each place of a square kernel, got {heads}."
                )
            kernel = self.value[...].reshape(side, side, self.dim, self.dim)
            params = convolution_as_attention(kernel, alpha=alpha)
            centres = params["centre"].reshape(heads, 2)
            spreads = jnp.sqrt(2.0 * params["alpha"].reshape(heads))
            if self.encoding == "gaussian":
                spreads = spreads[:, None, None] * jnp.eye(2)[None]
            return centres, spreads
        centres = 2.0 * jax.random.normal(rngs.params(), (heads, 2))
        if self.encoding == "gaussian":
            noise = jax.random.normal(rngs.params(), (heads, 2, 2))
            return centres, jnp.eye(2)[None] + 0.01 * noise
        return centres, 1.0 + 0.01 * jax.random.normal(rngs.params(), (heads,))

    def _need_centres(self) -> None:
        if not self.has_centres:
            raise ValueError(
                f"encoding {self.encoding!r} has no centres: its heads have tables."
            )

    def centres(self) -> jax.Array:
        """Where the heads look, Δ [N, 2], in rows and columns of the grid.

        Raises:
          ValueError: if the encoding has no centres.
        """
        self._need_centres()
        return self.centre[...].reshape(self.num_heads, 2)

    def precisions(self) -> jax.Array:
        """Inverse covariances of the heads' Gaussians, [N, 2, 2], in tokens⁻².

        Raises:
          ValueError: if the encoding has no centres.
        """
        self._need_centres()
        spread = self.spread[...]
        if self.encoding == "quadratic":
            return jnp.square(spread)[:, None, None] * jnp.eye(2)[None]
        factors = spread.reshape(self.num_heads, 2, 2)
        exact = jax.lax.Precision.HIGHEST
        return jnp.matmul(factors, factors.transpose(0, 2, 1), precision=exact)

    def scores(self) -> jax.Array:
        """The scores by position, float32 [N, T, T]."""
        if self.encoding == "gaussian":
            return jax.vmap(lambda c, p: gaussian_2d(*self.grid, c, p))(
                self.centres(), self.precisions()
            )
        (height, width), (rows, columns) = self.grid, self._axis_scores()
        pairs = rows[:, :, None, :, None] + columns[:, None, :, None, :]
        return pairs.reshape(-1, height * width, height * width)

    def _axis_scores(self) -> tuple[jax.Array, jax.Array]:
        """Scores of rows [N, h, h] and of columns [N, w, w], whose sum they are."""
        height, width = self.grid
        if self.encoding == "quadratic":
            centres = self.centres()
            alpha = 0.5 * jnp.square(self.spread[...])
            return (
                jax.vmap(lambda c, a: quadratic_2d(height, 1, c, a))(centres, alpha),
                jax.vmap(lambda c, a: quadratic_2d(1, width, c, a))(centres, alpha),
            )
        rows, columns = (
            table[...].reshape(self.num_heads, -1)
            for table in (self.row_table, self.column_table)
        )
        alone = jnp.zeros(1)
        return (
            jax.vmap(lambda table: relative_2d(table, alone))(rows),
            jax.vmap(lambda table: relative_2d(alone, table))(columns),
        )

    def weights(self, x: jax.Array | None = None) -> jax.Array:
        """The attention weights.

        Args:
          x: tokens [B, T, D], which "relative_content" needs and others ignore.

        Returns:
          [N, T, T]; [B, N, T, T] for "relative_content".

        Raises:
          ValueError: if tokens are needed and not given.
        """
        if not self.content:
            return jax.nn.softmax(self.scores(), axis=-1)
        if x is None:
            raise ValueError("x: weights of 'relative_content' depend on the tokens.")
        query, key = self._queries_and_keys(x)
        per_head = jax.vmap(dot_product_weights, in_axes=(1, 1, 0))
        return jax.vmap(per_head, in_axes=(0, 0, None))(query, key, self.scores())

    def _queries_and_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both [B, T, N, H]."""
        batch, length, _ = x.shape
        flat = x.reshape(batch * length, self.dim)
        shape = (batch, length, self.num_heads, -1)
        return self.query(flat).reshape(shape), self.key(flat).reshape(shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, D] to [B, T, D]."""
        batch, length, dim = x.shape
        if length != math.prod(self.grid) or dim != self.dim:
            raise ValueError(
                f"x must be [B, T, D] with T={math.prod(self.grid)} and D={self.dim}, "
                f"got shape {x.shape}."
            )
        dtype = self.dtype or x.dtype
        x, kernel = x.astype(dtype), self.value[...].astype(dtype)
        if self.content:
            query, key = self._queries_and_keys(x)
            wide = kernel.transpose(1, 0, 2).reshape(dim, self.num_heads * dim)
            value = (x.reshape(batch * length, dim) @ wide).reshape(
                batch, length, self.num_heads, dim
            )
            out = dot_product_attention(
                query,
                key,
                value,
                self.scores()[None],
                implementation=self.implementation,
            ).sum(axis=2)
            return out + self.bias[...].astype(dtype)[None, None]
        # Few, large, plain products, of [T, T] and [T, B · D] or of [h, h] and
        # [h, w · B · D]; then of [T · B, D] and [D, D]. A batched product of small
        # matrices would run at a fraction of their speed on CPU.
        attend = self._attend_by_axes if self.separable else self._attend
        out = attend(x.transpose(1, 0, 2), kernel)
        out = out + self.bias[...].astype(dtype)[None]
        return out.reshape(length, batch, dim).transpose(1, 0, 2)

    def _attend(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Σ_h weights_h X W_h of tokens [T, B, D], as [T · B, D]."""
        length, batch, dim = x.shape
        tokens = x.reshape(length, batch * dim)
        weights = self.weights().astype(x.dtype)
        out = jnp.zeros((length * batch, dim), x.dtype)
        for head in range(self.num_heads):
            seen = weights[head] @ tokens
            out = out + seen.reshape(length * batch, dim) @ kernel[head]
        return out

    def _attend_by_axes(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The same where scores are a sum over axes: rows first, then columns.

        The softmax of r[i] + c[j] over both is that of r times that of c: h + w
        multiplications a number in place of h · w.
        """
        (height, width), (_, batch, dim) = self.grid, x.shape
        rows, columns = (
            jax.nn.softmax(scores, axis=-1).astype(x.dtype)
            for scores in self._axis_scores()
        )
        tokens = x.reshape(height, width * batch * dim)
        out = jnp.zeros((width * height * batch, dim), x.dtype)
        for head in range(self.num_heads):
            seen = (rows[head] @ tokens).reshape(height, width, batch * dim)
            seen = seen.transpose(1, 0, 2).reshape(width, height * batch * dim)
            seen = columns[head] @ seen
            out = out + seen.reshape(width * height * batch, dim) @ kernel[head]
        out = out.reshape(width, height, batch * dim).transpose(1, 0, 2)
        return out.reshape(height * width * batch, dim)


class AttentionImageBlock(nnx.Module):
    """Pre-norm block, ``x ← x + attend(norm(x))``, then ``x ← x + mlp(norm(x))``.

    Args:
      grid, dim: as of `PositionalAttention`.
      mlp_dim: hidden width of the feed-forward network.
      dtype, rngs: as of `PositionalAttention`.
      **attention: what else `PositionalAttention` takes.

    >>> block = AttentionImageBlock((2, 2), 4, mlp_dim=8, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((1, 4, 4))).shape
    (1, 4, 4)
    """

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        *,
        mlp_dim: int,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
        **attention: object,
    ):
        self.attention_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.attention = PositionalAttention(
            grid,
            dim,
            dtype=dtype,
            rngs=rngs,
            **attention,  # type: ignore[arg-type]
        )
        self.mlp_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.mlp = MlpBlock(dim, mlp_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class AttentionImage(nnx.Module):
    """Patches, blocks of `PositionalAttention`, average pooling, linear head.

    Nothing is added to the tokens: where they are, the heads alone know. Blocks are
    pre-norm with a last normalisation, where the official model is post-norm and has
    one more linear map after each attention.

    Args:
      image_shape: (height, width, channels) of the images.
      num_classes: number of labels.
      patch: side in pixels of the squares that become tokens.
      dim, depth, mlp_dim: width, blocks and feed-forward width.
      num_heads, encoding, start, alpha, key_dim, implementation: of every layer, see
        `PositionalAttention`.
      dtype: dtype of the computation; parameters stay float32.
      rngs: source of initialisation randomness.

    Raises:
      ValueError: if the patch does not divide the image, or as `PositionalAttention`.

    Reference: Cordonnier et al., arXiv:1911.03584, section 4.

    >>> model = AttentionImage((8, 8, 1), 10, dim=8, depth=1, mlp_dim=16,
    ...                        rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((3, 8, 8, 1))).shape
    (3, 10)
    >>> model.centres().shape
    (1, 9, 2)
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        patch: int = 2,
        dim: int,
        depth: int,
        mlp_dim: int,
        num_heads: int = 9,
        encoding: Encoding = "quadratic",
        start: Start = "random",
        alpha: float = 12.0,
        key_dim: int = 16,
        implementation: Implementation | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        height, width, channels = image_shape
        if patch < 1 or height % patch or width % patch:
            raise ValueError(
                f"patch must divide the image: got patch={patch} for images of "
                f"{height} x {width} pixels."
            )
        self.patch = patch
        self.grid = (height // patch, width // patch)
        self.channels = channels
        self.embed = nnx.Linear(patch * patch * channels, dim, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                AttentionImageBlock(
                    self.grid,
                    dim,
                    mlp_dim=mlp_dim,
                    num_heads=num_heads,
                    encoding=encoding,
                    start=start,
                    alpha=alpha,
                    key_dim=key_dim,
                    implementation=implementation,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(depth)
            ]
        )
        self.norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(
            dim,
            num_classes,
            kernel_init=nnx.initializers.zeros_init(),
            dtype=dtype,
            rngs=rngs,
        )

    def centres(self) -> jax.Array:
        """Where each head of each layer looks, [layers, N, 2], in rows and columns.

        Raises:
          ValueError: if the encoding has no centres.
        """
        return jnp.stack([block.attention.centres() for block in self.blocks])

    def precisions(self) -> jax.Array:
        """Inverse covariances of the heads' Gaussians, [layers, N, 2, 2].

        Raises:
          ValueError: if the encoding has no centres.
        """
        return jnp.stack([block.attention.precisions() for block in self.blocks])

    def attention_maps(
        self, query: tuple[int, int], images: jax.Array | None = None
    ) -> jax.Array:
        """What each head of each layer attends to from one place of the grid.

        Args:
          query: row and column of the token that asks.
          images: [B, height, width, C], which "relative_content" needs.

        Returns:
          [layers, N, rows, columns], each map summing to one; with a leading axis B for
          "relative_content".

        Raises:
          ValueError: if ``query`` is outside the grid, or images are needed.
        """
        rows, columns = self.grid
        row, column = query
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(
                f"query must be a place of the {rows} x {columns} grid, got {query}."
            )
        at = row * columns + column
        content = self.blocks[0].attention.content
        x = None
        if content:
            if images is None:
                raise ValueError(
                    "images: attention of 'relative_content' depends on them."
                )
            x = self.embed(patchify(images, self.patch))
        maps = []
        for block in self.blocks:
            normed = None if x is None else block.attention_norm(x)
            maps.append(block.attention.weights(normed)[..., at, :])
            x = None if x is None else block(x)
        found = jnp.stack(maps, axis=-3)
        return found.reshape(*found.shape[:-1], rows, columns)

    def __call__(
        self,
        images: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps images [B, height, width, C] to logits [B, classes].

        ``deterministic`` and ``rngs`` are taken so that all models are called
        alike; the network has no randomness.
        """
        check_images(images, self.channels)
        x = self.embed(patchify(images, self.patch))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))
