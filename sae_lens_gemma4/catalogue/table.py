"""The catalogue as rows and text, for the command line and for docs/releases.md, so that neither can say other things.

Nothing is left out for being unknown: what nobody states is listed as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_gemma4.catalogue import LOADER
from sae_lens_gemma4.catalogue.registry import CAVEATS, SHOWN, Release, SAEEntry, releases
from sae_lens_gemma4.errors import ConfigError, UnknownNameError, nearest
from sae_lens_gemma4.models.hook_names import layer_of

NUMERIC = frozenset({"d_in", "d_sae", "k", "l0", "SAEs", "variance_explained"})
"""Columns to set flush right."""
UNKNOWN = "–"
HINT = (
    "One in full, with sources: sae-lens-gemma4 releases NAME, or docs/releases.md.\n"
    "To load an SAE: import sae_lens, sae_lens_gemma4; sae_lens.SAE.from_pretrained(NAME, SAE_ID)"
)
_BY_PRIORITY = (
    "name", "SAEs", "layers", "d_sae", "k", "model", "caveats", "architecture", "licence", "hook", "l0", "repository",
    "variance_explained", "path",
)  # fmt: skip
_OF_RELEASE = ("model", "architecture", "form", "revision", "weights", "config", "label_schema", "licence")
_OF_SAE = (
    "hook", "d_in", "d_sae", "k", "apply_b_dec_to_input", "encoder", "context_size", "prepend_bos",
    "exclude_special_tokens", "dataset", "variance_explained", "l0", "neuronpedia", "labels",
)  # fmt: skip
_EXPECTED = frozenset(_OF_SAE) - {"encoder", "neuronpedia", "labels"} | {"licence"}
"""Facts whose absence is worth a word."""


@dataclass(frozen=True)
class Grid:
    """A table as data."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def fitting(self, width: int, gap: int) -> Grid:
        """The columns that fit side by side without being wrapped, those that matter most first."""
        widths = [max(map(len, column)) + gap for column in zip(self.columns, *self.rows, strict=True)]
        kept = {0}
        for name in sorted(self.columns, key=lambda c: (*_BY_PRIORITY, c).index(c)):
            wanted = kept | {self.columns.index(name)}
            if sum(widths[i] for i in wanted) <= width:
                kept = wanted
        columns, *rows = (tuple(line[i] for i in sorted(kept)) for line in (self.columns, *self.rows))
        return Grid(columns, tuple(rows))

    def markdown(self) -> str:
        lines = [self.columns, tuple("---:" if c in NUMERIC else "---" for c in self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


@dataclass(frozen=True)
class Fact:
    """One fact of a release, by the catalogue's name for it."""

    name: str
    value: str
    source: str = ""
    """Where it is stated, if not in the release's default source."""


def matching(pattern: str) -> list[Release]:
    """The releases that have each of its words in name, repository, model, licence or kinds of caveats.

    Raises:
        UnknownNameError: there is none; names what is nearest.
    """
    known = releases()
    if pattern in known:
        return [known[pattern]]
    words = {n: (n, r.repo_id, r.model, r.licence or "", *(c.kind for c in r.caveats)) for n, r in known.items()}
    found = [r for n, r in known.items() if all(any(p in w.lower() for w in words[n]) for p in pattern.lower().split())]
    if not found:
        terms = {part for all_ in words.values() for word in all_ for part in (word, *word.split("/"))}
        raise UnknownNameError("release", pattern, terms if nearest(pattern, terms) else known)
    return found


def summary(of: Iterable[Release]) -> Grid:
    """One row a release."""
    columns = (
        "name", "model", "hook", "layers", "architecture", "d_sae", "k", "l0", "SAEs", "repository", "licence",
        "caveats",
    )  # fmt: skip
    return Grid(columns, tuple(_summary_row(release) for release in of))


def _summary_row(release: Release) -> tuple[str, ...]:
    saes = release.saes
    return (
        release.name,
        release.model.rpartition("/")[2],
        " / ".join(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", sae.hook) for sae in saes)),
        _ranges(sae.hook for sae in saes),
        release.architecture,
        _values((sae.d_sae for sae in saes), " / "),
        _values((sae.k for sae in saes), " / "),
        _values((sae.l0 for sae in saes), "–"),
        str(len(saes)),
        release.repo_id,
        re.split(r" \(| with ", release.licence or UNKNOWN)[0],
        ", ".join(dict.fromkeys(c.kind for c in release.caveats)),
    )


def saes(release: Release, compact: bool = False) -> Grid:
    """One row an SAE, with what differs between them; compact, one for those that differ by their layer alone."""
    differing = [name for name in _OF_SAE[1:] if len({repr(getattr(sae, name)) for sae in release.saes}) > 1]
    rows = []
    for entries in _alike(release.saes) if compact else [[sae] for sae in release.saes]:
        layers = _ranges(sae.hook for sae in entries)
        written = [_written(entries, name) for name in (*differing, "folder_name")]
        rows.append((_written(entries, "id"), layers, *written))
    return Grid(("id", "layers", *differing, "path"), tuple(rows))


def facts(release: Release) -> list[Fact]:
    """What is stated of the release and of all its SAEs alike; what differs between them is in `saes`."""
    found = []
    for name in (*_OF_RELEASE, *_OF_SAE):
        if name in _OF_RELEASE:
            stated = [getattr(release, name)]
        elif name == "hook":
            stated = [_written(release.saes, name)]
        else:
            stated = list({repr(v): v for v in (getattr(sae, name) for sae in release.saes)}.values())
        if stated != [None] or name == "form":
            value = shown(stated[0]) if len(stated) == 1 else "by SAE"
            value = "recognised by keys and shapes" if stated == [None] else value
            found.append(Fact(name, value, release.sources.get(name, "")))
    named = {fact.name for fact in found} | {"default"}
    return found + [Fact(name, "by SAE", source) for name, source in release.sources.items() if name not in named]


def not_stated(release: Release) -> list[str]:
    """The facts that nobody states of any of its SAEs."""
    missing = [name for name in _OF_SAE if all(getattr(sae, name) is None for sae in release.saes)]
    return [n for n in missing + ["licence"] * (release.licence is None) if n in _EXPECTED]


def how_to_load(release: Release) -> str:
    first = release.saes[0].id
    return f'import sae_lens, sae_lens_gemma4\n\nsae = sae_lens.SAE.from_pretrained("{release.name}", "{first}")'


def in_words(release: Release) -> str:
    """A release for the console, all but the table of its SAEs."""
    lines = [release.name, release.description.strip(), *([release.url] if release.url else []), ""]
    lines += [how_to_load(release), "", f"Where no other source is named: {release.sources['default']}."]
    lines += [f"  {f.name}: {f.value}" + (f" ({f.source})" if f.source else "") for f in facts(release)]
    if absent := not_stated(release):
        lines.append(f"Not stated by anybody: {', '.join(absent)}.")
    return "\n".join(lines + [f"\n{caveat.kind}: {caveat.text}" for caveat in release.caveats])


def section(release: Release) -> str:
    """A release in Markdown, in full."""
    kind = " (a dataset repository)" if release.repo_type == "dataset" else ""
    where = f"[{release.repo_id}]({release.url}){kind}" if release.url else f"In this package, {release.repo_id}"
    rows = [(f"`{fact.name}`", fact.value, fact.source) for fact in facts(release)]
    lines = [f"### {release.name}", release.description.strip(), f"{where}."]
    lines += [f"```py\n{how_to_load(release)}\n```", _coded(saes(release, compact=True)).markdown()]
    lines += [f"Where no other source is named: {release.sources['default']}."]
    lines += [Grid(("fact", "stated", "source"), tuple(rows)).markdown()]
    if absent := not_stated(release):
        lines.append(f"Not stated by anybody: {', '.join(f'`{name}`' for name in absent)}.")
    if release.caveats:
        lines.append(
            "\n".join(f"- **{caveat.kind}** ({CAVEATS[caveat.kind]}): {caveat.text}" for caveat in release.caveats)
        )
    return "\n\n".join(lines) + "\n"


def page(of: Iterable[Release]) -> str:
    """What docs/releases.md has of the catalogue, in Markdown."""
    of = list(of)
    grid = summary(of)
    rows = []
    for release, row in zip(of, grid.rows, strict=True):
        cells = dict(zip(grid.columns, row, strict=True)) | {"name": f"[{release.name}](#{release.name.lower()})"}
        if release.url:
            cells["repository"] = f"[{release.repo_id}]({release.url})"
        rows.append(tuple(cells.values()))
    kinds = [
        f"- **{kind}**: {text}{', warned of at loading' if kind in SHOWN else ''}" for kind, text in CAVEATS.items()
    ]
    overview = Grid(grid.columns, tuple(rows)).markdown()
    return "\n\n".join([overview, "Kinds of caveats:", "\n".join(kinds), *map(section, of)])


def upstream_yaml(release: Release) -> str:
    """The release as an entry of sae_lens's own pretrained_saes.yaml.

    Raises:
        ConfigError: sae_lens's form has no room for it.
    """
    if release.repo_type == "package":
        raise ConfigError(f"{release.name} lies in this package, and sae_lens reads from the hub: it has no entry.")
    if searched := [sae.id for sae in release.saes if sae.path is None]:
        raise ConfigError(
            f"{release.name} cannot be an entry of sae_lens's, which needs a path: none is stated for "
            f"{', '.join(searched[:3])}{f' and {len(searched) - 3} more' if len(searched) > 3 else ''}. "
            f"Once its files are there, sae-lens-gemma4 releases --verify {release.name} shows their paths."
        )
    entry: dict[str, Any] = {"model": release.model, "repo_id": release.repo_id, "saes": []}
    comment = ""
    if not _stock_reads(release):
        comment = f"# sae_lens has no loader {LOADER!r}; import sae_lens_gemma4 registers it.\n"
        entry = {"conversion_func": LOADER, **entry}
    for sae in release.saes:
        stated = {name: getattr(sae, name) for name in ("id", "path", "l0", "neuronpedia", "variance_explained")}
        entry["saes"].append({name: value for name, value in stated.items() if value is not None})
    return comment + yaml.safe_dump({release.name: entry}, sort_keys=False, allow_unicode=True, width=1000)


def _stock_reads(release: Release) -> bool:
    names = (release.weights, release.config)
    ours = (release.form, release.repo_type, release.revision, *names)
    return ours == ("sae_lens", "model", None, SAE_WEIGHTS_FILENAME, SAE_CFG_FILENAME)


def shown(value: Any) -> str:
    """A fact as people write it."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _coded(grid: Grid) -> Grid:
    """Ids and paths as code, for Markdown."""
    at = {i for i, column in enumerate(grid.columns) if column in ("id", "path", "labels", "neuronpedia")}
    rows = (tuple(f"`{c}`" if i in at and c != UNKNOWN else c for i, c in enumerate(row)) for row in grid.rows)
    return Grid(grid.columns, tuple(rows))


def _ranges(hooks: Iterable[str]) -> str:
    """The layers of these hooks, runs of three or more as first–last."""
    layers = sorted({layer for hook in hooks if (layer := layer_of(hook)) is not None})
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs) or UNKNOWN


def _values(stated: Iterable[float | None], between: str) -> str:
    """All values that are stated, or for a range the least and the greatest."""
    values = sorted({value for value in stated if value is not None})
    if between == "–":
        values = values[:: max(1, len(values) - 1)]
    return between.join(map(shown, values)) or UNKNOWN


def _alike(saes: Iterable[SAEEntry]) -> list[list[SAEEntry]]:
    """SAEs of which all is alike but the layer, where ids and paths say no more than that."""
    groups: dict[str, list[SAEEntry]] = {}
    for sae in saes:
        without_numbers: dict[str, Any] = {name: re.sub(r"\d+", "#", text) for name, text in _texts(sae).items()}
        same = replace(sae, **without_numbers)
        groups.setdefault(repr(same), []).append(sae)
    found = []
    for group in groups.values():
        one = all(_template(group, name) is not None for name in _texts(group[0]))
        found += [group] if one else [[sae] for sae in group]
    return found


def _texts(sae: SAEEntry) -> dict[str, str]:
    """What may hold the layer's number."""
    texts = {name: getattr(sae, name) for name in ("id", "hook", "path", "search", "labels")}
    return {name: text for name, text in texts.items() if text is not None}


def _written(saes: Sequence[SAEEntry], name: str) -> str:
    """A fact of these SAEs as one text, in which {layer} stands for the layer."""
    template = _template(saes, name)
    return " / ".join(dict.fromkeys(shown(getattr(sae, name)) for sae in saes)) if template is None else template


def _template(saes: Sequence[SAEEntry], name: str) -> str | None:
    texts, layers = [shown(getattr(sae, name)) for sae in saes], [layer_of(sae.hook) for sae in saes]
    parts = [re.split(r"(\d+)", text) for text in texts]
    written = []
    for column in zip(*parts, strict=False):
        if len(set(column)) == 1:
            written.append(column[0])
        elif all(part.isdigit() and int(part) == layer for part, layer in zip(column, layers, strict=True)):
            padded = any(part[0] == "0" and len(part) > 1 for part in column)
            written.append(f"{{layer:0{len(column[0])}d}}" if padded else "{layer}")
        else:
            return None
    return "".join(written) if len(set(map(len, parts))) == 1 else None
