"""Texts as bytes: what is read of mails, pages and verses, and how they are split."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib

import numpy as np
import pytest

from experiments.data import byte_text, lra_release
from experiments.data.byte_text import classified, toy_documents, translated
from experiments.data.fetch import DataError


def test_each_wording_of_a_mail_is_read_once_and_no_header(tmp_path, monkeypatch):
    mails = {
        "easy-ham-1/a.txt": b"Subject: spam\n\nDear Ann, 7 cats.\n",
        "easy-ham-2/b.txt": b"Subject: other\r\n\r\ndear ann: 8 CATS",
        "spam-1/c.txt": b"To: you\n\nBuy!\n\nNow.",
        "spam-2/d.txt": b"no body",
        "spam-2/d.json": b"{}",
    }
    path = tmp_path / "spam.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in mails.items():
            info = tarfile.TarInfo(f"package/data/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(byte_text, "obtain_file", lambda *_: (path, "here"))
    found = byte_text.load_spam()
    assert found.texts == (b"Dear Ann, 7 cats.", b"Buy!\n\nNow.")
    assert found.labels.tolist() == [0, 1] and found.pages.tolist() == [0, 1]
    assert "2 texts of 2 pages" in found.describe()


def test_paragraphs_that_were_left_in_english_are_left_out(monkeypatch):
    page = "<h2>Titel</h2><p>{}</p><p>Left &amp; kept <b>as</b>\nit was</p>".format
    files = {
        "de/a.html": page("Ein langer Satz").encode(),
        "en/a.html": page("A long phrase").encode(),
        "en/b.html": page("A second page").encode(),
    }
    monkeypatch.setattr(byte_text, "obtain", lambda *_: ("folder", "here"))
    monkeypatch.setattr(byte_text, "read_tree", lambda *_: files)
    found = byte_text.load_paragraphs(least=13)
    assert found.class_names == ("de", "en") and found.labels.tolist() == [
        0,
        1,
        1,
        1,
        1,
    ]
    assert found.texts[:3] == (
        b"Ein langer Satz",
        b"A long phrase",
        b"Left & kept as it was",
    )
    assert found.pages.tolist() == [0, 0, 0, 1, 1]


def module(entries):
    """Files of a testament, all verses in one block."""
    text = b"".join(entries)
    block = zlib.compress(text)
    begins = np.cumsum([0, *map(len, entries)])
    index = b"".join(
        struct.pack("<IIH", 0, begin, len(entry))
        for begin, entry in zip(begins, entries, strict=False)
    )
    return {"bzs": struct.pack("<III", 0, len(block), len(text)), "bzv": index} | {
        "bzz": block
    }


def test_verses_are_told_by_chapter_and_number():
    old = [
        b"",
        b"<milestone/>",
        b'<div sID="g" type="book" osisID="Gen"/><title>Genesis</title>',
        b'<chapter osisID="Gen.1" sID="Gen.1"/>',
        b"<w>In the</w> beginning<note>a <b>note</b></note>",
        b"",
        b'third <chapter eID="Gen.1"/>',
        b'<div sID="e" type="book" osisID="Exod"/>Exodus',
        b'<chapter osisID="Exod.1" sID="x"/>',
        b"&lt;Now&gt;",
    ]
    files = {
        f"{testament}.{name}": content
        for testament in ("ot", "nt")
        for name, content in module(old if testament == "ot" else [b""]).items()
    }
    assert byte_text.verses(files) == {
        ("Gen.1", 1): b"In the beginning",
        ("Gen.1", 3): b"third",
        ("Exod.1", 1): b"<Now>",
    }
    files["ot.bzz"] = b"torn"
    with pytest.raises(DataError, match="ot.bzv is no index of a SWORD module"):
        byte_text.verses(files)


def rows_of(fold):
    """The real bytes of each sequence."""
    flat = fold.inputs.reshape(-1, fold.inputs.shape[-1])
    lengths = fold.lengths.reshape(-1)
    return [bytes(x[:n]) for x, n in zip(flat, lengths, strict=True)]


def test_parts_share_no_page_and_texts_are_cut():
    toy = toy_documents(60)
    data = classified("toy", toy, 12, sizes=(20, 5, 6))
    assert [len(p.labels) for p in (data.train, data.validation, data.test)] == [
        20,
        5,
        6,
    ]
    page = {text[:12]: p for text, p in zip(toy.texts, toy.pages, strict=True)}
    pages = [
        {page[row] for row in rows_of(part)}
        for part in (data.train, data.validation, data.test)
    ]
    assert not (pages[0] & pages[1] or pages[0] & pages[2] or pages[1] & pages[2])
    assert data.name == "toy_12" and data.symbols == 256


def test_what_is_no_translation_is_another_of_the_same_page():
    toy = toy_documents(200, translated=True)
    data = translated("toy", toy, 40)
    page = dict(zip(toy.texts, toy.pages, strict=True))
    hits = []
    for part in (data.train, data.test):
        texts = rows_of(part)
        for one, two, label in zip(texts[::2], texts[1::2], part.labels, strict=True):
            assert (one.upper() == two) == label
            assert page[one] == page[two.lower()]
            hits.append(label)
    assert 0.35 < np.mean(hits) < 0.65


def test_the_official_files_are_read(tmp_path):
    from matplotlib.image import imsave

    lists = tmp_path / "lra_release" / "listops-1000"
    lists.mkdir(parents=True)
    for part in ("train", "val", "test"):
        line = "( ( ( [MAX 2 ) 9 ) ] )\t9\n"
        (lists / f"basic_{part}.tsv").write_text(f"Source\tTarget\n{line}")
    data = lra_release.load("listops", tmp_path)
    assert data.train.inputs[0, :4].tolist() == [11, 2, 9, 14]
    assert data.train.lengths.tolist() == [4] and data.test.labels.tolist() == [9]
    pairs = tmp_path / "tsv_data"
    pairs.mkdir()
    for part in ("train", "eval", "test"):
        (pairs / f"new_aan_pairs.{part}.tsv").write_text("1.0\ti\tj\tone\tother\n")
    data = lra_release.load("retrieval", tmp_path)
    assert rows_of(data.test) == [b"one", b"other"] and data.test.labels.tolist() == [1]
    folder = tmp_path / "pathfinder32" / "curv_baseline"
    (folder / "metadata").mkdir(parents=True)
    (folder / "imgs" / "0").mkdir(parents=True)
    lines = []
    for i in range(12):
        grey = np.full((3, 3), i, np.uint8)
        imsave(folder / "imgs" / "0" / f"s{i}.png", grey, cmap="gray", vmin=0, vmax=255)
        lines.append(f"imgs/0 s{i}.png {i} {i % 2} 1.8 6")
    (folder / "metadata" / "0.npy").write_text("\n".join(lines))
    data = lra_release.load("pathfinder_easy", tmp_path)
    parts = (data.train, data.validation, data.test)
    assert sorted(int(x) for p in parts for x in p.inputs[:, 0]) == list(range(12))
    assert all((p.inputs[:, 0] % 2 == p.labels).all() for p in parts)
    assert data.grid == (3, 3) and data.name == "pathfinder_easy_official_9"
    with pytest.raises(DataError, match="has no folder pathfinder128"):
        lra_release.load("pathx", tmp_path)
    with pytest.raises(ValueError, match="task must be one of listops"):
        lra_release.load("text", tmp_path)
