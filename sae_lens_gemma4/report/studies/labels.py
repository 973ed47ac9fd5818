"""The page of labels: whether they hold on text they were not made from, against what labels of other latents do there.

No figure stands without its floor: a share confirmed beside that of dealt labels, a probe's accuracy beside that with
shuffled labels, a score beside what became of labels with such a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import Figure, figure, title
from sae_lens_gemma4.report.studies import label_scores as scores
from sae_lens_gemma4.report.studies import plots, profile
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.studies.label_cards import SHOWN, label_cards
from sae_lens_gemma4.report.studies.plots import Dot
from sae_lens_gemma4.report.study import Panel, Section, StudyPage, named_model, provenance
from sae_lens_gemma4.report.tables import Table
from sae_lens_gemma4.report.words import sae_name

Document = Mapping[str, Any]
FLOOR = "labels dealt to other latents"
_BINS = 10


def page(document: Document) -> StudyPage:
    labels, sae = document["labels"], document["sae"]
    return StudyPage(
        title="Labels of latents, tested",
        subject=f"{w.whole(labels['asked'], 'latent')} of {sae_name(sae)} at {sae['hook_name']} of "
        f"{named_model(document)}, on {document['corpus']['name']}; labels by {w.listed(labels['judges'])}.",
        summary=_summary(document),
        sections=[
            _held_out(document["verification"]),
            *_agreement(document["agreement"]),
            *scores.probes(document["probes"]),
            *scores.confidence(document["confidence"], document["calibration"]),
            *([] if document["profile"] is None else [_profile(document["profile"])]),
            _chosen(document),
            *_cards(document["shown"], labels["asked"]),
            _judges(document["judges"]),
        ],
        facts=[*provenance(document), *_files(document["files"])],
    )


def _summary(document: Document) -> list[str]:
    verification, agreement = document["verification"], document["agreement"]
    found = [_confirmed(judge) for judge in verification["judges"].values()]
    if agreement is None:
        found.append("There is one judge’s label a latent at most: no agreement can be measured.")
    else:
        found.append(_agreed(agreement))
    found.append(scores.probe_sentence(document["probes"]))
    found.append(scores.calibration_sentence(document["calibration"]))
    return [*found, _left_out(document)]


def _confirmed(judge: Mapping[str, Any]) -> str:
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


def _agreed(agreement: Mapping[str, Any]) -> str:
    return (
        f"On the same held-out contexts the two judges’ labels of a latent agree with κ = "
        f"{w.mean(agreement['kappa'])}, against {w.mean(agreement['floor_kappa'])} with the label of another latent; "
        f"of their words they share {w.mean(agreement['words'])} (Jaccard), against {w.mean(agreement['floor_words'])}."
    )


def _left_out(document: Document) -> str:
    labels, verification = document["labels"], document["verification"]
    said = [f"{w.whole(labels['asked'], 'latent')} were put to the judges, {n.count(len(labels['skipped']))} left out"]
    for name, tested in verification["judges"].items():
        missing = labels["unanswered"].get(name, 0)
        said.append(
            f"by {name}: {w.whole(missing, 'label')} not given, {n.count(len(tested['untestable']))} that could not be "
            f"tested, {w.whole(len(tested['unanswered']), 'test')} not answered"
        )
    return f"{'; '.join(said)}."


def _held_out(verification: Mapping[str, Any]) -> Section:
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
    settings = verification["settings"]
    scorer = "by the other judge" if settings["scorer"] == "other" else "by the judge who gave it"
    return Section(
        "Held-out contexts",
        text=[
            f"A label is shown with contexts of documents that it was not made from, without activations, and asked of "
            f"each whether it applies, {scorer}. {verification['rule'][:1].upper()}{verification['rule'][1:]}. "
            "Negatives are near-misses and random contexts in which the latent is silent.",
            "The floor is the same test with the label of another latent: what it confirms is what a test confirms "
            "whatever the label says.",
        ],
        panels=[*panels, *f1],
        tables=[_judge_table(judges), *_untested(judges)],
    )


def _judge_table(judges: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[w.Row] = []
    for judge in judges:
        for part, name in ((judge, judge["judge"]), (judge["floor"], f"{judge['judge']}: {FLOOR}")):
            if part is not None:
                own = part is judge
                rows.append(
                    (
                        name,
                        [
                            w.share_cell(part["confirmed"]),
                            w.mean_cell(part["f1"]),
                            w.mean_cell(judge["balanced_accuracy"]) if own else w.text_cell("–"),
                            w.mean_cell(judge["near_precision"]) if own else w.text_cell("–"),
                        ],
                    )
                )
        if judge["floor"] is not None and judge["floor"]["change"] is not None:
            change = judge["floor"]["change"]
            gained = w.cell(change["change"], lambda v: n.signed(v, n.percent), (change["low"], change["high"]))
            cells = [gained, w.mean_cell(judge["floor"]["f1_difference"]), w.text_cell("–"), w.text_cell("–")]
            rows.append((f"difference, McNemar’s {w.p_value(change['p_value'])}", cells))
    caption = (
        "Intervals of shares are Wilson’s, of means BCa bootstrap over latents. Precision against near-misses has "
        "these as the only negatives."
    )
    heads = ["Labels", "Confirmed", "F1", "Balanced accuracy", "Precision against near-misses"]
    return w.table("Labels by judge, and their floors", caption, heads, rows)


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


def _agreement(agreement: Mapping[str, Any] | None) -> list[Section]:
    if agreement is None:
        return []
    rows = [
        (
            name,
            [
                w.mean_cell(agreement[key]),
                w.mean_cell(agreement[f"floor_{key}"]),
                w.mean_cell(agreement[f"{key}_difference"]),
            ],
        )
        for name, key in (("Cohen’s κ of where they apply", "kappa"), ("Words in common, Jaccard", "words"))
    ]
    caption = (
        f"Floor: {agreement['definitions']['floor']}. Of {w.whole(len(agreement['pairs']), 'pair')} of labels, "
        f"{n.count(agreement['constant'])} have one that applies to all contexts or to none, which counts as κ = 0."
    )
    made = w.table("Agreement of the judges", caption, ["Agreement", "Same latent", "Floor", "Difference"], rows)
    return [Section("Agreement", text=[_agreed(agreement)], tables=[made])]


def _profile(found: Mapping[str, Any]) -> Section:
    made = profile.section(found, "Layer profile, on the first blocks of the text")
    return made._replace(text=[*profile.sentences(found), *made.text])


def _chosen(document: Document) -> Section:
    selection, examples, corpus = document["selection"], document["examples"], document["corpus"]
    facts = selection["facts"]
    words = [f"Latents were chosen by the rule “{selection['rule']}”: {n.count(len(selection['indices']))} of them."]
    if facts.get("left"):
        left = [f"{name.replace('_', ' ')} {n.count(count)}" for name, count in facts["left"].items()]
        words.append(f"Left at each step of the rule: {w.listed(left)}.")
    settings = facts.get("settings") or {key: value for key, value in facts.items() if key in ("labelled", "seed")}
    if settings:
        words.append(f"Settings: {w.settings(settings)}.")
    words.append(
        "Each document is in one part only: labels are made from one, tests, agreement and probes are of another, and "
        "what a score means of a third."
    )
    rows = [
        (
            name.replace("_", " "),
            [w.cell(examples["documents"][name], n.count), w.cell(examples["tokens"][name], n.count)],
        )
        for name in examples["documents"]
    ]
    title = f"Parts of {corpus['name']}"
    taken = w.table(title, f"Split by seed {examples['settings']['seed']}.", ["Part", "Documents", "Tokens"], rows)
    left_out = document["labels"]["skipped"]
    if left_out:
        words.append(f"Latents without a label: {w.reasons(map(str, left_out.values()))}.")
    return Section("Selection and text", text=words, tables=[taken])


def _cards(shown: Sequence[Mapping[str, Any]], asked: int) -> list[Section]:
    if not shown:
        return []
    cards = label_cards(shown)
    words = (
        f"Of {w.whole(asked, 'latent')} with labels, the first {n.count(len(shown))} by index. The examples are those "
        "that its label was made from; the token with the largest activation is outlined. Point at a token or tap it "
        "for its activation."
    )
    return [Section("Latents", text=[words], cards=cards[:SHOWN], more_cards=cards[SHOWN:])]


def _judges(judges: Sequence[Mapping[str, Any]]) -> Section:
    columns = (
        ("Kind", "kind", str),
        ("Model", "model", str),
        ("Questions", "questions", n.count),
        ("From the cache", "cached", n.count),
        ("Not answered", "unanswered", n.count),
        ("Calls", "calls", n.count),
        ("Tokens read", "input_tokens", n.count),
        ("Tokens written", "output_tokens", n.count),
        ("USD", "usd", lambda v: n.fixed(v, 4)),
    )
    known = [c for c in columns if any(judge.get(c[1]) is not None for judge in judges)]
    rows = [
        (
            str(judge["name"]),
            [w.text_cell("–" if judge.get(key) is None else write(judge[key])) for _, key, write in known],
        )
        for judge in judges
    ]
    made = w.table("Judges", "What each was asked in this run.", ["Judge", *(c[0] for c in known)], rows)
    return Section("Judges", tables=[made])


def _files(files: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [] if not files else [("Files", ", ".join(str(file) for file in files.values()))]
