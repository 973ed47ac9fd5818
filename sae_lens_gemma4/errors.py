"""Every error this package raises for bad input, and the one way a wrong name is answered.

All are `Gemma4SAEError`, so a caller can catch them together, and each also is the built-in that stock
sae_lens raises in the same place, so that code written for stock goes on working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Gemma4SAEError(Exception):
    """Base of all errors of this package. Its message is complete: what is wrong, and what to do."""


class UnknownNameError(Gemma4SAEError, ValueError):
    """A name that does not exist; the message gives the nearest ones that do."""

    def __init__(self, kind: str, name: object, known: Iterable[str], hint: str = "") -> None:
        known = sorted(map(str, known))
        self.kind, self.name, self.nearest = kind, name, nearest(str(name), known)
        if self.nearest:
            answer = "Did you mean " + " or ".join(repr(n) for n in self.nearest) + "?"
        elif known:
            answer = "Known: " + ", ".join(known[:12]) + (", …" if len(known) > 12 else "") + "."
        else:
            answer = "None are known."
        super().__init__(f"Unknown {kind} {name!r}. {answer}{' ' + hint if hint else ''}")


class ModelError(Gemma4SAEError, ValueError):
    """A model that is not Gemma 4, or that cannot be loaded as asked."""


class SAEError(Gemma4SAEError, ValueError):
    """An SAE that cannot be read, restored or attached as asked."""


class DataError(Gemma4SAEError, ValueError):
    """A corpus that is empty, too small, or not of a form that can be read."""


class ConfigError(Gemma4SAEError, ValueError):
    """A setting whose value cannot be used."""


class DependencyError(Gemma4SAEError, ImportError):
    """An installed sae_lens or transformer_lens is not the one this package extends."""


def nearest(name: str, known: Iterable[str], n: int = 2) -> list[str]:
    """Up to `n` of `known` that look like `name`, best first, upper and lower case alike."""
    by_lower: dict[str, str] = {k.lower(): k for k in known}
    return [by_lower[m] for m in difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.6)]


def check_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> str:
    """Return `name` if it is one of `known`, else raise `UnknownNameError`."""
    known = list(known)
    if name not in known:
        raise UnknownNameError(kind, name, known, hint)
    return name
