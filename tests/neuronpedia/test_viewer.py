"""The viewer as its reader meets it: in a real browser, against what lies in the folder's files."""

import json
import os
import re
import shutil
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from sae_lens_gemma4 import cli, report
from sae_lens_gemma4.cli import viewing
from sae_lens_gemma4.errors import ConfigError, DataError, SAEError
from sae_lens_gemma4.neuronpedia import viewer as viewer_module
from sae_lens_gemma4.neuronpedia.folder import LATENTS, SCHEMA, SETTINGS
from sae_lens_gemma4.neuronpedia.server import Server, make_server
from sae_lens_gemma4.neuronpedia.viewer import Viewer, single_file
from tests.neuronpedia.sample import write_dashboards

DEAD = (3, 11)
LABELS = {0: "names of animals", 5: "French accents", 12: "animals that sat", 11: "a dead one"}
HOSTILE = "</script><img src=x onerror=\"document.title='broken in'\">"
# Of every element that shows text of its own: WCAG's contrast of that text with what is painted behind it.
CONTRASTS = """() => {
  const parse = (c) => { const x = c.match(/[\\d.]+/g).map(Number); return [x[0], x[1], x[2], x[3] ?? 1]; };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const luminance = (c) => c.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  for (const el of document.querySelectorAll("body *")) {
    const text = [...el.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent).join("").trim();
    if (!text || !el.checkVisibility() || el.matches("script, span.step, option") || el.closest(".unseen")) continue;
    const chain = [];
    for (let e = el; e; e = e.parentElement) chain.unshift(parse(getComputedStyle(e).backgroundColor));
    const behind = chain.reduce((under, c) => over(c, under), [255, 255, 255]);
    const front = over(parse(getComputedStyle(el).color), behind);
    const [a, b] = [luminance(front), luminance(behind)].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), el.className + " " + text.slice(0, 30)]);
  }
  return found;
}"""

# Of every row of a table of logits: the number, and how much of its cell the bar takes.
BARS = """rows => rows.map((row) => {
  const [bar, cell] = ["i", ".length"].map((part) => row.querySelector(part).getBoundingClientRect().width);
  return [row.querySelector(".num").title, bar / cell];
})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dashboards(tmp_path_factory.mktemp("run") / "dashboards", d_sae=20, dead=DEAD)


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    missing = "a Chromium" if path is None else "playwright" if find_spec("playwright") is None else None
    if missing and os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(f"{missing} is not installed, and REQUIRE_BROWSER is set")
    if missing:
        pytest.skip(f"{missing} is not installed")
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as e:
            if os.environ.get("REQUIRE_BROWSER"):
                raise
            pytest.skip(f"{path} does not run here: {e.message.splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serving():
    """Serve a folder; returns its address."""
    servers = []

    def start(folder, labels=None):
        server = make_server(folder, port=0, labels=labels)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server.url

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def address(folder, serving):
    return serving(folder, LABELS)


@pytest.fixture
def visit(browser):
    """Open an address in a window of its own. What the page complains of fails the test."""
    contexts, complaints = [], []

    def open_page(url, width=1280, height=1200, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(url)
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def dashboards_in(folder):
    """Every dashboard of the folder by index, read without the package."""
    batches = [json.loads(path.read_text()) for path in folder.glob("batch-*.json")]
    return {feature["feature_index"]: feature for batch in batches for feature in batch["features"]}


def foreign(folder, features, **settings):
    """A folder as sae-dashboard leaves it: batches, and settings of its own."""
    folder.mkdir()
    header = {"model_id": "gemma-4-e2b", "layer": 7, "sae_set": "theirs", "sae_id_suffix": None}
    (folder / "batch-0.json").write_text(json.dumps({**header, "features": features}))
    if settings:
        (folder / SETTINGS).write_text(json.dumps(settings))
    return folder


def listed(page):
    return page.eval_on_selector_all("[role=option]", "rows => rows.map(row => Number(row.dataset.latent))")


def shown(page, latent):
    page.locator("#latent-title", has_text=re.compile(f"^Latent {latent}$")).wait_for(state="attached")
    return page


def search(page, text):
    page.fill("#search", text)
    return page.inner_text("#found")


# ------------------------------------------------------------------------------------------------ the list


def test_the_page_says_what_was_measured_and_lists_the_living(visit, address):
    page = shown(visit(address), 0)
    assert page.inner_text("h1") == "gemma-4-e4b/21-matryoshka-res-65k"
    facts = page.inner_text("#facts")
    for fact in ("google/gemma-4-E4B (bfloat16)", "blocks.21.hook_resid_post", "jumprelu", "embedded:text [train]",
                 "1,984 in 64 prompts of 32", "18 live, 2 dead", "layer_21_width_65k_l0_100"):  # fmt: skip
        assert fact in facts
    assert page.inner_text("#found") == "18 live latents"
    assert listed(page) == [i for i in range(20) if i not in DEAD]
    assert page.url.endswith("#0")


def test_a_number_jumps_to_its_latent_a_dead_one_too(visit, address):
    page = shown(visit(address), 0)
    search(page, "12")
    assert listed(page)[0] == 12
    page.keyboard.press("Enter")
    shown(page, 12)
    search(page, "#11")
    page.keyboard.press("Enter")
    shown(page, 11)
    assert "never fired on this text" in page.inner_text("#latent .note")
    assert [a.inner_text() for a in page.query_selector_all(".related a")] == ["12", "13", "14"]
    assert search(page, "4711") == "There is no latent 4711."


def test_text_is_searched_in_labels_and_both_tokens(visit, address, folder):
    page = shown(visit(address), 0)
    assert search(page, "ANIMALS") == "2 of 18 live latents"
    assert listed(page) == [0, 12]
    assert [mark.inner_text() for mark in page.query_selector_all(".row mark")] == ["animals", "animals"]
    features = dashboards_in(folder)
    strongest = {}
    for index, feature in features.items():
        value, token = max(
            (v, t) for a in feature["activations"] for v, t in zip(a["values"], a["tokens"], strict=True)
        )
        strongest[index] = token
        assert value > 0
    search(page, "sat")
    expected = {i for i, f in features.items() if "▁sat" in (strongest[i], f["pos_str"][0])}
    assert set(listed(page)) == expected | {12} and len(expected) > 1
    assert search(page, "no such thing") == "0 of 18 live latents"


@pytest.mark.parametrize(("name", "key"), [("density", "frac_nonzero"), ("max", None)])
def test_the_list_sorts_by_density_and_by_the_strongest(visit, address, folder, name, key):
    features = dashboards_in(folder)
    value = {i: f[key] if key else max(max(a["values"]) for a in f["activations"]) for i, f in features.items()}
    page = shown(visit(address), 0)
    for option, down in ((f"{name}-", True), (name, False)):
        page.select_option("#sort", option)
        assert listed(page) == sorted(value, key=lambda i: value[i], reverse=down)


def test_dead_latents_are_listed_by_number_only(visit, address):
    page = shown(visit(address), 0)
    page.check("[name=which][value=dead]")
    assert listed(page) == list(DEAD)
    assert [row.inner_text().split("\n")[-1] for row in page.query_selector_all("[role=option]")] == [
        "never fired on this text"
    ] * 2
    page.check("[name=which][value=all]")
    assert listed(page) == list(range(20))
    assert page.inner_text("#found") == "20 latents"


def test_of_65_536_latents_only_those_in_sight_are_elements(visit, serving, tmp_path):
    folder = write_dashboards(tmp_path / "wide", d_sae=8, dead=(), per_file=8)
    columns = json.loads((folder / LATENTS).read_text())
    many = {name: [values[i % 8] for i in range(65_536)] for name, values in columns.items()}
    (folder / LATENTS).write_text(json.dumps(many | {"index": list(range(65_536))}))
    page = shown(visit(serving(folder) + "#5"), 5)
    assert page.inner_text("#found") == "65,536 live latents"
    assert len(listed(page)) < 60
    page.focus("#list")
    page.keyboard.press("End")
    page.wait_for_selector("[role=option][data-latent='65535'].active")
    assert len(listed(page)) < 60
    assert page.get_attribute("#option-65535", "aria-posinset") == "65536"
    page.evaluate("document.getElementById('list').scrollTop = 0.5 * document.getElementById('list').scrollHeight")
    page.wait_for_selector("[role=option][data-latent='32768']")
    assert len(listed(page)) < 60
    assert search(page, "40000").startswith("1 of 65,536")


# ------------------------------------------------------------------------------------------------ one latent


def test_tokens_are_painted_by_their_values(visit, address, folder):
    feature = dashboards_in(folder)[5]
    page = shown(visit(address + "#5"), 5)
    page.keyboard.press("w")
    largest = max(max(a["values"]) for a in feature["activations"])
    top = sorted((a for a in feature["activations"] if a["bin_min"] == -1), key=lambda a: -max(a["values"]))
    first = page.query_selector(".group li")
    painted = first.eval_on_selector_all(
        ".t", "ts => ts.map(t => [Number(t.dataset.at), Number(t.dataset.value), getComputedStyle(t).backgroundColor])"
    )
    assert [value for _, value, _ in painted] == [top[0]["values"][at] for at, _, _ in painted]
    assert sum(value > 0 for _, value, _ in painted) == sum(v > 0 for v in top[0]["values"]) > 0
    for _, value, color in painted:
        alpha = float(re.findall(r"[\d.]+", color)[3])
        assert alpha == pytest.approx(0.7 * value / largest, abs=0.006)
    marked = first.query_selector_all(".strongest")
    assert [m.get_attribute("data-at") for m in marked] == [str(top[0]["values"].index(max(top[0]["values"])))]
    assert page.inner_text(".firing b >> nth=-1") == f"{largest:.2f}"
    assert f"{100 * feature['frac_nonzero']:.2g} %" in page.inner_text(".firing")
    assert f"({sum(feature['freq_hist_data_bar_heights']):,})" in page.inner_text(".firing")


def test_examples_stand_by_group_strongest_first(visit, address, folder):
    activations = dashboards_in(folder)[5]["activations"]
    page = shown(visit(address + "#5"), 5)
    assert [h.inner_text() for h in page.query_selector_all(".group h3")] == [
        "Top activations 4 examples", "1.00 to 2.00 2 % of tokens, 2 examples", "0.00 to 1.00 1 % of tokens, 2 examples"
    ]  # fmt: skip
    for i, low in enumerate((-1, 1, 0)):
        values = sorted((max(a["values"]) for a in activations if a["bin_min"] == low), reverse=True)
        section = page.query_selector_all(".group")[i]
        assert [float(v.get_attribute("title")) for v in section.query_selector_all(".value")] == values


def test_a_window_or_the_whole_prompt(visit, serving, folder, tmp_path):
    feature = dashboards_in(folder)[0]
    values = [0.0] * 100
    values[50], values[90] = 1.0, 2.0
    long = {"bin_min": 0.0, "bin_max": 2.0, "bin_contains": 0.01, "tokens": [f"▁w{i}" for i in range(100)]}
    feature["activations"] = [{**long, "values": values, "qualifying_token_index": 50}]
    page = shown(visit(serving(foreign(tmp_path / "long", [feature])) + "#0"), 0)
    assert page.inner_text(".text") == "… " + "".join(f" w{i}" for i in range(30, 71)) + " …"
    assert page.inner_text(".about") == " w50"
    page.check("[name=span][value=whole]")
    assert page.inner_text(".text") == "".join(f" w{i}" for i in range(100))
    assert page.inner_text(".strongest") == " w90"
    page.keyboard.press("w")
    assert page.query_selector_all(".t")[0].inner_text() == " w30"
    assert page.is_checked("[name=span][value=window]")


def test_bars_are_as_high_as_the_counts(visit, address, folder):
    feature = dashboards_in(folder)[5]
    page = shown(visit(address + "#5"), 5)
    for kind, name in (("activation", "freq"), ("logit", "logits")):
        heights, middles = (feature[f"{name}_hist_data_bar_{part}"] for part in ("heights", "values"))
        bars = page.eval_on_selector_all(
            f".{kind} rect.bar",
            "bars => bars.map(b => [b.getBoundingClientRect().height, b.getBoundingClientRect().left])",
        )
        tallest = max(height for height, _ in bars)
        assert tallest == pytest.approx(page.locator(f".{kind} svg").bounding_box()["height"], abs=0.5)
        assert page.inner_text(f".{kind} .top") == str(max(heights))
        assert [h / tallest for h, _ in bars] == pytest.approx([h / max(heights) for h in heights], abs=0.01)
        assert [x for _, x in bars] == sorted(x for _, x in bars)
        page.focus(f".{kind} svg")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        low, high, n = re.match(r"(\S+) to (\S+): (\S+) ", page.inner_text(f".{kind} .readout")).groups()
        assert int(n.replace(",", "")) == heights[2]
        assert float(low.replace("−", "-")) < middles[2] < float(high.replace("−", "-"))
        assert page.inner_text("#said").startswith(f"{low} to {high}")


def test_logits_stand_in_the_file_s_order_with_bars(visit, address, folder):
    feature = dashboards_in(folder)[5]
    page = shown(visit(address + "#5"), 5)
    longest = max(map(abs, feature["neg_values"] + feature["pos_values"]))
    for kind in ("neg", "pos"):
        table = page.query_selector(f".{'negative' if kind == 'neg' else 'positive'}")
        rows = table.eval_on_selector_all("tr", BARS)
        assert [float(value.replace("−", "-")) for value, _ in rows] == feature[f"{kind}_values"]
        expected = [abs(v) / longest for v in feature[f"{kind}_values"]]
        assert [width for _, width in rows] == pytest.approx(expected, abs=0.02)
    related = page.inner_text(".related")
    for part in ("Nearest latents", "6\n+0.50", "Correlated latents", "Correlated neurons", "Neuron alignment"):
        assert part in related


def test_a_foreign_folder_that_lacks_nearly_everything_is_shown(visit, serving, tmp_path):
    bare = {"feature_index": 4, "frac_nonzero": None, "pos_str": [], "activations": []}
    silent = {"tokens": ["a", "b"], "values": [0, 0]}
    one_bar = {"freq_hist_data_bar_values": [1], "freq_hist_data_bar_heights": [3], "logits_hist_data_bar_heights": []}
    odd = {
        "feature_index": 9,
        "frac_nonzero": 0.5,
        "pos_str": ["x"],
        "pos_values": [],
        "activations": [silent],
        **one_bar,
    }
    page = shown(visit(serving(foreign(tmp_path / "bare", [bare, odd]))), 4)
    assert page.inner_text("h1") == "gemma-4-e2b/7-theirs"
    assert "There are no examples" in page.inner_text("#latent")
    page.keyboard.press("]")
    shown(page, 9)
    assert page.inner_text(".text") == "ab"
    assert page.query_selector(".strongest") is None


# ------------------------------------------------------------------------------------------------ text


def test_no_token_and_no_label_gets_out_of_its_place(visit, serving, folder, tmp_path):
    feature = dashboards_in(folder)[0]
    tokens = ["▁", HOSTILE, "<0xE2>", "<0x82>", "<0xAC>", "<0xF0>", "\n", "\t", "\u202e", "\u200b", "\u0301", "", "é"]
    values = [0, 3.0, 1.0, 2.0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0]
    feature["activations"] = [
        {
            "bin_min": -1,
            "bin_max": 3.0,
            "bin_contains": -1,
            "tokens": tokens,
            "values": values,
            "qualifying_token_index": 1,
        }
    ]
    feature["pos_str"] = [HOSTILE, "<0xE2>", "\ud83d", *feature["pos_str"][3:]]
    place = foreign(tmp_path / "hostile", [feature])
    alone = single_file(place, tmp_path / "hostile.html", [0], {0: HOSTILE})
    for url in (serving(place, {0: HOSTILE}), alone.as_uri()):
        page = shown(visit(url + "#0"), 0)
        units = page.eval_on_selector_all(".t", "ts => ts.map(t => [t.textContent, t.dataset.value])")
        assert units == [
            [" ", "0"], [HOSTILE, "3"], ["€", "2"], ["⟨xF0⟩", "0"], ["↵", "0"], ["⇥", "0"], ["⟨202E⟩", "0"],
            ["⟨200B⟩", "0"], ["◌\u0301", "0"], ["", "0"], ["é", "0"],
        ]  # fmt: skip
        assert page.inner_text("#latent header .label") == HOSTILE
        assert page.inner_text(".positive code >> nth=0") == HOSTILE
        assert [page.inner_text(f".positive code >> nth={i}") for i in (1, 2)] == ["⟨xE2⟩", "⟨D83D⟩"]
        assert page.query_selector("img") is None
        assert page.title() == "Latent 0 · gemma-4-e2b/7-theirs"
        page.hover(".t >> nth=2")
        assert page.inner_text("#tip") == "€\n \n2\ntoken 3 of 13, 3 byte pieces" or "3 byte pieces" in page.inner_text(
            "#tip"
        )


# ------------------------------------------------------------------------------------------------ getting about


def test_all_of_it_goes_by_keyboard(visit, address):
    page = shown(visit(address), 0)
    for key in ("j", "j", "k", "Enter"):
        page.keyboard.press(key)
    shown(page, 1)
    assert page.url == address + "#1"
    page.keyboard.press("]")
    shown(page, 2)
    page.keyboard.press("]")
    shown(page, 4)  # 3 is dead and not in the list
    page.keyboard.press("[")
    shown(page, 2)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("j")  # letters are text here
    assert page.input_value("#search") == "j"
    page.keyboard.press("Escape")
    assert page.input_value("#search") == ""
    page.keyboard.press("ArrowDown")
    marked = page.get_attribute("#search", "aria-activedescendant")
    assert page.get_attribute(f"#{marked}", "data-latent") == "4"
    assert page.get_attribute("[data-latent='2']", "aria-selected") == "true"
    page.keyboard.press("Enter")
    shown(page, 4)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("?")
    assert page.is_visible("#keys")
    page.keyboard.press("j")  # nothing moves behind it
    page.keyboard.press("Escape")
    assert not page.is_visible("#keys")
    assert page.get_attribute("#list", "aria-activedescendant") == page.get_attribute("[aria-selected=true]", "id")
    page.focus(".text")
    page.keyboard.press("ArrowRight")
    strongest = page.query_selector(".text .strongest")
    assert page.inner_text("#said").endswith(strongest.get_attribute("data-value"))
    assert page.is_visible("#tip") and strongest.get_attribute("data-value") in page.inner_text("#tip")
    ring = page.evaluate("getComputedStyle(document.querySelector('.text')).outlineStyle")
    assert ring == "solid"


def test_an_address_leads_to_its_latent_and_back_to_the_one_before(visit, address):
    page = shown(visit(address + "#7"), 7)
    assert page.title() == "Latent 7 · gemma-4-e4b/21-matryoshka-res-65k"
    page.click(".related a >> text=8")
    shown(page, 8)
    assert page.evaluate("document.activeElement.id") == "latent-title"
    assert page.url.endswith("#8")
    page.go_back()
    shown(page, 7)
    page.go_forward()
    shown(page, 8)
    page.goto(address + "#3")
    assert "never fired on this text" in shown(page, 3).inner_text(".note")
    page.goto(address + "#999")
    assert shown(page, 999).inner_text(".note") == "There is no latent 999."


def test_a_broken_batch_is_named_on_the_page(visit, serving, tmp_path):
    folder = write_dashboards(tmp_path / "broken", d_sae=10, dead=())
    file = folder / "batch-1.json"
    file.write_text("{" * file.stat().st_size)
    page = shown(visit(serving(folder)), 0)
    page.click("[data-latent='9']")
    assert "batch-1.json is not whole" in shown(page, 9).inner_text("[role=alert]")
    page.click("[data-latent='1']")
    shown(page, 1)
    assert len([c for c in visit.complaints if "500" in c]) == 1  # the browser's own log of the answer
    visit.complaints.clear()


# ------------------------------------------------------------------------------------------------ how it looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(visit, address, scheme):
    page = shown(visit(address + "#5", color_scheme=scheme), 5)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    search(page, "sat")
    page.keyboard.press("ArrowDown")
    page.hover(".strongest")
    for state in ("page", "keys"):
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 100
        assert min(contrasts) > [4.5, ""], state
        page.keyboard.press("Escape")
        page.evaluate("document.getElementById('keys').showModal()")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 60) is (scheme == "dark")


def test_a_phone_scrolls_in_one_direction_only(visit, address):
    page = shown(visit(address, width=360, height=740, has_touch=True), 0)
    assert page.is_visible("#list")  # there is no latent in the address: choose one

    def overflow():
        return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    assert overflow() == 0
    page.tap("[data-latent='5']")
    shown(page, 5)
    assert not page.is_visible("#list")
    assert page.get_attribute("#fold", "aria-expanded") == "false"
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.keyboard.press("w")
    assert overflow() == 0
    page.tap(".strongest")
    assert page.is_visible("#tip")
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    page.tap("#fold")
    assert page.is_visible("#list")


def test_the_palette_is_the_reports(monkeypatch):
    def palette(path):
        return [dict(re.findall(r"(--[a-z-]+): ([^;]+);", block)) for block in path.read_text().split("@media")[:2]]

    ours = palette(Path(viewer_module.__file__).parent / "templates" / "viewer.css")
    theirs = palette(Path(report.__file__).parent / "templates" / "page.css")
    for mine, reports in zip(ours, theirs, strict=True):
        shared = mine.keys() & reports.keys()
        assert {k: mine[k] for k in shared} == {k: reports[k] for k in shared}
        assert {"--paper", "--ink", "--muted", "--rule", "--paint", "--deepest"} <= shared


# ------------------------------------------------------------------------------------------------ one file


def test_a_single_file_opens_from_disk_and_asks_nobody(visit, folder, tmp_path):
    out = single_file(folder.parent, tmp_path / "few.html", [12, 5, 0, 5], LABELS)
    page = visit(out.as_uri(), offline=True)
    shown(page, 0)
    asked = []
    page.on("request", lambda r: asked.append(r.url))
    assert page.inner_text("#found") == "3 live latents"
    assert "18 live, 2 dead, 3 of them in this file" in page.inner_text("#facts")
    page.click("[data-latent='12']")
    shown(page, 12)
    assert page.inner_text("#latent header .label") == "animals that sat"
    links = [a.inner_text() for a in page.query_selector_all(".related a")]
    assert set(links) <= {"0", "5", "12"}  # what is not in the file is no link
    assert page.inner_text(".related .latents li span >> nth=0") == "13"
    page.goto(out.as_uri() + "#7")
    assert shown(page, 7).inner_text(".note") == "There is no latent 7 in this file."
    assert asked == []
    assert page.evaluate("fetch('https://example.org').then(() => 'sent', () => 'refused')") == "refused"
    assert any("Content Security Policy" in c for c in visit.complaints)
    visit.complaints.clear()


def test_a_single_file_names_what_it_cannot_hold(folder, tmp_path):
    out = tmp_path / "page.html"
    with pytest.raises(SAEError, match="latents 3, 11 never fired on this text; latent 20 is not there"):
        single_file(folder, out, [3, 5, 11, 20])
    for none_or_many in ([], range(2_001)):
        with pytest.raises(SAEError, match="between 1 and 2,000 latents"):
            single_file(folder, out, none_or_many)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "file" / "page.html"))):
        single_file(folder, tmp_path / "file" / "page.html", [5])


def test_a_single_file_that_fails_leaves_the_one_before(folder, tmp_path, monkeypatch):
    out = single_file(folder, tmp_path / "page.html", [5])
    before = out.read_bytes()
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(ConfigError, match="No space left"):
        single_file(folder, out, [5, 6])
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


# ------------------------------------------------------------------------------------------------ what it is given


def test_numbers_that_json_does_not_have_are_none(tmp_path, folder):
    feature = dashboards_in(folder)[0] | {"frac_nonzero": float("nan"), "pos_values": [float("inf")] * 10}
    viewer = Viewer(foreign(tmp_path / "nan", [feature]), {0: "a", 99: "of nothing"})
    assert viewer.index()["density"] == [None]
    assert viewer.index()["labels"] == {0: "a"}
    assert viewer.latent(0)["pos_values"] == [None] * 10
    assert "vector" not in viewer.latent(0)


def test_a_dashboard_that_lacks_parts_or_is_another_s_is_named(tmp_path):
    with pytest.raises(DataError, match="lacks a part"):
        Viewer(foreign(tmp_path / "odd", [{"feature_index": 1}])).index()
    folder = write_dashboards(tmp_path / "mixed", d_sae=8, dead=())
    columns = json.loads((folder / LATENTS).read_text())
    for name in ("offset", "length"):
        columns[name][2] = columns[name][5]
    (folder / LATENTS).write_text(json.dumps(columns))
    with pytest.raises(DataError, match=r"has not latent 2 where latents\.json says"):
        Viewer(folder).latent(2)
    (folder / "batch-0.json").unlink()
    (folder / "batch-1.json").write_text("{}")
    with pytest.raises(DataError, match=r"batch-0\.json is gone"):
        Viewer(folder).latent(5)


def test_one_file_of_a_foreign_folder_holds_the_same_as_the_server_gives(tmp_path, folder):
    place = foreign(tmp_path / "theirs", list(dashboards_in(folder).values()))
    viewer = Viewer(place)
    assert list(viewer.latents([12, 0])) == [viewer.latent(0), viewer.latent(12)]


def test_what_another_s_run_was_is_told_in_its_words(tmp_path, folder):
    text = {"huggingface_dataset_path": "monology/pile", "n_prompts_total": 24576, "n_tokens_in_prompt": 128}
    place = foreign(tmp_path / "theirs", [dashboards_in(folder)[0]], sae_set="theirs", sae_path="a/b", **text)
    head = Viewer(place).head()
    assert head["facts"] == [
        ("SAE", "theirs a/b"),
        ("Text", "monology/pile"),
        ("Tokens", "24,576 prompts of 128"),
    ]
    assert json.loads((folder / SETTINGS).read_text())["schema"] == SCHEMA


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the entry point; returns exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr("sys.argv", ["sae-lens-gemma4", "dashboard", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            cli.main()
        return (e.value.code, *capsys.readouterr())

    return call


def test_the_command_serves_until_it_is_interrupted(run, folder, monkeypatch):
    opened = threading.Event()
    monkeypatch.setattr("webbrowser.open", lambda url: opened.set())
    seen = []

    def interrupted(server):
        seen.append(server.url)
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    code, out, err = run(folder.parent, "--port", "0")
    assert (code, err) == (0, "")
    assert seen[0] in out
    assert opened.wait(5)
    opened.clear()
    assert run(folder, "--port", "0", "--no-browser")[0] == 0
    assert not opened.wait(0.2)


def test_the_command_writes_one_file(run, folder, tmp_path):
    code, out, _ = run(folder, "--single-file", tmp_path / "a.html", "--latents", "0, 5-7,12")
    assert code == 0 and out.strip() == str(tmp_path / "a.html")
    found = re.findall(r'id="latent-(\d+)"', (tmp_path / "a.html").read_text())
    assert found == ["0", "5", "6", "7", "12"]


def test_labels_come_from_a_file(run, folder, tmp_path):
    (tmp_path / "labels.csv").write_text("index,label\n5,French accents\n12,that sat\n")
    code, _, err = run(
        folder, "--single-file", tmp_path / "a.html", "--latents", "5,6", "--labels", tmp_path / "labels.csv"
    )
    head = re.search(r'id="head">(.*?)</script>', (tmp_path / "a.html").read_text())[1]
    assert (code, err) == (0, "") and json.loads(head)["index"]["labels"] == {"5": "French accents"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--latents", "1"], "go together"),
        (["--single-file", "a.html"], "go together"),
        (["--single-file", "a.html", "--latents", "7-5"], "'7-5' names no latents"),
        (["--single-file", "a.html", "--latents", "1,x"], "'x' names no latents"),
        (["--single-file", "a.html", "--latents", "0-999999999999"], "names no latents"),
        (["--port", "70000"], "70000"),
    ],
)
def test_the_command_answers_a_slip_in_one_line(run, folder, args, words):
    code, _, err = run(folder, *args)
    assert code == 2 and words in err and len(err.splitlines()) == 1


def test_ranges_are_read_in_any_order():
    assert viewing.parse_latents("20-22,5,21") == ({5, 21}, {20, 21, 22})


def test_ranges_pass_over_latents_without_a_dashboard_and_names_do_not(run, folder, tmp_path):
    code, out, _ = run(folder, "--single-file", tmp_path / "a.html", "--latents", "2-5,12")
    assert code == 0 and "1 latents of the ranges have no dashboard" in out
    assert re.findall(r'id="latent-(\d+)"', (tmp_path / "a.html").read_text()) == ["2", "4", "5", "12"]
    code, _, err = run(folder, "--single-file", tmp_path / "b.html", "--latents", "3")
    assert code == 2 and "latent 3 never fired" in err
