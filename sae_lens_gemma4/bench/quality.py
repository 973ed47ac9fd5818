"""Whether a fast run ends where a slow one does: the embedded pair, trained by either on the same batches.

A step's rounding grows over a run, since Adam turns the sign of a small gradient into a step of full length. So it is
the end that is compared, on held-out text and in the form in which SAEs are saved. The run is the hard one (residual
stream ×6, no calibration), once more for each seed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from sae_lens import TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.activations.stream import ActivationStream
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.training.config import Activations, ContinueTrainingConfig, Data, Model, WarmStart
from sae_lens_gemma4.training.phases import Phase, Training
from sae_lens_gemma4.training.preparing import Prepared
from sae_lens_gemma4.training.restore import inference_form
from sae_lens_gemma4.training.runner import ContinueTrainingRunner

_BATCH = 512
_RELEASE, _SAE_ID, _MODEL = (
    "gemma-4-demo-res-matryoshka-embedded", "layer_3_width_2k_l0_16", "gemma-4-demo-it-rescaled",
)  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """Held-out variance explained after one run, by corpus, and how far the two are apart at most."""

    seed: int
    tokens: int
    start: dict[str, float]
    ours: dict[str, float]
    stock: dict[str, float]
    apart: float


def bench_quality(seeds: int, device: str = "cpu", tokens: int = 102_400, heldout_tokens: int = 8_000) -> list[Quality]:
    """Train by `SparseTrainer` and by sae_lens's own class and trainer, `tokens` each, once for each seed."""
    return [_quality(_config(seed, device, tokens, heldout_tokens)) for seed in range(seeds)]


def _quality(cfg: ContinueTrainingConfig) -> Quality:
    prepared = ContinueTrainingRunner(cfg, progress=False).prepare()
    prepared_sae = prepared.saes[0]
    ours, hook = prepared_sae.trainee, prepared_sae.hook_name
    stock = _stock(ours.sae, ours.trainer)
    start = _explained(prepared, hook, {"start": ours.sae})["start"]
    stream = ActivationStream(
        prepared.model, prepared.text, [hook], batch_size=_BATCH, seed=cfg.seed, device=cfg.model.device
    )
    while not ours.ends_phase:
        x_nd = next(stream)[hook]
        ours.train(x_nd)
        stock.step(x_nd)
        stock.n_training_steps += 1
    ve = _explained(prepared, hook, {"ours": ours.sae, "stock": stock.sae})
    apart = max(abs(ve["ours"][name] - ve["stock"][name]) for name in start)
    return Quality(cfg.seed, ours.step * _BATCH, start, ve["ours"], ve["stock"], apart)


def _stock(sae: TrainingSAE[Any], trainer: SAETrainer[Any, Any]) -> SAETrainer[Any, Any]:
    """sae_lens's own trainer and class, from the same weights and with the same settings."""
    own = get_sae_training_class(sae.cfg.architecture())[0](copy.deepcopy(sae.cfg))
    own.load_state_dict(sae.state_dict())
    return SAETrainer(cfg=trainer.cfg, sae=own, data_provider=iter(()))


def _explained(prepared: Prepared, hook: str, saes: dict[str, TrainingSAE[Any]]) -> dict[str, dict[str, float]]:
    """Held-out VE of the saved forms, by SAE and corpus."""
    forms = {name: inference_form(sae) for name, sae in saes.items()}
    results = prepared.evaluate(forms, dict.fromkeys(forms, hook), progress=False, sampling=Sampling(resamples=0))
    ve = {(name, corpus): row[name].metrics.ve for corpus, row in results.items() for name in forms}
    return {name: {corpus: float(ve[name, corpus] or 0) for corpus in results} for name in forms}


def _config(seed: int, device: str, tokens: int, heldout_tokens: int) -> ContinueTrainingConfig:
    texts = ("text", "chat")
    return ContinueTrainingConfig(
        model=Model(name=_MODEL, device=device),
        warm_start=WarmStart(release=_RELEASE, sae_id=_SAE_ID),
        data=Data(
            context_size=64,
            train=[Source(dataset=f"embedded:{name}", tokens=20_000) for name in texts],
            heldout=[
                Source(dataset=f"embedded:{name}", split="heldout", tokens=heldout_tokens, name=name) for name in texts
            ],
        ),
        activations=Activations(batch_size=_BATCH),
        calibration=None,
        training=Training(phases=[Phase(tokens=tokens, lr=1e-3)], dead_after_steps=30),
        output="unused",
        seed=seed,
    )
