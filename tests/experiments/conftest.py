"""Data and models so small that a run takes a second."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from attn_jax.models import SIZES
from experiments.data.images import Dataset

TINY = {
    "vit": dict(patch=4, dim=8, depth=1, num_heads=2, mlp_dim=16),
    "resnet": dict(widths=(4,), depths=(1,), stem_stride=2),
    "hybrid": dict(stem_widths=(4, 8), dim=8, depth=1, num_heads=2, mlp_dim=16),
    "mlp": dict(hidden_dims=(16,)),
}


def _arrays(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, with a bright quarter that says the class."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 3).astype(np.int32)
    images = rng.integers(0, 120, (count, 8, 8, 1))
    for label, (row, column) in enumerate([(0, 0), (0, 4), (4, 0)]):
        images[labels == label, row : row + 4, column : column + 4] += 100
    return images.astype(np.uint8), labels


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """90 + 30 images of 8 x 8 pixels in 3 classes."""
    images, labels = _arrays(90, 0)
    test_images, test_labels = _arrays(30, 1)
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    return Dataset(
        name="toy",
        source="the tests",
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=("a", "b", "c"),
        sha256=digest,
    )


@pytest.fixture(scope="session")
def npz(dataset, tmp_path_factory):
    """The same images as a file."""
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    np.savez(
        path,
        train_images=dataset.train_images,
        train_labels=dataset.train_labels,
        test_images=dataset.test_images,
        test_labels=dataset.test_labels,
    )
    return path


@pytest.fixture(scope="module")
def tiny():
    """Models of size "mu" are smaller than they are called, for one file of tests."""
    from experiments.data_scaling import experiment

    caches = (experiment.program_of, experiment.cost_of)
    with pytest.MonkeyPatch.context() as patch:
        for model, size in TINY.items():
            patch.setitem(SIZES[model], "mu", size)
        for cache in caches:
            cache.cache_clear()
        yield
        for cache in caches:
            cache.cache_clear()
