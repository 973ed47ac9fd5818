"""How each author writes labels and examples down: one parser a schema, each to the same `FeatureLabel`.

The last schema is this package's own, which `interp.label_files` writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.dataset as ds  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from sae_lens_gemma4.catalogue.label_records import (
    Example,
    FeatureLabel,
    Piece,
    Record,
    Schema,
    Source,
    integer,
    list_of,
    number,
    read_json,
    text,
    unrepeated,
)
from sae_lens_gemma4.errors import DataError, SAEError
from sae_lens_gemma4.models.hook_names import layer_of

__all__ = ["SCHEMAS", "Example", "FeatureLabel", "Piece", "Schema", "Source"]

_BATCH_ROWS = 1024
_BUFFER_BYTES = 2**20


def _adam1010(source: Source) -> Iterator[Piece]:
    """One list for all layers. The author's page calls the two labellers Claude Sonnet and GPT-4o; where others wrote
    the labels, `interp.label_forms` says so under two keys more."""
    layer = None if source.hook is None else layer_of(source.hook)
    if layer is None:
        raise SAEError(f"{source.where} is by layers, and the hook {source.hook} is in none.")
    for n, values in enumerate(read_json(source, list)):
        record = Record(f"{source.where}, record {n}", values)
        if record.need("layer", integer) == layer:
            gpt = record.take("gpt_label", text)
            yield record.label(
                index=record.need("feature_id", integer),
                label=record.take("claude_label", text),
                category=record.take("claude_category", text),
                confidence=record.take("confidence", number),
                source=record.take("claude_label_source", text) or "claude",
                alternatives={} if gpt is None else {record.take("gpt_label_source", text) or "gpt": gpt},
                examples=record.take("examples", list_of(_adam1010_example)) or (),
            )


def _adam1010_example(values: Any) -> Example:
    stated = Record("an example", values)
    return Example(
        text=stated.take("context", text),
        activation=stated.take("activation", number),
        token_index=stated.take("token_idx", integer),
    )


def _title_description(source: Source) -> Iterator[Piece]:
    """One object. The author speaks of examples, token sequences, and shows none: texts and lists of tokens are taken
    for them, and what has another form stays among the facts."""
    for key, values in read_json(source, dict).items():
        record = Record(f"{source.where}, record {key!r}", values)
        if not re.fullmatch("[0-9]{1,18}", key):
            raise record.error("its key is not a feature's index")
        try:
            examples = list_of(_sequence)(record.facts.get("examples"))
            del record.facts["examples"]
        except (ValueError, RecursionError):
            examples = ()
        yield record.label(
            index=int(key),
            label=record.take("title", text),
            description=record.take("description", text),
            source=record.take("source", text) or "GPT-4",
            examples=examples,
        )


def _sequence(value: Any) -> Example:
    return Example(text=value) if isinstance(value, str) else Example(tokens=list_of(text)(value))


def _feature_map(source: Source) -> Iterator[Piece]:
    """`sae_index` is the feature; `dict_index`, which stays among the facts, is a place in the author's own list of
    concepts (probe.rs of github.com/MettaMazza/ErnOSAgent)."""
    mappings = Record(source.where, read_json(source, dict)).facts.get("mappings")
    if not isinstance(mappings, dict):
        raise DataError(f"{source.where} has no object of mappings.")
    for key, values in mappings.items():
        record = Record(f"{source.where}, mapping {key!r}", values)
        yield record.label(
            index=record.need("sae_index", integer),
            label=record.take("label", text),
            category=record.take("category", text),
            confidence=record.take("confidence", number),
            source=record.take("source", text) or "automated probing",
        )


_COLUMNS = ["feature", "activation", "token", "context", "context_tokens", "token_activations"]


def _max_activations(source: Source) -> Iterator[Piece]:
    """A row for each example, and no labels."""
    for n, values in _rows(source, "feature", _COLUMNS[1:], _COLUMNS):
        record = Record(f"{source.where}, row {n}", values)
        tokens = record.take("context_tokens", list_of(text))
        activations = record.take("token_activations", list_of(number))
        if tokens is not None and activations is not None and len(tokens) != len(activations):
            raise record.error(f"{len(tokens)} tokens have {len(activations)} activations")
        example = Example(
            text=record.take("context", text),
            token=record.take("token", text),
            activation=record.need("activation", number),
            tokens=tokens,
            activations=activations,
        )
        yield record.label(index=record.need("feature", integer), source="max activations", examples=(example,))


def _feature_labels(source: Source) -> Iterator[Piece]:
    """This package's own form: a row a feature, as JSON lines or as parquet, with the same columns."""
    parquet = source.path.suffix == ".parquet"
    rows = _rows(source, "index", ("source",), None) if parquet else _lines(source)
    for n, values in rows:
        record = Record(f"{source.where}, {'row' if parquet else 'line'} {n}", values)
        facts = record.take("facts", _facts)
        label = record.label(
            index=record.need("index", integer),
            label=record.take("label", text),
            description=record.take("description", text),
            category=record.take("category", text),
            confidence=record.take("confidence", number),
            source=record.need("source", text),
            alternatives=record.take("alternatives", _alternatives) or {},
            examples=record.take("examples", list_of(_example)) or (),
        )
        record.facts.update(facts or {})
        yield label


def _example(values: Any) -> Example:
    stated = Record("an example", values)
    tokens, activations = stated.take("tokens", list_of(text)), stated.take("activations", list_of(number))
    if tokens is not None and activations is not None and len(tokens) != len(activations):
        raise ValueError(f"{len(tokens)} tokens have {len(activations)} activations")
    return Example(
        text=stated.take("text", text),
        token=stated.take("token", text),
        activation=stated.take("activation", number),
        token_index=stated.take("token_index", integer),
        tokens=tokens,
        activations=activations,
    )


def _alternatives(value: Any) -> dict[str, str]:
    pairs = [Record("an alternative", values) for values in list_of(dict)(value)]
    stated = [(pair.need("source", text), pair.need("text", text)) for pair in pairs]
    return unrepeated(stated)


def _facts(value: Any) -> dict[str, Any]:
    facts = json.loads(value, object_pairs_hook=unrepeated) if isinstance(value, str) else value
    if not isinstance(facts, dict):
        raise ValueError("not an object, nor the JSON of one")
    return facts


def _lines(source: Source) -> Iterator[tuple[int, Any]]:
    try:
        with source.path.open("rb") as file:
            for n, line in enumerate(file, start=1):
                if line.strip():
                    yield n, json.loads(line, object_pairs_hook=unrepeated)
    except OSError as e:
        raise DataError(f"{source.where} cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{source.where}, line {n}, is not JSON: {e}.") from e


def _rows(
    source: Source, key: str, needed: Sequence[str], columns: list[str] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a parquet file by number; of some features alone, from the row groups that can hold them.

    A row group may be the whole file, and pyarrow's scanner, which could do it all, decodes a row group at once.

    Args:
        key: the column of the features' indices.
        needed: what else the file must have.
        columns: what is read; all of them if None.
    """
    wanted = None if source.features is None else pa.array(sorted(source.features), pa.int64())
    try:
        with pq.ParquetFile(source.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            there = file.schema_arrow.names
            if missing := [c for c in (key, *needed) if c not in there]:
                raise DataError(f"{source.where} has no column {', '.join(missing)}, only: {', '.join(there)}.")
            if not pa.types.is_integer(kind := file.schema_arrow.field(key).type):
                raise DataError(f"{source.where} has a column {key} of type {kind}, not of integers.")
            groups = range(file.num_row_groups) if wanted is None else _row_groups(source.path, key, wanted)
            for group in groups:
                n = sum(file.metadata.row_group(g).num_rows for g in range(group))
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
                    numbers = pa.array(range(n, n + batch.num_rows))
                    n += batch.num_rows
                    if wanted is not None:
                        mask = pc.is_in(batch[key].cast(pa.int64()), value_set=wanted)
                        numbers, batch = numbers.filter(mask), batch.filter(mask)
                    yield from zip(numbers.to_pylist(), batch.to_pylist(), strict=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(f"{source.where} cannot be read as parquet: {e}") from e


def _row_groups(path: Path, key: str, wanted: Any) -> list[int]:
    (whole,) = ds.dataset(path, format="parquet").get_fragments()
    return [group.id for group in whole.subset(ds.field(key).isin(wanted)).row_groups]


SCHEMAS = {
    "adam1010": Schema(_adam1010, (".json",)),
    "feature_labels": Schema(_feature_labels, (".jsonl", ".parquet")),
    "feature_map": Schema(_feature_map, (".json",)),
    "max_activations": Schema(_max_activations, (".parquet",), by_example=True),
    "title_description": Schema(_title_description, (".json",)),
}
"""What `Release.label_schema` may name."""
