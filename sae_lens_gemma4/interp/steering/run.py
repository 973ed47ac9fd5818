"""A steering run from items to a verdict: answers by condition, whether they are right, and what that shows.

The baseline is answered and read first. Where the extractor finds nothing in any of its answers, accuracy would be 0
for every condition and the run a waste; it stops there and shows an answer.

Shapes: `n` items, `d` the hook's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.items import Item
from sae_lens_gemma4.interp.statistics import Share, share
from sae_lens_gemma4.interp.steering.answering import (
    answer_missing,
    check_found,
    facts_of,
    gold_answers,
    prompts_of,
)
from sae_lens_gemma4.interp.steering.conditions import Condition, SteeringSettings, plan
from sae_lens_gemma4.interp.steering.effects import Effect, OppositeSets, effects, opposite_sets
from sae_lens_gemma4.interp.steering.extractors import Extractor
from sae_lens_gemma4.interp.steering.extractors import extractor as named
from sae_lens_gemma4.interp.steering.generating import adding
from sae_lens_gemma4.interp.steering.outputs import Outputs
from sae_lens_gemma4.interp.steering.vectors import (
    Norm,
    SteeringVector,
    check_vector,
    mean_norm,
    random_direction,
    vector_hash,
)
from sae_lens_gemma4.interp.steering.verdict import Verdict, verdict
from sae_lens_gemma4.models.interface import HookedModel, model_name

SAMPLES, SAMPLE_CHARACTERS = 3, 600
ROUNDING = 0.999
"""Cosine from which on a direction that was made anew is the kept one."""


class Answers(NamedTuple):
    """How a condition's outputs read, beside being right.

    Attributes:
        found: outputs in which the extractor found an answer; the others count as wrong.
        mean_tokens: tokens generated an item.
        cut: outputs that the limit of tokens ended.
    """

    found: Share
    mean_tokens: float
    cut: Share


@dataclass(frozen=True, eq=False)
class SteeringResult:
    """What `steer` returns.

    Attributes:
        outcomes: whether each item was answered right, bool `[n]` a condition.
        samples: outputs of a few items, those whose answers changed first, by condition.
        facts: model, vector, items and settings.
    """

    effects: tuple[Effect, ...]
    answers: Mapping[Condition, Answers]
    overlaps: tuple[OppositeSets, ...]
    verdict: Verdict
    norm: Norm
    extractor: str
    outcomes: Mapping[Condition, np.ndarray[Any, np.dtype[np.bool_]]]
    samples: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        conditions = []
        for effect in self.effects:
            answers = self.answers[effect.condition]
            conditions.append(
                {
                    **effect.to_dict(),
                    "added_norm": abs(effect.condition.scale) * self.norm.mean,
                    "answer_found": answers.found._asdict(),
                    "mean_tokens": answers.mean_tokens,
                    "cut": answers.cut._asdict(),
                }
            )
        return {
            "schema": 1,
            "kind": "steering",
            **self.facts,
            "norm": self.norm._asdict(),
            "extractor": self.extractor,
            "conditions": conditions,
            "overlaps": [o.to_dict() for o in self.overlaps],
            "verdict": self.verdict.to_dict(),
            "samples": [dict(s) for s in self.samples],
        }


def steer(
    model: HookedModel,
    items: Sequence[Item],
    vector: SteeringVector,
    settings: SteeringSettings,
    folder: str | Path,
    *,
    extractor: str | Extractor = "gsm8k",
    progress: bool = True,
) -> SteeringResult:
    """Answer the items under every condition, and say what the vector does. Goes on where an earlier call was stopped.

    Args:
        model: a `Gemma4ProxyLM` or `Gemma4Bridge`, with its tokenizer.
        items: prompts as the model reads them, with right answers.
        folder: where outputs are kept; another extractor can read the same ones again at no cost. The vector is kept
            there too, and that one is added from then on: made anew, its last digits may be others.
        extractor: how answers are found: a name, `regex:<pattern>`, or an extractor.

    Raises:
        DataError: an item without a right answer; no answer found in any output of the baseline.
        ConfigError: the folder holds another run (also one with another vector, or in 16 bits other batches), or a
            hook that cannot be steered.
        ModelError: a model of another width or class.
        UnknownNameError: no such extractor or hook.
    """
    read = named(extractor) if isinstance(extractor, str) else extractor
    gold = gold_answers(items, read)
    hook_name = check_vector(vector, model)
    corpus = prompts_of(model, items)
    kept = _facts(model, items, vector, settings)
    outputs = Outputs(folder, kept)
    kept_d = _kept_direction(outputs, vector)
    facts = {"model": model_name(model), **kept, "vector": vector_hash(vector.hook_name, kept_d)}
    norm = _norm(outputs, model, corpus, hook_name, settings.batch_items)
    conditions = plan(settings)
    total = len(conditions) * len(items)
    with tqdm(total=total, initial=len(outputs.found), desc="Answering", unit="item", disable=not progress) as bar:
        for condition in conditions:
            direction_d = kept_d if condition.seed is None else random_direction(len(kept_d), condition.seed)
            delta_d = direction_d * (condition.scale * norm.mean)
            answer_missing(
                model,
                corpus,
                outputs,
                condition.name,
                batch_items=settings.batch_items,
                max_new_tokens=settings.max_new_tokens,
                stop=settings.stop,
                hook=None if condition.kind == "baseline" else (hook_name, adding(delta_d, settings.positions)),
                done=bar.update,
            )
            if condition.kind == "baseline":
                check_found(outputs.of(condition.name, len(items)), read)
    return _result(outputs, conditions, items, gold, read, norm, facts)


def _result(
    outputs: Outputs,
    conditions: list[Condition],
    items: Sequence[Item],
    gold: list[str],
    read: Extractor,
    norm: Norm,
    facts: Mapping[str, Any],
) -> SteeringResult:
    outcomes, answers = {}, {}
    for condition in conditions:
        made = outputs.of(condition.name, len(items))
        found = [read.find(output.text) for output in made]
        outcomes[condition] = np.array(
            [f is not None and read.same(f, right) for f, right in zip(found, gold, strict=True)]
        )
        answers[condition] = Answers(
            share(sum(f is not None for f in found), len(found)),
            float(np.mean([output.n_tokens for output in made])),
            share(sum(output.cut for output in made), len(made)),
        )
    by_condition = effects(outcomes)
    return SteeringResult(
        tuple(by_condition),
        answers,
        tuple(opposite_sets(by_condition)),
        verdict(outcomes),
        norm,
        read.name,
        outcomes,
        tuple(_samples(outputs, by_condition, items, gold, read)),
        facts,
    )


def _samples(
    outputs: Outputs, by_condition: list[Effect], items: Sequence[Item], gold: list[str], read: Extractor
) -> Iterator[Mapping[str, Any]]:
    changed = sorted({i for e in by_condition for i in (*e.recovered, *e.broken)})
    for item in dict.fromkeys([*changed, *range(len(items))][:SAMPLES]):
        texts = {}
        for effect in by_condition:
            text = outputs.found[effect.condition.name, item].text
            cut = text if len(text) <= SAMPLE_CHARACTERS else text[: SAMPLE_CHARACTERS - 1] + "…"
            texts[effect.condition.name] = {"text": cut, "answer": read.find(text)}
        yield {"item": item, "prompt": items[item].prompt[-SAMPLE_CHARACTERS:], "right": gold[item], "outputs": texts}


def _facts(
    model: HookedModel, items: Sequence[Item], vector: SteeringVector, settings: SteeringSettings
) -> dict[str, Any]:
    """What tells this run from others, the vector apart (`_kept_direction`)."""
    return {
        **facts_of(model, items, settings.batch_items),
        "hook": vector.hook_name,
        "origin": vector.origin,
        "settings": {k: v for k, v in asdict(settings).items() if k != "batch_items"},
    }


def _kept_direction(outputs: Outputs, vector: SteeringVector) -> torch.Tensor:
    """The direction that the folder was begun with, which the given one must be but for rounding."""
    kept_d = outputs.vector()
    if kept_d is None:
        outputs.keep_vector(vector.direction_d)
        return vector.direction_d
    same_width = kept_d.shape == vector.direction_d.shape
    cosine = float(kept_d.double() @ vector.direction_d.double()) if same_width else 0.0
    if cosine < ROUNDING:
        raise ConfigError(
            f"{outputs.folder} was begun with another vector than {vector.origin} (cosine {cosine:.4f}). Go on with "
            "the same one, or take another folder."
        )
    return kept_d


def _norm(outputs: Outputs, model: HookedModel, corpus: Corpus, hook_name: str, batch_blocks: int) -> Norm:
    """Measured once a folder: on another machine the last digits may differ, and with them what is added."""
    kept = outputs.norm()
    if kept is not None:
        return Norm(float(kept["mean"]), int(kept["n_tokens"]))
    with torch.no_grad():
        norm = mean_norm(model, corpus, hook_name, batch_blocks=batch_blocks)
    outputs.keep_norm(norm.mean, norm.n_tokens)
    return norm
