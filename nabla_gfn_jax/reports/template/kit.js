// Elements, numbers, and the state that the slider and the buttons change. Text always goes in as text, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "colour") node.style.setProperty("--colour", `var(--c${value % 8})`);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** Three significant digits, with a true minus sign. */
function show(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text =
    size !== 0 && (size >= 1e5 || size < 1e-3)
      ? size.toExponential(1).replace("e+", "e").replace(".0e", "e")
      : String(Number(size.toPrecision(3)));
  return (value < 0 ? "−" : "") + text;
}

/** Round numbers from low to high, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

/** Labels of ticks with the same number of decimals, or as `show` writes them. */
function labels(marks) {
  const step = Math.abs(marks[1] - marks[0]);
  if (!(step >= 1e-4) || marks.some((mark) => Math.abs(mark) >= 1e5)) return marks.map(show);
  const decimals = [0, 1, 2, 3, 4].find((count) => marks.every((mark) => isRound(mark * 10 ** count))) ?? 4;
  return marks.map((mark) => mark.toFixed(decimals).replace(/^-/, "−"));
}

const isRound = (value) => Math.abs(value - Math.round(value)) < 1e-6;

/** The index of the last of ascending `values` that is at most `limit`; the first if all are larger. */
function lastUpTo(values, limit) {
  let found = 0;
  values.forEach((value, index) => {
    if (value <= limit) found = index;
  });
  return found;
}

const state = { updates: 0, hover: null, base: false, sort: "noise", show: "all", figure: data.beside[0]?.name };
const listeners = [];

function change(part) {
  if (Object.keys(part).every((name) => state[name] === part[name])) return;
  Object.assign(state, part);
  listeners.forEach((listener) => listener(part));
}

/** The numbers of updates at which the slider stops: those with pictures, or else those with a measured model. */
function findStops() {
  const found = new Set();
  if (data.pictures) data.pictures.policies.flat().forEach(([updates]) => found.add(updates));
  else if (data.plane) data.plane.points.forEach((point) => found.add(point.updates));
  else data.charts.forEach((chart) => chart.lines.forEach((line) => line.x.forEach((x) => found.add(x))));
  return [...found].sort((a, b) => a - b);
}

const stops = findStops();

function goTo(updates) {
  const nearest = stops.reduce((a, b) => (Math.abs(b - updates) < Math.abs(a - updates) ? b : a), stops[0] ?? 0);
  change({ updates: nearest });
}
