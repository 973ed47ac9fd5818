"""The report page: it says the report's numbers and no others, fetches nothing, and lets nothing in a name act."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report import render_demo, render_evaluation
from tests.report.sample_report import Page, make_evaluation, make_report

HOSTILE = "</script></style><img src=https://evil.example/x.png onerror=alert(1)>'\"&{{ 7*7 }}"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return make_report()


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> Page:
    return Page(render_demo(report))


def read(shown: str) -> float:
    """The number that a reader sees: a true minus sign, thousands set apart by commas."""
    assert "-" not in shown
    return float(shown.replace(n.MINUS, "-").replace(",", ""))


@pytest.mark.parametrize("kind", ["demo", "evaluation"])
def test_the_page_fetches_nothing(kind: str) -> None:
    html = render_demo(make_report()) if kind == "demo" else render_evaluation(make_evaluation())
    page = Page(html)
    for tag, attrs, _ in page.elements:
        assert not {"src", "srcset", "data", "action", "background", "poster"} & set(attrs), (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert not attrs.keys() & {"onload", "onerror", "onclick"}
    style = "".join(text for _, text in page.find("style"))
    assert "url(" not in style and "@import" not in style
    [(policy, _)] = page.find("meta", http_equiv="Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'") and "http" not in policy["content"]
    assert html.count("plotly.js v") == 1


def test_the_main_table_holds_the_reports_numbers(report: dict[str, Any], page: Page) -> None:
    rows = page.main_rows()
    expected = {f"{s['name']}/{r['corpus']}": (r["before"], r["after"]) for s in report["shifts"] for r in s["rows"]}
    assert set(rows) == {"reference", *expected}
    for name, (before, after) in {**expected, "reference": (report["reference"], None)}.items():
        cells = rows[name]
        assert len(cells) == 10
        for offset, evaluation in enumerate((before, after)):
            shown = cells[offset::2]
            if evaluation is None:
                assert shown == ["–"] * 5
                continue
            m = evaluation["metrics"]
            for text, value in zip(shown[:2], (m["ve"], m["ve_without_top_sse"]["0.01"]), strict=True):
                assert read(text) == round(value, 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1)
            assert read(shown[2]) == round(m["l0"], 1)
            assert read(shown[3]) == m["dead"]
            assert shown[4] == m["verdict"]


def test_the_metric_table_holds_every_metric(report: dict[str, Any]) -> None:
    evaluation = report["shifts"][0]["rows"][0]["before"]
    m = evaluation["metrics"]
    shown = dict(row for row in Page(render_evaluation(evaluation)).rows() if len(row) == 2)
    assert shown.pop("Metric") == "value"
    assert {name: read(value.removesuffix(" %")) for name, value in shown.items()} == {
        "Tokens": m["n_tokens"],
        "VE": round(m["ve"], 3),
        "VE without top 0.01 %": round(m["ve_without_top_sse"]["0.0001"], 3),
        "VE without top 0.1 %": round(m["ve_without_top_sse"]["0.001"], 3),
        "VE without top 1 %": round(m["ve_without_top_sse"]["0.01"], 3),
        "SSE held by top 0.01 %": round(100 * m["sse_share"]["0.0001"], 2),
        "SSE held by top 0.1 %": round(100 * m["sse_share"]["0.001"], 1),
        "SSE held by top 1 %": round(100 * m["sse_share"]["0.01"], 1),
        "NMSE": round(m["nmse"], 3),
        "Cosine similarity": round(m["cosine"], 3),
        "L0": round(m["l0"], 1),
        "L1": m["l1"],
        "Dead latents": m["dead"],
    }


def test_the_summary_quotes_the_report(page: Page) -> None:
    [(_, summary)] = page.find("section", **{"class": "summary"})
    assert f"On held-out tuned chat, variance explained went from {n.MINUS}978.1 to 0.770" in summary
    assert "the verdict went from misfit to healthy" in summary
    assert "VE) is 0.874" in summary
    assert summary.count("reconstructs the same bits") == 2


def test_a_verdict_that_stays_is_said_to_stay(report: dict[str, Any]) -> None:
    still = copy.deepcopy(report)
    row = still["shifts"][0]["rows"][0]
    row["after"] = row["before"]
    [(_, summary)] = Page(render_demo(still)).find("section", **{"class": "summary"})
    assert f"variance explained stayed at {n.MINUS}1.470; the verdict stayed misfit" in summary


def test_a_reload_that_differs_is_said_to_differ(report: dict[str, Any]) -> None:
    broken = copy.deepcopy(report)
    broken["shifts"][1]["reload"] |= {"identical": False, "max_abs_difference": 3.14e-7}
    page = Page(render_demo(broken))
    [(_, text)] = page.find("p", **{"class": "reload differs"})
    assert "does not reconstruct the same" in text and "3.1\u00a0×\u00a010⁻⁷" in text.replace(" ", "\u00a0")
    assert len(list(page.find("p", **{"class": "reload same"}))) == 1


def test_both_shifts_have_their_section_and_their_plots(report: dict[str, Any], page: Page) -> None:
    titles = [shift["title"] for shift in report["shifts"]]
    assert [text for _, text in page.find("h2") if text in titles] == titles
    figures = page.figures()
    assert len(figures) == 3 + 2 * (3 + 2 * 3)
    for plot, _ in page.find("div", role="img"):
        assert plot["data-figure"] in figures
        [(_, caption)] = page.find("figcaption", id=plot["aria-labelledby"])
        assert len(caption) > 40
    assert {p["data-figure"] for p, _ in page.find("div", role="img")} == set(figures)


def test_tables_name_their_cells(page: Page) -> None:
    tables = list(page.find("table"))
    assert len(list(page.find("caption"))) == len(tables) == 1 + 5 + 1
    assert all(attrs.get("scope") in {"col", "row", "colgroup", "rowgroup"} for attrs, _ in page.find("th"))


def test_names_are_text_and_nothing_else(report: dict[str, Any]) -> None:
    plain, hostile = Page(render_demo(report)), copy.deepcopy(report)
    for row in hostile["shifts"][0]["rows"][:1]:
        row["corpus"] = row["before"]["corpus"]["name"] = row["after"]["corpus"]["name"] = HOSTILE
    hostile["shifts"][0] |= {"title": HOSTILE, "model": HOSTILE, "description": HOSTILE, "name": HOSTILE}
    hostile["shifts"][0]["reload"] |= {"path": HOSTILE, "ve": {HOSTILE: 0.5}}
    hostile["reference"]["model"]["name"] = hostile["base"]["sae_id"] = HOSTILE
    hostile["versions"] = {HOSTILE: HOSTILE}
    page = Page(render_demo(hostile))
    assert [e[0] for e in page.elements if e[0] != "tr"].count("img") == 0
    assert {e[0] for e in page.elements} == {e[0] for e in plain.elements}
    assert len(list(page.find("script"))) == len(list(plain.find("script")))
    assert HOSTILE in page.text()
    assert page.figures().keys() == plain.figures().keys()


def test_a_value_that_is_not_defined_is_not_a_number(report: dict[str, Any]) -> None:
    empty = copy.deepcopy(report)
    empty["shifts"][0]["rows"][0]["before"] = make_evaluation("tuned text", ve=None)
    empty["shifts"][0]["training"]["history"][0]["ve"] = None
    page = Page(render_demo(empty))
    cells = page.main_rows()["tuned/tuned text"]
    assert cells[0] == cells[2] == cells[8] == n.NOT_DEFINED
    assert n.NOT_DEFINED not in cells[1::2]
    [(_, summary)] = page.find("section", **{"class": "summary"})
    assert "variance explained is not defined before and 0.812 after" in summary
    markers = page.figures()["s0r0-ve"]["data"][1]
    assert markers["text"] == [n.NOT_DEFINED] * 4 and markers["marker"]["opacity"] == [0] * 4
    assert page.figures()["s0-ve"]["data"][0]["y"][0] is None


def test_an_empty_history_is_said(report: dict[str, Any]) -> None:
    short = copy.deepcopy(report)
    short["shifts"][0]["training"]["history"] = []
    page = Page(render_demo(short))
    assert "No training history was recorded." in page.text()
    assert "s0-loss" not in page.figures() and "s1-loss" in page.figures()


@pytest.mark.parametrize("schema", [2, None, "1"])
def test_another_schema_is_refused(report: dict[str, Any], schema: Any) -> None:
    with pytest.raises(ConfigError, match=f"report has schema {schema!r}"):
        render_demo(report | {"schema": schema})
    with pytest.raises(ConfigError, match=f"evaluation has schema {schema!r}"):
        render_evaluation(make_evaluation() | {"schema": schema})
    with pytest.raises(ConfigError, match=f"in this report has schema {schema!r}"):
        render_demo(report | {"reference": make_evaluation() | {"schema": schema}})


def test_what_is_wrong_is_named(report: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="kind 'evaluation'"):
        render_demo(report | {"kind": "evaluation"})
    with pytest.raises(ConfigError, match="'reference'"):
        render_demo({k: v for k, v in report.items() if k != "reference"})
    with pytest.raises(ConfigError, match="seed"):
        render_demo({k: v for k, v in report.items() if k != "seed"})
    broken = copy.deepcopy(report)
    broken["shifts"][1]["rows"][0]["after"]["metrics"]["l0"] = math.nan
    with pytest.raises(ConfigError, match=r"nan at shifts\[1\].rows\[0\].after.metrics.l0"):
        render_demo(broken)
