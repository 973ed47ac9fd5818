"""How often the bootstrap's 95 % intervals hold the truth, with few and with heavy-tailed documents.

Each trial draws 256 documents of a distribution whose figures are known to high precision (from half a million
documents), computes them with intervals as `ReconstructionAccumulator` does, and asks of each whether the truth lies
inside. `python recipes/interval_cover.py --trials 1000` prints the table of docs/evaluation.md.
"""

from __future__ import annotations

import argparse

import torch

from sae_lens_gemma4.evaluation.accumulators import ReconstructionAccumulator
from sae_lens_gemma4.evaluation.intervals import Estimate
from sae_lens_gemma4.evaluation.metrics import ReconstructionMetrics

D_IN, FRACTION = 4, 0.01
FIGURES = ("ve", "ve_centred", "nmse", "cosine", "ve_without_top_sse", "sse_share")
TAILS = {"normal": None, "Student, 5 degrees": 5.0, "Student, 3 degrees": 3.0, "Student, 2 degrees": 2.0}
"""Of the errors' size by token: a document's tokens share part of theirs."""


def documents(
    n: int, tokens: int, tail: float | None, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n documents of so many tokens: activations, reconstructions, and whose each token is."""
    own = torch.randn(n, 1, D_IN, generator=generator, dtype=torch.float64)
    x = torch.randn(n, tokens, D_IN, generator=generator, dtype=torch.float64) + own
    error = 0.4 * torch.randn(n, tokens, D_IN, generator=generator, dtype=torch.float64)
    error *= 1 + 0.5 * torch.rand(n, 1, 1, generator=generator, dtype=torch.float64)
    if tail is not None:  # a Student variable is a normal one over the root of a chi-squared one
        chi2 = torch._standard_gamma(torch.full((n, tokens, 1), tail / 2, dtype=torch.float64), generator=generator)
        error /= (2 * chi2 / tail).sqrt()
    whose = torch.arange(n)[:, None].expand(n, tokens)
    return x.flatten(0, 1), (x + error).flatten(0, 1), whose.flatten()


def measured(
    x: torch.Tensor, x_hat: torch.Tensor, whose: torch.Tensor, resamples: int, seed: int
) -> ReconstructionMetrics:
    accumulator = ReconstructionAccumulator(D_IN, max_tokens=len(x), top_fractions=(FRACTION,), norm_multiples=())
    accumulator.update(x, x_hat, documents_t=whose)
    return accumulator.compute(resamples=resamples, seed=seed)


def figure(metrics: ReconstructionMetrics, name: str) -> Estimate:
    value = metrics.figure((name, FRACTION) if isinstance(getattr(metrics, name), dict) else name)
    assert value is not None
    return value


def cover(
    tail: float | None,
    trials: int,
    *,
    n_documents: int = 256,
    tokens: int = 25,
    resamples: int = 500,
    n_truth: int = 500_000,
) -> dict[str, float]:
    """The share of trials in which each figure's interval holds its true value, that of `n_truth` documents."""
    generator = torch.Generator().manual_seed(0)
    all_of_them = measured(*documents(n_truth, tokens, tail, generator), resamples=0, seed=0)
    hits = dict.fromkeys(FIGURES, 0)
    for trial in range(trials):
        sample = measured(*documents(n_documents, tokens, tail, generator), resamples=resamples, seed=trial)
        for name in FIGURES:
            low, high = figure(sample, name).interval or (float("nan"),) * 2
            hits[name] += low <= figure(all_of_them, name) <= high
    return {name: n / trials for name, n in hits.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args().trials
    print("| errors |", " | ".join(FIGURES), "|\n|---|" + "---|" * len(FIGURES))
    for name, tail in TAILS.items():
        print(f"| {name} |", " | ".join(f"{share:.3f}" for share in cover(tail, trials).values()), "|", flush=True)
