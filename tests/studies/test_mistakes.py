"""Mistakes in recipes: each is one line, names what would have been right, and leaves nothing behind."""

import json

import pytest

from tests.studies.recipes import RECIPES, arguments, call
from tests.support import RELEASE, SAE_ID

NO_GROUPS = "direction.groups=null"
ANSWERED = ("groups.items.group=null", "groups.items.answer=kind")


def fails(kind, folder, *changes, message):
    code, out, err = call(*arguments(kind, folder, *changes))
    assert code == 2 and "Traceback" not in out + err
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]  # the plan is told before
    assert message in line and err.endswith(f"{line}\n")
    assert not folder.exists()


KEYS = [
    ("label", "modle=1", "'model'"),
    ("label", "judgs=1", "'judges'"),
    ("label", "tekst.prompts=1", "'text'"),
    ("label", "exampels.window=1", "'examples'"),
    ("label", "verificaton.alpha=1", "'verification'"),
    ("label", "probs=1", "'probes'"),
    ("label", "wieghts.f1=1", "'weights'"),
    ("label", "helth.x=1", "'health'"),
    ("label", "calibraton=1", "'calibration'"),
    ("label", "samplin.seed=1", "'sampling'"),
    ("label", "promotd=1", "'promoted'"),
    ("label", "keep_firing=1", "'keep_firings'"),
    ("label", "selektion.n=1", "'selection'"),
    ("label", "profil.prompts=1", "'profile'"),
    ("label", "kontrast=1", "'contrast'"),
    ("label", "license=mit", "'licence'"),
    ("label", "listng.layer=1", "'listing'"),
    ("label", "sae.releese=1", "'release'"),
    ("label", "text.promts=1", "'prompts'"),
    ("label", "selection.rul=all", "'rule'"),
    ("label", "judges.1.modell=x", "recipe.judges[1] 'modell'. Did you mean 'model'"),
    ("label", "profile.sampling.resample=1", "'resamples'"),
    ("verify", "label=1", "'labels'"),
    ("verify", "sed=1", "'seed'"),
    ("probe", "pair=1", "'pairs'"),
    ("probe", "templat=1", "'template'"),
    ("probe", "probing.scramble=1", "'scrambles'"),
    ("contrast", "group.group=1", "'groups'"),
    ("contrast", "hoks=[]", "'hooks'"),
    ("contrast", "statistics=max", "'statistic'"),
    ("contrast", "groups.items.propmt=1", "'prompt'"),
    ("contrast", "groups.answers.extracter=1", "'extractor'"),
    ("contrast", "contrast.permutation=1", "'permutations'"),
    ("steer", "item.n=1", "'items'"),
    ("steer", "extracter=exact", "'extractor'"),
    ("steer", "direction.laten=1", "'latent'"),
    ("steer", "stering.scales=[1]", "'steering'"),
    ("steer", "steering.scale=[1]", "'scales'"),
    ("lens", "promts=[a]", "'prompts'"),
    ("lens", "lens.target=[a]", "'targets'"),
    ("lens", "latent=[1]", "'latents'"),
    ("profile", "profile.nearest_token=1", "'nearest_tokens'"),
    ("profile", "outptu=x", "'output'"),
]


@pytest.mark.parametrize(("kind", "change", "right"), KEYS, ids=[change for _, change, _ in KEYS])
def test_a_key_that_is_none(tmp_path, kind, change, right):
    fails(kind, tmp_path / "run", change, message=right)


VALUES = [
    ("label", ["selection.rule=divergance"], "Did you mean 'divergence'"),
    ("label", ["judges.0.kind=opnai"], "Did you mean 'openai'"),
    ("label", ["judges.0.kind=openai"], "needs a model"),
    ("label", ["judges.0.kind=openai", "judges.0.model=m", "verification.scorer=m"], "set OPENAI_API_KEY"),
    ("label", ["judges.0.kind=anthropic", "judges.0.model=m", "verification.scorer=m"], "set ANTHROPIC_API_KEY"),
    ("label", ["judges.0={kind: openai, model: m, api_key_env: NO_KEY}", "verification.scorer=m"], "set NO_KEY"),
    ("label", ["judges.0.kind=openai", "judges.0.model=m"], "String match cannot test labels in words"),
    ("label", ["judges=[]"], "takes two judges, not 0"),
    ("label", ["judges.1.kind=tokens"], "Two judges are called 'token statistics'"),
    ("label", ["profile=null"], "needs a profile"),
    ("label", ["selection.rule=contrast"], "goes with `contrast`"),
    ("label", ["contrast=somewhere"], "goes with `contrast`"),
    ("label", ["selection.rule=contrast", "contrast=nowhere"], "There is no contrast in nowhere"),
    ("label", ["selection.rule=given"], "needs latents"),
    ("label", ["selection.rule=given", "selection.latents=[2047,2048]"], "There is no latent 2048"),
    ("label", ["selection.rule=given", "selection.latents=[-1]"], "There is no latent -1"),
    ("label", ["selection.rule=given", "selection.latents=[3,1,3]"], "Latent 3 is named twice"),
    ("label", ["examples.n_positive=4"], "fewer than verification.min_positives (5)"),
    ("label", ["text.dataset=embedded:txt"], "Did you mean 'embedded:text'"),
    ("label", ["text.split=tarin"], "Did you mean 'train'"),
    ("label", ["text.prompts=0"], "text needs prompts"),
    ("label", ["text.dataset=nowhere.jsonl"], "There is no file nowhere.jsonl"),
    ("label", [f"sae.sae_id={SAE_ID[:-1]}7"], f"Did you mean '{SAE_ID}'"),
    ("label", ["sae.release=gemma-4-demo-res-matryoshka-embeded"], f"Did you mean '{RELEASE}'"),
    ("label", ["sae=null"], "recipe.sae must be a mapping"),
    ("label", ["sae.hook_name=blocks.3.hook_resid_pots"], "Did you mean 'blocks.3.hook_resid_post'"),
    ("label", ["model.name=gemma-4-dmo"], "Did you mean 'gemma-4-demo'"),
    ("label", ["model.class_name=Gemma4ProxyLN"], "Did you mean 'Gemma4ProxyLM'"),
    ("label", ["listing.set_name=Not so"], "'not-so' would do"),
    ("label", ["selection.n=many"], "recipe.selection.n must be int"),
    ("label", ["judges.5.kind=tokens"], "'5' is no entry of a list of 2"),
    ("label", ["selection.n.x=1"], "no mapping or list"),
    ("label", ["selection.n=[1"], "is not YAML"),
    ("label", ["nonsense"], "--set takes KEY=VALUE"),
    ("label", ["=1"], "--set takes KEY=VALUE"),
    ("verify", ["labels=nowhere.jsonl"], "There are no labels at nowhere.jsonl"),
    ("verify", ["labels=catalogue"], "gemma-4-31b-res-topk-adam1010"),
    ("verify", ["labels=recipes/interp/demo-verify.yaml"], "demo-verify.yaml"),
    ("verify", ["labels=pyproject.toml", "judges=[]"], "takes one judge"),
    ("probe", ["pairs=nowhere.yaml"], "nowhere.yaml cannot be read"),
    ("probe", ["pairs=recipes/interp/demo-items.yaml"], "must be a mapping, not list"),
    ("probe", ["template=no slot"], "{prompt} once"),
    ("probe", ["batch_blocks=0"], "batch_blocks must be at least 1"),
    ("contrast", ["groups.items.dataset=nowhere.yaml"], "nowhere.yaml cannot be read"),
    ("contrast", ["groups.items.dataset=nowhere.jsonl"], "There is no file nowhere.jsonl"),
    ("contrast", ["groups.items.group=kidn"], "Did you mean 'kind'"),
    ("contrast", ["groups.items.prompt=txet"], "Did you mean 'text'"),
    ("contrast", ["groups.items.group=null"], "Name the column with the groups"),
    ("contrast", ["groups.items.n=1"], "all 1 items are in 'files'"),
    ("contrast", ["groups.group=flies"], "Did you mean 'files'"),
    ("contrast", ["groups.answers.extractor=exact"], "no `items.group`"),
    ("contrast", [*ANSWERED, "groups.answers.extractor=gsm9k"], "Did you mean 'gsm8k'"),
    ("contrast", ["groups.count=response"], "Of item 0 no token counts"),
    ("contrast", ["hooks=[blocks.3.hook_resid_pots]"], "Did you mean 'blocks.3.hook_resid_post'"),
    ("contrast", ["hooks=[]", "saes=[]"], "names anything to compare"),
    ("contrast", ["batch_items=0"], "batch_items must be at least 1"),
    ("contrast", [f"saes=[{{release: {RELEASE}, sae_id: {SAE_ID}}}, {{release: {RELEASE}, sae_id: {SAE_ID}}}]"],
     "Two of the SAEs read the same hook"),
    ("steer", ["steering.scales=[0.0]"], "scales must be positive shares"),
    ("steer", ["extractor=contians"], "Did you mean 'contains'"),
    ("steer", ["extractor=regex:("], "is not a regular expression"),
    ("steer", ["items.answer=null"], "Name the column that holds the right answers"),
    ("steer", ["items.answer=anwser"], "Did you mean 'answer'"),
    ("steer", ["direction.groups.group=flies"], "Did you mean 'files'"),
    ("steer", ["direction.hook_name=null"], "State `hook_name`"),
    ("steer", ["direction.hook_name=blocks.3.hook_resid_pots"], "Did you mean 'blocks.3.hook_resid_post'"),
    ("steer", ["direction.file=v.npy"], "A direction is of one kind"),
    ("steer", [NO_GROUPS, "direction.file=nowhere.npy"], "There is no vector at nowhere.npy"),
    ("steer", [NO_GROUPS, f"direction.sae={{release: {RELEASE}, sae_id: {SAE_ID}}}"], "go together"),
    ("steer", [NO_GROUPS, f"direction.sae={{release: {RELEASE}, sae_id: {SAE_ID}}}", "direction.latent=2048"],
     "There is no latent 2048"),
    ("lens", ["items=null"], "either `prompts`"),
    ("lens", ["prompts=[a]"], "either `prompts`"),
    ("lens", ["items=null", "prompts=[]"], "texts that are not empty"),
    ("lens", ["lens.targets=[no such word]"], "Target 'no such word' is"),
    ("lens", ["lens.layers=[6]"], "There is no layer 6"),
    ("lens", ["lens.top=0"], "lens.top"),
    ("lens", ["latents=[2048]"], "There is no latent 2048"),
    ("lens", ["latents=null"], "`sae` and `latents` go together"),
    ("profile", ["model.name=nothing"], "Unknown model 'nothing'. Known: gemma-4-demo"),
    ("profile", ["profile.prompts=0"], "prompts above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), VALUES, ids=[f"{k} {' '.join(c)[:60]}" for k, c, _ in VALUES])
def test_a_value_that_cannot_be_used(tmp_path, monkeypatch, kind, changes, message):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "NO_KEY"):
        monkeypatch.delenv(name, raising=False)
    if kind == "verify" and not any(change.startswith("labels=") for change in changes):
        changes = ["labels=catalogue", *changes]
    fails(kind, tmp_path / "run", *changes, message=message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no label of this SAE"),
        (json.dumps({"index": 2048, "label": "x", "source": "me"}), "there is no latent 2048; they are 0 to 2047"),
        ("{", "line 1"),
    ],
)
def test_labels_that_are_none_are_told_before_the_text_is_read(tmp_path, content, message):
    file = tmp_path / "labels.jsonl"
    file.write_text(content)
    fails("verify", tmp_path / "run", f"labels={file}", message=message)
    assert message in call(*arguments("verify", tmp_path / "run", f"labels={file}"), "--dry-run")[2]


def test_an_output_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    code, _, err = call(*arguments("profile", file))
    assert (
        code == 2
        and err.endswith(f"\nError: Output {file} cannot be made: File exists.\n")
        and file.read_text() == "kept"
    )
    code, _, err = call(*arguments("profile", file / "below"))
    assert code == 2 and "Not a directory" in err
    code, _, err = call(*arguments("profile", ""))
    assert code == 2 and err.endswith("\nError: `output` is empty: name a folder.\n")


def test_what_is_in_the_folder_stays(tmp_path):
    (tmp_path / "mine").write_text("kept")
    code, _, err = call(*arguments("lens", tmp_path, "lens.layers=[6]"))
    assert code == 2 and "There is no layer 6" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must be a mapping"),
        ("text", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("output: x\n", "recipe lacks model, text"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_recipe_that_is_none(tmp_path, content, message):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    code, out, err = call("interp", "profile", recipe)
    assert code == 2 and message in err and err.count("\n") == 1 and not out


def test_a_recipe_of_another_kind():
    code, _, err = call("interp", "steer", RECIPES / "demo-label.yaml")
    assert code == 2 and "Unknown key in recipe" in err and err.count("\n") == 1


def test_a_command_that_is_none():
    code, _, err = call("interp", "labell", "x.yaml")
    assert code == 2 and "labell" in err and "'label'" in err
    code, _, err = call("interp", "label", RECIPES / "demo-label.yaml", "--dryrun")
    assert code == 2 and "--dry-run" in err
    assert call("interp", "label")[0] == 2


def test_help_names_every_command():
    code, out, _ = call("interp", "--help")
    assert code == 0
    for name in ("profile", "label", "verify", "probe", "contrast", "steer", "lens"):
        assert f"\n  {name} " in out and call("interp", name, "--help")[0] == 0
