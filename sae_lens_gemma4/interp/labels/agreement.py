"""Whether two judges mean the same by their labels: by what the labels pick out, and by their words.

Words are a poor measure: "past tense" and "verbs of what happened" share none. So agreement is behavioural first:
Cohen's κ of where the two labels were said to apply, on the same held-out contexts (`labels/verification.py`). The
Jaccard index of the labels' content words stands beside it, because it needs no scorer.

Both have a floor: one judge's label beside the other's of another latent, on the same contexts. That is what two labels
agree in that have nothing to do with each other, but for the texts and the scorers.

Who tested is in `scorers`. Where one scorer tested both labels (a judge named for it, the baselines' string match, or
the only judge of labels by others), κ is of the two labels as that one reads them. Where each label was tested by
another (scorer "other" or "own" with two models), κ is of two labels *and* two scorers: what these read differently
lowers it.

κ is 0 where one label, or both, applied to all contexts or to none: nothing beyond chance is shown. How often that was
so is counted (`constant`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.labels.detection import LabelTest
from sae_lens_gemma4.interp.labels.verification import Verification
from sae_lens_gemma4.interp.means import Mean, mean_of, plain


class Pair(NamedTuple):
    """Two judges' labels of one latent; the floor's are None where there is none.

    Attributes:
        constant: either label, or both, applied to all contexts or to none, which makes κ 0.
    """

    kappa: float
    words: float
    constant: bool
    floor_kappa: float | None
    floor_words: float | None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Means over the latents for which both judges' labels were tested; differences are paired by latent.

    Attributes:
        scorers: who tested the labels of each.
    """

    judges: tuple[str, str]
    scorers: tuple[str, str]
    pairs: Mapping[int, Pair]
    kappa: Mean
    words: Mean
    floor_kappa: Mean
    floor_words: Mean
    kappa_difference: Mean
    words_difference: Mean

    @property
    def constant(self) -> int:
        return sum(pair.constant for pair in self.pairs.values())

    def to_dict(self) -> dict[str, Any]:
        named = ("judges", "scorers", "pairs")
        figures = {name: plain(value) for name, value in vars(self).items() if name not in named}
        return {
            "schema": 1,
            "kind": "agreement",
            "judges": list(self.judges),
            "scorers": list(self.scorers),
            "definitions": {
                "kappa": "Cohen's κ of where the two labels apply, on the same held-out contexts; "
                "0 where one applies to all or to none",
                "words": "Jaccard index of the labels' content words",
                "floor": "one judge's label beside the other's of another latent, on the same contexts",
            },
            **figures,
            "constant": self.constant,
            "pairs": plain(dict(self.pairs)),
        }


def agreement(verification: Verification, sampling: Sampling = Sampling()) -> Agreement:
    """How far the first two judges' labels agree, from their tests; no judge is asked anything.

    Raises:
        ConfigError: there are not two judges.
    """
    if len(verification.by_judge) < 2:
        raise ConfigError(
            f"Agreement is of two judges, and the labels are by {', '.join(verification.by_judge)} alone: give another."
        )
    first, second = list(verification.by_judge.values())[:2]
    dealt = second.floor.tests if second.floor else {}
    pairs = {
        index: _pair(one, second.tests[index], dealt.get(index))
        for index, one in first.tests.items()
        if index in second.tests
    }
    floored = [p for p in pairs.values() if p.floor_kappa is not None]
    return Agreement(
        judges=(first.judge, second.judge),
        scorers=(first.scorer, second.scorer),
        pairs=pairs,
        kappa=mean_of((p.kappa for p in pairs.values()), sampling),
        words=mean_of((p.words for p in pairs.values()), sampling),
        floor_kappa=mean_of((p.floor_kappa or 0.0 for p in floored), sampling),
        floor_words=mean_of((p.floor_words or 0.0 for p in floored), sampling),
        kappa_difference=mean_of((p.kappa - (p.floor_kappa or 0.0) for p in floored), sampling),
        words_difference=mean_of((p.words - (p.floor_words or 0.0) for p in floored), sampling),
    )


def kappa(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Cohen's κ (Cohen 1960; scikit-learn's); 0 where either has one value only, and of nothing at all."""
    from sklearn.metrics import cohen_kappa_score

    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return float(cohen_kappa_score(one, other))


def words(one: str, other: str) -> float:
    """Jaccard index of two labels' content words: those in both of those in either; 0 where neither has a word."""
    a, b = content_words(one), content_words(other)
    return len(a & b) / len(a | b) if a | b else 0.0


def content_words(label: str) -> frozenset[str]:
    """Words without scikit-learn's English stop words; all of them where the label has no others."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    found = frozenset(re.findall(r"\w+", label.lower()))
    return found - ENGLISH_STOP_WORDS or found


def _pair(one: LabelTest, other: LabelTest, dealt: LabelTest | None) -> Pair:
    return Pair(
        kappa=kappa(one.applies, other.applies),
        words=words(one.label, other.label),
        constant=len({*one.applies}) == 1 or len({*other.applies}) == 1,
        floor_kappa=None if dealt is None else kappa(one.applies, dealt.applies),
        floor_words=None if dealt is None else words(one.label, dealt.label),
    )
