"""Tiny random Gemma 4 models and their tokenizer, for anyone's tests: every architecture of the family in a second.

A model as its constructor leaves it tests little: norms, `layer_scalar`, the router's `scale` and
`per_expert_scale` start at one, so code that forgets them still gives the right numbers, and projections start
so small that most branches hardly move the logits. Here every parameter and every `layer_scalar` is drawn
anew, each from a generator of its own, seeded by its name: a model depends on `seed` alone, the text part is
the same with and without towers, and torch's global generators are left as they were.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sae_lens_gemma4.errors import check_name

_VOCABULARY = 2048
_SPECIAL_TOKENS: dict[str, Any] = {
    "image_token_id": 18,
    "boi_token_id": 16,
    "eoi_token_id": 17,
    "audio_token_id": 21,
    "boa_token_id": 19,
    "eoa_token_index": 20,
    "video_token_id": None,
}

_TEXT: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "max_position_embeddings": 1024,
    "final_logit_softcapping": 30.0,
}
_NO_PLE = {"hidden_size_per_layer_input": 0}
_PLE = {
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": _VOCABULARY,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
}
_K_EQ_V = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
_MOE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 24}

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 32,
}
_AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "output_proj_dims": 48,
}
_UNIFIED_VISION = {
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "mm_embed_dim": 48,
    "mm_posemb_size": 32,
    "output_proj_dims": 48,
}


@dataclass(frozen=True)
class _Variant:
    """The text part's overrides over `_TEXT`, and the model around it. A composite without towers has None there."""

    model_class: type[PreTrainedModel]
    text: dict[str, Any]
    vision: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None


_VARIANTS = {
    "ple": _Variant(Gemma4ForCausalLM, _PLE),
    "ple_multimodal": _Variant(Gemma4ForConditionalGeneration, _PLE, _VISION, _AUDIO),
    "dense_keqv": _Variant(Gemma4ForConditionalGeneration, {**_NO_PLE, **_K_EQ_V}),
    "moe": _Variant(Gemma4ForCausalLM, {**_NO_PLE, **_K_EQ_V, **_MOE}),
    "unified": _Variant(Gemma4UnifiedForConditionalGeneration, {}, _UNIFIED_VISION, {"audio_embed_dim": 40}),
}
VARIANTS = tuple(_VARIANTS)


def tiny_gemma4(variant: str, seed: int = 0) -> PreTrainedModel:
    """A random Gemma 4 model of `transformers`: 6 layers of 64 dimensions, 2048 tokens, float32, on the CPU.

    Layers 2 and 5 attend fully with heads of 32 dimensions, the others over a window of 8 tokens with heads of
    16. The attention implementation is transformers' default. `tiny_tokenizer()` fits the vocabulary.

    Args:
        variant: which member of the family, in small:
            "ple" (E2B, E4B): per-layer embeddings, the last 3 layers KV-shared with an MLP twice as wide;
            "ple_multimodal": the same text part, weight for weight, under vision and audio towers;
            "dense_keqv" (31B): K==V on full-attention layers; ForConditionalGeneration without towers;
            "moe" (26B-A4B): 8 experts, top-3, beside a dense MLP, K==V on full-attention layers;
            "unified" (12B): the encoder-free multimodal form.
        seed: fixes every weight.

    Returns:
        The model in eval mode; `input_ids` int64 `[batch, pos]` give `logits` `[batch, pos, 2048]`.

    Raises:
        UnknownNameError: no such variant.
    """
    check_name("tiny_gemma4 variant", variant, VARIANTS)
    config = _config(_VARIANTS[variant])
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model: PreTrainedModel = _VARIANTS[variant].model_class(config).float()
    _randomise_(model, seed)
    model.eval()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the package's embedded models: 2048 tokens with Gemma 4's special tokens, ids of its own.

    Prepends BOS (2); pad is 0, EOS 1, `<turn|>` 5. A new object at every call, read from the package's files.
    """
    folder = files("sae_lens_gemma4.embedded") / "data" / "tokenizer"
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return tokenizer


def _config(variant: _Variant) -> Gemma4TextConfig | Gemma4Config | Gemma4UnifiedConfig:
    text = {**_TEXT, **variant.text}
    if variant.model_class is Gemma4ForCausalLM:
        return Gemma4TextConfig(**text)
    composite = Gemma4UnifiedConfig if variant.model_class is Gemma4UnifiedForConditionalGeneration else Gemma4Config
    return composite(text_config=text, vision_config=variant.vision, audio_config=variant.audio, **_SPECIAL_TOKENS)


@torch.no_grad()
def _randomise_(model: nn.Module, seed: int) -> None:
    for name, parameter in model.named_parameters():
        generator = _generator(seed, name)
        if parameter.ndim > 1:  # unit-scale outputs; the router's logits too, whose input is divided by √d
            fan_in = 1 if name.endswith("router.proj.weight") else parameter.shape[-1]
            parameter.normal_(std=fan_in**-0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1, generator=generator)
        else:  # norms, scales
            parameter.uniform_(0.5, 1.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.6, 1.4, generator=_generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    """One stream per tensor, the same for `model.layers…` and `model.language_model.layers…`."""
    name = name.replace("model.language_model.", "model.")
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
