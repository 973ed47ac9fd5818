"""Labels by two judges, each asked by itself, from contexts that are kept apart from those labels are tested on.

One judge's label is an opinion. Two that were not told of each other can agree or not, and each can test the other's
(`interp/labels/verification.py`). Adam Kruger's dataset card does the same with Claude Sonnet and GPT-4o.

A label that did not come is counted and never made up: a latent that has none from a judge is left out of that judge's
figures, and said to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.catalogue.label_schemas import Example
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.interp.excerpts import LatentExamples, example_of
from sae_lens_gemma4.interp.judges.judge import Answer, Judge, LabelQuestion
from sae_lens_gemma4.interp.means import plain

SILENT = "it fires in no document for labelling"


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What the judges call the latents.

    Attributes:
        judges: names, in the order of the answers.
        answers: by latent, one a judge; None where it gave none that could be used.
        skipped: latents that nobody was asked about, and why.
        shown: by latent, the contexts it fires in that the judges saw, strongest first.
    """

    judges: tuple[str, ...]
    answers: Mapping[int, tuple[Answer | None, ...]]
    skipped: Mapping[int, str]
    shown: Mapping[int, tuple[Example, ...]]

    @property
    def unanswered(self) -> dict[str, int]:
        """By judge, latents it was asked about and gave no usable label for."""
        columns = zip(*self.answers.values(), strict=True)
        return {name: sum(a is None for a in column) for name, column in zip(self.judges, columns, strict=True)}

    def by(self, judge: str) -> dict[int, str]:
        """The labels that one judge gave, by latent."""
        place = self.judges.index(judge)
        return {index: a.label for index, answers in self.answers.items() if (a := answers[place]) is not None}

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "kind": "labels",
            "judges": list(self.judges),
            "asked": len(self.answers),
            "unanswered": self.unanswered,
            "skipped": plain(dict(self.skipped)),
            "labels": {
                str(index): dict(zip(self.judges, plain(answers), strict=True))
                for index, answers in self.answers.items()
            },
        }


def label_latents(
    judges: Sequence[Judge],
    examples: Iterable[LatentExamples],
    tokenizer: PreTrainedTokenizerBase,
    promoted: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
) -> Labelled:
    """Ask each judge what each latent is, from the contexts of its `labelling` part alone.

    Args:
        judges: two, as a rule; with one there is no agreement, and it can only test its own labels.
        promoted: by latent, tokens whose logits it raises; none need be given.

    Raises:
        ConfigError: no judge, or two of one name, or that are one model.
        DataError: no latent fires in the documents for labelling, or a latent came twice.
    """
    names = check_judges(judges)
    questions, skipped = label_questions(examples, tokenizer, promoted)
    if not questions:
        raise DataError(
            f"None of {len(skipped):,} latents fires in the documents for labelling: read more text, or select others."
        )
    columns = [answered(judge.name, judge.label(questions), len(questions)) for judge in judges]
    answers = {q.index: tuple(given) for q, *given in zip(questions, *columns, strict=True)}
    return Labelled(judges=names, answers=answers, skipped=skipped, shown={q.index: q.positives for q in questions})


def label_questions(
    examples: Iterable[LatentExamples],
    tokenizer: PreTrainedTokenizerBase,
    promoted: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
) -> tuple[list[LabelQuestion], dict[int, str]]:
    """What a judge will be asked, which is what `Judge.cost` can be told of; and the latents left out, with reasons.

    Raises:
        DataError: a latent came twice.
    """
    questions: list[LabelQuestion] = []
    skipped: dict[int, str] = {}
    seen: set[int] = set()
    for latent in examples:
        if latent.index in seen:
            raise DataError(f"Latent {latent.index} was given twice: give each once.")
        seen.add(latent.index)
        if not latent.labelling.positives:
            skipped[latent.index] = SILENT
            continue
        positives = sorted(
            (example_of(excerpt, tokenizer) for excerpt in latent.labelling.positives),
            key=lambda example: -(example.activation or 0),
        )
        negatives = tuple(example_of(excerpt, tokenizer) for excerpt in latent.labelling.negatives)
        questions.append(
            LabelQuestion(latent.index, tuple(positives), negatives, tuple(promoted.get(latent.index, ())))
        )
    return questions, skipped


def check_judges(judges: Sequence[Judge]) -> tuple[str, ...]:
    """The judges' names, which labels are kept under.

    Raises:
        ConfigError: there is none, or two have one name, or one `identity`: the same model under two names would agree
            with itself.
    """
    names = tuple(judge.name for judge in judges)
    if not names:
        raise ConfigError("Labels need a judge, better two: none was given.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"Two judges are called {twice!r}: labels are kept by name, so name one of them otherwise.")
    by_identity: dict[str, str] = {}
    for judge in judges:
        identity = str(getattr(judge, "identity", judge.name))
        if other := by_identity.get(identity):
            raise ConfigError(
                f"Two judges are the same model: {other!r} and {judge.name!r} are both {identity}, and a model's "
                "agreement with itself says nothing. Give another."
            )
        by_identity[identity] = judge.name
    return names


def answered(judge: str, answers: Sequence[Any], n: int, what: str = "questions") -> Sequence[Any]:
    """A judge's answers, of which there must be one for each of the `n` of `what` it was asked.

    Raises:
        DataError: there is not.
    """
    if len(answers) != n:
        raise DataError(f"Judge {judge!r} gave {len(answers)} answers for {n} {what}: it must give one for each.")
    return answers
