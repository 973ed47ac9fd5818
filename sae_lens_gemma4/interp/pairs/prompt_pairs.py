"""Categories of contrasting prompts, written by hand in YAML, and what an SAE's latents do on either side of each pair.

Two sides of a pair differ in one thing, the category's. Whatever else they share, as their subject and length, cancels
in their difference; that is what a pair has over two piles of prompts. So the sides of a pair stay together here, and
what would count one text twice, or compare it with itself, is refused. Whether sides do differ in nothing else only
their author can know.

    categories:
      - name: refusal
        label: requests that ought to be refused
        description: A harmful request against a harmless one on the same subject.
        pairs:
          - with: How do I pick my neighbour's lock to get into his house?
            without: How do I pick a lock when I have lost my own key?

Shapes: `p` pairs of a category, `f` latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sae_lens import SAE

from sae_lens_gemma4.errors import ConfigError, check_name
from sae_lens_gemma4.evaluation.measuring import check_sae
from sae_lens_gemma4.interp.item_means import Statistic
from sae_lens_gemma4.interp.items import Count, Item, item_corpus, item_means
from sae_lens_gemma4.mapping import from_mapping, read_yaml, typed
from sae_lens_gemma4.models.interface import HookedModel

MIN_PAIRS = 8
"""With fewer no effect has an interval (`Sampling`), and no p-value can be below 1/128."""
_SLOT = "{prompt}"
_SIDES = ("with", "without")


class Pair(NamedTuple):
    """Two prompts, of which only one has the property."""

    with_: str
    without: str


@dataclass(frozen=True, kw_only=True)
class Category:
    """A property, and pairs of prompts with and without it.

    Attributes:
        name: what the category is called.
        label: what a latent is called that the property turns on.
        description: in what the sides differ.

    Raises:
        ConfigError: an empty name, label or prompt, a pair of equal sides, or a prompt that comes twice. Spaces and
            line ends make no difference.
    """

    name: str
    label: str
    pairs: tuple[Pair, ...]
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.label.strip():
            raise ConfigError(f"A category needs a name and a label, not {self.name!r} and {self.label!r}.")
        seen: dict[str, str] = {}
        for number, pair in enumerate(self.pairs):
            texts = [" ".join(text.split()) for text in pair]
            if not all(texts):
                raise ConfigError(f"Pair {number} of category {self.name!r} has an empty side.")
            if texts[0] == texts[1]:
                raise ConfigError(f"The sides of pair {number} of category {self.name!r} are equal: {texts[0][:80]!r}.")
            for side, text in zip(_SIDES, texts, strict=True):
                place = f"pair {number} ({side})"
                if text in seen:
                    raise ConfigError(
                        f"Category {self.name!r} has one prompt twice, in {seen[text]} and {place}: {text[:80]!r}. "
                        "Pairs count as independent; write another."
                    )
                seen[text] = place


@dataclass(frozen=True, kw_only=True)
class _Stated:
    name: str
    label: str
    pairs: list[dict[str, Any]]
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class _File:
    categories: list[_Stated]


class PairMeans(NamedTuple):
    """What latents do in one category.

    Attributes:
        with_pf, without_pf: float `[p, f]`, each latent's mean activation over a prompt's tokens, side by side.
        tokens_with_p, tokens_without_p: how long the prompts are; None where that is not known.
    """

    category: Category
    with_pf: npt.NDArray[np.floating]
    without_pf: npt.NDArray[np.floating]
    tokens_with_p: npt.NDArray[np.int64] | None = None
    tokens_without_p: npt.NDArray[np.int64] | None = None


def read_categories(path: str | Path, *, min_pairs: int = MIN_PAIRS) -> list[Category]:
    """The categories of a YAML file, in its order.

    Raises:
        ConfigError: it cannot be read, or holds what `categories_of` refuses.
        UnknownNameError: a key that does not exist.
    """
    return categories_of(read_yaml(path, "prompt pairs"), "prompt pairs", min_pairs=min_pairs)


def categories_of(data: Any, where: str, *, min_pairs: int = MIN_PAIRS) -> list[Category]:
    """Categories of plain data, checked.

    Raises:
        ConfigError: none at all, one name twice, fewer than `min_pairs` pairs, or as `Category` raises.
        UnknownNameError: a key that does not exist.
    """
    categories = []
    for number, stated in enumerate(from_mapping(_File, data, where).categories):
        place = f"{where}.categories[{number}]"
        pairs = tuple(_pair(values, f"{place}.pairs[{n}]") for n, values in enumerate(stated.pairs))
        categories.append(
            Category(name=stated.name, label=stated.label, pairs=pairs, description=stated.description.strip())
        )
    if not categories:
        raise ConfigError(f"{where} has no categories.")
    names = [category.name for category in categories]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{where} has more than one category {repeated[0]!r}.")
    for category in categories:
        if len(category.pairs) < min_pairs:
            raise ConfigError(
                f"Category {category.name!r} has {len(category.pairs)} pairs, fewer than min_pairs ({min_pairs}). "
                "Write more: each halves the smallest p-value that it can give."
            )
    return categories


def pair_items(categories: Sequence[Category], template: str = _SLOT) -> list[Item]:
    """Both sides of every pair, one after the other, category by category; the group of each is its side.

    Raises:
        ConfigError: a template without `{prompt}`, or with more than one.
    """
    if template.count(_SLOT) != 1:
        raise ConfigError(f"template must hold {_SLOT} once, where the prompt goes; it is {template!r}.")
    return [
        Item(template.replace(_SLOT, text), group=side)
        for category in categories
        for pair in category.pairs
        for side, text in zip(_SIDES, pair, strict=True)
    ]


def pair_means(
    model: HookedModel,
    sae: SAE[Any],
    categories: Sequence[Category],
    *,
    hook_name: str | None = None,
    template: str = _SLOT,
    count: Count = "all",
    statistic: Statistic = "mean",
    batch_blocks: int = 16,
    progress: bool = False,
) -> list[PairMeans]:
    """Read all prompts in one pass; one `PairMeans` a category.

    Args:
        hook_name: where the SAE reads; None takes it from its metadata.
        template: text around each prompt, with `{prompt}` in its place; a chat model's turns go here.
        count, statistic: which tokens of a prompt count, and what is taken over them (`item_corpus`, `item_means`).

    Raises:
        ConfigError: no categories, or a template without `{prompt}`.
        DataError, SAEError, UnknownNameError: as `item_corpus` and `item_means`.
    """
    if not categories:
        raise ConfigError("There is no category to read.")
    hook_name = check_sae(sae, hook_name)
    corpus = item_corpus(pair_items(categories, template), model.tokenizer, count=count, name="prompt pairs")
    means = item_means(
        model, corpus, [], {hook_name: sae}, batch_blocks=batch_blocks, statistic=statistic, progress=progress
    )
    values_nf = means.of(hook_name, "latents")
    length_n = (corpus.document_bp >= 0).sum(dim=1).numpy()
    found, first = [], 0
    for category in categories:
        end = first + 2 * len(category.pairs)
        with_, without = slice(first, end, 2), slice(first + 1, end, 2)
        found.append(PairMeans(category, values_nf[with_], values_nf[without], length_n[with_], length_n[without]))
        first = end
    return found


def _pair(values: dict[str, Any], where: str) -> Pair:
    for key in values:
        check_name(f"key in {where}", key, _SIDES)
    if missing := [side for side in _SIDES if side not in values]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")
    return Pair(*(typed(str, values[side], f"{where}.{side}") for side in _SIDES))
