"""The record of an attention variant, and the names of what it may claim."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

__all__ = ["ARGUMENTS", "CAPABILITIES", "Bound", "Variant", "read_flags"]

CAPABILITIES: tuple[str, ...] = (
    "bias",
    "mask",
    "key_mask",
    "causal",
    "cross",
    "value_dim",
    "dropout",
)
"""What a variant may or may not be able to do, as named in `Variant`."""

ARGUMENTS: dict[str, str] = {
    "bias": "bias",
    "mask": "mask",
    "key_mask": "key_mask",
    "causal": "is_causal",
    "dropout": "dropout_rate",
}
"""The argument of a function that shows a capability, where one does."""


def read_flags(fn: Callable[..., Any]) -> dict[str, bool]:
    """What the signature of an attention function says of it.

    An argument of `ARGUMENTS` that it takes by name is one that it can honour. Two
    kinds of randomness are told apart by name, too. `rng` draws what the function
    *is*, such as its random features: it is `stochastic`. It is so even where the
    argument has a default, which then means "without": noise for training. Where there
    is `dropout_rate` besides, `rng=None` is the key of dropout alone, unless
    `dropout_rng` is there for it. A required `rng` beside `dropout_rate` and without
    `dropout_rng` cannot serve both: dropout is then not claimed.

    Args:
      fn: the function.

    Returns:
      The flags of `ARGUMENTS`, and "stochastic"; all False if the signature cannot be
      read.

    >>> read_flags(lambda query, key, value, bias=None, *, rng: value)["stochastic"]
    True
    """
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return dict.fromkeys((*ARGUMENTS, "stochastic"), False)
    flags = {flag: argument in parameters for flag, argument in ARGUMENTS.items()}
    rng = parameters.get("rng")
    required = rng is not None and rng.default is rng.empty
    apart = "dropout_rng" in parameters
    flags["stochastic"] = rng is not None and (
        required or apart or not flags["dropout"]
    )
    flags["dropout"] &= apart or not required
    return flags


def _init_options(init: Callable[..., Any]) -> tuple[str, ...]:
    """What an `init` takes beside `rng` and `head_dim`."""
    return tuple(inspect.signature(init).parameters)[2:]


# What only the caller has, so no option; but `functools.partial` may bind it as well.
_OPERANDS = ("query", "key", "value")
_CARRIED = ("bias", "mask", "key_mask", "params", "rng", "dropout_rng", "dropout_rate")


class Bound(functools.partial):
    """A `functools.partial` by name alone, equal to one of the same options.

    Equality lets compiled programs be shared between two that were made apart.
    """

    @property
    def __name__(self) -> str:
        return f"{self.func.__name__}({_told(self.keywords)})"

    def __repr__(self) -> str:
        return self.__name__

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Bound)
            and self.func == other.func
            and list(self.keywords) == list(other.keywords)
            and all(map(_same, self.keywords.values(), other.keywords.values()))
        )

    def __hash__(self) -> int:
        return hash((self.func, tuple(self.keywords)))


def _bound(fn: Callable[..., Any], options: Mapping[str, Any]) -> Bound:
    """A function with options bound to it, over those that it has."""
    if isinstance(fn, functools.partial) and not fn.args:
        return _bound(fn.func, {**fn.keywords, **options})
    return Bound(fn, **dict(sorted(options.items())))


def _same(one: Any, other: Any) -> bool:
    """Whether two options are equal; arrays are if they are one."""
    try:
        hash(one), hash(other)
    except TypeError:
        return one is other
    return type(one) is type(other) and bool(one == other)


def _told(options: Mapping[str, Any]) -> str:
    """Options as they stand in a name: of arrays and the like the kind alone."""
    plain = (bool, int, float, str, tuple, type(None))
    return ", ".join(
        f"{name}={value!r}" if isinstance(value, plain) else f"{name}=..."
        for name, value in sorted(options.items())
    )


def _keywords(fn: Callable[..., Any] | None) -> dict[str, Any]:
    """What is bound to a function by name."""
    return dict(fn.keywords) if isinstance(fn, functools.partial) else {}


_READ: Any = None  # a flag that is not said: the function's signature says it


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the machinery needs to know about one attention function.

    Flags of the arguments that a function takes (`bias`, `mask`, `key_mask`, `causal`,
    `dropout`, `stochastic`) are read from its signature by `read_flags`. To say one is
    for a function that takes an argument and refuses it: `bias=False`.

    Attributes:
      name: key in `VARIANTS`, or how a user's function was named.
      fn: `fn(query[T, H], key[S, H], value[S, V], bias, mask, *, ...) -> [T, V]`.
      init: `init(rng, head_dim, ...) -> params` for one head, or None if `fn` has no
        parameters.
      bias: whether it takes an additive bias [T, S].
      mask: whether it takes an arbitrary bool mask [T, S].
      key_mask: whether it takes a bool mask of the keys [S].
      causal: whether it takes `is_causal`.
      cross: whether T may differ from S.
      value_dim: whether V may differ from H.
      dropout: whether it takes `dropout_rate`, with `rng`, or with `dropout_rng` where
        `rng` draws something else.
      exact: whether it computes softmax(scale · Q Kᵀ + bias) V exactly.
      time: cost in time, as O(...).
      memory: additional memory, as O(...).
      paper: arXiv number or other reference.
      summary: one line on what it does.
      stochastic: whether `rng` draws what it is, and not what it drops out: drawn per
        head, and shared by all examples of a batch. If `rng` has a default, the
        function does without, and layers give it in training alone.
      arrays: the same function on whole arrays [B, T, N, H], with the same options, or
        None; `multi_head` takes it on CPU, where its own loop over heads and blocks is
        faster than one around `fn`, for calls without `params`, `rng` and dropout.
      shared_axes: whether axes of size 1 in bias and mask may reach `fn` as they are;
        else `multi_head` broadcasts them to [T, S].
      equivariant: whether it knows nothing of order: permuting keys with their values
        changes nothing, and permuting queries permutes the output.
      approximates: the exact function that it comes near to, called with those of
        query, key, value, masks, bias, `is_causal`, `params` and `rng` that it takes
        by name; None if it is no approximation.
      knob: options of `fn` or `init`, from coarse to fine, along which the distance to
        `approximates` must fall.
      update: `update(params, query, key, key_mask=None, ...) -> {leaf: new}`, which
        learns without a gradient, from the tokens that one head saw: a batch's, end to
        end, with `key_mask` where some are padding (then T = S). The leaves of `params`
        that it returns are state, not parameters: layers keep them apart, apply it in
        training calls, and nothing decays them. None if nothing is learnt so.
      trial: options of `fn` or `init` that make short sequences show all that it does,
        such as a small block; `attn_jax.testing` tries it with them, and measures its
        cost without.

    An `init` may take `max_length` (the longest sequence) and `value_dim` (V): whoever
    makes parameters for known shapes supplies them.
    """

    name: str
    fn: Callable[..., jax.Array]
    init: Callable[..., Any] | None = None
    bias: bool = _READ
    mask: bool = _READ
    key_mask: bool = _READ
    causal: bool = _READ
    cross: bool = False
    value_dim: bool = False
    dropout: bool = _READ
    exact: bool = False
    time: str = "unknown"
    memory: str = "unknown"
    paper: str = ""
    summary: str = ""
    stochastic: bool = _READ
    shared_axes: bool = False
    arrays: Callable[..., jax.Array] | None = None
    equivariant: bool = False
    approximates: Callable[..., jax.Array] | None = None
    update: Callable[..., Mapping[str, Any]] | None = None
    knob: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), hash=False)
    trial: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, read in read_flags(self.fn).items():
            if getattr(self, name) is _READ:
                object.__setattr__(self, name, read)

    @property
    def needs_rng(self) -> bool:
        """Whether it cannot do without `rng`."""
        rng = inspect.signature(self.fn).parameters.get("rng")
        return rng is not None and rng.default is rng.empty

    @property
    def base(self) -> Callable[..., jax.Array]:
        """Its function without the options that are bound to it."""
        return self.fn.func if isinstance(self.fn, functools.partial) else self.fn

    @property
    def options(self) -> dict[str, Any]:
        """The options that are bound to its function or its `init`."""
        return {**_keywords(self.init), **_keywords(self.fn)}

    def bind(self, **options: Any) -> Variant:
        """The variant with options bound to it: the record stays, and so do its claims.

        An option that the function and its `init` both take is bound to both. Bound
        again, an option takes its new value. What is used up is no longer claimed: a
        bound `key_mask` leaves no other one to be given, a causal function no longer
        equals attention to all keys, and with a bound `rng` nothing is drawn.
        `multi_head` of a variant with `is_causal=True` is causal at every call.

        `resolve(functools.partial(fn, **options))` of a built-in `fn` gives the same.

        Args:
          **options: of the function or of its `init`, by name.

        Returns:
          The record; its name says what is bound.

        Raises:
          TypeError: if neither takes such an option.

        >>> from attn_jax import VARIANTS
        >>> near = VARIANTS["truncated"].bind(left=3, right=2)
        >>> near.name, near.mask, near.bind(right=0).options
        ('truncated(left=3, right=2)', True, {'left': 3, 'right': 0})
        """
        of_fn = list(inspect.signature(self.fn).parameters)
        of_init = [] if self.init is None else list(_init_options(self.init))
        for name in options:
            if name in _OPERANDS or name not in (*of_fn, *of_init):
                known = [n for n in of_fn if n not in (*_OPERANDS, *_CARRIED)]
                known += [n for n in of_init if n not in known]
                raise TypeError(
                    f"attention variant {self.name!r} takes no option `{name}`; "
                    f"it takes: {', '.join(known) or 'none'}."
                )
        if options.get("dropout_rate"):
            raise TypeError(
                "`dropout_rate` is no option to bind: give it to the Flax layer, which "
                "also says when dropout is on, or at the call of `multi_head`."
            )
        changes: dict[str, Any] = {
            "fn": _bound(self.fn, {k: x for k, x in options.items() if k in of_fn}),
            "trial": {k: x for k, x in self.trial.items() if k not in options},
        }
        to_init = {k: x for k, x in options.items() if k in of_init}
        if to_init:
            assert self.init is not None
            changes["init"] = _bound(self.init, to_init)
        for flag in ("bias", "mask", "key_mask"):
            if flag in options:
                changes |= {flag: False, "exact": False, "equivariant": False}
        if options.get("is_causal") or options.get("local_window_size") is not None:
            changes |= {"exact": False, "equivariant": False}
        if "rng" in options:
            changes["stochastic"] = False
        if "dropout_rate" in options:
            changes["dropout"] = False
        if "params" in options:
            changes |= {"init": None, "update": None}
        if self.approximates is not None:
            takes = inspect.signature(self.approximates).parameters
            shared = {k: x for k, x in options.items() if k in takes}
            if shared:
                changes["approximates"] = _bound(self.approximates, shared)
        stem = self.name.removesuffix(f"({_told(self.options)})")
        bound = dataclasses.replace(self, **changes)
        if not bound.options:
            return self
        return dataclasses.replace(bound, name=f"{stem}({_told(bound.options)})")

    def capabilities(self) -> dict[str, bool]:
        """What the variant can do, by the names in `CAPABILITIES`."""
        return {name: getattr(self, name) for name in CAPABILITIES}
