"""How every experiment is planned and run, on cells that take no time."""

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

import jax
import pytest

from experiments.core import engine, run
from experiments.core.cell import Runtime
from experiments.core.plan import Job, share_of
from experiments.core.signals import StopSignal
from experiments.core.store import ResultsStore
from tests.experiments import lines
from tests.experiments.lines import EXPERIMENT, Config, LineCell, LineTask

ROOT = pathlib.Path(__file__).parents[2]


def drive(out, *more, experiment=EXPERIMENT):
    """Runs lines in this process, unless told otherwise."""
    given = ["--out", str(out), "--engine", "inline", *map(str, more)]
    return run.run(experiment, given)


def planned(**settings):
    (plan,) = lines.plans(Config(**settings))
    return plan


def with_plan(change):
    """The experiment, its plan changed."""
    return dataclasses.replace(
        EXPERIMENT, plans=lambda config: [change(*lines.plans(config))]
    )


# ---------------------------------------------------------------------- plans


def put(store, cell, **metrics):
    status = "done" if metrics else "diverged"
    store.put(cell.config(), status=status, metrics=metrics, wall_time_s=1.0)


def test_what_can_be_run_now_comes_in_the_order_of_need(tmp_path):
    store, plan = ResultsStore(tmp_path), planned(rates=(0.1, 0.2, 0.3))
    (study,) = plan.studies
    first = list(plan.ready(store.get))
    assert first[0] == Job(0, baseline=0)
    assert [job.cells for job in first[1:]] == [(cell,) for cell in study.grid]
    assert (plan.done(store.get), plan.total()) == (0, 1 + 3 + 3)
    # The least error wins, and what diverged loses; finals come when all is tried.
    for cell, error in zip(study.grid, (0.2, 0.1, None), strict=True):
        assert not any(j.cells and j.cells[0].phase == "final" for j in first)
        put(store, cell, **({} if error is None else {"val_error": error}))
        first = list(plan.ready(store.get))
    assert study.best(store.get) == 1
    finals = [job.cells for job in plan.ready(store.get) if job.cells]
    assert [(c.seed, c.learning_rate, c.updates) for (c,) in finals] == [
        (seed, 0.2, 12) for seed in range(3)
    ]
    together = [job for job in plan.ready(store.get, 5, group=True) if job.cells]
    assert [(job.plan, len(job.cells)) for job in together] == [(5, 3)]
    put(store, finals[0][0], test_error=1.0)
    (job,) = [job for job in plan.ready(store.get, group=True) if job.cells]
    assert [cell.seed for cell in job.cells] == [1, 2]
    one_by_one = dataclasses.replace(plan, task=NotUniform())
    assert len(list(one_by_one.ready(store.get, group=True))) == 3


class NotUniform(LineTask):
    uniform = False


def test_a_study_may_take_over_what_another_chose(tmp_path):
    store, plan = ResultsStore(tmp_path), planned(rates=(0.1, 0.2))
    (study,) = plan.studies
    like = dataclasses.replace(study, name="like", tuned_by=study, seeds=1, updates=5)
    plan = dataclasses.replace(plan, studies=[study, like], baselines=())
    assert plan.total() == 2 + 3 + 1
    tuned = [job.cells for job in plan.ready(store.get)]
    assert tuned == [(cell,) for cell in study.grid], "once, not once a study"
    for cell, error in zip(study.grid, (0.2, 0.1), strict=True):
        put(store, cell, val_error=error)
    assert [j.cells[0].updates for j in plan.ready(store.get)] == [12, 12, 12, 5]
    assert plan.done(store.get) == 2


@pytest.mark.parametrize(
    ("errors", "tried", "chosen"),
    [
        ((9, 3, 2, 3, 9), 3, 2),  # the best lies inside of what is tried first
        ((9, 3, 2, 1, 0), 4, 4),  # the grid ends where the best is
        ((1, 2, 3, 4, 5), 4, 0),
        ((9, 1, 2, 3, 9), 4, 1),  # one more, which is worse
    ],
)
def test_a_grid_grows_while_the_best_lies_at_its_end(tmp_path, errors, tried, chosen):
    store, plan = ResultsStore(tmp_path), planned(rates=(0.1, 0.2, 0.3, 0.4, 0.5))
    study = dataclasses.replace(plan.studies[0], first=(1, 3))
    plan = dataclasses.replace(plan, studies=[study], baselines=())
    assert plan.total(store.get) == 3 + 3
    count = 0
    while (job := next(iter(plan.ready(store.get)))).cells[0].phase == "tune":
        (cell,) = job.cells
        put(store, cell, val_error=float(errors[study.grid.index(cell)]))
        count += 1
    assert (count, study.best(store.get)) == (tried, chosen)
    assert plan.total(store.get) == tried + 3 and plan.done(store.get) == tried


def test_a_study_waits_for_what_it_comes_after_on_every_machine(tmp_path):
    store, plan = ResultsStore(tmp_path), planned()
    (study,) = plan.studies
    other = dataclasses.replace(study, name="other", updates=3)
    later = dataclasses.replace(study, name="later", updates=5, after=study)
    plans = [
        dataclasses.replace(plan, studies=some, baselines=())
        for some in ([study], [other, later])
    ]

    def ready():
        return {job.cells[0].updates for job in plans[1].ready(store.get)}

    assert ready() == {3}
    for cell in study.final(0):
        put(store, cell, test_error=1.0)
    assert ready() == {3, 5}
    shares = {
        which: [[s.name for s in p.studies] for p in share_of(plans, which)]
        for which in ("1/2", "2/2")
    }
    assert shares == {
        "1/2": [[study.name], ["other"]],
        "2/2": [[study.name], ["later"]],  # which needs it
    }
    last = dataclasses.replace(later, name="last", updates=7, after=later)
    plans[1] = dataclasses.replace(plans[1], studies=[other, later, last])
    shares = [[s.name for s in p.studies] for p in share_of(plans, "3/3")]
    assert shares == [[study.name], ["later", "last"]]


def test_parts_are_disjoint_and_together_the_whole():
    plan = planned()
    parts = [plan.part(which) for which in ("1/2", "2/2")]
    configs = [list(part.possible()) for part in parts]
    assert sum(map(len, configs)) == len(list(plan.possible()))
    assert sum(part.total() for part in parts) == plan.total()


def test_a_part_without_a_finished_cell_is_no_error(tmp_path, capsys):
    assert drive(tmp_path, "--shard", "1/2") == 0  # the floor alone
    assert "no finished cell to report" in capsys.readouterr().out
    assert drive(tmp_path, "--shard", "2/2") == 0
    assert "REPORT of 4 records" in capsys.readouterr().out


# ----------------------------------------------------------------- one command


def test_a_failed_cell_is_told_and_tried_again(tmp_path, capsys):
    # Which seed fails is no part of what is run, so the hash does not know it.
    assert drive(tmp_path, "--fails", "1") == 1
    said = capsys.readouterr().out
    assert "REPORT of 3 records" in said
    assert "failed: 1 (the first: RuntimeError: no luck with this one)" in said
    assert "failed: 1" in (tmp_path / "report.md").read_text(encoding="utf-8")
    kept = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    (failed,) = (r for r in map(json.loads, kept) if r["status"] == "failed")
    assert "in score\n" in failed["metrics"]["traceback"]
    assert drive(tmp_path) == 0
    said = capsys.readouterr().out
    assert "3 of 4 cells were done before." in said
    assert "REPORT of 4 records" in said and "failed:" not in said


def divide():
    return {"test_error": 1 // 0}


def test_a_failed_baseline_is_told_too(tmp_path, capsys):
    def change(plan):
        (floor,) = plan.baselines
        return dataclasses.replace(
            plan, baselines=[dataclasses.replace(floor, measure=divide)]
        )

    assert drive(tmp_path, experiment=with_plan(change)) == 1
    assert "failed: 1 (the first: ZeroDivisionError" in capsys.readouterr().out
    assert len(ResultsStore(tmp_path).records()) == 4


def test_what_nothing_reads_is_refused_by_name(tmp_path, capsys):
    for option in ("--corners", "--tune-updates"):
        assert drive(tmp_path, option, 2) == 2
        assert f"nothing would read {option} here" in capsys.readouterr().err
    assert not ResultsStore(tmp_path).records()
    assert drive(tmp_path, "--task", "squares", "--corners", 5) == 0
    assert drive(tmp_path, "--rates", "0.1", "0.2", "--tune-updates", 2) == 0


def test_every_flag_of_a_run_works_for_every_experiment(tmp_path, capsys):
    assert drive(tmp_path / "plain") == 0
    flags = "--vmap-seeds --tensorboard --no-device-data --steps-per-dispatch 4".split()
    assert drive(tmp_path / "flags", *flags) == 0
    assert list(tmp_path.rglob("events.*"))
    said = capsys.readouterr().out
    assert said.count("REPORT of 4 records") == 2
    found = [ResultsStore(tmp_path / name).records() for name in ("plain", "flags")]
    for one, other in zip(*found, strict=True):
        error = pytest.approx(other["metrics"]["test_error"], rel=1e-5)
        assert one["metrics"]["test_error"] == error


def test_a_baseline_that_another_has_in_hand_is_awaited(tmp_path, monkeypatch, capsys):
    store, config = ResultsStore(tmp_path), planned().baselines[0].config
    other = store.claim(config)
    assert other.__enter__()

    def finish(seconds):
        if store.get(config) is None:
            store.put(config, status="done", metrics=lines.floor(), wall_time_s=0.0)
            other.__exit__(None, None, None)

    monkeypatch.setattr(run.time, "sleep", finish)
    assert drive(tmp_path) == 0
    assert "REPORT of 4 records" in capsys.readouterr().out


def test_an_error_of_no_message_keeps_its_traceback(tmp_path, capsys):
    def change(plan):
        return len(plan.description + 1)

    with pytest.raises(TypeError, match="concatenate"):
        drive(tmp_path, experiment=with_plan(change))

    def refuse(plan):
        LineCell(seed=-1)

    assert drive(tmp_path, experiment=with_plan(refuse)) == 2
    assert "error: seed must be 0 or more" in capsys.readouterr().err


def test_labels_of_tuning_cells_say_what_is_tried():
    cell = LineCell(phase="tune", learning_rate=0.003)
    assert cell.label == "lines line seed=0 tune (learning rate 0.003)"
    assert LineCell().label == "lines line seed=0 final"


def test_limits_are_in_the_help_and_in_the_error(capsys):
    with pytest.raises(SystemExit):
        run.parse(EXPERIMENT, ["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--seeds <at least 1>" in said and "quick (a second)" in said
    with pytest.raises(SystemExit, match="2"):
        run.parse(EXPERIMENT, ["--seeds", "0"])
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err


# -------------------------------------------------------------------- engines


PROGRAM = """
import sys
from experiments.core.run import run
from tests.experiments.lines import EXPERIMENT
if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, sys.argv[1:]))
"""


def start(tmp_path, *more, **settings):
    """Runs lines in a process of their own."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(file), "--out", str(tmp_path / "out"), *map(str, more)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **settings,
    )


@pytest.mark.slow
def test_workers_share_cells_and_one_that_is_killed_is_replaced(tmp_path):
    """Seed 0 kills its worker once, as a machine out of memory does."""
    more = ("--engine", "processes", "--workers", 2, "--log-every", 2)
    more += ("--checkpoint-seconds", 0, "--dies", tmp_path / "dies")
    said, _ = (process := start(tmp_path, *more)).communicate(timeout=120)
    assert process.returncode == 0, said
    assert (tmp_path / "dies").read_text() == "killed"
    assert "warning: a worker process was killed or crashed in lines line seed" in said
    assert "REPORT of 4 records" in said
    assert drive(tmp_path / "alone", "--log-every", 2) == 0
    one, other = (
        {r["hash"]: r["curves"] for r in ResultsStore(tmp_path / name).records()}
        for name in ("out", "alone")
    )
    assert one == other, "it went on where it was, to the bit"


def test_a_cell_that_kills_every_worker_ends_the_run(tmp_path, monkeypatch):
    class Dead(engine.Slots):
        def _start(self, slot):
            return slot

        def _give(self, worker, job):
            return worker

        def _wait(self, futures, seconds):
            pass

        def _ended(self, future):
            raise engine.WorkerDied("a worker was killed")

    told = []
    found = Dead(1, engine.Progress(1, live=False))
    found.progress.say = told.append
    found.submit(Job(0, (LineCell(),)))
    for count in range(engine.DEATHS - 1):
        ((job, outcome),) = found.done()
        assert outcome.status == "held" and "goes on elsewhere" in told[count]
        found.submit(job)
    with pytest.raises(engine.WorkerDied, match="lines line seed=0 final: a worker"):
        found.done()
    monkeypatch.setattr(run, "make_engine", lambda *_: Dead(1, found.progress))
    assert drive(tmp_path) == 1


@pytest.mark.parametrize("kind", ["inline", "processes"])
def test_a_signal_ends_a_baseline_of_minutes(tmp_path, kind):
    process = start(tmp_path, "--slow", "--engine", kind, "--workers", 1)
    assert any(line == "begun\n" for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert process.returncode == 143, said
    assert "Stopped by SIGTERM" in said and "Traceback" not in said


def test_what_cannot_be_sent_to_workers_is_said(tmp_path, capsys):
    def change(plan):
        floor = dataclasses.replace(plan.baselines[0], measure=lambda: {})
        return dataclasses.replace(plan, baselines=[floor])

    more = ("--engine", "processes")
    assert drive(tmp_path, *more, experiment=with_plan(change)) == 2
    assert "cannot be sent to workers" in capsys.readouterr().err


def test_no_more_workers_than_cells_and_none_for_a_finished_run(tmp_path, monkeypatch):
    started = []

    def make(world, jobs, progress, stop):
        started.append(jobs)
        return engine.Inline(engine.Worker(world, progress, stop))

    monkeypatch.setattr(run, "make_engine", make)
    assert drive(tmp_path) == 0 and drive(tmp_path) == 0
    assert started == [4, 0]
    monkeypatch.undo()
    made = engine.make_engine(
        engine.World.of([planned()], tmp_path, Runtime(workers=8)),
        3,
        engine.Progress(1, live=False),
        StopSignal(),
    )
    assert isinstance(made, engine.Processes) and len(made._workers) == 3
    made.close()


def test_each_worker_has_an_accelerator_of_its_own(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert engine.worker_count(Runtime(workers=2)) == 2
    with pytest.raises(ValueError, match="workers must be at most 2 here.*got 3"):
        engine.worker_count(Runtime(workers=3))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8")
    engine.take_share(1, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-8"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    engine.take_share(1, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match="at most 1"):
        engine.worker_count(Runtime(workers=2))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert engine.worker_count(Runtime(workers=9)) == 9


# -------------------------------------------------------------------- programs


def test_experiments_are_found_by_their_folder(capsys):
    from experiments.__main__ import main

    assert main([]) == 0
    said = capsys.readouterr().out
    for name in run.names():
        assert f"\n{name}: " in said
    assert "quick: " in said and "committed results" in said
    assert main(["no_such"]) == 2
    assert "experiment must be one of attention_as_conv" in capsys.readouterr().err


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
        if re.search(r"^(?<!@program\n)def main\(argv", path.read_text("utf-8"), re.M)
        and path.name != "before.py"  # also runs in checkouts that have it not
    ]
    assert not bare
