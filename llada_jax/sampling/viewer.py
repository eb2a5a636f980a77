"""Watch a decode: a self-contained page that replays it, and a still picture of it.

Both are strings that refer to nothing outside themselves. Whatever a model wrote is shown as text, never run as markup.
"""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llada_jax.sampling.canvas import Canvas
from llada_jax.sampling.trace import Trace


class Row(NamedTuple):
    """One decoded row as the viewer shows it; lists have an entry a token, padding left out."""

    label: str
    text: list[str]  # pieces whose concatenation is the text
    step: list[int]  # forward that wrote the token, from 0; -1 = given
    prob: list[float | None]  # model's probability of it then; None = given, or filled at an end of text
    block: list[int]  # -1 = given
    forwards: int  # that decoded


def rows(trace: Trace, canvas: Canvas, decode: Callable[[list[int]], str], labels: Sequence[str], special: Mapping[int, str] = {}) -> list[Row]:
    """The first len(labels) rows of a decode. `special` gives ids, such as EOS, a text of their own."""
    made = []
    for b, label in enumerate(labels):
        valid_T = np.asarray(canvas.valid_BT[b])
        arrays = trace.final_BT, trace.reveal_step_BT, trace.reveal_logprob_BT, canvas.block_BT
        tokens, step, logprob, block = (np.asarray(x[b])[valid_T] for x in arrays)
        prob = [round(math.exp(x), 4) if math.isfinite(x) else None for x in logprob.tolist()]
        made.append(Row(label, pieces(tokens.tolist(), decode, special), step.tolist(), prob, block.tolist(), int(np.asarray(trace.steps_B)[b])))
    return made


def pieces(tokens: Sequence[int], decode: Callable[[list[int]], str], special: Mapping[int, str] = {}) -> list[str]:
    """The text that each token adds to the ones before it; a character spread over several byte tokens stands at its last one."""
    made: list[str] = []
    held: list[int] = []  # bytes of a character that is not complete yet
    for i, token in enumerate(tokens):
        if token in special:
            made.append(special[token])
            held = []
            continue
        held.append(token)
        text = decode(held)
        if text.endswith("\ufffd") and len(held) < 4 and i + 1 < len(tokens):
            made.append("")
        else:
            made.append(text)
            held = []
    return made


def page(shown: Sequence[Row], title: str, subtitle: str = "", pairs: bool = False) -> str:
    """An HTML page: slider, play and pause, speed, confidence as colour, details on hover or keyboard focus. `#12` opens step 12.

    With `pairs` two rows that follow each other stand side by side: one request by two decoders.
    """
    data = json.dumps([row._asdict() for row in shown], ensure_ascii=True, allow_nan=False)
    for sign in "<>&":  # so that no text can close the script element
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    parts = {"COLUMNS": "two" if pairs else "", "TITLE": html.escape(title), "SUBTITLE": html.escape(subtitle), "DATA": data}
    head, *rest = PAGE.split("@@")
    return head + "".join(parts[part] if i % 2 == 0 else part for i, part in enumerate(rest))


def picture(row: Row, snapshots: int = 4, columns: int = 76) -> str:
    """An SVG (light and dark) of the canvas at `snapshots` moments, first to last, two abreast where they fit in 1250 pixels."""
    moments = sorted({round(row.forwards * i / max(snapshots - 1, 1)) for i in range(snapshots)})
    cells = _layout(row, columns)
    margin, top, gap = 16.0, 34.0, 12.0
    panel_w = max(32, *(x + w for x, _, w, _, _ in cells)) * EM + 2 * margin
    panel_h = (max(y for _, y, _, _, _ in cells) + 1) * LINE + top + margin
    across = 2 if 2 * panel_w <= 1250 and len(moments) > 1 else 1
    down = -(-len(moments) // across)
    width, height = across * panel_w + (across - 1) * gap, down * panel_h + (down - 1) * gap
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img">',
           f"<title>{html.escape(row.label)}</title><style>{PICTURE_STYLE}</style>"]
    for index, moment in enumerate(moments):
        left, upper = index % across * (panel_w + gap), index // across * (panel_h + gap)
        written = sum(0 <= step < moment for step in row.step)
        total = sum(step >= 0 for step in row.step)
        out.append(f'<g transform="translate({left:.1f} {upper:.1f})"><rect class="panel" width="{panel_w:.1f}" height="{panel_h:.1f}" rx="10"/>'
                   f'<text class="note" x="{margin}" y="22">forward {moment} of {row.forwards} · {written} of {total} tokens</text>')
        out += [_cell(row, i, text, moment, margin + x * EM, top + y * LINE, w) for x, y, w, i, text in cells]
        out.append("</g>")
    return "".join(out) + "</svg>\n"


def _layout(row: Row, columns: int) -> list[tuple[int, int, int, int, str]]:
    """(column, line, width, token, text) of what is drawn; a newline takes one cell and breaks the line, and so does the right edge."""
    cells, x, y = [], 0, 0
    for i, piece in enumerate(row.text):
        for j, text in enumerate(piece.replace("\t", "    ").split("\n")):
            if j:
                x, y = 0, y + 1
            if not text and j:  # only the first newline of a piece is drawn
                continue
            w = max(len(text), 1)
            if x + w > columns and x:
                x, y = 0, y + 1
            cells.append((x, y, w, i, text))
            x += w
    return cells


def _cell(row: Row, i: int, text: str, moment: int, x: float, y: float, w: int) -> str:
    """One cell as it stands after `moment` forwards."""
    step, prob = row.step[i], row.prob[i]
    box = f'x="{x + 0.5:.1f}" y="{y:.1f}" width="{w * EM - 1:.1f}" height="{LINE - 3:.1f}" rx="3"'
    if step >= moment:
        return f'<rect class="mask" {box}/>'
    drawn = ""
    if step >= 0 and prob is None:
        drawn = f'<rect class="mask" {box}/>'
    elif step >= 0:
        drawn = f'<rect class="low" {box}/><rect class="high" {box} opacity="{prob:.2f}"/>'
    if text.strip():  # textLength keeps the grid whatever font the reader has
        x += (len(text) - len(text.lstrip())) * EM
        text = text.strip()
        drawn += (f'<text class="{"given" if step < 0 else "new"}" x="{x:.1f}" y="{y + 12:.1f}" textLength="{len(text) * EM:.1f}">'
                  f"{html.escape(_printable(text))}</text>")
    return drawn


def _printable(text: str) -> str:
    """XML knows no control characters."""
    return "".join(c if c.isprintable() or c == " " else "\ufffd" for c in text)


EM, LINE = 7.25, 19.0  # pixels of one character and one line of a picture
PICTURE_STYLE = (
    "text{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre}.note{font:12px system-ui,sans-serif;fill:#6b7280}"
    ".panel{fill:#fbfbfa;stroke:#e3e3df}.mask{fill:#e4e4e0}.given{fill:#6b7280}.new{fill:#16181d}.low{fill:#f4b183}.high{fill:#a6dccb}"
    "@media(prefers-color-scheme:dark){.note,.given{fill:#9aa1ac}.panel{fill:#16181d;stroke:#2b2f37}.mask{fill:#2c3038}.new{fill:#f1f2f4}"
    ".low{fill:#8a4a21}.high{fill:#1f6a58}}"
)

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@@TITLE@@</title>
<style>
:root { color-scheme: light dark; --bg: #f6f6f4; --card: #fff; --line: #e3e3df; --ink: #16181d; --soft: #5f6672; --mask: #e4e4e0;
  --low: #f4b183; --high: #a6dccb; --accent: #0f6b57; --ring: #16181d; }
@media (prefers-color-scheme: dark) { :root { --bg: #0f1115; --card: #16181d; --line: #2b2f37; --ink: #f1f2f4; --soft: #9aa1ac; --mask: #2c3038;
  --low: #8a4a21; --high: #1f6a58; --accent: #4fc3a5; --ring: #f1f2f4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 9rem; }
main:has(.two) { max-width: 110rem; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.25rem; align-items: start; }
.two article { min-width: 0; }
@media (max-width: 60rem) { .two { grid-template-columns: 1fr; } }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; letter-spacing: -.01em; }
.sub { color: var(--soft); margin: 0 0 1.25rem; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: center; color: var(--soft); font-size: .85rem; margin-bottom: 1.25rem; }
.legend span { display: inline-flex; align-items: center; gap: .45rem; }
.legend i { display: inline-block; width: 1.6rem; height: .8rem; border-radius: .25rem; }
.legend .scale { width: 7rem; background: linear-gradient(in oklab 90deg, var(--low), var(--high)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 1rem 1.25rem 1.1rem; margin-bottom: 1rem; }
article header { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline; margin-bottom: .6rem; }
h2 { font-size: .95rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.count { color: var(--soft); font-size: .85rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.text { font: 14px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.text b { font-weight: 400; border-radius: .2rem; padding: .1em 0; cursor: default;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.text b.given { color: var(--soft); }
.text b.on { background: color-mix(in oklab, var(--high) var(--p), var(--low)); }
.text b.on.filled { background: var(--mask); color: var(--soft); }
.text b.off { background: var(--mask); color: transparent; box-shadow: inset 1px 0 var(--card); user-select: none; }
.text b.fresh { outline: 1.5px solid var(--ring); outline-offset: -1px; }
.text b.nl::before { content: "↵"; opacity: .45; }
.text b.part::before { content: "·"; opacity: .45; }
.text b:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
@media (prefers-reduced-motion: no-preference) { .text b { transition: background-color .25s, color .25s; } }
.map { display: block; width: 100%; height: 3.5rem; margin-top: .8rem; border-top: 1px solid var(--line); padding-top: .5rem; overflow: visible; }
.map rect { fill: color-mix(in oklab, var(--high) var(--p), var(--low)); }
.map rect.off { fill: var(--mask); }
.map line { stroke: var(--ring); stroke-width: 1; vector-effect: non-scaling-stroke; }
.cap { color: var(--soft); font-size: .75rem; margin: .3rem 0 0; }
footer { position: fixed; inset: auto 0 0 0; background: color-mix(in oklab, var(--card) 92%, transparent); backdrop-filter: blur(8px);
  border-top: 1px solid var(--line); }
.bar { max-width: 60rem; margin: 0 auto; padding: .7rem 1.25rem .8rem;
  display: grid; grid-template-columns: auto 1fr auto; gap: .3rem 1rem; align-items: center; }
.buttons { display: flex; gap: .35rem; }
button, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  height: 2.25rem; padding: 0 .7rem; }
button { min-width: 2.25rem; cursor: pointer; }
button#play { background: var(--accent); color: var(--card); border-color: transparent; min-width: 5.2rem; font-weight: 600; }
button:hover, select:hover { border-color: var(--soft); }
:is(button, select, input):focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
input[type=range] { width: 100%; accent-color: var(--accent); margin: 0; }
#now { grid-column: 1 / -1; color: var(--soft); font-size: .85rem; font-variant-numeric: tabular-nums; }
#now strong { color: var(--ink); font-weight: 600; }
kbd { font: inherit; font-size: .8em; border: 1px solid var(--line); border-radius: .25rem; padding: 0 .3em; }
.keys { float: right; }
#tip { position: absolute; z-index: 2; pointer-events: none; background: var(--ink); color: var(--bg); border-radius: .4rem;
  padding: .35rem .6rem; font-size: .8rem; max-width: 18rem; font-variant-numeric: tabular-nums; white-space: pre-line; }
@media (max-width: 40rem) { .keys { display: none; } .bar { grid-template-columns: 1fr auto; } #slider { grid-column: 1 / -1; grid-row: 1; } }
</style>
</head>
<body>
<main>
<h1>@@TITLE@@</h1>
<p class="sub">@@SUBTITLE@@</p>
<div class="legend">
<span><i style="background:var(--mask)"></i>masked</span>
<span>unsure<i class="scale"></i>sure when written</span>
<span><i style="outline:1.5px solid var(--ring);outline-offset:-1.5px"></i>written by this forward</span>
<span style="color:var(--soft)">grey text was given</span>
</div>
<div id="rows" class="@@COLUMNS@@"></div>
</main>
<footer><div class="bar">
<div class="buttons">
<button id="play" title="Play or pause (space)">Play</button>
<button id="back" title="One forward back (left arrow)" aria-label="One forward back">‹</button>
<button id="next" title="One forward on (right arrow)" aria-label="One forward on">›</button>
</div>
<input id="slider" type="range" min="0" step="1" aria-label="Forward">
<select id="speed" aria-label="Speed"></select>
<div id="now"></div>
</div></footer>
<div id="tip" role="tooltip" hidden></div>
<svg id="svg" hidden></svg>
<script type="application/json" id="data">@@DATA@@</script>
<script>
"use strict";
const rows = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const make = (tag, cls, text = "") => Object.assign(document.createElement(tag), {className: cls, textContent: text});
const svg = (tag, at) => {
  const e = document.createElementNS($("svg").namespaceURI, tag);
  for (const k in at) e.setAttribute(k, at[k]);
  return e;
};
const steps = Math.max(0, ...rows.map(r => r.forwards));
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
let now = 0, timer = null;

const views = rows.map((row, r) => {
  const card = make("article"), head = make("header"), count = make("span", "count"), text = make("div", "text");
  head.append(make("h2", "", row.label), count);
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "Text of " + row.label + "; arrow keys walk through its tokens");
  const spans = row.text.map((piece, i) => {
    const b = make("b", "", piece);
    if (/^\s*\n\s*$/.test(piece)) b.classList.add("nl");
    if (piece === "") b.classList.add("part");
    if (row.step[i] < 0) b.classList.add("given");
    else if (row.prob[i] === null) b.classList.add("filled");
    b.style.setProperty("--p", 100 * (row.prob[i] ?? 0) + "%");
    b.dataset.i = i;
    text.append(b);
    return b;
  });
  const first = row.step.findIndex(s => s >= 0);
  if (first >= 0) spans[first].tabIndex = 0;
  const n = row.text.length, tall = Math.max(1, row.forwards / 28);
  const map = svg("svg", {class: "map", viewBox: `0 0 ${n} ${row.forwards + tall}`, preserveAspectRatio: "none", "aria-hidden": "true"});
  const dots = row.step.map((s, i) => {
    if (s < 0) return null;
    const dot = svg("rect", {x: i + .06, y: s, width: .88, height: tall});
    dot.style.setProperty("--p", 100 * (row.prob[i] ?? 0) + "%");
    map.append(dot);
    return dot;
  });
  const line = svg("line", {x1: 0, x2: n});
  map.append(line);
  card.append(head, text, map, make("p", "cap", "position → across, forward ↓ down: the order in which this text was written"));
  $("rows").append(card);
  text.addEventListener("keydown", e => {
    const by = {ArrowRight: 1, ArrowLeft: -1}[e.key];
    if (!by || e.target.dataset.i === undefined) return;
    const to = spans[+e.target.dataset.i + by];
    e.preventDefault(); e.stopPropagation();
    if (to) { e.target.tabIndex = -1; to.tabIndex = 0; to.focus(); }
  });
  for (const kind of ["mouseover", "focusin"]) text.addEventListener(kind, e => tell(e.target, row));
  for (const kind of ["mouseout", "focusout"]) text.addEventListener(kind, () => { $("tip").hidden = true; });
  return {row, spans, dots, line, count, total: row.step.filter(s => s >= 0).length};
});

function about(row, i) {
  if (row.step[i] < 0) return "given";
  if (now <= row.step[i]) return `masked; block ${row.block[i] + 1}`;
  const sure = row.prob[i] === null ? "filled: the text ended before it" : `probability ${row.prob[i].toFixed(3)}`;
  return `${JSON.stringify(row.text[i])}\nforward ${row.step[i] + 1} of ${row.forwards}, block ${row.block[i] + 1}\n${sure}`;
}
function tell(b, row) {
  if (b.dataset.i === undefined) return;
  const tip = $("tip"), said = about(row, +b.dataset.i), box = b.getClientRects()[0];
  b.setAttribute("aria-label", said);
  tip.textContent = said; tip.hidden = false;
  if (!box) return;
  tip.style.left = Math.max(8, Math.min(box.left + scrollX, scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8)) + "px";
  const above = box.top - tip.offsetHeight - 6;
  tip.style.top = scrollY + (above > 0 ? above : box.bottom + 6) + "px";
}
function show(step) {
  now = Math.max(0, Math.min(steps, step));
  let fresh = 0, written = 0, total = 0;
  for (const {row, spans, dots, line, count, total: open} of views) {
    let here = 0;
    row.step.forEach((s, i) => {
      if (s < 0) return;
      const on = s < now;
      spans[i].classList.toggle("on", on);
      spans[i].classList.toggle("off", !on);
      spans[i].classList.toggle("fresh", s === now - 1);
      dots[i].classList.toggle("off", !on);
      here += on; fresh += s === now - 1;
    });
    const at = Math.min(now, row.forwards);
    line.setAttribute("y1", at); line.setAttribute("y2", at);
    count.textContent = `${at} of ${row.forwards} forwards · ${here} of ${open} tokens`;
    written += here; total += open;
  }
  $("slider").value = now;
  $("slider").setAttribute("aria-valuetext", `forward ${now} of ${steps}`);
  $("now").textContent = "";
  const keys = make("span", "keys");
  const help = [["space", " play  "], ["←", ""], ["→", " step  "], ["home", ""], ["end", " jump"]];
  for (const [key, what] of help) keys.append(make("kbd", "", key), what);
  const spent = rows.reduce((sum, row) => sum + row.forwards, 0), rate = (total / Math.max(1, spent)).toFixed(2);
  $("now").append(keys, make("strong", "", `Forward ${now} of ${steps}`),
    ` · ${fresh} written now · ${written} of ${total} tokens · ${rate} tokens per forward`);
}
function stop() { clearInterval(timer); timer = null; $("play").textContent = "Play"; }
function play() {
  if (now >= steps) show(0);
  stop(); $("play").textContent = "Pause";
  timer = setInterval(() => { show(now + 1); if (now >= steps) stop(); }, 1000 / $("speed").value);
}
const toggle = () => timer ? stop() : play();
const go = step => { stop(); show(step); };
$("slider").max = steps;
const rates = [1, 2, 5, 10, 20, 40];
for (const rate of rates) { const o = make("option", "", rate + " a second"); o.value = rate; $("speed").append(o); }
$("speed").value = rates.find(rate => rate * 12 >= steps) ?? 40;
$("play").onclick = toggle;
$("back").onclick = () => go(now - 1);
$("next").onclick = () => go(now + 1);
$("slider").oninput = () => go(+$("slider").value);
$("speed").onchange = () => { if (timer) play(); };
addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.tagName === "SELECT") return;
  const act = {ArrowLeft: () => go(now - 1), ArrowRight: () => go(now + 1), Home: () => go(0), End: () => go(steps)}[e.key];
  if (act) { act(); e.preventDefault(); }
  if (e.key === " " && e.target.tagName !== "BUTTON") { toggle(); e.preventDefault(); }
});
const asked = parseInt(location.hash.slice(1), 10);
if (asked >= 0) show(asked); else { show(0); if (!calm) play(); }
</script>
</body>
</html>
"""
