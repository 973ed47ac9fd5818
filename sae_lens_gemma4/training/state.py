"""The state of a stock trainer as plain tensors and numbers.

sae_lens writes it as a pickle (`SAETrainer.save_trainer_state`) and leaves the SAE and the threshold's age out of it.
Here it is two dictionaries: tensors for safetensors, facts that JSON keeps exactly. A trainer that takes them up
computes the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_gemma4.training.trainer import placed

_COUNTS = ("act_freq_scores", "n_forward_passes_since_fired")
_NUMBERS = ("n_training_samples", "n_training_steps", "n_frac_active_samples")
_ADAM = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """Tensors by name, and the rest in a form that JSON keeps exactly."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As they lie in files: contiguous."""
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def part(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Those whose names begin with `name.`, by the rest of their names."""
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}


def trainer_state(trainer: SAETrainer[Any, Any]) -> State:
    """All that a trainer and its SAE have, as copies: weights, Adam's moments, counts, and where the schedule is."""
    sae, optimizer = trainer.sae, trainer.optimizer
    tensors = {f"sae.{name}": t for name, t in sae.state_dict().items()}
    for name, parameter in sae.named_parameters():
        tensors |= {f"adam.{name}.{moment}": t for moment, t in optimizer.state[parameter].items()}
    tensors |= {f"counts.{name}": getattr(trainer, name) for name in _COUNTS}
    facts = {
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "schedule": trainer.lr_scheduler.state_dict(),
        "coefficients": {name: scheduler.state_dict() for name, scheduler in trainer.coefficient_schedulers.items()},
        "threshold_updates": int(sae.threshold_updates) if hasattr(sae, "threshold_updates") else None,
        **{name: getattr(trainer, name) for name in _NUMBERS},
    }
    return State(copies(tensors), copy.deepcopy(facts))


def load_trainer_state(trainer: SAETrainer[Any, Any], state: State) -> None:
    """Let a new trainer, of the same SAE and the same phase, be where `state` was taken."""
    facts, sae, optimizer = copy.deepcopy(state.facts), trainer.sae, trainer.optimizer
    sae.load_state_dict(part(state.tensors, "sae"))
    if facts["threshold_updates"] is not None:
        sae.threshold_updates.fill_(facts["threshold_updates"])
    count_on(trainer, copies(part(state.tensors, "counts")) | {name: facts[name] for name in _NUMBERS})
    trainer.lr_scheduler.load_state_dict(facts["schedule"])
    for name, scheduler in trainer.coefficient_schedulers.items():
        scheduler.load_state_dict(facts["coefficients"][name])
    for group, saved in zip(optimizer.param_groups, facts["groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "fused"})  # how, not what
    for name, parameter in sae.named_parameters():
        moments = {m: t for m, t in part(state.tensors, f"adam.{name}").items() if m in _ADAM}
        optimizer.state[parameter] = {m: placed(t, m, parameter) for m, t in moments.items()}


def counts(trainer: SAETrainer[Any, Any]) -> dict[str, Any]:
    """Steps, samples, and when each latent last fired: what a new phase does not begin anew."""
    return {name: getattr(trainer, name) for name in (*_COUNTS, *_NUMBERS)}


def count_on(trainer: SAETrainer[Any, Any], counted: Mapping[str, Any]) -> None:
    """Let a new trainer go on from another's `counts`."""
    device = trainer.sae.device
    trainer.act_freq_scores = counted["act_freq_scores"].to(device)
    trainer.n_forward_passes_since_fired = counted["n_forward_passes_since_fired"].to(device)
    trainer.n_training_samples = counted["n_training_samples"]
    trainer.n_training_steps = counted["n_training_steps"]
    trainer.n_frac_active_samples = counted["n_frac_active_samples"]
