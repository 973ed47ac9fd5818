"""What probes and scores say of labels, with what they do not say beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import Figure, figure, title
from sae_lens_gemma4.report.studies import plots
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.studies.plots import Dot
from sae_lens_gemma4.report.study import Panel, Section
from sae_lens_gemma4.report.tables import Cell, Table

_READOUTS = {
    "probe": "probe",
    "hard": "probe, near-misses alone",
    "shuffled": "shuffled labels",
    "length": "length alone",
    "majority": "larger class always",
}
_COMPONENTS = {
    "agreement": "agreement of the labels",
    "held_out": "F1 on held-out contexts",
    "probe": "probe accuracy",
    "health": "health of the activations",
}
_SAYS_LITTLE = (
    "An accuracy near 1 says little of a label: a latent is itself a threshold on a linear readout of these "
    "activations. Adam Kruger’s dataset card states a probe accuracy of 99.3 % beside labels of which 35.8 % were "
    "confirmed."
)
Found = Mapping[str, Any]


def probe_sentence(probes: Found | None) -> str:
    """Accuracy and its controls in one sentence."""
    if probes is None:
        return "No linear probes were run."
    if "skipped_all" in probes:
        return f"No linear probes were run: {probes['skipped_all']}"
    means = probes["means"]
    if not means.get("probe"):
        return f"No linear probe could be fitted: {w.reasons(map(str, probes['skipped'].values())) or 'no latent'}."
    return (
        f"Linear probes are right about {_accuracy(means, 'probe')} of contexts, against "
        f"{_accuracy(means, 'shuffled')} with shuffled labels and {_accuracy(means, 'length')} by length alone. "
        f"{_SAYS_LITTLE}"
    )


def _accuracy(means: Found, name: str) -> str:
    return w.mean((means.get(name) or {}).get("accuracy"), n.percent)


def probes(found: Found | None) -> list[Section]:
    if found is None:
        return []
    if "skipped_all" in found or not found["means"].get("probe"):
        return [Section("Linear probes", text=[probe_sentence(found)])]
    means, differences = found["means"], found["differences"]
    known = [name for name in _READOUTS if means.get(name)]
    shown = []
    for name in known:
        accuracy = means[name]["accuracy"]
        says = f"{_READOUTS[name]}: {w.mean(accuracy, n.percent)}"
        is_control = name not in ("probe", "hard")
        shown.append(Dot(_READOUTS[name], accuracy["value"], w.bounds(accuracy), says, is_control))
    rows = []
    for name in known:
        cells = [w.mean_cell(means[name][key], n.percent) for key in ("accuracy", "balanced_accuracy")]
        cells.append(w.mean_cell(means[name]["auroc"]))
        difference = (differences.get(name) or {}).get("accuracy")
        cells.append(w.mean_cell(difference, signed_percent) if difference else w.text_cell("–"))
        rows.append((_READOUTS[name], cells))
    settings = found["settings"]
    caption = (
        f"Means over {n.count(len(found['probes']))} latents, {n.count(settings['folds'])} folds split by document; "
        "difference: the probe’s accuracy less this one’s, over the same latents."
    )
    heads = ["Readout", "Accuracy", "Balanced accuracy", "AUROC", "Difference"]
    words = [f"{found['note']} {_SAYS_LITTLE}"]
    if found["skipped"]:
        words.append(f"Latents without a probe: {w.reasons(map(str, found['skipped'].values()))}.")
    caption_of_plot = " ".join(f"{_READOUTS[name].capitalize()}: {_accuracy(means, name)}." for name in known)
    axis = plots.share_axis("contexts told apart")
    panel = Panel("probes", "Probe accuracy and its controls", caption_of_plot, plots.dots(shown, xaxis=axis))
    return [Section("Linear probes", words, [panel], [w.table("Linear probes", caption, heads, rows)])]


def signed_percent(value: float | None) -> str:
    return n.signed(value, n.percent)


def confidence_sentence(scores: Found) -> str:
    """The mean score, beside that of dealt labels."""
    if not (mean := scores["mean"])["n"]:
        reasons = w.reasons(str(one["reason"]) for one in scores["scores"].values())
        return f"No label has a confidence ({reasons or 'there is no label'})."
    said = f"The mean confidence of {w.whole(mean['n'], 'label')} is {w.mean(mean)}"
    if (floor := scores["floor"]) is None:
        return f"{said}; there is no floor to hold that against."
    own = "" if floor["own"]["n"] == mean["n"] else f", where their own have {w.mean(floor['own'])}"
    latents = w.whole(floor["mean"]["n"], "latent")
    return (
        f"{said}, against {w.mean(floor['mean'])} of labels dealt to other latents (on {latents}{own}; probe and "
        f"health are the latent’s whatever its label says), of which {_tiers(floor['tiers'])} confidence."
    )


def calibration_sentence(calibration: Found | None, contexts: str) -> str:
    """What became of labels with a score on further `contexts`, and how far the score is from a share."""
    if calibration is None or "none" in calibration:
        reason = (calibration or {}).get("none") or "it was not asked for"
        return f"What a confidence means was not measured: {reason.rstrip('.')}."
    score = calibration["score"]
    return (
        f"Of {w.whole(score['n'], 'label')} with a mean confidence of {n.fixed3(score['mean_score'])}, "
        f"{w.share(score['confirmed'])} are confirmed on {contexts}; the expected calibration error is "
        f"{_error(score)}, AUROC {n.fixed3(score['auroc'])}, the rank correlation of confidence and F1 there "
        f"{_rank(score)}."
    )


def _tiers(tiers: Found) -> str:
    return w.listed(
        [f"{n.count(count)} {'have' if i == 0 else 'a'} {tier}" for i, (tier, count) in enumerate(tiers.items())]
    )


def _error(found: Found) -> str:
    return w.mean({"value": found["error"], "low": found["error_low"], "high": found["error_high"]})


def _rank(found: Found) -> str:
    rank = found["rank"]
    if rank is None:
        return f"not defined ({found['no_rank']})"
    return f"{w.mean(rank | {'value': rank['rho']})} (Spearman, {w.p_value(rank['p_value'])})"


def confidence(scores: Found, calibration: Found | None, contexts: str) -> list[Section]:
    weights = scores["weights"]
    parts = [
        f"{n.percent(weights[name])} {said} ({scores['definitions'][name]})"
        for name, said in _COMPONENTS.items()
        if weights[name]
    ]
    missing = [one["reason"] for one in scores["scores"].values() if one["score"] is None and one["reason"]]
    words = [f"The confidence is {w.listed(parts)}. It is no probability.", confidence_sentence(scores)]
    if missing:
        words.append(f"Labels without one, and why: {w.reasons(missing)}.")
    words.append(calibration_sentence(calibration, contexts))
    tiers = _tier_table(scores)
    if calibration is None or "none" in calibration:
        return [Section("Confidence", text=words, tables=[tiers])]
    score = calibration["score"]
    if calibration["left_out"]:
        words.append(f"{w.whole(calibration['left_out'], 'label')} had no score or no test there.")
    caption = (
        "Each point is a bin of scores: the share of its labels confirmed on further contexts, with Wilson’s interval. "
        "On the dotted line the share confirmed is the score. "
        + " ".join(
            f"From {b['low']:g} to {b['high']:g}: {w.share(b['confirmed'])}."
            for b in score["bins"]
            if b["confirmed"]["n"]
        )
    )
    panel = Panel("calibration", "What a confidence means", caption, _calibration(score["bins"]))
    return [Section("Confidence", words, [panel], [tiers, _bins(score["bins"]), _components(calibration)])]


def _tier_table(scores: Found) -> Table:
    floor = scores["floor"]
    rows: list[w.Row] = [("labels", [w.mean_cell(scores["mean"]), *_tier_cells(scores["tiers"])])]
    if floor is not None:
        rows.append(("dealt labels", [w.mean_cell(floor["mean"]), *_tier_cells(floor["tiers"])]))
        rows.append(("difference, paired", [w.mean_cell(floor["difference"]), *[w.text_cell("–")] * 4]))
    heads = ["Labels", "Mean confidence", "High", "Medium", "Low", "None"]
    return w.table("Labels by confidence", "High from .8, medium from .5.", heads, rows)


def _tier_cells(tiers: Found) -> list[Cell]:
    return [w.cell(tiers.get(tier, 0), n.count) for tier in ("high", "medium", "low", "none")]


def _bins(bins: Sequence[Found]) -> Table:
    rows = [
        (f"{b['low']:g} to {b['high']:g}", [w.cell(b["mean_score"], n.fixed3), w.share_cell(b["confirmed"])])
        for b in bins
    ]
    return w.table("Confidence and confirmation", "", ["Confidence", "Mean confidence", "Confirmed"], rows)


def _components(calibration: Found) -> Table:
    parts = [("confidence", calibration["score"])]
    parts += [
        (_COMPONENTS[name], calibration["components"][name])
        for name in _COMPONENTS
        if name in calibration["components"]
    ]
    rows = [
        (
            name,
            [
                w.cell(part["mean_score"], n.fixed3),
                w.cell(part["error"], n.fixed3, w.bounds({"low": part["error_low"], "high": part["error_high"]})),
                w.cell(part["brier"], n.fixed3),
                w.cell(part["auroc"], n.fixed3),
                *_rank_cells(part),
                w.cell(part["n"], n.count),
            ],
        )
        for name, part in parts
    ]
    caption = (
        "Each alone against the same confirmations. A component whose rank correlation with F1 on further contexts is "
        "near 0 adds nothing but a number, whatever its weight. Intervals are bootstrap over labels; p-values of "
        "components are corrected by Holm’s method. Brier score: the mean square of score less confirmed (1 or 0); of "
        f"the share confirmed, said of every label, it is {n.fixed3(calibration['score']['brier_constant'])}. AUROC: "
        "how often the confirmed one of two labels has the larger score."
    )
    heads = [
        "Component",
        "Mean",
        "Calibration error",
        "Brier score",
        "AUROC",
        "Rank correlation with F1",
        "p",
        "Labels",
    ]
    return w.table("The confidence and its components", caption, heads, rows)


def _rank_cells(part: Found) -> list[Cell]:
    rank = part["rank"]
    if rank is None:
        return [w.text_cell(f"none: {part['no_rank']}"), w.text_cell("–")]
    return [w.cell(rank["rho"], n.fixed3, w.bounds(rank)), w.cell(rank["p_value"], n.real)]


def _calibration(bins: Sequence[Found]) -> Figure:
    known = [b for b in bins if b["confirmed"]["n"]]
    shares = [b["confirmed"] for b in known]
    diagonal: Figure = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "$muted", "width": 1.2, "dash": "2px,3px"},
        "hoverinfo": "skip",
    }
    points: Figure = {
        "type": "scatter",
        "mode": "lines+markers+text",
        "x": [b["mean_score"] for b in known],
        "y": [s["value"] for s in shares],
        "line": {"color": "$after", "width": 1},
        "marker": {"size": 9, "color": "$after"},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [s["high"] - s["value"] for s in shares],
            "arrayminus": [s["value"] - s["low"] for s in shares],
            "color": "$after",
            "thickness": 1.5,
            "width": 4,
        },
        "text": [f"{n.NBSP}{n.NBSP}{n.count(s['n'])}" for s in shares],
        "textposition": "bottom right",
        "textfont": {"size": 11, "color": "$muted"},
        "customdata": [f"from {b['low']:g} to {b['high']:g}: {w.share(b['confirmed'])}" for b in known],
        "hovertemplate": "%{customdata}<extra></extra>",
        "cliponaxis": False,
    }
    axis = plots.share_axis("labels confirmed")
    return figure(
        [diagonal, points],
        x={"range": [-0.02, 1.06], "title": title("mean confidence (beside each point: labels)"), "zeroline": False},
        y=axis | {"zeroline": False},
        height=320,
    )
