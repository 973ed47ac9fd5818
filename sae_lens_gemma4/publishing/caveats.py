"""How far a card's figures carry: how they were made, what was not measured, and whose work they rest on.

Limitations are computed from what a result does not hold, so that none is forgotten and none outlives its cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.publishing.history import base
from sae_lens_gemma4.publishing.record import Record, place, shared
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.visible import visible_name


def results_notes(records: Sequence[Record]) -> list[str]:
    """What must be known to read the table: intervals, reasons for a verdict, and what was forgotten."""
    notes = [str(part) for part in shared(records, _intervals)]
    for record in records:
        for corpus, after in record.measured:
            diagnosis = after["diagnosis"]
            if diagnosis["verdict"] != "healthy" and diagnosis["reason"]:
                notes.append(f"{record.name} on {corpus}: {diagnosis['reason']}")
        for row in record.result.get("forgetting") or []:
            before, after = (row[state]["metrics"] for state in ("before", "after"))
            notes.append(
                f"On {row['corpus']} of {place(row['after']['model']['name'])}, where it came from, {record.name} "
                f"has VE {n.ve(after['ve'])}; the SAE that it began as has {n.ve(before['ve'])}."
            )
    return [line for note in notes for line in ("", visible_name(note))]


def _intervals(record: Record) -> list[str]:
    known = [after["intervals"] for _, after in record.measured if after["intervals"]]
    said = [
        f"In brackets, {n.percent(of['level'])} intervals over {n.count(of['resamples'])} resamples of documents."
        for of in known
    ]
    return list(dict.fromkeys(said))


def method(records: Sequence[Record]) -> list[str]:
    return [visible_name(str(part)) for part in shared(records, _method)]


def _method(record: Record) -> str:
    """One paragraph, of what the evaluations themselves state."""
    evaluations = [after for _, after in record.measured]
    first, model = evaluations[0], record.result["model"]
    corpus, rules = first["corpus"], first["rules"]
    special = "special tokens excluded" if corpus["exclude_special_tokens"] else "special tokens included"
    bos = ", BOS at the start of every block and document" if corpus["bos"] else ""
    said = [
        f"VE is 1 − SSE / total variance and L0 the mean of active latents a token, over every token that counts "
        f"({special}{bos}), on {_listed(e['corpus']['name'] for e in evaluations)} at context "
        f"{corpus['context_size']}, with activations of {place(model['name'])} in {model['dtype']}.",
        "The SAE is measured in the form in which it is saved, on the same tokens before and after.",
        f"An SAE is called a misfit below VE {n.ve(rules['misfit_below'])}, and outlier-dominated where its few worst "
        f"tokens hold more than {n.percent(rules['outlier_share'])} of the squared error and VE without them is higher "
        f"by more than {n.ve(rules['outlier_gain'])}.",
    ]
    if protocols := {e["protocol"] for e in evaluations} - {None}:
        said.append(f"Protocol: {_listed(protocols)}.")
    return " ".join(said)


def limitations(records: Sequence[Record], read_back: bool) -> list[str]:
    """What was not measured, and of what nothing is known."""
    said = [
        *map(str, shared(records, _unmeasured)),
        *([] if read_back else ["The upload was not read back and measured again."]),
        "What the latents stand for was not examined: there are no labels or explanations.",
    ]
    return [f"- {visible_name(line)}" for line in said]


def _unmeasured(record: Record) -> list[str]:
    result, evaluations = record.result, [after for _, after in record.measured]
    contexts = sorted({e["corpus"]["context_size"] for e in evaluations})
    names = _listed(e["corpus"]["name"] for e in evaluations)
    without = [e["corpus"]["name"] for e in evaluations if not e["intervals"]]
    known = {
        "One training run with one seed: how much another would differ is not known.": True,
        f"Measured on {names} only, at context {_listed(contexts)}: other kinds of text, other languages and longer "
        "contexts were not.": True,
        f"Trained on activations of {place(result['model']['name'])} in {result['model']['dtype']}: nothing is known "
        "of models derived from it, or of other precisions.": True,
        "What it does to the model’s predictions (CE, KL) was not measured.": any(
            e["downstream"] is None for e in evaluations
        ),
        "What it lost on the model that its base SAE was made for was not measured.": (
            result["base"] is not None and not result.get("forgetting")
        ),
        "The SAE that it began as was not measured.": result["base"] is not None and not result["before"],
        f"There are no intervals for {_listed(without)}: too few documents, or none were asked for.": bool(without),
        "No gate was asked for: nobody said beforehand what it should reach.": result.get("gate") is None,
        "Its polish began from the state that was best on this held-out text, so that these figures chose it.": any(
            phase.get("start") == "best" for phase in result["phases"]
        ),
        "It was not evaluated on held-out text while it was trained.": not result.get("evaluations"),
    }
    return [text for text, holds in known.items() if holds]


def lineage(records: Sequence[Record], license: str | None) -> list[str]:
    """Whose weights, model and text these rest on, and under which terms, as far as anybody states them."""
    said = [f"This repository: {license or 'licence not stated'}."]
    said += [part.titled("Weights") for part in shared(records, _weights)]
    said.append(f"Model: {place(records[0].result['model']['name'])}; its licence is not stated here.")
    sources = dict.fromkeys(
        place(row.get("source") or row.get("dataset"))
        for record in records
        for row in record.result["data"]["train"]
    )  # fmt: skip
    said.append(f"Training text: {_listed(sources)}; licences are not stated here.")
    return [f"- {visible_name(line)}" for line in said]


def _weights(record: Record) -> str:
    facts = record.result["base"]
    if facts is None:
        return "new, of this run."
    release = releases().get(facts.get("release") or "")
    where = f" ({release.url})" if release is not None and release.url else ""
    licence = release.licence if release is not None and release.licence else "not stated"
    return f"continued from {base(facts)}{where}, whose licence is {licence}."


def versions(records: Sequence[Record]) -> str:
    def write(record: Record) -> str:
        return ", ".join(f"{name} {version}" for name, version in (record.result.get("versions") or {}).items())

    return "; ".join(map(str, shared(records, write))) + "."


def _listed(names: Any) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, last = [*map(str, dict.fromkeys(names))] or ["–"]
    return f"{', '.join(first)} and {last}" if first else last
