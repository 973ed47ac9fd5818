"""How each author writes labels and examples down: one parser a schema, each to the same `FeatureLabel`.

Values are checked as they are taken, so that an error names the file and the record; what a parser does not take
stays among the label's facts, unchanged.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.dataset as ds  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from sae_lens_gemma4.catalogue.registry import SAEEntry
from sae_lens_gemma4.errors import DataError, SAEError
from sae_lens_gemma4.models.hook_names import layer_of

_BATCH_ROWS = 1024
_BUFFER_BYTES = 2**20
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text on which a feature fires. `tokens` and `activations`, where both are stated, are of one length."""

    text: str | None = None
    """What is around the token that fires most."""
    token: str | None = None
    activation: float | None = None
    """At that token, as the author's SAE computed it."""
    token_index: int | None = None
    """Where that token is, counted as the author counts."""
    tokens: tuple[str, ...] | None = None
    activations: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureLabel:
    """What a release states of one feature."""

    index: int
    label: str | None = None
    description: str | None = None
    category: str | None = None
    confidence: float | None = None
    """By the author's own measure: not comparable between releases."""
    source: str
    """Who or what stated the label, or the examples where there is none."""
    alternatives: Mapping[str, str] = field(default_factory=dict)
    """Labels by others, by who stated them."""
    examples: tuple[Example, ...] = ()
    """In the author's order."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """All else that the record states, under the author's names, unchanged and unchecked."""


Piece = tuple[str, FeatureLabel]
"""What errors call a record, and what it states."""


@dataclass(frozen=True)
class Source:
    """One file of labels. `features` lets a parser pass over others early; it need not."""

    path: Path
    where: str
    entry: SAEEntry
    features: frozenset[int] | None


@dataclass(frozen=True)
class Schema:
    """A form in which labels are published."""

    parse: Callable[[Source], Iterator[Piece]]
    suffix: str
    by_example: bool = False
    """Whether a record is one example, so that a feature has several."""


class _Record:
    """One record of a file. Each value is checked as it is taken; what is left are its facts."""

    def __init__(self, where: str, values: Any) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise self.error(f"{reprlib.repr(values)} is not an object")
        self.facts: dict[str, Any] = dict(values)

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.where}: {problem}.")

    def take(self, key: str, kind: Callable[[Any], _T]) -> _T | None:
        if (value := self.facts.pop(key, None)) is None:
            return None
        try:
            return kind(value)
        except (ValueError, RecursionError) as e:
            raise self.error(f"{key} is {reprlib.repr(value)}: {str(e).rstrip('.')}") from e

    def need(self, key: str, kind: Callable[[Any], _T]) -> _T:
        if (value := self.take(key, kind)) is None:
            raise self.error(f"it has no {key}")
        return value

    def label(self, **stated: Any) -> Piece:
        return self.where, FeatureLabel(**stated, facts=self.facts)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("not an integer")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise ValueError("not a finite number")
    return float(value)


def _all(kind: Callable[[Any], _T]) -> Callable[[Any], tuple[_T, ...]]:
    """For a list, or the JSON of one."""

    def check(value: Any) -> tuple[_T, ...]:
        values = json.loads(value) if isinstance(value, str) else value
        if not isinstance(values, list):
            raise ValueError("not a list")
        return tuple(kind(v) for v in values)

    return check


def _json(source: Source, kind: type) -> Any:
    try:
        content = json.loads(source.path.read_bytes(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{source.where} is not JSON: {e}.") from e
    if not isinstance(content, kind):
        raise DataError(f"{source.where} holds a {type(content).__name__}, not a {kind.__name__}.")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json by itself would drop all but the last of a repeated key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
    return values


def _adam1010(source: Source) -> Iterator[Piece]:
    """One list for all layers. The author's page calls the two labellers Claude Sonnet and GPT-4o."""
    layer = layer_of(source.entry.hook)
    if layer is None:
        raise SAEError(
            f"{source.where} is by layers, and the hook {source.entry.hook} of {source.entry.id} is in none."
        )
    for n, values in enumerate(_json(source, list)):
        record = _Record(f"{source.where}, record {n}", values)
        if record.need("layer", _integer) == layer:
            gpt = record.take("gpt_label", _text)
            yield record.label(
                index=record.need("feature_id", _integer),
                label=record.take("claude_label", _text),
                category=record.take("claude_category", _text),
                confidence=record.take("confidence", _number),
                source="claude",
                alternatives={} if gpt is None else {"gpt": gpt},
                examples=record.take("examples", _all(_adam1010_example)) or (),
            )


def _adam1010_example(values: Any) -> Example:
    stated = _Record("an example", values)
    return Example(
        text=stated.take("context", _text),
        activation=stated.take("activation", _number),
        token_index=stated.take("token_idx", _integer),
    )


def _title_description(source: Source) -> Iterator[Piece]:
    """One object. The author speaks of examples, token sequences, and shows none: texts and lists of tokens are taken
    for them, and what has another form stays among the facts."""
    for key, values in _json(source, dict).items():
        record = _Record(f"{source.where}, record {key!r}", values)
        if not re.fullmatch("[0-9]{1,18}", key):
            raise record.error("its key is not a feature's index")
        try:
            examples = _all(_sequence)(record.facts.get("examples"))
            del record.facts["examples"]
        except (ValueError, RecursionError):
            examples = ()
        yield record.label(
            index=int(key),
            label=record.take("title", _text),
            description=record.take("description", _text),
            source="GPT-4",
            examples=examples,
        )


def _sequence(value: Any) -> Example:
    return Example(text=value) if isinstance(value, str) else Example(tokens=_all(_text)(value))


def _feature_map(source: Source) -> Iterator[Piece]:
    """`sae_index` is the feature; `dict_index`, which stays among the facts, is a place in the author's own list of
    concepts (probe.rs of github.com/MettaMazza/ErnOSAgent)."""
    mappings = _Record(source.where, _json(source, dict)).facts.get("mappings")
    if not isinstance(mappings, dict):
        raise DataError(f"{source.where} has no object of mappings.")
    for key, values in mappings.items():
        record = _Record(f"{source.where}, mapping {key!r}", values)
        yield record.label(
            index=record.need("sae_index", _integer),
            label=record.take("label", _text),
            category=record.take("category", _text),
            confidence=record.take("confidence", _number),
            source="automated probing",
        )


_COLUMNS = ["feature", "activation", "token", "context", "context_tokens", "token_activations"]


def _max_activations(source: Source) -> Iterator[Piece]:
    """A row for each example, and no labels."""
    for n, values in _rows(source):
        record = _Record(f"{source.where}, row {n}", values)
        tokens = record.take("context_tokens", _all(_text))
        activations = record.take("token_activations", _all(_number))
        if tokens is not None and activations is not None and len(tokens) != len(activations):
            raise record.error(f"{len(tokens)} tokens have {len(activations)} activations")
        example = Example(
            text=record.take("context", _text),
            token=record.take("token", _text),
            activation=record.need("activation", _number),
            tokens=tokens,
            activations=activations,
        )
        yield record.label(index=record.need("feature", _integer), source="max activations", examples=(example,))


def _rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a parquet file by number; of some features alone, from the row groups that can hold them.

    A row group may be the whole file, and pyarrow's scanner, which could do it all, decodes a row group at once.
    """
    wanted = None if source.features is None else pa.array(sorted(source.features), pa.int64())
    try:
        with pq.ParquetFile(source.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            there = file.schema_arrow.names
            if missing := [c for c in _COLUMNS if c not in there]:
                raise DataError(f"{source.where} has no column {', '.join(missing)}, only: {', '.join(there)}.")
            if not pa.types.is_integer(kind := file.schema_arrow.field("feature").type):
                raise DataError(f"{source.where} has a column feature of type {kind}, not of integers.")
            groups = range(file.num_row_groups) if wanted is None else _row_groups(source.path, wanted)
            for group in groups:
                n = sum(file.metadata.row_group(g).num_rows for g in range(group))
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=_COLUMNS):
                    numbers = pa.array(range(n, n + batch.num_rows))
                    n += batch.num_rows
                    if wanted is not None:
                        mask = pc.is_in(batch["feature"].cast(pa.int64()), value_set=wanted)
                        numbers, batch = numbers.filter(mask), batch.filter(mask)
                    yield from zip(numbers.to_pylist(), batch.to_pylist(), strict=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(f"{source.where} cannot be read as parquet: {e}") from e


def _row_groups(path: Path, wanted: Any) -> list[int]:
    (whole,) = ds.dataset(path, format="parquet").get_fragments()
    return [group.id for group in whole.subset(ds.field("feature").isin(wanted)).row_groups]


SCHEMAS = {
    "adam1010": Schema(_adam1010, ".json"),
    "feature_map": Schema(_feature_map, ".json"),
    "max_activations": Schema(_max_activations, ".parquet", by_example=True),
    "title_description": Schema(_title_description, ".json"),
}
"""What `Release.label_schema` may name."""
