"""The plots: plotly accepts them, every colour they name exists, and no value of VE leaves the picture."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import plotly.graph_objects as go
import pytest

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report import render_demo, render_evaluation
from sae_lens_gemma4.report.figures import norm_against_sse
from sae_lens_gemma4.report.plotting import log_axis, ve_position
from tests.report.sample_report import Page, make_evaluation, make_report


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_demo(make_report()))


def test_plotly_knows_every_attribute_of_the_figures(page: Page) -> None:
    for figure in page.figures().values():
        go.Figure(json.loads(re.sub(r'"\$[a-z-]+"', '"red"', json.dumps(figure))))


def test_every_colour_of_a_figure_is_in_the_style_sheet_in_light_and_dark(page: Page) -> None:
    style = "".join(text for _, text in page.find("style"))
    used = {s for s in _strings(page.figures()) if s.startswith("$")}
    assert {"$before", "$after", "$ink"} <= used
    for name in used:
        same_in_both = name == "$sans" or f"--{name[1:]}: var(" in style
        assert style.count(f"--{name[1:]}: ") == (1 if same_in_both else 2), name


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def test_a_hugely_negative_ve_is_drawn_in_reach_and_written_as_it_is(page: Page) -> None:
    figure = page.figures()["s1r0-ve"]
    markers = [t for t in figure["data"] if t["mode"] == "markers+text"]
    assert markers[0]["text"][0].strip() == f"{n.MINUS}1,008.4"
    low, high = figure["layout"]["xaxis"]["range"]
    assert all(low < x < high for trace in markers for x in trace["x"])
    assert high - low < 8
    assert ve_position(0.0) == 0 and ve_position(0.9) == pytest.approx(1) and ve_position(-999) == pytest.approx(-3)


def test_the_norm_panel_leaves_out_by_norm(page: Page) -> None:
    m = make_report()["reference"]["metrics"]
    trace = page.figures()["reference-norm"]["data"][1]
    values = [m["ve"], *m["ve_without_top_norm"].values(), *reversed(m["ve_without_high_norm"].values())]
    assert [text.strip() for text in trace["text"]] == [f"{v:.3f}" for v in values]
    assert page.figures()["reference-norm"]["layout"]["yaxis"]["ticktext"][-1] == f"{n.MINUS} over 2×"


def test_the_scatter_tells_the_top_tokens_by_shape_and_leaves_nothing_outside() -> None:
    evaluation = make_evaluation(ve=0.31, verdict="outlier-dominated")
    figure = norm_against_sse([("only", evaluation)], "only")
    rest, top = figure["data"]
    assert (len(rest["x"]), len(top["x"])) == (300, 20)  # the point at zero has no place on a log axis
    assert top["marker"]["symbol"] == "diamond" and top["marker"]["size"] > rest["marker"]["size"]
    for axis, trace_axis in (("xaxis", "x"), ("yaxis", "y")):
        low, high = (10**end for end in figure["layout"][axis]["range"])
        assert all(low < v < high for trace in figure["data"] for v in trace[trace_axis])


def test_a_position_without_ve_is_a_gap() -> None:
    evaluation = make_evaluation()
    evaluation["groups"]["position"][1]["ve"] = None
    trace = Page(render_evaluation(evaluation)).figures()["evaluation-position"]["data"][0]
    assert trace["y"][1] is None and trace["text"][1] == n.NOT_DEFINED
    assert trace["y"][0] == pytest.approx(ve_position(evaluation["groups"]["position"][0]["ve"]))


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.85, 1.3), "0.8× 0.9× 1× 1.1× 1.2×"),
        ((0.5, 20), "0.5× 1× 2× 5× 10× 20×"),
        ((0.5, 3000), "1× 10× 100× 1,000×"),
        ((1e-6, 1e6), "1e-06× 0.0001× 0.01× 1× 100× 10,000× 1e+06×"),
    ],
)
def test_a_log_axis_has_few_and_round_ticks(values: tuple[float, float], ticks: str) -> None:
    axis = log_axis(values)
    assert " ".join(axis["ticktext"]) == ticks
    assert axis["range"][0] < math.log10(values[0]) and axis["range"][1] > math.log10(values[1])
