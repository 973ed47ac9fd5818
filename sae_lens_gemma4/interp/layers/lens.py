"""The logit lens: what the model would say if each layer were its last (nostalgebraist 2020).

The E4B layer-21 card puts hidden states through the language-model head alone, on one prompt, and calls a layer the
first of "English commitment" by eye. Here each layer goes through the final norm, the unembedding and the soft cap that
the model itself ends with, so that the last layer gives the model's own logits; `final_norm=False` is the card's way,
for comparison. What the figures are and how a commitment is told is in `lens_result`.

Activations are normed in the model's own arithmetic, and their product with the unembedding is float32: in 16 bits many
of 262,144 logits are equal, and of equals a rank tells nothing. So the final token of a model of 16 bits is that of the
exact product, where the model itself may have a tie.

Logits of such a vocabulary are made for a few positions at a time and never kept.

Shapes: `n` positions, `l` places in the stream, `v` vocabulary, `k` top tokens, `c` positions of a chunk, `r` rows:
every place of every position of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from tqdm.auto import tqdm

from sae_lens_gemma4.errors import ConfigError, ModelError, check_name
from sae_lens_gemma4.evaluation.identity import model_fingerprint
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.layers.decoder_lens import DecoderLens, decoder_lens
from sae_lens_gemma4.interp.layers.lens_result import Followed, Lens
from sae_lens_gemma4.interp.layers.lens_tokens import Prompt, read_prompts, read_targets
from sae_lens_gemma4.interp.layers.scripts import TokenTexts
from sae_lens_gemma4.interp.unembedding import Ends, ends_of
from sae_lens_gemma4.models.interface import HookedModel, entry_hook, model_name, n_layers_of, require_hook

__all__ = ["DecoderLens", "Lens", "decoder_lens", "logit_lens"]

_LOGITS = 2**25
"""Logits that are made at a time, of all places: 128 MiB in float32."""
_ROWS = 2**15
"""Rows of the unembedding that are made float32 at a time."""
_CHECKED = 8
"""Positions on which the model's own logits are asked for, to know that they are those of the last layer."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_COARSE = 0.05
"""Of the largest logit; the latter for floats of 16 bits."""


@torch.no_grad()
def logit_lens(
    model: HookedModel,
    prompts: str | Sequence[str] | torch.Tensor,
    *,
    targets: str | int | Sequence[str | int] | None = None,
    positions: Literal["last", "all"] = "last",
    layers: Sequence[int] | None = None,
    top: int = 5,
    final_norm: bool = True,
    batch_prompts: int = 8,
    sampling: Sampling = Sampling(),
    progress: bool = False,
) -> Lens:
    """Read every layer's output, and the embeddings, as the last layer's is read.

    Args:
        prompts: texts, each with the special tokens that the tokenizer adds; or tokens `[prompt, pos]`, padded on the
            right. BOS and padding do not count.
        targets: a token to follow, as its text or id: one for all prompts, or one a prompt.
        positions: the last position of each prompt that counts, or all that do.
        layers: of which layers; all if None. The embeddings and the last layer are always read. With layers left out,
            a commitment is the first among those read.
        top: likeliest tokens that are kept.
        final_norm: False for the unembedding alone, without norm and soft cap; then the last layer's is not what the
            model says, and a position may never commit.
        batch_prompts: prompts of one length that are run together.
        sampling: of the intervals over prompts.

    Raises:
        ConfigError: a target that is not one token, an unknown layer, another setting.
        DataError: an empty prompt, or one of which no token counts.
        UnknownNameError: a model whose layers have no `hook_resid_post`.
        ModelError: what lies between the last layer and the logits is not known, or is not all there is.
    """
    check_name("positions", positions, ("last", "all"))
    ends = ends_of(model)
    if ends is None:
        raise ModelError(f"The final norm and unembedding of this {type(model).__name__} are not where they are known.")
    ends, d_vocab = in_float32(ends), ends.weight_vd.shape[0]
    if not 1 <= top <= d_vocab or batch_prompts < 1:
        raise ConfigError(f"top must be from 1 to {d_vocab} and batch_prompts from 1, not {top} and {batch_prompts}.")
    read = read_prompts(model.tokenizer, prompts, positions, d_vocab)
    target_p = read_targets(model.tokenizer, targets, len(read), d_vocab)
    n_layers, chosen = _layers(model, layers)
    names = [entry_hook(model), *(f"blocks.{layer}.hook_resid_post" for layer in chosen)]
    hooks = [require_hook(model, name) for name in names]
    _check_ends(model, ends, hooks[-1], read[0].tokens[:_CHECKED])

    found: dict[int, list[_Part]] = {}
    with tqdm(total=len(read), desc="Reading the layers", unit="prompt", disable=not progress) as bar:
        for numbers in _batches(read, batch_prompts):
            acts = _run(model, torch.tensor([read[number].tokens for number in numbers]), hooks, n_layers)
            for row, number in enumerate(numbers):
                acts_pd = [a[row] for a in acts]
                found[number] = list(_parts(ends, acts_pd, read[number], target_p, number, top, final_norm))
                bar.update()
    parts = [part for number in range(len(read)) for part in found[number]]
    texts = TokenTexts(model.tokenizer)
    id_ni = torch.cat([part.id_ci for part in parts])
    rank_nli, prob_nli = torch.cat([part.rank_cli for part in parts]), torch.cat([part.prob_cli for part in parts])

    def followed(i: int) -> Followed:
        return Followed(id_ni[:, i].numpy(), rank_nli[:, :, i].numpy(), prob_nli[:, :, i].numpy())

    return Lens(
        layers=(None, *chosen),
        n_layers=n_layers,
        prompt_n=torch.tensor([n for n, prompt in enumerate(read) for _ in prompt.places]).numpy(),
        position_n=torch.tensor([place for prompt in read for place in prompt.places]).numpy(),
        token_n=torch.tensor([prompt.tokens[place] for prompt in read for place in prompt.places]).numpy(),
        top_id_nlk=torch.cat([part.top_id_clk for part in parts]).numpy(),
        top_prob_nlk=torch.cat([part.top_prob_clk for part in parts]).numpy(),
        entropy_nl=torch.cat([part.entropy_cl for part in parts]).numpy(),
        kl_nl=torch.cat([part.kl_cl for part in parts]).numpy(),
        final=followed(0),
        following=followed(1),
        target=None if target_p is None else followed(2),
        texts=texts,
        settings={"positions": positions, "top": top, "final_norm": final_norm, "softcap": ends.softcap},
        facts={
            "model": {"name": model_name(model), "fingerprint": model_fingerprint(model)},
            "n_prompts": len(read),
            "vocabulary_scripts": texts.shares(range(min(d_vocab, len(model.tokenizer)))),
        },
        sampling=sampling,
    )


class _Part(NamedTuple):
    """What a chunk of one prompt's positions gave. Tokens followed are `i`: the final one, the next one, the target."""

    id_ci: torch.Tensor
    top_id_clk: torch.Tensor
    top_prob_clk: torch.Tensor
    entropy_cl: torch.Tensor
    kl_cl: torch.Tensor
    rank_cli: torch.Tensor
    prob_cli: torch.Tensor


def _parts(
    ends: Ends,
    acts_pd: list[torch.Tensor],
    prompt: Prompt,
    target_p: list[int] | None,
    number: int,
    top: int,
    final_norm: bool,
) -> Iterator[_Part]:
    following = torch.tensor([*prompt.tokens[1:], -1])
    target = -1 if target_p is None else target_p[number]
    for place_c in torch.tensor(prompt.places).split(max(1, _LOGITS // (ends.weight_vd.shape[0] * len(acts_pd)))):
        rows_cd = [a_pd[place_c.to(a_pd.device)] for a_pd in acts_pd]
        yield _read(ends, rows_cd, following[place_c], torch.full_like(place_c, target), top, final_norm)


def _read(
    ends: Ends,
    rows_cd: list[torch.Tensor],
    following_c: torch.Tensor,
    target_c: torch.Tensor,
    top: int,
    final_norm: bool,
) -> _Part:
    """One chunk at every place in the stream. Ranks go by the logits before the soft cap, which can make great ones
    equal."""
    own_cd = ends.norm(rows_cd[-1])
    read_lcd = [*(ends.norm(x_cd) for x_cd in rows_cd[:-1]), own_cd] if final_norm else [*rows_cd, own_cd]
    logits_lcv = ends.unembed(torch.cat([x_cd.to(own_cd.device) for x_cd in read_lcd])).split(len(own_cd))
    own_cv = logits_lcv[-1]
    final_c = own_cv.topk(top, dim=-1).indices[:, 0].cpu()
    log_own_cv = ends.capped(own_cv).log_softmax(-1)
    id_ci = torch.stack([final_c, following_c, target_c], dim=1)
    by_place: list[tuple[torch.Tensor, ...]] = []
    for logits_cv in logits_lcv[: len(rows_cd)]:
        log_cv = (ends.capped(logits_cv) if final_norm else logits_cv).log_softmax(-1)
        prob_cv = log_cv.exp()
        top_id_ck = logits_cv.topk(top, dim=-1).indices
        at_ci = id_ci.clamp(min=0).to(logits_cv.device)
        theirs_ci = logits_cv.gather(1, at_ci)
        rank_ci = torch.stack([(logits_cv > one_c[:, None]).sum(-1) + 1 for one_c in theirs_ci.T], dim=1)
        by_place.append(
            (
                top_id_ck.cpu(),
                prob_cv.gather(1, top_id_ck).cpu(),
                -(prob_cv * log_cv).sum(-1).cpu(),
                (log_own_cv.exp() * (log_own_cv - log_cv)).sum(-1).cpu(),
                rank_ci.cpu(),
                prob_cv.gather(1, at_ci).cpu(),
            )
        )
    return _Part(id_ci, *(torch.stack(parts, dim=1) for parts in zip(*by_place, strict=True)))


def in_float32(ends: Ends) -> Ends:
    """The same ends with an unembedding of rows `[r, d]` whose products are float32, whatever the model's own are: a
    part of its weight at a time, for all rows."""
    weight_vd = ends.weight_vd.detach()
    bias_v = ends.unembed(weight_vd.new_zeros(1, weight_vd.shape[1]))[0].float()

    def unembed(x_rd: torch.Tensor) -> torch.Tensor:
        x_rd = x_rd.float().to(weight_vd.device)
        logits_rv = torch.empty(len(x_rd), len(weight_vd), device=weight_vd.device)
        for part_rv, part_vd in zip(logits_rv.split(_ROWS, dim=1), weight_vd.split(_ROWS), strict=True):
            part_rv.copy_(x_rd @ part_vd.float().T)
        return logits_rv.add_(bias_v.to(logits_rv.device))

    return ends._replace(unembed=unembed)


def _run(model: HookedModel, tokens_bp: torch.Tensor, hooks: list[str], n_layers: int) -> list[torch.Tensor]:
    device = next(model.parameters()).device
    _, cache = model.run_with_cache(tokens_bp.to(device), names_filter=hooks, stop_at_layer=n_layers, prepend_bos=False)
    return [cache[hook] for hook in hooks]


def _check_ends(model: HookedModel, ends: Ends, last: str, tokens: list[int]) -> None:
    """Raise `ModelError` unless the model's logits are those of its last layer through its known ends."""
    tokens_bp = torch.tensor([tokens], device=next(model.parameters()).device)
    logits_bpv, cache = model.run_with_cache(tokens_bp, names_filter=[last], prepend_bos=False)
    ours_pv = ends.capped(ends.unembed(ends.norm(cache[last])[0]))
    difference = (ours_pv - logits_bpv[0].to(ours_pv.device).float()).abs().max()
    largest = float(logits_bpv.float().abs().max())
    if not float(difference) <= _TOLERANCE.get(logits_bpv.dtype, _COARSE) * max(largest, 1.0):
        raise ModelError(
            f"The logits of this {type(model).__name__} are not its last layer through the final norm, the unembedding "
            f"and the soft cap: they differ by up to {float(difference):.3g}. A lens on it would show another model."
        )


def _batches(read: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """The prompts' numbers, those of one length together: nothing is padded."""
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(read):
        by_length.setdefault(len(prompt.tokens), []).append(number)
    for numbers in by_length.values():
        yield from (numbers[at : at + size] for at in range(0, len(numbers), size))


def _layers(model: HookedModel, layers: Sequence[int] | None) -> tuple[int, list[int]]:
    n_layers = n_layers_of(model)
    chosen = range(n_layers) if layers is None else layers
    if unknown := [layer for layer in chosen if layer not in range(n_layers)]:
        raise ConfigError(f"There is no layer {unknown[0]!r}; the model has {n_layers}, 0 to {n_layers - 1}.")
    return n_layers, sorted({*chosen, n_layers - 1})
