// The page: from the address to a latent and back, keys, and the words that are shown when something is missing.

const HEAD = JSON.parse(at("head").textContent);
const ALONE = HEAD.index !== undefined; // one file, no server
const wide = matchMedia("(min-width: 60rem) and (min-height: 30rem)");
let [ready, whole, current, asked, top] = [false, false, null, 0, null];

const get = async (path) => {
  let answer;
  try {
    answer = await fetch(path);
  } catch {
    throw new Error("The server does not answer; it may have been stopped. Start it again and reload this page.");
  }
  let found;
  try {
    found = await answer.json();
  } catch {
    throw new Error(`What the server sent of ${path} cannot be read.`);
  }
  if (!answer.ok) throw new Error(found.error ?? `The server answers ${answer.status}.`);
  return found;
};

const dashboard = async (latent) => {
  if (!latents.has(latent)) throw new Error(`There is no latent ${latent}${ALONE ? " in this file" : ""}.`);
  if (!ALONE) return get(`latent/${latent}.json`);
  return JSON.parse(at(`latent-${latent}`).textContent);
};

const latents = makeList((latent) => go(latent));

const facts = (pairs_) => {
  at("facts").replaceChildren(...pairs_.map(([term, text]) =>
    el("div", {}, el("dt", {}, term), el("dd", {}, named(text)))));
};

const go = (latent) => {
  if (location.hash === `#${latent}`) show(latent);
  else location.hash = `#${latent}`;
};

const fromAddress = () => (/^#\d{1,9}$/.test(location.hash) ? Number(location.hash.slice(1)) : null);

const message = (latent, text) => {
  top = null;
  at("latent").replaceChildren(
    el("h2", { tabindex: -1, id: "latent-title" }, "Latent ", el("span", {}, String(latent))),
    el("p", { class: "note", role: "alert" }, named(text)));
};

const show = async (latent, first = false) => {
  const turn = (asked += 1);
  const inside = at("detail").contains(document.activeElement);
  fold(true);
  if (!wide.matches && document.activeElement === at("search")) at("search").blur();
  current = latent;
  latents.mark(latent);
  const late = setTimeout(() => at("latent").classList.add("waiting"), 150);
  try {
    const feature = await dashboard(latent);
    if (turn !== asked) return;
    const parts = detail(latent, feature, latents, whole, span);
    [top] = parts;
    at("latent").replaceChildren(...parts.filter(Boolean));
    say(`Latent ${latent}${latents.label(latent) ? `: ${named(latents.label(latent))}` : ""}`);
  } catch (error) {
    if (turn !== asked) return;
    message(latent, error.message);
  } finally {
    clearTimeout(late);
    if (turn === asked) at("latent").classList.remove("waiting");
  }
  document.title = `Latent ${latent} · ${named(HEAD.title)}`;
  tip.hide();
  at("detail").scrollTop = 0;
  if (!wide.matches && !first) at("pane").scrollIntoView();
  if (inside) at("latent-title").focus({ preventScroll: true });
};

const span = (now) => {
  whole = now;
  tip.hide();
  top?.whole?.(now);
};

const found = (text) => { at("found").textContent = text; };

const search = () => {
  const text = at("search").value;
  const which = document.querySelector("[name=which]:checked").value;
  const { found: n, of } = latents.find(text, at("sort").value, which);
  const kind = which === "all" ? "latents" : `${which} latents`;
  const asNumber = text.trim().replace(/^#/, "");
  if (text.trim() === "") found(`${count(of)} ${kind}`);
  else if (n === 0 && /^\d+$/.test(asNumber)) found(`There is no latent ${asNumber}${ALONE ? " in this file" : ""}.`);
  else found(`${count(n)} of ${count(of)} ${kind}`);
};

// On a phone the list is folded away while a latent is read.
const fold = (folded) => {
  const now = folded && !wide.matches;
  at("pane").classList.toggle("folded", now);
  at("fold").setAttribute("aria-expanded", String(!now));
};

const tip = (() => {
  const box = at("tip");
  let line = null;
  const on = (token) => {
    const [unit, value, length] = token.facts;
    const bytes = unit.to > unit.from ? `, ${unit.to - unit.from + 1} byte pieces` : "";
    box.replaceChildren(
      el("code", { class: "token" }, alone(unit.text)), " ", el("b", {}, value),
      el("small", {}, `token ${unit.from + 1} of ${length}${bytes}`));
    box.hidden = false; // else it has no size
    const place = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const pane = at("detail").getBoundingClientRect();
    box.hidden = place.bottom < pane.top || place.top > innerHeight;
    const left = Math.min(Math.max(8, place.left), Math.max(8, innerWidth - box.offsetWidth - 8));
    const above = place.top - box.offsetHeight - 6;
    box.style.left = `${left}px`;
    box.style.top = `${above < 4 ? place.bottom + 6 : above}px`;
  };
  const here = () => line?.querySelector(".here");
  const hide = () => {
    box.hidden = true;
    here()?.classList.remove("here");
    line = null;
  };
  const follow = () => (here() ? on(here()) : hide()); // what keys walk through is scrolled to; it is still asked for
  const step = (text, key) => {
    const tokens = [...text.querySelectorAll(".t")];
    const now = tokens.findIndex((t) => t.classList.contains("here"));
    const start = Math.max(0, tokens.findIndex((t) => t.matches(".about, .strongest")));
    const to = { ArrowRight: now < 0 ? start : now + 1, ArrowLeft: now < 0 ? start : now - 1, Home: 0, End: tokens.length - 1 }[key];
    const token = to === undefined ? undefined : tokens[Math.min(tokens.length - 1, Math.max(0, to))];
    if (token === undefined) return false;
    hide();
    line = text;
    token.classList.add("here");
    token.scrollIntoView({ block: "nearest" });
    on(token);
    say(token.said);
    return true;
  };
  return { on, hide, follow, step };
})();

const token = (event) => event.target.closest?.(".t");
at("latent").addEventListener("pointerover", (event) => { if (token(event)) tip.on(token(event)); });
at("latent").addEventListener("pointerout", (event) => { if (event.pointerType === "mouse" && token(event)) tip.hide(); });
at("latent").addEventListener("click", (event) => { if (token(event)) tip.on(token(event)); else tip.hide(); });
at("latent").addEventListener("focusout", () => tip.hide());
addEventListener("scroll", () => tip.follow(), { passive: true, capture: true });

const keys = at("keys");
const typing = (element) => element.matches("input[type=search], select, textarea");

const inList = { Enter: 1, ArrowDown: 1, ArrowUp: 1, PageDown: 1, PageUp: 1 };
const onKey = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
  const focus = document.activeElement ?? document.body;
  const [searching, listing] = [focus === at("search"), focus === at("list")];
  const { key } = event;
  let done = true;
  if (key === "Escape") {
    tip.hide();
    if (!searching) return;
    if (at("search").value === "") at("list").focus();
    at("search").value = "";
    search();
  } else if (focus.matches(".text") && tip.step(focus, key)) {
    done = true;
  } else if (searching ? key in inList : listing || (!typing(focus) && "jk".includes(key))) {
    if (key !== "Enter" && key !== " ") done = latents.key(key);
    else if (latents.active() !== undefined) go(latents.active());
  } else {
    done = false;
  }
  if (!done && !typing(focus)) {
    const beside = { "[": -1, "]": 1 }[key];
    done = true;
    if (key === "/") { fold(false); at("search").focus(); at("search").select(); }
    else if (key === "w") span(!whole);
    else if (key === "?") keys.showModal();
    else if (key === "Enter" && focus === document.body && latents.active() !== undefined) go(latents.active());
    else if (beside && latents.beside(current, beside) !== undefined) go(latents.beside(current, beside));
    else done = false;
  }
  if (done) event.preventDefault();
};

addEventListener("keydown", onKey);
addEventListener("hashchange", () => { if (ready && fromAddress() !== null) show(fromAddress()); });
at("skip").addEventListener("click", (event) => { event.preventDefault(); at("detail").focus(); });
at("search").addEventListener("input", () => { fold(false); search(); });
at("search").addEventListener("focus", () => fold(false));
at("sort").addEventListener("change", search);
at("filter").addEventListener("change", search);
at("fold").addEventListener("click", () => fold(!at("pane").classList.contains("folded")));
at("keys-button").addEventListener("click", () => keys.showModal());
at("keys-close").addEventListener("click", () => keys.close());
const fit = () => { at("about").open = wide.matches; fold(current !== null); };
wide.addEventListener("change", fit);

const start = (index) => {
  ready = true;
  latents.given(index, index.dead);
  const [live, dead] = [HEAD.n_live ?? index.index.length, HEAD.n_dead ?? list(index.dead).length];
  const here = ALONE ? `, ${count(index.index.length)} of them in this file` : "";
  facts([...list(HEAD.facts), ["Latents", `${count(live)} live, ${count(dead)} dead${here}`]]);
  search();
  const latent = fromAddress();
  if (latent !== null) {
    show(latent, true);
  } else if (latents.first() !== undefined) {
    history.replaceState(null, "", `#${latents.first()}`);
    show(latents.first(), true).then(() => fold(false));
  }
};

at("title").textContent = named(HEAD.title);
facts(list(HEAD.facts));
fit();
if (ALONE) start(HEAD.index);
else get("latents.json").then(start, (error) => {
  found("The list of latents cannot be shown.");
  at("latent").replaceChildren(el("p", { class: "note", role: "alert" }, named(error.message)));
});
