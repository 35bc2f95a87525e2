// The tab "Low rank" of TensorBoard, and the page that `lightning-lowrank report` writes: the same views of the same answers.
// Nothing is ever parsed as HTML: names of runs and sites become text through `h`, and only there.

// ---------------------------------------------------------------- answers

const GAP = 0x7fc00001; // bits of a site that a sample was not to read; another NaN was read and is no number

/** Asks TensorBoard's server. */
class Server {
  live = true;

  async get(route, args = {}) {
    const response = await fetch(this.url(route, args));
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error ?? response.statusText);
    return answer;
  }

  url(route, args) {
    const url = new URL(`./${route}`, import.meta.url);
    for (const [key, value] of Object.entries(args)) if (value !== undefined && value !== "") url.searchParams.set(key, value);
    return url;
  }
}

/** Looks answers up that were written into the page. */
class Archive {
  live = false;

  constructor(answers) {
    this.answers = answers;
  }

  async get(route, args = {}) {
    const keys = ["run", "kind", "name"].filter((key) => args[key] !== undefined);
    const found = this.answers.find((a) => a.route === route && keys.every((key) => a[key] === args[key]));
    if (!found) throw new Error(`the report has no ${route} of ${args.run ?? "any run"}`);
    return between(found.answer, args);
  }
}

/** Of an answer that has all samples, those between two steps. */
function between(answer, { first, last }) {
  if ((first ?? "") === "" && (last ?? "") === "") return answer;
  const [low, high] = [first === "" ? -Infinity : Number(first ?? -Infinity), (last ?? "") === "" ? Infinity : Number(last)];
  return { ...answer, keep: answer.steps.flatMap((step, i) => (step >= low && step <= high ? [i] : [])) };
}

/** Samples x sites (x width) of an answer. */
class Table {
  constructor(answer) {
    const text = atob(answer.values);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    this.values = new Float32Array(bytes.buffer);
    this.bits = new Uint32Array(bytes.buffer);
    this.rows = answer.keep ?? answer.steps.map((_, i) => i);
    this.steps = this.rows.map((row) => answer.steps[row]);
    this.sites = answer.sites;
    this.total = answer.total;
    this.thinned = answer.steps.length < answer.between;
    this.between = answer.keep ? this.rows.length : answer.between;
    this.width = answer.width ?? 1;
    this.noise = answer.noise;
    this.index = new Map(this.sites.map((site, i) => [site, i]));
  }

  at(column, site, k = 0) {
    const i = this.index.get(site);
    return i === undefined ? undefined : this._at((this.rows[column] * this.sites.length + i) * this.width + k);
  }

  /** undefined where it was not read. */
  _at(i) {
    return this.bits[i] === GAP ? undefined : this.values[i];
  }

  /** How many of the samples there are. */
  counted() {
    if (!this.thinned) return `all ${this.steps.length} samples`;
    return `${this.steps.length} of ${this.between > this.steps.length ? this.between : this.total} samples, evenly spread`;
  }

  curve(site) {
    return this.steps.map((_, column) => this.at(column, site));
  }

  spectrum(column, site) {
    return Array.from({ length: this.width }, (_, k) => this.at(column, site, k));
  }

  /** The column of the last sample at or before a step; the first if there is none. */
  column(step) {
    let found = 0;
    this.steps.forEach((s, i) => { if (s <= step) found = i; });
    return found;
  }
}

// ---------------------------------------------------------------- numbers and words

/** As few digits as give the same float32 back. */
function exact(value) {
  if (value === undefined) return "not read";
  if (!Number.isFinite(value)) return String(value);
  for (let digits = 3; digits < 9; digits++) {
    const short = Number(value.toPrecision(digits));
    if (Math.fround(short) === value) return String(short);
  }
  return String(Number(value.toPrecision(9)));
}

function brief(value) {
  return value === undefined ? "–" : Number.isFinite(value) ? String(Number(value.toPrecision(4))) : String(value);
}

function power(exponent) {
  return exponent < -3 || exponent > 5 ? `1e${Number(exponent.toFixed(2))}` : brief(10 ** exponent);
}

function median(values) {
  const known = values.filter(Number.isFinite).sort((a, b) => a - b);
  const middle = known.length >> 1;
  return known.length === 0 ? undefined : known.length % 2 ? known[middle] : (known[middle - 1] + known[middle]) / 2;
}

function firstKnown(values) {
  return values.find(Number.isFinite);
}

function ends(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
  return low <= high ? [low, high] : [0, 1];
}

/** Round numbers from end to end. */
function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i <= Math.floor(high / step + 1e-9); i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function csvCell(cell) {
  const text = /^[=+\-@\t\r]/.test(cell) && Number.isNaN(Number(cell)) ? `'${cell}` : String(cell);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// ---------------------------------------------------------------- elements

/** An element; children that are strings are text, never markup. */
function h(tag, attributes = {}, ...children) {
  const element = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined));
  return element;
}

function choice(label, options, value, onChange, id) {
  const list = h("select", { id, onchange: (event) => onChange(event.target.value) });
  const groups = new Map();
  for (const [key, text, group] of options) {
    const option = h("option", { value: key }, text);
    option.selected = key === value;
    if (group && !groups.has(group)) list.append(groups.set(group, h("optgroup", { label: group })).get(group));
    (groups.get(group) ?? list).append(option);
  }
  return h("label", {}, label, list);
}

function grid(headings, rows, caption) {
  return h("table", {},
    caption ? h("caption", {}, caption) : undefined,
    h("thead", {}, h("tr", {}, headings.map((heading) => h("th", { scope: "col" }, heading)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => h(i ? "td" : "th", i ? {} : { scope: "row" }, cell))))));
}

// ---------------------------------------------------------------- lines

const COLOURS = ["#1f77b4", "#e6700b", "#2a9134", "#c2255c", "#7048c8", "#8c564b", "#0b9aa8", "#9a8b00"];

/** Curves with axes, as SVG. Each line has a name, xs, ys, a colour, and may be dashed or faint. */
function chart(lines, { title, x, y, logX = false, logY = false, marker, floor = 0, width = 460, height = 240 }) {
  const [left, right, top, bottom] = [56, 10, 10, 34];
  const onX = logX ? (v) => Math.log10(v + 1) : (v) => v;
  const onY = logY ? (v) => (v > floor ? Math.log10(v) : NaN) : (v) => v;
  const points = lines.map((line) => line.xs.map((value, i) => [onX(value), onY(line.ys[i] ?? NaN)]));
  const [x0, x1] = ends(points.flat().map((p) => p[0]));
  let [y0, y1] = ends(points.flat().map((p) => p[1]));
  if (y0 === y1) [y0, y1] = [y0 - (Math.abs(y0) * 0.1 || 0.5), y1 + (Math.abs(y1) * 0.1 || 0.5)];
  const toX = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (width - left - right);
  const toY = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
  const svg = h("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": told(title, lines), class: "chart" });
  for (const tick of ticks(y0, y1)) {
    svg.append(h("svg:line", { x1: left, x2: width - right, y1: toY(tick), y2: toY(tick), class: "rule" }),
      h("svg:text", { x: left - 6, y: toY(tick) + 4, "text-anchor": "end" }, logY ? power(tick) : brief(tick)));
  }
  const marks = logX ? [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 4095].filter((v) => onX(v) >= x0 && onX(v) <= x1) : ticks(x0, x1);
  for (const mark of marks) svg.append(h("svg:text", { x: toX(onX(mark)), y: height - bottom + 16, "text-anchor": "middle" }, brief(logX ? mark + 1 : mark)));
  svg.append(h("svg:text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, x),
    h("svg:text", { x: 4, y: top + 2, class: "unit" }, y));
  if (marker !== undefined) svg.append(h("svg:line", { x1: toX(onX(marker)), x2: toX(onX(marker)), y1: top, y2: height - bottom, class: "marker" }));
  lines.forEach((line, i) => svg.append(...strokes(line, points[i], toX, toY)));
  return svg;
}

/** A line, broken where there is no number; a lone point as a dot. */
function strokes(line, points, toX, toY) {
  const pieces = [[]];
  for (const [x, y] of points) Number.isFinite(y) ? pieces.at(-1).push([toX(x), toY(y)]) : pieces.push([]);
  const style = { stroke: line.colour, "stroke-dasharray": line.dashed ? "5 4" : undefined, class: line.faint ? "faint" : "line" };
  return pieces.filter((piece) => piece.length).map((piece) => piece.length > 1
    ? h("svg:polyline", { ...style, points: piece.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" ") }, h("svg:title", {}, line.name))
    : h("svg:circle", { cx: piece[0][0], cy: piece[0][1], r: 2.5, fill: line.colour }, h("svg:title", {}, line.name)));
}

/** What a chart shows, for those who do not see it. */
function told(title, lines) {
  const clear = lines.filter((line) => !line.faint);
  return `${title}. ${clear.map((line) => `${line.name}: from ${brief(line.ys[0])} to ${brief(line.ys.at(-1))}, least ${brief(ends(line.ys)[0])}, most ${brief(ends(line.ys)[1])}`).join("; ")}`;
}

function legend(lines) {
  return h("p", { class: "legend" }, lines.filter((line) => !line.faint).map((line) => {
    const key = h("span", { class: line.dashed ? "key dashed" : "key" });
    key.style.borderColor = line.colour;
    return h("span", {}, key, line.name);
  }));
}

// ---------------------------------------------------------------- heat map

const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const NAN_COLOUR = [230, 30, 60];
const INF_COLOUR = [255, 120, 220];

function colour(t) {
  const at = Math.min(Math.max(t, 0), 1) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[i].map((low, c) => Math.round(low + (VIRIDIS[i + 1][c] - low) * (at - i)));
}

const PALETTE = Array.from({ length: 256 }, (_, i) => colour(i / 255));

/** How values are shown as colours. */
const SHADES = {
  value: { text: "value", of: (value) => value, back: (t) => t },
  log: { text: "value, log", of: (value) => (value > 0 ? Math.log10(value) : value === 0 ? -Infinity : value), back: (t) => 10 ** t },
  change: { text: "multiple of the layer's first", of: (value, first) => value / first, back: (t) => t },
};

/** Layers x steps on a canvas, one column per sample, with a cursor for mouse and keyboard. */
class HeatMap {
  constructor({ run, table, sites, alerts, lanes, shade, domain, unit, quantity, onPick }) {
    Object.assign(this, { run, table, sites, alerts, lanes, shade, domain, unit, quantity, onPick });
    this.firsts = new Map(sites.map((site) => [site, firstKnown(table.curve(site))]));
    this.row = this.column = 0;
    this.canvas = h("canvas", {
      tabindex: 0, role: "application", "aria-roledescription": "heat map",
      "aria-label": `${quantity} of run ${run}: ${sites.length} layers, ${table.steps.length} samples. Arrow keys move, Enter shows the layer.`,
      onmousemove: (event) => this.point(event), onmouseleave: () => { this.tip.hidden = true; },
      onclick: (event) => { this.point(event); this.pick(); }, onkeydown: (event) => this.press(event),
    });
    this.cursor = h("div", { class: "cursor", hidden: true });
    this.tip = h("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    this.status = h("p", { class: "status", role: "status", "aria-live": "polite" }, "Point at a cell, or use the arrow keys.");
    this.element = h("figure", { class: "heat" }, h("figcaption", {}, h("b", {}, run), ` ${table.counted()}`), this.status,
      h("div", { class: "stage" }, this.canvas, this.cursor, this.tip));
  }

  /** Draw as wide as there is room. */
  draw() {
    const width = Math.max(280, this.element.clientWidth || 600);
    const strip = 7 * this.lanes;
    this.left = Math.min(230, Math.max(90, width * 0.3));
    this.top = strip ? strip + 4 : 0;
    this.height = Math.max(2, Math.min(22, Math.floor(520 / Math.max(this.sites.length, 1)))) * this.sites.length;
    this.width = width - this.left - 8;
    const [full, scale] = [this.top + this.height + 20, window.devicePixelRatio || 1];
    Object.assign(this.canvas, { width: width * scale, height: full * scale });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${full}px` });
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    if (this.table.steps.length && this.sites.length) {
      context.imageSmoothingEnabled = false;
      context.drawImage(this.cells(), this.left, this.top, this.width, this.height);
    }
    this.words(context, getComputedStyle(this.canvas).color);
    this.strips(context);
  }

  /** One pixel per cell; what was not read is left clear. */
  cells() {
    const [columns, rows] = [this.table.steps.length, this.sites.length];
    const canvas = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
    const image = new ImageData(columns, rows);
    const [low, high] = this.domain;
    this.sites.forEach((site, row) => {
      const first = this.firsts.get(site);
      for (let column = 0; column < columns; column++) {
        const value = this.table.at(column, site);
        if (value === undefined) continue;
        const shade = this.shade.of(value, first);
        const rgb = Number.isNaN(shade) ? NAN_COLOUR : shade === Infinity ? INF_COLOUR
          : PALETTE[Math.round(255 * Math.min(1, Math.max(0, (shade - low) / (high - low || 1))))];
        image.data.set(rgb, 4 * (row * columns + column));
        image.data[4 * (row * columns + column) + 3] = 255;
      }
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  words(context, ink) {
    Object.assign(context, { fillStyle: ink, font: "11px Roboto, Arial, sans-serif", textBaseline: "middle", textAlign: "right" });
    const size = this.height / this.sites.length;
    const every = Math.ceil(13 / size);
    this.sites.forEach((site, row) => {
      if (row % every === 0) context.fillText(shortened(context, site, this.left - 8), this.left - 6, this.top + Math.max((row + 0.5) * size, 6));
    });
    context.textAlign = "center";
    const columns = this.table.steps.length;
    const marks = Math.max(1, Math.min(columns, Math.floor(this.width / 60)));
    for (let i = 0; i < marks; i++) {
      const column = marks === 1 ? 0 : Math.round((i * (columns - 1)) / (marks - 1));
      context.fillText(String(this.table.steps[column] ?? ""), this.left + ((column + 0.5) / columns) * this.width, this.top + this.height + 11);
    }
  }

  strips(context) {
    this.alerts.forEach(({ states }, i) => this.table.steps.forEach((step, column) => {
      const state = states(step);
      if (state < 1) return;
      context.fillStyle = state >= 2 ? "#d4213d" : "#e8a317";
      const size = this.width / this.table.steps.length;
      context.fillRect(this.left + column * size, 7 * i, Math.max(1, size), 6);
    }));
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left - this.left) / this.width) * this.table.steps.length);
    const row = Math.floor(((event.clientY - box.top - this.top) / this.height) * this.sites.length);
    if (column < 0 || row < 0 || column >= this.table.steps.length || row >= this.sites.length) return;
    this.move(row, column);
    this.tip.textContent = this.status.textContent;
    this.tip.hidden = false;
    const x = event.clientX - box.left;
    Object.assign(this.tip.style, { top: `${event.clientY - box.top + 14}px`, left: `${Math.min(x + 12, box.width - 220)}px` });
  }

  move(row, column) {
    this.row = Math.min(Math.max(row, 0), this.sites.length - 1);
    this.column = Math.min(Math.max(column, 0), this.table.steps.length - 1);
    const [size, span] = [this.height / this.sites.length, this.width / this.table.steps.length];
    Object.assign(this.cursor.style, {
      left: `${this.left + this.column * span}px`, top: `${this.top + this.row * size}px`, width: `${Math.max(span, 3)}px`, height: `${Math.max(size, 3)}px`,
    });
    this.cursor.hidden = false;
    this.status.textContent = this.reading();
  }

  /** Go on where the cursor of an older map of the run was. */
  take(older) {
    this.canvas.focus({ preventScroll: true });
    if (this.sites.length && this.table.steps.length) this.move(this.sites.indexOf(older.sites[older.row]), this.table.column(older.table.steps[older.column]));
  }

  /** What is under the cursor. */
  reading() {
    const [site, step] = [this.sites[this.row], this.table.steps[this.column]];
    const states = this.alerts.filter(({ states }) => states(step) >= 1).map(({ rule, states }) => `${rule} ${states(step) >= 2 ? "firing" : "pending"}`);
    const value = this.table.at(this.column, site);
    const said = [site, `step ${step}`, `${exact(value)}${Number.isFinite(value) && this.unit !== "1" ? ` ${this.unit}` : ""}`];
    return [...said, ...states.map((state) => `alert: ${state}`)].join(" · ");
  }

  pick() {
    if (this.sites.length && this.table.steps.length) this.onPick(this.sites[this.row], this.table.steps[this.column]);
  }

  press(event) {
    const page = Math.ceil(this.sites.length / 10);
    const moves = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      PageUp: [-page, 0], PageDown: [page, 0], Home: [0, -this.column], End: [0, this.table.steps.length],
    };
    if (event.key === "Enter" || event.key === " ") this.pick();
    else if (moves[event.key]) this.move(this.row + moves[event.key][0], this.column + moves[event.key][1]);
    else return;
    event.preventDefault();
  }
}

/** The end of a name, where its beginning does not fit. */
function shortened(context, text, width) {
  let shown = text;
  while (shown.length > 4 && context.measureText(shown).width > width) shown = `…${shown.slice(2)}`;
  return shown;
}

function colourBar(shade, [low, high]) {
  const bar = h("span", { class: "bar" });
  bar.style.background = `linear-gradient(to right, ${VIRIDIS.map((rgb) => `rgb(${rgb})`).join(", ")})`;
  const swatch = (rgb, text) => {
    const box = h("span", { class: "swatch" });
    box.style.background = rgb ? `rgb(${rgb})` : "none";
    return h("span", {}, box, text);
  };
  return h("p", { class: "legend" }, h("span", {}, brief(shade.back(low)), bar, brief(shade.back(high))),
    swatch(NAN_COLOUR, "NaN"), swatch(INF_COLOUR, "Infinity"), swatch(undefined, "not read"));
}

// ---------------------------------------------------------------- the page

const LEVELS = [
  ["parameters", "Parameters", "weights, gradients, updates, optimizer state"],
  ["functions", "Functions", "features, curvature, kernels: what the network computes"],
  ["structure", "Structure", "how neurons are organised"],
  ["subnetworks", "Subnetworks", "sparse parts that carry the training"],
];

const VIEWS = { map: "Layers × steps", overview: "Four levels", alerts: "Alerts", cost: "Own cost" };

class Page {
  constructor(root, source) {
    Object.assign(this, { root, source, view: "map", quantity: undefined, filter: "", sort: "depth", shade: "value", first: "", last: "" });
    this.chosen = undefined;
    this.picked = undefined;
    this.cache = new Map();
    this.turn = 0;
    this.bar = h("header", {});
    this.body = h("main", { id: "view" });
    root.replaceChildren(this.bar, this.body);
  }

  async begin() {
    await this.load();
    new ResizeObserver(() => this.maps?.forEach((map) => map.draw())).observe(this.body);
    if (this.source.live) setInterval(() => { if (!document.hidden) this.reload(); }, 30000);
  }

  async load() {
    const { runs, kept } = await this.source.get("runs");
    this.kept = kept;
    this.runs = new Map(runs.map(({ run, entries }) => [run, entries]));
    this.chosen ??= new Set([...this.runs.keys()].slice(0, 3));
    if (!this.quantities().some(({ name }) => name === this.quantity)) this.quantity = this.quantities()[0]?.name;
    this.bars();
    await this.show();
  }

  /** The latest samples, with everything as it is set. */
  async reload() {
    const focused = document.activeElement;
    if (this.bar.contains(focused) || this.body.contains(focused)) if (focused.matches("input, select")) return;
    this.cache.clear();
    await this.load();
  }

  quantities() {
    const found = new Map();
    for (const entries of this.runs.values()) for (const entry of entries) if (entry.kind === "vector") found.set(entry.name, entry);
    return [...found.values()];
  }

  shown() {
    return [...this.runs.keys()].filter((run) => this.chosen.has(run));
  }

  has(run, kind, name) {
    return this.runs.get(run)?.some((entry) => entry.kind === kind && (name === undefined || entry.name === name)) ?? false;
  }

  /** A table of an answer, asked for once. */
  async table(route, args) {
    const key = JSON.stringify([route, args]);
    if (!this.cache.has(key)) this.cache.set(key, this.source.get(route, args).then((answer) => new Table(answer)));
    return this.cache.get(key);
  }

  set(changes) {
    Object.assign(this, changes);
    this.bars();
    return this.show();
  }

  bars() {
    const focused = this.bar.contains(document.activeElement) ? document.activeElement.id : "";
    const tabs = h("nav", { "aria-label": "Views" }, Object.entries(VIEWS).map(([view, text]) =>
      h("button", { type: "button", id: `view-${view}`, "aria-pressed": String(view === this.view), onclick: () => this.set({ view }) }, text)));
    const runs = h("fieldset", { class: "runs" }, h("legend", {}, "Runs, side by side"), [...this.runs.keys()].map((run, i) => {
      const box = h("input", { type: "checkbox", id: `run-${i}`, onchange: (event) => {
        event.target.checked ? this.chosen.add(run) : this.chosen.delete(run);
        this.set({});
      } });
      box.checked = this.chosen.has(run);
      return h("label", {}, box, run);
    }));
    this.bar.replaceChildren(h("h1", {}, "Low rank"), tabs, runs, ...(this.view === "map" ? [this.tools()] : []));
    if (this.kept) this.bar.append(h("p", { class: "note", role: "note" }, `--samples_per_plugin lets TensorBoard keep ${this.kept} samples of each curve: others are not shown.`));
    if (focused) document.getElementById(focused)?.focus();
  }

  tools() {
    const options = this.quantities().map(({ name, source, statistic }) => [name, statistic || name, source]);
    const shades = Object.entries(SHADES).map(([key, { text }]) => [key, text]);
    const sorts = [["depth", "depth"], ["value", "latest value"], ["change", "change"]];
    const entry = (label, key, type) => h("label", {}, label, h("input", {
      id: key, type, value: this[key], class: type, onchange: (event) => this.set({ [key]: event.target.value }),
    }));
    return h("div", { class: "tools" },
      choice("Quantity", options, this.quantity, (quantity) => this.set({ quantity }), "quantity"),
      choice("Sort by", sorts, this.sort, (sort) => this.set({ sort }), "sort"),
      choice("Colour", shades, this.shade, (shade) => this.set({ shade }), "shade"),
      entry("Name has", "filter", "search"), entry("From step", "first", "number"), entry("To step", "last", "number"),
      h("button", { type: "button", id: "csv", onclick: () => this.save() }, "CSV of what is shown"),
      ...(this.source.live ? [h("button", { type: "button", id: "reload", onclick: () => { this.cache.clear(); this.load(); } }, "Reload")] : []));
  }

  /** Build the view; what was asked for meanwhile wins. */
  async show() {
    const turn = ++this.turn;
    const held = this.view === "map" ? this.maps?.find((map) => map.canvas === document.activeElement) : undefined;
    this.body.setAttribute("aria-busy", "true");
    let content;
    try {
      content = this.runs.size === 0 ? [h("p", {}, "No run here has anything of lightning_lowrank's.")] : await this[this.view]();
    } catch (error) {
      content = [h("p", { role: "alert" }, `This cannot be shown: ${error.message}`)];
    }
    if (turn !== this.turn) return;
    this.body.replaceChildren(...content);
    if (this.view === "map") this.maps?.forEach((map) => map.draw());
    if (held) this.maps.find((map) => map.run === held.run)?.take(held);
    this.body.setAttribute("aria-busy", "false");
    // Measured by the benchmark: the frame after the next is the one in which all of it has been painted.
    requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("lowrank-painted")));
  }

  async map() {
    const args = { kind: "vector", name: this.quantity, first: this.first, last: this.last };
    const runs = this.shown().filter((run) => this.has(run, "vector", this.quantity));
    this.tables = await Promise.all(runs.map((run) => this.table("matrix", { run, ...args })));
    this.ordered = this.order(this.tables);
    const alerts = await Promise.all(runs.map((run) => this.states(run)));
    const spoken = alerts.map((rules) => rules.filter(({ steps }) => steps.some(([, state]) => state >= 1)));
    const [shade, entry] = [SHADES[this.shade], this.quantities().find(({ name }) => name === this.quantity)];
    const domain = ends(this.tables.flatMap((table) => this.shades(table, shade)));
    this.maps = this.tables.map((table, i) => new HeatMap({
      run: runs[i], table, shade, domain, unit: entry?.unit ?? "1", quantity: this.quantity,
      sites: this.ordered.filter((site) => table.index.has(site)),
      alerts: spoken[i], lanes: Math.max(...spoken.map(({ length }) => length)),
      onPick: (site, step) => this.pick(site, step),
    }));
    this.details = h("section", { id: "details", "aria-label": "The chosen layer" });
    if (this.picked) await this.detail();
    return [colourBar(shade, domain), h("div", { class: "maps" }, this.maps.map((map) => map.element)), this.details, this.words(runs)];
  }

  /** Every value as it is coloured, to find the ends of the scale. */
  shades(table, shade) {
    const found = [];
    for (const site of this.ordered) {
      const curve = table.index.has(site) ? table.curve(site) : [];
      const [low, high] = ends(curve.map((value) => (value === undefined ? NaN : shade.of(value, firstKnown(curve)))));
      if (curve.some(Number.isFinite)) found.push(low, high);
    }
    return found;
  }

  /** Sites of all runs that fit the filter, as they are to be sorted: by the first run's numbers. */
  order(tables) {
    const sites = [...new Set(tables.flatMap((table) => table.sites))].filter((site) => site.toLowerCase().includes(this.filter.toLowerCase()));
    if (this.sort === "depth") return sites;
    const rank = (site) => {
      const known = (tables.find((table) => table.index.has(site))?.curve(site) ?? []).filter(Number.isFinite);
      if (!known.length) return Infinity;
      return this.sort === "value" ? known.at(-1) : -Math.abs(known.at(-1) - known[0]) / (Math.abs(known[0]) || 1);
    };
    const ranks = new Map(sites.map((site) => [site, rank(site)]));
    return sites.sort((a, b) => ranks.get(a) - ranks.get(b) || 0);
  }

  /** The same as a table, for those who do not see the map. */
  words(runs) {
    const rows = () => runs.flatMap((run, i) => this.ordered.filter((site) => this.tables[i].index.has(site)).map((site) => {
      const curve = this.tables[i].curve(site);
      const known = curve.filter((value) => value !== undefined);
      return [h("button", { type: "button", class: "link", onclick: () => this.pick(site, this.tables[i].steps.at(-1)) }, site), run,
        brief(known[0]), brief(known.at(-1)), brief(ends(curve)[0]), brief(ends(curve)[1]), String(known.filter((value) => !Number.isFinite(value)).length)];
    }));
    const fold = h("details", { id: "words", ontoggle: () => {
      if (fold.open && fold.children.length === 1) fold.append(grid(["layer", "run", "first", "latest", "least", "most", "no number"], rows(), this.quantity));
    } }, h("summary", {}, "The same as a table"));
    return fold;
  }

  pick(site, step) {
    this.picked = { site, step };
    return this.detail();
  }

  async detail() {
    const { site, step } = this.picked;
    const [curve, spectra] = await Promise.all([this.curves(site, step), this.spectra(site, step)]);
    if (this.picked.site !== site || this.picked.step !== step) return;
    this.details.replaceChildren(h("h2", {}, `${site} at step ${step}`), h("div", { class: "maps" }, curve, spectra));
  }

  async curves(site, step) {
    const args = { kind: "vector", name: this.quantity, site, limit: 5000 };
    const runs = this.shown().filter((run) => this.maps.some((map) => map.run === run && map.table.index.has(site)));
    const tables = await Promise.all(runs.map((run) => this.table("matrix", { run, ...args })));
    const lines = tables.map((table, i) => ({ name: runs[i], xs: table.steps, ys: table.curve(site), colour: this.colour(runs[i]) }));
    const entry = this.quantities().find(({ name }) => name === this.quantity);
    const unit = entry?.unit === "1" ? "" : entry?.unit;
    const values = tables.map((table, i) => `${runs[i]}: ${exact(table.at(table.column(step), site))}`).join("; ");
    return h("figure", { id: "curve" }, h("figcaption", {}, `${this.quantity}, ${tables.map((table) => table.counted()).join("; ")}`),
      chart(lines, { title: `${this.quantity} of ${site}`, x: "step", y: unit, marker: step }), legend(lines),
      h("p", { class: "status" }, `At step ${step}: ${values}`));
  }

  /** Spectra of one layer over steps; a slider chooses the one that is drawn strongly. */
  async spectra(site, step) {
    const source = this.quantities().find(({ name }) => name === this.quantity)?.source;
    const figure = h("figure", { id: "spectrum" });
    const runs = this.shown().filter((run) => this.has(run, "spectrum", source));
    const all = await Promise.all(runs.map((run) => this.table("spectra", { run, name: source, site: this.source.live ? site : undefined, limit: 100 })));
    const found = all.map((table, i) => [runs[i], table]).filter(([, table]) => table.index.has(site) && table.steps.length);
    if (!found.length) {
      return h("figure", { id: "spectrum" }, h("figcaption", {}, `Spectrum of the ${source}`), h("p", {}, "None was written: no statistic of this source reads all singular values."));
    }
    const steps = [...new Set(found.flatMap(([, table]) => table.steps))].sort((a, b) => a - b);
    let at = 0;
    steps.forEach((s, i) => { if (s <= step) at = i; });
    const slider = h("input", { type: "range", id: "spectrum-step", min: 0, max: steps.length - 1, value: at, oninput: () => draw(steps[slider.value]) });
    const box = h("div", {});
    const draw = (chosen) => {
      slider.setAttribute("aria-valuetext", `step ${chosen}`);
      box.replaceChildren(...this.spectrumAt(found, site, chosen, source));
    };
    draw(steps[at]);
    figure.append(h("figcaption", {}, `Singular values of the ${source}; the last spectrum written up to that step; dashed: a Gaussian matrix of the same shape and norm`), box,
      h("label", { class: "slider" }, "Step", slider));
    return figure;
  }

  spectrumAt(found, site, step, source) {
    const lines = found.flatMap(([run, table]) => {
      const { ranks, null: noise } = table.noise[table.index.get(site)];
      const column = table.column(step);
      const colour = this.colour(run);
      const others = table.steps.map((_, i) => ({ name: `${run}, step ${table.steps[i]}`, xs: ranks, ys: table.spectrum(i, site).slice(1, 1 + ranks.length), colour, faint: i !== column }));
      const norm = table.at(column, site, 0);
      const gauss = { name: `${run}: Gaussian (Marchenko–Pastur)`, xs: ranks, ys: noise.map((value) => value * norm), colour, dashed: true };
      return [...others.filter((line) => line.faint), others[column], gauss];
    });
    const top = Math.max(...lines.filter((line) => !line.faint).map((line) => line.ys[0]).filter(Number.isFinite));
    const values = found.map(([run, table]) => `${run}, step ${table.steps[table.column(step)]}: largest ${exact(table.at(table.column(step), site, 1))}`).join("; ");
    // What is below 1e-8 of the largest is rounding of the Gram matrix.
    return [chart(lines, { title: `Singular values of the ${source} of ${site}`, x: "rank", y: "", logX: true, logY: true, floor: 1e-8 * top }),
      legend(lines), h("p", { class: "status", role: "status" }, values)];
  }

  colour(run) {
    return COLOURS[[...this.runs.keys()].indexOf(run) % COLOURS.length];
  }

  /** Rules of a run, each with its states by step. */
  async states(run) {
    const entries = this.runs.get(run).filter(({ kind }) => kind === "alert");
    const tables = await Promise.all(entries.map(({ name }) => this.table("matrix", { run, kind: "alert", name, limit: 5000 })));
    return tables.flatMap((table) => table.sites.map((rule) => {
      const steps = table.steps.map((step, column) => [step, table.at(column, rule) ?? 0]);
      return { rule, steps, states: (step) => steps[table.column(step)]?.[1] ?? 0 };
    }));
  }

  async alerts() {
    return Promise.all(this.shown().map(async (run) => {
      const [rules, { texts }] = await Promise.all([this.states(run), this.source.get("texts", { run })]);
      const rows = rules.map(({ rule, steps }) => [rule, timeLine(steps), stretches(steps).join(", ") || "never"]);
      const content = rules.length ? grid(["rule", "over steps", "when"], rows, `Rules of ${run}`) : h("p", {}, "No rule was watching this run.");
      return h("section", {}, h("h2", {}, run), content, ...texts.map((text) => markdownTable(text)));
    }));
  }

  async cost() {
    const keys = new Map();
    for (const run of this.shown()) {
      for (const { name } of this.runs.get(run).filter(({ kind }) => kind === "cost")) {
        const table = await this.table("matrix", { run, kind: "cost", name, limit: 2000 });
        for (const key of table.sites) {
          const line = { name: `${run}: ${name}`, xs: table.steps, ys: table.curve(key), colour: this.colour(run) };
          keys.set(key, [...(keys.get(key) ?? []), line]);
        }
      }
    }
    const figures = [...keys].map(([key, lines]) => h("figure", {}, h("figcaption", {}, key.replaceAll("_", " ")),
      chart(lines, { title: key, x: "step", y: "" }), legend(lines), h("p", { class: "status" }, `Latest: ${lines.map((line) => brief(line.ys.at(-1))).join("; ")}`)));
    return [h("p", {}, "What watching cost: milliseconds of each sample, percent of the training time so far, numbers that could not be had."), h("div", { class: "maps" }, figures)];
  }

  async overview() {
    return Promise.all(LEVELS.map(async ([level, title, what]) => {
      const names = this.quantities().filter((entry) => entry.level === level && !entry.name.endsWith("_error"));
      const rows = (await Promise.all(names.map((entry) => this.overviewRows(entry)))).flat();
      const headings = ["quantity", "run", "median, first", "median, latest", "lowest now", "fell most"];
      const content = rows.length ? grid(headings, rows) : h("p", {}, "Nothing was watched here.");
      return h("section", { id: `level-${level}` }, h("h2", {}, title), h("p", {}, what), content);
    }));
  }

  async overviewRows({ name }) {
    const runs = this.shown().filter((run) => this.has(run, "vector", name));
    return Promise.all(runs.map(async (run) => {
      const table = await this.table("matrix", { run, kind: "vector", name, limit: 2 });
      const last = table.steps.length - 1;
      const sites = table.sites.map((site) => ({ site, first: table.at(0, site), now: table.at(last, site) }));
      const known = sites.filter(({ now }) => Number.isFinite(now));
      const lowest = known.toSorted((a, b) => a.now - b.now).slice(0, 3);
      const fallen = known.filter(({ first, now }) => first > now).toSorted((a, b) => a.now / a.first - b.now / b.first).slice(0, 3);
      const link = (site, text) => h("button", { type: "button", class: "link", onclick: () => this.go(name, site, table.steps[last]) }, text);
      return [name, run, brief(median(sites.map(({ first }) => first))), brief(median(sites.map(({ now }) => now))),
        h("span", {}, lowest.map(({ site, now }) => link(site, `${site} ${brief(now)}`))),
        h("span", {}, fallen.map(({ site, first, now }) => link(site, `${site} ${brief(100 * (now / first - 1))} %`)))];
    }));
  }

  go(quantity, site, step) {
    return this.set({ view: "map", quantity, picked: { site, step } });
  }

  /** Download what is on the page. */
  save() {
    const lines = this.tables.flatMap((table, i) => table.steps.map((step, column) =>
      [this.maps[i].run, step, ...this.ordered.map((site) => { const value = table.at(column, site); return value === undefined ? "" : exact(value); })]));
    const text = [["run", "step", ...this.ordered], ...lines].map((line) => line.map(csvCell).join(",")).join("\r\n");
    const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: "lowrank.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
}

/** Stretches in which a rule was not at rest, in words. */
function stretches(steps) {
  const found = [];
  steps.forEach(([step, state], i) => {
    if (state === (steps[i - 1]?.[1] ?? 0)) { if (state >= 1) found.at(-1).end = step; } else if (state >= 1) found.push({ state, begin: step, end: step });
  });
  return found.map(({ state, begin, end }) => `${state >= 2 ? "firing" : "pending"} from step ${begin} to ${end}`);
}

function timeLine(steps) {
  const svg = h("svg:svg", { viewBox: "0 0 300 14", class: "time", role: "img", "aria-label": stretches(steps).join(", ") || "never" });
  svg.append(h("svg:rect", { x: 0, y: 6, width: 300, height: 2, class: "rule" }));
  const [low, high] = ends(steps.map(([step]) => step));
  steps.forEach(([step, state], i) => {
    const next = steps[i + 1]?.[0] ?? high;
    const [x, width] = [(300 * (step - low)) / (high - low || 1), (300 * (next - step)) / (high - low || 1)];
    if (state >= 1) svg.append(h("svg:rect", { x, y: 0, width: Math.max(width, 3), height: 14, fill: state >= 2 ? "#d4213d" : "#e8a317" }));
  });
  return svg;
}

/** A table in Markdown as a table, any other text as it is. */
function markdownTable(text) {
  const rows = text.split("\n").filter((line) => line.startsWith("|") && !/^[|\s:-]+$/.test(line)).map((line) => line.split("|").slice(1, -1).map((cell) => cell.trim()));
  return rows.length ? grid(rows[0], rows.slice(1), "What they said") : h("pre", {}, text);
}

// ---------------------------------------------------------------- looks

const STYLE = `
:root { color-scheme: light; --ink: #212121; --paper: #fff; --soft: #616161; --line: #dcdcdc; --card: #f5f5f5; --accent: #b83d00; }
:root.dark { color-scheme: dark; --ink: #e8e8e8; --paper: #303030; --soft: #b5b5b5; --line: #555; --card: #3a3a3a; --accent: #ffab6b; }
body { margin: 0; padding: 12px 16px; background: var(--paper); color: var(--ink); font: 14px Roboto, Arial, sans-serif; }
h1 { font-size: 18px; margin: 0 16px 0 0; } h2 { font-size: 15px; margin: 18px 0 6px; }
header { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; border-bottom: 1px solid var(--line); padding-bottom: 8px; }
nav { display: flex; gap: 4px; } .tools { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: end; flex-basis: 100%; }
label { display: inline-flex; flex-direction: column; font-size: 12px; color: var(--soft); gap: 2px; max-width: 260px; }
fieldset.runs { border: 0; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: 4px 12px; max-height: 90px; overflow: auto; }
fieldset.runs legend { float: left; font-size: 12px; color: var(--soft); margin-right: 8px; }
.runs label { flex-direction: row; color: var(--ink); font-size: 13px; align-items: center; overflow-wrap: anywhere; }
button, select, input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: 4px 8px; }
input.number { width: 80px; } input.search { width: 130px; } input[type=checkbox] { accent-color: var(--accent); }
button { cursor: pointer; } button[aria-pressed=true] { border-color: var(--accent); color: var(--accent); font-weight: bold; }
button.link { border: 0; background: none; padding: 0 6px 0 0; color: var(--accent); text-align: left; text-decoration: underline; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 16px; } figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; color: var(--soft); overflow-wrap: anywhere; } figcaption b { color: var(--ink); }
.stage { position: relative; } canvas { display: block; color: var(--ink); cursor: crosshair; }
.cursor { position: absolute; box-sizing: border-box; outline: 2px solid var(--ink); box-shadow: 0 0 0 3px var(--paper); pointer-events: none; }
.tip { position: absolute; z-index: 2; pointer-events: none; background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: 4px 8px; font-size: 12px; max-width: 320px; overflow-wrap: anywhere; }
.status { font-size: 12px; min-height: 1.3em; margin: 4px 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 12px; align-items: center; margin: 8px 0; }
.bar { display: inline-block; width: 160px; height: 12px; margin: 0 6px; vertical-align: middle; }
.swatch { display: inline-block; width: 12px; height: 12px; border: 1px solid var(--line); margin-right: 4px; vertical-align: middle; }
.key { display: inline-block; width: 20px; border-top: 2px solid; margin-right: 5px; vertical-align: middle; } .key.dashed { border-top-style: dashed; }
svg.chart { width: 100%; max-width: 680px; } svg text { fill: var(--soft); font-size: 11px; } svg .rule { stroke: var(--line); fill: var(--line); }
svg .line { fill: none; stroke-width: 1.8; } svg .faint { fill: none; stroke-width: 0.6; opacity: 0.3; } svg .marker { stroke: var(--accent); stroke-dasharray: 2 2; }
svg.time { width: 300px; height: 14px; } .slider { flex-direction: row; align-items: center; max-width: none; }
table { border-collapse: collapse; font-size: 13px; margin: 8px 0; } caption { text-align: left; color: var(--soft); padding: 4px 0; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; vertical-align: top; overflow-wrap: anywhere; min-width: 4.5em; }
tbody th { font-weight: normal; min-width: 13em; } [role=alert], .note { color: var(--accent); } pre { white-space: pre-wrap; }
@media (prefers-reduced-motion: no-preference) { main[aria-busy=true] { opacity: 0.6; transition: opacity 0.2s 0.2s; } }
`;

/** Light or dark as TensorBoard is, or as the system is where there is none around. */
function followTheme(onChange) {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let outer;
  try {
    outer = window.parent !== window ? window.parent.document.body : undefined;
  } catch {
    outer = undefined; // shown inside of a page of another origin, as in some notebooks
  }
  const set = () => {
    document.documentElement.classList.toggle("dark", outer ? outer.classList.contains("dark-mode") : system.matches);
    onChange();
  };
  if (outer) new MutationObserver(set).observe(outer, { attributeFilter: ["class"] });
  system.addEventListener("change", set);
  set();
}

async function start(source) {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(STYLE);
  document.adoptedStyleSheets = [sheet];
  document.documentElement.lang = "en";
  const page = new Page(document.body, source);
  followTheme(() => page.maps?.forEach((map) => map.draw()));
  try {
    await page.begin();
  } catch (error) {
    page.body.replaceChildren(h("p", { role: "alert" }, `This cannot be shown: ${error.message}`));
  }
}

/** What TensorBoard calls. */
export function render() {
  return start(new Server());
}

/** What a report calls, with all answers at hand. */
export function report(answers) {
  return start(new Archive(answers));
}
