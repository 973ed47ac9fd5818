"""The end of a run: each SAE saved, then measured with the SAE that it began as, then its record written.

In this order because a measurement may fail or be stopped, and what was trained must be there by then. All are measured
on one forward pass a corpus, so that differences are of the same tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE
from safetensors import SafetensorError

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.result import SAEEvaluation, write_json
from sae_lens_gemma4.training.checkpoint import remove_checkpoints
from sae_lens_gemma4.training.gate import check_gate
from sae_lens_gemma4.training.loop import Loop
from sae_lens_gemma4.training.preparing import PreparedSAE
from sae_lens_gemma4.training.records import (
    RESULT_FILENAME,
    ContinueTrainingResult,
    SAEResult,
    firing_frequency,
    result_document,
    set_metadata,
)
from sae_lens_gemma4.training.restore import inference_form
from sae_lens_gemma4.training.saving import RECIPE_FILENAME, save_sae, save_sparsity

_BEFORE, _AFTER = "before ", "after "


def finish(loop: Loop) -> ContinueTrainingResult:
    """Save every SAE, then measure all of them, and what they began as, on one forward pass a corpus."""
    saes = loop.prepared.saes
    forms: dict[str, SAE[Any]] = {}
    sources: dict[str, dict[str, Any]] = {}
    references, hooks, paths = {}, {}, {}
    for sae in saes:
        name = sae.run.name
        set_metadata(loop.prepared, sae, loop.skipped)
        paths[name] = save_sae(sae.trainee.sae, loop.folder / name)
        forms[_AFTER + name] = inference_form(sae.trainee.sae)
        sources[_AFTER + name] = {"path": str(paths[name])}
        hooks[_AFTER + name] = hooks[_BEFORE + name] = sae.hook_name
        if sae.base is not None and sae.run.warm_start is not None:
            forms[_BEFORE + name] = references[_AFTER + name] = sae.base
            sources[_BEFORE + name] = sae.run.warm_start.source
    measured = loop.prepared.evaluate(
        forms,
        hooks,
        progress=loop.progress,
        references=references,
        sources=sources,
        downstream_tokens=loop.prepared.cfg.monitoring.downstream_tokens,
    )
    results = {
        sae.run.name: _result(loop, sae, forms[_AFTER + sae.run.name], paths[sae.run.name], measured) for sae in saes
    }
    remove_checkpoints(loop.folder)
    return ContinueTrainingResult(
        path=loop.folder,
        saes=results,
        model=loop.prepared.model,
        heldout=loop.prepared.heldout,
        tokens=loop.step * loop.prepared.cfg.activations.batch_size,
        seconds=loop.seconds,
    )


def _result(
    loop: Loop, sae: PreparedSAE, saved: SAE[Any], path: Path, measured: Mapping[str, Mapping[str, SAEEvaluation]]
) -> SAEResult:
    """What one SAE's folder says of it, written into the folder."""
    name, gate, trainee = sae.run.name, sae.run.gate, sae.trainee
    after = {corpus: of[_AFTER + name] for corpus, of in measured.items()}
    result = SAEResult(
        name=name,
        path=path,
        sae=saved,
        before={corpus: of[_BEFORE + name] for corpus, of in measured.items() if _BEFORE + name in of},
        after=after,
        history=trainee.history,
        events=trainee.events,
        evaluations=trainee.evaluations,
        calibration=trainee.calibration,
        gate=None if gate is None else check_gate(gate, after, getattr(trainee.sae.cfg, "k", None)),
    )
    try:
        _write_record(loop, sae, result)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ConfigError(f"The record of {path} cannot be written: {reason}. The SAE is saved.") from e
    return result


def _write_record(loop: Loop, sae: PreparedSAE, result: SAEResult) -> None:
    path = result.path
    save_sparsity(path, firing_frequency(result.after.values()))
    document = result_document(loop.prepared, sae, result, loop.skipped, loop.seconds)
    if (loop.folder / RECIPE_FILENAME).is_file():
        shutil.copyfile(loop.folder / RECIPE_FILENAME, path / RECIPE_FILENAME)
    write_json(document, path / RESULT_FILENAME)
