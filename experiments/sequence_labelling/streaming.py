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

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax import inputs
from attn_jax._program import program
from attn_jax.models import Labeller
from attn_jax.models.labeller import TransformerBody
from attn_jax.nn.encoder import Encoder
from attn_jax.nn.streaming import StreamState, look_ahead, stream_init, stream_step
from experiments.core import loop
from experiments.core.engine import available_cores
from experiments.core.run import ended_by
from experiments.core.store import Record, ResultsStore, provenance
from experiments.data import sequence_tasks, speech
from experiments.data.sequences import SequenceData
from experiments.data.sound import frame_sizes, log_mel, with_deltas
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
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    variables, rest = states
    leaves = jax.tree.leaves(params)
    return nnx.merge(
        graphdef, jax.tree.unflatten(jax.tree.structure(variables), leaves), rest
    )


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


def cells_of(records: Sequence[Record]) -> list[LabelCell]:
    """The transformers with truncated or full attention of seed 0, final."""
    found = []
    for record in records:
        config = dict(record["config"])
        if config.get("phase") != "final" or config.get("model") != "transformer":
            continue
        if config["seed"] or record["status"] != "done":
            continue
        config["position_options"] = tuple(config["position_options"].items())
        config["differs"] = tuple(sorted(config.get("differs", {}).items()))
        found.append(LabelCell(**config))
    return found


def _concatenation(audio: Sequence[np.ndarray], seconds: float) -> np.ndarray:
    whole = np.concatenate(list(audio))
    return whole[: int(16_000 * seconds)]


def _real_time(sound: SoundLabeller, signal: np.ndarray) -> tuple[float, float]:
    """(seconds of work for a second of sound, slowest chunk in seconds)."""
    slowest = 0.0
    began = last = time.perf_counter()
    for _ in sound.logits(signal):
        now = time.perf_counter()
        slowest, last = max(slowest, now - last), now
    return (time.perf_counter() - began) / (len(signal) / 16_000), slowest


def measure(
    store: ResultsStore, *, utterances: int, seconds: Sequence[float]
) -> dict[str, Any]:
    """Everything that streaming.json holds but its provenance."""
    cells = [
        cell
        for cell in cells_of(store.records())
        if cell.task == "phones" and loop.params_file(store, cell).is_file()
    ]
    if not cells:
        raise FileNotFoundError(
            f"{store.folder} holds no parameters of encoders of speech; first run "
            "`python -m experiments.sequence_labelling --preset phones --out FOLDER` "
            "with a new FOLDER."
        )
    corpus = speech.load_festvox_ru()
    data = sequence_tasks.phones("phones", corpus)
    splits = speech.split_by_utterance(len(corpus.audio), seed=0)
    features, mean, std = sequence_tasks.normalised(corpus)
    test = [int(i) for i in splits[2]]
    longest = max(len(features[i]) for i in test)
    rows = []
    for cell in cells:
        params = labelling.load_params(store, cell, data)
        model = labeller_of(cell, data, params, 100_000)
        hits = total = 0
        difference, logit_difference, largest, agree, labels = 0.0, 0.0, 0.0, 0, 0
        for place, i in enumerate(test):
            signal = corpus.audio[i]
            whole = offline(model, signal, mean, std, length=longest)
            wanted = speech.frame_labels(corpus.ends[i], corpus.phones[i], len(whole))
            hits += int((whole.argmax(-1) == wanted).sum())
            total += len(wanted)
            if cell.attention == "truncated" and place < utterances:
                sound = SoundLabeller(model, mean, std, chunk=10)
                parts = np.concatenate(list(sound.logits(signal)))
                apart = np.abs(_softmax(parts) - _softmax(whole)).max()
                difference = max(difference, float(apart))
                apart = np.abs(parts - whole).max()
                logit_difference = max(logit_difference, float(apart))
                largest = max(largest, float(np.abs(whole).max()))
                agree += int((parts.argmax(-1) == whole.argmax(-1)).sum())
                labels += len(whole)
        row: dict[str, Any] = dict(
            attention=cell.attention,
            left=cell.left,
            right=cell.right,
            positions=cell.positions,
            depth=cell.depth,
            updates=cell.updates,
            whole_utterance_accuracy=hits / total,
        )
        print(
            f"{cell.attention} {cell.left}+{cell.right} {cell.positions}: accuracy on "
            f"whole utterances {hits / total:.4f}",
            flush=True,
        )
        if cell.attention == "truncated":
            sound = SoundLabeller(model, mean, std, chunk=1)
            row |= dict(
                look_ahead_ms=10 * sound.delay,
                probability_difference=difference,
                logit_difference=logit_difference,
                largest_logit=largest,
                agreeing_labels=agree / labels,
                state_bytes=sound.state_bytes(),
                stream=[],
            )
            for chunk in (1, 10):
                sound = SoundLabeller(model, mean, std, chunk=chunk)
                list(sound.logits(_concatenation(corpus.audio, 1.0)))  # compiles
                for length in seconds:
                    signal = _concatenation(corpus.audio, length)
                    factor, slowest = _real_time(sound, signal)
                    row["stream"].append(
                        dict(
                            chunk=chunk,
                            seconds=length,
                            real_time_factor=factor,
                            slowest_chunk_s=slowest,
                        )
                    )
            print(
                f"  stream = offline to {difference:.1e}, {10 * sound.delay} ms late, "
                f"state {row['state_bytes']:,} bytes, real-time factor "
                f"{row['stream'][-1]['real_time_factor']:.3f} at {seconds[-1]:g} s",
                flush=True,
            )
        row["whole"] = []
        for length in seconds:
            signal = _concatenation(corpus.audio, length)
            frames = inputs.num_frames(len(signal), *frame_sizes(16_000))
            shapes = (
                jax.ShapeDtypeStruct((1, frames, mean.size), jnp.float32),
                jax.ShapeDtypeStruct((1, frames), jnp.bool_),
            )
            memory = _whole.lower(model, *shapes).compile().memory_analysis()
            offline(model, signal, mean, std, length=frames)
            began = time.perf_counter()
            offline(model, signal, mean, std, length=frames)
            row["whole"].append(
                dict(
                    seconds=length,
                    real_time_factor=(time.perf_counter() - began) / length,
                    temporary_bytes=int(getattr(memory, "temp_size_in_bytes", 0)),
                )
            )
        rows.append(row)
    return dict(
        utterances_compared=min(utterances, len(test)),
        test_utterances=len(test),
        cores=len(available_cores()),
        rows=rows,
    )


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Measures on one core and writes streaming.json; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--utterances", type=int, default=10, help="compared by frame")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 30.0, 60.0])
    options = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    try:
        store = ResultsStore(options.folder)
        found = measure(store, utterances=options.utterances, seconds=options.seconds)
        path = options.folder / "streaming.json"
        text = json.dumps(found | dict(provenance=provenance()), indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    except Exception as error:
        return ended_by(error)
    print(f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
