"""`interp label` and `interp verify`: labels of latents, made or found, and what they are worth.

One recipe is the whole line: profile, selection, labels by two judges, tests on contexts they have not seen, linear
probes, a score and what it means, files, and the export that Neuronpedia imports. `verify` begins in the middle, with
labels that somebody else has published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sae_lens_gemma4.catalogue.label_schemas import SCHEMAS
from sae_lens_gemma4.catalogue.labels import load_feature_labels
from sae_lens_gemma4.catalogue.registry import SAEEntry, releases
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.examples import ExampleSettings
from sae_lens_gemma4.interp.judges.judge import Judge
from sae_lens_gemma4.interp.judges.settings import JudgeSettings, judge_of
from sae_lens_gemma4.interp.labels.confidence import Health, Weights
from sae_lens_gemma4.interp.labels.probes import ProbeSettings
from sae_lens_gemma4.interp.labels.verification import VerificationSettings, scorers_of
from sae_lens_gemma4.interp.selection import Selection
from sae_lens_gemma4.neuronpedia.explanations import read_explanations
from sae_lens_gemma4.neuronpedia.job import Place, Stated, Text
from sae_lens_gemma4.studies.contrast import EFFECTS
from sae_lens_gemma4.studies.profile import ProfileOptions
from sae_lens_gemma4.studies.study import Study, check_latents, plan_model, plan_sae, plan_text
from sae_lens_gemma4.training.config import Model

CATALOGUE = "catalogue"
BASELINES = ("tokens", "ngrams")
ANSWERS = "answers"
_PER = 1000
"""Latents that costs are told for where nobody knows how many there are."""
_TOKEN_BYTES = 6
"""Of a token as JSON has it in a prompt, roughly, with its activation twice that; for estimates."""


@dataclass(frozen=True, kw_only=True)
class LatentStudy(Study):
    """What making and testing labels have in common.

    Attributes:
        judges: those who label and test.
        probes: None for none; a label then has no score.
        calibration: test labels on a third part of the documents too, to tell what a score means; asks again.
        keep_firings: leave all activations in `output/dashboards/firings`, so that another run reads no text.
        promoted: tokens whose logits a latent raises that a judge is told of; 0 for none.
    """

    sae: Place
    model: Model
    text: Text
    judges: list[JudgeSettings]
    examples: ExampleSettings = field(default_factory=ExampleSettings)
    verification: VerificationSettings = field(default_factory=VerificationSettings)
    probes: ProbeSettings | None = field(default_factory=ProbeSettings)
    weights: Weights = field(default_factory=Weights)
    health: Health = field(default_factory=Health)
    calibration: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    promoted: int = 10
    keep_firings: bool = True

    def __post_init__(self) -> None:
        if self.promoted < 0:
            raise ConfigError(f"promoted is a number of tokens, 0 or more, not {self.promoted}.")
        if self.examples.n_positive < self.verification.min_positives:
            raise ConfigError(
                f"examples.n_positive is {self.examples.n_positive}, fewer than verification.min_positives "
                f"({self.verification.min_positives}): no label could be tested."
            )

    def judges_in(self, folder: Path, *, progress: bool = False) -> list[Judge]:
        """The judges, whose answers are kept in `folder`."""
        return [judge_of(settings, folder / ANSWERS, progress=progress) for settings in self.judges]

    @cached_property
    def unasked(self) -> list[Judge]:
        """The judges as a plan sees them: they keep nothing. Each needs its key, and its client takes a while."""
        return [judge_of(settings, None) for settings in self.judges]

    def costs(self, n_latents: int, *, labelling: bool) -> list[str]:
        """What each judge is asked at most, in sentences. Keys are looked for, and nothing is kept.

        Args:
            labelling: it labels as well as tests; else what it is asked is for each set of labels that are there.
        """
        e, v = self.examples, self.verification
        tests = (2 if v.floor else 1) + self.calibration
        shown = (2 * e.window + 1) * _TOKEN_BYTES
        sentences = []
        for settings, judge in zip(self.judges, self.unasked, strict=True):
            if settings.kind in BASELINES:
                sentences.append(f"{judge.name}: no model is asked, and nothing is paid.")
                continue
            labels = judge.cost(
                n_latents if labelling else 0,
                0,
                n_examples=e.n_top + e.n_quantile + e.n_negative,
                bytes_per_example=2 * shown,
                n_promoted=self.promoted,
            )
            found = judge.cost(0, n_latents * tests, n_examples=e.n_positive + e.n_negative, bytes_per_example=shown)
            usd = None if labels.usd is None or found.usd is None else labels.usd + found.usd
            most = (labels.usd_at_most or 0) + (found.usd_at_most or 0)
            price = "" if usd is None else f", about {usd:.2f} USD, {most:.2f} at the very most"
            limit = ""
            if settings.max_usd is not None:
                limit = f"; it stops before {settings.max_usd:g} USD are spent, by all runs in this folder"
            tokens = labels.input_tokens + found.input_tokens
            of = "" if labelling else " for each set of labels"
            n = labels.calls + found.calls
            sentences.append(f"{judge.name}: {n:,} questions{of}, about {tokens:,} tokens read{price}{limit}.")
        return sentences

    def begin(self) -> list[str]:
        """The plan's first sentences."""
        return [plan_sae(self.sae)[0], plan_model(self.model), plan_text(self.text)]


@dataclass(frozen=True, kw_only=True)
class LabelStudy(LatentStudy):
    """A recipe of `interp label`.

    Attributes:
        judges: two; who tests whose labels is `verification.scorer`'s.
        profile: of the layers, on the same text; needed by the selection rule "divergence".
        contrast: output folder of an `interp contrast`, whose latents the selection rule "contrast" takes.
        licence: of the labels, for their card.
        listing: what Neuronpedia lists of the SAE (`neuronpedia.job.Stated`), where an export is wanted; None for none.
    """

    selection: Selection = field(default_factory=Selection)
    profile: ProfileOptions | None = None
    contrast: str | None = None
    licence: str | None = None
    listing: Stated | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.judges) != 2:
            raise ConfigError(f"`interp label` takes two judges, not {len(self.judges)}.")
        models = [judge for judge in self.judges if judge.kind not in BASELINES]
        if len(models) == 1 and self.verification.scorer == "other":
            name = models[0].name or models[0].model
            raise ConfigError(
                f"String match cannot test labels in words. Have {name} test both: `verification.scorer: {name}`."
            )
        if self.selection.rule == "divergence" and self.profile is None:
            raise ConfigError("The selection rule divergence needs a profile: add `profile: {}`, or take another rule.")
        if (self.selection.rule == "contrast") != (self.contrast is not None):
            raise ConfigError("The selection rule contrast goes with `contrast`, the output of an `interp contrast`.")

    def plan(self) -> list[str]:
        sentences = self.begin()
        s = self.selection
        n, many = len(s.latents) if s.latents else s.n, None
        if s.rule == "all":
            entry = plan_sae(self.sae)[1]
            width = None if entry is None else entry.d_sae
            n = width or _PER
            if width is None:
                many = f"All latents that fire; how many is not known before the SAE is loaded. Of each {n:,}:"
        rule = {"given": "as given", "all": "all that fire"}.get(s.rule, f"by {s.rule}, seed {s.seed}")
        check_latents(self.sae, s.latents or ())
        scorers_of(self.unasked, self.verification)
        sentences.append(many or f"{n:,} latents, {rule}.")
        sentences += self.costs(n, labelling=True)
        if self.contrast is not None and not Path(self.contrast, EFFECTS).is_file():
            raise ConfigError(f"There is no contrast in {self.contrast}; `interp contrast` makes one.")
        sentences.append("Labels go to labels/" + ("." if self.listing is None else ", and an export to exports/."))
        return sentences

    def study(self, folder: Path, *, progress: bool) -> dict[str, Any]:
        from sae_lens_gemma4.studies.line import label

        return label(self, folder, progress=progress)


@dataclass(frozen=True, kw_only=True)
class VerifyStudy(LatentStudy):
    """A recipe of `interp verify`: labels that are there, tested.

    Attributes:
        examples: nobody labels from this text, so most documents are held out, unless `interp label` made the labels of
            it: then the documents that it kept apart are taken, whatever stands here.
        labels: `catalogue` for the release's own, or a CSV, JSON, JSONL or parquet file.
        judges: one, who tests every label of every source.
        n: labelled latents to test, drawn by `seed`; None for all.
    """

    labels: str
    examples: ExampleSettings = field(
        default_factory=lambda: ExampleSettings(labelling=0.1, held_out=0.6, calibration=0.3)
    )
    n: int | None = 50
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.judges) != 1:
            raise ConfigError(f"`interp verify` takes one judge, who tests all labels, not {len(self.judges)}.")
        if self.verification.scorer != "other":
            raise ConfigError("The one judge of `interp verify` tests all labels: leave `verification.scorer` out.")
        if self.n is not None and self.n < 1:
            raise ConfigError(f"n must be at least 1, or null for all labelled latents; not {self.n}.")

    def plan(self) -> list[str]:
        sentences = self.begin()
        entry = plan_sae(self.sae)[1]
        if self.labels == CATALOGUE:
            check_labels(self.sae, entry)
            n = self.n or (entry.d_sae if entry is not None else None) or 0
            drawn = f"{self.n:,} of them, seed {self.seed}" if self.n else "all"
            return [*sentences, f"Labels: {self.labels}; {drawn}.", *self.costs(n, labelling=False)]
        if not Path(self.labels).is_file():
            raise ConfigError(f"There are no labels at {self.labels}; `catalogue` is for a release's own.")
        stated = stated_labels(self)
        n = min(self.n or len(stated), len(stated))
        by = dict.fromkeys(who for said in stated.values() for who in said)
        sentences.append(f"Labels: {self.labels}; {n:,} of {len(stated):,} labelled latents, by {', '.join(by)}.")
        return sentences + self.costs(n, labelling=False)

    def study(self, folder: Path, *, progress: bool) -> dict[str, Any]:
        from sae_lens_gemma4.studies.line import verify

        return verify(self, folder, progress=progress)


def stated_labels(study: VerifyStudy) -> dict[int, dict[str, str]]:
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
        entry = plan_sae(study.sae)[1]
        for index, said in read_explanations(study.labels, d_sae=None if entry is None else entry.d_sae).items():
            by: dict[str, str] = {}
            for explanation in said:
                by.setdefault(explanation.notes or Path(study.labels).stem, explanation.text)
            found[index] = by
    found = {index: texts for index, texts in found.items() if texts}
    if not found:
        raise DataError(f"{study.labels} has no label of this SAE.")
    return found


def check_labels(place: Place, entry: SAEEntry | None) -> None:
    """Raise `ConfigError` if the catalogue has no labels of this SAE."""
    release = releases().get(str(place.release))
    have = [name for name, r in releases().items() if _labelled(r.saes) and not SCHEMAS[str(r.label_schema)].by_example]
    by_example = release is not None and release.label_schema and SCHEMAS[release.label_schema].by_example
    if release is None or entry is None or entry.labels is None or by_example:
        raise ConfigError(
            f"The catalogue has no labels of {place.sae_id or place.path}. Releases with labels: {', '.join(have)}."
        )


def _labelled(saes: Sequence[SAEEntry]) -> bool:
    return any(sae.labels for sae in saes)
