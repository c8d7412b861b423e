// Draws the charts of report.html, and switches its language.
(() => {
  const page = JSON.parse(document.getElementById("page").textContent), root = document.documentElement;
  const zh = () => root.lang === "zh" ? 1 : 0, NS = "http://www.w3.org/2000/svg";
  const paint = name => `var(--${name})`;
  const make = (parent, name, attributes, text) => {
    const e = document.createElementNS(NS, name);
    for (const k in attributes) e.setAttribute(k, attributes[k]);
    if (text !== undefined) e.textContent = text;
    return parent.appendChild(e);
  };
  const short = v => {
    const a = Math.abs(v);
    if (a >= 1e9) return +(v / 1e9).toPrecision(3) + "G";
    if (a >= 1e6) return +(v / 1e6).toPrecision(3) + "M";
    if (a >= 1e4) return +(v / 1e3).toPrecision(3) + "k";
    return a && a < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(3));
  };
  const ticks = (low, high, most) => {
    const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw)), found = [];
    const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw);
    for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-9); i++) found.push(i * step);
    return found;
  };
  function draw(figure) {
    const spec = page.charts[figure.dataset.chart], tall = +figure.dataset.height, W = Math.max(200, figure.clientWidth);
    const L = 46, R = 12, T = 10, B = 30, lines = spec.lines.filter(l => l.x.length);
    figure.replaceChildren();
    const svg = make(figure, "svg", {height: tall, viewBox: `0 0 ${W} ${tall}`, role: "img"});
    if (!lines.length) return make(svg, "text", {x: W / 2, y: tall / 2, "text-anchor": "middle"}, spec.empty[zh()]);
    const xs = lines.flatMap(l => l.x), ys = lines.flatMap(l => [...l.y, ...(l.low || []), ...(l.high || [])]);
    let x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = Math.min(...ys), y1 = Math.max(...ys);
    for (const m of spec.marks || []) { y0 = Math.min(y0, m.y); y1 = Math.max(y1, m.y); }
    if (spec.range) [y0, y1] = spec.range;
    if (spec.zero) y0 = 0;
    if (x0 === x1) { x0 -= 1; x1 += 1; }
    const pad = (y1 - y0) * .07 || Math.abs(y1) * .1 || 1;
    if (!spec.zero) y0 -= pad;
    y1 += pad;
    // axes and lines
    const X = v => L + (v - x0) / (x1 - x0) * (W - L - R), Y = v => T + (y1 - v) / (y1 - y0) * (tall - T - B);
    for (const t of ticks(y0, y1, 5)) {
      make(svg, "line", {x1: L, x2: W - R, y1: Y(t), y2: Y(t), stroke: "var(--line)"});
      make(svg, "text", {x: L - 6, y: Y(t) + 4, "text-anchor": "end"}, short(t));
    }
    for (const t of ticks(x0, x1, Math.max(3, W / 90)).filter(Number.isInteger))
      make(svg, "text", {x: X(t), y: tall - B + 17, "text-anchor": "middle"}, short(t));
    const id = "clip" + figure.dataset.chart;
    make(make(make(svg, "defs", {}), "clipPath", {id}), "rect", {x: L, y: 0, width: W - L - R + 4, height: tall - B});
    const area = make(svg, "g", {"clip-path": `url(#${id})`});
    for (const m of spec.marks || [])
      make(area, "line", {x1: L, x2: W - R, y1: Y(m.y), y2: Y(m.y), stroke: paint(m.color), "stroke-width": 1.5, "stroke-dasharray": "6 4"});
    for (const l of lines) {
      const path = (values, order) => order.map(i => X(l.x[i]).toFixed(1) + " " + Y(values[i]).toFixed(1)).join("L");
      const all = l.x.map((_, i) => i);
      if (l.low) make(area, "path", {d: "M" + path(l.low, all) + "L" + path(l.high, [...all].reverse()) + "Z", fill: paint(l.color), opacity: .16});
      make(area, "path", {d: "M" + path(l.y, all), fill: "none", stroke: paint(l.color), "stroke-width": l.width || 1.8,
        "stroke-linejoin": "round", opacity: l.faint ? .45 : 1});
      if (l.dots || l.x.length === 1) all.forEach(i => make(area, "circle", {cx: X(l.x[i]), cy: Y(l.y[i]), r: 2.8, fill: paint(l.color)}));
    }
    if (spec.best) make(area, "circle", {cx: X(spec.best[0]), cy: Y(spec.best[1]), r: 6, fill: "none", stroke: "var(--red)", "stroke-width": 2.5});
    // legend
    const caption = document.createElement("figcaption");
    for (const l of [...spec.lines.filter(l => l.x.length), ...(spec.marks || []), ...(spec.best ? [{name: spec.bestName, color: "red"}] : [])]) {
      const item = document.createElement("span"), mark = document.createElement("i");
      mark.style.background = paint(l.color);
      mark.style.opacity = l.faint ? .45 : 1;
      item.append(mark, l.name[zh()]);
      caption.append(item);
    }
    if (spec.note) caption.append(spec.note[zh()]);
    // values at the pointer
    const tip = document.createElement("div"), cross = make(svg, "line", {y1: T, y2: tall - B, stroke: "var(--dim)", visibility: "hidden"});
    tip.className = "tip";
    figure.append(caption, tip);
    const off = () => { tip.style.display = "none"; cross.setAttribute("visibility", "hidden"); };
    svg.onpointerleave = off;
    svg.onpointermove = event => {
      const at = x0 + (event.offsetX - L) / (W - L - R) * (x1 - x0), near = l => l.x.reduce((b, x, i) => Math.abs(x - at) < Math.abs(l.x[b] - at) ? i : b, 0);
      const main = lines[0], step = main.x[near(main)];
      tip.replaceChildren();
      tip.append(page.step[zh()] + " " + step.toLocaleString());
      for (const l of lines) {
        const i = near(l);
        tip.append(document.createElement("br"), l.name[zh()] + ": " + (+l.y[i].toPrecision(5)) + (l.x[i] === step ? "" : ` (${page.step[zh()]} ${l.x[i].toLocaleString()})`));
      }
      cross.setAttribute("x1", X(step)); cross.setAttribute("x2", X(step)); cross.setAttribute("visibility", "visible");
      tip.style.display = "block";
      tip.style.left = Math.min(Math.max(0, X(step) + 12), W - tip.offsetWidth) + "px";
      tip.style.top = "8px";
    };
  }
  const drawAll = () => document.querySelectorAll("figure[data-chart]").forEach(draw);
  const speak = language => { root.lang = language; drawAll(); };
  for (const language of ["en", "zh"])
    document.querySelector(".to-" + language).onclick = () => { history.replaceState(null, "", "#" + language); speak(language); };
  const wanted = location.hash.slice(1), preferred = (navigator.language || "").startsWith("zh") ? "zh" : "en";
  speak(["en", "zh"].includes(wanted) ? wanted : preferred);
  addEventListener("resize", drawAll);
  document.querySelectorAll(".copy").forEach(button => button.onclick = () => {
    const range = document.createRange(), selection = getSelection();
    range.selectNodeContents(button.nextElementSibling);
    selection.removeAllRanges(); selection.addRange(range);
    document.execCommand("copy");
    button.textContent = page.copied[zh()];
  });
  if (page.refresh) {
    if (Date.now() / 1000 - page.time > 10 * page.refresh + 600) document.getElementById("stale").hidden = false;
    setTimeout(() => { if (getSelection().isCollapsed && !document.querySelector("details[open]")) location.reload(); }, 1000 * page.refresh);
  }
})();
