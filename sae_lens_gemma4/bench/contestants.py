"""One training step each of the libraries that are raced: sae_lens, this package, dictionary_learning, sparsify.

All begin with the same weights (`Start`) and do what their own training does on a batch: forward, backward, clipping
where they clip, Adam, their own upkeep. sae_lens and this package compute the same loss; the other two do not, and say
so in `note`. Rescaling by decoder norms, which they lack, is folded into the weights that they get.

What does not run here is named with the reason (`NotHereError`), never left out.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_gemma4.bench.data import Start, sae_settings, trainer_config
from sae_lens_gemma4.training.fast import FAST
from sae_lens_gemma4.training.trainer import SparseTrainer

STOCK, OURS, OURS_IN_STOCK = "sae_lens", "this package", "this package, sae_lens's trainer"
COMPILED, DICTIONARY_LEARNING, SPARSIFY = "sae_lens, compiled", "dictionary_learning", "sparsify"
PRECISIONS = {"cpu": ("float32", "bf16 autocast"), "cuda": ("float32", "tf32", "bf16 autocast")}
"""Under which a step is measured, by kind of device."""
AUTOCAST = "bf16 autocast"
MATRYOSHKA = "matryoshka_batchtopk"
_AUX = 1 / 32
"""Weight of the auxiliary loss in the two libraries that have it relative to the residual's variance."""


class NotHereError(Exception):
    """A contestant cannot run; the message is the reason."""


@dataclass(frozen=True)
class Contestant:
    """One library's training of one SAE.

    Attributes:
        note: what sets its step apart; "" if nothing does.
        step: takes a batch `[n, d]`.
        parameters: what it trains.
    """

    name: str
    note: str
    step: Callable[[torch.Tensor], None]
    parameters: list[torch.nn.Parameter]


def training_sae(whose: str, start: Start, dtype: str = "float32") -> TrainingSAE[Any]:
    """A Matryoshka SAE, sae_lens's (`STOCK`) or this package's (`OURS`), with what `start` has of its weights."""
    sae_class, config_class = FAST[f"fast_{MATRYOSHKA}"] if whose == OURS else get_sae_training_class(MATRYOSHKA)
    sae: TrainingSAE[Any] = sae_class(config_class(**sae_settings(start.size, dtype))).to(start.device)
    sae.load_state_dict(sae.state_dict() | start.state)
    return sae


def _in_sae_lens(
    name: str, whose: str, trainer_class: type[SAETrainer[Any, Any]], note: str = "", compiled: bool = False
) -> Callable[[Start, str], Contestant]:
    def make(start: Start, precision: str) -> Contestant:
        if compiled and torch.device(start.device).type != "cuda":
            raise NotHereError("tried on CUDA only")
        sae = training_sae(whose, start)
        if compiled:  # as sae_lens's runner does it
            sae.training_forward_pass = torch.compile(sae.training_forward_pass)  # type: ignore[method-assign]
        cfg = trainer_config(start.size, start.device, autocast=precision == AUTOCAST)
        trainer = trainer_class(cfg, sae, data_provider=iter(()))
        trainer.n_forward_passes_since_fired.copy_(start.since_fired_f)

        def step(x_nd: torch.Tensor) -> None:
            trainer.step(x_nd)
            trainer.n_training_steps += 1

        return Contestant(name, note, step, list(sae.parameters()))

    return make


def _dictionary_learning(start: Start, precision: str) -> Contestant:
    """`MatryoshkaBatchTopKTrainer.update`: its mean over widths, unit decoder, aux loss relative to the residual."""
    module = _dictionary_learning_module()
    size, W_dec, W_enc, b_enc = start.size, *_folded(start)
    shares = [(width + 0.5) / size.d_sae for width in size.widths[:-1]]  # rounded down, they are the widths
    shares = [b - a for a, b in zip([0.0, *shares], shares, strict=False)]
    groups = [b - a for a, b in zip((0, *size.widths), size.widths, strict=False)]
    with torch.random.fork_rng(devices=[]):
        trainer: Any = module.MatryoshkaBatchTopKTrainer(
            steps=2**20, activation_dim=size.d_in, dict_size=size.d_sae, k=size.k, layer=0, lm_name="",
            group_fractions=[*shares, 1 - sum(shares)], lr=3e-4, warmup_steps=0, threshold_start_step=0,
            device=start.device,
        )  # fmt: skip
    assert trainer.group_sizes == groups
    state = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": start.state["b_dec"]}
    trainer.ae.load_state_dict(trainer.ae.state_dict() | state)
    tokens_since_fired = torch.where(start.dead_f, trainer.dead_feature_threshold, 0)
    device_type = torch.device(start.device).type

    def step(x_nd: torch.Tensor) -> None:
        trainer.num_tokens_since_fired.copy_(tokens_since_fired)
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == AUTOCAST):
            trainer.update(1, x_nd)

    return Contestant(DICTIONARY_LEARNING, "decoder kept at norm 1", step, list(trainer.ae.parameters()))


def _sparsify(start: Start, precision: str) -> Contestant:
    """`SparseCoder` as its `Trainer` uses it with Adam: k latents on each token, one width, nothing clipped."""
    on_gpu = torch.device(start.device).type == "cuda"
    if on_gpu and precision != AUTOCAST:
        raise NotHereError("its forward pass is under bf16 autocast always")
    sparsify = _sparsify_module(on_gpu)
    size, W_dec, W_enc, b_enc = start.size, *_folded(start)
    coder = sparsify.SparseCoder(size.d_in, sparsify.SparseCoderConfig(num_latents=size.d_sae, k=size.k), start.device)
    coder.load_state_dict(
        {"encoder.weight": W_enc.T, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": start.state["b_dec"]}
    )
    optimizer = torch.optim.Adam(coder.parameters(), lr=3e-4)
    dead_f = start.dead_f if bool(start.dead_f.any()) else None
    tokens_since_fired = torch.zeros(size.d_sae, dtype=torch.long, device=start.device)

    def step(x_nd: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == AUTOCAST and not on_gpu):
            output = coder(x_nd, dead_mask=dead_f)
        fired_f = torch.zeros_like(tokens_since_fired, dtype=torch.bool)
        fired_f[output.latent_indices.flatten()] = True
        tokens_since_fired.add_(len(x_nd)).masked_fill_(fired_f, 0)
        (output.fvu + _AUX * output.auxk_loss).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(SPARSIFY, "another loss: TopK, one width, no clipping", step, list(coder.parameters()))


CONTESTANTS: dict[str, Callable[[Start, str], Contestant]] = {
    STOCK: _in_sae_lens(STOCK, STOCK, SAETrainer),
    COMPILED: _in_sae_lens(COMPILED, STOCK, SAETrainer, compiled=True),
    OURS: _in_sae_lens(OURS, OURS, SparseTrainer),
    OURS_IN_STOCK: _in_sae_lens(OURS_IN_STOCK, OURS, SAETrainer, note="only the SAE's class changed"),
    DICTIONARY_LEARNING: _dictionary_learning,
    SPARSIFY: _sparsify,
}
"""By name: what makes each of them at a precision."""


@contextlib.contextmanager
def here_or_named(name: str) -> Iterator[None]:
    """Around what a contestant does: `NotHereError` for whatever stops another library's on this machine."""
    try:
        yield
    except NotHereError:
        raise
    except Exception as e:
        if name in (STOCK, OURS, OURS_IN_STOCK):
            raise
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise NotHereError(f"does not run here: {reason}") from e


def _folded(start: Start) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W_dec with rows of norm 1, and W_enc and b_enc with these norms folded in."""
    norm_f = start.state["W_dec"].norm(dim=1)
    return start.state["W_dec"] / norm_f[:, None], start.state["W_enc"] * norm_f, start.state["b_enc"] * norm_f


def _dictionary_learning_module() -> Any:
    """Its trainer; the package's buffer imports nnsight, a model server that a training step has no use for."""
    if importlib.util.find_spec("dictionary_learning") is None:
        raise NotHereError("not installed")
    with contextlib.ExitStack() as stack:
        if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
            stand_in: Any = types.ModuleType("nnsight")
            stand_in.LanguageModel = object
            sys.modules["nnsight"] = stand_in
            stack.callback(sys.modules.pop, "nnsight")
        return importlib.import_module("dictionary_learning.trainers.matryoshka_batch_top_k")


def _sparsify_module(on_gpu: bool) -> Any:
    """sparsify; on a CPU without its Triton decoder, which it would take wherever Triton is installed."""
    if importlib.util.find_spec("sparsify") is None:
        raise NotHereError("not installed")
    with _environment("SPARSIFY_DISABLE_TRITON", "0" if on_gpu else "1"), contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module("sparsify")


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
