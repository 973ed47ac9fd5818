"""The table that a model card shows: a layer a row, before and after on every split, an interval beside each figure.

The columns are those of the public table that this project started from (atawfeek/gemma-4-e4b-it-saes): VE before, VE
and L0 after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sae_lens_gemma4.models.hook_names import layer_of
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.visible import visible_name
from sae_lens_gemma4.report.words import told_apart


def release_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a comparison's JSON as cells, the headings first; a line for each pair of SAEs."""
    corpora = list(dict.fromkeys(row["corpus"] for row in rows))
    cells = {(*_pair(row), row["corpus"]): row for row in rows}
    pairs = {_pair(row): row for row in rows}
    hooks = [row["after"]["sae"]["hook_name"] for row in pairs.values()]
    labels = told_apart(list(pairs.values()), list(map(_layer, hooks)), hooks)
    table = [["layer", *(f"before: {c} VE" for c in corpora), *(f"after: {c} VE (L0)" for c in corpora)]]
    for pair, label in zip(pairs, labels, strict=True):
        measured = [cells.get((*pair, corpus)) for corpus in corpora]
        table.append(
            [
                label,
                *(_ve(row["before"]) if row else "–" for row in measured),
                *(_ve_l0(row["after"]) if row else "–" for row in measured),
            ]
        )
    return [[visible_name(cell) for cell in line] for line in table]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table in Markdown, as model cards are written."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]) + "\n"


def _pair(row: Mapping[str, Any]) -> tuple[str, str, str]:
    before, after = row["before"]["sae"], row["after"]["sae"]
    return after["hook_name"], before["hash"], after["hash"]


def _layer(hook_name: str) -> str:
    layer = layer_of(hook_name)
    return hook_name if layer is None else str(layer)


def _ve(evaluation: Mapping[str, Any]) -> str:
    return _written(evaluation, "ve", n.ve)


def _ve_l0(evaluation: Mapping[str, Any]) -> str:
    return f"{_ve(evaluation)} ({_written(evaluation, 'l0', n.per_token)})"


def _written(evaluation: Mapping[str, Any], name: str, write: Callable[[Any], str]) -> str:
    """A figure and its interval: 0.833 [0.829, 0.836]."""
    value, intervals = write(evaluation["metrics"][name]), evaluation["intervals"]
    bounds = intervals["figures"].get(name) if intervals else None
    return f"{value} {n.interval(bounds, write)}" if bounds else value
