"""The table of attention variants, and how a name or a file becomes one.

A variant is one pure function on one head of one example plus a record of what it
can do. Adding a built-in variant is one function in its family's file and one row in
`attn_jax/zoo.py`; one of your own needs neither: name it as `path/file.py:function`.
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
from collections.abc import Callable
from typing import Any

from attn_jax.variant import ARGUMENTS, CAPABILITIES, Variant
from attn_jax.zoo import ROWS

__all__ = [
    "ARGUMENTS",
    "CAPABILITIES",
    "VARIANTS",
    "Variant",
    "load",
    "require",
    "resolve",
    "variants_with",
]

# What to say when a capability is asked for that a variant lacks.
_WHAT = {
    "bias": "`bias`",
    "mask": "an arbitrary [T, S] `mask`",
    "key_mask": "`key_mask`",
    "causal": "`is_causal=True`",
    "cross": "T ≠ S (as many queries as keys are needed)",
    "value_dim": "V ≠ H (values of another size than queries)",
    "dropout": "dropout on the attention weights",
    "params": "`params`",
}

VARIANTS: dict[str, Variant] = {row.name: row for row in ROWS}
"""All built-in variants by name."""


def variants_with(capability: str) -> list[str]:
    """Names of the built-in variants that have a capability.

    Args:
      capability: one of `CAPABILITIES`.

    Returns:
      Sorted names.

    Raises:
      ValueError: if there is no such capability.

    >>> "dot_product" in variants_with("mask")
    True
    """
    if capability not in CAPABILITIES:
        raise ValueError(
            f"`capability` must be one of {list(CAPABILITIES)}, but is {capability!r}."
        )
    return sorted(name for name, v in VARIANTS.items() if getattr(v, capability))


def require(variant: Variant, capability: str) -> None:
    """Raises if a variant lacks a capability, and names those that have it.

    Args:
      variant: the variant that is asked.
      capability: one of `CAPABILITIES`.

    Raises:
      ValueError: if the variant cannot do it.

    >>> require(VARIANTS["dot_product"], "mask")
    """
    able = variants_with(capability)
    if getattr(variant, capability):
        return
    if any(variant.base is row.fn for row in VARIANTS.values()):
        advice = ""
    elif capability == "dropout" and "dropout_rate" in _names(variant.fn):
        advice = (
            " Your function needs `rng` also without dropout, so it does not say what "
            "draws what: it gains dropout by a key of its own, `dropout_rng=None`."
        )
    elif capability in ARGUMENTS:
        advice = f" Your function gains it by an argument `{ARGUMENTS[capability]}`."
    else:
        advice = f" Set `{capability}=True` in its `Variant` if it can."
    raise ValueError(
        f"attention variant {variant.name!r} cannot honour {_WHAT[capability]}; "
        f"variants that can: {', '.join(able)}.{advice}"
    )


def _names(fn: Callable[..., Any]) -> list[str]:
    """Names of a function's arguments."""
    return list(inspect.signature(fn).parameters)


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


def _from_function(
    fn: Callable[..., Any], name: str, init: Callable[..., Any] | None = None
) -> Variant:
    """Makes the record of a user's function from its signature."""
    _signature(fn, name)
    document = inspect.getdoc(fn) or ""
    return Variant(
        name=name,
        fn=fn,
        init=init,
        cross=True,
        value_dim=True,
        summary=document.split("\n")[0] or "a function of yours",
    )


def _from_callable(
    fn: Callable[..., Any], init: Callable[..., Any] | None = None
) -> Variant:
    """The record of a function: its row in the table, or one from its signature.

    Options that `functools.partial` binds to it are bound to the record.
    """
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    for variant in VARIANTS.values():
        if variant.fn is fn:
            return variant if init is None else dataclasses.replace(variant, init=init)
    if not isinstance(fn, functools.partial):
        return _from_function(fn, name, init)
    record = _from_callable(fn.func, init)
    if not fn.args:
        return record.bind(**fn.keywords)
    if record.base in {v.fn for v in VARIANTS.values()}:
        raise ValueError(
            f"{fn!r} binds {len(fn.args)} of the arguments of {record.name!r} by their "
            "place; bind options by name, as in functools.partial(fn, scale=1.0), and "
            "leave query, key and value to the call."
        )
    return _from_function(fn, name, init)


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

    Args:
      spec: a file's path, a colon, and the name of something in it.

    Returns:
      It.

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
    attribute = spec.rpartition(":")[2]
    record = _from_callable(fn, getattr(module, f"{attribute}_init", None))
    update = getattr(module, f"{attribute}_update", record.update)
    return dataclasses.replace(record, name=spec, update=update)


def resolve(spec: str | Callable[..., Any] | Variant) -> Variant:
    """Turns a name, a `path/file.py:function`, a function or a record into a record.

    The capabilities of a function of your own are read from its signature: it can
    honour what it takes by name. A built-in one has its row, also where
    `functools.partial` binds options to it (see `Variant.bind`). If a function in a
    file has parameters, the file's `<function>_init(rng, head_dim)` makes them, and
    `<function>_update` moves those that are untrained state (see `Variant`). A file may
    also hold a `Variant`.

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
