"""What dashboards of all latents cost beside reading the text once, and beside reading it again for each 128 latents.

Three contestants see the same blocks in each round, in an order drawn anew. *Bare* is the model's forward pass and the
SAE's own `encode`, and throws away what comes out. *The pass* is this package's, to the last activation on disk.
*By 128* goes through the activations once for each 128 latents, as sae-dashboard does, and computes nothing but these
latents; the activations it reads are in memory, where sae-dashboard's are on disk. What follows the pass is a cost a
latent and not a token, and is measured once.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.bench.evaluation import peak_gb
from sae_lens_gemma4.bench.racing import race, ratio
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.reading import CHUNK_LATENTS
from sae_lens_gemma4.interp.gathering import gather_firings
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.models.loading import load_model
from sae_lens_gemma4.neuronpedia.dashboards import build_dashboards
from sae_lens_gemma4.neuronpedia.planning import CONTEXT_SIZE, N_PROMPTS

TIME_TARGET, MEMORY_TARGET, READS_TARGET = 1.5, 6.0, 20
"""The most of bare's time, the most GB above model and SAE, and how many times fewer activations are read, at least."""
MODEL, HOOK = "gemma-4-demo", "blocks.3.hook_resid_post"
_GROUP = 128


@dataclass(frozen=True)
class DashboardsBench:
    """Medians of seconds and of ratios, with quartiles.

    Attributes:
        pass_by_bare: the pass, in units of forward and encode.
        reads_by_pass: how many activation vectors are read by 128, for each that the pass reads.
        by_128_by_pass: time of these, without the model's forward on the one side, with it on the other.
        latent_ms: what follows the pass, a latent.
        whole_by_bare: pass and dashboards of Neuronpedia's usual 24,576 prompts of 128 tokens, in units of bare: by sum
            of what was measured.
        peak_gb: the most above model, SAE and text while dashboards are made; None where it cannot be measured.
    """

    d_sae: int
    tokens: int
    l0: float
    rounds: int
    threads: int
    device: str
    bare_seconds: float
    pass_seconds: float
    pass_by_bare: float
    pass_by_bare_quartiles: tuple[float, float]
    reads_by_pass: float
    by_128_by_pass: float
    by_128_by_pass_quartiles: tuple[float, float]
    latent_ms: float
    whole_by_bare: float
    peak_gb: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def bench_dashboards(
    d_sae: int = 65_536, prompts: int = 128, k: int = 100, rounds: int = 5, device: str = "cpu", seed: int = 0
) -> DashboardsBench:
    """Race on the embedded model, with an SAE of random directions of which about `k` fire on a token.

    Raises:
        ConfigError: sizes that make no SAE, or a device that is not there.
    """
    if min(prompts, k, rounds) < 1 or not k < d_sae:
        raise ConfigError("Sizes must be positive, and k less than d_sae.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"Device {device!r} cannot be used: {str(e).splitlines()[0]}") from e
    model = load_model(MODEL, "Gemma4ProxyLM", device)
    whole = build_corpus("embedded:text", model.tokenizer, context_size=CONTEXT_SIZE, max_tokens=prompts * CONTEXT_SIZE)
    corpus = whole.take(torch.arange(min(prompts, whole.n_blocks)))
    x_td = torch.cat([batch.acts[HOOK] for batch in harvest(model, corpus, [HOOK])])
    sae = active_sae(x_td, d_sae, k, seed)
    reads = {"pass": 0, "by 128": 0}
    with tempfile.TemporaryDirectory(prefix="dashboards-") as folder:
        contestants: dict[str, Callable[[], Any]] = {
            "bare": lambda: _bare(model, corpus, sae),
            "pass": lambda: reads.update({"pass": _pass(model, corpus, sae, Path(folder) / "firings")}),
            "by 128": lambda: reads.update({"by 128": _by_128(x_td, sae)}),
        }
        for run in contestants.values():
            run()
        times = race(contestants, rounds, device, seed)
        made: list[tuple[float, int]] = []
        peak = peak_gb(lambda: made.append(_dashboards(model, corpus, sae, Path(folder) / "dashboards")), device)
    by_bare, quartiles = ratio(times["pass"], times["bare"])
    by_pass, by_pass_quartiles = ratio(times["by 128"], times["pass"])
    bare, ours = (statistics.median(times[name]) for name in ("bare", "pass"))
    seconds, n_latents = made[0]
    latent = max(0.0, seconds - ours) / n_latents
    usual = N_PROMPTS / corpus.n_blocks
    fired = sum(int((sae.encode(part_td) > 0).sum()) for part_td in x_td.split(_rows(sae)))
    return DashboardsBench(
        d_sae=d_sae,
        tokens=corpus.n_tokens,
        l0=fired / len(x_td),
        rounds=rounds,
        threads=torch.get_num_threads(),
        device=device,
        bare_seconds=bare,
        pass_seconds=ours,
        pass_by_bare=by_bare,
        pass_by_bare_quartiles=quartiles,
        reads_by_pass=reads["by 128"] / reads["pass"],
        by_128_by_pass=by_pass,
        by_128_by_pass_quartiles=by_pass_quartiles,
        latent_ms=latent * 1e3,
        whole_by_bare=(by_bare * bare * usual + latent * d_sae) / (bare * usual),
        peak_gb=peak,
    )


def active_sae(x_td: torch.Tensor, d_sae: int, k: int, seed: int) -> SAE[Any]:
    """Unit directions through the mean of `x_td`, and the threshold that a share k / d_sae of what they read passes."""
    d_in, generator = x_td.shape[1], torch.Generator().manual_seed(seed)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, device=str(x_td.device)))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, MODEL
    unit_fd = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1).to(x_td.device)
    sae.W_dec.copy_(unit_fd)
    sae.W_enc.copy_(unit_fd.T)
    sae.b_dec.copy_(x_td.mean(dim=0))
    read = ((x_td[:256] - sae.b_dec) @ sae.W_enc).flatten()
    sae.threshold.fill_(float(read.kthvalue(int(len(read) * (1 - k / d_sae))).values))
    return sae


def _rows(sae: SAE[Any]) -> int:
    return max(1, CHUNK_LATENTS // int(sae.cfg.d_sae))


def _bare(model: HookedModel, corpus: Corpus, sae: SAE[Any]) -> None:
    for batch in harvest(model, corpus, [HOOK], require_finite=False):
        for part_td in batch.acts[HOOK].split(_rows(sae)):
            sae.encode(part_td)


def _pass(model: HookedModel, corpus: Corpus, sae: SAE[Any], folder: Path) -> int:
    """The activation vectors that were read."""
    shutil.rmtree(folder, ignore_errors=True)
    firings = gather_firings(sae, model, HOOK, corpus, folder, {}, progress=False)
    return int(firings.sums["n"])


def _by_128(x_td: torch.Tensor, sae: SAE[Any]) -> int:
    """The same: for each 128 latents all of the text, and what they do on it."""
    n, b_f, threshold_f = 0, cast(torch.Tensor, sae.b_enc), cast(torch.Tensor, sae.threshold)
    for first in range(0, sae.cfg.d_sae, _GROUP):
        part = slice(first, first + _GROUP)
        pre_tf = (x_td - sae.b_dec) @ sae.W_enc[:, part] + b_f[part]
        torch.relu(pre_tf) * (pre_tf > threshold_f[part])
        n += len(x_td)
    return n


def _dashboards(model: HookedModel, corpus: Corpus, sae: SAE[Any], folder: Path) -> tuple[float, int]:
    """Seconds, and latents that have a dashboard."""
    start = time.perf_counter()
    made = build_dashboards(sae, model, corpus, folder, progress=False)
    return time.perf_counter() - start, len(made.latents["index"])
