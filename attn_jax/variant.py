"""What a variant is, how options bind to it, and how a name or a file becomes one.

A variant is one pure function on one head of one example, and a record of what no
signature can say. `Variant.bind` is the one place where options are checked. Adding a
built-in variant is one function in its family's file and one row in `attn_jax/zoo.py`;
one of your own needs neither: name it as `path/file.py:function`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

__all__ = [
    "ARGUMENTS",
    "CAPABILITIES",
    "VARIANTS",
    "Bound",
    "Variant",
    "companions",
    "load",
    "read_flags",
    "require",
    "resolve",
    "variants_with",
]

VARIANTS: dict[str, Variant] = {}
"""All built-in variants by name: the rows of `attn_jax.zoo`."""

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


# What to say when a capability is asked for that a variant lacks.
_WHAT = {
    "bias": "`bias`",
    "mask": "an arbitrary [T, S] `mask`",
    "key_mask": "`key_mask`",
    "causal": "`is_causal=True`",
    "cross": "T ≠ S (as many queries as keys are needed)",
    "value_dim": "V ≠ H (values of another size than queries)",
    "dropout": "dropout on the attention weights",
    "step": "one token at a time: it has no `step` with an `init_state`",
}


def read_flags(fn: Callable[..., Any]) -> dict[str, bool]:
    """What the signature of an attention function says of it.

    An argument of `ARGUMENTS` that it takes by name is one that it can honour. Two
    kinds of randomness are told apart by name, too. `rng` draws what the function
    *is*, such as its random features: it is `stochastic`. It is so even where the
    argument has a default, which then means "without": noise for training. Where there
    is `dropout_rate` besides, `rng=None` is the key of dropout alone, unless
    `dropout_rng` is there for it. A required `rng` beside `dropout_rate` and without
    `dropout_rng` cannot serve both: dropout is then not claimed.

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


def _names(fn: Callable[..., Any] | None) -> list[str]:
    """Names of a function's arguments."""
    return [] if fn is None else list(inspect.signature(fn).parameters)


# What only the caller has, so no option; but `functools.partial` may bind it as well.
_OPERANDS = ("query", "key", "value")
_CARRIED = ("bias", "mask", "key_mask", "params", "rng", "dropout_rng", "dropout_rate")

# What stands beside a function, under its name and an underscore: `linformer_init`.
_COMPANIONS = ("init", "update", "step", "init_state")


def companions(name: str, module: Mapping[str, Any]) -> dict[str, Any]:
    """What a module has for a function of that name, by the fields of `Variant`.

    >>> from attn_jax.attention import routing_attention
    >>> sorted(companions("routing", vars(routing_attention)))
    ['init', 'update']
    """
    found = {part: module.get(f"{name}_{part}") for part in _COMPANIONS}
    return {part: fn for part, fn in found.items() if fn is not None}


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


def _taken(fn: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the given a function takes by name, less what is None."""
    takes = _names(fn)
    return {k: x for k, x in given.items() if k in takes and x is not None}


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
      bias, mask, key_mask: whether it takes an additive bias [T, S], an arbitrary bool
        mask [T, S], a bool mask of the keys [S].
      causal: whether it takes `is_causal`.
      cross, value_dim: whether T may differ from S, and V from H.
      dropout: whether it takes `dropout_rate`, with `rng`, or with `dropout_rng` where
        `rng` draws something else.
      exact: whether it computes softmax(scale · Q Kᵀ + bias) V exactly.
      time, memory: cost in time and additional memory, as O(...).
      paper, summary: arXiv number or other reference; one line on what it does.
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
      step: `step(state, query[H], key[H], value[V], ...) -> (state, out[V])`: one token
        of one head, equal to a row of `fn` where it is causal. It takes by name what
        else it needs: `position` (int32 [], tokens before), `params`, `rng`, and
        options of `fn`. None if there is none.
      init_state: `init_state(...) -> state` before any token; takes by name what it
        needs of `length` (how many tokens there must be room for), `head_dim`,
        `value_dim`, `dtype`, and options of `fn`.
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
    cross: bool = True
    value_dim: bool = True
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
    step: Callable[..., tuple[Any, jax.Array]] | None = None
    init_state: Callable[..., Any] | None = None
    knob: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), hash=False)
    trial: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, read in read_flags(self.fn).items():
            if getattr(self, name) is _READ:
                object.__setattr__(self, name, read)

    @property
    def arguments(self) -> list[str]:
        """Names of its function's arguments."""
        return _names(self.fn)

    def needs(self, argument: str) -> bool:
        """Whether its function cannot do without an argument such as `rng`."""
        found = inspect.signature(self.fn).parameters.get(argument)
        return found is not None and found.default is found.empty

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
        if "is_causal" in options and "is_causal" not in _names(self.fn):
            if options.pop("is_causal"):
                require(self, "causal")
        if not options:
            return self
        self._known(options, self._takes("fn") + self._takes("init"))
        if options.get("dropout_rate"):
            raise TypeError(
                "`dropout_rate` is no option to bind: give it to the Flax layer, which "
                "also says when dropout is on, or at the call of `multi_head`."
            )
        changes: dict[str, Any] = {
            "trial": {k: x for k, x in self.trial.items() if k not in options},
        }
        for part in ("fn", "init", "step", "init_state", "approximates"):
            taken = {k: x for k, x in options.items() if k in self._takes(part)}
            if taken:
                changes[part] = _bound(getattr(self, part), taken)
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
        stem = self.name.removesuffix(f"({_told(self.options)})")
        bound = dataclasses.replace(self, **changes)
        return dataclasses.replace(bound, name=f"{stem}({_told(bound.options)})")

    def fit(self, **options: Any) -> Variant:
        """The variant with those of the options bound that it takes and has not bound.

        For what is known of all variants alike, such as `max_length`, the longest
        sequence: it is bound where an `init` takes it, and says nothing to others.

        >>> from attn_jax import VARIANTS
        >>> VARIANTS["linformer"].fit(max_length=9, block_size=2).options
        {'max_length': 9}
        """
        bound = self.options
        taken = [k for k in options if self.takes(k) and k not in bound]
        return self.bind(**{k: options[k] for k in taken})

    def takes(self, option: str) -> bool:
        """Whether its function or its `init` takes an option of that name."""
        return option in (*self._takes("fn"), *self._takes("init"))

    def asked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of one call of its function, less those that ask for nothing.

        Raises:
          ValueError: if it cannot be causal or drop weights and is asked to.
          TypeError: if its function takes no such option.
        """
        for name, capability in (("is_causal", "causal"), ("dropout_rate", "dropout")):
            if options.get(name):
                require(self, capability)
        takes, kept = self._takes("fn"), dict(options)
        for name in ("is_causal", "dropout_rate"):
            # Where it is causal by a bound option, it is so whatever a layer says.
            if name not in takes or (name == "is_causal" and self.options.get(name)):
                if not kept.get(name):
                    kept.pop(name, None)
        if "scale" not in takes and kept.get("scale") is None:
            kept.pop("scale", None)
        self._known(kept, takes)
        return kept

    def make(self, rng: jax.Array, head_dim: int, **options: Any) -> Any:
        """Parameters of one head by `init`, with options of it; None without any.

        Raises:
          ValueError: if its function takes `params` and nothing makes them.
          TypeError: if its `init` takes no such option.
        """
        if self.init is None and "params" in {*_names(self.fn)} - self.options.keys():
            raise ValueError(
                f"attention variant {self.name!r} takes `params` but has no `init`; "
                "put `<function>_init(rng, head_dim)` beside it in the file, or give "
                "`Variant(init=...)`."
            )
        self._known(options, self._takes("init"), "`init`")
        return None if self.init is None else self.init(rng, head_dim, **options)

    def start(self, **given: Any) -> Any:
        """The state of one head before any token.

        Args:
          **given: `length`, `head_dim`, `value_dim` and `dtype`.
        """
        require(self, "step")
        assert self.init_state is not None
        return self.init_state(**_taken(self.init_state, given))

    def advance(self, state: Any, **given: Any) -> tuple[Any, jax.Array]:
        """One token of one head by `step`.

        Args:
          state: of `start`, or of the token before.
          **given: `query` [H], `key` [H], `value` [V], `position`; `params` and `rng`
            of the head, or None.

        Returns:
          The new state, and the output [V].
        """
        require(self, "step")
        assert self.step is not None
        return self.step(state, **_taken(self.step, given))

    def _takes(self, part: str) -> list[str]:
        """The options that one of its functions takes, with what is carried."""
        if part == "init":
            return _names(self.init)[2:]
        return [n for n in _names(getattr(self, part)) if n not in _OPERANDS]

    def _known(
        self, options: Mapping[str, Any], known: list[str], part: str = ""
    ) -> None:
        """Raises for an option that is not among the known ones."""
        for name in options:
            if name not in known:
                told = dict.fromkeys(n for n in known if n not in _CARRIED)
                raise TypeError(
                    f"attention variant {self.name!r} takes no option `{name}`"
                    f"{part and f' of {part}'}; it takes: {', '.join(told) or 'none'}."
                )

    def capabilities(self) -> dict[str, bool]:
        """What the variant can do, by the names in `CAPABILITIES`."""
        return {name: getattr(self, name) for name in CAPABILITIES}


def variants_with(capability: str) -> list[str]:
    """Sorted names of the built-in variants that have a capability.

    Args:
      capability: one of `CAPABILITIES`, or "step".

    Raises:
      ValueError: if there is no such capability.

    >>> "dot_product" in variants_with("mask")
    True
    """
    known = [*CAPABILITIES, "step"]
    if capability not in known:
        raise ValueError(f"`capability` must be one of {known}, but is {capability!r}.")
    return sorted(name for name, v in VARIANTS.items() if getattr(v, capability))


def require(variant: Variant, capability: str) -> None:
    """Raises ValueError if a variant lacks a capability, and names those that have it.

    >>> require(VARIANTS["dot_product"], "mask")
    """
    able = variants_with(capability)
    half = capability == "step" and variant.init_state is None
    if getattr(variant, capability) and not half:
        return
    if any(variant.base is row.base for row in VARIANTS.values()):
        advice = ""
    elif capability == "dropout" and "dropout_rate" in _names(variant.fn):
        advice = (
            " Your function needs `rng` also without dropout, so it does not say what "
            "draws what: it gains dropout by a key of its own, `dropout_rng=None`."
        )
    elif capability in ARGUMENTS:
        advice = f" Your function gains it by an argument `{ARGUMENTS[capability]}`."
    elif capability == "step":
        advice = " Put `<function>_step` and `<function>_init_state` beside yours."
    else:
        advice = f" Set `{capability}=True` in its `Variant` if it can."
    raise ValueError(
        f"attention variant {variant.name!r} cannot honour {_WHAT[capability]}; "
        f"variants that can: {', '.join(able)}.{advice}"
    )


def _signature(fn: Callable[..., Any], name: str) -> inspect.Signature:
    """Reads a function's signature and checks that it keeps the contract."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        raise ValueError(
            f"attention function {name!r} has no readable signature; wrap it in a "
            "`def fn(query, key, value, ...)` of your own."
        ) from None
    parameters = signature.parameters
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(
                f"attention function {name!r} takes `{parameter}`, so what it can "
                "honour cannot be read from its signature; name its arguments."
            )
    if list(parameters)[:3] != ["query", "key", "value"]:
        raise ValueError(
            f"attention function {name!r} must begin with the arguments (query, key, "
            f"value), but its signature is {signature}."
        )
    return signature


def _from_callable(fn: Callable[..., Any]) -> Variant:
    """The record of a function: its row in the table, or one from its signature.

    Options that `functools.partial` binds to it are bound to the record. Of the rows of
    one function, the one counts that has most of them.
    """
    base, args, bound = fn, (), {}
    if isinstance(fn, functools.partial):
        base, args, bound = fn.func, fn.args, fn.keywords
    rows = [
        row
        for row in VARIANTS.values()
        if row.base is base
        and all(_same(x, bound.get(k, _READ)) for k, x in _keywords(row.fn).items())
    ]
    if rows and not args:
        row = max(rows, key=lambda row: len(row.options))
        return row.bind(**{k: x for k, x in bound.items() if k not in row.options})
    if rows:
        raise ValueError(
            f"{fn!r} binds {len(args)} of the arguments of {rows[0].name!r} by their "
            "place; bind options by name, as in functools.partial(fn, scale=1.0), and "
            "leave query, key and value to the call."
        )
    if isinstance(fn, functools.partial) and not args:
        return _from_callable(base).bind(**bound)
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    _signature(fn, name)
    document = (inspect.getdoc(fn) or "").split("\n")[0]
    return Variant(name=name, fn=fn, summary=document or "a function of yours")


@functools.lru_cache(maxsize=64)
def _load_module(path: pathlib.Path, content_hash: str) -> Any:
    """Imports a file as a module; the same content gives the same module."""
    name = f"attn_jax_user_{path.stem}_{content_hash[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; name it `file.py:function`.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.parent)
    sys.path.insert(0, folder)  # as `python file.py` has it, for the file's neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise ValueError(
            f"{path} fails on import with {type(error).__name__}: {error}. "
            f"`python {path}` shows where."
        ) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return module


def load(spec: str) -> Any:
    """What `path/file.py:name` names.

    Raises:
      ValueError: if there is no such file or name, or if the file fails on import.
    """
    return _load(spec)[0]


def _load(spec: str) -> tuple[Any, Any]:
    """What `path/file.py:name` names, and the module it stands in."""
    file, _, attribute = spec.rpartition(":")
    path = pathlib.Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(
            f"no such file: {file!r} (looked for {path}), from attention {spec!r}."
        )
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()
    module = _load_module(path, digest)
    found = getattr(module, attribute, None)
    if not (callable(found) or isinstance(found, Variant)):
        public = sorted(
            name
            for name, found in vars(module).items()
            if inspect.isfunction(found) and not name.startswith("_")
        )
        raise ValueError(
            f"no function {attribute!r} in {file}; it has: {', '.join(public) or '-'}."
        )
    return found, module


def _from_file(spec: str) -> Variant:
    """Resolves `path/file.py:function`."""
    fn, module = _load(spec)
    if isinstance(fn, Variant):
        return fn
    beside = companions(spec.rpartition(":")[2], vars(module))
    return dataclasses.replace(_from_callable(fn), name=spec, **beside)


def resolve(spec: str | Callable[..., Any] | Variant) -> Variant:
    """Turns a name, a `path/file.py:function`, a function or a record into a record.

    The capabilities of a function of your own are read from its signature: it can
    honour what it takes by name. A built-in one has its row, also where
    `functools.partial` binds options to it (see `Variant.bind`). What else a `Variant`
    has, a file has beside its function: `<function>_init(rng, head_dim)` makes its
    parameters, `<function>_update` moves those that are untrained state,
    `<function>_step` and `<function>_init_state` generate. A file may also hold a
    `Variant`.

    A file may import its neighbours at its top (their folder is on `sys.path` while it
    is imported, and no longer). Only the named file itself is watched: its content,
    not that of its neighbours, is what experiments hash, and what makes `resolve` read
    it again. A neighbour is imported once a process, under its plain name, so keep
    what changes the numbers in the named file.

    Args:
      spec: name in `VARIANTS`, `path/file.py:function`, function, or `Variant`.

    Returns:
      The record.

    Raises:
      ValueError: if there is no such variant, file or function, if the file fails on
        import, or if the function does not keep the contract.
      TypeError: if `spec` is of another kind.

    >>> resolve("dot_product").exact
    True
    >>> resolve(lambda query, key, value, bias=None: value).bias
    True
    >>> resolve(functools.partial(VARIANTS["linear"].fn, chunk_size=8)).equivariant
    True
    """
    if isinstance(spec, Variant):
        return spec
    if isinstance(spec, str):
        if spec in VARIANTS:
            return VARIANTS[spec]
        if ":" in spec:
            return _from_file(spec)
        close = difflib.get_close_matches(spec, VARIANTS, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"unknown attention variant {spec!r}.{hint} Known: "
            f"{', '.join(sorted(VARIANTS))}; a function of your own is named "
            "`path/file.py:function`."
        )
    if callable(spec):
        return _from_callable(spec)
    raise TypeError(
        "`spec` must be a variant's name, 'path/file.py:function', a function or a "
        f"Variant, but is {type(spec).__name__}."
    )
