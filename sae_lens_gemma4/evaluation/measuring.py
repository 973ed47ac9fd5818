"""One SAE on one corpus while activations stream past it: what is gathered on the way, and the result at the end.

Several of these listen to one forward pass, each at its own hook.

Shapes: `t` tokens, `d` the activations' width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.saes.transcoder import Transcoder

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.harvest import Harvest
from sae_lens_gemma4.errors import MismatchWarning, SAEError, warn_caller
from sae_lens_gemma4.evaluation import diagnosis, robust
from sae_lens_gemma4.evaluation.accumulators import ReconstructionAccumulator
from sae_lens_gemma4.evaluation.figures import ratio, variance, variance_explained
from sae_lens_gemma4.evaluation.intervals import Sampling, clusters
from sae_lens_gemma4.evaluation.metrics import ReconstructionMetrics
from sae_lens_gemma4.evaluation.outliers import describe_outliers, norm_against_sse
from sae_lens_gemma4.evaluation.reading import read
from sae_lens_gemma4.evaluation.robust import VerdictRules
from sae_lens_gemma4.evaluation.snapshot import Snapshot
from sae_lens_gemma4.evaluation.structure import WidthSums, forms, matryoshka_widths
from sae_lens_gemma4.models.hook_names import canonical_name

_SAMPLE = 4096
_BINS = 30


def check_sae(sae: SAE[Any], hook_name: str | None) -> str:
    """The hook at which this SAE is to be measured; warns if it was trained at another.

    Raises:
        SAEError: a training SAE, a transcoder, an SAE that reads sequences, or no hook to read.
    """
    if isinstance(sae, TrainingSAE):
        raise SAEError(
            f"{type(sae).__name__} encodes otherwise than the SAE it is saved as. "
            "Evaluate inference_form(sae) of sae_lens_gemma4.training.restore."
        )
    if isinstance(sae, TemporalSAE):
        raise SAEError("A TemporalSAE reads sequences; only SAEs that read each token by itself are evaluated.")
    metadata = sae.cfg.metadata
    hook_name = hook_name or metadata.hook_name
    if hook_name is None:
        raise SAEError("The SAE's metadata names no hook; pass hook_name=.")
    if isinstance(sae, Transcoder) or metadata.hook_name_out not in (None, metadata.hook_name):
        raise SAEError(f"This is a transcoder ({hook_name} → {metadata.hook_name_out}); only SAEs are evaluated.")
    if metadata.hook_name is not None and canonical_name(hook_name) != canonical_name(metadata.hook_name):
        warn_caller(f"The SAE was trained at {metadata.hook_name} and is measured at {hook_name}.", MismatchWarning)
    return hook_name


def sae_rows(sae: SAE[Any], hook_name: str, batch: Harvest) -> torch.Tensor:
    """What an SAE reads of a batch, `[t, d_in]`.

    Raises:
        SAEError: the hook is not as wide as the SAE reads, or has not the head that it reads.
    """
    x, head = batch.acts[hook_name], sae.cfg.metadata.hook_head_index
    if head is not None and x.ndim != 3:
        raise SAEError(f"{hook_name} is not divided into heads; this SAE reads head {head} (hook_head_index).")
    if head is not None and not -x.shape[1] <= head < x.shape[1]:
        raise SAEError(f"{hook_name} has {x.shape[1]} heads; this SAE reads head {head}.")
    x_td = x.flatten(1) if head is None else x[:, head]
    if x_td.shape[-1] != sae.cfg.d_in:
        raise SAEError(f"{hook_name} is {x_td.shape[-1]} wide; this SAE reads {sae.cfg.d_in}.")
    return x_td


class Measuring:
    """One SAE on one corpus.

    Args:
        hook_name: as `check_sae` returned it.
        corpus: all of it will be shown, in reading order.
    """

    def __init__(self, sae: SAE[Any], hook_name: str, corpus: Corpus, rules: VerdictRules, sampling: Sampling) -> None:
        self.sae, self.hook_name, self.corpus, self.rules, self.sampling = sae, hook_name, corpus, rules, sampling
        self.head = sae.cfg.metadata.hook_head_index
        n = corpus.n_tokens
        self.accumulator = ReconstructionAccumulator(sae.cfg.d_in, max_tokens=n, d_sae=sae.cfg.d_sae, rules=rules)
        self.widths = WidthSums(matryoshka_widths(sae))
        documents = corpus.document_bp[corpus.keep_bp].unique()
        self._documents_k, self._cluster_k = documents, clusters(len(documents))
        chosen = np.random.default_rng(sampling.seed).choice(n, min(n, _SAMPLE), replace=False)
        self._sampled_n = torch.zeros(n, dtype=torch.bool)
        self._sampled_n[torch.from_numpy(chosen)] = True
        self._sample: list[torch.Tensor] = []
        self._seen = 0

    def rows(self, batch: Harvest) -> torch.Tensor:
        """This SAE's activations `[t, d_in]` of a batch. Raises as `sae_rows` does."""
        return sae_rows(self.sae, self.hook_name, batch)

    def update(self, batch: Harvest) -> None:
        x_td = self.rows(batch)
        sampled = self._sampled_n[self._seen : self._seen + len(x_td)]
        self._sample.append(x_td[sampled.to(x_td.device)].cpu())
        self._seen += len(x_td)
        cluster_t = self._cluster_k[torch.searchsorted(self._documents_k, batch.document_t)]
        labels = {"position": _position_group(batch.position_t)}
        if batch.role_t is not None:
            labels["role"] = batch.role_t.long()
        at = 0
        for reading in read(self.sae, x_td, self.widths.widths):
            part = slice(at, at := at + len(reading.x_td))
            self.accumulator.update(
                reading.x_td,
                reading.x_hat_td,
                reading.active,
                documents_t=cluster_t[part],
                groups={name: label[part] for name, label in labels.items()},
            )
            self.widths.update(reading)

    @property
    def sample_td(self) -> torch.Tensor:
        """Up to 4,096 of the activations, drawn by the seed, for what is tried rather than measured."""
        return torch.cat(self._sample)

    def metrics(self) -> ReconstructionMetrics:
        sampling = self.sampling
        return self.accumulator.compute(resamples=sampling.resamples, seed=sampling.seed, level=sampling.level)

    def details(self, metrics: ReconstructionMetrics, tokenizer: Any) -> dict[str, Any]:
        """Everything but the metrics: the `diagnosis`, `outliers`, `groups`, `widths`, `forms` and `curves` of the
        JSON form."""
        snapshot = self.accumulator.snapshot()
        total = snapshot.sums.weighted(torch.ones(1, len(snapshot.error_kd), dtype=torch.float64))
        return {
            "diagnosis": self._diagnosis(metrics),
            "outliers": describe_outliers(snapshot, self.corpus, tokenizer),
            "groups": {
                "position": self._groups("position", _position_name),
                "role": self._groups("role", lambda role: self.corpus.roles[role] if role >= 0 else "none"),
            },
            "widths": self.widths.to_list(float(variance(total)), float(total.of("squares"))),
            "forms": forms(self.sae, self.sample_td),
            "curves": {
                "sse_concentration": snapshot.concentration(),
                "log10_density": density_histogram(snapshot),
                "norm_against_sse": norm_against_sse(snapshot, self.sampling.seed),
            },
        }

    def _diagnosis(self, metrics: ReconstructionMetrics) -> dict[str, Any]:
        decided, without = metrics.verdict, metrics.ve_without_top_sse
        screen: bool | None = None
        cause, cause_reason, trials = None, None, []
        if decided == "outlier-dominated" and metrics.ve is not None:
            screens = metrics.ve_without_top_norm, metrics.ve_without_high_norm, metrics.high_norm_share
            screen = robust.norm_screen_sees(metrics.ve, without, *screens)
        if decided == "misfit":
            trials = diagnosis.misfit_trials(self.sae, self.sample_td)
            cause, cause_reason = diagnosis.cause(trials, self.rules)
        return {
            "verdict": decided,
            "reason": robust.reason(decided, metrics.n_tokens, metrics.ve, without, metrics.sse_share, self.rules),
            "norm_screen": screen,
            "cause": cause,
            "cause_reason": cause_reason,
            "trials": [trial.to_dict() for trial in trials],
        }

    def _groups(self, name: str, written: Any) -> list[dict[str, Any]]:
        groups = self.accumulator.group_sums(name)
        sse = sum(float(sums.of("sse")) for sums in groups.values())  # added up as they are: a share is 1 at most
        rows = []
        for key, sums in groups.items():
            figures = {
                "ve": variance_explained(sums),
                "nmse": ratio(sums.of("sse"), sums.of("squares")),
                "l0": ratio(sums.of("l0"), sums.of("n")),
                "sse_share": sums.of("sse") / sse if sse > 0 else torch.tensor([torch.nan]),
            }
            values = {k: (float(v) if v.isfinite().all() else None) for k, v in figures.items()}
            rows.append({"name": written(key), "n_tokens": int(sums.of("n")), **values})
        return rows


def _position_group(position_t: torch.Tensor) -> torch.Tensor:
    """0, 1, 2–3, 4–7, …: the number of binary digits."""
    return torch.where(position_t > 0, position_t.double().log2().floor() + 1, 0).long()


def _position_name(group: int) -> str:
    low, high = (0, 0) if group == 0 else (2 ** (group - 1), 2**group - 1)
    return str(low) if low == high else f"{low}–{high}"


def density_histogram(snapshot: Snapshot) -> dict[str, list[float]]:
    """Latents that fired, by log10 of their firing frequency, from one token in the corpus to all."""
    assert snapshot.fired_f is not None
    log10 = (snapshot.fired_f[snapshot.fired_f > 0].double() / snapshot.n).log10()
    edges = torch.linspace(-torch.tensor(float(snapshot.n)).log10().item(), 0, _BINS + 1, dtype=torch.float64)
    index = (torch.bucketize(log10, edges, right=True) - 1).clamp(0, _BINS - 1)
    return {"edges": edges.tolist(), "counts": torch.bincount(index, minlength=_BINS).tolist()}
