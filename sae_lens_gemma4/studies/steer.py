"""`interp steer`: what adding a direction does to answers, beside what its opposite and chance directions do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.result import versions
from sae_lens_gemma4.interp.contrasts.contrast import in_group
from sae_lens_gemma4.interp.item_means import item_means
from sae_lens_gemma4.interp.items import Item, ItemSource, item_corpus, read_items
from sae_lens_gemma4.interp.steering.answering import RIGHT, check_apart, gold_answers
from sae_lens_gemma4.interp.steering.conditions import SteeringSettings, plan
from sae_lens_gemma4.interp.steering.extractors import extractor
from sae_lens_gemma4.interp.steering.run import steer
from sae_lens_gemma4.interp.steering.vectors import SteeringVector, check_hook, from_contrast, from_file, from_latent
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.neuronpedia.job import Place
from sae_lens_gemma4.studies.contrast import Groups
from sae_lens_gemma4.studies.study import (
    Study,
    check_latents,
    model_facts,
    plan_items,
    plan_model,
    plan_sae,
)
from sae_lens_gemma4.training.config import Model

OUTPUTS, CONTRAST = "outputs", "contrast"


@dataclass(frozen=True, kw_only=True)
class Direction:
    """What is added, and where: the difference of two groups' means, a latent's decoder row, or a file's vector.

    Attributes:
        hook_name: a hook of the residual stream; a latent's is its SAE's unless given.
        groups: other items than are steered; a vector made of the same ones knows their answers.
        sae, latent: whose decoder row, and which.
        file, tensor: .safetensors, .npy or .pt, and which of its tensors where it has several.
    """

    hook_name: str | None = None
    groups: Groups | None = None
    sae: Place | None = None
    latent: int | None = None
    file: str | None = None
    tensor: str | None = None

    def __post_init__(self) -> None:
        if (self.groups is not None) + (self.sae is not None) + (self.file is not None) != 1:
            raise ConfigError("A direction is of one kind: `groups`, `sae` with `latent`, or `file`.")
        if (self.sae is None) != (self.latent is None):
            raise ConfigError("`sae` and `latent` go together: whose decoder row, and which.")
        if self.hook_name is None and self.sae is None:
            raise ConfigError("State `hook_name`, where the direction is added, as blocks.27.hook_resid_post.")

    def plan(self) -> str:
        if self.groups is not None:
            return f"Direction: difference of means at {self.hook_name}. {self.groups.plan()}"
        if self.sae is not None:
            check_latents(self.sae, [int(self.latent or 0)])
            return f"Direction: decoder row {self.latent}. {plan_sae(self.sae)[0]}"
        if not Path(str(self.file)).is_file():
            raise ConfigError(f"There is no vector at {self.file}.")
        return f"Direction: {self.file} at {self.hook_name}."

    def of(
        self, model: HookedModel, steered: Sequence[Item], device: str, folder: Path, *, progress: bool
    ) -> tuple[SteeringVector, Any]:
        """The vector, and how the items that it is made of were answered, where they were.

        Raises:
            DataError: it is made of items that are to be steered.
            Others: as `contrast`, `from_latent` and `from_file`.
        """
        if self.sae is not None:
            return from_latent(self.sae.load(device), int(self.latent or 0), self.hook_name), None
        hook_name = check_hook(model, str(self.hook_name))
        if self.groups is None:
            return from_file(str(self.file), hook_name, self.tensor), None
        items = self.groups.read(model)
        check_apart(steered, items)
        items, answers = self.groups.grouped(model, items, folder / CONTRAST, progress=progress)
        in_group_n, names = in_group(items, RIGHT if self.groups.answers else self.groups.group)
        corpus = item_corpus(items, model.tokenizer, count=self.groups.counted)
        rows_nd = item_means(model, corpus, [hook_name], progress=progress).of(hook_name)
        difference_d = rows_nd[in_group_n].mean(axis=0) - rows_nd[~in_group_n].mean(axis=0)
        origin = f"mean of {int(in_group_n.sum())} {names[0]} items less that of {int((~in_group_n).sum())} {names[1]}"
        return from_contrast(difference_d, hook_name, origin), answers


@dataclass(frozen=True, kw_only=True)
class SteerStudy(Study):
    """A recipe of `interp steer`.

    Attributes:
        items: the questions, with a column of right answers.
        extractor: how an answer is read off an output: gsm8k, last_number, choice, exact, contains, regex:<pattern>.
    """

    model: Model
    items: ItemSource
    direction: Direction
    extractor: str = "gsm8k"
    steering: SteeringSettings = field(default_factory=SteeringSettings)

    def __post_init__(self) -> None:
        extractor(self.extractor)
        if self.items.answer is None:
            raise ConfigError("Name the column that holds the right answers: `items.answer`.")

    def plan(self) -> list[str]:
        conditions = plan(self.steering)
        n = len(conditions)
        return [
            plan_model(self.model),
            plan_items(self.items),
            self.direction.plan(),
            f"{n} conditions ({', '.join(c.name for c in conditions)}), each answer up to "
            f"{self.steering.max_new_tokens:,} tokens, read by {self.extractor}.",
        ]

    def study(self, folder: Path, *, progress: bool) -> dict[str, Any]:
        model = self.model.load()
        items = read_items(self.items, model.tokenizer)
        gold_answers(items, self.extractor)
        vector, answers = self.direction.of(model, items, self.model.device, folder, progress=progress)
        result = steer(
            model, items, vector, self.steering, folder / OUTPUTS, extractor=self.extractor, progress=progress
        )
        document = result.to_dict()
        return {
            **document,
            "model": model_facts(model),
            "source": f"{self.items.dataset} [{self.items.split}]",
            "contrast_answers": answers,
            "versions": versions(),
        }
