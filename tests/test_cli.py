"""The command line as its user meets it: exit codes, one line for a mistake, never a traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from sae_lens_gemma4 import cli
from sae_lens_gemma4.training.config import ContinueTrainingConfig
from tests.support import RELEASE, SAE_ID, config

EVALUATE = ["evaluate", RELEASE, SAE_ID, "--model", "gemma-4-demo", "--corpus", "embedded:text", "--split", "heldout"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the entry point; returns exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["sae-lens-gemma4", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "120")
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_releases_as_a_list_and_as_json(run):
    code, out, _ = run("releases")
    assert code == 0
    assert RELEASE in out
    assert SAE_ID in out
    code, out, _ = run("releases", "DEMO", "--json")
    assert json.loads(out)[0]["saes"][0]["id"] == SAE_ID


def test_evaluate_prints_and_writes(run, tmp_path):
    code, out, _ = run(*EVALUATE, "--tokens", 1500, "--out", tmp_path)
    assert code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"{report['metrics']['ve']:.3f}" in out
    assert report["metrics"]["verdict"] in out
    assert "embedded:text [heldout]" in out
    assert report["sae"]["release"] == RELEASE
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_train_runs_a_recipe(run, tmp_path):
    cfg = config(tmp_path / "sae", tokens=1024)
    (tmp_path / "r.yaml").write_text(cfg.to_yaml())
    code, out, _ = run("train", tmp_path / "r.yaml")
    assert code == 0
    assert "misfit" in out
    assert str(tmp_path / "sae") in out
    assert ContinueTrainingConfig.from_yaml(tmp_path / "sae" / "recipe.yaml") == cfg


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["dmo"], "Did you mean 'demo'"),
        (["demo", "--sed", "1"], "--seed"),
        (["demo", "--seed", "one"], "'one' is not a valid integer"),
        (["releases", "zzz"], "No release contains 'zzz'"),
        (["train", "nope.yaml"], "nope.yaml cannot be read"),
        (["train"], "Missing argument 'RECIPE'"),
        (["evaluate", RELEASE.replace("embedded", "embeded"), SAE_ID, *EVALUATE[3:]], f"Did you mean '{RELEASE}'"),
        (["evaluate", RELEASE, "layer_3_width_1k_l0_61", *EVALUATE[3:]], f"Did you mean '{SAE_ID}'"),
        (["evaluate", RELEASE, *EVALUATE[3:]], "needs an SAE id"),
        ([*EVALUATE, "--model", "gemma-4-dmo"], "Did you mean 'gemma-4-demo'"),
        ([*EVALUATE, "--model-class", "Gemma4ProxyML"], "Did you mean 'Gemma4ProxyLM'"),
        ([*EVALUATE, "--corpus", "embedded:texts"], "Did you mean 'embedded:text'"),
        ([*EVALUATE, "--corpus", "./none.jsonl"], "There is no file ./none.jsonl"),
        ([*EVALUATE, "--split", "held-out"], "Did you mean 'heldout'"),
        ([*EVALUATE, "--context-size", "1"], "1 is not in the range"),
        ([*EVALUATE, "--dtype", "bf16"], "Unknown dtype 'bf16'"),
        ([*EVALUATE, "--device", "cpuu"], "Device 'cpuu' cannot be used"),
        ([*EVALUATE, "--out", __file__], "is a file"),
        (["demo", "--out", __file__ + "/x"], "cannot be made a folder"),
        (["evaluate", "gpt2-small-res-jb", "blocks.0.hook_resid_pre", *EVALUATE[3:]], "cannot be read"),
    ],
)
def test_a_mistake_is_answered_in_words(run, args, message):
    code, out, err = run(*args)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert out == ""


def test_a_console_without_a_minus_sign_is_no_reason_to_fail():
    args = [*EVALUATE, "--tokens", "200"]
    args[args.index("gemma-4-demo")] = "gemma-4-demo-it-rescaled"  # a negative variance explained
    code = f"import sys; sys.argv = ['sae-lens-gemma4', *{args!r}]; from sae_lens_gemma4.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"}
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rb"\?\d\.\d", done.stdout)


def test_a_typo_in_a_recipe_names_key_and_place(run, tmp_path):
    data = config(tmp_path / "sae").to_dict()
    data["training"]["batchsize"] = 4
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    code, _, err = run("train", tmp_path / "r.yaml")
    assert (code, err) == (2, "Error: Unknown key in recipe.training 'batchsize'. Did you mean 'batch_size'?\n")


def test_ctrl_c_during_the_demo_leaves_nothing_half_written(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", "from sae_lens_gemma4.cli import main; main()", "demo", "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    said = ""
    deadline = time.monotonic() + 200
    while "Training:" not in said and time.monotonic() < deadline:
        said += process.stderr.read(40)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, said + rest
    assert "Interrupted" in rest
    assert "Traceback" not in rest
    assert list((tmp_path / "out").iterdir()) == []
