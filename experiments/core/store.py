"""The results store: one JSON file per cell, named by the hash of its config.

A *cell* is one training run, described completely by a flat mapping (its
config). Any number of processes may work on one folder: files appear whole or
not at all, a cell that a live process works on is claimed by a lock that the
operating system releases when the process dies, and nothing is ever deleted.

    folder/cells/<hash>.json         one record per finished cell
    folder/locks/<hash>.lock         claims; empty files, safe to delete when idle
    folder/checkpoints/<hash>/       the training loop's own

Only the standard library is needed to read a store.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

SCHEMA = 1
STATUSES = ("done", "diverged", "failed")

_FIELDS = (
    "schema",
    "hash",
    "config",
    "status",
    "metrics",
    "curves",
    "wall_time_s",
    "provenance",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
_ROOT = pathlib.Path(__file__).resolve().parents[2]

Record = dict[str, Any]
_Cell = TypeVar("_Cell")


class StoreError(OSError):
    """The results folder cannot be written; the message says what to do."""


class SchemaError(ValueError):
    """A record was written in a format that this version does not read."""


def config_hash(config: Mapping[str, Any]) -> str:
    """Name a config: the first 16 hex digits of SHA-256 of its canonical JSON.

    The order of the keys does not matter; the types of the values do (``1`` and
    ``1.0`` are different configs).

    Args:
        config: String keys; values are str, int, float, bool, None, or lists and
            mappings of those. NumPy scalars count as their Python values.

    Returns:
        16 lower-case hexadecimal digits.

    Raises:
        TypeError: A key is not a string or a value has no JSON form.
        ValueError: A number is NaN. (Infinity counts as the text "inf", since JSON
            has none.)

    >>> config_hash({"seed": 0, "model": "vit"}) == config_hash(
    ...     {"model": "vit", "seed": 0})
    True
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a mapping, got {type(config).__name__}")
    text = _dumps(_plain(config, "config", finite=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard(cells: Sequence[_Cell], part: str) -> list[_Cell]:
    """Take part ``"i/n"`` of the cells: every n-th one, beginning with the i-th.

    The n parts are disjoint, together they are all cells, and their sizes differ
    by at most one. ``i`` counts from 1.

    >>> shard(["a", "b", "c", "d", "e"], "2/3")
    ['b', 'e']

    Args:
        cells: The whole list, in the same order on every machine.
        part: ``"i/n"`` with 1 <= i <= n.

    Raises:
        ValueError: ``part`` is not of that form.
    """
    first, slash, count = part.partition("/")
    if not (slash and first.strip().isdecimal() and count.strip().isdecimal()):
        raise ValueError(f"shard: expected 'i/n' such as '1/4', got {part!r}")
    i, n = int(first), int(count)
    if not 1 <= i <= n:
        raise ValueError(f"shard: i counts from 1 to n, got {part!r}")
    return list(cells[i - 1 :: n])


class ResultsStore:
    """A folder of finished cells.

    Making a store touches nothing, so reading works in a read-only folder; call
    `check_writable` before work whose result shall be stored.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = pathlib.Path(folder).expanduser().absolute()
        self.cells = self.folder / "cells"
        self.locks = self.folder / "locks"
        self.checkpoints = self.folder / "checkpoints"
        _git_state()  # the code that runs is the code on disk now, not later

    def path(self, config: Mapping[str, Any]) -> pathlib.Path:
        """Return the file that holds, or would hold, the record of ``config``."""
        return self.cells / f"{config_hash(config)}.json"

    def checkpoint_dir(self, config: Mapping[str, Any]) -> pathlib.Path:
        """Return the absolute folder for the checkpoints of ``config`` (not made)."""
        return self.checkpoints / config_hash(config)

    def check_writable(self) -> None:
        """Make the folders and write a probe, so that trouble shows up early.

        Raises:
            StoreError: The folder is read-only, full, or not a folder.
        """
        probe = self.cells / f".probe-{uuid.uuid4().hex}.tmp"
        try:
            for folder in (self.cells, self.locks, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(probe, "0" * 65536)
        except OSError as error:
            raise _store_error(self.folder, error) from error
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def get(self, config: Mapping[str, Any]) -> Record | None:
        """Return the record of ``config``, or None where there is none.

        A damaged file is named on stderr and set aside (``*.corrupt``), and the
        cell counts as not done.

        Raises:
            SchemaError: The record has a format that this version does not read.
        """
        return self._read(self.path(config))

    def put(
        self,
        config: Mapping[str, Any],
        *,
        status: str,
        metrics: Mapping[str, Any],
        curves: Mapping[str, Sequence[Any]] | None = None,
        wall_time_s: float,
    ) -> Record:
        """Store the outcome of a cell; the file appears whole or not at all.

        Numbers that are not finite are stored as null. Where the folder cannot be
        written, the record is printed to stdout first: one line, which saved
        under the name given is a valid record.

        Args:
            config: What was run.
            status: "done", "diverged" or "failed".
            metrics: Name -> number (or text, or null).
            curves: Name -> list of numbers.
            wall_time_s: Seconds that the cell took.

        Returns:
            The record as stored.

        Raises:
            StoreError: The folder cannot be written.
        """
        if status not in STATUSES:
            raise ValueError(f"status: expected one of {STATUSES}, got {status!r}")
        record = {
            "schema": SCHEMA,
            "hash": config_hash(config),
            "config": _plain(config, "config", finite=True),
            "status": status,
            "metrics": _plain(metrics, "metrics", finite=False),
            "curves": _plain(curves or {}, "curves", finite=False),
            "wall_time_s": float(wall_time_s),
            "provenance": provenance(),
        }
        path = self.cells / f"{record['hash']}.json"
        text = _dumps(record)
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            _write_atomically(path, text + "\n")
        except OSError as error:
            print(f"--- result not stored; save the next line as {path} ---")
            print(text, flush=True)
            raise _store_error(self.folder, error) from error
        return record

    def retry(self, config: Mapping[str, Any], *, anyway: bool = False) -> bool:
        """Set the record of a cell that failed aside, so that it is tried again.

        Args:
            config: The cell.
            anyway: Whether to do so with any record.

        Returns:
            Whether there was one.

        Raises:
            StoreError: The folder cannot be written.
        """
        record, path = self.get(config), self.path(config)
        if record is None or not (anyway or record["status"] == "failed"):
            return False
        status = record["status"]
        target = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.{status}")
        try:
            os.rename(path, target)
        except FileNotFoundError:
            return False  # another process has set it aside
        except OSError as error:
            raise _store_error(self.folder, error) from error
        return True

    def records(self) -> list[Record]:
        """Return all records, ordered by their configs; damaged files set aside.

        Raises:
            SchemaError: A record has a format that this version does not read.
        """
        found = (self._read(path) for path in sorted(self.cells.glob("*.json")))
        records = [record for record in found if record is not None]
        return sorted(records, key=lambda record: _dumps(record["config"]))

    def frame(self) -> Any:
        """The finished cells as a pandas DataFrame, see `frame_rows`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "frame() needs pandas: pip install 'attn_jax[notebooks]'"
            ) from error
        return pandas.DataFrame(frame_rows(self.records()))

    def export_jsonl(self, path: str | os.PathLike[str]) -> int:
        """Write all records to one JSON-lines file, atomically; return how many."""
        return export_jsonl(self.records(), path)

    def import_jsonl(self, path: str | os.PathLike[str]) -> int:
        """Take over the records of a JSON-lines file that the folder lacks.

        A checkout that keeps only results.jsonl thereby counts its cells as done.

        Returns:
            How many records were added.

        Raises:
            StoreError: The folder cannot be written.
            ValueError: A line is damaged.
        """
        added = 0
        for record in read_jsonl(path):
            target = self.cells / f"{record['hash']}.json"
            if self._read(target) is not None:
                continue
            try:
                self.cells.mkdir(parents=True, exist_ok=True)
                _write_atomically(target, _dumps(record) + "\n")
            except OSError as error:
                raise _store_error(self.folder, error) from error
            added += 1
        return added

    @contextlib.contextmanager
    def claim(self, config: Mapping[str, Any]) -> Iterator[bool]:
        """Claim a cell for this process while the context lasts.

        Yields True, or False where someone else (also in this process) holds the
        claim. The operating system lets go of it when the process ends, however
        it ends. After True, look once more with `get`: the other process may just
        have finished the cell.

        Raises:
            StoreError: The lock file cannot be made.
        """
        path = self.locks / f"{config_hash(config)}.lock"
        try:
            self.locks.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _store_error(self.folder, error) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                    raise _store_error(self.folder, error) from error
                held = False
            yield held
        finally:
            os.close(descriptor)

    def _read(self, path: pathlib.Path) -> Record | None:
        try:
            with open(path, "rb") as file:
                data = file.read()
                identity = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            return None
        try:
            record = json.loads(data.decode())
            _check(record, path.stem)
        except SchemaError as error:
            raise SchemaError(f"{path}: {error}") from None
        except (UnicodeDecodeError, ValueError, TypeError) as error:
            self._set_aside(path, identity, str(error))
            return None
        return record

    def _set_aside(self, path: pathlib.Path, seen: os.stat_result, why: str) -> None:
        target = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.corrupt")
        outcome = f"set aside as {target.name}; its cell counts as not done"
        try:
            now = os.stat(path)
            if (now.st_dev, now.st_ino) != (seen.st_dev, seen.st_ino):
                outcome = "another process has replaced it since"
            else:
                os.rename(path, target)
        except FileNotFoundError:
            outcome = "another process has set it aside"
        except OSError as error:
            outcome = f"ignored; it could not be renamed ({error.strerror})"
        print(f"damaged record {path}: {why}; {outcome}", file=sys.stderr, flush=True)


def frame_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as flat rows: what they are, config.* and metrics.*, without curves.

    >>> record = dict(hash="ab", status="done", wall_time_s=2.0, curves={})
    >>> record |= dict(config={"n": 9, "scenes": {"grid": 3}}, metrics={"loss": 0.5})
    >>> list(frame_rows([record])[0].items())[3:]
    [('config.n', 9), ('config.scenes.grid', 3), ('metrics.loss', 0.5)]
    """

    def flat(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            return {name: value}
        parts = (flat(f"{name}.{key}", item) for key, item in value.items())
        return {name: item for part in parts for name, item in part.items()}

    return [
        {name: record[name] for name in ("hash", "status", "wall_time_s")}
        | flat("config", record["config"])
        | flat("metrics", record["metrics"])
        for record in records
    ]


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """Read records from a JSON-lines file that `export_jsonl` wrote.

    Raises:
        ValueError: A line is damaged; the message gives its number.
        SchemaError: A record has a format that this version does not read.
    """
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                _check(record, None)
            except SchemaError as error:
                raise SchemaError(f"{path}, line {number}: {error}") from None
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            records.append(record)
    return records


def export_jsonl(records: Sequence[Record], path: str | os.PathLike[str]) -> int:
    """Write records to a JSON-lines file, atomically; return how many."""
    target = pathlib.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(target, "".join(_dumps(r) + "\n" for r in records))
    except OSError as error:
        raise _store_error(target.parent, error) from error
    return len(records)


def provenance() -> dict[str, Any]:
    """Describe what a result was made with: code, versions, device, time.

    Host and user names are left out on purpose.
    """
    commit, dirty = _git_state()
    platform_name, device, count = _device()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": dict(_versions()),
        "platform": platform_name,
        "device": device,
        "device_count": count,
        "python": platform.python_version(),
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(
            timespec="seconds"
        ),
    }


@functools.cache
def _git_state() -> tuple[str | None, bool | None]:
    """Return the commit, and whether code (not results) differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        code = (":(glob)**/*.py", "setup.cfg", "pyproject.toml", "requirements.lock")
        return commit, bool(git("status", "--porcelain", "--", *code))
    except (OSError, subprocess.SubprocessError):
        return None, None


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = []
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append((name, importlib.metadata.version(name)))
    return tuple(found)


def _device() -> tuple[str | None, str | None, int | None]:
    try:
        import jax

        devices = jax.devices()
        return devices[0].platform, devices[0].device_kind, len(devices)
    except (ImportError, RuntimeError):
        return None, None, None


def _check(record: Any, stem: str | None) -> None:
    if not isinstance(record, dict):
        raise TypeError(f"expected a JSON object, got {type(record).__name__}")
    if "schema" not in record:
        raise ValueError("no schema version")
    if record["schema"] != SCHEMA:
        raise SchemaError(
            f"schema version {record['schema']!r}, but this code reads version "
            f"{SCHEMA}; use the code that wrote it, or another results folder"
        )
    missing = [field for field in _FIELDS if field not in record]
    if missing:
        raise ValueError(f"fields missing: {', '.join(missing)}")
    for field in ("config", "metrics", "curves", "provenance"):
        if not isinstance(record[field], dict):
            raise TypeError(f"{field}: expected a JSON object")
    if record["status"] not in STATUSES:
        raise ValueError(f"status: expected one of {STATUSES}")
    digest = config_hash(record["config"])
    if record["hash"] != digest or stem not in (None, digest):
        raise ValueError(f"the config hashes to {digest}, not to the name it has")


def _plain(value: Any, where: str, *, finite: bool) -> Any:
    """Turn a value into what JSON can hold exactly."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: keys must be strings, got {key!r}")
        return {k: _plain(v, f"{where}.{k}", finite=finite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]", finite=finite) for i, v in enumerate(value)]
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)  # a NumPy float64 is a float too
        if finite and math.isnan(value):
            raise ValueError(f"{where}: expected a number, got nan")
        return str(float(value)) if finite else None  # "inf", as for "no limit"
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # NumPy and JAX
        return _plain(value.tolist(), where, finite=finite)
    raise TypeError(
        f"{where}: expected str, int, float, bool, None, a list or a mapping, "
        f"got {type(value).__name__}"
    )


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)


def _write_atomically(path: pathlib.Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees all of it or none of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):  # the name itself, where folders can sync
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _store_error(folder: pathlib.Path, error: OSError) -> StoreError:
    advice = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EDQUOT: "free some space or choose another folder",
        errno.EROFS: "choose a folder that can be written",
        errno.EACCES: "choose a folder that you may write to",
        errno.EPERM: "choose a folder that you may write to",
        errno.ENOTDIR: "a part of this path is a file; choose another folder",
        errno.EEXIST: "a part of this path is a file; choose another folder",
    }.get(error.errno or 0, "choose another folder")
    reason = error.strerror or str(error)
    return StoreError(
        error.errno or 0, f"cannot write results ({reason}); {advice}", str(folder)
    )
