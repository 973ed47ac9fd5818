"""What the numbers say, in sentences: the summary and every plot's caption, so that no reader depends on a plot.

Each sentence is made from the report's own values and claims no more than they do: values "went from … to …",
nobody calls them better, and a verdict is quoted with its reason, never judged anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n

Evaluation = Mapping[str, Any]
Metrics = Mapping[str, Any]
States = Sequence[tuple[str, Evaluation]]
"""Evaluations shown together, each with its state: "before" and "after"; or, alone, "base" or "only"."""

TRAINING = {
    "ve": ("Training VE", n.ve),
    "loss": ("Squared error a token", n.real),
    "threshold": ("Threshold", n.real),
}
"""What a training history is plotted for: key → its name and how its values are written."""
CORRECTIONS = {
    "none": "none",
    "scale": "activations divided by the factor",
    "mean": "mean moved; the factor is γ",
    "threshold": "thresholds multiplied by the factor",
}
"""What a trial on a misfit changes: key → in words."""


def went(before: str, after: str) -> str:
    """Of two values as written: "went from −1.470 to 0.812", "stayed at 0.812"."""
    if n.NOT_DEFINED in (before, after):
        return f"is {before} before" + (" and after" if before == after else f" and {after} after")
    return f"stayed at {before}" if before == after else f"went from {before} to {after}"


def verdict(evaluation: Evaluation) -> str:
    return evaluation["metrics"]["verdict"] or n.NOT_DEFINED


def sae_name(sae: Mapping[str, Any]) -> str:
    return str(sae["sae_id"] or sae["path"] or "SAE without a name")


def told_apart(rows: Sequence[Mapping[str, Any]], *known: Sequence[str]) -> list[str]:
    """A label for each row of a comparison: the first of `known` that tells all apart, else the last of them with the
    names of the SAEs, else with their hashes."""
    saes = [(row["before"]["sae"], row["after"]["sae"]) for row in rows]
    after = [f"{label}, {sae_name(sae)}" for label, (_, sae) in zip(known[-1], saes, strict=True)]
    both = [f"{label} against {sae_name(sae)}" for label, (sae, _) in zip(after, saes, strict=True)]
    hashes = [f"{label} ({old['hash']}, {new['hash']})" for label, (old, new) in zip(both, saes, strict=True)]
    return next((list(x) for x in (*known, after, both) if len(set(x)) == len(x)), hashes)


def stated(value: object, yes: str = "yes", no: str = "no") -> str:
    """A setting as text: yes, no, the value, or that nobody states it."""
    if isinstance(value, bool):
        return yes if value else no
    return "not stated" if value is None else str(value)


def diagnosis(evaluation: Evaluation) -> str:
    """Why the verdict is what it is, whether a norm screen would have seen it, and what is amiss with a misfit."""
    found = evaluation["diagnosis"]
    said = [_sentence(found["reason"])] if found["reason"] else []
    if found["verdict"] == "outlier-dominated":
        screen = {True: "would have seen", False: "would not have seen", None: "may or may not have seen"}
        said.append(f"A screen by norm {screen[found['norm_screen']]} these tokens.")
    if found["verdict"] == "misfit":
        said.append(f"Likely cause: {found['cause']}." if found["cause"] else "No single cause was found.")
        said += [_sentence(found["cause_reason"])] if found["cause_reason"] else []
    return " ".join(said)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


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
        *calibration_sentence(training.get("calibration")),
        f"Training took {n.count(training['tokens'])} tokens and {n.duration(training['seconds'])}.",
        reload_sentence(shift["reload"]),
    ]


def calibration_sentence(calibration: Mapping[str, Any] | None) -> list[str]:
    """What fitting the SAE to the activations did before its first step, if it was done."""
    if not calibration or not calibration["parts"]:
        return []
    first, *parts, last = calibration["parts"]
    kept = ", ".join(part["name"] for part in parts if part["kept"]) or "nothing"
    return [
        f"Calibration, before the first step and on {n.count(calibration['tokens'])} tokens of training text, took "
        f"variance explained from {n.ve(first['ve'])} to {n.ve(last['ve'])} and L0 from {n.per_token(first['l0'])} to "
        f"{n.per_token(last['l0'])}; kept: {kept}."
    ]


def row_sentence(row: Mapping[str, Any]) -> str:
    before, after = row["before"], row["after"]
    old, new = verdict(before), verdict(after)
    judged = f"stayed {old}" if old == new else went(old, new)
    change = went(n.ve(before["metrics"]["ve"]), n.ve(after["metrics"]["ve"]))
    return f"On {row['corpus']}, variance explained {change}; the verdict {judged}."


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


def interval_caption(states: States, differences: Any = None) -> str:
    """Where the intervals come from, and how firm the verdict is."""
    said = []
    known = [(state, e["intervals"]) for state, e in states if e["intervals"] is not None]
    if known:
        of = known[0][1]
        said.append(
            f"In brackets, {n.top_percent(str(of['level']))} intervals over {n.count(of['resamples'])} resamples of "
            f"{_drawn(of['documents'], of['groups'])}."
        )
        shares = n.both([(state, n.percent(intervals["verdict_share"])) for state, intervals in known])
        said.append(f"Share of them with the same verdict: {shares}.")
    if differences is not None:
        said.append("Differences are after minus before; those of percentages are in percentage points.")
    return " ".join(said)


def _drawn(documents: int, groups: int) -> str:
    """ "11 documents", "5,000 documents in 1,024 groups"."""
    return f"{n.count(documents)} documents" + ("" if groups == documents else f" in {n.count(groups)} groups")


def robust_caption(states: States) -> str:
    last = n.ascending(states[0][1]["metrics"]["ve_without_top_sse"])[-1]
    whole = _each(states, lambda e: n.ve(e["metrics"]["ve"]))
    rest = _each(states, lambda e: n.ve(e["metrics"]["ve_without_top_sse"][last]))
    top = n.top(last, states[0][1]["metrics"]["n_tokens"])
    return f"VE on all tokens: {whole}; without the top {top} by SSE: {rest}. The axis is log-like."


def norm_caption(states: States) -> str:
    first = n.ascending(states[0][1]["metrics"]["ve_without_high_norm"])[0]
    rest = _each(states, lambda e: n.ve(e["metrics"]["ve_without_high_norm"][first]))
    share = _each(states, lambda e: n.percent(e["metrics"]["high_norm_share"][first]))
    held = _each(states, lambda e: n.percent(e["metrics"]["high_norm_sse_share"][first]))
    return (
        f"Tokens with norms over {n.times(first)} the median: {share}; the squared error that they hold: {held}; "
        f"VE without them: {rest}."
    )


def concentration_caption(states: States) -> str:
    last = n.ascending(states[0][1]["metrics"]["sse_share"])[-1]
    top = n.top(last, states[0][1]["metrics"]["n_tokens"])
    shares = _each(states, lambda e: n.percent(e["metrics"]["sse_share"][last]))
    return f"The {top} of tokens with the largest squared error hold {shares}; dotted: error spread evenly."


def scatter_caption(evaluation: Evaluation) -> str:
    points = evaluation["curves"]["norm_against_sse"]
    top = [p for p in points if p[2]]
    drawn = sum(bool(p[0] and p[1]) for p in points)
    worst, n_tokens = evaluation["outliers"], evaluation["metrics"]["n_tokens"]
    caption = (
        f"Diamonds: {some_of(len(top), worst['count'])} tokens that are the top "
        f"{n.top(str(worst['fraction']), n_tokens)} by squared error; dots: {n.count(len(points) - len(top))} others, "
        "drawn at random."
    )
    if norms := sorted(p[0] for p in top if p[0] is not None):
        caption += f" The diamonds’ norms run from {n.real(norms[0])} to {n.real(norms[-1])} medians."
    return caption + (f" Not drawn, being zero: {n.count(len(points) - drawn)}." if drawn < len(points) else "")


def some_of(shown: int, total: int) -> str:
    """ "20 of the 65", "all 65"."""
    return f"all {n.count(total)}" if shown == total else f"{n.count(shown)} of the {n.count(total)}"


def density_caption(states: States) -> str:
    dead = _each(states, lambda e: n.count(e["metrics"]["dead"]))
    return f"Latents of {n.count(states[0][1]['sae']['d_sae'])} that never fired on these tokens: {dead}."


def position_caption(states: States) -> str:
    def said(i: int) -> str:
        values = _each(states, lambda e: n.ve(e["groups"]["position"][i]["ve"]))
        return f"{states[0][1]['groups']['position'][i]['name']}: {values}"

    return f"VE at positions {said(0)}; at {said(-1)}."


def training_caption(history: Sequence[Mapping[str, Any]], key: str) -> str:
    write = TRAINING[key][1]
    first, last = history[0], history[-1]
    return (
        f"It {went(write(first[key]), write(last[key]))} between {n.count(first['tokens'])} and "
        f"{n.count(last['tokens'])} tokens."
    )


def forms_caption(states: States) -> str:
    forms = _each([(s, e) for s, e in states if e["forms"]], lambda e: n.per_token(e["forms"]["k"]))
    tokens = next(e["forms"]["batch_tokens"] for _, e in states if e["forms"])
    return f"Batch top-k keeps k = {forms} latents a token on average, over batches of {n.count(tokens)} tokens."


def drift_caption(drift: Mapping[str, Any]) -> str:
    return f"Quantiles over latents; b_dec moved by {n.real(drift['b_dec_distance'])}."


def downstream_caption(states: States) -> str:
    measured = next(e["downstream"] for _, e in states if e["downstream"])
    return (
        f"Next-token predictions on {n.count(measured['n_blocks'])} blocks. Recovered is 1 where the SAE changes "
        "nothing and 0 where it does as much harm as what it is held against."
    )


def _each(states: States, write: Callable[[Evaluation], str]) -> str:
    """As "0.194 before and 0.812 after", or "0.874" where there is but one state to tell of."""
    return n.both([(state, write(evaluation)) for state, evaluation in states])
