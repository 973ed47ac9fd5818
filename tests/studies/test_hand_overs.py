"""What one study leaves and another takes: labels to verify, latents to label, directions to steer with."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from sae_lens import SAE
from safetensors.torch import load_file

import sae_lens_gemma4 as g4
from sae_lens_gemma4.catalogue.label_schemas import FeatureLabel
from sae_lens_gemma4.interp.steering import answering
from sae_lens_gemma4.studies import labels, study
from tests.studies.recipes import arguments, call, check_page, result, small, stated
from tests.support import RELEASE, SAE_ID

HOOK = "blocks.3.hook_resid_post"
FEW = ("calibration=false", "probes=null", "profile=null")
NO_GROUPS = "direction.groups=null"


@pytest.fixture(scope="module")
def model():
    return g4.load_model("gemma-4-demo", "Gemma4ProxyLM")


# Labels


def test_labels_that_were_made_are_verified(labelled, tmp_path):
    made = result(labelled)["labels"]["labels"]
    file = labelled / "labels" / "labels.jsonl"
    document = small("verify", tmp_path / "run", f"labels={file}", "n=5", "calibration=false", "probes=null")
    chosen = document["selection"]["indices"]
    assert chosen == sorted(chosen) and len(set(chosen)) == 5 and {str(index) for index in chosen} < set(made)
    assert document["selection"]["facts"] == {"labelled": 12, "seed": 0}
    for who in ("token statistics", "n-gram statistics"):
        tested = document["verification"]["judges"][who]
        assert tested["scorer"] == "string match"
        assert {index: test["label"] for index, test in tested["tests"].items()} == {
            str(index): made[str(index)][who]["label"] for index in chosen
        }
    check_page(tmp_path / "run")
    other = small("verify", tmp_path / "run", f"labels={file}", "n=5", "seed=1", "calibration=false", "probes=null")
    assert other["selection"]["indices"] != chosen


def test_labels_are_verified_on_documents_that_they_were_not_made_from(labelled, tmp_path):
    """Another seed would deal the documents out anew, and test labels on what they were made from."""
    few, made = ("n=2", "calibration=false", "probes=null", "examples.seed=1"), result(labelled)["examples"]
    document = small("verify", tmp_path / "run", f"labels={labelled / 'labels' / 'labels.jsonl'}", *few)
    assert document["examples"]["settings"]["seed"] == made["settings"]["seed"] == 0
    assert (document["examples"]["documents"], document["examples"]["tokens"]) == (made["documents"], made["tokens"])
    assert "kept apart" in document["origin"]
    alone = tmp_path / "labels.jsonl"
    alone.write_bytes((labelled / "labels" / "labels.jsonl").read_bytes())
    document = small("verify", tmp_path / "run", f"labels={alone}", *few)
    assert document["examples"]["settings"]["seed"] == 1 and "not known" in document["origin"]


def test_labels_of_the_catalogue_are_verified(labelled, tmp_path, monkeypatch):
    indices = result(labelled)["selection"]["indices"][:4]
    told = {
        index: FeatureLabel(
            index=index, source="one", label='tokens: " the"', alternatives={"two": 'tokens: " of"', "none": ""}
        )
        for index in indices
    }
    told[2047] = FeatureLabel(index=2047, source="one")  # of which nothing is said
    asked = []
    monkeypatch.setattr(labels, "load_feature_labels", lambda *args: asked.append(args) or told)
    monkeypatch.setattr(labels, "check_labels", lambda *args: None)
    document = small("verify", tmp_path / "run", "labels=catalogue", "n=null", *FEW[:2])
    assert asked == [(RELEASE, SAE_ID)]
    assert document["selection"]["indices"] == sorted(indices)
    tested = document["verification"]["judges"]
    assert list(tested) == ["one", "two"]
    assert {test["label"] for test in tested["two"]["tests"].values()} == {'tokens: " of"'}


def test_labels_of_latents_that_are_silent(model, tmp_path):
    corpus = g4.build_corpus("embedded:text", model.tokenizer, context_size=128, max_tokens=16 * 128)
    sae = SAE.from_pretrained(RELEASE, SAE_ID)
    with torch.no_grad():
        _, cache = model.run_with_cache(corpus.tokens_bp, names_filter=HOOK)
        fires = (sae.encode(cache[HOOK][corpus.keep_bp]) > 0).any(0)
    silent = (~fires).nonzero().flatten().tolist()
    file = tmp_path / "labels.csv"
    file.write_text("index,label\n" + "".join(f"{index},nothing\n" for index in silent[:3]))
    code, _, err = call(*arguments("verify", tmp_path / "run", f"labels={file}", "text.prompts=16"))
    assert code == 2 and "None of the 3 latents asked for fires" in err and "Read more text" in err


# Contrasts


def test_latents_of_a_contrast_are_labelled(contrasted, tmp_path):
    d = load_file(contrasted / "effects.safetensors")[f"d/latents/{HOOK}"].nan_to_num().abs()
    document = small(
        "label", tmp_path / "run", *FEW, "selection.rule=contrast", f"contrast={contrasted}", "selection.n=6",
        "selection.min_firings=1", "selection.max_density=1",
    )  # fmt: skip
    chosen = document["selection"]["indices"]
    assert document["selection"]["rule"] == "contrast" and len(chosen) == 6
    assert [abs(score) for score in document["selection"]["scores"]] == pytest.approx(d[chosen].tolist(), abs=1e-6)
    assert sorted(d[chosen].tolist(), reverse=True) == pytest.approx(d[chosen].tolist())
    assert d[chosen].min() >= d.sort(descending=True).values[40]  # a latent may be silent on the text


def test_a_contrast_of_other_latents_is_refused(tmp_path):
    small("contrast", tmp_path / "contrast", "saes=[]")
    code, _, err = call(
        *arguments("label", tmp_path / "run", *FEW, "selection.rule=contrast", f"contrast={tmp_path / 'contrast'}")
    )
    assert code == 2 and f"no contrast of latents at {HOOK}" in err and not (tmp_path / "run" / "labels").exists()


ANSWERED = (
    "groups.items={dataset: recipes/interp/demo-questions.yaml, answer: answer}",
    "groups.answers={extractor: contains, max_new_tokens: 8, batch_items: 40}",
)


def test_right_and_wrong_answers_are_contrasted(tmp_path, monkeypatch):
    document = small("contrast", tmp_path / "run", *ANSWERED)
    answers = document["answers"]
    assert answers["right"] + answers["wrong"] == 40 and min(answers["right"], answers["wrong"]) >= 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "answers" / "outputs.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert answers["right"] == sum(re.search(r"\bfile\b", row["text"].casefold()) is not None for row in rows)
    assert document["items"]["count"] == "response" and document["items"]["n"] == 40
    check_page(tmp_path / "run")

    def fail(*args, **kwargs):
        raise AssertionError("an item was answered again")

    monkeypatch.setattr(answering, "generate_batch", fail)
    assert small("contrast", tmp_path / "run", *ANSWERED) == document


def test_answers_that_are_all_wrong_are_said_so(tmp_path):
    never = tmp_path / "never.yaml"
    never.write_text(
        yaml.safe_dump([{"prompt": row["prompt"], "answer": "zebra"} for row in stated("demo-questions")[:4]])
    )
    items = f"groups.items={{dataset: {never}, answer: answer}}"
    code, _, err = call(*arguments("contrast", tmp_path / "run", items, ANSWERED[1]))
    assert code == 2 and "All 4 answers are wrong" in err and "nothing to contrast" in err


# Directions


def steered(folder, *changes):
    return small("steer", folder, NO_GROUPS, *changes)


def test_a_direction_of_a_contrast_is_that_of_its_groups(contrasted, tmp_path):
    from_groups = small("steer", tmp_path / "groups")
    tensor = f"direction/{HOOK}"
    from_file = steered(
        tmp_path / "file", f"direction.file={contrasted / 'effects.safetensors'}", f"direction.tensor={tensor}"
    )
    assert from_file["hook"] == from_groups["hook"] == HOOK
    assert "16 files" in from_groups["origin"] and "effects.safetensors" in from_file["origin"]
    same = ("conditions", "verdict", "overlaps", "samples", "norm")
    assert {key: from_file[key] for key in same} == {key: from_groups[key] for key in same}


def test_a_direction_of_a_latent(model, tmp_path):
    document = steered(tmp_path / "run", f"direction.sae={{release: {RELEASE}, sae_id: {SAE_ID}}}",
                       "direction.latent=23", "direction.hook_name=null")  # fmt: skip
    assert document["hook"] == HOOK and document["origin"] == "the decoder row of latent 23"
    added = next(c for c in document["conditions"] if c["name"] == "+30 %")["added_norm"]
    assert added == pytest.approx(0.3 * document["norm"]["mean"])


def test_what_is_added_moves_the_answer_as_a_plain_hook_does(model, tmp_path):
    row = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    np.save(tmp_path / "v.npy", row)
    document = steered(
        tmp_path / "run", f"direction.file={tmp_path / 'v.npy'}", "steering.max_new_tokens=1", "items.n=5"
    )
    prompts = [item["prompt"] for item in stated("demo-questions")[:5]]
    rows = [json.loads(line) for line in (tmp_path / "run" / "outputs" / "outputs.jsonl").read_text().splitlines()]
    unit = torch.from_numpy(row / np.linalg.norm(row))
    for name, sign in (("baseline", 0), ("+30 %", 1), ("−30 %", -1)):
        delta = unit * (sign * 0.3 * document["norm"]["mean"])
        texts = [r["text"] for r in rows if r["condition"] == name]
        for prompt, text in zip(prompts, texts, strict=True):
            ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model.run_with_hooks(ids, fwd_hooks=[(HOOK, lambda x, hook, delta=delta: x + delta)])
            assert text == model.tokenizer.decode([int(logits[0, -1].argmax())], skip_special_tokens=True)


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = small("steer", tmp_path / "whole", "steering.batch_items=4")
    calls, generate = [], answering.generate_batch

    def stops(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(answering, "generate_batch", stops)
    code, _, err = call(*arguments("steer", tmp_path / "run", "steering.batch_items=4"))
    assert code == 130 and "Stopped. The same command goes on from here." in err
    assert not (tmp_path / "run" / "result.json").exists()
    document = small("steer", tmp_path / "run", "steering.batch_items=4")
    assert calls == [4] * (6 + 15 - 5) and document == whole


def test_another_steering_in_the_same_folder_is_refused(tmp_path):
    small("steer", tmp_path / "run", "items.n=4")
    code, _, err = call(*arguments("steer", tmp_path / "run", "items.n=4", "steering.scales=[0.2]"))
    assert code == 2 and "was begun with" in err


def test_two_at_once_are_refused(tmp_path):
    with study.only_one(tmp_path):
        code, _, err = call(*arguments("lens", tmp_path))
    assert code == 2 and err.endswith(f"Error: Another process is at the run in {tmp_path}.\n")
