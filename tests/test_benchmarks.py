"""`python -m benchmarks`: rows, growth, the page of results, and a smoke run."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

# The training steps that are measured are those of the experiments.
pytest.importorskip("optax")

from attn_jax import VARIANTS
from benchmarks import __main__ as program  # noqa: E402
from benchmarks import accelerator, all_steps, growth, record, report, timing
from benchmarks.timing import Effort, compare, worst  # noqa: E402
from tests import helpers

QUICK = Effort(rounds=1, seconds=0.0, smoke=True, say=lambda text: None)

ROWS = [
    {
        "name": "peer",
        "milliseconds": 2.0,
        "against": {"peer": [1.0, 1.0, 1.0]},
        "peak_bytes": 3 * 2**20,
    },
    {
        "name": "ours|b",
        "milliseconds": 0.5,
        "against": {"peer": [4.0, 3.5, 4.25]},
        "gflops_per_second": 123.4,
    },
]
CANNED = {
    "title": "Some work",
    "about": "How it is measured.",
    "tables": [{"title": "small", "short": "small", "rows": ROWS, "note": "Noted."}],
    "targets": [
        {"work": "a", "at_least": 1.0, "aim": 1.3, "reached": 1.1, "told": "Small."},
        {"work": "b", "at_least": 10.0, "aim": 25.0, "reached": 9.99, "told": ""},
        {"work": "c", "at_least": 32.0, "aim": 100.0, "reached": 1024.0, "told": ""},
        {"work": "d", "at_least": 2.0, "aim": 4.0, "reached": None, "told": ""},
    ],
    "command": "python -m benchmarks",
    "date": "2020-02-02",
    "commit": "abc",
    "machine": {
        "cores": 2, "processor": "a processor", "vectors": ["avx2"], "device": "cpu",
        "devices": 1,
    },
    "versions": {"jax": "1.2.3", "torch": None},
    "environment": {"XLA_FLAGS": "--some_flag", "OMP_NUM_THREADS": None},
    "smoke": False,
    "seconds": 12.0,
}  # fmt: skip


def _cells(page: str, first: str) -> list[list[str]]:
    """Cells of the lines of tables that begin with a cell."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {first} ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_page_from_canned_results(tmp_path):
    record.store(tmp_path / "zebra.json", CANNED | {"title": "Unknown to the order"})
    record.store(tmp_path / "exact_attention.json", CANNED | {"targets": []})
    page = report.write(tmp_path).read_text()
    assert page.index("## Some work") < page.index("## Unknown to the order")
    peer, ours = _cells(page, "peer")[0], _cells(page, "ours\\|b")[0]
    assert peer == ["peer", "2.00", "1.00 (1.00 to 1.00)", "-", "3.0 MiB"]
    assert ours == ["ours\\|b", "0.5", "4.00 (3.50 to 4.25)", "123", "-"]
    # Once among all targets, and once beside the group.
    assert [row[3:5] for row in _cells(page, "a")] == [["1.10x", "at least"]] * 2
    assert _cells(page, "b")[0][3:5] == ["9.99x", "no"]
    assert _cells(page, "c")[0][3:5] == ["1,024x", "aim"]
    assert _cells(page, "d")[0][3:5] == ["-", "not measured"]
    assert "2 x a processor (avx2)" in page and "no torch" in page
    assert "XLA_FLAGS=--some_flag" in page and "OMP_NUM_THREADS" not in page
    assert "Noted." in page and "too small to mean anything" not in page


def test_stored_results_are_read_as_they_were(tmp_path):
    made = CANNED | {"number": 1.23456789, "rows": [[1, 2.0, None, "≥"]]}
    record.store(tmp_path / "memory.json", made)
    (found,) = report.load(tmp_path).values()
    assert found == made | {"number": 1.235}
    longest = max((tmp_path / "memory.json").read_text().splitlines(), key=len)
    assert len(longest) < 200


def test_the_page_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["--page", "--out", str(tmp_path)])
    assert "no results in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main(["--only", "quick_preset"])
    assert "--only must be of exact_attention, " in capsys.readouterr().err
    # The committed page is what its records say.
    for path in report.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text("utf-8"), "utf-8")
    assert program.main(["--page", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text("utf-8")
    assert page == (report.RESULTS / "README.md").read_text("utf-8")


def test_machine_and_versions_are_told():
    told = record.about("a command")
    assert told["command"] == "a command"
    assert told["machine"]["cores"] == record.cores() >= 1
    assert told["versions"]["jax"]
    assert "XLA_FLAGS" in told["environment"]


def test_rows_against_each_peer():
    calls = {"a": lambda: None, "b": lambda: None}
    rows = compare(calls, ("b", "absent"), QUICK, gflop=1.0, peak_bytes={"a": 5})
    assert [row["name"] for row in rows] == ["a", "b"]
    assert list(rows[0]["against"]) == ["b"]
    assert rows[1]["against"]["b"] == [1.0, 1.0, 1.0]
    assert rows[0]["gflops_per_second"] == pytest.approx(1e3 / rows[0]["milliseconds"])
    assert rows[0]["peak_bytes"] == 5 and "peak_bytes" not in rows[1]


def test_steps_that_are_behind_are_told():
    rows = [
        dict(name=name, milliseconds=1.0, against={all_steps.FASTEST: [x, x, x]})
        for name, x in (("vit", 1.5), ("gru", 0.75), ("cnn", 1.0))
    ]
    found = all_steps.record_of([dict(title="one core", short="one core", rows=rows)])
    (target,) = found["targets"]
    assert target["reached"] == 0.75
    assert target["told"] == "2 of 3 at 1 or more, gru, one core: 0.75"
    assert all_steps.record_of([])["targets"][0]["reached"] is None


def test_worst_of_several_settings():
    tables = [
        dict(short=short, rows=[dict(name="ours", against={"peer": [ratio, 0.0, 9.0]})])
        for short, ratio in (("small", 3.0), ("large", 2.0))
    ]
    assert worst(tables, "ours", "peer") == (2.0, "small: 3.00, large: 2.00")
    assert worst(tables, "ours", "torch") == (None, "")


def test_growth_stops_where_memory_or_time_would_not_do(monkeypatch):
    blockwise = VARIANTS["blockwise"]
    monkeypatch.setattr(timing, "available_memory", lambda: 10)
    rows = growth.measure(blockwise, (8, 16), "forward", QUICK)
    assert all(row["skipped"].startswith("needs ") for row in rows)
    assert all(row["flops"] > 0 and "milliseconds" not in row for row in rows)
    monkeypatch.setattr(timing, "available_memory", lambda: None)
    monkeypatch.setattr(growth, "MOST_SECONDS", 0.0)
    first, second = growth.measure(blockwise, (8, 16), "forward", QUICK)
    assert first["milliseconds"] > 0 and "skipped" not in first
    assert second["skipped"].startswith("would take some")


@pytest.mark.parametrize("name", ["additive", "linformer", "performer"])
def test_growth_takes_plain_sized_and_random_variants(name):
    (row,) = growth.measure(VARIANTS[name], (8,), "forward + backward", QUICK)
    assert row["milliseconds"] > 0 and row["flops"] > 0


def test_what_holds_an_accelerator_up_is_found():
    def clean(x):
        return jnp.sin(x) @ x

    def calls(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: x, shape, x) + 1

    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    for fn, called in ((clean, False), (calls, True)):
        for found in accelerator.exported(jax.jit(fn), (x,)).values():
            assert bool(found["callbacks"]) == called
            assert not found["float64"] and bool(found["export_bytes"]) != called
    with jax.enable_x64(True):
        wide = jax.ShapeDtypeStruct((4, 4), jnp.float64)
        assert accelerator.exported(jax.jit(clean), (wide,))["tpu"]["float64"]
    peak = accelerator.Peak(flops=100.0, narrow=2.0, bytes=10.0)
    assert accelerator.seconds(peak, 100.0, 5.0, narrow=True) == (1.0, "compute")
    assert accelerator.seconds(peak, 100.0, 30.0, narrow=False) == (3.0, "memory")


@pytest.mark.slow
def test_smoke_run(tmp_path):
    """Every group runs, is stored and stands on the page."""
    smoke = ("-m", "benchmarks", "--smoke", "--out", str(tmp_path))
    said = helpers.run(*smoke, OMP_NUM_THREADS="1")
    page = (tmp_path / "README.md").read_text()
    files = {
        path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")
    }
    assert set(files) == set(report.ORDER) - {"quick_preset", "before"}
    for stored in files.values():
        assert stored["smoke"] and stored["command"] == "python -m benchmarks --smoke"
        assert f"## {stored['title']}\n" in page
        assert stored["title"] in said
    assert "too small to mean anything" in page
    works = [
        target["work"] for stored in files.values() for target in stored["targets"]
    ]
    assert len(works) == 12
    for group in ("exact_attention", "truncated", "attention_layer"):
        for table in files[group]["tables"]:
            for row in table["rows"]:
                assert row["milliseconds"] > 0 and row["against"] and row["peak_bytes"]
    torch = files["exact_attention"]["versions"]["torch"]
    assert (torch is None) == ("PyTorch is not installed" in said)
