"""Labels as files that anyone's tools read: JSON lines and parquet with one schema, and a card that states it.

`datasets` guesses the types of JSON lines from the first 10 MB, and fails with a CastError on a later row where those
held only nulls and empty lists. So the types are fixed here, for parquet and for JSON that is loaded with
`label_features()`; and the JSON lines begin with rows that between them show the type of every column that has one, so
that they load without it as well. (A card cannot do this: one folder's configs must all be of one kind of file.)

Files are written beside their places and renamed into them when all are whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from sae_lens_gemma4.catalogue.label_schemas import SCHEMAS, FeatureLabel, Source
from sae_lens_gemma4.errors import ConfigError, DataError, Gemma4SAEError
from sae_lens_gemma4.evaluation.result import write_text
from sae_lens_gemma4.interp.labels.card import Contents, LabelCard, card_text
from sae_lens_gemma4.interp.labels.rows import row_of

JSONL, PARQUET, CARD = "labels.jsonl", "labels.parquet", "README.md"
_BATCH_ROWS, _BATCH_BYTES = 1024, 2**24
"""Rows that are held at most: parquet's row groups, small enough to find a few latents without reading the rest."""
_COUNTED = ("label", "category", "confidence", "examples")

_EXAMPLE = pa.struct(
    [
        ("text", pa.string()),
        ("token", pa.string()),
        ("activation", pa.float64()),
        ("token_index", pa.int64()),
        ("tokens", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float64())),
    ]
)
COLUMNS = pa.schema(
    [
        ("index", pa.int64()),
        ("label", pa.string()),
        ("description", pa.string()),
        ("category", pa.string()),
        ("confidence", pa.float64()),
        ("source", pa.string()),
        ("alternatives", pa.list_(pa.struct([("source", pa.string()), ("text", pa.string())]))),
        ("examples", pa.list_(_EXAMPLE)),
        ("facts", pa.string()),
    ]
)
"""The columns of both files, by their types in Arrow."""


class LabelFiles(NamedTuple):
    """What `write_labels` wrote; `n` is the number of rows."""

    jsonl: Path
    parquet: Path
    card: Path
    n: int


def label_features() -> Any:
    """The columns as `datasets.Features`, for `load_dataset("json", data_files=…, features=label_features())`."""
    from datasets import Features

    return Features.from_arrow_schema(COLUMNS)


def write_labels(labels: Iterable[FeatureLabel], folder: str | Path, card: LabelCard) -> LabelFiles:
    """Write labels as `labels.jsonl`, `labels.parquet` and `README.md`; other files are left alone.

    Labels may come from a generator: a batch of rows is held. Parquet keeps their order; in the JSON lines, the dozen
    or fewer that show every column's type come first.

    Args:
        card: what the card says beyond what is counted here.

    Raises:
        DataError: there are none, two for one latent, or a value that cannot be written (`row_of`). Nothing is written.
        ConfigError: the folder cannot be written.
    """
    folder = Path(folder)
    with _beside(folder) as partial:
        contents = _write(labels, partial / JSONL, partial / PARQUET)
        write_text(card_text(card, contents, COLUMNS), partial / CARD)
    return LabelFiles(folder / JSONL, folder / PARQUET, folder / CARD, contents.n)


def read_labels(path: str | Path) -> dict[int, FeatureLabel]:
    """Labels from one of the files that `write_labels` writes, by index, ascending.

    Raises:
        ConfigError: no such file, or one that ends neither in .jsonl nor in .parquet.
        DataError: it cannot be read, or labels one latent twice; names the line or row.
    """
    found: dict[int, FeatureLabel] = {}
    for where, label in iter_labels(path):
        if label.index in found:
            raise DataError(f"{where}: latent {label.index} has been labelled before.")
        found[label.index] = label
    return dict(sorted(found.items()))


def iter_labels(path: str | Path) -> Iterator[tuple[str, FeatureLabel]]:
    """The same one by one, in the file's order, each with its place in the file. Errors as `read_labels`, but that one
    index may come twice."""
    path, schema = Path(path), SCHEMAS["feature_labels"]
    if path.suffix not in schema.suffixes:
        raise ConfigError(f"Labels {path} end neither in .jsonl nor in .parquet.")
    if not path.is_file():
        raise ConfigError(f"Labels {path} cannot be read: there is no such file.")
    for where, label in schema.parse(Source(path, str(path))):
        if label.index < 0:
            raise DataError(f"{where}: there is no latent {label.index}.")
        yield where, label


def _write(labels: Iterable[FeatureLabel], jsonl: Path, parquet: Path) -> Contents:
    seen: set[int] = set()
    counts: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    categories: set[str] = set()
    typed: dict[str, tuple[int, str]] = {}
    rest = jsonl.with_name(".rest")
    with rest.open("w", encoding="utf-8", newline="\n") as lines, pq.ParquetWriter(parquet, COLUMNS) as table:
        for batch in _batches(labels, seen):
            for n, (row, line) in enumerate(batch, start=len(seen) - len(batch)):
                for column in _typed_by(row):
                    if column not in typed or len(line) < len(typed[column][1]):
                        typed[column] = n, line
                lines.write(line)
            rows = [row for row, _ in batch]
            table.write_table(pa.Table.from_pylist(rows, schema=COLUMNS))
            for row in rows:
                counts.update(key for key in _COUNTED if row[key] not in (None, []))
                counts["example"] += len(row["examples"])
                sources[row["source"]] += 1
                categories.update([row["category"]] if row["category"] is not None else [])
    if not seen:
        raise DataError("There are no labels to write.")
    first = dict(typed.values())
    with jsonl.open("wb") as lines_first, rest.open("rb") as lines_then:
        lines_first.writelines(line.encode() for _, line in sorted(first.items()))
        lines_first.writelines(line for n, line in enumerate(lines_then) if n not in first)
    return Contents(
        n=len(seen),
        labelled=counts["label"],
        categorised=counts["category"],
        categories=len(categories),
        with_confidence=counts["confidence"],
        with_examples=counts["examples"],
        examples=counts["example"],
        sources=dict(sources.most_common()),
    )


def _typed_by(row: Mapping[str, Any]) -> set[str]:
    """The columns, and parts of columns, whose types can be seen in a row."""
    seen = {name for name in ("label", "description", "category", "confidence") if row[name] is not None}
    seen.update(["alternatives"] if row["alternatives"] else [])
    for example in row["examples"]:
        seen.update(f"examples.{name}" for name, value in example.items() if value not in (None, []))
    return seen


def _batches(labels: Iterable[FeatureLabel], seen: set[int]) -> Iterator[list[tuple[dict[str, Any], str]]]:
    """Rows and their lines. A column of a batch stays far below the 2 GB that Arrow's strings can hold."""
    batch: list[tuple[dict[str, Any], str]] = []
    size = 0
    for label in labels:
        row = row_of(label)
        if row["index"] in seen:
            raise DataError(f"There are two labels of latent {row['index']}; state others among its alternatives.")
        seen.add(row["index"])
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        batch.append((row, line))
        size += len(line)
        if len(batch) == _BATCH_ROWS or size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder within `folder` whose files are moved into it when all of them are whole."""
    partial: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".labels.partial-", dir=folder))
        yield partial
        for name in (PARQUET, JSONL, CARD):
            with (partial / name).open("r+b") as handle:
                os.fsync(handle.fileno())
        for name in (PARQUET, JSONL, CARD):
            (partial / name).replace(folder / name)
    except Gemma4SAEError:  # of whoever makes the labels; some are OSErrors
        raise
    except (OSError, pa.ArrowException) as e:
        raise ConfigError(f"Labels cannot be written to {folder}: {getattr(e, 'strerror', None) or e}.") from e
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
