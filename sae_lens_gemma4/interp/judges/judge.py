"""What a judge is asked and what it answers, whoever it is: a language model of any maker, or statistics of tokens.

A label alone shows nothing: it has to be said by somebody, and tested by somebody on texts that the first has not
seen. Both questions are here, so that any judge can do either, and two of them can be held against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from sae_lens_gemma4.catalogue.label_schemas import Example
from sae_lens_gemma4.errors import CatalogueWarning, Gemma4SAEError

LABEL_CHARACTERS = 120
CATEGORY_CHARACTERS = 40


class JudgeError(Gemma4SAEError, OSError):
    """A judge that refuses, fails or cannot be reached; what it answered before is kept in the cache."""


class TooLongWarning(CatalogueWarning):
    """Questions that a judge's model cannot read, so that they have no answer."""


@dataclass(frozen=True)
class LabelQuestion:
    """What does this latent stand for?

    Attributes:
        index: the latent.
        positives: contexts in which it fires, with its activation at each token, strongest first.
        negatives: contexts in which it is silent.
        promoted: tokens whose logits the latent raises; may be empty.
    """

    index: int
    positives: tuple[Example, ...]
    negatives: tuple[Example, ...] = ()
    promoted: tuple[str, ...] = ()


class Answer(NamedTuple):
    """One line of at most 120 characters, and a short category or None; both free of control characters."""

    label: str
    category: str | None = None


@dataclass(frozen=True)
class DetectionQuestion:
    """In which of these contexts does the label apply? They are shown without activations."""

    index: int
    label: str
    examples: tuple[Example, ...]


class Cost(NamedTuple):
    """What questions cost, or cost at most.

    Attributes:
        questions: different ones; the same question is asked once.
        cached: of these, answered already, for nothing.
        calls: requests to the judge, where each answer can be used at once.
        calls_at_most: where each question is asked again as often as `retries` allows because its answers cannot be
            used, and as often again because requests fail. Besides, a server may refuse a setting, for nothing.
        input_tokens: of `calls`, estimated.
        output_tokens: of `calls`, at most.
        usd: of `calls`, with `input_tokens` as estimated; None where no prices are stated.
        usd_at_most: of `calls_at_most`, with a token for each byte of the prompts.
    """

    questions: int
    cached: int
    calls: int
    calls_at_most: int
    input_tokens: int
    output_tokens: int
    usd: float | None
    usd_at_most: float | None

    def to_dict(self) -> dict[str, Any]:
        return self._asdict()


FREE = Cost(0, 0, 0, 0, 0, 0, 0.0, 0.0)


class Judge(Protocol):
    """Anything that labels and detects.

    Attributes:
        name: who said it, as labels will state it.
        identity: which model or rule this is, whatever its name; two judges of one identity are one judge.
    """

    name: str
    identity: str

    def label(self, questions: Sequence[LabelQuestion]) -> list[Answer | None]:
        """An answer to each, in order; None where there was no usable one after all retries. None is invented."""

    def detect(self, questions: Sequence[DetectionQuestion]) -> list[list[bool] | None]:
        """For each, whether the label applies in each example, in order; None as in `label`."""

    def cost(
        self, n_label: int, n_detect: int, *, n_examples: int = 20, bytes_per_example: int = 400, n_promoted: int = 10
    ) -> Cost:
        """What so many questions cost, before there are any: by the size of the contexts, and without the cache."""

    def cost_of(self, questions: Sequence[LabelQuestion | DetectionQuestion]) -> Cost:
        """What these questions cost, without what the cache answers."""

    def record(self) -> dict[str, Any]:
        """Who this is and what it was asked, as plain JSON data: for the results that rest on it."""
