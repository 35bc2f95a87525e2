// The page of `lightning-lowrank coordinate-check`: each layer over widths, on two logarithmic axes, where powers are slopes.

import { chart, COLOURS, grid, h, legend } from "./charts.js";
import { dress } from "./index.js";

const VERDICTS = { grows: COLOURS[3], shrinks: COLOURS[4], flat: COLOURS[2], unclear: COLOURS[1], "no power": COLOURS[5] };

/** What the command calls, with what it measured: quantity -> what it is; layer -> its verdict and its quantities. */
export function overWidths({ title, quantities, layers }) {
  dress(() => {});
  const names = Object.keys(layers);
  const counts = Object.keys(VERDICTS).map((verdict) => [verdict, names.filter((name) => layers[name].verdict === verdict).length]);
  const shown = counts.filter(([, count]) => count).map(([verdict, count]) => ({ name: `${verdict}: ${count} of ${names.length} layers`, colour: VERDICTS[verdict] }));
  const figures = Object.entries(quantities).map(([quantity, what]) => h("figure", {},
    h("figcaption", {}, h("b", {}, quantity), ` ${what}`), overWidth(quantity, what, layers)));
  const rows = names.map((name) => [name, layers[name].verdict, ...Object.keys(quantities).map((quantity) => slope(layers[name][quantity]))]);
  document.body.replaceChildren(h("header", {}, h("h1", {}, title)),
    h("p", { class: "what" }, "Means over seeds. A straight line is a power of the width, and its slope the exponent. Colours show the verdicts on own."),
    legend(shown), h("div", { class: "maps" }, figures),
    grid(["layer", "verdict", ...Object.keys(quantities)], rows, "Powers of the width, with their standard errors"));
}

/** A line for each layer. */
function overWidth(quantity, what, layers) {
  const lines = Object.entries(layers).map(([name, layer]) => {
    const means = Object.entries(layer[quantity].means);
    return { name: `${name} ${slope(layer[quantity])}`, xs: means.map(([width]) => Number(width)), ys: means.map(([, mean]) => mean), colour: VERDICTS[layer.verdict] };
  });
  return chart(lines, { title: what, x: "width", logX: true, logY: true });
}

function slope({ power, error }) {
  return power === null ? "-" : `${power.toFixed(2)} (${error.toFixed(2)})`;
}
