"""The kit's report, its table, its command and its entry point for tests."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import pytest

from attn_jax.__main__ import main
from attn_jax.testing import CHECKS, assert_conforms, check, table
from attn_jax.variant import VARIANTS

WRONG = pathlib.Path(__file__).parents[1] / "wrong_variants"
MASK = f"{WRONG / 'ignored_mask.py'}:attend"


def test_a_fault_is_told_with_evidence_and_exit_status_1(capsys):
    assert main(["check", MASK, "--only", "mask,shape"]) == 1
    captured = capsys.readouterr()
    assert "mask           FAIL  True means attend" in captured.out
    assert "pairs that are masked have a gradient to value, the first [t=" in (
        " ".join(captured.out.split())
    )
    assert "1 failed: 1 checks passed" in captured.out
    assert "FAILED: mask" in captured.err


def test_json_has_every_row_and_figure(capsys):
    assert main(["check", "dot_product", "--json", "--only", "shape,cost"]) == 0
    told = json.loads(capsys.readouterr().out)
    (one,) = told["variants"]
    assert told["ok"] and one["ok"] and one["failed"] == []
    assert one["claims"]["exact"] is True and one["claims"]["time"] == "O(T·S·H)"
    shape, cost = one["checks"]
    assert (shape["check"], shape["verdict"]) == ("shape", "pass")
    plain = cost["measured"]["plain"]
    assert plain["exponents"]["flops"] == pytest.approx(2.0, abs=0.05)
    assert [row["length"] for row in plain["lengths"]] == [1024, 2048, 4096]


def test_all_checks_every_variant(monkeypatch, capsys):
    few = {name: VARIANTS[name] for name in ("dot_product", "additive")}
    monkeypatch.setattr("attn_jax.__main__.VARIANTS", few)
    assert main(["check", "--all", "--only", "shape"]) == 0
    captured = capsys.readouterr()
    assert "2 variants, 0 with a claim that does not hold" in captured.out
    assert "additive: 1 passed, ok" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a variant or path/file.py:function, or give --all"),
        (["dot_product", "--all"], "name a variant"),
        (["--all", "--claims", "mask"], "--claims and --init are of one function"),
        (["dot_produkt"], "Did you mean 'dot_product'"),
        (["absent.py:fn"], "no such file"),
        (["dot_product", "--claims", "speed"], "unknown claim 'speed'"),
        (["dot_product", "--only", "speed"], "no check 'speed'; the checks: shape"),
        (["dot_product", "--option", "tempo=3"], "takes no option `tempo`"),
        (["dot_product", "--init", "absent.py:init"], "no such file"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, capsys):
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_init_of_another_name_and_options_reach_the_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax.numpy as jnp\n"
        "def attend(query, key, value, *, params, power=1):\n"
        "    gain = (params['gain'] ** power).sum().astype(value.dtype)\n"
        "    mean = value.sum(axis=0, keepdims=True) / max(len(value), 1)\n"
        "    return jnp.broadcast_to(gain * mean, (len(query), value.shape[1]))\n"
        "def made(rng, head_dim, *, size=2, max_length=0):\n"
        "    assert max_length > 0\n"
        "    return {'gain': jnp.ones(size)}\n"
        "number = 3\n"
    )
    options = {"power": 2, "size": 5}
    init = f"{file}:made"
    only = ["shape", "gradient", "vmap", "equivariance"]
    report = check(f"{file}:attend", init=init, options=options, only=only)
    assert report.ok, table(report)
    with pytest.raises(ValueError, match="takes `params` but has no `init`"):
        check(f"{file}:attend", only=["shape"])
    with pytest.raises(ValueError, match="no function 'number'"):
        check(f"{file}:attend", init=f"{file}:number")


def test_whatever_the_function_raises_is_a_fault():
    def broken(query, key, value):
        raise ZeroDivisionError("by nothing")

    report = check(broken, only=["shape", "jit"])
    assert report.failed == ("shape", "jit")
    assert "raises ZeroDivisionError: by nothing" in report.rows[0].evidence


def test_a_claim_without_its_argument_fails():
    def plain(query, key, value):
        return jnp.broadcast_to(value.mean(0)[None], (len(query), value.shape[1]))

    for claim in ("bias", "mask", "key_mask", "causal"):
        report = check(plain, [claim, "cross", "value_dim"], only=[claim])
        assert report.failed == (claim,)
        assert "takes no argument" in report.rows[0].evidence


def test_assert_conforms_raises_with_the_table():
    assert_conforms("dot_product", only=["shape"])
    with pytest.raises(AssertionError, match="does not conform") as raised:
        assert_conforms(MASK, only=["mask"])
    assert "FAIL" in str(raised.value)


def test_a_program_that_unrolls_time_is_not_compiled():
    def unrolled(query, key, value):
        rows = [value[: t + 1].mean(axis=0) for t in range(len(query))]
        return jnp.stack(rows)

    for claims, verdict in (("value_dim", "skip"), ("value_dim,time=O(T)", "fail")):
        report = check(unrolled, claims, only=["cost"])
        assert report.rows[0].verdict == verdict
        assert "is a loop over T written in Python?" in report.rows[0].evidence


def test_checks_are_named_once():
    assert len(set(CHECKS)) == len(CHECKS)
