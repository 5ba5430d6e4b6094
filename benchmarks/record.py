"""What a stored result says beside its figures: machine, versions, commit, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, its vectors and caches, cores, memory and device."""
    found: dict[str, Any] = dict(
        platform=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        device=jax.devices()[0].device_kind,
        devices=jax.device_count(),
    )
    try:
        info = pathlib.Path("/proc/cpuinfo").read_text()
        fields = {}
        for line in info.split("\n\n")[0].splitlines():
            name, _, given = line.partition(":")
            fields[name.strip()] = given.strip()
        flags = fields.get("flags", "").split()
        found["processor"] = fields.get("model name", "unknown")
        found["vectors"] = [f for f in ("avx2", "avx512f", "amx_tile") if f in flags]
        found["caches"] = _caches()
        kilobytes = pathlib.Path("/proc/meminfo").read_text().split()[1]
        found["memory_gib"] = round(int(kilobytes) / 2**20, 1)
    except (OSError, ValueError):  # not Linux
        found["processor"] = platform.processor() or "unknown"
    return found


def _caches() -> dict[str, str]:
    """Sizes of the caches that one core sees, by level, as Linux tells them."""
    found = {}
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("i*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def versions() -> dict[str, str | None]:
    """Of Python and of what is measured; None for what is not installed."""
    found: dict[str, str | None] = dict(python=platform.python_version())
    for name in ("jax", "jaxlib", "flax", "numpy", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checkout's commit, with `+` if something in it is changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        # Results that this run has just written are no change of what it measures.
        paths = ("--", ".", ":!benchmarks/results")
        changed = git("status", "--porcelain", "--untracked-files=no", *paths)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def about(command: str) -> dict[str, Any]:
    """All of it."""
    variables = ("XLA_FLAGS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "JAX_PLATFORMS")
    return dict(
        command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=commit(),
        machine=machine(),
        versions=versions(),
        environment={name: os.environ.get(name) for name in variables},
    )


def _short(value: Any) -> Any:
    """Floats with four digits, so that files are small."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_short(inner) for inner in value]
    return value


def store(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Writes a record as JSON, a line for each row of a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(_short(record), 0) + "\n", encoding="utf-8")


def _lines(value: Any, depth: int) -> str:
    """JSON that breaks lines outside, and keeps what is short in one."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(flat) + depth <= 88 or not isinstance(value, dict | list) or not value:
        return flat
    pad, end = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        named = isinstance(value.get("name"), str)
        if named:  # a row
            return flat
        inner = (
            f"{json.dumps(key, ensure_ascii=False)}: {_lines(item, depth + 1)}"
            for key, item in value.items()
        )
        return "{" + pad + ("," + pad).join(inner) + end + "}"
    return "[" + pad + ("," + pad).join(_lines(i, depth + 1) for i in value) + end + "]"
