"""One SAE in training: its phases, its events, and all of its state as plain tensors and numbers.

Steps are those of `SparseTrainer`, a trainer a phase. What stock does not have is around them: dead latents are
resampled, each such event is watched and taken back if it does harm, a phase may begin from the best state so far,
and the state can be written down and read again, so that what goes on from it computes the same bits.

Shapes: `n` tokens of a batch, `d` d_in, `f` latents.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import LoggingConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput

from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.training.forms import unit_decoder
from sae_lens_gemma4.training.phases import Phase, Training
from sae_lens_gemma4.training.resampling import resample
from sae_lens_gemma4.training.state import State, copies, count_on, counts, load_trainer_state, part, trainer_state
from sae_lens_gemma4.training.trainer import SparseTrainer
from sae_lens_gemma4.training.watch import BASELINE, Signs, Watch, mean_signs, read_signs, signs

_RECORDS = ("history", "events", "evaluations", "calibration")
_SCHEDULES = {"cosine": "cosineannealing", "constant": "constant"}


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with its length in steps, and how many of these are an epoch (None if that is not known)."""

    phase: Phase
    steps: int
    steps_per_epoch: float | None


class Trainee:
    """An SAE with everything that its training has.

    Args:
        sae: in its training form, on the device on which it is trained; it is changed in place.
        plan: its phases.
        batch_size: tokens a step, of all ranks together.
        seed: of what is drawn at random when latents are resampled.
        ranks: who trains this SAE with other parts of each batch; all do the same to it.

    Attributes:
        step: steps taken; those that were taken back do not count.
        trainer: stock's, of the phase at hand.
        history: rows of the training stream's figures; `record` adds one.
        events: what was done to it besides steps, in order.
        evaluations: held-out figures that `remember` was given.
        calibration: what was done before the first step, for the record.
        news: events that are over, for whoever writes them down and takes them out.
    """

    def __init__(
        self,
        name: str,
        sae: TrainingSAE[Any],
        training: Training,
        plan: list[PlannedPhase],
        batch_size: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.name, self.sae, self.training, self.plan = name, sae, training, plan
        self.batch_size, self.seed, self.ranks = batch_size, seed, ranks
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.calibration: dict[str, Any] | None = None
        self.news: list[dict[str, Any]] = []
        self._phase, self._step_in_phase = 0, 0
        self._attempt = 0  # how often the event that is due was taken back
        self._recent: list[Signs] = []
        self._unread: list[torch.Tensor] = []  # signs still on the device, which nobody waits for
        self._best: tuple[float, dict[str, torch.Tensor]] | None = None
        self._watch: Watch | None = None
        self._before: State | None = None  # the state to return to while there is a watch
        self.trainer = self._new_trainer()

    @property
    def done(self) -> bool:
        return self._phase == len(self.plan)

    @property
    def phase(self) -> str:
        """Name of the phase that the last step belonged to."""
        return self.plan[min(self._phase, len(self.plan) - 1)].phase.name

    @property
    def in_last_phase(self) -> bool:
        return self._phase >= len(self.plan) - 1

    @property
    def ends_phase(self) -> bool:
        """Whether the phase's steps are all taken, and the next one was not begun."""
        return not self.done and self._step_in_phase == self.plan[self._phase].steps

    def train(self, x_nd: torch.Tensor) -> TrainStepOutput:
        """One step on a batch of activations, or this rank's part of it, and whatever is due before it.

        Raises:
            DataError: the loss is no number, and there is no event to take back.
        """
        if self._resampling_is_due():
            self._resample(x_nd)
        output = self.trainer.step(x_nd.to(self.sae.device, self.sae.dtype, non_blocking=True))
        self.trainer.n_training_steps += 1
        self.step += 1
        self._step_in_phase += 1
        every = self.training.unit_decoder_every
        if every is not None and self.step % every == 0:
            unit_decoder(self.sae, self.trainer.optimizer)
        self._unread.append(signs(output, getattr(self.sae, "smallest", None), self.ranks))
        if self._watch or self.ends_phase or self.sae.device.type == "cpu" or len(self._unread) == BASELINE:
            self._look()
        return output

    def next_phase(self) -> None:
        """Go on to the next phase, once this one's steps are taken and its end was measured."""
        before = self.trainer
        self._phase, self._step_in_phase = self._phase + 1, 0
        if self.done:
            return
        phase = self.plan[self._phase].phase
        if phase.start == "best" and self._best is not None:
            self.sae.load_state_dict(self._best[1])
        self.trainer = self._new_trainer()
        count_on(self.trainer, counts(before))
        for name, scheduler in before.coefficient_schedulers.items():
            self.trainer.coefficient_schedulers[name].load_state_dict(scheduler.state_dict())
        score = self._best[0] if phase.start == "best" and self._best else None
        self._note({"kind": "phase", "step": self.step, "phase": phase.name, "start": phase.start, "best": score})

    def remember(self, row: dict[str, Any], score: float | None) -> None:
        """Keep held-out figures, and the state itself if `score` is the best so far and a later phase wants it."""
        self.evaluations.append(row)
        wanted = any(planned.phase.start == "best" for planned in self.plan[self._phase + 1 :])
        if wanted and score is not None and (self._best is None or score > self._best[0]):
            self._best = score, copies(self.sae.state_dict())

    @torch.no_grad()
    def record(self, output: TrainStepOutput) -> dict[str, Any]:
        """Add the figures of a step to the history: of the training stream, in the training form."""
        self._look()
        ve, acts_nf = self._recent[-1].ve, output.feature_acts
        n_active = ((acts_nf._values() if acts_nf.is_sparse else acts_nf) > 0).sum()
        row = {
            "step": self.step,
            "phase": self.phase,
            "tokens": self.step * self.batch_size,
            "loss": float(output.losses["mse_loss"].detach()),
            "ve": ve if math.isfinite(ve) else None,
            "l0": int(self.ranks.total(n_active)) / (len(acts_nf) * self.ranks.world),
            "threshold": self._threshold(),
            "dead": int(self.trainer.dead_neurons.sum()),
            "lr": float(self.trainer.optimizer.param_groups[0]["lr"]),
        }
        self.history.append(row)
        return row

    @torch.no_grad()
    def share_weights(self) -> None:
        """Take rank 0's weights, where the same computation may have ended in other bits."""
        for tensor in self.sae.state_dict(keep_vars=True).values():
            self.ranks.spread(tensor)

    def _threshold(self) -> float | None:
        threshold = getattr(self.sae, "topk_threshold", None)
        return None if threshold is None else float(threshold)

    # -- dead latents

    def _resampling_is_due(self) -> bool:
        planned = self.plan[self._phase]
        if planned.phase.resampling is None or self._step_in_phase == 0:
            return False
        every = planned.phase.resampling.every_steps or planned.steps_per_epoch
        if every is None or self._step_in_phase != round(round(self._step_in_phase / every) * every):
            return False
        left, guard = planned.steps - self._step_in_phase, self.training.guard
        return left >= (1 if guard is None else guard.window_steps)  # one that nobody could judge is left out

    def _resample(self, x_nd: torch.Tensor) -> None:
        """Replace dead latents, fewer and smaller at each new attempt, and watch what comes of it."""
        how, guard = self.plan[self._phase].phase.resampling, self.training.guard
        dead_f = self.trainer.dead_neurons
        n_dead = int(dead_f.sum())
        assert how is not None
        self._look()
        self._settle()  # an event before this one has stood until now
        if n_dead == 0:
            return
        if guard is not None and self._attempt > guard.tries:
            self._attempt = 0
            self._note({"kind": "abandoned", "step": self.step, "phase": self.phase, "dead": n_dead})
            return
        size = guard.shrink**self._attempt if guard is not None else 1.0
        self._before = self.state() if guard is not None else None
        threshold = self._threshold()
        resampled = resample(
            self.sae,
            self.trainer.optimizer,
            self.ranks.gathered(x_nd.to(self.sae.device, self.sae.dtype)),
            dead_f,
            share=how.share * size,
            of=how.of,
            cap=max(1, round(min(n_dead, how.cap or n_dead) * size)),
            generator=torch.Generator().manual_seed((self.seed + self.step) % 2**63),
        )
        self.share_weights()
        self.trainer.n_forward_passes_since_fired[resampled.latents] = 0
        before = mean_signs(self._recent)
        self.events.append(
            {
                "kind": "resampling",
                "step": self.step,
                "phase": self.phase,
                "dead": n_dead,
                "resampled": len(resampled.latents),
                "share": how.share * size,
                "of": how.of,
                "norm": resampled.norm,
                "threshold_before": threshold,
                "selected_from_before": before.selected_from,
                "ve_before": before.ve,
            }
        )
        self._watch = Watch(guard, before)

    def _look(self) -> None:
        """Judge the steps since the last look: go on, let an event stand, or take it back.

        While an event is watched there is one.
        """
        rows, self._unread = read_signs(self._unread), []
        for ago, row in zip(reversed(range(len(rows))), rows, strict=True):
            if not math.isfinite(row.loss) and self._before is None:
                raise DataError(f"The loss of {self.name} is {row.loss} at step {self.step - ago}.")
        self._recent = [*self._recent, *rows][-BASELINE:]
        if self._watch is None or not rows:
            return
        harm, after, event = self._watch.harm(rows[-1]), self._watch.after, self.events[-1]
        event["threshold_after"], event["selected_from_after"] = self._threshold(), after.selected_from
        event["ve_after"] = after.ve if math.isfinite(after.ve) else None
        if harm is not None and self._before is not None:
            lost, attempt = self.step - event["step"], self._attempt
            self.load(self._before)
            self._note({**event, "kind": "rollback", "reason": harm, "steps_lost": lost})
            self._attempt = attempt + 1
        elif self._watch.over or self.ends_phase:
            self._settle()

    def _settle(self) -> None:
        """Let the event that is being watched stand."""
        if self._watch is not None:
            self._attempt, self._watch, self._before = 0, None, None
            self.news.append(self.events[-1])

    def _note(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self.news.append(event)

    # -- state

    def state(self) -> State:
        """All there is, as copies: the trainer's state, the records, and the best state if one is kept."""
        self._look()
        trainer = trainer_state(self.trainer)
        best = {} if self._best is None else {f"best.{name}": t for name, t in copies(self._best[1]).items()}
        facts = {
            "step": self.step,
            "phase": self._phase,
            "step_in_phase": self._step_in_phase,
            "attempt": self._attempt,
            "recent": self._recent,
            "best": self._best[0] if self._best else None,
            **{name: getattr(self, name) for name in _RECORDS},
        }
        state = State(trainer.tensors | best, trainer.facts | copy.deepcopy(facts))
        return state if self._watch is None else self._with_watch(state)

    def _with_watch(self, state: State) -> State:
        """A state with the event that is being watched, and the state to which it may return."""
        assert self._watch is not None
        watch: dict[str, Any] = {"before": self._watch.before, "seen": self._watch.seen, "returns_to": None}
        tensors = state.tensors
        if self._before is not None:
            tensors = tensors | {f"returns.{name}": t for name, t in self._before.tensors.items()}
            watch["returns_to"] = self._before.facts
        return State(tensors, state.facts | {"watch": copy.deepcopy(watch)})

    def load(self, state: State) -> None:
        """Become what `state` was taken from: a trainee of the same SAE and the same plan."""
        facts = copy.deepcopy(state.facts)
        self.step, self._phase, self._step_in_phase = facts["step"], facts["phase"], facts["step_in_phase"]
        self._attempt, self._watch, self._before = facts["attempt"], None, None
        if (watch := facts.get("watch")) is not None:
            seen = [Signs(*row) for row in watch["seen"]]
            self._watch = Watch(self.training.guard, Signs(*watch["before"]), seen)
            if watch["returns_to"] is not None:
                self._before = State(copies(part(state.tensors, "returns")), watch["returns_to"])
        self._recent, self._unread = [Signs(*row) for row in facts["recent"]], []
        self._best = None if facts["best"] is None else (facts["best"], copies(part(state.tensors, "best")))
        self.history, self.events = facts["history"], facts["events"]
        self.evaluations, self.calibration = facts["evaluations"], facts["calibration"]
        self.trainer = self._new_trainer()
        load_trainer_state(self.trainer, state)

    def _new_trainer(self) -> SparseTrainer:
        planned = self.plan[min(self._phase, len(self.plan) - 1)]
        phase = planned.phase
        return SparseTrainer(
            cfg=SAETrainerConfig(
                total_training_samples=planned.steps * self.batch_size,
                train_batch_size_samples=self.batch_size,
                device=str(self.sae.device),
                lr=phase.lr,
                lr_end=phase.final_lr,
                lr_scheduler_name=_SCHEDULES[phase.schedule],
                lr_warm_up_steps=phase.warm_up_steps,
                lr_decay_steps=phase.decay_steps,
                dead_feature_window=self.training.dead_after_steps,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            sae=self.sae,
            data_provider=iter(()),  # batches are handed to `step`
            ranks=self.ranks,
        )
