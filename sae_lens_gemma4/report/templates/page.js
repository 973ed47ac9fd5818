// Draws every plot in the colours of the style sheet, and again when the width, the colour scheme or the medium changes;
// what a fold hides is drawn when it opens. A tap on a painted token says its number.
(() => {
  const root = document.documentElement;
  const plots = [...document.querySelectorAll("[data-figure]")].map((el) => ({
    el,
    figure: JSON.parse(document.getElementById(el.dataset.figure).textContent),
  }));

  const painted = (value, css) => {
    if (typeof value === "string" && /^\$[a-z-]+$/.test(value)) return css.getPropertyValue(`--${value.slice(1)}`).trim();
    if (Array.isArray(value)) return value.map((inner) => painted(inner, css));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, painted(inner, css)]));
  };

  const draw = () => {
    const css = getComputedStyle(root);
    for (const { el, figure } of plots) {
      if (el.clientWidth === 0) continue;
      const { data, layout } = painted(figure, css);
      Plotly.react(el, data, { ...layout, width: el.clientWidth }, { displayModeBar: false, showTips: false });
    }
  };

  let width = 0;
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width === width) return;
    width = entry.contentRect.width;
    requestAnimationFrame(draw);
  }).observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  document.addEventListener("toggle", ({ target }) => {
    if (target.open && target.querySelector("[data-figure]")) draw();
  }, true);
  document.addEventListener("click", ({ target }) => {
    const token = target.closest(".context > [title]");
    if (token) token.closest("li").querySelector(".asked").textContent = token.title;
  });

  const closed = [...document.querySelectorAll("details:not([open])")];
  const print = (on) => {
    root.classList.toggle("paper", on);
    for (const details of closed) details.open = on;
    draw();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
})();
