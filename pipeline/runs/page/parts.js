"use strict";
// User data enters the page as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value != null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const known = (value) => value !== null && value !== undefined;
const count = (value) => value.toLocaleString("en");
const short = (value) =>
  !known(value)
    ? "–"
    : value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
      ? value.toExponential(1).replace("e+", "e")
      : String(+value.toPrecision(3));
const percent = (value) => (known(value) ? value.toFixed(1) + " %" : "–");
const span = (interval) => (interval ? interval.map((end) => end.toFixed(1)).join(" – ") : "");
const mebibytes = (bytes) => (known(bytes) ? count(Math.round(bytes / 2 ** 20)) + " MiB" : null);

function duration(seconds) {
  if (!known(seconds)) return null;
  if (seconds < 100) return seconds.toFixed(0) + " s";
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? minutes + " min" : Math.floor(minutes / 60) + " h " + (minutes % 60) + " min";
}
const isLess = (a, b) => a < b,
  isGreater = (a, b) => a > b;
// Index of the best known value, where `better` is `isLess` or `isGreater`; -1 if no value is known.
const indexOfBest = (values, better) =>
  values.reduce((best, value, i) => (known(value) && (best < 0 || better(value, values[best])) ? i : best), -1);

function section(title, ...content) {
  const shown = content.flat(Infinity).filter(Boolean);
  return shown.length ? el("section", {}, el("h2", {}, title), shown) : null;
}
const note = (hint) => el("p", { class: "note" }, hint.text, " ", hint.command && el("code", {}, hint.command));
const facts = (pairs) =>
  el(
    "dl",
    {},
    pairs
      .filter(([, value]) => value || value === 0)
      .map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
  );

function choice(options, chosen, onChoice) {
  const press = (key) => buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.key === key));
  const click = (event) => {
    press(event.target.dataset.key);
    onChoice(event.target.dataset.key);
  };
  const buttons = options.map(([key, label]) => el("button", { type: "button", "data-key": key, click }, label));
  press(chosen);
  return el("div", { class: "choice", role: "group" }, buttons);
}

// Redraws when the width changes. Not inside the observer, because drawing may change the width again.
function onWidth(holder, draw) {
  let drawn = 0;
  const redraw = () => {
    const width = Math.floor(holder.clientWidth);
    if (width > 0 && width !== drawn) draw((drawn = width));
  };
  new ResizeObserver(() => setTimeout(redraw)).observe(holder);
}
