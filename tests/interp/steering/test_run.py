import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.interp.items import Item
from sae_lens_gemma4.interp.steering import answering as running
from sae_lens_gemma4.interp.steering import run
from sae_lens_gemma4.interp.steering.conditions import SteeringSettings
from sae_lens_gemma4.interp.steering.generating import adding
from sae_lens_gemma4.interp.steering.run import steer
from sae_lens_gemma4.interp.steering.vectors import SteeringVector
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from tests.interp.steering.planted import HOOK, planted_items, planted_model

SETTINGS = SteeringSettings(scales=[0.1, 0.3], n_random=8, max_new_tokens=2, batch_items=16)
SHORT = SteeringSettings(scales=[0.3], n_random=1, max_new_tokens=3, batch_items=4)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def planted():
    model, direction = planted_model()
    return model, SteeringVector(direction, HOOK, "planted"), planted_items(model.tokenizer)


@pytest.fixture(scope="module")
def helped(planted, tmp_path_factory):
    model, vector, items = planted
    return steer(
        model, items, vector, SETTINGS, tmp_path_factory.mktemp("helped"), extractor="regex:^(.)", progress=False
    )


def test_a_planted_direction_is_found(helped):
    baseline = helped.effects[0]
    assert 0.25 <= baseline.accuracy.value <= 0.75
    assert (helped.verdict.kind, helped.verdict.sign) == ("direction effect", "helps")


def test_its_negative_hurts(planted, tmp_path):
    model, vector, items = planted
    opposite = SteeringVector(-vector.direction_d, HOOK, "minus planted")
    found = steer(model, items, opposite, SETTINGS, tmp_path, extractor="regex:^(.)", progress=False)
    assert (found.verdict.kind, found.verdict.sign) == ("direction effect", "hurts")


@pytest.mark.parametrize("seed", [11, 12])
def test_an_unrelated_direction_is_not(planted, tmp_path, seed):
    """Orthogonal to all that the unembedding reads, after the last layer: it can shorten logits and not turn them."""
    model, _, items = planted
    weight_vd = model.model.lm_head.weight.detach()
    read_d = weight_vd[weight_vd.abs().sum(dim=1) > 0][0] * model.model.model.language_model.norm.weight.detach()
    drawn_d = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    drawn_d -= (drawn_d @ read_d) / (read_d @ read_d) * read_d
    vector = SteeringVector(drawn_d, "blocks.5.hook_resid_post", "unrelated")
    found = steer(model, items, vector, SETTINGS, tmp_path, extractor="regex:^(.)", progress=False)
    assert found.verdict.kind != "direction effect"
    changed = [e for e in found.effects if e.condition.kind == "random" and (e.recovered or e.broken)]
    assert changed  # what random directions at the same place do not leave as it is


def test_random_vectors_are_seldom_called_a_direction(planted, tmp_path):
    """Here they all move the answers; without the spread of the random directions most would be called one."""
    model, _, items = planted
    called = without = 0
    for seed in range(10):
        drawn_d = torch.randn(64, generator=torch.Generator().manual_seed(100 + seed))
        settings = SteeringSettings(scales=[0.3], max_new_tokens=1, batch_items=60, seed=1000 * seed)
        vector, folder = SteeringVector(drawn_d, HOOK, "random"), tmp_path / str(seed)
        v = steer(model, items, vector, settings, folder, extractor="regex:^(.)", progress=False).verdict
        called += v.kind == "direction effect"
        without += v.opposite[0].adjusted <= 0.05 and any(c.adjusted <= 0.05 for c in v.controls)
    assert called <= 2 and without >= 5


def test_the_result_as_plain_data(helped, planted):
    data = json.loads(json.dumps(helped.to_dict(), allow_nan=False))
    assert (data["schema"], data["kind"], data["hook"], data["n_items"]) == (1, "steering", HOOK, 60)
    assert len(data["conditions"]) == 1 + 2 * (2 + 8) and len(data["overlaps"]) == 4
    strongest = next(c for c in data["conditions"] if c["name"] == "+30 %")
    assert strongest["added_norm"] == pytest.approx(0.3 * data["norm"]["mean"])
    assert strongest["answer_found"]["value"] == 1.0 and strongest["mean_tokens"] == 2 and strongest["cut"]["k"] == 60
    assert strongest["change"]["gained"] == len(strongest["recovered"])
    sample = data["samples"][0]
    assert set(sample["outputs"]) == {c["name"] for c in data["conditions"]} and sample["right"] == "a"
    right = [helped.outcomes[e.condition] for e in helped.effects]
    assert [e.accuracy.k for e in helped.effects] == [int(r.sum()) for r in right]


def test_the_answers_are_those_of_a_plain_hook(helped, planted):
    model, vector, items = planted
    condition = helped.effects[1].condition
    delta = vector.direction_d * (condition.scale * helped.norm.mean)
    for number in range(0, 60, 13):
        ids = torch.tensor([[2, *model.tokenizer.encode(items[number].prompt, add_special_tokens=False)]])
        logits = model.run_with_hooks(ids, fwd_hooks=[(HOOK, lambda x, hook: x + delta)])
        says_a = model.tokenizer.decode([int(logits[0, -1].argmax())]) == "A"
        assert helped.outcomes[condition][number] == says_a


def test_a_run_goes_on_and_does_nothing_twice(planted, tmp_path, monkeypatch):
    model, vector, items = planted
    whole = steer(model, items[:10], vector, SHORT, tmp_path, extractor="regex:^(.)", progress=False)
    file = tmp_path / "outputs.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:14]) + lines[14][:9])  # the second condition, and a torn line
    calls, generate = [], running.generate_batch
    monkeypatch.setattr(running, "generate_batch", lambda *a, **k: calls.append(len(a[1])) or generate(*a, **k))
    again = steer(model, items[:10], vector, SHORT, tmp_path, extractor="regex:^(.)", progress=False)
    assert calls == [4, 2, 4, 4, 2, 4, 4, 2]
    assert again.to_dict() == whole.to_dict() and file.read_bytes() == b"".join(lines)
    calls.clear()
    steer(model, items[:10], vector, SHORT, tmp_path, extractor="regex:^(.)", progress=False)
    other = steer(model, items[:10], vector, SHORT, tmp_path, extractor="contains", progress=False)
    assert not calls and other.extractor == "contains"


def test_another_run_in_the_folder_is_refused(planted, tmp_path):
    model, vector, items = planted
    steer(model, items[:4], vector, SHORT, tmp_path, extractor="regex:^(.)", progress=False)
    for wrong in (
        (items[:5], vector, SHORT),
        (items[4:8], vector, SHORT),
        (items[:4], vector, SteeringSettings(scales=[0.2], n_random=1, max_new_tokens=3)),
    ):
        with pytest.raises(ConfigError, match="was begun with"):
            steer(model, *wrong, tmp_path, extractor="regex:^(.)", progress=False)
    (tmp_path / "outputs.jsonl").write_text('{"condition": 1}\n')
    with pytest.raises(DataError, match=r"Line 1 of .* is no answer"):
        steer(model, items[:4], vector, SHORT, tmp_path, extractor="regex:^(.)", progress=False)
    (tmp_path / "steering.json").unlink()
    with pytest.raises(DataError, match=r"without steering\.json"):
        steer(model, items[:4], vector, SHORT, tmp_path, extractor="regex:^(.)", progress=False)


def test_a_direction_that_differs_by_rounding_is_the_kept_one(planted, tmp_path, monkeypatch):
    model, vector, items = planted
    arguments = {"extractor": "regex:^(.)", "progress": False}
    whole = steer(model, items[:6], vector, SHORT, tmp_path, **arguments)
    assert torch.equal(load_file(tmp_path / "vector.safetensors")["vector"], vector.direction_d)
    rounded = SteeringVector(vector.direction_d + 1e-6 * torch.randn(64), HOOK, "planted")
    assert rounded.hash != vector.hash == whole.to_dict()["vector"]
    file = tmp_path / "outputs.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:8]))
    added = []
    monkeypatch.setattr(run, "adding", lambda delta_d, positions: added.append(delta_d) or adding(delta_d, positions))
    again = steer(model, items[:6], rounded, SHORT, tmp_path, **arguments)
    assert again.to_dict() == whole.to_dict() and file.read_bytes() == b"".join(lines)
    assert torch.equal(added[0], vector.direction_d * (0.3 * whole.norm.mean))
    for other in (-vector.direction_d, vector.direction_d + 0.01 * torch.randn(64)):
        with pytest.raises(ConfigError, match=r"begun with another vector than planted \(cosine "):
            steer(model, items[:6], SteeringVector(other, HOOK, "planted"), SHORT, tmp_path, **arguments)
    (tmp_path / "vector.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"vector\.safetensors cannot be read"):
        steer(model, items[:6], vector, SHORT, tmp_path, **arguments)
    (tmp_path / "vector.safetensors").unlink()
    with pytest.raises(DataError, match=r"answers without vector\.safetensors"):
        steer(model, items[:6], vector, SHORT, tmp_path, **arguments)


def test_other_batches_are_refused_in_16_bits_only(planted, tmp_path):
    model, vector, items = planted
    arguments = {"extractor": "regex:^(.)", "progress": False}
    smaller = replace(SHORT, batch_items=2)
    whole = steer(model, items[:4], vector, SHORT, tmp_path / "32", **arguments)
    assert steer(model, items[:4], vector, smaller, tmp_path / "32", **arguments).to_dict() == whole.to_dict()
    assert "batch_items" not in whole.facts
    half = Gemma4ProxyLM(copy.deepcopy(model.model).bfloat16(), model.tokenizer)
    whole = steer(half, items[:4], vector, SHORT, tmp_path / "16", **arguments)
    assert whole.to_dict()["batch_items"] == 4
    with pytest.raises(ConfigError, match=r"begun with batch_items 4, not 2\. In 16 bits .* Go on with 4"):
        steer(half, items[:4], vector, smaller, tmp_path / "16", **arguments)
    assert steer(half, items[:4], vector, SHORT, tmp_path / "16", **arguments).to_dict() == whole.to_dict()


KILLED = """
import sys, time
from sae_lens_gemma4.interp.steering import answering as running
from tests.interp.steering.planted import planted_items, planted_model
from tests.interp.steering.test_run import HOOK, SHORT, SteeringVector, steer
generate = running.generate_batch
def slow(*args, **kwargs):
    time.sleep(0.1)
    return generate(*args, **kwargs)
running.generate_batch = slow
model, direction = planted_model()
items = planted_items(model.tokenizer)[:10]
steer(model, items, SteeringVector(direction, HOOK, "planted"), SHORT, sys.argv[1], extractor="regex:^(.)")
"""


def test_a_killed_run_goes_on(planted, tmp_path):
    model, vector, items = planted
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "k")], env=env, stderr=subprocess.PIPE)
    file, began = tmp_path / "k" / "outputs.jsonl", time.monotonic()
    while not (file.exists() and file.read_bytes().count(b"\n") >= 8):
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() - began < 120
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = file.read_bytes()
    assert before.count(b"\n") < 40
    found = steer(model, items[:10], vector, SHORT, tmp_path / "k", extractor="regex:^(.)", progress=False)
    whole = steer(model, items[:10], vector, SHORT, tmp_path / "w", extractor="regex:^(.)", progress=False)
    assert file.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert file.read_bytes() == (tmp_path / "w" / "outputs.jsonl").read_bytes()
    assert found.to_dict() == whole.to_dict()


def test_an_extractor_that_finds_nothing_is_told_at_the_baseline(planted, tmp_path):
    model, vector, items = planted
    numbers = [Item(prompt=i.prompt, answer="#### 4") for i in items[:6]]
    message = (
        r"gsm8k finds no answer in any of the baseline's 6 outputs.*'[AB]+'.*6 of them were cut.*last_number, choice"
    )
    with pytest.raises(DataError, match=message):
        steer(model, numbers, vector, SHORT, tmp_path, progress=False)
    assert (tmp_path / "outputs.jsonl").read_text().count("baseline") == 6
    assert len((tmp_path / "outputs.jsonl").read_text().splitlines()) == 6


def test_answers_found_in_part_count_and_are_reported(planted, tmp_path):
    model, vector, items = planted
    found = steer(model, items[:12], vector, SHORT, tmp_path, extractor="regex:^(A)", progress=False)
    for effect in found.effects:
        shown = found.answers[effect.condition].found
        assert (shown.k, shown.n) == (effect.accuracy.k, 12)
    assert found.answers[found.effects[0].condition].found.k < 12


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "There are no items"),
        ([Item(prompt="x", answer="3"), Item(prompt="y")], "Item 1 has no right answer"),
        ([Item(prompt="x", answer="about three")], "Item 0 has the right answer 'about three'"),
    ],
)
def test_items_without_right_answers(planted, tmp_path, items, message):
    model, vector, _ = planted
    with pytest.raises(DataError, match=message):
        steer(model, items, vector, SHORT, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_outcomes_are_one_a_question(helped):
    assert all(o.dtype == np.bool_ and o.shape == (60,) for o in helped.outcomes.values())
