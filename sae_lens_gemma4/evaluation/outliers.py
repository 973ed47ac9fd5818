"""Who the tokens with the largest errors are: their text in context, where they stand, and what they have in common.

A screen by norm misses tokens that are ordinary in norm, so each carries both ranks. What they have in common is told
as shares among them beside shares among all tokens: that half are first tokens means nothing where half of all are.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import category

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.evaluation.figures import top_count
from sae_lens_gemma4.evaluation.snapshot import Snapshot

FRACTION = 0.001
_SHOWN, _AROUND = 20, 12
_POINTS = 1000


@dataclass(frozen=True)
class TokenTraits:
    """What may be common to outliers, bool `[n]` for the tokens that count, in reading order.

    Attributes:
        first: the first token of its document that counts.
        delimiter: white space and punctuation only. None, as `special`, without a tokenizer to tell.
        repeat: the same token stood earlier in the same document and block.
        special: the tokenizer calls it special.
    """

    first: np.ndarray[Any, Any]
    delimiter: np.ndarray[Any, Any] | None
    repeat: np.ndarray[Any, Any]
    special: np.ndarray[Any, Any] | None

    @staticmethod
    def of(corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None) -> TokenTraits:
        keep = corpus.keep_bp
        tokens, documents = corpus.tokens_bp[keep].numpy(), corpus.document_bp[keep].numpy()
        blocks = torch.arange(corpus.n_blocks)[:, None].expand_as(keep)[keep].numpy()
        _, first_of_document = np.unique(documents, return_index=True)
        _, first_seen = np.unique(np.stack([blocks, documents, tokens]), axis=1, return_index=True)
        first, repeat = np.zeros(len(tokens), dtype=bool), np.ones(len(tokens), dtype=bool)
        first[first_of_document] = True
        repeat[first_seen] = False
        if tokenizer is None:
            return TokenTraits(first, None, repeat, None)
        kinds, kind_of = np.unique(tokens, return_inverse=True)
        plain = np.array([_delimits(text) for text in _texts(kinds.tolist(), tokenizer)])
        special = np.isin(tokens, np.array(sorted(set(tokenizer.all_special_ids))))
        return TokenTraits(first, plain[kind_of] & ~special, repeat, special)

    def items(self) -> list[tuple[str, np.ndarray[Any, Any] | None]]:
        return list(vars(self).items())


def describe_outliers(snapshot: Snapshot, corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """The worst ⌈n / 1000⌉ tokens by squared error: the first of them in context, and what all of them share.

    `snapshot` must hold the tokens of `corpus` that count, in reading order.
    """
    sse, norm = snapshot.column("sse").numpy(), snapshot.column("norm").numpy()
    top = _top(sse)
    traits = TokenTraits.of(corpus, tokenizer)
    norm_rank = np.empty(len(norm), dtype=np.int64)
    norm_rank[np.argsort(-norm, kind="stable")] = np.arange(1, len(norm) + 1)
    place_of = corpus.keep_bp.nonzero().numpy()
    squares = snapshot.column("squares").numpy()
    error_bp = np.full(tuple(corpus.keep_bp.shape), np.nan)
    error_bp[corpus.keep_bp.numpy()] = np.divide(sse, squares, out=np.full_like(sse, np.nan), where=squares > 0)
    total = float(sse.sum())
    tokens: list[dict[str, Any]] = []
    parts: dict[str, Any] = {"top": top, "all": slice(None)}
    for rank, i in enumerate(top[:_SHOWN].tolist(), start=1):
        block, position = (int(v) for v in place_of[i])
        around = slice(max(0, position - _AROUND), position + _AROUND + 1)
        ids = corpus.tokens_bp[block, around].tolist()
        real = (corpus.document_bp[block, around] >= 0).tolist()
        texts = _texts(ids, tokenizer)
        errors = [None if math.isnan(e) else e for e in error_bp[block, around].tolist()]
        role = corpus.role_bp[block, position] if corpus.role_bp is not None else -1
        tokens.append(
            {
                "text": texts[position - around.start],
                "token_id": ids[position - around.start],
                "block": block,
                "position": position,
                "document": int(corpus.document_bp[block, position]),
                "role": corpus.roles[int(role)] if int(role) >= 0 else None,
                "sse": float(sse[i]),
                "sse_share": float(sse[i]) / total if total > 0 else None,
                "sse_rank": rank,
                "norm": float(norm[i]),
                "norm_rank": int(norm_rank[i]),
                **{name: None if has is None else bool(has[i]) for name, has in traits.items()},
                "context": [[t, e] for t, e, is_text in zip(texts, errors, real, strict=True) if is_text],
                "at": position - around.start,
            }
        )
    shares = {
        name: {part: None if has is None else float(has[chosen].mean()) for part, chosen in parts.items()}
        for name, has in traits.items()
    }
    return {"fraction": FRACTION, "count": len(top), "tokens": tokens, "shares": shares}


def norm_against_sse(snapshot: Snapshot, seed: int = 0) -> list[list[float | bool]]:
    """Norm and squared error as multiples of their medians, and whether a token is one of the worst ⌈n / 1000⌉.

    All of those up to 500, and a thousand others drawn by `seed`.
    """
    sse, norm = snapshot.column("sse").numpy(), snapshot.column("norm").numpy()
    scale = float(np.median(norm)), float(np.median(sse))
    if min(scale) <= 0:
        return []
    top = _top(sse)
    others = np.setdiff1d(np.arange(snapshot.n), top)
    drawn = np.random.default_rng(seed).choice(others, min(_POINTS, len(others)), replace=False)
    return [
        [float(norm[i] / scale[0]), float(sse[i] / scale[1]), is_top]
        for chosen, is_top in ((drawn, False), (top[: _POINTS // 2], True))
        for i in chosen.tolist()
    ]


def _top(sse: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.argsort(-sse, kind="stable")[: top_count(FRACTION, len(sse))]


def _delimits(text: str) -> bool:
    """White space, punctuation and ASCII's symbols only; marks of other scripts and emoji are text."""
    return bool(text) and all(c.isspace() or c in string.punctuation or category(c)[0] == "P" for c in text)


def _texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    return [f"#{token}" if tokenizer is None else str(tokenizer.decode([token])) for token in ids]
