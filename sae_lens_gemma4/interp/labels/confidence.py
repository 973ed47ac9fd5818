"""One score of a label from four signals, as Adam Kruger's card weighs them.

The card: 20 % agreement, 35 % cross-validation, 35 % probe accuracy, 10 % activation health; tiers high, medium and
low. It defines none of the four, so these are ours, each between 0 and 1:

- *agreement*: Cohen's κ of the two judges' labels (`interp/labels/agreement.py`), 0 where it is negative;
- *held_out*: F1 of the first judge's label on held-out contexts (`interp/labels/verification.py`);
- *probe*: out-of-fold accuracy of the linear probe (`interp/labels/probes.py`), which is near 1 whatever the label;
- *health*: 1 where the latent's density and number of firings are usual, less by orders of magnitude (`Health`).

A score that lacks a signal is none, with the reason: weighing the others anew would make it another score, and most for
the latents of which least is known. A signal of weight 0 is not needed.

Probe and health are the latent's and not the label's, so any label has most of their .45. So beside each score stands
that of a *dealt* label, another latent's in its place: the floor's F1 and κ, and the same probe and health.

The weights rest on nothing that the card says, and a number between 0 and 1 is no probability for being one. What a
score of .8 means is for `interp/labels/calibration.py` to find out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sae_lens_gemma4.catalogue.label_schemas import FeatureLabel
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.excerpts import Activity
from sae_lens_gemma4.interp.labels.agreement import Agreement
from sae_lens_gemma4.interp.labels.labelling import Labelled
from sae_lens_gemma4.interp.labels.probes import Probing
from sae_lens_gemma4.interp.labels.verification import Verification
from sae_lens_gemma4.interp.means import mean_of, plain

COMPONENTS = ("agreement", "held_out", "probe", "health")
TIERS = ("high", "medium", "low")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What each signal counts for; they sum to 1.

    Raises:
        ConfigError: they do not, or one is negative.
    """

    agreement: float = 0.2
    held_out: float = 0.35
    probe: float = 0.35
    health: float = 0.1

    def __post_init__(self) -> None:
        weights = [getattr(self, name) for name in COMPONENTS]
        if not all(w >= 0 for w in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
            raise ConfigError(f"Weights must be 0 or more and sum to 1, not {weights}, which sum to {sum(weights):g}.")


@dataclass(frozen=True, kw_only=True)
class Health:
    """How usual a latent's activity is: max(0, 1 − e / `decades`), where e is the largest of 0, log10(`density_low` /
    density), log10(density / `density_high`) and log10(`min_firings` / firings); 0 of a latent that does not fire.

    Raises:
        ConfigError: numbers that make no band.
    """

    density_low: float = 1e-5
    density_high: float = 1e-1
    min_firings: int = 50
    decades: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.density_low <= self.density_high <= 1 or self.min_firings < 1 or not self.decades > 0:
            raise ConfigError(
                f"Health needs 0 < density_low ≤ density_high ≤ 1, min_firings ≥ 1 and decades > 0, unlike {self}."
            )

    def of(self, activity: Activity) -> float:
        if not activity.n_active or not activity.frequency:
            return 0.0
        excess = max(
            0.0,
            math.log10(self.density_low / activity.frequency),
            math.log10(activity.frequency / self.density_high),
            math.log10(self.min_firings / activity.n_active),
        )
        return max(0.0, 1 - excess / self.decades)


class Components(NamedTuple):
    """The four signals; None where one is not known."""

    agreement: float | None
    held_out: float | None
    probe: float | None
    health: float | None


class Confidence(NamedTuple):
    """`score` and `tier` are None where a signal is missing, and `reason` says which.

    Attributes:
        dealt: the score of a dealt label in its place; None where there is no floor, or no score.
    """

    score: float | None
    tier: str | None
    reason: str | None
    components: Components
    dealt: float | None = None


def confidence_of(components: Components, weights: Weights = Weights()) -> Confidence:
    """Tiers: "high" from .8, "medium" from .5, "low"."""
    needed = {name: value for name, value in components._asdict().items() if getattr(weights, name)}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        return Confidence(None, None, f"no {', '.join(missing)}", components)
    score = min(max(sum(getattr(weights, name) * value for name, value in needed.items()), 0.0), 1.0)
    return Confidence(score, _tier(score), None, components)


def confidences(
    labelled: Labelled,
    verification: Verification,
    agreed: Agreement | None,
    probing: Probing | None,
    activity: Mapping[int, Activity],
    weights: Weights = Weights(),
    health: Health = Health(),
) -> dict[int, Confidence]:
    """The score of the first judge's label of each latent that has one.

    Args:
        agreed, probing: None where there was one judge, or no probe: then no label has a score, unless that weighs 0.
        activity: what each latent does, as `LatentExamples.activity`.
    """
    first = labelled.judges[0]
    tests, floor = verification.by_judge[first].tests, verification.by_judge[first].floor
    scored = {}
    for index in labelled.by(first):
        pair = agreed.pairs.get(index) if agreed else None
        probe = probing.probes.get(index) if probing else None
        components = Components(
            agreement=None if pair is None else max(0.0, pair.kappa),
            held_out=tests[index].f1 if index in tests else None,
            probe=None if probe is None else probe.probe.accuracy,
            health=health.of(activity[index]) if index in activity else None,
        )
        found = confidence_of(components, weights)
        other = components._replace(
            agreement=None if pair is None or pair.floor_kappa is None else max(0.0, pair.floor_kappa),
            held_out=floor.tests[index].f1 if floor and index in floor.tests else None,
        )
        scored[index] = found if found.score is None else found._replace(dealt=confidence_of(other, weights).score)
    return scored


def feature_labels(
    labelled: Labelled,
    activity: Mapping[int, Activity],
    verification: Verification | None = None,
    agreed: Agreement | None = None,
    probing: Probing | None = None,
    scores: Mapping[int, Confidence] | None = None,
    n_examples: int = 10,
) -> list[FeatureLabel]:
    """The catalogue's record of each latent that a judge labelled, by index.

    The label is the first judge's, or, where it gave none, the next one's; the others' are alternatives. Facts bear the
    names of Adam Kruger's data where it has them (`cv_matches` and `cv_mismatches`: contexts in which the label applies
    and the latent fires, and does not), and what is not known is not there.
    """
    found = []
    for index in sorted(labelled.answers):
        given = {j: a for j, a in zip(labelled.judges, labelled.answers[index], strict=True) if a is not None}
        if not given:
            continue
        judge, answer = next(iter(given.items()))
        score = (scores or {}).get(index) if judge == labelled.judges[0] else None
        facts = {
            **_activity_facts(activity.get(index)),
            **_agreement_facts(index, given, agreed),
            **(_test_facts(index, judge, verification) if verification else {}),
            **(_probe_facts(index, probing) if probing else {}),
            **_score_facts(score),
        }
        found.append(
            FeatureLabel(
                index=index,
                label=answer.label,
                category=answer.category,
                confidence=None if score is None else score.score,
                source=judge,
                alternatives={name: other.label for name, other in given.items() if name != judge},
                examples=labelled.shown[index][:n_examples],
                facts=facts,
            )
        )
    return found


def _activity_facts(activity: Activity | None) -> dict[str, Any]:
    if activity is None:
        return {}
    return {
        "freq": activity.frequency,
        "mean_activation": activity.mean,
        "max_activation": activity.max,
        "n_active": activity.n_active,
    }


def _agreement_facts(index: int, given: Mapping[str, Any], agreed: Agreement | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"categories": {name: answer.category for name, answer in given.items()}}
    if agreed and index in agreed.pairs:
        facts |= {"agreement": agreed.pairs[index].kappa, "agreement_details": plain(agreed.pairs[index])}
    return facts


def _test_facts(index: int, judge: str, verification: Verification) -> dict[str, Any]:
    tested = verification.by_judge[judge]
    if (test := tested.tests.get(index)) is None:
        return {"cv_status": tested.untestable.get(index, "the scorer gave no usable answer")}
    facts = {
        "cv_validated": test.confirmed,
        "cv_precision": test.precision,
        "cv_matches": test.tp,
        "cv_mismatches": test.fp,
        "cv_scorer": tested.scorer,
        "cv_recall": test.recall,
        "cv_f1": test.f1,
        "cv_near_precision": test.near_precision,
        "cv_p_value": test.p_value,
        "cv_documents": test.documents,
    }
    if tested.floor and index in tested.floor.tests:
        dealt = tested.floor.tests[index]
        facts |= {"cv_floor_f1": dealt.f1, "cv_floor_validated": dealt.confirmed}
    return facts


def _probe_facts(index: int, probing: Probing) -> dict[str, Any]:
    if (probe := probing.probes.get(index)) is None:
        return {"probe_status": probing.skipped.get(index, "not probed")}
    metrics = plain(probe.probe) | {"n_positive": probe.n_positive, "n_negative": probe.n_negative}
    controls = {name: plain(getattr(probe, name)) for name in ("shuffled", "length", "majority", "hard")}
    return {"probe_accuracy": probe.probe.accuracy, "probe_metrics": metrics, "probe_controls": controls}


def _score_facts(score: Confidence | None) -> dict[str, Any]:
    if score is None:
        return {}
    names = dict(zip(COMPONENTS, ("agreement", "cv", "probe", "activation"), strict=True))
    parts = {names[name]: value for name, value in score.components._asdict().items() if value is not None}
    return {
        "confidence_scores": parts,
        **({"confidence_reason": score.reason} if score.tier is None else {"confidence_tier": score.tier}),
        **({} if score.dealt is None else {"confidence_floor": score.dealt}),
    }


def scores_dict(
    scores: Mapping[int, Confidence],
    weights: Weights = Weights(),
    health: Health = Health(),
    sampling: Sampling = Sampling(),
) -> dict[str, Any]:
    """The scores as plain JSON data, with what they are made of.

    "mean" is of all that are known; "floor", None without a floor, is of dealt labels, with the mean of the labels that
    they stand in for ("own") and of the differences.
    """
    known = [s.score for s in scores.values() if s.score is not None]
    both = [(s.score, s.dealt) for s in scores.values() if s.score is not None and s.dealt is not None]
    floor = {
        "mean": mean_of((dealt for _, dealt in both), sampling),
        "own": mean_of((own for own, _ in both), sampling),
        "difference": mean_of((own - dealt for own, dealt in both), sampling),
        "tiers": {tier: sum(_tier(dealt) == tier for _, dealt in both) for tier in TIERS},
    }
    return {
        "schema": 1,
        "kind": "confidence",
        "weights": asdict(weights),
        "health": asdict(health),
        "definitions": {
            "agreement": "Cohen's κ of where the two judges' labels apply, 0 where negative",
            "held_out": "F1 of the first judge's label on held-out contexts",
            "probe": "out-of-fold accuracy of a linear probe",
            "health": "1 − e / decades: e is how many orders of magnitude density and firings are out of the band",
        },
        "tiers": {tier or "none": sum(s.tier == tier for s in scores.values()) for tier in (*TIERS, None)},
        "mean": plain(mean_of(known, sampling)),
        "floor": plain(floor) if both else None,
        "scores": plain(dict(scores)),
    }


def _tier(score: float) -> str:
    rounded = round(score, 9)  # .35 + .35 + .1 is .7999…
    return "high" if rounded >= 0.8 else "medium" if rounded >= 0.5 else "low"
