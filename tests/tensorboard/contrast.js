// Words whose colour differs too little from what is behind them (WCAG 2.2, 1.4.3: 4.5 for small text).
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parts = (text) => text.match(/[0-9.]+/g).map(Number);
const behind = (e) => { for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor); if ((c[3] ?? 1) > 0) return c; } };
const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
return [...document.querySelectorAll("body *:not(script):not(style)")].filter((e) => own(e) && e.getClientRects().length).flatMap((e) => {
  const style = getComputedStyle(e), ink = parts(e instanceof SVGElement ? style.fill : style.color);
  const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
  return ratio < 4.5 ? [`${e.tagName} ${e.className?.baseVal ?? e.className} ${e.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`] : [];
});
