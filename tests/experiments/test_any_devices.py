"""Any number of devices: six, which share no batch evenly, give the numbers of one."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# A line; rows that count unequally, by a mask and by weights; images that stay on the
# devices. Prints the curve and the scores of each.
PROGRAM = """
import json, tempfile
import jax, numpy as np
from experiments.core.cell import Runtime
from experiments.core.loop import Trainer
from experiments.core.observe import Progress
from experiments.core.signals import Stop
from experiments.core.store import ResultsStore
from experiments.data import molecules, sequence_tasks
from experiments.data.images import Dataset
from experiments.data_scaling.experiment import ScalingCell, ScalingTask
from experiments.graphs import regression
from experiments.graphs.cells import MoleculeCell
from tests.experiments.lines import LineCell, LineTask
from experiments.tasks.labelling import LabelCell, LabelTask
from attn_jax.models import SIZES

SIZES["mlp"]["mu"] = dict(hidden_dims=(16,))
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (64, 8, 8, 1)).astype(np.uint8)
labels = (np.arange(64) % 2).astype(np.int32)
dataset = Dataset("toy", "", "0", images, labels, images, labels, ("a", "b"))
store = ResultsStore(tempfile.mkdtemp())
small = dict(seed=0, updates=2, dim=8, depth=1, num_heads=2, learning_rate=1e-2)
graph = dict(small, mlp_dim=8, phase="final", dropout_rate=0.1)
some = molecules.toy_molecules()
cells = {
    "lines": (LineTask(indexed=False), LineCell(updates=2)),
    "labelling": (LabelTask(sequence_tasks.load_task("toy_pos")), LabelCell(
        task="toy_pos", model="transformer", tokens=128, mlp_dim=8, positions="rope",
        attention="dot_product", id_dropout=0.3, dropout_rate=0.1, **small)),
    "molecules": (regression.MoleculeTask(regression.Parts(some)), MoleculeCell(
        task="toy", model="all", sees="all", pairs="both", data=some.sha256,
        batch_atoms=128, **graph)),
    "mlp": (ScalingTask(dataset), ScalingCell(
        task="toy", model="mlp", size="mu", n=40, seed=0, updates=2, batch_size=8)),
}
numbers = {}
for name, (task, cell) in cells.items():
    runtime = Runtime(log_every=1)
    assert Trainer(task, store, runtime, Progress(1), Stop()).run([cell])
    record = store.get(cell.config())
    assert record["status"] == "done", record["metrics"]
    scores = [v for k, v in sorted(record["metrics"].items())
              if k.startswith(("train_", "test_")) and isinstance(v, float)]
    numbers[name] = [record["curves"]["loss"], scores]
print(json.dumps([jax.device_count(), numbers]))
"""


def numbers(devices):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": str(devices),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    count, found = json.loads(done.stdout.splitlines()[-1])
    assert count == devices
    return found


@pytest.mark.slow
def test_six_devices_give_the_numbers_of_one():
    one, six = numbers(1), numbers(6)
    assert one.keys() == six.keys() and len(one) == 4
    for name, (losses, scores) in one.items():
        assert six[name][0] == pytest.approx(losses, rel=1e-5), name
        assert six[name][1] == pytest.approx(scores, rel=1e-5), name


# Training steps of all experiments, the batch split over eight devices: what they bring
# from one device to another, and what of it in a loop.
STEPS = """
import json, re
import jax
from benchmarks.accelerator import steps
from experiments.core import devices, optim, run
from jax.sharding import NamedSharding, PartitionSpec

mesh = devices.data_mesh()
COLLECTIVE = r" (all-gather|all-to-all|collective-\\w+|all-reduce)(?:-start)?\\("


def shaped(tree, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


presets = {name: tuple(run.find(name).smallest[-1:]) for name in run.names()}
for name in ("attention_as_conv", "graphs", "long_range"):
    del presets[name]  # see the test
found = {}
for step in steps(presets):
    _, (state, batch, rng) = step.made()
    if step.rows % mesh.size:
        continue
    fn = jax.jit(optim.make_step(step.program.loss))
    given = shaped(state), shaped(batch, "data"), shaped(rng)
    text = fn.lower(*given).compile().as_text()
    bodies = set(re.findall(r"(?:body|condition)=%?([\\w.-]+)", text))
    parts = {p.split(" ")[0].lstrip("%"): p for p in re.split(r"\\n(?=[%\\w])", text)}
    loops = "".join(parts[name] for name in bodies if name in parts)
    found[step.name] = [re.findall(COLLECTIVE, text), re.findall(COLLECTIVE, loops)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_no_step_gathers_its_batch_nor_sums_over_devices_in_a_loop():
    """Gradients alone are summed, once.

    Left out are graphs, of which one is split over all devices, so that ends of its
    edges are gathered; heads on a grid, whose weights are made of parameters alone; and
    the arena, whose encoder is that of labelling.
    """
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 10
    for name, (anywhere, in_loops) in found.items():
        assert set(anywhere) == {"all-reduce"}, (name, anywhere)
        assert not in_loops, (name, in_loops)


APART = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from experiments.core import devices
from experiments.detection.boxes import assign

cost = np.random.default_rng(0).normal(size=(2, 16, 3, 5)).astype(np.float32)
given = devices.put(cost, devices.data_mesh(), None, "data")
fn = jax.jit(lambda x: devices.apart(assign, x, axis=1))
found = fn(given)
assert jax.device_count() == 8 and len(found.sharding.device_set) == 8
assert found.sharding.spec[1] == "data", found.sharding
assert (np.asarray(found) == np.asarray(assign(cost))).all()
uneven = jax.jit(lambda x: devices.apart(assign, x, axis=1))(cost[:, :3])
assert (np.asarray(uneven) == np.asarray(found[:, :3])).all()
"""


@pytest.mark.slow
def test_sets_are_matched_on_each_device_as_on_one():
    done = subprocess.run(
        [sys.executable, "-c", APART],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
