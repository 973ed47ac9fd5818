"""A text that an SAE and its model have read, and what is asked of it: the profile of its first blocks, activations at
latents' contexts, tokens that latents promote.

The pass over the text and the profile are kept in the output folder, under what they were made of.

Shapes: `n` places of the corpus, or contexts of one latent; `d` the hook's width, `f` latents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.firings import Firings
from sae_lens_gemma4.interp.labels.probe_rows import ProbeRows, activations_at
from sae_lens_gemma4.interp.layers.profile import profile_layers
from sae_lens_gemma4.interp.pieces import pieces_of
from sae_lens_gemma4.interp.unembedding import Unembedding
from sae_lens_gemma4.models.hook_names import layer_of
from sae_lens_gemma4.models.interface import vocab_size
from sae_lens_gemma4.neuronpedia.job import DASHBOARDS, Stated, plan_of
from sae_lens_gemma4.neuronpedia.listing import listing_of
from sae_lens_gemma4.neuronpedia.planning import Plan
from sae_lens_gemma4.neuronpedia.writing import DashboardSettings
from sae_lens_gemma4.studies.contrast import EFFECTS
from sae_lens_gemma4.studies.labels import LabelStudy, LatentStudy
from sae_lens_gemma4.studies.study import model_facts, save_tensors

PROFILE = "profile.safetensors"
_HELD_BYTES = 2**30
"""Of activations for probes, at once."""


@dataclass(frozen=True)
class Reading:
    """A text that was read: all that is asked of latents comes from here."""

    plan: Plan
    firings: Firings

    @property
    def tokenizer(self) -> Any:
        return self.plan.model.tokenizer

    def facts(self) -> dict[str, Any]:
        sae = {k: v for k, v in self.plan.document["sae"].items() if k != "config"}
        return {"sae": sae, "model": model_facts(self.plan.model), "corpus": self.plan.document["corpus"]}


def read_text(study: LatentStudy, folder: Path, *, progress: bool) -> Reading:
    """Load SAE, model and text, and read it, going on where an earlier run was stopped."""
    stated: Stated | None = getattr(study, "listing", None)
    plan = plan_of(study.sae, study.model, study.text, stated or Stated(), DashboardSettings())
    if stated is not None:
        listing_of(plan.document, stated.arguments())  # what an export lacks, before anything is read or paid
    (folder / DASHBOARDS).mkdir(parents=True, exist_ok=True)
    return Reading(plan, plan.gather(folder / DASHBOARDS, progress=progress))


def profiled(
    study: LabelStudy, reading: Reading, folder: Path, *, progress: bool
) -> tuple[dict[str, Any] | None, npt.NDArray[np.float32] | None]:
    """The profile of the text's first blocks, and the cosines of the SAE's layer by place; kept in the folder."""
    if study.profile is None:
        return None, None
    options, plan = study.profile, reading.plan
    layer = layer_of(plan.hook_name)
    if layer is None:
        raise ConfigError(f"The SAE's hook {plan.hook_name} lies in no layer: leave the profile out.")
    corpus = options.blocks(plan.corpus)
    facts = json.dumps(
        {
            "options": asdict(options),
            "layer": layer,
            "corpus": corpus.hash,
            "isolate_documents": plan.isolate_documents,
            "model": reading.facts()["model"],
        }
    )
    try:
        with safe_open(folder / PROFILE, framework="np") as kept:
            there = kept.metadata() or {}
            if there.get("facts") == facts:
                return json.loads(there["profile"]), kept.get_tensor("cosine_n")
    except (OSError, SafetensorError, KeyError, ValueError):  # none yet, or broken: it is made anew
        pass
    made = profile_layers(
        plan.model,
        corpus,
        **options.arguments(),
        isolate_documents=plan.isolate_documents,
        keep_layer=layer,
        progress=progress,
    )
    assert made.cosine_by_place is not None
    cosine_n = np.full(plan.corpus.tokens_bp.numel(), np.nan, dtype=np.float32)
    cosine_n[: len(made.cosine_by_place)] = made.cosine_by_place
    profile = json.dumps(made.to_dict())
    save_tensors({"cosine_n": torch.from_numpy(cosine_n)}, folder / PROFILE, {"facts": facts, "profile": profile})
    return json.loads(profile), cosine_n


def activations_of(plan: Plan, rows: Sequence[ProbeRows]) -> Iterator[npt.NDArray[np.float32]]:
    """Each latent's activations `[n, d]`; of so many latents from one forward as are held at once."""
    most = max(1, _HELD_BYTES // (4 * plan.sae.cfg.d_in))
    first = 0
    while first < len(rows):
        end, n = first, 0
        while end < len(rows) and (end == first or n + len(rows[end].place_n) <= most):
            n, end = n + len(rows[end].place_n), end + 1
        acts_md = activations_at(
            plan.model,
            plan.hook_name,
            plan.corpus,
            np.concatenate([row.place_n for row in rows[first:end]]),
            plan.batch_blocks,
            isolate_documents=plan.isolate_documents,
        )
        yield from np.split(acts_md, np.cumsum([len(row.place_n) for row in rows[first:end]])[:-1])
        first = end


def promoted(reading: Reading, indices: Sequence[int], n: int) -> dict[int, tuple[str, ...]]:
    """The tokens whose logits each latent raises most; none where there is no way from the hook to the logits."""
    plan = reading.plan
    unembedding = Unembedding.of(plan.model, plan.sae, plan.hook_name) if n and indices else None
    if unembedding is None:
        return {}
    pieces = pieces_of(reading.tokenizer, vocab_size(plan.model) or len(reading.tokenizer))
    n = min(n, unembedding.weight_vd.shape[0])
    with torch.no_grad():
        top_fn = unembedding.logits(plan.sae.W_dec[torch.tensor(indices)]).topk(n, dim=1).indices
    return {index: tuple(pieces[t] for t in row) for index, row in zip(indices, top_fn.tolist(), strict=True)}


def contrast_scores(folder: Path, hook_name: str) -> dict[int, float]:
    """Cohen's d of all latents of an SAE, from the output of an `interp contrast`.

    Raises:
        ConfigError: that has no latents of this hook.
    """
    file, name = folder / EFFECTS, f"d/latents/{hook_name}"
    try:
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                return dict(enumerate(opened.get_tensor(name).tolist()))
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"{file} cannot be read: {e}") from e
    raise ConfigError(f"{folder} is no contrast of latents at {hook_name}: give `interp contrast` this SAE.")
