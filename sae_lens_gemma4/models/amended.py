"""Methods of TransformerBridge's that Gemma 4 makes untrue: mended where they can be, and refused where they cannot.

All of them run without an error on stock: a loss in bfloat16, a cast that rounds rotary frequencies, settings for
hook points that are not there, weights folded past norms and scales that nothing can be folded past.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformer_lens.model_bridge import TransformerBridge
from typing_extensions import Self

from sae_lens_gemma4.errors import ModelError


class AmendedBridge(TransformerBridge):
    """A `TransformerBridge` without what does not hold for Gemma 4."""

    _shares_weights: bool
    """Whether its weights are those of a model that was passed in."""

    def loss_fn(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `TransformerBridge.loss_fn`, in float32 whatever the model's dtype."""
        return super().loss_fn(logits.float(), *args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the bridge to another device.

        Raises:
            ModelError: a cast, which would round rotary frequencies; or weights that are those of a model that was
                passed in. `boot` takes `device` and `dtype` and makes a copy.
        """
        kwargs.pop("print_details", None)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        own = next(self.original_model.parameters())
        if dtype not in (None, own.dtype):
            raise ModelError(
                f"A bridge is not cast: Gemma4Bridge.boot(…, dtype={str(dtype).removeprefix('torch.')!r})."
            )
        if device is None or (device.type == own.device.type and device.index in (None, own.device.index)):
            return self
        if self._shares_weights:
            raise ModelError(
                f"These weights are those of the model that was passed in: boot(…, device={str(device)!r})."
            )
        super().to(device, print_details=False)
        return self

    def enable_compatibility_mode(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: per-layer embeddings and `layer_scalar` cannot be folded into one residual stream."""
        raise ModelError("Gemma 4 has no compatibility mode: its norms and layer_scalar cannot be folded into weights.")

    def _no_such_hook(self, *_: Any) -> NoReturn:
        """Refused: the hook points that these settings would switch on are not there (`adapter`)."""
        raise ModelError("Gemma 4 has none of the hook points that this setting is for; docs/models.md has the others.")

    set_use_attn_result = set_use_split_qkv_input = _no_such_hook  # type: ignore[assignment]
    set_use_attn_in = set_use_hook_mlp_in = _no_such_hook  # type: ignore[assignment]
