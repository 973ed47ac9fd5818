"""What tests say of labels: how many are confirmed, against dealt labels, and whether two judges mean the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import Figure, figure, title
from sae_lens_gemma4.report.studies import plots
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.studies.label_scores import signed_percent
from sae_lens_gemma4.report.studies.plots import Dot
from sae_lens_gemma4.report.study import Panel, Section
from sae_lens_gemma4.report.tables import Cell, Table, Value

FLOOR = "labels dealt to other latents"
_FIGURES = ("f1", "balanced_accuracy", "near_precision")
_BINS = 10


def confirmed(judge: Mapping[str, Any]) -> str:
    """A judge's labels on held-out contexts, and dealt labels in the same sentence."""
    if not judge["confirmed"]["n"]:
        return f"None of the labels by {judge['judge']} could be tested on held-out contexts."
    floor = judge["floor"]
    said = (
        f"Of the labels by {judge['judge']}, {w.share(judge['confirmed'])} are confirmed on held-out contexts, as "
        f"{judge['scorer']} reads them"
    )
    if floor is None:
        return f"{said}; there is no floor to hold that against ({judge['no_floor'] or 'it was not asked for'})."
    return (
        f"{said}, against {w.share(floor['confirmed'])} of {FLOOR}; mean F1 is {w.mean(judge['f1'])} against "
        f"{w.mean(floor['f1'])}."
    )


def agreed(agreement: Mapping[str, Any]) -> str:
    return (
        f"On the same held-out contexts the labels of a latent by {w.listed(agreement['judges'])} agree with κ = "
        f"{w.mean(agreement['kappa'])}, against {w.mean(agreement['floor_kappa'])} with the label of another latent; "
        f"of their words they share {w.mean(agreement['words'])} (Jaccard), against {w.mean(agreement['floor_words'])}."
    )


def held_out(verification: Mapping[str, Any], made: bool, origin: str | None) -> Section:
    judges = list(verification["judges"].values())
    shares, f1 = [], []
    for judge in judges:
        for part, name, floor in ((judge, "labels", False), (judge["floor"], "dealt labels", True)):
            if part is not None:
                says = f"{judge['judge']}, {name}: {w.share(part['confirmed'])}"
                shares.append(Dot(judge["judge"], part["confirmed"]["value"], w.bounds(part["confirmed"]), says, floor))
    caption = " ".join(
        f"{judge['judge']}: {w.share(judge['confirmed'])}"
        + ("." if judge["floor"] is None else f"; hollow, {FLOOR}: {w.share(judge['floor']['confirmed'])}.")
        for judge in judges
    )
    axis = plots.share_axis("labels confirmed")
    panels = [Panel("confirmed", "Labels confirmed on held-out contexts", caption, plots.dots(shares, xaxis=axis))]
    for number, judge in enumerate(judges):
        if judge["tests"]:
            against = "" if judge["floor"] is None else f" Grey and dashed: {FLOOR}, {w.mean(judge['floor']['f1'])}."
            words = f"Mean {w.mean(judge['f1'])}.{against}"
            name = f"F1 of the labels by {judge['judge']}"
            f1.append(Panel(f"f1-{number}", name, words, _distribution(judge)))
    by = w.listed([f"those by {judge['judge']} by {judge['scorer']}" for judge in judges])
    whose = "of documents that it was not made from, " if made else ""
    return Section(
        "Held-out contexts",
        text=[
            f"A label is shown with contexts {whose}without activations, and asked of each is whether it applies. "
            f"Labels are tested: {by}. {verification['rule'][:1].upper()}{verification['rule'][1:]}. "
            "Negatives are near-misses and random contexts in which the latent is silent.",
            *([] if made or origin is None else [origin]),
            "The floor is the same test with another label, that of another latent: what it confirms is what a test "
            "confirms whatever the label says.",
            *_by_kind(judges),
        ],
        panels=[*panels, *f1],
        tables=[_judge_table(judges), *_untested(judges)],
    )


def _by_kind(judges: Sequence[Mapping[str, Any]]) -> list[str]:
    """Recall of the strongest contexts beside the others', which a label for the strongest alone does not fit."""
    found = []
    for judge in judges:
        recall = judge["recall"]
        if recall["difference"]["n"]:
            found.append(
                f"Labels by {judge['judge']} apply to {w.mean(recall['top'], n.percent)} of the contexts in which the "
                f"latent is strongest, and to {w.mean(recall['quantile'], n.percent)} of those from all over its range "
                f"(difference {w.mean(recall['difference'], signed_percent)})."
            )
    return found


def _judge_table(judges: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[w.Row] = []
    for judge in judges:
        for part, name in ((judge, judge["judge"]), (judge["floor"], f"{judge['judge']}: {FLOOR}")):
            if part is not None:
                rows.append((name, [w.share_cell(part["confirmed"]), *(_counted(part[key]) for key in _FIGURES)]))
        if judge["floor"] is not None and judge["floor"]["change"] is not None:
            change = judge["floor"]["change"]
            gained = w.cell(change["change"], lambda v: n.signed(v, n.percent), (change["low"], change["high"]))
            cells = [gained, *(_counted(judge["floor"][f"{key}_difference"]) for key in _FIGURES)]
            rows.append((f"difference, McNemar’s {w.p_value(change['p_value'])}", cells))
    caption = (
        "Intervals of shares are Wilson’s, of means BCa bootstrap over latents; n, latents for which a figure is "
        "defined. Precision against near-misses has these as the only negatives. Differences are paired by latent."
    )
    if left_out := sum(len(judge["floor"]["left_out"]) for judge in judges if judge["floor"] is not None):
        caption += f" {w.whole(left_out, 'label')} had no other to be dealt: more than half of all are the same text."
    documents = [test["documents"] for judge in judges for test in judge["tests"].values()]
    if documents:
        caption += f" The contexts of a test are from {n.count(min(documents))} to {n.count(max(documents))} documents."
    heads = ["Labels", "Confirmed", "F1", "Balanced accuracy", "Precision against near-misses"]
    return w.table("Labels by judge, and their floors", caption, heads, rows)


def _counted(mean: Mapping[str, Any]) -> Cell:
    """A mean with its interval, and of how many."""
    if not mean["n"]:
        return w.text_cell("none")
    return [Value(f"{n.fixed3(mean['value'])} (n = {n.count(mean['n'])})", n.interval(w.bounds(mean), n.fixed3))]


def _untested(judges: Sequence[Mapping[str, Any]]) -> list[Table]:
    rows = [
        (judge["judge"], [w.text_cell(w.reasons(judge["untestable"].values()) or "none")])
        for judge in judges
        if judge["untestable"]
    ]
    return [w.table("Labels that could not be tested", "How many, and why.", ["Judge", "Why"], rows)] if rows else []


def _distribution(judge: Mapping[str, Any]) -> Figure:
    """How many labels have which F1: the judge's and the dealt ones."""
    edges = [i / _BINS for i in range(_BINS + 1)]
    parts = [("labels", judge["tests"], "after", "solid")]
    if judge["floor"] is not None:
        parts.append(("dealt labels", judge["floor"]["tests"], "muted", "5px,3px"))
    data: list[Figure] = []
    for name, tests, colour, dash in parts:
        counts = [0] * _BINS
        for test in tests.values():
            counts[min(int(test["f1"] * _BINS), _BINS - 1)] += 1
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": edges,
                "y": [*counts, 0],
                "name": name,
                "line": {"color": f"${colour}", "width": 2, "dash": dash, "shape": "hv"},
                "fill": "tozeroy",
                "fillcolor": plots.FILLS[colour],
                "text": [f"{w.whole(c, 'label')} of F1 from {e:g} on" for c, e in zip(counts, edges, strict=False)],
                "hovertemplate": f"{name}: %{{text}}<extra></extra>",
            }
        )
    made = figure(
        data,
        x={"title": title("F1 on held-out contexts"), "range": [-0.02, 1.02], "zeroline": False},
        y={"title": title("labels"), "rangemode": "tozero"},
    )
    return plots.keyed(made)


def agreement(found: Mapping[str, Any] | None) -> list[Section]:
    if found is None:
        return []
    rows = [
        (
            name,
            [
                w.mean_cell(found[key]),
                w.mean_cell(found[f"floor_{key}"]),
                w.mean_cell(found[f"{key}_difference"]),
            ],
        )
        for name, key in (("Cohen’s κ of where they apply", "kappa"), ("Words in common, Jaccard", "words"))
    ]
    caption = (
        f"Floor: {found['definitions']['floor']}. Of {w.whole(len(found['pairs']), 'pair')} of labels, "
        f"{n.count(found['constant'])} have one, or two, applying to all contexts or to none, which makes κ 0. "
        f"Tested by {w.listed(sorted(set(found['scorers'])))}."
    )
    made = w.table("Agreement of the labels", caption, ["Agreement", "Same latent", "Floor", "Difference"], rows)
    return [Section("Agreement", text=[agreed(found)], tables=[made])]
