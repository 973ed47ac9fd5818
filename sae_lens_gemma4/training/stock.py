"""A run of sae_lens as a run of this package: what is in people's scripts already need not be written again.

What a `LanguageModelSAERunnerConfig` says is taken over; what it says and this runner does not do is refused by name.
Held-out text has to be added, because sae_lens has none: it evaluates on the training stream.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.config import (
    Activations,
    ContinueTrainingConfig,
    Data,
    Model,
    Monitoring,
    SAEForm,
    WarmStart,
)
from sae_lens_gemma4.training.fast import stock_name
from sae_lens_gemma4.training.phases import Phase, Training

_SCHEDULES = {"constant": "constant", "cosineannealing": "cosine"}
_NOT_DONE_HERE = (
    "hook_head_index", "use_cached_activations", "seqpos_slice", "sequence_separator_token", "prepend_bos", "autocast",
    "autocast_lm", "compile_llm", "compile_sae", "adam_beta1", "adam_beta2", "resume_from_checkpoint", "model_kwargs",
)  # fmt: skip
_OF_THE_WEIGHTS = ("d_in", "d_sae", "dtype", "device", "metadata", "reshape_activations", "normalize_activations")


def from_runner_config(
    cfg: LanguageModelSAERunnerConfig[Any], *, heldout: list[Source], output: str | None = None, **parts: Any
) -> ContinueTrainingConfig:
    """The same run for `ContinueTrainingRunner`.

    Args:
        cfg: sae_lens's; its `from_pretrained_path` becomes the warm start, in any form that this package reads.
        heldout: text to measure on.
        output: folder of the run; `cfg.output_path` if None.
        parts: fields of `ContinueTrainingConfig` to put in the place of what `cfg` says.

    Raises:
        ConfigError: something that `cfg` asks for and this runner does not do.
    """
    defaults = {f.name: f.default for f in fields(LanguageModelSAERunnerConfig)}
    asked = [name for name in _NOT_DONE_HERE if (value := getattr(cfg, name)) != defaults[name] and value != {}]
    if cfg.sae.normalize_activations != "none":
        asked.append("sae.normalize_activations")
    if asked:
        raise ConfigError(f"ContinueTrainingRunner does not do what these ask for: {', '.join(asked)}.")
    if cfg.lr_scheduler_name not in _SCHEDULES:
        raise ConfigError(f"lr_scheduler_name {cfg.lr_scheduler_name!r} is not one of {', '.join(_SCHEDULES)}.")
    if not isinstance(cfg.exclude_special_tokens, bool):
        raise ConfigError("exclude_special_tokens is yes or no here: special tokens are those of the tokenizer.")
    if (folder := output or cfg.output_path) is None:
        raise ConfigError("Say output: the config names no output_path.")
    start = cfg.from_pretrained_path
    settings = {f.name: getattr(cfg.sae, f.name) for f in fields(cfg.sae) if f.name not in _OF_THE_WEIGHTS}
    if start is not None:
        del settings["decoder_init_norm"], settings["apply_b_dec_to_input"]
    phase = Phase(
        tokens=cfg.training_tokens,
        lr=cfg.lr,
        lr_end=cfg.lr_end if cfg.lr_scheduler_name == "cosineannealing" else None,
        schedule=_SCHEDULES[cfg.lr_scheduler_name],  # type: ignore[arg-type]
        warm_up_steps=cfg.lr_warm_up_steps,
        decay_steps=cfg.lr_decay_steps,
    )
    said: dict[str, Any] = {
        "model": Model(
            name=cfg.model_name,
            class_name=cfg.model_class_name,
            device=cfg.llm_device or cfg.device,
            kwargs=dict(cfg.model_from_pretrained_kwargs or {}),
        ),
        "data": Data(
            train=[Source(dataset=cfg.dataset_path)],
            heldout=heldout,
            context_size=cfg.context_size,
            exclude_special_tokens=cfg.exclude_special_tokens,
            packed=not cfg.disable_concat_sequences,
            shard_blocks=cfg.n_batches_in_buffer * cfg.store_batch_size_prompts if cfg.streaming else None,
        ),
        "warm_start": None if start is None else WarmStart(path=start),
        "sae": SAEForm(
            hook_name=cfg.hook_name,
            architecture=stock_name(cfg.sae.architecture()),
            d_sae=None if start else cfg.sae.d_sae,
            settings=settings,
            dtype=cfg.sae.dtype,
        ),
        "calibration": None,
        "training": Training(phases=[phase], dead_after_steps=cfg.dead_feature_window),
        "activations": Activations(
            batch_size=cfg.train_batch_size_tokens,
            buffer_blocks=cfg.n_batches_in_buffer * cfg.store_batch_size_prompts,
            batch_blocks=cfg.store_batch_size_prompts,
        ),
        "monitoring": Monitoring(
            log_every=cfg.logger.wandb_log_frequency,
            loggers=["wandb"] if cfg.logger.log_to_wandb else [],
            wandb_project=cfg.logger.wandb_project if cfg.logger.log_to_wandb else None,
        ),
        "output": folder,
        "seed": cfg.seed,
    }
    return ContinueTrainingConfig(**said | parts)
