// The other views: an overview by the four levels, alerts, our own cost.

import { brief, ends, exact, median } from "./answers.js";
import { chart, COLOURS, grid, h, legend, swatch, wide } from "./charts.js";
import { FIRING, PENDING } from "./heat_map.js";

const LEVELS = [
  ["parameters", "Parameters", "weights, gradients, updates, optimizer state"],
  ["functions", "Functions", "features, curvature, kernels: what the network computes"],
  ["structure", "Structure", "how neurons are organised"],
  ["subnetworks", "Subnetworks", "sparse parts that carry the training"],
];

// Sites that are named as the worst.
const WORST = 2;
// What counts directions: above 0, so that falling by a share means something.
const COUNTS = /(rank|participation_ratio|dimension)(_[\d.e-]+)?$/;
// Named alike, but a share of all heads, neurons or modules.
const SHARES = /(^|_)concentration_/;
// Fewer than this is no count: a share of it would be noise.
const LEAST = 1;
// Ends of the names of what a quantity is when nothing was learnt.
const NULLS = ["_chance", "_floor", "_random_walk", "_random"];

export async function overview(page) {
  const levels = await Promise.all(LEVELS.map(async ([level, title, what]) => {
    const names = page.choosable().filter((entry) => entry.level === level).map(({ name }) => name);
    const counted = names.filter((name) => COUNTS.test(name) && !SHARES.test(name));
    return { level, title, what, others: names.length - counted.length, quantities: (await Promise.all(counted.map((name) => endsOf(page, name)))).filter((runs) => runs.length) };
  }));
  const content = levels.map(({ level, title, what, quantities, others }) => h("section", { id: `level-${level}` }, h("h2", {}, title), h("p", { class: "what" }, what),
    quantities.length ? levelTable(page, title, quantities) : h("p", { class: "empty" }, others ? "No quantity here counts directions." : "Nothing was watched here."),
    others ? h("p", { class: "what" }, `${others} more quantities, which do not count directions, are in the map.`) : undefined));
  const key = h("p", { class: "what key-of-bars" }, "Medians over layers. Bar: latest; dot: first; dashed: null, the value of Gaussian matrices of the layers' shapes or a chance level that a monitor measured.");
  return { content: [h("div", { class: "cards" }, levels.map((level) => card(page, level))), key, ...content], rows: () => overviewRows(levels) };
}

/** Of each run that has a quantity: medians first and now, the lowest sites, and those that fell most. */
async function endsOf(page, name) {
  return Promise.all(page.shown().filter((run) => page.has(run, "vector", name)).map(async (run) => {
    const table = await page.table("matrix", { run, kind: "vector", name, limit: 2 });
    const last = table.steps.length - 1;
    const sites = table.sites.map((site) => ({ name, run, site, step: table.steps[last], first: table.at(0, site), now: table.at(last, site) }));
    const known = sites.filter(({ now }) => Number.isFinite(now));
    const fallen = known.filter(({ first, now }) => first > now && first >= LEAST).sort((a, b) => a.now / a.first - b.now / b.first);
    const middle = (key) => median(sites.map((site) => site[key]));
    return { name, run, sites, fallen, lowest: known.sort((a, b) => a.now - b.now), first: middle("first"), now: middle("now"), null: await nullOf(page, run, name, table) };
  }));
}

/** The median of what stands for nothing learnt: of Gaussian matrices of the layers' shapes, or as a monitor measured it. */
async function nullOf(page, run, name, table) {
  const measured = NULLS.map((end) => `${name}${end}`).find((one) => page.has(run, "vector", one));
  if (!measured) return median(table.sites.map((site) => table.nullOf(site)));
  const found = await page.table("matrix", { run, kind: "vector", name: measured, limit: 2 });
  return median(found.sites.map((site) => found.at(found.steps.length - 1, site)));
}

/** A level at a glance, with its worst site. */
function card(page, { level, title, quantities, others }) {
  const worst = quantities.flatMap((runs) => runs.flatMap(({ fallen }) => fallen.slice(0, 1))).sort((a, b) => a.now / a.first - b.now / b.first)[0];
  const count = quantities.length === 1 ? "1 quantity" : `${quantities.length} quantities`;
  const said = worst ? [h("span", { class: "what" }, "fell most: "), lead(page, worst, `${worst.site} ${percent(worst)}`), h("div", { class: "what" }, `${worst.name.replaceAll("_", " ")}, ${worst.run}`)]
    : [h("span", { class: "what" }, quantities.length ? "nothing fell" : others ? "no quantity here counts directions" : "nothing was watched here")];
  const jump = () => document.getElementById(`level-${level}`).scrollIntoView();
  return h("div", { class: "card" }, h("button", { type: "button", class: "title", onclick: jump }, `${title} · ${quantities.length ? count : "none"}`), h("div", {}, said));
}

function lead(page, { name, site, step }, text) {
  return h("button", { type: "button", class: "link", onclick: () => page.go(name, site, step) }, text);
}

function percent({ first, now }) {
  return `${brief(Number((100 * (now / first - 1)).toFixed(1))).replace("-", "−")} %`;
}

function levelTable(page, title, quantities) {
  const headings = ["quantity", "run", "median, first", "latest", "null", "", "lowest now", "fell most"].map((heading) => h(heading ? "th" : "td", heading ? { scope: "col" } : {}, heading));
  const bodies = quantities.map((runs) => h("tbody", {}, runs.map((row, i) => h("tr", {},
    i ? undefined : h("th", { scope: "rowgroup", rowspan: runs.length }, row.name.replaceAll("_", " ")),
    h("td", {}, row.run), ...[row.first, row.now, row.null].map((value) => h("td", { class: "number" }, brief(value))), h("td", {}, besideNull(page, row)),
    h("td", { class: "sites" }, row.lowest.slice(0, WORST).map((site) => lead(page, site, `${site.site} ${brief(site.now)}`))),
    h("td", { class: "sites" }, row.fallen.length ? row.fallen.slice(0, WORST).map((site) => lead(page, site, `${site.site} ${percent(site)}`)) : "–")))));
  return wide(title, h("table", { class: "levels" }, h("thead", {}, h("tr", {}, headings)), bodies));
}

/** The latest median as a bar, a dot where it was first, and a dashed line where its null is. */
function besideNull(page, { run, first, now, null: null_ }) {
  const most = Math.max(...[first, now, null_].filter(Number.isFinite));
  if (!Number.isFinite(now) || !(most > 0)) return undefined;
  const toX = (value) => 4 + (132 * Math.max(value, 0)) / most;
  const svg = h("svg:svg", { viewBox: "0 0 140 14", class: "beside", role: "img", "aria-label": `${brief(now)}, at first ${brief(first)}, null ${brief(null_)}` });
  svg.append(h("svg:rect", { x: 4, y: 4, width: Math.max(toX(now) - 4, 1), height: 6, fill: page.colour(run) }));
  if (Number.isFinite(first)) svg.append(h("svg:circle", { cx: toX(first), cy: 7, r: 3, class: "at-first" }));
  if (Number.isFinite(null_)) svg.append(h("svg:line", { x1: toX(null_), x2: toX(null_), y1: 0, y2: 14, class: "null" }));
  return svg;
}

function overviewRows(levels) {
  const lines = levels.flatMap(({ level, quantities }) => quantities.flat().flatMap(({ name, run, sites }) =>
    sites.map(({ site, first, now }) => [level, name, run, site, ...[first, now].map((value) => (value === undefined ? "" : exact(value)))])));
  return [["level", "quantity", "run", "layer", "first", "latest"], ...lines];
}

/** Rules of a run, each with its states by step. */
export async function rulesOf(page, run) {
  const entries = page.runs.get(run).filter(({ kind }) => kind === "alert");
  const tables = await Promise.all(entries.map(({ name }) => page.table("matrix", { run, kind: "alert", name, limit: 5000 })));
  return tables.flatMap((table) => table.sites.map((rule) => {
    const steps = table.steps.map((step, column) => [step, table.at(column, rule) ?? 0]);
    const known = new Map(steps);
    return { rule, steps, states: (step) => known.get(step) ?? steps[table.column(step)]?.[1] ?? 0 };
  }));
}

export async function alerts(page) {
  const runs = await Promise.all(page.shown().map(async (run) => {
    const [rules, { texts }] = await Promise.all([rulesOf(page, run), page.source.get("texts", { run })]);
    return { run, rules, texts };
  }));
  // The same time line for all, so that runs compare.
  const range = ends(runs.flatMap(({ rules }) => rules.flatMap(({ steps }) => steps.map(([step]) => step))));
  const sections = runs.map(({ run, rules, texts }) => {
    const rows = rules.map(({ rule, steps }) => [rule, timeLine(steps, range), stretches(steps).map(inWords).join(", ") || "never"]);
    const content = rules.length ? grid(["rule", `steps ${range[0]} to ${range[1]}`, "when"], rows) : h("p", { class: "empty" }, "No rule was watching this run.");
    return h("section", {}, h("h2", {}, run), content, ...texts.map((text) => markdownTable(text)));
  });
  const rows = () => [["run", "rule", "state", "from step", "to step"], ...runs.flatMap(({ run, rules }) => rules.flatMap(({ rule, steps }) =>
    stretches(steps).map(({ state, begin, end }) => [run, rule, state >= 2 ? "firing" : "pending", begin, end])))];
  return { content: [h("p", { class: "legend" }, swatch(PENDING, "pending"), swatch(FIRING, "firing")), ...sections], rows };
}

/** Stretches in which a rule was not at rest; each lasts until the next sample that says otherwise. */
function stretches(steps) {
  const found = [];
  steps.forEach(([step, state], i) => {
    const next = steps[i + 1]?.[0] ?? step;
    if (state < 1) return;
    if (found.length && found.at(-1).state === state && steps[i - 1][1] === state) Object.assign(found.at(-1), { end: step, next });
    else found.push({ state, begin: step, end: step, next });
  });
  return found;
}

function inWords({ state, begin, end }) {
  return `${state >= 2 ? "firing" : "pending"} from step ${begin} to ${end}`;
}

function timeLine(steps, [low, high]) {
  const found = stretches(steps);
  const svg = h("svg:svg", { viewBox: "0 0 300 14", class: "time", role: "img", "aria-label": found.map(inWords).join(", ") || "never" });
  const toX = (step) => (300 * (step - low)) / (high - low || 1);
  const [begin, end] = [toX(steps[0]?.[0] ?? low), toX(steps.at(-1)?.[0] ?? low)];
  svg.append(h("svg:rect", { x: begin, y: 6, width: Math.max(end - begin, 1), height: 2, class: "rule" }));
  for (const { state, begin: from, next } of found) {
    svg.append(h("svg:rect", { x: Math.min(toX(from), 297), y: 0, width: Math.max(toX(next) - toX(from), 3), height: 14, fill: state >= 2 ? FIRING : PENDING }));
  }
  return svg;
}

/** A table in Markdown as a table, any other text as it is. */
function markdownTable(text) {
  const rows = text.split("\n").filter((line) => line.startsWith("|") && !/^[|\s:-]+$/.test(line)).map((line) => line.split("|").slice(1, -1).map((cell) => cell.trim()));
  return rows.length ? grid(rows[0], rows.slice(1), "Messages of the alerts") : h("pre", {}, text);
}

// What costs are called, most telling first; others follow under the name that they were written with.
const COSTS = {
  overhead_percent: ["Increase of the training time so far", "%"],
  overhead_percent_after_warm_up: ["Increase of the training time after the warm-up", "%"],
  time_ms: ["Time of each sample", "ms"],
  every_n_steps: ["Steps from one sample to the next", "steps"],
  training_time_ms: ["Time of the training so far", "s", 1e-3],
  failures: ["Failed measurements", "in all"],
  skipped_steps: ["Due samples that were skipped with their step", "in all"],
  solver_calls: ["Calls of eigensolvers", "per sample"],
};
// Lines of runs, where the colours are those of monitors.
const DASHES = [undefined, "6 4", "2 3", "8 3 2 3"];

export async function cost(page) {
  const lines = new Map(Object.keys(COSTS).map((key) => [key, []]));
  const runs = page.shown().map((run) => [run, page.runs.get(run).filter(({ kind }) => kind === "cost").map(({ name }) => name)]);
  const monitors = [...new Set(runs.flatMap(([, names]) => names))];
  for (const [i, [run, names]] of runs.entries()) {
    for (const name of names) {
      const table = await page.table("matrix", { run, kind: "cost", name, limit: 2000 });
      // One monitor: colours are runs. Several: colours are monitors.
      const style = monitors.length === 1 ? { name: run, colour: page.colour(run) }
        : { name: runs.length > 1 ? `${run}: ${name}` : name, colour: COLOURS[monitors.indexOf(name) % COLOURS.length], dashed: DASHES[i % DASHES.length] };
      for (const key of table.sites) lines.set(key, [...(lines.get(key) ?? []), { ...style, xs: table.steps, ys: table.curve(key) }]);
    }
  }
  const known = [...lines].filter(([, of]) => of.length);
  if (!known.length) return { content: [h("p", { class: "empty" }, "None of the chosen runs has written the cost of watching.")], rows: () => [] };
  const rows = known.flatMap(([key, of]) => of.flatMap(({ name, xs, ys }) => xs.map((x, i) => [name, key, x, ys[i] === undefined ? "" : exact(ys[i])])));
  const isNothing = ([, of]) => of.every(({ ys }) => ys.every((value) => value === undefined || value === 0));
  const nothing = known.filter(isNothing).map(([key]) => titleOf(key)[0]);
  const figures = known.filter((one) => !isNothing(one)).map(([key, of]) => costFigure(key, of));
  return { content: [h("p", {}, `Cost of watching.${nothing.length ? ` Zero throughout: ${nothing.join(", ").toLowerCase()}.` : ""}`), h("div", { class: "costs" }, figures)],
    rows: () => [["run", "cost", "step", "value"], ...rows] };
}

function titleOf(key) {
  return COSTS[key] ?? [key.replaceAll("_", " "), ""];
}

function costFigure(key, lines) {
  const [title, unit, scale = 1] = titleOf(key);
  lines = lines.map((line) => ({ ...line, ys: line.ys.map((value) => value === undefined ? value : scale * value) }));
  return h("figure", { id: `cost-${key}` }, h("figcaption", {}, h("b", {}, title)), chart(lines, { title, x: "step", y: unit, zero: true, width: 420, height: 210 }),
    legend(lines.map((line) => ({ ...line, name: `${line.name}: ${brief(line.ys.at(-1))}` }))));
}
