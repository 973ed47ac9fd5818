"""The plots: plotly accepts them, every colour they name exists, and no value of VE leaves the picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import plotly.graph_objects as go
import pytest

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report import render_demo
from sae_lens_gemma4.report.figures import ve_position
from tests.report.sample_report import Page, make_report


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
    assert markers[0]["text"][0] == f"{n.MINUS}1,008.4"
    low, high = figure["layout"]["xaxis"]["range"]
    assert all(low < x < high for trace in markers for x in trace["x"])
    assert high - low < 5
    assert ve_position(0.0) == 0 and ve_position(0.9) == pytest.approx(1) and ve_position(-999) == pytest.approx(-3)
