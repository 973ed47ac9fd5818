"""The tables of docs/continue-training.md, made of docs/ablations.json; recipes/check_docs.py puts them there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SHIFTS = {"tuned": "tuning alone", "rescaled": "residual ×6", "mean": "mean shift", "gains": "channel gains"}
CORPORA = ("text", "chat")
REACHED = 0.9
"""Share of the scratch SAE's VE that counts as recovered in the column of tokens."""


def tables(path: Path) -> str:
    """All of them as Markdown; empty where nothing was measured yet."""
    if not path.exists():
        return ""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return "\n".join(["", _scratch(rows), "", _calibration(rows), "", _resampling(rows), "", _packing(rows), "", ""])


def scratch(rows: Iterable[Row], shift: str) -> Row:
    """The better of the SAEs trained from nothing on a shift."""
    return max(_of(rows, "scratch", shift), key=lambda row: min(row["ve"].values()))


def share_of_scratch(rows: Sequence[Row], row: Row) -> float:
    """A run's VE as a share of the scratch SAE's, on the corpus where that is less."""
    best = scratch(rows, row["shift"])
    return min(row["ve"][name] / best["ve"][name] for name in CORPORA)


def tokens_to(rows: Sequence[Row], row: Row) -> int | None:
    """Tokens at which a run first had `REACHED` of the scratch SAE's VE on both corpora; None if it never had."""
    best = scratch(rows, row["shift"])
    for tokens, *values in row["curve"]:
        if all(v is not None and v >= REACHED * best["ve"][name] for name, v in zip(CORPORA, values, strict=True)):
            return int(tokens)
    return None


def _scratch(rows: list[Row]) -> str:
    lines = ["**From nothing**, with ten times the tokens, one seed, the better of two rates:", ""]
    lines += _head("shift", "rate", "tokens", "VE text", "VE chat", "L0 text", "never fired")
    for shift, title in SHIFTS.items():
        best = scratch(rows, shift)
        lr = best["variant"].removeprefix("lr ")
        values = [_plain(best["ve"][name]) for name in CORPORA]
        lines.append(
            _line(title, lr, f"{best['tokens']:,}", *values, f"{best['l0']['text']:.1f}", best["dead"]["text"])
        )
    return "\n".join(lines)


def _calibration(rows: list[Row]) -> str:
    lines = [
        '**Calibration.** "To 90 %" is the tokens after which VE on text and chat is at least 90 % of that of the SAE '
        'trained from nothing, looked at every 10,240 tokens; "of scratch" is the VE at the end as a share of it, on '
        "the corpus where that is less.",
        "",
        *_head("shift", "calibrated", "VE at 0 tokens", "to 90 %", "VE text", "VE chat", "of scratch", "L0 text"),
    ]
    for shift, title in SHIFTS.items():
        for variant, runs in _variants(rows, "calibration", shift):
            first = [min(run["curve"][0][1:]) for run in runs]
            reached = [tokens_to(rows, run) for run in runs]
            lines.append(
                _line(
                    title,
                    variant,
                    _spread(first),
                    _tokens(reached),
                    *(_spread([run["ve"][name] for run in runs]) for name in CORPORA),
                    _spread([share_of_scratch(rows, run) for run in runs]),
                    _spread([run["l0"]["text"] for run in runs], 1),
                )
            )
            title = ""
    return "\n".join(lines)


def _resampling(rows: list[Row]) -> str:
    lines = [
        '**Resampling**, calibrated, residual ×6, every 50 steps, without a guard unless it says so. "Dip" is the most '
        "that variance explained on the training stream fell from before an event to the end of its window.",
        "",
        *_head("new latents' norm", "VE text", "VE chat", "never fired on text", "replaced", "taken back", "dip"),
    ]
    for variant, runs in _variants(rows, "resampling", "rescaled"):
        events = [[e for e in run["events"] if e["kind"] == "resampling"] for run in runs]
        dips = [max((e["ve_before"] - e["ve_after"] for e in of), default=0.0) for of in events]
        lines.append(
            _line(
                variant,
                *(_spread([run["ve"][name] for run in runs]) for name in CORPORA),
                _spread([run["dead"]["text"] for run in runs], 0),
                _spread([sum(e["resampled"] for e in of) for of in events], 0),
                _spread([sum(e["kind"] == "rollback" for e in run["events"]) for run in runs], 0),
                _spread(dips) if any(events) else "–",
            )
        )
    return "\n".join(lines)


def _packing(rows: list[Row]) -> str:
    lines = ["**Packing**, calibrated, tuning alone; held-out text is packed in both.", ""]
    lines += _head("training text", "VE text", "VE chat", "L0 text", "never fired on text")
    for variant, runs in _variants(rows, "packing", "tuned"):
        lines.append(
            _line(
                variant,
                *(_spread([run["ve"][name] for run in runs]) for name in CORPORA),
                _spread([run["l0"]["text"] for run in runs], 1),
                _spread([run["dead"]["text"] for run in runs], 0),
            )
        )
    return "\n".join(lines)


def _of(rows: Iterable[Row], experiment: str, shift: str) -> list[Row]:
    return [row for row in rows if row["experiment"] == experiment and row["shift"] == shift]


def _variants(rows: Iterable[Row], experiment: str, shift: str) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for row in _of(rows, experiment, shift):
        found.setdefault(row["variant"], []).append(row)
    return sorted(found.items(), key=lambda item: (item[0] != "none", item[0]))


def _plain(value: float, digits: int = 3) -> str:
    return f"{value:,.{digits}f}".replace("-", "−")


def _spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and in brackets the least and the most where they differ."""
    mean, low, high = (_plain(v, digits) for v in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} [{low}, {high}]"


def _tokens(values: Sequence[int | None]) -> str:
    shown = sorted({"not reached" if v is None else f"{v:,}" for v in values}, key=lambda s: (len(s), s))
    return ", ".join(shown)


def _head(*titles: str) -> list[str]:
    return [_line(*titles), "|" + "---|" * len(titles)]


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
