"""The prompts of a lens as tokens, with the positions that count, and the tokens to follow, each checked to be one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.errors import ConfigError, DataError


class Prompt(NamedTuple):
    """Token ids, and the positions among them that are read, ascending."""

    tokens: list[int]
    places: list[int]


def read_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Any, positions: str, d_vocab: int) -> list[Prompt]:
    """Texts, or tokens `[prompt, pos]`. BOS and padding do not count; padding on the right is dropped. A text that
    begins with BOS gets no special tokens more.

    Raises:
        DataError: there are none, one is empty, has no token that counts, or holds a token that the model has not.
    """
    uncounted = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
    if isinstance(prompts, torch.Tensor):
        if prompts.ndim != 2 or prompts.is_floating_point():
            raise DataError(f"Tokens are integers [prompt, pos], not {prompts.dtype} {tuple(prompts.shape)}.")
        rows: list[tuple[str, list[int]]] = [("tokens", row) for row in prompts.tolist()]
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text:
                raise DataError(f"Prompt {number} is {text!r}; a prompt is a text that is not empty.")
        bos = tokenizer.bos_token
        begun = [bos is not None and text.startswith(bos) for text in texts]  # as a chat template writes them
        rows = [(t, tokenizer.encode(t, add_special_tokens=not b)) for t, b in zip(texts, begun, strict=True)]
    if not rows:
        raise DataError("There is no prompt.")
    read = []
    for number, (text, tokens) in enumerate(rows):
        places = [at for at, token in enumerate(tokens) if token not in uncounted]
        if not places:
            raise DataError(f"Prompt {number} ({text[:40]!r}) has no token that counts, only BOS or padding.")
        if outside := [token for token in tokens if not 0 <= token < d_vocab]:
            raise DataError(f"Prompt {number} holds token id {outside[0]}; the model has {d_vocab} tokens.")
        read.append(Prompt(tokens[: places[-1] + 1], places if positions == "all" else places[-1:]))
    return read


def read_targets(
    tokenizer: PreTrainedTokenizerBase,
    targets: str | int | Sequence[str | int] | None,
    n_prompts: int,
    d_vocab: int,
) -> list[int] | None:
    """One token id a prompt.

    Raises:
        ConfigError: not one target or one a prompt, a text that is not a single token, or no such id.
    """
    if targets is None:
        return None
    given = [targets] * n_prompts if isinstance(targets, str | int) else list(targets)
    if len(given) != n_prompts:
        raise ConfigError(f"There are {len(given)} targets and {n_prompts} prompts; give one target, or one a prompt.")
    return [_target(tokenizer, target, d_vocab) for target in given]


def _target(tokenizer: PreTrainedTokenizerBase, target: str | int, d_vocab: int) -> int:
    if isinstance(target, int) and not isinstance(target, bool):
        if not 0 <= target < d_vocab:
            raise ConfigError(f"There is no token {target}; the model has {d_vocab}, from 0.")
        return target
    if not isinstance(target, str):
        raise ConfigError(f"A target is a token's text or its id, not {target!r}.")
    tokens = tokenizer.encode(target, add_special_tokens=False)
    if len(tokens) != 1:
        pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(tokens)) or "none"
        raise ConfigError(
            f"Target {target!r} is {len(tokens)} tokens ({pieces}). Give a text that is one, perhaps with the blank "
            "before it, or a token's id."
        )
    return int(tokens[0])
