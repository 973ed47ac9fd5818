"""Items as the model answers them, kept on disk, and which answers are right.

Steering asks under many conditions and a contrast of right and wrong answers under one; both come here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.vocabulary import tokenizer_fingerprint
from sae_lens_gemma4.errors import CatalogueWarning, ConfigError, DataError, warn_caller
from sae_lens_gemma4.evaluation.identity import model_fingerprint
from sae_lens_gemma4.interp.items import Item, item_corpus, with_responses
from sae_lens_gemma4.interp.steering.extractors import EXTRACTORS, Extractor
from sae_lens_gemma4.interp.steering.extractors import extractor as named
from sae_lens_gemma4.interp.steering.generating import Hook, Output, generate_batch
from sae_lens_gemma4.interp.steering.outputs import BATCH, Outputs
from sae_lens_gemma4.models.interface import HookedModel

RIGHT, WRONG = "right", "wrong"
BASELINE = "baseline"


class AnsweringWarning(CatalogueWarning):
    """Some answers cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How items are answered, greedily, and read.

    Attributes:
        extractor: a name of `EXTRACTORS`, or `regex:<pattern>`.
        max_new_tokens: tokens an answer has at most.
        batch_items: items a batch. With weights of 16 bits it may change answers, and a folder is gone on with by the
            same only; in float32 it is free.
        stop: texts that end an answer, beside the model's own end tokens; not part of it.

    Raises:
        ConfigError: numbers or texts that make no sense.
        UnknownNameError: no such extractor.
    """

    extractor: str = "gsm8k"
    max_new_tokens: int = 256
    batch_items: int = 8
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        named(self.extractor)
        if self.max_new_tokens < 1 or self.batch_items < 1:
            raise ConfigError(f"max_new_tokens and batch_items must be at least 1, unlike {self}.")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ConfigError(f"stop must be a list of texts that are not empty, not {self.stop!r}.")


def answer(
    model: HookedModel, items: Sequence[Item], folder: str | Path, settings: Answering, *, progress: bool = True
) -> list[Output]:
    """The model's own answers, going on where an earlier call was stopped.

    Raises:
        DataError: no items, one without a right answer, or no answer found in any output.
        ConfigError: the folder holds other answers, or in 16 bits those of other batches.
        ModelError: not a `Gemma4ProxyLM` or `Gemma4Bridge`.
    """
    read = named(settings.extractor)
    gold_answers(items, read)
    corpus = prompts_of(model, items)
    kept = {k: v for k, v in asdict(settings).items() if k not in ("extractor", BATCH)}
    outputs = Outputs(folder, {**facts_of(model, items, settings.batch_items), "settings": kept})
    with tqdm(total=len(items), initial=len(outputs.found), desc="Answering", unit="item", disable=not progress) as bar:
        answer_missing(
            model,
            corpus,
            outputs,
            BASELINE,
            batch_items=settings.batch_items,
            max_new_tokens=settings.max_new_tokens,
            stop=settings.stop,
            done=bar.update,
        )
    found = outputs.of(BASELINE, len(items))
    check_found(found, read)
    return found


def graded(items: Sequence[Item], outputs: Sequence[Output], settings: Answering) -> tuple[list[Item], dict[str, Any]]:
    """The items with their answers, in the groups `RIGHT` and `WRONG`, and how many are in each.

    Items to which nothing was answered have no token to compare and are left out. They are counted as "empty", and by
    none of the other counts; a warning (`AnsweringWarning`) says so.

    Raises:
        DataError: all are right, or all wrong.
    """
    read = named(settings.extractor)
    gold = gold_answers(items, read)
    kept = [(i, o, g) for i, o, g in zip(items, outputs, gold, strict=True) if o.text]
    found = [read.find(output.text) for _, output, _ in kept]
    right = [f is not None and read.same(f, g) for f, (_, _, g) in zip(found, kept, strict=True)]
    empty = len(items) - len(kept)
    facts = {
        "extractor": settings.extractor,
        "right": sum(right),
        "wrong": len(right) - sum(right),
        "not_found": sum(f is None for f in found),
        "cut": sum(output.cut for _, output, _ in kept),
        "empty": empty,
    }
    if len(set(right)) < 2:
        which = "empty" if not right else RIGHT if right[0] else WRONG
        beside = f", beside {empty} that are empty" if empty and right else ""
        raise DataError(
            f"All {len(right) or empty} answers are {which} ({facts['not_found']} without an answer{beside}): there is "
            "nothing to contrast. Take harder, easier or more items."
        )
    if empty:
        warn_caller(
            f"{empty} of {len(items)} answers are empty and left out: the model ended at once. If they are many, the "
            "prompt's form may be wrong (template, chat).",
            AnsweringWarning,
        )
    texts = [output.text for _, output, _ in kept]
    return with_responses([item for item, _, _ in kept], texts, [RIGHT if r else WRONG for r in right]), facts


def prompts_of(model: HookedModel, items: Sequence[Item]) -> Corpus:
    """The prompts alone, one a block."""
    return item_corpus([replace(item, response="") for item in items], model.tokenizer, count="prompt")


def answer_missing(
    model: HookedModel,
    corpus: Corpus,
    outputs: Outputs,
    condition: str,
    *,
    batch_items: int,
    max_new_tokens: int,
    stop: Sequence[str],
    hook: tuple[str, Hook] | None = None,
    done: Callable[[int], Any],
) -> None:
    """Answer the items that are not answered yet under a condition; `done` is told of each batch."""
    for batch in _missing(outputs, condition, corpus.n_blocks, batch_items):
        prompts = [corpus.tokens_bp[i][corpus.document_bp[i] >= 0].tolist() for i in batch]
        made = generate_batch(model, prompts, max_new_tokens=max_new_tokens, stop=stop, hook=hook)
        before = len(outputs.found)
        outputs.add(condition, dict(zip(batch, made, strict=True)))
        done(len(outputs.found) - before)


def gold_answers(items: Sequence[Item], read: str | Extractor) -> list[str]:
    """The right answers in normal form, by an extractor or its name. Cheap: to be asked before anything is generated.

    Raises:
        DataError: no items, or one without a right answer that the extractor reads.
        UnknownNameError: no such extractor.
    """
    read = named(read) if isinstance(read, str) else read
    if not items:
        raise DataError("There are no items to answer.")
    gold = []
    for number, item in enumerate(items):
        right = None if item.answer is None else read.gold(item.answer)
        if right is None:
            what = "no right answer" if item.answer is None else f"the right answer {item.answer[-80:]!r}"
            raise DataError(
                f"Item {number} has {what}, in which {read.name} finds none: name the column of right answers, or take "
                "another extractor."
            )
        gold.append(right)
    return gold


def check_found(outputs: Sequence[Output], read: Extractor) -> None:
    """Raise `DataError` if no output has an answer."""
    if any(read.find(output.text) is not None for output in outputs):
        return
    others = ", ".join(name for name in EXTRACTORS if name != read.name)
    cut = sum(output.cut for output in outputs)
    limit = f" {cut} of them were cut by max_new_tokens." if cut else ""
    raise DataError(
        f"The extractor {read.name} finds no answer in any of the baseline's {len(outputs)} outputs, of which the "
        f"first ends in {outputs[0].text[-160:]!r}.{limit} The others are {others} and regex:<pattern>."
    )


def check_apart(steered: Sequence[Item], made_of: Sequence[Item]) -> None:
    """Refuse to steer items that the direction is made of: such a direction knows their answers.

    Prompts are compared as the model reads them, but for white space; the same question in two templates is not seen.

    Raises:
        DataError: some prompts are in both.
    """
    known = {" ".join(item.prompt.split()) for item in made_of}
    shared = sum(" ".join(item.prompt.split()) in known for item in steered)
    if shared:
        raise DataError(
            f"{shared} of the {len(steered)} steered items are among those that the direction is made of, and it would "
            "know their answers. Take other items for one of the two: with `skip` and one shuffle_seed, or another "
            "`split`."
        )


def facts_of(model: HookedModel, items: Sequence[Item], batch_items: int) -> dict[str, Any]:
    """What tells answers from others' beside how they were made. A name is not among it: paths have several. The batch
    is where its rounding may change answers, in a model of 16 bits."""
    prompts = json.dumps([item.prompt for item in items]).encode()
    coarse = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())
    return {
        **({BATCH: batch_items} if coarse else {}),
        "model_fingerprint": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "items": hashlib.sha256(prompts).hexdigest()[:16],
        "n_items": len(items),
    }


def _missing(outputs: Outputs, condition: str, n: int, size: int) -> Iterator[range]:
    """The batches of which an item is not answered yet."""
    for first in range(0, n, size):
        batch = range(first, min(first + size, n))
        if any((condition, i) not in outputs.found for i in batch):
            yield batch
