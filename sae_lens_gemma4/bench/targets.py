"""What the training step has to reach, as data, and the tables that say whether it does.

Tables are made of the JSON that the benches write, and of nothing else, so the command line and docs/performance.md
say the same. A column is a device and its number of threads; a device that no JSON has is said not to be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sae_lens_gemma4.bench.contestants import AUTOCAST, COMPILED, OURS, STOCK

Json = Mapping[str, Any]
GPU = "GPU"


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        work: what is measured, in words.
        figure: its name among `figures`.
        least: whether the limits are the least (True) or the most that is to be reached.
        limits: by column.
    """

    work: str
    figure: str
    least: bool
    limits: Mapping[str, float]


ONE, TWO = "CPU, 1 thread", "CPU, 2 threads"
TARGETS = (
    Target("full step", "step float32", True, {ONE: 10, TWO: 7, GPU: 5}),
    Target("the same, TF32", "step tf32", True, {GPU: 5}),
    Target("the same, bf16 autocast", f"step {AUTOCAST}", True, {GPU: 5}),
    Target("full step, as both come", "step as it comes", True, {GPU: 12}),
    Target("full step, by the roofline sum", "roofline", False, {GPU: 1.6}),
    Target("half of the latents dead", "half dead", True, {ONE: 7, TWO: 5, GPU: 4}),
    Target("peak memory above weights, gradients, Adam", "memory", False, {ONE: 0.3, TWO: 0.3, GPU: 0.3}),
    Target("selection alone, by torch.topk and scatter", "selection", True, {ONE: 4, TWO: 4, GPU: 5}),
    Target("loss, relative to sae_lens's", "loss", False, {ONE: 1e-6, TWO: 1e-6, GPU: 1e-5}),
    Target("gradients, the same", "gradients", False, {ONE: 1e-6, TWO: 1e-6, GPU: 1e-5}),
    Target("held-out VE after a whole run, apart from sae_lens's", "quality", False, {ONE: 0.002, TWO: 0.002}),
    Target("end to end, tokens a second", "tokens a second", True, {GPU: 35_000}),
)  # fmt: skip
"""In the order of the table. Loss and gradients pass as well where they are no farther from float64 than sae_lens's."""


class Figure(NamedTuple):
    """What came out.

    Attributes:
        quartiles: of rounds; None for what was not measured in rounds.
        excused: whether it passes whatever the limit.
    """

    value: float
    quartiles: tuple[float, float] | None = None
    excused: bool = False


def table(devices: Iterable[Json], trains: Iterable[Json] = ()) -> list[list[str]]:
    """The targets and what was reached, as rows of cells; the first row is the head.

    Args:
        devices: results of `bench step`, one each.
        trains: results of `bench train`.
    """
    columns: dict[str, dict[str, Figure]] = {}
    for device in devices:
        for run in device["runs"]:
            columns[column(device["kind"], run["threads"])] = figures(device, run)
    for train in trains:
        speed = Figure(train["tokens_per_second"])
        columns.setdefault(column(train["kind"], train["threads"]), {})["tokens a second"] = speed
    columns = {**{name: found for name, found in columns.items() if name != GPU}, GPU: columns.get(GPU, {})}
    rows = [["work", *(cell for name in columns for cell in (name, "target"))]]
    for target in TARGETS:
        cells = [cell for name, found in columns.items() for cell in _cells(target, name, found)]
        rows.append([target.work, *cells])
    return rows


def figures(device: Json, run: Json) -> dict[str, Figure]:
    """The figures of one device with one number of threads; those that were not measured are left out."""
    found: dict[str, Figure] = {}
    for race in run["races"]:
        stock = {e["name"]: e for e in race["entries"] if e["name"] in (STOCK, COMPILED)}
        if not stock:
            continue
        best = min(stock.values(), key=lambda entry: entry["seconds"])
        if not race["dead"]:
            found[f"step {race['precision']}"] = _ratio(best)
        if race["precision"] == "float32":
            found["half dead" if race["dead"] else "step as it comes"] = _ratio(best if race["dead"] else stock[STOCK])
            if not race["dead"]:
                found["roofline"] = Figure(race["ours_by_roofline"], tuple(race["ours_by_roofline_quartiles"]))
    peak = {row["name"]: row["peak_bytes"] for row in device["memory"] if not row["dead"]}
    if STOCK in peak:
        found["memory"] = Figure(peak[OURS] / peak[STOCK])
    if run["selection"]["alone"] is not None:
        found["selection"] = Figure(run["selection"]["alone"])
    if device["quality"]:
        found["quality"] = Figure(max(row["apart"] for row in device["quality"]))
    for name, worst in (("loss", _loss), ("gradients", _gradient)):
        value = max(worst(row["ours_from_stock"]) for row in device["accuracy"])
        near = all(worst(row["ours_from_float64"]) <= worst(row["stock_from_float64"]) for row in device["accuracy"])
        found[name] = Figure(value, excused=near)
    return found


def races(run: Json) -> list[list[str]]:
    """Each contestant's step with one number of threads: milliseconds, and its time as a multiple of ours.

    Rows of cells, the first the head; who did not run has the reason in the time's place.
    """
    rows: dict[str, list[str]] = {}
    for race in run["races"]:
        for entry in race["entries"]:
            low, high = (f"{value:.2f}" for value in entry["by_ours_quartiles"])
            by_ours = "" if entry["name"] == OURS else f": {entry['by_ours']:.2f} ({low}–{high})"
            name = entry["name"] + (f" ({entry['note']})" if entry["note"] else "")
            rows.setdefault(name, []).append(f"{_number(1e3 * entry['seconds'])} ms{by_ours}")
        for name, reason in race["missing"].items():
            rows.setdefault(name, []).append(reason)
    heads = [f"{race['precision']}, {'half dead' if race['dead'] else 'alive'}" for race in run["races"]]
    return [["", *heads], *([name, *cells] for name, cells in rows.items())]


def circumstances(device: Json, run: Json) -> str:
    """What one number of threads could do at best on its machine, and selection with the product, in a sentence."""
    tops, selection = run["ceilings"], run["selection"]
    rates = ", ".join(f"{name} {_number(1e3 * rate)}" for name, rate in tops["product_tflops"].items())
    return (
        f"{column(device['kind'], run['threads'])} ({device['name']}): encoder product {rates} GFLOP/s, copy "
        f"{_number(tops['copy_gbs'])} GB/s. Product, torch.topk and scatter take {_number(selection['whole'])} times "
        "as long as this package's selection with its product."
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table; the first is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def page(devices: Sequence[Json], trains: Sequence[Json]) -> str:
    """All tables as Markdown: targets, then each device and number of threads by itself, then end to end."""
    parts = [markdown(table(devices, trains))]
    for device in devices:
        size, versions = device["size"], ", ".join(f"{name} {v}" for name, v in device["versions"].items())
        for run in device["runs"]:
            parts += [circumstances(device, run), markdown(races(run))]
        parts.append(
            f"d_in {size['d_in']:,}, d_sae {size['d_sae']:,}, widths {', '.join(map(str, size['widths']))}, batch "
            f"{size['batch']:,}, k {size['k']}; {device['rounds']} rounds; {versions}."
        )
        weighed = [["peak MB above weights, gradients, Adam", "alive", "half dead"]]
        for name in dict.fromkeys(row["name"] for row in device["memory"]):
            peaks = (_number(row["peak_bytes"] / 1e6) for row in device["memory"] if row["name"] == name)
            weighed.append([name, *peaks])
        parts.append(markdown(weighed))
    for train in trains:
        low, high = train["by_ours_quartiles"]
        parts.append(
            f"End to end, {train['scene']} on {train['name']}, {train['threads']} threads: "
            f"{_number(train['tokens_per_second'])} tokens/s; of that time harvest alone {train['harvest_share']:.2f}, "
            f"steps alone {train['steps_share']:.2f}; with sae_lens's steps {train['by_ours']:.2f} "
            f"({low:.2f}–{high:.2f}) times as long."
        )
    return "\n\n".join(parts)


def column(kind: str, threads: int) -> str:
    """What a column is called."""
    return GPU if kind == "cuda" else f"CPU, {threads} thread{'s' * (threads != 1)}"


def _cells(target: Target, column: str, found: Mapping[str, Figure]) -> tuple[str, str]:
    """What was reached, and the target."""
    limit = target.limits.get(column)
    wanted = "–" if limit is None else f"{'≥' if target.least else '≤'} {_number(limit)}"
    figure = found.get(target.figure)
    if figure is None:
        return "no GPU here" if column == GPU and not found else "–", wanted
    cell = _number(figure.value)
    if figure.quartiles is not None:
        cell += f" ({_number(figure.quartiles[0])}–{_number(figure.quartiles[1])})"
    if limit is not None:
        reached = figure.excused or (figure.value >= limit if target.least else figure.value <= limit)
        cell += " ✓" if reached else " ✗"
    return cell, wanted


def _ratio(entry: Json) -> Figure:
    return Figure(entry["by_ours"], tuple(entry["by_ours_quartiles"]))


def _loss(difference: Json) -> float:
    return float(difference["loss"])


def _gradient(difference: Json) -> float:
    return max(float(value) for value in difference["gradients"].values())


def _number(value: float) -> str:
    """Three digits, large ones in full."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 0 < value < 1e-3 else f"{value:.3g}"
