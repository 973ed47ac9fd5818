"""Greedy answers of a model, a batch of prompts at a time, with something added at one hook.

Prompts of a batch are padded on the left and masked. In float32 the answers are those that each prompt gets alone; in
bfloat16 the rounding of a batch differs from that of a single prompt, and a near tie between two tokens may go the
other way. Batches are therefore the same for every condition, so that two conditions do not differ in that, and a run
in 16 bits goes on with the same batches only (`outputs`).

In a model whose later layers attend to the keys and values of earlier ones (Gemma 4 E2B and E4B), what is added to the
prompt after the last layer with its own never reaches an answer: there "all" and "generated" are the same.

Shapes: `b` items of a batch, `p` positions, `d` the hook's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from sae_lens_gemma4.errors import ConfigError, ModelError
from sae_lens_gemma4.interp.steering.conditions import Positions
from sae_lens_gemma4.models.interface import HookedModel

Hook = Callable[..., torch.Tensor]


class Output(NamedTuple):
    """What was answered.

    Attributes:
        text: without special tokens, and without the text that ended it.
        n_tokens: tokens generated, an end token included.
        cut: whether `max_new_tokens` ended it.
    """

    text: str
    n_tokens: int
    cut: bool


def adding(delta_d: torch.Tensor, positions: Positions) -> Hook:
    """A hook that adds `delta_d`, in the dtype and on the device of what it is added to.

    Args:
        positions: "all"; or "generated", the last position of each run, which with a cache of keys and values is the
            prompt's last one and then each new one.
    """

    def hook(x_bpd: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        delta = delta_d.to(device=x_bpd.device, dtype=x_bpd.dtype)
        if positions == "all":
            return x_bpd + delta
        return torch.cat([x_bpd[:, :-1], x_bpd[:, -1:] + delta], dim=1)

    return hook


def generate_batch(
    model: HookedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    hook: tuple[str, Hook] | None = None,
) -> list[Output]:
    """The most likely continuation of each prompt, token by token.

    Args:
        prompts: token ids with BOS, of any lengths.
        stop: texts that end an answer beside the end tokens of the model's generation config. A special token, which
            is in no text, ends it as a token.
        hook: the hook's name in `model`, and what is done there at every step.

    Raises:
        ModelError: a model without a tokenizer, or not of this package.
        ConfigError: a stop text that holds a special token and more.
    """
    hf_model, generate = _generator(model)
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise ModelError("The model has no tokenizer, and answers cannot be read without one.")
    special, stop = _split_stops(tokenizer, stop)
    ends = _end_tokens(hf_model, tokenizer) | special
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    ids_bp = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask_bp = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    hooks: Any = model.hooks(fwd_hooks=[hook]) if hook else nullcontext()  # type: ignore[attr-defined]
    with hooks, torch.no_grad():
        generated_bp = generate(
            ids_bp,
            attention_mask=mask_bp,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            **dict.fromkeys(("temperature", "top_k", "top_p")),  # a tuned model's config has these for sampling
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            **({"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}),
        )[:, longest:]
    return [_output(row, tokenizer, ends, stop) for row in generated_bp.tolist()]


def _output(ids: list[int], tokenizer: Any, ends: set[int], stop: Sequence[str]) -> Output:
    length = next((at + 1 for at, token in enumerate(ids) if token in ends), None)
    if length is None:  # not ended by a token: by a text, which padding follows, or by the limit
        text = tokenizer.decode(ids, skip_special_tokens=True)
        at = min((place for s in stop if (place := text.find(s)) >= 0), default=None)
        if at is None:
            return Output(text, len(ids), True)
        needed = next(n for n in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stop))
        return Output(text[:at], needed, False)
    text = tokenizer.decode(ids[:length], skip_special_tokens=True)
    at = min((place for s in stop if (place := text.find(s)) >= 0), default=len(text))
    return Output(text[:at], length, False)


def _split_stops(tokenizer: Any, stop: Sequence[str]) -> tuple[set[int], list[str]]:
    """Stop texts that are special tokens, and the others."""
    special, texts = set(), []
    for text in stop:
        ids = tokenizer.encode(text, add_special_tokens=False)
        hidden = [i for i in ids if tokenizer.decode([i], skip_special_tokens=True) != tokenizer.decode([i])]
        if hidden and len(ids) > 1:
            raise ConfigError(
                f"The stop text {text!r} holds the special token {tokenizer.decode(hidden[:1])!r} and more, and texts "
                "are read without special tokens: give the token alone, or the text without it."
            )
        if hidden:
            special.add(int(ids[0]))
        else:
            texts.append(text)
    return special, texts


def _end_tokens(hf_model: Any, tokenizer: Any) -> set[int]:
    stated = getattr(hf_model.generation_config, "eos_token_id", None)
    stated = tokenizer.eos_token_id if stated is None else stated
    return {stated} if isinstance(stated, int) else set(stated or ())


def _generator(model: Any) -> tuple[Any, Callable[..., torch.Tensor]]:
    """The model of transformers within, and its `generate` with hooks: a bridge's own has none for attention masks."""
    if hasattr(model, "original_model"):
        return model.original_model, model.original_model.generate
    if hasattr(model, "generate") and hasattr(model, "model"):
        return model.model, model.generate
    raise ModelError(f"A {type(model).__name__} cannot be steered: take Gemma4ProxyLM or Gemma4Bridge (load_model).")
