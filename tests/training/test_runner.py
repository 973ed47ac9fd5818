"""The main job on the embedded pair, small, and its parts against stock."""

import copy
import dataclasses
import shutil

import pytest
import torch
import yaml
from sae_lens import SAE, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.embedded import MODELS, TOKENIZER
from sae_lens_gemma4.errors import ConfigError, DataError, SAEError, UnknownNameError
from sae_lens_gemma4.mapping import from_mapping
from sae_lens_gemma4.training.config import (
    ContinueTrainingConfig,
    Model,
    WarmStart,
)
from sae_lens_gemma4.training.restore import load_sae, restore_training_sae
from sae_lens_gemma4.training.runner import ContinueTrainingRunner
from tests.support import RELEASE, SAE_ID, config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cfg = config(tmp_path_factory.mktemp("run") / "sae")
    return cfg, ContinueTrainingRunner(cfg, progress=False).run()


def test_the_collapsed_sae_recovers(run):
    _, result = run
    before, after = result.before["chat"].metrics, result.after["chat"].metrics
    assert before.verdict == "misfit"
    assert before.ve < 0
    assert after.ve > before.ve + 0.5
    assert after.l0 < before.l0 / 2


def test_what_is_saved_is_what_was_measured(run):
    cfg, result = run
    saved = SAE.load_from_disk(result.path)
    for name, tensor in result.sae.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name
    metadata = saved.cfg.metadata
    assert metadata.model_name == "gemma-4-demo-it-rescaled"
    assert metadata.model_class_name == "Gemma4ProxyLM"
    assert metadata.hook_name == "blocks.3.hook_resid_post"
    assert metadata.hf_hook_name == "model.language_model.layers.3"
    assert metadata.context_size == 64
    assert metadata.continued_from["release"] == RELEASE
    assert metadata.continued_from["model_name"] == "gemma-4-demo"
    assert metadata.continued_tokens == result.tokens == 60 * 512
    assert metadata.training_architecture == "matryoshka_batchtopk"
    assert from_mapping(ContinueTrainingConfig, yaml.safe_load((result.path / "recipe.yaml").read_text()), "r") == cfg
    sparsity = load_file(result.path / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (2048,)
    assert float((10 ** sparsity.double()).sum()) == pytest.approx(16, rel=0.02)  # k active a token


def test_history_has_the_steps_that_were_asked_for(run):
    _, result = run
    assert [row["tokens"] for row in result.history] == [512 * (s + 1) for s in (0, 10, 20, 30, 40, 50, 59)]
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert all(row["l0"] == pytest.approx(16, abs=0.01) for row in result.history)


def test_the_same_seed_gives_the_same_bits(run, tmp_path):
    cfg, result = run
    state = torch.random.get_rng_state()
    again = ContinueTrainingRunner(dataclasses.replace(cfg, output=str(tmp_path / "b")), progress=False).run()
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in result.sae.state_dict().items():
        assert torch.equal(again.sae.state_dict()[name], tensor), name
    other = ContinueTrainingRunner(dataclasses.replace(cfg, output=str(tmp_path / "c"), seed=4), progress=False).run()
    assert not torch.equal(other.sae.W_enc, result.sae.W_enc)


def test_the_steps_are_stock_s(tmp_path):
    """The same batches through stock's own `fit` give the same weights."""
    cfg = config(tmp_path / "a", tokens=8 * 256, batch_size=256)
    model = g4.load_model("gemma-4-demo-it-rescaled", "Gemma4ProxyLM")
    runner = ContinueTrainingRunner(cfg, progress=False)
    train, _ = runner._corpora(model)
    torch.manual_seed(cfg.seed)
    stream = runner._stream(model, train, "blocks.3.hook_resid_post")
    batches = [next(stream) for _ in range(8)]
    sae = restore_training_sae(RELEASE, SAE_ID)
    trainer = SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=8 * 256,
            device="cpu", autocast=False, lr=1e-3, lr_end=1e-4, lr_scheduler_name="cosineannealing", lr_warm_up_steps=0,
            adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=256,
            dead_feature_window=30, feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
        ),
        sae, iter(batches),
    )  # fmt: skip
    trainer.fit()
    ours = ContinueTrainingRunner(cfg, model=model, progress=False).run().sae
    sae.save_inference_model(tmp_path / "stock")
    theirs = SAE.load_from_disk(tmp_path / "stock")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


def test_a_folder_is_a_start_too(run, tmp_path):
    cfg, result = run
    start = WarmStart(path=str(result.path), settings={"k": 8})
    cfg = dataclasses.replace(cfg, warm_start=start, output=str(tmp_path / "b"))
    cfg = dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, tokens=1024))
    again = ContinueTrainingRunner(cfg, progress=False).run()
    assert again.history[-1]["l0"] == pytest.approx(8, abs=0.01)
    assert again.sae.cfg.metadata.continued_from["path"] == str(result.path)


def test_an_interrupted_run_leaves_no_half_written_sae(tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "old").write_text("kept")
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    monkeypatch.setattr("sae_lens.saes.sae.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ContinueTrainingRunner(config(tmp_path / "sae", tokens=512), progress=False).run()
    assert [f.name for f in tmp_path.iterdir()] == ["sae"]
    assert (tmp_path / "sae" / "old").read_text() == "kept"


def changed(cfg, **parts):
    return dataclasses.replace(cfg, **{k: dataclasses.replace(getattr(cfg, k), **v) for k, v in parts.items()})


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"warm_start": {"release": "gemma-4-demo-res-matryoshka-embeded"}}, UnknownNameError, "release or folder"),
        ({"warm_start": {"sae_id": "layer_3"}}, UnknownNameError, "layer_3_width_2k_l0_16"),
        ({"warm_start": {"settings": {"kk": 3}}}, UnknownNameError, "setting of matryoshka_batchtopk 'kk'"),
        ({"model": {"name": "gemma-4-dmo"}}, g4.Gemma4SAEError, "gemma-4-demo"),
        ({"model": {"class_name": "Gemma4Proxy"}}, UnknownNameError, "Gemma4ProxyLM"),
        ({"model": {"hook_name": "blocks.3.hook_resid_pots"}}, UnknownNameError, "blocks.3.hook_resid_post"),
        ({"model": {"hook_name": "blocks.3.mlp.hook_out_"}}, UnknownNameError, "hook"),
        ({"model": {"kwargs": {"nonsense": 1}}}, g4.Gemma4SAEError, "nonsense"),
        ({"data": {"train": [Source(dataset="embedded:chats")]}}, UnknownNameError, "embedded:chat"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(tmp_path, monkeypatch, parts, error, message):
    monkeypatch.setattr(SAETrainer, "step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(error, match=message):
        ContinueTrainingRunner(changed(config(tmp_path / "sae"), **parts), progress=False).run()
    assert not (tmp_path / "sae").exists()


def test_held_out_text_that_is_trained_on_is_refused(tmp_path):
    source = Source(dataset="embedded:chat", tokens=2000)
    cfg = changed(config(tmp_path / "sae"), data={"train": [source], "heldout": [source]})
    with pytest.raises(DataError, match=r"blocks of held-out corpus .* are in the training text"):
        ContinueTrainingRunner(cfg, progress=False).run()
    twice = changed(cfg, data={"heldout": [dataclasses.replace(source, split="heldout")] * 2})
    with pytest.raises(ConfigError, match="Two sources are named"):
        ContinueTrainingRunner(twice, progress=False).run()


def test_another_width_is_refused(tmp_path):
    cfg = changed(config(tmp_path / "sae"), model={"hook_name": "model.layers.3.mlp.gate_proj"})
    with pytest.raises(SAEError, match="wide; this SAE reads 96"):
        ContinueTrainingRunner(cfg, progress=False).run()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    load = load_sae(RELEASE, SAE_ID)
    broken = copy.deepcopy(load)
    with torch.no_grad():
        broken.W_enc.mul_(float("inf"))
    monkeypatch.setattr("sae_lens_gemma4.training.runner.load_sae", lambda *_a, **_k: broken)
    with pytest.raises(DataError, match="not finite"):
        ContinueTrainingRunner(config(tmp_path / "sae"), progress=False).run()


def test_corpora_can_be_given_and_the_record_follows_them(tmp_path):
    model = g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM")
    corpora = {
        name: build_corpus("embedded:text", model.tokenizer, context_size=32, split=split, max_tokens=3000)
        for name, split in (("train", "train"), ("own", "heldout"))
    }
    cfg = config(tmp_path / "sae", tokens=512)
    result = ContinueTrainingRunner(cfg, model=model, corpora=corpora, progress=False).run()
    assert set(result.after) == {"own"}
    metadata = result.sae.cfg.metadata
    assert metadata.model_name == "gemma-4-demo-it"
    assert metadata.context_size == 32
    assert metadata.dataset_path == "embedded:text [train]"
    assert not (result.path / "recipe.yaml").exists()


def test_a_model_class_of_stock_s_trains_too(tmp_path):
    """Stock's proxy knows module paths only; what is saved says so."""
    shutil.copytree(MODELS["gemma-4-demo-it"].path, tmp_path / "m")
    shutil.copytree(TOKENIZER, tmp_path / "m", dirs_exist_ok=True)
    model = Model(
        name=str(tmp_path / "m"),
        class_name="AutoModelForCausalLM",
        hook_name="model.layers.3",
        kwargs={"dtype": "float32"},
    )
    cfg = dataclasses.replace(config(tmp_path / "a", tokens=1024), model=model)
    metadata = (result := ContinueTrainingRunner(cfg, progress=False).run()).sae.cfg.metadata
    assert metadata.hook_name == "model.layers.3"
    assert metadata.model_class_name == "AutoModelForCausalLM"
    assert metadata.hf_hook_name is None
    ours = ContinueTrainingRunner(config(tmp_path / "b", model="gemma-4-demo-it", tokens=1024), progress=False).run()
    torch.testing.assert_close(ours.sae.W_enc, result.sae.W_enc, rtol=1e-4, atol=1e-6)


def test_what_was_trained_is_saved_before_it_is_measured(tmp_path, monkeypatch):
    runner = ContinueTrainingRunner(config(tmp_path / "sae", tokens=512), progress=False)
    evaluate, calls = runner._evaluate, []

    def fail_the_second_time(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(runner, "_evaluate", fail_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert SAE.load_from_disk(tmp_path / "sae").cfg.metadata.continued_tokens == 512


def test_a_config_that_no_recipe_can_say_is_refused_first(tmp_path):
    cfg = changed(config(tmp_path / "sae"), model={"kwargs": {"dtype": torch.float32}})
    with pytest.raises(ConfigError, match=r"cannot be kept as a recipe: .* torch\.float32"):
        ContinueTrainingRunner(cfg, progress=False).run()


def test_an_output_that_would_lose_something_is_refused_first(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other things in it"):
        ContinueTrainingRunner(config(tmp_path), progress=False).run()
