"""The card against the JSON that it is made of: nothing that is not in it, and nothing bad left out."""

import json
import re

import pytest
import yaml

from sae_lens_gemma4 import cli
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.errors import ConfigError, SAEError, UnknownNameError
from sae_lens_gemma4.evaluation.evaluate import evaluate_sae
from sae_lens_gemma4.publishing.card import model_card
from sae_lens_gemma4.publishing.record import find_folders, read_records
from tests.publishing.sample_run import CONTEXT, MODEL, change, heldout, make_run, model, saes
from tests.publishing.upload_hub import upload_hub

__all__ = ["upload_hub"]
NUMBER = re.compile(r"(?<![\w.])[−-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])")


@pytest.fixture
def folders(tmp_path):
    return make_run(tmp_path / "run")


def section(card, title):
    return re.split(r"^## ", card, flags=re.MULTILINE)[
        [part.split("\n")[0] for part in re.split(r"^## ", card, flags=re.MULTILINE)].index(title)
    ]


def leaves(value):
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from leaves(inner)
    if isinstance(value, dict):
        yield from value
    elif not isinstance(value, list):
        yield value


def number(text):
    return float(text.replace(",", "").replace("−", "-"))


def test_no_number_that_is_not_in_the_json(folders):
    known, said = set(), {"1", "0.1"}  # VE is 1 − …; the column without the top 0.1 %
    for folder in folders:
        for name in ("cfg.json", "result.json"):
            for leaf in leaves(json.loads((folder / name).read_text())):
                if isinstance(leaf, str):
                    said |= set(NUMBER.findall(leaf)) | set(re.findall(r"\d+", leaf))
                elif leaf is not None:
                    known |= {float(leaf), 100 * float(leaf)}
    card = re.sub(r"^---\n.*?\n---\n", "", model_card(folders), count=1, flags=re.DOTALL)
    found = NUMBER.findall(re.sub(r"```python.*?```", "", card, flags=re.DOTALL))
    assert len(found) > 80
    for text in found:
        places = len(text.partition(".")[2])
        assert text in said or any(abs(number(text) - value) <= 0.5001 * 10**-places for value in known), text


def test_the_table_has_the_figures_of_an_independent_measurement(folders):
    card, (base, tuned, _) = model_card(folders), saes()
    for corpus in heldout().values():
        before, after = (evaluate_sae(sae, model(), corpus, progress=False).metrics for sae in (base, tuned))
        [row] = [
            line for line in section(card, "Results").splitlines() if line.startswith(f"| layer_3 | {corpus.name} ")
        ]
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert number(cells[2].split()[0]) == pytest.approx(before.ve, abs=5.1e-4)
        assert number(cells[3].split()[0]) == pytest.approx(after.ve, abs=5.1e-4)
        assert number(cells[5].split()[0]) == pytest.approx(after.l0, abs=0.051)
        assert cells[6].split()[0] == after.verdict
    new = [line.split(" | ") for line in card.splitlines() if line.startswith("| layer_1 | it_")]
    assert [cells[2] for cells in new] == ["–", "–"]
    assert all(cells[6].startswith("misfit") for cells in new)


def test_the_front_matter_is_what_the_hub_reads(folders):
    def facts(**settings):
        return yaml.safe_load(model_card(folders, **settings).split("---\n")[1])

    assert facts() == {
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "saelens", "mechanistic-interpretability", "gemma-4"],
    }
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        result["data"]["train"][0]["source"] = "HuggingFaceH4/ultrachat_200k"
        change(folder, data=result["data"], model=result["model"] | {"name": "google/gemma-4-E4B-it"})
    known = facts(license="apache-2.0")
    assert known["base_model"] == "google/gemma-4-E4B-it"
    assert known["datasets"] == ["HuggingFaceH4/ultrachat_200k"]
    assert known["license"] == "apache-2.0"


def test_the_snippet_runs_and_prints_what_is_measured(folders, tmp_path, monkeypatch, capsys):
    text = "The module defines functions and classes that read and write files. " * 12
    (folders[0] / "text.txt").write_text(text)
    monkeypatch.chdir(folders[0])
    [snippet] = re.findall(r"```python\n(.*?)```", model_card(folders[:1]), re.DOTALL)
    exec(snippet, {})
    printed = re.fullmatch(r"VE (.*), L0 (.*)\n", capsys.readouterr().out)
    corpus = build_corpus([text], model().tokenizer, context_size=CONTEXT)
    first = evaluate_sae(saes()[1], model(), corpus.take(corpus.tokens_bp.new_tensor([0])), progress=False).metrics
    assert float(printed[1]) == pytest.approx(first.ve, abs=6e-4)
    assert float(printed[2]) == pytest.approx(first.l0, abs=0.06)


def test_incidents_are_told_as_they_happened(folders):
    told = section(model_card(folders[:1]), "Incidents")
    assert "343 of 343 dead latents resampled at 1 × the median norm" in told
    assert "smallest activation selected 1.640 → 5.760; VE on the training stream 0.818 → 0.735" in told
    assert "taken back, 9 steps later: selected from 5.76, 3.51 times 1.64" in told
    assert "phase polish: begun from the best state (VE 0.764)" in told
    assert "23 tokens of document 17 of embedded:chat [train] left out" in told
    assert "None: no latent was resampled" in section(model_card(folders[1:]), "Incidents")


def test_of_many_resamplings_the_costly_ones_are_shown(folders):
    events = [
        {"kind": "resampling", "step": step, "dead": 5, "resampled": 5, "ve_before": 0.8, "ve_after": 0.8 - step / 1e4}
        for step in range(1, 101)
    ]
    change(folders[0], events=events)
    told = section(model_card(folders[:1]), "Incidents")
    steps = [int(step) for step in re.findall(r"^- step (\d+)", told, re.MULTILINE)]
    assert steps == list(range(81, 101))
    assert "Of 100 resamplings these cost most" in told


def test_limitations_are_those_of_the_result(folders):
    def limits():
        return section(model_card(folders[:1]), "Limitations")

    assert "predictions (CE, KL) was not measured" in limits()
    assert "no intervals for it_pile:" in limits()
    assert "What it lost on the model" in limits()
    assert "No gate was asked for" not in limits()
    result = json.loads((folders[0] / "result.json").read_text())
    for after in result["after"].values():
        after |= {"downstream": {}, "intervals": {"level": 0.95, "resamples": 100, "verdict_share": 1, "figures": {}}}
    row = {"corpus": "base text", "before": result["before"]["it_pile"], "after": result["after"]["it_pile"]}
    change(folders[0], after=result["after"], forgetting=[row], gate=None, evaluations=[{"step": 1}], before={})
    changed = limits()
    for gone in ("CE, KL", "no intervals", "What it lost", "while it was trained"):
        assert gone not in changed
    assert "No gate was asked for" in changed
    assert "The SAE that it began as was not measured" in changed
    assert f"On base text of {MODEL}, where it came from" in section(model_card(folders[:1]), "Results")


def test_a_licence_is_told_where_it_is_stated_and_nowhere_else(folders):
    told = section(model_card(folders), "Licence and lineage")
    assert "This repository: licence not stated." in told
    assert "This repository: apache-2.0." in model_card(folders, license="apache-2.0")
    result = json.loads((folders[0] / "result.json").read_text())
    change(folders[0], base=result["base"] | {"release": None, "sae_id": None, "path": "/home/me/secret/my-base"})
    card = model_card(folders)
    assert "continued from my-base, whose licence is not stated." in card
    assert "/home" not in card
    with pytest.raises(ConfigError, match="licence needs a name"):
        model_card(folders, license=" ")


def test_what_differs_is_said_of_whom_and_what_does_not_once(folders):
    card = model_card(folders)
    assert "- Start of layer_1: new weights." in card
    assert "Start of layer_3: layer_3_width_2k_l0_16 of gemma-4-demo-res-matryoshka-embedded" in card
    assert "γ = ‖mean‖/‖σ‖ = 0.412" in card
    assert "gains (not kept) VE 0.772" in card
    assert card.count("Budget: 20,480 tokens in 40 steps of 512 tokens") == 1
    assert card.count("One training run with one seed") == 1
    assert "- layer_3: What it lost on the model" in card


def test_names_cannot_break_the_card(folders):
    result = json.loads((folders[0] / "result.json").read_text())
    result["data"]["train"][0]["name"] = "a|b\n## Results\n"
    change(folders[0], data=result["data"])
    card = model_card(folders[:1])
    assert card.count("\n## Results") == 1
    assert "a\\|b↵## Results↵" in card


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schema": 2}, "schema 2; this version publishes 'training', schema 1"),
        ({"kind": "evaluation"}, "is 'evaluation'"),
        ({"after": {}}, "no held-out figures"),
    ],
)
def test_results_that_cannot_be_published(folders, changed, message):
    change(folders[0], **changed)
    with pytest.raises(SAEError, match=message):
        model_card(folders)


def test_folders_that_cannot_be_published(folders, tmp_path):
    run = folders[0].parent
    assert find_folders(run) == sorted(folders)
    assert find_folders(run, ["layer_3"]) == find_folders(folders[0]) == [folders[0]]
    with pytest.raises(UnknownNameError, match="Did you mean 'layer_3'"):
        find_folders(run, ["layer3"])
    with pytest.raises(ConfigError, match="holds no SAE"):
        find_folders(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="Two SAEs have one name"):
        read_records([folders[0], folders[0]])
    (folders[1] / "result.json").write_text("{")
    with pytest.raises(SAEError, match=r"result\.json cannot be read"):
        read_records(folders)
    (folders[1] / "cfg.json").unlink()
    with pytest.raises(SAEError, match=r"has no cfg\.json"):
        read_records(folders)
    result = json.loads((folders[0] / "result.json").read_text())
    change(make_run(tmp_path / "other")[1], model=result["model"] | {"name": "another"})
    with pytest.raises(ConfigError, match="different models"):
        read_records([folders[0], tmp_path / "other" / "layer_1"])


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr("sys.argv", ["sae-lens-gemma4", "publish", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    return call


def test_cards_from_the_command_line(run, folders):
    code, out, _ = run(folders[0].parent, "--license", "mit")
    assert code == 0
    assert "layer_1: the gate holds: ve on it_chat is" in out
    for folder in folders:
        assert str(folder / "README.md") in out
        assert (folder / "README.md").read_text() == model_card([folder], license="mit")
    code, _, err = run(folders[0], "--private", "--ungated")
    assert code == 2
    assert "--private, --ungated need --push" in err


def test_uploads_from_the_command_line(run, folders, upload_hub):
    code, out, _ = run(folders[0].parent, "--name", "layer_3", "--push", "somebody/saes")
    assert code == 0
    assert "every VE and L0 is the one recorded" in out
    assert "layer_3/cfg.json" in upload_hub.head("somebody/saes").files
    change(folders[1], gate=None)
    code, _, err = run(folders[0].parent, "--push", "somebody/others")
    assert code == 2
    assert "layer_1: no gate was asked for" in err
    assert ("model", "somebody/others") not in upload_hub.repos
