"""A model's tokens as directions: its embedding or unembedding, and which token of it an activation is nearest to.

A product with 262,144 tokens is the dearest thing that a reading of layers does, and half of its cost is the matrix
itself, which in bfloat16 has to be made float32 a part at a time. So activations that are to be compared are held until
there are many of them, of all layers together, and the matrix is read once for all.

On a GPU a float32 product also takes many times as long as one of 16 bits, in which the forward pass was. There, of
weights of 16 bits, the product in their own dtype only names candidates, and the greatest cosine is that of the best of
these in float32 (`TokenSpace`).

Shapes: `t` tokens of a batch, `s` drawn tokens, `r` rows of activations, `l` hooks, `d` the stream's width, `v`
vocabulary, `k` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sae_lens_gemma4.errors import ModelError
from sae_lens_gemma4.models.geometry import text_decoder
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.models.loading import is_ours

ROUNDING = 1e-6
"""Of a cosine in float32: what is nearer by less is not nearer."""
_VOCABULARY, _ROWS = 2**13, 2**12
"""Rows of the matrix, and of activations, that are multiplied at a time."""
_CANDIDATES, _RECHECKED = 16, 2**8
"""Tokens of each row that a product of 16 bits leaves, and rows whose candidates are compared at a time."""
_HALVES = (torch.bfloat16, torch.float16)
_HELD = 2**26
"""Numbers of drawn activations that wait: 256 MiB."""


def token_matrices(model: HookedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The embedding and the unembedding of a model, `[v, d]`; the latter None where it has none.

    Raises:
        ModelError: there is no embedding where the package's classes, transformers and TransformerLens have it.
    """
    hooked: Any = model
    hf_model: Any = getattr(hooked, "original_model", None) or getattr(hooked, "model", None)
    if is_ours(hooked):
        return text_decoder(hf_model).embed_tokens.weight, hf_model.lm_head.weight
    if hasattr(hf_model, "get_input_embeddings"):
        head = hf_model.get_output_embeddings()
        return hf_model.get_input_embeddings().weight, None if head is None else head.weight
    if hasattr(hooked, "W_E"):
        return hooked.W_E, hooked.W_U.T
    raise ModelError(
        f"The token embeddings of this {type(model).__name__} cannot be found: it has neither a model of transformers "
        "in it nor a W_E. Load it with load_model, or as a HookedTransformer."
    )


def same_matrix(a_vd: torch.Tensor, b_vd: torch.Tensor) -> bool:
    """Whether both hold the same numbers, as they do where they are tied."""
    if a_vd.shape != b_vd.shape:
        return False
    return a_vd.data_ptr() == b_vd.data_ptr() or torch.equal(a_vd, b_vd.to(a_vd.device))


def unit(x_td: torch.Tensor) -> torch.Tensor:
    """float32 rows of length 1; rows of zeros stay."""
    return torch.nn.functional.normalize(x_td.float(), dim=1, eps=1e-30)


class TokenSpace:
    """The directions of a vocabulary's rows. A row of zeros has none, and is nobody's nearest.

    Args:
        weight_vd: the rows.
        candidates: the nearest is sought among the 16 of the largest cosines by a product in the weights' dtype, and
            told in float32. bfloat16 rounds a cosine by 0.4 % of itself at most, so the nearest is missed only where 16
            others come within about 1 % of it, and then one of them is taken for it: the greatest cosine is too small
            by no more than that, and `recovered` errs where the own token is that near to the greatest. By default on
            CUDA with weights of 16 bits; elsewhere all products are float32.
    """

    def __init__(self, weight_vd: torch.Tensor, candidates: bool | None = None) -> None:
        self.weight_vd = weight_vd.detach()
        self.candidates = weight_vd.is_cuda and weight_vd.dtype in _HALVES if candidates is None else candidates

    def rows(self, tokens_t: torch.Tensor) -> torch.Tensor:
        """Unit rows of some tokens, float32 `[t, d]`."""
        return unit(self.weight_vd[tokens_t.to(self.weight_vd.device)])

    def nearest(self, unit_rd: torch.Tensor) -> torch.Tensor:
        """The greatest cosine of each unit row with any token, float32 `[r]`; products are of a part at a time."""
        unit_rd = unit_rd.to(self.weight_vd.device)
        if self.candidates:
            return self._best(unit_rd, self._named(unit_rd))
        best_r = torch.full((len(unit_rd),), -torch.inf, device=unit_rd.device)
        for part_vd in self.weight_vd.split(_VOCABULARY):
            part_vd = unit(part_vd[part_vd.any(dim=1)])
            for rows_rd, of_rows_r in zip(unit_rd.split(_ROWS), best_r.split(_ROWS), strict=True):
                if len(part_vd):
                    torch.maximum(of_rows_r, (rows_rd @ part_vd.T).amax(dim=1), out=of_rows_r)
        return best_r.clamp(max=1)

    def _named(self, unit_rd: torch.Tensor) -> list[torch.Tensor]:
        """Of each row the tokens with the largest cosines in the weights' own dtype, `[r, k]` in parts of rows."""
        rows = unit_rd.to(self.weight_vd.dtype).split(_ROWS)
        values = [part_rd.new_empty(len(part_rd), 0) for part_rd in rows]
        named = [torch.empty_like(value_rk, dtype=torch.int64) for value_rk in values]
        for first in range(0, len(self.weight_vd), _VOCABULARY):
            part_vd = self.weight_vd[first : first + _VOCABULARY]
            there_v = part_vd.any(dim=1).nonzero()[:, 0]
            part_vd = unit(part_vd[there_v]).to(part_vd.dtype)
            for at, part_rd in enumerate(rows):
                value_rk, token_rk = (part_rd @ part_vd.T).topk(min(_CANDIDATES, len(there_v)), dim=1)
                value_rk, token_rk = (
                    torch.cat([old, new], dim=1)
                    for old, new in ((values[at], value_rk), (named[at], first + there_v[token_rk]))
                )
                values[at], best_rk = value_rk.topk(min(_CANDIDATES, value_rk.shape[1]), dim=1)
                named[at] = token_rk.gather(1, best_rk)
        return named

    def _best(self, unit_rd: torch.Tensor, named: list[torch.Tensor]) -> torch.Tensor:
        """The greatest cosine of each unit row with any of its candidates, in float32."""
        best_r = torch.full((len(unit_rd),), -torch.inf, device=unit_rd.device)
        for rows_rd, of_rows_r, token_rk in zip(unit_rd.split(_ROWS), best_r.split(_ROWS), named, strict=True):
            parts = zip(*(x.split(_RECHECKED) for x in (rows_rd, of_rows_r, token_rk)), strict=True)
            for part_rd, of_part_r, token_pk in parts:
                if token_pk.shape[1]:
                    row_pkd = self.rows(token_pk.flatten()).view(*token_pk.shape, -1)
                    of_part_r.copy_(torch.einsum("rd,rkd->rk", part_rd, row_pkd).amax(dim=1))
        return best_r.clamp(max=1)


class DrawnTokens:
    """Tokens drawn over a whole text, and their cosines at every hook as the text goes by.

    Call `add` for each hook and then `close`, batch by batch, and `flush` at the end.

    Args:
        spaces: what they are compared to.
        place_s: which of the text's tokens, ascending.

    Attributes:
        norm_ls: float32, of the activations.
        own_ls, nearest_ls: for each space, float32: the cosine with the token's own row, and with the nearest one.
    """

    def __init__(self, spaces: Sequence[TokenSpace], place_s: torch.Tensor, n_hooks: int) -> None:
        self.spaces, self.place_s = spaces, place_s
        self.norm_ls = torch.zeros(n_hooks, len(place_s))
        self.own_ls, self.nearest_ls = ([torch.zeros_like(self.norm_ls) for _ in spaces] for _ in range(2))
        self._hooks: list[torch.Tensor] = []
        self._held: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []
        self._done = 0

    def among(self, first: int, n: int) -> torch.Tensor:
        """Which of the `n` tokens from `first` on were drawn, counted from there."""
        low, high = torch.searchsorted(self.place_s, torch.tensor([first, first + n])).tolist()
        return self.place_s[low:high] - first

    def add(self, x_sd: torch.Tensor) -> None:
        """The next hook's activations of the batch's drawn tokens."""
        self._hooks.append(x_sd.float())

    def close(self, tokens_s: torch.Tensor) -> None:
        """All hooks of a batch were added; compare what is held if it is much."""
        hooks, self._hooks = self._hooks, []
        if not len(tokens_s):
            return
        self._held.append(torch.stack([x_sd.to(hooks[0].device) for x_sd in hooks]))
        self._tokens.append(tokens_s)
        if sum(x_lsd.numel() for x_lsd in self._held) >= _HELD:
            self.flush()

    def flush(self) -> None:
        """Compare what is held."""
        if not self._held:
            return
        x_lsd, tokens_s = torch.cat(self._held, dim=1), torch.cat(self._tokens)
        here = slice(self._done, self._done + len(tokens_s))
        self.norm_ls[:, here] = torch.linalg.vector_norm(x_lsd, dim=2).cpu()
        unit_rd = unit(x_lsd.flatten(0, 1))
        for space, own_ls, nearest_ls in zip(self.spaces, self.own_ls, self.nearest_ls, strict=True):
            own_sd = space.rows(tokens_s).to(unit_rd.device)
            unit_lsd = unit_rd.view_as(x_lsd)
            own_ls[:, here] = torch.einsum("lsd,sd->ls", unit_lsd, own_sd).clamp(-1, 1).cpu()
            nearest_ls[:, here] = space.nearest(unit_rd).view(x_lsd.shape[:2]).cpu()
        self._held, self._tokens, self._done = [], [], here.stop
