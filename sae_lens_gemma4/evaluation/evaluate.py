"""SAEs on a model and its text: the measurement, with everything needed to know what was measured.

An SAE is measured in the form in which it is saved and used. A training SAE of the batch top-k family encodes
by batch top-k and is saved as a JumpReLU; stock evaluates the former during training (`LLMSaeEvaluator`), which
on one tiny SAE read .451 where the saved one has .436. Pass such an SAE through `training.restore.inference_form`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_gemma4.activations.corpus import Corpus, CorpusLike, build_corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.activations.vocabulary import check_tokenizer, check_tokens
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.downstream import measure_downstream
from sae_lens_gemma4.evaluation.identity import model_fingerprint, sae_hash
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.evaluation.measuring import Measuring, check_sae
from sae_lens_gemma4.evaluation.reading import flat_heads, reconstruct
from sae_lens_gemma4.evaluation.result import SAEEvaluation
from sae_lens_gemma4.evaluation.robust import VerdictRules
from sae_lens_gemma4.evaluation.structure import drift
from sae_lens_gemma4.models.interface import HookedModel, model_name, vocab_size

_CONTEXT = 1024
_PREDICTED_TOKENS = 1024
"""Tokens a forward pass while predictions are measured: with six variants of each, and logits of all of them."""


def evaluate_sae(
    sae: SAE[Any],
    model: HookedModel,
    corpus: CorpusLike,
    *,
    hook_name: str | None = None,
    context_size: int | None = None,
    split: str = "train",
    batch_blocks: int = 16,
    isolate_documents: bool = False,
    downstream_tokens: int | None = 0,
    reference: SAE[Any] | None = None,
    rules: VerdictRules = VerdictRules(),
    sampling: Sampling = Sampling(),
    protocol: str | None = None,
    source: dict[str, Any] | None = None,
    progress: bool = True,
) -> SAEEvaluation:
    """Measure how well an SAE reconstructs a model's activations.

    Args:
        sae: any SAE of sae_lens in its inference form.
        model: any model that sae_lens can hook, with a tokenizer unless `corpus` is a `Corpus`.
        corpus: whatever `build_corpus` takes.
        hook_name: where the SAE reads; its metadata's by default.
        context_size: for a corpus that is not packed yet; by default the SAEs' longest training context.
        split: for a corpus that is a dataset's name. The embedded text has `train` and `heldout`.
        batch_blocks: blocks a forward pass.
        isolate_documents: as `harvest` takes it.
        downstream_tokens: on how many tokens to measure what the SAE does to the model's predictions; None for all.
        reference: an SAE of the same shape, to say how far this one has moved from it.
        rules: the verdict's thresholds.
        sampling: of the intervals.
        protocol: the name of the protocol that this is part of, for the record.
        source: where the SAE came from (`release` and `sae_id`, or `path`), for the record.

    Raises:
        SAEError: a training SAE, a transcoder, no hook to read, or activations of another width.
        UnknownNameError: the model has no such hook.
        DataError: the corpus cannot be read or is another tokenizer's, or activations are not finite.
    """
    [result] = evaluate_saes(
        {"sae": sae},
        model,
        corpus,
        hook_names={"sae": hook_name} if hook_name else {},
        context_size=context_size,
        split=split,
        batch_blocks=batch_blocks,
        isolate_documents=isolate_documents,
        downstream_tokens=downstream_tokens,
        references={"sae": reference} if reference is not None else {},
        rules=rules,
        sampling=sampling,
        protocol=protocol,
        sources={"sae": source} if source else {},
        progress=progress,
    ).values()
    return result


@torch.no_grad()
def evaluate_saes(
    saes: Mapping[str, SAE[Any]],
    model: HookedModel,
    corpus: CorpusLike,
    *,
    hook_names: Mapping[str, str] = {},
    context_size: int | None = None,
    split: str = "train",
    batch_blocks: int = 16,
    isolate_documents: bool = False,
    downstream_tokens: int | None = 0,
    references: Mapping[str, SAE[Any]] = {},
    rules: VerdictRules = VerdictRules(),
    sampling: Sampling = Sampling(),
    protocol: str | None = None,
    sources: Mapping[str, dict[str, Any]] = {},
    progress: bool = True,
) -> dict[str, SAEEvaluation]:
    """Measure several SAEs, at one hook or at several, in one forward pass over the corpus.

    Arguments and errors as `evaluate_sae`; those in the plural give, by the SAE's name, what that one differs in.
    """
    if not saes:
        raise ConfigError("There is no SAE to evaluate.")
    contexts = [sae.cfg.metadata.context_size for sae in saes.values()]
    context = context_size or max(filter(None, contexts), default=_CONTEXT)
    corpus = build_corpus(corpus, model.tokenizer, context_size=context, split=split)
    check_tokenizer(corpus, model.tokenizer)
    if (n_vocab := vocab_size(model)) is not None:
        check_tokens(corpus, n_vocab)
    hooks = {name: check_sae(sae, hook_names.get(name)) for name, sae in saes.items()}
    runs = {name: Measuring(sae, hooks[name], corpus, rules, sampling) for name, sae in saes.items()}
    facts = {
        "name": model_name(model),
        "class": type(model).__name__,
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "fingerprint": model_fingerprint(model),
    }
    results = {}
    with ExitStack() as stack:
        for sae in saes.values():
            stack.enter_context(flat_heads(sae))
        _listen(list(runs.values()), model, corpus, batch_blocks, isolate_documents, progress)
        for name, run in runs.items():
            metrics, reference = run.metrics(), references.get(name)
            predictions = None
            if downstream_tokens is None or downstream_tokens > 0:
                predictions = measure_downstream(
                    model,
                    corpus,
                    run.hook_name,
                    partial(reconstruct, run.sae),
                    run.accumulator.snapshot().mean_d,
                    head=run.head,
                    max_tokens=downstream_tokens,
                    batch_blocks=max(1, _PREDICTED_TOKENS // corpus.context_size),
                    isolate_documents=isolate_documents,
                    progress=progress,
                )
            results[name] = SAEEvaluation(
                sae=_sae_facts(run, sources.get(name, {})),
                model=facts,
                corpus={**corpus.facts(), "isolate_documents": isolate_documents},
                protocol=protocol,
                metrics=metrics,
                sampling=sampling,
                downstream=predictions.to_dict(sampling) if predictions else None,
                downstream_replicates=predictions.replicates(sampling) if predictions else {},
                drift=None if reference is None else drift(run.sae, reference, sae_hash(reference)),
                rules=rules,
                fired_f=run.accumulator.snapshot().fired_f,
                **run.details(metrics, model.tokenizer),
            )
    return results


def _listen(
    runs: list[Measuring],
    model: HookedModel,
    corpus: Corpus,
    batch_blocks: int,
    isolate_documents: bool,
    progress: bool,
) -> None:
    """Show the corpus to all, and once more to those that need a second pass."""
    second = False
    while runs:
        hooks = list(dict.fromkeys(run.hook_name for run in runs))
        with tqdm(
            total=corpus.n_tokens,
            desc=f"Evaluating on {corpus.name}" + ", norms again" * second,
            unit="tok",
            leave=False,
            disable=not progress,
        ) as bar:
            for batch in harvest(model, corpus, hooks, batch_blocks=batch_blocks, isolate_documents=isolate_documents):
                for run in runs:
                    if second:
                        run.accumulator.second_pass(run.rows(batch))
                    else:
                        run.update(batch)
                bar.update(len(batch.tokens_t))
        runs, second = [run for run in runs if run.accumulator.needs_second_pass()], True


def _sae_facts(run: Measuring, source: Mapping[str, Any]) -> dict[str, Any]:
    cfg = run.sae.cfg
    return {
        "release": None,
        "sae_id": None,
        "path": None,
        **source,
        "architecture": cfg.architecture(),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "hook_name": run.hook_name,
        "trained_on": cfg.metadata.model_name,
        "hash": sae_hash(run.sae),
    }
