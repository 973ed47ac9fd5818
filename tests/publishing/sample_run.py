"""A finished run's folder, made by hand around real evaluations on the embedded model: the one place that a run of the
runner's takes when it can be had as quickly."""

import json
from functools import cache

import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from safetensors.torch import save_file

from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.embedded import DATA
from sae_lens_gemma4.evaluation.evaluate import evaluate_saes
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.evaluation.result import versions
from sae_lens_gemma4.models.loading import load_model

RELEASE, SAE_ID = "gemma-4-demo-res-matryoshka-embedded", "layer_3_width_2k_l0_16"
MODEL, CONTEXT = "gemma-4-demo-it", 64
HELDOUT = {"it_chat": ("embedded:chat", 1800), "it_pile": ("embedded:text", 600)}
TRAIN = {
    "name": "embedded:chat [train]", "source": "embedded:chat", "split": "train", "revision": None,
    "first_document": 0, "next_document": 40, "tokens": 20011, "documents": 40, "hash": "0123456789abcdef",
}  # fmt: skip
EVENTS = [
    {"kind": "resampling", "step": 20, "phase": "main", "dead": 343, "resampled": 343, "share": 1.0, "of": "median",
     "norm": 0.71, "selected_from_before": 1.64, "selected_from_after": 5.76, "ve_before": 0.818, "ve_after": 0.735},
    {"kind": "rollback", "step": 20, "phase": "main", "reason": "selected from 5.76, 3.51 times 1.64", "steps_lost": 9,
     "selected_from_before": 1.64, "selected_from_after": 5.76, "ve_before": 0.818, "ve_after": 0.735},
    {"kind": "phase", "step": 40, "phase": "polish", "start": "best", "best": 0.764},
    {"kind": "skipped", "hook": "blocks.3.hook_resid_post", "corpus": "embedded:chat [train]", "document": 17,
     "tokens": 23},
]  # fmt: skip
PARTS = [
    {"name": "none", "kept": True, "ve": 0.761, "l0": 17.3, "threshold": 1.31},
    {"name": "scale", "kept": True, "ve": 0.779, "l0": 16.4, "threshold": 1.42},
    {"name": "gains", "kept": False, "ve": 0.772, "l0": 16.1, "threshold": 1.42},
    {"name": "calibrated", "kept": True, "ve": 0.779, "l0": 16.0, "threshold": 1.45},
]
PHASE = {
    "name": "main", "tokens": 20480, "epochs": None, "steps": 40, "lr": 1e-3, "lr_end": 1e-4, "schedule": "cosine",
    "warm_up_steps": 4, "decay_steps": 0, "start": "last",
    "resampling": {"every_steps": None, "share": 0.2, "of": "median", "cap": None, "tokens": 8192},
}  # fmt: skip


@cache
def model():
    return load_model(MODEL, "Gemma4ProxyLM")


@cache
def heldout():
    return {
        name: build_corpus(source, model().tokenizer, context_size=CONTEXT, split="heldout", max_tokens=n, name=name)
        for name, (source, n) in HELDOUT.items()
    }


@cache
def saes():
    """The base SAE; the same, moved a little; and one that is new."""
    base, tuned = (SAE.load_from_disk(DATA / "sae" / SAE_ID) for _ in range(2))
    with torch.no_grad():
        tuned.b_dec += 0.01
    tuned.cfg.metadata.model_name = MODEL
    new = TopKSAE(TopKSAEConfig(d_in=96, d_sae=128, k=8))
    with torch.no_grad():
        directions = torch.nn.functional.normalize(torch.randn(128, 96, generator=torch.Generator().manual_seed(0)))
        new.W_dec.copy_(directions), new.W_enc.copy_(directions.T)
    new.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    new.cfg.metadata.exclude_special_tokens = True
    return base, tuned, new


@cache
def measured():
    """JSON of base, tuned and new on each held-out text."""
    results = {}
    for name, corpus in heldout().items():
        several = dict(zip(("base", "tuned", "new"), saes(), strict=True))
        for sae, result in evaluate_saes(
            several, model(), corpus, sampling=Sampling(resamples=100), progress=False
        ).items():
            results[sae, name] = json.dumps(result.to_dict())
    return results


def _on_each(sae):
    return {name: json.loads(measured()[sae, name]) for name in HELDOUT}


def _result(name, sae, **changed):
    after = _on_each(sae)
    facts = after["it_chat"]["sae"]
    ve = after["it_chat"]["metrics"]["ve"]
    return {
        "schema": 1, "kind": "training", "name": name, "hook_name": facts["hook_name"],
        "architecture": facts["architecture"], "d_in": 96, "d_sae": facts["d_sae"], "k": 8 if sae == "new" else 16,
        "base": None, "seed": 3, "batch_size": 512,
        "model": {"name": MODEL, "class_name": "Gemma4ProxyLM", "dtype": "float32"},
        "data": {
            "train": [TRAIN], "heldout": {name: r["corpus"] for name, r in after.items()}, "context_size": CONTEXT,
            "packed": True, "isolate_documents": False,
        },
        "phases": [PHASE], "calibration": None, "events": [], "before": {}, "after": after,
        "history": [{"step": 40, "tokens": 20480, "loss": 3.1, "ve": 0.77, "l0": 16.0, "threshold": 1.5, "dead": 51}],
        "evaluations": [], "tokens": 20480, "steps": 40, "seconds": 12.5, "versions": versions(),
        "gate": {"passed": True, "checks": [
            {"figure": "ve", "corpus": "it_chat", "value": ve, "at_least": -100.0, "at_most": None, "passed": True}]},
        **changed,
    }  # fmt: skip


def make_run(folder):
    """Write a run of two SAEs, one continued and one new; returns their folders."""
    _, tuned, new = saes()
    known = {"release": RELEASE, "sae_id": SAE_ID, "path": None, "model_name": "gemma-4-demo"}
    calibration = {"tokens": 4096, "held_back": 1024, "gamma": 0.412, "parts": PARTS}
    written = {
        "layer_3": (tuned, _result("layer_3", "tuned", base=known, before=_on_each("base"), events=EVENTS,
                                   calibration=calibration)),
        "layer_1": (new, _result("layer_1", "new")),
    }  # fmt: skip
    for name, (sae, result) in written.items():
        sae.save_model(folder / name)
        save_file({"sparsity": torch.zeros(sae.cfg.d_sae)}, folder / name / "sparsity.safetensors")
        (folder / name / "result.json").write_text(json.dumps(result))
        (folder / name / "recipe.yaml").write_text("seed: 3\n")
        (folder / name / "notes.txt").write_text("not for the public")
    return [folder / name for name in written]


def change(folder, **changed):
    """Change fields of a folder's result."""
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
