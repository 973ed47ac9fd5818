"""Selection alone: this package's batch top-k against sae_lens's, a flat `torch.topk` and a scatter.

Ours finds candidates while it makes the encoder's product; sae_lens reads pre-activations that are there. So two
ratios are given. `whole`: product, top-k and scatter against ours, both from inputs to selected activations. `alone`:
top-k and scatter against ours less the product, in whatever dtype that is fastest here, so that as little as possible
is taken off (medians of all rounds; None where ours takes no longer than that product).

Ours has what it has in training: a bound that comes from the batch before.

Shapes: `n` tokens, `d` d_in, `f` latents.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK

from sae_lens_gemma4.bench.ceilings import product
from sae_lens_gemma4.bench.data import Batches, Start
from sae_lens_gemma4.bench.racing import race, ratio
from sae_lens_gemma4.kernels.dispatch import kernels_for
from sae_lens_gemma4.training.sparse_step import BOUND


@dataclass(frozen=True)
class SelectionBench:
    """Medians of seconds; `whole` is that of the ratios within rounds, with its quartiles.

    Attributes:
        product_seconds: of the fastest product, which is subtracted in `alone`.
        topk_seconds: top-k and scatter on given pre-activations.
        whole_seconds: product, top-k and scatter.
    """

    product_seconds: float
    topk_seconds: float
    whole_seconds: float
    ours_seconds: float
    whole: float
    whole_quartiles: tuple[float, float]
    alone: float | None


@torch.no_grad()
def bench_selection(start: Start, batches: Batches, first: int, rounds: int, fastest: str, seed: int) -> SelectionBench:
    """Race them on batches from number `first` on, one a round.

    Args:
        fastest: dtype of the fastest product, as `Ceilings` has it.
    """
    size, device, state = start.size, start.device, start.state
    norm_f: torch.Tensor = state["W_dec"].norm(dim=1)
    W_fd = state["W_enc"].T.contiguous()
    kernels, topk = kernels_for(torch.device(device)), BatchTopK(size.k)
    x_nds = [batches[first + n] - state["b_dec"] for n in range(rounds + 2)]

    def hidden(x_nd: torch.Tensor) -> torch.Tensor:
        return (x_nd @ state["W_enc"] + state["b_enc"]) * norm_f

    def ours(x_nd: torch.Tensor, bound: Any) -> Any:
        return kernels.batch_topk(x_nd, W_fd, state["b_enc"], norm_f, size.k * size.batch, bound)

    bounds = [None, *(BOUND * ours(x_nd, None).smallest for x_nd in x_nds[:-1])]
    given_nf = hidden(x_nds[1])
    turns = {name: iter(range(1, rounds + 2)) for name in ("ours", "whole")}

    def run_ours() -> None:
        turn = next(turns["ours"])
        ours(x_nds[turn], bounds[turn])

    contestants: dict[str, Callable[[], Any]] = {
        "ours": run_ours,
        "whole": lambda: topk(hidden(x_nds[next(turns["whole"])])),
        "topk": lambda: topk(given_nf),
        "product": product(size.batch, size.d_in, size.d_sae, device, fastest),
    }
    times = {name: spent[1:] for name, spent in race(contestants, rounds + 1, device, seed).items()}
    seconds = {name: statistics.median(spent) for name, spent in times.items()}
    beyond = seconds["ours"] - seconds["product"]
    return SelectionBench(
        seconds["product"],
        seconds["topk"],
        seconds["whole"],
        seconds["ours"],
        *ratio(times["whole"], times["ours"]),
        seconds["topk"] / beyond if beyond > 0 else None,
    )
