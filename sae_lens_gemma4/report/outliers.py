"""The tokens with the largest squared error, each in its text, with every token's own error painted on it.

Whether a handful of tokens or the whole text goes wrong, and at what, is seen at once. Depth of colour follows the
normalised error; where colour does not reach, thickness of the underline and the number itself say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.tables import Table, outlier_shares
from sae_lens_gemma4.report.visible import visible
from sae_lens_gemma4.report.words import Evaluation, States, some_of

LEVELS = (0.05, 0.15, 0.3, 0.6, 1.0)
"""Where one depth of colour ends and the next begins, in ‖x − x̂‖² / ‖x‖²."""
LEGEND = (
    f"under {LEVELS[0]:g}",
    *(f"{low:g}–{high:g}" for low, high in pairwise(LEVELS)),
    f"{LEVELS[-1]:g} and more",
)
KINDS = {
    "first": "first in the document",
    "delimiter": "delimiter",
    "repeat": "repeated token",
    "special": "special token",
}
"""What a token can be: key → in words."""
SHOWN = 5
"""Tokens that stand open; the rest is folded away."""


class Span(NamedTuple):
    """A token of the text: what is shown, the class of its paint, what it says when asked, whether it is the one."""

    text: str
    paint: str
    says: str
    itself: bool


class Token(NamedTuple):
    """One of the worst tokens: its rank, its text, what is to know of it, and its surroundings."""

    rank: int
    text: str
    error: str
    facts: list[str]
    spans: list[Span]


class Outliers(NamedTuple):
    """One evaluation's worst tokens."""

    title: str
    caption: str
    tokens: list[Token]
    rest: list[Token]
    shares: Table | None


def outliers(states: States) -> list[Outliers]:
    """The worst tokens of every evaluation that names any."""
    return [_of(state, e) for state, e in states if e["outliers"]["tokens"]]


def _of(state: str, evaluation: Evaluation) -> Outliers:
    found, n_tokens = evaluation["outliers"], evaluation["metrics"]["n_tokens"]
    top = f"top {n.top(str(found['fraction']), n_tokens)}"
    tokens = [_token(i, token, n_tokens) for i, token in enumerate(found["tokens"])]
    return Outliers(
        title="Tokens with the largest squared error" + (f", {state}" if state in ("before", "after") else ""),
        caption=f"Here are {some_of(len(tokens), found['count'])} tokens that are the {top} by squared error.",
        tokens=tokens[:SHOWN],
        rest=tokens[SHOWN:],
        shares=outlier_shares(found["shares"], KINDS, top),
    )


def _token(index: int, token: Mapping[str, Any], n_tokens: int) -> Token:
    at, context = token["at"], token["context"]
    if not 0 <= at < len(context):
        raise ConfigError(
            f"This report's outliers.tokens[{index}].at is {at}; its context has the indices 0 to {len(context) - 1}."
        )
    role = [f"role {visible(token['role'])}"] if token["role"] is not None else []
    return Token(
        rank=token["sse_rank"],
        text=visible(token["text"]),
        error=n.real(context[at][1]),
        facts=[
            f"{n.percent(token['sse_share'])} of all squared error",
            f"norm {n.real(token['norm'])}, rank {n.count(token['norm_rank'])} of {n.count(n_tokens)}",
            ", ".join(f"{where} {n.count(token[where])}" for where in ("document", "block", "position")),
            *role,
            *(said for kind, said in KINDS.items() if token[kind]),
        ],
        spans=[_span(text, error, i == at) for i, (text, error) in enumerate(context)],
    )


def _span(text: str, error: float | None, itself: bool) -> Span:
    shown = visible(text)
    says = f"{shown}: error " + ("not measured" if error is None else n.real(error))
    return Span(shown, "unmeasured" if error is None else f"e{level(error)}", says, itself)


def level(error: float) -> int:
    """How deep an error is painted, 0 to 5."""
    return sum(error >= bound for bound in LEVELS)
