"""What an SAE is made of, beside how well it reconstructs: its nested widths, its two ways to choose latents, and how
far it has moved from another SAE.

Shapes: `t` tokens, `f` latents, `w` widths, `d` the activations' width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from sae_lens import SAE

from sae_lens_gemma4.errors import SAEError
from sae_lens_gemma4.evaluation.reading import CHUNK_LATENTS, Reading, decodes_linearly, float64, read

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def training_facts(sae: SAE[Any]) -> dict[str, Any]:
    """What the metadata say of how the SAE was trained: `k`, `matryoshka_widths`, … as far as they do.

    Raises:
        SAEError: a `k` that is no number, or `matryoshka_widths` that are no list of whole numbers.
    """
    details = sae.cfg.metadata.training_architecture_details
    facts = dict(details) if isinstance(details, dict) else {}
    if "k" not in facts and getattr(sae.cfg, "k", None):
        facts["k"] = sae.cfg.k
    k, widths = facts.get("k"), facts.get("matryoshka_widths")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int | float) or not 0 <= k < math.inf):
        raise SAEError(f"The SAE's metadata say k = {k!r}, which is no number of latents.")
    if widths is not None and not (isinstance(widths, list | tuple) and all(type(w) is int for w in widths)):
        raise SAEError(f"The SAE's metadata say matryoshka_widths = {widths!r}, which is no list of whole numbers.")
    return facts


def matryoshka_widths(sae: SAE[Any]) -> list[int]:
    """Ascending widths, `d_sae` the last; empty for an SAE that is not nested."""
    widths = training_facts(sae).get("matryoshka_widths") or []
    nested = sorted({w for w in widths if 0 < w < sae.cfg.d_sae})
    return [*nested, sae.cfg.d_sae] if nested else []


class WidthSums:
    """Squared error and active latents of reconstructions from the first latents only, per width."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = list(widths)
        self.sse_w = torch.zeros(len(widths), dtype=torch.float64)
        self.active_w = torch.zeros(len(widths), dtype=torch.float64)
        self.n_tokens = 0

    def update(self, reading: Reading) -> None:
        if reading.x_hat_wtd is None:
            return
        self.n_tokens += len(reading.x_td)
        x_td = float64(reading.x_td)
        for i, x_hat_td in enumerate(reading.x_hat_wtd):
            self.sse_w[i] += (x_td - float64(x_hat_td)).square().sum().cpu()
            self.active_w[i] += int((reading.active.latent_a < self.widths[i]).sum())

    def to_list(self, variance: float, squares: float) -> list[dict[str, Any]]:
        """VE, NMSE and L0 of each width; `variance` and `squares` are Σ‖x − mean‖² and Σ‖x‖² of the same tokens."""
        return [
            {
                "width": width,
                "ve": 1 - sse / variance if self.n_tokens and variance > 0 else None,
                "nmse": sse / squares if self.n_tokens and squares > 0 else None,
                "l0": active / self.n_tokens if self.n_tokens else None,
            }
            for width, sse, active in zip(self.widths, self.sse_w.tolist(), self.active_w.tolist(), strict=True)
        ]


@torch.no_grad()
def batch_topk_acts(sae: SAE[Any], x_td: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k · t largest positive pre-activations of the batch, as its trainer would choose them.

    Returns token, latent and value of each. Chunks give their own largest, of which the largest are the batch's: exact.
    """
    n_wanted = min(int(k * len(x_td)), len(x_td) * sae.cfg.d_sae)
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    b_enc = cast(torch.Tensor, sae.b_enc)
    rows = max(1, CHUNK_LATENTS // sae.cfg.d_sae)
    for start in range(0, len(x_td), rows):
        pre_tf = torch.addmm(b_enc, sae.process_sae_in(x_td[start : start + rows]), sae.W_enc).relu()
        value, place = pre_tf.flatten().topk(min(n_wanted, pre_tf.numel()), sorted=False)
        best.append((value, place + start * sae.cfg.d_sae))
    value, place = torch.cat([v for v, _ in best]), torch.cat([p for _, p in best])
    value, chosen = value.topk(n_wanted, sorted=False)
    place = place[chosen][value > 0]
    return place // sae.cfg.d_sae, place % sae.cfg.d_sae, value[value > 0]


@torch.no_grad()
def forms(sae: SAE[Any], x_td: torch.Tensor) -> dict[str, Any] | None:
    """VE and L0 as a JumpReLU, as it is saved, and by batch top-k over these tokens, as it was trained; else None."""
    facts = training_facts(sae)
    k, trained = facts.get("k"), sae.cfg.metadata.training_architecture or ""
    if not k or "batchtopk" not in trained or sae.cfg.architecture() != "jumprelu" or not decodes_linearly(sae):
        return None
    x_td = x_td.to(sae.W_dec.device)
    variance = float((float64(x_td) - float64(x_td).mean(0)).square().sum())
    sse, n_active = 0.0, 0
    for reading in read(sae, x_td):
        sse += float((float64(reading.x_td) - float64(reading.x_hat_td)).square().sum())
        n_active += len(reading.active.value_a)
    token_a, latent_a, value_a = batch_topk_acts(sae, x_td, float(k))
    topk_sse = 0.0
    for rows_t in torch.arange(len(x_td), device=x_td.device).split(max(1, CHUNK_LATENTS // sae.cfg.d_sae)):
        inside = (token_a >= rows_t[0]) & (token_a <= rows_t[-1])
        acts_tf = torch.zeros(len(rows_t), sae.cfg.d_sae, device=x_td.device, dtype=value_a.dtype)
        acts_tf[token_a[inside] - rows_t[0], latent_a[inside]] = value_a[inside]
        topk_sse += float((float64(x_td[rows_t]) - float64(sae.decode(acts_tf))).square().sum())

    def form(sse: float, active: int) -> dict[str, float | None]:
        return {"ve": 1 - sse / variance if variance > 0 else None, "l0": active / len(x_td)}

    return {
        "k": float(k),
        "batch_tokens": len(x_td),
        "saved": form(sse, n_active),
        "batch_topk": form(topk_sse, len(value_a)),
    }


@torch.no_grad()
def drift(sae: SAE[Any], reference: SAE[Any], name: str) -> dict[str, Any]:
    """How far each latent's encoder and decoder have turned and grown since `reference`.

    Raises:
        SAEError: the two have different widths, so that their latents have nothing to do with each other.
    """
    if (sae.cfg.d_in, sae.cfg.d_sae) != (reference.cfg.d_in, reference.cfg.d_sae):
        sizes = [f"{s.cfg.d_in} × {s.cfg.d_sae}" for s in (sae, reference)]
        raise SAEError(f"Drift compares latents one by one; the SAEs are {sizes[0]} and {sizes[1]}.")
    encoder, decoder = _turned(sae.W_enc.T, reference.W_enc.T), _turned(sae.W_dec, reference.W_dec)
    result: dict[str, Any] = {"reference": name}
    for part, (cosine_f, norm_ratio_f) in {"encoder": encoder, "decoder": decoder}.items():
        result[f"{part}_cosine"] = _quantiles(cosine_f)
        result[f"{part}_norm_ratio"] = _quantiles(norm_ratio_f)
    result["b_dec_distance"] = float((sae.b_dec.double().cpu() - reference.b_dec.double().cpu()).norm())
    new, old = (getattr(s, "threshold", None) for s in (sae, reference))
    both = isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor)
    result["threshold_ratio"] = _quantiles(new.double().cpu() / old.double().cpu()) if both else None  # type: ignore[union-attr]
    return result


def _turned(rows_fd: torch.Tensor, reference_fd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and ratio of norms of corresponding rows, on the CPU in float64, a part at a time."""
    cosines, ratios = [], []
    for new, old in zip(rows_fd.split(4096), reference_fd.split(4096), strict=True):
        new, old = new.detach().cpu().double(), old.detach().cpu().double()
        norms = new.norm(dim=1), old.norm(dim=1)
        cosines.append((new * old).sum(1) / (norms[0] * norms[1]))
        ratios.append(norms[0] / norms[1])
    return torch.cat(cosines), torch.cat(ratios)


def _quantiles(value_f: torch.Tensor) -> dict[str, float | None]:
    value_f = value_f[value_f.isfinite()]
    if not len(value_f):
        return {f"{q:g}": None for q in QUANTILES}
    points = torch.quantile(value_f.double(), torch.tensor(QUANTILES, dtype=torch.float64))
    return {f"{q:g}": (v if math.isfinite(v) else None) for q, v in zip(QUANTILES, points.tolist(), strict=True)}
