"""docs/evaluation.schema.json says what is written: real documents fit it, and all that it names occurs in them."""

import argparse
import copy
import decimal
import difflib
import heapq
import json
import pickletools
import random
import statistics
import string
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from jsonschema.validators import extend
from sae_lens import StandardSAE, StandardSAEConfig

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.embedded import DATA
from sae_lens_gemma4.evaluation.compare import ComparisonReport, compare_saes
from sae_lens_gemma4.evaluation.evaluate import evaluate_sae
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.training.restore import load_sae

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/evaluation.schema.json").read_text(encoding="utf-8"))
SAE_FOLDER = DATA / "sae" / "layer_3_width_2k_l0_16"
NEVER_HERE = {"revision"}  # only a dataset on the hub has one


def validator(used=None):
    """One that notes, as `id`s in `used`, which property schemas met a value that is not null."""

    def properties(validator, properties, instance, schema):
        values = instance if isinstance(instance, dict) else {}
        used.update(id(inner) for name, inner in properties.items() if values.get(name) is not None)
        yield from Draft202012Validator.VALIDATORS["properties"](validator, properties, instance, schema)

    cls = Draft202012Validator if used is None else extend(Draft202012Validator, {"properties": properties})
    return cls(SCHEMA)


def named(schema, path="$"):
    """Every property of a schema, by where it stands."""
    if isinstance(schema, list):
        for i, inner in enumerate(schema):
            yield from named(inner, f"{path}/{i}")
    elif isinstance(schema, dict):
        for key, inner in schema.items():
            if key == "properties":
                yield from ((f"{path}/{name}", name, s) for name, s in inner.items())
            yield from named(inner, f"{path}/{key}")


def one_bad_latent(sae, x_td):
    """The SAE with the decoder of one rare latent grown: few tokens, ordinary norms, and most of the error."""
    counts_f = (sae.encode(x_td) != 0).sum(0)
    latent = torch.where(counts_f <= len(x_td) // 1000, counts_f, 0).argmax()
    bad = copy.deepcopy(sae)
    bad.W_dec.data[latent] *= 100
    return bad


@pytest.fixture(scope="module")
@torch.no_grad()
def documents(tmp_path_factory):
    """By name, each as it is read from the file that was written."""
    base, scaled = (g4.load_model(name, "Gemma4ProxyLM") for name in ("gemma-4-demo", "gemma-4-demo-it-rescaled"))
    sae = load_sae(str(SAE_FOLDER))
    hook, quiet = sae.cfg.metadata.hook_name, {"progress": False, "sampling": Sampling(100)}
    texts = [module.__doc__ for module in (argparse, decimal, difflib, heapq, pickletools, random, statistics, string)]
    folder = tmp_path_factory.mktemp("documents")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text = build_corpus(folder / "text.jsonl", base.tokenizer, context_size=64)
    chats = [[{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": t[:800]}] for t in texts]
    chat = build_corpus(chats, scaled.tokenizer, context_size=64, name="chat", roles=["assistant"])
    _, cache = base.run_with_cache(text.tokens_bp, names_filter=hook)
    other = copy.deepcopy(sae)
    other.W_dec.data *= 1.1
    plain = StandardSAE(StandardSAEConfig(d_in=96, d_sae=32))
    results = {
        "healthy": evaluate_sae(
            sae, base, text, downstream_tokens=None, reference=other, protocol="mine", **quiet,
            source={"release": "a-release", "sae_id": "an-id"},
        ),
        "misfit": evaluate_sae(sae, scaled, chat, source={"path": "a/folder"}, **quiet),
        "outlier-dominated": evaluate_sae(one_bad_latent(sae, cache[hook][text.keep_bp]), base, text, **quiet),
        "one document": evaluate_sae(sae, base, text.tokens_bp[:1], downstream_tokens=None, progress=False),
        "one token": evaluate_sae(sae, base, torch.tensor([[2, 311]]), downstream_tokens=None, progress=False),
        "another architecture": evaluate_sae(
            plain, base, text, hook_name=hook, reference=plain, sampling=Sampling(0), progress=False
        ),
    }  # fmt: skip
    pair = {"sae": sae}, {"sae": other}
    compared = compare_saes(*pair, scaled, {"chat": chat}, downstream_tokens=None, **quiet)
    forgotten = compare_saes(*pair, base, {"text": text}, progress=False, sampling=Sampling(0))
    results["comparison"] = ComparisonReport(compared, forgotten)
    read = {}
    for name, result in results.items():
        result.to_json(folder / "report.json")
        read[name] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return read


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


def test_every_property_is_described_in_one_line():
    for path, _, inner in named(SCHEMA["$defs"]):
        text = inner.get("description", "")
        assert text and "\n" not in text and len(text) < 120, path


def test_every_property_is_required_but_one():
    """Predictions are compared where they were measured."""
    for schema in walk(SCHEMA["$defs"]):
        if "properties" in schema:
            assert set(schema["properties"]) - set(schema["required"]) <= {"downstream"}


def walk(value):
    """A value and all that is in it, where that is a mapping."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


def test_documents_fit(documents):
    for name, document in documents.items():
        errors = [f"{error.json_path}: {error.message[:200]}" for error in validator().iter_errors(document)]
        assert not errors, name
    for name in ("healthy", "misfit", "outlier-dominated"):
        assert documents[name]["metrics"]["verdict"] == name
    assert documents["outlier-dominated"]["diagnosis"]["norm_screen"] is False
    assert documents["one document"]["intervals"] is None
    assert documents["one token"]["metrics"]["ve"] is None
    forgotten = documents["comparison"]["forgetting"][0]
    for name in ("ve", "l0"):
        after, before = (forgotten[state]["metrics"][name] for state in ("after", "before"))
        assert forgotten["differences"][name] == {"value": pytest.approx(after - before), "interval": None}


def test_everything_that_the_schema_names_occurs(documents):
    used = set()
    for document in documents.values():
        assert validator(used).is_valid(document)
    absent = {path: name for path, name, inner in named(SCHEMA["$defs"]) if id(inner) not in used}
    assert set(absent.values()) == NEVER_HERE, absent


def test_no_object_takes_a_key_that_the_schema_does_not_name(documents):
    document = shortened({**documents["comparison"], "forgetting": []})
    assert validator().is_valid(document)
    objects = list(walk(document))
    assert len(objects) > 100
    for place in objects:
        place["more"] = None
        assert not validator().is_valid(document), list(place)
        del place["more"]


def shortened(value):
    """With no more than three items in a list."""
    if isinstance(value, dict):
        return {key: shortened(inner) for key, inner in value.items()}
    return [shortened(inner) for inner in value[:3]] if isinstance(value, list) else value
