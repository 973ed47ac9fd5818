"""Whether a label holds on contexts that its author has not seen, and what a label that says nothing would score.

A judge says in which of the held-out contexts the label applies (`labels/detection.py`). Where it applies to contexts
that the latent fires in rather than to others, the label tells something of the latent. By default the *other* judge
tests, so that no judge's private associations pass for what its label says; a third, or one of them, can test all.

**A label is confirmed** if one-sided Fisher's exact test of applies × fires gives p ≤ `alpha` (.05). A label that says
nothing of the latent passes at most one time in twenty, however often it is said to apply. F1 does not have that
property: of as many contexts that fire as do not, a label that applies everywhere has an F1 of 2/3. So every figure
comes with its floor: the same labels dealt out anew, so that each latent has another text (`labels/dealing.py`),
tested on the same contexts by the same judge. The difference is paired by latent. The test takes contexts for
independent, which several of one document are not quite; the floor has the same contexts, and shows what that comes to.

Half of the negatives are near-misses where the text has them (`interp/examples.py`), and precision against these alone
is given beside the other. So is recall of the contexts in which the latent is strongest beside recall of those from
all over its range, since examples show the strongest first, and a label may fit these alone.

Adam Kruger's card tells of 35.8 % of labels confirmed, and not by what rule, nor what a floor would be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.excerpts import LatentExamples
from sae_lens_gemma4.interp.excerpts import Part as Contexts
from sae_lens_gemma4.interp.judges.judge import Judge
from sae_lens_gemma4.interp.labels.dealing import dealt
from sae_lens_gemma4.interp.labels.detection import LabelTest, ask, label_test, scorer_name, untestable
from sae_lens_gemma4.interp.labels.labelling import Labelled, check_judges
from sae_lens_gemma4.interp.means import Mean, mean_of, plain
from sae_lens_gemma4.interp.statistics import PairedChange, Share, mcnemar, share

PartName = Literal["held_out", "calibration"]


@dataclass(frozen=True, kw_only=True)
class VerificationSettings:
    """How labels are tested.

    Raises:
        ConfigError: a number that makes no sense, or no scorer.
    """

    scorer: str = "other"
    """"other": each judge's labels are tested by the next judge; "own": by itself; a judge's name: all, by that one."""
    alpha: float = 0.05
    """The share of labels that say nothing that may be confirmed."""
    min_positives: int = 5
    """A latent with fewer held-out contexts it fires in is not tested."""
    floor: bool = True
    """Whether labels are also dealt out anew, which doubles the questions."""
    seed: int = 0
    """Of the contexts' order, and of the dealing."""

    def __post_init__(self) -> None:
        if not self.scorer.strip():
            raise ConfigError('scorer must be "other", "own" or a judge\'s name, and is empty.')
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha must be between 0 and 1, as .05, not {self.alpha}.")
        if self.min_positives < 1 or self.seed < 0:
            raise ConfigError(
                f"min_positives must be 1 or more and seed 0 or more, not {self.min_positives} and {self.seed}."
            )


class Floor(NamedTuple):
    """The labels dealt out anew, on the latents for which both tests were answered.

    Attributes:
        near_precision: over those for which it is defined; of the difference, both.
        change: how many more labels are confirmed when they are where they belong, by McNemar.
        f1_difference, …: where they belong less where they do not.
        left_out: latents that were dealt none, because more than half of all labels are the same text as theirs.
    """

    confirmed: Share
    f1: Mean
    balanced_accuracy: Mean
    near_precision: Mean
    change: PairedChange
    f1_difference: Mean
    balanced_accuracy_difference: Mean
    near_precision_difference: Mean
    left_out: tuple[int, ...]
    tests: Mapping[int, LabelTest]


class Recall(NamedTuple):
    """Means over the latents that have such contexts; `difference`, top less quantile, over those that have both."""

    top: Mean
    quantile: Mean
    difference: Mean


class Tested(NamedTuple):
    """One judge's labels.

    Attributes:
        tests: by latent.
        untestable: latents with a label that could not be tested whatever it says, and why: not refuted.
        unanswered: latents for which the scorer gave no usable answer.
        floor: None where it was not asked for or cannot be; `no_floor` says why.
    """

    judge: str
    scorer: str
    tests: Mapping[int, LabelTest]
    untestable: Mapping[int, str]
    unanswered: tuple[int, ...]
    confirmed: Share
    f1: Mean
    balanced_accuracy: Mean
    near_precision: Mean
    recall: Recall
    floor: Floor | None
    no_floor: str | None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found, by judge whose labels were tested."""

    part: str
    settings: VerificationSettings
    sampling: Sampling
    by_judge: Mapping[str, Tested]

    def to_dict(self) -> dict[str, Any]:
        rule = f"confirmed: one-sided Fisher's exact test of applies × fires, p ≤ {self.settings.alpha:g}"
        return {
            "schema": 1,
            "kind": "verification",
            "part": self.part,
            "rule": rule,
            "settings": asdict(self.settings),
            "sampling": asdict(self.sampling),
            "judges": {judge: plain(tested) for judge, tested in self.by_judge.items()},
        }


def scorers_of(judges: Sequence[Judge], settings: VerificationSettings) -> tuple[Judge, ...]:
    """Who tests the labels of each of the judges, by `settings.scorer`.

    Raises:
        ConfigError: the other one is to test and there is none, or nobody bears the scorer's name.
    """
    names = check_judges(judges)
    if settings.scorer == "own":
        return tuple(judges)
    if settings.scorer in names:
        return (judges[names.index(settings.scorer)],) * len(judges)
    if settings.scorer != "other":
        raise ConfigError(f"scorer is {settings.scorer!r}, and the judges are {', '.join(names)}: name one of these.")
    if len(judges) < 2:
        raise ConfigError(f'scorer "other" needs two judges, and {names[0]} is alone: give another, or take "own".')
    return (*judges[1:], judges[0])


def verify_labels(
    labelled: Labelled,
    scorers: Sequence[Judge],
    examples: Iterable[LatentExamples],
    tokenizer: PreTrainedTokenizerBase,
    settings: VerificationSettings = VerificationSettings(),
    part: PartName = "held_out",
    sampling: Sampling = Sampling(),
) -> Verification:
    """Test each judge's labels on one part's contexts.

    Args:
        scorers: who tests the labels of each of `labelled.judges`, in that order (`scorers_of`).
        part: "held_out"; or "calibration", contexts kept for what a confidence means (`interp/labels/calibration.py`).

    Raises:
        DataError: no label can be tested, naming why; or not one scorer for each who labelled.
    """
    if len(scorers) != len(labelled.judges):
        raise DataError(f"{len(scorers)} scorers were given for the labels of {', '.join(labelled.judges)}.")
    contexts = {latent.index: getattr(latent, part) for latent in examples}
    by_judge = {
        name: _tested(labelled.by(name), name, scorer, contexts, tokenizer, settings, sampling)
        for name, scorer in zip(labelled.judges, scorers, strict=True)
    }
    if not any(tested.tests or tested.unanswered for tested in by_judge.values()):
        reasons = sorted({reason for tested in by_judge.values() for reason in tested.untestable.values()})
        raise DataError(f"No label can be tested on the {part} contexts: {'; '.join(reasons) or 'there is no label'}.")
    return Verification(part=part, settings=settings, sampling=sampling, by_judge=by_judge)


def _tested(
    labels: Mapping[int, str],
    judge: str,
    scorer: Judge,
    contexts: Mapping[int, Contexts],
    tokenizer: PreTrainedTokenizerBase,
    settings: VerificationSettings,
    sampling: Sampling,
) -> Tested:
    reasons = {index: untestable(contexts.get(index), settings.min_positives, settings.alpha) for index in labels}
    own = {index: label for index, label in labels.items() if reasons[index] is None}
    others: dict[int, str] = {}
    no_floor = None
    if not settings.floor:
        no_floor = "not asked for"
    elif len(own) < 2:
        no_floor = f"labels can be dealt out anew among two latents or more, and {len(own)} can be tested"
    else:
        indices, texts = [*own], [*own.values()]
        places = dealt(texts, np.random.default_rng((settings.seed, len(own))))
        others = {indices[place]: texts[other] for place, other in places.items()}
        no_floor = None if others else f"all {len(own)} labels that can be tested are the same text"
    asked = [*own.items(), *others.items()]
    said = ask(scorer, asked, contexts, tokenizer, settings.seed)
    tests = [
        None if applies is None else label_test(index, label, applies, contexts[index], settings.alpha)
        for (index, label), applies in zip(asked, said, strict=True)
    ]
    found = {t.index: t for t in tests[: len(own)] if t is not None}
    floor = {t.index: t for t in tests[len(own) :] if t is not None}
    if others and not found.keys() & floor.keys():
        no_floor = "no latent has an answer to both its own label and another's"
    return Tested(
        judge=judge,
        scorer=scorer_name(scorer),
        tests=found,
        untestable={index: reason for index, reason in reasons.items() if reason is not None},
        unanswered=tuple(index for index in own if index not in found),
        confirmed=share(sum(t.confirmed for t in found.values()), len(found)),
        f1=mean_of((t.f1 for t in found.values()), sampling),
        balanced_accuracy=mean_of((t.balanced_accuracy for t in found.values()), sampling),
        near_precision=mean_of((t.near_precision for t in found.values() if t.near_precision is not None), sampling),
        recall=_recall(found, sampling),
        floor=None if no_floor else _floor(found, floor, tuple(i for i in own if i not in others), sampling),
        no_floor=no_floor,
    )


def _recall(found: Mapping[int, LabelTest], sampling: Sampling) -> Recall:
    both = [(t.recall_top, t.recall_quantile) for t in found.values()]
    return Recall(
        mean_of((top for top, _ in both if top is not None), sampling),
        mean_of((quantile for _, quantile in both if quantile is not None), sampling),
        mean_of((top - other for top, other in both if top is not None and other is not None), sampling),
    )


def _floor(
    found: Mapping[int, LabelTest], floor: Mapping[int, LabelTest], left_out: tuple[int, ...], sampling: Sampling
) -> Floor:
    pairs = [(found[index], test) for index, test in floor.items() if index in found]
    gained = sum(own.confirmed and not other.confirmed for own, other in pairs)
    lost = sum(other.confirmed and not own.confirmed for own, other in pairs)
    precisions = [(own.near_precision, other.near_precision) for own, other in pairs]
    near = (own - other for own, other in precisions if own is not None and other is not None)
    return Floor(
        confirmed=share(sum(other.confirmed for _, other in pairs), len(pairs)),
        f1=mean_of((other.f1 for _, other in pairs), sampling),
        balanced_accuracy=mean_of((other.balanced_accuracy for _, other in pairs), sampling),
        near_precision=mean_of((other for _, other in precisions if other is not None), sampling),
        change=mcnemar(gained, lost, len(pairs)),
        f1_difference=mean_of((own.f1 - other.f1 for own, other in pairs), sampling),
        balanced_accuracy_difference=mean_of(
            (own.balanced_accuracy - other.balanced_accuracy for own, other in pairs), sampling
        ),
        near_precision_difference=mean_of(near, sampling),
        left_out=left_out,
        tests=floor,
    )
