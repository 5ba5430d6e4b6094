"""`attn-jax bench`: timing, exponents, programs, and the command on users' variants."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from attn_jax.__main__ import main
from attn_jax.tools import bench as benchmarking
from attn_jax.tools import cost

MINE = '''
import jax, jax.numpy as jnp
from attn_jax import Variant

def scored(query, key, value, *, params, is_causal=False, sharp=1.0):
    """Scores with a matrix of its own."""
    scores = (query @ params["w"]) @ key.T * sharp
    if is_causal:
        scores = jnp.where(jnp.tri(*scores.shape, dtype=bool), scores, -1e30)
    return jax.nn.softmax(scores) @ value

def scored_init(rng, head_dim, spread=0.1):
    return {"w": spread * jax.random.normal(rng, (head_dim, head_dim))}

def noisy(query, key, value, *, rng):
    """Attends to random keys."""
    scores = jax.random.normal(rng, (query.shape[0], key.shape[0]), value.dtype)
    return jax.nn.softmax(scores) @ value

def mean(query, key, value):
    return jnp.broadcast_to(value.mean(0), value.shape)

def broken(query, key, value):
    raise RuntimeError("out of order")

claims_causal = Variant(name="claims_causal", fn=mean, causal=True)
'''
TINY = ["--heads", "2", "--head-dim", "4", "--rounds", "1", "--seconds", "0"]


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return str(file)


def _bench(capsys, *arguments):
    assert main(["bench", *TINY, *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_round_times_all_in_turn():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    figures = benchmarking.alternate(calls, rounds=3, seconds=0.0)
    assert {name: len(values) for name, values in figures.items()} == {"a": 3, "b": 3}
    # Each twice to warm up and to see how long it takes; then a round more than kept.
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 4


def test_summary_takes_ratios_round_by_round():
    figures = {"base": [1.0, 2.0, 4.0], "it": [0.5, 2.0, 1.0]}
    base, row = benchmarking.summarize(figures, "base")
    assert (base["ratio"], base["ratio_low"], base["ratio_high"]) == (1.0, 1.0, 1.0)
    assert row["milliseconds"] == 1000.0
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (2.0, 1.0, 4.0)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponent_of_synthetic_costs(power):
    sizes = [256, 512, 1024, 4096]
    costs = [3e-5 * size**power for size in sizes]
    assert cost.fit_exponent(sizes, costs) == pytest.approx(power, abs=1e-9)


def test_no_exponent_from_too_little():
    assert cost.fit_exponent([1, 2], [1.0, 2.0]) is None
    assert cost.fit_exponent([1, 2, 4], [0.0, 0.0, 1.0]) is None
    assert cost.fit_exponent([2, 2, 2], [1.0, 2.0, 3.0]) is None


def test_exponents_are_of_one_example_and_the_largest_lengths():
    rows = [
        dict(
            name="it",
            direction="forward",
            length=length,
            batch=4096 // length,  # the same number of tokens at every length
            flops=length * 4096,
            temp_bytes=7 * 4096 // length,
            **({} if length == 1024 else {"milliseconds": 5.0 if length < 64 else 4.0}),
        )
        for length in (16, 32, 64, 128, 256, 1024)
    ]
    (found,) = benchmarking.exponents(rows)
    assert found["flops"] == pytest.approx(2.0)
    assert found["temp"] == pytest.approx(0.0, abs=0.01)
    assert found["lengths"] == 5
    (largest,) = benchmarking.exponents(rows, largest=3)
    assert largest["time"] == pytest.approx(1.0)  # of 64, 128 and 256
    assert found["time"] != pytest.approx(1.0, abs=0.01)


def test_program_tells_memory_before_it_runs():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    made = cost.program(lambda a, b: jnp.exp(a @ b), x, x)
    assert made.flops.total == 2 * 64**3 + 64**2
    assert made.temp_bytes is not None and made.peak_bytes is not None
    assert made.peak_bytes == made.temp_bytes + 3 * 4 * 64**2


def test_memory_that_a_library_takes_is_told():
    """XLA:CPU may leave an attention to a library, and plans none of its scores."""
    hlo = """
%fused_computation.1 (p: f32[8,4]) -> f32[8,4] {
  %dot.1 = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}
  ROOT %dot.2 = f32[8,4]{1,0} dot(%c, %d), lhs_contracting_dims={1}
}

%small (p: f32[2,4]) -> f32[2,4] {
  %dot.3 = bf16[2,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %dot.9 = f32[99,99]{1,0} dot(%x, %x), lhs_contracting_dims={1}
  %ynn = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%fused_computation.1, metadata={}
  %ynn.2 = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%small
}
"""
    assert cost._unplanned_bytes(hlo) == 8 * 8 * 4
    assert cost._unplanned_bytes("ENTRY %main {\n}") == 0


def test_users_variant_with_parameters(mine, capsys):
    told = _bench(
        capsys, "--variant", f"{mine}:scored", "--variant", "blockwise", "--causal",
        "--lengths", "8,16,32", "--tokens", "32", "--option", "sharp=0.5",
        "--option", "spread=0.2",
    )  # fmt: skip
    names = ["jax.nn", "dot_product", f"{mine}:scored", "blockwise"]
    assert len(told["rows"]) == len(names) * 3 * 2
    for row in told["rows"]:
        assert row["milliseconds"] > 0 and row["ratio"] > 0 and row["flops"] > 0
        assert row["batch"] * row["length"] == 32
        assert row["peak_bytes"] > row["temp_bytes"]
    assert [row["name"] for row in told["rows"][:4]] == names
    (growth,) = (
        row
        for row in told["exponents"]
        if (row["name"], row["direction"]) == ("dot_product", "forward")
    )
    assert 1.9 < growth["flops"] <= 2.0


def test_random_variant_and_one_direction(mine, capsys):
    told = _bench(
        capsys, "--variant", f"{mine}:noisy", "--lengths", "8", "--batch", "3",
        "--backward", "--dtype", "bfloat16",
    )  # fmt: skip
    assert {row["direction"] for row in told["rows"]} == {"forward + backward"}
    assert {row["batch"] for row in told["rows"]} == {3}


def test_table(mine, capsys):
    assert main(["bench", *TINY, "--lengths", "4,8,16", "--forward"]) == 0
    out = capsys.readouterr().out
    assert "exponent of T" in out and "x jax.nn" in out
    for name in ("jax.nn", "dot_product", "blockwise"):
        assert sum(line.startswith(name) for line in out.splitlines()) == 4


def test_what_would_not_fit_is_not_run(capsys, monkeypatch):
    monkeypatch.setattr(benchmarking, "available_memory", lambda: 100)
    assert main(["bench", *TINY, "--lengths", "32", "--forward"]) == 0
    out = capsys.readouterr().out
    assert "jax.nn, T = 32: not run: it needs" in out
    assert "more than 0.5 of the 100 B that are free" in out


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("mean", ["--causal"], "cannot honour `is_causal=True`"),
        ("claims_causal", ["--causal"], "takes no option `is_causal`"),
        ("broken", [], "RuntimeError: out of order"),
        ("absent", [], "no function 'absent'"),
        ("scored", ["--option", "shape=1"], "takes an option 'shape'"),
        ("mean", ["--heads", "0"], "`heads` must be at least 1, but is 0"),
        ("mean", ["--figure", "/no/such/folder/f.png"], "no such folder"),
    ],
)
def test_what_cannot_be_done_exits_with_2(mine, capsys, function, arguments, message):
    spec = f"{mine}:{function}"
    assert main(["bench", *TINY, "--lengths", "8", "--variant", spec, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


@pytest.mark.parametrize(
    "arguments",
    [["--lengths", "8;9"], ["--option", "left"], ["--tokens", "8", "--batch", "1"]],
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert arguments[0].strip("-") in capsys.readouterr().err


def test_figure_and_json_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figure, stored = tmp_path / "f.png", tmp_path / "f.json"
    arguments = ["--lengths", "4,8,16", "--figure", str(figure), "--json", str(stored)]
    assert main(["bench", *TINY, *arguments]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(stored.read_text())["rows"]) == 18
    assert "exponent of T" in capsys.readouterr().out


def test_figure_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="needs matplotlib: pip install"):
        benchmarking.figure([], tmp_path / "f.png")
