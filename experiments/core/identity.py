"""What makes a number, beside the settings that a cell names.

Whatever changes a number is in the hash of its record, data by its digest. Records that
are committed were made before some of that was asked for; `COMMITTED` says what theirs
was, and only what differs from it enters a hash, under the key "differs" of the config.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.core.store import Record, config_hash

if TYPE_CHECKING:
    from experiments.data.images import Dataset
    from experiments.data.sequences import SequenceData

Differs = tuple[tuple[str, Any], ...]

COMMITTED: Mapping[str, Mapping[str, Any]] = {
    "fashion_mnist": dict(
        data_sha256="5f06bd0df99ad3dc904134efe2e620e96a51dc83af7575151eb993b975560d7a",
        image_test=1_000,
    ),
    "pos": dict(
        data_sha256="f45c69b4fdf49821677a98137f099e51f5d757fabfb6380f8d75ec9ed69f5e2f"
    ),
    "pos_by_length_20-30-40-64": dict(
        data_sha256="8cb7734c2980173f1e8b35dfd8c109576f00ceb16989a246d9e8c1121eb5f635"
    ),
    "pos_fine": dict(
        data_sha256="1b0213abe678f78089ed88caebf8ef9a80ede90ea7a3040d12ff4125c67e755e"
    ),
    "phones": dict(
        data_sha256="8469c00b8e2c80a126170adbe7a5c69d80ac80cd59ed54aff4a1c31e2365c3f9",
        data_sketch=(
            0.3518,
            0.0789,
            -0.0088,
            0.0804,
            -0.2671,
            -1.3483,
            -0.5219,
            0.1306,
        ),
    ),
    "cmudict": dict(
        data_sha256="077276b0d92cc0856cdec05a510d526626b16b0a62760e9c7d31f216556cc32d",
        written=None,
    ),
    "order": dict(
        data_sha256="23f95ff0f7577ecbd1d3df63819f0c4194574bfb0fc1367f45f936dd62fdda0a"
    ),
    "wordnet": dict(
        data_sha256="88a47e75b103d5587993152dd995b25669560733c9cdcf99434153f81ffacec2",
        text_features=1,
        test=8_000,
        validation=4_000,
        node_ns=[20_000, 2_600],
    ),
    "melting_point": dict(
        data_sha256="0ec7b14918deb65a7d79266f59eaee48ab831de4273b86914c67a9cc247d76d2",
        graphs="9f1da94aa5432ba28c5e5211ab5146d6d25e3aba8340340f02f6942b4883f756",
        split="48ad1663db4ee956f58befc7ae48c948ae23324f1c5d06b220ed0226101e9068",
        trees=100,
    ),
    "logp": dict(
        data_sha256="7f8629ca0a254658bacd2bda12be93d01b3dc4576eea5631fb5b3c1fb65fe764",
        graphs="e0599491f94aefa7c97681d816d84b3f25d50ded0ea2898257670164b574e523",
        split="4f0f460ea14065fef9e5be88d99869a92a393e6d81f4c61578f44d8876897b63",
        trees=100,
    ),
}
"""Task -> what its committed records were made of."""


def differs(task: str, **made_of: Any) -> Differs:
    """What a number is made of, as far as it is not what committed records had.

    Args:
      task: name under which the records are stored.
      **made_of: digests, sizes and the like, plain values; or sums as of `sketch`,
        which count as equal where they differ by rounding.

    Returns:
      Sorted pairs (name, value).

    >>> differs("no such task", test=5)
    (('test', 5),)
    """
    had = COMMITTED.get(task, {})
    return tuple(
        (name, _rounded(value))
        for name, value in sorted(made_of.items())
        if name not in had or not _same(value, had[name])
    )


def _is_sketch(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(x, float) for x in value)


def _rounded(value: Any) -> Any:
    return [round(x, 2) for x in value] if _is_sketch(value) else value


def _same(value: Any, other: Any) -> bool:
    if _is_sketch(value):
        return len(value) == len(other) and bool(
            np.allclose(value, other, rtol=0, atol=2e-3)
        )
    return bool(value == other)


def with_differs(config: dict[str, Any], found: Differs) -> dict[str, Any]:
    """A config, and under "differs" what there is of that."""
    return config | {"differs": dict(found)} if found else config


def digest(*parts: Any) -> str:
    """SHA-256 of arrays of integers or bools, of texts, and of sequences of those."""
    found = hashlib.sha256()
    for part in parts:
        _add(found, part)
    return found.hexdigest()


def _add(found: Any, part: Any) -> None:
    if isinstance(part, np.ndarray):
        found.update(f"{part.dtype.str}{part.shape}".encode())
        found.update(np.ascontiguousarray(part).data.cast("B"))
    elif isinstance(part, list | tuple):
        found.update(f"[{len(part)}".encode())
        for item in part:
            _add(found, item)
    else:
        found.update(f"{part!r};".encode())


def sketch(arrays: Sequence[np.ndarray], count: int = 8) -> tuple[float, ...]:
    """Sums that tell vectors apart, and that agree where they differ by rounding.

    Each is a sum of all entries with weights that vary from entry to entry, of the
    order of one entry.

    Args:
      arrays: float [T, F] each.
      count: number of sums.

    >>> x = np.arange(6.0).reshape(2, 3)
    >>> [round(s, 3) for s in sketch([x], 2)]
    [0.468, 0.436]
    """
    totals, entries = np.zeros(count), 0
    turns = np.arange(1, count + 1)[:, None]
    for at, x in enumerate(arrays):
        rows, columns = np.arange(x.shape[0]), np.arange(x.shape[1])
        left = np.cos(turns * (0.05 * rows + 0.3 * at))  # [count, T]
        right = np.cos(turns * 1.1 * columns + turns - 1)  # [count, F]
        totals += np.sum((left @ x.astype(np.float64)) * right, axis=1)
        entries += x.size
    return tuple(float(x) for x in totals / max(1, entries) ** 0.5)


def of_images(dataset: Dataset) -> tuple[str, Differs]:
    """Under which name cells of images are stored, and what they differ in.

    A file of one's own has its content in its name: another file may have the same.
    """
    if dataset.name.startswith("npz:"):
        return f"{dataset.name}@{dataset.sha256[:12]}", ()
    return dataset.name, differs(dataset.name, data_sha256=dataset.sha256)


def of_sequences(data: SequenceData) -> Differs:
    """What cells of a labelling task differ in: its vectors and labels as models see
    them, so also how text was split into ids and sound into energies.
    """
    exact: list[Any] = [data.sha256, data.class_names, data.inputs, data.lengths]
    exact.append(data.has_unknown)
    vectors: list[np.ndarray] = []
    for part in (data.train, data.validation, data.test):
        exact.append([part.lengths, np.concatenate(list(part.labels))])
        for name in sorted(part.groups):
            exact.append([name, np.concatenate(list(part.groups[name]))])
        if np.issubdtype(part.inputs[0].dtype, np.floating):
            vectors += part.inputs
        else:
            exact.append(np.concatenate(list(part.inputs)))
    found: dict[str, Any] = dict(data_sha256=digest(*exact))
    if vectors:
        found["data_sketch"] = sketch(vectors)
    return differs(data.name, **found)


# --- Reports -----------------------------------------------------------------------


def _family(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What has to be of one kind: the cells of a task, and each of its baselines."""
    baseline = config.get("phase") == "baseline"
    return config.get("task"), config["model"] if baseline else None


def of_one_kind(
    records: Sequence[Record], planned: Iterable[Mapping[str, Any]]
) -> tuple[list[Record], int]:
    """Records that may stand in one table.

    A folder may hold records of other data, or of other sizes of what is held out,
    than those of this run. Of what this run planned, its own kind is kept; of other
    tasks, the newest.

    Args:
      records: all there are.
      planned: configs of this run, at least one of each kind.

    Returns:
      (those kept, how many were left out).
    """
    kinds = {_family(config): config.get("differs", {}) for config in planned}
    newest: dict[tuple[Any, ...], str] = {}
    for record in records:
        family, made = (
            _family(record["config"]),
            record["provenance"].get("created_utc", ""),
        )
        if family not in kinds or family in newest:
            if made >= newest.get(family, ""):
                newest[family] = made
                kinds[family] = record["config"].get("differs", {})
    kept = [
        record
        for record in records
        if _same_kind(
            record["config"].get("differs", {}), kinds[_family(record["config"])]
        )
    ]
    return kept, len(records) - len(kept)


def _same_kind(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return config_hash(one) == config_hash(other)
