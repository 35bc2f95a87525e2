// The page: what is chosen, the bars to choose it with, and the view below.

import { csvCell, standsBeside, Table } from "./answers.js";
import { choice, h, linked, RUN_COLOURS } from "./charts.js";
import { SHADES } from "./heat_map.js";
import { alerts, cost, overview } from "./views.js";
import { diagnosis } from "./diagnosis.js";
import { layers } from "./layers.js";

const VIEWS = {
  diagnosis: { text: "Diagnosis", build: diagnosis },
  map: { text: "Layers × steps", build: layers },
  overview: { text: "Four levels", build: overview },
  alerts: { text: "Alerts", build: alerts },
  cost: { text: "Own cost", build: cost },
};

// What the map opens on, the first that there is.
const FIRST = [/(^|_)weight_effective_rank$/, /(^|_)effective_rank$/, /rank/];
// What a first curve takes, where there is none.
const LINES = `from lightning_lowrank import RankMonitor
trainer = L.Trainer(callbacks=[RankMonitor()], logger=TensorBoardLogger("runs"))
trainer.fit(model)`;
// Milliseconds after which an old view makes room for the word that the new one is coming.
const PATIENCE = 400;

// Runs that are shown side by side unless more are chosen.
const AT_FIRST = 3;

export class Page {
  constructor(root, source) {
    Object.assign(this, { root, source, view: "diagnosis", quantity: undefined, filter: "", search: "", fold: "auto", sort: "depth", shade: "change", first: "", last: "" });
    this.picked = undefined;
    this.chosen = undefined;
    this.cache = new Map();
    this.turn = 0;
    this.bar = h("header", {});
    this.body = h("main", { id: "view" });
    root.replaceChildren(this.bar, this.body);
  }

  async begin() {
    this.wait("Loading the runs …");
    await this.load();
    new ResizeObserver(() => this.draw()).observe(this.body);
    if (this.source.live) setInterval(() => { if (!document.hidden) this.reload(); }, 30000);
  }

  /** Nothing but a word, which nobody takes for data. */
  wait(text) {
    this.body.replaceChildren(h("p", { class: "empty loading", role: "status" }, text));
  }

  /** Draw the maps as wide as there is room. */
  draw() {
    if (this.view === "map") this.maps?.forEach((map) => map.draw());
  }

  async load() {
    const { runs, kept } = await this.source.get("runs");
    this.kept = kept;
    this.runs = new Map(runs.map(({ run, entries }) => [run, entries]));
    this.places = new Map(runs.map(({ run, place }) => [run, place]));
    this.damage = runs.flatMap(({ damage }) => damage);
    if (runs.length) this.chosen ??= new Set([...this.runs.keys()].slice(0, AT_FIRST));
    if (!this.quantities().some(({ name }) => name === this.quantity)) this.quantity = this.opening();
    this.bars();
    await this.show();
  }

  /** The latest samples, with everything as it is set. */
  async reload() {
    const focused = document.activeElement;
    if ((this.bar.contains(focused) || this.body.contains(focused)) && focused.matches("input, select")) return;
    this.cache.clear();
    try {
      await this.load();
    } catch {
      // The server is away for a moment: what is shown stays, and it is asked again.
    }
  }

  quantities() {
    const found = new Map();
    for (const entries of this.runs.values()) for (const entry of entries) if (entry.kind === "vector" && !found.get(entry.name)?.source) found.set(entry.name, entry);
    return [...found.values()];
  }

  /** Those that stand for themselves: errors, chance and floors are drawn beside what they are of. */
  choosable() {
    const names = new Set(this.quantities().map(({ name }) => name));
    return this.quantities().filter(({ name }) => !standsBeside(name, names));
  }

  opening() {
    const names = this.choosable().map(({ name }) => name);
    return FIRST.map((wanted) => names.find((name) => wanted.test(name))).find(Boolean) ?? names[0];
  }

  /** What is known of the quantity that is chosen. */
  entry() {
    return this.quantities().find(({ name }) => name === this.quantity);
  }

  shown() {
    return [...this.runs.keys()].filter((run) => this.chosen?.has(run));
  }

  has(run, kind, name) {
    return this.runs.get(run)?.some((entry) => entry.kind === kind && (name === undefined || entry.name === name)) ?? false;
  }

  /** That of TensorBoard's "Time series", which hands its colours out in the order in which runs began. */
  colour(run) {
    return `var(--run-${this.places.get(run) % RUN_COLOURS})`;
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

  /** To a layer of the map. */
  go(quantity, site, step) {
    return this.set({ view: "map", quantity, picked: { site, step } });
  }

  bars() {
    const focused = this.bar.contains(document.activeElement) ? document.activeElement.id : "";
    const tabs = h("nav", { "aria-label": "Views" }, Object.entries(VIEWS).map(([view, { text }]) =>
      h("button", { type: "button", id: `view-${view}`, "aria-pressed": String(view === this.view), onclick: () => { this.set({ view }).then(() => window.scrollTo(0, 0)); } }, text)));
    this.bar.replaceChildren(h("h1", {}, "Low rank"), tabs, this.choiceOfRuns(), this.actions(), ...(this.view === "map" ? [this.tools()] : []));
    if (this.kept) this.bar.append(h("p", { class: "note", role: "note" }, `TensorBoard keeps ${this.kept} samples of each curve (--samples_per_plugin); the others are not shown.`));
    this.bar.append(...this.damage.map((said) => h("p", { class: "note", role: "note" }, `${said}.`)));
    if (focused) document.getElementById(focused)?.focus();
  }

  choiceOfRuns() {
    return h("fieldset", { class: "runs" }, h("legend", {}, "Runs, side by side"), [...this.runs.keys()].map((run, i) => {
      const box = h("input", { type: "checkbox", id: `run-${i}`, onchange: (event) => {
        event.target.checked ? this.chosen.add(run) : this.chosen.delete(run);
        this.set({});
      } });
      box.checked = this.chosen?.has(run);
      const key = h("span", { class: "key" });
      key.style.borderColor = this.colour(run);
      return h("label", {}, box, key, run);
    }));
  }

  actions() {
    const again = () => { this.cache.clear(); this.load(); };
    return h("div", { class: "actions" }, h("button", { type: "button", id: "csv", onclick: () => this.save(this.rows?.() ?? []) }, "CSV of what is shown"),
      this.source.live ? h("button", { type: "button", id: "reload", onclick: again }, "Reload") : undefined);
  }

  tools() {
    const fits = ({ name }) => name === this.quantity || name.replaceAll("_", " ").toLowerCase().includes(this.search.toLowerCase().replaceAll("_", " "));
    const options = () => this.choosable().filter(fits).map(({ name, source, statistic }) => [name, (statistic || name).replaceAll("_", " "), source.replaceAll("_", " ")]);
    const pick = () => choice(of ? `Quantity (${of})` : "Quantity", options(), this.quantity, (quantity) => this.set({ quantity }), "quantity");
    const shades = Object.entries(SHADES).map(([key, { text }]) => [key, text]);
    const sorts = [["depth", "depth"], ["value", "latest value"], ["change", "change"]];
    const of = this.entry()?.source.replaceAll("_", " ") ?? "";
    const step = (label, key) => h("label", {}, label, h("input", { id: key, type: "number", value: this[key], onchange: (event) => this.set({ [key]: event.target.value }) }));
    const says = this.entry()?.says;
    return h("div", { class: "tools" },
      // While it is typed the bar stays as it is: a new one would move the caret.
      h("label", {}, "Find", h("input", { id: "search", type: "search", value: this.search, oninput: (event) => {
        this.search = event.target.value;
        document.getElementById("quantity").parentElement.replaceWith(pick());
      } })),
      pick(),
      choice("Rows", [["auto", "as they fit"], ["layers", "layers"], ["blocks", "blocks, medians"]], this.fold, (fold) => this.set({ fold, filter: "" }), "fold"),
      choice("Sort by", sorts, this.sort, (sort) => this.set({ sort }), "sort"),
      choice("Colour", shades, this.shade, (shade) => this.set({ shade }), "shade"),
      h("label", {}, "Layer has", h("input", { id: "filter", type: "search", value: this.filter, oninput: (event) => { this.filter = event.target.value; this.show(); } })),
      step("From step", "first"), step("To step", "last"),
      says ? h("p", { class: "says", id: "says" }, linked(says)) : undefined);
  }

  /** Build the view; what was asked for meanwhile wins. */
  async show() {
    const turn = ++this.turn;
    const held = this.view === "map" ? this.maps?.find((map) => map.canvas === document.activeElement) : undefined;
    this.body.setAttribute("aria-busy", "true");
    const late = setTimeout(() => { if (turn === this.turn && this.there !== this.view) this.wait("Loading …"); }, PATIENCE);
    const { content, rows } = await this.built();
    clearTimeout(late);
    if (turn !== this.turn) return;
    [this.rows, this.there] = [rows, this.view];
    this.body.replaceChildren(...content);
    this.draw();
    if (held) this.maps.find((map) => map.run === held.run)?.take(held);
    this.body.setAttribute("aria-busy", "false");
    // Measured by the benchmark: the frame after the next is the one in which all of it has been painted.
    requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("lowrank-painted")));
  }

  /** What to show, and as which rows it can be taken along. */
  async built() {
    const only = (text, role) => ({ content: [h("p", { class: "empty", role }, text)], rows: () => [] });
    if (this.runs.size === 0) return { content: [h("p", { class: "empty" }, "No run here has data from lightning_lowrank. Three lines give a first curve:"), h("pre", { id: "first-lines" }, LINES)], rows: () => [] };
    if (this.shown().length === 0) return only("No run is chosen: tick one above.");
    try {
      return await VIEWS[this.view].build(this);
    } catch (error) {
      return only(`This cannot be shown: ${error.message}`, "alert");
    }
  }

  /** Download rows. */
  save(rows) {
    const text = rows.map((line) => line.map(csvCell).join(",")).join("\r\n");
    const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: `lowrank_${this.view}.csv` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
}
