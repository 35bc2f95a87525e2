// The first view: what the curves of each run say, worst first, with a small curve beside each line.

import { median } from "./answers.js";
import { chart, h } from "./charts.js";

const NOTHING = "Nothing to report: no rule fires in the last samples.";

export async function diagnosis(page) {
  const runs = await Promise.all(page.shown().map(async (run) => ({ run, ...await page.source.get("diagnosis", { run }) })));
  const sections = await Promise.all(runs.map(async ({ run, findings, idle }) => {
    const lines = await Promise.all(findings.map((finding) => findingItem(page, run, finding)));
    const rest = idle.length ? h("details", {}, h("summary", { class: "what" }, `Not checked, because nothing was measured for them: ${idle.length === 1 ? "1 rule" : `${idle.length} rules`}`),
      h("p", { class: "what" }, `${idle.join(", ")}. watch_all() includes what its budget and the model allow; add a monitor that it left out by hand.`)) : undefined;
    return h("section", { class: "diagnosis" }, h("h2", {}, run), findings.length ? h("ol", { class: "findings" }, lines) : h("p", { class: "empty" }, NOTHING), rest);
  }));
  const rows = () => [["run", "rule", "severity", "site", "quantity", "since", "value", "message"], ...runs.flatMap(({ run, findings }) =>
    findings.map(({ rule, severity, site, quantity, since, value, message }) => [run, rule, severity, site, quantity, since, value ?? "", message]))];
  return { content: sections, rows };
}

/** A finding in words, its curve, and the way to its layer. */
async function findingItem(page, run, finding) {
  const { rule, severity, site, quantity, since, band, num_sites: sites, says, cause, advice } = finding;
  const curve = await findingCurve(page, run, quantity, site);
  const more = sites > 1 ? ` and ${sites - 1} more` : "";
  const where = curve?.site ? h("button", { type: "button", class: "link", onclick: () => page.go(quantity, curve.site, curve.xs.at(-1)) }, site) : site;
  const said = h("div", {}, h("p", { class: "says" }, h("span", { class: `severity ${severity}` }, severity), " ", h("b", {}, rule.replaceAll("-", " ")), " · ", where, `${more}: ${says}`),
    h("p", { class: "what" }, [`Since step ${since}`, band && `healthy: ${band}`, cause && `usual cause: ${cause}`].filter(Boolean).join("; ")),
    h("p", { class: "what" }, `Try: ${advice}. `, h("a", { href: finding.page, target: "_blank" }, "More")));
  return h("li", {}, said, curve ? h("figure", {}, h("figcaption", { class: "what" }, `${quantity.replaceAll("_", " ")}, ${curve.name}`),
    chart([{ name: curve.name, xs: curve.xs, ys: curve.ys, colour: page.colour(run) }],
      { title: `${quantity} of ${curve.name}, ${run}`, x: "step", marker: since, width: 260, height: 120 })) : undefined);
}

/** The curve of the site, or the median over all where the finding is of all; none where it was not written as one. */
async function findingCurve(page, run, quantity, site) {
  if (!quantity || !page.has(run, "vector", quantity)) return undefined;
  const table = await page.table("matrix", { run, kind: "vector", name: quantity });
  if (table.steps.length < 2) return undefined;
  if (table.index.has(site)) return { name: site, site, xs: table.steps, ys: table.curve(site) };
  const ys = table.steps.map((_, column) => median(table.sites.map((one) => table.at(column, one))));
  return { name: "median of layers", xs: table.steps, ys };
}
