// Stages, figures and filters put together.

function showStage(stage, metric) {
  Object.assign(page, { stage, metric: metric ?? stage.metric, selected: new Set(), freshScatter: true });
  page.filters.clear();
  page.brushes.clear();
  page.hidden.clear();
  find("metric").replaceChildren(...stage.metrics.map((m) => make("option", { value: m.name, selected: m.name === page.metric }, m.name)));
  find("metric").disabled = stage.metrics.length === 0;
  for (const tab of find("stages").children) tab.setAttribute("aria-selected", tab.dataset.stage === stage.stage);
  showMetric();
}

function showMetric() {
  const metric = metricOf(page.metric);
  page.columns = tableColumns();
  page.axes = parallelAxes();
  for (const id of [...page.brushes.keys()]) if (!page.axes.some((axis) => axis.id === id)) page.brushes.delete(id);
  page.sort = metric ? { id: "mean", up: !metric.higher } : null;
  find("remarks").replaceChildren(...page.stage.remarks.map((sentence) => make("p", { class: "warning" }, sentence)));
  find("scale").replaceChildren(...(metric ? ["worst ", make("i"), " best ", metric.name] : []));
  buildCards();
  buildTable();
  columnMenu();
  buildParallel();
  scatterChoices();
  buildScans();
  update();
}

function update() {
  page.visible = sorted(pass(page.columns, page.axes));
  const narrowed = page.filters.size + page.brushes.size > 0;
  find("shown").textContent = `${page.visible.length} of ${page.stage.variants.length} variants shown`;
  find("clear").hidden = !narrowed;
  showRows();
  showLines();
  buildScatter();
  buildBars();
  buildRuns();
  showMarks();
}

find("stages").replaceChildren(...DATA.stages.map((stage) => {
  const tab = make("button", { type: "button", role: "tab", "data-stage": stage.stage }, stage.stage, make("span", { class: "count" }, String(stage.variants.length)));
  tab.addEventListener("click", () => showStage(stage));
  return tab;
}));
find("metric").addEventListener("change", (event) => {
  page.metric = event.target.value;
  page.freshScatter = true;
  showMetric();
});
find("clear").addEventListener("click", () => {
  page.filters.clear();
  page.brushes.clear();
  buildTable();
  buildParallel();
  update();
});
for (const id of ["scatter-x", "scatter-y"]) find(id).addEventListener("change", () => { buildScatter(); showMarks(); });
find("one-change").addEventListener("change", () => { buildBars(); showMarks(); });
find("runs-section").addEventListener("toggle", buildRuns);
find("csv").addEventListener("click", () => {
  const address = URL.createObjectURL(new Blob(["\ufeff", shownAsCsv()], { type: "text/csv;charset=utf-8" }));
  make("a", { href: address, download: `${page.stage.stage}-variants.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && page.selected.size) {
    page.selected.clear();
    showMarks();
  }
});

function theme(name) {
  document.documentElement.dataset.theme = name;
  find("theme").textContent = name === "dark" ? "Light" : "Dark";
}
find("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
let drawn = innerWidth;
addEventListener("resize", () => {
  if (Math.abs(innerWidth - drawn) < 40) return;
  drawn = innerWidth;
  buildParallel();
  showLines();
  showMarks();
});
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
showStage(page.stage);
