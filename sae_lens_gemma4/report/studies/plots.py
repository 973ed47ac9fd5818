"""The plots that studies share: curves over layers with their bands, and figures with intervals, one a row.

Texts from a result go through `escaped`: plotly reads markup in texts, and the page takes "$name" for a colour.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import HEIGHT, Figure, figure, title
from sae_lens_gemma4.report.studies.writing import Write, with_interval
from sae_lens_gemma4.report.visible import visible_name

FILLS = {"after": "$after-fill", "before": "$before-fill", "muted": "$muted-fill"}
_LONGEST = 26
"""Characters of a name beside an axis."""
_ROW = 34
"""Height of a row, in pixels."""


class Curve(NamedTuple):
    """A line over layers.

    Attributes:
        name: in the key and in what is said when a point is pointed at.
        band: (low, high) at each x; None where there is none.
        colour: a name of the style sheet's.
    """

    name: str
    y: Sequence[float | None]
    band: Sequence[Sequence[float] | None] | None = None
    colour: str = "after"
    dash: str = "solid"
    write: Write = n.fixed3
    width: float = 2
    markers: bool = False


class Dot(NamedTuple):
    """A figure with its interval on a row; `floor` is drawn hollow and grey."""

    row: str
    value: float | None
    interval: Sequence[float] | None
    says: str
    floor: bool = False


def escaped(text: str) -> str:
    """Any text as plotly shows it: as it is."""
    return html.escape(visible_name(text), quote=False).replace("$", "&#36;")


def shortened(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def layer_name(layer: int | None) -> str:
    return "the embeddings" if layer is None else f"layer {layer}"


def layer_axis(layers: Sequence[int | None], name: str = "layer") -> tuple[list[float], Figure]:
    """Where layers stand, what enters the first one at −1, and their axis."""
    places = [-1.0 if layer is None else float(layer) for layer in layers]
    last = int(max(places, default=0))
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if last / s <= 8 or s == 1000)
    begins = [-1] if -1.0 in places else []
    ticks = [*begins, *range(0 if step < 4 or not begins else step, last + 1, step)]
    return places, {
        "title": title(name),
        "tickvals": ticks,
        "ticktext": ["in" if tick < 0 else str(tick) for tick in ticks],
        "range": [min(places, default=0) - 0.5, last + 0.5],
        "zeroline": False,
        "tickangle": 0,
    }


def curves(
    x: Sequence[float],
    shown: Sequence[Curve],
    says: Sequence[str],
    *,
    xaxis: Figure,
    yaxis: Figure,
    shapes: Sequence[Figure] = (),
    annotations: Sequence[Figure] = (),
    height: int = HEIGHT + 20,
) -> Figure:
    """Lines over the same x, each with its band, and a key above them. An interval without neighbours, which would be
    a band without width, is an error bar.

    Args:
        says: of each x, how it is called.
    """
    data: list[Figure] = []
    for curve in shown:
        pieces = _pieces(x, curve)
        data += _band(pieces, curve)
        band = curve.band or [None] * len(curve.y)
        texts = [
            f"{escaped(curve.name)}, {where}: {with_interval(value, interval, curve.write)}"
            for where, value, interval in zip(says, curve.y, band, strict=True)
        ]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if curve.markers or len(curve.y) < 3 else "lines",
                "x": list(x),
                "y": list(curve.y),
                "name": escaped(curve.name),
                "line": {"color": f"${curve.colour}", "width": curve.width, "dash": curve.dash},
                "marker": {"size": 6, "color": f"${curve.colour}"},
                **_bars(x, curve, [piece[0] for piece in pieces if len(piece) == 1]),
                "text": texts,
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    made = figure(data, x=xaxis, y=yaxis, height=height)
    made["layout"] |= {"shapes": list(shapes), "annotations": list(annotations)}
    return keyed(made) if len(shown) > 1 else made


_Piece = list[tuple[float, float, float]]


def _pieces(x: Sequence[float], curve: Curve) -> list[_Piece]:
    """(x, low, high) of each run of x that has an interval."""
    pieces: list[_Piece] = [[]]
    for at, interval in zip(x, curve.band or [], strict=False):
        if interval is None:
            pieces.append([])
        else:
            pieces[-1].append((at, interval[0], interval[1]))
    return [piece for piece in pieces if piece]


def _bars(x: Sequence[float], curve: Curve, alone: _Piece) -> Figure:
    """Error bars of the points whose interval has no neighbour."""
    ends = {at: (low, high) for at, low, high in alone}
    known = [
        (value, *ends[at]) if at in ends and value is not None else None for at, value in zip(x, curve.y, strict=True)
    ]
    if not any(known):
        return {}
    return {
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [max(one[2] - one[0], 0) if one else 0 for one in known],
            "arrayminus": [max(one[0] - one[1], 0) if one else 0 for one in known],
            "color": f"${curve.colour}",
            "thickness": 1.5,
            "width": 4,
        }
    }


def _band(pieces: Sequence[_Piece], curve: Curve) -> list[Figure]:
    """The outlines of a band."""
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [at for at, _, _ in piece] + [at for at, _, _ in reversed(piece)],
            "y": [low for _, low, _ in piece] + [high for _, _, high in reversed(piece)],
            "fill": "toself",
            "fillcolor": FILLS.get(curve.colour, "$muted-fill"),
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
        }
        for piece in pieces
        if len(piece) > 1
    ]


def keyed(made: Figure) -> Figure:
    """A figure with a key above it."""
    made["layout"] |= {
        "showlegend": True,
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "font": {"size": 11},
            "itemclick": False,
            "itemdoubleclick": False,
        },
    }
    return made


def dots(shown: Sequence[Dot], *, xaxis: Figure) -> Figure:
    """Figures and their intervals, a row each; those of one name share a row. Floors are hollow."""
    names = list(dict.fromkeys(dot.row for dot in shown))
    data: list[Figure] = []
    for dot in shown:
        if dot.value is None:
            continue
        alone = sum(other.row == dot.row for other in shown) == 1
        at = names.index(dot.row) + (0.0 if alone else 0.16 if dot.floor else -0.16)
        colour = "$muted" if dot.floor else "$after"
        low, high = dot.interval or (dot.value, dot.value)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [dot.value],
                "y": [at],
                "marker": {
                    "size": 9,
                    "color": "$paper" if dot.floor else colour,
                    "line": {"width": 2, "color": colour},
                },
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [max(high - dot.value, 0)],
                    "arrayminus": [max(dot.value - low, 0)],
                    "color": colour,
                    "thickness": 1.5,
                    "width": 4,
                },
                "text": [escaped(dot.says)],
                "hovertemplate": "%{text}<extra></extra>",
                "cliponaxis": False,
            }
        )
    return figure(
        data,
        x={"zeroline": False} | xaxis,
        y={
            "tickvals": list(range(len(names))),
            "ticktext": [escaped(shortened(name)) for name in names],
            "range": [len(names) - 0.4, -0.6],
            "showgrid": False,
            "zeroline": False,
        },
        height=80 + _ROW * max(len(names), 2),
    )


def share_axis(name: str) -> Figure:
    """An axis of shares, 0 to 100 %."""
    marks = (0, 0.25, 0.5, 0.75, 1)
    return {
        "range": [-0.02, 1.03],
        "tickvals": list(marks),
        "ticktext": [f"{100 * mark:g}{n.NBSP}%" for mark in marks],
        "title": title(name),
        "tickangle": 0,
    }


def vertical(x: float, dash: str = "2px,3px", colour: str = "$muted") -> Figure:
    """A line across the plot at x."""
    return {
        "type": "line",
        "x0": x,
        "x1": x,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": colour, "width": 1.2, "dash": dash},
    }


def horizontal(y: float, dash: str = "2px,3px", colour: str = "$muted") -> Figure:
    """A line across the plot at y."""
    line: dict[str, Any] = {"color": colour, "width": 1.2, "dash": dash}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def shade(x0: float, x1: float) -> Figure:
    """A region of x."""
    box: dict[str, Any] = {"yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}, "layer": "below"}
    return {"type": "rect", "x0": x0, "x1": x1, "fillcolor": "$muted-fill", **box}


def note(x: float, text: str) -> Figure:
    """Words at the upper edge of a plot; `text` is shown as it is given."""
    return {
        "x": x,
        "y": 1,
        "yref": "paper",
        "yanchor": "top",
        "xanchor": "left",
        "text": text,
        "showarrow": False,
        "font": {"size": 11, "color": "$muted"},
    }
