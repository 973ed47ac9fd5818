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
from sae_lens_gemma4.report.tables import Table

_READOUTS = {
    "probe": "probe",
    "hard": "probe, near-misses alone",
    "shuffled": "shuffled labels",
    "length": "length alone",
    "majority": "larger class always",
}
_COMPONENTS = {
    "agreement": "agreement of the judges",
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
        cells.append(w.mean_cell(difference, _signed_percent) if difference else w.text_cell("–"))
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


def _signed_percent(value: float | None) -> str:
    return n.signed(value, n.percent)


def calibration_sentence(calibration: Found | None) -> str:
    """The mean score, what became of the labels, and how far the one is from the other."""
    if calibration is None or "none" in calibration:
        reason = (calibration or {}).get("none") or "it was not asked for"
        return f"What a confidence means was not measured: {reason.rstrip('.')}."
    score = calibration["score"]
    return (
        f"The mean confidence is {n.fixed3(score['mean_score'])}, while of these labels {w.share(score['confirmed'])} "
        f"are confirmed on contexts that neither labels nor scores have seen; the expected calibration error is "
        f"{n.fixed3(score['error'])}, the rank correlation of confidence and F1 there is {_rank(score)}."
    )


def _rank(found: Found) -> str:
    if found["rank"] is None:
        return f"not defined ({found['no_rank']})"
    return f"{n.fixed3(found['rank']['rho'])} (Spearman, {w.p_value(found['rank']['p_value'])})"


def confidence(scores: Found, calibration: Found | None) -> list[Section]:
    weights = scores["weights"]
    parts = [f"{n.percent(weights[name])} {said} ({scores['definitions'][name]})" for name, said in _COMPONENTS.items()]
    tiers = [f"{n.count(count)} {tier}" for tier, count in scores["tiers"].items()]
    missing = [one["reason"] for one in scores["scores"].values() if one["score"] is None and one["reason"]]
    words = [f"The confidence is {w.listed(parts)}.", f"Labels by confidence: {w.listed(tiers)}."]
    if missing:
        words.append(f"Labels without one, and why: {w.reasons(missing)}.")
    if calibration is None or "none" in calibration:
        return [Section("Confidence", text=[*words, calibration_sentence(calibration)])]
    score = calibration["score"]
    words.append(calibration_sentence(calibration))
    if calibration["left_out"]:
        words.append(f"{w.whole(calibration['left_out'], 'label')} had no score or no test there.")
    caption = (
        "Each point is a bin of scores: the share of its labels confirmed on further contexts, with Wilson’s interval. "
        "On the dotted line a confidence of .8 would mean that 80 % hold. "
        + " ".join(
            f"From {b['low']:g} to {b['high']:g}: {w.share(b['confirmed'])}."
            for b in score["bins"]
            if b["confirmed"]["n"]
        )
    )
    panel = Panel("calibration", "What a confidence means", caption, _calibration(score["bins"]))
    return [Section("Confidence", words, [panel], [_bins(score["bins"]), _components(calibration)])]


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
                w.cell(part["error"], n.fixed3),
                w.text_cell(_rank_cell(part)),
                w.cell(part["n"], n.count),
            ],
        )
        for name, part in parts
    ]
    caption = (
        "Each alone against the same confirmations. A component whose rank correlation with F1 on further contexts is "
        "near 0 adds nothing but a number, whatever its weight."
    )
    heads = ["Component", "Mean", "Calibration error", "Rank correlation with F1", "Labels"]
    return w.table("The confidence and its components", caption, heads, rows)


def _rank_cell(part: Found) -> str:
    if part["rank"] is None:
        return f"none: {part['no_rank']}"
    return f"{n.fixed3(part['rank']['rho'])}, {w.p_value(part['rank']['p_value'])}"


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
