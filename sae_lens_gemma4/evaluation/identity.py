"""Which weights were measured: two results that carry the same hashes are of the same SAE and the same model.

An SAE is hashed whole, with what its config says of how it computes. A model of many gigabytes is recognised by a
fingerprint: shapes and dtypes of all its parameters and a few hundred values of each, spread evenly, which any training
step changes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_gemma4.models.interface import HookedModel

_VALUES = 256
_CHUNK = 2**26


def sae_hash(sae: SAE[Any]) -> str:
    """First 16 hex digits of the SHA-256 of all tensors of the SAE's state, with their names, shapes and dtypes, and of
    its config's settings: a `k` is in no tensor."""
    settings = {k: v for k, v in sae.cfg.to_dict().items() if k not in ("metadata", "device", "dtype")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in tensor.detach().reshape(-1).split(_CHUNK):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_fingerprint(model: HookedModel) -> str:
    """First 16 hex digits of a SHA-256 of the parameters' shapes, dtypes and 256 evenly spread values of each.

    Gemma 4's layer scalars, which are buffers, count too. In no order, without names, and without parameters of zeros
    (a bridge's output bias): these differ between classes that hook one model.
    """
    parts = []
    buffers: dict[str, torch.Tensor] = dict(getattr(model, "named_buffers", dict)())
    scalars = [buffer for name, buffer in buffers.items() if name.endswith("layer_scalar")]
    for parameter in [*model.parameters(), *scalars]:
        flat = parameter.detach().reshape(-1)
        chosen = torch.linspace(0, len(flat) - 1, min(_VALUES, len(flat)), dtype=torch.float64).long()
        values = flat[chosen.to(flat.device)].float().cpu()
        if values.any():
            facts = f"{tuple(parameter.shape)} {parameter.dtype}".encode()
            parts.append(hashlib.sha256(facts + values.numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]
