"""The plots, as plain plotly.js figures: data in, a dict of `data` and `layout` out.

Nothing that came from a file is put in a figure as it is, because plotly reads markup in texts: names are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import (
    HEIGHT,
    VE_TITLE,
    Figure,
    figure,
    label,
    line,
    log_axis,
    marker,
    title,
    ve_axis,
    ve_position,
)
from sae_lens_gemma4.report.words import TRAINING, Metrics, States

Row = tuple[str, Callable[[Metrics], float | None]]
"""A row of a robust plot: the name of the tokens that stay and how their VE is read."""
_TALL = 374
"""Height of the plots below the first row, in pixels: one has eight rows of two stems."""

_LABEL = {"left": 0.5, "right": 0.4}
"""What a value written beside its mark needs, as a share of the values’ span; negative ones, at the left, need more."""


def robust_ve(states: States) -> Figure:
    """VE on all tokens and without the top ones by SSE."""
    return _stems(states, left_out(states[0][1]["metrics"], "sse"), HEIGHT)


def robust_ve_by_norm(states: States) -> Figure:
    """VE on all tokens and without those of large norm: what a norm screen would give."""
    return _stems(states, left_out(states[0][1]["metrics"], "norm"), _TALL)


def left_out(metrics: Metrics, by: str) -> list[Row]:
    """What a robust plot shows, row by row."""

    def row(name: str, table: str, key: str) -> Row:
        return name, lambda m: m[table][key]

    top, high = f"ve_without_top_{by}", "ve_without_high_norm"
    rows: list[Row] = [("all tokens", lambda m: m["ve"])]
    rows += [row(f"{n.MINUS} top {n.top(f, metrics['n_tokens'])}", top, f) for f in n.ascending(metrics[top])]
    if by == "norm":
        rows += [row(f"{n.MINUS} over {n.times(c)}", high, c) for c in reversed(n.ascending(metrics[high]))]
    return rows


def _stems(states: States, rows: Sequence[Row], height: int) -> Figure:
    """A stem from VE = 0 to each value, which is written at its end."""
    values = {state: [read(e["metrics"]) for _, read in rows] for state, e in states}
    places = {state: [ve_position(v) for v in row] for state, row in values.items()}
    every = [p for row in places.values() for p in row]
    negative = any(p is not None and p < 0 for p in every)
    axis = ve_axis(every, left=_LABEL["left"] if negative else 0.05, right=_LABEL["right"], gap=0.16)
    data: list[Figure] = []
    for i, state in enumerate(places):
        ends = [0 if p is None else p for p in places[state]]
        heights = [row + 0.42 * (i - (len(states) - 1) / 2) for row in range(len(rows))]
        stems = [(x, h) for end, h in zip(ends, heights, strict=True) for x in (0, end, None)]
        xs, ys = zip(*stems, strict=True)
        data.append(line(xs, ys, state, width=1.5, dash="solid", hoverinfo="skip"))
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": ends,
                "y": heights,
                "text": [f"{n.NBSP}{n.ve(v)}{n.NBSP}" for v in values[state]],
                "textposition": ["middle left" if end < 0 else "middle right" for end in ends],
                "textfont": {"size": 12, "color": f"${state}"},
                "marker": marker(state) | {"opacity": [0 if p is None else 1 for p in places[state]]},
                "cliponaxis": False,
                "name": state,
                "hovertemplate": f"{label(state)}VE %{{text}}<extra></extra>",
            }
        )
    return figure(
        data,
        x=axis | {"title": title(VE_TITLE), "tickangle": 0},
        y={
            "tickvals": list(range(len(rows))),
            "ticktext": [name for name, _ in rows],
            "range": [len(rows) - 0.6, -0.7],
            "showgrid": False,
            "zeroline": False,
        },
        height=height,
    )


def concentration(states: States) -> Figure:
    """The share of the squared error held by the worst tokens, against the share that they are of all tokens."""
    curves = [(s, [p for p in e["curves"]["sse_concentration"] if p[0] > 0]) for s, e in states]
    lowest = math.log10(min((x for _, curve in curves for x, _ in curve), default=0.01))
    even = [10 ** (lowest * (1 - i / 60)) for i in range(61)]
    data = [line(even, even, "muted", width=1.2, dash="2px,3px", hoverinfo="skip")]
    for state, curve in curves:
        hover = f"{label(state)}top %{{x:.2~%}} of tokens: %{{y:.1%}} of the SSE<extra></extra>"
        data.append(line([x for x, _ in curve], [y for _, y in curve], state, hovertemplate=hover))
    decades = range(math.ceil(lowest - 1e-9), 1)
    return figure(
        data,
        x={
            "type": "log",
            "range": [lowest, 0.02],
            "tickvals": [10.0**d for d in decades],
            "ticktext": [n.top_percent(f"1e{d}") for d in decades],
            "title": title("top tokens by squared error"),
        },
        y={
            "range": [0, 1.04],
            "tickvals": [0, 0.25, 0.5, 0.75, 1],
            "ticktext": [n.top_percent(f) for f in ("0", "0.25", "0.5", "0.75", "1")],
            "title": title("share of all squared error"),
        },
    )


def norm_against_sse(states: States, state: str) -> Figure:
    """One state's tokens by norm and squared error, both in medians; the axes hold the points of all states."""
    shown = {s: [p for p in e["curves"]["norm_against_sse"] if p[0] and p[1]] for s, e in states}
    data: list[Figure] = []
    for top in (False, True):
        points = [p for p in shown[state] if p[2] == top]
        mark = {"symbol": "diamond", "size": 8, "color": "$ink"} if top else {"size": 4, "color": f"${state}"}
        name = "among the top" if top else "another token"
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [_rounded(p[0]) for p in points],
                "y": [_rounded(p[1]) for p in points],
                "marker": mark
                | {"opacity": 0.85 if top else 0.5, "line": {"width": 1 if top else 0, "color": "$paper"}},
                "name": name,
                "hovertemplate": f"{name}: norm %{{x:.3~g}}×, squared error %{{y:.3~g}}× the median<extra></extra>",
            }
        )
    every = [p for points in shown.values() for p in points]
    return figure(
        data,
        x=log_axis([p[0] for p in every]) | {"title": title("norm, in medians")},
        y=log_axis([p[1] for p in every]) | {"title": title("squared error, in medians")},
        height=_TALL,
    )


def _rounded(value: float) -> float:
    """Four digits: finer than a pixel, and a third of the page's size."""
    return float(f"{value:.4g}")


def density(states: States) -> Figure:
    """How often latents fire: a histogram of the log of each latent's firing rate."""
    data = []
    for state, evaluation in states:
        edges, counts = (evaluation["curves"]["log10_density"][key] for key in ("edges", "counts"))
        bins = zip(counts, edges, edges[1:], strict=False)
        data.append(
            line(
                edges,
                [*counts, 0],
                state,
                shape="hv",
                fill="tozeroy",
                fillcolor=f"${state}-fill",
                text=[f"{n.count(c)} latents from {n.fixed(a, 2)} to {n.fixed(b, 2)}" for c, a, b in bins],
                hovertemplate=f"{label(state)}%{{text}}<extra></extra>",
            )
        )
    return figure(
        data,
        x={"title": title("log₁₀ of the share of tokens a latent fires on"), "zeroline": False},
        y={"title": title("latents"), "rangemode": "tozero"},
    )


def ve_by_position(states: States) -> Figure:
    """VE of the tokens at each range of positions in their context."""
    names = [group["name"] for group in states[0][1]["groups"]["position"]]
    values = {state: [group["ve"] for group in e["groups"]["position"]] for state, e in states}
    places = {state: [ve_position(v) for v in row] for state, row in values.items()}
    data = [
        line(
            list(range(len(places[state]))),
            places[state],
            state,
            mode="lines+markers",
            marker=marker(state, 8),
            cliponaxis=False,
            text=[n.ve(v) for v in values[state]],
            hovertemplate=f"{label(state)}VE %{{text}}<extra></extra>",
        )
        for state in places
    ]
    ticks = {
        "tickvals": list(range(len(names))),
        "ticktext": [html.escape(name) for name in names],
        "tickangle": -40 if len("".join(names)) > 24 else 0,
    }
    return figure(
        data,
        x=ticks | {"title": title("position in the context"), "range": [-0.4, len(names) - 0.6], "zeroline": False},
        y=ve_axis([p for row in places.values() for p in row]) | {"title": title(VE_TITLE)},
        height=_TALL,
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
        y = ve_axis(shown)
        name += ", spaced by log(1 − VE)"
    elif known and min(known) > 0 and max(known) > 30 * min(known):
        y = {"type": "log", "dtick": 1}
        name += ", log scale"
    trace = line(
        [entry["tokens"] for entry in history],
        shown,
        "after",
        text=[write(v) for v in values],
        hovertemplate="%{text} after %{x:,} tokens<extra></extra>",
    )
    if len(history) <= 40:
        trace |= {"mode": "lines+markers", "marker": {"size": 5, "color": "$after"}}
    return figure(
        [trace],
        x={"title": title("tokens trained on"), "tickformat": "~s", "nticks": 6, "zeroline": False},
        y=y | {"title": title(name)},
    )
