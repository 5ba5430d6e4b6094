"""What the READMEs say: the example runs, and every figure is in the results."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import statistics

import jax.numpy as jnp
import pytest
from flax import nnx

import attn_jax
from attn_jax import __main__ as command_line
from experiments.core.report import difference, rows_of
from experiments.core.stats import summarize
from experiments.core.store import read_jsonl

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "data_scaling" / "results" / "results.jsonl"
FAMILIES = {"ViT": "vit", "ResNet": "resnet", "hybrid": "hybrid"}
# "ViT .891 ± .002", with the N of the sentence after it: "at N = 60,000".
QUOTED = re.compile(r"(ViT|ResNet|hybrid)(?: \(([a-z_]+)\))? (\.\d{3}) ± (\.\d{3})")


def _blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_the_example_variant_runs_as_written(tmp_path, monkeypatch):
    variant, use = _blocks("python")
    assert len(variant.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cosine.py").write_text(variant)
    names: dict[str, object] = {}
    exec(compile(use, "README.md", "exec"), names)
    layer = names["layer"]
    assert isinstance(layer, nnx.MultiHeadAttention)
    assert layer(jnp.ones((2, 3, 64))).shape == (2, 3, 64)
    record = attn_jax.resolve("cosine.py:cosine")
    assert record.bias and record.key_mask and record.causal and not record.mask
    # It is what it claims to be: padding that holds NaN has no gradient.
    wanted = "check cosine.py:cosine --only shape,key_mask,causal".split()
    assert command_line.main(wanted) == 0


def _kind(task: str) -> str:
    """What N of a task counts, as it is quoted."""
    return "scenes" if task.startswith("scenes") else "images"


@pytest.mark.parametrize("file", ["README.md", "experiments/README.md"])
def test_every_quoted_accuracy_is_in_the_results(file):
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    final = [r for r in records if r["config"]["phase"] == "final"]
    text = re.sub(r"\s+", " ", (ROOT / file).read_text())
    quotes = list(QUOTED.finditer(text))
    assert quotes
    for quote in quotes:
        family, size, mean, std = quote.groups()
        kinds = r"at N = ([\d,]+)(?: (scenes|images))?"
        at = re.search(kinds, text[quote.end() :])
        assert at is not None, f"{quote[0]}: no N follows"
        n, kind = int(at[1].replace(",", "")), at[2] or "images"
        values = [
            r["metrics"]["test_accuracy"]
            for r in final
            if r["config"]["model"] == FAMILIES[family]
            and r["config"]["size"] == (size or "mu")
            and r["config"]["n"] == n
            and _kind(r["config"]["task"]) == kind
        ]
        assert len(values) >= 3, f"{quote[0]}: {len(values)} seeds"
        said = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        assert f"{mean} ± {std}" == said.replace("0.", "."), (quote[0], n, said)


INTERVAL = re.compile(r"\[[+−]?\d*\.\d+, [+−]?\d*\.\d+\]")


def _ends(interval: str) -> tuple[str, ...]:
    """Both ends without the sign of which side is ahead."""
    return tuple(sorted(re.findall(r"[−]?\.\d+|−?\d+\.\d+", interval)))


def _intervals() -> set[tuple[str, ...]]:
    """Those of all reports, and of pairs of models of sequence labelling."""
    folders = (ROOT / "experiments").glob("*/results/**/report.md")
    said = INTERVAL.findall("".join(path.read_text() for path in folders))
    for folder in (ROOT / "experiments" / "sequence_labelling" / "results").iterdir():
        rows = [r for r in rows_of(read_jsonl(folder / "results.jsonl")) if r.records]
        for one, two in itertools.permutations(rows, 2):
            if one.config["updates"] == two.config["updates"] >= 800:
                for metric in ("test_accuracy", "test_whole_accuracy"):
                    if metric in one.records[0]["metrics"]:
                        said.append(difference(one, two, metric)[1])
    turned = str.maketrans("+−", "−+")
    both = [*said, *(text.translate(turned) for text in said)]
    return {_ends(found) for text in both for found in INTERVAL.findall(text)}


def test_every_interval_follows_from_records():
    known, quoted = _intervals(), 0
    for file in ("README.md", "experiments/README.md"):
        text = re.sub(r"\s+", " ", (ROOT / file).read_text())
        for quote in INTERVAL.findall(text):
            assert _ends(quote) in known, (file, quote)
            quoted += 1
    assert quoted >= 20


SPREAD = re.compile(r"\d*\.\d+ ± \d*\.\d+")
EXPERIMENT = re.compile(r"python -m experiments\.(\w+)(?: --preset (\w+))?")
# Measured where heads look, of which the report alone tells.
DERIVED = {"attention_as_conv"}


def _folder(row: str) -> pathlib.Path:
    """Where the results of a table's row lie, by its command."""
    name, preset = EXPERIMENT.findall(row)[0]
    folder = ROOT / "experiments" / name / "results"
    return folder / preset if (folder / (preset or "-")).is_dir() else folder


def _said(folder: pathlib.Path) -> set[str]:
    """Every mean ± deviation that the records of a folder give, to 2 to 4 digits."""
    found = set()
    records = read_jsonl(folder / "results.jsonl")
    groups: dict[tuple[object, ...], list[float]] = {}
    for row in rows_of(records):
        for record in row.records:
            for metric, value in record["metrics"].items():
                if isinstance(value, float):
                    groups.setdefault((id(row), metric), []).append(value)
    for record in records:  # baselines of several seeds
        metrics, config = record["metrics"], record["config"]
        n = metrics.get("n", config.get("n"))
        if config["phase"] == "baseline" and n is not None:
            name = metrics.get("baseline", config["model"])
            key = config["task"], name, n, metrics.get("n_used")
            groups.setdefault(key, []).append(metrics["test_accuracy"])
        name, split, _ = config["model"].partition(" split=")
        if config["phase"] == "baseline" and split:  # and of several splits
            for metric, value in metrics.items():
                if isinstance(value, float):
                    groups.setdefault((config["task"], name, metric), []).append(value)
    for values in groups.values():
        if len(values) > 1:
            spread = statistics.stdev(values)
            # Half of a last digit goes either way, by how the sum is rounded.
            for mean in (statistics.mean(values), summarize(values).mean):
                for scale, digits in ((1, 2), (1, 3), (1, 4), (100, 2)):  # 100: in %
                    text = f"{scale * mean:.{digits}f} ± {scale * spread:.{digits}f}"
                    found.add(re.sub(r"\b0\.", ".", text))
    return found


@pytest.mark.parametrize("file", ["README.md", "experiments/README.md"])
def test_every_mean_and_deviation_of_a_table_follows_from_its_records(file):
    quoted, before = 0, ""
    for line in (ROOT / file).read_text().splitlines():
        if not (line.startswith("|") and SPREAD.search(line)):
            continue
        if EXPERIMENT.search(line):
            before = line
        folder = _folder(before)  # "as above" stands for a command
        said = _said(folder)
        if folder.parent.name in DERIVED:
            report = (folder / "report.md").read_text()
            said |= set(SPREAD.findall(report))
        for quote in SPREAD.findall(line):
            assert quote in said, (quote, folder.parent.name)
            quoted += 1
    assert quoted >= 10
