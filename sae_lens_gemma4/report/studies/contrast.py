"""The page of a contrast by layer: where two groups of items differ, against what permuted groups show as largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.models.hook_names import layer_of
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import Figure, title
from sae_lens_gemma4.report.studies import plots
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.studies.plots import Curve
from sae_lens_gemma4.report.study import Panel, Section, StudyPage, named_model, provenance
from sae_lens_gemma4.report.tables import Table

Found = Mapping[str, Any]
KINDS = {"activations": ("dimension", "Activations"), "latents": ("latent", "Latents")}
_CURSE = (
    "The largest of many effects are large in noise too, and what was chosen for being largest comes out smaller on "
    "other items. So the curve and the effects of single features are too large, and their intervals, of what was "
    "chosen, do not take that out. The permuted groups went through the same choice."
)
_STATISTICS = {"mean": "the mean", "max": "the maximum", "last": "the last"}
_COUNTED = {"all": "all tokens", "prompt": "the tokens of the prompt", "response": "the tokens of the response"}


def page(document: Found) -> StudyPage:
    kinds = [kind for kind in KINDS if document[kind] is not None]
    items = document["items"]
    groups = document[kinds[0]]["groups"] if kinds else []
    sizes = [f"{group['name']} ({n.count(group['items'])})" for group in groups]
    return StudyPage(
        title="Contrast by layer",
        subject=f"{w.whole(items['n'], 'item')} of {items['source']}, {w.listed(sizes)}, in {named_model(document)}: "
        f"{_read(items)}.",
        summary=[sentence for kind in kinds for sentence in _sentences(document[kind], kind)]
        + [*(_length(document[kind]["length"], groups) for kind in kinds[:1]), *_answers(document["answers"])],
        sections=[_section(document[kind], kind) for kind in kinds],
        facts=[*provenance(document), *_saes(document.get("saes") or ()), *_settings(document, kinds)],
    )


def _read(items: Found) -> str:
    """What of each item was read."""
    if items["count"] == "last":
        return "at the last token of each"
    statistic, counted = items["statistic"], items["count"]
    of = "of" if statistic == "last" else "over"
    return f"{_STATISTICS.get(statistic, statistic)} {of} {_COUNTED.get(counted, counted)}"


def _limits(found: Found) -> str:
    """What the split-half line is, and what a feature that separates the groups counts."""
    said = (
        "The split-half line is of features chosen on one half of the items and measured on the other, with Hedges’ "
        "correction for few items. Choosing does not bias it, but half of the items choose worse than all do, so it is "
        "rather too small for the features of the curve; the correction is exact for normal features alone. It takes "
        f"{n.count(found['least_split'])} items in each group."
    )
    separate = sum(site["separate"] for site in found["sites"])
    if not separate:
        return said
    return (
        f"{said} {w.whole(separate, 'feature')} among the largest of the sites {'has' if separate == 1 else 'have'} a "
        f"|d| of {found['most_d']:g} or more: {'it separates' if separate == 1 else 'they separate'} the groups, "
        f"{'counts' if separate == 1 else 'count'} as {found['most_d']:g} and {'has' if separate == 1 else 'have'} no "
        "interval."
    )


def _effect(feature: Found) -> str:
    """d with its interval; of a feature that separates the groups the least that it can be."""
    if feature["separates"]:
        return f"{'≤' if feature['d'] < 0 else '≥'}{n.NBSP}{n.fixed(feature['d'], 0)}"
    return w.with_interval(feature["d"], feature["interval"], n.fixed3)


def _sentences(found: Found, kind: str) -> list[str]:
    """The peak with its null, how often it is the peak, and what passes by itself."""
    one, _ = KINDS[kind]
    peak, site, top = found["peak"], _peak(found), found["settings"]["top"]
    many = sum(site["found"] for site in found["sites"])
    if peak["share_of_halves"] is None:
        halves = "there are too few items to halve them"
    elif len(found["sites"]) == 1:
        halves = "no other site was read"
    else:
        halves = f"{n.percent(peak['share_of_halves'])} of random halves of the items peak there"
    split = (
        ""
        if site["split_half"] is None
        else f", and {n.fixed3(site['split_half'])} where half of the items choose and the other half measure"
    )
    return [
        f"The mean of the {n.count(top)} largest |d| over {one}s is largest at {place(site['hook_name'])}, "
        f"{w.with_interval(site['curve'], site['interval'], n.fixed3)}{split}; with the groups permuted it is "
        f"{n.fixed3(site['null_median'])} there in the median and {n.fixed3(site['null_95'])} at the 95 % quantile. A "
        f"curve as high at any site comes with permuted groups at {w.p_value(peak['p_value'])}; {halves}.",
        f"The family-wise p is {found['level']:g} or less for {w.whole(many, one)} of "
        f"{n.count(sum(site['features'] - site['left_out'] for site in found['sites']))} tested at all sites.",
    ]


def _length(length: Found, groups: Sequence[Found]) -> str:
    means = [f"{n.per_token(m)} ({group['name']})" for m, group in zip(length["mean_tokens"], groups, strict=True)]
    return (
        f"Items have {w.listed(means)} tokens on average, d = {n.fixed3(length['d'])} "
        f"({w.p_value(length['p_value'])}): what goes with the groups may be length where these differ."
    )


def _answers(answers: Found | None) -> list[str]:
    if answers is None:
        return []
    return [
        f"By the extractor {answers['extractor']}, {n.count(answers['right'])} answers are right and "
        f"{n.count(answers['wrong'])} wrong; in {n.count(answers['not_found'])} it found no answer, and "
        f"{n.count(answers['empty'])} that are empty are left out."
    ]


def place(hook_name: str) -> str:
    """A hook as it is called in a sentence."""
    layer = layer_of(hook_name)
    return hook_name if layer is None else f"layer {layer}"


def _peak(found: Found) -> Found:
    peak = found["peak"]
    return next(
        site for site in found["sites"] if (site["hook_name"], site["kind"]) == (peak["hook_name"], peak["kind"])
    )


def _section(found: Found, kind: str) -> Section:
    one, name = KINDS[kind]
    peak, top = _peak(found), found["settings"]["top"]
    panels = [
        Panel(
            f"curve-{kind}",
            f"Mean of the {n.count(top)} largest |d|",
            f"{_sentences(found, kind)[0]} Grey: permuted groups, median to 95 % quantile; dotted: the peak.",
            _curve(found),
        )
    ]
    if peak["top"]:
        text = "; ".join(f"{_feature(one, f)} {_effect(f)}" for f in peak["top"][:3])
        panels.append(
            Panel(
                f"features-{kind}",
                f"Largest effects at {place(peak['hook_name'])}",
                f"{text}. Hollow: family-wise p above {found['level']:g}.",
                _features(peak["top"], one, found["level"]),
            )
        )
    return Section(
        name,
        text=[_CURSE, _limits(found)],
        panels=panels,
        tables=[_features_table(peak, found, one), _sites_table(found, one)],
    )


def _feature(one: str, feature: Found) -> str:
    return f"{one} {n.count(feature['feature'])}"


def _curve(found: Found) -> Figure:
    sites = found["sites"]
    layers = [layer_of(site["hook_name"]) for site in sites]
    if len({layer for layer in layers if layer is not None}) == len(sites):
        x, axis = plots.layer_axis(layers)
    else:
        x = [float(i) for i in range(len(sites))]
        names = [plots.escaped(plots.shortened(site["hook_name"])) for site in sites]
        axis = {"tickvals": x, "ticktext": names, "tickangle": -40, "zeroline": False}
    null = [
        None if site["null_median"] is None or site["null_95"] is None else (site["null_median"], site["null_95"])
        for site in sites
    ]
    shown = [
        Curve("permuted, median", [s["null_median"] for s in sites], null, "muted", "5px,3px", width=1.5),
        Curve("observed", [s["curve"] for s in sites], [s["interval"] for s in sites], "after", markers=True),
        Curve("split-half", [s["split_half"] for s in sites], None, "before", "2px,2px"),
    ]
    return plots.curves(
        x,
        [curve for curve in shown if any(value is not None for value in curve.y)],
        [place(site["hook_name"]) for site in sites],
        xaxis=axis,
        yaxis={"title": title("mean of the largest |d|"), "rangemode": "tozero"},
        shapes=[plots.vertical(x[sites.index(_peak(found))])],
        height=340,
    )


def _features(top: Sequence[Found], one: str, level: float) -> Figure:
    shown = [
        plots.Dot(
            _feature(one, feature),
            feature["d"],
            feature["interval"],
            f"{_feature(one, feature)}: d {_effect(feature) if feature['separates'] else f'= {_effect(feature)}'}, "
            f"family-wise {w.p_value(feature['p_value'])}",
            feature["p_value"] > level,
        )
        for feature in top
    ]
    return plots.dots(shown, xaxis={"title": title("Cohen’s d"), "zeroline": True})


def _features_table(site: Found, found: Found, one: str) -> Table:
    rows = [
        (
            n.count(feature["feature"]),
            [
                w.text_cell(_effect(feature))
                if feature["separates"]
                else w.cell(feature["d"], n.fixed3, feature["interval"]),
                w.cell(feature["p_value"], n.real),
                w.cell(feature["active"], n.count),
                w.cell(feature["length_r"], n.fixed3),
            ],
        )
        for feature in site["top"]
    ]
    groups = [group["name"] for group in found["groups"]]
    caption = (
        f"Cohen’s d, {groups[0]} less {groups[1]}, of what was chosen for a large |d|. p is the share of permutations "
        "in which any feature at any site has an effect as large."
    )
    heads = [one.capitalize(), "d", "Family-wise p", "Items where not 0", "Correlation with length"]
    return w.table(f"Largest effects at {place(site['hook_name'])}", caption, heads, rows)


def _sites_table(found: Found, one: str) -> Table:
    rows = [
        (
            site["hook_name"],
            [
                w.cell(site["curve"], n.fixed3, site["interval"]),
                w.cell(site["null_median"], n.fixed3),
                w.cell(site["null_95"], n.fixed3),
                w.cell(site["split_half"], n.fixed3),
                w.cell(site["p_value"], n.real),
                w.text_cell(f"{n.count(site['found'])} of {n.count(site['features'] - site['left_out'])}"),
            ],
        )
        for site in found["sites"]
    ]
    settings = found["settings"]
    caption = (
        f"{n.count(settings['permutations'])} permutations, {n.count(settings['splits'])} splits in halves. The last "
        f"column: {one}s that differ by themselves, of those tested."
    )
    heads = ["Site", "Curve", "Permuted, median", "Permuted, 95 %", "Split-half", "p over all sites", "Differ"]
    return w.table("Sites", caption, heads, rows)


def _saes(saes: Sequence[Found]) -> list[tuple[str, str]]:
    return [
        ("SAE", ", ".join(str(sae[k]) for k in ("release", "sae_id", "path", "hook_name", "hash") if sae.get(k)))
        for sae in saes
    ]


def _settings(document: Found, kinds: Sequence[str]) -> list[tuple[str, str]]:
    return [("Settings", w.settings(document[kinds[0]]["settings"]))] if kinds else []
