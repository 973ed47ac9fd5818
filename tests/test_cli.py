"""The command line as its user meets it: exit codes, one line for a mistake, never a traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.resources import files

import pytest
import yaml

from sae_lens_gemma4 import cli
from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.cli.printing import print_evaluation
from sae_lens_gemma4.evaluation import compare, evaluate
from sae_lens_gemma4.training.config import ContinueTrainingConfig
from tests.catalogue.local_hub import local_hub
from tests.report.sample_report import make_evaluation
from tests.support import RELEASE, SAE_ID, config

__all__ = ["local_hub"]

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


def test_releases_as_a_table_that_fits(run):
    code, out, _ = run("releases")
    assert code == 0
    table, _, footer = out.partition("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(releases())
    assert all(len(line) <= 120 for line in table.splitlines())
    assert f"{len(releases())} releases." in footer
    assert "docs/releases.md" in footer
    assert "SAE.from_pretrained(NAME, SAE_ID)" in footer


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("DecodeResearch", lambda r: r.repo_id.startswith("decoderesearch/")),
        ("quantised", lambda r: "quantised" in [caveat.kind for caveat in r.caveats]),
        ("google/gemma-4-e2b-it", lambda r: r.model == "google/gemma-4-E2B-it"),
    ],
)
def test_releases_by_author_caveat_and_model(run, pattern, fits):
    code, out, _ = run("releases", pattern, "--json")
    assert code == 0
    wanted = [name for name, release in releases().items() if fits(release)]
    assert [release["name"] for release in json.loads(out)] == wanted
    assert len(wanted) > 1


def test_one_release_is_shown_in_full(run):
    code, out, _ = run("releases", "juiceb0xc0de")
    release = releases()["gemma-4-e2b-it-res-jumprelu-juiceb0xc0de"]
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == release.name
    assert {line.split()[0] for line in lines[-35:]} == set(release.sae_ids)
    for text in (release.url, "0.9768", *release.sources.values(), *(c.text for c in release.caveats)):
        assert text in out


def test_releases_as_json_have_every_fact(run):
    code, out, _ = run("releases", "--json")
    assert code == 0
    given = {release["name"]: release for release in json.loads(out)}
    assert list(given) == list(releases())
    for name, release in releases().items():
        assert given[name] == json.loads(json.dumps(asdict(release)))


def test_a_release_as_an_entry_of_sae_lens(run):
    code, out, err = run("releases", "--upstream-yaml", "gemma-4-e4b-it-res-matryoshka-atawfeek")
    assert (code, err) == (0, "")
    (entry,) = yaml.safe_load(out).values()
    assert entry["saes"][0] == {
        "id": "layer_7_width_65k_l0_100", "path": "btk-mat-layer-7-k-100", "l0": 99.3, "variance_explained": 0.8328,
    }  # fmt: skip


def test_a_release_that_its_files_bear_out(run):
    code, out, _ = run("releases", "--verify", RELEASE)
    assert code == 0
    assert re.search(r"new .* context_size .* 128", out)
    assert f"1 SAE of {RELEASE}: files, form, widths" in out
    code, out, _ = run("releases", "--verify", RELEASE, "--json")
    assert code == 0
    assert {"sae_id": SAE_ID, "fact": "prepend_bos", "stated": None, "found": True, "kind": "new"} in json.loads(out)


def test_a_release_that_its_files_contradict(run, local_hub):
    name = "gemma-4-e4b-it-res-matryoshka-atawfeek"
    folder = files("sae_lens_gemma4") / "embedded" / "data" / "sae" / SAE_ID
    there = {f.name: f.read_bytes() for f in folder.iterdir()}
    paths = [sae.path for sae in releases()[name].saes]
    local_hub.add("atawfeek/gemma-4-e4b-it-saes", {f"{p}/{n}": data for p in paths for n, data in there.items()})
    code, out, err = run("releases", "--verify", name)
    assert (code, err) == (1, "")
    assert re.search(r"differs .* layer_7_width_65k_l0_100 and 2 more .* d_sae .* 65,536 .* 2,048", out)
    assert re.search(r"Differences: \d+\.", out)
    code, out, _ = run("releases", "--verify", name, "--json")
    assert code == 1
    assert {"d_in", "d_sae", "k", "model", "hook", "context_size"} <= {d["fact"] for d in json.loads(out)}


def test_a_release_whose_repository_is_out_of_reach(run):
    code, out, err = run("releases", "--verify", "gemma-4-e4b-it-res-matryoshka-atawfeek")
    assert (code, out) == (2, "")
    assert err.startswith("Error: atawfeek/gemma-4-e4b-it-saes is not in the cache, and the hub cannot be reached")


def test_evaluate_prints_and_writes(run, tmp_path):
    code, out, _ = run(*EVALUATE, "--tokens", 1500, "--out", tmp_path)
    assert code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"{report['metrics']['ve']:.3f}" in out
    assert report["metrics"]["verdict"] in out
    assert "embedded:text [heldout]" in out
    assert report["sae"]["release"] == RELEASE
    assert (tmp_path / "report.html").stat().st_size > 1000


PROTOCOL = """
name: short
description: for this test
sources:
  - {name: it_pile, dataset: "embedded:text", split: heldout, tokens: 400}
  - {name: it_chat, dataset: "embedded:chat", split: heldout, tokens: 1600}
context_size: 64
exact_tokens: true
downstream_tokens: 100
bootstrap_resamples: 100
"""


def test_evaluate_against_another_sae_by_a_protocol(run, tmp_path):
    (tmp_path / "short.yaml").write_text(PROTOCOL)
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "The module defines the following functions. " * 80}))
    common = ["--model", "gemma-4-demo-it-rescaled", "--protocol", tmp_path / "short.yaml", "--seed", 3]
    against = ["--against", RELEASE, SAE_ID, "--base-model", "gemma-4-demo"]
    source = ["--source", f"it_pile={tmp_path / 'own.jsonl'}"]
    code, out, _ = run("evaluate", RELEASE, SAE_ID, *common, *against, *source, "--out", tmp_path / "out")
    assert code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["corpus"] for row in report["rows"]] == ["it_pile", "it_chat"]
    for row in report["rows"]:
        after = row["after"]
        assert (
            after["protocol"] == "short"
            and after["metrics"]["n_tokens"] == {"it_pile": 400, "it_chat": 1600}[row["corpus"]]
        )
        assert (after["sae"]["release"], after["sae"]["sae_id"]) == (RELEASE, SAE_ID)
        assert row["differences"]["ve"]["value"] == 0
        assert after["downstream"]["excluded"]["n_tokens"] >= 100
    assert report["rows"][0]["after"]["corpus"]["source"] == str(tmp_path / "own.jsonl")
    assert {row["after"]["model"]["name"] for row in report["forgetting"]} == {"gemma-4-demo"}
    assert "misfit → misfit" in out and "what was forgotten" in out
    assert [row["after"]["intervals"] is None for row in report["rows"]] == [True, False]  # of a single document
    assert report["rows"][1]["after"]["intervals"]["seed"] == 3
    assert (tmp_path / "out" / "table.md").read_text().startswith("| layer | before: it_pile VE |")
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000


def test_evaluate_writes_a_folder_for_each_of_several(run, tmp_path):
    (tmp_path / "short.yaml").write_text(PROTOCOL)
    args = [*EVALUATE[:5], "--protocol", tmp_path / "short.yaml", "--resamples", 0, "--downstream-tokens", 0]
    code, out, _ = run(*args, "--out", tmp_path / "out")
    assert code == 0
    assert out.count("variance explained") == 2
    assert sorted(p.name for p in (tmp_path / "out" / SAE_ID).iterdir()) == ["it_chat", "it_pile"]
    report = json.loads((tmp_path / "out" / SAE_ID / "it_pile" / "report.json").read_text())
    assert report["intervals"] is None and report["downstream"] is None


def test_what_is_printed_hides_nothing_and_says_how_many_documents_there_were(capsys):
    evaluation = make_evaluation(corpus="a\u202eb\x1b[31m")
    print_evaluation(evaluation)
    out = capsys.readouterr().out
    assert "gemma-4-demo-it, a⟨202E⟩b⟨001B⟩[31m, 64,123 tokens of 311 documents" in out
    assert "\x1b" not in out and "\u202e" not in out
    evaluation["metrics"]["n_tokens"] = 40
    print_evaluation(evaluation)
    assert "without the top 1\u00a0% (1 token of 40) by SSE" in capsys.readouterr().out


@pytest.mark.parametrize("others", [[], ["--against", RELEASE, SAE_ID]])
def test_ctrl_c_keeps_the_corpora_that_are_done(run, tmp_path, monkeypatch, others):
    (tmp_path / "short.yaml").write_text(PROTOCOL)
    module, name = (compare, "compare_saes") if others else (evaluate, "evaluate_saes")
    measure, calls = getattr(module, name), []

    def measure_once(*args, **settings):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*args, **settings)

    monkeypatch.setattr(module, name, measure_once)
    args = [*EVALUATE[:5], *others, "--protocol", tmp_path / "short.yaml", "--downstream-tokens", 0]
    code, _, err = run(*args, "--out", tmp_path / "out")
    assert code == 130 and "Interrupted" in err
    done = json.loads(next((tmp_path / "out").rglob("report.json")).read_text())
    assert [row["corpus"] for row in done["rows"]] == ["it_pile"] if others else done["corpus"]["name"] == "it_pile"
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"report.json", "report.html", *(["table.md"] if others else [])}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--against", RELEASE, SAE_ID, "--base-model", "gemma-4-dmo"], "Did you mean 'gemma-4-demo'"),
        (["--out", "{folder}"], "report.json cannot be written: it is a folder"),
    ],
)
def test_what_would_fail_at_the_end_is_said_at_the_start(run, tmp_path, monkeypatch, args, message):
    (tmp_path / "report.json").mkdir()
    for module, name in ((compare, "compare_saes"), (evaluate, "evaluate_saes")):
        monkeypatch.setattr(module, name, None)
    code, out, err = run(*EVALUATE, *(arg.format(folder=tmp_path) for arg in args))
    assert (code, out) == (2, "")
    assert message in err


def test_bench_evaluate_prints_its_ratios(run):
    small = ["--d-in", 32, "--d-sae", 512, "--k", 8, "--batch-tokens", 64, "--all-tokens", 256, "--rounds", 2]
    code, out, _ = run("bench", "evaluate", *small)
    assert code == 0
    assert "of the product" in out and "sae_lens" in out
    code, out, _ = run("bench", "evaluate", *small, "--json")
    result = json.loads(out)
    assert result["ours_by_encoder"] > 0 and 3 < result["l0"] < 16


def test_train_runs_a_recipe(run, tmp_path):
    cfg = config(tmp_path / "run", tokens=1024)
    (tmp_path / "r.yaml").write_text(cfg.to_yaml())
    code, out, _ = run("train", tmp_path / "r.yaml")
    assert code == 0
    assert "misfit" in out
    assert str(tmp_path / "run" / "sae") in out
    assert ContinueTrainingConfig.from_yaml(tmp_path / "run" / "recipe.yaml") == cfg


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["dmo"], "Did you mean 'demo'"),
        (["demo", "--sed", "1"], "--seed"),
        (["demo", "--seed", "one"], "'one' is not a valid integer"),
        (["releases", "zzz"], "Unknown release 'zzz'. Known: gemma-3-27b"),
        (["releases", "atawfek"], "Did you mean 'atawfeek'"),
        (["releases", "atawfek", "--json"], "Did you mean 'atawfeek'"),
        (["releases", "--verify", RELEASE.replace("embedded", "embeded")], f"Did you mean '{RELEASE}'"),
        (["releases", "--upstream-yaml", RELEASE.replace("embedded", "embeded")], f"Did you mean '{RELEASE}'"),
        (["releases", "--upstream-yaml", RELEASE], "lies in this package"),
        (["releases", "demo", "--verify", RELEASE], "do not go together"),
        (["train", "nope.yaml"], "nope.yaml cannot be read"),
        (["train"], "Missing argument 'RECIPE'"),
        (["evaluate", RELEASE.replace("embedded", "embeded"), SAE_ID, *EVALUATE[3:]], f"Did you mean '{RELEASE}'"),
        (["evaluate", RELEASE, "layer_3_width_1k_l0_61", *EVALUATE[3:]], f"Did you mean '{SAE_ID}'"),
        (["evaluate", RELEASE, *EVALUATE[3:]], "needs an SAE id"),
        ([*EVALUATE, "--model", "gemma-4-dmo"], "Did you mean 'gemma-4-demo'"),
        ([*EVALUATE, "--model-class", "Gemma4ProxyML"], "Did you mean 'Gemma4ProxyLM'"),
        ([*EVALUATE, "--model-class", "HookedTransformer", "--model", "nobody/none"], "Model 'nobody/none' cannot be"),
        ([*EVALUATE, "--model-class", "AutoModelForCausalLM", "--model", "nobody/none"], "Model 'nobody/none' cannot"),
        ([*EVALUATE, "--corpus", "embedded:texts"], "Did you mean 'embedded:text'"),
        ([*EVALUATE, "--corpus", "./none.jsonl"], "There is no file ./none.jsonl"),
        ([*EVALUATE, "--split", "held-out"], "Did you mean 'heldout'"),
        ([*EVALUATE, "--context-size", "1"], "1 is not in the range"),
        ([*EVALUATE, "--dtype", "bf16"], "Unknown dtype 'bf16'"),
        ([*EVALUATE, "--device", "cpuu"], "Device 'cpuu' cannot be used"),
        ([*EVALUATE, "--out", __file__], "is a file"),
        ([*EVALUATE[:5], "--protocol", "quik"], "Did you mean 'quick'"),
        ([*EVALUATE, "--protocol", "quick"], "not on both"),
        ([*EVALUATE[:5], "--tokens", "9"], "--tokens need --corpus"),
        ([*EVALUATE[:5], "--source", "tex=x.jsonl"], "Did you mean 'text'"),
        ([*EVALUATE[:5], "--source", "text"], "SPLIT=PATH"),
        ([*EVALUATE[:5], "--base-model", "gemma-4-demo"], "needs --against"),
        ([*EVALUATE[:5], SAE_ID], "named twice"),
        ([*EVALUATE[:5], *["--against", RELEASE, SAE_ID] * 2], "one for all, or one for each"),
        ([*EVALUATE[:5], "--against", RELEASE, SAE_ID[:-1]], f"Did you mean '{SAE_ID}'"),
        ([*EVALUATE[:5], "--seed", "-1"], "-1 is not in the range"),
        (["bench", "evaluate", "--k", "9", "--d-sae", "9"], "less than d_sae"),
        (["bench", "loading"], "Did you mean 'load'"),
        (["bench", "step", "--size", "sed"], "Did you mean 'seed'"),
        (["bench", "step", "--threads", "1;2"], "'1;2' is not numbers"),
        (["bench", "step", "--device", "cpuu"], "Device 'cpuu' cannot be used"),
        (["bench", "train", "--model-size", "tny"], "Did you mean 'tiny'"),
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
    data["activations"]["batchsize"] = 4
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    code, _, err = run("train", tmp_path / "r.yaml")
    assert (code, err) == (2, "Error: Unknown key in recipe.activations 'batchsize'. Did you mean 'batch_size'?\n")


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
    left = {path.name for path in (tmp_path / "out").rglob("*") if not path.name.startswith(".")}
    assert left <= {"tuned", "log.jsonl", "recipe.yaml"}  # a run without an SAE; the next demo takes its place
