"""Training SAEs of sae_lens whose forward pass computes what they select, and nothing else.

`SparseStep` goes in front of one of sae_lens's TopK-family classes and takes its forward pass over; what comes out is
what sae_lens's trainer reads, with activations as a sparse tensor. Where somebody looks at the dense ones (a hook), or
the SAE normalises its input, stock's own pass runs instead.

The encoder's weights lie in memory latent by latent, as the decoder's do: that is how candidates read them and
gradients write them. Saved files are contiguous, as everywhere.

Shapes as in `sparse_loss.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import nn

from sae_lens_gemma4.errors import SAEError
from sae_lens_gemma4.kernels.dispatch import Kernels, kernels_for
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.kernels.selection import Selection, vouched
from sae_lens_gemma4.training.sparse_loss import Auxiliary, Weights, attach, sparse_loss

BOUND = 0.96
"""The last step's smallest activation, times this, is the guess at what the next one's is no less than."""
_AUX_LOSS = "auxiliary_reconstruction_loss"


@dataclass
class SparseStepInput(TrainStepInput):
    """What `SparseTrainer` adds.

    Attributes:
        dead_latents: ascending, so that nobody has to wait for a device to count them.
        ranks: who has the other parts of the batch.
    """

    dead_latents: torch.Tensor | None = None
    ranks: Ranks = ALONE


class SparseStep(TopKTrainingSAE):
    """A forward pass through the few latents that are selected; see the module."""

    k_aux: int | None = None
    """Dead latents that a token's auxiliary loss uses; d_in / 2 if None, as in sae_lens."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc = nn.Parameter(_latent_by_latent(self.W_enc.data))

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = _latent_by_latent(state_dict["W_enc"])

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As stock's, in float32 at least, whatever autocast says, and with these differences:

        `feature_acts` and `hidden_pre` are sparse `[n, f]`, both of the latents selected (`hidden_pre` before any
        rescaling), and like the input they have no gradient: losses and `sae_out` have, once.

        Raises:
            SAEError: an input that wants a gradient; or stock's pass is needed, and `k_aux` set or the batch in several
                processes, which stock's does not know.
        """
        if not self._is_bare(step_input.sae_in):
            if self.k_aux is not None or _ranks(step_input).world > 1:
                raise SAEError(
                    "k_aux and training in several processes are known to the sparse step alone; hooks, a "
                    "normalisation in the SAE or inputs that are not [n, d] forbid them."
                )
            return super().training_forward_pass(step_input)
        if step_input.sae_in.requires_grad:
            raise SAEError("A sparse step gives its input no gradient; detach it, or hook the SAE for stock's step.")
        with torch.autocast(self.W_dec.device.type, enabled=False):
            output: TrainStepOutput = self._sparse_forward_pass(step_input)
            return output

    def _is_bare(self, sae_in: torch.Tensor) -> bool:
        """Whether nobody wants to see or change what lies between input and loss."""
        hooks = any(
            hook._forward_hooks or hook._forward_pre_hooks or hook._backward_hooks or hook._backward_pre_hooks
            for hook in self.hook_dict.values()
        )
        return (
            sae_in.ndim == 2
            and not hooks
            and self.cfg.normalize_activations not in ("constant_norm_rescale", "layer_norm")
        )

    def _kernels(self, ranks: Ranks = ALONE) -> Kernels:
        return kernels_for(self.W_dec.device, self.dtype, ranks)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # there is nothing for it to fuse
    def _sparse_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        wide = torch.promote_types(self.dtype, torch.float32)
        kernels = self._kernels()
        with torch.no_grad():
            weights = Weights(*(t.to(wide).contiguous() for t in (self.W_enc.T, self.b_enc, self.W_dec, self.b_dec)))
            target_nd = step_input.sae_in.to(wide).contiguous()
            x_nd = target_nd - weights.b_dec_d if self.cfg.apply_b_dec_to_input else target_nd
            scale_f = weights.W_dec_fd.norm(dim=1) if self.cfg.rescale_acts_by_decoder_norm else None
            selected = self._select(x_nd, weights, scale_f, _ranks(step_input))
            if scale_f is None:  # which shows what is not finite in the decoder
                selected = vouched(selected, weights.W_dec_fd)
            auxiliary = [
                Auxiliary(
                    kernels.row_topk(x_nd, weights.W_enc_fd, weights.b_enc_f, scale_f, k, latents, positive=False),
                    width,
                    coefficient,
                )
                for width, latents, k, coefficient in self._auxiliary_losses(step_input)
            ]
            loss = sparse_loss(
                kernels,
                weights,
                target_nd,
                x_nd,
                selected,
                self.widths,
                auxiliary,
                subtracts_b_dec=self.cfg.apply_b_dec_to_input,
            )
        losses_m, losses_a, out_nd = attach(loss, self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        losses = {"mse_loss": losses_m[-1], _AUX_LOSS: losses_a.sum()}
        losses |= {f"inner_mse_loss_{width}": losses_m[i] for i, width in enumerate(self.widths[:-1])}
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=out_nd,
            feature_acts=self._sparse(selected, selected.act_e, len(x_nd)),
            hidden_pre=self._sparse(selected, selected.pre_e, len(x_nd)),
            loss=sum(losses.values(), losses_m.new_zeros(())),
            losses=losses,
        )

    @property
    def widths(self) -> list[int]:
        """Matryoshka widths, ascending, the last one all latents."""
        return list(getattr(self.cfg, "matryoshka_widths", [self.cfg.d_sae]))

    def _select(
        self,
        x_nd: torch.Tensor,
        weights: Weights,
        scale_f: torch.Tensor | None,
        ranks: Ranks,  # noqa: ARG002
    ) -> Selection:
        return self._kernels().row_topk(
            x_nd, weights.W_enc_fd, weights.b_enc_f, scale_f, int(self.cfg.k), positive=True
        )

    def _auxiliary_losses(self, step_input: TrainStepInput) -> list[tuple[int, torch.Tensor, int, float]]:
        """Number of the width, dead latents, how many of them a token uses, and the coefficient; of each loss there is.

        One for the whole SAE, or one for each width with dead latents of its own (`use_matryoshka_aux_loss`).
        """
        dead = getattr(step_input, "dead_latents", None)
        if dead is None and step_input.dead_neuron_mask is not None:
            dead = step_input.dead_neuron_mask.nonzero()[:, 0]
        if dead is None or len(dead) == 0:
            return []
        widths = self.widths
        parts = [(len(widths) - 1, dead)]
        if getattr(self.cfg, "use_matryoshka_aux_loss", False):
            parts = [(i, dead[(low <= dead) & (dead < high)]) for i, (low, high) in enumerate(pairwise([0, *widths]))]
        k_aux = self.k_aux if self.k_aux is not None else max(1, self.cfg.d_in // 2)
        return [
            (width, latents, min(k_aux, len(latents)), self.cfg.aux_loss_coefficient * min(len(latents) / k_aux, 1.0))
            for width, latents in parts
            if len(latents)
        ]

    def _sparse(self, selected: Selection, value_e: torch.Tensor, n: int) -> torch.Tensor:
        return torch.sparse_coo_tensor(
            torch.stack([selected.token_e, selected.latent_e]),
            value_e.to(self.dtype),
            (n, self.cfg.d_sae),
            is_coalesced=value_e.device.type == "cpu",  # elsewhere entries that stand for nothing may repeat
            check_invariants=False,
        )


class SparseBatchStep(SparseStep, BatchTopKTrainingSAE):
    """`SparseStep` for batch top-k: the smallest activation selected moves the running threshold, and is remembered as
    a guess at the next one."""

    smallest: torch.Tensor | None = None
    """Of the last step; infinity if it selected nothing."""

    def _select(self, x_nd: torch.Tensor, weights: Weights, scale_f: torch.Tensor | None, ranks: Ranks) -> Selection:
        bound = None if self.smallest is None else BOUND * self.smallest
        k_total = int(self.cfg.k * len(x_nd) * ranks.world)
        selected = self._kernels(ranks).batch_topk(
            x_nd, weights.W_enc_fd, weights.b_enc_f, scale_f, k_total, bound, ranks
        )
        self.smallest = selected.smallest
        return selected

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _sparse_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output: TrainStepOutput = super()._sparse_forward_pass(step_input)
        assert self.smallest is not None
        self.follow_threshold(self.smallest)
        output.metrics["topk_threshold"] = self.topk_threshold
        return output

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
        self.smallest = torch.where(acts_topk > 0, acts_topk, torch.inf).min()
        self.follow_threshold(self.smallest)

    @torch.no_grad()
    def follow_threshold(self, smallest: torch.Tensor) -> None:
        """Move the running threshold towards the smallest activation selected, as stock does; infinity moves none."""
        rate, smallest = self.cfg.topk_threshold_lr, smallest.to(self.topk_threshold.dtype)
        moved = (1 - rate) * self.topk_threshold + rate * smallest
        self.topk_threshold = torch.where(smallest.isfinite(), moved, self.topk_threshold)


def _ranks(step_input: TrainStepInput) -> Ranks:
    return step_input.ranks if isinstance(step_input, SparseStepInput) else ALONE


def _latent_by_latent(W_enc: torch.Tensor) -> torch.Tensor:
    """The same `[d, f]` matrix, each column in one piece."""
    return W_enc.T.contiguous().T
