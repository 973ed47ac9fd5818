"""The run: published SAEs become good SAEs for another model, several on one forward pass, and none in silence.

sae_lens's runner trains one SAE from a stream that it also evaluates on, has one schedule, knows of no dead latents
and no incident, and loses the text's place when it stops. Here each SAE is a `Trainee` of its own; what they share
is the activations, the journal, and a checkpoint from which a killed run goes on to the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.result import write_text
from sae_lens_gemma4.kernels.ranks import Ranks
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.training import checkpoint as checkpoints
from sae_lens_gemma4.training.config import ContinueTrainingConfig
from sae_lens_gemma4.training.finishing import finish
from sae_lens_gemma4.training.journal import Journal, check_loggers
from sae_lens_gemma4.training.loop import Loop
from sae_lens_gemma4.training.parallel import joined, output
from sae_lens_gemma4.training.preparing import Prepared, prepare
from sae_lens_gemma4.training.records import RESULT_FILENAME, ContinueTrainingResult
from sae_lens_gemma4.training.saving import RECIPE_FILENAME, check_run_folder, clear_run_folder, only_one


@dataclass
class ContinueTrainingRunner:
    """Runs a `ContinueTrainingConfig`.

    Args:
        cfg: the run.
        model: a model in memory, instead of the one that `cfg.model` names.
        corpora: corpora by name instead of `cfg.data`'s: "train", and one for each held-out source. With either, the
            recipe would not repeat the run, and is not saved with it.
        progress: progress bars.
    """

    cfg: ContinueTrainingConfig
    model: HookedModel | None = None
    corpora: Mapping[str, Corpus] = field(default_factory=dict)
    progress: bool = True

    def prepare(self) -> Prepared:
        """Everything before the first step, and nothing written. Errors as `training.preparing.prepare`."""
        return prepare(self.cfg, self.model, self.corpora)

    def run(self, *, resume: bool = False, replace: bool = False) -> ContinueTrainingResult:
        """Train, save and measure.

        Args:
            resume: go on from the newest checkpoint in the run's folder; from the start where there is none.
            replace: begin a run anew whose folder holds one.

        Raises (all before the first step, except for what only activations can show):
            UnknownNameError: a release, SAE id, model class or hook that does not exist.
            ModelError, SAEError, DataError, ConfigError: what cannot be loaded, restored, read or used.
        """
        if resume and replace:
            raise ConfigError("A run is resumed or replaced, not both.")
        with joined(self.cfg) as ranks:
            return self._run(ranks, resume, replace)

    def _run(self, ranks: Ranks, resume: bool, replace: bool) -> ContinueTrainingResult:
        cfg, folder = self.cfg, Path(self.cfg.output).resolve()
        recipe = cfg.to_yaml() if self.model is None and not self.corpora else None
        starts = [run.warm_start.path for run in cfg.runs() if run.warm_start is not None]
        if ranks.leads:
            check_run_folder(folder, resume=resume, replace=replace, keep=[s for s in starts if s])
        check_loggers(list(cfg.monitoring.loggers))
        prepared = prepare(cfg, self.model, self.corpora, ranks)
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder) if ranks.leads else nullcontext():
            saved = checkpoints.load_checkpoint(folder, cfg.model.device) if resume else None
            if resume and saved is None and any(folder.glob(f"*/{RESULT_FILENAME}")):
                raise ConfigError(f"The run in {folder} is finished; there is nothing to resume.")
            if saved is not None:
                checkpoints.check_same(saved.facts, checkpoints.as_json(prepared.facts()))
            ranks.wait()  # from here on the leader writes where all have read
            if replace and ranks.leads:
                clear_run_folder(folder)
            with output(folder, ranks) as own:
                result = self._train(prepared, own, recipe, saved)
            ranks.wait()
        saes = {name: dataclasses.replace(sae, path=folder / name) for name, sae in result.saes.items()}
        return dataclasses.replace(result, path=folder, saes=saes)

    def _train(
        self, prepared: Prepared, folder: Path, recipe: str | None, saved: checkpoints.Checkpoint | None
    ) -> ContinueTrainingResult:
        cfg, leads = self.cfg, prepared.ranks.leads
        journal = Journal(
            folder,
            keep=saved.log if saved else 0,
            loggers=list(cfg.monitoring.loggers) if leads else [],
            project=cfg.monitoring.wandb_project,
            settings=cfg.to_dict(),
        )
        try:
            if recipe is not None:
                write_text(recipe, folder / RECIPE_FILENAME)
            loop = Loop(prepared, folder, journal, self.progress and leads)
            loop.start(saved)
            loop.train()
            return finish(loop)
        finally:
            journal.close()
