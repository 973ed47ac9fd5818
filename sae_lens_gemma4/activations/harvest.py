"""One forward pass, many hooks: activations with the facts of the token each belongs to.

Works with every model that sae_lens can hook (`HookedTransformer`, `HookedProxyLM`, a TransformerBridge, the
classes of this package). The forward stops after the deepest layer asked for.

Shapes: `t` tokens that the corpus's mask leaves, in reading order; `d` the hook's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.models.interface import HookedModel, require_hook
from sae_lens_gemma4.models.loading import isolation


class Harvest(NamedTuple):
    """The activations of one batch of blocks.

    Attributes:
        acts: for each hook asked for, `[t, …]`, in the model's dtype and on its device.
        tokens_t: token ids.
        document_t: document numbers.
        position_t: positions within the block.
        role_t: whose turn of a chat each is in, an index into the corpus's `roles`, -1 for none; None without roles.
    """

    acts: dict[str, torch.Tensor]
    tokens_t: torch.Tensor
    document_t: torch.Tensor
    position_t: torch.Tensor
    role_t: torch.Tensor | None


@torch.no_grad()
def harvest(
    model: HookedModel,
    corpus: Corpus,
    hook_names: Sequence[str],
    *,
    batch_blocks: int = 16,
    shuffle: torch.Generator | None = None,
    isolate_documents: bool = False,
    require_finite: bool = True,
) -> Iterator[Harvest]:
    """Run `corpus` through `model` once, `batch_blocks` blocks at a time, blocks shuffled by `shuffle` if given.

    Args:
        isolate_documents: documents packed into one block do not see each other (with `Gemma4Bridge` and
            `Gemma4ProxyLM`; each document must open with BOS, as `build_corpus` packs them).
        require_finite: raise at the first activations that are not finite; else they are yielded as they are.

    Raises:
        ConfigError: `isolate_documents` with another model class.
        UnknownNameError: a hook that the model does not have.
        DataError: activations that are not finite, naming hook and document, or not one row a position.
    """
    for batch, found in forwards(
        model, corpus, hook_names, batch_blocks=batch_blocks, shuffle=shuffle, isolate_documents=isolate_documents
    ):
        kept_t = batch.keep_bp.flatten().nonzero()[:, 0]
        acts = {
            name: acts_bpd.flatten(0, 1).index_select(0, kept_t.to(acts_bpd.device)) for name, acts_bpd in found.items()
        }
        documents = batch.document_bp[batch.keep_bp]
        for name, acts_td in acts.items() if require_finite else ():
            finite_t = finite_rows(acts_td)
            if not finite_t.all():
                text, bad = batch.locate(int(documents[~finite_t.cpu()][0]))
                raise DataError(f"Activations at {name} are not finite, first in document {bad} of {text!r}.")
        positions = torch.arange(batch.context_size).expand_as(batch.tokens_bp)[batch.keep_bp]
        roles = None if batch.role_bp is None else batch.role_bp[batch.keep_bp]
        yield Harvest(acts, batch.tokens_bp[batch.keep_bp], documents, positions, roles)


@torch.no_grad()
def forwards(
    model: HookedModel,
    corpus: Corpus,
    hook_names: Sequence[str],
    *,
    batch_blocks: int = 16,
    shuffle: torch.Generator | None = None,
    isolate_documents: bool = False,
) -> Iterator[tuple[Corpus, dict[str, torch.Tensor]]]:
    """Each batch of blocks and, for each hook, what the model left there: `[block, pos, …]`, tokens masked or not.

    For those who put rows where they want them; arguments and errors are `harvest`'s.
    """
    isolated = isolation(model, isolate_documents)
    known = {name: require_hook(model, name) for name in hook_names}
    stops = [extract_stop_at_layer_from_tlens_hook_name(name) for name in hook_names]
    stop_at_layer = None if None in stops else max(s for s in stops if s is not None)
    device = next(model.parameters()).device
    for batch in corpus.batches(batch_blocks, shuffle=shuffle):
        _, cache = model.run_with_cache(
            batch.tokens_bp.to(device),
            names_filter=list(known.values()),
            stop_at_layer=stop_at_layer,
            prepend_bos=False,
            **isolated,
        )
        acts = {name: cache[known_name] for name, known_name in known.items()}
        for name, acts_bpd in acts.items():
            if acts_bpd.shape[:2] != batch.tokens_bp.shape:
                raise DataError(f"{name} is {tuple(acts_bpd.shape)}, not [block, pos, …]: it cannot be harvested.")
        yield batch, acts


def finite_rows(acts: torch.Tensor) -> torch.Tensor:
    """Which rows of `[t, …]` have no NaN and no infinity: bool `[t]`, without a temporary of the size of `acts`."""
    largest_t: torch.Tensor = torch.linalg.vector_norm(acts.flatten(1), ord=torch.inf, dim=1)
    return largest_t.isfinite()
