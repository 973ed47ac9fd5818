"""sae_lens's own runners and `run_evals` on all five shapes, in both classes, by either name of a hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import sae_lens.util
import torch
from datasets import Dataset, load_from_disk
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

import sae_lens_gemma4 as g4
from sae_lens_gemma4.embedded.text import documents
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.models.loading import MODEL_CLASSES
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4, tiny_tokenizer

HF_NAME, POST = "model.language_model.layers.2", "blocks.2.hook_resid_post"
CONTEXT = 16
pytestmark = pytest.mark.filterwarnings("ignore:Dataset is not tokenized", "ignore:The training dataset contains fewer")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each shape as a checkpoint with its tokenizer."""
    paths = {}
    for variant in VARIANTS:
        path = tmp_path_factory.mktemp(variant)
        tiny_gemma4(variant).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        paths[variant] = str(path)
    return paths


@pytest.fixture
def texts() -> Dataset:
    return Dataset.from_dict({"text": documents("train")[:40]})


def shared(folder: str, class_name: str) -> dict[str, Any]:
    return {"model_name": folder, "model_class_name": class_name, "context_size": CONTEXT, "device": "cpu"}


def sae_config() -> BatchTopKTrainingSAEConfig:
    return BatchTopKTrainingSAEConfig(d_in=64, d_sae=128, k=8)


every_shape = pytest.mark.parametrize("variant", VARIANTS)
both_classes = pytest.mark.parametrize("class_name", MODEL_CLASSES)


@every_shape
@both_classes
def test_training_saving_attaching_and_run_evals(
    tmp_path: Path, folders: dict[str, str], texts: Dataset, variant: str, class_name: str
) -> None:
    """The whole way of an SAE: what it says of itself leads back to its model's class and hook."""
    hook_name = HF_NAME if variant in ("ple", "moe") else POST
    cfg = LanguageModelSAERunnerConfig(
        sae=sae_config(),
        hook_name=hook_name,
        lr=1e-2,
        training_tokens=2048,
        train_batch_size_tokens=64,
        store_batch_size_prompts=4,
        n_batches_in_buffer=8,
        exclude_special_tokens=True,
        n_checkpoints=0,
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
        output_path=str(tmp_path),
        **shared(folders[variant], class_name),
    )
    LanguageModelSAETrainingRunner(cfg, override_dataset=texts).run()
    sae = SAE.load_from_disk(tmp_path)
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.hf_hook_name) == (POST, HF_NAME)
    model = g4.load_model(metadata.model_name, metadata.model_class_name)
    assert type(model).__name__ == class_name
    store = ActivationsStore.from_sae(
        model, sae, texts, context_size=CONTEXT, streaming=False, store_batch_size_prompts=4, train_batch_size_tokens=64
    )
    config = get_eval_everything_config(4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2)
    metrics, features = run_evals(sae, store, model, ActivationScaler(), config)  # type: ignore[arg-type]
    assert 0 < metrics["reconstruction_quality"]["explained_variance"] < 1
    assert 0 < metrics["sparsity"]["l0"] < 64
    assert metrics["model_behavior_preservation"]["kl_div_with_ablation"] > 0
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0
    assert len(features["feature_density"]) == 128
    bridge = g4.Gemma4Bridge.boot(metadata.model_name)
    tokens = store.get_batch_tokens(2)
    with torch.no_grad():
        _, cache = bridge.run_with_cache_with_saes(tokens, saes=sae)
        acts = model.run_with_cache(tokens, names_filter=[POST])[1][HF_NAME]
        torch.testing.assert_close(cache[f"{POST}.hook_sae_output"], sae(acts), rtol=1e-4, atol=1e-4)


@every_shape
@both_classes
def test_one_forward_feeds_several_saes(folders: dict[str, str], texts: Dataset, variant: str, class_name: str) -> None:
    hooks = {"resid": HF_NAME, "mid": "blocks.3.hook_resid_mid", "ff": "blocks.1.hook_mlp_out"}
    cfg = MultiSAETrainingRunnerConfig(
        saes={name: sae_config() for name in hooks},
        hook_names=hooks,
        training_tokens=512,
        train_batch_size_tokens=64,
        store_batch_size_prompts=4,
        n_batches_in_buffer=8,
        n_checkpoints=0,
        logger=LoggingConfig(log_to_wandb=False),
        output_path=None,
        **shared(folders[variant], class_name),
    )
    saes = MultiSAETrainingRunner(cfg, override_dataset=texts).run()
    found = {name: (sae.cfg.metadata.hook_name, sae.cfg.metadata.hf_hook_name) for name, sae in saes.items()}
    assert found == {
        "resid": (POST, HF_NAME),
        "mid": ("blocks.3.hook_resid_mid", None),
        "ff": ("blocks.1.hook_mlp_out", "model.language_model.layers.1.post_feedforward_layernorm"),
    }
    assert all(p.isfinite().all() for sae in saes.values() for p in sae.parameters())


def test_held_out_text_is_measured_for_each_of_several_saes(folders: dict[str, str], texts: Dataset) -> None:
    model = g4.load_model(folders["ple"], "Gemma4ProxyLM")
    heldout = g4.build_corpus(["Some text that is held out of training, and more of it. "] * 9, model.tokenizer,
                              context_size=CONTEXT)  # fmt: skip
    evaluator = g4.HeldOutEvaluator(model, {"text": heldout})
    cfg = MultiSAETrainingRunnerConfig(
        saes={"resid": sae_config(), "ff": sae_config()},
        hook_names={"resid": POST, "ff": "blocks.1.hook_mlp_out"},
        training_tokens=512,
        train_batch_size_tokens=64,
        store_batch_size_prompts=4,
        n_batches_in_buffer=8,
        n_checkpoints=0,
        logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=8, eval_every_n_wandb_logs=1),
        output_path=None,
        evaluator=evaluator,
        **shared(folders["ple"], "Gemma4ProxyLM"),
    )
    with (
        patch("sae_lens.training.multi_sae_trainer.wandb") as wandb,
        patch("sae_lens.multi_sae_training_runner.wandb"),
    ):
        MultiSAETrainingRunner(cfg, override_dataset=texts).run()
    logged = [call.args[0] for call in wandb.log.call_args_list if "resid/heldout/text/ve" in call.args[0]]
    assert len(logged) == 1
    assert logged[0]["ff/heldout/text/l0"] != logged[0]["resid/heldout/text/l0"]


@every_shape
@both_classes
def test_caching_activations(
    tmp_path: Path, folders: dict[str, str], texts: Dataset, variant: str, class_name: str
) -> None:
    """What is written are the activations of the tokens beside them, and a store reads them back."""
    hook_name = HF_NAME if variant in ("dense_keqv", "unified") else POST
    cfg = CacheActivationsRunnerConfig(
        dataset_path="",
        model_batch_size=4,
        hook_name=hook_name,
        d_in=64,
        training_tokens=512,
        new_cached_activations_path=str(tmp_path / "cache"),
        buffer_size_gb=1e-4,
        shuffle=False,
        **shared(folders[variant], class_name),
    )
    CacheActivationsRunner(cfg, override_dataset=texts).run()
    rows = load_from_disk(tmp_path / "cache").with_format("torch")[:4]
    model = g4.load_model(folders[variant], class_name)
    with torch.no_grad():
        acts = model.run_with_cache(rows["token_ids"].long(), names_filter=[POST])[1][POST]
    torch.testing.assert_close(rows[hook_name], acts, rtol=1e-5, atol=1e-5)


# --- what stock does to Gemma 4, mended (research: items 1 to 6)


def store_of(model: Any, texts: Any, **changes: Any) -> ActivationsStore:
    cfg: Any = LanguageModelSAERunnerConfig(
        sae=sae_config(),
        training_tokens=1024,
        train_batch_size_tokens=64,
        store_batch_size_prompts=4,
        n_batches_in_buffer=8,
        logger=LoggingConfig(log_to_wandb=False),
        **({"model_name": "tiny", "hook_name": POST, "context_size": CONTEXT, "device": "cpu"} | changes),
    )
    return ActivationsStore.from_config(model, cfg, override_dataset=texts)


@both_classes
def test_activations_come_in_the_model_s_dtype(folders: dict[str, str], texts: Dataset, class_name: str) -> None:
    model = g4.load_model(folders["ple"], class_name, dtype="bfloat16")
    store = store_of(model, texts)
    acts = store.get_activations(store.get_batch_tokens(2))
    assert acts.dtype == torch.bfloat16
    assert next(store).dtype == torch.bfloat16


@both_classes
def test_turn_markers_are_special(folders: dict[str, str], class_name: str) -> None:
    model = g4.load_model(folders["ple"], class_name)
    markers = set(model.tokenizer.convert_tokens_to_ids(["<bos>", "<eos>", "<|turn>", "<turn|>"]))
    assert markers <= set(sae_lens.util.get_special_token_ids(model.tokenizer))
    chats = Dataset.from_dict({"messages": [[{"role": "user", "content": text}] for text in documents("train")[:40]]})
    settings: dict[str, Any] = {"use_chat_formatting": True, "is_dataset_tokenized": False}
    store = store_of(model, chats, exclude_special_tokens=True, **settings)
    tokens = store.get_batch_tokens(8)
    assert torch.isin(tokens, torch.tensor(sorted(markers))).sum() > 8
    assert set(store.exclude_special_tokens.tolist()) >= markers  # type: ignore[union-attr]
    assert store_of(model, chats, exclude_special_tokens=False, **settings).exclude_special_tokens is None


def test_share_gpt_s_rows_are_not_rendered_empty(folders: dict[str, str]) -> None:
    model = g4.load_model(folders["ple"], "Gemma4ProxyLM")
    text = documents("train")[0][:200]
    settings: dict[str, Any] = {"use_chat_formatting": True, "is_dataset_tokenized": False}
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    store = store_of(model, Dataset.from_dict({"conversations": [turns] * 40}), context_size=64, **settings)
    assert text[:30] in model.tokenizer.decode(store.get_batch_tokens(1)[0])
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    tools = Dataset.from_dict({"messages": [[{"role": "user", "content": text}, call]] * 40})
    assert store_of(model, tools, **settings).get_batch_tokens(1).shape == (1, CONTEXT)
    spoilt = Dataset.from_dict({"conversations": [[{"speaker": "human", "value": text}]] * 40})
    with pytest.raises(DataError, match="chats need texts under 'role' and 'content'"):
        store_of(model, spoilt, **settings).get_batch_tokens(1)


@both_classes
def test_a_hook_without_a_batch_axis_is_not_harvested(folders: dict[str, str], texts: Dataset, class_name: str) -> None:
    """Stock broadcasts its rows over the positions."""
    model = g4.load_model(folders["moe"], class_name)
    store = store_of(model, texts, hook_name="model.layers.1.experts")
    with pytest.raises(DataError, match=r"model\.layers\.1\.experts has no batch axis"):
        store.get_activations(store.get_batch_tokens(2))


@pytest.mark.filterwarnings("ignore:isolate_documents. no BOS opens a second")
@both_classes
def test_no_bos_in_mid_context_and_arguments_reach_the_model(
    folders: dict[str, str], texts: Dataset, class_name: str
) -> None:
    model = g4.load_model(folders["ple"], class_name)
    store = store_of(model, texts, sequence_separator_token=None, model_kwargs={"isolate_documents": True})
    tokens = store.get_batch_tokens(16)
    assert (tokens[:, 0] == 2).all()
    assert not (tokens[:, 1:] == 2).any()
    packed = store_of(model, texts, model_kwargs={"isolate_documents": True})
    tokens = torch.cat([tokens[:, :8], tokens[:, :8]], dim=1)  # the second document is the first again
    torch.testing.assert_close(*packed.get_activations(tokens).split(8, dim=1), rtol=1e-5, atol=1e-5)
    a, b = store_of(model, texts).get_activations(tokens).split(8, dim=1)
    assert (a - b).abs().max() > 1e-2


def test_one_word_trains_fast_and_saves_the_same(tmp_path: Path, folders: dict[str, str], texts: Dataset) -> None:
    """The fast architecture in sae_lens's own runner, stopped and gone on with, against sae_lens's."""
    widths = {"k": 8, "matryoshka_widths": [32, 128], "d_in": 64, "d_sae": 128}
    saved = {}
    for config_class in (MatryoshkaBatchTopKTrainingSAEConfig, g4.FastMatryoshkaBatchTopKTrainingSAEConfig):
        for resumed in (False, True):
            out = tmp_path / f"{config_class.__name__}-{resumed}"
            cfg: dict[str, Any] = {
                **shared(folders["ple"], "Gemma4ProxyLM"),
                "hook_name": POST,
                "train_batch_size_tokens": 64,
                "n_batches_in_buffer": 8,
                "store_batch_size_prompts": 4,
                "lr": 1e-3,
                "logger": LoggingConfig(log_to_wandb=False),
                "save_final_checkpoint": True,
                "seed": 0,
            }
            torch.manual_seed(0)
            first = LanguageModelSAERunnerConfig(
                sae=config_class(**widths), training_tokens=512, checkpoint_path=str(out), **cfg
            )
            sae = LanguageModelSAETrainingRunner(first, override_dataset=texts).run()
            if resumed:
                (checkpoint,) = Path(first.checkpoint_path).glob("final_*")
                cfg["resume_from_checkpoint"] = str(checkpoint)
                torch.manual_seed(1)
                more = LanguageModelSAERunnerConfig(
                    sae=config_class(**widths), training_tokens=1024, checkpoint_path=str(out / "more"), **cfg
                )
                sae = LanguageModelSAETrainingRunner(more, override_dataset=texts).run()
            sae.save_inference_model(out / "saved")
            saved[config_class, resumed] = SAE.load_from_disk(out / "saved")
    for resumed in (False, True):
        stock, ours = (saved[config_class, resumed] for config_class in dict.fromkeys(c for c, _ in saved))
        assert type(ours) is type(stock)
        assert ours.cfg.metadata.training_architecture == stock.cfg.metadata.training_architecture
        for name, weights in stock.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], weights, rtol=1e-3, atol=1e-4)
    moved = saved[config_class, True].W_dec - saved[config_class, False].W_dec
    assert float(moved.norm()) > 0.01
