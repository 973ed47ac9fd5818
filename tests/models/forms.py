"""What tests of the models share: every shape, both classes, and Hugging Face's own forward to hold them against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import Gemma4UnifiedForCausalLM, PreTrainedModel

from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4, tiny_tokenizer

TOKENS = torch.arange(100, 124).view(2, 12)
BOTH_NAMES = pytest.mark.parametrize("name", ["blocks.2.hook_resid_post", "blocks.2.hook_out"])


def unified_text_only() -> PreTrainedModel:
    composite = tiny_gemma4("unified")
    model = Gemma4UnifiedForCausalLM(composite.config.text_config).eval()
    model.model.load_state_dict(composite.model.language_model.state_dict())
    return model


FORMS: dict[str, Callable[[], PreTrainedModel]] = {v: (lambda v=v: tiny_gemma4(v)) for v in VARIANTS}
FORMS["unified_text_only"] = unified_text_only


CLASSES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "Gemma4Bridge": Gemma4Bridge.boot,
    "Gemma4ProxyLM": lambda model: Gemma4ProxyLM(model, tiny_tokenizer()),
}


@torch.no_grad()
def eager_logits(model: PreTrainedModel, *, replace_layer_2: Callable[[Any], Any] | None = None) -> torch.Tensor:
    """Transformers' own logits, with eager attention; optionally with the output of layer 2 replaced."""
    model.set_attn_implementation("eager")
    decoder = getattr(model.model, "language_model", model.model)
    if replace_layer_2 is None:
        return model(TOKENS).logits
    handle = decoder.layers[2].register_forward_hook(lambda _m, _args, out: replace_layer_2(out))
    try:
        return model(TOKENS).logits
    finally:
        handle.remove()


def random_sae(hook_name: str | None, hook_name_out: str | None = None) -> StandardSAE:
    metadata = SAEMetadata(hook_name=hook_name, hook_name_out=hook_name_out)
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128, metadata=metadata))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(std=0.1)
    return sae


def layer_2_output() -> torch.Tensor:
    seen: list[torch.Tensor] = []
    eager_logits(tiny_gemma4("ple"), replace_layer_2=lambda out: seen.append(out.clone()))
    return seen[0]
