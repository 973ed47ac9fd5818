"""sae_lens's trainer without its dense passes.

Three things besides the SAE's own pass cost time in `SAETrainer._train_step` (training/sae_trainer.py): counting who
fired by way of [tokens, latents] matrices, an Adam that goes over its bytes several times, and a pass over the
gradients for clipping alone. Here firing is counted from the entries, Adam is torch's fused one, and the clipping
factor is handed to it in the form in which it takes a loss scale.

Everything else, from schedules to checkpoints, is stock's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.training.sparse_step import SparseStepInput

_MAX_NORM = 1.0
"""What stock clips the gradient's norm to."""


class SparseTrainer(SAETrainer[TrainingSAE[Any], Any]):
    """Stock's trainer; steps are its steps up to what is rounded off (in bfloat16 SAEs, less is).

    Args:
        ranks: who has the other parts of each batch, all of one size. Steps and losses are those of the whole batch,
            and so is `cfg.train_batch_size_samples`.
    """

    def __init__(self, *args: Any, ranks: Ranks = ALONE, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks = ranks
        self._fuse()
        self._n_dead: _Later | None = None

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """As stock's. A checkpoint of any trainer will do, with moments in any order of dimensions."""
        super().load_trainer_state(checkpoint_path)
        self._fuse()

    def _fuse(self) -> None:
        """Let Adam be torch's fused one, which goes through memory and asks no tensor for its strides."""
        for group in self.optimizer.param_groups:
            group["fused"] = True
        for parameter, state in self.optimizer.state.items():
            state.update({name: placed(tensor, name, parameter) for name, tensor in state.items()})

    def _train_step(self, sae: TrainingSAE[Any], sae_in: torch.Tensor) -> TrainStepOutput:
        sae.train()
        with self.autocast_if_enabled:
            output = sae.training_forward_pass(
                SparseStepInput(
                    sae_in=sae_in,
                    dead_neuron_mask=self.dead_neurons,
                    coefficients=self.get_coefficients(),
                    n_training_steps=self.n_training_steps,
                    is_logging_step=self._is_logging_step(),
                    dead_latents=self._dead_latents(),
                    ranks=self.ranks,
                )
            )
        self.n_training_samples += (self.ranks.world - 1) * len(sae_in)  # stock's `step` has counted this part
        self._count(output.feature_acts)
        output.loss.backward()
        self._unite(output, sae)
        self._clip(sae)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    def _dead_latents(self) -> torch.Tensor:
        """Ascending. How many there are was asked for in the step before, so that nothing waits for the device."""
        dead_f = self.dead_neurons
        if dead_f.device.type != "cuda":
            return dead_f.nonzero()[:, 0]
        known = self._n_dead is not None and self._n_dead.is_of(self.n_forward_passes_since_fired)
        n_dead = self._n_dead.get() if known and self._n_dead is not None else int(dead_f.sum())
        return torch.nonzero_static(dead_f, size=n_dead)[:, 0]

    @torch.no_grad()
    def _unite(self, output: TrainStepOutput, sae: TrainingSAE[Any]) -> None:
        """Losses and gradients of the whole batch, from those of each rank's part."""
        names, losses = list(output.losses), [output.loss, *output.losses.values()]
        means = self.ranks.mean(torch.stack([loss.detach() for loss in losses]))
        output.loss, output.losses = means[0], dict(zip(names, means[1:], strict=True))
        self.ranks.means([p.grad for p in sae.parameters() if p.grad is not None])

    @torch.no_grad()
    def _count(self, acts_nf: torch.Tensor) -> None:
        """Who fired, how often, and how long ago."""
        if acts_nf.is_sparse:
            fired_e = (acts_nf._values() > 0).to(self.act_freq_scores.dtype)
            fired_f = torch.zeros_like(self.act_freq_scores).index_add_(0, acts_nf._indices()[1], fired_e)
        else:
            fired_f = (acts_nf > 0).sum(dim=0).to(self.act_freq_scores.dtype)
        self.ranks.total(fired_f)
        self.n_forward_passes_since_fired.add_(1).masked_fill_(fired_f > 0, 0)
        self.act_freq_scores += fired_f
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        if fired_f.is_cuda:
            self._n_dead = _Later(self.dead_neurons.sum(), self.n_forward_passes_since_fired)

    @torch.no_grad()
    def _clip(self, sae: TrainingSAE[Any]) -> None:
        """`clip_grad_norm_`, but the gradients are divided by `grad_scale` where Adam reads them."""
        grads = [p.grad for p in sae.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())
        self.optimizer.grad_scale = ((norm + 1e-6) / _MAX_NORM).clamp(min=1.0)  # type: ignore[attr-defined]


def placed(tensor: torch.Tensor, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of what Adam keeps of a parameter, where the parameter is and in its order in memory."""
    return tensor.to(parameter.device, copy=True) if name == "step" else torch.empty_like(parameter).copy_(tensor)


class _Later:
    """A number on its way from the device, and what it was counted in."""

    def __init__(self, number: torch.Tensor, counted: torch.Tensor) -> None:
        self._counted, self._version = counted, counted._version
        self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
        self._number.copy_(number, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def is_of(self, counted: torch.Tensor) -> bool:
        """Whether it was counted in this tensor, and that was not written to since."""
        return counted is self._counted and counted._version == self._version

    def get(self) -> int:
        self._arrived.synchronize()
        return int(self._number)
