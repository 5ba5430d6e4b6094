"""Sequence labelling tasks by name: real text, real speech, and small synthetic ones.

| name | one vector is | label | split |
|---|---|---|---|
| "pos" | a word of the Brown corpus, as 9 ids | 12 universal tags | by document |
| "pos_fine" | the same | Brown's tags without suffixes | by document |
| "phones" | 25 ms of recorded Russian speech, every 10 ms | phone | by utterance |
| "order" | a random symbol | the symbol two places before | independent |
| "back:K" | a random symbol | the symbol K places before | independent |
| "relations:K" | 8 random numbers | signs of K numbers nearby | independent |
| "toy_pos", "toy_phones" | synthetic words and tones, for tests | as above | as above |

The speech is one man's: it says nothing about other speakers.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from attn_jax import inputs
from experiments.data import byte_text, sound, speech, text
from experiments.data.fetch import kept, seal
from experiments.data.sequences import Part, SequenceData, crops

TASKS = ("pos", "pos_fine", "phones", "order", "toy_pos", "toy_phones")

SENTENCE_LENGTHS = (16, 32, 64)  # longer sentences, one in 160, are cut
CROP = 256  # frames, 2.56 s: what a model of speech is trained and scored on
ORDER_SYMBOLS, ORDER_BACK = 8, 2
BACK_LENGTH = 128
RELATIONS = (1, -1, 2, -2, 3, -3, 4, -4)  # how many places before; −1 = one after
RELATIONS_LENGTH = 32


def load_task(name: str) -> SequenceData:
    """Loads a task, fetching its data on first use.

    Raises:
      ValueError: the name is unknown.
      DataError: the data cannot be had or is corrupt; the text says what to do.
    """
    if name in ("pos", "pos_fine"):
        return tagging(name, text.load_brown(), fine=name == "pos_fine")
    if name == "toy_pos":
        return tagging(name, text.toy_text(400, seed=0), fine=False)
    if name == "phones":
        return phones(name, speech.load_festvox_ru())
    if name == "toy_phones":
        return phones(name, speech.toy_speech(30, seed=0))
    if name == "order":
        return order(name)
    kind, _, number = name.partition(":")
    if kind in ("back", "relations") and number.isdecimal():
        return (back if kind == "back" else relations)(int(number))
    known = ", ".join((*TASKS, "back:K", "relations:K"))
    raise ValueError(f"task must be one of {known}, got {name!r}.")


def vocabulary_of(corpus: text.Text) -> text.Vocabulary:
    """The words that a tagging task's training part has at least three times."""
    train = text.split_by_document(corpus, seed=0)[0]
    words = [corpus.words[i] for i in train]
    return text.Vocabulary(words, minimum_count=3, buckets=1024)


def tagging(
    name: str,
    corpus: text.Text,
    *,
    fine: bool,
    vocabulary: text.Vocabulary | None = None,
    lengths: tuple[int, ...] = SENTENCE_LENGTHS,
) -> SequenceData:
    """Part-of-speech tagging: three parts without a common document.

    Each word is nine ids: itself where training has it at least three times, hashed
    endings and beginnings, and its shape. All models get the same. Groups of the
    scored parts: words that were ambiguous in the whole training part, and words not
    seen in it.
    Sentences longer than the last of ``lengths`` are cut into pieces. Without a
    ``vocabulary``, it is `vocabulary_of` the corpus.
    """
    simplify = text.strip_suffixes if fine else text.universal
    tags = [tuple(map(simplify, sentence)) for sentence in corpus.tags]
    names = tuple(sorted(set(itertools.chain.from_iterable(tags))))
    number = {tag: i for i, tag in enumerate(names)}
    splits = text.split_by_document(corpus, seed=0)
    train_words = [corpus.words[i] for i in splits[0]]
    vocabulary = vocabulary or vocabulary_of(corpus)
    ambiguous = text.ambiguous_words(train_words, [tags[i] for i in splits[0]])
    known = {word.lower() for sentence in train_words for word in sentence}

    def part(indices: Sequence[int] | np.ndarray) -> Part:
        words = [corpus.words[i] for i in indices]
        lower = [[word.lower() for word in sentence] for sentence in words]
        whole = Part(
            [vocabulary.token_features(sentence) for sentence in words],
            [np.array([number[t] for t in tags[i]], np.int32) for i in indices],
            {
                "ambiguous": [np.array([w in ambiguous for w in s]) for s in lower],
                "unknown": [np.array([w not in known for w in s]) for s in lower],
            },
        )
        return crops(whole, lengths[-1])

    train, validation, test = map(part, splits)
    return SequenceData(
        name=name,
        source=corpus.source,
        sha256=corpus.sha256,
        inputs=tuple(vocabulary.feature_sizes),
        class_names=names,
        train=train,
        validation=validation,
        test=test,
        lengths=lengths,
        has_unknown=True,
    )


def classifying(
    name: str,
    documents: byte_text.Documents,
    vocabulary: text.Vocabulary,
    lengths: tuple[int, ...],
    sizes: Sequence[int] | None = None,
) -> SequenceData:
    """The class of a text, from ids of its first words as `tagging` has them.

    The parts are those that `byte_text.classified` has. What is in no vocabulary, such
    as words of most languages, is told by its endings and beginnings.

    Args:
      name: of the task.
      documents: with classes.
      vocabulary: makes the ids.
      lengths: padded lengths; of a text, as many words as the last one are read.
      sizes: most texts of each part; by default all there are.

    >>> toy = byte_text.toy_documents(40)
    >>> data = classifying("toy", toy, text.Vocabulary([("a",)]), (4, 8))
    >>> data.one_label, len(data.class_names), data.train.inputs[0].shape[1]
    (True, 3, 9)
    """

    def part(rows: np.ndarray) -> Part:
        words = {
            i: text.words_of(documents.texts[i].decode("utf-8", "replace"))
            for i in rows.tolist()
        }
        known = [(i, found[: lengths[-1]]) for i, found in words.items() if found]
        return Part(
            [vocabulary.token_features(found) for _, found in known],
            [np.full(len(found), documents.labels[i], np.int32) for i, found in known],
        )

    train, validation, test = map(part, byte_text.parts_of(documents, sizes))
    return SequenceData(
        name=name,
        source=documents.source,
        sha256=documents.sha256,
        inputs=tuple(vocabulary.feature_sizes),
        class_names=documents.class_names,
        train=train,
        validation=validation,
        test=test,
        lengths=lengths,
        has_unknown=True,
        one_label=True,
    )


def tagging_baselines(data: SequenceData) -> dict[str, Callable[[], dict[str, Any]]]:
    """The most frequent tag, of all words and of each word, for a tagging task."""
    return {
        "majority": functools.partial(majority, data),
        "most_frequent_tag": functools.partial(most_frequent, data, by_suffix=False),
        "most_frequent_tag_by_suffix": functools.partial(
            most_frequent, data, by_suffix=True
        ),
    }


def most_frequent(
    data: SequenceData, *, by_suffix: bool, rows: np.ndarray | None = None
) -> dict[str, Any]:
    """Each word has its most frequent tag in training, or in some rows of it."""
    toy = data.name == "toy_pos"
    corpus = text.toy_text(400, seed=0) if toy else text.load_brown()
    train, _, test = text.split_by_document(corpus, seed=0)
    longest = data.max_length

    def words(split: np.ndarray) -> list[tuple[str, ...]]:
        """Cut as the sentences of the task are."""
        return [
            corpus.words[i][start : start + longest]
            for i in split
            for start in range(0, len(corpus.words[i]), longest)
        ]

    tags = [tuple(y.tolist()) for y in data.train.labels]
    known = words(train)
    if rows is not None:
        known, tags = ([part[i] for i in rows] for part in (known, tags))
    found = text.most_frequent_tag(known, tags, words(test), by_suffix=by_suffix)
    return _accuracies(data.test, [np.array(row) for row in found])


def _accuracies(part: Part, predicted: Sequence[np.ndarray]) -> dict[str, Any]:
    from experiments.tasks.labelling import scores

    found = scores(part, list(predicted))
    return {f"test_{name}": value for name, value in found.items()}


def majority(data: SequenceData) -> dict[str, Any]:
    """Every label is the most frequent one of the training part."""
    counts = np.bincount(np.concatenate(list(data.train.labels)))
    best = int(counts.argmax())
    result = _accuracies(data.test, [np.full_like(y, best) for y in data.test.labels])
    if data.whole_test is not None:
        # The same frames: what is cut loses none.
        result |= {k.replace("test_", "test_whole_"): v for k, v in result.items()}
    return result


def speech_features(corpus: speech.Speech) -> Iterator[np.ndarray]:
    """40 log-mel energies of every frame, with first and second differences."""
    rate = corpus.sample_rate
    jitted = jax.jit(
        lambda signal: sound.with_deltas(
            sound.log_mel(signal, sample_rate=rate, num_mels=40), order=2
        )
    )
    # Few lengths, few programs: the sound goes on mirrored at its end, and the frames
    # of that are cut off again. Only the differences of the last four frames see it.
    for signal, count in zip(corpus.audio, _frames_of(corpus), strict=True):
        size = -(-len(signal) // rate) * rate
        longer = np.pad(signal, (0, size - len(signal)), mode="reflect")
        yield np.asarray(jitted(longer))[:count]


def _frames_of(corpus: speech.Speech) -> list[int]:
    """How many frames each utterance has."""
    hop, window = corpus.sample_rate // 100, corpus.sample_rate // 40
    return [inputs.num_frames(len(signal), window, hop) for signal in corpus.audio]


def normalised(
    corpus: speech.Speech,
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Features of every utterance, and mean and deviation of the training part.

    All are made once and kept in the cache: see `fetch.kept`.
    """

    def make() -> np.ndarray:
        features = list(speech_features(corpus))
        train = speech.split_by_utterance(len(features), seed=0)[0]
        seen = np.concatenate([features[i] for i in train])
        mean, std = seen.mean(axis=0), seen.std(axis=0) + 1e-5
        return np.concatenate([*features, mean[None], std[None]])

    parts = (speech_features, make, sound, inputs, speech.split_by_utterance)
    code = [inspect.getsource(part) for part in parts]
    found = kept(
        f"{corpus.name.split()[0]}_features",
        seal(corpus.sha256, *code),
        make,
    )
    *features, mean, std, _ = np.split(found, np.cumsum([*_frames_of(corpus), 1, 1]))
    return features, mean[0], std[0]


def phones(name: str, corpus: speech.Speech) -> SequenceData:
    """Framewise phones: every utterance cut into pieces of 2.56 s.

    Models are trained on the pieces, and scored on pieces and on whole utterances.
    Features are normalised by the mean and deviation of the training part. Their
    differences reach four frames to either side, so even a model that labels each
    vector by itself has seen 105 ms. Frames that are no pause are scored by themselves
    too.
    """
    features, mean, std = normalised(corpus)
    splits = speech.split_by_utterance(len(features), seed=0)
    pauses = [i for i, p in enumerate(corpus.phone_names) if p in ("pau", "sil", "#")]

    def uncut(indices: Sequence[int] | np.ndarray) -> Part:
        labels = [
            speech.frame_labels(corpus.ends[i], corpus.phones[i], len(features[i]))
            for i in indices
        ]
        return Part(
            [((features[i] - mean) / std).astype(np.float32) for i in indices],
            labels,
            {"speech": [~np.isin(y, pauses) for y in labels]},
        )

    whole = [uncut(indices) for indices in splits]
    train, validation, test = (crops(part, CROP) for part in whole)
    return SequenceData(
        name=name,
        source=corpus.source,
        sha256=corpus.sha256,
        inputs=features[0].shape[1],
        class_names=tuple(corpus.phone_names),
        train=train,
        validation=validation,
        test=test,
        lengths=(CROP,),
        whole_test=whole[2],
    )


def order(name: str = "order", *, seed: int = 0) -> SequenceData:
    """Each label is the symbol two places before; what is there is all that counts.

    Symbols are drawn evenly, so a model that does not know the order can only guess: a
    symbol that is frequent in the sequence, or "none", the label of the first two.
    Training sequences have 8 to 32 symbols, those that are scored 8 to 128, in groups
    by length.
    """
    random = np.random.Generator(np.random.PCG64([seed, 7]))

    def part(count: int, longest: Sequence[int]) -> Part:
        xs, ys = [], []
        for i in range(count):
            low, high = list(itertools.pairwise(longest))[i % (len(longest) - 1)]
            x = random.integers(0, ORDER_SYMBOLS, random.integers(low, high) + 1)
            xs.append(x[:, None].astype(np.int32))
            ys.append(_symbols_before(x, ORDER_BACK))
        return Part(xs, ys, length_groups(ys, longest))

    parts = [part(8000, (7, 32)), part(900, (7, 32)), part(1500, (7, 32, 64, 128))]
    names = (*map(str, range(ORDER_SYMBOLS)), "none")
    return _drawn(name, seed, parts, (ORDER_SYMBOLS,), names, (32, 64, 128))


def _symbols_before(x: np.ndarray, offset: int) -> np.ndarray:
    """The symbol so many places before each, [T]; "none" where there is no such."""
    y = np.full_like(x, ORDER_SYMBOLS)
    y[offset:] = x[:-offset]
    return y.astype(np.int32)


def _drawn(
    name: str,
    seed: int,
    parts: Sequence[Part],
    inputs: int | tuple[int, ...],
    class_names: tuple[str, ...],
    lengths: tuple[int, ...],
) -> SequenceData:
    """A synthetic task of a training, a validation and a test part."""
    return SequenceData(
        name=name,
        source=f"drawn here, seed {seed} (synthetic)",
        sha256=seal(*(str(y.tolist()) for p in parts for y in p.labels)),
        inputs=inputs,
        class_names=class_names,
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        lengths=lengths,
    )


def back(offset: int, *, seed: int = 0) -> SequenceData:
    """Each label is the symbol ``offset`` places before: the others say nothing of it.

    Sequences have 128 symbols, drawn evenly. The labels of the first ``offset`` are
    "none"; the group "known" is that of the others.

    Raises:
      ValueError: the offset is not in 1 … 127.

    >>> data = back(3)
    >>> x, y = data.test.inputs[0][:, 0], data.test.labels[0]
    >>> bool((y[3:] == x[:-3]).all()), data.class_names[y[2]]
    (True, 'none')
    """
    if not 1 <= offset < BACK_LENGTH:
        raise ValueError(
            f"offset must be 1 to {BACK_LENGTH - 1}, less than the symbols of a "
            f"sequence, got {offset}."
        )
    random = np.random.Generator(np.random.PCG64([seed, 8]))
    known = np.arange(BACK_LENGTH) >= offset

    def part(count: int) -> Part:
        xs = [random.integers(0, ORDER_SYMBOLS, BACK_LENGTH) for _ in range(count)]
        ys = [_symbols_before(x, offset) for x in xs]
        xs = [x[:, None].astype(np.int32) for x in xs]
        return Part(xs, ys, {"known": [known] * count})

    names = (*map(str, range(ORDER_SYMBOLS)), "none")
    parts = [part(count) for count in (500, 60, 120)]
    return _drawn(
        f"back:{offset}", seed, parts, (ORDER_SYMBOLS,), names, (BACK_LENGTH,)
    )


def relations(count: int, *, seed: int = 0) -> SequenceData:
    """Each label tells of one number in each of ``count`` vectors nearby.

    A vector is 8 independent normal numbers. Relation j looks `RELATIONS`[j] places
    before, and bit j of the label is whether number j of the vector there is positive;
    the bits of no relation are 0. What mixes vectors with one set of weights, as a head
    of fixed weights does, mixes number j of the right vector with those of the others:
    of m mixtures, at most m numbers are read exactly. Where a place lies beyond the
    ends the label is "none"; the group "known" is that of the others.

    Raises:
      ValueError: the count is not in 1 … 8.

    >>> data = relations(2)  # number 0 of the one before, number 1 of the one after
    >>> x, y = data.test.inputs[0], data.test.labels[0]
    >>> bool(y[5] == (x[4, 0] > 0) + 2 * (x[6, 1] > 0))
    True
    """
    most = len(RELATIONS)
    if not 1 <= count <= most:
        raise ValueError(f"count must be 1 to {most}, got {count}.")
    random = np.random.Generator(np.random.PCG64([seed, 9]))
    places = np.arange(RELATIONS_LENGTH)[:, None] - np.array(RELATIONS[:count])
    known = ((places >= 0) & (places < RELATIONS_LENGTH)).all(axis=1)
    places = places.clip(0, RELATIONS_LENGTH - 1)
    bits, columns = 1 << np.arange(count), np.arange(count)

    def part(size: int) -> Part:
        shape = (RELATIONS_LENGTH, most)
        xs = [random.standard_normal(shape).astype(np.float32) for _ in range(size)]
        ys = [np.where(known, (x[places, columns] > 0) @ bits, 1 << most) for x in xs]
        labels = [y.astype(np.int32) for y in ys]
        return Part(xs, labels, {"known": [known] * size})

    # The same names for every count, so that its models share their programs.
    codes = (format(code, f"0{most}b")[::-1] for code in range(1 << most))
    return _drawn(
        f"relations:{count}",
        seed,
        [part(size) for size in (2_000, 250, 500)],
        most,
        (*codes, "none"),
        (RELATIONS_LENGTH,),
    )


def length_groups(
    labels: Sequence[np.ndarray], edges: Sequence[int]
) -> dict[str, list[np.ndarray]]:
    """Groups of labels by the length of their sequence, (edge, next edge].

    >>> groups = length_groups([np.zeros(3, int), np.zeros(5, int)], (0, 4, 8))
    >>> {name: [m.any().item() for m in masks] for name, masks in groups.items()}
    {'length_1_4': [True, False], 'length_5_8': [False, True]}
    """
    return {
        f"length_{low + 1}_{high}": [
            np.full(len(y), low < len(y) <= high) for y in labels
        ]
        for low, high in itertools.pairwise(edges)
    }
