"""What is committed comes from clean commits, so that a result names the code of it."""

from __future__ import annotations

import collections
import json
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


def provenances(value):
    """Every mapping that names a commit, however deep."""
    if isinstance(value, dict):
        if "git_dirty" in value:
            yield value
        for item in value.values():
            yield from provenances(item)
    elif isinstance(value, list):
        for item in value:
            yield from provenances(item)


def dirty():
    """File -> commit -> number of its records that are not of that commit alone."""
    found = {}
    for folder in ("experiments", "benchmarks"):
        for path in sorted((ROOT / folder).glob("**/results/**/*.json*")):
            text = path.read_text(encoding="utf-8")
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            made = [p for line in lines for p in provenances(json.loads(line))]
            # No commit at all is as bad: a folder that was no checkout.
            commits = [p["git_commit"] for p in made if p["git_dirty"] is not False]
            if commits:
                found[str(path.relative_to(ROOT))] = collections.Counter(commits)
    return found


def test_no_result_is_of_code_that_no_commit_holds():
    found = dirty()
    assert not found, (
        f"{found}: commit the code first, run again, then commit the results"
    )
