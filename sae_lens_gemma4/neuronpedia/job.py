"""From an SAE to the folder that Neuronpedia imports, in one call, as a recipe says it.

What can be wrong is found before the text is read: names that Neuronpedia refuses, what nobody states, labels for
latents that are not there. What is done already is not done again: dashboards that are there are taken as they are,
and the export is made anew from them, which is how labels are added later.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.neuronpedia.dashboards import make_dashboards
from sae_lens_gemma4.neuronpedia.explanations import Explanations, read_explanations
from sae_lens_gemma4.neuronpedia.export import NeuronpediaExport, export_neuronpedia
from sae_lens_gemma4.neuronpedia.listing import listing_of
from sae_lens_gemma4.neuronpedia.names import SourceName, UnknownModelWarning, model_id_of, warn_if_unknown
from sae_lens_gemma4.neuronpedia.planning import CONTEXT_SIZE, N_PROMPTS, Plan, plan_dashboards
from sae_lens_gemma4.neuronpedia.writing import DashboardSettings
from sae_lens_gemma4.training.config import Model
from sae_lens_gemma4.training.restore import load_sae

DASHBOARDS, EXPORTS = "dashboards", "exports"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the SAE is: a release of the catalogue or of sae_lens and an id in it, or a folder or weights file.

    Attributes:
        hook_name: where it reads, if not where its metadata says.
        fold_decoder_norms: multiply activations by the lengths of decoder rows, as Neuronpedia's server does.
    """

    release: str | None = None
    sae_id: str | None = None
    path: str | None = None
    hook_name: str | None = None
    fold_decoder_norms: bool = False

    def __post_init__(self) -> None:
        if (self.path is None) == (self.release is None) or (self.release is None) != (self.sae_id is None):
            raise ConfigError("An SAE is a release and an sae_id, or a path.")

    def load(self, device: str) -> SAE[Any]:
        sae = load_sae(self.path or str(self.release), self.sae_id, device=device)
        if self.fold_decoder_norms:
            sae.fold_W_dec_norm()
        return sae

    def source(self) -> dict[str, Any]:
        return {"path": self.path} if self.path else {"release": self.release, "sae_id": self.sae_id}


@dataclass(frozen=True, kw_only=True)
class Text:
    """What latents are looked at on.

    Attributes:
        dataset: a name on the hub, a local file or folder, `embedded:text` or `embedded:chat`.
        prompts, context_size: blocks, and tokens in each.
        batch_blocks: blocks a forward pass.
        isolate_documents: documents packed into one block do not see each other.
    """

    dataset: str
    split: str = "train"
    prompts: int = N_PROMPTS
    context_size: int = CONTEXT_SIZE
    batch_blocks: int = 16
    isolate_documents: bool = False


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What is stated of the SAE beyond what the catalogue and the files say: arguments of `export_neuronpedia`."""

    release: str | None = None
    sae_id: str | None = None
    hf_repo_id: str | None = None
    hf_folder_id: str | None = None
    model_id: str | None = None
    layer: int | None = None
    set_name: str | None = None
    suffix: str | None = None
    description: str | None = None
    release_name: str | None = None
    release_title: str | None = None
    creator_name: str | None = None
    creator_email: str | None = None
    creator_id: str | None = None
    urls: list[str] | None = None
    visibility: str | None = None
    notes: str | None = None
    owner: str | None = None
    n_layers: int | None = None
    d_model: int | None = None
    d_mlp: int | None = None
    explanation_type: str | None = None
    explanation_model: str | None = None

    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class NeuronpediaJob:
    """A recipe of `export-neuronpedia`.

    Attributes:
        labels: a CSV or JSON file, or `catalogue` for the release's own.
        output: a folder; `dashboards` and `exports` are made in it.
        keep_firings: leave all activations in `dashboards/firings`.
    """

    sae: Place
    model: Model
    text: Text
    output: str
    dashboard: DashboardSettings = field(default_factory=DashboardSettings)
    listing: Stated = field(default_factory=Stated)
    labels: str | None = None
    keep_firings: bool = False


@dataclass(frozen=True)
class Prepared:
    """A job of which everything is loaded and checked. Made by `prepare`."""

    job: NeuronpediaJob
    plan: Plan
    name: SourceName
    labels: Explanations

    @property
    def dashboards(self) -> Path:
        return Path(self.job.output) / DASHBOARDS

    @property
    def exports(self) -> Path:
        return Path(self.job.output) / EXPORTS

    def run(self, *, progress: bool = True) -> NeuronpediaExport:
        """Make what is missing of the dashboards, and the export from them.

        Raises:
            ConfigError: the output holds other dashboards, or its disk is full. Others as `export_neuronpedia`.
        """
        made = make_dashboards(self.plan, self.dashboards, keep_firings=self.job.keep_firings, progress=progress)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnknownModelWarning)  # `prepare` has said it
            return export_neuronpedia(
                made.path,
                self.exports,
                explanations=self.labels or None,
                progress=progress,
                **self.job.listing.arguments(),
            )


def prepare(job: NeuronpediaJob) -> Prepared:
    """Load SAE, model, text and labels, and find whatever an export will miss.

    Raises:
        ConfigError: what nobody states, all of it at once; or a name that Neuronpedia refuses.
        UnknownNameError, SAEError, ModelError, DataError, HubError: a release, SAE, model, text or labels that cannot
            be had.
    """
    stated = job.listing
    if stated.set_name is not None:
        model_id = stated.model_id or model_id_of(job.model.name)
        SourceName(model_id, stated.layer or 0, stated.set_name, stated.suffix or None)
    plan = plan_of(job.sae, job.model, job.text, stated, job.dashboard)
    listing = listing_of(plan.document, stated.arguments())
    warn_if_unknown(listing.name.model_id)
    labels: Explanations = {}
    if job.labels is not None:
        labels = read_explanations(
            job.labels,
            d_sae=plan.sae.cfg.d_sae,
            release=listing.release,
            sae_id=listing.sae_id,
            type_name=stated.explanation_type,
            model_name=stated.explanation_model,
        )
    return Prepared(job, plan, listing.name, labels)


def plan_of(sae: Place, model: Model, text: Text, listing: Stated, dashboard: DashboardSettings) -> Plan:
    """`plan_dashboards` of what a recipe names; loads SAE, model and text."""
    return plan_dashboards(
        sae.load(model.device),
        model.load(),
        text.dataset,
        hook_name=sae.hook_name,
        split=text.split,
        n_prompts=text.prompts,
        context_size=text.context_size,
        batch_blocks=text.batch_blocks,
        isolate_documents=text.isolate_documents,
        settings=dashboard,
        source=sae.source(),
        model_id=listing.model_id,
        set_name=listing.set_name,
        suffix=listing.suffix,
    )
