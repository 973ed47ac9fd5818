"""ErnOSAgent's SAE, whose card and code disagree about the file; either set of keys is read, each by its own words.

The code (github.com/MettaMazza/ErnOSAgent, src/interpretability/trainer.rs) writes `W_enc` [d_sae, d_in],
`W_dec` [d_in, d_sae] and both biases, and gates: relu(pre) where pre ≥ 0.001. Its readers (sae.rs) keep pre > 0 in one
commit and pre > 0.001 in a later one; what was trained is followed. The card names `encoder.weight`,
`decoder.weight` and `encoder.bias`, and its snippet is a plain ReLU. Neither subtracts the decoder's bias, and neither
keeps the k = 64 largest latents that the card speaks of. The first set of keys is also that of the plain form, so this
one is used where it is named.
"""

from __future__ import annotations

import torch

from sae_lens_gemma4.catalogue.formats.base import LINEAR, Checkpoint, Form, Weights, jumprelu
from sae_lens_gemma4.catalogue.formats.plain import matrices

GATE = 0.001


def convert_code(checkpoint: Checkpoint) -> Weights:
    tensors = matrices(checkpoint, "d_sae d_in")
    at_least = torch.nextafter(torch.tensor(GATE), torch.tensor(0.0))  # sae_lens keeps what exceeds a threshold
    return jumprelu(tensors, at_least.item(), False)


def convert_card(checkpoint: Checkpoint) -> Weights:
    if "decoder.bias" not in checkpoint.tensors and "decoder.weight" in checkpoint.tensors:
        checkpoint.tensors["decoder.bias"] = torch.zeros_like(checkpoint.tensors["decoder.weight"][:, 0])
    keys = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
    tensors = checkpoint.laid_out(*keys, **LINEAR)
    return Weights("standard", tensors, False)


def convert(checkpoint: Checkpoint) -> Weights:
    return (convert_code if "W_enc" in checkpoint.tensors else convert_card)(checkpoint)


FORM = Form(
    name="ernos",
    title="ErnOSAgent: `gemma4_sae_1m.safetensors`, by the card's keys or the code's",
    keys=("encoder.weight", "encoder.bias", "decoder.weight"),
    optional=("decoder.bias",),
    convert=convert,
    marks=lambda checkpoint: not checkpoint.states_k(),
)
