"""The loop of a run: one stream of activations, many trainees, and what is due between two steps.

Everything that a killed run needs is in a checkpoint, and everything that is not (forward passes, buffers, the model)
is a function of the recipe; so nothing here may depend on when it was called.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sae_lens_gemma4.activations.cache import ActivationCache
from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.stream import ActivationStream, Position
from sae_lens_gemma4.evaluation.identity import model_fingerprint
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.training import checkpoint as checkpoints
from sae_lens_gemma4.training.calibration import calibrate, centre
from sae_lens_gemma4.training.evaluator import figures
from sae_lens_gemma4.training.forms import settle_threshold
from sae_lens_gemma4.training.journal import Journal
from sae_lens_gemma4.training.parallel import for_reading
from sae_lens_gemma4.training.preparing import Prepared, PreparedSAE, sample
from sae_lens_gemma4.training.restore import inference_form
from sae_lens_gemma4.training.trainee import Trainee

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Loop:
    """One run from its first step, or its last checkpoint, to its end."""

    def __init__(self, prepared: Prepared, folder: Path, journal: Journal, progress: bool) -> None:
        self.prepared, self.folder, self.journal, self.progress = prepared, folder, journal, progress
        self.cfg, self.ranks = prepared.cfg, prepared.ranks
        self.step = 0  # batches taken from the stream
        self.seconds = 0.0
        self._last_checkpoint = 0
        self.facts = checkpoints.as_json(prepared.facts())

    def start(self, saved: checkpoints.Checkpoint | None) -> None:
        """Take up a checkpoint, or calibrate; then open the stream."""
        cfg, a = self.cfg, self.cfg.activations
        if saved is not None:
            self.step, self.seconds, self._last_checkpoint = saved.step, saved.seconds, saved.step
            for sae in self.prepared.saes:
                sae.trainee.load(saved.trainees[sae.run.name])
        else:
            self._calibrate()
        for sae in self.prepared.saes:
            sae.trainee.share_weights()
        hooks = dict.fromkeys(sae.hook_name for sae in self.prepared.saes if not sae.trainee.done)
        self.skipped = list(saved.stream["skipped"]) if saved is not None else []
        if not hooks:
            return
        self.stream = ActivationStream(
            self.prepared.model,
            self.prepared.text,
            list(hooks),
            batch_size=a.batch_size,
            seed=cfg.seed,
            buffer_blocks=a.buffer_blocks,
            batch_blocks=a.batch_blocks,
            isolate_documents=cfg.data.isolate_documents,
            dtype=_DTYPES[a.dtype],
            device=cfg.model.device,
            max_skipped=a.max_skipped,
            cache=self._cache(),
            position=None if saved is None else Position.from_dict(saved.stream),
            prefetch=torch.device(cfg.model.device).type == "cuda",
            ranks=for_reading(self.ranks),
        )

    def _cache(self) -> ActivationCache | None:
        """The cache that the recipe asks for: the one that is there, or a new one."""
        a, prepared = self.cfg.activations, self.prepared
        if a.cache is None or not isinstance(prepared.text, Corpus):
            return None
        made: dict[str, Any] = {
            "fingerprint": model_fingerprint(prepared.model),
            "dtype": _DTYPES[a.dtype],
            "isolate_documents": self.cfg.data.isolate_documents,
        }
        hooks = prepared.hook_names
        with self.ranks.leader_first():
            if Path(a.cache).exists():
                return ActivationCache.open(a.cache, prepared.text, hooks, **made)
            made["batch_blocks"] = a.batch_blocks
            return ActivationCache.build(a.cache, prepared.model, prepared.text, hooks, **made)

    def _calibrate(self) -> None:
        """Fit each SAE that asks for it to the activations, before its first step."""
        wanted = {sae.run.name: sae for sae in self.prepared.saes if sae.run.calibration is not None}
        if not wanted:
            return
        n_tokens = max(sae.run.calibration.tokens for sae in wanted.values() if sae.run.calibration is not None)
        for acts in sample(self.prepared, list(wanted.values()), n_tokens):
            for sae in wanted.values():
                if sae.hook_name in acts and sae.run.calibration is not None:
                    x_td = acts[sae.hook_name][: sae.run.calibration.tokens].to(sae.trainee.sae.device)
                    if sae.base is None:
                        report = centre(sae.trainee.sae, x_td, sae.run.calibration)
                    else:
                        report = calibrate(sae.trainee.sae, x_td, sae.run.calibration).to_dict()
                        settle_threshold(sae.trainee.sae)
                    sae.trainee.calibration = report
                    self.journal.write(sae.run.name, "calibration", {"step": 0, **report})

    def train(self) -> None:
        monitoring, saes = self.cfg.monitoring, self.prepared.saes
        total = max(sum(p.steps for p in sae.trainee.plan) for sae in saes)
        with tqdm(
            total=total * self.cfg.activations.batch_size,
            initial=self.step * self.cfg.activations.batch_size,
            desc="Training",
            unit="tok",
            disable=not self.progress,
        ) as bar:
            if self.step == 0 and monitoring.evaluate_every is not None:
                self._measure(saes)
            try:
                while active := [sae for sae in saes if not sae.trainee.done]:
                    started = time.perf_counter()
                    batch = next(self.stream)
                    self.step, self.skipped = self.step + 1, self.stream.skipped
                    for sae in active:
                        self._train(sae, batch[sae.hook_name])
                    self.seconds += time.perf_counter() - started
                    self._after_step(active)
                    bar.update(self.cfg.activations.batch_size)
            except BaseException:
                self.stream.close()  # it may be reading ahead
                raise
        if self.step > self._last_checkpoint:
            self._checkpoint()  # what is left is measured again, not trained again

    def _train(self, sae: PreparedSAE, x_nd: torch.Tensor) -> None:
        trainee, before = sae.trainee, sae.trainee.step
        output = trainee.train(x_nd[self.ranks.parts(len(x_nd))[self.ranks.rank]])
        taken_back = trainee.step <= before
        due = trainee.step % self.cfg.monitoring.log_every == 0 or trainee.step == 1 or trainee.ends_phase
        if due and not taken_back:
            self.journal.write(sae.run.name, "training", trainee.record(output))
        self._tell(sae)

    def _tell(self, sae: PreparedSAE) -> None:
        while sae.trainee.news:
            self.journal.write(sae.run.name, "event", sae.trainee.news.pop(0))

    def _after_step(self, active: list[PreparedSAE]) -> None:
        """Whatever is due between two steps: held-out figures, a new phase, a checkpoint."""
        every = self.cfg.monitoring.evaluate_every
        if due := [sae for sae in active if _is_due(sae.trainee, every)]:
            self._measure(due)
        for sae in active:
            if sae.trainee.ends_phase:
                sae.trainee.next_phase()
                self._tell(sae)
        still = {sae.hook_name for sae in active if not sae.trainee.done}
        for name in {sae.hook_name for sae in active} - still:
            self.stream.drop(name)
        if self._checkpoint_is_due():
            self._checkpoint()

    def _measure(self, saes: list[PreparedSAE]) -> None:
        """Held-out figures of these SAEs as they would be saved, and nothing taken from the training stream."""
        rows: dict[str, dict[str, Any]] = {sae.run.name: {} for sae in saes}
        self.stream.settle()  # the model is not run by two
        forms = {sae.run.name: inference_form(sae.trainee.sae) for sae in saes}
        hooks = {sae.run.name: sae.hook_name for sae in saes}
        quickly: dict[str, Any] = {
            "tokens": self.cfg.monitoring.evaluate_tokens,
            "progress": False,
            "sampling": Sampling(resamples=0),
        }
        for name, results in self.prepared.evaluate(forms, hooks, **quickly).items():
            for measured, result in results.items():
                rows[measured][name] = figures(result)
        rows = self.ranks.first(rows)  # what is best is decided once
        for sae in saes:
            trainee = sae.trainee
            scores = [row["ve"] for row in rows[sae.run.name].values() if row["ve"] is not None]
            row = {"step": trainee.step, "tokens": trainee.step * trainee.batch_size, "phase": trainee.phase}
            row["corpora"] = rows[sae.run.name]
            trainee.remember(row, min(scores) if scores else None)
            self.journal.write(sae.run.name, "heldout", row)

    def _checkpoint_is_due(self) -> bool:
        return self.step - self._last_checkpoint >= self.cfg.monitoring.checkpoint_every

    def _checkpoint(self) -> None:
        self._last_checkpoint = self.step
        if not self.ranks.leads:
            return
        state = checkpoints.Checkpoint(
            step=self.step,
            stream=self.stream.position.to_dict(),
            log=self.journal.size,
            seconds=self.seconds,
            facts=self.facts,
            trainees={sae.run.name: sae.trainee.state() for sae in self.prepared.saes},
        )
        checkpoints.save_checkpoint(self.folder, state)


def _is_due(trainee: Trainee, every: int | None) -> bool:
    """Whether held-out figures are wanted: at the asked interval, and at the end of a phase that another follows."""
    known = trainee.evaluations and trainee.evaluations[-1]["step"] == trainee.step  # after an event was taken back
    if every is None or known:
        return False
    return trainee.step % every == 0 or (trainee.ends_phase and not trainee.in_last_phase)
