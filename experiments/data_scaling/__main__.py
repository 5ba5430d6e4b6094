"""Self-attention against convolution as the number of training images grows.

`python -m experiments.data_scaling --preset quick` trains a ViT, a ResNet and a
hybrid of near FLOPs on nested subsets of real images and writes results.jsonl,
report.md, curve.png and gap.png. `--help` lists every setting. A run that was
interrupted, by whatever, goes on where it was when started again.

Reference: Dosovitskiy et al., arXiv:2010.11929, Figures 3 and 4.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from attn_jax._program import program
from experiments.core.cell import Runtime
from experiments.core.memory import keep_freed_memory
from experiments.data_scaling.presets import PRESETS, Experiment, idle_settings


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Self-attention against convolution as the number of training images grows."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    runtime: Annotated[Runtime, tyro.conf.arg(name="")]
    preset: Literal["smoke", "quick", "cpu", "scenes", "accelerator"] = "quick"
    """Where settings come from that are not given: smoke (seconds, a test), quick
    (minutes), cpu (about an hour on two cores), scenes (composed scenes),
    accelerator (CIFAR-10 on GPU or TPU)."""


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line; the preset gives the defaults of everything else.

    Raises:
      SystemExit: for --help, and for unknown or bad values, which are named.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="quick")
    preset = first.parse_known_args(argv)[0].preset
    experiment = PRESETS.get(preset, PRESETS["quick"])
    default = Arguments(experiment, Runtime(), preset if preset in PRESETS else "quick")
    try:
        options = tyro.cli(
            Arguments,
            args=list(argv),
            default=default,
            description=__doc__,
            prog="python -m experiments.data_scaling",
        )
        idle = idle_settings(options.experiment, experiment)
        if idle:
            raise ValueError(
                f"nothing would read these settings, leave them out: {'; '.join(idle)}."
            )
        return options
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    experiment, runtime = options.experiment, options.runtime

    from experiments.core import workers
    from experiments.data_scaling import run

    worker = workers.pin_worker()
    keep_freed_memory()
    if worker is None:
        workers.leave_memory(runtime)

    import jax

    if runtime.distributed:
        try:
            jax.distributed.initialize(
                runtime.coordinator, runtime.num_processes, runtime.process_id
            )
        except (ValueError, RuntimeError) as error:
            print(
                f"error: distributed: {error}. Where no cluster is detected, give "
                "--coordinator HOST:PORT --num-processes N --process-id I.",
                file=sys.stderr,
            )
            return 2

    from experiments.core.driver import begin, ended_by
    from experiments.core.report import reported
    from experiments.core.store import ResultsStore
    from experiments.data_scaling.report import write_report

    primary = jax.process_index() == 0
    out = runtime.out or pathlib.Path("runs/data_scaling") / options.preset
    store = ResultsStore(out)
    try:
        if primary:
            store.check_writable()
        experiment, dataset, units = run.prepare(experiment, runtime)
        possible = list(run.possible(units, experiment))
        if worker is None and primary:
            begin(store, possible)
        total = run.count_cells(units, experiment)
        left = total - run.count_done(units, store, experiment)
        if worker is None and primary:
            print(dataset.describe())
            print(f"{total} cells -> {store.folder}", flush=True)
        if worker is None and left:
            run.check_cells(units, dataset)
        count = 1 if worker else min(workers.worker_count(runtime), max(1, left))
        if count > 1:
            status = workers.run_workers(
                count,
                "experiments.data_scaling",
                arguments,
                store,
                total=total,
                count_done=lambda: run.count_done(units, store, experiment),
            )
            if status:
                done = run.count_done(units, store, experiment)
                return workers.ended_early(status, done, total)
        else:
            run.work(experiment, runtime, dataset, units, store, worker)
        if worker is not None or not primary:
            return 0  # the process that waits for all tells what came out

        records = store.records()
        print(reported(records, write_report, store.folder, possible))
        store.export_jsonl(store.folder / "results.jsonl")
        found = map(store.get, possible)
        return int(any(r is not None and r["status"] == "failed" for r in found))
    except Exception as error:
        return ended_by(error, quiet=worker is not None or not primary)


if __name__ == "__main__":
    sys.exit(main())
