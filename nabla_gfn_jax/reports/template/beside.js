// The planes of reward against the other figures of the images, with the tilted base model beside each model.

const chosenFigure = () => data.beside.find((figure) => figure.name === state.figure) ?? data.beside[0];

const spaced = (name) => name.replaceAll("_", " ");

/** The number of updates of the last point of the run up to the slider. */
function nearestBeside(points, run) {
  const mine = points.filter((p) => p.run === run).map((p) => p.updates);
  return mine[lastUpTo(mine, state.updates)];
}

function describeBeside(name, p) {
  const tilted = p.tilted === null ? "" : `, tilted base model ${show(p.tilted)} ± ${show(p.tilted_error)}`;
  const model = p.updates === 0 ? "base model" : `after ${p.updates} updates`;
  const value = `${spaced(name)} ${show(p.value)} ± ${show(p.value_error)}`;
  return `${data.runs[p.run].name}, ${model}: log R ${show(p.reward)}, ${value}${tilted}`;
}

function drawBesides(width, height) {
  const { name, points } = chosenFigure();
  const ends = (value, error) => (value === null ? [] : [value - (error ?? 0), value + (error ?? 0)]);
  const x = points.flatMap((p) => ends(p.reward, p.reward_error));
  const y = points.flatMap((p) => [...ends(p.value, p.value_error), ...ends(p.tilted, p.tilted_error)]);
  const f = frame(width, height, x, y);
  const parts = [f.axes];
  data.runs.forEach((_, run) => {
    const mine = points.filter((p) => p.run === run);
    const [rewards, values] = [mine.map((p) => p.reward), mine.map((p) => p.value)];
    parts.push(svg("path", { class: "run thin", d: at(f, rewards, values), colour: run }));
    mine.forEach((p) => parts.push(...drawBeside(f, name, p, p.updates === nearestBeside(points, run))));
  });
  return [...parts, svg("text", { class: "label", x: EDGE.left + 4, y: EDGE.top + 10 }, spaced(name))];
}

function drawBeside(f, name, p, here) {
  const [x, y] = [f.px(p.reward), f.py(p.value)];
  const [dx, dy, dt] = [p.reward_error, p.value_error, p.tilted_error].map((error) => error ?? 0);
  const line = (x1, x2, y1, y2, kind) => svg("line", { class: kind, x1, x2, y1, y2, colour: p.run });
  const parts = [
    line(f.px(p.reward - dx), f.px(p.reward + dx), y, y, "bars"),
    line(x, x, f.py(p.value - dy), f.py(p.value + dy), "bars"),
  ];
  if (p.tilted !== null) {
    parts.push(line(x, x, y, f.py(p.tilted), "link"));
    parts.push(line(x, x, f.py(p.tilted - dt), f.py(p.tilted + dt), "bars"));
    parts.push(svg("circle", { class: "hollow", cx: x, cy: f.py(p.tilted), r: 4, colour: p.run }));
  }
  const about = svg("title", {}, describeBeside(name, p));
  parts.push(svg("circle", { class: "point", cx: x, cy: y, r: 4, colour: p.run }, about));
  return here ? [...parts, svg("circle", { class: "ring", cx: x, cy: y, r: 7, colour: p.run })] : parts;
}

function besides() {
  const height = 320;
  const picture = svg("svg", { height, role: "img" });
  const reading = el("div", { class: "small" });
  let width = 0;
  const redraw = () => {
    if (!width) return;
    const { name, points } = chosenFigure();
    picture.setAttribute("aria-label", `${spaced(name)} against mean log R`);
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.replaceChildren(...drawBesides(width, height));
    const here = points.filter((p) => p.updates === nearestBeside(points, p.run));
    reading.replaceChildren(
      ...here.map((p) => el("div", {}, el("span", { class: "dot", colour: p.run }), describeBeside(name, p))),
    );
  };
  onWidth(picture, (found) => {
    width = found;
    redraw();
  });
  listeners.push((part) => ("updates" in part || "figure" in part) && redraw());
  return el("figure", { id: "beside" }, picture, el("div", { class: "small muted axis" }, "mean log R →"), reading);
}

function besideSection() {
  if (data.beside.length === 0) return [];
  const names = Object.fromEntries(data.beside.map(({ name }) => [name, spaced(name)]));
  const about =
    "Filled: a measured model. Hollow: the base model's samples, weighted by R^b to the same mean log R. The line " +
    "between them is what the finetuning changed beyond what the reward demands.";
  const fewer = el(
    "p",
    { class: "muted small" },
    "This figure depends on the number of samples, so both have the effective number of the weighted ones.",
  );
  const follow = () => (fewer.hidden = !chosenFigure().as_few);
  listeners.push(follow);
  follow();
  return [
    el("h2", {}, "Reward against diversity and other figures"),
    el("p", { class: "muted small" }, about),
    fewer,
    data.beside.length > 1 ? choice("figure", "Figure", names) : null,
    besides(),
  ];
}
