"""Tokens in their text: painted by their error, visible whatever they are made of, and never more than text."""

from __future__ import annotations

from typing import Any

import pytest

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.report import render_evaluation
from sae_lens_gemma4.report.outliers import LEGEND, level
from sae_lens_gemma4.report.visible import visible, visible_name
from tests.report.sample_report import Page, make_evaluation

HOSTILE = "</span></p><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"


@pytest.fixture
def evaluation() -> dict[str, Any]:
    return make_evaluation(ve=0.31, verdict="outlier-dominated")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" quick", " quick"),
        (" ", "·"),
        ("   ", "···"),
        ("\n", "↵"),
        (".\n\n", ".↵↵"),
        ("\r\n", "↵"),
        ("\t x", "⇥ x"),
        (" \n", "·↵"),
        ("", "∅"),
        ("a\u202eb", "a⟨202E⟩b"),
        ("\x00", "⟨0000⟩"),
        ("\u00a0", "⟨00A0⟩"),
        ("\u200d", "⟨200D⟩"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("é中", "é中"),
        ("\u0301", "◌\u0301"),
        ("\ud800", "⟨D800⟩"),
    ],
)
def test_every_token_can_be_seen(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\u202eb\x1b[31m", "a⟨202E⟩b⟨001B⟩[31m"),
        ("one\ntwo", "one↵two"),
        ("0.1\u00a0% of Ångström 👩\u200d💻", "0.1\u00a0% of Ångström 👩\u200d💻"),
        ("", ""),
    ],
)
def test_a_name_hides_nothing_and_keeps_its_blanks(name: str, shown: str) -> None:
    assert visible_name(name) == shown


def test_depth_follows_the_error() -> None:
    assert [level(e) for e in (0, 0.049, 0.05, 0.2, 0.3, 0.99, 1, 40)] == [0, 0, 1, 2, 3, 4, 5, 5]
    assert LEGEND[0] == "under 0.05" and LEGEND[2] == "0.15–0.3" and LEGEND[5] == "1 and more"


def test_the_text_is_painted_token_by_token(evaluation: dict[str, Any]) -> None:
    page = Page(render_evaluation(evaluation))
    contexts = [text for attrs, text in page.find("p", dir="auto")]
    tokens = evaluation["outliers"]["tokens"]
    assert len(contexts) == len(tokens)
    expected = "".join(visible(text) for text, _ in tokens[0]["context"])
    assert contexts[0] == " ".join(expected.split())
    marks = list(page.find("mark"))
    assert [attrs["class"] for attrs, _ in marks] == ["e5"] * len(tokens)
    assert marks[0][0]["title"] == " <b>: error 1.400"
    [(first, _)] = [(a, t) for a, t in page.find("span", **{"class": "unmeasured"}) if t == "The"][:1]
    assert first["title"] == "The: error not measured"


def test_what_is_known_of_a_token_is_said(evaluation: dict[str, Any]) -> None:
    facts = [text for _, text in Page(render_evaluation(evaluation)).find("p", **{"class": "facts"})]
    share = 100 * evaluation["outliers"]["tokens"][1]["sse_share"]
    assert facts[1] == (
        f"dog error 1.500; {share:.1f} % of all squared error; norm 309.5, rank 1,205 of 64,123; document 41, block 3, "
        "position 11; role user"
    )
    assert facts[0].endswith("first in the document") and facts[4].endswith("delimiter; repeated token")


def test_the_kinds_of_tokens_stand_against_all(evaluation: dict[str, Any]) -> None:
    rows = {cells[0]: cells[1:] for cells in Page(render_evaluation(evaluation)).rows()}
    assert rows["Kind"] == ["top 0.1 %", "all tokens"]
    assert rows["first in the document"] == ["40.0 %", "0.50 %"] and rows["special token"] == ["10.0 %", "2.0 %"]


def test_a_hostile_token_is_text(evaluation: dict[str, Any]) -> None:
    plain = Page(render_evaluation(evaluation))
    token = evaluation["outliers"]["tokens"][0]
    token["text"] = token["role"] = HOSTILE
    token["context"][token["at"]][0] = token["context"][0][0] = HOSTILE
    page = Page(render_evaluation(evaluation))
    assert [tag for tag, _, _ in page.elements] == [tag for tag, _, _ in plain.elements]
    assert page.text().count(HOSTILE) == 4
    assert {key for _, attrs, _ in page.elements for key in attrs} == {
        k for _, attrs, _ in plain.elements for k in attrs
    }


def test_a_token_outside_its_context_is_named(evaluation: dict[str, Any]) -> None:
    evaluation["outliers"]["tokens"][2]["at"] = 30
    with pytest.raises(ConfigError, match=r"outliers.tokens\[2\].at is 30; its context has the indices 0 to 29"):
        render_evaluation(evaluation)
    del evaluation["outliers"]["tokens"][2]["at"]
    with pytest.raises(ConfigError, match="'at'"):
        render_evaluation(evaluation)
