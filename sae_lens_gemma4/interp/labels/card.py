"""The dataset card of a folder of labels: what they are of, what was measured of them, and what nobody states.

A card is read before the data. Beside each share stands what the same measurement gives where there is nothing to find,
because 99 % of a probe says little without it; and what is missing is said to be missing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import yaml

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.statistics import Share

_TAGS = ("sparse-autoencoder", "mechanistic-interpretability", "feature-labels")
_COLUMNS = {
    "index": "the latent",
    "label": "what it is said to respond to",
    "description": "more words on it",
    "category": "its kind, in the labeller's own words",
    "confidence": "by the labeller's own measure; not comparable between releases",
    "source": "who or what stated the label",
    "alternatives": "labels by others, each with who stated it",
    "examples": "texts on which it fires, with the strongest token and, where kept, every token's activation",
    "facts": "all else that is stated of it, a JSON object",
}


class Measured(NamedTuple):
    """A figure of the labels and, beside it, its control.

    Attributes:
        name: of the figure, in words.
        value, low, high: the figure and its interval; None where there is none.
        control: the same measurement where there is nothing to find, as labels dealt out anew.
        control_low, control_high: its interval.
        n: how many it is of.
        note: what the control is, or what the figure does not say.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    control: float | None = None
    control_low: float | None = None
    control_high: float | None = None
    n: int | None = None
    note: str = ""

    @classmethod
    def of_shares(cls, name: str, found: Share, control: Share | None = None, note: str = "") -> Measured:
        """A share with its Wilson interval, and that of its control."""
        other = control or Share(0, 0, None, None, None)
        return cls(name, found.value, found.low, found.high, other.value, other.low, other.high, found.n, note)


@dataclass(frozen=True, kw_only=True)
class LabelCard:
    """What the card says beyond what is counted in the files.

    Attributes:
        title: its heading.
        license: as the hub names it; None is written down as not stated.
        facts: what was labelled and with what: model, SAE, hook, corpus, judges, seed.
        measured: figures with their controls, in order.
        not_stated: what a reader may look for and will not find, a sentence each.
        tags: beyond the usual ones.

    Raises:
        ConfigError: a title or licence without text.
    """

    title: str
    license: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    measured: Sequence[Measured] = ()
    not_stated: Sequence[str] = ()
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise ConfigError("A card needs a title.")
        if self.license is not None and not self.license.strip():
            raise ConfigError("A licence needs a name, such as apache-2.0; leave it out where there is none.")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What was counted while the files were written: rows, rows that have something, and who stated how many."""

    n: int
    labelled: int
    categorised: int
    categories: int
    with_confidence: int
    with_examples: int
    examples: int
    sources: Mapping[str, int]


def card_text(card: LabelCard, contents: Contents, columns: pa.Schema) -> str:
    """The whole README.md. Its front matter gives `datasets` the file to read and the type of every column."""
    sections = {
        "What was labelled": _facts(card),
        "What is in the files": _files(contents, columns),
        "What was measured": _measured(card),
        "What is not stated": [f"- {escaped(line)}" for line in _missing(card, contents)],
        "Reading it": _usage(),
    }
    body = "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items())
    return f"{_front_matter(card, contents, columns)}\n\n# {escaped(card.title)}\n\n{body}\n"


def escaped(text: object) -> str:
    """A text as one line of Markdown that shows just that text: no markup, no HTML, nothing invisible."""
    shown = "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else f"⟨{ord(c):04X}⟩"
        for c in re.sub(r"\s*[\r\n]+\s*", " ", str(text))
    )
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$-])", r"\\\1", shown).strip()


def _front_matter(card: LabelCard, contents: Contents, columns: pa.Schema) -> str:
    features = [_feature(column.name, column.type) for column in columns]
    facts: dict[str, Any] = {
        "pretty_name": card.title,
        **({"license": card.license.strip()} if card.license else {}),
        "tags": list(dict.fromkeys([*_TAGS, *card.tags])),
        "size_categories": [_size(contents.n)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "labels.parquet"}]}],
        "dataset_info": {"config_name": "default", "features": features},
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---"


def _feature(name: str, kind: Any) -> dict[str, Any]:
    """A column as cards state it: `dtype`, or `list` of a type or of named parts."""
    if not pa.types.is_list(kind):
        return {"name": name, "dtype": {"double": "float64"}.get(str(kind), str(kind))}
    part = kind.value_type
    if pa.types.is_struct(part):
        return {"name": name, "list": [_feature(f.name, f.type) for f in part]}
    return {"name": name, "list": _feature("", part)["dtype"]}


def _size(n: int) -> str:
    edges = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    return next((name for edge, name in edges.items() if n < edge), "1M<n<10M")


def _facts(card: LabelCard) -> list[str]:
    if not card.facts:
        return ["Nobody stated it."]
    return _table(["", ""], ([name, _value(value)] for name, value in card.facts.items()))


def _files(contents: Contents, columns: pa.Schema) -> list[str]:
    who = ", ".join(f"{escaped(name)} ({n:,})" for name, n in contents.sources.items())
    return [
        f"{contents.n:,} rows, one a latent: {contents.labelled:,} with a label, {contents.categorised:,} with a "
        f"category (of {contents.categories:,}), {contents.with_confidence:,} with a confidence, "
        f"{contents.with_examples:,} with examples ({contents.examples:,} in all). Stated by {who}.",
        "",
        *_table(["column", "type", "what it is"], ([c.name, str(c.type), _COLUMNS[c.name]] for c in columns)),
    ]


def _measured(card: LabelCard) -> list[str]:
    if not card.measured:
        return ["Nothing: these labels have not been tested."]
    heads = ["figure", "value [interval]", "control [interval]", "of", ""]
    rows = (
        [
            m.name,
            _estimate(m.value, m.low, m.high),
            _estimate(m.control, m.control_low, m.control_high),
            "" if m.n is None else f"{m.n:,}",
            m.note,
        ]
        for m in card.measured
    )
    return _table(heads, rows)


def _missing(card: LabelCard, contents: Contents) -> list[str]:
    lines = list(card.not_stated)
    if card.license is None:
        lines.append("Under which licence these labels may be used.")
    without = [m.name for m in card.measured if m.control is None]
    if without:
        lines.append(f"A control for: {', '.join(without)}.")
    if contents.with_confidence < contents.n:
        lines.append(f"A confidence for {contents.n - contents.with_confidence:,} of the {contents.n:,} latents.")
    return lines or ["Nothing that this card knows of."]


def _usage() -> list[str]:
    return [
        "```python",
        "import pyarrow.parquet as pq",
        "from datasets import Features, load_dataset",
        "",
        'labels = load_dataset("path/to/this/folder", split="train")',
        "",
        "# the JSON lines hold the same; without features, a column that is empty throughout has no type",
        'features = Features.from_arrow_schema(pq.read_schema("path/to/this/folder/labels.parquet"))',
        'lines = "path/to/this/folder/labels.jsonl"',
        'labels = load_dataset("json", data_files=lines, features=features, split="train")',
        "```",
    ]


def _estimate(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if low is None or high is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not stated"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in (heads, *rows)]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:]]
