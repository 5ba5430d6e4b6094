"""The experiment of the tutorial, as it stands there, in one file."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys

from experiments.core import run
from experiments.core.store import read_jsonl

ROOT = pathlib.Path(__file__).parents[2]


def test_an_experiment_is_one_file(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/tutorials/experiment.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python file=marked.py\n(.*?)```", text, re.S)
    file = tmp_path / "marked.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("experiments.marked", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "experiments.marked", module)
    spec.loader.exec_module(module)
    more = "--engine inline --seeds 2 --vmap-seeds --size 4 --updates 300".split()
    assert run.run(module.EXPERIMENT, ["--out", str(tmp_path / "out"), *more]) == 0
    said = capsys.readouterr().out
    assert "# The marked number of 4" in said and "| zero |" in said
    records = read_jsonl(tmp_path / "out" / "results.jsonl")
    found = {
        (r["config"]["model"], r["config"]["seed"]): r["metrics"]["test_rmse"]
        for r in records
        if r["config"]["phase"] == "final"
    }
    assert len(found) == 4
    assert max(found["attention", s] for s in (0, 1)) < min(
        found["mean", s] for s in (0, 1)
    )
