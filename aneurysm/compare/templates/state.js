"use strict";
// What the page shows, and the small words that every part of it uses.

const DATA = JSON.parse(document.getElementById("data").textContent);
const page = {
  stage: DATA.stages[DATA.shown],
  metric: null,
  sort: null, // {id, up}
  filters: new Map(), // column id -> text
  brushes: new Map(), // axis id -> [top, bottom] in pixels of the axis
  selected: new Set(),
  visible: [],
  hidden: new Set(), // column ids that the reader switched off
};
const VERDICTS = ["better", "reference", "inside the noise", "too few repeats", "worse"];

const find = (id) => document.getElementById(id);

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function draw(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 5 * 10 ** -(digits + 1) || Math.abs(value) >= 1e6)) return value.toExponential(1).replace("-", "−");
  return value.toFixed(Math.abs(value) >= 1000 ? 0 : digits).replace("-", "−");
}

const signed = (value) => (value > 0 ? "+" : "") + number(value);

// A setting as it was written: no digits that nobody typed.
const setting = (value) => (value === null ? "–" : typeof value === "number" ? String(Number(value.toPrecision(8))) : value);

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.round(seconds / 60), rest = Math.round(seconds);
  if (seconds < 600) return `${Math.floor(rest / 60)}:${String(rest % 60).padStart(2, "0")} min`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

const memory = (mb) => (mb === null || mb === undefined ? "–" : mb < 10000 ? `${mb.toFixed(0)} MB` : `${(mb / 1024).toFixed(1)} GB`);

const metricOf = (name) => page.stage.metrics.find((metric) => metric.name === name);
const ranking = (name = page.metric) => page.stage.rankings[name];

// One variant's statistics of one figure, by name.
function statistics(index, name = page.metric) {
  const row = ranking(name)?.rows[index];
  if (!row) return { mean: null, sd: null, low: null, high: null, n: 0, verdict: null };
  const [mean, sd, low, high, n, difference = null, from = null, to = null, shared = 0, corrected = null, verdict = null] = row;
  return { mean, sd, low, high, n, difference, from, to, shared, corrected, verdict };
}

const referenceOf = (index) =>
  (ranking()?.reference ?? []).find((r) => page.stage.variants[r].data === page.stage.variants[index].data);

// 0 for the worst mean of the figure, 1 for the best; null when it was not measured.
function goodness(index) {
  const means = page.stage.variants.map((_, i) => statistics(i).mean).filter((mean) => mean !== null);
  const { mean } = statistics(index);
  if (mean === null) return null;
  const low = Math.min(...means), high = Math.max(...means);
  const share = high > low ? (mean - low) / (high - low) : 1;
  return metricOf(page.metric).higher ? share : 1 - share;
}

function colour(share) {
  if (share === null) return "var(--middle)";
  const [from, to, part] = share < 0.5 ? ["--low", "--middle", share * 2] : ["--middle", "--high", share * 2 - 1];
  return `color-mix(in oklab, var(${to}) ${(100 * part).toFixed(0)}%, var(${from}))`;
}

function chip(verdict) {
  const sign = { better: "▲ ", worse: "▼ ", "inside the noise": "≈ ", "too few repeats": "… ", reference: "" }[verdict] ?? "";
  const kind = verdict === "too few repeats" ? "few" : (verdict ?? "").split(" ")[0];
  return verdict === null ? "–" : make("span", { class: `chip ${kind}` }, sign + verdict);
}

// Views register what stands for a variant; hovering and marking then reach all of them.
const stands = new Map(); // view -> index -> nodes

function register(view, index, ...nodes) {
  if (!stands.has(view)) stands.set(view, new Map());
  const own = stands.get(view);
  own.set(index, [...(own.get(index) ?? []), ...nodes]);
}

function standing(index) {
  return [...stands.values()].flatMap((own) => own.get(index) ?? []);
}

function hover(index, on, event) {
  for (const node of standing(index)) node.classList.toggle("hot", on);
  if (on && event) showTip(index, event);
  if (!on) find("tip").hidden = true;
}

function mark(index) {
  page.selected.has(index) ? page.selected.delete(index) : page.selected.add(index);
  showMarks();
}

function showMarks() {
  page.stage.variants.forEach((_, index) => {
    const own = page.selected.has(index), others = page.selected.size > 0 && !own;
    for (const node of standing(index)) {
      node.classList.toggle("mark", own);
      node.classList.toggle("dim", others && node instanceof SVGElement);
    }
  });
  document.querySelectorAll("#variants tbody tr").forEach((row) => row.setAttribute("aria-selected", page.selected.has(Number(row.dataset.index))));
}

// Pointer and keyboard of anything that stands for a variant.
function alive(node, index) {
  node.addEventListener("pointerenter", (event) => hover(index, true, event));
  node.addEventListener("pointermove", placeTip);
  node.addEventListener("pointerleave", () => hover(index, false));
  node.addEventListener("click", () => mark(index));
  return node;
}

function showTip(index, event) {
  const variant = page.stage.variants[index], one = statistics(index), tip = find("tip");
  const rows = page.stage.keys.map((key, k) => [key.name, setting(variant.values[k])]);
  if (page.stage.data.length > 1) rows.push(["data", page.stage.data[variant.data]]);
  if (one.verdict && one.verdict !== "reference" && one.difference !== null)
    rows.push(["difference", `${signed(one.difference)}  (${one.from === null ? "no interval" : `${signed(one.from)} to ${signed(one.to)}`})`]);
  if (one.low !== null && one.n > 1) rows.push(["95 % interval", `${number(one.low)} to ${number(one.high)}`], ["sd", number(one.sd)]);
  rows.push(["runs", `${variant.finished} of ${variant.runs} finished`], ["time of a run", duration(variant.cost.seconds_mean)], ["peak memory", memory(variant.cost.peak_memory_mb)]);
  tip.replaceChildren(
    make("div", { class: "big" }, `${page.metric ?? ""} ${number(one.mean)} `, one.verdict ? chip(one.verdict) : ""),
    make("table", {}, make("tbody", {}, ...rows.map(([name, value]) => make("tr", {}, make("td", {}, name), make("td", {}, value))))),
    ...variant.notes.map((note) => make("p", { class: "soft" }, note)),
  );
  tip.hidden = false;
  placeTip(event);
}

function placeTip(event) {
  const tip = find("tip");
  if (tip.hidden) return;
  const { width, height } = tip.getBoundingClientRect();
  const right = event.clientX + 18 + width > innerWidth ? event.clientX - width - 14 : event.clientX + 18;
  tip.style.left = `${Math.max(4, right)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - height - 8))}px`;
}
