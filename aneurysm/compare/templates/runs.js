// Single runs with their state, the stacker's figures over all patients, and the cards on top.

const STATES = ["finished", "running", "unfinished", "failed", "damaged"];

function buildCards() {
  const stage = page.stage, found = [], own = ranking();
  if (own) {
    for (const best of own.best) {
      const one = statistics(best), variant = stage.variants[best];
      const interval = one.low === null ? "one repeat" : `95 %: ${number(one.low)} to ${number(one.high)}`;
      const name = stage.data.length > 1 ? `Best of data ${stage.data[variant.data]}` : "Best";
      found.push(card(`${name} ${page.metric}`, make("div", { class: "value" }, number(one.mean), make("small", {}, `${interval}, n = ${one.n}`)), pairs(best)));
    }
    found.push(card(own.named ? "Against the baseline" : "Against the best", tally()));
  } else found.push(card("Nothing to rank yet", make("div", { class: "more" }, "No finished run has a figure.")));
  found.push(card("Runs", runStates()), card("Cost of what is finished", costs()));
  find("cards").replaceChildren(...found);
}

const card = (name, ...content) => make("div", { class: "card" }, make("div", { class: "name" }, name), ...content);

function pairs(index) {
  const chips = page.stage.keys.map((key, k) => [key.name, page.stage.variants[index].values[k]]).filter(([, value]) => value !== null);
  const shown = chips.length ? chips.map(([name, value]) => make("span", { class: "pair-chip" }, `${name} `, make("b", {}, setting(value)))) : [make("span", { class: "pair-chip" }, page.stage.variants[index].name)];
  return make("div", { class: "pairs" }, ...shown);
}

function tally() {
  const verdicts = page.stage.variants.map((_, i) => statistics(i).verdict);
  const counted = VERDICTS.filter((v) => v !== "reference").map((v) => [v, verdicts.filter((w) => w === v).length]).filter(([, n]) => n > 0);
  if (!counted.length) return make("div", { class: "more" }, "One variant only: nothing to compare it with.");
  return make("div", { class: "tally" }, ...counted.flatMap(([verdict, n]) => [make("b", {}, String(n)), make("span", {}, chip(verdict))]));
}

function runStates() {
  const counts = STATES.map((state) => [state, page.stage.runs.filter((run) => run.state === state).length]).filter(([, n]) => n);
  const bar = make("div", { class: "states", role: "img", "aria-label": counts.map(([s, n]) => `${n} ${s}`).join(", ") });
  for (const [state, n] of counts) {
    const part = make("i", { class: `s-${state}` });
    part.style.flex = n;
    bar.append(part);
  }
  return make("div", {}, make("div", { class: "value" }, String(page.stage.runs.length), make("small", {}, `of ${page.stage.variants.length} variants`)), bar,
    make("div", { class: "more" }, counts.map(([state, n]) => `${n} ${state}`).join(" · ")));
}

function costs() {
  const sum = (name) => page.stage.variants.reduce((total, v) => total + (v.cost[name] ?? 0), 0);
  const most = (name) => Math.max(...page.stage.variants.map((v) => v.cost[name] ?? -1));
  const peak = most("peak_memory_mb"), gpu = most("peak_gpu_memory_mb");
  const said = [peak >= 0 ? `at most ${memory(peak)} of memory` : "memory not recorded", gpu >= 0 ? `${memory(gpu)} on the GPU` : ""].filter(Boolean);
  return make("div", {}, make("div", { class: "value" }, duration(sum("seconds_total"))), make("div", { class: "more" }, said.join(" · ")));
}

function buildRuns() {
  const stage = page.stage, shown = new Set(page.visible);
  const list = stage.runs.filter((run) => run.v === null || shown.has(run.v));
  find("runs-title").textContent = `All ${list.length} runs`;
  const open = list.filter((run) => run.state !== "finished").length;
  if (open) find("runs-title").textContent += `, ${open} not finished`;
  if (!find("runs-section").open) return; // built when it is looked at: there may be thousands
  const figures = stage.metrics.filter((m) => !m.cost).map((m) => m.name).slice(0, 4), curves = list.some((run) => run.curve.length > 1);
  const heads = ["state", ...stage.keys.length ? stage.keys.map((k) => k.name) : [], "fold", "seed", ...figures, ...(curves ? ["val/loss"] : []), "time", "memory", "what happened", "folder"];
  const rank = (run) => [4, 1, 2, 0, 3][STATES.indexOf(run.state)]; // failed first
  const rows = [...list].sort((a, b) => rank(a) - rank(b)).map((run) => {
    const values = run.v === null ? stage.keys.map(() => "–") : stage.variants[run.v].values.map(setting);
    const happened = run.problem || (run.progress !== null ? `${Math.round(run.progress * 100)} % of the epochs` : "");
    const cells = [state(run.state), ...values, String(run.fold), String(run.seed ?? "–"), ...figures.map((name) => number(run.figures[name]))];
    if (curves) cells.push(spark(run.curve));
    cells.push(duration(run.figures.seconds ?? null), memory(run.figures.peak_memory_mb ?? null), happened, run.folder);
    return make("tr", { "data-state": run.state }, ...cells.map((cell, k) => make("td", { class: heads[k] === "folder" ? "uid" : heads[k] === "what happened" ? "words" : figures.includes(heads[k]) ? "num" : "fit" }, cell)));
  });
  find("runs").tHead.replaceChildren(make("tr", {}, ...heads.map((name) => make("th", { scope: "col", class: figures.includes(name) ? "num" : "" }, name))));
  find("runs").tBodies[0].replaceChildren(...rows);
}

const state = (name) => make("span", {}, make("span", { class: `state-dot s-${name}` }), name);

function spark(values) {
  if (values.length < 2) return "–";
  const low = Math.min(...values), high = Math.max(...values), span = high - low || 1;
  const path = values.map((v, k) => `${k ? "L" : "M"}${((k / (values.length - 1)) * 90 + 1).toFixed(1)} ${(18 - ((v - low) / span) * 16).toFixed(1)}`).join("");
  return draw("svg", { class: "spark", viewBox: "0 0 92 20", role: "img", "aria-label": `validation loss from ${number(values[0])} to ${number(values.at(-1))}` }, draw("path", { d: path }));
}

function buildScans() {
  const scans = page.stage.scans, known = Object.keys(scans).map(Number);
  find("scans-section").hidden = known.length === 0;
  if (!known.length) return;
  const names = Object.keys(scans[known[0]].value), label = { rsna_score: "RSNA score", auc_present: "AUC of Aneurysm Present" };
  const pair = (bounds) => (bounds[0] === null ? "–" : `${number(bounds[0])} to ${number(bounds[1])}`);
  const heads = ["variant", "scans", "seeds", ...names.flatMap((name) => [label[name], "95 % interval", "to the reference", "95 % interval"])];
  const rows = known.sort((a, b) => (scans[b].value[names[0]] ?? 0) - (scans[a].value[names[0]] ?? 0)).map((index) => {
    const one = scans[index];
    const cells = names.flatMap((name) => {
      const bounds = one.difference_interval[name], sure = bounds[0] !== null && (bounds[0] > 0 || bounds[1] < 0);
      const isReference = ranking("rsna_score")?.reference.includes(index);
      return [number(one.value[name]), pair(one.interval[name]), isReference ? "reference" : signed(one.difference[name]), isReference ? "" : `${pair(bounds)}${sure ? "" : "  ≈"}`];
    });
    return make("tr", {}, make("td", {}, page.stage.variants[index].label), ...[one.scans, one.seeds, ...cells].map((cell) => make("td", { class: "num" }, String(cell))));
  });
  find("scans").replaceChildren(make("thead", {}, make("tr", {}, ...heads.map((name, k) => make("th", { class: k ? "num" : "" }, name)))), make("tbody", {}, ...rows));
}
