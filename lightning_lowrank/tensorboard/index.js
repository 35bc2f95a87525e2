// The tab "Low rank" of TensorBoard, and the page that `lightning-lowrank report` writes: the same views of the same answers.

import { Archive, Server } from "./answers.js";
import { h } from "./charts.js";
import { Page } from "./page.js";

const STYLE = `
:root { color-scheme: light; --ink: #212121; --paper: #fff; --soft: #616161; --line: #dcdcdc; --card: #f5f5f5; --accent: #b83d00;
  --run-0: #425066; --run-1: #12b5cb; --run-2: #e52592; --run-3: #f9ab00; --run-4: #9334e6; --run-5: #7cb342; --run-6: #e8710a; }
:root.dark { color-scheme: dark; --ink: #e8e8e8; --paper: #303030; --soft: #b5b5b5; --line: #555; --card: #3a3a3a; --accent: #ffab6b; --run-0: #8e98a3; }
body { margin: 0; padding: 12px 16px; background: var(--paper); color: var(--ink); font: 14px Roboto, Arial, sans-serif; }
h1 { font-size: 18px; margin: 0 16px 0 0; } h2 { font-size: 15px; margin: 18px 0 6px; }
header { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; border-bottom: 1px solid var(--line); padding-bottom: 8px; }
nav { display: flex; gap: 4px; } .tools { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: end; flex-basis: 100%; }
label { display: inline-flex; flex-direction: column; font-size: 12px; color: var(--soft); gap: 2px; max-width: 300px; }
.actions { display: flex; gap: 4px; margin-left: auto; }
fieldset.runs { border: 0; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: 4px 12px; max-height: 90px; overflow: auto; }
fieldset.runs legend { float: left; line-height: 20px; padding: 0; font-size: 12px; color: var(--soft); margin-right: 8px; }
.runs label { flex-direction: row; color: var(--ink); font-size: 13px; align-items: center; overflow-wrap: anywhere; }
button, select, input { font: inherit; font-size: 13px; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 4px; box-sizing: border-box; }
button, select, .tools input { height: 30px; padding: 4px 8px; } .tools input { width: 84px; } .tools input[type=search] { width: 150px; }
input[type=checkbox], input[type=range] { accent-color: var(--accent); } input[type=range] { width: 260px; height: 24px; }
button { cursor: pointer; } button.title { min-height: 24px; } button[aria-pressed=true] { border-color: var(--accent); color: var(--accent); font-weight: bold; }
button.link { border: 0; background: none; height: auto; padding: 0 10px 0 0; color: var(--accent); text-align: left; overflow-wrap: anywhere; }
a { color: var(--accent); } button.link:hover { text-decoration: underline; } button:not(.link):hover { border-color: var(--soft); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.maps, .costs { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 16px; }
.details { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, var(--spectra)); gap: 16px; }
.spectra { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 16px; } .run { font-size: 12px; margin: 2px 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; margin-top: 12px; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; font-size: 13px; } button.title { font-size: 14px; font-weight: bold; border: 0; background: none; height: auto; padding: 0 0 6px; }
.what { color: var(--soft); font-size: 12px; margin: 0 0 4px; } .empty { color: var(--soft); margin: 12px 0; } figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; color: var(--soft); overflow-wrap: anywhere; } figcaption b { color: var(--ink); }
.stage { position: relative; } canvas { display: block; color: var(--ink); cursor: crosshair; }
.stage .hair { stroke: var(--soft); stroke-width: 1; pointer-events: none; } .cursor { position: absolute; box-sizing: border-box; outline: 2px solid var(--ink); box-shadow: 0 0 0 3px var(--paper); pointer-events: none; }
.tip { position: absolute; z-index: 2; pointer-events: none; background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: 4px 8px; font-size: 12px; max-width: 320px; overflow-wrap: anywhere; width: max-content; box-shadow: 0 1px 4px #0004; }
.status { font-size: 12px; min-height: 1.3em; margin: 4px 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 12px; align-items: center; margin: 8px 0; }
.bar { display: inline-block; width: 160px; height: 12px; margin: 0 6px; vertical-align: middle; }
.findings { list-style: none; margin: 0; padding: 0; } .findings li { display: grid; grid-template-columns: minmax(0, 1fr) 280px; gap: 4px 24px; border-bottom: 1px solid var(--line); padding: 10px 0; align-items: center; }
.says { margin: 0 0 4px; overflow-wrap: anywhere; } .severity { display: inline-block; min-width: 58px; margin-right: 8px; padding: 1px 6px; border-radius: 3px; font-size: 12px; text-align: center; }
.severity.critical { background: #b3122d; color: #fff; } .severity.warning { background: #ffd98a; color: #3b2a00; } .severity.info { background: #d6e4f5; color: #10304f; }
.says button.link { padding: 0; font-size: 14px; } summary { cursor: pointer; } .diagnosis details { margin-top: 8px; } #words { margin-top: 12px; } .tools .says { flex-basis: 100%; font-size: 12px; color: var(--soft); } .band { opacity: 0.18; } pre { background: var(--card); padding: 8px 12px; border-radius: 4px; overflow-x: auto; }
.swatch { display: inline-block; width: 12px; height: 12px; border: 1px solid var(--line); margin-right: 4px; vertical-align: middle; }
.key { display: inline-block; width: 20px; border-top: 2px solid; margin-right: 5px; vertical-align: middle; } svg.dash { width: 24px; height: 4px; margin-right: 5px; vertical-align: middle; } .key-of-bars { margin-top: 12px; }
svg.chart { width: 100%; display: block; } svg text { fill: var(--soft); font-size: 11px; } svg .rule { stroke: var(--line); fill: var(--line); }
svg .line { fill: none; stroke-width: 1.8; } svg .faint { fill: none; stroke-width: 1; opacity: 0.55; } svg .marker { stroke: var(--accent); stroke-dasharray: 2 2; }
svg.beside { width: 140px; height: 14px; vertical-align: middle; } svg .at-first { fill: var(--paper); stroke: var(--ink); stroke-width: 1.5; } svg .null { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 2; }
svg.time { width: 300px; height: 14px; vertical-align: middle; } .slider { flex-direction: row; align-items: center; max-width: none; }
table { border-collapse: collapse; font-size: 13px; margin: 8px 0; } caption { text-align: left; color: var(--soft); padding: 4px 0; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; vertical-align: top; white-space: nowrap; }
td:last-child { white-space: normal; overflow-wrap: anywhere; } .wide { overflow-x: auto; } tbody th { font-weight: normal; } td.number { text-align: right; }
.levels td, .levels th { vertical-align: middle; } .levels td.sites { white-space: normal; min-width: 180px; overflow-wrap: anywhere; } .levels tbody :is(th, td) { border: 0; } .levels tbody { border-bottom: 1px solid var(--line); } [role=alert], .note { color: var(--accent); } pre { white-space: pre-wrap; }
@media (max-width: 900px) { .details, .findings li { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 480px) { body { padding: 8px; } .maps, .costs { grid-template-columns: minmax(0, 1fr); } nav { flex-wrap: wrap; } .levels td.sites { white-space: nowrap; } .actions { margin-left: 0; } }
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

/** Style and theme of the document. */
export function dress(onTheme) {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(STYLE);
  document.adoptedStyleSheets = [sheet];
  document.documentElement.lang = "en";
  document.title ||= "Low rank"; // TensorBoard's frame has none
  followTheme(onTheme);
}

async function start(source) {
  const page = new Page(document.body, source);
  dress(() => page.draw());
  try {
    await page.begin();
  } catch (error) {
    page.body.replaceChildren(h("p", { class: "empty", role: "alert" }, `This cannot be shown: ${error.message}`));
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
