"""Everything that can be known before the first step: model, SAEs, text, and what the run will cost.

A run of hours that dies of a typing error in its last phase, or of held-out text that was trained on, is the most
expensive way to learn of it. So all of a recipe is loaded, checked and planned here, and a dry run is this and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.caching import cached_corpus
from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.disjoint import disjoint
from sae_lens_gemma4.activations.harvest import finite_rows, harvest
from sae_lens_gemma4.activations.shards import CorpusStream
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.errors import ConfigError, DataError, SAEError
from sae_lens_gemma4.evaluation.evaluate import evaluate_saes
from sae_lens_gemma4.evaluation.identity import model_fingerprint, sae_hash
from sae_lens_gemma4.evaluation.result import SAEEvaluation
from sae_lens_gemma4.kernels.dispatch import kernels_for
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.models.hook_names import layer_of
from sae_lens_gemma4.models.interface import HookedModel, require_hook
from sae_lens_gemma4.training.config import ContinueTrainingConfig, Data, SAERun
from sae_lens_gemma4.training.forms import new_training_sae
from sae_lens_gemma4.training.restore import load_sae, training_form
from sae_lens_gemma4.training.trainee import PlannedPhase, Trainee


@dataclass
class PreparedSAE:
    """One SAE of a run: what it is, what it starts from (None if it is new), and where it reads."""

    run: SAERun
    base: SAE[Any] | None
    hook_name: str
    trainee: Trainee


@dataclass
class Prepared:
    """A run before its first step."""

    cfg: ContinueTrainingConfig
    model: HookedModel
    text: Corpus | ApartStream
    train: list[Corpus]  # the sources of `text`, if it is held whole
    heldout: dict[str, Corpus]
    given_model: bool  # in memory, and not the one that the recipe names
    ranks: Ranks = ALONE
    saes: list[PreparedSAE] = field(default_factory=list)

    @property
    def hook_names(self) -> list[str]:
        return list(dict.fromkeys(sae.hook_name for sae in self.saes))

    def evaluate(
        self, saes: Mapping[str, SAE[Any]], hook_names: Mapping[str, str], *, tokens: int | None = None, **settings: Any
    ) -> dict[str, dict[str, SAEEvaluation]]:
        """These SAEs on every held-out corpus, one forward pass a corpus; by corpus, then by SAE.

        Args:
            tokens: of each corpus, its first blocks with so many; None for all.
            settings: of `evaluate_saes`.
        """
        return {
            name: evaluate_saes(
                saes,
                self.model,
                _beginning(corpus, tokens),
                hook_names=hook_names,
                batch_blocks=self.cfg.activations.batch_blocks,
                isolate_documents=self.cfg.data.isolate_documents,
                **settings,
            )
            for name, corpus in self.heldout.items()
        }

    def facts(self) -> dict[str, Any]:
        """What must be the same for a run that is stopped and goes on."""
        recipe = self.cfg.to_dict()
        weightless = ("output", "monitoring", "gate")
        best = {key: recipe["monitoring"][key] for key in ("evaluate_every", "evaluate_tokens")}  # decide which is best
        return {
            "recipe": {key: value for key, value in recipe.items() if key not in weightless} | {"monitoring": best},
            "bases": {sae.run.name: None if sae.base is None else sae_hash(sae.base) for sae in self.saes},
            "model": model_fingerprint(self.model),
            "text": self.text.hash if isinstance(self.text, Corpus) else None,
            "heldout": {name: corpus.hash for name, corpus in self.heldout.items()},
        }


def prepare(
    cfg: ContinueTrainingConfig,
    model: HookedModel | None = None,
    corpora: Mapping[str, Corpus] | None = None,
    ranks: Ranks = ALONE,
) -> Prepared:
    """Load and check all that `cfg` names; `model` and `corpora` as `ContinueTrainingRunner` takes them.

    Args:
        ranks: who does the same, to train together.

    Raises:
        UnknownNameError: a release, SAE id, model class, architecture, setting, hook or kernels that do not exist.
        ModelError, SAEError, DataError, ConfigError: what cannot be loaded, restored, read or used.
    """
    runs, given = cfg.runs(), model is not None
    kernels_for(torch.device(cfg.model.device))  # raises now, and not at the first step, for a switch that names none
    bases = [_base(run, run.sae.device or cfg.model.device) for run in runs]
    forms = [None if base is None else _restored(base, run) for base, run in zip(bases, runs, strict=True)]
    if model is None:
        model = cfg.model.load()
    hooks = [require_hook(model, _hook(run, base)) for run, base in zip(runs, bases, strict=True)]
    with ranks.leader_first() if cfg.data.cache is not None else nullcontext():
        texts = _texts(cfg, model.tokenizer, corpora or {})
    prepared = Prepared(cfg, model, *texts, given, ranks)
    widths = _widths(prepared, list(dict.fromkeys(hooks)))
    for run, base, form, hook in zip(runs, bases, forms, hooks, strict=True):
        sae = form if form is not None else _new(run, widths[hook], cfg, hook)
        if run.layer is not None and layer_of(hook) not in (run.layer, None):
            raise ConfigError(
                f"SAE {run.name!r} is for layer {run.layer} and reads {hook}: put {{layer}} in the place of the number "
                "in sae.hook_name or in the warm start."
            )
        if sae.cfg.d_in != widths[hook]:
            raise SAEError(f"{hook} is {widths[hook]} wide; SAE {run.name!r} reads {sae.cfg.d_in}.")
        if run.gate is not None and run.gate.l0_within is not None and not hasattr(sae.cfg, "k"):
            raise ConfigError(f"gate.l0_within is about k, and a {sae.cfg.architecture()} SAE ({run.name!r}) has none.")
        plan = _phases(run, prepared, cfg.activations.batch_size)
        trainee = Trainee(run.name, sae, run.training, plan, cfg.activations.batch_size, cfg.seed, ranks)
        prepared.saes.append(PreparedSAE(run, base, hook, trainee))
    return prepared


def _base(run: SAERun, device: str) -> SAE[Any] | None:
    start = run.warm_start
    return None if start is None else load_sae(start.path or str(start.release), start.sae_id, device=device)


def _restored(base: SAE[Any], run: SAERun) -> TrainingSAE[Any]:
    assert run.warm_start is not None
    return training_form(
        base,
        architecture=run.sae.architecture,
        dtype=run.sae.dtype,
        k_aux=run.sae.k_aux,
        absorb_thresholds=run.warm_start.absorb_thresholds,
        **run.sae.settings,
    )


def _new(run: SAERun, d_in: int, cfg: ContinueTrainingConfig, hook_name: str) -> TrainingSAE[Any]:
    assert run.sae.architecture is not None
    assert run.sae.d_sae is not None
    sae = new_training_sae(
        run.sae.architecture,
        d_in,
        run.sae.d_sae,
        k_aux=run.sae.k_aux,
        settings=run.sae.settings,
        seed=cfg.seed,
        dtype=run.sae.dtype or "float32",
        device=run.sae.device or cfg.model.device,
    )
    sae.cfg.metadata.hook_name = hook_name
    return sae


def _hook(run: SAERun, base: SAE[Any] | None) -> str:
    hook_name = run.sae.hook_name or (base.cfg.metadata.hook_name if base is not None else None)
    if hook_name is None:
        raise SAEError(f"The base SAE of {run.name!r} names no hook; set sae.hook_name.")
    return hook_name


def build_sources(data: Data, sources: list[Source], tokenizer: PreTrainedTokenizerBase) -> dict[str, Corpus]:
    """The corpora of `sources` by name, as `data` says; `ConfigError` where two have the same."""
    corpora: dict[str, Corpus] = {}
    for source in sources:
        made: dict[str, Any] = {
            "context_size": data.context_size,
            "exclude_special_tokens": data.exclude_special_tokens,
            "bos": data.bos,
            "packed": data.packed,
        }
        if data.cache is None:
            corpus = source.to_corpus(tokenizer, **made)
        else:
            corpus = cached_corpus(source, data.cache, tokenizer, **made)
        if corpus.name in corpora:
            raise ConfigError(f"Two sources are named {corpus.name!r}; give each a `name`.")
        corpora[corpus.name] = corpus
    return corpora


def _texts(
    cfg: ContinueTrainingConfig, tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Corpus]
) -> tuple[Corpus | ApartStream, list[Corpus], dict[str, Corpus]]:
    data = cfg.data
    heldout = {name: corpus for name, corpus in given.items() if name != "train"}
    heldout = heldout or build_sources(data, data.heldout, tokenizer)
    if "train" not in given and data.shard_blocks is not None:
        stream = CorpusStream(
            data.train,
            tokenizer,
            context_size=data.context_size,
            shard_blocks=data.shard_blocks,
            exclude_special_tokens=data.exclude_special_tokens,
            bos=data.bos,
            packed=data.packed,
        )
        text = ApartStream(stream, list(heldout.values()))
        next(text.shards(None))  # whatever is wrong with the first part of it is better known now
        return text, [], heldout
    train = [given["train"]] if "train" in given else list(build_sources(data, data.train, tokenizer).values())
    for corpus in heldout.values():
        disjoint(train, corpus)
    return Corpus.concat(train), train, heldout


@dataclass(frozen=True)
class ApartStream:
    """A streamed text, each shard of which is held against the held-out text before it is trained on."""

    stream: CorpusStream
    heldout: list[Corpus]

    def shards(self, start: dict[str, Any] | None) -> Iterator[tuple[Corpus, dict[str, Any]]]:
        for shard, following in self.stream.shards(start):
            for corpus in self.heldout:
                disjoint([shard], corpus)
            yield shard, following


def _beginning(corpus: Corpus, tokens: int | None) -> Corpus:
    if tokens is None or tokens >= corpus.n_tokens:
        return corpus
    counted_b = corpus.keep_bp.sum(dim=1).cumsum(0)
    return corpus.take(torch.arange(int((counted_b < tokens).sum()) + 1))


def _widths(prepared: Prepared, hook_names: list[str]) -> dict[str, int]:
    """How wide each hook is, found by reading all held-out text there: what cannot be measured is better known now."""
    widths: dict[str, int] = {}
    for corpus in prepared.heldout.values():
        for batch in harvest(
            prepared.model,
            corpus,
            hook_names,
            batch_blocks=prepared.cfg.activations.batch_blocks,
            isolate_documents=prepared.cfg.data.isolate_documents,
        ):
            widths |= {name: acts.flatten(1).shape[1] for name, acts in batch.acts.items()}
    return widths


def _phases(run: SAERun, prepared: Prepared, batch_size: int) -> list[PlannedPhase]:
    tokens = prepared.text.n_tokens if isinstance(prepared.text, Corpus) else None
    plan = []
    for phase in run.training.phases:
        if phase.resampling is not None and phase.resampling.every_steps is None and tokens is None:
            raise ConfigError(f"Resampling of phase {phase.name!r} needs every_steps: a streamed text has no epochs.")
        epoch = None if tokens is None else max(1.0, tokens / batch_size)
        plan.append(PlannedPhase(phase, phase.steps(batch_size, tokens), epoch))
    return plan


def sample(
    prepared: Prepared, saes: list[PreparedSAE], n_tokens: int, bytes_at_once: int = 4 * 2**30
) -> Iterator[dict[str, torch.Tensor]]:
    """`[n_tokens, d]` of each of these SAEs' hooks, from the training text in a shuffled order of blocks.

    Hooks whose samples do not fit `bytes_at_once` together are harvested one group after the other.
    """
    cfg = prepared.cfg
    text = prepared.text if isinstance(prepared.text, Corpus) else next(prepared.text.shards(None))[0]
    widths = {sae.hook_name: sae.trainee.sae.cfg.d_in for sae in saes}
    group: list[str] = []
    groups = [group]
    for name in widths:
        if group and sum(widths[n] for n in [*group, name]) * n_tokens * 4 > bytes_at_once:
            groups.append(group := [])
        group.append(name)
    for names in groups:
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        order = torch.Generator().manual_seed(cfg.seed)
        count = 0
        for batch in harvest(
            prepared.model,
            text,
            names,
            batch_blocks=cfg.activations.batch_blocks,
            shuffle=order,
            isolate_documents=cfg.data.isolate_documents,
            require_finite=False,
        ):
            acts = {name: batch.acts[name].flatten(1).float() for name in names}
            finite_t = torch.stack([finite_rows(x_td) for x_td in acts.values()]).all(dim=0)
            for name in names:
                parts[name].append(acts[name][finite_t])
            count += int(finite_t.sum())
            if count >= n_tokens:
                break
        if count == 0:
            raise DataError("There is no activation to calibrate with.")
        yield {name: torch.cat(rows)[:n_tokens] for name, rows in parts.items()}
