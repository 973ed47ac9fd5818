"""sae_lens's configs as runs of this package."""

import dataclasses

import pytest
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAEConfig

import sae_lens_gemma4 as g4
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.runner import ContinueTrainingRunner

HELDOUT = [g4.Source(dataset="embedded:text", split="heldout", tokens=1000, name="text")]


def stock(tmp_path, **changes):
    return LanguageModelSAERunnerConfig(
        **{
            "sae": TopKTrainingSAEConfig(d_in=96, d_sae=128, k=8),
            "model_name": "gemma-4-demo",
            "model_class_name": "Gemma4ProxyLM",
            "hook_name": "blocks.3.hook_resid_post",
            "dataset_path": "embedded:text",
            "is_dataset_tokenized": False,
            "context_size": 64,
            "training_tokens": 4096,
            "train_batch_size_tokens": 256,
            "n_batches_in_buffer": 4,
            "store_batch_size_prompts": 4,
            "lr": 1e-3,
            "lr_scheduler_name": "cosineannealing",
            "lr_warm_up_steps": 2,
            "lr_decay_steps": 3,
            "exclude_special_tokens": True,
            "logger": LoggingConfig(log_to_wandb=False),
            "output_path": str(tmp_path / "run"),
        }
        | changes
    )


def test_a_run_of_sae_lens_is_a_run_here(tmp_path):
    cfg = g4.from_runner_config(stock(tmp_path), heldout=HELDOUT)
    [phase] = cfg.training.phases
    assert (phase.tokens, phase.lr, phase.final_lr, phase.warm_up_steps, phase.decay_steps) == (4096, 1e-3, 1e-4, 2, 3)
    assert cfg.data.shard_blocks == 16 and cfg.seed == 42
    result = ContinueTrainingRunner(cfg, progress=False).run().only
    assert result.sae.cfg.architecture() == "topk" and result.after["text"].metrics.l0 == pytest.approx(8, abs=0.2)
    assert result.history[-1]["step"] == 16


def test_its_folder_to_start_from_is_the_warm_start(tmp_path):
    start = stock(tmp_path, from_pretrained_path=str(tmp_path / "base"), dataset_path="x")
    cfg = g4.from_runner_config(start, heldout=HELDOUT, output="elsewhere", seed=1)
    assert cfg.warm_start.path == str(tmp_path / "base") and cfg.sae.d_sae is None and cfg.sae.settings["k"] == 8
    assert (cfg.output, cfg.seed) == ("elsewhere", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autocast": True, "adam_beta1": 0.5}, "autocast, adam_beta1"),
        ({"sequence_separator_token": None}, "sequence_separator_token"),
        ({"lr_scheduler_name": "cosineannealingwarmrestarts"}, "is not one of constant, cosineannealing"),
        ({"exclude_special_tokens": [1, 2]}, "yes or no"),
        ({"output_path": None}, "Say output"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        g4.from_runner_config(dataclasses.replace(stock(tmp_path), **changes), heldout=HELDOUT)
