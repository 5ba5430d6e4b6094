"""Molecules as graphs with one measured number each: melting points and logP.

:func:`load_molecules` joins measured values to structures by CAS number. Both are
tables inside the PyPI package ``chemicals`` (MIT licence), whose wheel is read as it is
and never installed. A structure is a SMILES string; RDKit (imported when it is needed)
makes atoms and bonds of it. What RDKit cannot read is left out, counted and named.

:func:`toy_molecules` gives a few molecules for tests, with a number that is none.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import io
import os
import zipfile
import zlib
from collections.abc import Container, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from experiments.data.fetch import (
    DataError,
    DataSet,
    Files,
    first_few,
    obtain_file,
    seal,
)
from experiments.data.splits import SHARES, Three, in_three, random_bits

CHEMICALS = Files(
    title="The tables of the package chemicals",
    name="melting_point",
    folder="chemicals",
    sha256={
        "chemicals-1.5.2-py3-none-any.whl": (
            "f85ef7f36e77fee634686c26562929ee61026cd548d89cebd57b2251ca843d6e"
        )
    },
    other_folders=(".",),
    pypi="chemicals==1.5.2",
)

_STRUCTURES = (
    "chemicals/Identifiers/chemical identifiers pubchem large.tsv",
    "chemicals/Identifiers/chemical identifiers pubchem small.tsv",
)

Task = Literal["melting_point", "logp"]


#: Where the numbers of a task are: path, column, unit.
_TABLES = {
    "melting_point": (
        "chemicals/Phase Change/OpenNotebook Melting Points.tsv",
        "Tm",
        "K",
    ),
    "logp": ("chemicals/Environment/Syrres logP data.csv.gz", "logP", ""),
}

# --- Atoms and bonds ---------------------------------------------------------------

_ELEMENTS = "C N O S F Cl Br I P Si B Se Sn Hg As Na K Li Ge Pb Sb Te Fe Al".split()
_HYBRIDS = ("S", "SP", "SP2", "SP3", "SP3D", "SP3D2")
_TURNS = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW")
_BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")

#: One-hot traits of an atom, and how many values each has, other values included.
ATOM_TRAITS = (
    *("element", "bonds", "hydrogens", "charge", "aromatic"),
    *("smallest ring", "hybridisation", "chirality"),
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
class Molecules(DataSet):
    """Molecules with a number each, in memory.

    Attributes:
      unit: of the numbers.
      smiles: canonical SMILES, one a molecule; some molecules occur more than once.
      graphs: one a molecule.
      targets: float64 [n].
      skipped: what was left out, with the reason.
    """

    unit: str
    smiles: tuple[str, ...]
    graphs: tuple[MoleculeGraph, ...]
    targets: np.ndarray
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.smiles)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of atoms of every molecule, int64 [n]."""
        return np.array([len(graph.atoms) for graph in self.graphs], np.int64)

    def contents(self) -> str:
        """How many molecules, their numbers, and what was left out."""
        unit = f" {self.unit}" if self.unit else ""
        left_out = f"{len(self.skipped)} left out"
        if self.skipped:
            left_out += f" ({first_few(self.skipped, 3)})"
        return (
            f"{len(self):,} molecules of {self.lengths.mean():.1f} atoms, "
            f"{self.targets.mean():.2f} ± {self.targets.std():.2f}{unit}, {left_out}"
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
      cache_dir: as of :func:`experiments.data.fetch.obtain`.
      limit: how many of them at most, from all over the table; None for all.

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
    package, source = obtain_file(CHEMICALS, cache_dir)
    path, column, unit = _TABLES[task]
    try:
        with zipfile.ZipFile(package) as wheel:
            content = wheel.read(path)
            if path.endswith(".gz"):
                content = gzip.decompress(content)
            values = _read_values(content, column)
            structures = _read_structures(values, map(wheel.read, _STRUCTURES))
    except (KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{package} is not a wheel with the tables that are needed "
            f"({error}): remove it and fetch it again"
        ) from error
    rows = [
        (cas, structures[cas], value)
        for cas, value in values.items()
        if cas in structures
    ]
    if limit is not None:  # from all over the table, which may be sorted
        rows = rows[:: max(1, len(rows) // limit)][:limit]
    return parse_molecules(task, source, unit, rows)


def _read_values(content: bytes, column: str) -> dict[str, float]:
    """The number of every CAS number; of several, the first."""
    lines = io.StringIO(content.decode("utf-8"))
    found: dict[str, float] = {}
    for row in csv.DictReader(lines, delimiter="\t"):
        found.setdefault(row["CAS"], float(row[column]))
    return found


def _read_structures(wanted: Container[str], tables: Iterable[bytes]) -> dict[str, str]:
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
    pairs = zip(smiles, targets, strict=True)
    return Molecules(
        name=name,
        source=source,
        sha256=seal(*(f"{text}\t{value!r}\n" for text, value in pairs)),
        unit=unit,
        smiles=tuple(smiles),
        graphs=tuple(graphs),
        targets=numbers,
        skipped=tuple(skipped),
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
    fractions: tuple[float, float, float] = SHARES,
) -> Three:
    """Split the molecules at random, equal ones together.

    Returns:
      ``(train, validation, test)`` of the shares of different molecules, each int64
      indices in order; and raises as :func:`experiments.data.splits.in_three`.

    >>> train, val, test = split_molecules(toy_molecules())
    >>> len(train) + len(val) + len(test)
    100
    """
    different, which = np.unique(np.asarray(molecules.smiles), return_inverse=True)
    keys = random_bits(seed, 8).random_raw(len(different))
    return in_three(keys, fractions, which)


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
