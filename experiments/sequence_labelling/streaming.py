"""Truncated self-attention on speech as it comes: is it the same, and is it in time?

`python -m experiments.sequence_labelling.streaming FOLDER` takes the encoders that
`--preset phones` trained and kept in FOLDER, and writes streaming.json there:

* accuracy on whole utterances for every window (left, right) and for full attention;
* the largest difference of a phone's probability, and of a logit,
  between labelling sound as it comes and labelling the whole utterance at once;
* the real-time factor on one core (seconds of work for a second of sound), for
  concatenations of utterances up to 60 s, and how much memory each takes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax import inputs
from attn_jax.models import Labeller
from attn_jax.models.labeller import TransformerBody
from attn_jax.nn.encoder import Encoder
from attn_jax.nn.streaming import StreamState, look_ahead, stream_init, stream_step
from experiments.core import loop, optim
from experiments.core.engine import available_cores
from experiments.core.measure import Folder, measures, one_core, seconds_of
from experiments.core.store import ResultsStore
from experiments.data import sequence_tasks, speech
from experiments.data.sequences import SequenceData
from experiments.data.sound import frame_sizes, log_mel, with_deltas
from experiments.sequence_labelling.report import STREAMING
from experiments.tasks import labelling
from experiments.tasks.labelling import LabelCell

WIDTH = 4  # frames on either side that first and second differences reach


def encoder_of(model: Labeller) -> Encoder:
    """The encoder of a labeller whose body is a transformer."""
    assert isinstance(model.body, TransformerBody)
    return model.body.encoder


def labeller_of(
    cell: LabelCell, data: SequenceData, params: Any, max_length: int
) -> Labeller:
    """The model of a cell with trained parameters, for sequences of any length."""
    key = labelling.program_key(cell, data)
    model = labelling.build_model(dataclasses.replace(key, max_length=max_length), 0)
    return optim.with_params(model, params)


def kept_cells(
    store: ResultsStore, what: str, preset: str, **settings: Any
) -> list[LabelCell]:
    """Transformers of these settings, of seed 0 if not said, with kept parameters.

    Args:
      store: of the results.
      what: they are, in words.
      preset: that trains them.
      **settings: of a cell; ``seed=None`` takes all seeds.

    Raises:
      FileNotFoundError: there is none.
    """
    found = []
    wanted = dict(phase="final", model="transformer", seed=0) | settings
    if wanted["seed"] is None:
        del wanted["seed"]
    for record in store.records():
        config = dict(record["config"])
        if record["status"] == "done" and wanted.items() <= config.items():
            config["position_options"] = tuple(config["position_options"].items())
            config["differs"] = tuple(sorted(config.get("differs", {}).items()))
            cell = LabelCell(**config)
            if loop.params_file(store, cell).is_file():
                found.append(cell)
    if not found:
        raise FileNotFoundError(
            f"{store.folder} holds no parameters of {what}; first run `python -m "
            f"experiments.sequence_labelling --preset {preset} --out FOLDER` with a "
            "new FOLDER."
        )
    return found


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("mel", "real", "encoder"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class State:
    """What a stream of sound remembers: 8 log-mel frames, and the encoder's state.

    Attributes:
      mel: [8, 40], the last frames.
      real: bool [4], which of the last four exist.
      encoder: of `stream_step`.
    """

    mel: jax.Array
    real: jax.Array
    encoder: StreamState


@functools.partial(jax.jit, donate_argnums=1)
def _step(
    model: Labeller,
    state: State,
    mel: jax.Array,
    real: jax.Array,
    mean: jax.Array,
    std: jax.Array,
) -> tuple[State, jax.Array, jax.Array]:
    """C more log-mel frames; logits [c, classes] of earlier ones, and which exist."""
    count = mel.shape[0]
    near = jnp.concatenate([state.mel, mel])  # the c frames of `at`, 4 on either side
    at = slice(WIDTH, WIDTH + count)
    features = (with_deltas(near, order=2)[at] - mean[None]) / std[None]
    exist = jnp.concatenate([state.real, real])
    x = model.input(features[None])[0]
    encoder, out, valid = stream_step(
        encoder_of(model), state.encoder, x, exist[:count]
    )
    after = State(near[count:], exist[count:], encoder)
    return after, model.head(out), valid


@jax.jit
def _log_mel(samples: jax.Array) -> jax.Array:
    return log_mel(samples, num_mels=40)


class SoundLabeller:
    """Labels sound as it comes, `chunk` frames of 10 ms at a time.

    Args:
      model: a labeller whose encoder attends by "truncated".
      mean, std: [120], of the training features.
      chunk: frames that are taken at once.
    """

    def __init__(self, model: Labeller, mean: Any, std: Any, *, chunk: int = 1):
        self.model, self.chunk = model, chunk
        self.mean, self.std = jnp.asarray(mean), jnp.asarray(std)
        self.window, self.hop = frame_sizes(16_000)
        # An output waits for the encoder's look-ahead and for the differences'.
        self.delay = look_ahead(encoder_of(model)) + WIDTH

    def first(self, mel: jax.Array) -> State:
        """The state before the first frame, whose beginning is repeated."""
        return State(
            jnp.repeat(mel[:1], 2 * WIDTH, axis=0),
            jnp.zeros(WIDTH, bool),
            stream_init(encoder_of(self.model), chunk=self.chunk),
        )

    def logits(self, signal: np.ndarray) -> Iterator[np.ndarray]:
        """Logits [k, classes] as soon as they are known, all T in the end.

        The sound is read chunk by chunk, and nothing of it is kept but the state.
        """
        total = inputs.num_frames(len(signal), self.window, self.hop)
        if not total:
            raise ValueError(
                f"signal must have at least {self.window} samples, one frame, got "
                f"{len(signal)}."
            )
        chunk, state = self.chunk, None
        last: Any = None
        for start in range(0, total + self.delay, chunk):
            real = np.arange(start, start + chunk) < total
            if real.all():
                begin = start * self.hop
                end = begin + (chunk - 1) * self.hop + self.window
                mel = _log_mel(signal[begin:end])
                last = mel[-1:]
            else:  # at the end, its last frame is repeated
                count = int(real.sum())
                rest = signal[start * self.hop :]
                known = [_log_mel(rest)[:count]] if count else []
                last = known[0][-1:] if known else last
                mel = jnp.concatenate([*known, jnp.repeat(last, chunk - count, axis=0)])
            if state is None:
                state = self.first(mel)
            state, out, valid = _step(
                self.model, state, mel, jnp.asarray(real), self.mean, self.std
            )
            yield np.asarray(out)[np.asarray(valid)]

    def state_bytes(self) -> int:
        """Bytes that are remembered between chunks, whatever has come."""
        state = self.first(jnp.zeros((1, 40)))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def offline(
    model: Labeller, signal: np.ndarray, mean: Any, std: Any, *, length: int
) -> np.ndarray:
    """Logits [T, classes] of the whole sound at once, padded to ``length`` frames."""
    mel = np.asarray(_log_mel(signal))
    features = (np.asarray(with_deltas(mel, order=2)) - mean) / std
    batch = np.zeros((1, length, features.shape[1]), np.float32)
    batch[0, : len(mel)] = features
    real = np.arange(length)[None] < len(mel)
    return np.asarray(_whole(model, batch, real))[0, : len(mel)]


@jax.jit
def _whole(model: Labeller, batch: jax.Array, real: jax.Array) -> jax.Array:
    return model(batch, real)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _real_time(sound: SoundLabeller, signal: np.ndarray) -> tuple[float, float]:
    """(seconds of work for a second of sound, slowest chunk in seconds)."""
    slowest = 0.0
    began = last = time.perf_counter()
    for _ in sound.logits(signal):
        now = time.perf_counter()
        slowest, last = max(slowest, now - last), now
    return (time.perf_counter() - began) / (len(signal) / 16_000), slowest


class _Speech:
    """The test part as sound, and how its features are normalised."""

    def __init__(self) -> None:
        self.corpus = speech.load_festvox_ru()
        self.data = sequence_tasks.phones("phones", self.corpus)
        features, *self.normal = sequence_tasks.normalised(self.corpus)
        splits = speech.split_by_utterance(len(self.corpus.audio), seed=0)
        self.test = [int(i) for i in splits[2]]
        self.longest = max(len(features[i]) for i in self.test)

    def concatenation(self, seconds: float) -> np.ndarray:
        """So much sound, one utterance after the other."""
        return np.concatenate(list(self.corpus.audio))[: int(16_000 * seconds)]


def _scored(model: Labeller, sound: _Speech, streamed: int) -> dict[str, float]:
    """Accuracy on whole utterances, and how far some are from it as they come."""
    hits, pairs = [], []
    for place, i in enumerate(sound.test):
        signal, corpus = sound.corpus.audio[i], sound.corpus
        whole = offline(model, signal, *sound.normal, length=sound.longest)
        wanted = speech.frame_labels(corpus.ends[i], corpus.phones[i], len(whole))
        hits.append(whole.argmax(-1) == wanted)
        if place < streamed:
            stream = SoundLabeller(model, *sound.normal, chunk=10)
            pairs.append((np.concatenate(list(stream.logits(signal))), whole))
    found = dict(whole_utterance_accuracy=float(np.concatenate(hits).mean()))
    if pairs:
        parts, whole = (np.concatenate(side) for side in zip(*pairs, strict=True))
        apart = np.abs(_softmax(parts) - _softmax(whole))
        found |= dict(
            probability_difference=float(apart.max()),
            logit_difference=float(np.abs(parts - whole).max()),
            largest_logit=float(np.abs(whole).max()),
            agreeing_labels=float((parts.argmax(-1) == whole.argmax(-1)).mean()),
        )
    return found


def _streamed(
    model: Labeller, sound: _Speech, seconds: Sequence[float]
) -> dict[str, Any]:
    """How late, how fast, and how much is remembered, a chunk at a time."""
    rows = []
    for chunk in (1, 10):
        stream = SoundLabeller(model, *sound.normal, chunk=chunk)
        list(stream.logits(sound.concatenation(1.0)))  # compiles
        for length in seconds:
            factor, slowest = _real_time(stream, sound.concatenation(length))
            row = dict(chunk=chunk, seconds=length, real_time_factor=factor)
            rows.append(row | dict(slowest_chunk_s=slowest))
    stream = SoundLabeller(model, *sound.normal, chunk=1)
    size = stream.state_bytes()
    return dict(look_ahead_ms=10 * stream.delay, state_bytes=size, stream=rows)


def _at_once(model: Labeller, sound: _Speech, length: float) -> dict[str, Any]:
    """Time and memory of the whole at once."""
    signal = sound.concatenation(length)
    frames = inputs.num_frames(len(signal), *frame_sizes(16_000))
    shapes = (
        jax.ShapeDtypeStruct((1, frames, sound.normal[0].size), jnp.float32),
        jax.ShapeDtypeStruct((1, frames), jnp.bool_),
    )
    memory = _whole.lower(model, *shapes).compile().memory_analysis()
    call = functools.partial(offline, model, signal, *sound.normal, length=frames)
    return dict(
        seconds=length,
        real_time_factor=seconds_of(call, 1)[0] / length,
        temporary_bytes=int(getattr(memory, "temp_size_in_bytes", 0)),
    )


def measure(
    folder: Folder,
    *,
    utterances: int = 10,
    seconds: tuple[float, ...] = (10.0, 30.0, 60.0),
) -> dict[str, Any]:
    """Measures truncated self-attention on speech as it comes, on one core.

    Args:
      folder: of the results, with the parameters that were kept.
      utterances: that are compared by frame.
      seconds: of the concatenations that are timed.
    """
    one_core()
    store = ResultsStore(folder)
    cells = kept_cells(store, "encoders of speech", "phones", task="phones")
    sound, rows = _Speech(), []
    names = "attention left right positions depth updates".split()
    for cell in cells:
        truncated = cell.attention == "truncated"
        params = labelling.load_params(store, cell, sound.data)
        model = labeller_of(cell, sound.data, params, 100_000)
        row: dict[str, Any] = {name: getattr(cell, name) for name in names}
        row |= _scored(model, sound, utterances * truncated)
        if truncated:
            row |= _streamed(model, sound, seconds)
        row["whole"] = [_at_once(model, sound, length) for length in seconds]
        rows.append(row)
        print(
            "{attention} {left}+{right} {positions}: accuracy on whole utterances "
            "{whole_utterance_accuracy:.4f}".format(**row),
            flush=True,
        )
    return dict(
        utterances_compared=min(utterances, len(sound.test)),
        test_utterances=len(sound.test),
        cores=len(available_cores()),
        rows=rows,
    )


main = measures(STREAMING, measure)

if __name__ == "__main__":
    sys.exit(main())
