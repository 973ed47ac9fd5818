"""`stop_at_layer` and `isolate_documents`, in both classes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sae_lens_gemma4.errors import ConfigError, UnknownNameError
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.geometry import text_decoder
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4
from tests.models.forms import CLASSES

TOKENS = torch.randint(30, 2000, (2, 20), generator=torch.Generator().manual_seed(1))
BOS = 2
both = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
each = pytest.mark.parametrize(
    ("variant", "make"), [pytest.param(v, m, id=f"{v}-{c}") for v in VARIANTS for c, m in CLASSES.items()]
)


@each
@torch.no_grad()
def test_a_run_stops_before_the_layer_and_returns_the_stream(variant: str, make: Callable[[Any], Any]) -> None:
    hf = tiny_gemma4(variant)
    model = make(hf)
    inner = model.original_model if isinstance(model, Gemma4Bridge) else hf
    ran: list[int] = []
    for n, layer in enumerate(text_decoder(inner).layers):
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))
    _, cache = model.run_with_cache(TOKENS)
    for stop in (0, 3, 5, -1, -6):
        expected = cache[f"blocks.{stop % 6}.hook_resid_pre"]
        ran.clear()
        assert torch.equal(model(TOKENS, stop_at_layer=stop), expected)
        assert ran == list(range(stop % 6))
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[], stop_at_layer=stop), expected)
        output, some = model.run_with_cache(TOKENS, stop_at_layer=stop)
        assert torch.equal(output, expected)
        assert not any(name.startswith(f"blocks.{n}.attn") for name in some for n in range(stop % 6, 6))
        assert torch.equal(some["hook_embed"], cache["hook_embed"])
    assert torch.equal(model(TOKENS, stop_at_layer=6), cache["blocks.5.hook_resid_post"])
    assert torch.equal(model(TOKENS), model(TOKENS))
    assert ran[-6:] == list(range(6))


@both
def test_a_hook_beyond_the_stop_raises(make: Callable[[Any], Any]) -> None:
    model = make(tiny_gemma4("ple"))
    keep = lambda value, hook: value  # noqa: E731
    for name in ("blocks.3.hook_resid_mid", "blocks.3.hook_attn_out", "blocks.5.hook_resid_pre", "ln_final.hook_out"):
        for run in (
            lambda name=name: model.run_with_cache(TOKENS, names_filter=[name], stop_at_layer=3),
            lambda name=name: model.run_with_hooks(TOKENS, fwd_hooks=[(name, keep)], stop_at_layer=3),
        ):
            with pytest.raises(ConfigError, match=rf"{name} would not fire: a run with stop_at_layer=3|would not fire"):
                run()
    _, cache = model.run_with_cache(TOKENS, names_filter="blocks.3.hook_resid_pre", stop_at_layer=3)
    assert "blocks.3.hook_resid_pre" in cache
    with pytest.raises(ConfigError, match="stop_at_layer must be an integer, not '3'"):
        model(TOKENS, stop_at_layer="3")
    for wrong in (7, -7):
        with pytest.raises(ConfigError, match=r"stop_at_layer must lie in -6\.\.6"):
            model(TOKENS, stop_at_layer=wrong)
    with pytest.raises(UnknownNameError):
        model.run_with_cache(TOKENS, names_filter=["blocks.1.hook_resid_pst"], stop_at_layer=3)
    assert torch.equal(model(TOKENS), model(TOKENS))


@each
@pytest.mark.filterwarnings("ignore:isolate_documents. no BOS opens a second")
@torch.no_grad()
def test_isolated_documents_are_as_if_alone(variant: str, make: Callable[[Any], Any]) -> None:
    """Longer than the sliding window of 8, of different lengths in the two blocks."""
    model = make(tiny_gemma4(variant))
    tokens = TOKENS.clone()
    tokens[0, [0, 11]] = BOS
    tokens[1, [0, 3, 14]] = BOS
    _, cache = model.run_with_cache(tokens, isolate_documents=True)
    for row, starts in ((0, (0, 11, 20)), (1, (0, 3, 14, 20))):
        for start, end in itertools.pairwise(starts):
            _, alone = model.run_with_cache(tokens[row : row + 1, start:end])
            for name in ("blocks.5.hook_resid_post", "blocks.2.hook_attn_out", "ln_final.hook_out"):
                difference = cache[name][row, start:end] - alone[name][0]
                assert difference.abs().max() <= 1e-5 * max(1, float(alone[name].abs().max()))
    packed = model(tokens)
    assert (packed - model(tokens, isolate_documents=True))[0, 12:].abs().max() > 1e-2
    assert torch.equal(model(TOKENS, isolate_documents=True), model(TOKENS))  # one document


@both
def test_what_does_not_go_with_isolation(make: Callable[[Any], Any]) -> None:
    model = make(tiny_gemma4("ple"))
    for name, value in (("attention_mask", torch.ones_like(TOKENS)), ("use_cache", True)):
        with pytest.raises(ConfigError, match=f"isolate_documents sets positions itself and cannot go with {name}"):
            model(TOKENS, isolate_documents=True, **{name: value})
    with pytest.raises(ConfigError, match=r"needs tokens|takes tokens"):
        model(torch.randn(1, 4, 64), isolate_documents=True)
    with pytest.warns(UserWarning, match="no BOS opens a second document"):
        model(TOKENS, isolate_documents=True)


@both
def test_filters_and_tokens_that_are_none(make: Callable[[Any], Any]) -> None:
    model = make(tiny_gemma4("ple"))
    nothing = lambda name: "nonsense" in name  # noqa: E731
    for run in (
        lambda: model.run_with_cache(TOKENS, names_filter=nothing),
        lambda: model.run_with_hooks(TOKENS, fwd_hooks=[(nothing, print)]),
        lambda: model.add_hook(nothing, print),
    ):
        with pytest.raises(ConfigError, match="The filter matches no hook"):
            run()
    with pytest.raises(
        UnknownNameError, match=r"Unknown argument of the model 'attention_msk'. Did you mean 'attention"
    ):
        model(TOKENS, attention_msk=None)
    with pytest.raises(ConfigError, match="tokens"):
        model(TOKENS[:, :0])
    names = {"blocks.1.hook_resid_post", "blocks.2.hook_resid_post"}
    assert set(model.run_with_cache(TOKENS, names_filter=names)[1].keys()) == names


@both
@torch.no_grad()
def test_the_loss_leaves_out_what_is_masked(make: Callable[[Any], Any]) -> None:
    model = make(tiny_gemma4("ple"))
    mask = torch.ones_like(TOKENS)
    mask[0, :7] = 0
    logits = model(TOKENS, attention_mask=mask)
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    both_kept = (mask[:, :-1] & mask[:, 1:]).bool()
    loss = model(TOKENS, attention_mask=mask, return_type="loss")
    torch.testing.assert_close(loss, nll[both_kept].mean(), rtol=1e-5, atol=1e-5)


@both
@torch.no_grad()
def test_arguments_of_the_model_reach_it(make: Callable[[Any], Any]) -> None:
    model = make(tiny_gemma4("ple"))
    mask = torch.ones_like(TOKENS)
    mask[:, 5:9] = 0
    assert (model(TOKENS, attention_mask=mask) - model(TOKENS))[:, 12:].abs().max() > 1e-3
