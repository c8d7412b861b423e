"""The page's style sheet, and the script that draws its charts and switches the language."""

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1c2430;--dim:#667083;--line:#e3e7ee;
--blue:#2f6fde;--pale:#2f6fde30;--green:#1a9a5c;--red:#d6455d;--amber:#c77f14;--violet:#7c5cd6;
--counted:#c9efd9;--countedink:#0c5634}
@media(prefers-color-scheme:dark){:root{--bg:#12161d;--card:#1b212b;--ink:#e6eaf1;--dim:#98a3b5;--line:#2c3543;
--blue:#6ea3ff;--pale:#6ea3ff38;--green:#4cc98a;--red:#ff7a8f;--amber:#e9ad4e;--violet:#a98fff;
--counted:#1d4a35;--countedink:#b4f0d0}}
*{box-sizing:border-box}
html[lang=en] .zh,html[lang=zh] .en{display:none}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","PingFang SC","Microsoft YaHei","Noto Sans CJK SC","WenQuanYi Micro Hei",sans-serif}
main{max-width:1080px;margin:0 auto;padding:22px 18px 40px}
header{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:center;margin-bottom:14px}
h1{font-size:24px;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 12px}
h3{font-size:14px;margin:18px 0 8px;color:var(--dim);font-weight:600}
.sub{flex-basis:100%;color:var(--dim)}
.pill{border-radius:99px;padding:2px 11px;font-size:13px;font-weight:600;color:#fff;background:var(--blue)}
.pill.done{background:var(--green)}.pill.failed{background:var(--red)}.pill.stopped{background:var(--amber)}
nav{margin-left:auto}nav button{font:inherit;font-size:13px;border:1px solid var(--line);background:var(--card);
color:var(--dim);padding:3px 10px;cursor:pointer}nav button:first-child{border-radius:7px 0 0 7px}
nav button:last-child{border-radius:0 7px 7px 0;border-left:0}
html[lang=en] nav .to-en,html[lang=zh] nav .to-zh{background:var(--blue);border-color:var(--blue);color:#fff}
.bar{height:7px;border-radius:9px;background:var(--line);overflow:hidden;margin:4px 0 16px}
.bar i{display:block;height:100%;background:var(--blue)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-bottom:14px}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tile{padding:11px 14px}.tile b{display:block;font-size:22px;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span.l,.tile .l{color:var(--dim);font-size:13px}
section{padding:16px 18px;margin-bottom:14px;min-width:0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(225px,1fr));gap:14px;margin-bottom:14px}
.charts section{margin:0}
figure{margin:0;position:relative}figure svg{display:block;width:100%;overflow:visible}
svg text{fill:var(--dim);font-size:11.5px;font-family:inherit}
figcaption{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--dim);margin-top:4px}
figcaption i{display:inline-block;width:14px;height:3px;border-radius:2px;vertical-align:middle;margin-right:6px}
.tip{position:absolute;pointer-events:none;background:var(--ink);color:var(--bg);border-radius:7px;padding:5px 9px;
font-size:12.5px;line-height:1.45;white-space:nowrap;display:none;z-index:2;font-variant-numeric:tabular-nums}
.stack{display:flex;height:26px;border-radius:7px;overflow:hidden;background:var(--line)}
.stack i{display:block;min-width:1px}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:5px 14px 5px 0;
border-top:1px solid var(--line);font-weight:400}tr:first-child>*{border-top:0}th{color:var(--dim);white-space:nowrap}
td{overflow-wrap:anywhere}.num{text-align:right;font-variant-numeric:tabular-nums}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,
"DejaVu Sans Mono","Noto Sans Mono CJK SC",monospace;font-size:13px;line-height:1.6}
.sampled th{width:1%}.sampled tr.ref>*{color:var(--dim);font-style:italic}
.prompt{border-left:3px solid var(--blue);padding-left:10px;margin:0 0 8px}
.example{border:1px solid var(--line);border-radius:9px;padding:10px 12px;margin:0 0 10px;max-height:340px;overflow:auto}
.example u{text-decoration:none;background:var(--counted);color:var(--countedink);border-radius:2px;
box-shadow:inset 0 -1px 0 #0002}
.example s{text-decoration:none;color:var(--dim)}.example em{font-style:normal;font-size:11px;padding:0 5px;border-radius:4px;
border:1px solid var(--line);color:var(--dim)}.example em.c{background:var(--counted);color:var(--countedink)}
pre{margin:0;padding:12px;background:var(--bg);border:1px solid var(--line);border-radius:9px;overflow:auto;
white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}
.copy{font:inherit;font-size:13px;border:1px solid var(--line);border-radius:7px;background:var(--card);color:var(--ink);
padding:2px 10px;cursor:pointer;margin:8px 0 4px}summary{cursor:pointer;color:var(--blue);margin-top:10px}
.note{color:var(--dim);font-size:13px}.error{color:var(--red);white-space:pre-wrap;overflow-wrap:anywhere}
footer{color:var(--dim);font-size:13px;text-align:center;margin-top:18px}
@media(max-width:560px){main{padding:14px 10px 30px}section{padding:13px 12px}.tile b{font-size:19px}
.tiles{grid-template-columns:repeat(2,1fr);gap:9px}h1{font-size:20px}td,th{padding-right:9px}}
@media print{.copy,nav{display:none}section,.tile{break-inside:avoid}}
"""

SCRIPT = """
(() => {
  const page = JSON.parse(document.getElementById("page").textContent), root = document.documentElement;
  const zh = () => root.lang === "zh" ? 1 : 0, NS = "http://www.w3.org/2000/svg";
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
      make(area, "line", {x1: L, x2: W - R, y1: Y(m.y), y2: Y(m.y), stroke: m.color, "stroke-width": 1.5, "stroke-dasharray": "6 4"});
    for (const l of lines) {
      const path = (values, order) => order.map(i => X(l.x[i]).toFixed(1) + " " + Y(values[i]).toFixed(1)).join("L");
      const all = l.x.map((_, i) => i);
      if (l.low) make(area, "path", {d: "M" + path(l.low, all) + "L" + path(l.high, [...all].reverse()) + "Z", fill: l.color, opacity: .16});
      make(area, "path", {d: "M" + path(l.y, all), fill: "none", stroke: l.color, "stroke-width": l.width || 1.8,
        "stroke-linejoin": "round", opacity: l.faint ? .45 : 1});
      if (l.dots || l.x.length === 1) all.forEach(i => make(area, "circle", {cx: X(l.x[i]), cy: Y(l.y[i]), r: 2.8, fill: l.color}));
    }
    if (spec.best) make(area, "circle", {cx: X(spec.best[0]), cy: Y(spec.best[1]), r: 6, fill: "none", stroke: "var(--red)", "stroke-width": 2.5});
    const caption = document.createElement("figcaption");
    for (const l of [...spec.lines.filter(l => l.x.length), ...(spec.marks || []), ...(spec.best ? [{name: spec.bestName, color: "var(--red)"}] : [])]) {
      const item = document.createElement("span"), mark = document.createElement("i");
      mark.style.background = l.color;
      mark.style.opacity = l.faint ? .45 : 1;
      item.append(mark, l.name[zh()]);
      caption.append(item);
    }
    if (spec.note) caption.append(spec.note[zh()]);
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
"""
