// The table of variants: sort, filter, choose columns, mark rows.

function tableColumns() {
  const stage = page.stage, metric = metricOf(page.metric);
  const columns = quantities().filter((q) => q.setting).map((q) => ({ ...q, node: (i) => q.text(i), words: !q.numeric }));
  const text = (id, name, value, more = {}) => ({ id, name, numeric: false, value, text: (i) => String(value(i) ?? "–"), node: (i) => String(value(i) ?? "–"), ...more });
  const plain = (id, name, value, show = number, more = {}) => ({ id, name, numeric: true, value, text: (i) => show(value(i)), node: (i) => show(value(i)), ...more });
  columns.push(text("variant", "folder", (i) => stage.variants[i].name, { quiet: stage.keys.length > 0, words: true }));
  if (stage.data.length > 1) columns.push(text("data", "data", (i) => stage.data[stage.variants[i].data]));
  if (metric) {
    const one = (name) => (i) => statistics(i)[name];
    const reference = ranking().named ? "baseline" : "best";
    columns.push(
      plain("mean", metric.name, one("mean"), number, { title: `mean over folds and seeds; ${metric.higher ? "higher" : "lower"} is better` }),
      { id: "range", name: "95 % interval", numeric: true, value: one("low"), text: (i) => number(statistics(i).low), node: rangeGraph(), left: true, title: "dot: mean; bar: 95 % interval; upright line: the reference" },
      plain("sd", "± sd", one("sd"), number, { title: "over the repeats" }),
      plain("n", "repeats", one("n"), (n) => String(n ?? 0), { title: "finished folds x seeds with this figure" }),
      plain("difference", `to ${reference}`, (i) => (one("verdict")(i) === "reference" ? 0 : one("difference")(i)), number, {
        node: (i) => (one("verdict")(i) === "reference" || one("difference")(i) === null ? "–" : signed(one("difference")(i))), title: "mean difference over the folds and seeds that both have",
      }),
      { id: "verdict", name: "verdict", numeric: false, left: true, value: (i) => VERDICTS.indexOf(one("verdict")(i)), text: (i) => one("verdict")(i) ?? "–", node: (i) => chip(one("verdict")(i)) },
      plain("p", "p corrected", one("corrected"), number, { quiet: true, title: "Holm, for all comparisons made" }),
    );
  }
  const others = stage.metrics.filter((m) => m !== metric && !m.cost);
  others.forEach((m, k) => columns.push(plain(`other:${m.name}`, m.name, (i) => statistics(i, m.name).mean, number, { quiet: k > 1 })));
  columns.push(plain("seconds", "time each", (i) => stage.variants[i].cost.seconds_mean, duration, { title: "mean of the finished runs; filter in seconds" }));
  columns.push(plain("total", "time in all", (i) => stage.variants[i].cost.seconds_total, duration, { quiet: true }));
  columns.push(plain("memory", "memory", (i) => stage.variants[i].cost.peak_memory_mb, memory, { title: "peak of a run; filter in MB" }));
  if (stage.variants.some((v) => v.cost.peak_gpu_memory_mb !== null)) columns.push(plain("gpu", "GPU memory", (i) => stage.variants[i].cost.peak_gpu_memory_mb, memory));
  columns.push(plain("runs", "runs", (i) => stage.variants[i].finished, (n) => String(n), { node: (i) => runsText(stage.variants[i]), title: "finished, of those begun" }));
  return columns;
}

const runsText = (variant) => (variant.finished === variant.runs ? String(variant.runs) : `${variant.finished} of ${variant.runs}`);
const isShown = (column) => (page.hidden.has(`+${column.id}`) ? true : !page.hidden.has(column.id) && !column.quiet);

// Mean and interval in a cell, on a scale that all rows share: that of the means, so that they can be told apart.
function rangeGraph() {
  const rows = page.stage.variants.map((_, i) => statistics(i)).filter((one) => one.mean !== null);
  const means = rows.map((one) => one.mean);
  const low = Math.min(...means), high = Math.max(...means);
  const widest = Math.max(0, ...rows.map((one) => (one.high ?? one.mean) - one.mean)), sd = Math.max(0, ...rows.map((one) => one.sd ?? 0));
  const margin = Math.min(widest, Math.max((high - low) / 2, sd)) || Math.abs(high) * 0.01 || 1;
  const from = low - margin, to = high + margin, width = 132;
  const at = (value) => 4 + (width - 8) * Math.min(1, Math.max(0, (value - from) / (to - from)));
  return (index) => {
    const one = statistics(index);
    if (one.mean === null) return "–";
    const words = one.low === null ? "one repeat, no interval" : `${number(one.low)} to ${number(one.high)}`;
    const graph = draw("svg", { class: "range", viewBox: `0 0 ${width} 18`, role: "img", "aria-label": words }, draw("title", {}));
    graph.firstChild.textContent = words;
    const reference = referenceOf(index);
    if (reference !== undefined) graph.append(draw("line", { x1: at(statistics(reference).mean), x2: at(statistics(reference).mean), y1: 0, y2: 18, class: "tick", style: "stroke: var(--middle); stroke-dasharray: 2 2" }));
    if (one.low !== null) {
      graph.append(draw("line", { x1: at(one.low), x2: at(one.high), y1: 9, y2: 9, style: `stroke: ${colour(goodness(index))}; stroke-width: 4; stroke-linecap: ${one.low < from || one.high > to ? "butt" : "round"}; opacity: 0.45` }));
      if (one.low < from) graph.append(draw("path", { d: "M4 5 L0 9 L4 13 Z", style: `fill: ${colour(goodness(index))}` }));
      if (one.high > to) graph.append(draw("path", { d: `M${width - 4} 5 L${width} 9 L${width - 4} 13 Z`, style: `fill: ${colour(goodness(index))}` }));
    }
    graph.append(draw("circle", { cx: at(one.mean), cy: 9, r: 4, style: `fill: ${colour(goodness(index))}` }));
    return graph;
  };
}

let rows = []; // by variant
function buildTable() {
  const columns = page.columns.filter(isShown), table = find("variants");
  const heads = columns.map((column) => {
    const button = make("button", { type: "button", title: column.title, onclick: () => sortBy(column) }, column.name);
    return make("th", { scope: "col", class: column.numeric && !column.left ? "num" : "", "data-column": column.id }, button);
  });
  const filters = columns.map((column) => {
    const field = make("input", { type: "text", "aria-label": `Filter ${column.name}`, placeholder: column.numeric ? "> < .." : "contains", value: page.filters.get(column.id), spellcheck: "false", autocomplete: "off" });
    field.addEventListener("input", () => {
      field.value.trim() === "" ? page.filters.delete(column.id) : page.filters.set(column.id, field.value);
      field.setAttribute("aria-invalid", readFilter(field.value, column.numeric) === false);
      update();
    });
    return make("th", {}, field);
  });
  table.tHead.replaceChildren(make("tr", {}, ...heads), make("tr", { class: "filters" }, ...filters));
  stands.delete("rows");
  const best = new Set(ranking()?.best ?? []);
  rows = page.stage.variants.map((_, index) => {
    const cells = columns.map((column) => make("td", { class: column.numeric && !column.left ? "num" : column.words ? "words" : "" }, column.node(index)));
    if (best.has(index) && cells.length) cells[0].prepend(make("span", { title: "best on equal terms", "aria-label": "best" }, "★ "));
    const row = make("tr", { tabindex: "0", "data-index": index, class: best.has(index) ? "best" : "" }, ...cells);
    row.addEventListener("keydown", (event) => walk(event, row, index));
    row.addEventListener("focus", () => standing(index).forEach((node) => node.classList.add("hot")));
    row.addEventListener("blur", () => hover(index, false));
    register("rows", index, row);
    return alive(row, index);
  });
  showSort();
}

function walk(event, row, index) {
  if (event.key === "Enter" || event.key === " ") mark(index);
  else if (event.key === "ArrowDown") row.nextElementSibling?.focus();
  else if (event.key === "ArrowUp") row.previousElementSibling?.focus();
  else return;
  event.preventDefault();
}

function sortBy(column) {
  const good = column.id === "mean" ? !metricOf(page.metric).higher : true;
  page.sort = page.sort?.id === column.id ? { id: column.id, up: !page.sort.up } : { id: column.id, up: good };
  showSort();
  update();
}

function showSort() {
  for (const head of find("variants").tHead.rows[0].cells) {
    if (head.dataset.column === page.sort?.id) head.setAttribute("aria-sort", page.sort.up ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  }
}

function sorted(indices) {
  const column = page.columns.find((c) => c.id === page.sort?.id);
  if (!column) return indices;
  const sign = page.sort.up ? 1 : -1;
  const order = (a, b) => {
    const [x, y] = [column.value(a), column.value(b)];
    if (x === null || y === null || x === undefined || y === undefined) return (x ?? null) === (y ?? null) ? a - b : (x ?? null) === null ? 1 : -1; // unknown last
    const less = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return sign * less || a - b;
  };
  return [...indices].sort(order);
}

function showRows() {
  find("variants").tBodies[0].replaceChildren(...page.visible.map((index) => rows[index]));
  find("empty").hidden = page.visible.length > 0;
}

function columnMenu() {
  find("columns").replaceChildren(...page.columns.map((column) => {
    const box = make("input", { type: "checkbox", checked: isShown(column) });
    box.addEventListener("change", () => {
      page.hidden.delete(box.checked ? column.id : `+${column.id}`);
      page.hidden.add(box.checked ? `+${column.id}` : column.id);
      if (!box.checked) page.filters.delete(column.id); // a filter that cannot be seen would be a trap
      buildTable();
      update();
    });
    return make("label", {}, box, ` ${column.name}`);
  }));
}

// What is shown, as text: same rows, same columns, same order.
function shownAsCsv() {
  const columns = page.columns.filter(isShown);
  const quote = (value) => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const cell = (column, index) => (column.id === "verdict" ? column.text(index) : column.value(index) ?? "");
  const lines = [columns.map((c) => c.id === "range" ? "low" : c.name), ...page.visible.map((index) => columns.map((c) => cell(c, index)))];
  return lines.map((line) => line.map((value) => quote(String(value))).join(",")).join("\r\n") + "\r\n";
}
