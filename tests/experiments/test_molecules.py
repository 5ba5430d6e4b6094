"""Molecules: the tables of the package, structures, what is left out, baselines."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import pathlib
import sys
import textwrap
import zipfile

import numpy as np
import pytest

from experiments.data import molecules
from experiments.data.fetch import DataError

NAME = "chemicals-1.5.2-py3-none-any.whl"
LARGE, SMALL = molecules._STRUCTURES
MELTING = molecules._TABLES["melting_point"][0]
LOGP = molecules._TABLES["logp"][0]
TABLES = {
    MELTING: "CAS\tTm\n64-17-5\t159.0\n1-1-1\t300\n50-00-0\t181\n7-7-7\t1\n"
    "64-17-5\t2\n",
    LARGE: "1\t64-17-5\tC2H6O\t46\tCCO\tinchi\n2\t1-1-1\tF3Br\t137\tFBr(F)F\tinchi\n",
    SMALL: "3\t50-00-0\tCH2O\t30\tC=O\tinchi\n4\t64-17-5\tX\t1\tCCCC\tinchi\n",
    LOGP: "CAS\tChemical\tlogP\n64-17-5\tEthanol\t-0.31\n",
}


def write_wheel(folder: pathlib.Path, **changes: str | None) -> pathlib.Path:
    """Write a small wheel with the tables; None takes one away."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / NAME, "w") as wheel:
        for path, content in (TABLES | changes).items():
            if content is not None:
                raw = content.encode()
                wheel.writestr(path, gzip.compress(raw) if path == LOGP else raw)
    return folder / NAME


def use(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = dataclasses.replace(molecules.CHEMICALS, sha256={NAME: digest})
    monkeypatch.setattr(molecules, "CHEMICALS", spec)


@pytest.fixture
def pip(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A stand-in for `python -m pip`: it copies site/*.whl and notes its calls."""
    monkeypatch.delenv("ATTN_DATA", raising=False)
    use(write_wheel(tmp_path / "site"), monkeypatch)
    script = tmp_path / "python"
    script.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            echo "$*" >> {tmp_path}/calls
            cp {tmp_path}/site/*.whl . && exit 0
            echo "ERROR: No matching distribution found" >&2
            exit 1
            """
        )
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


# --- Loading -----------------------------------------------------------------------


def test_the_package_fills_the_cache_once_and_the_tables_are_joined(pip, tmp_path):
    got = molecules.load_molecules("melting_point", tmp_path / "cache")
    assert got.source.startswith("PyPI package chemicals==1.5.2 (kept in")
    # 7-7-7 has no structure; of two values and of two structures, the first counts.
    assert got.smiles == ("CCO", "C=O") and got.targets.tolist() == [159.0, 181.0]
    assert got.lengths.tolist() == [3, 2] and got.unit == "K"
    again = molecules.load_molecules("melting_point", tmp_path / "cache")
    assert again.source == str(tmp_path / "cache" / "chemicals")
    assert again.sha256 == got.sha256
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("-m pip download ") and call.endswith("chemicals==1.5.2")
    assert {"--no-deps", "--only-binary=:all:"} <= set(call.split())
    logp = molecules.load_molecules("logp", tmp_path / "cache")
    assert (logp.smiles, logp.targets.tolist()) == (("CCO",), [-0.31])
    with pytest.raises(ValueError, match="read-only"):
        got.targets[0] = 1.0


def test_bad_smiles_are_named_counted_and_left_out(pip, tmp_path, capfd):
    got = molecules.load_molecules("melting_point", tmp_path / "cache")
    assert got.skipped == ("1-1-1 'FBr(F)F': not a SMILES string that RDKit reads",)
    line = got.describe()
    assert "2 molecules of 2.5 atoms" in line and "\n" not in line
    assert "1 left out (1-1-1 'FBr(F)F': not a SMILES" in line
    assert capfd.readouterr() == ("", "")  # RDKit's own complaints are ours to tell
    rows = [("a", "C", 1.0), ("b", "", 1.0), ("c", "(C", 1.0), ("d", "C", np.nan)]
    made = molecules.parse_molecules("x", "here", "", rows)
    assert made.smiles == ("C",) and len(made.skipped) == 3
    assert "b '': no atoms" in made.skipped and "d 'C': its number is nan" in got_all(
        made
    )
    with pytest.raises(DataError, match=r"holds no molecule: b '\(C': not a SMILES"):
        molecules.parse_molecules("x", "here", "", [("b", "(C", 1.0)])


def got_all(made: molecules.Molecules) -> str:
    return " ".join(made.skipped)


def test_what_cannot_be_had_is_said(pip, tmp_path, monkeypatch):
    (tmp_path / "site" / NAME).unlink()
    with pytest.raises(DataError, match="No matching distribution") as error:
        molecules.load_molecules("logp", tmp_path / "cache")
    last = str(error.value).splitlines()[-1]
    assert "`pip download --no-deps chemicals==1.5.2` leaves it" in last
    assert NAME in last and "python -m experiments.data melting_point" in last
    wrong = write_wheel(tmp_path / "site", **{LOGP: None})
    with pytest.raises(DataError, match="expected sha256"):
        molecules.load_molecules("logp", tmp_path / "cache")
    use(wrong, monkeypatch)
    with pytest.raises(DataError, match="not a wheel with the tables"):
        molecules.load_molecules("logp", tmp_path / "cache")
    with pytest.raises(ValueError, match="task must be one of melting_point, logp"):
        molecules.load_molecules("taste", tmp_path / "cache")


# --- Graphs ------------------------------------------------------------------------


def graph(smiles: str) -> molecules.MoleculeGraph:
    return molecules.parse_molecules("x", "here", "", [("x", smiles, 0.0)]).graphs[0]


def test_atoms_and_bonds_by_hand():
    one = graph("C=CC#N")  # acrylonitrile
    trait = {name: one.atoms[:, i] for i, name in enumerate(molecules.ATOM_TRAITS)}
    carbon, nitrogen = (molecules._ELEMENTS.index(e) for e in "CN")
    assert trait["element"].tolist() == [carbon, carbon, carbon, nitrogen]
    assert trait["bonds"].tolist() == [1, 2, 2, 1]
    assert trait["hydrogens"].tolist() == [2, 1, 0, 0]
    assert trait["charge"].tolist() == [2] * 4 and not trait["aromatic"].any()
    single, double, triple = 1, 2, 3
    bonds = np.zeros((4, 4), int)
    for i, j, kind in ((0, 1, double), (1, 2, single), (2, 3, triple)):
        bonds[i, j] = bonds[j, i] = kind
    np.testing.assert_array_equal(one.pairs[..., 0], bonds)
    steps = np.abs(np.arange(4)[:, None] - np.arange(4)[None])
    np.testing.assert_array_equal(one.pairs[..., 1], steps)
    ring = graph("c1ccccc1[O-]")
    assert ring.atoms[:, 4].tolist() == [1] * 6 + [0]
    assert ring.atoms[:, 5].tolist() == [4] * 6 + [0]  # rings of six
    assert ring.atoms[6, 3] == 1 and ring.pairs[0, 1, 0] == 4  # charge −1; aromatic


def test_long_paths_share_a_value_and_parts_have_no_path():
    chain = graph("C" * 20)
    assert chain.pairs[0, 12, 1] == chain.pairs[0, 19, 1] == molecules.LONGEST_PATH
    salt = graph("[Na+].[Cl-]")
    assert salt.pairs[0, 1].tolist() == [0, molecules.LONGEST_PATH + 1]
    assert salt.atoms[:, 3].tolist() == [3, 1]
    single = graph("[Xe]")  # an element that has no place of its own
    assert single.atoms.shape == (1, 8) and single.pairs[0, 0].tolist() == [0, 0]
    for found in (chain, salt, single):
        assert (found.atoms < np.array(molecules.ATOM_SIZES)).all()
        assert (found.pairs < np.array(molecules.PAIR_SIZES)).all()


def test_a_split_keeps_equal_molecules_together():
    found = molecules.toy_molecules()  # many of its molecules are equal
    parts = molecules.split_molecules(found)
    assert sorted(np.concatenate(parts)) == list(range(100))
    kinds = [{found.smiles[i] for i in part} for part in parts]
    assert all(not kinds[i] & kinds[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    again = molecules.split_molecules(found)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    other = molecules.split_molecules(found, seed=1)
    assert set(parts[2]) != set(other[2])


def test_morgan_counts_count():
    one, two = molecules.morgan_counts(["CC", "CCCC"], size=512)
    assert one.sum() == 3 and two.sum() > one.sum()
    methyl = np.flatnonzero(one == 2)
    assert (two[methyl] == 2).all()  # both ends
