// Layers x steps as a heat map: a canvas with a cursor for mouse and keyboard.

import { brief, ends, exact, firstKnown } from "./answers.js";
import { follow, h, swatch } from "./charts.js";

// From less to more than the first value, light where nothing has changed; neither end is red, which is for alerts.
const DIVERGING = [[69, 39, 136], [153, 142, 195], [242, 242, 242], [241, 163, 64], [156, 76, 2]];
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const NAN_COLOUR = [150, 150, 150];
const INF_COLOUR = [255, 120, 220];

/** A colour of the scale, from 0 to 1. */
export function colour(t, scale = VIRIDIS) {
  const at = Math.min(Math.max(t, 0), 1) * (scale.length - 1);
  const i = Math.min(Math.floor(at), scale.length - 2);
  return scale[i].map((low, c) => Math.round(low + (scale[i + 1][c] - low) * (at - i)));
}

export const [PENDING, FIRING] = ["#e8a317", "#d4213d"];

const palette = (scale) => Array.from({ length: 256 }, (_, i) => colour(i / 255, scale));
const PALETTES = new Map([VIRIDIS, DIVERGING].map((scale) => [scale, palette(scale)]));
// A multiple that is nearer to 1 than this is drawn as if nothing had changed much.
const LEAST_CHANGE = Math.log2(1.1);

const STATES = ["ok", "pending", "firing"];

/** How values are shown as colours; `ends` makes the ends of a scale from those of what is shown. */
export const SHADES = {
  change: {
    text: "multiple of the layer's first", scale: DIVERGING, of: (value, first) => (value === first ? 0 : Math.log2(value / first)), back: (t) => 2 ** t,
    ends: ([low, high]) => { const most = Math.max(-low, high, LEAST_CHANGE); return [-most, most]; },
  },
  value: { text: "value", plain: true, scale: VIRIDIS, of: (value) => value, back: (t) => t, ends: (both) => both },
  log: { text: "value, log", plain: true, scale: VIRIDIS, of: (value) => (value > 0 ? Math.log10(value) : value === 0 ? -Infinity : value), back: (t) => 10 ** t, ends: (both) => both },
};

/** Layers x steps on a canvas, one column per sample, with a cursor for mouse and keyboard. */
export class HeatMap {
  constructor({ run, table, sites, alerts, lanes, shade, domain, unit, quantity, onPick }) {
    Object.assign(this, { run, table, sites, alerts, lanes, shade, domain, unit, quantity, onPick });
    this.firsts = new Map(sites.map((site) => [site, firstKnown(table.curve(site))]));
    this.row = this.column = 0;
    this.canvas = h("canvas", {
      tabindex: 0, role: "application", "aria-roledescription": "heat map",
      "aria-label": `${quantity} of run ${run}: ${sites.length} layers, ${table.steps.length} samples. Arrow keys move, Enter shows the layer.`,
      onmousemove: (event) => this.point(event), onmouseleave: () => { this.tip.hidden = true; },
      onclick: (event) => { if (this.point(event)) this.pick(); }, onkeydown: (event) => this.press(event),
    });
    this.cursor = h("div", { class: "cursor", hidden: true });
    this.tip = h("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    this.status = h("p", { class: "status", role: "status", "aria-live": "polite" }, "Point at a cell, or use the arrow keys.");
    this.empty = !table.total ? "Nothing was written yet." : !table.steps.length ? "No sample between these steps."
      : !sites.length ? "No layer has that in its name." : undefined;
    this.element = h("figure", { class: "heat" }, h("figcaption", {}, h("b", {}, run), ` ${table.counted()}`),
      ...(this.empty ? [h("p", { class: "empty" }, this.empty)] : [this.status, h("div", { class: "stage" }, this.canvas, this.cursor, this.tip)]));
  }

  /** Draw as wide as there is room. */
  draw() {
    if (this.empty) return;
    const width = Math.max(280, this.element.clientWidth || 600);
    const strip = 7 * this.lanes;
    this.left = Math.min(230, Math.max(90, width * 0.3));
    this.top = (strip && Math.max(strip, 11)) + 4; // room for the word that stands left of it, and for the first layer's
    // So high that the curve of a layer has room below.
    const room = Math.min(520, Math.max(240, window.innerHeight * 0.5));
    this.height = Math.max(2, Math.min(22, Math.floor(room / Math.max(this.sites.length, 1)))) * this.sites.length;
    this.width = width - this.left - 8;
    const [full, scale] = [this.top + this.height + 20, window.devicePixelRatio || 1];
    Object.assign(this.canvas, { width: width * scale, height: full * scale });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${full}px` });
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.cells(), this.left, this.top, this.width, this.height);
    this.hatch(context);
    this.words(context, getComputedStyle(this.canvas).color);
    this.strips(context);
    if (!this.cursor.hidden) this.move(this.row, this.column);
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
        if (Number.isNaN(shade) && !Number.isNaN(value)) continue; // no multiple of a number of another sign
        const rgb = Number.isNaN(value) ? NAN_COLOUR : Math.abs(value) === Infinity ? INF_COLOUR
          : PALETTES.get(this.shade.scale)[Math.round(255 * Math.min(1, Math.max(0, (shade - low) / (high - low || 1))))];
        image.data.set(rgb, 4 * (row * columns + column));
        image.data[4 * (row * columns + column) + 3] = 255;
      }
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  /** Stripes over what is no number. */
  hatch(context) {
    const [columns, rows] = [this.table.steps.length, this.sites.length];
    const [span, size] = [this.width / columns, this.height / rows];
    context.beginPath();
    this.sites.forEach((site, row) => {
      for (let column = 0; column < columns; column++) {
        const begin = column;
        while (column < columns && Number.isNaN(this.table.at(column, site) ?? 0)) column++;
        if (column > begin) context.rect(this.left + begin * span, this.top + row * size, (column - begin) * span, size);
      }
    });
    context.fillStyle = context.createPattern(stripes(), "repeat");
    context.fill();
  }

  words(context, ink) {
    Object.assign(context, { fillStyle: ink, font: "11px Roboto, Arial, sans-serif", textBaseline: "middle", textAlign: "right" });
    const size = this.height / this.sites.length;
    const every = Math.ceil(11 / size);
    this.sites.forEach((site, row) => {
      if (row % every === 0) context.fillText(shortened(context, site, this.left - 8), this.left - 6, this.top + (row + 0.5) * size);
    });
    context.textAlign = "center";
    const columns = this.table.steps.length;
    context.fillText("step", this.left / 2, this.top + this.height + 11);
    const apart = Math.ceil(columns / Math.max(1, Math.floor(this.width / 60)));
    for (let column = 0; column < columns; column += apart) {
      context.fillText(String(this.table.steps[column]), this.left + ((column + 0.5) / columns) * this.width, this.top + this.height + 11);
    }
  }

  /** Where alerts were pending or firing, a lane for each rule. */
  strips(context) {
    if (this.lanes) Object.assign(context, { textAlign: "right", textBaseline: "middle" }).fillText("alerts", this.left - 6, Math.max(6, 3.5 * this.lanes));
    this.alerts.forEach(({ states }, i) => this.table.steps.forEach((step, column) => {
      const state = states(step);
      if (state < 1) return;
      context.fillStyle = state >= 2 ? FIRING : PENDING;
      const size = this.width / this.table.steps.length;
      // To the edges of pixels: no seams between samples.
      const [begin, end] = [Math.round(this.left + column * size), Math.round(this.left + (column + 1) * size)];
      context.fillRect(begin, 7 * i, Math.max(1, end - begin), 6);
    }));
  }

  /** Go where the mouse is; whether a cell is there. */
  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const column = Math.floor(((x - this.left) / this.width) * this.table.steps.length);
    const row = Math.floor(((y - this.top) / this.height) * this.sites.length);
    const [inside, cell] = [column >= 0 && column < this.table.steps.length, row >= 0 && row < this.sites.length];
    const rule = this.alerts[Math.floor(y / 7)];
    if (inside && cell) this.move(row, column);
    this.tip.hidden = !inside || !(cell || (y < this.top && rule));
    if (this.tip.hidden) return false;
    this.tip.textContent = cell ? this.status.textContent : `${rule.rule} · step ${this.table.steps[column]} · ${STATES[rule.states(this.table.steps[column])] ?? "ok"}`;
    follow(this.tip, x, y, box.width);
    return cell;
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
    if (!this.empty) this.move(this.sites.indexOf(older.sites[older.row]), this.table.column(older.table.steps[older.column]));
  }

  /** What is under the cursor. */
  reading() {
    const [site, step] = [this.sites[this.row], this.table.steps[this.column]];
    const states = this.alerts.filter(({ states }) => states(step) >= 1).map(({ rule, states }) => `${rule} ${STATES[states(step)]}`);
    const value = this.table.at(this.column, site);
    const said = [site, `step ${step}`, `${exact(value)}${Number.isFinite(value) && this.unit !== "1" ? ` ${this.unit}` : ""}`];
    return [...said, ...states.map((state) => `alert: ${state}`)].join(" · ");
  }

  pick() {
    if (!this.empty) this.onPick(this.sites[this.row], this.table.steps[this.column]);
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

function stripes() {
  const tile = Object.assign(document.createElement("canvas"), { width: 6, height: 6 });
  const context = Object.assign(tile.getContext("2d"), { strokeStyle: "#4a4a4a", lineWidth: 1.2 });
  for (const shift of [-6, 0, 6]) { context.moveTo(shift, 6); context.lineTo(shift + 6, 0); }
  context.stroke();
  return tile;
}

/** The end of a name, where its beginning does not fit. */
function shortened(context, text, width) {
  let shown = text;
  while (shown.length > 4 && context.measureText(shown).width > width) shown = `…${shown.slice(2)}`;
  return shown;
}

/** What the colours mean; of what is no number only that which occurs. */
export function colourBar(shade, [low, high], unit, tables) {
  const bar = h("span", { class: "bar" });
  bar.style.background = `linear-gradient(to right, ${shade.scale.map((rgb) => `rgb(${rgb})`).join(", ")})`;
  const occurs = (test) => tables.some((table) => table.some(test));
  return h("p", { class: "legend" }, h("span", {}, brief(shade.back(low)), bar, brief(shade.back(high)), shade.plain ? ` ${unit}` : " times the layer's first; light: 1"),
    occurs(Number.isNaN) ? swatch(`repeating-linear-gradient(135deg, rgb(${NAN_COLOUR}) 0 3px, #4a4a4a 3px 4px)`, "NaN") : undefined,
    occurs((value) => value === Infinity || value === -Infinity) ? swatch(`rgb(${INF_COLOUR})`, "Infinity") : undefined,
    occurs((value) => value === undefined) ? swatch("none", "not read") : undefined);
}
