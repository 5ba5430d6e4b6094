"""One variant, made ready to be called: inputs, parameters, options, gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention._scores import score_dtype
from attn_jax.variant import Variant

__all__ = [
    "LONG",
    "REFUSALS",
    "Trial",
    "float_leaves",
    "joined",
    "quick_compile",
    "relative_error",
    "split_moving",
]

Arrays = dict[str, Any]

# Lengths at which blocks of the sizes in `Variant.trial` are neither one nor whole.
NUM_QUERIES, NUM_KEYS, HEAD_DIM, VALUE_DIM = 37, 53, 8, 5

# A length beyond the blocks that functions commonly have.
LONG = 300

# What a function raises to refuse; chex raises AssertionError.
REFUSALS = (TypeError, ValueError, AssertionError, NotImplementedError)


@contextlib.contextmanager
def quick_compile() -> Iterator[None]:
    """Compiles without most optimisations: faster for programs that run once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def relative_error(got: Any, want: Any) -> float:
    """‖got − want‖ / ‖want‖ in float64; infinite where anything is not finite.

    >>> relative_error(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    0.0
    """
    got, want = (np.asarray(x, np.float64).ravel() for x in (got, want))
    if got.shape != want.shape or not (np.isfinite(got) & np.isfinite(want)).all():
        return math.inf
    # By the largest entry first: squares of values near 1e200 are not finite.
    scale = float(np.abs(want).max(initial=0.0)) or 1.0
    size = float(np.linalg.norm(want / scale))
    away = float(np.linalg.norm((got - want) / scale))
    return away / size if size > 0 else away


@dataclasses.dataclass(frozen=True)
class Trial:
    """A variant at small sizes, as functions of its arrays.

    Attributes:
      variant: the record, with what is claimed, and its options bound.
      untried: the record without the options of `Variant.trial`, if it has any.
      seed: of inputs, parameters and randomness.
    """

    variant: Variant
    untried: Variant | None = None
    seed: int = 0

    @functools.cached_property
    def takes(self) -> set[str]:
        """Names of the function's arguments."""
        return set(self.variant.arguments)

    @property
    def scale(self) -> Any:
        """The factor of the scores that is bound, or None."""
        return self.variant.options.get("scale")

    def bind(self, **options: Any) -> Trial:
        """The trial of its variant with options bound."""
        return dataclasses.replace(self, variant=self.variant.bind(**options))

    @property
    def num_keys(self) -> int:
        """S at T = NUM_QUERIES."""
        return NUM_KEYS if self.variant.cross else NUM_QUERIES

    @property
    def value_dim(self) -> int:
        """V at H = HEAD_DIM."""
        return VALUE_DIM if self.variant.value_dim else HEAD_DIM

    def params(
        self,
        dtype: Any = jnp.float32,
        *,
        max_length: int = 320,
        head_dim: int = HEAD_DIM,
        value_dim: int | None = None,
        seed: int | None = None,
    ) -> Any:
        """Parameters of one head, or None; its floating-point leaves in `dtype`."""
        init = self.variant.init
        if init is None:
            return None
        value_dim = self.value_dim if value_dim is None else value_dim
        # Made once: an `init` is many small programs.
        at = (jnp.dtype(dtype), max_length, head_dim, value_dim, seed)
        if at not in self._made:
            self._made[at] = self._init(*at)
        return self._made[at]

    @functools.cached_property
    def _made(self) -> dict[Any, Any]:
        return {}

    def _init(
        self, dtype: Any, max_length: int, head_dim: int, value_dim: int, seed: Any
    ) -> Any:
        variant = self.variant.fit(max_length=max_length, value_dim=value_dim)
        made = variant.make(jax.random.key(1 if seed is None else seed), head_dim)
        return cast_floats(made, dtype)

    def inputs(
        self,
        num_queries: int = NUM_QUERIES,
        num_keys: int | None = None,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        *,
        scale: float = 1.0,
        seed: int | None = None,
        head_dim: int = HEAD_DIM,
    ) -> Arrays:
        """Normal query, key and value; query and key times `scale`."""
        num_keys = self.num_keys if num_keys is None else num_keys
        value_dim = self.value_dim if value_dim is None else value_dim
        rng = np.random.default_rng((self.seed if seed is None else seed, 7))
        draws = {
            "query": scale * rng.standard_normal((num_queries, head_dim)),
            "key": scale * rng.standard_normal((num_keys, head_dim)),
            "value": rng.standard_normal((num_keys, value_dim)),
        }
        # Through float32, so that all precisions start from the same numbers.
        return {
            k: jnp.asarray(x.astype(np.float32)).astype(dtype) for k, x in draws.items()
        }

    def rng(self, seed: int | None = None) -> jax.Array | None:
        """A random key if the function draws; else None."""
        if not self.variant.stochastic:
            return None
        return jax.random.key(self.seed + 2 if seed is None else seed)

    def call(
        self,
        arrays: Mapping[str, Any],
        *,
        is_causal: bool = False,
        dropout_rate: float = 0.0,
    ) -> jax.Array:
        """The function on one head. `arrays` by argument name; None is left out."""
        given = {name: x for name, x in arrays.items() if x is not None}
        options: dict[str, Any] = {}
        if is_causal:
            options["is_causal"] = True
        if dropout_rate:
            options["dropout_rate"] = dropout_rate
        first = [given.pop(name) for name in ("query", "key", "value")]
        return self.variant.fn(*first, **given, **options)

    def full(self, arrays: Mapping[str, Any], *, seed: int | None = None) -> Arrays:
        """`arrays` with parameters and a random key where they are needed."""
        found = dict(arrays)
        if "params" in self.takes and "params" not in found:
            found["params"] = self.params(
                arrays["query"].dtype,
                head_dim=arrays["query"].shape[1],
                value_dim=arrays["value"].shape[1],
            )
        if self.variant.stochastic and "rng" not in found:
            found["rng"] = self.rng(seed)
        return found

    def neutral(self, arrays: Mapping[str, Any]) -> Arrays:
        """`arrays` with all that is claimed asked for, so that it changes nothing.

        One form of call serves most checks, so that it is compiled once.
        """
        variant, takes = self.variant, self.takes
        num_queries, num_keys = arrays["query"].shape[0], arrays["key"].shape[0]
        pairs = (num_queries, num_keys)
        found: Arrays = {}
        if variant.bias and "bias" in takes:
            found["bias"] = jnp.zeros(pairs, score_dtype(arrays["query"].dtype))
        if variant.mask and "mask" in takes:
            found["mask"] = jnp.ones(pairs, bool)
        if variant.key_mask and "key_mask" in takes:
            found["key_mask"] = jnp.ones((num_keys,), bool)
        return found | self.full(arrays)

    @functools.cached_property
    def _jitted(self) -> Callable[..., Any]:
        return jax.jit(self.call, static_argnames=("is_causal", "dropout_rate"))

    def bare(self, arrays: Mapping[str, Any], **static: Any) -> np.ndarray:
        """The jitted function called with `arrays` alone; its result on the host."""
        return np.asarray(self._jitted(self.full(arrays), **static))

    def run(self, arrays: Mapping[str, Any], *, is_causal: bool = False) -> np.ndarray:
        """The function's result on the host, from the program of `pull`."""
        return self.pull(arrays, is_causal=is_causal)[0]

    @functools.cached_property
    def _pulled(self) -> Callable[..., Any]:
        def pull(arrays: Arrays, cotangent: Any, is_causal: bool) -> Any:
            moving, fixed = split_moving(arrays)

            def of(moving: Arrays) -> jax.Array:
                return self.call(joined(moving, fixed), is_causal=is_causal)

            out, pullback = jax.vjp(of, moving)
            return out, pullback(cotangent)[0]

        return jax.jit(pull, static_argnames=("is_causal",))

    def pull(
        self,
        arrays: Mapping[str, Any],
        cotangent: Any = None,
        *,
        is_causal: bool = False,
        bare: bool = False,
    ) -> tuple[np.ndarray, Arrays]:
        """Output, and gradients of Σ cotangent · output by argument.

        What is claimed and not in `arrays` is given as `neutral` makes it, unless
        `bare`.
        """
        if cotangent is None:
            shape = (arrays["query"].shape[0], arrays["value"].shape[1])
            cotangent = jnp.cos(jnp.arange(math.prod(shape), dtype=jnp.float32))
            cotangent = cotangent.reshape(shape).astype(arrays["query"].dtype)
        arrays = self.full(arrays) if bare else self.neutral(arrays)
        out, grads = self._pulled(arrays, cotangent, is_causal=is_causal)
        return np.asarray(out), jax.tree.map(np.asarray, grads)

    @functools.cached_property
    def _influence(self) -> Callable[..., Any]:
        def influence(arrays: Arrays, is_causal: bool) -> Any:
            moving, fixed = split_moving(arrays)

            def of(moving: Arrays) -> jax.Array:
                return self.call(joined(moving, fixed), is_causal=is_causal)

            out, pullback = jax.vjp(of, moving)
            # One cotangent a query: a row of the Jacobian, mixed over the outputs.
            mix = jnp.cos(1.0 + jnp.arange(out.shape[1], dtype=out.dtype))
            each = jnp.eye(out.shape[0], dtype=out.dtype)[:, :, None] * mix[None, None]
            grads = jax.vmap(lambda c: pullback(c)[0])(each)
            return {
                name: ~(grads[name] == 0).all(axis=2)
                for name in ("query", "key", "value")
            }

        return jax.jit(influence, static_argnames=("is_causal",))

    def influence(
        self, arrays: Mapping[str, Any], *, is_causal: bool = False
    ) -> dict[str, np.ndarray]:
        """Whether output t has a gradient to query, key or value s: bool [T, S] each.

        A gradient that is not a number counts as one.
        """
        found = self._influence(self.neutral(arrays), is_causal=is_causal)
        return {name: np.asarray(x) for name, x in found.items()}

    def shapes(
        self,
        num_queries: int = NUM_QUERIES,
        num_keys: int | None = None,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        **asked: str | bool,
    ) -> jax.ShapeDtypeStruct:
        """Traces a call without computing it; an argument name asks for that argument.

        Raises:
          Exception: whatever the function raises.
        """
        num_keys = num_queries if num_keys is None else num_keys
        value_dim = HEAD_DIM if value_dim is None else value_dim
        arrays = self.full(self.inputs(num_queries, num_keys, value_dim, dtype))
        static: dict[str, Any] = {}
        for name in asked:
            if name == "is_causal":
                static["is_causal"] = True
            elif name == "dropout_rate":
                static["dropout_rate"] = 0.1
                key = "dropout_rng" if "dropout_rng" in self.takes else "rng"
                arrays[key] = jax.random.key(0)
            else:
                arrays[name] = {
                    "bias": jnp.zeros((num_queries, num_keys), dtype),
                    "mask": jnp.ones((num_queries, num_keys), bool),
                    "key_mask": jnp.ones((num_keys,), bool),
                }[name]
        return jax.eval_shape(functools.partial(self.call, **static), arrays)


def _is_float(leaf: Any) -> bool:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype
    return jnp.issubdtype(dtype, jnp.floating)


def cast_floats(tree: Any, dtype: Any) -> Any:
    """The floating-point leaves of a pytree in a dtype; integers as they are."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf).astype(dtype) if _is_float(leaf) else leaf, tree
    )


def float_leaves(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """What of a pytree has a gradient, and how to put it back among the rest."""
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]

    def back(floats: list[Any]) -> Any:
        full = list(leaves)
        for i, leaf in zip(where, floats, strict=True):
            full[i] = leaf
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in where], back


def split_moving(arrays: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    """What has a gradient, and what has none; of params the floating-point leaves."""
    names = ("query", "key", "value", "bias")
    moving = {k: x for k, x in arrays.items() if k in names and x is not None}
    fixed = {k: x for k, x in arrays.items() if k not in names}
    if fixed.get("params") is not None:
        moving["params"], _ = float_leaves(fixed["params"])
    return moving, fixed


def joined(moving: Arrays, fixed: Arrays) -> Arrays:
    """The arrays again, from what `split_moving` made of them."""
    if "params" in moving:
        _, back = float_leaves(fixed["params"])
        return {**fixed, **moving, "params": back(moving["params"])}
    return {**fixed, **moving}
