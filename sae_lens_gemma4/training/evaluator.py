"""Held-out evaluation while sae_lens trains: the SAE in the form in which it will be saved, on text that stays put.

Stock's `LLMSaeEvaluator` takes its tokens from the training stream (which it thereby shortens), encodes by batch top-k
what will be saved as a JumpReLU, and measures a different text each time. This one is called the same way, by
`SAETrainer(evaluator=…)` and by `MultiSAETrainingRunnerConfig(evaluator=…)`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from sae_lens import SAE, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.evaluate import evaluate_sae
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.evaluation.result import SAEEvaluation
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.training.restore import inference_form

LOGGED = ("ve", "nmse", "cosine", "l0", "dead")


class HeldOutEvaluator:
    """Measures the SAE being trained on held-out corpora.

    Args:
        model: the model being trained on, or any that takes the corpora's tokens.
        corpora: held-out text by name.
        hook_name: where the SAE reads; its metadata's by default.
        settings: of `evaluate_sae`; without intervals unless `sampling` says otherwise.

    Attributes:
        latest: the last result on each corpus.
    """

    def __init__(
        self, model: HookedModel, corpora: Mapping[str, Corpus], *, hook_name: str | None = None, **settings: Any
    ) -> None:
        if not corpora:
            raise ConfigError("A held-out evaluation needs at least one corpus.")
        self.model, self.corpora, self.hook_name = model, dict(corpora), hook_name
        self.settings = {"sampling": Sampling(resamples=0), "progress": False, **settings}
        self.latest: dict[str, SAEEvaluation] = {}

    def __call__(
        self,
        sae: TrainingSAE[Any],
        data_provider: Any,  # noqa: ARG002
        activation_scaler: ActivationScaler,
    ) -> dict[str, Any]:
        """Figures to log, `heldout/<corpus>/<figure>`. `data_provider` is not touched: training loses no tokens."""
        saved = as_saved(sae, activation_scaler)
        logged: dict[str, Any] = {}
        for name, corpus in self.corpora.items():
            result = evaluate_sae(saved, self.model, corpus, hook_name=self.hook_name, **self.settings)
            self.latest[name] = result
            logged |= {f"heldout/{name}/{key}": value for key, value in figures(result).items() if value is not None}
        return logged


def figures(result: SAEEvaluation) -> dict[str, float | None]:
    """The few figures of a result that are worth a line in a log."""
    metrics = result.metrics
    robust = {
        "ve_without_top_sse_0.001": metrics.ve_without_top_sse.get(0.001),
        "sse_share_0.001": metrics.sse_share.get(0.001),
    }
    named = {key: getattr(metrics, key) for key in LOGGED} | robust
    return {key: None if value is None else float(value) for key, value in named.items()}


def as_saved(sae: TrainingSAE[Any], activation_scaler: ActivationScaler) -> SAE[Any]:
    """The SAE as it would be saved, with what was done to its training activations folded in (`SAETrainer.fit`)."""
    whitening, factor = activation_scaler.whitening, activation_scaler.scaling_factor
    if whitening is None and factor is None:
        return inference_form(sae)
    folded = copy.deepcopy(sae)
    if whitening is not None:
        whitening = whitening.to(folded.W_dec.device)
        folded.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    if factor is not None:
        folded.fold_activation_norm_scaling_factor(factor)
    return inference_form(folded)
