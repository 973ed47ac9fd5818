// One latent: what it writes, how it fires, what is like it, and where it fires, as elements. Any part may be missing.

const AROUND_TOKEN = 20; // tokens of a window before and after the one that it is about

const link = (latent, list_) =>
  list_.has(latent) ? el("a", { href: `#${latent}` }, String(latent)) : el("span", {}, String(latent));

// What is like this latent, as a short list of an index, a label where there is one, and a number.
const SHOWN = 5; // of a list; the rest unfolds
const related = (term, pairs, list_ = null) => {
  if (pairs.length === 0) return null;
  const items = pairs.map(([index, value]) => {
    const label = list_?.label(index);
    return el(
      "li", {},
      list_ ? link(index, list_) : el("span", {}, String(index)),
      label ? el("span", { class: "label", title: named(label) }, named(label)) : null,
      el("span", { class: "value" }, signed(value)),
    );
  });
  const more = items.length - SHOWN;
  return el(
    "section", { class: list_ ? "latents" : "neurons" },
    el("h3", {}, term), el("ul", {}, items.slice(0, SHOWN)),
    more > 0 ? el("details", {}, el("summary", {}, `${more} more`), el("ul", {}, items.slice(SHOWN))) : null,
  );
};

const pairs = (indices, values) => list(indices).map((index, i) => [index, values?.[i]]);
const signed = (x) => (isNumber(x) ? `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(2)}` : "–");

// Examples by group: the strongest of all first, then intervals from the top down, each from its strongest example down.
const grouped = (activations) => {
  const groups = new Map();
  for (const one of list(activations)) {
    if (list(one?.tokens).length === 0) continue;
    const key = `${one.bin_min} ${one.bin_max}`;
    if (!groups.has(key)) groups.set(key, { low: one.bin_min, high: one.bin_max, share: one.bin_contains, examples: [] });
    groups.get(key).examples.push(example(one));
  }
  const rank = (group) => (group.low === -1 || !isNumber(group.low) ? Infinity : group.high ?? 0);
  const ordered = [...groups.values()].sort((a, b) => (rank(a) === rank(b) ? 0 : rank(b) - rank(a)));
  for (const group of ordered) group.examples.sort((a, b) => b.values[b.about] - a.values[a.about]);
  return ordered;
};

// `about` is the token that the example was chosen for, where it is on it that the latent fires; else the strongest.
const example = (one) => {
  const values = one.tokens.map((_, i) => numbers(one.values)[i] ?? 0);
  const strongest = values.indexOf(most(values));
  const chosen = one.qualifying_token_index;
  return { tokens: one.tokens, values, strongest, about: values[chosen] > 0 ? chosen : strongest };
};

const heading = (group) => {
  const [n, top] = [group.examples.length, group.low === -1 || !isNumber(group.low)];
  const facts = [`${n} example${n === 1 ? "" : "s"}`];
  if (!top && isNumber(group.share) && group.share >= 0) facts.unshift(`${percent(group.share)} of tokens`);
  const title = top ? "Top activations" : `${number(group.low)} to ${number(group.high)}`;
  return el("h3", {}, title, " ", el("small", {}, facts.join(", ")));
};

const painted = (one, largest, whole) => {
  const line = el("p", { class: "text", tabindex: 0, role: "group" });
  const [first, last] = whole ? [0, one.tokens.length - 1] : [one.about - AROUND_TOKEN, one.about + AROUND_TOKEN];
  const inside = units(one.tokens).filter((unit) => unit.to >= first && unit.from <= last);
  if (inside[0]?.from > 0) line.append(el("span", { class: "cut" }, "… "));
  for (const unit of inside) {
    const value = most(one.values.slice(unit.from, unit.to + 1));
    const holds = (token) => unit.from <= token && token <= unit.to;
    const kind = value > 0 && holds(one.strongest) ? " strongest" : value > 0 && holds(one.about) ? " about" : "";
    const token = el("span", { class: `t${kind}`, "data-value": value, "data-at": unit.from }, inText(unit.text));
    if (value > 0) token.style.setProperty("--a", Math.min(1, value / largest).toFixed(4));
    token.said = `${alone(unit.text)} ${exact(value)}`;
    token.facts = [unit, exact(value), one.tokens.length];
    line.append(token);
  }
  if (inside.at(-1)?.to < one.tokens.length - 1) line.append(el("span", { class: "cut" }, " …"));
  return line;
};

const examples = (groups, largest, whole) =>
  groups.map((group) =>
    el("section", { class: "group" }, heading(group), el("ol", {}, group.examples.map((one) => {
      const value = one.values[one.about];
      const line = painted(one, largest, whole);
      const token = lone(one.tokens[one.about]);
      line.setAttribute("aria-label", `${number(value)} on ${token}. Arrow keys read single tokens. ${line.textContent}`);
      return el("li", {}, el("span", { class: "value", title: exact(value) }, number(value)), line);
    }))));

// The header's sentence: how often and how strongly.
const firing = (feature) => {
  const counted = numbers(feature.freq_hist_data_bar_heights).reduce((a, b) => a + b, 0);
  const n = counted || (isNumber(HEAD.n_tokens) && isNumber(feature.frac_nonzero) ? Math.round(feature.frac_nonzero * HEAD.n_tokens) : 0);
  const parts = [];
  if (isNumber(feature.frac_nonzero)) parts.push("Fires on ", el("b", {}, percent(feature.frac_nonzero)), " of tokens");
  if (n > 0) parts.push(parts.length ? ` (${count(n)})` : `Fires on ${count(n)} tokens`);
  return parts;
};

const detail = (index, feature, list_, whole, toggle) => {
  const label = list_.label(index);
  const beside = (step, mark, words) => {
    const to = list_.beside(index, step);
    return to === undefined ? el("span", { class: "step", "aria-hidden": "true" }, mark)
      : el("a", { class: "step", href: `#${to}`, "aria-label": `${words}: latent ${to}`, title: `${words}: ${to}` }, mark);
  };
  const top = el(
    "header", {},
    el("div", { class: "name" },
      el("h2", { tabindex: -1, id: "latent-title" }, "Latent ", el("span", {}, String(index))),
      el("nav", { "aria-label": "Neighbours in the list" }, beside(-1, "‹", "Before"), beside(1, "›", "After"))),
    label ? el("p", { class: "label" }, named(label)) : null,
  );
  const nearest = related("Nearest latents", list(feature.nearest), list_);
  if (feature.dead) {
    return [top, el("p", { class: "note" }, `This latent ${HEAD.skipped}.`), nearest && el("div", { class: "related" }, nearest)];
  }

  const groups = grouped(feature.activations);
  const largest = Math.max(1e-9, ...groups.flatMap((g) => g.examples.map((e) => e.values[e.strongest])));
  const strongest = groups.length ? [" · max ", el("b", { title: exact(largest) }, number(largest))] : [];
  top.append(el("p", { class: "firing" }, ...firing(feature), ...strongest));

  const size = Math.max(1e-9, ...[...numbers(feature.neg_values), ...numbers(feature.pos_values)].map(Math.abs));
  const tables = [
    logits("Negative logits", feature.neg_str, feature.neg_values, size, "negative"),
    logits("Positive logits", feature.pos_str, feature.pos_values, size, "positive"),
  ].filter(Boolean);
  const plots = [
    histogram({ title: "Activations", values: feature.freq_hist_data_bar_values, heights: feature.freq_hist_data_bar_heights,
      unit: "activation, where it fires", of: "tokens", kind: "activation" }),
    histogram({ title: "Logits", values: feature.logits_hist_data_bar_values, heights: feature.logits_hist_data_bar_heights,
      unit: "logit weight", of: "vocabulary tokens", kind: "logit" }),
  ].filter(Boolean);
  const lines = [
    nearest,
    related("Correlated latents", pairs(feature.correlated_features_indices, feature.correlated_features_pearson), list_),
    related("Correlated neurons", pairs(feature.correlated_neurons_indices, feature.correlated_neurons_pearson)),
    related("Neuron alignment", pairs(feature.neuron_alignment_indices, feature.neuron_alignment_values)),
  ].filter(Boolean);

  const window = (value, words) => el("label", {},
    fill(el("input", { type: "radio", name: "span", value }), whole === (value === "whole") ? { checked: "" } : {}, []), el("span", {}, words));
  const choice = el("fieldset", { class: "span" }, el("legend", { class: "unseen" }, "How much of each prompt"),
    window("window", `±${AROUND_TOKEN} tokens`), window("whole", "Whole prompts"));
  const body = el("div", { class: "examples" }, examples(groups, largest, whole));
  choice.addEventListener("change", (event) => toggle(event.target.value === "whole"));
  top.whole = (now) => {
    choice.querySelector(`[value=${now ? "whole" : "window"}]`).checked = true;
    body.replaceChildren(...examples(groups, largest, now));
  };
  return [
    top,
    tables.length || plots.length ? el("div", { class: "figures" }, tables, plots.length ? el("div", { class: "plots" }, plots) : null) : null,
    lines.length ? el("div", { class: "related" }, lines) : null,
    groups.length
      ? el("section", { class: "fires", "aria-label": "Examples" }, el("div", { class: "bar" }, el("h2", {}, "Examples"), choice), body)
      : el("p", { class: "note" }, "There are no examples of this latent."),
  ];
};
