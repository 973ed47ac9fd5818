import json

import datasets
import numpy as np
import pytest
import torch

import sae_lens_gemma4 as g4
from sae_lens_gemma4.errors import ConfigError, DataError, SAEError, UnknownNameError
from sae_lens_gemma4.interp.items import (
    Item,
    ItemSource,
    item_corpus,
    item_means,
    read_items,
    with_responses,
)
from sae_lens_gemma4.mapping import from_mapping
from tests.interp.conftest import HOOK

ROWS = [
    {"question": "What is 2 + 2?", "reply": "2 + 2 is 4.\n#### 4", "gold": "#### 4", "right": True},
    {"question": "What is {x}?", "reply": "I do not know.", "gold": "#### 5", "right": False},
    {"question": "Name a list method.", "reply": "append", "gold": "append", "right": True},
]
COLUMNS = {"prompt": "question", "response": "reply", "answer": "gold", "group": "right"}
ITEMS = [
    Item("Return the list in reverse order.", " The method reverses the elements of the list, in place."),
    Item("Open a file.", " Use open()."),
    Item("A dictionary maps keys to values; how is one removed?", " del d[key]"),
    Item("Hello", ""),
    Item("The function returns a new string in which each of the characters has been mapped.", " Yes, it does."),
]


@pytest.fixture(scope="module")
def tuned():
    return g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM").tokenizer


@pytest.fixture(params=["jsonl", "json", "csv", "parquet", "yaml", "saved"])
def written(request, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    dataset = datasets.Dataset.from_list(ROWS)
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif request.param in ("json", "yaml"):  # JSON is YAML
        path.write_text(json.dumps(ROWS))
    elif request.param == "csv":
        dataset.to_csv(str(path))
    elif request.param == "parquet":
        dataset.to_parquet(str(path))
    else:
        dataset.save_to_disk(str(path))
    return str(path)


def test_items_are_the_same_from_every_kind_of_file(written):
    items = read_items(ItemSource(dataset=written, **COLUMNS))
    assert [(i.prompt, i.response, i.answer) for i in items] == [(r["question"], r["reply"], r["gold"]) for r in ROWS]
    assert [i.group for i in items] == ["true", "false", "true"]


def test_a_template_is_put_around_each_prompt_and_braces_in_it_are_text(tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text(json.dumps(ROWS))
    form = "<start_of_turn>user\nAnswer as '#### N' {sic}.\n\n{prompt}<end_of_turn>\n<start_of_turn>model\n"
    source = from_mapping(ItemSource, {"dataset": str(path), **COLUMNS, "template": form}, "items")
    second = read_items(source)[1]
    assert second.prompt == form.replace("{prompt}", "What is {x}?")


def test_n_and_skip_of_one_shuffle_never_overlap(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(30)))

    def prompts(**settings):
        return [item.prompt for item in read_items(ItemSource(dataset=str(path), **settings))]

    first, second = prompts(n=12, shuffle_seed=5), prompts(n=30, skip=12, shuffle_seed=5)
    assert sorted(first + second, key=lambda p: int(p[1:])) == prompts()
    assert first != prompts(n=12) and prompts(n=2, skip=3) == ["p3", "p4"]


def test_the_embedded_text_is_a_source_of_prompts():
    items = read_items(ItemSource(dataset="embedded:text", split="heldout", prompt="text", n=2))
    assert len(items) == 2 and items[0].prompt


def test_a_chat_prompt_is_what_the_template_renders_for_generation_with_one_bos(tmp_path, tuned):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "What is a list?"}))
    (item,) = read_items(ItemSource(dataset=str(path), chat=True), tuned)
    chat = [{"role": "user", "content": "What is a list?"}]
    expected = tuned.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    corpus = item_corpus([item], tuned)
    assert corpus.tokens_bp[0].tolist() == tuned(expected, add_special_tokens=False)["input_ids"]
    assert (corpus.tokens_bp == tuned.bos_token_id).sum() == 1
    assert not corpus.keep_bp[torch.isin(corpus.tokens_bp, torch.tensor(tuned.all_special_ids))].any()


def test_bad_sources_are_named(tmp_path, tuned):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {**ROWS[0], "question": "  "}]))
    name = str(path)
    with pytest.raises(UnknownNameError, match="Did you mean 'question'"):
        read_items(ItemSource(dataset=name, prompt="qestion"))
    with pytest.raises(DataError, match=r"Row 3 .* empty prompt"):
        read_items(ItemSource(dataset=name, prompt="question"))
    with pytest.raises(DataError, match=r"Row 0 .* bool there"):
        read_items(ItemSource(dataset=name, prompt="right"))
    with pytest.raises(DataError, match="no rows after the first 9"):
        read_items(ItemSource(dataset=name, prompt="question", skip=9))
    with pytest.raises(DataError, match="There is no file"):
        read_items(ItemSource(dataset=str(tmp_path / "none.jsonl")))
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        read_items(ItemSource(dataset=name, prompt="question", chat=True))
    with pytest.raises(ConfigError, match="once"):
        ItemSource(dataset=name, template="{question}")
    with pytest.raises(ConfigError, match="revisions"):
        ItemSource(dataset=name, revision="main")
    with pytest.raises(ConfigError, match="n must be"):
        ItemSource(dataset=name, n=0)
    (tmp_path / "one.yaml").write_text("prompt: a\n")
    with pytest.raises(DataError, match="list of mappings"):
        read_items(ItemSource(dataset=str(tmp_path / "one.yaml")))
    (tmp_path / "texts.yaml").write_text("- a\n- b\n")
    with pytest.raises(DataError, match=r"Row 0 .* str, not a mapping"):
        read_items(ItemSource(dataset=str(tmp_path / "texts.yaml")))


@pytest.mark.parametrize("count", ["all", "prompt", "response", "last"])
def test_what_counts_of_an_item(model, count):
    tokenizer = model.tokenizer
    prompt, response = (
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in (ITEMS[0].prompt, ITEMS[0].response)
    )
    corpus = item_corpus(ITEMS[:2], tokenizer, count=count)
    assert corpus.tokens_bp[0].tolist() == [tokenizer.bos_token_id, *prompt, *response]
    expected = {"all": prompt + response, "prompt": prompt, "response": response, "last": response[-1:]}[count]
    assert corpus.tokens_bp[0][corpus.keep_bp[0]].tolist() == expected
    assert not corpus.keep_bp[1][corpus.document_bp[1] < 0].any()
    assert [set(row[row >= 0].tolist()) for row in corpus.document_bp] == [{0}, {1}]


def test_items_of_which_nothing_counts_or_too_much_are_named(model):
    with pytest.raises(DataError, match=r"item 3 no token counts \(count 'response'\).*no response: name the column"):
        item_corpus(ITEMS, model.tokenizer, count="response")
    with pytest.raises(DataError, match=r"Of item 0 no token.*It has no prompt: count"):
        item_corpus([Item("", response="yes")], model.tokenizer, count="prompt")
    with pytest.raises(DataError, match=r"Of item 1 no token.*It is empty: leave it out"):
        item_corpus([Item("a"), Item(model.tokenizer.bos_token)], model.tokenizer)
    with pytest.raises(DataError, match=r"Of item 0 no token.*all special: leave it out"):
        item_corpus([Item(model.tokenizer.bos_token * 2)], model.tokenizer)
    with pytest.raises(DataError, match=r"Item 0 has .* more than max_tokens"):
        item_corpus(ITEMS, model.tokenizer, max_tokens=5)
    with pytest.raises(DataError, match="no items"):
        item_corpus([], model.tokenizer)
    with pytest.raises(UnknownNameError, match="prompt"):
        item_corpus(ITEMS, model.tokenizer, count="promt")


def one_by_one(model, sae, hooks, items, statistic):
    """The plain way: each item on its own, without padding, its SAE's activations dense."""
    found = {name: [] for name in [*hooks, "latents"]}
    for item in items:
        ids = [model.tokenizer.bos_token_id]
        for text in (item.prompt, item.response):
            ids += model.tokenizer(text, add_special_tokens=False)["input_ids"]
        _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=[*hooks], prepend_bos=False)
        rows = {name: cache[name][0, 1:].float() for name in hooks}
        rows["latents"] = sae.encode(cache[HOOK].float())[0, 1:]
        for name, rows_td in rows.items():
            total = {"mean": rows_td.sum(0) / len(rows_td), "max": rows_td.max(0)[0], "last": rows_td[-1]}[statistic]
            found[name].append(total.detach().numpy())
    return {name: np.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("statistic", ["mean", "max", "last"])
@pytest.mark.parametrize("batch_blocks", [1, 2, 16])
def test_item_means_are_those_of_each_item_read_alone(model, sae, statistic, batch_blocks):
    hooks = ["blocks.0.hook_resid_post", HOOK, "blocks.5.hook_resid_post"]
    corpus = item_corpus(ITEMS, model.tokenizer)
    means = item_means(model, corpus, hooks, {HOOK: sae}, batch_blocks=batch_blocks, statistic=statistic)
    expected = one_by_one(model, sae, hooks, ITEMS, statistic)
    assert [(s.hook_name, s.kind) for s in means.sites] == [(h, "activations") for h in hooks] + [(HOOK, "latents")]
    for hook in hooks:
        np.testing.assert_allclose(means.of(hook), expected[hook], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(means.of(HOOK, "latents"), expected["latents"], rtol=1e-4, atol=1e-4)
    assert (expected["latents"] > 0).any()
    assert means.tokens_n.tolist() == corpus.keep_bp.sum(dim=1).tolist()


def test_an_sae_is_read_in_chunks_and_without_its_hooks_activations(model, sae, monkeypatch):
    corpus = item_corpus(ITEMS, model.tokenizer)
    whole = item_means(model, corpus, [], {HOOK: sae})
    monkeypatch.setattr("sae_lens_gemma4.evaluation.reading.CHUNK_LATENTS", 3 * sae.cfg.d_sae)
    for statistic in ("mean", "max", "last"):
        expected = one_by_one(model, sae, [HOOK], ITEMS, statistic)["latents"]
        found = item_means(model, corpus, [], {HOOK: sae}, statistic=statistic)
        np.testing.assert_allclose(found.of(HOOK, "latents"), expected, rtol=1e-4, atol=1e-4)
    assert [site.kind for site in whole.sites] == ["latents"]
    with pytest.raises(DataError, match="no activations"):
        whole.only("activations")
    with pytest.raises(UnknownNameError, match="site of activations"):
        whole.of(HOOK)


def test_some_items_of_what_was_read(model):
    means = item_means(model, item_corpus(ITEMS, model.tokenizer), [HOOK])
    part = means.take([3, 0])
    assert part.n_items == 2 and part.tokens_n.tolist() == means.tokens_n[[3, 0]].tolist()
    np.testing.assert_array_equal(part.of(HOOK), means.of(HOOK)[[3, 0]])


def test_bad_reading_is_named(model, sae, corpus):
    items = item_corpus(ITEMS, model.tokenizer)
    with pytest.raises(DataError, match=r"more than one item|No token of item"):
        item_means(model, corpus, [HOOK])
    with pytest.raises(ConfigError, match="at least one hook"):
        item_means(model, items, [])
    with pytest.raises(ConfigError, match="repeats"):
        item_means(model, items, [HOOK, HOOK])
    with pytest.raises(UnknownNameError, match="hook"):
        item_means(model, items, ["blocks.9.hook_resid_post"])
    with pytest.warns(UserWarning, match="trained at"), pytest.raises(SAEError, match="wide"):
        item_means(model, items, [], {"blocks.3.mlp.hook_post": sae})


def test_values_of_an_sae_that_are_not_finite_are_named(model, sae):
    bad = sae.__class__(sae.cfg)
    bad.load_state_dict(sae.state_dict())
    with torch.no_grad():
        bad.W_enc[:, 7] = torch.nan
    with pytest.raises(DataError, match="not finite, first those of latent 7"):
        item_means(model, item_corpus(ITEMS, model.tokenizer), [], {HOOK: bad})


def test_answers_become_responses_and_groups():
    answered = with_responses([Item("a", answer="1"), Item("b")], ["x", "y"], ["right", "wrong"])
    assert answered == [Item("a", "x", "1", "right"), Item("b", "y", None, "wrong")]
    with pytest.raises(DataError, match="not one each"):
        with_responses([Item("a")], ["x", "y"], ["right"])
