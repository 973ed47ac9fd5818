"""The line from a text to tested labels, step by step, for the recipes of `studies/labels.py`.

Whatever is slow is kept in the output folder and not done again: the pass over the text, the profile, and the judges'
answers. The rest is computed anew each time, so that it is what the recipe says.

Shapes: `n` places of the corpus, `f` latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_lens_gemma4.catalogue.label_schemas import FeatureLabel
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.evaluation.result import versions
from sae_lens_gemma4.interp.examples import Examples, ExampleSettings, LatentExamples, example_of
from sae_lens_gemma4.interp.firings import read_facts, remove_firings
from sae_lens_gemma4.interp.judges.judge import Answer, Judge
from sae_lens_gemma4.interp.judges.questions import prompts
from sae_lens_gemma4.interp.labels.agreement import Agreement, agreement
from sae_lens_gemma4.interp.labels.calibration import calibrate
from sae_lens_gemma4.interp.labels.confidence import Confidence, confidences, feature_labels, scores_dict
from sae_lens_gemma4.interp.labels.labelling import Labelled, label_latents
from sae_lens_gemma4.interp.labels.probe_rows import probe_rows
from sae_lens_gemma4.interp.labels.probes import Probing, probe_latents
from sae_lens_gemma4.interp.labels.verification import Verification, scorers_of, verify_labels
from sae_lens_gemma4.interp.means import plain
from sae_lens_gemma4.interp.selection import select_latents
from sae_lens_gemma4.neuronpedia.job import DASHBOARDS, EXPORTS
from sae_lens_gemma4.neuronpedia.planning import FIRINGS
from sae_lens_gemma4.studies.files import MADE, write_files
from sae_lens_gemma4.studies.labels import CATALOGUE, LabelStudy, LatentStudy, VerifyStudy, stated_labels
from sae_lens_gemma4.studies.reading import Reading, activations_of, contrast_scores, profiled, promoted, read_text

_SHOWN = 100
"""Latents whose contexts the result holds."""


def label(study: LabelStudy, folder: Path, *, progress: bool) -> dict[str, Any]:
    """Make labels and test them; errors as the steps raise."""
    judges = study.judges_in(folder, progress=progress)  # keys first
    reading = read_text(study, folder, progress=progress)
    profile, cosine_n = profiled(study, reading, folder, progress=progress)
    scores = None if study.contrast is None else contrast_scores(Path(study.contrast), reading.plan.hook_name)
    selected = select_latents(
        reading.firings, reading.plan.corpus, study.selection, cosine_by_place=cosine_n, scores=scores
    )
    examples = Examples(reading.firings, reading.plan.corpus, study.examples)
    latents = list(examples.of(selected.indices))
    labelled = label_latents(judges, latents, reading.tokenizer, promoted(reading, selected.indices, study.promoted))
    found = _tested(study, reading, scorers_of(judges, study.verification), labelled, latents)
    files = write_files(study, folder, reading.facts(), found)
    document = {
        "schema": 1,
        "kind": "latent_labels",
        **reading.facts(),
        "origin": "made",
        "profile": profile,
        "selection": selected.to_dict(),
        "examples": examples.facts(),
        **found.to_dict(),
        "judges": [judge.record() for judge in judges],
        "prompts": prompts(),
        "files": files,
        "versions": versions(),
    }
    _export(study, reading, folder, found.labels, progress=progress)
    _tidy(study, folder)
    return document


def verify(study: VerifyStudy, folder: Path, *, progress: bool) -> dict[str, Any]:
    """Test labels that are there; errors as the steps raise."""
    judges = study.judges_in(folder, progress=progress)
    stated = stated_labels(study)  # before the text, which is slow
    reading = read_text(study, folder, progress=progress)
    chosen = drawn(sorted(stated), study.n, study.seed)
    settings, origin = split_of(study, reading.plan.corpus.hash)
    examples = Examples(reading.firings, reading.plan.corpus, settings)
    latents = list(examples.of(examples.require(chosen)))
    labelled = as_labelled({index: stated[index] for index in chosen}, latents, reading.tokenizer)
    found = _tested(study, reading, judges * len(labelled.judges), labelled, latents)
    document = {
        "schema": 1,
        "kind": "latent_labels",
        **reading.facts(),
        "profile": None,
        "origin": origin,
        "selection": {"rule": "labelled", "indices": chosen, "facts": {"labelled": len(stated), "seed": study.seed}},
        "examples": examples.facts(),
        **found.to_dict(),
        "judges": [judge.record() for judge in judges],
        "prompts": prompts(),
        "files": None,
        "versions": versions(),
    }
    _tidy(study, folder)
    return document


@dataclass(frozen=True)
class Findings:
    """Labels and what they are worth."""

    labelled: Labelled
    verification: Verification
    agreed: Agreement | None
    probing: Probing | str | None
    scores: Mapping[int, Confidence]
    scores_record: Mapping[str, Any]
    calibration: Mapping[str, Any] | str
    labels: list[FeatureLabel]

    def to_dict(self) -> dict[str, Any]:
        probing = self.probing
        return {
            "labels": self.labelled.to_dict(),
            "verification": self.verification.to_dict(),
            "agreement": None if self.agreed is None else self.agreed.to_dict(),
            "probes": {"skipped_all": probing} if isinstance(probing, str) else probing and probing.to_dict(),
            "confidence": dict(self.scores_record),
            "calibration": self.calibration if isinstance(self.calibration, Mapping) else {"none": self.calibration},
            "shown": [plain(asdict(label)) for label in self.labels[:_SHOWN]],
        }


def _tested(
    study: LatentStudy,
    reading: Reading,
    scorers: Sequence[Judge],
    labelled: Labelled,
    latents: Sequence[LatentExamples],
) -> Findings:
    settings, sampling, tokenizer = study.verification, study.sampling, reading.tokenizer
    verification = verify_labels(labelled, scorers, latents, tokenizer, settings, sampling=sampling)
    agreed = agreement(verification, sampling) if len(verification.by_judge) > 1 else None
    probing = _probed(study, reading, [latent for latent in latents if latent.index in labelled.answers])
    activity = {latent.index: latent.activity for latent in latents}
    fitted = None if isinstance(probing, str) else probing
    scores = confidences(labelled, verification, agreed, fitted, activity, study.weights, study.health)
    calibration: Mapping[str, Any] | str = "it was not asked for"
    if study.calibration and all(one.score is None for one in scores.values()):
        calibration = "no label has a score"
    elif study.calibration:
        plainly = replace(settings, floor=False)
        try:
            further = verify_labels(labelled, scorers, latents, tokenizer, plainly, "calibration", sampling)
            calibration = calibrate(scores, further, sampling=sampling).to_dict()
        except DataError as e:
            calibration = str(e)
    labels = feature_labels(labelled, activity, verification, agreed, fitted, scores)
    record = scores_dict(scores, study.weights, study.health, sampling)
    return Findings(labelled, verification, agreed, probing, scores, record, calibration, labels)


def _probed(study: LatentStudy, reading: Reading, latents: Sequence[LatentExamples]) -> Probing | str | None:
    """The probes; why there are none, or None where none were asked for. What was labelled is not lost for it."""
    if study.probes is None:
        return None
    rows = probe_rows(latents, reading.plan.corpus)
    try:
        return probe_latents(rows, activations_of(reading.plan, rows), study.probes, study.sampling)
    except DataError as e:
        return str(e)


def split_of(study: VerifyStudy, corpus_hash: str) -> tuple[ExampleSettings, str]:
    """How documents are dealt out, and what is known of the text that the labels were made from.

    Labels that `interp label` made of this very text are tested on the documents that it kept apart.
    """
    made = Path(study.labels).parent / MADE
    if study.labels == CATALOGUE or not made.is_file():
        return study.examples, "Whether their makers saw this text is not known."
    facts = read_facts(made)
    if facts.get("corpus") != corpus_hash:
        return study.examples, "They were made from another text."
    names = [f.name for f in fields(ExampleSettings)]
    split = {name: facts["examples"][name] for name in ("labelling", "held_out", "calibration", "seed", "window")}
    kept = {name: getattr(study.examples, name) for name in names if name not in split}
    return ExampleSettings(**kept, **split), "They were made from other documents of this text, which are kept apart."


def as_labelled(stated: Mapping[int, Mapping[str, str]], latents: Sequence[LatentExamples], tokenizer: Any) -> Labelled:
    """Labels of others, as if judges had just given them."""
    sources = tuple(dict.fromkeys(who for said in stated.values() for who in said))
    answers, shown = {}, {}
    for latent in latents:
        said = stated[latent.index]
        answers[latent.index] = tuple(Answer(said[who], None) if who in said else None for who in sources)
        excerpts = [*latent.labelling.positives, *latent.held_out.positives]
        examples = [example_of(excerpt, tokenizer) for excerpt in excerpts]
        shown[latent.index] = tuple(sorted(examples, key=lambda example: -(example.activation or 0)))
    skipped = {index: "it does not fire on this text" for index in stated if index not in answers}
    return Labelled(judges=sources, answers=answers, skipped=skipped, shown=shown)


def drawn(indices: Sequence[int], n: int | None, seed: int) -> list[int]:
    """`n` of them by `seed`, ascending; all where there are no more."""
    if n is None or n >= len(indices):
        return list(indices)
    return sorted(np.random.default_rng(seed).choice(indices, n, replace=False).tolist())


def _export(
    study: LabelStudy, reading: Reading, folder: Path, labels: Sequence[FeatureLabel], *, progress: bool
) -> None:
    if study.listing is None:
        return
    from sae_lens_gemma4.neuronpedia.dashboards import make_dashboards
    from sae_lens_gemma4.neuronpedia.export import export_neuronpedia

    made = make_dashboards(reading.plan, folder / DASHBOARDS, keep_firings=True, progress=progress)
    export_neuronpedia(
        made.path,
        folder / EXPORTS,
        explanations={one.index: one for one in labels},
        progress=progress,
        **study.listing.arguments(),
    )


def _tidy(study: LatentStudy, folder: Path) -> None:
    if not study.keep_firings:
        remove_firings(folder / DASHBOARDS / FIRINGS)
