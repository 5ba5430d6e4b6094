"""What is committed of the experiments: reports follow from results."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest

from experiments.core.store import read_jsonl

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = [
    *sorted((ROOT / "experiments/sequence_labelling/results").iterdir()),
    *(
        ROOT / f"experiments/{name}/results"
        for name in (
            "data_scaling positions attention_as_conv attention_vs_rnn graphs".split()
        )
    ),
]
QUOTED = re.compile(r"\.\d{3,4} ± \.\d{3,4}")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.parent.name + "-" + f.name)
def test_a_report_is_what_its_results_give(folder, tmp_path):
    for extra in folder.glob("*.json"):
        (tmp_path / extra.name).write_bytes(extra.read_bytes())
    name = folder.relative_to(ROOT / "experiments").parts[0]
    report = importlib.import_module(f"experiments.{name}.report")
    report.write_report(read_jsonl(folder / "results.jsonl"), tmp_path)
    drawn = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert drawn == (folder / "report.md").read_text(encoding="utf-8")
    for figure in re.findall(r"\]\((\w+\.png)\)", drawn):
        assert (folder / figure).is_file(), figure


def test_every_value_that_is_quoted_stands_in_a_report():
    reports = "".join((f / "report.md").read_text(encoding="utf-8") for f in FOLDERS)
    text = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    lines = [
        line
        for line in text.splitlines()
        if "python -m experiments." in line and "data_scaling" not in line
    ]
    quotes = [quote for line in lines for quote in QUOTED.findall(line)]
    assert len(quotes) >= 8
    for quote in quotes:
        assert quote in reports, quote
