"""Dashboards of every latent of an SAE from one pass over a text.

The pass leaves all activations in the folder's `firings`; dashboards are made from these, file by file, and the
activations removed. A call with the same arguments goes on where one was stopped, at whatever point.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_gemma4.activations.corpus import CorpusLike
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.result import write_json
from sae_lens_gemma4.interp.firings import differing, read_facts, remove_firings
from sae_lens_gemma4.interp.pieces import pieces_of
from sae_lens_gemma4.interp.unembedding import Unembedding
from sae_lens_gemma4.models.interface import HookedModel, vocab_size
from sae_lens_gemma4.neuronpedia.folder import SETTINGS, Dashboards
from sae_lens_gemma4.neuronpedia.planning import FIRINGS, Plan, plan_dashboards
from sae_lens_gemma4.neuronpedia.writing import Writer
from sae_lens_gemma4.training.saving import only_one


def build_dashboards(
    sae: SAE[Any],
    model: HookedModel,
    corpus: CorpusLike,
    out_dir: str | Path,
    *,
    keep_firings: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Dashboards:
    """Make the dashboards of every latent of an SAE, in one pass over a text.

    Args:
        sae: any SAE of sae_lens in its inference form, at a residual stream, an MLP, a MoE's branch, or elsewhere.
        model: any model that sae_lens can hook, with a tokenizer.
        corpus: whatever `build_corpus` takes. A `Corpus` is read as it is, and whole.
        out_dir: a new folder, or one in which a call with the same arguments was stopped.
        keep_firings: leave all activations in `out_dir/firings`: 8 bytes each.
        settings: of `plan_dashboards`.

    Returns:
        The folder, opened.

    Raises:
        ConfigError: the folder holds other dashboards, naming what differs; or its disk is full.
        DataError: activations that are not finite. Others as `plan_dashboards`.
    """
    plan = plan_dashboards(sae, model, corpus, **settings)
    return make_dashboards(plan, out_dir, keep_firings=keep_firings, progress=progress)


@torch.no_grad()
def make_dashboards(
    plan: Plan, out_dir: str | Path, *, keep_firings: bool = False, progress: bool = True
) -> Dashboards:
    """Make what is planned, or what is missing of it. Arguments and errors as `build_dashboards`."""
    folder, document = Path(out_dir), plan.document
    if not is_finished(folder, document):
        cost = plan.cost(folder)
        if progress:
            tqdm.write(plan.sentence(cost))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{folder} cannot be made: {e.strerror}.") from e
        with only_one(folder):
            write_json(document, folder / SETTINGS)
            _write(plan, folder, progress)
            write_json(document | {"complete": True}, folder / SETTINGS)
            if not keep_firings:
                remove_firings(folder / FIRINGS)
    elif not keep_firings:  # what a kill just before their removal left
        remove_firings(folder / FIRINGS)
    return Dashboards(folder)


def is_finished(folder: Path, document: Mapping[str, Any]) -> bool:
    """Whether a folder holds these dashboards; False of one that holds some of them, or nothing yet.

    Raises:
        ConfigError: it holds others, or is no folder.
        DataError: its settings cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file.")
    file = folder / SETTINGS
    if not file.is_file():
        if any(folder.glob("batch-*.json")):
            raise ConfigError(f"{folder} holds dashboards that were made by something else. Take another folder.")
        return False
    there, same = read_facts(file), {"complete", "version"}
    differing(
        folder,
        {k: v for k, v in _flat(there) if k not in same},
        {k: v for k, v in _flat(json.loads(json.dumps(document))) if k not in same},
    )
    return bool(there.get("complete"))


def _write(plan: Plan, folder: Path, progress: bool) -> None:
    document, tokenizer = plan.document, plan.model.tokenizer
    firings = plan.gather(folder, progress=progress)
    pieces = pieces_of(tokenizer, vocab_size(plan.model) or len(tokenizer))
    unembedding = Unembedding.of(plan.model, plan.sae, plan.hook_name)
    bos, dataset = tokenizer.bos_token_id, document["dataset"]
    writer = Writer(firings, plan.corpus, plan.sae, plan.header, pieces, unembedding, bos, dataset, plan.settings)
    writer.write(folder, progress=progress)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Any:
    for key, part in value.items():
        if isinstance(part, Mapping):
            yield from _flat(part, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", part
