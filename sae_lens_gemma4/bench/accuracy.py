"""How far a fast step's loss and gradients are from sae_lens's, and how far each of them is from float64.

Two float32 computations of one thing differ; a third in float64 says which of them is to blame. Where two computations
did not select the same latents, because the k-th activation and the next are closer than float32 can tell, their
gradients differ by whole latents. So batches are drawn until all three select the same, five at most; how many it took,
and what was selected by one alone on the last of them, is said beside the differences.

Shapes: `n` tokens, `d` d_in, `f` latents, `e` entries selected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput

from sae_lens_gemma4.bench.contestants import OURS, STOCK, training_sae
from sae_lens_gemma4.bench.data import Batches, Start

_TRIES = 5


@dataclass(frozen=True)
class Difference:
    """Of two computations of one step.

    Attributes:
        loss: |a − b| / |b|.
        gradients: ‖a − b‖ / ‖b‖ of each parameter's gradient, by name.
        selected_apart: entries (token, latent) that one selected and the other did not.
    """

    loss: float
    gradients: dict[str, float]
    selected_apart: int


@dataclass(frozen=True)
class Accuracy:
    """One batch through three SAEs with the same weights, all in full float32 but the reference.

    Attributes:
        batches: drawn until this one.
    """

    dead: bool
    batches: int
    ours_from_stock: Difference
    ours_from_float64: Difference
    stock_from_float64: Difference


@dataclass(frozen=True)
class _Step:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    selected_e: torch.Tensor  # token · f + latent, ascending


def accuracy(start: Start, batches: Batches, first: int, *, dead: bool) -> Accuracy:
    """Compare them on the first batch, from number `first` on, on which they select the same."""
    for tried in range(_TRIES):
        found = _on_one_batch(start, batches[first + tried], dead, tried + 1)
        if not (found.ours_from_float64.selected_apart or found.stock_from_float64.selected_apart):
            break
    return found


def _on_one_batch(start: Start, x_nd: torch.Tensor, dead: bool, number: int) -> Accuracy:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        stock, ours = (_step(training_sae(whose, start), start, x_nd) for whose in (STOCK, OURS))
        wide = {name: tensor.double() for name, tensor in start.state.items()}
        exact = _step(training_sae(STOCK, replace(start, state=wide), "float64"), start, x_nd.double())
    finally:
        torch.set_float32_matmul_precision(precision)
    return Accuracy(dead, number, _difference(ours, stock), _difference(ours, exact), _difference(stock, exact))


@torch.enable_grad()
def _step(sae: TrainingSAE[Any], start: Start, x_nd: torch.Tensor) -> _Step:
    output = sae.train().training_forward_pass(
        TrainStepInput(
            sae_in=x_nd, coefficients={}, dead_neuron_mask=start.dead_f, n_training_steps=0, is_logging_step=False
        )
    )
    output.loss.backward()
    gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    return _Step(output.loss.detach(), gradients, _selected(output.feature_acts.detach()))


def _selected(acts_nf: torch.Tensor) -> torch.Tensor:
    if not acts_nf.is_sparse:
        return acts_nf.flatten().nonzero()[:, 0]
    acts_nf = acts_nf.coalesce()
    token_e, latent_e = acts_nf.indices()[:, acts_nf.values() > 0]
    selected_e: torch.Tensor = token_e * acts_nf.shape[1] + latent_e
    return selected_e


def _difference(a: _Step, b: _Step) -> Difference:
    both, shared = torch.cat([a.selected_e, b.selected_e]).unique(return_counts=True)
    return Difference(
        loss=_relative(a.loss, b.loss),
        gradients={name: _relative(a.gradients[name], b.gradients[name]) for name in b.gradients},
        selected_apart=int((shared == 1).sum()) if len(both) else 0,
    )


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64; 0 where both are nothing."""
    size = torch.linalg.vector_norm(b.double())
    off = torch.linalg.vector_norm(a.double() - b.double())
    return 0.0 if off == 0 else float(off / size)
