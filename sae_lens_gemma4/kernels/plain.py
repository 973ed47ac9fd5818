"""The kernels as one would write them down: what the fast ones are held against, and what runs everywhere.

Everything is dense and nothing is clever. Signatures and meanings are those of `cpu.py`.
"""

from __future__ import annotations

import torch

from sae_lens_gemma4.kernels.agreement import share, smallest
from sae_lens_gemma4.kernels.pattern import Pattern
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.kernels.selection import Selection, vouched


def sums(pattern: Pattern, weight_e: torch.Tensor, table_cd: torch.Tensor) -> torch.Tensor:
    """`out[r] = Σ weight_e · table_cd[column_e]` over the entries of each row: `[rows, d]` in the table's dtype."""
    wide_cd = _wide(table_cd)
    out_rd = wide_cd.new_zeros(pattern.n_rows, table_cd.shape[1])
    out_rd.index_add_(0, pattern.row_e(), weight_e.to(wide_cd.dtype)[:, None] * wide_cd[pattern.column_e])
    return out_rd.to(table_cd.dtype)


def dots(pattern: Pattern, left_rd: torch.Tensor, table_cd: torch.Tensor) -> torch.Tensor:
    """`out[e] = left_rd[row of e] · table_cd[column_e]`: `[e]` in the table's dtype."""
    return (_wide(left_rd)[pattern.row_e()] * _wide(table_cd)[pattern.column_e]).sum(dim=1).to(table_cd.dtype)


def batch_topk(
    x_nd: torch.Tensor,
    W_fd: torch.Tensor,
    b_f: torch.Tensor,
    scale_f: torch.Tensor | None,
    k_total: int,
    bound: torch.Tensor | float | None = None,  # noqa: ARG001
    ranks: Ranks = ALONE,
) -> Selection:
    """The `k_total` largest positive activations of a batch; of equals at the end, the first tokens' first latents."""
    pre_nf, act_nf = _activations(x_nd, W_fd, b_f, scale_f)
    order = act_nf.flatten().sort(descending=True, stable=True).indices[:k_total]
    chosen = _selection(pre_nf, act_nf, order, positive=True)
    if ranks.world == 1:
        return chosen
    mine = share(chosen.act_e, k_total, ranks)
    chosen = _selection(pre_nf, act_nf, order[: mine.n_mine], positive=True)
    return chosen._replace(smallest=smallest(chosen.smallest, ranks))


def row_topk(
    x_nd: torch.Tensor,
    W_fd: torch.Tensor,
    b_f: torch.Tensor,
    scale_f: torch.Tensor | None,
    k: int,
    latents: torch.Tensor | None = None,
    *,
    positive: bool,
) -> Selection:
    """The `k` largest activations of each token, among `latents` (ascending) if given; of equals the first latents."""
    pre_nf, act_nf = _activations(x_nd, W_fd, b_f, scale_f)
    asked = torch.arange(len(W_fd), device=W_fd.device) if latents is None else latents
    best_nk = asked[act_nf[:, asked].sort(dim=1, descending=True, stable=True).indices[:, :k]]
    flat = (torch.arange(len(x_nd), device=x_nd.device)[:, None] * len(W_fd) + best_nk).flatten()
    return _selection(pre_nf, act_nf, flat, positive=positive)


def _activations(
    x_nd: torch.Tensor, W_fd: torch.Tensor, b_f: torch.Tensor, scale_f: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    pre_nf = _wide(x_nd) @ _wide(W_fd).T + b_f
    return pre_nf, pre_nf if scale_f is None else pre_nf * scale_f


def _selection(pre_nf: torch.Tensor, act_nf: torch.Tensor, flat_e: torch.Tensor, *, positive: bool) -> Selection:
    flat_e = flat_e.sort().values
    act_e = act_nf.flatten()[flat_e]
    if positive:
        flat_e, act_e = flat_e[act_e > 0], act_e[act_e > 0]
    n_latents = act_nf.shape[1]
    smallest = act_e.min() if len(act_e) else act_e.new_tensor(torch.inf)
    chosen = Selection(flat_e // n_latents, flat_e % n_latents, pre_nf.flatten()[flat_e], act_e, smallest)
    return vouched(chosen, act_nf)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
