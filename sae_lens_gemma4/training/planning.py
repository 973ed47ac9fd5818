"""What a run would take, before anybody pays for it: tokens, steps, and bytes of memory and disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.training.preparing import Prepared, PreparedSAE

_BYTES = {"float32": 4, "bfloat16": 2}


def plan(prepared: Prepared) -> dict[str, Any]:
    """Tokens, steps, and bytes of memory and disk, for a dry run to show.

    Memory is that of the SAEs (weights, gradients and two moments; weights and moments again where a guard may return
    to them, and weights where the best state is kept), of the activations that are mixed, and of the widest SAE's step,
    which holds some seven times batch_size × d_sae floats. The model and its forward pass come on top.
    """
    cfg, a = prepared.cfg, prepared.cfg.activations
    rows = [_plan_of(sae, a.batch_size) for sae in prepared.saes]
    widths = {sae.hook_name: sae.trainee.sae.cfg.d_in for sae in prepared.saes}
    chunk = a.buffer_blocks * cfg.data.context_size * next(iter(prepared.model.parameters())).element_size()
    mixed = (chunk + a.batch_size * _BYTES[a.dtype]) * sum(widths.values())
    step = max(7 * a.batch_size * sae.trainee.sae.cfg.d_sae * 4 for sae in prepared.saes)
    cache = 0
    if a.cache is not None and isinstance(prepared.text, Corpus):
        cache = prepared.text.n_tokens * sum(widths.values()) * _BYTES[a.dtype]
    checkpoint = sum(row["state_bytes"] for row in rows)
    return {
        "saes": rows,
        "training_tokens": prepared.text.n_tokens if isinstance(prepared.text, Corpus) else None,
        "heldout_tokens": {name: corpus.n_tokens for name, corpus in prepared.heldout.items()},
        "memory_bytes": sum(row["memory_bytes"] for row in rows) + mixed + step,
        "disk_bytes": sum(row["weights_bytes"] for row in rows) + 2 * checkpoint + cache,
        "cache_bytes": cache,
        "free_bytes": shutil.disk_usage(_existing(Path(cfg.output))).free,
    }


def _plan_of(sae: PreparedSAE, batch_size: int) -> dict[str, Any]:
    trainee, training = sae.trainee, sae.run.training
    weights = sum(p.numel() * p.element_size() for p in trainee.sae.parameters())
    guarded = training.guard is not None and any(p.resampling is not None for p in training.phases)
    state = 3 * weights + weights * training.needs_best
    return {
        "name": sae.run.name,
        "hook_name": sae.hook_name,
        "architecture": trainee.sae.cfg.architecture(),
        "d_in": trainee.sae.cfg.d_in,
        "d_sae": trainee.sae.cfg.d_sae,
        "phases": [{"name": p.phase.name, "steps": p.steps, "tokens": p.steps * batch_size} for p in trainee.plan],
        "tokens": sum(p.steps for p in trainee.plan) * batch_size,
        "weights_bytes": weights,
        "state_bytes": state,
        "memory_bytes": 4 * weights + weights * training.needs_best + (3 * weights if guarded else 0),
    }


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
