"""Images with a class each: Fashion-MNIST, CIFAR, digits, and a file of your own.

:func:`load` finds or fetches a set; see :mod:`experiments.data.fetch` for where it is
looked for. All images are uint8 ``[n, H, W, C]``, all labels int32 ``[n]`` in
``0..classes-1``.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import os
import pathlib
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.data.fetch import (
    DataError,
    DataSet,
    Files,
    first_few,
    obtain,
    obtain_file,
    read_archive,
    seal,
)
from experiments.data.splits import balanced_subset, train_validation_split
from experiments.data.symbols import Fold, SymbolData

NAMES = ("fashion_mnist", "cifar10", "cifar100", "digits")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset(DataSet):
    """A labelled image set in memory.

    Attributes:
      train_images: uint8 [n, H, W, C].
      train_labels: int32 [n], in ``0..num_classes-1``.
      test_images: uint8 [m, H, W, C].
      test_labels: int32 [m].
      class_names: one name a class.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(H, W, C)`` of one image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    def contents(self) -> str:
        """How many images of which size, of how many classes."""
        size = "x".join(map(str, self.image_shape))
        return (
            f"{len(self.train_labels):,} train + {len(self.test_labels):,} test images "
            f"of {size}, {self.num_classes} classes"
        )


FASHION_MNIST = Files(
    title="Fashion-MNIST",
    name="fashion_mnist",
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
    installed="/usr/share/datasets/fashion-mnist",
    package="dataset-fashion-mnist",
)
CIFAR10 = Files(
    title="CIFAR-10",
    name="cifar10",
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
    name="cifar100",
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
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
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
      cache_dir: where downloads are kept; by default in ``~/.cache/attn_jax``.
      allow_fallback: use ``digits``, with a warning on stderr, where the named set
        cannot be had.

    Raises:
      ValueError: the name is unknown, or the arrays of an npz file do not fit.
      DataError: the data cannot be had, is corrupt, or cannot be stored.
    """
    try:
        if name == "fashion_mnist":
            return _load_fashion_mnist(cache_dir)
        if name in ("cifar10", "cifar100"):
            return _load_cifar(CIFAR10 if name == "cifar10" else CIFAR100, cache_dir)
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
    raise ValueError(
        f"unknown data set name {name!r}: sets of images are {', '.join(NAMES)}, and "
        "npz:PATH for a file of your own"
    )


def _load_fashion_mnist(cache_dir: str | os.PathLike[str] | None) -> Dataset:
    folder, source = obtain(FASHION_MNIST, cache_dir)
    train, test = (
        (
            read_idx(folder / f"{split}-images-idx3-ubyte.gz")[..., None],
            read_idx(folder / f"{split}-labels-idx1-ubyte.gz"),
        )
        for split in ("train", "t10k")
    )
    return _dataset("fashion_mnist", source, train, test, _FASHION_CLASSES)


def _load_cifar(files: Files, cache_dir: str | os.PathLike[str] | None) -> Dataset:
    archive, source = obtain_file(files, cache_dir)
    found = read_archive(archive)
    members = {path.rpartition("/")[2]: data for path, data in found.items()}
    coarse_bytes = int(files.name == "cifar100")
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
    images, labels = map(np.concatenate, zip(*parts[:-1], strict=True))
    return _dataset(files.name, source, (images, labels), parts[-1], classes)


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
        (images[train], labels[train]),
        (images[test], labels[test]),
        tuple(map(str, range(10))),
    )


Part = tuple[np.ndarray, np.ndarray]  # images and labels

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
_BEGINNINGS = {
    b"\x93NUMPY": "a single array (.npy)",
    b"\x80": "a pickle, which is not read because it may run code",
    b"\x1f\x8b": "compressed by gzip",
}


def _load_npz(path: pathlib.Path) -> Dataset:
    if not path.is_file():
        raise DataError(f"npz:{path}: there is no such file")
    try:
        with path.open("rb") as stream:
            _need_zip(stream.read(16))
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                found = {name: _plain_array(name, file) for name in file.files}
        train, names = _npz_part(found, "train"), found.get("class_names")
        classes = _npz_classes(names, train[1])
        source = str(path)
        if "test_images" in found or "test_labels" in found:
            test = _npz_part(found, "test")
            shapes = [part[0].shape[1:] for part in (test, train)]
            _need(
                shapes[0] == shapes[1],
                f"test_images are {shapes[0]} each, train_images are {shapes[1]}; they "
                "must agree",
            )
            _need(
                test[1].max() < len(classes),
                f"test_labels has class {test[1].max()}, but the training labels have "
                f"only 0..{len(classes) - 1}",
            )
        else:
            train, test = _spare(*train)
            source += " (no test set inside: a sixth of each class was set aside)"
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{path} is not a whole .npz file ({error}): it was cut short or damaged; "
            "copy it again, or write it again with numpy.savez_compressed"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _dataset(f"npz:{path.name}", source, train, test, classes)


def _need(truth: bool, otherwise: str) -> None:
    if not truth:
        raise ValueError(otherwise)


def _need_zip(begins: bytes) -> None:
    """Raises ValueError, which says what the file seems to be, unless it is a zip."""
    told = [what for start, what in _BEGINNINGS.items() if begins.startswith(start)]
    if told:
        what = told[0]
    elif not begins:
        what = "empty"
    elif all(32 <= byte < 127 or byte in b"\t\r\n" for byte in begins):
        what = f"text, which begins with {begins.decode()!r}"
    else:
        what = f"another format, which begins with the bytes {begins[:8].hex(' ')}"
    _need(
        begins[:2] == b"PK",
        f"it is not an .npz file but {what}: write one with "
        "numpy.savez_compressed(path, train_images=..., train_labels=...)",
    )


def _plain_array(name: str, file: Mapping[str, np.ndarray]) -> np.ndarray:
    try:
        return file[name]
    except ValueError as error:
        if "pickle" not in str(error) and "Object" not in str(error):
            raise OSError(f"the array {name!r}: {error}") from error
        raise ValueError(
            f"the array {name!r} holds Python objects (dtype object), which are "
            "pickled and not read because they may run code: write it as an array of "
            "numbers, such as numpy.asarray(images, numpy.uint8)"
        ) from error


def _npz_part(arrays: Mapping[str, np.ndarray], split: str) -> Part:
    """Images and labels of a split, checked."""
    unknown = sorted(set(arrays) - set(_ARRAYS))
    _need(not unknown, f"arrays that are not used: {unknown}; allowed are {_ARRAYS}")
    for kind in ("images", "labels"):
        _need(
            f"{split}_{kind}" in arrays,
            f"it has no array '{split}_{kind}' (it has {sorted(arrays)}); needed are "
            "train_images and train_labels, optional are class_names, and both of "
            "test_images and test_labels: without them a test set is cut from the "
            "training images",
        )
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    images = images[..., None] if images.ndim == 3 else images
    _need(
        images.dtype == np.uint8,
        f"{split}_images has dtype {images.dtype}, uint8 in 0..255 is needed; floats "
        "in 0..1 become that by (255 * x).round().astype('uint8')",
    )
    _need(
        images.ndim == 4 and images.shape[-1] in (1, 3, 4) and 0 not in images.shape,
        f"{split}_images has shape {images.shape}, needed is [n, H, W] or [n, H, W, C] "
        "with n, H, W >= 1 and C = 1, 3 or 4 (channels last)",
    )
    _need(
        np.issubdtype(labels.dtype, np.integer) and labels.shape == images.shape[:1],
        f"{split}_labels has dtype {labels.dtype} and shape {labels.shape}, needed are "
        f"integers of shape ({len(images)},), one label for each image",
    )
    _need(
        labels.min() >= 0,
        f"{split}_labels has the label {labels.min()}; labels must be 0..classes-1",
    )
    return images, labels


def _npz_classes(names: np.ndarray | None, labels: np.ndarray) -> tuple[str, ...]:
    present = set(np.unique(labels).tolist())
    count = max(present) + 1
    if names is not None:
        _need(
            names.ndim == 1 and names.dtype.kind == "U" and len(names) >= count,
            f"class_names must be a list of at least {count} strings (the highest "
            f"label is {count - 1}), got {names.dtype} {names.shape}",
        )
        count = len(names)
    missing = first_few(sorted(set(range(min(count, 100_000))) - present))
    _need(
        len(present) == count,
        f"train_labels run to class {count - 1}, but no training image has the label "
        f"{missing}; renumber the classes to 0..classes-1",
    )
    _need(count >= 2, "train_labels has one class only, two are needed")
    return tuple(names.tolist() if names is not None else map(str, range(count)))


def _spare(images: np.ndarray, labels: np.ndarray) -> tuple[Part, Part]:
    """A sixth of each class as test set."""
    counts = np.bincount(labels)
    _need(
        counts.min() >= 2,
        f"it has no test set and class {counts.argmin()} has one image only: add "
        "test_images and test_labels, or more images",
    )
    whole = np.arange(len(labels))
    parts = train_validation_split(labels, whole, fraction=1 / 6, seed=0)
    train, test = ((images[part], labels[part]) for part in parts)
    return train, test


def _dataset(
    name: str, source: str, train: Part, test: Part, class_names: tuple[str, ...]
) -> Dataset:
    images, test_images = (np.ascontiguousarray(x, np.uint8) for x, _ in (train, test))
    labels, test_labels = (np.ascontiguousarray(y, np.int32) for _, y in (train, test))
    digest = seal(images, labels, test_images, test_labels)
    return Dataset(
        name, source, digest, images, labels, test_images, test_labels, class_names
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


def pixels(dataset: Dataset, sizes: Sequence[int], *, seed: int = 0) -> SymbolData:
    """Images as sequences of grey levels, row by row.

    Args:
      dataset: the images; colours become grey, .299 R + .587 G + .114 B.
      sizes: images for training and validation, which are cut from the training part,
        and for the test; of each as many of every class.
      seed: of the choice.

    Raises:
      ValueError: a part has fewer images.

    >>> data = pixels(load("digits"), (90, 30, 40))
    >>> data.train.inputs.shape, data.grid
    ((90, 64), (8, 8))
    """
    labels, classes = dataset.train_labels, dataset.num_classes
    chosen = balanced_subset(labels, sizes[0] + sizes[1], seed=seed)
    tested = balanced_subset(dataset.test_labels, sizes[2], seed=seed)

    def part(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Fold:
        some = images[rows]
        if some.shape[-1] == 3:
            some = np.rint(some @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
        return Fold.of(np.ascontiguousarray(some.reshape(len(rows), -1)), labels[rows])

    train, validation = (
        part(dataset.train_images, labels, rows)
        for rows in (chosen[: sizes[0]], chosen[sizes[0] :])
    )
    test = part(dataset.test_images, dataset.test_labels, tested)
    height, width, _ = dataset.image_shape
    return SymbolData(
        f"image_{dataset.name}",
        dataset.source,
        seal(*train, *validation, *test),
        256,
        classes,
        train,
        validation,
        test,
        grid=(height, width),
    )


def pack(images: np.ndarray) -> str:
    """Images, 0 to 255 of any shape, as a text that a record holds, for `unpack`.

    >>> unpack(pack(np.arange(12).reshape(3, 2, 2)), (-1, 2, 2))[2].tolist()
    [[8, 9], [10, 11]]
    """
    return base64.b64encode(
        zlib.compress(images.astype(np.uint8).tobytes(), 9)
    ).decode()


def unpack(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The images uint8 that `pack` was given; one side of the shape may be −1."""
    flat = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return flat.reshape(shape)
