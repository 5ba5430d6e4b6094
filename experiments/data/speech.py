"""Recorded speech with phone labels: one Russian speaker, 1.66 hours.

:func:`load_festvox_ru` gives 620 read sentences, 16 kHz, each cut into phones (51
kinds, silence included). It is the voice ``festvox-ru`` of Debian (178.7 MB,
BSD-like licence). The cache keeps the recordings, labels and transcripts as one
archive of 193 MB.

The label times lie on a grid of 10 ms and were probably aligned by a machine. A linear
classifier of frames fits them best when they are moved 10 ms towards the end
(accuracy .505, and .499 unmoved): give :func:`frame_labels` ``offset=0.010`` for that.

:func:`toy_speech` makes tones for tests and smoke runs. They are no data.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import re
import wave
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.data.fetch import DataError, DataSet, Files, obtain, read_tree, seal
from experiments.data.splits import SHARES, Three, check_int, in_three, random_bits

_VOICE = "usr/share/festival/voices/russian/msu_ru_nsh_clunits"

FESTVOX_RU = Files(
    title="The recordings of festvox-ru",
    name="festvox_ru",
    folder="festvox-ru",
    sha256={
        "festvox-ru-0.5.tar": (
            "97bce29f8c93c20cfe2d02dfc905a57d14cca1c9b08f5f3ed8bcfbf1cc6e536e"
        )
    },
    other_folders=("msu_ru_nsh_clunits", _VOICE, "."),
    installed=f"/{_VOICE}",
    package="festvox-ru=0.5+dfsg-6",
    package_sha256="21ef3f0f2978ecf2e2eddb367cb0ff4a72572196d28dc69feb84f4177af5e6c4",
    tree=("wav/*.wav", "lab/*.lab", "etc/txt.done.data"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Speech(DataSet):
    """Utterances and their phones in memory.

    Attributes:
      audio: one int16 array of samples an utterance.
      ends: one float64 array an utterance: where each phone ends, in seconds. The
        first phone begins at 0, each other where the one before it ends.
      phones: one int32 array an utterance: which phone, index into ``phone_names``.
      phone_names: the phones, in order of name.
      sample_rate: samples a second.
      utterances: one name an utterance.
      transcripts: one text an utterance.
    """

    audio: tuple[np.ndarray, ...]
    ends: tuple[np.ndarray, ...]
    phones: tuple[np.ndarray, ...]
    phone_names: tuple[str, ...]
    sample_rate: int
    utterances: tuple[str, ...]
    transcripts: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Length of all utterances together."""
        return sum(map(len, self.audio)) / self.sample_rate

    def contents(self) -> str:
        """How many utterances, hours, segments and phones."""
        return (
            f"{len(self.audio):,} utterances, {self.seconds / 3600:.2f} h at "
            f"{self.sample_rate:,} Hz, {sum(map(len, self.phones)):,} segments of "
            f"{len(self.phone_names)} phones"
        )


# --- Loading -----------------------------------------------------------------------


def load_festvox_ru(cache_dir: str | os.PathLike[str] | None = None) -> Speech:
    """Load the recordings of festvox-ru, in order of name.

    `cache_dir` and DataError are those of :func:`experiments.data.fetch.obtain`.

    Source: N. V. Shmyrev, Russian language support for Festival, 2005.
    """
    folder, source = obtain(FESTVOX_RU, cache_dir)
    return _parse(read_tree(FESTVOX_RU, folder), source)


def _parse(files: Mapping[str, bytes], source: str) -> Speech:
    """Make a `Speech` of wav/NAME.wav, lab/NAME.lab and etc/txt.done.data."""
    transcripts = {}
    for line in files["etc/txt.done.data"].decode("utf-8").splitlines():
        found = re.fullmatch(r'\(\s*(\S+)\s+"(.*)"\s*\)', line.strip())
        if found:
            transcripts[found[1]] = found[2]
    names = sorted(
        pathlib.PurePosixPath(path).stem for path in files if path.endswith(".wav")
    )
    rows, rates = [], set()
    for name in names:
        label = f"lab/{name}.lab"
        if label not in files or name not in transcripts:
            raise DataError(f"{source}: {name} has no labels or no transcript")
        samples, rate = _samples(files[f"wav/{name}.wav"], f"{name}.wav in {source}")
        times, kinds = _segments(files[label], f"{label} in {source}")
        rows.append((name, transcripts[name], samples, times, kinds))
        rates.add(rate)
    if len(rates) != 1:
        raise DataError(f"{source} has recordings at {sorted(rates)} Hz, one is needed")
    return _speech("festvox_ru", source, rates.pop(), rows)


def _samples(content: bytes, where: str) -> tuple[np.ndarray, int]:
    try:
        with wave.open(io.BytesIO(content)) as file:
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                raise DataError(
                    f"{where} has {file.getnchannels()} channels of "
                    f"{8 * file.getsampwidth()} bits, one of 16 is needed"
                )
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            return samples.astype(np.int16, copy=False), file.getframerate()
    except (wave.Error, EOFError, ValueError) as error:
        raise DataError(f"{where} is not a whole .wav file: {error!r}") from error


def _segments(content: bytes, where: str) -> tuple[np.ndarray, list[str]]:
    """Read lines ``end 125 phone`` after a line ``#``."""
    _, mark, body = content.decode("utf-8").partition("#")
    rows = [line.split() for line in body.splitlines() if line.strip()]
    try:
        times = np.array([float(end) for end, _, _ in rows])
        kinds = [phone for _, _, phone in rows]
    except ValueError as error:
        raise DataError(f"{where} has a line that is not `end 125 phone`") from error
    if not mark or not rows or np.any(np.diff(times, prepend=0.0) <= 0):
        raise DataError(f"{where} has no segments, or one that ends before it begins")
    return times, kinds


#: Name, transcript, samples, ends and phones of an utterance.
Row = tuple[str, str, np.ndarray, np.ndarray, Sequence[str]]


def _speech(name: str, source: str, sample_rate: int, rows: Sequence[Row]) -> Speech:
    utterances, transcripts, audio, ends, phones = zip(*rows, strict=True)
    names = tuple(sorted({phone for kinds in phones for phone in kinds}))
    number = {phone: i for i, phone in enumerate(names)}
    ids = tuple(np.array([number[p] for p in kinds], np.int32) for kinds in phones)
    arrays = [array for three in zip(audio, ends, ids, strict=True) for array in three]
    return Speech(
        name=name,
        source=source,
        sha256=seal("\n".join((*names, str(sample_rate))), *arrays),
        audio=audio,
        ends=ends,
        phones=ids,
        phone_names=names,
        sample_rate=sample_rate,
        utterances=utterances,
        transcripts=transcripts,
    )


def toy_speech(num_utterances: int, seed: int) -> Speech:
    """SYNTHETIC utterances of tones at 16 kHz, for tests and smoke runs only.

    Silence, three phones of one tone each, and the pair ``x1``, ``x2``, which share a
    fourth tone: ``x1`` comes after ``a`` and ``x2`` after ``b``, so only the neighbour
    tells which it is. Each is about a second long, and its labels end 5 ms before the
    audio, as in the real set.

    >>> speech = toy_speech(3, seed=0)
    >>> speech.phone_names, len(speech.audio)
    (('a', 'b', 'c', 'pau', 'x1', 'x2'), 3)
    """
    check_int("num_utterances", num_utterances, 1)
    random = np.random.Generator(random_bits(seed, 1))
    rate = 16000
    tones = {"pau": 0, "a": 300, "b": 600, "c": 1200, "x1": 2400, "x2": 2400}
    rows: list[Row] = []
    for i in range(num_utterances):
        kinds = ["pau"]
        for after in random.permutation(["a", "b", "c", "a", "b"]):
            follower = {"a": ["x1"], "b": ["x2"], "c": []}[after]
            kinds += [str(after), *follower]
        kinds.append("pau")
        lengths = random.integers(4, 13, len(kinds)) * 0.01
        times = np.round(np.cumsum(lengths), 5)
        clock = np.arange(int((times[-1] + 0.005) * rate)) / rate
        hertz = np.array([tones[kind] for kind in kinds])[
            np.searchsorted(times, clock, side="right").clip(max=len(kinds) - 1)
        ]
        wave_form = np.sin(2 * np.pi * np.cumsum(hertz) / rate)
        noise = random.standard_normal(len(clock))
        samples = (6000 * wave_form + 60 * noise).astype(np.int16)
        rows.append((f"toy{i}", " ".join(kinds), samples, times, kinds))
    source = f"generated with seed {seed}: no recordings, for tests only"
    return _speech("toy_speech (SYNTHETIC)", source, rate, rows)


# --- Labels and splits -------------------------------------------------------------


def frame_labels(
    ends: np.ndarray,
    phone_ids: np.ndarray,
    num_frames: int,
    *,
    window: float = 0.025,
    hop: float = 0.010,
    offset: float = 0.0,
) -> np.ndarray:
    """Label each frame with the phone that holds its centre.

    Frame i spans ``[i hop, i hop + window]``; it gets the phone that is spoken at
    ``i hop + window / 2 - offset``. Before 0 that is the first phone, after the last
    end the last one.

    Args:
      ends: float [S], where each phone ends, in seconds, increasing.
      phone_ids: integers [S], which phone.
      num_frames: T, number of frames.
      window: length of a frame, in seconds.
      hop: from one frame to the next, in seconds.
      offset: how much later than written the labels are taken to be, in seconds. With
        festvox-ru, 0.010 fits best.

    Returns:
      int32 [T].

    Raises:
      ValueError: an argument is out of range, or lengths do not agree.

    >>> frame_labels(np.array([0.02, 0.05]), np.array([7, 8]), 5).tolist()
    [7, 8, 8, 8, 8]
    >>> frame_labels(np.array([0.02, 0.05]), np.array([7, 8]), 5, offset=0.01).tolist()
    [7, 7, 8, 8, 8]
    """
    ends, phone_ids = np.asarray(ends, np.float64), np.asarray(phone_ids)
    if ends.ndim != 1 or not len(ends) or np.any(np.diff(ends) <= 0):
        raise ValueError(
            f"ends must be at least one time, increasing, of shape [S], got {ends!r}"
        )
    if phone_ids.shape != ends.shape or not np.issubdtype(phone_ids.dtype, np.integer):
        raise ValueError(
            f"phone_ids must be integers {ends.shape} like ends, got "
            f"{phone_ids.dtype} {phone_ids.shape}"
        )
    check_int("num_frames", num_frames, 0)
    if window < 0 or hop <= 0:
        raise ValueError(
            f"window must be 0 or more and hop more than 0 seconds, got {window!r} and "
            f"{hop!r}"
        )
    centres = np.arange(num_frames) * hop + (window / 2 - offset)
    # A millionth of a second keeps a centre on a boundary in the later phone.
    segment = np.searchsorted(ends, centres + 1e-6, side="right")
    return phone_ids[segment.clip(max=len(ends) - 1)].astype(np.int32)


def split_by_utterance(
    n: int, *, seed: int = 0, fractions: tuple[float, float, float] = SHARES
) -> Three:
    """Split n utterances at random, as :func:`experiments.data.splits.in_three`.

    >>> [len(part) for part in split_by_utterance(620)]
    [496, 62, 62]
    """
    return in_three(random_bits(seed, 0).random_raw(n), fractions)
