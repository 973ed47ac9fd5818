"""Dashboards to look at before anybody publishes them: what the viewer's page is given, and that page as one file.

The page is one HTML text with its style and its script inside; `server.py` serves it with the dashboards of a folder
behind it, `single_file` puts a selection of them into it. Its content security policy names style and script by their
hashes, so nothing else runs and a single file fetches nothing, whatever a token's text says.
"""

from __future__ import annotations

import json
import math
import threading
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sae_lens_gemma4.errors import DataError, Gemma4SAEError, SAEError
from sae_lens_gemma4.evaluation.result import write_text
from sae_lens_gemma4.neuronpedia.folder import Dashboards, Feature

LIMIT = 2_000
"""Most latents in a single file; one takes about 60 KB."""
_SCRIPTS = ("text.js", "plots.js", "list.js", "detail.js", "viewer.js")
_COLUMNS = ("index", "density", "max", "token", "logit")
_UNSEEN = ("vector", "decoder_weights_dist")  # of a dashboard, what the page does not show


class Page(NamedTuple):
    html: str
    policy: str
    """Its content security policy, for a header beside the one in the page."""


class Viewer:
    """A folder of dashboards as the page reads it.

    Args:
        folder: one of dashboards, or one that has such a folder as its subfolder `dashboards`.
        labels: what latents are called, by index; labels of latents that the folder does not know are left out.

    Raises:
        DataError: no folder of dashboards, one that is not finished, or a file that cannot be read.
    """

    def __init__(self, folder: str | Path, labels: Mapping[int, str] | None = None) -> None:
        self.dashboards = Dashboards.find(folder)
        self.labels = dict(labels or {})
        self.dead = frozenset(self.dashboards.dead)
        self._reading = threading.Lock()

    def head(self) -> dict[str, Any]:
        """What the page shows before it has asked for anything: title, and what was measured as pairs of words."""
        header, settings = self.dashboards.header, self.dashboards.settings
        name = "-".join(str(header[k]) for k in ("layer", "sae_set") if header.get(k) not in (None, ""))
        suffix = f"__{header['sae_id_suffix']}" if header.get("sae_id_suffix") else ""
        title = "/".join(str(x) for x in (header.get("model_id"), name + suffix) if x) or self.dashboards.path.name
        return {
            "title": title,
            "facts": [fact for fact in _facts(settings, self.dashboards.ours) if fact[1]],
            "n_tokens": settings.get("n_tokens"),
            "skipped": "never fired on this text" if self.dashboards.ours else "was skipped: it has no dashboard",
        }

    def index(self) -> dict[str, Any]:
        """The list: columns over the latents with a dashboard, the dead ones, and labels.

        Raises:
            DataError: a file of the folder cannot be read, or holds something else than dashboards.
        """
        with self._told("has a dashboard that lacks a part, so it has no list"):
            columns = {name: _plain(self.dashboards.latents[name]) for name in _COLUMNS}
        known = self.dead.union(columns["index"])
        labels = {index: text for index, text in self.labels.items() if index in known and text}
        return {**columns, "dead": self.dashboards.dead, "labels": labels}

    def latent(self, index: int) -> dict[str, Any]:
        """All that is shown of one latent: its dashboard and the latents nearest to it; of a dead one, the latter.

        Raises:
            SAEError: there is no such latent.
            DataError: its file cannot be read, or holds something else.
        """
        with self._told(f"has no whole dashboard of latent {index}"):
            if index in self.dead:
                return {"feature_index": index, "dead": True, "nearest": self._nearest(index)}
            return self._shown(self.dashboards.feature(index))

    def latents(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Those of several living ones, ascending; each file is read once. Raises as `latent`."""
        if self.dashboards.ours:
            yield from map(self.latent, sorted(indices))
            return
        wanted = set(indices)
        yield from (self._shown(f) for f in self.dashboards.features() if f["feature_index"] in wanted)

    def read_nearest(self) -> dict[str, list[list[Any]]]:
        """The folder's `nearest`, read once even where several ask at the same time."""
        with self._reading:
            return self.dashboards.nearest

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Whatever goes wrong with a file that is not as it should be, as one sentence."""
        try:
            yield
        except Gemma4SAEError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, OSError) as e:
            raise DataError(f"{self.dashboards.path} {what}: {e!r}.") from e

    def _shown(self, feature: Feature) -> dict[str, Any]:
        kept = {name: _plain(value) for name, value in feature.items() if name not in _UNSEEN}
        return {**kept, "nearest": self._nearest(feature["feature_index"])}

    def _nearest(self, index: int) -> list[tuple[int, float]]:
        rows = [self.read_nearest().get(name, [])[index : index + 1] for name in ("indices", "cosine")]
        return _plain(list(zip(*(row[0] for row in rows), strict=False))) if all(rows) else []


def page(head: Mapping[str, Any], latents: Iterable[Mapping[str, Any]] = (), *, alone: bool = False) -> Page:
    """The viewer's page.

    Args:
        head: of a `Viewer`; with its index under `index` where the page has to do without a server.
        latents: those that are inside the page.
        alone: whether the page may ask nobody for anything.
    """
    script = '(() => {\n"use strict";\n' + "\n".join(map(_source, _SCRIPTS)) + "})();\n"
    style = _source("viewer.css")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "img-src data:",
            *([] if alone else ["connect-src 'self'"]),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    html = (
        _template()
        .get_template("viewer.html.j2")
        .render(
            title=head["title"],
            policy=policy,
            style=Markup(style),
            script=Markup(script),
            head=_embedded(head),
            latents=((latent["feature_index"], _embedded(latent)) for latent in latents),
        )
    )
    return Page(html, policy)


def single_file(
    folder: str | Path, out: str | Path, latents: Iterable[int], labels: Mapping[int, str] | None = None
) -> Path:
    """Write one HTML page with the dashboards of some latents in it; it opens from disk and fetches nothing.

    Args:
        folder: as `Viewer` takes it.
        latents: which ones, in any order; up to `LIMIT`.

    Raises:
        SAEError: none or too many latents, or one that has no dashboard.
        ConfigError: `out` cannot be written.
        DataError: as `Viewer`.
    """
    chosen = sorted(set(latents))
    if not 0 < len(chosen) <= LIMIT:
        raise SAEError(f"A single file holds between 1 and {LIMIT:,} latents; these are {len(chosen):,}.")
    viewer = Viewer(folder, labels)
    index = viewer.index()
    row_of = {latent: row for row, latent in enumerate(index["index"])}
    dead = [i for i in chosen if i in viewer.dead]
    missing = [i for i in chosen if i not in row_of and i not in viewer.dead]
    if dead or missing:
        why = [f"{_some(dead)} never fired on this text"] if dead else []
        why += [f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} not there"] if missing else []
        raise SAEError(f"Not every latent asked for has a dashboard in {viewer.dashboards.path}: {'; '.join(why)}.")
    rows = [row_of[i] for i in chosen]
    kept: dict[str, Any] = {name: [index[name][row] for row in rows] for name in _COLUMNS}
    kept |= {"dead": [], "labels": {i: index["labels"][i] for i in chosen if i in index["labels"]}}
    counts = {"n_live": len(index["index"]), "n_dead": len(index["dead"])}
    whole = page({**viewer.head(), **counts, "index": kept}, viewer.latents(chosen), alone=True)
    write_text(whole.html, out)
    return Path(out)


def dumps(value: Any) -> bytes:
    """JSON in UTF-8 that every parser takes: half a surrogate pair, which UTF-8 has not, is written as an escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def _facts(settings: Mapping[str, Any], ours: bool) -> Iterator[tuple[str, str]]:
    """What was measured on what, in the words of this package's settings or of sae-dashboard's."""
    if not ours:
        yield "SAE", " ".join(str(settings[k]) for k in ("sae_set", "sae_path") if settings.get(k))
        yield "Text", str(settings.get("huggingface_dataset_path") or "")
        yield "Tokens", _tokens(settings)
        return
    sae, model, corpus = (settings.get(name) or {} for name in ("sae", "model", "corpus"))
    dtype = f" ({model['dtype']})" if model.get("dtype") else ""
    yield "Model", f"{model.get('name') or model.get('class') or ''}{dtype}"
    yield "Hook", str(sae.get("hook_name") or "")
    yield "SAE", " of ".join(str(sae[k]) for k in ("sae_id", "release") if sae.get(k))
    size = f"{sae['d_sae']:,} latents on {sae['d_in']:,} dimensions" if sae.get("d_sae") and sae.get("d_in") else ""
    yield "Form", ", ".join(x for x in (str(sae.get("architecture") or ""), size) if x)
    yield "Text", str(corpus.get("name") or settings.get("dataset") or "")
    yield "Tokens", _tokens(settings)


def _tokens(settings: Mapping[str, Any]) -> str:
    given = (settings.get(k) for k in ("n_prompts_total", "n_tokens_in_prompt", "n_tokens"))
    prompts, length, n = (f"{x:,}" if isinstance(x, int) else "" for x in given)
    in_prompts = f"{prompts} prompts of {length}" if prompts and length else ""
    return " in ".join(x for x in (n, in_prompts) if x)


def _plain(value: Any) -> Any:
    """The same without numbers that JSON does not have, and with zeros as short as they can be written."""
    if isinstance(value, float):
        return None if not math.isfinite(value) else 0 if value == 0 else value
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _embedded(value: Any) -> Markup:
    """JSON that no text in it can leave: inside a script element only a `<` could."""
    return Markup(dumps(value).decode().replace("<", "\\u003c"))


def _some(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
    return f"latent{'s' * (len(indices) > 1)} {shown}"


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


@cache
def _source(name: str) -> str:
    return (files("sae_lens_gemma4.neuronpedia") / "templates" / name).read_text(encoding="utf-8")


@cache
def _template() -> Environment:
    return Environment(
        loader=PackageLoader("sae_lens_gemma4.neuronpedia"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
