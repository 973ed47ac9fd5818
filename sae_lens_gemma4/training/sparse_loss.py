"""The loss of a TopK-family SAE and its gradients, from the few latents that a step selects.

Stock multiplies [tokens, latents] matrices of which 0.15 % are not zero six times over, and keeps seven of them for the
backward pass. Here nothing of that size exists. What a step selects are entries (token, latent, pre-activation);
reconstructions of all Matryoshka widths are sums of decoder rows by (token, width); and every weight's gradient is a
sum over the entries of its latent. Kept for the backward pass are the entries and the errors, k·n numbers and m·n·d.

With `rescale_acts_by_decoder_norm` a latent is selected by its pre-activation times its decoder row's norm and decoded
divided by it, so that the norm cancels: what is decoded is the pre-activation, and no gradient comes to the norm but
what is rounded off (stock computes both halves and adds them up).

Shapes: `n` tokens, `d` the input's width, `f` latents, `m` widths, `a` auxiliary losses, `e` entries, `r` rows of the
table of errors: one for each token and width, then one for each token and auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sae_lens_gemma4.kernels.dispatch import Kernels
from sae_lens_gemma4.kernels.pattern import Pattern, by_column, pattern
from sae_lens_gemma4.kernels.selection import Selection

_BLOCK = 64


class Weights(NamedTuple):
    """An SAE's weights; the encoder's latent by latent."""

    W_enc_fd: torch.Tensor
    b_enc_f: torch.Tensor
    W_dec_fd: torch.Tensor
    b_dec_d: torch.Tensor


class Auxiliary(NamedTuple):
    """An auxiliary loss (Gao et al., 2406.04093, A.2): dead latents reconstruct what is left of a width's error.

    Attributes:
        selected: each token's best dead latents.
        width: number of the width whose error it is.
        coefficient: what its squared error is multiplied with.
    """

    selected: Selection
    width: int
    coefficient: float


@dataclass
class SparseLoss:
    """Losses of one step, and all that their gradients need.

    Attributes:
        losses_m: squared error of each width's reconstruction, the mean over tokens.
        losses_a: the auxiliary losses.
        out_nd: the reconstruction of the last width.
    """

    kernels: Kernels
    weights: Weights
    x_nd: torch.Tensor
    error_nmd: torch.Tensor
    rows: Pattern  # entries by row of the table of errors
    token_e: torch.Tensor
    decoded_e: torch.Tensor  # pre-activations; 0 for entries that stand for nothing
    nothing_e: torch.Tensor  # which of the selection's, the first entries, these are
    sound: torch.Tensor  # 1, or NaN if weights or inputs are not finite
    auxiliary: list[Auxiliary]
    aux_error_and: torch.Tensor
    subtracts_b_dec: bool
    losses_m: torch.Tensor
    losses_a: torch.Tensor
    out_nd: torch.Tensor

    def gradients(
        self, grad_m: torch.Tensor | None, grad_a: torch.Tensor | None, grad_out_nd: torch.Tensor | None
    ) -> Weights:
        """Those of the weights, given those of `losses_m`, `losses_a` and `out_nd`; None stands for 0."""
        kernels, weights = self.kernels, self.weights
        n, m, d = self.error_nmd.shape
        n_aux, n_latents = len(self.auxiliary), len(weights.W_dec_fd)
        table_rd = self.error_nmd.new_zeros((m + n_aux) * n, d)
        grad_nmd, grad_and = table_rd[: n * m].view(n, m, d), table_rd[n * m :].view(n_aux, n, d)
        if grad_m is not None:
            torch.mul(self.error_nmd, (2 / n) * self.sound * grad_m[:, None], out=grad_nmd)
        if grad_out_nd is not None:
            grad_nmd[:, -1] += grad_out_nd
        for width in reversed(range(m - 1)):  # a latent is part of its own width and of all that follow
            grad_nmd[:, width] += grad_nmd[:, width + 1]
        if grad_a is not None and n_aux:
            coefficient_a = grad_a * _numbers([2 / n * aux.coefficient for aux in self.auxiliary], grad_a)
            torch.mul(self.aux_error_and, coefficient_a[:, None, None], out=grad_and)

        grad_pre_e = kernels.dots(self.rows, table_rd, weights.W_dec_fd)
        grad_pre_e[: len(self.nothing_e)].masked_fill_(self.nothing_e, 0)
        latent_e = self.rows.column_e
        order = by_column(latent_e)
        by_latent = pattern(latent_e[order], self.rows.row_e()[order], n_latents)
        grad_W_dec = kernels.sums(by_latent, self.decoded_e[order], table_rd)
        by_token = Pattern(by_latent.offset_r, self.token_e[order])
        grad_W_enc = kernels.sums(by_token, grad_pre_e[order], self.x_nd)
        grad_b_enc = torch.segment_reduce(grad_pre_e[order], "sum", offsets=by_latent.offset_r, initial=0, unsafe=True)
        grad_b_dec = grad_nmd[:, 0].sum(dim=0)
        if self.subtracts_b_dec:
            grad_b_dec = grad_b_dec - _weighted_sum(grad_b_enc, weights.W_enc_fd)
        return Weights(grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec)


def sparse_loss(
    kernels: Kernels,
    weights: Weights,
    target_nd: torch.Tensor,
    x_nd: torch.Tensor,
    selected: Selection,
    widths: list[int],
    auxiliary: list[Auxiliary],
    *,
    subtracts_b_dec: bool,
) -> SparseLoss:
    """Reconstruct from what was selected.

    Args:
        target_nd: what is reconstructed.
        x_nd: what was encoded: the same, less `b_dec` if `subtracts_b_dec`.
        widths: Matryoshka widths, ascending, the last one all latents.
    """
    n, m = len(x_nd), len(widths)
    width_e = torch.bucketize(selected.latent_e, _numbers(widths, selected.latent_e), right=True)
    main = pattern(selected.token_e * m + width_e, selected.latent_e, n * m)
    decoded_e = selected.pre_e.masked_fill(selected.act_e <= 0, 0)
    error_nmd = kernels.sums(main, decoded_e, weights.W_dec_fd).view(n, m, -1)
    error_nmd[:, 0] += weights.b_dec_d - target_nd
    for width in range(1, m):
        error_nmd[:, width] += error_nmd[:, width - 1]

    rows, tokens, decoded = [main.row_e()], [selected.token_e], [decoded_e]
    aux_error_and = error_nmd.new_empty(len(auxiliary), *x_nd.shape)
    for number, aux in enumerate(auxiliary):
        chosen = aux.selected
        told_nd = kernels.sums(pattern(chosen.token_e, chosen.latent_e, n), chosen.pre_e, weights.W_dec_fd)
        torch.add(told_nd, error_nmd[:, aux.width], out=aux_error_and[number])
        rows.append(chosen.token_e + (m + number) * n)
        tokens.append(chosen.token_e)
        decoded.append(chosen.pre_e)
    latent_e = torch.cat([selected.latent_e, *(aux.selected.latent_e for aux in auxiliary)])
    coefficient_a = _numbers([aux.coefficient for aux in auxiliary], error_nmd)
    sound = torch.ones_like(selected.smallest).masked_fill(selected.smallest.isnan(), torch.nan).to(error_nmd.dtype)
    return SparseLoss(
        kernels=kernels,
        weights=weights,
        x_nd=x_nd,
        error_nmd=error_nmd,
        rows=pattern(torch.cat(rows), latent_e, (m + len(auxiliary)) * n),
        token_e=torch.cat(tokens),
        decoded_e=torch.cat(decoded),
        nothing_e=selected.act_e == 0,
        sound=sound,
        auxiliary=auxiliary,
        aux_error_and=aux_error_and,
        subtracts_b_dec=subtracts_b_dec,
        losses_m=sound * _squares(error_nmd.movedim(1, 0)) / n,
        losses_a=coefficient_a * _squares(aux_error_and) / n,
        out_nd=error_nmd[:, -1] + target_nd,
    )


class _Attached(torch.autograd.Function):
    """A `SparseLoss` as autograd sees it: a function of the weights."""

    @staticmethod
    def forward(
        ctx: Any, loss: SparseLoss, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.loss, ctx.dtypes = loss, [parameter.dtype for parameter in parameters]
        ctx.set_materialize_grads(False)
        return loss.losses_m, loss.losses_a, loss.out_nd.to(parameters[0].dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if ctx.loss is None:
            raise RuntimeError("The loss of a sparse step can be differentiated once.")
        W_enc_fd, *others = ctx.loss.gradients(*grads)
        ctx.loss = None
        return None, *(grad.to(dtype) for grad, dtype in zip((W_enc_fd.T, *others), ctx.dtypes, strict=True))


def attach(
    loss: SparseLoss, W_enc: torch.Tensor, b_enc: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`losses_m`, `losses_a` and `out_nd` with their gradients to these parameters (`W_enc` is `[d, f]`)."""
    attached: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _Attached.apply(  # type: ignore[no-untyped-call]
        loss, W_enc, b_enc, W_dec, b_dec
    )
    return attached


def _numbers(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A few numbers on a device, which `torch.tensor` would copy there and wait for."""
    numbers = [torch.full((), value, dtype=like.dtype, device=like.device) for value in values]
    return torch.stack(numbers) if numbers else like.new_empty(0)


def _weighted_sum(weight_f: torch.Tensor, table_fd: torch.Tensor) -> torch.Tensor:
    """`weight_f @ table_fd`, in blocks: over thousands of rows at once float32 would lose a digit."""
    whole = len(weight_f) - len(weight_f) % _BLOCK
    weights, rows = weight_f[:whole].view(-1, 1, _BLOCK), table_fd[:whole].view(-1, _BLOCK, table_fd.shape[1])
    return torch.bmm(weights, rows).sum(dim=0)[0] + weight_f[whole:] @ table_fd[whole:]


def _squares(error_wnd: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each `[n, d]`, row by row: over all of it at once float32 would lose digits."""
    norm_wn: torch.Tensor = torch.linalg.vector_norm(error_wnd, dim=2)
    return norm_wn.square().sum(dim=1)
