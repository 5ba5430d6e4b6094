"""What setup.cfg, requirements.lock, the Makefile and the tree say of one another."""

from __future__ import annotations

import ast
import configparser
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import attn_jax

ROOT = Path(attn_jax.__file__).resolve().parents[1]
OWN = {"attn_jax", "experiments", "benchmarks", "tests"}
OWN |= {path.stem for path in (ROOT / "docs" / "_ext").glob("*.py")}


def requirements() -> dict[str, list[Requirement]]:
    """Read setup.cfg's requirements by extra; "" holds those of attn_jax itself."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    groups = {
        "": config["options"]["install_requires"],
        **config["options.extras_require"],
    }
    return {
        extra: [Requirement(line) for line in text.splitlines() if line.strip()]
        for extra, text in groups.items()
    }


def locked() -> dict[str, list[Requirement]]:
    """Read requirements.lock: the entries of each name, without their hashes."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.findall(r"^(\S+==[^\\\n]+?)\s*(?:\\)?$", text, flags=re.MULTILINE)
    found: dict[str, list[Requirement]] = {}
    for entry in map(Requirement, entries):
        found.setdefault(canonicalize_name(entry.name), []).append(entry)
    return found


def locked_for(python: str) -> dict[str, list[Version]]:
    """What requirements.lock installs on one version of Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return {
        name: [
            Version(pin.version)
            for entry in entries
            if entry.marker is None or entry.marker.evaluate(environment)
            for pin in entry.specifier
        ]
        for name, entries in locked().items()
    }


def imported(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield each third-party top-level module that a folder's sources import."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in {name.partition(".")[0] for name in names}:
                if name not in sys.stdlib_module_names and name not in OWN:
                    yield path.relative_to(ROOT), name


def tracked() -> list[Path]:
    """List the files that git tracks."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout: what is tracked cannot be told")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    # A file that is deleted but not yet committed is still listed.
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("extra", ["", "experiments", "docs", "dev"])
def test_ranges_admit_the_locked_versions(extra: str) -> None:
    lock = locked()
    for requirement in requirements()[extra]:
        name = canonicalize_name(requirement.name)
        assert name in lock, f"{name} is not in requirements.lock: make lock"
        for entry in lock[name]:
            (pin,) = entry.specifier
            assert requirement.specifier.contains(pin.version), (
                f"{requirement} does not admit {name}=={pin.version}: make lock"
            )


@pytest.mark.parametrize(
    ("python", "series"),
    [("3.11", "0.10"), ("3.12", "0.12"), ("3.13", "0.12"), ("3.14", "0.12")],
)
def test_lock_has_the_newest_jax_that_a_python_can_have(python, series) -> None:
    lock = locked_for(python)
    assert all(len(pins) <= 1 for pins in lock.values()), lock
    for name in ["jax", "jaxlib"]:
        (pin,) = lock[name]
        assert f"{pin.major}.{pin.minor}" == series
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (versions,) = re.findall(r"^PYTHON_VERSIONS := (.*)$", makefile, flags=re.M)
    assert python in versions.split()


def test_lock_pins_with_hashes_and_no_peers() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[a-z])", text)[1:]
    assert len(entries) == sum(map(len, locked().values())) > 30
    for entry in entries:
        assert re.match(r"\S+==[\w.]+", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
    for peer in requirements()["bench"] + requirements()["browser"]:
        assert canonicalize_name(peer.name) not in locked()


def test_every_range_is_bounded_and_has_a_reason() -> None:
    lines = (ROOT / "setup.cfg").read_text(encoding="utf-8").splitlines()
    found = [item for group in requirements().values() for item in group]
    for item in found:
        pattern = re.compile(rf"    {re.escape(item.name)} [<>=]")
        (row,) = [row for row, line in enumerate(lines) if pattern.match(line)]
        assert lines[row - 1].startswith("    # "), f"no reason above: {lines[row]}"
        assert {">=", "=="} & {part.operator for part in item.specifier}, item


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("attn_jax", ["", "ode", "experiments"]),  # `show --png` draws
        ("experiments", ["", "cluster", "notebooks", "experiments"]),
        ("benchmarks", ["", "experiments", "bench"]),
        ("docs", ["", "experiments", "docs"]),
        ("tests", ["", "experiments", "docs", "dev", "bench", "browser"]),  # or skipped
    ],
)
def test_every_import_is_declared(folder: str, extras: list[str]) -> None:
    groups = requirements()
    declared = {
        canonicalize_name(item.name) for extra in extras for item in groups[extra]
    }
    owners = packages_distributions()
    missing = [
        f"{path}: import {module}"
        for path, module in imported(ROOT / folder)
        if not declared & {canonicalize_name(n) for n in owners.get(module, [module])}
    ]
    assert not missing, f"not declared in setup.cfg for {folder}/: {missing}"


def test_no_registry_address_and_no_machine_path_is_tracked() -> None:
    # In pieces, so that this file does not find itself.
    words = [
        "py" + "pi.org",
        "python" + "hosted.org",
        "deb." + "debian.org",
        "npm" + "js.org",
        "--index" + "-url",
        "--extra-index" + "-url",
        "--find" + "-links",
    ]
    machine = "|".join(["home/" + r"\w", "Users/" + r"\w", "ro" + "ot/", "wo" + "rk/"])
    forbidden = re.compile(
        "|".join(map(re.escape, words)) + rf"|(?<![\w.~$}}/-])/(?:{machine})"
    )
    assert forbidden.search('"/' + 'home/someone"') and not forbidden.search("a/work/b")
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(lines, start=1):
            found = forbidden.search(line)
            assert not found, f"{path.relative_to(ROOT)}:{number}: {found}"


def test_xla_flags_are_set_in_one_place_that_knows_which_jaxlib_has_them(
    tmp_path: Path,
) -> None:
    place = ROOT / "tests" / "quick_compilation.py"
    flag = "--" + "xla_cpu_use_fusion_emitters=false"
    assert flag in place.read_text(encoding="utf-8")
    for path in tracked():
        if path != place and (path.suffix in {".py", ".cfg", ".toml", ""}):
            assert "--" + "xla_" not in path.read_text(encoding="utf-8"), path
    # XLA itself says what it knows: it ends the process on what it does not.
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    begin = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
    tried = subprocess.run(
        begin, cwd=tmp_path, env=clean | {"XLA_FLAGS": flag}, capture_output=True
    )
    found = subprocess.run(
        [sys.executable, place, "env"], env=clean, capture_output=True, text=True
    )
    assert (f"XLA_FLAGS={flag}\n" in found.stdout) == (tried.returncode == 0)


def test_make_help_is_the_default_and_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    targets = set(phony.split())
    wanted = "help install data run test test-slow test-newest check lint typecheck "
    assert targets == set((wanted + "bench figures docs lock clean").split())
    shown = subprocess.run(
        ["make", "--no-print-directory"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert set(re.findall(r"^  ([\w-]+) +\S", shown, flags=re.MULTILINE)) == targets


def test_every_make_target_that_is_written_down_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    # `make this` in a sentence, or a line of its own in a block or a script.
    command = r"make((?: --[a-z-]+| [A-Z]+=(?:\"[^\"]*\"|\S+)| [a-z][a-z-]*)+)"
    mention = re.compile(rf"`{command}`|^ *(?:\$ )?{command} *(?:#.*)?$", re.M)
    seen = set()
    for name in [
        "README.md", "experiments/README.md", "CONTRIBUTING.md", "setup.cfg", ".ci/run"
    ]:  # fmt: skip
        path = ROOT / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for marked, alone in mention.findall(text):
            words = re.sub(r"[A-Z]+=(\"[^\"]*\"|\S+)", "", marked or alone).split()
            goals = {word for word in words if not word.startswith("-")}
            assert goals <= targets, f"{name}: make {marked or alone}"
            seen |= goals
    assert {"install", "lint", "typecheck", "test"} <= seen


def test_compiled_programs_are_kept_in_bounds_and_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ROOT / "tests" / "quick_compilation.py"
    kept = runpy.run_path(str(place))["kept_programs"]
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(kept())
    assert folder.is_relative_to(tmp_path) and folder.is_dir()
    (folder / "program").write_bytes(b"12345")
    assert kept() == str(folder) and list(folder.iterdir())
    monkeypatch.setitem(kept.__globals__, "_KEPT_BYTES", 4)
    assert kept() == str(folder) and not list(folder.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kept() is None


def test_version_is_a_literal_and_in_the_changelog() -> None:
    source = ast.parse((ROOT / "attn_jax/__init__.py").read_text(encoding="utf-8"))
    values = [
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "__version__" for t in node.targets)
    ]
    assert values == [attn_jax.__version__]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", changelog, flags=re.MULTILINE)
    assert attn_jax.__version__ in headings[0]


def test_wheel_builds_without_jax_and_holds_what_it_should(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__", "results")
    for name in ["attn_jax", "experiments"]:
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    shutil.copytree(ROOT / "tests", source / "tests", ignore=skip)
    for name in ["setup.cfg", "pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    # None in sys.modules turns `import jax` into an ImportError.
    build = (
        "import sys; sys.modules['jax'] = None; "
        "from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"attn_jax-{attn_jax.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert f"\nVersion: {attn_jax.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "attn-jax = attn_jax.__main__:main" in scripts
    assert {"attn_jax/py.typed", f"{info}/licenses/LICENSE"} <= names
    modules = {
        str(path.relative_to(ROOT))
        for folder in ["attn_jax", "experiments"]
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
