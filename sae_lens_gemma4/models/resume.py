"""Run a model once, and then again with other values at one of its hooks: from the hooked layer on, where it can be.

Figures on predictions compare runs that differ at a single hook. All that comes before the hooked layer is the same in
each of them, and often most of the model. So the first run keeps what every layer from the hooked one on was called
with (its input, masks, rotary and per-layer embeddings, keys and values that layers share), and a later one calls the
same layers with the same, as often along the batch as there are values to try. The model's own forward is followed,
not written again, up to the final norm.

What a run leaves is the residual stream before that norm. Logits are made of it when asked for and of the positions
asked for: at a vocabulary of 262,144 those of one block of 1,024 tokens are 1 GiB in float32.

Shapes: `b` blocks, `p` positions, `d` d_model, `t` rows of a run: block · positions + position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformer_lens import HookedTransformer

from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.geometry import text_decoder
from sae_lens_gemma4.models.hook_names import layer_of
from sae_lens_gemma4.models.interface import HookedModel, require_hook
from sae_lens_gemma4.models.loading import attention_of
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM

Hook = Callable[..., torch.Tensor | None]
"""As TransformerLens calls it: `hook(value, hook=point)`, which returns what goes on, or None for what came."""


@dataclass(frozen=True)
class Run:
    """The end of a run.

    Attributes:
        end: the residual stream before the final norm `[b, p, d]`; of a model that runs whole, logits `[b, p, vocab]`.
        head: makes logits `[1, t, vocab]` of rows of `end` `[1, t, …]`.
        n_vocab: size of the vocabulary.
    """

    end: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]
    n_vocab: int

    def logits(self, row_t: torch.Tensor) -> torch.Tensor:
        """Logits `[t, vocab]` of rows of the run, in the model's dtype."""
        return self.head(self.end.flatten(0, 1)[row_t.to(self.end.device)][None])[0]


class Runs(Protocol):
    """A model's runs on the same tokens that differ at one hook. `resumed`: layers before the hook's run only once."""

    resumed: bool

    def first(self, tokens_bp: torch.Tensor, hook: Hook) -> Run:
        """Run the model on tokens, with `hook` at the hook point."""
        ...

    def again(self, n: int, hook: Hook) -> Run:
        """Run the tokens of `first` `n` times over, stacked: `hook` sees `[n · b, p, …]`, one copy after the other."""
        ...


def runs_at(model: HookedModel, hook_name: str, **arguments: Any) -> Runs:
    """Runs of `model` that differ at `hook_name`; resumed with `Gemma4ProxyLM`, `Gemma4Bridge` and `HookedTransformer`.

    Other models, hooks outside the layers and flex attention, whose masks cannot be repeated, run whole.

    Args:
        arguments: of the model's forward, for every run (`isolate_documents`).

    Raises:
        UnknownNameError: the model has no such hook.
    """
    hook_name = require_hook(model, hook_name)
    if layer_of(hook_name) is None:
        return _WholeRuns(model, hook_name, arguments)
    if isinstance(model, HookedTransformer):
        return _ResumedRuns(model, hook_name, arguments, model.blocks, _stock_head(model), model.cfg.d_vocab)
    if isinstance(model, Gemma4ProxyLM | Gemma4Bridge):
        hf_model: Any = model.model if isinstance(model, Gemma4ProxyLM) else model.original_model
        if attention_of(hf_model) != "flex_attention":
            layers, n_vocab = text_decoder(hf_model).layers, hf_model.config.get_text_config().vocab_size
            return _ResumedRuns(model, hook_name, arguments, layers, _head(model, hf_model), n_vocab)
    return _WholeRuns(model, hook_name, arguments)


class _WholeRuns:
    resumed = False

    def __init__(self, model: Any, hook_name: str, arguments: dict[str, Any]) -> None:
        self._model, self._hook_name, self._arguments = model, hook_name, arguments
        self._tokens_bp = torch.empty(0)

    def first(self, tokens_bp: torch.Tensor, hook: Hook) -> Run:
        self._tokens_bp = tokens_bp
        return self.again(1, hook)

    def again(self, n: int, hook: Hook) -> Run:
        logits = self._model.run_with_hooks(
            self._tokens_bp.repeat(n, 1), fwd_hooks=[(self._hook_name, hook)], prepend_bos=False, **self._arguments
        )
        return Run(logits, lambda rows: rows, logits.shape[-1])


class _ResumedRuns:
    resumed = True

    def __init__(
        self,
        model: Any,
        hook_name: str,
        arguments: dict[str, Any],
        layers: nn.ModuleList,
        head: Callable[[torch.Tensor], torch.Tensor],
        n_vocab: int,
    ) -> None:
        self._model, self._hook_name, self._arguments = model, hook_name, arguments
        self._head, self._n_vocab, self._n_layers = head, n_vocab, len(layers)
        self._layers = list(layers)[cast(int, layer_of(hook_name)) :]
        self._start = torch.empty(0)
        self._calls: list[tuple[Any, Any]] = []

    def first(self, tokens_bp: torch.Tensor, hook: Hook) -> Run:
        self._calls = []
        as_it_was = _Copies(1, len(tokens_bp))

        def keep(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
            if not self._calls:
                self._start = args[0]
            self._calls.append((as_it_was(args[1:]), {name: as_it_was(value) for name, value in kwargs.items()}))

        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
            end = self._model.run_with_hooks(
                tokens_bp,
                fwd_hooks=[(self._hook_name, hook)],
                stop_at_layer=self._n_layers,
                prepend_bos=False,
                **self._arguments,
            )
        return Run(end, self._head, self._n_vocab)

    def again(self, n: int, hook: Hook) -> Run:
        copies = _Copies(n, len(self._start))
        resid = copies(self._start)
        with self._model.hooks(fwd_hooks=[(self._hook_name, hook)]), _tapped(self._model):
            for layer, (args, kwargs) in zip(self._layers, self._calls, strict=True):
                resid = layer(resid, *copies(args), **{name: copies(value) for name, value in kwargs.items()})
        return Run(resid, self._head, self._n_vocab)


class _Copies:
    """What layers were called with, `n` times along the batch; a view where the batch is one block.

    What several layers were given as one object stays one object: they hand keys and values on in a dict, which is
    copied as it is when it is first met.
    """

    def __init__(self, n: int, n_blocks: int) -> None:
        self._n, self._n_blocks = n, n_blocks
        self._made: dict[int, tuple[Any, Any]] = {}  # with what each was made of, whose id must stay its own

    def __call__(self, value: Any) -> Any:
        if id(value) not in self._made:
            self._made[id(value)] = value, self._copy(value)
        return self._made[id(value)][1]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == self._n_blocks:  # others are broadcast
            return value.expand(self._n, *value.shape).flatten(0, 1)
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if isinstance(value, Mapping):
            kind: Any = type(value)
            return kind({key: self(entry) for key, entry in value.items()})
        return value


@contextmanager
def _tapped(model: Any) -> Iterator[None]:
    """A proxy's hook points, open; those of other models always are."""
    with ExitStack() as stack:
        if isinstance(model, Gemma4ProxyLM):
            model.hook_dict.open(stack)
        yield


def _head(model: Any, hf_model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The end of transformers' `Gemma4ForCausalLM.forward` (5.23 modeling_gemma4.py:1916)."""
    norm, cap = text_decoder(hf_model).norm, hf_model.config.get_text_config().final_logit_softcapping

    def head(rows: torch.Tensor) -> torch.Tensor:
        with _tapped(model):
            logits: torch.Tensor = hf_model.lm_head(norm(rows))
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


def _stock_head(model: HookedTransformer) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: model(rows, start_at_layer=model.cfg.n_layers, return_type="logits")
