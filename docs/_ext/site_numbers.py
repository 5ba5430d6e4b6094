"""Every number on a hand-written page, by name, from the stored records.

A page says ``{{phones_cnn}}``; `text` gives what stands there, mean ± deviation over
seeds or a difference with its interval, linked to the records that it is of. What
selects no record, or records of more than one setting, is an error and not a guess.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from experiments.core import report, run
from experiments.core.identity import of_one_kind
from experiments.core.store import Record

ROOT = pathlib.Path(__file__).resolve().parents[2]


@functools.cache
def folders() -> dict[str, pathlib.Path]:
    """Folders of committed results by name: "graphs", "offsets/relations"."""
    found = {}
    for name in run.names():
        for folder in run.find(name).committed:
            inside = folder.name != "results"
            found[f"{name}/{folder.name}" if inside else name] = folder
    return found


def slug(folder: str) -> str:
    """The name of a folder's pages."""
    return folder.replace("/", "-")


@functools.cache
def records(folder: str) -> tuple[Record, ...]:
    """The records that a folder's report is of."""
    if folder not in folders():
        raise KeyError(f"no committed results {folder!r}; there are: {[*folders()]}")
    return tuple(of_one_kind(report.load(folders()[folder]), ())[0])


@functools.cache
def rows(folder: str) -> tuple[report.Row, ...]:
    """Their settings, each with all of its seeds."""
    return tuple(report.rows_of(records(folder)))


@dataclasses.dataclass(frozen=True)
class Mean:
    """A metric of one setting, over its seeds.

    Attributes:
      of: results folder.
      metric: its name in the records.
      where: settings that select it; what others have besides makes them others.
      digits: after the point.
    """

    of: str
    metric: str
    where: dict[str, Any]
    digits: int = 4

    def row(self) -> report.Row:
        """The one setting that is meant."""
        found = [
            row
            for row in rows(self.of)
            if all(row.config.get(k) == v for k, v in self.where.items())
            and row.of(self.metric)
        ]
        if len(found) != 1:
            values = {
                k: {repr(row.config.get(k)) for row in found}
                for k in {k for row in found for k in row.config}
            }
            told = {k: v for k, v in values.items() if len(v) > 1}
            raise LookupError(
                f"`where` must select one setting of {self.of}, but {self.where} "
                f"selects {len(found)}, which differ in {told}."
            )
        return found[0]

    def text(self) -> str:
        """Mean ± deviation."""
        return report.mean(self.row().of(self.metric), self.digits)

    def hashes(self) -> list[str]:
        """The records."""
        return [record["hash"] for record in self.row().records]


@dataclasses.dataclass(frozen=True)
class Less:
    """One mean less another, with Student's interval of 95 %."""

    one: str
    two: str

    @property
    def of(self) -> str:
        """The results folder."""
        return NUMBERS[self.one].of

    def text(self) -> str:
        """Difference and interval."""
        one, two = NUMBERS[self.one], NUMBERS[self.two]
        assert isinstance(one, Mean) and isinstance(two, Mean)
        return report.difference(one.row(), two.row(), one.metric, one.digits)[1]

    def hashes(self) -> list[str]:
        """The records of both."""
        return [*NUMBERS[self.one].hashes(), *NUMBERS[self.two].hashes()]


@dataclasses.dataclass(frozen=True)
class Floor:
    """What needs no training: a baseline's metric, over its seeds where it has some."""

    of: str
    metric: str
    where: dict[str, Any]
    digits: int = 4

    def found(self) -> list[Record]:
        """The records."""
        found = [
            record
            for record in records(self.of)
            if record["config"].get("phase") == "baseline"
            and self.where.items() <= {**record["config"], **record["metrics"]}.items()
            and self.metric in record["metrics"]
        ]
        if not found:
            raise LookupError(f"{self.of} has no baseline {self.where}.")
        return found

    def text(self) -> str:
        """The number, with its deviation where it has one."""
        values = {record["metrics"][self.metric] for record in self.found()}
        if len(values) == 1:
            return report.decimal(values.pop(), self.digits)
        scores = [record["metrics"][self.metric] for record in self.found()]
        return report.mean(report.summarize(scores), self.digits)

    def hashes(self) -> list[str]:
        """The records."""
        return [record["hash"] for record in self.found()]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A figure that a JSON file beside the records holds, or one of benchmarks/.

    Attributes:
      of: results folder, or "benchmarks".
      file: its name.
      read: gives the number as text, from what the file holds.
    """

    of: str
    file: str
    read: Callable[[Any], str]

    def text(self) -> str:
        """The figure."""
        return self.read(stored(self.of, self.file))

    def hashes(self) -> list[str]:
        """None: the file itself is what is linked."""
        return []


@dataclasses.dataclass(frozen=True)
class Told:
    """A number of a committed report that takes more to compute than a mean.

    Attributes:
      of: results folder.
      pattern: finds it; its group is the number.
    """

    of: str
    pattern: str

    def text(self) -> str:
        """The number."""
        told = (folders()[self.of] / "report.md").read_text("utf-8")
        found = re.search(self.pattern, told)
        if found is None:
            raise LookupError(f"the report of {self.of} has no {self.pattern!r}.")
        return found[1]

    def hashes(self) -> list[str]:
        """None: the report is what is linked."""
        return []


@functools.cache
def stored(of: str, file: str) -> Any:
    """What a JSON file of a results folder holds."""
    folder = ROOT / "benchmarks/results" if of == "benchmarks" else folders()[of]
    return json.loads((folder / file).read_text("utf-8"))


def _chain(model: str, length: int) -> Measured:
    """Operations that must wait for one another, in a training step."""

    def read(found: Any) -> str:
        (count,) = {
            row["operations"]
            for row in found["chains"]
            if row["program"] == "train step"
            and (row["model"], row["length"]) == (model, length)
        }
        return report.count(count)

    return Measured("attention_vs_rnn", "parallel.json", read)


def arena(name: str, short: str = "4K") -> dict[str, Any] | None:
    """A variant's row of Long Range Arena's efficiency table, if it ran there."""
    for table in stored("benchmarks", "long_range.json")["long_range"]:
        for row in table["rows"]:
            if table["short"] == short and row["name"] == name and "against" in row:
                return row
    return None


def _step(name: str, field: str) -> Measured:
    """Times as fast as dense attention at 4K tokens, or the share of its memory."""

    def read(found: Any) -> str:
        row = arena(name)
        assert row is not None
        if field == "speed":
            return f"{row['against']['dot_product'][0]:.3g}"
        return report.decimal(row["memory_share"], 3)

    return Measured("benchmarks", "long_range.json", read)


def _phones(model: str, **where: Any) -> Mean:
    where = {"model": model, "updates": 800, "left": None, **where}
    return Mean("sequence_labelling/phones", "test_whole_accuracy", where)


def _crops(model: str, **where: Any) -> Mean:
    where = {"task": "phones_64", "model": model, "updates": 800, **where}
    return Mean("data_scaling", "test_windows_accuracy", where, 3)


def _tags(model: str, **where: Any) -> Mean:
    where = {"model": model, "n": None, "updates": 900, **where}
    return Mean("sequence_labelling/pos", "test_accuracy", where)


def _few(**where: Any) -> Mean:
    """Tags with 5,000 sentences."""
    where = {"n": 5000, "updates": 200, **where}
    return Mean("sequence_labelling/pos", "test_accuracy", where)


def _images(model: str, n: int) -> Mean:
    where = {"task": "fashion_mnist", "model": model, "n": n}
    return Mean("data_scaling", "test_accuracy", where, 3)


def _relations(k: int, heads: int) -> Mean:
    where = {"task": f"relations:{k}", "num_heads": heads}
    return Mean("offsets/relations", "test_accuracy_known", where, 3)


def _back(k: int, model: str, **where: Any) -> Mean:
    where = {"task": f"back:{k}", "model": model, **where}
    return Mean("offsets/k_back", "test_accuracy_known", where, 3)


def _order(positions: str) -> Mean:
    where = {"task": "order", "positions": positions}
    return Mean("positions", "test_accuracy_length_65_128", where, 3)


def _copy(model: str, heads: int = 4) -> Mean:
    where = {"task": "copy", "model": model, "num_heads": heads}
    return Mean("attention_vs_rnn", "test_accuracy", where, 3)


def _bits(model: str) -> Mean:
    where = {"task": "fashion_mnist", "model": model}
    return Mean("attention_vs_rnn", "test_bits", where, 3)


def _spelling(model: str) -> Mean:
    return Mean("seq2seq/quick", "test_per", {"model": model, "updates": 1500}, 3)


def _boxes(model: str) -> Mean:
    return Mean("detection/quick", "test_ap", {"model": model, "updates": 1500}, 3)


def _drawn(kind: str) -> Mean:
    return Mean("gan/quick", "test_fid", {"kind": kind, "updates": 800}, 2)


def _dictionary(model: str, keys: int = 20) -> Mean:
    where = {"task": "dictionary", "model": model, "keys": keys}
    return Mean("graphs", "train_accuracy", where)


def _melting(model: str) -> Mean:
    where = {"task": "melting_point", "model": model}
    return Mean("graphs", "test_rmse", where, 2)


def _recall(model: str, dim: int) -> Mean:
    where = {"model": model, "dim": dim}
    return Mean("long_range/quick", "test_accuracy_pairs_32", where, 3)


Number = Mean | Less | Floor | Measured | Told

NUMBERS: dict[str, Number] = {
    # Tags of words, Brown.
    "tags_alone": _tags("window", window=0),
    "tags_window": _tags("window", window=2),
    "tags_attention": _tags("transformer"),
    "tags_gru": _tags("gru"),
    "tags_window_less_alone": Less("tags_window", "tags_alone"),
    "tags_gru_less_attention": Less("tags_gru", "tags_attention"),
    "few_window_1": _few(model="window", window=1),
    "few_window_63": _few(model="window", window=63),
    "few_window_63_less_1": Less("few_window_63", "few_window_1"),
    "few_additive": _few(attention="additive", positions="t5"),
    "few_dot": _few(attention="dot_product", positions="t5"),
    "few_additive_less_dot": Less("few_additive", "few_dot"),
    # The symbol k places before.
    "back_64_window": _back(64, "window", window=64),
    "back_64_narrow": _back(64, "window", window=32),
    "back_64_attention": _back(64, "transformer"),
    "back_guess": Floor(
        "offsets/k_back", "test_accuracy_known", {"task": "back:64"}, 3
    ),
    # Several relations at once.
    "relations_2_heads_1": _relations(2, 1),
    "relations_2_heads_2": _relations(2, 2),
    "relations_2_gain": Less("relations_2_heads_2", "relations_2_heads_1"),
    "relations_8_heads_4": _relations(8, 4),
    "relations_8_heads_8": _relations(8, 8),
    # Positions, on two to four times the trained length.
    "order_none": _order("none"),
    "order_shaw": _order("shaw"),
    "order_rope": _order("rope"),
    "order_sinusoidal": _order("sinusoidal"),
    "order_floater": _order("sinusoidal_floater"),
    "order_floater_less_sinusoidal": Less("order_floater", "order_sinusoidal"),
    # Phones of whole utterances.
    "phones_cnn": _phones("cnn"),
    "phones_attention": _phones("transformer"),
    "phones_truncated": _phones("transformer", left=32),
    "phones_gru": _phones("gru"),
    "phones_truncated_less_cnn": Less("phones_truncated", "phones_cnn"),
    "phones_attention_less_cnn": Less("phones_attention", "phones_cnn"),
    "phones_truncated_less_gru": Less("phones_truncated", "phones_gru"),
    # Phones of crops, as N grows.
    **{
        f"crops_{name}_{n}": _crops(model, n=n, **where)
        for n in (40, 7675)
        for name, model, where in (
            ("attention", "transformer", {"left": None}),
            ("cnn_6", "cnn", {"dilations": [1, 1, 1, 0]}),
            ("cnn_30", "cnn", {"dilations": [1, 2, 4, 8]}),
            ("gru", "gru", {}),
        )
    },
    **{
        f"crops_{n}_attention_less_{rival}": Less(
            f"crops_attention_{n}", f"crops_{rival}_{n}"
        )
        for n in (40, 7675)
        for rival in ("cnn_6", "cnn_30", "gru")
    },
    # Images.
    "images_vit_1000": _images("vit", 1000),
    "images_resnet_1000": _images("resnet", 1000),
    "images_vit": _images("vit", 60000),
    "images_hybrid": _images("hybrid", 60000),
    "images_resnet": _images("resnet", 60000),
    "images_vit_less_resnet": Less("images_vit", "images_resnet"),
    "heads_one_token": Told(
        "attention_as_conv", r"heads that look at one token \S+ ± \S+ → (\S+ ± \S+?);"
    ),
    # Against recurrent networks.
    "copy_softmax": _copy("softmax"),
    "copy_linear": _copy("linear"),
    "copy_lstm": _copy("lstm"),
    "copy_lstm_less_linear": Less("copy_lstm", "copy_linear"),
    "bits_softmax": _bits("softmax"),
    "bits_linear": _bits("linear"),
    "bits_lstm": _bits("lstm"),
    "chain_softmax_32": _chain("softmax", 32),
    "chain_softmax_2048": _chain("softmax", 2048),
    "chain_lstm_32": _chain("lstm", 32),
    "chain_lstm_2048": _chain("lstm", 2048),
    # The model decides how long its answer is; errors a phone.
    "spelling_transformer": _spelling("transformer"),
    "spelling_lstm_attention": _spelling("lstm_attention"),
    "spelling_lstm": _spelling("lstm"),
    "spelling_transformer_less_lstm": Less("spelling_transformer", "spelling_lstm"),
    "spelling_rules": Floor("seq2seq/quick", "test_per", {"model": "context"}, 3),
    # What is where.
    "boxes_detr": _boxes("detr"),
    "boxes_centers": _boxes("centers"),
    "boxes_detr_less_centers": Less("boxes_detr", "boxes_centers"),
    # Drawing.
    "gan_attention": _drawn("attention"),
    "gan_convolution": _drawn("convolution"),
    "gan_attention_less_convolution": Less("gan_attention", "gan_convolution"),
    # Graphs.
    "dictionary_gat": _dictionary("gat"),
    "dictionary_gatv2": _dictionary("gatv2"),
    "dictionary_dot": _dictionary("dot product"),
    "melting_edges": _melting("edges"),
    "melting_all": _melting("no edges"),
    "melting_edges_less_all": Less("melting_edges", "melting_all"),
    "melting_forest": Floor(
        "graphs", "test_rmse", {"task": "melting_point", "baseline": "forest"}, 2
    ),
    # Recall, and speed at 4K tokens.
    "recall_softmax": _recall("softmax", 32),
    "recall_linear": _recall("linear", 32),
    "recall_softmax_less_linear": Less("recall_softmax", "recall_linear"),
    **{
        f"{field}_{name}": _step(name, field)
        for name in ("blockwise", "linear", "performer", "linformer", "block_local")
        for field in ("speed", "memory")
    },
}
"""What pages may name."""

NAMED = re.compile(r"\{\{ *(\w+) *\}\}")


def text(name: str, root: str = "") -> str:
    """A number as HTML, linked to its records.

    Args:
      name: in `NUMBERS`.
      root: the way from the page to the site's start, such as "../".

    Raises:
      LookupError: if there is no such name, or no records of one setting for it.
    """
    if name not in NUMBERS:
        raise LookupError(f"no number {name!r}; see NUMBERS in {__file__}")
    number = NUMBERS[name]
    try:
        shown = number.text()
    except LookupError as error:
        raise LookupError(f"number {name!r}: {error}") from None
    hashes = number.hashes()
    if isinstance(number, Measured):
        link, said = f"{root}_records/{slug(number.of)}-{number.file}", number.file
    elif isinstance(number, Told):
        link, said = f"{root}results/{slug(number.of)}.html", "report"
    else:
        link = f"{root}results/{slug(number.of)}-records.html#{hashes[0]}"
        said = f"{number.of}, records {', '.join(hashes)}"
    said = html.escape(said, quote=True)
    return f'<a class="number" href="{link}" title="{said}">{shown}</a>'


def fill(page: str, root: str = "") -> str:
    """A page with its names filled in."""
    return NAMED.sub(lambda found: text(found[1], root), page)
