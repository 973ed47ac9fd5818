"""What a run leaves behind with each SAE: where it came from, what was done to it, and what was measured.

sae_lens's cfg.json says how an SAE was trained and forgets from what. Here its metadata carries the lineage, so that it
travels with the weights wherever stock code takes them, and `result.json` beside it carries every figure; the model
card is made of these two alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_saes_directory

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.catalogue.files import commit_in_cache
from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.compare import Comparison
from sae_lens_gemma4.evaluation.result import SAEEvaluation, versions
from sae_lens_gemma4.models.hook_names import hf_name
from sae_lens_gemma4.models.interface import HookedModel, model_name
from sae_lens_gemma4.models.loading import MODEL_CLASSES
from sae_lens_gemma4.training.config import WarmStart
from sae_lens_gemma4.training.gate import GateResult
from sae_lens_gemma4.training.journal import plain
from sae_lens_gemma4.training.preparing import Prepared, PreparedSAE

SCHEMA = 1
RESULT_FILENAME = "result.json"
_INCIDENTS = ("rollback", "abandoned")


@dataclass(frozen=True)
class SAEResult:
    """One SAE of a run.

    Attributes:
        path: its folder.
        sae: as it was saved, in its inference form.
        before, after: held-out evaluations of the SAE it began as (none for a new one) and of this one, by corpus.
        history: rows of the training stream's figures (step, tokens, loss, ve, l0, threshold, dead, lr), in the
            training form.
        events: resampling, rollbacks, phases, and what was skipped, in order.
        evaluations: held-out figures while it was trained.
        calibration: what calibrating found and kept; None if it was not done.
        gate: None if none was asked for.
    """

    name: str
    path: Path
    sae: SAE[Any]
    before: dict[str, SAEEvaluation]
    after: dict[str, SAEEvaluation]
    history: list[dict[str, Any]]
    events: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    calibration: dict[str, Any] | None
    gate: GateResult | None

    def comparisons(self) -> list[Comparison]:
        """Before and after on each held-out corpus, with paired differences; none for a new SAE."""
        return [Comparison(name, self.before[name], self.after[name]) for name in self.before]


@dataclass(frozen=True)
class ContinueTrainingResult:
    """What a run produced.

    Attributes:
        path: folder of the run.
        saes: each SAE's result by its name.
        model, heldout: what they were measured on.
        tokens: tokens taken from the stream, which several SAEs may have shared.
        seconds: time spent in training steps and the forward passes that fed them.
    """

    path: Path
    saes: dict[str, SAEResult]
    model: HookedModel
    heldout: dict[str, Corpus]
    tokens: int
    seconds: float

    @property
    def only(self) -> SAEResult:
        """The SAE of a run that has one; `ConfigError` where it has several."""
        if len(self.saes) > 1:
            raise ConfigError(f"This run has several SAEs, {', '.join(self.saes)}; take one of `saes`.")
        return next(iter(self.saes.values()))

    @property
    def passed(self) -> bool:
        """Whether every gate that was asked for holds."""
        return all(sae.gate is None or sae.gate.passed for sae in self.saes.values())


def lineage(prepared: Prepared, sae: PreparedSAE, skipped: list[dict[str, Any]]) -> dict[str, Any]:
    """What `cfg.json` says of the run: the base, the data with offsets, the phases, and what went wrong."""
    base = None
    if sae.base is not None and sae.run.warm_start is not None:
        start = sae.run.warm_start
        base = {**start.source, "revision": _revision(start), "model_name": sae.base.cfg.metadata.model_name}
    return {
        "base": base,
        "seed": prepared.cfg.seed,
        "data": data_facts(prepared),
        "phases": _phases(prepared, sae),
        "incidents": [event for event in sae.trainee.events if event["kind"] in _INCIDENTS],
        "skipped_tokens": sum(row["tokens"] for row in skipped),
        "calibrated": sae.trainee.calibration is not None,
    }


def set_metadata(prepared: Prepared, sae: PreparedSAE, skipped: list[dict[str, Any]]) -> None:
    """What was trained on what, as it ran, which need not be what the recipe says."""
    cfg, metadata = prepared.cfg, sae.trainee.sae.cfg.metadata
    given = prepared.given_model
    metadata.model_name = model_name(prepared.model) or cfg.model.name
    metadata.model_class_name = type(prepared.model).__name__ if given else cfg.model.class_name
    metadata.hook_name = sae.hook_name
    metadata.hf_hook_name = hf_name(sae.hook_name) if metadata.model_class_name in MODEL_CLASSES else None
    metadata.context_size = next(iter(prepared.heldout.values())).context_size
    metadata.prepend_bos = cfg.data.bos
    metadata.exclude_special_tokens = cfg.data.exclude_special_tokens
    run = lineage(prepared, sae, skipped)
    metadata.dataset_path = " + ".join(corpus["name"] for corpus in run["data"]["train"])
    metadata.continued_from = run.pop("base")
    metadata.continued_tokens = sae.trainee.step * sae.trainee.batch_size
    metadata.training_run = run


def _revision(start: WarmStart) -> str | None:
    """The commit of the repository that a base SAE was read from; None for what is in no repository."""
    if start.release is None:
        return None
    release = releases().get(start.release)
    if release is None:  # one of sae_lens's own, or a repository by its id
        known = pretrained_saes_directory.get_pretrained_saes_directory().get(start.release)
        return commit_in_cache(known.repo_id if known else start.release)
    return (
        None
        if release.repo_type == "package"
        else commit_in_cache(release.repo_id, release.repo_type, release.revision)
    )


def firing_frequency(results: Iterable[SAEEvaluation]) -> torch.Tensor:
    """How often each latent fires on all held-out tokens together, `[d_sae]`."""
    results = list(results)
    fired_f = torch.stack([result.fired_f for result in results if result.fired_f is not None]).sum(dim=0)
    return fired_f.double() / sum(result.metrics.n_tokens for result in results)


def data_facts(prepared: Prepared) -> dict[str, Any]:
    data = prepared.cfg.data
    if prepared.train:
        train = [corpus.facts() for corpus in prepared.train]
    else:
        train = [{**asdict(s), "name": s.label} for s in data.train]
    return {
        "train": train,
        "heldout": {name: corpus.facts() for name, corpus in prepared.heldout.items()},
        "context_size": next(iter(prepared.heldout.values())).context_size,
        "packed": data.packed,
        "isolate_documents": data.isolate_documents,
        "exclude_special_tokens": data.exclude_special_tokens,
    }


def _phases(prepared: Prepared, sae: PreparedSAE) -> list[dict[str, Any]]:
    batch_size = prepared.cfg.activations.batch_size
    return [
        {**asdict(p.phase), "tokens": p.steps * batch_size, "steps": p.steps, "lr_end": p.phase.final_lr}
        for p in sae.trainee.plan
    ]


def result_document(
    prepared: Prepared, sae: PreparedSAE, result: SAEResult, skipped: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """`result.json`: plain data, every figure that was measured, with the lineage that `set_metadata` wrote down."""
    trainee, cfg, metadata = sae.trainee, prepared.cfg, sae.trainee.sae.cfg.metadata
    run = metadata.training_run
    document: dict[str, Any] = plain(
        {
            "schema": SCHEMA,
            "kind": "training",
            "name": sae.run.name,
            "hook_name": sae.hook_name,
            "architecture": trainee.sae.cfg.architecture(),
            "d_in": trainee.sae.cfg.d_in,
            "d_sae": trainee.sae.cfg.d_sae,
            "k": getattr(trainee.sae.cfg, "k", None),
            "base": metadata.continued_from,
            "model": {
                "name": metadata.model_name,
                "class_name": metadata.model_class_name,
                "dtype": str(next(iter(prepared.model.parameters())).dtype).removeprefix("torch."),
                "device": cfg.model.device,
                "kwargs": cfg.model.kwargs,
            },
            "batch_blocks": cfg.activations.batch_blocks,
            "seed": cfg.seed,
            "data": run["data"],
            "batch_size": cfg.activations.batch_size,
            "activations_dtype": cfg.activations.dtype,
            "phases": run["phases"],
            "dead_after_steps": sae.run.training.dead_after_steps,
            "unit_decoder_every": sae.run.training.unit_decoder_every,
            "guard": None if sae.run.training.guard is None else asdict(sae.run.training.guard),
            "calibration": trainee.calibration,
            "events": [*trainee.events, *({"kind": "skipped", **row} for row in skipped)],
            "history": trainee.history,
            "evaluations": trainee.evaluations,
            "before": {name: e.to_dict() for name, e in result.before.items()},
            "after": {name: e.to_dict() for name, e in result.after.items()},
            "gate": None if result.gate is None else result.gate.to_dict(),
            "tokens": trainee.step * trainee.batch_size,
            "steps": trainee.step,
            "seconds": seconds,
            "versions": versions(),
        }
    )
    return document
