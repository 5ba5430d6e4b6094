"""Data: every source, every way a file can be bad, subsets that nest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import os
import pathlib
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from experiments.data import __main__ as program
from experiments.data import fetch, splits
from experiments.data import images as data

ROOT = pathlib.Path(__file__).parents[2]


def idx(array: np.ndarray) -> bytes:
    """Encode uint8 as gzipped IDX, always to the same bytes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


@functools.cache
def small_files() -> dict[str, bytes]:
    """Files of Fashion-MNIST's format: 30 + 10 images of 6 x 6."""
    random = np.random.default_rng(0)
    files = {}
    for split, n in (("train", 30), ("t10k", 10)):
        pixels = random.integers(0, 256, (n, 6, 6), np.uint8)
        files[f"{split}-images-idx3-ubyte.gz"] = idx(pixels)
        files[f"{split}-labels-idx1-ubyte.gz"] = idx((np.arange(n) % 10).astype("u1"))
    return files


@pytest.fixture
def spec(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Files:
    """Make load() take the small files for Fashion-MNIST, with no source but a cache.

    Tests add the source that they are about.
    """
    monkeypatch.delenv("ATTN_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    spec = fetch.Files(
        title="Fashion-MNIST",
        name="fashion_mnist",
        folder="fashion-mnist",
        sha256={k: hashlib.sha256(v).hexdigest() for k, v in small_files().items()},
        addresses=(),
        other_folders=(".",),
    )
    monkeypatch.setattr(data, "FASHION_MNIST", spec)
    return spec


@pytest.fixture
def use(
    spec: fetch.Files, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., fetch.Files]:
    """Return a function that changes fields of the specification."""

    def change(**fields: object) -> fetch.Files:
        changed = dataclasses.replace(spec, **fields)  # type: ignore[arg-type]
        monkeypatch.setattr(data, "FASHION_MNIST", changed)
        return changed

    return change


def write_files(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in small_files().items():
        (folder / name).write_bytes(content)
    return folder


def load(tmp_path: pathlib.Path, **options: bool) -> data.Dataset:
    return data.load("fashion_mnist", cache_dir=tmp_path / "cache", **options)


class _Handler(http.server.SimpleHTTPRequestHandler):
    requested: list[str]
    cut: bool

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.requested.append(self.path.rsplit("/", 1)[-1])
        if self.cut:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
            return
        super().do_GET()


@contextlib.contextmanager
def serve(folder: pathlib.Path, *, cut: bool = False) -> Iterator[tuple[str, list]]:
    """Serve a folder over HTTP: the address, and the list of what was asked for."""
    requested: list[str] = []
    handler = type("Handler", (_Handler,), {"requested": requested, "cut": cut})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=folder)
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requested
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- Sources -----------------------------------------------------------------------


def test_source_order(tmp_path, use, monkeypatch):
    own = write_files(tmp_path / "own")
    installed = write_files(tmp_path / "installed")
    use(installed=str(installed))
    assert load(tmp_path).source == str(installed)
    cached = write_files(tmp_path / "cache" / "fashion-mnist")
    assert load(tmp_path).source == str(cached)
    monkeypatch.setenv("ATTN_DATA", str(own))
    assert load(tmp_path).source == str(own)
    # A folder of other data sets is no hindrance.
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("ATTN_DATA", str(tmp_path / "other"))
    assert load(tmp_path).source == str(cached)


def test_contents(tmp_path, spec):
    folder = write_files(tmp_path / "cache" / "fashion-mnist")
    got = load(tmp_path)
    assert got.train_images.shape == (30, 6, 6, 1) and got.test_images.shape[0] == 10
    assert got.train_images.dtype == np.uint8 and got.train_labels.dtype == np.int32
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    assert got.train_images.tobytes() == raw
    assert got.test_labels.tolist() == list(range(10))
    assert got.num_classes == 10 and got.image_shape == (6, 6, 1)
    line = got.describe()
    for part in ("fashion_mnist", "30 train", "10 test", "10 classes", str(folder)):
        assert part in line
    assert got.sha256[:16] in line and "\n" not in line
    with pytest.raises(ValueError, match="read-only"):
        got.train_images[0] = 0


def test_http_fetch_fills_the_cache_once(tmp_path, use):
    with serve(write_files(tmp_path / "site")) as (address, requested):
        use(addresses=(address,))
        first = load(tmp_path)
        assert first.source.startswith(address)
        assert sorted(requested) == sorted(small_files())
        second = load(tmp_path)
    assert len(requested) == 4
    assert second.source == str(tmp_path / "cache" / "fashion-mnist")
    assert second.sha256 == first.sha256
    left = {path.name for path in (tmp_path / "cache" / "fashion-mnist").iterdir()}
    assert left == {*small_files(), ".lock"}


def test_wrong_download_is_not_kept_and_the_next_address_serves(tmp_path, use):
    bad = write_files(tmp_path / "bad")
    (bad / "train-labels-idx1-ubyte.gz").write_bytes(b"<html>please log in</html>")
    good = write_files(tmp_path / "good")
    use(addresses=(bad.as_uri() + "/", good.as_uri() + "/"))
    got = load(tmp_path)
    assert got.source.startswith(good.as_uri())
    assert got.train_labels.shape == (30,)


def test_all_addresses_wrong_names_both_hashes(tmp_path, use):
    bad = write_files(tmp_path / "bad")
    name = "t10k-images-idx3-ubyte.gz"
    (bad / name).write_bytes(small_files()[name][:-20])
    spec = use(addresses=(bad.as_uri() + "/",))
    with pytest.raises(data.DataError) as error:
        load(tmp_path)
    text = str(error.value)
    got = hashlib.sha256((bad / name).read_bytes()).hexdigest()
    assert spec.sha256[name] in text and got in text and name in text
    assert "ATTN_DATA" in text and bad.as_uri() in text
    assert not (tmp_path / "cache" / "fashion-mnist" / name).exists()


def test_address_without_the_file(tmp_path, use):
    (tmp_path / "empty").mkdir()
    with serve(tmp_path / "empty") as (address, requested):
        use(addresses=(address,))
        with pytest.raises(data.DataError, match="404"):
            load(tmp_path)
    assert len(requested) == 1  # the other files are not asked for


def test_connection_cut_while_reading(tmp_path, use):
    with serve(write_files(tmp_path / "site"), cut=True) as (address, _):
        use(addresses=(address,))
        with pytest.raises(data.DataError, match=r"truncated|broke off"):
            load(tmp_path)
    left = {path.name for path in (tmp_path / "cache" / "fashion-mnist").iterdir()}
    assert left == {".lock"}


def test_refused_and_silent_addresses_are_given_up_fast(tmp_path, use, monkeypatch):
    monkeypatch.setattr(fetch, "_CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        ports = closed.getsockname()[1], silent.getsockname()[1]
        use(addresses=tuple(f"http://127.0.0.1:{port}/" for port in ports))
        began = time.monotonic()
        with pytest.raises(data.DataError) as error:
            load(tmp_path)
        assert time.monotonic() - began < 5
        assert "refused" in str(error.value)
        assert "no answer within 0.2 s" in str(error.value)
        silent.accept()[0].close()  # lets the waiting thread end


def test_real_addresses_give_up_within_ten_seconds_in_all():
    longest = max(
        len(spec.addresses)
        for spec in (data.FASHION_MNIST, data.CIFAR10, data.CIFAR100)
    )
    assert longest * fetch._CONNECT_SECONDS < 10
    for spec in (data.FASHION_MNIST, data.CIFAR10, data.CIFAR100):
        assert all(len(digest) == 64 for digest in spec.sha256.values())


# --- Debian package ----------------------------------------------------------------


def fake_tools(folder: pathlib.Path, monkeypatch, *, lists: bool = True) -> None:
    """Put stand-ins for apt-get and dpkg first on PATH; they note how they are called.

    Without `lists`, a plain download fails as it does where lists were never fetched.
    """
    folder.mkdir()
    refuse = (
        "" if lists else 'case "$2" in -o*) ;; *) [ "$1" = update ] || exit 100;; esac'
    )
    scripts = {
        "apt-get": f"""
            echo "apt-get $*" >> {folder}/calls
            echo "W: harmless" >&2
            {refuse}
            [ "$1" = update ] || touch toy_1.0_all.deb
            """,
        "dpkg": f"""
            echo "dpkg $*" >> {folder}/calls
            mkdir -p "$3/opt/toy" && cp {folder}/../package/* "$3/opt/toy/"
            """,
    }
    for name, text in scripts.items():
        script = folder / name
        script.write_text("#!/bin/sh\n" + textwrap.dedent(text))
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("lists", [True, False])
def test_package_is_unpacked_into_the_cache(tmp_path, use, monkeypatch, capfd, lists):
    write_files(tmp_path / "package")
    fake_tools(tmp_path / "bin", monkeypatch, lists=lists)
    use(installed="/opt/toy", package="toy")
    got = load(tmp_path)
    assert got.source.startswith("Debian package toy_1.0_all")
    assert load(tmp_path).source == str(tmp_path / "cache" / "fashion-mnist")
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert calls[0] == "apt-get download toy"
    assert len(calls) == (2 if lists else 4) and calls[-1].startswith("dpkg -x ")
    if not lists:
        assert calls[1].startswith("apt-get update -oDir::State=")
    assert capfd.readouterr() == ("", "")  # the tools' chatter is not ours


def test_package_with_other_files_is_refused(tmp_path, use, monkeypatch):
    package = write_files(tmp_path / "package")
    (package / "t10k-labels-idx1-ubyte.gz").write_bytes(b"newer")
    fake_tools(tmp_path / "bin", monkeypatch)
    use(installed="/opt/toy", package="toy")
    with pytest.raises(data.DataError, match="this is what package toy gave"):
        load(tmp_path)


def test_missing_and_failing_tools_are_named(tmp_path, use, monkeypatch):
    use(installed="/opt/toy", package="toy")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(data.DataError, match="apt-get and dpkg not found") as error:
        load(tmp_path)
    assert "install the Debian package toy" in str(error.value)
    for tool in ("apt-get", "dpkg"):
        (tmp_path / tool).write_text("#!/bin/sh\necho E: no such thing >&2\nexit 100\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(data.DataError, match="ended with 100: E: no such thing"):
        load(tmp_path)


# --- Bad files and folders ---------------------------------------------------------


def test_corrupt_cached_file_is_set_aside_and_fetched_again(tmp_path, use, capsys):
    site = write_files(tmp_path / "site")
    cached = write_files(tmp_path / "cache" / "fashion-mnist")
    name = "train-images-idx3-ubyte.gz"
    (cached / name).write_bytes(small_files()[name][:40])
    spec = use(addresses=(site.as_uri() + "/",))
    got = load(tmp_path)
    assert got.source.startswith(site.as_uri())
    assert (cached / f"{name}.corrupt").read_bytes() == small_files()[name][:40]
    assert (cached / name).read_bytes() == small_files()[name]
    warning = capsys.readouterr().err
    assert name in warning and spec.sha256[name] in warning and "40 bytes" in warning


def test_corrupt_installed_file_is_passed_over(tmp_path, use):
    installed = write_files(tmp_path / "installed")
    (installed / "t10k-labels-idx1-ubyte.gz").write_bytes(b"")
    site = write_files(tmp_path / "site")
    use(installed=str(installed), addresses=(site.as_uri() + "/",))
    assert load(tmp_path).source.startswith(site.as_uri())
    use(installed=str(installed), addresses=())
    with pytest.raises(data.DataError, match="reinstall the package"):
        data.load("fashion_mnist", cache_dir=tmp_path / "other cache")


def test_own_folder_is_never_repaired_or_passed_over(tmp_path, spec, monkeypatch):
    write_files(tmp_path / "cache" / "fashion-mnist")
    own = write_files(tmp_path / "own")
    name = "t10k-labels-idx1-ubyte.gz"
    (own / name).write_bytes(b"edited")
    monkeypatch.setenv("ATTN_DATA", str(own))
    with pytest.raises(data.DataError, match=r"is your own \(ATTN_DATA\)") as error:
        load(tmp_path)
    assert spec.sha256[name] in str(error.value)
    assert (own / name).read_bytes() == b"edited"
    (own / name).unlink()
    with pytest.raises(data.DataError, match=f"{name} cannot be read"):
        load(tmp_path)
    monkeypatch.setenv("ATTN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(data.DataError, match="ATTN_DATA names .*nowhere"):
        load(tmp_path)


def test_unwritable_cache(tmp_path, use):
    site = write_files(tmp_path / "site")
    use(addresses=(site.as_uri() + "/",))
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(data.DataError, match="cannot write to the cache") as error:
        load(tmp_path)
    assert "cache_dir" in str(error.value) and "ATTN_DATA" in str(error.value)


def test_full_disk(tmp_path, use, monkeypatch):
    site = write_files(tmp_path / "site")
    use(addresses=(site.as_uri() + "/",))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.os, "fsync", full)
    with pytest.raises(data.DataError, match="cannot fill the cache.*No space left"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "not a whole gzip file"),
        (b"", "does not start like an IDX file"),
        (idx(np.zeros((3, 4), np.uint8))[:-9], "not a whole gzip file"),
        (idx(np.arange(200, dtype=np.uint8))[:30] + b"\xff" * 200, "not a whole gzip"),
        (gzip.compress(b"\x00\x00\x0d\x01" + bytes(8), mtime=0), "00 00 0d 01"),
        (gzip.compress(b"\x00\x00\x08\x03" + bytes(4), mtime=0), "does not start like"),
        (
            gzip.compress(
                struct.pack(">BBBB2I", 0, 0, 8, 2, 3, 4) + bytes(11), mtime=0
            ),
            r"should hold 12 bytes of data for shape \(3, 4\), got 11",
        ),
    ],
)
def test_read_idx_bad_files(tmp_path, content, message):
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=message) as error:
        data.read_idx(path)
    assert str(path) in str(error.value) and "fetch it again" in str(error.value)


def test_fallback_only_when_allowed_and_loud(tmp_path, spec, capsys):
    with pytest.raises(data.DataError, match="Fashion-MNIST could not be had"):
        load(tmp_path)
    got = load(tmp_path, allow_fallback=True)
    assert got.name == "digits" and "fashion_mnist could not be had" in got.source
    warning = capsys.readouterr().err
    assert "WARNING" in warning and "digits INSTEAD" in warning


def test_two_processes_fill_one_cache(tmp_path, use):
    site = write_files(tmp_path / "site")
    with serve(site) as (address, requested):
        spec = use(addresses=(address,))
        program = textwrap.dedent(
            f"""
            import sys, time
            from experiments.data import fetch, images as data
            data.FASHION_MNIST = fetch.Files(
                title="toy", folder="fashion-mnist", name="toy",
                sha256={dict(spec.sha256)!r}, addresses=({address!r},))
            print("ready", flush=True)
            sys.stdin.readline()
            print(data.load("fashion_mnist", cache_dir={str(tmp_path / "c")!r}).sha256)
            """
        )
        environment = {k: v for k, v in os.environ.items() if k != "ATTN_DATA"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:  # both at once
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate()[0].strip() for process in processes]
    assert len(answers[0]) == 64 and answers[0] == answers[1]
    assert sorted(requested) == sorted(small_files()), "the second one must wait"
    left = {path.name for path in (tmp_path / "c" / "fashion-mnist").iterdir()}
    assert left == {*small_files(), ".lock"}


# --- Other data sets ---------------------------------------------------------------


def cifar_archive(
    path: pathlib.Path, *, coarse: bool, cut: int = 0, label: int | None = None
) -> np.ndarray:
    """Write an archive in the format of CIFAR; return the first image [32, 32, 3]."""
    random = np.random.default_rng(1)
    members = {}
    names = ["train.bin", "test.bin"] if coarse else []
    names = names or [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    first = None
    for name in names:
        pixels = random.integers(0, 256, (4, 32, 32, 3), np.uint8)
        first = pixels[0] if first is None else first
        planes = pixels.transpose(0, 3, 1, 2).reshape(4, -1)
        labels = np.arange(4, dtype=np.uint8)[:, None]
        if label is not None:
            labels = np.full_like(labels, label)
        columns = [np.full((4, 1), 99, np.uint8)] if coarse else []
        rows = np.concatenate([*columns, labels, planes], axis=1)
        members[name] = rows.tobytes()[: len(rows.tobytes()) - cut]
    classes = "\n".join(f"class{i}" for i in range(4)) + "\n\n"
    members["fine_label_names.txt" if coarse else "batches.meta.txt"] = classes.encode()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert first is not None
    return first


def use_cifar(monkeypatch, path: pathlib.Path, *, coarse: bool) -> None:
    field = "CIFAR100" if coarse else "CIFAR10"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = dataclasses.replace(getattr(data, field), sha256={path.name: digest})
    monkeypatch.setattr(data, field, spec)
    monkeypatch.setenv("ATTN_DATA", str(path.parent))


@pytest.mark.parametrize("coarse", [False, True])
def test_cifar(tmp_path, monkeypatch, coarse):
    name = "cifar100" if coarse else "cifar10"
    (path,) = (tmp_path / n for n in (data.CIFAR100 if coarse else data.CIFAR10).sha256)
    first = cifar_archive(path, coarse=coarse)
    use_cifar(monkeypatch, path, coarse=coarse)
    got = data.load(name, cache_dir=tmp_path / "cache")
    assert got.name == name
    assert got.train_images.shape == (4 if coarse else 20, 32, 32, 3)
    assert got.test_images.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(got.train_images[0], first)
    assert got.train_labels[:4].tolist() == [0, 1, 2, 3]
    assert got.class_names == ("class0", "class1", "class2", "class3")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(data.DataError, match="expected sha256"):
        data.load(name, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coarse": False, "cut": 1}, "not a multiple of 3,073"),
        ({"coarse": False, "cut": 4 * 3073}, "has 0 bytes"),
        ({"coarse": False, "label": 7}, "has label 7, but there are 4 classes"),
        ({"coarse": True}, "holds no data_batch_1.bin"),
    ],
)
def test_cifar_bad_archives(tmp_path, monkeypatch, options, message):
    path = tmp_path / "cifar-10-binary.tar.gz"
    cifar_archive(path, **options)
    use_cifar(monkeypatch, path, coarse=False)
    with pytest.raises(data.DataError, match=message):
        data.load("cifar10", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("cut", [20, 4000, -1])
def test_cifar_truncated_archive(tmp_path, monkeypatch, cut):
    path = tmp_path / "cifar-10-binary.tar.gz"
    cifar_archive(path, coarse=False)
    path.write_bytes(b"no archive" if cut < 0 else path.read_bytes()[:-cut])
    use_cifar(monkeypatch, path, coarse=False)
    with pytest.raises(data.DataError, match="not a whole tar archive"):
        data.load("cifar10", cache_dir=tmp_path / "cache")


def test_digits():
    got = data.load("digits")
    assert got.image_shape == (8, 8, 1) and got.num_classes == 10
    assert len(got.train_labels) + len(got.test_labels) == 1797
    assert got.train_images.max() == 255 and got.train_images.min() == 0
    assert np.bincount(got.test_labels).min() >= 34
    assert got.sha256 == data.load("digits").sha256


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="unknown data set name 'mnist'.*npz:PATH"):
        data.load("mnist", cache_dir=tmp_path)


def arrays(**changes: object) -> dict[str, np.ndarray]:
    """Arrays of a good npz file, changed; None takes one away."""
    good: dict[str, object] = {
        "train_images": np.arange(24 * 4 * 5, dtype=np.uint8).reshape(24, 4, 5),
        "train_labels": np.arange(24) % 3,
        "test_images": np.zeros((6, 4, 5), np.uint8),
        "test_labels": np.arange(6) % 3,
    }
    return {
        name: np.asarray(value)
        for name, value in (good | changes).items()
        if value is not None
    }


def test_npz(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays())
    got = data.load(f"npz:{path}")
    assert got.train_images.shape == (24, 4, 5, 1) and got.num_classes == 3
    assert got.name == "npz:own.npz" and got.source == str(path)
    assert got.class_names == ("0", "1", "2")
    np.savez_compressed(
        path,
        **arrays(
            train_images=np.zeros((24, 4, 5, 3), np.uint8),
            test_images=np.zeros((6, 4, 5, 3), np.uint8),
            class_names=["cat", "dog", "eel"],
        ),
    )
    got = data.load(f"npz:{path}")
    assert got.image_shape == (4, 5, 3) and got.class_names == ("cat", "dog", "eel")


def test_npz_without_test_set_is_split_and_says_so(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays(test_images=None, test_labels=None))
    got = data.load(f"npz:{path}")
    assert np.bincount(got.test_labels).tolist() in ([1, 1, 2], [1, 2, 1], [2, 1, 1])
    assert len(got.train_labels) == 20
    assert "a sixth of each class was set aside" in got.describe()
    everything = np.concatenate([got.train_images, got.test_images])[..., 0]
    original = arrays()["train_images"]
    assert sorted(map(bytes, everything)) == sorted(map(bytes, original))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, "has no array 'train_images'"),
        ({"train_labels": None}, "has no array 'train_labels'"),
        ({"test_labels": None}, "has no array 'test_labels'.*both of test_images"),
        ({"test_imgs": np.zeros(3)}, r"not used: \['test_imgs'\]"),
        ({"train_images": np.zeros((24, 4, 5))}, "float64, uint8 in 0..255 is needed"),
        ({"train_images": np.zeros((24, 4), np.uint8)}, r"shape \(24, 4\), needed is"),
        ({"train_images": np.zeros((24, 3, 4, 5), np.uint8)}, "channels last"),
        ({"train_images": np.zeros((0, 4, 5), np.uint8)}, "n, H, W >= 1"),
        (
            {"train_labels": np.zeros(24)},
            "dtype float64 and shape .*needed are integers",
        ),
        ({"train_labels": np.arange(23) % 3}, r"integers of shape \(24,\)"),
        ({"train_labels": np.arange(24)[:, None]}, r"shape \(24, 1\)"),
        ({"train_labels": np.arange(24) % 3 - 1}, "has the label -1"),
        ({"train_labels": np.arange(24) % 3 * 2}, "no training image has the label 1"),
        ({"train_labels": np.zeros(24, int)}, "one class only"),
        ({"test_labels": np.arange(6)}, "test_labels has class 5"),
        ({"test_images": np.zeros((6, 4, 4), np.uint8)}, "they must agree"),
        ({"class_names": ["a", "b"]}, "at least 3 strings"),
        ({"class_names": ["a", "b", "c", "d"]}, "no training image has the label 3"),
        ({"class_names": [1, 2, 3]}, "class_names must be a list"),
        ({"train_labels": np.array([{}] * 24)}, "holds Python objects"),
        (
            {
                "train_labels": np.arange(24).clip(0, 1),
                "test_images": None,
                "test_labels": None,
            },
            "class 0 has one image only",
        ),
    ],
)
def test_npz_bad_arrays(tmp_path, changes, message):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(ValueError, match=message) as error:
        data.load(f"npz:{path}")
    assert str(path) in str(error.value)


def test_npz_bad_files(tmp_path):
    path = tmp_path / "own.npz"
    with pytest.raises(data.DataError, match="there is no such file"):
        data.load(f"npz:{path}")
    np.savez(path, **arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    with pytest.raises(data.DataError, match="not a whole .npz file"):
        data.load(f"npz:{path}")
    path.write_bytes(whole[:200] + b"\xff" * 8 + whole[208:])
    with pytest.raises(data.DataError, match="not a whole .npz file"):
        data.load(f"npz:{path}")
    for content, what in (
        (b"label,pixel\n1,2\n", "text, which begins with 'label,pixel"),
        (pickle.dumps([1]), "a pickle, which is not read"),
        (gzip.compress(b"x"), "compressed by gzip"),
        (b"", "empty"),
        (bytes(range(1, 20)), "begins with the bytes 01 02"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=what) as error:
            data.load(f"npz:{path}")
        assert "allow_pickle" not in str(error.value)
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(ValueError, match="single array"):
        data.load(f"npz:{path}")


def test_command_line(tmp_path, use, capsys):
    write_files(tmp_path / "fashion-mnist")
    arguments = ["--cache-dir", str(tmp_path)]
    assert program.main(["fashion_mnist", *arguments]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["name", "cache", "MB", "sha256"]
    assert row.split()[:2] == ["fashion_mnist", "kept"] and "30 train + 10" in row
    # What cannot be had is a row too, and said at the end.
    assert program.main(["nothing", "digits", *arguments]) == 1
    out, err = capsys.readouterr()
    assert "nothing        missing" in out and "digits         not needed" in out
    assert "1,438 train" in out and "unknown data set name 'nothing'" in err
    use(folder="other")
    assert program.main(["fashion_mnist", "--allow-fallback", *arguments]) == 0
    assert "fall-back: fashion_mnist could not be had" in capsys.readouterr().out


def test_speech_that_cannot_be_had_has_a_stand_in(tmp_path, use, monkeypatch, capsys):
    def missing(cache_dir):
        raise fetch.DataError("no speech here")

    write_files(tmp_path / "fashion-mnist")
    monkeypatch.setitem(program.LOADERS, "festvox_ru", missing)
    arguments = ["festvox_ru", "--cache-dir", str(tmp_path)]
    assert program.main([*arguments, "--allow-fallback"]) == 0
    _, speech, images = capsys.readouterr().out.splitlines()
    assert "fashion_mnist stands in: no speech here" in speech
    assert images.split()[:2] == ["fashion_mnist", "kept"]
    assert program.main(arguments) == 1
    assert "error: festvox_ru: no speech here" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(program.LOADERS))
def test_the_command_line_loads_every_set(name, monkeypatch, capsys):
    made = fetch.DataSet(name, "somewhere", "0" * 64)
    monkeypatch.setattr(fetch.DataSet, "contents", lambda self: "7 things")
    monkeypatch.setitem(program.LOADERS, name, lambda cache_dir: made)
    assert program.main([name]) == 0
    assert "7 things, from somewhere" in capsys.readouterr().out


# --- Subsets, splits, statistics ---------------------------------------------------

LABELS = np.random.default_rng(5).permutation(np.repeat(np.arange(10), 60))


def test_subsets_are_nested_balanced_and_seeded():
    whole = splits.balanced_subset(LABELS, len(LABELS), seed=0)
    assert sorted(whole) == list(range(len(LABELS)))
    for n in (1, 7, 10, 100, 333, 599):
        subset = splits.balanced_subset(LABELS, n, seed=0, num_classes=10)
        np.testing.assert_array_equal(subset, whole[:n])
        counts = np.bincount(LABELS[subset], minlength=10)
        assert counts.max() - counts.min() <= 1
    other = splits.balanced_subset(LABELS, 100, seed=1)
    assert len(set(other) & set(whole[:100])) < 50


def test_subset_is_the_same_for_ever():
    # Stored results depend on it: a change must be meant.
    labels = np.arange(40) % 4
    assert splits.balanced_subset(labels, 6, seed=0).tolist() == [13, 11, 20, 2, 21, 18]
    train, val = splits.train_validation_split(
        labels, np.arange(40), fraction=0.1, seed=0
    )
    assert val.tolist() == [4, 5, 7, 10] and len(train) == 36


def test_unbalanced_classes_are_used_up():
    labels = np.repeat([0, 1, 2], [2, 30, 4])
    counts = np.bincount(labels[splits.balanced_subset(labels, 15, seed=0)])
    assert counts.tolist() == [2, 9, 4]


@pytest.mark.parametrize(
    ("labels", "n", "options", "error", "message"),
    [
        (LABELS, 601, {}, ValueError, "largest n is 600"),
        (LABELS, 0, {}, ValueError, "n must be at least 1, got 0"),
        (LABELS, 2.0, {}, TypeError, "n must be an integer, got 2.0"),
        (LABELS, True, {}, TypeError, "n must be an integer"),
        (LABELS, 5, {"seed": -1}, ValueError, "seed must be an integer >= 0"),
        (LABELS, 5, {"num_classes": 11}, ValueError, "absent: 10"),
        (LABELS, 5, {"num_classes": 9}, ValueError, "largest: 9"),
        (LABELS[:, None], 5, {}, ValueError, r"integers \[m\]"),
        (LABELS.astype(float), 5, {}, ValueError, r"integers \[m\]"),
        (-LABELS, 5, {}, ValueError, "none negative"),
        (LABELS[:0], 1, {}, ValueError, "at least one"),
    ],
)
def test_balanced_subset_bad_input(labels, n, options, error, message):
    with pytest.raises(error, match=message):
        splits.balanced_subset(labels, n, **{"seed": 0, **options})


def test_validation_split():
    indices = splits.balanced_subset(LABELS, 200, seed=0)
    train, val = splits.train_validation_split(LABELS, indices, fraction=0.1, seed=3)
    assert len(val) == 20 and set(np.bincount(LABELS[val])) == {2}
    assert not set(train) & set(val) and {*train, *val} == set(indices)
    np.testing.assert_array_equal(train, indices[np.isin(indices, train)])
    _, few = splits.train_validation_split(
        LABELS, indices, fraction=0.5, seed=3, maximum=20
    )
    np.testing.assert_array_equal(few, val)
    _, other = splits.train_validation_split(LABELS, indices, fraction=0.1, seed=4)
    assert set(other) != set(val)
    # Classes of different sizes give in proportion.
    labels = np.repeat([0, 1], [20, 80])
    _, val = splits.train_validation_split(labels, np.arange(100), fraction=0.2, seed=0)
    assert np.bincount(labels[val]).tolist() == [4, 16]


def test_validation_leaves_one_of_each_class():
    labels = np.repeat(np.arange(10), 2)
    train, val = splits.train_validation_split(
        labels, np.arange(20), fraction=0.9, seed=0
    )
    assert len(val) == 10 and set(labels[train]) == set(range(10))


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        ([0, 1, 1], {}, "distinct"),
        ([0, 600], {}, r"each in 0\.\.599"),
        ([-1], {}, r"each in 0\.\.599"),
        ([], {}, "integers"),
        ([0.0], {}, "integers"),
        ([0, 1], {"fraction": 0.0}, "fraction must be between 0 and 1, got 0.0"),
        ([0, 1], {"fraction": 1.0}, "fraction must be between"),
        ([0, 1], {"maximum": 0}, "maximum must be at least 1"),
        ([np.argmax(LABELS == c) for c in range(10)], {}, "none can be spared"),
    ],
)
def test_validation_split_bad_input(indices, options, message):
    options = {"fraction": 0.5, "seed": 0, **options}
    with pytest.raises(ValueError, match=message):
        splits.train_validation_split(LABELS, np.asarray(indices), **options)


def test_normalize_stats():
    images = np.random.default_rng(0).integers(0, 256, (1500, 3, 4, 3), np.uint8)
    images[..., 2] = 51
    mean, std = data.normalize_stats(images)
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std[:2], scaled.std((0, 1, 2))[:2], rtol=1e-6)
    assert std[2] == 1 and mean.dtype == std.dtype == np.float32
    for bad in (images / 255, images[0], images[:0]):
        with pytest.raises(ValueError, match="uint8"):
            data.normalize_stats(bad)


# --- What is made of data -----------------------------------------------------------


def test_what_is_made_of_data_is_made_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make(number: int) -> Callable[[], np.ndarray]:
        def one() -> np.ndarray:
            made.append(number)
            return np.full((3, 2), number, np.float32)

        return one

    fetch.kept("rows", "a" * 64, make(1))
    assert not list(tmp_path.rglob("*.npy")), "small ones are made every time"
    monkeypatch.setattr(fetch, "_WORTH_A_FILE", 1)
    for key, number, expected in [
        ("a" * 64, 2, 2),
        ("a" * 64, 3, 2),  # kept
        ("b" * 64, 4, 4),  # another key
        ("a" * 64, 5, 5),  # which has taken the place of the first
    ]:
        found = fetch.kept("rows", key, make(number))
        np.testing.assert_array_equal(found, np.full((3, 2), expected, np.float32))
        assert not found.flags.writeable
        assert len(list(tmp_path.rglob("*.npy"))) == 1
    assert made == [1, 2, 4, 5]
    (path,) = tmp_path.rglob("*.npy")
    whole = path.read_bytes()
    for broken in (whole[:-70], whole[:-65] + b"?" + whole[-64:], b""):
        path.write_bytes(broken)
        np.testing.assert_array_equal(fetch.kept("rows", "a" * 64, make(6))[0, 0], 6)
        path.write_bytes(whole)
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file: nothing can be kept
    np.testing.assert_array_equal(fetch.kept("rows", "a" * 64, make(7))[0, 0], 7)
