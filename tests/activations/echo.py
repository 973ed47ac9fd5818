"""A model whose activations say which token they are of, so that an order can be read off a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sae_lens_gemma4.activations.corpus import Corpus

WIDTH = 13
HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]


class Echo:
    """At layer i, each component of a token's activation is its id times i + 1; NaN where asked for.

    Attributes:
        stops: `stop_at_layer` of each run.
        on_run: called at the start of each run.
    """

    tokenizer = None

    def __init__(self, nan: dict[str, Sequence[int]] | None = None) -> None:
        self.nan = nan or {}
        self.hook_dict = dict.fromkeys(HOOKS)
        self.stops: list[int | None] = []
        self.on_run = lambda: None

    def parameters(self):
        return iter([nn.Parameter(torch.zeros(1))])

    def run_with_cache(self, tokens_bp: torch.Tensor, *, names_filter: list[str], stop_at_layer: int | None, **_: Any):
        self.on_run()
        self.stops.append(stop_at_layer)
        cache = {}
        for name in names_filter:
            acts_bpd = (tokens_bp * (HOOKS.index(name) + 1)).float()[..., None].repeat(1, 1, WIDTH)
            acts_bpd[torch.isin(tokens_bp, torch.tensor(self.nan.get(name, [])))] = float("nan")
            cache[name] = acts_bpd
        return None, cache


def numbered(n_blocks: int, *, context_size: int = 6, first: int = 0, name: str = "numbers") -> Corpus:
    """A corpus whose every token is another number; the first of a block does not count; two blocks a document."""
    tokens_bp = first + torch.arange(n_blocks * context_size).view(n_blocks, context_size)
    keep_bp = torch.ones_like(tokens_bp, dtype=torch.bool)
    keep_bp[:, 0] = False
    document_bp = (torch.arange(n_blocks) // 2)[:, None].expand_as(tokens_bp).contiguous()
    return Corpus(tokens_bp, keep_bp, document_bp, name)
