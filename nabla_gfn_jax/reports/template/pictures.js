// Pictures of the same noise at every number of updates, side by side across runs.

const shots = data.pictures;
const images = shots ? shots.sheets.map((sheet) => Object.assign(new Image(), { src: sheet.source })) : [];
const REWARD = "log_reward";
const CHANCE = "log_chance"; // of the base model's picture under the policy, compared with the base model
const STRIP = 6; // pictures in a strip

/** The sheet of a run at the slider, or of its base model. */
function sheetOf(run, base = state.base, updates = state.updates) {
  if (base) return shots.bases[run];
  const policies = shots.policies[run];
  return policies.length
    ? policies[
        lastUpTo(
          policies.map(([n]) => n),
          updates,
        )
      ][1]
    : null;
}

const shownUpdates = (run) => {
  const all = shots.policies[run].map(([n]) => n);
  return all[lastUpTo(all, state.updates)];
};

const scoreOf = (sheet, picture, name = REWARD) =>
  sheet === null ? null : (shots.sheets[sheet].scores[name]?.[picture] ?? null);

/** All scores have as many decimals as the largest needs for three digits. */
const decimals = (() => {
  const all = shots ? shots.sheets.flatMap((sheet) => sheet.scores[REWARD]).map((value) => Math.abs(value ?? 0)) : [];
  const largest = all.reduce((a, b) => Math.max(a, b), 0) || 1;
  return Math.max(0, Math.min(4, 2 - Math.floor(Math.log10(largest))));
})();

const showScore = (value) => (value === null ? "–" : value.toFixed(decimals).replace("-", "−"));

const plusSign = (value) => (value > 0 ? "+" : "");

function gainOf(run, picture) {
  const [now, before] = [scoreOf(sheetOf(run, false), picture), scoreOf(shots.bases[run], picture)];
  return now === null || before === null ? null : now - before;
}

const chanceOf = (run, picture) => scoreOf(sheetOf(run, false), picture, CHANCE);

const hasChances = shots !== null && shots.sheets.some((sheet) => CHANCE in sheet.scores);

/** How many times as probable as under the base model, from its logarithm. */
const times = (log) => (log === null ? "base" : `×${log < 4.6 ? show(Number(Math.exp(log).toPrecision(2))) : "100+"}`);

const mean = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};

const runsWith = (picture) =>
  data.runs
    .map((_, run) => run)
    .filter((run) => {
      const sheet = sheetOf(run, false);
      return sheet !== null && shots.sheets[sheet].rows[picture] >= 0;
    });

/** Copies a picture from its sheet. */
function paint(canvas, sheet, picture) {
  const context = canvas.getContext("2d");
  const row = sheet === null ? -1 : shots.sheets[sheet].rows[picture];
  if (row < 0 || !images[sheet].complete) return context.clearRect(0, 0, canvas.width, canvas.height);
  const { width, height, columns } = shots.sheets[sheet];
  if (canvas.width !== width) Object.assign(canvas, { width, height });
  const from = [(row % columns) * width, Math.floor(row / columns) * height];
  context.drawImage(images[sheet], ...from, width, height, 0, 0, width, height);
}

/** A picture of a run, which `refresh` brings up to date. A click opens its film. */
function tile(run, picture) {
  const { width, height } = shots.sheets[sheetOf(run, false)];
  const canvas = el("canvas", { width, height });
  const [score, gain] = [el("span", { class: "score" }), el("span", { class: "gain" })];
  const mark = data.runs.length > 1 ? el("span", { class: "mark", colour: run }) : null;
  const node = el(
    "button",
    { class: "tile", type: "button", onclick: () => openFilm(picture) },
    canvas,
    mark,
    score,
    gain,
  );
  const refresh = () => {
    const sheet = sheetOf(run);
    paint(canvas, sheet, picture);
    score.textContent = showScore(scoreOf(sheet, picture));
    gain.textContent = state.base
      ? times(chanceOf(run, picture))
      : plusSign(gainOf(run, picture)) + showScore(gainOf(run, picture));
    const { prompt, number } = shots.of[picture];
    node.setAttribute("aria-label", `${data.runs[run].name}, ${prompt}, noise ${number}, log R ${score.textContent}`);
    node.title = `${prompt} · noise ${number}`;
  };
  return { node, refresh };
}

let tiles = [];

function add(run, picture) {
  const made = tile(run, picture);
  tiles.push(made);
  return made.node;
}

/** The numbers of all pictures in the chosen order: by noise, or the largest mean over runs first. */
function sorted() {
  const order = shots.of.map((_, picture) => picture);
  if (state.sort === "noise") return order;
  const score = { reward: (run, p) => scoreOf(sheetOf(run, false), p), gain: gainOf, chance: chanceOf }[state.sort];
  const key = order.map((picture) => mean(runsWith(picture).map((run) => score(run, picture))) ?? -Infinity);
  return order.sort((a, b) => key[b] - key[a]);
}

const cell = (picture) =>
  el(
    "div",
    { class: `cell${data.runs.length > 1 ? " several" : ""}` },
    runsWith(picture).map((run) => add(run, picture)),
  );

/** All pictures: a block for each prompt if they are in the order of the noise, otherwise one block. */
function layoutAll() {
  if (state.sort !== "noise") return [el("div", { class: "cells" }, sorted().map(cell))];
  const places = [...new Set(shots.of.map((p) => p.place))];
  return places.flatMap((place) => {
    const mine = sorted().filter((picture) => shots.of[picture].place === place);
    return [el("h3", {}, shots.of[mine[0]].prompt), el("div", { class: "cells" }, mine.map(cell))];
  });
}

/** Of each run the worst, the middle and the best pictures at the slider, by reward or by gain. */
function layoutStrips() {
  const reward = (run, picture) => scoreOf(sheetOf(run, false), picture);
  const score = { gain: gainOf, chance: chanceOf }[state.sort] ?? reward;
  return data.runs.flatMap((run, number) => {
    const known = shots.of.map((_, p) => p).filter((p) => runsWith(p).includes(number) && score(number, p) !== null);
    const order = known.sort((a, b) => score(number, a) - score(number, b));
    const count = Math.min(STRIP, Math.ceil(order.length / 3));
    const start = Math.floor((order.length - count) / 2);
    const strips = {
      worst: order.slice(0, count),
      median: order.slice(start, start + count),
      best: order.slice(-count),
    };
    const rows = Object.entries(strips).map(([name, row]) =>
      el(
        "div",
        { class: "strip" },
        el("span", {}, name),
        el(
          "div",
          { class: "cells" },
          row.map((p) => add(number, p)),
        ),
      ),
    );
    return [
      data.runs.length > 1 ? el("h3", {}, el("span", { class: "dot", colour: number }), run.name) : null,
      ...rows,
    ];
  });
}

/** A line for each run: its mean over the pictures, and the gain over the base model. */
function meansOf() {
  return data.runs.map((run, number) => {
    const sheet = sheetOf(number, false);
    if (sheet === null) return el("li", {}, el("span", { class: "dot", colour: number }), `${run.name}: no pictures`);
    const of = shots.of.map((_, picture) => scoreOf(sheet, picture)).filter((value) => value !== null);
    const gain = mean(shots.of.map((_, picture) => gainOf(number, picture)));
    const gained = `${plusSign(gain)}${showScore(gain)} over the base model`;
    const text = `${run.name} after ${shownUpdates(number)} updates: mean log R ${showScore(mean(of))} (${gained})`;
    return el("li", {}, el("span", { class: "dot", colour: number }), text);
  });
}

function gallery() {
  const [means, body] = [el("ul", { class: "runs small" }), el("div", { id: "pictures" })];
  const width = Math.max(...shots.sheets.map((sheet) => sheet.width));
  const runs = data.runs.length;
  body.style.setProperty("--wide", `${runs > 1 ? 80 : Math.max(96, Math.min(width, 128))}px`);
  body.style.setProperty("--across", runs === 1 || runs === 4 ? 4 : runs < 4 ? 2 * runs : Math.min(runs, 6));
  const refresh = (part = {}) => {
    if ("hover" in part) return;
    const moved = ["sort", "show"].some((name) => name in part) || !tiles.length;
    const resorted = "updates" in part && (state.sort !== "noise" || state.show === "strips");
    if (moved || resorted) {
      tiles = [];
      body.replaceChildren(...(state.show === "strips" ? layoutStrips() : layoutAll()).filter((node) => node !== null));
    }
    tiles.forEach((made) => made.refresh());
    means.replaceChildren(...meansOf());
  };
  listeners.push(refresh);
  Promise.allSettled(images.map((image) => image.decode())).then(() => refresh());
  refresh();
  return [means, body];
}

/** One noise at every number of updates, a row for each run. */
function openFilm(picture) {
  const { prompt, number } = shots.of[picture];
  const close = el("button", { class: "close", type: "button", onclick: () => film.close() }, "Close");
  const rows = runsWith(picture).flatMap((run) => {
    const frames = shots.policies[run].map(([updates, sheet]) => [updates === 0 ? "start" : String(updates), sheet]);
    const base = shots.bases[run];
    if (base !== null) frames.splice(0, frames.length && frames[0][1] === base ? 1 : 0, ["base", base]);
    const shown = frames.map(([label, sheet]) => frameOf(label, sheet, picture));
    return [
      el("h3", {}, el("span", { class: "dot", colour: run }), data.runs[run].name),
      el("div", { class: "film" }, shown),
    ];
  });
  const film = el("dialog", { onclose: () => film.remove() }, close, el("h2", { style: "margin-top:0" }, prompt));
  film.append(el("p", { class: "muted" }, `noise ${number}, by number of updates, with log R`), ...rows);
  document.body.append(film);
  film.showModal();
}

function frameOf(label, sheet, picture) {
  const canvas = el("canvas");
  paint(canvas, sheet, picture);
  const names = Object.keys(shots.sheets[sheet].scores).filter((name) => name !== CHANCE);
  const parts = names.map((name) => {
    const value = show(scoreOf(sheet, picture, name));
    return el("span", { class: "score" }, name === REWARD ? value : `${name.replace(`${REWARD}_`, "")} ${value}`);
  });
  return el("div", { class: "tile", style: "--tile:96px" }, canvas, el("b", {}, label), ...parts);
}
