"""Cells that restore hidden words, and cells that go on from what those have learnt."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.models import Labeller, MaskedLM, choose_hidden, hide
from attn_jax.models.masked_lm import Hidden, most_hidden
from attn_jax.tools.cost import call_cost
from experiments.core import devices, optim
from experiments.core.cell import Cell, Count, Dtype, Rule, Share, variant_of
from experiments.core.loop import Program, Task, in_epochs, load_params
from experiments.core.plan import Study
from experiments.core.store import ResultsStore, config_hash
from experiments.data.corpus import Corpus, Windows
from experiments.data.fetch import seal
from experiments.data.sequences import IGNORED, SequenceData
from experiments.pretraining import probing
from experiments.tasks.labelling import LabelCell, LabelTask, losses_of

MODEL = "masked_lm"
KNOWN = 2  # the first id of a word of the vocabulary: none but these are hidden
DRAWN = 12  # hidden words that are shown with what is filled in
BESIDE = 6  # words shown on either side of one


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedCell(Cell):
    """A cell that is pre-trained.

    Attributes:
      batch_size: windows of an update.
      length: words of a window.
      dim, depth, mlp_dim, num_heads, positions: of the encoder.
      attention: its variant, by name or file.
      attention_sha256: of the file, where ``attention`` names one.
      masked: share of the words that is restored.
      next_sentence: whether it is learnt too if the second half of a window follows on
        the first; half of the windows then have another's.
      dropout_rate: of the model.
      dtype: dtype of the computation; parameters stay float32.
    """

    model: str = MODEL
    batch_size: Count = 64
    length: Count = 128
    dim: Count = 128
    depth: Count = 4
    mlp_dim: Count = 512
    num_heads: Count = 4
    attention: str = "dot_product"
    attention_sha256: str | None = None
    positions: str = "rope"
    masked: Share = 0.15
    next_sentence: bool = False
    dropout_rate: Share = 0.0
    dtype: Dtype = "float32"

    def rules(self) -> Iterator[Rule]:
        words = f"a multiple of num_heads={self.num_heads}"
        yield "dim", self.dim % self.num_heads == 0, words
        yield "masked", self.masked > 0, "above 0"
        enough = self.batch_size >= 2 or not self.next_sentence
        yield "batch_size", enough, "at least 2 with next_sentence"

    def traits(self) -> Iterator[str]:
        yield f"attention={self.attention} dim={self.dim} depth={self.depth}"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a compiled program depends on; cells that agree in it share one."""

    length: int
    dim: int
    depth: int
    mlp_dim: int
    num_heads: int
    attention: str
    attention_sha256: str | None
    positions: str
    masked: float
    next_sentence: bool
    dropout_rate: float
    dtype: str

    @classmethod
    def of(cls, cell: MaskedCell) -> Shape:
        """Of a cell."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(cell, name) for name in names})


def build_model(shape: Shape, corpus: Corpus, seed: int) -> MaskedLM:
    """The model of a shape with its initial parameters."""
    dtype = None if shape.dtype == "float32" else jnp.dtype(shape.dtype)
    tower = Labeller(
        corpus.inputs,
        2,
        body="transformer",
        dim=shape.dim,
        depth=shape.depth,
        mlp_dim=shape.mlp_dim,
        num_heads=shape.num_heads,
        attention=variant_of(shape.attention, shape.attention_sha256),
        positions=shape.positions,
        max_length=shape.length,
        pool="mean",
        dropout_rate=shape.dropout_rate,
        dtype=dtype,
        rngs=nnx.Rngs(seed),
    )
    words = len(corpus.vocabulary)
    return MaskedLM(tower, words, dtype=dtype, rngs=nnx.Rngs(params=seed + 1_000_003))


def swapped(rng: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Windows of which half go on with the second half of the one before in the batch.

    Args:
      rng: key.
      ids: int [B, T, K].

    Returns:
      The same, and int32 [B]: 1 where a window is still its own.

    >>> ids = jnp.arange(8).reshape(2, 4, 1)
    >>> found, follows = swapped(jax.random.key(0), ids)
    >>> found.shape, follows.shape, bool((found[:, :2] == ids[:, :2]).all())
    ((2, 4, 1), (2,), True)
    """
    half = ids.shape[1] // 2
    follows = jax.random.bernoulli(rng, 0.5, ids.shape[:1])
    second = ids[:, half:]
    second = jnp.where(follows[:, None, None], second, jnp.roll(second, 1, axis=0))
    found = jnp.concatenate([ids[:, :half], second], axis=1)
    return found, follows.astype(jnp.int32)


def _asked(ids: jax.Array, hidden: Hidden) -> jax.Array:
    """Numbers of the hidden words, int32 [B, M], `IGNORED` where nothing is asked."""
    words = jnp.take_along_axis(ids[..., 0], hidden.where, axis=1)
    return jnp.where(hidden.asked, words, IGNORED)


def _real(ids: jax.Array) -> jax.Array:
    return jnp.ones(ids.shape[:2], bool)  # windows are full


@functools.lru_cache(maxsize=32)
def program_of(shape: Shape, corpus: Corpus) -> Program:
    """What cells of a shape compute.

    "restore" gives of windows (ids, hidden) logits [B, M, V]; "predict" the summed
    loss, hits and how many were asked for, [B]; "layers" what each layer makes of ids
    [B, T, K], see `probing.layers_of`.
    """
    model = build_model(shape, corpus, 0)
    apply, _ = optim.split_model(model)
    layers, _ = optim.split_model(probing.Layers(model.tower))
    mask, words = corpus.mask, corpus.words

    def loss(
        params: Any, batch: Any, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        ids = jnp.asarray(batch)
        swap_rng, choose_rng, hide_rng, rng = jax.random.split(rng, 4)
        follows = None
        if shape.next_sentence:
            ids, follows = swapped(swap_rng, ids)
        choose = functools.partial(choose_hidden, share=shape.masked)
        eligible = ids[..., 0] >= KNOWN
        hidden = jax.vmap(choose)(jax.random.split(choose_rng, len(ids)), eligible)
        cover = functools.partial(
            hide, mask=jnp.asarray(mask), words=jnp.asarray(words)
        )
        seen = jax.vmap(cover)(jax.random.split(hide_rng, len(ids)), ids, hidden)
        inputs = (seen, _real(ids), hidden.where, *[True] * shape.next_sentence)
        logits, moved = optim.training_call(apply, params, *inputs, rng=rng)
        labels, metrics = _asked(ids, hidden), {}
        second = jnp.zeros(())
        if follows is not None:
            logits, said = logits
            second = losses_of(said, follows)[0].mean()
            right = jnp.argmax(said, -1) == follows
            metrics["follows_accuracy"] = right.astype(jnp.float32).mean()
        losses, asked = losses_of(logits, labels)
        count = jnp.maximum(asked.sum(), 1).astype(jnp.float32)
        hits = ((jnp.argmax(logits, -1) == labels) & asked).sum()
        metrics["accuracy"] = hits.astype(jnp.float32) / count
        return losses.sum() / count + second, metrics | {optim.MOVED: moved}

    def restore(params: Any, batch: tuple[Any, Hidden]) -> jax.Array:
        ids, hidden = jnp.asarray(batch[0]), Hidden(*map(jnp.asarray, batch[1]))
        cover = functools.partial(
            hide,
            jax.random.key(0),  # all are masked: nothing is drawn
            mask=jnp.asarray(mask),
            words=jnp.asarray(words),
            masked=1.0,
            random=0.0,
        )
        seen = jax.vmap(lambda x, h: cover(x, h))(ids, hidden)
        return apply(params, seen, _real(ids), hidden.where)

    def predict(params: Any, batch: tuple[Any, Hidden]) -> tuple[jax.Array, ...]:
        logits = restore(params, batch)
        labels = _asked(jnp.asarray(batch[0]), Hidden(*map(jnp.asarray, batch[1])))
        losses, asked = losses_of(logits, labels)
        hits = (jnp.argmax(logits, -1) == labels) & asked
        return losses.sum(axis=1), hits.sum(axis=1), asked.sum(axis=1)

    def layers_of(params: Any, batch: tuple[Any, Any]) -> jax.Array:
        return layers({"tower": params["tower"]}, *batch)

    return Program(
        lambda seed: optim.split_model(build_model(shape, corpus, seed))[1],
        loss,
        {"restore": restore, "predict": predict, "layers": layers_of},
    )


@functools.lru_cache(maxsize=64)
def cost_of(shape: Shape, corpus: Corpus) -> dict[str, Any]:
    """Parameters, and FLOPs of the forward pass of one window."""
    model = nnx.eval_shape(lambda: build_model(shape, corpus, 0))
    most = most_hidden(shape.length, shape.masked)
    cost = call_cost(
        model,
        jax.ShapeDtypeStruct((1, shape.length, len(corpus.inputs)), jnp.int32),
        jax.ShapeDtypeStruct((1, shape.length), jnp.bool_),
        jax.ShapeDtypeStruct((1, most), jnp.int32),
    )
    return dict(params=cost.params, flops=cost.flops)


def held_hidden(corpus: Corpus, part: Windows, share: float) -> Hidden:
    """Which words of held-out windows are restored: the same for all, [n, M]."""
    keys = jax.random.split(jax.random.key(0), len(part.tokens))
    eligible = corpus.table[part.tokens][..., 0] >= KNOWN
    draw = jax.jit(jax.vmap(functools.partial(choose_hidden, share=share)))
    found: Any = map(np.asarray, draw(keys, eligible))
    return Hidden(*found)


def told(
    prefix: str, corpus: Corpus, part: Windows, rows: np.ndarray
) -> dict[str, float]:
    """Loss, perplexity and accuracy of hidden words, of all and of each source.

    Args:
      prefix: of the names, such as "test".
      corpus: whose part it is.
      part: n windows.
      rows: [n, 3], of each window the summed loss, the hits and how many were asked.
    """
    found: dict[str, float] = {}
    every = [("", np.ones(len(rows), bool))]
    every += [(f"_{s}", part.source == i) for i, s in enumerate(corpus.sources)]
    for name, some in every:
        loss, hits, asked = rows[some].sum(axis=0)
        if asked:
            found[f"{prefix}_loss{name}"] = float(loss / asked)
            found[f"{prefix}_perplexity{name}"] = math.exp(min(loss / asked, 700.0))
            found[f"{prefix}_accuracy{name}"] = float(hits / asked)
    return found


@dataclasses.dataclass(frozen=True)
class WindowBatches:
    """Windows of the training part as ids [B, T, K], every one once an epoch.

    A batch is in the order of the sources, so that the window before is of the same
    source but for the first of each: `swapped` would else tell by what sources are.
    """

    corpus: Corpus
    where: Callable[[int], np.ndarray]

    def __getitem__(self, step: int) -> np.ndarray:
        part, rows = self.corpus.train, self.where(step)
        rows = rows[np.argsort(part.source[rows], kind="stable")]
        return self.corpus.ids(part.tokens[rows])


class MaskedTask(Task):
    """Restores hidden words of a corpus.

    Args:
      corpus: what it reads.
      tags: a tagging task with the same ids, for the probe of every layer.
    """

    unit = "windows"

    def __init__(self, corpus: Corpus, tags: SequenceData):
        self.corpus, self.tags = corpus, tags

    def program(self, cell: MaskedCell) -> Program:
        return program_of(Shape.of(cell), self.corpus)

    def batches(self, cell: MaskedCell) -> WindowBatches:
        rows = in_epochs(cell, len(self.corpus.train.tokens))
        return WindowBatches(self.corpus, rows)

    def costs(self, cell: MaskedCell) -> dict[str, Any]:
        shape = dataclasses.replace(Shape.of(cell), dtype="float32")
        words = self.corpus.train.tokens.size
        epochs = cell.updates * cell.batch_size * cell.length / words
        return cost_of(shape, self.corpus) | dict(words=words, epochs=epochs)

    def keeps_params(self, cell: MaskedCell) -> bool:
        return True

    def predict(
        self, cell: MaskedCell, params: Any, part: Windows, hidden: Hidden
    ) -> np.ndarray:
        """Of each window the summed loss, hits and how many were asked, [n, 3]."""
        predict, size = self.program(cell).more["predict"], cell.batch_size
        count, found = len(part.tokens), []
        for begin in range(0, count, size):
            rows = np.arange(begin, begin + size) % count  # of one shape, one program
            some = Hidden(*(x[rows] for x in hidden))
            batch = self.corpus.ids(part.tokens[rows]), some
            found.append(np.stack(devices.call(predict, params, batch), axis=1))
        return np.concatenate(found)[:count].astype(np.float64)

    def score(self, cell: MaskedCell, params: Any) -> dict[str, Any]:
        """Loss, perplexity and accuracy of hidden words of what is held out.

        Of a final cell also what it fills in, and what a linear probe reads of the tags
        in each of its layers, beside those of the untrained encoder.
        """
        corpus, tune = self.corpus, cell.phase == "tune"
        prefix, part = ("val", corpus.validation) if tune else ("test", corpus.test)
        hidden = held_hidden(corpus, part, cell.masked)
        rows = self.predict(cell, params, part, hidden)
        result: dict[str, Any] = told(prefix, corpus, part, rows)
        if tune:
            return result
        if cell.seed == 0:
            result["examples"] = self._examples(cell, params, part, hidden)
        layers = self.program(cell).more["layers"]
        result["probe"] = probing.probe(layers, params, self.tags)
        first = self.initial_params(cell)
        return result | dict(probe_untrained=probing.probe(layers, first, self.tags))

    def _examples(
        self, cell: MaskedCell, params: Any, part: Windows, hidden: Hidden
    ) -> list[list[Any]]:
        """[text with a gap, the word, its chance, five words and their chances] …"""
        count = min(DRAWN, len(part.tokens))
        rows = np.linspace(0, len(part.tokens) - 1, count).astype(int)
        some = Hidden(*(x[rows] for x in hidden))
        ids = self.corpus.ids(part.tokens[rows])
        restore = self.program(cell).more["restore"]
        logits = np.asarray(jax.jit(restore)(params, (ids, some)), np.float64)
        names = ("[none]", "[unknown]", *self.corpus.vocabulary.words)
        found: list[list[Any]] = []
        for row, window in enumerate(part.tokens[rows]):
            middle = np.abs(some.where[row] - cell.length // 2)
            at = int(np.where(some.asked[row], middle, cell.length).argmin())
            place = int(some.where[row, at])
            words = [self.corpus.types[t] for t in window]
            for other in some.where[row][some.asked[row]]:
                words[other] = "[mask]"
            words[place] = "____"
            text = " ".join(words[max(0, place - BESIDE) : place + BESIDE + 1])
            chances = np.exp(logits[row, at] - logits[row, at].max())
            chances /= chances.sum()
            best = np.argsort(-chances, kind="stable")[:5]
            right = int(ids[row, place, 0])
            filled = [[names[i], round(float(chances[i]), 4)] for i in best]
            chance = round(float(chances[right]), 5)
            found.append([text, names[right], chance, filled])
        return found


# ------------------------------------------------------------------- fine-tuning


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneCell(LabelCell):
    """A cell that labels words or texts, with the encoder that was pre-trained or anew.

    Attributes:
      pretrained: `digest_of` the study that it begins with; None = from scratch.
    """

    pretrained: str | None = None

    def traits(self) -> Iterator[str]:
        yield "from scratch" if self.pretrained is None else "pre-trained"
        yield from super().traits()


def digest_of(study: Study) -> str:
    """What tells a study from others: all that makes its cells' parameters."""
    return config_hash(
        dict(
            grid=[cell.config() for cell in study.grid],
            updates=study.updates,
            seeds=study.seeds,
        )
    )


class TuneTask(LabelTask):
    """Labels words or texts; a cell goes on from the encoder that it names, or anew.

    Args:
      data: the words or texts.
      before: what pre-trains.
      studies: the studies that cells begin with, by digest. Seed s begins with their
        seed s, counted round.
    """

    def __init__(
        self, data: SequenceData, before: MaskedTask, studies: Sequence[Study] = ()
    ):
        super().__init__(data)
        self.before = before
        self.studies: Mapping[str, Study] = {digest_of(s): s for s in studies}
        self._encoders: dict[TuneCell, str] = {}  # digests of what cells began with

    def first_params(self, cell: TuneCell, store: ResultsStore) -> Any:
        params = self.initial_params(cell)
        if cell.pretrained is None:
            return params
        study = self.studies[cell.pretrained]
        cells = study.final(study.best(store.get))
        known = cells[cell.seed % len(cells)]
        like = self.before.program(known).initial_params(known.seed)
        kept = load_params(store, known, like)
        self._encoders[cell] = seal(*map(np.ascontiguousarray, jax.tree.leaves(kept)))
        return with_encoder(params, kept)

    def costs(self, cell: LabelCell) -> dict[str, Any]:
        """As of a labeller, with the digest of the parameters that it began with.

        In folders that are merged, it tells whether the same seed began with the same.
        """
        found = self._encoders.get(cell) if isinstance(cell, TuneCell) else None
        return super().costs(cell) | ({"encoder_sha256": found} if found else {})

    def _knows_less(self, cell: LabelCell) -> bool:
        # Of words that it has not met in training, who was pre-trained knows something.
        scratch = isinstance(cell, TuneCell) and cell.pretrained is None
        return scratch and super()._knows_less(cell)


def with_encoder(params: Any, pretrained: Any) -> Any:
    """Parameters of a labeller, with inputs and encoder of a masked language model.

    Raises:
      ValueError: they have other shapes.
    """
    found = {name: pretrained["tower"][name] for name in ("input", "body")}
    shapes = [
        jax.tree.map(jnp.shape, {n: x[n] for n in found}) for x in (params, found)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "params must have the shapes of the encoder that was pre-trained, "
            f"{shapes[1]}, got {shapes[0]}."
        )
    return params | found
