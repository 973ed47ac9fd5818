"""`interp lens`: what each layer would say if it were the last, and what latents write."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.identity import sae_hash
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.evaluation.measuring import check_sae
from sae_lens_gemma4.evaluation.result import versions
from sae_lens_gemma4.interp.items import ItemSource, read_items
from sae_lens_gemma4.interp.layers.lens import decoder_lens, logit_lens
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.neuronpedia.job import Place
from sae_lens_gemma4.studies.study import (
    Study,
    check_latents,
    items_facts,
    model_facts,
    plan_items,
    plan_model,
    plan_sae,
)
from sae_lens_gemma4.training.config import Model


@dataclass(frozen=True, kw_only=True)
class LensOptions:
    """Arguments of `logit_lens`: see there."""

    targets: list[str] | None = None
    positions: Literal["last", "all"] = "last"
    layers: list[int] | None = None
    top: int = 5
    final_norm: bool = True
    batch_prompts: int = 8
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if min(self.top, self.batch_prompts) < 1:
            raise ConfigError(f"lens.top and lens.batch_prompts must be above 0, not {self.top}, {self.batch_prompts}.")

    def arguments(self) -> dict[str, Any]:
        targets = self.targets[0] if self.targets is not None and len(self.targets) == 1 else self.targets
        return {**vars(self), "targets": targets}


@dataclass(frozen=True, kw_only=True)
class LensStudy(Study):
    """A recipe of `interp lens`.

    Attributes:
        prompts: texts to read; or `items`, their place.
        sae, latents: whose decoder rows are read too.
    """

    model: Model
    prompts: list[str] | None = None
    items: ItemSource | None = None
    lens: LensOptions = field(default_factory=LensOptions)
    sae: Place | None = None
    latents: list[int] | None = None

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.items is None):
            raise ConfigError("`interp lens` reads either `prompts`, a list of texts, or `items`.")
        if self.prompts is not None and not all(text.strip() for text in self.prompts or [""]):
            raise ConfigError("`prompts` is a list of texts that are not empty.")
        if (self.sae is None) != (not self.latents):
            raise ConfigError("`sae` and `latents` go together: whose decoder rows are read, and which.")

    def plan(self) -> list[str]:
        read = plan_items(self.items) if self.items else f"{len(self.prompts or ()):,} prompts."
        sentences = [plan_model(self.model), read]
        if self.sae is not None:
            check_latents(self.sae, self.latents or ())
            sentences.append(f"{len(self.latents or ()):,} decoder rows. {plan_sae(self.sae)[0]}")
        return sentences

    def study(self, folder: Path, *, progress: bool) -> dict[str, Any]:  # noqa: ARG002
        model = self.model.load()
        texts, read = self.prompts, None
        if self.items is not None:
            items = read_items(self.items, model.tokenizer)
            texts, read = [item.prompt for item in items], items_facts(self.items, items)
        document = logit_lens(model, texts or [], **self.lens.arguments(), progress=progress).to_dict()
        facts = {
            "model": {**model_facts(model)},
            "items": read,
            "decoder": self._decoder(model),
            "versions": versions(),
        }
        return {**document, **facts}

    def _decoder(self, model: HookedModel) -> dict[str, Any] | None:
        if self.sae is None:
            return None
        sae = self.sae.load(self.model.device)
        hook_name = check_sae(sae, self.sae.hook_name)
        with torch.no_grad():
            found = decoder_lens(sae, model, hook_name, self.latents or [])
        of = {**self.sae.source(), "hook_name": hook_name, "hash": sae_hash(sae)}
        return {"sae": of, "latents": [{"index": index, **one.to_dict()} for index, one in found.items()]}
