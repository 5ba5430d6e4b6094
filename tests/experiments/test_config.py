from __future__ import annotations

import dataclasses
import hashlib
import math

import pytest

from experiments.core.cell import Runtime, attention_digest
from experiments.core.store import config_hash
from experiments.data_scaling.experiment import Config, ScalingCell, updates_of

CELL = ScalingCell(task="digits", model="vit", size="mu", n=100, seed=0, updates=10)


def test_the_hash_of_a_cell_is_fixed():
    """A changed field, default or name would orphan all stored results."""
    assert set(CELL.config()) == {
        "task", "model", "size", "n", "seed", "updates", "attention",
        "attention_sha256", "patch", "phase", "protocol", "batch_size",
        "learning_rate", "weight_decay", "warmup", "clip_norm", "label_smoothing",
        "mixup", "crop", "flip", "dropout_rate", "dtype", "validation_fraction",
        "validation_maximum",
    }  # fmt: skip
    assert config_hash(CELL.config()) == "93942e483f110365"


def test_every_field_makes_another_cell():
    other = {
        str: "x", int: 7, float: 0.5, bool: True, type(None): "x",
        tuple: (("data_sha256", "x"),),
    }  # fmt: skip
    hashes = {config_hash(CELL.config())}
    for field in dataclasses.fields(ScalingCell):
        value = other[type(getattr(CELL, field.name))]
        value = {"phase": "tune", "dtype": "bfloat16"}.get(field.name, value)
        changed = dataclasses.replace(CELL, **{field.name: value})
        hashes.add(config_hash(changed.config()))
    assert len(hashes) == 1 + len(dataclasses.fields(ScalingCell))
    endless = dataclasses.replace(CELL, clip_norm=math.inf)
    assert config_hash(endless.config()) not in hashes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("seed", -1), ("updates", 0), ("batch_size", 0),
        ("learning_rate", 0.0), ("learning_rate", math.inf),
        ("learning_rate", math.nan), ("weight_decay", -0.1), ("warmup", 1.0),
        ("clip_norm", 0.0), ("label_smoothing", 1.0), ("mixup", -1.0), ("crop", -1),
        ("dropout_rate", 1.0), ("phase", "test"), ("dtype", "float16"),
        ("validation_fraction", 0.0), ("validation_maximum", 0),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value!r}"):
        dataclasses.replace(CELL, **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(workers=-1), "^workers must be 0 or more, got -1"),
        (dict(steps_per_dispatch=-1), "^steps_per_dispatch must"),
        (dict(checkpoint_seconds=-1), "^checkpoint_seconds must"),
        (dict(log_every=0), "^log_every must be at least 1"),
        (dict(distributed=True, workers=2), "^workers must be 1 with --distributed"),
        (dict(engine="inline", workers=2), "^workers must be 1 with --engine inline"),
        (dict(coordinator="a:1"), "^coordinator='a:1' .*add --distributed"),
        (dict(process_id=0), "^process_id=0 was given without distributed"),
        (dict(num_processes=2), "^num_processes=2 was given without distributed"),
    ],
)
def test_a_bad_runtime_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Runtime(**settings)


def test_the_digest_is_that_of_the_file(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    expected = hashlib.sha256(b"x = 1\n").hexdigest()
    assert attention_digest(f"{file}:fn") == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert attention_digest("~/mine.py:fn") == expected
    assert attention_digest(None) is None and attention_digest("blockwise") is None
    with pytest.raises(ValueError, match="^attention: no such file: .*gone.py"):
        attention_digest(f"{tmp_path}/gone.py:fn")


def _updates(protocol, n, **more):
    settings = dict(updates=100, epochs=4.0, batch_size=10, max_epochs=None) | more
    return updates_of(Config(ns=(1000,), protocol=protocol, **settings), n)


def test_equal_updates_and_equal_images_seen():
    assert [_updates("updates", n) for n in (10, 100, 1000)] == [100, 100, 100]
    # 4 epochs of 100 batches at N = 1000; everywhere as many images.
    assert [_updates("epochs", n) for n in (10, 100, 1000)] == [400, 400, 400]
    assert _updates("epochs", 15) == round(4 * 1000 / 15)  # one whole batch an epoch
    assert _updates("epochs", 5) == 800  # a batch holds more than an epoch


def test_a_cap_on_epochs_never_cuts_below_the_least():
    assert _updates("updates", 100, max_epochs=2, min_updates=1) == 20
    assert _updates("updates", 100, max_epochs=2, min_updates=50) == 50
    assert _updates("updates", 100, max_epochs=2, min_updates=5000) == 100
    assert _updates("updates", 5, max_epochs=1, min_updates=1) == 1
