"""The main job on the embedded pair, small, and its parts against stock."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
import yaml
from sae_lens import SAE, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.embedded import MODELS, TOKENIZER
from sae_lens_gemma4.errors import ConfigError, DataError, SAEError, UnknownNameError
from sae_lens_gemma4.mapping import from_mapping
from sae_lens_gemma4.training.calibration import Calibration
from sae_lens_gemma4.training.config import Activations, ContinueTrainingConfig, Model, Monitoring, SAEForm, WarmStart
from sae_lens_gemma4.training.loop import Loop
from sae_lens_gemma4.training.phases import Gate, Phase, Training
from sae_lens_gemma4.training.restore import load_sae
from sae_lens_gemma4.training.runner import ContinueTrainingRunner
from tests.support import RELEASE, SAE_ID, config

HOOK = "blocks.3.hook_resid_post"


def run_of(cfg, **arguments):
    options = {name: arguments.pop(name) for name in ("resume", "replace") if name in arguments}
    return ContinueTrainingRunner(cfg, progress=False, **arguments).run(**options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    gate = Gate(min_ve=0.2)
    cfg = config(
        tmp_path_factory.mktemp("run") / "run", gate=gate, monitoring=Monitoring(log_every=10, evaluate_every=30)
    )
    return cfg, run_of(cfg)


def test_the_collapsed_sae_recovers(run):
    _, result = run
    before, after = (getattr(result.only, state)["chat"].metrics for state in ("before", "after"))
    assert before.verdict == "misfit"
    assert before.ve < 0
    assert after.ve > before.ve + 0.5
    assert after.l0 < before.l0 / 2
    [comparison] = result.only.comparisons()
    assert comparison.differences()["ve"].interval[0] > 0.5


def test_what_is_saved_is_what_was_measured(run):
    cfg, result = run
    only = result.only
    assert only.path == result.path / "sae"
    saved = SAE.load_from_disk(only.path)
    for name, tensor in only.sae.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name
    metadata = saved.cfg.metadata
    assert metadata.model_name == "gemma-4-demo-it-rescaled"
    assert metadata.model_class_name == "Gemma4ProxyLM"
    assert metadata.hook_name == HOOK
    assert metadata.hf_hook_name == "model.language_model.layers.3"
    assert metadata.context_size == 64
    assert metadata.continued_from["release"] == RELEASE
    assert metadata.continued_from["model_name"] == "gemma-4-demo"
    assert metadata.continued_tokens == result.tokens == 60 * 512
    assert metadata.training_architecture == "matryoshka_batchtopk"
    lineage = metadata.training_run
    assert [corpus["first_document"] for corpus in lineage["data"]["train"]] == [0]
    assert lineage["phases"][0]["steps"] == 60 and lineage["incidents"] == []
    text = (result.path / "recipe.yaml").read_text()
    assert from_mapping(ContinueTrainingConfig, yaml.safe_load(text), "r") == cfg


def test_sparsity_is_how_often_each_latent_fires_on_held_out_text(run):
    _, result = run
    model = g4.load_model("gemma-4-demo-it-rescaled", "Gemma4ProxyLM")
    corpus = build_corpus("embedded:chat", model.tokenizer, context_size=64, split="heldout", max_tokens=1500)
    with torch.no_grad():
        fired_f = sum((result.only.sae.encode(b.acts[HOOK]) > 0).sum(0) for b in harvest(model, corpus, [HOOK]))
    saved_f = load_file(result.only.path / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(saved_f, (fired_f.double() / corpus.n_tokens + 1e-10).log10().float())
    assert int((saved_f == -10).sum()) == result.only.after["chat"].metrics.dead


def test_the_record_has_every_figure(run):
    _, result = run
    only = result.only
    document = json.loads((only.path / "result.json").read_text())
    assert document["after"]["chat"] == json.loads(json.dumps(only.after["chat"].to_dict()))
    assert document["gate"]["passed"] and only.gate.passed and result.passed
    assert [row["step"] for row in document["history"]] == [1, 10, 20, 30, 40, 50, 60]
    assert document["history"][-1]["loss"] < document["history"][0]["loss"]
    assert all(row["l0"] == pytest.approx(16, abs=0.01) for row in document["history"])
    assert [row["step"] for row in document["evaluations"]] == [0, 30, 60]
    first, _, last = (row["corpora"]["chat"] for row in document["evaluations"])
    assert first["ve"] == pytest.approx(only.before["chat"].metrics.ve, rel=1e-6)
    assert last["ve"] == pytest.approx(only.after["chat"].metrics.ve, rel=1e-9)
    rows = [json.loads(line) for line in (result.path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "training"] == [1, 10, 20, 30, 40, 50, 60]
    assert [row["corpora"]["chat"]["ve"] for row in rows if row["kind"] == "heldout"][-1] == last["ve"]
    assert sorted(p.name for p in result.path.iterdir()) == ["log.jsonl", "recipe.yaml", "sae"]


def test_the_same_seed_gives_the_same_bits(tmp_path):
    cfg = config(tmp_path / "a", tokens=4096)
    result = run_of(cfg)
    state = torch.random.get_rng_state()
    again = run_of(dataclasses.replace(cfg, output=str(tmp_path / "b"))).only
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in result.only.sae.state_dict().items():
        assert torch.equal(again.sae.state_dict()[name], tensor), name
    other = run_of(dataclasses.replace(cfg, output=str(tmp_path / "c"), seed=4)).only
    assert not torch.equal(other.sae.W_enc, result.only.sae.W_enc)


def batches(cfg, n):
    """The first batches of a run, by a second stream."""
    loop = Loop(ContinueTrainingRunner(cfg, progress=False).prepare(), None, None, False)
    loop.start(None)
    return [next(loop.stream)[HOOK] for _ in range(n)]


def test_the_steps_are_stock_s(tmp_path):
    """The same batches through stock's own class and `fit` give the same weights, up to what is rounded off."""
    cfg = config(tmp_path / "a", tokens=8 * 256, batch_size=256)
    stock = g4.restore_training_sae(RELEASE, SAE_ID)
    stock_class, _ = get_sae_training_class(stock.cfg.architecture())
    weights, stock = stock.state_dict(), stock_class(stock.cfg)
    stock.load_state_dict(weights)
    trainer = SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=8 * 256,
            device="cpu", autocast=False, lr=1e-3, lr_end=1e-4, lr_scheduler_name="cosineannealing", lr_warm_up_steps=0,
            adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=256,
            dead_feature_window=30, feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
        ),
        stock, iter(batches(cfg, 8)),
    )  # fmt: skip
    trainer.fit()
    ours, start = run_of(cfg).only.sae, load_sae(RELEASE, SAE_ID)
    stock.save_inference_model(tmp_path / "stock")
    theirs = SAE.load_from_disk(tmp_path / "stock")
    for name, tensor in ours.state_dict().items():
        moved = float((tensor - start.state_dict()[name]).norm())
        assert moved > 0.01 and float((theirs.state_dict()[name] - tensor).norm()) < 1e-4 * moved, name


def test_a_folder_is_a_start_too(run, tmp_path):
    _, result = run
    cfg = config(
        tmp_path / "b",
        tokens=1024,
        warm_start=WarmStart(path=str(result.only.path)),
        sae=SAEForm(settings={"k": 8}),
    )
    again = run_of(cfg).only
    assert again.history[-1]["l0"] == pytest.approx(8, abs=0.01)
    assert again.sae.cfg.metadata.continued_from["path"] == str(result.only.path)


def test_a_new_sae_is_one_without_a_warm_start(tmp_path):
    form = SAEForm(hook_name=HOOK, architecture="topk", d_sae=128, k_aux=16, settings={"k": 8})
    cfg = config(tmp_path / "a", warm_start=None, sae=form, calibration=Calibration(tokens=2000), model="gemma-4-demo")
    only = run_of(cfg).only
    assert only.before == {} and only.comparisons() == []
    assert only.after["chat"].metrics.l0 == pytest.approx(8, abs=0.1)
    assert only.sae.cfg.architecture() == "topk" and only.sae.cfg.metadata.continued_from is None
    assert only.history[-1]["ve"] > only.history[0]["ve"] + 0.1


def test_several_layers_in_one_run_are_the_single_runs(tmp_path):
    """The same batches, one forward for all: each SAE is as if it had been alone."""
    form = SAEForm(hook_name="blocks.{layer}.hook_resid_post", architecture="batchtopk", d_sae=96, settings={"k": 8})
    saes = [{"layer": n} for n in (1, 3, 5)]
    shared = {"warm_start": None, "sae": form, "model": "gemma-4-demo", "tokens": 12 * 256, "batch_size": 256}
    shared["activations"] = Activations(batch_size=256, buffer_blocks=16)
    together = run_of(config(tmp_path / "all", saes=saes, **shared))
    assert list(together.saes) == ["layer_1", "layer_3", "layer_5"]
    for entry in saes:
        name = f"layer_{entry['layer']}"
        alone = run_of(config(tmp_path / name, saes=[entry], **shared)).only
        for key, tensor in alone.sae.state_dict().items():
            torch.testing.assert_close(together.saes[name].sae.state_dict()[key], tensor, rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match="several SAEs, layer_1, layer_3, layer_5"):
        _ = together.only


def test_saes_have_phases_and_gates_of_their_own(tmp_path):
    polish = {"phases": [{"tokens": 1024}, {"name": "polish", "tokens": 512, "start": "best", "lr": 1e-5}]}
    saes = [{"name": "a"}, {"name": "b", "training": polish, "gate": {"min_ve": 0.99}}]
    monitoring = Monitoring(evaluate_every=2)
    cfg = config(
        tmp_path / "run", tokens=1024, batch_size=256, saes=saes, monitoring=monitoring, gate=Gate(min_ve=-1e6)
    )
    result = run_of(cfg)
    a, b = result.saes.values()
    assert (a.history[-1]["step"], b.history[-1]["step"]) == (4, 6)
    [polished] = [event for event in b.events if event["kind"] == "phase"]
    assert polished["best"] == max(row["corpora"]["chat"]["ve"] for row in b.evaluations if row["step"] <= 4)
    assert a.gate.passed and not b.gate.passed and not result.passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_activations_are_the_streamed_ones(tmp_path, dtype):
    plain = Activations(batch_size=256, dtype=dtype)
    data = dataclasses.replace(config("x").data, train=[Source(dataset="embedded:chat", tokens=4000)])
    shared = {"data": data, "training": Training(phases=[Phase(epochs=1.5, lr=1e-3)])}
    streamed = run_of(config(tmp_path / "a", activations=plain, **shared)).only
    cache = dataclasses.replace(plain, cache=str(tmp_path / "cache"))
    for folder in ("b", "c"):  # the second opens what the first wrote
        cached = run_of(config(tmp_path / folder, activations=cache, **shared)).only
        assert torch.equal(cached.sae.W_dec, streamed.sae.W_dec)


def changed(cfg, **parts):
    return dataclasses.replace(cfg, **{k: dataclasses.replace(getattr(cfg, k), **v) for k, v in parts.items()})


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"warm_start": {"release": "gemma-4-demo-res-matryoshka-embeded"}}, UnknownNameError, "release or folder"),
        ({"warm_start": {"sae_id": "layer_3"}}, UnknownNameError, "layer_3_width_2k_l0_16"),
        ({"sae": {"settings": {"kk": 3}}}, UnknownNameError, "setting of matryoshka_batchtopk 'kk'"),
        ({"sae": {"settings": {"k": 4096}}}, SAEError, r"k must lie in 1\.\.2048"),
        ({"sae": {"architecture": "topkk"}}, UnknownNameError, "'topk'"),
        ({"model": {"name": "gemma-4-dmo"}}, g4.Gemma4SAEError, "gemma-4-demo"),
        ({"model": {"class_name": "Gemma4Proxy"}}, UnknownNameError, "Gemma4ProxyLM"),
        ({"sae": {"hook_name": "blocks.3.hook_resid_pots"}}, UnknownNameError, "blocks.3.hook_resid_post"),
        ({"sae": {"hook_name": "blocks.3.mlp.hook_out_"}}, UnknownNameError, "hook"),
        ({"sae": {"hook_name": "model.layers.3.mlp.gate_proj"}}, SAEError, "wide; SAE 'sae' reads 96"),
        ({"model": {"kwargs": {"nonsense": 1}}}, g4.Gemma4SAEError, "nonsense"),
        ({"data": {"train": [Source(dataset="embedded:chats")]}}, UnknownNameError, "embedded:chat"),
        ({"data": {"train": [Source(texts=[""])]}}, DataError, "holds no text"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(tmp_path, monkeypatch, parts, error, message):
    monkeypatch.setattr(SAETrainer, "step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(error, match=message):
        run_of(changed(config(tmp_path / "run"), **parts))
    assert not (tmp_path / "run").exists()


def test_held_out_text_that_is_trained_on_is_refused(tmp_path):
    source = Source(dataset="embedded:chat", tokens=2000)
    cfg = changed(config(tmp_path / "run"), data={"train": [source], "heldout": [source]})
    with pytest.raises(DataError, match="held-out corpus"):
        run_of(cfg)
    streamed = changed(cfg, data={"shard_blocks": 8})
    with pytest.raises(DataError, match="held-out corpus"):
        run_of(streamed)
    assert not (tmp_path / "run").exists()
    twice = changed(cfg, data={"heldout": [dataclasses.replace(source, split="heldout")] * 2})
    with pytest.raises(ConfigError, match="Two sources are named"):
        run_of(twice)


def test_a_streamed_text_trains_without_end(tmp_path):
    cfg = changed(config(tmp_path / "run", tokens=40 * 512), data={"shard_blocks": 32})
    only = run_of(cfg).only
    assert only.history[-1]["ve"] > only.history[0]["ve"]
    epochs = dataclasses.replace(cfg, training=Training(phases=[Phase(epochs=1)]), output=str(tmp_path / "b"))
    with pytest.raises(ConfigError, match="a streamed text has none"):
        run_of(epochs)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    broken = copy.deepcopy(load_sae(RELEASE, SAE_ID))
    with torch.no_grad():
        broken.W_enc.mul_(float("inf"))
    monkeypatch.setattr("sae_lens_gemma4.training.preparing.load_sae", lambda *_a, **_k: broken)
    with pytest.raises(DataError, match=r"not finite|is nan at step 1"):
        run_of(config(tmp_path / "run"))


def test_corpora_can_be_given_and_the_record_follows_them(tmp_path):
    model = g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM")
    corpora = {
        name: build_corpus("embedded:text", model.tokenizer, context_size=32, split=split, max_tokens=3000)
        for name, split in (("train", "train"), ("own", "heldout"))
    }
    result = run_of(config(tmp_path / "run", tokens=512), model=model, corpora=corpora)
    assert set(result.only.after) == {"own"}
    metadata = result.only.sae.cfg.metadata
    assert metadata.model_name == "gemma-4-demo-it"
    assert metadata.context_size == 32
    assert metadata.dataset_path == "embedded:text [train]"
    assert not (result.path / "recipe.yaml").exists()


def test_a_model_class_of_stock_s_trains_too(tmp_path):
    """Stock's proxy knows module paths only; what is saved says so."""
    shutil.copytree(MODELS["gemma-4-demo-it"].path, tmp_path / "m")
    shutil.copytree(TOKENIZER, tmp_path / "m", dirs_exist_ok=True)
    model = Model(name=str(tmp_path / "m"), class_name="AutoModelForCausalLM", kwargs={"dtype": "float32"})
    form = SAEForm(hook_name="model.layers.3")
    cfg = dataclasses.replace(config(tmp_path / "a", tokens=1024), model=model, sae=form)
    metadata = (result := run_of(cfg).only).sae.cfg.metadata
    assert metadata.hook_name == "model.layers.3"
    assert metadata.model_class_name == "AutoModelForCausalLM"
    assert metadata.hf_hook_name is None
    ours = run_of(config(tmp_path / "b", model="gemma-4-demo-it", tokens=1024)).only
    torch.testing.assert_close(ours.sae.W_enc, result.sae.W_enc, rtol=1e-4, atol=1e-6)


def test_a_config_that_no_recipe_can_say_is_refused_first(tmp_path):
    cfg = changed(config(tmp_path / "run"), model={"kwargs": {"dtype": torch.float32}})
    with pytest.raises(ConfigError, match=r"cannot be kept as a recipe: .* torch\.float32"):
        run_of(cfg)


def test_an_output_that_would_lose_something_is_refused_first(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other things in it"):
        run_of(config(tmp_path))
    cfg, _ = run
    with pytest.raises(ConfigError, match="holds a run"):
        run_of(cfg)
    with pytest.raises(ConfigError, match="finished"):
        run_of(cfg, resume=True)


def test_a_gate_about_k_needs_one(tmp_path):
    form = SAEForm(hook_name=HOOK, architecture="jumprelu", d_sae=64)
    cfg = config(tmp_path / "run", warm_start=None, sae=form, gate=Gate(l0_within=0.1))
    with pytest.raises(ConfigError, match=r"jumprelu SAE .'sae'. has none"):
        run_of(cfg)
