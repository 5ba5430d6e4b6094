"""One device, several, and several processes: the same numbers."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from experiments.core.store import ResultsStore

ROOT = pathlib.Path(__file__).parents[2]

# The vision models are smaller than they are called, so that compiling is quick.
PROGRAM = """
import sys
from attn_jax.models import SIZES
SIZES["vit"]["mu"] = dict(patch=4, dim=8, depth=1, num_heads=2, mlp_dim=16)
from experiments.core.report import Report
from experiments.data_scaling.__main__ import main
Report.write = lambda *_: ""  # seconds, and tested elsewhere
sys.exit(main(sys.argv[1:]))
"""


def start(npz, out, *more, devices=1):
    args = [
        "--preset", "smoke", "--task", f"npz:{npz}", "--out", str(out),
        "--engine", "inline", "--models", "vit", "--ns", "40",
        "--seeds", "1", "--updates", "6", "--tune-updates", "3",
        "--baselines", "majority", "--log-every", "1", "--batch-size", "8",
        "--vit.learning-rates", "1e-3", "3e-3", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *args],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process, status=0):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == status, said
    return said


def curves(out):
    found = {}
    for record in ResultsStore(out).records():
        config = record["config"]
        if config["model"] != "majority":
            assert record["status"] == "done"
            name = config["model"], config["phase"], config["learning_rate"]
            found[name] = (record["curves"]["loss"], record["metrics"])
    return found


@pytest.fixture(scope="module")
def one(npz, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    finished(start(npz, out))
    assert len(curves(out)) == 3  # two tuning cells, a final one
    return curves(out)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, (loss, metrics) in expected.items():
        np.testing.assert_allclose(found[name][0], loss, rtol=1e-5, err_msg=str(name))
        for score in "train_accuracy", "test_loss", "val_loss":
            if score in metrics:
                assert found[name][1][score] == pytest.approx(metrics[score], rel=1e-5)


@pytest.mark.slow
def test_eight_devices_give_the_curve_of_one(npz, one, tmp_path):
    finished(start(npz, tmp_path / "eight", devices=8))
    same(curves(tmp_path / "eight"), one)


@pytest.mark.slow
def test_two_processes_agree_with_one(npz, one, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = ["--distributed", "--coordinator", f"127.0.0.1:{port}"]
    cluster += ["--num-processes", "2", "--checkpoint-seconds", "0", "--process-id"]
    processes = [
        start(npz, tmp_path, *cluster, str(index), devices=2) for index in range(2)
    ]
    said = [finished(process) for process in processes]
    same(curves(tmp_path), one)
    assert "final: test accuracy" in said[0]
    assert "accuracy" not in said[1], "process 0 alone tells"
    for record in ResultsStore(tmp_path).records():
        assert record["provenance"]["device_count"] == 4
