"""What a probe reads of a latent's contexts: their activations, whether it fires, and what must not tell.

Contexts for labelling and held-out ones are read; those for calibration are left alone, since a probe's accuracy is
part of the score that they are to judge (`interp/labels/confidence.py`).

Shapes: `n` contexts of one latent, `m` places, `f` = 3 features without activations, `d` the hook's width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.harvest import finite_rows, forwards
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.interp.excerpts import LatentExamples
from sae_lens_gemma4.models.interface import HookedModel


class ProbeRows(NamedTuple):
    """One latent's contexts.

    Attributes:
        place_n: where the peak is, `block * context_size + position`.
        fires_n: whether the latent fires there.
        near_miss_n: whether the context was chosen because it looks as if it would.
        document_n: the document's number.
        length_nf: the window's tokens, the peak's position in its block, and its position in its document.
    """

    index: int  # type: ignore[assignment]
    place_n: npt.NDArray[np.int64]
    fires_n: npt.NDArray[np.bool_]
    near_miss_n: npt.NDArray[np.bool_]
    document_n: npt.NDArray[np.int64]
    length_nf: npt.NDArray[np.float64]


def probe_rows(examples: Iterable[LatentExamples], corpus: Corpus) -> list[ProbeRows]:
    """The contexts of each latent, positives before negatives, of all parts but the one for calibration."""
    first = _first_places(corpus)
    found = []
    for latent in examples:
        parts = (latent.labelling, latent.held_out)
        positives = [e for part in parts for e in part.positives]
        excerpts = positives + [e for part in parts for e in part.negatives]
        place_n = np.array([e.block * corpus.context_size + e.position for e in excerpts], dtype=np.int64)
        document_n = np.array([e.document for e in excerpts], dtype=np.int64)
        features = [
            (len(e.tokens_w), e.position, place - first[e.document])
            for e, place in zip(excerpts, place_n.tolist(), strict=True)
        ]
        found.append(
            ProbeRows(
                index=latent.index,
                place_n=place_n,
                fires_n=np.arange(len(excerpts)) < len(positives),
                near_miss_n=np.array([e.kind == "near_miss" for e in excerpts], dtype=bool),
                document_n=document_n,
                length_nf=np.array(features, dtype=np.float64).reshape(-1, 3),
            )
        )
    return found


def activations_at(
    model: HookedModel,
    hook_name: str,
    corpus: Corpus,
    place_m: npt.NDArray[np.int64],
    batch_blocks: int = 4,
    *,
    isolate_documents: bool = False,
) -> npt.NDArray[np.float32]:
    """The hook's activations at some places of the corpus, `[m, d]`; each block with one goes through the model once.

    Args:
        place_m: `block * context_size + position`, in any order, repeated or not.
        isolate_documents: as the pass that found the contexts had it.

    Raises:
        DataError: no place, one outside of the corpus or where no token counts, or activations that are not finite.
        ConfigError, UnknownNameError: as `activations.harvest.forwards`.
    """
    wanted, back_m = np.unique(place_m, return_inverse=True)
    if not len(wanted):
        raise DataError("There is no place to read activations at: no latent has a context.")
    if wanted[0] < 0 or wanted[-1] >= corpus.tokens_bp.numel():
        raise DataError(
            f"Places {wanted[0]} to {wanted[-1]} are not all in a corpus of {corpus.tokens_bp.numel():,} tokens: "
            "are they another one's?"
        )
    if not corpus.keep_bp.flatten()[torch.from_numpy(wanted)].all():
        raise DataError("Activations were asked for at a token that does not count: are the places another corpus's?")
    blocks, row_u = np.unique(wanted // corpus.context_size, return_inverse=True)
    at_u = torch.from_numpy(row_u * corpus.context_size + wanted % corpus.context_size)
    found, start = [], 0
    for batch, acts in forwards(
        model,
        corpus.take(torch.from_numpy(blocks)),
        [hook_name],
        batch_blocks=batch_blocks,
        isolate_documents=isolate_documents,
    ):
        end = start + batch.tokens_bp.numel()
        mine = at_u[(at_u >= start) & (at_u < end)] - start
        acts_ud = acts[hook_name].flatten(0, 1)
        found.append(acts_ud.index_select(0, mine.to(acts_ud.device)).flatten(1).float().cpu())
        start = end
    acts_ud = torch.cat(found)
    if not finite_rows(acts_ud).all():
        raise DataError(f"Activations at {hook_name} are not finite: load the model in float32 or bfloat16.")
    return np.asarray(acts_ud.numpy()[back_m], dtype=np.float32)


def _first_places(corpus: Corpus) -> dict[int, int]:
    """Where each document begins."""
    documents, first = np.unique(corpus.document_bp.numpy(), return_index=True)
    return dict(zip(documents.tolist(), first.tolist(), strict=True))
