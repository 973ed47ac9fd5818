"""The folder that Neuronpedia imports: every row of an SAE, complete or absent.

    OUT/{modelId}/{sourceId}/   release.jsonl  model.jsonl  sourceset.jsonl  source.jsonl  pretrained_saes.yaml
                                features/batch-N.jsonl.gz  activations/batch-N.jsonl.gz  explanations/batch-N.jsonl.gz

The import lists a folder by one call that answers with 1,000 names at most, unpacks each file in memory, and sends it
to PostgreSQL as JSON (`row_files`). `pretrained_saes.yaml` is none of its files, and it passes it over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sae_lens_gemma4.errors import ConfigError, DataError, MismatchWarning, warn_caller
from sae_lens_gemma4.neuronpedia import rows
from sae_lens_gemma4.neuronpedia.arguments import check_arguments
from sae_lens_gemma4.neuronpedia.cells import line
from sae_lens_gemma4.neuronpedia.explanations import Explanations, ExplanationSource, read_explanations
from sae_lens_gemma4.neuronpedia.folder import Dashboards, Feature
from sae_lens_gemma4.neuronpedia.listing import Listing, listing_of
from sae_lens_gemma4.neuronpedia.names import warn_if_unknown
from sae_lens_gemma4.neuronpedia.row_files import BATCHES, SINGLE, UPSTREAM, RowFiles, latents_per_file
from sae_lens_gemma4.training.saving import replacing

_ROWS = dict(zip(SINGLE, (rows.release_row, rows.model_row, rows.sourceset_row, rows.source_row), strict=True))


@dataclass(frozen=True)
class NeuronpediaExport:
    """What was written. It can be used as the path of its folder.

    Attributes:
        folder: `OUT/{modelId}/{sourceId}`.
        name: `{modelId}/{sourceId}`.
        features: rows of latents with a dashboard.
        dead: rows of latents that never fired.
        absent: latents of the SAE that have no row, because the dashboards are of others; None if nobody knows.
        activations: rows of examples.
        explanations: rows of labels.
        left_out: labels of latents that are absent.
    """

    folder: Path
    name: str
    features: int
    dead: int
    absent: int | None
    activations: int
    explanations: int
    left_out: int

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        parts = [
            f"{self.features + self.dead:,} latents ({self.dead:,} of them dead)",
            f"{self.activations:,} activations",
            f"{self.explanations:,} explanations",
        ]
        said = f"{self.name}: {', '.join(parts)}, in {self.folder}"
        if self.absent:
            said += f"; {self.absent:,} latents of the SAE are not among the dashboards"
        return f"{said}; {self.left_out:,} labels of these were left out" if self.left_out else said


def export_neuronpedia(
    dashboards_dir: str | Path,
    out_dir: str | Path,
    *,
    release: str | None = None,
    sae_id: str | None = None,
    hf_repo_id: str | None = None,
    hf_folder_id: str | None = None,
    explanations: ExplanationSource | None = None,
    explanation_type: str | None = None,
    explanation_model: str | None = None,
    model_id: str | None = None,
    layer: int | None = None,
    set_name: str | None = None,
    suffix: str | None = None,
    description: str | None = None,
    release_name: str | None = None,
    release_title: str | None = None,
    creator_name: str | None = None,
    creator_email: str | None = None,
    creator_id: str | None = None,
    urls: Sequence[str] | None = None,
    visibility: str | None = None,
    notes: str | None = None,
    model_name: str | None = None,
    owner: str | None = None,
    n_layers: int | None = None,
    d_model: int | None = None,
    d_mlp: int | None = None,
    hook_name: str | None = None,
    sae_config: Mapping[str, Any] | None = None,
    created_at: datetime | None = None,
    progress: bool = True,
) -> NeuronpediaExport:
    """Write the folder that Neuronpedia imports, with every row filled.

    What is given counts first, then what the dashboards say of themselves, then the catalogue. An export that is there
    already is replaced when the new one is complete.

    Args:
        dashboards_dir: what `build_dashboards` made, or sae-dashboard.
        out_dir: what holds `{modelId}/{sourceId}`.
        release, sae_id: the SAE in the catalogue; of your own, what sae_lens's list will call it.
        hf_repo_id, hf_folder_id: where its weights lie on the hub, whole; "" is the root of the repository.
        explanations: labels: a CSV or JSON file, `"catalogue"` for the release's own, or a mapping.
        explanation_type, explanation_model: how labels were made and by which model, where they do not say. Both must
            be known to the site already, or its import fails; unstated they are empty.
        model_id, layer, set_name, suffix: the parts of its name there; suffix "" for none.
        description: of the set, as `Residual Stream - 65k`.
        release_name, release_title: of the release there: a part of its address, and what people call it.
        creator_name, creator_email: who made the SAE.
        creator_id: the account that the rows belong to; Neuronpedia's own for imports by default.
        urls: of the release and the set; the repository by default.
        visibility: PUBLIC, UNLISTED or PRIVATE; PUBLIC by default.
        notes: on the source; how the dashboards were made by default.
        model_name, owner, n_layers, d_model, d_mlp: the model, where the dashboards do not say.
        hook_name, sae_config: the SAE, where the dashboards do not say.
        created_at: of all rows; now by default, and UTC where it has no zone.
        progress: show a bar.

    Returns:
        What was written: the folder, and how many rows of each kind.

    Raises:
        DataError: dashboards that are not whole, a value that no column takes, a latent that fires and has no example,
            or a label for no latent: each by name.
        ConfigError: an argument of another kind; what nobody states, all of it at once; a name that Neuronpedia
            refuses; or a folder in the way.
        UnknownNameError: no such release or SAE.
        SAEError, HubError: the catalogue has no labels of it, or they cannot be fetched.
    """
    given = {
        "release": release, "sae_id": sae_id, "hf_repo_id": hf_repo_id, "hf_folder_id": hf_folder_id,
        "model_id": model_id, "layer": layer, "set_name": set_name, "suffix": suffix, "description": description,
        "release_name": release_name, "release_title": release_title, "creator_name": creator_name,
        "creator_email": creator_email, "creator_id": creator_id, "urls": urls, "visibility": visibility,
        "notes": notes, "model_name": model_name, "owner": owner, "n_layers": n_layers, "d_model": d_model,
        "d_mlp": d_mlp, "hook_name": hook_name, "sae_config": sae_config, "created_at": created_at,
    }  # fmt: skip
    places = {"dashboards_dir": dashboards_dir, "out_dir": out_dir}
    kinds = {"explanation_type": explanation_type, "explanation_model": explanation_model}
    check_arguments({**given, **places, **kinds})
    dashboards = Dashboards(dashboards_dir)
    listing = listing_of(dashboards, given)
    labels: Explanations = {}
    if explanations is not None:
        labels = read_explanations(
            explanations,
            d_sae=listing.d_sae,
            release=listing.release,
            sae_id=listing.sae_id,
            type_name=explanation_type,
            model_name=explanation_model,
        )
    warn_if_unknown(listing.name.model_id)
    place = Path(out_dir) / listing.name.model_id / listing.name.source_id
    if place.exists() and not (place.is_dir() and ((place / "source.jsonl").is_file() or not any(place.iterdir()))):
        raise ConfigError(f"{place} is there and is no export for Neuronpedia; it would be lost.")
    with replacing(place) as folder:
        counts = _write(folder, dashboards, listing, labels, progress)
    found = NeuronpediaExport(place, str(listing.name), **counts)
    if found.left_out:
        warn_caller(
            f"{found.left_out:,} labels are for latents that {dashboards_dir} has no dashboards of, and are left out.",
            MismatchWarning,
        )
    return found


def _write(
    folder: Path, dashboards: Dashboards, listing: Listing, labels: Explanations, progress: bool
) -> dict[str, Any]:
    for name, row in _ROWS.items():
        (folder / name).write_bytes(_metadata(name, row(listing)))
    if (upstream := listing.upstream_yaml) is not None:
        (folder / UPSTREAM).write_text(upstream, encoding="utf-8")
    per_file = latents_per_file(listing.d_sae)
    nearest = [dashboards.nearest[key] for key in ("indices", "cosine")]
    alive = dead = 0
    with (
        RowFiles(folder / BATCHES[0], per_file) as features,
        RowFiles(folder / BATCHES[1], per_file) as activations,
        RowFiles(folder / BATCHES[2], per_file) as explanations,
        tqdm(total=listing.d_sae, desc="Writing rows", unit="latent", disable=not progress) as bar,
    ):
        for index, feature in _latents(dashboards, listing.d_sae):
            near = [column[index] if index < len(column) else [] for column in nearest]
            examples = [] if feature is None else rows.activation_rows(listing, index, feature)
            features.write([rows.feature_row(listing, index, feature, examples, near)])
            activations.write(examples)
            explanations.write(rows.explanation_rows(listing, index, labels.pop(index, [])))
            alive, dead = alive + (feature is not None), dead + (feature is None)
            bar.update()
    if not alive + dead:
        raise DataError(f"{dashboards.path} has no latent, dead or alive.")
    if labels and listing.d_sae is None:
        raise DataError(f"Explanations have a label of latent {next(iter(labels))}, which {dashboards.path} has not.")
    return {
        "features": alive,
        "dead": dead,
        "absent": None if listing.d_sae is None else listing.d_sae - alive - dead,
        "activations": activations.rows,
        "explanations": explanations.rows,
        "left_out": sum(map(len, labels.values())),
    }


def _latents(dashboards: Dashboards, d_sae: int | None) -> Iterator[tuple[int, Feature | None]]:
    """Each latent with its dashboard, the dead ones, which have none, among them in order."""
    seen = set(dashboards.dead)
    dead = deque(sorted(seen))
    for latent in dead:
        _checked(dashboards, latent, d_sae)
    for feature in dashboards.features():
        index = _checked(dashboards, feature.get("feature_index"), d_sae)
        if index in seen:
            raise DataError(f"{dashboards.path} has latent {index} twice, with two dashboards or among the dead.")
        seen.add(index)
        while dead and dead[0] < index:
            yield dead.popleft(), None
        yield index, feature
    yield from ((index, None) for index in dead)


def _checked(dashboards: Dashboards, index: Any, d_sae: int | None) -> int:
    if type(index) is not int or index < 0 or (d_sae is not None and index >= d_sae):
        raise DataError(f"{dashboards.path} speaks of a latent {index!r}, which there is not.")
    return index


def _metadata(name: str, row: dict[str, Any]) -> bytes:
    try:
        data = line(row)
    except (TypeError, ValueError) as e:
        raise DataError(f"{name} cannot be written, as something in it is no text and no finite number: {e}.") from e
    if b"\\u0000" in data:
        raise DataError(f"{name} cannot be written, as a text in it has a NUL, which PostgreSQL refuses.")
    return data
