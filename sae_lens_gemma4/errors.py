"""Every error this package raises for bad input, and the one way a wrong name is answered.

All are `Gemma4SAEError`, so a caller can catch them together, and each also is the built-in that stock
sae_lens raises in the same place, so that code written for stock goes on working.
"""

from __future__ import annotations

import difflib
import sys
import warnings
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


class HubError(Gemma4SAEError, OSError):
    """A repository or file of the hub that is gone, gated, or cannot be reached."""


class DataError(Gemma4SAEError, ValueError):
    """A corpus that is empty, too small, or not of a form that can be read."""


class ConfigError(Gemma4SAEError, ValueError):
    """A setting whose value cannot be used."""


class DependencyError(Gemma4SAEError, ImportError):
    """An installed sae_lens or transformer_lens is not the one this package extends."""


class CatalogueWarning(UserWarning):
    """Something to know of an SAE that was loaded; the kinds of it can be filtered by name."""


class CaveatWarning(CatalogueWarning):
    """What the catalogue says of a release that its user should know."""


class MismatchWarning(CatalogueWarning):
    """Something that is not as the catalogue, or the SAE itself, says."""


class UnstatedWarning(CatalogueWarning):
    """Something that matters, that neither the files nor their author state, and what was taken for it."""


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line of the caller's own code that led here, whatever of sae_lens and this package lies between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("sae_lens", "sae_lens_gemma4"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


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
