"""Molecules as graphs with one measured number each: melting points and logP.

:func:`load_molecules` joins measured values to structures by CAS number. Both are
tables inside the PyPI package ``chemicals`` (MIT licence), whose wheel is read as it is
and never installed; see :mod:`experiments.data.fetch` for where it is looked for, and
``python -m experiments.data.images melting_point`` to fetch it. A structure is a SMILES
string; RDKit (imported when it is needed) makes atoms and bonds of it. What RDKit
cannot read is left out, counted and named.

:func:`toy_molecules` gives a few molecules for tests, with a number that is none.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from experiments.data.fetch import (
    DataError,
    Files,
    default_cache_dir,
    first_few,
    obtain,
)
from experiments.data.images import random_bits, split_ends

__all__ = [
    "ATOM_SIZES",
    "PAIR_SIZES",
    "MoleculeGraph",
    "Molecules",
    "graph_of",
    "load_molecules",
    "morgan_counts",
    "split_molecules",
    "toy_molecules",
]

CHEMICALS = Files(
    title="The tables of the package chemicals",
    folder="chemicals",
    sha256={
        "chemicals-1.5.2-py3-none-any.whl": (
            "f85ef7f36e77fee634686c26562929ee61026cd548d89cebd57b2251ca843d6e"
        )
    },
    other_folders=(".",),
    pypi="chemicals==1.5.2",
    command="python -m experiments.data.images melting_point",
)

_STRUCTURES = (
    "chemicals/Identifiers/chemical identifiers pubchem large.tsv",
    "chemicals/Identifiers/chemical identifiers pubchem small.tsv",
)

Task = Literal["melting_point", "logp"]


@dataclasses.dataclass(frozen=True)
class _Table:
    """Where the numbers of a task are."""

    path: str
    column: str
    unit: str


_TABLES: dict[str, _Table] = {
    "melting_point": _Table(
        "chemicals/Phase Change/OpenNotebook Melting Points.tsv", "Tm", "K"
    ),
    "logp": _Table("chemicals/Environment/Syrres logP data.csv.gz", "logP", ""),
}

# --- Atoms and bonds ---------------------------------------------------------------

_ELEMENTS = "C N O S F Cl Br I P Si B Se Sn Hg As Na K Li Ge Pb Sb Te Fe Al".split()
_HYBRIDS = ("S", "SP", "SP2", "SP3", "SP3D", "SP3D2")
_TURNS = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW")
_BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")

#: One-hot traits of an atom, and how many values each has, other values included.
ATOM_TRAITS = (
    "element",
    "bonds",
    "hydrogens",
    "charge",
    "aromatic",
    "smallest ring",
    "hybridisation",
    "chirality",
)
ATOM_SIZES = (len(_ELEMENTS) + 1, 7, 5, 5, 2, 9, len(_HYBRIDS) + 1, len(_TURNS) + 1)

#: Paths longer than this share a value.
LONGEST_PATH = 12
#: Ids of a pair of atoms: the bond (none, four kinds, others), and the bonds between
#: them (0 … 12 or more, or that there is no path).
PAIR_SIZES = (len(_BONDS) + 2, LONGEST_PATH + 2)


@dataclasses.dataclass(frozen=True, eq=False)
class MoleculeGraph:
    """The atoms of one molecule, but for hydrogens, and what lies between them.

    Attributes:
      atoms: int8 [T, 8], one id a trait of :data:`ATOM_TRAITS`.
      pairs: int8 [T, T, 2], for two atoms the id of their bond, 0 for none, and the
        number of bonds on the shortest path.
    """

    atoms: np.ndarray
    pairs: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Molecules:
    """Molecules with a number each, in memory.

    Attributes:
      name: of the task; a synthetic one says so.
      source: the file, folder or package that they came from.
      unit: of the numbers.
      smiles: canonical SMILES, one a molecule; some molecules occur more than once.
      graphs: one a molecule.
      targets: float64 [n].
      skipped: what was left out, with the reason.
      sha256: hash of SMILES and numbers.
    """

    name: str
    source: str
    unit: str
    smiles: tuple[str, ...]
    graphs: tuple[MoleculeGraph, ...]
    targets: np.ndarray
    skipped: tuple[str, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.smiles)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of atoms of every molecule, int64 [n]."""
        return np.array([len(graph.atoms) for graph in self.graphs], np.int64)

    def describe(self) -> str:
        """One line: which numbers, from where, how many, what was left out, hash."""
        unit = f" {self.unit}" if self.unit else ""
        left_out = f"{len(self.skipped)} left out"
        if self.skipped:
            left_out += f" ({first_few(self.skipped, 3)})"
        return (
            f"{self.name}: {len(self):,} molecules of {self.lengths.mean():.1f} atoms, "
            f"{self.targets.mean():.2f} ± {self.targets.std():.2f}{unit}, {left_out}, "
            f"sha256 {self.sha256[:16]}, from {self.source}"
        )


def graph_of(molecule: Any) -> MoleculeGraph:
    """Atoms, bonds and distances of an RDKit molecule.

    Args:
      molecule: ``rdkit.Chem.Mol`` with at least one atom.

    >>> from rdkit import Chem
    >>> graph = graph_of(Chem.MolFromSmiles("CC=O"))
    >>> graph.atoms.shape, graph.pairs[0].tolist()
    ((3, 8), [[0, 0], [1, 1], [0, 2]])
    """
    from rdkit import Chem

    rings = molecule.GetRingInfo()
    rows = []
    for atom in molecule.GetAtoms():
        index = atom.GetIdx()
        ring = rings.MinAtomRingSize(index)  # 0 outside of rings
        rows.append(
            (
                _place(atom.GetSymbol(), _ELEMENTS),
                min(atom.GetDegree(), 6),
                min(atom.GetTotalNumHs(), 4),
                min(max(atom.GetFormalCharge(), -2), 2) + 2,
                int(atom.GetIsAromatic()),
                min(max(ring - 2, 0), 8),
                _place(str(atom.GetHybridization()), _HYBRIDS),
                _place(str(atom.GetChiralTag()), _TURNS),
            )
        )
    atoms = np.asarray(rows, np.int8)
    bonds = np.zeros((len(rows), len(rows)), np.int8)
    for bond in molecule.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[i, j] = bonds[j, i] = 1 + _place(str(bond.GetBondType()), _BONDS)
    lengths = Chem.GetDistanceMatrix(molecule)  # a huge number where there is no path
    paths = np.where(
        lengths < len(rows), np.minimum(lengths, LONGEST_PATH), LONGEST_PATH + 1
    )
    return MoleculeGraph(atoms, np.stack([bonds, paths.astype(np.int8)], axis=-1))


def _place(value: str, values: Sequence[str]) -> int:
    """Index of a value, or one more than the last."""
    return values.index(value) if value in values else len(values)


# --- Loading -----------------------------------------------------------------------


def load_molecules(
    task: Task,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
) -> Molecules:
    """Load the molecules of a task, fetching them into the cache where needed.

    Args:
      task: "melting_point", in kelvin, or "logp", the logarithm to base 10 of the
        octanol-water partition coefficient.
      cache_dir: where downloads are kept; by default ``~/.cache/attn_jax``.
      limit: how many of them at most; None for all.

    Returns:
      The molecules whose CAS number has a structure, in the order of the table.

    Raises:
      DataError: the package cannot be had, is corrupt, or cannot be stored.
      ImportError: RDKit is not installed.
      ValueError: an unknown task.

    Sources: J.-C. Bradley, A. Williams and A. Lang, Jean-Claude Bradley Open Melting
    Point Dataset, 2014; Syracuse Research Corporation, PHYSPROP database; PubChem.
    """
    if task not in _TABLES:
        raise ValueError(f"task must be one of {', '.join(_TABLES)}, got {task!r}")
    cache = pathlib.Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder, source = obtain(CHEMICALS, cache)
    (name,) = CHEMICALS.sha256
    table = _TABLES[task]
    try:
        with zipfile.ZipFile(folder / name) as wheel:
            values = _read_values(wheel.read(table.path), table)
            structures = _read_structures(
                set(values), (wheel.read(path) for path in _STRUCTURES)
            )
    except (KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{folder / name} is not a wheel with the tables that are needed "
            f"({error}): remove it and fetch it again"
        ) from error
    rows = [
        (cas, structures[cas], value)
        for cas, value in values.items()
        if cas in structures
    ]
    if limit is not None:  # from all over the table, which may be sorted
        rows = rows[:: max(1, len(rows) // limit)][:limit]
    return parse_molecules(task, source, table.unit, rows)


def _read_values(content: bytes, table: _Table) -> dict[str, float]:
    """The number of every CAS number; of several, the first."""
    if table.path.endswith(".gz"):
        content = gzip.decompress(content)
    lines = io.StringIO(content.decode("utf-8"))
    found: dict[str, float] = {}
    for row in csv.DictReader(lines, delimiter="\t"):
        found.setdefault(row["CAS"], float(row[table.column]))
    return found


def _read_structures(wanted: set[str], tables: Iterable[bytes]) -> dict[str, str]:
    """SMILES by CAS number; a line is ``id CAS formula weight SMILES ...``."""
    found: dict[str, str] = {}
    for content in tables:
        for line in content.decode("utf-8").splitlines():
            fields = line.split("\t", 5)
            if fields[1] in wanted:
                found.setdefault(fields[1], fields[4])
    return found


def parse_molecules(
    name: str, source: str, unit: str, rows: Iterable[tuple[str, str, float]]
) -> Molecules:
    """Make molecules of (name, SMILES, number); what is unreadable is left out.

    Args:
      name: of the task.
      source: where the rows came from.
      unit: of the numbers.
      rows: one a molecule.

    Raises:
      DataError: not a single molecule is left.

    >>> rows = [("ethanol", "CCO", 159.0), ("nonsense", "C(C", 0.0)]
    >>> found = parse_molecules("toy", "here", "K", rows)
    >>> found.smiles, found.skipped
    (('CCO',), ("nonsense 'C(C': not a SMILES string that RDKit reads",))
    """
    from rdkit import Chem, rdBase

    smiles, graphs, targets, skipped = [], [], [], []
    with rdBase.BlockLogs():  # it would print every one of them
        for label, text, value in rows:
            molecule = Chem.MolFromSmiles(text)
            problem = None
            if molecule is None:
                problem = "not a SMILES string that RDKit reads"
            elif not molecule.GetNumAtoms():
                problem = "no atoms"
            elif not np.isfinite(value):
                problem = f"its number is {value}"
            if problem:
                skipped.append(f"{label} {text!r}: {problem}")
                continue
            smiles.append(Chem.MolToSmiles(molecule))
            graphs.append(graph_of(molecule))
            targets.append(float(value))
    if not smiles:
        raise DataError(
            f"{source} holds no molecule: {first_few(skipped) or 'no rows'}"
        )
    numbers = np.asarray(targets, np.float64)
    numbers.flags.writeable = False
    digest = hashlib.sha256()
    for text, value in zip(smiles, targets, strict=True):
        digest.update(f"{text}\t{value!r}\n".encode())
    return Molecules(
        name=name,
        source=source,
        unit=unit,
        smiles=tuple(smiles),
        graphs=tuple(graphs),
        targets=numbers,
        skipped=tuple(skipped),
        sha256=digest.hexdigest(),
    )


def toy_molecules() -> Molecules:
    """A hundred small chains for tests; their number counts atoms and double bonds.

    >>> len(toy_molecules())
    100
    """
    rows = []
    for i in range(100):
        chain = "C" * (1 + i % 7) + ("=C" if i % 2 else "") + "CNOS"[i % 4]
        value = float(len(chain.replace("=", "")) + 2 * (i % 2))
        rows.append((f"toy{i}", chain, value))
    return parse_molecules("toy_molecules", "made up, for tests only", "", rows)


def split_molecules(
    molecules: Molecules,
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split the molecules in three at random, equal ones together.

    Args:
      molecules: what to split.
      seed: another seed gives another split.
      fractions: shares of the different molecules for training, validation and test.

    Returns:
      ``(train, validation, test)``, each int64 indices in order.

    Raises:
      ValueError: the fractions are wrong, or a part would be empty.

    >>> train, val, test = split_molecules(toy_molecules())
    >>> len(train) + len(val) + len(test)
    100
    """
    different, which = np.unique(np.asarray(molecules.smiles), return_inverse=True)
    ends = split_ends(fractions, len(different))
    order = np.argsort(random_bits(seed, 8).random_raw(len(different)), kind="stable")
    part = np.empty(len(different), int)
    part[order] = np.searchsorted(ends, np.arange(len(different)), side="right")
    train, validation, test = (np.flatnonzero(part[which] == i) for i in range(3))
    return train, validation, test


# --- Fingerprints ------------------------------------------------------------------


def morgan_counts(
    smiles: Sequence[str], *, radius: int = 2, size: int = 2048
) -> np.ndarray:
    """How often each neighbourhood of atoms occurs in each molecule, hashed.

    Args:
      smiles: that RDKit reads.
      radius: of a neighbourhood, in bonds.
      size: number of columns; neighbourhoods that share one are confused.

    Returns:
      float32 [n, size].

    Reference: Rogers and Hahn, Extended-connectivity fingerprints, 2010,
    doi:10.1021/ci100050t.

    >>> morgan_counts(["CCO"], size=64).sum()
    np.float32(6.0)
    """
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator

    make = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=size)
    rows = [make.GetCountFingerprintAsNumPy(Chem.MolFromSmiles(s)) for s in smiles]
    return np.stack(rows).astype(np.float32)
