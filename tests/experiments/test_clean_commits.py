"""What is committed comes from clean commits, so that a result names the code of it."""

from __future__ import annotations

import collections
import json
import pathlib

ROOT = pathlib.Path(__file__).parents[2]

# Results of before that was asked for, of code that no commit holds: file -> the commit
# that it was changed from -> number of records. They may vanish, as results are made
# anew; nothing may be added.
GRANDFATHERED: dict[str, dict[str | None, int]] = {
    "experiments/attention_vs_rnn/results/results.jsonl": {
        "e1f62138643d882b053e9d659dda15f7421cc347": 13,
    },
    "experiments/sequence_labelling/results/phones/maps.json": {
        "8262c2daa17dd26da91d71f1854b234c00eedbab": 1,
    },
    "experiments/sequence_labelling/results/phones/streaming.json": {
        "1e64093246399f15dfa5fa3fe1e70bda5ee07eec": 1,
    },
}


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


def test_no_new_result_is_of_code_that_no_commit_holds():
    for path, commits in dirty().items():
        for commit, count in commits.items():
            assert count <= GRANDFATHERED.get(path, {}).get(commit, 0), (
                f"{path} has {count} records of {commit} with changes: commit the code "
                "first, run again, then commit the results"
            )
