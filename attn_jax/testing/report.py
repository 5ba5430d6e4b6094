"""Running the checks on one function, and telling what they found."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from attn_jax.testing import contract, cost, masking, meshes, numerics
from attn_jax.testing.claims import claimed, with_claims
from attn_jax.testing.outcome import Fault, Finding, NotApplicable
from attn_jax.testing.trial import Trial, quick_compile
from attn_jax.variant import VARIANTS, Variant, load, resolve

__all__ = ["CHECKS", "Report", "Row", "assert_conforms", "check", "table"]

Verdict = Literal["pass", "fail", "note", "skip"]

_FUNCTIONS: dict[str, Callable[[Trial], Finding]] = {
    "shape": contract.shape,
    "dtype": contract.dtype,
    "jit": contract.jit,
    "vmap": contract.vmap,
    "gradient": numerics.gradient,
    "float64": numerics.float64,
    "exact": numerics.exact,
    "bias": masking.bias,
    "mask": masking.mask,
    "key_mask": masking.key_mask,
    "causal": masking.causal,
    "empty_rows": masking.empty_rows,
    "refusal": contract.refusal,
    "equivariance": contract.equivariance,
    "stability": numerics.stability,
    "narrow": numerics.narrow,
    "scale": contract.scale,
    "determinism": contract.determinism,
    "dropout": numerics.dropout,
    "state": contract.state,
    "step": contract.step,
    "approximation": numerics.approximation,
    "cost": cost.cost,
    "lowering": cost.lowering,
    "shard_map": meshes.shard_map,
    "explicit_mesh": meshes.explicit_mesh,
}

CHECKS: tuple[str, ...] = tuple(_FUNCTIONS)
"""Names of the checks, in the order in which they run."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One check and its verdict.

    Attributes:
      check: a name in `CHECKS`.
      verdict: "pass"; "fail"; "note" where nothing was claimed and this only tells what
        was found; "skip" where there was nothing to check.
      claim: what the check asks, in a line.
      evidence: what was seen.
      measured: figures behind it.
    """

    check: str
    verdict: Verdict
    claim: str
    evidence: str
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """What the checks found of one function.

    Attributes:
      name: of the variant.
      claims: what was claimed, by name.
      rows: one a check.
      seconds: how long it took.
    """

    name: str
    claims: Mapping[str, Any]
    rows: tuple[Row, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(row.check for row in self.rows if row.verdict == "fail")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "ok": self.ok,
            "failed": list(self.failed),
            "claims": dict(self.claims),
            "checks": [_plain(dataclasses.asdict(row)) for row in self.rows],
            "seconds": round(self.seconds, 2),
        }


def _plain(value: Any) -> Any:
    """JSON has no infinity: what is not finite becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _run(name: str, trial: Trial) -> Row:
    function = _FUNCTIONS[name]
    claim = (function.__doc__ or "").split("\n")[0]
    # The cost of the program is that of the optimised one.
    quick = contextlib.nullcontext() if name == "cost" else quick_compile()
    try:
        with quick:
            found = function(trial)
    except NotApplicable as reason:
        return Row(name, "skip", claim, str(reason))
    except Fault as fault:
        return Row(name, "fail", claim, str(fault), fault.measured)
    except Exception as error:  # whatever a function of someone else's raises
        said = " ".join(str(error).split())[:300] or "no message"
        return Row(name, "fail", claim, f"raises {type(error).__name__}: {said}")
    verdict: Verdict = "note" if found.note else "pass"
    return Row(name, verdict, claim, found.evidence, found.measured)


def _chosen(only: Sequence[str] | None) -> tuple[str, ...]:
    for name in only or ():
        if name not in CHECKS:
            raise ValueError(f"no check {name!r}; the checks: {', '.join(CHECKS)}.")
    return tuple(name for name in CHECKS if only is None or name in only)


def check(
    fn: str | Callable[..., Any] | Variant,
    claims: str | Sequence[str] | None = None,
    *,
    init: str | Callable[..., Any] | None = None,
    options: Mapping[str, Any] | None = None,
    only: Sequence[str] | None = None,
    say: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Tries what an attention function claims, and tells what holds.

    Claims are those of its record (`Variant`), or `claims`. For a plain function
    without either they are read from it: it claims each argument that it takes and
    does not refuse by name while it is traced, T ≠ S and V ≠ H unless it raises.

    Short sequences are used, of lengths that are no multiple of a block; the cost is
    that of the compiled program at T = 1,024, 2,048 and 4,096, which is not run.

    Args:
      fn: name, `path/file.py:function`, function or `Variant`.
      claims: of `CLAIMS`, as a list or with commas between, such as
        "mask,key_mask,causal,exact,time=O(T)"; what is not named must be refused.
      init: makes its parameters, `init(rng, head_dim, ...) -> params` of one head; a
        function or `path/file.py:init`. None takes `<function>_init` beside it.
      options: of the function or its `init`, for every check.
      only: names of the checks to run; None runs all.
      say: told each row as it comes.

    Returns:
      The report.

    Raises:
      ValueError: if there is no such function, claim, option or check, or if it takes
        `params` and nothing makes them.

    >>> report = check("dot_product", only=["shape", "causal"])
    >>> report.ok, [row.verdict for row in report.rows]
    (True, ['pass', 'pass'])
    """
    began = time.perf_counter()
    chosen = _chosen(only)
    variant = resolve(fn)
    if init is not None:
        variant = dataclasses.replace(variant, init=_init(init))
    if variant.init is None and variant.needs("params"):
        variant.make(jax.random.key(0), 1)  # raises, and says how to give one
    built_in = {v.base for v in VARIANTS.values()}
    declared = isinstance(fn, Variant) or variant.base in built_in
    declared = declared or (isinstance(fn, str) and variant.name != fn)
    variant = with_claims(variant, claims, declared=declared)
    untried = variant.bind(**(options or {}))
    tried = {k: x for k, x in variant.trial.items() if k not in untried.options}
    trial = Trial(untried.bind(**tried), untried)
    rows = []
    for name in chosen:
        rows.append(_run(name, trial))
        say(rows[-1])
    return Report(
        variant.name, claimed(variant), tuple(rows), time.perf_counter() - began
    )


def _init(init: str | Callable[..., Any]) -> Callable[..., Any]:
    """A function, or the one that `path/file.py:function` names."""
    if callable(init):
        return init
    found = load(init)
    if not callable(found):
        raise ValueError(f"`init` must name a function, but {init!r} is {found!r}.")
    return found


def assert_conforms(
    fn: str | Callable[..., Any] | Variant,
    claims: str | Sequence[str] | None = None,
    *,
    init: str | Callable[..., Any] | None = None,
    options: Mapping[str, Any] | None = None,
    only: Sequence[str] | None = None,
) -> None:
    """Raises if a claim of an attention function does not hold: for tests.

    Args:
      fn, claims, init, options, only: as for `check`.

    Raises:
      AssertionError: with the table of checks, if one failed.
      ValueError: if there is no such function, claim, option or check.

    >>> assert_conforms("dot_product", only=["shape"])
    """
    report = check(fn, claims, init=init, options=options, only=only)
    if not report.ok:
        raise AssertionError(f"{report.name} does not conform\n{table(report)}")


def table(report: Report, *, width: int = 100) -> str:
    """The report as text: claims, then a line or more for each check.

    Args:
      report: from `check`.
      width: of a line.

    Returns:
      Lines.
    """
    flags = [k for k, v in report.claims.items() if v is True]
    rest = [
        f"{k}={v}"
        for k, v in report.claims.items()
        if isinstance(v, str) and v not in ("unknown", "")
    ]
    lines = [
        *textwrap.wrap(
            f"{report.name} claims: {', '.join(flags + rest) or 'nothing'}", width
        ),
        "",
    ]
    margin = max(map(len, CHECKS)) + 8
    for row in report.rows:
        mark = row.verdict.upper() if row.verdict == "fail" else row.verdict
        head = f"{row.check.ljust(margin - 8)}  {mark.ljust(4)}  "
        body = row.evidence
        if row.verdict == "fail":
            body = f"{row.claim} But {body}"
        lines += textwrap.wrap(
            body,
            width,
            initial_indent=head,
            subsequent_indent=" " * margin,
            break_long_words=False,
        ) or [head]
    count = {v: sum(row.verdict == v for row in report.rows) for v in ("pass", "fail")}
    said = f"{count['fail']} failed" if count["fail"] else "all claims hold"
    lines += ["", f"{said}: {count['pass']} checks passed, {report.seconds:.1f} s"]
    return "\n".join(lines)
