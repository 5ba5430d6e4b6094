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
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from experiments.common.config import Runtime
from experiments.common.memory import keep_freed_memory
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    experiment, runtime = options.experiment, options.runtime

    from experiments.common import workers
    from experiments.data_scaling import run

    worker = workers.pin_worker()
    keep_freed_memory()

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

    from experiments.common.data import DataError
    from experiments.common.loop import Interrupted
    from experiments.common.store import ResultsStore, SchemaError, StoreError

    primary = jax.process_index() == 0
    out = runtime.out or pathlib.Path("runs/data_scaling") / options.preset
    store = ResultsStore(out)
    try:
        if primary:
            store.check_writable()
            earlier = store.folder / "results.jsonl"
            if worker is None and earlier.is_file():
                store.import_jsonl(earlier)  # a checkout keeps this file alone
        experiment, dataset, units = run.prepare(experiment, runtime)
        if worker is None:
            run.check_cells(units, dataset)
        if worker is None and primary:
            print(dataset.describe())
            print(
                f"{run.count_cells(units, experiment)} cells -> {store.folder}",
                flush=True,
            )
        count = 1 if worker else workers.worker_count(runtime)
        if count > 1:
            status = workers.run_workers(
                count,
                "experiments.data_scaling",
                arguments,
                store,
                total=run.count_cells(units, experiment),
                count_done=lambda: run.count_done(units, store, experiment),
            )
            if status:
                done = run.count_done(units, store, experiment)
                total = run.count_cells(units, experiment)
                how = f"with status {status}"
                if status < 0:
                    how = f"by signal {-status} ({signal.Signals(-status).name})"
                print(
                    f"error: a worker ended {how}; {done} of {total} cells are done, "
                    "and the same command goes on from there.",
                    file=sys.stderr,
                )
                return 2 if status == 2 else 1
        else:
            run.work(experiment, runtime, dataset, units, store, worker)
    except Interrupted as interrupted:
        if worker is None and primary:
            print(
                f"\nStopped by {interrupted}; everything is saved. The same command "
                "goes on from here.",
                flush=True,
            )
        return 128 + interrupted.signum
    except (DataError, StoreError, SchemaError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if worker is None and primary:
        from experiments.data_scaling.report import summary_table, write_report

        try:
            records = store.records()
            write_report(records, store.folder)
        except (OSError, SchemaError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(summary_table(records))
        print(f"Report and figures: {store.folder}/report.md, curve.png, gap.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
