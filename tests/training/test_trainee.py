"""One SAE in training on stored activations of the tuned model: phases, events and the guard, and its state."""

import dataclasses
import json
import math

import pytest
import torch

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.training.forms import new_training_sae
from sae_lens_gemma4.training.phases import Guard, Phase, Training
from sae_lens_gemma4.training.resampling import Resampling
from sae_lens_gemma4.training.state import State
from sae_lens_gemma4.training.trainee import PlannedPhase, Trainee
from tests.support import RELEASE, SAE_ID

HOOK, BATCH = "blocks.3.hook_resid_post", 256


@pytest.fixture(scope="module")
def x_td():
    model = g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM")
    corpus = build_corpus("embedded:chat", model.tokenizer, context_size=64, max_tokens=60 * BATCH)
    x_td = torch.cat([batch.acts[HOOK] for batch in harvest(model, corpus, [HOOK])])
    return x_td[torch.randperm(len(x_td), generator=torch.Generator().manual_seed(0))]


def trainee(*phases, guard=None, dead_after_steps=10, sae=None, seed=0, **settings):
    sae = sae or g4.restore_training_sae(RELEASE, SAE_ID)
    plan = [PlannedPhase(phase, phase.steps(BATCH, None), None) for phase in phases]
    training = Training(phases=list(phases), dead_after_steps=dead_after_steps, guard=guard, **settings)
    return Trainee("t", sae, training, plan, BATCH, seed)


def go(trainee, x_td, steps, start=0):
    """Steps on consecutive batches; phases follow each other."""
    for i in range(start, start + steps):
        at = i * BATCH % (len(x_td) - BATCH)
        trainee.train(x_td[at : at + BATCH])
        if trainee.ends_phase:
            trainee.next_phase()
    return trainee


def flood(share=1.0, every=30, **more):
    """What happened to the public run: every dead latent at once, at the full norm of the alive ones."""
    return Phase(tokens=50 * BATCH, lr=1e-3, resampling=Resampling(every_steps=every, share=share, **more))


def means(trainee, n=5):
    return sum(row.selected_from for row in trainee._recent[-n:]) / n, sum(row.ve for row in trainee._recent[-n:]) / n


def test_the_incident_happens_without_a_guard_and_not_with_it(x_td):
    """7,343 latents at full norm took the public run's threshold from 1.64 to 5.76 and its VE from .818 to .735."""
    unguarded = go(trainee(flood()), x_td, 30)
    threshold, ve = means(unguarded)
    go(unguarded, x_td, 5, start=30)
    flooded_threshold, flooded_ve = means(unguarded)
    assert flooded_threshold > 1.25 * threshold
    assert flooded_ve < ve - 0.08
    assert [event["kind"] for event in unguarded.events] == ["resampling"]
    assert unguarded.events[0]["resampled"] == BATCH and unguarded.events[0]["share"] == 1.0

    guarded = go(trainee(flood(), guard=Guard(window_steps=10)), x_td, 45)
    rollback, smaller = guarded.events[:2]
    assert (rollback["kind"], smaller["kind"]) == ("rollback", "resampling")
    assert rollback["step"] == smaller["step"] == 30 and rollback["steps_lost"] == 5
    assert "variance explained went from" in rollback["reason"] or "smallest activation" in rollback["reason"]
    assert rollback["ve_after"] == pytest.approx(flooded_ve, abs=1e-6)  # the same event, until it was taken back
    assert smaller["share"] == 0.5 and 0 < smaller["resampled"] <= rollback["dead"] / 2 + 1
    assert guarded._watch is None and guarded.step == 40  # five of the 45 were taken back
    assert means(guarded)[1] > ve - 0.02 and means(guarded)[0] < 1.1 * threshold


def test_an_event_that_does_no_harm_stands_and_is_recorded(x_td):
    gentle = go(trainee(flood(share=0.2), guard=Guard(window_steps=10)), x_td, 40)
    [event] = gentle.events
    assert event["kind"] == "resampling" and event["dead"] > 100
    assert event["ve_after"] == pytest.approx(means(gentle)[1], abs=1e-6)
    assert event["ve_before"] == pytest.approx(event["ve_after"], abs=0.03)
    assert event["threshold_after"] == float(gentle.sae.topk_threshold) != event["threshold_before"]
    assert gentle._watch is None


def test_after_its_tries_an_event_is_left_out(x_td):
    strict = Guard(window_steps=10, threshold_ratio=1.0001, ve_drop=1e-9, tries=1)
    stubborn = go(trainee(flood(share=1.0), guard=strict), x_td, 45)
    assert [event["kind"] for event in stubborn.events] == ["rollback", "rollback", "abandoned"]
    plain = go(trainee(dataclasses.replace(flood(), resampling=None)), x_td, 30)
    assert stubborn.step == 45 - sum(event.get("steps_lost", 0) for event in stubborn.events)
    assert means(stubborn)[1] > means(plain)[1] - 0.02


def test_a_rollback_is_the_state_before(x_td):
    """Bit for bit: the weights, moments, schedule and counts of a trainee to which it never happened."""
    never = go(trainee(dataclasses.replace(flood(), resampling=None)), x_td, 30)
    strict = Guard(window_steps=10, threshold_ratio=1.0001, ve_drop=1e-9)
    taken_back = go(trainee(flood(), guard=strict), x_td, 35)
    assert taken_back.events[-1]["kind"] == "rollback" and taken_back.step == 30
    a, b = never.state(), taken_back.state()
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name
    assert a.facts["schedule"] == b.facts["schedule"] and a.facts["groups"] == b.facts["groups"]


def test_a_nan_after_an_event_is_taken_back_and_any_other_stops(x_td):
    guarded = go(trainee(flood(), guard=Guard(window_steps=10, tries=0)), x_td, 31)
    assert guarded._watch is not None
    with torch.no_grad():
        guarded.sae.W_enc.fill_(math.nan)
    go(guarded, x_td, 1, start=31)
    assert guarded.events[-1]["reason"] == "the loss is no number" and guarded.step == 30
    assert guarded.sae.W_enc.isfinite().all()
    json.dumps(guarded.events, allow_nan=False)
    lost = go(trainee(Phase(tokens=9 * BATCH)), x_td, 2)
    with torch.no_grad():
        lost.sae.W_enc.fill_(math.nan)
    with pytest.raises(DataError, match="The loss of t is nan at step 3"):
        go(lost, x_td, 1)


def test_a_cap_bounds_an_event(x_td):
    capped = go(trainee(flood(share=0.2, cap=7)), x_td, 31)
    assert capped.events[0]["resampled"] == 7 < capped.events[0]["dead"]


def test_what_is_read_back_goes_on_to_the_same_bits(x_td):
    """From any step, over an event and into a second phase that begins at the best state."""
    phases = [
        flood(share=0.2, every=20),
        Phase(name="polish", tokens=10 * BATCH, lr=1e-4, warm_up_steps=3, start="best"),
    ]

    def run(stop=None):
        t = trainee(*phases, guard=Guard(window_steps=5))
        for i in range(60):
            if i == stop and not t.done:
                state = t.state()
                facts = json.loads(json.dumps(state.facts))
                fresh = trainee(*phases, guard=Guard(window_steps=5))
                fresh.load(State(state.tensors, facts))
                t = fresh
            go(t, x_td, 1, start=i)
            if t.step in (10, 30, 45):
                t.remember({"step": t.step}, score={10: 0.1, 30: 0.9, 45: 0.5}[t.step])
        return t

    whole = run()
    assert whole.done and [e["kind"] for e in whole.events] == ["resampling", "resampling", "phase"]
    assert whole.events[-1]["best"] == 0.9
    for stop in (1, 22, 28, 55):  # at 22 an event is being watched
        again = run(stop)
        for name, tensor in whole.state().tensors.items():
            assert torch.equal(again.state().tensors[name], tensor), (stop, name)
        assert again.events == whole.events


def test_polish_begins_at_the_best_state(x_td):
    t = trainee(Phase(tokens=6 * BATCH, lr=1e-3), Phase(name="polish", tokens=2 * BATCH, lr=0.5e-3, start="best"))
    go(t, x_td, 3)
    best = {name: tensor.clone() for name, tensor in t.sae.state_dict().items()}
    t.remember({}, score=0.5)
    go(t, x_td, 2, start=3)
    t.remember({}, score=0.4)
    go(t, x_td, 1, start=5)
    for name, tensor in t.sae.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    assert t.phase == "polish" and t.trainer.optimizer.param_groups[0]["lr"] == 0.5e-3
    last = trainee(Phase(tokens=6 * BATCH, lr=1e-3), Phase(name="polish", tokens=2 * BATCH, lr=0.5e-3))
    go(last, x_td, 6)
    assert not torch.equal(last.sae.W_enc, best["W_enc"])


def test_a_watched_event_that_is_read_back_can_still_be_taken_back(x_td):
    def run(read_back):
        t = go(trainee(flood(), guard=Guard(window_steps=10)), x_td, 32)
        if read_back:
            state = t.state()
            t = trainee(flood(), guard=Guard(window_steps=10))
            t.load(State(state.tensors, json.loads(json.dumps(state.facts))))
        return go(t, x_td, 5, start=32)

    whole, again = run(False), run(True)
    assert whole.events[0]["kind"] == "rollback" and again.events == whole.events
    for name, tensor in whole.state().tensors.items():
        assert torch.equal(again.state().tensors[name], tensor), name


def test_epochs_are_counted_by_rounding_and_an_event_that_none_could_judge_is_left_out(x_td):
    """20,200 tokens in batches of 512: 39.45 steps an epoch, three of them 118 steps; the last end is no event."""
    phase = Phase(epochs=3, resampling=Resampling())
    plan = PlannedPhase(phase, phase.steps(512, 20_200), 20_200 / 512)
    assert plan.steps == 118
    for guard, due in ((None, [39, 79]), (Guard(window_steps=39), [39, 79]), (Guard(), [39])):
        t = trainee(Phase(tokens=BATCH), guard=guard)
        t.plan = [plan]
        found = []
        for step in range(118):
            t._step_in_phase = step
            found += [step] if t._resampling_is_due() else []
        assert found == due


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_rate_is_the_schedule_s(x_td, schedule):
    """Against the closed form: linear warm-up, cosine to the end or constant, linear decay."""
    phase = Phase(tokens=12 * BATCH, lr=1e-3, schedule=schedule, warm_up_steps=4)
    t, rates = trainee(phase), []
    for i in range(12):
        rates.append(t.trainer.optimizer.param_groups[0]["lr"])
        go(t, x_td, 1, start=i)
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    after = [1e-3] * 8
    if schedule == "cosine":
        after = [1e-4 + 0.9e-3 * (1 + math.cos(math.pi * s / 8)) / 2 for s in range(8)]
    assert rates[4:] == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_other_architectures_train_too(x_td, architecture):
    settings = {"k": 8} if architecture != "jumprelu" else {}
    sae = new_training_sae(architecture, 96, 128, settings=settings, seed=0)
    t = trainee(Phase(tokens=30 * BATCH, lr=3e-3, resampling=Resampling(every_steps=15)), sae=sae, dead_after_steps=5)
    go(t, x_td, 1)
    first = t._recent[-1].ve
    go(t, x_td, 28, start=1)
    row = t.record(t.train(x_td[:BATCH]))
    assert row["ve"] > first + 0.1
    assert (row["threshold"] is None) == (architecture != "batchtopk")
    state = t.state()
    t.load(State(state.tensors, json.loads(json.dumps(state.facts))))


def test_decoder_rows_are_projected_when_asked_for(x_td):
    sae = new_training_sae("topk", 96, 128, settings={"k": 8, "rescale_acts_by_decoder_norm": False}, seed=0)
    t = trainee(Phase(tokens=9 * BATCH, lr=1e-2), sae=sae, unit_decoder_every=3)
    go(t, x_td, 2)
    assert (t.sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-3
    go(t, x_td, 1, start=2)
    torch.testing.assert_close(t.sae.W_dec.norm(dim=1), torch.ones(128))
