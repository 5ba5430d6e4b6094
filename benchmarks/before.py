"""This checkout against an earlier commit of it, in one run, taking turns.

`python -m benchmarks.before COMMIT` checks the commit out into a temporary folder and
times the same work in both, each in a process of its own; with `--quick` also the
data-scaling experiment's whole quick preset, once each.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

WORK: dict[str, tuple[str, ...]] = {
    "exact attention, forward, T = 256": ("attention", "256", "forward"),
    "exact attention, forward + backward, T = 256": ("attention", "256", "both"),
    "exact attention, forward, T = 1,024": ("attention", "1024", "forward"),
    "exact attention, forward + backward, T = 1,024": ("attention", "1024", "both"),
    "exact attention, forward, T = 4,096": ("attention", "4096", "forward"),
    "exact attention, forward + backward, T = 4,096": ("attention", "4096", "both"),
    "ViT mu train step, batch 64": ("train", "vit", "64"),
    "ViT mu train step, batch 128": ("train", "vit", "128"),
    "ResNet mu train step, batch 64": ("train", "resnet", "64"),
    "hybrid mu train step, batch 64": ("train", "hybrid", "64"),
}
"""What is timed, by its title: the arguments of `serve`."""

BEFORE, AFTER = "before", "after"


def _attention(length: str, direction: str) -> Callable[[], object]:
    """Exact attention of 4,096 tokens, 8 heads of 64, float32."""
    import jax
    import jax.numpy as jnp

    import attn_jax

    shape = (4096 // int(length), int(length), 8, 64)
    arrays = [jax.random.normal(k, shape) for k in jax.random.split(jax.random.key(0))]
    query, key, value = *arrays, arrays[0] + 1.0

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attn_jax.dot_product_attention(query, key, value)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attend(query, key, value)))

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    jitted = jax.jit(attend if direction == "forward" else gradient)
    return lambda: jax.block_until_ready(jitted(query, key, value))


def _train(model: str, batch: str) -> Callable[[], object]:
    """Four updates of a model of size mu, as the experiment does them."""
    from benchmarks import train_step
    from experiments.core.memory import keep_freed_memory

    keep_freed_memory()
    return train_step.ours(train_step.Setting(model, (28, 28, 1), int(batch)))


def serve(kind: str, *arguments: str) -> int:
    """Does the work once for each line that comes."""
    call = {"attention": _attention, "train": _train}[kind](*arguments)
    for _ in sys.stdin:
        call()
        print("done", flush=True)
    return 0


@contextlib.contextmanager
def _running(folder: pathlib.Path, arguments: tuple[str, ...]) -> Iterator[Callable]:
    """A process that serves from a checkout; gives the call that asks it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.before", "--serve", *arguments],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    asked, answers = process.stdin, process.stdout

    def call() -> None:
        print("go", file=asked, flush=True)
        if answers.readline() != "done\n":
            raise RuntimeError(f"{folder} ended with status {process.wait()}.")

    try:
        yield call
    finally:
        process.kill()
        process.wait()
        asked.close()
        answers.close()


@contextlib.contextmanager
def checkout(commit: str, here: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary checkout of a commit, with this checkout's benchmarks."""
    with tempfile.TemporaryDirectory() as folder:
        there = pathlib.Path(folder) / "checkout"
        git = ["git", "-C", str(here), "worktree"]
        subprocess.run(
            [*git, "add", "--quiet", "--detach", str(there), commit], check=True
        )
        try:
            for name in ("before.py", "train_step.py", "timing.py"):
                source = (here / "benchmarks" / name).read_text()
                (there / "benchmarks" / name).write_text(source)
            for name in ("benchmarking.py", "flops.py"):  # what those import
                (there / "attn_jax" / name).write_text(
                    (here / "attn_jax" / name).read_text()
                )
            memory = there / "experiments" / "common" / "memory.py"
            if not memory.exists():  # an earlier commit gives memory back
                memory.write_text("def keep_freed_memory():\n    return False\n")
            yield there
        finally:
            subprocess.run([*git, "remove", "--force", str(there)], check=True)


def _quick(folder: pathlib.Path) -> float:
    """Seconds of the whole quick preset."""
    with tempfile.TemporaryDirectory() as out:
        command = ["-m", "experiments.data_scaling", "--preset", "quick", "--out", out]
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    """Measures and stores `before.json` and `quick_preset.json`; returns the status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--serve"]:
        return serve(*arguments[1:])
    from benchmarks import record, report
    from benchmarks.timing import Effort, compare

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.before", description=__doc__
    )
    parser.add_argument("commit", help="the earlier commit")
    parser.add_argument("--quick", action="store_true", help="the quick preset too")
    parser.add_argument("--out", type=pathlib.Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    told = record.about(f"python -m benchmarks.before {options.commit}")
    began = time.perf_counter()
    with checkout(options.commit, record.ROOT) as there:
        if options.quick:
            seconds = {BEFORE: _quick(there), AFTER: _quick(record.ROOT)}
            ratio = seconds[BEFORE] / seconds[AFTER]
            rows = [dict(name=n, milliseconds=1e3 * s) for n, s in seconds.items()]
            made = dict(
                title="The quick preset",
                about="The whole data-scaling experiment of `make run`, data at hand: "
                f"start, compilation, tuning, training, baselines, report. Before is "
                f"commit {options.commit}. One run each, one after the other.",
                tables=[dict(title="whole run", short="quick", rows=rows)],
                targets=[
                    dict(
                        work="whole `quick` preset, against its time before",
                        at_least=2.0,
                        aim=4.0,
                        reached=ratio,
                        told="one run each",
                    )
                ],
                smoke=False,
                seconds=sum(seconds.values()),
            )
            made["command"] = told["command"] + " --quick"
            record.store(options.out / "quick_preset.json", told | made)
        tables = []
        for title, work in WORK.items():
            with _running(there, work) as old, _running(record.ROOT, work) as new:
                rows = compare({BEFORE: old, AFTER: new}, [BEFORE], Effort())
            tables.append(dict(title=title, short=title, rows=rows))
            print("\n".join([title, *report.rows_table(rows), ""]), flush=True)
    made = dict(
        title="Before and after",
        about=f"This checkout against commit {options.commit}, each in a process of "
        "its own on all cores, taking turns. A train step's figure is four updates.",
        tables=tables,
        targets=[],
        smoke=False,
        seconds=time.perf_counter() - began,
    )
    record.store(options.out / "before.json", told | made)
    report.write(options.out)
    return 0


if __name__ == "__main__":
    from attn_jax._program import program  # an earlier commit has it not

    sys.exit(program(main)(None))
