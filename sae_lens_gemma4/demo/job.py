"""What this package is for, in three minutes and without a network.

A published SAE of the base model is measured on the tuned model, found wanting, trained on, measured again,
saved, and read back by stock sae_lens in a process that never imports this package. Twice: for the mild shift
of a real (tiny) instruction tuning, and for a hard one in which the tuned model's residual stream is scaled by
six and its function is not changed at all (`models.rescale`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.errors import SAEError
from sae_lens_gemma4.evaluation.compare import Comparison
from sae_lens_gemma4.evaluation.evaluate import evaluate_sae
from sae_lens_gemma4.evaluation.result import versions
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.models.loading import load_model
from sae_lens_gemma4.report.html import render_demo
from sae_lens_gemma4.training.config import Activations, ContinueTrainingConfig, Data, Model, WarmStart
from sae_lens_gemma4.training.phases import Phase, Training
from sae_lens_gemma4.training.preparing import build_sources
from sae_lens_gemma4.training.records import SAEResult
from sae_lens_gemma4.training.restore import load_sae
from sae_lens_gemma4.training.runner import ContinueTrainingRunner

SCHEMA = 2
RELEASE, SAE_ID, BASE_MODEL = "gemma-4-demo-res-matryoshka-embedded", "layer_3_width_2k_l0_16", "gemma-4-demo"
CONTEXT = 128


@dataclass(frozen=True)
class Shift:
    """One way in which the tuned model differs from the one that the SAE was trained on."""

    name: str
    title: str
    model: str
    description: str


SHIFTS = (
    Shift(
        "tuned",
        "Instruction tuning",
        "gemma-4-demo-it",
        "The base model trained on as a chat model. The shift is real and, in so small a model, mild.",
    ),
    Shift(
        "rescaled",
        "Instruction tuning, residual stream ×6",
        "gemma-4-demo-it-rescaled",
        "The same tuned model with its residual stream scaled by 6 through its weights, made to break the SAE and "
        "nothing else: the model's logits are the same up to rounding.",
    ),
)


def demo_config(shift: Shift, output: Path, seed: int) -> ContinueTrainingConfig:
    """The recipe of one shift. It is saved with the result, and `sae-lens-gemma4 train` runs it again."""
    return ContinueTrainingConfig(
        warm_start=WarmStart(release=RELEASE, sae_id=SAE_ID),
        model=Model(name=shift.model),
        data=Data(
            context_size=CONTEXT,
            train=[Source(dataset="embedded:text"), Source(dataset="embedded:chat")],
            heldout=[
                Source(dataset="embedded:text", split="heldout", name="tuned text"),
                Source(dataset="embedded:chat", split="heldout", name="tuned chat"),
            ],
        ),
        activations=Activations(batch_size=1024),
        training=Training(phases=[Phase(tokens=500_000, lr=1e-3, warm_up_steps=20)], dead_after_steps=200),
        output=str(output),
        seed=seed,
    )


def run_demo(out: Path, seed: int = 0, *, progress: bool = True, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the job and write `report.json`, `report.html` and one SAE folder a shift under `out`.

    Returns the report. Its figures depend on the seed, the interpreter's documentation and the installed versions.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    say(f"1/3  {RELEASE} / {SAE_ID} on its own model, {BASE_MODEL}")
    model = load_model(BASE_MODEL, "Gemma4ProxyLM")
    own_text = build_corpus("embedded:text", model.tokenizer, context_size=CONTEXT, split="heldout", name="base text")
    source = {"release": RELEASE, "sae_id": SAE_ID}
    reference = evaluate_sae(load_sae(RELEASE, SAE_ID), model, own_text, source=source, progress=progress)
    base_model, shifts = model, []
    for number, shift in enumerate(SHIFTS, start=2):
        say(f"{number}/3  {shift.title}: the same SAE on {shift.model}, then trained on")
        cfg = demo_config(shift, out / shift.name, seed)
        run = ContinueTrainingRunner(cfg, progress=progress).run(replace=True)
        result = run.only
        model = load_model(shift.model, "Gemma4ProxyLM")
        heldout = build_sources(cfg.data, cfg.data.heldout, model.tokenizer)
        adapted = {"path": str(result.path)}
        at_home = evaluate_sae(result.sae, base_model, own_text, source=adapted, progress=progress)
        forgetting = Comparison(own_text.name, reference, at_home)
        reload = reload_elsewhere(result, model, heldout)
        shifts.append(_shift_report(shift, result, forgetting, reload, run.tokens, run.seconds))
    report = {
        "schema": SCHEMA,
        "kind": "demo",
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "versions": versions(),
        "base": {"release": RELEASE, "sae_id": SAE_ID, "model": BASE_MODEL},
        "reference": reference.to_dict(),
        "shifts": shifts,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "report.html").write_text(render_demo(report), encoding="utf-8")
    return report


def _shift_report(
    shift: Shift,
    result: SAEResult,
    forgetting: Comparison,
    reload: dict[str, Any],
    tokens: int,
    seconds: float,
) -> dict[str, Any]:
    return {
        "name": shift.name,
        "title": shift.title,
        "model": shift.model,
        "description": shift.description,
        "rows": [comparison.to_dict() for comparison in result.comparisons()],
        "forgetting": [forgetting.to_dict()],
        "training": {
            "tokens": tokens,
            "steps": result.history[-1]["step"],
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "calibration": result.calibration,
            "history": result.history,
        },
        "reload": reload,
    }


_READER = """
import sys, torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
folder, activations, reconstructions = sys.argv[1:]
sae = SAE.load_from_disk(folder)
with torch.no_grad():
    out = {k: torch.cat([sae(x) for x in v.split(4096)]) for k, v in load_file(activations).items()}
save_file(out, reconstructions)
assert not any(name.startswith("sae_lens_gemma4") for name in sys.modules)
"""


@torch.no_grad()
def reload_elsewhere(result: SAEResult, model: HookedModel, corpora: dict[str, Corpus]) -> dict[str, Any]:
    """Read the saved SAE by stock sae_lens in a process of its own and compare what it computes, bit by bit.

    Raises:
        SAEError: the other process could not read or run it.
    """
    hook_name = result.sae.cfg.metadata.hook_name
    inputs = {
        name: torch.cat([batch.acts[hook_name] for batch in harvest(model, corpus, [hook_name])])
        for name, corpus in corpora.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        activations, reconstructions = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
        save_file(inputs, activations)
        command = [sys.executable, "-c", _READER, str(result.path.resolve()), str(activations), str(reconstructions)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise SAEError(f"Stock sae_lens cannot read {result.path}: {reason}")
        theirs = load_file(reconstructions)
    ours = {name: torch.cat([result.sae(x) for x in x_td.split(4096)]) for name, x_td in inputs.items()}
    difference = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    return {
        "path": result.path.name,
        "identical": all(torch.equal(ours[name], theirs[name]) for name in ours),
        "max_abs_difference": difference,
        "ve": {name: _variance_explained(inputs[name], theirs[name]) for name in ours},
    }


def _variance_explained(x_td: torch.Tensor, x_hat_td: torch.Tensor) -> float:
    x, x_hat = x_td.double(), x_hat_td.double()
    return float(1 - (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())
