"""What an SAE does to the model's predictions: cross-entropy and KL with the SAE spliced in, against ablations.

sae_lens's `get_recons_loss` (evals.py:662) runs the model three times, takes the loss in the model's dtype, ablates
every position where the SAE replaces those that count, and knows no mean ablation. Here a batch takes two runs, the
second with all variants stacked and taken up at the hooked layer (`models.resume`); loss and KL are float32 whatever
the model's dtype; variants replace the same positions, which are those averaged over; and everything is kept by
document, so that figures have intervals.

Two masks, because tuned models keep much of what they do on special tokens: `excluded` replaces and averages over the
positions that the corpus keeps, `included` over all that are not padding.

Shapes: `b` blocks, `p` positions, `d` width, `t` positions that are not padding, `g` documents, `v` variants spliced
in, `m` masks, `c` columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError, DataError, SAEError
from sae_lens_gemma4.evaluation.intervals import Key, Sampling, clusters
from sae_lens_gemma4.evaluation.metrics import nested
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.models.loading import isolation
from sae_lens_gemma4.models.resume import Run, Runs, runs_at

MASKS = ("excluded", "included")
LOSSES = ("ce", "kl", "ce_recovered", "kl_recovered")
ABLATIONS = ("zero", "mean")
SPLICED = ("sae", *ABLATIONS)
_VARIANTS = [(mask, spliced) for mask in MASKS for spliced in SPLICED]
_CE = [f"ce_{name}" for name in ("model", *SPLICED)]
_KL = [f"kl_{name}" for name in SPLICED]
_COLUMNS = ["n", "n_next", *_CE, *_KL, "ce_zero_everywhere", "kl_zero_everywhere"]
"""Of a position: 1, whether a token follows, and nats; the last two with all positions ablated, as sae_lens does."""

CHUNK_LOGITS = 2**25
"""Logits of one run worked on at once: 128 MiB in float32, and 600 MiB with all that is made of them."""
RUN_BYTES = 2**31
"""What one run may leave: with a model that cannot be resumed, whose logits must all be there, variants are run in as
many parts as this asks for. One block of 1,024 tokens and 262,144 words is 2^29 bytes a variant in bfloat16."""
NO_DAMAGE = 1e-6
"""Nats a position: what float32 leaves of a difference between runs that are alike."""


@dataclass(frozen=True)
class DownstreamSums:
    """Sums over each document's positions, from which all figures follow.

    Attributes:
        documents: document numbers `[g]`, ascending, of those that have a position that is not padding; beyond
            `intervals.MAX_CLUSTERS` the first of each group of neighbours, whose sums are joined.
        sums_gmc: float64 `[g, m, c]`.
        n_blocks: blocks of the corpus that were run.
        resumed: whether layers before the hook ran once rather than twice.
    """

    documents: torch.Tensor
    sums_gmc: torch.Tensor
    n_blocks: int
    resumed: bool

    def to_dict(self, sampling: Sampling | None = None) -> dict[str, Any]:
        """`downstream` of an evaluation's JSON: nats a position, and what of an ablation's damage the SAE spares.

        `ce_recovered` is (CE_ablated − CE_sae) / (CE_ablated − CE_model), `kl_recovered` (KL_ablated − KL_sae) /
        KL_ablated; None where the ablation does no damage. `zero_everywhere` is for `stock_keys`. With intervals
        where `sampling` is given and there are documents to draw.
        """
        all_mc = self.sums_gmc.sum(0)
        figures, intervals = _figures(all_mc), {}
        result = nested({key: _number(figure) for key, figure in figures.items()})
        if sampling and (replicates := self.replicates(sampling)):
            drawn = zip(figures.items(), replicates.values(), strict=True)
            found = {key: sampling.interval(float(figure), figure_r) for (key, figure), figure_r in drawn}
            intervals = nested({key: interval and list(interval) for key, interval in found.items()})
        for m, mask in enumerate(MASKS):
            result[mask] |= {"n_tokens": int(all_mc[m, 0]), "intervals": intervals.get(mask)}
        everywhere = {loss: _number(_mean(all_mc[0], f"{loss}_zero_everywhere")) for loss in ("ce", "kl")}
        facts = {"n_tokens": int(all_mc[0, 0]), "n_blocks": self.n_blocks, "resumed": self.resumed}
        return {**facts, **result, "zero_everywhere": everywhere}

    def replicates(self, sampling: Sampling) -> dict[Key, torch.Tensor]:
        """Figures on each row of `sampling.weights`, by ("downstream", mask, kind, name); none where there are none."""
        weights_rg = sampling.weights(len(self.documents))
        if weights_rg is None:
            return {}
        drawn_rmc = torch.einsum("rg,gmc->rmc", weights_rg, self.sums_gmc)
        return {("downstream", *key): figure_r for key, figure_r in _figures(drawn_rmc).items()}


@torch.no_grad()
def measure_downstream(
    model: HookedModel,
    corpus: Corpus,
    hook_name: str,
    reconstruct: Callable[[torch.Tensor], torch.Tensor],
    mean_d: torch.Tensor,
    *,
    head: int | None = None,
    max_tokens: int | None = None,
    batch_blocks: int = 1,
    isolate_documents: bool = False,
    progress: bool = True,
) -> DownstreamSums:
    """Run `corpus` through `model` as it is, with the SAE spliced in at a hook, and with the hook ablated.

    KL counts every position of a mask, CE those that a token follows in their block. Only the hook's own value is
    replaced: nothing of the SAE's error is put back.

    Args:
        reconstruct: the SAE on rows, `[t, d]` to `[t, d]`; rows come in the model's dtype and on its device. Where
            a hook has heads, `d` is all of them, flattened, unless `head` says which alone is replaced.
        mean_d: what mean ablation puts in: the mean over the tokens that count.
        max_tokens: stop after the block with which so many tokens count.
        batch_blocks: blocks a run; the second run has up to six times as many.
        isolate_documents: as `harvest` takes it.

    Raises:
        ConfigError: a number that cannot be, or `isolate_documents` with a model of another package.
        UnknownNameError: the model has no such hook.
        DataError: the hook does not fire or is not `[block, pos, …]`, or activations or predictions are not finite.
        SAEError: `mean_d` or reconstructions of another shape than activations.
    """
    for name, number in (("max_tokens", max_tokens), ("batch_blocks", batch_blocks)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}.")
    runs = runs_at(model, hook_name, **isolation(model, isolate_documents))
    device = next(model.parameters()).device
    parts = []
    kept_b = corpus.keep_bp.sum(1).cumsum(0)
    n_blocks = corpus.n_blocks if max_tokens is None else int((kept_b < max_tokens).sum()) + 1
    n_blocks = min(n_blocks, corpus.n_blocks)
    total = int(kept_b[n_blocks - 1])
    with tqdm(total=total, desc="Predictions", unit="tok", leave=False, disable=not progress) as bar:
        for blocks in torch.arange(n_blocks).split(batch_blocks):
            batch = _Batch.of(corpus, blocks)
            splice = _Splice(hook_name, batch, reconstruct, mean_d, head)
            clean = runs.first(batch.tokens_bp.to(device), splice.catch)
            ce_vt, kl_vt = _losses(runs, clean, batch, splice)
            if not (finite_t := ce_vt.isfinite().all(0) & kl_vt.isfinite().all(0)).all():
                bad = int(batch.document_t[~finite_t][0])
                raise DataError(f"Predictions around {hook_name} are not finite, first in document {bad}.")
            parts.append(_by_document(batch.document_t, batch.columns(ce_vt.double(), kl_vt.double())))
            bar.update(int(batch.keep_t.sum()))
    document_g, sums_gmc = _by_document(*map(torch.cat, zip(*parts, strict=True)))
    first = clusters(len(document_g)).diff(prepend=torch.tensor([-1])) > 0
    _, sums_gmc = _by_document(clusters(len(document_g)), sums_gmc)
    return DownstreamSums(document_g[first], sums_gmc, n_blocks, runs.resumed)


def stock_keys(downstream: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """What `sae_lens.evals.run_evals` calls these figures, and as it defines them, from a `downstream` object.

    It averages over the tokens that count, and ablates every position. It also takes the loss in the model's dtype,
    so that the two agree on float32 models only.
    """
    excluded, ablated = downstream["excluded"], downstream["zero_everywhere"]
    ce, kl = excluded["ce"], excluded["kl"]
    return {
        "model_behavior_preservation": {
            "kl_div_score": _score(kl["sae"], ablated["kl"], 0.0),
            "kl_div_with_ablation": ablated["kl"],
            "kl_div_with_sae": kl["sae"],
        },
        "model_performance_preservation": {
            "ce_loss_score": _score(ce["sae"], ablated["ce"], ce["model"]),
            "ce_loss_with_ablation": ablated["ce"],
            "ce_loss_with_sae": ce["sae"],
            "ce_loss_without_sae": ce["model"],
        },
    }


def _score(sae: float | None, ablated: float | None, model: float | None) -> float | None:
    if sae is None or ablated is None or model is None or ablated == model:
        return None
    return (ablated - sae) / (ablated - model)


@dataclass(frozen=True)
class _Batch:
    """Some blocks, and their positions that are not padding: place, whether they count, document, next token if any."""

    tokens_bp: torch.Tensor
    row_t: torch.Tensor
    keep_t: torch.Tensor
    document_t: torch.Tensor
    next_t: torch.Tensor
    has_next_t: torch.Tensor

    @staticmethod
    def of(corpus: Corpus, blocks: torch.Tensor) -> _Batch:
        tokens_bp, document_bp = corpus.tokens_bp[blocks], corpus.document_bp[blocks]
        real_bp = document_bp >= 0
        has_next_bp = real_bp.roll(-1, 1)
        has_next_bp[:, -1] = False
        of_positions = (corpus.keep_bp[blocks], document_bp, tokens_bp.roll(-1, 1), has_next_bp)
        return _Batch(tokens_bp, real_bp.flatten().nonzero()[:, 0], *(value_bp[real_bp] for value_bp in of_positions))

    def columns(self, ce_vt: torch.Tensor, kl_vt: torch.Tensor) -> torch.Tensor:
        """`_COLUMNS` `[t, m, c]` of losses: of the model, then of `_VARIANTS`."""
        ce_vt = ce_vt.where(self.has_next_t, 0.0)
        everywhere = _VARIANTS.index(("included", "zero"))
        one_t, next_t = torch.ones_like(ce_vt[0]), self.has_next_t.to(ce_vt)
        masked = []
        for m, mask_t in enumerate((self.keep_t, torch.ones_like(self.keep_t))):
            own = slice(m * len(SPLICED), (m + 1) * len(SPLICED))
            losses = (ce_vt[0], *ce_vt[1:][own], *kl_vt[own], ce_vt[1:][everywhere], kl_vt[everywhere])
            masked.append(torch.stack([one_t, next_t, *losses], dim=1) * mask_t[:, None])
        return torch.stack(masked, dim=1)


@dataclass
class _Splice:
    """What the clean run shows at the hook, and what later runs put there."""

    hook_name: str
    batch: _Batch
    reconstruct: Callable[[torch.Tensor], torch.Tensor]
    mean_d: torch.Tensor
    head: int | None
    acts_bpd: torch.Tensor | None = None

    def catch(self, value: torch.Tensor, hook: Any) -> None:  # noqa: ARG002
        if value.ndim < 3 or value.shape[:2] != self.batch.tokens_bp.shape:
            shape = tuple(value.shape)
            raise DataError(f"{self.hook_name} is {shape}, not [block, pos, …]: nothing can be spliced in.")
        read = value if self.head is None else value[:, :, self.head]
        self.acts_bpd = read.clone().flatten(2)  # a module may go on in place

    def put(self, value: torch.Tensor, new_vbpd: torch.Tensor) -> torch.Tensor:
        """The hook's value with what is spliced in, all variants of a run in one batch."""
        if self.head is None:
            return new_vbpd.to(value).view_as(value)
        value = value.clone()
        value[:, :, self.head] = new_vbpd.to(value).flatten(0, 1)
        return value

    def variants(self) -> torch.Tensor:
        """Activations with the positions of a mask replaced, `[v, b, p, d]`, in the order of `_VARIANTS`."""
        acts_bpd, batch, hook = self.acts_bpd, self.batch, self.hook_name
        if acts_bpd is None:
            raise DataError(f"{hook} does not fire in a run of this model: nothing can be spliced in.")
        acts_td = acts_bpd.flatten(0, 1)[batch.row_t.to(acts_bpd.device)]
        if not (finite_t := acts_td.isfinite().all(1).cpu()).all():
            bad = int(batch.document_t[~finite_t][0])
            raise DataError(f"Activations at {hook} are not finite, first in document {bad}.")
        if self.mean_d.shape != acts_td.shape[1:]:
            raise SAEError(f"{hook} is {acts_td.shape[1]} wide; the mean is {tuple(self.mean_d.shape)}.")
        sae_td = self.reconstruct(acts_td)
        if sae_td.shape != acts_td.shape:
            raise SAEError(f"{hook} is {tuple(acts_td.shape)}; its reconstruction is {tuple(sae_td.shape)}.")
        put = {"sae": sae_td.to(acts_td), "zero": torch.zeros_like(acts_td), "mean": self.mean_d.to(acts_td)}
        keep_t1 = batch.keep_t.to(acts_td.device)[:, None]
        replaced = {"excluded": keep_t1, "included": torch.ones_like(keep_t1)}
        spliced = [torch.where(replaced[mask], put[name], acts_td) for mask, name in _VARIANTS]
        variants_vbpd = acts_bpd.repeat(len(_VARIANTS), 1, 1, 1)
        variants_vbpd.flatten(1, 2)[:, batch.row_t.to(acts_td.device)] = torch.stack(spliced)
        return variants_vbpd


def _losses(runs: Runs, clean: Run, batch: _Batch, splice: _Splice) -> tuple[torch.Tensor, torch.Tensor]:
    """CE `[1 + v, t]`, the model's first, and KL(model ‖ variant) `[v, t]`; CE without a next token is noise."""
    variants_vbpd = splice.variants()
    n, n_rows, device = len(variants_vbpd), len(batch.row_t), clean.end.device
    at_once = max(1, RUN_BYTES // clean.end.nbytes)
    chunk = max(1, CHUNK_LOGITS // clean.n_vocab)
    row_t, next_t = batch.row_t.to(device), batch.next_t.to(device)
    ce_vt, kl_vt = torch.empty(1 + n, n_rows, device=device), torch.empty(n, n_rows, device=device)
    for first in range(0, n, at_once):
        part_vbpd = variants_vbpd[first : first + at_once]
        run = runs.again(len(part_vbpd), lambda value, hook, new=part_vbpd: splice.put(value, new))  # noqa: ARG005
        for start in range(0, n_rows, chunk):
            span = slice(start, start + chunk)
            model_tw = F.log_softmax(clean.logits(row_t[span]).float(), dim=-1)
            ce_vt[0, span] = F.nll_loss(model_tw, next_t[span].to(model_tw.device), reduction="none")
            for i, v in enumerate(range(first, first + len(part_vbpd))):
                variant_tw = F.log_softmax(run.logits(row_t[span] + i * batch.tokens_bp.numel()).float(), dim=-1)
                ce_vt[1 + v, span] = F.nll_loss(variant_tw, next_t[span].to(model_tw.device), reduction="none")
                kl_vt[v, span] = F.kl_div(variant_tw, model_tw, reduction="none", log_target=True).sum(-1)
    return ce_vt.cpu(), kl_vt.cpu()


def _by_document(document_n: torch.Tensor, columns_nmc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Document numbers, ascending, and the sums of each."""
    document_g, index_n = document_n.unique(return_inverse=True)
    sums_gmc = columns_nmc.new_zeros(len(document_g), *columns_nmc.shape[1:])
    return document_g, sums_gmc.index_add_(0, index_n, columns_nmc)


def _mean(sums_c: torch.Tensor, column: str) -> torch.Tensor:
    """Nats a position; NaN where there is none. `sums_c` is `[…, c]`."""
    n = "n_next" if column.startswith("ce") else "n"
    return sums_c[..., _COLUMNS.index(column)] / sums_c[..., _COLUMNS.index(n)]


def _figures(sums_mc: torch.Tensor) -> dict[tuple[str, str, str], torch.Tensor]:
    """Figures by mask, kind and name, of sums `[…, m, c]`; NaN where not defined."""
    figures: dict[tuple[str, str, str], torch.Tensor] = {}
    for m, mask in enumerate(MASKS):
        ce = {name: _mean(sums_mc[..., m, :], f"ce_{name}") for name in ("model", *SPLICED)}
        kl = {name: _mean(sums_mc[..., m, :], f"kl_{name}") for name in SPLICED}
        kinds = {
            "ce": ce,
            "kl": kl,
            "ce_recovered": {name: _recovered(ce["sae"] - ce["model"], ce[name] - ce["model"]) for name in ABLATIONS},
            "kl_recovered": {name: _recovered(kl["sae"], kl[name]) for name in ABLATIONS},
        }
        figures |= {(mask, kind, name): figure for kind, named in kinds.items() for name, figure in named.items()}
    return figures


def _recovered(damage: torch.Tensor, ablated: torch.Tensor) -> torch.Tensor:
    return torch.where(ablated > NO_DAMAGE, (ablated - damage) / ablated, torch.nan)


def _number(figure: torch.Tensor) -> float | None:
    return float(figure) if figure.isfinite() else None
