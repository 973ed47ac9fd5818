"""One SAE on one model on one corpus: the measurement, with everything needed to know what was measured.

The SAE is measured in the form in which it is saved and used. A training SAE of the batch top-k family encodes
by batch top-k and is saved as a JumpReLU; stock evaluates the former during training (`LLMSaeEvaluator`), which
on one tiny SAE read .451 where the saved one has .436. Pass such an SAE through `training.restore.inference_form`.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from tqdm.auto import tqdm

from sae_lens_gemma4.activations.corpus import CorpusLike, build_corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.errors import SAEError
from sae_lens_gemma4.evaluation.accumulators import ReconstructionAccumulator, ReconstructionMetrics
from sae_lens_gemma4.evaluation.robust import VerdictRules
from sae_lens_gemma4.models.interface import HookedModel, model_name

SCHEMA = 1
_MAX_LATENTS = 2**26  # latent activations held at once: 256 MiB in float32
_VERSIONED = ("sae-lens-gemma4", "sae-lens", "transformer-lens", "transformers", "torch")


@dataclass(frozen=True)
class SAEEvaluation:
    """The result of `evaluate_sae`: metrics, curves, what they were measured on, and the verdict's thresholds."""

    sae: dict[str, Any]
    model: dict[str, Any]
    corpus: dict[str, Any]
    metrics: ReconstructionMetrics
    curves: dict[str, Any]
    rules: VerdictRules

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "sae": self.sae,
            "model": self.model,
            "corpus": self.corpus,
            "metrics": self.metrics.to_dict(),
            "curves": self.curves,
            "rules": asdict(self.rules),
            "versions": versions(),
        }

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def to_html(self, path: str | Path) -> None:
        """One self-contained page."""
        from sae_lens_gemma4.report.html import render_evaluation  # the one arrow to the right: a convenience

        Path(path).write_text(render_evaluation(self.to_dict()), encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {**{name.replace("-", "_"): version(name) for name in _VERSIONED}, "python": platform.python_version()}


@torch.no_grad()
def evaluate_sae(
    sae: SAE[Any],
    model: HookedModel,
    corpus: CorpusLike,
    *,
    hook_name: str | None = None,
    context_size: int | None = None,
    split: str = "train",
    batch_blocks: int = 16,
    isolate_documents: bool = False,
    rules: VerdictRules = VerdictRules(),
    source: dict[str, Any] | None = None,
    progress: bool = True,
) -> SAEEvaluation:
    """Measure how well an SAE reconstructs a model's activations.

    Args:
        sae: any SAE of sae_lens in its inference form.
        model: any model that sae_lens can hook, with a tokenizer unless `corpus` is a `Corpus`.
        corpus: whatever `build_corpus` takes.
        hook_name: where the SAE reads; its metadata's by default.
        context_size: for a corpus that is not packed yet; the SAE's training context by default.
        split: for a corpus that is a dataset's name. The embedded text has `train` and `heldout`.
        batch_blocks: blocks a forward pass.
        isolate_documents: as `harvest` takes it.
        source: where the SAE came from (`release` and `sae_id`, or `path`), for the record.

    Raises:
        SAEError: a training SAE, a transcoder, no hook to read, or activations of another width.
        UnknownNameError: the model has no such hook.
        DataError: the corpus cannot be read, or activations are not finite.
    """
    if isinstance(sae, TrainingSAE):
        raise SAEError(
            f"{type(sae).__name__} encodes otherwise than the SAE it is saved as. "
            "Evaluate inference_form(sae) of sae_lens_gemma4.training.restore."
        )
    metadata = sae.cfg.metadata
    hook_name = hook_name or metadata.hook_name
    if hook_name is None:
        raise SAEError("The SAE's metadata names no hook; pass hook_name=.")
    if metadata.hook_name_out not in (None, metadata.hook_name):
        raise SAEError(f"This is a transcoder ({hook_name} → {metadata.hook_name_out}); only SAEs are evaluated.")
    built = build_corpus(
        corpus, model.tokenizer, context_size=context_size or metadata.context_size or 1024, split=split
    )
    accumulator = ReconstructionAccumulator(sae.cfg.d_in, max_tokens=built.n_tokens, d_sae=sae.cfg.d_sae, rules=rules)
    bar = tqdm(total=built.n_tokens, desc=f"Evaluating on {built.name}", unit="tok", leave=False, disable=not progress)
    with bar:
        for batch in harvest(model, built, [hook_name], batch_blocks=batch_blocks, isolate_documents=isolate_documents):
            x_td = batch.acts[hook_name]
            if x_td.shape[-1] != sae.cfg.d_in:
                raise SAEError(f"{hook_name} is {x_td.shape[-1]} wide; this SAE reads {sae.cfg.d_in}.")
            for x_part_td in x_td.to(sae.W_dec.device).split(max(1, _MAX_LATENTS // sae.cfg.d_sae)):
                acts_tf = sae.encode(x_part_td)
                accumulator.update(x_part_td, sae.decode(acts_tf), acts_tf)
            bar.update(len(x_td))
    return SAEEvaluation(
        sae={
            "release": None,
            "sae_id": None,
            "path": None,
            **(source or {}),
            "architecture": sae.cfg.architecture(),
            "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae,
            "hook_name": hook_name,
            "trained_on": metadata.model_name,
        },
        model={"name": model_name(model), "class": type(model).__name__},
        corpus={**built.facts(), "isolate_documents": isolate_documents},
        metrics=accumulator.compute(),
        curves={
            "sse_concentration": accumulator.sse_concentration(),
            "log10_density": _density_histogram(accumulator.firing_frequency(), accumulator.n_tokens),
        },
        rules=rules,
    )


def _density_histogram(frequency_f: torch.Tensor, n_tokens: int, n_bins: int = 30) -> dict[str, list[float]]:
    """Latents that fired, by log10 of their firing frequency, from one token in the corpus to all."""
    log10 = frequency_f[frequency_f > 0].log10()
    edges = torch.linspace(-torch.tensor(float(n_tokens)).log10().item(), 0, n_bins + 1, dtype=torch.float64)
    index = (torch.bucketize(log10, edges, right=True) - 1).clamp(0, n_bins - 1)
    return {"edges": edges.tolist(), "counts": torch.bincount(index, minlength=n_bins).tolist()}
