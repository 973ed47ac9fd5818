"""The pages of studies: figures stand with their controls, nothing in a result acts, and what is missing is said."""

from __future__ import annotations

import copy
import json
import math
import re
from contextlib import suppress
from functools import cache
from typing import Any

import pytest

from sae_lens_gemma4.errors import ConfigError, UnknownNameError
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.html import render
from sae_lens_gemma4.report.studies import plots
from sae_lens_gemma4.report.study import STUDIES, study_page, summary
from tests.report.sample_report import Page
from tests.report.sample_studies import MADE, paired, profile

HOSTILE = "</script></style><img src=https://evil.example/x.png onerror=alert(1)><b>'\"&{{ 7*7 }}"
SLY = "\u202e\x1b"
KINDS = sorted(MADE)

pytestmark = pytest.mark.filterwarnings("ignore:No latent by itself can be found")


@cache
def _made(kind: str, bare: bool) -> str:
    return json.dumps(MADE[kind](bare=bare))


def made(kind: str, *, bare: bool = False) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_made(kind, bare))
    return document


@cache
def page(kind: str, bare: bool = False) -> Page:
    return Page(render(made(kind, bare=bare)))


def figures(page: Page) -> list[Any]:
    return [json.loads(text) for _, text in page.find("script", type="application/json")]


def leaves(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def share_words(share: dict[str, Any]) -> str:
    """37 of 50 (74.0 %, written another way than the page's code does."""
    percent = round(100 * share["k"] / share["n"], 1 if share["k"] / share["n"] >= 0.01 else 2)
    return f"{share['k']} of {share['n']} ({percent:.{1 if percent >= 1 else 2}f}\u00a0%"


def test_every_kind_has_a_sample_and_a_page() -> None:
    assert set(MADE) == set(STUDIES)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_page_fetches_nothing_and_holds_its_summary(kind: str, bare: bool) -> None:
    shown = page(kind, bare)
    for tag, attrs, _ in shown.elements:
        assert not {"src", "srcset", "data", "action", "background", "poster"} & set(attrs), (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
    [(policy, _)] = shown.find("meta", http_equiv="Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")
    ids = [attrs["id"] for _, attrs, _ in shown.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    sentences = summary(made(kind, bare=bare))
    assert len(sentences) >= 2
    for sentence in sentences[1:]:
        assert " ".join(sentence.split()) in shown.text()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_value_reads_as_code(kind: str, bare: bool) -> None:
    """What is not defined is said in words, in text and plots."""
    shown = page(kind, bare)
    for word in ("None", "nan", "NaN", "inf", "{'", "['"):
        assert not re.search(rf"(?<![\w]){re.escape(word)}(?!\w)", shown.text()), word
    for made_figure in figures(shown):
        for leaf in leaves(made_figure):
            assert not isinstance(leaf, float) or math.isfinite(leaf)
            assert not isinstance(leaf, str) or not re.search(r"\b(None|nan)\b", leaf), leaf


@pytest.mark.parametrize("kind", KINDS)
def test_every_plot_has_words_that_hold_a_figure(kind: str) -> None:
    captions = [text for _, text in page(kind).find("figcaption")]
    assert len(captions) == len(figures(page(kind))) > 0
    assert sum(any(c.isdigit() for c in text) for text in captions) >= len(captions) - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [HOSTILE, SLY, "$ink"])
def test_whatever_a_result_says_is_shown_as_text(kind: str, text: str) -> None:
    """Every string of the document is made hostile, keys that are names from data too."""
    document = _hostile(made(kind), text)
    found = render(document)
    shown = Page(found)
    assert not any("onerror" in attrs for _, attrs, _ in shown.elements)
    assert {tag for tag, _, _ in shown.elements} <= {tag for tag, _, _ in page(kind).elements} | {"details", "summary"}
    assert SLY[0] not in found and SLY[1] not in found
    assert found.count("</script>") == page(kind).html.count("</script>") + len(figures(shown)) - len(
        figures(page(kind))
    )
    for made_figure in figures(shown):
        for leaf in leaves(made_figure):
            if isinstance(leaf, str):
                assert "<img" not in leaf and "<b>" not in leaf
                assert not leaf.startswith("$") or f"--{leaf[1:]}:" in page(kind).html
    if text == HOSTILE:
        assert "evil.example" in shown.text()


_CODES = {"schema", "kind", "rule", "conditions", "count", "alternative", "correction"}
_KEPT = {"hook_name", "hook", "verdict", "sign", "scorer", "tier", "what", "definitions", "settings", "versions"}
"""Keys whose values are this package's own words, or names that a sample must keep to be whole."""


def _hostile(value: Any, text: str, key: str = "") -> Any:
    if key in _KEPT | _CODES - {"conditions"}:
        return value
    if isinstance(value, dict):
        by_name = key in ("alternatives", "unanswered", "also", "files", "vocabulary", "last_layer_top")
        return {(k + text if by_name else k): _hostile(v, text, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_hostile(inner, text, key) for inner in value]
    return text if isinstance(value, str) and value not in ("steering",) else value


def test_labels_stand_beside_their_floors() -> None:
    document, shown = made("latent_labels"), page("latent_labels")
    sentences = summary(document)
    for (name, judge), sentence in zip(document["verification"]["judges"].items(), sentences, strict=False):
        assert name in sentence
        own, floor = share_words(judge["confirmed"]), share_words(judge["floor"]["confirmed"])
        assert sentence.index(own) < sentence.index("against") < sentence.index(floor)
        assert f"{judge['f1']['value']:.3f}".replace("-", n.MINUS) in sentence
        assert f"{judge['floor']['f1']['value']:.3f}" in sentence
    kappa, floor = (document["agreement"][key]["value"] for key in ("kappa", "floor_kappa"))
    assert f"κ = {n.fixed3(kappa)}" in sentences[2] and n.fixed3(floor) in sentences[2].split("against")[1]
    means = document["probes"]["means"]
    for control in ("probe", "shuffled", "length"):
        assert f"{100 * means[control]['accuracy']['value']:.1f}\u00a0%" in sentences[3]
    assert "99.3 %" in sentences[3] and "35.8 %" in sentences[3]
    scores = document["confidence"]
    own, floor = (f"{part['mean']['value']:.3f}" for part in (scores, scores["floor"]))
    assert sentences[4].index(own) < sentences[4].index("against") < sentences[4].index(floor)
    assert f"{scores['floor']['tiers']['medium']} a medium" in sentences[4]
    score = document["calibration"]["score"]
    assert f"{score['mean_score']:.3f}" in sentences[5] and share_words(score["confirmed"]) in sentences[5]
    interval = n.interval((score["error_low"], score["error_high"]), n.fixed3)
    assert f"{score['error']:.3f} {interval}" in sentences[5] and f"AUROC {n.fixed3(score['auroc'])}" in sentences[5]
    assert "1 label not given" in sentences[6]  # the reader's, of latent 2
    assert len(list(shown.find("mark"))) >= len(document["shown"])


def test_the_floor_stands_in_the_tables_with_as_many_figures_as_the_labels() -> None:
    document, shown = made("latent_labels"), page("latent_labels")
    rows = {row[0]: row[1:] for row in reversed([*shown.rows()])}  # the first table of a name
    for name, judge in document["verification"]["judges"].items():
        for row, part in ((name, judge), (f"{name}: labels dealt to other latents", judge["floor"])):
            for cell, key in zip(rows[row][1:], ("f1", "balanced_accuracy", "near_precision"), strict=True):
                if part[key]["n"]:
                    assert cell.startswith(f"{part[key]['value']:.3f} (n = {part[key]['n']})"), (row, key)
                else:
                    assert cell == "none"
    assert "contexts of a test are from 20 to 20 documents" in shown.text()
    for name, judge in document["verification"]["judges"].items():
        top, other = (" ".join(n.percent(judge["recall"][kind]["value"]).split()) for kind in ("top", "quantile"))
        there = "of the contexts in which the latent is strongest"
        assert re.search(rf"Labels by {name} apply to {top} \[[^]]*\] {there}, and to {other}", shown.text())
    agreed = document["agreement"]
    assert f"{agreed['constant']} have one, or two, applying to all contexts or to none" in shown.text()
    few = made("latent_labels")
    few["verification"]["judges"]["reader"]["floor"]["left_out"] = [4, 5]
    assert "2 labels had no other to be dealt" in Page(render(few)).text()
    none = made("latent_labels")
    none["confidence"]["floor"] = None
    assert "there is no floor to hold that against." in summary(none)[4]


def test_of_others_labels_the_page_says_what_is_known_and_not_that_they_were_made() -> None:
    chosen = made("latent_labels")
    chosen["selection"]["rule"] = "random"
    assert "neither labels nor scores were made, though latents were chosen on the whole text" in summary(chosen)[5]
    assert "though latents" not in summary(made("latent_labels"))[5]  # they were given
    text = page("latent_labels").text()
    made_here = [
        "documents that it was not made from",
        "labels are made from",
        "were put to the judges",
        "that its label was made from",
        "neither labels nor scores were made",
    ]
    assert all(words in text for words in made_here)
    document = made("latent_labels")
    document["origin"] = "Whether their makers saw this text is not known."
    document["selection"]["rule"] = "labelled"
    text = Page(render(document)).text()
    assert not [words for words in [*made_here, "by the other judge", "chosen on"] if words in text]
    assert document["origin"] in text and "from which no score was made" in text
    assert "those by reader by reader and those by guesser by guesser" in text


def test_a_latents_card_paints_its_tokens_by_activation() -> None:
    document = made("latent_labels")
    label = document["shown"][0]
    example = label["examples"][0]
    example |= {"tokens": [" a", " b", " c"], "activations": [0.0, 1.0, 0.5], "token_index": 1, "activation": 1.0}
    label["examples"] = [example]
    html = render(document)
    assert '<span class="e0" title=" a: activation 0.000"> a</span>' in html
    assert '<mark class="e5" title=" b: activation 1.000"> b</mark>' in html
    assert '<span class="e3" title=" c: activation 0.500"> c</span>' in html


def test_calibration_points_are_the_bins_with_labels() -> None:
    document = made("latent_labels")
    bins = [b for b in document["calibration"]["score"]["bins"] if b["confirmed"]["n"]]
    [points] = [f["data"][1] for f in figures(page("latent_labels")) if "labels confirmed" in str(f["layout"]["yaxis"])]
    assert points["x"] == [b["mean_score"] for b in bins]
    assert points["y"] == [b["confirmed"]["k"] / b["confirmed"]["n"] for b in bins]
    high = [y + up for y, up in zip(points["y"], points["error_y"]["array"], strict=True)]
    assert high == pytest.approx([b["confirmed"]["high"] for b in bins])


def test_a_contrast_stands_beside_its_null() -> None:
    document = made("contrast_by_layer")
    first = summary(document)[0]
    found = document["activations"]
    [site] = [s for s in found["sites"] if s["hook_name"] == found["peak"]["hook_name"]]
    assert found["peak"]["hook_name"] == "blocks.5.hook_resid_post" and "layer 5" in first
    for key in ("curve", "split_half", "null_median", "null_95"):
        assert n.fixed3(site[key]) in first
    assert f"p = {found['peak']['p_value']:.3f}" in first
    text = page("contrast_by_layer").text()
    assert "large in noise too" in text and "dimension 7" in text
    curve = next(f for f in figures(page("contrast_by_layer")))
    by_name = {trace.get("name"): trace["y"] for trace in curve["data"]}
    assert by_name["observed"] == [s["curve"] for s in found["sites"]]
    assert by_name["permuted, median"] == [s["null_median"] for s in found["sites"]]
    assert curve["layout"]["shapes"][0]["x0"] == 5


def test_steering_gives_its_verdict_first_and_counts_by_condition() -> None:
    document = made("steering")
    shown = page("steering")
    [(_, chip)] = [(a, t) for a, t in shown.find("span") if a.get("class") == "chip"]
    assert chip == document["verdict"]["verdict"] == "direction effect"
    assert summary(document)[0].startswith("direction effect: At 5")
    rows = {row[0]: row[1:] for row in reversed([*shown.rows()])}  # the first table of a name
    for c in document["conditions"][1:]:
        cells = rows[c["name"]]
        assert cells[0].startswith(f"{c['accuracy']['k']} of 50 = ")
        assert cells[1:3] == [str(len(c["recovered"])), str(len(c["broken"]))]
    assert "3 random directions" in shown.text()
    bare = summary(made("steering", bare=True))
    assert bare[0].startswith("none: The two signs differ") and "no random direction was run" in bare[2]


def test_steering_states_the_rule_that_was_used_and_every_test() -> None:
    document = made("steering")
    document["verdict"]["rule"] = "Whatever the rule says."
    shown = Page(render(document))
    assert document["verdict"]["rule"] in shown.text()
    assert "What the first test alone, adding against subtracting, could have shown" in shown.text()
    rows = [row for row in shown.rows() if len(row) == 5]
    for part in ("opposite", "controls", "spread", "magnitude", "directions", "alone"):
        assert document["verdict"][part]
        for test in document["verdict"][part]:
            name = test["name"] if test["scale"] is None else f"{test['name']}, {100 * test['scale']:g} %"
            [row] = [row for row in rows if row[0] == name]
            assert row[3] == " ".join(n.real(test["adjusted"]).split())


def test_steering_at_one_scale_has_error_bars() -> None:
    document = made("steering")
    document["conditions"] = [c for c in document["conditions"] if abs(c["scale"]) in (0, 0.1)]
    accuracy = figures(Page(render(document)))[0]
    plus = next(c for c in document["conditions"] if c["kind"] == "positive")["accuracy"]
    [drawn] = [trace for trace in accuracy["data"] if trace.get("name") == "+"]
    assert drawn["error_y"]["array"] == [pytest.approx(plus["high"] - plus["value"])]
    assert drawn["error_y"]["arrayminus"] == [pytest.approx(plus["value"] - plus["low"])]


def test_pairs_say_how_many_pass_by_chance() -> None:
    document = made("prompt_pairs")
    first = summary(document)[0]
    assert first.startswith("5 of 160 tests pass") and f"{document['scrambled']['mean']:.1f} pass on average" in first
    assert "no analysis with swapped sides was run" in summary(made("prompt_pairs", bare=True))[0]
    points = document["categories"][0]["points"]
    drawn = next(f for f in figures(page("prompt_pairs")) if "log₁₀" in str(f["layout"]["yaxis"]))
    filled = drawn["data"][1]
    assert len(filled["x"]) == sum(q <= 0.05 for q in points["q_value"]) == 5
    found = next(i for i, q in enumerate(points["q_value"]) if q <= 0.05)
    assert filled["y"][0] == pytest.approx(-math.log10(points["p_value"][found]), rel=1e-3)


def test_two_sided_pairs_count_what_is_not_labelled_and_say_what_is_infinite() -> None:
    document = paired(two_sided=True)
    less = [found for category in document["categories"] for found in category["top"] if found["difference"] < 0]
    assert document["less_active"] == len(less) == 1 and document["labelled"] == document["found"] - 1 == 6
    assert [category["less_active"] for category in document["categories"]] == [1, 0]
    words = "Of the latents found, 6 more active with the property are labelled by it, and 1 less active with it is not"
    assert words in summary(document)[1]
    shown = Page(render(document))
    effects = {row[0]: row[1] for row in shown.rows() if len(row) == 8}
    assert effects["70"] == f"{n.MINUS}∞" and effects["71"] == "∞"
    assert "Not drawn: 2 latents with an infinite effect." in shown.text()
    assert next(row[1:] for row in shown.rows() if row[0] == "70" and len(row) == 3)[0] == "questions"
    assert n.NOT_DEFINED not in " ".join(effects.values())
    assert "less active" not in " ".join(summary(made("prompt_pairs")))


def test_a_contrast_flags_what_separates_the_groups_and_says_what_the_halves_are() -> None:
    shown = page("contrast_by_layer")
    rows = [row for row in shown.rows() if row[0] == "23"]
    assert any(row[1].replace(n.NBSP, " ") == f"≤ {n.MINUS}10" for row in rows)
    assert (
        "1 feature among the largest of the sites has a |d| of 10 or more: it separates the groups, counts as 10"
        in (shown.text())
    )
    assert "It takes 8 items in each group." in shown.text() and "does not bias it" in shown.text()


@pytest.mark.parametrize(
    ("count", "statistic", "said"),
    [
        ("all", "mean", "the mean over all tokens."),
        ("prompt", "max", "the maximum over the tokens of the prompt."),
        ("response", "last", "the last of the tokens of the response."),
        ("last", "mean", "at the last token of each."),
    ],
)
def test_a_contrast_says_which_tokens_count(count: str, statistic: str, said: str) -> None:
    document = made("contrast_by_layer")
    document["items"] |= {"count": count, "statistic": statistic}
    assert study_page(document).subject.endswith(f": {said}")


def test_a_profile_of_few_layers_tells_no_finding_of_its_phases() -> None:
    document = profile(n_layers=6)
    assert summary(document)[-1] == (
        "The curve over layers was not searched for change points: that takes 16 layers, and it has 6."
    )
    text = Page(render(document)).text()
    assert "shuffled, " not in text and "is one phase" not in text and "Cosine by phase" not in text


def test_an_interval_without_neighbours_is_an_error_bar() -> None:
    says = ["layer 1", "layer 2", "layer 3"]
    alone = plots.curves([1.0], [plots.Curve("c", [0.5], [(0.4, 0.7)])], says[:1], xaxis={}, yaxis={})
    [point] = alone["data"]
    assert point["error_y"]["array"] == pytest.approx([0.2]) and point["error_y"]["arrayminus"] == pytest.approx([0.1])
    gap = plots.Curve("c", [0.5, 0.6, None], [(0.4, 0.7), None, (0.1, 0.2)])
    [line] = plots.curves([1.0, 2.0, 3.0], [gap], says, xaxis={}, yaxis={})["data"]
    assert line["error_y"]["array"] == pytest.approx([0.2, 0, 0])
    both = plots.Curve("c", [0.5, 0.6, 0.7], [(0.4, 0.7)] * 3)
    band, line = plots.curves([1.0, 2.0, 3.0], [both], says, xaxis={}, yaxis={})["data"]
    assert "error_y" not in line and band["fill"] == "toself"


def test_a_lens_says_what_it_read_and_no_table_has_more_columns_than_a_page() -> None:
    facts = dict(study_page(made("logit_lens")).facts)
    assert facts["Items"] == "24, prompts.yaml, 1234abcd"
    assert "Items" not in dict(study_page(made("logit_lens", bare=True)).facts)
    titles = [title for title in ("Figures by layer", "Tokens followed by layer") if title in page("logit_lens").text()]
    assert len(titles) == 2
    widest = {kind: max(len(row) for row in page(kind).rows()) for kind in ("logit_lens", "prompt_pairs")}
    assert widest["prompt_pairs"] == 8 and widest["logit_lens"] <= 8


def test_a_profile_shows_its_phases_with_their_support() -> None:
    document = made("layer_profile")
    said = summary(document)[-1]
    [point] = document["phases"]["change_points"]
    assert f"layer {point['layer']} (in {n.percent(point['support'])} of resamples" in said and "shuffled" in said
    shapes = figures(page("layer_profile"))[0]["layout"]["shapes"]
    assert [s["x0"] for s in shapes if s["type"] == "rect"] == [point["layer"] - 0.5]
    assert "support not defined" in summary(made("layer_profile", bare=True))[-1]


def test_a_lens_says_where_it_settles() -> None:
    document = made("logit_lens")
    assert "from layer 4 on" in summary(document)[1]
    curve = figures(page("logit_lens"))[0]
    assert curve["layout"]["xaxis"]["ticktext"][0] == "in"
    lines = {trace["name"]: trace["y"] for trace in curve["data"] if "name" in trace}
    assert lines["entropy"] == document["curves"]["entropy"]["values"]
    text = page("logit_lens").text()
    assert "Lowers" in text and "cat −3.900" in text
    assert "the target" not in page("logit_lens", True).text()


def test_a_long_table_is_folded_and_holds_every_layer() -> None:
    html = page("layer_profile").html
    at = html.index("Figures by layer")
    assert html.rindex("<summary>", 0, at) > html.rindex("<section", 0, at)
    names = [row[0] for row in page("layer_profile").rows()]
    assert [name for name in names if name.isdigit()] == [str(layer) for layer in range(24)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_incomplete_of_another_schema_or_not_finite_is_refused(kind: str) -> None:
    document = made(kind)
    for key in document.keys() - {"schema", "kind", "versions", "sampling", "decoder", "n_layers"}:
        lacking = {k: v for k, v in document.items() if k != key}
        with suppress(ConfigError):  # and nothing else
            assert Page(render(lacking)).text()
    with pytest.raises(ConfigError, match="schema 2"):
        render(document | {"schema": 2})
    with pytest.raises(ConfigError, match=r"holds nan at extra\.x\[1\]"):
        render(document | {"extra": {"x": [1, math.nan]}})


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("layer_profile", "phases"),
        ("latent_labels", "verification"),
        ("contrast_by_layer", "items"),
        ("steering", "conditions"),
        ("prompt_pairs", "scrambled"),
        ("logit_lens", "curves"),
    ],
)
def test_what_a_page_needs_is_named_where_it_is_missing(kind: str, key: str) -> None:
    document = copy.copy(made(kind))
    del document[key]
    with pytest.raises(ConfigError, match=f"study .{kind}. lacks '{key}'"):
        render(document)


def test_a_kind_that_is_none_is_named() -> None:
    with pytest.raises(UnknownNameError, match="layer_profiles"):
        render({"schema": 1, "kind": "layer_profiles"})
    with pytest.raises(UnknownNameError, match="evaluation"):
        study_page({"schema": 2, "kind": "evaluation"})


def test_texts_in_plots_are_neither_markup_nor_colours() -> None:
    assert plots.escaped("<b>$ink\u202e") == "&lt;b&gt;&#36;ink⟨202E⟩"
    places, axis = plots.layer_axis([None, *range(30)])
    assert places[:2] == [-1, 0] and axis["ticktext"][0] == "in" and axis["ticktext"][1] == "4"
