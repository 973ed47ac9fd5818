"""Dashboards onto Neuronpedia, by its self-service API: every latent once, whatever happens on the way.

Before anything is sent it is known that all of it fits (`outgoing`) and where it goes. Then batch after batch is noted,
sent and noted again (`ledger`). Where it is not certain that a batch arrived, the site is asked before it is sent
again: when an answer does not come, and when a process goes on where another was stopped.

What a self-service upload cannot carry is left out, and the export for the site's team has it: histograms, neighbours,
the SAE's settings, several sources a layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.pieces import safe_text
from sae_lens_gemma4.neuronpedia import limits
from sae_lens_gemma4.neuronpedia.ledger import Ledger, only_upload
from sae_lens_gemma4.neuronpedia.limits import Changes, Row, cut
from sae_lens_gemma4.neuronpedia.names import HOW_TO_ASK, SourceName
from sae_lens_gemma4.neuronpedia.outgoing import Outgoing, Plan
from sae_lens_gemma4.neuronpedia.site import Patience, Site, SiteError, check_texts
from sae_lens_gemma4.report.visible import visible_name

if TYPE_CHECKING:
    from sae_lens_gemma4.neuronpedia.explanations import ExplanationSource

_TOO_LARGE = (413, 500, 504)
"""Answers that a smaller batch may not get: refused for its size, or not stored within the site's five seconds."""


@dataclass(frozen=True)
class Uploaded:
    """What an upload did.

    Attributes:
        url: where it is to be seen.
        sent: latents that this call sent.
        already_there: those that an earlier call had.
        dead: latents without a dashboard, which the site takes none of.
        labels, unsent_labels: sent now or earlier, and those of latents that are not sent.
        changes: what was not sent as it was.
        ledger: the record of what was sent, by which the next call goes on.
    """

    name: SourceName
    url: str
    sent: int
    already_there: int
    dead: int
    labels: int
    unsent_labels: int
    changes: Changes
    ledger: Path


def upload_neuronpedia(
    dashboards_dir: str | Path,
    *,
    model_id: str | None = None,
    layer: int | None = None,
    set_name: str | None = None,
    suffix: str | None = None,
    new_model: bool = False,
    description: str | None = None,
    url: str | None = None,
    explanations: ExplanationSource | None = None,
    api_key: str | None = None,
    base_url: str | None = None,
    batch_size: int = limits.FEATURES,
    max_bytes: int = limits.BODY_BYTES,
    state: str | Path | None = None,
    patience: Patience | None = None,
    progress: bool = True,
) -> Uploaded:
    """Upload a folder of dashboards; called again, it goes on where it was stopped.

    The files are read twice, which takes some 2.4 ms a latent each time: all is checked before anything is sent.

    Args:
        dashboards_dir: a finished folder of dashboards, or one that has it as its subfolder `dashboards`.
        model_id, layer, set_name, suffix: where it goes; what is not given, the folder says. "" is no suffix.
        new_model: make an unlisted model if the site has none of this name.
        description, url: of a set that is made; the folder's release and nothing if None.
        explanations: labels, as `read_explanations` takes them; `catalogue` is those of the folder's release.
        api_key: yours; `NEURONPEDIA_API_KEY` if None.
        base_url: of the API; Neuronpedia's if None.
        batch_size, max_bytes: most latents and bytes of a request.
        state: the ledger; `uploaded-….jsonl` in the folder if None.
        patience: how long to go on where the site does not take a request.

    Raises:
        ConfigError: a name, number, address or key that cannot be used; a model or layer that the site does not have;
            a set that is somebody else's, or that has these latents without this ledger knowing of it.
        DataError: dashboards that cannot be uploaded, or a ledger of others.
        DependencyError: Neuronpedia's client is not installed, or fails.
        SiteError: the site does not take a request, or cannot be reached. What was sent is noted.
    """
    check_texts(description=description, url=url)
    if url and not limits.URL.fullmatch(url):
        raise ConfigError(
            f"{url!r} is no web address (url) that a set can have, such as https://huggingface.co/me/saes."
        )
    patience = patience or Patience()
    outgoing = Outgoing(
        dashboards_dir,
        model_id=model_id,
        layer=layer,
        set_name=set_name,
        suffix=suffix,
        explanations=explanations,
        batch_size=batch_size,
        max_bytes=max_bytes,
    )
    site, name = Site(api_key, base_url, patience.timeout_s), outgoing.name
    plan = outgoing.plan(progress)
    path = _ledger_path(outgoing.dashboards.path, site, name) if state is None else Path(state)
    with only_upload(path):
        ledger = Ledger(path, f"{site.base_url} {name}", plan.content)
        before = len(ledger.sent)
        if before < plan.latents:
            with tqdm(total=plan.latents, initial=before, desc="sending", disable=not progress, unit="latent") as bar:
                sender = _Sender(site, name, ledger, patience, bar)
                facts = outgoing.dashboards.settings
                sender.owner = patience.keep_trying(
                    lambda: _prepare(site, name, facts, new_model, description, url), sender.waits
                )
                sender.settle()
                if not ledger.sent:
                    _check_absent(sender, plan)
                before = len(ledger.sent)
                for batch in outgoing.batches(ledger.sent):
                    sender.send(batch)
    return Uploaded(
        name=name,
        url=site.page(name.model_id, name.source_id),
        sent=plan.latents - before,
        already_there=before,
        dead=plan.dead,
        labels=plan.labels,
        unsent_labels=plan.unsent_labels,
        changes=plan.changes,
        ledger=path,
    )


class _Sender:
    """Sends batches to one source, each once."""

    def __init__(self, site: Site, name: SourceName, ledger: Ledger, patience: Patience, bar: Any) -> None:
        self._site, self._name, self._ledger, self._patience, self._bar = site, name, ledger, patience, bar
        self._most = limits.FEATURES
        self.owner = "somebody"

    def send(self, batch: Sequence[Row]) -> None:
        """Send a batch, in smaller ones where the site does not take it whole."""
        for start in range(0, len(batch), self._most):
            rows = batch[start : start + self._most]
            try:
                self._patience.keep_trying(partial(self._send_once, rows), self.waits)
            except SiteError as e:
                if e.status not in _TOO_LARGE or len(rows) == 1 or _numbers(rows) in self._ledger.unclear:
                    raise self._explained(e, rows) from e
                self._most = len(rows) // 2
                self.send(rows)
                self.send(batch[start + len(rows) :])
                return

    def settle(self) -> None:
        """Ask the site for each batch that was being sent when an earlier call was stopped."""
        for batch in list(self._ledger.unclear):
            self._patience.keep_trying(partial(self._arrived, batch), self.waits)

    def has(self, index: int) -> bool:
        """Whether the site has a latent."""
        return self._patience.keep_trying(partial(self._has, index), self.waits)

    def waits(self, seconds: float, why: SiteError) -> None:
        self._bar.set_postfix_str(f"waiting {seconds:.0f} s: {why}")

    def _send_once(self, rows: Sequence[Row]) -> None:
        batch = _numbers(rows)
        if batch in self._ledger.unclear and self._arrived(batch):
            return
        self._ledger.sending(batch)
        try:
            self._site.upload(self._name.model_id, self._name.source_id, rows)
        except SiteError as e:
            if e.refused:
                self._ledger.did_not_arrive(batch)
            elif self._arrived(batch, at_work=not e.by_its_code):
                return
            raise
        self._took(batch)

    def _arrived(self, batch: tuple[int, ...], at_work: bool = True) -> bool:
        """Whether a batch that was sent is on the site: all of it is if one latent is.

        Args:
            at_work: the request may still be.
        """
        there = self._has(batch[0])
        left = min(self._ledger.unclear[batch] + self._patience.settle_s - time.time(), self._patience.settle_s)
        if not there and at_work and left > 0:
            self._bar.set_postfix_str(f"waiting {left:.0f} s: a request without an answer may still be at work")
            self._patience.sleep(left)
            there = self._has(batch[0])
        if there:
            self._took(batch)
        else:
            self._ledger.did_not_arrive(batch)
        return there

    def _took(self, batch: tuple[int, ...]) -> None:
        self._ledger.arrived(batch)
        self._bar.set_postfix_str("", refresh=False)
        self._bar.update(len(batch))

    def _has(self, index: int) -> bool:
        return self._site.has_latent(self._name.model_id, self._name.source_id, index)

    def _explained(self, error: SiteError, rows: Sequence[Row]) -> SiteError:
        latents = f"latent {rows[0]['index']}" + (f" to {rows[-1]['index']}" if len(rows) > 1 else "")
        hint = f" It answers so, too, where the set is not yours; it is {self.owner}’s." if error.status == 500 else ""
        noted = f"What was sent before is noted in {self._ledger.path.name}; the next call goes on from there."
        message = f"{self._name}, {latents}: {error}{hint} {noted}"
        return SiteError(message, error.status)


def _numbers(rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(row["index"] for row in rows)


def _prepare(
    site: Site,
    name: SourceName,
    settings: dict[str, Any],
    new_model: bool,
    description: str | None,
    url: str | None,
) -> str:
    """Make sure that the source is there and may be written, making what is missing; returns whose it is."""
    found = site.source_set(name.model_id, name.set_name)
    if found is None:
        model = site.model(name.model_id)
        if model is None:
            if not new_model:
                raise ConfigError(f"{site.host} has no model {name.model_id!r}. {HOW_TO_ASK}")
            _make_model(site, name, settings)
            model = site.model(name.model_id) or {}
        if name.suffix is not None:
            raise ConfigError(
                f"{name} cannot be made by self-service: a set that is made so has one source a layer, "
                f"{name.layer}-{name.set_name}. Give it a set name of its own and the suffix ''; the export for "
                "Neuronpedia’s team can have several."
            )
        layers = model.get("layers") or 0
        if name.layer >= layers:
            raise ConfigError(
                f"{site.host} has {layers} layers of {name.model_id}, and makes a set with a source for each: {name} "
                "would not be among them. " + ("Its team can mend that." if layers == 0 else "Is the layer right?")
            )
        text = description or settings.get("sae", {}).get("release")
        site.make_source_set(name.model_id, name.set_name, text and cut(safe_text(text), limits.DESCRIPTION), url)
        found = site.source_set(name.model_id, name.set_name) or {}
    owner = visible_name(str(found.get("creatorName") or "somebody"))
    sources = [str(source.get("id")) for source in found.get("sources") or ()]
    if not sources:
        raise ConfigError(
            f"The set {name.set_name} of {name.model_id} is {owner}’s, and only who made it may add to it. Choose "
            "another set name."
        )
    if name.source_id not in sources:
        raise ConfigError(f"The set {name.set_name} of {name.model_id} has no source {name.source_id}.")
    return owner


def _make_model(site: Site, name: SourceName, settings: dict[str, Any]) -> None:
    model = settings.get("model") or {}
    layers, full_name = model.get("n_layers"), str(model.get("name") or name.model_id)
    if not isinstance(layers, int) or not 1 <= layers <= limits.LAYERS:
        raise ConfigError(
            f"{name.model_id} cannot be made on {site.host}: it needs the number of layers, 1 to {limits.LAYERS}, and "
            f"the dashboards’ settings say {layers}."
        )
    page = f"https://huggingface.co/{full_name}" if full_name.count("/") == 1 and full_name[0] not in "./~" else None
    site.make_model(name.model_id, layers, cut(safe_text(full_name.rpartition("/")[2]), limits.MODEL_NAME), page)


def _check_absent(sender: _Sender, plan: Plan) -> None:
    if there := [index for index in sorted({plan.first, plan.last}) if sender.has(index)]:
        raise ConfigError(
            f"{plan.name} has latents already ({', '.join(map(str, there))}), and this ledger did not send them. Sent "
            "again, their examples would be there twice. Give the ledger of the upload that sent them (state), or "
            "another set name; Neuronpedia’s team can remove a source."
        )


def _ledger_path(folder: Path, site: Site, name: SourceName) -> Path:
    return folder / f"uploaded-{site.host.replace(':', '-')}-{name.model_id}-{name.source_id}.jsonl"
