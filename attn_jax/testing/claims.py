"""What a variant claims, as words and as growth formulas, and how to read them."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from attn_jax.attention.softmax import dot_product
from attn_jax.variant import ARGUMENTS, CAPABILITIES, Variant

__all__ = ["CLAIMS", "claimed", "growth", "with_claims"]

CLAIMS: tuple[str, ...] = (
    *CAPABILITIES,
    "exact",
    "equivariant",
    "approximates",
    "stochastic",
    "time",
    "memory",
)
"""What can be claimed: flags, and `time=O(...)` and `memory=O(...)`."""

_FLAGS = (*CAPABILITIES, "exact", "equivariant", "stochastic")
CONSTANT = 64.0
_LENGTHS = {"T", "S", "N", "n", "L"}
_SIGNS = {
    "·": "*",
    "×": "*",
    "−": "-",
    "²": "^2",
    "³": "^3",
    "⁴": "^4",
    "_": "",
}
_TOKEN = re.compile(r"\s*(\d+\.?\d*|[A-Za-zα-ωΑ-Ω]+|√|[-+*/^(),])")


def growth(formula: str, constant: float = CONSTANT) -> Callable[[float], float] | None:
    """Reads an O(...) as a function of the length.

    T, S, N, n and L are the length; every other letter is a constant. What stands side
    by side is multiplied.

    Args:
      formula: such as "O(T·w·H)", "O(N log N)", "O(T·√T)", "O(T^1.5)" or "O(1)".
      constant: the value of the other letters, as blocks, windows and heads have it.

    Returns:
      cost(length), up to a constant; None for "unknown" or "".

    Raises:
      ValueError: if the formula cannot be read.

    >>> cost = growth("O(T·√T·H + w log T)")
    >>> cost(256.0) == 256 * 16 * 64 + 64 * 8
    True
    >>> growth("unknown") is None
    True
    """
    if formula in ("", "unknown", "-"):
        return None
    wrong = ValueError(
        f"cannot read the growth {formula!r}; write it as O(T), O(T*w*H), O(T log T), "
        "O(T^1.5), O(T*sqrt(T)) or O(1), with T or S for the length."
    )
    text = formula.strip()
    if not (text.startswith("O(") and text.endswith(")")):
        raise wrong
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    text = text[1:]
    tokens, at = [], 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise wrong
        tokens.append(found[1])
        at = found.end()
    code: list[str] = []
    for token in tokens:
        starts = token[0].isalnum() or token in "√("
        if starts and code and (code[-1][-1].isalnum() or code[-1] == ")"):
            if code[-1] not in ("log", "sqrt", "max", "min"):
                code.append("*")
        if token == "^":
            token = "**"
        if token == "√":
            token = "sqrt"
        code.append(token)
    # `log T` and `sqrt T` without brackets take the one name that follows.
    joined: list[str] = []
    skip = False
    for token, after in zip(code, [*code[1:], ""], strict=True):
        if skip:
            skip = False
        elif token in ("log", "sqrt") and after != "(":
            joined.append(f"{token}({after})")
            skip = True
        else:
            joined.append(token)
    try:
        tree = ast.parse(" ".join(joined), mode="eval").body
        cost = lambda length: _evaluate(tree, float(length), constant)  # noqa: E731
        cost(16.0)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError):
        raise wrong from None
    return cost


def _evaluate(node: ast.expr, length: float, constant: float) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.Name):
        # `TS` and `NM` are products of one-letter names.
        return math.prod(length if c in _LENGTHS else constant for c in node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        values = [_evaluate(argument, length, constant) for argument in node.args]
        if name in ("log", "sqrt") and len(values) == 1:
            return math.log2(values[0]) if name == "log" else math.sqrt(values[0])
        if name in ("max", "min") and values:
            return max(values) if name == "max" else min(values)
        if len(values) == 1:  # `T(w + g)`: a product
            return _evaluate(node.func, length, constant) * values[0]
    if isinstance(node, ast.BinOp):
        left = _evaluate(node.left, length, constant)
        right = _evaluate(node.right, length, constant)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
        if isinstance(node.op, ast.Pow) and abs(right) <= 8:
            return left**right
    raise ValueError("not a growth")


def _refuses(variant: Variant, **asked: Any) -> str | None:
    """What the function says where it refuses something, or None if it takes it."""
    from attn_jax.testing.trial import Trial

    try:
        Trial(variant).shapes(**asked)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def with_claims(
    variant: Variant, claims: str | Sequence[str] | None, *, declared: bool
) -> Variant:
    """The record with what is to be claimed of it.

    Args:
      variant: the record, as resolved.
      claims: names in `CLAIMS`, as a list or with commas between; `time=O(...)` and
        `memory=O(...)` carry a formula. What is not named is not claimed. None takes
        the record's own claims.
      declared: whether the record was written by its author. If not, and with `claims`
        None, a function that refuses T ≠ S, V ≠ H, or by name an argument that it
        takes, is understood not to claim it.

    Returns:
      The record, changed.

    Raises:
      ValueError: on a claim that there is not, or a formula that cannot be read.
    """
    if claims is None:
        if declared:
            return variant
        changes: dict[str, Any] = {}
        for name, lengths in (
            ("cross", {"num_keys": 11}),
            ("value_dim", {"value_dim": 3}),
        ):
            if _refuses(variant, num_queries=7, **lengths) is not None:
                changes[name] = False
        bare = dataclasses.replace(variant, **changes)
        for name, argument in ARGUMENTS.items():
            if name == "dropout" or not getattr(variant, name):
                continue
            given: Any = True if name == "causal" else argument
            said = _refuses(bare, num_queries=7, **{argument: given})
            if said is not None and argument in said:
                changes[name] = False
        return dataclasses.replace(variant, **changes)
    if isinstance(claims, str):
        # Commas inside of brackets belong to a formula.
        claims = re.split(r",\s*(?![^(]*\))", claims.strip()) if claims.strip() else []
    found: dict[str, Any] = dict.fromkeys(_FLAGS, False)
    # Randomness is a fact about the signature, not something to be left out.
    found["stochastic"] = variant.stochastic
    found |= {"approximates": variant.approximates, "knob": variant.knob}
    found |= {"time": "unknown", "memory": "unknown"}
    for claim in claims:
        name, equals, formula = (part.strip() for part in claim.partition("="))
        if name not in CLAIMS:
            raise ValueError(
                f"unknown claim {claim!r}; what can be claimed: "
                f"{', '.join(_FLAGS)}, approximates, time=O(...), memory=O(...)."
            )
        if name in ("time", "memory"):
            if not equals or growth(formula) is None:
                raise ValueError(
                    f"the claim `{name}` needs a growth, such as {name}=O(T), but is "
                    f"{claim!r}."
                )
            found[name] = formula
        elif equals:
            raise ValueError(f"the claim `{name}` takes no value, but is {claim!r}.")
        elif name == "approximates":
            found[name] = variant.approximates or dot_product
        else:
            found[name] = True
    return dataclasses.replace(variant, **found)


def claimed(variant: Variant) -> dict[str, Any]:
    """The claims of a record, as plain values for tables and JSON.

    >>> from attn_jax.variant import VARIANTS
    >>> claimed(VARIANTS["dot_product"])["exact"]
    True
    """
    told: dict[str, Any] = {name: getattr(variant, name) for name in _FLAGS}
    told["approximates"] = getattr(variant.approximates, "__name__", None)
    return told | {"time": variant.time, "memory": variant.memory}
