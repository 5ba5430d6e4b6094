"""Ray: a cluster of two nodes, one of which is lost in the middle."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

from experiments.core.store import ResultsStore
from tests.experiments import lines

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
import pathlib, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from experiments.core.run import run
from tests.experiments.lines import EXPERIMENT

out, lost = map(pathlib.Path, sys.argv[1:])
head = dict(num_cpus=0, include_dashboard=False)
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False, logging_level=40)


def both_at_work():
    saved = (out / "checkpoints").glob("*/*")
    some = {f.parent for f in saved if f.name.isdecimal() and int(f.name) >= 4}
    return len(some) == 2


def lose_one():
    while not both_at_work():
        time.sleep(0.01)
    print("one node is killed", flush=True)
    cluster.remove_node(nodes[0], allow_graceful=False)
    lost.touch()  # until here no cell could end


threading.Thread(target=lose_one, daemon=True).start()
more = "--engine ray --log-every 2 --checkpoint-seconds 0 --updates 40 --seeds 2"
status = run(EXPERIMENT, ["--out", str(out), "--waits", str(lost), *more.split()])
print("status", status, flush=True)
ray.shutdown()
cluster.shutdown()
"""


def alone(command):
    """A command in a network of its own, where Ray binds to 127.0.0.1."""
    if shutil.which("unshare") and shutil.which("ip"):
        inside = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        if subprocess.run([*inside, "true"], capture_output=True).returncode == 0:
            return [*inside, *command]
    return command


@pytest.mark.slow
def test_cells_of_a_lost_node_go_on_elsewhere(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install '.[cluster]'")
    sockets = tempfile.mkdtemp(prefix="ray")
    lost = tmp_path / "lost"
    process = subprocess.Popen(
        alone([sys.executable, "-c", PROGRAM, str(tmp_path / "ray"), str(lost)]),
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": sockets,  # their paths must be short
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=480)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it did not end: {process.communicate()[0]}")
    finally:
        shutil.rmtree(sockets, ignore_errors=True)
    assert "status 0" in said, said
    assert "one node is killed" in said, said
    assert "a node or an actor was lost" in said
    assert "REPORT of 3 records" in said
    (plan,) = lines.plans(lines.Config(seeds=2, updates=40, waits=str(lost)))
    there = ResultsStore(tmp_path / "ray")
    here = f"--engine inline --log-every 2 --updates 40 --seeds 2 --waits {lost}"
    assert lines.run_here(tmp_path / "here", here.split()) == 0
    for cell in plan.studies[0].final(0):
        one, other = (
            store.get(cell.config())["curves"]
            for store in (there, ResultsStore(tmp_path / "here"))
        )
        assert one == other, "it went on where it was, to the bit"
