"""What the benches of the training step have in common: sizes, inputs, and one SAE that all contestants start from.

What a sparse step costs depends on how activations are spread over tokens and latents. So inputs are made as SAEs take
activations to be: a mean, noise, and a few of d_sae directions a token, the first ones far more often than the last.
Each step's are drawn anew. The SAE begins at these directions and is warmed up by sae_lens's own trainer, so that its
running threshold means something; tokens then have from a few to a few times k latents. Half of the latents can be
made dead: their bias is lowered until they do not fire.

Shapes: `n` tokens of a batch, `d` d_in, `f` latents.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from sae_lens import LoggingConfig, MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_gemma4.errors import ConfigError, check_name

DEAD_WINDOW = 1000
"""Steps without firing after which a latent is dead, in every bench."""
_WARM_RATE = 0.2
"""Of the running threshold while warming up: twenty steps bring it within 1.2 % of where it goes."""
_GAIN = 0.4
"""Norm of the decoder's rows at first: latents overlap, and each of them has to explain less than it reads."""


@dataclass(frozen=True)
class Size:
    """Of an SAE and its batches.

    Attributes:
        batch: tokens of a step.
        k: latents a token, on average over a batch.
        widths: of the nested dictionaries; the last is d_sae.

    Raises:
        ConfigError: no SAE has these.
    """

    d_in: int
    d_sae: int
    batch: int
    k: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0, *self.widths), self.widths, strict=False))
        if min(self.d_in, self.batch, self.k) < 1 or not self.k < self.d_sae:
            raise ConfigError("d_in, batch and k must be positive, and k less than d_sae.")
        if not self.widths or not rising or self.widths[-1] != self.d_sae:
            raise ConfigError(f"widths must rise to d_sae = {self.d_sae}, not {list(self.widths)}.")

    def __str__(self) -> str:
        widths = ", ".join(map(str, self.widths))
        return f"d_in {self.d_in}, d_sae {self.d_sae} (widths {widths}), batch {self.batch}, k {self.k}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SIZES = {
    "cpu": Size(256, 8192, 1024, 32, (512, 2048, 4096, 8192)),
    "seed": Size(2560, 65536, 4096, 100, (2048, 16384, 65536)),
}
"""By the names that the command line has for them."""
USUAL = {"cpu": "cpu", "cuda": "seed"}
"""The size that is measured on a kind of device unless another is asked for."""


def size(name: str, **changed: Any) -> Size:
    """A size by name, with what is changed and not None; `widths` scale with `d_sae` unless they are changed too.

    Raises:
        UnknownNameError: there is no size of this name.
        ConfigError: no SAE has these.
    """
    base = SIZES[check_name("size", name, SIZES)]
    changed = {key: value for key, value in changed.items() if value is not None}
    if "d_sae" in changed and "widths" not in changed:
        widths = (width * changed["d_sae"] // base.d_sae for width in base.widths)
        changed["widths"] = tuple(sorted({max(1, width) for width in widths}))
    return replace(base, **changed)


class Batches:
    """Inputs of any number of steps, `[n, d]` float32, kept once drawn.

    Attributes:
        directions_fd: of norm 1, the most frequent first.
        mean_d: of all inputs, about.
    """

    def __init__(self, size: Size, device: str, seed: int) -> None:
        self._size, self._generator = size, torch.Generator(device).manual_seed(seed)
        self.mean_d = self._normal(size.d_in)
        directions_fd = self._normal(size.d_sae, size.d_in)
        self.directions_fd = directions_fd / directions_fd.norm(dim=1, keepdim=True)
        self._frequency_f = (torch.arange(size.d_sae, device=device) + size.k) ** -0.7
        self._drawn: list[torch.Tensor] = []

    def __getitem__(self, number: int) -> torch.Tensor:
        while len(self._drawn) <= number:
            shape_nk = self._size.batch, max(1, self._size.k // 2)
            chosen = torch.multinomial(self._frequency_f, shape_nk[0] * shape_nk[1], True, generator=self._generator)
            size_nk = 1 + self._normal(*shape_nk).abs()
            signal_nd = torch.nn.functional.embedding_bag(
                chosen.view(shape_nk), self.directions_fd, mode="sum", per_sample_weights=size_nk
            )
            self._drawn.append(self.mean_d + signal_nd + 0.05 * self._normal(*signal_nd.shape))
        return self._drawn[number]

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._generator.device)


@dataclass(frozen=True)
class Start:
    """Where every contestant begins.

    Attributes:
        state: sae_lens's own names; the running threshold among them.
        since_fired_f: steps since a latent fired, at first; beyond `DEAD_WINDOW` for dead ones.
    """

    size: Size
    device: str
    state: dict[str, torch.Tensor]
    since_fired_f: torch.Tensor

    @property
    def dead_f(self) -> torch.Tensor:
        return self.since_fired_f > DEAD_WINDOW

    @torch.no_grad()
    def half_dead(self, x_nd: torch.Tensor, seed: int) -> Start:
        """The same with half of the latents, drawn from all widths, so low that none is above 0 on `x_nd`."""
        f = self.size.d_sae
        chosen = torch.randperm(f, generator=torch.Generator().manual_seed(seed))[: f // 2].to(self.device)
        W_enc_dc, b_enc_f = self.state["W_enc"][:, chosen], self.state["b_enc"].clone()
        centred_nd = x_nd - self.state["b_dec"]
        largest_c = torch.stack([(x_cd @ W_enc_dc).amax(dim=0) for x_cd in centred_nd.split(256)]).amax(dim=0)
        b_enc_f[chosen] = -largest_c
        since_fired_f = self.since_fired_f.clone()
        since_fired_f[chosen] = 1e6
        return replace(self, state=self.state | {"b_enc": b_enc_f}, since_fired_f=since_fired_f)


def sae_settings(size: Size, dtype: str = "float32") -> dict[str, Any]:
    """What the SAE's config says, for sae_lens's class and for those that take its place."""
    return {
        "d_in": size.d_in,
        "d_sae": size.d_sae,
        "dtype": dtype,
        "k": size.k,
        "matryoshka_widths": list(size.widths),
        "apply_b_dec_to_input": True,
    }


def trainer_config(size: Size, device: str, *, autocast: bool = False, lr: float = 3e-4) -> SAETrainerConfig:
    """Constant rate, no log, no checkpoint."""
    return SAETrainerConfig(
        total_training_samples=2**20 * size.batch,
        train_batch_size_samples=size.batch,
        device=device,
        lr=lr,
        lr_end=lr,
        lr_scheduler_name="constant",
        dead_feature_window=DEAD_WINDOW,
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )


def warmed_up(size: Size, device: str, batches: Batches, steps: int) -> Start:
    """sae_lens's own SAE after `steps` of its own trainer, from the directions that the inputs are made of."""
    cfg = MatryoshkaBatchTopKTrainingSAEConfig(**sae_settings(size), topk_threshold_lr=_WARM_RATE)
    sae = MatryoshkaBatchTopKTrainingSAE(cfg).to(device)
    weights = {"W_enc": batches.directions_fd.T, "W_dec": _GAIN * batches.directions_fd, "b_dec": batches.mean_d}
    sae.load_state_dict(sae.state_dict() | weights)
    trainer: SAETrainer[Any, Any] = SAETrainer(trainer_config(size, device), sae, data_provider=iter(()))
    for number in range(steps):
        trainer.step(batches[number])
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    return Start(size, device, state, torch.zeros(size.d_sae, device=device))
