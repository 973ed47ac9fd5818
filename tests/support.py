"""What several tests build: a training SAE with every parameter away from its start, and a small run's config."""

import importlib.util
import os

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.training.config import Activations, ContinueTrainingConfig, Data, Model, Monitoring, WarmStart
from sae_lens_gemma4.training.phases import Phase, Training

RELEASE, SAE_ID = "gemma-4-demo-res-matryoshka-embedded", "layer_3_width_2k_l0_16"
D_IN, D_SAE = 8, 32


def trained(cls=MatryoshkaBatchTopKTrainingSAE, rescale=True, threshold=0.7, **settings):
    """A training SAE with every parameter away from its start."""
    configs = {
        MatryoshkaBatchTopKTrainingSAE: MatryoshkaBatchTopKTrainingSAEConfig,
        BatchTopKTrainingSAE: BatchTopKTrainingSAEConfig,
        TopKTrainingSAE: TopKTrainingSAEConfig,
    }
    if cls is MatryoshkaBatchTopKTrainingSAE:
        settings.setdefault("matryoshka_widths", [8, 32])
    sae = cls(configs[cls](d_in=D_IN, d_sae=D_SAE, k=4, rescale_acts_by_decoder_norm=rescale, **settings))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        if cls is not TopKTrainingSAE:
            sae.topk_threshold.fill_(threshold)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.cfg.metadata.author_note = {"kept": [1, 2]}
    return sae


def config(output, model="gemma-4-demo-it-rescaled", tokens=60 * 512, batch_size=512, lr=1e-3, **parts):
    """A small run on the hard shift, without calibration; `parts` replaces whole parts of it."""
    return ContinueTrainingConfig(
        **{
            "warm_start": WarmStart(release=RELEASE, sae_id=SAE_ID),
            "model": Model(name=model),
            "data": Data(
                context_size=64,
                train=[Source(dataset="embedded:chat", tokens=20_000)],
                heldout=[Source(dataset="embedded:chat", split="heldout", tokens=1_500, name="chat")],
            ),
            "activations": Activations(batch_size=batch_size),
            "training": Training(phases=[Phase(tokens=tokens, lr=lr)], dead_after_steps=30),
            "monitoring": Monitoring(log_every=10),
            "calibration": None,
            "output": str(output),
            "seed": 3,
        }
        | parts
    )


def required_module(name):
    """Skip a test whose reference library is not installed; where all must be, fail it."""
    if importlib.util.find_spec(name) is None:
        if os.environ.get("REQUIRE_REFERENCES"):
            pytest.fail(f"{name} is not installed, and REQUIRE_REFERENCES is set")
        pytest.skip(f"{name} is not installed")
