"""A label as a row of plain data, the same in every file that it is written to.

What a judge or a tokenizer hands back may hold what a file cannot: half a surrogate pair, NaN, a numpy scalar. It is
put right or refused here, once, before anything is written, so that JSON lines and parquet cannot come to differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sae_lens_gemma4.catalogue.label_records import Example, FeatureLabel
from sae_lens_gemma4.errors import DataError

_LARGEST = 2**63 - 1


def row_of(label: FeatureLabel) -> dict[str, Any]:
    """The columns of `labels.jsonl` and `labels.parquet` for one latent; facts are the JSON of an object.

    Half a surrogate pair in any text becomes U+FFFD.

    Raises:
        DataError: a value that is not of its column's kind, or not finite; names the latent.
    """
    where = f"The label of latent {label.index}"
    return {
        "index": _integer(label.index, "The index of a label"),
        "label": _text(label.label, f"{where}: label"),
        "description": _text(label.description, f"{where}: description"),
        "category": _text(label.category, f"{where}: category"),
        "confidence": _number(label.confidence, f"{where}: confidence"),
        "source": _need_text(label.source, f"{where}: source"),
        "alternatives": [
            {"source": _need_text(who, f"{where}: who stated another"), "text": _need_text(text, f"{where}: {who}'s")}
            for who, text in label.alternatives.items()
        ],
        "examples": [_example(example, f"{where}: example {n}") for n, example in enumerate(label.examples)],
        "facts": json.dumps(plain(label.facts, f"{where}: facts"), ensure_ascii=False, allow_nan=False),
    }


def plain(value: Any, where: str) -> Any:
    """Facts as JSON has them: numpy's scalars as Python's, tuples as lists, texts as `valid_text`.

    Raises:
        DataError: a number that is not finite, a key that is no text, or what JSON does not have; `where` and the keys
            on the way say which.
    """
    try:
        return _plain(value, where)
    except RecursionError as e:
        raise DataError(f"{where} is nested too deeply to be written as JSON.") from e


def valid_text(text: str) -> str:
    """A text that UTF-8 can hold: half a surrogate pair becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, float):
        return _number(value, where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise DataError(f"{where} has the key {key!r}, which is no text.")
        return {valid_text(key): _plain(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{where}[{n}]") for n, part in enumerate(value)]
    raise DataError(f"{where} is a {type(value).__name__}, which JSON does not have.")


def _example(example: Example, where: str) -> dict[str, Any]:
    tokens, activations = example.tokens, example.activations
    if tokens is not None and activations is not None and len(tokens) != len(activations):
        raise DataError(f"{where}: {len(tokens)} tokens have {len(activations)} activations.")
    return {
        "text": _text(example.text, f"{where}, text"),
        "token": _text(example.token, f"{where}, token"),
        "activation": _number(example.activation, f"{where}, activation"),
        "token_index": None if example.token_index is None else _integer(example.token_index, f"{where}, token_index"),
        "tokens": None if tokens is None else [_need_text(t, f"{where}, token {n}") for n, t in enumerate(tokens)],
        "activations": None
        if activations is None
        else [_need_number(a, f"{where}, activation {n}") for n, a in enumerate(activations)],
    }


def _text(value: object, where: str) -> str | None:
    return None if value is None else _need_text(value, where)


def _need_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {str(value)[:40]!r}, and no text.")
    return valid_text(value)


def _number(value: Any, where: str) -> float | None:
    return None if value is None else _need_number(value, where)


def _need_number(value: Any, where: str) -> float:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where} is {str(value)[:40]!r}, and no number.")
    if not math.isfinite(value):
        raise DataError(f"{where} is {value}. State None where there is no figure.")
    return float(value)


def _integer(value: Any, where: str) -> int:
    if isinstance(value, np.integer):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise DataError(f"{where} is {str(value)[:40]!r}, and no integer from 0.")
    return int(value)
