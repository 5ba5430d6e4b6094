"""Real image data: found or fetched once, checked by SHA-256, split reproducibly.

``python -m experiments.data.images`` (or ``make data``) fetches Fashion-MNIST and
says what it got; with the names ``brown``, ``festvox_ru``, ``wordnet``,
``melting_point`` or ``logp`` it fetches the sets of :mod:`experiments.data.text`,
:mod:`~experiments.data.speech`, :mod:`~experiments.data.graphs` and
:mod:`~experiments.data.molecules`. :func:`load` does the same for images on first
use. Fashion-MNIST is looked for in this order, and the
first complete and intact copy is used:

1. the folder named by the environment variable ``ATTN_DATA``;
2. the cache (``~/.cache/attn_jax``, or under ``XDG_CACHE_HOME``);
3. ``/usr/share/datasets/fashion-mnist``, where Debian's package installs it;
4. the public addresses of the data set (given up after a few seconds);
5. Debian's package, downloaded and unpacked into the cache without root.

CIFAR-10 and CIFAR-100 follow the same order without 3 and 5. All images are uint8
``[n, H, W, C]``, all labels int32 ``[n]`` in ``0..classes-1``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import os
import pathlib
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from attn_jax._program import program
from experiments.data.fetch import (
    DataError,
    Files,
    default_cache_dir,
    first_few,
    obtain,
)

__all__ = [
    "DataError",
    "Dataset",
    "balanced_subset",
    "default_cache_dir",
    "load",
    "normalize_stats",
    "random_bits",
    "read_idx",
    "split_ends",
    "train_validation_split",
]

NAMES = ("fashion_mnist", "cifar10", "cifar100", "digits")
# No images: for the command line only; and what loads them.
_LOADERS = {
    "brown": "text.load_brown",
    "festvox_ru": "speech.load_festvox_ru",
    "wordnet": "graphs.load_wordnet",
    "melting_point": "molecules.load_molecules",
    "logp": "molecules.load_molecules",
}
OTHER_NAMES = tuple(_LOADERS)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image set in memory.

    Attributes:
      name: what :func:`load` was asked for (of the data really held).
      source: the file, folder, address or package that the data came from.
      train_images: uint8 [n, H, W, C].
      train_labels: int32 [n], in ``0..num_classes-1``.
      test_images: uint8 [m, H, W, C].
      test_labels: int32 [m].
      class_names: one name a class.
      sha256: hash of the four arrays, so the same data from another source agrees.
    """

    name: str
    source: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    sha256: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(H, W, C)`` of one image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    def describe(self) -> str:
        """One line: which data, from where, how many, classes, hash."""
        size = "x".join(map(str, self.image_shape))
        return (
            f"{self.name}: {len(self.train_labels):,} train + "
            f"{len(self.test_labels):,} test images of {size}, "
            f"{self.num_classes} classes, sha256 {self.sha256[:16]}, from {self.source}"
        )


FASHION_MNIST = Files(
    title="Fashion-MNIST",
    folder="fashion-mnist",
    sha256={
        "train-images-idx3-ubyte.gz": (
            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
        ),
        "train-labels-idx1-ubyte.gz": (
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
        ),
    },
    addresses=(
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    other_folders=("fashion_mnist", "FashionMNIST/raw", "."),
    installed=("/usr/share/datasets/fashion-mnist",),
    package="dataset-fashion-mnist",
)
CIFAR10 = Files(
    title="CIFAR-10",
    folder="cifar10",
    sha256={
        "cifar-10-binary.tar.gz": (
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
        )
    },
    addresses=("https://www.cs.toronto.edu/~kriz/",),
    other_folders=(".",),
)
CIFAR100 = Files(
    title="CIFAR-100",
    folder="cifar100",
    sha256={
        "cifar-100-binary.tar.gz": (
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
        )
    },
    addresses=("https://www.cs.toronto.edu/~kriz/",),
    other_folders=(".",),
)
_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


# --- Loading -----------------------------------------------------------------------


def load(
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    allow_fallback: bool = False,
) -> Dataset:
    """Load a data set by name, fetching it into the cache where that is needed.

    Args:
      name: ``fashion_mnist``, ``cifar10``, ``cifar100``, ``digits`` (comes with
        scikit-learn, no download), or ``npz:PATH`` for a file with the arrays
        ``train_images`` (uint8 [n, H, W, C] or [n, H, W]) and ``train_labels``
        (integers [n]), and optionally ``test_images`` with ``test_labels``, and
        ``class_names``. Without test arrays a sixth of each class is set aside.
      cache_dir: where downloads are kept; by default :func:`default_cache_dir`.
      allow_fallback: use ``digits``, with a warning on stderr, where the named set
        cannot be had.

    Returns:
      The data in memory.

    Raises:
      ValueError: the name is unknown, or the arrays of an npz file do not fit.
      DataError: the data cannot be had, is corrupt, or cannot be stored.
    """
    cache = pathlib.Path(cache_dir) if cache_dir is not None else default_cache_dir()
    try:
        if name == "fashion_mnist":
            return _load_fashion_mnist(FASHION_MNIST, cache)
        if name == "cifar10":
            return _load_cifar(CIFAR10, cache, coarse_bytes=0)
        if name == "cifar100":
            return _load_cifar(CIFAR100, cache, coarse_bytes=1)
    except DataError as error:
        if not allow_fallback:
            raise
        print(
            f"WARNING: {name} cannot be had; using scikit-learn's digits INSTEAD, a "
            f"much smaller and easier set. Numbers are not comparable. Why:\n{error}",
            file=sys.stderr,
        )
        return _load_digits(f" (fall-back: {name} could not be had)")
    if name == "digits":
        return _load_digits()
    if name.startswith("npz:"):
        return _load_npz(pathlib.Path(name.removeprefix("npz:")).expanduser())
    if name in OTHER_NAMES:
        raise ValueError(
            f"{name!r} is not a set of images: load it with "
            f"experiments.data.{_LOADERS[name]}"
        )
    raise ValueError(
        f"unknown data set name {name!r}: known are {', '.join(NAMES)}, "
        "and npz:PATH for a file of your own; on the command line also "
        f"{' and '.join(OTHER_NAMES)}"
    )


def _load_fashion_mnist(files: Files, cache: pathlib.Path) -> Dataset:
    folder, source = obtain(files, cache)
    arrays = [
        read_idx(folder / f"{split}-{kind}-ubyte.gz")
        for split in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    images, labels, test_images, test_labels = arrays
    return _dataset(
        "fashion_mnist",
        source,
        images[..., None],
        labels,
        test_images[..., None],
        test_labels,
        _FASHION_CLASSES,
    )


def _load_cifar(files: Files, cache: pathlib.Path, *, coarse_bytes: int) -> Dataset:
    folder, source = obtain(files, cache)
    (archive,) = (folder / name for name in files.sha256)
    members = _tar_members(archive)
    if coarse_bytes:
        train, test, names = ["train.bin"], "test.bin", "fine_label_names.txt"
    else:
        train = [f"data_batch_{i}.bin" for i in range(1, 6)]
        test, names = "test_batch.bin", "batches.meta.txt"
    missing = [name for name in (*train, test, names) if name not in members]
    if missing:
        raise DataError(
            f"{archive} holds no {', '.join(missing)}: it is not the binary version "
            f"of {files.title}. Get {files.addresses[0]}{archive.name}"
        )
    classes = tuple(members[names].decode().split())
    parts = [
        _cifar_records(members[name], f"{name} in {archive}", coarse_bytes, classes)
        for name in (*train, test)
    ]
    images = np.concatenate([part[0] for part in parts[:-1]])
    labels = np.concatenate([part[1] for part in parts[:-1]])
    name = "cifar100" if coarse_bytes else "cifar10"
    return _dataset(name, source, images, labels, *parts[-1], classes)


def _tar_members(archive: pathlib.Path) -> dict[str, bytes]:
    """Read the small binary files of an archive into memory, by bare name."""
    members = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isfile() else None
                if stream is not None:
                    members[pathlib.PurePosixPath(member.name).name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{archive} is not a whole .tar.gz archive ({error}): remove it and fetch "
            "it again"
        ) from error
    return members


def _cifar_records(
    data: bytes, where: str, coarse_bytes: int, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    record = coarse_bytes + 1 + 3 * 32 * 32
    if not data or len(data) % record:
        raise DataError(
            f"{where} has {len(data):,} bytes, which is not a multiple of {record:,} "
            "(labels and 3 x 32 x 32 pixels): the file is truncated, fetch it again"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    labels = rows[:, coarse_bytes]
    if labels.max() >= len(classes):
        raise DataError(
            f"{where} has label {labels.max()}, but there are {len(classes)} classes"
        )
    images = rows[:, coarse_bytes + 1 :].reshape(-1, 3, 32, 32)
    return images.transpose(0, 2, 3, 1), labels


def _load_digits(note: str = "") -> Dataset:
    try:
        import sklearn
        import sklearn.datasets
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: install the "
            "extra 'experiments'"
        ) from error
    bunch = sklearn.datasets.load_digits()
    # Sixteen grey levels 0..16, spread over the whole range of uint8.
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    train, test = train_validation_split(
        labels, np.arange(len(labels)), fraction=1 / 5, seed=0
    )
    return _dataset(
        "digits",
        f"scikit-learn {sklearn.__version__}, a fifth of each class as test set{note}",
        images[train],
        labels[train],
        images[test],
        labels[test],
        tuple(map(str, range(10))),
    )


def _load_npz(path: pathlib.Path) -> Dataset:
    if not path.is_file():
        raise DataError(f"npz:{path}: there is no such file")
    known = {
        "train_images",
        "train_labels",
        "test_images",
        "test_labels",
        "class_names",
    }
    try:
        with path.open("rb") as stream:
            _check_npz(path, stream.read(16))
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                unknown = sorted(set(file.files) - known)
                found = {
                    name: _plain_array(path, name, file)
                    for name in file.files
                    if name in known
                }
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{path} is not a whole .npz file ({error}): it was cut short or damaged; "
            "copy it again, or write it again with numpy.savez_compressed"
        ) from error
    for needed in ("train_images", "train_labels"):
        if needed not in found:
            raise ValueError(
                f"{path} has no array {needed!r} (it has "
                f"{sorted([*found, *unknown])}); needed are train_images and "
                "train_labels, optional are test_images, test_labels, class_names"
            )
    if unknown:
        raise ValueError(
            f"{path} has arrays that are not used: {unknown}; allowed are "
            f"{sorted(known)}"
        )
    if ("test_images" in found) != ("test_labels" in found):
        raise ValueError(
            f"{path} has only one of test_images and test_labels: give both, or "
            "neither and a test set is cut from the training images"
        )
    images, labels = _check_arrays(path, found, "train")
    names = _npz_class_names(path, found.get("class_names"), labels)
    source = str(path)
    if "test_images" in found:
        test_images, test_labels = _check_arrays(path, found, "test")
        if test_images.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"{path}: test_images are {test_images.shape[1:]} each, train_images "
                f"are {images.shape[1:]}; they must agree"
            )
        if test_labels.max() >= len(names):
            raise ValueError(
                f"{path}: test_labels has class {test_labels.max()}, but the training "
                f"labels have only 0..{len(names) - 1}"
            )
    else:
        if np.bincount(labels).min() < 2:
            raise ValueError(
                f"{path} has no test set and class {np.bincount(labels).argmin()} has "
                "one image only: add test_images and test_labels, or more images"
            )
        train, test = train_validation_split(
            labels, np.arange(len(labels)), fraction=1 / 6, seed=0
        )
        test_images, test_labels = images[test], labels[test]
        images, labels = images[train], labels[train]
        source += " (no test set inside: a sixth of each class was set aside for it)"
    return _dataset(
        f"npz:{path.name}", source, images, labels, test_images, test_labels, names
    )


def _check_npz(path: pathlib.Path, begins: bytes) -> None:
    """Raises ValueError, which says what the file seems to be, unless it is a zip."""
    if begins[:2] == b"PK":
        return
    if begins.startswith(b"\x93NUMPY"):
        what = "a single array (.npy)"
    elif begins[:1] == b"\x80":
        what = "a pickle, which is not read because it may run code"
    elif begins[:2] == b"\x1f\x8b":
        what = "compressed by gzip"
    elif not begins:
        what = "empty"
    elif all(32 <= byte < 127 or byte in b"\t\r\n" for byte in begins):
        what = f"text, which begins with {begins.decode()!r}"
    else:
        what = f"another format, which begins with the bytes {begins[:8].hex(' ')}"
    raise ValueError(
        f"{path} is not an .npz file but {what}: write one with "
        "numpy.savez_compressed(path, train_images=..., train_labels=...)"
    )


def _plain_array(
    path: pathlib.Path, name: str, file: Mapping[str, np.ndarray]
) -> np.ndarray:
    try:
        return file[name]
    except ValueError as error:
        if "pickle" not in str(error) and "Object" not in str(error):
            raise DataError(
                f"{path}: the array {name!r} is damaged ({error}); write it again with "
                "numpy.savez_compressed"
            ) from error
        raise ValueError(
            f"{path}: the array {name!r} holds Python objects (dtype object), which "
            "are pickled and not read because they may run code: write it as an array "
            "of numbers, such as numpy.asarray(images, numpy.uint8)"
        ) from error


def _check_arrays(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], split: str
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if images.dtype != np.uint8:
        raise ValueError(
            f"{path}: {split}_images has dtype {images.dtype}, uint8 in 0..255 is "
            "needed; floats in 0..1 become that by (255 * x).round().astype('uint8')"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or 0 in images.shape:
        raise ValueError(
            f"{path}: {split}_images has shape {images.shape}, needed is [n, H, W] or "
            "[n, H, W, C] with n, H, W >= 1 and C = 1, 3 or 4 (channels last)"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: {split}_labels has dtype {labels.dtype}, integers are needed"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: {split}_labels has shape {labels.shape}, needed is "
            f"({len(images)},), one label for each image"
        )
    if labels.min() < 0:
        raise ValueError(
            f"{path}: {split}_labels has the label {labels.min()}; labels must be "
            "0..classes-1"
        )
    return images, labels


def _npz_class_names(
    path: pathlib.Path, names: np.ndarray | None, labels: np.ndarray
) -> tuple[str, ...]:
    present = np.unique(labels)
    count = int(present[-1]) + 1
    if names is not None:
        if names.ndim != 1 or names.dtype.kind != "U" or len(names) < count:
            raise ValueError(
                f"{path}: class_names must be a list of at least {count} strings (the "
                f"highest label is {count - 1}), got {names.dtype} {names.shape}"
            )
        count = len(names)
    if len(present) != count:
        expected = range(min(count, 100_000))
        missing = first_few(sorted(set(expected) - set(present.tolist())))
        raise ValueError(
            f"{path}: train_labels run to class {count - 1}, but no training image has "
            f"the label {missing}; renumber the classes to 0..classes-1"
        )
    if count < 2:
        raise ValueError(f"{path}: train_labels has one class only, two are needed")
    return tuple(names.tolist() if names is not None else map(str, range(count)))


def _dataset(
    name: str,
    source: str,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    class_names: tuple[str, ...],
) -> Dataset:
    train_images = np.ascontiguousarray(train_images, np.uint8)
    train_labels = np.ascontiguousarray(train_labels, np.int32)
    test_images = np.ascontiguousarray(test_images, np.uint8)
    test_labels = np.ascontiguousarray(test_labels, np.int32)
    digest = hashlib.sha256()
    for array in (train_images, train_labels, test_images, test_labels):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data.cast("B"))
        array.flags.writeable = False
    return Dataset(
        name=name,
        source=source,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=class_names,
        sha256=digest.hexdigest(),
    )


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes (the format of MNIST).

    Args:
      path: the file.

    Returns:
      uint8 array of the shape that the file's header names.

    Raises:
      DataError: the file is not gzip, is cut short, or is not IDX.
    """
    path = pathlib.Path(path)
    again = "remove it and fetch it again"
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file ({error}): {again}"
        ) from error
    rank = data[3] if len(data) >= 4 else 0
    if data[:3] != b"\x00\x00\x08" or rank == 0 or len(data) < 4 + 4 * rank:
        raise DataError(
            f"{path} does not start like an IDX file of bytes (00 00 08 rank), but "
            f"with {data[:4].hex(' ') or 'nothing'}: {again}"
        )
    shape = struct.unpack_from(f">{rank}I", data, 4)
    expected, got = int(np.prod(shape, dtype=object)), len(data) - 4 - 4 * rank
    if expected != got:
        raise DataError(
            f"{path} should hold {expected:,} bytes of data for shape {shape}, got "
            f"{got:,}: {again}"
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


# --- Subsets and splits ------------------------------------------------------------


def balanced_subset(
    labels: np.ndarray, n: int, *, seed: int, num_classes: int | None = None
) -> np.ndarray:
    """Choose n examples, as many of each class as of any other, nested in n.

    The result for a smaller n and the same seed is the beginning of the result for a
    larger one. Class counts differ by at most 1, until a class is used up whole.

    Args:
      labels: integers [m] in ``0..num_classes-1``.
      n: how many, ``1 <= n <= m``.
      seed: another seed gives another subset.
      num_classes: classes that must occur; by default those that do.

    Returns:
      int64 [n], distinct indices into ``labels``.

    Raises:
      ValueError: n is out of range, or a class is absent.

    >>> labels = np.array([0, 0, 0, 1, 1, 1])
    >>> np.bincount(labels[balanced_subset(labels, 4, seed=0)]).tolist()
    [2, 2]
    """
    labels = _check_labels(labels)
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"n must be an integer, got {n!r}")
    if not 1 <= n <= len(labels):
        raise ValueError(
            f"n={n} is out of range: there are {len(labels)} examples, so the largest "
            f"n is {len(labels)} and the smallest 1"
        )
    if num_classes is not None:
        absent = sorted(set(range(num_classes)) - set(np.unique(labels).tolist()))
        if absent or labels.max() >= num_classes:
            raise ValueError(
                f"labels must hold all classes 0..{num_classes - 1} and no others; "
                f"absent: {first_few(absent) or 'none'}, largest: {labels.max()}"
            )
    rank, _, tie = _class_ranks(labels, seed, stream=0)
    return np.lexsort((tie, rank))[:n]


def train_validation_split(
    labels: np.ndarray,
    indices: np.ndarray,
    *,
    fraction: float,
    seed: int,
    maximum: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a validation set from a training subset, in proportion from every class.

    Args:
      labels: integers [m] of the whole training set.
      indices: distinct integers [n] into ``labels``: the subset to split.
      fraction: share that goes to validation, ``0 < fraction < 1``. It takes
        ``round(fraction * n)`` examples, at least 1; but each class keeps one
        training example at least, so very small subsets may give fewer.
      seed: another seed gives another split.
      maximum: most validation examples to take.

    Returns:
      ``(train, validation)``, disjoint, together ``indices``, each in its order.

    Raises:
      ValueError: an argument is out of range, or no class has two examples.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    >>> train, val = train_validation_split(
    ...     labels, np.arange(8), fraction=0.25, seed=0)
    >>> labels[train].tolist(), labels[val].tolist()
    ([0, 0, 0, 1, 1, 1], [0, 1])
    """
    labels = _check_labels(labels)
    indices = np.asarray(indices)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"indices must be integers [n], got {indices.dtype} {indices.shape}"
        )
    if not len(indices) or indices.min() < 0 or indices.max() >= len(labels):
        raise ValueError(
            f"indices must be at least one index, each in 0..{len(labels) - 1}"
        )
    if len(np.unique(indices)) != len(indices):
        raise ValueError("indices must be distinct, some occur twice")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction!r}")
    if maximum is not None and maximum < 1:
        raise ValueError(f"maximum must be at least 1, got {maximum!r}")
    rank, size, tie = _class_ranks(labels[indices], seed, stream=1)
    wanted = max(1, round(fraction * len(indices)))
    if maximum is not None:
        wanted = min(wanted, maximum)
    # Taking the smallest (rank + u) / size draws all classes at their own pace.
    uniform = (tie >> np.uint64(11)).astype(np.float64) * 2.0**-53
    order = np.argsort((rank + uniform) / size, kind="stable")
    order = order[(rank < size - 1)[order]][:wanted]
    if not len(order):
        raise ValueError(
            f"the {len(indices)} examples have no class with two examples, so none can "
            "be spared for validation: use a larger subset"
        )
    chosen = np.zeros(len(indices), bool)
    chosen[order] = True
    return indices[~chosen], indices[chosen]


def random_bits(seed: int, stream: int) -> np.random.PCG64:
    """Generator whose raw output splits are drawn from.

    numpy keeps ``random_raw`` the same for ever, which it does not promise for
    ``permutation`` and its like.

    Args:
      seed: another seed gives another split.
      stream: one number a use, so that uses with the same seed are independent.

    Returns:
      A fresh generator.

    Raises:
      ValueError: the seed is not an integer of 0 or more.

    >>> random_bits(0, 1).random_raw() == random_bits(0, 1).random_raw()
    True
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
    return np.random.PCG64(np.random.SeedSequence([int(seed), stream]))


def split_ends(fractions: Sequence[float], n: int) -> np.ndarray:
    """Where training, validation and test end when n things in a row are split.

    Args:
      fractions: three shares, of sum 1.
      n: how many things.

    Returns:
      int64 [3], the last one n.

    Raises:
      ValueError: the fractions are not that, or a part would be empty.

    >>> split_ends((0.8, 0.1, 0.1), 500).tolist()
    [400, 450, 500]
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"fractions must be three positive numbers of sum 1, got {fractions!r}"
        )
    ends = np.rint(np.cumsum(fractions) * n).astype(np.int64)
    if np.diff(ends, prepend=0).min() < 1:
        raise ValueError(
            f"fractions {fractions!r} of n={n} leave training, validation or test "
            "without any"
        )
    return ends


def normalize_stats(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, of pixels scaled to 0..1.

    They are for ``(images / 255 - mean) / std``, and exact (from histograms).
    A constant channel gets ``std = 1``.

    Args:
      images: uint8 [n, H, W, C].

    Returns:
      ``(mean, std)``, float32 [C] each.

    Raises:
      ValueError: images are not uint8 of rank 4, or there are none.

    >>> mean, std = normalize_stats(np.array([0, 255], np.uint8).reshape(1, 2, 1, 1))
    >>> mean.tolist(), std.tolist()
    ([0.5], [0.5])
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
        raise ValueError(
            f"images must be uint8 [n, H, W, C] and not empty, got {images.dtype} "
            f"{images.shape}"
        )
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), 1024):
        for c in range(channels):
            pixels = images[start : start + 1024, ..., c].ravel()
            counts[c] += np.bincount(pixels, minlength=256)
    total = counts[0].sum()
    values = np.arange(256) / 255
    mean = counts @ values / total
    variance = (counts * np.square(values - mean[:, None])).sum(1) / total
    std = np.where((counts > 0).sum(1) > 1, np.sqrt(variance), 1.0)
    return mean.astype(np.float32), std.astype(np.float32)


def _check_labels(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [m], got {labels.dtype} {labels.shape}"
        )
    if not len(labels) or labels.min() < 0:
        raise ValueError("labels must be at least one, and none negative")
    return labels


def _class_ranks(
    labels: np.ndarray, seed: int, *, stream: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shuffle each class: place within it, its size, and a random tie-breaker."""
    bits = random_bits(seed, stream)
    shuffle, tie = bits.random_raw(2 * len(labels)).reshape(2, -1)
    order = np.lexsort((shuffle, labels))
    _, first, inverse, counts = np.unique(
        labels[order], return_index=True, return_inverse=True, return_counts=True
    )
    rank, size = np.empty(len(labels), np.int64), np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - first[inverse]
    size[order] = counts[inverse]
    return rank, size, tie


# --- Command line ------------------------------------------------------------------


@program
@program
def main(argv: Sequence[str] | None = None) -> int:
    """Fetch and describe data sets; 0 when all are there."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data.images",
        description="Fetch data sets into the cache, check them and say what they are.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        default=["fashion_mnist"],
        metavar="NAME",
        help=f"{', '.join((*NAMES, *OTHER_NAMES))} or npz:PATH "
        "(default: fashion_mnist)",
    )
    parser.add_argument(
        "--cache-dir",
        type=pathlib.Path,
        help=f"where downloads are kept (default: {default_cache_dir()})",
    )
    parser.add_argument(
        "--allow-fallback",
        action="store_true",
        help="use scikit-learn's digits for a set that cannot be had",
    )
    options = parser.parse_args(argv)
    failed = False
    for name in options.names:
        began = time.perf_counter()
        try:
            line = _describe(name, options.cache_dir, options.allow_fallback)
        except (DataError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{line} ({time.perf_counter() - began:.1f} s)")
    return 1 if failed else 0


def _describe(name: str, cache_dir: pathlib.Path | None, allow_fallback: bool) -> str:
    """Load any set, images or not, and say what it is."""
    if name == "brown":
        from experiments.data.text import load_brown

        return load_brown(cache_dir).describe()
    if name == "festvox_ru":
        from experiments.data.speech import load_festvox_ru

        return load_festvox_ru(cache_dir).describe()
    if name == "wordnet":
        from experiments.data.graphs import load_wordnet

        return load_wordnet(cache_dir).describe()
    if name in ("melting_point", "logp"):
        from experiments.data.molecules import load_molecules

        task: Literal["melting_point", "logp"]
        task = "logp" if name == "logp" else "melting_point"
        return load_molecules(task, cache_dir).describe()
    return load(name, cache_dir=cache_dir, allow_fallback=allow_fallback).describe()


if __name__ == "__main__":
    sys.exit(main())
