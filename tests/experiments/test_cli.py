"""The command line of the experiment: bad input, interruption, sharing."""

from __future__ import annotations

import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from experiments.core import observe, store
from experiments.core.cell import Runtime
from experiments.core.report import Report
from experiments.data_scaling.__main__ import main
from experiments.data_scaling.experiment import Config, Grid
from experiments.data_scaling.tasks import Scenes

ROOT = pathlib.Path(__file__).parents[2]


def arguments(npz, out, *more, models=("mlp",), seeds=2, updates=16):
    """Two seeds of one MLP on the toy images, a curve point every 5 updates."""
    return [
        "--preset", "smoke", "--task", f"npz:{npz}", "--out", str(out),
        "--models", *models, "--ns", "40", "--seeds", str(seeds),
        "--updates", str(updates), "--max-epochs", "None",
        "--baselines", "majority", "--log-every", "5",
        "--engine", "inline", "--batch-size", "8", "--checkpoint-seconds", "0",
        *map(str, more),
    ]  # fmt: skip


def start(args, **settings):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.data_scaling", *args],
        cwd=ROOT,
        env=environment,
        text=True,
        **(dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) | settings),
    )


def records(out):
    """Records by (model, phase, seed), without what may differ from run to run."""
    found = {}
    for record in store.ResultsStore(out).records():
        config, metrics = record["config"], dict(record["metrics"])
        for timed in ("images_per_s", "updates_per_s", "fit_s"):
            metrics.pop(timed, None)
        name = config["model"], config["phase"], config["seed"]
        found[name] = (config, record["status"], metrics, record["curves"])
    return found


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"it ended too early: {process.communicate()[0]}")
        time.sleep(0.01)


def steps_saved(out):
    """Steps of the checkpoints that are whole now, of cells in flight."""
    done = {path.stem for path in (out / "cells").glob("*.json")}
    return [
        int(folder.name)
        for folder in (out / "checkpoints").glob("*/*")
        if folder.name.isdecimal() and folder.parent.name not in done
    ]


@pytest.fixture(scope="module")
def whole(npz, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(arguments(npz, out, "--checkpoint-seconds", "1000")) == 0
    return out


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures take seconds and are tested elsewhere; `whole` has drawn them."""
    monkeypatch.setattr(Report, "write", lambda *_: "")


@pytest.fixture
def begins(monkeypatch):
    """From which step each cell went on."""
    seen, begin = [], observe.Progress.begin

    def told(self, label, updates, step=0, worker=0):
        seen.append((label.split(" seed=")[1], step))
        begin(self, label, updates, step)

    monkeypatch.setattr(observe.Progress, "begin", told)
    return seen


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(
    npz, whole, tmp_path, begins, capsys
):
    process = start(arguments(npz, tmp_path))
    cells = tmp_path / "cells"
    # The first seed is done, the second is under way.
    wait_for(
        lambda: (
            len(list(cells.glob("*.json"))) >= 1
            and any(step >= 4 for step in steps_saved(tmp_path))
        ),
        process,
    )
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    before = {path: path.read_bytes() for path in cells.glob("*.json")}
    assert main(arguments(npz, tmp_path)) == 0
    trained = [(seed, step) for seed, step in begins if "final" in seed]
    assert len(trained) == 2 - sum(b"mlp" in text for text in before.values())
    assert trained[0][1] >= 4, "it went on from the checkpoint"
    assert all(step == 0 for _, step in trained[1:])
    assert all(path.read_bytes() == text for path, text in before.items())
    assert records(tmp_path) == records(whole)
    assert "cells were done before" in capsys.readouterr().out
    # Once more: nothing is left to do, and nothing is trained.
    begins.clear()
    assert main(arguments(npz, tmp_path)) == 0 and begins == []
    assert "4 of 4 cells were done before" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rerun_goes_on(
    npz, whole, tmp_path, begins, capsys, signum
):
    """In this process: the handlers are the real ones."""

    def send():
        while not any(step >= 3 for step in steps_saved(tmp_path)):
            time.sleep(0.005)
        os.kill(os.getpid(), signum)

    handler = signal.getsignal(signum)
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert main(arguments(npz, tmp_path)) == 128 + signum
    sender.join()
    assert signal.getsignal(signum) is handler
    assert f"Stopped by {signum.name}; everything is saved" in capsys.readouterr().out
    assert (whole / "report.md").exists() and (whole / "curve.png").exists()
    begins.clear()
    assert main(arguments(npz, tmp_path)) == 0
    assert begins[0][1] >= 3
    assert records(tmp_path) == records(whole)


@pytest.mark.slow
def test_workers_stop_on_ctrl_c_and_two_runs_share_what_is_left(
    npz, whole, tmp_path, capsys
):
    args = arguments(npz, tmp_path, "--workers", 2)
    args[args.index("--engine") + 1] = "processes"
    process = start(args, start_new_session=True)
    wait_for(lambda: any(step >= 2 for step in steps_saved(tmp_path)), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Stopped by SIGINT; everything is saved" in said
    assert "Traceback" not in said
    # Two runs at once in the folder, one of them drawing on a terminal.
    master, slave = pty.openpty()
    other = start(arguments(npz, tmp_path), stdout=slave, stderr=slave)
    os.close(slave)
    shown = []
    reader = threading.Thread(target=lambda: shown.extend(_read(master)))
    reader.start()
    end = time.monotonic() + 120
    while b"cells done" not in b"".join(shown) and time.monotonic() < end:
        time.sleep(0.05)
    assert main(arguments(npz, tmp_path)) == 0
    assert other.wait(120) == 0
    reader.join(10)
    os.close(master)
    assert records(tmp_path) == records(whole)
    here = capsys.readouterr().out
    there = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    assert re.search(r"[0-3] of 4 cells done", there)
    for seed in 0, 1:  # each cell was finished in one of the three runs
        line = f"mlp mu n=40 seed={seed} final: test accuracy"
        assert (line in said) + (line in here) + (line in there) == 1


def _read(descriptor):
    while True:
        try:
            data = os.read(descriptor, 4096)
        except OSError:
            return
        if not data:
            return
        yield data


# ------------------------------------------------------------------ bad input


@pytest.fixture
def refused(npz, tmp_path, capsys):
    """Runs the command line, which must end with status 2; returns what it says."""

    def refused(*more, **settings):
        out = settings.pop("out", tmp_path / "out")
        try:
            status = main(arguments(npz, out, *more, **settings))
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr()
        assert status == 2, said
        text = " ".join((said.out + said.err).replace("│", " ").split())
        assert "Traceback" not in text
        assert not list((tmp_path / "out").glob("cells/*.json"))
        return text

    return refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning-rat", "1"], "Unrecognized options: --learning-rat"),
        (["--updates", "many"], "--updates.*many"),
        (["--updates", "0"], "updates must be at least 1, got 0"),
        (["--vit.learning-rates", "-1"], "learning_rate must be above 0"),
        (["--models", "vit", "cnn"], "models must be .* vit, resnet.*cnn"),
        (["--size", "xl"], "'xl' for argument '--size'.*'mu', 'ti', 's'"),
        (["--preset", "fast"], "'fast' for argument '--preset'.*'quick'"),
        (["--ns", "91"], "ns: N=91 is larger than.*has 90 images.*--ns"),
        (["--ns", "5"], "ns: N=5 leaves no validation split.*at least 6"),
        (["--shard", "3/2"], "shard: .*'3/2'"),
        (["--coordinator", "localhost:1"], "coordinator=.*add --distributed"),
        (["--task", "imagenet"], "imagenet.*fashion_mnist"),
        (["--epochs", "3"], "nothing would read --epochs here"),
        (["--scenes.grid", "5"], "nothing would read --scenes here"),
        (["--attention", "blockwise"], "attention must be left out without a 'vit'"),
    ],
)
def test_a_bad_value_is_named_with_what_to_do(refused, more, message):
    models = ("vit",) if more[0].startswith("--vit") else ("mlp",)
    assert re.search(message, refused(*more, models=models))


def test_what_the_attention_cannot_do_shows_before_anything_runs(refused, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def fn(query, key, value):\n    return value\n\n"
        "def broken(query, key, value):\n    return query @ value[:1]\n\n"
        "def twisted(query, key, *rest):\n    return key\n"
    )
    for attention, message in {
        "blockwize": "attention: .*unknown.*Did you mean 'blockwise'",
        tmp_path / "gone.py:fn": "attention: no such file: .*gone.py",
        f"{file}:missing": "attention: .*no function 'missing' in .*it has: broken, fn",
        f"{file}:broken": "attention: .*does not run.*line 5 of .*mine.py.*dot_general",
        f"{file}:twisted": "attention: .*name its arguments",
    }.items():
        assert re.search(message, refused("--attention", attention, models=["vit"]))
    said = refused(
        "--attention", "blockwise", "--vit.dropout-rates", "0.1", models=["vit"]
    )
    assert re.search(
        "attention: .*'blockwise' cannot honour dropout.*variants that", said
    )
    said = refused("--resnet.dropout-rates", "0.1", models=["resnet"])
    assert "dropout_rate=0.1 was given, but 'resnet' has no dropout" in said


def test_a_folder_that_cannot_be_written_is_said_at_once(
    refused, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("x")
    said = refused(out=tmp_path / "file" / "out")
    assert "cannot write results" in said and "choose another folder" in said

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "free some space or choose another folder" in refused()


def test_images_that_cannot_be_read_are_said(refused, npz, tmp_path):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(npz.read_bytes()[:400])
    assert re.search(
        "broken.npz is not a whole .npz", refused("--task", f"npz:{broken}")
    )
    assert "there is no such file" in refused("--task", "npz:/nowhere.npz")
    images = np.zeros((4, 8, 8, 1), np.float32)
    np.savez(broken, train_images=images, train_labels=np.arange(4))
    assert "uint8" in refused("--task", f"npz:{broken}")


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for prefix, group in (
        ("", Config), ("", Runtime), ("scenes.", Scenes), ("vit.", Grid),
        ("resnet.", Grid), ("hybrid.", Grid), ("mlp.", Grid),
    ):  # fmt: skip
        for name in group.__dataclass_fields__:
            if name not in ("scenes", "vit", "resnet", "hybrid", "mlp"):
                assert f"--{prefix}{name.replace('_', '-')}" in said, prefix + name
    assert "--preset" in said and "accelerator" in said


# ------------------------------------------------------- a variant of one's own


@pytest.mark.usefixtures("tiny")
def test_a_function_in_a_file_runs_in_the_vit_and_an_edit_is_another_cell(
    npz, tmp_path
):
    file = tmp_path / "mine.py"
    text = (
        "import jax\n\n"
        "def fn(query, key, value, bias=None, mask=None):\n"
        "    scores = query @ key.T\n"
        "    return jax.nn.softmax({} * scores) @ value\n"
    )
    out = tmp_path / "out"
    args = arguments(
        npz, out, "--attention", f"{file}:fn", models=["vit"], seeds=1, updates=5
    )
    args += ["--baselines"]
    losses = []
    for count, factor in enumerate((1.0, 0.1, 1.0)):
        file.write_text(text.format(factor))
        assert main(args) == 0
        found = store.ResultsStore(out).records()
        assert len(found) == min(count + 1, 2)  # what was there before is kept
        losses = [record["metrics"]["test_loss"] for record in found]
    assert losses[0] != losses[1]
    assert f"{file}:fn" in json.dumps(found[0]["config"])


@pytest.mark.usefixtures("tiny")
def test_shards_are_parts_of_the_whole_and_files_of_one_name_are_apart(
    npz, tmp_path, dataset, capsys
):
    common = dict(models=["mlp", "resnet"], seeds=1, updates=2)
    found = []
    for part in "1/2", "2/2":
        assert main(arguments(npz, tmp_path / "out", "--shard", part, **common)) == 0
        found.append(set(records(tmp_path / "out")))
    assert found[0] < found[1] and len(found[1]) == 3
    before = {path.name for path in (tmp_path / "out" / "cells").glob("*.json")}
    other = tmp_path / npz.name
    np.savez(
        other,
        train_images=255 - dataset.train_images,
        train_labels=dataset.train_labels,
    )
    assert main(arguments(other, tmp_path / "out", **common)) == 0
    after = {path.name for path in (tmp_path / "out" / "cells").glob("*.json")}
    assert before < after and len(after) == 6
    assert "\x1b[" not in capsys.readouterr().out


def test_a_folder_that_holds_only_its_results_file_counts_as_done(
    whole, npz, tmp_path, begins, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text((whole / "results.jsonl").read_text())
    assert main(arguments(npz, out)) == 0
    assert not begins
    assert "cells were done before" in capsys.readouterr().out
    assert records(out) == records(whole)
