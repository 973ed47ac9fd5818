// Tokens as text in which everything is seen, numbers as words, and elements made without ever parsing HTML.

const SEEN = { "\r\n": "↵", "\n": "↵", "\r": "↵", "\t": "⇥" };
const HIDDEN = /[\p{C}\p{Zl}\p{Zp}\p{Zs}]/u;
const JOINERS = "\u200c\u200d"; // invisible, but what they stand between is not the same without them
const BYTE = /^<0x([0-9A-Fa-f]{2})>$/;

const spaced = (token) => String(token ?? "").replaceAll("▁", " ");

const seen = (character, alone) => {
  if (character in SEEN) return SEEN[character];
  if (!HIDDEN.test(character) || (JOINERS.includes(character) && !alone)) return character;
  return `⟨${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
};

// A token's text in a sentence: blanks stay blanks.
const inText = (text) => {
  const alone = JOINERS.includes(text);
  const shown = text.replace(/\r\n|[^ ]/gsu, (character) => seen(character, alone));
  return /^\p{M}/u.test(shown) ? `◌${shown}` : shown;
};

// A token by itself: a blank with nothing beside it is ·, an empty one ∅.
const alone = (text) => (text === "" ? "∅" : inText(/^ +$/.test(text) ? text.replaceAll(" ", "·") : text));

// A name or a sentence: blanks of any width stay.
const named = (text) => String(text ?? "").replace(/./gsu, (c) => (/\p{Zs}/u.test(c) ? c : seen(c, false)));

// Tokens as what is shown of them: byte pieces that make characters together are one unit, all else is one each.
const units = (tokens) => {
  const found = [];
  for (let at = 0; at < tokens.length; ) {
    let end = at;
    while (end < tokens.length && BYTE.test(tokens[end])) end += 1;
    if (end === at) {
      found.push({ text: spaced(tokens[at]), from: at, to: at });
      at += 1;
    } else {
      found.push(...characters(tokens.slice(at, end).map((t) => parseInt(BYTE.exec(t)[1], 16)), at));
      at = end;
    }
  }
  return found;
};

const characters = (bytes, first) => {
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  const found = [];
  for (let at = 0; at < bytes.length; ) {
    const length = bytes[at] < 0x80 ? 1 : bytes[at] < 0xe0 ? 2 : bytes[at] < 0xf0 ? 3 : 4;
    let text = null;
    try {
      text = decoder.decode(Uint8Array.from(bytes.slice(at, at + length)));
    } catch {
      text = null;
    }
    const taken = text === null ? 1 : length;
    text ??= `⟨x${bytes[at].toString(16).toUpperCase().padStart(2, "0")}⟩`;
    found.push({ text, from: first + at, to: first + at + taken - 1 });
    at += taken;
  }
  return found;
};

const lone = (token) => alone(units([String(token ?? "")])[0].text);

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const list = (value) => (Array.isArray(value) ? value : []);
const numbers = (value) => list(value).map((x) => (isNumber(x) ? x : 0));
const most = (values) => values.reduce((a, b) => (b > a ? b : a), -Infinity);
const count = (n) => n.toLocaleString("en-US");
const minus = (text) => text.replace("-", "−");
const number = (x) => {
  if (!isNumber(x)) return "–";
  const size = Math.abs(x);
  return minus(x.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 || size === 0 ? 2 : 3));
};
const exact = (x) => (isNumber(x) ? minus(String(x)) : "–");
const percent = (share) => {
  if (!isNumber(share)) return "–";
  const x = 100 * share;
  if (x > 0 && x < 0.0001) return "<0.0001 %";
  return `${x === 0 ? "0" : x >= 10 ? x.toFixed(1) : String(Number(x.toPrecision(2)))} %`;
};

const SVG = "http://www.w3.org/2000/svg";
const fill = (element, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children.flat().filter((child) => child !== null && child !== ""));
  return element;
};
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const at = (id) => document.getElementById(id);
const say = (text) => { at("said").textContent = text; };
const chip = (token, wanted = "") => el("code", { class: "token", title: lone(token) }, ...marked(lone(token), wanted));

// The text with what was searched for marked.
const marked = (text, wanted) => {
  const from = wanted ? text.toLowerCase().indexOf(wanted) : -1;
  if (from < 0 || text.toLowerCase().length !== text.length) return [text];
  const to = from + wanted.length;
  return [text.slice(0, from), el("mark", {}, text.slice(from, to)), text.slice(to)];
};
