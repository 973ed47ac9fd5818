"""The line from a text to tested labels, step by step, for the recipes of `studies/labels.py`.

Whatever is slow is kept in the output folder and not done again: the pass over the text, the profile, and the judges'
answers. The rest is computed anew each time, so that it is what the recipe says.

Shapes: `n` places of the corpus, `f` latents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from sae_lens_gemma4.catalogue.label_schemas import FeatureLabel
from sae_lens_gemma4.catalogue.labels import load_feature_labels
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.result import versions, write_json
from sae_lens_gemma4.interp.examples import Examples, LatentExamples
from sae_lens_gemma4.interp.firings import Firings, read_facts, remove_firings
from sae_lens_gemma4.interp.judges.judge import Answer, Judge
from sae_lens_gemma4.interp.labels.agreement import Agreement, agreement
from sae_lens_gemma4.interp.labels.calibration import calibrate
from sae_lens_gemma4.interp.labels.confidence import Confidence, confidences, feature_labels, scores_dict
from sae_lens_gemma4.interp.labels.labelling import SILENT, Labelled, label_latents, label_questions
from sae_lens_gemma4.interp.labels.probe_rows import activations_at, probe_rows
from sae_lens_gemma4.interp.labels.probes import Probing, probe_latents
from sae_lens_gemma4.interp.labels.verification import Verification, scorers_of, verify_labels
from sae_lens_gemma4.interp.layers.profile import profile_layers
from sae_lens_gemma4.interp.means import plain
from sae_lens_gemma4.interp.pieces import pieces_of
from sae_lens_gemma4.interp.selection import select_latents
from sae_lens_gemma4.interp.unembedding import Unembedding
from sae_lens_gemma4.models.hook_names import layer_of
from sae_lens_gemma4.models.interface import vocab_size
from sae_lens_gemma4.neuronpedia.explanations import read_explanations
from sae_lens_gemma4.neuronpedia.job import DASHBOARDS, EXPORTS
from sae_lens_gemma4.neuronpedia.planning import FIRINGS, Plan, plan_dashboards
from sae_lens_gemma4.studies.contrast import EFFECTS
from sae_lens_gemma4.studies.files import write_files
from sae_lens_gemma4.studies.labels import CATALOGUE, LabelStudy, LatentStudy, VerifyStudy
from sae_lens_gemma4.studies.study import load_model, model_facts

PROFILE, COSINES = "profile.json", "cosines.npy"
_SHOWN = 100
"""Latents whose contexts the result holds."""


@dataclass(frozen=True)
class Reading:
    """A text that was read: all that is asked of latents comes from here."""

    plan: Plan
    firings: Firings

    @property
    def tokenizer(self) -> Any:
        return self.plan.model.tokenizer

    def facts(self) -> dict[str, Any]:
        sae = {k: v for k, v in self.plan.document["sae"].items() if k != "config"}
        return {"sae": sae, "model": model_facts(self.plan.model), "corpus": self.plan.document["corpus"]}


def label(study: LabelStudy, folder: Path, *, progress: bool) -> dict[str, Any]:
    """Make labels and test them; errors as the steps raise."""
    judges = study.judges_in(folder, progress=progress)  # keys first
    reading = read_text(study, folder, progress=progress)
    profile, cosine_n = _profile(study, reading, folder, progress=progress)
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
        "profile": profile,
        "selection": selected.to_dict(),
        "examples": examples.facts(),
        **found.to_dict(),
        "judges": [judge.record() for judge in judges],
        "files": files,
        "versions": versions(),
    }
    _export(study, reading, folder, found.labels, progress=progress)
    _tidy(study, folder)
    return document


def verify(study: VerifyStudy, folder: Path, *, progress: bool) -> dict[str, Any]:
    """Test labels that are there; errors as the steps raise."""
    judges = study.judges_in(folder, progress=progress)
    reading = read_text(study, folder, progress=progress)
    stated = stated_labels(study, reading.plan.sae.cfg.d_sae)
    chosen = drawn(sorted(stated), study.n, study.seed)
    examples = Examples(reading.firings, reading.plan.corpus, study.examples)
    latents = list(examples.of(examples.require(chosen)))
    labelled = as_labelled({index: stated[index] for index in chosen}, latents, reading.tokenizer)
    found = _tested(study, reading, judges * len(labelled.judges), labelled, latents)
    document = {
        "schema": 1,
        "kind": "latent_labels",
        **reading.facts(),
        "profile": None,
        "selection": {"rule": "labelled", "indices": chosen, "facts": {"labelled": len(stated), "seed": study.seed}},
        "examples": examples.facts(),
        **found.to_dict(),
        "judges": [judge.record() for judge in judges],
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
    calibration: Mapping[str, Any] | str | None
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
    calibration: Mapping[str, Any] | str | None = "it was not asked for"
    if study.calibration:
        plainly = replace(settings, floor=False)
        further = verify_labels(labelled, scorers, latents, tokenizer, plainly, "calibration", sampling)
        try:
            calibration = calibrate(scores, further).to_dict()
        except DataError as e:
            calibration = str(e)
    labels = feature_labels(labelled, activity, verification, agreed, fitted, scores)
    record = scores_dict(scores, study.weights, study.health)
    return Findings(labelled, verification, agreed, probing, scores, record, calibration, labels)


def _probed(study: LatentStudy, reading: Reading, latents: Sequence[LatentExamples]) -> Probing | str | None:
    if study.probes is None:
        return None
    plan = reading.plan
    rows = probe_rows(latents, plan.corpus)
    place_m = np.concatenate([row.place_n for row in rows])
    acts_md = activations_at(
        plan.model,
        plan.hook_name,
        plan.corpus,
        place_m,
        plan.batch_blocks,
        isolate_documents=plan.isolate_documents,
    )
    return probe_latents(rows, acts_md, study.probes, study.sampling)


def read_text(study: LatentStudy, folder: Path, *, progress: bool) -> Reading:
    """Load SAE, model and text, and read it, going on where an earlier run was stopped."""
    text, stated = study.text, getattr(study, "export", None)
    names = {} if stated is None else {k: getattr(stated, k) for k in ("model_id", "set_name", "suffix")}
    plan = plan_dashboards(
        study.sae.load(study.model.device),
        load_model(study.model),
        text.dataset,
        hook_name=study.sae.hook_name,
        split=text.split,
        n_prompts=text.prompts,
        context_size=text.context_size,
        batch_blocks=text.batch_blocks,
        isolate_documents=text.isolate_documents,
        source=study.sae.source(),
        **names,
    )
    (folder / DASHBOARDS).mkdir(parents=True, exist_ok=True)
    return Reading(plan, plan.gather(folder / DASHBOARDS, progress=progress))


def _profile(
    study: LabelStudy, reading: Reading, folder: Path, *, progress: bool
) -> tuple[dict[str, Any] | None, npt.NDArray[np.float32] | None]:
    """The profile of the text's first blocks, and the cosines of the SAE's layer by place; kept in the folder."""
    if study.profile is None:
        return None, None
    options, plan = study.profile, reading.plan
    layer = layer_of(plan.hook_name)
    if layer is None:
        raise ConfigError(f"The SAE's hook {plan.hook_name} lies in no layer: leave the profile out.")
    corpus = options.blocks(plan.corpus)
    facts = {"options": asdict(options), "layer": layer, "corpus": corpus.hash, **reading.facts()["model"]}
    kept, cosines = folder / PROFILE, folder / COSINES
    if kept.is_file() and cosines.is_file():
        there = read_facts(kept)
        if there.get("facts") == json.loads(json.dumps(facts)):
            return dict(there["profile"]), np.load(cosines, allow_pickle=False)
    made = profile_layers(
        plan.model,
        corpus,
        **options.arguments(),
        isolate_documents=plan.isolate_documents,
        keep_layer=layer,
        progress=progress,
    )
    assert made.cosine_by_place is not None
    cosine_n = np.full(plan.corpus.tokens_bp.numel(), np.nan, dtype=np.float32)
    cosine_n[: len(made.cosine_by_place)] = made.cosine_by_place
    np.save(cosines, cosine_n, allow_pickle=False)
    write_json({"facts": facts, "profile": made.to_dict()}, kept)
    return made.to_dict(), cosine_n


def promoted(reading: Reading, indices: Sequence[int], n: int) -> dict[int, tuple[str, ...]]:
    """The tokens whose logits each latent raises most; none where there is no way from the hook to the logits."""
    plan = reading.plan
    unembedding = Unembedding.of(plan.model, plan.sae, plan.hook_name) if n and indices else None
    if unembedding is None:
        return {}
    pieces = pieces_of(reading.tokenizer, vocab_size(plan.model) or len(reading.tokenizer))
    with torch.no_grad():
        top_fn = unembedding.logits(plan.sae.W_dec[torch.tensor(indices)]).topk(n, dim=1).indices
    return {index: tuple(pieces[t] for t in row) for index, row in zip(indices, top_fn.tolist(), strict=True)}


def contrast_scores(folder: Path, hook_name: str) -> dict[int, float]:
    """Cohen's d of all latents of an SAE, from the output of an `interp contrast`.

    Raises:
        ConfigError: that has no latents of this hook.
    """
    file, name = folder / EFFECTS, f"d/latents/{hook_name}"
    try:
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                return dict(enumerate(opened.get_tensor(name).tolist()))
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"{file} cannot be read: {e}") from e
    raise ConfigError(f"{folder} is no contrast of latents at {hook_name}: give `interp contrast` this SAE.")


def stated_labels(study: VerifyStudy, d_sae: int) -> dict[int, dict[str, str]]:
    """Of each labelled latent its labels, by who stated them.

    Raises:
        DataError: there are none.
        Others: as `load_feature_labels` and `read_explanations`.
    """
    found: dict[int, dict[str, str]] = {}
    if study.labels == CATALOGUE:
        release, sae_id = str(study.sae.release), str(study.sae.sae_id)
        for index, one in load_feature_labels(release, sae_id).items():
            texts = {one.source: one.label or one.description, **one.alternatives}
            found[index] = {who: text for who, text in texts.items() if text}
    else:
        for index, said in read_explanations(study.labels, d_sae=d_sae).items():
            by: dict[str, str] = {}
            for explanation in said:
                by.setdefault(explanation.notes or Path(study.labels).stem, explanation.text)
            found[index] = by
    found = {index: texts for index, texts in found.items() if texts}
    if not found:
        raise DataError(f"{study.labels} has no label of this SAE.")
    return found


def as_labelled(stated: Mapping[int, Mapping[str, str]], latents: Sequence[LatentExamples], tokenizer: Any) -> Labelled:
    """Labels of others, as if judges had just given them."""
    sources = tuple(dict.fromkeys(who for said in stated.values() for who in said))
    questions, skipped = label_questions(latents, tokenizer)
    answers = {
        q.index: tuple(Answer(said[who], None) if who in (said := stated[q.index]) else None for who in sources)
        for q in questions
    }
    silent = {index: SILENT for index in stated if index not in answers and index not in skipped}
    return Labelled(
        judges=sources,
        answers=answers,
        skipped={**skipped, **silent},
        shown={q.index: q.positives for q in questions},
    )


def drawn(indices: Sequence[int], n: int | None, seed: int) -> list[int]:
    """`n` of them by `seed`, ascending; all where there are no more."""
    if n is None or n >= len(indices):
        return list(indices)
    return sorted(np.random.default_rng(seed).choice(indices, n, replace=False).tolist())


def _export(
    study: LabelStudy, reading: Reading, folder: Path, labels: Sequence[FeatureLabel], *, progress: bool
) -> None:
    if study.export is None:
        return
    from sae_lens_gemma4.neuronpedia.dashboards import make_dashboards
    from sae_lens_gemma4.neuronpedia.export import export_neuronpedia

    made = make_dashboards(reading.plan, folder / DASHBOARDS, keep_firings=True, progress=progress)
    export_neuronpedia(
        made.path,
        folder / EXPORTS,
        explanations={one.index: one for one in labels},
        progress=progress,
        **study.export.arguments(),
    )


def _tidy(study: LatentStudy, folder: Path) -> None:
    if not study.keep_firings:
        remove_firings(folder / DASHBOARDS / FIRINGS)
