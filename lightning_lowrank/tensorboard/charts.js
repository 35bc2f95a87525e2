// Elements, tables and charts of lines. Nothing is ever parsed as HTML: names of runs and sites become text through `h`, and only there.

import { brief, ends } from "./answers.js";

export const COLOURS = ["#1f77b4", "#e6700b", "#2a9134", "#c2255c", "#7048c8", "#8c564b", "#0b9aa8", "#9a8b00"];

// As many of them as TensorBoard's "Time series" has for runs; the page's style has them, for they differ in the dark.
export const RUN_COLOURS = 7;

const MARGIN = { left: 52, right: 14, top: 22, bottom: 36 };

/** An element; children that are strings are text, never markup. */
export function h(tag, attributes = {}, ...children) {
  const element = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined));
  return element;
}

/** A list to choose from; options of one group stand together. */
export function choice(label, options, value, onChange, id) {
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

/** Text whose addresses are links. */
export function linked(text) {
  return text.split(/(https:\/\/\S+)/).map((part, i) => (i % 2 ? h("a", { href: part, target: "_blank" }, "the page on it") : part)).filter(Boolean);
}

/** What may be wider than the page: it scrolls by itself, with the keyboard too. */
export function wide(name, content) {
  return h("div", { class: "wide", role: "region", tabindex: 0, "aria-label": name }, content);
}

/** A table; the first cell of a row is its heading. */
export function grid(headings, rows, caption) {
  return wide(caption ?? headings[0], h("table", {},
    caption ? h("caption", {}, caption) : undefined,
    h("thead", {}, h("tr", {}, headings.map((heading) => h("th", { scope: "col" }, heading)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => h(i ? "td" : "th", i ? {} : { scope: "row" }, cell)))))));
}

/** A sample of colour with what it means. */
export function swatch(rgb, text) {
  const box = h("span", { class: "swatch" });
  box.style.background = rgb;
  return h("span", {}, box, text);
}

/** What the lines of a chart are. */
export function legend(lines) {
  return h("p", { class: "legend" }, lines.filter((line) => !line.faint).map((line) => {
    const key = h("svg:svg", { viewBox: "0 0 24 4", class: "dash", "aria-hidden": "true" }, h("svg:line", { x1: 0, x2: 24, y1: 2, y2: 2, stroke: line.colour, "stroke-width": 2, "stroke-dasharray": dashes(line) }));
    return h("span", {}, key, line.name);
  }));
}

/** Curves with axes. Each line has a name, xs, ys, a colour, and may be dashed (or have dashes of its own) or faint; those that are not faint are read out under the mouse. People count xs from `first`. */
export function chart(lines, { title, x, y = "", logX = false, first = 0, logY = false, marker, floor = 0, zero = false, domain, width = 460, height = 240 }) {
  const onX = logX ? (v) => Math.log10(v + first) : (v) => v;
  const onY = logY ? (v) => (v > floor ? Math.log10(v) : NaN) : (v) => v;
  const points = lines.map((line) => line.xs.map((value, i) => [onX(value), onY(line.ys[i] ?? NaN)]));
  const [x0, x1] = ends(points.flat().map((p) => p[0]));
  const [y0, y1] = widened(ends((domain?.map(onY) ?? []).concat(points.flat().map((p) => p[1]), zero ? [0] : [])));
  const toX = (v) => MARGIN.left + ((v - x0) / (x1 - x0 || 1)) * (width - MARGIN.left - MARGIN.right);
  const toY = (v) => height - MARGIN.bottom - ((v - y0) / (y1 - y0)) * (height - MARGIN.top - MARGIN.bottom);
  const svg = h("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": told(title, lines), class: "chart" });
  svg.style.maxWidth = `${1.15 * width}px`; // wider, its words would be larger than those around it
  const whole = lines.every((line) => line.ys.every((value) => Number.isInteger(value ?? 0)));
  for (const [tick, text] of logY ? powers(y0, y1) : ticks(y0, y1, 5, whole ? 1 : 0).map((v) => [v, brief(v)])) {
    svg.append(h("svg:line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: toY(tick), y2: toY(tick), class: "rule" }),
      h("svg:text", { x: MARGIN.left - 6, y: toY(tick) + 4, "text-anchor": "end" }, text));
  }
  const steps = lines.every((line) => line.xs.every(Number.isInteger));
  for (const [mark, text] of logX ? doublings(x0, x1) : ticks(x0, x1, width / 70, steps ? 1 : 0).map((v) => [v, brief(v)])) {
    svg.append(h("svg:text", { x: toX(mark), y: height - MARGIN.bottom + 16, "text-anchor": "middle" }, text));
  }
  svg.append(h("svg:text", { x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 5, "text-anchor": "middle" }, x), h("svg:text", { x: 0, y: 11 }, y));
  if (marker !== undefined) svg.append(upright(toX(onX(marker)), height, "marker"));
  lines.forEach((line) => svg.append(...bands(line, (v) => toX(onX(v)), (v) => toY(Math.min(y1, Math.max(y0, onY(v)))))));
  lines.forEach((line, i) => svg.append(...strokes(line, points[i], toX, toY)));
  if (!points.flat().some((p) => Number.isFinite(p[1]))) svg.append(h("svg:text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no finite number"));
  return h("div", { class: "stage" }, svg, ...readOut(svg, lines, { x, first, width, height, place: (v) => toX(onX(v)) }));
}

/** Ends that are not the same. */
function widened([low, high]) {
  return low < high ? [low, high] : [low - (Math.abs(low) * 0.1 || 0), high + (Math.abs(high) * 0.1 || 1)];
}

/** Round numbers from end to end. */
function ticks(low, high, count = 5, least = 0) {
  const raw = Math.max(least, (high - low) / count) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i <= Math.floor(high / step + 1e-9); i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** Marks of a logarithmic axis: powers of ten, with 2 and 5 times those where there is room. */
function powers(low, high) {
  const every = Math.ceil((high - low) / 6);
  const found = [];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const times of high - low < 2 ? [1, 2, 5] : power % every === 0 ? [1] : []) {
      const at = power + Math.log10(times);
      if (at >= low && at <= high) found.push([at, power < -3 || power > 4 ? `${times}e${power}` : brief(times * 10 ** power)]);
    }
  }
  return found;
}

/** Marks of ranks and widths, which double. */
function doublings(low, high) {
  return Array.from({ length: 18 }, (_, i) => [Math.log10(2 ** i), String(2 ** i)]).filter(([at]) => at >= low - 1e-9 && at <= high + 1e-9);
}

function upright(x, height, kind) {
  return h("svg:line", { x1: x, x2: x, y1: MARGIN.top, y2: height - MARGIN.bottom, class: kind });
}

/** A line, broken where there is no number; a lone point as a dot. */
function strokes(line, points, toX, toY) {
  const pieces = [[]];
  for (const [x, y] of points) Number.isFinite(y) ? pieces.at(-1).push([toX(x), toY(y)]) : pieces.push([]);
  const style = { stroke: line.colour, "stroke-dasharray": dashes(line), class: line.faint ? "faint" : "line" };
  return pieces.filter((piece) => piece.length).map((piece) => piece.length > 1
    ? h("svg:polyline", { ...style, points: piece.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" ") })
    : h("svg:circle", { cx: piece[0][0], cy: piece[0][1], r: 2.5, fill: line.colour }));
}

function dashes({ dashed }) {
  return dashed === true ? "5 4" : dashed;
}

/** One standard error up and down, where it is known. */
function bands(line, toX, toY) {
  const pieces = [[]];
  line.xs.forEach((x, i) => {
    const [y, error] = [line.ys[i], line.errors?.[i]];
    Number.isFinite(y) && Number.isFinite(error) ? pieces.at(-1).push([toX(x), toY(y - error), toY(y + error)]) : pieces.push([]);
  });
  return pieces.filter((piece) => piece.length > 1).map((piece) => h("svg:polygon", { class: "band", fill: line.colour,
    points: [...piece.map(([x, low]) => [x, low]), ...piece.toReversed().map(([x, , high]) => [x, high])].map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ") }));
}

/** What follows the mouse: an upright line at the nearest x that a line has, and each line's number there. */
function readOut(svg, lines, { x, first, width, height, place }) {
  const clear = lines.filter((line) => !line.faint);
  const xs = [...new Set(clear.flatMap((line) => line.xs))].sort((a, b) => a - b);
  const tip = h("div", { class: "tip", hidden: true, "aria-hidden": "true" });
  const hair = upright(0, height, "hair");
  svg.addEventListener("mouseleave", () => { tip.hidden = true; hair.remove(); });
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    const under = ((event.clientX - box.left) / box.width) * width;
    if (!xs.length) return;
    const nearest = xs.reduce((best, value) => (Math.abs(place(value) - under) < Math.abs(place(best) - under) ? value : best));
    for (const end of ["x1", "x2"]) hair.setAttribute(end, place(nearest));
    svg.append(hair);
    const said = clear.map((line) => h("div", {}, `${line.name}: ${brief(line.ys[line.xs.indexOf(nearest)])}`));
    tip.replaceChildren(h("b", {}, `${x} ${nearest + first}`), ...said);
    follow(tip, event.clientX - box.left, event.clientY - box.top, box.width);
  });
  return [tip];
}

/** Show a tip beside the mouse, inside of what it is about. */
export function follow(tip, x, y, room) {
  tip.hidden = false;
  const left = x + 14 + tip.offsetWidth > room ? x - 14 - tip.offsetWidth : x + 14;
  Object.assign(tip.style, { top: `${y + 14}px`, left: `${Math.max(0, left)}px` });
}

/** What a chart shows, for those who do not see it. */
function told(title, lines) {
  const clear = lines.filter((line) => !line.faint);
  return `${title}. ${clear.map((line) => `${line.name}: from ${brief(line.ys[0])} to ${brief(line.ys.at(-1))}, least ${brief(ends(line.ys)[0])}, most ${brief(ends(line.ys)[1])}`).join("; ")}`;
}
