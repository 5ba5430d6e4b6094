"""How every experiment but data scaling is run, on cells that take no time."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from experiments.core.driver import Plan
from experiments.core.studies import Study

from experiments.core import driver, loop, trial, workers
from experiments.core.cell import Runtime
from experiments.core.store import ResultsStore
from tests.experiments.test_trial import LineCell, LineRunner

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Lines, and what is read for squares alone."""

    task: str = "lines"
    rates: tuple[float, ...] = (0.1,)
    tune_updates: int = 4
    corners: int = 4


class Runner(LineRunner):
    broken = False

    def start(self, cell):
        if self.broken and cell.seed == 1:
            raise RuntimeError("seed 1 cannot be had")
        return super().start(cell)


def floor():
    return {"test_error": 3.0}


def make_plans(experiment):
    if experiment.task == "squares":
        assert experiment.corners
    cells = tuple(
        LineCell(phase="tune", learning_rate=rate, updates=experiment.tune_updates)
        for rate in experiment.rates
    )
    study = Study("line", cells, 4, 3, metric="val_error", minimise=True)
    return [
        Plan("lines", "lines: two points", {"line": study}, {"zero": floor}, Runner)
    ]


def write_report(records, folder):
    text = "\n".join(f"{r['config'].get('seed')} {r['status']}" for r in records)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return f"REPORT of {len(records)} records"


def drive(out, experiment=None, make=make_plans, **runtime):
    return driver.drive(
        "no.module",
        [],
        out=out,
        runtime=Runtime(**(dict(workers=1) | runtime)),
        experiment=experiment or Experiment(),
        preset=Experiment(),
        make_plans=make,
        write_report=write_report,
    )


def test_a_failed_cell_is_told_and_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Runner, "broken", True)
    assert drive(tmp_path) == 1
    said = capsys.readouterr().out
    assert "REPORT of 3 records" in said
    assert "failed: 1 (the first: RuntimeError: seed 1 cannot be had)" in said
    assert "failed: 1" in (tmp_path / "report.md").read_text(encoding="utf-8")
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    (failed,) = (r for r in map(json.loads, lines) if r["status"] == "failed")
    assert "in start\n" in failed["metrics"]["traceback"]
    monkeypatch.setattr(Runner, "broken", False)
    assert drive(tmp_path) == 0
    said = capsys.readouterr().out
    assert "3 of 4 cells were done before." in said
    assert "REPORT of 4 records" in said and "failed:" not in said


def test_a_failed_baseline_is_told_too(tmp_path, capsys):
    def make(experiment):
        (plan,) = make_plans(experiment)
        return [dataclasses.replace(plan, baselines={"zero": lambda: 1 // 0})]

    assert drive(tmp_path, make=make) == 1
    assert "failed: 1 (the first: ZeroDivisionError" in capsys.readouterr().out
    assert len(ResultsStore(tmp_path).records()) == 4


def test_what_nothing_reads_is_refused_by_name(tmp_path, capsys):
    for changes, name in (
        (dict(corners=5), "--corners"),
        (dict(tune_updates=2), "--tune-updates"),
    ):
        assert drive(tmp_path, Experiment(**changes)) == 2
        assert f"nothing would read {name} here" in capsys.readouterr().err
    assert not ResultsStore(tmp_path).records()
    assert drive(tmp_path, Experiment(task="squares", corners=5)) == 0
    assert drive(tmp_path, Experiment(rates=(0.1, 0.2), tune_updates=2)) == 0
    assert drive(tmp_path, vmap_seeds=True) == 2
    assert "--vmap-seeds" in capsys.readouterr().err


def test_a_finished_run_starts_no_workers(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        workers, "run_workers", lambda count, *_, **__: started.append(count) or 0
    )
    assert drive(tmp_path, workers=8) == 0
    assert started == [4], "as many as there are cells"
    assert drive(tmp_path) == 0
    assert drive(tmp_path, workers=8) == 0
    assert started == [4]


def test_a_baseline_that_another_has_in_hand_is_awaited(tmp_path, monkeypatch, capsys):
    (plan,) = make_plans(Experiment())
    store = ResultsStore(tmp_path)
    config = plan.baseline_config("zero")
    other = store.claim(config)
    assert other.__enter__()

    def finish(seconds):
        store.put(config, status="done", metrics=floor(), wall_time_s=0.0)
        other.__exit__(None, None, None)

    monkeypatch.setattr(driver.time, "sleep", finish)
    assert drive(tmp_path) == 0
    assert "REPORT of 4 records" in capsys.readouterr().out


PROGRAM = """
import sys, time
from tests.experiments.test_driver import *

def slow():
    print("begun", flush=True)
    time.sleep(600)

def make(experiment):
    (plan,) = make_plans(experiment)
    return [dataclasses.replace(plan, baselines={"slow": slow})]

sys.exit(drive(pathlib.Path(sys.argv[1]), make=make))
"""


def test_a_signal_ends_a_baseline_of_minutes(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any(line == "begun\n" for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 143
    assert "Stopped by SIGTERM" in said


def test_an_error_of_no_message_keeps_its_traceback(tmp_path, capsys):
    def make(experiment):
        return [len(experiment.task + 1)]

    with pytest.raises(TypeError, match="concatenate"):
        drive(tmp_path, make=make)

    def refuse(experiment):
        trial.check_recipe(LineCell(seed=-1))

    assert drive(tmp_path, make=refuse) == 2
    assert "error: seed must be 0 or more" in capsys.readouterr().err


def test_labels_of_tuning_cells_say_what_is_tried():
    cell = LineCell(phase="tune", learning_rate=0.003)
    assert trial.phase_label(cell) == "tune (learning rate 0.003)"
    assert trial.phase_label(LineCell()) == "final"


def test_each_worker_has_an_accelerator_of_its_own(monkeypatch):
    monkeypatch.setattr(workers.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(workers.jax, "local_device_count", lambda: 2)
    assert workers.worker_count(Runtime(workers=2)) == 2
    with pytest.raises(ValueError, match="workers must be at most 2 here.*got 3"):
        workers.worker_count(Runtime(workers=3))
    seen = [workers.environment_of(i, 2, {}) for i in range(2)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in seen] == ["0", "1"]
    seen = workers.environment_of(1, 2, {"CUDA_VISIBLE_DEVICES": "3,GPU-8"})
    assert seen["CUDA_VISIBLE_DEVICES"] == "GPU-8"
    monkeypatch.setattr(workers.jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match="at most 1"):
        workers.worker_count(Runtime(workers=2))
    monkeypatch.setattr(workers.jax, "default_backend", lambda: "cpu")
    assert workers.worker_count(Runtime(workers=9)) == 9
    assert "CUDA_VISIBLE_DEVICES" not in workers.environment_of(0, 2, {})


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m experiments.graphs --help | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_program_ends_alike():
    """Each `main` is a `attn_jax._program.program`, which knows how to end."""
    bare = [
        path
        for folder in ("experiments", "benchmarks", "attn_jax")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"(?<!@program\n)def main\(", path.read_text(encoding="utf-8"))
        and path.name != "before.py"  # also runs in checkouts that have it not
    ]
    assert not bare


def test_a_missing_number_is_no_reason_to_look_again():
    assert loop.ends_the_run(loop.Interrupted(signal.SIGTERM))
    assert loop.ends_the_run(BrokenPipeError(32, "nobody reads"))
    assert not loop.ends_the_run(MemoryError())
    assert not loop.ends_the_run(FileNotFoundError(2, "gone"))
