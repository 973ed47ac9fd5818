"""Every hook point, on every architecture, in both classes: what it shows is what the model computes, an edit there
does what the same edit does in a forward by hand, and each of its names means it.

The reference is `reference.py`; what that lacks (projections, and the logits before their soft cap) is tapped on
transformers' own modules. Edits differ at every position, because a shift common to all keys, all scores or all
logits leaves a softmax as it was. Unless a test says otherwise, the bridge runs eager attention and the proxy sdpa,
which are their defaults.
"""

import functools
from dataclasses import dataclass

import pytest
import torch

from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.hook_names import BLOCK_HOOKS, MODEL_HOOKS
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4, tiny_tokenizer
from tests.models.reference import Reference, reference
from tests.models.test_reference import TOKENS, eager, noise, plain, text_of

LAYERS = range(6)
FULL = (2, 5)  # the others attend over a window of 8
ADD = ("add", "zero", "in place")
RESID = "batch pos d_model"


@dataclass
class Kind:
    """How a kind of hook point is tested: its `value` against what, and with which of `EDITS` its `edit`."""

    shape: str
    value: str
    edit: tuple[str, ...]


# fmt: off
BLOCK = {
    "hook_resid_pre":           Kind(RESID, "reference", ADD),
    "attn.hook_q":              Kind("batch pos head head_dim", "module", ADD),
    "attn.hook_k":              Kind("batch pos kv_head head_dim", "module", ADD),
    "attn.hook_v":              Kind("batch pos kv_head head_dim", "module", ADD),
    "attn.hook_k_used":         Kind("batch pos kv_head head_dim", "reference", ADD),
    "attn.hook_v_used":         Kind("batch pos kv_head head_dim", "reference", ADD),
    "attn.hook_attn_scores":    Kind("batch head query key", "reference", ("repeat", *ADD)),
    "attn.hook_pattern":        Kind("batch head query key", "reference", ("repeat", *ADD)),
    "attn.hook_z":              Kind("batch pos head head_dim", "module", ADD),
    "hook_attn_out":            Kind(RESID, "reference", ADD),
    "hook_resid_mid":           Kind(RESID, "reference", ADD),
    "mlp.hook_pre":             Kind("batch pos d_mlp", "module", ADD),
    "mlp.hook_pre_linear":      Kind("batch pos d_mlp", "module", ADD),
    "mlp.hook_post":            Kind("batch pos d_mlp", "module", ADD),
    "mlp.hook_out":             Kind(RESID, "reference", ADD),
    "moe.hook_dense_out":       Kind(RESID, "reference", ADD),
    "moe.hook_router_logits":   Kind("batch pos expert", "reference", ("add", "in place", "roll")),
    "moe.hook_router_probs":    Kind("batch pos expert", "reference", ("drop", "roll", "scale in place")),
    "moe.hook_expert_indices":  Kind("batch pos k", "reference", ("shift", "repeat", "shift in place")),
    "moe.hook_expert_weights":  Kind("batch pos k", "reference", ("scale", *ADD)),
    "moe.hook_expert_outs":     Kind("batch pos k d_model", "reference", ("roll", "repeat", *ADD)),
    "moe.hook_experts_out":     Kind(RESID, "reference", ADD),
    "hook_mlp_out":             Kind(RESID, "reference", ADD),
    "hook_ple_out":             Kind(RESID, "reference", ADD),
    "hook_resid_prescale":      Kind(RESID, "reference", ADD),
    "hook_resid_post":          Kind(RESID, "reference", ADD),
}
MODEL = {
    "hook_embed":               Kind(RESID, "reference", ADD),
    "hook_ple_inputs":          Kind("batch pos layer d_ple", "reference", ADD),
    "ln_final.hook_out":        Kind(RESID, "reference", ADD),
    "hook_unembed":             Kind("batch pos vocab", "module", ADD),
}
# fmt: on


def add_and_zero_in_place(name, x):
    x.add_(noise(name, x))
    x[:, 3] = 0  # a position; of scores and patterns, a head


def in_place(edit):
    def hook(name, x):
        x.copy_(edit(name, x))

    return hook


EDITS = {
    "add": lambda name, x: x + noise(name, x),
    "zero": lambda name, x: torch.zeros_like(x),
    "in place": add_and_zero_in_place,
    "scale": lambda name, x: x * noise(name, x).exp(),
    "scale in place": in_place(lambda name, x: x * noise(name, x).exp()),
    "roll": lambda name, x: x.roll(1, dims=2),
    "drop": lambda name, x: x.masked_fill(x == x.amax(-1, keepdim=True), 0),
    "shift": lambda name, x: (x + 1) % 8,
    "shift in place": in_place(lambda name, x: (x + 1) % 8),
    "repeat": lambda name, x: x[:, :, :1].expand_as(x),  # the first expert's, or query's; a view of what the hook got
}
"""By the hook point's name and its value. Those in place return nothing."""
VALUES = {"eager": 1e-5, "sdpa": 1e-4}
LOGITS = 1e-4

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
every_class = pytest.mark.parametrize("cls", ["bridge", "proxy"])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def hooked(cls, variant, attention=None):
    """A model of either class; without `attention`, and where it is the class's default, by that default."""
    return built(cls, variant, None if attention == {"bridge": "eager", "proxy": "sdpa"}[cls] else attention)


@functools.cache
def built(cls, variant, attention):
    if cls == "bridge":
        return Gemma4Bridge.boot(tiny_gemma4(variant), tiny_tokenizer(), attn_implementation=attention)
    return Gemma4ProxyLM(tiny_gemma4(variant), tiny_tokenizer(), attn_implementation=attention)


def has(variant, kind, layer=0):
    """Whether a model has a kind of hook point, in a layer, as its config has it."""
    ple = variant.startswith("ple")
    if kind in ("hook_ple_inputs", "hook_ple_out"):
        return ple
    if kind.startswith("moe."):
        return variant == "moe"
    if kind in ("attn.hook_k", "attn.hook_v"):
        shares_kv = ple and layer >= 3
        k_is_v = variant in ("dense_keqv", "moe") and layer in FULL
        return not shares_kv and not (k_is_v and kind == "attn.hook_v")
    return True


def names(variant, layers=LAYERS, value="reference module"):
    """Canonical names of a model's hook points: those in `layers`, and those outside any."""
    blocks = [f"blocks.{n}.{k}" for n in layers for k in BLOCK if has(variant, k, n) and BLOCK[k].value in value]
    return blocks + [k for k in MODEL if has(variant, k) and MODEL[k].value in value]


def kind_of(name):
    return BLOCK[name.split(".", 2)[2]] if name.startswith("blocks.") else MODEL[name]


def is_float(name):
    return not name.endswith("hook_expert_indices")


def shape_of(variant, name):
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
    one_kv_head = variant.startswith("ple") or (variant in ("dense_keqv", "moe") and layer in FULL)
    sizes = {"batch": 2, "pos": 20, "query": 20, "key": 20, "d_model": 64, "head": 4, "expert": 8, "k": 3, "layer": 6}
    sizes |= {"kv_head": 1 if one_kv_head else 2, "head_dim": 32 if layer in FULL else 16, "d_ple": 12, "vocab": 2048}
    sizes["d_mlp"] = 192 if variant.startswith("ple") and layer >= 3 else 96
    return tuple(sizes[axis] for axis in kind_of(name).shape.split())


def at_modules(model, tokens, edits=None):
    """What `reference` lacks, by plain hooks on transformers' modules: what it returns, of those names."""
    values, undo = {}, []

    def tap(name, value, head_dim):
        split = value.unflatten(-1, (-1, head_dim)) if head_dim else value
        values[name] = edits[name](split.clone()) if edits and name in edits else split.clone()
        return values[name].reshape(value.shape)

    def on_output(module, name, head_dim=None):
        undo.append(module.register_forward_hook(lambda _, args, out: tap(name, out, head_dim)))

    def on_input(module, name, head_dim=None):
        undo.append(module.register_forward_pre_hook(lambda _, args: tap(name, args[0], head_dim)))

    for i, layer in enumerate(text_of(model).layers):
        attn, mlp, block = layer.self_attn, layer.mlp, f"blocks.{i}"
        for each in "qkv":
            if (module := getattr(attn, f"{each}_proj", None)) is not None:
                on_output(module, f"{block}.attn.hook_{each}", attn.head_dim)
        on_input(attn.o_proj, f"{block}.attn.hook_z", attn.head_dim)
        on_output(mlp.gate_proj, f"{block}.mlp.hook_pre")
        on_output(mlp.up_proj, f"{block}.mlp.hook_pre_linear")
        on_input(mlp.down_proj, f"{block}.mlp.hook_post")
    on_output(model.lm_head, "hook_unembed")
    logits = model(tokens, use_cache=False).logits
    for handle in undo:
        handle.remove()
    return Reference(logits, values)


def expected(variant, name, edit, tokens=TOKENS):
    """The logits by hand where one hook point is edited."""
    model, by_hand = eager(variant), reference if kind_of(name).value == "reference" else at_modules
    return by_hand(model, tokens, {name: functools.partial(edited, edit, name)}).logits


def edited(edit, name, value):
    result = EDITS[edit](name, value)
    return value if result is None else result


def with_edit(model, name, edit, tokens=TOKENS):
    return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: EDITS[edit](name, value))])


def gap(actual, expected):
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


def beyond(atol, actual, expected):
    """The names whose values differ by more than `atol`, or than that much of the largest value: on two threads, sums
    over experts come in another order."""
    gaps = {name: gap(actual[name], value) / max(1.0, float(value.abs().max())) for name, value in expected.items()}
    return {name: off for name, off in gaps.items() if not off <= atol}


# --- which there are


def test_the_tables_are_the_packages():
    for ours, theirs in ((BLOCK, BLOCK_HOOKS), (MODEL, MODEL_HOOKS)):
        assert [(name, kind.shape) for name, kind in ours.items()] == [
            (name, hook.shape) for name, hook in theirs.items()
        ]


@every_class
@every_variant
def test_a_model_has_the_hook_points_of_its_layers(variant, cls):
    points = hooked(cls, variant).hook_dict
    ours = {name for name in points if name.split(".", 2)[-1] in BLOCK or name in MODEL}
    assert ours == set(names(variant))
    assert all(points[name] is hooked(cls, variant).hook_point(name) for name in ours)


@every_variant
def test_a_name_of_a_bridge_leads_to_one_point_by_every_road(variant):
    bridge = hooked("bridge", variant)
    for name, point in bridge.hook_dict.items():
        assert bridge.hook_point(name) is point, name
        assert functools.reduce(getattr, name.split("."), bridge) is point, name


# --- values


@functools.cache
def values_by_hand(variant):
    return plain(variant).values | at_modules(eager(variant), TOKENS).values


@every_attention
@every_class
@every_variant
def test_every_value_is_what_the_model_computes(variant, cls, attention):
    """Under sdpa to its own rounding: there transformers' hidden states, of up to 26, are 2.4e-5 from eager ones."""
    _, cache = hooked(cls, variant, attention).run_with_cache(TOKENS)
    by_hand = values_by_hand(variant)
    assert by_hand.keys() == set(names(variant))
    assert {name: tuple(cache[name].shape) for name in by_hand} == {name: shape_of(variant, name) for name in by_hand}
    assert beyond(VALUES[attention], cache, by_hand) == {}


@every_attention
@every_class
@every_variant
def test_who_only_listens_changes_nothing(variant, cls, attention):
    model, theirs = hooked(cls, variant, attention), tiny_gemma4(variant) if attention == "sdpa" else eager(variant)
    assert theirs.config._attn_implementation == attention
    logits, listened_to = theirs(TOKENS, use_cache=False).logits, set()
    assert gap(model(TOKENS), logits) == 0
    listening = [(name, lambda value, hook, name=name: listened_to.add(name)) for name in model.hook_dict]
    assert gap(model.run_with_hooks(TOKENS, fwd_hooks=listening), logits) == 0
    assert gap(model.run_with_cache(TOKENS)[0], logits) == 0
    assert listened_to >= set(names(variant))


@every_class
@every_variant
def test_the_identities_hold(variant, cls):
    model = hooked(cls, variant)
    mixes = [f"model.layers.{n}.experts" for n in LAYERS if variant == "moe"]
    _, cache = model.run_with_cache(TOKENS, names_filter=names(variant) + mixes)
    for n, layer in enumerate(text_of(eager(variant)).layers):
        pre, attn, mid, mlp, prescale, post = (
            cache[f"blocks.{n}.hook_{name}"]
            for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_prescale", "resid_post")
        )
        ple = cache[f"blocks.{n}.hook_ple_out"] if has(variant, "hook_ple_out") else 0
        assert gap(mid, pre + attn) <= 1e-6
        assert gap(prescale, mid + mlp + ple) <= 2e-6
        assert gap(post, prescale * layer.layer_scalar) <= 1e-6
    for n, mix in enumerate(mixes):
        weights, outs = (cache[f"blocks.{n}.moe.hook_expert_{name}"] for name in ("weights", "outs"))
        assert gap((weights[..., None] * outs).sum(dim=2).flatten(0, 1), cache[mix].view(40, 64)) <= 2e-6


# --- edits


def cases(variant):
    """Every kind in the first layer, in one of full attention and in the last; edits in place in the second of these.

    Where keys and values are shared, in sliding layers that give (1) and take (3) as well.
    """
    shared = variant == "ple"
    for name in names(variant, (0, 1, 2, 3, 5) if shared else (0, 2, 5)):
        for edit in kind_of(name).edit:
            layers = (1, 2) if edit.endswith("in place") else (0, 5) if edit == "zero" else LAYERS
            if name in names(variant, layers):
                yield name, edit


@every_variant
def test_every_edit_does_what_it_does_by_hand(variant):
    bridge, proxy = hooked("bridge", variant), hooked("proxy", variant)
    failures = {}
    for name, edit in cases(variant):
        by_hand = expected(variant, name, edit)
        gaps = [gap(with_edit(model, name, edit), by_hand) for model in (bridge, proxy)]
        moved = gap(by_hand, plain(variant).logits)
        if not (all(off <= LOGITS for off in gaps) and moved > 1e-3):
            failures[name, edit] = f"bridge, proxy: {gaps} off; the edit itself: {moved}"
    assert failures == {}


# --- what a bridge has besides


@every_class
@every_variant
def test_every_name_of_a_bridge_fires_once(variant, cls):
    """In both classes. No text reaches the towers, which is all that may not fire, and which the proxy has not."""
    bridge, model = hooked("bridge", variant), hooked(cls, variant)
    towers = {name for name in bridge.hook_dict if name.startswith("vision_")}
    expected = {name: int(name not in towers) for name in bridge.hook_dict if cls == "bridge" or name not in towers}
    fired = dict.fromkeys(expected, 0)

    def count(value, hook, name):
        fired[name] += 1

    model.run_with_hooks(TOKENS, fwd_hooks=[(name, functools.partial(count, name=name)) for name in fired])
    assert {name: n for name, n in fired.items() if n != expected[name]} == {}


@every_variant
def test_every_hook_point_of_a_bridge_moves_the_logits_and_as_in_the_proxy(variant):
    """Each of them edits a row of its own in one batch of copies."""
    bridge, proxy = hooked("bridge", variant), hooked("proxy", variant, "eager")
    points = {point: name for name, point in bridge.hook_dict.items() if not name.startswith("vision_")}
    tokens = TOKENS[:1, :10].repeat(len(points) + 1, 1)

    def edit(value, hook, row):
        rows = value.clone().view(len(tokens), -1)  # the batch is flat within an MoE layer
        if value.is_floating_point():
            rows[row] += torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(row))
        else:  # tokens or experts
            rows[row] = (rows[row] + 1) % 8
        return rows.view(value.shape)

    hooks = [(name, functools.partial(edit, row=row)) for row, name in enumerate(points.values())]
    logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    moved = (logits - bridge(tokens)).abs().amax(dim=(1, 2))
    assert {name: off.item() for name, off in zip(points.values(), moved, strict=False) if not off > 1e-3} == {}
    assert moved[-1] < LOGITS  # nobody's row
    assert gap(logits, proxy.run_with_hooks(tokens, fwd_hooks=hooks)) <= LOGITS


@every_variant
def test_both_classes_show_the_same_by_every_name_of_a_bridge(variant):
    _, theirs = hooked("bridge", variant).run_with_cache(TOKENS)
    _, ours = hooked("proxy", variant, "eager").run_with_cache(TOKENS, names_filter=list(theirs))
    assert len(theirs) > 240
    assert beyond(1e-5, ours, dict(theirs.items())) == {}


# --- names

NORMS = ["post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "post_per_layer_input_norm"]
ALIASES = [  # canonical, a bridge's path, transformers' path within the decoder where it is a module's output
    ("blocks.2.hook_resid_pre", "blocks.2.hook_in", None),
    ("blocks.2.ln1.hook_out", "blocks.2.ln1.hook_out", "layers.2.input_layernorm"),
    ("blocks.2.attn.hook_q", "blocks.2.attn.q.hook_out", "layers.2.self_attn.q_proj"),
    ("blocks.2.attn.hook_k", "blocks.2.attn.k.hook_out", "layers.2.self_attn.k_proj"),
    ("blocks.1.attn.hook_v", "blocks.1.attn.v.hook_out", "layers.1.self_attn.v_proj"),
    ("blocks.2.attn.hook_z", "blocks.2.attn.o.hook_in", None),
    ("blocks.2.attn.hook_pattern", "blocks.2.attn.hook_pattern", None),
    ("blocks.2.hook_attn_out", "blocks.2.ln1_post.hook_out", "layers.2.post_attention_layernorm"),
    ("blocks.2.hook_resid_mid", "blocks.2.hook_resid_mid", None),
    ("blocks.2.mlp.hook_pre", "blocks.2.mlp.gate.hook_out", "layers.2.mlp.gate_proj"),
    ("blocks.2.mlp.hook_post", "blocks.2.mlp.out.hook_in", None),
    ("blocks.2.mlp.hook_out", "blocks.2.mlp.hook_out", "layers.2.mlp"),
    ("blocks.2.moe.hook_dense_out", f"blocks.2.{NORMS[0]}.hook_out", f"layers.2.{NORMS[0]}"),
    ("blocks.2.moe.hook_router_logits", "blocks.2.moe.hook_router_logits", "layers.2.router.proj"),
    ("blocks.3.moe.hook_router_probs", "blocks.3.router.hook_out", "layers.3.router"),
    ("blocks.2.experts.hook_out", "blocks.2.experts.hook_out", "layers.2.experts"),
    ("blocks.2.moe.hook_experts_out", f"blocks.2.{NORMS[1]}.hook_out", f"layers.2.{NORMS[1]}"),
    ("blocks.2.hook_mlp_out", "blocks.2.ln2_post.hook_out", "layers.2.post_feedforward_layernorm"),
    ("blocks.2.hook_ple_out", f"blocks.2.{NORMS[2]}.hook_out", f"layers.2.{NORMS[2]}"),
    ("blocks.2.hook_resid_post", "blocks.2.hook_out", "layers.2"),
    ("hook_embed", "embed.hook_out", "embed_tokens"),
    ("ln_final.hook_out", "ln_final.hook_out", "norm"),
    ("hook_unembed", "unembed.hook_out", "lm_head"),
]


def name_columns(variant):
    """The same hook points by each kind of name. What is no module's output keeps its canonical name."""
    rows = []
    for canonical, path, module in ALIASES:
        kind = canonical.removeprefix("blocks.2.").removeprefix("blocks.3.")
        if not has(variant, "moe." + kind if kind.startswith("experts.") else kind, 2):
            continue
        prefixes = ("", "") if module == "lm_head" else ("model.language_model.", "model.")
        rows.append([canonical, path, *(canonical if module is None else prefix + module for prefix in prefixes)])
    return list(zip(*rows, strict=True))


@every_class
@every_variant
def test_any_name_of_a_hook_point_will_do(variant, cls):
    model = hooked(cls, variant)
    canonical, *others = name_columns(variant)
    assert len(canonical) >= 15
    _, cache = model.run_with_cache(TOKENS, names_filter=list(canonical))
    adds = [lambda value, hook, name=name: value * (1 + noise(name, value) / 9) for name in canonical]
    logits = model.run_with_hooks(TOKENS, fwd_hooks=list(zip(canonical, adds, strict=True)))
    assert gap(logits, model(TOKENS)) > 1e-2
    for names_ in others:
        _, filtered = model.run_with_cache(TOKENS, names_filter=list(names_))
        assert set(filtered) == set(cache) == set(canonical)
        for name, known in zip(names_, canonical, strict=True):
            assert name in cache and known in filtered, name
            assert torch.equal(cache[name], filtered[name]) and filtered[name] is filtered[known], name
            assert model.hook_point(name) is model.hook_point(known), name
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=list(zip(names_, adds, strict=True))), logits)
        for name, add in zip(names_, adds, strict=True):
            model.add_hook(name, add)
        assert torch.equal(model(TOKENS), logits)
        model.reset_hooks()
    for name in ("blocks.2.hook_out", "model.layers.2.post_attention_layernorm", "blocks.2.attn.o.hook_in", "lm_head"):
        _, one = model.run_with_cache(TOKENS, names_filter=name)
        assert len(one) == 1 and torch.equal(one[name], cache[name])


# --- gradients


def gradients_by_hand(variant, floats):
    kept = {}

    def keep(value, name):
        kept[name] = value
        return value

    by_hand = {}
    for forward, source in ((reference, "reference"), (at_modules, "module")):
        some = [name for name in floats if kind_of(name).value == source]
        edits = {name: functools.partial(keep, name=name) for name in some}
        objective = forward(eager(variant), TOKENS, edits).logits.logsumexp(-1).sum()
        by_hand |= dict(zip(some, torch.autograd.grad(objective, [kept[name] for name in some]), strict=True))
    return by_hand


@every_class
@every_variant
def test_every_gradient_is_autograds(variant, cls):
    """By backward hooks, and as the `grad` of what a forward hook kept and handed on."""
    model, floats = hooked(cls, variant), [name for name in names(variant) if is_float(name)]
    arrived, kept = {}, {}

    def arrive(gradient, hook, name):
        assert name not in arrived, f"{name}: twice"
        arrived[name] = gradient.clone()

    def keep(value, hook, name):
        kept[name] = value = value.clone()  # hook_embed and the first hook_resid_pre are one tensor
        value.retain_grad()
        return value

    with torch.enable_grad():
        by_hand = gradients_by_hand(variant, floats)
        with model.hooks(bwd_hooks=[(name, functools.partial(arrive, name=name)) for name in floats]):
            model(TOKENS).logsumexp(-1).sum().backward()
        with model.hooks(fwd_hooks=[(name, functools.partial(keep, name=name)) for name in floats]):
            model(TOKENS).logsumexp(-1).sum().backward()
    model.zero_grad()
    largest = {name: gradient.abs().max() for name, gradient in by_hand.items()}
    assert all(largest.values()) and by_hand.keys() == set(floats)
    for ours in (arrived, {name: value.grad for name, value in kept.items()}):
        off = {name: gap(ours[name], theirs) / largest[name] for name, theirs in by_hand.items()}
        assert {name: relative.item() for name, relative in off.items() if not relative <= 1e-4} == {}


# --- attention that has no pattern of its own


@pytest.mark.parametrize("n", [20, 5])
@every_class
@every_variant
def test_scores_and_patterns_can_be_seen_and_edited_under_sdpa(variant, cls, n):
    """Of 5 tokens no window hides any, and transformers passes no mask at all."""
    tokens, model = TOKENS[:, :n], hooked(cls, variant, "sdpa")
    by_hand = reference(eager(variant), tokens)
    both = {name: value for name, value in by_hand.values.items() if name.endswith(("attn_scores", "pattern"))}
    _, cache = model.run_with_cache(tokens, names_filter=list(both))
    assert beyond(VALUES["sdpa"], cache, both) == {}
    failures = {}
    for name in (name for name in both if name.startswith(("blocks.1.", "blocks.5."))):
        theirs = expected(variant, name, "add", tokens)
        off, moved = gap(with_edit(model, name, "add", tokens), theirs), gap(theirs, by_hand.logits)
        if not (off <= LOGITS and moved > 1e-3):
            failures[name] = f"{off} off; the edit itself: {moved}"
    assert failures == {}
