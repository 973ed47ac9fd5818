// The list of latents: all of them in columns, those asked for in an order, and of these only the rows in sight as elements.

const AROUND = 6; // rows beyond the edges, so that scrolling shows no gap

const makeList = (open) => {
  const box = at("list");
  const space = el("div", { class: "space", role: "presentation" });
  box.append(space);
  const columns = { index: [], density: [], max: [], token: [], logit: [] };
  let [labels, dead, labelled, shelved] = [{}, [], false, ""];
  let rowOf = new Map(); // a latent's row in the columns; of a dead one, −1
  let shown = []; // latents in the order of the list
  let [wanted, active, opened, rowHeight] = ["", 0, null, 40];
  let texts = null; // lower case, for the search; made when one begins

  const given = (data, dead_) => {
    for (const name of Object.keys(columns)) columns[name] = list(data[name]);
    [labels, dead] = [data.labels ?? {}, list(dead_)];
    labelled = Object.keys(labels).length > 0;
    rowOf = new Map(dead.map((latent) => [latent, -1]));
    columns.index.forEach((latent, row) => rowOf.set(latent, row));
    at("shelf").classList.toggle("labelled", labelled);
    at("shelf").style.setProperty("--digits", String(Math.max(columns.index.at(-1) ?? 0, dead.at(-1) ?? 0)).length);
    texts = null;
  };

  const searchable = () => {
    if (texts !== null) return texts;
    const known = new Map(); // few tokens, many latents
    const lower = (token) => {
      if (!known.has(token)) known.set(token, lone(token).toLowerCase());
      return known.get(token);
    };
    texts = columns.index.map((latent, row) =>
      [(labels[latent] ?? "").toLowerCase(), lower(columns.token[row]), lower(columns.logit[row])]);
    return texts;
  };

  const order = (by) => {
    const [name, down] = [by.replace("-", ""), by.endsWith("-")];
    const rows = columns.index.map((_, row) => row);
    if (name === "index") return rows.map((row) => columns.index[row]);
    const key = (row) => (isNumber(columns[name][row]) ? columns[name][row] : down ? -Infinity : Infinity);
    rows.sort((a, b) => (down ? key(b) - key(a) : key(a) - key(b)) || a - b);
    return rows.map((row) => columns.index[row]);
  };

  // Latents that hold the text, those that are it before others; a number's own latent is the first.
  const holding = (latents, text) => {
    const exactly = [], partly = [];
    for (const latent of latents) {
      const row = rowOf.get(latent);
      const found = row < 0 ? [(labels[latent] ?? "").toLowerCase()] : searchable()[row];
      if (found.some((t) => t.trim() === text)) exactly.push(latent);
      else if (found.some((t) => t.includes(text))) partly.push(latent);
    }
    const asNumber = /^#?\d{1,9}$/.test(text) ? Number(text.replace("#", "")) : NaN;
    const others = [...exactly, ...partly].filter((latent) => latent !== asNumber);
    return rowOf.has(asNumber) ? [asNumber, ...others] : others;
  };

  const find = (text, by, which) => {
    wanted = text.trim().toLowerCase();
    const live = which === "dead" ? [] : order(by);
    const latents = which === "live" ? live : by === "index" ? [...live, ...dead].sort((a, b) => a - b) : [...live, ...dead];
    shown = wanted === "" ? latents : holding(latents, wanted);
    active = Math.max(0, wanted === "" ? shown.indexOf(opened) : 0);
    space.replaceChildren();
    shelved = "";
    resize();
    box.scrollTop = 0;
    reveal();
    return { found: shown.length, of: latents.length };
  };

  const resize = () => {
    const probe = el("div", { class: "row" });
    space.append(probe);
    rowHeight = probe.offsetHeight || rowHeight;
    probe.remove();
    space.style.height = `${shown.length * rowHeight}px`;
    shelved = "";
    draw();
  };

  const reveal = () => {
    const [top, bottom] = [active * rowHeight, (active + 1) * rowHeight];
    if (top < box.scrollTop) box.scrollTop = top;
    else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
    draw();
  };

  const draw = () => {
    const first = Math.max(0, Math.floor(box.scrollTop / rowHeight) - AROUND);
    const last = Math.min(shown.length - 1, Math.ceil((box.scrollTop + box.clientHeight) / rowHeight) + AROUND);
    const key = `${first} ${last} ${active} ${opened} ${wanted}`;
    if (key === shelved) return;
    shelved = key;
    const rows = [];
    for (let i = first; i <= last; i += 1) rows.push(option(i));
    if (shown.length && (active < first || active > last)) rows.push(option(active));
    space.replaceChildren(...rows);
    for (const field of [box, at("search")]) {
      if (shown.length) field.setAttribute("aria-activedescendant", `option-${active}`);
      else field.removeAttribute("aria-activedescendant");
    }
  };

  const option = (i) => {
    const latent = shown[i];
    const row = rowOf.get(latent);
    const label = labels[latent];
    const element = el(
      "div",
      { class: `row${i === active ? " active" : ""}${row < 0 && !label ? " bare" : ""}`, role: "option", id: `option-${i}`, "data-latent": latent,
        "aria-selected": String(latent === opened), "aria-setsize": shown.length, "aria-posinset": i + 1 },
      el("b", {}, String(latent)),
      labelled && (row >= 0 || label) ? el("span", { class: "label" }, ...(label ? marked(named(label), wanted) : ["no label"])) : null,
      row < 0
        ? el("span", { class: "tokens" }, HEAD.skipped)
        : el("span", { class: "tokens" }, chip(columns.token[row], wanted), el("span", { class: "to" }, " → "), chip(columns.logit[row], wanted)),
      row < 0 ? null : el("span", { class: "num density" }, percent(columns.density[row])),
      row < 0 ? null : el("span", { class: "num max" }, number(columns.max[row])),
    );
    if (label === undefined && labelled && row >= 0) element.classList.add("unlabelled");
    element.style.transform = `translateY(${i * rowHeight}px)`;
    return element;
  };

  const move = (to) => {
    if (shown.length === 0) return;
    active = Math.min(shown.length - 1, Math.max(0, to));
    reveal();
  };
  const page = () => Math.max(1, Math.floor(box.clientHeight / rowHeight) - 1);

  box.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  new ResizeObserver(() => requestAnimationFrame(resize)).observe(box);
  box.addEventListener("click", (event) => {
    const row = event.target.closest("[role=option]");
    if (row) open(Number(row.dataset.latent));
  });

  return {
    given, find,
    has: (latent) => rowOf.has(latent),
    label: (latent) => labels[latent],
    active: () => shown[active],
    first: () => shown[0] ?? columns.index[0],
    // The latent before or after in the list; of one that the list does not show, by number among those alive.
    beside: (latent, step) => {
      const place = shown.indexOf(latent);
      if (place >= 0) return shown[place + step];
      const next = columns.index.findIndex((other) => other >= latent);
      const after = next < 0 ? columns.index.length : next;
      return columns.index[step < 0 ? after - 1 : after + (columns.index[after] === latent ? 1 : 0)];
    },
    // The key's step in the list, if it is one that moves there.
    key: (key) => {
      const to = { ArrowDown: active + 1, j: active + 1, ArrowUp: active - 1, k: active - 1, PageDown: active + page(),
        PageUp: active - page(), Home: 0, End: shown.length - 1 }[key];
      if (to !== undefined) move(to);
      return to !== undefined;
    },
    mark: (latent) => {
      opened = latent;
      const place = shown.indexOf(latent);
      if (place >= 0) move(place);
      else draw();
    },
  };
};
