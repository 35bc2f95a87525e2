// The map: a heat map per run, and below it the curve and the spectra of the layer that was picked.

import { BESIDE, blockOf, brief, ends, exact, firstKnown } from "./answers.js";
import { chart, COLOURS, grid, h, legend } from "./charts.js";
import { colour, colourBar, HeatMap, SHADES } from "./heat_map.js";
import { rulesOf } from "./views.js";

// Spectra of a layer that are asked for at once.
const SPECTRA = 100;
// Layers beyond which they are folded by block.
const MANY = 100;

export async function layers(page) {
  const args = { kind: "vector", name: page.quantity, first: page.first, last: page.last };
  const runs = page.shown().filter((run) => page.has(run, "vector", page.quantity));
  if (!runs.length) return { content: [h("p", { class: "empty" }, "None of the chosen runs has this quantity.")], rows: () => [] };
  const whole = await Promise.all(runs.map((run) => page.table("matrix", { run, ...args })));
  const fold = isFolded(page, whole);
  const tables = fold ? whole.map((table) => table.folded()) : whole;
  const spoken = (await Promise.all(runs.map((run) => rulesOf(page, run)))).map((rules) => rules.filter(({ steps }) => steps.some(([, state]) => state >= 1)));
  const ordered = inOrder(tables, page);
  const [shade, unit] = [SHADES[page.shade], page.entry().unit === "1" ? "" : page.entry().unit];
  const domain = shade.ends(ends(tables.flatMap((table) => shades(table, ordered, shade))));
  settle(page, whole);
  const details = h("section", { id: "details", "aria-label": "The chosen layer" });
  const pick = (site, step) => {
    if (fold && !whole.some((table) => table.index.has(site))) return page.set({ fold: "layers", filter: `${site}.` });
    page.picked = { site, step };
    return detail(page, details, whole).then(() => details.scrollIntoView({ block: "nearest" }));
  };
  page.maps = tables.map((table, i) => new HeatMap({
    run: runs[i], table, shade, domain, unit, quantity: page.quantity, sites: ordered.filter((site) => table.index.has(site)),
    alerts: spoken[i], lanes: Math.max(...spoken.map(({ length }) => length)), onPick: pick,
  }));
  if (page.picked) await detail(page, details, whole);
  const maps = h("div", { class: "maps" }, page.maps.map((map) => map.element));
  return { content: [colourBar(shade, domain, unit, tables), maps, details, asTable(page, tables, ordered, pick)], rows: () => rows(page.maps, ordered) };
}

/** Whether a row is a block: as chosen, else where layers are more than anyone reads and blocks are far fewer. */
function isFolded(page, tables) {
  if (page.fold !== "auto") return page.fold === "blocks";
  const sites = [...new Set(tables.flatMap((table) => table.sites))];
  return sites.length > MANY && new Set(sites.map(blockOf)).size * 2 < sites.length && !page.filter;
}

/** The layer below the map: the one that was picked, if the quantity has it; where there is one only, that. */
function settle(page, tables) {
  const having = tables.filter((table) => table.index.has(page.picked?.site) && table.steps.length);
  // Another run, or another quantity, has other samples: the nearest one.
  const near = having.map((table) => table.steps[table.column(page.picked.step)]);
  if (near.length) page.picked.step = near.reduce((best, step) => (Math.abs(step - page.picked.step) < Math.abs(best - page.picked.step) ? step : best));
  if (having.length) return;
  const sites = new Set(tables.flatMap((table) => table.sites));
  page.picked = sites.size === 1 ? { site: [...sites][0], step: Math.max(...tables.map((table) => table.steps.at(-1) ?? 0)) } : undefined;
}

/** Every value as it is coloured, to find the ends of the scale. */
function shades(table, sites, shade) {
  return sites.filter((site) => table.index.has(site)).flatMap((site) => {
    const curve = table.curve(site);
    return curve.some(Number.isFinite) ? ends(curve.map((value) => (value === undefined ? NaN : shade.of(value, firstKnown(curve))))) : [];
  });
}

/** Sites of all runs that fit the filter, as they are to be sorted: by the first run's numbers. */
function inOrder(tables, { filter, sort }) {
  const sites = [...new Set(tables.flatMap((table) => table.sites))].filter((site) => site.toLowerCase().includes(filter.toLowerCase()));
  if (sort === "depth") return sites;
  const rank = (site) => {
    const known = (tables.find((table) => table.index.has(site))?.curve(site) ?? []).filter(Number.isFinite);
    if (!known.length) return Infinity;
    return sort === "value" ? known.at(-1) : -Math.abs(known.at(-1) - known[0]) / (Math.abs(known[0]) || 1);
  };
  const ranks = new Map(sites.map((site) => [site, rank(site)]));
  return sites.sort((a, b) => ranks.get(a) - ranks.get(b) || 0);
}

/** What the maps show, as rows. */
function rows(maps, sites) {
  const cell = (value) => (value === undefined ? "" : exact(value));
  const lines = maps.flatMap(({ run, table }) => table.steps.map((step, column) => [run, step, ...sites.map((site) => cell(table.at(column, site)))]));
  return [["run", "step", ...sites], ...lines];
}

/** The same as a table, for those who do not see the map. */
function asTable(page, tables, ordered, pick) {
  const lines = () => page.maps.flatMap(({ run }, i) => ordered.filter((site) => tables[i].index.has(site)).map((site) => {
    const curve = tables[i].curve(site);
    const known = curve.filter((value) => value !== undefined);
    return [h("button", { type: "button", class: "link", onclick: () => pick(site, tables[i].steps.at(-1)) }, site), run,
      brief(known[0]), brief(known.at(-1)), brief(ends(curve)[0]), brief(ends(curve)[1]), String(known.filter((value) => !Number.isFinite(value)).length)];
  }));
  const fold = h("details", { id: "words", open: page.words, ontoggle: () => {
    page.words = fold.open;
    if (fold.open && fold.children.length === 1) fold.append(grid(["layer", "run", "first", "latest", "least", "most", "no number"], lines(), page.quantity));
  } }, h("summary", {}, "The same as a table"));
  return fold;
}

/** Curve and spectra of the layer that was picked. */
async function detail(page, details, whole) {
  const { site, step } = page.picked;
  const tables = await curvesOf(page, site, whole);
  const lacking = new Set(page.maps.filter((_, i) => !whole[i].index.has(site)).map(({ run }) => run));
  const runs = page.shown().filter((run) => !lacking.has(run));
  const spectra = await spectraOf(page, runs, site);
  const pictures = await picturesOf(page, runs, site);
  if (page.picked?.site !== site || page.picked.step !== step) return undefined;
  if (!tables.length) return details.replaceChildren(h("p", { class: "empty" }, `None of the chosen runs has ${page.quantity} of ${site}.`));
  // Several pictures stand in two columns, with the curve.
  const beside = pictures.length > 1 ? 1 : Math.max(spectra.length, pictures[0]?.found.length ?? 0, 1);
  const width = Math.max(300, Math.min(680, page.body.clientWidth / (1 + beside) - 16));
  const each = pictures.length > 1 ? Math.max(280, width / Math.max(...pictures.map(({ found }) => found.length)) - 16) : width;
  const figures = pictures.length ? pictures.map((picture) => pictureFigure(page, picture, site, step, each)) : [spectrumFigure(page, spectra, site, step, width)];
  const near = await besides(page, tables, site);
  if (page.picked?.site !== site || page.picked.step !== step) return undefined;
  const box = h("div", { class: "details" }, curveFigure(page, tables, near, site, step, width), figures);
  box.style.setProperty("--spectra", `${beside}fr`);
  return details.replaceChildren(h("h2", {}, `${site} at step ${step}`), box);
}

/** Run and table of each run that has the layer. */
async function curvesOf(page, site, whole) {
  const runs = page.maps.filter((_, i) => whole[i].index.has(site)).map(({ run }) => run);
  const args = { kind: "vector", name: page.quantity, site, limit: 5000 };
  return Promise.all(runs.map(async (run) => [run, await page.table("matrix", { run, ...args })]));
}

async function spectraOf(page, shown, site) {
  const name = page.entry().source;
  const runs = shown.filter((run) => page.has(run, "spectrum", name));
  // A report has all sites in one answer.
  const args = { name, site: page.source.live ? site : undefined, limit: SPECTRA };
  // A run may have spectra of this source and none of this layer: the server says so.
  const tables = await Promise.all(runs.map((run) => page.table("spectra", { run, ...args }).catch(() => undefined)));
  return tables.map((table, i) => [runs[i], table]).filter(([, table]) => table?.index.has(site) && table.steps.length);
}

const EVERY = "first (dark) to latest (bright)";

/** Which curves are drawn against which, of what is looked at; those of a fit at the chosen sample only. */
function pairsOf(page) {
  const operator = page.quantity.match(/^(.*?(hessian|gauss_newton|empirical_fisher|monte_carlo_fisher))_/)?.[1];
  if (operator) {
    return [{ id: "density", x: `${operator}_eigenvalue`, y: `${operator}_density`, title: "Density of the eigenvalues", note: `${EVERY}; none where it is not valid`,
      over: "cell", axes: ["eigenvalue", "density"], logY: true }];
  }
  const { source } = page.entry();
  const radius = source.endsWith("neuromfa") ? "ln r" : "ln of the mean mass";
  return [
    { id: "f", x: `${source}_alpha`, y: `${source}_f`, title: "Multifractal spectrum f(alpha)", note: `${EVERY}; none where it is not valid`, over: "q", axes: ["alpha", "f"] },
    { id: "partition", x: `${source}_log_radius`, y: `${source}_log_partition`, fit: `${source}_log_partition_fit`, title: "Partition function",
      note: "at the chosen step; dashed: the lines that were fitted", over: "q", axes: [radius, "ln Z"] },
    { id: "dimensions", x: `${source}_neuron_dimension`, y: `${source}_neuron_dimension_density`, title: "Dimensions of single neurons", note: EVERY,
      over: "cell", axes: ["dimension", "density"] },
  ];
}

/** Pictures that the chosen runs have of the layer, each with run, x, y and fit of each. */
async function picturesOf(page, shown, site) {
  const of = (run, name) => page.table("curves", { run, name, site: page.source.live ? site : undefined, limit: SPECTRA }).catch(() => undefined);
  const pictures = await Promise.all(pairsOf(page).map(async (pair) => {
    const runs = shown.filter((run) => page.has(run, "curve", pair.y));
    const names = [pair.x, pair.y, pair.fit].filter(Boolean);
    const found = await Promise.all(runs.map(async (run) => [run, ...await Promise.all(names.map((name) => of(run, name)))]));
    return { ...pair, found: found.filter(([, ...tables]) => tables.every((table) => table?.index.has(site) && table.steps.length)) };
  }));
  return pictures.filter(({ found }) => found.length);
}

/** Curves of one layer over steps, run by run. */
function pictureFigure(page, { id, title, note, over, axes, logY, found }, site, step, width) {
  const charts = found.map(([run, xs, ys, fits]) => {
    const lines = fits ? fitLines(xs, ys, fits, site, step) : stepLines(xs, ys, site, step);
    // The tails of a Gaussian would stretch the axis without end.
    const floor = logY ? 1e-6 * Math.max(...lines.flatMap((line) => line.ys.filter(Number.isFinite))) : 0;
    return h("div", {}, h("p", { class: "run" }, run),
      chart(lines, { title: `${title}, ${site}, ${run}`, x: axes[0], y: axes[1], logY, floor, width, height: 260 }), legend(lines));
  });
  const sheet = () => [["run", "step", over, ...axes], ...found.flatMap(([run, xs, ys]) => ys.steps.flatMap((at, i) =>
    ys.axis.map((q, k) => [run, at, q, exact(xs.at(i, site, k % xs.width)), exact(ys.at(i, site, k))])))];
  return h("figure", { id }, h("figcaption", {}, h("b", {}, title), ` ${note} `, csv(page, sheet, title)), h("div", { class: "spectra" }, charts));
}

/** From the first, dark, to the latest, bright; the chosen one in ink. */
function stepLines(xs, ys, site, step) {
  const [chosen, last] = [ys.column(step), Math.max(ys.steps.length - 1, 1)];
  const line = (i, style) => ({ name: `step ${ys.steps[i]}`, xs: xs.spectrum(i, site), ys: ys.spectrum(i, site), ...style });
  const lines = ys.steps.map((_, i) => line(i, i === chosen ? { colour: "var(--accent)" } : { colour: `rgb(${colour(i / last)})`, faint: true }));
  return lines.filter((line) => line.ys.some(Number.isFinite));
}

/** Of the chosen sample, a curve for each number that the axis repeats, and the line that was fitted to it. */
function fitLines(xs, ys, fits, site, step) {
  const at = ys.column(step);
  const x = xs.spectrum(at, site);
  return [...new Set(ys.axis)].flatMap((q, i) => {
    const of = (table) => table.spectrum(at, site).filter((_, k) => table.axis[k] === q);
    const style = { colour: COLOURS[i % COLOURS.length] };
    return [{ name: `q = ${q}`, xs: x, ys: of(ys), ...style }, { name: "", xs: [x[0], x.at(-1)], ys: of(fits), ...style, faint: true, dashed: true }];
  });
}

/** What stands beside a quantity at a layer: its error, as a band, and what chance or a floor is, dashed. */
async function besides(page, tables, site) {
  const found = await Promise.all(tables.map(([run]) => Promise.all(BESIDE.map(async (end) => {
    const name = `${page.quantity}${end}`;
    if (!page.has(run, "vector", name)) return undefined;
    const table = await page.table("matrix", { run, kind: "vector", name, ...(page.source.live ? { site } : {}), limit: 5000 }).catch(() => undefined);
    return table?.index.has(site) ? [end, table] : undefined;
  }))));
  return found.map((some) => new Map(some.filter(Boolean)));
}

function curveFigure(page, tables, beside, site, step, width) {
  const lines = tables.map(([run, table], i) => {
    const error = beside[i].get("_error");
    const sizes = error && new Map(error.steps.map((at, column) => [at, error.at(column, site)]));
    return { name: run, xs: table.steps, ys: table.curve(site), colour: page.colour(run), errors: sizes && table.steps.map((at) => sizes.get(at)) };
  });
  const nulls = [...tables.flatMap(([run], i) => [...beside[i]].filter(([end]) => end !== "_error").map(([end, other]) =>
    ({ name: `${run}: ${end.slice(1).replaceAll("_", " ")}`, xs: other.steps, ys: other.curve(site), colour: page.colour(run), dashed: true }))),
  ...gaussian(tables, site)];
  const [near, far] = nearAndFar(lines, nulls);
  const unit = page.entry().unit === "1" ? "" : page.entry().unit;
  const values = tables.map(([run, table]) => {
    const at = table.steps[table.column(step)];
    return `${run}: ${exact(table.at(table.column(step), site))}${at === step ? "" : ` (of step ${at})`}`;
  }).join("; ");
  const counted = [...new Set(tables.map(([, table]) => table.counted()))].join("; ");
  const sheet = () => [["run", "step", site], ...[...lines, ...nulls].flatMap(({ name, xs, ys }) => xs.map((x, i) => [name, x, ys[i] === undefined ? "" : exact(ys[i])]))];
  return h("figure", { id: "curve" }, h("figcaption", {}, h("b", {}, page.quantity.replaceAll("_", " ")), ` ${counted} `, csv(page, sheet, "curve")),
    chart([...lines, ...near], { title: `${page.quantity} of ${site}`, x: "step", y: unit, marker: step, width, height: 260 }), legend([...lines, ...near, ...far]),
    h("p", { class: "status" }, `At step ${step}: ${values}`));
}

/** What a Gaussian matrix of that shape has, once for all runs in which it is the same. */
function gaussian(tables, site) {
  const steps = [...new Set(tables.flatMap(([, table]) => table.steps))].sort((a, b) => a - b);
  const values = [...new Set(tables.map(([, table]) => table.nullOf(site)).filter((value) => value !== undefined))];
  return values.map((value) => ({ name: "Gaussian matrix of that shape", xs: steps, ys: steps.map(() => value), colour: "var(--soft)", dashed: true }));
}

/** Which nulls are drawn, and those so far away that the curve would look flat beside them: of these the number is said. */
function nearAndFar(lines, nulls) {
  const of = (some) => ends(some.flatMap(({ ys }) => ys));
  const [low, high] = of(lines);
  const room = 3 * Math.max(high - low, 0.1 * Math.abs(high));
  const isNear = (line) => { const [least, most] = of([line]); return least >= low - room && most <= high + room; };
  const far = nulls.filter((line) => !isNear(line)).map((line) => ({ ...line, name: `${line.name}: ${brief(line.ys.findLast(Number.isFinite))}, off this axis` }));
  return [nulls.filter(isNear), far];
}

function csv(page, sheet, of) {
  return h("button", { type: "button", class: "link", "aria-label": `CSV of the ${of}`, onclick: () => page.save(sheet()) }, "CSV");
}

/** Spectra of one layer over steps, run by run on the same axes; a slider chooses the one that is drawn strongly. */
function spectrumFigure(page, found, site, step, width) {
  const source = page.entry().source.replaceAll("_", " ");
  if (!found.length) {
    return h("figure", { id: "spectrum" }, h("figcaption", {}, h("b", {}, `Spectrum of the ${source}`)),
      h("p", { class: "empty" }, "None was written: no statistic of this source reads all singular values."));
  }
  const steps = [...new Set(found.flatMap(([, table]) => table.steps))].sort((a, b) => a - b);
  const away = (s) => Math.abs(s - (page.picked.spectrum ?? step));
  const at = steps.reduce((best, s, i) => (away(s) < away(steps[best]) ? i : best), 0);
  const box = h("div", {});
  const slider = h("input", { type: "range", id: "spectrum-step", min: 0, max: steps.length - 1, value: at, oninput: () => draw(steps[slider.value]) });
  const draw = (chosen) => {
    page.picked.spectrum = chosen;
    slider.setAttribute("aria-valuetext", `step ${chosen}`);
    box.replaceChildren(...spectraAt(found, site, chosen, source, width));
  };
  draw(steps[at]);
  return h("figure", { id: "spectrum" },
    h("figcaption", {}, h("b", {}, `Singular values of the ${source}`), " every tenth sample, first (dark) to latest (bright); dashed: Gaussian matrix of that shape and norm ", csv(page, () => spectrumRows(found, site), "spectra")),
    box, h("label", { class: "slider" }, "Step", slider));
}

function spectraAt(found, site, step, source, width) {
  const largest = found.map(([, table]) => Math.max(...table.steps.map((_, i) => table.at(i, site, 1)).filter(Number.isFinite)));
  // What is below 1e-8 of the largest is rounding of the Gram matrix.
  const floor = 1e-8 * Math.max(...largest);
  const drawn = found.map(([run, table]) => [run, spectrumLines(table, site, step)]);
  const domain = ends(drawn.flatMap(([, lines]) => lines.flatMap(({ ys }) => ys.filter((value) => value > floor))));
  const charts = drawn.map(([run, lines]) => h("div", {}, h("p", { class: "run" }, run),
    chart(lines, { title: `Singular values of the ${source} of ${site}, ${run}`, x: "rank", logX: true, first: 1, logY: true, floor, domain, width, height: 240 }), legend(lines)));
  const values = found.map(([run, table]) => `${run}, step ${table.steps[table.column(step)]}: largest ${exact(table.at(table.column(step), site, 1))}`);
  return [h("div", { class: "spectra" }, charts), h("p", { class: "status", role: "status" }, values.join("; "))];
}

/** Spectra from the first, dark, to the latest, bright; the chosen one in ink, and what noise would give. */
function spectrumLines(table, site, step) {
  const { ranks, null: noise } = table.noise[table.index.get(site)];
  const [chosen, last] = [table.column(step), Math.max(table.steps.length - 1, 1)];
  const of = (i) => table.spectrum(i, site).slice(1, 1 + ranks.length);
  const faint = table.steps.flatMap((_, i) => (i === chosen ? [] : [{ name: "", xs: ranks, ys: of(i), colour: `rgb(${colour(i / last)})`, faint: true }]));
  const norm = table.at(chosen, site, 0);
  return [...faint, { name: "Gaussian (Marchenko–Pastur)", xs: ranks, ys: noise.map((value) => value * norm), colour: "var(--soft)", dashed: true },
    { name: `step ${table.steps[chosen]}`, xs: ranks, ys: of(chosen), colour: "var(--accent)" }];
}

function spectrumRows(found, site) {
  const lines = found.flatMap(([run, table]) => {
    const { ranks, null: noise } = table.noise[table.index.get(site)];
    return table.steps.flatMap((step, i) => ranks.map((rank, k) => [run, step, rank + 1, exact(table.at(i, site, k + 1)), exact(noise[k] * table.at(i, site, 0))]));
  });
  return [["run", "step", "rank", "singular value", "of a Gaussian matrix"], ...lines];
}
