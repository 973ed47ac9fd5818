"""What each part of continue-training is worth, on the embedded pair: the tables of docs/continue-training.md.

python recipes/ablate.py --out docs/ablations.json                  # all of it, some 40 minutes of two cores
python recipes/ablate.py --out docs/ablations.json --only resampling

A row is one run: shift, variant, seed, and held-out figures on text and chat. Rows that the file has are not run again.
Runs are spread over processes of one thread each. The shifts are those of the demo (a real instruction tuning, and that
with its residual stream ×6) and two that no single scale undoes, put on the hooked activations themselves: a mean shift
of three times their spread, and gains of its own for each channel (log-normal, σ = .5).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.models.loading import load_model
from sae_lens_gemma4.training.calibration import Calibration
from sae_lens_gemma4.training.config import (
    Activations,
    ContinueTrainingConfig,
    Data,
    Model,
    Monitoring,
    SAEForm,
    WarmStart,
)
from sae_lens_gemma4.training.phases import Guard, Phase, Training
from sae_lens_gemma4.training.preparing import build_sources
from sae_lens_gemma4.training.resampling import Resampling
from sae_lens_gemma4.training.runner import ContinueTrainingRunner

RELEASE, SAE_ID, HOOK, LAYER = (
    "gemma-4-demo-res-matryoshka-embedded", "layer_3_width_2k_l0_16", "blocks.3.hook_resid_post", 3,
)  # fmt: skip
TOKENS, BATCH, LR = 128_000, 1024, 1e-3
LOOK = 16_384  # tokens that calibration looks at
SHIFTS = ("tuned", "rescaled", "mean", "gains")
MODELS = {"rescaled": "gemma-4-demo-it-rescaled"}  # the others are gemma-4-demo-it
SETTINGS = {"k": 16, "matryoshka_widths": [128, 512, 2048]}


@dataclass(frozen=True)
class Run:
    """One row to be."""

    experiment: str
    variant: str
    shift: str
    seed: int
    tokens: int = TOKENS
    lr: float = LR
    scratch: bool = False
    packed: bool = True
    calibration: Calibration | None = field(default_factory=lambda: Calibration(tokens=LOOK))
    resampling: Resampling | None = None
    guard: Guard | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.experiment, self.variant, self.shift, self.seed


def experiments(seeds: int) -> Iterator[Run]:
    calibrations: dict[str, Calibration | None] = {
        "none": None,
        "all": Calibration(tokens=LOOK),
        "without recentring": Calibration(tokens=LOOK, recentre=False),
        "without gains": Calibration(tokens=LOOK, gains=False),
        "threshold alone": Calibration(tokens=LOOK, recentre=False, scale=False, gains=False),
    }
    where = {  # a part is left out where it could be of use
        "without recentring": ("mean",),
        "without gains": ("mean", "gains"),
        "threshold alone": ("rescaled", "mean", "gains"),
    }
    for shift in SHIFTS:
        for lr in (1e-3, 3e-3):
            yield Run("scratch", f"lr {lr:g}", shift, 0, 10 * TOKENS, lr=lr, scratch=True)
    for seed in range(seeds):
        for shift in SHIFTS:
            for name, calibration in calibrations.items():
                if shift in where.get(name, SHIFTS):
                    yield Run("calibration", name, shift, seed, calibration=calibration)
        for of in ("median", "mean"):
            for share in (0.2, 0.5, 1.0):
                how = Resampling(every_steps=50, share=share, of=of)
                yield Run("resampling", f"{share} × {of}", "rescaled", seed, resampling=how)
        full = Resampling(every_steps=50, share=1.0, of="median")
        yield Run("resampling", "1.0 × median, guarded", "rescaled", seed, resampling=full, guard=Guard())
        yield Run("resampling", "none", "rescaled", seed)
        for packed, name in ((True, "packed"), (False, "whole documents")):
            yield Run("packing", name, "tuned", seed, packed=packed)


def shifted(shift: str) -> HookedModel:
    """The tuned model whose hooked activations have moved."""
    model = load_model(MODELS.get(shift, "gemma-4-demo-it"), "Gemma4ProxyLM")
    if shift in ("mean", "gains"):
        generator = torch.Generator().manual_seed(7)
        direction_d, spread_d = torch.randn(2, 96, generator=generator)
        corpus = build_sources(data(True), data(True).heldout, model.tokenizer)["text"]
        x_td = torch.cat([batch.acts[HOOK] for batch in harvest(model, corpus, [HOOK])])
        sigma = float((x_td - x_td.mean(0)).square().sum(1).mean().sqrt())
        offset_d = 3 * sigma * direction_d / direction_d.norm()
        gain_d = (0.5 * spread_d).exp()
        layer = model.model.model.layers[LAYER]
        if shift == "mean":
            layer.register_forward_hook(lambda _m, _i, output: output + offset_d)
        else:
            layer.register_forward_hook(lambda _m, _i, output: output * gain_d)
    return model


def data(packed: bool) -> Data:
    return Data(
        context_size=128,
        train=[Source(dataset="embedded:text", name="text"), Source(dataset="embedded:chat", name="chat")],
        heldout=[
            Source(dataset="embedded:text", split="heldout", name="text", tokens=8_000),
            Source(dataset="embedded:chat", split="heldout", name="chat", tokens=8_000),
        ],
        packed=packed,
    )


def measure(run: Run) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = shifted(run.shift)
    phase = Phase(tokens=run.tokens, lr=run.lr, warm_up_steps=20, resampling=run.resampling)
    form = SAEForm(hook_name=HOOK, architecture="matryoshka_batchtopk", d_sae=2048, settings=SETTINGS)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cfg = ContinueTrainingConfig(
            model=Model(name=MODELS.get(run.shift, "gemma-4-demo-it")),
            warm_start=None if run.scratch else WarmStart(release=RELEASE, sae_id=SAE_ID),
            sae=form if run.scratch else SAEForm(),
            data=data(run.packed),
            calibration=run.calibration,
            training=Training(phases=[phase], dead_after_steps=40, guard=run.guard),
            activations=Activations(batch_size=BATCH, batch_blocks=32),
            monitoring=Monitoring(
                evaluate_every=10 if run.experiment == "calibration" else None, checkpoint_every=100_000
            ),
            output=str(Path(folder) / "run"),
            seed=run.seed,
        )
        # Held-out text is packed alike in all variants, so that their figures are of the same tokens.
        heldout = build_sources(data(True), data(True).heldout, model.tokenizer)
        sources = build_sources(cfg.data, cfg.data.train, model.tokenizer)
        corpora = {"train": type(next(iter(sources.values()))).concat(list(sources.values())), **heldout}
        result = ContinueTrainingRunner(cfg, model=model, corpora=corpora, progress=False).run().only
    after = {name: e.metrics for name, e in result.after.items()}
    return {
        "experiment": run.experiment,
        "variant": run.variant,
        "shift": run.shift,
        "seed": run.seed,
        "tokens": run.tokens,
        "ve": {name: float(m.ve) for name, m in after.items()},
        "l0": {name: float(m.l0) for name, m in after.items()},
        "dead": {name: m.dead for name, m in after.items()},
        "before": {name: float(e.metrics.ve) for name, e in result.before.items()},
        "curve": [[row["tokens"], *(row["corpora"][n]["ve"] for n in heldout)] for row in result.evaluations],
        "events": [
            {k: e[k] for k in ("kind", "step", "dead", "resampled", "selected_from_before", "selected_from_after",
                               "ve_before", "ve_after", "reason") if k in e}
            for e in result.events
        ],
        "calibration": result.calibration,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("scratch", "calibration", "resampling", "packing"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    known = {(r["experiment"], r["variant"], r["shift"], r["seed"]) for r in rows}
    runs = [r for r in experiments(arguments.seeds) if arguments.only in (None, r.experiment) and r.key not in known]
    with ProcessPoolExecutor(arguments.processes) as pool:
        for number, done in enumerate(as_completed([pool.submit(measure, run) for run in runs]), start=1):
            rows.append(row := done.result())
            rows.sort(key=lambda r: [str(r[k]) for k in ("experiment", "shift", "variant", "seed")])
            arguments.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
            print(
                f"{number}/{len(runs)} {row['experiment']} {row['variant']} {row['shift']} {row['seed']} {row['ve']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
