"""Every table of a page as data: a caption, heads, and rows of cells under headings; one template writes them all.

A cell holds one value, or, where two evaluations are shown in one column, both, which are read "before → after".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.quantities import DOWNSTREAM, UNSTATED, Groups, Quantity, all_metrics, main_metrics
from sae_lens_gemma4.report.words import (
    CORRECTIONS,
    Evaluation,
    States,
    downstream_caption,
    drift_caption,
    forms_caption,
    interval_caption,
)


class Value(NamedTuple):
    """A value as written, with its interval where there is one, in the colour of its state where that helps."""

    text: str
    interval: str = ""
    state: str = ""


class Head(NamedTuple):
    name: str
    state: str = ""


Cell = Sequence[Value]
Written = tuple[str, str, Callable[[Any], str]]
"""A column: its head, the key of what it shows, and how that is written."""


class Table(NamedTuple):
    """A table.

    Attributes:
        title: its name, as the line that opens it says.
        caption: what must be known to read it.
        heads: of the columns, that of the rows' names first.
        groups: rows under headings: each a row's name and its cells.
        stacks: on a narrow screen rows become blocks; else the table scrolls in its own box.
        short: it may stand open.
    """

    title: str
    caption: str
    heads: Sequence[Head]
    groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[Cell]]]]]
    stacks: bool = False
    short: bool = False


class Column(NamedTuple):
    """Figures that stand in one column, with their intervals."""

    head: Head
    figures: Mapping[str, Any]
    intervals: Any = None


def headline(states: States, differences: Any = None) -> Table:
    """The figures that are read first, each with its interval, and the differences of two evaluations."""
    caption = interval_caption(states, differences)
    metrics = main_metrics(states[0][1]["metrics"])
    return _of_quantities("Main figures", caption, _metric_columns(states), metrics, differences, short=True)


def others(states: States) -> list[Table]:
    """All further tables that these evaluations have something for."""
    metrics = all_metrics(states[0][1]["metrics"])
    tables = [
        _trials(states),
        _downstream(states),
        _widths(states),
        _forms(states),
        _groups("Positions in the context", "Position", states, lambda e: e["groups"]["position"]),
        _groups("Roles", "Role", states, lambda e: e["groups"].get("role", [])),
        *(_drift(state, e) for state, e in states),
        _of_quantities("All metrics", "", _metric_columns(states), metrics),
    ]
    return [table for table in tables if table is not None]


def _metric_columns(states: States) -> list[Column]:
    heads = [Head("value") if len(states) == 1 else Head(state, state) for state, _ in states]
    found = [(e["intervals"] or {}).get("figures") for _, e in states]
    return [Column(h, e["metrics"], f) for h, (_, e), f in zip(heads, states, found, strict=True)]


def _of_quantities(
    title: str,
    caption: str,
    columns: Sequence[Column],
    groups: Groups,
    differences: Any = None,
    short: bool = False,
) -> Table:
    heads = [Head("Metric"), *(c.head for c in columns), *([Head("difference")] if differences is not None else [])]
    intervals = any(column.intervals for column in columns)

    def cells(quantity: Quantity) -> list[Cell]:
        difference = [] if differences is None else [_difference(quantity, differences, intervals)]
        return [*(_cell(quantity, column) for column in columns), *difference]

    rows = [(heading, [(q.name, cells(q)) for q in quantities]) for heading, quantities in groups]
    return Table(title, caption, heads, rows, stacks=len(heads) > 2, short=short)


def _cell(quantity: Quantity, column: Column) -> Cell:
    bounds = quantity.beside(column.intervals)
    written = "" if bounds is UNSTATED else n.interval(bounds, quantity.write)
    return [Value(quantity.write(quantity.value(column.figures)), written, column.head.state)]


def _difference(quantity: Quantity, differences: Any, intervals: bool) -> Cell:
    difference = quantity.beside(differences)
    if difference is UNSTATED:
        return [Value("–")]
    if difference is None:
        return [Value(n.NOT_DEFINED)]

    def write(value: float | None) -> str:
        return n.signed(value, quantity.write)

    return [Value(write(difference["value"]), n.interval(difference["interval"], write) if intervals else "")]


Rows = Sequence[tuple[str, Mapping[str, Mapping[str, Any] | None]]]
"""Rows by name, each with what every state has for it, if anything."""


def _in_states(states: States, name: str, rows_of: Callable[[Evaluation], Sequence[Mapping[str, Any]]]) -> Rows:
    """The rows of all states by what they call themselves, in the order in which they come."""
    found = {state: {str(row[name]): row for row in rows_of(e)} for state, e in states}
    names = dict.fromkeys(name for rows in found.values() for name in rows)
    return [(name, {state: rows.get(name) for state, rows in found.items()}) for name in names]


def _grid(
    title: str,
    caption: str,
    first: str,
    columns: Sequence[Written],
    rows: Rows,
    short: bool = False,
) -> Table | None:
    """A table of rows over states; None without rows."""

    def cell(key: str, write: Callable[[Any], str], by_state: Mapping[str, Mapping[str, Any] | None]) -> Cell:
        values = [Value("–" if row is None else write(row[key]), state=state) for state, row in by_state.items()]
        return values[:1] if key == "n_tokens" and len({v.text for v in values}) == 1 else values

    if not rows:
        return None
    body = [(name, [cell(key, write, by_state) for _, key, write in columns]) for name, by_state in rows]
    return Table(title, caption, [Head(first), *(Head(head) for head, _, _ in columns)], [("", body)], short=short)


_QUALITY = (("VE", "ve", n.ve), ("L0", "l0", n.per_token))


def _groups(
    title: str, first: str, states: States, rows_of: Callable[[Evaluation], Sequence[Mapping[str, Any]]]
) -> Table | None:
    columns = (
        ("Tokens", "n_tokens", n.count),
        ("VE", "ve", n.ve),
        ("NMSE", "nmse", n.real),
        ("L0", "l0", n.per_token),
        ("Share of SSE", "sse_share", n.percent),
    )
    return _grid(title, "", first, columns, _in_states(states, "name", rows_of))


def _widths(states: States) -> Table | None:
    rows = [(n.count(int(w)), by_state) for w, by_state in _in_states(states, "width", lambda e: e["widths"])]
    caption = "VE with only the first latents of the SAE in use."
    columns = (("VE", "ve", n.ve), ("NMSE", "nmse", n.real), ("L0", "l0", n.per_token))
    return _grid("Matryoshka widths", caption, "Latents", columns, rows, short=True)


def _forms(states: States) -> Table | None:
    having = [(state, e) for state, e in states if e["forms"] is not None]
    if not having:
        return None
    names = {"saved": "As saved", "batch_topk": "Batch top-k"}
    rows = [(said, {state: e["forms"] and e["forms"][key] for state, e in states}) for key, said in names.items()]
    return _grid("Saved form and batch top-k", forms_caption(having), "Form", _QUALITY, rows, short=True)


def _trials(states: States) -> Table | None:
    """What single corrections do for a misfit; each state's own, because only misfits have any."""
    columns = (("Factor", "factor", lambda v: "–" if v is None else n.real(v)), *_QUALITY)
    rows = [
        (CORRECTIONS[trial["correction"]] + ("" if len(states) == 1 else f", {state}"), {state: trial})
        for state, evaluation in states
        for trial in evaluation["diagnosis"]["trials"]
    ]
    caption = "What one correction alone does for the SAE, on a sample of these tokens."
    return _grid("Trials on the misfit", caption, "Correction", columns, rows, short=True)


def _drift(state: str, evaluation: Evaluation) -> Table | None:
    drift = evaluation["drift"]
    if drift is None:
        return None
    keys = {
        "encoder_cosine": "Encoder cosine",
        "decoder_cosine": "Decoder cosine",
        "encoder_norm_ratio": "Encoder norm ratio",
        "decoder_norm_ratio": "Decoder norm ratio",
        "threshold_ratio": "Threshold ratio",
    }
    known = {key: said for key, said in keys.items() if drift[key] is not None}
    quantiles = n.ascending(drift["encoder_cosine"])
    rows = [(f"{n.top_percent(q)} quantile", {state: {key: drift[key][q] for key in known}}) for q in quantiles]
    columns = [(said, key, n.real) for key, said in known.items()]
    suffix = f", {state}" if state in ("before", "after") else ""
    return _grid(f"Drift from {drift['reference']}{suffix}", drift_caption(drift), "Over latents", columns, rows)


def _downstream(states: States) -> Table | None:
    masks = {"excluded": "special tokens excluded", "included": "special tokens included"}
    columns = [
        Column(
            Head(said if len(states) == 1 else f"{state}, {said}", "" if len(states) == 1 else state),
            e["downstream"][mask],
            e["downstream"][mask]["intervals"],
        )
        for mask, said in masks.items()
        for state, e in states
        if e["downstream"] is not None
    ]
    if not columns:
        return None
    title = "What the model predicts with the SAE spliced in"
    return _of_quantities(title, downstream_caption(states), columns, DOWNSTREAM, short=True)


def outlier_shares(shares: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], top: str) -> Table | None:
    """How often the worst tokens are of a kind, and how often all are."""
    columns = ((top, "top", n.percent), ("all tokens", "all", n.percent))
    rows = [(names[kind], {"only": share}) for kind, share in shares.items()]
    return _grid("What kind of tokens they are", "", "Kind", columns, rows, short=True)
