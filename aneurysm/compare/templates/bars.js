// Ablation bars: what each change against the reference is worth, with its interval.

const MOST_BARS = 24;

// Settings in which two variants differ; what an option brings along counts with the option.
function changes(index, other) {
  const { keys, variants } = page.stage;
  const differ = keys.map((_, k) => k).filter((k) => variants[index].values[k] !== variants[other].values[k]);
  return differ.filter((k) => !differ.some((above) => keys[k].full.startsWith(`${keys[above].full}.`)));
}

function changeText(index, other) {
  const { keys, variants } = page.stage, differ = changes(index, other);
  const ablated = differ.find((k) => keys[k].name === "ablation");
  if (ablated !== undefined) return setting(variants[index].values[ablated]).replaceAll("_", " ");
  return differ.map((k) => `${keys[k].name} ${setting(variants[other].values[k])} → ${setting(variants[index].values[k])}`).join(", ") || variants[index].name;
}

const oneChange = (index, other) => changes(index, other).length === 1 || page.stage.keys.some((key) => key.name === "ablation");

function barRows() {
  const rows = page.visible.filter((i) => !ranking().reference.includes(i) && statistics(i).difference !== null && referenceOf(i) !== undefined);
  const single = rows.filter((i) => oneChange(i, referenceOf(i)));
  find("one-change").disabled = single.length === 0 || single.length === rows.length;
  const chosen = find("one-change").checked && single.length ? single : rows;
  const sign = metricOf(page.metric).higher ? -1 : 1;
  return chosen.sort((a, b) => sign * (statistics(a).difference - statistics(b).difference));
}

function buildBars() {
  stands.delete("bars");
  const place = find("bars"), rows = page.metric ? barRows() : [];
  find("reference-word").textContent = ranking()?.named ? "baseline" : "best";
  if (!rows.length) return place.replaceChildren(make("p", { class: "none" }, "No variant has folds and seeds in common with the reference yet."));
  const shown = rows.slice(0, MOST_BARS), all = shown.map((i) => statistics(i));
  const width = 640, label = 232, high = Math.min(46, Math.max(27, 300 / shown.length)), head = 34, right = 70;
  // Intervals of two or three repeats can be many times as wide as any difference: they may leave the picture.
  const largest = Math.max(...all.map((one) => Math.abs(one.difference))) || 1e-6;
  const reach = Math.min(Math.max(...all.flatMap((one) => [one.from, one.to, one.difference].map((v) => Math.abs(v ?? 0)))), largest * 2.6) * 1.06;
  const x = (value) => label + ((Math.min(reach, Math.max(-reach, value)) + reach) / (2 * reach)) * (width - label - right);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${head + shown.length * high + 26}`, role: "group", "aria-label": "Differences to the reference" });
  const ticks = round(-reach, reach, 4), show = brief(ticks);
  for (const tick of ticks) {
    picture.append(draw("line", { x1: x(tick), x2: x(tick), y1: head - 6, y2: head + shown.length * high, class: "tick" }), words(x(tick), head + shown.length * high + 18, tick === 0 ? "0" : (tick > 0 ? "+" : "") + show(tick), "middle"));
  }
  const better = metricOf(page.metric).higher;
  picture.append(words(x(0) - 10, 14, better ? "← worse" : "← better", "end"), words(x(0) + 10, 14, better ? "better →" : "worse →", "start"));
  shown.forEach((index, k) => picture.append(barOf(index, head + k * high, high, x, reach, width)));
  picture.append(draw("line", { x1: x(0), x2: x(0), y1: head - 8, y2: head + shown.length * high, class: "axis" }));
  const reference = [...new Set(shown.map(referenceOf))].map((i) => page.stage.variants[i].label).join("; ");
  const more = rows.length > shown.length ? ` ${rows.length - shown.length} more are in the table.` : "";
  place.replaceChildren(picture, make("p", { class: "soft small" }, `Against ${reference}. Whiskers: 95 % interval of one comparison; filled bars pass the correction for all of them.${more}`));
}

function barOf(index, y, high, x, reach, width) {
  const one = statistics(index), from = Math.min(x(0), x(one.difference)), middle = y + high / 2;
  const tone = one.verdict === "better" ? "var(--good)" : one.verdict === "worse" ? "var(--bad)" : "var(--middle)";
  const sure = one.verdict === "better" || one.verdict === "worse";
  const group = draw("g", { class: "bar-row", "data-bar": index });
  const name = changeText(index, referenceOf(index));
  const text = words(222, middle + 4, name.length > 36 ? `${name.slice(0, 35)}…` : name, "end", "what");
  group.append(draw("rect", { x: 0, y, width, height: high, fill: "transparent" }), text);
  group.append(draw("rect", { x: from, y: middle - 8, width: Math.max(1, Math.abs(x(one.difference) - x(0))), height: 16, rx: 2, style: `fill: ${tone}; fill-opacity: ${sure ? 0.95 : 0.35}; stroke: ${tone}; ${one.verdict === "too few repeats" ? "stroke-dasharray: 3 2" : ""}` }));
  if (one.from !== null) {
    group.append(draw("line", { x1: x(one.from), x2: x(one.to), y1: middle, y2: middle, class: "whisker" }));
    for (const [end, beyond] of [[one.from, one.from < -reach], [one.to, one.to > reach]])
      if (!beyond) group.append(draw("line", { x1: x(end), x2: x(end), y1: middle - 4, y2: middle + 4, class: "whisker" }));
  }
  group.append(words(width, middle + 4, signed(one.difference), "end"));
  register("bars", index, group);
  return alive(group, index);
}
