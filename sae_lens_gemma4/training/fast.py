"""sae_lens's TopK-family training SAEs with a sparse step, under architecture names of their own.

A config that says `fast_matryoshka_batchtopk` where it said `matryoshka_batchtopk` trains the same SAE: the same
initial weights, losses, threshold and files. `plugin.py` registers them; stock's classes stay as they are.

Weights must be finite (stock's bear a bias of -∞). `state_dict()["W_enc"]` is not contiguous, as safetensors wants it;
`save_model` and `save_inference_model` write what stock's write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sae_lens import SAEConfig, TrainingSAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

from sae_lens_gemma4.training.sparse_step import SparseBatchStep, SparseStep

PREFIX = "fast_"


class _SavedAsStock(TrainingSAEConfig):
    """Says of itself what stock's config says, except in a training checkpoint's own `architecture`."""

    def _metadata_with_training_info(self) -> dict[str, Any]:
        return super()._metadata_with_training_info() | {"training_architecture": stock_name(self.architecture())}

    def add_training_info_to_metadata(self) -> None:
        super().add_training_info_to_metadata()
        self.metadata.training_architecture = stock_name(self.architecture())


@dataclass
class FastTopKTrainingSAEConfig(_SavedAsStock, TopKTrainingSAEConfig):
    """sae_lens's `TopKTrainingSAEConfig`, trained by `FastTopKTrainingSAE`."""

    @classmethod
    def architecture(cls) -> str:
        return "fast_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return get_sae_class("topk")[1]


@dataclass
class FastBatchTopKTrainingSAEConfig(_SavedAsStock, BatchTopKTrainingSAEConfig):
    """sae_lens's `BatchTopKTrainingSAEConfig`, trained by `FastBatchTopKTrainingSAE`."""

    @classmethod
    def architecture(cls) -> str:
        return "fast_batchtopk"


@dataclass
class FastMatryoshkaBatchTopKTrainingSAEConfig(_SavedAsStock, MatryoshkaBatchTopKTrainingSAEConfig):
    """sae_lens's `MatryoshkaBatchTopKTrainingSAEConfig`, trained by `FastMatryoshkaBatchTopKTrainingSAE`."""

    @classmethod
    def architecture(cls) -> str:
        return "fast_matryoshka_batchtopk"


class FastTopKTrainingSAE(SparseStep, TopKTrainingSAE):
    """sae_lens's TopK with a sparse step."""


class FastBatchTopKTrainingSAE(SparseBatchStep, BatchTopKTrainingSAE):
    """sae_lens's BatchTopK with a sparse step."""


class FastMatryoshkaBatchTopKTrainingSAE(SparseBatchStep, MatryoshkaBatchTopKTrainingSAE):
    """sae_lens's Matryoshka BatchTopK with a sparse step."""


FAST: dict[str, tuple[type[TrainingSAE[Any]], type[TrainingSAEConfig]]] = {
    "fast_topk": (FastTopKTrainingSAE, FastTopKTrainingSAEConfig),
    "fast_batchtopk": (FastBatchTopKTrainingSAE, FastBatchTopKTrainingSAEConfig),
    "fast_matryoshka_batchtopk": (FastMatryoshkaBatchTopKTrainingSAE, FastMatryoshkaBatchTopKTrainingSAEConfig),
}
"""Class and config by architecture name."""


def stock_name(architecture: str) -> str:
    """The name of sae_lens's own architecture."""
    return architecture.removeprefix(PREFIX)


def stock_form(sae: TrainingSAE[Any]) -> TrainingSAE[Any]:
    """A fast SAE as sae_lens's own class, with copies of its weights: `stock_form(sae).save_model(folder)` writes a
    training checkpoint that needs nothing of this package."""
    stock_class, config_class = get_sae_training_class(stock_name(sae.cfg.architecture()))
    facts = sae.cfg.to_dict() | {"architecture": config_class.architecture()}
    stock: TrainingSAE[Any] = stock_class(config_class.from_dict(facts))
    stock.load_state_dict(sae.state_dict())
    return stock
