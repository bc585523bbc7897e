// Curves over the number of updates, and the plane of reward against nats. Drawn again when the width changes.

const EDGE = { left: 48, right: 10, top: 10, bottom: 22 };

const SCALES = {
  linear: { to: (value) => value, from: (value) => value, count: 4 },
  logarithmic: { to: Math.log10, from: (value) => 10 ** value, count: 3 },
  root: { to: (value) => Math.sqrt(Math.max(value, 0)), from: (value) => value * value, count: 5 },
};

/** Scales and axes. `x` and `y` are arrays of all numbers that must be inside. */
function frame(width, height, x, y, scale = "linear") {
  const low = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
  const { to, from, count } = SCALES[scale];
  let [x0, x1, y0, y1] = [low(x), high(x), to(low(y)), to(high(y))];
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  const flat = y1 - y0 <= 1e-9 * Math.abs(y1);
  const room = (flat ? Math.abs(y1) || 1 : y1 - y0) * 0.06;
  [y0, y1] = [y0 - room, y1 + room];
  const { left, right, top, bottom } = EDGE;
  const px = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const py = (value) => height - bottom - ((to(value) - y0) / (y1 - y0)) * (height - top - bottom);
  const back = (position) => x0 + ((position - left) / (width - left - right)) * (x1 - x0);
  const axes = svg("g");
  const marks = ticks(y0, y1, count)
    .filter((value) => scale !== "root" || value >= 0)
    .map(from);
  const [across, written] = [ticks(x0, x1, Math.max(2, width / 75)), labels(marks)];
  marks.forEach((mark, i) => {
    axes.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: py(mark), y2: py(mark) }));
    axes.append(svg("text", { x: left - 6, y: py(mark) + 4, "text-anchor": "end" }, written[i]));
  });
  labels(across).forEach((text, i) =>
    axes.append(svg("text", { x: px(across[i]), y: height - 6, "text-anchor": "middle" }, text)),
  );
  return { px, py, back, axes, width, height };
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

const at = (f, x, y) => path(x.map((value, i) => [f.px(value), f.py(y[i])]));

const band = (f, x, low, high) => `${at(f, x, low)}L${at(f, [...x].reverse(), [...high].reverse()).slice(1)}Z`;

const plus = (y, error, sign) => y.map((value, i) => value + sign * (error[i] ?? 0));

/** Everything that is drawn of one line, with its error band or its points. */
function drawLine(f, line, thin, dashed) {
  const extra = `${thin ? " thin" : ""}${dashed ? " dashed" : ""}`;
  const parts = [svg("path", { class: `run${extra}`, d: at(f, line.x, line.y), colour: line.run })];
  if (line.error.length && !thin) {
    const area = band(f, line.x, plus(line.y, line.error, -1), plus(line.y, line.error, 1));
    parts.push(svg("path", { class: "area", d: area, colour: line.run }));
  }
  if (line.x.length <= 25 && !thin) {
    line.x.forEach((x, i) =>
      parts.push(svg("circle", { class: "point", cx: f.px(x), cy: f.py(line.y[i]), r: 2.5, colour: line.run })),
    );
  }
  return parts;
}

const firstOf = (group) => data.runs.findIndex((run) => run.group === group);

function drawBand(f, each, dashed) {
  const area = band(f, each.x, plus(each.y, each.spread, -1), plus(each.y, each.spread, 1));
  const colour = firstOf(each.group);
  const line = svg("path", { class: `run${dashed ? " dashed" : ""}`, d: at(f, each.x, each.y), colour });
  return [svg("path", { class: "area", d: area, colour }), line];
}

/** The numbers at the slider, or under the pointer: of each run, or the means of groups of runs. */
function readings(chart) {
  const where = state.hover ?? state.updates;
  const shown = chart.bands.length
    ? [...chart.bands.map((each) => ({ ...each, run: firstOf(each.group) })), ...alone(chart)]
    : chart.lines;
  return shown.slice(0, 6).map((line) => {
    const value = line.y[lastUpTo(line.x, where)];
    return el(
      "span",
      { title: data.runs[line.run].name },
      el("span", { class: "dot", colour: line.run }),
      `${show(value)} `,
    );
  });
}

/** The lines of runs that are in no band. */
const alone = (chart) =>
  chart.lines.filter((line) => !chart.bands.some((each) => each.group === data.runs[line.run].group));

function draw(chart, width, height) {
  const all = [...chart.lines.map((line) => [line, line.error]), ...chart.bands.map((each) => [each, each.spread])];
  const values = all.flatMap(([line, error]) => [...plus(line.y, error, -1), ...plus(line.y, error, 1)]);
  const positive = values.every((value) => value > 0);
  const scale = positive && Math.max(...values) > 50 * Math.min(...values) ? "logarithmic" : "linear";
  const f = frame(
    width,
    height,
    chart.lines.flatMap((line) => line.x),
    values,
    scale,
  );
  const banded = (line) => chart.bands.some((each) => each.group === data.runs[line.run].group);
  const dashed = (line) => line.name === "needed";
  return [
    f,
    f.axes,
    ...chart.lines.flatMap((line) => drawLine(f, line, banded(line), dashed(line))),
    ...chart.bands.flatMap((each) => drawBand(f, each, dashed(each))),
  ];
}

/** A figure with a caption and a drawing that follows the slider. A click moves the slider there. */
function curve(chart) {
  const reading = el("span", { class: "reading" });
  const title = [el("b", {}, chart.title), chart.unit ? el("span", { class: "muted small" }, chart.unit) : null];
  const picture = svg("svg", { height: 190, role: "img", "aria-label": `${chart.title} over updates` });
  const now = svg("line", { class: "now", y1: EDGE.top, y2: 190 - EDGE.bottom });
  let f = null;
  const follow = () => {
    if (!f) return;
    const x = f.px(state.hover ?? state.updates).toFixed(1);
    now.setAttribute("x1", x);
    now.setAttribute("x2", x);
    reading.replaceChildren(...readings(chart));
  };
  const redraw = (width) => {
    const [scales, ...parts] = draw(chart, width, 190);
    f = scales;
    picture.setAttribute("viewBox", `0 0 ${width} 190`);
    picture.replaceChildren(...parts, now);
    follow();
  };
  const under = (event) => f.back(event.clientX - picture.getBoundingClientRect().left);
  picture.addEventListener(
    "pointermove",
    (event) => f && event.pointerType === "mouse" && change({ hover: under(event) }),
  );
  picture.addEventListener("pointerleave", () => change({ hover: null }));
  picture.addEventListener("click", (event) => f && goTo(under(event)));
  onWidth(picture, redraw);
  listeners.push(follow);
  return el("figure", {}, el("figcaption", {}, title, reading, el("span", { class: "about" }, chart.about)), picture);
}

function onWidth(node, redraw) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.round(node.clientWidth || node.parentNode.clientWidth);
    if (width && width !== last) redraw((last = width));
  }).observe(node);
}

/** The nats that a mean log R needs, from the curve; null outside of it. */
function neededFor(reward) {
  const { reward: x, needed: y } = data.plane.frontier;
  const i = x.findIndex((value) => value >= reward);
  if (i < 1) return null;
  return y[i - 1] + ((reward - x[i - 1]) / (x[i] - x[i - 1] || 1)) * (y[i] - y[i - 1]);
}

function drawPlane(width, height) {
  const { points, frontier } = data.plane;
  const rewards = points.flatMap((p) => [p.reward - (p.reward_error ?? 0), p.reward + (p.reward_error ?? 0)]);
  const nats = [0, ...points.map((p) => p.spent + (p.spent_error ?? 0)), ...frontier.needed.slice(-1)];
  const scale = Math.max(...nats) > 5 * Math.max(...frontier.needed) ? "root" : "linear"; // or the curve lies flat
  const f = frame(width, height, [...rewards, ...frontier.reward], nats, scale);
  const floor = frontier.reward.map(() => 0);
  const parts = [svg("path", { class: "below", d: band(f, frontier.reward, floor, frontier.needed) }), f.axes];
  parts.push(...drawFrontier(f, frontier));
  const middle = points.reduce((most, p) => (p.spent > most.spent ? p : most), points[0]);
  data.runs.forEach((_, run) => {
    const mine = points.filter((p) => p.run === run);
    const [rewards, spent] = [mine.map((p) => p.reward), mine.map((p) => p.spent)];
    parts.push(svg("path", { class: "run thin", d: at(f, rewards, spent), colour: run }));
    mine.forEach((p) => parts.push(...drawPoint(f, p, p === middle)));
  });
  const title = scale === "root" ? "nats spent, square-root axis" : "nats spent";
  return [...parts, svg("text", { class: "label", x: EDGE.left + 4, y: EDGE.top + 10 }, title)];
}

function drawFrontier(f, frontier) {
  const pieces = { sure: [], bound: [] };
  frontier.reward.slice(1).forEach((reward, i) => {
    const ends = [frontier.reward[i], reward];
    const kind = frontier.sure[i] && frontier.sure[i + 1] ? "sure" : "bound";
    pieces[kind].push(at(f, ends, [frontier.needed[i], frontier.needed[i + 1]]));
  });
  const parts = [
    svg("path", { class: "frontier", d: pieces.sure.join("") }),
    svg("path", { class: "frontier dashed", d: pieces.bound.join("") }),
  ];
  if (frontier.base === null) return parts;
  const [x, y] = [f.px(frontier.base), f.py(0)];
  parts.push(svg("circle", { class: "base", cx: x, cy: y, r: 4 }));
  parts.push(svg("text", { class: "label", x, y: y - 9, "text-anchor": "middle" }, "base model"));
  return parts;
}

function drawPoint(f, p, named) {
  const [x, y, dx, dy] = [f.px(p.reward), f.py(p.spent), p.reward_error ?? 0, p.spent_error ?? 0];
  const here = p.updates === nearestMeasured(p.run);
  return [
    svg("line", { class: "bars", x1: f.px(p.reward - dx), x2: f.px(p.reward + dx), y1: y, y2: y, colour: p.run }),
    svg("line", { class: "bars", x1: x, x2: x, y1: f.py(p.spent - dy), y2: f.py(p.spent + dy), colour: p.run }),
    svg("circle", { class: "point", cx: x, cy: y, r: 3.5, colour: p.run }, svg("title", {}, describe(p))),
    here ? svg("circle", { class: "ring", cx: x, cy: y, r: 7, colour: p.run }) : null,
    named ? svg("text", { x: x - 9, y: y - 8, "text-anchor": "end" }, `${p.updates} updates`) : null,
  ].filter((part) => part !== null);
}

/** The number of updates of the run's last measured model up to the slider. */
function nearestMeasured(run) {
  const mine = data.plane.points.filter((p) => p.run === run).map((p) => p.updates);
  return mine[lastUpTo(mine, state.updates)];
}

function describe(p) {
  const needed = neededFor(p.reward);
  const rest = needed !== null && p.spent > 0 ? `, needed ${show(needed)}, efficiency ${show(needed / p.spent)}` : "";
  return `${data.runs[p.run].name} after ${p.updates} updates: log R ${show(p.reward)}, spent ${show(p.spent)}${rest}`;
}

function tradeoff() {
  const height = 360;
  const picture = svg("svg", { height, role: "img", "aria-label": "nats spent against mean log R" });
  const reading = el("div", { class: "small" });
  let width = 0;
  const redraw = () => {
    if (!width) return;
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.replaceChildren(...drawPlane(width, height));
    const here = data.plane.points.filter((p) => p.updates === nearestMeasured(p.run));
    reading.replaceChildren(
      ...here.map((p) => el("div", {}, el("span", { class: "dot", colour: p.run }), describe(p))),
    );
  };
  onWidth(picture, (found) => {
    width = found;
    redraw();
  });
  listeners.push((part) => "updates" in part && redraw());
  return el("figure", {}, picture, el("div", { class: "small muted axis" }, "mean log R →"), reading);
}
