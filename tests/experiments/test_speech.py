"""Speech: festvox-ru from every source, labels of frames, splits, the stand-in."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
import shutil
import tarfile
import textwrap
import wave

import numpy as np
import pytest

from experiments.data import fetch, speech
from experiments.data.fetch import DataError

NAME = "festvox-ru-0.5.tar"
TEXT = '( ru_1 "Да, да." )\n( ru_2 "Нет \\"..." )\n( ru_9 "without a recording" )\n'


def wav(samples: np.ndarray, *, rate: int = 16000, channels: int = 1) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return stream.getvalue()


def samples(seed: int, n: int = 1000) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(-32768, 32768, n).astype("<i2")


FILES = {
    "wav/ru_1.wav": wav(samples(1)),
    "wav/ru_2.wav": wav(samples(2, 700)),
    "lab/ru_1.lab": b"#\n0.0200 125 pau\n0.04000 125 d\n0.06 125 aa\n",
    "lab/ru_2.lab": b"separator ;\n#\n0.01 125 pau\n0.03 125 nn\n\n",
    "etc/txt.done.data": TEXT.encode(),
    "etc/voice.defs": b"not wanted",
    "mcep/ru_1.mcep": b"not wanted",
}


def write_tree(folder: pathlib.Path, **changes: bytes | None) -> pathlib.Path:
    """Write a small voice in the package's layout; None takes a file away."""
    for name, content in (FILES | changes).items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


def use(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, **fields: object
) -> bytes:
    """Make load_festvox_ru() expect what is in the folder; return the packed tree."""
    stream = io.BytesIO()
    fetch._pack(speech.FESTVOX_RU, folder, stream)
    digest = hashlib.sha256(stream.getvalue()).hexdigest()
    changes = {"sha256": {NAME: digest}, "installed": None, "package": None} | fields
    spec = dataclasses.replace(speech.FESTVOX_RU, **changes)  # type: ignore[arg-type]
    monkeypatch.setattr(speech, "FESTVOX_RU", spec)
    return stream.getvalue()


@pytest.fixture
def voice(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The small voice, the only thing that load_festvox_ru() accepts."""
    monkeypatch.delenv("ATTN_DATA", raising=False)
    folder = write_tree(tmp_path / "voice")
    use(folder, monkeypatch)
    return folder


# --- Loading -----------------------------------------------------------------------


def test_contents(voice, monkeypatch):
    monkeypatch.setenv("ATTN_DATA", str(voice))
    got = speech.load_festvox_ru()
    assert got.utterances == ("ru_1", "ru_2") and got.sample_rate == 16000
    assert got.transcripts == ("Да, да.", 'Нет \\"...')
    assert got.phone_names == ("aa", "d", "nn", "pau")
    np.testing.assert_array_equal(got.audio[0], samples(1))
    np.testing.assert_array_equal(got.audio[1], samples(2, 700))
    assert [a.dtype for a in got.audio] == [np.int16, np.int16]
    assert [p.tolist() for p in got.phones] == [[3, 1, 0], [3, 2]]
    assert [e.tolist() for e in got.ends] == [[0.02, 0.04, 0.06], [0.01, 0.03]]
    assert got.phones[0].dtype == np.int32 and got.ends[0].dtype == np.float64
    assert got.seconds == pytest.approx(1700 / 16000)
    line = got.describe()
    for part in ("festvox_ru: 2 utt", "5 segments of 4 phones", str(voice)):
        assert part in line
    assert got.sha256[:16] in line and "\n" not in line
    for arrays in (got.audio, got.phones, got.ends):
        with pytest.raises(ValueError, match="read-only"):
            arrays[0][0] = 1


def test_tree_archive_and_installed_folder_are_the_same(voice, tmp_path, monkeypatch):
    packed = use(voice, monkeypatch, installed=str(voice))
    cache = tmp_path / "cache"
    installed = speech.load_festvox_ru(cache)
    assert installed.source == str(voice) and not cache.exists()
    # The archive comes before the installed folder, one's own before both.
    (cache / "festvox-ru").mkdir(parents=True)
    (cache / "festvox-ru" / NAME).write_bytes(packed)
    cached = speech.load_festvox_ru(cache)
    assert cached.source == str(cache / "festvox-ru")
    (tmp_path / "own").mkdir()
    shutil.copytree(voice, tmp_path / "own" / "msu_ru_nsh_clunits")
    monkeypatch.setenv("ATTN_DATA", str(tmp_path / "own"))
    own = speech.load_festvox_ru(cache)
    assert own.source == str(tmp_path / "own" / "msu_ru_nsh_clunits")
    assert installed.sha256 == cached.sha256 == own.sha256
    for a, b in zip(installed.audio, cached.audio, strict=True):
        np.testing.assert_array_equal(a, b)


def test_packing_does_not_depend_on_times_or_rights(voice, tmp_path, monkeypatch):
    packed = use(voice, monkeypatch)
    other = write_tree(tmp_path / "other")
    for path in other.rglob("*"):
        path.chmod(0o700)
        os.utime(path, (1, 2))
    assert use(other, monkeypatch) == packed
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert tar.getnames() == sorted(n for n in FILES if b"wanted" not in FILES[n])


def fake_debian(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for apt-get and dpkg that give tmp_path/voice as /opt/voice."""
    (tmp_path / "bin").mkdir()
    for tool, script in {
        "apt-get": f"""
            echo "apt-get $*" >> {tmp_path}/calls
            printf package > voice_1.0_all.deb
            """,
        "dpkg": f"""
            echo "dpkg $*" >> {tmp_path}/calls
            mkdir -p "$3/opt" && cp -r {tmp_path}/voice "$3/opt/voice"
            """,
    }.items():
        path = tmp_path / "bin" / tool
        path.write_text("#!/bin/sh\n" + textwrap.dedent(script))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")


def test_package_is_checked_and_kept_as_one_archive(voice, tmp_path, monkeypatch):
    fake_debian(tmp_path, monkeypatch)
    fields = {
        "installed": "/opt/voice",
        "package": "voice=1.0",
        "package_sha256": hashlib.sha256(b"package").hexdigest(),
    }
    packed = use(voice, monkeypatch, **fields)
    got = speech.load_festvox_ru(tmp_path / "cache")
    folder = tmp_path / "cache" / "festvox-ru"
    assert got.source == f"Debian package voice_1.0_all (kept in {folder})"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "apt-get download voice=1.0" and len(calls) == 2
    assert {path.name for path in folder.iterdir()} == {NAME, ".lock"}  # no .deb
    assert (folder / NAME).read_bytes() == packed
    assert speech.load_festvox_ru(tmp_path / "cache").source == str(folder)
    # Another .deb is not even unpacked; another content is not kept.
    use(voice, monkeypatch, **fields | {"package_sha256": "0" * 64})
    (folder / NAME).unlink()
    with pytest.raises(DataError, match=r"voice_1.0_all.deb is corrupt or another"):
        speech.load_festvox_ru(tmp_path / "cache")
    assert len((tmp_path / "calls").read_text().splitlines()) == 3
    use(voice, monkeypatch, **fields)
    (voice / "wav" / "ru_2.wav").unlink()
    with pytest.raises(DataError, match="this is what package voice=1.0 gave"):
        speech.load_festvox_ru(tmp_path / "cache")
    assert {path.name for path in folder.iterdir()} == {".lock"}


def test_corrupt_archive_is_set_aside_and_made_again(
    voice, tmp_path, monkeypatch, capsys
):
    fake_debian(tmp_path, monkeypatch)
    packed = use(voice, monkeypatch, installed="/opt/voice", package="voice")
    monkeypatch.setattr(
        speech,
        "FESTVOX_RU",
        dataclasses.replace(speech.FESTVOX_RU, package_sha256=None),
    )
    cached = tmp_path / "cache" / "festvox-ru" / NAME
    cached.parent.mkdir(parents=True)
    cached.write_bytes(packed[:700] + b"\x01" + packed[701:])
    assert speech.load_festvox_ru(tmp_path / "cache").source.startswith("Debian")
    assert cached.read_bytes() == packed
    assert "expected sha256" in capsys.readouterr().err


def test_missing_and_corrupt_data(voice, tmp_path, monkeypatch):
    use(voice, monkeypatch, installed=str(tmp_path / "gone"), package="voice=1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="apt-get and dpkg not found") as error:
        speech.load_festvox_ru(tmp_path / "cache")
    last = str(error.value).splitlines()[-1]
    for part in (
        "python -m experiments.data festvox_ru",
        "ATTN_DATA",
        f"{NAME} (or the folder with wav/*.wav lab/*.lab etc/txt.done.data)",
        "install the Debian package voice.",
    ):
        assert part in last
    # One's own folder is never passed over, and a damaged one is told from another.
    monkeypatch.setenv("ATTN_DATA", str(voice))
    (voice / "wav" / "ru_1.wav").write_bytes(FILES["wav/ru_1.wav"][:-2])
    with pytest.raises(DataError, match=r"\(5 files .*own \(ATTN_DATA\)") as error:
        speech.load_festvox_ru(tmp_path / "cache")
    assert speech.FESTVOX_RU.sha256[NAME] in str(error.value)
    # A folder that only happens to have wav files is another's.
    shutil.rmtree(voice / "lab")
    with pytest.raises(DataError, match="could not be had"):
        speech.load_festvox_ru(tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lab/ru_1.lab": None}, "ru_1 has no labels or no transcript"),
        ({"etc/txt.done.data": b'( ru_2 "x" )\n'}, "ru_1 has no labels or no tran"),
        ({"wav/ru_1.wav": b"RIFF"}, "ru_1.wav in .* is not a whole .wav file"),
        ({"wav/ru_1.wav": wav(samples(1), channels=2)}, "2 channels of 16 bits"),
        ({"wav/ru_1.wav": wav(samples(1).view("u1"))}, "1 channels of 8 bits"),
        ({"wav/ru_1.wav": wav(samples(1), rate=8000)}, r"at \[8000, 16000\] Hz"),
        ({"lab/ru_1.lab": b"#\n0.1 125\n"}, "a line that is not `end 125 phone`"),
        ({"lab/ru_1.lab": b"#\nx 125 a\n"}, "a line that is not `end 125 phone`"),
        ({"lab/ru_1.lab": b"#\n0.1 125 a\n0.1 125 b\n"}, "ends before it begins"),
        ({"lab/ru_1.lab": b"#\n"}, "no segments"),
        ({"lab/ru_1.lab": b"0.1 125 a\n"}, "no segments"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, changes, message):
    folder = write_tree(tmp_path / "voice", **changes)
    use(folder, monkeypatch)
    monkeypatch.setenv("ATTN_DATA", str(folder))
    with pytest.raises(DataError, match=message):
        speech.load_festvox_ru()


# --- Labels and splits -------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 0.010, -0.013])
def test_frame_labels(offset):
    random = np.random.default_rng(3)
    ends = np.cumsum(random.uniform(0.005, 0.06, 20))
    phones = random.integers(0, 9, 20)
    got = speech.frame_labels(ends, phones, 90, window=0.02, hop=0.0125, offset=offset)
    expected = []
    for i in range(90):
        centre = 0.0125 * i + 0.01 - offset
        inside = [p for end, p in zip(ends, phones, strict=True) if centre < end]
        expected.append(inside[0] if inside else phones[-1])
    assert got.tolist() == expected and got.dtype == np.int32
    assert 0.0125 * 90 > ends[-1] + 0.05  # some frames lie behind the last label


def test_frame_labels_on_the_boundary_and_without_frames():
    # Centres at 12.5, 22.5, ... ms: the one at 0.0225 belongs to what begins there.
    ends, phones = np.array([0.0225, 0.0425, 0.1]), np.array([1, 2, 3])
    assert speech.frame_labels(ends, phones, 5).tolist() == [1, 2, 2, 3, 3]
    assert speech.frame_labels(ends, phones, 0).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ends": [0.2, 0.1]}, "ends must be .* increasing"),
        ({"ends": []}, "ends must be at least one time"),
        ({"phone_ids": [1]}, r"phone_ids must be integers \(2,\) .* int64 \(1,\)"),
        ({"phone_ids": [1.0, 2.0]}, "got float64"),
        ({"num_frames": -1}, "num_frames must be at least 0, got -1"),
        ({"hop": 0.0}, "hop more than 0 seconds, got 0.025 and 0.0"),
        ({"window": -0.1}, "window must be 0 or more"),
    ],
)
def test_frame_labels_bad_input(changes, message):
    good = {"ends": [0.1, 0.2], "phone_ids": [1, 2], "num_frames": 3}
    with pytest.raises(ValueError, match=message):
        speech.frame_labels(**(good | changes))


def test_split():
    parts = speech.split_by_utterance(50, seed=0)
    assert [len(part) for part in parts] == [40, 5, 5]
    assert np.sort(np.concatenate(parts)).tolist() == list(range(50))
    # Stored results depend on it: a change must be meant.
    assert parts[1].tolist() == [12, 16, 37, 45, 49]
    assert parts[2].tolist() == [5, 9, 26, 27, 38]
    other = speech.split_by_utterance(50, seed=1, fractions=(0.5, 0.3, 0.2))
    assert [len(part) for part in other] == [25, 15, 10]
    assert not set(parts[2]) <= set(other[2])
    for options, message in (
        ({"fractions": (0.5, 0.5)}, "three positive numbers"),
        ({"fractions": (0.99, 0.005, 0.005)}, "n=50 leave"),
        ({"seed": 0.5}, "seed must be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            speech.split_by_utterance(50, **options)


# --- Synthetic speech --------------------------------------------------------------


def test_toy_speech_needs_its_context():
    toy = speech.toy_speech(6, seed=0)
    assert "SYNTHETIC" in toy.describe() and "no recordings" in toy.source
    tones: dict[str, set[float]] = {}
    for signal, ends, phones in zip(toy.audio, toy.ends, toy.phones, strict=True):
        names = [toy.phone_names[i] for i in phones]
        assert len(signal) / toy.sample_rate - ends[-1] == pytest.approx(
            0.005, abs=1e-3
        )
        before = dict.fromkeys(names, "")
        for i, name in enumerate(names):
            begin, end = (round(t * 16000) for t in ((0, *ends)[i], ends[i]))
            spectrum = np.abs(np.fft.rfft(signal[begin:end], 16000))
            loud = spectrum.max() > 1e5
            tones.setdefault(name, set()).add(
                round(float(spectrum.argmax()) / 100) * 100 if loud else 0
            )
            before[name] = names[i - 1] if i else ""
        assert before["x1"] == "a" and before["x2"] == "b"
    assert tones == {
        "pau": {0},
        "a": {300},
        "b": {600},
        "c": {1200},
        "x1": {2400},
        "x2": {2400},
    }
    assert toy.sha256 == speech.toy_speech(6, seed=0).sha256
    assert toy.sha256 != speech.toy_speech(6, seed=1).sha256
    with pytest.raises(ValueError, match="num_utterances must be at least 1, got 0"):
        speech.toy_speech(0, seed=0)
