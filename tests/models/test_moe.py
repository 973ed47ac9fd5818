"""The routing of a mixture-of-experts layer, against the raw weights of single experts.

What `test_hooks.py` cannot see: that a token sent to another expert gets that expert's own output, that whoever
does not ask for single experts does not pay for them, and what dtypes and edits of several hook points at once do.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer
from tests.models.reference import reference
from tests.models.test_reference import TOKENS, eager, noise

MOE = [f"moe.hook_{name}" for name in ("router_logits", "router_probs", "expert_indices", "expert_weights")]
MOE += [f"moe.hook_{name}" for name in ("expert_outs", "dense_out", "experts_out")]
LAYER, K, EXPERTS = 2, 3, 8
FEW = TOKENS[:1, :2]  # two tokens choose six experts of eight at most

every_class = pytest.mark.parametrize("cls", ["bridge", "proxy"])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def build(cls, model):
    if cls == "bridge":
        return Gemma4Bridge.boot(model, tiny_tokenizer())
    return Gemma4ProxyLM(model, tiny_tokenizer(), attn_implementation="eager")


@functools.cache
def hooked(cls):
    return build(cls, tiny_gemma4("moe"))


def at(name, layer=LAYER):
    return f"blocks.{layer}.moe.hook_{name}"


def routing(model, tokens=TOKENS, edits=None, layer=LAYER):
    """What a layer's routing shows in one run with `edits`, by short names; the experts' `input` and the `logits`."""
    seen = {}

    def hook(value, hook, name):
        if name in (edits or {}):
            value = edits[name](value.clone())
        seen[name] = value
        return value if name in (edits or {}) else None

    short = [name.removeprefix("moe.hook_") for name in MOE]
    hooks = [(at(name, layer), functools.partial(hook, name=name)) for name in short]
    hooks.append((f"model.layers.{layer}.pre_feedforward_layernorm_2", functools.partial(hook, name="input")))
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return seen | {"input": seen["input"].view(*tokens.shape, -1), "logits": logits}


def expert(e, x, layer=LAYER):
    """One expert, from its raw weights."""
    weights = eager("moe").model.layers[layer].experts
    gate, up = F.linear(x, weights.gate_up_proj[e]).chunk(2, dim=-1)
    return F.linear(F.gelu(gate, approximate="tanh") * up, weights.down_proj[e])


def branch(mix, layer=LAYER):
    """The experts' branch after its norm."""
    norm = eager("moe").model.layers[layer].post_feedforward_layernorm_2
    return mix * (mix.pow(2).mean(-1, keepdim=True) + norm.eps) ** -0.5 * norm.weight


def weights_of(probs, layer=LAYER):
    """Top-k weights and indices of probabilities."""
    top, chosen = probs.topk(K)
    return top / top.sum(-1, keepdim=True) * eager("moe").model.layers[layer].router.per_expert_scale[chosen], chosen


def gap(actual, expected):
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


# --- an expert that no token chose


def unreached(model):
    chosen = set(routing(model, FEW)["expert_indices"].flatten().tolist())
    return min(set(range(EXPERTS)) - chosen)


@every_class
def test_what_is_ragged_by_expert(cls):
    """The rows of one expert: as many as tokens chose it, its own outputs, and none where none did."""
    model = hooked(cls)
    seen = routing(model, FEW)
    chosen, outs = seen["expert_indices"], seen["expert_outs"]
    widths = [len(outs[chosen == e]) for e in range(EXPERTS)]
    assert widths[unreached(model)] == 0 and sum(widths) == FEW.numel() * K
    for e in range(EXPERTS):
        tokens = (chosen == e).any(-1)
        assert widths[e] == tokens.sum()
        assert widths[e] == 0 or gap(outs[chosen == e], expert(e, seen["input"][tokens])) <= 1e-5


def by_logits(e, logits):
    logits[0, 1, e] += 20
    return logits


def by_probs(e, probs):
    probs[0, 1, e] = 2
    return probs


def by_indices(e, indices):
    indices[0, 1, K - 1] = e
    return indices


@pytest.mark.parametrize("by", ["router_logits", "router_probs", "expert_indices"])
@every_class
def test_a_token_sent_to_an_expert_gets_that_experts_output(cls, by):
    model = hooked(cls)
    e, before = unreached(model), routing(model, FEW)
    send = {"router_logits": by_logits, "router_probs": by_probs, "expert_indices": by_indices}[by]
    after = routing(model, FEW, {by: functools.partial(send, e)})

    probs = before["router_probs"].clone()
    if by == "router_logits":
        probs = by_logits(e, before["router_logits"].clone()).softmax(-1)
    elif by == "router_probs":
        probs = by_probs(e, probs)
    weights, chosen = weights_of(probs)
    if by == "expert_indices":
        chosen = by_indices(e, chosen)
    row = chosen[0, 1].tolist()
    assert e in row and e not in before["expert_indices"]
    assert after["expert_indices"][0, 1].tolist() == row
    assert torch.equal(after["expert_indices"][0, 0], before["expert_indices"][0, 0])
    assert gap(after["expert_weights"], weights) <= 1e-6
    outs = torch.stack([expert(each, after["input"][0, 1]) for each in row])
    assert gap(after["expert_outs"][0, 1], outs) <= 1e-5
    assert gap(after["experts_out"][0, 1], branch((weights[0, 1, :, None] * outs).sum(0))) <= 1e-5
    assert gap(after["experts_out"][0, 1], before["experts_out"][0, 1]) > 1e-2
    assert torch.equal(after["experts_out"][0, 0], before["experts_out"][0, 0])
    assert gap(after["logits"], before["logits"]) > 1e-2


@every_class
def test_other_indices_keep_the_weights_as_computed(cls):
    model, before = hooked(cls), routing(hooked(cls))
    after = routing(model, edits={"expert_indices": lambda indices: (indices + 1) % EXPERTS})
    for name in ("router_logits", "router_probs", "expert_weights"):
        assert torch.equal(after[name], before[name]), name
    assert torch.equal(after["expert_indices"], (before["expert_indices"] + 1) % EXPERTS)
    moved = after["expert_indices"].flatten(0, 1), after["input"].flatten(0, 1)
    by_hand = torch.stack([torch.stack([expert(e, x) for e in row]) for row, x in zip(*moved, strict=True)])
    assert gap(after["expert_outs"].flatten(0, 1), by_hand) <= 1e-5


@every_class
def test_other_weights_keep_the_choice_and_the_outputs(cls):
    model, before = hooked(cls), routing(hooked(cls))
    after = routing(model, edits={"expert_weights": lambda weights: weights * noise("weights", weights)})
    for name in ("router_logits", "router_probs", "expert_indices", "expert_outs"):
        assert torch.equal(after[name], before[name]), name
    mix = (after["expert_weights"][..., None] * before["expert_outs"]).sum(dim=2)
    assert gap(after["experts_out"], branch(mix)) <= 1e-5


# --- what asking for single experts costs, and changes


@pytest.fixture
def calls(monkeypatch):
    """The layers whose experts ran, in order."""
    ran, experts = [], type(eager("moe").model.layers[0].experts)
    forward = experts.forward

    def counted(self, *args, **kwargs):
        ran.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(experts, "forward", counted)
    return ran


def test_single_experts_cost_nothing_unless_asked_for(calls):
    for cls in ("bridge", "proxy"):
        model = build(cls, tiny_gemma4("moe"))

        def ran(run, *args, model=model, **kwargs):
            calls.clear()
            run(TOKENS, *args, **kwargs)
            layers = list(dict.fromkeys(calls))
            assert len(layers) == 6
            return [calls.count(experts) for experts in layers]

        def double(value, hook):
            return value * 2

        others = [f"blocks.{n}.{name}" for n in range(6) for name in MOE if name != "moe.hook_expert_outs"]
        assert ran(model) == [1] * 6
        assert ran(model.run_with_cache, names_filter=others) == [1] * 6
        assert ran(model.run_with_hooks, fwd_hooks=[(name, lambda value, hook: None) for name in others]) == [1] * 6
        watched = ran(model.run_with_cache, names_filter=at("expert_outs"))
        assert watched == [1, 1, K + 1, 1, 1, 1]  # each rank alone, and the layer's own mix, so that no bit changes
        assert ran(model.run_with_hooks, fwd_hooks=[(at("expert_outs"), double)]) == [1, 1, K, 1, 1, 1]
        assert ran(model) == [1] * 6


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@every_class
def test_who_only_watches_changes_nothing(cls, grad):
    model, theirs = hooked(cls), tiny_gemma4("moe")
    theirs.set_attn_implementation("eager")
    with grad():
        logits = theirs(TOKENS, use_cache=False).logits
        for names in ([at("expert_outs")], [f"blocks.{n}.{name}" for n in range(6) for name in MOE]):
            watched, cache = model.run_with_cache(TOKENS, names_filter=names)
            assert set(cache) == set(names)
            assert gap(watched, logits) == 0


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
@every_class
def test_the_weighted_outputs_sum_to_what_the_experts_module_returns(cls, grad):
    names = [f"blocks.{n}.moe.hook_expert_{name}" for n in range(6) for name in ("weights", "outs")]
    names += [f"model.layers.{n}.experts" for n in range(6)]
    with grad():
        _, cache = hooked(cls).run_with_cache(TOKENS, names_filter=names)
    for n in range(6):
        weights, outs = (cache[f"blocks.{n}.moe.hook_expert_{name}"] for name in ("weights", "outs"))
        mix = (weights[..., None] * outs).sum(dim=2)
        assert gap(mix, cache[f"model.layers.{n}.experts"].view_as(mix)) <= 1e-6 * mix.abs().max()


@every_class
def test_an_edited_output_reaches_what_the_experts_module_returns(cls):
    """`experts.hook_out` is the mix of what was edited."""
    model, seen = hooked(cls), {}

    def keep(value, hook):
        seen["experts"] = value

    def double(value, hook):
        return 2 * value

    edits = [(at("expert_outs"), double), (f"blocks.{LAYER}.experts.hook_out", keep)]
    model.run_with_hooks(TOKENS, fwd_hooks=edits)
    plain = routing(model)
    mix = (plain["expert_weights"][..., None] * plain["expert_outs"]).sum(dim=2)
    assert gap(seen["experts"].view_as(mix), 2 * mix) <= 1e-5


# --- dtypes


@every_class
def test_a_model_in_bfloat16(cls):
    theirs = tiny_gemma4("moe").to(torch.bfloat16)
    theirs.set_attn_implementation("eager")
    model = build(cls, tiny_gemma4("moe").to(torch.bfloat16))
    names = [f"blocks.{n}.{name}" for n in range(6) for name in MOE]
    logits, cache = model.run_with_cache(TOKENS, names_filter=names)
    assert logits.dtype == torch.bfloat16
    assert gap(logits, theirs(TOKENS, use_cache=False).logits) == 0
    assert all(value.isfinite().all() for value in cache.values())
    dtypes = {name: {cache[f"blocks.{n}.{name}"].dtype for n in range(6)} for name in MOE}
    probs, weights, indices = theirs.model.layers[0].router(torch.ones(1, 64, dtype=torch.bfloat16))
    assert dtypes == {name: {torch.bfloat16} for name in MOE} | {
        "moe.hook_router_probs": {probs.dtype},  # float32 in newer transformers, and what follows of it
        "moe.hook_expert_weights": {weights.dtype},
        "moe.hook_expert_indices": {indices.dtype},
    }
    edits = [(name, lambda value, hook: value * 2 if value.is_floating_point() else value.flip(-1)) for name in names]
    edited = model.run_with_hooks(TOKENS, fwd_hooks=edits)
    assert edited.dtype == torch.bfloat16 and edited.isfinite().all()


# --- several edits in one run


@every_class
def test_edits_of_several_hook_points_compose(cls):
    """Logits choose; the indices that follow of them are shifted; the weights that follow are scaled."""
    edits = {
        at("router_logits"): lambda x: x.roll(1, dims=-1),
        at("router_probs"): lambda x: x.masked_fill(x == x.amax(-1, keepdim=True), 0),
        at("expert_indices"): lambda x: (x + 1) % EXPERTS,
        at("expert_weights"): lambda x: x * noise("weights", x).exp(),
        at("expert_outs"): lambda x: x + noise("outs", x),
        at("experts_out"): lambda x: x + noise("branch", x),
        at("router_logits", 4): lambda x: -x,
        at("expert_weights", 4): lambda x: x.flip(-1),
    }
    hooks = {name: (lambda value, hook, edit=edit: edit(value)) for name, edit in edits.items()}
    model, used = hooked(cls), {}
    for name, edit in edits.items():
        used[name] = edit
        by_hand = reference(eager("moe"), TOKENS, used).logits
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[(each, hooks[each]) for each in used])
        assert gap(logits, by_hand) <= 1e-4, name
    backwards = model.run_with_hooks(TOKENS, fwd_hooks=[(name, hooks[name]) for name in reversed(used)])
    assert torch.equal(backwards, logits)
    assert gap(logits, model(TOKENS)) > 1e-1


@every_class
def test_two_hooks_on_one_point_apply_in_turn(cls):
    """What the first leaves, in place or not, is what the second gets."""
    model, name = hooked(cls), at("router_logits")

    def add(value, hook):
        value.add_(noise("first", value))

    def roll(value, hook):
        return value.roll(1, dims=-1)

    both = model.run_with_hooks(TOKENS, fwd_hooks=[(name, add), (name, roll)])
    by_hand = reference(eager("moe"), TOKENS, {name: lambda x: (x + noise("first", x)).roll(1, dims=-1)}).logits
    other_way = reference(eager("moe"), TOKENS, {name: lambda x: x.roll(1, dims=-1) + noise("first", x)}).logits
    assert gap(both, by_hand) <= 1e-4 and gap(both, other_way) > 1e-2


@pytest.mark.parametrize("cls", ["bridge", "proxy"])
@pytest.mark.parametrize("wrong", [8, -1, 0.5])
def test_an_expert_that_does_not_exist_is_refused(cls, wrong):
    """Fused kernels would read past the weights."""
    model = Gemma4Bridge.boot(tiny_gemma4("moe")) if cls == "bridge" else Gemma4ProxyLM(tiny_gemma4("moe"))
    edit = ("blocks.2.moe.hook_expert_indices", lambda value, hook: value * 0 + wrong)
    with pytest.raises(ConfigError, match=r"must be left with integers in 0\.\.7"):
        model.run_with_hooks(TOKENS, fwd_hooks=[edit])
