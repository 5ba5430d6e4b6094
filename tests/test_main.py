"""The command line: what `list` prints, and what it says to bad arguments."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from attn_jax import CAPABILITIES, VARIANTS, __version__
from attn_jax.__main__ import main
from attn_jax.testing import assert_conforms
from attn_jax.tools import survey
from tests import helpers


def _json(capsys, *arguments):
    assert main(["list", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_table_has_a_row_and_a_line_for_each_variant(capsys):
    assert main(["list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    columns = header.split()
    assert columns[0] == "variant"
    assert set(CAPABILITIES) < set(columns)
    rows = dict(zip(VARIANTS, lines[: len(VARIANTS)], strict=True))
    for name, variant in VARIANTS.items():
        cells = dict(zip(columns, rows[name].split(), strict=True))
        assert cells["variant"] == name
        for flag in (*CAPABILITIES, "exact"):
            assert cells[flag] == ("yes" if getattr(variant, flag) else "-")
        assert cells["time"] == variant.time
        assert cells["memory"] == variant.memory
        assert variant.paper in cells["paper"]
        assert any(line.endswith(variant.summary) for line in lines[len(VARIANTS) :])


def test_json_says_the_same(capsys):
    told = _json(capsys)
    assert told["attn_jax"] == __version__
    by_name = {row["name"]: row for row in told["variants"]}
    assert list(by_name) == list(VARIANTS)
    for name, variant in VARIANTS.items():
        row = by_name[name]
        assert row["capabilities"] == variant.capabilities()
        assert row["params"] == (variant.init is not None)
        for field in ("exact", "stochastic", "time", "memory", "paper", "summary"):
            assert row[field] == getattr(variant, field)


def test_a_function_of_the_user(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "def mean(query, key, value, *, key_mask=None):\n"
        '    """Averages the values."""\n'
        "    return value\n"
    )
    (row,) = _json(capsys, f"{file}:mean")["variants"]
    assert row["summary"] == "Averages the values."
    assert row["capabilities"]["key_mask"] is True
    assert row["capabilities"]["mask"] is False
    assert main(["list", f"{file}:mean", "additive"]) == 0
    out = capsys.readouterr().out
    assert "arXiv:1409.0473" in out and "blockwise" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["lst"], "invalid choice: 'lst'"),
        (["list", "--jason"], "unrecognized arguments: --jason"),
    ],
)
def test_bad_command_lines_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_variants_exit_with_2(capsys):
    assert main(["list", "dot_produkt"]) == 2
    assert "Did you mean 'dot_product'" in capsys.readouterr().err
    assert main(["list", "absent.py:fn"]) == 2
    captured = capsys.readouterr()
    assert "no such file" in captured.err and not captured.out


def test_terminal_without_unicode(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["list", "dot_product"]) == 0
    sys.stdout.flush()
    assert b"O(T?S?H)" in raw.getvalue()


def test_as_a_module():
    assert helpers.run("-m", "attn_jax", "--version").strip() == __version__


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m attn_jax list --json | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True
    )
    assert done.stdout == "{"
    assert done.stderr == ""
    assert done.returncode == 0


def test_models_names_every_size_with_its_cost(monkeypatch, capsys):
    from attn_jax import models

    few = {"vit": {"mu": models.SIZES["vit"]["mu"]}}
    monkeypatch.setattr(models, "SIZES", few)
    assert main(["models", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert (row["model"], row["size"], row["params"]) == ("vit", "mu", 204_938)
    assert 6.5e6 < row["flops"] < 7.5e6
    assert main(["models"]) == 0
    assert "204,938" in capsys.readouterr().out


def test_the_survey_beside_ours(monkeypatch, capsys):
    for row in survey.SURVEY:
        assert bool(row.ours) != bool(row.why), row
        assert all(kind in survey.KINDS for kind in row.kind.split("+")), row
        assert all(name in VARIANTS for name in row.ours), row
    assert len({row.model for row in survey.SURVEY}) == len(survey.SURVEY)
    few = {"Linear Transformer", "Synthesizer", "Funnel Transformer"}
    rows = tuple(row for row in survey.SURVEY if row.model in few)
    monkeypatch.setattr(survey, "SURVEY", rows)
    assert main(["list", "--survey"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("Synthesizer ")]) == 2
    (linear,) = (line.split() for line in lines if line.startswith("Linear "))
    assert linear[-3:] == ["linear", "O((T+S)·H·V)", "T^1.00"]
    assert any("pools between layers" in line for line in lines)
    assert main(["list", "--survey", "linear"]) == 2
    assert "--survey is a table of its own" in capsys.readouterr().err


def test_a_new_variant_keeps_the_contract_and_overwrites_nothing(tmp_path, capsys):
    spec = f"{tmp_path}/mine.py:attend"
    assert main(["new", spec]) == 0
    assert f"attn-jax check {spec}" in capsys.readouterr().out
    written = (tmp_path / "mine.py").read_text()
    claims = ("shape", "mask", "key_mask", "causal", "empty_rows", "bias")
    assert_conforms(spec, only=claims)
    assert main(["new", spec]) == 2
    assert "is there already and is left as it is" in capsys.readouterr().err
    assert (tmp_path / "mine.py").read_text() == written
    for wrong in ("mine.py", "mine:attend", "mine.py:2", "mine.py:def"):
        assert main(["new", wrong]) == 2
        assert "must be named path/file.py:function" in capsys.readouterr().err
    for taken in ("scores", "jnp", "len"):
        assert main(["new", f"{tmp_path}/other.py:{taken}"]) == 2
        assert "must have a name of its own" in capsys.readouterr().err
    assert main(["new", f"{tmp_path}/no/mine.py:attend"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_functions_are_compared_with_the_first(capsys):
    sizes = ["--lengths", "8,16", "--heads", "2", "--head-dim", "4", "--tokens", "16"]
    quick = ["--forward", "--rounds", "1", "--seconds", "0"]
    names = ["dot_product", "blockwise", "linear"]
    assert main(["compare", *names, *sizes, *quick, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == 2 * names
    assert [row["length"] for row in rows] == 3 * [8] + 3 * [16]
    for first, exact, other in (rows[:3], rows[3:]):
        assert first["distance"] == 0.0 and first["ratio"] == 1.0
        assert exact["distance"] < 1e-5 < 0.1 < other["distance"]
        assert other["ratio"] > 0.0
    assert main(["compare", *names, *sizes, *quick]) == 0
    assert "from those of dot_product" in capsys.readouterr().out
    assert main(["compare", "linear", "linear"]) == 2
    assert "two different functions or more" in capsys.readouterr().err
