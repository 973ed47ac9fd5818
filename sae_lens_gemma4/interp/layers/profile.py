"""How far from its tokens a model's residual stream is, layer by layer.

Adam Kruger's dataset card profiles 60 layers by "SIPIT scores" that measure "how far each layer's activations are from
the token embedding space", and gives cosines without a definition. SipIt in the paper of that name (arXiv 2510.15511)
is another thing: an algorithm that recovers a prompt from hidden states exactly, token by token, by trying which one
reproduces the state. Where the paper's theorem holds it succeeds at any depth, and is no distance. Computed here are
three plain quantities, of which the first is the likeliest reading of the card's cosines:

- `cosine`: of the residual and the embedding of the token that it stands on, the mean over all tokens that count;
- `nearest_cosine`: the greatest cosine of the residual and any embedding of the vocabulary, the mean;
- `recovered`: the share of tokens whose own embedding is that nearest one, ties within float32's rounding included.

A cosine does not see lengths, so the factor by which Gemma scales its embeddings does not matter. The last two take
2·d·V operations a token and layer, which with 262,144 tokens in the vocabulary is more than the layer itself: they are
measured on `nearest_tokens` tokens drawn over the whole text, which is cheap where the text is many times as long.
Norms and γ = ‖mean‖ / ‖σ‖, σ being the standard deviations by dimension, stand beside them (arXiv 2605.31518: the γ of
activations predicts how many latents of an SAE die).

Shapes: `t` tokens that count, `s` drawn ones, `l` hooks, `k` documents (beyond `MAX_CLUSTERS` groups of neighbours),
`r` resamples, `d` the stream's width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.harvest import forwards
from sae_lens_gemma4.activations.vocabulary import check_tokenizer
from sae_lens_gemma4.errors import ConfigError, ModelError
from sae_lens_gemma4.evaluation.identity import model_fingerprint
from sae_lens_gemma4.evaluation.intervals import Estimate, Sampling, clusters
from sae_lens_gemma4.evaluation.result import versions
from sae_lens_gemma4.interp.layers.layer_sums import LayerSums
from sae_lens_gemma4.interp.layers.phases import Phases, find_phases
from sae_lens_gemma4.interp.layers.token_space import ROUNDING, DrawnTokens, TokenSpace, same_matrix, token_matrices
from sae_lens_gemma4.interp.means import means_of
from sae_lens_gemma4.models.interface import HookedModel, entry_hook, model_name, n_layers_of

SCHEMA = 1
_DEFINITIONS = {
    "cosine": "Mean over all tokens that count of the cosine of the residual and the token's own embedding.",
    "nearest_cosine": "Mean over the drawn tokens of the greatest cosine of the residual and any embedding.",
    "recovered": f"Share of the drawn tokens whose own embedding is the nearest by cosine, within {ROUNDING:g}.",
    "unembedding": "The same with the rows of the unembedding, where it is not tied to the embedding.",
    "norm": "Euclidean norm of the residual: mean and root mean square of all tokens, median of the drawn ones.",
    "gamma": "Norm of the mean residual by the norm of its standard deviations by dimension.",
    "interval": "BCa bootstrap over documents.",
    "sipit": "Not the inversion algorithm of arXiv 2510.15511, which gives no score by layer.",
}


class LayerFigures(NamedTuple):
    """One hook's. Those of the drawn tokens are None where none were drawn.

    Attributes:
        layer: None for what enters the first layer, where in Gemma every token is recovered.
        nearest_cosine, recovered: of the drawn tokens.
        unembedding_cosine, unembedding_nearest_cosine, unembedding_recovered: of the drawn tokens, with the
            unembedding; None where that is tied to the embedding, or was not asked for.
        norm_mean, norm_rms: of all tokens; `norm_median` of the drawn ones.
        mean_norm: the norm of the mean.
        gamma: None where nothing varies.
    """

    hook: str
    layer: int | None
    cosine: Estimate
    nearest_cosine: Estimate | None
    recovered: Estimate | None
    unembedding_cosine: Estimate | None
    unembedding_nearest_cosine: Estimate | None
    unembedding_recovered: Estimate | None
    norm_mean: float
    norm_rms: float
    norm_median: float | None
    mean_norm: float
    gamma: float | None


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """The result of `profile_layers`.

    Attributes:
        tied: whether the unembedding is the embedding; None where the model has none that can be found.
        layers: what enters the first layer, where there is a hook for it, and what leaves each.
        phases: of the layers' `cosine`.
        nearest_tokens: how many were drawn.
        cosine_by_place: float32 `[blocks · context_size]`, the cosine at `keep_layer` for each place of the corpus, NaN
            where a token does not count; None where no layer was to be kept.
    """

    model: dict[str, Any]
    corpus: dict[str, Any]
    tied: bool | None
    layers: tuple[LayerFigures, ...]
    phases: Phases
    nearest_tokens: int
    keep_layer: int | None
    cosine_by_place: npt.NDArray[np.float32] | None
    sampling: Sampling
    seed: int

    def to_dict(self) -> dict[str, Any]:
        lists: dict[str, list[Any]] = {}
        for name in LayerFigures._fields:
            values = [getattr(figures, name) for figures in self.layers]
            lists[name] = [float(v) if isinstance(v, float) else v for v in values]
            if any(isinstance(v, Estimate) for v in values):
                intervals = [None if v is None else v.interval for v in values]
                lists[f"{name}_interval"] = [None if i is None else [*i] for i in intervals]
        return {
            "schema": SCHEMA,
            "kind": "layer_profile",
            "model": self.model,
            "corpus": self.corpus,
            "tied": self.tied,
            "layers": lists,
            "phases": self.phases.to_dict(),
            "nearest_tokens": self.nearest_tokens,
            "keep_layer": self.keep_layer,
            "sampling": asdict(self.sampling),
            "seed": self.seed,
            "definitions": _DEFINITIONS,
            "versions": versions(),
        }


@torch.no_grad()
def profile_layers(
    model: HookedModel,
    corpus: Corpus,
    *,
    batch_blocks: int = 4,
    isolate_documents: bool = False,
    nearest_tokens: int = 4096,
    unembedding: bool = False,
    keep_layer: int | None = None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    progress: bool = True,
) -> LayerProfile:
    """Profile every layer in one forward pass. One batch's activations of all layers are in memory at a time.

    Args:
        nearest_tokens: tokens drawn by `seed` for what needs a product with the whole vocabulary; 0 for none.
        unembedding: compare the drawn tokens with the unembedding too, where it is not tied.
        keep_layer: keep this layer's cosine for each place of the corpus.
        sampling: of the intervals, and of the phases' support.

    Raises:
        ConfigError: a number that makes no sense, no such layer, or `isolate_documents` with another model class.
        ModelError: the model's embeddings cannot be found, or are not as wide as the stream.
        UnknownNameError: a model whose layers have no `hook_resid_post`.
        DataError: another tokenizer's tokens, or activations that are not finite, naming hook and document.
    """
    if batch_blocks < 1 or nearest_tokens < 0 or seed < 0:
        raise ConfigError(
            "batch_blocks must be at least 1, nearest_tokens and seed not negative, "
            f"unlike {batch_blocks}, {nearest_tokens} and {seed}."
        )
    n_layers = n_layers_of(model)
    if keep_layer is not None and not 0 <= keep_layer < n_layers:
        raise ConfigError(f"keep_layer must be one of the model's layers 0..{n_layers - 1}, not {keep_layer}.")
    check_tokenizer(corpus, model.tokenizer)
    embedding_vd, unembedding_vd = token_matrices(model)
    tied = None if unembedding_vd is None else same_matrix(embedding_vd, unembedding_vd)
    spaces = [TokenSpace(embedding_vd)]
    if unembedding and unembedding_vd is not None and not tied:
        spaces.append(TokenSpace(unembedding_vd))
    layers: list[int | None] = [None, *range(n_layers)]
    hooks = [entry_hook(model), *(f"blocks.{n}.hook_resid_post" for n in range(n_layers))]

    place_t = corpus.keep_bp.flatten().nonzero()[:, 0]
    group_t = torch.unique(corpus.document_bp.flatten()[place_t], return_inverse=True)[1]
    group_t = clusters(int(group_t.max()) + 1)[group_t]
    place_s = torch.randperm(len(place_t), generator=torch.Generator().manual_seed(seed))[:nearest_tokens].sort().values
    drawn, sums = DrawnTokens(spaces, place_s, len(hooks)), LayerSums(len(hooks), int(group_t.max()) + 1)
    by_place = None if keep_layer is None else np.full(corpus.tokens_bp.numel(), np.nan, dtype=np.float32)
    seen = 0
    bar = tqdm(total=len(place_t), desc="Profiling the layers", unit="tok", disable=not progress)
    batches = forwards(model, corpus, hooks, batch_blocks=batch_blocks, isolate_documents=isolate_documents)
    for batch, found in batches:
        tokens_t, kept_t = batch.tokens_bp[batch.keep_bp], batch.keep_bp.flatten().nonzero()[:, 0]
        here = slice(seen, seen + len(tokens_t))
        among_s = drawn.among(seen, len(tokens_t))
        own_td = spaces[0].rows(tokens_t)
        for name in hooks:
            x_td = found[name].flatten(0, 1).index_select(0, kept_t.to(found[name].device))
            if x_td.shape[1:] != own_td.shape[1:]:
                raise ModelError(f"{name} is {[*x_td.shape[1:]]} wide, and the token embeddings {own_td.shape[1]}.")
            sums.add(x_td, own_td.to(x_td.device))
            drawn.add(x_td[among_s.to(x_td.device)])
        cosine_lt = sums.close(group_t[here], hooks, batch)
        drawn.close(tokens_t[among_s])
        if by_place is not None:
            by_place[place_t[here].numpy()] = cosine_lt[layers.index(keep_layer)].numpy()
        seen = here.stop
        bar.update(len(tokens_t))
    bar.close()
    drawn.flush()

    n_k = torch.bincount(group_t).double()
    cosine, mean_rl = means_of(sums.cosine_lk.T, n_k, sampling)
    of_drawn = _drawn_figures(drawn, group_t, len(n_k), sampling)
    rows = zip(hooks, layers, cosine, *of_drawn, *sums.norms(), _medians(drawn), *sums.about_mean(), strict=True)
    figures = tuple(LayerFigures(*row) for row in rows)
    curve_l = np.array([f.cosine for f in figures if f.layer is not None])
    return LayerProfile(
        model={"name": model_name(model), "fingerprint": model_fingerprint(model), "n_layers": n_layers},
        corpus=corpus.facts(),
        tied=tied,
        layers=figures,
        phases=find_phases(
            curve_l, None if mean_rl is None else mean_rl[: sampling.resamples, -n_layers:].numpy(), seed=seed
        ),
        nearest_tokens=len(place_s),
        keep_layer=keep_layer,
        cosine_by_place=by_place,
        sampling=sampling,
        seed=seed,
    )


def _drawn_figures(
    drawn: DrawnTokens, group_t: torch.Tensor, n_groups: int, sampling: Sampling
) -> list[list[Estimate] | list[None]]:
    """Columns of `LayerFigures` from `nearest_cosine` to `unembedding_recovered`."""
    nothing: list[None] = [None] * len(drawn.norm_ls)
    if not len(drawn.place_s):
        return [nothing] * 5
    group_s = group_t[drawn.place_s]
    count_k = torch.bincount(group_s, minlength=n_groups).double()

    def mean(value_ls: torch.Tensor) -> list[Estimate]:
        sum_kl = torch.zeros(n_groups, len(value_ls), dtype=torch.float64)
        return means_of(sum_kl.index_add_(0, group_s, value_ls.T.double()), count_k, sampling)[0]

    found: list[list[Estimate] | list[None]] = []
    for own_ls, nearest_ls in zip(drawn.own_ls, drawn.nearest_ls, strict=True):
        found += [mean(own_ls), mean(nearest_ls), mean(own_ls >= nearest_ls - ROUNDING)]
    return [*found[1:], *[nothing] * (6 - len(found))]


def _medians(drawn: DrawnTokens) -> list[float] | list[None]:
    if not len(drawn.place_s):
        return [None] * len(drawn.norm_ls)
    medians: list[float] = np.median(drawn.norm_ls.numpy(), axis=1).tolist()
    return medians
