"""One pass of a text through model and SAE, after which everything about every latent can be looked up.

Beside the activations themselves (`firings.py`) the pass keeps what cannot be had from them later: the sums behind the
correlations of latents with the hook's own dimensions.

Shapes: `t` tokens that count, `a` activations of a batch, `f` latents, `d` the activations' width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.harvest import Harvest, harvest
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.evaluation.measuring import sae_rows
from sae_lens_gemma4.evaluation.reading import CHUNK_LATENTS, ActiveLatents, encode_active, flat_heads, float64
from sae_lens_gemma4.interp.firings import Firings
from sae_lens_gemma4.kernels.dispatch import kernels_for
from sae_lens_gemma4.kernels.pattern import by_column, pattern
from sae_lens_gemma4.models.interface import HookedModel

SHARD_ACTIVATIONS = 2**25
SHARD_SECONDS = 600
"""A shard is written when so much is held (640 MiB, and as much again while it is sorted), or would be lost."""
_BYTES = 8
"""An activation on disk: where, and how strong."""
_HELD = 20
"""And in memory: where, which, how strong."""
_VARIES = 1e-6
"""The share of a latent's squares that must be variance for it to be correlated: below, float32 sums leave noise."""


class Needs(NamedTuple):
    """What a pass takes besides model, SAE and corpus, in bytes.

    Attributes:
        l0: active latents a token, on a batch of blocks.
    """

    memory: int
    disk: int
    l0: float


def gather_firings(
    sae: SAE[Any],
    model: HookedModel,
    hook_name: str,
    corpus: Corpus,
    folder: str | Path,
    facts: Mapping[str, Any],
    *,
    batch_blocks: int = 16,
    isolate_documents: bool = False,
    progress: bool = True,
) -> Firings:
    """Write down what every latent does on every token that counts, going on where an earlier call was stopped.

    Args:
        hook_name: as `evaluation.measuring.check_sae` returned it.
        facts: what tells this pass from others: hashes of SAE, model and corpus.
        batch_blocks: blocks a forward pass.

    Raises:
        ConfigError: the folder holds activations of something else, or the disk is full.
        DataError: activations that are not finite, of the model or the SAE.
        SAEError, UnknownNameError: as `sae_rows` and `harvest` do.
    """
    firings = Firings(folder, sae.cfg.d_sae, corpus.context_size, facts)
    sums = _Sums.resumed(sae, firings.sums)
    place_t = corpus.keep_bp.flatten().nonzero()[:, 0]
    begun = firings.n_blocks
    seen = int(corpus.keep_bp[:begun].sum())
    if seen == len(place_t):
        return firings
    left = corpus.take(torch.arange(begun, corpus.n_blocks))
    held, written = _Held(), time.monotonic()
    bar = tqdm(total=corpus.n_tokens, initial=seen, desc="Reading the text", unit="tok", disable=not progress)
    with bar, flat_heads(sae):
        for batch in harvest(model, left, [hook_name], batch_blocks=batch_blocks, isolate_documents=isolate_documents):
            here_t = place_t[seen : seen + len(batch.tokens_t)]
            for active, x_td in _active(sae, hook_name, batch):
                sums.add(active, x_td)
                held.add(active, here_t)
                here_t = here_t[len(x_td) :]
            seen += len(batch.tokens_t)
            end = corpus.n_blocks if seen == len(place_t) else int(place_t[seen]) // corpus.context_size
            late = time.monotonic() - written > SHARD_SECONDS
            if held.n >= SHARD_ACTIVATIONS or late or end == corpus.n_blocks:
                firings.append(held.take(), end, sums.tensors())
                written = time.monotonic()
            bar.update(len(batch.tokens_t))
    return firings


def needs(
    sae: SAE[Any],
    model: HookedModel,
    hook_name: str,
    corpus: Corpus,
    *,
    done_blocks: int = 0,
    batch_blocks: int = 16,
    isolate_documents: bool = False,
) -> Needs:
    """What the pass will take from `done_blocks` on, estimated on one batch of blocks spread over the text.

    Raises:
        SAEError, DataError, UnknownNameError: as `gather_firings`.
    """
    counting_b = corpus.keep_bp.any(dim=1).nonzero()[:, 0]
    spread = torch.linspace(0, len(counting_b) - 1, min(batch_blocks, len(counting_b))).round().long()
    n = n_active = 0
    sample = corpus.take(counting_b[spread])
    with flat_heads(sae):
        for batch in harvest(
            model, sample, [hook_name], batch_blocks=batch_blocks, isolate_documents=isolate_documents
        ):
            for active, x_td in _active(sae, hook_name, batch):
                n, n_active = n + len(x_td), n_active + len(active.value_a)
    l0 = n_active / n
    activations = int(l0 * int(corpus.keep_bp[done_blocks:].sum()))
    sums = sae.cfg.d_sae * (sae.cfg.d_in + 4) * 4
    held = min(activations, SHARD_ACTIVATIONS)
    return Needs(
        memory=sums + 3 * held * _HELD + 5 * 4 * CHUNK_LATENTS + corpus.tokens_bp.numel() * 8,
        disk=activations * _BYTES + (2 * sums if activations else 0),
        l0=l0,
    )


class Correlations(NamedTuple):
    """What relates latents to the dimensions of the hook.

    Attributes:
        pearson_fd, cosine_fd: float32; 0 where either does not vary (a latent: by less than .1 % of its mean), or is
            nowhere.
    """

    pearson_fd: torch.Tensor
    cosine_fd: torch.Tensor


def neuron_correlations(sums: Mapping[str, torch.Tensor], first: int, end: int) -> Correlations:
    """Of the latents from `first` to `end`, over all tokens that count, from a pass's `Firings.sums`."""
    n, x_d, xx_d, reference_d = sums["n"], sums["x_d"], sums["xx_d"], sums["reference_d"].double()
    z_f, zz_f, zx_fd = (sums[name][first:end] for name in ("z_f", "zz_f", "zx_fd"))
    squares_d = xx_d + 2 * reference_d * x_d + n * reference_d**2  # about 0; the sums are about the reference
    variance_f, variance_d = zz_f - z_f**2 / n, xx_d - x_d**2 / n
    varies_fd = (variance_f > _VARIES * zz_f)[:, None] & (variance_d > _VARIES**2 * squares_d)
    centred_fd = zx_fd.double() - z_f[:, None] * (x_d / n)
    raw_fd = zx_fd.double() + z_f[:, None] * reference_d
    pearson_fd = _ratio(centred_fd, variance_f[:, None] * variance_d * varies_fd)
    return Correlations(pearson_fd, _ratio(raw_fd, zz_f[:, None] * squares_d))


def _ratio(product_fd: torch.Tensor, squares_fd: torch.Tensor) -> torch.Tensor:
    return torch.where(squares_fd > 0, product_fd / squares_fd.sqrt(), 0).clamp(-1, 1).float()


def _active(sae: SAE[Any], hook_name: str, batch: Harvest) -> list[tuple[ActiveLatents, torch.Tensor]]:
    """Positive activations and what they were computed from, chunk by chunk."""
    found = []
    for chunk_td, active in encode_active(sae, sae_rows(sae, hook_name, batch)):
        finite_a = active.value_a.isfinite()
        if not finite_a.all():
            latent = int(active.latent_a[~finite_a][0])
            raise DataError(f"The SAE's activations at {hook_name} are not finite, first those of latent {latent}.")
        fires = active.value_a > 0
        found.append((ActiveLatents(*(part[fires] for part in active)), chunk_td))
    return found


class _Held:
    """Activations on their way to a shard."""

    def __init__(self) -> None:
        self.parts: list[ActiveLatents] = []
        self.n = 0

    def add(self, active: ActiveLatents, place_t: torch.Tensor) -> None:
        self.parts.append(
            ActiveLatents(place_t[active.token_a.cpu()], active.latent_a.cpu(), active.value_a.float().cpu())
        )
        self.n += len(active.value_a)

    def take(self) -> ActiveLatents:
        parts, self.parts, self.n = self.parts, [], 0
        return ActiveLatents(*map(torch.cat, zip(*parts, strict=True)))


class _Sums:
    """Running sums of latents `z` and activations `x`, these about a reference: the mean of the first tokens, so that
    float32 loses nothing where a mean is large."""

    def __init__(self, sae: SAE[Any]) -> None:
        d_sae, d_in, device = sae.cfg.d_sae, sae.cfg.d_in, sae.W_dec.device
        self.kernels = kernels_for(device)
        self.reference_d: torch.Tensor | None = None
        self.n = 0
        self.zx_fd = torch.zeros(d_sae, d_in, device=device)
        self.z_f, self.zz_f = torch.zeros(2, d_sae, dtype=torch.float64).unbind()
        self.x_d, self.xx_d = torch.zeros(2, d_in, dtype=torch.float64).unbind()

    @classmethod
    def resumed(cls, sae: SAE[Any], tensors: Mapping[str, torch.Tensor]) -> _Sums:
        sums = cls(sae)
        if tensors:
            device = sums.zx_fd.device
            sums.n, sums.reference_d = int(tensors["n"]), tensors["reference_d"].to(device)
            sums.zx_fd = tensors["zx_fd"].to(device)
            sums.z_f, sums.zz_f, sums.x_d, sums.xx_d = (tensors[name] for name in ("z_f", "zz_f", "x_d", "xx_d"))
        return sums

    def add(self, active: ActiveLatents, x_td: torch.Tensor) -> None:
        x_td = x_td.float()
        if self.reference_d is None:
            self.reference_d = x_td.mean(dim=0)
        x_td = x_td - self.reference_d
        self.n += len(x_td)
        self.x_d += float64(x_td).sum(dim=0).cpu()
        self.xx_d += (
            x_td.double().pow(2).sum(dim=0).cpu() if x_td.device.type != "mps" else x_td.cpu().double().pow(2).sum(0)
        )
        latent_a, value_a = active.latent_a.cpu(), active.value_a.double().cpu()
        self.z_f.index_add_(0, latent_a, value_a)
        self.zz_f.index_add_(0, latent_a, value_a.pow(2))
        order = by_column(active.latent_a)
        latents, counts = active.latent_a[order].unique_consecutive(return_counts=True)
        rows = torch.arange(len(latents), device=latents.device).repeat_interleave(counts)
        turned = pattern(rows, active.token_a[order], len(latents))
        self.zx_fd.index_add_(0, latents, self.kernels.sums(turned, active.value_a[order].float(), x_td))

    def tensors(self) -> dict[str, torch.Tensor]:
        assert self.reference_d is not None
        return {
            "n": torch.tensor(self.n),
            "reference_d": self.reference_d.cpu(),
            "zx_fd": self.zx_fd.cpu(),
            "z_f": self.z_f,
            "zz_f": self.zz_f,
            "x_d": self.x_d,
            "xx_d": self.xx_d,
        }
