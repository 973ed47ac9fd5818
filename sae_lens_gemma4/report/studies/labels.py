"""The page of labels: whether they hold on text they were not made from, against what labels of other latents do there.

No figure stands without its floor: a share confirmed beside that of dealt labels, a probe's accuracy beside that with
shuffled labels, a score beside what became of labels with such a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.studies import label_scores as scores
from sae_lens_gemma4.report.studies import label_tests as tests
from sae_lens_gemma4.report.studies import profile
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.studies.label_cards import SHOWN, label_cards
from sae_lens_gemma4.report.study import Section, StudyPage, named_model, provenance
from sae_lens_gemma4.report.words import sae_name

Document = Mapping[str, Any]


def page(document: Document) -> StudyPage:
    labels, sae = document["labels"], document["sae"]
    return StudyPage(
        title="Labels of latents, tested",
        subject=f"{w.whole(labels['asked'], 'latent')} of {sae_name(sae)} at {sae['hook_name']} of "
        f"{named_model(document)}, on {document['corpus']['name']}; labels by {w.listed(labels['judges'])}.",
        summary=_summary(document),
        sections=[
            tests.held_out(document["verification"], _made(document), document.get("origin")),
            *tests.agreement(document["agreement"]),
            *scores.probes(document["probes"]),
            *scores.confidence(document["confidence"], document["calibration"], _further(document)),
            *([] if document["profile"] is None else [_profile(document["profile"])]),
            _chosen(document),
            *_cards(document["shown"], labels["asked"], _made(document)),
            _judges(document["judges"]),
        ],
        facts=[*provenance(document), *_files(document["files"])],
    )


def _summary(document: Document) -> list[str]:
    verification, agreement = document["verification"], document["agreement"]
    found = [tests.confirmed(judge) for judge in verification["judges"].values()]
    if agreement is None:
        found.append("There is one label a latent at most: no agreement can be measured.")
    else:
        found.append(tests.agreed(agreement))
    found.append(scores.probe_sentence(document["probes"]))
    found.append(scores.confidence_sentence(document["confidence"]))
    found.append(scores.calibration_sentence(document["calibration"], _further(document)))
    return [*found, _left_out(document)]


def _made(document: Document) -> bool:
    """Whether the labels were made here; of others' labels, `origin` is a sentence that says what is known of them."""
    return bool(document.get("origin", "made") == "made")


def _chosen_by_text(document: Document) -> bool:
    return document["selection"]["rule"] not in ("given", "labelled")


def _further(document: Document) -> str:
    """What the calibration contexts are."""
    unseen = "neither labels nor scores were" if _made(document) else "no score was"
    but = ", though latents were chosen on the whole text" if _chosen_by_text(document) else ""
    return f"contexts from which {unseen} made{but}"


def _left_out(document: Document) -> str:
    labels, verification = document["labels"], document["verification"]
    said = [f"{w.whole(labels['asked'], 'latent')} were {_asked(document)}, {n.count(len(labels['skipped']))} left out"]
    for name, tested in verification["judges"].items():
        missing = labels["unanswered"].get(name, 0)
        said.append(
            f"by {name}: {w.whole(missing, 'label')} not given, {n.count(len(tested['untestable']))} that could not be "
            f"tested, {w.whole(len(tested['unanswered']), 'test')} not answered"
        )
    return f"{'; '.join(said)}."


def _asked(document: Document) -> str:
    return "put to the judges" if _made(document) else "taken with the labels that they have"


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
        "Each document is in one part only: "
        + ("labels are made from the labelling part, " if _made(document) else "")
        + "tests and agreement are of the held-out part, probes of labelling and held-out parts, what a score means of "
        "the calibration part" + ("; latents were chosen on all of them." if _chosen_by_text(document) else ".")
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


def _cards(shown: Sequence[Mapping[str, Any]], asked: int, made: bool) -> list[Section]:
    if not shown:
        return []
    cards = label_cards(shown)
    words = (
        f"Of {w.whole(asked, 'latent')} with labels, the first {n.count(len(shown))} by index. The examples are "
        + ("those that its label was made from" if made else "contexts of this text")
        + "; the token with the largest activation is outlined. Point at a token or tap it "
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
