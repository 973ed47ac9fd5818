"""The CUDA kernels against dense float64: on a GPU where there is one, else by Triton's interpreter.

The interpreter takes a moment for each program of a kernel, so everything is tiny.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sae_lens_gemma4.kernels import gpu, gpu_filter, gpu_select
from sae_lens_gemma4.kernels.pattern import Pattern
from sae_lens_gemma4.kernels.selection import Selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """Buffers of candidates that tiny batches can fill."""
    monkeypatch.setattr(gpu_select, "_SPARE", 8)


def batch(n=37, d=17, f=53, seed=0, bias=0.1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x, W, b = torch.randn(n, d, generator=g), torch.randn(f, d, generator=g), bias * torch.randn(f, generator=g)
    scale = torch.rand(f, generator=g) + 0.5
    return x.to(DEVICE, dtype), W.to(DEVICE, dtype), b.to(DEVICE), scale.to(DEVICE)


def with_outlier():
    x, W, b, scale = batch(seed=1)
    x[5] *= 1000
    return x, W, b, scale


def with_zeros():
    x, W, b, scale = batch(seed=2)
    x[[0, 7, 36]] = 0
    W[11] = 0
    scale[3] = 0
    return x, W, b, scale


BATCHES = {
    "random": batch,
    "no scale": lambda: (*batch(seed=3)[:3], None),
    "outlier": with_outlier,
    "zeros": with_zeros,
    "large biases": lambda: batch(seed=4, bias=30.0),
    "bfloat16": lambda: batch(seed=5, dtype=torch.bfloat16),
    "wide": lambda: batch(3, 5, 1030, seed=6),
    "one latent": lambda: batch(40, 300, 1, seed=7),
}


def dense(x, W, b, scale):
    pre = x.double().cpu() @ W.double().cpu().T + b.double().cpu()
    return pre, pre if scale is None else pre * scale.double().cpu()


def by_hand(act, k_total):
    """Sorted by (-activation, token, latent), positive ones only; their places, ascending."""
    flat = act.flatten().tolist()
    return sorted(sorted((i for i in range(len(flat)) if flat[i] > 0), key=lambda i: (-flat[i], i))[:k_total])


def check(got: Selection, inputs, want, places):
    """`want` first, then nothing until there are as many entries as `places`."""
    pre, act = dense(*inputs)
    f, n_padded = act.shape[1], places - len(want)
    flat = (got.token_e * f + got.latent_e).tolist()
    assert got.token_e.dtype == got.latent_e.dtype == torch.int64
    assert flat == want + [act.numel() - 1] * n_padded
    assert got.act_e[len(want) :].tolist() == [0] * n_padded
    scale = max(1.0, float(act.abs().max()))
    for values, dense_nf in ((got.pre_e, pre), (got.act_e, act)):
        assert values.dtype == torch.float32
        expected = dense_nf.flatten()[want].float()
        torch.testing.assert_close(values[: len(want)].cpu(), expected, rtol=1e-5, atol=1e-6 * scale)
    smallest = act.flatten()[want].min().float() if want else torch.tensor(torch.inf)
    torch.testing.assert_close(got.smallest.cpu(), smallest, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_shows(which):
    inputs = batch()
    inputs[which].view(-1)[3] = torch.nan
    assert gpu.batch_topk(*inputs, 40, 0.5).smallest.isnan()
    assert gpu.row_topk(*inputs, 3, positive=True).smallest.isnan()


@pytest.mark.parametrize(
    ("name", "bound"),
    [*itertools.product(BATCHES, ["high"]), *itertools.product(["random", "outlier"], [None, "low", "right"])],
)
def test_the_selection_is_the_top_k_of_the_batch(name, bound):
    inputs = BATCHES[name]()
    act = dense(*inputs)[1]
    k_total = min(100, act.numel() // 4)
    want = by_hand(act, k_total)
    right = float(act.flatten()[want].min())
    bounds = {None: None, "low": 1e-3 * right, "right": torch.tensor(0.96 * right, device=DEVICE), "high": 1.01 * right}
    check(gpu.batch_topk(*inputs, k_total, bounds[bound]), inputs, want, k_total)


@pytest.mark.parametrize("k_total", [1, 981, 37 * 53 + 5])
def test_from_one_entry_to_more_than_are_positive(k_total):
    inputs = batch()
    want = by_hand(dense(*inputs)[1], k_total)
    check(gpu.batch_topk(*inputs, k_total), inputs, want, min(k_total, 37 * 53))


def test_nothing_to_select():
    x, W, b, _ = batch(4, 3, 5)
    for inputs in [(0 * x, W, 0 * b, None), (x, W, b - 100, None)]:
        for bound in (None, torch.inf):
            check(gpu.batch_topk(*inputs, 6, bound), inputs, [], 6)
    for selection in (gpu.batch_topk(x[:0], W, b, None, 6), gpu.batch_topk(x, W, b, None, 0)):
        assert len(selection.act_e) == 0 and selection.smallest == torch.inf
    rows = gpu.row_topk(x, W, b - 100, None, 2, positive=True)
    assert rows.token_e.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and rows.latent_e.tolist() == [4] * 8
    assert not rows.act_e.any() and rows.smallest == torch.inf
    assert len(gpu.row_topk(x[:0], W, b, None, 2, positive=True).act_e) == 0


@pytest.mark.parametrize("bound", [None, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("k_total", [1, 10, 60])
def test_ties_go_to_the_first_token_s_first_latent(k_total, bound):
    g = torch.Generator().manual_seed(k_total)
    x, W = (torch.randint(-1, 2, shape, generator=g).float().to(DEVICE) for shape in ((18, 3), (9, 3)))
    inputs = (x, W, torch.zeros(9, device=DEVICE), None)
    act = dense(*inputs)[1]
    assert len(act.unique()) < 8
    want = by_hand(act, k_total)
    check(gpu.batch_topk(*inputs, k_total, bound), inputs, want, k_total)


def test_more_ties_than_there_is_room_for():
    ones = torch.ones(8, 4, device=DEVICE)
    inputs = (ones, ones, torch.zeros(8, device=DEVICE), None)
    check(gpu.batch_topk(*inputs, 5, 1.0), inputs, [0, 1, 2, 3, 4], 5)


def test_neither_chunks_nor_bounds_change_a_bit(monkeypatch):
    x, W, b, scale = batch()
    x[9] *= 300
    first = gpu.batch_topk(x, W, b, scale, 120)
    monkeypatch.setattr(gpu_select, "_CHUNK", 53 * 16)
    monkeypatch.setattr(gpu_select, "_DENSE_CHUNK", 53 * 20)
    for bound in (None, 1e-9, 1e9):
        for one, other in zip(first, gpu.batch_topk(x, W, b, scale, 120, bound), strict=True):
            assert torch.equal(one, other)


def test_weights_that_learn_and_lie_as_they_like():
    x, W, b, scale = batch()
    want = gpu.batch_topk(x, W, b, scale, 50)
    learning = torch.nn.Parameter(W.T.contiguous().T)
    got = gpu.batch_topk(x.T.contiguous().T, learning, torch.nn.Parameter(b), scale, 50)
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one, other) and not other.requires_grad


@pytest.mark.parametrize("name", ["random", "outlier", "zeros", "bfloat16"])
def test_the_filter_is_no_farther_off_than_it_says(name):
    x, W, *_ = BATCHES[name]()
    both = gpu_filter.Filter(x, W)
    for table, rounded in ((x, both.x), (W, both.W)):
        wide = table.double()
        assert (rounded.coarse == table.bfloat16()).float().mean() > 0.2  # the interpreter cuts off
        assert ((wide - rounded.coarse.double()).abs() <= 2**-7 * wide.abs()).all()
        torch.testing.assert_close(rounded.norm.double(), wide.norm(dim=1), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            rounded.off.double(), (wide - rounded.coarse.double()).norm(dim=1), rtol=1e-5, atol=0
        )
    [(_, hidden)] = both.chunks(2**20)
    error = both.error(slice(0, len(x)))
    off = (hidden.double() - x.double() @ W.double().T).abs()
    assert (off <= error + gpu_filter.ROUNDING * hidden.double().abs()).all()
    assert (error <= 2**-6 * x.norm(dim=1, dtype=torch.float32)[:, None] * both.W.norm).all()


@pytest.mark.parametrize("exact", ["x and W", "x", "W", "neither"])
def test_no_entry_at_the_bound_is_missed(exact):
    """Each latent's bound is what one token really has there; what bfloat16 cannot hold must not hide it."""
    x, W, *_ = batch(4, 17, 400, seed=8)
    x, W = (t.bfloat16().float() if name in exact else t for name, t in (("x", x), ("W", W)))
    both = gpu_filter.Filter(x, W)
    true = (x.double() @ W.double().T).float()
    [(_, hidden)] = both.chunks(2**20)
    for token in range(4):
        assert (hidden[token].float() < true[token]).sum() > 50
        keys = torch.full((1600,), -1, device=DEVICE)
        both.candidates(hidden, true[token], 0, keys, torch.zeros(1, dtype=torch.int64, device=DEVICE))
        assert set(range(token * 400, (token + 1) * 400)) <= set(keys.tolist())


@pytest.mark.parametrize("name", ["no scale", "outlier", "bfloat16"])
def test_the_bound_of_the_second_pass_is_one(name):
    inputs = BATCHES[name]()
    act = dense(*inputs)[1].flatten().sort(descending=True).values
    encoder = gpu_select._Encoder(*inputs)
    for k_total in range(1, 402, 25):
        bound, right = float(encoder.lower_bound(k_total)), float(act[k_total - 1])
        assert 0 < bound <= right * (1 + 1e-6)
        assert name == "outlier" or bound > 0.8 * right


@pytest.mark.parametrize("capacity", [4, 400])
def test_candidates_are_counted_beyond_their_room(capacity):
    x, W, *_ = batch(20, 17, 30)
    both = gpu_filter.Filter(x, W)
    [(_, hidden)] = both.chunks(2**20)
    least = torch.linspace(1, 12, 30, device=DEVICE)
    keys = torch.full((capacity,), -1, device=DEVICE)
    count = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    both.candidates(hidden[16:], least, 16, keys, count)
    true = x.double() @ W.double().T
    surely = [t * 30 + f for t in range(16, 20) for f in range(30) if true[t, f] >= least[f]]
    perhaps = [t * 30 + f for t in range(16, 20) for f in range(30) if true[t, f] >= 0.9 * least[f] - 0.5]
    found = [key for key in keys.tolist() if key >= 0]
    assert len(surely) <= count <= len(perhaps)
    assert len(found) == len(set(found)) == min(capacity, int(count))
    assert set(found) <= set(perhaps) and (capacity < 5 or set(surely) <= set(found))


@pytest.mark.parametrize(("latents", "positive"), [(None, False), (None, True), ([0, 3, 4, 17, 52], True)])
@pytest.mark.parametrize("k", [1, 4, 60])
def test_the_selection_is_the_top_k_of_each_row(latents, positive, k):
    inputs = batch(4)
    pre, act = dense(*inputs)
    asked = list(range(53)) if latents is None else latents
    k_here = min(k, len(asked))
    got = gpu.row_topk(*inputs, k, None if latents is None else torch.tensor(latents, device=DEVICE), positive=positive)
    assert got.token_e.tolist() == [t for t in range(4) for _ in range(k_here)]
    selected = []
    for t, (found, acts) in enumerate(zip(got.latent_e.split(k_here), got.act_e.split(k_here), strict=True)):
        best = sorted(asked, key=lambda latent: -act[t, latent].item())[:k_here]
        want = sorted(latent for latent in best if not positive or act[t, latent] > 0)
        n_padded = k_here - len(want)
        assert found.tolist() == want + [asked[-1]] * n_padded
        expected = torch.cat([act[t, want], torch.zeros(n_padded, dtype=torch.float64)])
        torch.testing.assert_close(acts.double().cpu(), expected, rtol=1e-5, atol=1e-5)
        selected += act[t, want].tolist()
    assert float(got.smallest) == pytest.approx(min(selected), abs=1e-5)
    where = got.act_e != 0
    expected = pre[got.token_e.cpu(), got.latent_e.cpu()][where.cpu()]
    torch.testing.assert_close(got.pre_e[where].double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_ties_of_a_row_go_to_its_first_latents_in_any_chunks(monkeypatch):
    """Rows longer than the block that is read at a time, and fewer tokens at a time than there are."""
    monkeypatch.setattr(gpu_select, "_CHUNK", 1)
    g = torch.Generator().manual_seed(0)
    W = torch.randint(0, 4, (2500, 1), generator=g).float().to(DEVICE)
    x = torch.tensor([[1.0], [2.0]] * 9, device=DEVICE)
    got = gpu.row_topk(x, W, torch.zeros(2500, device=DEVICE), None, 1500, positive=True)
    order = sorted(range(2500), key=lambda latent: (-W[latent].item(), latent))[:1500]
    assert W[order[-1]].item() == 1 and len({W[latent].item() for latent in order}) == 3
    assert got.latent_e.tolist() == sorted(order) * 18
    assert torch.equal(got.act_e, x[got.token_e, 0] * W[got.latent_e, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "d"), [([0], 3), ([2, 0, 0, 9, 1], 5), ([0, 0, 500, 0], 7), ([128, 129, 0, 257], 3), ([3, 4], 700)]
)
def test_sums_and_dots(lengths, d, dtype):
    g = torch.Generator().manual_seed(sum(lengths))
    column = torch.randint(0, 11, (sum(lengths),), generator=g)
    weight = torch.randn(sum(lengths), generator=g)
    table, left = torch.randn(11, d, generator=g).to(dtype), torch.randn(len(lengths), d, generator=g).to(dtype)
    row = [r for r, length in enumerate(lengths) for _ in range(length)]
    where = Pattern(torch.tensor([0, *lengths]).cumsum(0).to(DEVICE), column.to(DEVICE))
    out = gpu.sums(where, weight.to(DEVICE), table.to(DEVICE))
    want = torch.zeros(len(lengths), d, dtype=torch.float64)
    for r, c, w in zip(row, column.tolist(), weight.double().tolist(), strict=True):
        want[r] += w * table[c].double()
    tolerance = {"rtol": 2**-8, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert out.dtype == dtype
    torch.testing.assert_close(out.double().cpu(), want, **tolerance)
    assert torch.equal(out, gpu.sums(where, weight.to(DEVICE), table.to(DEVICE)))
    dots = gpu.dots(where, left.to(DEVICE), table.to(DEVICE))
    assert dots.dtype == dtype
    torch.testing.assert_close(dots.double().cpu(), (left.double()[row] * table.double()[column]).sum(1), **tolerance)


COMPILE = """
import sys, types
package = sys.modules["sae_lens_gemma4"] = types.ModuleType("sae_lens_gemma4")
package.__path__ = [sys.argv[1]]  # kernels need nothing of the rest, which takes seconds to import

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_lens_gemma4.kernels import gpu_filter, gpu_select, gpu_sparse
f, i, n = "*fp32", "*i64", "i32"
for kernel, types, constants in [
    (gpu_sparse._pieces_kernel, [f, "*bf16", f, i, i, i, n], dict(ENTRIES=8, BLOCK=512)),
    (gpu_sparse._fold_kernel, [f, f, i, i, n], dict(BLOCK=512)),
    (gpu_sparse._dots_kernel, [f, f, "*bf16", i, i, i, n, n], dict(ENTRIES=16, BLOCK=128)),
    (gpu_filter._round_kernel, ["*bf16", f, f, f, n, n], dict(ROWS=8, BLOCK=256)),
    (gpu_filter._candidates_kernel, [i, i, "*bf16", *[f] * 5, *[n] * 4], dict(ROUNDING=0.1, ROWS=16, BLOCK=1024)),
    (gpu_select._take_kernel, [i, f, f, f, f, f, n, n], dict(POSITIVE=True, BLOCK=1024)),
]:
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
    built = triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", 90, 32), gpu_sparse.OPTIONS)
    print(kernel.__name__, len(built.asm["cubin"]))
"""


def test_all_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter runs more than the compiler takes. No GPU is needed to find out."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(Path(gpu.__file__).parents[1])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 6


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU to wait for")
@pytest.mark.parametrize("name", BATCHES)
def test_nothing_waits_for_the_gpu_until_the_proof_is_asked_for(name):
    inputs = BATCHES[name]()
    act = dense(*inputs)[1]
    k_total = act.numel() // 4
    want = by_hand(act, k_total)
    right = act.flatten()[want].min().float().to(DEVICE)
    where = Pattern(torch.tensor([0, 300, 301], device=DEVICE), torch.zeros(301, dtype=torch.int64, device=DEVICE))
    weight, table = torch.ones(301, device=DEVICE), torch.ones(2, 5, device=DEVICE)
    gpu.batch_topk(*inputs, k_total, right)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [gpu.begin(*inputs, k_total, bound) for bound in (None, right, 1e-3 * right, 2 * right)]
        rows = gpu.row_topk(*inputs, 1, positive=True)
        summed, dotted = gpu.sums(where, weight, table), gpu.dots(where, table, table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one in pending:
        check(one.result(), inputs, want, k_total)
    assert len(rows.act_e) == len(inputs[0])
    assert summed[:, 0].tolist() == [300, 1] and set(dotted.tolist()) == {5}
