// The page: header, slider, pictures, plane, curves and manifest; keys.

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
root.dataset.theme = dark.matches ? "dark" : "light";
dark.addEventListener("change", () => (root.dataset.theme = dark.matches ? "dark" : "light"));

const toggleTheme = () => (root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark");

function alarms() {
  const items = data.alarms.map((alarm) => el("li", {}, el("b", {}, "Alarm "), alarm));
  return el("ul", { class: "alarms", role: "alert" }, items);
}

function header() {
  const written = `Written ${data.written} by nabla_gfn_jax ${data.version}`;
  const theme = el("button", { type: "button", id: "theme", onclick: toggleTheme, title: "Key D" }, "Light / dark");
  const name = (run) => (data.runs.length > 1 ? [el("b", {}, run.name), " · "] : []);
  const runs = data.runs.map((run, i) => el("li", {}, el("span", { class: "dot", colour: i }), name(run), run.summary));
  return [
    el("header", {}, el("div", {}, el("h1", {}, data.title), el("p", { class: "muted small" }, written)), theme),
    el("ul", { class: "runs" }, runs),
    ...(data.alarms.length === 0 ? [] : [alarms()]),
    el(
      "ul",
      { class: "notes" },
      data.notes.map((note) => el("li", {}, note)),
    ),
  ];
}

function choice(name, label, options) {
  const items = Object.entries(options).map(([value, text]) => el("option", { value }, text));
  const select = el(
    "select",
    { id: name, "aria-label": label, onchange: () => change({ [name]: select.value }) },
    items,
  );
  listeners.push(() => (select.value = state[name]));
  return select;
}

/** A button that shows the base model's pictures while it is pressed. */
function holdButton() {
  const press = (event) => {
    event.preventDefault();
    button.setPointerCapture(event.pointerId);
    change({ base: true });
  };
  const release = () => change({ base: false });
  const key = (down) => (event) => {
    if (event.key !== " " && event.key !== "Enter") return;
    event.preventDefault();
    change({ base: down });
  };
  const button = el("button", { type: "button", class: "hold", id: "hold", title: "Key B" }, "Hold: base");
  const events = { pointerdown: press, pointerup: release, pointercancel: release, lostpointercapture: release };
  Object.assign(events, {
    blur: release,
    keydown: key(true),
    keyup: key(false),
    contextmenu: (e) => e.preventDefault(),
  });
  Object.entries(events).forEach(([name, listener]) => button.addEventListener(name, listener));
  listeners.push(() => button.classList.toggle("pressed", state.base));
  return button;
}

function bar() {
  const output = el("output", {});
  const slider = el("input", {
    type: "range",
    id: "slider",
    min: 0,
    max: stops.length - 1,
    step: 1,
    "aria-label": "updates",
  });
  slider.addEventListener("input", () => change({ updates: stops[Number(slider.value)] }));
  const follow = () => {
    slider.value = stops.indexOf(state.updates);
    slider.setAttribute("aria-valuetext", `${state.updates} updates`);
    output.textContent = `${state.updates} ${state.updates === 1 ? "update" : "updates"}`;
  };
  listeners.push(follow);
  follow();
  const parts = [el("label", { class: "slide" }, output, slider)];
  if (shots) {
    parts.push(holdButton());
    parts.push(choice("sort", "Sort", Object.fromEntries(orders.map((order) => [order, `Sort: ${order}`]))));
    parts.push(choice("show", "Show", { all: "Show all", strips: "Worst, best" }));
  }
  return el("nav", { class: "bar" }, parts);
}

const orders = ["noise", "reward", "gain", ...(hasChances ? ["chance"] : [])];

function picturesSection() {
  if (!shots) return [el("h2", {}, "Pictures"), el("p", { class: "muted" }, "The workdirs hold no pictures yet.")];
  const what =
    "Each picture keeps its noise at every position of the slider. Below it: log R and the gain over the base model's " +
    "picture of the same noise. A click shows all updates." +
    (hasChances
      ? " While B is held, the number below a base picture says how many times as probable finetuning has made its " +
        "path. Sorted by chance, the base pictures that became more frequent come first, and those that became rarer last."
      : "");
  const keys = el(
    "p",
    { class: "muted small keys" },
    ...[
      ["←", " "],
      ["→", " slider · hold "],
      ["B", " base model · "],
      ["S", " sort · "],
      ["W", " worst, median, best · "],
      ["D", " dark"],
    ].flatMap(([key, text]) => [el("kbd", {}, key), text]),
  );
  return [el("h2", {}, "Pictures"), el("p", { class: "muted small" }, what), keys, ...gallery()];
}

function planeSection() {
  if (!data.plane) return [];
  const { frontier, prompts, samples, left_out: left } = data.plane;
  const source = frontier.samples
    ? `from ${frontier.samples} samples of the base model`
    : "through the evaluated models";
  const about =
    `Each point is a saved LoRA, measured on ${samples} samples. The black curve, ${source}, is the fewest nats that a ` +
    "mean log R needs: no model can be below it. It is dashed where few base samples carry it, and there a lower bound.";
  const of =
    prompts.length > 3 ? `${prompts.slice(0, 3).join(", ")} and ${prompts.length - 3} more` : prompts.join(", ");
  const out = left.map((run) => data.runs[run].name).join(", ");
  return [
    el("h2", {}, "Reward against nats"),
    el("p", { class: "muted small" }, about),
    el("p", { class: "muted small" }, `Prompts: ${of}.`),
    out ? el("p", { class: "small" }, `Measured on other prompts, sampler or reward, and left out: ${out}.`) : null,
    tradeoff(),
  ];
}

function curvesSection() {
  const sections = [...new Set(data.charts.map((chart) => chart.section))];
  return sections.flatMap((name) => [
    el("h2", {}, name),
    el("div", { class: "charts" }, data.charts.filter((chart) => chart.section === name).map(curve)),
  ]);
}

function manifestSection() {
  const sections = [...new Set(data.manifest.map((entry) => entry.section))];
  const rows = sections.flatMap((name) => [
    el("tr", { class: "section" }, el("th", { colspan: data.runs.length + 1 }, name)),
    ...data.manifest
      .filter((entry) => entry.section === name)
      .map((entry) =>
        el(
          "tr",
          { class: entry.differs ? "differs" : null },
          el("th", { scope: "row" }, entry.name),
          entry.values.map((value) => el("td", {}, value)),
        ),
      ),
  ]);
  const head = el(
    "tr",
    {},
    el("th"),
    data.runs.map((run) => el("th", {}, run.name)),
  );
  const table = el("div", { class: "scroll" }, el("table", {}, data.runs.length > 1 ? head : null, rows));
  return el("details", {}, el("summary", {}, data.runs.length > 1 ? "Manifests" : "Manifest"), table);
}

const next = (options, value) => options[(options.indexOf(value) + 1) % options.length];

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const [here, key] = [event.target, event.key.toLowerCase()];
  const step = { arrowleft: -1, arrowright: 1 }[key];
  if (here.tagName === "SELECT" || (step && here.tagName === "INPUT")) return;
  if (step) change({ updates: stops[Math.max(0, Math.min(stops.length - 1, stops.indexOf(state.updates) + step))] });
  else if (key === "b" && shots) change({ base: true });
  else if (key === "s" && shots) change({ sort: next(orders, state.sort) });
  else if (key === "w" && shots) change({ show: next(["all", "strips"], state.show) });
  else if (key === "d") toggleTheme();
  else return;
  if (step) event.preventDefault();
}

document.addEventListener("keydown", pressed);
document.addEventListener("keyup", (event) => event.key.toLowerCase() === "b" && change({ base: false }));
window.addEventListener("blur", () => change({ base: false }));

state.updates = stops[stops.length - 1] ?? 0;
document.body.append(
  ...[
    ...header(),
    stops.length > 1 ? bar() : null,
    el(
      "main",
      {},
      ...[
        ...picturesSection(),
        ...planeSection(),
        ...besideSection(),
        ...curvesSection(),
        manifestSection(),
      ].filter((node) => node !== null),
    ),
  ].filter((node) => node !== null),
);
