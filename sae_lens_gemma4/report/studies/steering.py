"""The page of a steering run: the verdict first, then what each push did to the answers, with its opposite and random
directions of the same length beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import Figure, figure, title
from sae_lens_gemma4.report.studies import plots
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.studies.plots import Curve
from sae_lens_gemma4.report.study import Card, Panel, Section, StudyPage, named_model, provenance
from sae_lens_gemma4.report.tables import Table
from sae_lens_gemma4.report.visible import visible

Found = Mapping[str, Any]
_SIGNS = {"positive": "+", "negative": "−", "random": "random"}
_RULE = (
    "A direction effect asks for two things at one scale: adding and subtracting differ (McNemar’s exact test), and "
    "the better of the two beats random directions of the same length, or the worse falls behind them, their mean and "
    "every single one. Else it is a magnitude effect where pushes of any direction differ from the baseline or "
    "accuracy has a trend over their length. p-values are corrected by Holm’s method."
)


def page(document: Found) -> StudyPage:
    verdict = document["verdict"]
    settings = document["settings"]
    scales = w.listed([_scale(scale) for scale in settings["scales"]])
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
            ("Settings", w.settings(settings)),
        ],
        verdict=(verdict["verdict"], _after_colon(verdict["words"])),
    )


def _scale(scale: float) -> str:
    """A length as conditions are called by it: 5 %."""
    return f"{100 * abs(scale):g}{n.NBSP}%"


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
        found.append(f"At {_scale(scale)} of the mean norm: {'; '.join([*said, control])}.")
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
        tables=[_table(document)],
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


def _table(document: Found) -> Table:
    rows: list[w.Row] = []
    for c in document["conditions"]:
        change = c["change"]
        rows.append(
            (
                c["name"],
                [
                    w.share_cell(c["accuracy"]),
                    w.text_cell("–" if change is None else n.count(len(c["recovered"]))),
                    w.text_cell("–" if change is None else n.count(len(c["broken"]))),
                    w.text_cell("–")
                    if change is None
                    else w.cell(change["change"], _signed, (change["low"], change["high"])),
                    w.text_cell("–" if change is None else n.real(change["p_value"])),
                    w.cell(c["answer_found"]["value"], n.percent),
                    w.cell(c["cut"]["value"], n.percent),
                    w.cell(c["mean_tokens"], n.per_token),
                    w.cell(c["added_norm"], n.real),
                ],
            )
        )
    caption = (
        "Recovered: wrong at the baseline and right here; broken: the reverse. p is McNemar’s, exact and not "
        "corrected. Cut: outputs that the limit of tokens ended."
    )
    heads = ["Condition", "Right", "Recovered", "Broken", "Change", "p", "Answer found", "Cut", "Tokens", "Norm added"]
    return w.table("Conditions", caption, heads, rows)


def _signed(value: float | None) -> str:
    return n.signed(value, n.percent)


def _verdict(verdict: Found) -> Section:
    rows = [
        (
            test["name"] if test["scale"] is None else f"{test['name']}, {_scale(test['scale'])}",
            [
                w.cell(test["difference"], _signed),
                w.cell(test["p_value"], n.real),
                w.cell(test["adjusted"], n.real),
                w.text_cell("–" if test["rank"] is None else n.percent(test["rank"])),
            ],
        )
        for part in ("opposite", "controls", "magnitude")
        for test in verdict[part]
    ]
    able = verdict["detectable"]
    change = "no change at all" if able["change"] is None else f"a change of {n.percent(able['change'])} or more"
    words = [
        _RULE,
        f"With {n.count(able['n'])} items, of which {n.count(able['discordant'])} were answered differently, "
        f"{change} would have been found with a probability of {n.percent(able['power'])}.",
    ]
    caption = (
        f"Tests at the level {verdict['alpha']:g}, paired by item. The last column: random directions that are as far "
        "out on the vector’s side. The trend’s difference is of accuracy by one mean norm."
    )
    heads = ["Test", "Difference", "p", "p, corrected", "Random as far out"]
    return Section("Verdict", text=words, tables=[w.table("Tests behind the verdict", caption, heads, rows)])


def _overlaps(overlaps: Sequence[Found]) -> list[Section]:
    if not overlaps:
        return []
    rows = [
        (
            f"{_scale(o['scale'])}, {o['what']}",
            [
                w.cell(len(o["both"]), n.count),
                w.cell(o["expected"], n.per_token),
                w.cell(len(o["first_only"]), n.count),
                w.cell(len(o["second_only"]), n.count),
                w.cell(o["jaccard"], n.fixed3),
                w.cell(o["p_value"], n.real),
            ],
        )
        for o in overlaps
    ]
    words = (
        "Items that change both when the direction is added and when it is subtracted change because they were pushed. "
        "p: how often two such sets of items, drawn at random, share as many."
    )
    heads = ["Scale", "Both ways", "By chance", "Added only", "Subtracted only", "Jaccard", "p"]
    return [Section("The same items both ways", [words], tables=[w.table("Overlaps", "", heads, rows)])]


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
