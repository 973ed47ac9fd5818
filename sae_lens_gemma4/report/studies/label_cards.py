"""Latents as a reader meets them: the label, what it is worth, and the contexts with the tokens painted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.study import Card, Token
from sae_lens_gemma4.report.visible import visible

SHOWN = 12
"""Cards that stand open; the rest is folded away."""
_CONTEXTS, _FEWER = 4, 2
"""Contexts of an open card and of a folded one."""
_CHARACTERS = 400
"""Of a text without tokens."""


def label_cards(labels: Sequence[Mapping[str, Any]]) -> list[Card]:
    """Catalogue labels as plain data, with the facts that a test of them adds."""
    return [label_card(label, _CONTEXTS if i < SHOWN else _FEWER) for i, label in enumerate(labels)]


def label_card(label: Mapping[str, Any], contexts: int = _CONTEXTS) -> Card:
    examples = label["examples"][:contexts]
    top = max(
        (value for e in label["examples"] for value in e["activations"] or (e["activation"],) if value), default=0
    )
    others = [(f"by {who}", visible(text)) for who, text in label["alternatives"].items()]
    return Card(
        title=f"{n.count(label['index'])}: {visible(label['label'] or label['description'] or 'no label')}",
        text="" if not label["description"] or not label["label"] else visible(label["description"]),
        facts=[("by", visible(label["source"])), *others, *_facts(label)],
        contexts=[spans for e in examples if (spans := _tokens(e, top))],
    )


def _facts(label: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = label["facts"]
    found: list[tuple[str, str]] = []
    tier = facts.get("confidence_tier")
    if label["confidence"] is not None:
        floor = (
            "" if facts.get("confidence_floor") is None else f", of a dealt label {n.fixed3(facts['confidence_floor'])}"
        )
        found.append(("confidence", n.fixed3(label["confidence"]) + (f" ({tier})" if tier else "") + floor))
    elif facts.get("confidence_reason"):
        found.append(("confidence", f"{n.NOT_DEFINED}: {facts['confidence_reason']}"))
    if "cv_validated" in facts:
        kept = "confirmed" if facts["cv_validated"] else "not confirmed"
        floor = "" if facts.get("cv_floor_f1") is None else f", of a dealt label {n.fixed3(facts['cv_floor_f1'])}"
        found.append(("held-out", f"{kept}, F1 {n.fixed3(facts['cv_f1'])}{floor}"))
    if facts.get("agreement") is not None:
        found.append(("agreement κ", n.fixed3(facts["agreement"])))
    if facts.get("probe_accuracy") is not None:
        shuffled = (facts.get("probe_controls") or {}).get("shuffled")
        control = "" if shuffled is None else f", shuffled {n.percent(shuffled['accuracy'])}"
        found.append(("probe", f"{n.percent(facts['probe_accuracy'])}{control}"))
    if facts.get("freq") is not None:
        found.append(("fires on", f"{n.percent(facts['freq'])} of tokens"))
    return found


def _tokens(example: Mapping[str, Any], top: float) -> list[Token]:
    """A context's tokens; the text alone where there are none."""
    tokens, activations = example["tokens"], example["activations"]
    if not tokens:
        text = str(example["text"] or "")
        return [Token(visible(text[:_CHARACTERS]), 0, "activation not stated")] if text else []
    values = activations or [None] * len(tokens)
    return [
        Token(
            visible(token),
            0 if not value or top <= 0 else min(max(value / top, 0), 1),
            f"{visible(token)}: activation {n.real(value)}",
            number == example["token_index"],
        )
        for number, (token, value) in enumerate(zip(tokens, values, strict=True))
    ]
