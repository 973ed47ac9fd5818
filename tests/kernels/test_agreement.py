"""Two processes select together what one selects of everything they have."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sae_lens_gemma4.kernels import agreement, cpu, plain
from sae_lens_gemma4.kernels.dispatch import SWITCH, kernels_for
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks

WORLD, D, F = 2, 19, 53
TIES = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 1.0, 2.0])
NUMBERS = {
    "random": [torch.rand(500, generator=torch.Generator().manual_seed(r)) + 1e-3 for r in range(WORLD)],
    "ties": [TIES, torch.tensor([2.0, 2.0, 5.0, 1.0])],
    "all equal": [torch.full((3,), 0.7), torch.full((2,), 0.7)],
    "one rank empty": [torch.empty(0), TIES],
    "nothing": [torch.empty(0), torch.empty(0)],
    "extremes": [torch.tensor([torch.inf, 1e-45, 3e38]), torch.tensor([1e-38, torch.inf, 1.0])],
}
KS = [0, 1, 2, 4, 6, 7, 500, 999, 1000, 1001]


def parts(kind):
    """Each rank's part of a batch, and the encoder: x, W, b, scale."""
    g = torch.Generator().manual_seed(5)
    W, b, scale = torch.randn(F, D, generator=g), 0.1 * torch.randn(F, generator=g), torch.rand(F, generator=g) + 0.5
    x = [torch.randn(30, D, generator=g) for _ in range(WORLD)]
    if kind == "uneven":
        x[0] = x[0] * 0.01
    elif kind == "empty":
        x[0] = x[0][:0]
    elif kind == "zeros":
        x, b = [torch.zeros_like(part) for part in x], torch.zeros_like(b)
    elif kind == "ties":
        x, W, b, scale = [torch.ones(30, D)] * WORLD, torch.ones(F, D), torch.zeros(F), torch.ones(F)
    elif kind == "nan":
        x[1][3, 4] = torch.nan
    return x, (W, b, scale)


BATCHES = ["even", "uneven", "empty", "zeros", "ties", "nan"]
BOUNDS = {
    "none": [None, None],
    "high": [1e30, 1e30],
    "unlike": [0.5, 1e30],
    "nan": [torch.nan] * 2,
}
SELECTED = [
    (kernels.__name__.split(".")[-1], kind, bound, k)
    for kernels in (plain, cpu)
    for kind in BATCHES
    for bound in BOUNDS
    for k in (0, 400, 30 * WORLD * F + 1)
]


def work(rank, folder):
    """All that needs two processes, in one start of them; each writes what it got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    ranks = Ranks(rank, WORLD, dist.group.WORLD)
    shares = {
        (name, k, dtype): agreement.share(numbers[rank].to(dtype), k, ranks)
        for name, numbers in NUMBERS.items()
        for k in KS
        for dtype in (torch.float32, torch.float64)
    }
    selections = {}
    for name, kind, bound, k in SELECTED:
        x, encoder = parts(kind)
        kernels = {"plain": plain, "cpu": cpu}[name]
        chosen = kernels.batch_topk(x[rank], *encoder, k, BOUNDS[bound][rank], ranks)
        selections[name, kind, bound, k] = tuple(chosen)
    latents = torch.arange(6.0).view(2, 3).T + rank  # dense, the columns one after another
    said = {
        "mean": ranks.mean(latents.clone(memory_format=torch.preserve_format)),
        "gathered": ranks.gathered(torch.full((2, 1), float(rank))),
        "first": ranks.first({"rank": rank}),
    }
    torch.save({"shares": shares, "selections": selections, "said": said}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def got(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(["sae_lens_gemma4.training.runner"])  # imported once for all
    mp.start_processes(work, (str(folder),), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_rank_s_share_is_its_part_of_the_sorted_whole(got, name, dtype):
    numbers = [part.to(dtype).tolist() for part in NUMBERS[name]]
    ordered = sorted((-value, rank) for rank, part in enumerate(numbers) for value in part)
    for k in KS:
        for rank in range(WORLD):
            mine = got[rank]["shares"][name, k, dtype]
            assert mine.n_mine == sum(r == rank for _, r in ordered[:k]), (k, rank)
            assert mine.n_all == len(ordered)
            expected = torch.inf if k == 0 else -ordered[k - 1][0] if k <= len(ordered) else 0
            assert mine.least.item() == expected, (k, rank)


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "nan"])
def test_two_processes_select_the_top_k_of_both_their_tokens(got, kind):
    x, (W, b, scale) = parts(kind)
    sizes = [len(part) for part in x]
    pre = torch.cat(x).double() @ W.double().T + b.double()
    act = (pre * scale.double()).flatten().tolist()
    for name, of, bound, k in SELECTED:
        if of != kind:
            continue
        want = sorted((i for i in range(len(act)) if act[i] > 0), key=lambda i: (-act[i], i))[:k]
        chosen = [rank["selections"][name, kind, bound, k] for rank in got]
        entries = [(t + r * sizes[0], f) for r, c in enumerate(chosen) for t, f in zip(c[0], c[1], strict=True)]
        assert [int(t * F + f) for t, f in entries] == sorted(want), (name, bound, k)
        smallest = min((act[i] for i in want), default=torch.inf)
        for selection in chosen:
            assert selection[4].item() == pytest.approx(smallest, rel=1e-5, abs=1e-6)
            assert torch.equal(selection[4], chosen[0][4])


@pytest.mark.parametrize("name", ["plain", "cpu"])
def test_what_is_not_finite_on_one_rank_shows_on_all(got, name):
    for rank in got:
        assert all(rank["selections"][name, "nan", bound, k][4].isnan() for bound in BOUNDS for k in (0, 400))


def test_ranks_say_to_each_other_what_they_should(got):
    for rank, answers in enumerate(got):
        assert torch.equal(answers["said"]["mean"], torch.arange(6.0).view(2, 3).T + 0.5), rank
        assert answers["said"]["gathered"].tolist() == [[0], [0], [1], [1]]
        assert answers["said"]["first"] == {"rank": 0}


def test_parts_are_all_there_is_in_order():
    assert Ranks(1, 3).parts(7) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert ALONE.parts(5) == [slice(0, 5)]


def test_alone_nothing_is_sent():
    x = torch.arange(3.0)
    assert ALONE.mean(x) is x and ALONE.total(x) is x and ALONE.gathered(x) is x and ALONE.first(x) is x
    assert agreement.share(TIES, 3, ALONE) == (7, 2.0, 3)


def test_several_processes_do_not_get_a_selection_that_is_for_one(monkeypatch):
    monkeypatch.setenv(SWITCH, "triton")
    assert kernels_for(torch.device("cpu"), ranks=Ranks(0, 2)) is plain
    monkeypatch.setenv(SWITCH, "auto")
    assert kernels_for(torch.device("cpu"), ranks=Ranks(0, 2)) is cpu
