"""Whether a linear readout of the activations tells a latent's contexts from others, and what that is worth.

Probes of single latents reach near 100 %, as the 99.3 % of Adam Kruger's card, and that **says next to nothing of a
label**: an SAE's latent is itself a threshold on a linear readout of the very activations that the probe reads,
`z > 0` where `x · w_enc + b` is large enough, so a linear probe has only to find that direction again. It would do so
if the label were "bananas". What a probe can show is a latent that fires for reasons other than its own direction (the
competition within a top k), or data with a short cut. So each probe comes with what would look the same without a
latent, on the same splits:

- *shuffled*: the same probe, on labels shuffled by seed, several times: what this many dimensions fit by chance;
- *length*: a probe of the window's length, the place in the block and the place in the document, and no activation;
- *majority*: always the class that is the more frequent;
- *hard*: another probe, of firing contexts against near-misses alone, where a token's identity tells little.

Splits are by document, because tokens of one document are alike: a probe that has seen the document knows the answer
without the latent. Figures are of out-of-fold predictions, each by a probe that saw nothing of its document.

Shapes: `n` contexts of one latent, `d` the hook's width.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.labels.probe_rows import ProbeRows
from sae_lens_gemma4.interp.means import Mean, mean_of, plain

Acts = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
CONTROLS = ("shuffled", "length", "majority")


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How probes are fitted.

    Raises:
        ConfigError: a number that makes no sense.
    """

    folds: int = 5
    shuffles: int = 5
    """Times that labels are shuffled; the mean is reported."""
    c: float = 1.0
    """scikit-learn's inverse strength of the L2 penalty, on standardised activations."""
    max_iter: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 2 or self.shuffles < 1 or self.max_iter < 1 or self.seed < 0 or not self.c > 0:
            raise ConfigError(f"Probes need folds ≥ 2, shuffles ≥ 1, c > 0, max_iter ≥ 1 and seed ≥ 0, unlike {self}.")


class Readout(NamedTuple):
    """Figures of out-of-fold predictions; positive is "fires". Precision is None where nothing was predicted to."""

    accuracy: float
    balanced_accuracy: float
    precision: float | None
    recall: float
    f1: float
    auroc: float


class Probe(NamedTuple):
    """One latent.

    Attributes:
        shuffled: means over the shuffles.
        hard: firing contexts against near-misses alone; None where there are too few, and `no_hard` says so.
        not_converged: fits, of the probe and the controls, that stopped at `max_iter`.
    """

    index: int  # type: ignore[assignment]
    n_positive: int
    n_negative: int
    n_documents: int
    probe: Readout
    shuffled: Readout
    length: Readout
    majority: Readout
    hard: Readout | None
    no_hard: str | None
    not_converged: int


@dataclass(frozen=True, kw_only=True)
class Probing:
    """All latents.

    Attributes:
        skipped: latents without a probe, and why.
        means: by "probe", each control and "hard": accuracy, balanced accuracy and AUROC over latents.
        differences: the probe's less each control's, paired by latent; "hard" less the probe's own.
    """

    settings: ProbeSettings
    sampling: Sampling
    probes: Mapping[int, Probe]
    skipped: Mapping[int, str]
    means: Mapping[str, Mapping[str, Mean]]
    differences: Mapping[str, Mapping[str, Mean]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "kind": "probes",
            "note": "A latent is a threshold on a linear readout of these activations: near 100 % is expected of a "
            "linear probe, whatever the label says.",
            "settings": asdict(self.settings),
            "sampling": asdict(self.sampling),
            "means": plain(dict(self.means)),
            "differences": plain(dict(self.differences)),
            "skipped": plain(dict(self.skipped)),
            "probes": plain(dict(self.probes)),
        }


def probe_latents(
    rows: Iterable[ProbeRows],
    acts: Iterable[Acts],
    settings: ProbeSettings = ProbeSettings(),
    sampling: Sampling = Sampling(),
) -> Probing:
    """Fit a probe and its controls for each latent.

    Args:
        rows: each latent's contexts, as `probe_rows` gives them.
        acts: for each of them, in this order, the hook's activations at its places `[n, d]`, taken one
            at a time, so that those of all latents need not be in memory together.

    Raises:
        DataError: no latent can be probed, saying why; or there is not one array a latent, with one row a context.
    """
    probes: dict[int, Probe] = {}
    skipped: dict[int, str] = {}
    for latent, acts_nd in zip_longest(rows, acts):
        if latent is None or acts_nd is None:
            less, more = ("arrays", "latents") if acts_nd is None else ("latents", "arrays of activations")
            raise DataError(f"There are fewer {less} than {more}: give one array of activations a latent.")
        if len(acts_nd) != len(latent.fires_n):
            raise DataError(
                f"There are {len(acts_nd):,} rows of activations for {len(latent.fires_n):,} contexts of latent "
                f"{latent.index}: give one for each."
            )
        if reason := too_few(latent.fires_n, latent.document_n, settings.folds):
            skipped[latent.index] = reason
        else:
            probes[latent.index] = _probe(latent, acts_nd, settings)
    if not probes:
        reasons = "; ".join(f"{reason} ({n} latents)" for reason, n in Counter(skipped.values()).most_common())
        raise DataError(f"No latent can be probed: {reasons or 'none was given'}. Read more text, or ask fewer folds.")
    means, differences = _summary(probes, sampling)
    return Probing(
        settings=settings,
        sampling=sampling,
        probes=probes,
        skipped=skipped,
        means=means,
        differences=differences,
    )


def too_few(fires_n: Bools, document_n: Ints, folds: int) -> str | None:
    """Why these contexts cannot be split into `folds` by document with both classes in each training set."""
    for fires, what in ((True, "positives"), (False, "negatives")):
        n = len(np.unique(document_n[fires_n == fires]))
        if not n:
            return f"one class only: there are no {what}"
        if n < folds:
            return f"fewer {what} than folds: they are from {n} documents, for {folds} folds"
    return None


def out_of_fold(
    x_nd: Acts, fires_n: Bools, splits: Sequence[tuple[Ints, Ints]], settings: ProbeSettings
) -> tuple[npt.NDArray[np.float64], int]:
    """Log-odds of "fires" for each context by a probe that did not see its split, and fits that did not converge."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    odds_n, not_converged = np.zeros(len(fires_n)), 0
    for train, test in splits:
        if len(np.unique(fires_n[train])) < 2:  # few contexts, with their labels shuffled
            odds_n[test] = np.inf if fires_n[train][0] else -np.inf
            continue
        probe = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=settings.c, class_weight="balanced", max_iter=settings.max_iter),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", ConvergenceWarning)
            probe.fit(x_nd[train], fires_n[train])
        not_converged += bool(caught)
        odds_n[test] = probe.decision_function(x_nd[test])
    return odds_n, not_converged


def readout(fires_n: Bools, odds_n: npt.NDArray[np.float64]) -> Readout:
    """The figures of predictions `odds > 0`, of contexts of both classes; AUROC is scikit-learn's."""
    from sklearn.metrics import roc_auc_score

    said_n = odds_n > 0
    n_fires, n_said = int(fires_n.sum()), int(said_n.sum())
    tp = int((fires_n & said_n).sum())
    tn = int((~fires_n & ~said_n).sum())
    return Readout(
        accuracy=(tp + tn) / len(fires_n),
        balanced_accuracy=(tp / n_fires + tn / (len(fires_n) - n_fires)) / 2,
        precision=tp / n_said if n_said else None,
        recall=tp / n_fires,
        f1=2 * tp / (n_fires + n_said),
        auroc=float(roc_auc_score(fires_n, np.nan_to_num(odds_n))),
    )


def splits_of(fires_n: Bools, document_n: Ints, settings: ProbeSettings) -> list[tuple[Ints, Ints]]:
    """Training and test contexts of each fold: no document in both, classes as even as documents allow."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = StratifiedGroupKFold(settings.folds, shuffle=True, random_state=settings.seed)
    return [(train, test) for train, test in folds.split(fires_n, fires_n, document_n) if len(test)]


def _probe(latent: ProbeRows, acts_nd: Acts, settings: ProbeSettings) -> Probe:
    fires_n, document_n = latent.fires_n, latent.document_n
    splits = splits_of(fires_n, document_n, settings)
    odds_n, missed = out_of_fold(acts_nd, fires_n, splits, settings)
    length_n, missed_length = out_of_fold(latent.length_nf, fires_n, splits, settings)
    majority_n = np.full(len(fires_n), 1.0 if fires_n.mean() > 0.5 else -1.0)
    rng, shuffled, missed_shuffled = np.random.default_rng((settings.seed, latent.index)), [], 0
    for _ in range(settings.shuffles):
        mixed_n = rng.permutation(fires_n)
        mixed_odds_n, n = out_of_fold(acts_nd, mixed_n, splits, settings)
        shuffled.append(readout(mixed_n, mixed_odds_n))
        missed_shuffled += n
    hard_n = fires_n | latent.near_miss_n
    hard, missed_hard = None, 0
    if (no_hard := too_few(fires_n[hard_n], document_n[hard_n], settings.folds)) is None:
        hard_splits = splits_of(fires_n[hard_n], document_n[hard_n], settings)
        hard_odds, missed_hard = out_of_fold(acts_nd[hard_n], fires_n[hard_n], hard_splits, settings)
        hard = readout(fires_n[hard_n], hard_odds)
    return Probe(
        index=latent.index,
        n_positive=int(fires_n.sum()),
        n_negative=int((~fires_n).sum()),
        n_documents=len(np.unique(document_n)),
        probe=readout(fires_n, odds_n),
        shuffled=_mean(shuffled),
        length=readout(fires_n, length_n),
        majority=readout(fires_n, majority_n),
        hard=hard,
        no_hard=no_hard,
        not_converged=missed + missed_length + missed_shuffled + missed_hard,
    )


def _mean(readouts: Sequence[Readout]) -> Readout:
    columns = ([v for v in column if v is not None] for column in zip(*readouts, strict=True))
    return Readout(*(sum(column) / len(column) if column else None for column in columns))  # type: ignore[arg-type]


def _summary(
    probes: Mapping[int, Probe], sampling: Sampling
) -> tuple[dict[str, dict[str, Mean]], dict[str, dict[str, Mean]]]:
    means: dict[str, dict[str, Mean]] = {}
    differences: dict[str, dict[str, Mean]] = {}
    for name in ("probe", *CONTROLS, "hard"):
        pairs = [(p.probe, found) for p in probes.values() if (found := getattr(p, name)) is not None]
        figures = ("accuracy", "balanced_accuracy", "auroc")
        means[name] = {f: mean_of((getattr(found, f) for _, found in pairs), sampling) for f in figures}
        sign = -1 if name == "hard" else 1
        if name != "probe":
            differences[name] = {
                f: mean_of((sign * (getattr(own, f) - getattr(found, f)) for own, found in pairs), sampling)
                for f in figures
            }
    return means, differences
