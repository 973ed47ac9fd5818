"""The page of a layer profile: how near each layer is to its tokens, and where that changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import Figure, title
from sae_lens_gemma4.report.studies import plots
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.studies.plots import Curve
from sae_lens_gemma4.report.study import Panel, Section, StudyPage, named_model, provenance
from sae_lens_gemma4.report.tables import Table

Profile = Mapping[str, Any]
_QUANTITIES = (
    ("Cosine", "cosine", n.fixed3),
    ("Nearest cosine", "nearest_cosine", n.fixed3),
    ("Recovered", "recovered", n.percent),
    ("Unembedding: cosine", "unembedding_cosine", n.fixed3),
    ("Unembedding: nearest", "unembedding_nearest_cosine", n.fixed3),
    ("Unembedding: recovered", "unembedding_recovered", n.percent),
    ("Norm, mean", "norm_mean", n.real),
    ("Norm, median", "norm_median", n.real),
    ("Norm of the mean", "mean_norm", n.real),
    ("γ", "gamma", n.real),
)
_DEFINED = {
    "cosine": "Cosine",
    "nearest_cosine": "Nearest cosine",
    "recovered": "Recovered",
    "unembedding": "Unembedding",
    "norm": "Norm",
    "gamma": "γ",
    "interval": "Intervals",
    "sipit": "SipIt",
}


def page(profile: Profile) -> StudyPage:
    corpus = profile["corpus"]
    return StudyPage(
        title="Layer profile",
        subject=f"How far the residual stream of {named_model(profile)} is from the embeddings of its tokens, layer by "
        f"layer, on {n.count(corpus['tokens'])} tokens of {corpus['name']}.",
        summary=sentences(profile),
        sections=[section(profile, "By layer"), _definitions(profile)],
        facts=provenance(profile),
    )


def sentences(profile: Profile) -> list[str]:
    """What the profile says: the course of the cosine, the share recovered, and the phases with their control."""
    layers = profile["layers"]
    found = [_course(layers)]
    recovered = layers["recovered"]
    if any(value is not None for value in recovered):
        found.append(
            f"Of {n.count(profile['nearest_tokens'])} drawn tokens, {_at(layers, 'recovered', 0, n.percent)} have "
            f"their own embedding nearest of the vocabulary in {_place(layers, 0)}, and "
            f"{_at(layers, 'recovered', -1, n.percent)} after {_place(layers, -1)}."
        )
    return [*found, phases_sentence(profile["phases"])]


def section(profile: Profile, name: str, prefix: str = "profile") -> Section:
    """Plots and table of a profile, for its own page or another's."""
    return Section(
        name,
        text=_phase_words(profile["phases"]),
        panels=panels(profile, prefix),
        tables=[_table(profile["layers"])],
    )


def panels(profile: Profile, prefix: str = "profile") -> list[Panel]:
    layers = profile["layers"]
    gamma = [value for value in layers["gamma"] if value is not None]
    lines = "the line through all layers" if profile["phases"]["too_few_layers"] else "the phases’ lines"
    shaded = "; every other phase is shaded" if len(profile["phases"]["phases"]) > 1 else ""
    caption = f"{phases_sentence(profile['phases'])} Dotted: {lines}{shaded}."
    norms = (
        f"The mean norm is {n.real(layers['norm_mean'][0])} in {_place(layers, 0)} and "
        f"{n.real(layers['norm_mean'][-1])} after {_place(layers, -1)}."
    )
    spread = "γ is not defined." if not gamma else f"γ lies between {n.real(min(gamma))} and {n.real(max(gamma))}."
    return [
        Panel(f"{prefix}-cosine", "How near the residual is to its token", caption, _nearness(profile)),
        Panel(f"{prefix}-norm", "Norm of the residual", norms, _norms(layers)),
        Panel(
            f"{prefix}-gamma",
            "γ, the mean’s size",
            f"{spread} It is the norm of the mean residual over that of the standard deviations by dimension.",
            _gamma(layers),
        ),
    ]


def phases_sentence(phases: Mapping[str, Any]) -> str:
    """How many phases, where they begin, with what support; and what is found in shuffled layers."""
    points, control = phases["change_points"], phases["control"]
    if phases["too_few_layers"]:
        return (
            f"The curve over layers was not searched for change points: that takes "
            f"{n.count(phases['too_few_layers'])} layers, and it has {n.count(phases['phases'][-1]['last'] + 1)}."
        )
    if points:
        starts = [f"layer {point['layer']} ({_support(point)})" for point in points]
        said = (
            f"The curve over layers falls into {len(phases['phases'])} straight lines, new ones from {w.listed(starts)}"
        )
    else:
        said = "The curve over layers is one phase, without a change point"
    if control["share_with_any"] is None:
        return f"{said}; no control with shuffled layers was run."
    return (
        f"{said}; with its layers shuffled, {n.percent(control['share_with_any'])} of "
        f"{n.count(control['shuffles'])} curves have any."
    )


def _support(point: Mapping[str, Any]) -> str:
    if point["support"] is None:
        return "support not defined"
    return f"in {n.percent(point['support'])} of resamples of the documents"


def _phase_words(phases: Mapping[str, Any]) -> list[str]:
    if phases["too_few_layers"]:
        [line] = phases["phases"]
        return [f"The straight line through all layers has a slope of {n.signed(line['slope'], n.real)} a layer."]
    lines = [
        f"layers {p['first']} to {p['last']}, from {n.fixed3(p['start'])} to {n.fixed3(p['end'])} "
        f"({n.signed(p['slope'], n.real)} a layer)"
        for p in phases["phases"]
    ]
    return [
        f"Cosine by phase: {'; '.join(lines)}. The residuals’ root mean square is {n.real(phases['rms'])}.",
        f"{phases['definition']} A bend is taken for several lines: phases describe a curve, and are not parts of a "
        "model.",
    ]


def _course(layers: Mapping[str, Any]) -> str:
    low = min(range(len(layers["cosine"])), key=lambda i: layers["cosine"][i])
    return (
        f"The cosine of the residual and its own token’s embedding is {_at(layers, 'cosine', 0)} in "
        f"{_place(layers, 0)} and {_at(layers, 'cosine', -1)} after {_place(layers, -1)}; it is lowest at "
        f"{_place(layers, low)}, {n.fixed3(layers['cosine'][low])}."
    )


def _place(layers: Mapping[str, Any], at: int) -> str:
    layer = layers["layer"][at]
    return "what enters layer 0" if layer is None else f"layer {layer}"


def _at(layers: Mapping[str, Any], key: str, at: int, write: w.Write = n.fixed3) -> str:
    intervals = layers.get(f"{key}_interval")
    return w.with_interval(layers[key][at], intervals[at] if intervals else None, write)


def _nearness(profile: Profile) -> Figure:
    layers, phases = profile["layers"], profile["phases"]
    x, axis = plots.layer_axis(layers["layer"])
    shown = [
        Curve("cosine, own token", layers["cosine"], layers.get("cosine_interval"), "after", markers=True),
        Curve("nearest token", layers["nearest_cosine"], layers.get("nearest_cosine_interval"), "before", "5px,3px"),
        Curve("recovered", layers["recovered"], layers.get("recovered_interval"), "muted", "2px,2px", n.percent),
    ]
    shown = [curve for curve in shown if any(value is not None for value in curve.y)]
    shapes = [
        plots.shade(p["first"] - 0.5, p["last"] + 0.5)
        for i, p in enumerate(phases["phases"])
        if i % 2 == 1 and len(phases["phases"]) > 1
    ]
    shapes += [plots.vertical(point["layer"] - 0.5) for point in phases["change_points"]]
    shapes += [
        {
            "type": "line",
            "x0": p["first"],
            "x1": p["last"],
            "y0": p["start"],
            "y1": p["end"],
            "line": {"color": "$ink", "width": 1.2, "dash": "dot"},
        }
        for p in phases["phases"]
    ]
    notes = [
        plots.note(point["layer"] - 0.4, "" if point["support"] is None else f"{100 * point['support']:.0f}{n.NBSP}%")
        for point in phases["change_points"]
    ]
    return plots.curves(
        x,
        shown,
        [_place(layers, i) for i in range(len(x))],
        xaxis=axis,
        yaxis={"title": title("cosine, share")},
        shapes=shapes,
        annotations=notes,
        height=374,
    )


def _norms(layers: Mapping[str, Any]) -> Figure:
    x, axis = plots.layer_axis(layers["layer"])
    known = [v for key in ("norm_mean", "norm_median") for v in layers[key] if v]
    is_wide = bool(known) and max(known) > 30 * min(known)
    shown = [
        Curve("mean", layers["norm_mean"], colour="after", write=n.real),
        Curve("median", layers["norm_median"], colour="before", dash="5px,3px", write=n.real),
    ]
    shown = [curve for curve in shown if any(value is not None for value in curve.y)]
    y: Figure = {"type": "log", "dtick": 1} if is_wide else {"rangemode": "tozero"}
    name = "norm, log scale" if is_wide else "norm"
    return plots.curves(x, shown, _says(layers), xaxis=axis, yaxis=y | {"title": title(name)})


def _gamma(layers: Mapping[str, Any]) -> Figure:
    x, axis = plots.layer_axis(layers["layer"])
    y: Figure = {"title": title("γ"), "rangemode": "tozero"}
    return plots.curves(x, [Curve("γ", layers["gamma"], write=n.real)], _says(layers), xaxis=axis, yaxis=y)


def _says(layers: Mapping[str, Any]) -> Sequence[str]:
    return [_place(layers, i) for i in range(len(layers["layer"]))]


def _table(layers: Mapping[str, Any]) -> Table:
    columns = [q for q in _QUANTITIES if any(value is not None for value in layers[q[1]])]
    rows: list[w.Row] = []
    for at, layer in enumerate(layers["layer"]):
        cells = []
        for _, key, write in columns:
            intervals = layers.get(f"{key}_interval")
            cells.append(w.cell(layers[key][at], write, intervals[at] if intervals else None))
        rows.append(("in" if layer is None else str(layer), cells))
    caption = "“in” is what enters the first layer; other rows are what leaves each."
    return w.table("Figures by layer", caption, ["Layer", *(name for name, _, _ in columns)], rows)


def _definitions(profile: Profile) -> Section:
    known = profile["definitions"]
    words = [f"{said}: {known[key]}" for key, said in _DEFINED.items() if key in known]
    tied = {True: "The unembedding is tied to the embedding.", False: "The unembedding is not tied to the embedding."}
    return Section(
        "What is computed", [*words, tied.get(profile["tied"], "The model has no unembedding that was found.")]
    )
