import pytest
import torch

from sae_lens_gemma4.errors import ConfigError, ModelError
from sae_lens_gemma4.interp.steering.generating import adding, generate_batch
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4, tiny_tokenizer

HOOK = "blocks.3.hook_resid_post"
PROMPTS = [[2, 100, 200, 300], [2, 50, 60, 70, 80, 90, 91, 92, 93, 94, 95, 96, 97], [2, 77], [2, 400, 401]]


def proxy(variant="ple"):
    return Gemma4ProxyLM(tiny_gemma4(variant), tiny_tokenizer())


def by_hand(model, prompt, n, delta, positions):
    """Greedy, without a cache, one prompt, the sum made of a forward over everything at each step."""
    ids = list(prompt)

    def hook(x, hook):
        x = x.clone()
        first = len(prompt) - 1 if positions == "generated" else 0
        x[:, first:] += delta
        return x

    for _ in range(n):
        logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(HOOK, hook)])
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_answers_as_each_prompt_alone(variant):
    model = proxy(variant)
    torch.manual_seed(0)
    for hook in (None, (HOOK, adding(torch.randn(64) * 2, "all"))):
        together = generate_batch(model, PROMPTS, max_new_tokens=12, hook=hook)
        alone = [generate_batch(model, [p], max_new_tokens=12, hook=hook)[0] for p in PROMPTS]
        assert together == alone
        assert len({o.text for o in together}) > 1


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_what_is_added_is_added_at_every_step(positions):
    model = proxy("dense_keqv")
    torch.manual_seed(1)
    delta = torch.randn(64) * 3
    steered = answers(model, delta, positions)
    ids = [by_hand(model, prompt, 8, delta, positions) for prompt in PROMPTS]
    assert steered == [model.tokenizer.decode(i, skip_special_tokens=True) for i in ids]
    assert steered != answers(model, delta * 0, positions)
    assert steered != answers(model, delta, "all" if positions == "generated" else "generated")


def test_where_keys_and_values_are_shared_the_prompts_positions_have_no_say():
    """Layers 3 to 5 attend to keys and values made before layer 3: the last position alone carries what is added."""
    model = proxy("ple")
    torch.manual_seed(1)
    delta = torch.randn(64) * 3
    assert answers(model, delta, "all") == answers(model, delta, "generated") != answers(model, delta * 0, "all")


def answers(model, delta, positions):
    hook = (HOOK, adding(delta, positions))
    return [output.text for output in generate_batch(model, PROMPTS, max_new_tokens=8, hook=hook)]


def test_bridge_and_proxy_answer_alike():
    hf = tiny_gemma4("dense_keqv")
    models = Gemma4ProxyLM(hf, tiny_tokenizer()), Gemma4Bridge.boot(hf, tiny_tokenizer())
    torch.manual_seed(2)
    hook = (HOOK, adding(torch.randn(64) * 3, "generated"))
    first, second = (generate_batch(m, PROMPTS, max_new_tokens=8, hook=hook) for m in models)
    assert first == second
    first, plain = (generate_batch(m, PROMPTS, max_new_tokens=8) for m in models)
    assert first == plain != second


def test_the_models_dtype_is_kept():
    seen = []
    model = Gemma4ProxyLM(tiny_gemma4("ple").bfloat16(), tiny_tokenizer())
    add = adding(torch.ones(64), "all")

    def hook(x, hook):
        seen.append((x.dtype, add(x, hook).dtype, bool((add(x, hook) == x + 1).all())))
        return x

    generate_batch(model, PROMPTS[:1], max_new_tokens=2, hook=(HOOK, hook))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, True)}


def test_where_an_answer_ends():
    model = proxy()
    full = generate_batch(model, PROMPTS[:1], max_new_tokens=12)[0]
    assert full.cut and full.n_tokens == 12
    ids = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    model.model.generation_config.eos_token_id = [1, ids[6]]
    first = ids.index(ids[6])
    ended = generate_batch(model, PROMPTS[:1], max_new_tokens=12)[0]
    assert (ended.n_tokens, ended.cut) == (first + 1, False)
    assert ended.text == model.tokenizer.decode(ids[: first + 1], skip_special_tokens=True)


def test_stop_texts_end_an_answer_and_are_no_part_of_it():
    model = proxy()
    full = generate_batch(model, PROMPTS, max_new_tokens=12)
    stop = full[1].text[5:8]
    stopped = generate_batch(model, PROMPTS, max_new_tokens=12, stop=[stop])
    assert stopped[1].text == full[1].text[: full[1].text.index(stop)]
    assert not stopped[1].cut and stopped[1].n_tokens < 12
    for before, after in zip(full, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]


def test_a_stop_text_that_is_a_special_token_ends_an_answer():
    """Such a token is in no text: it is made one here of what the model says sixth."""
    model = proxy()
    ids = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    full = generate_batch(model, PROMPTS[:1], max_new_tokens=12)[0]
    word = model.tokenizer.convert_ids_to_tokens(ids[6])
    model.tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    stopped = generate_batch(model, PROMPTS[:1], max_new_tokens=12, stop=[word])[0]
    first = ids.index(ids[6])
    assert (stopped.n_tokens, stopped.cut) == (first + 1, False) != (full.n_tokens, full.cut)
    assert stopped.text == model.tokenizer.decode(ids[:first], skip_special_tokens=True)
    with pytest.raises(ConfigError, match=r"holds the special token .* and more"):
        generate_batch(model, PROMPTS[:1], max_new_tokens=12, stop=[f"{word} then"])


def test_other_models_are_refused():
    with pytest.raises(ModelError, match="Linear cannot be steered"):
        generate_batch(torch.nn.Linear(1, 1), PROMPTS, max_new_tokens=1)
