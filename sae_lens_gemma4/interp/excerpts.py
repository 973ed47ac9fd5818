"""A context of a latent as data: a window of one document, what the latent does there, and how it reads.

Shapes: `w` tokens of a window, `e` activations of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.catalogue.label_schemas import Example

Kind = Literal["top", "quantile", "near_miss", "random"]


class Excerpt(NamedTuple):
    """A window of one document in one block.

    Attributes:
        block, position: where the token is that it was chosen for: of positives, where the latent is strongest.
        start: the position of the window's first token.
        document: its number in the corpus.
        tokens_w: int64, ids.
        value_w: float32, the latent's activations; 0 where it is silent, and where tokens do not count.
        kind: how it was chosen.
    """

    block: int
    position: int
    start: int
    document: int
    tokens_w: npt.NDArray[np.int64]
    value_w: npt.NDArray[np.float32]
    kind: Kind

    @property
    def peak(self) -> int:
        """Where in the window the token is that it was chosen for."""
        return self.position - self.start


class Part(NamedTuple):
    """A latent's contexts from the documents of one part.

    Attributes:
        positives: by kind, the strongest first; fewer than asked for where there are fewer.
        negatives: silent on every token shown that counts; near-misses first. Fewer than asked for where no others
            are, or where the windows would have a token in common with each other's or the positives'.
    """

    positives: list[Excerpt]
    negatives: list[Excerpt]


class Activity(NamedTuple):
    """What a latent does on the tokens that count of the documents for labelling and the held-out ones.

    It is part of a label's score, and documents for calibration, which the score is to be judged by, do not enter it.

    Attributes:
        n_active: tokens on which it fires.
        frequency: their share.
        mean, max: of its activations where it fires; 0 where it never does.
    """

    n_active: int = 0
    frequency: float = 0.0
    mean: float = 0.0
    max: float = 0.0


NOTHING = Activity()


@dataclass(frozen=True)
class LatentExamples:
    """One latent's contexts. Those of a latent that never fires are empty, negatives too."""

    index: int
    labelling: Part
    held_out: Part
    calibration: Part
    activity: Activity = NOTHING


def activity(value_e: npt.NDArray[np.floating], n_tokens: int) -> Activity:
    """Of a latent with these activations on so many tokens."""
    value_e = value_e.astype(np.float64)
    if not len(value_e):
        return NOTHING
    return Activity(len(value_e), len(value_e) / n_tokens, float(value_e.mean()), float(value_e.max()))


def example_of(excerpt: Excerpt, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A context in the catalogue's form: text and its tokens as they read, with the latent's activation at each.

    `token`, `activation` and `token_index` are those of the token that it was chosen for.
    """
    tokens = token_texts(tokenizer, excerpt.tokens_w.tolist())
    activations: list[float] = excerpt.value_w.astype(np.float64).tolist()
    return Example(
        text="".join(tokens),
        token=tokens[excerpt.peak],
        activation=activations[excerpt.peak],
        token_index=excerpt.peak,
        tokens=tuple(tokens),
        activations=tuple(activations),
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """What each token adds to the text; joined, they are the text.

    Of a character in several tokens (bytes), the last has it and the others are empty.
    """

    def text(ids: list[int]) -> str:
        decoded: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore[assignment]
        return decoded

    alone = [text([token]) for token in tokens]
    if "".join(alone) == text(tokens):
        return alone
    found, shown = [], ""
    for i in range(len(tokens)):
        now = text(tokens[: i + 1])
        inside = now.endswith("\ufffd") and "\ufffd" in alone[i] and "\ufffd" in "".join(alone[i + 1 : i + 2])
        found.append("" if inside else now[len(shown) :])
        shown = shown if inside else now
    return found
