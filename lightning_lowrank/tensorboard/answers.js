// Answers to what the views ask, from TensorBoard's server or from the page itself, and how their numbers are told.

const GAP = 0x7fc00001; // bits of a site that a sample was not to read; another NaN was read and is no number

// Ends of the names of what stands beside a quantity, and is none of its own.
export const BESIDE = ["_error", "_chance", "_floor", "_random_walk", "_random", "_best", "_start"];

export function standsBeside(name, names) {
  const end = BESIDE.find((one) => name.endsWith(one));
  return end !== undefined && names.has(name.slice(0, -end.length));
}

/** Asks TensorBoard's server. */
export class Server {
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
export class Archive {
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
function between(answer, { first = "", last = "" }) {
  if (first === "" && last === "") return answer;
  const [low, high] = [first === "" ? -Infinity : Number(first), last === "" ? Infinity : Number(last)];
  return { ...answer, keep: answer.steps.flatMap((step, i) => (step >= low && step <= high ? [i] : [])) };
}

/** Samples x sites (x width) of an answer. */
export class Table {
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
    this.null = answer.null;
    this.axis = answer.axis;
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
    if (this.steps.length < 2) return this.steps.length ? "1 sample" : "no sample";
    if (!this.thinned) return `all ${this.steps.length} samples`;
    return `${this.steps.length} of ${this.between > this.steps.length ? this.between : this.total} samples, evenly spread`;
  }

  /** Whether any number, of any site at any step, is so. */
  some(test) {
    return this.rows.some((row) => {
      const begin = row * this.sites.length * this.width;
      for (let i = begin; i < begin + this.sites.length * this.width; i++) if (test(this._at(i))) return true;
      return false;
    });
  }

  /** What a Gaussian matrix of the site's shape has; undefined where nothing was written of that. */
  nullOf(site) {
    return this.null?.[this.index.get(site)] ?? undefined;
  }

  curve(site) {
    return this.steps.map((_, column) => this.at(column, site));
  }

  spectrum(column, site) {
    return Array.from({ length: this.width }, (_, k) => this.at(column, site, k));
  }

  /** The same with the median over each block in the place of its layers; what is in none stays as it is. */
  folded() {
    const groups = new Map();
    for (const site of this.sites) groups.set(blockOf(site), [...(groups.get(blockOf(site)) ?? []), site]);
    const found = Object.assign(Object.create(Table.prototype), this, { sites: [...groups.keys()], rows: this.steps.map((_, i) => i) });
    found.index = new Map(found.sites.map((site, i) => [site, i]));
    const of = (column, sites) => {
      const values = sites.map((site) => this.at(column, site)).filter((value) => value !== undefined);
      return values.length ? median(values) ?? NaN : undefined;
    };
    const cells = this.steps.map((_, column) => [...groups.values()].map((sites) => of(column, sites)));
    found.at = (column, site) => cells[column][found.index.get(site)];
    found.null = [...groups.values()].map((sites) => median(sites.map((site) => this.nullOf(site))));
    found.some = (test) => cells.some((row) => row.some(test));
    return found;
  }

  /** The column of the last sample at or before a step; the first if there is none. */
  column(step) {
    let found = 0;
    this.steps.forEach((s, i) => { if (s <= step) found = i; });
    return found;
  }
}

/** The part of a layer's name up to its block's number, all of it where there is none: `blocks.0` of `blocks.0.mlp.weight`. */
export function blockOf(site) {
  return site.match(/^(?:.*?\.)??[^.]*?\.\d+(?=\.)/)?.[0] ?? site;
}

/** As few digits as give the same float32 back. */
export function exact(value) {
  if (value === undefined) return "not read";
  if (!Number.isFinite(value)) return String(value);
  for (let digits = 3; digits < 9; digits++) {
    const short = Number(value.toPrecision(digits));
    if (Math.fround(short) === value) return String(short);
  }
  return String(Number(value.toPrecision(9)));
}

/** Four digits of it. */
export function brief(value) {
  if (value === undefined) return "–";
  if (!Number.isFinite(value)) return String(value);
  const short = Number(value.toPrecision(4));
  const size = Math.abs(short);
  return size >= 1e6 || (size > 0 && size < 1e-3) ? short.toExponential().replace("e+", "e") : String(short);
}

export function median(values) {
  const known = values.filter(Number.isFinite).sort((a, b) => a - b);
  const middle = known.length >> 1;
  return known.length === 0 ? undefined : known.length % 2 ? known[middle] : (known[middle - 1] + known[middle]) / 2;
}

export function firstKnown(values) {
  return values.find(Number.isFinite);
}

export function ends(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
  return low <= high ? [low, high] : [0, 1];
}

export function csvCell(cell) {
  const text = /^[=+\-@\t\r]/.test(cell) && Number.isNaN(Number(cell)) ? `'${cell}` : String(cell);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
