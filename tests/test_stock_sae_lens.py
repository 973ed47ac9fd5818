"""What a user of plain sae_lens gains by one import: nothing here calls this package but that import."""

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

import sae_lens_gemma4  # noqa: F401
from sae_lens_gemma4.embedded.text import documents
from tests.support import RELEASE, SAE_ID


def runner_config(**changes):
    settings = {
        "sae": MatryoshkaBatchTopKTrainingSAEConfig(d_in=96, d_sae=128, k=8, matryoshka_widths=[32, 128]),
        "model_name": "gemma-4-demo",
        "model_class_name": "Gemma4ProxyLM",
        "hook_name": "blocks.3.hook_resid_post",
        "context_size": 64,
        "training_tokens": 64 * 256,
        "train_batch_size_tokens": 256,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 8,
        "exclude_special_tokens": True,
        "lr": 1e-3,
        "device": "cpu",
        "verbose": False,
        "n_checkpoints": 0,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return LanguageModelSAERunnerConfig(**(settings | changes))


@pytest.mark.parametrize("hook_name", ["blocks.3.hook_resid_post", "model.language_model.layers.3"])
def test_the_stock_runner_trains_and_saves(tmp_path, hook_name):
    torch.manual_seed(0)
    dataset = Dataset.from_dict({"text": documents("train")[:100]})
    cfg = runner_config(hook_name=hook_name, output_path=str(tmp_path))
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset)
    batch = next(runner.activations_store)

    def unexplained(sae):
        return float((batch - sae(batch)).pow(2).sum() / (batch - batch.mean(0)).pow(2).sum())

    before = unexplained(runner.sae)
    sae = runner.run()
    assert unexplained(sae) < 0.7 * before
    saved = SAE.load_from_disk(tmp_path)
    assert saved.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert saved.cfg.metadata.hf_hook_name == "model.language_model.layers.3"
    assert saved.cfg.metadata.model_class_name == "Gemma4ProxyLM"


def test_the_stock_runner_names_a_hook_that_is_none():
    with pytest.raises(ValueError, match=r"Did you mean 'blocks\.3\.hook_resid_post'"):
        LanguageModelSAETrainingRunner(runner_config(hook_name="blocks.3.hook_resid_pst"))


def test_from_pretrained_knows_the_catalogue():
    sae, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(RELEASE, SAE_ID)
    assert (sae.cfg.architecture(), sae.cfg.d_in, sae.cfg.d_sae) == ("jumprelu", 96, 2048)
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert sae.cfg.metadata.training_architecture == "matryoshka_batchtopk"
    assert cfg["architecture"] == "jumprelu"
    assert sparsity is None
    assert SAE.from_pretrained(RELEASE, SAE_ID, dtype="bfloat16").W_enc.dtype == torch.bfloat16
    assert load_sae_config_from_huggingface(RELEASE, SAE_ID)["d_sae"] == 2048
    with pytest.raises(ValueError, match="layer_3_width_2k_l0_16"):
        SAE.from_pretrained(RELEASE, "nonsense")


def test_what_nobody_stated_is_not_a_number_in_stock_s_directory():
    row = get_pretrained_saes_directory()[RELEASE]
    assert row.expected_l0[SAE_ID] != row.expected_l0[SAE_ID]
    assert row.expected_var_explained[SAE_ID] != row.expected_var_explained[SAE_ID]
