from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest

from experiments.core import store as store_module
from experiments.core.store import (
    ResultsStore,
    SchemaError,
    StoreError,
    config_hash,
    export_jsonl,
    read_jsonl,
    shard,
)

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {"task": "digits", "model": "vit", "n": 100, "seed": 0, "phase": "final"}


def put(store, config=CONFIG, accuracy=0.5, **more):
    return store.put(
        config,
        status="done",
        metrics={"test_accuracy": accuracy},
        curves={"loss": [2.0, 1.0]},
        wall_time_s=1.5,
        **more,
    )


@contextlib.contextmanager
def run_python(code, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


# --- naming ------------------------------------------------------------------------


def test_hash_is_stable_and_sees_every_value():
    assert config_hash(CONFIG) == "91df572f73ffd6de"  # a change loses all results
    assert config_hash(dict(reversed(CONFIG.items()))) == config_hash(CONFIG)
    others = [CONFIG | {"seed": 1}, CONFIG | {"lr": None}, CONFIG | {"n": 100.0}]
    assert len({config_hash(c) for c in [CONFIG, *others]}) == 4


def test_hash_counts_numpy_scalars_and_tuples_as_their_values():
    assert config_hash({"n": np.int32(3), "x": np.float64(0.5)}) == config_hash(
        {"n": 3, "x": 0.5}
    )
    assert config_hash({"stages": (1, 2)}) == config_hash({"stages": [1, 2]})


def test_infinity_in_a_config_survives_the_file(tmp_path):
    store = ResultsStore(tmp_path)
    config = CONFIG | {"clip_norm": math.inf}
    put(store, config)
    assert store.get(config)["config"]["clip_norm"] == "inf"
    assert store.get(CONFIG | {"clip_norm": -math.inf}) is None
    assert len(store.records()) == 1


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"lr": math.nan}, ValueError, r"config\.lr: expected a number, got nan"),
        ({"path": pathlib.Path("x")}, TypeError, r"config\.path: .* got PosixPath"),
        ({"a": {1: 2}}, TypeError, r"config\.a: keys must be strings, got 1"),
        ([("a", 1)], TypeError, "config: expected a mapping, got list"),
    ],
)
def test_hash_refuses_what_json_cannot_hold(config, error, message):
    with pytest.raises(error, match=message):
        config_hash(config)


# --- put and get -------------------------------------------------------------------


def test_a_record_comes_back_as_stored(tmp_path):
    store = ResultsStore(tmp_path / "deep" / "results")
    store.check_writable()
    assert store.get(CONFIG) is None
    record = put(store)
    assert store.get(CONFIG) == record == store.records()[0]
    assert record["hash"] == config_hash(CONFIG)
    assert record["schema"] == 1
    assert record["status"] == "done"
    assert record["config"] == CONFIG
    assert record["curves"] == {"loss": [2.0, 1.0]}
    assert {"jax", "numpy"} <= set(record["provenance"]["versions"])
    assert record["provenance"]["device_count"] >= 1
    assert record["provenance"]["created_utc"].endswith("+00:00")
    assert "hostname" not in json.dumps(record)
    assert store.checkpoint_dir(CONFIG) == store.folder / "checkpoints" / record["hash"]
    assert not store.checkpoint_dir(CONFIG).exists()
    assert [p.name for p in store.cells.iterdir()] == [f"{record['hash']}.json"]


def test_put_replaces_the_record(tmp_path):
    store = ResultsStore(tmp_path)
    put(store, accuracy=0.1)
    put(store, accuracy=0.2)
    assert [r["metrics"]["test_accuracy"] for r in store.records()] == [0.2]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    store = ResultsStore(tmp_path)
    store.put(
        CONFIG,
        status="diverged",
        metrics={"loss": float("nan"), "acc": np.float32(0.5)},
        curves={"loss": np.array([1.0, np.inf])},
        wall_time_s=np.float64(2),
    )
    text = store.path(CONFIG).read_text()
    assert "NaN" not in text and "Infinity" not in text
    record = store.get(CONFIG)
    assert record["metrics"] == {"loss": None, "acc": 0.5}
    assert record["curves"] == {"loss": [1.0, None]}


def test_an_unknown_status_is_refused(tmp_path):
    with pytest.raises(ValueError, match="status: expected one of .* got 'ok'"):
        ResultsStore(tmp_path).put(CONFIG, status="ok", metrics={}, wall_time_s=0)


def test_reading_makes_nothing(tmp_path):
    store = ResultsStore(tmp_path / "none")
    assert store.get(CONFIG) is None
    assert store.records() == []
    assert not (tmp_path / "none").exists()


# --- damage ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text[: len(text) // 2], "Unterminated|Expecting"),
        (lambda text: "", "Expecting value"),
        (lambda text: "[1]", "expected a JSON object, got list"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "hashes to"),
        (lambda text: text.replace('"metrics"', '"metric"'), "fields missing: metrics"),
        (lambda text: text.replace('"schema": 1', '"shema": 1'), "no schema version"),
        (lambda text: text.replace('"done"', '"fine"'), "status: expected one of"),
    ],
)
def test_a_damaged_record_is_named_and_set_aside(tmp_path, capsys, damage, why):
    store = ResultsStore(tmp_path)
    put(store)
    good = put(store, CONFIG | {"seed": 7})
    path = store.path(CONFIG)
    damaged = damage(path.read_text())
    path.write_text(damaged)

    assert store.get(CONFIG) is None

    err = capsys.readouterr().err
    assert path.name in err and "set aside" in err
    assert re.search(why, err), err
    kept = list(store.cells.glob("*.corrupt"))
    assert [p.read_text() for p in kept] == [damaged]
    assert store.records() == [good]
    put(store)  # the cell can be done again, beside what was set aside
    assert store.get(CONFIG) is not None and kept[0].exists()


def test_binary_rubbish_is_set_aside_too(tmp_path, capsys):
    store = ResultsStore(tmp_path)
    put(store)
    store.path(CONFIG).write_bytes(b"\xff\x00\xfe" * 100)
    assert store.records() == []
    assert "damaged record" in capsys.readouterr().err


def test_a_damaged_record_in_a_read_only_folder_is_ignored_and_said(
    tmp_path, capsys, monkeypatch
):
    store = ResultsStore(tmp_path)
    put(store)
    store.path(CONFIG).write_text("{")

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)
    assert store.get(CONFIG) is None
    assert "could not be renamed (Read-only file system)" in capsys.readouterr().err
    assert store.path(CONFIG).exists()


def test_a_record_replaced_meanwhile_is_not_set_aside(tmp_path, capsys, monkeypatch):
    store = ResultsStore(tmp_path)
    put(store)
    store.path(CONFIG).write_text("{")
    check = store_module.json.loads

    def replaced_while_reading(text):
        if text == "{":
            monkeypatch.setattr(store_module.json, "loads", check)
            put(store, accuracy=0.9)
        return check(text)

    monkeypatch.setattr(store_module.json, "loads", replaced_while_reading)
    store.get(CONFIG)
    assert "replaced" in capsys.readouterr().err
    assert store.get(CONFIG)["metrics"]["test_accuracy"] == 0.9


def test_a_later_schema_is_an_error_and_stays_where_it_is(tmp_path):
    store = ResultsStore(tmp_path)
    put(store)
    path = store.path(CONFIG)
    text = path.read_text().replace('"schema": 1', '"schema": 2')
    path.write_text(text)
    for read in (lambda: store.get(CONFIG), store.records):
        with pytest.raises(SchemaError, match=f"{path.name}: schema version 2.*reads"):
            read()
    assert path.read_text() == text


# --- folders that cannot be written ------------------------------------------------


def test_a_path_below_a_file_is_an_early_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    store = ResultsStore(tmp_path / "file" / "results")
    with pytest.raises(StoreError, match="a part of this path is a file"):
        store.check_writable()
    with pytest.raises(StoreError, match="a part of this path is a file"):
        with store.claim(CONFIG):
            pass
    assert store.get(CONFIG) is None and store.records() == []


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "No space left on device.*free some space"),
        (errno.EROFS, "Read-only file system.*a folder that can be written"),
        (errno.EACCES, "Permission denied.*that you may write to"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_or_read_only_folder_loses_no_result(
    tmp_path, capsys, monkeypatch, code, advice, call
):
    store = ResultsStore(tmp_path)
    put(store, accuracy=0.1)
    before = store.path(CONFIG).read_bytes()

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StoreError, match=advice) as caught:
            store.check_writable()
        assert str(tmp_path) in str(caught.value)
        with pytest.raises(StoreError, match=advice) as caught:
            put(store, accuracy=0.875)
        assert caught.value.errno == code

    # The old record is whole, nothing half-written is left over.
    assert store.path(CONFIG).read_bytes() == before
    assert [p.name for p in store.cells.iterdir()] == [store.path(CONFIG).name]
    # What was printed is the record: saved under the name given, it is read.
    said, line = capsys.readouterr().out.splitlines()
    assert str(store.path(CONFIG)) in said
    store.path(CONFIG).write_text(line)
    assert store.get(CONFIG)["metrics"] == {"test_accuracy": 0.875}


def test_exports_to_an_impossible_path_say_so(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="a part of this path is a file"):
        export_jsonl([], tmp_path / "file" / "x.jsonl")


# --- processes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        # Half the bytes are on the disk, as when the power goes.
        ("before = os.fsync; os.fsync = lambda f: (os.ftruncate(f, 99), stop())", 1),
        ("before = os.replace; os.replace = lambda *a: stop()", 1),
        ("before = os.replace; os.replace = lambda *a: (before(*a), stop())", 2),
    ],
)
def test_kill_9_during_put_leaves_the_old_or_the_new_record(tmp_path, moment, expected):
    code = f"""
        import os, sys, time
        from experiments.core import store as module
        module._device = lambda: ("cpu", "cpu", 1)  # no need to start a backend
        store = module.ResultsStore(sys.argv[1])
        def stop():
            print("now", flush=True)
            time.sleep(60)
        def put(i):
            store.put({{"cell": 0}}, status="done", metrics={{"i": i}}, wall_time_s=0)
        put(1)
        {moment}
        put(2)
    """
    with run_python(code, tmp_path) as writer:
        assert writer.stdout.readline() == "now\n"
    assert writer.returncode == -signal.SIGKILL
    store = ResultsStore(tmp_path)
    assert [r["metrics"]["i"] for r in store.records()] == [expected]
    assert not list(store.cells.glob("*.corrupt"))
    store.put({"cell": 0}, status="done", metrics={"i": 3}, wall_time_s=0)
    assert store.get({"cell": 0})["metrics"] == {"i": 3}


def test_two_processes_share_a_folder_without_doing_a_cell_twice(tmp_path):
    code = """
        import sys, time
        from experiments.core import store as module
        module._device = lambda: ("cpu", "cpu", 1)
        store = module.ResultsStore(sys.argv[1])
        store.check_writable()
        print("ready", flush=True)
        for cell in range(12):
            config = {"cell": cell}
            with store.claim(config) as mine:
                if mine and store.get(config) is None:
                    time.sleep(0.02)
                    with open(f"{sys.argv[1]}/log", "a") as log:
                        print(cell, file=log)
                    store.put(config, status="done", metrics={}, wall_time_s=0)
    """
    with run_python(code, tmp_path) as one, run_python(code, tmp_path) as two:
        for worker in (one, two):
            assert worker.wait(timeout=60) == 0
    done = sorted(map(int, (tmp_path / "log").read_text().split()))
    # A cell that one process skipped as claimed was the other's, so all are there.
    assert done == list(range(12))
    records = ResultsStore(tmp_path).records()
    assert {r["config"]["cell"] for r in records} == set(range(12))


def test_a_claim_dies_with_its_process(tmp_path):
    code = """
        import sys, time
        from experiments.core.store import ResultsStore
        with ResultsStore(sys.argv[1]).claim({"cell": 1}) as mine:
            print(mine, flush=True)
            time.sleep(60)
    """
    store = ResultsStore(tmp_path)
    with run_python(code, tmp_path) as holder:
        assert holder.stdout.readline() == "True\n"
        with store.claim({"cell": 1}) as mine, store.claim({"cell": 2}) as other:
            assert not mine and other
    assert holder.returncode == -signal.SIGKILL
    with store.claim({"cell": 1}) as mine:
        assert mine


def test_a_claim_holds_within_one_process_and_ends_with_an_exception(tmp_path):
    store = ResultsStore(tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        with store.claim(CONFIG) as first, store.claim(CONFIG) as second:
            assert first and not second
            raise RuntimeError("stop")
    with store.claim(CONFIG) as again:
        assert again


# --- lists -------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "n"), [(10, 3), (2, 4), (0, 2), (7, 1)])
def test_shards_partition_the_cells(count, n):
    cells = list(range(count))
    parts = [shard(cells, f"{i}/{n}") for i in range(1, n + 1)]
    assert sorted(cell for part in parts for cell in part) == cells
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    "part", ["0/3", "4/3", "1/0", "1", "a/b", "1/", "-1/2", "1/2/3"]
)
def test_a_bad_shard_says_what_is_right(part):
    with pytest.raises(ValueError, match=r"shard: (expected 'i/n'|i counts from 1)"):
        shard([1, 2, 3], part)


def test_export_and_import_keep_all_records(tmp_path):
    store = ResultsStore(tmp_path / "a")
    records = [put(store, CONFIG | {"seed": s}, s / 10) for s in (2, 0, 1)]
    path = tmp_path / "out" / "results.jsonl"
    assert store.export_jsonl(path) == 3
    assert [r["config"]["seed"] for r in read_jsonl(path)] == [0, 1, 2]
    first = path.read_bytes()
    store.export_jsonl(path)
    assert path.read_bytes() == first

    other = ResultsStore(tmp_path / "b")
    kept = put(other, CONFIG | {"seed": 1}, accuracy=0.99)
    assert other.import_jsonl(path) == 2
    assert other.import_jsonl(path) == 0
    assert other.get(CONFIG | {"seed": 1}) == kept
    assert other.get(CONFIG | {"seed": 2}) == records[0]


def test_a_damaged_line_is_named(tmp_path):
    store = ResultsStore(tmp_path)
    put(store)
    path = tmp_path / "results.jsonl"
    store.export_jsonl(path)
    good = path.read_text()
    path.write_text(good + good[:40] + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2: "):
        read_jsonl(path)
    path.write_text(good.replace('"schema": 1', '"schema": 9'))
    with pytest.raises(SchemaError, match="line 1: schema version 9"):
        read_jsonl(path)


def test_records_become_a_frame_of_flat_columns(tmp_path, monkeypatch):
    store = ResultsStore(tmp_path)
    for seed in (0, 1):
        config = dict(seed=seed, more=dict(grid=3))
        store.put(config, status="done", metrics=dict(loss=0.5), wall_time_s=1.0)
    rows = store_module.frame_rows(store.records())
    names = "hash status wall_time_s config.seed config.more.grid metrics.loss".split()
    assert sorted(rows[0]) == sorted(rows[1]) == sorted(names)
    assert sorted(row["config.seed"] for row in rows) == [0, 1]
    fake = types.SimpleNamespace(DataFrame=lambda rows: rows)
    monkeypatch.setitem(sys.modules, "pandas", fake)
    assert store.frame() == rows
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'attn_jax\[notebooks\]'"):
        store.frame()
