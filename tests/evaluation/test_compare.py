"""Two SAEs on the same tokens: paired differences, refusals, the table for a model card, and the command line."""

import argparse
import copy
import decimal
import difflib
import heapq
import json
import pickletools
import random
import re
import statistics
import string

import pytest
import torch

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.compare import Comparison, ComparisonReport, compare_saes
from sae_lens_gemma4.evaluation.evaluate import evaluate_sae
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report import render_comparison
from sae_lens_gemma4.report.release_table import markdown, release_table
from sae_lens_gemma4.training.restore import load_sae
from tests.support import RELEASE, SAE_ID

SAMPLING = Sampling(resamples=400)


@pytest.fixture(scope="module")
def model():
    return g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM")


@pytest.fixture(scope="module")
def saes():
    sae = load_sae(RELEASE, SAE_ID)
    worse = copy.deepcopy(sae)
    with torch.no_grad():
        worse.W_dec *= 0.8
    return worse, sae


@pytest.fixture(scope="module")
def corpora(model):
    texts = [module.__doc__ for module in (argparse, decimal, difflib, heapq, pickletools, random, statistics, string)]
    text = build_corpus(texts, model.tokenizer, context_size=64)
    chat = build_corpus("embedded:chat", model.tokenizer, context_size=64, split="heldout", max_tokens=3000)
    return {"it_pile": text, "it_chat": chat}


@pytest.fixture(scope="module")
def rows(model, saes, corpora):
    before, after = ({"layer 3": sae} for sae in saes)
    return compare_saes(
        before, after, model, corpora, sampling=SAMPLING, progress=False, downstream_tokens=2000, protocol="ours"
    )


def test_differences_are_of_the_same_tokens_and_narrower_than_apart(rows, corpora):
    assert [row.corpus for row in rows] == list(corpora)
    for row in rows:
        before, after, difference = row.before.metrics, row.after.metrics, row.differences()
        assert difference["ve"] == pytest.approx(after.ve - before.ve, abs=1e-15)
        low, high = difference["ve"].interval
        assert 0 < low < difference["ve"] < high
        apart = sum(m.ve.interval[1] - m.ve.interval[0] for m in (before, after))
        assert high - low < 0.5 * apart
        assert difference["l0"] == 0 and difference["l0"].interval == (0, 0)  # the encoder is the same
        if row.corpus == "it_chat":  # the text's first two thousand tokens are too few documents
            kl = difference["downstream"]["excluded"]["kl"]["sae"]
            old, new = (e.downstream["excluded"]["kl"]["sae"] for e in (row.before, row.after))
            assert kl == pytest.approx(new - old, abs=1e-15) and kl.interval[0] <= kl <= kl.interval[1]
        assert row.after.drift["decoder_norm_ratio"]["0.5"] == pytest.approx(1 / 0.8, rel=1e-5)
        assert row.after.drift["encoder_cosine"]["0.05"] == pytest.approx(1)
        assert row.before.drift is None


def test_results_of_other_conditions_are_refused(rows, model, saes, corpora, monkeypatch):
    row = rows[0]
    with pytest.raises(ConfigError, match=r"corpus.hash"):
        Comparison("mixed", row.before, rows[1].after)
    other = evaluate_sae(saes[1], model, corpora["it_pile"], sampling=Sampling(resamples=10), protocol="ours",
                         progress=False)  # fmt: skip
    assert row.differences()["ve"].interval is not None
    with pytest.raises(ConfigError, match="resamples=400"):
        Comparison("draws", row.before, other).differences()
    elsewhere = copy.deepcopy(saes[1])
    elsewhere.cfg.metadata.hook_name = "blocks.5.hook_resid_post"
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "run_with_cache", None)  # known before any forward
        with pytest.raises(ConfigError, match="two hooks"):
            compare_saes({"a": saes[0]}, {"a": elsewhere}, model, {"t": corpora["it_pile"]}, progress=False)
    with pytest.raises(ConfigError, match="both halves"):
        compare_saes({"a": saes[0]}, {"b": saes[1]}, model, corpora)


def test_the_table_has_the_public_tables_columns_with_an_interval_beside_each_figure(rows):
    document = ComparisonReport(rows).to_dict()
    table = release_table(document["rows"])
    assert table[0] == [
        "layer",
        "before: it_pile VE",
        "before: it_chat VE",
        "after: it_pile VE (L0)",
        "after: it_chat VE (L0)",
    ]
    [cells] = table[1:]
    assert cells[0] == "3"
    for cell, row, state in zip(cells[1:], (*rows, *rows), ("before", "before", "after", "after"), strict=True):
        metrics = getattr(row, state).metrics
        expected = f"{n.ve(metrics.ve)} [{n.ve(metrics.ve.interval[0])}, {n.ve(metrics.ve.interval[1])}]"
        if state == "after":
            low, high = map(n.per_token, metrics.l0.interval)
            expected += f" ({n.per_token(metrics.l0)} [{low}, {high}])"
        assert cell == expected
    lines = markdown(table).splitlines()
    assert lines[1] == "|" + "---|" * 5 and len(lines) == 3


def test_the_report_holds_the_rows_and_what_was_forgotten(rows, tmp_path):
    report = ComparisonReport(rows, forgetting=rows[:1])
    report.to_json(tmp_path / "r.json")
    report.to_html(tmp_path / "r.html")
    data = json.loads((tmp_path / "r.json").read_text())
    assert [row["corpus"] for row in data["rows"]] == ["it_pile", "it_chat"]
    assert data["forgetting"] == data["rows"][:1]
    assert data["rows"][0]["differences"]["ve"]["value"] == rows[0].differences()["ve"]
    page = (tmp_path / "r.html").read_text()
    for cell in release_table(data["rows"])[1]:
        assert cell in page


def test_two_layers_make_two_lines_of_one_forward(model, saes, corpora):
    deeper = [copy.deepcopy(sae) for sae in saes]
    for sae in deeper:
        sae.cfg.metadata.hook_name = "blocks.5.hook_resid_post"
    before = {"three": saes[0], "five": deeper[0]}
    after = {"three": saes[1], "five": deeper[1]}
    rows = compare_saes(before, after, model, {"it_chat": corpora["it_chat"]}, sampling=SAMPLING, progress=False)
    document = ComparisonReport(rows).to_dict()
    table = release_table(document["rows"])
    assert [line[0] for line in table[1:]] == ["3", "5"]
    assert not any("–" in re.sub(r"\[.*?\]", "", cell) for line in table[1:] for cell in line)


def test_differences_without_intervals_are_differences(model, saes, corpora):
    before, after = ({"layer 3": sae} for sae in saes)
    settings = {"sampling": Sampling(0), "downstream_tokens": 200, "progress": False}
    [row] = compare_saes(before, after, model, {"it_pile": corpora["it_pile"]}, **settings)
    difference = row.differences()
    for name in ("ve", "nmse"):
        assert difference[name] == getattr(row.after.metrics, name) - getattr(row.before.metrics, name) != 0
        assert difference[name].interval is None
    old, new = (e.downstream["included"]["ce"]["sae"] for e in (row.before, row.after))
    assert difference["downstream"]["included"]["ce"]["sae"] == new - old
    page = render_comparison(ComparisonReport([row]).to_dict())
    assert f">{n.signed(difference['ve'], n.ve)}<" in page and "[not defined]" not in page


def test_two_saes_at_one_hook_make_two_lines(model, saes, corpora):
    before = {"a": saes[1], "b": saes[1]}
    after = {"a": saes[1], "b": saes[0]}
    settings = {"sampling": Sampling(0), "progress": False}
    sources = {"sources_after": {"a": {"path": "runs/a"}, "b": {"path": "runs/b"}}}
    rows = compare_saes(before, after, model, {"it_chat": corpora["it_chat"]}, **sources, **settings)
    document = ComparisonReport(rows).to_dict()
    lines = release_table(document["rows"])[1:]
    hook = "blocks.3.hook_resid_post"
    assert [line[0] for line in lines] == [f"{hook}, runs/a", f"{hook}, runs/b"]
    assert [line[2] for line in lines] == [
        f"{n.ve(row.after.metrics.ve)} ({n.per_token(row.after.metrics.l0)})" for row in rows
    ]
    page = render_comparison(document)
    for name in ("a", "b"):
        assert f"it_chat at {hook}, runs/{name}</h2>" in page
