"""The lens against the model's own logits, and against probabilities computed in float64 by plain loops."""

import json
import math
import sys
import unicodedata

import numpy as np
import pytest
import regex
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig
from scipy import stats

import sae_lens_gemma4 as g4
from sae_lens_gemma4.errors import ConfigError, DataError, ModelError, UnknownNameError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.layers import lens as lens_module
from sae_lens_gemma4.interp.layers.lens import decoder_lens, logit_lens
from sae_lens_gemma4.interp.layers.lens_result import first_kept, means_over_prompts
from sae_lens_gemma4.interp.layers.scripts import _SCRIPTS, OTHER, TokenTexts, script_of
from sae_lens_gemma4.interp.unembedding import Unembedding, ends_of
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer

PROMPTS = ["Return the list", "The file object has a method", "An iterator", "x = [1, 2, 3]"]


def booted(variant, model_class):
    hf = tiny_gemma4(variant)
    if model_class == "Gemma4Bridge":
        return g4.Gemma4Bridge.boot(hf, tiny_tokenizer())
    return g4.Gemma4ProxyLM(hf, tiny_tokenizer())


@pytest.fixture(scope="module")
def model():
    return g4.load_model("gemma-4-demo", "Gemma4ProxyLM")


@pytest.fixture(scope="module")
def found(model):
    return logit_lens(model, PROMPTS, positions="all", targets=" the", top=3)


def tokens_of(model, prompt):
    return torch.tensor([model.tokenizer(prompt)["input_ids"]])


def by_hand(model, prompt, final_norm=True):
    """Logits `[l, pos, v]` after the soft cap, in float64, by the formulas of an RMS norm and a matrix product."""
    hf = getattr(model, "original_model", None) or model.model
    decoder, text = getattr(hf.model, "language_model", hf.model), hf.config.get_text_config()
    hooks = ["hook_embed", *(f"blocks.{n}.hook_resid_post" for n in range(text.num_hidden_layers))]
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens_of(model, prompt), names_filter=hooks, prepend_bos=False)
    stream = torch.stack([cache[hook][0] for hook in hooks]).double()
    if not final_norm:
        return stream @ hf.lm_head.weight.detach().double().T, logits[0]
    normed = stream / (stream.square().mean(-1, keepdim=True) + text.rms_norm_eps).sqrt()
    raw = normed * decoder.norm.weight.detach().double() @ hf.lm_head.weight.detach().double().T
    return text.final_logit_softcapping * torch.tanh(raw / text.final_logit_softcapping), logits[0]


# Against the model


@pytest.mark.parametrize("variant", ["ple", "moe", "unified", "dense_keqv", "ple_multimodal"])
@pytest.mark.parametrize("model_class", ["Gemma4ProxyLM", "Gemma4Bridge"])
def test_the_last_layer_s_figures_are_those_of_the_model_s_own_logits(variant, model_class):
    model = booted(variant, model_class)
    found = logit_lens(model, PROMPTS, positions="all", top=4)
    with torch.no_grad():
        for number, prompt in enumerate(PROMPTS):
            logits = model.run_with_cache(tokens_of(model, prompt), names_filter=["hook_embed"], prepend_bos=False)[0]
            mine = found.prompt_n == number
            own = logits[0].softmax(-1)[1:]  # all but BOS
            top = own.topk(4)
            assert (found.top_id_nlk[mine, -1] == top.indices.numpy()).all()
            np.testing.assert_allclose(found.top_prob_nlk[mine, -1], top.values, rtol=1e-5)
            assert (found.final.id_n[mine] == logits[0, 1:].argmax(-1).numpy()).all()
            assert list(found.position_n[mine]) == list(range(1, len(own) + 1))
            np.testing.assert_allclose(found.entropy_nl[mine, -1], stats.entropy(own.double(), axis=1), rtol=1e-4)
    assert abs(found.kl_nl[:, -1]).max() < 1e-6
    assert (found.final.rank_nl[:, -1] == 1).all() and (found.commitment_n <= 6).all()


@pytest.mark.parametrize("final_norm", [True, False])
def test_every_layer_s_figures_are_those_of_plain_formulas(model, final_norm):
    found = logit_lens(model, PROMPTS, positions="all", targets=[7, 30, 7, 500], top=3, final_norm=final_norm)
    assert found.layers == (None, 0, 1, 2, 3, 4, 5) and found.n_layers == 6
    n = 0
    for number, prompt in enumerate(PROMPTS):
        logits_lpv, own_pv = by_hand(model, prompt, final_norm)
        final_lp = own_pv.double().log_softmax(-1)
        tokens = tokens_of(model, prompt)[0].tolist()
        for position in range(1, len(tokens)):
            assert (found.prompt_n[n], found.position_n[n], found.token_n[n]) == (number, position, tokens[position])
            final = int(own_pv[position].argmax())
            following = tokens[position + 1] if position + 1 < len(tokens) else -1
            target = [7, 30, 7, 500][number]
            for at in range(7):
                logits = logits_lpv[at, position].tolist()
                whole = logits_lpv[at, position].softmax(-1)
                assert found.entropy_nl[n, at] == pytest.approx(stats.entropy(whole), rel=1e-3, abs=1e-5)
                kl = stats.entropy(final_lp[position].exp(), whole)
                if math.isfinite(kl):
                    assert found.kl_nl[n, at] == pytest.approx(kl, rel=1e-3, abs=1e-5)
                order = sorted(range(len(logits)), key=lambda i: -logits[i])
                assert found.top_id_nlk[n, at].tolist() == order[:3]
                np.testing.assert_allclose(found.top_prob_nlk[n, at], whole[order[:3]], rtol=1e-3)
                for followed, token in [(found.final, final), (found.following, following), (found.target, target)]:
                    assert followed.id_n[n] == token
                    if token >= 0:
                        assert followed.rank_nl[n, at] == 1 + sum(x > logits[token] for x in logits)
                        assert followed.prob_nl[n, at] == pytest.approx(float(whole[token]), rel=1e-3, abs=1e-12)
            n += 1
    assert n == len(found.token_n)


def test_both_classes_and_both_forms_of_prompts_give_the_same(found):
    bridge = g4.load_model("gemma-4-demo", "Gemma4Bridge")
    other = logit_lens(bridge, PROMPTS, positions="all", targets=" the", top=3)
    np.testing.assert_allclose(other.kl_nl, found.kl_nl, rtol=1e-3, atol=1e-5)
    rows = [bridge.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [bridge.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    as_tokens = logit_lens(bridge, padded, positions="all", targets=" the", top=3)
    for name in ("prompt_n", "position_n", "token_n", "top_id_nlk"):
        assert (getattr(as_tokens, name) == getattr(other, name)).all()
    np.testing.assert_allclose(as_tokens.kl_nl, other.kl_nl, rtol=1e-4, atol=1e-6)


def test_the_last_position_alone_is_that_of_all_and_chunks_change_nothing(model, found, monkeypatch):
    last = logit_lens(model, PROMPTS, targets=" the", top=3)
    ends = [int(np.flatnonzero(found.prompt_n == number)[-1]) for number in range(4)]
    np.testing.assert_allclose(last.top_prob_nlk, found.top_prob_nlk[ends], rtol=1e-4)
    assert (last.following.id_n == -1).all() and "following_probability" not in last.to_dict()["curves"]
    monkeypatch.setattr(lens_module, "_LOGITS", 2 * 2048)
    chunked = logit_lens(model, PROMPTS, positions="all", targets=" the", top=3, batch_prompts=1)
    np.testing.assert_allclose(chunked.entropy_nl, found.entropy_nl, rtol=1e-4)
    assert (chunked.final.rank_nl == found.final.rank_nl).all()


def test_a_text_that_begins_with_bos_gets_no_second_one(model):
    once, written = (logit_lens(model, prefix + PROMPTS[0], positions="all") for prefix in ("", "<bos>"))
    assert (once.position_n == written.position_n).all() and (once.token_n == written.token_n).all()
    np.testing.assert_allclose(once.kl_nl, written.kl_nl, rtol=1e-5)


def test_layers_may_be_left_out_but_for_the_last(model, found):
    some = logit_lens(model, PROMPTS, positions="all", layers=[3, 1], top=3)
    assert some.layers == (None, 1, 3, 5)
    np.testing.assert_allclose(some.kl_nl, found.kl_nl[:, [0, 2, 4, 6]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_sixteen_bits_have_ranks_without_ties(dtype):
    """Ranks are those of float64 products of the model's own normed activations; of its own products many are not."""
    model = g4.load_model("gemma-4-demo", "Gemma4ProxyLM", dtype=dtype)
    found = logit_lens(model, PROMPTS, positions="all", targets=7, top=1)
    hooks = ["hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(6))]
    norm, weight_vd = model.model.model.norm, model.model.lm_head.weight.detach()
    exact, own = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            _, cache = model.run_with_cache(tokens_of(model, prompt), names_filter=hooks, prepend_bos=False)
            x_pld = torch.stack([norm(cache[hook][0, 1:]) for hook in hooks], dim=1)
            for ranks, logits_plv in (
                (exact, x_pld.double() @ weight_vd.double().T),
                (own, model.model.lm_head(x_pld)),
            ):
                ranks.append((logits_plv > logits_plv[..., [7]]).sum(-1) + 1)
    wrong = [(found.target.rank_nl != torch.cat(ranks).numpy()).mean() for ranks in (exact, own)]
    assert wrong[0] < 0.01 and wrong[1] > 0.1


def test_a_bias_of_the_unembedding_and_parts_of_it_are_read(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 50)
    ends = lens_module.Ends(head.weight, torch.nn.Identity(), torch.nn.Identity(), head, None, None)
    monkeypatch.setattr(lens_module, "_ROWS", 7)
    x_rd = torch.randn(5, 8, generator=generator)
    with torch.no_grad():
        np.testing.assert_allclose(lens_module.in_float32(ends).unembed(x_rd), head(x_rd), atol=1e-6)


def test_progress_is_by_prompt_and_silent_by_default(model, capsys):
    logit_lens(model, PROMPTS)
    assert "Reading the layers" not in capsys.readouterr().err
    logit_lens(model, PROMPTS, batch_prompts=1, progress=True)
    assert f"Reading the layers: 100%|██████████| {len(PROMPTS)}/{len(PROMPTS)}" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_sixteen_bits_say_what_they_say(dtype):
    model = g4.load_model("gemma-4-demo", "Gemma4ProxyLM", dtype=dtype)
    found = logit_lens(model, PROMPTS, top=1)
    with torch.no_grad():
        for number, prompt in enumerate(PROMPTS):
            own = model.run_with_cache(tokens_of(model, prompt), names_filter=["hook_embed"])[0][0, -1].float()
            assert found.top_prob_nlk[number, -1, 0] == pytest.approx(float(own.softmax(-1).max()), rel=0.05)
    assert (found.commitment_n <= 6).all()


def test_a_model_with_more_between_its_last_layer_and_its_logits_is_refused(model, monkeypatch):
    ends = ends_of(model)
    monkeypatch.setattr(lens_module, "ends_of", lambda _: ends._replace(softcap=None))
    with pytest.raises(ModelError, match=r"logits of this Gemma4ProxyLM are not its last layer .*differ by up to"):
        logit_lens(model, PROMPTS)
    monkeypatch.setattr(lens_module, "ends_of", lambda _: None)
    with pytest.raises(ModelError, match="final norm and unembedding of this Gemma4ProxyLM are not where"):
        logit_lens(model, PROMPTS)


def test_transformer_lens_s_own_models_can_be_read():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=2048, act_fn="gelu", output_logits_soft_cap=5.0
    )
    model = HookedTransformer(config, tokenizer=tiny_tokenizer())
    tokens = torch.tensor([[2, 5, 100, 7]])
    found = logit_lens(model, tokens, top=2)
    own = model(tokens)[0, -1].softmax(-1).topk(2)
    assert found.top_id_nlk[0, -1].tolist() == own.indices.tolist()
    np.testing.assert_allclose(found.top_prob_nlk[0, -1], own.values.detach(), rtol=1e-4)


# What is asked for wrongly


@pytest.mark.parametrize(
    ("asked", "error", "reason"),
    [
        ({"prompts": ""}, DataError, "Prompt 0 is ''; a prompt is a text that is not empty"),
        ({"prompts": ["a", None]}, DataError, "Prompt 1 is None"),
        ({"prompts": []}, DataError, "There is no prompt"),
        ({"prompts": "<bos>"}, DataError, "Prompt 0 \\('<bos>'\\) has no token that counts, only BOS or padding"),
        ({"prompts": torch.zeros(1, 2).long()}, DataError, "Prompt 0 \\('tokens'\\) has no token that counts"),
        ({"prompts": torch.tensor([[2, 2048]])}, DataError, "holds token id 2048; the model has 2048 tokens"),
        ({"prompts": torch.zeros(3).long()}, DataError, "integers \\[prompt, pos\\], not torch.int64 \\(3,\\)"),
        ({"targets": "the list of files"}, ConfigError, "Target 'the list of files' is \\d tokens \\('.*', '.*'\\)"),
        ({"targets": ""}, ConfigError, "Target '' is 0 tokens \\(none\\)"),
        ({"targets": 2048}, ConfigError, "There is no token 2048; the model has 2048"),
        ({"targets": -1}, ConfigError, "There is no token -1"),
        ({"targets": [1.5] * 4}, ConfigError, "A target is a token's text or its id, not 1.5"),
        ({"targets": [1, 2]}, ConfigError, "There are 2 targets and 4 prompts"),
        ({"layers": [6]}, ConfigError, "There is no layer 6; the model has 6, 0 to 5"),
        ({"layers": [-1]}, ConfigError, "There is no layer -1"),
        ({"top": 0}, ConfigError, "top must be from 1 to 2048"),
        ({"batch_prompts": 0}, ConfigError, "batch_prompts from 1"),
        ({"positions": "first"}, UnknownNameError, "Unknown positions 'first'"),
    ],
)
def test_what_cannot_be_read_is_named(model, asked, error, reason):
    with pytest.raises(error, match=reason):
        logit_lens(model, **{"prompts": PROMPTS, **asked})


# Commitment


@given(holds=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5))
def test_a_commitment_is_the_first_place_from_which_all_hold(holds):
    def plainly(row):
        return next((at for at in range(5) if all(row[at:])), None)

    assert first_kept(np.array(holds)).tolist() == [plainly(row) for row in holds]


def test_commitments_are_counted_by_layer(found):
    document = found.to_dict()
    counted = document["commitment"]
    plainly = []
    for top_lk, final in zip(found.top_id_nlk, found.final.id_n, strict=True):
        at = 6
        while at > 0 and top_lk[at - 1, 0] == final:
            at -= 1
        plainly.append(at)
    assert found.commitment_n.tolist() == plainly
    assert counted["counts"] == [plainly.count(at) for at in range(7)] and counted["never"] == 0
    assert counted["mean_layers_run"] == pytest.approx(np.mean(plainly))
    shares = [sum(p <= at for p in plainly) / len(plainly) for at in range(7)]
    assert counted["committed_by"]["values"] == pytest.approx(shares) and shares[-1] == 1
    assert counted["median_layer"] == sorted(plainly)[(len(plainly) - 1) // 2] - 1
    assert counted["committed_by"]["intervals"] is None  # of four prompts
    script = document["script_commitment"]
    assert all(a <= b for a, b in zip(found.script_commitment_n, found.commitment_n, strict=True))
    assert sum(script["counts"]) == len(plainly)


def test_without_the_norm_a_position_may_never_commit():
    bare = logit_lens(booted("ple", "Gemma4ProxyLM"), PROMPTS, positions="all", final_norm=False)
    counted = bare.to_dict()["commitment"]
    never = int((bare.top_id_nlk[:, -1, 0] != bare.final.id_n).sum())
    assert counted["never"] == never > 0
    assert counted["committed_by"]["values"][-1] == pytest.approx(1 - never / len(bare.token_n))


def test_intervals_over_prompts_are_sampling_s_own():
    rng = np.random.default_rng(0)
    prompt_n = np.repeat(np.arange(20), rng.integers(1, 6, 20))
    values = rng.normal(size=(len(prompt_n), 2)) + prompt_n[:, None] / 10
    sampling = Sampling(resamples=200, seed=3)
    means, intervals = means_over_prompts(values, prompt_n, sampling)
    weights = sampling.weights(20)
    for at in range(2):
        drawn = []
        for weight_p in weights.numpy():
            weight_n = weight_p[prompt_n]
            drawn.append((weight_n * values[:, at]).sum() / weight_n.sum())
        assert means[at] == pytest.approx(values[:, at].mean())
        assert intervals[at] == pytest.approx(sampling.interval(means[at], torch.tensor(drawn)))
    assert means_over_prompts(values[prompt_n < 7], prompt_n[prompt_n < 7], sampling)[1] is None


# Scripts


def test_letters_have_the_script_that_unicode_gives_them():
    """regex has the standard's own table; Common and Inherited letters are in no script of it."""
    patterns = {script: regex.compile(rf"\p{{Script={script}}}") for script in _SCRIPTS.values()}
    wrong, counted = [], 0
    for code in [*range(0x3400), *range(0x3400, 0xA000, 97), *range(0xA000, 0x20000), *range(0x20000, 0x30000, 97)]:
        c = chr(code)
        if not unicodedata.category(c).startswith("L") or regex.match(r"\p{Script=Common}", c):
            continue
        counted += 1
        ours = script_of(c)
        theirs = next((script for script, pattern in patterns.items() if pattern.match(c)), OTHER)
        wrong += [(c, ours, theirs)] if ours != theirs else []
    assert counted > 30_000
    assert len(wrong) < 200, wrong[:20]
    assert {(ours, theirs) for _, ours, theirs in wrong} <= {
        (OTHER, "Latin"),
        (OTHER, "Greek"),
        (OTHER, "Han"),
        ("Tamil", OTHER),
    }


@pytest.mark.parametrize(
    ("text", "script"),
    [
        (" the", "Latin"),
        ("让", "Han"),
        ("বাংলা", "Bengali"),
        ("हिन्दी", "Devanagari"),
        ("العربية", "Arabic"),
        ("naïve", "Latin"),
        ("aд", "Latin"),
        ("####", "symbols"),
        (" 12", "digits"),
        ("x2", "Latin"),
        ("\n\t ", "blank"),
        ("", "blank"),
        ("\ufffd", "bytes"),
        ("\u0301", "symbols"),
        ("ꕉ", OTHER),
        ("カタ", "Katakana"),
    ],
)
def test_a_text_s_script_is_that_of_most_of_its_letters(text, script):
    assert script_of(text) == script


def test_shares_by_script_are_counted(found):
    texts = TokenTexts(tiny_tokenizer())
    scripts = found.to_dict()["scripts"]
    for at, shares in enumerate(scripts["top_k_by_layer"]):
        ids = found.top_id_nlk[:, at].ravel().tolist()
        plainly = [texts.script(i) for i in ids]
        assert shares == pytest.approx({s: plainly.count(s) / len(plainly) for s in set(plainly)})
    every = [texts.script(i) for i in range(2048)]
    assert scripts["vocabulary"] == pytest.approx({s: every.count(s) / 2048 for s in set(every)})
    assert texts.script(2) == "special" and texts.text(2) == "<bos>"


# As plain data


def test_the_document_is_plain_and_bounded(model, found):
    document = found.to_dict(shown=3)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["schema"], document["kind"], document["n_prompts"]) == (1, "logit_lens", 4)
    assert len(document["shown"]) == 3 and document["n_positions"] == len(found.token_n)
    curves = document["curves"]
    assert curves["final_is_top"]["values"] == pytest.approx((found.final.rank_nl == 1).mean(axis=0))
    there = found.following.id_n >= 0
    assert curves["following_probability"]["values"] == pytest.approx(found.following.prob_nl[there].mean(axis=0))
    assert curves["target_median_rank"]["values"] == np.median(found.target.rank_nl, axis=0).tolist()
    assert document["shown"][0]["target"]["token"] == " the"
    assert document["settings"] == {"positions": "all", "top": 3, "final_norm": True, "softcap": 30.0}
    many = logit_lens(model, [f"line {n} of the file" for n in range(12)], sampling=Sampling(resamples=100))
    intervals = many.to_dict()["curves"]["kl"]["intervals"]
    assert len(intervals) == 7 and all(low <= high for low, high in intervals[:-1])


# Decoder rows


def test_decoder_rows_are_read_as_dashboards_read_them(model, monkeypatch):
    hook = "blocks.3.hook_resid_post"
    sae = StandardSAE(StandardSAEConfig(d_in=96, d_sae=6))
    torch.nn.init.normal_(sae.W_dec)
    sae.cfg.metadata.hook_name = hook
    monkeypatch.setattr(sys.modules["sae_lens_gemma4.interp.layers.decoder_lens"], "_LOGITS", 2 * 2048)
    found = decoder_lens(sae, model, hook, [4, 0, 5, 4], top=3)
    assert list(found) == [4, 0, 5]
    for latent, lens in found.items():
        logits = Unembedding.of(model, sae, hook).logits(sae.W_dec[latent : latent + 1])[0].tolist()
        z = stats.zscore(np.array(logits, dtype=np.float64))
        order = sorted(range(2048), key=lambda i: -logits[i])
        assert [pull.token_id for pull in lens.promoted] == order[:3]
        assert [pull.token_id for pull in lens.suppressed] == order[::-1][:3]
        for pull in (*lens.promoted, *lens.suppressed):
            assert pull.z == pytest.approx(z[pull.token_id], rel=1e-4)
            assert pull.token == TokenTexts(model.tokenizer).text(pull.token_id)
    assert json.loads(json.dumps(found[4].to_dict()))["promoted"][0]["token_id"] == found[4].promoted[0].token_id


def test_a_row_that_is_a_token_s_own_direction_promotes_that_token_most(model):
    hook = "blocks.3.hook_resid_post"
    sae = StandardSAE(StandardSAEConfig(d_in=96, d_sae=2))
    ends = ends_of(model)
    with torch.no_grad():
        longest = int(ends.weight_vd.norm(dim=1).argmax())  # no other token's can lie further along it
        row = ends.weight_vd[longest] / ends.gain(torch.ones(1, 96))[0]
        sae.W_dec.copy_(torch.stack([row, torch.zeros(96)]))
    sae.cfg.metadata.hook_name = hook
    found = decoder_lens(sae, model, hook, [0, 1])
    assert found[0].promoted[0].token_id == longest and found[0].promoted[0].z > 2
    assert {pull.z for pull in found[1].promoted} == {0.0}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"latents": [6]}, "There is no latent 6; the SAE has 6, 0 to 5"),
        ({"latents": [-1]}, "There is no latent -1"),
        ({"top": 0}, "top must be from 1 to the vocabulary's 2048, not 0"),
        ({"hook_name": "blocks.3.attn.hook_q"}, "No way is known from blocks.3.attn.hook_q to the logits"),
    ],
)
def test_rows_that_cannot_be_read_are_named(model, asked, reason):
    sae = StandardSAE(StandardSAEConfig(d_in=96, d_sae=6))
    with pytest.raises(ConfigError, match=reason):
        decoder_lens(sae, model, **{"hook_name": "blocks.3.hook_resid_post", "latents": [0], **asked})
