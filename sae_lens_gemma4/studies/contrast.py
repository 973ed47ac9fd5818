"""`interp contrast`: where, by layer and latent, two groups of items differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.identity import sae_hash
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.evaluation.measuring import check_sae
from sae_lens_gemma4.evaluation.result import versions
from sae_lens_gemma4.interp.contrasts.contrast import MIN_PERMUTATIONS, Contrast, contrast, in_group
from sae_lens_gemma4.interp.item_means import ItemMeans, Kind, Statistic, item_means
from sae_lens_gemma4.interp.items import Count, Item, ItemSource, item_corpus, read_items
from sae_lens_gemma4.interp.steering.answering import RIGHT, Answering, answer, graded
from sae_lens_gemma4.models.interface import HookedModel, n_layers_of, require_hook
from sae_lens_gemma4.neuronpedia.job import Place
from sae_lens_gemma4.studies.study import (
    Study,
    items_facts,
    local_items,
    model_facts,
    plan_items,
    plan_model,
    plan_sae,
    save_tensors,
)
from sae_lens_gemma4.training.config import Model

ANSWERS, EFFECTS = "answers", "effects.safetensors"
KINDS: tuple[Kind, ...] = ("activations", "latents")


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Items in two groups: as a column says, or by whether the model answers them right.

    Attributes:
        items: where they are.
        group: the group that is held against all others; the first that appears by default.
        answers: have the model answer the items first; the groups are then right and wrong answers.
        count: which of an item's tokens count: "all", "prompt", "response" or "last".
    """

    items: ItemSource
    group: str | None = None
    answers: Answering | None = None
    count: Count | None = None

    def __post_init__(self) -> None:
        if self.answers is not None and (self.items.group is not None or self.items.answer is None):
            raise ConfigError("Groups of right and wrong `answers` need a column `items.answer`, and no `items.group`.")
        if self.answers is None and self.items.group is None:
            raise ConfigError("Name the column with the groups, `items.group`, or have the items answered, `answers`.")

    @property
    def counted(self) -> Count:
        return self.count or ("all" if self.answers is None else "response")

    def plan(self) -> str:
        how = f"column {self.items.group!r}"
        if self.answers is None and (items := local_items(self.items)):
            in_group(items, self.group)
        if self.answers is not None:
            how = f"right and wrong by {self.answers.extractor}"
        return f"{plan_items(self.items)} Groups: {how}; tokens that count: {self.counted}."

    def read(self, model: HookedModel) -> list[Item]:
        """The items, as the model reads them."""
        return read_items(self.items, model.tokenizer)

    def grouped(
        self, model: HookedModel, items: list[Item], folder: Path, *, progress: bool
    ) -> tuple[list[Item], dict[str, Any] | None]:
        """The items in their groups, and how they were answered where they were. Answers are kept in `folder`."""
        if self.answers is None:
            return items, None
        outputs = answer(model, items, folder / ANSWERS, self.answers, progress=progress)
        return graded(items, outputs, self.answers)

    def facts(self, items: list[Item]) -> dict[str, Any]:
        return {**items_facts(self.items, items), "count": self.counted}


@dataclass(frozen=True, kw_only=True)
class ContrastOptions:
    """Arguments of `contrast`: see there."""

    permutations: int = 1000
    splits: int = 20
    seed: int = 0
    top: int = 10
    min_active: int = 5
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.permutations < MIN_PERMUTATIONS:
            raise ConfigError(f"contrast.permutations must be at least {MIN_PERMUTATIONS}, not {self.permutations}.")
        if min(self.splits, self.top, self.min_active) < 1 or self.seed < 0:
            raise ConfigError(f"contrast needs splits, top and min_active above 0, and a seed not below it: {self}.")

    def of(self, means: ItemMeans, groups: tuple[Any, tuple[str, str]]) -> Contrast:
        return contrast(means, groups[0], names=groups[1], **vars(self))


@dataclass(frozen=True, kw_only=True)
class ContrastStudy(Study):
    """A recipe of `interp contrast`.

    Attributes:
        hooks: whose activations are compared; every layer's output by default, `[]` for none.
        saes: whose latents are compared, each at its own hook.
        statistic: of an item's tokens: "mean", "max" or "last".
        batch_items: items a forward pass.
    """

    model: Model
    groups: Groups
    hooks: list[str] | None = None
    saes: list[Place] = field(default_factory=list)
    statistic: Statistic = "mean"
    contrast: ContrastOptions = field(default_factory=ContrastOptions)
    batch_items: int = 16

    def __post_init__(self) -> None:
        if self.batch_items < 1:
            raise ConfigError(f"batch_items must be at least 1, not {self.batch_items}.")
        if self.hooks == [] and not self.saes:
            raise ConfigError("Neither `hooks` nor `saes` names anything to compare: leave `hooks` out for all layers.")

    def plan(self) -> list[str]:
        sites = "every layer" if self.hooks is None else f"{len(self.hooks)} hooks"
        return [
            plan_model(self.model),
            self.groups.plan(),
            *(plan_sae(place)[0] for place in self.saes),
            f"One forward pass at {sites} and {len(self.saes)} SAEs; {self.contrast.permutations:,} permutations.",
        ]

    def study(self, folder: Path, *, progress: bool) -> dict[str, Any]:
        model = self.model.load()
        hooks = every_layer(model) if self.hooks is None else [require_hook(model, name) for name in self.hooks]
        loaded = [(place, place.load(self.model.device)) for place in self.saes]
        saes = {check_sae(sae, place.hook_name): sae for place, sae in loaded}
        for name in saes:
            require_hook(model, name)
        if len(saes) < len(loaded):
            raise ConfigError("Two of the SAEs read the same hook: contrast them one at a time.")
        items, answers = self.groups.grouped(model, self.groups.read(model), folder, progress=progress)
        groups = in_group(items, RIGHT if self.groups.answers is not None else self.groups.group)
        means = item_means(
            model,
            item_corpus(items, model.tokenizer, count=self.groups.counted),
            hooks,
            saes,
            batch_blocks=self.batch_items,
            statistic=self.statistic,
            progress=progress,
        )
        kinds = {site.kind for site in means.sites}
        found = {kind: self.contrast.of(means.only(kind), groups) for kind in KINDS if kind in kinds}
        write_effects(folder / EFFECTS, found)
        return {
            "schema": 1,
            "kind": "contrast_by_layer",
            **{kind: found[kind].to_dict() if kind in found else None for kind in KINDS},
            "model": model_facts(model),
            "items": self.groups.facts(items) | {"statistic": self.statistic},
            "answers": answers,
            "saes": [
                {**place.source(), "hook_name": hook, "hash": sae_hash(sae)}
                for (place, sae), hook in zip(loaded, saes, strict=True)
            ],
            "settings": asdict(self.contrast),
            "files": {"effects": EFFECTS},
            "versions": versions(),
        }


def write_effects(file: Path, found: Mapping[Kind, Contrast]) -> None:
    """Of every site Cohen's d of all its features, `d/latents/<hook>`, and of activations the direction from one
    group's mean to the other's, of length one, `direction/<hook>`, which `interp steer` takes.

    Raises:
        ConfigError: it cannot be written.
    """
    tensors = {}
    for kind, one in found.items():
        for site in one.sites:
            tensors[f"d/{kind}/{site.hook_name}"] = torch.from_numpy(site.d_f.astype(np.float32))
            if site.difference_d is not None and site.difference_d.any():
                tensors[f"direction/{site.hook_name}"] = torch.from_numpy(one.difference_of_means(site.hook_name))
    save_tensors(tensors, file)


def every_layer(model: HookedModel) -> list[str]:
    """The hooks of all layers' outputs."""
    return [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers_of(model))]
