"""What is said of latents, from wherever it is written: a table, a JSON file, the catalogue, or memory.

Neuronpedia calls a label an explanation. Its kind and the model that wrote it are foreign keys there, to tables that
the site's operator fills, so they stay empty unless the caller states them; who or what stated a label is in its notes.
"""

from __future__ import annotations

import csv
import io
import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens_gemma4.catalogue.label_schemas import SCHEMAS, FeatureLabel
from sae_lens_gemma4.catalogue.labels import load_feature_labels
from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.errors import ConfigError, DataError, SAEError, check_name
from sae_lens_gemma4.interp.labels.files import iter_labels
from sae_lens_gemma4.interp.pieces import safe_text
from sae_lens_gemma4.neuronpedia.folder import Dashboards

CATALOGUE = "catalogue"
"""As a source: the labels that the release itself has."""
INDEX = ("index", "feature", "feature_index", "feature_id", "latent", "neuron", "sae_index")
TITLE = ("label", "title")
DESCRIPTION = ("description", "explanation", "text")
TYPE = ("type_name", "typename", "explanation_type")
MODEL = ("explanationmodelname", "explanation_model_name", "explanation_model")
NOTES = ("notes", "source")
"""What columns of a table, or keys of an object, are called; in any case, with blanks or hyphens for underscores."""
_READ = frozenset({*TITLE, *DESCRIPTION, *TYPE, *MODEL, *NOTES})
_DELIMITERS = (",", "\t", ";")


@dataclass(frozen=True)
class Explanation:
    """One label of a latent.

    Attributes:
        text: what is shown. What PostgreSQL or UTF-8 cannot hold is replaced: a NUL by a space, half a surrogate pair
            by U+FFFD.
        type_name, model_name: how it was made and by which model, as the site's own tables call them; None if unstated.
        notes: who or what stated it.

    Raises:
        DataError: there is no text.
    """

    text: str
    type_name: str | None = None
    model_name: str | None = None
    notes: str | None = None

    def __post_init__(self) -> None:
        for name in ("text", "type_name", "model_name", "notes"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise DataError(f"An explanation's {name} is {str(value)[:40]!r}, and no text.")
            object.__setattr__(self, name, None if value is None else safe_text(value).strip() or None)
        if not self.text:
            raise DataError("An explanation has no text.")


Explanations = dict[int, list[Explanation]]
ExplanationSource = str | Path | Mapping[Any, Any]
"""A file, `catalogue`, or by index texts, `Explanation`s, `FeatureLabel`s, objects as in JSON, or lists of these."""


def read_explanations(
    source: ExplanationSource,
    *,
    d_sae: int | None,
    release: str | None = None,
    sae_id: str | None = None,
    type_name: str | None = None,
    model_name: str | None = None,
) -> Explanations:
    """Labels by latent, ascending.

    A table (CSV, or with tabs or semicolons) has a column for the index and one or two for the text; JSON is an object
    of texts, or of objects with the same keys. A title and a description become one text, title first. `.jsonl` and
    `.parquet` are files of `interp.label_files`, in which a latent may also have no label.

    Args:
        source: what to read.
        d_sae: latents of the SAE; None where nobody knows.
        release, sae_id: whose labels `catalogue` means.
        type_name, model_name: of labels that state none.

    Raises:
        ConfigError: no such file, or no release for `catalogue`.
        DataError: it cannot be read, or has no such columns, or one of them twice; a label without text, for no latent
            of the SAE, or the second for one; names the line or the key.
        UnknownNameError, SAEError, HubError: the catalogue has no such labels, or they cannot be fetched.
    """
    if not isinstance(source, str | Path | Mapping):
        raise DataError(f"Explanations are a file, {CATALOGUE!r} or a mapping, not {str(source)[:40]!r}.")
    if source == CATALOGUE:
        found = _of_catalogue(release, sae_id)
    elif isinstance(source, Mapping):
        found = _checked(((f"Explanations, key {key!r}", key, value) for key, value in source.items()), d_sae)
    else:
        found = _checked(_of_file(Path(source)), d_sae)
    for index, ones in found.items():
        stated = [
            replace(one, type_name=one.type_name or type_name, model_name=one.model_name or model_name) for one in ones
        ]
        found[index] = list(dict.fromkeys(stated))
    return dict(sorted(found.items()))


def labels_of(
    dashboards: Dashboards,
    source: ExplanationSource,
    *,
    type_name: str | None = None,
    model_name: str | None = None,
) -> Explanations:
    """Labels for a folder of dashboards: `catalogue` means those of its SAE, and the SAE's width is held against them.

    Raises as `read_explanations`, whose arguments the others are.
    """
    sae = dashboards.settings["sae"] if dashboards.ours else {}
    facts = {name: sae.get(name) for name in ("d_sae", "release", "sae_id")}
    return read_explanations(source, **facts, type_name=type_name, model_name=model_name)


def _of_catalogue(release: str | None, sae_id: str | None) -> Explanations:
    if release is None or sae_id is None:
        raise ConfigError("The catalogue's labels are those of a release: state release and sae_id.")
    known = releases()
    schema = known[check_name("release", release, known)].label_schema
    if schema is not None and SCHEMAS[schema].by_example:
        raise SAEError(f"{release} states examples of its features and no labels.")
    labels = load_feature_labels(release, sae_id)
    found = {index: list(_of_label(label, f" ({release})")) for index, label in labels.items()}
    return {index: ones for index, ones in found.items() if ones}


def _of_label(label: FeatureLabel, origin: str = "") -> Iterator[Explanation]:
    """What a release states of a feature: its own label first, then what others said. A feature may have neither."""
    if whole := _joined(label.label, label.description):
        yield Explanation(whole, notes=f"{label.source}{origin}")
    for who, text in label.alternatives.items():
        if safe_text(text).strip():
            yield Explanation(text, notes=f"{who}{origin}")


def _checked(records: Iterable[tuple[str, Any, Any]], d_sae: int | None) -> Explanations:
    found: Explanations = {}
    places: dict[int, str] = {}
    for where, key, value in records:
        index = _index(where, key, d_sae)
        if index in places:
            raise DataError(f"{where}: latent {index} has been labelled before, by {places[index]}.")
        places[index] = where
        try:
            ones = [one for part in (value if isinstance(value, list | tuple) else [value]) for one in _of_value(part)]
        except DataError as e:
            raise DataError(f"{where}: {e}") from None
        if not ones:
            raise DataError(f"{where}: latent {index} has a label without text.")
        found[index] = ones
    return found


def _index(where: str, key: Any, d_sae: int | None) -> int:
    if isinstance(key, str) and re.fullmatch("-?[0-9]{1,18}", key.strip()):
        key = int(key)
    if isinstance(key, bool | str) or not hasattr(key, "__index__"):
        raise DataError(f"{where}: {str(key)[:40]!r} is no latent's index, which is an integer.")
    index = operator.index(key)
    if index < 0 or (d_sae is not None and index >= d_sae):
        last = "" if d_sae is None else f"; they are 0 to {d_sae - 1}"
        raise DataError(f"{where}: there is no latent {index}{last}.")
    return index


def _of_value(value: Any) -> Iterable[Explanation]:
    if isinstance(value, Explanation):
        return [value]
    if isinstance(value, FeatureLabel):
        return _of_label(value)
    if isinstance(value, str):
        return [Explanation(value)]
    if not isinstance(value, Mapping | _Object):
        raise DataError(f"{str(value)[:40]!r} is no label: a text, or an object with {TITLE[0]} or {DESCRIPTION[0]}.")
    pairs = list(value.items()) if isinstance(value, Mapping) else value.pairs
    _check_once(str(key) for key, _ in pairs)
    stated = {_key(key): part for key, part in pairs}
    title, description, type_name, model_name, notes = (
        _one(stated, keys) for keys in (TITLE, DESCRIPTION, TYPE, MODEL, NOTES)
    )
    return [Explanation(_joined(title, description), type_name, model_name, notes)]


def _of_file(path: Path) -> Iterator[tuple[str, Any, Any]]:
    if path.suffix in SCHEMAS["feature_labels"].suffixes:
        for where, label in iter_labels(path):
            if any(_of_label(label)):
                yield where, label.index, label
        return
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise ConfigError(f"Explanations {path} cannot be read: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise DataError(f"Explanations {path} are not in UTF-8: {e}.") from e
    except ValueError as e:  # of the path
        raise DataError(f"Explanations {str(path)!r} cannot be read: {e}.") from e
    yield from _of_json(path, content) if path.suffix.lower() == ".json" else _of_table(path, content)


def _of_json(path: Path, content: str) -> Iterator[tuple[str, Any, Any]]:
    try:
        whole = json.loads(content, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as e:
        raise DataError(f"Explanations {path} are no JSON: {e}.") from e
    if not isinstance(whole, _Object):
        raise DataError(f"Explanations {path} are no JSON object of texts by index.")
    for key, value in whole.pairs:
        yield f"{path}, key {key!r}", key, value


@dataclass(frozen=True)
class _Object:
    """An object with repeated keys left in: json by itself drops all but the last."""

    pairs: list[tuple[str, Any]]

    def __str__(self) -> str:
        return "an object"


def _of_table(path: Path, content: str) -> Iterator[tuple[str, Any, Any]]:
    reader, names, at = _header(path, content)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(names):
                raise DataError(f"{where} has {len(row)} columns, and the first line {len(names)}.")
            yield where, row[at], {name: cell for name, cell in zip(names, row, strict=True) if cell.strip()}
    except csv.Error as e:
        raise DataError(f"{path}, line {reader.line_num}: {e}.") from e


def _header(path: Path, content: str) -> tuple[Any, list[str], int]:
    """A reader that has read the first line, the columns, and which of them is the index."""
    for delimiter in _DELIMITERS:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        try:
            columns = next(reader, [])
        except csv.Error as e:
            raise DataError(f"{path}, line 1: {e}.") from e
        names = [_key(name) for name in columns]
        indices = [i for i, name in enumerate(names) if name in INDEX]
        if not indices or not set(names) & {*TITLE, *DESCRIPTION}:
            continue
        if len(indices) > 1:
            both = " and ".join(columns[i].strip() for i in indices)
            raise DataError(f"The first line of {path} names several columns for index, {both}; one of them is wanted.")
        try:
            _check_once(columns)
        except DataError as e:
            raise DataError(f"{path}, line 1: {e}") from None
        return reader, names, indices[0]
    first = content.split("\n", 1)[0].strip()[:80]
    raise DataError(
        f"The first line of {path}, {first!r}, names no columns for index and text; they may be called index and label."
    )


def _check_once(names: Iterable[str]) -> None:
    """Raise `DataError` where two of the names that are read are one."""
    seen: dict[str, str] = {}
    for name in map(str.strip, names):
        key = _key(name)
        if key in _READ and key in seen:
            raise DataError(f"It has {key} twice, as {seen[key]!r} and {name!r}, and one of them is wanted.")
        seen[key] = name


def _key(name: object) -> str:
    return re.sub("[ -]+", "_", str(name).strip().lower())


def _one(stated: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The text under one of these keys; of two that say the same kind of thing, neither."""
    found = {key: stated[key] for key in keys if stated.get(key) not in (None, "")}
    if len(found) > 1:
        raise DataError(f"It has both {' and '.join(found)}, and one of them is wanted.")
    for key, value in found.items():
        if not isinstance(value, str):
            raise DataError(f"Its {key} is {str(value)[:40]}, and no text.")
        return value
    return None


def _joined(title: str | None, description: str | None) -> str:
    """One text: the title, then what describes it."""
    title, description = safe_text(title or "").strip(), safe_text(description or "").strip()
    if not title or description.lower().startswith(title.lower()):
        return description
    return f"{title}: {description}" if description else title
