"""What all plots have in common: the frame of a plotly.js figure, lines in a state's colour and dash, and VE's axis.

Colours are names such as "$before", which the page replaces by its own style sheet's, so that light, dark and print
are decided in one place. State is told by shape and dash as well as by colour.

A misfitting SAE's variance explained can be −1008 where a healthy one's is .8. VE is therefore drawn at
−log₁₀(1 − VE), the log of the unexplained part: 0 stays at 0, nothing below is cut off, and .8 and .9 remain apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n

Figure = dict[str, Any]

DASH = {"base": "5px,3px", "before": "5px,3px", "after": "solid", "only": "solid"}
HEIGHT = 290
"""Of a plot, in pixels, where nothing asks for more."""
VE_TITLE = "VE, spaced by log(1 − VE)"
_CLOSEST = 1e-4
"""The smallest 1 − VE that is drawn; closer to perfect is drawn there."""
_VE_TICKS = (0, 0.9, -9, 0.5, -99, 0.99, -999, -9999, -99999, 0.8, -1, 0.95, -3, 0.999, 0.7, 0.6, 0.85, 0.3, -0.5)
"""Where a VE axis may have a tick, the more wanted first."""

_GAP = 0.13
"""Between two ticks, as a share of the axis."""
_STEPS = (2, 5, 3, 1.5, 7, 1.2, 8, 1.1, 9)
"""Between powers of ten, where a log axis may have a tick, the more wanted first."""


def ve_position(ve: float | None) -> float | None:
    """Where VE stands on its axis: 0 at 0, 1 at .9, −1 at −9, −3 at −999."""
    return None if ve is None else -math.log10(max(1 - ve, _CLOSEST))


def ve_axis(positions: Sequence[float | None], left: float = 0.05, right: float = 0.1, gap: float = _GAP) -> Figure:
    """An axis of `ve_position`s from 0 to all of them, with ticks named by VE.

    `left` and `right` are the room beyond, as shares of what lies between; `gap` is the least between two ticks, as a
    share of the axis.
    """
    known = [p for p in positions if p is not None]
    low, high = min((0.0, *known)), max((0.0, *known))
    span = max(high - low, 0.3)
    length = (1 + left + right) * span
    wanted = [(-math.log10(1 - ve), ve) for ve in _VE_TICKS]
    ticks = _spaced(wanted, low - 0.05 * span, high + 0.1 * span, gap * length)
    low, high = low - left * span, high + right * span
    return {
        "range": [low, high],
        "tickvals": [at for at, _ in ticks],
        "ticktext": [f"{ve:,g}".replace("-", n.MINUS) for _, ve in ticks],
        "zeroline": True,
    }


def log_axis(values: Sequence[float]) -> Figure:
    """A log axis that holds all of these multiples, with ticks such as 10×."""
    low, high = (math.log10(v) for v in (min(values, default=0.1), max(values, default=10)))
    room = 0.06 * max(high - low, 0.5)
    low, high = low - room, high + room
    tens = sorted(range(math.floor(low), math.ceil(high) + 1), key=abs)
    between = _STEPS if high - low < 2 else ()
    wanted = [10.0**d for d in tens] + [step * 10.0**d for step in between for d in tens]
    ticks = [v for _, v in sorted(_spaced([(math.log10(v), v) for v in wanted], low, high, _GAP * (high - low)))]
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": [f"{v:,g}×" for v in ticks]}


def _spaced(wanted: Sequence[tuple[float, float]], low: float, high: float, gap: float) -> list[tuple[float, float]]:
    """Of ticks (place, value), the more wanted first, those between `low` and `high` at least `gap` from each other."""
    ticks: list[tuple[float, float]] = []
    for at, value in wanted:
        if low <= at <= high and all(abs(at - other) > gap for other, _ in ticks):
            ticks.append((at, value))
    return ticks


def line(x: Sequence[Any], y: Sequence[Any], state: str, *, width: float = 2, dash: str = "", **more: Any) -> Figure:
    """A line in a state's colour and dash; `shape` is the line's, whatever else is the trace's."""
    style = {"color": f"${state}", "width": width, "dash": dash or DASH[state]}
    if "shape" in more:
        style["shape"] = more.pop("shape")
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "name": state, "line": style, **more}


def marker(state: str, size: float = 9) -> Figure:
    """A state's own mark: hollow before, full after."""
    fill = "$paper" if state in ("base", "before") else f"${state}"
    return {"symbol": "circle", "size": size, "color": fill, "line": {"width": 2, "color": f"${state}"}}


def title(text: str) -> Figure:
    return {"text": text, "font": {"size": 12}, "standoff": 8}


def label(state: str) -> str:
    """What a hover text begins with where two states are told apart."""
    return f"{state}: " if state in ("before", "after") else ""


def figure(data: list[Figure], x: Figure, y: Figure, height: int = HEIGHT) -> Figure:
    axis = {
        "automargin": True,
        "fixedrange": True,
        "gridcolor": "$rule",
        "zerolinecolor": "$muted",
        "ticks": "outside",
        "ticklen": 5,
        "tickcolor": "rgba(0,0,0,0)",
    }
    return {
        "data": data,
        "layout": {
            "height": height,
            "margin": {"l": 8, "r": 24, "t": 8, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "$sans", "size": 12, "color": "$ink"},
            "showlegend": False,
            "dragmode": False,
            "hovermode": "closest",
            "hoverlabel": {"bgcolor": "$paper", "bordercolor": "$rule", "font": {"color": "$ink"}},
            "xaxis": axis | x,
            "yaxis": axis | y,
        },
    }
