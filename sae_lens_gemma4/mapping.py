"""Plain data as dataclasses, strictly: what a YAML file may say is checked before anything is loaded.

Recipes and protocols are files that people write by hand. A key that does not exist is answered with the nearest
that does, and a value of the wrong kind is named with its place in the file, because the other way to learn of a
typing error is a run that silently did something else.
"""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from sae_lens_gemma4.errors import ConfigError, UnknownNameError, check_name

T = TypeVar("T")


def from_yaml(cls: type[T], path: str | Path, what: str) -> T:
    """Make a dataclass of a YAML file; `what` is what its errors call the file, as "recipe".

    Raises:
        ConfigError: no such file, not YAML, or a value that cannot be used, with its place.
        UnknownNameError: a key that does not exist.
    """
    return from_mapping(cls, read_yaml(path, what), what)


def read_yaml(path: str | Path, what: str) -> Any:
    """The plain data of a YAML file; errors as `from_yaml`."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{what.capitalize()} {path} cannot be read: {e.strerror}.") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{what.capitalize()} {path} is not YAML: {str(e).splitlines()[0]}.") from e


def from_mapping(cls: type[T], data: Any, where: str) -> T:
    """Make a dataclass of plain data, strictly: unknown keys, missing keys and wrong kinds are errors in words."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a mapping, not {_kind(data)}.")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for key in data:
        if key not in known:
            raise UnknownNameError(f"key in {where}", key, known)
    missing = [n for n, f in known.items() if n not in data and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")
    return cls(**{key: typed(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`: a dataclass, `list[...]`, `dict[str, Any]`, `X | None`, a `Literal` or a plain type.

    Raises:
        ConfigError: it is none; `where` says which value.
    """
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (h for h in get_args(hint) if h is not type(None))
    if is_dataclass(hint):
        return from_mapping(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        return check_name(where, value, get_args(hint))
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, not {_kind(value)} ({value!r}).")
        return [typed(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    plain = get_origin(hint) or hint
    if plain is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a text
        except ValueError:
            pass
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float) and plain is float and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, not {value}.")
    if isinstance(value, int) and plain is int and abs(value) >= 2**63:
        raise ConfigError(f"{where} is too large a number: {value}.")
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ConfigError(f"{where} must be {plain.__name__}, not {_kind(value)} ({value!r}).")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
