"""Reading categories of prompt pairs, and what latents do on either side of them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sae_lens_gemma4.errors import ConfigError, UnknownNameError
from sae_lens_gemma4.interp.pairs.prompt_pairs import (
    Category,
    Pair,
    categories_of,
    pair_items,
    pair_means,
    read_categories,
)

RECIPES = Path(__file__).parents[3] / "recipes" / "interp"
HOOK = "blocks.3.hook_resid_post"


def stated(n=3, **changes):
    pairs = [{"with": f"Open file {i}.", "without": f"Sort list {i}."} for i in range(n)]
    return {"name": "files", "label": "about files", "pairs": pairs} | changes


def read(*categories, min_pairs=2):
    return categories_of({"categories": list(categories)}, "prompt pairs", min_pairs=min_pairs)


def pairs(*sides):
    return [{"with": a, "without": b} for a, b in sides]


def test_a_file_is_read_in_its_order(tmp_path):
    path = tmp_path / "pairs.yaml"
    path.write_text(yaml.safe_dump({"categories": [stated(name="b"), stated(name="a", description=" Why. ")]}))
    first, second = read_categories(path, min_pairs=3)
    assert [first.name, second.name, second.description, second.label] == ["b", "a", "Why.", "about files"]
    assert first.pairs[1] == Pair("Open file 1.", "Sort list 1.")


@pytest.mark.parametrize(
    ("category", "message"),
    [
        (stated(pairs=pairs(("a", "b"), ("c  d", " c d\n"))), "sides of pair 1 of category 'files' are equal: 'c d'"),
        (stated(pairs=pairs(("a", "b"), (" \n", "c"))), "Pair 1 of category 'files' has an empty side"),
        (stated(pairs=pairs(("a", "b"), ("c", "a"))), r"twice, in pair 0 \(with\) and pair 1 \(without\): 'a'"),
        (stated(n=1), r"has 1 pairs, fewer than min_pairs \(2\)"),
        (stated(label=" "), "needs a name and a label"),
        (stated(pairs=[{"with": "a"}]), r"prompt pairs.categories\[0\].pairs\[0\] lacks without"),
        (stated(pairs=[{"with": "a", "without": 5}]), r"pairs\[0\].without must be str, not int \(5\)"),
        (stated(pairs=["a"]), r"pairs\[0\] must be dict, not str"),
    ],
)
def test_what_cannot_be_used_is_named(category, message):
    with pytest.raises(ConfigError, match=message):
        read(category)


def test_keys_are_checked():
    with pytest.raises(UnknownNameError, match=r"key in prompt pairs.categories\[0\].pairs\[0\] 'witout'.*'without'"):
        read(stated(pairs=[{"with": "a", "witout": "b"}]))
    with pytest.raises(UnknownNameError, match=r"key in prompt pairs.categories\[0\] 'lable'"):
        read(stated(lable="x"))


def test_categories_have_names_of_their_own():
    with pytest.raises(ConfigError, match="more than one category 'files'"):
        read(stated(), stated())
    with pytest.raises(ConfigError, match="has no categories"):
        read()


@pytest.mark.parametrize(("content", "message"), [("- a: [", "is not YAML"), ("- a", "must be a mapping, not list")])
def test_a_file_that_is_none(tmp_path, content, message):
    path = tmp_path / "pairs.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_categories(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_categories(tmp_path / "other.yaml")


def test_templates():
    category = Category(name="a", label="b", pairs=(Pair("x", "y"), Pair("z", "{prompt}")))
    items = pair_items([category], "<{prompt}>")
    assert [(item.prompt, item.group) for item in items] == [
        ("<x>", "with"), ("<y>", "without"), ("<z>", "with"), ("<{prompt}>", "without"),
    ]  # fmt: skip
    for template in ("none", "{prompt}{prompt}"):
        with pytest.raises(ConfigError, match=r"template must hold \{prompt\} once"):
            pair_items([category], template)


@pytest.mark.parametrize("statistic", ["mean", "last"])
def test_means_are_those_of_each_prompt_by_itself(sae, model, statistic):
    """Against a forward a prompt, without padding, over tokens after BOS."""
    categories = [
        Category(
            name="a", label="a", pairs=(Pair("Open the file.", "Sort the list in place."), Pair("Read it", "Run"))
        ),
        Category(name="b", label="b", pairs=(Pair("Is it a tuple?", "It is one."),)),
    ]
    found = pair_means(model, sae, categories, template="Note: {prompt}", statistic=statistic, batch_blocks=2)
    assert [one.category for one in found] == categories
    for one in found:
        sides = ((one.with_pf, one.tokens_with_p), (one.without_pf, one.tokens_without_p))
        for side, (values_pf, tokens_p) in enumerate(sides):
            assert values_pf.shape == (len(one.category.pairs), sae.cfg.d_sae)
            for pair, values_f, n_tokens in zip(one.category.pairs, values_pf, tokens_p, strict=True):
                ids = model.tokenizer("Note: " + pair[side], add_special_tokens=False)["input_ids"]
                tokens = torch.tensor([[model.tokenizer.bos_token_id, *ids]])
                with torch.no_grad():
                    _, cache = model.run_with_cache(tokens, names_filter=[HOOK], prepend_bos=False)
                    acts_tf = sae.encode(cache[HOOK][0, 1:])
                expected_f = acts_tf.mean(dim=0) if statistic == "mean" else acts_tf[-1]
                np.testing.assert_allclose(values_f, expected_f, atol=2e-4)
                assert n_tokens == len(ids) + 1


def test_nothing_to_read(sae, model):
    with pytest.raises(ConfigError, match="no category"):
        pair_means(model, sae, [])


@pytest.mark.parametrize(("name", "least"), [("prompt-pairs.yaml", 6), ("demo-pairs.yaml", 4)])
def test_the_recipes_pairs_are_even(name, least):
    """Sixteen pairs or more; words and signs of both sides are within the share that is warned of."""
    categories = read_categories(RECIPES / name, min_pairs=16)
    assert len(categories) >= least
    for category in categories:
        with_, without = (
            sum(len(re.findall(r"\w+|[^\w\s]", pair[side])) for pair in category.pairs) for side in (0, 1)
        )
        assert abs(with_ - without) < 0.2 * (with_ + without) / 2, category.name
        assert category.description
