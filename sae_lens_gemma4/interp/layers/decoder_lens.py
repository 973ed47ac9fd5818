"""The lens for an SAE's decoder rows: the tokens whose logits a latent raises and lowers by the direct path.

Dashboards show the same tokens. A row has no scale of its own (the final norm's divides by what else is in the stream),
so a logit says little; here it is also given in standard deviations of that row's logits over the vocabulary, which
tells a latent that writes one token from one that writes none. For the same reason a row has no distribution, and its
entropy would mean nothing.

Shapes: `f` latents, `v` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from sae_lens import SAE

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.layers.scripts import TokenTexts
from sae_lens_gemma4.interp.unembedding import Unembedding
from sae_lens_gemma4.models.interface import HookedModel

_LOGITS = 2**23


class Pull(NamedTuple):
    """A token and how its logit moves: `logit` up to the row's own factor, `z` in standard deviations of the row's."""

    token: str
    token_id: int
    logit: float
    z: float


class DecoderLens(NamedTuple):
    """Of one latent the tokens that it promotes and suppresses most, strongest first."""

    latent: int
    promoted: tuple[Pull, ...]
    suppressed: tuple[Pull, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "latent": self.latent,
            "promoted": [pull._asdict() for pull in self.promoted],
            "suppressed": [pull._asdict() for pull in self.suppressed],
        }


@torch.no_grad()
def decoder_lens(
    sae: SAE[Any], model: HookedModel, hook_name: str, latents: Iterable[int], top: int = 10
) -> dict[int, DecoderLens]:
    """Promoted and suppressed tokens of some latents, in the order given.

    Args:
        hook_name: where the SAE is.
        top: tokens on each side.

    Raises:
        ConfigError: no such latent, `top` out of range, or a hook from which no way to the logits is known.
    """
    indices = list(dict.fromkeys(int(latent) for latent in latents))
    d_sae = int(sae.cfg.d_sae)
    if unknown := [index for index in indices if not 0 <= index < d_sae]:
        raise ConfigError(f"There is no latent {unknown[0]}; the SAE has {d_sae}, 0 to {d_sae - 1}.")
    unembedding = Unembedding.of(model, sae, hook_name)
    if unembedding is None:
        raise ConfigError(f"No way is known from {hook_name} to the logits of this {type(model).__name__}.")
    d_vocab = unembedding.weight_vd.shape[0]
    if not 1 <= top <= d_vocab:
        raise ConfigError(f"top must be from 1 to the vocabulary's {d_vocab}, not {top}.")
    texts, found = TokenTexts(model.tokenizer), {}
    for chunk_f in torch.tensor(indices, dtype=torch.int64).split(max(1, _LOGITS // d_vocab)):
        logits_fv = unembedding.logits(sae.W_dec[chunk_f.to(sae.W_dec.device)])
        for index, logits_v in zip(chunk_f.tolist(), logits_fv, strict=True):
            promoted, suppressed = (_pulls(logits_v, top, texts, largest) for largest in (True, False))
            found[index] = DecoderLens(index, promoted, suppressed)
    return found


def _pulls(logits_v: torch.Tensor, top: int, texts: TokenTexts, largest: bool) -> tuple[Pull, ...]:
    spread, mean = torch.std_mean(logits_v.double(), correction=0)
    values, ids = logits_v.topk(top, largest=largest)
    return tuple(
        Pull(texts.text(token), token, value, float((value - mean) / spread) if spread > 0 else 0.0)
        for token, value in zip(ids.tolist(), values.tolist(), strict=True)
    )
