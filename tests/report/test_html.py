"""The report page: it says the report's numbers and no others, fetches nothing, and lets nothing in a name act."""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

import pytest

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report import render_comparison, render_demo, render_evaluation
from tests.report.sample_report import VERDICTS, Page, make_comparison, make_evaluation, make_report

HOSTILE = "</script></style><img src=https://evil.example/x.png onerror=alert(1)>'\"&{{ 7*7 }}"

SLY = "\u202e\x1b"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return make_report()


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> Page:
    return Page(render_demo(report))


@pytest.fixture(scope="module")
def compared() -> Page:
    return Page(render_comparison(make_comparison()))


def evaluation_page(**options: Any) -> Page:
    return Page(render_evaluation(make_evaluation(**options)))


def read(shown: str) -> float:
    """The number that a reader sees: a true minus sign, thousands set apart by commas."""
    assert "-" not in shown
    return float(shown.replace(n.MINUS, "-").replace(",", ""))


RENDERED = {
    "demo": lambda: render_demo(make_report()),
    "evaluation": lambda: render_evaluation(make_evaluation()),
    "comparison": lambda: render_comparison(make_comparison()),
}


@pytest.mark.parametrize("kind", RENDERED)
def test_the_page_fetches_nothing(kind: str) -> None:
    html = RENDERED[kind]()
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
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_main_table_holds_the_reports_numbers(report: dict[str, Any], page: Page) -> None:
    rows = page.main_rows()
    expected = {f"{s['name']}/{r['corpus']}": (r["before"], r["after"]) for s in report["shifts"] for r in s["rows"]}
    assert set(rows) == {"reference", *expected}
    for name, (before, after) in {**expected, "reference": (report["reference"], None)}.items():
        cells = rows[name]
        assert len(cells) == 12
        for offset, evaluation in enumerate((before, after)):
            shown = cells[offset::2]
            if evaluation is None:
                assert shown == ["–"] * 6
                continue
            m = evaluation["metrics"]
            for text, value in zip(shown[:2], (m["ve"], m["ve_without_top_sse"]["0.001"]), strict=True):
                assert read(text) == round(value, 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1)
            share = 100 * m["sse_share"]["0.001"]
            assert read(shown[2].removesuffix(" %")) == round(share, 1 if share >= 1 else 2)
            assert read(shown[3]) == round(m["l0"], 1)
            assert read(shown[4]) == m["dead"]
            assert shown[5] == m["verdict"]


def test_the_main_figures_stand_with_their_intervals() -> None:
    m = make_evaluation()["metrics"]
    shown = table(evaluation_page(), "Main figures")
    ve, top, share = m["ve"], m["ve_without_top_sse"]["0.01"], 100 * m["sse_share"]["0.001"]
    assert shown["Tokens"] == ["64,123"] and shown["Dead latents"] == ["17"]
    assert shown["VE"] == [f"{ve:.3f} [{ve - 0.011:.3f}, {ve + 0.022:.3f}]"]
    assert shown["VE without top 1 %"] == [f"{top:.3f} [{top - 0.011:.3f}, {top + 0.022:.3f}]"]
    assert shown["SSE held by top 0.1 %"] == [f"{share:.2f} % [{n.MINUS}{1.1 - share:.2f} %, {share + 2.2:.1f} %]"]
    bare = table(evaluation_page(intervals=False), "Main figures")
    assert bare["VE"] == [f"{ve:.3f}"] and bare.keys() == shown.keys()


def table(page: Page, title: str) -> dict[str, list[str]]:
    """The rows of the first table of that title, by name; a name that comes again is told by its heading."""
    html = page.html[page.html.index(f"<caption><b>{title}.") :]
    rows: dict[str, list[str]] = {}
    heading = ""
    for name, *cells in Page(f"<table>{html[: html.index('</table>')]}</table>").rows():
        if cells:
            rows[name if name not in rows else f"{heading}: {name}"] = cells
        heading = heading if cells else name
    return rows


def test_the_table_of_all_metrics_leaves_none_out() -> None:
    """Every number of "metrics" stands in the table once: as many rows as there are leaves, the verdict apart."""
    m = make_evaluation()["metrics"]
    shown = table(evaluation_page(intervals=False), "All metrics")
    shown.pop("Metric")

    def leaves(value: Any) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, dict) else 1

    assert len(shown) == leaves(m) - 2  # the verdict; n_tokens stands above
    expected = {
        "VE of the centred error": m["ve_centred"],
        "without top 0.01 % by norm": m["ve_without_top_norm"]["0.0001"],
        "without norms over 5× the median": m["ve_without_high_norm"]["5"],
        "without norms over 10× the median and top 1 % by SSE": m["ve_without_both"]["10"]["0.01"],
        "Relative bias": m["relative_bias"],
        "γ, the mean’s size": m["gamma"],
        "Error of a token, 99.9 % quantile": m["error_quantiles"]["0.999"],
        "Never fired on the first 16,384 tokens": m["never_fired"]["16384"],
    }
    for name, value in expected.items():
        assert read(shown[name][0]) == round(value, 3), name
    assert read(shown["SSE held by norms over 2× the median"][0].removesuffix(" %")) == 15.0


def test_the_verdict_stands_with_its_reason() -> None:
    for verdict, ve in VERDICTS.items():
        [(_, said)] = evaluation_page(ve=ve, verdict=verdict).find("p", **{"class": "diagnosis"})
        assert said.startswith(f"{verdict} VE without the top 1 % is ")
        assert ("A screen by norm would not have seen these tokens." in said) == (verdict == "outlier-dominated")
        assert ("Likely cause: scale. Activations scaled by 0.167 bring VE to 0.71." in said) == (verdict == "misfit")


def test_a_misfits_trials_are_told_and_nobody_elses() -> None:
    trials = table(evaluation_page(ve=VERDICTS["misfit"], verdict="misfit"), "Trials on the misfit")
    assert trials["activations divided by the factor"] == ["0.167", "0.710", "30.2"]
    assert trials["none"] == ["–", f"{n.MINUS}1.470", "33.1"]
    assert "Trials" not in evaluation_page().text()


def test_what_was_not_measured_has_no_section() -> None:
    titles = ["What the model predicts", "Roles", "Matryoshka widths", "batch top-k", "Drift from"]
    full, bare = evaluation_page(), evaluation_page(downstream=False, roles=False, optional=False)
    for title in titles:
        assert title in full.text() and title not in bare.text(), title
    empty = make_evaluation()
    empty["outliers"] |= {"tokens": []}
    empty["groups"] = {"position": []}
    empty["curves"]["norm_against_sse"] = []
    page = Page(render_evaluation(empty))
    assert "Tokens with the largest squared error" not in page.text()
    assert page.figures().keys() == full.figures().keys() - {"evaluation-position", "evaluation-scatter-only"}


def test_the_further_tables_hold_the_reports_numbers() -> None:
    evaluation = make_evaluation()
    page = Page(render_evaluation(evaluation))
    downstream = table(page, "What the model predicts with the SAE spliced in")
    assert downstream["with the SAE spliced in"] == ["3.429 [3.418, 3.451]", "3.917 [3.418, 3.451]"]
    assert downstream["KL to the model, nats a token: with the SAE spliced in"] == ["0.017 [0.006, 0.039]"] * 2
    assert downstream["CE, against zeros"][0].startswith(f"{1 - 0.017 / 6.459:.3f} ")
    group = evaluation["groups"]["position"][1]
    assert table(page, "Positions in the context")["1–15"] == [
        "2,048",
        f"{group['ve']:.3f}",
        f"{group['nmse']:.3f}",
        "39.5",
        "20.0 %",
    ]
    assert table(page, "Matryoshka widths")["512"][2] == "16.0"
    assert table(page, "Saved form and batch top-k")["Batch top-k"][1] == "32.0"
    drift = table(page, "Drift from layer_3_width_1k_l0_32")
    assert drift["25 % quantile"] == ["0.905", "0.915", "0.995", "0.975"]
    assert drift["Over latents"] == ["Encoder cosine", "Decoder cosine", "Encoder norm ratio", "Decoder norm ratio"]


def test_a_comparison_holds_differences_where_they_are_known(compared: Page) -> None:
    shown = table(compared, "Main figures")
    assert shown["Metric"] == ["before", "after", "difference"]
    assert [cells[2] for cells in shown.values()][1:] == [
        "–",
        "+0.500 [+0.480, +0.520]",
        "+0.141 [+0.100, +0.180]",
        "–",
        f"{n.MINUS}17.6 % [not defined]",
        "–",
        "not defined",
        f"{n.MINUS}4.1 [{n.MINUS}4.3, {n.MINUS}3.9]",
        "–",
    ]
    assert shown["VE"][0].startswith("0.310 [0.299") and shown["VE"][1].startswith("0.810 [0.799")


def test_what_was_forgotten_stands_apart(compared: Page) -> None:
    assert set(compared.main_rows()) == {"rows/pile", "rows/chat", "home/base text"}
    [(_, section)] = compared.find("section", aria_labelledby="forgetting")
    assert "base text" in section and "0.874" in section and "0.702" in section and "difference" not in section
    [(_, summary)] = compared.find("section", **{"class": "summary"})
    assert "Forgetting. On base text, variance explained went from 0.874 to 0.702" in summary
    kept = make_comparison() | {"forgetting": []}
    assert "Forgetting" not in Page(render_comparison(kept)).text()


def test_before_and_after_share_a_cell_only_where_both_are_said(compared: Page) -> None:
    roles = table(compared, "Roles")
    assert roles["user"][0] == "512 → –" and roles["user"][1].endswith(" → –")
    assert re.fullmatch(r"0\.\d{3} → 0\.\d{3}", table(compared, "Positions in the context")["0"][1])


def test_the_summary_quotes_the_report(page: Page) -> None:
    [(_, summary)] = page.find("section", **{"class": "summary"})
    assert f"On tuned chat, variance explained went from {n.MINUS}978.1 to 0.770" in summary
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
    assert len(figures) == 6 + 2 * (3 + 3 * 7)
    for plot, _ in page.find("div", role="img"):
        assert plot["data-figure"] in figures
        [(_, caption)] = page.find("figcaption", id=plot["aria-labelledby"])
        assert len(caption) > 40
    assert {p["data-figure"] for p, _ in page.find("div", role="img")} == set(figures)


def test_tables_name_their_cells(page: Page) -> None:
    tables = list(page.find("table"))
    assert len(list(page.find("caption"))) == len(tables) > 50
    assert all(attrs.get("scope") in {"col", "row", "colgroup", "rowgroup"} for attrs, _ in page.find("th"))


def test_names_are_text_and_nothing_else(report: dict[str, Any]) -> None:
    plain, hostile = Page(render_demo(report)), copy.deepcopy(report)
    for row in hostile["shifts"][0]["rows"][:1]:
        row["corpus"] = row["before"]["corpus"]["name"] = row["after"]["corpus"]["name"] = HOSTILE
    hostile["shifts"][0] |= {"title": HOSTILE, "model": HOSTILE, "description": HOSTILE, "name": HOSTILE}
    hostile["shifts"][0]["reload"] |= {"path": HOSTILE, "ve": {HOSTILE: 0.5}}
    hostile["reference"]["model"]["name"] = hostile["base"]["sae_id"] = HOSTILE
    hostile["versions"] = {HOSTILE: HOSTILE}
    hostile["reference"]["diagnosis"]["reason"] = hostile["reference"]["corpus"]["source"] = HOSTILE
    hostile["reference"]["drift"]["reference"] = hostile["reference"]["protocol"] = HOSTILE
    for name in ("position", "role"):
        hostile["reference"]["groups"][name][0]["name"] = HOSTILE
    page = Page(render_demo(hostile))
    assert [e[0] for e in page.elements if e[0] != "tr"].count("img") == 0
    assert {e[0] for e in page.elements} == {e[0] for e in plain.elements}
    assert len(list(page.find("script"))) == len(list(plain.find("script")))
    assert HOSTILE in page.text()
    assert page.figures().keys() == plain.figures().keys()
    assert "<img" not in json.dumps(page.figures())  # plotly reads markup in texts


def test_names_cannot_hide_or_turn_text_around() -> None:
    comparison = make_comparison()
    for row in comparison["rows"]:
        row["corpus"] += SLY
        for state in ("before", "after"):
            row[state]["corpus"]["name"] = row["corpus"]
            row[state]["model"]["name"] += SLY
            row[state]["sae"] |= {"sae_id": f"an-id{SLY}", "trained_on": SLY, "hook_name": SLY}
    for html in (render_comparison(comparison), render_evaluation(comparison["rows"][0]["after"])):
        assert not set(SLY) & set(html.replace("plotly.js v", "").split("</style>")[-1].split("<script", 1)[0])
        page = Page(html)
        text = page.text() + next(title for _, title in page.find("title"))
        assert text.count("an-id⟨202E⟩⟨001B⟩") > 1 and not set(SLY) & set(text)


def test_of_few_tokens_a_top_fraction_says_that_it_is_one() -> None:
    few = make_evaluation(intervals=False)
    few["metrics"]["n_tokens"] = 40
    page = Page(render_evaluation(few))
    for title, row in (("Main figures", "VE without top 1 %"), ("All metrics", "without top 0.01 % by norm")):
        name = row.replace("%", "% (1 token of 40)")
        assert name in table(page, title) and row not in table(page, title)
    assert "without the top 1 % (1 token of 40) by SSE" in page.text()


def test_groups_of_documents_are_told_from_documents() -> None:
    many = make_evaluation()
    assert "over 1,000 resamples of 311 documents." in Page(render_evaluation(many)).text()
    many["intervals"] |= {"documents": 5000, "groups": 1024}
    assert "over 1,000 resamples of 5,000 documents in 1,024 groups." in Page(render_evaluation(many)).text()


def test_a_value_that_is_not_defined_is_not_a_number(report: dict[str, Any]) -> None:
    empty = copy.deepcopy(report)
    empty["shifts"][0]["rows"][0]["before"] = make_evaluation("tuned text", ve=None, verdict=None, optional=False)
    empty["shifts"][0]["training"]["history"][0]["ve"] = None
    page = Page(render_demo(empty))
    cells = page.main_rows()["tuned/tuned text"]
    assert cells[0] == cells[2] == cells[10] == n.NOT_DEFINED
    assert n.NOT_DEFINED not in cells[1::2]
    [(_, summary)] = page.find("section", **{"class": "summary"})
    assert "variance explained is not defined before and 0.812 after" in summary
    markers = page.figures()["s0r0-ve"]["data"][1]
    assert [text.strip() for text in markers["text"]] == [n.NOT_DEFINED] * 4 and markers["marker"]["opacity"] == [0] * 4
    assert page.figures()["s0-ve"]["data"][0]["y"][0] is None


def test_an_empty_history_is_said(report: dict[str, Any]) -> None:
    short = copy.deepcopy(report)
    short["shifts"][0]["training"]["history"] = []
    page = Page(render_demo(short))
    assert "No training history was recorded." in page.text()
    assert "s0-loss" not in page.figures() and "s1-loss" in page.figures()


def test_an_interval_that_is_not_defined_is_said() -> None:
    shown = table(evaluation_page(ve=None, verdict=None), "Main figures")
    assert shown["VE"] == ["not defined [not defined]"] and shown["NMSE"] == ["not defined [not defined]"]


@pytest.mark.parametrize("schema", [1, None, "2"])
def test_another_schema_is_refused(report: dict[str, Any], schema: Any) -> None:
    with pytest.raises(ConfigError, match=f"report has schema {schema!r}"):
        render_demo(report | {"schema": schema})
    with pytest.raises(ConfigError, match=f"evaluation has schema {schema!r}"):
        render_evaluation(make_evaluation() | {"schema": schema})
    with pytest.raises(ConfigError, match=f"comparison has schema {schema!r}"):
        render_comparison(make_comparison() | {"schema": schema})
    with pytest.raises(ConfigError, match=f"evaluation has schema {schema!r}"):
        render_demo(report | {"reference": make_evaluation() | {"schema": schema}})


def test_what_is_wrong_is_named(report: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="kind 'evaluation'"):
        render_demo(report | {"kind": "evaluation"})
    with pytest.raises(ConfigError, match="'reference'"):
        render_demo({k: v for k, v in report.items() if k != "reference"})
    with pytest.raises(ConfigError, match="seed"):
        render_demo({k: v for k, v in report.items() if k != "seed"})
    for path in (
        ("metrics", "l1"),
        ("metrics", "error_quantiles"),
        ("corpus", "bos"),
        ("diagnosis", "reason"),
        ("drift",),
    ):
        lacking = make_evaluation()
        inner = lacking
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        with pytest.raises(ConfigError, match=path[-1]):
            render_evaluation(lacking)
    with pytest.raises(ConfigError, match="no rows"):
        render_comparison(make_comparison() | {"rows": []})
    broken = copy.deepcopy(report)
    broken["shifts"][1]["rows"][0]["after"]["metrics"]["l0"] = math.nan
    with pytest.raises(ConfigError, match=r"nan at shifts\[1\].rows\[0\].after.metrics.l0"):
        render_demo(broken)
