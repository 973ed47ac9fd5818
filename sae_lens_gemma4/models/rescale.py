"""A shift that breaks an SAE and nothing else, made on purpose.

Published base-model SAEs were reported to collapse on the tuned Gemma 4 (for what cause is not known); a tiny model's
instruction tuning shifts them only mildly. This is a hard shift that can be stated exactly: the residual stream is
multiplied by `s` by changing weights alone, and the model's function stays the same, because every reader of
the stream but one normalises what it reads (RMSNorm), and that one (`per_layer_input_gate`) is divided by `s`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.models.geometry import gemma4_geometry, text_decoder

_WRITERS = ("post_attention_layernorm", "post_feedforward_layernorm", "post_per_layer_input_norm")


@torch.no_grad()
def rescale_residual_(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    """Multiply a Gemma 4 model's residual stream by `scale`, in place; its logits do not change.

    What is left of a difference in the logits comes from the norms' eps (about 1e-4 at `scale` 6).

    Raises:
        ModelError: not a Gemma 4 model.
        ConfigError: a scale that is not positive and finite.
    """
    gemma4_geometry(model.config)
    if not 0 < scale < float("inf"):
        raise ConfigError(f"A residual scale must be positive and finite, not {scale}.")
    decoder = text_decoder(model)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
        model.config.tie_word_embeddings = False
    embedding.weight.mul_(scale)
    for layer in decoder.layers:
        for name in _WRITERS:
            if hasattr(layer, name):
                getattr(layer, name).weight.mul_(scale)
        if hasattr(layer, "per_layer_input_gate"):
            layer.per_layer_input_gate.weight.div_(scale)
    return model
