"""Which latents are worth a judge's time: a rule, a seed, and on the record what was left out.

Adam Kruger's dataset card takes "top 50 features per layer ranked by SIPIT divergence and activation statistics" and
says no more of it. The rule "divergence" here is one reading of that:

- divergence = Σ z (c̄ − c) / Σ z over the tokens on which a latent fires, z its activation, c the cosine of the
  residual to the token's own embedding there, c̄ the mean of c over all tokens measured: how much further than usual
  the residual is from token space where the latent fires;
- activity = mean activation where it fires × ln(1 + tokens on which it fires);
- score = the mean of the two ranks among the candidates, as shares: 1 is first in both, ties share a rank.

Figures of labels chosen by such a rule are figures of such latents; "density" draws from rare and frequent ones alike.
What is measured here is measured on the whole text, the documents that labels are later tested on included: which
latents are tested depends on these documents, though no label does.

Shapes: `f` latents, `n` places (`block * context_size + position`), `m` candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError, DataError, check_name
from sae_lens_gemma4.interp.examples import check_corpus, dealt_in_turn, read_latents
from sae_lens_gemma4.interp.firings import Firings
from sae_lens_gemma4.interp.segments import Ints

Rule = Literal["divergence", "density", "contrast", "given", "all"]

BANDS = 10
"""Of log10 density, equally wide from the rarest candidate to the most frequent."""

Floats = npt.NDArray[np.float64]
Scores = Mapping[int, float] | npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How latents are chosen.

    Attributes:
        rule: "divergence": the highest scores by the module's formula. "density": drawn from bands of log10 density
            in turn. "contrast": the largest absolute values of given scores. "given": `latents`, whatever they do.
            "all": every candidate.
        n: how many; all where there are fewer. For "given" and "all" it has no meaning.
        seed: of what "density" draws.
        min_firings, max_density: candidates fire on so many tokens at least, and on such a share at most.
        latents: for "given".

    Raises:
        ConfigError: a number that selects nothing, or latents where the rule takes none.
        UnknownNameError: no such rule.
    """

    rule: Rule = "density"
    n: int = 50
    seed: int = 0
    min_firings: int = 20
    max_density: float = 0.1
    latents: list[int] | None = None

    def __post_init__(self) -> None:
        check_name("selection rule", self.rule, get_args(Rule))
        for name, least in (("n", 1), ("seed", 0), ("min_firings", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, not {value!r}.")
        if not 0 < self.max_density <= 1:
            raise ConfigError(f"max_density is a share of tokens, above 0 and at most 1; not {self.max_density}.")
        if (self.rule == "given") != bool(self.latents):
            which = "needs latents: which ones?" if self.rule == "given" else "takes no latents; the rule 'given' does."
            raise ConfigError(f"The rule {self.rule!r} {which}")


class Selected(NamedTuple):
    """What was chosen.

    Attributes:
        indices: best first; in ascending order for "density" and "all", as given for "given".
        score_by_index: what each was chosen by: its score, its log10 density, the score given; empty for "given" and
            "all".
        rule: as in the settings.
        facts: settings, what the filters left, and of each latent chosen what it was measured by.
    """

    indices: list[int]
    score_by_index: dict[int, float]
    rule: Rule
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data; a score that is infinite is None."""
        scores = [self.score_by_index.get(index, math.nan) for index in self.indices]
        return {
            "schema": 1,
            "kind": "selection",
            "rule": self.rule,
            "indices": self.indices,
            "scores": [score if math.isfinite(score) else None for score in scores],
            "facts": self.facts,
        }


class Measures(NamedTuple):
    """What latents do, in the order asked for.

    Attributes:
        count_f: tokens that count on which it fires.
        mean_f: of its activations there; 0 where there are none.
        divergence_f: as the module's docstring defines it; NaN where no cosine was measured on a token it fires on.
    """

    count_f: npt.NDArray[np.int64]
    mean_f: Floats
    divergence_f: Floats

    @property
    def activity_f(self) -> Floats:
        return self.mean_f * np.log1p(self.count_f)


def select_latents(
    firings: Firings,
    corpus: Corpus,
    selection: Selection,
    *,
    cosine_by_place: npt.NDArray[np.floating] | None = None,
    scores: Scores | None = None,
) -> Selected:
    """Choose latents by what one pass has left of them.

    Args:
        cosine_by_place: for "divergence", `[n]`: of the layer's residual at each place, the cosine to the embedding of
            its own token; NaN where not measured. `profile_layers(..., keep_layer=...)` gives it.
        scores: for "contrast": of each latent, as Cohen's d; a latent without one, or with NaN, is no candidate.

    Raises:
        ConfigError: what the rule needs is missing, or a latent does not exist.
        DataError: no latent is left, saying what each filter left; or activations or cosines are not of this corpus.
    """
    if selection.rule == "divergence" and cosine_by_place is None:
        raise ConfigError(
            "The rule 'divergence' needs the cosines of a layer's residual to its tokens' own embeddings: "
            "profile_layers(..., keep_layer=...) gives them."
        )
    if selection.rule == "contrast" and scores is None:
        raise ConfigError("The rule 'contrast' needs a score of each latent: a contrast gives them.")
    check_corpus(firings, corpus)
    facts: dict[str, Any] = {"settings": asdict(selection), "corpus": corpus.hash, "tokens": corpus.n_tokens}
    if selection.latents is not None:
        indices, measures = list(selection.latents), measure(firings, corpus, selection.latents, cosine_by_place)
        facts |= {"fire": int((measures.count_f > 0).sum()), "taken": len(indices)}
        return Selected(
            indices, {}, "given", facts | {"by_latent": _rows(measures, indices, range(len(indices)), corpus)}
        )
    measures = measure(firings, corpus, range(firings.d_sae), cosine_by_place)
    value_f = np.zeros(firings.d_sae)
    if selection.rule == "divergence":
        value_f = measures.divergence_f
    elif scores is not None and selection.rule == "contrast":
        value_f = _by_index(scores, firings.d_sae)
    often_f = measures.count_f >= selection.min_firings
    rare_f = often_f & (measures.count_f <= selection.max_density * corpus.n_tokens)
    candidate_m = np.flatnonzero(rare_f & ~np.isnan(value_f))
    facts["left"] = left = {
        "latents": firings.d_sae,
        "fire": int((measures.count_f > 0).sum()),
        "often_enough": int(often_f.sum()),
        "rare_enough": int(rare_f.sum()),
        "candidates": len(candidate_m),
    }
    if not len(candidate_m):
        raise DataError(_nothing_left(left, selection, corpus))
    choice = _choice(selection, measures, value_f, candidate_m, corpus.n_tokens)
    indices = candidate_m[choice.chosen].tolist()
    scored = () if selection.rule == "all" else zip(indices, choice.score_m[choice.chosen].tolist(), strict=True)
    facts |= {"taken": len(indices), **choice.facts}
    return Selected(
        indices, dict(scored), selection.rule, facts | {"by_latent": _rows(measures, indices, indices, corpus)}
    )


def measure(
    firings: Firings,
    corpus: Corpus,
    indices: Sequence[int],
    cosine_by_place: npt.NDArray[np.floating] | None = None,
) -> Measures:
    """What these latents do, in their order; divergences are NaN without cosines. Errors as `select_latents`."""
    cosine_n, usual = (None, math.nan) if cosine_by_place is None else _cosines(cosine_by_place, corpus)
    counts, means, divergences = [], [], []
    for _, firing in read_latents(firings, corpus, indices):
        value_e = firing.value_e.astype(np.float64)
        counts.append(len(value_e))
        means.append(value_e.mean() if len(value_e) else 0.0)
        divergence = math.nan
        if cosine_n is not None:
            nearer_e = usual - cosine_n[firing.token_e]
            measured_e = ~np.isnan(nearer_e)
            if measured_e.any():
                divergence = np.average(nearer_e[measured_e], weights=value_e[measured_e])
        divergences.append(divergence)
    return Measures(np.array(counts, dtype=np.int64), np.array(means), np.array(divergences))


class _Choice(NamedTuple):
    """Of the candidates: the places of those chosen, the score of each, and what else a report says."""

    chosen: npt.NDArray[np.int64]
    score_m: Floats
    facts: dict[str, Any]


def _choice(s: Selection, measures: Measures, value_f: Floats, candidate_m: Ints, n_tokens: int) -> _Choice:
    m = len(candidate_m)
    if s.rule == "density":
        return _by_density(s, np.log10(measures.count_f[candidate_m] / n_tokens))
    if s.rule == "divergence":
        score_m = (rankdata(value_f[candidate_m]) + rankdata(measures.activity_f[candidate_m])) / (2 * m)
        return _Choice(np.argsort(-score_m, kind="stable")[: s.n], score_m, {})
    if s.rule == "contrast":
        score_m = value_f[candidate_m]
        return _Choice(np.argsort(-abs(score_m), kind="stable")[: s.n], score_m, {})
    return _Choice(np.arange(m), value_f[candidate_m], {})


def _by_density(s: Selection, density_m: Floats) -> _Choice:
    """Candidates from each band in turn, in a drawn order, the rarest band first."""
    edges = np.linspace(density_m.min(), density_m.max(), BANDS + 1)
    band_m = np.searchsorted(edges[1:-1], density_m, side="right")
    rng = np.random.default_rng(s.seed)
    dealt = dealt_in_turn([rng.permutation(np.flatnonzero(band_m == band)).tolist() for band in range(BANDS)])
    chosen = np.sort(np.array(dealt[: s.n], dtype=np.int64))
    bands = [
        {
            "low": float(edges[band]),
            "high": float(edges[band + 1]),
            "candidates": int((band_m == band).sum()),
            "taken": int((band_m[chosen] == band).sum()),
        }
        for band in range(BANDS)
    ]
    return _Choice(chosen, density_m, {"log10_density_bands": bands})


def _cosines(cosine_by_place: npt.NDArray[np.floating], corpus: Corpus) -> tuple[Floats, float]:
    """As float64, and their mean over the tokens that count."""
    cosine_n = np.asarray(cosine_by_place, dtype=np.float64)
    if cosine_n.shape != (corpus.tokens_bp.numel(),):
        raise DataError(
            f"There are cosines of shape {cosine_n.shape}, and corpus {corpus.name!r} has {corpus.tokens_bp.numel():,} "
            "places. Take the profile of this corpus."
        )
    counted = cosine_n[corpus.keep_bp.flatten().numpy()]
    counted = counted[~np.isnan(counted)]
    if not len(counted) or not np.isfinite(counted).all():
        what = "No cosine was measured on" if not len(counted) else "Cosines are infinite on"
        raise DataError(f"{what} the tokens of corpus {corpus.name!r} that count. Take the profile of this corpus.")
    return cosine_n, float(counted.mean())


def _by_index(scores: Scores, d_sae: int) -> Floats:
    """Of each latent; NaN where there is none."""
    if not isinstance(scores, Mapping):
        if np.shape(scores) != (d_sae,):
            raise ConfigError(f"There are scores of shape {np.shape(scores)}, and the SAE has {d_sae} latents.")
        return np.asarray(scores, dtype=np.float64)
    if unknown := [index for index in scores if not 0 <= index < d_sae]:
        raise ConfigError(f"There is no latent {unknown[0]}: the SAE has {d_sae}, from 0 on.")
    value_f = np.full(d_sae, np.nan)
    value_f[list(scores)] = list(scores.values())
    return value_f


def _nothing_left(left: Mapping[str, int], s: Selection, corpus: Corpus) -> str:
    what = {"divergence": "a cosine", "contrast": "a score"}.get(s.rule)
    measured = "" if what is None else f"; {left['candidates']:,} of these have {what}"
    return (
        f"No latent is left to select. Of {left['latents']:,}, {left['fire']:,} fire on the {corpus.n_tokens:,} tokens "
        f"read; {left['often_enough']:,} of these on {s.min_firings:,} or more; {left['rare_enough']:,} of these "
        f"on a share of {s.max_density:g} at most{measured}. "
        "Read more text, lower min_firings or raise max_density."
    )


def _rows(measures: Measures, indices: Sequence[int], at: Sequence[int], corpus: Corpus) -> list[dict[str, Any]]:
    """What each latent was measured by; `at` says where among the measures it is."""
    return [
        {
            "index": index,
            "firings": int(measures.count_f[i]),
            "density": float(measures.count_f[i]) / corpus.n_tokens,
            "mean_activation": float(measures.mean_f[i]),
            "activity": float(measures.activity_f[i]),
            "divergence": None if np.isnan(measures.divergence_f[i]) else float(measures.divergence_f[i]),
        }
        for index, i in zip(indices, at, strict=True)
    ]
