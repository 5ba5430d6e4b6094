"""Theorems execute, and their table says what they found."""

from __future__ import annotations

import functools
import json

import pytest

from attn_jax.__main__ import main
from attn_jax.tools import theorems
from attn_jax.variant import VARIANTS


@functools.cache
def computed(name):
    return theorems.run([name])


@pytest.mark.parametrize("name", theorems.THEOREMS)
def test_a_theorem_holds_in_every_setting(name):
    results = computed(name)
    assert results
    assert all(result.holds for result in results), theorems.table(results)


def test_every_approximation_and_every_pattern_has_a_setting():
    told = {
        name: " ".join(result.claim for result in computed(name))
        for name in ("limits", "features", "patterns")
    }
    near = {n for n, v in VARIANTS.items() if v.approximates is not None}
    assert all(n in told["limits"] or n in told["features"] for n in near)
    fixed = (
        "truncated block_local sparse_strided sparse_fixed longformer bigbird etc axial"
    )
    assert all(name in told["patterns"] for name in fixed.split())


def test_the_command_prints_statement_source_error_and_tolerance(capsys):
    assert main(["theorems", "truncated"]) == 0
    out = capsys.readouterr().out
    assert "look-ahead" in out and "arXiv:1910.12977" in out
    assert "holds  0.0e+00 <= 0e+00  3 layers of (4, 2): frames seen ahead" in out
    assert main(["theorems", "truncated", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and all(row["holds"] for row in told["theorems"])


def test_what_fails_is_told(monkeypatch, capsys):
    def settings():
        yield "two sides", 2.0, 1.0
        yield "far apart", 2.0, 1.0, ">="

    wrong = theorems.Theorem("Something untrue.", "nowhere", settings)
    monkeypatch.setitem(theorems.THEOREMS, "wrong", wrong)
    assert main(["theorems", "wrong"]) == 1
    out = capsys.readouterr().out
    assert "FAILS  2.0e+00 <= 1e+00  two sides" in out
    assert "holds  2.0e+00 >= 1e+00  far apart" in out
    assert "2 settings: 1 do not hold" in out
    assert main(["theorems", "nothing"]) == 2
    assert "no theorem 'nothing'; there are: convolution" in capsys.readouterr().err
