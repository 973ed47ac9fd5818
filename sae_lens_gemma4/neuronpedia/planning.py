"""What dashboards will be of, and whether SAE, model and text fit each other, before the text is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE

from sae_lens_gemma4 import __version__
from sae_lens_gemma4.activations.corpus import Corpus, CorpusLike, build_corpus
from sae_lens_gemma4.activations.harvest import finite_rows
from sae_lens_gemma4.activations.vocabulary import check_tokenizer, check_tokens
from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.errors import CatalogueWarning, ConfigError, MismatchWarning, SAEError, warn_caller
from sae_lens_gemma4.evaluation.identity import model_fingerprint, sae_hash
from sae_lens_gemma4.evaluation.measuring import check_sae
from sae_lens_gemma4.interp.firings import Firings, blocks_done
from sae_lens_gemma4.interp.gathering import gather_firings, needs
from sae_lens_gemma4.interp.neighbours import MOST_ACTIVATIONS
from sae_lens_gemma4.interp.unembedding import Unembedding
from sae_lens_gemma4.models.hook_names import canonical_name, hf_name, layer_of
from sae_lens_gemma4.models.interface import HookedModel, model_name, require_hook, vocab_size
from sae_lens_gemma4.neuronpedia.folder import HEADER, SCHEMA
from sae_lens_gemma4.neuronpedia.names import SourceName, catalogue_name, model_id_of
from sae_lens_gemma4.neuronpedia.writing import DashboardSettings

N_PROMPTS, CONTEXT_SIZE = 24_576, 128
"""What Neuronpedia's own dashboards are made from."""


FIRINGS = "firings"
_SAMPLED, _WRITTEN = 64, 9
"""Bytes of a sampled activation in memory, and of a token of an example in a file, roughly."""
_UNIT = 0.01
"""How far from 1 a decoder row's length may be: bfloat16 is off by .004."""


class DecoderNormWarning(CatalogueWarning):
    """Activations that Neuronpedia's server will scale otherwise."""


class NoLogitsWarning(CatalogueWarning):
    """Dashboards without the tokens that latents promote."""


class ShortCorpusWarning(CatalogueWarning):
    """A text with fewer prompts than were asked for."""


class Cost(NamedTuple):
    """What dashboards take besides model, SAE and text, in bytes.

    Attributes:
        memory: at the peak.
        firings: on disk, until the dashboards are made.
        dashboards: on disk, at most.
        l0: active latents a token, as estimated.
    """

    memory: int
    firings: int
    dashboards: int
    l0: float


@dataclass(frozen=True)
class Plan:
    """Dashboards that can be made: an SAE, a model and a text that fit each other. Made by `plan_dashboards`.

    Attributes:
        document: what `run_settings.json` will hold.
    """

    sae: SAE[Any]
    model: HookedModel
    hook_name: str
    corpus: Corpus
    settings: DashboardSettings
    document: dict[str, Any]
    batch_blocks: int
    isolate_documents: bool

    @property
    def header(self) -> dict[str, Any]:
        return {name: self.document[name] for name in HEADER}

    def gather(self, folder: Path, *, progress: bool = True) -> Firings:
        """The pass over the text, whose activations go to `folder`'s `firings`; errors as `gather_firings`."""
        document = self.document
        facts = {
            "sae": document["sae"]["hash"],
            "model": document["model"]["fingerprint"],
            "corpus": document["corpus"]["hash"],
        }
        return gather_firings(
            self.sae,
            self.model,
            self.hook_name,
            self.corpus,
            folder / FIRINGS,
            facts,
            **self.reading,
            progress=progress,
        )

    def cost(self, folder: str | Path) -> Cost:
        """What is still to be done takes. Reads one batch of the text.

        Raises:
            ConfigError: the folder's disk has not so much room.
        """
        folder, s = Path(folder), self.settings
        done = blocks_done(folder / FIRINGS)
        found = needs(self.sae, self.model, self.hook_name, self.corpus, done_blocks=done, **self.reading)
        d_sae, width = self.sae.W_dec.shape
        sampled = min(int(found.l0 * min(s.cofiring_tokens, self.corpus.n_tokens)), MOST_ACTIVATIONS)
        writing = sampled * _SAMPLED + d_sae * width * 4 + 3 * 128 * (vocab_size(self.model) or 0) * 4
        cost = Cost(
            memory=max(found.memory, writing),
            firings=found.disk,
            dashboards=d_sae * s.most_contexts * self.corpus.context_size * _WRITTEN,
            l0=found.l0,
        )
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        wanted, free = cost.firings + cost.dashboards - _size(folder), shutil.disk_usage(there).free
        if free < wanted:
            raise ConfigError(
                f"Up to {wanted / 1e9:.2f} GB are needed for activations and dashboards, and {free / 1e9:.2f} GB are "
                f"free at {there}. Take another folder, fewer prompts, or fewer examples in a dashboard."
            )
        return cost

    def sentence(self, cost: Cost) -> str:
        """What is read, and what it takes."""
        return (
            f"{self.corpus.n_blocks:,} prompts, {self.corpus.n_tokens:,} tokens that count; L0 is about {cost.l0:.1f}. "
            f"Memory, besides model and SAE: about {cost.memory / 1e9:.2f} GB. Disk: up to {cost.dashboards / 1e9:.2f} "
            f"GB, and {cost.firings / 1e9:.2f} GB until they are made."
        )

    @property
    def reading(self) -> dict[str, Any]:
        """How the text is read, as arguments."""
        return {"batch_blocks": self.batch_blocks, "isolate_documents": self.isolate_documents}


def plan_dashboards(
    sae: SAE[Any],
    model: HookedModel,
    corpus: CorpusLike,
    *,
    hook_name: str | None = None,
    n_prompts: int = N_PROMPTS,
    context_size: int = CONTEXT_SIZE,
    split: str = "train",
    batch_blocks: int = 16,
    isolate_documents: bool = False,
    settings: DashboardSettings = DashboardSettings(),
    source: Mapping[str, Any] | None = None,
    model_id: str | None = None,
    set_name: str | None = None,
    suffix: str | None = None,
) -> Plan:
    """All that is known of the dashboards before the text is read.

    Args:
        sae, model, corpus: as of `build_dashboards`.
        hook_name: where the SAE reads; its metadata's by default.
        n_prompts, context_size: blocks, and tokens in each, of a text that is not a `Corpus` yet.
        split: for a corpus that is a dataset's name.
        batch_blocks: blocks a forward pass.
        isolate_documents: as `harvest` takes it.
        settings: what a dashboard shows.
        source: where the SAE came from (`release` and `sae_id`, or `path`); of the catalogue's it is known.
        model_id, set_name, suffix: what Neuronpedia calls it (`names.SourceName`), where not the catalogue's names.

    Raises:
        SAEError: a training SAE, a transcoder, no hook to read, or weights that are not finite.
        ConfigError: numbers that make no sense, or a name that Neuronpedia refuses.
        UnknownNameError: the model has no such hook.
        DataError: the corpus cannot be read or is another tokenizer's.
    """
    hook_name = check_sae(sae, hook_name)
    require_hook(model, hook_name)
    if batch_blocks < 1:
        raise ConfigError(f"batch_blocks must be at least 1, not {batch_blocks}.")
    _check_weights(sae)
    if Unembedding.of(model, sae, hook_name) is None:
        warn_caller(
            f"Dashboards at {hook_name} will have no logits: there is no way from it to the logits that is known here.",
            NoLogitsWarning,
        )
    corpus = _prompts(corpus, model, n_prompts, context_size, split)
    facts = _facts(sae, model, hook_name, corpus, source, isolate_documents)
    document = {
        **_header(facts, model_id, set_name, suffix),
        "schema": SCHEMA,
        "complete": False,
        **facts,
        "dashboard": asdict(settings),
        "version": __version__,
    }
    return Plan(sae, model, hook_name, corpus, settings, document, batch_blocks, isolate_documents)


def _size(folder: Path) -> int:
    """Bytes of dashboards that are there."""
    return sum(file.stat().st_size for file in folder.glob("batch-*.json"))


def _check_weights(sae: SAE[Any]) -> None:
    """What is not a number would fire nowhere, in silence. A threshold may be infinite: that latent is switched off.

    Neuronpedia's inference server folds decoder norms into activations (apps/inference/neuronpedia_inference/saes/
    saelens.py), so that what it computes for an SAE whose rows have other lengths is not what stands here.
    """
    for name, tensor in sae.state_dict().items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise SAEError(f"{name} of the SAE holds NaN.")
    finite_f = finite_rows(sae.W_dec)
    if not finite_f.all():
        raise SAEError(f"The decoder row of latent {int((~finite_f).nonzero()[0])} is not finite.")
    norm_f = sae.W_dec.detach().float().norm(dim=1)
    low, high = float(norm_f.min()), float(norm_f.max())
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", True) and max(abs(low - 1), abs(high - 1)) > _UNIT:
        warn_caller(
            f"Decoder rows have lengths from {low:.3g} to {high:.3g}. Neuronpedia's server multiplies activations by "
            "them when it loads an SAE, and these dashboards do not. sae.fold_W_dec_norm() beforehand makes them "
            "agree; in a recipe, sae.fold_decoder_norms: true.",
            DecoderNormWarning,
        )


def _prompts(source: CorpusLike, model: HookedModel, n_prompts: int, context_size: int, split: str) -> Corpus:
    """The text as blocks, held against the model; warns where there are fewer than asked for."""
    if n_prompts < 1:
        raise ConfigError(f"n_prompts must be at least 1, not {n_prompts}.")
    asked = n_prompts * context_size  # as no block has more tokens that count, so many blocks at least
    corpus = build_corpus(source, model.tokenizer, context_size=context_size, split=split, max_tokens=asked)
    check_tokenizer(corpus, model.tokenizer)
    if (n_vocab := vocab_size(model)) is not None:
        check_tokens(corpus, n_vocab)
    if isinstance(source, Corpus):
        return corpus
    if corpus.n_blocks < n_prompts:
        warn_caller(
            f"Corpus {corpus.name!r} has {corpus.n_blocks:,} prompts of {context_size} tokens, of {n_prompts:,} that "
            f"were asked for: latents that fire less than once in {corpus.n_tokens:,} tokens will seem dead.",
            ShortCorpusWarning,
        )
    return corpus.take(torch.arange(min(n_prompts, corpus.n_blocks)))


def _facts(
    sae: SAE[Any],
    model: HookedModel,
    hook_name: str,
    corpus: Corpus,
    source: Mapping[str, Any] | None,
    isolate_documents: bool,
) -> dict[str, Any]:
    """What the dashboards are of."""
    cfg = sae.cfg
    known = {name: getattr(cfg.metadata, name, None) for name in ("release", "sae_id")}
    name = model_name(model)
    return {
        "sae": {
            **known,
            **(source or {}),
            "d_in": cfg.d_in,
            "d_sae": cfg.d_sae,
            "architecture": cfg.architecture(),
            "hook_name": canonical_name(hook_name),
            "hf_hook_name": hf_name(hook_name),
            "trained_on": cfg.metadata.model_name,
            "hash": sae_hash(sae),
            "config": {k: v for k, v in json.loads(json.dumps(cfg.to_dict(), default=str)).items() if k != "device"},
        },
        "model": {
            "name": name,
            "class": type(model).__name__,
            "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
            "fingerprint": model_fingerprint(model),
            **_sizes(model),
        },
        "corpus": {**corpus.facts(), "isolate_documents": isolate_documents},
        "dataset": (corpus.origin.source if corpus.origin else None) or corpus.name,
        "n_prompts_total": corpus.n_blocks,
        "n_tokens_in_prompt": corpus.context_size,
        "n_tokens": corpus.n_tokens,
    }


def _sizes(model: Any) -> dict[str, int | None]:
    """Layers, width and neurons a layer, by transformers' config or TransformerLens's."""
    config = getattr(getattr(model, "original_model", None) or getattr(model, "model", None), "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        text, names = config.get_text_config(), ("num_hidden_layers", "hidden_size", "intermediate_size")
    else:
        text, names = model.cfg, ("n_layers", "d_model", "d_mlp")
    sizes = [getattr(text, name, None) for name in names]
    return dict(zip(("n_layers", "d_model", "d_mlp"), sizes, strict=True))


def _header(facts: Mapping[str, Any], model_id: str | None, set_name: str | None, suffix: str | None) -> dict[str, Any]:
    """The SAE's names: those given, else the catalogue's. A set without one is "", and the export asks for it."""
    sae, model = facts["sae"], facts["model"]
    layer = layer_of(sae["hook_name"])
    n_layers = model["n_layers"] or 1
    release = releases().get(str(sae["release"]))
    if release is not None and sae["sae_id"] in release.sae_ids:
        name = catalogue_name(release, release.sae(sae["sae_id"]), sae["d_sae"], n_layers)
        set_name, suffix = set_name or name.set_name, suffix if suffix or set_name else name.suffix
        if model["name"] and model_id is None and model_id_of(model["name"]) != name.model_id:
            warn_caller(
                f"{sae['sae_id']} of {sae['release']} was trained on {release.model} and is read on {model['name']}: "
                f"these are dashboards of another model, {model_id_of(model['name'])}, than Neuronpedia's {name}.",
                MismatchWarning,
            )
    if model_id is None:
        model_id = model_id_of(model["name"] or sae["trained_on"] or "")
    if layer is None:
        layer = 0 if sae["hook_name"] in ("hook_embed", "hook_ple_inputs") else n_layers - 1
    if model_id and set_name:
        SourceName(model_id, layer, set_name, suffix)
    return {"model_id": model_id, "layer": layer, "sae_set": set_name or "", "sae_id_suffix": suffix}
