"""Judges without a language model: the tokens, or short n-grams, on which a latent fires more than elsewhere.

Many latents fire on a few tokens, and for these no model is needed. So a label by statistics is what a model's label
has to beat, and with it everything from examples to confidence runs offline, the same each time.

A token is judged by its log-odds among the places where the latent fires against all other places that were shown, each
count with ½ added (Haldane 1940, Anscombe 1956). An n-gram is a token with the one or two before it.

A label is `tokens: "the", " of"` or `n-grams: " in the"`: JSON strings, so that it reads back exactly. It applies where
one of its strings is a token, or is one to three tokens in a row. That is all that either judge does in a test, so as
scorers they are one, "string match". A label in words is not answered: whether it applies is no matter of strings, and
a guess by its words would pass for a test.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from sae_lens_gemma4.catalogue.label_schemas import Example
from sae_lens_gemma4.interp.judges.judge import (
    FREE,
    LABEL_CHARACTERS,
    Answer,
    Cost,
    DetectionQuestion,
    LabelQuestion,
)
from sae_lens_gemma4.interp.judges.quoting import quoted

_KINDS = {1: ("tokens", "token statistics"), 3: ("n-grams", "n-gram statistics")}
_MOST_TERMS = 5
STRING_MATCH = "string match"


class BaselineJudge:
    """Labels by tokens (`longest` 1) or by n-grams of up to three tokens (`longest` 3).

    Attributes:
        identity: what it is, whatever it is called.
        scorer_name: who tests, which is the same for both kinds.
    """

    scorer_name = STRING_MATCH

    def __init__(self, longest: int = 1, name: str | None = None) -> None:
        self.longest = longest
        self.kind, stated = _KINDS[longest]
        self.identity, self.name = stated, name or stated
        self._counts: Counter[str] = Counter()

    def label(self, questions: Sequence[LabelQuestion]) -> list[Answer | None]:
        """None where no token is likelier at the places where the latent fires than at others."""
        answers = [self._label(q) for q in questions]
        self._counts.update(questions=len(answers), unanswered=sum(a is None for a in answers))
        return answers

    def detect(self, questions: Sequence[DetectionQuestion]) -> list[list[bool] | None]:
        """None for a label that is neither kind's own (`terms_of`)."""
        answers = [
            None if (terms := terms_of(q.label)) is None else [applies(terms, example) for example in q.examples]
            for q in questions
        ]
        self._counts.update(questions=len(answers), unanswered=sum(a is None for a in answers))
        return answers

    def cost(self, n_label: int, n_detect: int, **_sizes: int) -> Cost:
        return FREE._replace(questions=n_label + n_detect)

    def cost_of(self, questions: Sequence[LabelQuestion | DetectionQuestion]) -> Cost:
        return FREE._replace(questions=len(questions))

    def record(self) -> dict[str, Any]:
        counts = {key: self._counts[key] for key in ("questions", "unanswered")}
        kind = "tokens" if self.longest == 1 else "ngrams"
        return {"name": self.name, "kind": kind, "identity": self.identity, **counts}

    def _label(self, question: LabelQuestion) -> Answer | None:
        fires, others = Counter[str](), Counter[str]()
        for example in question.positives:
            for term, active in self._terms(example):
                (fires if active else others)[term] += 1
        for example in question.negatives:
            others.update(term for term, _ in self._terms(example))
        label = self.kind + ":"
        n_terms = 0
        for term in ranked(fires, others):
            longer = f"{label}{',' if n_terms else ''} {quoted(term)}"
            if len(longer) <= LABEL_CHARACTERS and n_terms < _MOST_TERMS:
                label, n_terms = longer, n_terms + 1
        return Answer(label, self.kind) if n_terms else None

    def _terms(self, example: Example) -> Iterator[tuple[str, bool]]:
        """What ends at each token, and whether the latent fires there."""
        tokens = tokens_of(example)
        if example.activations is not None and example.tokens is not None:
            active = [value > 0 for value in example.activations]
        else:
            active = [token.strip() == (example.token or "").strip() for token in tokens]
        for end, on in enumerate(active, 1):
            for n in range(1, min(self.longest, end) + 1):
                yield "".join(tokens[end - n : end]), on


def ranked(fires: Counter[str], others: Counter[str]) -> list[str]:
    """Terms likelier where the latent fires, best first; equals by how often, then by length and alphabet."""
    n_fires, n_others = fires.total(), others.total()
    score = {
        term: math.log((k + 0.5) / (n_fires - k + 0.5))
        - math.log((others[term] + 0.5) / (n_others - others[term] + 0.5))
        for term, k in fires.items()
    }
    above = [term for term, value in score.items() if value > 0]
    return sorted(above, key=lambda term: (-score[term], -fires[term], len(term), term))


def applies(terms: tuple[str, Sequence[str]], example: Example) -> bool:
    """Whether a baseline's label (`terms_of`) applies in a context."""
    kind, strings = terms
    tokens = tokens_of(example)
    longest = 1 if kind == _KINDS[1][0] else 3
    there = {"".join(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1)}
    return not there.isdisjoint(strings)


def terms_of(label: str) -> tuple[str, tuple[str, ...]] | None:
    """The kind and the strings of a baseline's label; None of any other."""
    kind, colon, rest = label.partition(": ")
    if not colon or kind not in {kind for kind, _ in _KINDS.values()}:
        return None
    try:
        strings = json.loads(f"[{rest}]")
    except (ValueError, RecursionError):
        return None
    if not strings or not all(isinstance(s, str) for s in strings):
        return None
    return kind, tuple(strings)


def tokens_of(example: Example) -> tuple[str, ...]:
    """A context's tokens; its words with the space before them where none are stated."""
    return example.tokens if example.tokens is not None else tuple(re.findall(r"\s*\S+", example.text or ""))
