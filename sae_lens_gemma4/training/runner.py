"""The main job: take a published SAE, measure it on a model, train it on, measure again, save.

The step is stock's (`SAETrainer`, sae_lens/training/sae_trainer.py), driven through its public seams; what is
new is what goes in and what comes out. In: an SAE restored to its true training class, and activations of packed,
masked blocks from a seeded stream. Out: held-out figures of the saved form before and after, a history without
wandb, and a folder in sae_lens's form that is complete or absent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.sae_trainer import SAETrainer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.errors import ConfigError, DataError, SAEError
from sae_lens_gemma4.evaluation.compare import Comparison
from sae_lens_gemma4.evaluation.evaluate import evaluate_sae
from sae_lens_gemma4.evaluation.result import SAEEvaluation
from sae_lens_gemma4.models.hook_names import hf_name
from sae_lens_gemma4.models.interface import HookedModel, model_name, require_hook
from sae_lens_gemma4.models.loading import MODEL_CLASSES, load_for_sae_lens
from sae_lens_gemma4.training.config import ContinueTrainingConfig, Data
from sae_lens_gemma4.training.restore import inference_form, load_sae, training_form
from sae_lens_gemma4.training.saving import check_place, save_sae


@dataclass(frozen=True)
class ContinueTrainingResult:
    """What a run produced.

    Attributes:
        path: folder of the saved SAE.
        sae: the saved SAE, in its inference form.
        before, after: held-out evaluations of the base SAE and of the adapted one, by corpus name.
        history: rows of tokens, loss (squared error a token, without auxiliary and inner losses), l0, threshold, ve
            and dead, every `log_every` steps. These are of the training stream and of the training form; only
            `before` and `after` are held out.
        seconds: time spent in training steps and the forward passes that fed them.
    """

    path: Path
    sae: SAE[Any]
    before: dict[str, SAEEvaluation]
    after: dict[str, SAEEvaluation]
    history: list[dict[str, float | None]]
    tokens: int
    seconds: float

    def comparisons(self) -> list[Comparison]:
        """Before and after on each held-out corpus, with paired differences."""
        return [Comparison(name, self.before[name], after) for name, after in self.after.items()]


def build_sources(data: Data, sources: list[Source], tokenizer: PreTrainedTokenizerBase) -> dict[str, Corpus]:
    """The corpora of `sources` by name; `ConfigError` where two have the same."""
    corpora: dict[str, Corpus] = {}
    for source in sources:
        corpus = source.to_corpus(
            tokenizer, context_size=data.context_size, exclude_special_tokens=data.exclude_special_tokens
        )
        if corpus.name in corpora:
            raise ConfigError(f"Two sources are named {corpus.name!r}; give each a `name`.")
        corpora[corpus.name] = corpus
    return corpora


@dataclass
class ContinueTrainingRunner:
    """Runs a `ContinueTrainingConfig`.

    Args:
        cfg: the run.
        model: a model in memory, instead of the one that `cfg.model` names.
        corpora: corpora by name instead of `cfg.data`'s: "train", and one for each held-out source. With either, the
            recipe would not repeat the run, and is not saved with it.
        progress: progress bars.

    Raises (all before the first step):
        UnknownNameError: a release, SAE id, model class or hook that does not exist.
        ModelError, SAEError, DataError, ConfigError: what cannot be loaded, restored, read or used.
    """

    cfg: ContinueTrainingConfig
    model: HookedModel | None = None
    corpora: dict[str, Corpus] = field(default_factory=dict)
    progress: bool = True

    def run(self) -> ContinueTrainingResult:
        cfg = self.cfg
        start = cfg.warm_start
        source = {"release": start.release, "sae_id": start.sae_id, "path": start.path}
        check_place(cfg.output, keep=start.path)
        recipe = cfg.to_yaml() if self.model is None and not self.corpora else None
        base = load_sae(start.path or str(start.release), start.sae_id, device=cfg.model.device)
        sae = training_form(base, architecture=start.architecture, **start.settings)
        hook_name = cfg.model.hook_name or base.cfg.metadata.hook_name
        if hook_name is None:
            raise SAEError("The base SAE names no hook; set model.hook_name.")
        kwargs = cfg.model.kwargs | ({"dtype": cfg.model.dtype} if cfg.model.dtype else {})
        model = self.model or load_for_sae_lens(cfg.model.class_name, cfg.model.name, cfg.model.device, kwargs)
        hook_name = require_hook(model, hook_name)
        train, heldout = self._corpora(model)
        before = self._evaluate(base, model, heldout, hook_name, source)

        trainer = self._trainer(sae)
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(cfg.seed)  # stock's mixing buffer draws from it
            history = self._train(trainer, self._stream(model, train, hook_name))
        seconds = time.perf_counter() - started

        self._set_metadata(sae, model, train, hook_name)
        sae.cfg.metadata.continued_from = source | {"model_name": base.cfg.metadata.model_name}
        sae.cfg.metadata.continued_tokens = trainer.n_training_samples
        path = save_sae(sae, cfg.output, log10_sparsity_f=trainer.log_feature_sparsity, recipe=recipe)
        saved = inference_form(sae)
        after = self._evaluate(saved, model, heldout, hook_name, {"path": cfg.output}, reference=base)
        return ContinueTrainingResult(path, saved, before, after, history, trainer.n_training_samples, seconds)

    def _corpora(self, model: HookedModel) -> tuple[Corpus, dict[str, Corpus]]:
        data = self.cfg.data
        train = self.corpora.get("train") or Corpus.concat(
            list(build_sources(data, data.train, model.tokenizer).values())
        )
        heldout = {n: c for n, c in self.corpora.items() if n != "train"}
        heldout = heldout or build_sources(data, data.heldout, model.tokenizer)
        seen = {row.tobytes() for row in train.tokens_bp.numpy()}
        for name, corpus in heldout.items():
            overlap = sum(row.tobytes() in seen for row in corpus.tokens_bp.numpy())
            if overlap:
                raise DataError(f"{overlap} blocks of held-out corpus {name!r} are in the training text.")
        return train, heldout

    def _evaluate(
        self,
        sae: SAE[Any],
        model: HookedModel,
        heldout: dict[str, Corpus],
        hook_name: str,
        source: dict[str, Any],
        reference: SAE[Any] | None = None,
    ) -> dict[str, SAEEvaluation]:
        settings: dict[str, Any] = {
            "hook_name": hook_name,
            "batch_blocks": self.cfg.training.batch_blocks,
            "isolate_documents": self.cfg.data.isolate_documents,
            "source": source,
            "reference": reference,
            "progress": self.progress,
        }
        return {name: evaluate_sae(sae, model, corpus, **settings) for name, corpus in heldout.items()}

    def _trainer(self, sae: TrainingSAE[Any]) -> SAETrainer[Any, Any]:
        t = self.cfg.training
        return SAETrainer(
            cfg=SAETrainerConfig(
                n_checkpoints=0,
                checkpoint_path=None,
                save_final_checkpoint=False,
                total_training_samples=t.steps * t.batch_size,
                device=self.cfg.model.device,
                autocast=False,
                lr=t.lr,
                lr_end=t.lr / 10 if t.lr_end is None else t.lr_end,
                lr_scheduler_name="cosineannealing",
                lr_warm_up_steps=t.warm_up_steps,
                adam_beta1=0.9,
                adam_beta2=0.999,
                lr_decay_steps=0,
                n_restart_cycles=1,
                train_batch_size_samples=t.batch_size,
                dead_feature_window=t.dead_after_steps,
                feature_sampling_window=t.steps + 1,  # one window: sparsity of the whole run
                logger=LoggingConfig(log_to_wandb=False),
            ),
            sae=sae,
            data_provider=iter(()),  # batches are handed to `step`
        )

    def _stream(self, model: HookedModel, train: Corpus, hook_name: str) -> Iterator[torch.Tensor]:
        """Batches `[batch_size, d_in]` without end; blocks reordered each epoch, tokens mixed by stock's buffer."""
        t = self.cfg.training
        order = torch.Generator().manual_seed(self.cfg.seed)

        def activations() -> Iterator[torch.Tensor]:
            while True:
                for batch in harvest(
                    model,
                    train,
                    [hook_name],
                    batch_blocks=t.batch_blocks,
                    shuffle=order,
                    isolate_documents=self.cfg.data.isolate_documents,
                ):
                    yield batch.acts[hook_name].to(self.cfg.model.device, torch.float32)

        buffer = max(t.buffer_blocks * train.context_size, 2 * t.batch_size)
        return mixing_buffer(buffer, t.batch_size, activations())

    def _train(self, trainer: SAETrainer[Any, Any], stream: Iterator[torch.Tensor]) -> list[dict[str, float | None]]:
        t = self.cfg.training
        history: list[dict[str, float | None]] = []
        with tqdm(total=t.steps * t.batch_size, desc="Training", unit="tok", disable=not self.progress) as bar:
            for step in range(t.steps):
                output = trainer.step(next(stream))
                trainer.n_training_steps += 1
                if not math.isfinite(loss := output.loss.item()):
                    raise DataError(f"The loss is {loss} at step {step}; nothing was saved.")
                if step % t.log_every == 0 or step == t.steps - 1:
                    history.append(_history_row(trainer, output))
                    bar.set_postfix(loss=f"{loss:.4g}")
                bar.update(t.batch_size)
        trainer.set_final_sae_metadata()
        return history

    def _set_metadata(self, sae: TrainingSAE[Any], model: HookedModel, train: Corpus, hook_name: str) -> None:
        """What was trained on what, as it ran, which need not be what the recipe says."""
        metadata = sae.cfg.metadata
        metadata.model_name = model_name(model) or self.cfg.model.name
        metadata.model_class_name = self.cfg.model.class_name if self.model is None else type(model).__name__
        metadata.hook_name = hook_name
        metadata.hf_hook_name = hf_name(hook_name) if metadata.model_class_name in MODEL_CLASSES else None
        metadata.context_size = train.context_size
        metadata.prepend_bos = True
        metadata.exclude_special_tokens = self.cfg.data.exclude_special_tokens
        metadata.dataset_path = train.name


@torch.no_grad()
def _history_row(trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> dict[str, float | None]:
    x = output.sae_in.double()
    sse = float((output.sae_out.double() - x).square().sum())
    variance = float((x - x.mean(dim=0)).square().sum())
    threshold = getattr(trainer.sae, "topk_threshold", None)
    return {
        "tokens": trainer.n_training_samples,
        "loss": output.losses["mse_loss"].item(),
        "ve": 1 - sse / variance if variance > 0 else None,
        "l0": float((output.feature_acts != 0).sum() / len(x)),
        "threshold": None if threshold is None else float(threshold),
        "dead": int(trainer.dead_neurons.sum()),
    }
