// Histograms as SVG: bars in a box of their own units, ticks and words around it, each bar's numbers on hover, tap or
// arrow keys.

const HEIGHT = 100;

const niceTicks = (low, high, about) => {
  const rough = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k += 1) ticks.push(k * step);
  return { ticks, digits: Math.min(6, Math.max(0, Math.ceil(-Math.log10(step) + (`${step / power}` === "2.5" ? 1 : 0) - 1e-9))) };
};

// A figure, or nothing where there is no data. `values` are the middles of bars that are equally wide.
const histogram = ({ title, values, heights, unit, of, kind }) => {
  const n = Math.min(list(values).length, list(heights).length);
  if (n === 0) return null;
  const x = numbers(values).slice(0, n);
  const y = numbers(heights).slice(0, n);
  const half = n > 1 ? (x[n - 1] - x[0]) / (n - 1) / 2 : Math.abs(x[0]) / 2 || 0.5;
  const [low, high, top] = [x[0] - half, x[n - 1] + half, Math.max(1e-9, most(y))];
  if (!(high > low)) return null;

  const bars = y.map((height, i) => {
    const tall = (HEIGHT * Math.max(0, height)) / top;
    return svg("rect", { class: "bar", x: i + 0.06, y: HEIGHT - tall, width: 0.88, height: tall });
  });
  const mark = svg("rect", { class: "here", x: 0, y: 0, width: 1, height: HEIGHT, visibility: "hidden" });
  const share = (value) => (value - low) / (high - low);
  const { ticks, digits } = niceTicks(low, high, 4);
  const zero = low < 0 && high > 0 ? [svg("line", { class: "zero", x1: n * share(0), x2: n * share(0), y1: 0, y2: HEIGHT })] : [];
  const plot = svg(
    "svg",
    { viewBox: `0 0 ${n} ${HEIGHT}`, preserveAspectRatio: "none", tabindex: 0, role: "img" },
    mark, bars, zero,
  );
  const total = y.reduce((a, b) => a + b, 0);
  const tallest = y.indexOf(most(y));
  const places = Math.min(4, Math.max(0, 1 - Math.floor(Math.log10(2 * half)))); // what tells one edge from the next
  const edge = (value) => minus(value.toFixed(places));
  const range = (i) => `${edge(x[i] - half)} to ${edge(x[i] + half)}`;
  const words = (i) => `${range(i)}: ${count(y[i])} ${of}`;
  plot.setAttribute("aria-label", `${title}: ${count(total)} ${of}, from ${edge(low)} to ${edge(high)}; most in ${words(tallest)}. Arrow keys read single bars.`);

  const still = `${count(total)} ${of}`;
  const readout = el("span", { class: "readout" }, still);
  let here = -1;
  const show = (i) => {
    here = i;
    if (i >= 0) mark.setAttribute("x", i);
    mark.setAttribute("visibility", i < 0 ? "hidden" : "visible");
    readout.textContent = i < 0 ? still : words(i);
    readout.classList.toggle("asked", i >= 0);
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(Math.min(n - 1, Math.max(0, Math.floor((n * (event.clientX - box.left)) / box.width))));
  });
  plot.addEventListener("pointerleave", () => show(-1));
  plot.addEventListener("blur", () => show(-1));
  plot.addEventListener("keydown", (event) => {
    const to = { ArrowRight: here + 1, ArrowLeft: here < 0 ? n - 1 : here - 1, Home: 0, End: n - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(Math.min(n - 1, Math.max(0, to)));
    say(words(here));
  });

  const axis = el("div", { class: "axis", "aria-hidden": "true" }, ticks.map((tick) => {
    const label = el("span", {}, minus(tick.toFixed(digits)));
    label.style.left = `${100 * share(tick)}%`;
    return label;
  }));
  return el(
    "figure", { class: `histogram ${kind}` },
    el("figcaption", {}, el("h3", {}, title), " ", readout),
    el("div", { class: "plot" }, el("span", { class: "top", "aria-hidden": "true" }, count(Math.round(top))), plot),
    axis,
    el("p", { class: "unit", "aria-hidden": "true" }, unit),
  );
};

// The ten tokens whose logits go down, or up, most; bars are as long as the largest of both tables allows.
const logits = (title, tokens, values, largest, kind) => {
  const rows = list(tokens).map((token, i) => {
    const bar = el("i");
    bar.style.width = `${(100 * Math.abs(numbers(values)[i] ?? 0)) / largest}%`;
    return el(
      "tr", {},
      el("th", { scope: "row" }, chip(token)),
      el("td", { class: "length", "aria-hidden": "true" }, bar),
      el("td", { class: "num", title: exact(values?.[i]) }, number(values?.[i])),
    );
  });
  if (rows.length === 0) return null;
  return el("table", { class: `logits ${kind}` }, el("caption", {}, el("h3", {}, title)), el("tbody", {}, rows));
};
