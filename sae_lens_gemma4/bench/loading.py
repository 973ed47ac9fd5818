"""What loading costs, form by form: speed against safetensors' own load of the same bytes, and peak memory.

A checkpoint of each form is written as its authors' code writes it, and loaded in a process of its own, so that the
peak is that load's alone. Both sides end with every byte touched: safetensors maps a file and reads nothing until then.
Pairs of loads are timed in one run, each side first in turn, so that a machine's drift falls on both; a ratio is the
median over pairs. Loading reads every byte by itself, to find entries that are not finite, so two ratios are
given: `ratio` has our caller touch them again, `ready_ratio` stops when `SAE.load_from_disk` returns.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from sae_lens_gemma4.catalogue.converter import converter
from sae_lens_gemma4.errors import ConfigError, SAEError, check_name

SPEED_TARGET = 0.8
"""The least ratio that a form is to reach which does not transpose."""
PEAK_TARGETS = {False: 1.3, True: 2.2}
"""The most memory in units of the weights, by whether a form transposes."""

K = 32


@dataclass(frozen=True)
class Layout:
    """How one form lies on disk."""

    form: str
    file: str
    tensors: Mapping[str, str]
    """Key and shape of W_enc, W_dec, b_enc and b_dec, in this order, and of further float tensors."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """What else is in the file."""
    config: tuple[str, Mapping[str, Any]] | None = None
    """The config file; `d_in` and `d_sae` stand for their values."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the caller must state."""
    nested: str | None = None
    """The key of the state dict, where it is not the whole file."""

    @property
    def transposes(self) -> bool:
        return list(self.tensors.values())[:2] != list(_PARAMETERS.values())[:2]


def _linears(encoder: str, decoder: str, bias: str) -> dict[str, str]:
    weights = {f"{encoder}.weight": "d_sae d_in", f"{decoder}.weight": "d_in d_sae"}
    return weights | {f"{encoder}.bias": "d_sae", bias: "d_in"}


_PARAMETERS = {"W_enc": "d_in d_sae", "W_dec": "d_sae d_in", "b_enc": "d_sae", "b_dec": "d_in"}
_SPARSIFY = {"encoder.weight": "d_sae d_in", "W_dec": "d_sae d_in", "encoder.bias": "d_sae", "b_dec": "d_in"}
_NORMALISED = {
    "sae.encoder.weight": "d_sae d_in", "sae.decoder.weight": "d_in d_sae", "sae.encoder.bias": "d_sae",
    "sae.decoder_bias": "d_in", "normalization.activation_mean": "d_in",
}  # fmt: skip
_CFG = {
    "architecture": "jumprelu", "d_in": "d_in", "d_sae": "d_sae", "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": {"sae_lens_version": "6.54.0"},
}  # fmt: skip
_K = {"k": K}
_RUNNING = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.5)}
_SCALE = {"sae.inference_threshold": torch.tensor(0.5), "normalization.activation_scale": torch.tensor([2.75])}
_STATED = {"k": K, "apply_b_dec_to_input": True}

LAYOUTS = {
    "sae_lens": Layout(
        "sae_lens", "sae_weights.safetensors", _PARAMETERS | {"threshold": "d_sae"}, config=("cfg.json", _CFG)),
    "plain, .pt": Layout("plain", "sae_final.pt", _PARAMETERS, _K, facts=_STATED),
    "plain, .safetensors": Layout("plain", "sae_final.safetensors", _PARAMETERS, facts=_STATED),
    "dictionary_learning_matryoshka": Layout(
        "dictionary_learning_matryoshka", "ae.pt", _PARAMETERS, _RUNNING | {"group_sizes": torch.tensor([8, 8])},
        ("config.json", {"trainer": {"dict_class": "MatryoshkaBatchTopKSAE", "k": K}})),
    "sparsify": Layout(
        "sparsify", "sae.safetensors", _SPARSIFY,
        config=("cfg.json", {"activation": "topk", "d_in": "d_in", "num_latents": "d_sae", "k": K})),
    "dictionary_learning": Layout(
        "dictionary_learning", "ae.pt", _linears("encoder", "decoder", "b_dec"), _RUNNING,
        ("config.json", {"trainer": {"dict_class": "BatchTopKSAE", "k": K}})),
    "linear": Layout("linear", "sae.pt", _linears("W_enc", "W_dec", "W_dec.bias"), facts=_K),
    "linear_b_dec": Layout("linear_b_dec", "sae.pt", _linears("W_enc", "W_dec", "b_dec"), facts=_STATED),
    "linear_encoder": Layout(
        "linear_encoder", "sae.pt", _linears("encoder", "decoder", "decoder.bias"), facts=_K, nested="state_dict"),
    "log_threshold": Layout(
        "log_threshold", "sae.pt", _linears("W_enc", "W_dec", "b_dec") | {"log_threshold": "d_sae"},
        config=("meta.json", {"layer": 0, "k": K})),
    "normalised": Layout(
        "normalised", "sae_weights.safetensors", _NORMALISED, _SCALE, ("sae_config.json", {"k": K})),
    "ernos, the code's keys": Layout(
        "ernos", "gemma4_sae_1m.safetensors",
        {"W_enc": "d_sae d_in", "W_dec": "d_in d_sae", "b_enc": "d_sae", "b_dec": "d_in"}),
    "ernos, the card's keys": Layout(
        "ernos", "gemma4_sae_1m.safetensors", _linears("encoder", "decoder", "decoder.bias")),
}  # fmt: skip
"""Every form as its files lie; those that need no transposing first."""


@dataclass(frozen=True)
class LoadingCost:
    """One layout's cost. Times are medians, in seconds; `peak` is in units of the weights, None where not known."""

    layout: str
    transposes: bool
    weights_bytes: int
    touch: str
    repeats: int
    threads: int
    seconds: float
    """Of our load and touching every byte."""
    ready_seconds: float
    """Of our load alone."""
    reference_seconds: float
    """Of safetensors' load and touching every byte."""
    ratio: float
    ratio_quartiles: tuple[float, float]
    ready_ratio: float
    ready_ratio_quartiles: tuple[float, float]
    peak: float | None
    peak_target: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_loading(
    d_sae: int = 65536,
    d_in: int = 2560,
    repeats: int = 7,
    layouts: Sequence[str] | None = None,
    touch: str = "read",
    folder: Path | None = None,
) -> Iterator[LoadingCost]:
    """Measure layout after layout; each one's files are gone before its result comes.

    Args:
        layouts: names from `LAYOUTS`; all if None.
        touch: "read" sums every tensor, as inference reads it; "write" flips its bits in place, as training writes it.
        folder: where the temporary files go; the system's folder for them if None.

    Raises:
        ConfigError: sizes that make no checkpoint, or no room for the files.
        SAEError: a load failed.
    """
    if d_sae < K or d_in < 1 or d_sae == d_in or repeats < 1:
        raise ConfigError(f"d_sae must be at least {K} and not d_in, d_in and repeats at least 1.")
    check_name("touch", touch, TOUCHES)
    for name in layouts or ():
        check_name("layout", name, LAYOUTS)
    needed, free = 16 * d_sae * d_in, shutil.disk_usage(folder or tempfile.gettempdir()).free
    if needed > free:
        raise ConfigError(f"The files need {needed / 1e9:.1f} GB; there are {free / 1e9:.1f} GB left.")
    for name in layouts or LAYOUTS:
        layout = LAYOUTS[name]
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            path, reference = Path(temporary, "layers.0"), Path(temporary, "reference.safetensors")
            written = write(layout, path, d_sae, d_in)
            if layout.file.endswith(".safetensors"):
                reference = path / layout.file
            else:
                save_file({key: written[key] for key in layout.tensors}, reference)
                _settle(reference)
            weights_bytes = sum(written[key].nbytes for key in layout.tensors)
            del written
            measured = _in_a_process(str(path), layout.form, dict(layout.facts), str(reference), repeats, touch)
        yield _cost(name, layout, weights_bytes, touch, measured)


def write(layout: Layout, folder: Path, d_sae: int, d_in: int, seed: int = 0) -> dict[str, Any]:
    """A random checkpoint in that layout. Returns what is in it, by key."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"d_in": d_in, "d_sae": d_sae}
    generator = torch.Generator().manual_seed(seed)
    content: dict[str, Any] = {
        key: torch.empty([sizes[axis] for axis in shape.split()]).uniform_(-1, 1, generator=generator)
        for key, shape in layout.tensors.items()
    }
    content.update(layout.beside)
    path = folder / layout.file
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save({layout.nested: content} if layout.nested else content, path)
    _settle(path)
    if layout.config is not None:
        name, stated = layout.config
        config = {key: sizes.get(value, value) if isinstance(value, str) else value for key, value in stated.items()}
        (folder / name).write_text(json.dumps(config))
    return content


def _settle(path: Path) -> None:
    """Wait until the file is on disk: writing it back would otherwise go on while loads are timed."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _read(tensor: torch.Tensor) -> None:
    tensor.sum().item()


def _write(tensor: torch.Tensor) -> None:
    tensor.view(-1).view(torch.uint8).bitwise_not_()


TOUCHES: dict[str, Callable[[torch.Tensor], None]] = {"read": _read, "write": _write}


def _in_a_process(*arguments: Any) -> dict[str, Any]:
    """What `measure` returns of these arguments, from a fresh process."""
    program = "from sae_lens_gemma4.bench import loading; loading._child()"
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SAEError(f"Loading a checkpoint of form {arguments[1]} failed: {reason}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _child() -> None:
    warnings.simplefilter("ignore")
    print(json.dumps(measure(*json.loads(sys.argv[1]))))


def measure(
    path: str, form: str, facts: dict[str, Any], reference: str, repeats: int, touch: str = "read"
) -> dict[str, Any]:
    """Our peak and both sides' seconds, in this process.

    The peak is taken of a load before the timed ones, which warms the page cache and imports what is imported late.
    """
    convert: Any = converter(form, **facts)
    gc.freeze()  # what was imported is then not gone through while a load is timed

    def ours() -> list[torch.Tensor]:
        return [p.detach() for p in SAE.load_from_disk(path, converter=convert).parameters()]

    def theirs() -> list[torch.Tensor]:
        return list(load_file(reference).values())

    sides = {"ours": ours, "reference": theirs}
    peak = _peak(ours, TOUCHES[touch])
    _timed(theirs, TOUCHES[touch])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for n in range(repeats):
        for name in list(sides)[:: 1 if n % 2 else -1]:
            times[name].append(_timed(sides[name], TOUCHES[touch]))
    gc.unfreeze()
    return {"peak": peak, "times": times, "threads": torch.get_num_threads()}


def _timed(load: Callable[[], list[torch.Tensor]], touch: Callable[[torch.Tensor], None]) -> tuple[float, float]:
    """Seconds until the load returns, and until every byte is touched."""
    gc.collect()  # what went before is unmapped outside of the measurement
    start = time.perf_counter()
    tensors = load()
    ready = time.perf_counter()
    for tensor in tensors:
        touch(tensor)
    return ready - start, time.perf_counter() - start


def _peak(load: Callable[[], list[torch.Tensor]], touch: Callable[[torch.Tensor], None]) -> int | None:
    """Bytes by which the resident set grew at most, mapped pages of files among them; Linux alone tells."""
    gc.collect()
    with suppress(OSError):  # not allowed everywhere; a process's first load has its peak right even so
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    for tensor in load():
        touch(tensor)
    after = _resident("VmHWM")
    return None if before is None or after is None else after - before


def _resident(name: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = (line.split() for line in status.splitlines() if line.startswith(f"{name}:"))
    return next((1024 * int(words[1]) for words in found), None)


def _cost(name: str, layout: Layout, weights_bytes: int, touch: str, measured: Mapping[str, Any]) -> LoadingCost:
    ours, reference = measured["times"]["ours"], measured["times"]["reference"]
    ratio, ratio_quartiles = _spread([r[1] / o[1] for o, r in zip(ours, reference, strict=True)])
    ready_ratio, ready_ratio_quartiles = _spread([r[1] / o[0] for o, r in zip(ours, reference, strict=True)])
    return LoadingCost(
        layout=name,
        transposes=layout.transposes,
        weights_bytes=weights_bytes,
        touch=touch,
        repeats=len(ours),
        threads=measured["threads"],
        seconds=statistics.median(total for _, total in ours),
        ready_seconds=statistics.median(ready for ready, _ in ours),
        reference_seconds=statistics.median(total for _, total in reference),
        ratio=ratio,
        ratio_quartiles=ratio_quartiles,
        ready_ratio=ready_ratio,
        ready_ratio_quartiles=ready_ratio_quartiles,
        peak=None if measured["peak"] is None else measured["peak"] / weights_bytes,
        peak_target=PEAK_TARGETS[layout.transposes],
    )


def _spread(ratios: list[float]) -> tuple[float, tuple[float, float]]:
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return median, (low, high)
