"""The page of a steering run: the verdict first, then what each push did to the answers, with its opposite and random
directions of the same length beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import Figure, figure, title
from sae_lens_gemma4.report.studies import plots
from sae_lens_gemma4.report.studies import steering_tables as tables
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.studies.plots import Curve
from sae_lens_gemma4.report.study import Card, Panel, Section, StudyPage, named_model, provenance
from sae_lens_gemma4.report.visible import visible

Found = Mapping[str, Any]
_SIGNS = {"positive": "+", "negative": "−", "random": "random"}


def page(document: Found) -> StudyPage:
    verdict = document["verdict"]
    settings = document["settings"]
    scales = w.listed([tables.scale(scale) for scale in settings["scales"]])
    return StudyPage(
        title="Steering",
        subject=f"{w.whole(document['n_items'], 'item')} answered by {named_model(document)} with a direction added at "
        f"{document['hook']}, of {scales} of the mean norm there, both ways and with random directions.",
        summary=_summary(document),
        sections=[_effects(document), _verdict(verdict), *_overlaps(document["overlaps"]), *_samples(document)],
        facts=[
            *provenance(document),
            ("Direction", f"{_origin(document['origin'])}, {document['vector']}"),
            ("Items", ", ".join(str(part) for part in (document.get("source"), document["items"]) if part)),
            ("Extractor", str(document["extractor"])),
            ("Mean norm", f"{n.real(document['norm']['mean'])} over {n.count(document['norm']['n_tokens'])} tokens"),
            ("Settings", w.settings({**settings, "batch_items": document.get("batch_items")})),
        ],
        verdict=(verdict["verdict"], _after_colon(verdict["words"])),
    )


def _after_colon(words: str) -> str:
    """The verdict's reason, without the verdict."""
    reason = words.partition(": ")[2] or words
    return reason[:1].upper() + reason[1:]


def _origin(origin: Any) -> str:
    if isinstance(origin, Mapping):
        return w.settings(origin)
    return str(origin)


def _summary(document: Found) -> list[str]:
    baseline = _baseline(document)
    found = [
        f"The baseline is right about {w.share(baseline['accuracy'])}; an answer was found in "
        f"{w.share(baseline['answer_found'])} of its outputs."
    ]
    for scale in _scales(document):
        said = [
            f"{_SIGNS[c['kind']]} {n.count(c['accuracy']['k'])} right ({len(c['recovered'])} recovered, "
            f"{len(c['broken'])} broken, {w.p_value(c['change']['p_value'])})"
            for c in _at(document, scale)
            if c["kind"] != "random"
        ]
        randoms = [c["accuracy"]["k"] for c in _at(document, scale) if c["kind"] == "random"]
        control = (
            "no random direction was run"
            if not randoms
            else f"{w.whole(len(randoms), 'random direction')}, {n.per_token(fmean(randoms))} right on average "
            f"({min(randoms)} to {max(randoms)})"
        )
        found.append(f"At {tables.scale(scale)} of the mean norm: {'; '.join([*said, control])}.")
    return [*found, *document["verdict"]["notes"]]


def _baseline(document: Found) -> Found:
    return next(c for c in document["conditions"] if c["kind"] == "baseline")


def _scales(document: Found) -> list[float]:
    return sorted({abs(c["scale"]) for c in document["conditions"] if c["kind"] != "baseline"})


def _at(document: Found, scale: float) -> list[Found]:
    return [c for c in document["conditions"] if c["kind"] != "baseline" and abs(c["scale"]) == scale]


def _effects(document: Found) -> Section:
    baseline = _baseline(document)
    caption = (
        f"Baseline, dotted with its interval: {w.share(baseline['accuracy'])}. Grey crosses are single random "
        "directions, the grey line is their mean. "
    )
    best = max((c for c in document["conditions"]), key=lambda c: c["accuracy"]["k"])
    worst = min((c for c in document["conditions"]), key=lambda c: c["accuracy"]["k"])
    spread = (
        f"Highest: {best['name']}, {w.share(best['accuracy'])}; lowest: {worst['name']}, {w.share(worst['accuracy'])}."
    )
    net = (
        "Answers that became right less those that became wrong. A push that helps whichever way it goes is not the "
        "direction’s doing."
    )
    return Section(
        "Answers",
        panels=[
            Panel("accuracy", "Accuracy by length of the push", caption + spread, _accuracy(document)),
            Panel("net", "Net change of right answers", net, _net(document)),
        ],
        tables=[tables.conditions(document)],
        more_tables=[tables.pushes(document)],
    )


def _series(document: Found, kind: str) -> list[Found | None]:
    return [next((c for c in _at(document, s) if c["kind"] == kind), None) for s in _scales(document)]


def _accuracy(document: Found) -> Figure:
    scales, base = _scales(document), _baseline(document)["accuracy"]
    x = [100 * scale for scale in scales]
    shown = []
    for kind, name, colour, dash in (("positive", "+", "after", "solid"), ("negative", "−", "before", "5px,3px")):
        found = [None if c is None else c["accuracy"] for c in _series(document, kind)]
        if any(found):
            values = [None if a is None else a["value"] for a in found]
            shown.append(Curve(name, values, [w.bounds(a) for a in found], colour, dash, n.percent, markers=True))
    means = [
        fmean(values)
        if (values := [c["accuracy"]["value"] for c in _at(document, s) if c["kind"] == "random"])
        else None
        for s in scales
    ]
    if any(value is not None for value in means):
        shown.append(Curve("random, mean", means, None, "muted", "2px,2px", n.percent, markers=True))
    level = base["value"]
    shapes = [] if level is None else [_band(base), plots.horizontal(level)]
    made = plots.curves(
        x,
        shown,
        [f"{value:g}{n.NBSP}%" for value in x],
        xaxis=_scale_axis(x),
        yaxis={"title": title("right answers"), "tickformat": ".0%", "rangemode": "tozero"},
        shapes=shapes,
        height=340,
    )
    singles = [(100 * abs(c["scale"]), c) for c in document["conditions"] if c["kind"] == "random"]
    made["data"].append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": [at for at, _ in singles],
            "y": [c["accuracy"]["value"] for _, c in singles],
            "marker": {"symbol": "x-thin", "size": 7, "line": {"width": 1.5, "color": "$muted"}},
            "name": "random, single",
            "text": [plots.escaped(f"{c['name']}: {w.share(c['accuracy'])}") for _, c in singles],
            "hovertemplate": "%{text}<extra></extra>",
            "showlegend": bool(singles),
        }
    )
    return made


def _band(base: Found) -> Figure:
    low, high = w.bounds(base) or (base["value"], base["value"])
    box: Figure = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": high, "layer": "below"}
    return box | {"fillcolor": "$muted-fill", "line": {"width": 0}}


def _scale_axis(x: Sequence[float]) -> Figure:
    room = 0.06 * max(x, default=1)
    return {
        "title": title("length of the push, % of the mean norm"),
        "tickvals": list(x),
        "ticktext": [f"{value:g}" for value in x],
        "range": [min(x, default=0) - room, max(x, default=1) + room],
        "zeroline": False,
    }


def _net(document: Found) -> Figure:
    scales = _scales(document)
    data: list[Figure] = []
    for kind, name, colour in (
        ("positive", "+", "$after"),
        ("negative", "−", "$before"),
        ("random", "random, mean", "$muted"),
    ):
        values = []
        for scale in scales:
            nets = [c["net"] for c in _at(document, scale) if c["kind"] == kind]
            values.append(fmean(nets) if nets else None)
        if any(value is not None for value in values):
            data.append(
                {
                    "type": "bar",
                    "x": list(range(len(scales))),
                    "y": values,
                    "name": name,
                    "marker": {"color": colour, "pattern": {"shape": "/" if kind == "negative" else ""}},
                    "text": ["" if v is None else n.signed(v, n.per_token) for v in values],
                    "textposition": "none",
                    "hovertemplate": f"{name}: %{{text}} answers<extra></extra>",
                }
            )
    made = figure(
        data,
        x={
            "title": title("length of the push, % of the mean norm"),
            "tickvals": list(range(len(scales))),
            "ticktext": [f"{100 * scale:g}" for scale in scales],
            "zeroline": False,
        },
        y={"title": title("net change, answers")},
        height=340,
    )
    return plots.keyed(made)


def _verdict(verdict: Found) -> Section:
    able = verdict["detectable"]
    change = "no change at all" if able["change"] is None else f"a change of {n.percent(able['change'])} or more"
    compared = "adding against subtracting" if verdict["opposite"] else "a push against the baseline"
    words = [
        verdict["rule"],
        f"What the first test alone, {compared}, could have shown: with {n.count(able['n'])} items, of which "
        f"{n.count(able['discordant'])} were answered differently, {change} would have been found with a probability "
        f"of {n.percent(able['power'])}. A direction effect asks for more.",
    ]
    return Section("Verdict", text=words, tables=[tables.tests(verdict)])


def _overlaps(overlaps: Sequence[Found]) -> list[Section]:
    words = (
        "Items that change both when the direction is added and when it is subtracted change because they were pushed. "
        "p: how often two such sets of items, drawn at random, share as many."
    )
    return [Section("The same items both ways", [words], tables=[tables.overlaps(overlaps)])] if overlaps else []


def _samples(document: Found) -> list[Section]:
    cards = [
        Card(
            title=f"Item {n.count(sample['item'])}, right answer {visible(str(sample['right']))}",
            text="",
            facts=(),
            texts=[
                ("Prompt", str(sample["prompt"])),
                *(
                    (f"{name}, answer {'not found' if out['answer'] is None else out['answer']}", str(out["text"]))
                    for name, out in sample["outputs"].items()
                ),
            ],
        )
        for sample in document["samples"]
    ]
    words = "Items whose answers changed, the first of them; long texts are cut."
    return [Section("Outputs", [words], cards=cards, folded=True)] if cards else []
