"""`interp profile`: how far from its tokens each layer is, and where that changes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.layers.profile import profile_layers
from sae_lens_gemma4.neuronpedia.job import Text
from sae_lens_gemma4.studies.study import Study, corpus_of, model_facts, plan_model, plan_text
from sae_lens_gemma4.training.config import Model


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """How a profile is made.

    Attributes:
        nearest_tokens: tokens drawn for what needs a product with the whole vocabulary; 0 for none.
        unembedding: compare those with the unembedding too, where it is not tied to the embedding.
        batch_blocks: blocks a forward pass; all layers of one batch are in memory at once.
        prompts: the first so many blocks of the text; None for all.
    """

    nearest_tokens: int = 4096
    unembedding: bool = False
    batch_blocks: int = 4
    prompts: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0

    def __post_init__(self) -> None:
        least = self.batch_blocks if self.prompts is None else min(self.batch_blocks, self.prompts)
        if least < 1 or min(self.nearest_tokens, self.seed) < 0:
            raise ConfigError(
                f"profile needs batch_blocks and prompts above 0, and nearest_tokens and seed not below it: {self}."
            )

    def blocks(self, corpus: Corpus) -> Corpus:
        """The part of a text that is profiled."""
        n = corpus.n_blocks if self.prompts is None else min(self.prompts, corpus.n_blocks)
        return corpus if n == corpus.n_blocks else corpus.take(torch.arange(n))

    def arguments(self) -> dict[str, Any]:
        """Of `profile_layers`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "prompts"}


@dataclass(frozen=True, kw_only=True)
class ProfileStudy(Study):
    """A recipe of `interp profile`."""

    model: Model
    text: Text
    profile: ProfileOptions = field(default_factory=ProfileOptions)

    def plan(self) -> list[str]:
        drawn = min(self.profile.nearest_tokens, self.text.prompts * self.text.context_size)
        return [
            plan_model(self.model),
            plan_text(self.text),
            f"One forward pass for all layers; {drawn:,} of its tokens are held against the whole vocabulary.",
        ]

    def study(self, folder: Path, *, progress: bool) -> dict[str, Any]:  # noqa: ARG002
        model, options = self.model.load(), self.profile
        corpus = options.blocks(corpus_of(self.text, model))
        isolated = self.text.isolate_documents
        made = profile_layers(model, corpus, **options.arguments(), isolate_documents=isolated, progress=progress)
        return made.to_dict() | {"model": model_facts(model) | made.model}
