"""The plots, as plain plotly.js figures: data in, a dict of `data` and `layout` out.

Colours are names such as "$before", which the page replaces by its own style sheet's, so that light, dark and print
are decided in one place; nothing that came from a file is put in a figure, because plotly reads markup in texts.
State is told by shape and dash as well as by colour.

A misfitting SAE's variance explained can be −1008 where a healthy one's is .8. VE is therefore drawn at
−log₁₀(1 − VE), the log of the unexplained part: 0 stays at 0, nothing below is cut off, and .8 and .9 remain apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.words import TRAINING, States

Figure = dict[str, Any]

_SYMBOL = {"base": "circle-open", "before": "circle-open", "after": "circle", "only": "circle"}
_DASH = {"base": "5px,3px", "before": "5px,3px", "after": "solid", "only": "solid"}
_CLOSEST = 1e-4
"""The smallest 1 − VE that is drawn; closer to perfect is drawn there."""
_VE_TICKS = (0, 0.9, -9, 0.5, -99, 0.99, -999, -9999, -99999, 0.8, -1, 0.95, -3, 0.999, 0.7, 0.6, 0.85, 0.3, -0.5)
"""Where a VE axis may have a tick, the more wanted first."""


def ve_position(ve: float | None) -> float | None:
    """Where VE stands on its axis: 0 at 0, 1 at .9, −1 at −9, −3 at −999."""
    return None if ve is None else -math.log10(max(1 - ve, _CLOSEST))


def robust_ve(states: States) -> Figure:
    """VE on all tokens and without the top ones by SSE: a stem from VE = 0 to each value, which is written above it."""
    fractions = sorted(states[0][1]["metrics"]["ve_without_top_sse"], key=float)
    names = ["all tokens", *(f"{n.MINUS} top {n.top_percent(f)}" for f in fractions)]
    values = {s: [e["metrics"]["ve"], *(e["metrics"]["ve_without_top_sse"][f] for f in fractions)] for s, e in states}
    places = {state: [ve_position(v) for v in row] for state, row in values.items()}
    axis = _ve_axis([p for row in places.values() for p in row if p is not None])
    middle = sum(axis["range"]) / 2
    data: list[Figure] = []
    for i, state in enumerate(places):
        ends = [0 if p is None else p for p in places[state]]
        heights = [row + 0.42 * (i - (len(states) - 1) / 2) for row in range(len(names))]
        stems = [(x, h) for end, h in zip(ends, heights, strict=True) for x in (0, end, None)]
        xs, ys = zip(*stems, strict=True)
        data.append(_line(xs, ys, state, width=1.5, dash="solid", hoverinfo="skip"))
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": ends,
                "y": heights,
                "text": [n.ve(v) for v in values[state]],
                "textposition": ["top center" if end > middle else "top right" for end in ends],
                "textfont": {"size": 12, "color": f"${state}"},
                "marker": {
                    "symbol": _SYMBOL[state],
                    "size": 9,
                    "color": f"${state}",
                    "opacity": [0 if p is None else 1 for p in places[state]],
                    "line": {"width": 2, "color": f"${state}"},
                },
                "cliponaxis": False,
                "name": state,
                "hovertemplate": f"{_label(state)}VE %{{text}}<extra></extra>",
            }
        )
    return _figure(
        data,
        x=axis | {"title": _title("VE, spaced by log(1 − VE)")},
        y={
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "range": [len(names) - 0.6, -0.7],
            "showgrid": False,
            "zeroline": False,
        },
    )


def concentration(states: States) -> Figure:
    """The share of the squared error held by the worst tokens, against the share that they are of all tokens."""
    curves = [(s, [p for p in e["curves"]["sse_concentration"] if p[0] > 0]) for s, e in states]
    lowest = math.log10(min((x for _, curve in curves for x, _ in curve), default=0.01))
    even = [10 ** (lowest * (1 - i / 60)) for i in range(61)]
    data = [_line(even, even, "muted", width=1.2, dash="2px,3px", hoverinfo="skip")]
    for state, curve in curves:
        hover = f"{_label(state)}top %{{x:.2~%}} of tokens: %{{y:.1%}} of the SSE<extra></extra>"
        data.append(_line([x for x, _ in curve], [y for _, y in curve], state, hovertemplate=hover))
    decades = range(math.ceil(lowest - 1e-9), 1)
    return _figure(
        data,
        x={
            "type": "log",
            "range": [lowest, 0.02],
            "tickvals": [10.0**d for d in decades],
            "ticktext": [n.top_percent(f"1e{d}") for d in decades],
            "title": _title("top tokens by squared error"),
        },
        y={
            "range": [0, 1.04],
            "tickvals": [0, 0.25, 0.5, 0.75, 1],
            "ticktext": [n.top_percent(f) for f in ("0", "0.25", "0.5", "0.75", "1")],
            "title": _title("share of all squared error"),
        },
    )


def density(states: States) -> Figure:
    """How often latents fire: a histogram of the log of each latent's firing rate."""
    data = []
    for state, evaluation in states:
        edges, counts = (evaluation["curves"]["log10_density"][key] for key in ("edges", "counts"))
        bins = zip(counts, edges, edges[1:], strict=False)
        data.append(
            _line(
                edges,
                [*counts, 0],
                state,
                shape="hv",
                fill="tozeroy",
                fillcolor=f"${state}-fill",
                text=[f"{n.count(c)} latents from {n.fixed(a, 2)} to {n.fixed(b, 2)}" for c, a, b in bins],
                hovertemplate=f"{_label(state)}%{{text}}<extra></extra>",
            )
        )
    return _figure(
        data,
        x={"title": _title("log₁₀ of the share of tokens a latent fires on"), "zeroline": False},
        y={"title": _title("latents"), "rangemode": "tozero"},
    )


def training(history: Sequence[Mapping[str, Any]], key: str) -> Figure:
    """One number of the training log over the tokens seen so far."""
    name, write = TRAINING[key]
    values = [entry[key] for entry in history]
    known = [v for v in values if v is not None]
    shown: Sequence[float | None] = values
    y: Figure = {}
    if key == "ve":
        shown = [ve_position(v) for v in values]
        y = _ve_axis([p for p in shown if p is not None])
        name += ", spaced by log(1 − VE)"
    elif known and min(known) > 0 and max(known) > 30 * min(known):
        y = {"type": "log", "dtick": 1}
        name += ", log scale"
    line = _line(
        [entry["tokens"] for entry in history],
        shown,
        "after",
        text=[write(v) for v in values],
        hovertemplate="%{text} after %{x:,} tokens<extra></extra>",
    )
    if len(history) <= 40:
        line |= {"mode": "lines+markers", "marker": {"size": 5, "color": "$after"}}
    return _figure(
        [line],
        x={"title": _title("tokens trained on"), "tickformat": "~s", "nticks": 6, "zeroline": False},
        y=y | {"title": _title(name)},
    )


def _ve_axis(positions: Sequence[float]) -> Figure:
    """An axis of `ve_position`s from 0 to all of them, with ticks named by VE."""
    low, high = min((0.0, *positions)), max((0.0, *positions))
    span = max(high - low, 0.3)
    low, high = low - 0.05 * span, high + 0.1 * span
    ticks: list[tuple[float, float]] = []
    for ve in _VE_TICKS:
        at = -math.log10(1 - ve)
        if low <= at <= high and all(abs(at - other) > 0.15 * span for other, _ in ticks):
            ticks.append((at, ve))
    return {
        "range": [low, high],
        "tickvals": [at for at, _ in ticks],
        "ticktext": [f"{ve:,g}".replace("-", n.MINUS) for _, ve in ticks],
        "zeroline": True,
    }


def _line(x: Sequence[Any], y: Sequence[Any], state: str, *, width: float = 2, dash: str = "", **more: Any) -> Figure:
    """A line in a state's colour and dash; `shape` is the line's, whatever else is the trace's."""
    line = {"color": f"${state}", "width": width, "dash": dash or _DASH[state]}
    if "shape" in more:
        line["shape"] = more.pop("shape")
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "name": state, "line": line, **more}


def _title(text: str) -> Figure:
    return {"text": text, "font": {"size": 12}, "standoff": 8}


def _label(state: str) -> str:
    return f"{state}: " if state in ("before", "after") else ""


def _figure(data: list[Figure], x: Figure, y: Figure) -> Figure:
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
            "height": 290,
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
