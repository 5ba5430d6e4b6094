"""Text as byte pairs: pieces of words that are frequent in training text.

Byte-pair encoding begins with characters and joins, again and again, the two pieces
that stand side by side most often, never over a blank. What is encoded is decoded to
itself, but for characters that training had not, and for blanks: a run of them becomes
one, and those at the ends go.

Reference: Sennrich, Haddow and Birch, 2016, arXiv:1508.07909; trained and applied by
SentencePiece, Kudo and Richardson, 2018, arXiv:1808.06226.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

# Ids of symbols that are no pieces of text; those of pieces follow.
PAD, END, UNKNOWN = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class BytePairs:
    """A vocabulary of pieces: text to ids and back.

    Attributes:
      model: as SentencePiece stores it.
    """

    model: bytes = dataclasses.field(repr=False)

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    @functools.cached_property
    def pieces(self) -> tuple[str, ...]:
        """All pieces by id; "▁" is a blank."""
        return tuple(self._processor.id_to_piece(i) for i in range(len(self)))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts, int32 [T] each; none of them is `PAD` or `END`."""
        found = self._processor.encode(list(texts))
        return [np.array(ids, np.int32) for ids in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; what is no piece of a text is left out."""
        return str(self._processor.decode([int(i) for i in ids if i > UNKNOWN]))


def train(texts: Iterable[str], size: int) -> BytePairs:
    """The byte pairs of some texts: the same texts give the same ones.

    Args:
      texts: with single blanks.
      size: of the vocabulary, `PAD`, `END` and `UNKNOWN` among it.

    Raises:
      ValueError: the texts have fewer pieces, or more characters.

    >>> pairs = train(["low lower lowest"] * 3, 16)
    >>> ids, = pairs.encode(["lower low"])
    >>> [pairs.pieces[i] for i in ids], pairs.decode(ids)
    (['▁lowe', 'r', '▁low'], 'lower low')
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            character_coverage=1.0,
            normalization_rule_name="identity",
            max_sentence_length=1_000_000,
            num_threads=1,
            pad_id=PAD,
            eos_id=END,
            unk_id=UNKNOWN,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"size must be one that the texts have pieces for, got {size}: {error}."
        ) from error
    return BytePairs(model.getvalue())
