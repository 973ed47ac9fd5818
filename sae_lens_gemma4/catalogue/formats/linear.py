"""TopK SAEs made of two `nn.Linear`s, by the keys that PyTorch gives them.

Two spellings are in use, `W_enc.weight` and `encoder.weight`. A decoder with a bias of its own (`W_dec.bias`) is a
plain affine map, and nothing is subtracted from the input. Whether a separate `b_dec` is subtracted, as in Gao et al.
(arXiv:2406.04093), the keys do not tell.
"""

from __future__ import annotations

from sae_lens_gemma4.catalogue.formats.base import LINEAR, Checkpoint, Form, Weights, topk


def convert(checkpoint: Checkpoint) -> Weights:
    encoder, decoder = ("W_enc", "W_dec") if "W_enc.weight" in checkpoint.tensors else ("encoder", "decoder")
    separate = "b_dec" in checkpoint.tensors
    keys = (f"{encoder}.weight", f"{decoder}.weight", f"{encoder}.bias", "b_dec" if separate else f"{decoder}.bias")
    tensors = checkpoint.laid_out(*keys, **LINEAR)
    return topk(checkpoint, tensors, checkpoint.k(), None if separate else False)


def _form(name: str, encoder: str, decoder: str, bias: str) -> Form:
    return Form(
        name=name,
        title=f"two nn.Linears, `{encoder}.weight` …, `{bias}`, with `k`",
        keys=(f"{encoder}.weight", f"{encoder}.bias", f"{decoder}.weight", bias),
        optional=("k",),
        convert=convert,
    )


FORMS = (
    _form("linear", "W_enc", "W_dec", "W_dec.bias"),
    _form("linear_b_dec", "W_enc", "W_dec", "b_dec"),
    _form("linear_encoder", "encoder", "decoder", "decoder.bias"),
)
