"""Gemma 4 as a first-class model in SAELens.

    import sae_lens_gemma4 as g4

registers everything: `SAE.from_pretrained` knows the catalogue, sae_lens's configs take the model classes of
this package. The names below are imported when first used, so that the import itself costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sae_lens_gemma4.plugin import register, unregister

if TYPE_CHECKING:
    from sae_lens_gemma4 import testing as testing
    from sae_lens_gemma4.activations.corpus import Corpus as Corpus
    from sae_lens_gemma4.activations.corpus import build_corpus as build_corpus
    from sae_lens_gemma4.activations.sources import Source as Source
    from sae_lens_gemma4.catalogue.converter import converter as converter
    from sae_lens_gemma4.catalogue.labels import FeatureLabel as FeatureLabel
    from sae_lens_gemma4.catalogue.labels import iter_feature_labels as iter_feature_labels
    from sae_lens_gemma4.catalogue.labels import load_feature_labels as load_feature_labels
    from sae_lens_gemma4.catalogue.registry import Release as Release
    from sae_lens_gemma4.catalogue.registry import releases as releases
    from sae_lens_gemma4.errors import Gemma4SAEError as Gemma4SAEError
    from sae_lens_gemma4.evaluation.accumulators import ReconstructionAccumulator as ReconstructionAccumulator
    from sae_lens_gemma4.evaluation.compare import ComparisonReport as ComparisonReport
    from sae_lens_gemma4.evaluation.compare import compare_saes as compare_saes
    from sae_lens_gemma4.evaluation.evaluate import evaluate_sae as evaluate_sae
    from sae_lens_gemma4.evaluation.evaluate import evaluate_saes as evaluate_saes
    from sae_lens_gemma4.evaluation.intervals import Sampling as Sampling
    from sae_lens_gemma4.evaluation.metrics import ReconstructionMetrics as ReconstructionMetrics
    from sae_lens_gemma4.evaluation.protocol import Protocol as Protocol
    from sae_lens_gemma4.evaluation.protocol import load_protocol as load_protocol
    from sae_lens_gemma4.evaluation.protocol import protocols as protocols
    from sae_lens_gemma4.evaluation.result import SAEEvaluation as SAEEvaluation
    from sae_lens_gemma4.interp.contrasts.contrast import contrast as contrast
    from sae_lens_gemma4.interp.labels.files import read_labels as read_labels
    from sae_lens_gemma4.interp.labels.files import write_labels as write_labels
    from sae_lens_gemma4.interp.labels.labelling import label_latents as label_latents
    from sae_lens_gemma4.interp.labels.verification import verify_labels as verify_labels
    from sae_lens_gemma4.interp.layers.lens import logit_lens as logit_lens
    from sae_lens_gemma4.interp.layers.profile import profile_layers as profile_layers
    from sae_lens_gemma4.interp.pairs.probing import probe_pairs as probe_pairs
    from sae_lens_gemma4.interp.steering.extractors import register_extractor as register_extractor
    from sae_lens_gemma4.interp.steering.run import steer as steer
    from sae_lens_gemma4.models.bridge import Gemma4Bridge as Gemma4Bridge
    from sae_lens_gemma4.models.cache import decompose_residual as decompose_residual
    from sae_lens_gemma4.models.cache import logit_attribution as logit_attribution
    from sae_lens_gemma4.models.geometry import gemma4_geometry as gemma4_geometry
    from sae_lens_gemma4.models.loading import load_model as load_model
    from sae_lens_gemma4.models.proxy import Gemma4ProxyLM as Gemma4ProxyLM
    from sae_lens_gemma4.neuronpedia.dashboards import build_dashboards as build_dashboards
    from sae_lens_gemma4.neuronpedia.export import export_neuronpedia as export_neuronpedia
    from sae_lens_gemma4.neuronpedia.folder import Dashboards as Dashboards
    from sae_lens_gemma4.neuronpedia.upload import upload_neuronpedia as upload_neuronpedia
    from sae_lens_gemma4.neuronpedia.writing import DashboardSettings as DashboardSettings
    from sae_lens_gemma4.training.config import ContinueTrainingConfig as ContinueTrainingConfig
    from sae_lens_gemma4.training.evaluator import HeldOutEvaluator as HeldOutEvaluator
    from sae_lens_gemma4.training.fast import FastBatchTopKTrainingSAEConfig as FastBatchTopKTrainingSAEConfig
    from sae_lens_gemma4.training.fast import (
        FastMatryoshkaBatchTopKTrainingSAEConfig as FastMatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens_gemma4.training.fast import FastTopKTrainingSAEConfig as FastTopKTrainingSAEConfig
    from sae_lens_gemma4.training.fast import stock_form as stock_form
    from sae_lens_gemma4.training.records import ContinueTrainingResult as ContinueTrainingResult
    from sae_lens_gemma4.training.restore import restore_training_sae as restore_training_sae
    from sae_lens_gemma4.training.runner import ContinueTrainingRunner as ContinueTrainingRunner
    from sae_lens_gemma4.training.stock import from_runner_config as from_runner_config
    from sae_lens_gemma4.training.trainer import SparseTrainer as SparseTrainer

__version__ = "0.1.0"

_HOMES = {
    "Corpus": "activations.corpus",
    "build_corpus": "activations.corpus",
    "FeatureLabel": "catalogue.labels",
    "iter_feature_labels": "catalogue.labels",
    "load_feature_labels": "catalogue.labels",
    "converter": "catalogue.converter",
    "Release": "catalogue.registry",
    "releases": "catalogue.registry",
    "Gemma4SAEError": "errors",
    "ReconstructionAccumulator": "evaluation.accumulators",
    "ReconstructionMetrics": "evaluation.metrics",
    "SAEEvaluation": "evaluation.result",
    "evaluate_sae": "evaluation.evaluate",
    "ComparisonReport": "evaluation.compare",
    "HeldOutEvaluator": "training.evaluator",
    "Protocol": "evaluation.protocol",
    "Sampling": "evaluation.intervals",
    "Source": "activations.sources",
    "compare_saes": "evaluation.compare",
    "evaluate_saes": "evaluation.evaluate",
    "load_protocol": "evaluation.protocol",
    "protocols": "evaluation.protocol",
    "contrast": "interp.contrasts.contrast",
    "read_labels": "interp.labels.files",
    "write_labels": "interp.labels.files",
    "label_latents": "interp.labels.labelling",
    "verify_labels": "interp.labels.verification",
    "logit_lens": "interp.layers.lens",
    "profile_layers": "interp.layers.profile",
    "probe_pairs": "interp.pairs.probing",
    "register_extractor": "interp.steering.extractors",
    "steer": "interp.steering.run",
    "Gemma4Bridge": "models.bridge",
    "decompose_residual": "models.cache",
    "logit_attribution": "models.cache",
    "gemma4_geometry": "models.geometry",
    "load_model": "models.loading",
    "Gemma4ProxyLM": "models.proxy",
    "DashboardSettings": "neuronpedia.writing",
    "Dashboards": "neuronpedia.folder",
    "build_dashboards": "neuronpedia.dashboards",
    "export_neuronpedia": "neuronpedia.export",
    "upload_neuronpedia": "neuronpedia.upload",
    "ContinueTrainingConfig": "training.config",
    "restore_training_sae": "training.restore",
    "ContinueTrainingResult": "training.records",
    "ContinueTrainingRunner": "training.runner",
    "from_runner_config": "training.stock",
    "FastBatchTopKTrainingSAEConfig": "training.fast",
    "FastMatryoshkaBatchTopKTrainingSAEConfig": "training.fast",
    "FastTopKTrainingSAEConfig": "training.fast",
    "SparseTrainer": "training.trainer",
    "stock_form": "training.fast",
}
__all__ = ["__version__", "register", "testing", "unregister", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("sae_lens_gemma4.testing")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"sae_lens_gemma4.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register()
