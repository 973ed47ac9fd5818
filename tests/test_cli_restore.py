"""`restore` as its user meets it."""

import json

import pytest
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAETrainingRunner, MatryoshkaBatchTopKTrainingSAE, TrainingSAE

from sae_lens_gemma4 import cli
from sae_lens_gemma4.embedded.text import documents
from sae_lens_gemma4.training.restore import inference_form, load_sae
from tests.support import RELEASE, SAE_ID, trained
from tests.test_stock_sae_lens import runner_config


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the entry point; returns exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr("sys.argv", ["sae-lens-gemma4", "restore", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            cli.main()
        return (e.value.code, *capsys.readouterr())

    return call


def test_a_release_becomes_a_folder_that_stock_goes_on_training(run, tmp_path):
    code, out, _ = run(RELEASE, SAE_ID, tmp_path / "base", "--set", "k=8")
    assert code == 0
    first, lost, path = out.splitlines()
    published = load_sae(RELEASE, SAE_ID)
    assert first.startswith(f"matryoshka_batchtopk, d_in {published.cfg.d_in}, d_sae {published.cfg.d_sae}, k 8, ")
    assert f"threshold {float(published.threshold[0].detach()):.4g}" in first
    assert "Adam" in lost
    assert path.endswith(str(tmp_path / "base"))
    stock = TrainingSAE.load_from_disk(tmp_path / "base", "cpu")
    assert type(stock) is MatryoshkaBatchTopKTrainingSAE
    x = torch.randn(5, published.cfg.d_in)
    torch.testing.assert_close(inference_form(stock)(x), published(x))


def test_stock_s_runner_goes_on_from_it(run, tmp_path):
    run(RELEASE, SAE_ID, tmp_path / "base")
    cfg = runner_config(
        from_pretrained_path=str(tmp_path / "base"), training_tokens=4 * 256, output_path=str(tmp_path / "out")
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=Dataset.from_dict({"text": documents("train")[:100]}))
    start = float(runner.sae.topk_threshold)
    assert start == pytest.approx(float(load_sae(RELEASE, SAE_ID).threshold[0].detach()))
    runner.run()
    saved = load_sae(tmp_path / "out")
    assert saved.cfg.metadata.training_architecture == "matryoshka_batchtopk"
    assert saved.cfg.metadata.training_architecture_details["k"] == 16
    assert float(saved.threshold[0].detach()) == pytest.approx(start, rel=0.1)


def test_bfloat16_s_threshold_is_warned_of(run, tmp_path):
    assert "stands still" in run(RELEASE, SAE_ID, tmp_path / "base", "--dtype", "bfloat16")[1]


def test_thresholds_that_differ_are_absorbed_when_asked(run, tmp_path):
    sae = inference_form(trained())
    with torch.no_grad():
        sae.threshold[3] *= 2
    sae.save_model(tmp_path / "published")
    code, _, err = run(tmp_path / "published", tmp_path / "base")
    assert code == 2
    assert "absorb" in err
    assert not (tmp_path / "base").exists()
    assert run(tmp_path / "published", tmp_path / "base", "--absorb-thresholds")[0] == 0
    cfg = json.loads((tmp_path / "base" / "cfg.json").read_text())
    assert cfg["rescale_acts_by_decoder_norm"] is False


def test_an_sae_is_replaced_only_when_asked(run, tmp_path):
    trained().save_inference_model(tmp_path / "published")
    assert run(tmp_path / "published", tmp_path / "base")[0] == 0
    code, _, err = run(tmp_path / "published", tmp_path / "base", "--set", "k=2")
    assert code == 2
    assert "--replace" in err
    assert run(tmp_path / "published", tmp_path / "base", "--set", "k=2", "--replace")[0] == 0
    assert json.loads((tmp_path / "base" / "cfg.json").read_text())["k"] == 2
    code, _, err = run(tmp_path / "published", tmp_path / "published", "--replace")
    assert code == 2
    assert "would be replaced" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((RELEASE,), "RELEASE [SAE_ID] OUT"),
        (("gemma-4-demo-res-matryoska-embedded", SAE_ID, "{out}"), RELEASE),
        ((RELEASE, SAE_ID + "1", "{out}"), SAE_ID),
        ((RELEASE, SAE_ID, "{out}", "--set", "matryoshka_width=[8]"), "'matryoshka_widths'"),
        ((RELEASE, SAE_ID, "{out}", "--set", "k_aux=8"), "setting 'k_aux'"),
        ((RELEASE, SAE_ID, "{out}", "--set", "k"), "KEY=VALUE"),
        ((RELEASE, SAE_ID, "{out}", "--dtype", "float23"), "'float32'"),
        ((RELEASE, SAE_ID, "{out}", "--architecture", "batch_topk"), "'batchtopk'"),
        ((RELEASE, SAE_ID, "{out}", "--architecture", "topk"), "from a topk SAE, not a jumprelu one"),
        ((RELEASE, SAE_ID, "{out}", "--replac"), "--replace"),
    ],
)
def test_a_mistake_is_answered_in_words_and_nothing_is_written(run, tmp_path, args, message):
    code, out, err = run(*(arg.format(out=tmp_path / "base") for arg in args))
    assert code == 2
    assert message in err
    assert not out
    assert not list(tmp_path.iterdir())
