"""What all studies have in common: a recipe, a plan that needs no weights, and a folder with a result and a page.

A model of 31 billion parameters is not loaded to find a typing error. So a study's `plan` looks only at what can be
known beforehand (the catalogue's facts, files, keys of judges, what they will cost at most), and its `run` loads.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from sae_lens_gemma4 import embedded
from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.activations.documents import is_on_hub
from sae_lens_gemma4.activations.vocabulary import check_tokenizer, check_tokens
from sae_lens_gemma4.catalogue.registry import SAEEntry, releases
from sae_lens_gemma4.embedded.text import load_embedded
from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError, nearest
from sae_lens_gemma4.evaluation.identity import model_fingerprint
from sae_lens_gemma4.evaluation.result import write_json, write_page, write_text
from sae_lens_gemma4.interp.items import Item, ItemSource, read_items
from sae_lens_gemma4.models.interface import HookedModel, model_name, vocab_size
from sae_lens_gemma4.models.loading import PUBLIC_MODELS
from sae_lens_gemma4.neuronpedia.job import Place, Text
from sae_lens_gemma4.training.config import Model
from sae_lens_gemma4.training.saving import only_one

RESULT, PAGE, RECIPE = "result.json", "report.html", "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class Study(ABC):
    """A recipe of `interp`.

    Attributes:
        output: a folder: the result and its page go into it, and what a stopped run goes on from.
    """

    output: str

    @abstractmethod
    def plan(self) -> list[str]:
        """What a run would do, in sentences; nothing is loaded or written.

        Raises:
            Gemma4SAEError: what can be known to fail.
        """

    @abstractmethod
    def study(self, folder: Path, *, progress: bool) -> dict[str, Any]:
        """Do it: the result, as `report.html.render` reads it."""

    def run(self, *, progress: bool = True) -> dict[str, Any]:
        """Do it and write result, page and recipe into `output`; called again, a stopped run goes on.

        Raises:
            ConfigError: the folder cannot be written, or another process is at work in it.
            Gemma4SAEError: as the parts of the study do.
        """
        if not self.output.strip():
            raise ConfigError("`output` is empty: name a folder.")
        self.plan()
        folder = Path(self.output)
        begun = folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"Output {folder} cannot be made: {e.strerror}.") from e
        try:
            with only_one(folder):
                document = self.study(folder, progress=progress)
                write_json(document, folder / RESULT)
                write_page(document, folder / PAGE)
                write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True), folder / RECIPE)
        finally:
            if not begun:
                with suppress(OSError):  # it holds something, which is what a later run goes on from
                    folder.rmdir()
        return document


def model_facts(model: HookedModel) -> dict[str, Any]:
    """What a result says of the model."""
    return {
        "name": model_name(model),
        "class": type(model).__name__,
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "fingerprint": model_fingerprint(model),
    }


def corpus_of(text: Text, model: HookedModel) -> Corpus:
    """The blocks that a recipe's text is, held against the model.

    Raises:
        DataError: it cannot be read, or is another tokenizer's.
    """
    tokens = text.prompts * text.context_size
    corpus = build_corpus(
        text.dataset, model.tokenizer, context_size=text.context_size, split=text.split, max_tokens=tokens
    )
    check_tokenizer(corpus, model.tokenizer)
    if (n_vocab := vocab_size(model)) is not None:
        check_tokens(corpus, n_vocab)
    return corpus


def plan_model(model: Model) -> str:
    """Which model, in a sentence.

    Raises:
        UnknownNameError: nothing on disk and no name of the hub, or nearly that of a public Gemma 4.
    """
    name = model.name
    if name in embedded.MODELS or Path(name).exists():
        return f"Model {name}, {model.class_name}, on {model.device}."
    known = [*embedded.MODELS, *PUBLIC_MODELS]
    of_google = name.startswith("google/gemma-4")
    if "/" not in name or (of_google and name not in known):
        raise UnknownNameError("model", name, known)
    return f"Model {name} of the hub, {model.class_name}, on {model.device}; it is not loaded for this."


def plan_sae(place: Place) -> tuple[str, SAEEntry | None]:
    """Which SAE, in a sentence, and the catalogue's facts where it is one of its.

    Raises:
        UnknownNameError: no such release or SAE of it.
        ConfigError: no such file.
    """
    if place.path is not None:
        if not Path(place.path).exists():
            raise ConfigError(f"There is no SAE at {place.path}.")
        return f"SAE {place.path}.", None
    release = releases().get(str(place.release))
    if release is None:
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        directory = get_pretrained_saes_directory()
        if place.release in directory:
            known = directory[place.release].saes_map
            if place.sae_id not in known:
                raise UnknownNameError(f"SAE id of {place.release}", place.sae_id, known)
            return f"SAE {place.sae_id} of {place.release}.", None
        names = directory if nearest(str(place.release), directory) else releases()
        raise UnknownNameError("SAE release", place.release, names)
    entry = release.sae(str(place.sae_id))
    width = "an unstated width" if entry.d_sae is None else f"{entry.d_sae:,} latents"
    return f"SAE {entry.id} of {release.name}: {width} at {entry.hook} of {release.model}.", entry


def check_latents(place: Place, latents: Sequence[int]) -> None:
    """Raise `ConfigError` for a latent that is named twice, or that the SAE is known not to have."""
    entry = plan_sae(place)[1] if latents else None
    width = None if entry is None else entry.d_sae
    for number, latent in enumerate(latents):
        if latent < 0 or (width is not None and latent >= width):
            has = "; they are counted from 0" if width is None else f"; {place.sae_id} has 0 to {width - 1:,}"
            raise ConfigError(f"There is no latent {latent}{has}.")
        if latent in latents[:number]:
            raise ConfigError(f"Latent {latent} is named twice.")


def plan_text(text: Text) -> str:
    """What is read, in a sentence.

    Raises:
        ConfigError: no block, or blocks of no token.
        DataError, UnknownNameError: there is no such file or embedded text.
    """
    if text.prompts < 1 or text.context_size < 2 or text.batch_blocks < 1:
        raise ConfigError(
            "text needs prompts and batch_blocks above 0 and a context_size of 2 or more, not "
            f"{text.prompts}, {text.batch_blocks} and {text.context_size}."
        )
    of = "" if is_on_hub(text.dataset) or text.dataset.startswith("embedded:") else "local "
    if text.dataset.startswith("embedded:"):
        load_embedded(text.dataset, text.split)
    elif of and not Path(text.dataset).exists():
        raise DataError(f"There is no file {text.dataset}.")
    return f"Text: {text.prompts:,} blocks of {text.context_size} tokens of {of}{text.dataset} [{text.split}]."


def plan_items(source: ItemSource) -> str:
    """Which items, in a sentence; a local file is read.

    Raises:
        DataError, UnknownNameError, ConfigError: as `read_items`.
    """
    n = "all" if source.n is None else f"{source.n:,}"
    if (items := local_items(source)) is not None:
        n = f"{len(items):,}"
    skipped = f" after the first {source.skip:,}" if source.skip else ""
    return f"Items: {n} of {source.dataset} [{source.split}]{skipped}."


def local_items(source: ItemSource) -> list[Item] | None:
    """The items of a file, without a chat template; None of a dataset on the hub. Errors as `read_items`."""
    if is_on_hub(source.dataset) and not source.dataset.endswith((".yaml", ".yml")):
        return None
    return read_items(replace(source, chat=False))


def items_facts(source: ItemSource, items: Sequence[Item]) -> dict[str, Any]:
    """What a result says of the items that it is of; the hash is of prompts, responses and groups."""
    texts = json.dumps([[item.prompt, item.response, item.group] for item in items]).encode()
    return {
        "n": len(items),
        "source": source.dataset,
        "split": source.split,
        "revision": source.revision,
        "hash": hashlib.sha256(texts).hexdigest()[:16],
    }


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.replace(file)
    except (OSError, SafetensorError) as e:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{file} cannot be written: {e}") from e
