"""Items as data: what contrasts, probes and steering ask a model, and the blocks in which it reads them.

An item is one question (or prompt, or text), with what was answered to it where that is known, and the group that it
is in. All that is done with items counts items, not tokens, so here each has a block of its own, and figures of it are
means over its tokens that count (`item_means`).

Prompt and response are made into tokens one after the other, as in generation, so that where the one ends and the other
begins is known exactly.

Shapes: `n` items, `b` blocks (one an item), `p` positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.blocks import Corpus, Origin
from sae_lens_gemma4.activations.documents import is_on_hub
from sae_lens_gemma4.activations.vocabulary import encode, tokenizer_fingerprint
from sae_lens_gemma4.embedded import text as embedded_text
from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError, check_name
from sae_lens_gemma4.interp.item_means import ItemMeans, Site, item_means
from sae_lens_gemma4.mapping import read_yaml

__all__ = ["Count", "Item", "ItemMeans", "ItemSource", "Site", "item_corpus", "item_means", "read_items"]

Count = Literal["all", "prompt", "response", "last"]
_COUNTS = ("all", "prompt", "response", "last")
_FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_YAML = (".yaml", ".yml")
_SLOT = "{prompt}"
_EMPTY = {
    "response": "It has no response: name the column of responses (`response`), have the items answered first, or "
    'count "all" or "prompt".',
    "prompt": 'It has no prompt: count "all" or "response".',
}
_SPECIAL = "Its tokens there are all special: leave it out, or set exclude_special_tokens=False."


@dataclass(frozen=True)
class Item:
    """One question, prompt or text.

    Attributes:
        prompt: what the model reads, as it reads it, without BOS.
        response: what was, or is taken to have been, answered.
        answer: the right answer, in whatever form its extractor reads.
        group: which of the sets that are compared it is in.
    """

    prompt: str
    response: str = ""
    answer: str | None = None
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class ItemSource:
    """Where items are read, and which columns hold what.

    Attributes:
        dataset: name on the hub, a local JSONL, JSON, CSV, parquet, text or YAML file (a list of mappings), a saved
            dataset's folder, or `embedded:text`.
        config: of the dataset, where it has several, as GSM8K's "main".
        split: as `datasets` writes it; "train" is all of a file.
        revision: of a dataset on the hub: commit, tag or branch.
        prompt, response, answer, group: names of columns; None for what there is not.
        n: how many items; None for all.
        skip: rows to leave out before the first; in the shuffled order where there is one, so that the first 50 and
            the next 50 of one seed have nothing in common.
        shuffle_seed: shuffles all rows, which reads all of them; None leaves them in order.
        template: text around each prompt, with `{prompt}` in its place; a base model's chat form goes here.
        chat: the prompt, with its template, is a user's turn in the tokenizer's chat template, open for the answer.

    Raises:
        ConfigError: numbers or a template that make no sense, a revision of what is not on the hub.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    prompt: str = "prompt"
    response: str | None = None
    answer: str | None = None
    group: str | None = None
    n: int | None = None
    skip: int = 0
    shuffle_seed: int | None = None
    template: str = _SLOT
    chat: bool = False

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ConfigError(f"n must be at least 1, or left out for all items; not {self.n}.")
        if self.skip < 0 or (self.shuffle_seed is not None and self.shuffle_seed < 0):
            raise ConfigError(
                f"skip and shuffle_seed must not be negative, unlike {self.skip} and {self.shuffle_seed}."
            )
        if self.template.count(_SLOT) != 1:
            raise ConfigError(f"template must hold {_SLOT} once, where the prompt goes; it is {self.template!r}.")
        if self.revision is not None and not self._on_hub:
            raise ConfigError(f"Only datasets on the hub have revisions; {self.dataset} is none.")
        if self.config is not None and not self._on_hub:
            raise ConfigError(f"Only datasets on the hub have configs; {self.dataset} is none.")

    @property
    def _on_hub(self) -> bool:
        return not self.dataset.endswith(_YAML) and is_on_hub(self.dataset)


def read_items(source: ItemSource, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Item]:
    """The items of a source, with prompts as the model will read them.

    Args:
        tokenizer: whose chat template is used; needed for `chat` alone.

    Raises:
        DataError: it cannot be read, has no rows, or a row without a prompt, which is named; no chat template.
        ConfigError: `chat` without a tokenizer, or YAML that cannot be read.
        UnknownNameError: it has no such column or split; with the nearest.
    """
    if source.chat and tokenizer is None:
        raise ConfigError("chat: true needs a tokenizer with a chat template; pass the model's.")
    items = []
    for row, values in _numbered(source):
        for column in (source.prompt, source.response, source.answer, source.group):
            if column is not None and column not in values:
                raise UnknownNameError(f"column of {source.dataset}", column, values)
        prompt = values[source.prompt]
        if not isinstance(prompt, str) or not prompt.strip():
            what = "an empty prompt" if prompt is None or isinstance(prompt, str) else f"{type(prompt).__name__} there"
            raise DataError(f"Row {row} of {source.dataset} has no text in column {source.prompt!r}: {what}.")
        text = source.template.replace(_SLOT, prompt)
        items.append(
            Item(
                prompt=_as_turn(text, tokenizer, f"row {row}") if source.chat and tokenizer is not None else text,
                response=_as_text(values[source.response]) or "" if source.response is not None else "",
                answer=_as_text(values[source.answer]) if source.answer is not None else None,
                group=_as_text(values[source.group]) if source.group is not None else None,
            )
        )
    if not items:
        raise DataError(
            f"{source.dataset} (split {source.split!r}) has no rows"
            + (f" after the first {source.skip:,}." if source.skip else ".")
        )
    return items


def item_corpus(
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: Count = "all",
    max_tokens: int = 4096,
    exclude_special_tokens: bool = True,
    name: str = "items",
) -> Corpus:
    """One item a block, BOS first, padded on the right; an item's number is that of its block and its document.

    Args:
        count: which of an item's tokens count: all of them, the prompt's, the response's, or the last one that is not
            masked otherwise.
        max_tokens: an item with more is an error, not cut: its answer would be lost first.
        exclude_special_tokens: BOS and all that the tokenizer calls special never count.

    Raises:
        DataError: no items, an item of which nothing counts, or one that is too long, with its number.
        UnknownNameError: another `count`.
    """
    check_name("count", count, _COUNTS)
    if not items:
        raise DataError("There are no items to read.")
    special = frozenset(tokenizer.all_special_ids if exclude_special_tokens else ())
    bos = tokenizer.bos_token_id
    rows: list[tuple[list[int], list[bool]]] = []
    for number, item in enumerate(items):
        prompt = list(encode(item.prompt, tokenizer, f"item {number}")["input_ids"]) if item.prompt else []
        response = list(encode(item.response, tokenizer, f"item {number}")["input_ids"]) if item.response else []
        opening = [] if bos is None else [bos]
        prompt = prompt[1:] if opening and prompt[:1] == opening else prompt
        ids = opening + prompt + response
        begins = len(opening) + len(prompt)
        if len(ids) > max_tokens:
            raise DataError(f"Item {number} has {len(ids):,} tokens, more than max_tokens ({max_tokens:,}).")
        wanted = range(begins, len(ids)) if count == "response" else range(len(opening), len(ids))
        wanted = range(len(opening), begins) if count == "prompt" else wanted
        places = [at for at in wanted if ids[at] not in special]
        if not places:
            remedy = _SPECIAL if wanted else _EMPTY.get(count, "It is empty: leave it out.")
            raise DataError(f"Of item {number} no token counts (count {count!r}): {item.prompt[:60]!r}. {remedy}")
        chosen = set(places[-1:] if count == "last" else places)
        rows.append((ids, [at in chosen for at in range(len(ids))]))
    longest = max(len(ids) for ids, _ in rows)
    tokens_bp = torch.full((len(rows), longest), tokenizer.pad_token_id or 0, dtype=torch.int64)
    keep_bp = torch.zeros(len(rows), longest, dtype=torch.bool)
    document_bp = torch.full_like(tokens_bp, -1)
    for number, (ids, counts) in enumerate(rows):
        tokens_bp[number, : len(ids)] = torch.tensor(ids)
        keep_bp[number, : len(ids)] = torch.tensor(counts)
        document_bp[number, : len(ids)] = number
    origin = Origin(
        source=None,
        split=None,
        revision=None,
        first_document=0,
        next_document=len(rows),
        exclude_special_tokens=exclude_special_tokens,
        bos=bos is not None,
        tokenizer=tokenizer_fingerprint(tokenizer),
        packed=False,
    )
    return Corpus(tokens_bp, keep_bp, document_bp, name, origin=origin)


def _numbered(source: ItemSource) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows that are wanted, with their numbers in the source."""
    rows = _rows(source)
    end = None if source.n is None else source.skip + source.n
    if source.shuffle_seed is None:
        numbered: Iterable[tuple[int, Any]] = islice(enumerate(rows), source.skip, end)
    else:
        known = list(rows)
        order = np.random.default_rng(source.shuffle_seed).permutation(len(known))[source.skip : end]
        numbered = ((int(at), known[at]) for at in order)
    try:
        for row, values in numbered:
            if not isinstance(values, Mapping):
                raise DataError(f"Row {row} of {source.dataset} is {type(values).__name__}, not a mapping of columns.")
            yield row, values
    except (DataError, UnknownNameError):
        raise
    except Exception as e:  # a stream of datasets breaks off with a dozen unrelated types
        raise DataError(f"Dataset {source.dataset!r} could not be read to the end: {_reason(e)}") from e


def _rows(source: ItemSource) -> Iterable[Any]:
    name, split, path = source.dataset, source.split, Path(source.dataset)
    if name.startswith("embedded:"):
        texts = embedded_text.load_embedded(name, split)
        return [{"text": row} if isinstance(row, str) else {"messages": row} for row in texts]
    if path.suffix in _YAML:
        found = read_yaml(path, "items")
        if not isinstance(found, list):
            raise DataError(f"{name} must be a list of mappings, not {type(found).__name__}.")
        return found
    if not source._on_hub and not path.exists():
        raise DataError(f"There is no file {name}.")
    if path.is_file() and path.suffix not in _FILE_KINDS:
        raise DataError(f"Cannot tell what {name} holds; known endings: {', '.join([*_FILE_KINDS, *_YAML])}.")
    try:
        if source._on_hub:
            streaming = source.n is not None and source.shuffle_seed is None and not datasets.config.HF_HUB_OFFLINE
            return _loaded(name, source.config, split=split, revision=source.revision, streaming=streaming)
        if path.is_file():
            return _loaded(_FILE_KINDS[path.suffix], split=split, data_files=name)
        if not any((path / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json")):
            return _loaded(name, split=split)
        saved: Any = datasets.load_from_disk(name)
    except Exception as e:  # datasets raises a dozen unrelated types for a wrong name, split or network
        raise DataError(f"Dataset {name!r} (split {split!r}) cannot be read: {_reason(e)}") from e
    if isinstance(saved, datasets.DatasetDict):
        check_name("split", split, saved)
        saved = saved[split]
    return saved  # type: ignore[no-any-return]


def _loaded(*args: Any, **kwargs: Any) -> Iterable[Any]:
    return datasets.load_dataset(*args, **kwargs)  # type: ignore[no-any-return]


def _as_turn(text: str, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """A user's turn and the opening of the model's, without BOS."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("The tokenizer has no chat template; write the chat's form as template= instead.")
    try:
        turn = [{"role": "user", "content": text}]
        rendered = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    except TemplateError as e:
        raise DataError(f"The chat template cannot render {where}: {e}") from e
    return rendered.removeprefix(str(tokenizer.bos_token or ""))


def _as_text(value: Any) -> str | None:
    """A cell as text: true and false as YAML and JSON write them."""
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool | np.bool_) else str(value)


def _reason(error: BaseException) -> str:
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def with_responses(items: Sequence[Item], responses: Sequence[str], groups: Sequence[str]) -> list[Item]:
    """The same items as they were answered, in groups by how: what a contrast of right and wrong answers is made of.

    Raises:
        DataError: not one response and one group an item.
    """
    if not len(items) == len(responses) == len(groups):
        raise DataError(f"{len(items)} items, {len(responses)} responses and {len(groups)} groups are not one each.")
    return [
        replace(item, response=response, group=group)
        for item, response, group in zip(items, responses, groups, strict=True)
    ]
