"""The demo, with a twentieth of its tokens; the whole of it runs in CI before the tests."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch

import sae_lens_gemma4 as g4
from sae_lens_gemma4.demo import job
from sae_lens_gemma4.errors import SAEError
from sae_lens_gemma4.training.calibration import Calibration


def shorter(training, **phase):
    return dataclasses.replace(training, phases=[dataclasses.replace(training.phases[0], **phase)])


@pytest.fixture(scope="module")
def small():
    original = job.demo_config

    def config(shift, output, seed):
        cfg = original(shift, output, seed)
        heldout = [dataclasses.replace(s, tokens=3000) for s in cfg.data.heldout]
        train = [dataclasses.replace(s, tokens=20_000) for s in cfg.data.train]
        return dataclasses.replace(
            cfg,
            data=dataclasses.replace(cfg.data, heldout=heldout, train=train),
            training=shorter(cfg.training, tokens=24 * 1024),
            activations=dataclasses.replace(cfg.activations, buffer_blocks=16),
            calibration=Calibration(tokens=4096),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "demo_config", config)
        patch.setattr(job, "build_corpus", partial(job.build_corpus, max_tokens=3000))
        yield


@pytest.fixture(scope="module")
def demo(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, job.run_demo(out, 0, progress=False, say=lambda _: None)


def figures(report):
    return [report["reference"]["metrics"]] + [
        row[state]["metrics"] for shift in report["shifts"] for row in shift["rows"] for state in ("before", "after")
    ]


def test_both_shifts_tell_their_story(demo):
    _, report = demo
    assert report["reference"]["metrics"]["verdict"] == "healthy"
    tuned, rescaled = report["shifts"]
    for shift in (tuned, rescaled):
        assert [row["corpus"] for row in shift["rows"]] == ["tuned text", "tuned chat"]
        for row in shift["rows"]:
            assert row["after"]["metrics"]["ve"] > row["before"]["metrics"]["ve"]
            assert row["after"]["corpus"]["hash"] == row["before"]["corpus"]["hash"]
    assert all(row["before"]["metrics"]["verdict"] == "misfit" for row in rescaled["rows"])
    assert all(row["before"]["metrics"]["ve"] < 0 for row in rescaled["rows"])


def test_the_reload_is_the_saved_one(demo):
    out, report = demo
    for shift in report["shifts"]:
        assert shift["reload"]["identical"]
        assert shift["reload"]["max_abs_difference"] == 0
        for row in shift["rows"]:
            assert shift["reload"]["ve"][row["corpus"]] == pytest.approx(row["after"]["metrics"]["ve"], abs=1e-6)
        assert (out / shift["name"] / shift["reload"]["path"] / "cfg.json").is_file()


def test_the_files_say_what_the_report_says(demo):
    out, report = demo
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    page = (out / "report.html").read_text()
    for metrics in figures(report)[:3]:
        assert f"{metrics['ve']:.3f}".replace("-", "\N{MINUS SIGN}") in page
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "report.json", "rescaled", "tuned"]


def test_the_same_seed_gives_the_same_figures_in_a_relative_folder_too(demo, tmp_path, monkeypatch):
    _, report = demo
    monkeypatch.chdir(tmp_path)
    again = job.run_demo(Path("demo-report"), 0, progress=False, say=lambda _: None)
    assert figures(again) == figures(report)


def test_a_saved_sae_that_was_changed_is_not_called_the_same(tmp_path):
    model = g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM")
    cfg = job.demo_config(job.SHIFTS[0], tmp_path / "sae", 0)
    cfg = dataclasses.replace(cfg, training=shorter(cfg.training, tokens=1024, warm_up_steps=0))
    result = g4.ContinueTrainingRunner(cfg, model=model, progress=False).run().only
    heldout = {"own": g4.build_corpus(["import os and sys " * 20], model.tokenizer, context_size=32)}
    assert job.reload_elsewhere(result, model, heldout)["identical"]
    with torch.no_grad():
        result.sae.b_dec[0] += 0.5
    changed = job.reload_elsewhere(result, model, heldout)
    assert not changed["identical"]
    assert changed["max_abs_difference"] > 0.1
    (result.path / "cfg.json").write_text("{}")
    with pytest.raises(SAEError, match="Stock sae_lens cannot read"):
        job.reload_elsewhere(result, model, heldout)
