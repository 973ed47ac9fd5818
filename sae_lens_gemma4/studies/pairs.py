"""`interp probe`: which latents tell the two sides of contrasting prompts apart."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.identity import sae_hash
from sae_lens_gemma4.evaluation.measuring import check_sae
from sae_lens_gemma4.evaluation.result import versions, write_text
from sae_lens_gemma4.interp.item_means import Statistic
from sae_lens_gemma4.interp.labels.card import LabelCard, Measured
from sae_lens_gemma4.interp.labels.files import write_labels
from sae_lens_gemma4.interp.labels.forms import to_feature_map
from sae_lens_gemma4.interp.pairs.probing import ProbeSettings, Probing, feature_labels, probe_pairs
from sae_lens_gemma4.interp.pairs.prompt_pairs import pair_means, read_categories
from sae_lens_gemma4.neuronpedia.job import Place
from sae_lens_gemma4.studies.files import LABELS
from sae_lens_gemma4.studies.study import Study, model_facts, plan_model, plan_sae
from sae_lens_gemma4.training.config import Model

FEATURE_MAP = "feature_map.json"
_MIN_PAIRS = 2


@dataclass(frozen=True, kw_only=True)
class PairStudy(Study):
    """A recipe of `interp probe`.

    Attributes:
        pairs: a YAML file of categories of prompt pairs.
        template: text around each prompt, with `{prompt}` in its place.
        statistic: of a latent's activations over a prompt: "mean", "max" or "last".
        batch_blocks: prompts a forward pass.
        licence: of the labels, for their card.
    """

    sae: Place
    model: Model
    pairs: str
    template: str = "{prompt}"
    statistic: Statistic = "mean"
    probing: ProbeSettings = field(default_factory=ProbeSettings)
    batch_blocks: int = 16
    licence: str | None = None

    def __post_init__(self) -> None:
        if self.batch_blocks < 1:
            raise ConfigError(f"batch_blocks must be at least 1, not {self.batch_blocks}.")

    def plan(self) -> list[str]:
        categories = read_categories(self.pairs, min_pairs=_MIN_PAIRS)
        if self.template.count("{prompt}") != 1:
            raise ConfigError(f"template must hold {{prompt}} once, where the prompt goes; it is {self.template!r}.")
        n = sum(len(category.pairs) for category in categories)
        return [
            plan_sae(self.sae)[0],
            plan_model(self.model),
            f"{n:,} prompt pairs in {len(categories)} categories: {', '.join(c.name for c in categories)}.",
            f"All latents that are active on {self.probing.min_active} prompts of a category are tested in it at a "
            f"false-discovery rate of {self.probing.q:g}; {self.probing.scrambles} times more with sides swapped.",
        ]

    def study(self, folder: Path, *, progress: bool) -> dict[str, Any]:
        categories = read_categories(self.pairs, min_pairs=_MIN_PAIRS)
        sae, model = self.sae.load(self.model.device), self.model.load()
        hook_name = check_sae(sae, self.sae.hook_name)
        means = pair_means(
            model,
            sae,
            categories,
            hook_name=hook_name,
            template=self.template,
            statistic=self.statistic,
            batch_blocks=self.batch_blocks,
            progress=progress,
        )
        found = probe_pairs(means, self.probing)
        facts = {
            "model": model_facts(model),
            "sae": {**self.sae.source(), "hook_name": hook_name, "hash": sae_hash(sae), "d_sae": sae.cfg.d_sae},
            "pairs": Path(self.pairs).name,
            "template": self.template,
            "statistic": self.statistic,
        }
        files = self._write(folder, found, facts)
        return {**found.to_dict(), **facts, "files": files, "versions": versions()}

    def _write(self, folder: Path, found: Probing, facts: dict[str, Any]) -> dict[str, str]:
        labels = feature_labels(found)
        if not labels:
            return {}
        scrambled = sum(found.scrambled) / len(found.scrambled) if found.scrambled else None
        sae, place = facts["sae"], folder / LABELS
        card = LabelCard(
            title=f"Latents that prompt pairs turn on in {sae.get('sae_id') or sae['hook_name']}",
            license=self.licence,
            facts={"Model": facts["model"]["name"], "Hook": sae["hook_name"], "SAE": sae["hash"]},
            measured=[
                Measured(
                    f"Tests passed at a false-discovery rate of {self.probing.q:g}",
                    float(found.n_passed),
                    control=scrambled,
                    n=found.n_tests,
                    note="control: sides of pairs swapped at random, mean",
                )
            ],
            not_stated=["Whether a latent responds to its property on other prompts than these."],
        )
        written = write_labels(labels, place, card)
        document = to_feature_map(labels, d_sae=sae["d_sae"], sae_path=str(sae.get("path") or sae.get("release")))
        write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", place / FEATURE_MAP)
        files = {**written._asdict(), "feature_map": place / FEATURE_MAP}
        return {form: file.relative_to(folder).as_posix() for form, file in files.items() if isinstance(file, Path)}
