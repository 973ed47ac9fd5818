"""What a document must be to be shown: of a kind and schema that is known, complete, and of numbers that JSON has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import UndefinedError

from sae_lens_gemma4.errors import ConfigError


def check(document: Mapping[str, Any], what: str, kind: str, schema: int) -> None:
    """Refuse another schema or kind, and numbers that JSON does not have.

    Raises:
        ConfigError: it is one of these.
    """
    if document.get("schema") != schema:
        raise ConfigError(f"This {what} has schema {document.get('schema')!r}; this version reads schema {schema}.")
    if document.get("kind") != kind:
        raise ConfigError(
            f"This {what} is of kind {document.get('kind')!r}; it must be of kind {kind!r} to be read here."
        )
    for path, value in _leaves(document):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"This {what} holds {value} at {path}; what is not defined is None in a report.")


@contextmanager
def missing_is_an_error(what: str, schema: int) -> Iterator[None]:
    """What a document lacks, as a ConfigError that says so."""
    try:
        yield
    except KeyError as missing:
        raise ConfigError(f"This {what} lacks {missing}, which schema {schema} has.") from missing
    except UndefinedError as missing:
        raise ConfigError(f"This {what} is not complete by schema {schema}: {missing}.") from missing


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{i}]")
    else:
        yield path, value
