"""What a training step costs here, and in sae_lens, dictionary_learning and sparsify, on the same batches in one run.

For each device: memory, accuracy and the quality of whole runs once; then, for each number of threads, the machine's
ceilings, selection alone, and a race for each precision with all latents alive and with half of them dead. A step is
all that a trainer does with a batch: forward, backward, clipping, Adam, its statistics. In each round the contestants
take the same new batch in an order drawn anew, with the encoder's product and a large copy among them, so that a
machine's drift falls on all alike; ratios are medians over rounds, with quartiles. `targets.py` makes the tables of
what comes out.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from sae_lens_gemma4.bench.accuracy import Accuracy, accuracy
from sae_lens_gemma4.bench.ceilings import Ceilings, ceilings, copy, product, roofline
from sae_lens_gemma4.bench.contestants import (
    CONTESTANTS,
    OURS,
    PRECISIONS,
    Contestant,
    NotHereError,
    here_or_named,
)
from sae_lens_gemma4.bench.data import Batches, Size, Start, warmed_up
from sae_lens_gemma4.bench.machine import device_kind, device_name, package_versions
from sae_lens_gemma4.bench.memory import Memory, memory
from sae_lens_gemma4.bench.quality import Quality, bench_quality
from sae_lens_gemma4.bench.racing import race, ratio
from sae_lens_gemma4.bench.selection import SelectionBench, bench_selection
from sae_lens_gemma4.errors import ConfigError, check_name

_DEFAULT = "float32"


@dataclass(frozen=True)
class Entry:
    """A contestant's times in one race.

    Attributes:
        seconds: of a step, the median of rounds, and its quartiles.
        by_ours: its time as a multiple of ours, the median of the ratios within rounds, and their quartiles.
    """

    name: str
    note: str
    seconds: float
    seconds_quartiles: tuple[float, float]
    by_ours: float
    by_ours_quartiles: tuple[float, float]


@dataclass(frozen=True)
class StepRace:
    """One race.

    Attributes:
        missing: contestants that did not run, with the reason.
        roofline_seconds: see `ceilings.py`; None with dead latents, whose work it does not count.
        ours_by_roofline: our time as a multiple of it, and quartiles.
    """

    precision: str
    dead: bool
    entries: list[Entry]
    missing: dict[str, str]
    roofline_seconds: float | None
    ours_by_roofline: float | None
    ours_by_roofline_quartiles: tuple[float, float] | None


@dataclass(frozen=True)
class Threads:
    """What was measured with one number of threads."""

    threads: int
    ceilings: Ceilings
    selection: SelectionBench
    races: list[StepRace]


@dataclass(frozen=True)
class DeviceBench:
    """One device.

    Attributes:
        kind: "cpu" or "cuda".
        name: of the processor, as it calls itself.
        memory, accuracy: with all latents alive, and with half of them dead.
        quality: of whole runs on the embedded pair, one for each seed.
    """

    kind: str
    name: str
    size: Size
    rounds: int
    warm_steps: int
    versions: dict[str, str]
    memory: list[Memory]
    accuracy: list[Accuracy]
    quality: list[Quality]
    runs: list[Threads]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_step(
    size: Size,
    device: str,
    threads: Sequence[int] | None = None,
    precisions: Sequence[str] | None = None,
    contestants: Sequence[str] | None = None,
    rounds: int = 9,
    warm_steps: int = 20,
    whole_runs: int = 3,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> DeviceBench:
    """Measure one device.

    Args:
        threads: numbers of torch's threads, one after the other; what torch has, if None.
        precisions: of `PRECISIONS`; all of the device's, if None.
        contestants: names of `CONTESTANTS`; this package is always among them. All, if None.
        rounds: of each race.
        warm_steps: of sae_lens's trainer, before anything is measured.
        whole_runs: on the embedded pair, for quality.
        say: is told what is being done.

    Raises:
        UnknownNameError: a precision or a contestant that does not exist.
        ConfigError: numbers that make no sense, or a device that is not there.
    """
    kind = device_kind(device)
    for precision in precisions or ():
        check_name(f"precision on {kind}", precision, PRECISIONS[kind])
    for name in contestants or ():
        check_name("contestant", name, CONTESTANTS)
    threads = list(threads or [torch.get_num_threads()])
    if rounds < 1 or warm_steps < 1 or min(threads) < 1:
        raise ConfigError("rounds, warm_steps and threads must be at least 1.")
    names = [name for name in CONTESTANTS if contestants is None or name in (*contestants, OURS)]
    batches = Batches(size, device, seed)
    with _threads(threads[-1]), _imports_at_rest():
        say(f"{kind}: {warm_steps} steps of sae_lens to begin with")
        alive = warmed_up(size, device, batches, warm_steps)
        dead = alive.half_dead(batches[0], seed)
        say(f"{kind}: memory and accuracy")
        weighed = [row for start in (alive, dead) for row in _memory(names, start, batches[0], start is dead)]
        exact = [accuracy(start, batches, warm_steps, dead=start is dead) for start in (alive, dead)]
        say(f"{kind}: {whole_runs} whole runs on the embedded pair, either way")
        quality = bench_quality(whole_runs, device)
        runs = []
        for number in threads:
            torch.set_num_threads(number)
            say(f"{kind}: ceilings and selection, {number} threads")
            tops = ceilings(size.batch, size.d_in, size.d_sae, device, min(rounds, 5), seed)
            selection = bench_selection(alive, batches, warm_steps, rounds, tops.fastest, seed)
            races = []
            for precision in precisions or PRECISIONS[kind]:
                for start in (alive, dead):
                    say(f"{kind}: steps, {precision}, {'half dead' if start is dead else 'all alive'}")
                    races.append(_race(names, start, precision, batches, warm_steps, rounds, tops.fastest, seed))
            runs.append(Threads(number, tops, selection, races))
    versions = package_versions()
    return DeviceBench(kind, device_name(kind), size, rounds, warm_steps, versions, weighed, exact, quality, runs)


def _memory(names: list[str], start: Start, x_nd: torch.Tensor, dead: bool) -> list[Memory]:
    """Of those that run; who does not is named with the races."""
    rows = []
    for name in names:
        make = partial(CONTESTANTS[name], start, _DEFAULT)
        with contextlib.suppress(NotHereError), here_or_named(name), _precision(_DEFAULT):
            rows.append(memory(make, x_nd, start.device, dead=dead))
        _free()
    return rows


def _race(
    names: list[str],
    start: Start,
    precision: str,
    batches: Batches,
    first: int,
    rounds: int,
    fastest: str,
    seed: int,
) -> StepRace:
    size, device, dead = start.size, start.device, bool(start.dead_f.any())
    made: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    with _precision(precision):
        for name in names:
            try:
                made[name] = _after_a_step(name, start, precision, batches[first])
            except NotHereError as e:
                missing[name] = str(e)
        for number in range(rounds + 1):
            batches[first + number]  # drawn before anything is timed
        runners: dict[str, Callable[[], None]] = {name: _turns(one, batches, first) for name, one in made.items()}
        if not dead:
            runners["product"] = product(size.batch, size.d_in, size.d_sae, device, fastest)
            runners["copy"] = copy(device)
        times = {name: spent[1:] for name, spent in race(runners, rounds + 1, device, seed).items()}
    ours = times[OURS]
    entries = [
        Entry(one.name, one.note, *_spread(times[name]), *ratio(times[name], ours)) for name, one in made.items()
    ]
    made.clear()
    runners.clear()
    _free()
    if dead:
        return StepRace(precision, dead, entries, missing, None, None, None)
    sums = roofline(size.batch, size.d_in, size.d_sae, device, times["product"], times["copy"])
    return StepRace(precision, dead, entries, missing, statistics.median(sums), *ratio(ours, sums))


def _after_a_step(name: str, start: Start, precision: str, x_nd: torch.Tensor) -> Contestant:
    with here_or_named(name):
        made = CONTESTANTS[name](start, precision)
        made.step(x_nd)
        return made


def _turns(runner: Contestant, batches: Batches, first: int) -> Callable[[], None]:
    """Each call is a step on the next batch."""
    numbers = iter(range(first, 2**62))

    def step() -> None:
        with torch.enable_grad():
            runner.step(batches[next(numbers)])

    return step


def _spread(seconds: list[float]) -> tuple[float, tuple[float, float]]:
    return ratio(seconds, [1.0] * len(seconds))


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    """float32 products in full, or in TF32; autocast is the contestants' own."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _imports_at_rest() -> Iterator[None]:
    """What was there before is not gone through whenever garbage is collected."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
