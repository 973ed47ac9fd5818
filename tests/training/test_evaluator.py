"""Held-out evaluation called by sae_lens's own trainers."""

from unittest.mock import patch

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from sae_lens.training.sae_trainer import SAETrainer

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.evaluator import HeldOutEvaluator, as_saved
from sae_lens_gemma4.training.restore import inference_form

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return g4.load_model("gemma-4-demo", "Gemma4ProxyLM")


@pytest.fixture(scope="module")
def corpus(model):
    return build_corpus("embedded:text", model.tokenizer, context_size=64, split="heldout", max_tokens=2000)


@pytest.fixture(scope="module")
def x(model, corpus):
    return torch.cat([batch.acts[HOOK] for batch in harvest(model, corpus, [HOOK])]).detach()


def batch_topk():
    torch.manual_seed(0)
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=96, d_sae=256, k=8, decoder_init_norm=0.3))
    sae.cfg.metadata.hook_name = HOOK
    with torch.no_grad():
        sae.topk_threshold.fill_(1.0)
    return sae


def test_stocks_trainer_logs_the_saved_form_on_held_out_text(model, corpus, x):
    sae = batch_topk()
    evaluator = HeldOutEvaluator(model, {"text": corpus})
    logging = LoggingConfig(log_to_wandb=True, wandb_log_frequency=2, eval_every_n_wandb_logs=1)
    taken = iter(x.split(64) * 4)
    cfg = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=256, device="cpu",
        autocast=False, lr=1e-3, lr_end=1e-3, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9,
        adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=64, dead_feature_window=100,
        feature_sampling_window=100, logger=logging,
    )  # fmt: skip
    with patch("sae_lens.training.sae_trainer.wandb") as wandb:
        SAETrainer(cfg=cfg, sae=sae, data_provider=taken, evaluator=evaluator).fit()
    logged = [call.args[0] for call in wandb.log.call_args_list if "heldout/text/ve" in call.args[0]]
    assert len(logged) == 2 and logged[0] != logged[1]
    assert sum(1 for _ in taken) == len(x.split(64) * 4) - 4  # four steps, and nothing for the evaluation
    saved = inference_form(sae)
    with torch.no_grad():
        acts = saved.encode(x)
        error = (x.double() - saved.decode(acts).double()).square().sum()
        ve = float(1 - error / (x.double() - x.double().mean(0)).square().sum())
    assert logged[-1]["heldout/text/ve"] == pytest.approx(ve, rel=1e-5)
    assert logged[-1]["heldout/text/l0"] == pytest.approx(float((acts != 0).sum() / len(x)), rel=1e-6)
    assert evaluator.latest["text"].metrics.ve == logged[-1]["heldout/text/ve"]


@pytest.mark.parametrize("kind", ["scaled", "whitened", "plain"])
@torch.no_grad()
def test_what_was_done_to_training_activations_is_folded_in(kind, x):
    torch.manual_seed(1)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=96, d_sae=128, decoder_init_norm=0.3))
    sae.b_dec.normal_()
    scaler = ActivationScaler()
    if kind == "scaled":
        scaler.scaling_factor = 0.05
    if kind == "whitened":
        matrix = torch.eye(96) + 0.1 * torch.randn(96, 96)
        scaler.whitening = ActivationWhitening(x.mean(0), matrix, torch.linalg.inv(matrix))
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    expected = scaler.unscale(sae.decode(sae.encode(scaler.scale(x))))
    torch.testing.assert_close(as_saved(sae, scaler)(x), expected, rtol=1e-3, atol=1e-2)
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())  # training is as it was


def test_an_evaluator_needs_text(model):
    with pytest.raises(ConfigError, match="at least one corpus"):
        HeldOutEvaluator(model, {})
