"""How a study's figures are written: a figure never without its interval, a share never without its numbers.

Results hold a share as {k, n, value, low, high} and a mean as {value, low, high, n}; either may be None throughout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.tables import Cell, Head, Table, Value
from sae_lens_gemma4.report.words import stated

Write = Callable[[Any], str]
Row = tuple[str, Sequence[Cell]]


def bounds(figure: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """The interval of a share or mean, where there is one."""
    if figure is None or figure["low"] is None or figure["high"] is None:
        return None
    return figure["low"], figure["high"]


def with_interval(value: float | None, interval: Sequence[float] | None, write: Write) -> str:
    """0.831 [0.798, 0.861]; without brackets where there is no interval."""
    return write(value) if value is None or interval is None else f"{write(value)} {n.interval(interval, write)}"


def mean(figure: Mapping[str, Any] | None, write: Write = n.fixed3) -> str:
    """A mean with its interval."""
    return n.NOT_DEFINED if figure is None else with_interval(figure["value"], bounds(figure), write)


def share(figure: Mapping[str, Any] | None) -> str:
    """37 of 50 (74.0 % [60.4 %, 84.1 %])."""
    if figure is None:
        return n.NOT_DEFINED
    return f"{n.count(figure['k'])} of {n.count(figure['n'])} ({mean(figure, n.percent)})"


def p_value(p: float | None) -> str:
    """p = 0.014; p = 3.1 × 10⁻⁷."""
    return f"p {n.NOT_DEFINED}" if p is None else f"p = {n.real(p)}"


def whole(count: int, singular: str, plural: str = "") -> str:
    """1 label, 2 labels."""
    return f"{n.count(count)} {singular if count == 1 else plural or singular + 's'}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """a, b and c."""
    return f" {last} ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def cell(value: Any, write: Write = str, interval: Sequence[float] | None = None, state: str = "") -> Cell:
    """One value of a table."""
    shown = "" if interval is None or value is None else n.interval(interval, write)
    return [Value(n.NOT_DEFINED if value is None else write(value), shown, state)]


def mean_cell(figure: Mapping[str, Any] | None, write: Write = n.fixed3, state: str = "") -> Cell:
    return cell(None if figure is None else figure["value"], write, bounds(figure), state)


def share_cell(figure: Mapping[str, Any] | None, state: str = "") -> Cell:
    """37 of 50 = 74.0 %, with its interval."""
    if figure is None or not figure["n"]:
        return [Value("none" if figure else n.NOT_DEFINED)]
    text = f"{n.count(figure['k'])} of {n.count(figure['n'])} = {n.percent(figure['value'])}"
    return [Value(text, n.interval(bounds(figure), n.percent), state)]


def text_cell(text: str) -> Cell:
    return [Value(text)]


def table(title: str, caption: str, heads: Sequence[str], rows: Sequence[Row], stacks: bool | None = None) -> Table:
    """A table with rows in one group; stacked on a phone where it has more than two columns."""
    stacked = len(heads) > 2 if stacks is None else stacks
    return Table(title, caption, [Head(name) for name in heads], [("", rows)], stacks=stacked)


def settings(found: Mapping[str, Any]) -> str:
    """Settings by name; those that are not set or have parts are left out."""
    said = []
    for name, value in found.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        if value is not None and not isinstance(value, Mapping):
            said.append(f"{name.replace('_', ' ')} {stated(value)}")
    return "; ".join(said)


def reasons(found: Iterable[str]) -> str:
    """Why things were left out, the most frequent reason first: "3 fire nowhere; 1 has too few contexts"."""
    return "; ".join(f"{count}: {reason}" for reason, count in Counter(found).most_common())
