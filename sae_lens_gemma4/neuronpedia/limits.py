"""What Neuronpedia's self-service API takes, as data, and a dashboard made to fit it.

The API answers what breaks its schema with a refusal of the whole batch, so nothing is sent that it would refuse.
What cannot be sent as it is, is changed as little as can be and counted (`Changes`); what nobody could guess, such as
a value that is no number, raises.

The rules are those of apps/webapp/app/api/{model/new,source-set/new,feature/upload-batch}/route.tsx of
github.com/hijohnnylin/neuronpedia at ebb8426f. The size of a request is Vercel's rule, where the site is served.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.interp.pieces import safe_piece
from sae_lens_gemma4.neuronpedia.folder import Feature

if TYPE_CHECKING:
    from sae_lens_gemma4.neuronpedia.explanations import Explanation

FEATURES, BODY_BYTES = 128, 4_000_000
"""Of a batch. The site's functions take 4.5 MB and refuse more before any code of the site runs."""
HIGHEST_INDEX = 10_000_000
LOGITS, TOKENS, QUANTILE = 20, 1024, 99_999_999
LABEL, DESCRIPTION, MODEL_NAME = 512, 128, 64
"""In UTF-16 units, as JavaScript counts: a character beyond U+FFFF is two."""
LABELS = 2048
"""Of a batch: the site has them all embedded by one call, which takes no more texts."""
LAYERS = 127
_CHARACTERS = r"(?:[\w.~!$&'()*+,;=:@/?-]|%[0-9a-fA-F]{2})*"
URL = re.compile(
    rf"https?://(?:[\w~-]+\.)+[^\W\d_](?:[\w-]*[^\W\d_])?(?::\d+)?(?:[/?]{_CHARACTERS})?(?:#{_CHARACTERS})?"
)
"""What passes for a page's address. All of these pass the site's own check too, which is yup's `url`."""
METHODS = (
    "eleuther_acts_top20",
    "np_acts-logits-general",
    "np_max-act",
    "np_max-act-logits",
    "oai_attention-head",
    "oai_token-act-pair",
)
"""Kinds of explanation that the site has. One that it does not have fails the batch without saying why."""

Row = dict[str, Any]
"""One latent as the API takes it."""


@dataclass
class Changes:
    """How often something was changed so that the API takes it.

    Attributes:
        cut_labels: longer than 512 units; the end is an ellipsis.
        replaced_tokens: empty, with a NUL, or no Unicode (half a surrogate pair).
        cut_examples: longer than 1,024 tokens; what is left holds the largest value.
        dropped_bounds: of quantiles, outside of what is taken; the example is sent without.
        dropped_logits: beyond the twenty.
        dropped_sources: labels that state a model or notes, for which an upload has no place; the text is sent without.
        dropped_methods: kinds of explanation that the site does not have; the text is sent without.
    """

    cut_labels: int = 0
    replaced_tokens: int = 0
    cut_examples: int = 0
    dropped_bounds: int = 0
    dropped_logits: int = 0
    dropped_sources: int = 0
    dropped_methods: set[str] = field(default_factory=set)


def fit(feature: Feature, labels: Sequence[Explanation], changes: Changes) -> Row | None:
    """A dashboard as the API takes it, and its labels; None of a latent without examples, which the API refuses.

    The first group's fraction, −1, is left out; its lower bound, −1, is sent, because by that the site knows the group.
    The model that wrote a label is never sent: the site's own code fails on it.

    Args:
        changes: added to.

    Raises:
        DataError: a part that is missing or no number, or a latent that cannot be numbered there.
    """
    index = feature.get("feature_index") if isinstance(feature, dict) else None
    if type(index) is not int or not 0 <= index <= HIGHEST_INDEX:
        raise DataError(f"A dashboard is of latent {index!r}; Neuronpedia counts from 0 to {HIGHEST_INDEX:,}.")
    try:
        if not feature["activations"]:
            return None
        density = _number(feature["frac_nonzero"], "its density")
        if not 0 <= density <= 1:
            raise DataError(f"its density is {density}, and no fraction")
        return {
            "index": index,
            "density": density,
            "activations": [_example(example, changes) for example in feature["activations"]],
            "explanations": [_label(label, changes) for label in labels],
            "topLogits": _logits(feature["pos_str"], feature["pos_values"], changes),
            "bottomLogits": _logits(feature["neg_str"], feature["neg_values"], changes),
        }
    except DataError as e:
        raise DataError(f"The dashboard of latent {index} cannot be uploaded: {e}.") from None
    except (KeyError, TypeError, AttributeError) as e:
        raise DataError(f"The dashboard of latent {index} is not as sae-dashboard writes them: {e!r}.") from e


def encoded(value: Any) -> bytes:
    """The bytes that are sent."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def cut(text: str, most: int) -> str:
    """At most that many UTF-16 units of a text; where it was longer, the last is an ellipsis."""
    units = text.encode("utf-16-le")
    if len(units) <= 2 * most:
        return text
    return units[: 2 * (most - 1)].decode("utf-16-le", "ignore").rstrip() + "…"


def _example(example: dict[str, Any], changes: Changes) -> Row:
    tokens, values = _tokens(example["tokens"], changes), example["values"]
    _check_numbers(values)
    if len(tokens) != len(values) or not tokens:
        raise DataError(f"an example of it has {len(tokens)} tokens and {len(values)} values")
    if len(tokens) > TOKENS:
        start = min(max(values.index(max(values)) - TOKENS // 2, 0), len(tokens) - TOKENS)
        tokens, values = tokens[start : start + TOKENS], values[start : start + TOKENS]
        changes.cut_examples += 1
    fraction = example.get("bin_contains")
    return {
        "tokens": tokens,
        "values": [value or 0 for value in values],  # 0 is a third of 0.0
        "quantileMax": _bound(example.get("bin_max"), QUANTILE, changes),
        "quantileMin": _bound(example.get("bin_min"), QUANTILE, changes),
        "quantileFraction": None if fraction == -1 else _bound(fraction, 1, changes, least=0),
    }


def _label(label: Explanation, changes: Changes) -> Row:
    short = cut(label.text, LABEL)
    changes.cut_labels += short != label.text
    changes.dropped_sources += label.model_name is not None or label.notes is not None
    method = label.type_name.lower() if label.type_name else None
    if method is not None and method not in METHODS:
        changes.dropped_methods.add(method)
        method = None
    return {"text": short, "methodName": method, "modelName": None}


def _logits(texts: list[str], values: list[float], changes: Changes) -> list[Row]:
    tokens = _tokens(texts, changes)
    _check_numbers(values)
    if len(tokens) != len(values):
        raise DataError(f"it has {len(tokens)} promoted or suppressed tokens and {len(values)} values of them")
    changes.dropped_logits += max(len(tokens) - LOGITS, 0)
    pairs = zip(tokens[:LOGITS], values[:LOGITS], strict=True)
    return [{"token": token, "value": value} for token, value in pairs]


def _tokens(tokens: list[str], changes: Changes) -> list[str]:
    if not isinstance(tokens, list):
        raise DataError("what should be a list of tokens is none")
    whole = "".join(tokens)
    if all(tokens) and safe_piece(whole) == whole:
        return tokens
    replaced = [safe_piece(token) for token in tokens]
    changes.replaced_tokens += sum(a != b for a, b in zip(tokens, replaced, strict=True))
    return replaced


def _bound(value: Any, most: float, changes: Changes, least: float = -inf) -> float | None:
    if value is None:
        return None
    if least <= (number := _number(value, "a quantile of it")) <= most:
        return number
    changes.dropped_bounds += 1
    return None


def _check_numbers(values: list[float]) -> None:
    for value in values if not _are_numbers(values) else ():
        _number(value, "a value of it")


def _are_numbers(values: list[float]) -> bool:
    try:
        return set(map(type, values)) <= {int, float} and all(map(isfinite, values))
    except OverflowError:
        return False


def _number(value: Any, what: str) -> float:
    if not _are_numbers([value]):
        raise DataError(f"{what} is {str(value)[:40]}, and no finite number")
    number: float = value
    return number
