"""What pre-training is worth: BERT in small, then fine-tuned on few labels.

`python -m experiments.pretraining --preset quick` restores hidden words of a dictionary
and of Brown's training part, then tags with the encoder that did, and with one from
scratch, on a few hundred sentences. `--preset cpu` for as long as it takes, with mails
and languages besides. `--attention linear` or `--attention my.py:fn` adds a row that is
pre-trained with other attention.

Reference: Devlin et al., 2018, arXiv:1810.04805.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from attn_jax.variant import resolve
from experiments.core import identity
from experiments.core.cell import (
    Above,
    Amount,
    Count,
    Counts,
    Dtype,
    Limit,
    Rates,
    Rule,
    Settings,
    Share,
    attention_digest,
    some_of,
)
from experiments.core.plan import Baseline, Plan, Study, baselines_of, beside
from experiments.core.run import Experiment
from experiments.data import byte_text, text
from experiments.data.corpus import Corpus, load_corpus, toy_corpus
from experiments.data.sequence_tasks import classifying, tagging
from experiments.data.sequences import SequenceData
from experiments.pretraining import baselines
from experiments.pretraining.cells import (
    MaskedCell,
    MaskedTask,
    TuneCell,
    TuneTask,
    digest_of,
)
from experiments.pretraining.report import REPORT

TASKS = ("pos", "spam", "language")
SIZES = (5_000, 1_000, 2_000)  # texts of training, validation and test, at most

NAMES = Limit(
    lambda x: len(x) == len(set(x)),
    "names of variants or path/file.py:function, each once",
)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What is run."""

    corpus: Literal["gcide_brown", "toy_corpus"] = "gcide_brown"
    """Text to pre-train on; with the toy corpus all tasks are toys."""
    tasks: Annotated[tuple[str, ...], some_of(TASKS, least=0)] = TASKS
    """Fine-tuned on: pos (tags of Brown), spam (mails), language (of 19)."""
    attention: str | None = None
    """One more row beside dot_product: this variant, by name or path/file.py:function,
    is pre-trained, and fine-tuned with and without."""
    attentions: Annotated[tuple[str, ...], NAMES] = ()
    """More such rows."""
    length: Count = 128
    """Words of a window, and of a text at most."""
    dim: Count = 128
    """Width."""
    depth: Count = 4
    """Layers."""
    mlp_dim: Count = 512
    """Hidden width."""
    num_heads: Count = 4
    """Heads."""
    positions: str = "rope"
    """Position encoding, see `attn_jax.nn.positional`; "learned" in the paper."""
    dropout_rate: Share = 0.0
    """Dropout, in pre-training and after it; .1 in the paper, which has a hundred times
    the updates."""
    dtype: Dtype = "float32"
    """Dtype of the computation; parameters stay float32."""
    masked: Annotated[float, Limit(lambda x: 0 < x < 1, "above 0 and below 1")] = 0.15
    """Share of the words that is restored: of ten, eight are masked, one is another
    word, one is left as it is. Words are no pieces, so they are hidden whole."""
    next_sentence: bool = False
    """Learn too whether the second half of a window follows on the first, of half the
    windows another's. Off: what comes next in a dictionary is another entry, and later
    work found that it does not help (arXiv:1907.11692)."""
    batch_size: Count = 64
    """Windows of an update of pre-training."""
    pretrain_updates: Count = 4_000
    """Optimiser steps of pre-training."""
    pretrain_tune_updates: Count = 250
    """Optimiser steps for the choice of its rate."""
    pretrain_rates: Rates = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    """Peaks of its schedule, ascending; the validation part chooses by its loss. Those
    in the middle are tried first, and further ones while the best lies at an end."""
    pretrain_seeds: Count = 1
    """Seeds of pre-training; seed s of fine-tuning begins with the s-th, counted
    round."""
    weight_decay: Amount = 0.01
    """Decoupled weight decay of matrices, in pre-training and after it."""
    tag_ns: Counts = (100, 300, 1_000, 10_000, 100_000)
    """Sentences that are fine-tuned on; more than there are stands for all."""
    text_ns: Counts = (100, 300, 1_000, 5_000)
    """Mails or paragraphs that are fine-tuned on, likewise."""
    updates: Count = 600
    """Optimiser steps of fine-tuning, and from scratch."""
    tune_updates: Count = 200
    """Optimiser steps for the choice of their rates."""
    learning_rates: Rates = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    """Peaks of their schedule, ascending; for each task, N and row the validation part
    chooses. Those in the middle are tried first, and further ones while the best lies
    at an end."""
    tokens: Count = 1_024
    """Words a batch, with padding."""
    id_dropout: Share = 0.1
    """How often fine-tuning hides which word it is, and leaves endings and shape."""
    warmup: Share = 0.1
    """Share of the updates that warm up."""
    clip_norm: Above = 1.0
    """Largest global norm of a gradient."""
    seeds: Count = 3
    """Seeds of fine-tuning and from scratch: order, labels that are given, and from
    scratch all parameters."""

    def rules(self) -> Iterator[Rule]:
        for name in ("learning_rates", "pretrain_rates"):
            rates = getattr(self, name)
            yield name, tuple(sorted(set(rates))) == rates, "ascending"
        divides = self.dim % self.num_heads == 0
        yield "num_heads", divides, f"a divisor of dim={self.dim}"
        yield "length", self.length >= 8, "at least 8"
        yield "attentions", "dot_product" not in self.attentions, "without dot_product"
        again = self.attention in ("dot_product", *self.attentions)
        words = f"none of dot_product and attentions={self.attentions}"
        yield "attention", not again, words
        enough = self.batch_size >= 2 or not self.next_sentence
        yield "batch_size", enough, "at least 2 with next_sentence"

    @property
    def rows(self) -> tuple[str, ...]:
        """All attention variants."""
        more = () if self.attention is None else (self.attention,)
        return ("dot_product", *self.attentions, *more)


_ACCELERATOR = Config(
    dim=512,
    mlp_dim=2_048,
    num_heads=8,
    positions="learned",
    dropout_rate=0.1,
    dtype="bfloat16",
    batch_size=256,
    pretrain_updates=40_000,
    pretrain_tune_updates=2_000,
    pretrain_rates=(2.5e-4, 5e-4, 1e-3),
    pretrain_seeds=5,
    updates=2_000,
    tune_updates=1_000,
    learning_rates=(2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
    tokens=4_096,
    seeds=5,
)

PRESETS: Mapping[str, Config] = {
    "smoke": Config(
        corpus="toy_corpus",
        tasks=("pos", "spam"),
        length=16,
        dim=8,
        depth=1,
        mlp_dim=16,
        num_heads=2,
        batch_size=8,
        pretrain_updates=4,
        pretrain_rates=(3e-3,),
        tag_ns=(20,),
        text_ns=(20,),
        updates=3,
        learning_rates=(3e-3,),
        tokens=64,
        seeds=1,
    ),
    "quick": Config(
        tasks=("pos",),
        length=64,
        dim=64,
        depth=2,
        mlp_dim=256,
        num_heads=2,
        batch_size=32,
        pretrain_updates=1_000,
        pretrain_rates=(4e-3,),
        tag_ns=(100, 1_000),
        updates=150,
        learning_rates=(4e-3,),
    ),
    "cpu": Config(),
    # Can I pre-train with my attention? A quarter of the updates, the fewest labels.
    "variants": Config(
        tasks=("pos",),
        attentions=("linear", "block_local"),
        pretrain_updates=1_000,
        tag_ns=(100, 1_000),
    ),
    "accelerator": _ACCELERATOR,  # BERT-small
    "base": dataclasses.replace(
        _ACCELERATOR,
        dim=768,
        depth=12,
        mlp_dim=3_072,
        num_heads=12,
        pretrain_rates=(1e-4, 2e-4, 4e-4),
    ),
}


# ---------------------------------------------------------------------- the data


def load(name: str, length: int) -> Corpus:
    """The text to pre-train on."""
    return load_corpus(length) if name == "gcide_brown" else toy_corpus(length)


def lengths_to(length: int) -> tuple[int, ...]:
    """Padded lengths of batches; the last one is that of pre-training.

    >>> lengths_to(128), lengths_to(16)
    ((16, 32, 64, 128), (16,))
    """
    return (*(n for n in (16, 32, 64) if n < length), length)


def load_task(name: str, corpus: Corpus) -> SequenceData:
    """The words or texts of a task, as ids that the corpus's vocabulary makes."""
    toy, lengths = corpus.name.startswith("toy"), lengths_to(corpus.length)
    words = corpus.vocabulary
    if name == "pos":
        found = text.toy_text(400, seed=0) if toy else text.load_brown()
        name = "toy_pos" if toy else name
        data = tagging(name, found, fine=False, vocabulary=words, lengths=lengths)
    elif toy:
        documents = byte_text.toy_documents(80)
        data = classifying(f"toy_{name}", documents, words, lengths)
    else:
        loads = dict(spam=byte_text.load_spam, language=byte_text.load_paragraphs)
        data = classifying(name, loads[name](), words, lengths, SIZES)
    return dataclasses.replace(data, inputs=corpus.inputs)


# --------------------------------------------------------------------- the cells


def _model(config: Config, attention: str) -> dict[str, Any]:
    """What cells of both kinds share."""
    resolve(attention)  # a name that is none is told before anything runs
    names = (
        "dim depth mlp_dim num_heads positions dropout_rate dtype weight_decay warmup "
        "clip_norm"
    )
    found = {name: getattr(config, name) for name in names.split()}
    digest = attention_digest(attention)
    return found | dict(attention=attention, attention_sha256=digest)


def pretraining(
    config: Config, attention: str, differs: identity.Differs = ()
) -> Study:
    """The row of a variant that restores hidden words."""
    grid = tuple(
        MaskedCell(
            task=config.corpus,
            seed=0,
            phase="tune",
            updates=config.pretrain_tune_updates,
            learning_rate=rate,
            batch_size=config.batch_size,
            length=config.length,
            masked=config.masked,
            next_sentence=config.next_sentence,
            differs=differs,
            **_model(config, attention),
        )
        for rate in config.pretrain_rates
    )
    return Study(
        f"pre-training {attention}",
        grid,
        config.pretrain_updates,
        config.pretrain_seeds,
        metric="val_loss",
        minimise=True,
        first=beside(len(config.pretrain_rates)),
    )


def fine_tuning(
    config: Config,
    task: str,
    n: int,
    before: Study,
    *,
    scratch: bool,
    differs: identity.Differs = (),
) -> Study:
    """The row of a task, an N and a variant, pre-trained or from scratch."""
    rates = config.learning_rates
    attention = before.grid[0].attention
    grid = tuple(
        TuneCell(
            task=task,
            model="transformer",
            seed=0,
            phase="tune",
            updates=config.tune_updates,
            learning_rate=rate,
            n=n,
            tokens=config.tokens,
            id_dropout=config.id_dropout,
            pretrained=None if scratch else digest_of(before),
            differs=differs,
            **_model(config, attention),
        )
        for rate in rates
    )
    name = f"{task} n={n} {attention}{' from scratch' * scratch}"
    after = None if scratch else before
    return Study(
        name, grid, config.updates, config.seeds, first=beside(len(rates)), after=after
    )


def sizes_of(config: Config, task: str, have: int) -> list[int]:
    """N of a task, the largest first; more than there are stands for all.

    >>> sizes_of(Config(), "spam", 4_000)
    [4000, 1000, 300, 100]
    """
    ns = config.tag_ns if task == "pos" else config.text_ns
    return sorted({min(n, have) for n in ns}, reverse=True)


def studies_of(
    config: Config,
    task: str,
    name: str,
    have: int,
    before: list[Study],
    differs: identity.Differs = (),
) -> list[Study]:
    """All rows of a task, the largest N first.

    Args:
      config: the settings.
      task: of `TASKS`.
      name: under which its cells are stored.
      have: sequences of its training part.
      before: the studies of pre-training.
      differs: of the data.
    """
    return [
        fine_tuning(config, name, n, study, scratch=scratch, differs=differs)
        for n in sizes_of(config, task, have)
        for study in before
        for scratch in (True, False)
    ]


def floors_of(
    config: Config, task: str, data: SequenceData, differs: identity.Differs
) -> list[Baseline]:
    """What labels without a network, on the very subsets that networks see."""
    found = []
    for n in sizes_of(config, task, len(data.train)):
        for name, measure in baselines.of_task(data).items():
            for seed in range(config.seeds):
                made = dict(
                    task=data.name, model=name, n=n, seed=seed, phase="baseline"
                )
                found.append(
                    Baseline(
                        identity.with_differs(made, differs),
                        functools.partial(measure, data, n, seed),
                        f"{data.name} {name} n={n} seed={seed}",
                    )
                )
    return found


def plans(config: Config) -> list[Plan]:
    """Loads the text and the tasks; plans pre-training, and a plan a task."""
    corpus = load(config.corpus, config.length)
    tags = load_task("pos", corpus)
    made_of = dict(data_sha256=corpus.sha256, tags_sha256=tags.sha256)
    differs = identity.differs(config.corpus, **made_of)
    before = MaskedTask(corpus, tags)
    studies = [pretraining(config, name, differs) for name in config.rows]
    counted = identity.differs(config.corpus, **made_of, masked=config.masked)
    found = [
        Plan(
            before,
            corpus.describe(),
            studies,
            baselines_of(
                config.corpus, baselines.of_corpus(corpus, config.masked), counted
            ),
        )
    ]
    for task in config.tasks:
        data = tags if task == "pos" else load_task(task, corpus)
        differs = identity.of_sequences(data)
        rows = studies_of(config, task, data.name, len(data.train), studies, differs)
        floors = floors_of(config, task, data, differs)
        task_of = TuneTask(data, before, studies)
        found.append(Plan(task_of, data.describe(), rows, floors))
    return found


EXPERIMENT = Experiment(
    name="pretraining",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "smoke": "half a minute, synthetic",
        "quick": "minutes, two cores",
        "cpu": "four hours, two cores; pre-training is half of it",
        "variants": "two hours and a half, two cores",
        "accelerator": "hours, an accelerator; BERT-small",
        "base": "two days, an accelerator; BERT-base",
    },
    plans=plans,
    report=REPORT,
)
