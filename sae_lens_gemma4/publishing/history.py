"""How an SAE came to be, for its card: data, budget, phases, and what went wrong on the way.

Incidents are told as they happened, in the events' own figures: an SAE that lost a third of its latents and recovered
is another one than an SAE that never did, and the final figures do not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sae_lens_gemma4.publishing.record import Record, place, shared
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.release_table import markdown
from sae_lens_gemma4.report.visible import visible_name
from sae_lens_gemma4.report.words import stated

Row = Mapping[str, Any]
_CHANGES = {
    "threshold": ("threshold", n.real),
    "selected_from": ("smallest activation selected", n.real),
    "ve": ("VE on the training stream", n.ve),
}
"""What events have as `…_before` and `…_after`: key → in words, and how it is written."""
_MOST_EVENTS = 20
_OBJECTIVE = (
    "k", "matryoshka_widths", "rescale_acts_by_decoder_norm", "topk_threshold_lr", "aux_loss_coefficient", "k_aux",
    "l0_coefficient",
)  # fmt: skip


def base(facts: Row | None) -> str:
    """What an SAE began as."""
    if facts is None:
        return "new"
    if facts.get("release"):
        return f"{facts.get('sae_id')} of {facts['release']}"
    return place(facts.get("path"))


def training(records: Sequence[Record]) -> list[str]:
    """Start, text, budget, phases and objective."""
    facts = {"Start": _start, "Budget": _budget, "Objective": _objective}
    lines = [f"- {part.titled(title)}" for title, write in facts.items() for part in shared(records, write)]
    for part in shared(records, _phases):
        lines += ["", f"Phases{f' of {part.names}' if part.names else ''}:", "", part.text.rstrip()]
    for part in shared(records, _texts):
        lines += ["", f"Text{f' of {part.names}' if part.names else ''}:", "", part.text.rstrip()]
    return [visible_name(line) if "\n" not in line else line for line in lines]


def _start(record: Record) -> str:
    facts, calibration = record.result["base"], record.result.get("calibration")
    if facts is None:
        return "new weights."
    fitted = _calibration(calibration) if calibration else "not fitted to the activations before the first step"
    of = f", trained on {place(facts['model_name'])}" if facts.get("model_name") else ""
    return f"{base(facts)}{of}; {fitted}."


def _calibration(report: Row) -> str:
    """What was found, and what each part of the fit did on tokens that it had not seen."""
    found = f"γ = ‖mean‖/‖σ‖ = {n.real(report['gamma'])} over {n.count(report['tokens'])} tokens"
    parts = [
        f"{part['name']}{'' if part['kept'] else ' (not kept)'} VE {n.ve(part['ve'])}, L0 {n.per_token(part['l0'])}"
        for part in report["parts"]
    ]
    return f"fitted to the activations before the first step ({found}; on tokens held back: {'; '.join(parts)})"


def _is_single(value: object) -> bool:
    return isinstance(value, bool | int | float | str) or (isinstance(value, list) and all(map(_is_single, value)))


def _written(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return n.count(value)
    if isinstance(value, list):
        return ", ".join(map(_written, value))
    return stated(value)


def _budget(record: Record) -> str:
    result = record.result
    batch = f" of {n.count(result['batch_size'])} tokens" if result.get("batch_size") else ""
    seconds = f", {n.duration(result['seconds'])}" if result.get("seconds") is not None else ""
    return (
        f"{n.count(result['tokens'])} tokens in {n.count(result['steps'])} steps{batch}{seconds}; "
        f"seed {result['seed']}."
    )


def _objective(record: Record) -> str:
    details = record.metadata.get("training_architecture_details") or {}
    known = [f"{key.replace('_', ' ')} {_written(details[key])}" for key in _OBJECTIVE if details.get(key) is not None]
    name = record.metadata.get("training_architecture") or record.result["architecture"]
    return f"that of sae_lens’s {name}" + (f" ({', '.join(known)})." if known else ".")


def _phases(record: Record) -> str:
    heads = ["phase", "tokens", "steps", "learning rate", "warm-up steps", "from", "resampling of dead latents"]
    rows = [
        [
            phase["name"],
            n.count(phase["tokens"]),
            n.count(phase["steps"]),
            _rate(phase),
            n.count(phase.get("warm_up_steps") or 0),
            f"{phase.get('start', 'last')} state",
            _resampling(phase.get("resampling")),
        ]
        for phase in record.result["phases"]
    ]
    return markdown([heads, *([visible_name(cell) for cell in row] for row in rows)])


def _rate(phase: Row) -> str:
    if phase["schedule"] == "constant":
        return f"{phase['lr']:g}, constant"
    return f"{phase['lr']:g} to {phase['lr_end']:g}, {phase['schedule']}"


def _resampling(how: Row | None) -> str:
    if how is None:
        return "none"
    when = f"every {n.count(how['every_steps'])} steps" if how.get("every_steps") else "each epoch"
    most = f", at most {n.count(how['cap'])}" if how.get("cap") else ""
    return f"{when}, at {how['share']:g} × the {how['of']} encoder norm of those alive{most}"


def _texts(record: Record) -> str:
    data = record.result["data"]
    heads = ["text", "used for", "source", "split", "revision", "first document", "next document", "tokens", "hash"]
    rows = [
        [
            str(row.get("name") or "–"),
            use,
            place(row.get("source") or row.get("dataset")),
            *(str(row[key]) if row.get(key) else "–" for key in ("split", "revision")),
            *_documents(row),
            n.count(row["tokens"]) if row.get("tokens") is not None else "–",
            str(row.get("hash") or "–"),
        ]
        for use, rows in (("training", data["train"]), ("held out", data["heldout"].values()))
        for row in rows
    ]
    table = markdown([heads, *([visible_name(cell) for cell in row] for row in rows)])
    packing = "documents end to end" if data.get("packed", True) else "each document in blocks of its own"
    apart = ", which do not see each other" if data.get("isolate_documents") else ""
    return f"{table}\nBlocks of {data['context_size']} tokens, {packing}{apart}."


def _documents(row: Row) -> list[str]:
    """Where it begins in the split, and the first document behind it, as far as that is known."""
    first = row.get("first_document", row.get("skip_documents"))
    behind = row.get("next_document")
    return [n.count(number) if number is not None else "–" for number in (first, behind)]


def incidents(records: Sequence[Record]) -> list[str]:
    """Every rollback, phase and loss of tokens; of many resamplings the ones that cost most."""
    lines = []
    for part in shared(records, _events):
        lines += ([f"{part.names}:", ""] if part.names else []) + [part.text, ""]
    return lines[:-1]


def _events(record: Record) -> str:
    events = record.result["events"]
    resampled = [event for event in events if event["kind"] == "resampling"]
    shown = sorted(resampled, key=_cost, reverse=True)[:_MOST_EVENTS]
    lines = [f"- {visible_name(_event(event))}" for event in events if event["kind"] != "resampling" or event in shown]
    if len(shown) < len(resampled):
        lines.append(f"- Of {n.count(len(resampled))} resamplings these cost most; all are in result.json.")
    return "\n".join(lines) or "None: no latent was resampled, nothing was taken back, no token was left out."


def _cost(event: Row) -> float:
    before, after = event.get("ve_before"), event.get("ve_after")
    return float(before - after) if before is not None and after is not None else float("inf")


def _event(event: Row) -> str:
    said = _KINDS.get(event["kind"], _other)(event)
    where = [f"step {n.count(event['step'])}"] if event.get("step") is not None else []
    where += [f"phase {event['phase']}"] if event.get("phase") else []
    return f"{', '.join(where)}: {said}".removeprefix(": ") + "."


def _resampled(event: Row) -> str:
    how = f" at {event['share']:g} × the {event['of']} norm" if event.get("share") is not None else ""
    replaced = f"{n.count(event.get('resampled'))} of {n.count(event.get('dead'))} dead latents resampled{how}"
    return "; ".join([replaced, *_changes(event)])


def _changes(event: Row) -> list[str]:
    return [
        f"{word} {write(event[f'{key}_before'])} → {write(event.get(f'{key}_after'))}"
        for key, (word, write) in _CHANGES.items()
        if event.get(f"{key}_before") is not None
    ]


def _rolled_back(event: Row) -> str:
    lost = f", {n.count(event['steps_lost'])} steps later" if event.get("steps_lost") is not None else ""
    reason = f": {str(event['reason']).rstrip('.')}" if event.get("reason") else ""
    return "; ".join([f"the resampling was taken back{lost}{reason}", *_changes(event)])


def _skipped(event: Row) -> str:
    return (
        f"{n.count(event.get('tokens'))} tokens of document {event.get('document')} of {event.get('corpus')} left out: "
        f"their activations at {event.get('hook')} are not finite"
    )


def _phase(event: Row) -> str:
    best = f" (VE {n.ve(event['best'])})" if event.get("best") is not None else ""
    return f"begun from the {event.get('start')} state{best}"


def _other(event: Row) -> str:
    rest = {k: v for k, v in event.items() if k not in ("kind", "step", "phase") and _is_single(v)}
    return ", ".join([str(event["kind"]), *(f"{k.replace('_', ' ')} {_written(v)}" for k, v in rest.items())])


_KINDS: dict[str, Callable[[Row], str]] = {
    "resampling": _resampled,
    "rollback": _rolled_back,
    "skipped": _skipped,
    "phase": _phase,
    "polish": _phase,
}


def dead(records: Sequence[Record]) -> list[str]:
    """Latents that did not fire: in training at its end, and on each held-out text."""
    lines = []
    for record in records:
        rows = record.result["history"]
        if rows and rows[-1].get("dead") is not None:
            lines.append(f"- {record.name}: {n.count(rows[-1]['dead'])} of {n.count(record.result['d_sae'])} were dead "
                         "when training ended.")  # fmt: skip
        lines += [
            f"- {record.name}: {n.count(after['metrics']['dead'])} of {n.count(record.result['d_sae'])} never fired on "
            f"{corpus} ({n.count(after['metrics']['n_tokens'])} tokens)."
            for corpus, after in record.measured
        ]
    return [*map(visible_name, lines), "", "A latent that is rare may be silent on a text and not be dead."]
