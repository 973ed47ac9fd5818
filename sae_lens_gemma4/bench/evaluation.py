"""What measuring an SAE costs beside the one product that cannot be saved, and beside sae_lens's own evaluation.

Three contestants see the same activations in each round, in an order drawn anew: the encoder's product alone, this
package (encoding, decoding, every metric gathered), and the part of `run_evals` that follows the model's forward pass,
called as it is with a model that only hands out the activations. Ratios are medians over rounds.

Memory is what this package needs above the weights and the batch, at its peak, with the state of a whole evaluation
(262,144 tokens) and while intervals are made; sae_lens's is that of one batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.evals import get_sparsity_and_variance_metrics
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_gemma4.bench.racing import race, ratio
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.accumulators import ReconstructionAccumulator
from sae_lens_gemma4.evaluation.intervals import MAX_CLUSTERS
from sae_lens_gemma4.evaluation.reading import CHUNK_LATENTS, ActiveLatents, read

TIME_TARGET, PEAK_TARGET = 1.3, 2.0
"""The most that ours may take, in units of the encoder's product, and in GB."""
_HOOK = "blocks.0.hook_resid_post"


@dataclass(frozen=True)
class EvaluationBench:
    """Medians of seconds, of ratios, and peaks in GB (None where they cannot be measured)."""

    d_in: int
    d_sae: int
    batch_tokens: int
    all_tokens: int
    rounds: int
    threads: int
    device: str
    l0: float
    encoder_seconds: float
    ours_seconds: float
    stock_seconds: float
    ours_by_encoder: float
    ours_by_encoder_quartiles: tuple[float, float]
    stock_by_ours: float
    ours_peak_gb: float | None
    stock_peak_gb: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def bench_evaluation(
    d_in: int = 2560,
    d_sae: int = 65536,
    k: int = 100,
    batch_tokens: int = 512,
    all_tokens: int = 262_144,
    rounds: int = 5,
    device: str = "cpu",
    seed: int = 0,
) -> EvaluationBench:
    """Time and weigh the SAE part of an evaluation on a random JumpReLU SAE with about `k` active latents a token.

    Raises:
        ConfigError: sizes that make no SAE, or a device that is not there.
    """
    if min(d_in, k, batch_tokens, rounds) < 1 or not k < d_sae or all_tokens < batch_tokens:
        raise ConfigError("Sizes must be positive, k less than d_sae, all tokens no less than a batch.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"Device {device!r} cannot be used: {str(e).splitlines()[0]}") from e
    generator = torch.Generator().manual_seed(seed)
    sae = _sae(d_in, d_sae, k, device, generator)
    x_td = torch.randn(batch_tokens, d_in, generator=generator).to(device)
    contestants: dict[str, Callable[[], Any]] = {
        "encoder": lambda: _encoder_product(sae, x_td),
        "ours": lambda: _ours(sae, x_td),
        "stock": lambda: _stock(sae, x_td),
    }
    for run in contestants.values():
        run()
    times = race(contestants, rounds, device, seed)
    by_encoder, quartiles = ratio(times["ours"], times["encoder"])
    active = sum(len(reading.active.value_a) for reading in read(sae, x_td))
    encoder, ours, stock = (statistics.median(times[name]) for name in ("encoder", "ours", "stock"))
    return EvaluationBench(
        d_in=d_in,
        d_sae=d_sae,
        batch_tokens=batch_tokens,
        all_tokens=all_tokens,
        rounds=rounds,
        threads=torch.get_num_threads(),
        device=device,
        l0=active / batch_tokens,
        encoder_seconds=encoder,
        ours_seconds=ours,
        stock_seconds=stock,
        ours_by_encoder=by_encoder,
        ours_by_encoder_quartiles=quartiles,
        stock_by_ours=ratio(times["stock"], times["ours"])[0],
        ours_peak_gb=peak_gb(lambda: _whole_evaluation(sae, x_td, all_tokens), device),
        stock_peak_gb=peak_gb(contestants["stock"], device),
    )


def _sae(d_in: int, d_sae: int, k: int, device: str, generator: torch.Generator) -> SAE[Any]:
    """Random unit directions, and the threshold that a share k / d_sae of normal pre-activations passes."""
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, device=device, apply_b_dec_to_input=False))
    sae.cfg.metadata.hook_name = _HOOK
    for start in range(0, d_sae, 4096):
        rows_fd = torch.randn(min(4096, d_sae - start), d_in, generator=generator)
        rows_fd = rows_fd / rows_fd.norm(dim=1, keepdim=True)
        sae.W_dec[start : start + 4096] = rows_fd.to(device)
        sae.W_enc[:, start : start + 4096] = rows_fd.T.to(device)
    sae.threshold.fill_(statistics.NormalDist().inv_cdf(1 - k / d_sae))
    return sae


def _encoder_product(sae: SAE[Any], x_td: torch.Tensor) -> None:
    for chunk_td in x_td.split(max(1, CHUNK_LATENTS // sae.cfg.d_sae)):
        chunk_td @ sae.W_enc


def _ours(sae: SAE[Any], x_td: torch.Tensor) -> None:
    accumulator = ReconstructionAccumulator(sae.cfg.d_in, max_tokens=len(x_td), d_sae=sae.cfg.d_sae)
    _gather(sae, x_td, accumulator, torch.zeros(len(x_td), dtype=torch.long))


def _gather(
    sae: SAE[Any], x_td: torch.Tensor, accumulator: ReconstructionAccumulator, documents_t: torch.Tensor
) -> None:
    at = 0
    for reading in read(sae, x_td):
        part = slice(at, at := at + len(reading.x_td))
        accumulator.update(reading.x_td, reading.x_hat_td, reading.active, documents_t=documents_t[part])


def _stock(sae: SAE[Any], x_td: torch.Tensor) -> None:
    """`get_sparsity_and_variance_metrics` (sae_lens/evals.py) on a model and a store that cost nothing."""
    tokens_bp = torch.zeros(1, len(x_td), dtype=torch.long)
    get_sparsity_and_variance_metrics(
        sae,
        SimpleNamespace(run_with_cache=lambda *_, **__: (None, {_HOOK: x_td[None]})),  # type: ignore[arg-type]
        SimpleNamespace(get_batch_tokens=lambda _: tokens_bp),  # type: ignore[arg-type]
        ActivationScaler(),
        n_batches=1,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        eval_batch_size_prompts=1,
        model_kwargs={},
    )


def _whole_evaluation(sae: SAE[Any], x_td: torch.Tensor, all_tokens: int) -> None:
    """Fill the state that `all_tokens` tokens leave, the last batch through the SAE, and make the intervals."""
    accumulator = ReconstructionAccumulator(sae.cfg.d_in, max_tokens=all_tokens, d_sae=sae.cfg.d_sae)
    documents = min(MAX_CLUSTERS, all_tokens)
    document_n = torch.arange(all_tokens) * documents // all_tokens
    nothing = torch.zeros(0, dtype=torch.long, device=x_td.device)
    _gather(sae, x_td, accumulator, document_n[: len(x_td)])
    at, none = len(x_td), ActiveLatents(nothing, nothing, nothing.float())
    while at < all_tokens:
        scale = 1 + (at % 97) / 97
        chunk_td = x_td[: all_tokens - at] * scale
        part = slice(at, at := at + len(chunk_td))
        accumulator.update(chunk_td, 0.9 * chunk_td, none, documents_t=document_n[part])
    accumulator.compute()


def peak_gb(run: Callable[[], Any], device: str) -> float | None:
    """The most memory above what was there before, on the GPU or, under Linux, of the process."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before) / 1e9
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")  # the high-water mark starts again
        before = _kib(status, "VmRSS")
        run()
        return (_kib(status, "VmHWM") - before) * 1024 / 1e9
    except OSError:
        return None


def _kib(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))
