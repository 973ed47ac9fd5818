"""What the numbers say, in sentences: the summary and every plot's caption, so that no reader depends on a plot.

Each sentence is made from the report's own values and claims no more than they do: values "went from … to …",
nobody calls them better, and a verdict is quoted, never judged anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n

Evaluation = Mapping[str, Any]
States = Sequence[tuple[str, Evaluation]]
"""Evaluations shown together, each with its state: "before" and "after"; or, alone, "base" or "only"."""

TRAINING = {
    "ve": ("Training VE", n.ve),
    "loss": ("Squared error a token", n.real),
    "threshold": ("Threshold", n.real),
}
"""What a training history is plotted for: key → its name and how its values are written."""


def went(before: str, after: str) -> str:
    """Of two values as written: "went from −1.470 to 0.812", "stayed at 0.812"."""
    if n.NOT_DEFINED in (before, after):
        return f"is {before} before" + (" and after" if before == after else f" and {after} after")
    return f"stayed at {before}" if before == after else f"went from {before} to {after}"


def verdict(evaluation: Evaluation) -> str:
    return evaluation["metrics"]["verdict"] or n.NOT_DEFINED


def reference_sentence(evaluation: Evaluation) -> str:
    metrics, corpus = evaluation["metrics"], evaluation["corpus"]
    return (
        f"On {corpus['name']}, held-out text of its own model ({n.count(metrics['n_tokens'])} tokens), the base SAE’s "
        f"variance explained (VE) is {n.ve(metrics['ve'])}, with {n.per_token(metrics['l0'])} latents active per "
        f"token; the verdict is {verdict(evaluation)}."
    )


def shift_sentences(shift: Mapping[str, Any]) -> list[str]:
    """What training did to each corpus's numbers, what it cost, and whether the saved SAE is the trained one."""
    training = shift["training"]
    return [
        *(row_sentence(row) for row in shift["rows"]),
        f"Training took {n.count(training['tokens'])} tokens and {n.duration(training['seconds'])}.",
        reload_sentence(shift["reload"]),
    ]


def row_sentence(row: Mapping[str, Any]) -> str:
    before, after = row["before"], row["after"]
    old, new = verdict(before), verdict(after)
    judged = f"stayed {old}" if old == new else went(old, new)
    change = went(n.ve(before["metrics"]["ve"]), n.ve(after["metrics"]["ve"]))
    return f"On held-out {row['corpus']}, variance explained {change}; the verdict {judged}."


def reload_sentence(reload: Mapping[str, Any]) -> str:
    if reload["identical"]:
        return "Read back by stock sae_lens in another process, the saved SAE reconstructs the same bits."
    return (
        "Read back by stock sae_lens in another process, the saved SAE does not reconstruct the same: "
        f"the largest absolute difference is {n.scientific(reload['max_abs_difference'])}."
    )


def single_sentence(evaluation: Evaluation) -> str:
    metrics, corpus, model = evaluation["metrics"], evaluation["corpus"], evaluation["model"]
    return (
        f"On {corpus['name']} ({n.count(metrics['n_tokens'])} tokens) and {model['name'] or 'this model'}, variance "
        f"explained (VE) is {n.ve(metrics['ve'])}, with {n.per_token(metrics['l0'])} latents active per token and "
        f"{n.count(metrics['dead'])} of {n.count(evaluation['sae']['d_sae'])} never active; "
        f"the verdict is {verdict(evaluation)}."
    )


def robust_caption(states: States) -> str:
    last = max(states[0][1]["metrics"]["ve_without_top_sse"], key=float)
    whole = _each(states, lambda e: n.ve(e["metrics"]["ve"]))
    rest = _each(states, lambda e: n.ve(e["metrics"]["ve_without_top_sse"][last]))
    return f"VE on all tokens: {whole}; without the top {n.top_percent(last)} by SSE: {rest}. The axis is log-like."


def concentration_caption(states: States) -> str:
    last = max(states[0][1]["metrics"]["sse_share"], key=float)
    top = n.top_percent(last)
    shares = _each(states, lambda e: n.percent(e["metrics"]["sse_share"][last]))
    return f"The {top} of tokens with the largest squared error hold {shares}; dotted: error spread evenly."


def density_caption(states: States) -> str:
    dead = _each(states, lambda e: n.count(e["metrics"]["dead"]))
    return f"Latents of {n.count(states[0][1]['sae']['d_sae'])} that never fired on these tokens: {dead}."


def training_caption(history: Sequence[Mapping[str, Any]], key: str) -> str:
    write = TRAINING[key][1]
    first, last = history[0], history[-1]
    return (
        f"It {went(write(first[key]), write(last[key]))} between {n.count(first['tokens'])} and "
        f"{n.count(last['tokens'])} tokens."
    )


def _each(states: States, write: Callable[[Evaluation], str]) -> str:
    """As "0.194 before and 0.812 after", or "0.874" where there is but one state to tell of."""
    if len(states) == 1:
        return write(states[0][1])
    return " and ".join(f"{write(evaluation)} {state}" for state, evaluation in states)
