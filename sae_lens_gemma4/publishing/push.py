"""Uploading what passed its gate, and reading it back before anybody else does.

The order is the point: everything that can be refused is refused before a byte is sent, the files and their card are
one commit, and the card that says that they were verified is written only after they were.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError, SAEError
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.publishing.card import write_card
from sae_lens_gemma4.publishing.hub import Repository
from sae_lens_gemma4.publishing.record import CARD_FILENAME, read_records, require_gate
from sae_lens_gemma4.publishing.round_trip import (
    RoundTrip,
    check_model,
    load_recorded_model,
    measure_again,
    recorded_corpora,
)

TOLERANCE = 1e-6


def push(
    folders: Iterable[str | Path],
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    revision: str | None = None,
    ungated: bool = False,
    model: HookedModel | None = None,
    corpora: Mapping[str, Corpus] | None = None,
    tolerance: float = TOLERANCE,
    device: str | None = None,
    batch_blocks: int | None = None,
    progress: bool = True,
) -> RoundTrip:
    """Upload SAEs as one commit, download it, measure it again, and write what was found into the card.

    Args:
        folders: SAEs that a run left; each becomes a folder of the repository, by its name.
        repo_id: a model repository, made where there is none.
        private: of a repository that is made; one that is there and public is refused.
        license: of the repository, for its card.
        revision: a branch, made where there is none; main if None.
        ungated: also SAEs whose gate does not hold, or that have none. The card says so.
        model: on which they were measured; loaded by its recorded name, to `device` (where it was measured), if None.
        corpora: held-out texts by name; made again from what was recorded if not given.
        tolerance: most that VE and L0 may differ, relative above 1.
        batch_blocks: blocks a forward pass; as in the evaluation that was recorded, if None.

    Raises (all but the last two before anything is sent):
        SAEError: a folder that is none of a finished run, or a gate that does not hold.
        ConfigError: the name of a repository that cannot be, a public one that should be private, one with other SAEs.
        ModelError, DataError: the model or the text is not the one that was measured.
        HubError: the hub refuses, or cannot be reached.
        SAEError: what was read back is not what was measured. The card in the repository says so, too.
    """
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"tolerance must be a number of at least 0, not {tolerance}.")
    records = read_records(folders)
    if not ungated:
        require_gate(records)
    card = write_card(records, repo_id, license, None)
    model = load_recorded_model(records, device) if model is None else model
    check_model(records, model)
    texts = recorded_corpora(records, model.tokenizer, corpora)

    repository, names = Repository(repo_id, revision), [record.name for record in records]
    repository.prepare(names, private=private)
    files: dict[str, Path | bytes] = {f"{r.name}/{path.name}": path for r in records for path in r.files}
    commit = repository.commit({**files, CARD_FILENAME: card.encode()}, f"Add {', '.join(names)}")
    with tempfile.TemporaryDirectory() as place:
        folder = repository.download(commit, [*files], Path(place))
        found = measure_again(
            records,
            {name: folder / name for name in names},
            model,
            texts,
            repo_id=repo_id,
            commit=commit,
            tolerance=tolerance,
            batch_blocks=batch_blocks or records[0].result.get("batch_blocks") or 16,
            progress=progress,
        )
    message = "Say that the files were read back" if found.passed else "Say that the files are not what was measured"
    repository.commit({CARD_FILENAME: write_card(records, repo_id, license, found).encode()}, message, commit)
    if not found.passed:
        raise SAEError(f"{repo_id}: {found.sentence}")
    return found
